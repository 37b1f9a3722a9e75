"""Candidates: the better picture wins, and a scorer that fails never costs a picture."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import itertools
import json
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest
import structlog
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from cacheserver.generation.providers.painter import MODEL, PainterUpstream
from cacheserver.generation.scoring import HttpScorer, ScoringError, TechnicalScorer, best_of
from cacheserver.model import GeneratedImage, ImageRequest
from tests.fakes import FakeClock
from tests.provider import HttpRequest, OpenAIStandIn, Reply, small_image
from tests.waiting import until

REQUEST = ImageRequest("a very private prompt about zebras", "gpt-image-2", size="64x48", quality="high")
SIZE = (640, 640)


def encoded(picture: Image.Image, image_format: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=image_format, **options)
    return file.getvalue()


def image(data: bytes) -> GeneratedImage:
    digest = hashlib.sha256(data).hexdigest()
    return GeneratedImage(data, "image/png", 64, 48, digest, "gpt-image-2", "64x48", "high", "opaque")


async def technical(picture: Image.Image, image_format: str = "png") -> float:
    return await TechnicalScorer().score(REQUEST, image(encoded(picture, image_format)))


@pytest.fixture(params=[("a red fox", 1), ("city at night", 0)], ids=str)
async def picture(request: pytest.FixtureRequest, clock: FakeClock) -> Image.Image:
    prompt, variant = request.param
    asked = ImageRequest(prompt, MODEL, size="640x640")
    [painted] = await PainterUpstream(clock=clock).generate(asked, [variant])
    return Image.open(io.BytesIO(painted.data)).convert("RGB")


# --- what can be measured in the pixels


async def test_a_score_lies_between_0_and_1_and_is_the_same_again(picture: Image.Image) -> None:
    score = await technical(picture)
    assert 0.6 < score < 1
    assert score == await technical(picture)


async def test_the_more_a_picture_is_blurred_the_lower_is_its_score(picture: Image.Image) -> None:
    radii = (0.5, 1, 2, 4, 8, 16, 32)
    scores = [await technical(picture), *[await technical(picture.filter(ImageFilter.GaussianBlur(r))) for r in radii]]
    assert all(sharper > softer for sharper, softer in itertools.pairwise(scores))


async def test_the_darker_a_picture_gets_the_lower_is_its_score(picture: Image.Image) -> None:
    scores = [await technical(ImageEnhance.Brightness(picture).enhance(light)) for light in (1.0, 0.7, 0.4, 0.2, 0.1)]
    assert all(lighter > darker for lighter, darker in itertools.pairwise(scores))


async def test_the_more_of_a_picture_is_blown_out_the_lower_is_its_score(picture: Image.Image) -> None:
    scores = [await technical(ImageEnhance.Brightness(picture).enhance(light)) for light in (1.0, 1.7, 2.5, 5.0)]
    assert all(darker > lighter for darker, lighter in itertools.pairwise(scores))


def _with_bar(picture: Image.Image) -> Image.Image:
    barred = picture.copy()
    barred.paste("black", (0, 560, *SIZE))
    return barred


WORSE: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "letterbox": lambda picture: ImageOps.pad(picture.resize((640, 480)), SIZE),
    "pillarbox": lambda picture: ImageOps.pad(picture.resize((480, 640)), SIZE, color="white"),
    "frame": lambda picture: ImageOps.expand(picture.resize((580, 580)), 30, "navy"),
    "frame in a frame": lambda picture: ImageOps.expand(
        ImageOps.expand(picture.resize((540, 540)), 20, "white"), 30, "black"
    ),
    "bar at the bottom": _with_bar,
    "few colours": lambda picture: picture.filter(ImageFilter.GaussianBlur(3)).quantize(3).convert("RGB"),
    "low contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(0.3),
}


@pytest.mark.parametrize("spoil", WORSE.values(), ids=WORSE.keys())
@pytest.mark.parametrize("image_format", ["png", "jpeg"])
async def test_a_spoiled_picture_scores_lower(
    picture: Image.Image, spoil: Callable[[Image.Image], Image.Image], image_format: str
) -> None:
    assert await technical(spoil(picture), image_format) < await technical(picture, image_format)


async def test_a_frame_costs_its_share_of_the_picture() -> None:
    noise = Image.effect_noise((400, 400), 80)
    framed = ImageOps.expand(noise, 50, 255)
    assert await technical(framed) == pytest.approx(await technical(noise) * (400 / 500) ** 2, rel=0.02)


@pytest.mark.parametrize(
    "blank",
    [
        Image.new("RGB", (64, 48), "white"),
        Image.new("L", (1, 1)),
        Image.new("RGBA", (64, 48), (0, 0, 0, 0)),
        Image.linear_gradient("L").point(lambda level: 100 + level // 64),
        ImageOps.expand(Image.new("RGB", (64, 48), "white"), 10, "black"),
    ],
    ids=["one colour", "one pixel", "transparent", "nearly one colour", "framed"],
)
async def test_a_blank_picture_scores_nothing(blank: Image.Image) -> None:
    assert await technical(blank) == 0


async def test_an_object_on_plain_ground_is_neither_framed_nor_blown_out(picture: Image.Image) -> None:
    product, mask = Image.new("RGB", SIZE, "white"), Image.new("L", SIZE)
    ImageDraw.Draw(mask).ellipse((140, 140, 500, 500), fill=255)
    product.paste(picture, mask=mask)
    assert await technical(product) > 0.8 * await technical(picture)


async def test_a_smooth_sky_is_no_frame() -> None:
    sky = Image.linear_gradient("L").resize(SIZE)
    scene = sky.copy()
    scene.paste(Image.effect_noise((640, 200), 60), (0, 440))
    assert await technical(scene) > await technical(sky) > 0.28


async def test_only_what_is_seen_of_a_transparent_picture_counts(picture: Image.Image) -> None:
    cut_out = Image.new("RGBA", (1280, 1280), (255, 0, 0, 0))
    cut_out.paste(picture, (300, 300))
    assert await technical(cut_out) == pytest.approx(await technical(picture.resize((320, 320))), rel=0.1)


@pytest.mark.parametrize("size", [(1, 2), (2, 2), (3, 3), (1, 2_000), (2_000, 3)])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
async def test_any_shape_and_kind_of_picture_has_a_score(size: tuple[int, int], mode: str) -> None:
    assert 0 <= await technical(Image.new(mode, size)) <= 1
    assert 0 <= await technical(Image.effect_noise(size, 90).convert("L" if mode == "I;16" else mode)) <= 1


async def test_bytes_that_are_no_picture_have_no_score() -> None:
    with pytest.raises(ScoringError) as caught:
        await TechnicalScorer().score(REQUEST, image(b"zebras"))
    assert "zebras" not in str(caught.value)


# --- the best of several


class ByDigest:
    """Scores as told; without a score it fails."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = scores

    async def score(self, request: ImageRequest, image: GeneratedImage) -> float:
        assert request is REQUEST
        if image.sha256 not in self.scores:
            raise ScoringError("it broke")
        return self.scores[image.sha256]


