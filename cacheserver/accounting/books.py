"""The books: plain counters since start, and the same facts as Prometheus metrics."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cacheserver.interfaces import Clock
from cacheserver.model import Outcome, TierName, UpstreamHealth

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(slots=True)
class Row:
    """Counters of one namespace, outcome and tier. Money in micro-dollars."""

    namespace: str = ""
    outcome: Outcome | None = None
    tier: TierName | None = None
    requests: int = 0
    image_bytes: int = 0
    seconds: float = 0.0
    spent_microusd: int = 0
    unknown_microusd: int = 0
    saved_microusd: int = 0
    coalesced_microusd: int = 0
    degraded: int = 0

    def add(self, other: Row) -> None:
        """Add another row's counters to this one's."""
        self.requests += other.requests
        self.image_bytes += other.image_bytes
        self.seconds += other.seconds
        self.spent_microusd += other.spent_microusd
        self.unknown_microusd += other.unknown_microusd
        self.saved_microusd += other.saved_microusd
        self.coalesced_microusd += other.coalesced_microusd
        self.degraded += other.degraded


@dataclass(frozen=True, slots=True)
class Stats:
    """The books at one moment."""

    start_time_s: float
    rows: list[Row]
    total: Row
    paid_unknown: int
    unsaved: int
    upstream_calls: int
    corrupt: dict[TierName, int] = field(default_factory=dict)


class CounterBooks:
    """`Books` kept in plain counters, for `GetStats`, and in a Prometheus registry, for `/metrics`.

    Spent is booked where money is spent, unknown where it may have been, saved where a hit spares it, coalesced (a
    part of saved) where a call joined a load that another paid for: no dollar is in two of spent, unknown and saved.
    """

    def __init__(self, *, clock: Clock, registry: CollectorRegistry) -> None:
        """Counting begins now, into `registry`."""
        self._start_time_s = clock.now_s()
        self._rows: dict[tuple[str, Outcome, TierName | None], Row] = {}
        self._paid_unknown = 0
        self._unsaved = 0
        self._upstream_calls = 0
        self._corrupt: Tally[TierName] = Tally()
        self._metrics = _Metrics(registry)

    def answered(  # noqa: PLR0913 - as many columns as a row of the books
        self,
        namespace: str,
        outcome: Outcome,
        tier: TierName | None,
        *,
        seconds: float,
        image_bytes: int = 0,
        saved_microusd: int = 0,
    ) -> None:
        """One picture was answered."""
        row = self._row(namespace, outcome, tier)
        row.requests += 1
        row.image_bytes += image_bytes
        row.seconds += seconds
        row.saved_microusd += saved_microusd
        if outcome is Outcome.COLLAPSED:
            row.coalesced_microusd += saved_microusd
        tier_label = tier or ""
        self._metrics.requests(namespace, outcome, tier_label).inc()
        self._metrics.request_seconds(outcome, tier_label).observe(seconds)
        if saved_microusd:
            self._metrics.saved.inc(saved_microusd)

    def spent(self, namespace: str, microusd: int) -> None:
        """A call to an upstream was paid for."""
        self._row(namespace, Outcome.MISS, TierName.UPSTREAM).spent_microusd += microusd
        self._metrics.spent.inc(microusd)

    def spent_unknown(self, namespace: str, microusd: int) -> None:
        """A call may have been paid for and nobody knows."""
        self._row(namespace, Outcome.MISS, TierName.UPSTREAM).unknown_microusd += microusd
        self._metrics.spent_unknown.inc(microusd)

    def tier_seconds(self, tier: TierName, op: str, seconds: float) -> None:
        """A tier took this long for `op`."""
        self._metrics.tier_seconds(tier, op).observe(seconds)

    def breaker(self, tier: TierName, *, is_open: bool) -> None:
        """A tier's breaker opened or closed."""
        self._metrics.breaker_open.labels(tier).set(is_open)

    def corrupt(self, tier: TierName) -> None:
        """A damaged entry was found."""
        self._corrupt[tier] += 1
        self._metrics.corrupt.labels(tier).inc()

    def error(self, reason: str) -> None:
        """A call failed for this published reason."""
        self._metrics.errors.labels(reason).inc()

    def upstream_call(self, upstream: str, model: str, result: str, seconds: float) -> None:
        """An upstream was called."""
        self._upstream_calls += 1
        self._metrics.upstream_requests(upstream, result).inc()
        self._metrics.generation_seconds(upstream, model).observe(seconds)

    def upstream_health(self, upstream: str, health: UpstreamHealth) -> None:
        """An upstream's health as it stands now."""
        for each in UpstreamHealth:
            self._metrics.upstream_health.labels(upstream, each).set(each is health)
        self._metrics.breaker_open.labels(upstream).set(health is UpstreamHealth.DOWN)

    def budget_overrun(self, upstream: str, microusd: int) -> None:
        """A call cost so much more than the most it was thought to cost."""
        self._metrics.budget_overrun.labels(upstream).inc(microusd)

    def refused(self, namespace: str, reason: str) -> None:
        """A prompt was refused before anything was looked up or spent."""
        self._metrics.refused.labels(namespace, reason).inc()

    def degraded(self, namespace: str, tier: TierName) -> None:
        """A picture was answered at a lower quality than asked for."""
        self._row(namespace, Outcome.MISS if tier is TierName.UPSTREAM else Outcome.HIT, tier).degraded += 1
        self._metrics.degraded.labels(namespace).inc()

    def paid_unknown(self) -> None:
        """A picture was paid for though the last tier could not be asked."""
        self._paid_unknown += 1
        self._metrics.paid_unknown.inc()

    def unsaved(self, change: int) -> None:
        """So many more (or fewer) images are held that no lower tier has acknowledged."""
        self._unsaved += change
        self._metrics.unsaved.set(self._unsaved)

    def snapshot(self, namespaces: Collection[str] | None) -> Stats:
        """The counters of these namespaces (None: of all) as they stand now."""
        rows = [row for row in self._rows.values() if namespaces is None or row.namespace in namespaces]
        total = Row()
        for row in rows:
            total.add(row)
        return Stats(
            start_time_s=self._start_time_s,
            rows=rows,
            total=total,
            paid_unknown=self._paid_unknown,
            unsaved=self._unsaved,
            upstream_calls=self._upstream_calls,
            corrupt=dict(self._corrupt),
        )

    def _row(self, namespace: str, outcome: Outcome, tier: TierName | None) -> Row:
        key = (namespace, outcome, tier)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = Row(namespace, outcome, tier)
        return row


