"""The books: plain counters since start, and the same facts as Prometheus metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cacheserver.accounting.answered import AnsweredMetrics
from cacheserver.figures import BY_DEFAULT, LATENCY_BOUNDS_S, OTHER, Figures, HitRow, Key, Row, Sums, total_of
from cacheserver.interfaces import Clock
from cacheserver.model import AttemptOutcome, MatchLevel, Outcome, StatsField, TierName, Touch, UpstreamHealth


@dataclass(frozen=True, slots=True)
class Stats:
    """The books at one moment. `similar` counts the pictures that were answered for another prompt than their own."""

    start_time_s: float
    rows: list[Row]
    total: Row
    similar: int
    paid_unknown: int
    unsaved: int
    upstream_calls: int
    corrupt: dict[TierName, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToldApart:
    """What the books tell apart beside namespaces, outcomes and tiers: these models and qualities, so many callers.

    Whatever is beyond is counted as "other", so that no caller decides how much there is to count.
    """

    models: frozenset[str]
    qualities: frozenset[str]
    max_callers: int = 100


class CounterBooks:
    """`Books` kept in plain counters, for `GetStats`, and in a Prometheus registry, for `/metrics`.

    Spent is booked where money is spent, unknown where it may have been, saved where a hit spares it, coalesced (a
    part of saved) where a call joined a load that another paid for: no dollar is in two of spent, unknown and saved.
    What rows of pictures that were derived have saved is a part of saved, too.
    What an observed call would have saved was spent: it is what its row would have cost, and nobody's saved.
    """

    def __init__(self, *, clock: Clock, registry: CollectorRegistry, told_apart: ToldApart | None = None) -> None:
        """Counting begins now, into `registry`. Without `told_apart`, models, qualities and callers are not."""
        self._start_time_s = clock.now_s()
        self._told_apart = told_apart
        self._callers: set[str] = set()
        self._cells: dict[tuple[str, str, str, str, Outcome | None, TierName | None], Figures] = {}
        """What was counted since somebody took it."""
        self._times_taken = 0
        self._taken: dict[Key, Figures] = {}
        """What was taken, since the start."""
        self._summed: dict[Key, Figures] = {}
        """The same by namespace, outcome and tier: alarms look at it every few seconds, and nobody waits for that."""
        self._money: dict[str, Figures] = {}
        """What was paid since the start, by namespace."""
        self._similar: Tally[str] = Tally()
        self._paid_unknown = 0
        self._unsaved = 0
        self._upstream_calls = 0
        self._corrupt: Tally[TierName] = Tally()
        self._metrics = _Metrics(registry)
        registry.register(AnsweredMetrics(lambda: self.snapshot(None).rows))

    def answered(  # noqa: PLR0913 - as many columns as a row of the books
        self,
        namespace: str,
        outcome: Outcome,
        tier: TierName | None,
        *,
        seconds: float,
        image_bytes: int = 0,
        saved_microusd: int = 0,
        would_cost_microusd: int = 0,
        model: str = "",
        quality: str = "",
        caller: str = "",
        is_degraded: bool = False,
    ) -> None:
        """One picture was answered."""
        if self._told_apart is None:
            model = quality = caller = ""
        cell = self._cells.get((namespace, model, quality, caller, outcome, tier))
        if cell is None:
            cell = self._cell(Key(namespace, model, quality, caller, outcome, tier))
        cell.requests += 1
        cell.image_bytes += image_bytes
        cell.seconds += seconds
        cell.latency_counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        cell.would_cost_microusd += would_cost_microusd
        if saved_microusd:
            cell.saved_microusd += saved_microusd
            if outcome is Outcome.COLLAPSED:
                cell.coalesced_microusd += saved_microusd
        if is_degraded:
            cell.degraded += 1

    def hit_again(self, row: HitRow, seconds: float, image_bytes: int, saved_microusd: int) -> None:
        """See `Books.hit_again`."""
        if row.taken != self._times_taken or row.figures is None:
            row.figures, row.taken = self._cell(row.key), self._times_taken
        figures = row.figures
        figures.requests += 1
        figures.image_bytes += image_bytes
        figures.seconds += seconds
        figures.latency_counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        figures.saved_microusd += saved_microusd
        figures.would_cost_microusd += saved_microusd

    def spent(self, namespace: str, microusd: int) -> None:
        """A call to an upstream was paid for."""
        self._paid(namespace).count_calls(1, AttemptOutcome.SETTLED, cost_microusd=microusd, estimate_microusd=0)
        self._metrics.spent.inc(microusd)

    def spent_unknown(self, namespace: str, microusd: int) -> None:
        """A call may have been paid for and nobody knows."""
        self._paid(namespace).count_calls(1, AttemptOutcome.UNKNOWN, cost_microusd=microusd, estimate_microusd=0)
        self._metrics.spent_unknown.inc(microusd)

    def similar_hit(self, namespace: str, level: MatchLevel) -> None:
        """A picture was answered that was made for another prompt, which agrees so far."""
        self._similar[namespace] += 1
        self._metrics.similar_hits.labels(namespace, level.name.lower()).inc()

    def verified(self, namespace: str, result: str, cost_microusd: int) -> None:
        """A pair of prompts was judged: "yes", "no", or why nobody could tell."""
        self._metrics.verifications.labels(namespace, result).inc()
        self._metrics.verification_microusd.labels(namespace).inc(cost_microusd)

    def shadow_match(self, namespace: str, *, is_guarded: bool) -> None:
        """See `Books.shadow_match`."""
        self._metrics.shadow_matches.labels(namespace, "guarded" if is_guarded else "to_verify").inc()

    def stale_after_error(self, namespace: str) -> None:
        """A call was answered with stale pictures in place of an error."""
        self._metrics.stale_after_error.labels(namespace).inc()

    def touched(self, tier: TierName, result: Touch) -> None:
        """A tier was told that an entry is asked for."""
        self._metrics.touches.labels(tier, result).inc()

    def renewal(self, namespace: str, result: str) -> None:
        """What became of a stale entry's renewal."""
        self._metrics.renewals.labels(namespace, result).inc()

    def tier_seconds(self, tier: TierName, op: str, seconds: float) -> None:
        """A tier took this long for `op`."""
        self._metrics.tier_seconds(tier, op).observe(seconds)

    def hedged(self, tier: TierName, *, has_won: bool) -> None:
        """A tier was late and the next one was read beside it."""
        self._metrics.hedged.labels(tier, "won" if has_won else "lost").inc()

    def breaker(self, tier: TierName, *, is_open: bool) -> None:
        """A tier's breaker opened or closed."""
        self._metrics.breaker_open.labels(tier).set(is_open)
        self._metrics.corrupt.labels(tier)  # a series that alerts can find before anything happens

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
        self._metrics.budget_overrun.labels(upstream)  # as above

    def budget_overrun(self, upstream: str, microusd: int) -> None:
        """A call cost so much more than the most it was thought to cost."""
        self._metrics.budget_overrun.labels(upstream).inc(microusd)

    def refused(self, namespace: str, reason: str) -> None:
        """A prompt was refused before anything was looked up or spent."""
        self._metrics.refused.labels(namespace, reason).inc()

    def client_fallbacks(self, namespace: str, pictures: int) -> None:
        """A client had so many pictures made without us while it could not reach us."""
        self._metrics.client_fallbacks.labels(namespace).inc(pictures)

    def delivered(self, namespace: str, *, status: int, is_rendition: bool, size_bytes: int) -> None:
        """A picture's URL was answered with this HTTP status."""
        kind = "rendition" if is_rendition else "image"
        self._metrics.delivered(namespace, kind, status).inc()
        if size_bytes:
            self._metrics.delivered_bytes(namespace, kind).inc(size_bytes)

    def paid_unknown(self) -> None:
        """A picture was paid for though the last tier could not be asked."""
        self._paid_unknown += 1
        self._metrics.paid_unknown.inc()

    def unleased(self) -> None:
        """A load is paid for though another replica may pay for the same."""
        self._metrics.unleased.inc()

    def lost(self) -> None:
        """A replica that is gone had yet to bring an image to the last tier, and left no copy in Redis."""
        self._metrics.lost.inc()

    def purges_unseen(self) -> None:
        """One look found nobody who could say what was purged since the last."""
        self._metrics.purges_unseen.inc()

    def alarm(self, alarm: str, *, is_ringing: bool) -> None:
        """An alarm rings from now on, or does not."""
        self._metrics.alarm_ringing.labels(alarm).set(is_ringing)

    def alarm_notice(self, result: str) -> None:
        """What became of a notice of an alarm."""
        self._metrics.alarm_notices.labels(result).inc()

    def unsaved(self, change: int) -> None:
        """So many more (or fewer) images are held that no lower tier has acknowledged."""
        self._unsaved += change
        self._metrics.unsaved.set(self._unsaved)

    def take(self) -> dict[Key, Figures]:
        """What was answered since this was called last. No money: that is not counted by what was answered."""
        cells, self._cells = self._cells, {}
        self._times_taken += 1
        taken = {Key(*key): figures for key, figures in cells.items()}
        for key, figures in taken.items():
            self._taken.setdefault(key, Figures()).add(figures)
            self._summed.setdefault(key.narrowed(BY_DEFAULT), Figures()).add(figures)
        return taken

    def snapshot(self, namespaces: Collection[str] | None, by: Sequence[StatsField] = BY_DEFAULT) -> Stats:
        """The counters of these namespaces (None: of all) as they stand now, in rows told apart by `by`.

        What was paid is known by namespace alone: it stands in rows without model, quality and caller.
        """
        sums = Sums(by)
        counted = ((Key(*key), figures) for key, figures in self._cells.items())
        paid = ((Key(name, "", "", "", Outcome.MISS, TierName.UPSTREAM), each) for name, each in self._money.items())
        taken = self._summed if set(by) <= set(BY_DEFAULT) else self._taken
        for key, figures in chain(taken.items(), counted, paid):
            if namespaces is None or key.namespace in namespaces:
                sums.add(key, figures)
        return Stats(
            start_time_s=self._start_time_s,
            rows=sums.rows,
            total=total_of(sums.rows),
            similar=sum(count for name, count in self._similar.items() if namespaces is None or name in namespaces),
            paid_unknown=self._paid_unknown,
            unsaved=self._unsaved,
            upstream_calls=self._upstream_calls,
            corrupt=dict(self._corrupt),
        )

    def told_apart(self, key: Key) -> Key:
        """What `key` is counted as: "other" where its model, quality or caller is not told apart."""
        if (told := self._told_apart) is None:
            return key._replace(model="", quality="", caller="")
        model = key.model if key.model in told.models or not key.model else OTHER
        # Of a picture that is asked for by its key, it is what a provider or an import said: anything.
        quality = key.quality if key.quality in told.qualities or not key.quality else OTHER
        return key._replace(model=model, quality=quality, caller=self._known_caller(key.caller, told.max_callers))

    def _cell(self, key: Key) -> Figures:
        return self._cells.setdefault(self.told_apart(key), Figures())

    def _known_caller(self, caller: str, most: int) -> str:
        if caller in self._callers or not caller:
            return caller
        if len(self._callers) >= most:
            return OTHER
        self._callers.add(caller)
        return caller

    def _paid(self, namespace: str) -> Figures:
        return self._money.setdefault(namespace, Figures())


