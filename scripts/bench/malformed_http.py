"""Whatever is sent to the HTTP port, the service answers it and goes on serving others.

A service with the painter gets malformed requests: hand-written ones on plain sockets, those with some bytes changed,
and ones that schemathesis makes of the OpenAPI description. Some connections are held open meanwhile that never finish.
Against: no answer is a fault of ours (5xx that is not documented), none is missing, the log has no traceback, memory
grows by no more than 50 MiB once every kind was sent, and at the end the picture asked for first has the same bytes.

    pip install -e '.[fuzz]' && python -m scripts.bench.malformed_http --json malformed.json
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json as json_format
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.malformed_cases import GENERATIONS, Malformed, Target, all_cases, requests
from scripts.bench.malformed_sent import Reply, Seen, rows, send, send_all
from scripts.bench.stand import ServiceProcess

REQUESTS = 6_000
LEAST_REQUESTS = 5_000
LIMIT_MIB = 50.0

TOKEN = "nobody"  # noqa: S105 - the painter serves without callers, and asks for none
_CONFIG = """
tiers = ["memory", "disk"]
[memory]
max_bytes = 16_000_000
"""
"""Little memory for pictures: it is full before its growth is watched."""

_DESCRIBED_SHARE = 12
_DESCRIBED_OPERATIONS = 4
_HELD = 50
_ANSWER_WITHIN_S = 60.0
_SETTLE_S = 2.0
_MIB = 1024 * 1024
_TRACES = ("Traceback", "Exception in ASGI application", "internal error")


async def target(port: int, token: str) -> tuple[Target, str]:
    """A picture that is there, and its bytes in base64."""
    reply = await _generate(port, token)
    key = reply.headers["x-cacheserver-keys"]
    picture: str = json_format.loads(reply.body)["data"][0]["b64_json"]
    return Target(token, key), picture


async def _generate(port: int, token: str) -> Reply:
    body = b'{"prompt":"a lighthouse in a storm","size":"256x256"}'
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer {token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    reply = await send(head.encode() + body, port, within_s=_ANSWER_WITHIN_S)
    if reply is None or reply.status != 200:  # noqa: PLR2004 - OK
        raise RuntimeError(f"a right request got {reply and reply.status}: {reply and reply.body[:300]!r}")
    return reply


@contextlib.asynccontextmanager
async def held_open(port: int, cases: list[Malformed]) -> AsyncIterator[None]:
    """Connections of clients that have sent a half and never send the rest."""
    writers = []
    for case in itertools.islice(itertools.cycle(cases), _HELD):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(case.data[: len(case.data) // 2])
        writers.append(writer)
    try:
        yield
    finally:
        for writer in writers:
            writer.transport.abort()


async def measure(directory: Path, *, count: int, seed: int) -> tuple[Seen, dict[str, float]]:
    """Send so many requests to a service of its own: what came of them, and the memory it took."""
    seen = Seen()
    async with ServiceProcess(directory, _CONFIG) as service:
        there, picture = await target(service.http_port, TOKEN)
        described = count // _DESCRIBED_SHARE // _DESCRIBED_OPERATIONS
        cases = all_cases(there)
        await _described(service.http_port, described // 4, seed, seen)
        await send_all(cases, service.http_port, seen)
        before_mib = await _rss_mib(service.pid)
        async with held_open(service.http_port, [case for case in cases if case.kind.endswith("cut")]):
            await _described(service.http_port, described - described // 4, seed + 1, seen)
            changed = itertools.islice(requests(there, seed), len(cases), None)
            await send_all(itertools.islice(changed, max(0, count - seen.sent)), service.http_port, seen)
            await _compare(service.http_port, picture, seen)
        after_mib = await _rss_mib(service.pid)
        await _compare(service.http_port, picture, seen)
        seen.faults += await asyncio.to_thread(_traces, service.log_file)
    return seen, {"rss_before_mib": before_mib, "rss_after_mib": after_mib, "growth_mib": after_mib - before_mib}


async def _described(port: int, per_operation: int, seed: int, seen: Seen) -> None:
    from scripts.bench.malformed_described import send_described  # noqa: PLC0415 - schemathesis is an extra

    await asyncio.to_thread(
        send_described, port, token=f"Bearer {TOKEN}", per_operation=per_operation, first_seed=seed, seen=seen
    )


async def _compare(port: int, picture: str, seen: Seen) -> None:
    """What was asked first is there, byte for byte."""
    reply = await _generate(port, TOKEN)
    if json_format.loads(reply.body)["data"][0]["b64_json"] != picture:
        seen.faults.append("the picture that was asked for first has other bytes now")


async def _rss_mib(pid: int) -> float:
    """What the process has of memory, once what it had in hand is done."""
    await asyncio.sleep(_SETTLE_S)
    pages = int((await asyncio.to_thread(Path(f"/proc/{pid}/statm").read_text)).split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def _traces(log: Path) -> list[str]:
    """Lines of the log that tell of a fault."""
    lines = log.read_text(errors="replace").splitlines()
    return [f"in the log: {line[:300]}" for line in lines if any(trace in line for trace in _TRACES)][:5]


def main(
    *,
    count: Annotated[int, typer.Option("--requests", min=1, help="How many malformed requests.")] = REQUESTS,
    seed: Annotated[int, typer.Option(help="Which bytes are changed, and what is made of the description.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Send malformed requests to a service, and see that it goes on."""
    with tempfile.TemporaryDirectory(prefix="malformed-") as directory:
        seen, memory = asyncio.run(measure(Path(directory), count=count, seed=seed))
    shortfalls = list(seen.faults)
    if memory["growth_mib"] > LIMIT_MIB:
        shortfalls.append(f"memory grew by {memory['growth_mib']:.1f} MiB")
    if seen.sent < min(count, LEAST_REQUESTS):
        shortfalls.append(f"only {seen.sent:,} requests were sent")
    print_table("Malformed requests", ("kind", "answers"), rows(seen))
    print_table("In all", ("answer", "requests"), [(status, f"{n:,}") for status, n in sorted(seen.statuses.items())])
    print_table("Memory", ("", "MiB"), [(name, f"{value:.1f}") for name, value in memory.items()])
    print(f"{seen.sent:,} requests of {len({kind for kind, _ in seen.counts})} kinds")
    print_verdict(shortfalls)
    result: dict[str, Any] = {
        "requests": seen.sent,
        "statuses": dict(seen.statuses),
        **memory,
        "shortfalls": shortfalls,
    }
    write_json(json, "malformed_http", result | {"kinds": dict(rows(seen))})
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
