"""The order in which tiers are read: in turn, or the next one beside one that is late."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from cacheserver.errors import TierError
from cacheserver.interfaces import Books, Clock, Tier
from cacheserver.model import CachedImage, TierName
from cacheserver.tasks import OwnedTasks, end

_LATE_QUANTILE = 0.99
_RECKONED_EVERY = 64
"""After so many more reads it is reckoned anew what is late."""

Outcome = CachedImage | TierError | None
"""What reading a tier came to: an entry, None for known absent, or why nobody knows."""

Read = Callable[[Tier], Awaitable[CachedImage | None]]

Answers = AsyncGenerator[tuple[Tier, Outcome], None]
"""Tiers with what reading them came to, as they answer. To be closed once one is enough."""

_Reading = asyncio.Task[Outcome]


async def in_turn(tiers: Sequence[Tier], read: Read) -> Answers:
    """Read one tier after another, for as long as answers are asked for."""
    for tier in tiers:
        yield tier, await _outcome(tier, read)


class Hedge:
    """Reads tiers in turn, but does not wait for one that takes longer than 99 of 100 of its pictures did.

    The next tier is then read beside it, and whichever has the picture first answers. The other read goes on to its
    end, unheard: its connection stays sound, and its time and its failures count as ever.

    Args:
        clock: times the reads.
        books: told what became of each hedge.
        window: so many of a tier's last pictures are known by their times; nothing is late before half of them are.
        max_at_a_time: most late reads under way, and most beside late ones, heard or not; while there are as many, a
            late one is waited for. So a tier that hangs is not asked more and more because the one above it is late.
    """

    def __init__(self, *, clock: Clock, books: Books, window: int = 1_000, max_at_a_time: int = 8) -> None:
        self._clock = clock
        self._books = books
        self._window = window
        self._max_at_a_time = max_at_a_time
        self._times: dict[TierName, _Times] = {}
        self._reads = OwnedTasks()
        self._late: set[_Reading] = set()
        self._beside: set[_Reading] = set()

    async def reads(self, tiers: Sequence[Tier], read: Read) -> Answers:
        """Read the tiers for as long as answers are asked for."""
        rest = deque(tiers)
        running: dict[_Reading, Tier] = {}
        late: Tier | None = None
        untold: Tier | None = None
        try:
            while rest or running:
                if rest and (not running or (late is not None and len(running) == 1)):
                    reading = self._begin(tier := rest.popleft(), read)
                    running[reading] = tier
                    if late is not None:
                        _until_done(reading, self._beside)
                done = await self._first(running, may_be_late=late is None and bool(rest))
                if not done:
                    late = untold = self._hedged(running)
                for reading in done:
                    tier, outcome = running.pop(reading), reading.result()
                    if untold is not None and (tier is untold or isinstance(outcome, CachedImage)):
                        self._books.hedged(untold.name, has_won=tier is not untold)
                        untold = None
                    if tier is late:
                        late = None
                    yield tier, outcome
        except asyncio.CancelledError:
            await end(running)
            raise

    async def aclose(self) -> None:
        """Cancel what nobody hears."""
        await self._reads.aclose(0)

    async def _first(self, running: Mapping[_Reading, Tier], *, may_be_late: bool) -> list[_Reading]:
        """The reads that have ended, once one has, fastest tier first; none once the only one is late."""
        late_s = self._late_s(running) if may_be_late else None
        if late_s is None or not await self._is_late(running, late_s):
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        return [reading for reading in running if reading.done()]

    async def _is_late(self, running: Mapping[_Reading, Tier], late_s: float) -> bool:
        """Whether the only read takes longer than that, and may be hedged then: many may become late at once."""
        timer = asyncio.create_task(self._clock.sleep(late_s))
        waits: set[asyncio.Future[Any]] = {*running, timer}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
        return done == {timer} and not self._is_full

    @property
    def _is_full(self) -> bool:
        return max(len(self._late), len(self._beside)) >= self._max_at_a_time

    def _late_s(self, running: Mapping[_Reading, Tier]) -> float | None:
        """From when on the only read is late; None if it will not be."""
        (tier,) = running.values()
        if tier.name not in self._times or self._is_full:
            return None
        return self._times[tier.name].late_s

    def _hedged(self, running: Mapping[_Reading, Tier]) -> Tier:
        ((reading, tier),) = running.items()
        _until_done(reading, self._late)
        return tier

    def _begin(self, tier: Tier, read: Read) -> _Reading:
        return self._reads.own(self._timed(tier, read), f"read-{tier.name}")

    async def _timed(self, tier: Tier, read: Read) -> Outcome:
        began_s = self._clock.monotonic_s()
        outcome = await _outcome(tier, read)
        # What is absent or refused by a breaker is told much faster than a picture is sent.
        if isinstance(outcome, CachedImage):
            times = self._times.setdefault(tier.name, _Times(self._window))
            times.add(self._clock.monotonic_s() - began_s)
        return outcome


class _Times:
    """How long a tier's last pictures took, in seconds; `late_s` is what nearly none did, None while few are known."""

    def __init__(self, window: int) -> None:
        self._seconds: deque[float] = deque(maxlen=window)
        self._least_known = window // 2
        self._new = 0
        self.late_s: float | None = None

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self._new += 1
        if len(self._seconds) >= self._least_known and (self.late_s is None or self._new >= _RECKONED_EVERY):
            self._new = 0
            in_order = sorted(self._seconds)
            self.late_s = in_order[int(_LATE_QUANTILE * (len(in_order) - 1))]


def _until_done(reading: _Reading, held: set[_Reading]) -> None:
    """Have `held` hold it for as long as it is under way."""
    held.add(reading)
    reading.add_done_callback(held.discard)


async def _outcome(tier: Tier, read: Read) -> Outcome:
    try:
        return await read(tier)
    except TierError as error:
        return error
