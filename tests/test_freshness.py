"""Entries past their end: answered with for a while, renewed behind the answer, and kept in the tiers that long."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.calls.directives import cache_status
from cacheserver.control.leases import RedisLeases
from cacheserver.errors import (
    CannotAffordError,
    KeyGoneError,
    NotCachedError,
    PromptRefusedError,
    UpstreamDownError,
    UpstreamError,
    UpstreamInvalidError,
    UpstreamLimitedError,
)
from cacheserver.freshness import Renewals, stale_windows, useful_for_s
from cacheserver.model import (
    Budget,
    BudgetPeriod,
    BudgetScope,
    CachePolicy,
    Caller,
    Namespace,
    Pending,
    Permission,
    Priority,
    Served,
    Stale,
    Terms,
    TierName,
)
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import connect, disconnect
from tests.fakes import FakeClock
from tests.house import EVERYTHING, FaultyTier, House, open_s3
from tests.servers import S3Server
from tests.waiting import until

READER = Caller("reader", frozenset({Permission.READ}))
TTL_S, WINDOW_S = 100.0, 50.0
SERVES_STALE = Namespace("default", "default", ttl_s=TTL_S, stale_while_revalidate_s=WINDOW_S)
STALE_IF_ERROR = Namespace("default", "default", ttl_s=TTL_S, stale_if_error_s=WINDOW_S)
PREFIXES = (f"freshness-{n}:" for n in itertools.count())


def live_in(house: House, namespace: Namespace, **settings: object) -> None:
    house.namespace = namespace
    house.restart(**settings)  # type: ignore[arg-type] # test convenience


async def expired(house: House, *, by_s: float = 1.0) -> Served:
    """What was made of the usual prompt, by now so long past its end."""
    made = await house.get()
    await house.settle()
    house.clock.advance(TTL_S + by_s)
    return made


def renewals(house: House, result: str) -> float:
    labels = {"namespace": "default", "result": result}
    return house.registry.get_sample_value("cacheserver_renewals_total", labels) or 0.0


def after_errors(house: House) -> float:
    return house.registry.get_sample_value("cacheserver_stale_after_error_total", {"namespace": "default"}) or 0.0


def budget(microusd: int) -> Budget:
    return Budget(BudgetScope.GLOBAL, "", BudgetPeriod.DAY, microusd)


class TestWhileRevalidate:
    async def test_by_default_what_expired_is_a_miss(self, house: House) -> None:
        live_in(house, Namespace("default", "default", ttl_s=TTL_S))
        await expired(house)
        assert (await house.get()).tier is TierName.UPSTREAM

    async def test_it_is_answered_with_at_once_and_one_new_one_is_made_behind_it(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        old = await expired(house)
        house.upstream.hold()
        answers = await asyncio.gather(*(house.get() for _ in range(5)))
        assert {(each.stale, each.tier, each.cost_microusd) for each in answers} == {(True, TierName.MEMORY, 0)}
        assert all(each.entry.image == old.entry.image for each in answers)
        await house.upstream.arrived(2)
        assert (await house.get()).stale
        house.upstream.release()
        await house.cache.renewals.idle()
        new = await house.get()
        assert (new.stale, new.tier) == (False, TierName.MEMORY)
        assert new.entry.image.sha256 != old.entry.image.sha256
        assert new.entry.key == old.entry.key
        assert (house.upstream.calls, renewals(house, "generated")) == (2, 1)

    async def test_so_it_is_from_a_lower_tier(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        await expired(house)
        house.restart()
        house.upstream.hold()
        first = await house.get()
        again = await house.get()
        assert [(each.stale, each.tier) for each in (first, again)] == [
            (True, TierName.REDIS),
            (True, TierName.MEMORY),
        ]
        house.upstream.release()
        await house.cache.renewals.idle()
        assert not (await house.get()).stale
        assert house.upstream.calls == 2

    async def test_who_memory_has_no_room_for_is_answered_with_it_while_the_new_one_is_made(self, house: House) -> None:
        live_in(house, SERVES_STALE, memory_bytes=0)
        await expired(house)
        house.upstream.hold()
        await house.get()
        await house.upstream.arrived(2)
        async with asyncio.timeout(5):
            assert (await house.get()).stale

    async def test_what_a_slower_tier_has_anew_goes_before_it(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        old = await expired(house)
        other = House(clock=house.clock, redis=house.s3, s3=house.s3)
        live_in(other, SERVES_STALE, tiers=[house.s3])
        new = await other.get(max_age_s=1)
        await other.settle()
        house.restart()
        found = await house.get()
        assert (found.stale, found.tier) == (False, TierName.S3)
        assert found.entry == new.entry != old.entry
        await other.aclose()

    async def test_past_its_window_it_is_a_miss(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        await expired(house, by_s=WINDOW_S)
        assert (await house.get()).tier is TierName.UPSTREAM

    async def test_the_renewal_waits_for_everybody_else(self, house: House) -> None:
        live_in(house, SERVES_STALE, max_concurrent=1)
        await expired(house)
        house.upstream.hold()
        busy = asyncio.create_task(house.get("a blue fox"))
        await house.upstream.arrived(2)
        await house.get()
        await until(lambda: house.cache.in_flight == 2)
        urgent = asyncio.create_task(house.get("a green fox", priority=Priority.BATCH))
        await until(lambda: house.cache.in_flight == 3)
        house.upstream.release()
        await asyncio.gather(busy, urgent)
        await house.cache.renewals.idle()
        assert [request.prompt for request, _ in house.upstream.asked][2:] == ["a green fox", "a red fox"]

    async def test_a_budget_that_refuses_leaves_it_served_and_is_asked_again_later(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        await expired(house)
        house.restart(budget=[budget(1_000)])
        for _ in range(3):
            assert (await house.get()).stale
            await house.cache.renewals.idle()
        assert (house.upstream.calls, renewals(house, "refused")) == (1, 1)
        house.clock.advance(11)
        assert (await house.get()).stale
        await house.cache.renewals.idle()
        assert renewals(house, "refused") == 2
        house.clock.advance(WINDOW_S)
        with pytest.raises(CannotAffordError):
            await house.get()

    async def test_an_upstream_that_fails_leaves_it_served(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        await expired(house)
        house.upstream.fail_next(UpstreamDownError("down for a test"))
        assert (await house.get()).stale
        await house.cache.renewals.idle()
        assert (await house.get()).stale
        assert renewals(house, "failed") == 1

    async def test_nothing_is_paid_for_while_the_last_tier_cannot_say_what_it_has(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        await expired(house)
        house.s3.is_down = True
        assert (await house.get()).stale
        await house.cache.renewals.idle()
        assert (house.upstream.calls, renewals(house, "refused")) == (1, 1)

    @pytest.mark.parametrize(
        "terms",
        [
            {"cache_policy": CachePolicy.REFRESH},
            {"cache_policy": CachePolicy.NO_STORE},
            {"max_age_s": 3_600.0},
            {"priority": Priority.WARM_UP},
        ],
    )
    async def test_who_judges_for_itself_is_not_answered_with_it(self, house: House, terms: dict[str, object]) -> None:
        live_in(house, replace(SERVES_STALE, stale_if_error_s=WINDOW_S))
        await expired(house)
        assert (await house.get(**terms)).tier is TierName.UPSTREAM
        house.clock.advance(TTL_S + 1)
        house.upstream.fail_next(UpstreamDownError("down for a test"))
        with pytest.raises(UpstreamDownError):
            await house.get(**terms)

    async def test_who_may_not_pay_is_answered_with_it_and_has_nothing_made(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        await expired(house)
        assert (await house.get(cache_policy=CachePolicy.ONLY_IF_CACHED)).stale
        assert (await house.get(caller=READER)).stale
        await house.cache.renewals.idle()
        house.clock.advance(WINDOW_S)
        with pytest.raises(NotCachedError):
            await house.get(cache_policy=CachePolicy.ONLY_IF_CACHED)
        assert house.upstream.calls == 1

    async def test_it_is_there_by_its_key_until_then(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        key = (await expired(house)).entry.key
        by_key = {"namespace": house.namespace, "caller": EVERYTHING, "terms": Terms()}
        served = await house.cache.get_by_key(key, **by_key)  # type: ignore[arg-type] # as spelled out
        assert not isinstance(served, Pending)
        assert served.stale
        house.clock.advance(WINDOW_S)
        with pytest.raises(KeyGoneError):
            await house.cache.get_by_key(key, **by_key)  # type: ignore[arg-type] # as above

    async def test_what_was_purged_is_not_answered_with(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        key = (await expired(house)).entry.key
        await house.cache.purge(house.namespace, key=key, dry_run=False)
        assert (await house.get()).tier is TierName.UPSTREAM

    async def test_a_renewal_that_has_cost_nothing_keeps_nobody_from_shutting_down(self, house: House) -> None:
        live_in(house, SERVES_STALE, max_concurrent=1)
        await expired(house)
        house.upstream.hold()
        busy = asyncio.create_task(house.get("a blue fox"))
        await house.upstream.arrived(2)
        await house.get()
        await until(lambda: house.cache.in_flight == 2)
        await house.cache.renewals.aclose()
        await until(lambda: house.cache.in_flight == 1)
        house.upstream.release()
        await busy

    async def test_the_cache_status_says_so(self, house: House) -> None:
        live_in(house, SERVES_STALE)
        await expired(house, by_s=1.5)
        status = cache_status(await house.get(), CachePolicy.USE_CACHE, house.clock.now_s())
        assert status == "cacheserver; hit; detail=memory; ttl=-2; age=101"

    async def test_no_more_than_so_many_are_renewed_at_a_time(
        self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cacheserver.freshness._AT_A_TIME", 1)
        registry, gate = CollectorRegistry(), asyncio.Event()
        some = Renewals(books=CounterBooks(clock=clock, registry=registry), clock=clock)
        for name in ("one", "other"):
            some.begin(name, gate.wait, namespace="default")
        gate.set()
        await some.idle()
        counts = [
            registry.get_sample_value("cacheserver_renewals_total", {"namespace": "default", "result": result})
            for result in ("generated", "refused")
        ]
        assert counts == [1, 1]


class TestIfError:
    async def test_it_is_answered_with_in_place_of_the_upstreams_error(self, house: House) -> None:
        live_in(house, STALE_IF_ERROR)
        old = await expired(house)
        house.upstream.fail_next(UpstreamDownError("down"))
        served = await house.get()
        assert (served.stale, served.tier) == (Stale.AFTER_ERROR, TierName.MEMORY)
        assert served.entry.image == old.entry.image
        assert after_errors(house) == 1
        status = cache_status(served, CachePolicy.USE_CACHE, house.clock.now_s())
        assert status == "cacheserver; fwd=stale; detail=memory; ttl=-1; age=101"
        assert not (await house.get()).stale

    async def test_it_is_what_a_caller_gets_before_its_deadline_while_its_upstream_is_limited(
        self, house: House
    ) -> None:
        live_in(house, STALE_IF_ERROR)
        await expired(house)
        house.upstream.fail_next(UpstreamLimitedError("limited", retry_after_s=60.0))
        waiting = asyncio.create_task(house.get(deadline_s=10.0))
        await house.upstream.arrived(2)
        house.clock.advance(9.4)
        await until(lambda: not waiting.done())
        house.clock.advance(0.1)
        assert (await waiting).stale
        assert after_errors(house) == 1
        house.clock.advance(60)
        await until(lambda: house.cache.in_flight == 0)
        assert not (await house.get()).stale

    async def test_what_is_late_is_paid_for_and_kept_all_the_same(self, house: House) -> None:
        live_in(house, STALE_IF_ERROR)
        await expired(house)
        house.upstream.hold()
        waiting = asyncio.create_task(house.get(deadline_s=10.0))
        await house.upstream.arrived(2)
        house.clock.advance(9.5)
        assert (await waiting).stale
        house.upstream.release()
        await until(lambda: house.cache.in_flight == 0)
        assert ((await house.get()).stale, house.upstream.calls) == (False, 2)

    async def test_who_wants_to_be_told_pending_is_told_so(self, house: House) -> None:
        live_in(house, STALE_IF_ERROR)
        await expired(house)
        house.upstream.hold()
        waiting = asyncio.create_task(house.ask(deadline_s=10.0, max_wait_s=5.0))
        await house.upstream.arrived(2)
        house.clock.advance(5)
        assert isinstance(await waiting, Pending)

    async def test_who_has_nothing_else_waits_to_the_end(self, house: House) -> None:
        live_in(house, STALE_IF_ERROR)
        house.upstream.hold()
        waiting = asyncio.create_task(house.get(deadline_s=10.0))
        await house.upstream.arrived(1)
        house.clock.advance(9.5)
        house.upstream.release()
        assert not (await waiting).stale

    async def test_so_it_is_for_everyone_who_waits(self, house: House) -> None:
        live_in(house, STALE_IF_ERROR)
        await expired(house)
        house.restart()
        house.upstream.fail_next(UpstreamDownError("down"))
        answers = await asyncio.gather(*(house.get() for _ in range(3)))
        assert all(each.stale for each in answers)
        assert house.upstream.calls == 2

    @pytest.mark.parametrize(
        "error", [PromptRefusedError("refused"), UpstreamInvalidError("no such size", field="spec.size")]
    )
    async def test_what_the_request_is_to_blame_for_stays_an_error(self, house: House, error: UpstreamError) -> None:
        live_in(house, STALE_IF_ERROR)
        await expired(house)
        house.upstream.fail_next(error)
        with pytest.raises(type(error)):
            await house.get()

    async def test_who_may_not_pay_hears_so(self, house: House) -> None:
        live_in(house, STALE_IF_ERROR)
        await expired(house)
        with pytest.raises(NotCachedError):
            await house.get(cache_policy=CachePolicy.ONLY_IF_CACHED)

    async def test_past_its_window_the_error_is_told(self, house: House) -> None:
        live_in(house, STALE_IF_ERROR)
        await expired(house, by_s=WINDOW_S)
        house.upstream.fail_next(UpstreamDownError("down"))
        with pytest.raises(UpstreamDownError):
            await house.get()

    async def test_what_was_purged_meanwhile_is_not_answered_with(self, house: House) -> None:
        live_in(house, STALE_IF_ERROR)
        key = (await expired(house)).entry.key
        house.upstream.hold()
        waiting = asyncio.create_task(house.get())
        await house.upstream.arrived(2)
        await house.cache.purge(house.namespace, key=key, dry_run=False)
        house.upstream.fail_next(UpstreamDownError("down"))
        house.upstream.release()
        with pytest.raises(UpstreamDownError):
            await waiting


def test_an_entry_is_of_use_for_as_long_as_any_reader_of_its_partition_says() -> None:
    namespaces = [
        Namespace("a", "shared", stale_while_revalidate_s=10, stale_if_error_s=60),
        Namespace("b", "shared", stale_while_revalidate_s=30),
        Namespace("c", "c"),
    ]
    assert stale_windows(namespaces) == {"shared": 60}


def test_an_entry_is_of_use_for_its_longest_life_and_window_if_there_is_one() -> None:
    bounded = Namespace("a", "a", ttl_s=10, max_ttl_s=100, stale_if_error_s=5)
    assert useful_for_s([bounded, Namespace("b", "b", max_ttl_s=50)]) == 105
    assert useful_for_s([bounded, Namespace("b", "b", ttl_s=50)]) == math.inf


class TestAcrossReplicas:
    """Two replicas on a real Redis and a real S3."""

    @pytest.fixture
    async def pair(self, clock: FakeClock, redis_url: str, s3_server: S3Server) -> AsyncIterator[tuple[House, House]]:
        bucket, prefix = s3_server.new_bucket(), next(PREFIXES)
        async with AsyncExitStack() as undo:
            pair = []
            for replica in ("1", "2"):
                control = connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0)
                undo.push_async_callback(disconnect, control)
                redis = RedisTier(
                    connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0),
                    clock=clock,
                    rng=random.Random(7),  # noqa: S311 - no secret
                    prefix=prefix,
                    stale_s=stale_windows([SERVES_STALE]),
                )
                s3 = open_s3(s3_server, clock=clock, bucket=bucket)
                house = House(clock=clock, redis=FaultyTier(redis, TierName.REDIS), s3=FaultyTier(s3, TierName.S3))
                leases = RedisLeases(
                    client=control,
                    prefix=prefix,
                    replica_id=replica * 16,
                    clock=clock,
                    books=house.books,
                    timeout_s=5.0,
                )
                leases.start()
                live_in(house, SERVES_STALE, leases=leases)
                for closing in (redis.aclose, s3.aclose, leases.aclose, house.aclose):
                    undo.push_async_callback(closing)
                pair.append(house)
            yield pair[0], pair[1]

    async def test_one_of_them_renews_it_and_the_other_finds_it(self, pair: tuple[House, House]) -> None:
        one, other = pair
        old = await expired(one)
        one.upstream.hold()
        other.upstream.hold()
        assert [(await each.get()).stale for each in pair] == [True, True]
        await until(lambda: one.upstream.calls + other.upstream.calls == 2)
        one.upstream.release()
        other.upstream.release()

        turns = itertools.count()

        def is_settled() -> bool:
            if next(turns) % 100 == 0:
                one.clock.advance(0.1)  # hardly: what is made must not be old when it is found
            return not (one.cache.in_flight or other.cache.in_flight)

        await until(is_settled)
        await asyncio.gather(*(each.cache.renewals.idle() for each in pair))
        found = [await each.get() for each in pair]
        assert {each.stale for each in found} == {False}
        assert found[0].entry == found[1].entry != old.entry
        assert one.upstream.calls + other.upstream.calls == 2
        assert sorted((renewals(each, "generated"), renewals(each, "found")) for each in pair) == [(0, 1), (1, 0)]
