"""A Redis Cluster under many calls at once loses none: one of them may be a lease, and what is lost is paid twice."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode

from cacheserver.accounting.books import CounterBooks
from cacheserver.clock import SystemClock
from cacheserver.control.leases import RedisLeases
from cacheserver.control.redis import UNREACHABLE
from cacheserver.errors import TierError
from cacheserver.model import Priority
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import connect, disconnect
from tests.fakes import FakeClock
from tests.servers import Cluster
from tests.tier_contract import make_entry, make_key
from tests.waiting import until

MANY = 200
NUMBERS = itertools.count()


@asynccontextmanager
async def client_of(cluster: Cluster) -> AsyncIterator[RedisCluster]:
    client = connect(cluster.url, timeout_s=5.0, connect_timeout_s=5.0)
    assert isinstance(client, RedisCluster)
    try:
        yield client
    finally:
        await disconnect(client)


@asynccontextmanager
async def tier_of(cluster: Cluster, clock: FakeClock) -> AsyncIterator[RedisTier]:
    client = connect(cluster.url, timeout_s=5.0, connect_timeout_s=5.0)
    rng = random.Random(7)  # noqa: S311 - no secret
    tier = RedisTier(client, clock=clock, rng=rng, prefix=f"burst-{next(NUMBERS)}:")
    try:
        yield tier
    finally:
        await tier.aclose()


def burst(client: RedisCluster) -> list[asyncio.Task[object]]:
    return [asyncio.create_task(client.set(f"burst-{next(NUMBERS)}", b"x" * 1_000)) for _ in range(MANY)]


async def test_a_burst_on_a_new_client_loses_nothing(cluster: Cluster) -> None:
    for _ in range(20):
        async with client_of(cluster) as client:
            assert await asyncio.gather(*burst(client)) == [True] * MANY


async def test_connections_closed_while_idle_cost_no_call(cluster: Cluster) -> None:
    async with client_of(cluster) as client:
        for node in cluster.nodes:
            await asyncio.gather(*burst(client))
            await asyncio.to_thread(node.execute, "CLIENT KILL TYPE normal")
            assert await asyncio.gather(*burst(client)) == [True] * MANY


async def test_when_a_masters_connections_break_at_most_the_calls_under_way_are_lost(cluster: Cluster) -> None:
    async with client_of(cluster) as client:
        for node in cluster.nodes:
            calls = burst(client)
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.to_thread(node.execute, "CLIENT KILL TYPE normal")
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert outcome is True or isinstance(outcome, UNREACHABLE)
            assert await asyncio.gather(*burst(client)) == [True] * MANY


async def test_what_redis_py_closes_is_closed_under_no_other_call(cluster: Cluster) -> None:
    async with client_of(cluster) as client:
        for _ in range(5):
            await asyncio.gather(*burst(client))
            calls = burst(client)
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for node in client.get_nodes():
                node.update_active_connections_for_reconnect()
                await node.disconnect_free_connections()
            await client.aclose()  # as it does when a pipeline has failed
            assert await asyncio.gather(*calls) == [True] * MANY


async def test_what_redis_py_raises_unawares_counts_as_a_failure_of_redis(
    cluster: Cluster, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'writelines'")

    async with client_of(cluster) as client, tier_of(cluster, clock) as tier:
        await client.ping()
        await tier.ping()
        with monkeypatch.context() as patch:
            patch.setattr(ClusterNode, "execute_command", fail)
            patch.setattr(ClusterNode, "execute_pipeline", fail)
            with pytest.raises(UNREACHABLE):
                await client.set("unawares", b"")
            with pytest.raises(UNREACHABLE):
                await client.pipeline(transaction=False).set("unawares", b"").execute()
            with pytest.raises(TierError):
                await tier.get(make_key())
            with pytest.raises(TierError):
                await tier.find([make_key()])
        assert await client.set("unawares", b"")
        assert await tier.find([make_key()]) == [False]


async def test_calls_that_are_cancelled_end_as_cancelled_and_break_no_other(cluster: Cluster) -> None:
    async with client_of(cluster) as client:
        for _ in range(5):
            calls = burst(client)
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in calls[::2]:
                call.cancel()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert outcomes[1::2] == [True] * (MANY // 2)
            # Before Python 3.12 asyncio.wait_for, by which redis-py sends, may swallow one.
            assert all(outcome is True or isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])


async def test_a_tier_loses_nothing_in_a_burst(cluster: Cluster, clock: FakeClock) -> None:
    async with tier_of(cluster, clock) as tier:
        keys = [make_key(f"burst {number}") for number in range(MANY)]
        entries = [make_entry(key) for key in keys]
        puts = (tier.put(key, entry, replace=True) for key, entry in zip(keys, entries, strict=True))
        assert await asyncio.gather(*puts) == [True] * MANY
        assert await asyncio.gather(*map(tier.get, keys)) == entries
        assert await tier.find(keys) == [True] * MANY


async def test_leases_of_a_burst_are_all_taken_and_given_back(cluster: Cluster) -> None:
    registry = CollectorRegistry()
    clock = SystemClock()
    books = CounterBooks(clock=clock, registry=registry)
    async with client_of(cluster) as client:
        leases = RedisLeases(client=client, prefix="burst:", replica_id="0" * 16, clock=clock, books=books)
        taking = (
            leases.take(f"v1.default.{n}", looked_s_ago=0.0, priority=lambda: Priority.INTERACTIVE) for n in range(MANY)
        )
        taken = await asyncio.gather(*taking)
        assert all(lease.is_shared for lease in taken)
        for lease in taken:
            leases.let_go(lease, after=nothing)
        await leases._tasks.idle()
        await leases.aclose()
    assert not registry.get_sample_value("cacheserver_unleased_total")


async def nothing() -> None:
    pass


@pytest.fixture
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Cluster of the test's own, each of its masters with a replica."""
    cluster = Cluster(tmp_path_factory.mktemp("replicated"), has_replicas=True)
    cluster.start()
    yield cluster
    cluster.kill()


async def test_a_replica_that_takes_over_is_found_by_who_knew_the_master(replicated: Cluster, clock: FakeClock) -> None:
    async with client_of(replicated) as client, tier_of(replicated, clock) as tier:
        await asyncio.gather(*burst(client))
        keys = [make_key(f"failover {number}") for number in range(30)]
        for key in keys:
            await tier.put(key, make_entry(key), replace=True)
        await client.wait(1, 5_000, target_nodes=RedisCluster.PRIMARIES)
        replicated.masters[0].kill()
        for outcome in await asyncio.gather(*burst(client), return_exceptions=True):
            assert outcome is True or isinstance(outcome, UNREACHABLE)
        await until(partial(asyncio.to_thread, replicated.has_taken_over, replicated.replicas[0]))
        assert await asyncio.gather(*burst(client)) == [True] * MANY
        assert await tier.find(keys) == [True] * len(keys)
        assert await asyncio.gather(*map(tier.get, keys)) == [make_entry(key) for key in keys]
