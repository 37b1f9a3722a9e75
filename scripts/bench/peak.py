"""How long callers wait at the peak of a writing platform, and whether those who pay for speed get it.

Measured: 200 requests a minute at random moments for 10 minutes, of which 31 % repeat an earlier one and 10 % come
from VIPs (priority INTERACTIVE; the others STANDARD), before one account that makes 20 pictures at a time and takes
8 s for one at medium quality: 150 a minute for 138 misses. The provider is the emulator, whose latencies are spread
evenly between half and one and a half times the mean; low quality takes 0.35 of medium. Its time is compressed, and
so are the service's limits and every max_wait; all times below are emulated seconds. Two runs:

plain     everybody waits for what was asked. A wait before start is from when a call was due to the moment at which the
          provider's ledger has the call that made its picture begin: what the service, the network and the bench
          itself take is in it. Who found its picture made, or being made, had no such wait, and is left out.
degraded  VIPs accept lower quality, and say max_wait = 5 s.

Against: in the plain run 95 of 100 VIPs that wait begin within one slot, which is 60/150 = 0.4 s; in the other every
VIP has a picture within 5 s, PENDING being none. In both every other request is answered, the provider refuses no call,
and what the service booked is what the provider billed.

Beside them stands what queueing alone makes of the same schedule: an M/G/20 queue with places kept for VIPs, simulated
with many draws of the latencies, for several shares of places kept. It tells the service's part in a wait from the
crowd's, and what `interactive_share` costs the others: where they need more than it leaves them, they wait ever longer
as long as the peak lasts. What a turn takes the service counts here as often as time is compressed: 20 ms between two
calls in a place are 0.1 s at 5, one part in eighty of a picture. Compress less on a busy machine.

Before a run the service makes a few pictures of medium quality, as one that has run for a minute has. How long low
quality takes it has to guess, from its price, until it makes the first.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import sys
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated

import typer
from google.protobuf.duration_pb2 import Duration

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.cases import Answer, Bills, Deployments, Stage, open_stage
from scripts.bench.figures import BusyCores, percentile, print_table, print_verdict, write_json
from scripts.bench.provider_config import Latency
from scripts.bench.provider_ledger import Call

REQUESTS_PER_MINUTE = 200.0
REPEATS = 0.31
VIPS = 0.1
PLACES = 20
LATENCY = Latency(mean_s=8.0, spread="uniform")
SLOT_S = LATENCY.mean_s / PLACES
"""A place comes free so often while all are taken."""

MAX_WAIT_S = 5.0
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2)

_QUALITY = "medium"
_WARM_UP_CALLS = 3
_SIMULATED_RUNS = 20


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of the schedule: when it is due, which picture it asks for, and whether a VIP does."""

    due_s: float
    picture: int
    is_vip: bool


def plan(minutes: float, rng: Random) -> list[Planned]:
    """Requests at random moments (a Poisson process); a repeat asks for any picture asked for before."""
    planned: list[Planned] = []
    pictures = 0
    due_s = rng.expovariate(REQUESTS_PER_MINUTE / 60)
    while due_s < minutes * 60:
        is_repeat = pictures > 0 and rng.random() < REPEATS
        picture = rng.randrange(pictures) if is_repeat else pictures
        pictures += not is_repeat
        planned.append(Planned(due_s, picture, rng.random() < VIPS))
        due_s += rng.expovariate(REQUESTS_PER_MINUTE / 60)
    return planned


# ── what queueing alone makes of it ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Waits:
    """Waits before start, in seconds, of those that had to wait for a picture; `left` waited still at the end."""

    vip_s: list[float] = field(default_factory=list)
    standard_s: list[float] = field(default_factory=list)
    left: int = 0


@dataclass(eq=False, slots=True)
class _Job:
    """A picture to be made, and who waits for it to begin."""

    is_urgent: bool = False
    begun: bool = False
    waiting: list[Planned] = field(default_factory=list)


