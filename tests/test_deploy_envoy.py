"""`scripts/deploy/envoy.yaml` in a real Envoy, in front of three real replicas."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from cacheserver.app import Service
from cacheserver.client import AsyncClient, TierName
from cacheserver.pb import promptcache_pb2 as pb
from tests.provider import OpenAIStandIn
from tests.running import calling, environment, running
from tests.servers import EnvoyProxy

PROMPTS = [f"a red fox, number {number}" for number in range(60)]


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[list[Service]]:
    """Three services that share nothing, so that each answers from memory only what it was asked for itself."""
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(OpenAIStandIn())
        services = []
        for name in "abc":
            (tmp_path / name).mkdir()
            env = environment(tmp_path / name, provider=provider, tiers="memory,disk", redis__embedded=False)
            services.append(await stack.enter_async_context(running(env)))
        yield services


@asynccontextmanager
async def proxied(directory: Path, services: list[Service]) -> AsyncIterator[EnvoyProxy]:
    proxy = EnvoyProxy(directory, [service.grpc_address for service in services])
    await asyncio.to_thread(proxy.start)
    try:
        yield proxy
    finally:
        await asyncio.to_thread(proxy.kill)


async def answered(services: list[Service]) -> list[int]:
    """How many pictures each replica has answered."""
    counts = []
    for service in services:
        async with calling(service) as stub:
            stats = await stub.GetStats(pb.GetStatsRequest())
        counts.append(sum(row.requests for row in stats.rows))
    return counts


async def test_a_prompt_goes_to_the_replica_that_has_it_and_all_replicas_have_some(
    replicas: list[Service], tmp_path: Path
) -> None:
    async with proxied(tmp_path, replicas) as proxy, AsyncClient(proxy.address) as client:
        for tier in (TierName.UPSTREAM, TierName.MEMORY, TierName.MEMORY):
            assert {(await client.get_image(prompt)).tier for prompt in PROMPTS} == {tier}
    counts = await answered(replicas)
    assert sum(counts) == 3 * len(PROMPTS)
    assert min(counts) > 0


async def test_a_download_goes_to_the_replica_that_has_the_picture(replicas: list[Service], tmp_path: Path) -> None:
    async with proxied(tmp_path, replicas) as proxy, AsyncClient(proxy.address) as client:
        for prompt in PROMPTS[:10]:
            await client.get_image(prompt)
            assert (await client.download(tmp_path / "fox.png", prompt)).status.tier is TierName.MEMORY


async def test_a_replica_that_leaves_takes_no_call_along_and_no_other_replicas_pictures(
    replicas: list[Service], tmp_path: Path
) -> None:
    async with proxied(tmp_path, replicas) as proxy, AsyncClient(proxy.address) as client:
        for prompt in PROMPTS:
            await client.get_image(prompt)
        of_the_first = (await answered(replicas))[0]
        await replicas[0].stop()
        tiers = Counter([(await client.get_image(prompt)).tier for prompt in PROMPTS])
    assert tiers == {TierName.UPSTREAM: of_the_first, TierName.MEMORY: len(PROMPTS) - of_the_first}
