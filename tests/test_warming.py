"""WarmImages over a whole cache: what is planned, what is paid for, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from google.rpc.code_pb2 import RESOURCE_EXHAUSTED, UNAVAILABLE

from cacheserver.accounting.ledger import SqliteLedger
from cacheserver.errors import LedgerUnavailableError, PromptDeniedError, PromptRefusedError, UpstreamDownError
from cacheserver.model import Attempt, AttemptOutcome, CachedImage, CacheKey, Caller, Namespace, Permission, Priority
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.precheck import PromptPolicy
from tests.fakes import FakeClock
from tests.house import House
from tests.rpc_front import Front, ask, authorization, failure, open_front
from tests.waiting import until


@pytest.fixture
async def front(house: House) -> AsyncIterator[Front]:
    async with open_front(house, namespaces=[Namespace("shop", "shop", max_variants=2)]) as front:
        yield front


def options(**fields: Any) -> pb.WarmImagesRequest:
    return pb.WarmImagesRequest(options=pb.WarmOptions(**({"job": "night"} | fields)))


def items(*requests: pb.GetImageRequest | str, first_row: int = 1) -> pb.WarmImagesRequest:
    asked = [ask(each) if isinstance(each, str) else each for each in requests]
    rows = [pb.WarmItem(row=row, request=each) for row, each in enumerate(asked, first_row)]
    return pb.WarmImagesRequest(items=pb.WarmItems(items=rows))


class Warmed:
    """All that a warm-up answered."""

    def __init__(self, responses: Iterable[pb.WarmImagesResponse]) -> None:
        self.outcomes = [outcome for response in responses for outcome in response.outcomes]
        self.totals = [response.totals for response in responses][-1]
        self.cached = {pb.Tier.Name(each.tier): each.count for each in self.totals.cached}

    @property
    def results(self) -> dict[int, str]:
        return {each.row: pb.WarmResult.Name(each.result).removeprefix("WARM_RESULT_") for each in self.outcomes}

    def failure(self, row: int) -> pb.Failure:
        [outcome] = [each for each in self.outcomes if each.row == row]
        return outcome.failure


async def warm(front: Front, *messages: pb.WarmImagesRequest, **call: Any) -> Warmed:
    return Warmed([response async for response in front.stub.WarmImages(iter(messages), **call)])


class TestPlan:
    async def test_a_plan_counts_and_prices_and_changes_nothing(self, front: Front) -> None:
        await front.house.get("cached in memory")
        await front.house.get("cached below")
        await front.house.settle()
        front.house.memory.delete(front.house.identity("cached below")[1].key)
        held = len(front.house.memory)
        plan = await warm(
            front,
            options(plan=True, job=""),
            items("cached in memory", "cached below", "new", "newer", "new too"),
        )
        assert plan.outcomes == []
        assert plan.cached == {"TIER_MEMORY": 1, "TIER_REDIS": 1}
        assert (plan.totals.items, plan.totals.duplicates, plan.totals.to_generate) == (5, 0, 3)
        most = front.house.generator.estimate_microusd(front.house.identity("new")[0], 1)
        assert plan.totals.estimated_microusd >= 3 * most
        assert front.house.upstream.calls == 2
        assert len(front.house.memory) == held

    async def test_what_is_the_same_once_normalized_is_a_duplicate(self, front: Front) -> None:
        plan = await warm(front, options(plan=True), items("a red fox", " A  red fox."), items("a red fox"))
        assert (plan.totals.items, plan.totals.duplicates, plan.totals.to_generate) == (3, 2, 1)

    async def test_more_pictures_of_the_same_are_no_duplicate_and_fewer_are(self, front: Front) -> None:
        await front.house.get("a red fox")
        plan = await warm(front, options(plan=True), items(ask(n=1), ask(n=3), ask(n=2)))
        assert (plan.totals.duplicates, plan.totals.to_generate) == (1, 2)

    async def test_it_takes_as_long_as_the_slowest_bound(self, front: Front) -> None:
        twenty = [ask(f"prompt {i}") for i in range(20)]
        slow = await warm(front, options(plan=True, concurrency=1), items(*twenty))
        paced = await warm(front, options(plan=True, concurrency=1_000, max_images_per_minute=1), items(*twenty))
        assert slow.totals.estimated_time.seconds == 20 * 20  # of an upstream not tried yet, twenty seconds are thought
        assert paced.totals.estimated_time.seconds == 20 * 60

    async def test_a_tier_that_is_silent_is_named(self, front: Front) -> None:
        front.house.s3.is_down = True
        plan = await warm(front, options(plan=True), items("a red fox"))
        assert (list(plan.totals.unknown_tiers), plan.totals.to_generate) == ([pb.TIER_S3], 1)

    async def test_what_would_fail_is_told_and_nothing_else(self, front: Front) -> None:
        bad = ask("bad", of={"size": "huge"})
        plan = await warm(front, options(plan=True), items("fine", bad, ask("unserved", of={"model": "other"})))
        assert plan.results == {2: "FAILED", 3: "FAILED"}
        assert set(plan.failure(2).violations) == {"spec.size"}
        assert set(plan.failure(3).violations) == {"spec.model"}
        assert (plan.totals.to_generate, plan.totals.failed) == (1, 2)


class TestRun:
    async def test_what_no_tier_has_is_generated_once_and_tagged(self, front: Front) -> None:
        await front.house.get("cached")
        run = await warm(front, options(), items("cached", "new", "New."), items(ask("two", n=2), first_row=4))
        assert run.results == {1: "CACHED", 2: "GENERATED", 3: "DUPLICATE", 4: "GENERATED"}
        assert run.totals.generated == 3
        assert run.totals.spent_microusd == sum(each.cost_microusd for each in run.outcomes) == 3 * 53_000
        assert front.house.upstream.images == 4
        key = front.house.identity("new")[1].key
        entry = front.house.memory.get(key)
        assert entry is not None
        assert entry.tags == ("job:night",)
        again = await warm(front, options(), items("cached", "new", ask("two", n=2)))
        assert set(again.results.values()) == {"CACHED"}
        assert again.totals.spent_microusd == 0

    async def test_it_asks_after_everybody_else(self, front: Front) -> None:
        asked: list[Priority] = []
        generate = front.house.generator.generate

        async def listen(order: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(order.priority)
            return await generate(order, *args, **kwargs)

        front.house.generator.generate = listen  # type: ignore[method-assign] # to hear what is ordered
        await warm(front, options(), items(ask("new", priority=pb.PRIORITY_INTERACTIVE)))
        assert asked == [Priority.WARM_UP]

    async def test_no_more_run_at_a_time_than_the_options_say(self, front: Front) -> None:
        front.house.upstream.hold()
        running = asyncio.create_task(warm(front, options(concurrency=3), items(*(f"prompt {i}" for i in range(9)))))
        await front.house.upstream.arrived(3)
        assert front.house.cache.in_flight == 3
        front.house.upstream.release()
        assert set((await running).results.values()) == {"GENERATED"}

    async def test_a_budget_is_never_overdrawn_and_what_it_does_not_cover_fails(self, front: Front) -> None:
        most = front.house.generator.estimate_microusd(front.house.identity("prompt 0")[0], 1)
        budget = 53_000 * 2 + most
        prompts = [f"prompt {i}" for i in range(9)]
        run = await warm(front, options(budget_microusd=budget, concurrency=4), items(*prompts))
        made = [row for row, result in run.results.items() if result == "GENERATED"]
        assert len(made) == 3
        [reason] = {run.failure(row).reason for row in run.results if row not in made}
        lacking = next(run.failure(row) for row in run.results if row not in made)
        assert (reason, lacking.code) == ("BUDGET_EXHAUSTED", RESOURCE_EXHAUSTED)
        assert "Job night may spend $" in lacking.message
        again = await warm(front, options(budget_microusd=budget), items(*prompts))
        assert sorted(again.results.values()) == ["CACHED"] * 3 + ["FAILED"] * 6  # the ledger knows what is spent
        told = await warm(front, options(job="other", budget_microusd=most, spent_microusd=1), items(prompts[-1]))
        assert told.failure(1).reason == "BUDGET_EXHAUSTED"

    async def test_a_ledger_that_cannot_be_read_meanwhile_loses_no_outcome_and_no_budget(
        self, front: Front, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        readings = iter([0])

        async def spent_microusd(*_: object, **__: object) -> int:
            for spent in readings:
                return spent
            raise LedgerUnavailableError("gone")

        monkeypatch.setattr("cacheserver.warming.purse._SETTLED_BETWEEN_READS", 1)
        monkeypatch.setattr(front.house.ledger, "spent_microusd", spent_microusd)
        most = front.house.generator.estimate_microusd(front.house.identity("prompt 0")[0], 1)
        job = options(budget_microusd=53_000 + most, concurrency=1)
        run = await warm(front, job, items("prompt 0", "prompt 1"))
        assert run.results == {1: "GENERATED", 2: "GENERATED"}
        assert run.totals.spent_microusd == 106_000

    async def test_the_pace_is_kept(self, front: Front) -> None:
        running = asyncio.create_task(warm(front, options(max_images_per_minute=6), items("one", "two", "three")))
        for made in (1, 2, 3):
            await front.house.upstream.arrived(made)
            front.house.clock.advance(9.9)
            await front.house.settle()
            assert front.house.upstream.calls == made
            front.house.clock.advance(0.1)
        assert (await running).totals.generated == 3

    async def test_a_refused_prompt_fails_and_stops_nothing(self, front: Front) -> None:
        front.house.upstream.fail_next(PromptRefusedError("No."))
        run = await warm(front, options(concurrency=1), items("refused", "fine"))
        assert run.results == {1: "FAILED", 2: "GENERATED"}
        assert run.failure(1).reason == "PROMPT_REFUSED"
        assert not run.failure(1).HasField("retry_delay")

    async def test_what_may_work_later_is_tried_again_then(self, front: Front) -> None:
        front.house.upstream.fail_next(UpstreamDownError("Down.", retry_after_s=7.0))
        run = await _as_time_passes(front, warm(front, options(), items("a red fox")))
        assert (run.results, front.house.upstream.calls) == ({1: "GENERATED"}, 2)

    async def test_what_stays_down_fails_at_last(self, front: Front) -> None:
        for _ in range(9):  # a probe fails too
            front.house.upstream.fail_next(UpstreamDownError("Down.", retry_after_s=7.0))
        run = await _as_time_passes(front, warm(front, options(), items("a red fox")))
        assert (run.failure(1).code, run.totals.spent_microusd) == (UNAVAILABLE, 0)

    async def test_what_may_have_been_billed_is_not_bought_again(self, front: Front) -> None:
        front.house.upstream.fail_next(UpstreamDownError("Reset.", cost_microusd=None))
        run = await warm(front, options(), items("a red fox"))
        assert (run.results, front.house.upstream.calls) == ({1: "FAILED"}, 1)

    async def test_a_refresh_is_made_anew_and_once_a_job(self, front: Front) -> None:
        first = await front.house.get("a red fox")
        request = ask("a red fox", cache_policy=pb.CACHE_POLICY_REFRESH)
        run = await warm(front, options(), items(request))
        again = await warm(front, options(), items(request))
        assert (run.results, again.results) == ({1: "GENERATED"}, {1: "CACHED"})
        assert front.house.upstream.calls == 2
        assert (await front.house.get("a red fox")).entry.image.sha256 != first.entry.image.sha256
        other = await warm(front, options(job="tomorrow"), items(request))
        assert other.results == {1: "GENERATED"}

    async def test_a_client_that_goes_away_leaves_what_is_paid_for_to_be_kept(self, front: Front) -> None:
        front.house.upstream.hold()
        call = front.stub.WarmImages(iter([options(concurrency=2), items(*(f"prompt {i}" for i in range(50)))]))
        await front.house.upstream.arrived(2)
        call.cancel()
        front.house.upstream.release()
        await until(lambda: front.house.cache.in_flight == 0)
        await front.house.settle()
        assert front.house.upstream.calls == 2
        found, _ = await front.house.cache.find([front.house.identity(f"prompt {i}")[1].key for i in range(50)])
        assert sum(each.tier is not None for each in found) == 2

    async def test_what_somebody_else_waits_for_is_joined(self, front: Front) -> None:
        front.house.upstream.hold()
        asking = asyncio.create_task(front.house.get("a red fox"))
        await front.house.upstream.arrived(1)
        running = asyncio.create_task(warm(front, options(), items("a red fox")))
        [flight] = front.house.cache._flights.of(front.house.identity("a red fox")[1].key)
        await until(lambda: len(flight.waiters) == 2)
        front.house.upstream.release()
        run = await running
        assert (run.results, run.totals.in_flight, run.totals.spent_microusd) == ({1: "COLLAPSED"}, 1, 0)
        assert (await asking).cost_microusd == 53_000

    async def test_a_service_that_goes_down_says_so_and_pays_for_nothing_more(self, house: House) -> None:
        house.upstream.hold()
        async with open_front(house) as front:
            running = asyncio.create_task(failure(_all(front, options(concurrency=1), items("one", "two"))))
            await house.upstream.arrived(1)
            draining = asyncio.create_task(front.server.drain(5))
            failed = await running
            house.upstream.release()
            await draining
        assert (failed.code, failed.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert house.upstream.calls == 1

    @pytest.mark.no_cover
    @pytest.mark.timeout(180)  # 186,000 outcomes until all is full: 12 s of work, 35 s on a busy machine
    async def test_outcomes_nobody_reads_keep_items_from_being_read(self, front: Front) -> None:
        sent = 0

        async def endless() -> AsyncIterator[pb.WarmImagesRequest]:
            nonlocal sent
            yield options()
            while True:
                yield items(*["the very same prompt"] * 1_000)
                sent += 1
                await asyncio.sleep(0)

        await front.house.get("the very same prompt")
        call = front.stub.WarmImages(endless())
        await call.read()
        seen = -1
        while seen != sent:
            seen = sent
            for _ in range(2_000):
                await asyncio.sleep(0)
        call.cancel()
        assert sent < 200


async def _as_time_passes(front: Front, warming: Coroutine[None, None, Warmed]) -> Warmed:
    running = asyncio.create_task(warming)
    while not running.done():
        await until(lambda: running.done() or front.house.clock.sleepers > 0)
        front.house.clock.advance(7)
    return await running


async def _all(front: Front, *messages: pb.WarmImagesRequest, **call: Any) -> list[pb.WarmImagesResponse]:
    return [response async for response in front.stub.WarmImages(iter(messages), **call)]


class Moderation:
    """Refuses the prompt "bad", and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def passed(self, prompt: str) -> bool:
        return prompt in self.asked

    async def check(self, prompt: str) -> None:
        self.asked.append(prompt)
        if prompt == "bad":
            raise PromptDeniedError("Moderation refuses this prompt.")


