"""Entries that are asked for: their end moves on with hits where it slides, and their copies in Redis are kept."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import pytest

from cacheserver.model import CachePolicy, Namespace, Served, TierName
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import Client, connect, disconnect
from cacheserver.tiers.s3 import S3Tier
from tests.delivery_front import open_delivery
from tests.fakes import FakeClock
from tests.house import FaultyTier, House, open_s3
from tests.http_front import open_http_front
from tests.rpc_front import ask
from tests.rpc_front import open_front as rpc_front
from tests.servers import S3Server
from tests.tier_contract import make_entry

TTL_S = 1_000.0
REDIS_TTL_S = 10_000.0
SLIDING = Namespace("default", "default", ttl_s=TTL_S, is_sliding=True)
PREFIXES = (f"tending-{n}:" for n in itertools.count())


@dataclass
class Tended:
    """A cache on a real Redis and a real S3, and what lies in them."""

    house: House
    redis: RedisTier
    s3: S3Tier
    client: Client

    def live_in(self, namespace: Namespace) -> None:
        self.house.namespace = namespace
        self.house.restart()

    async def hit_after(self, seconds: float) -> Served:
        self.house.clock.advance(seconds)
        served = await self.house.get()
        await self.house.cache.tending.idle()
        await self.house.settle()
        return served

    async def ends_s(self) -> list[float | None]:
        """When the entry ends, from now on, as S3 and Redis have it."""
        _, identity = self.house.identity()
        heads = [await tier.head(identity.key) for tier in (self.s3, self.redis)]
        now_s = self.house.clock.now_s()
        return [
            None if head is None or head.bare.expire_time_s is None else head.bare.expire_time_s - now_s
            for head in heads
        ]

    async def redis_s(self) -> float:
        """How much longer its copy lies in Redis; below 0: there is none."""
        _, identity = self.house.identity()
        return float(await self.client.pttl(self.redis._name(identity.key))) / 1000

    async def drop_from_redis_in(self, seconds: float) -> None:
        _, identity = self.house.identity()
        await self.client.pexpire(self.redis._name(identity.key), int(1000 * seconds))

    def touches(self, tier: TierName, result: str) -> float:
        labels = {"tier": tier, "result": result}
        return self.house.registry.get_sample_value("cacheserver_touches_total", labels) or 0.0


@pytest.fixture
async def tended(clock: FakeClock, redis_url: str, s3_server: S3Server) -> AsyncIterator[Tended]:
    async with AsyncExitStack() as undo:
        clients = [connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0) for _ in range(2)]
        redis = RedisTier(
            clients[0],
            clock=clock,
            rng=random.Random(7),  # noqa: S311 - no secret
            prefix=next(PREFIXES),
            ttl_s=REDIS_TTL_S,
        )
        s3 = open_s3(s3_server, clock=clock, bucket=s3_server.new_bucket())
        house = House(clock=clock, redis=FaultyTier(redis, TierName.REDIS), s3=FaultyTier(s3, TierName.S3))
        undo.push_async_callback(disconnect, clients[1])
        for closing in (redis.aclose, s3.aclose, house.aclose):
            undo.push_async_callback(closing)
        yield Tended(house, redis, s3, clients[1])


class TestSliding:
    async def test_a_hit_moves_the_end_on_in_every_tier(self, tended: Tended) -> None:
        tended.live_in(SLIDING)
        await tended.hit_after(0)
        await tended.hit_after(500)
        assert await tended.ends_s() == [TTL_S, TTL_S]
        served = await tended.hit_after(900)
        assert (served.tier, served.stale) == (TierName.MEMORY, False)
        assert tended.house.upstream.calls == 1

    async def test_tiers_are_told_once_a_tenth_of_its_life_has_passed_however_often_it_is_hit(
        self, tended: Tended
    ) -> None:
        tended.live_in(SLIDING)
        await tended.hit_after(0)
        for _ in range(40):
            await tended.hit_after(10)
        assert [tended.touches(tier, "moved") for tier in (TierName.S3, TierName.REDIS)] == [4, 4]

    async def test_what_is_not_hit_ends_when_it_should(self, tended: Tended) -> None:
        tended.live_in(SLIDING)
        await tended.hit_after(0)
        await tended.hit_after(500)
        await tended.hit_after(TTL_S)
        assert tended.house.upstream.calls == 2

    async def test_it_slides_by_what_its_caller_asked_for(self, tended: Tended) -> None:
        tended.live_in(SLIDING)
        await tended.house.get(ttl_s=100.0)
        await tended.house.settle()
        await tended.hit_after(50)
        assert await tended.ends_s() == [100.0, 100.0]

    async def test_by_default_an_end_stays(self, tended: Tended) -> None:
        tended.live_in(Namespace("default", "default", ttl_s=TTL_S))
        await tended.hit_after(0)
        await tended.hit_after(500)
        assert await tended.ends_s() == [TTL_S - 500, TTL_S - 500]

    async def test_what_was_replaced_meanwhile_does_not_come_back(self, tended: Tended) -> None:
        tended.live_in(SLIDING)
        old = await tended.hit_after(0)
        other = House(clock=tended.house.clock, redis=tended.house.redis, s3=tended.house.s3)
        other.namespace = SLIDING
        other.restart()
        other.upstream._numbers = itertools.count(100)
        new = (await other.ask(cache_policy=CachePolicy.REFRESH))[0]  # type: ignore[index] # it is no Pending
        await other.settle()
        assert new.entry.image.sha256 != old.entry.image.sha256
        await tended.hit_after(500)
        head = await tended.s3.head(old.entry.key)
        assert head is not None
        assert head.bare.image.sha256 == new.entry.image.sha256
        await other.aclose()

    async def test_a_last_tier_that_is_away_is_told_later(self, tended: Tended) -> None:
        tended.live_in(SLIDING)
        await tended.hit_after(0)
        tended.house.s3.is_down = True
        await tended.hit_after(500)
        tended.house.s3.is_down = False
        await tended.hit_after(59)
        assert (await tended.ends_s())[0] == TTL_S - 559
        await tended.hit_after(1)
        assert (await tended.ends_s())[0] == TTL_S

    def test_no_end_moves_that_has_come(self) -> None:
        entry = replace(make_entry(expire_time_s=100.0), sliding_s=50.0)
        assert entry.living_on(100.0) is None
        assert entry.living_on(54.9) is None
        assert entry.living_on(55.0) == replace(entry, expire_time_s=105.0)


class TestEveryWayOfAHit:
    """An entry's end moves on however it is asked for, also by calls that nobody reads anew."""

    @pytest.fixture
    def sliding(self, house: House) -> House:
        house.namespace = replace(SLIDING, public_images=True)
        house.restart()
        return house

    @staticmethod
    async def moves_on(house: House, call: Callable[[], Awaitable[object]]) -> None:
        for _ in range(240):
            await call()
            await house.cache.tending.idle()
            house.clock.advance(5)
        _, identity = house.identity()
        assert house.memory.contains(identity.key)
        assert house.upstream.calls == 1

    async def test_by_grpc(self, sliding: House) -> None:
        async with rpc_front(sliding, namespaces=[sliding.namespace]) as front:
            await self.moves_on(sliding, lambda: front.stub.GetImage(ask()))

    async def test_over_http(self, sliding: House) -> None:
        async with open_http_front(sliding, namespaces=[sliding.namespace]) as front:
            await self.moves_on(sliding, front.generate)

    async def test_by_its_url(self, sliding: House) -> None:
        key = (await sliding.get()).entry.key
        async with open_delivery(sliding, sliding.namespace) as front:
            await self.moves_on(sliding, lambda: front.client.get(f"/images/{key.name}", headers={"accept": "*/*"}))


