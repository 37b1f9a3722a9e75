"""Copying into one faster tier what slower ones have. Generates nothing, and leaves memory as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from cacheserver.errors import CacheServerError, TierError, TierUnreachableError
from cacheserver.interfaces import Tier
from cacheserver.keep import Keeper
from cacheserver.model import CachedImage, CacheKey, WarmResult
from cacheserver.warming.looking import Looking
from cacheserver.warming.values import Batch, WarmOutcome, WarmTotals

_KEYS_PER_BATCH = 500
_NO_ROW = 0
_TRIES = 4
"""Of a copy: what is read before a change to any picture may not be written after it."""


@dataclass(frozen=True, slots=True)
class Lack:
    """An item, by its row and keys, and those of the keys that the tier to fill lacks."""

    row: int
    keys: Sequence[CacheKey]
    lacking: Sequence[CacheKey]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """Fills `tier` from `slower`, which are fastest first."""

    tier: Tier
    slower: Sequence[Tier]
    keeper: Keeper
    looking: Looking
    totals: WarmTotals

    async def look(self, batch: Batch) -> tuple[list[WarmOutcome], list[Lack]]:
        """What the tier has already, and what it lacks.

        Raises:
            TierUnreachableError: the tier cannot be asked.
        """
        done, items = self.looking.sort_out(batch)
        return await self._lacks(done, [(item.row, item.keys) for item in items])

    async def look_at_keys(self, keys: Sequence[CacheKey]) -> tuple[list[WarmOutcome], list[Lack]]:
        """The same for keys as the last tier has them, which are rows of no client."""
        self.totals.items += len(keys)
        return await self._lacks([], [(_NO_ROW, [key]) for key in keys])

    async def make(self, lack: Lack) -> WarmOutcome:
        """Copy what the tier lacks of one item; never fails."""
        copied = 0
        try:
            for key in lack.lacking:
                copied += await self._copy(key)
            outcome = WarmOutcome(lack.row, WarmResult.FILLED if copied else WarmResult.ABSENT, lack.keys)
        except CacheServerError as error:
            outcome = WarmOutcome(lack.row, WarmResult.FAILED, lack.keys, error=error)
        self.totals.count(outcome)
        return outcome

    async def keys_of(self, partition: str) -> AsyncIterator[list[CacheKey]]:
        """Every picture's key of a partition in the last tier, some at a time.

        Raises:
            TierUnreachableError: the last tier cannot be asked.
        """
        keys: list[CacheKey] = []
        last = self.slower[-1]
        try:
            async for key in last.scan(partition):
                if key.is_rendition:
                    continue  # made again in milliseconds where it is asked for
                keys.append(key)
                if len(keys) == _KEYS_PER_BATCH:
                    yield keys
                    keys = []
        except TierError as error:
            raise TierUnreachableError([last.name], f"{last.name} cannot be listed now. Fill again later.") from error
        if keys:
            yield keys

    async def _lacks(
        self, done: list[WarmOutcome], rows: Sequence[tuple[int, Sequence[CacheKey]]]
    ) -> tuple[list[WarmOutcome], list[Lack]]:
        try:
            present = iter(await self.tier.find([key for _, keys in rows for key in keys]))
        except TierError as error:
            name = self.tier.name
            raise TierUnreachableError([name], f"{name} cannot be asked now. Fill it when it is back.") from error
        lacks = [Lack(row, keys, [key for key in keys if not next(present)]) for row, keys in rows]
        done += [
            WarmOutcome(each.row, WarmResult.CACHED, each.keys, self.tier.name) for each in lacks if not each.lacking
        ]
        for outcome in done:
            self.totals.count(outcome)
        return done, [each for each in lacks if each.lacking]

    async def _copy(self, key: CacheKey) -> bool:
        """Copy one picture; whether a slower tier had it. Raises TierError where none could say, or the copy failed."""
        for _ in range(_TRIES):
            changes = self.keeper.changes
            entry, silence = await self._read(key)
            if entry is None:
                if silence is not None:
                    raise silence
                return False
            if await self.keeper.copy(self.tier, key, entry, changes=changes):
                return True
            if self.keeper.is_current(changes):
                return False  # the tier has taken another picture under this key meanwhile
        raise TierError("pictures were replaced or purged each time this one was to be copied")

    async def _read(self, key: CacheKey) -> tuple[CachedImage | None, TierError | None]:
        """The intact entry from the fastest of the slower tiers that has it; without one, what the last one said."""
        silence: TierError | None = None
        for tier in self.slower:
            if self.keeper.is_outdated(tier, key):
                continue
            silence = None
            try:
                entry = await tier.get(key)
            except TierError as error:
                silence = error
                continue
            if entry is not None:
                return entry, None
        return None, silence
