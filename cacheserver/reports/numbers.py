"""What a report says, as numbers: sums, rates and bounds over rows of statistics. Nothing here asks or prints."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import zip_longest
from typing import Any, Final

from cacheserver.client import StatsField, StatsRow, StatsSpan
from cacheserver.model import Outcome, TierName

DEFINITIONS: Final = {
    "answered": "Pictures that a caller got: hits, collapsed, derived and misses (and observed ones).",
    "hit": "A tier had the picture; nothing was paid. A stale hit is one too: older than its freshness lifetime.",
    "collapsed": "A load that another caller had begun answered it: no hit, as no tier had it, and not paid either.",
    "derived": "No tier had it, but a better one of the same prompt that it was made from: no hit, and not paid "
    "either. Asked for again, it is a hit.",
    "miss": "No tier had it: it was generated and paid for.",
    "observed": "A tier had it, but the namespace only observes: it was generated all the same.",
    "hit rate": "Hits / answered; the rates of the tiers add up to it. What is negative, not cached, pending or an "
    "error is not in it.",
    "not paid": "Hits, collapsed and derived / answered.",
    "negative": "Refused from memory: an upstream had refused the same before.",
    "not cached": "Asked for only if cached, or by key, and not there. Nothing was made.",
    "pending": "Answered before the picture was ready; it counts when it is collected.",
    "error": "The call failed.",
    "degraded": "Answered at a lower quality than asked for: a hit or a miss too.",
    "spent": "Paid for calls to upstreams that ended and whose cost is known.",
    "unknown": "The most that calls can have cost whose outcome nobody knows. Not in spent.",
    "open": "The most that calls may cost that have not ended. Neither in spent nor in unknown.",
    "saved": "An estimate: what hits, collapsed and derived requests would have cost at the prices of their time.",
    "coalesced": "The part of saved that is due to collapsed requests.",
    "saved by derivation": "The part of saved that is due to derived pictures, when they were made.",
    "would have cost": "An estimate: saved, and what was paid for misses and observed ones. What made pictures that no "
    "request was answered with, as warm-ups do, is in spent alone.",
    "latency": "From a histogram: so many per cent of the answers took at most this long. Bounds, not exact times.",
}
"""Every word of a report, said once: the terminal, the JSON and the page show these sentences."""

UPSTREAM: Final = "upstream"
COLLAPSED: Final = "collapsed"
DERIVED: Final = "derived"
OTHER: Final = "other"

ENOUGH_ANSWERED: Final = 100
"""From how many answered pictures on a namespace is compared with others: the rate of a few says nothing."""

_MOST_POINTS: Final = 121
"""Two hours of minutes, and the one that has begun."""

_SPAN_LENGTH: Final = {
    StatsSpan.MINUTE: timedelta(minutes=1),
    StatsSpan.HOUR: timedelta(hours=1),
    StatsSpan.DAY: timedelta(days=1),
}
_HITS = frozenset({Outcome.HIT, Outcome.STALE})
_GENERATED = frozenset({Outcome.MISS, Outcome.OBSERVED})
_TIERS = (TierName.MEMORY, TierName.REDIS, TierName.DISK, TierName.S3, TierName.JOURNAL)
_WAYS = (*_TIERS, COLLAPSED, DERIVED, UPSTREAM)


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Latency:
    """How long answers took: counts per bound of the histogram, and one for what took longer.

    Attributes:
        counts: As many as `bounds_s`, and one more; empty where the service told none.
        sum_s: All together, in seconds.
        answers: How many that is.
    """

    bounds_s: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    sum_s: float = 0.0
    answers: int = 0

    @property
    def mean_s(self) -> float | None:
        """The mean in seconds; None without answers."""
        return self.sum_s / self.answers if self.answers else None

    def at_most_s(self, share: float) -> float | None:
        """The smallest bound that at least `share` (0 to 1) of the answers did not exceed, in seconds.

        Infinite where that lies beyond the last bound; None where nothing was counted.
        """
        wanted = math.ceil(share * sum(self.counts))
        seen = 0
        for bound, count in zip((*self.bounds_s, math.inf), self.counts, strict=False):
            seen += count
            if seen and seen >= wanted:
                return bound
        return None


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over rows of statistics; DEFINITIONS says what they mean. Money in micro-dollars.

    Attributes:
        outcomes: Pictures (calls, for errors) by what became of them; None is a word this client does not know.
        hits_by_tier: Fastest tier first; only tiers that had any.
        latency: By tier for hits, then "collapsed", "derived" and "upstream".
        observed_microusd: What hits would have saved that were only observed. It is a part of what all would have cost,
            and of nothing saved.
        derived_microusd: The part of saved that is due to pictures derived from others.
    """

    outcomes: Mapping[Outcome | None, int] = field(default_factory=dict)
    hits_by_tier: Mapping[TierName, int] = field(default_factory=dict)
    latency: Mapping[str, Latency] = field(default_factory=dict)
    degraded: int = 0
    image_bytes: int = 0
    spent_microusd: int = 0
    settled_calls: int = 0
    unknown_microusd: int = 0
    unknown_calls: int = 0
    open_microusd: int = 0
    open_calls: int = 0
    saved_microusd: int = 0
    coalesced_microusd: int = 0
    would_cost_microusd: int = 0
    observed_microusd: int = 0
    derived_microusd: int = 0

    @property
    def requests(self) -> int:
        """All that was asked for, whatever became of it."""
        return sum(self.outcomes.values())

    @property
    def hits(self) -> int:
        """Answered from a tier."""
        return self.count(*_HITS)

    @property
    def misses(self) -> int:
        """Generated, as no tier had it."""
        return self.count(Outcome.MISS)

    @property
    def collapsed(self) -> int:
        """Answered by a load that another caller had begun."""
        return self.count(Outcome.COLLAPSED)

    @property
    def derived(self) -> int:
        """Made from another stored picture, as no tier had it."""
        return self.count(Outcome.DERIVED)

    @property
    def observed(self) -> int:
        """Generated, though a tier had it."""
        return self.count(Outcome.OBSERVED)

    @property
    def answered(self) -> int:
        """What the hit rate is a share of."""
        return self.hits + self.collapsed + self.derived + self.misses + self.observed

    @property
    def hit_rate(self) -> float | None:
        """Hits of what was answered, 0 to 1; None if nothing was."""
        return ratio(self.hits, self.answered)

    @property
    def unpaid_rate(self) -> float | None:
        """Hits, collapsed and derived of what was answered, 0 to 1; None if nothing was."""
        return ratio(self.hits + self.collapsed + self.derived, self.answered)

    @property
    def spared_rate(self) -> float | None:
        """Saved of what it would have cost, 0 to 1; None if that is nothing."""
        return ratio(self.saved_microusd, self.would_cost_microusd)

    @property
    def unasked_microusd(self) -> int:
        """Of spent: what made pictures that no request was answered with, as warm-ups do."""
        return max(0, self.spent_microusd + self.saved_microusd - self.would_cost_microusd)

    @property
    def most_microusd(self) -> int:
        """The most that the provider's bill can be."""
        return self.spent_microusd + self.unknown_microusd + self.open_microusd

    def tier_rate(self, tier: TierName) -> float | None:
        """Hits of one tier of what was answered, 0 to 1; None if nothing was."""
        return ratio(self.hits_by_tier.get(tier, 0), self.answered)

    def count(self, *outcomes: Outcome) -> int:
        """How many became one of `outcomes`."""
        return sum(self.outcomes.get(each, 0) for each in outcomes)


