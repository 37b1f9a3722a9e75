"""L2: entries in Redis or Valkey, alone, behind Sentinel or as a Cluster."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from types import MappingProxyType

from redis.asyncio import RedisCluster
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from cacheserver.epochs import Epochs
from cacheserver.errors import CorruptEntryError, EntryTooLargeError, TierError, TierTimeoutError
from cacheserver.interfaces import Clock, no_step
from cacheserver.model import KEY_VERSION, CachedImage, CacheKey, Head, ImageBytes, Labels, TierName, Touch, Touched
from cacheserver.tiers import codec
from cacheserver.tiers.redis_client import Client, disconnect, literally

_HEAD_GUESS_BYTES = 4_096
_BATCH = 500

_FIND_BATCH = 100
"""Names looked up in one script: half a millisecond of the event loop's."""

_FIND_BY_PIPELINE_BATCH = 25
"""And in one pipeline, of which each costs redis-py as much as ten in a script."""

_SOON = 0.1
"""A copy that stays for less than this share of the time a new one would is prolonged."""

_NEARLY = 0.8
"""Nor is one prolonged that stays for this share of the time that it is of use."""

_PUT_ATTEMPTS = 4

_ALONE_S = 30 * 86_400.0
"""For which a copy stays, unless Redis is full, that the last tier has yet to take: longer than any outage."""

_MAX_LISTED = 1_000
"""Renditions listed of one fingerprint at most."""

_LIST_OUTLIVES_MS = 60_000
"""By this a list stays longer than what it names."""

# Tells of many names at once what a pipeline would tell one by one, at a sixth of the event loop's time.
_COUNT_EACH = """
local counts = {}
for i, name in ipairs(KEYS) do counts[i] = redis.call('EXISTS', name) end
return counts
"""

# Overwrites a value only if it still begins as the caller saw it: another writer may have been faster.
_REPLACE_IF_SEEN = """
if redis.call('TYPE', KEYS[1]).ok == 'string' then
  local start = redis.call('GETRANGE', KEYS[1], 0, ARGV[1])
  if redis.sha1hex(start) ~= ARGV[2] then return 0 end
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 1
"""

# Only what was seen, in both: another picture may have taken its place.
_REPLACE_SEEN = """
if redis.sha1hex(redis.call('GETRANGE', KEYS[1], 0, ARGV[1])) ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 1
"""

# The same picture, and to where nothing lies; else it goes.
_MOVE_OR_REMOVE = """
local is_seen = redis.sha1hex(redis.call('GETRANGE', KEYS[1], 0, ARGV[1])) == ARGV[2]
if is_seen and redis.call('RENAMENX', KEYS[1], KEYS[2]) == 1 then
  return redis.call('PEXPIRE', KEYS[2], ARGV[3])
end
redis.call('DEL', KEYS[1])
return 0
"""

_REMOVE_IF_SEEN = """
if redis.sha1hex(redis.call('GETRANGE', KEYS[1], 0, ARGV[1])) ~= ARGV[2] then return 0 end
return redis.call('DEL', KEYS[1])
"""


