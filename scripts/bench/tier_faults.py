"""How long hits take while a tier is broken.

Measured: callers read at a fixed pace from a working set ten times what memory holds, before, through and after a
fault of Redis or S3. Every picture is in Redis and in S3, but for some that only S3 has. A read's latency counts
from when it was due, so a service that stalls cannot hide it.

Against: the same callers, pictures and processes in the seconds before the fault. The 99th percentile may rise by
less than 100 ms once the breaker has opened (or, where the tier answers and no breaker opens, from the fault on).
No read may fail or bring wrong bytes, at least half must reach below memory, and only what the dead tier alone
held may be paid for again.

Reads that made, or waited for, a new picture are not hits: they are checked and counted, and not in the latencies.
Needs `scripts/venv embedded local-s3 report dev`.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated

import typer

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.figures import BusyCores, percentile, print_table, print_verdict, write_json
from scripts.bench.load import Read
from scripts.bench.rig import Rig, Scale, open_rig
from tests.test_faults import failing_s3

ADDED_P99_LIMIT_MS = 100.0
BELOW_MEMORY_LIMIT = 0.5

ONLY_IN_S3 = 20
"""The first so many pictures are in S3 alone."""

_CALM_S = 0.5
"""From the fault on no picture of S3 alone is read for so long: the fault must have struck, or none were lost."""

_WARM_UP_S = 2.0
_OPEN_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break a tier, and what it may cost.

    Args:
        name: what it is.
        strike: breaks the tier.
        breaker: the tier whose breaker must open; empty if it goes on answering.
        under_load: whether it strikes while callers read; else they pause for it.
        by_road: whether S3 is reached through the proxy.
        pays: whether the pictures that only S3 had are paid for again.
        unknown: whether they count as paid for unknown: the tier could not say, rather than say that they are bad.
        damages: whether entries are damaged, and must be found to be.
    """

    name: str
    strike: Callable[[Rig, AsyncExitStack], Awaitable[None]]
    breaker: str = ""
    under_load: bool = True
    by_road: bool = False
    pays: bool = False
    unknown: bool = False
    damages: bool = False


async def _kill_redis(rig: Rig, _: AsyncExitStack) -> None:
    await asyncio.to_thread(rig.valkey.kill)


async def _freeze_redis(rig: Rig, _: AsyncExitStack) -> None:
    rig.valkey.stop()


async def _truncate_in_redis(rig: Rig, _: AsyncExitStack) -> None:
    half = rig.scale.picture_bytes // 2
    cut = f"redis.call('SET',name,string.sub(redis.call('GET',name),1,{half}))"
    await rig.redis(f"EVAL \"for _,name in ipairs(redis.call('KEYS','{rig.redis_names}')) do {cut} end\" 0")


async def _kill_s3(rig: Rig, _: AsyncExitStack) -> None:
    await asyncio.to_thread(rig.s3.kill)


async def _hang_s3(rig: Rig, stack: AsyncExitStack) -> None:
    stack.callback(rig.s3_road.resume)
    rig.s3_road.hang()


async def _fail_s3(rig: Rig, stack: AsyncExitStack) -> None:
    rig.s3_road.retarget("127.0.0.1", await stack.enter_async_context(failing_s3()))


async def _change_secret(rig: Rig, _: AsyncExitStack) -> None:
    await rig.start_service(s3__secret_key="not-the-secret")  # noqa: S106 - it is not
    await _warm_up(rig)


async def _flip_in_s3(rig: Rig, _: AsyncExitStack) -> None:
    def flip(name: str) -> None:
        stored = rig.s3.client.get_object(Bucket=rig.s3.bucket, Key=name)
        data = bytearray(stored["Body"].read())
        data[len(data) // 2] ^= 1
        rig.s3.client.put_object(
            Bucket=rig.s3.bucket,
            Key=name,
            Body=bytes(data),
            ContentType=stored["ContentType"],
            Metadata=stored["Metadata"],
        )

    for name in await rig.s3_objects(range(ONLY_IN_S3)):
        await asyncio.to_thread(flip, name)
    # With Redis empty all is read from S3, the intact and the damaged.
    await rig.redis("FLUSHALL")


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("redis killed", _kill_redis, breaker="redis"),
        Fault("redis frozen", _freeze_redis, breaker="redis"),
        Fault("redis truncated", _truncate_in_redis, under_load=False, damages=True),
        Fault("s3 killed", _kill_s3, breaker="s3", pays=True, unknown=True),
        Fault("s3 hanging", _hang_s3, breaker="s3", by_road=True, pays=True, unknown=True),
        Fault("s3 failing", _fail_s3, breaker="s3", by_road=True, pays=True, unknown=True),
        Fault("s3 credentials", _change_secret, breaker="s3", under_load=False, pays=True, unknown=True),
        Fault("s3 flipped", _flip_in_s3, under_load=False, pays=True, damages=True),
    )
}


