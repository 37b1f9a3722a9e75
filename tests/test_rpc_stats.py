"""GetStats: what is counted for which answer, who may ask for what, and what is wrong with a question."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import CollectorRegistry

from cacheserver.accounting.archive import DirectoryArchive
from cacheserver.accounting.books import CounterBooks, ToldApart
from cacheserver.accounting.kept import Kept
from cacheserver.accounting.shared import SharedFigures
from cacheserver.control.figures import LocalFigures
from cacheserver.errors import AccountsUnavailableError, PromptRefusedError
from cacheserver.figures import LATENCY_BOUNDS_S
from cacheserver.model import Caller, Namespace, Permission
from cacheserver.pb import promptcache_pb2 as pb
from tests.fakes import FakeClock
from tests.house import MODEL, House
from tests.rpc_front import Front, ask, authorization, failure, open_front
from tests.test_shared_figures import Calls

READER = Caller("reader", frozenset({Permission.READ, Permission.GENERATE}), frozenset({"default"}))
ADMIN = Caller("admin", frozenset(Permission))
BY_ADMIN = authorization("admin")
LONG_AGO = Timestamp(seconds=1)


@pytest.fixture
async def front(house: House, tmp_path: Path, clock: FakeClock) -> AsyncIterator[Front]:
    told_apart = ToldApart(frozenset({MODEL}), frozenset({"auto", "medium"}))
    house.books = CounterBooks(clock=clock, registry=CollectorRegistry(), told_apart=told_apart)
    house.restart()
    figures = SharedFigures(
        store=LocalFigures(),
        archive=DirectoryArchive(tmp_path / "archive"),
        books=house.books,
        clock=clock,
        replica_id="0" * 16,
        kept=Kept(),
    )
    house.generator._figures = figures
    await figures.start(Calls())
    callers = [(hashlib.sha256(each.name.encode()).digest(), each) for each in (READER, ADMIN)]
    namespaces = [Namespace("other", "other")]
    async with open_front(house, callers=callers, anonymous=None, namespaces=namespaces, figures=figures) as front:
        yield front
    await figures.aclose()


async def stats(front: Front, token: str = "admin", **fields: Any) -> pb.GetStatsResponse:  # noqa: S107 - a test's
    response = await front.stub.GetStats(pb.GetStatsRequest(**fields), metadata=authorization(token))
    assert isinstance(response, pb.GetStatsResponse)
    return response


async def test_a_miss_and_its_hits_are_told_with_what_they_cost_saved_and_would_have_cost(front: Front) -> None:
    made = await front.stub.GetImage(ask(of={"quality": "medium"}), metadata=BY_ADMIN)
    for _ in range(2):
        hit = await front.stub.GetImage(ask(of={"quality": "medium"}), metadata=BY_ADMIN)
    cost, saved = made.status.cost_microusd, hit.status.saved_microusd
    assert cost
    told = await stats(
        front, since=LONG_AGO, by=["STATS_FIELD_MODEL", "STATS_FIELD_QUALITY", "STATS_FIELD_CALLER", "STATS_FIELD_TIER"]
    )
    memory, upstream = sorted(told.rows, key=lambda row: row.tier)
    for row in (memory, upstream):
        assert (row.namespace, row.model, row.quality, row.caller) == ("", MODEL, "medium", "admin")
    assert (memory.requests, memory.saved_microusd, memory.would_cost_microusd) == (2, 2 * saved, 2 * saved)
    assert (upstream.requests, upstream.spent_microusd, upstream.settled_calls) == (1, cost, 1)
    assert (upstream.would_cost_microusd, upstream.open_calls, upstream.unknown_calls) == (cost, 0, 0)
    assert sum(memory.latency_counts) == 2
    assert tuple(told.latency_bounds_s) == LATENCY_BOUNDS_S
    assert (told.total.requests, told.total.spent_microusd, told.total.model) == (3, cost, "")


async def test_since_the_start_and_since_ever_say_the_same_of_one_process(front: Front) -> None:
    for prompt in ("a red fox", "a red fox", "a blue one"):
        await front.stub.GetImage(ask(prompt), metadata=BY_ADMIN)
    since_start, since_ever = await stats(front), await stats(front, since=LONG_AGO)
    for row in (*since_start.rows, since_start.total, *since_ever.rows, since_ever.total):
        row.ClearField("settled_calls")  # of one process only what was paid is known
    assert list(since_start.rows) == list(since_ever.rows)
    assert since_start.total == since_ever.total
    assert since_start.upstream_calls == 2


async def test_rows_are_of_the_same_sum_whatever_tells_them_apart(front: Front) -> None:
    for prompt, quality in (("a red fox", "auto"), ("a red fox", "medium"), ("a red fox", "auto"), ("a", "auto")):
        await front.stub.GetImage(ask(prompt, of={"quality": quality}), metadata=BY_ADMIN)
        await stats(front, since=LONG_AGO)  # takes what was counted, but for the last
    await front.stub.GetImage(ask("a red fox"), metadata=BY_ADMIN)
    coarse = await stats(front)
    fine = await stats(
        front, by=["STATS_FIELD_NAMESPACE", "STATS_FIELD_OUTCOME", "STATS_FIELD_TIER", "STATS_FIELD_QUALITY"]
    )
    assert coarse.total == fine.total
    assert coarse.total.requests == 5
    for row in coarse.rows:
        parts = [part for part in fine.rows if (part.outcome, part.tier) == (row.outcome, row.tier)]
        assert sum(part.requests for part in parts) == row.requests


async def test_what_is_refused_from_memory_is_told_apart_from_what_failed(front: Front) -> None:
    front.house.upstream.fail_next(PromptRefusedError("no"))
    for _ in range(3):
        await failure(front.stub.GetImage(ask("something nobody may ask for"), metadata=BY_ADMIN))
    told = await stats(front, since=LONG_AGO, by=["STATS_FIELD_OUTCOME", "STATS_FIELD_MODEL"])
    requests = {(pb.Outcome.Name(row.outcome), row.model): row.requests for row in told.rows if row.requests}
    assert requests == {("OUTCOME_ERROR", MODEL): 1, ("OUTCOME_NEGATIVE", MODEL): 2}


async def test_rows_by_caller_are_for_those_with_the_permission_admin(front: Front) -> None:
    for when in ({}, {"since": LONG_AGO}):
        question = pb.GetStatsRequest(by=["STATS_FIELD_CALLER"], **when)  # type: ignore[arg-type] # a Timestamp
        refused = await failure(front.stub.GetStats(question, metadata=authorization("reader")))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert (await stats(front, by=["STATS_FIELD_CALLER"], **when)).total.requests == 0


async def test_a_caller_sees_its_own_namespaces_and_no_others(front: Front) -> None:
    await front.stub.GetImage(ask(), metadata=BY_ADMIN)
    await front.stub.GetImage(ask(namespace="other"), metadata=BY_ADMIN)
    assert (await stats(front, since=LONG_AGO)).total.requests == 2
    told = await stats(front, "reader", since=LONG_AGO)
    assert {row.namespace for row in told.rows} == {"default"}
    assert told.total.requests == 1
    question = pb.GetStatsRequest(namespace="other", since=LONG_AGO)
    assert (await failure(front.stub.GetStats(question, metadata=authorization("reader")))).code == "PERMISSION_DENIED"


async def test_time_buckets_begin_at_full_hours(front: Front, clock: FakeClock) -> None:
    hour_s = int(clock.now_s())
    await front.stub.GetImage(ask(), metadata=BY_ADMIN)
    await stats(front, since=LONG_AGO)
    clock.advance(3_600)
    await stats(front, since=LONG_AGO)
    await front.stub.GetImage(ask(), metadata=BY_ADMIN)
    told = await stats(front, since=LONG_AGO, span="STATS_SPAN_HOUR")
    starts = {row.start_time.seconds: row.requests for row in told.rows}
    assert starts == {hour_s: 1, hour_s + 3_600: 1}


@pytest.mark.parametrize(
    ("question", "field"),
    [
        (pb.GetStatsRequest(since=Timestamp(seconds=9), until=Timestamp(seconds=8)), "until"),
        (pb.GetStatsRequest(since=Timestamp(seconds=-1)), "since"),
        (pb.GetStatsRequest(until=Timestamp(nanos=-1)), "until"),
        (pb.GetStatsRequest(span="STATS_SPAN_DAY"), "span"),
        (pb.GetStatsRequest(since=LONG_AGO, span=77), "span"),  # type: ignore[arg-type] # an enum is open
        (pb.GetStatsRequest(by=["STATS_FIELD_TIER", "STATS_FIELD_UNSPECIFIED"]), "by[1]"),
        (pb.GetStatsRequest(by=[77]), "by[0]"),  # type: ignore[list-item] # an enum is open
    ],
)
async def test_what_is_wrong_with_a_question_is_said(front: Front, question: pb.GetStatsRequest, field: str) -> None:
    refused = await failure(front.stub.GetStats(question, metadata=BY_ADMIN))
    assert (refused.code, [*refused.fields]) == ("INVALID_ARGUMENT", [field])


async def test_where_no_figures_are_kept_only_the_process_tells_its_own(house: House) -> None:
    async with open_front(house) as front:
        refused = await failure(front.stub.GetStats(pb.GetStatsRequest(since=LONG_AGO)))
        assert (refused.code, [*refused.fields]) == ("INVALID_ARGUMENT", ["since"])
        assert (await front.stub.GetStats(pb.GetStatsRequest())).total.requests == 0


async def test_figures_that_cannot_be_read_now_are_worth_a_second_try(house: House) -> None:
    class Gone:
        async def report(self, query: object) -> Any:  # noqa: ARG002 - as the real one
            raise AccountsUnavailableError("gone")

    async with open_front(house, figures=Gone()) as front:
        refused = await failure(front.stub.GetStats(pb.GetStatsRequest(since=LONG_AGO)))
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "ACCOUNTS_UNAVAILABLE")
