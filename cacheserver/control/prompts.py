"""What callers of namespaces with store_prompts asked for and could not be given from the cache.

A record's count fades by forward decay (Cormode, Shkapenyuk, Srivastava and Xu, "Forward decay", ICDE 2009): an
event weighs 2^(t / half-life) with t since a fixed moment, so that sums of replicas add up, their order never changes
by itself, and dividing by today's weight gives today's count.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import run_script
from cacheserver.errors import AccountsUnavailableError
from cacheserver.interfaces import Clock
from cacheserver.model import CacheKey, Identity, ImageRequest, PromptKind, RecordedPrompt
from cacheserver.tasks import end, every
from cacheserver.tiers.redis_client import Client

_log = structlog.get_logger(__name__)

MOST = 1_000
"""Records of one kind in one namespace. The least wanted goes for a new one, which may yet be wanted more."""

_HALF_LIFE_S = 14 * 86_400
_EPOCH_S = 1_767_225_600
"""2026-01-01. Weights fit a double until 2065."""

_MAX_IDENTITY_BYTES = 16 * 1024
"""Longer requests are not recorded: those of a kind take at most 16 MiB."""

_WRITE_S = 1.0
_AT_ONCE = 200

_WRITE = """
local function forgotten_at(name) return tonumber(redis.call('ZSCORE', KEYS[4], name) or '0') end
local all_forgotten_at = forgotten_at('*')
local function write(i)
  local name, last = ARGV[i], tonumber(ARGV[i + 2])
  if last <= math.max(all_forgotten_at, forgotten_at(name)) then return end
  if not redis.call('ZSCORE', KEYS[1], name) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then
    local gone = redis.call('ZPOPMIN', KEYS[1])[1]
    redis.call('HDEL', KEYS[2], gone)
    redis.call('HDEL', KEYS[3], gone)
  end
  redis.call('ZINCRBY', KEYS[1], ARGV[i + 1], name)
  if last >= tonumber(redis.call('HGET', KEYS[3], name) or '0') then
    redis.call('HSET', KEYS[2], name, ARGV[i + 3])
    redis.call('HSET', KEYS[3], name, ARGV[i + 2])
  end
end
for i = 2, #ARGV, 4 do write(i) end
return 1
"""

_READ = """
local answer = {}
local wanted = redis.call('ZREVRANGE', KEYS[1], 0, tonumber(ARGV[1]) - 1, 'WITHSCORES')
for i = 1, #wanted, 2 do
  table.insert(answer, wanted[i + 1])
  table.insert(answer, redis.call('HGET', KEYS[3], wanted[i]))
  table.insert(answer, redis.call('HGET', KEYS[2], wanted[i]))
