"""Removing images from every tier, on command.

The one operation that fails when a tier cannot be reached: everywhere else a broken tier is a slower answer,
here it would be a picture that comes back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace

from cacheserver.errors import TierError, TierUnreachableError
from cacheserver.interfaces import Tier
from cacheserver.keep import Keeper
from cacheserver.model import (
    MAX_VARIANT,
    REVIEW_PREFIX,
    CachedImage,
    CacheKey,
    Labels,
    Namespace,
    TierName,
)
from cacheserver.tiers.memory import MemoryCache

_AT_ONCE = 32
_KEYS_PER_TURN = 20
"""Of memory, after which others get their turn: to free a large picture takes half a millisecond."""


@dataclass(frozen=True, slots=True)
class PurgeSelector:
    """What to remove: one picture, all variants of one identity, a tag, or (none of these) all of a namespace.

    Only images that `namespace` stored, whoever else reads its partition. With a picture go its renditions.
    """

    namespace: Namespace
    key: CacheKey | None = None
    identity: CacheKey | None = None
    tag: str | None = None

    @property
    def in_review(self) -> PurgeSelector:
        """The same among the pictures that wait for review."""
        return PurgeSelector(
            replace(self.namespace, partition=REVIEW_PREFIX + self.namespace.partition),
            key=None if self.key is None else self.key.in_review,
            identity=None if self.identity is None else self.identity.in_review,
            tag=self.tag,
        )

    def takes(self, key: CacheKey, labels: Labels | None) -> bool:
        """Whether what lies under `key`, which may be meant, is by its labels; what is too damaged to have any is."""
        if labels is None:
            return True
        if labels.namespace != self.namespace.name or (self.tag is not None and self.tag not in labels.tags):
            return False
        # Of which picture it is a rendition, its key does not tell.
        return not key.is_rendition or self._names(labels.derived_from)

    def takes_entry(self, entry: CachedImage) -> bool:
        """Whether this entry is meant."""
        key = entry.key
        is_named = key.is_rendition or self._names(key.name)
        is_other_identity = self.key is not None and not key.is_rendition and not self.key.matches(key.digest)
        if key.partition != self.namespace.partition or not is_named or is_other_identity:
            return False
        return self.takes(key, Labels(entry.namespace, entry.tags, entry.derived_from))

    def _names(self, name: str) -> bool:
        """Whether the picture of this name is the one, or one of those, to remove, as far as the name tells."""
        if self.key is not None and name != self.key.name:
            return False
        return self.identity is None or name.rpartition(".")[0] == self.identity.identity_name


@dataclass(frozen=True, slots=True)
class PurgeResult:
    """How many pictures were (or would be) removed, and how many copies in each tier. Renditions do not count."""

    images: int
    per_tier: dict[TierName, int] = field(default_factory=dict)

    def __add__(self, other: PurgeResult) -> PurgeResult:
        counts = Counter(self.per_tier) + Counter(other.per_tier)
        per_tier = {tier: counts[tier] for tier in (*self.per_tier, *other.per_tier)}
        return PurgeResult(self.images + other.images, per_tier)


class Purger:
    """Walks memory and the tiers, slowest first, so that nothing purged is read back into a faster one."""

    def __init__(self, *, memory: MemoryCache, tiers: Sequence[Tier], keeper: Keeper) -> None:
        """`tiers` are the lower ones, fastest first."""
        self._memory = memory
        self._tiers = tiers
        self._keeper = keeper

    async def purge(self, selector: PurgeSelector, *, dry_run: bool) -> PurgeResult:
        """Remove (or only count) what `selector` takes. Raises TierUnreachableError after doing all it could."""
        if dry_run:
            return await self._purge(selector, dry_run=True)
        async with self._keeper.purging(selector.takes_entry) as silent:
            return await self._purge(selector, dry_run=False, silent=silent)

    async def _purge(self, selector: PurgeSelector, *, dry_run: bool, silent: Sequence[TierName] = ()) -> PurgeResult:
        names: set[str] = set()
        per_tier: dict[TierName, int] = {}
        silent = list(silent)
        for tier in reversed(self._tiers):
            try:
                copies = await self._purge_tier(tier, selector, dry_run=dry_run)
            except TierError:
                silent.append(tier.name)
                continue
            per_tier[tier.name] = len(copies)
            names |= copies
        copies = await self._purge_memory(selector, dry_run=dry_run)
        per_tier[TierName.MEMORY] = len(copies)
        if silent:
            raise TierUnreachableError(silent)
        return PurgeResult(len(names | copies), per_tier)

    async def _purge_memory(self, selector: PurgeSelector, *, dry_run: bool) -> set[str]:
        names = set()
        for number, key in enumerate(self._memory.scan(selector.namespace.partition)):
            if number % _KEYS_PER_TURN == _KEYS_PER_TURN - 1:
                await asyncio.sleep(0)  # what is kept meanwhile is not lost sight of: see `Keeper.purging`
            entry = self._memory.peek(key)  # to be looked through is no use
            if entry is not None and selector.takes_entry(entry):
                if not key.is_rendition:
                    names.add(entry.key.name)
                if not dry_run:
                    self._memory.delete(key)
        return names

    async def _purge_tier(self, tier: Tier, selector: PurgeSelector, *, dry_run: bool) -> set[str]:
        names: set[str] = set()
        batch: list[CacheKey] = []
        async for key in _candidates(tier, selector):
            batch.append(key)
            if len(batch) == _AT_ONCE:
                names |= await _purge_batch(tier, batch, selector, dry_run=dry_run)
                batch.clear()
        return names | await _purge_batch(tier, batch, selector, dry_run=dry_run)


async def _purge_batch(tier: Tier, keys: Sequence[CacheKey], selector: PurgeSelector, *, dry_run: bool) -> set[str]:
    labels = await asyncio.gather(*(tier.labels(key) for key in keys))
    taken = [key for key, label in zip(keys, labels, strict=True) if selector.takes(key, label)]
    if not dry_run:
        await asyncio.gather(*(tier.delete(key) for key in taken))
    return {key.made_for.name for key in taken if not key.is_rendition}


async def _candidates(tier: Tier, selector: PurgeSelector) -> AsyncIterator[CacheKey]:
    """The keys of a tier that may be meant, stand-ins and renditions included; only such as are there."""
    named = selector.key or selector.identity
    if named is None:
        async for key in tier.scan(selector.namespace.partition):
            yield key
        return
    for key in await tier.renditions(named):
        yield key
    for block in _blocks(selector):
        present = [key for key, is_there in zip(block, await tier.find(block), strict=True) if is_there]
        for key in present:
            yield key
        if not present:
            return  # variants are numbered without gaps as long as a block


def _blocks(selector: PurgeSelector) -> Iterator[list[CacheKey]]:
    if selector.key is not None:
        yield [selector.key, selector.key.stand_in]
    elif selector.identity is not None:
        for start in range(0, MAX_VARIANT, _AT_ONCE):
            keys = [selector.identity.with_variant(variant) for variant in range(start, start + _AT_ONCE)]
            yield [slot for key in keys for slot in (key, key.stand_in)]
