"""What calls with a request_id were given, so that a call sent again never pays again."""

from __future__ import annotations

import json
from collections.abc import Callable

import structlog
from cachetools import TTLCache

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import run_script
from cacheserver.model import Replay
from cacheserver.tiers.redis_client import Client

_log = structlog.get_logger(__name__)

_LIFETIME_S = 86_400
_REMEMBERED_HERE = 100_000

_REMEMBER = """
local now = tonumber(redis.call('TIME')[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), ARGV[1])
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('HDEL', KEYS[1], dead)
  redis.call('ZREM', KEYS[2], dead)
end
return 1
"""

_RECALL = """
local deadline = redis.call('ZSCORE', KEYS[2], ARGV[1])
if deadline and tonumber(deadline) > tonumber(redis.call('TIME')[1]) then
  return redis.call('HGET', KEYS[1], ARGV[1])
end
return false
"""


class LocalReplays:
    """`Replays` of this process alone: the 100,000 latest, for a day."""

    def __init__(self, *, monotonic_s: Callable[[], float]) -> None:
        self._replays: TTLCache[str, Replay] = TTLCache(_REMEMBERED_HERE, ttl=_LIFETIME_S, timer=monotonic_s)

    async def recall(self, replay_id: str) -> Replay | None:
        """What the call of this id was given, None if nothing is known."""
        return self._replays.get(replay_id)

    async def remember(self, replay_id: str, replay: Replay) -> None:
        """Keep what the call of this id was given."""
        self._replays[replay_id] = replay


class RedisReplays:
    """`Replays` that all replicas share and a restart survives; while Redis is silent, those of this process."""

    def __init__(self, *, client: Client, here: LocalReplays, prefix: str, timeout_s: float = 0.5) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis."""
        self._here = here
        self._timeout_s = timeout_s
        self._names = [f"{prefix}{{replays}}:calls", f"{prefix}{{replays}}:deadlines"]
        self._client = client

    async def recall(self, replay_id: str) -> Replay | None:
        """What the call of this id was given, None if nothing is known."""
        if (known := await self._here.recall(replay_id)) is not None:
            return known
        try:
            stored = await self._run(_RECALL, replay_id)
        except UNREACHABLE as error:
            _log.warning("replays_unreachable", op="recall", error=type(error).__name__)
            return None
        return _decode(stored) if stored is not None else None

    async def remember(self, replay_id: str, replay: Replay) -> None:
        """Keep what the call of this id was given."""
        await self._here.remember(replay_id, replay)
        value = json.dumps([replay.identity_name, *replay.variants])
        try:
            await self._run(_REMEMBER, replay_id, value, str(_LIFETIME_S))
        except UNREACHABLE as error:
            _log.warning("replays_unreachable", op="remember", error=type(error).__name__)

    async def _run(self, script: str, *args: str) -> bytes | None:
        answer: bytes | None = await run_script(self._client, script, self._names, args, timeout_s=self._timeout_s)
        return answer


def _decode(stored: bytes) -> Replay:
    identity_name, *variants = json.loads(stored)
    return Replay(identity_name, tuple(variants))