class _Metrics:
    """The metrics by their public names. No prompt, key or token is ever a label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cacheserver_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"cacheserver_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"cacheserver_{name}", text, labels, registry=registry, buckets=_SECONDS)

        # Those of every call by their labels, each looked up once: it takes as long as to count.
        self.requests = cache(counter("requests", "Pictures asked for", "namespace", "outcome", "tier").labels)
        request_seconds = histogram("request_seconds", "Time to answer a picture", "outcome", "tier")
        self.request_seconds = cache(request_seconds.labels)
        self.tier_seconds = cache(histogram("tier_seconds", "Time a tier took", "tier", "op").labels)
        self.upstream_requests = cache(counter("upstream_requests", "Calls to upstreams", "upstream", "result").labels)
        generation_seconds = histogram("generation_seconds", "Time an upstream took", "upstream", "model")
        self.generation_seconds = cache(generation_seconds.labels)

        self.spent = counter("spent_microusd", "Paid upstream, in micro-dollars")
        self.spent_unknown = counter("unknown_microusd", "At most paid by calls whose outcome nobody knows")
        self.upstream_health = gauge("upstream_health", "1 for the health an upstream has", "upstream", "health")
        self.budget_overrun = counter("budget_overrun_microusd", "Paid above what was set aside", "upstream")
        self.refused = counter("prompts_refused", "Prompts refused before any look-up", "namespace", "reason")
        self.degraded = counter("degraded", "Pictures answered at a lower quality than asked for", "namespace")
        self.saved = counter("saved_microusd", "Not paid thanks to a hit, in micro-dollars")
        self.errors = counter("errors", "Failed calls by published reason", "reason")
        self.breaker_open = gauge("breaker_open", "1 while a tier or upstream is not asked", "tier")
        self.corrupt = counter("corrupt", "Damaged entries found", "tier")
        self.paid_unknown = counter("paid_unknown", "Pictures paid for while the last tier could not be asked")
        self.unsaved = gauge("unsaved", "Images no lower tier has acknowledged yet")
