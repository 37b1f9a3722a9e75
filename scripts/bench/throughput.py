"""How much of a provider's limits the miss path uses, and how often it is told that it asks too much.

Measured, against an emulated provider that answers in 20 s on average: callers who each ask for one new picture after
another, somewhat more of them than the provider can serve, so that the queue neither runs dry nor overflows. What is
served, taken and refused is what the provider counts: a picture that was served counts when its call was admitted,
as that is what limits are about; how many were sent out in the same time is told as well.

Against, after a learning minute:

    pool          100 deployments of 50 images/min: 97 % of the sum is served, and no call is answered 429
    one           one deployment: 48 images/min are served, and no call is answered 429
    replicas      as pool, with two services that share one Redis and nothing else
    organisation  10 keys share 1,000 images/min with foreign traffic of 30 %, and the limit is halved in the middle:
                  95 % of what the foreign traffic left is served, and at most 1 % of the calls are answered 429
    unannounced   the same, and no answer says what the limits are

No call may fail. Services, callers, provider and Valkey are processes of their own. The last tier is a directory that
does not wait for the device: an S3 server on the same machine would take more of it than the service does, and be what
is measured. For the same reason the pictures are small. As many may run and wait as the rates need: `concurrent` and
`queue_max` are raised where their defaults are less. A deployment begins with a full bucket, as a fresh one does;
the organisation's is emptied first, since what it holds would count as served beyond the limit.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import typer

from scripts.bench.closed_loop import Asked
from scripts.bench.figures import BusyCores, percentile, print_table, print_verdict, write_json
from scripts.bench.provider import Call, KeyConfig, Latency, LimitsConfig, ProviderConfig, ProviderProcess
from scripts.bench.stand import CallersProcess, ServiceProcess, children_cpu_s
from tests.servers import ValkeyServer

Enforced = Literal["bucket", "quantised"]

_MINUTE_S = 60.0
_MORE_CALLERS = 1.3
"""So many times what the provider has in work."""
_EXTRA_CALLERS = 20
"""Beside these, for small limits."""
_DEPTH_EVERY_S = 5.0
_ORGANISATION = "organisation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One provider, and what must be used of it.

    Args:
        name: what it is called.
        keys: how many deployments or keys there are.
        images_per_minute: the limit of each, or of the organisation.
        is_shared: whether it is the organisation's: the keys share it, with others, and it is halved in the middle.
        foreign_share: share of the limit that others ask for.
        tells_limits: whether the provider's answers do.
        replicas: how many services there are.
        least_share: of what is left to us, so much must be served.
        most_limited: so large a share of our calls may be answered 429.
    """

    name: str
    keys: int = 100
    images_per_minute: int = 50
    is_shared: bool = False
    foreign_share: float = 0.0
    tells_limits: bool = True
    replicas: int = 1
    least_share: float = 0.97
    most_limited: float = 0.0

    @property
    def summed_per_minute(self) -> float:
        """Images a minute of all limits together."""
        return self.images_per_minute * (1 if self.is_shared else self.keys)

    def callers(self, latency_s: float) -> int:
        """How many must ask at a time."""
        return round(self.summed_per_minute / _MINUTE_S * latency_s * _MORE_CALLERS) + _EXTRA_CALLERS

    def provider(self, *, enforced: Enforced, latency_s: float) -> ProviderConfig:
        """The emulator's configuration."""
        limits = LimitsConfig(
            images_per_minute=self.images_per_minute, enforced=enforced, foreign_share=self.foreign_share
        )
        keys = [
            KeyConfig(
                key=f"sk-{name}",
                group=_ORGANISATION if self.is_shared else f"org-{name}",
                limits=LimitsConfig() if self.is_shared else limits,
            )
            for name in self._names()
        ]
        return ProviderConfig(
            keys=tuple(keys),
            groups={_ORGANISATION: limits} if self.is_shared else {},
            latency=Latency(spread="lognormal", mean_s=latency_s),
            rate_limit_headers=self.tells_limits,
        )

    def service(self, *, provider_url: str, redis_url: str) -> str:
        """The service's configuration."""
        groups = [_ORGANISATION] if self.is_shared else self._names()
        # More than may run at a time by the rate alone: places are not what is measured.
        concurrent = max(100, self.images_per_minute)
        return "\n".join(
            [
                'tiers = ["memory", "redis", "disk"]',
                "[disk]\nfsync = false",
                f'[redis]\nurl = "{redis_url}"',
                "[generation]\nqueue_max = 10_000",
                "[budget]\nper_day_microusd = 1_000_000_000_000",
                *(
                    f'[[upstreams]]\nname = "{name}"\nbase_url = "{provider_url}"\napi_key = "sk-{name}"\n'
                    f'limit_group = "{_ORGANISATION if self.is_shared else name}"'
                    for name in self._names()
                ),
                *(
                    f"[limit_groups.{name}]\nimages_per_minute = {self.images_per_minute}\nconcurrent = {concurrent}"
                    for name in groups
                ),
            ]
        )

    def _names(self) -> list[str]:
        return [f"d{number:03d}" for number in range(1, self.keys + 1)]


