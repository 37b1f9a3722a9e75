"""Whether the figures of all replicas are what really happened, also when one of them is killed.

Two services share one Redis and nothing else; each has a directory as its last tier and a key of its own at an
emulated provider. Callers ask for what is cached in every tier, for what nobody has asked for, for the same new picture
all at once, and for what is refused. All but the callers are processes of their own.

Against what the callers were answered and what the provider billed:

    whole        the figures that either service gives are equal, and these, to the last request and micro-dollar;
                 minute by minute they add up to the same; while prices stand, a hit saves what was paid
    killed       one service is killed (SIGKILL) under load: its hits differ from what its callers saw by at most what
                 they saw in a second, and the bill lies in [settled, settled + unknown + open]; what is unknown and
                 open are no more calls than were in flight
    restarted    it is started again: the same, and no call is open any more

In flight counts every call of a caller that had not been answered 100 ms before the kill, so long may pass until what
has ended is told, but for those that a tier answered: they were no calls to the provider.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.timestamp_pb2 import Timestamp

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.load import Stub, callers
from scripts.bench.provider import KeyConfig, Latency, ProviderConfig, ProviderProcess
from scripts.bench.stand import ServiceProcess
from tests.servers import ValkeyServer

_REFUSED = "forbidden"
_NAMES = ("a", "b")
_POPULAR = 300
_PICTURE_BYTES = 20_000
_CALLERS = 12
"""Of each service."""
_DEADLINE_S = 120.0
_TOLD_S = 2.0
"""So long after the last answer everything is told."""
_UNTOLD_S = 0.1

Sums = Counter[str]
"""What there was of what: "hit memory", "miss", "saved" and the like."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call came to. Times are of the monotonic clock; `sums` is empty for a call that was cut off."""

    service: str
    begin_s: float
    end_s: float
    sums: Sums


@dataclass(frozen=True, slots=True)
class Told:
    """What GetStats says of all replicas."""

    sums: Sums
    settled: int
    spent: int
    unknown: int
    unknown_microusd: int
    open: int
    open_microusd: int

    @property
    def most_microusd(self) -> int:
        """What may have been paid at most."""
        return self.spent + self.unknown_microusd + self.open_microusd


@dataclass(slots=True)
class Result:
    """What the run showed, by its phases, and where that is not as it should be."""

    answered: dict[str, int] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    billed_microusd: int = 0
    spent_microusd: int = 0
    killed: dict[str, Any] = field(default_factory=dict)
    restarted: dict[str, Any] = field(default_factory=dict)
    shortfalls: list[str] = field(default_factory=list)