class _Ideal:
    """A scheduler that takes no time itself: VIPs first, and `kept` of the places free for them."""

    def __init__(self, *, kept: int, rng: Random) -> None:
        self.waits = Waits()
        self._kept = kept
        self._rng = rng
        self._jobs: dict[int, _Job] = {}
        self._urgent: deque[_Job] = deque()
        self._others: deque[_Job] = deque()
        self._ends_s: list[float] = []

    @property
    def left(self) -> int:
        """How many pictures wait to be begun."""
        return sum(not job.begun for job in self._jobs.values())

    def ask(self, asked: Planned) -> None:
        """A request comes. It joins the job of its picture if there is one, and makes it urgent if a VIP's."""
        job = self._jobs.get(asked.picture)
        if job is None:
            job = self._jobs[asked.picture] = _Job()
            self._others.append(job)
        if job.begun:
            return
        job.waiting.append(asked)
        if asked.is_vip and not job.is_urgent:
            job.is_urgent = True
            self._urgent.append(job)
        self._begin(asked.due_s)

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self._ends_s and self._ends_s[0] <= until_s:
            self._begin(heapq.heappop(self._ends_s))

    def _begin(self, now_s: float) -> None:
        while (job := self._next()) is not None:
            heapq.heappush(self._ends_s, now_s + LATENCY.draw_s(_QUALITY, self._rng))
            job.begun = True
            for each in job.waiting:
                (self.waits.vip_s if each.is_vip else self.waits.standard_s).append(now_s - each.due_s)

    def _next(self) -> _Job | None:
        """Whose turn it is, if a place is free for it."""
        while self._others and self._others[0].is_urgent:  # it waits among the urgent ones
            self._others.popleft()
        running = len(self._ends_s)
        if self._urgent and running < PLACES:
            return self._urgent.popleft()
        if self._others and running < PLACES - self._kept:
            return self._others.popleft()
        return None


def simulate(planned: Sequence[Planned], *, kept: int, rng: Random) -> Waits:
    """What an ideal scheduler makes of the schedule; who finds a picture begun on or made does not wait."""
    ideal = _Ideal(kept=kept, rng=rng)
    for each in planned:
        ideal.run(each.due_s)
        ideal.ask(each)
    left = ideal.left
    ideal.run(math.inf)
    return replace(ideal.waits, left=left)


@dataclass(frozen=True, slots=True)
class Expected:
    """What an M/G/20 queue makes of a schedule with `kept` places kept for VIPs. Waits are p95, in seconds."""

    share: float
    kept: int
    standard_capacity: float
    """Standard pictures a minute that can be made beside those of VIPs."""
    vip_wait_s: float
    standard_wait_s: float
    left: float
    """Pictures that wait when the peak ends, on average."""


def expect(planned: Sequence[Planned], share: float, *, runs: int = _SIMULATED_RUNS) -> Expected:
    """What `interactive_share` does to the peak, over many draws of the latencies."""
    kept = min(math.ceil(PLACES * share), PLACES - 1)
    waits = [simulate(planned, kept=kept, rng=Random(run)) for run in range(runs)]  # noqa: S311 - latencies
    return Expected(
        share=share,
        kept=kept,
        standard_capacity=standard_capacity(kept),
        vip_wait_s=percentile((s for each in waits for s in each.vip_s), 95),
        standard_wait_s=percentile((s for each in waits for s in each.standard_s), 95),
        left=fmean(each.left for each in waits),
    )


def misses_per_minute() -> float:
    """Pictures that have to be made."""
    return REQUESTS_PER_MINUTE * (1 - REPEATS)


def standard_capacity(kept: int) -> float:
    """Standard pictures a minute that can be made while some always wait.

    They keep all places but the kept ones taken; VIPs come and go above that, a birth-death process, and are served
    in all of them. What runs on average, less the VIPs' part, is theirs.
    """
    vips_per_s = misses_per_minute() * VIPS / 60
    weights = [1.0]
    for running in range(PLACES - kept + 1, PLACES + 1):
        weights.append(weights[-1] * vips_per_s * LATENCY.mean_s / running)
    mean_running = sum(weight * (PLACES - kept + above) for above, weight in enumerate(weights)) / sum(weights)
    return (mean_running - vips_per_s * LATENCY.mean_s) * 60 / LATENCY.mean_s


