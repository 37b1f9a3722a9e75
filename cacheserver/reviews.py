"""Pictures that wait for a person's approval before anyone else may have them.

A best candidate that scores too low is paid for, so it is kept; but in a partition of its own, which no caller can
read. Approved, it takes its place among the variants of its request; rejected, it is gone, and the next request
makes another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cacheserver.errors import (
    CorruptEntryError,
    NewerEntryError,
    TierError,
    TierUnreachableError,
    UnknownReviewError,
)
from cacheserver.interfaces import Tier
from cacheserver.keep import Keeper
from cacheserver.model import CachedImage, CacheKey, Namespace, TierName
from cacheserver.tiers.memory import MemoryCache


@dataclass(frozen=True, slots=True)
class Review:
    """A picture that waits. `key` is the one it will have; the picture itself is in `entry`."""

    key: CacheKey
    entry: CachedImage


class Reviews:
    """The pictures that wait for review, in the tiers that hold all others."""

    def __init__(
        self, *, memory: MemoryCache, tiers: Sequence[Tier], keeper: Keeper, namespaces: Iterable[Namespace]
    ) -> None:
        """`tiers` are the lower ones, fastest first. Only `namespaces` with a least score have pictures waiting."""
        self._memory = memory
        self._tiers = tiers
        self._keeper = keeper
        self.replace(namespaces)

    def replace(self, namespaces: Iterable[Namespace]) -> None:
        """From now on these are the namespaces."""
        self._partitions = sorted({each.partition for each in namespaces if each.min_score is not None})

    def hold(self, entry: CachedImage) -> asyncio.Future[CachedImage]:
        """Keep a picture where it waits; await the entry as kept, under its number among those that wait."""
        return self._keeper.keep(replace(entry, key=entry.key.in_review))

    async def find(self, key: CacheKey) -> CachedImage | None:
        """The picture that waits to become `key`'s, None if none does, as far as the tiers can say."""
        slot = key.in_review
        if (entry := self._memory.get(slot) or await self._keeper.read_held(slot)) is not None:
            return entry
        for tier in self._tiers:
            try:
                if (entry := await tier.get(slot)) is not None:
                    return entry
            except TierError:
                continue  # a slower tier may know; if none does, at worst one picture more is made
        return None

    async def page(self, *, after: str, limit: int) -> list[Review]:
        """At most `limit` pictures that wait, by the names of their keys, from the first one after `after` on.

        Fewer only where the list ends: one that is gone meanwhile, or damaged, leaves its place to the next.

        Raises:
            TierUnreachableError: the last tier cannot be asked.
        """
        found: list[Review] = []
        for name in sorted(name for name in await self._waiting() if name > after):
            if len(found) == limit:
                break
            key = CacheKey.parse(name)
            if (entry := await self._read(key)) is not None:
                found.append(Review(key, entry))
        return found

    async def get(self, key: CacheKey) -> CachedImage:
        """The picture that waits to become `key`'s, as the last tier has it: what is decided on.

        Raises:
            UnknownReviewError: no picture waits to become this key's.
            TierUnreachableError: the last tier cannot be asked.
        """
        entry = await self._read(key)
        if entry is None:
            raise UnknownReviewError("No picture of this key waits for review.")
        return entry

    async def approve(self, key: CacheKey) -> CachedImage:
        """Give the picture its place, or the next free one; the entry as everyone may have it now.

        Raises:
            UnknownReviewError: no picture waits to become this key's.
            TierUnreachableError: these tiers cannot be asked; if it has its place, they still have it waiting, too.
        """
        entry = await self.get(key)
        kept = await self._keeper.keep(replace(entry, key=entry.key.reviewed))
        await self._remove(key)
        return kept

    async def reject(self, key: CacheKey) -> None:
        """Remove the picture.

        Raises:
            UnknownReviewError: no picture waits to become this key's.
            TierUnreachableError: these tiers cannot be asked, and may still have it.
        """
        await self.get(key)
        await self._remove(key)

    async def _read(self, key: CacheKey) -> CachedImage | None:
        """What waits under `key`. A faster tier may still have what another replica has resolved: it is not asked."""
        slot = key.in_review
        if (entry := await self._keeper.read_held(slot)) is not None:
            return entry
        if not self._tiers:
            return self._memory.get(slot)
        last = self._tiers[-1]
        try:
            return await last.get(slot)
        except (CorruptEntryError, NewerEntryError):
            return None
        except TierError:
            raise _unreachable([last.name], then="Ask again when it is back.") from None

    async def _waiting(self) -> set[str]:
        """The names of the keys that pictures wait to have."""
        if not self._tiers:
            return {slot.reviewed.name for each in self._partitions for slot in self._memory.scan(_slots_of(each))}
        last = self._tiers[-1]
        try:
            slots = [slot for each in self._partitions async for slot in last.scan(_slots_of(each))]
        except TierError:
            raise _unreachable([last.name], then="Ask again when it is back.") from None
        return {slot.reviewed.name for slot in slots}

    async def _remove(self, key: CacheKey) -> None:
        """Remove what waits: from the last tier only once no other has it, so that it can be tried again."""
        slot = key.in_review
        async with self._keeper.purging(lambda entry: entry.key.name == slot.name) as silent_journal:
            self._memory.delete(slot)
            silent = [
                *silent_journal,
                *(await _silent(self._tiers[:-1], slot) or await _silent(self._tiers[-1:], slot)),
            ]
        if silent:
            raise _unreachable(silent, then="The picture may still wait there: resolve it again.")


async def _silent(tiers: Sequence[Tier], slot: CacheKey) -> list[TierName]:
    """Delete what is in `slot` from every one of `tiers`; those that do not answer."""
    silent: list[TierName] = []
    for tier in tiers:
        try:
            await tier.delete(slot)
        except TierError:
            silent.append(tier.name)
    return silent


def _slots_of(partition: str) -> str:
    return CacheKey(partition, b"", b"", 0).in_review.partition


def _unreachable(tiers: Sequence[TierName], *, then: str) -> TierUnreachableError:
    return TierUnreachableError(tiers, f"No answer from: {', '.join(tiers)}. {then}")
