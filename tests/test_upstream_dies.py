"""An upstream that dies in the middle of its calls fails no request, and is used again once it is back."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cacheserver.client import AsyncClient
from cacheserver.model import AttemptOutcome, UpstreamHealth
from scripts.bench.provider import Provider
from scripts.bench.upstream_dies import Answer, Figures, Run, Scale, back_after_s, rate
from tests.emulated import (
    NAMES,
    OK,
    ask_for,
    cost_of,
    emulator,
    keys_called,
    ledger_of,
    serving,
    settings_of,
    told_of,
    upstream_tables,
)
from tests.running import Stub
from tests.waiting import until

# ── a service over three ────────────────────────────────────────────────────────────────────────────────────────


class Mortal:
    """An upstream's provider, which can die and come back on its port."""

    def __init__(self, name: str) -> None:
        self._config = emulator([name])
        self._life = AsyncExitStack()
        self.provider = Provider(self._config)

    async def come(self) -> None:
        self.provider = await self._life.enter_async_context(Provider(self._config, port=self.provider.port))

    async def die(self) -> None:
        """Drop all calls, and listen no more."""
        await self._life.aclose()


@dataclass(frozen=True, slots=True)
class Stage:
    """The service, a caller of it, and the providers behind it."""

    address: str
    stub: Stub
    mortals: Sequence[Mortal]

    @property
    def providers(self) -> list[Provider]:
        return [mortal.provider for mortal in self.mortals]

    async def health(self) -> list[UpstreamHealth | None]:
        async with AsyncClient(self.address) as client:
            found = {each.name: each.health for each in await client.admin.list_upstreams()}
        return [found[name] for name in NAMES]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with _three() as mortals:
        urls = {name: mortal.provider.base_url for name, mortal in zip(NAMES, mortals, strict=True)}
        async with serving(settings_of(tmp_path), upstream_tables(urls)) as (service, stub):
            yield Stage(service.grpc_address, stub, mortals)


@asynccontextmanager
async def _three() -> AsyncIterator[list[Mortal]]:
    mortals = [Mortal(name) for name in NAMES]
    for mortal in mortals:
        await mortal.come()
    try:
        yield mortals
    finally:
        for mortal in mortals:
            await mortal.die()


async def test_calls_that_die_with_their_upstream_are_made_again_at_the_others_and_booked_as_unknown(
    stage: Stage,
) -> None:
    for provider in stage.providers:
        provider.hold()
    calls = [asyncio.ensure_future(told_of(stage.stub, ask_for(f"fox {i}", size="auto"))) for i in range(30)]
    await asyncio.gather(*(provider.arrived(10) for provider in stage.providers))
    dead, *others = stage.mortals
    await dead.die()
    for mortal in others:
        mortal.provider.release()
    assert await asyncio.gather(*calls) == [OK] * 30

    assert (await stage.health())[0] is UpstreamHealth.DOWN
    made = [call for mortal in others for call in mortal.provider.calls()]
    assert len({call.prompt_sha256 for call in made}) == len(made) == 30
    rows = await ledger_of(stage.address)
    assert Counter(row.outcome for row in rows) == {AttemptOutcome.UNKNOWN: 10, AttemptOutcome.SETTLED: 30}
    assert cost_of(rows, AttemptOutcome.SETTLED) == sum(call.billed_microusd for call in made)


async def test_a_dead_upstream_is_not_called_and_comes_back_by_itself(stage: Stage) -> None:
    numbers = count()

    async def ask(times: int) -> list[Any]:
        return [await told_of(stage.stub, ask_for(f"fox {next(numbers)}", size="auto")) for _ in range(times)]

    dead = stage.mortals[0]
    await dead.die()
    assert await ask(12) == [OK] * 12
    assert await stage.health() == [UpstreamHealth.DOWN, UpstreamHealth.WELL, UpstreamHealth.WELL]
    rows = await ledger_of(stage.address)
    # To connect fails for sure: those calls are free, and three in a row are enough to know.
    assert Counter(row.outcome for row in rows) == {AttemptOutcome.NOT_BILLED: 3, AttemptOutcome.SETTLED: 12}

    await dead.come()

    async def is_well() -> bool:
        return (await stage.health())[0] is UpstreamHealth.WELL

    await until(is_well)
    assert await ask(30) == [OK] * 30
    assert len(keys_called(dead.provider.calls())) > 0
    assert len(await ledger_of(stage.address)) == 15 + 30


