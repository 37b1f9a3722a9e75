"""The painter: pictures without a provider, that nobody takes for real ones."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
from PIL import Image, ImageChops, ImageStat

from cacheserver.errors import UpstreamInvalidError
from cacheserver.generation.images import inspect
from cacheserver.generation.providers.painter import MODEL, PainterUpstream
from cacheserver.model import GeneratedImage, ImageRequest, InputImage, InputRole, PartialImage
from tests.fakes import FakeClock
from tests.waiting import until


def asked(prompt: str = "a red fox", *, size: str = "256x192", **fields: object) -> ImageRequest:
    return ImageRequest(prompt, MODEL, size=size, **fields)  # type: ignore[arg-type]  # each test names fields by type


@pytest.fixture
def painter(clock: FakeClock) -> PainterUpstream:
    return PainterUpstream(clock=clock)


def opened(image: GeneratedImage) -> Image.Image:
    return Image.open(io.BytesIO(image.data))


async def test_the_same_request_and_variant_give_the_same_bytes(clock: FakeClock, painter: PainterUpstream) -> None:
    first = await painter.generate(asked(), [0, 1])
    again = await PainterUpstream(clock=clock).generate(asked(), [1, 0])
    assert [image.data for image in first] == [image.data for image in reversed(again.images)]


@pytest.mark.parametrize(
    "other", [{"prompt": "a blue fox"}, {"seed": 3}, {"quality": "high"}, {"extra": {"steps": 3.0}}]
)
async def test_another_request_gives_another_picture(painter: PainterUpstream, other: dict[str, object]) -> None:
    [one], [two] = await painter.generate(asked(), [0]), await painter.generate(asked(**other), [0])  # type: ignore[arg-type]
    assert one.sha256 != two.sha256


async def test_the_images_an_edit_starts_from_and_their_roles_decide_what_is_painted(painter: PainterUpstream) -> None:
    image = InputImage(InputRole.IMAGE, "0" * 64, "image/png", b"bytes")
    others = [replace(image, sha256="1" * 64), replace(image, role=InputRole.STYLE)]
    requests = [asked(), *(asked(inputs=(each,)) for each in (image, *others)), asked(inputs=(image, image))]
    assert len({(await painter.generate(request, [0])).images[0].sha256 for request in requests}) == 5
    [one], [two] = [await painter.generate(asked(inputs=(each,)), [0]) for each in (image, replace(image, data=None))]
    assert one.data == two.data


async def test_partial_pictures_get_finer_and_the_picture_is_the_same_as_without(painter: PainterUpstream) -> None:
    seen: list[PartialImage] = []
    [picture] = await painter.generate(asked(), [0], partial_images=3, on_partial=seen.append)
    [alone] = await painter.generate(asked(), [0])
    assert picture.data == alone.data
    assert [partial.index for partial in seen] == [0, 1, 2]
    coarse = [Image.open(io.BytesIO(partial.data)) for partial in seen]
    assert {each.size for each in coarse} == {(256, 192)}
    far = [sum(ImageStat.Stat(ImageChops.difference(opened(alone), each)).mean) for each in coarse]
    assert far == sorted(far, reverse=True)
    assert far[-1] > 0


async def test_several_pictures_at_a_time_come_without_partial_ones(painter: PainterUpstream) -> None:
    seen: list[PartialImage] = []
    await painter.generate(asked(), [0, 1], partial_images=3, on_partial=seen.append)
    assert seen == []


async def test_partial_pictures_come_in_the_time_that_the_picture_takes(clock: FakeClock) -> None:
    seen: list[PartialImage] = []
    slow = PainterUpstream(clock=clock, delay_s=9.0)
    painting = asyncio.create_task(slow.generate(asked(), [0], partial_images=2, on_partial=seen.append))
    for come in (0, 1, 2):
        await until(lambda: clock.sleepers == 1)
        assert len(seen) == come
        clock.advance(3.0)
    [picture] = await painting
    assert picture.generation_s == pytest.approx(9.0)


async def test_another_variant_is_visibly_another_picture(painter: PainterUpstream) -> None:
    one, two = await painter.generate(asked(), [0, 1])
    difference = ImageStat.Stat(ImageChops.difference(opened(one), opened(two)))
    assert max(difference.mean) > 10


async def test_the_word_is_drawn_over_the_picture(painter: PainterUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    draw = "PIL.ImageDraw.ImageDraw.text"
    monkeypatch.setattr(draw, lambda _self, _xy, text, **_: words.append(text))
    await painter.generate(asked("a  red\nfox 狐"), [0])
    assert set(words) == {"PLACEHOLDER", "a red fox"}


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_format_and_size_are_as_asked(painter: PainterUpstream, image_format: str) -> None:
    [image] = await painter.generate(asked(size="320x160", output_format=image_format), [0])
    facts = inspect(image.data, max_pixels=100_000, max_bytes=1_000_000, expect_format=image_format)
    assert (image.width, image.height, image.size) == (320, 160, "320x160")
    assert (image.content_type, image.sha256) == (facts.content_type, facts.sha256)
    assert opened(image).mode == "RGB"


async def test_auto_is_a_square_of_1024(painter: PainterUpstream) -> None:
    [image] = await painter.generate(asked(size="auto"), [0])
    assert (image.width, image.height, image.size) == (1024, 1024, "1024x1024")


async def test_compression_makes_a_jpeg_smaller(painter: PainterUpstream) -> None:
    [large] = await painter.generate(asked(output_format="jpeg"), [0])
    [small] = await painter.generate(asked(output_format="jpeg", output_compression=10), [0])
    assert len(small.data) < len(large.data) / 2


@pytest.mark.parametrize("image_format", ["png", "webp"])
async def test_a_transparent_background_is_transparent(painter: PainterUpstream, image_format: str) -> None:
    [image] = await painter.generate(asked(background="transparent", output_format=image_format), [0])
    assert image.background == "transparent"
    assert opened(image).getpixel((0, 0))[3] == 0  # type: ignore[index]  # RGBA has four channels


async def test_it_costs_nothing_and_says_who_made_it(painter: PainterUpstream) -> None:
    [image] = await painter.generate(asked(seed=7), [0])
    assert (image.paid_microusd, image.model, image.upstream, image.seed) == (0, MODEL, MODEL, 7)
    assert image.background == "opaque"
    assert painter.name == MODEL


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"size": "8192x8192"}, "size"),
        ({"size": "large"}, "size"),
        ({"background": "transparent", "output_format": "jpeg"}, "background"),
    ],
)
async def test_what_it_cannot_paint_is_refused_by_field(
    painter: PainterUpstream, fields: dict[str, object], field: str
) -> None:
    with pytest.raises(UpstreamInvalidError) as caught:
        await painter.generate(asked(**fields), [0])  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("prompt", ["狐", "\U0001f98a" * 50, "x" * 32_000, "\u202eabc\u0301", '"a\\"'])
@pytest.mark.parametrize("size", ["16x16", "16x900"])
async def test_any_prompt_can_be_painted(painter: PainterUpstream, prompt: str, size: str) -> None:
    assert len(await painter.generate(asked(prompt, size=size), [0])) == 1


async def test_a_delay_shows_what_a_miss_costs(clock: FakeClock) -> None:
    painter = PainterUpstream(clock=clock, delay_s=8.0)
    painting = asyncio.create_task(painter.generate(asked(), [0]))
    while not clock.sleepers:  # noqa: ASYNC110 - a fake clock has no event that says so
        await asyncio.sleep(0)
    clock.advance(8.0)
    [image] = await painting
    assert image.generation_s == 8.0


async def test_it_is_always_there(painter: PainterUpstream) -> None:
    await painter.check()
    await painter.aclose()
