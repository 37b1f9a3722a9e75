"""The leases of a load: that of the canonical key, which all spellings share, and that of the request itself.

They are taken in this order by everyone, so nobody waits in a circle. Replicas and namespaces that share no spellings
have the second one alone: what any of them asks for is paid for once all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from cacheserver.interfaces import Clock, Lease, Leases
from cacheserver.model import Priority
from cacheserver.tasks import end

_TOGETHER_S = 0.05
"""So long the second lease may be held while the first one is not ours yet: both are asked for in one round trip."""


class Leasing:
    """Takes the leases of loads."""

    def __init__(self, leases: Leases, *, clock: Clock) -> None:
        self._leases = leases
        self._clock = clock

    async def take(self, names: Sequence[str], *, looked_s: float, priority: Callable[[], Priority]) -> list[Lease]:
        """The leases of one or two names. The tiers were looked into at `looked_s` (monotonic). See `Leases.take`."""

        async def take(name: str) -> Lease:
            looked_s_ago = self._clock.monotonic_s() - looked_s
            return await self._leases.take(name, looked_s_ago=looked_s_ago, priority=priority)

        if len(names) == 1:
            return [await take(names[0])]
        taking = [asyncio.create_task(take(name), name="take a lease") for name in names]
        try:
            await asyncio.wait(taking, timeout=_TOGETHER_S)
            if not taking[0].done():
                await self._give_up(taking.pop())  # somebody may hold the first one and wait for this one
                await asyncio.wait(taking)
                taking.append(asyncio.create_task(take(names[1]), name="take a lease"))
            return [await each for each in taking]
        except BaseException:
            for each in taking:
                await self._give_up(each)
            raise

    def let_go(self, leases: Sequence[Lease], *, after: Callable[[], Awaitable[None]]) -> None:
        """See `Leases.let_go`."""
        for lease in leases:
            self._leases.let_go(lease, after=after)

    async def _give_up(self, taking: asyncio.Task[Lease]) -> None:
        await end([taking] if not taking.done() else [])
        if not taking.cancelled() and taking.exception() is None:
            self._leases.let_go(taking.result(), after=None)
