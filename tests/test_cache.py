"""The path of a request, told in sentences."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cacheserver.errors import (
    CacheUnknownError,
    CannotAffordError,
    InvalidRequestError,
    KeyGoneError,
    NotCachedError,
    PermissionDeniedError,
    PromptRefusedError,
    QueueFullError,
    RequestIdRunningError,
    RequestIdSpentError,
    ShuttingDownError,
    TierUnreachableError,
    UpstreamDownError,
    VariantsExhaustedError,
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
    Outcome,
    Pending,
    Permission,
    Replay,
    Served,
    Terms,
    TierName,
    VariantPolicy,
)
from cacheserver.paying import UnknownPolicy
from cacheserver.tiers.memory import entry_bytes
from tests.house import EVERYTHING, House

READER = Caller("reader", frozenset({Permission.READ}))
ANN, BOB = (Caller(name, frozenset(Permission)) for name in ("ann", "bob"))


class TestTiers:
    async def test_a_miss_is_generated_and_a_repeat_comes_from_memory(self, house: House) -> None:
        first = await house.get()
        again = await house.get()
        assert (first.tier, again.tier) == (TierName.UPSTREAM, TierName.MEMORY)
        assert again.entry.image.data == first.entry.image.data
        assert house.upstream.calls == 1
        assert (first.cost_microusd, first.saved_microusd) == (53_000, 0)
        assert (again.cost_microusd, again.saved_microusd) == (0, 53_000)

    async def test_after_a_restart_it_comes_from_redis_and_after_a_flush_from_s3(self, house: House) -> None:
        first = await house.get()
        await house.settle()
        house.restart()
        from_redis = await house.get()
        house.restart()
        await house.redis.delete(first.entry.key)
        from_s3 = await house.get()
        assert (from_redis.tier, from_s3.tier) == (TierName.REDIS, TierName.S3)
        assert from_redis.entry.image.data == from_s3.entry.image.data == first.entry.image.data
        assert house.upstream.calls == 1

    async def test_a_hit_below_is_promoted_into_every_tier_that_missed_it(self, house: House) -> None:
        first = await house.get()
        await house.settle()
        house.restart()
        await house.redis.delete(first.entry.key)
        await house.get()
        await house.settle()
        assert await house.redis.get(first.entry.key) == first.entry
        assert (await house.get()).tier is TierName.MEMORY

    async def test_a_silent_redis_is_a_slower_answer_and_nothing_else(self, house: House) -> None:
        await house.get()
        await house.settle()
        house.restart()
        house.redis.is_down = True
        assert (await house.get()).tier is TierName.S3
        assert (await house.get("another prompt")).tier is TierName.UPSTREAM

    async def test_an_expired_picture_is_a_miss_and_its_successor_takes_its_place(self, house: House) -> None:
        old = await house.get(ttl_s=60)
        house.clock.advance(61)
        new = await house.get()
        assert new.tier is TierName.UPSTREAM
        assert new.entry.key == old.entry.key
        await house.settle()
        house.restart()
        assert (await house.get()).entry.image.data == new.entry.image.data

    async def test_the_namespaces_maximum_wins_over_the_callers_ttl(self, house: House) -> None:
        house.namespace = replace(house.namespace, max_ttl_s=10)
        served = await house.get(ttl_s=60)
        assert served.entry.expire_time_s == house.clock.now_s() + 10

    async def test_an_entry_older_than_max_age_is_a_miss_for_this_caller_and_is_replaced(self, house: House) -> None:
        old = await house.get()
        house.clock.advance(100)
        assert (await house.get(max_age_s=200)).entry == old.entry
        new = await house.get(max_age_s=50)
        assert new.tier is TierName.UPSTREAM
        assert new.entry.key == old.entry.key
        assert (await house.get()).entry == new.entry

    async def test_an_image_too_large_for_memory_is_paid_for_once(self, house: House) -> None:
        house.restart(memory_bytes=0)
        await house.get()
        assert (await house.get()).tier in {TierName.REDIS, TierName.S3}
        assert house.upstream.calls == 1

    async def test_the_match_says_whether_the_very_same_prompt_made_the_picture(self, house: House) -> None:
        assert (await house.get("A red  fox.")).matched is MatchLevel.EXACT
        assert (await house.get("a red fox")).matched is MatchLevel.STANDARD
        assert house.upstream.calls == 1

    async def test_another_identity_under_the_same_name_reads_as_a_miss_in_every_place(self, house: House) -> None:
        foreign = (await house.get("a blue fox")).entry
        _, identity = house.identity("a red fox")
        slot = identity.key
        house.memory.put(slot, foreign)
        await house.redis.put(slot, foreign, replace=True)
        await house.s3.put(slot, foreign, replace=True)
        served = await house.get("a red fox")
        assert served.tier is TierName.UPSTREAM
        assert served.entry.image.data != foreign.image.data


async def one_behind_another(house: House, **terms: object) -> tuple[asyncio.Task[Served], asyncio.Task[Served]]:
    """A call for "first" that the upstream holds back, and one for "second" that waits in the queue behind it."""
    house.restart(max_concurrent=1)
    house.upstream.hold()
    running = asyncio.create_task(house.get("first"))
    await house.upstream.arrived(1)
    waiting = asyncio.create_task(house.get("second", **terms))
    await until(lambda: sum(house.generator.queue_depth.values()) == 1)
    return running, waiting


class TestFlights:
    async def test_everyone_who_asks_joins_one_load_and_one_of_them_pays(self, house: House) -> None:
        house.upstream.hold()
        asks = [asyncio.create_task(house.get()) for _ in range(50)]
        await house.upstream.arrived(1)
        house.upstream.release()
        served = await asyncio.gather(*asks)
        assert house.upstream.calls == 1
        assert len({one.entry.image.data for one in served}) == 1
        assert sum(one.cost_microusd for one in served) == 53_000
        assert sum(one.collapsed for one in served) == 49

    async def test_callers_that_hang_up_do_not_cancel_a_paid_call(self, house: House) -> None:
        house.upstream.hold()
        asks = [asyncio.create_task(house.get()) for _ in range(10)]
        await house.upstream.arrived(1)
        for ask in asks:
            ask.cancel()
        await asyncio.wait(asks)
        house.upstream.release()
        assert (await house.get()).entry is not None
        assert house.upstream.calls == 1
        assert house.books.snapshot(None).total.spent_microusd == 53_000

    async def test_a_queued_load_whose_callers_have_all_gone_is_dropped(self, house: House) -> None:
        house.restart(max_concurrent=1)
        house.upstream.hold()
        running = asyncio.create_task(house.get("first"))
        await house.upstream.arrived(1)
        queued = asyncio.create_task(house.get("second"))
        await until(lambda: sum(house.generator.queue_depth.values()) == 1)
        queued.cancel()
        await asyncio.wait({queued})
        house.upstream.release()
        await running
        assert house.upstream.calls == 1

    async def test_a_caller_who_comes_while_a_dropped_load_is_ending_gets_its_picture(self, house: House) -> None:
        house.s3.gate.clear()
        leaving = asyncio.create_task(house.get())
        await until(lambda: len(house.s3.gets) == 1)
        leaving.cancel()
        coming = asyncio.create_task(house.get())
        await asyncio.wait({leaving})
        house.s3.gate.set()
        assert (await coming).tier is TierName.UPSTREAM
        assert house.upstream.calls == 1

    async def test_a_caller_answered_pending_still_counts(self, house: House) -> None:
        house.restart(max_concurrent=1)
        house.upstream.hold()
        running = asyncio.create_task(house.get("first"))
        await house.upstream.arrived(1)
        pending = await house.ask("second", max_wait_s=0)
        assert isinstance(pending, Pending)
        joined = asyncio.create_task(house.get("second"))
        await until(lambda: sum(house.generator.queue_depth.values()) == 1)
        joined.cancel()
        await asyncio.wait({joined})
        house.upstream.release()
        await running
        served = await by_key(house, pending.keys[0])
        assert isinstance(served, Served)
        assert house.upstream.calls == 2

    async def test_max_wait_zero_starts_the_load_and_the_key_collects_it(self, house: House) -> None:
        house.upstream.hold()
        pending = await house.ask(max_wait_s=0)
        assert isinstance(pending, Pending)
        assert pending.estimated_wait_s > 0
        collecting = asyncio.create_task(by_key(house, pending.keys[0]))
        await house.upstream.arrived(1)
        found, _ = await house.cache.find(pending.keys)
        assert found[0].in_flight
        house.upstream.release()
        collected = await collecting
        assert isinstance(collected, Served)
        assert collected.entry == (await house.get()).entry
        assert house.upstream.calls == 1

    async def test_max_wait_ends_the_wait_and_not_the_load(self, house: House) -> None:
        house.upstream.hold()
        asking = asyncio.create_task(house.ask(max_wait_s=5))
        await house.upstream.arrived(1)
        house.clock.advance(5)
        assert isinstance(await asking, Pending)
        house.upstream.release()
        assert (await house.get()).entry is not None
        assert house.upstream.calls == 1

    async def test_an_upstream_failure_is_shared_by_its_waiters_and_forgotten(self, house: House) -> None:
        house.upstream.hold()
        house.upstream.fail_next(UpstreamDownError("down"))
        asks = [asyncio.create_task(house.get()) for _ in range(5)]
        await house.upstream.arrived(1)
        house.upstream.release()
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        assert all(isinstance(outcome, UpstreamDownError) for outcome in outcomes)
        assert (await house.get()).tier is TierName.UPSTREAM
        assert house.upstream.calls == 2

    async def test_who_needs_more_than_a_running_load_makes_starts_the_next(self, house: House) -> None:
        house.upstream.hold()
        one = asyncio.create_task(house.ask(n=1))
        await house.upstream.arrived(1)
        four = asyncio.create_task(house.ask(n=4))
        await until(lambda: house.cache.in_flight == 2)
        house.upstream.release()
        first, rest = await one, await four
        assert isinstance(first, list)
        assert isinstance(rest, list)
        assert rest[0].entry == first[0].entry
        assert [len(variants) for _, variants in house.upstream.asked] == [1, 3]

    async def test_who_joins_before_the_load_is_sealed_gets_more_from_the_same_call(self, house: House) -> None:
        house.s3.gate.clear()
        one = asyncio.create_task(house.ask(n=1))
        await until(lambda: len(house.s3.gets) == 1)
        four = asyncio.create_task(house.ask(n=4))
        await asyncio.sleep(0)
        house.s3.gate.set()
        await asyncio.gather(one, four)
        assert [len(variants) for _, variants in house.upstream.asked] == [4]

    async def test_a_refusal_concerns_only_the_caller_it_was_meant_for(self, house: House) -> None:
        house.s3.gate.clear()
        refused = asyncio.create_task(house.ask(caller=READER))
        cached_only = asyncio.create_task(house.ask(cache_policy=CachePolicy.ONLY_IF_CACHED))
        await until(lambda: len(house.s3.gets) == 1)
        paying = asyncio.create_task(house.get())
        await asyncio.sleep(0)
        house.s3.gate.set()
        with pytest.raises(PermissionDeniedError):
            await refused
        with pytest.raises(NotCachedError):
            await cached_only
        served = await paying
        assert (served.tier, served.cost_microusd, served.collapsed) == (TierName.UPSTREAM, 53_000, False)

    async def test_who_may_not_pay_is_refused_also_when_the_load_has_begun(self, house: House) -> None:
        house.upstream.hold()
        paying = asyncio.create_task(house.get())
        await house.upstream.arrived(1)
        with pytest.raises(PermissionDeniedError):
            await house.ask(caller=READER)
        with pytest.raises(NotCachedError):
            await house.ask(cache_policy=CachePolicy.ONLY_IF_CACHED)
        house.upstream.release()
        assert (await paying).tier is TierName.UPSTREAM

    async def test_when_the_leader_hangs_up_before_money_is_spent_the_next_one_pays(self, house: House) -> None:
        running, leader = await one_behind_another(house)
        others = [asyncio.create_task(house.get("second")) for _ in range(2)]
        await asyncio.sleep(0)
        leader.cancel()
        await asyncio.wait({leader})
        house.upstream.release()
        await running
        served = await asyncio.gather(*others)
        assert [(one.cost_microusd, one.collapsed) for one in served] == [(53_000, False), (0, True)]

    async def test_nobody_is_told_the_cost_of_what_anothers_budget_has_paid_for(self, house: House) -> None:
        running, leader = await one_behind_another(house, caller=ANN)
        guest = asyncio.create_task(house.get("second", caller=BOB))
        others = [asyncio.create_task(house.get("second", caller=ANN, candidates=n)) for n in (2, 1)]
        await asyncio.sleep(0)
        leader.cancel()
        await asyncio.wait({leader})
        house.upstream.release()
        await running
        assert [one.cost_microusd for one in await asyncio.gather(guest, *others)] == [0, 53_000, 0]
        assert [attempt.caller for attempt in house.ledger.opened] == [EVERYTHING.name, ANN.name]

    async def test_what_was_paid_for_somebody_who_has_hung_up_costs_another_caller_nothing(self, house: House) -> None:
        running, leader = await one_behind_another(house, caller=ANN)
        guest = asyncio.create_task(house.get("second", caller=BOB))
        await asyncio.sleep(0)
        leader.cancel()
        await asyncio.wait({leader})
        house.upstream.release()
        await running
        served = await guest
        assert (served.cost_microusd, served.saved_microusd, served.collapsed) == (0, 53_000, True)

    async def test_each_picture_is_paid_for_by_the_first_who_asked_for_it(self, house: House) -> None:
        house.s3.gate.clear()
        one = asyncio.create_task(house.ask(n=1))
        await until(lambda: len(house.s3.gets) == 1)
        three = asyncio.create_task(house.ask(n=3))
        await asyncio.sleep(0)
        house.s3.gate.set()
        first, rest = await one, await three
        assert isinstance(first, list)
        assert isinstance(rest, list)
        assert [served.cost_microusd for served in (*first, *rest)] == [53_000, 0, 53_000, 53_000]

    async def test_nothing_is_made_when_only_calls_by_key_still_wait(self, house: House) -> None:
        house.restart(max_concurrent=1)
        house.upstream.hold()
        running = asyncio.create_task(house.get("first"))
        await house.upstream.arrived(1)
        paying = asyncio.create_task(house.get("second"))
        await until(lambda: sum(house.generator.queue_depth.values()) == 1)
        _, identity = house.identity("second")
        collecting = asyncio.create_task(by_key(house, identity.key))
        await asyncio.sleep(0)
        paying.cancel()
        with pytest.raises(KeyGoneError):
            await collecting
        house.upstream.release()
        await running
        assert house.upstream.calls == 1

    async def test_a_full_queue_is_an_error_and_spends_nothing(self, house: House) -> None:
        house.restart(max_concurrent=1, queue_max=1)
        house.upstream.hold()
        running = asyncio.create_task(house.get("first"))
        await house.upstream.arrived(1)
        waiting = asyncio.create_task(house.get("second"))
        await until(lambda: sum(house.generator.queue_depth.values()) == 1)
        with pytest.raises(QueueFullError):
            await house.get("third")
        house.upstream.release()
        await asyncio.gather(running, waiting)
        assert house.upstream.calls == 2

    async def test_a_closed_cache_starts_nothing_new_and_finishes_what_runs(self, house: House) -> None:
        house.upstream.hold()
        running = asyncio.create_task(house.get("first"))
        await house.upstream.arrived(1)
        closing = asyncio.create_task(house.cache.aclose(10))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDownError):
            await house.get("second")
        house.upstream.release()
        await closing
        assert (await running).tier is TierName.UPSTREAM

    async def test_a_bug_in_a_load_reaches_its_waiters_and_not_the_next_ones(self, house: House) -> None:
        async def fails() -> None:
            raise ZeroDivisionError

        house.upstream.during = fails
        with pytest.raises(ZeroDivisionError):
            await house.get()
        house.upstream.during = None
        assert (await house.get()).tier is TierName.UPSTREAM

    async def test_fewer_pictures_than_asked_are_kept_and_the_rest_is_asked_for(self, house: House) -> None:
        generate = house.upstream.generate

        async def stingy(request: object, variants: object, **terms: object) -> object:
            return await generate(request, list(variants)[:2], **terms)  # type: ignore[arg-type, call-overload] # a double

        house.upstream.generate = stingy  # type: ignore[method-assign, assignment] # a double
        answer = await house.ask(n=3)
        assert isinstance(answer, list)
        assert len({one.entry.image.data for one in answer}) == 3
        assert house.upstream.images == 3


class TestVariants:
    async def test_n_4_after_n_2_makes_two_more(self, house: House) -> None:
        two = await house.ask(n=2)
        four = await house.ask(n=4)
        assert isinstance(two, list)
        assert isinstance(four, list)
        assert [one.entry for one in four[:2]] == [one.entry for one in two]
        assert house.upstream.images == 4
        assert house.upstream.calls == 2

    async def test_next_five_times_is_five_pictures_and_each_sent_twice_more_is_still_five(self, house: House) -> None:
        ids = [f"call-{i}" for i in range(5)]
        seen = [await house.get(variant_policy=VariantPolicy.NEXT, request_id=one) for one in ids]
        assert len({one.entry.image.data for one in seen}) == 5
        assert house.upstream.calls == 5
        for _ in range(2):
            again = [await house.get(variant_policy=VariantPolicy.NEXT, request_id=one) for one in ids]
            assert [one.entry for one in again] == [one.entry for one in seen]
        assert house.upstream.calls == 5

    async def test_next_serves_what_is_stored_before_it_pays(self, house: House) -> None:
        stored = await house.ask(n=3)
        assert isinstance(stored, list)
        excluded = frozenset({stored[0].entry.key.name})
        served = await house.get(variant_policy=VariantPolicy.NEXT, exclude_keys=excluded)
        assert served.entry == stored[1].entry
        assert house.upstream.calls == 1

    async def test_next_at_max_variants_gives_what_was_given_longest_ago(self, house: House) -> None:
        house.namespace = replace(house.namespace, max_variants=3)
        seen = [await house.get(variant_policy=VariantPolicy.NEXT) for _ in range(5)]
        assert [one.entry.key.variant for one in seen] == [0, 1, 2, 0, 1]
        assert house.upstream.calls == 3

    async def test_next_makes_another_one_though_what_it_excludes_is_gone(self, house: House) -> None:
        house.namespace = replace(house.namespace, max_variants=2)
        two = await house.ask(n=2)
        assert isinstance(two, list)
        excluded = frozenset(one.entry.key.name for one in two)
        await house.cache.purge(house.namespace, dry_run=False)
        served = await house.get(variant_policy=VariantPolicy.NEXT, exclude_keys=excluded)
        assert served.tier is TierName.UPSTREAM

    async def test_next_is_another_one_also_while_the_last_tier_is_silent(self, house: House) -> None:
        house.s3.is_down = True
        seen = [await house.get(variant_policy=VariantPolicy.NEXT) for _ in range(3)]
        assert len({one.entry.image.data for one in seen}) == 3

    async def test_two_next_calls_of_one_caller_at_once_are_two_pictures(self, house: House) -> None:
        house.upstream.hold()
        asks = [asyncio.create_task(house.get(variant_policy=VariantPolicy.NEXT)) for _ in range(2)]
        await house.upstream.arrived(1)
        house.upstream.release()
        served = await asyncio.gather(*asks)
        assert len({one.entry.image.data for one in served}) == 2

    async def test_a_resent_next_joins_the_running_one(self, house: House) -> None:
        house.upstream.hold()
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one"}
        first = asyncio.create_task(house.get(**terms))
        await house.upstream.arrived(1)
        first.cancel()
        await asyncio.wait({first})
        again = asyncio.create_task(house.get(**terms))
        await until(lambda: house.cache.in_flight == 1)
        house.upstream.release()
        served = await again
        assert (await house.get(**terms)).entry == served.entry
        assert house.upstream.calls == 1

    async def test_a_next_nobody_waited_for_is_remembered(self, house: House) -> None:
        house.upstream.hold()
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one"}
        first = asyncio.create_task(house.get(**terms))
        await house.upstream.arrived(1)
        first.cancel()
        await asyncio.wait({first})
        house.upstream.release()
        await until(lambda: house.cache.in_flight == 0)
        house.restart()
        await house.get(**terms)
        assert house.upstream.calls == 1

    async def test_a_call_hung_up_before_money_was_spent_may_be_sent_again(self, house: House) -> None:
        first = await house.get()
        house.upstream.hold()
        plain = asyncio.create_task(house.ask(n=2))
        await house.upstream.arrived(2)
        excluded = frozenset({first.entry.key.name, first.entry.key.with_variant(1).name})
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one", "exclude_keys": excluded}
        hung_up = asyncio.create_task(house.get(**terms))
        await until(lambda: house.cache.in_flight == 2)
        hung_up.cancel()
        await asyncio.wait({hung_up})
        again = asyncio.create_task(house.get(**terms))
        await until(lambda: house.cache.in_flight == 2)
        house.upstream.release()
        await plain
        served = await again
        assert served.entry.key.variant == 2
        assert (await house.get(**terms)).entry == served.entry
        assert house.upstream.images == 3

    async def test_a_call_hung_up_while_others_go_on_may_be_sent_again(self, house: House) -> None:
        await house.get()
        house.s3.gate.clear()
        plain = asyncio.create_task(house.ask(n=2))
        await until(lambda: len(house.s3.gets) == 2)
        terms = {"cache_policy": CachePolicy.REFRESH, "request_id": "one"}
        hung_up = asyncio.create_task(house.get(**terms))
        await asyncio.sleep(0)
        hung_up.cancel()
        await asyncio.wait({hung_up})
        house.upstream.hold()
        house.s3.gate.set()
        await house.upstream.arrived(2)
        again = asyncio.create_task(house.get(**terms))
        await until(lambda: house.cache.in_flight == 2)
        house.upstream.release()
        await plain
        assert (await again).cost_microusd == 53_000
        assert house.upstream.images == 3
        assert not house.cache._resent._promises

    async def test_what_was_given_is_remembered_though_closing_may_take_no_time(self, house: House) -> None:
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one"}
        remember = house.replays.remember

        async def slowly(replay_id: str, replay: Replay) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await remember(replay_id, replay)

        house.replays.remember = slowly  # type: ignore[method-assign] # as over a network
        await house.get(**terms)
        await house.cache.aclose(0)
        await house.keeper.aclose(5)
        house.restart()
        await house.get(**terms)
        assert house.upstream.calls == 1

    async def test_a_failed_next_may_be_sent_again_under_its_id(self, house: House) -> None:
        house.upstream.fail_next(UpstreamDownError("down"))
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one"}
        with pytest.raises(UpstreamDownError):
            await house.get(**terms)
        assert (await house.get(**terms)).entry.key.variant == 0

    async def test_an_id_is_spent_when_used_for_another_request(self, house: House) -> None:
        await house.get("a red fox", variant_policy=VariantPolicy.NEXT, request_id="one")
        with pytest.raises(RequestIdSpentError):
            await house.get("a blue fox", variant_policy=VariantPolicy.NEXT, request_id="one")

    async def test_one_callers_ids_mean_nothing_for_another(self, house: House) -> None:
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one"}
        await house.ask("a red fox", **terms)
        other = replace(EVERYTHING, name="other")
        assert isinstance(await house.ask("a blue fox", caller=other, **terms), list)

    async def test_a_replay_whose_picture_is_gone_says_so_and_does_not_pay(self, house: House) -> None:
        terms = {"variant_policy": VariantPolicy.NEXT, "request_id": "one"}
        served = await house.get(**terms)
        await house.cache.purge(house.namespace, key=served.entry.key, dry_run=False)
        with pytest.raises(KeyGoneError):
            await house.get(**terms)
        assert house.upstream.calls == 1

    async def test_sticky_gives_one_caller_the_same_picture_and_random_any(self, house: House) -> None:
        stored = await house.ask(n=5)
        assert isinstance(stored, list)
        sticky = [await house.get(variant_policy=VariantPolicy.STICKY) for _ in range(3)]
        assert len({one.entry.key for one in sticky}) == 1
        by_caller = set()
        for i in range(20):
            answer = await house.ask(caller=replace(EVERYTHING, name=f"c{i}"), variant_policy=VariantPolicy.STICKY)
            assert isinstance(answer, list)
            by_caller.add(answer[0].entry.key.variant)
        assert len(by_caller) > 1
        random = {(await house.get(variant_policy=VariantPolicy.RANDOM)).entry.key.variant for _ in range(40)}
        assert random == {0, 1, 2, 3, 4}
        assert house.upstream.calls == 1

    async def test_more_pictures_than_the_namespace_allows_is_a_violation(self, house: House) -> None:
        house.namespace = replace(house.namespace, max_variants=2)
        with pytest.raises(InvalidRequestError) as caught:
            await house.ask(n=3)
        assert list(caught.value.violations) == ["n"]


class TestRefreshAndNoStore:
    async def test_refresh_generates_and_replaces_everywhere(self, house: House) -> None:
        old = await house.get()
        await house.settle()
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        await house.settle()
        assert new.entry.key == old.entry.key
        assert new.entry.image.data != old.entry.image.data
        assert (await house.get()).entry == new.entry
        for tier in (house.redis, house.s3):
            assert await tier.get(new.entry.key) == new.entry

    async def test_a_refresh_joins_only_one_begun_after_it_came(self, house: House) -> None:
        house.upstream.hold()
        first = asyncio.create_task(house.get(cache_policy=CachePolicy.REFRESH))
        await house.upstream.arrived(1)
        second = asyncio.create_task(house.get(cache_policy=CachePolicy.REFRESH))
        third = asyncio.create_task(house.get(cache_policy=CachePolicy.REFRESH))
        await until(lambda: house.cache.in_flight == 2)
        house.upstream.release()
        served = await asyncio.gather(first, second, third)
        assert house.upstream.calls == 2
        assert served[1].entry == served[2].entry != served[0].entry

    async def test_a_resent_refresh_joins_and_replays(self, house: House) -> None:
        await house.get()
        house.upstream.hold()
        terms = {"cache_policy": CachePolicy.REFRESH, "request_id": "one"}
        first = asyncio.create_task(house.get(**terms))
        await house.upstream.arrived(2)
        again = asyncio.create_task(house.get(**terms))
        await asyncio.sleep(0)
        house.upstream.release()
        assert (await first).entry == (await again).entry
        assert (await house.get(**terms)).entry == (await first).entry
        assert house.upstream.calls == 2

    async def test_no_store_reads_joins_and_writes_nothing(self, house: House) -> None:
        stored = await house.get()
        fresh = await house.get(cache_policy=CachePolicy.NO_STORE)
        assert fresh.entry.image.data != stored.entry.image.data
        assert (await house.get()).entry == stored.entry
        assert house.upstream.calls == 2

    async def test_a_resent_no_store_is_running_then_spent(self, house: House) -> None:
        house.upstream.hold()
        terms = {"cache_policy": CachePolicy.NO_STORE, "request_id": "one"}
        first = asyncio.create_task(house.get(**terms))
        await house.upstream.arrived(1)
        with pytest.raises(RequestIdRunningError):
            await house.get(**terms)
        house.upstream.release()
        await first
        with pytest.raises(RequestIdSpentError):
            await house.get(**terms)
        assert house.upstream.calls == 1

    async def test_a_no_store_hung_up_while_it_waits_its_turn_is_not_paid_for(self, house: House) -> None:
        house.restart(max_concurrent=1)
        house.upstream.hold()
        running = asyncio.create_task(house.get("first"))
        await house.upstream.arrived(1)
        terms = {"cache_policy": CachePolicy.NO_STORE, "request_id": "one"}
        hung_up = asyncio.create_task(house.get(**terms))
        await until(lambda: sum(house.generator.queue_depth.values()) == 1)
        hung_up.cancel()
        await asyncio.wait({hung_up})
        await until(lambda: not house.cache._alone.running)
        again = asyncio.create_task(house.get(**terms))
        house.upstream.release()
        await running
        assert (await again).tier is TierName.UPSTREAM
        assert house.upstream.calls == 2

    async def test_a_no_store_hung_up_after_money_was_spent_is_spent(self, house: House) -> None:
        house.upstream.hold()
        terms = {"cache_policy": CachePolicy.NO_STORE, "request_id": "one"}
        hung_up = asyncio.create_task(house.get(**terms))
        await house.upstream.arrived(1)
        hung_up.cancel()
        await asyncio.wait({hung_up})
        with pytest.raises(RequestIdRunningError):
            await house.get(**terms)
        house.upstream.release()
        await until(lambda: not house.cache._alone.running)
        with pytest.raises(RequestIdSpentError):
            await house.get(**terms)
        assert house.upstream.calls == 1

    async def test_no_store_needs_the_right_to_generate(self, house: House) -> None:
        with pytest.raises(PermissionDeniedError):
            await house.ask(caller=READER, cache_policy=CachePolicy.NO_STORE)


class TestKeys:
    async def test_a_key_never_pays_and_says_when_it_is_gone(self, house: House) -> None:
        _, identity = house.identity()
        with pytest.raises(KeyGoneError):
            await by_key(house, CacheKey.parse(identity.key.name))
        assert house.upstream.calls == 0

    async def test_a_key_whose_last_tier_is_silent_is_unknown_and_not_gone(self, house: House) -> None:
        _, identity = house.identity()
        house.s3.is_down = True
        with pytest.raises(CacheUnknownError):
            await by_key(house, CacheKey.parse(identity.key.name))

    async def test_a_public_key_finds_the_picture_in_every_tier(self, house: House) -> None:
        served = await house.get()
        await house.settle()
        key = CacheKey.parse(served.entry.key.name)
        for _ in range(2):
            found = await by_key(house, key)
            assert isinstance(found, Served)
            assert found.entry == served.entry
            house.restart()


class TestUnknownIsNotAbsent:
    async def test_a_silent_last_tier_is_paid_for_once_and_counted(self, house: House) -> None:
        house.s3.is_down = True
        paid = await house.get()
        house.memory.delete(paid.entry.key.stand_in)
        again = await house.get()
        assert again.entry.image.data == paid.entry.image.data
        assert house.upstream.calls == 1
        assert house.books.snapshot(None).paid_unknown == 1

    async def test_what_the_silent_tier_had_is_served_again_and_the_stand_in_becomes_a_variant(
        self, house: House
    ) -> None:
        original = await house.get()
        await house.settle()
        house.restart()
        await house.redis.delete(original.entry.key)
        house.s3.is_down = True
        stand_in = await house.get()
        assert stand_in.entry.image.data != original.entry.image.data
        house.s3.is_down = False
        assert (await house.get()).entry.image.data == original.entry.image.data
        house.clock.advance(1)
        await until(lambda: house.books.snapshot(None).unsaved == 0 and not house.keeper._held)
        variant = await by_key(house, original.entry.key.with_variant(1))
        assert isinstance(variant, Served)
        assert variant.entry.image.data == stand_in.entry.image.data

    async def test_a_stand_in_takes_its_place_when_the_tier_had_nothing(self, house: House) -> None:
        house.s3.is_down = True
        stand_in = await house.get()
        house.s3.is_down = False
        house.restart()
        assert (await house.get()).entry.image.data == stand_in.entry.image.data
        assert await house.s3.get(stand_in.entry.key) == stand_in.entry
        assert house.upstream.calls == 1

    async def test_told_to_refuse_it_does_not_pay(self, house: House) -> None:
        house.restart(unknown=UnknownPolicy(pay=False))
        house.s3.is_down = True
        with pytest.raises(CacheUnknownError):
            await house.get()
        assert house.upstream.calls == 0

    async def test_the_hourly_budget_bounds_it_and_comes_back(self, house: House) -> None:
        request, _ = house.identity()
        each = house.generator.estimate_microusd(request, 1)
        house.restart(unknown=UnknownPolicy(budget_microusd_per_hour=2 * each))
        house.s3.is_down = True
        await house.get("one")
        await house.get("two")
        with pytest.raises(CacheUnknownError):
            await house.get("three")
        house.clock.advance(3601)
        assert (await house.get("three")).tier is TierName.UPSTREAM

    async def test_what_was_not_paid_after_all_takes_nothing_from_the_budget(self, house: House) -> None:
        request, _ = house.identity()
        each = house.generator.estimate_microusd(request, 1)
        house.restart(unknown=UnknownPolicy(budget_microusd_per_hour=each))
        house.s3.is_down = True
        for _ in range(2):
            house.upstream.fail_next(UpstreamDownError("down"))
            with pytest.raises(UpstreamDownError):
                await house.get()
        assert house.books.snapshot(None).paid_unknown == 0
        assert (await house.get()).tier is TierName.UPSTREAM
        assert house.books.snapshot(None).paid_unknown == 1

    @pytest.mark.parametrize("cost_microusd", [None, 53_000])
    async def test_a_failed_call_that_may_be_billed_takes_from_the_budget(
        self, house: House, cost_microusd: int | None
    ) -> None:
        request, _ = house.identity()
        each = house.generator.estimate_microusd(request, 1)
        house.restart(unknown=UnknownPolicy(budget_microusd_per_hour=each))
        house.s3.is_down = True
        house.upstream.fail_next(UpstreamDownError("down", cost_microusd=cost_microusd))
        with pytest.raises(UpstreamDownError):
            await house.get("one")
        with pytest.raises(CacheUnknownError):
            await house.get("two")
        assert house.upstream.calls == 1

    async def test_every_candidate_takes_from_the_budget(self, house: House) -> None:
        request, _ = house.identity()
        each = house.generator.estimate_microusd(request, 1)
        house.restart(unknown=UnknownPolicy(budget_microusd_per_hour=5 * each))
        house.s3.is_down = True
        await house.get("one", candidates=4)
        with pytest.raises(CacheUnknownError):
            await house.get("two", candidates=2)
        await house.get("three")
        assert house.upstream.images == 5
        assert house.books.snapshot(None).paid_unknown == 2

    async def test_of_callers_that_share_a_load_each_takes_its_own_number_of_candidates(self, house: House) -> None:
        request, _ = house.identity()
        each = house.generator.estimate_microusd(request, 1)
        house.restart(unknown=UnknownPolicy(budget_microusd_per_hour=4 * each))
        house.s3.is_down = True
        await asyncio.gather(house.ask(caller=ANN), house.ask(n=2, candidates=3))
        assert house.upstream.images == 4
        with pytest.raises(CacheUnknownError):
            await house.get("another prompt")

    async def test_what_waits_for_review_takes_from_the_budget_and_is_counted_once(self, house: House) -> None:
        house.namespace = replace(house.namespace, min_score=0.999)
        request, _ = house.identity()
        each = house.generator.estimate_microusd(request, 1)
        house.restart(unknown=UnknownPolicy(budget_microusd_per_hour=3 * each))
        house.s3.is_down = True
        waiting = await house.ask("one", candidates=2)
        assert isinstance(waiting, Pending)
        assert waiting.in_review
        with pytest.raises(CacheUnknownError):
            await house.ask("two", candidates=2)
        assert house.upstream.images == 2
        assert house.books.snapshot(None).paid_unknown == 1
        house.clock.advance(3601)
        assert isinstance(await house.ask("two", candidates=2), Pending)

    async def test_what_a_load_has_paid_for_stays_taken_when_it_is_judged_again(self, house: House) -> None:
        request, _ = house.identity()
        each = house.generator.estimate_microusd(request, 1)
        house.restart(
            unknown=UnknownPolicy(budget_microusd_per_hour=3 * each),
            budget=[Budget(BudgetScope.CALLER, BOB.name, BudgetPeriod.DAY, each)],
        )
        house.s3.is_down = True
        asks = [house.ask(caller=who, n=n) for who, n in ((ANN, 1), (BOB, 2), (BOB, 3))]
        *_, broke = await asyncio.gather(*asks, return_exceptions=True)
        assert isinstance(broke, CannotAffordError)
        assert house.upstream.images == 2
        await house.get("one")
        with pytest.raises(CacheUnknownError):
            await house.get("two")

    async def test_the_budget_counts_what_is_being_paid_for(self, house: House) -> None:
        request, _ = house.identity()
        each = house.generator.estimate_microusd(request, 1)
        house.restart(unknown=UnknownPolicy(budget_microusd_per_hour=each))
        house.s3.is_down = True
        house.upstream.hold()
        running = asyncio.create_task(house.get("one"))
        await house.upstream.arrived(1)
        with pytest.raises(CacheUnknownError):
            await house.get("two")
        house.upstream.release()
        await running

    async def test_a_silent_first_tier_is_not_unknown(self, house: House) -> None:
        house.redis.is_down = True
        await house.get()
        assert house.books.snapshot(None).paid_unknown == 0


class TestKeeping:
    async def test_an_image_no_tier_took_is_held_counted_and_written_when_they_are_back(self, house: House) -> None:
        house.redis.is_down = house.s3.is_down = True
        served = await house.get()
        assert house.books.snapshot(None).unsaved == 1
        house.memory.delete(served.entry.key.stand_in)
        assert (await house.get()).entry == served.entry
        house.redis.is_down = house.s3.is_down = False
        house.clock.advance(1)
        await until(lambda: house.books.snapshot(None).unsaved == 0)
        await house.settle()
        assert await house.s3.get(served.entry.key) == served.entry

    async def test_offers_go_on_until_the_tier_takes_it(self, house: House) -> None:
        house.s3.is_down = True
        served = await house.get()
        for wait_s in (1, 2, 4, 8):
            await until(lambda: house.clock.sleepers == 1)
            house.clock.advance(wait_s)
        await until(lambda: house.clock.sleepers == 1)
        house.s3.is_down = False
        house.clock.advance(16)
        await until(lambda: not house.keeper._held)
        assert await house.s3.get(served.entry.key) == served.entry

    async def test_shutdown_offers_what_is_held_once_more(self, house: House) -> None:
        house.s3.is_down = True
        served = await house.get()
        house.s3.is_down = False
        await house.keeper.aclose(5)
        assert await house.s3.get(served.entry.key) == served.entry

    async def test_a_number_taken_meanwhile_is_left_alone_and_the_next_is_used(self, house: House) -> None:
        _, identity = house.identity()
        theirs = (await house.get("a blue fox")).entry
        theirs = replace(theirs, key=identity.key)
        house.upstream.hold()
        asking = asyncio.create_task(house.get())
        await house.upstream.arrived(2)
        await house.s3.put(identity.key, theirs, replace=False)
        house.upstream.release()
        ours = await asking
        assert ours.entry.key.variant == 1
        assert await house.s3.get(identity.key) == theirs


class TestPut:
    async def test_a_put_image_answers_its_request(self, house: House) -> None:
        made = (await house.get("a blue fox")).entry.image
        entry, created = await put(house, made)
        served = await house.get()
        assert created
        assert served.entry == entry
        assert served.tier is TierName.MEMORY

    async def test_the_same_bytes_are_not_stored_twice_and_others_take_the_next_variant(self, house: House) -> None:
        blue, green = (await house.get("blue")).entry.image, (await house.get("green")).entry.image
        first, _ = await put(house, blue)
        same, created = await put(house, blue)
        second, _ = await put(house, green)
        replaced, _ = await put(house, green, replace=True)
        assert not created
        assert same == first
        assert (second.key.variant, replaced.key.variant) == (1, 0)

    async def test_putting_more_than_the_namespace_allows_is_refused(self, house: House) -> None:
        house.namespace = replace(house.namespace, max_variants=1)
        await put(house, (await house.get("blue")).entry.image)
        with pytest.raises(VariantsExhaustedError):
            await put(house, (await house.get("green")).entry.image)

    async def test_a_put_while_the_last_tier_is_silent_asks_to_come_again(self, house: House) -> None:
        image = (await house.get("blue")).entry.image
        house.s3.is_down = True
        with pytest.raises(CacheUnknownError):
            await put(house, image)


class TestPurge:
    async def test_a_purged_key_is_gone_from_every_tier(self, house: House) -> None:
        served = await house.get()
        await house.settle()
        result = await house.cache.purge(house.namespace, key=served.entry.key, dry_run=False)
        assert result.images == 1
        assert set(result.per_tier.values()) == {1}
        with pytest.raises(KeyGoneError):
            await by_key(house, served.entry.key)

    async def test_a_dry_run_only_counts(self, house: House) -> None:
        await house.ask(n=3)
        await house.settle()
        result = await house.cache.purge(house.namespace, dry_run=True)
        assert result.images == 3
        assert result.per_tier == {TierName.MEMORY: 3, TierName.REDIS: 3, TierName.S3: 3}
        assert (await house.get()).tier is TierName.MEMORY

    async def test_to_be_looked_through_by_a_purge_is_no_use(self, house: House) -> None:
        house.restart(memory_bytes=2 * entry_bytes((await house.get("a")).entry))
        for prompt in ("a", "b", "a"):
            await house.get(prompt)
        await house.settle()
        await house.cache.purge(house.namespace, dry_run=True)
        await house.get("c")
        assert [(await house.get(prompt)).tier for prompt in ("a", "b")] == [TierName.MEMORY, TierName.REDIS]

    async def test_purging_a_request_takes_all_its_variants_and_nothing_else(self, house: House) -> None:
        await house.ask(n=3)
        await house.get("a blue fox")
        await house.settle()
        _, identity = house.identity()
        assert (await house.cache.purge(house.namespace, identity=identity, dry_run=False)).images == 3
        assert (await house.get("a blue fox")).tier is TierName.MEMORY
        assert (await house.get()).tier is TierName.UPSTREAM

    async def test_purging_a_tag_takes_what_carries_it(self, house: House) -> None:
        await house.get("one", tags=("spring",))
        await house.get("two", tags=("summer",))
        await house.settle()
        assert (await house.cache.purge(house.namespace, tag="spring", dry_run=False)).images == 1
        assert (await house.get("two")).tier is TierName.MEMORY
        assert (await house.get("one")).tier is TierName.UPSTREAM

    async def test_a_namespace_purges_only_what_it_stored(self, house: House) -> None:
        ours = house.namespace
        await house.get("ours")
        house.namespace = Namespace("guest", ours.partition)
        await house.get("theirs")
        await house.settle()
        assert (await house.cache.purge(house.namespace, dry_run=False)).images == 1
        assert (await house.get("ours")).tier is TierName.MEMORY

    async def test_a_tier_that_cannot_be_reached_fails_the_purge_after_the_others_are_done(self, house: House) -> None:
        served = await house.get()
        await house.settle()
        house.s3.is_down = True
        with pytest.raises(TierUnreachableError) as caught:
            await house.cache.purge(house.namespace, dry_run=False)
        assert caught.value.tiers == (TierName.S3,)
        assert await house.redis.get(served.entry.key) is None

    async def test_what_was_read_before_a_purge_is_not_promoted_after_it(self, house: House) -> None:
        served = await house.get()
        await house.settle()
        await house.redis.delete(served.entry.key)
        house.restart()
        reading = house.s3.get

        async def purged_meanwhile(key: CacheKey) -> object:
            entry = await reading(key)
            await house.cache.purge(house.namespace, dry_run=False)
            return entry

        house.s3.get = purged_meanwhile  # type: ignore[method-assign, assignment] # the interleaving under test
        await house.get()
        await house.settle()
        house.s3.get = reading  # type: ignore[method-assign] # back to normal
        with pytest.raises(KeyGoneError):
            await by_key(house, served.entry.key)

    async def test_held_images_are_purged_too(self, house: House) -> None:
        house.redis.is_down = house.s3.is_down = True
        await house.get()
        house.redis.is_down = house.s3.is_down = False
        await house.cache.purge(house.namespace, dry_run=False)
        assert house.books.snapshot(None).unsaved == 0
        assert (await house.get()).tier is TierName.UPSTREAM


class TestFind:
    async def test_it_names_the_fastest_tier_that_has_each(self, house: House) -> None:
        in_s3, in_redis = await house.get("in s3"), await house.get("in redis")
        await house.settle()
        house.restart()
        await house.redis.delete(in_s3.entry.key)
        in_memory = await house.get("in memory")
        _, absent = house.identity("absent")
        keys = [in_s3.entry.key, in_redis.entry.key, in_memory.entry.key, absent.key]
        found, silent = await house.cache.find(keys)
        assert [one.tier for one in found] == [TierName.S3, TierName.REDIS, TierName.MEMORY, None]
        assert silent == []

    async def test_what_is_only_looked_for_is_not_in_flight(self, house: House) -> None:
        _, identity = house.identity()
        house.s3.gate.clear()
        looking = asyncio.create_task(by_key(house, identity.key))
        await until(lambda: len(house.s3.gets) == 1)
        finding = asyncio.create_task(house.cache.find([identity.key]))
        await asyncio.sleep(0)
        house.s3.gate.set()
        found, _ = await finding
        assert (found[0].tier, found[0].in_flight) == (None, False)
        with pytest.raises(KeyGoneError):
            await looking

    async def test_it_names_the_tiers_that_could_not_be_asked(self, house: House) -> None:
        house.s3.is_down = True
        _, identity = house.identity()
        found, silent = await house.cache.find([identity.key])
        assert (found[0].tier, silent) == (None, [TierName.S3])


async def test_a_refused_prompt_is_not_stored(house: House) -> None:
    house.upstream.fail_next(PromptRefusedError("refused"))
    with pytest.raises(PromptRefusedError):
        await house.get()
    _, identity = house.identity()
    found, _ = await house.cache.find([identity.key])
    assert found[0].tier is None


async def test_the_books_count_money_once_where_it_is_spent(house: House) -> None:
    await house.ask(n=2)
    await house.ask(n=2)
    rows = {(row.outcome, row.tier): row for row in house.books.snapshot(None).rows}
    assert rows[Outcome.MISS, TierName.UPSTREAM].spent_microusd == 106_000
    assert house.books.snapshot(frozenset({"other"})).rows == []


async def by_key(house: House, key: CacheKey) -> Served | Pending:
    return await house.cache.get_by_key(key, namespace=house.namespace, caller=EVERYTHING, terms=Terms())


async def put(house: House, image: object, *, replace: bool = False) -> tuple[object, bool]:
    _, identity = house.identity()
    return await house.cache.put(image, identity, namespace=house.namespace, replace=replace)  # type: ignore[arg-type] # test convenience


async def until(condition: object) -> None:
    """Let the event loop run until `condition` holds; real input and output may be needed for it."""
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110 - a callable; tests have no event for it
            await asyncio.sleep(0)
