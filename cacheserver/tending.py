"""What is done for entries that are asked for, behind the answer: their end moves on, and their copy in Redis stays.

Where its namespace says `expiry = "sliding"` an entry lives on from each hit for as long as it was made for. Tiers are
told so coarsely: once a tenth of that has passed, however often it is hit, and by one replica for all.

Redis drops what has lain there long enough, and sees nothing of hits in memory. So what is hit for longer than a minute
is looked for there, and stays for as long as a new copy where it would soon be dropped, or is copied anew.
"""

from __future__ import annotations

import structlog

from cacheserver.errors import TierError
from cacheserver.interfaces import Clock
from cacheserver.keep import Keeper
from cacheserver.model import CachedImage
from cacheserver.tasks import OwnedTasks

_log = structlog.get_logger(__name__)

_REMEMBERED = 20_000
_PAUSE_S = 60.0
"""From a first hit until an entry counts as hot, and from a try that failed to the next."""


class Tending:
    """Sees to entries that are hit: each once it is due, which whoever sees to it finds out."""

    def __init__(self, *, keeper: Keeper, clock: Clock) -> None:
        self._keeper = keeper
        self._clock = clock
        self._tasks = OwnedTasks()
        self._due_s: dict[str, float] = {}
        """When to see to an entry again (wall clock), by its name; what was told first is forgotten first."""

    def hit(self, entry: CachedImage) -> None:
        """An entry was answered with. Nothing here waits: this is on the way of hits."""
        name, now_s = entry.key.name, self._clock.now_s()
        due_s = self._due_s.get(name)
        if due_s is not None and now_s < due_s:
            return
        if due_s is None and now_s < entry.slides_at_s:
            self._see_to_it_at(min(now_s + _PAUSE_S, entry.slides_at_s), name)
            return
        self._see_to_it_at(now_s + _PAUSE_S, name)
        self._tasks.own(self._see_to(entry, name, now_s), "tend")

    async def idle(self) -> None:
        """Return when nothing is under way."""
        await self._tasks.idle()

    async def aclose(self) -> None:
        """Leave off: whoever is hit next is seen to then."""
        await self._tasks.aclose(0)

    def _see_to_it_at(self, due_s: float, name: str) -> None:
        self._due_s.pop(name, None)
        while len(self._due_s) >= _REMEMBERED:
            del self._due_s[next(iter(self._due_s))]
        self._due_s[name] = due_s

    async def _see_to(self, entry: CachedImage, name: str, now_s: float) -> None:
        entry = entry.living_on(now_s) or entry
        try:
            lasts_s = await self._keeper.touch(entry)
        except TierError as error:
            _log.info("not_touched", error=type(error).__name__)
            return
        if lasts_s is not None:
            self._see_to_it_at(min(now_s + lasts_s, entry.slides_at_s), name)
