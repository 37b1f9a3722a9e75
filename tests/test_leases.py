"""Whoever holds a request's lease pays for it, and everyone else waits: replicas before a real Redis."""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import RedisCluster

from cacheserver.accounting.books import CounterBooks
from cacheserver.clock import SystemClock
from cacheserver.control.leases import RedisLeases
from cacheserver.errors import NotCachedError, UpstreamDownError
from cacheserver.interfaces import Clock, Lease
from cacheserver.model import CachePolicy, Priority, Served, TierName
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.house import House, open_tier
from tests.servers import ValkeyServer
from tests.waiting import until

PREFIXES = (f"leases-{n}:" for n in itertools.count())
NAME = "v1.default.abc.def"
SOON_S = 0.2


@pytest.fixture
async def client(valkey_server: ValkeyServer) -> AsyncIterator[Client]:
    client = connect(valkey_server.url, timeout_s=5.0, connect_timeout_s=5.0)
    yield client
    await disconnect(client)


class Watched(RedisLeases):
    """Leases that count how often they have asked Redis."""

    asked = 0

    async def _run(self, *args: Any, **options: Any) -> Any:
        answer = await super()._run(*args, **options)
        self.asked += 1
        return answer


class Replicas:
    """Replicas of one service: their leases, and what each has counted."""

    def __init__(self, client: Client) -> None:
        self.prefix = next(PREFIXES)
        self._client = client
        self._numbers = itertools.count()
        self.registry = CollectorRegistry()
        self._books = CounterBooks(clock=SystemClock(), registry=self.registry)

    def new(self, *, clock: Clock | None = None, lease_s: float = 5.0, client: Client | None = None) -> Watched:
        return Watched(
            client=client or self._client,
            prefix=self.prefix,
            replica_id=f"{next(self._numbers):016x}",
            clock=clock or SystemClock(),
            books=self._books,
            lease_s=lease_s,
        )

    @property
    def key(self) -> str:
        return f"{self.prefix}lease:{{{NAME}}}"

    @property
    def unleased(self) -> float:
        return self.registry.get_sample_value("cacheserver_unleased_total") or 0.0


@pytest.fixture
def replicas(client: Client) -> Replicas:
    return Replicas(client)


async def nothing() -> None:
    pass


def standard() -> Priority:
    return Priority.STANDARD


class Flight:
    """What a holder has to be told of."""

    def urge(self, priority: Priority) -> None:
        """Not heard."""


@asynccontextmanager
async def holding(leases: RedisLeases, name: str = NAME, *, looked_s_ago: float = 0.0) -> AsyncIterator[Lease]:
    """The lease, for as long as it is entered; it is given back for good on return."""
    lease = await leases.take(name, looked_s_ago=looked_s_ago, priority=standard)
    try:
        yield lease
    finally:
        leases.let_go(lease, after=nothing)
        await leases._tasks.idle()


async def give_back_unused(leases: RedisLeases) -> None:
    leases.let_go(await leases.take(NAME, looked_s_ago=0.0, priority=standard), after=None)
    await leases._tasks.idle()


async def held(leases: RedisLeases, until_s: AsyncExitStack) -> Lease:
    return await until_s.enter_async_context(holding(leases))


