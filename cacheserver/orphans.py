"""What replicas that are gone for good had yet to bring to the last tier: another one brings it there.

    dead for a minute ──▶ its marks become ours ──▶ the copy is read from Redis ──▶ the Keeper holds it as one of ours

A mark of ours of which nothing is held here is seen to in the same way, whatever it comes from: another replica, an
earlier life that had no journal, or a Redis that could not be told that the mark goes. Whoever is taken for dead and
lives after all loses nothing: the last tier takes the same picture once. A mark whose copy is gone, and whose picture
the last tier does not have, is an image that is lost unless the disk of its replica comes back: it is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from cacheserver.epochs import Epochs
from cacheserver.errors import CorruptEntryError, TierError
from cacheserver.interfaces import Books, Clock, Tier
from cacheserver.keep import Keeper
from cacheserver.model import MAX_VARIANT, CachedImage, TierName
from cacheserver.tasks import in_turns
from cacheserver.undrained import Mark, SharedMarks, Undrained

_log = structlog.get_logger(__name__)

LOOK_S = 20.0
"""Between two looks."""

_DEAD_S = 60.0
"""After so long without a sign of life a replica's disk counts as lost, too: a restart takes less."""

_CLAIMED = 200
"""Marks taken over at a time; who takes over more than it can bring home leaves others nothing to do."""

_AT_ONCE = 4
"""Copies read at a time."""


class Orphans:
    """Looks for marks of which nobody sees to any more, and has the Keeper see to what they mark."""

    def __init__(  # noqa: PLR0913 - what it goes between
        self,
        *,
        marks: SharedMarks,
        undrained: Undrained,
        keeper: Keeper,
        tiers: Sequence[Tier],
        epochs: Epochs,
        books: Books,
        clock: Clock,
    ) -> None:
        """`tiers` are the lower ones, fastest first; Redis is one of them, and not the last."""
        self._marks = marks
        self._undrained = undrained
        self._keeper = keeper
        self._copies = next(tier for tier in tiers if tier.name is TierName.REDIS)
        self._last = tiers[-1]
        self._epochs = epochs
        self._books = books
        self._clock = clock
        self._missed_since_s: dict[str, float] = {}
        self._waiting = 0

    async def sweep(self) -> None:
        """Bring home what nobody else does, as far as there is room for it now. Never raises TierError."""
        try:
            while await self._see_to_ours() and await self._claim():
                pass
        except TierError as error:
            _log.warning("orphans_not_seen_to", error=str(error), text="the next look may find them")

    async def _claim(self) -> int:
        """Take over marks of replicas that have been dead for long; how many."""
        now_s = self._clock.monotonic_s()
        self._missed_since_s = {each: self._missed_since_s.get(each, now_s) for each in await self._marks.dead()}
        claimed = 0
        for replica_id, since_s in self._missed_since_s.items():
            if claimed < _CLAIMED and now_s - since_s >= _DEAD_S:
                some = await self._marks.claim(replica_id, _CLAIMED - claimed)
                claimed += some
                _log.warning("orphans_claimed", replica=replica_id, images=some)
        return claimed

    async def _see_to_ours(self) -> bool:
        """See to our marks of which nothing is held here; whether there was room for all of them."""
        held, told, unheld = set(self._undrained.texts()), set[str](), set[str]()
        self._waiting = 0
        async for text in self._marks.ours():
            told.add(text)
            if text not in held and (mark := _parsed(text)) is not None and not self._undrained.knows(mark, text):
                unheld.add(text)
        # Redis could not be told of these, or has lost them.
        if untold := (held - told).intersection(self._undrained.texts()):
            await self._marks.add(sorted(untold))
        has_room = True
        async for some in in_turns(sorted(unheld), _AT_ONCE):
            has_room = has_room and all(await asyncio.gather(*map(self._see_to, some)))
            if not has_room:
                break
        if self._waiting or not has_room:
            _log.info("orphans_wait", unanswered=self._waiting, has_room=has_room)
        return has_room

    async def _see_to(self, text: str) -> bool:
        """See to one mark of which nothing is held; False if there is no room for its image now."""
        mark = Mark.parse(text)
        try:
            if self._is_unwanted(mark):
                await self._marks.remove(text)
            elif (entry := await self._copy(mark)) is not None and entry.image.sha256 == mark.sha256:
                if not await self._keeper.adopt(entry, mark):
                    return False
                if not self._undrained.knows(mark, text):
                    await self._marks.remove(text)
            elif _is_superseded(mark, entry) or await self._is_in_last(mark) or self._is_unwanted(mark):
                await self._marks.remove(text)
            elif await self._marks.remove(text):
                self._books.lost()
                _log.error("image_lost", text="its copy is gone from Redis: only its replica's disk may have it")
        except TierError:
            self._waiting += 1  # for the next look
        return True

    def _is_unwanted(self, mark: Mark) -> bool:
        is_expired = mark.expire_time_s is not None and mark.expire_time_s <= self._clock.now_s()
        return is_expired or self._epochs.is_gone(mark.slot, mark.labels)

    async def _copy(self, mark: Mark) -> CachedImage | None:
        try:
            return await self._copies.get(mark.slot)
        except CorruptEntryError:
            return None

    async def _is_in_last(self, mark: Mark) -> bool:
        """Whether the last tier has the picture, or what has taken its place."""
        key = mark.slot.made_for
        for variant in range(key.variant, MAX_VARIANT + 1):
            head = await self._last.head(key.with_variant(variant))
            if head is None:
                return False
            if head.bare.image.sha256 == mark.sha256 or (variant == key.variant and _is_superseded(mark, head.bare)):
                return True
        return False


def _is_superseded(mark: Mark, other: CachedImage | None) -> bool:
    """Whether what was to replace another picture was itself replaced since."""
    return other is not None and mark.replace and other.epoch > mark.labels.epoch


def _parsed(text: str) -> Mark | None:
    try:
        return Mark.parse(text)
    except ValueError:
        return None  # a newer release's, which knows what to do with it
