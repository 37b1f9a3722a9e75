"""A report in sentences: what a reader wants to know first, each as a name and what there is to say."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cacheserver.client import StatsSpan
from cacheserver.reports.numbers import ENOUGH_ANSWERED, Figures, Group, Report, judged, worst
from cacheserver.reports.sizes import Sizes
from cacheserver.reports.tables import bill, count, mib, moment, percent, stretch, usd

Headline = tuple[str, str]


def headlines(report: Report, sizes: Sizes | None = None) -> list[Headline]:
    """The sentences, the most asked for first."""
    total = report.total
    return [
        _spent_line(total),
        _saved_line(total),
        _hit_line(total),
        *_observed_line(total),
        _worst_line(report.by_namespace),
        doubling_line(sizes),
        _estimated_line(total),
    ]


def _spent_line(total: Figures) -> Headline:
    text = f"{usd(total.spent_microusd)} for {count(total.settled_calls)} calls to upstreams whose cost is known."
    if total.unasked_microusd:
        text += f" {usd(total.unasked_microusd)} of it made pictures that no request was answered with, as warm-ups do."
    if total.unknown_calls:
        text += f" {count(total.unknown_calls)} more, at most {usd(total.unknown_microusd)}, have an unknown outcome."
    if total.open_calls:
        text += f" {count(total.open_calls)}, at most {usd(total.open_microusd)}, have not ended."
    if total.most_microusd != total.spent_microusd:
        text += f" So the provider's bill is {bill(total)}."
    return "Spent:", text


def _saved_line(total: Figures) -> Headline:
    text = (
        f"about {usd(total.saved_microusd)} of the {usd(total.would_cost_microusd)} that all pictures would have cost "
        f"({percent(total.spared_rate)}). "
    )
    hits_microusd = total.saved_microusd - total.coalesced_microusd - total.derived_microusd
    text += (
        f"Hits saved {usd(hits_microusd)}; requests that joined a load under way (collapsed) saved "
        f"{usd(total.coalesced_microusd)}."
    )
    if total.derived:
        text += f" Pictures made from others that were stored (derived) saved {usd(total.derived_microusd)}."
    if total.unasked_microusd:
        left = total.saved_microusd - total.unasked_microusd
        text += f" Less the {usd(total.unasked_microusd)} for pictures that no request was answered with: {usd(left)}."
    return "Saved:", text


def _hit_line(total: Figures) -> Headline:
    tiers = ", ".join(f"{tier} {percent(total.tier_rate(tier))}" for tier in total.hits_by_tier) or "no tier had any"
    derived = f" and {count(total.derived)} derived from others" if total.derived else ""
    return "Hit rate:", (
        f"{percent(total.hit_rate)} of {count(total.answered)} pictures answered. By tier: {tiers}. "
        f"{count(total.collapsed)} more were collapsed{derived}, so {percent(total.unpaid_rate)} were not paid for."
    )


def _observed_line(total: Figures) -> list[Headline]:
    if not total.observed:
        return []
    text = (
        f"{count(total.observed)} pictures were in a tier, but generated, as their namespace only observes; to serve "
        f"them would have saved about {usd(total.observed_microusd)}."
    )
    return [("Observed:", text)]


def _worst_line(namespaces: Sequence[Group]) -> Headline:
    found = worst(namespaces)
    if found is None:
        return "Worst namespace:", "none: no picture was answered."
    figures = found.figures
    enough = [group for group in judged(namespaces) if group.figures.answered >= ENOUGH_ANSWERED]
    if not enough:
        among = "though all have few pictures"
    elif len(enough) == 1:
        among = f"the only one with at least {ENOUGH_ANSWERED} pictures"
    else:
        among = f"of the {len(enough)} with at least {ENOUGH_ANSWERED} pictures"
    text = (
        f"{found.name}, by hit rate, {among}: {percent(figures.hit_rate)} of {count(figures.answered)} pictures; "
        f"it spent {usd(figures.spent_microusd)}."
    )
    dearest = max(namespaces, key=lambda group: group.figures.spent_microusd)
    if dearest.name != found.name and dearest.figures.spent_microusd > figures.spent_microusd:
        text += f" The one that spent most is {dearest.name}: {usd(dearest.figures.spent_microusd)}."
    observing = [group.name for group in namespaces if group.figures.observed and not found.figures.observed]
    if observing:
        text += f" Not compared, as calls are only observed there: {', '.join(observing)}."
    return "Worst namespace:", text


def period_line(report: Report) -> str:
    """What the report is about."""
    about = f"namespace {report.namespace}" if report.namespace else f"all namespaces ({len(report.by_namespace)})"
    first = report.first_time
    late = first is not None and first - report.period.since >= report.period.step
    since = f"; first figures {_from(first, report.period.span)}" if first and late else ""
    return f"{stretch(report.period)}, {about}{since}"


def _from(first: datetime, span: StatsSpan) -> str:
    """Since when, as exactly as the buckets tell it."""
    return f"on {first:%Y-%m-%d}" if span is StatsSpan.DAY else f"from {moment(first)}"


def doubling_line(sizes: Sizes | None) -> Headline:
    """What a memory level of twice the size would do."""
    name = "Twice the memory level (L1):"
    if sizes is None:
        return name, "not known, as this report was made without the replay of a trace (--what-if)."
    found = sizes.doublings
    if not found:
        return name, "not known, as the replay tried no two sizes of which one is twice the other."
    first, others = found[0].single.kind, {row.kind for row in sizes.rows} - {found[0].single.kind}
    parts = [
        f"from {mib(pair.single.l1_bytes)} to {mib(pair.double.l1_bytes)} its hit rate goes from "
        f"{percent(pair.single.hit_rate)} to {percent(pair.double.hit_rate)} "
        f"({(pair.double.hit_rate - pair.single.hit_rate) * 100:+.1f} points), which saves "
        f"{usd(pair.double.saved_microusd - pair.single.saved_microusd)} more if no slower tier has the pictures"
        for pair in [pair for pair in found if pair.single.kind == first][:3]
    ]
    where = f"{first}: " if others else ""
    return name, f"{where}{'; '.join(parts)}. Estimated by replaying {count(sizes.requests)} requests of a trace."


def _estimated_line(total: Figures) -> Headline:
    has_bounds = total.unknown_calls or total.open_calls
    bounds = " Unknown and open calls are given with the most they can cost." if has_bounds else ""
    return "Measured and estimated:", (
        "counted are all pictures, hits and misses; spent is what the calls to upstreams cost by the provider's own "
        "token counts, or by the price table where it gave none. Estimated are saved and would have cost (what the "
        "same pictures cost by price table, had each been generated), the times to answer (upper bounds from a "
        f"histogram), the calculator, and other sizes of the memory level.{bounds}"
    )
