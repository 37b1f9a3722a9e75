"""Single-flight across replicas: who holds a request's lease pays for it, everyone else waits for what comes of it.

A lease is a hash in Redis, judged by the server's clock:

    lease:{<identity>}     holder, deadline_ms, fence, released_ms
                           succeeds: whether it was taken from one who died
                           urgency: the priority of who waits

Its holder shows every quarter of its span that it lives; a deadline that passes makes the next who asks its successor,
under a higher fence, in the same script. A lease that is held has no TTL: a full Redis would evict it. Once released it
has one, for then it only tells when that was: who looked into the tiers before looks again. One that is given back
unused tells nothing. The leases of the dead that nobody asks for any more are swept.

Who waits asks again and again, ever more rarely, and at once when the channel `leases` says that it was released.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import answer_within, run_script
from cacheserver.interfaces import Books, Clock, Lease
from cacheserver.model import Priority
from cacheserver.tasks import OwnedTasks, end, every
from cacheserver.tiers.redis_client import Client, literally, subscribed

_log = structlog.get_logger(__name__)

_LEASE_S = 5.0
_BEATS = 4
"""Within the span of a lease: one that is lost on the way costs nothing."""

_CALLS_AT_ONCE = 16
"""Of ours to Redis: others ask it by the same connections, and one too many would look like a Redis that is gone."""

_FIRST_POLL_S = 0.05
_LAST_POLL_S = 1.0
_HEAR_S = 10.0
"""Between two looks whether the channel is still there."""

_RELEASED_LASTS_S = 60
_DEAD_S = 600
_SWEEP_S = 600.0
_AWAY_S = 5.0
"""So long nobody asks a Redis that did not answer: each load would wait for it."""

_ACQUIRE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = redis.call('HMGET', KEYS[1], 'holder', 'deadline_ms', 'released_ms', 'urgency')
local is_held = lease[1] and lease[1] ~= ''
if is_held and lease[1] ~= ARGV[1] and tonumber(lease[2]) > now then
  if tonumber(ARGV[4]) > tonumber(lease[4] or '0') then redis.call('HSET', KEYS[1], 'urgency', ARGV[4]) end
  return {0, tonumber(lease[2]) - now, 0, 0}
end
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'deadline_ms', now + tonumber(ARGV[2]), 'succeeds', is_held and 1 or 0)
redis.call('PERSIST', KEYS[1])
redis.call('HDEL', KEYS[1], 'urgency')
local was_released = lease[3] and now - tonumber(lease[3]) <= tonumber(ARGV[3])
return {1, fence, (is_held or was_released) and 1 or 0, is_held and 1 or 0}
"""

_BEAT = """
local lease = redis.call('HMGET', KEYS[1], 'holder', 'fence', 'urgency')
if lease[1] and (lease[1] ~= ARGV[1] or lease[2] ~= ARGV[2]) then return {0, 0} end
local time = redis.call('TIME')
local deadline = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[3])
-- Whole, should this Redis have lost it: a failover makes nobody pay twice who still lives.
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'fence', ARGV[2], 'deadline_ms', deadline)
return {1, tonumber(lease[3] or '0')}
"""