# ── the service ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Part:
    """What one kind of caller got. Waits and answers in seconds, at 50, 95 and 99 of 100."""

    requests: int
    failures: dict[str, int]
    hits: int
    joined: int
    degraded: int
    waits_s: tuple[float, float, float]
    answers_s: tuple[float, float, float]
    slowest_s: float

    @classmethod
    def of(cls, answers: Sequence[Answer], waits_s: Iterable[float | None]) -> Part:
        """Of these answers; hits, and joins of what ran already, waited for nothing to begin."""
        waited_s = [each for each in waits_s if each is not None]
        return cls(
            requests=len(answers),
            failures=dict(Counter(each.failure for each in answers if each.failure)),
            hits=sum(each.is_hit for each in answers),
            joined=sum(each.collapsed for each in answers),
            degraded=sum(each.degraded for each in answers),
            waits_s=_percentiles(waited_s),
            answers_s=_percentiles([each.seconds for each in answers]),
            slowest_s=max((each.seconds for each in answers), default=math.nan),
        )


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run showed. `cores` are busy ones of the whole machine, `late_ms` how late the bench's calls were."""

    run: str
    is_degraded: bool
    vip: Part
    standard: Part
    bills: Bills
    billed_microusd: int
    """In the peak itself, without what came before it."""
    mean_answer_s: float
    left: int
    """Pictures that were asked for and not begun when the peak ended."""
    cores: float
    late_ms: float

    def shortfalls(self) -> list[str]:
        """What is not as it should be, one line each."""
        is_short = {
            f"standard requests were not answered: {self.standard.failures}": bool(self.standard.failures),
            f"VIPs were not answered: {self.vip.failures}": bool(self.vip.failures),
            f"the provider refused {self.bills.refused_by_limit} calls": self.bills.refused_by_limit > 0,
        }
        # Not `>`: without a figure it falls short as well.
        if self.is_degraded:
            short = f"a VIP waited {self.vip.slowest_s:.2f} s for an answer, above {MAX_WAIT_S:g}"
            is_short[short] = not self.vip.slowest_s <= MAX_WAIT_S
        else:
            short = f"the p95 of VIPs' waits before start is {self.vip.waits_s[1]:.2f} s, above {SLOT_S:g}"
            is_short[short] = not self.vip.waits_s[1] <= SLOT_S
        lines = [line for line, short in is_short.items() if short] + self.bills.shortfalls()
        return [f"{self.run}: {line}" for line in lines]


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    return percentile(values, 50), percentile(values, 95), percentile(values, 99)


@dataclass(slots=True)
class Run:
    """One run as it went: the schedule, what was answered, and both sides' accounts."""

    name: str
    is_degraded: bool
    planned: Sequence[Planned]
    answers: Sequence[Answer]
    calls: Sequence[Call]
    stats: pb.GetStatsResponse
    compression: float
    cores: float = math.nan

    def figures(self) -> Figures:
        """What it shows."""
        by_id = {call.request_id: call for call in self.calls}
        began_s, ended_s = self.answers[0].due_s, self.answers[-1].due_s
        parts = {}
        for is_vip in (True, False):
            answers = [a for a, each in zip(self.answers, self.planned, strict=True) if each.is_vip is is_vip]
            parts[is_vip] = Part.of(answers, [answer.start_wait_s(by_id) for answer in answers])
        made = [call for call in self.calls if call.at_s >= began_s]
        return Figures(
            run=self.name,
            is_degraded=self.is_degraded,
            vip=parts[True],
            standard=parts[False],
            bills=Bills.of(self.calls, self.stats),
            billed_microusd=sum(call.billed_microusd for call in made),
            mean_answer_s=fmean(answer.seconds for answer in self.answers),
            left=sum(call.at_s > ended_s for call in made),
            cores=self.cores,
            late_ms=percentile((a.sent_s - a.due_s for a in self.answers), 99) / self.compression * 1e3,
        )


async def measure(  # noqa: PLR0913 - what a run depends on
    name: str, planned: Sequence[Planned], *, degraded: bool, compression: float, share: float, seed: int
) -> Figures:
    """One run, with a service and a provider of its own."""
    deployment = Deployments(count=1, concurrent=PLACES, latency=LATENCY)
    settings = f"[generation]\ninteractive_share = {share}"
    async with open_stage(deployment, settings, compression=compression, seed=seed) as stage:
        await _warm_up(stage)
        busy = BusyCores()
        requests = requests_of(planned, degraded=degraded, compression=compression)
        answers = await stage.ask_on_time(requests, [each.due_s for each in planned])
        cores = busy.read()
        run = Run(
            name=name,
            is_degraded=degraded,
            planned=planned,
            answers=answers,
            calls=await stage.provider.calls(),
            stats=await stage.stats(),
            compression=compression,
            cores=cores,
        )
        return run.figures()


async def _warm_up(stage: Stage) -> None:
    """Let the service see how long a picture takes."""
    for number in range(_WARM_UP_CALLS):
        await stage.ask(number, pb.GetImageRequest(spec=_spec(f"warm-up {number}")))


