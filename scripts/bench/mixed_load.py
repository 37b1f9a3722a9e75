"""How much longer hits take while others wait for Redis and for new pictures, and how late the event loop ever wakes.

256 callers ask for pictures, at moments that do not depend on how long the answers take: nine of ten times for one that
memory has, nine of a hundred for one that Redis has, and once in a hundred for a new one, which the provider makes in
5 s. Every other second somebody asks in which tier 10,000 pictures are. In turn with such rounds come others in which
the same callers ask for the hits alone, at the same moments. The service has a core of its own; callers, provider and
Valkey are processes on the others, and the rate is one that leaves all of them idle most of the time: what is measured
is not how a queue grows.

How late the event loop wakes is read twice: from the service's own metric, and by a watcher in this process that asks
for /healthz again and again, and knows for how long of it the service had no core (see `loop_watch`). Both are told.

Against: the 99th percentile of a hit is at most 5 times that of the rounds without the others (the median of the
pairs); the event loop was late by no more than 20 ms, and every call was answered, by the tier it should be. A loop
that does not run is late, too: where the metric saw more than 20 ms, it falls short unless the watcher, which met the
same moments, had to wait no longer than that for the service itself.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Self

import grpc
import httpx
import typer

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.figures import percentile, print_table, print_verdict, write_json
from scripts.bench.hit_stage import Cores
from scripts.bench.load import callers, prompt
from scripts.bench.loop_watch import Watcher
from scripts.bench.mixed_callers import MISS_S, Played, Round, added
from scripts.bench.provider import KeyConfig, Latency, ProviderConfig, ProviderProcess
from scripts.bench.stand import ServiceProcess
from tests.servers import ValkeyServer

_ROOT = Path(__file__).resolve().parents[2]
_KEY = "sk-x"
_CALLERS = 256
_PROCESSES = 2
_HOT = 100
_COLD = 1_000
_FILL_AT_A_TIME = 32
_MEMORY_HOLDS = 500
_MOST_TIMES_LONGER = 5.0
_LATEST_S = 0.02
_RESTLESS_MS = 5.0
"""A machine that wakes callers later than this, once in a hundred times and while only hits are asked for, cannot tell.

They sleep most of that time: what keeps them from waking is not what is measured.
"""

_FIND_EVERY_S = 2.0
_FOUND = 10_000
_FIND_TIMEOUT_S = 30.0
_BUCKET = re.compile(r'^cacheserver_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)


@dataclass(slots=True)
class Turn:
    """One round as it went."""

    hits_only: bool
    hit_p50_ms: float
    hit_p99_ms: float
    hits: int
    cold_p99_ms: float
    cold: int
    misses: int
    find_ms: list[float]
    loop_late: dict[str, int]
    """By the service's metric: how many moments were at most so late and later than the bucket before; seconds."""
    watched_p99_ms: float
    watched_longest_ms: float
    watched_own_ms: float
    """The longest that the watcher waited for the service itself: less while that had no core."""
    watched_ran_ms: float
    """The most that the service's threads ran while the watcher waited for one answer."""
    find_own_ms: float
    """The longest that it waited so while somebody asked where 10,000 pictures are."""
    callers_lag_p99_ms: float
    sent_late_p99_ms: float
    service_cores: float
    service_without_core: float
    """Share of the time that the service could have run and had no core."""
    elsewhere: dict[str, int]
    failed: dict[str, int]

    @property
    def latest_s(self) -> float:
        """The upper bound of the latest moment that the metric saw."""
        return max((float(bound) for bound, count in self.loop_late.items() if count), default=0.0)


