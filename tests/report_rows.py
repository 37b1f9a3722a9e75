"""Rows of statistics as a service tells them, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cacheserver.client import Outcome, StatsField, StatsRow, StatsSpan, TierName
from cacheserver.reports import numbers

BOUNDS_S = (0.001, 0.1, 10.0)
SINCE = datetime(2026, 5, 1, tzinfo=UTC)
DAYS = 3
PRICES = {"low": 6_000, "high": 211_000}


def row(outcome: Outcome | None, tier: TierName | None = None, requests: int = 1, **facts: Any) -> StatsRow:
    """One row; what is not given is nothing."""
    nothing = {
        "namespace": "shop",
        "image_bytes": 0,
        "latency_sum_s": 0.0,
        "spent_microusd": 0,
        "saved_microusd": 0,
        "coalesced_microusd": 0,
        "unknown_microusd": 0,
        "degraded": 0,
        "start_time": SINCE,
    }
    return StatsRow(outcome=outcome, tier=tier, requests=requests, **(nothing | facts))


def hits(tier: TierName, requests: int, price: int, bucket: int, **facts: Any) -> StatsRow:
    """Hits of one tier, which saved `price` each and all took a time within one bucket of the histogram."""
    counts = tuple(requests if index == bucket else 0 for index in range(len(BOUNDS_S) + 1))
    saved = requests * price
    more = {"saved_microusd": saved, "would_cost_microusd": saved, "latency_counts": counts}
    return row(
        Outcome.HIT, tier, requests, latency_sum_s=0.0005 * requests, image_bytes=1_000 * requests, **more, **facts
    )


def some_rows() -> list[StatsRow]:
    """Three days of three namespaces and two qualities, every outcome among them."""
    rows = []
    for day in range(DAYS):
        for namespace, times in (("shop", 10), ("blog", 4), ("tiny", 0)):
            for quality, price in PRICES.items():
                key = {
                    "namespace": namespace,
                    "model": "gpt-image-2",
                    "quality": quality,
                    "start_time": SINCE + timedelta(days=day),
                }
                rows += _day(times * (day + 1), price, namespace, key)
    return rows


def _day(times: int, price: int, namespace: str, key: dict[str, Any]) -> list[StatsRow]:
    if not times:  # too few to be compared with others, however bad
        return [_misses(1, price, **key)]
    good = 3 if namespace == "shop" else 1
    return [
        hits(TierName.MEMORY, good * times, price, 0, **key),
        hits(TierName.S3, times, price, 1, **key),
        row(Outcome.STALE, TierName.S3, 1, saved_microusd=price, would_cost_microusd=price, **key),
        row(
            Outcome.COLLAPSED,
            TierName.UPSTREAM,
            2,
            saved_microusd=2 * price,
            coalesced_microusd=2 * price,
            would_cost_microusd=2 * price,
            **key,
        ),
        _misses(3 * times, price, **key),
        row(Outcome.ERROR, None, 5, **key),
        row(Outcome.NOT_CACHED, None, 4, **key),
        row(Outcome.PENDING, TierName.UPSTREAM, 3, **key),
        row(Outcome.NEGATIVE, None, 2, **key),
    ]


def _misses(requests: int, price: int, **key: Any) -> StatsRow:
    return row(
        Outcome.MISS,
        TierName.UPSTREAM,
        requests,
        spent_microusd=requests * price,
        would_cost_microusd=requests * price,
        settled_calls=requests,
        unknown_microusd=price,
        unknown_calls=1,
        open_microusd=2 * price,
        open_calls=2,
        degraded=1,
        latency_counts=(0, 0, requests - 1, 1),
        latency_sum_s=9.0 * requests,
        **key,
    )


def some_period(span: StatsSpan = StatsSpan.DAY) -> numbers.Period:
    """The period that `some_rows` are of."""
    return numbers.Period(SINCE, SINCE + timedelta(days=DAYS), span)


def some_report(by: Sequence[StatsField] = (StatsField.NAMESPACE,)) -> numbers.Report:
    """The report of `some_rows`."""
    return numbers.report(some_rows(), BOUNDS_S, period=some_period(), by=by)
