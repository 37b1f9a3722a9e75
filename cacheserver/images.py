"""Opening an image's bytes before believing them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from PIL import Image

# "MPO" is what Pillow calls a JPEG with further pictures appended, as phones write it.
CONTENT_TYPES: Mapping[str, str] = MappingProxyType(
    {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp"}
)
"""The content type of each kind of image that Pillow may find in what we take."""

_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_RIFF_HEADER_BYTES = 8


class BadImageError(ValueError):
    """The bytes are not an image we take. The message says why and never quotes the bytes."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What an image turned out to be once decoded. `sha256` is hexadecimal, over the encoded bytes."""

    content_type: str
    width: int
    height: int
    sha256: str


def content_type_of(data: bytes) -> str:
    """What its first bytes say an image is, of the types we take; empty if none. Whether it is that, `opened` tells."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


@contextmanager
def opened(data: bytes, *, max_pixels: int, max_bytes: int) -> Iterator[Image.Image]:
    """The whole still image in `data`, its pixels yet to be loaded: do that within `decoding`.

    The size its header claims is compared with `max_pixels` before memory is given to it.

    Raises:
        BadImageError: not a whole still PNG, JPEG or WebP image within the limits.
    """
    if len(data) > max_bytes:
        raise BadImageError(f"the image has {len(data)} bytes; at most {max_bytes} are taken")
    # The WebP decoder takes memory for the whole canvas as soon as it is opened.
    _check_pixels(*_webp_size(data), max_pixels=max_pixels)
    with decoding(max_pixels=max_pixels):
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    with image:
        with decoding(max_pixels=max_pixels):
            _check_pixels(*image.size, max_pixels=max_pixels)
            _check_whole(data, image)
        yield image


@contextmanager
def decoding(*, max_pixels: int) -> Iterator[None]:
    """The time in which Pillow decodes what may be damaged: whatever it raises becomes BadImageError."""
    try:
        yield
    except BadImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError(f"the image has more than {max_pixels} pixels") from None
    except Exception:  # noqa: BLE001 - Pillow's decoders raise a dozen types on damaged input, and quote it
        raise BadImageError("the bytes are not a whole PNG, JPEG or WebP image") from None


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
