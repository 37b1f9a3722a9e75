"""Upstreams leave the pool when they fail, each for its own reason and time, and come back by themselves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.errors import (
    PromptRefusedError,
    UnknownUpstreamError,
    UpstreamBadImageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamInvalidError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
from cacheserver.generation.pool import Lane, Pool, PriceStep, Terms
from cacheserver.model import UpstreamHealth
from tests.fakes import FakeClock
from tests.provider import FakeUpstream

MODEL = "gpt-image-2"
WELL, DOWN = UpstreamHealth.WELL, UpstreamHealth.DOWN
NOT_ENTITLED, NO_QUOTA = UpstreamHealth.NOT_ENTITLED, UpstreamHealth.NO_QUOTA


class Stage:
    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.registry = CollectorRegistry()
        self.books = CounterBooks(clock=clock, registry=self.registry)
        self.upstreams = {name: FakeUpstream(name) for name in ("a", "b")}
        terms = Terms(models=(MODEL,), limit_group="org")
        self.lanes = {name: Lane(each, terms, has_succeeded=False) for name, each in self.upstreams.items()}
        self.spent = 0
        self.pool = Pool(
            list(self.lanes.values()), clock=clock, books=self.books, month_spend_microusd=lambda _: self.spent
        )
        self.changes = 0
        self.pool.on_change = self._changed

    def _changed(self) -> None:
        self.changes += 1

    @property
    def a(self) -> Lane:
        return self.lanes["a"]

    def fail(self, error: UpstreamError, times: int = 1) -> None:
        for _ in range(times):
            self.pool.failed(self.a, error)

    def metric(self, health: UpstreamHealth) -> float | None:
        return self.registry.get_sample_value("cacheserver_upstream_health", {"upstream": "a", "health": health})

    async def advance(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.clock.advance(seconds)
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def stage(clock: FakeClock) -> AsyncIterator[Stage]:
    stage = Stage(clock)
    yield stage
    await stage.pool.aclose()


@pytest.mark.parametrize("error", [UpstreamDownError("500"), UpstreamBadImageError("blank")])
async def test_three_failures_in_a_row_take_an_upstream_out(stage: Stage, error: UpstreamError) -> None:
    stage.fail(error, 2)
    assert stage.a.is_open
    stage.fail(error)
    assert (stage.a.is_open, stage.a.health, stage.changes) == (False, DOWN, 1)
    assert (stage.metric(DOWN), stage.metric(WELL)) == (1, 0)
    assert stage.registry.get_sample_value("cacheserver_breaker_open", {"tier": "a"}) == 1


async def test_a_success_between_failures_keeps_it_in(stage: Stage) -> None:
    for _ in range(5):
        stage.fail(UpstreamDownError("500"), 2)
        stage.pool.succeeded(stage.a, quality="low", seconds=3.0)
    assert stage.a.is_open


@pytest.mark.parametrize("error", [PromptRefusedError("no"), UpstreamInvalidError("no")])
async def test_to_judge_a_request_is_no_failure_of_the_upstreams(stage: Stage, error: UpstreamError) -> None:
    stage.fail(UpstreamDownError("500"), 2)
    stage.fail(error)
    stage.fail(UpstreamDownError("500"), 2)
    assert stage.a.is_open


async def test_one_that_is_down_is_probed_ever_more_rarely_until_it_answers(stage: Stage) -> None:
    for _ in range(3):
        stage.upstreams["a"].fail_next(UpstreamDownError("down"))
    stage.fail(UpstreamDownError("500"), 3)
    for seconds, checks in ((0.4, 0), (0.2, 1), (0.9, 1), (0.2, 2), (2.0, 3)):
        await stage.advance(seconds)
        assert stage.upstreams["a"].checks == checks
    await stage.advance(4.0)
    assert stage.a.is_open
    assert not stage.a.is_on_trial
    stage.fail(UpstreamDownError("500"))
    assert not stage.a.is_open  # after a failure it had better not have, it leaves at once


async def test_a_403_before_any_success_is_a_missing_right_probed_hourly_and_never_given_up(stage: Stage) -> None:
    stage.fail(UpstreamNotEntitledError("403"))
    assert stage.a.health is NOT_ENTITLED
    for hour in range(1, 5):
        stage.upstreams["a"].fail_next(UpstreamNotEntitledError("403"))
        await stage.advance(3_600)
        assert (stage.upstreams["a"].checks, stage.a.is_open) == (hour, False)
    await stage.advance(3_600)
    assert (stage.a.is_open, stage.a.is_on_trial) == (True, True)
    stage.fail(UpstreamNotEntitledError("403"))
    assert stage.a.health is NOT_ENTITLED


async def test_a_403_after_successes_is_a_failure_like_others(stage: Stage) -> None:
    stage.pool.succeeded(stage.a, quality="low", seconds=3.0)
    stage.fail(UpstreamNotEntitledError("403"), 2)
    assert stage.a.is_open
    stage.fail(UpstreamNotEntitledError("403"))
    assert stage.a.health is DOWN


async def test_a_limit_is_a_missing_right_only_before_any_success_and_when_it_comes_again(stage: Stage) -> None:
    stage.fail(UpstreamLimitedError("429"), 2)
    assert stage.a.is_open
    stage.pool.succeeded(stage.a, quality="low", seconds=3.0)
    stage.fail(UpstreamLimitedError("429"), 50)
    assert stage.a.is_open
    for _ in range(3):
        stage.pool.failed(stage.lanes["b"], UpstreamLimitedError("429"))
    assert stage.lanes["b"].health is NOT_ENTITLED


async def test_one_without_money_is_out_at_once_and_on_trial_when_it_is_back(stage: Stage) -> None:
    stage.pool.succeeded(stage.a, quality="low", seconds=3.0)
    stage.fail(UpstreamQuotaError("429"))
    assert stage.a.health is NO_QUOTA
    await stage.advance(3_600)
    assert stage.a.has_room
    stage.a.in_flight = 1
    assert not stage.a.has_room
    stage.pool.succeeded(stage.a, quality="low", seconds=3.0)
    assert stage.a.has_room


async def test_an_operator_brings_back_what_is_out_and_takes_out_what_is_well(stage: Stage) -> None:
    stage.fail(UpstreamQuotaError("429"))
    state = await stage.pool.update("a", paused=False)
    assert (state.health, stage.a.is_on_trial) == (WELL, True)
    state = await stage.pool.update("a", paused=True)
    assert (state.health, stage.a.is_open) == (UpstreamHealth.PAUSED, False)
    with pytest.raises(UnknownUpstreamError, match="a, b"):
        await stage.pool.update("c", weight=2.0)


async def test_an_operator_moves_traffic(stage: Stage) -> None:
    state = await stage.pool.update("a", weight=3.0, percent=20.0)
    assert (state.weight, state.percent) == (3.0, 20.0)
    state = await stage.pool.update("a", clear_percent=True)
    assert (state.weight, state.percent) == (3.0, None)


async def test_why_nobody_can_be_asked_is_told_by_what_helps(stage: Stage) -> None:
    stage.fail(UpstreamNotEntitledError("403"))
    stage.pool.failed(stage.lanes["b"], UpstreamNotEntitledError("403"))
    assert isinstance(stage.pool.why_none(MODEL), UpstreamNotEntitledError)
    stage.lanes["b"].health = NO_QUOTA
    assert isinstance(stage.pool.why_none(MODEL), UpstreamQuotaError)
    stage.lanes["b"].health = DOWN
    error = stage.pool.why_none(MODEL)
    assert isinstance(error, UpstreamDownError)
    assert str(error) == "No upstream for this model can be asked (a is not_entitled; b is down)."


async def test_averages_decay_and_the_p99_needs_enough_calls(stage: Stage) -> None:
    for seconds in (10.0, 20.0):
        stage.pool.succeeded(stage.a, quality="low", seconds=seconds)
    assert stage.a.latency_s("low") == pytest.approx(11.0)
    assert stage.a.latency_s("high") == pytest.approx(11.0)  # nothing better is known
    assert math.isinf(stage.a.p99_s("low"))
    for seconds in range(1, 101):
        stage.pool.succeeded(stage.a, quality="high", seconds=float(seconds))
    assert stage.a.p99_s("high") == 99.0
    stage.fail(UpstreamDownError("500"))
    assert stage.a.success_rate == pytest.approx(0.9)
    (state, _) = stage.pool.states()
    assert state.latency_s == pytest.approx((stage.a.latency_s("low") + stage.a.latency_s("high")) / 2)


async def test_a_price_steps_with_the_months_spend(stage: Stage) -> None:
    steps = (PriceStep(5_000, Decimal("0.9")), PriceStep(1_000, Decimal("0.95")))
    terms = Terms(models=(MODEL,), limit_group="org", price_factor=Decimal("0.6"), price_steps=steps)
    relay = Lane(FakeUpstream("relay"), terms, has_succeeded=True)
    factors = []
    for stage.spent in (999, 1_000, 4_999, 5_000):
        factors.append(stage.pool.price_factor(relay))
    assert factors == [Decimal("0.6"), Decimal("0.570"), Decimal("0.570"), Decimal("0.54")]


async def test_a_first_burst_beyond_the_limit_is_no_missing_right(stage: Stage) -> None:
    stage.a.in_flight = 8
    stage.fail(UpstreamLimitedError("429"), 3)
    assert stage.a.is_open


@pytest.mark.parametrize("error", [UpstreamNotEntitledError("403"), UpstreamDownError("500")])
async def test_a_success_that_was_under_way_brings_an_upstream_back(stage: Stage, error: UpstreamError) -> None:
    stage.fail(error, 3)
    assert not stage.a.is_open
    stage.pool.succeeded(stage.a, quality="low", seconds=30.0)
    assert (stage.a.is_open, stage.a.is_on_trial) == (True, False)