class _Metrics:
    """The metrics by their public names. No prompt, key or token is ever a label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cacheserver_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"cacheserver_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"cacheserver_{name}", text, labels, registry=registry, buckets=LATENCY_BOUNDS_S)

        # Those of every call by their labels, each looked up once: it takes as long as to count.
        self.tier_seconds = cache(histogram("tier_seconds", "Time a tier took", "tier", "op").labels)
        self.upstream_requests = cache(counter("upstream_requests", "Calls to upstreams", "upstream", "result").labels)
        generation_seconds = histogram("generation_seconds", "Time an upstream took", "upstream", "model")
        self.generation_seconds = cache(generation_seconds.labels)
        delivered = counter("delivered", "Pictures answered by URL", "namespace", "kind", "status")
        self.delivered = cache(delivered.labels)
        self.delivered_bytes = cache(counter("delivered_bytes", "Their bytes", "namespace", "kind").labels)

        self.spent = counter("spent_microusd", "Paid upstream, in micro-dollars")
        self.spent_unknown = counter("unknown_microusd", "At most paid by calls whose outcome nobody knows")
        self.upstream_health = gauge("upstream_health", "1 for the health an upstream has", "upstream", "health")
        self.budget_overrun = counter("budget_overrun_microusd", "Paid above what was set aside", "upstream")
        self.refused = counter("prompts_refused", "Prompts refused before any look-up", "namespace", "reason")
        self.client_fallbacks = counter("client_fallbacks", "Pictures clients had made while we were away", "namespace")
        self.errors = counter("errors", "Failed calls by published reason", "reason")
        self.breaker_open = gauge("breaker_open", "1 while a tier or upstream is not asked", "tier")
        self.hedged = counter("hedged_reads", "Late reads of a tier beside which the next was read", "tier", "result")
        self.corrupt = counter("corrupt", "Damaged entries found", "tier")
        self.similar_hits = counter(
            "similar_hits",
            "Pictures answered that were made for another prompt, by how far both agree",
            "namespace",
            "level",
        )
        self.verifications = counter(
            "verifications", "Pairs of prompts that a verifier judged, or could not", "namespace", "result"
        )
        self.verification_microusd = counter(
            "verification_microusd", "Micro-dollars that verifications cost", "namespace"
        )
        self.shadow_matches = counter(
            "shadow_matches",
            "Stored prompts that look like one asked for, with no verifier to ask",
            "namespace",
            "result",
        )
        self.stale_after_error = counter(
            "stale_after_error", "Calls answered with stale pictures in place of an upstream's error", "namespace"
        )
        self.touches = counter("touches", "Entries that are asked for, as their tiers were told", "tier", "result")
        self.renewals = counter("renewals", "Renewals of entries served stale", "namespace", "result")
        self.unleased = counter("unleased", "Loads paid for though another replica may have paid for the same")
        self.lost = counter("lost", "Images that a dead replica had yet to bring to the last tier, their copies gone")
        self.purges_unseen = counter(
            "purges_unseen", "Looks at which neither Redis nor the last tier told what was purged"
        )
        self.paid_unknown = counter("paid_unknown", "Pictures paid for while the last tier could not be asked")
        self.alarm_ringing = gauge("alarm_ringing", "1 while an alarm rings", "alarm")
        self.alarm_notices = counter("alarm_notices", "Notices of alarms, by what became of them", "result")
        for result in ("delivered", "failed", "dropped"):
            self.alarm_notices.labels(result)
        self.unsaved = gauge("unsaved", "Images no lower tier has acknowledged yet")
