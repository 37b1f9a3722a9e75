"""Waiting for what announces itself to nobody: another process, or the inside of a running service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def until(condition: Callable[[], bool | Awaitable[bool]], *, within_s: float = 15.0) -> None:
    """Let everything run until `condition` holds; TimeoutError if it does not in time.

    It gives way and never waits a fixed time: a test that passes takes as long as what it waits for.
    """
    async with asyncio.timeout(within_s):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0)
