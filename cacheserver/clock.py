"""Real time."""

from __future__ import annotations

import asyncio
import time


class SystemClock:
    """The `Clock` of a running service."""

    def now_s(self) -> float:
        """Wall-clock seconds since 1970."""
        return time.time()

    def monotonic_s(self) -> float:
        """Seconds that only go forward."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        await asyncio.sleep(seconds)
