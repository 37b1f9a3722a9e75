"""The benches of the accounting judge what they saw, and can find it wanting."""

from __future__ import annotations

import os

import grpc
import pytest

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.accounting import Answer, Load, Sums, Told, _compare_whole, _sums_of_failure, _sums_of_images
from scripts.bench.accounting import Result as AccountingResult
from scripts.bench.hit_cost import Rounds, cpu_s


def rounds(off_1: float, off_2: float, on: float) -> Rounds:
    measured = Rounds()
    for name, us in {"off 1": off_1, "off 2": off_2, "on": on}.items():
        measured.us[name] += [us * 2, us, us / 2]
    return measured


def test_counting_that_costs_too_much_falls_short() -> None:
    assert rounds(100, 100, 101).shortfalls() == []
    assert rounds(100, 100, 103).shortfalls() == ["it costs 3.0%, not 2%"]


def test_a_restless_machine_cannot_tell() -> None:
    [line] = rounds(100, 102, 100).shortfalls()
    assert "too restless" in line


def test_processor_time_only_grows() -> None:
    before_s = cpu_s(os.getpid())
    sum(n * n for n in range(200_000))
    assert cpu_s(os.getpid()) > before_s


def test_an_answer_is_summed_up_by_where_each_picture_came_from() -> None:
    response = pb.GetImageResponse(
        images=[pb.Image(paid_microusd=7), pb.Image(paid_microusd=7), pb.Image(paid_microusd=7)],
        image_status=[
            pb.CacheStatus(tier=pb.TIER_REDIS, saved_microusd=7),
            pb.CacheStatus(tier=pb.TIER_UPSTREAM, collapsed=True, saved_microusd=9),
            pb.CacheStatus(tier=pb.TIER_UPSTREAM, cost_microusd=7),
        ],
    )
    sums = _sums_of_images(response)
    assert sums == Sums(
        {"requests": 3, "hit redis": 1, "collapsed": 1, "miss": 1, "saved": 16, "would cost": 23, "mispriced": 1}
    )


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, "not cached"),
        (grpc.StatusCode.INVALID_ARGUMENT, "failed"),
        (grpc.StatusCode.UNAVAILABLE, None),
    ],
)
def test_a_failure_counts_unless_nobody_answered(code: grpc.StatusCode, kind: str | None) -> None:
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())
    assert _sums_of_failure(error) == (Sums({kind: 1, "requests": 1}) if kind else Sums())


def test_calls_are_in_flight_until_shortly_after_their_answer_unless_they_were_hits() -> None:
    load = Load({}, seed=1)
    for begin_s, end_s, sums in (
        (0, 9.8, Sums({"miss": 1})),
        (0, 9.95, Sums({"miss": 1})),
        (0, 9.95, Sums({"hit redis": 1})),
        (0, 10.5, Sums()),
        (10.1, 11, Sums({"miss": 1})),
    ):
        load.answers.append(Answer("a", begin_s, end_s, sums))
    assert load.in_flight("a", 10.0) == 2
    assert load.in_flight("b", 10.0) == 0
    assert load.hits_of("a", 9.9, 10.9) == 1


async def test_one_request_that_is_told_and_was_not_answered_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand:
        def __init__(self) -> None:
            self.stubs = {"a": None, "b": None}

        async def billed_microusd(self) -> int:
            return 5

    async def ask_stats(stub: object, *, span: object = None) -> Told:  # noqa: ARG001 - as the real one
        return Told(Sums({"hit memory": 2, "requests": 2}), 1, 5, 0, 0, 0, 0)

    monkeypatch.setattr("scripts.bench.accounting.ask_stats", ask_stats)
    load, result = Load({}, seed=1), AccountingResult()
    load.answers.append(Answer("a", 0, 1, Sums({"hit memory": 1, "requests": 1})))
    await _compare_whole(Stand(), load, result)  # type: ignore[arg-type] # as much of one as is asked
    assert "whole: hit memory: answered 1, a 2" in result.shortfalls
    assert not any("billed" in line for line in result.shortfalls)
