"""Server-sent events, as the HTML standard has them: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One event: its kind, empty if it says none, and its data."""

    kind: str
    data: bytes


class EventTooLargeError(Exception):
    """An event is larger than is taken."""


class EventReader:
    """Makes events of bytes as they come, however they are cut.

    Unlike the standard, an event that the stream's end cuts short of its blank line counts: see `end`.
    """

    def __init__(self, *, max_event_bytes: int) -> None:
        """`max_event_bytes` is the most that one event may have, its lines' names and comments included."""
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()
        self._kind = ""
        self._data: list[bytes] = []
        self._event_bytes = 0
        self._is_first_line = True
        self._ended_in_cr = False

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that `chunk` completes. Raises EventTooLargeError."""
        if not chunk:
            return
        begin = 1 if self._ended_in_cr and chunk.startswith(b"\n") else 0
        self._ended_in_cr = chunk.endswith(b"\r")
        for end in _LINE_END.finditer(chunk, begin):
            self._add(chunk[begin : end.start()])
            begin = end.end()
            yield from self._end_line()
        self._add(chunk[begin:])

    def end(self) -> Iterator[Event]:
        """The event that was under way when the stream ended, if any was."""
        yield from self._end_line()
        yield from self._end_event()

    def _add(self, part: bytes) -> None:
        self._event_bytes += len(part)
        if self._event_bytes > self._max_event_bytes:
            raise EventTooLargeError
        self._line += part

    def _end_line(self) -> Iterator[Event]:
        line = bytes(self._line)
        self._line.clear()
        if self._is_first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._is_first_line = False
        if not line:
            yield from self._end_event()
            return
        name, _, value = line.partition(b":")  # a comment has no name
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._kind = value.decode("utf-8", "replace")

    def _end_event(self) -> Iterator[Event]:
        if self._data:
            yield Event(self._kind, b"\n".join(self._data))
        self._kind, self._data, self._event_bytes = "", [], 0
