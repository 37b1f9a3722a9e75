"""What `cacheserver top` shows: two readings of a service become figures, and figures become a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacheserver.cli.live import live_facts
from cacheserver.cli.output import dollars, size
from cacheserver.client import (
    Alarm,
    AlarmState,
    Budget,
    Live,
    Outcome,
    Stats,
    StatsRow,
    TierName,
    Upstream,
    UpstreamHealth,
)

_HITS = frozenset({Outcome.HIT, Outcome.STALE})
_JUDGED = _HITS | {Outcome.MISS, Outcome.COLLAPSED, Outcome.DERIVED, Outcome.OBSERVED}
_NEARLY_USED_UP = 0.9


@dataclass(frozen=True, slots=True)
class Reading:
    """What a service said at one moment, `read_s` (monotonic, of this machine).

    None: it could not be asked, or with `may_administer` False may not be, for want of the permission admin.
    """

    read_s: float
    stats: Stats
    upstreams: tuple[Upstream, ...] | None = None
    budgets: tuple[Budget, ...] | None = None
    alarms: tuple[Alarm, ...] | None = None
    may_administer: bool = True

    def is_of_one_life(self, other: Reading) -> bool:
        """Whether one process answered both: only then do their counters say what happened between."""
        return self.stats.start_time == other.stats.start_time


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was asked for in `span_s` seconds, and what became of it. Shares are None where nothing was.

    Attributes:
        requests_per_s: Pictures asked for a second.
        errors_per_s: Of these, failed.
        hit_rate: Answered by a tier, as a share of all that was answered with a picture.
        tier_rates: The same for each tier.
        collapsed_rate: Of these, answered by a load that another caller paid for.
        derived_rate: Of these, made from another stored picture.
        p95_s: The bound that 95 of 100 answers did not exceed; None where the service does not tell.
        spent_microusd: Paid upstream meanwhile.
        saved_microusd: Not paid thanks to hits, collapsed and derived ones.
    """

    span_s: float
    requests_per_s: float
    errors_per_s: float
    hit_rate: float | None
    tier_rates: dict[TierName, float]
    collapsed_rate: float | None
    derived_rate: float | None
    p95_s: float | None
    spent_microusd: int
    saved_microusd: int


def traffic(previous: Reading | None, current: Reading) -> Traffic:
    """What happened between two readings of one process; since its start without an earlier one."""
    if previous is None or not previous.is_of_one_life(current):
        previous = None
    before = {} if previous is None else {_key(row): row for row in previous.stats.rows}
    rows = [_since(row, before.get(_key(row))) for row in current.stats.rows]
    total = _since(current.stats.total, None if previous is None else previous.stats.total)
    span_s = max(_span_s(previous, current), 1e-3)
    judged = _requests(rows, _JUDGED)
    tiers = [state.tier for state in current.stats.live.tiers] if current.stats.live else []
    tiers += [row.tier for row in rows if row.outcome in _HITS]
    in_order = dict.fromkeys(tier for tier in tiers if tier is not None)
    return Traffic(
        span_s=span_s,
        requests_per_s=total.requests / span_s,
        errors_per_s=_requests(rows, {Outcome.ERROR}) / span_s,
        hit_rate=_requests(rows, _HITS) / judged if judged else None,
        tier_rates={
            tier: _requests([row for row in rows if row.tier is tier], _HITS) / judged for tier in in_order if judged
        },
        collapsed_rate=_requests(rows, {Outcome.COLLAPSED}) / judged if judged else None,
        derived_rate=_requests(rows, {Outcome.DERIVED}) / judged if judged else None,
        p95_s=current.stats.latency_s(_of_all(rows, total), 0.95),
        spent_microusd=total.spent_microusd,
        saved_microusd=total.saved_microusd,
    )