class TestTaking:
    async def test_who_comes_while_another_holds_it_waits_and_then_looks_again(self, replicas: Replicas) -> None:
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            lease = await held(replicas.new(), first)
            theirs_to_take = replicas.new()
            waiting = asyncio.create_task(held(theirs_to_take, second))
            await until(lambda: theirs_to_take.asked >= 3)
            assert not waiting.done()
            await first.aclose()
            theirs = await waiting
        assert (lease.look_again, lease.is_shared, theirs.look_again, theirs.is_shared) == (False, True, True, True)

    async def test_only_one_of_many_has_it_at_a_time(self, replicas: Replicas) -> None:
        holders = most = 0

        async def take() -> None:
            nonlocal holders, most
            async with holding(replicas.new()):
                holders += 1
                most = max(most, holders)
                await asyncio.sleep(0)
                holders -= 1

        await asyncio.gather(*(take() for _ in range(12)))
        assert most == 1

    async def test_leases_of_other_requests_are_nobodys_business(self, replicas: Replicas) -> None:
        async with (
            holding(replicas.new(), "one") as one,
            holding(replicas.new(), "other") as other,
        ):
            assert not one.look_again
            assert not other.look_again

    async def test_who_looked_before_it_was_released_looks_again(self, replicas: Replicas) -> None:
        async with holding(replicas.new()):
            pass
        async with holding(replicas.new(), looked_s_ago=60) as before:
            assert before.look_again

    async def test_who_looked_since_it_was_released_does_not(self, replicas: Replicas, client: Client) -> None:
        async with holding(replicas.new()):
            pass
        await client.hincrby(replicas.key, "released_ms", -5_000)
        async with holding(replicas.new(), looked_s_ago=1) as since:
            assert not since.look_again

    async def test_of_one_that_was_given_back_unused_there_is_nothing_to_look_for(self, replicas: Replicas) -> None:
        await give_back_unused(replicas.new())
        async with holding(replicas.new(), looked_s_ago=60) as lease:
            assert not lease.look_again

    async def test_one_given_back_unused_does_not_hide_an_earlier_release(self, replicas: Replicas) -> None:
        async with holding(replicas.new()):
            pass
        await give_back_unused(replicas.new())
        async with holding(replicas.new(), looked_s_ago=60) as lease:
            assert lease.look_again

    async def test_who_gives_up_waiting_leaves_nothing_behind(self, replicas: Replicas) -> None:
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            await held(replicas.new(), first)
            impatient = replicas.new()
            waiting = asyncio.create_task(held(impatient, second))
            await until(lambda: impatient.asked >= 1)
            waiting.cancel()
            await asyncio.wait({waiting})
        async with asyncio.timeout(2), holding(replicas.new()):
            pass

    async def test_what_was_given_back_is_let_go_of_without_a_look_for_garbage(self, replicas: Replicas) -> None:
        clock = FakeClock()
        leases = replicas.new(clock=clock)
        gc.disable()
        try:
            lease, flight = await leases.take(NAME, looked_s_ago=0, priority=standard), Flight()
            lease.urge = flight.urge
            await until(lambda: clock.sleepers > 0)  # it beats
            leases.let_go(lease, after=nothing)
            await leases._tasks.idle()
            kept = weakref.ref(flight)
            del lease, flight
            assert kept() is None
        finally:
            gc.enable()

    async def test_it_is_given_back_when_what_came_of_it_can_be_found(self, replicas: Replicas) -> None:
        is_copied = asyncio.Event()

        async def copied() -> None:
            await is_copied.wait()

        leases = replicas.new()
        leases.let_go(await leases.take(NAME, looked_s_ago=0, priority=standard), after=copied)
        async with AsyncExitStack() as second:
            patient = replicas.new()
            waiting = asyncio.create_task(held(patient, second))
            await until(lambda: patient.asked >= 3)
            assert not waiting.done()
            is_copied.set()
            await waiting

    async def test_the_next_load_of_one_replica_does_not_poll_for_what_it_gives_back(
        self, replicas: Replicas, clock: FakeClock
    ) -> None:
        leases = replicas.new(clock=clock)
        for _ in range(3):
            leases.let_go(await leases.take(NAME, looked_s_ago=0, priority=standard), after=nothing)
        await leases.aclose()


