"""A tier that is late is not waited for: the next one is read beside it."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.errors import TierError
from cacheserver.interfaces import Tier
from cacheserver.model import CachedImage, TierName
from cacheserver.tiers.hedge import Hedge, Outcome, in_turn
from tests.fakes import FakeClock
from tests.house import House
from tests.tier_contract import make_entry
from tests.waiting import until

REDIS, DISK, S3 = TierName.REDIS, TierName.DISK, TierName.S3


class ToldTier:
    """A tier that answers a read when and as it is told."""

    def __init__(self, name: TierName) -> None:
        self.name = name
        self.asked: list[asyncio.Future[CachedImage | None]] = []

    async def read(self) -> CachedImage | None:
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]

    @property
    def is_asked(self) -> bool:
        return bool(self.asked) and not self.asked[-1].done()


class Stand:
    """A hedge over told tiers, and what one walk has been answered so far."""

    def __init__(self, *names: TierName, max_at_a_time: int = 8) -> None:
        self.clock = FakeClock()
        self.registry = CollectorRegistry()
        books = CounterBooks(clock=self.clock, registry=self.registry)
        self.hedge = Hedge(clock=self.clock, books=books, window=4, max_at_a_time=max_at_a_time)
        self.tiers = [ToldTier(name) for name in names]
        self.heard: list[tuple[TierName, Outcome]] = []

    async def answers(self) -> list[tuple[TierName, Outcome]]:
        """What a walk hears until it has a picture."""
        self.heard = heard = []  # a walk of its own
        answers = self.hedge.reads(cast("list[Tier]", self.tiers), lambda tier: cast("ToldTier", tier).read())
        async for tier, outcome in answers:
            heard.append((tier.name, outcome))
            if isinstance(outcome, CachedImage):
                break
        await answers.aclose()
        return heard

    def walk(self) -> asyncio.Task[list[tuple[TierName, Outcome]]]:
        return asyncio.create_task(self.answers())

    async def learn(self) -> None:
        """The first tier gives two pictures, which take a second each: more is late from now on."""
        for _ in range(2):
            walk = self.walk()
            await until(lambda: self.tiers[0].is_asked)
            self.clock.advance(1)
            self.tiers[0].asked[-1].set_result(make_entry())
            await walk

    def hedged(self, result: str) -> float:
        return (
            self.registry.get_sample_value("cacheserver_hedged_reads_total", {"tier": "redis", "result": result}) or 0
        )


async def test_a_tier_that_is_not_late_is_waited_for() -> None:
    stand = Stand(REDIS, S3)
    await stand.learn()
    walk = stand.walk()
    await until(lambda: stand.tiers[0].is_asked)
    stand.clock.advance(0.9)
    await asyncio.sleep(0)
    stand.tiers[0].asked[-1].set_result(make_entry())
    assert await walk == [(REDIS, make_entry())]
    assert stand.tiers[1].asked == []
    assert stand.clock.sleepers == 0


async def late_walk(stand: Stand) -> asyncio.Task[list[tuple[TierName, Outcome]]]:
    """A walk whose first tier has just become late, so that the second is asked."""
    await stand.learn()
    walk = stand.walk()
    await until(lambda: stand.clock.sleepers == 1)
    stand.clock.advance(1)
    await until(lambda: stand.tiers[1].is_asked)
    return walk


async def test_beside_a_late_tier_the_next_answers_and_the_late_read_goes_on_unheard() -> None:
    stand = Stand(REDIS, S3)
    walk = await late_walk(stand)
    stand.tiers[1].asked[-1].set_result(make_entry())
    assert await walk == [(S3, make_entry())]
    assert stand.tiers[0].is_asked
    assert (stand.hedged("won"), stand.hedged("lost")) == (1, 0)
    stand.tiers[0].asked[-1].set_result(make_entry())
    await stand.hedge.aclose()


async def test_a_late_tier_may_still_be_first() -> None:
    stand = Stand(REDIS, S3)
    walk = await late_walk(stand)
    stand.tiers[0].asked[-1].set_result(make_entry())
    assert await walk == [(REDIS, make_entry())]
    assert (stand.hedged("won"), stand.hedged("lost")) == (0, 1)
    await stand.hedge.aclose()
    assert stand.tiers[1].asked[-1].cancelled()


async def test_what_the_next_tiers_lack_the_late_one_may_have() -> None:
    stand = Stand(REDIS, DISK, S3)
    walk = await late_walk(stand)
    stand.tiers[1].asked[-1].set_result(None)
    await until(lambda: stand.tiers[2].is_asked)
    stand.tiers[2].asked[-1].set_exception(error := TierError("down for a test"))
    await until(lambda: len(stand.heard) == 2)
    stand.tiers[0].asked[-1].set_result(make_entry())
    assert await walk == [(DISK, None), (S3, error), (REDIS, make_entry())]
    assert (stand.hedged("won"), stand.hedged("lost")) == (0, 1)


async def test_nothing_is_hedged_before_enough_is_known() -> None:
    stand = Stand(REDIS, S3)
    walk = stand.walk()
    await until(lambda: stand.tiers[0].is_asked)
    assert stand.clock.sleepers == 0
    stand.tiers[0].asked[-1].set_result(None)
    await until(lambda: stand.tiers[1].is_asked)
    stand.tiers[1].asked[-1].set_result(None)
    assert await walk == [(REDIS, None), (S3, None)]


async def test_only_so_many_late_reads_are_hedged_at_a_time() -> None:
    stand = Stand(REDIS, S3, max_at_a_time=1)
    first = await late_walk(stand)
    second = stand.walk()
    await until(lambda: len(stand.tiers[0].asked) == 4)
    assert stand.clock.sleepers == 0
    for reading in stand.tiers[0].asked[-2:]:
        reading.set_result(make_entry())
    assert await first == await second == [(REDIS, make_entry())]
    assert len(stand.tiers[1].asked) == 1
    await stand.hedge.aclose()


async def test_what_is_read_beside_late_reads_is_bounded_if_the_next_tier_hangs() -> None:
    stand = Stand(REDIS, S3, max_at_a_time=3)
    await stand.learn()
    for _ in range(10):
        walk = stand.walk()
        await until(lambda: stand.tiers[0].is_asked)
        await asyncio.sleep(0)
        stand.clock.advance(1)
        for _ in range(5):
            await asyncio.sleep(0)
        stand.tiers[0].asked[-1].set_result(make_entry())
        assert await walk == [(REDIS, make_entry())]
    assert len(stand.tiers[1].asked) == 3
    await stand.hedge.aclose()


async def test_of_many_reads_that_become_late_together_only_so_many_are_hedged() -> None:
    stand = Stand(REDIS, S3, max_at_a_time=3)
    await stand.learn()
    walks = [stand.walk() for _ in range(10)]
    await until(lambda: stand.clock.sleepers == 10)
    stand.clock.advance(1)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(stand.tiers[1].asked) == 3
    for reading in stand.tiers[0].asked[-10:]:
        reading.set_result(make_entry())
    assert await asyncio.gather(*walks) == [[(REDIS, make_entry())]] * 10
    await stand.hedge.aclose()


async def test_a_late_read_is_hedged_and_counted_once_even_if_what_came_first_does_not_do() -> None:
    stand = Stand(REDIS, DISK, S3)
    await stand.learn()
    answers = stand.hedge.reads(cast("list[Tier]", stand.tiers), lambda tier: cast("ToldTier", tier).read())
    first = asyncio.create_task(anext(answers))
    await until(lambda: stand.clock.sleepers == 1)
    stand.clock.advance(1)
    await until(lambda: stand.tiers[1].is_asked)
    stand.tiers[1].asked[-1].set_result(make_entry())
    assert (await first)[0] is cast("Tier", stand.tiers[1])
    second = asyncio.create_task(anext(answers))
    for _ in range(5):
        await asyncio.sleep(0)
        stand.clock.advance(1)
    stand.tiers[0].asked[-1].set_result(make_entry())
    assert (await second)[0] is cast("Tier", stand.tiers[0])
    await answers.aclose()
    assert (stand.hedged("won"), stand.hedged("lost")) == (1, 0)
    await stand.hedge.aclose()


async def test_only_the_last_pictures_say_what_is_late() -> None:
    stand = Stand(REDIS, S3)
    for seconds in [1.0] * 2 + [0.1] * 70:
        walk = stand.walk()
        await until(lambda: stand.tiers[0].is_asked)
        stand.clock.advance(seconds)
        stand.tiers[0].asked[-1].set_result(make_entry())
        await walk
    walk = stand.walk()
    await until(lambda: stand.tiers[0].is_asked and stand.clock.sleepers == 1)
    stand.clock.advance(0.2)
    await until(lambda: stand.tiers[1].is_asked)
    stand.tiers[1].asked[-1].set_result(make_entry())
    assert await walk == [(S3, make_entry())]
    await stand.hedge.aclose()


async def test_a_walk_that_is_cancelled_leaves_no_read_behind() -> None:
    stand = Stand(REDIS, S3)
    walk = await late_walk(stand)
    walk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await walk
    assert [tier.asked[-1].cancelled() for tier in stand.tiers] == [True, True]


async def test_in_turn_no_tier_is_read_before_the_one_above_has_answered() -> None:
    tiers = [ToldTier(REDIS), ToldTier(S3)]
    answers = in_turn(cast("list[Tier]", tiers), lambda tier: cast("ToldTier", tier).read())
    first = asyncio.create_task(anext(answers))
    await until(lambda: tiers[0].is_asked)
    assert tiers[1].asked == []
    tiers[0].asked[-1].set_exception(error := TierError("down for a test"))
    assert await first == (cast("Tier", tiers[0]), error)
    await answers.aclose()


async def test_the_tier_that_answers_first_is_named_and_nothing_is_paid(house: House) -> None:
    hedge = Hedge(clock=house.clock, books=house.books, window=2)
    await house.get()
    await house.settle()
    house.restart(hedge=hedge)
    await house.get()  # from Redis and in no time by this clock, so that any time at all is late
    house.restart(hedge=hedge)
    house.redis.gate.clear()
    served = await house.get()
    assert (served.tier, served.cost_microusd, house.upstream.calls) == (S3, 0, 1)
    house.redis.gate.set()
    await hedge.aclose()
