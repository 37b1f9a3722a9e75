"""Single-flight across replicas: who holds a request's lease pays for it, everyone else waits for what comes of it.

A lease is a hash in Redis, judged by the server's clock:

    {<identity>}:lease     holder, deadline_ms, fence, released_ms

Its holder shows every third of its span that it lives; a deadline that passes makes the next who asks its successor,
under a higher fence, in the same script. A lease that is held has no TTL: a full Redis would evict it. Once released it
has one, for then it only tells when that was: who looked into the tiers before looks again. The leases of the dead that
nobody asks for any more are swept.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import run_script
from cacheserver.interfaces import Books, Clock, Lease
from cacheserver.tasks import OwnedTasks, end, every
from cacheserver.tiers.redis import Client

_log = structlog.get_logger(__name__)

_LEASE_S = 5.0
_BEATS = 3
"""Within the span of a lease: one that is lost on the way costs nothing."""

_CALLS_AT_ONCE = 16
"""Of ours to Redis: others ask it by the same connections, and one too many would look like a Redis that is gone."""

_FIRST_POLL_S = 0.05
_LAST_POLL_S = 1.0
_RELEASED_LASTS_S = 600
_SWEEP_S = 600.0

_ACQUIRE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('HMGET', KEYS[1], 'holder', 'deadline_ms', 'released_ms')
local is_held = lease[1] and lease[1] ~= ''
if is_held and lease[1] ~= ARGV[1] and tonumber(lease[2]) > now then
  return {0, tonumber(lease[2]) - now, 0}
end
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'deadline_ms', now + tonumber(ARGV[2]))
redis.call('PERSIST', KEYS[1])
local was_released = lease[3] and now - tonumber(lease[3]) <= tonumber(ARGV[3])
return {1, fence, (is_held or was_released) and 1 or 0}
"""

_BEAT = """
local lease = redis.call('HMGET', KEYS[1], 'holder', 'fence')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'deadline_ms', time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[3]))
return 1
"""

_RELEASE = """
local lease = redis.call('HMGET', KEYS[1], 'holder', 'fence')
if lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'holder', '', 'released_ms', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""

# Removes the lease of one who has been dead for long.
_SWEEP = """
local time = redis.call('TIME')
local deadline = redis.call('HGET', KEYS[1], 'deadline_ms')
if deadline and tonumber(deadline) + tonumber(ARGV[1]) < time[1] * 1000 and redis.call('TTL', KEYS[1]) == -1 then
  return redis.call('DEL', KEYS[1])
end
return 0
"""


class NoLeases:
    """`Leases` of a service without Redis: nobody else could pay for the same."""

    @asynccontextmanager
    async def hold(self, identity_name: str, *, looked_s_ago: float) -> AsyncIterator[Lease]:  # noqa: ARG002 - as promised
        """See `Leases.hold`."""
        yield Lease()


@dataclass(slots=True)
class _Held:
    """A lease of ours in Redis."""

    name: str
    holder: str
    fence: int
    lease: Lease


class RedisLeases:
    """`Leases` that all replicas share. While Redis is silent each replica is on its own, and that is counted."""

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        *,
        client: Client,
        prefix: str,
        replica_id: str,
        clock: Clock,
        books: Books,
        lease_s: float = _LEASE_S,
        timeout_s: float = 2.0,
    ) -> None:
        """`client` is closed by whoever made it; `prefix` is that of all our names in Redis."""
        self._client = client
        self._prefix = prefix
        self._replica_id = replica_id
        self._clock = clock
        self._books = books
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._tasks = OwnedTasks()

    def start(self) -> None:
        """Sweep from time to time, from now on."""
        self._tasks.own(every(_SWEEP_S, self.sweep, clock=self._clock, name="sweep leases"), "sweep leases")

    async def aclose(self) -> None:
        """End; no lease may be held any more."""
        await self._tasks.aclose(0)

    @asynccontextmanager
    async def hold(self, identity_name: str, *, looked_s_ago: float) -> AsyncIterator[Lease]:
        """See `Leases.hold`."""
        held = await self._acquire(identity_name, looked_s_ago)
        if held is None:
            yield Lease(is_shared=False)
            return
        beating = asyncio.create_task(self._beat(held), name="lease")
        try:
            yield held.lease
        finally:
            await end([beating])
            await self._release(held)

    async def sweep(self) -> None:
        """Remove the leases of holders that have been dead for ten minutes."""
        with suppress(*UNREACHABLE):  # the next round may find it
            async for name in self._client.scan_iter(match=f"{self._prefix}{{*}}:lease", count=500):
                await self._run(_SWEEP, name.decode(), _RELEASED_LASTS_S * 1000)

    async def _acquire(self, identity_name: str, looked_s_ago: float) -> _Held | None:
        """The lease, once nobody else has it; None if Redis does not answer."""
        name = f"{self._prefix}{{{identity_name}}}:lease"
        holder = f"{self._replica_id}:{secrets.token_hex(8)}"
        poll_s, has_waited, began_s = _FIRST_POLL_S, False, self._clock.monotonic_s()
        while True:
            looked_ms = 1000 * (looked_s_ago + self._clock.monotonic_s() - began_s)
            try:
                args = (holder, int(1000 * self._lease_s), int(looked_ms) + 1)
                is_ours, fence_or_ms, is_news = await self._run(_ACQUIRE, name, *args)
            except UNREACHABLE as error:
                _log.warning("lease_unreachable", error=type(error).__name__)
                self._books.unleased()
                return None
            if is_ours:
                return _Held(name, holder, int(fence_or_ms), Lease(look_again=has_waited or bool(is_news)))
            has_waited = True
            await self._clock.sleep(min(poll_s, fence_or_ms / 1000 + 0.001))
            poll_s = min(1.5 * poll_s, _LAST_POLL_S)

    async def _beat(self, held: _Held) -> None:
        """Show that the holder lives, until it is taken from it."""
        while not held.lease.is_lost:
            await self._clock.sleep(self._lease_s / _BEATS)
            with suppress(*UNREACHABLE):  # it is tried again, and lost when its time is over
                is_ours = await self._run(_BEAT, held.name, held.holder, held.fence, int(1000 * self._lease_s))
                held.lease.is_lost = not is_ours
        _log.warning("lease_lost")
        self._books.unleased()

    async def _release(self, held: _Held) -> None:
        try:
            await self._run(_RELEASE, held.name, held.holder, held.fence, _RELEASED_LASTS_S)
        except UNREACHABLE as error:
            _log.warning("lease_not_released", error=type(error).__name__)  # its time passes

    async def _run(self, script: str, name: str, *args: object) -> list[int]:
        async with self._places:
            answer: list[int] = await run_script(self._client, script, [name], args, timeout_s=self._timeout_s)
            return answer