IMAGES = [image(small_image(number)) for number in range(4)]


async def test_the_best_wins_against_the_others_and_all_carry_their_scores() -> None:
    scores = dict(zip([one.sha256 for one in IMAGES], (0.2, 0.9, 0.0, 0.5), strict=True))
    best, rest = await best_of(REQUEST, IMAGES, ByDigest(scores))
    assert (best.sha256, best.score, best.won_against) == (IMAGES[1].sha256, 0.9, 3)
    assert [one.score for one in rest] == [0.5, 0.2, 0.0]
    assert [one.won_against for one in rest] == [0, 0, 0]
    assert {one.data for one in (best, *rest)} == {one.data for one in IMAGES}


async def test_of_equals_the_first_wins() -> None:
    best, rest = await best_of(REQUEST, IMAGES, ByDigest(dict.fromkeys([one.sha256 for one in IMAGES], 0.5)))
    assert [one.sha256 for one in (best, *rest)] == [one.sha256 for one in IMAGES]


async def test_a_single_candidate_wins_against_none() -> None:
    best, rest = await best_of(REQUEST, IMAGES[:1], ByDigest({IMAGES[0].sha256: 0.1}))
    assert (best.score, best.won_against, rest) == (0.1, 0, [])


async def test_where_one_score_is_missing_all_are_technical(picture: Image.Image) -> None:
    sharp, soft = (image(encoded(one)) for one in (picture, picture.filter(ImageFilter.GaussianBlur(4))))
    with structlog.testing.capture_logs() as events:
        best, [other] = await best_of(REQUEST, [soft, sharp], ByDigest({soft.sha256: 1.0}))
    assert (best.sha256, best.score) == (sharp.sha256, await TechnicalScorer().score(REQUEST, sharp))
    assert other.score == await TechnicalScorer().score(REQUEST, soft)
    [event] = events
    assert (event["event"], event["error"], event["images"]) == ("scorer_failed", "it broke", 2)


