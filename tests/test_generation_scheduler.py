"""Which job is sent where, and when: slots belong to nobody until they are due, and then to the most urgent."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.errors import (
    QueueFullError,
    ShuttingDownError,
    UpstreamDownError,
    UpstreamError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
from cacheserver.generation.pool import Lane, Pool, Terms
from cacheserver.generation.queue import Job, JobQueue, Turn
from cacheserver.generation.scheduler import Policy, Scheduler
from cacheserver.model import Amounts, CallReport, GroupLimits, ImageRequest, Priority, Slot
from tests.fakes import FakeClock
from tests.provider import FakeUpstream
from tests.waiting import until

MODEL = "gpt-image-2"


class SpacedLimits:
    """Limits by hand: in each group one picture every `spacing_s`, and so many places."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.spacing_s: dict[str, float] = {}
        self.places: dict[str, int] = {}
        self.running: Counter[str] = Counter()
        self.reserved: list[Slot] = []
        self.released: list[Slot] = []
        self.reports: list[CallReport] = []
        self.asked = 0
        self.fault: Exception | None = None
        self.on_reserve: Callable[[], object] = lambda: None
        self.silent: set[str] = set()
        self.may_release = asyncio.Event()
        self.may_release.set()
        self._next: dict[str, float] = {}
        self._ids = itertools.count()

    async def reserve(self, group: str, amounts: Amounts, *, lease_s: float, spare: int = 0) -> Slot | None:
        assert lease_s > 0
        self.asked += 1
        self.on_reserve()
        if self.fault is not None:
            raise self.fault
        if group in self.silent:
            await asyncio.Event().wait()
        if self.running[group] >= self.places.get(group, 100) - spare:
            return None
        now_s = self._clock.monotonic_s()
        start_s = max(now_s, self._next.get(group, 0.0))
        self._next[group] = start_s + self.spacing_s.get(group, 0.0) * amounts.images
        self.running[group] += 1
        slot = Slot(str(next(self._ids)), group, amounts, start_s - now_s, self.running[group])
        self.reserved.append(slot)
        return slot

    async def release(self, slot: Slot) -> None:
        self.released.append(slot)
        await self.may_release.wait()
        self.running[slot.group] -= 1
        self._next[slot.group] -= self.spacing_s.get(slot.group, 0.0) * slot.amounts.images

    async def end(self, slot: Slot, report: CallReport) -> None:
        self.reports.append(report)
        self.running[slot.group] -= 1

    def set_next(self, group: str, at_s: float) -> None:
        self._next[group] = at_s

    def next_s(self, group: str) -> float:
        return max(0.0, self._next.get(group, 0.0) - self._clock.monotonic_s())

    def images_per_s(self, group: str) -> float:
        spacing_s = self.spacing_s.get(group, 0.0)
        return 1 / spacing_s if spacing_s else float("inf")

    def images_per_minute(self, group: str) -> float | None:
        return 60 * self.images_per_s(group)