class TestHearing:
    async def test_who_waits_has_it_as_soon_as_it_is_released_however_rarely_it_asks(
        self, redis_url: str, clock: FakeClock
    ) -> None:
        client = connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0)
        replicas = Replicas(client)
        hearing = replicas.new(clock=clock)
        hearing.start()
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            first_leases = replicas.new()
            await held(first_leases, first)
            waiting = asyncio.create_task(held(hearing, second))
            await until(lambda: hearing.asked == 1 and clock.sleepers > 0)
            await until_heard(client, f"{replicas.prefix}leases")
            await first.aclose()
            async with asyncio.timeout(5):
                await waiting
        await hearing.aclose()
        await disconnect(client)

    async def test_who_hears_nothing_asks_again(self, replicas: Replicas) -> None:
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            await held(replicas.new(), first)
            deaf = replicas.new()
            waiting = asyncio.create_task(held(deaf, second))
            await until(lambda: deaf.asked >= 2)
            await first.aclose()
            async with asyncio.timeout(5):
                await waiting

    async def test_it_is_heard_again_when_the_connection_was_lost(
        self, replicas: Replicas, client: Client, clock: FakeClock
    ) -> None:
        hearing = replicas.new(clock=clock)
        hearing.start()
        await until_heard(client, f"{replicas.prefix}leases")
        await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await until_heard(client, f"{replicas.prefix}leases")
        await hearing.aclose()


async def until_heard(client: Client, channel: str) -> None:
    """Wait until somebody listens, be it at one node of many."""
    servers = client.get_nodes() if isinstance(client, RedisCluster) else [client]

    async def is_heard() -> bool:
        replies = [await server.execute_command("PUBSUB", "NUMSUB", channel) for server in servers]
        return any(listeners for _, listeners in replies)

    async with asyncio.timeout(5):
        while not await is_heard():
            pass