def ratio(part: int, whole: int) -> float | None:
    """The share of `part` in `whole`; None of nothing."""
    return part / whole if whole else None


def add_up(rows: Iterable[StatsRow], bounds_s: Sequence[float]) -> Figures:
    """The sums over `rows`, whose histograms have these bounds."""
    return add_figures(_figures(row, bounds_s) for row in rows)


def add_figures(parts: Iterable[Figures]) -> Figures:
    """The sums over several figures."""
    outcomes: Counter[Outcome | None] = Counter()
    hits: Counter[TierName] = Counter()
    ways: defaultdict[str, list[Latency]] = defaultdict(list)
    sums: Counter[str] = Counter()
    for part in parts:
        outcomes.update(part.outcomes)
        hits.update(part.hits_by_tier)
        for way, latency in part.latency.items():
            ways[way].append(latency)
        for name in _SUMMED:
            sums[name] += getattr(part, name)
    return Figures(
        outcomes=dict(outcomes),
        hits_by_tier={tier: hits[tier] for tier in _TIERS if hits[tier]},
        latency={way: _add_latencies(ways[way]) for way in _WAYS if way in ways},
        **{name: sums[name] for name in _SUMMED},
    )


_SUMMED = (
    "degraded",
    "image_bytes",
    "spent_microusd",
    "settled_calls",
    "unknown_microusd",
    "unknown_calls",
    "open_microusd",
    "open_calls",
    "saved_microusd",
    "coalesced_microusd",
    "would_cost_microusd",
    "observed_microusd",
    "derived_microusd",
)

_OF_ONE_OUTCOME = {
    Outcome.OBSERVED: ("observed_microusd", "would_cost_microusd"),
    Outcome.DERIVED: ("derived_microusd", "saved_microusd"),
}
"""Sums over rows of one outcome alone, and of which column."""


