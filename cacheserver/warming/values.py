"""What goes into a warm-up and what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cacheserver.errors import CacheServerError
from cacheserver.model import Ask, CacheKey, CachePolicy, TierName, WarmResult

DEFAULT_CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How a job is run. Money in micro-dollars; None is unbounded.

    `budget_microusd` is for all runs of the job together; `spent_microusd` of it went in earlier ones, as far as the
    client knows. `concurrency` is how many items are worked on at a time.
    """

    job: str
    budget_microusd: int | None = None
    spent_microusd: int = 0
    max_images_per_minute: int | None = None
    concurrency: int = DEFAULT_CONCURRENCY

    @property
    def tag(self) -> str:
        """The tag of what the job pays for, in the cache and in the ledger."""
        return f"job:{self.job}"


@dataclass(frozen=True, slots=True)
class WarmItem:
    """One request to warm: the first `ask.terms.n` pictures of its identity. `row` is the client's number of it.

    `moderate`, where there is one, is awaited before anything is generated, and raises what refuses the prompt.
    """

    row: int
    ask: Ask
    moderate: Callable[[], Awaitable[object]] | None = None

    @property
    def is_refresh(self) -> bool:
        """Whether its pictures are to be made anew."""
        return self.ask.terms.cache_policy is CachePolicy.REFRESH

    @property
    def keys(self) -> list[CacheKey]:
        """The keys of its pictures."""
        return [self.ask.identity.key.with_variant(variant) for variant in range(self.ask.terms.n)]


@dataclass(frozen=True, slots=True)
class WarmOutcome:
    """What became of one item. `tier` is the slowest that had one of its pictures; `error` only with FAILED."""

    row: int
    result: WarmResult
    keys: Sequence[CacheKey] = ()
    tier: TierName | None = None
    cost_microusd: int = 0
    error: CacheServerError | None = None


Batch = Sequence[WarmItem | WarmOutcome]
"""Items as they come in; one that cannot be read is its FAILED outcome already."""


@dataclass(slots=True)
class WarmTotals:
    """Sums over the items so far. Counts of items, but for `to_generate` and `generated`: those of pictures.

    `cached` is by the slowest tier that had one of an item's pictures. `unpriced` items are not in the estimate.
    `estimated_s` None: nothing bounds it.
    """

    items: int = 0
    duplicates: int = 0
    cached: Counter[TierName] = field(default_factory=Counter)
    in_flight: int = 0
    to_generate: int = 0
    generated: int = 0
    filled: int = 0
    failed: int = 0
    spent_microusd: int = 0
    estimated_microusd: int = 0
    estimated_s: float | None = None
    unpriced: int = 0
    unknown_tiers: set[TierName] = field(default_factory=set)

    def count(self, outcome: WarmOutcome) -> None:
        """Add what became of an item."""
        self.spent_microusd += outcome.cost_microusd
        match outcome.result:
            case WarmResult.DUPLICATE:
                self.duplicates += 1
            case WarmResult.FAILED:
                self.failed += 1
            case WarmResult.FILLED:
                self.filled += 1
            case WarmResult.CACHED if outcome.tier is not None:
                self.cached[outcome.tier] += 1
            case _:
                pass


@dataclass(frozen=True, slots=True)
class Progress:
    """Outcomes, in the order they became known, and the sums over all items so far."""

    outcomes: Sequence[WarmOutcome]
    totals: WarmTotals


def slowest(tiers: Sequence[TierName]) -> TierName:
    """The one of these tiers that is furthest away; TierName lists them by that."""
    return max(tiers, key=list(TierName).index)