async def test_a_picture_nobody_can_score_is_kept_and_comes_last() -> None:
    broken = image(b"no picture")
    best, rest = await best_of(REQUEST, [broken, IMAGES[0]], TechnicalScorer())
    assert best.sha256 == IMAGES[0].sha256
    assert [(one.data, one.score) for one in rest] == [(b"no picture", 0.0)]


# --- the operator's own model


class ScorerStandIn(OpenAIStandIn):
    """A local HTTP server that scores pictures; `reply` is what it answers with, None for silence."""

    reply: Reply | None = Reply(body=b'{"score": 0.75, "why": "zebras"}')

    async def _reply(self, request: HttpRequest) -> Reply | None:
        self.requests.append(request)
        return self.reply


@pytest.fixture
async def model() -> AsyncIterator[ScorerStandIn]:
    async with ScorerStandIn() as server:
        yield server


Make = Callable[..., HttpScorer]


@pytest.fixture
async def make(model: ScorerStandIn, clock: FakeClock) -> AsyncIterator[Make]:
    made: list[HttpScorer] = []

    def scorer(**fields: Any) -> HttpScorer:
        made.append(HttpScorer(**({"url": f"{model.root_url}/score", "timeout_s": 5.0, "clock": clock} | fields)))
        return made[-1]

    yield scorer
    for one in made:
        await one.aclose()


@pytest.fixture(autouse=True)
def no_prompt_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as events:
        yield
    assert "zebras" not in "\n".join(record.getMessage() for record in caplog.get_records("call")) + repr(events)


async def failure(scorer: HttpScorer) -> str:
    """The message of the error, which tells no secret, however it is printed."""
    with pytest.raises(ScoringError) as caught:
        await scorer.score(REQUEST, IMAGES[0])
    assert "zebras" not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


async def test_the_model_is_asked_with_prompt_and_picture(make: Make, model: ScorerStandIn) -> None:
    assert await make().score(REQUEST, IMAGES[0]) == 0.75
    [asked] = model.requests
    assert (asked.method, asked.path, asked.headers["content-type"]) == ("POST", "/score", "application/json")
    assert asked.headers["accept-encoding"] == "identity"
    assert asked.json() == {
        "prompt": REQUEST.prompt,
        "model": "gpt-image-2",
        "size": "64x48",
        "quality": "high",
        "image_b64": base64.b64encode(IMAGES[0].data).decode(),
    }


