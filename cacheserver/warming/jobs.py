"""The three things a warm-up can be: a plan, a run that generates, and the filling of one tier."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from cacheserver.cache import PromptCache
from cacheserver.errors import InvalidRequestError
from cacheserver.interfaces import Clock, Generation, Ledger, Tier
from cacheserver.keep import Keeper
from cacheserver.model import TierName
from cacheserver.warming.filling import Filling
from cacheserver.warming.looking import Looking
from cacheserver.warming.pipeline import check_open, work_off
from cacheserver.warming.planning import Plan
from cacheserver.warming.purse import Pace, Purse
from cacheserver.warming.running import Run
from cacheserver.warming.values import Batch, JobOptions, Progress, WarmItem, WarmOutcome, WarmTotals

_GATHERED_ITEMS = 10_000
_GATHERED_CHARACTERS = 8_000_000
"""What a plan looks up at once, at most: so many items, and their prompts."""


class Warming:
    """Runs warm-ups, any number side by side.

    Each method takes batches of items as they come and reads no further ahead than it works. What it holds grows by
    some 120 bytes for each identity it has seen.
    """

    def __init__(  # noqa: PLR0913 - the parts of the house, by keyword
        self,
        *,
        cache: PromptCache,
        tiers: Sequence[Tier],
        keeper: Keeper,
        generation: Generation,
        ledger: Ledger,
        clock: Clock,
    ) -> None:
        """`tiers` are the lower ones, fastest first."""
        self._cache = cache
        self._tiers = tiers
        self._keeper = keeper
        self._generation = generation
        self._ledger = ledger
        self._clock = clock
        self._closing = asyncio.Event()

    def stop(self) -> None:
        """Have what runs end with ShuttingDownError, and whatever begins. What is being paid for goes on."""
        self._closing.set()

    async def plan(self, batches: AsyncIterator[Batch], options: JobOptions) -> AsyncGenerator[Progress, None]:
        """What a run would find and make: the items that would fail, and the sums. Spends and promotes nothing."""
        totals = WarmTotals()
        looking, plan = Looking(self._cache, totals), Plan(self._generation, totals)
        async for batch in _gathered(batches):
            check_open(self._closing)
            done, sights = await looking.look(batch)
            done += [failed for sight in sights if (failed := plan.add(sight)) is not None]
            for outcome in done:
                totals.count(outcome)
            yield Progress([outcome for outcome in done if outcome.error is not None], totals)
        totals.estimated_s = plan.seconds(
            concurrency=options.concurrency, max_images_per_minute=options.max_images_per_minute
        )
        yield Progress((), totals)

    async def run(self, batches: AsyncIterator[Batch], options: JobOptions) -> AsyncGenerator[Progress, None]:
        """Have generated what no tier has; one outcome for each item. Closing it leaves what is being paid for.

        Raises:
            LedgerUnavailableError: what earlier runs have spent cannot be read.
        """
        totals = WarmTotals()
        purse = Purse(options, self._ledger)
        await purse.open()
        run = Run(
            cache=self._cache,
            generation=self._generation,
            clock=self._clock,
            options=options,
            looking=Looking(self._cache, totals),
            purse=purse,
            pace=Pace(options.max_images_per_minute, self._clock),
            totals=totals,
        )
        work = work_off(batches, look=run.look, make=run.make, concurrency=options.concurrency, closing=self._closing)
        async with aclosing(work) as outcomes:
            async for some in outcomes:
                yield Progress(some, totals)
        yield Progress((), totals)

    async def fill(
        self, batches: AsyncIterator[Batch], tier: TierName, *, concurrency: int
    ) -> AsyncGenerator[Progress, None]:
        """Copy into `tier` what slower ones have of these items and it lacks.

        Raises:
            InvalidRequestError: it is no tier that others can fill.
            TierUnreachableError: it cannot be asked.
        """
        filling = self._filling(tier)
        work = work_off(batches, look=filling.look, make=filling.make, concurrency=concurrency, closing=self._closing)
        async with aclosing(work) as outcomes:
            async for some in outcomes:
                yield Progress(some, filling.totals)
        yield Progress((), filling.totals)

    async def fill_from(self, partition: str, tier: TierName, *, concurrency: int) -> AsyncGenerator[Progress, None]:
        """The same for all that the last tier has of a partition; sums only.

        Raises:
            InvalidRequestError: it is no tier that others can fill.
            TierUnreachableError: it cannot be asked, or the last one cannot be listed.
        """
        filling = self._filling(tier)
        keys = filling.keys_of(partition)
        work = work_off(
            keys, look=filling.look_at_keys, make=filling.make, concurrency=concurrency, closing=self._closing
        )
        async with aclosing(work) as outcomes:
            async for _ in outcomes:
                yield Progress((), filling.totals)
        yield Progress((), filling.totals)

    def _filling(self, name: TierName) -> Filling:
        names = [tier.name for tier in self._tiers]
        if name not in names[:-1]:
            can_be = ", ".join(names[:-1]) or "none here"
            raise InvalidRequestError({"options.fill": f"must be a tier with a slower one behind it: {can_be}"})
        place, totals = names.index(name), WarmTotals()
        return Filling(
            tier=self._tiers[place],
            slower=self._tiers[place + 1 :],
            keeper=self._keeper,
            looking=Looking(self._cache, totals),
            totals=totals,
        )


async def _gathered(batches: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
    """Several batches as one: the more keys a tier is asked for at once, the fewer pages of it have to be listed."""
    gathered: list[WarmItem | WarmOutcome] = []
    characters = 0
    async for batch in batches:
        gathered += batch
        characters += sum(len(each.ask.request.prompt) for each in batch if isinstance(each, WarmItem))
        if len(gathered) >= _GATHERED_ITEMS or characters >= _GATHERED_CHARACTERS:
            yield gathered
            gathered, characters = [], 0
    if gathered:
        yield gathered
