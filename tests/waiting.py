"""Waiting for what announces itself to nobody: another process, or the inside of a running service."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

_TURNS = 1_000
_PAUSE_S = 0.005


async def until(condition: Callable[[], bool | Awaitable[bool]], *, within_s: float = 15.0) -> None:
    """Let everything run until `condition` holds; TimeoutError if it does not in time.

    It gives way: first turn by turn of the loop, then, as what has not come by then is in another process, by short
    pauses, which leave that process the processor.
    """
    async with asyncio.timeout(within_s):
        for turn in itertools.count():
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0 if turn < _TURNS else _PAUSE_S)