class TestCopiesInRedis:
    async def test_the_copy_of_what_is_hit_stays_though_it_would_lapse(self, tended: Tended) -> None:
        await tended.hit_after(0)
        await tended.hit_after(0)
        await tended.drop_from_redis_in(900)
        await tended.hit_after(61)
        assert await tended.redis_s() > 0.8 * REDIS_TTL_S
        assert (tended.touches(TierName.REDIS, "prolonged"), tended.house.upstream.calls) == (1, 1)

    async def test_one_that_stays_long_enough_is_left_until_it_would_lapse(self, tended: Tended) -> None:
        await tended.hit_after(0)
        await tended.hit_after(0)
        await tended.drop_from_redis_in(5_000)
        await tended.hit_after(61)
        for _ in range(3):
            await tended.hit_after(1_000)
        assert tended.touches(TierName.REDIS, "current") == 1
        await tended.drop_from_redis_in(900)
        await tended.hit_after(1_000)
        assert tended.touches(TierName.REDIS, "prolonged") == 1

    async def test_one_that_is_gone_is_made_anew_from_memory(self, tended: Tended) -> None:
        await tended.hit_after(0)
        await tended.hit_after(0)
        key = (await tended.house.get()).entry.key
        await tended.redis.delete(key)
        await tended.hit_after(61)
        assert await tended.redis_s() > 0.8 * REDIS_TTL_S
        assert await tended.redis.get(key) is not None
        assert tended.touches(TierName.REDIS, "copied") == 1

    async def test_it_is_not_if_the_last_tier_has_another_picture_by_now(self, tended: Tended) -> None:
        await tended.hit_after(0)
        old = (await tended.hit_after(0)).entry
        other = House(clock=tended.house.clock, redis=tended.house.s3, s3=tended.house.s3)
        other.restart(tiers=[tended.house.s3])
        other.upstream._numbers = itertools.count(100)
        await other.ask(cache_policy=CachePolicy.REFRESH)
        await other.settle()
        await tended.redis.delete(old.key)
        await tended.hit_after(61)
        assert await tended.redis.get(old.key) is None
        await other.aclose()

    async def test_what_is_hit_for_less_than_a_minute_is_not_looked_for(self, tended: Tended) -> None:
        await tended.hit_after(0)
        for _ in range(5):
            await tended.hit_after(10)
        results = [tended.touches(TierName.REDIS, result) for result in ("current", "prolonged", "copied", "absent")]
        assert results == [0, 0, 0, 0]
