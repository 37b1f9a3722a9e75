"""Large values as they come from Redis, laid where they will stay.

redis-py copies what it reads five times: out of the event loop, into asyncio's stream, out of it in small pieces, into
hiredis, and out of that. A picture spends most of a hit on the way through. Here the value that was asked for is told
by the first bytes of its reply (`$1500000`, RESP 2 and 3), and from then on the network writes into the value itself.
Any other reply goes redis-py's way, and so does the end of a connection.
"""

from __future__ import annotations

import asyncio
import re
from typing import cast

_BULK = re.compile(rb"\$([0-9]{1,9})\r\n")
_END_BYTES = 2
"""The line end after a value."""

_SPARE_BYTES = 8 * 1024
"""What is read at a time of other replies, and of a value before it is known to be one."""

_MAX_VALUE_BYTES = 64 * 1024 * 1024
"""Room is made at once for so much on the server's word; what is larger grows as it comes."""


class ValueInlet(asyncio.BufferedProtocol):
    """What a connection's bytes come through on their way to its stream, but for a value that is expected.

    Belongs to one connection, which has one command under way at a time. A value that was expected and that nobody has
    taken would be mistaken for the next command's: while one is owing, the connection is fit for nothing.
    """

    def __init__(self, stream: asyncio.StreamReader, below: asyncio.StreamReaderProtocol) -> None:
        self._stream = stream
        self._below = below
        self._spare = memoryview(bytearray(_SPARE_BYTES))
        self._value = self._missing = memoryview(b"")
        self._is_expecting = False
        self._coming: asyncio.Future[memoryview | None] | None = None

    @classmethod
    def of(cls, stream: asyncio.StreamReader, transport: asyncio.BaseTransport) -> ValueInlet:
        """The inlet of a connection, put between its transport and its stream the first time."""
        protocol = transport.get_protocol()
        if isinstance(protocol, cls):
            return protocol
        inlet = cls(stream, cast("asyncio.StreamReaderProtocol", protocol))
        transport.set_protocol(inlet)
        return inlet

    @property
    def is_owing(self) -> bool:
        """Whether a value was expected that nobody has taken, or whose reader gave up: then for good."""
        return self._coming is not None

    def expect(self) -> None:
        """What comes next is the reply to a command that asks for a value; to be called before it is sent."""
        # Bytes that nobody has read yet would come before it; the end is the stream's to tell.
        if not self._stream._buffer and not self._stream.at_eof():  # type: ignore[attr-defined]  # noqa: SLF001 - redis-py looks there too, nothing else tells
            self._is_expecting = True
            self._coming = asyncio.get_running_loop().create_future()

    async def value(self) -> memoryview | None:
        """The value that was expected; None if the stream has the reply, or that the connection ended.

        Raises:
            ConnectionResetError: whoever was to have the reply gave up, and what comes now belongs to nobody.
        """
        if self._coming is None:
            return None
        if self._coming.cancelled():
            raise ConnectionResetError("a reply was given up half way")
        value = await self._coming
        self._coming, self._value = None, self._spare[:0]
        return value

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's
        """See `asyncio.BufferedProtocol`."""
        return self._missing or self._spare

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        if self._missing:
            self._missing = self._missing[nbytes:]
            if not self._missing:
                self._missing = self._spare[:0]  # an empty view would keep the value as long as the connection lasts
                self._tell(self._value)
        elif self._is_expecting:
            self._is_expecting = False
            self._begin(self._spare[:nbytes])
        else:
            self._stream.feed_data(self._spare[:nbytes])

    def _begin(self, start: memoryview) -> None:
        """Make room for the value if `start` is the start of one; anything else is the stream's."""
        head = _BULK.match(start)
        size = 0 if head is None else int(head[1])
        if head is None or size + _END_BYTES <= len(start) - head.end() or size > _MAX_VALUE_BYTES:
            self._stream.feed_data(start)
            self._tell(None)
            return
        came = start[head.end() :]
        room = memoryview(bytearray(size + _END_BYTES))
        room[: len(came)] = came
        self._value, self._missing = room[:size].toreadonly(), room[len(came) :]

    def _tell(self, value: memoryview | None) -> None:
        if self._coming is not None and not self._coming.done():
            self._coming.set_result(value)

    def _end(self) -> None:
        # Whoever waits turns to the stream, which has the end or will have it before they do.
        self._is_expecting = False
        self._tell(None)

    def eof_received(self) -> bool | None:
        """See `asyncio.BufferedProtocol`."""
        self._end()
        return self._below.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self._end()
        self._below.connection_lost(exc)

    def pause_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._below.pause_writing()

    def resume_writing(self) -> None:
        """See `asyncio.BaseProtocol`."""
        self._below.resume_writing()
