"""The benches count what they say they count: a figure that falls short is named, and none is lost on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.settings import load_settings
from scripts.bench import throughput
from scripts.bench.closed_loop import Asked
from scripts.bench.figures import percentile, write_json
from scripts.bench.load import Read, prompt, read_paced
from scripts.bench.provider import Call
from scripts.bench.rig import Scale
from scripts.bench.tier_faults import FAULTS, ONLY_IN_S3, Figures, Run, plan

S3_KILLED = FAULTS["s3 killed"]


def run_of(*reads: Read) -> Run:
    stats = pb.GetStatsResponse(paid_unknown=ONLY_IN_S3)
    return Run(reads=list(reads), struck_s=10.0, opened_s=11.0, paid=ONLY_IN_S3, stats=stats)


def read(due_s: float, seconds: float, tier: int = pb.TIER_REDIS) -> Read:
    return Read(number=0, due_s=due_s, end_s=due_s + seconds, tier=tier)


@pytest.fixture
def good() -> Figures:
    return run_of(read(5, 0.002), read(10.5, 0.3), read(12, 0.003)).figures(S3_KILLED)


def test_a_percentile_is_one_of_the_values() -> None:
    values = list(range(1, 101))
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


def test_a_figure_there_is_none_of_is_null_in_json(tmp_path: Path) -> None:
    write_json(tmp_path / "figures.json", "a bench", {"rows": [{"p99_ms": math.nan}]})
    assert json.loads((tmp_path / "figures.json").read_text())["result"] == {"rows": [{"p99_ms": None}]}


def test_a_read_counts_where_it_met_the_fault() -> None:
    slow_under_way = read(9.9, 0.25)
    made = read(10.1, 2.0, pb.TIER_UPSTREAM)
    figures = run_of(read(5, 0.002), slow_under_way, made, read(10.5, 0.1), read(11, 0.004)).figures(S3_KILLED)
    assert (figures.reads, figures.made) == (5, 1)
    assert figures.made_max_ms == pytest.approx(2000)
    assert figures.p99_before_ms == pytest.approx(2)
    assert figures.p99_until_open_ms == pytest.approx(250)
    assert figures.p99_after_ms == pytest.approx(4)
    assert figures.open_after_ms == pytest.approx(1000)


def test_good_figures_have_no_shortfall(good: Figures) -> None:
    assert good.shortfalls() == []


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ({"failed": {"INTERNAL": 1}}, "reads failed: {'INTERNAL': 1}"),
        ({"wrong": 2}, "2 reads brought wrong bytes"),
        ({"below_memory": 0.4}, "only 40% of the reads reached below memory"),
        ({"paid": 21}, "21 pictures were paid for, not 20"),
        ({"paid_unknown": 19}, "paid_unknown is 19, not 20"),
        ({"damaged": 1}, "1 damaged entries were found"),
        ({"p99_after_ms": 102.1}, "the p99 rose by 100 ms"),
        ({"p99_after_ms": math.nan}, "the p99 rose by nan ms"),
    ],
)
def test_each_shortfall_is_named(good: Figures, spoiled: dict[str, Any], named: str) -> None:
    assert replace(good, **spoiled).shortfalls() == [f"s3 killed: {named}"]


def test_the_plan_reads_every_picture_of_s3_alone_but_none_before_the_fault_has_struck() -> None:
    scale, lost = Scale(), set(range(ONLY_IN_S3))
    rng = Random(1)  # noqa: S311 - which picture to read
    after = plan(scale, 8.0, rng, with_lost=True)
    assert len(after) == 1600
    assert lost <= set(after[100:])
    assert not lost & {*after[:100], *plan(scale, 6.0, rng, with_lost=False)}


class StubOf:
    """A generated client that answers each read as `answer` says."""

    def __init__(self, answer: Callable[[str], Awaitable[pb.GetImageResponse]]) -> None:
        self._answer = answer

    async def GetImage(self, request: pb.GetImageRequest, timeout: float) -> pb.GetImageResponse:  # noqa: ASYNC109, N802 - the generated client's
        assert timeout > 0
        return await self._answer(request.spec.prompt)


async def test_a_failed_and_a_wrong_read_are_told_from_a_right_one() -> None:
    async def answer(asked: str) -> pb.GetImageResponse:
        if asked == prompt(1):
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())
        status = pb.CacheStatus(tier=pb.TIER_S3)
        return pb.GetImageResponse(images=[pb.Image(data=asked.encode())], status=status)

    def is_right(number: int, data: bytes) -> bool:
        return number != 2 and data == prompt(number).encode()

    reads = await read_paced([StubOf(answer)], [0, 1, 2], rate=1e6, is_right=is_right)
    assert [(each.tier, each.failure, each.wrong) for each in reads] == [
        (pb.TIER_S3, "", False),
        (pb.TIER_UNSPECIFIED, "UNAVAILABLE", False),
        (pb.TIER_S3, "", True),
    ]


def call(at_s: float, *, started_s: float | None, ended_s: float, images: int = 1) -> Call:
    """A call as the provider wrote it down; one that was never admitted was answered 429."""
    limited = started_s is None
    return Call(
        request_id="req",
        key="sk-d001",
        prompt_sha256="",
        model="gpt-image-2",
        size="auto",
        quality="medium",
        n=1,
        status=429 if limited else 200,
        fault="",
        limited=limited,
        images=0 if limited else images,
        billed_microusd=0,
        at_s=at_s,
        started_s=started_s,
        ended_s=ended_s,
        hung_up=False,
    )


@pytest.fixture
def served() -> throughput.Run:
    """A minute of 4 a minute, 1 of them taken by others, then a minute of 2; the first call came at 1000 s."""
    return throughput.Run(
        start_s=1000.0,
        measured_s=(10.0, 130.0),
        parts=[throughput.Part(1060, 1120, 4, 1), throughput.Part(1120, 1180, 2, 0)],
        calls=[
            call(1000, started_s=None, ended_s=1000),
            call(1001, started_s=1001, ended_s=1062),  # admitted while learning
            call(1060, started_s=1060, ended_s=1080),
            call(1070, started_s=1070, ended_s=1081),
            call(1110, started_s=1110, ended_s=1125),  # admitted in the first part, sent out in the second
            call(1121, started_s=1121, ended_s=1130, images=0),  # brought nothing
            call(1130, started_s=1130, ended_s=1150),
            call(1131, started_s=1131, ended_s=1151),
            call(1180, started_s=1180, ended_s=1181),  # after the end
        ],
        asked=[Asked(0, 9, "UNAVAILABLE"), Asked(10, 20), Asked(10, 40), Asked(120, 131)],
        depths=[[3, 5], [2, 9]],
    )


def test_pictures_count_in_the_part_in_which_they_were_admitted(served: throughput.Run) -> None:
    figures = served.figures(throughput.SCENARIOS["organisation"])
    assert [(part.left, part.served, part.sent_out) for part in figures.parts] == [(3, 3, 3), (2, 2, 3)]
    assert [(part.calls, part.limited) for part in figures.parts] == [(3, 0), (3, 0)]
    assert figures.share == 1.0
    assert (figures.served_per_minute, figures.limited_per_minute) == ([1, 3, 2], [1, 0, 0])
    assert (figures.asked, figures.failed) == (4, {"UNAVAILABLE": 1})
    assert (figures.p50_s, figures.p99_s) == (10, 30)
    assert (figures.depth_least, figures.depth_median, figures.depth_most) == (2, 3, 9)


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ({"share": 0.9494}, "94.9% of what was left was served, not 95%"),
        ({"share": math.nan}, "nan% of what was left was served, not 95%"),
        ({"calls": 1_000, "limited": 11}, "11 of 1,000 calls were answered 429"),
        ({"failed": {"CANCELLED": 2}}, "calls failed: {'CANCELLED': 2}"),
        ({"depth_least": 0}, "a queue ran dry"),
    ],
)
def test_each_shortfall_in_throughput_is_named(served: throughput.Run, spoiled: dict[str, Any], named: str) -> None:
    good = replace(served.figures(throughput.SCENARIOS["organisation"]), failed={})
    assert good.shortfalls() == []
    assert replace(good, **spoiled).shortfalls() == [f"organisation: {named}"]


def test_one_call_in_a_hundred_may_be_limited_where_others_share_and_none_where_nobody_does(
    served: throughput.Run,
) -> None:
    few = {"failed": {}, "calls": 1_000, "limited": 10}
    assert replace(served.figures(throughput.SCENARIOS["unannounced"]), **few).shortfalls() == []
    assert replace(served.figures(throughput.SCENARIOS["pool"]), **few).shortfalls() == [
        "pool: 10 of 1,000 calls were answered 429"
    ]


@pytest.mark.parametrize("scenario", throughput.SCENARIOS.values(), ids=throughput.SCENARIOS)
def test_service_and_provider_are_told_the_same_limits(scenario: throughput.Scenario, tmp_path: Path) -> None:
    config = tmp_path / "cacheserver.toml"
    config.write_text(scenario.service(provider_url="http://127.0.0.1:1/v1", redis_url="redis://127.0.0.1:2/0"))
    settings = load_settings(config, {})
    provider = scenario.provider(enforced="bucket", latency_s=20.0)
    owners = provider.groups.values() if scenario.is_shared else [key.limits for key in provider.keys]
    assert [upstream.key() for upstream in settings.upstreams] == [key.key for key in provider.keys]
    assert [limits.images_per_minute for limits in settings.group_limits.values()] == [
        limits.images_per_minute for limits in owners
    ]
    assert scenario.callers(20.0) < settings.server.max_concurrent_calls