@dataclass(slots=True)
class Figures:
    """All rounds, in pairs: one with the hits alone, one with everything."""

    pairs: list[tuple[Turn, Turn]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times longer a hit takes in the 99th percentile: the median of the pairs."""
        return median(mixed.hit_p99_ms / alone.hit_p99_ms for alone, mixed in self.pairs)

    def shortfalls(self) -> list[str]:
        """What is not as it should be."""
        turns = [turn for pair in self.pairs for turn in pair]
        latest_s = max(mixed.latest_s for _, mixed in self.pairs)
        own_s = max(mixed.watched_own_ms for _, mixed in self.pairs) / 1e3
        callers_late_ms = max(alone.callers_lag_p99_ms for alone, _ in self.pairs)
        is_short = {
            f"callers were woken late by {callers_late_ms:.0f} ms: the machine is too restless to tell": (
                callers_late_ms > _RESTLESS_MS
            ),
            f"hits take {self.ratio:.1f} times as long, not {_MOST_TIMES_LONGER:.0f}": self.ratio > _MOST_TIMES_LONGER,
            f"the event loop was late by up to {latest_s * 1e3:.0f} ms, {own_s * 1e3:.1f} of it its own, not 20": (
                latest_s > _LATEST_S and own_s > _LATEST_S
            ),
            f"calls failed: {[turn.failed for turn in turns if turn.failed]}": any(turn.failed for turn in turns),
            f"other tiers answered: {[turn.elsewhere for turn in turns if turn.elsewhere]}": any(
                turn.elsewhere for turn in turns
            ),
        }
        return [line for line, short in is_short.items() if short]


class CallersProcess:
    """Some of the callers, in a process of their own."""

    def __init__(self, address: str, number: int, *, rate: float) -> None:
        cold_each = _COLD // _PROCESSES
        cold = _HOT + number * cold_each
        options = {
            "--address": address,
            "--name": f"{number}-{time.time_ns()}",
            "--callers": str(_CALLERS // _PROCESSES),
            "--rate": str(rate / _PROCESSES),
            "--hot": f"0:{_HOT}",
            "--cold": f"{cold}:{cold + cold_each}",
        }
        self._argv = [word for option in options.items() for word in option]
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        argv = ["-m", "scripts.bench.mixed_callers", *self._argv]
        limit = 2**26
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *argv, stdin=PIPE, stdout=PIPE, cwd=_ROOT, limit=limit
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def play(self, order: Round) -> bytes:
        """Have them play one round: what they played, as they wrote it, since to read it would hold up the watcher."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the callers were started without pipes")
        self._process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the callers' process ended")
        return line


class Stand:
    """A service with its pictures where they belong, and its callers."""

    def __init__(self, service: ServiceProcess, processes: Sequence[CallersProcess], find: bytes) -> None:
        self._service = service
        self._processes = processes
        self._find = find
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.http_port}", trust_env=False)

    async def play(self, order: Round) -> Turn:
        """One round."""
        before, began_s = await self._late(), time.monotonic()
        ran_s, waited_s = _schedule_s(self._service.pid)
        finding = asyncio.create_task(self._find_on()) if not order.hits_only else None
        with Watcher(self._service.http_port, self._service.pid) as watcher:
            lines = await asyncio.gather(*(each.play(order) for each in self._processes))
        found = await _ended(finding)
        took_s = time.monotonic() - began_s
        ran_after_s, waited_after_s = _schedule_s(self._service.pid)
        after = await self._late()
        late = {bound: after[bound] - before[bound] for bound in after}
        played, probes = added([Played(**json.loads(line)) for line in lines]), watcher.probes
        return Turn(
            hits_only=order.hits_only,
            hit_p50_ms=percentile(played.hit_ms, 50),
            hit_p99_ms=percentile(played.hit_ms, 99),
            hits=len(played.hit_ms),
            cold_p99_ms=percentile(played.cold_ms, 99),
            cold=len(played.cold_ms),
            misses=len(played.miss_ms),
            find_ms=[took_s * 1e3 for _, took_s in found],
            loop_late=_apart(late),
            watched_p99_ms=percentile((probe.ms for probe in probes), 99),
            watched_longest_ms=max((probe.ms for probe in probes), default=math.nan),
            watched_own_ms=max((probe.own_ms for probe in probes), default=math.nan),
            watched_ran_ms=max((probe.ran_ms for probe in probes), default=math.nan),
            find_own_ms=max(
                (
                    probe.own_ms
                    for probe in probes
                    if any(sent_s <= probe.at_s <= sent_s + took_s for sent_s, took_s in found)
                ),
                default=math.nan,
            ),
            callers_lag_p99_ms=percentile(played.lag_ms, 99),
            sent_late_p99_ms=percentile(played.late_ms, 99),
            service_cores=(ran_after_s - ran_s) / took_s,
            service_without_core=(waited_after_s - waited_s) / took_s,
            elsewhere=played.elsewhere,
            failed=played.failed,
        )

    async def _late(self) -> dict[str, int]:
        """The buckets of the service's metric."""
        text = (await self._http.get("/metrics", timeout=None)).text
        return {bound: int(float(count)) for bound, count in _BUCKET.findall(text)}

    async def _find_on(self) -> list[tuple[float, float]]:
        """Ask every now and then where 10,000 pictures are, until cancelled: when, and how long it took, in seconds."""
        took: list[tuple[float, float]] = []
        async with grpc.aio.insecure_channel(
            self._service.address, options=[("grpc.max_receive_message_length", -1)]
        ) as channel:
            find = channel.unary_unary("/promptcache.v1.PromptCacheService/FindCached")
            try:
                while True:
                    await asyncio.sleep(_FIND_EVERY_S)
                    sent_s = time.perf_counter()
                    await find(self._find, timeout=_FIND_TIMEOUT_S)
                    took.append((sent_s, time.perf_counter() - sent_s))
            except asyncio.CancelledError:
                return took

    async def aclose(self) -> None:
        """Close what reads the metric."""
        await self._http.aclose()


