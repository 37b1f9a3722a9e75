"""Rounds in which several servers are measured by turns, and what follows of them: ratios, and whether they count."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from scripts.bench.figures import percentile
from scripts.bench.hit_load import Taken

BARE, AGAIN, UVLOOP, TUNED, OURS = "bare", "bare again", "uvloop", "tuned", "service"
"""The sides that most rows have: the bare server twice, the one that is tuned as ours is, and ours."""

ALIKE = 0.01
"""By how much the bare server may differ from itself."""

_FEWEST_FOR_P99 = 100
"""Calls: with fewer, the 99th percentile is but the longest of them."""

Turn = Callable[[], Awaitable[Taken]]


@dataclass(frozen=True, slots=True)
class Round:
    """What a side did in a round, all its turns together."""

    per_second: float
    cpu_us: float
    p50_us: float
    p99_us: float
    """NaN of a few calls."""

    @property
    def us_each(self) -> float:
        """How much time went by for each call."""
        return 1e6 / self.per_second

    @staticmethod
    def of(turns: Sequence[Taken]) -> Round:
        """The figures of these turns."""
        calls, us = sum(turn.calls for turn in turns), [each for turn in turns for each in turn.us]
        return Round(
            per_second=calls / sum(turn.seconds for turn in turns),
            cpu_us=sum(turn.cpu_s for turn in turns) / calls * 1e6,
            p50_us=percentile(us, 50),
            p99_us=percentile(us, 99) if len(us) >= _FEWEST_FOR_P99 else math.nan,
        )


@dataclass(slots=True)
class Rounds:
    """What was measured of each side, round by round."""

    sides: dict[str, list[Round]] = field(default_factory=dict)

    def __len__(self) -> int:
        return min((len(rounds) for rounds in self.sides.values()), default=0)

    def add(self, measured: Mapping[str, Round]) -> None:
        """Add a round of every side."""
        for name, each in measured.items():
            self.sides.setdefault(name, []).append(each)

    def median(self, side: str, figure: str) -> float:
        """The median of a figure of Round."""
        return statistics.median(getattr(each, figure) for each in self.sides[side])

    def ratio(self, side: str, floor: str, figure: str = "cpu_us") -> float:
        """The median of a round's ratios; NaN if one of the two was not measured."""
        if side not in self.sides or floor not in self.sides:
            return math.nan
        pairs = zip(self.sides[side], self.sides[floor], strict=True)
        return statistics.median(getattr(one, figure) / getattr(other, figure) for one, other in pairs)

    def alike(self, figure: str = "cpu_us") -> float:
        """A/A: a figure of the bare server against itself; NaN without a second one."""
        return self.ratio(AGAIN, BARE, figure)

    def can_tell(self, goals: Sequence[Goal] = ()) -> bool:
        """Whether the machine was at rest, as far as that was looked at: by processor time, and by what is a goal."""
        alike = [self.alike(figure) for figure in {"cpu_us", *(goal.figure for goal in goals)}]
        return all(math.isnan(each) or abs(each - 1) <= ALIKE for each in alike)


async def measure(  # noqa: PLR0913 - when it ends, by keyword
    sides: Mapping[str, Turn],
    *,
    rounds: int,
    most_rounds: int,
    turns: int,
    goals: Sequence[Goal] = (),
    most_s: float = math.inf,
    told: Callable[[Rounds], None] = lambda _: None,
) -> Rounds:
    """`rounds` at least, and further ones until A/A is as it should be: up to `most_rounds`, none after `most_s`.

    In each round each side has `turns` turns, in a random order: what else the machine does then meets all of them.
    `told` is told after each round.
    """
    measured, until_s = Rounds(), time.monotonic() + most_s
    while len(measured) < rounds or (
        not measured.can_tell(goals) and len(measured) < most_rounds and time.monotonic() < until_s
    ):
        taken: dict[str, list[Taken]] = {name: [] for name in sides}
        for _ in range(turns):
            for name in random.sample([*sides], len(sides)):
                taken[name].append(await sides[name]())
        measured.add({name: Round.of(each) for name, each in taken.items()})
        told(measured)
    return measured


@dataclass(frozen=True, slots=True)
class Goal:
    """What ours may have at most of a figure of Round: so many times that of another side, or so much by itself."""

    floor: str | None
    most: float
    figure: str = "cpu_us"

    def value(self, measured: Rounds) -> float:
        """The ratio, or the figure; NaN if the other side was not measured."""
        if self.floor is None:
            return measured.median(OURS, self.figure)
        return measured.ratio(OURS, self.floor, self.figure)

    def shortfall(self, row: str, measured: Rounds) -> str | None:
        """What is not as it should be, if anything. What was not measured falls short, too."""
        value = self.value(measured)
        if value <= self.most:
            return None
        return f"{row}: {self.figure} is {value:.3f}{f' x {self.floor}' if self.floor else ''}, not {self.most:g}"


def shortfalls(row: str, goals: Sequence[Goal], measured: Rounds) -> list[str]:
    """What of a row is not as it should be."""
    if goals and not measured.can_tell(goals):
        figures = dict.fromkeys(("cpu_us", *(goal.figure for goal in goals)))
        alike = ", ".join(f"{measured.alike(figure):.4f} in {figure}" for figure in figures)
        return [f"{row}: A/A is {alike} after {len(measured)} rounds: the machine is too restless to tell"]
    return [told for goal in goals if (told := goal.shortfall(row, measured)) is not None]
