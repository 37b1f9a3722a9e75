"""Parts of a picture: the Range header of RFC 9110 section 14, and the body that answers it.

Where the RFC leaves a choice we choose as nginx does, which clients have met most: a range of bytes that makes no sense
is refused with 416, other units are ignored, and the parts are sent as asked, in their order and not merged.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cacheserver.http.answer import Chunk
from cacheserver.model import ImageBytes

MAX_RANGES = 64
"""More are answered with the whole picture: each costs a header of its own."""

_UNIT = "bytes="
_SPEC = re.compile(r" *(?:([0-9]{1,18}) *- *([0-9]{0,18})|-([0-9]{1,18})) *")
_CHUNK_BYTES = 256 * 1024


class Part(NamedTuple):
    """Bytes `start` up to and without `end`."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """How many bytes."""
        return self.end - self.start


class NotSatisfiableError(Exception):
    """No part that was asked for is there."""


def read_range(header: str | None, size: int) -> list[Part] | None:
    """The parts that a Range header asks for of `size` bytes; None for the whole.

    None also where they are more than `MAX_RANGES`, or more bytes than the whole.

    Raises:
        NotSatisfiableError: none of them is there, or one of them is no range.
    """
    if header is None or len(header) <= len(_UNIT) or not header.lower().startswith(_UNIT):
        return None
    texts = header[len(_UNIT) :].split(",")
    if len(texts) > MAX_RANGES:
        return None
    parts = [part for part in (_part(text, size) for text in texts) if part.size > 0]
    if not parts:
        raise NotSatisfiableError
    return None if sum(part.size for part in parts) > size else parts


def _part(text: str, size: int) -> Part:
    match = _SPEC.fullmatch(text)
    if match is None:
        raise NotSatisfiableError
    first, last, suffix = match.groups()
    if suffix is not None:
        return Part(max(0, size - int(suffix)), size)
    return Part(int(first), min(int(last) + 1, size) if last else size)


def content_range(part: Part, size: int) -> str:
    """The Content-Range of a part."""
    return f"bytes {part.start}-{part.end - 1}/{size}"


def body_of(data: ImageBytes, part: Part) -> Chunk | Iterator[Chunk]:
    """The bytes of a part as a body: in one piece if it is small."""
    return memoryview(data)[part.start : part.end] if part.size <= _CHUNK_BYTES else slices(data, part)


def slices(data: ImageBytes, part: Part) -> Iterator[Chunk]:
    """The bytes of a part as views of the picture, which is copied nowhere."""
    view = memoryview(data)
    return (view[at : min(at + _CHUNK_BYTES, part.end)] for at in range(part.start, part.end, _CHUNK_BYTES))


class Multipart:
    """Several parts as one body, multipart/byteranges: RFC 9110 section 14.6."""

    def __init__(self, data: ImageBytes, parts: Sequence[Part], content_type: str) -> None:
        self._data = data
        self._parts = parts
        self._boundary = secrets.token_hex(16)
        self._content_type = content_type
        self._end = f"\r\n--{self._boundary}--\r\n".encode("ascii")

    @property
    def content_type(self) -> str:
        """That of the whole body."""
        return f"multipart/byteranges; boundary={self._boundary}"

    @property
    def length_bytes(self) -> int:
        """The length of the whole body."""
        return sum(len(self._head(part)) + part.size for part in self._parts) + len(self._end)

    def __iter__(self) -> Iterator[Chunk]:
        """The body in pieces."""
        for part in self._parts:
            yield self._head(part)
            yield from slices(self._data, part)
        yield self._end

    def _head(self, part: Part) -> bytes:
        lines = (
            "",
            f"--{self._boundary}",
            f"Content-Type: {self._content_type}",
            f"Content-Range: {content_range(part, len(self._data))}",
        )
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
