"""Marks in Redis, which all replicas read: a set for each replica, and a set of the replicas that have one.

They have no TTL: a full Redis would evict them. All have one hash tag, so that a Cluster has them on one node.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import answer_within, run_script
from cacheserver.errors import TierError
from cacheserver.tiers.redis_client import Client

_CALLS_AT_ONCE = 16
"""Of ours to Redis: one beyond the client's connections would look like a Redis that is gone."""

_A_STEP = 500
"""Marks read, or told of, at a time."""

# The owner first: of marks whose owner nobody knows nobody would look after.
_ADD = """
redis.call('SADD', KEYS[2], ARGV[1])
for i = 2, #ARGV do redis.call('SADD', KEYS[1], ARGV[i]) end
return 1
"""

# Another's marks become ours, so that one replica sees to each, and another to all of them should it die of it.
_CLAIM = """
local marks = redis.call('SRANDMEMBER', KEYS[1], ARGV[3])
if #marks > 0 then redis.call('SADD', KEYS[3], ARGV[1]) end
for _, mark in ipairs(marks) do redis.call('SMOVE', KEYS[1], KEYS[2], mark) end
if redis.call('SCARD', KEYS[1]) == 0 then redis.call('SREM', KEYS[3], ARGV[2]) end
return #marks
"""


class RedisMarks:
    """The marks of all replicas, and those of this one. Raises TierError and nothing else, within `timeout_s`."""

    def __init__(self, *, client: Client, prefix: str, replica_id: str, live_name: str, timeout_s: float = 1.0) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis.

        `live_name` is that of the sorted set of the replicas that live.
        """
        self._client = client
        self._replica_id = replica_id
        self._live_name = live_name
        self._timeout_s = timeout_s
        self._start = f"{prefix}{{undrained}}:"
        self._owners = f"{self._start}replicas"
        self._ours = self._name(replica_id)
        self._places = asyncio.Semaphore(_CALLS_AT_ONCE)

    def _name(self, replica_id: str) -> str:
        return f"{self._start}{replica_id}"

    async def add(self, texts: Sequence[str]) -> None:
        """See `SharedMarks.add`."""
        for start in range(0, len(texts), _A_STEP):
            some = texts[start : start + _A_STEP]
            await self._run(_ADD, [self._ours, self._owners], self._replica_id, *some)

    async def remove(self, text: str) -> bool:
        """See `SharedMarks.remove`."""
        return bool(await self._answer(self._client.execute_command("SREM", self._ours, text)))

    async def remove_all(self, texts: Sequence[str]) -> None:
        """See `SharedMarks.remove_all`."""
        for start in range(0, len(texts), _A_STEP):
            await self._answer(self._client.execute_command("SREM", self._ours, *texts[start : start + _A_STEP]))

    async def ours(self) -> AsyncIterator[str]:
        """See `SharedMarks.ours`."""
        cursor = None
        while cursor != 0:
            cursor, texts = await self._answer(self._client.sscan(self._ours, cursor or 0, count=_A_STEP))
            for text in texts:
                yield text.decode()

    async def dead(self) -> list[str]:
        """See `SharedMarks.dead`."""
        owners = await self._answer(self._client.execute_command("SMEMBERS", self._owners))
        # After that: who has marks was alive before.
        live = set(await self._answer(self._client.execute_command("ZRANGE", self._live_name, 0, -1)))
        return sorted(owner.decode() for owner in owners if owner not in live and owner != self._replica_id.encode())

    async def claim(self, replica_id: str, at_most: int) -> int:
        """See `SharedMarks.claim`."""
        names = [self._name(replica_id), self._ours, self._owners]
        return int(await self._run(_CLAIM, names, self._replica_id, replica_id, at_most))

    async def _run(self, script: str, names: Sequence[str], *args: object) -> Any:
        return await self._answer(run_script(self._client, script, names, args, timeout_s=self._timeout_s))

    async def _answer(self, asking: Any) -> Any:
        try:
            async with self._places:
                return await answer_within(self._timeout_s, asking)
        except UNREACHABLE as error:
            raise TierError(f"Redis did not answer for marks: {type(error).__name__}") from error
