"""Running a script in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from cacheserver.tiers.redis import Client


async def run_script(client: Client, script: str, keys: Sequence[str], args: Sequence[Any], *, timeout_s: float) -> Any:
    """The script's answer. EVAL and not EVALSHA: redis-py's asyncio Cluster client cannot load scripts.

    Raises:
        UNREACHABLE: what any talk to Redis raises. The script may have run.
    """
    task = asyncio.current_task()
    cancels_before = task.cancelling() if task else 0
    async with asyncio.timeout(timeout_s):
        try:
            return await client.eval(script, len(keys), *keys, *map(str, args))
        finally:
            # redis-py sends through asyncio.wait_for, which before Python 3.12 swallows a cancellation that comes
            # just as the sending is done; a task that loops would never end.
            if task and task.cancelling() > cancels_before:
                raise asyncio.CancelledError