@pytest.mark.parametrize("score", [0, 1, 0.5, 1e-9])
async def test_scores_from_0_to_1_are_believed(make: Make, model: ScorerStandIn, score: float) -> None:
    model.reply = Reply(body=json.dumps({"score": score}).encode())
    assert await make().score(REQUEST, IMAGES[0]) == score


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"zebras",
        b"\xff",
        b"[" * 60_000,
        b"[0.5]",
        b"0.5",
        b"{}",
        b'{"score": null}',
        b'{"score": "0.5"}',
        b'{"score": true}',
        b'{"score": [0.5]}',
        b'{"score": NaN}',
        b'{"score": Infinity}',
        b'{"score": -0.01}',
        b'{"score": 1.01}',
        b'{"score": ' + b"9" * 1_000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_an_answer_that_is_no_score_is_none(make: Make, model: ScorerStandIn, body: bytes) -> None:
    model.reply = Reply(body=body)
    scorer = make()
    assert "the scorer's answer" in await failure(scorer)
    model.reply = ScorerStandIn.reply
    assert await scorer.score(REQUEST, IMAGES[0]) == 0.75  # it was reached, so it is asked again at once


@pytest.mark.parametrize("status", [201, 302, 404, 500])
async def test_any_answer_but_a_200_is_no_score_and_redirects_are_not_followed(
    make: Make, model: ScorerStandIn, status: int
) -> None:
    model.reply = Reply(status, b'{"score": 1}', headers={"location": f"{model.root_url}/elsewhere"})
    assert await failure(make()) == f"the scorer answered {status}"
    assert len(model.requests) == 1


async def test_a_long_answer_is_not_read_to_its_end(make: Make, model: ScorerStandIn) -> None:
    long = b'{"score": 1, "why": "' + b"A" * 100_000
    model.reply = Reply(body=long)
    assert "more than 65536 bytes" in await failure(make())
    chunked = {"transfer-encoding": "chunked", "content-length": ""}
    model.reply = Reply(body=b"200000\r\n" + long, headers=chunked, hang_after=100_000)
    assert "more than 65536 bytes" in await failure(make())


async def test_a_compressed_answer_is_not_unpacked(make: Make, model: ScorerStandIn) -> None:
    model.reply = Reply(body=gzip.compress(b'{"score": 1}'), headers={"content-encoding": "gzip"})
    assert "compressed" in await failure(make())


@pytest.mark.parametrize("reply", [None, Reply(body=b'{"score": 1}', hang_after=5)], ids=["silence", "half an answer"])
async def test_an_unreachable_model_is_left_alone_for_a_while(
    make: Make, model: ScorerStandIn, clock: FakeClock, reply: Reply | None
) -> None:
    model.reply = reply
    scorer = make(timeout_s=0.5)
    assert await failure(scorer) == "the scorer did not answer within 0.5 s"
    model.reply = ScorerStandIn.reply
    clock.advance(29.9)
    assert "is not asked" in await failure(scorer)
    assert len(model.requests) == 1
    clock.advance(0.1)
    assert await scorer.score(REQUEST, IMAGES[0]) == 0.75


async def test_a_broken_connection_is_told_without_what_was_read(make: Make, model: ScorerStandIn) -> None:
    model.reply = Reply(body=b'{"score": 1, "zebras": 1}', cut_after=15)
    assert "the connection to the scorer failed" in await failure(make())
    assert "ConnectError" in await failure(make(url="http://127.0.0.1:1/"))


async def test_few_pictures_are_posted_at_once(make: Make, model: ScorerStandIn) -> None:
    model.reply = None
    scorer = make(timeout_s=60.0)
    calls = [asyncio.create_task(scorer.score(REQUEST, IMAGES[0])) for _ in range(9)]
    await until(lambda: len(model.requests) >= 4)
    # What a call begun later has come through meanwhile, a fifth one would have, too.
    async with ScorerStandIn() as other:
        await make(url=other.root_url).score(REQUEST, IMAGES[0])
    assert len(model.requests) == 4
    for call in calls:
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}


async def test_with_the_model_down_the_technical_score_decides(make: Make, picture: Image.Image) -> None:
    sharp, soft = (image(encoded(one)) for one in (picture, picture.filter(ImageFilter.GaussianBlur(4))))
    best, _ = await best_of(REQUEST, [soft, sharp], make(url="http://127.0.0.1:1/"))
    assert best.sha256 == sharp.sha256
