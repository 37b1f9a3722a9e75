"""What bounds a job: its own budget, and its own pace."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from cacheserver.errors import JobBudgetError, LedgerUnavailableError
from cacheserver.interfaces import Clock, Ledger
from cacheserver.warming.values import JobOptions

_MINUTE_S = 60.0
_SETTLED_BETWEEN_READS = 100


class Purse:
    """A job's budget. The most an item can cost is set aside before it is begun, and replaced by what it cost.

    What tries that failed on the way have cost is known to the ledger alone: its sum counts where it is larger. It is
    this replica's; what other replicas paid in earlier runs the client knows.
    """

    def __init__(self, options: JobOptions, ledger: Ledger) -> None:
        self._options = options
        self._ledger = ledger
        self._spent = options.spent_microusd
        self._in_ledger = 0
        self._aside = 0
        self._settled = 0
        self._change = asyncio.Condition()

    async def open(self) -> None:
        """Learn what earlier runs have spent, and may have: their calls under way count too.

        Raises:
            LedgerUnavailableError: the ledger cannot be read.
        """
        if self._options.budget_microusd is not None:
            self._spent = max(self._spent, await self._ledger.spent_microusd(self._options.tag, open_too=True))

    async def set_aside(self, microusd: int) -> None:
        """Set so much aside, waiting for what others have set aside and may not need.

        Raises:
            JobBudgetError: it is more than there is.
        """
        limit = self._options.budget_microusd
        async with self._change:
            while limit is not None and self._taken + microusd > limit:
                if not self._aside:
                    raise JobBudgetError(self._options.job, limit)
                await self._change.wait()
            self._aside += microusd

    async def settle(self, aside: int, spent: int) -> None:
        """Replace what was set aside by what was spent. A ledger that cannot be read counts as it last was."""
        self._settled += 1
        try:
            if self._options.budget_microusd is not None and self._settled % _SETTLED_BETWEEN_READS == 0:
                with suppress(LedgerUnavailableError):
                    self._in_ledger = await self._ledger.spent_microusd(self._options.tag)
        finally:
            async with self._change:
                self._aside -= aside
                self._spent += spent
                self._change.notify_all()

    @property
    def _taken(self) -> int:
        return max(self._spent, self._in_ledger) + self._aside


class Pace:
    """At most so many pictures a minute, evenly: nothing is saved up for a burst."""

    def __init__(self, max_images_per_minute: int | None, clock: Clock) -> None:
        self._each_s = _MINUTE_S / max_images_per_minute if max_images_per_minute else 0.0
        self._clock = clock
        self._next_s = 0.0

    async def turn(self, images: int) -> None:
        """Return when so many pictures may be begun."""
        if not self._each_s:
            return
        now_s = self._clock.monotonic_s()
        turn_s = max(now_s, self._next_s)
        self._next_s = turn_s + images * self._each_s
        if turn_s > now_s:
            await self._clock.sleep(turn_s - now_s)
