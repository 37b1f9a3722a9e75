"""What was answered with less than was asked for, to be made as it was asked for when nobody is in a hurry."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial

import structlog

from cacheserver.errors import CacheServerError
from cacheserver.interfaces import Clock
from cacheserver.model import Ask
from cacheserver.tasks import end, every

_log = structlog.get_logger(__name__)

_REMEMBERED = 10_000
_LOOK_S = 60.0


class Remakes:
    """The calls to make good, each identity once; the 10,000 latest, of this process alone.

    Nothing is lost with them: whoever asks again in the meantime has the picture made then.
    """

    def __init__(self, *, make: Callable[[Ask], Awaitable[None]], clock: Clock) -> None:
        """`make` makes the picture of one call, as it was asked for."""
        self._make = make
        self._clock = clock
        self._waiting: OrderedDict[str, Ask] = OrderedDict()
        self._working: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, ask: Ask) -> None:
        """Remember a call; the oldest is forgotten for it if there are too many."""
        self._waiting[ask.identity.key.identity_name] = ask
        if len(self._waiting) > _REMEMBERED:
            self._waiting.popitem(last=False)

    def start(self, off_peak_hours: tuple[int, int]) -> None:
        """Work off what waits whenever the hour (UTC) lies between the two, from now on."""
        work = partial(self._work, off_peak_hours)
        looking = every(_LOOK_S, work, clock=self._clock, name="remake", at_once=True)
        self._working = asyncio.create_task(looking, name="remake")

    async def aclose(self) -> None:
        """Stop working."""
        if self._working is not None:
            await end([self._working])

    async def _work(self, off_peak_hours: tuple[int, int]) -> None:
        while self._waiting and is_between(datetime.fromtimestamp(self._clock.now_s(), UTC).hour, off_peak_hours):
            _, ask = self._waiting.popitem(last=False)
            try:
                await self._make(ask)
            except CacheServerError as error:
                _log.info("not_remade", namespace=ask.namespace.name, reason=error.reason)
                self.add(ask)
                break


def is_between(hour: int, hours: tuple[int, int]) -> bool:
    """Whether `hour` lies in the span from the first to before the last, which may go over midnight."""
    first, last = hours
    return first <= hour < last if first <= last else hour >= first or hour < last