class Load:
    """The callers of both services, and what they were answered."""

    def __init__(self, stubs: dict[str, Stub], *, seed: int) -> None:
        self._stubs = stubs
        self._random = random.Random(seed)  # noqa: S311 - chooses prompts
        self._new = itertools.count(1)
        self._ended = False
        self.answers: list[Answer] = []

    async def run(self, seconds: float) -> None:
        """Ask for so long, and wait for the answers."""
        async with asyncio.TaskGroup() as group:
            self._ended = False
            for service in self._stubs:
                for _ in range(_CALLERS):
                    group.create_task(self._caller(service))
            await asyncio.sleep(seconds)
            self._ended = True

    async def _caller(self, service: str) -> None:
        while not self._ended:
            kind = self._random.random()
            if kind < 0.75:  # noqa: PLR2004 - a share; so are the next
                await self._ask(service, f"popular {int(self._random.paretovariate(0.6)) % _POPULAR}")
            elif kind < 0.85:  # noqa: PLR2004
                await self._ask(service, f"new {next(self._new)}")
            elif kind < 0.9:  # noqa: PLR2004
                prompt = f"together {next(self._new)}"
                await asyncio.gather(*(self._ask(service, prompt) for _ in range(4)))
            elif kind < 0.94:  # noqa: PLR2004
                await self._ask(service, f"{_REFUSED} {self._random.randrange(20)}")
            elif kind < 0.97:  # noqa: PLR2004
                await self._ask(service, f"unheard of {next(self._new)}", cache_policy="CACHE_POLICY_ONLY_IF_CACHED")
            else:
                await self._ask(service, "more than there may be", n=9)
            await asyncio.sleep(self._random.uniform(0.0, 0.05))

    async def _ask(self, service: str, prompt: str, **terms: Any) -> None:
        begin_s = time.monotonic()
        spec = pb.ImageSpec(prompt=prompt, quality="medium", size="1024x1024")
        try:
            response = await self._stubs[service].GetImage(pb.GetImageRequest(spec=spec, **terms), timeout=_DEADLINE_S)
            sums = _sums_of_images(response)
        except grpc.aio.AioRpcError as error:
            sums = _sums_of_failure(error)
        self.answers.append(Answer(service, begin_s, time.monotonic(), sums))
        if not sums:
            await asyncio.sleep(0.2)  # nobody answers

    @property
    def sums(self) -> Sums:
        """What was answered in all."""
        return sum((each.sums for each in self.answers), Sums())

    def hits_of(self, service: str, from_s: float, until_s: float) -> int:
        """How many hits a service answered in this time."""
        return sum(
            count
            for each in self.answers
            if each.service == service and from_s <= each.end_s < until_s
            for name, count in each.sums.items()
            if name.startswith("hit")
        )

    def in_flight(self, service: str, moment_s: float) -> int:
        """How many calls a service had not answered shortly before a moment, but for hits."""
        return sum(
            each.service == service
            and each.begin_s <= moment_s
            and each.end_s > moment_s - _UNTOLD_S
            and not any(name.startswith("hit") for name in each.sums)
            for each in self.answers
        )


def _sums_of_images(response: pb.GetImageResponse) -> Sums:
    sums = Sums()
    for image, status in zip(response.images, response.image_status, strict=True):
        tier = pb.Tier.Name(status.tier).removeprefix("TIER_").lower()
        kind = f"hit {tier}" if status.tier != pb.TIER_UPSTREAM else "collapsed" if status.collapsed else "miss"
        sums[kind] += 1
        sums["requests"] += 1
        sums["saved"] += status.saved_microusd
        sums["would cost"] += status.saved_microusd + status.cost_microusd
        sums["mispriced"] += image.paid_microusd not in {status.saved_microusd, status.cost_microusd}
    return sums


def _sums_of_failure(error: grpc.aio.AioRpcError) -> Sums:
    match error.code():
        case grpc.StatusCode.NOT_FOUND:
            return Sums({"not cached": 1, "requests": 1})
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return Sums()
        case _:
            return Sums({"failed": 1, "requests": 1})


async def ask_stats(stub: Stub, *, span: pb.StatsSpan | None = None) -> Told:
    """What a service says of all replicas, of all time."""
    request = pb.GetStatsRequest(since=Timestamp(seconds=1), span=span)
    response = await stub.GetStats(request, timeout=_DEADLINE_S)
    sums = Sums()
    for row in response.rows:
        sums[_kind_of_row(row)] += row.requests
        sums["requests"] += row.requests
        sums["saved"] += row.saved_microusd
        sums["would cost"] += row.would_cost_microusd
    total = response.total
    return Told(
        Sums({name: count for name, count in sums.items() if count}),
        settled=total.settled_calls,
        spent=total.spent_microusd,
        unknown=total.unknown_calls,
        unknown_microusd=total.unknown_microusd,
        open=total.open_calls,
        open_microusd=total.open_microusd,
    )


def _kind_of_row(row: pb.StatsRow) -> str:
    name = pb.Outcome.Name(row.outcome).removeprefix("OUTCOME_").lower().replace("_", " ")
    if row.outcome == pb.OUTCOME_HIT:
        return f"hit {pb.Tier.Name(row.tier).removeprefix('TIER_').lower()}"
    return "failed" if row.outcome in (pb.OUTCOME_ERROR, pb.OUTCOME_NEGATIVE) else name


