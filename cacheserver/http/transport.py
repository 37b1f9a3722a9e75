"""What answers are written to: a transport that sends as few packets as it can."""

from __future__ import annotations

import asyncio
from typing import Any


class HeadWithBody:
    """A transport that sends the head of an answer together with what follows it: in one packet where that is small.

    uvicorn writes them one by one, each of which wakes the client: a fifth of what a hit of 100 KB costs.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Send this, or keep it until what follows is known; to a client that has gone nothing is sent."""
        if self._transport.is_closing():
            return  # uvloop has it an error; behind a call that was pipelined nobody is told that the client has gone
        if self._head is not None:
            head, self._head = self._head, None
            self._send(head, data)
        elif data[:5] == b"HTTP/":
            self._head = bytes(data)
            self._loop.call_soon(self._flush)  # no body, or one that is still to be made
        else:
            self._transport.write(data)

    def write_whole(self, head: bytes, body: bytes | memoryview) -> None:
        """Send a whole answer."""
        self._flush()
        self._send(head, body)

    def close(self) -> None:
        """Send what is left, and close."""
        self._flush()
        self._transport.close()

    def _send(self, head: bytes, body: bytes | memoryview) -> None:
        if isinstance(self._loop, asyncio.BaseEventLoop):
            # Its `writelines` never paused who writes in Python 3.12.0 to 3.12.8, 3.13.0 and 3.13.1 (CVE-2024-12254).
            self._transport.write(b"".join((head, body)))
        else:
            self._transport.writelines((head, body))

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            if not self._transport.is_closing():
                self._transport.write(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