async def _ended(finding: asyncio.Task[list[tuple[float, float]]] | None) -> list[tuple[float, float]]:
    if finding is None:
        return []
    finding.cancel()
    return await finding


def _apart(cumulative: dict[str, int]) -> dict[str, int]:
    """What is in each bucket and not in the one before."""
    apart, before = {}, 0
    for bound, count in cumulative.items():
        apart[bound.replace("+Inf", "inf")] = count - before
        before = count
    return apart


def _schedule_s(pid: int) -> tuple[float, float]:
    """How long a process's first thread, whose is the event loop, has run, and was ready to and had no core."""
    ran, waited, _ = (Path("/proc") / str(pid) / "task" / str(pid) / "schedstat").read_text().split()
    return int(ran) / 1e9, int(waited) / 1e9


async def measure(*, rounds: int, seconds: float, rate: float, picture_bytes: int) -> Figures:
    """Fill the tiers, and play the rounds in pairs."""
    cores = Cores()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        (directory / "valkey").mkdir()
        valkey = ValkeyServer(directory / "valkey")
        stack.push_async_callback(asyncio.to_thread, valkey.kill)
        await asyncio.to_thread(valkey.start)
        config = ProviderConfig(keys=(KeyConfig(key=_KEY, group="org"),), min_picture_bytes=picture_bytes)
        provider = await stack.enter_async_context(ProviderProcess(config, directory))
        settings = _settings(valkey.url, provider.base_url, picture_bytes)
        service = await stack.enter_async_context(ServiceProcess(directory / "service", settings))
        cores.pin(service.pid)
        await _fill(service.address)
        await provider.set_latency(_KEY, Latency(mean_s=MISS_S))
        processes = [
            await stack.enter_async_context(CallersProcess(service.address, number, rate=rate))
            for number in range(_PROCESSES)
        ]
        stand = Stand(service, processes, _find_request())
        stack.push_async_callback(stand.aclose)
        figures = Figures()
        lead_s = MISS_S + 1  # until as many wait for the provider as will
        await stand.play(Round(seed=0, seconds=2, lead_s=0, hits_only=True))  # connects
        for number in range(1, rounds + 1):
            alone, mixed = [
                await stand.play(Round(seed=number, seconds=lead_s + seconds, lead_s=lead_s, hits_only=hits_only))
                for hits_only in (True, False)
            ]
            figures.pairs.append((alone, mixed))
            print(f"pair {number}: {alone.hit_p99_ms:.2f} and {mixed.hit_p99_ms:.2f} ms", file=sys.stderr, flush=True)
        return figures


