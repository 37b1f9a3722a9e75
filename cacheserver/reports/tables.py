"""A report written out: money, rates and times for people, and tables of them that any renderer can draw."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from cacheserver.client import StatsSpan
from cacheserver.model import Outcome, TierName
from cacheserver.reports.numbers import DEFINITIONS, Figures, Group, Latency, Period, Report, add_figures, flat_facts

NONE: Final = "-"
"""Where there is no figure: a rate of nothing."""

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_PENNIES_BELOW_MICROUSD: Final = 1_000_000
_SPARKLINE: Final = 31
_MOST_GROUPS: Final = 30
_PERCENTS: Final = (50, 95, 99)

Spec = dict[str, Any]
_Cells = Callable[[Figures], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells for people.

    The first `texts` columns are words, the others figures; with `has_total` the last row is the sum of the others.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    has_total: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing: its name as a part of an id, what it shows, and Vega-Lite with the data inside."""

    name: str
    title: str
    spec: Spec


# ── figures for people ──────────────────────────────────────────────────────────────────────────────────────────


def usd(microusd: int) -> str:
    """Money: to the cent, and smaller amounts to the hundredth of one."""
    sign = "-" if microusd < 0 else ""
    amount = abs(microusd) / 1_000_000
    return f"{sign}${amount:,.4f}" if 0 < abs(microusd) < _PENNIES_BELOW_MICROUSD else f"{sign}${amount:,.2f}"


def percent(share: float | None) -> str:
    """A share from 0 to 1."""
    return NONE if share is None else f"{share * 100:.1f} %"


def count(number: int) -> str:
    """A number of things."""
    return f"{number:,}"


def seconds(time_s: float | None) -> str:
    """A length of time, in the unit that suits it."""
    if time_s is None:
        return NONE
    return f"{time_s * 1000:,.3g} ms" if time_s < 1 else f"{time_s:,.3g} s"


def at_most(latency: Latency, share: float) -> str:
    """The bound that so large a share of the answers did not exceed."""
    bound = latency.at_most_s(share)
    if bound == math.inf:
        return f"> {seconds(latency.bounds_s[-1])}"
    return NONE if bound is None else f"≤ {seconds(bound)}"


def mib(size_bytes: int | None) -> str:
    """A size in memory; None is one without bound."""
    if size_bytes is None:
        return "without bound"
    return f"{size_bytes / 2**30:,.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:,.1f} MiB"


def moment(time: datetime) -> str:
    """A moment in UTC, to the minute."""
    return f"{time:%Y-%m-%d %H:%M}"


def stretch(period: Period) -> str:
    """A period in words."""
    return f"{moment(period.since)} to {moment(period.until)} UTC"


def step_name(period: Period, points: int = 1) -> str:
    """What so many points of the period's series are together, as "day" or "3 hours"."""
    unit = {
        StatsSpan.MINUTE: timedelta(minutes=1),
        StatsSpan.HOUR: timedelta(hours=1),
        StatsSpan.DAY: timedelta(days=1),
    }[period.span]
    many = points * period.step // unit
    return str(period.span) if many == 1 else f"{many} {period.span}s"


def sparkline(values: Sequence[float | None]) -> str:
    """One character per value: the lowest block for 0, the highest for the largest, a blank where there is none."""
    most = max((value for value in values if value is not None), default=0.0)
    return "".join(" " if value is None else _block(value / most if most else 0.0) for value in values)


def _block(share: float) -> str:
    return _BLOCKS[min(len(_BLOCKS) - 1, int(share * len(_BLOCKS)))]


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(report: Report) -> list[Table]:
    """The tables of a report, by what it is told apart by."""
    by = tuple(str(each) for each in report.by)
    if {"outcome", "tier"} & set(by):  # a rate of one outcome says nothing: it is all or none
        parts = [_parts_table(by, report.groups, report.total)]
    else:
        parts = [hit_table(by, report.groups, report.total), rest_table(by, report.groups, report.total)]
    return [*parts, money_table(by, report.groups, report.total), latency_table(report.total)]


