"""What the shared store keeps of the figures, and what becomes of the rest: minutes go, hours go into the archive."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import structlog

from cacheserver.accounting.archive import Hours, day_of, pack, start_of, unpack
from cacheserver.errors import AccountsUnavailableError
from cacheserver.figures import DAY_S, HOUR_S, MINUTE_S, Bucket, cell_prefix
from cacheserver.interfaces import Clock, FigureArchive, FigureStore

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """How long the store keeps figures. An hour more is granted: no two clocks are the same."""

    minutes_for_s: float = 48 * HOUR_S
    hours_for_s: float = 35 * DAY_S

    def since_s(self, span_s: int, now_s: float) -> int:
        """From when on buckets of this length are in the store, if anything is: minutes by hours, hours by days."""
        if span_s == MINUTE_S:
            return int((now_s - self.minutes_for_s) // HOUR_S - 1) * HOUR_S
        return int((now_s - self.hours_for_s - HOUR_S) // DAY_S) * DAY_S

    def has(self, bucket: Bucket, now_s: float) -> bool:
        """Whether the store keeps it."""
        return bucket.start_s >= self.since_s(bucket.span_s, now_s)


class RollOff:
    """Takes out of the store what it does not keep. Any replica may, at any time: done twice, it is done once."""

    def __init__(self, *, store: FigureStore, archive: FigureArchive, clock: Clock, kept: Kept) -> None:
        self._store = store
        self._archive = archive
        self._clock = clock
        self._kept = kept

    async def run(self) -> None:
        """Drop old minutes, and put old hours into the archive. What cannot be done now is done the next time."""
        try:
            await self._store.drop(await self._old(MINUTE_S))
            old = await self._old(HOUR_S)
        except AccountsUnavailableError as error:
            _log.warning("figures_not_rolled_off", error=str(error))
            return
        for day, buckets in groupby(old, lambda bucket: day_of(bucket.start_s)):
            hours = [*buckets]
            try:
                await self.copy(day, hours)
                await self._store.drop(hours)
            except AccountsUnavailableError as error:  # the other days' files may be well
                _log.warning("figures_not_rolled_off", day=day, error=str(error))

    async def copy_latest(self) -> None:
        """Put a copy of the last hours into the archive, and leave them in the store."""
        since_s = self._clock.now_s() - 2 * HOUR_S
        try:
            latest = [bucket for bucket in await self._store.buckets(HOUR_S) if bucket.start_s >= since_s]
            for day, buckets in groupby(latest, lambda bucket: day_of(bucket.start_s)):
                await self.copy(day, buckets)
        except AccountsUnavailableError as error:
            _log.warning("figures_not_copied", error=str(error))

    async def correct(self, owner: str) -> bool:
        """Have the archive's copies of hours that are kept say of an owner what the store says; False if they cannot.

        What an earlier life told under this name may not be under any name now, and would be counted beside it.
        """
        since_s = self._kept.since_s(HOUR_S, self._clock.now_s())
        try:
            told = await self._store.buckets(HOUR_S)
            for day in await self._archive.days():
                if start_of(day) >= since_s:
                    await self.copy(day, [bucket for bucket in told if day_of(bucket.start_s) == day], replaces=owner)
        except AccountsUnavailableError as error:
            _log.warning("figures_not_copied", error=str(error))
            return False
        return True

    async def copy(self, day: str, hours: Iterable[Bucket], *, replaces: str = "") -> None:
        """Put hours of one day into its file, beside what is there; a cell that is in both is taken from the store.

        The store is read before the file: what another replica has just taken out of the one is then in the other.
        Of the owner that is named, nothing stays in the file that is not in these hours.
        """
        buckets = [*hours]
        told = await self._store.read(buckets)
        before = await self._archive.read(day)
        # In a thread: a day of many cells takes longer than others should wait for their turn.
        found = await asyncio.to_thread(unpack, day, before)
        if replaces:
            found = _without(found, cell_prefix(replaces))
        for bucket, cells in zip(buckets, told, strict=True):
            found.setdefault(bucket.start_s, {}).update(cells)
        if (after := await asyncio.to_thread(pack, found)) != before:
            await self._archive.write(day, after)

    async def _old(self, span_s: int) -> list[Bucket]:
        now_s = self._clock.now_s()
        return [bucket for bucket in await self._store.buckets(span_s) if not self._kept.has(bucket, now_s)]


def _without(hours: Hours, prefix: str) -> Hours:
    return {
        start_s: {name: cell for name, cell in cells.items() if not name.startswith(prefix)}
        for start_s, cells in hours.items()
    }