def _settings(redis_url: str, provider_url: str, picture_bytes: int) -> str:
    return f"""
tiers = ["memory", "redis", "disk"]
[memory]
max_bytes = {_MEMORY_HOLDS * (picture_bytes + 5_000)}
max_entry_bytes = {2 * picture_bytes}
[redis]
url = "{redis_url}"
[disk]
fsync = false
[budget]
per_day_microusd = 1_000_000_000_000
[[upstreams]]
name = "x"
base_url = "{provider_url}"
api_key = "{_KEY}"
limit_group = "x"
[limit_groups.x]
images_per_minute = 100_000
concurrent = 1_000
"""


async def _fill(address: str) -> None:
    """Have every picture made, the hot ones last, and those read once more: so memory has them."""
    async with callers(address, 1) as [stub]:
        numbers = iter([*range(_HOT, _HOT + _COLD), *range(_HOT), *range(_HOT)])

        async def ask() -> None:
            for number in numbers:
                await stub.GetImage(pb.GetImageRequest(spec=pb.ImageSpec(prompt=prompt(number))), timeout=60)

        async with asyncio.TaskGroup() as group:
            for _ in range(_FILL_AT_A_TIME):
                group.create_task(ask())


def _find_request() -> bytes:
    """A third of what is looked for is in memory or Redis."""
    here = _HOT + _COLD
    texts = (prompt(n % here) if n % 3 == 0 else f"absent {n}" for n in range(_FOUND))
    items = [pb.FindItem(spec=pb.ImageSpec(prompt=text)) for text in texts]
    return pb.FindCachedRequest(items=items).SerializeToString()


def _row(turn: Turn) -> tuple[Any, ...]:
    return (
        "hits alone" if turn.hits_only else "all",
        f"{turn.hits:,}",
        f"{turn.hit_p50_ms:.2f}",
        f"{turn.hit_p99_ms:.2f}",
        f"{turn.cold:,}",
        f"{turn.cold_p99_ms:.1f}",
        f"{turn.misses:,}",
        f"{max(turn.find_ms, default=math.nan):.0f}",
        f"{turn.latest_s * 1e3:.0f}",
        f"{turn.watched_longest_ms:.1f}",
        f"{turn.watched_own_ms:.1f}",
        f"{turn.find_own_ms:.1f}",
        f"{turn.callers_lag_p99_ms:.1f}",
        f"{turn.service_cores:.2f}",
        f"{turn.service_without_core:.1%}",
    )


def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of rounds.")] = 3,
    seconds: Annotated[float, typer.Option(help="Of each round, beside what leads to it.")] = 20.0,
    rate: Annotated[float, typer.Option(help="Calls a second.")] = 400.0,
    picture_bytes: Annotated[int, typer.Option(help="Bytes of a picture, at least.")] = 100_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Hits beside Redis hits and misses, against hits alone."""
    figures = asyncio.run(measure(rounds=rounds, seconds=seconds, rate=rate, picture_bytes=picture_bytes))
    columns = ("asked for", "hits", "p50 ms", "p99 ms", "from Redis", "p99 ms", "new", "find ms", "loop late ms")
    further = ("watched ms", "its own", "in finds", "callers' lag p99 ms", "cores", "without a core")
    print_table(
        f"{_CALLERS} callers, {rate:.0f} calls/s, pictures of {picture_bytes:,} bytes",
        (*columns, *further),
        [_row(turn) for pair in figures.pairs for turn in pair],
    )
    print(f"A hit takes {figures.ratio:.2f} times as long in the 99th percentile.")
    shortfalls = figures.shortfalls()
    print_verdict(shortfalls)
    options = {"rate": rate, "seconds": seconds, "picture_bytes": picture_bytes, "callers": _CALLERS}
    write_json(
        json_file, "mixed_load", {**options, **asdict(figures), "ratio": figures.ratio, "shortfalls": shortfalls}
    )
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
