"""What a hit costs over HTTP: a picture from memory through OpenAI's API, against a bare route with the same bytes.

The service and a bare starlette route run side by side, both on uvicorn, httptools and uvloop, each in its process, and
neither logs its calls. Callers in a third one ask them in turn, 1 and 32 at a time. In each round each answers the same
number of requests; throughput and processor time (user and system) per request are compared pair by pair. Against, by
the medians of the ratios:

    throughput at 32 at a time is at least 0.7 of the bare route's
"""

from __future__ import annotations

import asyncio
import json as json_format
import statistics
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from cacheserver.embedded.child import leashed
from scripts.bench.figures import BusyCores, percentile, print_table, print_verdict, write_json
from scripts.bench.hit_cost import cpu_s
from scripts.bench.http_load import Answered, ask_from_a_process
from scripts.bench.stand import ServiceProcess
from tests.provider import API_KEY, OpenAIStandIn

_ROOT = Path(__file__).resolve().parents[2]
_PATH = "/v1/images/generations"
_BODY = json_format.dumps({"model": "gpt-image-2", "prompt": "a red fox", "quality": "high"})
_AT_A_TIME = (1, 32)
_GOAL = 0.7
_WARM_UP = 500
_CONFIG = """
[disk]
fsync = false
[redis]
embedded = false
[log]
level = "warning"
"""

Server = tuple[str, int]
"""A server's address, as host:port, and its process's id."""


@dataclass(slots=True)
class Side:
    """What was measured of one server at one concurrency, round by round."""

    per_second: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)

    def add(self, answered: Answered, cpu_us: float) -> None:
        """Add a round."""
        self.per_second.append(answered.per_second)
        self.cpu_us.append(cpu_us)
        self.ms += answered.ms

    def told(self) -> dict[str, float]:
        """The figures in short: medians of rounds, percentiles of all requests."""
        return {
            "per_second": statistics.median(self.per_second),
            "cpu_us": statistics.median(self.cpu_us),
            "p50_ms": percentile(self.ms, 50),
            "p99_ms": percentile(self.ms, 99),
        }


@dataclass(slots=True)
class Pair:
    """The service and the bare route at one concurrency."""

    service: Side = field(default_factory=Side)
    floor: Side = field(default_factory=Side)

    @property
    def throughput(self) -> float:
        """The median ratio of requests a second."""
        return _median_ratio(self.service.per_second, self.floor.per_second)

    @property
    def cpu(self) -> float:
        """The median ratio of the bare route's processor time per request to the service's."""
        return _median_ratio(self.floor.cpu_us, self.service.cpu_us)


def _median_ratio(ones: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


async def measure(*, rounds: int, count: int, image_bytes: int) -> dict[int, Pair]:
    """The service, with one picture in memory, and the bare route."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        provider = await stack.enter_async_context(OpenAIStandIn())
        provider.min_image_bytes = image_bytes
        upstream = f'[[upstreams]]\nname = "x"\nbase_url = "{provider.base_url}"\napi_key = "{API_KEY}"\n'
        service = await stack.enter_async_context(ServiceProcess(directory / "service", f"{_CONFIG}{upstream}"))
        request_file, body_file = directory / "request", directory / "body"
        request_file.write_bytes(_request())
        body_file.write_bytes(await _hit(service.http_address))
        floor = await stack.enter_async_context(bare_route(_PATH, body_file))
        return await paired((service.http_address, service.pid), floor, request_file, rounds=rounds, count=count)


async def paired(service: Server, floor: Server, request_file: Path, *, rounds: int, count: int) -> dict[int, Pair]:
    """Rounds of the same request to both, in turn and each time in the other order."""
    pairs = {at_a_time: Pair() for at_a_time in _AT_A_TIME}
    servers = {"service": service, "floor": floor}
    for address, _ in servers.values():
        await ask_from_a_process(address, request_file, at_a_time=8, count=_WARM_UP)
    for number in range(rounds):
        for at_a_time, pair in pairs.items():
            for name in sorted(servers, reverse=bool(number % 2)):
                address, pid = servers[name]
                before_s = cpu_s(pid)
                answered = await ask_from_a_process(address, request_file, at_a_time=at_a_time, count=count)
                getattr(pair, name).add(answered, (cpu_s(pid) - before_s) / answered.count * 1e6)
        _progress(pairs)
    return pairs


def _request() -> bytes:
    """One request as OpenAI's library for Python sends it."""
    head = (
        f"POST {_PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\naccept-encoding: gzip, deflate\r\n"
        "connection: keep-alive\r\nuser-agent: OpenAI/Python 3.54.0\r\nauthorization: Bearer sk-x\r\n"
        "x-stainless-lang: python\r\nx-stainless-package-version: 3.54.0\r\nx-stainless-os: Linux\r\n"
        "x-stainless-arch: x64\r\nx-stainless-runtime: CPython\r\nx-stainless-runtime-version: 3.11.7\r\n"
        "x-stainless-async: false\r\nx-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
        f"content-type: application/json\r\ncontent-length: {len(_BODY)}\r\n\r\n"
    )
    return f"{head}{_BODY}".encode("ascii")


async def _hit(address: str) -> bytes:
    """What the service answers with once it has the picture."""
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=60) as client:
        for _ in range(2):
            answer = await client.post(_PATH, content=_BODY, headers=headers)
            if not answer.is_success:
                raise RuntimeError(answer.text)
    if "; hit; detail=memory" not in answer.headers["cache-status"]:
        raise RuntimeError("answered by another tier than is measured")
    return answer.content


