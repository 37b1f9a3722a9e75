"""The one seam a new image passes on its way into the tiers.

Written through: the caller is answered when the last tier has the image, else when a faster one has, else
when memory has (counted `unsaved`). What the last tier did not take is held here and offered again until it
does, so an image outlives an outage of its tiers as long as this process lives.

An image is held from the moment it is handed over, before anything awaits, and is brought home by a task of
ours: a caller that is cancelled, or a load that is cut short at shutdown, loses nothing that was paid for.
Every write is a task too, and writes to one place (a key in a tier) follow one another: what was asked for
last is what lies there in the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from functools import partial
from typing import Any

import structlog

from cacheserver.errors import EntryTooLargeError, TierError
from cacheserver.interfaces import Books, Clock, Tier
from cacheserver.model import MAX_VARIANT, CachedImage, CacheKey, TierName
from cacheserver.tasks import end
from cacheserver.tiers.memory import MemoryCache

_log = structlog.get_logger(__name__)

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_LAST_S = 1.0
"""For what is written at shutdown though there is no time left."""

_Place = tuple[TierName, str]


@dataclass(eq=False, slots=True)
class _Held:
    """An image the last tier has yet to take, and the slot it lies in meanwhile.

    `kept` is done once the caller may be answered; `task` brings the image home. `lies_there` says whether it
    was put into the slot in memory and the faster tiers, `unsaved` that none of these took it. At shutdown the slot
    of one that lies nowhere yet becomes its stand-in. `since_s` (monotonic) is when it was handed over.
    """

    slot: CacheKey
    entry: CachedImage
    replace: bool
    since_s: float
    kept: asyncio.Future[CachedImage]
    lies_there: bool = False
    unsaved: bool = False
    task: asyncio.Task[None] = field(init=False)


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
        """`tiers` are the lower ones, fastest first. Beyond `max_held_bytes` nothing more is offered again."""
        self._memory = memory
        self._tiers = tiers
        self._books = books
        self._clock = clock
        self._max_held_bytes = max_held_bytes
        self._held: dict[str, _Held] = {}
        self._writes: dict[asyncio.Task[bool], CachedImage] = {}
        self._last_writes: dict[_Place, asyncio.Task[bool]] = {}
        self._outdated: dict[_Place, asyncio.Task[None]] = {}
        self._changes = 0
        self._purging = asyncio.Lock()
        self._closing = False

    # ── what is here ────────────────────────────────────────────────────────────────────────────────────────

    def held(self, key: CacheKey) -> CachedImage | None:
        """The fresh entry in slot `key` that the last tier has yet to take."""
        held = self._held.get(key.name)
        if held is None or not key.matches(held.entry.key.digest) or not held.entry.is_fresh(self._clock.now_s()):
            return None
        return held.entry

    def is_outdated(self, tier: Tier, key: CacheKey) -> bool:
        """Whether `tier` may still have what lay under `key` before it was replaced."""
        return (tier.name, key.name) in self._outdated

    @property
    def held_images(self) -> int:
        """How many images the last tier has yet to take."""
        return len(self._held)

    @property
    def oldest_held_s(self) -> float:
        """For how many seconds the oldest of them has been held; 0 where none is."""
        now_s = self._clock.monotonic_s()
        return max((now_s - held.since_s for held in self._held.values()), default=0.0)

    @property
    def changes(self) -> int:
        """How often entries were replaced or purged so far."""
        return self._changes

    def is_current(self, changes: int) -> bool:
        """Whether nothing was replaced or purged since `changes` was read, nor is being purged now.

        What was read before such a change must not be written after it: it would come back.
        """
        return changes == self._changes and not self._purging.locked()

    # ── coming in ───────────────────────────────────────────────────────────────────────────────────────────

    def keep(self, entry: CachedImage, *, replace: bool = False) -> asyncio.Future[CachedImage]:
        """Store a new image; await the entry as stored. No failing tier fails this: what was paid for is kept.

        Without `replace` an image that finds its variant taken takes the next free one.
        """
        return asyncio.shield(self._hold(entry.key, entry, replace=replace).kept)

    def keep_stand_in(self, entry: CachedImage) -> asyncio.Future[CachedImage]:
        """Store an image paid for while the last tier could not say whether it had this variant.

        It lies in the stand-in slot of the faster tiers, where a reader looks that finds the last tier silent
        or without the variant, and becomes a variant of its own when the last tier is back.
        """
        return asyncio.shield(self._hold(entry.key.stand_in, entry, replace=False).kept)

    async def keep_in_last(self, entry: CachedImage, put: Callable[[], Awaitable[bool]] | None = None) -> bool:
        """Store an image in the last tier alone; on True it has acknowledged exactly these bytes, see `Tier.put`.

        It is not held: raises TierError where the last tier does not take it, or has yet to take another image of
        this number. `put` is called in place of the last tier's own. There has to be a last tier.
        """
        if entry.key.name in self._held:
            raise TierError("the last tier has yet to take another image of this number")
        return await asyncio.shield(self._write(self._tiers[-1], entry.key, entry, replace=False, put=put))

    async def keep_if_free(self, entry: CachedImage, *, changes: int) -> bool:
        """Store an image that has cost nothing, but never over another one; False if its key has another.

        It is not held: where the last tier does not take it, memory alone has it. It is answered with and not stored if
        what it was made from, read when `changes` was, is not current any more.
        """
        if (held := self._held.get(entry.key.name)) is not None:
            return held.entry.image.sha256 == entry.image.sha256
        if not self.is_current(changes):
            return True
        faster = self._tiers[:-1]
        try:
            if not await self._take_number(entry, replace=False):
                return False
        except TierError:
            faster = ()
        self.promote(entry.key, entry, faster, changes=changes)
        return True

    def promote(self, key: CacheKey, entry: CachedImage, tiers: Sequence[Tier], *, changes: int) -> None:
        """Copy a hit into memory and, behind the answer, into the faster `tiers` that missed it.

        Does nothing unless what was read when `changes` was is still current.
        """
        if self.is_current(changes):
            self._memory.put(key, entry)
            for tier in tiers:
                self._write(tier, key, entry, replace=False)

    async def copy(self, tier: Tier, key: CacheKey, entry: CachedImage, *, changes: int) -> bool:
        """Copy an entry into one faster tier, and nowhere else; whether the tier has it now.

        Does nothing unless what was read when `changes` was is still current. Raises TierError.
        """
        if not self.is_current(changes):
            return False
        return await asyncio.shield(self._write(tier, key, entry, replace=False))

    @asynccontextmanager
    async def purging(self, match: Callable[[CachedImage], bool]) -> AsyncIterator[None]:
        """The time of a purge: nothing is promoted, what matches is held no more, and no write of it still runs."""
        async with self._purging:
            self._changes += 1
            for held in [held for held in self._held.values() if held.kept.done() and match(held.entry)]:
                self._drop(held)
            await _ended([task for task, entry in self._writes.items() if match(entry)])
            try:
                yield
            finally:
                self._changes += 1

    async def aclose(self, grace_s: float) -> None:
        """Offer what is held once more and await what is being written, all within `grace_s`.

        What no tier has yet is written to the faster tiers meanwhile: should the last one hang, the next life finds
        it there. That has a second even without any grace, and if this is cancelled.
        """
        self._closing = True
        places = [place for held in list(self._held.values()) for place in self._save_meanwhile(held)]
        last_tries = [asyncio.create_task(self._try_last(held)) for held in self._held.values()]
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await _ended(last_tries)
                    while self._writes:
                        await _ended(self._writes)
        finally:
            try:
                await self._ended_at(places)
            finally:
                keeping = [held.task for held in self._held.values()]
                await end([*last_tries, *keeping, *self._writes, *self._outdated.values()])
        if self._held:
            _log.error("images_not_in_last_tier_at_shutdown", images=len(self._held), tier=self._tiers[-1].name)

    # ── one image's way home ────────────────────────────────────────────────────────────────────────────────

    def _hold(self, slot: CacheKey, entry: CachedImage, *, replace: bool) -> _Held:
        while not replace and not slot.is_stand_in and (other := self._held.get(slot.name)) is not None:
            if other.entry.image.sha256 == entry.image.sha256:
                return other
            slot = slot.with_variant(slot.variant + 1)
            entry = with_fields(entry, key=slot)
        if (predecessor := self._held.get(slot.name)) is not None:
            self._drop(predecessor)
        kept: asyncio.Future[CachedImage] = asyncio.get_running_loop().create_future()
        held = _Held(slot, entry, replace, self._clock.monotonic_s(), kept)
        self._held[slot.name] = held
        held.task = asyncio.create_task(self._bring_home(held), name="keep")
        held.task.add_done_callback(partial(_ended_bringing, held))
        return held

    async def _bring_home(self, held: _Held) -> None:
        if not held.slot.is_stand_in and await self._offer(held):
            return
        await self._save(held)
        wait_s = _FIRST_RETRY_S
        while self._is_held(held) and not self._closing:
            await self._clock.sleep(wait_s)
            wait_s = min(2 * wait_s, _LAST_RETRY_S)
            if await self._offer(held):
                return

    def _save_meanwhile(self, held: _Held) -> list[_Place]:
        """Write an image that no tier has yet to the faster ones; the places where it will lie.

        Before the last tier has said whose the number is, that is the stand-in slot: no key names two pictures. For
        review nobody looks for stand-ins, nor is given what lies there: it waits under its number if that is free.
        """
        waits_for_review = held.slot != held.slot.reviewed
        if not (held.lies_there or held.replace or held.slot.is_stand_in or waits_for_review):
            if held.slot.stand_in.name in self._held:
                return []  # it has been a stand-in, and lies there
            del self._held[held.slot.name]
            held.slot = held.slot.stand_in
            self._held[held.slot.name] = held
        if held.unsaved or not held.lies_there:
            held.lies_there = True
            for tier in self._tiers[:-1]:
                self._write(tier, held.slot, held.entry, replace=held.replace or held.slot.is_stand_in)
        return [(tier.name, held.slot.name) for tier in self._tiers[:-1]]

    async def _ended_at(self, places: Sequence[_Place]) -> None:
        """Await what is being written at these places, or deleted after that, for a moment at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await _ended([self._last_writes[place] for place in places if place in self._last_writes])
                await _ended([self._outdated[place] for place in places if place in self._outdated])

    async def _try_last(self, held: _Held) -> None:
        if held.kept.done():
            held.task.cancel()
        else:
            await _ended([held.task])
        if self._is_held(held):
            await self._offer(held)

    async def _offer(self, held: _Held) -> bool:
        """Offer an image to the last tier once; whether there is nothing more to do for it."""
        try:
            kept = await self._store(held)
        except EntryTooLargeError:
            _log.error("image_too_large_for_last_tier", size_bytes=held.entry.size_bytes, tier=self._tiers[-1].name)
            await self._save(held)
            self._release(held)
            return True
        except TierError:
            return False
        if self._is_held(held):
            self._release(held)
            self._settle(held, kept)
        _answer(held, kept)
        return True

    async def _store(self, held: _Held) -> CachedImage:
        """Write to the last tier, which alone decides who holds a variant number."""
        entry = held.entry
        if await self._take_number(entry, replace=held.replace) or await self._oust_derived(held):
            return entry
        for variant in range(entry.key.variant + 1, MAX_VARIANT + 1):
            numbered = with_fields(entry, key=entry.key.with_variant(variant))
            if await self._take_number(numbered, replace=False):
                return numbered
        raise TierError("every variant number of this identity is taken")

    async def _oust_derived(self, held: _Held) -> bool:
        """Take the number from a picture that was derived while this one was made: it makes room for any other."""
        holder = await self._holder(held.entry.key)
        if holder is None or not holder.derived_by or not await self._take_number(held.entry, replace=True):
            return False
        held.replace = True
        return True

    async def _holder(self, key: CacheKey) -> CachedImage | None:
        """What holds a number; of one in the last tier all but the bytes."""
        if not self._tiers:
            return self._memory.get(key)
        head = await self._tiers[-1].head(key)
        return None if head is None else head.bare

    async def _take_number(self, entry: CachedImage, *, replace: bool) -> bool:
        if self._tiers:
            return await asyncio.shield(self._write(self._tiers[-1], entry.key, entry, replace=replace))
        holder = self._memory.get(entry.key)
        return replace or holder is None or holder.image.sha256 == entry.image.sha256

    def _settle(self, held: _Held, kept: CachedImage) -> None:
        """The last tier has it: copy it into memory and the faster tiers, and clear its makeshift slot."""
        self._memory.put(kept.key, kept)
        if held.replace:
            self._changes += 1
        for tier in self._tiers[:-1]:
            write = self._write(tier, kept.key, kept, replace=True)
            if held.replace:
                self._outdate(tier, kept.key, write)
        if held.lies_there and held.slot != kept.key:
            self._memory.delete(held.slot)
            for tier in self._tiers[:-1]:
                self._outdate(tier, held.slot)

    async def _save(self, held: _Held) -> None:
        """Put an image the last tier did not take where else it can be, and answer the caller."""
        if self._is_held(held):
            held.lies_there = True
            self._memory.put(held.slot, held.entry)
            if held.replace:
                self._changes += 1
            writes = [self._write(tier, held.slot, held.entry, replace=True) for tier in self._tiers[:-1]]
            await _ended(writes)
            self._count(held, is_saved=any(_is_written(write) for write in writes))
        _answer(held, held.entry)

    def _count(self, held: _Held, *, is_saved: bool) -> None:
        """Count an image that no lower tier has, and hold it no more if too much is held."""
        if not self._is_held(held):
            return
        self._books.unsaved(int(not is_saved) - int(held.unsaved))
        held.unsaved = not is_saved
        held_bytes = sum(other.entry.size_bytes for other in self._held.values() if other.kept.done())
        if held_bytes + held.entry.size_bytes > self._max_held_bytes:
            _log.error("image_not_held", size_bytes=held.entry.size_bytes, held_bytes=held_bytes, saved=is_saved)
            self._release(held)

    def _is_held(self, held: _Held) -> bool:
        return self._held.get(held.slot.name) is held

    def _drop(self, held: _Held) -> None:
        """Hold an image no more. Whoever still waits for it is answered, and that ends its way."""
        self._release(held)
        if held.kept.done():
            held.task.cancel()

    def _release(self, held: _Held) -> None:
        if self._is_held(held):
            del self._held[held.slot.name]
            self._books.unsaved(-int(held.unsaved))

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────

    def _write(
        self,
        tier: Tier,
        key: CacheKey,
        entry: CachedImage,
        *,
        replace: bool,
        put: Callable[[], Awaitable[bool]] | None = None,
    ) -> asyncio.Task[bool]:
        place = tier.name, key.name
        put = put or partial(tier.put, key, entry, replace=replace)
        writing = _after(self._last_writes.get(place), put)
        task = self._last_writes[place] = asyncio.create_task(writing, name=f"write to {tier.name}")
        self._writes[task] = entry
        task.add_done_callback(partial(self._written, place))
        return task

    def _written(self, place: _Place, task: asyncio.Task[bool]) -> None:
        del self._writes[task]
        if self._last_writes[place] is task:
            del self._last_writes[place]
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, TierError):
            _log.info("tier_write_failed", tier=place[0], error=type(error).__name__)
        else:
            _log.error("tier_write_broken", tier=place[0], exc_info=error)

    def _outdate(self, tier: Tier, key: CacheKey, write: asyncio.Task[bool] | None = None) -> None:
        """See to it that `tier`'s copy is not read again before `write` has replaced it, or else it is deleted."""
        place = tier.name, key.name
        if (before := self._outdated.get(place)) is not None:
            before.cancel()
        task = self._outdated[place] = asyncio.create_task(self._replace_copy(tier, key, write), name="replace copy")
        task.add_done_callback(partial(self._replaced, place))

    def _replaced(self, place: _Place, task: asyncio.Task[None]) -> None:
        if self._outdated[place] is task:
            del self._outdated[place]
        _report_bug(task)

    async def _replace_copy(self, tier: Tier, key: CacheKey, write: asyncio.Task[bool] | None) -> None:
        if write is not None:
            await _ended([write])
            if _is_written(write):
                return
        elif (before := self._last_writes.get((tier.name, key.name))) is not None:
            await _ended([before])
        wait_s = _FIRST_RETRY_S
        while not await _is_deleted(tier, key):
            await self._clock.sleep(wait_s)
            wait_s = min(2 * wait_s, _LAST_RETRY_S)


def _answer(held: _Held, entry: CachedImage) -> None:
    if not held.kept.done():
        held.kept.set_result(entry)


def _ended_bringing(held: _Held, task: asyncio.Task[None]) -> None:
    """Nobody waits for ever, even if the task was cut off at shutdown or died of a bug."""
    if not held.kept.done():
        error = None if task.cancelled() else task.exception()
        held.kept.cancel() if error is None else held.kept.set_exception(error)
    _report_bug(task)


def _report_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("task_failed", task=task.get_name(), exc_info=error)


async def _after(before: asyncio.Task[bool] | None, put: Callable[[], Awaitable[bool]]) -> bool:
    if before is not None:
        await _ended([before])
    return await put()


async def _is_deleted(tier: Tier, key: CacheKey) -> bool:
    try:
        await tier.delete(key)
    except TierError:
        return False
    return True


def _is_written(write: asyncio.Task[bool]) -> bool:
    return not write.cancelled() and write.exception() is None


async def _ended(tasks: Collection[asyncio.Task[Any]]) -> None:
    if tasks:
        await asyncio.wait(tasks)
