"""The alarms of a service: what they look at in its parts, and whom they tell."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

from cacheserver.accounting.books import CounterBooks
from cacheserver.accounting.reading import Query
from cacheserver.accounting.shared import SharedFigures
from cacheserver.alarms import Alarms, Counts, Webhook
from cacheserver.app.core import Core
from cacheserver.app.miss_path import MissPath
from cacheserver.journal import Journal
from cacheserver.keep import Keeper
from cacheserver.model import Outcome, UpstreamHealth
from cacheserver.tiers.guard import GuardedTier

_HITS = frozenset({Outcome.HIT, Outcome.STALE})
_JUDGED = _HITS | {Outcome.MISS, Outcome.COLLAPSED, Outcome.DERIVED, Outcome.OBSERVED}
_FAILED = frozenset({UpstreamHealth.DOWN, UpstreamHealth.NOT_ENTITLED, UpstreamHealth.NO_QUOTA})
"""What takes an upstream out of the pool other than an operator."""


class ServiceReadings:
    """The `Readings` of a running service."""

    def __init__(
        self,
        *,
        books: CounterBooks,
        journal: Journal | None,
        keeper: Keeper,
        tiers: Sequence[GuardedTier],
        miss_path: MissPath,
    ) -> None:
        self._books = books
        self._journal = journal
        self._keeper = keeper
        self._tiers = tiers
        self._miss_path = miss_path

    def counts(self, namespace: str | None) -> Counts:
        """See `Readings.counts`."""
        stats = self._books.snapshot(None if namespace is None else {namespace})
        rows = stats.rows
        return Counts(
            requests=stats.total.requests,
            hits=sum(row.requests for row in rows if row.outcome in _HITS),
            judged=sum(row.requests for row in rows if row.outcome in _JUDGED),
            errors=sum(row.requests for row in rows if row.outcome is Outcome.ERROR),
            microusd=stats.total.spent_microusd + stats.total.unknown_microusd,
            similar=stats.similar,
        )

    def oldest_held_s(self) -> float:
        """See `Readings.oldest_held_s`."""
        return self._keeper.oldest_held_s

    def journal_share(self) -> float:
        """See `Readings.journal_share`."""
        return 0.0 if self._journal is None else self._journal.share

    def breakers(self) -> Mapping[str, bool]:
        """See `Readings.breakers`."""
        upstreams = {state.name: state.health in _FAILED for state in self._miss_path.pool.states()}
        return upstreams | {tier.name: tier.is_open for tier in self._tiers}


class AllReplicas:
    """The `SharedSpending` of all replicas, from the figures that they tell one another."""

    def __init__(self, figures: SharedFigures) -> None:
        self._figures = figures

    async def spent_microusd(self, *, since_s: float, namespace: str | None) -> int:
        """See `SharedSpending.spent_microusd`."""
        namespaces = None if namespace is None else (namespace,)
        report = await self._figures.report(Query(since_s=since_s, by=(), namespaces=namespaces))
        return sum(row.spent_microusd + row.unknown_microusd + row.open_microusd for row in report.rows)


def build_alarms(core: Core, *, undo: AsyncExitStack) -> Alarms:
    """The alarms that the settings name. Whoever builds them has them `look` from time to time.

    Spending is that of all replicas only where they have a Redis to tell one another of it. Raises ConfigError.
    """
    settings, books, clock, miss_path = core.settings, core.books, core.clock, core.miss_path
    alerting = settings.alerting
    webhook = None
    if alerting.webhook_url is not None:
        webhook = Webhook(
            alerting.webhook_url.get_secret_value(),
            token=alerting.webhook_token.get_secret_value() if alerting.webhook_token else "",
            books=books,
            clock=clock,
            timeout_s=alerting.webhook_timeout_s,
            max_per_hour=alerting.max_notices_per_hour,
        )
        undo.push_async_callback(webhook.aclose)
    return Alarms(
        settings.alarm_rules,
        readings=ServiceReadings(
            books=books, journal=core.journal, keeper=core.keeper, tiers=core.lower.tiers, miss_path=miss_path
        ),
        books=books,
        clock=clock,
        replica=miss_path.replicas.id,
        host=platform.node(),
        shared=AllReplicas(miss_path.figures) if core.lower.control and miss_path.figures else None,
        notices=webhook,
    )
