"""A replica that was only slow comes late: its picture takes the next number, and its successor's stays as it is."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.clock import SystemClock
from cacheserver.coherence import Coherence
from cacheserver.control.leases import RedisLeases
from cacheserver.control.tombstones import RedisTombstones
from cacheserver.epochs import Epochs
from cacheserver.interfaces import Clock
from cacheserver.model import CachedImage, CacheKey, CachePolicy, Served, TierName
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.house import FaultyTier, House, open_s3
from tests.servers import S3Server
from tests.tier_contract import make_entry
from tests.waiting import until

PREFIXES = (f"lost-{n}:" for n in itertools.count())
SOON_S = 0.2


class Service:
    """Replicas on one Redis and, but for those that begin without it, one S3."""

    def __init__(self, client: Client, s3_server: S3Server, stack: AsyncExitStack) -> None:
        self.clock = FakeClock()
        self._client = client
        self._prefix = next(PREFIXES)
        self._s3_server = s3_server
        self._folder = f"test-{uuid.uuid4().hex}/"
        self._stack = stack
        self._numbers = itertools.count()

    async def begin(self, *, leases_clock: Clock, has_s3: bool) -> House:
        """A replica whose pictures are no other's. That its clock of leases stands still is that it shows no life."""
        number = next(self._numbers)
        epochs = Epochs()
        rng = Random(1)  # noqa: S311 - spreads expiry
        books = CounterBooks(clock=self.clock, registry=CollectorRegistry())
        redis = RedisTier(self._client, clock=self.clock, rng=rng, prefix=self._prefix, epochs=epochs)
        s3 = open_s3(self._s3_server, clock=self.clock, prefix=self._folder, epochs=epochs)
        self._stack.push_async_callback(s3.aclose)
        house = House(
            clock=self.clock,
            redis=FaultyTier(redis, TierName.REDIS),
            s3=FaultyTier(s3, TierName.S3),
            epochs=epochs,
            coherence=Coherence(
                epochs=epochs,
                shared=RedisTombstones(client=self._client, prefix=self._prefix, timeout_s=5.0),
                files=None,
                last_tier=TierName.S3 if has_s3 else TierName.REDIS,
                books=books,
                clock=self.clock,
            ),
        )
        leases = RedisLeases(
            client=self._client,
            prefix=self._prefix,
            replica_id=f"{number:016x}",
            clock=leases_clock,
            books=books,
            lease_s=SOON_S,
        )
        house.restart(leases=leases, tiers=None if has_s3 else [house.redis])
        house.upstream._numbers = itertools.count(100 * number)
        self._stack.push_async_callback(leases.aclose)
        self._stack.push_async_callback(house.aclose)
        return house


@pytest.fixture
async def service(redis_url: str, s3_server: S3Server) -> AsyncIterator[Service]:
    client = connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(disconnect, client)
        yield Service(client, s3_server, stack)


class Race:
    """A leader that stands still, and the one that succeeded it and stored its picture."""

    def __init__(self, slow: House, successor: House, first: Served, late: asyncio.Task[Served]) -> None:
        self.slow = slow
        self.successor = successor
        self.first = first
        self._late = late

    @staticmethod
    async def run(service: Service, *, has_s3: bool, is_s3_down: bool = False, refreshes: bool = False) -> Race:
        slow = await service.begin(leases_clock=FakeClock(), has_s3=has_s3)
        successor = await service.begin(leases_clock=SystemClock(), has_s3=has_s3)
        for house in (slow, successor):
            house.upstream.hold()
        policy = CachePolicy.REFRESH if refreshes else CachePolicy.USE_CACHE
        late = asyncio.create_task(slow.get(cache_policy=policy))
        await slow.upstream.arrived(1)
        making = asyncio.create_task(successor.get())
        await successor.upstream.arrived(1)
        for house in (slow, successor):
            house.s3.is_down = is_s3_down
        successor.upstream.release()
        first = await making
        await successor.settle()
        return Race(slow, successor, first, late)

    async def come_late(self) -> Served:
        self.slow.upstream.release()
        late = await self._late
        await self.slow.settle()
        return late

    async def stored(self, tier: FaultyTier) -> list[str | None]:
        """The digests of what lies under the first two numbers."""
        found = [await tier.get(self.first.entry.key.with_variant(variant)) for variant in (0, 1)]
        return [None if entry is None else entry.image.sha256 for entry in found]

    @property
    def tiers(self) -> list[FaultyTier]:
        return self.slow.cache._tiers  # type: ignore[return-value] # as a house is made


def digests(*served: Served) -> list[str]:
    return [each.entry.image.sha256 for each in served]


@pytest.mark.parametrize("has_s3", [True, False])
@pytest.mark.parametrize("refreshes", [True, False])
async def test_both_pictures_are_there_and_the_successors_is_the_first(
    service: Service, *, has_s3: bool, refreshes: bool
) -> None:
    race = await Race.run(service, has_s3=has_s3, refreshes=refreshes)
    late = await race.come_late()
    assert (race.first.entry.key.variant, late.entry.key.variant) == (0, 1)
    assert len({*digests(race.first, late)}) == 2
    for tier in race.tiers:
        assert await race.stored(tier) == digests(race.first, late)
    here = [race.slow.memory.get(late.entry.key.with_variant(variant)) for variant in (0, 1)]
    assert [None if entry is None else entry.image.sha256 for entry in here] == [None, *digests(late)]
    assert race.slow.upstream.calls + race.successor.upstream.calls == 2


async def test_while_s3_is_away_the_successors_picture_keeps_its_number_in_redis_too(service: Service) -> None:
    race = await Race.run(service, has_s3=True, is_s3_down=True)
    late = await race.come_late()
    assert late.entry.key.variant == 1
    assert await race.stored(race.slow.redis) == digests(race.first, late)
    assert race.slow.memory.get(race.first.entry.key) is None
    assert (await race.successor.get()).entry.image.sha256 == race.first.entry.image.sha256


async def test_once_s3_is_back_it_has_both_under_the_numbers_they_had(service: Service) -> None:
    race = await Race.run(service, has_s3=True, is_s3_down=True)
    late = await race.come_late()
    for house in (race.slow, race.successor):
        house.s3.is_down = False
    service.clock.advance(60)
    await until(lambda: not race.slow.keeper._held and not race.successor.keeper._held)
    for house in (race.slow, race.successor):
        await house.settle()
    for tier in race.tiers:
        assert await race.stored(tier) == digests(race.first, late)


async def test_what_is_written_while_a_picture_takes_anothers_place_is_seen(service: Service) -> None:
    house = await service.begin(leases_clock=SystemClock(), has_s3=False)
    redis = house.redis._tier
    assert isinstance(redis, RedisTier)
    old = make_entry()
    early, later = (replace(old, epoch=epoch, create_time_s=old.create_time_s + epoch) for epoch in (1, 2))
    await redis.put(old.key, old, replace=True)
    read_head = redis._read_head

    async def read_and_be_overtaken(key: CacheKey) -> object:
        seen = await read_head(key)
        redis._read_head = read_head  # type: ignore[method-assign] # once
        assert await redis.put(key, later, replace=True)
        return seen

    redis._read_head = read_and_be_overtaken  # type: ignore[method-assign,assignment] # the interleaving under test
    assert not await redis.put(old.key, early, replace=True)
    stored = await redis.get(old.key)
    assert isinstance(stored, CachedImage)
    assert stored.epoch == 2
