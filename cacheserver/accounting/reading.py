"""Reading the figures of all replicas: which buckets make up a span of time, and what they add up to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import structlog

from cacheserver.accounting.archive import start_of, unpack
from cacheserver.accounting.kept import Kept
from cacheserver.errors import InvalidRequestError
from cacheserver.figures import (
    BY_DEFAULT,
    DAY_S,
    HOUR_S,
    MINUTE_S,
    Bucket,
    Figures,
    Key,
    Row,
    Sums,
    read_cell_name,
)
from cacheserver.interfaces import Clock, FigureArchive, FigureStore
from cacheserver.model import StatsField, StatsSpan

_log = structlog.get_logger(__name__)

_BUCKETS_AT_ONCE = 20

_MOST_ROWS = 50_000
"""Of a report: more than anybody reads, some 35 MB, and a few seconds' work."""

_IN_STORE_S = DAY_S
"""For so long at least an hour stays in the store, whatever any replica's settings say, its clock an hour off."""

_read_cell_name = lru_cache(10_000)(read_cell_name)


@dataclass(frozen=True, slots=True)
class Query:
    """Which figures are wanted. Times in seconds since 1970; None: from the first kept on, and until now.

    `namespaces` None: of all. Rows are told apart by `by`, and by time buckets of the length of `span`.
    """

    since_s: float | None = None
    until_s: float | None = None
    span: StatsSpan | None = None
    by: Sequence[StatsField] = BY_DEFAULT
    namespaces: Collection[str] | None = None

    def touches(self, start_s: float, end_s: float) -> bool:
        """Whether a part of this time is wanted."""
        return end_s > (self.since_s or -math.inf) and start_s < (math.inf if self.until_s is None else self.until_s)

    def covers(self, bucket: Bucket) -> bool:
        """Whether all of it is."""
        since_s, until_s = self.since_s or -math.inf, math.inf if self.until_s is None else self.until_s
        return since_s <= bucket.start_s and bucket.end_s <= until_s


@dataclass(frozen=True, slots=True)
class Report:
    """What was found: its rows, and when the first bucket of time begins that holds something."""

    rows: list[Row]
    start_s: float | None


class FigureReader:
    """Adds up what all owners have told.

    Whole hours are read as hours, the ends of a span of time as minutes; where minutes are not kept any more, an hour
    counts if a part of it is wanted. A span of time is as exact as a minute.
    """

    def __init__(
        self, *, store: FigureStore, archive: FigureArchive, clock: Clock, kept: Kept, has_copies: bool = False
    ) -> None:
        """With `has_copies` the archive has recent hours, too, of a store that ended."""
        self._store = store
        self._archive = archive
        self._has_copies = has_copies
        self._clock = clock
        self._kept = kept

    async def report(self, query: Query) -> Report:
        """The figures that `query` wants.

        Raises:
            AccountsUnavailableError: they cannot be read now.
            InvalidRequestError: they are too many rows.
        """
        sums = _Adding(query)
        minutes_since_s = self._kept.since_s(MINUTE_S, self._clock.now_s())
        by_minutes = query.span is StatsSpan.MINUTE
        hours = [each for each in await self._store.buckets(HOUR_S) if query.touches(each.start_s, each.end_s)]
        # The store before the archive: what is taken out of the one meanwhile is then in the other.
        whole = [each for each in hours if not by_minutes and (query.covers(each) or each.start_s < minutes_since_s)]
        names = await self._add(sums, whole)
        cut = {each.start_s: each for each in hours if each not in whole}
        minutes = await self._store.buckets(MINUTE_S) if cut else []
        await self._add(
            sums,
            [
                each
                for each in minutes
                if each.start_s // HOUR_S * HOUR_S in cut and query.touches(each.start_s, each.end_s)
            ],
        )
        if not by_minutes and self._may_be_archived(query):
            told = await self._store.read([*cut.values()])
            names |= {start_s: set(cells) for start_s, cells in zip(cut, told, strict=True)}
            await self._add_archived(sums, query, names)
        return Report(await asyncio.to_thread(sums.in_order), sums.start_s)

    def _may_be_archived(self, query: Query) -> bool:
        """Whether something of it may be in the archive alone: what is recent is told though the archive is away."""
        return self._has_copies or query.since_s is None or query.since_s < self._clock.now_s() - _IN_STORE_S

    async def _add(self, sums: _Adding, buckets: Sequence[Bucket]) -> dict[int, set[str]]:
        """Add these buckets of the store; returns the names of their cells by when they begin."""
        names: dict[int, set[str]] = {}
        for at in range(0, len(buckets), _BUCKETS_AT_ONCE):
            some = buckets[at : at + _BUCKETS_AT_ONCE]
            found = await self._store.read(some)
            # In a thread: to read so many names takes longer than others should wait for their turn.
            await asyncio.to_thread(sums.add, [(b.start_s, cells) for b, cells in zip(some, found, strict=True)])
            names |= {bucket.start_s: set(cells) for bucket, cells in zip(some, found, strict=True)}
        return names

    async def _add_archived(self, sums: _Adding, query: Query, told: Mapping[int, set[str]]) -> None:
        """Add what is in the archive alone: of each hour the cells that the store has not told."""
        for day in await self._archive.days():
            start_s = start_of(day)
            if not query.touches(start_s, start_s + DAY_S):
                continue
            hours = await asyncio.to_thread(unpack, day, await self._archive.read(day))
            fresh = [
                (hour, {name: cell for name, cell in cells.items() if name not in told.get(hour, ())})
                for hour, cells in hours.items()
                if query.touches(hour, hour + HOUR_S)
            ]
            await asyncio.to_thread(sums.add, fresh)


class _Adding:
    """Sums of the cells that a query wants. Used by one thread at a time."""

    def __init__(self, query: Query) -> None:
        self._namespaces = query.namespaces
        self._sums = Sums(query.by, query.span)
        self.start_s: int | None = None

    def in_order(self) -> list[Row]:
        return self._sums.rows

    def add(self, buckets: Iterable[tuple[int, Mapping[str, str]]]) -> None:
        for start_s, cells in buckets:
            for name, cell in cells.items():
                if (found := _read(name, cell)) is None:
                    continue
                key, figures = found
                if self._namespaces is None or key.namespace in self._namespaces:
                    self._sums.add(key, figures, start_s)
                    if len(self._sums) > _MOST_ROWS:
                        text = f"makes more than {_MOST_ROWS:,} rows: ask for less time, a longer span or fewer fields"
                        raise InvalidRequestError({"span": text})
                    self.start_s = start_s if self.start_s is None else min(start_s, self.start_s)


def _read(name: str, cell: str) -> tuple[Key, Figures] | None:
    """A cell that was told; None, and said, if nobody of us can have told it."""
    try:
        return _read_cell_name(name), Figures.decoded(cell)
    except ValueError as error:
        _log.error("figures_damaged", error=str(error))
        return None
