"""What callers notice of an upstream that dies, and how soon the others are used to the full.

Three provider emulators with a limit each, the service over them, and callers that ask for a new picture as soon as
they have one: enough of them that pictures always wait. All are processes of their own. One emulator is killed
(SIGKILL) and, half a minute later, started again on its port; while it is down its limit passes unused.

Measured: when the emulators admitted calls, by their own ledgers. The throughput at a moment is what they admitted in
the `WINDOW_S` from it on. It is back at the first moment at which it is `GOAL` of what the limits of the living allow
together, and from the latest moment at which it must be back it has to be so on average until the phase ends. A call
that runs when its emulator dies is in no ledger; so of the time before the kill only what lies well before it counts.

Against: no call of a caller fails; back within 5 s of the kill and 15 s of the return. These are real seconds, however
fast emulated time passes: `--compression 1` has the providers' own latencies and limits, more has more calls a second.

Needs `scripts/venv embedded dev`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import typer

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.figures import BusyCores, percentile, print_table, print_verdict, write_json
from scripts.bench.load import Stub, callers
from scripts.bench.provider import Latency, LimitsConfig, ProviderProcess
from tests.emulated import NAMES, emulator, in_its_own_process, told_in, upstream_tables
from tests.running import environment

GOAL = 0.97
SATURATED = 0.95
"""What must have been used before: less says of the machine, or of too few callers, what is to be said of the kill."""
BACK_AFTER_KILL_S = 5.0
BACK_AFTER_RETURN_S = 15.0
WINDOW_S = 10.0
"""Long enough that one call more or less is no matter."""

_STEP_S = 0.1
_CHANNELS = 20
_DEADLINE_S = 120.0
_LONGEST_LATENCIES = 4
"""In so many mean latencies practically every call has ended."""
_RAMP_UP_S = 5.0
"""So long after the start the unused allowance of the first moments is gone."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything. Latency and limit are emulated, the phases real seconds."""

    images_per_minute: int = 300
    latency_s: float = 20.0
    compression: float = 2.0
    callers: int = 450
    before_s: float = 60.0
    down_s: float = 30.0
    after_s: float = 40.0

    @property
    def per_s(self) -> float:
        """The calls a real second that one upstream admits."""
        return self.images_per_minute * self.compression / 60

    @property
    def longest_latency_s(self) -> float:
        """Real seconds in which practically every call ends."""
        return _LONGEST_LATENCIES * self.latency_s / self.compression


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call of a caller came to; times by the event loop, in seconds."""

    begin_s: float
    end_s: float
    failure: str = ""


@dataclass(slots=True)
class Run:
    """One run as it went, by the event loop's time in seconds."""

    scale: Scale
    began_s: float = math.nan
    killed_s: float = math.nan
    returned_s: float = math.nan
    stopped_s: float = math.nan
    answers: list[Answer] = field(default_factory=list)
    starts_s: dict[str, list[float]] = field(default_factory=dict)
    """When each upstream admitted its calls."""
    running_at_kill: int = 0
    limited: int = 0
    cores: float = math.nan

    def figures(self) -> Figures:
        """What it shows."""
        starts_s = sorted(itertools.chain.from_iterable(self.starts_s.values()))
        full, left = 3 * self.scale.per_s, 2 * self.scale.per_s
        known_until_s = self.killed_s - self.scale.longest_latency_s
        return Figures(
            answers=len(self.answers),
            failed=dict(Counter(answer.failure for answer in self.answers if answer.failure)),
            running_at_kill=self.running_at_kill,
            limited=self.limited,
            per_s_full=full,
            per_s_left=left,
            per_s_before=rate(starts_s, self.began_s + _RAMP_UP_S, known_until_s),
            per_s_down=rate(starts_s, self.killed_s + BACK_AFTER_KILL_S, self.returned_s),
            per_s_after=rate(starts_s, self.returned_s + BACK_AFTER_RETURN_S, self.stopped_s),
            back_after_kill_s=back_after_s(starts_s, self.killed_s, self.returned_s, per_s=GOAL * left),
            back_after_return_s=back_after_s(starts_s, self.returned_s, self.stopped_s, per_s=GOAL * full),
            first_after_return_s=min(
                (at_s for at_s in self.starts_s[NAMES[0]] if at_s >= self.returned_s), default=math.nan
            )
            - self.returned_s,
            p50_s=percentile([answer.end_s - answer.begin_s for answer in self.answers], 50),
            p99_s=percentile([answer.end_s - answer.begin_s for answer in self.answers], 99),
            cores=self.cores,
        )

    def timeline(self) -> list[list[int]]:
        """The calls that each upstream admitted in each second, from the first one on; the kill begins a second."""
        first_s = min(itertools.chain.from_iterable(self.starts_s.values()), default=self.killed_s)
        origin_s = self.killed_s - math.ceil(self.killed_s - first_s)
        seconds = range(math.ceil(self.stopped_s - origin_s))
        counts = [Counter(int(at_s - origin_s) for at_s in self.starts_s[name]) for name in NAMES]
        return [[count[second] for count in counts] for second in seconds]


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run showed. Rates are call starts a second, in real seconds."""

    answers: int
    failed: dict[str, int]
    """Failed calls by code and reason."""
    running_at_kill: int
    """The calls that died with the upstream."""
    limited: int
    """Calls that an upstream refused for its limit."""
    per_s_full: float
    """What all upstreams allow together."""
    per_s_left: float
    """What those allow that stay alive."""
    per_s_before: float
    per_s_down: float
    per_s_after: float
    back_after_kill_s: float
    """Seconds from the kill until the others were used to the full; NaN if they never were."""
    back_after_return_s: float
    """The same from the return, of all three."""
    first_after_return_s: float
    """Seconds from the return until its first call."""
    p50_s: float
    p99_s: float
    """How long callers waited for a picture."""
    cores: float
    """Busy ones of the whole machine."""

    def shortfalls(self) -> list[str]:
        """What is not as it should be, one line each."""
        is_short = {
            f"calls failed: {self.failed}": bool(self.failed),
            "no call ran when the upstream was killed": self.running_at_kill == 0,
            f"before the kill {self.per_s_before:.1f} calls/s began, of {self.per_s_full:.1f}": not (
                self.per_s_before >= SATURATED * self.per_s_full
            ),
            # Not `>`: what is never back has no figure, and falls short as well.
            f"back to {GOAL:.0%} of what was left after {self.back_after_kill_s:.1f} s": not (
                self.back_after_kill_s <= BACK_AFTER_KILL_S
            ),
            f"while one was down {self.per_s_down:.1f} calls/s began, of {self.per_s_left:.1f}": not (
                self.per_s_down >= GOAL * self.per_s_left
            ),
            f"back to {GOAL:.0%} of everything {self.back_after_return_s:.1f} s after the return": not (
                self.back_after_return_s <= BACK_AFTER_RETURN_S
            ),
            f"after the return {self.per_s_after:.1f} calls/s began, of {self.per_s_full:.1f}": not (
                self.per_s_after >= GOAL * self.per_s_full
            ),
        }
        return [line for line, short in is_short.items() if short]


def rate(starts_s: Sequence[float], from_s: float, until_s: float) -> float:
    """How many calls a second began between two moments; NaN of no time."""
    if not until_s > from_s:
        return math.nan
    return sum(from_s <= at_s < until_s for at_s in starts_s) / (until_s - from_s)


def back_after_s(starts_s: Sequence[float], from_s: float, until_s: float, *, per_s: float) -> float:
    """Seconds after `from_s` until a window begins that has `per_s` starts a second; NaN if none does by `until_s`."""
    for step in range(int((until_s - from_s - WINDOW_S) / _STEP_S) + 1):
        begin_s = from_s + step * _STEP_S
        if rate(starts_s, begin_s, begin_s + WINDOW_S) >= per_s:
            return step * _STEP_S
    return math.nan


async def measure(scale: Scale) -> Run:
    """Let one of three upstreams die and come back."""
    run = Run(scale)
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        providers = [await stack.enter_async_context(_provider(name, scale, directory)) for name in NAMES]
        urls = {name: provider.base_url for name, provider in zip(NAMES, providers, strict=True)}
        limits = f"images_per_minute = {round(60 * scale.per_s)}\nconcurrent = {scale.callers}"
        env = environment(directory)
        service = await stack.enter_async_context(in_its_own_process(env, upstream_tables(urls, limits=limits)))
        stubs = await stack.enter_async_context(callers(service.address, _CHANNELS))
        busy = BusyCores()
        async with _asking(stubs, scale.callers, run.answers):
            run.began_s = _now_s()
            await asyncio.sleep(scale.before_s)
            await _die_and_come_back(providers[0], run)
            await asyncio.sleep(scale.after_s)
            run.stopped_s = _now_s()
            run.cores = busy.read()
        for name, provider in zip(NAMES, providers, strict=True):
            calls = await provider.calls()
            run.starts_s[name] = [
                _real_s(provider, scale, each.started_s) for each in calls if each.started_s is not None
            ]
            run.limited += sum(each.limited for each in calls)
    return run


@asynccontextmanager
async def _provider(name: str, scale: Scale, directory: Path) -> AsyncIterator[ProviderProcess]:
    """One provider, with a limit on its organisation."""
    (directory / name).mkdir()
    config = emulator(
        [name],
        groups={f"org-{name}": LimitsConfig(images_per_minute=scale.images_per_minute)},
        latency=Latency(spread="lognormal", mean_s=scale.latency_s, by_quality={}),
        compression=scale.compression,
    )
    async with ProviderProcess(config, directory / name) as provider:
        yield provider


async def _die_and_come_back(provider: ProviderProcess, run: Run) -> None:
    run.running_at_kill = (await provider.state())["running"]
    run.killed_s = _now_s()
    await provider.kill()
    await asyncio.sleep(run.killed_s + run.scale.down_s - _now_s())
    await provider.start()
    run.returned_s = _now_s()


@asynccontextmanager
async def _asking(stubs: Sequence[Stub], count: int, answers: list[Answer]) -> AsyncIterator[None]:
    """So many callers, each of which asks for a new picture as soon as it has one; at the end all have their last."""
    numbers, stopped = itertools.count(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for i in range(count):
            group.create_task(_ask_on(stubs[i % len(stubs)], numbers, stopped, answers))
        try:
            yield
        finally:
            stopped.set()


async def _ask_on(stub: Stub, numbers: Iterator[int], stopped: asyncio.Event, answers: list[Answer]) -> None:
    while not stopped.is_set():
        begin_s, failure = _now_s(), ""
        request = pb.GetImageRequest(spec=pb.ImageSpec(prompt=f"picture {next(numbers)}"))
        try:
            await stub.GetImage(request, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            failure = " ".join(told_in(error)[:2])
        answers.append(Answer(begin_s, _now_s(), failure))


def _real_s(provider: ProviderProcess, scale: Scale, emulated_s: float) -> float:
    """An emulated moment by the event loop's time."""
    return _now_s() - (provider.now_s - emulated_s) / scale.compression


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def main(  # noqa: PLR0913 - one parameter per option
    *,
    compression: Annotated[float, typer.Option(help="Emulated seconds in a real one.")] = 2.0,
    callers_: Annotated[int, typer.Option("--callers", help="Callers, each with one call at a time.")] = 450,
    before: Annotated[float, typer.Option(help="Seconds before the kill.")] = 60.0,
    down: Annotated[float, typer.Option(help="Seconds until the killed upstream is started again.")] = 30.0,
    after: Annotated[float, typer.Option(help="Seconds from its return on.")] = 40.0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Throughput when one of three upstreams dies and comes back."""
    scale = Scale(compression=compression, callers=callers_, before_s=before, down_s=down, after_s=after)
    if before < (least := _RAMP_UP_S + WINDOW_S + scale.longest_latency_s):
        raise typer.BadParameter(f"should be at least {least:g}", param_hint="--before")
    seconds = before + down + after
    print(f"{scale.callers} callers for {seconds:.0f} s …", file=sys.stderr, flush=True)
    run = asyncio.run(measure(scale))
    figures = run.figures()
    shortfalls = figures.shortfalls()
    _print(figures, scale)
    print_verdict(shortfalls)
    result = {
        "scale": asdict(scale),
        "figures": asdict(figures),
        "starts_by_second": run.timeline(),
        "shortfalls": shortfalls,
    }
    write_json(json, "upstream_dies", result)
    raise typer.Exit(bool(shortfalls))


def _print(figures: Figures, scale: Scale) -> None:
    print_table(
        f"What {scale.callers} callers of three upstreams with {scale.per_s:g} calls/s each noticed of a death",
        ("answers", "failed", "died with it", "429s", "p50 s", "p99 s", "cores"),
        [
            (
                f"{figures.answers:,}",
                f"{sum(figures.failed.values()):,}",
                str(figures.running_at_kill),
                str(figures.limited),
                f"{figures.p50_s:.1f}",
                f"{figures.p99_s:.1f}",
                f"{figures.cores:.1f}",
            )
        ],
    )
    full = figures.per_s_full
    print_table(
        f"Calls begun a second, and how soon they were back to {GOAL:.0%} for windows of {WINDOW_S:g} s",
        ("", "calls/s", "of the limits", "back after s", "may take s"),
        [
            ("before the kill", f"{figures.per_s_before:.1f}", f"{figures.per_s_before / full:.1%}", "", ""),
            (
                "while it is down",
                f"{figures.per_s_down:.1f}",
                f"{figures.per_s_down / figures.per_s_left:.1%}",
                f"{figures.back_after_kill_s:.1f}",
                f"{BACK_AFTER_KILL_S:g}",
            ),
            (
                "after its return",
                f"{figures.per_s_after:.1f}",
                f"{figures.per_s_after / full:.1%}",
                f"{figures.back_after_return_s:.1f}",
                f"{BACK_AFTER_RETURN_S:g}",
            ),
        ],
    )


if __name__ == "__main__":
    typer.run(main)