@dataclass(frozen=True, slots=True)
class Figures:
    """What one fault did. Latencies are of hits, in ms; cores are busy ones of the whole machine."""

    fault: str
    reads: int
    failed: dict[str, int]
    """Failed reads by their status code."""
    wrong: int
    below_memory: float
    """Share of the reads that memory did not answer, 0 to 1."""
    paid: int
    paid_unknown: int
    expected_paid: int
    expected_paid_unknown: int
    damaged: int
    """Damaged entries that were found."""
    expects_damage: bool
    made: int
    """Reads that made, or waited for, a new picture."""
    made_max_ms: float
    p50_before_ms: float
    p99_before_ms: float
    open_after_ms: float
    p99_until_open_ms: float
    """Of what was read, or still waited, between the fault and the open breaker."""
    p50_after_ms: float
    p99_after_ms: float
    cores_before: float
    cores_after: float

    @property
    def added_p99_ms(self) -> float:
        """How much the fault added, once the breaker was open."""
        return self.p99_after_ms - self.p99_before_ms

    def shortfalls(self) -> list[str]:
        """What is not as it should be, one line each."""
        is_short = {
            f"reads failed: {self.failed}": bool(self.failed),
            f"{self.wrong} reads brought wrong bytes": self.wrong > 0,
            f"only {self.below_memory:.0%} of the reads reached below memory": self.below_memory < BELOW_MEMORY_LIMIT,
            f"{self.paid} pictures were paid for, not {self.expected_paid}": self.paid != self.expected_paid,
            f"paid_unknown is {self.paid_unknown}, not {self.expected_paid_unknown}": (
                self.paid_unknown != self.expected_paid_unknown
            ),
            f"{self.damaged} damaged entries were found": (self.damaged > 0) != self.expects_damage,
            # Not `>=`: without a breaker that opens there is no figure, which falls short as well.
            f"the p99 rose by {self.added_p99_ms:.0f} ms": not self.added_p99_ms < ADDED_P99_LIMIT_MS,
        }
        return [f"{self.fault}: {line}" for line, short in is_short.items() if short]


@dataclass(slots=True)
class Run:
    """One run as it went, by the event loop's time in seconds."""

    reads: list[Read] = field(default_factory=list)
    struck_s: float = math.nan
    opened_s: float = math.nan
    cores_before: float = math.nan
    cores_after: float = math.nan
    paid: int = 0
    stats: pb.GetStatsResponse = field(default_factory=pb.GetStatsResponse)

    def figures(self, fault: Fault) -> Figures:
        """What it shows."""
        hits = [read for read in self.reads if read.is_hit]
        before = [read.ms for read in hits if read.end_s < self.struck_s]
        until_open = [read.ms for read in hits if read.end_s >= self.struck_s and read.due_s < self.opened_s]
        after = [read.ms for read in hits if read.due_s >= self.opened_s]
        made = [read.ms for read in self.reads if read.tier == pb.TIER_UPSTREAM]
        lost = ONLY_IN_S3 if fault.pays else 0
        return Figures(
            fault=fault.name,
            reads=len(self.reads),
            failed=dict(Counter(read.failure for read in self.reads if read.failure)),
            wrong=sum(read.wrong for read in self.reads),
            below_memory=sum(read.tier > pb.TIER_MEMORY for read in self.reads) / len(self.reads),
            paid=self.paid,
            paid_unknown=self.stats.paid_unknown,
            expected_paid=lost,
            expected_paid_unknown=lost if fault.unknown else 0,
            damaged=sum(each.count for each in self.stats.corrupt),
            expects_damage=fault.damages,
            made=len(made),
            made_max_ms=max(made, default=math.nan),
            p50_before_ms=percentile(before, 50),
            p99_before_ms=percentile(before, 99),
            open_after_ms=(self.opened_s - self.struck_s) * 1e3 if fault.breaker else math.nan,
            p99_until_open_ms=percentile(until_open, 99) if fault.breaker else math.nan,
            p50_after_ms=percentile(after, 50),
            p99_after_ms=percentile(after, 99),
            cores_before=self.cores_before,
            cores_after=self.cores_after,
        )


def plan(scale: Scale, seconds: float, rng: Random, *, with_lost: bool) -> list[int]:
    """Which picture each read of so many seconds asks for: any at random, but none that only S3 has.

    `with_lost` those of S3 alone as well, each at least once, from half a second on.
    """
    elsewhere = range(ONLY_IN_S3, scale.pictures)
    count, calm = int(seconds * scale.rate), int(_CALM_S * scale.rate)
    if not with_lost:
        return rng.choices(elsewhere, k=count)
    later = rng.choices(range(scale.pictures), k=count - calm)
    for number, place in enumerate(rng.sample(range(len(later)), ONLY_IN_S3)):
        later[place] = number
    return rng.choices(elsewhere, k=calm) + later


