"""Real time."""

from __future__ import annotations

import asyncio
import time


class SystemClock:
    """The `Clock` of a running service."""

    # The functions themselves: every call looks at the clock some ten times.
    now_s = staticmethod(time.time)
    """Wall-clock seconds since 1970."""

    monotonic_s = staticmethod(time.monotonic)
    """Seconds that only go forward."""

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        await asyncio.sleep(seconds)