class RedisTier:
    """Entries as values with an expiry, so that Redis may drop the idle ones. A `Tier`.

    An entry lies under `<prefix>{<identity>}.<variant>`: the braces are Redis Cluster's hash tag, so that all
    variants of an identity share a slot. It stays for `ttl_s`, give or take `ttl_jitter` of it, lest what was
    written together expires together; never longer than it is fresh, or else of use: see `stale_s`.

    Renditions lie under `<prefix>{<fingerprint>}.<rest of the key>`, and the set `<prefix>{<fingerprint>}.renditions`
    lists them: to find them without it would be to look at everything there is. Redis may evict the list before what it
    names, and then a purge would not find that; so a rendition that is not listed is not read.

    Args:
        client: from `connect`; closed with the tier.
        clock: decides what is fresh.
        rng: spreads the expiry.
        prefix: begins every name.
        ttl_s: how long an entry stays, in seconds.
        ttl_jitter: share of `ttl_s`, 0 to 1, by which it varies.
        stale_s: for how long after its end an entry may be of use, by partition.
        max_entry_bytes: a larger image is refused with EntryTooLargeError; a larger value is not read.
        max_concurrency: most calls at a time; more wait. At most the client's max_connections.
        epochs: say what was purged.
        write_version: the codec version that entries are written in.
        is_alone: whether the last tier has yet to take what lies in the slot of this name; it stays for longer.
    """

    name = TierName.REDIS

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        client: Client,
        *,
        clock: Clock,
        rng: random.Random,
        prefix: str = "promptcache:",
        ttl_s: float = 86_400.0,
        ttl_jitter: float = 0.1,
        stale_s: Mapping[str, float] = MappingProxyType({}),
        max_entry_bytes: int = 16 * 1024 * 1024,
        max_concurrency: int = 64,
        epochs: Epochs | None = None,
        write_version: int = codec.WRITE_VERSION,
        is_alone: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._write_version = write_version
        self._epochs = epochs or Epochs()
        self._is_alone = is_alone
        self._client = client
        self._clock = clock
        self._rng = rng
        self._prefix = prefix
        self._ttl_s = ttl_s
        self._ttl_jitter = ttl_jitter
        self._stale_s = stale_s
        self._max_entry_bytes = max_entry_bytes
        # One byte more than an entry can have, so that a larger value shows.
        self._read_end = codec.MAX_HEAD_BYTES + max_entry_bytes
        # redis-py refuses a call beyond its connections at once, which would look like a failure of Redis.
        self._has_scripts = not isinstance(client, RedisCluster)
        """Of many keys: in a cluster the keys of one script have to be in one slot."""
        self._turns = asyncio.Semaphore(max_concurrency)

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None:
        """See `Tier.get`."""
        stored = await self._read(key)
        return self._servable(key, stored, stale_s) if stored else None

    async def find(self, keys: Sequence[CacheKey], *, on_step: Callable[[], None] = no_step) -> list[bool]:
        """See `Tier.find`."""
        found: list[bool] = []
        batch = _FIND_BATCH if self._has_scripts else _FIND_BY_PIPELINE_BATCH
        for start in range(0, len(keys), batch):
            async with self._turn("find"):
                found += map(bool, await self._count([self._name(key) for key in keys[start : start + batch]]))
            on_step()
        return found

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        """See `Tier.put`."""
        if entry.size_bytes > self._max_entry_bytes:
            raise EntryTooLargeError(f"the image has {entry.size_bytes} bytes; Redis takes {self._max_entry_bytes}")
        stored = codec.encode(entry, self._write_version)
        if key.is_rendition:
            await self._list(key)
        if replace:
            return await self._put_unless_later(key, entry, stored)
        return await self._put_if_free(key, entry, stored)

    async def move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:
        """See `Tier.move`."""
        head = codec.encode_head(entry, self._write_version)
        digest = hashlib.sha1(head, usedforsecurity=False).hexdigest()
        names = self._name(slot), self._name(key)
        async with self._turn("move"):
            # A user who may not rename, and what is no value, are as if another picture lay there.
            with suppress(ResponseError):
                is_moved = await self._client.execute_command(
                    "EVAL", _MOVE_OR_REMOVE, 2, *names, len(head) - 1, digest, self._ttl_ms(key, entry)
                )
                return bool(is_moved)
        await self.delete(slot)
        return False

    async def touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        """See `Tier.touch`."""
        if entry.size_bytes > self._max_entry_bytes:
            return Touched(Touch.CURRENT)  # it is none of ours
        head = await self._read_head(key)
        if not head:
            return Touched(Touch.ABSENT, self._untouched_s)
        holder = codec.decode_head(head).head.bare
        if holder.image.sha256 != entry.image.sha256:
            return Touched(Touch.GONE)
        if entry.outlasts(holder):
            is_moved = await self._replace_seen(key, head, entry)
            return Touched(Touch.MOVED if is_moved else Touch.GONE, self._untouched_s)
        return await self._prolong(key, entry)

    async def _prolong(self, key: CacheKey, entry: CachedImage) -> Touched:
        """Keep a copy that would soon be dropped for as long as a new one."""
        name = self._name(key)
        async with self._turn("touch"):
            left_s, longest_ms = await self._client.pttl(name) / 1000, self._ttl_ms(key, entry)
            if left_s > self._ttl_s * _SOON:
                return Touched(Touch.CURRENT, left_s - self._ttl_s * _SOON)
            if left_s >= _NEARLY * longest_ms / 1000:
                return Touched(Touch.CURRENT)  # it ends itself then
            await self._client.pexpire(name, longest_ms)
        return Touched(Touch.PROLONGED, self._untouched_s)

    async def delete(self, key: CacheKey) -> bool:
        """See `Tier.delete`."""
        async with self._turn("delete"):
            is_deleted = bool(await self._client.delete(self._name(key)))
            if key.is_rendition:
                await self._client.srem(self._list_name(key), key.name)
            return is_deleted

    async def reclaim(self, key: CacheKey) -> bool:
        """See `Tier.reclaim`."""
        try:
            seen = await self._read_head(key)
            if not seen or not self._epochs.is_purged(key, codec.decode_head(seen).labels):
                return False
        except CorruptEntryError:
            return await self.delete(key)
        digest = hashlib.sha1(seen, usedforsecurity=False).hexdigest()
        async with self._turn("delete"):
            is_removed = await self._client.execute_command(
                "EVAL", _REMOVE_IF_SEEN, 1, self._name(key), len(seen) - 1, digest
            )
            if is_removed and key.is_rendition:
                await self._client.srem(self._list_name(key), key.name)
        return bool(is_removed)

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        """See `Tier.scan`."""
        start = f"{self._prefix}{{{KEY_VERSION}.{partition}."
        names = self._client.scan_iter(match=f"{literally(start)}*", count=_BATCH)
        while True:
            async with self._turn("scan"):
                try:
                    name = await anext(names)
                except StopAsyncIteration:
                    return
            if (key := self._key(name)) is not None:
                yield key

    async def page(self, partition: str, *, after: CacheKey | None, limit: int) -> list[CacheKey]:
        """See `Tier.page`. Redis has no order of names, so each page looks at all of them."""
        last = "" if after is None else after.name
        keys = {key.name: key async for key in self.scan(partition) if key.name > last}
        return [keys[name] for name in heapq.nsmallest(limit, keys)]

    async def renditions(self, key: CacheKey) -> list[CacheKey]:
        """See `Tier.renditions`."""
        async with self._turn("renditions"):
            names: list[bytes] = await self._client.execute_command("SMEMBERS", self._list_name(key))
        keys = (self._key(name) for name in names)
        return [found for found in keys if found is not None and found.is_rendition]

    async def head(self, key: CacheKey) -> Head | None:
        """See `Tier.head`."""
        metadata = await self._metadata(key)
        return None if metadata is None else metadata.head

    async def labels(self, key: CacheKey) -> Labels | None:
        """See `Tier.labels`."""
        metadata = await self._metadata(key)
        return None if metadata is None else metadata.labels

    async def ping(self) -> None:
        """See `Tier.ping`."""
        async with self._turn("ping"):
            # A full server and a replica still read; only a write shows that writes work.
            await self._client.set(f"{self._prefix}ping", b"", px=60_000)

    async def aclose(self) -> None:
        """See `Tier.aclose`."""
        await disconnect(self._client)

    async def _count(self, names: Sequence[str]) -> list[int]:
        """How many values each of these names has: one or none."""
        if self._has_scripts:
            with suppress(ResponseError):
                return await self._counted_by_script(names)
            self._has_scripts = False  # an ACL or a proxy forbids them
        pipeline = self._client.pipeline(transaction=False)
        for name in names:
            pipeline.exists(name)
        counts: list[int] = await pipeline.execute()
        return counts

    async def _counted_by_script(self, names: Sequence[str]) -> list[int]:
        counts: list[int] = await self._client.execute_command("EVAL", _COUNT_EACH, len(names), *names)
        return counts

    async def _put_if_free(self, key: CacheKey, entry: CachedImage, stored: bytes) -> bool:
        for _ in range(_PUT_ATTEMPTS):
            if await self._set(key, entry, stored, nx=True):
                return True
            seen: ImageBytes = b""
            with suppress(CorruptEntryError):  # what is damaged may be overwritten
                seen = await self._read(key)
                if seen and (holder := self._servable(key, seen)) is not None:
                    return holder.image.sha256 == entry.image.sha256
            if await self._replace_if_seen(key, seen, self._read_end, entry, stored):
                return True
        raise TierError("the entry in Redis changed each time it was to be replaced")

    async def _put_unless_later(self, key: CacheKey, entry: CachedImage, stored: bytes) -> bool:
        """Take the place of what is stored, but of nothing that took it after `entry` was to: we may come late."""
        for _ in range(_PUT_ATTEMPTS):
            try:
                seen = await self._read_head(key)
                if seen and codec.decode_head(seen).labels.epoch > entry.epoch:
                    return False
            except CorruptEntryError:
                return await self._set(key, entry, stored)
            if not seen:
                is_put = await self._set(key, entry, stored, nx=True)
            else:
                is_put = await self._replace_if_seen(key, seen, len(seen) - 1, entry, stored)
            if is_put:
                return True
        raise TierError("the entry in Redis changed each time it was to be replaced")

    async def _set(self, key: CacheKey, entry: CachedImage, stored: bytes, *, nx: bool = False) -> bool:
        async with self._turn("put"):
            return bool(await self._client.set(self._name(key), stored, px=self._ttl_ms(key, entry), nx=nx))

    async def _replace_if_seen(
        self, key: CacheKey, seen: ImageBytes, last: int, entry: CachedImage, stored: bytes
    ) -> bool:
        """`seen` is what the value was up to byte `last`; whether it was replaced."""
        seen_digest = hashlib.sha1(seen, usedforsecurity=False).hexdigest()
        async with self._turn("put"):
            replaced = await self._client.execute_command(
                "EVAL", _REPLACE_IF_SEEN, 1, self._name(key), last, seen_digest, stored, self._ttl_ms(key, entry)
            )
        return bool(replaced)

    async def _replace_seen(self, key: CacheKey, seen: ImageBytes, entry: CachedImage) -> bool:
        """Write an entry over the one whose head was seen, if that still lies there; whether it did."""
        digest = hashlib.sha1(seen, usedforsecurity=False).hexdigest()
        stored, ttl_ms = codec.encode(entry, self._write_version), self._ttl_ms(key, entry)
        async with self._turn("touch"):
            is_replaced = await self._client.execute_command(
                "EVAL", _REPLACE_SEEN, 1, self._name(key), len(seen) - 1, digest, stored, ttl_ms
            )
        return bool(is_replaced)

    @property
    def _untouched_s(self) -> float:
        """For how long a new copy needs not be looked at: it may stay shorter than most."""
        return self._ttl_s * (1 - self._ttl_jitter - _SOON)

    async def _read(self, key: CacheKey, end: int | None = None) -> ImageBytes:
        """The value up to byte `end`, or to the most an entry can have; empty if there is none."""
        last = self._read_end if end is None else end
        async with self._turn("get"):
            if key.is_rendition and not await self._client.sismember(self._list_name(key), key.name):
                return b""
            stored: ImageBytes = await self._client.execute_command("GETRANGE", self._name(key), 0, last)
            return stored

    async def _list(self, key: CacheKey) -> None:
        """List a rendition before it is written: what is never listed would outlive a purge."""
        name = self._list_name(key)
        async with self._turn("put"):
            if await self._client.scard(name) >= _MAX_LISTED:
                await self._client.delete(name)  # none of those it named is read any more, and Redis drops them in time
            await self._client.sadd(name, key.name)
            # No rendition stays longer than this, and each one written lets the list stay as long.
            await self._client.pexpire(name, int(self._ttl_s * (1 + self._ttl_jitter) * 1000) + _LIST_OUTLIVES_MS)

    async def _metadata(self, key: CacheKey) -> codec.Metadata | None:
        try:
            head = await self._read_head(key)
            return codec.decode_head(head) if head else None
        except CorruptEntryError:
            return None

    async def _read_head(self, key: CacheKey) -> ImageBytes:
        """What lies before the image; empty if there is nothing. Raises CorruptEntryError."""
        start = await self._read(key, end=_HEAD_GUESS_BYTES - 1)
        if not start:
            return b""
        length = codec.head_length(start)
        if length > len(start):
            start = await self._read(key, end=length - 1)
        return start[:length]

    def _servable(self, key: CacheKey, stored: ImageBytes, stale_s: float = 0.0) -> CachedImage | None:
        entry = codec.decode(stored)
        return entry if codec.answers(entry, key, self._clock.now_s(), self._epochs, stale_s=stale_s) else None

    def _ttl_ms(self, key: CacheKey, entry: CachedImage) -> int:
        ttl_s = self._ttl_s * self._rng.uniform(1 - self._ttl_jitter, 1 + self._ttl_jitter)
        if self._is_alone(key.name):
            ttl_s = max(ttl_s, _ALONE_S)
        if entry.expire_time_s is not None:
            stale_s = self._stale_s.get(entry.key.partition, 0.0)
            ttl_s = min(ttl_s, entry.expire_time_s + stale_s - self._clock.now_s())
        return max(1, int(ttl_s * 1000))

    def _name(self, key: CacheKey) -> str:
        if key.is_rendition:
            start = key.fingerprint_name
            return f"{self._prefix}{{{start}}}{key.name.removeprefix(start)}"
        return f"{self._prefix}{{{key.identity_name}}}.{key.variant}"

    def _list_name(self, key: CacheKey) -> str:
        return f"{self._prefix}{{{key.fingerprint_name}}}.renditions"

    def _key(self, name: bytes) -> CacheKey | None:
        spelled = name.decode("utf-8", "replace").removeprefix(self._prefix)
        try:
            return CacheKey.parse(spelled.replace("{", "").replace("}", ""))
        except ValueError:
            return None  # somebody else's value under our prefix

    @asynccontextmanager
    async def _turn(self, op: str) -> AsyncIterator[None]:
        async with self._turns:
            try:
                yield
            except (RedisError, RedisClusterException, OSError) as exc:
                raise _tier_error(op, exc) from exc