def facts(previous: Reading | None, current: Reading) -> dict[str, Any]:
    """A frame as JSON can hold it. A p95 above the last bound is None, too."""
    seen = traffic(previous, current)
    is_bounded = seen.p95_s is not None and math.isfinite(seen.p95_s)
    return {
        "start_time": current.stats.start_time.isoformat() if current.stats.start_time else None,
        "traffic": asdict(seen) | {"p95_s": seen.p95_s if is_bounded else None},
        "live": live_facts(current.stats.live),
        "upstreams": None if current.upstreams is None else [asdict(each) for each in current.upstreams],
        "budgets": None if current.budgets is None else [_dated(each, "reset_time") for each in current.budgets],
        "alarms": None if current.alarms is None else [_dated(each, "since") for each in current.alarms],
    }


def frame(previous: Reading | None, current: Reading, *, address: str = "", note: str = "") -> RenderableType:
    """One frame: what happens, what waits, and what is wrong. `note` says what kept a newer one from being read."""
    parts: list[RenderableType] = [_head(current, address)]
    if note:
        parts.append(Text(note, style="bold yellow"))
    seen = traffic(previous, current)
    parts += [*_ringing(current.alarms), Text(), _traffic_lines(seen, previous, current)]
    live = current.stats.live
    if live is not None:
        parts += [Text(), _waiting(live), _tiers(live, seen)]
    if current.upstreams:
        parts += [Text(), _upstreams(current.upstreams)]
    if current.budgets:
        parts += [Text(), _budgets(current.budgets)]
    if not current.may_administer:
        parts += [Text(), Text("upstreams, budgets and alarms need the permission admin", style="dim")]
    return Group(*parts)


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────


def _key(row: StatsRow) -> tuple[object, ...]:
    return row.namespace, row.outcome, row.tier


def _span_s(previous: Reading | None, current: Reading) -> float:
    if previous is not None:
        return current.read_s - previous.read_s
    live, started = current.stats.live, current.stats.start_time
    if live is None or live.time is None or started is None:
        return 0.0
    return (live.time - started).total_seconds()


def _since(row: StatsRow, before: StatsRow | None) -> StatsRow:
    """How a row has grown."""
    if before is None:
        return row
    counts = zip(row.latency_counts, before.latency_counts or [0] * len(row.latency_counts), strict=True)
    return replace(
        row,
        requests=row.requests - before.requests,
        spent_microusd=row.spent_microusd - before.spent_microusd,
        saved_microusd=row.saved_microusd - before.saved_microusd,
        latency_counts=tuple(now - then for now, then in counts),
    )


def _requests(rows: Sequence[StatsRow], outcomes: set[Outcome] | frozenset[Outcome]) -> int:
    return sum(row.requests for row in rows if row.outcome in outcomes)


def _of_all(rows: Sequence[StatsRow], total: StatsRow) -> StatsRow:
    """The total with the latencies of all rows."""
    counted = [row.latency_counts for row in rows if row.latency_counts]
    return replace(total, latency_counts=tuple(map(sum, zip(*counted, strict=True))))


def _dated(value: Budget | Alarm, name: str) -> dict[str, Any]:
    moment = getattr(value, name)
    return asdict(value) | {name: moment.isoformat() if moment else None}


# ── a frame's parts ─────────────────────────────────────────────────────────────────────────────────────────


def _head(current: Reading, address: str) -> Text:
    live, started = current.stats.live, current.stats.start_time
    text = Text("cacheserver", style="bold")
    text.append(f" {address}" if address else "", style="not bold")
    if live is not None and live.time is not None and started is not None:
        up = timedelta(seconds=round((live.time - started).total_seconds()))
        text.append(f"  up {up}  {live.time:%H:%M:%S} UTC", style="not bold")
    return text


