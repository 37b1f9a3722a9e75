"""What was answered, as Prometheus metrics: read from the books when somebody asks, for every hit writes in those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cacheserver.figures import LATENCY_BOUNDS_S, Key, Row, Sums
from cacheserver.model import Outcome, StatsField

_BUCKETS = [*map(floatToGoString, LATENCY_BOUNDS_S), "+Inf"]


class AnsweredMetrics(Collector):
    """Counters of the pictures that were answered."""

    def __init__(self, rows: Callable[[], Sequence[Row]]) -> None:
        """`rows` are the books by namespace, outcome and tier, since the start."""
        self._rows = rows

    def collect(self) -> Iterator[Metric]:
        """The metrics as they stand now."""
        rows = [row for row in self._rows() if row.requests]
        yield _requests(rows)
        yield _request_seconds(rows)
        yield _saved(rows)
        yield _derived_saved(rows)
        yield _degraded(rows)


def _requests(rows: Sequence[Row]) -> Metric:
    metric = CounterMetricFamily("cacheserver_requests", "Pictures asked for", labels=("namespace", "outcome", "tier"))
    for row in rows:
        metric.add_metric([row.namespace, row.outcome or "", row.tier or ""], row.requests)
    return metric


def _request_seconds(rows: Sequence[Row]) -> Metric:
    metric = HistogramMetricFamily(
        "cacheserver_request_seconds", "Time to answer a picture", labels=("outcome", "tier")
    )
    for row in _summed(rows, StatsField.OUTCOME, StatsField.TIER):
        buckets = [*zip(_BUCKETS, accumulate(row.latency_counts), strict=True)]
        metric.add_metric([row.outcome or "", row.tier or ""], buckets, row.seconds)
    return metric


def _saved(rows: Sequence[Row]) -> Metric:
    saved_microusd = sum(row.saved_microusd for row in rows)
    return CounterMetricFamily(
        "cacheserver_saved_microusd", "Not paid thanks to a hit, in micro-dollars", saved_microusd
    )


def _derived_saved(rows: Sequence[Row]) -> Metric:
    metric = CounterMetricFamily(
        "cacheserver_derived_saved_microusd",
        "Of it, by pictures made from another one that was stored",
        labels=["namespace"],
    )
    for row in _summed([row for row in rows if row.outcome is Outcome.DERIVED], StatsField.NAMESPACE):
        if row.saved_microusd:
            metric.add_metric([row.namespace], row.saved_microusd)
    return metric


def _degraded(rows: Sequence[Row]) -> Metric:
    metric = CounterMetricFamily(
        "cacheserver_degraded", "Pictures answered at a lower quality than asked for", labels=["namespace"]
    )
    for row in _summed(rows, StatsField.NAMESPACE):
        if row.degraded:
            metric.add_metric([row.namespace], row.degraded)
    return metric


def _summed(rows: Sequence[Row], *by: StatsField) -> list[Row]:
    sums = Sums(by)
    for row in rows:
        sums.add(Key(row.namespace, outcome=row.outcome, tier=row.tier), row)
    return sums.rows
