"""Aliases in Redis: which identity's pictures answer for a canonical key, known to all replicas.

    alias:{<identity>}     "<level>:<prompt digest>:<key>"

An alias may be evicted like any picture: what it would have answered is paid for again.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import answer_within, run_script
from cacheserver.model import Alias, CacheKey, MatchLevel
from cacheserver.tiers.redis_client import Client

_log = structlog.get_logger(__name__)

_LASTS_S = 365 * 86_400
"""A limit lets a full Redis evict it: see `refuse_eviction_of_control_state`."""

_AWAY_S = 5.0
"""So long nobody asks a Redis that did not answer."""

_ADD = """
local there = redis.call('GET', KEYS[1])
if there and there ~= ARGV[1] and there ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""

_REMOVE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""


class NoAliases:
    """`Aliases` of a service without Redis: those that are known here are all there are."""

    async def find(self, names: Sequence[str]) -> list[Alias | None]:
        """See `Aliases.find`."""
        return [None] * len(names)

    async def add(self, name: str, alias: Alias, *, instead_of: Alias | None = None) -> bool:  # noqa: ARG002 - as it is called
        """See `Aliases.add`."""
        return True

    async def remove(self, name: str, alias: Alias) -> None:
        """See `Aliases.remove`."""


class RedisAliases:
    """`Aliases` in Redis. While it is silent nothing is known, and nothing is kept."""

    def __init__(
        self, *, client: Client, prefix: str, monotonic_s: Callable[[], float], timeout_s: float = 0.5
    ) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis."""
        self._client = client
        self._prefix = prefix
        self._monotonic_s = monotonic_s
        self._timeout_s = timeout_s
        self._away_until_s = monotonic_s()

    async def find(self, names: Sequence[str]) -> list[Alias | None]:
        """See `Aliases.find`."""
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            pipeline.get(self._name(name))
        stored = await self._asked("find", pipeline.execute())
        return [None] * len(names) if stored is None else list(map(_decode, stored))

    async def add(self, name: str, alias: Alias, *, instead_of: Alias | None = None) -> bool:
        """See `Aliases.add`."""
        before = "" if instead_of is None else _encode(instead_of)
        added = await self._asked("add", self._run(_ADD, name, _encode(alias), str(_LASTS_S), before))
        return added is None or bool(added)

    async def remove(self, name: str, alias: Alias) -> None:
        """See `Aliases.remove`."""
        await self._asked("remove", self._run(_REMOVE, name, _encode(alias)))

    async def _run(self, script: str, name: str, *args: str) -> Any:
        return await run_script(self._client, script, [self._name(name)], args, timeout_s=self._timeout_s)

    async def _asked(self, op: str, asking: Coroutine[Any, Any, Any]) -> Any:
        """What Redis answers; None if it does not, or did not a short while ago: each miss would wait for it."""
        if self._monotonic_s() < self._away_until_s:
            asking.close()
            return None
        try:
            return await answer_within(self._timeout_s, asking)
        except UNREACHABLE as error:
            _log.info("aliases_unreachable", op=op, error=type(error).__name__)
            self._away_until_s = self._monotonic_s() + _AWAY_S
            return None

    def _name(self, name: str) -> str:
        return f"{self._prefix}alias:{{{name}}}"


def _encode(alias: Alias) -> str:
    return f"{int(alias.level)}:{alias.prompt_digest.hex()}:{alias.key.name}"


def _decode(stored: bytes | None) -> Alias | None:
    """The alias; None for what is none, which a newer release may have written."""
    if stored is None:
        return None
    try:
        level, prompt_digest, name = stored.decode().split(":")
        return Alias(CacheKey.parse(name), MatchLevel(int(level)), bytes.fromhex(prompt_digest))
    except ValueError:
        _log.warning("alias_unreadable")
        return None