async def measure(fault: Fault, scale: Scale, *, before_s: float, after_s: float) -> Figures:
    """Read through one fault, with servers and a service of its own."""
    rng = Random(fault.name)  # noqa: S311 - which picture to read
    async with open_rig(scale, by_road=fault.by_road) as rig, AsyncExitStack() as stack:
        await rig.forget_in_redis(range(ONLY_IN_S3))
        await _warm_up(rig)
        paid_before = rig.provider.calls
        before, after = plan(scale, before_s, rng, with_lost=False), plan(scale, after_s, rng, with_lost=True)
        run = Run()
        async with asyncio.TaskGroup() as group:
            if fault.under_load:
                reading = group.create_task(rig.read(before + after))
                busy = BusyCores()
                await asyncio.sleep(before_s)
                run.cores_before, run.struck_s = busy.read(), _now_s()
                await fault.strike(rig, stack)
            else:
                busy = BusyCores()
                run.reads = await rig.read(before)
                run.cores_before = busy.read()
                await fault.strike(rig, stack)
                run.struck_s = _now_s()
                reading = group.create_task(rig.read(after))
            run.opened_s = await _opened_s(fault, rig)
            busy = BusyCores()
            run.reads += await reading
            run.cores_after = busy.read()
        run.paid = rig.provider.calls - paid_before
        run.stats = await rig.stats()
        return run.figures(fault)


async def _warm_up(rig: Rig) -> None:
    """Read until caches and connections are as they will be, and memory has forgotten what only S3 has."""
    await rig.read(plan(rig.scale, _WARM_UP_S, Random(0), with_lost=False))  # noqa: S311 - which picture to read


async def _opened_s(fault: Fault, rig: Rig) -> float:
    """When the breaker was seen open; NaN if it stays closed, now if there is none to open."""
    if not fault.breaker:
        return _now_s()
    try:
        async with asyncio.timeout(_OPEN_TIMEOUT_S):
            return await rig.down_s(fault.breaker)
    except TimeoutError:
        return math.nan


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def main(  # noqa: PLR0913 - one parameter per option
    *,
    fault: Annotated[list[str] | None, typer.Option(help=f"Only this one; repeatable. {', '.join(FAULTS)}.")] = None,
    rate: Annotated[float, typer.Option(help="Reads a second, of all callers.")] = 200.0,
    clients: Annotated[int, typer.Option(help="Callers, each with a connection of its own.")] = 50,
    before: Annotated[float, typer.Option(help="Seconds to read before the fault.")] = 6.0,
    after: Annotated[float, typer.Option(help="Seconds to read from the fault on.")] = 8.0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Latency of hits while a tier is broken."""
    if unknown := set(fault or ()) - FAULTS.keys():
        raise typer.BadParameter(f"no such fault: {', '.join(unknown)}", param_hint="--fault")
    scale = Scale(rate=rate, clients=clients)
    results = []
    for name in fault or FAULTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        results.append(asyncio.run(measure(FAULTS[name], scale, before_s=before, after_s=after)))
    shortfalls = [line for result in results for line in result.shortfalls()]
    _print(results, scale)
    print_verdict(shortfalls)
    rows = [{**asdict(result), "added_p99_ms": result.added_p99_ms} for result in results]
    write_json(json, "tier_faults", {"scale": asdict(scale), "faults": rows, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


def _print(results: Sequence[Figures], scale: Scale) -> None:
    print_table(
        f"What {scale.clients} callers got: {scale.pictures} pictures, {scale.in_memory} fit in memory, "
        f"{ONLY_IN_S3} only in S3, {scale.rate:g} reads/s",
        (
            "fault",
            "reads",
            "failed",
            "wrong",
            "below memory",
            "paid (due)",
            "paid_unknown (due)",
            "damaged",
            "made, slowest",
        ),
        [
            (
                each.fault,
                f"{each.reads:,}",
                f"{sum(each.failed.values()):,}",
                str(each.wrong),
                f"{each.below_memory:.0%}",
                f"{each.paid} ({each.expected_paid})",
                f"{each.paid_unknown} ({each.expected_paid_unknown})",
                str(each.damaged),
                f"{each.made}, {_ms(each.made_max_ms)}",
            )
            for each in results
        ],
    )
    print_table(
        f"How long hits took, in ms; the p99 may rise by {ADDED_P99_LIMIT_MS:g}",
        (
            "fault",
            "p50 before",
            "p99 before",
            "open after",
            "p99 until open",
            "p50 after",
            "p99 after",
            "added p99",
            "cores before",
            "cores after",
        ),
        [
            (
                each.fault,
                _ms(each.p50_before_ms),
                _ms(each.p99_before_ms),
                _ms(each.open_after_ms),
                _ms(each.p99_until_open_ms),
                _ms(each.p50_after_ms),
                _ms(each.p99_after_ms),
                _ms(each.added_p99_ms),
                f"{each.cores_before:.2f}",
                f"{each.cores_after:.2f}",
            )
            for each in results
        ],
    )


def _ms(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


if __name__ == "__main__":
    typer.run(main)
