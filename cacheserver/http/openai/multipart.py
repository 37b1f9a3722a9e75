"""A form with files (multipart/form-data, RFC 7578) as its bytes come, every part of it bounded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from cacheserver.http.status import HttpError

# It warns of every form that is no form, on lines of its own: whoever sent one is told, and that is enough.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

_MAX_PARTS = 128
_MAX_NAME_CHARS = 128


@dataclass(slots=True)
class Part:
    """One field of a form, as the pieces in which it came."""

    name: str
    size_bytes: int = 0
    _pieces: list[bytes] = field(default_factory=list, repr=False)

    def add(self, piece: bytes) -> None:
        """So much more of it has come."""
        self._pieces.append(piece)
        self.size_bytes += len(piece)

    def take(self) -> bytes:
        """Its bytes as one, which it lets go of. Copies them: a large one is for a thread."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


class FormReader:
    """Makes the parts of a form of a body's bytes, in whatever pieces those come."""

    def __init__(self, content_type: str, *, max_bytes_of: Callable[[str], int]) -> None:
        """`content_type` is the body's header; `max_bytes_of` tells how large the part of a name may be.

        Raises:
            HttpError: the header names no boundary that a form could have.
        """
        self._max_bytes_of = max_bytes_of
        self._parts: list[Part] = []
        self._left_bytes = 0
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._has_ended = False
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise _malformed("content-type has no boundary")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._read_header_name,
                    "on_header_value": self._read_header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._name_part,
                    "on_part_data": self._read_data,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise _malformed("its boundary is too long") from None

    def feed(self, piece: bytes) -> None:
        """Read on.

        Raises:
            HttpError: this is no form, or a part is too large.
        """
        try:
            self._parser.write(piece)
        except FormParserError:
            raise _malformed("a boundary or a part's header is not as it has to be") from None

    def end(self) -> list[Part]:
        """The parts in their order, now that the body has ended.

        Raises:
            HttpError: the form has not.
        """
        if not self._has_ended:
            raise _malformed("it is cut off")
        return self._parts

    # ── what the parser finds ───────────────────────────────────────────────────────────────────────────────

    def _begin_part(self) -> None:
        if len(self._parts) == _MAX_PARTS:
            raise _malformed(f"it has more than {_MAX_PARTS} parts")
        self._disposition = b""

    def _read_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _read_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _name_part(self) -> None:
        name = _name_in(self._disposition)
        self._parts.append(Part(name))
        self._left_bytes = self._max_bytes_of(name)

    def _read_data(self, data: bytes, start: int, end: int) -> None:
        part = self._parts[-1]
        self._left_bytes -= end - start
        if self._left_bytes < 0:
            most = self._max_bytes_of(part.name)
            raise HttpError(
                HTTPStatus.BAD_REQUEST,
                f"Invalid '{part.name}': it may have {most:,} bytes at most.",
                param=part.name,
                code="invalid_value",
            )
        part.add(data[start:end])

    def _end(self) -> None:
        self._has_ended = True


def _name_in(disposition: bytes) -> str:
    kind, options = parse_options_header(disposition)
    if kind != b"form-data" or b"name" not in options:
        raise _malformed('a part has no content-disposition: form-data; name="..."')
    try:
        name = options[b"name"].decode()
    except UnicodeDecodeError:
        name = ""
    if not (1 <= len(name) <= _MAX_NAME_CHARS and name.isprintable()):
        raise _malformed(f"names of parts have 1 to {_MAX_NAME_CHARS} printable characters")
    return name


def _malformed(text: str) -> HttpError:
    return HttpError(HTTPStatus.BAD_REQUEST, f"The body is no multipart/form-data that can be read: {text}.")
