"""What is made must find room: as the journal fills, generations begin later, and then not at all. Hits go on.

    0 ──────────── high water ──────── 0.95 ── 1
         at once        ever later     refused     what was begun before, and what is put, no more

What was begun when it filled up has the last twentieth of it; beyond, it is written through.
"""

from __future__ import annotations

from collections.abc import Callable

from cacheserver.errors import JournalFullError
from cacheserver.interfaces import Clock

_REFUSED_FROM = 0.95
_LONGEST_WAIT_S = 10.0


class Backpressure:
    """Whether there is room for what would be made, and how long to wait for it.

    Args:
        share: tells how full the journal is, 0 to 1.
        high_water: from which share on generations are slowed, 0 to 0.95.
        clock: what is waited by.
    """

    def __init__(self, *, share: Callable[[], float], high_water: float, clock: Clock) -> None:
        self._share = share
        self._high_water = high_water
        self._clock = clock

    def refusal(self) -> JournalFullError | None:
        """The refusal of what would be made or stored now; None while there is room."""
        if self._share() < _REFUSED_FROM:
            return None
        return JournalFullError("What was made waits for the last tier and leaves no room for more; try again.")

    async def slow_down(self) -> None:
        """Return when a generation may begin: below the high-water mark at once, else later."""
        beyond = self._share() - self._high_water
        if beyond > 0:
            await self._clock.sleep(_LONGEST_WAIT_S * min(1.0, beyond / (_REFUSED_FROM - self._high_water)))
