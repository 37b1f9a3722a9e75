"""Looking at an image's bytes before believing them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from PIL import Image

# "MPO" is what Pillow calls a JPEG with further pictures appended, as phones write it.
_CONTENT_TYPES: Mapping[str, str] = MappingProxyType(
    {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp"}
)

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_RIFF_HEADER_BYTES = 8

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_SAMPLE_SIZE = (64, 64)
# What lossy compression puts between pixels of the same grey; of a vivid colour, at low quality, it can be more.
_LOSSY_LEVELS = 3


class BadImageError(ValueError):
    """The bytes are not an image we take. The message says why and never quotes the bytes."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image turned out to be once decoded. `sha256` is hexadecimal, over the encoded bytes."""

    content_type: str
    width: int
    height: int
    sha256: str


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
    if len(data) > max_bytes:
        raise BadImageError(f"the image has {len(data)} bytes; at most {max_bytes} are taken")
    # The WebP decoder takes memory for the whole canvas as soon as it is opened.
    _check_pixels(*_webp_size(data), max_pixels=max_pixels)
    content_type, (width, height), is_blank = _decode(data, max_pixels=max_pixels, look_for_blank=not allow_blank)
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


def _decode(data: bytes, *, max_pixels: int, look_for_blank: bool) -> tuple[str, tuple[int, int], bool]:
    """Content type, size, and whether it is blank; that is False unless looked for."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            _check_pixels(*image.size, max_pixels=max_pixels)
            _check_whole(data, image)
            image.load()
            return _CONTENT_TYPES[image.format or ""], image.size, look_for_blank and _is_blank(image)
    except BadImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError(f"the image has more than {max_pixels} pixels") from None
    except Exception:  # noqa: BLE001 - Pillow's decoders raise a dozen types on damaged input, and quote it
        raise BadImageError("the bytes are not a whole PNG, JPEG or WebP image") from None


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


def _check_pixels(width: int, height: int, *, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(f"the image is {width}x{height}; at most {max_pixels} pixels are taken")


def _check_whole(data: bytes, image: Image.Image) -> None:
    """Refuse what Pillow lets pass: a file cut off after its last pixel, and frames after the first."""
    image_format = image.format or ""
    if not _ENDS_WHOLE[image_format](data):
        raise BadImageError("the image is cut off")
    if image_format != "MPO" and getattr(image, "is_animated", False):
        raise BadImageError("the image is an animation; only still images are taken")


def _png_is_whole(data: bytes) -> bool:
    return _PNG_END in data


def _jpeg_is_whole(data: bytes) -> bool:
    # Inside a scan 0xff is always followed by 0x00 or a restart marker, so neither marker occurs in pixels.
    return data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN)


def _webp_is_whole(data: bytes) -> bool:
    return len(data) >= int.from_bytes(data[4:8], "little") + _RIFF_HEADER_BYTES


_ENDS_WHOLE: Mapping[str, Callable[[bytes], bool]] = MappingProxyType(
    {"PNG": _png_is_whole, "JPEG": _jpeg_is_whole, "MPO": _jpeg_is_whole, "WEBP": _webp_is_whole}
)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas size from a WebP header; 0x0 for anything else, which other checks then judge."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
        case _:
            return 0, 0
