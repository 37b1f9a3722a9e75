"""A job at work: what no tier has is generated, paced, within the job's budget, after everybody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cacheserver.cache import PromptCache
from cacheserver.errors import CacheServerError, ShuttingDownError, UpstreamError
from cacheserver.interfaces import Clock, Generation
from cacheserver.model import CachePolicy, Pending, Priority, Served, Terms, TierName, WarmResult
from cacheserver.warming.looking import Looking, Sight
from cacheserver.warming.purse import Pace, Purse
from cacheserver.warming.values import Batch, JobOptions, WarmItem, WarmOutcome, WarmTotals, slowest

_TRIES = 4
_KEY_CHARACTERS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a job. Its methods are what the pipeline does with a batch and with an item."""

    cache: PromptCache
    generation: Generation
    clock: Clock
    options: JobOptions
    looking: Looking
    purse: Purse
    pace: Pace
    totals: WarmTotals

    async def look(self, batch: Batch) -> tuple[list[WarmOutcome], list[Sight]]:
        """What is done: failures, duplicates, and what tiers have. The rest has to be made, or waited for."""
        done, sights = await self.looking.look(batch)
        done += [WarmOutcome(s.item.row, WarmResult.CACHED, s.item.keys, s.tier) for s in sights if s.is_cached]
        for outcome in done:
            self.totals.count(outcome)
        return done, [sight for sight in sights if not sight.is_cached]

    async def make(self, sight: Sight) -> WarmOutcome:
        """Have one item made, trying again where that may help. Raises nothing but ShuttingDownError."""
        item, spent = sight.item, 0
        for tries_left in reversed(range(_TRIES)):
            try:
                if item.moderate is not None:
                    await item.moderate()
                outcome = await self._bought(item)
                break
            except ShuttingDownError:
                raise
            except CacheServerError as error:
                spent += (error.cost_microusd or 0) if isinstance(error, UpstreamError) else 0
                outcome = WarmOutcome(item.row, WarmResult.FAILED, item.keys, error=error)
                if not (tries_left and _may_help(error)):
                    break
                await self.clock.sleep(error.retry_after_s or 0.0)
        outcome = replace(outcome, cost_microusd=outcome.cost_microusd + spent)
        self.totals.count(outcome)
        return outcome

    async def _bought(self, item: WarmItem) -> WarmOutcome:
        request, terms = item.ask.request, self._terms(item)
        # For all its pictures, also where tiers seem to have some: one may turn out damaged, or a flight may fail.
        most = self.generation.estimate_microusd(request, terms.n * terms.candidates)
        await self.purse.set_aside(most)
        spent = 0
        try:
            await self.pace.turn(terms.n * terms.candidates)
            answer = await self.cache.get(
                request, item.ask.identity, namespace=item.ask.namespace, caller=item.ask.caller, terms=terms
            )
            outcome = self._outcome(item, answer)
            spent = outcome.cost_microusd
        except UpstreamError as error:
            spent = most if error.cost_microusd is None else error.cost_microusd
            raise
        finally:
            await self.purse.settle(most, spent)
        return outcome

    def _terms(self, item: WarmItem) -> Terms:
        asked = item.ask.terms
        request_id = ""
        if item.is_refresh:  # run again, the job must not pay for it again
            request_id = f"{self.options.tag}:{item.ask.identity.key.digest.hex()[:_KEY_CHARACTERS]}"
        return Terms(
            n=asked.n,
            cache_policy=CachePolicy.REFRESH if item.is_refresh else CachePolicy.USE_CACHE,
            max_age_s=asked.max_age_s,
            ttl_s=asked.ttl_s,
            priority=Priority.WARM_UP,
            request_id=request_id,
            tags=(*asked.tags, self.options.tag),
            candidates=asked.candidates,
        )

    def _outcome(self, item: WarmItem, answer: Sequence[Served] | Pending) -> WarmOutcome:
        if isinstance(answer, Pending):
            # It is made and waits for a person's review: there is nothing to make.
            return WarmOutcome(item.row, WarmResult.CACHED, answer.keys)
        paid = [served for served in answer if served.tier is TierName.UPSTREAM and not served.collapsed]
        self.totals.generated += len(paid)
        result = WarmResult.CACHED
        if paid:
            result = WarmResult.GENERATED
        elif any(served.collapsed for served in answer):
            result = WarmResult.COLLAPSED
        return WarmOutcome(
            item.row,
            result,
            [served.entry.key for served in answer],
            slowest([served.tier for served in answer]),
            sum(served.cost_microusd for served in answer),
        )


def _may_help(error: CacheServerError) -> bool:
    """Whether trying again may help: told so by the error, and not if it may have cost something nobody knows."""
    if isinstance(error, UpstreamError) and error.cost_microusd is None:
        return False
    return error.retry_after_s is not None
