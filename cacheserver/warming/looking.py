"""Where the pictures of many items are: duplicates left out, one pass per tier for a whole batch of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from cacheserver.cache import PromptCache
from cacheserver.model import Found, TierName, WarmResult
from cacheserver.warming.values import Batch, WarmItem, WarmOutcome, WarmTotals, slowest


@dataclass(frozen=True, slots=True)
class Sight:
    """An item and what is known of its pictures: the slowest tier that has one, and how many no tier has."""

    item: WarmItem
    tier: TierName | None
    missing: int
    in_flight: bool

    @property
    def is_cached(self) -> bool:
        """Whether tiers have all that the item asks for. Of a picture's age they are not asked."""
        return not (self.missing or self.in_flight or self.item.ask.terms.max_age_s is not None)


class Seen:
    """Which pictures were asked for so far: some 120 bytes for each identity, however long its prompt."""

    def __init__(self) -> None:
        self._most: dict[bytes, int] = {}

    def is_new(self, item: WarmItem) -> bool:
        """Whether the item asks for a picture that none before it did; notes it."""
        name = f"{item.ask.terms.cache_policy}.{item.ask.identity.key.identity_name}"
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        n = item.ask.terms.n
        if self._most.get(digest, 0) >= n:
            return False
        self._most[digest] = n
        return True


class Looking:
    """Looks batch by batch, and counts what it sees."""

    def __init__(self, cache: PromptCache, totals: WarmTotals) -> None:
        self._cache = cache
        self._totals = totals
        self._seen = Seen()

    async def look(self, batch: Batch) -> tuple[list[WarmOutcome], list[Sight]]:
        """What needs no more doing, and what is known of the others. Nothing is read or promoted."""
        outcomes, items = self.sort_out(batch)
        keys = [key for item in items if not item.is_refresh for key in item.keys]
        found, silent = await self._cache.find(keys)
        self._totals.unknown_tiers.update(silent)
        places = iter(found)
        sights = [_sight(item, places) for item in items]
        self._totals.in_flight += sum(sight.in_flight for sight in sights)
        return outcomes, sights

    def sort_out(self, batch: Batch) -> tuple[list[WarmOutcome], list[WarmItem]]:
        """The failures and duplicates of a batch as outcomes, and the items that are left."""
        self._totals.items += len(batch)
        outcomes: list[WarmOutcome] = []
        items: list[WarmItem] = []
        for each in batch:
            if isinstance(each, WarmOutcome):
                outcomes.append(each)
            elif self._seen.is_new(each):
                items.append(each)
            else:
                outcomes.append(WarmOutcome(each.row, WarmResult.DUPLICATE, each.keys))
        return outcomes, items


def _sight(item: WarmItem, places: Iterator[Found]) -> Sight:
    n = item.ask.terms.n
    if item.is_refresh:
        return Sight(item, None, missing=n, in_flight=False)
    found = [next(places) for _ in range(n)]
    tiers = [each.tier for each in found if each.tier is not None]
    missing = sum(each.tier is None and not each.in_flight for each in found)
    return Sight(item, slowest(tiers) if tiers else None, missing, in_flight=any(each.in_flight for each in found))