def requests_of(planned: Sequence[Planned], *, degraded: bool, compression: float) -> list[pb.GetImageRequest]:
    """The schedule as calls of the service; `degraded`: VIPs accept less, and wait so long at most."""
    max_wait = Duration()
    max_wait.FromMicroseconds(round(MAX_WAIT_S / compression * 1e6))
    requests = []
    for each in planned:
        request = pb.GetImageRequest(spec=_spec(f"picture {each.picture} of a story"))
        request.priority = pb.PRIORITY_INTERACTIVE if each.is_vip else pb.PRIORITY_STANDARD
        if each.is_vip and degraded:
            request.allow_degraded = True
            request.max_wait.CopyFrom(max_wait)
        requests.append(request)
    return requests


def _spec(prompt: str, quality: str = _QUALITY) -> pb.ImageSpec:
    return pb.ImageSpec(prompt=prompt, quality=quality)


def main(
    *,
    minutes: Annotated[float, typer.Option(help="Emulated minutes that the peak lasts.")] = 10.0,
    compression: Annotated[float, typer.Option(help="Emulated seconds that pass in a real one.")] = 5.0,
    interactive_share: Annotated[float, typer.Option(help="Share of the places kept for VIPs.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the schedule and the provider's latencies.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Waits of VIPs and others at the peak."""
    planned = plan(minutes, Random(seed))  # noqa: S311 - a schedule
    results = []
    for name, degraded in (("plain", False), ("degraded", True)):
        print(f"{name} …", file=sys.stderr, flush=True)
        measuring = measure(
            name, planned, degraded=degraded, compression=compression, share=interactive_share, seed=seed
        )
        results.append(asyncio.run(measuring))
    expected = [expect(planned, share) for share in sorted({*SHARES, interactive_share})]
    shortfalls = [line for result in results for line in result.shortfalls()]
    _print(results, minutes=minutes, compression=compression, share=interactive_share)
    _print_expected(expected)
    print_verdict(shortfalls)
    rows = [asdict(result) for result in results]
    expectations = [asdict(each) for each in expected]
    write_json(json, "peak", {"runs": rows, "expected": expectations, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


def _print(results: Sequence[Figures], *, minutes: float, compression: float, share: float) -> None:
    print_table(
        f"A peak of {minutes:g} min, {REQUESTS_PER_MINUTE:g} requests/min, {VIPS:.0%} of VIPs, {share:.0%} of {PLACES} "
        f"places kept for them; seconds at p50 / p95 / p99",
        (
            "run",
            "callers",
            "requests",
            "failed",
            "hits",
            "joined",
            "degraded",
            "wait before start",
            "answer",
            "slowest",
        ),
        [
            (
                result.run,
                callers,
                f"{part.requests:,}",
                str(sum(part.failures.values())),
                f"{part.hits / part.requests:.0%}",
                f"{part.joined / part.requests:.0%}",
                f"{part.degraded / part.requests:.0%}",
                _seconds(part.waits_s),
                _seconds(part.answers_s),
                f"{part.slowest_s:.2f}",
            )
            for result in results
            for callers, part in (("VIP", result.vip), ("standard", result.standard))
        ],
    )
    print_table(
        f"The runs as a whole; {compression:g} emulated seconds in a real one",
        (
            "run",
            "mean answer",
            "calls",
            "429",
            "dollars",
            "waiting at the end",
            "cores busy",
            "p99 of the bench's delay",
        ),
        [
            (
                result.run,
                f"{result.mean_answer_s:.1f} s",
                f"{result.bills.calls:,}",
                str(result.bills.refused_by_limit),
                f"${result.billed_microusd / 1e6:.2f}",
                str(result.left),
                f"{result.cores:.2f}",
                f"{result.late_ms:.0f} ms",
            )
            for result in results
        ],
    )


def _print_expected(expected: Sequence[Expected]) -> None:
    standard = misses_per_minute() * (1 - VIPS)
    print_table(
        f"Queueing alone, run plain: M/G/{PLACES}, {misses_per_minute():.0f} pictures/min of {LATENCY.mean_s:g} s, "
        f"{standard:.0f} of them standard; p95 of waits in this schedule, {_SIMULATED_RUNS} times",
        (
            "interactive_share",
            "places kept",
            "standard/min it can make",
            "VIP wait",
            "standard wait",
            "waiting at the end",
        ),
        [
            (
                f"{each.share:g}",
                str(each.kept),
                f"{each.standard_capacity:.0f}",
                f"{each.vip_wait_s:.2f}",
                f"{each.standard_wait_s:.1f}",
                f"{each.left:.0f}",
            )
            for each in expected
        ],
    )


def _seconds(values: Sequence[float]) -> str:
    return " / ".join("-" if math.isnan(each) else f"{each:.2f}" for each in values)


if __name__ == "__main__":
    typer.run(main)
