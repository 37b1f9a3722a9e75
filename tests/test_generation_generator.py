"""The miss path: what is set aside, sent, written down and paid, whatever comes of a call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.control.budgets import LocalBudgets
from cacheserver.errors import (
    CannotAffordError,
    InvalidRequestError,
    LedgerUnavailableError,
    PromptRefusedError,
    QueueFullError,
    UpstreamBadImageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamInvalidError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
from cacheserver.generation.generator import Generator
from cacheserver.generation.pool import Lane
from cacheserver.generation.prices import PriceTable
from cacheserver.interfaces import Generation
from cacheserver.model import (
    Attempt,
    AttemptOutcome,
    Budget,
    BudgetPeriod,
    BudgetScope,
    GeneratedImage,
    GroupLimits,
    ImageRequest,
    Order,
    PartialImage,
    Priority,
)
from tests.fakes import FakeClock
from tests.miss_path import MemoryLedger, build_generator, lanes
from tests.provider import FakeUpstream
from tests.waiting import until

CAT = ImageRequest("a cat", "gpt-image-2", size="1024x1024", quality="medium")
COST = 53_000
SETTLED, NOT_BILLED, UNKNOWN = AttemptOutcome.SETTLED, AttemptOutcome.NOT_BILLED, AttemptOutcome.UNKNOWN


class MissPath:
    """A generator over fake upstreams, its money and its ledger, and what it told its caller."""

    def __init__(self, clock: FakeClock, *names: str, terms: dict[str, Any] | None = None, **settings: Any) -> None:
        self.clock = clock
        self.books = CounterBooks(clock=clock, registry=CollectorRegistry())
        self.ledger = MemoryLedger()
        self.budgets = LocalBudgets(budgets=settings.pop("budget", ()), spent=(), clock=clock, books=self.books)
        self.upstreams = {name: FakeUpstream(name, cost_microusd=COST) for name in names or ("one",)}
        self.lanes: list[Lane] = lanes(list(self.upstreams.values()), ["gpt-image-2"], **(terms or {}))
        self.generator = build_generator(
            self.lanes, clock=clock, books=self.books, ledger=self.ledger, budgets=self.budgets, **settings
        )
        self.spending = 0
        self.spares: list[GeneratedImage] = []
        self.partials: list[PartialImage] = []

    @property
    def one(self) -> FakeUpstream:
        return next(iter(self.upstreams.values()))

    @property
    def calls(self) -> dict[str, int]:
        return {name: each.calls for name, each in self.upstreams.items()}

    async def make(self, request: ImageRequest = CAT, *, n: int = 1, **facts: Any) -> list[GeneratedImage]:
        order = Order(request, n, **{"namespace": "shop", "caller": "ann", **facts})
        return await self.generator.generate(
            order,
            range(n),
            on_spending=self._spend,
            on_spare=self.spares.append,
            on_partial=self.partials.append if order.partial_images else None,
        )

    async def make_with_pauses(self, request: ImageRequest = CAT, **facts: Any) -> list[GeneratedImage]:
        """Make it while time passes, so that pauses between tries end."""
        making = asyncio.create_task(self.make(request, **facts))
        while not making.done():
            await asyncio.sleep(0)
            self.clock.advance(0.1)
        return making.result()

    async def settled(self) -> list[Attempt]:
        """The rows, once every call is written down."""
        await self.generator.settled()
        return list(self.ledger.attempts.values())

    async def outcomes(self) -> list[AttemptOutcome]:
        return [row.outcome for row in await self.settled()]

    async def closing(self) -> asyncio.Task[None]:
        """A closing that has come as far as it can while calls run."""
        closing = asyncio.create_task(self.generator.aclose(300))
        await until(lambda: self.generator._scheduler._closing)
        for _ in range(20):
            await asyncio.sleep(0)
        return closing

    def _spend(self) -> None:
        self.spending += 1


def day(limit: int, scope: BudgetScope = BudgetScope.GLOBAL, subject: str = "") -> Budget:
    return Budget(scope, subject, BudgetPeriod.DAY, limit)


# ── partial pictures ────────────────────────────────────────────────────────────────────────────────────────


async def test_the_partial_pictures_of_every_try_are_passed_on(clock: FakeClock) -> None:
    path = MissPath(clock)
    path.one.partials = [b"coarse", b"finer"]
    path.one.fail_next(UpstreamDownError("500"))
    await path.make_with_pauses(partial_images=2)
    assert [partial.index for partial in path.partials] == [0, 1, 0, 1]
    assert path.one.partials_asked == [2, 2]


@pytest.mark.parametrize("facts", [{"n": 2}, {"candidates": 2}, {"n": 3, "candidates": 2}])
async def test_of_several_pictures_no_partial_ones_are_asked_for(clock: FakeClock, facts: dict[str, Any]) -> None:
    path = MissPath(clock, terms={"max_n": 1})
    await path.make(partial_images=2, **facts)
    assert set(path.one.partials_asked) == {0}
    assert set(path.one.on_partials) == {None}


async def test_a_budget_has_room_for_partial_pictures_or_there_is_no_call(clock: FakeClock) -> None:
    plain = MissPath(clock).generator.estimate_microusd(CAT, 1)
    path = MissPath(clock, budget=[day(plain + 8_999)])
    with pytest.raises(CannotAffordError):
        await path.make(partial_images=3)  # 300 output tokens: 9,000 micro-dollars
    assert path.one.calls == 0
    await path.make(partial_images=2)
    assert [row.estimate_microusd for row in await path.settled()] == [plain + 6_000]


# ── one call ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_pictures_come_from_the_models_upstream_in_one_call(clock: FakeClock) -> None:
    path = MissPath(clock)
    images = await path.make(n=3)
    assert len({image.sha256 for image in images}) == 3
    assert path.one.asked == [(CAT, (0, 1, 2))]
    assert path.spending == 1


async def test_the_row_is_open_before_the_first_byte_and_closed_with_what_it_cost(clock: FakeClock) -> None:
    path = MissPath(clock)
    path.one.hold()
    making = asyncio.create_task(path.make(n=2, tags=("spring",)))
    await path.one.arrived(1)
    (sent,) = path.ledger.attempts.values()
    assert sent.outcome is AttemptOutcome.SENT
    assert (sent.namespace, sent.caller, sent.tags, sent.upstream) == ("shop", "ann", ("spring",), "one")
    assert sent.estimate_microusd == PriceTable.load().estimate_microusd(CAT, 2) >= 106_000
    clock.advance(7.0)
    path.one.release()
    await making
    (row,) = await path.settled()
    assert row == replace(
        sent,
        outcome=SETTLED,
        end_time_s=clock.now_s(),
        cost_microusd=2 * COST,
        reason="ok",
        upstream_request_id="one-0",
    )
    assert path.books.snapshot(None).total.spent_microusd == 2 * COST


async def test_what_cannot_be_written_down_is_not_bought(clock: FakeClock) -> None:
    path = MissPath(clock, budget=[day(300_000)])

    async def full(_: Attempt) -> None:
        raise LedgerUnavailableError("disk full")

    path.ledger.open = full  # type: ignore[method-assign] # a fault
    with pytest.raises(LedgerUnavailableError):
        await path.make()
    await path.settled()
    assert (path.one.calls, path.spending) == (0, 0)
    (state,) = await path.budgets.states()
    assert (state.spent_microusd, state.reserved_microusd) == (0, 0)


async def test_money_that_was_still_being_marked_as_sent_when_the_ledger_failed_is_given_back(
    clock: FakeClock,
) -> None:
    path = MissPath(clock, budget=[day(300_000)])
    marked = asyncio.Event()

    async def full(_: Attempt) -> None:
        raise LedgerUnavailableError("disk full")

    async def slow(attempt_id: str) -> None:
        await marked.wait()
        await LocalBudgets.sent(path.budgets, attempt_id)

    path.ledger.open = full  # type: ignore[method-assign] # a fault
    path.budgets.sent = slow  # type: ignore[method-assign] # a fault
    making = asyncio.create_task(path.make())
    await until(lambda: path.generator._scheduler._queue.depth[Priority.STANDARD] == 0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert not making.done()
    marked.set()
    with pytest.raises(LedgerUnavailableError):
        await making
    await path.settled()
    (state,) = await path.budgets.states()
    assert (state.spent_microusd, state.reserved_microusd) == (0, 0)


async def test_an_unknown_model_is_refused_with_the_ones_there_are(clock: FakeClock) -> None:
    path = MissPath(clock)
    with pytest.raises(InvalidRequestError) as caught:
        await path.make(ImageRequest("a cat", "secret-model"))
    assert caught.value.violations == {"spec.model": "not served here; there are: gpt-image-2"}
    assert path.ledger.opened == []


async def test_more_pictures_than_one_call_takes_are_several_calls_and_rows(clock: FakeClock) -> None:
    path = MissPath(clock, terms={"max_n": 4})
    images = await path.make(n=10)
    assert len({image.sha256 for image in images}) == 10
    assert sorted(row.images for row in await path.settled()) == [2, 4, 4]


async def test_a_failed_call_does_not_cost_its_sisters_pictures(clock: FakeClock) -> None:
    path = MissPath(clock, terms={"max_n": 2})
    path.one.fail_next(UpstreamInvalidError("no"))
    assert len(await path.make(n=4)) == 2


async def test_money_is_spent_when_its_turn_has_come_and_not_before(clock: FakeClock) -> None:
    path = MissPath(clock, limits={"one": GroupLimits(concurrent=1)})
    path.one.hold()
    first = asyncio.create_task(path.make())
    await path.one.arrived(1)
    second = asyncio.create_task(path.make())
    await until(lambda: path.generator.queue_depth == {Priority.STANDARD: 1})
    assert (path.spending, len(path.ledger.opened)) == (1, 1)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    path.one.release()
    await first
    assert await path.outcomes() == [SETTLED]


async def test_a_queued_call_that_is_cancelled_gives_its_money_back(clock: FakeClock) -> None:
    path = MissPath(clock, limits={"one": GroupLimits(concurrent=1)}, budget=[day(10_000_000)])
    path.one.hold()
    first = asyncio.create_task(path.make())
    await path.one.arrived(1)
    second = asyncio.create_task(path.make())
    await until(lambda: bool(path.generator.queue_depth))
    second.cancel()
    await asyncio.wait({second})
    path.one.release()
    await first
    await path.settled()
    (state,) = await path.budgets.states()
    assert (state.spent_microusd, state.reserved_microusd) == (COST, 0)


async def test_a_call_cut_off_by_our_own_end_is_unknown_and_never_free(clock: FakeClock) -> None:
    path = MissPath(clock, budget=[day(10_000_000)])
    path.one.hold()
    running = asyncio.create_task(path.make())
    await path.one.arrived(1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    (row,) = await path.settled()
    assert (row.outcome, row.reason, row.cost_microusd) == (UNKNOWN, "SHUTTING_DOWN", row.estimate_microusd)
    (state,) = await path.budgets.states()
    assert state.spent_microusd == row.estimate_microusd
    assert path.books.snapshot(None).total.unknown_microusd == row.estimate_microusd


async def test_a_failure_nobody_foresaw_is_unknown_too(clock: FakeClock) -> None:
    path = MissPath(clock)

    async def break_down() -> None:
        raise ZeroDivisionError

    path.one.during = break_down
    with pytest.raises(ZeroDivisionError):
        await path.make()
    (row,) = await path.settled()
    assert (row.outcome, row.reason) == (UNKNOWN, "INTERNAL")


async def test_a_call_whose_price_nobody_says_counts_as_the_most_it_can_cost(clock: FakeClock) -> None:
    path = MissPath(clock, budget=[day(10_000_000)], terms={"max_cost_microusd": 400_000})
    path.one.is_priced = False
    (image,) = await path.make()
    assert image.paid_microusd == 400_000
    (row,) = await path.settled()
    assert (row.outcome, row.reason, row.cost_microusd) == (UNKNOWN, "ok", 400_000)
    (state,) = await path.budgets.states()
    assert state.spent_microusd == 400_000


async def test_the_pictures_of_calls_cut_off_by_our_own_end_are_kept_if_they_came(clock: FakeClock) -> None:
    path = MissPath(clock, "a", terms={"max_n": 1})
    arrived = 0

    async def only_the_first() -> None:
        nonlocal arrived
        arrived += 1
        if arrived > 1:
            await asyncio.Event().wait()

    path.one.during = only_the_first
    making = asyncio.create_task(path.make(n=3))
    await until(lambda: arrived == 3)
    making.cancel()
    await asyncio.wait({making})
    assert sorted(await path.outcomes()) == sorted([SETTLED, UNKNOWN, UNKNOWN])
    assert len(path.spares) == 1


# ── retries ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "calls", "outcome"),
    [
        (UpstreamDownError("500"), 3, NOT_BILLED),
        (UpstreamDownError("reset", cost_microusd=None), 2, UNKNOWN),
        (UpstreamBadImageError("blank", cost_microusd=COST), 3, SETTLED),
        (UpstreamBadImageError("html", cost_microusd=None), 2, UNKNOWN),
        (PromptRefusedError("no"), 1, NOT_BILLED),
        (PromptRefusedError("no", after_seeing=True, cost_microusd=None), 1, UNKNOWN),
        (UpstreamInvalidError("no"), 1, NOT_BILLED),
        (UpstreamQuotaError("no"), 1, NOT_BILLED),
    ],
    ids=["5xx", "reset", "bad picture", "unreadable", "prompt refused", "picture refused", "invalid", "no money"],
)
@pytest.mark.parametrize("upstreams", [1, 3])
async def test_each_class_of_failure_has_its_number_of_tries(
    clock: FakeClock, error: UpstreamError, calls: int, outcome: AttemptOutcome, upstreams: int
) -> None:
    path = MissPath(clock, *"abc"[:upstreams])
    for upstream in path.upstreams.values():
        for _ in range(9):
            upstream.fail_next(error)
    with pytest.raises(type(error)):
        await path.make_with_pauses()
    expected = upstreams if isinstance(error, UpstreamQuotaError) else calls
    assert sum(path.calls.values()) == expected
    rows = await path.settled()
    assert [row.outcome for row in rows] == [outcome] * expected
    assert all(
        row.cost_microusd == (row.estimate_microusd if outcome is UNKNOWN else error.cost_microusd) for row in rows
    )
    if upstreams == 3:
        assert max(path.calls.values()) == 1  # each try at another one


async def test_what_fails_once_succeeds_elsewhere_at_once(clock: FakeClock) -> None:
    path = MissPath(clock, "a", "b")
    path.upstreams["a"].fail_next(UpstreamDownError("500"))
    assert len(await path.make()) == 1  # no time passed
    assert path.calls == {"a": 1, "b": 1}


async def test_a_rate_limit_is_waited_for_as_long_as_it_takes_and_never_told(clock: FakeClock) -> None:
    path = MissPath(clock)
    for _ in range(12):
        path.one.fail_next(UpstreamLimitedError("slow down", retry_after_s=3.0))
    assert len(await path.make_with_pauses()) == 1
    assert path.one.calls == 13
    assert clock.monotonic_s() >= 36
    assert (await path.outcomes()).count(NOT_BILLED) == 12


async def test_a_rate_limited_call_goes_to_another_upstream_meanwhile(clock: FakeClock) -> None:
    path = MissPath(clock, "a", "b")
    path.upstreams["a"].fail_next(UpstreamLimitedError("slow down", retry_after_s=3.0))
    assert len(await path.make()) == 1
    assert path.calls == {"a": 1, "b": 1}


async def test_three_rate_limits_and_never_a_success_are_a_missing_right(clock: FakeClock) -> None:
    path = MissPath(clock)
    path.lanes[0].has_succeeded = False
    for _ in range(9):
        path.one.fail_next(UpstreamLimitedError("slow down", retry_after_s=0.1))
    with pytest.raises(UpstreamNotEntitledError):
        await path.make_with_pauses()
    assert path.one.calls == 3
    with pytest.raises(UpstreamNotEntitledError):
        await path.make()
    assert path.one.calls == 3


async def test_an_outage_does_not_become_a_storm(clock: FakeClock) -> None:
    path = MissPath(clock, *"abc")

    async def fail() -> None:
        raise UpstreamDownError("500")

    for upstream in path.upstreams.values():
        upstream.during = fail
    for _ in range(300):
        with pytest.raises(UpstreamError):
            await path.make_with_pauses()
    assert sum(path.calls.values()) <= 300 + 100 + 30


async def test_a_refusal_is_remembered_and_costs_no_second_call(clock: FakeClock) -> None:
    path = MissPath(clock)
    path.one.fail_next(PromptRefusedError("its moderation refuses the prompt"))
    for is_cached in (False, True):
        with pytest.raises(PromptRefusedError) as caught:
            await path.make(replace(CAT, quality="low" if is_cached else "high"))
        assert caught.value.cached is is_cached
    assert path.one.calls == 1


# ── budgets ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_call_that_a_budget_does_not_allow_is_not_made_and_names_what_would_be_cheaper(
    clock: FakeClock,
) -> None:
    path = MissPath(clock, budget=[day(40_000, BudgetScope.NAMESPACE, "shop")])
    with pytest.raises(CannotAffordError) as caught:
        await path.make(replace(CAT, quality="high"))
    assert caught.value.budget == "namespace:shop/day"
    assert [rung.quality for rung in caught.value.rungs] == ["medium", "low"]
    assert (path.one.calls, path.ledger.opened) == (0, [])
    assert len(await path.make(replace(CAT, quality="high"), namespace="other")) == 1


async def test_money_that_is_gone_when_the_call_is_to_be_sent_is_not_spent_and_names_what_would_be_cheaper(
    clock: FakeClock,
) -> None:
    path = MissPath(clock, budget=[day(300_000)])

    async def spent_by_others(_: str) -> None:
        raise CannotAffordError("global/day", reset_time_s=0)

    path.budgets.sent = spent_by_others  # type: ignore[method-assign] # as when others took this replica for dead
    with pytest.raises(CannotAffordError) as caught:
        await path.make(replace(CAT, quality="high"))
    assert [rung.quality for rung in caught.value.rungs] == ["medium", "low"]
    assert await path.outcomes() == [NOT_BILLED]
    assert (path.one.calls, path.spending) == (0, 0)
    (state,) = await path.budgets.states()
    assert (state.spent_microusd, state.reserved_microusd) == (0, 0)


async def test_a_failed_call_takes_nothing_from_the_budget(clock: FakeClock) -> None:
    path = MissPath(clock, budget=[day(COST + 1_000)])
    for _ in range(5):
        path.one.fail_next(UpstreamInvalidError("no"))
        with pytest.raises(UpstreamInvalidError):
            await path.make(replace(CAT, seed=path.one.calls))
        await path.generator.settled()
    assert len(await path.make()) == 1


async def test_an_upstreams_own_upper_bound_goes_before_the_price_list(clock: FakeClock) -> None:
    path = MissPath(clock, terms={"max_cost_microusd": 400_000})
    assert path.generator.estimate_microusd(CAT, 2) == 800_000


async def test_the_estimate_is_that_of_the_dearest_upstream(clock: FakeClock) -> None:
    path = MissPath(clock, terms={"price_factor": 0.6})
    list_price = PriceTable.load().estimate_microusd(CAT, 1)
    assert path.generator.estimate_microusd(CAT, 1) == pytest.approx(0.6 * list_price, abs=1)
    await path.make()
    assert path.one.price_factors == [Decimal("0.6")]
    assert path.generator.estimate_microusd(ImageRequest("a cat", "nobodys"), 3) == 0


async def test_what_it_may_cost_where_the_cheapest_upstream_makes_it_is_known_too(clock: FakeClock) -> None:
    path = MissPath(clock, "dear", "cheap")
    path.lanes[1].terms = replace(path.lanes[1].terms, price_factor=Decimal("0.5"))
    list_price = PriceTable.load().estimate_microusd(CAT, 1)
    generator = build_generator(path.lanes, clock=clock, books=path.books)
    assert generator.estimate_microusd(CAT, 1) == list_price
    assert generator.cheapest_microusd(CAT, 1) == pytest.approx(list_price / 2, abs=1)
    assert generator.cheapest_microusd(ImageRequest("a cat", "nobodys"), 3) == 0


async def test_the_outlook_is_what_the_models_groups_allow_together(clock: FakeClock) -> None:
    limits = {name: GroupLimits(images_per_minute=50) for name in ("one", "two")}
    bounded = MissPath(clock, "one", "two", limits=limits).generator.outlook(CAT)
    assert bounded.groups == {"one", "two"}
    assert bounded.images_per_minute == pytest.approx(100, rel=0.05)
    unbounded = MissPath(clock, "one", "two", limits={"one": limits["one"]}).generator.outlook(CAT)
    assert (unbounded.images_per_minute, unbounded.call_s) == (None, 20.0)
    with pytest.raises(InvalidRequestError):
        MissPath(clock).generator.outlook(ImageRequest("a cat", "nobodys"))


# ── the best of several, and two for one ────────────────────────────────────────────────────────────────────


class ByNumber:
    """A scorer that likes the picture with the highest number best."""

    async def score(self, request: ImageRequest, image: GeneratedImage) -> float:
        assert request == CAT
        return int(image.upstream_request_id.rpartition("-")[2]) / 10


async def test_of_three_candidates_the_best_is_the_answer_and_the_others_are_spare(clock: FakeClock) -> None:
    path = MissPath(clock, scorer=ByNumber())
    (best,) = await path.make(candidates=3)
    assert (best.upstream_request_id, best.score, best.won_against) == ("one-2", 0.2, 2)
    assert [spare.upstream_request_id for spare in path.spares] == ["one-1", "one-0"]
    (row,) = await path.settled()
    assert (row.images, row.cost_microusd) == (3, 3 * COST)


async def test_each_of_two_pictures_is_the_best_of_its_own_three(clock: FakeClock) -> None:
    path = MissPath(clock, scorer=ByNumber())
    best = await path.make(n=2, candidates=3)
    assert [image.upstream_request_id for image in best] == ["one-2", "one-5"]
    assert len(path.spares) == 4


async def hedging(clock: FakeClock) -> tuple[MissPath, asyncio.Task[list[GeneratedImage]]]:
    """A path whose first call takes far beyond the p99, at an upstream that always took 10 s."""
    path = MissPath(clock, "slow", "other", hedge_after_p99=2.0)
    for _ in range(30):
        path.lanes[0].took("medium", 10.0)
    path.upstreams["slow"].hold()
    making = asyncio.create_task(path.make())
    await path.upstreams["slow"].arrived(1)
    await until(lambda: clock.sleepers > 0)
    clock.advance(19.0)
    await asyncio.sleep(0)
    assert path.calls == {"slow": 1, "other": 0}
    clock.advance(2.0)
    return path, making


async def test_a_call_far_beyond_the_p99_is_made_once_more_elsewhere_and_the_late_picture_is_spare(
    clock: FakeClock,
) -> None:
    path, making = await hedging(clock)
    (image,) = await making
    assert image.upstream == "other"
    path.upstreams["slow"].release()
    await path.generator.settled()
    assert [spare.upstream for spare in path.spares] == ["slow"]
    assert await path.outcomes() == [SETTLED, SETTLED]


async def test_a_call_that_lost_to_its_hedge_has_what_is_left_of_the_drain_time(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacheserver.generation.generator._CLOSING_S", 0.0)
    path, making = await hedging(clock)
    await making
    closing = await path.closing()
    path.upstreams["slow"].release()
    await closing
    assert [spare.upstream for spare in path.spares] == ["slow"]
    assert path.ledger.outcomes == [SETTLED, SETTLED]
    assert path.generator._scheduler._tasks._tasks == set()


async def test_closing_that_is_cancelled_leaves_no_call_running_and_lets_go_of_the_upstreams(clock: FakeClock) -> None:
    path, making = await hedging(clock)
    await making
    closing = await path.closing()
    closing.cancel()
    await asyncio.wait({closing})
    assert closing.cancelled()
    assert path.generator._tasks._tasks == set()
    assert sorted(path.ledger.outcomes) == [SETTLED, AttemptOutcome.UNKNOWN]
    assert all(each.closed for each in path.upstreams.values())


async def test_a_hedge_that_fails_costs_the_first_call_nothing(clock: FakeClock) -> None:
    path, making = await hedging(clock)
    path.upstreams["other"].fail_next(UpstreamDownError("500"))
    await path.upstreams["other"].arrived(1)
    path.upstreams["slow"].release()
    (image,) = await making
    assert image.upstream == "slow"
    assert path.spares == []


async def test_a_hedge_that_still_waits_when_the_answer_comes_is_never_made(clock: FakeClock) -> None:
    path = MissPath(clock, "slow", "other", hedge_after_p99=2.0, limits={"other": GroupLimits(concurrent=1)})
    for _ in range(30):
        path.lanes[0].took("medium", 10.0)
    await path.generator._pool.update("slow", paused=True)
    path.upstreams["other"].hold()
    busy = asyncio.create_task(path.make(replace(CAT, seed=1)))
    await path.upstreams["other"].arrived(1)
    await path.generator._pool.update("slow", paused=False)
    path.upstreams["slow"].hold()
    making = asyncio.create_task(path.make())
    await path.upstreams["slow"].arrived(1)
    await until(lambda: clock.sleepers > 0)
    clock.advance(21.0)
    await until(lambda: sum(path.generator.queue_depth.values()) == 1)
    path.upstreams["slow"].release()
    await making
    path.upstreams["other"].release()
    await busy
    await path.generator.settled()
    assert path.calls == {"slow": 1, "other": 1}


async def test_an_upstream_that_is_busy_on_trial_is_none_to_make_a_call_once_more_at(clock: FakeClock) -> None:
    path = MissPath(clock, "slow", "other", hedge_after_p99=2.0)
    for _ in range(30):
        path.lanes[0].took("medium", 10.0)
    path.lanes[1].is_on_trial, path.lanes[1].in_flight = True, 1
    path.upstreams["slow"].hold()
    making = asyncio.create_task(path.make())
    await path.upstreams["slow"].arrived(1)
    await until(lambda: clock.sleepers > 0)
    clock.advance(21.0)
    for _ in range(50):
        await asyncio.sleep(0)
    path.upstreams["slow"].release()
    await making
    await path.generator.settled()
    assert path.calls == {"slow": 1, "other": 0}


async def test_without_hedging_nothing_is_bought_twice(clock: FakeClock) -> None:
    path = MissPath(clock, "slow", "other")
    for _ in range(30):
        path.lanes[0].took("medium", 1.0)
    path.upstreams["slow"].hold()
    making = asyncio.create_task(path.make())
    await path.upstreams["slow"].arrived(1)
    clock.advance(1_000.0)
    path.upstreams["slow"].release()
    await making
    assert path.calls == {"slow": 1, "other": 0}


# ── waits ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_expected_time_begins_at_twenty_seconds_and_learns_by_quality_or_price(clock: FakeClock) -> None:
    path = MissPath(clock)
    took_s = iter((10.0, 20.0, 3.0))

    async def take_time() -> None:
        clock.advance(next(took_s))

    path.one.during = take_time
    low = replace(CAT, quality="low")
    assert path.generator.expected_s(CAT, Priority.STANDARD) == 20.0
    await path.make()
    assert path.generator.expected_s(CAT, Priority.STANDARD) == 10.0
    await path.make()
    assert path.generator.expected_s(CAT, Priority.STANDARD) == pytest.approx(11.0)
    by_price = path.generator.estimate_microusd(low, 1) / path.generator.estimate_microusd(CAT, 1)
    assert by_price < 0.2
    assert path.generator.expected_s(low, Priority.STANDARD) == pytest.approx(11.0 * by_price)
    await path.make(low)
    assert path.generator.expected_s(low, Priority.STANDARD) == 3.0


async def test_the_estimate_counts_down_to_half_a_second(clock: FakeClock) -> None:
    path = MissPath(clock)
    since_s = clock.monotonic_s()
    clock.advance(15.0)
    assert path.generator.estimated_wait_s("gpt-image-2", since_s) == 5.0
    clock.advance(50.0)
    assert path.generator.estimated_wait_s("gpt-image-2", since_s) == 0.5


async def test_no_call_is_settled_before_its_picture_is_safe(clock: FakeClock) -> None:
    path = MissPath(clock)
    safe = asyncio.Event()
    order = Order(CAT, 1, "shop", "ann")
    making = path.generator.generate(order, [0], on_spending=lambda: None, on_spare=path.spares.append, safe=safe)
    assert len(await making) == 1
    for _ in range(20):
        await asyncio.sleep(0)
    assert path.ledger.outcomes == [AttemptOutcome.SENT]
    safe.set()
    assert await path.outcomes() == [AttemptOutcome.SETTLED]


async def test_a_call_that_failed_is_closed_though_nothing_is_to_be_safe(clock: FakeClock) -> None:
    path = MissPath(clock)
    path.one.fail_next(UpstreamInvalidError("no such size"))
    order = Order(CAT, 1, "shop", "ann")
    with pytest.raises(UpstreamInvalidError):
        await path.generator.generate(
            order, [0], on_spending=lambda: None, on_spare=path.spares.append, safe=asyncio.Event()
        )
    assert await path.outcomes() == [AttemptOutcome.NOT_BILLED]


async def test_an_order_somebody_more_urgent_joins_overtakes(clock: FakeClock) -> None:
    path = MissPath(clock, limits={"one": GroupLimits(concurrent=1)})
    path.one.hold()
    running = asyncio.create_task(path.make())
    await path.one.arrived(1)
    orders = [Order(replace(CAT, seed=seed), 1, "shop", "ann", priority=Priority.WARM_UP) for seed in range(3)]
    made: list[int] = []

    async def make(order: Order) -> None:
        await path.generator.generate(order, [0], on_spending=lambda: None, on_spare=path.spares.append)
        made.append(order.request.seed or 0)

    waiting = [asyncio.create_task(make(order)) for order in orders]
    await until(lambda: sum(path.generator.queue_depth.values()) == 3)
    path.generator.hasten(orders[2], priority=Priority.INTERACTIVE, deadline_s=None)
    assert path.generator.queue_depth == {Priority.WARM_UP: 2, Priority.INTERACTIVE: 1}
    path.one.release()
    await asyncio.gather(running, *waiting)
    assert made == [2, 0, 1]


async def test_no_more_wait_than_may(clock: FakeClock) -> None:
    path = MissPath(clock, limits={"one": GroupLimits(concurrent=2)}, queue_max=3)
    path.one.hold()
    tasks: list[asyncio.Task[Sequence[GeneratedImage]]] = []
    for count in range(1, 6):
        tasks.append(asyncio.create_task(path.make()))
        await until(lambda count=count: path.one.calls + sum(path.generator.queue_depth.values()) == count)  # type: ignore[misc] # bound now
    with pytest.raises(QueueFullError):
        await path.make()
    assert path.one.calls == 2
    path.one.release()
    await asyncio.gather(*tasks)
    assert path.one.calls == 5


async def test_upstreams_are_checked_and_closed_once_each(clock: FakeClock) -> None:
    path = MissPath(clock)
    await path.generator.check()
    path.one.fail_next(UpstreamNotEntitledError("no"))
    with pytest.raises(UpstreamNotEntitledError):
        await path.generator.check()
    assert path.one.checks == 2
    await path.generator.aclose()
    assert path.one.closed


async def test_it_is_the_generation_that_the_cache_knows(clock: FakeClock) -> None:
    known: Generation = MissPath(clock).generator
    assert known.default_model == "gpt-image-2"
    assert isinstance(known, Generator)
