"""One knowledge of what was purged in all replicas: tombstones in Redis and in the last tier, looked at all the time.

    purge ──▶ Redis ──▶ last tier ──▶ this replica's `Epochs`; the others see it in Redis within a quarter of a second

Each has all of it, so that either may be away or lose it. A replica that is cut off from Redis looks into the last tier
every `check_s`; cut off from both it is blind: it serves what it has, and that is told, or it serves nothing stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import structlog

from cacheserver.epochs import Arrivals, Epochs, Tombstone
from cacheserver.errors import TierError
from cacheserver.interfaces import Books, Clock
from cacheserver.model import CachedImage, TierName

_log = structlog.get_logger(__name__)

LOOK_S = 0.25
"""Between two looks into Redis."""

TRIM_S = 86400.0
"""Between two looks for tombstones that are no longer needed."""

_KEPT_S = 90 * 86400.0
"""So long a tombstone is kept once nothing of what it took is left: a replica that was away has come back by then."""

_FOLDER = "purges/"


class SharedTombstones(Protocol):
    """Tombstones that all replicas share. Raises TierError and nothing else, soon."""

    async def set(self, names: Sequence[str], *, above: int) -> int:
        """Set tombstones of these names; the epoch they have, above all earlier ones and above `above`."""
        ...

    async def since(self, arrival: int) -> Arrivals:
        """What came after `arrival`. What was lost has fewer, or an earlier last one, than we know."""
        ...

    async def merge(self, tombstones: Sequence[Tombstone]) -> None:
        """Set these with the epochs they have, but for those that are there already with the same or a later one."""
        ...

    async def remove(self, tombstones: Sequence[Tombstone]) -> None:
        """Remove these, but for those that have a later epoch meanwhile."""
        ...


class TombstoneFiles(Protocol):
    """Empty files by name, in the last tier. Raises TierError and nothing else."""

    async def files(self, start: str) -> list[str]:
        """The names that begin so, in order."""
        ...

    async def write_file(self, name: str, data: bytes) -> None:
        """Write or replace a file, whole or not at all."""
        ...

    async def delete_file(self, name: str) -> None:
        """Remove a file; one that is not there is removed already."""
        ...


class Coherence:
    """Sets tombstones where all replicas find them, and finds those that others set."""

    def __init__(  # noqa: PLR0913 - where they lie, and two settings
        self,
        *,
        epochs: Epochs,
        shared: SharedTombstones | None,
        files: TombstoneFiles | None,
        last_tier: TierName | None,
        keeps_all: bool = False,
        books: Books,
        clock: Clock,
        check_s: float = 5.0,
        refuses_when_blind: bool = False,
    ) -> None:
        """Without `shared` and `files` this is the only replica, and what it has does not outlive it.

        `files` are those of `last_tier`; if no other replica has them, `keeps_all`: what others set is written, too.
        """
        self.epochs = epochs
        self._shared = shared
        self._files = files
        self._last_tier = last_tier
        self._keeps_all = keeps_all
        self._books = books
        self._clock = clock
        self._check_s = check_s
        self._refuses_when_blind = refuses_when_blind
        self._file_names: set[str] = set()
        self._checked_s: float | None = None
        self._is_redis_away = self._is_last_tier_away = False
        self._arrival = self._given = 0
        self._unshared: dict[str, Tombstone] = {}
        self.on_news: Callable[[], None] = lambda: None
        """Called once other replicas' tombstones are known; what they took may go then."""

    @property
    def is_lasting(self) -> bool:
        """Whether tombstones outlive this process."""
        return self._shared is not None or self._files is not None

    async def set(self, tombstones: Sequence[Tombstone]) -> list[TierName]:
        """Purge what these take; the tiers that did not take note, which may serve it in other replicas.

        This replica serves it no more, whatever comes of it.
        """
        silent: list[TierName] = []
        above = self.epochs.newest
        epoch = max(above + 1, int(1000 * self._clock.now_s()))
        if self._shared is not None:
            try:
                epoch = await self._shared.set([each.name for each in tombstones], above=above)
            except TierError as error:
                _log.error("purge_not_shared", error=str(error))
                silent.append(TierName.REDIS)
        marked = [replace(each, epoch=epoch) for each in tombstones]
        self.epochs.learn(marked)
        if TierName.REDIS in silent:
            self._unshared |= {each.name: each for each in marked}
        if not await self._write_files(marked) and self._last_tier is not None:
            silent.append(self._last_tier)
        return silent

    async def look(self) -> None:
        """Learn what others purged since."""
        is_known = await self._look_into_redis()
        if not is_known and self._is_check_due():
            is_known = await self._look_into_files()
            self._tell_blind(is_blind=not is_known)
        elif is_known:
            self._tell_blind(is_blind=False)

    async def newest(self) -> int:
        """The newest epoch of all replicas: what is made from now on carries it, and no purge until now takes it."""
        is_known = not self._is_redis_away and await self._look_into_redis()
        if not is_known and self._shared is not None:
            await self._look_into_files()  # what Redis did not hear of is there: it must not take what is made after it
        return self.epochs.newest

    async def next(self) -> int:
        """An epoch that nothing has yet: a picture that carries it may take the place of any other."""
        if self._shared is not None and not self._is_redis_away:
            try:
                return await self._shared.set((), above=self.epochs.newest)
            except TierError as error:
                _log.warning("epoch_not_shared", error=str(error))
        self._given = max(self._given, self.epochs.newest, int(1000 * self._clock.now_s()) - 1) + 1
        return self._given

    def replaced(self, entry: CachedImage) -> None:
        """This took the place of another picture, which other replicas may have in memory: the next look tells them."""
        if self._shared is not None:
            tombstone = Tombstone.of_replaced(entry)
            self._unshared[tombstone.name] = tombstone
            self.epochs.learn([tombstone])

    async def trim(self) -> None:
        """Forget purges of long ago of which nothing is left, here and where all replicas find them."""
        old = self._old()
        try:
            if self._shared is not None:
                await self._shared.remove(old)
            if self._files is not None:
                for each in old:
                    await self._files.delete_file(_file_name(each))
        except TierError as error:
            _log.warning("tombstones_not_removed", error=str(error), text="the next day goes on with it")
            return
        self.epochs.forget(old)

    async def aclose(self) -> None:
        """Tell others what they have not been told yet."""
        if self._unshared:
            await self._look_into_redis()

    async def load(self) -> None:
        """Learn all that was ever purged, before anything is served."""
        await self._look_into_redis()
        is_known = self._files is None or await self._look_into_files()
        self._tell_blind(is_blind=not is_known and (self._shared is None or self._is_redis_away))

    async def _look_into_redis(self) -> bool:
        if self._shared is None:
            return False
        try:
            late = list(self._unshared.values())
            await self._shared.merge(late)
            self._unshared = {name: each for name, each in self._unshared.items() if each not in late}
            came = await self._shared.since(self._arrival)
            if came.last < self._arrival:
                came = await self._shared.since(0)
            news = self.epochs.learn(came.tombstones)
            if came.there < self.epochs.count:
                self.epochs.forget(self._old())  # others may have done so
            if came.there < self.epochs.count:
                _log.warning("tombstones_given_back", text="Redis has lost what was purged, or did not have it yet")
                await self._shared.merge(self.epochs.all())
        except TierError as error:
            if not self._is_redis_away:
                _log.warning("purges_unseen", error=str(error), text="looking into the last tier meanwhile")
            self._is_redis_away = True
            return False
        if self._is_redis_away and self._files is not None:
            await self._look_into_files()  # what others could set there alone
        self._is_redis_away = False
        self._arrival = came.last
        await self._take_note(news)
        return True

    def _old(self) -> list[Tombstone]:
        return self.epochs.settled_before(int(1000 * (self._clock.now_s() - _KEPT_S)))

    def _is_check_due(self) -> bool:
        if self._shared is None and self._files is None:
            return False
        return self._checked_s is None or self._clock.monotonic_s() >= self._checked_s + self._check_s

    async def _look_into_files(self) -> bool:
        self._checked_s = self._clock.monotonic_s()
        if self._files is None:
            return False
        try:
            names = await self._files.files(_FOLDER)
        except TierError as error:
            if not self._is_last_tier_away:
                _log.warning("purges_not_read", error=str(error))
            self._is_last_tier_away = True
            return False
        self._is_last_tier_away = False
        news = [name for name in names if name not in self._file_names]
        self._file_names = set(names)
        await self._take_note(self.epochs.learn([each for each in map(_of_file, news) if each is not None]))
        return True

    async def _take_note(self, news: Sequence[Tombstone]) -> None:
        if news and self._keeps_all:
            await self._write_files(news)
        if news:
            self.on_news()

    async def _write_files(self, tombstones: Sequence[Tombstone]) -> bool:
        """Write one file for each; whether there is any place for them that took them."""
        if self._files is None:
            return True
        try:
            for each in tombstones:
                await self._files.write_file(_file_name(each), b"")
        except TierError as error:
            _log.error("purge_not_written", error=str(error))
            return False
        return True

    def _tell_blind(self, *, is_blind: bool) -> None:
        hides_all = is_blind and self._refuses_when_blind
        if is_blind:
            self._books.purges_unseen()
        if hides_all != self.epochs.hides_all:
            _log.error("stored_images_refused", refused=hides_all, text="nobody could say what was purged")
        self.epochs.hides_all = hides_all


def _file_name(tombstone: Tombstone) -> str:
    return f"{_FOLDER}{tombstone.epoch:016x}:{tombstone.name}"


def _of_file(name: str) -> Tombstone | None:
    epoch, _, rest = name.removeprefix(_FOLDER).partition(":")
    try:
        return Tombstone.parse(int(epoch, 16), rest)
    except ValueError:
        _log.warning("tombstone_unreadable")
        return None
