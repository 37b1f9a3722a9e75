"""A whole miss path for tests: the real scheduler, limits, budgets and ledger over upstreams of the test's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from random import Random
from typing import Any

from cacheserver.control.budgets import LocalBudgets
from cacheserver.generation.generator import Generator
from cacheserver.generation.inputs import Inputs
from cacheserver.generation.limits import LocalLimits
from cacheserver.generation.pool import Lane, Pool, Terms
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.queue import JobQueue
from cacheserver.generation.refusals import Refusals
from cacheserver.generation.scheduler import Scheduler
from cacheserver.generation.scoring import Scorer, TechnicalScorer
from cacheserver.generation.worth import Worth
from cacheserver.interfaces import Books, Budgets, Clock, Ledger, Upstream
from cacheserver.model import Attempt, AttemptOutcome, Budget, GroupLimits


class MemoryLedger:
    """`Ledger` that forgets: rows as they stand now, by id."""

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        self.opened: list[Attempt] = []

    async def open(self, attempt: Attempt) -> None:
        self.opened.append(attempt)
        self.attempts[attempt.id] = attempt

    async def close(self, attempt: Attempt) -> None:
        self.attempts[attempt.id] = attempt

    async def rows(self, *, since_s: float, until_s: float, after: str, limit: int) -> list[Attempt]:
        found = [each for each in self.attempts.values() if since_s <= each.start_time_s < until_s and each.id > after]
        return sorted(found, key=lambda each: each.id)[:limit]

    async def spent_microusd(self, tag: str, *, open_too: bool = False) -> int:
        ours = [each for each in self.attempts.values() if tag in each.tags]
        under_way = [each.estimate_microusd for each in ours if each.outcome is AttemptOutcome.SENT]
        return sum(each.cost_microusd for each in ours) + open_too * sum(under_way)

    @property
    def outcomes(self) -> list[AttemptOutcome]:
        return [attempt.outcome for attempt in self.attempts.values()]


def lanes(upstreams: Sequence[Upstream], models: Sequence[str], **terms: Any) -> list[Lane]:
    """Each upstream a limit group of its own, and known to have the right."""
    if "price_factor" in terms:
        terms["price_factor"] = Decimal(str(terms["price_factor"]))
    return [
        Lane(each, Terms(models=tuple(models), limit_group=each.name, **terms), has_succeeded=True)
        for each in upstreams
    ]


def build_generator(
    of: Sequence[Lane],
    *,
    clock: Clock,
    books: Books,
    ledger: Ledger | None = None,
    budgets: Budgets | None = None,
    limits: Mapping[str, GroupLimits] | None = None,
    scorer: Scorer | None = None,
    queue_max: int = 1_000,
    ladder: Sequence[str] = ("high", "medium", "low"),
    budget: Sequence[Budget] = (),
    **settings: Any,
) -> Generator:
    group_limits = limits or {}
    budgets = budgets or LocalBudgets(budgets=budget, spent=(), clock=clock, books=books)
    here = LocalLimits(limits=group_limits, monotonic_s=clock.monotonic_s)
    pool = Pool(
        of,
        clock=clock,
        books=books,
        month_spend_microusd=budgets.month_spend_microusd,
        images_per_minute=here.images_per_minute,
    )
    scheduler = Scheduler(
        pool=pool,
        limits=here,
        group_limits=group_limits,
        queue=JobQueue(max_jobs=queue_max, max_bytes=64 * 1024 * 1024),
        clock=clock,
        interactive_share=settings.pop("interactive_share", 0.0),
    )
    return Generator(
        pool=pool,
        scheduler=scheduler,
        budgets=budgets,
        ledger=ledger or MemoryLedger(),
        prices=PriceTable.load(),
        worth=Worth(pool=pool, prices=PriceTable.load(), theirs={}),
        refusals=Refusals(ttl_s=600.0, monotonic_s=clock.monotonic_s),
        scorer=scorer or TechnicalScorer(),
        inputs=Inputs(max_bytes=64 * 1024 * 1024, max_pixels=40_000_000),
        books=books,
        clock=clock,
        default_model=of[0].terms.models[0],
        ladder=ladder,
        rng=Random(7),  # noqa: S311 - spreads retries
        **settings,
    )
