"""Which of several candidates is the best picture."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, cast

import httpx
import structlog
from PIL import Image, ImageChops, ImageFilter, ImageStat

from cacheserver.generation.providers.download import read_at_most
from cacheserver.interfaces import Clock
from cacheserver.model import GeneratedImage, ImageBytes, ImageRequest

_log = structlog.get_logger(__name__)

_WORKING_SIDE = 512
_SHARPNESS_WEIGHT, _EXPOSURE_WEIGHT, _VARIETY_WEIGHT = 0.5, 0.3, 0.2
_HALF_SHARP = 100.0
_COARSER = 4
_LAPLACIAN = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128)
_LAPLACIAN_MARGIN = 1
_LEVELS, _WHITE = 256, 255
_CLIPPED_LEVELS = 3
_ENTROPY_BITS = 8.0
# In levels: what looks like one colour, and how far a picture's edge stands out from its frame on average.
_TOLERANCE, _FRAME_STEP = 8, 32
_FRAME_STRIP = 4

_MAX_REPLY_BYTES = 64 * 1024
_MAX_PARALLEL_CALLS = 4
_REST_S = 30.0

Box = tuple[int, int, int, int]


class ScoringError(Exception):
    """A picture could not be scored. The message says why and quotes neither prompt nor picture."""


class Scorer(Protocol):
    """Says how good a picture is. Only scores of the same scorer compare."""

    async def score(self, request: ImageRequest, image: GeneratedImage) -> float:
        """How good `image` is as an answer to `request`: 0 to 1, higher is better. May be repeated.

        Raises:
            ScoringError: it cannot tell.
        """
        ...


async def best_of(
    request: ImageRequest, images: Sequence[GeneratedImage], scorer: Scorer
) -> tuple[GeneratedImage, list[GeneratedImage]]:
    """The best of `images`, at least one, and the rest, best first; of equals the earlier one is better.

    Each carries its score, the best one also how many it won against. Never fails for want of a score: if
    `scorer` cannot score every one of them, all are scored by TechnicalScorer, since only scores of the same
    scorer compare.
    """
    try:
        scores = await _scores(request, images, scorer)
    except ScoringError as exc:
        _log.warning("scorer_failed", error=str(exc), images=len(images))
        scores = [await _technical_score(request, image) for image in images]
    scored = [replace(image, score=score) for image, score in zip(images, scores, strict=True)]
    best, *rest = sorted(scored, key=lambda image: -(image.score or 0.0))
    return replace(best, won_against=len(rest)), rest


async def _scores(request: ImageRequest, images: Sequence[GeneratedImage], scorer: Scorer) -> list[float]:
    """All scores, or the error of the first picture that has none."""
    outcomes = await asyncio.gather(*(scorer.score(request, image) for image in images), return_exceptions=True)
    scores = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        scores.append(outcome)
    return scores


async def _technical_score(request: ImageRequest, image: GeneratedImage) -> float:
    try:
        return await TechnicalScorer().score(request, image)
    except ScoringError:
        return 0.0


class TechnicalScorer:
    """Scores what can be measured in the pixels: sharpness, light, variety, and whether they fill the picture.

    It cannot see what the picture shows, and looks at no more than 512 pixels a side. The same bytes get the same
    score with one version of Pillow. Measured on luma, each part from 0 to 1:

        score = inside * (0.5 * sharpness + 0.3 * exposure + 0.2 * sharpness * variety)

    - sharpness: v / (v + 100), v being the variance of the Laplacian, the focus measure of Pech-Pacheco et al.,
      "Diatom autofocusing in brightfield microscopy" (ICPR 2000), called LAPV in Pertuz, Puig and Garcia's survey
      (Pattern Recognition 46, 2013); the mean of that at working size and at a quarter of it. Photographs below
      100 are commonly called blurred.
    - exposure: 4 m (1 - m) (1 - c), m being the mean (0 black, 1 white) and c the share of pixels that are clipped,
      the three darkest levels or the three lightest: 1 for a picture around middle grey that clips nothing.
    - variety: the histogram's entropy (Shannon, 1948), in bits, of the 8 there may be. It counts only as far as the
      picture is sharp: blur makes new levels between the old ones.
    - inside: the share of the picture that is not a plain frame or letterbox; the rest is measured inside only.
      0 for a blank picture.

    A plain ground, as behind a product, is neither frame nor clipped: a frame ends in a straight and abrupt edge, and
    all four corners belong to a ground. Of a transparent picture only what is seen counts, over middle grey.
    The weights are our judgement, fitted to nothing: blur spoils a picture most, then bad light.
    """

    async def score(self, request: ImageRequest, image: GeneratedImage) -> float:  # noqa: ARG002 - pixels say it all
        """How good `image` is technically, whatever was asked for.

        Raises:
            ScoringError: the bytes cannot be decoded.
        """
        return await asyncio.to_thread(_measured, image.data)


class HttpScorer:
    """Scores by asking a model of the operator's own, over HTTP.

    One POST for each picture, of JSON: `{"prompt": "…", "model": "…", "size": "…", "quality": "…", "image_b64": "…"}`,
    where the first four are the request's and `image_b64` is the encoded picture in base64. The answer is a 200 with
    `{"score": 0.73}`, 0 to 1, higher is better; further fields are ignored. Redirects are not followed, no proxy is
    used. A scorer that cannot be reached in time is not asked for 30 seconds, so that its outage does not make every
    answer later.
    """

    def __init__(self, *, url: str, timeout_s: float, clock: Clock) -> None:
        """`timeout_s` is for one picture, its wait for a turn included: few are posted at once."""
        self._url = httpx.URL(url)
        self._timeout_s = timeout_s
        self._clock = clock
        self._places = asyncio.Semaphore(_MAX_PARALLEL_CALLS)
        self._rests_until_s = clock.monotonic_s()
        # They log each URL, which may hold a password.
        for library in ("httpx", "httpcore"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self._client = httpx.AsyncClient(
            verify=httpx.create_ssl_context(),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(None),
            # A kept connection may close under a picture, and a new one costs nothing next to a model.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            headers={"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json"},
        )

    async def score(self, request: ImageRequest, image: GeneratedImage) -> float:
        """How good the operator's model finds `image`.

        Raises:
            ScoringError: it did not answer in time, or not with a score.
        """
        if self._clock.monotonic_s() < self._rests_until_s:
            raise ScoringError(f"the scorer is not asked for {_REST_S:.0f} s after it could not be reached")
        try:
            async with asyncio.timeout(self._timeout_s), self._places:
                answer = await self._post(await asyncio.to_thread(_question, request, image))
        except TimeoutError:
            self._rests_until_s = self._clock.monotonic_s() + _REST_S
            raise ScoringError(f"the scorer did not answer within {self._timeout_s:g} s") from None
        except httpx.RequestError as exc:
            self._rests_until_s = self._clock.monotonic_s() + _REST_S
            # Not chained: a protocol error quotes what it read, which may be the prompt.
            raise ScoringError(f"the connection to the scorer failed ({type(exc).__name__})") from None
        return _score_in(answer)

    async def aclose(self) -> None:
        """Let go of connections."""
        await self._client.aclose()

    async def _post(self, question: bytes) -> bytes:
        async with self._client.stream("POST", self._url, content=question) as response:
            if response.status_code != httpx.codes.OK:
                raise ScoringError(f"the scorer answered {response.status_code}")
            answer = await read_at_most(response, _MAX_REPLY_BYTES)
        if answer is None:
            raise ScoringError(f"the scorer's answer has more than {_MAX_REPLY_BYTES} bytes or is compressed")
        return answer


def _question(request: ImageRequest, image: GeneratedImage) -> bytes:
    question = {
        "prompt": request.prompt,
        "model": request.model,
        "size": request.size,
        "quality": request.quality,
        "image_b64": base64.b64encode(image.data).decode("ascii"),
    }
    return json.dumps(question).encode("ascii")


def _score_in(answer: bytes) -> float:
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError):
        raise ScoringError("the scorer's answer is not JSON") from None
    score = document.get("score") if isinstance(document, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ScoringError("the scorer's answer has no score between 0 and 1")
    return float(score)


def _measured(data: ImageBytes) -> float:
    luma = _luma(data)
    inside = _inside_frames(luma) if luma is not None else None
    if luma is None or inside is None:
        return 0.0
    picture = luma.crop(inside)
    subject = _subject(picture)
    if subject is not None and subject.getbbox() is None:
        return 0.0
    sharpness = _sharpness(picture)
    variety = picture.entropy(subject) / _ENTROPY_BITS
    quality = (
        _SHARPNESS_WEIGHT * sharpness
        + _EXPOSURE_WEIGHT * _exposure(picture.histogram(subject))
        + _VARIETY_WEIGHT * sharpness * variety
    )
    return quality * (picture.width * picture.height) / (luma.width * luma.height)


def _luma(data: ImageBytes) -> Image.Image | None:
    """What is seen of the picture, in greys and at working size; None if that is nothing."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            picture = image.convert("RGBA" if image.has_transparency_data else "L")
    except Exception as exc:  # noqa: BLE001 - Pillow's decoders raise a dozen types, and quote what they read
        raise ScoringError(f"the picture cannot be decoded ({type(exc).__name__})") from None
    picture.thumbnail((_WORKING_SIDE, _WORKING_SIDE))
    if picture.mode == "L":
        return picture
    seen = picture.getchannel("A").getbbox()
    if seen is None:
        return None
    return Image.alpha_composite(Image.new("RGBA", picture.size, "grey"), picture).convert("L").crop(seen)