# ── what the bench makes of a run ───────────────────────────────────────────────────────────────────────────────


def starts(per_s: float, from_s: float, until_s: float) -> list[float]:
    return [from_s + i / per_s for i in range(int((until_s - from_s) * per_s))]


def run_of(dead: Sequence[float], *living: Sequence[float]) -> Run:
    """Of 20 calls/s each: begun at 60 s, killed at 100 s, back at 130 s, stopped at 170 s."""
    return Run(
        scale=Scale(compression=4.0),
        began_s=60.0,
        killed_s=100.0,
        returned_s=130.0,
        stopped_s=170.0,
        answers=[Answer(99.0, 101.0), Answer(99.0, 109.0)],
        starts_s=dict(zip(NAMES, map(list, (dead, *living)), strict=True)),
        running_at_kill=100,
    )


LIVING = starts(20, 60, 170)


@pytest.fixture
def good() -> Figures:
    return run_of(starts(20, 60, 95) + starts(20, 132, 170), LIVING, LIVING).figures()


def test_good_figures_have_no_shortfall(good: Figures) -> None:
    assert good.shortfalls() == []
    assert (good.per_s_before, good.per_s_down, good.per_s_after) == pytest.approx((60, 40, 60))
    assert (good.per_s_full, good.per_s_left) == (60, 40)
    assert good.back_after_kill_s == 0
    assert good.back_after_return_s == pytest.approx(1.1, abs=0.1)
    assert good.first_after_return_s == pytest.approx(2)
    assert (good.p50_s, good.p99_s) == (2, 10)


def test_what_the_others_did_not_do_after_the_kill_is_seen(good: Figures) -> None:
    idle_at_first = starts(20, 60, 100) + starts(20, 108, 170)
    figures = run_of(starts(20, 60, 95) + starts(20, 131, 170), idle_at_first, idle_at_first).figures()
    assert figures.back_after_kill_s == pytest.approx(7.7, abs=0.1)
    assert figures.per_s_before == good.per_s_before
    assert figures.shortfalls() == [
        f"back to 97% of what was left after {figures.back_after_kill_s:.1f} s",
        f"while one was down {figures.per_s_down:.1f} calls/s began, of 40.0",
    ]


def test_an_upstream_that_is_never_used_again_is_no_figure_and_falls_short() -> None:
    figures = run_of(starts(20, 60, 95), LIVING, LIVING).figures()
    assert figures.shortfalls() == [
        "back to 97% of everything nan s after the return",
        "after the return 40.0 calls/s began, of 60.0",
    ]


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ({"failed": {"UNAVAILABLE UPSTREAM_DOWN": 1}}, "calls failed: {'UNAVAILABLE UPSTREAM_DOWN': 1}"),
        ({"running_at_kill": 0}, "no call ran when the upstream was killed"),
        ({"per_s_before": 56.9}, "before the kill 56.9 calls/s began, of 60.0"),
        ({"back_after_kill_s": 5.1}, "back to 97% of what was left after 5.1 s"),
        ({"per_s_down": 38.7}, "while one was down 38.7 calls/s began, of 40.0"),
        ({"back_after_return_s": 15.1}, "back to 97% of everything 15.1 s after the return"),
        ({"per_s_after": float("nan")}, "after the return nan calls/s began, of 60.0"),
    ],
)
def test_each_shortfall_is_named(good: Figures, spoiled: dict[str, Any], named: str) -> None:
    assert replace(good, **spoiled).shortfalls() == [named]


def test_a_window_is_back_where_it_first_has_what_is_needed() -> None:
    slow_then_fast = starts(10, 0, 20) + starts(40, 20, 60)
    assert back_after_s(slow_then_fast, 0, 60, per_s=39.9) == pytest.approx(20, abs=0.2)
    assert math.isnan(back_after_s(slow_then_fast, 0, 60, per_s=41))
    assert rate(slow_then_fast, 0, 20) == 10
    assert math.isnan(rate([], 5, 5))


def test_the_timeline_has_a_second_that_begins_with_the_kill() -> None:
    run = run_of([99.2, 99.9], [100.0, 100.1], [101.0])
    assert run.timeline()[:3] == [[2, 0, 0], [0, 2, 0], [0, 0, 1]]
