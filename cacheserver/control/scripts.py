"""Running a script in Redis."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Sequence
from functools import cache
from typing import Any, TypeVar

from redis.exceptions import NoScriptError

from cacheserver.tiers.redis_client import Client

_T = TypeVar("_T")


async def run_script(client: Client, script: str, keys: Sequence[str], args: Sequence[Any], *, timeout_s: float) -> Any:
    """The script's answer. It goes by its hash, and as a whole to a server that does not know it yet.

    redis-py's own way of doing so needs SCRIPT LOAD, which its asyncio Cluster client does not have.

    Raises:
        UNREACHABLE: what any talk to Redis raises. The script may have run.
    """
    return await answer_within(timeout_s, _run(client, script, len(keys), (*keys, *map(str, args))))


async def answer_within(timeout_s: float, asking: Awaitable[_T]) -> _T:
    """What Redis answers, if it does in time.

    Raises:
        UNREACHABLE: what any talk to Redis raises.
    """
    task = asyncio.current_task()
    cancels_before = task.cancelling() if task else 0
    async with asyncio.timeout(timeout_s):
        try:
            return await asking
        finally:
            # redis-py sends through asyncio.wait_for, which before Python 3.12 swallows a cancellation that comes
            # just as the sending is done; a task that loops would never end.
            if task and task.cancelling() > cancels_before:
                raise asyncio.CancelledError


async def _run(client: Client, script: str, many_keys: int, given: tuple[str, ...]) -> Any:
    try:
        return await client.evalsha(_sha1(script), many_keys, *given)
    except NoScriptError:
        return await client.eval(script, many_keys, *given)


@cache
def _sha1(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
