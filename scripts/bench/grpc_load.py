"""Unary gRPC calls that each have a body of their own, which h2load cannot send: HTTP/2 by hand, as little as it takes.

    python -m scripts.bench.grpc_load HOST:PORT BODIES --method /package.Service/Method --calls 1000 --log-file FILE

BODIES is a file of gRPC messages with their prefixes. Each connection has one call at a time. With --skew requests are
drawn from all bodies by Zipf's law, and each has a request_id of its own; else each connection has a body of its own.
What it does for a call, some 20 us, is the same whoever answers; the log file is like that of h2load. It prints how
many bytes of messages it received.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
import uvloop

from scripts.bench.framing import framed, messages_of

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_HEAD_BYTES = 9
_LARGEST_WINDOW = 2**31 - 1
_FIRST_WINDOW = 65_535
_RENEW_WINDOW_AT = 2**29
_REQUEST_ID = 14 << 3 | 2
"""Tag of GetImageRequest.request_id."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


_GREETING = b"".join(
    (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        frame(_SETTINGS, 0, 0, struct.pack(">HIHI", 2, 0, 4, _LARGEST_WINDOW)),  # no push; the window of each stream
        frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _FIRST_WINDOW)),
    )
)


def header_blocks(address: str, method: str, token: str) -> tuple[bytes, bytes]:
    """The headers of a connection's first call, which its table then has, and those of all further ones (RFC 7541)."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode("ascii")  # below 127 bytes

    post, http = b"\x83", b"\x86"
    named = ((b"\x44", method), (b"\x41", address), (b"\x5f", "application/grpc"), (b"\x40" + text("te"), "trailers"))
    added = [name + text(value) for name, value in (*named, (b"\x57", f"Bearer {token}"))]
    return post + http + b"".join(added), post + http + bytes(0x80 | 61 + n for n in range(len(added), 0, -1))


class _Connection(asyncio.Protocol):
    """One connection that makes one call after another, until there are no more."""

    def __init__(self, calls: Iterator[bytes], blocks: tuple[bytes, bytes], log: list[tuple[int, int]]) -> None:
        self._calls = calls
        self._block, self._later = blocks
        self._log = log
        self._stream = 1
        self._begun_ns = 0
        self._rest = b""
        self._skip = 0
        self._since_renewal = 0
        self.received = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)
        self._transport.write(_GREETING)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the server closed the connection: {exc}")

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data, self._rest = self._rest + data, b""
        at, size = self._skip, len(data)
        while at + _HEAD_BYTES <= size:
            length, kind, flags = int.from_bytes(data[at : at + 3], "big"), data[at + 3], data[at + 4]
            if kind == _DATA:
                self._count(length)
            elif at + _HEAD_BYTES + length > size:
                break
            else:
                self._take(kind, flags, data[at + _HEAD_BYTES : at + _HEAD_BYTES + length])
            at += _HEAD_BYTES + length
        self._skip = max(0, at - size)
        self._rest = data[at:]

    def _count(self, length: int) -> None:
        self.received += length
        self._since_renewal += length
        if self._since_renewal >= _RENEW_WINDOW_AT:
            self._transport.write(frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", self._since_renewal)))
            self._since_renewal = 0

    def _take(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _HEADERS and flags & _END_STREAM:
            now_ns = time.time_ns()
            self._log.append((self._begun_ns // 1_000, (now_ns - self._begun_ns) // 1_000))
            self._next()
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._transport.write(frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind in (_RST_STREAM, _GOAWAY):
            self._fail("the server broke off")

    def _next(self) -> None:
        body = next(self._calls, None)
        if body is None:
            self.done.set_result(None)
            return
        self._begun_ns = time.time_ns()
        headers = frame(_HEADERS, _END_HEADERS, self._stream, self._block)
        self._transport.write(headers + frame(_DATA, _END_STREAM, self._stream, body))
        self._stream += 2
        self._block = self._later

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(why))


def drawn(bodies: Sequence[bytes], calls: int, skew: float) -> Iterator[bytes]:
    """So many requests by Zipf's law: the body of rank n as often as n to the power of -`skew` says."""
    weights = list(itertools.accumulate((rank + 1) ** -skew for rank in range(len(bodies))))
    messages = [next(messages_of(body)) for body in bodies]
    start = time.time_ns()
    ranks = random.choices(range(len(bodies)), cum_weights=weights, k=calls)  # noqa: S311 - which picture to ask for
    for number, rank in enumerate(ranks):
        request_id = b"%020d" % (start + number)
        yield framed(messages[rank] + bytes((_REQUEST_ID, len(request_id))) + request_id)


async def load(  # noqa: PLR0913 - options
    address: str, bodies: Sequence[bytes], *, method: str, token: str, calls: int, at_a_time: int, skew: float
) -> tuple[int, list[tuple[int, int]]]:
    """Make the calls: the bytes received, and of each call when it began and how long it took, in microseconds."""
    loop = asyncio.get_running_loop()
    host, _, port = address.rpartition(":")
    blocks, log = header_blocks(address, method, token), list[tuple[int, int]]()
    shared = drawn(bodies, calls, skew) if skew else None
    connections = []
    for number in range(at_a_time):
        own = itertools.repeat(bodies[number % len(bodies)], calls // at_a_time)
        _, connection = await loop.create_connection(
            lambda own=own: _Connection(shared or own, blocks, log),  # type: ignore[misc] # a lambda's default
            host,
            int(port),
        )
        connections.append(connection)
    await asyncio.gather(*(connection.done for connection in connections))
    return sum(connection.received for connection in connections), log


def main(  # noqa: PLR0913 - options
    address: Annotated[str, typer.Argument(help="Server, as host:port.")],
    bodies_file: Annotated[Path, typer.Argument(metavar="BODIES", help="File of gRPC messages.")],
    *,
    method: Annotated[str, typer.Option(help="Path of the rpc.")],
    log_file: Annotated[Path, typer.Option(help="File for the calls, as h2load writes it.")],
    token: Annotated[str, typer.Option(help="Bearer token.")] = "",
    calls: Annotated[int, typer.Option(min=1)] = 1_000,
    at_a_time: Annotated[int, typer.Option(min=1)] = 32,
    skew: Annotated[float, typer.Option(help="Exponent of Zipf's law; 0: a body for each connection.")] = 0.0,
) -> None:
    """Make unary calls, each with a body of its own."""
    bodies = [framed(message) for message in messages_of(bodies_file.read_bytes())]
    received, log = uvloop.run(
        load(address, bodies, method=method, token=token, calls=calls, at_a_time=at_a_time, skew=skew)
    )
    log_file.write_text("".join(f"{start_us}\t200\t{us}\n" for start_us, us in log))
    print(received)


if __name__ == "__main__":
    typer.run(main)
