"""The one seam a new image passes on its way into the tiers.

Written through: the caller is answered when the last tier has the image, else when a faster one has, else
when memory has (counted `unsaved`). What the last tier did not take is held here and offered again until it
does, so an image outlives an outage of its tiers as long as this process lives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from itertools import count

import structlog

from cacheserver.errors import TierError
from cacheserver.interfaces import Books, Clock, Tier
from cacheserver.model import MAX_VARIANT, CachedImage, CacheKey
from cacheserver.tiers.memory import MemoryCache

_log = structlog.get_logger(__name__)

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class _Held:
    """An image the last tier has yet to take, and the slot it lies in meanwhile."""

    slot: CacheKey
    entry: CachedImage
    replace: bool
    unsaved: bool


class Keeper:
    """Brings entries into memory and the tiers, and holds what the last tier has yet to take."""

    def __init__(
        self,
        *,
        memory: MemoryCache,
        tiers: Sequence[Tier],
        books: Books,
        clock: Clock,
        max_held_bytes: int = 256 * 1024 * 1024,
    ) -> None:
        """`tiers` are the lower ones, fastest first. Beyond `max_held_bytes` nothing more is held."""
        self._memory = memory
        self._tiers = tiers
        self._books = books
        self._clock = clock
        self._max_held_bytes = max_held_bytes
        self._held: dict[str, _Held] = {}
        self._offers: dict[str, asyncio.Task[None]] = {}
        self._writes: dict[asyncio.Task[None], CachedImage] = {}

    def held(self, key: CacheKey) -> CachedImage | None:
        """The entry in slot `key` that the last tier has yet to take."""
        held = self._held.get(key.name)
        return held.entry if held is not None and key.matches(held.entry.key.digest) else None

    async def keep(self, entry: CachedImage, *, replace: bool = False) -> CachedImage:
        """Store a new image and return the entry as stored. No failing tier fails this: what was paid for is kept.

        Without `replace` an image that finds its variant taken in the last tier takes the next free one.
        """
        if not self._tiers:
            self._memory.put(entry.key, entry)
            return entry
        try:
            kept = await self._store(entry, replace=replace)
        except TierError as error:
            _log.warning("last_tier_write_failed", tier=self._tiers[-1].name, error=type(error).__name__)
            await self._hold(entry.key, entry, replace=replace)
            return entry
        self._memory.put(kept.key, kept)
        self._copy(kept.key, kept, self._tiers[:-1], replace=True)
        return kept

    async def keep_stand_in(self, entry: CachedImage) -> None:
        """Store an image paid for while the last tier could not say whether it had this variant.

        It lies in the stand-in slot of the faster tiers, where a reader looks that finds the last tier silent
        or without the variant, and becomes a variant of its own when the last tier is back.
        """
        await self._hold(entry.key.stand_in, entry, replace=False)

    def promote(self, key: CacheKey, entry: CachedImage, tiers: Sequence[Tier]) -> None:
        """Copy a hit into memory and, behind the answer, into the faster `tiers` that missed it."""
        self._memory.put(key, entry)
        self._copy(key, entry, tiers, replace=False)

    def forget(self, match: Callable[[CachedImage], bool]) -> int:
        """Stop writing and holding entries that are being purged; how many were held."""
        for task in [task for task, entry in self._writes.items() if match(entry)]:
            task.cancel()
        names = [name for name, held in self._held.items() if match(held.entry)]
        for name in names:
            self._drop(name)
        return len(names)

    async def aclose(self, grace_s: float) -> None:
        """Await what is being written and offer what is held once more, all within `grace_s`."""
        for offer in self._offers.values():
            offer.cancel()
        last_tries = [asyncio.create_task(self._settle(name)) for name in self._held]
        if pending := {*last_tries, *self._writes}:
            _, late = await asyncio.wait(pending, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if self._held:
            _log.error("images_not_in_last_tier_at_shutdown", images=len(self._held), tier=self._tiers[-1].name)

    async def _store(self, entry: CachedImage, *, replace: bool) -> CachedImage:
        """Write to the last tier, which alone decides who holds a variant number."""
        for variant in count(entry.key.variant):
            if variant > MAX_VARIANT:
                raise TierError("every variant number of this identity is taken")
            numbered = with_fields(entry, key=entry.key.with_variant(variant))
            if await self._tiers[-1].put(numbered.key, numbered, replace=replace and variant == entry.key.variant):
                return numbered
        raise AssertionError("count() has no end")

    async def _hold(self, slot: CacheKey, entry: CachedImage, *, replace: bool) -> None:
        self._memory.put(slot, entry)
        writes = (self._try(tier.put(slot, entry, replace=True), tier) for tier in self._tiers[:-1])
        saved = any(await asyncio.gather(*writes))
        held_bytes = sum(held.entry.size_bytes for held in self._held.values())
        if held_bytes + entry.size_bytes > self._max_held_bytes:
            _log.error("image_not_held", size_bytes=entry.size_bytes, held_bytes=held_bytes, saved=saved)
            return
        self._drop(slot.name)
        self._held[slot.name] = _Held(slot, entry, replace, unsaved=not saved)
        self._books.unsaved(int(not saved))
        task = asyncio.create_task(self._offer(slot.name), name="offer")
        self._offers[slot.name] = task
        task.add_done_callback(_report_bug)

    async def _offer(self, name: str) -> None:
        wait_s = _FIRST_RETRY_S
        while name in self._held:
            await self._clock.sleep(wait_s)
            wait_s = min(2 * wait_s, _LAST_RETRY_S)
            await self._settle(name)

    async def _settle(self, name: str) -> None:
        """Offer a held image to the last tier once; if it takes it, the image leaves its makeshift slot."""
        held = self._held[name]
        try:
            kept = await self._store(held.entry, replace=held.replace)
        except TierError:
            return  # still held: offered again, and named at shutdown
        if self._held.get(name) is not held:
            return
        self._release(name)
        if held.slot != kept.key:
            self._memory.delete(held.slot)
        self._memory.put(kept.key, kept)
        self._copy(kept.key, kept, self._tiers[:-1], replace=True)

    def _drop(self, name: str) -> None:
        if name in self._held:
            self._offers[name].cancel()
            self._release(name)

    def _release(self, name: str) -> None:
        held = self._held.pop(name)
        del self._offers[name]
        self._books.unsaved(-int(held.unsaved))

    def _copy(self, key: CacheKey, entry: CachedImage, tiers: Sequence[Tier], *, replace: bool) -> None:
        for tier in tiers:
            task = asyncio.create_task(self._write(tier, key, entry, replace=replace), name=f"copy to {tier.name}")
            self._writes[task] = entry
            task.add_done_callback(self._writes.pop)
            task.add_done_callback(_report_bug)

    async def _write(self, tier: Tier, key: CacheKey, entry: CachedImage, *, replace: bool) -> None:
        await self._try(tier.put(key, entry, replace=replace), tier)

    async def _try(self, write: Coroutine[None, None, bool], tier: Tier) -> bool:
        try:
            return await write
        except TierError as error:
            _log.info("copy_not_written", tier=tier.name, error=type(error).__name__)
            return False


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("write_failed", task=task.get_name(), exc_info=error)
