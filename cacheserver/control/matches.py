"""A sample of the similar hits, for a person to look at.

    {matches}:namespaces             a set of the namespaces that have any
    {matches}:<namespace>:hits       a sorted set, all scores 0, so in the order of ids: "<id> <what it is, as JSON>"
    {matches}:<namespace>:forgotten  the moment in milliseconds until which nothing is to be kept that is not here yet

An id begins with the moment of its hit. None of it has a TTL: a full Redis would evict it. What is too old, or too
much, goes with the next write, and is not shown before.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import answer_within, run_script
from cacheserver.errors import AccountsUnavailableError, UnknownReviewError
from cacheserver.interfaces import Clock
from cacheserver.model import CacheKey, MatchLevel, SampledMatch
from cacheserver.tasks import end, every
from cacheserver.tiers.redis_client import Client

_log = structlog.get_logger(__name__)

MOST = 1_000
"""Of one namespace. The oldest goes for a new one."""

_KEPT_S = 30 * 86_400.0
_MAX_PROMPT = 2_000
"""Characters: all of one namespace take at most 12 MB."""

_AT_ONCE = 200

_WRITE_S = 1.0
_DIGITS = 13
"""Of milliseconds since 1970, until the year 2286."""

_WRITE = """
local forgotten = tonumber(redis.call('GET', KEYS[2]) or '0')
for i = 5, #ARGV do
  if tonumber(string.sub(ARGV[i], 1, ARGV[4])) > forgotten then redis.call('ZADD', KEYS[1], 0, ARGV[i]) end
end
redis.call('ZREMRANGEBYLEX', KEYS[1], '-', '(' .. ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -ARGV[3] - 1)
redis.call('SADD', KEYS[3], ARGV[1])
return 1
"""

_FORGET_UNTIL = """
local forgotten = tonumber(redis.call('GET', KEYS[1]) or '0')
if tonumber(ARGV[1]) > forgotten then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
"""


class LocalMatches:
    """`Matches` of this process alone."""

    def __init__(self, *, clock: Clock, most: int = MOST) -> None:
        """At most `most` are kept of each namespace."""
        self._clock = clock
        self._most = most
        self._hits: dict[str, dict[str, SampledMatch]] = {}

    def record(self, *, namespace: str, level: MatchLevel, key: CacheKey, matched_key: CacheKey, prompt: str) -> None:
        """See `Matches.record`."""
        now_s = self._clock.now_s()
        name = f"{_moment(now_s)}-{secrets.token_hex(4)}"
        self.add([SampledMatch(name, now_s, namespace, level, key, matched_key, prompt[:_MAX_PROMPT])])

    async def page(self, *, namespace: str | None, before: str, limit: int) -> list[SampledMatch]:
        """See `Matches.page`."""
        oldest = _oldest(self._clock)
        found = [
            each
            for name, hits in self._hits.items()
            for each in hits.values()
            if namespace in (None, name) and each.id >= oldest and (not before or each.id < before)
        ]
        return _newest_first(found, limit)

    async def get(self, match_id: str) -> SampledMatch:
        """See `Matches.get`."""
        for hits in self._hits.values():
            if (found := hits.get(match_id)) is not None and found.id >= _oldest(self._clock):
                return found
        raise _unknown()

    async def drop(self, match: SampledMatch) -> None:
        """See `Matches.drop`."""
        self._hits.get(match.namespace, {}).pop(match.id, None)

    async def forget(self, namespace: str, key: CacheKey | None) -> None:
        """See `Matches.forget`."""
        hits = self._hits.get(namespace, {})
        for each in [each for each in hits.values() if _is_meant(each, key)]:
            del hits[each.id]

    def add(self, found: Iterable[SampledMatch]) -> None:
        """Keep these, too."""
        for each in found:
            hits = self._hits.setdefault(each.namespace, {})
            hits[each.id] = each
            if len(hits) > self._most:
                del hits[min(hits)]

    def take(self) -> dict[str, list[SampledMatch]]:
        """All of them by namespace; they are no longer here then."""
        taken, self._hits = self._hits, {}
        return {namespace: list(hits.values()) for namespace, hits in taken.items()}


class RedisMatches:
    """`Matches` that all replicas share and restarts survive. Written in the background, a second later.

    While Redis is silent they wait here, as many as are kept.
    """

    def __init__(self, *, client: Client, clock: Clock, prefix: str, timeout_s: float = 0.5, most: int = MOST) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis."""
        self._client = client
        self._clock = clock
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._most = most
        self._waiting = LocalMatches(clock=clock, most=most)
        self._writing: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._is_silent = False

    def start(self) -> None:
        """Write in the background from now on."""
        writing = every(_WRITE_S, self.write, clock=self._clock, name="write matches")
        self._writing = asyncio.create_task(writing, name="write matches")

    async def aclose(self) -> None:
        """Write what waits and stop."""
        if self._writing is not None:
            await end([self._writing])
        await self.write()

    def record(self, *, namespace: str, level: MatchLevel, key: CacheKey, matched_key: CacheKey, prompt: str) -> None:
        """See `Matches.record`."""
        self._waiting.record(namespace=namespace, level=level, key=key, matched_key=matched_key, prompt=prompt)

    async def page(self, *, namespace: str | None, before: str, limit: int) -> list[SampledMatch]:
        """See `Matches.page`."""
        await self.write()
        newest = f"({before}" if before else "+"
        found: list[SampledMatch] = []
        for each in await self._namespaces() if namespace is None else [namespace]:
            found += await self._read(each, newest, f"[{_oldest(self._clock)}", limit)
        return _newest_first(found, limit)

    async def get(self, match_id: str) -> SampledMatch:
        """See `Matches.get`."""
        await self.write()
        for namespace in await self._namespaces():
            # No id begins as another one does, and what follows an id is a blank.
            for found in await self._read(namespace, f"({match_id}!", f"[{match_id} ", 1):
                if found.id == match_id and found.id >= _oldest(self._clock):
                    return found
        raise _unknown()

    async def drop(self, match: SampledMatch) -> None:
        """See `Matches.drop`."""
        name = self._name(match.namespace, "hits")
        await self._ask(self._client.zremrangebylex(name, f"[{match.id} ", f"({match.id}!"))

    async def forget(self, namespace: str, key: CacheKey | None) -> None:
        """See `Matches.forget`."""
        async with self._turn:
            await self._waiting.forget(namespace, key)
            forgotten, until = self._name(namespace, "forgotten"), _moment(self._clock.now_s())
            await self._ask(run_script(self._client, _FORGET_UNTIL, [forgotten], [until], timeout_s=self._timeout_s))
        name = self._name(namespace, "hits")
        if key is None:
            await self._ask(self._client.delete(name))
            return
        stored = await self._ask(self._client.zrange(name, 0, -1))
        meant = [each for each in stored if (hit := _decoded(namespace, each)) is not None and _is_meant(hit, key)]
        if meant:
            await self._ask(self._client.zrem(name, *meant))

    async def write(self) -> None:
        """Write what waits; what cannot be written waits on."""
        async with self._turn:
            waiting = self._waiting.take()
            try:
                for namespace in list(waiting):
                    await self._write(namespace, waiting[namespace])
                    del waiting[namespace]
                self._is_silent = False
            except UNREACHABLE as error:
                if not self._is_silent:
                    _log.warning("matches_unreachable", error=type(error).__name__)
                self._is_silent = True
            finally:
                for hits in waiting.values():
                    self._waiting.add(hits)

    async def _write(self, namespace: str, hits: Sequence[SampledMatch]) -> None:
        names = [*(self._name(namespace, part) for part in ("hits", "forgotten")), self._all_name]
        for start in range(0, len(hits), _AT_ONCE):
            some = map(_encoded, hits[start : start + _AT_ONCE])
            given = (namespace, _oldest(self._clock), self._most, _DIGITS, *some)
            await run_script(self._client, _WRITE, names, given, timeout_s=self._timeout_s)

    async def _namespaces(self) -> list[str]:
        return [name.decode() for name in await self._ask(self._client.smembers(self._all_name))]

    async def _read(self, namespace: str, newest: str, oldest: str, limit: int) -> list[SampledMatch]:
        """At most `limit` between two bounds, newest first."""
        name = self._name(namespace, "hits")
        stored = await self._ask(self._client.zrevrangebylex(name, newest, oldest, start=0, num=limit))
        return [hit for each in stored if (hit := _decoded(namespace, each)) is not None]

    @property
    def _all_name(self) -> str:
        return f"{self._prefix}{{matches}}:namespaces"

    def _name(self, namespace: str, part: str) -> str:
        return f"{self._prefix}{{matches}}:{namespace}:{part}"

    async def _ask(self, asking: Any) -> Any:
        try:
            return await answer_within(self._timeout_s, asking)
        except UNREACHABLE as error:
            text = "Redis, which holds the sample of similar hits, does not answer; try again when it is back."
            raise AccountsUnavailableError(text) from error


