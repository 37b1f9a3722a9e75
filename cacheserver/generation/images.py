"""Looking at an image's bytes before believing them."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import cast

from PIL import Image

from cacheserver.images import CONTENT_TYPES, BadImageError, ImageFacts, decoding, opened

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_SAMPLE_SIZE = (64, 64)
# What lossy compression puts between pixels of the same grey; of a vivid colour, at low quality, it can be more.
_LOSSY_LEVELS = 3


def inspect(  # noqa: PLR0913 - as many keywords as there are things to expect of an image
    data: bytes,
    *,
    max_pixels: int,
    max_bytes: int,
    expect_format: str | None = None,
    expect_size: tuple[int, int] | None = None,
    allow_blank: bool = True,
) -> ImageFacts:
    """Decode `data` completely and tell what it is. Takes tens of milliseconds: call it in a thread.

    The size its header claims is compared with `max_pixels` before memory is given to it. `expect_format`
    ("png", "jpeg" or "webp") is what the image has to be; None takes any of the three. `expect_size` is the width
    and height it has to have; None takes any. Without `allow_blank`, an image of one colour, or one that is
    transparent all over, is refused.

    Raises:
        BadImageError: not a whole still image of an accepted type within the limits, or not as expected.
    """
    with opened(data, max_pixels=max_pixels, max_bytes=max_bytes) as image, decoding(max_pixels=max_pixels):
        image.load()
        content_type, (width, height) = CONTENT_TYPES[image.format or ""], image.size
        is_blank = not allow_blank and _is_blank(image)
    if expect_format is not None and content_type != f"image/{expect_format}":
        raise BadImageError(f"the image is {content_type}; image/{expect_format} was asked for")
    if expect_size is not None and (width, height) != expect_size:
        raise BadImageError(f"the image is {width}x{height}; {expect_size[0]}x{expect_size[1]} was asked for")
    if is_blank:
        raise BadImageError("the image is blank: one colour, or transparent all over")
    return ImageFacts(content_type, width, height, hashlib.sha256(data).hexdigest())


async def inspect_in_thread(  # noqa: PLR0913 - those of `inspect`
    data: bytes,
    *,
    max_pixels: int,
    max_bytes: int,
    expect_format: str | None = None,
    expect_size: tuple[int, int] | None = None,
    allow_blank: bool = True,
) -> ImageFacts:
    """`inspect`, off the event loop."""
    return await asyncio.to_thread(
        inspect,
        data,
        max_pixels=max_pixels,
        max_bytes=max_bytes,
        expect_format=expect_format,
        expect_size=expect_size,
        allow_blank=allow_blank,
    )


def asked_size(size: str) -> tuple[int, int] | None:
    """Width and height that a request's `size` names; None where it leaves them to the provider, as "auto" does."""
    match = _SIZE.fullmatch(size)
    return (int(match[1]), int(match[2])) if match else None


def _is_blank(image: Image.Image) -> bool:
    within = 0 if image.format == "PNG" else _LOSSY_LEVELS
    # A few of its pixels tell a picture from a blank one; only where they cannot, all of them are looked at.
    few = image.resize(_SAMPLE_SIZE, Image.Resampling.NEAREST)
    return _is_one_colour(few, within=within) and _is_one_colour(image, within=within)


def _is_one_colour(image: Image.Image, *, within: int) -> bool:
    """Whether its pixels are no more than `within` levels apart in every band, or none of them is to be seen."""
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    bands = image.split()
    if image.mode in {"RGBA", "LA"} and bands[-1].getextrema() == (0, 0):
        return True
    ranges = (cast("tuple[int, int]", band.getextrema()) for band in bands)
    return all(high - low <= within for low, high in ranges)
