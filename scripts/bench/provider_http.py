"""A small HTTP/1.1 server with keep-alive, which can also end a connection the wrong way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus

_BODY_MAX_BYTES = 64 * 1024 * 1024
_BACKLOG = 4096


class End(Enum):
    """How an answer ends."""

    WHOLE = "whole"
    MID_BODY = "mid_body"
    """The connection is reset in the middle of the body."""

    RESET = "reset"
    """The connection is reset in place of an answer."""

    SILENCE = "silence"
    """Nothing is sent; the connection stays open as long as the caller lets it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. `headers` by their names in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    has_hung_up: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    end: End = End.WHOLE


class HttpServer:
    """Serves on 127.0.0.1. A handler runs to its end even if its caller hangs up, as a provider's work does."""

    def __init__(self, handle: Callable[[Request], Awaitable[Reply]]) -> None:
        self._handle = handle
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int) -> int:
        """Listen on `port`, 0 for any; the port it is.

        Raises:
            OSError: the port is taken.
        """
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, backlog=_BACKLOG)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stop listening and drop all connections, whatever runs on them."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):  # the caller hung up, or a fault wants it so
                while (request := await _read(reader, writer)) is not None:
                    await _send(reader, writer, await self._handle(request))
        finally:
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """The next request; None if there is none, or none that we read."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size_bytes = int(headers.get("content-length", "0"))
        if not 0 <= size_bytes <= _BODY_MAX_BYTES or "transfer-encoding" in headers:
            return None
        body = await reader.readexactly(size_bytes)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
        return None
    path, _, query = target.partition("?")
    return Request(method, path, query, headers, body, lambda: reader.at_eof() or writer.is_closing())


async def _send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reply: Reply) -> None:
    """Send an answer.

    Raises:
        ConnectionError: the connection has ended, or the reply ends it.
    """
    if reply.end is End.SILENCE:
        await reader.read(1)
        raise ConnectionAbortedError
    if reply.end is End.RESET:
        _reset(writer)
    headers = {"content-type": reply.content_type, "content-length": str(len(reply.body)), **reply.headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}\r\n{lines}\r\n".encode("latin-1")
    if reply.end is End.MID_BODY:
        writer.write(head + reply.body[: len(reply.body) // 2])
        await writer.drain()
        _reset(writer)
    writer.writelines((head, reply.body))
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with a reset: closed with a linger time of 0, a socket sends RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise ConnectionResetError
