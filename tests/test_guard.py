"""The guard keeps a broken tier from costing time, and counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import pytest_asyncio

from cacheserver.errors import (
    CorruptEntryError,
    EntryTooLargeError,
    NewerEntryError,
    TierError,
    TierOpenError,
    TierTimeoutError,
)
from cacheserver.interfaces import Books, no_step
from cacheserver.model import CachedImage, CacheKey, Head, Labels, SourceObject, TierName, Touch, Touched
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.guard import Breaker, Deadlines, GuardedObjectTier, GuardedTier
from tests.fakes import FakeClock
from tests.tier_contract import MAX_ENTRY_BYTES, TierContract, guarded_tier, make_entry, make_key


class TierBooks:
    """Remembers what a guard books."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self.breakers: list[bool] = []
        self.damaged = 0

    def tier_seconds(self, tier: TierName, op: str, seconds: float) -> None:
        assert tier is TierName.REDIS
        self.seconds.append((op, seconds))

    def breaker(self, tier: TierName, *, is_open: bool) -> None:
        assert tier is TierName.REDIS
        self.breakers.append(is_open)

    def corrupt(self, tier: TierName) -> None:
        assert tier is TierName.REDIS
        self.damaged += 1


class FaultyTier:
    """A tier whose every call does what `fault` says, and then answers."""

    name = TierName.REDIS

    def __init__(self) -> None:
        self.fault: Callable[[], Awaitable[None]] = self.works
        self.calls: list[str] = []
        self.is_closed = False
        self.gave_up = asyncio.Event()

    async def works(self) -> None:
        """No fault."""

    async def hangs(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.gave_up.set()

    def fails(self, error: Exception) -> None:
        async def fault() -> None:
            raise error

        self.fault = fault

    async def _do(self, call: str) -> None:
        self.calls.append(call)
        await self.fault()

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None:  # noqa: ARG002 - the contract's
        await self._do("get")
        return make_entry(key)

    async def find(self, keys: Sequence[CacheKey], *, on_step: Callable[[], None] = no_step) -> list[bool]:
        for start in range(0, len(keys), 100):
            await self._do(f"find {len(keys[start : start + 100])}")
            on_step()
        return [key.variant % 2 == 0 for key in keys]

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:  # noqa: ARG002 - the contract's
        await self._do("put")
        return replace

    async def move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:  # noqa: ARG002 - the contract's
        await self._do("move")
        return True

    async def touch(self, key: CacheKey, entry: CachedImage) -> Touched:  # noqa: ARG002 - the contract's
        await self._do("touch")
        return Touched(Touch.CURRENT)

    async def delete(self, key: CacheKey) -> bool:  # noqa: ARG002 - the contract's
        await self._do("delete")
        return True

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        for variant in range(2):
            await self._do("scan")
            yield make_key(partition=partition, variant=variant)

    async def page(self, partition: str, *, after: CacheKey | None, limit: int) -> list[CacheKey]:
        await self._do("page")
        return [make_key(partition=partition, variant=variant) for variant in range(limit) if after is None]

    async def renditions(self, key: CacheKey) -> list[CacheKey]:
        await self._do("renditions")
        return [key.rendition(key.digest)]

    async def head(self, key: CacheKey) -> Head | None:  # noqa: ARG002 - the contract's
        await self._do("head")
        return None

    async def labels(self, key: CacheKey) -> Labels | None:  # noqa: ARG002 - the contract's
        await self._do("labels")
        return None

    async def ping(self) -> None:
        await self._do("ping")

    async def copy(self, key: CacheKey, entry: CachedImage, source: SourceObject) -> bool:  # noqa: ARG002 - the contract's
        await self._do("copy")
        return True

    async def signed_url(self, entry: CachedImage, expires_s: int) -> str:
        await self._do("signed_url")
        return f"https://images.test/{entry.key.variant}?{expires_s}"

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.fixture
def books() -> TierBooks:
    return TierBooks()


@pytest.fixture
def faulty() -> FaultyTier:
    return FaultyTier()


@pytest_asyncio.fixture
async def breaker(faulty: FaultyTier, books: TierBooks, clock: FakeClock) -> AsyncIterator[Breaker]:
    breaker = Breaker(
        tier=TierName.REDIS,
        probe=faulty.ping,
        clock=clock,
        books=cast("Books", books),
        failures_to_open=3,
        probe_deadline_s=0.01,
    )
    yield breaker
    await breaker.aclose()


@pytest.fixture
def guarded(faulty: FaultyTier, breaker: Breaker, books: TierBooks, clock: FakeClock) -> GuardedObjectTier:
    deadlines = Deadlines(read_s=0.01, write_s=0.02)
    return GuardedObjectTier(faulty, deadlines=deadlines, breaker=breaker, books=cast("Books", books), clock=clock)


async def _settle() -> None:
    """Let every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def _open(guarded: GuardedTier, faulty: FaultyTier) -> None:
    faulty.fails(TierError("down"))
    for _ in range(3):
        with pytest.raises(TierError, match="down"):
            await guarded.get(make_key())
    await _settle()
    assert guarded.is_open


def _every_call(tier: GuardedObjectTier) -> list[Callable[[], Awaitable[object]]]:
    key, entry = make_key(), make_entry()

    async def scan() -> list[CacheKey]:
        return [found async for found in tier.scan("studio")]

    return [
        lambda: tier.get(key),
        lambda: tier.find([key]),
        lambda: tier.put(key, entry, replace=True),
        lambda: tier.move(key.stand_in, key, entry),
        lambda: tier.delete(key),
        scan,
        lambda: tier.labels(key),
        tier.ping,
        lambda: tier.signed_url(entry, 60),
        lambda: tier.page("studio", after=None, limit=1),
        lambda: tier.head(key),
        lambda: tier.copy(key, entry, SourceObject("bucket", "name", "etag", b"")),
    ]


async def test_what_works_is_passed_on(guarded: GuardedObjectTier) -> None:
    assert guarded.name is TierName.REDIS
    answers = [await call() for call in _every_call(guarded)]
    keys = [make_key(variant=0), make_key(variant=1)]
    assert answers == [
        make_entry(),
        [True],
        True,
        True,
        True,
        keys,
        None,
        None,
        "https://images.test/0?60",
        keys[:1],
        None,
        True,
    ]


@pytest.mark.parametrize("n", range(12))
async def test_each_kind_of_call_ends_at_its_deadline(guarded: GuardedObjectTier, faulty: FaultyTier, n: int) -> None:
    faulty.fault = faulty.hangs
    with pytest.raises(TierTimeoutError):
        await _every_call(guarded)[n]()


async def test_a_find_may_take_longer_than_a_read_while_it_gets_on(
    faulty: FaultyTier, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, late_s = asyncio.get_running_loop(), 0.0
    time_s = loop.time
    monkeypatch.setattr(loop, "time", lambda: time_s() + late_s)

    async def takes_six_tenths() -> None:
        nonlocal late_s
        late_s += 60.0
        for _ in range(3):
            await asyncio.sleep(0)  # a timer that is due would fire

    faulty.fault = takes_six_tenths
    keys, steps = [make_key(variant=n) for n in range(250)], []
    patient = guarded_tier(faulty, clock, read_deadline_s=100.0)
    assert await patient.find(keys, on_step=lambda: steps.append(late_s)) == [n % 2 == 0 for n in range(250)]
    assert steps == [60.0, 120.0, 180.0]


async def test_a_find_that_hangs_on_the_way_ends_at_its_deadline(guarded: GuardedTier, faulty: FaultyTier) -> None:
    def hang() -> None:
        faulty.fault = faulty.hangs

    with pytest.raises(TierTimeoutError):
        await guarded.find([make_key(variant=n) for n in range(250)], on_step=hang)
    assert faulty.calls == ["find 100", "find 100"]


async def test_every_call_is_measured_once(
    guarded: GuardedTier, faulty: FaultyTier, books: TierBooks, clock: FakeClock
) -> None:
    async def takes_time() -> None:
        clock.advance(0.25)

    faulty.fault = takes_time
    await guarded.get(make_key())
    await guarded.delete(make_key())
    assert books.seconds == [("get", 0.25), ("delete", 0.25)]


async def test_failures_in_a_row_open_the_breaker(guarded: GuardedObjectTier, faulty: FaultyTier) -> None:
    await _open(guarded, faulty)
    faulty.calls.clear()
    for call in _every_call(guarded):
        with pytest.raises(TierOpenError):
            await call()
    assert faulty.calls == []


async def test_timeouts_open_the_breaker(guarded: GuardedTier, faulty: FaultyTier) -> None:
    faulty.fault = faulty.hangs
    for _ in range(3):
        with pytest.raises(TierTimeoutError):
            await guarded.get(make_key())
    assert guarded.is_open


async def test_a_success_between_failures_keeps_it_closed(guarded: GuardedTier, faulty: FaultyTier) -> None:
    for _ in range(4):
        faulty.fails(TierError("down"))
        for _ in range(2):
            with pytest.raises(TierError):
                await guarded.get(make_key())
        faulty.fault = faulty.works
        await guarded.get(make_key())
    assert not guarded.is_open


@pytest.mark.parametrize("error", [CorruptEntryError("x"), NewerEntryError("x"), EntryTooLargeError("x")])
async def test_a_bad_entry_is_no_failure_of_its_tier(
    guarded: GuardedTier, faulty: FaultyTier, books: TierBooks, error: TierError
) -> None:
    faulty.fails(error)
    for _ in range(10):
        with pytest.raises(type(error)):
            await guarded.get(make_key())
    assert not guarded.is_open
    assert books.damaged == (10 if isinstance(error, CorruptEntryError) else 0)


async def test_a_bug_is_passed_on_and_opens_nothing(guarded: GuardedTier, faulty: FaultyTier) -> None:
    for bug in (TypeError("a bug"), TimeoutError("not the deadline's")):
        faulty.fails(bug)
        for _ in range(5):
            with pytest.raises(type(bug)):
                await guarded.get(make_key())
    assert not guarded.is_open


async def test_a_caller_that_hangs_up_is_no_failure(guarded: GuardedTier, faulty: FaultyTier) -> None:
    faulty.fault = faulty.hangs
    for _ in range(5):
        call = asyncio.create_task(guarded.get(make_key()))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert not guarded.is_open


async def test_probes_come_at_growing_intervals_and_close_the_breaker(
    guarded: GuardedTier, faulty: FaultyTier, books: TierBooks, clock: FakeClock
) -> None:
    await _open(guarded, faulty)
    faulty.calls.clear()
    for wait_s in (0.5, 1.0, 2.0, 4.0, 5.0, 5.0):
        clock.advance(wait_s - 0.001)
        await _settle()
        assert faulty.calls == []
        clock.advance(0.001)
        await _settle()
        assert faulty.calls == ["ping"]
        faulty.calls.clear()
    faulty.fault = faulty.works
    clock.advance(5)
    await _settle()
    assert not guarded.is_open
    assert await guarded.get(make_key()) is not None
    assert books.breakers == [True, False]


async def test_whoever_waits_until_a_tier_is_well_hears_of_it_at_once(
    guarded: GuardedTier, faulty: FaultyTier, clock: FakeClock
) -> None:
    await guarded.until_well()
    await _open(guarded, faulty)
    waiting = asyncio.create_task(guarded.until_well())
    clock.advance(0.5)
    await _settle()
    assert not waiting.done()
    faulty.fault = faulty.works
    clock.advance(1.0)
    await _settle()
    assert waiting.done()
    assert not guarded.is_open


async def test_a_breaker_that_closed_opens_again_from_the_start(
    guarded: GuardedTier, faulty: FaultyTier, books: TierBooks, clock: FakeClock
) -> None:
    for _ in range(2):
        await _open(guarded, faulty)
        faulty.fault = faulty.works
        clock.advance(0.5)
        await _settle()
        assert not guarded.is_open
    assert books.breakers == [True, False, True, False]


async def test_a_tier_known_not_to_answer_is_spared_until_a_probe_works(
    guarded: GuardedTier, faulty: FaultyTier, books: TierBooks, clock: FakeClock
) -> None:
    guarded.spare()
    guarded.spare()
    with pytest.raises(TierOpenError):
        await guarded.get(make_key())
    assert faulty.calls == []
    await _settle()
    clock.advance(0.5)
    await _settle()
    assert await guarded.get(make_key()) is not None
    assert books.breakers == [True, False]


async def test_a_probe_that_hangs_has_failed(guarded: GuardedTier, faulty: FaultyTier, clock: FakeClock) -> None:
    await _open(guarded, faulty)
    faulty.fault = faulty.hangs
    clock.advance(0.5)
    await faulty.gave_up.wait()
    await _settle()
    assert guarded.is_open
    assert clock.sleepers == 1


async def test_a_bug_in_a_probe_is_seen_by_the_next_call(
    guarded: GuardedTier, faulty: FaultyTier, clock: FakeClock
) -> None:
    await _open(guarded, faulty)
    faulty.fails(TypeError("a bug"))
    clock.advance(0.5)
    await _settle()
    with pytest.raises(TypeError, match="a bug"):
        await guarded.get(make_key())


async def test_closing_ends_the_probes_and_the_tier(guarded: GuardedTier, faulty: FaultyTier, clock: FakeClock) -> None:
    await _open(guarded, faulty)
    assert clock.sleepers == 1
    await guarded.aclose()
    assert faulty.is_closed
    assert clock.sleepers == 0


class TestGuardedDiskTier(TierContract):
    @pytest_asyncio.fixture
    async def tier(self, tmp_path: Path, clock: FakeClock) -> AsyncIterator[GuardedTier]:
        disk = await DiskTier.open(tmp_path, clock=clock, max_bytes=10_000_000, max_entry_bytes=MAX_ENTRY_BYTES)
        tier = guarded_tier(disk, clock)
        yield tier
        await tier.aclose()
