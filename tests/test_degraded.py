"""Less than was asked for: only for who accepts it, under its own identity, labelled, and made good later."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any

import pytest

from cacheserver.errors import (
    CannotAffordError,
    KeyGoneError,
    PermissionDeniedError,
    RequestIdSpentError,
    UpstreamDownError,
)
from cacheserver.model import (
    Budget,
    BudgetPeriod,
    BudgetScope,
    CachePolicy,
    Caller,
    InputImage,
    InputRole,
    Pending,
    Permission,
    Priority,
    Served,
    Terms,
    TierName,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.remakes import is_between
from tests.house import EVERYTHING, House
from tests.provider import small_image
from tests.rpc_front import ask as request
from tests.rpc_front import open_front
from tests.waiting import until

HIGH_COSTS, MEDIUM_COSTS, LOW_COSTS = 211_000, 53_000, 6_000
TEXT_COSTS = 1_000
"""More than the text of a prompt can cost in these tests."""

ANN, BOB = (Caller(name, frozenset(Permission)) for name in ("ann", "bob"))


def day(limit: int, caller: str = "") -> Budget:
    scope = BudgetScope.CALLER if caller else BudgetScope.GLOBAL
    return Budget(scope, caller, BudgetPeriod.DAY, limit)


async def ask(
    house: House, quality: str = "high", *, caller: Caller = EVERYTHING, prompt: str = "a red fox", **terms: Any
) -> list[Served] | Pending:
    request, identity = house.identity(prompt, quality=quality, size="1024x1024")
    asked = Terms(**{"allow_degraded": True, **terms})
    return await house.cache.get(request, identity, namespace=house.namespace, caller=caller, terms=asked)


async def get(house: House, quality: str = "high", **terms: Any) -> Served:
    answer = await ask(house, quality, **terms)
    assert not isinstance(answer, Pending)
    return answer[0]


def made(house: House) -> list[str]:
    """The qualities that the upstream was asked for."""
    return [request.quality for request, _ in house.upstream.asked]


class TestOverBudget:
    async def test_who_accepts_less_gets_the_dearest_rung_the_budget_allows(self, house: House) -> None:
        house.restart(budget=[day(100_000)])
        served = await get(house)
        assert (served.degraded, served.entry.image.quality, made(house)) == (True, "medium", ["medium"])

    async def test_each_answer_with_less_is_counted_as_one_made_or_cached(self, house: House) -> None:
        house.restart(budget=[day(100_000)])
        wanted = {"quality": "high", "size": "1024x1024"}
        async with open_front(house) as front:
            for quality in ("high", "high", "medium"):
                await front.stub.GetImage(request(of=wanted | {"quality": quality}, allow_degraded=True))
            stats = await front.stub.GetStats(pb.GetStatsRequest())
        counts = {row.outcome: (row.requests, row.degraded) for row in stats.rows}
        assert counts == {pb.OUTCOME_MISS: (1, 1), pb.OUTCOME_HIT: (2, 1)}
        assert house.books.snapshot(None).total.degraded == 2

    async def test_who_does_not_accept_less_is_told_which_budget_and_until_when(self, house: House) -> None:
        house.restart(budget=[day(100_000)])
        with pytest.raises(CannotAffordError) as caught:
            await get(house, allow_degraded=False)
        assert caught.value.budget == "global/day"
        assert caught.value.reset_time_s > house.clock.now_s()
        assert made(house) == []

    async def test_the_degraded_picture_is_stored_as_what_it_is_and_never_as_what_was_asked(self, house: House) -> None:
        house.restart(budget=[day(100_000)])
        degraded = await get(house)
        as_medium = await get(house, "medium")
        assert (as_medium.tier, as_medium.degraded) == (TierName.MEMORY, False)
        assert as_medium.entry == degraded.entry
        request, identity = house.identity(quality="high", size="1024x1024")
        found, _ = await house.cache.find([identity.key])
        assert found[0].tier is None
        assert request.quality == "high"

    async def test_a_cached_rung_serves_though_nothing_can_be_afforded(self, house: House) -> None:
        low = await get(house, "low", allow_degraded=False)
        house.restart(budget=[day(1_000)])
        served = await get(house)
        assert served.degraded
        assert served.entry == low.entry
        assert served.tier is not TierName.UPSTREAM
        assert house.upstream.calls == 1

    async def test_when_no_rung_can_be_had_the_budget_is_named(self, house: House) -> None:
        house.restart(budget=[day(1_000)])
        with pytest.raises(CannotAffordError, match="global/day"):
            await get(house)

    async def test_near_the_limit_who_accepts_less_gets_less_and_who_does_not_gets_all(self, house: House) -> None:
        house.restart(budget=[day(HIGH_COSTS + TEXT_COSTS)])
        assert (await get(house)).entry.image.quality == "medium"
        assert not (await get(house, "medium", prompt="another", allow_degraded=False)).degraded

    async def test_a_waiter_with_money_pays_for_one_without(self, house: House) -> None:
        house.restart(budget=[day(1_000, "ann")])
        house.redis.gate.clear()
        poor = asyncio.create_task(get(house, caller=ANN, allow_degraded=False))
        await until(lambda: house.cache.in_flight == 1)
        rich = asyncio.create_task(get(house, caller=BOB))
        house.redis.gate.set()
        with pytest.raises(CannotAffordError):
            await poor
        served = await rich
        assert (served.degraded, served.entry.image.quality) == (False, "high")
        assert house.upstream.calls == 1

    async def test_no_store_walks_the_rungs_too(self, house: House) -> None:
        house.restart(budget=[day(100_000)])
        served = await get(house, cache_policy=CachePolicy.NO_STORE)
        assert (served.degraded, served.entry.image.quality) == (True, "medium")

    async def test_a_rung_is_not_made_for_who_may_not_generate(self, house: House) -> None:
        house.restart(budget=[day(1_000)])
        reader = Caller("reader", frozenset({Permission.READ}))
        with pytest.raises(PermissionDeniedError):
            await get(house, caller=reader)


class TestEveryonePaysItsOwn:
    async def _begun(self, house: House, *asking: Any) -> list[asyncio.Task[Any]]:
        """All of them asked, in one flight that has yet to hear from a tier."""
        house.redis.gate.clear()
        key = house.identity(quality="high", size="1024x1024")[1].key
        tasks = []
        for each in asking:
            tasks.append(asyncio.create_task(each))
            await until(lambda: [len(flight.waiters) for flight in house.cache._flights.of(key)] == [len(tasks)])
        house.redis.gate.set()
        return tasks

    async def _together(self, house: House, *asking: Any) -> list[Any]:
        """Ask all at once, in one flight."""
        return await asyncio.gather(*await self._begun(house, *asking), return_exceptions=True)

    async def test_what_only_one_wants_is_charged_to_it(self, house: House) -> None:
        one, four = await self._together(house, ask(house, caller=ANN), ask(house, caller=BOB, n=4))
        rows = sorted((row.caller, row.images) for row in house.ledger.attempts.values())
        assert rows == [("ann", 1), ("bob", 3)]
        assert [sum(served.cost_microusd > 0 for served in answer) for answer in (one, four)] == [1, 3]
        assert one[0].entry == four[0].entry

    async def test_who_can_pay_for_its_own_is_not_refused_for_what_others_want(self, house: House) -> None:
        house.restart(budget=[day(HIGH_COSTS + TEXT_COSTS, "ann")])
        one, four = await self._together(
            house, ask(house, caller=ANN, allow_degraded=False), ask(house, caller=ANN, n=4, allow_degraded=False)
        )
        assert not one[0].degraded
        assert isinstance(four, CannotAffordError)

    async def test_who_would_take_less_does_not_have_others_refused(self, house: House) -> None:
        house.restart(budget=[day(HIGH_COSTS + TEXT_COSTS)])
        house.upstream.hold()
        less, full = await self._begun(house, ask(house), ask(house, allow_degraded=False))
        with pytest.raises(CannotAffordError):
            await less  # for nothing is left while the other's is being made
        house.upstream.release()
        assert not (await full)[0].degraded

    async def test_one_purse_is_one_call(self, house: House) -> None:
        await self._together(house, ask(house), ask(house, n=4))
        assert [len(variants) for _, variants in house.upstream.asked] == [4]


class TestSentAgain:
    async def test_a_call_that_was_given_less_is_given_the_same_again(self, house: House) -> None:
        house.restart(budget=[day(100_000)])
        terms = {"cache_policy": CachePolicy.REFRESH, "request_id": "one"}
        first = await get(house, **terms)
        again = await get(house, **terms)
        assert (again.degraded, again.entry) == (True, first.entry)
        assert house.upstream.calls == 1

    async def test_a_no_store_that_failed_half_way_is_not_paid_for_again(self, house: House) -> None:
        generate = house.upstream.generate

        async def two_then_none(request: object, variants: object, **terms: object) -> object:
            if house.upstream.calls:
                house.upstream.fail_next(UpstreamDownError("down"))
            return await generate(request, list(variants)[:2], **terms)  # type: ignore[arg-type, call-overload] # a double

        house.upstream.generate = two_then_none  # type: ignore[method-assign, assignment] # a double
        terms = {"cache_policy": CachePolicy.NO_STORE, "request_id": "one", "n": 3}
        with pytest.raises(UpstreamDownError):
            await get(house, **terms)
        with pytest.raises(RequestIdSpentError):
            await get(house, **terms)
        assert house.upstream.images == 2

    async def test_who_comes_for_a_picture_that_was_never_made_is_told_why(self, house: House) -> None:
        house.restart(budget=[day(1_000)])
        pending = await ask(house, max_wait_s=0.0, allow_degraded=False)
        assert isinstance(pending, Pending)
        await until(lambda: house.cache.in_flight == 0)
        with pytest.raises(CannotAffordError, match="global/day"):
            await house.cache.get_by_key(pending.keys[0], namespace=house.namespace, caller=EVERYTHING, terms=Terms())
        with pytest.raises(KeyGoneError):
            await house.cache.get_by_key(pending.keys[0], namespace=house.namespace, caller=BOB, terms=Terms())


class TestTooSlow:
    def _learn(self, house: House, **seconds: float) -> None:
        (lane,) = house.generator._pool.lanes
        for quality, each_s in seconds.items():
            lane.took(quality, each_s)

    async def test_who_cannot_wait_gets_the_fastest_rung(self, house: House) -> None:
        self._learn(house, high=30.0, medium=8.0, low=3.0)
        served = await get(house, max_wait_s=5.0)
        assert (served.degraded, made(house)) == (True, ["low"])

    async def test_who_can_wait_gets_what_was_asked(self, house: House) -> None:
        self._learn(house, high=30.0, medium=8.0, low=3.0)
        served = await get(house, max_wait_s=31.0)
        assert (served.degraded, made(house)) == (False, ["high"])

    async def test_a_cached_rung_goes_before_a_faster_one(self, house: House) -> None:
        self._learn(house, high=30.0, medium=8.0, low=3.0)
        await get(house, "medium", allow_degraded=False)
        served = await get(house, max_wait_s=5.0)
        assert (served.degraded, served.entry.image.quality, made(house)) == (True, "medium", ["medium"])

    async def test_a_cached_picture_is_never_too_slow(self, house: House) -> None:
        self._learn(house, high=30.0, low=3.0)
        await get(house, allow_degraded=False)
        await house.settle()
        house.restart()
        self._learn(house, high=30.0, low=3.0)
        served = await get(house, max_wait_s=0.001)
        assert (served.degraded, served.tier) == (False, TierName.REDIS)

    async def test_where_no_rung_is_faster_what_was_asked_is_begun(self, house: House) -> None:
        self._learn(house, high=30.0, medium=40.0, low=50.0)
        house.upstream.hold()
        asking = asyncio.create_task(ask(house, max_wait_s=5.0))
        await house.upstream.arrived(1)
        await until(lambda: house.clock.sleepers > 0)
        house.clock.advance(5.0)
        assert isinstance(await asking, Pending)
        assert made(house) == ["high"]

    async def test_who_does_not_accept_less_waits(self, house: House) -> None:
        self._learn(house, high=30.0, low=3.0)
        served = await get(house, max_wait_s=5.0, allow_degraded=False)
        assert (served.degraded, made(house)) == (False, ["high"])

    async def test_who_joins_a_slow_load_gets_its_rung_and_the_load_goes_on(self, house: House) -> None:
        self._learn(house, high=30.0, low=3.0)
        house.upstream.hold()
        patient = asyncio.create_task(get(house, allow_degraded=False))
        await house.upstream.arrived(1)
        hasty = asyncio.create_task(get(house, max_wait_s=5.0, caller=BOB))
        await house.upstream.arrived(2)
        house.upstream.release()
        assert (await hasty).degraded
        assert not (await patient).degraded
        assert made(house) == ["high", "low"]


class TestMadeGood:
    async def _degrade(self, house: House, *, remake: bool) -> None:
        house.namespace = replace(house.namespace, remake_degraded=remake)
        house.restart(budget=[day(100_000)])
        assert (await get(house)).degraded

    async def test_what_was_degraded_is_made_as_asked_off_peak_at_the_lowest_priority(self, house: House) -> None:
        await self._degrade(house, remake=True)
        assert len(house.cache.remakes) == 1
        house.generator._budgets.override("global/day", 10_000_000)  # type: ignore[attr-defined] # a new day
        hour = int(house.clock.now_s() // 3_600 % 24)
        house.cache.remakes.start(((hour + 1) % 24, (hour + 2) % 24))
        await until(lambda: house.clock.sleepers > 0)
        assert made(house) == ["medium"]
        house.upstream.hold()
        house.clock.advance(3_600)
        await house.upstream.arrived(2)
        (flight,) = house.cache._flights.of(house.identity(quality="high", size="1024x1024")[1].key)
        assert [order.priority for order in flight.orders] == [Priority.WARM_UP]
        house.upstream.release()
        await until(lambda: house.cache.in_flight == 0)
        assert made(house) == ["medium", "high"]
        assert not (await get(house)).degraded
        assert len(house.cache.remakes) == 0

    async def test_what_cannot_be_remade_yet_is_tried_again(self, house: House) -> None:
        await self._degrade(house, remake=True)
        house.cache.remakes.start((0, 24))
        await until(lambda: house.clock.sleepers > 0)
        assert (len(house.cache.remakes), made(house)) == (1, ["medium"])

    async def test_an_edit_is_not_made_good_for_its_images_are_not_kept_until_then(self, house: House) -> None:
        house.namespace = replace(house.namespace, remake_degraded=True)
        house.restart(budget=[day(100_000)])
        data = small_image(1)
        image = InputImage(InputRole.IMAGE, hashlib.sha256(data).hexdigest(), "image/png", data)
        request, identity = house.identity(quality="high", size="1024x1024", inputs=(image,))
        terms = Terms(allow_degraded=True)
        answer = await house.cache.get(request, identity, namespace=house.namespace, caller=EVERYTHING, terms=terms)
        assert isinstance(answer, list)
        assert answer[0].degraded
        assert len(house.cache.remakes) == 0

    async def test_what_was_to_be_kept_nowhere_is_not_made_good(self, house: House) -> None:
        house.namespace = replace(house.namespace, remake_degraded=True)
        house.restart(budget=[day(100_000)])
        assert (await get(house, cache_policy=CachePolicy.NO_STORE)).degraded
        assert len(house.cache.remakes) == 0

    async def test_only_namespaces_that_want_it_are_made_good(self, house: House) -> None:
        await self._degrade(house, remake=False)
        assert len(house.cache.remakes) == 0

    @pytest.mark.parametrize(
        ("hour", "hours", "is_in"),
        [
            (23, (22, 6), True),
            (5, (22, 6), True),
            (6, (22, 6), False),
            (12, (22, 6), False),
            (2, (1, 3), True),
            (3, (1, 3), False),
            (0, (0, 24), True),
        ],
    )
    def test_off_peak_may_go_over_midnight(self, hour: int, hours: tuple[int, int], *, is_in: bool) -> None:
        assert is_between(hour, hours) is is_in


class TestCandidates:
    async def test_the_best_is_the_answer_the_others_are_further_variants_and_all_are_paid_for(
        self, house: House
    ) -> None:
        served = await get(house, candidates=3)
        assert served.entry.image.won_against == 2
        assert served.entry.key.variant == 0
        assert served.cost_microusd == 3 * house.upstream.cost_microusd
        await until(lambda: all(house.cache._is_here(served.entry.key.with_variant(v)) for v in (1, 2)))
        three = await ask(house, n=3)
        assert not isinstance(three, Pending)
        assert len({each.entry.image.sha256 for each in three}) == 3
        assert house.upstream.calls == 1

    async def test_candidates_are_no_part_of_the_identity(self, house: House) -> None:
        best = await get(house, candidates=3)
        assert (await get(house)).entry == best.entry

    async def test_a_best_that_scores_too_low_waits_for_review_and_is_not_paid_for_again(self, house: House) -> None:
        house.namespace = replace(house.namespace, min_score=0.999)
        house.restart()
        answer = await ask(house, candidates=3)
        assert isinstance(answer, Pending)
        assert answer.in_review
        (key,) = answer.keys
        again = await ask(house, caller=BOB)
        assert isinstance(again, Pending)
        assert again.in_review
        by_key = await house.cache.get_by_key(key, namespace=house.namespace, caller=BOB, terms=Terms())
        assert isinstance(by_key, Pending)
        assert by_key.in_review
        assert house.upstream.calls == 1
        approved = await house.reviews.approve(key)
        served = await get(house)
        assert served.entry == approved
        assert (served.entry.key, house.upstream.calls) == (key, 1)

    async def test_after_a_rejection_the_next_request_makes_another(self, house: House) -> None:
        house.namespace = replace(house.namespace, min_score=0.999)
        house.restart()
        answer = await ask(house, candidates=2)
        assert isinstance(answer, Pending)
        await house.settle()
        for review in await house.reviews.page(after="", limit=10):
            await house.reviews.reject(review.key)
        assert isinstance(await ask(house, candidates=2), Pending)
        assert house.upstream.calls == 2

    async def test_purging_a_namespace_takes_what_waits_for_review_along(self, house: House) -> None:
        house.namespace = replace(house.namespace, min_score=0.999)
        house.restart()
        await ask(house, candidates=2)
        await house.settle()
        result = await house.cache.purge(house.namespace, dry_run=False)
        assert result.images == 2
        assert await house.reviews.page(after="", limit=10) == []