def hit_table(by: tuple[str, ...], groups: Sequence[Group], total: Figures) -> Table:
    """What was answered, and from where."""
    tiers = tuple(total.hits_by_tier)
    derived, observed = bool(total.derived), bool(total.observed)
    columns = ("answered", "hit rate", *(str(tier) for tier in tiers), "collapsed", "misses", "not paid")
    columns += (("derived",) if derived else ()) + (("observed",) if observed else ())

    words = ("answered", "hit rate", "not paid", *(("derived",) if derived else ()))

    def cells(figures: Figures) -> tuple[str, ...]:
        return (
            count(figures.answered),
            percent(figures.hit_rate),
            *(percent(figures.tier_rate(tier)) for tier in tiers),
            count(figures.collapsed),
            count(figures.misses),
            percent(figures.unpaid_rate),
            *((count(figures.derived),) if derived else ()),
            *((count(figures.observed),) if observed else ()),
        )

    return Table(
        title="Hits",
        columns=(*by, *columns),
        rows=_rows(len(by), groups, total, cells),
        texts=len(by),
        has_total=True,
        note="\n".join(f"{word}: {DEFINITIONS[word]}" for word in words),
    )


def rest_table(by: tuple[str, ...], groups: Sequence[Group], total: Figures) -> Table:
    """What else became of what was asked, none of it in the hit rate."""

    def cells(figures: Figures) -> tuple[str, ...]:
        return (
            count(figures.requests),
            count(figures.count(Outcome.ERROR)),
            count(figures.count(Outcome.NOT_CACHED)),
            count(figures.count(Outcome.PENDING)),
            count(figures.count(Outcome.NEGATIVE)),
            count(figures.count(Outcome.STALE)),
            count(figures.degraded),
        )

    return Table(
        title="All requests",
        columns=(*by, "requests", "errors", "not cached", "pending", "negative", "of hits: stale", "of all: degraded"),
        rows=_rows(len(by), groups, total, cells),
        texts=len(by),
        has_total=True,
    )


def money_table(by: tuple[str, ...], groups: Sequence[Group], total: Figures) -> Table:
    """What was paid and what was not."""
    derived = bool(total.derived)

    def cells(figures: Figures) -> tuple[str, ...]:
        return (
            usd(figures.spent_microusd),
            usd(figures.unknown_microusd),
            usd(figures.open_microusd),
            usd(figures.saved_microusd),
            usd(figures.coalesced_microusd),
            *((usd(figures.derived_microusd),) if derived else ()),
            usd(figures.would_cost_microusd),
            percent(figures.spared_rate),
        )

    calls = (
        f"{count(total.settled_calls)} calls settled, {count(total.unknown_calls)} unknown, {total.open_calls:,} open."
    )
    if total.unasked_microusd:
        calls += f" {usd(total.unasked_microusd)} of spent made pictures that no request was answered with."
    return Table(
        title="Money",
        columns=(
            *by,
            "spent",
            "unknown ≤",
            "open ≤",
            "saved ~",
            "of it coalesced",
            *(("of it derived",) if derived else ()),
            "would have cost ~",
            "saved, share",
        ),
        rows=_rows(len(by), groups, total, cells),
        texts=len(by),
        has_total=True,
        note=f"{calls} The provider's bill: {bill(total)}. ~: estimated from prices. ≤: at most.",
    )


def bill(total: Figures) -> str:
    """What the provider can have billed, in words."""
    if total.most_microusd == total.spent_microusd:
        return usd(total.spent_microusd)
    return f"from {usd(total.spent_microusd)} to {usd(total.most_microusd)}"


def latency_table(total: Figures) -> Table:
    """How long answers took, by where they came from."""
    rows = tuple(
        (
            str(way),
            count(latency.answers),
            seconds(latency.mean_s),
            *(at_most(latency, each / 100) for each in _PERCENTS),
        )
        for way, latency in total.latency.items()
    )
    return Table(
        title="Time to answer",
        columns=("answered by", "pictures", "mean", *(f"p{each}" for each in _PERCENTS)),
        rows=rows,
        note=f"p50, p95, p99: {DEFINITIONS['latency']}",
    )


def _parts_table(by: tuple[str, ...], groups: Sequence[Group], total: Figures) -> Table:
    def cells(figures: Figures) -> tuple[str, ...]:
        share = figures.requests / total.requests if total.requests else None
        return count(figures.requests), percent(share), count(figures.degraded)

    return Table(
        title="Requests",
        columns=(*by, "requests", "of all", "degraded"),
        rows=_rows(len(by), groups, total, cells),
        texts=len(by),
        has_total=True,
    )


