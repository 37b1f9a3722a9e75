"""What is made must find room: as the journal fills, generations begin later, and then not at all. Hits go on.

    0 ──────────── high water ──────────────── 0.95 ── 1
         at once        ever later, and refused where    refused, and what is put, too
                        what is being made may fill it

What is made though there is no room for it is written through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cacheserver.errors import JournalFullError
from cacheserver.interfaces import Clock
from cacheserver.journal import Journal

_REFUSED_FROM = 0.95
_LONGEST_WAIT_S = 10.0


class Backpressure:
    """Whether there is room for what would be made, and how long to wait for it.

    Args:
        journal: where it has to find room; None: there is always room.
        high_water: from which share of the journal on generations are slowed, 0 to 0.95.
        clock: what is waited by.
    """

    def __init__(self, *, journal: Journal | None, high_water: float, clock: Clock) -> None:
        self._journal = journal
        self._high_water = high_water
        self._clock = clock
        self._making = 0

    def refusal(self) -> JournalFullError | None:
        """The refusal of what would be made or stored now; None while there is room."""
        journal = self._journal
        if journal is None or journal.share <= self._high_water:
            return None
        to_come_bytes = (self._making + 1) * journal.size_bytes / max(1, journal.entries)
        if journal.share < _REFUSED_FROM and journal.size_bytes + to_come_bytes <= journal.max_bytes:
            return None
        return _full()

    @contextmanager
    def making(self, images: int) -> Iterator[None]:
        """The time in which so many are made, until they are kept: they will need room."""
        self._making += images
        try:
            yield
        finally:
            self._making -= images

    async def slow_down(self) -> None:
        """Return when a generation may begin: below the high-water mark at once, else the later the less room is left.

        Raises:
            JournalFullError: there is no room any more.
        """
        beyond = 0.0 if self._journal is None else self._journal.share - self._high_water
        if beyond > 0:
            await self._clock.sleep(_LONGEST_WAIT_S * min(1.0, beyond / (_REFUSED_FROM - self._high_water)))
            if self._journal is not None and self._journal.share >= _REFUSED_FROM:
                raise _full()


def _full() -> JournalFullError:
    return JournalFullError("What was made waits for the last tier and leaves no room for more; try again.")