def _ringing(alarms: tuple[Alarm, ...] | None) -> list[Text]:
    lines = []
    for alarm in alarms or ():
        if alarm.state is AlarmState.RINGING:
            value = "unknown" if alarm.value is None else f"{alarm.value:.4g}"
            since = f" since {alarm.since:%H:%M:%S}" if alarm.since else ""
            what = f"{alarm.name} rings{since}: {alarm.kind} {alarm.threshold:g}, and it is {value}"
            lines.append(Text(f"{what}  {alarm.runbook_url}", style="bold red"))
    return lines


def _traffic_lines(seen: Traffic, previous: Reading | None, current: Reading) -> RenderableType:
    is_new = previous is None or not previous.is_of_one_life(current)
    total = current.stats.total
    line = Text()
    for what, figure in (
        ("requests/s", f"{seen.requests_per_s:,.1f}"),
        ("hit rate", _percent(seen.hit_rate)),
        ("collapsed", _percent(seen.collapsed_rate)),
        *((("derived", _percent(seen.derived_rate)),) if seen.derived_rate else ()),
        ("p95", _within(seen.p95_s)),
        ("errors/s", f"{seen.errors_per_s:,.1f}"),
    ):
        line.append(f"{what} ", style="dim")
        line.append(f"{figure}   ", style="bold")
    line.append(f"since the start, {seen.span_s:,.0f} s" if is_new else f"in {seen.span_s:.1f} s", style="dim")
    money = Text(f"spent {dollars(total.spent_microusd)}, unknown {dollars(total.unknown_microusd)}")
    money.append(f", saved {dollars(total.saved_microusd)} since the start")
    if not is_new:
        lately = f"spent {dollars(seen.spent_microusd)}, saved {dollars(seen.saved_microusd)} in {seen.span_s:.1f} s"
        money.append(f"   {lately}", style="dim")
    return Group(line, money)


def _waiting(live: Live) -> Text:
    text = Text(f"in flight {live.in_flight:,}   queue ")
    text.append(", ".join(f"{priority.name.lower()} {count:,}" for priority, count in live.queue.items()))
    if live.held_images:
        text.append(
            f"   {live.held_images:,} images wait for the last tier, the oldest for {live.oldest_held_s:,.0f} s",
            style="yellow",
        )
    return text


def _tiers(live: Live, seen: Traffic) -> Table:
    table = _table("tier", "breaker", numbers=("hits", "holds"))
    for state in live.tiers:
        table.add_row(
            state.tier or "",
            "open" if state.breaker_open else "closed",
            _percent(None if state.tier is None else seen.tier_rates.get(state.tier)),
            "-" if state.size_bytes is None else size(state.size_bytes),
            style="red" if state.breaker_open else "",
        )
    return table


def _upstreams(upstreams: tuple[Upstream, ...]) -> Table:
    table = _table("upstream", "health", numbers=("running", "success", "latency", "images/min"))
    for each in upstreams:
        table.add_row(
            each.name,
            each.health or "",
            f"{each.in_flight:,}",
            _percent(each.success_rate),
            "-" if each.latency_s is None else f"{each.latency_s:.1f} s",
            "-" if each.images_per_minute is None else f"{each.images_per_minute:,.0f}",
            style="" if each.health is UpstreamHealth.WELL else "yellow",
        )
    return table


def _budgets(budgets: tuple[Budget, ...]) -> Table:
    table = _table("budget", numbers=("used", "spent", "reserved", "limit"))
    for each in budgets:
        taken = each.spent_microusd + each.reserved_microusd
        used = taken / each.limit_microusd if each.limit_microusd else 1.0
        money = (each.spent_microusd, each.reserved_microusd, each.limit_microusd)
        table.add_row(
            each.name, _percent(used), *map(dollars, money), style="yellow" if used >= _NEARLY_USED_UP else ""
        )
    return table


def _table(*words: str, numbers: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _within(bound_s: float | None) -> str:
    if bound_s is None:
        return "-"
    if not math.isfinite(bound_s):
        return "beyond all bounds"
    return f"≤ {1_000 * bound_s:g} ms" if bound_s < 1 else f"≤ {bound_s:g} s"
