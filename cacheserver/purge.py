"""Removing images from every tier, on command.

The one operation that fails when a tier cannot be reached: everywhere else a broken tier is a slower answer,
here it would be a picture that comes back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import structlog

from cacheserver.coherence import Coherence
from cacheserver.epochs import Tombstone
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
from cacheserver.tasks import OwnedTasks
from cacheserver.tiers.memory import MemoryCache

_log = structlog.get_logger(__name__)

_AT_ONCE = 32
_RECLAIMED_AT_ONCE = 4
"""Keys: nobody waits for it, and whoever asks the tiers for pictures shall not wait for it either."""

_KEYS_PER_TURN = 20
"""Of memory, after which others get their turn: to free a large picture takes half a millisecond."""

_LOOKS_PER_TURN = 500
"""At what memory has, of which most is left there: a look takes two microseconds."""


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
    def takes_everything(self) -> bool:
        """Whether it names the whole namespace."""
        return self.key is None and self.identity is None and self.tag is None

    @property
    def tombstone(self) -> Tombstone:
        """What says in all replicas that it was purged, once it has an epoch."""
        name = self.namespace.name
        if self.key is not None:
            return Tombstone.of_key(name, self.key)
        if self.identity is not None:
            return Tombstone.of_identity(name, self.identity)
        if self.tag is not None:
            return Tombstone.of_tag(name, self.tag)
        return Tombstone.of_partition(name, self.namespace.partition)

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
    """How many pictures were (or would be) removed, and how many copies in each tier. Renditions do not count.

    `is_reclaiming`: all of a namespace is gone, its bytes are being removed, and nobody has counted them.
    """

    images: int
    per_tier: dict[TierName, int] = field(default_factory=dict)
    is_reclaiming: bool = False

    def __add__(self, other: PurgeResult) -> PurgeResult:
        counts = Counter(self.per_tier) + Counter(other.per_tier)
        per_tier = {tier: counts[tier] for tier in (*self.per_tier, *other.per_tier)}
        return PurgeResult(self.images + other.images, per_tier, self.is_reclaiming or other.is_reclaiming)


class Purger:
    """Sets tombstones, and then walks memory and the tiers for what they took.

    From its tombstone on nothing is served. To walk the tiers, slowest first, gives back their room; for all of a
    namespace that is done behind the answer, and taken up again by whoever starts next should we end before it does.
    """

    def __init__(self, *, memory: MemoryCache, tiers: Sequence[Tier], keeper: Keeper, coherence: Coherence) -> None:
        """`tiers` are the lower ones, fastest first."""
        self._memory = memory
        self._tiers = tiers
        self._keeper = keeper
        self._coherence = coherence
        self._epochs = coherence.epochs
        self._tasks = OwnedTasks()
        self._reclaiming: asyncio.Task[None] | None = None
        self._forgetting: asyncio.Task[None] | None = None
        self._has_news = False
        coherence.on_news = self._forget_soon

    async def purge(self, selectors: Sequence[PurgeSelector], *, dry_run: bool) -> PurgeResult:
        """Remove (or only count) what any of these takes. Raises TierUnreachableError after doing all it could."""
        if dry_run:
            return sum([await self._walk(each, dry_run=True) for each in selectors], PurgeResult(0))
        silent = await self._coherence.set([each.tombstone for each in selectors])
        if self._coherence.is_lasting and all(each.takes_everything for each in selectors):
            self.reclaim()
            if silent:
                raise TierUnreachableError(silent)
            return PurgeResult(0, is_reclaiming=True)
        result = PurgeResult(0)
        for selector in selectors:
            async with self._keeper.purging(selector.takes_entry) as silent_journal:
                result += await self._walk(selector, dry_run=False, silent=[*silent, *silent_journal])
        return result

    async def origins(self, key: CacheKey) -> list[CacheKey]:
        """The keys from which a picture was carried on under this one.

        None if the last tier cannot say: a purge fails without it, and is asked for again.
        """
        labels = None
        with suppress(TierError):
            labels = await self._tiers[-1].labels(key) if self._tiers else self._memory.labels(key)
        return [] if labels is None else [CacheKey.parse(name) for name in labels.carried_from]

    def reclaim(self) -> None:
        """Begin to remove, behind all else, what is left of purged namespaces."""
        if self._reclaiming is None or self._reclaiming.done():
            self._reclaiming = self._tasks.own(self._reclaim(), "reclaim")

    async def aclose(self) -> None:
        """End what goes on behind; the next life takes it up."""
        await self._tasks.aclose(0)

    async def _reclaim(self) -> None:
        await self._forget()
        given_up: set[Tombstone] = set()
        while todo := [each for each in self._epochs.to_reclaim() if each not in given_up]:
            for tombstone in todo:
                if await self._is_reclaimed(tombstone):
                    await self._coherence.set([tombstone.reclaimed])  # should nobody hear it, it is looked for again
                else:
                    given_up.add(tombstone)

    async def _is_reclaimed(self, tombstone: Tombstone) -> bool:
        """Remove what it took from every tier; whether nothing of it is left there."""
        for tier in reversed(self._tiers):
            try:
                batch: list[CacheKey] = []
                async for key in tier.scan(tombstone.partition):
                    batch.append(key)
                    if len(batch) == _RECLAIMED_AT_ONCE:
                        await asyncio.gather(*map(tier.reclaim, batch))
                        batch.clear()
                await asyncio.gather(*map(tier.reclaim, batch))
            except TierError as error:
                _log.warning("not_reclaimed", tier=tier.name, error=str(error), text="the next start goes on with it")
                return False
        return True

    def _forget_soon(self) -> None:
        """Who looks for purges must not wait for writes to end; what was purged is not served as it is."""
        self._has_news = True
        if self._forgetting is None or self._forgetting.done():
            self._forgetting = self._tasks.own(self._forget_all_news(), "forget what was purged")

    async def _forget_all_news(self) -> None:
        while self._has_news:
            self._has_news = False
            await self._forget()

    async def _forget(self) -> None:
        """Let go of what was purged, here and in other replicas, and see that what was read before does not return."""

        def is_purged(entry: CachedImage) -> bool:
            return self._epochs.is_purged(entry.key, entry)

        def is_gone(entry: CachedImage) -> bool:
            return self._epochs.is_gone(entry.key, entry)

        async with self._keeper.purging(is_purged):
            looks = 0
            for name in self._memory.names():
                looks += _LOOKS_PER_TURN // _KEYS_PER_TURN if self._memory.forget(name, is_gone) else 1
                if looks >= _LOOKS_PER_TURN:
                    await asyncio.sleep(0)
                    looks = 0

    async def _walk(self, selector: PurgeSelector, *, dry_run: bool, silent: Sequence[TierName] = ()) -> PurgeResult:
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
        keys = self._memory.scan(selector.namespace.partition)
        copies = await self._purge_memory(selector.takes_entry, keys, dry_run=dry_run)
        per_tier[TierName.MEMORY] = len(copies)
        if silent:
            raise TierUnreachableError(list(dict.fromkeys(silent)))
        return PurgeResult(len(names | copies), per_tier)

    async def _purge_memory(
        self, match: Callable[[CachedImage], bool], keys: Sequence[CacheKey], *, dry_run: bool = False
    ) -> set[str]:
        names = set()
        for number, key in enumerate(keys):
            if number % _KEYS_PER_TURN == _KEYS_PER_TURN - 1:
                await asyncio.sleep(0)  # what is kept meanwhile is not lost sight of: see `Keeper.purging`
            entry = self._memory.lying(key)
            if entry is not None and match(entry):
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