def _tier_error(op: str, exc: Exception) -> TierError:
    """What `exc` means for a tier. Servers quote the command in some messages, so theirs stay out of ours."""
    if isinstance(exc, RedisTimeoutError):
        return TierTimeoutError(f"Redis did not answer {op} in time")
    if isinstance(exc, ResponseError) and str(exc).startswith("WRONGTYPE"):
        return CorruptEntryError("what is stored in Redis is not an entry")
    for kinds, meaning in _MEANINGS:
        if isinstance(exc, kinds):
            return TierError(f"Redis {meaning} (at {op})")
    if isinstance(exc, RedisConnectionError):
        return TierError(f"Redis cannot be reached: {exc}")
    return TierError(f"Redis failed at {op}: {type(exc).__name__}")


_MEANINGS = (
    (
        (AuthenticationError, AuthorizationError, NoPermissionError),
        "refuses us: user or password is wrong, or may not do this",
    ),
    ((OutOfMemoryError,), "refuses to write: it is full, and its maxmemory-policy evicts nothing"),
    ((ReadOnlyError,), "refuses to write: it is a read-only replica"),
    ((MasterNotFoundError,), "cannot be reached: no sentinel answers, or none knows the service"),
    ((RedisClusterException, ClusterError), "cannot be reached: no node of the cluster answers for the slot"),
)
