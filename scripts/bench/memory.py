"""Whether memory stays where it was set: resident bytes under a mixed load of 1.5 MB pictures that evict one another.

The service has a Redis that takes three times what L1 does, and nothing below. First as many small pictures are put
and asked for as a service remembers requests: what it knows of calls by their bytes and what became of them take some
60 MB that come once and stay, and would be taken for growth for as long as they come. Then L1 is filled. Then a few
callers ask without a pause: most calls for pictures asked for lately, which L1 has, or, the older they are, only Redis;
some for new ones, which an emulated provider makes. Whatever comes from Redis or is new drives another picture out of
L1. Most calls are GetImage, a quarter StreamImage. The resident bytes of the service's process are read every second,
also for a while after the load. Against:

    resident bytes are at most 1.15 x memory.max_bytes + 150 MB, while L1 is filled too
    they do not grow: over the second half of the load a line through them rises by at most 2 % of memory.max_bytes
    L1 was full, there were hits of L1 and of Redis and misses, and no call failed: else it says nothing
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import grpc
import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.figures import BusyCores, print_table, print_verdict, write_json
from scripts.bench.hit_cost import cpu_s
from scripts.bench.provider import KeyConfig, ProviderConfig, ProviderProcess
from scripts.bench.stand import ServiceProcess
from tests.provider import small_image
from tests.servers import ValkeyServer

_MIB = 1024 * 1024
_MB = 1_000_000
_PICTURE_BYTES = 1_500_000
_SMALL = small_image(0)
_SERVICE = "/promptcache.v1.PromptCacheService"
_STREAMED_SHARE = 0.25
_SKEW = 3
"""Of lately asked pictures the newest are asked for most: the age is the span times a random share to this power."""
_YOUNG = 64
"""Pictures that may still be on their way, which would be answered together with whoever asked first."""
_MOST_RISE = 0.02
_FULL = 0.95
_SHED = "cacheserver_memory_shed_bytes_total"
_DEADLINE_S = 60.0
_REMEMBERED = 10_000
"""Different requests that a service remembers, by its own count and as limits.known_requests is by default."""


class BoundedValkey(ValkeyServer):
    """A Valkey that keeps so many bytes, in memory alone."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        super().__init__(directory)
        self._max_bytes = max_bytes

    def command(self) -> list[str]:
        """See `Server.command`."""
        program, *network = super().command()[:5]
        memory = ["--maxmemory", str(self._max_bytes), "--maxmemory-policy", "volatile-lru"]
        return [program, *network, *memory, "--dir", str(self.directory), "--save", "", "--appendonly", "no"]


@dataclass(frozen=True, slots=True)
class Sample:
    """The service's process at one moment (monotonic)."""

    at_s: float
    resident_bytes: int
    l1_bytes: int


@dataclass(slots=True)
class Run:
    """What was measured: samples once a second, those before and after the load too, and what the calls met.

    The load began at `began_s` (monotonic), once L1 was full, and lasted `load_s`.
    """

    l1_bytes: int
    load_s: float
    began_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0
    shed_bytes: int = 0

    @property
    def bound_bytes(self) -> int:
        """The most that may be resident."""
        return int(1.15 * self.l1_bytes) + 150 * _MB

    @property
    def most_bytes(self) -> int:
        """The most that was."""
        return max(sample.resident_bytes for sample in self.samples)

    @property
    def rise_bytes(self) -> float:
        """By how much a line through the second half of the load rises over that half."""
        half_s, end_s = self.began_s + self.load_s / 2, self.began_s + self.load_s
        half = [sample for sample in self.samples if half_s <= sample.at_s <= end_s]
        line = statistics.linear_regression([each.at_s for each in half], [each.resident_bytes for each in half])
        return line.slope * self.load_s / 2

    def shortfalls(self) -> list[str]:
        """What is not as it should be."""
        lines = [f"{count} calls failed: {code}" for code, count in self.failures.items()]
        if self.most_bytes > self.bound_bytes:
            lines.append(f"{_mb(self.most_bytes)} were resident, not at most {_mb(self.bound_bytes)}")
        if self.rise_bytes > _MOST_RISE * self.l1_bytes:
            lines.append(f"it grows: by {_mb(self.rise_bytes)} over the second half")
        if max(sample.l1_bytes for sample in self.samples) < _FULL * self.l1_bytes:
            lines.append("L1 was never full")
        lines += [f"nothing came from {tier}" for tier in ("memory", "redis", "upstream") if not self.answered[tier]]
        return lines


