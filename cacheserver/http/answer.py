"""What an HTTP call is answered with: a status, headers, and a body that is never copied on its way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

from cacheserver.calls.downloads import Hold

Chunk = bytes | memoryview

_TURN_BYTES = 1024 * 1024
"""After so many others get their turn: a client that reads as fast as we write never makes us wait."""


@dataclass(slots=True)
class Answer:
    """An ASGI response. A body in pieces is sent as they are made: as fast as its client reads them.

    `length_bytes` None sends the body chunked, as long as it goes on; only at its end is the call answered. `error` is
    what such a body ended with, as it told the client itself. Once nothing of it is sent any more, however that came,
    `on_end` is called, and what it has `in_hand` let go.
    """

    status: int
    headers: dict[str, str]
    body: Chunk | Iterable[Chunk] | AsyncIterable[Chunk] = field(default=b"", repr=False)
    length_bytes: int | None = 0
    error: Exception | None = field(default=None, repr=False)
    on_end: Callable[[], Awaitable[None]] | None = field(default=None, repr=False)
    in_hand: Hold | None = field(default=None, repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send it. To HEAD the server sends no body."""
        try:
            await self._send(scope, send)
        finally:
            if self.in_hand is not None:
                self.in_hand.let_go()
            if self.on_end is not None:
                await self.on_end()

    async def _send(self, scope: Scope, send: Send) -> None:
        headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in self.headers.items()]
        if self.length_bytes is not None:
            headers.append((b"content-length", b"%d" % self.length_bytes))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        if isinstance(self.body, bytes | memoryview):
            await send({"type": "http.response.body", "body": self.body, "more_body": False})
            return
        if scope["method"] != "HEAD":
            pieces = _in_turns(send)
            if isinstance(self.body, AsyncIterable):
                async for piece in self.body:
                    await pieces(piece)
            else:
                for piece in self.body:
                    await pieces(piece)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _in_turns(send: Send) -> Callable[[Chunk], Awaitable[None]]:
    """Sends one piece of a body after the other."""
    in_turn_bytes = 0

    async def send_piece(piece: Chunk) -> None:
        nonlocal in_turn_bytes
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        in_turn_bytes += len(piece)
        if in_turn_bytes >= _TURN_BYTES:
            in_turn_bytes = 0
            await asyncio.sleep(0)

    return send_piece


def json_answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """`document` as JSON."""
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return Answer(status, {"content-type": "application/json", **(headers or {})}, body, len(body))