@asynccontextmanager
async def bare_route(path: str, body_file: Path, *, media_type: str = "application/json") -> AsyncIterator[Server]:
    """A bare route that returns the bytes of a file, in a process of its own."""
    argv = leashed([sys.executable, "-m", "scripts.bench.http_floor", path, str(body_file), "--media-type", media_type])
    process = await asyncio.create_subprocess_exec(*argv, stdin=PIPE, stdout=PIPE, cwd=_ROOT)
    try:
        port = (await process.stdout.readline()).decode().strip() if process.stdout else ""
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        if process.stdin is not None:
            process.stdin.write(b"\n")  # lets it off the leash, which else would hold its output open
            process.stdin.close()
        await process.wait()


def _progress(pairs: dict[int, Pair]) -> None:
    told = (f"{n} at a time: throughput {pair.throughput:.3f}, CPU {pair.cpu:.3f}" for n, pair in pairs.items())
    print("  ".join(told), file=sys.stderr, flush=True)


def print_pairs(title: str, pairs: dict[int, Pair]) -> None:
    """Print what was measured."""
    print_table(
        title,
        ("server", "requests/s", "CPU a request", "p50", "p99"),
        [
            (f"{name}, {n} at a time", f"{t['per_second']:.0f}", f"{t['cpu_us']:.0f} us", *_latencies(t))
            for n, pair in pairs.items()
            for name, t in (("service", pair.service.told()), ("bare route", pair.floor.told()))
        ],
    )
    _progress(pairs)


def shortfalls_of(pairs: dict[int, Pair]) -> list[str]:
    """What is not as it should be."""
    ratio = pairs[_AT_A_TIME[-1]].throughput
    return [] if ratio >= _GOAL else [f"throughput is {ratio:.3f} of the bare route's, not {_GOAL}"]


def figures_of(pairs: dict[int, Pair]) -> dict[str, Any]:
    """The figures, for JSON."""
    return {
        str(n): {"throughput": p.throughput, "cpu": p.cpu, "service": p.service.told(), "floor": p.floor.told()}
        for n, p in pairs.items()
    }


def main(
    *,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 7,
    count: Annotated[int, typer.Option(help="Requests to each in a round, at each concurrency.")] = 2_000,
    image_bytes: Annotated[int, typer.Option(help="Size of the picture.")] = 100_000,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """A hit over HTTP against a bare route that returns the same bytes."""
    busy = BusyCores()
    pairs = asyncio.run(measure(rounds=rounds, count=count, image_bytes=image_bytes))
    print_pairs(f"A hit of {image_bytes:,} bytes over HTTP, {rounds} rounds of {count:,}", pairs)
    shortfalls = shortfalls_of(pairs)
    print_verdict(shortfalls)
    write_json(json, "http_hit", {"busy_cores": busy.read(), "shortfalls": shortfalls, **figures_of(pairs)})
    raise typer.Exit(bool(shortfalls))


def _latencies(told: dict[str, float]) -> tuple[str, str]:
    return f"{told['p50_ms']:.2f} ms", f"{told['p99_ms']:.2f} ms"


if __name__ == "__main__":
    typer.run(main)