@dataclass(slots=True)
class Stand:
    """What runs."""

    provider: ProviderProcess
    services: dict[str, ServiceProcess]
    stubs: dict[str, Stub]

    async def billed_microusd(self) -> int:
        """What the provider has billed, once nothing runs any more."""
        async with asyncio.timeout(_DEADLINE_S):
            while (await self.provider.state())["running"]:  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.1)
        return (await self.provider.summary()).billed_microusd


def _config(name: str, *, provider_url: str, redis_url: str) -> str:
    """A service that keeps little in memory, and in Redis for some seconds: so every tier has its hits."""
    return "\n".join(
        [
            'tiers = ["memory", "redis", "disk"]',
            f"[memory]\nmax_bytes = {60 * _PICTURE_BYTES}",
            f'[redis]\nurl = "{redis_url}"\nttl_s = 5',
            "[disk]\nfsync = false",
            "[namespaces.default]\nmax_variants = 4",
            f'[[upstreams]]\nname = "{name}"\nbase_url = "{provider_url}"\napi_key = "sk-{name}"',
        ]
    )


async def _set_up(directory: Path, stack: AsyncExitStack, *, latency_s: float, seed: int) -> Stand:
    for name in ("valkey", "provider"):
        (directory / name).mkdir()
    valkey = ValkeyServer(directory / "valkey")
    stack.push_async_callback(asyncio.to_thread, valkey.kill)
    await asyncio.to_thread(valkey.start)
    config = ProviderConfig(
        keys=tuple(KeyConfig(key=f"sk-{name}", group=f"org-{name}") for name in _NAMES),
        latency=Latency(spread="uniform", mean_s=latency_s),
        min_picture_bytes=_PICTURE_BYTES,
        refusal_marker=_REFUSED,
        seed=seed,
    )
    provider = await stack.enter_async_context(ProviderProcess(config, directory / "provider"))
    services, stubs = {}, {}
    for name in _NAMES:
        text = _config(name, provider_url=provider.base_url, redis_url=valkey.url)
        services[name] = await stack.enter_async_context(ServiceProcess(directory / name, text))
        [stubs[name]] = await stack.enter_async_context(callers(services[name].address, 1))
    return Stand(provider, services, stubs)


