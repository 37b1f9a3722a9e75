"""Tombstones in Redis, which all replicas read: a sorted set of their names, each with its epoch.

An epoch is above every earlier one, and not below the server's clock in milliseconds: should Redis lose the set, the
epochs that come then are above those that entries carry all the same. It has no TTL: a full Redis would evict it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import run_script
from cacheserver.epochs import Tombstone
from cacheserver.errors import TierError
from cacheserver.tiers.redis import Client

_log = structlog.get_logger(__name__)

_AT_ONCE = 1_000
"""Names that one script merges or removes: a server runs nothing else meanwhile."""

# The names under one new epoch, above ARGV[1] too. The answer is that epoch.
_SET = """
local top = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local time = redis.call('TIME')
local epoch = time[1] * 1000 + math.floor(time[2] / 1000)
epoch = math.max(epoch, tonumber(ARGV[1]) + 1)
if top[2] then epoch = math.max(epoch, tonumber(top[2]) + 1) end
local text = string.format('%.0f', epoch)
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], text, ARGV[i]) end
return text
"""

# The newest epoch there, and the names after epoch ARGV[1], each with its own.
_SINCE = """
local top = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local news = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[1], '+inf', 'WITHSCORES')
return {top[2] or '0', news}
"""

_MERGE = """
for i = 1, #ARGV, 2 do
  local there = redis.call('ZSCORE', KEYS[1], ARGV[i + 1])
  if not there or tonumber(there) < tonumber(ARGV[i]) then redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1]) end
end
"""


_REMOVE = """
for i = 1, #ARGV, 2 do
  local there = redis.call('ZSCORE', KEYS[1], ARGV[i + 1])
  if there and tonumber(there) <= tonumber(ARGV[i]) then redis.call('ZREM', KEYS[1], ARGV[i + 1]) end
end
"""


class RedisTombstones:
    """The tombstones of all replicas. Raises TierError and nothing else, always within `timeout_s`."""

    def __init__(self, *, client: Client, prefix: str, timeout_s: float = 1.0) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis."""
        self._client = client
        self._name = f"{prefix}tombstones"
        self._timeout_s = timeout_s

    async def set(self, names: Sequence[str], *, above: int) -> int:
        """Set tombstones of these names; the epoch they have, above all earlier ones and above `above`."""
        return int(await self._run(_SET, above, *names))

    async def since(self, epoch: int) -> tuple[int, list[Tombstone]]:
        """The newest epoch there is, and the tombstones after `epoch`. A set that was lost has less than we know."""
        newest, flat = await self._run(_SINCE, epoch)
        found = [_tombstone(name, score) for name, score in zip(flat[::2], flat[1::2], strict=True)]
        return int(float(newest)), [each for each in found if each is not None]

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
            return await run_script(self._client, script, [self._name], args, timeout_s=self._timeout_s)
        except UNREACHABLE as error:
            raise TierError(f"Redis did not answer for tombstones: {type(error).__name__}") from error


def _tombstone(name: bytes, score: bytes) -> Tombstone | None:
    try:
        return Tombstone.parse(int(float(score)), name.decode())
    except ValueError:
        _log.warning("tombstone_unreadable")
        return None
