"""Figures: what was counted in a span of time, for whom, and how it ended. Values and how they add up; no I/O.

Time is cut into minutes and hours (UTC); a day is its hours added up. A bucket of time holds cells: for each key the
figures that one owner has counted. An owner is the only one to write its cells, and writes them as they stand, not
by how much they grew: a write may be repeated, and whoever reads adds up all owners.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cacheserver.model import Attempt, AttemptOutcome, Outcome, StatsField, StatsSpan, TierName

MINUTE_S, HOUR_S, DAY_S = 60, 3_600, 86_400

SECONDS_OF: Mapping[StatsSpan, int] = {StatsSpan.MINUTE: MINUTE_S, StatsSpan.HOUR: HOUR_S, StatsSpan.DAY: DAY_S}
"""How long each span is."""

LATENCY_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of the latency buckets; one more counts what took longer."""

OTHER = "other"
"""A model, quality or caller beyond what is told apart."""

_MICRO = 1_000_000
_LATENCIES = len(LATENCY_BOUNDS_S) + 1


class Key(NamedTuple):
    """What figures are told apart by. Empty where it is not known, or does not matter; so is None."""

    namespace: str = ""
    model: str = ""
    quality: str = ""
    caller: str = ""
    outcome: Outcome | None = None
    tier: TierName | None = None

    def narrowed(self, by: Iterable[StatsField]) -> Key:
        """The same with nothing but what rows are told apart by."""
        return Key(**{each.value: getattr(self, each.value) for each in by})