class Stage:
    """A scheduler over fake upstreams, and the jobs that were given to it."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.limits = SpacedLimits(clock)
        self.tasks: list[asyncio.Task[Turn]] = []
        self.started: list[tuple[str, str]] = []
        self._opened: list[tuple[Scheduler, Pool]] = []

    def open(self, *lanes: Lane, concurrent: int = 100, queue_max: int = 1_000, **settings: Any) -> None:
        books = CounterBooks(clock=self.clock, registry=CollectorRegistry())
        self.pool = Pool(lanes, clock=self.clock, books=books, month_spend_microusd=lambda _: 0)
        groups = {lane.group: GroupLimits(concurrent=concurrent) for lane in lanes}
        self.limits.places = dict.fromkeys(groups, concurrent)
        self.scheduler = Scheduler(
            pool=self.pool,
            limits=self.limits,
            group_limits=groups,
            queue=JobQueue(max_jobs=queue_max, max_bytes=10_000_000),
            clock=self.clock,
            **settings,
        )
        self._opened.append((self.scheduler, self.pool))

    def job(self, name: str = "", *, priority: Priority = Priority.STANDARD, **facts: Any) -> Job:
        images, model = facts.pop("images", 1), facts.pop("model", MODEL)
        deadline_s = self.clock.monotonic_s() + facts.pop("within_s", 1_000.0)
        request = ImageRequest(name or "a fox", model)
        return Job(request, Amounts(images=images), facts.pop("caller", "ann"), priority, deadline_s, **facts)

    def ask(self, name: str = "", **facts: Any) -> asyncio.Task[Turn]:
        job = self.job(name, **facts)

        async def turn() -> Turn:
            turn = await self.scheduler.turn(job)
            self.started.append((name, turn.lane.name))
            return turn

        self.tasks.append(asyncio.create_task(turn()))
        return self.tasks[-1]

    def finish(self, turn: Turn) -> None:
        self.scheduler.finished(turn, CallReport())

    @property
    def lanes_used(self) -> Counter[str]:
        return Counter(lane for _, lane in self.started)

    async def run(self, seconds: float = 0.0, *, step_s: float = 0.1) -> None:
        """Let time pass, and everything run that can."""
        await settle()
        for _ in range(round(seconds / step_s)):
            self.clock.advance(step_s)
            await settle()

    async def aclose(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for scheduler, pool in self._opened:
            await scheduler.aclose()
            await pool.aclose()


async def settle() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.fixture
async def stage(clock: FakeClock) -> AsyncIterator[Stage]:
    stage = Stage(clock)
    yield stage
    await stage.aclose()


def lane(name: str = "one", *, group: str = "", models: tuple[str, ...] = (MODEL,), **terms: Any) -> Lane:
    if "price_factor" in terms:
        terms["price_factor"] = Decimal(str(terms["price_factor"]))
    told = Terms(models=models, limit_group=group or name, **terms)
    return Lane(FakeUpstream(name, models), told, has_succeeded=True)


# ── slots ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_jobs_are_sent_as_the_groups_slots_come(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 2.0}
    stage.open(lane())
    for name in "abc":
        stage.ask(name)
    await stage.run()
    assert [name for name, _ in stage.started] == ["a"]
    await stage.run(1.9)
    assert len(stage.started) == 1
    await stage.run(0.2)
    assert [name for name, _ in stage.started] == ["a", "b"]
    await stage.run(2)
    assert [name for name, _ in stage.started] == ["a", "b", "c"]


async def test_one_slot_is_sought_at_a_time_however_many_wait(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 2.0}
    stage.open(lane())
    for _ in range(50):
        stage.ask()
    await stage.run()
    assert len(stage.limits.reserved) == 2  # the one that was due, and the next


class RealClock(FakeClock):
    """Never the same time twice."""

    def monotonic_s(self) -> float:
        self._monotonic_s += 1e-7
        return self._monotonic_s


@pytest.mark.parametrize("policy", list(Policy))
async def test_so_many_slots_are_sought_as_jobs_wait_however_many_groups_are_idle(policy: Policy) -> None:
    stage = Stage(RealClock())
    try:
        stage.open(*(lane(f"lane-{number}") for number in range(50)), policy=policy)
        for _ in range(3):
            stage.ask()
        await stage.run()
        assert (len(stage.started), len(stage.limits.reserved), stage.limits.released) == (3, 3, [])
        for task in stage.tasks:
            stage.finish(task.result())
        stage.ask()
        await stage.run()
        assert (len(stage.started), len(stage.limits.reserved)) == (4, 4)
    finally:
        await stage.aclose()


async def test_a_slot_sought_for_a_standard_job_goes_to_the_interactive_one_that_came_meanwhile(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 2.0}
    stage.open(lane())
    for name in ("first", "standard"):
        stage.ask(name)
    await stage.run(1.0)
    stage.ask("interactive", priority=Priority.INTERACTIVE)
    await stage.run(1.1)
    assert [name for name, _ in stage.started] == ["first", "interactive"]
    await stage.run(2)
    assert stage.started[-1][0] == "standard"


async def test_with_the_standard_queue_full_an_interactive_job_starts_within_one_slot(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 2.0}
    stage.open(lane(), queue_max=20)
    tasks = [stage.ask(f"s{i}") for i in range(22)]
    await stage.run(1.0)
    interactive = stage.ask("vip", priority=Priority.INTERACTIVE)
    await stage.run(1.1)
    assert interactive.done()
    refused = [task for task in tasks if task.done() and isinstance(task.exception(), QueueFullError)]
    assert len(refused) == 2
    assert tasks[-1] in refused


async def test_a_slot_nobody_wants_any_more_is_given_back(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 2.0}
    stage.open(lane())
    stage.ask("first")
    gone = stage.ask("gone")
    await stage.run(1.0)
    gone.cancel()
    await stage.run(1.1)
    assert stage.limits.released == [stage.limits.reserved[-1]]
    assert stage.limits.running["one"] == 1  # the first one's
    assert stage.limits.next_s("one") == 0


async def test_a_job_cancelled_right_when_its_turn_came_loses_no_slot(stage: Stage) -> None:
    stage.open(lane())
    job = stage.job()
    waiting = asyncio.ensure_future(stage.scheduler.turn(job))
    await until(lambda: job.turn.done())  # noqa: PLW0108 - `turn` is another future by then
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await stage.run()
    assert stage.limits.running["one"] == 0
    assert stage.pool.lanes[0].in_flight == 0


async def test_a_job_of_four_pictures_exchanges_a_slot_sought_for_one(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 1.0}
    stage.open(lane())
    stage.ask("first")
    stage.ask("small")
    await stage.run(0.5)
    large = stage.ask("large", images=4, priority=Priority.INTERACTIVE)
    await stage.run(0.6)
    assert large.done()
    assert large.result().slot.amounts.images == 4
    await stage.run(3.5)
    assert [name for name, _ in stage.started] == ["first", "large"]
    await stage.run(0.6)
    assert stage.started[-1][0] == "small"


async def test_a_job_of_four_pictures_has_its_turn_beside_another_callers_many_of_one(stage: Stage) -> None:
    stage.limits.spacing_s = {"a": 1.0, "b": 1.0}
    stage.open(lane("a"), lane("b"))
    stage.limits.set_next("b", 0.5)
    for _ in range(40):
        stage.ask("small", caller="bob")
    await stage.run(2.25, step_s=0.25)
    large = stage.ask("large", caller="ann", images=4)
    await stage.run(1.0, step_s=0.25)
    assert large.done()


async def test_while_one_group_exchanges_its_slot_for_a_job_the_others_serve_the_next(stage: Stage) -> None:
    stage.limits.spacing_s = {"a": 1.0, "b": 1.0}
    stage.open(lane("a"), lane("b"))
    for _ in range(4):
        stage.ask("small", caller="bob")
    await stage.run()
    stage.limits.may_release.clear()
    large = stage.ask("large", caller="ann", images=4, priority=Priority.INTERACTIVE)
    await stage.run(1.1)
    assert [name for name, _ in stage.started] == ["small"] * 3
    stage.limits.may_release.set()
    await stage.run()
    assert large.done()
    assert len(stage.limits.released) == 1


async def test_keys_of_one_organisation_share_its_slots(stage: Stage) -> None:
    stage.limits.spacing_s = {"org": 1.0}
    stage.open(lane("key-1", group="org"), lane("key-2", group="org"))
    for _ in range(20):
        stage.ask()
    await stage.run(5.1)
    assert stage.lanes_used == {"key-1": 3, "key-2": 3}


async def test_many_groups_work_side_by_side(stage: Stage) -> None:
    names = [f"u{i}" for i in range(10)]
    stage.limits.spacing_s = dict.fromkeys(names, 1.0)
    stage.open(*(lane(name) for name in names))
    for _ in range(100):
        stage.ask()
    await stage.run(4.05)
    assert stage.lanes_used == dict.fromkeys(names, 5)


# ── places ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_more_run_than_the_group_has_places_and_an_end_makes_room(stage: Stage) -> None:
    stage.open(lane(), concurrent=4, interactive_share=0.0)
    tasks = [stage.ask() for _ in range(6)]
    await stage.run(3.0)
    assert len(stage.started) == 4
    stage.finish(tasks[0].result())
    await stage.run()
    assert len(stage.started) == 5


async def test_places_kept_for_the_interactive_are_not_taken_by_others(stage: Stage) -> None:
    stage.open(lane(), concurrent=4, interactive_share=0.25)
    for _ in range(6):
        stage.ask("standard")
    await stage.run(1.0)
    assert len(stage.started) == 3
    stage.ask("vip", priority=Priority.INTERACTIVE)
    await stage.run()
    assert stage.started[-1] == ("vip", "one")
    stage.ask("vip", priority=Priority.INTERACTIVE)
    await stage.run(3.0)
    assert len(stage.started) == 4


async def test_a_group_filled_by_another_replica_is_asked_again(stage: Stage) -> None:
    stage.open(lane(), concurrent=1, interactive_share=0.0)
    stage.limits.running["one"] = 1
    waiting = stage.ask()
    await stage.run(1.0)
    assert not waiting.done()
    stage.limits.running["one"] = 0
    await stage.run(0.6)
    assert waiting.done()


# ── which upstream ──────────────────────────────────────────────────────────────────────────────────────────


async def test_the_cheapest_is_used_alone_while_it_is_in_time(stage: Stage) -> None:
    stage.limits.spacing_s = {"relay": 1.0, "direct": 1.0}
    stage.open(lane("direct"), lane("relay", price_factor=0.6))
    for _ in range(10):
        stage.ask(within_s=500.0)
    await stage.run(9.1)
    assert stage.lanes_used == {"relay": 10}


async def test_jobs_the_cheapest_would_be_late_with_go_to_the_next_dearer_as_well(stage: Stage) -> None:
    stage.limits.spacing_s = {"relay": 1.0, "direct": 1.0}
    stage.open(lane("direct"), lane("relay", price_factor=0.6))
    for _ in range(20):
        stage.ask(within_s=32.0)  # a call takes 20 s as far as anyone knows, so 12 of them are in time at the relay
    await stage.run(12.05)
    assert len(stage.started) == 20
    assert 5 <= stage.lanes_used["direct"] <= 10


async def test_a_price_that_steps_down_with_the_months_spend_changes_the_choice(stage: Stage) -> None:
    from cacheserver.generation.pool import PriceStep  # noqa: PLC0415 - for this test alone

    steps = (PriceStep(1_000, Decimal("0.5")),)
    stage.open(lane("direct"), lane("stepped", price_factor=1.2, price_steps=steps))
    stage.ask()
    await stage.run()
    stage.pool._month_spend_microusd = lambda _: 1_000
    await stage.run(1.2)
    stage.ask()
    await stage.run()
    assert [used for _, used in stage.started] == ["direct", "stepped"]
    assert stage.pool.price_factor(stage.pool.lanes[1]) == Decimal("0.60")


async def test_under_priority_the_next_rank_is_used_only_when_the_first_has_no_room(stage: Stage) -> None:
    stage.limits.spacing_s = {"first": 2.0, "second": 2.0}
    stage.open(lane("second", rank=1), lane("first"), policy=Policy.PRIORITY)
    for _ in range(4):
        stage.ask()
        await stage.run(2.0)
    assert stage.lanes_used == {"first": 4}
    for _ in range(6):
        stage.ask()
    await stage.run(6.1)
    assert stage.lanes_used["second"] == 3


async def test_under_weighted_upstreams_get_their_shares(stage: Stage) -> None:
    stage.open(lane("a", weight=3.0), lane("b", weight=1.0), policy=Policy.WEIGHTED)
    for _ in range(40):
        stage.ask()
        await stage.run()
    assert stage.lanes_used == {"a": 30, "b": 10}


async def test_under_least_latency_the_faster_is_used(stage: Stage) -> None:
    slow, fast = lane("slow"), lane("fast")
    slow.took("auto", 30.0)
    fast.took("auto", 5.0)
    stage.open(slow, fast, policy=Policy.LEAST_LATENCY)
    for _ in range(5):
        stage.ask()
        await stage.run()
    assert stage.lanes_used == {"fast": 5}


@pytest.mark.parametrize("policy", Policy)
async def test_twenty_percent_of_the_traffic_is_exactly_that(stage: Stage, policy: Policy) -> None:
    stage.open(lane("old"), lane("new", percent=20.0), policy=policy)
    for _ in range(50):
        stage.ask()
        await stage.run()
    assert stage.lanes_used == {"old": 40, "new": 10}


async def test_a_share_goes_elsewhere_while_its_upstream_is_paused_or_would_be_late(stage: Stage) -> None:
    stage.limits.spacing_s = {"new": 1_000.0}
    stage.open(lane("old"), lane("new", percent=50.0))
    for _ in range(6):
        stage.ask(within_s=100.0)
    await stage.run(2.0)
    assert stage.lanes_used == {"old": 5, "new": 1}
    await stage.pool.update("new", paused=True)
    for _ in range(4):
        stage.ask()
    await stage.run()
    assert stage.lanes_used == {"old": 9, "new": 1}


async def test_a_share_that_was_alone_for_long_gets_its_percentage_when_the_others_are_back(stage: Stage) -> None:
    stage.open(lane("old"), lane("new", percent=20.0))
    await stage.pool.update("old", paused=True)
    for _ in range(50):
        stage.ask()
    await stage.run(1.0)
    await stage.pool.update("old", paused=False)
    stage.started.clear()
    for _ in range(50):
        stage.ask()
        await stage.run()
    assert stage.lanes_used == {"old": 41, "new": 9}


async def test_each_model_goes_to_the_upstreams_that_have_it(stage: Stage) -> None:
    stage.open(lane("both", models=(MODEL, "flux")), lane("flux-only", models=("flux",), price_factor=0.5))
    stage.ask("a")
    stage.ask("b", model="flux")
    await stage.run()
    assert sorted(stage.started) == [("a", "both"), ("b", "flux-only")]


async def test_an_upstream_that_failed_a_job_is_not_given_it_again_while_there_is_another(stage: Stage) -> None:
    stage.open(lane("cheap", price_factor=0.5), lane("dear"))
    stage.ask(avoid={"cheap"})
    await stage.run()
    assert stage.lanes_used == {"dear": 1}
    await stage.pool.update("dear", paused=True)
    stage.ask(avoid={"cheap"})
    await stage.run()
    assert stage.lanes_used == {"dear": 1, "cheap": 1}


@pytest.mark.parametrize("percents", [(50.0, 50.0), (30.0, None)])
async def test_a_job_that_failed_at_one_share_goes_to_the_others(
    stage: Stage, percents: tuple[float | None, ...]
) -> None:
    stage.open(*(lane(name, percent=percent) for name, percent in zip("ab", percents, strict=True)))
    await stage.pool.update("a" if percents[1] else "b", paused=percents[1] is None)
    stage.ask(avoid={"a"} if percents[1] else set())
    await stage.run(2.0)
    assert stage.lanes_used == ({"b": 1} if percents[1] else {"a": 1})


async def test_a_job_that_failed_where_it_is_free_is_served_late_at_its_share(stage: Stage) -> None:
    stage.limits.spacing_s = {"relay": 30.0}
    stage.open(lane("direct"), lane("relay", percent=20.0))
    for _ in range(3):
        stage.ask(avoid={"direct"}, within_s=25.0)
    await stage.run(61.0, step_s=0.5)
    assert stage.lanes_used == {"relay": 3}


async def test_slots_sought_where_a_job_has_failed_do_not_count_for_it(stage: Stage) -> None:
    stage.limits.spacing_s, stage.limits.silent = {"relay": 30.0}, {"direct"}
    stage.open(lane("direct"), lane("relay", percent=20.0, price_factor=1.2))
    for _ in range(3):
        stage.ask(avoid={"direct"}, within_s=25.0)
    await stage.run(29.0, step_s=0.5)
    gone = stage.ask()
    await stage.run(0.5)
    gone.cancel()
    await stage.run(31.0, step_s=0.5)
    assert stage.lanes_used == {"relay": 3}


async def test_a_job_that_failed_where_it_is_free_is_served_by_its_share_that_was_out(stage: Stage) -> None:
    stage.limits.spacing_s = {"direct": 1_000.0, "relay": 5.0}
    stage.open(lane("direct"), lane("relay", percent=20.0))
    stage.ask("direct's only slot")
    for _ in range(3):
        stage.ask(avoid={"direct"})
    await stage.run(1.0)
    await stage.pool.update("relay", paused=True)
    await stage.run(1.0)
    await stage.pool.update("relay", paused=False)
    await stage.run(9.0)
    assert stage.lanes_used == {"direct": 1, "relay": 3}


async def test_a_share_that_came_back_serves_the_model_that_only_it_has(stage: Stage) -> None:
    stage.open(lane("both", models=(MODEL, "flux"), percent=50.0), lane("flux-only", models=("flux",)))
    fail(stage, "both", UpstreamDownError("down"), 3)
    stage.ask()
    await stage.run(2.0)
    assert stage.lanes_used == {"both": 1}
    assert stage.scheduler.wait_s(MODEL, Priority.STANDARD) == 0


async def test_jobs_that_wait_are_taken_by_a_share_when_all_others_have_left(stage: Stage) -> None:
    stage.limits.spacing_s = {"free": 1_000.0}
    stage.open(lane("free"), lane("fifth", percent=20.0))
    for _ in range(4):
        stage.ask()
    await stage.run()
    assert stage.lanes_used == {"free": 1}
    await stage.pool.update("free", paused=True)
    await stage.run(1.0)
    assert stage.lanes_used == {"free": 1, "fifth": 3}


async def test_what_is_late_at_its_share_is_still_served_where_there_are_only_shares(stage: Stage) -> None:
    stage.limits.spacing_s = {"a": 50.0, "b": 50.0}
    stage.open(lane("a", percent=50.0), lane("b", percent=50.0))
    for _ in range(4):
        stage.ask(within_s=60.0)
    await stage.run(60.0, step_s=0.5)
    assert len(stage.started) == 4


async def test_a_full_group_is_not_asked_again_and_again_for_an_interactive_job_of_another(stage: Stage) -> None:
    stage.limits.spacing_s = {"other": 1_000.0}
    stage.open(lane("full"), lane("other", models=("flux",)), concurrent=4, interactive_share=0.25)
    for _ in range(5):
        stage.ask("standard")
    stage.ask("flux", model="flux")
    await stage.run()
    reserved = len(stage.limits.reserved)
    stage.ask("vip", model="flux", priority=Priority.INTERACTIVE)
    await stage.run(0.4)
    assert len(stage.limits.reserved) <= reserved + 1


async def test_a_model_with_a_long_queue_makes_another_models_jobs_no_later(stage: Stage) -> None:
    stage.limits.spacing_s = {"a": 1.0}
    stage.open(lane("a"), lane("flux", models=("flux",)))
    for _ in range(100):
        stage.ask()
    await stage.run(0.1)
    assert stage.scheduler.wait_s("flux", Priority.STANDARD) == 0
    assert stage.scheduler.wait_s(MODEL, Priority.STANDARD) > 90


async def test_jobs_pass_by_a_lane_whose_trial_call_hangs(stage: Stage) -> None:
    stage.open(lane("trial", price_factor=0.5), lane("dear"))
    stage.pool.lanes[0].is_on_trial = True
    hanging = stage.ask("hangs")
    await stage.run()
    assert hanging.result().lane.name == "trial"
    for _ in range(5):
        stage.ask()
    await stage.run(2.0)
    assert stage.lanes_used == {"trial": 1, "dear": 5}


@pytest.mark.parametrize("percent", [20.0, None])
async def test_a_trial_call_that_hangs_holds_up_no_job_beside_a_share(stage: Stage, percent: float | None) -> None:
    trial, other = lane("trial", percent=percent), lane("other", percent=None if percent else 20.0)
    trial.is_on_trial, trial.credit = True, 1.0
    stage.open(trial, other)
    for _ in range(10):
        stage.ask()
    await stage.run(1.2)
    assert stage.lanes_used == {"trial": 1, "other": 9}
    for _ in range(10):
        stage.ask()
    await stage.run(0.1)
    assert stage.lanes_used == {"trial": 1, "other": 19}
    assert stage.scheduler.wait_s(MODEL, Priority.STANDARD) == 0


async def test_a_job_goes_back_to_who_failed_it_while_the_others_trial_call_hangs(stage: Stage) -> None:
    stage.open(lane("cheap", price_factor=0.5), lane("dear"))
    stage.pool.lanes[1].is_on_trial = True
    for _ in range(2):
        stage.ask(avoid={"cheap"})
    await stage.run(1.0)
    assert stage.lanes_used == {"dear": 1, "cheap": 1}


@pytest.mark.parametrize("percent", [20.0, None])
@pytest.mark.parametrize("avoid", [{"one"}, set[str]()])
async def test_a_job_whose_only_upstream_is_on_trial_waits_for_it(
    stage: Stage, percent: float | None, avoid: set[str]
) -> None:
    stage.open(lane(percent=percent))
    stage.pool.lanes[0].is_on_trial = True
    first, second = stage.ask("a", avoid=avoid), stage.ask("b", avoid=avoid)
    await stage.run(30.0, step_s=0.5)
    assert (first.done(), second.done()) == (True, False)
    stage.finish(first.result())
    await stage.run()
    third = stage.ask("c", avoid=avoid)
    await stage.run(0.1)
    assert (second.done(), third.done()) == (True, False)
    stage.finish(second.result())
    await stage.run()
    assert third.done()


async def test_limits_that_break_are_asked_again_in_a_while_and_the_jobs_wait(stage: Stage) -> None:
    stage.open(lane())
    stage.limits.fault = RuntimeError("a bug")
    waiting = stage.ask()
    await stage.run(2.0)
    assert 3 <= stage.limits.asked <= 6
    stage.limits.fault = None
    await stage.run(1.0)
    assert waiting.result().lane.name == "one"


async def test_jobs_are_looked_at_again_however_they_come_and_go(stage: Stage) -> None:
    down = lane()
    stage.open(down)
    for _ in range(20):
        down.upstream.fail_next(UpstreamDownError("down"))  # type: ignore[attr-defined] # the fake's
    fail(stage, "one", UpstreamDownError("down"), 3)
    first = stage.ask()
    await stage.run()
    first.cancel()
    waiting = stage.ask()
    await stage.run(17.0)
    with pytest.raises(UpstreamDownError):
        await waiting


async def test_jobs_are_looked_at_again_if_one_comes_just_when_the_queue_was_found_empty(stage: Stage) -> None:
    down = lane()
    stage.open(down, concurrent=1, interactive_share=0.0)

    def watcher_wakes_and_one_comes() -> None:
        stage.limits.on_reserve = lambda: None
        stage.clock.advance(1.0)
        stage.ask("second")

    loop = asyncio.get_running_loop()
    stage.limits.on_reserve = lambda: loop.call_soon(watcher_wakes_and_one_comes)
    stage.ask("first")
    await stage.run()
    assert [name for name, _ in stage.started] == ["first"]
    for _ in range(20):
        down.upstream.fail_next(UpstreamDownError("down"))  # type: ignore[attr-defined] # the fake's
    fail(stage, "one", UpstreamDownError("down"), 3)
    await stage.run(17.0)
    assert isinstance(stage.tasks[-1].done() and stage.tasks[-1].exception(), UpstreamDownError)


async def test_a_job_hastened_while_it_is_called_is_urgent_when_it_comes_back(stage: Stage) -> None:
    stage.open(lane())
    job = stage.job(priority=Priority.BATCH)
    turn = await stage.scheduler.turn(job)
    stage.scheduler.hasten(job, priority=Priority.INTERACTIVE, deadline_s=5.0)
    stage.finish(turn)
    assert (job.priority, job.deadline_s) == (Priority.INTERACTIVE, 5.0)


# ── upstreams that leave and come back ──────────────────────────────────────────────────────────────────────


def fail(stage: Stage, name: str, error: UpstreamError, times: int = 1) -> Lane:
    failed = next(each for each in stage.pool.lanes if each.name == name)
    for _ in range(times):
        stage.pool.failed(failed, error)
    return failed


async def test_jobs_wait_a_while_for_the_only_upstream_and_go_on_when_it_is_back(stage: Stage) -> None:
    stage.open(lane())
    fail(stage, "one", UpstreamDownError("down"), 3)
    waiting = stage.ask()
    await stage.run()
    assert not waiting.done()
    await stage.run(0.6)  # the first probe finds it well
    assert waiting.done()
    assert waiting.result().lane.name == "one"


async def test_nobody_waits_for_upstreams_that_stay_down(stage: Stage) -> None:
    down = lane()
    stage.open(down)
    for _ in range(20):
        down.upstream.fail_next(UpstreamDownError("down"))  # type: ignore[attr-defined] # the fake's
    fail(stage, "one", UpstreamDownError("down"), 3)
    waiting = stage.ask()
    await stage.run(14.0)
    assert not waiting.done()
    await stage.run(3.0)
    with pytest.raises(UpstreamDownError, match="one is down"):
        await waiting
    late = stage.ask()
    await stage.run()
    with pytest.raises(UpstreamDownError) as caught:
        await late
    assert caught.value.retry_after_s is not None


@pytest.mark.parametrize(
    ("error", "told"),
    [(UpstreamQuotaError("x"), UpstreamQuotaError), (UpstreamNotEntitledError("x"), UpstreamNotEntitledError)],
)
async def test_nobody_waits_for_what_a_person_must_mend(stage: Stage, error: UpstreamError, told: type) -> None:
    only = lane()
    only.has_succeeded = False
    stage.open(only)
    fail(stage, "one", error)
    refused = stage.ask()
    await stage.run()
    with pytest.raises(told):
        await refused


async def test_jobs_that_wait_move_on_when_their_upstream_leaves(stage: Stage) -> None:
    stage.limits.spacing_s = {"cheap": 50.0}
    stage.open(lane("cheap", price_factor=0.5), lane("dear"))
    stage.ask(within_s=10_000.0)
    waiting = stage.ask(within_s=10_000.0)
    await stage.run(1.0)
    assert not waiting.done()
    fail(stage, "cheap", UpstreamQuotaError("x"))
    await stage.run()
    assert waiting.result().lane.name == "dear"


async def test_what_comes_back_from_a_lack_of_money_gets_one_call_until_that_succeeds(stage: Stage) -> None:
    stage.open(lane())
    back = fail(stage, "one", UpstreamQuotaError("x"))
    await stage.run(3_601.0, step_s=100.0)
    first, second = stage.ask("a"), stage.ask("b")
    await stage.run(2.0)
    assert (first.done(), second.done()) == (True, False)
    stage.pool.succeeded(back, quality="auto", seconds=3.0)
    stage.finish(first.result())
    await stage.run()
    assert second.done()


# ── waits, urgency, the end ─────────────────────────────────────────────────────────────────────────────────


async def test_the_expected_wait_counts_who_is_before(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 2.0}
    stage.open(lane())
    assert stage.scheduler.wait_s(MODEL, Priority.STANDARD) == 0
    for _ in range(11):
        stage.ask()
    await stage.run(0.3)
    assert stage.scheduler.wait_s(MODEL, Priority.STANDARD) == pytest.approx(4 + 20, abs=2.5)
    assert stage.scheduler.wait_s(MODEL, Priority.INTERACTIVE) < 5


async def test_a_hastened_job_overtakes(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 1.0}
    stage.open(lane())
    stage.ask("first")
    for _ in range(5):
        stage.ask("other")
    job = stage.job("slow", priority=Priority.WARM_UP)
    slow = asyncio.ensure_future(stage.scheduler.turn(job))
    await stage.run(0.5)
    stage.scheduler.hasten(job, priority=Priority.INTERACTIVE, deadline_s=5.0)
    await stage.run(0.6)
    assert slow.done()


async def test_who_waits_at_the_end_is_turned_away_and_slots_are_given_back(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 5.0}
    stage.open(lane())
    stage.ask("first")
    waiting = stage.ask()
    await stage.run()
    await stage.scheduler.aclose()
    with pytest.raises(ShuttingDownError):
        await waiting
    with pytest.raises(ShuttingDownError):
        await stage.scheduler.turn(stage.job())
    assert stage.limits.running["one"] == 1


async def test_a_full_queue_says_when_to_come_back(stage: Stage) -> None:
    stage.limits.spacing_s = {"one": 10.0}
    stage.open(lane(), queue_max=3)
    for _ in range(4):
        stage.ask()
        await stage.run()
    with pytest.raises(QueueFullError) as caught:
        await stage.scheduler.turn(stage.job())
    assert caught.value.retry_after_s == pytest.approx(40, abs=11)
