"""Namespaces that only observe: every call is generated for its caller alone, and what would have hit is counted."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cacheserver.errors import (
    CannotAffordError,
    KeyGoneError,
    NotCachedError,
    PermissionDeniedError,
    RequestIdRunningError,
    RequestIdSpentError,
)
from cacheserver.model import (
    Budget,
    BudgetPeriod,
    BudgetScope,
    CacheKey,
    CachePolicy,
    Caller,
    MatchLevel,
    Namespace,
    Pending,
    Permission,
    Terms,
    TierName,
    VariantPolicy,
)
from cacheserver.pb import promptcache_pb2 as pb
from tests.house import EVERYTHING, House
from tests.provider import OpenAIStandIn
from tests.rpc_front import ask as request
from tests.rpc_front import open_front
from tests.running import ask, calling, environment, running
from tests.servers import S3Server, ValkeyServer
from tests.waiting import until

READER = Caller("reader", frozenset({Permission.READ}))
SERVED = Namespace("served", "default")
PRICE = 53_000


@pytest.fixture
def house(house: House) -> House:
    """The cache of a namespace that only observes."""
    house.namespace = replace(house.namespace, serve_percent=0)
    return house


async def stored(house: House, prompt: str = "a red fox") -> bytes | None:
    """The picture that the cache would serve for this prompt."""
    _, identity = house.identity(prompt)
    try:
        served = await house.cache.get_by_key(identity.key, namespace=house.namespace, caller=EVERYTHING, terms=Terms())
    except KeyGoneError:
        return None
    assert not isinstance(served, Pending)
    return served.entry.image.data


class TestObserving:
    async def test_every_call_is_generated_and_pays_though_memory_would_have_answered(self, house: House) -> None:
        first, second, third = [await house.get() for _ in range(3)]
        assert house.upstream.calls == 3
        assert len({each.entry.image.data for each in (first, second, third)}) == 3
        assert [each.tier for each in (first, second, third)] == [TierName.UPSTREAM] * 3
        assert [each.would_hit for each in (first, second, third)] == [None, TierName.MEMORY, TierName.MEMORY]
        assert [(each.cost_microusd, each.saved_microusd) for each in (first, second, third)] == [(PRICE, 0)] * 3

    async def test_a_would_be_miss_is_kept_as_the_entry_and_a_would_be_hit_is_not(self, house: House) -> None:
        first = await house.get()
        await house.get()
        assert await stored(house) == first.entry.image.data

    async def test_the_tier_that_would_have_answered_is_told_without_promoting_anything(self, house: House) -> None:
        first = await house.get()
        await house.settle()
        house.restart()
        from_redis = await house.get()
        await house.redis.delete(first.entry.key)
        from_s3 = await house.get()
        assert (from_redis.would_hit, from_s3.would_hit) == (TierName.REDIS, TierName.S3)
        assert house.redis.gets == house.s3.gets == []  # found, and no bytes were read

    async def test_what_would_have_joined_a_running_load_is_told_as_such_and_made_alone(self, house: House) -> None:
        house.upstream.hold()
        calls = [asyncio.create_task(house.get()) for _ in range(3)]
        await house.upstream.arrived(3)
        found, _ = await house.cache.find([house.identity()[1].key])
        assert found[0].in_flight
        house.upstream.release()
        served = await asyncio.gather(*calls)
        assert Counter(each.would_hit for each in served) == {None: 1, TierName.UPSTREAM: 2}
        kept = [each for each in served if each.would_hit is None]
        assert await stored(house) == kept[0].entry.image.data
        assert not house.cache._alone._making

    async def test_a_load_of_a_served_namespace_of_the_partition_would_have_been_joined(self, house: House) -> None:
        house.upstream.hold()
        wanted, identity = house.identity()
        serving = asyncio.create_task(
            house.cache.get(wanted, identity, namespace=SERVED, caller=EVERYTHING, terms=Terms())
        )
        await house.upstream.arrived(1)
        observed = asyncio.create_task(house.get())
        await house.upstream.arrived(2)
        house.upstream.release()
        assert (await observed).would_hit is TierName.UPSTREAM
        assert not isinstance(answer := await serving, Pending)
        assert await stored(house) == answer[0].entry.image.data

    async def test_what_it_kept_is_a_hit_for_a_served_namespace_of_the_partition(self, house: House) -> None:
        made = await house.get()
        wanted, identity = house.identity()
        answer = await house.cache.get(wanted, identity, namespace=SERVED, caller=EVERYTHING, terms=Terms())
        assert not isinstance(answer, Pending)
        assert (answer[0].tier, answer[0].entry) == (TierName.MEMORY, made.entry)

    async def test_of_several_pictures_each_is_judged_by_itself(self, house: House) -> None:
        first = await house.get()
        answer = await house.ask(n=3)
        assert not isinstance(answer, Pending)
        assert [each.would_hit for each in answer] == [TierName.MEMORY, None, None]
        assert [each.entry.key.variant for each in answer] == [0, 1, 2]
        assert await stored(house) == first.entry.image.data
        again = await house.ask(n=3)
        assert not isinstance(again, Pending)
        assert [each.would_hit for each in again] == [TierName.MEMORY] * 3

    async def test_an_expired_entry_would_not_have_hit_and_is_replaced(self, house: House) -> None:
        house.namespace = replace(house.namespace, ttl_s=60)
        await house.get()
        await house.settle()
        assert (await house.get()).would_hit is TierName.MEMORY
        house.clock.advance(61)
        new = await house.get()
        assert new.would_hit is None
        assert await stored(house) == new.entry.image.data

    async def test_an_entry_older_than_max_age_would_not_have_hit_and_is_replaced(self, house: House) -> None:
        await house.get()
        house.clock.advance(100)
        assert (await house.get(max_age_s=200)).would_hit is TierName.MEMORY
        new = await house.get(max_age_s=50)
        assert new.would_hit is None
        assert await stored(house) == new.entry.image.data

    async def test_while_the_last_tier_cannot_say_a_picture_is_made_and_takes_no_name(self, house: House) -> None:
        first = await house.get()
        await house.settle()
        house.restart()
        await house.redis.delete(first.entry.key)
        house.s3.is_down = True
        unknown = await house.get()
        assert (unknown.would_hit, unknown.cost_microusd) == (None, PRICE)
        house.s3.is_down = False
        assert await stored(house) == first.entry.image.data

    async def test_a_silent_faster_tier_keeps_no_miss_from_being_kept(self, house: House) -> None:
        house.redis.is_down = True
        first = await house.get()
        assert await stored(house) == first.entry.image.data

    async def test_budgets_bind_as_always(self, house: House) -> None:
        await house.get()
        await house.settle()
        house.restart(budget=[Budget(BudgetScope.GLOBAL, "", BudgetPeriod.DAY, 1_000)])
        with pytest.raises(CannotAffordError):
            await house.get()
        assert house.upstream.calls == 1

    async def test_it_needs_the_right_to_generate_even_for_what_is_cached(self, house: House) -> None:
        await house.get()
        with pytest.raises(PermissionDeniedError):
            await house.ask(caller=READER)

    async def test_a_caller_that_hangs_up_after_money_was_spent_leaves_the_entry(self, house: House) -> None:
        house.upstream.hold()
        hung_up = asyncio.create_task(house.get())
        await house.upstream.arrived(1)
        hung_up.cancel()
        await asyncio.wait({hung_up})
        house.upstream.release()
        await until(lambda: not house.cache._alone._making)
        assert await stored(house) is not None
        assert (await house.get()).would_hit is TierName.MEMORY

    async def test_max_wait_is_not_read(self, house: House) -> None:
        assert (await house.get(max_wait_s=0.0)).tier is TierName.UPSTREAM


class TestPolicies:
    async def test_a_cache_only_read_is_a_cache_read(self, house: House) -> None:
        with pytest.raises(NotCachedError):
            await house.get(cache_policy=CachePolicy.ONLY_IF_CACHED)
        first = await house.get()
        only = await house.get(cache_policy=CachePolicy.ONLY_IF_CACHED)
        assert (only.tier, only.would_hit, only.entry) == (TierName.MEMORY, None, first.entry)
        assert house.upstream.calls == 1

    async def test_a_refresh_hits_nothing_and_its_picture_replaces_the_entry(self, house: House) -> None:
        await house.get()
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        assert new.would_hit is None
        assert await stored(house) == new.entry.image.data

    async def test_no_store_leaves_nothing_here_either(self, house: House) -> None:
        assert (await house.get(cache_policy=CachePolicy.NO_STORE)).would_hit is None
        assert await stored(house) is None

    async def test_another_one_that_is_stored_would_have_hit_and_the_next_would_not(self, house: House) -> None:
        await house.get()
        given, new = [await house.get(variant_policy=VariantPolicy.NEXT) for _ in range(2)]
        assert (given.entry.key.variant, given.would_hit) == (0, TierName.MEMORY)
        assert (new.entry.key.variant, new.would_hit) == (1, None)

    async def test_a_call_sent_again_never_pays_twice(self, house: House) -> None:
        house.upstream.hold()
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one"}
        first = asyncio.create_task(house.get(**terms))
        await house.upstream.arrived(1)
        with pytest.raises(RequestIdRunningError):
            await house.get(**terms)
        house.upstream.release()
        await first
        with pytest.raises(RequestIdSpentError):
            await house.get(**terms)
        assert house.upstream.calls == 1

    async def test_a_call_cut_short_while_its_picture_is_stored_is_not_paid_for_again(self, house: House) -> None:
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one"}
        house.upstream.hold()
        first = asyncio.create_task(house.get(**terms))
        await house.upstream.arrived(1)
        house.redis.gate.clear()
        house.s3.gate.clear()
        house.upstream.release()
        await until(lambda: house.keeper.held_images == 1)
        await house.cache.aclose(0)
        await asyncio.wait({first})
        house.redis.gate.set()
        house.s3.gate.set()
        house.restart()
        with pytest.raises(RequestIdSpentError):
            await house.get(**terms)
        assert house.upstream.calls == 1

    async def test_nothing_is_remade_that_nobody_would_be_served(self, house: House) -> None:
        house.namespace = replace(house.namespace, remake_degraded=True)
        house.restart(budget=[Budget(BudgetScope.GLOBAL, "", BudgetPeriod.DAY, 100_000)])
        wanted, identity = house.identity(quality="high", size="1024x1024")
        answer = await house.cache.get(
            wanted, identity, namespace=house.namespace, caller=EVERYTHING, terms=Terms(allow_degraded=True)
        )
        assert not isinstance(answer, Pending)
        assert answer[0].degraded
        assert len(house.cache.remakes) == 0


class TestShare:
    def test_the_share_is_what_was_set_and_a_key_stays_served_as_it_grows(self) -> None:
        keys = [CacheKey("default", bytes([n % 256, n // 256, *[7] * 14]), bytes(32), 0) for n in range(65_536)]
        before: set[CacheKey] = set()
        for percent in (0, 5, 25, 50, 100):
            namespace = Namespace("default", "default", serve_percent=percent)
            served = {key for key in keys if namespace.serves(key)}
            assert abs(len(served) / len(keys) * 100 - percent) < 1
            assert before <= served
            before = served

    def test_all_variants_of_a_request_are_on_one_side(self, house: House) -> None:
        namespace = Namespace("default", "default", serve_percent=50)
        for n in range(20):
            key = house.identity(f"fox number {n}")[1].key
            assert len({namespace.serves(key.with_variant(variant)) for variant in range(4)}) == 1

    async def test_keys_of_the_share_are_served_and_the_others_observed(self, house: House) -> None:
        house.namespace = replace(house.namespace, serve_percent=50)
        prompts = [f"fox number {n}" for n in range(20)]
        for prompt in prompts:
            await house.get(prompt)
        again = [await house.get(prompt) for prompt in prompts]
        served = [each for each in again if each.tier is TierName.MEMORY]
        observed = [each for each in again if each.would_hit is TierName.MEMORY]
        assert len(served) + len(observed) == 20
        assert 0 < len(served) < 20
        assert house.upstream.calls == 20 + len(observed)


class TestAnswers:
    async def test_the_answer_says_generated_and_paid_and_the_books_say_observed(self, house: House) -> None:
        async with open_front(house) as front:
            await front.stub.GetImage(request())
            call = front.stub.GetImage(request())
            observed = await call
            status = observed.image_status[0]
            assert (status.tier, status.matched) == (pb.TIER_UPSTREAM, MatchLevel.EXACT.value)
            assert (status.cost_microusd, status.saved_microusd, status.collapsed) == (PRICE, 0, False)
            assert dict(await call.trailing_metadata())["cache-status"].startswith("cacheserver; fwd=bypass;")
            stats = await front.stub.GetStats(pb.GetStatsRequest())
        rows = {(row.outcome, row.tier): row for row in stats.rows}
        would_be = rows[pb.OUTCOME_OBSERVED, pb.TIER_MEMORY]
        assert (would_be.requests, would_be.saved_microusd, would_be.would_cost_microusd) == (1, 0, PRICE)
        assert rows[pb.OUTCOME_MISS, pb.TIER_UPSTREAM].requests == 1
        assert (stats.total.requests, stats.total.saved_microusd) == (2, 0)


async def test_over_real_tiers_each_would_be_hit_is_counted_at_its_tier_and_every_call_is_in_the_ledger(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer, s3_server: S3Server
) -> None:
    env = environment(tmp_path, provider=provider, redis=valkey_server, s3=s3_server)
    config = '[namespaces.default]\nmode = "observe"\n'
    outcomes: Counter[tuple[int, int]] = Counter()
    for _ in range(2):
        async with running(env, config) as service, calling(service) as stub:
            for _ in range(3):
                assert (await stub.GetImage(ask())).status.tier == pb.TIER_UPSTREAM
            stats = await stub.GetStats(pb.GetStatsRequest())
            outcomes += Counter({(row.outcome, row.tier): row.requests for row in stats.rows})
            assert stats.total.spent_microusd > 0
    assert outcomes == {
        (pb.OUTCOME_MISS, pb.TIER_UPSTREAM): 1,
        (pb.OUTCOME_OBSERVED, pb.TIER_MEMORY): 2,
        (pb.OUTCOME_OBSERVED, pb.TIER_REDIS): 3,
    }
    assert provider.calls == 6