def _moment(now_s: float) -> str:
    return f"{int(now_s * 1000):0{_DIGITS}d}"


def _oldest(clock: Clock) -> str:
    """What no id that is kept lies before."""
    return _moment(clock.now_s() - _KEPT_S)


def _newest_first(found: Iterable[SampledMatch], limit: int) -> list[SampledMatch]:
    return sorted(found, key=lambda each: each.id, reverse=True)[:limit]


def _is_meant(match: SampledMatch, key: CacheKey | None) -> bool:
    """Whether the identity of `key` was asked for in it; None: any."""
    return key is None or match.key.identity_name == key.identity_name


def _unknown() -> UnknownReviewError:
    return UnknownReviewError("No similar hit of this id waits for review.")


def _encoded(match: SampledMatch) -> str:
    told = {
        "time_s": match.time_s,
        "level": match.level,
        "key": match.key.name,
        "matched_key": match.matched_key.name,
        "prompt": match.prompt,
    }
    return f"{match.id} {json.dumps(told)}"


def _decoded(namespace: str, stored: bytes) -> SampledMatch | None:
    """The similar hit; None for what is none, which a newer release may have written."""
    name, _, told = stored.decode().partition(" ")
    try:
        fields = json.loads(told)
        return SampledMatch(
            id=name,
            time_s=float(fields["time_s"]),
            namespace=namespace,
            level=MatchLevel(fields["level"]),
            key=CacheKey.parse(fields["key"]),
            matched_key=CacheKey.parse(fields["matched_key"]),
            prompt=str(fields["prompt"]),
        )
    except (ValueError, KeyError, TypeError):
        _log.warning("match_unreadable")
        return None
