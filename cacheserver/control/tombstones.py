"""Tombstones in Redis, which all replicas read: in the order in which they came, each with its epoch.

    {purges}:arrivals    a sorted set of their names, by when they came here
    {purges}:epochs      a hash of the same names, each with its epoch, and of the newest epoch ever given

An epoch is above every earlier one, and not below the server's clock in milliseconds; so is an arrival. Should Redis
lose them, those that come then are above all that entries carry, and that replicas have seen, all the same. Neither has
a TTL: a full Redis would evict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import run_script
from cacheserver.epochs import Arrivals, Tombstone
from cacheserver.errors import TierError
from cacheserver.tiers.redis_client import Client

_log = structlog.get_logger(__name__)

_AT_ONCE = 1_000
"""Names that one script merges or removes: a server runs nothing else meanwhile."""

_ARRIVAL = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local arrival = string.format('%.0f', math.max(now, tonumber(last[2] or '0') + 1))
local newest = tonumber(redis.call('HGET', KEYS[2], 'newest') or '0')
"""

# The names under one new epoch, above ARGV[1] too. The answer is that epoch.
_SET = (
    _ARRIVAL
    + """
local epoch = string.format('%.0f', math.max(now, newest + 1, tonumber(ARGV[1]) + 1))
redis.call('HSET', KEYS[2], 'newest', epoch)
for i = 2, #ARGV do
  redis.call('HSET', KEYS[2], ARGV[i], epoch)
  redis.call('ZADD', KEYS[1], arrival, ARGV[i])
end
return epoch
"""
)

# When the last one came, how many there are, and those that came after ARGV[1], each with its epoch.
_SINCE = """
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local news = {}
for i, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[1], '+inf')) do
  news[2 * i - 1], news[2 * i] = name, redis.call('HGET', KEYS[2], name) or '0'
end
return {last[2] or '0', redis.call('ZCARD', KEYS[1]), news}
"""

_MERGE = (
    _ARRIVAL
    + """
for i = 1, #ARGV, 2 do
  local there = redis.call('HGET', KEYS[2], ARGV[i + 1])
  if not there or tonumber(there) < tonumber(ARGV[i]) then
    redis.call('HSET', KEYS[2], ARGV[i + 1], ARGV[i])
    redis.call('ZADD', KEYS[1], arrival, ARGV[i + 1])
    newest = math.max(newest, tonumber(ARGV[i]))
  end
end
redis.call('HSET', KEYS[2], 'newest', string.format('%.0f', newest))
"""
)

_REMOVE = """
for i = 1, #ARGV, 2 do
  local there = redis.call('HGET', KEYS[2], ARGV[i + 1])
  if there and tonumber(there) <= tonumber(ARGV[i]) then
    redis.call('HDEL', KEYS[2], ARGV[i + 1])
    redis.call('ZREM', KEYS[1], ARGV[i + 1])
  end
end
"""


class RedisTombstones:
    """The tombstones of all replicas. Raises TierError and nothing else, always within `timeout_s`."""

    def __init__(self, *, client: Client, prefix: str, timeout_s: float = 1.0) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis."""
        self._client = client
        self._names = (f"{prefix}{{purges}}:arrivals", f"{prefix}{{purges}}:epochs")
        self._timeout_s = timeout_s

    async def set(self, names: Sequence[str], *, above: int) -> int:
        """Set tombstones of these names; the epoch they have, above all earlier ones and above `above`."""
        return int(await self._run(_SET, above, *names))

    async def since(self, arrival: int) -> Arrivals:
        """What came after `arrival`. What was lost has fewer, or an earlier last one, than we know."""
        last, count, flat = await self._run(_SINCE, arrival)
        found = [_tombstone(name, epoch) for name, epoch in zip(flat[::2], flat[1::2], strict=True)]
        return Arrivals(int(float(last)), int(count), [each for each in found if each is not None])

    async def merge(self, tombstones: Sequence[Tombstone]) -> None:
        """Set these with the epochs they have, but for those that are there already with the same or a later one."""
        await self._run_for(_MERGE, tombstones)

    async def remove(self, tombstones: Sequence[Tombstone]) -> None:
        """Remove these, but for those that have a later epoch meanwhile."""
        await self._run_for(_REMOVE, tombstones)

    async def _run_for(self, script: str, tombstones: Sequence[Tombstone]) -> None:
        for start in range(0, len(tombstones), _AT_ONCE):
            some = tombstones[start : start + _AT_ONCE]
            await self._run(script, *(part for each in some for part in (each.epoch, each.name)))

    async def _run(self, script: str, *args: object) -> Any:
        try:
            return await run_script(self._client, script, self._names, args, timeout_s=self._timeout_s)
        except UNREACHABLE as error:
            raise TierError(f"Redis did not answer for tombstones: {type(error).__name__}") from error


def _tombstone(name: bytes, epoch: bytes) -> Tombstone | None:
    try:
        return Tombstone.parse(int(epoch), name.decode())
    except ValueError:
        _log.warning("tombstone_unreadable")
        return None