def _figures(row: StatsRow, bounds_s: Sequence[float]) -> Figures:
    way = _way(row) if row.requests else None
    latency = Latency(tuple(bounds_s), row.latency_counts, row.latency_sum_s, row.requests)
    of_one_outcome = {name for name, _ in _OF_ONE_OUTCOME.values()}
    sums = {name: getattr(row, name) for name in _SUMMED if name not in of_one_outcome}
    if row.outcome in _OF_ONE_OUTCOME:
        name, column = _OF_ONE_OUTCOME[row.outcome]
        sums[name] = getattr(row, column)
    return Figures(
        outcomes={row.outcome: row.requests} if row.requests else {},
        hits_by_tier={row.tier: row.requests} if row.outcome in _HITS and row.tier else {},
        latency={way: latency} if way else {},
        **sums,
    )


def _way(row: StatsRow) -> str | None:
    """Where an answer came from, for telling latencies apart; None for what is no answer."""
    if row.outcome in _HITS:
        return row.tier
    if row.outcome in _GENERATED:
        return UPSTREAM
    if row.outcome is Outcome.DERIVED:
        return DERIVED
    return COLLAPSED if row.outcome is Outcome.COLLAPSED else None


def _add_latencies(parts: Sequence[Latency]) -> Latency:
    return Latency(
        bounds_s=parts[0].bounds_s,
        counts=tuple(map(sum, zip_longest(*(part.counts for part in parts), fillvalue=0))),
        sum_s=sum(part.sum_s for part in parts),
        answers=sum(part.answers for part in parts),
    )


# ── groups and time ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of what has these values in the fields that rows are told apart by."""

    names: tuple[str, ...]
    figures: Figures

    @property
    def name(self) -> str:
        """The values in one word."""
        return " / ".join(self.names)


@dataclass(frozen=True, slots=True)
class Period:
    """A span of time, from `since` to before `until`, and the length of the buckets it is told in."""

    since: datetime
    until: datetime
    span: StatsSpan

    @property
    def length(self) -> timedelta:
        """How long it is."""
        return self.until - self.since

    def since_first(self, first_time: datetime | None) -> timedelta:
        """How long it is without the time before the first figures, when the service may not have run yet."""
        return self.until - max(self.since, first_time or self.since)

    @property
    def step(self) -> timedelta:
        """How long a point of its series is: whole buckets, so many that there are not too many points."""
        bucket = _SPAN_LENGTH[self.span]
        return bucket * max(1, math.ceil((self.until - floor(self.since, self.span)) / bucket / _MOST_POINTS))


@dataclass(frozen=True, slots=True)
class Point:
    """The figures of one stretch of time."""

    start_time: datetime
    figures: Figures


def span_for(length: timedelta) -> StatsSpan:
    """The buckets that show a span of time of this length well."""
    if length <= timedelta(hours=2):
        return StatsSpan.MINUTE
    return StatsSpan.HOUR if length <= timedelta(days=4) else StatsSpan.DAY


def floor(moment: datetime, span: StatsSpan) -> datetime:
    """The beginning of the bucket that `moment` is in."""
    moment = moment.replace(second=0, microsecond=0)
    if span is not StatsSpan.MINUTE:
        moment = moment.replace(minute=0)
    return moment.replace(hour=0) if span is StatsSpan.DAY else moment


def groups(rows: Iterable[StatsRow], by: Sequence[StatsField], bounds_s: Sequence[float]) -> list[Group]:
    """The rows told apart by these fields, the most asked first."""
    parts: defaultdict[tuple[str, ...], list[StatsRow]] = defaultdict(list)
    for row in rows:
        parts[tuple(str(getattr(row, each) or "") for each in by)].append(row)
    found = [Group(names, add_up(part, bounds_s)) for names, part in parts.items()]
    return sorted(found, key=lambda group: (-group.figures.requests, group.names))


def series(rows: Iterable[StatsRow], period: Period, bounds_s: Sequence[float]) -> list[Point]:
    """The figures over time: a point for every step of the period, also where nothing was asked.

    What lies outside is in the nearest point, so that the points add up to all rows.
    """
    first, step = floor(period.since, period.span), period.step
    last = max(0, math.ceil((period.until - first) / step) - 1)
    parts: defaultdict[int, list[StatsRow]] = defaultdict(list)
    for row in rows:
        index = (row.start_time - first) // step if row.start_time else 0
        parts[min(max(index, 0), last)].append(row)
    return [Point(first + step * index, add_up(parts[index], bounds_s)) for index in range(last + 1)]


def judged(found: Sequence[Group]) -> list[Group]:
    """The groups whose hit rates can be compared: those with ENOUGH_ANSWERED pictures; if none has, all with any.

    What only observes serves no hits, so it is left out, unless everything observes.
    """
    answered = [group for group in found if group.figures.answered]
    serving = [group for group in answered if not group.figures.observed] or answered
    return [group for group in serving if group.figures.answered >= ENOUGH_ANSWERED] or serving


