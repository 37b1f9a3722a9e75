"""Pictures that cost nothing to make: an encoded template of each kind, and a number in each copy's comment."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import zlib
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from scripts.bench.provider_config import sides

_GRID = 8
_SLOT = b"#" * 48
"""Where the number of a copy goes. A length byte before it must not be another #."""

_PNG_HEADER_END = 8 + 25  # the signature, then IHDR
_JPEG_HEADER_END = 2  # start of image
_JPEG_COMMENT_MAX = 65_533


@dataclass(frozen=True, slots=True)
class Look:
    """What a picture looks like; `format` as `output_format` has it, or gif."""

    format: str
    size: str
    quality: str
    blank: bool = False


class Pictures:
    """Valid pictures, no two with the same bytes, in this process or any other.

    Args:
        min_bytes: how large each is at least; GIFs stay as small as they are.
    """

    def __init__(self, *, min_bytes: int = 0) -> None:
        self._min_bytes = min_bytes
        self._templates: dict[Look, tuple[bytes, bytes]] = {}
        self._run = os.urandom(8).hex()
        self._made = 0

    async def make(self, look: Look) -> bytes:
        """One more picture that looks like this."""
        template = self._templates.get(look)
        if template is None:
            template = await asyncio.to_thread(_template, look, self._min_bytes)
            self._templates[look] = template
        self._made += 1
        number = f"{self._run}-{self._made:0{len(_SLOT) - len(self._run) - 1}d}".encode()
        head, tail = template
        return head + (_png_text(number) if look.format == "png" else number) + tail


def cut(picture: bytes) -> bytes:
    """The first part of a picture: it has a header and too few pixels."""
    return picture[: len(picture) * 3 // 5]


def cut_base64(picture: bytes) -> str:
    """Base64 that ends too early, at a length base64 cannot have."""
    text = base64.b64encode(picture).decode()
    return text[: len(text) // 2 // 4 * 4 + 1]


def _template(look: Look, min_bytes: int) -> tuple[bytes, bytes]:
    """What comes before and after the number of a copy."""
    file = io.BytesIO()
    _drawn(look).save(file, **_SAVE[look.format])
    data = file.getvalue()
    padding = Random(look.size).randbytes(max(min_bytes - len(data), 0))  # noqa: S311 - filling
    if look.format == "png":
        return data[:_PNG_HEADER_END], _png_padding(padding) + data[_PNG_HEADER_END:]
    if look.format == "jpeg":
        data = data[:_JPEG_HEADER_END] + _jpeg_padding(padding) + data[_JPEG_HEADER_END:]
    if look.format == "webp":
        data = _webp_padding(data, padding)
    slot = data.index(_SLOT)
    return data[:slot], data[slot + len(_SLOT) :]


_SAVE: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 6},
    "jpeg": {"format": "JPEG", "quality": 80, "comment": _SLOT},
    "webp": {"format": "WEBP", "quality": 80, "method": 0, "xmp": _SLOT},
    "gif": {"format": "GIF", "comment": _SLOT},
}


def _drawn(look: Look) -> Image.Image:
    random = Random(f"{look.size} {look.quality}")  # noqa: S311 - colours
    if look.blank:
        return Image.new("RGB", sides(look.size), (127, 127, 127))
    colours = Image.frombytes("RGB", (_GRID, _GRID), random.randbytes(3 * _GRID * _GRID))
    return colours.resize(sides(look.size), Image.Resampling.NEAREST)


def _png_text(number: bytes) -> bytes:
    return _png_chunk(b"tEXt", b"Comment\0" + number)


def _png_padding(padding: bytes) -> bytes:
    """A private chunk, which readers step over."""
    return _png_chunk(b"paDd", padding) if padding else b""


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def _jpeg_padding(padding: bytes) -> bytes:
    parts = (padding[i : i + _JPEG_COMMENT_MAX] for i in range(0, len(padding), _JPEG_COMMENT_MAX))
    return b"".join(b"\xff\xfe" + (len(part) + 2).to_bytes(2, "big") + part for part in parts)


def _webp_padding(data: bytes, padding: bytes) -> bytes:
    """A chunk of a name nobody knows, at the end."""
    if not padding:
        return data
    padding += b"\0" * (len(padding) % 2)
    data += b"PADD" + len(padding).to_bytes(4, "little") + padding
    return data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]