_SHARED = Scenario(
    name="organisation",
    keys=10,
    images_per_minute=1_000,
    is_shared=True,
    foreign_share=0.3,
    least_share=0.95,
    most_limited=0.01,
)

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(name="pool"),
        Scenario(name="one", keys=1, least_share=0.96),
        Scenario(name="replicas", replicas=2),
        _SHARED,
        Scenario(**{**asdict(_SHARED), "name": "unannounced", "tells_limits": False}),
    )
}


@dataclass(frozen=True, slots=True)
class Part:
    """Measured time in which the limits stood. Emulated seconds; `foreign` is what others took of them in it."""

    from_s: float
    until_s: float
    limit_per_minute: float
    foreign: float

    @property
    def left(self) -> float:
        """Images that were left to us."""
        return self.limit_per_minute * (self.until_s - self.from_s) / _MINUTE_S - self.foreign

    def has(self, moment_s: float | None) -> bool:
        """Whether it was in this part."""
        return moment_s is not None and self.from_s <= moment_s < self.until_s


@dataclass(frozen=True, slots=True)
class PartFigures:
    """What was made of one part: images left to us and served, our calls, and those of them answered 429.

    `served` are those whose calls were admitted in it, `sent_out` those whose answers went out in it.
    """

    minutes: float
    limit_per_minute: float
    foreign: float
    left: float
    served: int
    sent_out: int
    calls: int
    limited: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What one scenario showed. `share` is what was served of what was left; latencies are the callers', in seconds."""

    scenario: str
    parts: list[PartFigures]
    share: float
    least_share: float
    calls: int
    limited: int
    most_limited: float
    served_per_minute: list[int]
    """From the first call on, the learning minute included; so are the next."""
    limited_per_minute: list[int]
    asked: int
    failed: dict[str, int]
    """Failed calls of the callers by their status code."""
    p50_s: float
    p99_s: float
    depth_least: int
    """Generations that waited in the service where fewest did."""
    depth_median: float
    depth_most: int
    cores: dict[str, float]
    """Cores each process kept busy in the measured time."""
    cores_of_machine: float

    def shortfalls(self) -> list[str]:
        """What is not as it should be, one line each."""
        is_short = {
            f"{self.share:.1%} of what was left was served, not {self.least_share:.0%}": (
                not self.share >= self.least_share  # so that none at all falls short, too
            ),
            f"{self.limited} of {self.calls:,} calls were answered 429": self.limited > self.most_limited * self.calls,
            f"calls failed: {self.failed}": bool(self.failed),
            "a queue ran dry": self.depth_least == 0,
        }
        return [f"{self.scenario}: {line}" for line, short in is_short.items() if short]


