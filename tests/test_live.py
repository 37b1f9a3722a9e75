"""How a process stands at this moment: held images, breakers, sizes and queues, from the service to the client."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cacheserver.client import Priority, TierName
from cacheserver.client.messages import read_stats
from cacheserver.pb import promptcache_pb2 as pb
from tests.house import House
from tests.provider import OpenAIStandIn
from tests.running import ask, calling, environment, running


async def test_what_the_last_tier_has_yet_to_take_is_counted_with_its_age(house: House) -> None:
    house.s3.is_down = True
    assert (house.keeper.held_images, house.keeper.oldest_held_s) == (0, 0.0)
    await house.ask("a red fox")
    house.clock.advance(7)
    await house.ask("a blue fox")
    assert (house.keeper.held_images, house.keeper.oldest_held_s) == (2, 7.0)


async def test_what_the_last_tier_has_taken_is_held_no_more(house: House) -> None:
    await house.ask("a red fox")
    assert (house.keeper.held_images, house.keeper.oldest_held_s) == (0, 0.0)


async def test_a_service_tells_how_it_stands(tmp_path: Path) -> None:
    async with (
        OpenAIStandIn() as provider,
        running(environment(tmp_path, provider=provider)) as service,
        calling(service) as stub,
    ):
        await stub.GetImage(ask("a red fox"))
        provider.hold()
        waiting = asyncio.ensure_future(stub.GetImage(ask("a blue fox")))
        await provider.arrived(2)
        live = read_stats(await stub.GetStats(pb.GetStatsRequest())).live
        provider.release()
        await waiting
    assert live is not None
    assert live.in_flight == 1
    assert live.queue == dict.fromkeys(sorted(Priority, reverse=True), 0)
    assert [(each.tier, each.breaker_open) for each in live.tiers] == [
        (TierName.MEMORY, False),
        (TierName.REDIS, False),
        (TierName.DISK, False),
    ]
    memory, redis, disk = (each.size_bytes for each in live.tiers)
    assert memory
    assert disk
    assert redis is None
    assert (live.held_images, live.oldest_held_s) == (0, 0.0)
    assert live.time is not None
