"""Sends malformed HTTP requests on connections of their own, and judges what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from scripts.bench.malformed_cases import Malformed

AT_A_TIME = 8
"""So many connections are open together."""

_ANSWERED_WITHIN_S = 20.0
_CUT_ANSWERED_WITHIN_S = 0.3
"""What was cut off is waited for by the server: whether it answers what it has is seen at once."""

_MAX_ANSWER_BYTES = 64 * 1024 * 1024
_KEYS = ("message", "type", "param", "code")
_MAX_FAULTS = 20
_UNAVAILABLE = "service_unavailable_error"
_NOT_CACHED = "not_cached"
_INJECTED = (b"\r\nset-cookie:", b"\r\nx-a:", b"\r\nx:")
"""Headers that no answer of ours has: a request brought them in."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server sent before it closed the connection."""

    status: int
    head: bytes = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


@dataclass(slots=True)
class Seen:
    """What came of all requests so far."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind, and status or what came in place of one."""

    faults: list[str] = field(default_factory=list)
    """What must not be, at most so many lines of it as a person reads."""

    @property
    def sent(self) -> int:
        """How many requests."""
        return self.counts.total()

    @property
    def statuses(self) -> Counter[str]:
        """How often each came, whatever was asked."""
        found: Counter[str] = Counter()
        for (_, status), count in self.counts.items():
            found[status] += count
        return found

    def add(self, kind: str, status: str, fault: str | None) -> None:
        """Count one request."""
        self.counts[kind, status] += 1
        if fault is not None and len(self.faults) < _MAX_FAULTS:
            self.faults.append(f"{kind}: {fault}")


async def send_all(cases: Iterable[Malformed], port: int, seen: Seen) -> None:
    """Send every case, some at a time, and count what comes of each."""
    left = iter(cases)
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_A_TIME):
            group.create_task(_send_from(left, port, seen))


async def _send_from(left: Iterator[Malformed], port: int, seen: Seen) -> None:
    for case in left:
        try:
            reply = await send(case.data, port, within_s=_CUT_ANSWERED_WITHIN_S if case.is_cut else _ANSWERED_WITHIN_S)
        except TimeoutError:
            seen.add(case.kind, "waits", None if case.is_cut else f"no answer within {_ANSWERED_WITHIN_S:.0f} s")
        except OSError as error:
            seen.add(case.kind, "refused", f"{type(error).__name__}: {error}")
        else:
            status = "closed" if reply is None else str(reply.status)
            seen.add(case.kind, status, judge(reply, is_framed=case.is_framed, is_cut=case.is_cut))


async def send(data: bytes, port: int, *, within_s: float) -> Reply | None:
    """Send this on a connection of its own: the reply, None where it was closed without one.

    Raises:
        TimeoutError: there was none in time, and the connection was still open.
        OSError: nobody takes connections.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(within_s):
            # Read while it is still being written: a server may answer, and close, before it has read everything.
            writer.write(data)
            return await _read(reader)
    finally:
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> Reply | None:
    answer = bytearray()
    with contextlib.suppress(ConnectionError):
        while len(answer) < _MAX_ANSWER_BYTES and not _is_whole(answer):
            piece = await reader.read(65_536)
            if not piece:
                break
            answer += piece
    while answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    status = head[9:12]
    if not head.startswith(b"HTTP/1.1 ") or not status.isdigit():
        return None
    return Reply(int(status), head, body)


def _is_whole(answer: bytearray) -> bool:
    """Whether all of a reply of stated length has come: not every request says that it is the last."""
    head, end, _ = bytes(answer[:16_384]).partition(b"\r\n\r\n")
    if not end or head.startswith(b"HTTP/1.1 100"):
        return False
    stated = Reply(0, head, b"").headers.get("content-length", "")
    return stated.isdigit() and len(answer) - len(head) - len(end) >= int(stated)


def judge(reply: Reply | None, *, is_framed: bool, is_cut: bool) -> str | None:
    """What is wrong with a reply, None if nothing is.

    What is no HTTP may be answered by the server's parser, in its own words, or by closing.
    """
    if reply is None:
        return None if is_cut or not is_framed else "the connection was closed without an answer"
    if any(injected in reply.head.lower() + b"\r\n" for injected in _INJECTED):
        return f"{reply.status} with a header that the request brought in"
    if reply.status < HTTPStatus.BAD_REQUEST or not reply.body:
        return None if reply.status < HTTPStatus.INTERNAL_SERVER_ERROR else f"{reply.status} without a body"
    return _fault_of_error(reply, is_framed=is_framed)


def _fault_of_error(reply: Reply, *, is_framed: bool) -> str | None:
    error = error_in(reply.body)
    if error is None:
        is_the_parsers = not is_framed and reply.status == HTTPStatus.BAD_REQUEST
        return None if is_the_parsers else f"{reply.status} in no shape of ours"
    if reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not _is_documented(reply.status, error):
        return f"{reply.status} {error['type']} {error['code']}: {error['message']}"
    return None if "x-request-id" in reply.headers else f"{reply.status} without x-request-id"


def error_in(body: bytes) -> dict[str, str | None] | None:
    """The error of an answer in OpenAI's shape, None if it is in none."""
    try:
        document = json.loads(body)
    except ValueError:
        return None
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, dict) and set(_KEYS) <= error.keys() else None


def _is_documented(status: int, error: Mapping[str, str | None]) -> bool:
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return error["type"] == _UNAVAILABLE
    return status == HTTPStatus.GATEWAY_TIMEOUT and error["code"] == _NOT_CACHED


def rows(seen: Seen) -> list[tuple[str, str]]:
    """By kind: how often which status came."""
    by_kind = itertools.groupby(sorted(seen.counts.items()), key=lambda item: item[0][0])
    return [(kind, "  ".join(f"{status}: {count}" for (_, status), count in group)) for kind, group in by_kind]
