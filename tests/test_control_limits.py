"""The limits that replicas share in a real Redis: the same law as alone, and what happens when Redis is away."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import AsyncIterator, Callable

import pytest

from cacheserver.control.limits import RedisLimits
from cacheserver.generation.limits import Group, GroupState, LocalLimits
from cacheserver.model import Amounts, CallReport, GroupLimits, RateLimit, RateLimits, Slot
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.servers import TcpProxy, ValkeyServer
from tests.waiting import until

PREFIXES = (f"limits-{n}:" for n in itertools.count())
LEASE_S = 300.0
ONE = Amounts()
SIXTY = GroupLimits(images_per_minute=60, headroom=0)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Client]:
    client = connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0)
    yield client
    await disconnect(client)


@pytest.fixture
def prefix() -> str:
    return next(PREFIXES)


class AtATime(RedisLimits):
    """Shared limits whose scripts are told the time."""

    now_s = 0.0

    def _now_arg(self) -> str:
        return repr(self.now_s)


def replica(
    client: Client,
    clock: FakeClock,
    prefix: str,
    limits: GroupLimits = SIXTY,
    *,
    replicas: int = 1,
    kind: type[RedisLimits] = RedisLimits,
    timeout_s: float = 5.0,
) -> RedisLimits:
    groups = {"g": limits}
    here = LocalLimits(limits=groups, monotonic_s=clock.monotonic_s, replicas=lambda: replicas)
    return kind(
        client=client, limits=groups, here=here, prefix=prefix, monotonic_s=clock.monotonic_s, timeout_s=timeout_s
    )


async def reserved(limits: RedisLimits) -> Slot:
    slot = await limits.reserve("g", ONE, lease_s=LEASE_S)
    assert slot
    return slot


# --- the law


def any_report(rng: random.Random, *, tells: bool) -> CallReport:
    def any_limit() -> RateLimit | None:
        limit = rng.choice([None, -1, 0, 30, 60, 1_000])
        reset_s = rng.choice([None, 0.5, 90.0])
        return rng.choice([None, RateLimit(limit, rng.choice([None, 0, 5]), reset_s)])

    return CallReport(
        limited=rng.random() < 0.3,
        retry_after_s=rng.choice([None, 0.3, 2.0, 1e6]),
        told=rng.choice([None, None, RateLimits(any_limit(), any_limit(), any_limit())]) if tells else None,
        tokens=rng.choice([None, 0, 1_000, 10**12]),
        images=rng.choice([None, None, 0, 1, 4]),
    )


LIMITS = {
    "none": GroupLimits(concurrent=30),
    "tokens": GroupLimits(tokens_per_minute=100_000, concurrent=30),
    "images": GroupLimits(images_per_minute=60, concurrent=30),
    "all": GroupLimits(100, 60, 10_000, 2_000, 500, 1_000_000, concurrent=30, burst_s=3.0, headroom=0.1),
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("tells", [True, False], ids=["limits_told", "never_told"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_redis_and_this_process_keep_the_same_law(
    client: Client, clock: FakeClock, prefix: str, limits: GroupLimits, seed: int, *, tells: bool
) -> None:
    rng = random.Random(seed)  # noqa: S311 - any sequence will do
    shared = replica(client, clock, prefix, limits, kind=AtATime)
    assert isinstance(shared, AtATime)
    law, open_slots = Group(limits, GroupState()), []
    clock.advance(1_000_000)
    for _ in range(250):
        clock.advance(rng.choice([0.0, 0.0, 0.1, 0.1, 0.7, 0.7, 5.0, 5.0, 61.0, 61.0, 700.0]))
        now_s = shared.now_s = clock.monotonic_s()
        if rng.random() < 0.55:
            amounts = Amounts(rng.randint(0, 4), 1, rng.choice([0, 200, 7_000]))
            slot = await shared.reserve("g", amounts, lease_s=1e9)
            assert (slot is None) == (len(open_slots) == 30)
            if slot:
                start_s = law.reserve(amounts, now_s)
                assert slot.wait_s == start_s - now_s
                open_slots.append((slot, start_s))
        elif open_slots:
            slot, start_s = open_slots.pop(rng.randrange(len(open_slots)))
            if rng.random() < 0.2:
                await shared.release(slot)
                law.release(slot.amounts, start_s)
            else:
                report = any_report(rng, tells=tells)
                await shared.end(slot, report)
                law.end(slot.amounts, start_s, report, now_s)
        assert dataclasses.asdict(shared._here._group("g").state) == dataclasses.asdict(law.state)


# --- replicas


async def test_a_moment_is_given_to_one_replica_only(client: Client, clock: FakeClock, prefix: str) -> None:
    one, two = (replica(client, clock, prefix, kind=AtATime) for _ in range(2))
    slots = [await reserved(limits) for limits in (one, two, one, two)]
    assert [slot.running for slot in slots] == [1, 2, 3, 4]
    assert [slot.wait_s for slot in slots] == pytest.approx([0, 1, 2, 3], abs=0.1)


async def test_what_one_replica_learns_the_others_know(client: Client, clock: FakeClock, prefix: str) -> None:
    one, two = (replica(client, clock, prefix, kind=AtATime) for _ in range(2))
    slot = await reserved(one)
    told = RateLimits(images=RateLimit(30, None, None))
    await one.end(slot, CallReport(limited=True, retry_after_s=100, told=told))
    assert (await reserved(two)).wait_s == pytest.approx(100, abs=1)
    assert two.images_per_minute("g") == pytest.approx(15, abs=1)
    assert two.images_per_s("g") == pytest.approx(0.25, abs=0.02)
    assert two.next_s("g") == pytest.approx(104, abs=1.5)


async def test_places_are_counted_over_all_replicas(client: Client, clock: FakeClock, prefix: str) -> None:
    one, two = (replica(client, clock, prefix, GroupLimits(concurrent=2)) for _ in range(2))
    slot = await reserved(one)
    assert await two.reserve("g", ONE, lease_s=LEASE_S, spare=1) is None
    unused = await reserved(two)
    assert await one.reserve("g", ONE, lease_s=LEASE_S) is None
    await two.release(unused)
    await reserved(one)
    await one.end(slot, CallReport())
    await reserved(two)


async def test_the_places_of_a_replica_that_died_come_back(client: Client, clock: FakeClock, prefix: str) -> None:
    dead, alive = (replica(client, clock, prefix, GroupLimits(concurrent=1), kind=AtATime) for _ in range(2))
    assert isinstance(dead, AtATime)
    assert isinstance(alive, AtATime)
    await reserved(dead)
    alive.now_s = LEASE_S - 1
    assert await alive.reserve("g", ONE, lease_s=LEASE_S) is None
    alive.now_s = LEASE_S
    await reserved(alive)


async def test_an_unused_moment_is_given_to_the_next_replica(client: Client, clock: FakeClock, prefix: str) -> None:
    one, two = (replica(client, clock, prefix, kind=AtATime) for _ in range(2))
    await reserved(one)
    unused = await reserved(one)
    await one.release(unused)
    assert (await reserved(two)).wait_s == unused.wait_s == 1.0


async def test_nothing_of_it_may_be_evicted(client: Client, clock: FakeClock, prefix: str) -> None:
    await reserved(replica(client, clock, prefix))
    keys = [key async for key in client.scan_iter(match=f"{prefix}*")]
    assert sorted(keys) == [f"{prefix}{{lg:g}}:{kind}".encode() for kind in ("running", "state")]
    assert [await client.ttl(key) for key in keys] == [-1, -1]


# --- without Redis


async def test_while_redis_is_gone_each_replica_keeps_within_its_part_of_what_was_learned(
    clock: FakeClock, prefix: str, own_valkey: Callable[[], ValkeyServer]
) -> None:
    server = own_valkey()
    client = connect(server.url, timeout_s=5.0, connect_timeout_s=5.0)
    limits = replica(client, clock, prefix, replicas=2)
    slot = await reserved(limits)
    await limits.end(slot, CallReport(told=RateLimits(images=RateLimit(30, None, None))))
    server.kill()
    slots = [await reserved(limits) for _ in range(3)]
    assert [slot.running for slot in slots] == [1, 2, 3]
    assert slots[2].wait_s - slots[1].wait_s == pytest.approx(4.0)
    assert limits.images_per_minute("g") == pytest.approx(15)
    for slot in slots:
        await limits.end(slot, CallReport())
    await disconnect(client)


async def test_when_redis_is_back_the_shared_state_counts_again_and_no_place_is_lost(
    clock: FakeClock, prefix: str, own_valkey: Callable[[], ValkeyServer]
) -> None:
    server = own_valkey()
    client = connect(server.url, timeout_s=5.0, connect_timeout_s=5.0)
    limits = replica(client, clock, prefix, GroupLimits(concurrent=2), replicas=2)
    slots = [await reserved(limits) for _ in range(2)]
    server.kill()
    for slot in slots:
        await limits.end(slot, CallReport())
    alone = await reserved(limits)
    server.start()
    clock.advance(1.0)
    assert (await reserved(limits)).running == 1
    await limits.end(alone, CallReport())
    assert (await reserved(limits)).running == 2
    await disconnect(client)


async def test_a_redis_that_hangs_costs_one_timeout_and_is_asked_again_a_second_later(
    clock: FakeClock, prefix: str, valkey_server: ValkeyServer
) -> None:
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy:
        client = connect(f"redis://127.0.0.1:{proxy.port}/0", timeout_s=5.0, connect_timeout_s=5.0)
        limits = replica(client, clock, prefix, timeout_s=0.05)
        asked = Counted(limits)
        proxy.hang()
        for _ in range(20):
            await reserved(limits)
        assert asked.times == 1
        clock.advance(1.0)
        await reserved(limits)
        assert asked.times == 2
        proxy.resume()
        clock.advance(1.0)
        await until(lambda: shared_again(limits, clock))
        await disconnect(client)


async def shared_again(limits: RedisLimits, clock: FakeClock) -> bool:
    clock.advance(1.0)
    return (await reserved(limits)).id.startswith("shared:")


class Counted:
    """How often Redis is asked."""

    def __init__(self, limits: RedisLimits) -> None:
        self.times = 0
        self._eval = limits._eval
        limits._eval = self._count  # type: ignore[method-assign]  # faults are injected from inside

    async def _count(self, *args: str) -> list[bytes]:
        self.times += 1
        return await self._eval(*args)  # type: ignore[arg-type]  # passed on as they came
