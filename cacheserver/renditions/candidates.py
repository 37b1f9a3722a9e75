"""Which other requests' pictures would do for a request: what *dominates* it.

A picture dominates a request if nothing that was asked for is missing from it: the same prompt and settings, in a
higher quality, in a lossless format, in a larger size of the same shape, or in several of these. Nobody asks an
upstream for them here; they are what is worth looking for before one is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

from cacheserver.model import AnswerFrom, ImageRequest, Rendition

MOST = 24
"""So many are looked for: the nearest ones."""

_QUALITIES = (("low", "medium", "high", "xhigh", "max"), ("standard", "hd"))
"""Which are compared, lowest first. What "auto" stands for is the provider's to say, and may change."""

_LOSSLESS = "png"
_UNCOMPRESSED = 100
"""The compression of a request that leaves it out."""

_USUAL_SIZES = (
    (256, 256),
    (512, 512),
    (768, 768),
    (1024, 1024),
    (1536, 1536),
    (2048, 2048),
    (768, 512),
    (512, 768),
    (1536, 1024),
    (1024, 1536),
    (1024, 768),
    (768, 1024),
    (1792, 1024),
    (1024, 1792),
    (1280, 720),
    (720, 1280),
    (1920, 1080),
    (1080, 1920),
    (2560, 1440),
    (1440, 2560),
    (3840, 2160),
    (2160, 3840),
)
"""What image models are asked for, in pixels: width and height."""

_FACTORS = (Fraction(3, 2), Fraction(2), Fraction(3), Fraction(4))
_MOST_PIXELS_A_SIDE = 8192
"""The largest side that can be asked for."""

_Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request whose picture would do, and what has to be made of that picture; None: it will do as it is.

    `by` is in what it is more than was asked for: one thing at least.
    """

    request: ImageRequest
    by: frozenset[AnswerFrom]
    rendition: Rendition | None


def candidates(request: ImageRequest, allowed: frozenset[AnswerFrom]) -> Sequence[Candidate]:
    """What dominates `request` in no other ways than the `allowed` ones; the nearest first, at most MOST.

    The nearest differs in the fewest ways, and of these takes the least to be transformed. Only lossless pictures are
    transformed: to encode a lossy one again would lose more than was asked for.
    """
    qualities = [request.quality, *(_higher(request.quality) if AnswerFrom.QUALITY in allowed else ())]
    formats = {request.output_format, *((_LOSSLESS,) if AnswerFrom.FORMAT in allowed else ())}
    sizes = [request.size, *(_larger(request.size) if AnswerFrom.SIZE in allowed else ())]
    found = [_candidate(request, *each) for each in product(qualities, formats, sizes)]
    sound = [each for each in found if each.by and (not each.rendition or each.request.output_format == _LOSSLESS)]
    return sorted(sound, key=_effort)[:MOST]


def _candidate(request: ImageRequest, quality: str, output_format: str, size: str) -> Candidate:
    by = set()
    if quality != request.quality:
        by.add(AnswerFrom.QUALITY)
    compression = request.output_compression
    encoding = Rendition()
    if output_format != request.output_format:
        by.add(AnswerFrom.FORMAT)
        encoding = Rendition(output_format=request.output_format, output_compression=compression)
        compression = _UNCOMPRESSED
    if size != request.size:
        by.add(AnswerFrom.SIZE)
        width, height = _sides(request.size)
        encoding = replace(encoding, width=width, height=height)
    other = replace(request, quality=quality, output_format=output_format, output_compression=compression, size=size)
    return Candidate(other, frozenset(by), None if by <= {AnswerFrom.QUALITY} else encoding)


def _effort(candidate: Candidate) -> tuple[int, int, int]:
    """How far it is from what was asked for: in how many ways, then by pixels to decode, then by quality."""
    request = candidate.request
    pixels = 0
    if candidate.rendition is not None and request.size != "auto":
        width, height = _sides(request.size)
        pixels = width * height
    steps = next((row.index(request.quality) for row in _QUALITIES if request.quality in row), 0)
    return len(candidate.by), pixels, steps


def _higher(quality: str) -> Sequence[str]:
    return next((row[row.index(quality) + 1 :] for row in _QUALITIES if quality in row), ())


def _larger(size: str) -> Sequence[str]:
    """Sizes of exactly the same shape, smallest first."""
    if size == "auto":
        return ()
    width, height = _sides(size)
    found = {*_multiples(width, height), *(each for each in _USUAL_SIZES if each[0] * height == each[1] * width)}
    larger = sorted(each for each in found if width < each[0] and max(each) <= _MOST_PIXELS_A_SIDE)
    return [f"{wide}x{high}" for wide, high in larger]


def _multiples(width: int, height: int) -> Iterator[_Size]:
    for factor in _FACTORS:
        wide, high = width * factor, height * factor
        if wide.denominator == high.denominator == 1:
            yield int(wide), int(high)


def _sides(size: str) -> _Size:
    width, height = size.split("x")
    return int(width), int(height)