_RELEASE = """
if redis.call('HGET', KEYS[1], 'holder') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'holder', '')
-- Whoever it was taken from may have paid, and nobody has looked since.
if ARGV[4] == '1' or redis.call('HGET', KEYS[1], 'succeeds') ~= '0' then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'released_ms', time[1] * 1000 + math.floor(time[2] / 1000))
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
-- Should we not have the right to, who waits asks again all the same.
redis.pcall('PUBLISH', ARGV[3], KEYS[1])
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

    async def take(self, *_: object, **__: object) -> Lease:
        """See `Leases.take`."""
        return Lease(is_shared=False)

    def let_go(self, lease: Lease, *, after: Callable[[], Awaitable[None]] | None) -> None:
        """See `Leases.let_go`."""


@dataclass(slots=True)
class _Held:
    """A lease of ours in Redis, and what shows that we live."""

    name: str
    holder: str
    fence: int
    beating: asyncio.Task[None] | None = None


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
        self._background: list[asyncio.Task[None]] = []
        self._channel = f"{prefix}leases"
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._held: dict[Lease, _Held] = {}
        self._away_until_s = 0.0
        self._letting_go: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Sweep from time to time, and hear what others release, from now on."""
        sweeping = every(_SWEEP_S, self.sweep, clock=self._clock, name="sweep leases")
        self._background = [
            asyncio.create_task(sweeping, name="sweep leases"),
            asyncio.create_task(self._hear(), name="hear of leases"),
        ]

    async def aclose(self) -> None:
        """Give back what is to be given back, within the time that one answer of Redis may take."""
        await end(self._background)
        await self._tasks.aclose(self._timeout_s)

    async def take(self, identity_name: str, *, looked_s_ago: float, priority: Callable[[], Priority]) -> Lease:
        """See `Leases.take`."""
        name = f"{self._prefix}lease:{{{identity_name}}}"
        looking_s = self._clock.monotonic_s() - looked_s_ago
        if (letting_go := self._letting_go.get(name)) is not None:
            await asyncio.wait({letting_go})  # a load of our own before: no need to ask Redis again and again
        lease = Lease()
        held = await self._acquire(name, lease, looking_s, priority)
        if held is None:
            lease.is_shared = False
            return lease
        held.beating = self._tasks.own(self._beat(held, lease), "lease")
        self._held[lease] = held
        return lease

    def let_go(self, lease: Lease, *, after: Callable[[], Awaitable[None]] | None) -> None:
        """See `Leases.let_go`."""
        if (held := self._held.pop(lease, None)) is not None:
            task = self._letting_go[held.name] = self._tasks.own(self._release(held, after), "release lease")
            task.add_done_callback(partial(self._released, held.name))

    def _released(self, name: str, task: asyncio.Task[None]) -> None:
        if self._letting_go.get(name) is task:
            del self._letting_go[name]

    async def sweep(self) -> None:
        """Remove the leases of holders that have been dead for ten minutes."""
        names = self._client.scan_iter(match=f"{literally(self._prefix)}lease:*", count=500)
        with suppress(*UNREACHABLE):  # the next round may find it
            while (name := await answer_within(self._timeout_s, anext(names, None))) is not None:
                await self._run(_SWEEP, name.decode(), _DEAD_S * 1000)

    async def _acquire(
        self, name: str, lease: Lease, looking_s: float, priority: Callable[[], Priority]
    ) -> _Held | None:
        """The lease in Redis, once nobody else has it; None if Redis does not answer.

        `looking_s` (monotonic) is when the tiers were asked.
        """
        holder = f"{self._replica_id}:{secrets.token_hex(8)}"
        try:
            fence = await self._turn(name, holder, lease, looking_s, priority)
        except BaseException as error:
            # It may be ours all the same, and nobody would know: others would wait for its time to pass.
            self._tasks.own(self._give_back(name, holder, is_used=False), "release lease")
            if not isinstance(error, UNREACHABLE):
                raise
            _log.warning("lease_unreachable", error=type(error).__name__)
            self._away_until_s = self._clock.monotonic_s() + _AWAY_S
            fence = None
        if fence is None:
            self._books.unleased()
            return None
        return _Held(name, holder, fence)

    async def _turn(
        self, name: str, holder: str, lease: Lease, looking_s: float, priority: Callable[[], Priority]
    ) -> int | None:
        """The fence of a lease that is ours from now on; None while Redis is known to be away."""
        poll_s = _FIRST_POLL_S
        with self._waits_for(name) as is_released:
            while self._clock.monotonic_s() >= self._away_until_s:
                is_released.clear()
                # Of what was released while we asked for it nobody can say whether we had looked before.
                looked_s = self._clock.monotonic_s() - looking_s + self._timeout_s
                args = (holder, int(1000 * self._lease_s), int(1000 * looked_s), int(priority()))
                is_ours, fence_or_ms, is_news, succeeds = await self._run(_ACQUIRE, name, *args)
                if is_ours:
                    lease.look_again = lease.look_again or bool(is_news)
                    lease.succeeds = bool(succeeds)
                    return int(fence_or_ms)
                lease.look_again = True
                await self._released_or_after(min(poll_s, fence_or_ms / 1000 + 0.001), is_released)
                poll_s = min(1.5 * poll_s, _LAST_POLL_S)
        return None

    async def _released_or_after(self, seconds: float, is_released: asyncio.Event) -> None:
        waits: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._clock.sleep(seconds)),
            asyncio.create_task(is_released.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end(waits)

    @contextmanager
    def _waits_for(self, name: str) -> Iterator[asyncio.Event]:
        """What is set whenever the lease of this name was released."""
        event = asyncio.Event()
        self._waiting.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[name].discard(event)
            if not self._waiting[name]:
                del self._waiting[name]

    async def _hear(self) -> None:
        """Wake who waits for a lease that another replica releases."""
        is_told = False
        while True:
            try:
                async with await answer_within(self._timeout_s, subscribed(self._client, self._channel)) as channel:
                    is_told = False
                    while True:
                        message = await channel.get_message(timeout=_HEAR_S)
                        for event in self._waiting.get(message["data"].decode(), ()) if message else ():
                            event.set()
            except UNREACHABLE as error:
                if not is_told:
                    _log.info("leases_unheard", error=type(error).__name__)
                is_told = True
            await self._clock.sleep(_AWAY_S)

    async def _beat(self, held: _Held, lease: Lease) -> None:
        """Show that the holder lives, until it is taken from it."""
        beat_s, span_ms = self._lease_s / _BEATS, int(1000 * self._lease_s)
        await self._clock.sleep(beat_s)
        urged = 0
        while True:
            urgency = 0
            try:
                is_ours, urgency = await self._run(_BEAT, held.name, held.holder, held.fence, span_ms, timeout_s=beat_s)
            except TimeoutError:
                continue  # at once: its time passes
            except UNREACHABLE:
                is_ours = True  # as far as we know
            if not is_ours:
                break
            if urgency > urged:
                urged = urgency
                lease.urge(Priority(urgency))
            await self._clock.sleep(beat_s)
        lease.is_lost = True
        _log.warning("lease_lost")
        self._books.unleased()

    async def _release(self, held: _Held, after: Callable[[], Awaitable[None]] | None) -> None:
        try:
            if after is not None:
                await after()
        finally:
            await end([held.beating] if held.beating is not None else [])
            # A cancelled task keeps the frames it was cancelled in, and they `held` and the flight: a circle.
            held.beating = None
        await self._give_back(held.name, held.holder, is_used=after is not None)

    async def _give_back(self, name: str, holder: str, *, is_used: bool) -> None:
        try:
            await self._run(_RELEASE, name, holder, _RELEASED_LASTS_S, self._channel, int(is_used))
        except UNREACHABLE as error:
            _log.warning("lease_not_released", error=type(error).__name__)  # its time passes

    async def _run(self, script: str, name: str, *args: object, timeout_s: float | None = None) -> Any:
        timeout_s = timeout_s or self._timeout_s
        async with asyncio.timeout(timeout_s), self._places:
            return await run_script(self._client, script, [name], args, timeout_s=timeout_s)