class TestDying:
    async def test_a_dead_holder_is_succeeded_when_its_time_is_over(self, replicas: Replicas, client: Client) -> None:
        dead = replicas.new(lease_s=SOON_S)
        assert await dead._acquire(replicas.key, Lease(), 0.0, standard) is not None  # and it shows no sign of life
        async with asyncio.timeout(5), holding(replicas.new()) as lease:
            assert lease.look_again
            assert int(await client.hget(replicas.key, "fence") or 0) == 2

    async def test_one_taken_from_the_dead_and_given_back_unused_still_makes_others_look(
        self, replicas: Replicas
    ) -> None:
        dead = replicas.new(lease_s=SOON_S)
        assert await dead._acquire(replicas.key, Lease(), 0.0, standard) is not None
        async with asyncio.timeout(5):
            await give_back_unused(replicas.new())
        async with holding(replicas.new()) as lease:
            assert lease.look_again

    async def test_a_living_holder_keeps_it_beyond_its_span(self, replicas: Replicas) -> None:
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            living = replicas.new(lease_s=SOON_S)
            await held(living, first)
            waiting = asyncio.create_task(held(replicas.new(), second))
            await until(lambda: living.asked >= 10)  # a quarter of its span apart
            assert not waiting.done()
            await first.aclose()
            await waiting

    async def test_who_was_only_slow_finds_out_and_does_not_free_its_successors(
        self, replicas: Replicas, clock: FakeClock, client: Client
    ) -> None:
        async with AsyncExitStack() as slow, AsyncExitStack() as successor:
            lost = await held(replicas.new(clock=clock, lease_s=SOON_S), slow)
            theirs = await held(replicas.new(), successor)
            clock.advance(SOON_S)
            await until(lambda: lost.is_lost)
            assert replicas.unleased == 1
            holder = await client.hget(replicas.key, "holder")
            await slow.aclose()
            assert await client.hget(replicas.key, "holder") == holder
            assert not theirs.is_lost

    async def test_without_redis_each_is_on_its_own_and_that_is_counted(
        self, replicas: Replicas, own_valkey: Callable[[], ValkeyServer]
    ) -> None:
        valkey = own_valkey()
        client = connect(valkey.url, timeout_s=1.0, connect_timeout_s=1.0)
        valkey.kill()
        async with (
            holding(replicas.new(client=client)) as one,
            holding(replicas.new(client=client)) as other,
        ):
            assert (one.is_shared, other.is_shared, replicas.unleased) == (False, False, 2)
        await disconnect(client)

    async def test_redis_that_dies_meanwhile_stops_nobody(
        self, replicas: Replicas, own_valkey: Callable[[], ValkeyServer]
    ) -> None:
        valkey = own_valkey()
        client = connect(valkey.url, timeout_s=1.0, connect_timeout_s=1.0)
        async with holding(replicas.new(client=client, lease_s=SOON_S)):
            valkey.kill()
        await disconnect(client)

    async def test_a_lease_that_redis_has_lost_is_there_again_with_the_next_sign_of_life(
        self, replicas: Replicas, client: Client
    ) -> None:
        async with holding(replicas.new(lease_s=SOON_S)) as lease:
            await client.delete(replicas.key)
            await until(lambda: client.exists(replicas.key))
            assert not lease.is_lost

    async def test_while_redis_is_away_it_is_not_asked_for_each_load(
        self, replicas: Replicas, own_valkey: Callable[[], ValkeyServer], clock: FakeClock
    ) -> None:
        valkey = own_valkey()
        client = connect(valkey.url, timeout_s=1.0, connect_timeout_s=1.0)
        leases = replicas.new(client=client, clock=clock)
        valkey.kill()
        assert not (await leases.take(NAME, looked_s_ago=0, priority=standard)).is_shared
        valkey.start()
        assert not (await leases.take(NAME, looked_s_ago=0, priority=standard)).is_shared
        clock.advance(5)
        assert (await leases.take(NAME, looked_s_ago=0, priority=standard)).is_shared
        await leases.aclose()
        await disconnect(client)

    async def test_who_gives_up_in_the_moment_it_is_given_a_lease_does_not_keep_it(
        self, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leases = replicas.new()
        run = leases._run

        async def cut_short(*args: Any, **options: Any) -> Any:
            await run(*args, **options)
            raise asyncio.CancelledError

        with monkeypatch.context() as patch:
            patch.setattr(leases, "_run", cut_short)
            with pytest.raises(asyncio.CancelledError):
                await leases.take(NAME, looked_s_ago=0, priority=standard)
        async with asyncio.timeout(2), holding(replicas.new()):
            pass


class TestLasting:
    async def test_a_lease_that_is_held_has_no_ttl_and_a_released_one_has(
        self, replicas: Replicas, client: Client
    ) -> None:
        for _ in range(2):
            async with holding(replicas.new()):
                assert await client.ttl(replicas.key) == -1
            assert 0 < await client.ttl(replicas.key) <= 60

    async def test_what_the_long_dead_held_is_swept_and_nothing_else(self, replicas: Replicas, client: Client) -> None:
        leases = replicas.new()
        async with holding(leases, "living"):
            await leases._acquire(replicas.key, Lease(), 0.0, standard)
            await leases.sweep()
            assert await client.exists(replicas.key)
            await client.hincrby(replicas.key, "deadline_ms", -700_000)
            await leases.sweep()
            assert not await client.exists(replicas.key)
            assert await client.exists(f"{replicas.prefix}lease:{{living}}")

    async def test_a_prefix_that_reads_like_a_pattern_is_swept_and_no_other(
        self, replicas: Replicas, client: Client
    ) -> None:
        start = replicas.prefix
        keys = []
        for rest in ("b:", "[ab]:"):
            replicas.prefix = start + rest
            keys.append(replicas.key)
            await replicas.new()._acquire(replicas.key, Lease(), 0.0, standard)
            await client.hincrby(replicas.key, "deadline_ms", -700_000)
        await replicas.new().sweep()
        assert [await client.exists(key) for key in keys] == [1, 0]


class TestReplicasOfAService:
    @pytest.fixture
    async def houses(self, replicas: Replicas, tmp_path: Path, clock: FakeClock) -> AsyncIterator[list[House]]:
        """Four replicas on the same tiers."""
        redis = await open_tier(tmp_path / "tiers" / "redis", TierName.REDIS, clock)
        s3 = await open_tier(tmp_path / "tiers" / "s3", TierName.S3, clock)
        houses = [House(clock=clock, redis=redis, s3=s3, leases=replicas.new()) for _ in range(4)]
        yield houses
        for house in houses:
            await house.aclose()
        await redis.aclose()
        await s3.aclose()

    @staticmethod
    async def _one_makes_and_another_waits(
        first: House, second: House
    ) -> tuple[asyncio.Task[Served], asyncio.Task[Served]]:
        """One replica's upstream is at it, and another replica has found nothing and waits for the lease."""
        first.upstream.hold()
        making = asyncio.create_task(first.get())
        await first.upstream.arrived(1)
        waiting = asyncio.create_task(second.get())
        await until(lambda: any(flight.missed for row in second.cache._flights._flights.values() for flight in row))
        return making, waiting

    async def test_a_prompt_that_all_ask_for_at_once_is_paid_for_once(self, houses: list[House]) -> None:
        answers = await asyncio.gather(*(house.get() for house in houses for _ in range(25)))
        assert sum(house.upstream.calls for house in houses) == 1
        assert len({answer.entry.image.sha256 for answer in answers}) == 1
        assert sum(answer.cost_microusd > 0 for answer in answers) == 1

    async def test_many_prompts_are_each_paid_for_once(self, houses: list[House]) -> None:
        prompts = [f"fox {number}" for number in range(30)]
        await asyncio.gather(*(house.get(prompt) for prompt in prompts for house in houses))
        assert sum(house.upstream.calls for house in houses) == len(prompts)

    async def test_who_waits_takes_over_when_the_leader_fails(self, houses: list[House]) -> None:
        first, second = houses[:2]
        failing, waiting = await self._one_makes_and_another_waits(first, second)
        first.upstream.fail_next(UpstreamDownError("gone"))
        first.upstream.release()
        await asyncio.wait({failing, waiting})
        assert isinstance(failing.exception(), UpstreamDownError)
        assert (waiting.result().tier, second.upstream.calls) == (TierName.UPSTREAM, 1)

    async def test_a_call_that_waits_for_its_turn_goes_by_the_priority_of_who_waits_at_another_replica(
        self, houses: list[House], replicas: Replicas
    ) -> None:
        first, second = houses[:2]
        first.restart(leases=replicas.new(lease_s=SOON_S), max_concurrent=1)
        first.upstream.hold()
        busy = asyncio.create_task(first.get("another fox"))
        await first.upstream.arrived(1)
        warming = asyncio.create_task(first.get(priority=Priority.WARM_UP))

        def queued() -> list[Priority]:
            return [job.priority for job in first.generator._scheduler._queue._jobs]

        await until(lambda: queued() == [Priority.WARM_UP])
        urgent = asyncio.create_task(second.get(priority=Priority.INTERACTIVE))
        await until(lambda: queued() == [Priority.INTERACTIVE])
        first.upstream.release()
        await asyncio.gather(busy, warming, urgent)
        assert second.upstream.calls == 0

    async def test_a_refresh_is_not_answered_with_what_another_replica_just_made(self, houses: list[House]) -> None:
        await houses[0].get()
        new = await houses[1].get(cache_policy=CachePolicy.REFRESH)
        assert (new.tier, houses[1].upstream.calls) == (TierName.UPSTREAM, 1)

    async def test_who_wants_only_what_is_cached_does_not_wait_for_another_replica(self, houses: list[House]) -> None:
        first, second = houses[:2]
        making, waiting = await self._one_makes_and_another_waits(first, second)
        with pytest.raises(NotCachedError):
            await second.get(cache_policy=CachePolicy.ONLY_IF_CACHED)
        first.upstream.release()
        await asyncio.gather(making, waiting)

    async def test_a_caller_that_hangs_up_while_its_replica_waits_ends_nothing(self, houses: list[House]) -> None:
        first, second = houses[:2]
        making, waiting = await self._one_makes_and_another_waits(first, second)
        waiting.cancel()
        await asyncio.wait({waiting})
        await until(lambda: len(second.cache._flights) == 0)
        first.upstream.release()
        await making
        assert (await second.get()).entry.image.sha256 == making.result().entry.image.sha256
        assert (first.upstream.calls, second.upstream.calls) == (1, 0)
