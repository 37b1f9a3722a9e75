"""A guarded tier: a deadline for every call, a breaker that spares the dead, and the books."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from cacheserver.errors import (
    CorruptEntryError,
    EntryTooLargeError,
    NewerEntryError,
    TierError,
    TierOpenError,
    TierTimeoutError,
)
from cacheserver.interfaces import Books, Clock, CopyingTier, SigningTier, Tier, no_step
from cacheserver.model import CachedImage, CacheKey, Head, Labels, SourceObject, TierName, Touched


class Breaker:
    """Decides whether a tier may be asked: opens after failures in a row, closes after a probe that worked.

    The probes are the breaker's own, in a task it owns, so that no caller ever pays for one.

    Args:
        tier: whose breaker it is.
        probe: returns if the tier would work now, raises TierError if not; a tier's `ping`.
        clock: times the probes.
        books: told when the breaker opens and closes.
        failures_to_open: failures in a row that open it.
        probe_deadline_s: how long a probe may take.
        first_probe_s: wait before the first probe; doubled after each failed one.
        slowest_probe_s: longest wait between probes.
    """

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        *,
        tier: TierName,
        probe: Callable[[], Awaitable[None]],
        clock: Clock,
        books: Books,
        failures_to_open: int = 5,
        probe_deadline_s: float = 2.0,
        first_probe_s: float = 0.5,
        slowest_probe_s: float = 5.0,
    ) -> None:
        self._tier = tier
        self._probe = probe
        self._clock = clock
        self._books = books
        self._failures_to_open = failures_to_open
        self._probe_deadline_s = probe_deadline_s
        self._first_probe_s = first_probe_s
        self._slowest_probe_s = slowest_probe_s
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the tier is spared now."""
        return self._probing is not None

    def check(self) -> None:
        """Return if the tier may be asked.

        Raises:
            TierOpenError: not now.
        """
        if self._probing is None:
            return
        if self._probing.done():
            # It ends by itself only when it has closed the breaker; else it died of a bug, which must be seen.
            self._probing.result()
        raise TierOpenError(f"{self._tier} failed {self._failures_to_open} times in a row and is being probed")

    async def until_closed(self) -> None:
        """Return once the tier may be asked: at once unless it is spared."""
        if self._probing is not None:
            await asyncio.wait({self._probing})

    def succeeded(self) -> None:
        """The tier answered."""
        self._failures = 0

    def failed(self) -> None:
        """The tier did not answer, or not as it should."""
        self._failures += 1
        if self._failures >= self._failures_to_open:
            self.open()

    def open(self) -> None:
        """Spare the tier until a probe works."""
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe_until_well(), name=f"probe-{self._tier}")
            self._books.breaker(self._tier, is_open=True)

    async def aclose(self) -> None:
        """End the probing."""
        if self._probing is None:
            return
        self._probing.cancel()
        await asyncio.wait({self._probing})

    async def _probe_until_well(self) -> None:
        wait_s = self._first_probe_s
        while True:
            await self._clock.sleep(wait_s)
            if await self._is_well():
                break
            wait_s = min(wait_s * 2, self._slowest_probe_s)
        self._failures = 0
        self._probing = None
        self._books.breaker(self._tier, is_open=False)

    async def _is_well(self) -> bool:
        try:
            async with asyncio.timeout(self._probe_deadline_s) as limit:
                await self._probe()
        except TierError:
            return False
        except TimeoutError:
            if not limit.expired():
                raise
            return False
        return True


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a guarded tier's calls may take, in seconds.

    `read_s` holds for a get, head, labels, ping, page, renditions and each step of a scan or find; `write_s` for a put,
    move, copy, delete or signing.
    """

    read_s: float
    write_s: float


class GuardedTier:
    """A tier with a deadline for every call, a breaker and the books. Itself a `Tier`.

    A damaged or newer entry and one too large are no failures: the tier did what it should.

    Args:
        tier: the tier to guard; closed with this.
        breaker: decides whether the tier may be asked; closed with this.
        books: told how long every call took, and of each damaged entry.
        clock: measures the calls.
        deadlines: how long a call may take.
    """

    def __init__(self, tier: Tier, *, deadlines: Deadlines, breaker: Breaker, books: Books, clock: Clock) -> None:
        self._tier = tier
        self._breaker = breaker
        self._books = books
        self._clock = clock
        self._deadlines = deadlines

    @property
    def name(self) -> TierName:
        """Which tier this is."""
        return self._tier.name

    @property
    def is_open(self) -> bool:
        """Whether the breaker spares the tier now: every call but aclose raises TierOpenError at once."""
        return self._breaker.is_open

    async def until_well(self) -> None:
        """Return once the breaker does not spare the tier: at once if it does not now."""
        await self._breaker.until_closed()

    def spare(self) -> None:
        """Open the breaker: the tier is known not to answer."""
        self._breaker.open()

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None:
        """See `Tier.get`."""
        async with self._guarded("get", self._deadlines.read_s):
            return await self._tier.get(key, stale_s=stale_s)

    async def find(self, keys: Sequence[CacheKey], *, on_step: Callable[[], None] = no_step) -> list[bool]:
        """See `Tier.find`."""
        async with self._guarded("find", self._deadlines.read_s) as deadline:

            def begin_next() -> None:
                if not deadline.expired():
                    deadline.reschedule(asyncio.get_running_loop().time() + self._deadlines.read_s)
                on_step()

            return await self._tier.find(keys, on_step=begin_next)

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        """See `Tier.put`."""
        async with self._guarded("put", self._deadlines.write_s):
            return await self._tier.put(key, entry, replace=replace)

    async def move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:
        """See `Tier.move`."""
        async with self._guarded("move", self._deadlines.write_s):
            return await self._tier.move(slot, key, entry)

    async def touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        """See `Tier.touch`."""
        async with self._guarded("touch", self._deadlines.write_s):
            return await self._tier.touch(key, entry)

    async def delete(self, key: CacheKey) -> bool:
        """See `Tier.delete`."""
        async with self._guarded("delete", self._deadlines.write_s):
            return await self._tier.delete(key)

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        """See `Tier.scan`."""
        keys = self._tier.scan(partition)
        while True:
            async with self._guarded("scan", self._deadlines.read_s):
                try:
                    key = await anext(keys)
                except StopAsyncIteration:
                    return
            yield key

    async def page(self, partition: str, *, after: CacheKey | None, limit: int) -> list[CacheKey]:
        """See `Tier.page`."""
        async with self._guarded("page", self._deadlines.read_s):
            return await self._tier.page(partition, after=after, limit=limit)

    async def renditions(self, key: CacheKey) -> list[CacheKey]:
        """See `Tier.renditions`."""
        async with self._guarded("renditions", self._deadlines.read_s):
            return await self._tier.renditions(key)

    async def head(self, key: CacheKey) -> Head | None:
        """See `Tier.head`."""
        async with self._guarded("head", self._deadlines.read_s):
            return await self._tier.head(key)

    async def labels(self, key: CacheKey) -> Labels | None:
        """See `Tier.labels`."""
        async with self._guarded("labels", self._deadlines.read_s):
            return await self._tier.labels(key)

    async def reclaim(self, key: CacheKey) -> bool:
        """See `Tier.reclaim`."""
        async with self._guarded("delete", self._deadlines.write_s):
            return await self._tier.reclaim(key)

    async def ping(self) -> None:
        """See `Tier.ping`."""
        async with self._guarded("ping", self._deadlines.read_s):
            await self._tier.ping()

    async def aclose(self) -> None:
        """Close the breaker and the tier."""
        await self._breaker.aclose()
        await self._tier.aclose()

    @asynccontextmanager
    async def _guarded(self, op: str, deadline_s: float) -> AsyncIterator[asyncio.Timeout]:
        self._breaker.check()
        started_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(deadline_s) as limit:
                yield limit
        except TimeoutError as exc:
            if not limit.expired():
                raise
            self._breaker.failed()
            raise TierTimeoutError(f"{self.name} did not finish {op} within {deadline_s:g} s") from exc
        except EntryTooLargeError:
            raise
        except CorruptEntryError:
            self._breaker.succeeded()
            self._books.corrupt(self.name)
            raise
        except NewerEntryError:
            self._breaker.succeeded()
            raise
        except TierError:
            self._breaker.failed()
            raise
        else:
            self._breaker.succeeded()
        finally:
            self._books.tier_seconds(self.name, op, self._clock.monotonic_s() - started_s)


class _ObjectTier(SigningTier, CopyingTier, Protocol):
    """A tier of objects."""


class GuardedObjectTier(GuardedTier):
    """A guarded tier of objects. Itself a `SigningTier` and a `CopyingTier`; the arguments are GuardedTier's."""

    def __init__(
        self, tier: _ObjectTier, *, deadlines: Deadlines, breaker: Breaker, books: Books, clock: Clock
    ) -> None:
        super().__init__(tier, deadlines=deadlines, breaker=breaker, books=books, clock=clock)
        self._object_tier = tier

    async def signed_url(self, entry: CachedImage, expires_s: int) -> str:
        """See `SigningTier.signed_url`."""
        async with self._guarded("signed_url", self._deadlines.write_s):
            return await self._object_tier.signed_url(entry, expires_s)

    async def copy(self, key: CacheKey, entry: CachedImage, source: SourceObject) -> bool:
        """See `CopyingTier.copy`."""
        async with self._guarded("copy", self._deadlines.write_s):
            return await self._object_tier.copy(key, entry, source)