@dataclass(slots=True)
class Run:
    """One scenario as it went. `start_s` is emulated, `measured_s` by the monotonic clock: from when until when."""

    start_s: float = 0.0
    measured_s: tuple[float, float] = (0.0, 0.0)
    parts: list[Part] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    depths: list[list[int]] = field(default_factory=list)
    """Of each service, while measured."""
    cores: dict[str, float] = field(default_factory=dict)
    cores_of_machine: float = 0.0

    def figures(self, scenario: Scenario) -> Figures:
        """What it shows."""
        parts = [self._part(part) for part in self.parts]
        from_s, until_s = self.measured_s
        took_s = [each.end_s - each.start_s for each in self.asked if from_s <= each.end_s < until_s]
        depths = [depth for of_one in self.depths for depth in of_one]
        return Figures(
            scenario=scenario.name,
            parts=parts,
            share=sum(part.served for part in parts) / sum(part.left for part in parts),
            least_share=scenario.least_share,
            calls=sum(part.calls for part in parts),
            limited=sum(part.limited for part in parts),
            most_limited=scenario.most_limited,
            served_per_minute=self._by_minute([(call.started_s, call.images) for call in self.calls]),
            limited_per_minute=self._by_minute([(call.at_s, call.limited) for call in self.calls]),
            asked=len(self.asked),
            failed=dict(Counter(each.failure for each in self.asked if each.failure)),
            p50_s=percentile(took_s, 50),
            p99_s=percentile(took_s, 99),
            depth_least=min(depths, default=0),
            depth_median=percentile(depths, 50),
            depth_most=max(depths, default=0),
            cores=self.cores,
            cores_of_machine=self.cores_of_machine,
        )

    def _part(self, part: Part) -> PartFigures:
        asked = [call for call in self.calls if part.has(call.at_s)]
        return PartFigures(
            minutes=(part.until_s - part.from_s) / _MINUTE_S,
            limit_per_minute=part.limit_per_minute,
            foreign=part.foreign,
            left=part.left,
            served=sum(call.images for call in self.calls if part.has(call.started_s)),
            sent_out=sum(call.images for call in self.calls if part.has(call.ended_s)),
            calls=len(asked),
            limited=sum(call.limited for call in asked),
        )

    def _by_minute(self, amounts: Sequence[tuple[float | None, int]]) -> list[int]:
        """Sums by minute until the measured time ends."""
        sums: Counter[int] = Counter()
        for moment_s, amount in amounts:
            if moment_s is not None and self.start_s <= moment_s < self.parts[-1].until_s:
                sums[int((moment_s - self.start_s) // _MINUTE_S)] += amount
        return [sums[minute] for minute in range(max(sums, default=-1) + 1)]


class Stand:
    """Provider, Valkey, services and callers of one scenario."""

    def __init__(self, scenario: Scenario, provider: ProviderProcess) -> None:
        self.scenario = scenario
        self.provider = provider
        self.services: list[ServiceProcess] = []
        self.callers: list[CallersProcess] = []

    async def empty_bucket(self) -> None:
        """Take what the organisation's limit has saved up."""
        for per_minute in (1, self.scenario.images_per_minute):
            await self.provider.set_limit(_ORGANISATION, "images", per_minute)

    async def halve(self) -> None:
        """Halve the organisation's limit."""
        await self.provider.set_limit(_ORGANISATION, "images", self.scenario.images_per_minute / 2)

    async def now_and_foreign(self) -> tuple[float, float]:
        """Emulated time, and the images that others have taken until now."""
        state = await self.provider.state()
        taken = sum(by_kind.get("images", 0.0) for by_kind in state["foreign_taken"].values())
        return state["now_s"], taken

    async def part(self, seconds: float, limit_per_minute: float) -> Part:
        """Let so much time pass."""
        from_s, taken_before = await self.now_and_foreign()
        await asyncio.sleep(seconds)
        until_s, taken = await self.now_and_foreign()
        return Part(from_s, until_s, limit_per_minute, taken - taken_before)


async def measure(
    scenario: Scenario, *, learning_s: float, measured_s: float, enforced: Enforced, latency_s: float
) -> Figures:
    """Run one scenario."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        stand = await _set_up(scenario, directory, stack, enforced=enforced, latency_s=latency_s)
        run = Run(start_s=stand.provider.now_s)
        await asyncio.sleep(learning_s)
        watching = asyncio.create_task(_watch_depths(stand.services))
        busy, work_s, began_s = BusyCores(), children_cpu_s(), time.monotonic()
        if scenario.is_shared:
            run.parts.append(await stand.part(measured_s / 2, scenario.summed_per_minute))
            await stand.halve()
            run.parts.append(await stand.part(measured_s / 2, scenario.summed_per_minute / 2))
        else:
            run.parts.append(await stand.part(measured_s, scenario.summed_per_minute))
        run.measured_s = began_s, time.monotonic()
        run.cores = _cores(work_s, children_cpu_s(), time.monotonic() - began_s)
        run.cores_of_machine = busy.read()
        watching.cancel()
        run.depths = await watching
        run.asked = [*chain.from_iterable(await asyncio.gather(*(each.finish() for each in stand.callers)))]
        run.calls = await stand.provider.calls()
        return run.figures(scenario)


async def _set_up(
    scenario: Scenario, directory: Path, stack: AsyncExitStack, *, enforced: Enforced, latency_s: float
) -> Stand:
    """Everything running, and the callers beginning to ask."""
    for name in ("valkey", "provider"):
        (directory / name).mkdir()
    valkey = ValkeyServer(directory / "valkey")
    stack.push_async_callback(asyncio.to_thread, valkey.kill)
    await asyncio.to_thread(valkey.start)
    config = scenario.provider(enforced=enforced, latency_s=latency_s)
    stand = Stand(scenario, await stack.enter_async_context(ProviderProcess(config, directory / "provider")))
    text = scenario.service(provider_url=stand.provider.base_url, redis_url=valkey.url)
    for number in range(1, scenario.replicas + 1):
        service = ServiceProcess(directory / f"service-{number}", text)
        stand.services.append(await stack.enter_async_context(service))
    if scenario.is_shared:
        await stand.empty_bucket()
    for number, service in enumerate(stand.services, start=1):
        count = scenario.callers(latency_s) // scenario.replicas
        callers = CallersProcess(service.address, count=count, name=str(number), directory=directory)
        stand.callers.append(await stack.enter_async_context(callers))
    return stand


async def _watch_depths(services: Sequence[ServiceProcess]) -> list[list[int]]:
    """The depth of each service's queue, every few seconds until this is cancelled."""
    depths: list[list[int]] = [[] for _ in services]
    try:
        while True:
            for service, seen in zip(services, depths, strict=True):
                seen.append(await service.queue_depth())
            await asyncio.sleep(_DEPTH_EVERY_S)
    except asyncio.CancelledError:
        return depths


def _cores(before_s: Mapping[str, float], after_s: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {name: (work_s - before_s.get(name, 0.0)) / seconds for name, work_s in after_s.items()}


def main(  # noqa: PLR0913 - one parameter per option
    *,
    scenario: Annotated[
        list[str] | None, typer.Option(help=f"Only this one; repeatable. {', '.join(SCENARIOS)}.")
    ] = None,
    learning: Annotated[float, typer.Option(help="Seconds that are not measured.")] = 60.0,
    measured: Annotated[float, typer.Option(help="Seconds that are.")] = 300.0,
    latency: Annotated[float, typer.Option(help="Seconds a generation takes on average.")] = 20.0,
    quantised: Annotated[
        bool, typer.Option("--quantised", help="The provider enforces the minute by seconds.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Use of a provider's limits, and calls beyond them."""
    if unknown := set(scenario or ()) - SCENARIOS.keys():
        raise typer.BadParameter(f"no such scenario: {', '.join(unknown)}", param_hint="--scenario")
    enforced: Enforced = "quantised" if quantised else "bucket"
    results = []
    for name in scenario or SCENARIOS:
        print(f"{name} …", file=sys.stderr, flush=True)
        measuring = measure(
            SCENARIOS[name], learning_s=learning, measured_s=measured, enforced=enforced, latency_s=latency
        )
        results.append(asyncio.run(measuring))
    shortfalls = [line for result in results for line in result.shortfalls()]
    _print(results, f"limits enforced as {enforced}, {latency:g} s mean latency, {learning:g} s to learn")
    print_verdict(shortfalls)
    options = {"learning_s": learning, "measured_s": measured, "latency_s": latency, "enforced": enforced}
    rows = [asdict(result) for result in results]
    write_json(json, "throughput", {**options, "scenarios": rows, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


def _print(results: Sequence[Figures], conditions: str) -> None:
    print_table(
        f"Served, in images a minute: {conditions}",
        (
            "scenario",
            "minutes",
            "limit",
            "foreign",
            "left",
            "served",
            "sent out",
            "share",
            "due",
            "calls",
            "429",
            "most",
        ),
        [row for each in results for row in _part_rows(each)],
    )
    print_table(
        "By minute, from the first call on",
        ("scenario", "served", "429"),
        [
            (each.scenario, " ".join(map(str, each.served_per_minute)), " ".join(map(str, each.limited_per_minute)))
            for each in results
        ],
    )
    print_table(
        "What the callers saw, how many generations waited, and cores in use",
        ("scenario", "asked", "failed", "p50", "p99", "waited least", "median", "most", "machine", "of these"),
        [
            (
                each.scenario,
                f"{each.asked:,}",
                str(sum(each.failed.values())),
                f"{each.p50_s:.1f} s",
                f"{each.p99_s:.1f} s",
                f"{each.depth_least:,}",
                f"{each.depth_median:,.0f}",
                f"{each.depth_most:,}",
                f"{each.cores_of_machine:.2f}",
                ", ".join(f"{name} {cores:.2f}" for name, cores in each.cores.items()),
            )
            for each in results
        ],
    )


def _part_rows(result: Figures) -> list[tuple[str, ...]]:
    """A row for each part, and where there are several one for all of them."""
    rows: list[tuple[str, ...]] = [
        (
            result.scenario,
            f"{part.minutes:.2f}",
            f"{part.limit_per_minute:,.0f}",
            f"{part.foreign / part.minutes:,.1f}",
            f"{part.left / part.minutes:,.1f}",
            f"{part.served / part.minutes:,.1f}",
            f"{part.sent_out / part.minutes:,.1f}",
            f"{part.served / part.left:.1%}",
            f"{result.least_share:.0%}",
            f"{part.calls:,}",
            str(part.limited),
            f"{result.most_limited:.0%}",
        )
        for part in result.parts
    ]
    if len(rows) > 1:
        together = ("together", *[""] * 6, f"{result.share:.1%}", f"{result.least_share:.0%}")
        rows.append((*together, f"{result.calls:,}", str(result.limited), f"{result.most_limited:.0%}"))
    return rows


if __name__ == "__main__":
    typer.run(main)