def _rows(texts: int, groups: Sequence[Group], total: Figures, cells: _Cells) -> tuple[tuple[str, ...], ...]:
    """A row for each group and one for all. Of very many groups, the most asked: their number is no reader's matter."""
    shown = [(*(name or NONE for name in group.names), *cells(group.figures)) for group in groups[:_MOST_GROUPS]]
    left_out = len(groups) - len(shown)
    blank = ("",) * (texts - 1)
    name = f"total, with {left_out} not shown" if left_out else "total"
    return (*shown, (name, *blank, *cells(total)))


def csv_text(report: Report) -> str:
    """A row per group with exact money, and a header."""
    stream = io.StringIO()
    by = tuple(str(field) for field in report.by)
    writer = csv.DictWriter(stream, (*by, *flat_facts(report.total)), lineterminator="\n")
    writer.writeheader()
    for group in report.groups:
        writer.writerow(dict(zip(by, group.names, strict=True)) | flat_facts(group.figures))
    return stream.getvalue()


# ── over time, and against another period ───────────────────────────────────────────────────────────────────────


def sparklines(report: Report) -> list[tuple[str, str, str]]:
    """Hit rate and money over time: a name, a line of blocks, and between which figures it moves."""
    together = math.ceil(len(report.series) / _SPARKLINE)
    starts = range(0, len(report.series), together)
    parts = [add_figures(point.figures for point in report.series[at : at + together]) for at in starts]
    rates = [part.hit_rate for part in parts]
    known = [rate for rate in rates if rate is not None]
    spent = [part.spent_microusd for part in parts]
    saved = [part.saved_microusd for part in parts]
    each = f"each {step_name(report.period, together)}"
    lowest_to_highest = f"{percent(min(known))} to {percent(max(known))}" if known else NONE
    return [
        ("hit rate", sparkline(rates), f"{lowest_to_highest}, {each}"),
        ("spent", sparkline(spent), f"{usd(min(spent))} to {usd(max(spent))}, {each}"),
        ("saved", sparkline(saved), f"{usd(min(saved))} to {usd(max(saved))}, {each}"),
    ]


def comparison(report: Report, other: Report) -> Table:
    """This period against `other`, and how far each figure moved."""
    now, then = report.total, other.total
    tiers = [tier for tier in TierName if tier in now.hits_by_tier or tier in then.hits_by_tier]
    rates = [
        ("hit rate", now.hit_rate, then.hit_rate),
        *((f"hit rate, {tier}", now.tier_rate(tier), then.tier_rate(tier)) for tier in tiers),
        ("not paid", now.unpaid_rate, then.unpaid_rate),
        ("saved of what it would have cost", now.spared_rate, then.spared_rate),
    ]
    counts = [
        ("requests", now.requests, then.requests),
        ("answered", now.answered, then.answered),
        ("hits", now.hits, then.hits),
        ("collapsed", now.collapsed, then.collapsed),
        *((("derived", now.derived, then.derived),) if now.derived or then.derived else ()),
        ("misses", now.misses, then.misses),
        ("errors", now.count(Outcome.ERROR), then.count(Outcome.ERROR)),
        ("degraded", now.degraded, then.degraded),
    ]
    money = [
        ("spent", now.spent_microusd, then.spent_microusd),
        ("unknown, at most", now.unknown_microusd, then.unknown_microusd),
        ("saved", now.saved_microusd, then.saved_microusd),
        ("would have cost", now.would_cost_microusd, then.would_cost_microusd),
    ]
    rows = (
        *((name, percent(new), percent(old), _points(new, old)) for name, new, old in rates),
        *((name, count(new), count(old), _change(new, old)) for name, new, old in counts),
        *((name, usd(new), usd(old), _change(new, old)) for name, new, old in money),
    )
    note = "" if abs(report.period.length - other.period.length) < timedelta(hours=1) else _LENGTHS_DIFFER
    return Table("Compared", ("", stretch(report.period), stretch(other.period), "change"), rows, note=note)


_LENGTHS_DIFFER = "The two periods differ in length: compare rates rather than sums."


def _points(new: float | None, old: float | None) -> str:
    return NONE if new is None or old is None else f"{(new - old) * 100:+.1f} points"


def _change(new: int, old: int) -> str:
    if new == old:
        return "none"
    return f"{(new - old) / old * 100:+,.1f} %" if old else "new"
