"""L1 gives way before the kernel ends the process, and free memory goes back to the system.

Looked at four times a second. With half as many looks a service under load had 25 MB more resident at its worst:

    slack ──── free memory that the allocator keeps goes back to the system once it is more than a service needs
    pressure ─ more than the high-water mark of the room (the container's, else the machine's) is in use: first what is
               free goes back, which loses nothing; if that is not enough, L1 sheds what is above the low-water mark
    relief ─── below the low-water mark again: L1 may grow, by a little each look, until it may be as large as set

Between the marks nothing changes, and L1 needs longer than a look to grow from the low to the high one: so the guard
does not swing. L1 sheds even where others use the memory: the kernel ends the largest process, whoever was too greedy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from cacheserver.machine import Machine, Room
from cacheserver.tiers.memory import MemoryCache

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")

_MIB = 1024 * 1024

_BETWEEN_MARKS = 0.05
"""Share of the room that the low-water mark lies below the high one."""

_GROWS_IN = 128
"""Looks until an L1 that shed everything may be whole again."""

_STEP_BYTES = 32 * _MIB
"""Shed at a time; then others have their turn."""

_SLACK_BYTES, _SLACK_SHARE, _MOST_SLACK_BYTES = 24 * _MIB, 0.02, 96 * _MIB
"""What may be resident beside what is in use: so many bytes and this share of what L1 may hold, and so many at most.

With less, what goes back is asked for again at once, and each page costs a fault; with more, it takes too long to give
back: 0.1 ms of processor time per MB, in which nobody else gets memory.
"""


class MemoryGuard:
    """Watches how much memory is in use, and makes L1 and the allocator give some back. `look` is to be called often.

    Args:
        memory: L1.
        machine: tells what is resident.
        room: the memory there is; None where that is not known: then nothing is shed.
        high_water: share of the room, 0 to 1, from which on L1 gives way.
        give_back: gives free memory back to the system; called in a thread.
        taken: tells how much is taken from the allocator that gives back, called in a thread; None: what L1 holds is
            all that is known to be.
    """

    def __init__(  # noqa: PLR0913 - what it watches and what it can do, by keyword
        self,
        *,
        memory: MemoryCache,
        machine: Machine,
        room: Room | None,
        high_water: float,
        give_back: Callable[[], None] | None,
        taken: Callable[[], int] | None = None,
    ) -> None:
        self._memory = memory
        self._machine = machine
        self._room = room
        limit_bytes = room.limit_bytes if room else 0
        self._high_bytes = int(high_water * limit_bytes)
        self._low_bytes = int((high_water - _BETWEEN_MARKS) * limit_bytes)
        self._give_back = give_back
        self._taken = taken
        self._others_bytes: int | None = None
        self._is_short = False
        # One of its own, that gives way to nobody: where all others are at work, memory is what may run out.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="memory-guard")
        self.shed_bytes = 0
        """How much L1 shed so far."""

    def close(self) -> None:
        """End; `look` may not be called any more."""
        self._thread.shutdown(wait=False)

    async def look(self) -> None:
        """Look once, and do what there is to do."""
        await self._mind_slack()
        used_bytes = await self._used_bytes()
        if used_bytes is None:
            return
        if used_bytes > self._high_bytes:
            await self._relieve()
        elif used_bytes < self._low_bytes:
            self._let_grow(used_bytes)

    async def _mind_slack(self) -> None:
        """Give back what is free if it may be much: what is resident grew, and not by what is taken."""
        beside_bytes = await self._in_thread(self._beside_bytes)
        if beside_bytes is None or self._give_back is None:
            return
        if self._others_bytes is None or beside_bytes < self._others_bytes:
            self._others_bytes = beside_bytes
        slack_bytes = min(_MOST_SLACK_BYTES, _SLACK_BYTES + int(_SLACK_SHARE * self._memory.max_bytes))
        if beside_bytes > self._others_bytes + slack_bytes:
            await self._in_thread(self._give_back)
            # What is still resident is in use, and would not go back however often one asked.
            self._others_bytes = await self._in_thread(self._beside_bytes)

    async def _relieve(self) -> None:
        if self._give_back is not None:
            await self._in_thread(self._give_back)
        used_bytes = await self._used_bytes()
        if used_bytes is None or used_bytes <= self._high_bytes:
            return
        await self._shed(max(0, self._memory.size_bytes - (used_bytes - self._low_bytes)))
        if self._give_back is not None:
            await self._in_thread(self._give_back)
        if not self._is_short:
            self._is_short = True
            _log.warning(
                "memory_short",
                used_mib=used_bytes // _MIB,
                high_water_mib=self._high_bytes // _MIB,
                memory_mib=self._memory.size_bytes // _MIB,
                text="L1 gives way; lower memory.max_bytes, or give the service more memory",
            )

    async def _shed(self, to_bytes: int) -> None:
        memory = self._memory
        while memory.room_bytes > to_bytes:
            before_bytes = memory.size_bytes
            memory.shed(max(to_bytes, before_bytes - _STEP_BYTES))
            self.shed_bytes += before_bytes - memory.size_bytes
            await asyncio.sleep(0)

    def _let_grow(self, used_bytes: int) -> None:
        memory = self._memory
        if memory.room_bytes < memory.max_bytes:
            memory.shed(memory.room_bytes + memory.max_bytes // _GROWS_IN + 1)
        elif self._is_short:
            self._is_short = False
            _log.info("memory_no_longer_short", used_mib=used_bytes // _MIB, memory_mib=memory.size_bytes // _MIB)

    async def _used_bytes(self) -> int | None:
        """How much of the room is in use; None where that cannot be told."""
        if self._room is None:
            return None
        try:
            return await self._in_thread(self._room.used_bytes)
        except (OSError, ValueError):
            return None

    def _beside_bytes(self) -> int | None:
        """What is resident of this process beside what is taken from the allocator; None where that cannot be told.

        Without what calls have in hand, which comes and goes: were it counted, as much could lie free unseen once they
        have ended.
        """
        resident_bytes = self._machine.resident_bytes()
        if resident_bytes is None:
            return None
        return resident_bytes - (self._taken() if self._taken is not None else self._memory.size_bytes)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
