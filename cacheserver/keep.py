"""The one seam a new image passes on its way into the tiers.

    handed over ── journal ──────── once written the picture is safe: its caller is answered when the last tier has
                │                   said under which number it lies, or is late, or fails
                └─ last tier ─┬──── takes it: it goes into memory and the faster tiers, and out of the journal
                              └──── fails: it goes into memory and the faster tiers meanwhile, and waits here

What waits is offered again until the last tier takes it: the journal alone keeps its bytes, so that an outage takes
disk and no memory, and a later life goes on with it. Without a journal, or where it takes nothing, an image is written
through: its caller is answered when the last tier has it, else when a faster one has, else when memory has (counted
`unsaved`), and it outlives an outage as long as this process lives.

An image is held from the moment it is handed over, before anything awaits, and is brought home by a task of
ours: a caller that is cancelled, or a load that is cut short at shutdown, loses nothing that was paid for.
Every write is a task too, and writes to one place (a key in a tier) follow one another: what was asked for
last is what lies there in the end.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from functools import partial
from typing import Any

import structlog

from cacheserver.epochs import Epochs
from cacheserver.errors import CorruptEntryError, EntryTooLargeError, JournalFullError, TierError
from cacheserver.interfaces import Books, Clock, Tier
from cacheserver.journal import Journal, Record, outline
from cacheserver.model import MAX_VARIANT, CachedImage, CacheKey, TierName, Touch, Touched
from cacheserver.tasks import end
from cacheserver.tiers.memory import MemoryCache
from cacheserver.undrained import Mark, Undrained

_log = structlog.get_logger(__name__)

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_LATE_S = 1.0
"""After which a last tier that has not said whose a number is keeps no caller waiting whose picture is safe."""

_LAST_PROBE_S = 10.0
"""Between two offers of one waiting image, by which a last tier that is back is noticed."""

_AT_ONCE = 12
"""Images offered at a time: of the 16 requests that S3 takes at a time by default, so that some are left for hits."""

_STUBBORN = 3
"""After so many refusals it is the image, and not the last tier, that something is wrong with."""

_DISK_S = 10.0
"""After which a journal whose disk has not said that it has an image counts as not having it."""

_ROOM = 0.5
"""Of the journal, which what others had yet to bring may fill: the rest is for what is made here."""

_AT_A_TIME = 1_000
"""Of what is held, after which others get their turn."""

_SHARED_S, _SHARED_LOOK_S = 10.0, 0.1
"""So long other replicas wait for a copy in a tier; then they look for themselves."""

_LAST_S = 1.0
"""For what is written at shutdown though there is no time left."""

_Place = tuple[TierName, str]


async def at_once() -> None:
    """Nothing has to be waited for."""


@dataclass(eq=False, slots=True)
class _Held:
    """An image the last tier has yet to take, and the slot it lies in meanwhile.

    `kept` is done once the caller may be answered, and None once nothing is kept of the answer; `task` brings the image
    home, or offers it anew. `lies_there` says whether it was put into the slot in memory and the faster tiers,
    `unsaved` that nothing took it that outlives us. The slot of one that lies nowhere yet when it has to becomes its
    stand-in. `since_s` (monotonic) is when it was handed over, `handed_over_s` the same by the wall. `record` is its
    place in the journal; of one that waits, `entry` is then an outline. `outdone` are the records of what it takes the
    place of, to go when it is safe itself. `is_restored`: an earlier life left it, and may have put it into its
    stand-in slot. `refusals` is how often the last tier did not take it, `has_copy` whether a
    faster one did. `mark` tells other replicas of it, `is_marked` that they know; `outdone_marks` go with `outdone`.
    """

    slot: CacheKey
    entry: CachedImage
    replace: bool
    since_s: float
    handed_over_s: float
    size_bytes: int
    kept: asyncio.Future[CachedImage] | None
    record: Record | None = None
    outdone: list[Record] = field(default_factory=list)
    has_bytes: bool = True
    is_restored: bool = False
    refusals: int = 0
    has_copy: bool = False
    lies_there: bool = False
    unsaved: bool = False
    mark: Mark | None = None
    is_marked: bool = False
    outdone_marks: list[Mark] = field(default_factory=list)
    task: asyncio.Task[Any] | None = None

    @property
    def is_answered(self) -> bool:
        """Whether the caller may be answered, or was."""
        return self.kept is None or self.kept.done()


class Keeper:
    """Brings entries into memory and the tiers, and holds what the last tier has yet to take."""

    def __init__(  # noqa: PLR0913 - where images go, and two settings
        self,
        *,
        memory: MemoryCache,
        tiers: Sequence[Tier],
        books: Books,
        clock: Clock,
        journal: Journal | None = None,
        copies: bool = False,
        max_held_bytes: int = 256 * 1024 * 1024,
        epochs: Epochs | None = None,
        on_replaced: Callable[[CachedImage], None] = lambda _: None,
        undrained: Undrained | None = None,
        until_last_is_well: Callable[[], Awaitable[object]] = at_once,
    ) -> None:
        """`tiers` are the lower ones, fastest first; the last is offered nothing again before `until_last_is_well`.

        With `copies` nobody is answered from the journal alone: a faster tier has to have the image, too. Of images
        that the journal has not, nothing more is offered again beyond `max_held_bytes`. What `epochs` say was purged is
        not kept. Other replicas are told of what waits by `undrained`.
        """
        self._memory = memory
        self._tiers = tiers
        self._books = books
        self._clock = clock
        self._journal = journal
        self._copies = copies
        self._max_held_bytes = max_held_bytes
        self._epochs = epochs or Epochs()
        self._on_replaced = on_replaced
        self._undrained = undrained or Undrained(clock=clock)
        self._until_last_is_well = until_last_is_well
        self._held: dict[str, _Held] = {}
        self._waiting: OrderedDict[_Held, None] = OrderedDict()
        self._offering_again: asyncio.Task[None] | None = None
        self._offers = 0
        self._writes: dict[asyncio.Task[bool], CachedImage] = {}
        self._last_writes: dict[_Place, asyncio.Task[bool]] = {}
        self._outdated: dict[_Place, asyncio.Task[None]] = {}
        self._changes = 0
        self._purging = asyncio.Lock()
        self._closing = False

    # ── what is here ────────────────────────────────────────────────────────────────────────────────────────

    def held(self, key: CacheKey) -> CachedImage | None:
        """The fresh entry in slot `key` that the last tier has yet to take, if it is in our hands: see `read_held`."""
        held = self._fresh(key)
        return held.entry if held is not None and held.has_bytes and held.is_answered else None

    def is_held(self, key: CacheKey) -> bool:
        """Whether there is one, be it in our hands or in the journal."""
        return bool(self._held) and self._fresh(key) is not None

    async def read_held(self, key: CacheKey) -> CachedImage | None:
        """The fresh entry in slot `key` that the last tier has yet to take, once it is safe to hand it out."""
        held = self._fresh(key)
        if held is None:
            return None
        if held.kept is not None:
            await asyncio.wait({held.kept})
        return await self._whole(held)

    def _fresh(self, key: CacheKey) -> _Held | None:
        held = self._held.get(key.name)
        if held is None or not key.matches(held.entry.key.digest) or not held.entry.is_fresh(self._clock.now_s()):
            return None
        is_hidden = self._epochs.hides_all or self._epochs.is_purged(held.entry.key, held.entry)
        return None if is_hidden else held

    async def _whole(self, held: _Held) -> CachedImage | None:
        """The entry with its picture; None if the journal, which alone has it, cannot read it."""
        if held.has_bytes:
            return held.entry
        if held.record is None or self._journal is None:
            return None  # it was let go meanwhile
        try:
            return with_fields(await self._journal.read(held.record), key=held.entry.key)
        except CorruptEntryError:
            if self._is_held(held):  # else it was let go meanwhile
                self._books.corrupt(TierName.JOURNAL)
                _log.error("journal_record_damaged", size_bytes=held.size_bytes)
                await self._set_aside(held)
            return None
        except TierError as error:
            _log.error("journal_not_read", error=str(error))
            return None

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
        oldest = next(iter(self._held.values()), None)
        return 0.0 if oldest is None else self._clock.monotonic_s() - oldest.since_s

    @property
    def oldest_in_journal_s(self) -> float:
        """The same of those in the journal, by the wall clock: for earlier lives count too."""
        oldest = next((held for held in self._held.values() if held.record is not None), None)
        return 0.0 if oldest is None else self._clock.now_s() - oldest.handed_over_s

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
        return asyncio.shield(self._hold(entry.key, entry, replace=replace))

    def keep_stand_in(self, entry: CachedImage) -> asyncio.Future[CachedImage]:
        """Store an image paid for while the last tier could not say whether it had this variant.

        It lies in the stand-in slot of the faster tiers, where a reader looks that finds the last tier silent
        or without the variant, and becomes a variant of its own when the last tier is back.
        """
        return asyncio.shield(self._hold(entry.key.stand_in, entry, replace=False))

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

    async def touch(self, entry: CachedImage) -> float | None:
        """See to it that an entry that is asked for stays in all tiers, with the end it has now (see `Tier.touch`).

        For how many seconds there is nothing more to do; None if it is left alone, as what the last tier has yet to
        take, or has no more. Raises TierError.
        """
        changes, lasts_s = self._changes, math.inf
        for tier in reversed(self._tiers):
            if entry.key.name in self._held or not self.is_current(changes) or self.is_outdated(tier, entry.key):
                return None
            touched = await self._touch(tier, entry)
            self._books.touched(tier.name, touched.result)
            if tier is self._tiers[-1]:
                if touched.result in (Touch.ABSENT, Touch.GONE):
                    return None
                self._memory.move_end(entry)
            if touched.result is Touch.ABSENT:
                await self._copy_anew(tier, entry, changes=changes)
            lasts_s = min(lasts_s, touched.lasts_s)
        if not self._tiers:
            self._memory.move_end(entry)
        return lasts_s

    async def _touch(self, tier: Tier, entry: CachedImage) -> Touched:
        touched: list[Touched] = []

        async def touch() -> bool:
            touched.append(await tier.touch(entry.key, entry))
            return True

        await asyncio.shield(self._write(tier, entry.key, entry, replace=False, put=touch))
        return touched[0]

    async def _copy_anew(self, tier: Tier, entry: CachedImage, *, changes: int) -> None:
        """Give a faster tier back what it dropped, if the last has that picture: others may have replaced it."""
        holder = await self._holder(entry.key)
        is_there = holder is not None and holder.image.sha256 == entry.image.sha256
        if is_there and await self.copy(tier, entry.key, entry, changes=changes):
            self._books.touched(tier.name, Touch.COPIED)

    async def shared(self, keys: Collection[CacheKey]) -> None:
        """Wait, for some seconds at most, until every one of what was just kept under these is in a tier."""
        slots = [slot.name for key in keys for slot in (key, key.stand_in, key.in_review)]
        waited_s = 0.0
        while waited_s < _SHARED_S and any(not held.has_copy for held in map(self._held.get, slots) if held):
            await self._clock.sleep(_SHARED_LOOK_S)
            waited_s += _SHARED_LOOK_S

    @asynccontextmanager
    async def purging(self, match: Callable[[CachedImage], bool]) -> AsyncIterator[list[TierName]]:
        """The time of a purge: nothing is promoted, what matches is held no more, and no write of it still runs.

        Gives the tiers that may bring it back: the journal, if it could not remove for good what it should.
        """
        async with self._purging:
            self._changes += 1
            for number, held in enumerate(list(self._held.values())):
                if number % _AT_A_TIME == _AT_A_TIME - 1:
                    await asyncio.sleep(0)
                if held.is_answered and match(held.entry) and self._is_held(held):
                    self._drop(held)
            await _ended([task for task, entry in self._writes.items() if match(entry)])
            silent = await self._silent_journal()
            try:
                yield silent
            finally:
                self._changes += 1

    async def _silent_journal(self) -> list[TierName]:
        if self._journal is None:
            return []
        try:
            # Not only what was held just now: of what the last tier has taken a record may come back with a power cut.
            await self._journal.removed()
        except TierError as error:
            _log.error("journal_not_purged", error=str(error))
            return [TierName.JOURNAL]
        return []

    async def aclose(self, grace_s: float) -> None:
        """Offer what is held once more and await what is being written, all within `grace_s`.

        What no tier has yet is written to the faster tiers meanwhile: should the last one hang, the next life finds
        it there. That has a second even without any grace, and if this is cancelled.
        """
        self._closing = True
        if self._offering_again is not None:
            await end([self._offering_again])
        waiting = deque(self._waiting)
        places = [p for held in list(self._held.values()) if held.has_bytes for p in self._save_meanwhile(held)]
        on_their_way = [held for held in self._held.values() if held not in self._waiting]
        last_tries: list[asyncio.Task[Any]] = [asyncio.create_task(self._try_last(held)) for held in on_their_way]
        many = min(_AT_ONCE, len(waiting))
        last_tries += [asyncio.create_task(self._offer_until_refused(waiting)) for _ in range(many)]
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
                keeping = [held.task for held in self._held.values() if held.task is not None]
                await end([*last_tries, *keeping, *self._writes, *self._outdated.values()])
        if in_journal := sum(held.record is not None for held in self._held.values()):
            _log.info("images_left_in_journal", images=in_journal, text="the next life brings them home")
        if left := len(self._held) - in_journal:
            _log.error("images_not_in_last_tier_at_shutdown", images=left, tier=self._tiers[-1].name)

    # ── one image's way home ────────────────────────────────────────────────────────────────────────────────

    def _hold(self, slot: CacheKey, entry: CachedImage, *, replace: bool) -> asyncio.Future[CachedImage]:
        """Begin to bring an image home; what its caller is answered with."""
        kept: asyncio.Future[CachedImage] = asyncio.get_running_loop().create_future()
        if self._epochs.is_purged(entry.key, entry):
            kept.set_result(entry)  # its caller asked before the purge
            return kept
        while not replace and not slot.is_stand_in:
            if (twin := self._twin(slot, entry)) is not None:
                if twin.kept is not None:
                    return twin.kept
                kept.set_result(with_fields(entry, key=twin.entry.key))
                return kept
            if slot.name not in self._held:
                break
            slot = slot.with_variant(slot.variant + 1)
            entry = with_fields(entry, key=slot)
        now_s = self._clock.now_s()
        held = _Held(slot, entry, replace, self._clock.monotonic_s(), now_s, entry.size_bytes, kept)
        held.record = self._write_down(held)
        self._take_place(held)
        held.task = asyncio.create_task(self._bring_home(held), name="keep")
        held.task.add_done_callback(partial(_ended_bringing, held))
        return kept

    def _twin(self, slot: CacheKey, entry: CachedImage) -> _Held | None:
        """The same picture on its way to the same number already."""
        for place in (slot, slot.stand_in):
            other = self._held.get(place.name)
            if other is not None and other.entry.image.sha256 == entry.image.sha256:
                return other
        return None

    def _take_place(self, held: _Held) -> None:
        """Hold it in its slot. What was held there goes on its way no further, but stays in the journal until then."""
        if (predecessor := self._held.get(held.slot.name)) is not None:
            held.outdone = [*predecessor.outdone, *filter(None, [predecessor.record])]
            predecessor.record, predecessor.outdone = None, []
            held.outdone_marks = [*predecessor.outdone_marks, *filter(None, [predecessor.mark])]
            predecessor.mark, predecessor.outdone_marks = None, []
            self._drop(predecessor)
        self._held[held.slot.name] = held

    def _write_down(self, held: _Held) -> Record | None:
        """Begin to write it into the journal; None where that takes nothing more."""
        if self._journal is None:
            return None
        try:
            return self._journal.append(held.slot, held.entry, replace=held.replace, handed_over_s=held.handed_over_s)
        except (JournalFullError, EntryTooLargeError) as error:
            _log.error("image_not_in_journal", size_bytes=held.size_bytes, reason=error.reason)
            return None

    async def _bring_home(self, held: _Held) -> None:
        late = asyncio.create_task(self._answer_if_late(held), name="answer if late")
        try:
            # Behind many others, or such as the last tier does not take now, it goes by the journal.
            is_busy = held.record is not None and (self._is_refused() or self._offers >= _AT_ONCE)
            if not held.slot.is_stand_in and not is_busy and await self._offer(held):
                return
            await self._save(held)
            entry = held.entry
            if self._is_held(held):
                self._wait_for_last(held)
            _answer(held, entry)
            if held.record is not None:
                _let_go_of_bytes(held)
        finally:
            await end([late])

    def _is_refused(self) -> bool:
        """Whether others wait for the last tier, and not because something is wrong with each of them alone."""
        first = next(iter(self._waiting), None)  # what was refused goes to the end
        return first is not None and first.refusals < _STUBBORN

    async def _is_written_down(self, held: _Held) -> bool:
        """Whether the journal has it, once that is decided, or takes too long to say."""
        if (record := held.record) is None:
            return False
        if record.written is not None:
            await asyncio.wait({record.written}, timeout=_DISK_S)
            if not record.written.done():
                _log.error("journal_hangs", size_bytes=held.size_bytes)
                return False
            if record.written.cancelled() or record.written.exception() is not None:
                if held.record is record:
                    held.record = None
                return False
        if self._journal is not None and self._is_held(held):
            outdone, held.outdone = held.outdone, []
            for each in outdone:
                self._journal.remove(each)
        return True

    async def _answer_if_late(self, held: _Held) -> None:
        """Answer the caller of a picture that is safe in the journal though the last tier has not said where it lies.

        It lies in the stand-in slot of the faster tiers meanwhile.
        """
        if not await self._is_written_down(held):
            return
        await self._clock.sleep(_LATE_S)
        if held.is_answered or not self._is_held(held):
            return
        places = self._save_meanwhile(held)
        held.lies_there = True
        self._memory.put(held.slot, held.entry)
        if held.replace:
            self._changes += 1
        if self._copies:
            await _ended([self._last_writes[place] for place in places if place in self._last_writes])
        _answer(held, held.entry)

    # ── what waits for the last tier ────────────────────────────────────────────────────────────────────────

    def restore(self) -> None:
        """Hold what earlier lives left in the journal, and begin to offer it."""
        for left in self._journal.take_left() if self._journal is not None else ():
            head = left.head
            slot, entry = head.slot, head.outline
            if self._journal is not None and self._epochs.is_purged(entry.key, entry):
                self._journal.remove(left.record)
                continue
            if not head.replace and (twin := self._twin(slot.made_for, entry)) is not None:
                twin.outdone.append(left.record)
                continue
            while not head.replace and not slot.is_stand_in and slot.name in self._held:
                slot = slot.with_variant(slot.variant + 1)
                entry = with_fields(entry, key=slot)
            age_s = max(0.0, self._clock.now_s() - head.handed_over_s)
            held = _Held(
                slot,
                entry,
                head.replace,
                self._clock.monotonic_s() - age_s,
                head.handed_over_s,
                left.record.size_bytes,
                kept=None,
                record=left.record,
                has_bytes=False,
                is_restored=True,
                lies_there=True,  # as far as we know
            )
            self._take_place(held)
            held.mark = _mark_of(held)
            self._undrained.note(held.mark)
            self._wait_for_last(held)

    async def adopt(self, entry: CachedImage, mark: Mark) -> bool:
        """Go on with an image of which a copy is all there is: whoever was to bring it to the last tier is gone.

        False if there is no room for it now. On True the mark is seen to, or no longer needed.
        """
        slot = entry.key
        other = self._held.get(slot.name) if mark.replace else self._twin(slot, entry)
        if other is not None and (not mark.replace or other.handed_over_s >= mark.handed_over_s):
            return other.is_answered  # else it is not safe yet, and may be lost with us
        if self._closing or not self._has_room(entry):
            return False
        while not mark.replace and slot.name in self._held:
            slot = slot.with_variant(slot.variant + 1)
            entry = with_fields(entry, key=slot)
        held = _Held(
            slot,
            entry,
            mark.replace,
            self._clock.monotonic_s() - max(0.0, self._clock.now_s() - mark.handed_over_s),
            mark.handed_over_s,
            entry.size_bytes,
            kept=None,
            is_restored=mark.slot.is_stand_in,
            has_copy=True,
            lies_there=mark.slot.name == slot.name,
            mark=mark,
            is_marked=True,
        )
        held.record = self._write_down(held)
        self._take_place(held)
        self._undrained.note(mark)
        if await self._is_written_down(held):
            _let_go_of_bytes(held)
        else:
            self._count(held, is_saved=True)
        if not self._is_held(held):
            return False  # it was purged meanwhile, or there is no room for it in memory either
        self._wait_for_last(held)
        return True

    def _has_room(self, entry: CachedImage) -> bool:
        if self._journal is not None:
            return self._journal.size_bytes + entry.size_bytes <= _ROOM * self._journal.max_bytes
        return self._held_bytes() + entry.size_bytes <= self._max_held_bytes

    def _held_bytes(self) -> int:
        return sum(held.size_bytes for held in self._waiting if held.record is None)

    def _wait_for_last(self, held: _Held) -> None:
        """Offer it again, after those that wait already."""
        self._waiting[held] = None
        if not self._closing and (self._offering_again is None or self._offering_again.done()):
            self._offering_again = asyncio.create_task(self._offer_again(), name="offer again")
            self._offering_again.add_done_callback(_report_bug)

    async def _offer_again(self) -> None:
        wait_s = _FIRST_RETRY_S
        while self._waiting:
            await self._clock.sleep(wait_s)
            await self._until_last_is_well()
            wait_s = _FIRST_RETRY_S if await self._offer_waiting() else min(2 * wait_s, _LAST_PROBE_S)

    async def _offer_waiting(self) -> bool:
        """Offer what waits to the last tier, many at a time once it has taken one; whether it took any.

        It goes on, also with what comes to wait meanwhile, as long as nothing is refused.
        """
        is_any_taken = is_refused = False
        while self._waiting and not is_refused:
            waiting = deque(self._waiting)
            if not await self._offer_next(waiting):
                break
            is_any_taken = True
            many = range(min(_AT_ONCE, len(waiting)))
            offering = [asyncio.create_task(self._offer_until_refused(waiting), name="offer") for _ in many]
            try:
                await _ended(offering)
            finally:
                await end(offering)
            is_refused = not all(task.result() for task in offering)
        return is_any_taken

    async def _offer_until_refused(self, waiting: deque[_Held]) -> bool:
        """Offer one after another; whether all of them were taken."""
        while waiting:
            if not await self._offer_next(waiting):
                return False
        return True

    async def _offer_next(self, waiting: deque[_Held]) -> bool:
        """Offer the first of them; whether the last tier took it. One that was refused goes behind all others."""
        held = waiting.popleft()
        if not self._is_held(held):
            return True
        held.task = asyncio.create_task(self._offer(held), name="keep")
        held.task.add_done_callback(_report_bug)
        try:
            await _ended([held.task])
        finally:
            await end([held.task])
        held.task = None
        if not self._is_held(held):
            return True
        held.refusals += 1
        self._waiting.move_to_end(held)
        return False

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
            self._copy(held, replace=held.replace or held.slot.is_stand_in)
        return [(tier.name, held.slot.name) for tier in self._tiers[:-1]]

    async def _ended_at(self, places: Sequence[_Place]) -> None:
        """Await what is being written at these places, or deleted after that, for a moment at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await _ended([self._last_writes[place] for place in places if place in self._last_writes])
                await _ended([self._outdated[place] for place in places if place in self._outdated])

    async def _try_last(self, held: _Held) -> None:
        if held.task is not None:
            if held.is_answered:
                held.task.cancel()
            await _ended([held.task])
        if self._is_held(held):
            await self._offer(held)

    async def _offer(self, held: _Held) -> bool:
        """Offer an image to the last tier once; whether there is nothing more to do for it."""
        self._offers += 1
        try:
            return await self._offer_once(held)
        finally:
            self._offers -= 1

    async def _offer_once(self, held: _Held) -> bool:
        entry = await self._whole(held)
        if entry is None:
            return not self._is_held(held)
        has_waited = held in self._waiting
        try:
            if has_waited and await self._is_superseded(held):
                self._give_way(held)
                return True
            kept = await self._store(held, entry)
        except EntryTooLargeError:
            _log.error("image_too_large_for_last_tier", size_bytes=held.size_bytes, tier=self._tiers[-1].name)
            await self._leave_to_the_faster(held, entry)
            return True
        except TierError:
            return False
        if self._is_held(held):
            self._release(held)
            self._settle(held, kept, has_waited=has_waited)
        _answer(held, kept)
        return True

    async def _leave_to_the_faster(self, held: _Held, entry: CachedImage) -> None:
        """Answer with an image that the last tier will never take: faster ones have it, or else it is put aside."""
        held.entry, held.has_bytes = entry, True
        has_copy = await self._save(held, copies=True)
        if held.record is not None and not has_copy and self._is_held(held):
            await self._set_aside(held)
        self._release(held)
        _answer(held, held.entry)

    async def _set_aside(self, held: _Held) -> None:
        """Hold it no more, and put its record where a person may look for it."""
        record, held.record = held.record, None
        self._let_go_of_mark(held)
        self._release(held)
        if self._journal is not None and record is not None:
            await self._journal.set_aside(record)

    async def _store(self, held: _Held, entry: CachedImage) -> CachedImage:
        """Write to the last tier, which alone decides who holds a variant number."""
        if await self._take_number(entry, replace=held.replace) or await self._oust_derived(held, entry):
            return entry
        for variant in range(entry.key.variant + 1, MAX_VARIANT + 1):
            numbered = with_fields(entry, key=entry.key.with_variant(variant))
            if await self._take_number(numbered, replace=False):
                return numbered
        raise TierError("every variant number of this identity is taken")

    async def _is_superseded(self, held: _Held) -> bool:
        """Whether what this one was to replace was replaced since, by a picture made after it was handed over."""
        if not held.replace:
            return False
        holder = await self._holder(held.entry.key)
        return holder is not None and holder.create_time_s > held.handed_over_s

    def _give_way(self, held: _Held) -> None:
        """Let one go that another has replaced, and what lies of it in the faster tiers."""
        if self._is_held(held):
            self._release(held)
            self._changes += 1
            self._memory.delete(held.slot)
            for tier in self._tiers[:-1]:
                self._outdate(tier, held.slot)

    async def _oust_derived(self, held: _Held, entry: CachedImage) -> bool:
        """Take the number from a picture that was derived while this one was made: it makes room for any other."""
        holder = await self._holder(entry.key)
        if holder is None or not holder.derived_by or not await self._take_number(entry, replace=True):
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

    def _settle(self, held: _Held, kept: CachedImage, *, has_waited: bool) -> None:
        """The last tier has it: copy it into memory and the faster tiers, and clear its makeshift slot.

        One that has waited is no news: in memory it would take the place of what is asked for now.
        """
        there = self._memory.peek(kept.key)
        if not has_waited:
            self._memory.put(kept.key, kept)
        elif there is not None and there.image.sha256 != kept.image.sha256:
            self._memory.delete(kept.key)
        if held.replace:
            self._changes += 1
        slots = {held.slot: None} if held.lies_there else {}
        if held.is_restored and not held.replace:  # what takes another's place never stood in for it
            slots[held.entry.key.stand_in] = None
        slots.pop(kept.key, None)
        for slot in slots:
            self._memory.delete(slot)
        for tier in self._tiers[:-1]:
            self._settle_in(tier, held, kept, list(slots), has_waited=has_waited)
        if held.replace:
            self._on_replaced(kept)

    def _settle_in(
        self, tier: Tier, held: _Held, kept: CachedImage, slots: Sequence[CacheKey], *, has_waited: bool
    ) -> None:
        """Have a faster tier hold it under its number, and in none of `slots`.

        Nor is one that has waited news to that: where its copy is gone, it is not sent again.
        """
        lies_as_it_should = held.lies_there and held.slot == kept.key
        if slots and not held.replace and not lies_as_it_should:
            first, *slots = slots
            put = partial(self._moved, tier, first, kept, is_news=not has_waited)
            self._outdate(tier, first, self._write(tier, kept.key, kept, replace=False, put=put))
        else:
            # Over its own copy too, which was to stay for longer.
            write = self._write(tier, kept.key, kept, replace=held.replace or lies_as_it_should)
            if held.replace:
                self._outdate(tier, kept.key, write)
        for slot in slots:
            self._outdate(tier, slot)

    async def _moved(self, tier: Tier, slot: CacheKey, kept: CachedImage, *, is_news: bool) -> bool:
        """Have it lie under its number, whatever was being written into its makeshift slot."""
        if (before := self._last_writes.get((tier.name, slot.name))) is not None:
            await _ended([before])
        is_there = await tier.move(slot, kept.key, kept)
        return await tier.put(kept.key, kept, replace=False) if is_news and not is_there else is_there

    async def _save(self, held: _Held, *, copies: bool = False) -> bool:
        """Put an image the last tier did not take where else it can be: its caller may be answered then.

        Whether a faster tier has it, as far as is known: that is waited for with `copies`, or if the journal has not.
        """
        # First: what a faster tier alone had could be served from there, and never reach the last one.
        is_safe = await self._is_written_down(held)
        if not self._is_held(held):
            return False
        held.lies_there = True
        takes_the_place = held.replace or held.slot.is_stand_in
        if not takes_the_place:
            await self._copy_where_free(held)
            is_safe = await self._is_written_down(held)  # under the number it has now
            if not self._is_held(held):
                return False
        self._memory.put(held.slot, held.entry)
        if held.replace:
            self._changes += 1
        if takes_the_place:
            writes = self._copy(held, replace=True)
            if copies or self._copies or not is_safe:
                await _ended(writes)
        self._count(held, is_saved=(held.has_copy and held.is_marked) or (is_safe and not self._copies))
        return held.has_copy

    async def _copy_where_free(self, held: _Held) -> None:
        """Write it to the faster tiers under the first number that is nobody's there, and hold it under that.

        Another replica may have made the same meanwhile. One that was late, and is answered, keeps the number it has.
        """
        while True:
            writes = self._copy(held, replace=False)
            await _ended(writes)
            holder = self._memory.get(held.slot)
            is_here = holder is not None and holder.image.sha256 != held.entry.image.sha256
            is_taken = is_here or any(_is_written(write) and not write.result() for write in writes)
            if not is_taken or held.is_answered or not self._is_held(held) or held.slot.variant >= MAX_VARIANT:
                return
            for tier, write in zip(self._tiers[:-1], writes, strict=True):
                if not _is_written(write) or write.result():
                    self._outdate(tier, held.slot)
            self._hold_under_next_number(held)

    def _hold_under_next_number(self, held: _Held) -> None:
        del self._held[held.slot.name]
        while True:
            held.slot = held.slot.with_variant(held.slot.variant + 1)
            if held.slot.name not in self._held:
                break
        held.entry = with_fields(held.entry, key=held.slot)
        self._held[held.slot.name] = held
        held.outdone_marks += filter(None, [held.mark])
        held.mark, held.is_marked = None, False
        if held.record is not None and (record := self._write_down(held)) is not None:
            held.outdone.append(held.record)
            held.record = record

    def _copy(self, held: _Held, *, replace: bool) -> list[asyncio.Task[bool]]:
        """Write it to the faster tiers, under the slot it lies in."""
        mark = held.mark = held.mark or _mark_of(held)
        text = self._undrained.note(mark)

        async def marked(put: Callable[[], Awaitable[bool]]) -> bool:
            if not held.is_marked:
                held.is_marked = await self._undrained.tell(text)
            return await put()

        def copied(write: asyncio.Task[bool]) -> None:
            held.has_copy = held.has_copy or (_is_written(write) and write.result())
            if held.has_copy and held.is_marked:
                self._forget_outdone_marks(held)

        writes = []
        for tier in self._tiers[:-1]:
            # The entry as it is now: its picture may be left to the journal before it is written.
            put = partial(tier.put, held.slot, held.entry, replace=replace)
            write = self._write(tier, held.slot, held.entry, replace=replace, put=partial(marked, put))
            write.add_done_callback(copied)
            writes.append(write)
        return writes

    def _count(self, held: _Held, *, is_saved: bool) -> None:
        """Count an image that nothing has that outlives us, and hold it no more if too much is held."""
        if not self._is_held(held):
            return
        self._books.unsaved(int(not is_saved) - int(held.unsaved))
        held.unsaved = not is_saved
        if held.record is not None:
            return  # the journal holds it
        held_bytes = self._held_bytes()
        if held_bytes + held.size_bytes > self._max_held_bytes:
            _log.error("image_not_held", size_bytes=held.size_bytes, held_bytes=held_bytes, saved=is_saved)
            self._let_go_of_mark(held)
            self._release(held)

    def _is_held(self, held: _Held) -> bool:
        return self._held.get(held.slot.name) is held

    def _drop(self, held: _Held) -> None:
        """Hold an image no more. Whoever still waits for it is answered, and that ends its way."""
        self._release(held)
        if held.is_answered and held.task is not None:
            held.task.cancel()

    def _release(self, held: _Held) -> None:
        if self._is_held(held):
            del self._held[held.slot.name]
            self._waiting.pop(held, None)
            self._books.unsaved(-int(held.unsaved))
            self._remove_records(held)
            self._forget_outdone_marks(held)
            if held.mark is not None:
                self._undrained.forget(held.mark)

    def _let_go_of_mark(self, held: _Held) -> None:
        """Leave the copy of one that is held no more to those who look for orphans: the last tier does not have it."""
        if held.mark is not None:
            self._undrained.let_go(held.mark)
            held.mark = None

    def _forget_outdone_marks(self, held: _Held) -> None:
        for mark in held.outdone_marks:
            self._undrained.forget(mark)
        held.outdone_marks = []

    def _remove_records(self, held: _Held) -> None:
        """Remove from the journal what it had of an image, and of those that it took the place of."""
        if self._journal is not None:
            for record in [*held.outdone, *filter(None, [held.record])]:
                self._journal.remove(record)
        held.record, held.outdone = None, []

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
    if held.kept is not None and not held.kept.done():
        held.kept.set_result(entry)


def _mark_of(held: _Held) -> Mark:
    return Mark.of(held.slot, held.entry, replace=held.replace, handed_over_s=held.handed_over_s)


def _let_go_of_bytes(held: _Held) -> None:
    """Leave a picture to the journal, and to whoever was just answered with it: tens of thousands may wait."""
    held.entry, held.has_bytes = outline(held.entry), False
    held.kept = held.task = None
    if held.record is not None:
        held.record.written = None


def _ended_bringing(held: _Held, task: asyncio.Task[None]) -> None:
    """Nobody waits for ever, even if the task was cut off at shutdown or died of a bug."""
    if held.kept is not None and not held.kept.done():
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