end
return answer
"""

_FORGET = """
local now, name, kept_s, most = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
for i = 2, #KEYS, 3 do
  if name == '*' then
    redis.call('DEL', KEYS[i], KEYS[i + 1], KEYS[i + 2])
  else
    redis.call('ZREM', KEYS[i], name)
    redis.call('HDEL', KEYS[i + 1], name)
    redis.call('HDEL', KEYS[i + 2], name)
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. (now - kept_s))
redis.call('ZADD', KEYS[1], now, name)
local oldest = redis.call('ZRANGE', KEYS[1], 0, -most - 1, 'WITHSCORES')
if #oldest > 0 then
  redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -most - 1)
  if not redis.call('ZSCORE', KEYS[1], '*') then redis.call('ZADD', KEYS[1], oldest[#oldest], '*') end
end
return 1
"""
"""Leaves a note, so that what another replica has yet to write of it does not come back.

Of more than `most` notes the oldest become one for everything: what was asked for before it, and is not written yet,
never will be.
"""

_EVERYTHING = "*"
_FORGOTTEN_S = 86_400
"""How long a note of what was forgotten is kept; at most as many of them as of records of a kind."""

_FIELDS = tuple(field.name for field in fields(ImageRequest) if field.name != "inputs")

_Group = tuple[str, PromptKind]


@dataclass(frozen=True, slots=True)
class _Record:
    """A request, how often it was made as a sum of weights, and when last."""

    request: ImageRequest
    n: int
    weight: float
    last_time_s: float


class LocalPrompts:
    """`Prompts` of this process alone."""

    def __init__(self, *, namespaces: Collection[str], clock: Clock, most: int = MOST) -> None:
        """`namespaces` are those whose prompts are stored; at most `most` records of each kind are kept in each."""
        self._namespaces = tuple(namespaces)
        self._clock = clock
        self._most = most
        self._groups: dict[_Group, dict[str, _Record]] = {}

    def record(self, kind: PromptKind, request: ImageRequest, *, namespace: str, identity: Identity, n: int) -> None:
        """A caller made this request."""
        if len(identity.canonical) <= _MAX_IDENTITY_BYTES:
            now_s = self._clock.now_s()
            self.add((namespace, kind), record_id(identity.key), _Record(request, n, _weight(now_s), now_s))

    async def most_wanted(
        self, *, namespace: str | None, kinds: Collection[PromptKind], limit: int
    ) -> list[RecordedPrompt]:
        """At most `limit` records, most wanted first."""
        now_s = self._clock.now_s()
        groups = _groups(self._namespaces, namespace, kinds)
        found = [_shown(group, each, now_s) for group in groups for each in self._groups.get(group, {}).values()]
        return _most_wanted(found, limit)

    async def forget(self, namespace: str, key: CacheKey | None) -> None:
        """Drop the records of an identity, or with None all of the namespace."""
        for group in [group for group in self._groups if group[0] == namespace]:
            if key is None:
                del self._groups[group]
            else:
                self._groups[group].pop(record_id(key), None)

    def add(self, group: _Group, name: str, record: _Record) -> None:
        """Add a record to what there is of it."""
        records = self._groups.setdefault(group, {})
        if (known := records.get(name)) is not None:
            latest = max(known, record, key=lambda each: each.last_time_s)
            record = replace(latest, weight=known.weight + record.weight)
        elif len(records) >= self._most:
            del records[min(records, key=lambda each: records[each].weight)]
        records[name] = record

    def take(self) -> dict[_Group, dict[str, _Record]]:
        """All records, which are no longer here then."""
        taken, self._groups = self._groups, {}
        return taken


class RedisPrompts:
    """`Prompts` that all replicas share and restarts survive. Written in the background, a second later.

    While Redis is silent records wait here, as many as are kept of each kind. A write whose answer is lost is made
    again, and counts twice.
    """

    def __init__(  # noqa: PLR0913 - whose prompts, where, and the bounds
        self,
        *,
        client: Client,
        namespaces: Collection[str],
        clock: Clock,
        prefix: str,
        timeout_s: float = 0.5,
        most: int = MOST,
    ) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis."""
        self._client = client
        self._namespaces = tuple(namespaces)
        self._clock = clock
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._most = most
        self._waiting = LocalPrompts(namespaces=namespaces, clock=clock, most=most)
        self._writing: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._is_silent = False

    def start(self) -> None:
        """Write in the background from now on."""
        writing = every(_WRITE_S, self.write, clock=self._clock, name="write prompts")
        self._writing = asyncio.create_task(writing, name="write prompts")

    async def aclose(self) -> None:
        """Write what waits and stop."""
        if self._writing is not None:
            await end([self._writing])
        await self.write()

    def record(self, kind: PromptKind, request: ImageRequest, *, namespace: str, identity: Identity, n: int) -> None:
        """A caller made this request."""
        self._waiting.record(kind, request, namespace=namespace, identity=identity, n=n)

    async def most_wanted(
        self, *, namespace: str | None, kinds: Collection[PromptKind], limit: int
    ) -> list[RecordedPrompt]:
        """At most `limit` records of all replicas, most wanted first. Raises AccountsUnavailableError."""
        await self.write()
        now_s = self._clock.now_s()
        found: list[RecordedPrompt] = []
        for group in _groups(self._namespaces, namespace, kinds):
            answer = await self._ask(_READ, self._names(group), min(limit, self._most))
            found += [_shown(group, each, now_s) for each in _decoded(answer)]
        return _most_wanted(found, limit)

    async def forget(self, namespace: str, key: CacheKey | None) -> None:
        """Drop the records of an identity, or with None all of the namespace. Raises AccountsUnavailableError."""
        async with self._turn:
            await self._waiting.forget(namespace, key)
            names = [name for kind in PromptKind for name in self._names((namespace, kind))]
            which = _EVERYTHING if key is None else record_id(key)
            given = (self._clock.now_s(), which, _FORGOTTEN_S, self._most)
            await self._ask(_FORGET, [self._notes(namespace), *names], *given)

    async def write(self) -> None:
        """Write what waits; what cannot be written waits on."""
        async with self._turn:
            batches = list(_batches(self._waiting.take()))
            try:
                while batches:
                    group, records = batches[-1]
                    args = [arg for name, each in records for arg in _encoded(name, each)]
                    await self._run(_WRITE, [*self._names(group), self._notes(group[0])], self._most, *args)
                    batches.pop()
                self._is_silent = False
            except UNREACHABLE as error:
                if not self._is_silent:
                    _log.warning("prompts_unreachable", error=type(error).__name__)
                self._is_silent = True
            finally:
                for group, records in batches:
                    for name, each in records:
                        self._waiting.add(group, name, each)

    def _names(self, group: _Group) -> list[str]:
        namespace, kind = group
        return [f"{self._prefix}{{prompts}}:{namespace}:{kind}:{part}" for part in ("wanted", "requests", "times")]

    def _notes(self, namespace: str) -> str:
        return f"{self._prefix}{{prompts}}:{namespace}:forgotten"

    async def _ask(self, script: str, names: Sequence[str], *args: object) -> Any:
        try:
            return await self._run(script, names, *args)
        except UNREACHABLE as error:
            text = "Redis, which holds the recorded prompts, does not answer; try again when it is back."
            raise AccountsUnavailableError(text) from error

    async def _run(self, script: str, names: Sequence[str], *args: object) -> Any:
        return await run_script(self._client, script, names, args, timeout_s=self._timeout_s)


def record_id(key: CacheKey) -> str:
    """What the records of an identity are called: all variants are one."""
    return key.digest[:16].hex()


def _weight(moment_s: float) -> float:
    return float(2.0 ** ((moment_s - _EPOCH_S) / _HALF_LIFE_S))


def _groups(namespaces: Sequence[str], namespace: str | None, kinds: Collection[PromptKind]) -> Iterator[_Group]:
    """Where to look for records of these kinds (of all, if there is none) in a namespace, or in all that store any."""
    chosen = [each for each in namespaces if namespace in (None, each)]
    return product(chosen, kinds or tuple(PromptKind))


def _batches(groups: Mapping[_Group, Mapping[str, _Record]]) -> Iterator[tuple[_Group, list[tuple[str, _Record]]]]:
    """What one write carries each."""
    for group, records in groups.items():
        items = list(records.items())
        for start in range(0, len(items), _AT_ONCE):
            yield group, items[start : start + _AT_ONCE]


def _shown(group: _Group, record: _Record, now_s: float) -> RecordedPrompt:
    namespace, kind = group
    return RecordedPrompt(
        request=record.request,
        namespace=namespace,
        n=record.n,
        kind=kind,
        count=record.weight / _weight(now_s),
        last_time_s=record.last_time_s,
    )


def _most_wanted(found: list[RecordedPrompt], limit: int) -> list[RecordedPrompt]:
    return sorted(found, key=lambda each: (-each.count, -each.last_time_s))[:limit]


def _encoded(name: str, record: _Record) -> tuple[str, str, str, str]:
    request = {field: getattr(record.request, field) for field in _FIELDS} | {"extra": dict(record.request.extra)}
    return name, repr(record.weight), repr(record.last_time_s), json.dumps([record.n, request])


def _decoded(answer: Sequence[bytes | None]) -> Iterator[_Record]:
    for weight, last_time_s, stored in zip(answer[::3], answer[1::3], answer[2::3], strict=True):
        if weight is None or last_time_s is None or stored is None:
            continue
        n, request = json.loads(stored)
        if request.keys() - _FIELDS:
            continue  # a later version's, with a field that decides the picture and that we do not know
        extra: Mapping[str, Any] = MappingProxyType(request.pop("extra"))
        yield _Record(ImageRequest(**request, extra=extra), n, float(weight), float(last_time_s))