def worst(found: Sequence[Group]) -> Group | None:
    """The group with the lowest hit rate of those that are judged."""
    return min(judged(found), key=lambda group: group.figures.hit_rate or 0.0, default=None)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of one period.

    Attributes:
        namespace: The only one it is about; None for all that the caller may read.
        first_time: When the first figures begin that there are in the period; None if there are none.
        by: What `groups` are told apart by.
        by_namespace: Also `by_model` and `by_quality`: the same sums told apart by one field.
    """

    period: Period
    namespace: str | None
    first_time: datetime | None
    total: Figures
    by: tuple[StatsField, ...]
    groups: tuple[Group, ...]
    series: tuple[Point, ...]
    by_namespace: tuple[Group, ...]
    by_model: tuple[Group, ...]
    by_quality: tuple[Group, ...]


def asked_by(by: Sequence[StatsField]) -> tuple[StatsField, ...]:
    """What rows have to be told apart by for a report by these fields."""
    needed = (StatsField.NAMESPACE, StatsField.MODEL, StatsField.QUALITY, StatsField.OUTCOME, StatsField.TIER)
    return tuple(dict.fromkeys((*needed, *by)))


def report(
    rows: Sequence[StatsRow],
    bounds_s: Sequence[float],
    *,
    period: Period,
    by: Sequence[StatsField],
    namespace: str | None = None,
) -> Report:
    """The report of rows told apart by `asked_by(by)` and the period's buckets."""
    return Report(
        period=period,
        namespace=namespace,
        first_time=min((row.start_time for row in rows if row.start_time), default=None),
        total=add_up(rows, bounds_s),
        by=tuple(by),
        groups=tuple(groups(rows, by, bounds_s)),
        series=tuple(series(rows, period, bounds_s)),
        by_namespace=tuple(groups(rows, [StatsField.NAMESPACE], bounds_s)),
        by_model=tuple(groups(rows, [StatsField.MODEL], bounds_s)),
        by_quality=tuple(groups(rows, [StatsField.QUALITY], bounds_s)),
    )


# ── as plain data ───────────────────────────────────────────────────────────────────────────────────────────────


def facts(report: Report) -> dict[str, Any]:
    """The report for programs: counts, micro-dollars, shares from 0 to 1, seconds."""
    return {
        "since": report.period.since.isoformat(),
        "until": report.period.until.isoformat(),
        "first_time": report.first_time.isoformat() if report.first_time else None,
        "span": str(report.period.span),
        "namespace": report.namespace,
        "definitions": dict(DEFINITIONS),
        "total": figure_facts(report.total),
        "by": [str(each) for each in report.by],
        "groups": [
            {str(each): name for each, name in zip(report.by, group.names, strict=True)} | figure_facts(group.figures)
            for group in report.groups
        ],
        "series": [
            {"start_time": point.start_time.isoformat()} | figure_facts(point.figures) for point in report.series
        ],
    }


def figure_facts(figures: Figures) -> dict[str, Any]:
    """One row of figures for programs."""
    return {
        **{name: value for name, value in flat_facts(figures).items() if not name.startswith("hits_")},
        "hits_by_tier": {str(tier): count for tier, count in figures.hits_by_tier.items()},
        "hit_rate_by_tier": {str(tier): figures.tier_rate(tier) for tier in figures.hits_by_tier},
        "latency_at_most_s": {
            way: {f"p{percent}": _finite(latency.at_most_s(percent / 100)) for percent in (50, 95, 99)}
            | {"mean": latency.mean_s}
            for way, latency in figures.latency.items()
        },
    }


def flat_facts(figures: Figures) -> dict[str, int | float | None]:
    """One row of figures for a CSV file: always the same columns, whatever occurred."""
    counts = {f"{each}": figures.count(each) for each in Outcome if each not in {Outcome.HIT, Outcome.MISS}}
    return {
        "requests": figures.requests,
        "answered": figures.answered,
        "hits": figures.hits,
        **{f"hits_{tier}": figures.hits_by_tier.get(tier, 0) for tier in _TIERS},
        "misses": figures.misses,
        **{_PLURAL.get(name, name): count for name, count in counts.items()},
        OTHER: figures.outcomes.get(None, 0),
        "degraded": figures.degraded,
        "hit_rate": figures.hit_rate,
        "unpaid_rate": figures.unpaid_rate,
        **{name: getattr(figures, name) for name in _SUMMED if name != "degraded"},
        "spared_rate": figures.spared_rate,
    }


_PLURAL = {"error": "errors"}


def _finite(seconds: float | None) -> float | str | None:
    """JSON has no infinity; what lies beyond the last bound is said in a word."""
    return "beyond" if seconds == math.inf else seconds