class Bucket(NamedTuple):
    """A minute or an hour: its length, and its first second since 1970."""

    span_s: int
    start_s: int

    @staticmethod
    def at(span_s: int, moment_s: float) -> Bucket:
        """The one that a moment lies in."""
        return Bucket(span_s, int(moment_s // span_s) * span_s)

    @property
    def end_s(self) -> int:
        """The first second after it."""
        return self.start_s + self.span_s


@dataclass(slots=True)
class HitRow:
    """Where hits like one that was booked before are booked: the row of the books they belong to, found once.

    `figures` are that row's in the books of the time `taken`.
    """

    key: Key
    figures: Figures | None = None
    taken: int = -1


@dataclass(slots=True)
class Figures:
    """Counters. Money in micro-dollars; `coalesced` is a part of `saved`.

    `settled_calls` cost `spent` together; `unknown_calls` and `open_calls` at most `unknown` and `open`: of the
    former nobody knows what became, the latter have not ended. No call is in two of the three.
    """

    requests: int = 0
    image_bytes: int = 0
    seconds: float = 0.0
    saved_microusd: int = 0
    coalesced_microusd: int = 0
    would_cost_microusd: int = 0
    degraded: int = 0
    settled_calls: int = 0
    spent_microusd: int = 0
    unknown_calls: int = 0
    unknown_microusd: int = 0
    open_calls: int = 0
    open_microusd: int = 0
    latency_counts: list[int] = field(default_factory=lambda: [0] * _LATENCIES)

    def add(self, other: Figures) -> None:
        """Add another's counters to these."""
        self.requests += other.requests
        self.image_bytes += other.image_bytes
        self.seconds += other.seconds
        self.saved_microusd += other.saved_microusd
        self.coalesced_microusd += other.coalesced_microusd
        self.would_cost_microusd += other.would_cost_microusd
        self.degraded += other.degraded
        self.settled_calls += other.settled_calls
        self.spent_microusd += other.spent_microusd
        self.unknown_calls += other.unknown_calls
        self.unknown_microusd += other.unknown_microusd
        self.open_calls += other.open_calls
        self.open_microusd += other.open_microusd
        for i, count in enumerate(other.latency_counts):
            self.latency_counts[i] += count

    def count_calls(self, calls: int, outcome: AttemptOutcome, *, cost_microusd: int, estimate_microusd: int) -> None:
        """Count calls to upstreams that have come so far; with negative numbers, no more."""
        match outcome:
            case AttemptOutcome.SENT:
                self.open_calls += calls
                self.open_microusd += estimate_microusd
            case AttemptOutcome.UNKNOWN:
                self.unknown_calls += calls
                self.unknown_microusd += cost_microusd
            case AttemptOutcome.SETTLED:
                self.settled_calls += calls
                self.spent_microusd += cost_microusd
            case AttemptOutcome.NOT_BILLED:
                pass

    def encoded(self) -> str:
        """As text: whole numbers, what is zero left out."""
        numbers = (
            self.requests,
            self.image_bytes,
            round(self.seconds * _MICRO),
            self.saved_microusd,
            self.coalesced_microusd,
            self.would_cost_microusd,
            self.degraded,
            self.settled_calls,
            self.spent_microusd,
            self.unknown_calls,
            self.unknown_microusd,
            self.open_calls,
            self.open_microusd,
            *self.latency_counts,
        )
        return ",".join([str(number) if number else "" for number in numbers]).rstrip(",")

    @staticmethod
    def decoded(text: str) -> Figures:
        """What `encoded` made text of.

        Raises:
            ValueError: it did not make this.
        """
        numbers = [int(number or 0) for number in text.split(",")]
        most = _COUNTERS + _LATENCIES
        if len(numbers) > most:
            raise ValueError("more numbers than there are counters")
        numbers += [0] * (most - len(numbers))
        figures = Figures(latency_counts=numbers[_COUNTERS:])
        figures.requests, figures.image_bytes, micros = numbers[:3]
        figures.seconds = micros / _MICRO
        figures.saved_microusd, figures.coalesced_microusd, figures.would_cost_microusd, figures.degraded = numbers[3:7]
        figures.settled_calls, figures.spent_microusd, figures.unknown_calls, figures.unknown_microusd = numbers[7:11]
        figures.open_calls, figures.open_microusd = numbers[11:_COUNTERS]
        return figures


_COUNTERS = 13
"""Of Figures, all but the latencies."""


@dataclass(slots=True)
class Row(Figures):
    """Figures and what they are told apart by. `start_s` is when the time bucket begins, None for one of all time."""

    namespace: str = ""
    model: str = ""
    quality: str = ""
    caller: str = ""
    outcome: Outcome | None = None
    tier: TierName | None = None
    start_s: int | None = None


class Sums:
    """Figures added up into rows."""

    def __init__(self, by: Iterable[StatsField], span: StatsSpan | None = None) -> None:
        """Rows are told apart by `by`, and by time buckets of the length of `span`."""
        self._by = tuple(dict.fromkeys(by))
        self._span_s = None if span is None else SECONDS_OF[span]
        self._rows: dict[tuple[int | None, Key], Row] = {}

    def add(self, key: Key, figures: Figures, moment_s: int | None = None) -> None:
        """Add figures of a moment."""
        start_s = None
        if moment_s is not None and self._span_s is not None:
            start_s = moment_s // self._span_s * self._span_s
        narrow = key.narrowed(self._by)
        row = self._rows.get((start_s, narrow))
        if row is None:
            row = self._rows[start_s, narrow] = Row(**narrow._asdict(), start_s=start_s)
        row.add(figures)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Row]:
        """The rows, by time and then by what tells them apart."""
        in_order = sorted(self._rows.items(), key=lambda item: (item[0][0] or 0, [each or "" for each in item[0][1]]))
        return [row for _, row in in_order]


BY_DEFAULT = (StatsField.NAMESPACE, StatsField.OUTCOME, StatsField.TIER)
"""What rows are told apart by where nothing is named."""


def total_of(rows: Iterable[Figures]) -> Row:
    """All rows in one."""
    total = Row()
    for row in rows:
        total.add(row)
    return total


# ── names of cells ──────────────────────────────────────────────────────────────────────────────────────────


def cell_name(owner: str, key: Key) -> str:
    """The name of an owner's cell in its bucket."""
    return json.dumps([owner, *[each or "" for each in key]], ensure_ascii=False, separators=(",", ":"))


def cell_prefix(owner: str) -> str:
    """What the names of all cells of this owner begin with, and of no other's."""
    return json.dumps([owner], ensure_ascii=False)[:-1] + ","


def read_cell_name(name: str) -> Key:
    """The key of the cell of this name.

    Raises:
        ValueError: it is no name of a cell.
    """
    parts = json.loads(name)
    if not (isinstance(parts, list) and len(parts) == len(Key._fields) + 1 and all(isinstance(p, str) for p in parts)):
        raise ValueError("not the name of a cell")
    _, namespace, model, quality, caller, outcome, tier = parts
    return Key(
        namespace,
        model,
        quality,
        caller,
        Outcome(outcome) if outcome else None,
        TierName(tier) if tier else None,
    )


def key_of_call(attempt: Attempt) -> Key:
    """Where the money of a call to an upstream is counted."""
    return Key(attempt.namespace, attempt.model, attempt.quality, attempt.caller, Outcome.MISS, TierName.UPSTREAM)