def _sharpness(luma: Image.Image) -> float:
    """At two sizes: the large one sees slight blur, the small one heavy blur, and through noise."""
    return (_sharpness_at(luma) + _sharpness_at(luma.reduce(_COARSER))) / 2


def _sharpness_at(luma: Image.Image) -> float:
    margin = _LAPLACIAN_MARGIN
    if min(luma.size) <= 2 * margin:
        return 0.0
    # Pillow leaves the outermost pixels as they were.
    edges = luma.filter(_LAPLACIAN).crop((margin, margin, luma.width - margin, luma.height - margin))
    [variance] = ImageStat.Stat(edges).var
    return variance / (variance + _HALF_SHARP)


def _exposure(histogram: Sequence[int]) -> float:
    pixels = sum(histogram)
    brightness = sum(level * count for level, count in enumerate(histogram)) / pixels / (_LEVELS - 1)
    clipped = sum(histogram[:_CLIPPED_LEVELS]) + sum(histogram[-_CLIPPED_LEVELS:])
    return 4 * brightness * (1 - brightness) * (1 - clipped / pixels)


def _subject(luma: Image.Image) -> Image.Image | None:
    """A mask of what stands on a plain ground, which all four corners belong to; None if there is no such ground."""
    right, bottom = luma.width - 1, luma.height - 1
    colour, *others = (_level(luma, x, y) for x, y in ((0, 0), (right, 0), (0, bottom), (right, bottom)))
    if any(abs(other - colour) > _TOLERANCE for other in others):
        return None
    return _unlike(_distance(luma, colour))


