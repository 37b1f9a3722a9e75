"""Who may generate now: a bounded number of places, given out by priority."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cacheserver.errors import QueueFullError
from cacheserver.model import Priority


@dataclass(frozen=True, order=True, slots=True)
class _Waiting:
    """One who waits; the smallest goes first."""

    rank: tuple[int, int]
    priority: Priority = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)


class PlaceQueue:
    """A number of places and a bounded queue for them: higher priority first, within one who came first."""

    def __init__(self, *, places: int, queue_max: int) -> None:
        """`places` at once, and at most `queue_max` waiting."""
        self._free = places
        self._queue_max = queue_max
        self._waiting: list[_Waiting] = []
        self._arrivals = itertools.count()

    @property
    def depth(self) -> Mapping[Priority, int]:
        """How many wait, by priority."""
        return Counter(waiting.priority for waiting in self._waiting)

    @asynccontextmanager
    async def place(self, priority: Priority) -> AsyncIterator[None]:
        """Hold a place for the length of the block, after waiting for one.

        Raises:
            QueueFullError: no place is free, and as many wait as may.
        """
        await self._take(priority)
        try:
            yield
        finally:
            self._give_back()

    async def _take(self, priority: Priority) -> None:
        # A place is free only while nobody waits: giving one back hands it to the first of the queue.
        if self._free:
            self._free -= 1
            return
        if len(self._waiting) >= self._queue_max:
            raise QueueFullError(f"{len(self._waiting)} generations wait already. Try again later.")
        granted = asyncio.get_running_loop().create_future()
        waiting = _Waiting((-priority, next(self._arrivals)), priority, granted)
        heapq.heappush(self._waiting, waiting)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                # Handed a place and cancelled before it could be used: the next one gets it.
                self._give_back()
            elif waiting in self._waiting:
                self._waiting.remove(waiting)
                heapq.heapify(self._waiting)
            raise

    def _give_back(self) -> None:
        # A cancelled waiter leaves the queue only when it runs again, so one may still be in it.
        while self._waiting:
            granted = heapq.heappop(self._waiting).granted
            if not granted.done():
                granted.set_result(None)
                return
        self._free += 1
