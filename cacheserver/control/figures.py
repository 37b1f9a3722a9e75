"""The figures of all replicas, minute by minute and hour by hour: a hash per bucket of time, a field per cell.

    <prefix>{figures}:contents     names what is stored: made with the first write, so that a Redis that came back
                                   empty is told from one that did not
    <prefix>{figures}:60           sorted set: when each minute begins of which there is anything; :3600 for hours
    <prefix>{figures}:60:<start>   hash: the cells of the minute that begins then

One hash tag keeps all of it together in a Cluster. Nothing has an expiry: a Redis that is full would evict it first.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import answer_within, run_script
from cacheserver.errors import AccountsUnavailableError
from cacheserver.figures import HOUR_S, MINUTE_S, Bucket, cell_prefix
from cacheserver.tiers.redis_client import Client

_CELLS_AT_ONCE = 500
"""Fields that one script writes: what a script may unpack, and Redis serves nobody else meanwhile."""

_BUCKETS_AT_ONCE = 20

_T = TypeVar("_T")

# Per bucket: the name of its index, when it begins, how many values follow, and these, names and cells by turns.
_TELL = """
redis.call('SET', KEYS[1], ARGV[1], 'NX')
local at = 2
for i = 4, #KEYS do
  local start, many = ARGV[at + 1], tonumber(ARGV[at + 2])
  redis.call('ZADD', KEYS[tonumber(ARGV[at])], start, start)
  redis.call('HSET', KEYS[i], unpack(ARGV, at + 3, at + 2 + many))
  at = at + 3 + many
end
return redis.call('GET', KEYS[1])
"""

# Removes the cells of an owner.
_FORGET = """
for _, key in ipairs(KEYS) do
  for _, name in ipairs(redis.call('HKEYS', key)) do
    if string.sub(name, 1, #ARGV[1]) == ARGV[1] then redis.call('HDEL', key, name) end
  end
end
return 1
"""

# The index first, then the buckets of it that go; these by when they begin.
_DROP = """
for i, start in ipairs(ARGV) do
  redis.call('UNLINK', KEYS[i + 1])
  redis.call('ZREM', KEYS[1], start)
end
return 1
"""


class RedisFigures:
    """`FigureStore` in the Redis that all replicas share."""

    def __init__(self, *, client: Client, prefix: str, timeout_s: float = 2.0) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis."""
        self._client = client
        self._base = f"{prefix}{{figures}}:"
        self._timeout_s = timeout_s

    async def tell(self, cells: Mapping[Bucket, Mapping[str, str]]) -> str:
        """See `FigureStore.tell`."""
        contents = ""
        for part in _parts(cells):
            contents = await self._tell(part)
        return contents

    async def forget(self, owner: str, buckets: Sequence[Bucket]) -> None:
        """See `FigureStore.forget`."""
        for some in _some(buckets, _BUCKETS_AT_ONCE):
            names = [self._name(bucket) for bucket in some]
            await self._run(_FORGET, names, [cell_prefix(owner)])

    async def buckets(self, span_s: int) -> list[Bucket]:
        """See `FigureStore.buckets`."""
        starts: Sequence[Any] = await self._heard(self._client.zrange(self._index(span_s), 0, -1))
        return [Bucket(span_s, int(start)) for start in starts]

    async def read(self, buckets: Sequence[Bucket]) -> list[dict[str, str]]:
        """See `FigureStore.read`."""
        found: list[dict[str, str]] = []
        for some in _some(buckets, _BUCKETS_AT_ONCE):
            pipeline = self._client.pipeline(transaction=False)
            for bucket in some:
                pipeline.hgetall(self._name(bucket))
            answers = await self._heard(pipeline.execute())
            found += [{_text(name): _text(cell) for name, cell in answer.items()} for answer in answers]
        return found

    async def drop(self, buckets: Sequence[Bucket]) -> None:
        """See `FigureStore.drop`."""
        for some in _some(buckets, _BUCKETS_AT_ONCE):
            for span_s in (MINUTE_S, HOUR_S):
                these = [bucket for bucket in some if bucket.span_s == span_s]
                keys = [self._index(span_s), *map(self._name, these)]
                await self._run(_DROP, keys, [bucket.start_s for bucket in these])

    async def _tell(self, cells: Mapping[Bucket, Mapping[str, str]]) -> str:
        keys = [f"{self._base}contents", self._index(MINUTE_S), self._index(HOUR_S)]
        args: list[Any] = [secrets.token_hex(8)]
        for bucket, told in cells.items():
            keys.append(self._name(bucket))
            args += [2 if bucket.span_s == MINUTE_S else 3, bucket.start_s, 2 * len(told)]
            for name, cell in told.items():
                args += [name, cell]
        return _text(await self._run(_TELL, keys, args))

    async def _run(self, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
        return await self._heard(run_script(self._client, script, keys, args, timeout_s=self._timeout_s))

    async def _heard(self, asking: Awaitable[_T]) -> _T:
        try:
            return await answer_within(self._timeout_s, asking)
        except UNREACHABLE as error:
            text = f"Redis, which has the figures of all replicas, cannot be asked now ({type(error).__name__})."
            raise AccountsUnavailableError(text) from error

    def _index(self, span_s: int) -> str:
        return f"{self._base}{span_s}"

    def _name(self, bucket: Bucket) -> str:
        return f"{self._base}{bucket.span_s}:{bucket.start_s}"


class LocalFigures:
    """`FigureStore` of this process alone, where there is no Redis."""

    def __init__(self) -> None:
        self._cells: dict[Bucket, dict[str, str]] = {}

    async def tell(self, cells: Mapping[Bucket, Mapping[str, str]]) -> str:
        """See `FigureStore.tell`. Never raises, and its contents stay."""
        for bucket, told in cells.items():
            self._cells.setdefault(bucket, {}).update(told)
        return "here"

    async def forget(self, owner: str, buckets: Sequence[Bucket]) -> None:
        """See `FigureStore.forget`."""
        prefix = cell_prefix(owner)
        for stored in [self._cells[bucket] for bucket in buckets if bucket in self._cells]:
            for name in [each for each in stored if each.startswith(prefix)]:
                del stored[name]

    async def buckets(self, span_s: int) -> list[Bucket]:
        """See `FigureStore.buckets`."""
        return sorted(bucket for bucket in self._cells if bucket.span_s == span_s)

    async def read(self, buckets: Sequence[Bucket]) -> list[dict[str, str]]:
        """See `FigureStore.read`."""
        return [dict(self._cells.get(bucket, ())) for bucket in buckets]

    async def drop(self, buckets: Sequence[Bucket]) -> None:
        """See `FigureStore.drop`."""
        for bucket in buckets:
            self._cells.pop(bucket, None)


def _parts(cells: Mapping[Bucket, Mapping[str, str]]) -> list[dict[Bucket, dict[str, str]]]:
    """The same in parts that one script writes each; at least one, so that who tells nothing learns the contents."""
    flat = [(bucket, name, cell) for bucket, told in cells.items() for name, cell in told.items()]
    parts: list[dict[Bucket, dict[str, str]]] = []
    for some in _some(flat, _CELLS_AT_ONCE) or [[]]:
        part: dict[Bucket, dict[str, str]] = {}
        for bucket, name, cell in some:
            part.setdefault(bucket, {})[name] = cell
        parts.append(part)
    return parts


def _some(items: Sequence[_T], many: int) -> list[list[_T]]:
    iterator = iter(items)
    return [some for _ in range(0, len(items), many) if (some := list(islice(iterator, many)))]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
