"""Callers of an HTTP server in a process of their own: each sends the same request again as soon as it is answered.

Written on the bare transport, because a client library would be the slowest part of what is measured. It takes answers
with a content-length on connections that stay open, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
import uvloop

_ROOT = Path(__file__).resolve().parents[2]
_LENGTH = b"\r\ncontent-length: "
_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Answered:
    """How many requests were answered in how many seconds, and how long each took, in milliseconds."""

    count: int
    seconds: float
    ms: list[float]

    @property
    def per_second(self) -> float:
        """Requests answered a second."""
        return self.count / self.seconds


class _Caller(asyncio.Protocol):
    """One connection, one request at a time. Raises nothing: what goes wrong ends `done` with an error."""

    def __init__(self, request: bytes, count: int, ms: list[float]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._left = count
        self._ms = ms
        self._missing: int | None = None
        self._head = b""
        self._sent_s = 0.0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # what it is over TCP
        self._transport = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        if self._missing is None:
            self._head += data
            end = self._head.find(_HEAD_END)
            if end < 0:
                return
            if not self._head.startswith(b"HTTP/1.1 200 "):
                self._fail(self._head[:end].decode("latin-1"))
                return
            start = self._head.index(_LENGTH) + len(_LENGTH)
            self._missing = int(self._head[start : self._head.index(b"\r\n", start)]) - (len(self._head) - end - 4)
        else:
            self._missing -= len(data)
        if self._missing == 0:
            self._answered()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection ended: {exc}")

    def _send(self) -> None:
        self._missing, self._head = None, b""
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)

    def _answered(self) -> None:
        self._ms.append((time.perf_counter() - self._sent_s) * 1e3)
        self._left -= 1
        if self._left:
            self._send()
        elif not self.done.done():
            self.done.set_result(None)
            self._transport.close()

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(why))


async def ask_again(address: str, request: bytes, *, at_a_time: int, count: int) -> Answered:
    """Send `request` to `address` (host:port) `count` times, `at_a_time` of them."""
    loop = asyncio.get_running_loop()
    host, _, port = address.rpartition(":")
    ms: list[float] = []
    began_s = time.perf_counter()
    made = [
        await loop.create_connection(lambda: _Caller(request, count // at_a_time, ms), host, int(port))
        for _ in range(at_a_time)
    ]
    await asyncio.gather(*(caller.done for _, caller in made))
    return Answered(len(ms), time.perf_counter() - began_s, ms)


async def ask_from_a_process(address: str, request_file: Path, *, at_a_time: int, count: int) -> Answered:
    """The same from a process of its own, so that what measures does not take from what is measured."""
    options = {"--at-a-time": at_a_time, "--count": count}
    argv = [str(word) for option in options.items() for word in option]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scripts.bench.http_load", address, str(request_file), *argv, stdout=PIPE, cwd=_ROOT
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the callers' process ended with {process.returncode}")
    return Answered(**json.loads(out))


def main(
    address: Annotated[str, typer.Argument(help="Server, as host:port.")],
    request_file: Annotated[Path, typer.Argument(help="File that holds the request as it goes over the wire.")],
    *,
    at_a_time: Annotated[int, typer.Option(help="Connections.")] = 1,
    count: Annotated[int, typer.Option(help="Requests in all.")] = 1_000,
) -> None:
    """Send one request again and again, and print as JSON how long each took."""
    answered = uvloop.run(ask_again(address, request_file.read_bytes(), at_a_time=at_a_time, count=count))
    print(json.dumps(asdict(answered)))


if __name__ == "__main__":
    typer.run(main)