class Load:
    """Callers that ask for one picture after another; which one is drawn, the same draws in every run."""

    def __init__(self, channel: grpc.aio.Channel, *, callers: int, miss_share: float, span: int) -> None:
        # Nothing is parsed: what the answers are is for the service's own counters to say.
        self._unary: Any = channel.unary_unary(f"{_SERVICE}/GetImage")
        self._stream: Any = channel.unary_stream(f"{_SERVICE}/StreamImage")
        self._put: Any = channel.stream_unary(f"{_SERVICE}/PutImage")
        self._callers = callers
        self._miss_share = miss_share
        self._span = span
        self._random = Random(7)  # noqa: S311 - a load
        self._newest = 0
        self.failures: Counter[str] = Counter()

    async def be_remembered(self, requests: int) -> None:
        """Put a small picture for each of so many requests, and ask for it: they are answered from memory."""
        left = iter(range(requests))

        async def caller() -> None:
            for number in left:
                spec = _spec(f"small picture {number}")
                parts = pb.PutImageRequest(header=pb.PutImageHeader(spec=spec)), pb.PutImageRequest(chunk=_SMALL)
                await self._put((part.SerializeToString() for part in parts), timeout=_DEADLINE_S)
                await self._unary(pb.GetImageRequest(spec=spec).SerializeToString(), timeout=_DEADLINE_S)

        await asyncio.gather(*(caller() for _ in range(self._callers)))

    async def fill(self, pictures: int) -> None:
        """Ask for so many new pictures."""
        await self._ask_while(lambda: self._newest < pictures, self._new)

    async def run(self, until_s: float) -> None:
        """Ask for all sorts of pictures until then (monotonic)."""
        await self._ask_while(lambda: time.monotonic() < until_s, self._any)

    async def _ask_while(self, condition: Callable[[], bool], draw: Callable[[], int]) -> None:
        async def caller() -> None:
            while condition():
                await self._ask(draw())

        await asyncio.gather(*(caller() for _ in range(self._callers)))

    async def _ask(self, number: int) -> None:
        request = pb.GetImageRequest(spec=_spec(f"picture {number}"))
        try:
            if self._random.random() < _STREAMED_SHARE:
                message = pb.StreamImageRequest(request=request).SerializeToString()
                async for _ in self._stream(message, timeout=_DEADLINE_S):
                    pass
            else:
                await self._unary(request.SerializeToString(), timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            self.failures[error.code().name] += 1

    def _new(self) -> int:
        self._newest += 1
        return self._newest

    def _any(self) -> int:
        if self._random.random() < self._miss_share:
            return self._new()
        oldest = max(1, self._newest - self._span)
        newest = max(oldest, self._newest - _YOUNG)
        return newest - int((newest - oldest) * self._random.random() ** _SKEW)


def _spec(prompt: str) -> pb.ImageSpec:
    return pb.ImageSpec(prompt=prompt, size="1024x1024", quality="low")


def resident_bytes(pid: int) -> int:
    """How much of a process is in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _metrics(http: httpx.AsyncClient) -> Iterator[tuple[str, dict[str, str], float]]:
    text = (await http.get("/metrics")).text
    return (
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )


async def _l1_bytes(http: httpx.AsyncClient) -> int:
    for name, labels, value in await _metrics(http):
        if name == "cacheserver_tier_bytes" and labels["tier"] == "memory":
            return int(value)
    raise RuntimeError("the service does not say how much L1 holds")


async def _answered(http: httpx.AsyncClient) -> Counter[str]:
    """Calls so far, by the tier that answered, or by their outcome where none did."""
    answered: Counter[str] = Counter()
    for name, labels, value in await _metrics(http):
        if name == "cacheserver_requests_total":
            answered[labels["tier"] or labels["outcome"]] += int(value)
    return answered


async def measure(  # noqa: PLR0913 - what a run is made of, by keyword
    *,
    l1_bytes: int,
    seconds: float,
    after_s: float,
    callers: int,
    miss_share: float,
    requests: int,
    env: Mapping[str, str],
) -> Run:
    """One run."""
    run = Run(l1_bytes, seconds)
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        service = await stack.enter_async_context(_service(directory, l1_bytes, env))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{service.http_address}", trust_env=False, timeout=30)
        )
        options = [("grpc.max_receive_message_length", -1)]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(service.address, options=options))
        fits = l1_bytes // _PICTURE_BYTES
        load = Load(channel, callers=callers, miss_share=miss_share, span=4 * fits)
        sampling = asyncio.create_task(_sample(run, service.pid, http))
        await load.be_remembered(requests)
        await load.fill(fits + fits // 8)
        run.began_s, answered = time.monotonic(), await _answered(http)
        before_s = cpu_s(service.pid)
        await load.run(run.began_s + seconds)
        run.load_s, run.cpu_s = time.monotonic() - run.began_s, cpu_s(service.pid) - before_s
        await asyncio.sleep(after_s)
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        run.failures = load.failures
        run.answered = await _answered(http) - answered
        run.shed_bytes = int(sum([value for name, _, value in await _metrics(http) if name == _SHED]))
    return run


async def _sample(run: Run, pid: int, http: httpx.AsyncClient) -> None:
    while True:
        run.samples.append(Sample(time.monotonic(), resident_bytes(pid), await _l1_bytes(http)))
        if len(run.samples) % 15 == 0:
            last = run.samples[-1]
            print(f"resident {_mb(last.resident_bytes)}  L1 {_mb(last.l1_bytes)}", file=sys.stderr, flush=True)
        await asyncio.sleep(1)


@contextlib.asynccontextmanager
async def _service(directory: Path, l1_bytes: int, env: Mapping[str, str]) -> AsyncIterator[ServiceProcess]:
    async with AsyncExitStack() as stack:
        (directory / "valkey").mkdir()
        valkey = BoundedValkey(directory / "valkey", 3 * l1_bytes)
        stack.push_async_callback(asyncio.to_thread, valkey.kill)
        await asyncio.to_thread(valkey.start)
        told = ProviderConfig(keys=(KeyConfig(key="sk-x", group="org-x"),), min_picture_bytes=_PICTURE_BYTES)
        provider = await stack.enter_async_context(ProviderProcess(told, directory))
        text = (
            f'tiers = ["memory", "redis"]\n[memory]\nmax_bytes = {l1_bytes}\n[redis]\nurl = "{valkey.url}"\n'
            f'[log]\nlevel = "warning"\n'
            f'[[upstreams]]\nname = "x"\nbase_url = "{provider.base_url}"\napi_key = "sk-x"\n'
        )
        yield await stack.enter_async_context(ServiceProcess(directory / "service", text, environment=env))


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / _MB:,.0f} MB"


def told(run: Run) -> dict[str, Any]:
    """The figures of a run, in short."""
    after = [sample.resident_bytes for sample in run.samples if sample.at_s > run.began_s + run.load_s]
    calls = sum(run.answered.values())
    return {
        "l1_bytes": run.l1_bytes,
        "bound_bytes": run.bound_bytes,
        "most_bytes": run.most_bytes,
        "rise_bytes": round(run.rise_bytes),
        "after_bytes": after[-1] if after else None,
        "l1_held_bytes": run.samples[-1].l1_bytes,
        "load_s": run.load_s,
        "answered": dict(run.answered),
        "shed_bytes": run.shed_bytes,
        "calls_per_s": calls / run.load_s,
        "cpu_us_per_call": run.cpu_s / max(1, calls) * 1e6,
    }


def main(  # noqa: PLR0913 - its options
    *,
    seconds: Annotated[float, typer.Option(help="Seconds of load, once L1 is full.")] = 600.0,
    l1_mib: Annotated[int, typer.Option(help="memory.max_bytes, in MiB.")] = 1024,
    callers: Annotated[int, typer.Option(help="Calls at a time.")] = 16,
    misses: Annotated[float, typer.Option(help="Share of calls for a new picture.")] = 0.03,
    requests: Annotated[int, typer.Option(help="Different requests to be remembered before that.")] = _REMEMBERED,
    after: Annotated[float, typer.Option(help="Seconds watched after the load.")] = 10.0,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE in the service's environment.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Resident bytes of a service under a mixed load of 1.5 MB pictures."""
    busy = BusyCores()
    variables = dict(pair.split("=", 1) for pair in env or ())
    run = asyncio.run(
        measure(
            l1_bytes=l1_mib * _MIB,
            seconds=seconds,
            after_s=after,
            callers=callers,
            miss_share=misses,
            requests=requests,
            env=variables,
        )
    )
    figures = told(run)
    print_table(
        f"Resident bytes at L1 = {l1_mib} MiB over {run.load_s:.0f} s",
        ("figure", "value"),
        [
            ("bound", _mb(run.bound_bytes)),
            ("most resident", _mb(run.most_bytes)),
            ("rise over the second half", _mb(run.rise_bytes)),
            (f"resident {after:.0f} s after the load", _mb(figures["after_bytes"] or 0)),
            ("L1 holds", _mb(figures["l1_held_bytes"])),
            ("shed by the guard", _mb(run.shed_bytes)),
            *((f"answered: {kind}", f"{count:,}") for kind, count in sorted(run.answered.items())),
            ("calls", f"{figures['calls_per_s']:.0f}/s"),
            ("processor time a call", f"{figures['cpu_us_per_call']:.0f} us"),
        ],
    )
    shortfalls = run.shortfalls()
    print_verdict(shortfalls)
    series = [(round(each.at_s - run.began_s), each.resident_bytes, each.l1_bytes) for each in run.samples]
    write_json(json, "memory", {**figures, "busy_cores": busy.read(), "shortfalls": shortfalls, "samples": series})
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
