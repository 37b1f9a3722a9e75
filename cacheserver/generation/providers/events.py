"""Server-sent events, as the HTML standard has them: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
        self._line: list[bytes] = []
        self._kind = ""
        self._data: list[bytes] = []
        self._event_bytes = 0
        self._is_first_line = True
        self._ended_in_cr = False

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that `chunk` completes. Raises EventTooLargeError."""
        if not chunk:
            return
        if self._ended_in_cr:
            chunk = chunk.removeprefix(b"\n")
        # A search for any of the ends, byte by byte, takes twenty times as long.
        *ended, begun = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._ended_in_cr = chunk.endswith(b"\r")
        for part in ended:
            self._add(part)
            yield from self._end_line()
        self._add(begun)

    def end(self) -> Iterator[Event]:
        """The event that was under way when the stream ended, if any was."""
        yield from self._end_line()
        yield from self._end_event()

    def _add(self, part: bytes) -> None:
        self._event_bytes += len(part)
        if self._event_bytes > self._max_event_bytes:
            raise EventTooLargeError
        self._line.append(part)

    def _end_line(self) -> Iterator[Event]:
        line, self._line = b"".join(self._line), []
        if self._is_first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._is_first_line = False
        if not line:
            yield from self._end_event()
            return
        colon = line.index(b":") if b":" in line else len(line)
        # A copy of a value at most: it may be an image. A comment has no name.
        name, begin = line[:colon], colon + (2 if line[colon + 1 : colon + 2] == b" " else 1)
        if name == b"data":
            self._data.append(line[begin:])
        elif name == b"event":
            self._kind = line[begin:].decode("utf-8", "replace")

    def _end_event(self) -> Iterator[Event]:
        if self._data:
            yield Event(self._kind, b"\n".join(self._data))
        self._kind, self._data, self._event_bytes = "", [], 0