async def measure(*, seconds: float, kill_after_s: float, latency_s: float, seed: int) -> Result:
    """One run."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        stand = await _set_up(directory, stack, latency_s=latency_s, seed=seed)
        load, result = Load(stand.stubs, seed=seed), Result()
        print("counting …", file=sys.stderr, flush=True)
        await load.run(seconds)
        await asyncio.sleep(_TOLD_S)
        await _compare_whole(stand, load, result)
        print("killing …", file=sys.stderr, flush=True)
        killed_s = await _kill_under_load(stand, load, kill_after_s)
        result.killed = await _compare_killed(stand, load, killed_s, result, "killed")
        print("starting again …", file=sys.stderr, flush=True)
        await stand.services[_NAMES[0]].start()
        result.restarted = await _compare_killed(stand, load, killed_s, result, "restarted")
        if still_open := result.restarted["open_calls"]:
            result.shortfalls.append(f"restarted: {still_open} calls are open though nothing runs")
        return result


async def _compare_whole(stand: Stand, load: Load, result: Result) -> None:
    told = [await ask_stats(stub) for stub in stand.stubs.values()]
    told.append(await ask_stats(stand.stubs[_NAMES[0]], span=pb.STATS_SPAN_MINUTE))
    billed = await stand.billed_microusd()
    answered = Sums({name: count for name, count in load.sums.items() if count})
    result.answered, result.told = dict(answered), dict(told[0].sums)
    result.billed_microusd, result.spent_microusd = billed, told[0].spent
    for each, whose in zip(told, (*_NAMES, "minutes"), strict=True):
        for name in sorted({*answered, *each.sums}):
            if answered[name] != each.sums[name]:
                result.shortfalls.append(f"whole: {name}: answered {answered[name]:,}, {whose} {each.sums[name]:,}")
        if each.spent != billed or each.unknown or each.open:
            result.shortfalls.append(f"whole: billed {billed:,}, {whose} {each}")
    wanted = {"hit memory", "hit redis", "hit disk", "miss", "collapsed", "failed", "not cached"}
    if lacking := wanted - answered.keys():
        result.shortfalls.append(f"whole: the load had none of {', '.join(sorted(lacking))}")


async def _kill_under_load(stand: Stand, load: Load, seconds: float) -> float:
    """Kill the first service in the middle of a load; returns when."""
    running = asyncio.create_task(load.run(seconds + 3))
    await asyncio.sleep(seconds)
    killed_s = time.monotonic()
    await stand.services[_NAMES[0]].kill()
    await running
    await asyncio.sleep(_TOLD_S)
    return killed_s


async def _compare_killed(stand: Stand, load: Load, killed_s: float, result: Result, phase: str) -> dict[str, Any]:
    told = await ask_stats(stand.stubs[_NAMES[1]])
    billed = await stand.billed_microusd()
    hits_told = sum(count for name, count in told.sums.items() if name.startswith("hit"))
    hits_seen = sum(count for name, count in load.sums.items() if name.startswith("hit"))
    second = load.hits_of(_NAMES[0], killed_s - 1, killed_s + 1)
    in_flight = load.in_flight(_NAMES[0], killed_s)
    if abs(hits_told - hits_seen) > second:
        result.shortfalls.append(f"{phase}: {hits_told:,} hits told, {hits_seen:,} seen, {second} in a second")
    if not told.spent <= billed <= told.most_microusd:
        result.shortfalls.append(f"{phase}: billed {billed:,}, but [{told.spent:,}, {told.most_microusd:,}] told")
    if told.unknown + told.open > in_flight:
        result.shortfalls.append(f"{phase}: {told.unknown + told.open} unknown and open, {in_flight} in flight")
    return {
        "hits_seen": hits_seen,
        "hits_told": hits_told,
        "hits_in_a_second": second,
        "billed_microusd": billed,
        "settled_microusd": told.spent,
        "most_microusd": told.most_microusd,
        "unknown_calls": told.unknown,
        "open_calls": told.open,
        "in_flight": in_flight,
    }


def _print(result: Result, seconds: float) -> None:
    names = sorted({*result.answered, *result.told})
    rows = [(name, f"{result.answered.get(name, 0):,}", f"{result.told.get(name, 0):,}") for name in names]
    rows.append(("billed and spent", f"{result.billed_microusd:,}", f"{result.spent_microusd:,}"))
    print_table(f"{seconds:g} s of load on two services", ("what", "seen", "told"), rows)
    facts = [*result.killed]
    print_table(
        "One of them killed under load, and started again",
        ("what", "killed", "restarted"),
        [(name.replace("_", " "), f"{result.killed[name]:,}", f"{result.restarted[name]:,}") for name in facts],
    )


def main(
    *,
    seconds: Annotated[float, typer.Option(help="Seconds of load that is counted to the last request.")] = 60.0,
    kill_after: Annotated[float, typer.Option(help="Seconds of load before the kill.")] = 10.0,
    latency: Annotated[float, typer.Option(help="Seconds a generation takes on average.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the load and the provider.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """The figures of all replicas against what happened."""
    result = asyncio.run(measure(seconds=seconds, kill_after_s=kill_after, latency_s=latency, seed=seed))
    _print(result, seconds)
    print_verdict(result.shortfalls)
    options = {"seconds": seconds, "kill_after_s": kill_after, "latency_s": latency, "seed": seed}
    write_json(json, "accounting", {**options, **asdict(result)})
    raise typer.Exit(bool(result.shortfalls))


if __name__ == "__main__":
    typer.run(main)