class TestRights:
    async def test_who_may_only_read_warms_nothing_and_plans_nothing_and_fills(self, house: House) -> None:
        await _only_in_s3(house, "one")
        caller = sha256(b"token").digest(), Caller("reader", frozenset({Permission.READ}))
        async with open_front(house, callers=[caller], anonymous=None) as front:
            for plan in (False, True):
                run = await warm(front, options(plan=plan), items("new"), metadata=authorization("token"))
                assert run.failure(1).reason == "PERMISSION_DENIED"
            fill = options(fill=pb.TIER_REDIS)
            filled = await warm(front, fill, items("one"), metadata=authorization("token"))
        assert filled.results == {1: "FILLED"}

    async def test_what_a_namespace_refuses_fails_before_anything_is_looked_up(self, house: House) -> None:
        policies = {"default": PromptPolicy(name="default", pii="refuse")}
        async with open_front(house, policies=policies) as front:
            run = await warm(front, options(), items("a letter to jane.doe@example.com", "a red fox"))
        assert run.results == {1: "FAILED", 2: "GENERATED"}
        assert run.failure(1).reason == "PII_FOUND"

    async def test_a_refused_prompt_is_booked_when_it_is_run_and_not_when_it_is_planned(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        booked: list[str] = []
        monkeypatch.setattr(house.books, "refused", lambda _, reason: booked.append(reason))
        async with open_front(house, policies={"default": PromptPolicy(name="default", pii="refuse")}) as front:
            plan = await warm(front, options(plan=True), items("a letter to jane.doe@example.com"))
            assert (plan.results, booked) == ({1: "FAILED"}, [])
            await warm(front, options(), items("a letter to jane.doe@example.com"))
        assert booked == ["PII_FOUND"]

    async def test_moderation_is_asked_of_what_is_to_be_made_and_of_nothing_else(self, house: House) -> None:
        moderation = Moderation()
        await house.get("cached")
        policies = {"default": PromptPolicy(name="default", moderation=moderation)}
        async with open_front(house, policies=policies) as front:
            await warm(front, options(plan=True), items("cached", "new", "bad"))
            assert moderation.asked == []
            run = await warm(front, options(), items("cached", "new", "bad"))
        assert run.results == {1: "CACHED", 2: "GENERATED", 3: "FAILED"}
        assert run.failure(3).reason == "PROMPT_DENIED"
        assert sorted(moderation.asked) == ["bad", "new"]

    async def test_a_prompt_is_keyed_and_made_as_its_namespace_redacts_it(self, house: House) -> None:
        policies = {"default": PromptPolicy(name="default", pii="redact")}
        async with open_front(house, policies=policies) as front:
            run = await warm(front, options(), items("to jane.doe@example.com", "to joe.bloggs@example.com"))
        assert sorted(run.results.values()) == ["DUPLICATE", "GENERATED"]
        assert "example.com" not in house.upstream.asked[0][0].prompt


class TestFill:
    async def test_redis_gets_what_only_s3_has_and_memory_stays_as_it_is(self, front: Front) -> None:
        await _only_in_s3(front.house, "one", "two")
        run = await warm(front, options(fill=pb.TIER_REDIS, job=""), items("one", "two", "nowhere", " one."))
        assert run.results == {1: "FILLED", 2: "FILLED", 3: "ABSENT", 4: "DUPLICATE"}
        for prompt in ("one", "two"):
            assert await front.house.redis.get(front.house.identity(prompt)[1].key) is not None
        assert len(front.house.memory) == 0
        assert front.house.upstream.calls == 2
        again = await warm(front, options(fill=pb.TIER_REDIS), items("one", "two"))
        assert (again.results, again.cached) == ({1: "CACHED", 2: "CACHED"}, {"TIER_REDIS": 2})

    async def test_what_changes_meanwhile_is_read_again_and_no_absence(
        self, front: Front, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house = front.house
        await house.get("a red fox")
        await house.settle()
        key = house.identity("a red fox")[1].key
        await house.redis.delete(key)
        read, reads = house.s3.get, 0

        async def get(key: CacheKey) -> CachedImage | None:
            nonlocal reads
            reads += 1
            entry = await read(key)
            if reads == 1:
                async with house.keeper.purging(lambda _: False):
                    pass
            return entry

        monkeypatch.setattr(house.s3, "get", get)
        filled = await warm(front, options(fill=pb.TIER_REDIS), items("a red fox"))
        assert (filled.results, reads) == ({1: "FILLED"}, 2)
        assert await house.redis.get(key) is not None

    async def test_without_items_it_is_everything_of_the_namespace(self, front: Front) -> None:
        await _only_in_s3(front.house, *(f"prompt {i}" for i in range(7)))
        key = front.house.identity("prompt 0")[1].key
        master = await front.house.s3.get(key)
        assert master is not None
        rendition = key.rendition(bytes(32))  # no picture of its own
        await front.house.s3.put(rendition, replace(master, key=rendition, derived_from=key.name), replace=False)
        run = await warm(front, options(fill=pb.TIER_REDIS, namespace="default", concurrency=3))
        assert (run.outcomes, run.totals.items, run.totals.filled) == ([], 7, 7)
        again = await warm(front, options(fill=pb.TIER_REDIS, namespace="default"))
        assert (again.totals.filled, again.cached) == (0, {"TIER_REDIS": 7})

    async def test_a_tier_that_is_away_cannot_be_filled(self, front: Front) -> None:
        front.house.redis.is_down = True
        failed = await failure(_all(front, options(fill=pb.TIER_REDIS), items("one")))
        assert (failed.code, failed.reason) == ("UNAVAILABLE", "TIER_UNREACHABLE")

    async def test_a_source_that_is_away_is_a_failure_and_no_absence(self, front: Front) -> None:
        await _only_in_s3(front.house, "one")
        front.house.s3.is_down = True
        run = await warm(front, options(fill=pb.TIER_REDIS), items("one"))
        assert (run.results, run.failure(1).code) == ({1: "FAILED"}, UNAVAILABLE)

    async def test_the_last_tier_is_filled_by_nobody(self, front: Front) -> None:
        failed = await failure(_all(front, options(fill=pb.TIER_S3)))
        assert set(failed.fields) == {"options.fill"}


async def _only_in_s3(house: House, *prompts: str) -> None:
    for prompt in prompts:
        await house.get(prompt)
    await house.settle()
    for prompt in prompts:
        key = house.identity(prompt)[1].key
        await house.redis.delete(key)
        house.memory.delete(key)


class TestInput:
    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"job": ""}, "options.job"),
            ({"job": "a b"}, "options.job"),
            ({"job": "x" * 49}, "options.job"),
            ({"budget_microusd": -1}, "options.budget_microusd"),
            ({"spent_microusd": -1}, "options.spent_microusd"),
            ({"max_images_per_minute": -1}, "options.max_images_per_minute"),
            ({"concurrency": 1_001}, "options.concurrency"),
            ({"fill": 77}, "options.fill"),
            ({"fill": pb.TIER_MEMORY}, "options.fill"),
            ({"fill": pb.TIER_REDIS, "plan": True}, "options.plan"),
            ({"namespace": "default"}, "options.namespace"),
        ],
    )
    async def test_options_out_of_their_range_are_named(self, front: Front, fields: dict[str, Any], field: str) -> None:
        failed = await failure(_all(front, options(**fields)))
        assert (failed.code, set(failed.fields)) == ("INVALID_ARGUMENT", {field})

    async def test_the_options_come_first_and_once(self, front: Front) -> None:
        assert set((await failure(_all(front, items("one")))).fields) == {"options"}
        assert set((await failure(_all(front))).fields) == {"options"}
        assert set((await failure(_all(front, options(), options()))).fields) == {"items"}
        assert set((await failure(_all(front, options(), items(*["one"] * 1_001)))).fields) == {"items"}

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (pb.GetImageRequest(key="v1.default." + "0" * 32 + "." + "0" * 32 + ".0"), "key"),
            (ask(cache_policy=pb.CACHE_POLICY_NO_STORE), "cache_policy"),
            (ask(variant_policy=pb.VARIANT_POLICY_NEXT), "variant_policy"),
            (ask(n=3, namespace="shop"), "n"),
            (ask(namespace="nobody's"), "namespace"),
            (pb.GetImageRequest(), "spec"),
        ],
    )
    async def test_an_item_that_cannot_be_warmed_says_why(
        self, front: Front, request_: pb.GetImageRequest, field: str
    ) -> None:
        run = await warm(front, options(), items(request_, "fine"))
        assert run.results == {1: "FAILED", 2: "GENERATED"}
        assert set(run.failure(1).violations) == {field}

    async def test_a_warm_up_of_nothing_is_told_so(self, front: Front) -> None:
        assert (await warm(front, options())).totals == pb.WarmTotals()


async def test_the_ledger_adds_up_what_a_tag_has_cost(clock: FakeClock, tmp_path: Path) -> None:
    ledger = await SqliteLedger.at(tmp_path, clock=clock, replica_id="r")
    rows = [
        ("1", ("job:a",), AttemptOutcome.SETTLED, 5),
        ("2", ("x", "job:a"), AttemptOutcome.UNKNOWN, 7),
        ("3", ("job:ab",), AttemptOutcome.SETTLED, 100),
        ("4", ("job:a",), AttemptOutcome.SENT, 0),
        ("5", ("job:a",), AttemptOutcome.NOT_BILLED, 0),
    ]
    for number, tags, outcome, cost in rows:
        attempt = Attempt(
            id=number,
            namespace="shop",
            caller="ann",
            upstream="u",
            model="m",
            images=1,
            estimate_microusd=30,
            start_time_s=clock.now_s(),
            tags=tags,
            outcome=outcome,
            cost_microusd=cost,
        )
        await ledger.close(attempt)
    assert await ledger.spent_microusd("job:a") == 12
    assert await ledger.spent_microusd("job:a", open_too=True) == 42
    assert await ledger.spent_microusd("job:none") == 0
    await ledger.aclose()