def _distance(luma: Image.Image, colour: int) -> Image.Image:
    """How far each pixel is from `colour`."""
    return ImageChops.difference(luma, Image.new("L", luma.size, colour))


def _unlike(distance: Image.Image) -> Image.Image:
    """White where a distance can be seen, else black."""
    return distance.point([_WHITE * (level > _TOLERANCE) for level in range(_LEVELS)])


def _inside_frames(luma: Image.Image) -> Box | None:
    """Where the picture is, frames of the colours of its first and its last pixel taken off; None if it is blank."""
    left, top, right, bottom = 0, 0, *luma.size
    for colour in _level(luma, 0, 0), _level(luma, right - 1, bottom - 1):
        inner = _inside_frame(luma.crop((left, top, right, bottom)), colour)
        if inner is None:
            return None
        left, top, right, bottom = left + inner[0], top + inner[1], left + inner[2], top + inner[3]
    return left, top, right, bottom


def _inside_frame(luma: Image.Image, colour: int) -> Box | None:
    """Where the picture is, a frame of `colour` taken off; None if it is all of that colour."""
    distance = _distance(luma, colour)
    other = _unlike(distance).getbbox()
    if other is None:
        return None
    left, top, right, bottom = other

    def begins_abruptly(strip: Box) -> bool:
        """Not so a gradient, nor an object on plain ground."""
        [mean] = ImageStat.Stat(distance.crop(strip)).mean
        return mean >= _FRAME_STEP

    return (
        left if begins_abruptly((left, top, min(left + _FRAME_STRIP, right), bottom)) else 0,
        top if begins_abruptly((left, top, right, min(top + _FRAME_STRIP, bottom))) else 0,
        right if begins_abruptly((max(right - _FRAME_STRIP, left), top, right, bottom)) else luma.width,
        bottom if begins_abruptly((left, max(bottom - _FRAME_STRIP, top), right, bottom)) else luma.height,
    )


def _level(luma: Image.Image, x: int, y: int) -> int:
    return cast("int", luma.getpixel((x, y)))
