"""The admin API as its callers see it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import socket
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cacheserver.epochs import Tombstone
from cacheserver.errors import InvalidRequestError
from cacheserver.model import AlarmState, AttemptOutcome, BudgetScope, Caller, Permission, UpstreamHealth
from cacheserver.pb import admin_pb2 as pb
from cacheserver.rpc.admin import MAX_PAGE_SIZE, page_token, read_page
from cacheserver.rpc.messages import Problems
from cacheserver.rpc.server import Listen, RpcServer, RpcService
from tests.admin_front import (
    NOW_S,
    OPERATOR,
    Sources,
    admin_service,
    alarm,
    attempt,
    budget,
    calling,
    picture_key,
    review,
    sample_hit,
    serving,
    upstream,
)
from tests.rpc_front import authorization, failure

NAME = "promptcache.admin.v1alpha1.AdminService"
_KEY = picture_key(1)
METHODS = pb.DESCRIPTOR.services_by_name["AdminService"].methods_by_name


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
async def stub(sources: Sources) -> AsyncIterator[Any]:
    async with serving(admin_service(sources)) as address, calling(address) as stub:
        yield stub


async def answered(call: Any) -> Any:
    """The answer to `call`, or all its answers."""
    streams = grpc.aio.UnaryStreamCall | grpc.aio.StreamStreamCall
    return [each async for each in call] if isinstance(call, streams) else await call


def moment(seconds: float) -> Timestamp:
    made = Timestamp()
    made.FromMicroseconds(round(seconds * 1_000_000))
    return made


# --- upstreams ---


async def test_upstreams_come_by_name_with_all_that_is_known(stub: Any, sources: Sources) -> None:
    sources.upstreams.all = [
        upstream("south", health=UpstreamHealth.NO_QUOTA),
        upstream("north", percent=0.0, latency_s=1.5, images_per_minute=250.0),
    ]
    answer = await stub.ListUpstreams(pb.ListUpstreamsRequest())
    assert not answer.next_page_token
    north, south = answer.upstreams
    assert north == pb.Upstream(
        name="north",
        limit_group="acme",
        models=["gpt-image-2", "painter"],
        health="UPSTREAM_HEALTH_WELL",
        weight=2.0,
        percent=0.0,
        rank=1,
        price_factor=0.9,
        success_rate=0.985,
        latency=Duration(seconds=1, nanos=500_000_000),
        in_flight=3,
        calls=1_234,
        images_per_minute=250.0,
    )
    assert (south.name, south.health) == ("south", pb.UPSTREAM_HEALTH_NO_QUOTA)
    assert not any(south.HasField(name) for name in ("percent", "latency", "images_per_minute"))


@pytest.mark.parametrize("health", UpstreamHealth)
async def test_every_health_has_its_word(stub: Any, sources: Sources, health: UpstreamHealth) -> None:
    sources.upstreams.all = [upstream(health=health)]
    [shown] = (await stub.ListUpstreams(pb.ListUpstreamsRequest())).upstreams
    assert pb.UpstreamHealth.Name(shown.health) == f"UPSTREAM_HEALTH_{health.name}"


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"weight": 0.5}, {"weight": 0.5}),
        ({"percent": 0.0}, {"percent": 0.0}),
        ({"clear_percent": True}, {"clear_percent": True}),
        ({"paused": True}, {"paused": True}),
        ({"paused": False, "weight": 1_000.0}, {"paused": False, "weight": 1_000.0}),
    ],
)
async def test_only_what_is_given_of_an_upstream_changes(
    stub: Any, sources: Sources, fields: dict[str, Any], change: dict[str, Any]
) -> None:
    sources.upstreams.all = [upstream("north")]
    answer = await stub.UpdateUpstream(pb.UpdateUpstreamRequest(name="north", **fields))
    unchanged = {"weight": None, "percent": None, "clear_percent": False, "paused": None}
    assert sources.upstreams.changes == [unchanged | change]
    assert answer.upstream.name == "north"
    assert (answer.upstream.health == pb.UPSTREAM_HEALTH_PAUSED) is bool(fields.get("paused"))


async def test_an_upstream_nobody_knows_is_not_found(stub: Any) -> None:
    failed = await failure(stub.UpdateUpstream(pb.UpdateUpstreamRequest(name="west", paused=True)))
    assert (failed.code, failed.reason) == ("NOT_FOUND", "UPSTREAM_UNKNOWN")


# --- budgets ---


async def test_budgets_come_by_name_with_all_that_is_known(stub: Any, sources: Sources) -> None:
    sources.budgets.all = [budget(BudgetScope.NAMESPACE, "shop"), budget(), budget(BudgetScope.CALLER, "catalog")]
    answer = await stub.ListBudgets(pb.ListBudgetsRequest())
    assert [each.name for each in answer.budgets] == ["caller:catalog/day", "global/day", "namespace:shop/day"]
    assert answer.budgets[2] == pb.Budget(
        name="namespace:shop/day",
        scope="BUDGET_SCOPE_NAMESPACE",
        subject="shop",
        period="BUDGET_PERIOD_DAY",
        limit_microusd=50_000_000,
        spent_microusd=12_345_678,
        reserved_microusd=200_000,
        reset_time=moment(NOW_S + 3_600),
    )


@pytest.mark.parametrize("limit", [0, 10**15])
async def test_a_budget_gets_another_limit(stub: Any, sources: Sources, limit: int) -> None:
    sources.budgets.all = [budget()]
    answer = await stub.UpdateBudget(pb.UpdateBudgetRequest(name="global/day", limit_microusd=limit))
    assert answer.budget.limit_microusd == sources.budgets.all[0].budget.limit_microusd == limit


async def test_a_limit_left_out_is_not_taken_for_0(stub: Any, sources: Sources) -> None:
    sources.budgets.all = [budget()]
    failed = await failure(stub.UpdateBudget(pb.UpdateBudgetRequest(name="global/day")))
    assert failed.fields == {"limit_microusd": "must be set"}
    assert sources.budgets.all == [budget()]


async def test_a_budget_nobody_knows_is_not_found(stub: Any) -> None:
    failed = await failure(stub.UpdateBudget(pb.UpdateBudgetRequest(name="global/year", limit_microusd=1)))
    assert (failed.code, failed.reason) == ("NOT_FOUND", "UPSTREAM_UNKNOWN")


# --- the ledger ---


async def test_a_row_of_the_ledger_has_all_that_is_known(stub: Any, sources: Sources) -> None:
    sources.ledger.all = [
        attempt(1),
        attempt(2, outcome=AttemptOutcome.SENT, end_time_s=None, cost_microusd=0, reason="", usage=None),
    ]
    settled, sent = (await stub.ListLedger(pb.ListLedgerRequest())).rows
    assert settled == pb.LedgerRow(
        id="a0001",
        namespace="shop",
        caller="catalog",
        upstream="north",
        model="gpt-image-2",
        quality="high",
        images=2,
        estimate_microusd=120_000,
        start_time=moment(NOW_S + 1),
        tags=["spring", "banner"],
        outcome="ATTEMPT_OUTCOME_SETTLED",
        end_time=moment(NOW_S + 3.5),
        cost_microusd=106_001,
        reason="ok",
        upstream_request_id="req_1",
        usage=pb.TokenUsage(input_tokens=10, input_text_tokens=10, output_tokens=400, total_tokens=410),
    )
    assert sent.outcome == pb.ATTEMPT_OUTCOME_SENT
    assert not sent.HasField("end_time")
    assert not sent.HasField("usage")


async def test_the_ledger_shows_the_span_asked_for(stub: Any, sources: Sources) -> None:
    sources.ledger.all = [attempt(number) for number in range(6)]
    span = pb.ListLedgerRequest(since=moment(NOW_S + 2), until=moment(NOW_S + 4))
    assert [row.id for row in (await stub.ListLedger(span)).rows] == ["a0002", "a0003"]
    assert len((await stub.ListLedger(pb.ListLedgerRequest(since=moment(NOW_S + 4)))).rows) == 2
    assert len((await stub.ListLedger(pb.ListLedgerRequest(until=moment(NOW_S + 4)))).rows) == 4


async def test_no_more_of_the_ledger_is_read_than_a_page_and_one(stub: Any, sources: Sources) -> None:
    sources.ledger.all = [attempt(number) for number in range(6)]
    await stub.ListLedger(pb.ListLedgerRequest(page_size=3))
    await stub.ListLedger(pb.ListLedgerRequest())
    assert sources.ledger.limits == [4, 101]


# --- reviews ---


async def test_a_picture_that_waits_has_all_that_is_known(stub: Any, sources: Sources) -> None:
    sources.reviews.all = [review(1), review(2, score=None)]
    scored, unscored = (await stub.ListReviews(pb.ListReviewsRequest())).reviews
    assert scored == pb.Review(
        key=review(1).key.name,
        namespace="shop",
        model="gpt-image-2",
        width=1024,
        height=768,
        score=0.31,
        create_time=moment(NOW_S),
        content_type="image/png",
        size_bytes=1_500,
        paid_microusd=53_000,
    )
    assert not unscored.HasField("score")


async def test_a_picture_is_approved_or_rejected_once(stub: Any, sources: Sources) -> None:
    sources.reviews.all = [review(1), review(2)]
    good, bad = review(1).key, review(2).key
    approve = pb.ResolveReviewRequest(key=good.name, decision="REVIEW_DECISION_APPROVE")
    assert (await stub.ResolveReview(approve)).key == good.with_variant(1).name
    reject = pb.ResolveReviewRequest(key=bad.name, decision="REVIEW_DECISION_REJECT")
    assert not (await stub.ResolveReview(reject)).key
    assert (sources.reviews.approved, sources.reviews.rejected) == ([good], [bad])
    for again in (approve, reject):
        failed = await failure(stub.ResolveReview(again))
        assert (failed.code, failed.reason) == ("NOT_FOUND", "REVIEW_GONE")


async def test_a_picture_that_waits_can_be_looked_at(stub: Any, sources: Sources) -> None:
    data = bytes(range(256)) * 2_500
    sources.reviews.all = [review(1), review(2, data=data, revised_prompt="a red fox", won_against=2)]
    head, *parts = [part async for part in stub.GetReview(pb.GetReviewRequest(key=review(2).key.name))]
    listed = (await stub.ListReviews(pb.ListReviewsRequest())).reviews[1]
    assert head.header == pb.ReviewHeader(
        review=listed,
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        quality="high",
        revised_prompt="a red fox",
        won_against=2,
        tags=["spring"],
    )
    assert (listed.key, listed.size_bytes) == (review(2).key.name, len(data))
    assert b"".join(part.chunk for part in parts) == data
    assert [len(part.chunk) for part in parts] == [262_144, 262_144, 115_712]
    assert sources.reviews.all == [review(1), review(2, data=data, revised_prompt="a red fox", won_against=2)]


async def test_a_picture_stored_with_half_a_surrogate_pair_can_be_looked_at(stub: Any, sources: Sources) -> None:
    sources.reviews.all = [review(1, revised_prompt="a \ud83d fox")]
    head, *_ = [part async for part in stub.GetReview(pb.GetReviewRequest(key=review(1).key.name))]
    assert head.header.revised_prompt == "a ? fox"


async def test_a_picture_that_waits_no_more_cannot_be_looked_at(stub: Any) -> None:
    failed = await failure(answered(stub.GetReview(pb.GetReviewRequest(key=review(1).key.name))))
    assert (failed.code, failed.reason) == ("NOT_FOUND", "REVIEW_GONE")


# --- similar hits ---


async def test_two_keys_that_are_banned_answer_for_one_another_no_more(stub: Any, sources: Sources) -> None:
    asked, answered = picture_key(1, variant=3), picture_key(2)
    await stub.BanMatch(pb.BanMatchRequest(key=asked.name, other_key=answered.name))
    assert sources.epochs.is_banned(answered.with_variant(1), asked.with_variant(0))
    assert not sources.epochs.is_banned(asked, picture_key(3))
    [file] = sources.files.names
    assert file.endswith(Tombstone.of_banned(asked, answered).name)
    await stub.BanMatch(pb.BanMatchRequest(key=answered.name, other_key=asked.name))
    assert len(sources.epochs.all()) == 1


async def test_the_longest_keys_make_names_that_every_file_system_takes(stub: Any, sources: Sources) -> None:
    long = "x" * 63
    keys = picture_key(1, partition=long), picture_key(2, partition=long)
    await stub.BanMatch(pb.BanMatchRequest(key=keys[0].name, other_key=keys[1].name))
    assert len(sources.files.names[0].removeprefix("purges/")) < 255


async def test_a_ban_that_a_tier_takes_no_note_of_says_so_and_holds_here(stub: Any, sources: Sources) -> None:
    sources.files.is_down = True
    ban = pb.BanMatchRequest(key=picture_key(1).name, other_key=picture_key(2).name)
    failed = await failure(stub.BanMatch(ban))
    assert (failed.code, failed.reason) == ("UNAVAILABLE", "TIER_UNREACHABLE")
    assert "s3" in failed.message
    assert sources.epochs.is_banned(picture_key(1), picture_key(2))
    sources.files.is_down = False
    await stub.BanMatch(ban)
    assert len(sources.files.names) == 1


async def test_a_switch_is_turned_off_and_on_in_a_namespace_or_everywhere(stub: Any, sources: Sources) -> None:
    off = pb.SetSwitchRequest(switch="SWITCH_SIMILARITY", namespace="shop", on=False)
    state = pb.SwitchState(switch="SWITCH_SIMILARITY", namespace="shop", on=False)
    assert (await stub.SetSwitch(off)).state == state
    assert (sources.epochs.allows_similar("shop"), sources.epochs.allows_similar("default")) == (False, True)
    await stub.SetSwitch(pb.SetSwitchRequest(switch="SWITCH_SIMILARITY", on=False))
    assert not sources.epochs.allows_similar("default")
    listed = (await stub.ListSwitches(pb.ListSwitchesRequest())).switches
    assert [each.namespace for each in listed] == ["", "shop"]
    assert listed[1] == state
    await stub.SetSwitch(pb.SetSwitchRequest(switch="SWITCH_SIMILARITY", on=True))
    assert (sources.epochs.allows_similar("shop"), sources.epochs.allows_similar("default")) == (False, True)
    on = pb.SetSwitchRequest(switch="SWITCH_SIMILARITY", namespace="shop", on=True)
    assert (await stub.SetSwitch(on)).state.on
    assert not (await stub.ListSwitches(pb.ListSwitchesRequest())).switches


async def test_a_switch_that_a_tier_takes_no_note_of_says_so(stub: Any, sources: Sources) -> None:
    sources.files.is_down = True
    failed = await failure(stub.SetSwitch(pb.SetSwitchRequest(switch="SWITCH_SIMILARITY", on=False)))
    assert failed.reason == "TIER_UNREACHABLE"
    assert not sources.epochs.allows_similar("shop")


async def test_a_similar_hit_has_all_that_is_known_the_newest_first(stub: Any, sources: Sources) -> None:
    sample_hit(sources.matches, 0, prompt="a red fox \ud83d")
    sources.clock.advance(1)
    sample_hit(sources.matches, 1, namespace="default")
    newer, older = (await stub.ListMatches(pb.ListMatchesRequest())).matches
    assert older == pb.Match(
        id=older.id,
        time=moment(NOW_S),
        namespace="shop",
        level="MATCH_LEVEL_CANONICAL",
        key=picture_key(1).name,
        matched_key=picture_key(2).name,
        prompt="a red fox ?",
    )
    assert (newer.namespace, newer.prompt) == ("default", "")
    assert list((await stub.ListMatches(pb.ListMatchesRequest(namespace="shop"))).matches) == [older]


async def test_a_similar_hit_that_was_right_is_listed_no_more(stub: Any, sources: Sources) -> None:
    sample_hit(sources.matches, 0)
    [hit] = (await stub.ListMatches(pb.ListMatchesRequest())).matches
    right = pb.ResolveMatchRequest(id=hit.id, decision="MATCH_DECISION_RIGHT")
    assert (await stub.ResolveMatch(right)).match == hit
    assert not (await stub.ListMatches(pb.ListMatchesRequest())).matches
    assert sources.epochs.all() == []
    again = await failure(stub.ResolveMatch(right))
    assert (again.code, again.reason) == ("NOT_FOUND", "REVIEW_GONE")


async def test_a_similar_hit_that_was_wrong_is_banned_and_stays_listed_until_every_tier_took_note(
    stub: Any, sources: Sources
) -> None:
    sample_hit(sources.matches, 0)
    [hit] = (await stub.ListMatches(pb.ListMatchesRequest())).matches
    sources.files.is_down = True
    wrong = pb.ResolveMatchRequest(id=hit.id, decision="MATCH_DECISION_WRONG")
    assert (await failure(stub.ResolveMatch(wrong))).reason == "TIER_UNREACHABLE"
    assert len((await stub.ListMatches(pb.ListMatchesRequest())).matches) == 1
    sources.files.is_down = False
    assert (await stub.ResolveMatch(wrong)).match == hit
    assert not (await stub.ListMatches(pb.ListMatchesRequest())).matches
    assert sources.epochs.is_banned(picture_key(1), picture_key(2))


# --- pages ---


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("what", ["upstreams", "budgets", "rows", "reviews", "matches"])
async def test_pages_hold_everything_once_and_in_order(stub: Any, sources: Sources, what: str, size: int) -> None:
    names = [f"name{number}" for number in range(6)]
    sources.upstreams.all = [upstream(name) for name in reversed(names)]
    sources.budgets.all = [budget(BudgetScope.CALLER, name) for name in reversed(names)]
    sources.ledger.all = [attempt(number) for number in range(6)]
    sources.reviews.all = [review(number) for number in range(6)]
    for number in range(6):
        sample_hit(sources.matches, number, namespace=("default", "shop")[number % 2])
    method, request = {
        "upstreams": (stub.ListUpstreams, pb.ListUpstreamsRequest(page_size=size)),
        "budgets": (stub.ListBudgets, pb.ListBudgetsRequest(page_size=size)),
        "rows": (stub.ListLedger, pb.ListLedgerRequest(page_size=size)),
        "reviews": (stub.ListReviews, pb.ListReviewsRequest(page_size=size)),
        "matches": (stub.ListMatches, pb.ListMatchesRequest(page_size=size)),
    }[what]
    whole = list(getattr(await method(type(request)()), what))
    assert len(whole) == 6
    pages = []
    while True:
        page = await method(request)
        pages.append(list(getattr(page, what)))
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert [each for page in pages for each in page] == whole
    assert len(pages) == -(-6 // size)


async def test_what_goes_between_two_pages_moves_nothing_else(stub: Any, sources: Sources) -> None:
    sources.upstreams.all = [upstream(name) for name in "abcd"]
    first = await stub.ListUpstreams(pb.ListUpstreamsRequest(page_size=2))
    sources.upstreams.all = [upstream(name) for name in "acd"]
    rest = await stub.ListUpstreams(pb.ListUpstreamsRequest(page_token=first.next_page_token))
    assert [each.name for each in rest.upstreams] == ["c", "d"]


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_whatever_comes_as_a_page_token_is_read_or_refused_by_name(text: str) -> None:
    problems = Problems()
    with contextlib.suppress(InvalidRequestError):
        read_page(0, text, problems)
    refused = {} if problems.are_none else {"page_token": "is not the next_page_token of an earlier answer"}
    assert problems._texts == refused


@given(st.text(max_size=200))
def test_a_page_token_leads_to_where_it_was_made(last: str) -> None:
    token = page_token(last)
    if len(token) <= 400:
        assert read_page(0, token, Problems()).after == last


# --- bad input ---


@pytest.mark.parametrize(
    ("rpc", "message", "fields"),
    [
        ("ListUpstreams", pb.ListUpstreamsRequest(page_size=-1), {"page_size"}),
        ("ListBudgets", pb.ListBudgetsRequest(page_size=MAX_PAGE_SIZE + 1), {"page_size"}),
        ("ListReviews", pb.ListReviewsRequest(page_token="x", page_size=51), {"page_token", "page_size"}),
        ("ListLedger", pb.ListLedgerRequest(page_token="é"), {"page_token"}),
        ("ListLedger", pb.ListLedgerRequest(since=Timestamp(seconds=-1)), {"since"}),
        ("ListLedger", pb.ListLedgerRequest(until=Timestamp(seconds=253_402_300_800)), {"until"}),
        ("ListLedger", pb.ListLedgerRequest(until=Timestamp(nanos=1_000_000_000)), {"until"}),
        ("ListLedger", pb.ListLedgerRequest(since=Timestamp(seconds=2), until=Timestamp(seconds=1)), {"until"}),
        ("UpdateUpstream", pb.UpdateUpstreamRequest(name="north"), {"name"}),
        ("UpdateUpstream", pb.UpdateUpstreamRequest(name="north", clear_percent=False), {"name"}),
        ("UpdateUpstream", pb.UpdateUpstreamRequest(name="north", weight=0, percent=100.5), {"weight", "percent"}),
        ("UpdateUpstream", pb.UpdateUpstreamRequest(name="north", weight=float("nan")), {"weight"}),
        ("UpdateUpstream", pb.UpdateUpstreamRequest(name="north", percent=float("nan")), {"percent"}),
        ("UpdateUpstream", pb.UpdateUpstreamRequest(name="north", weight=float("inf")), {"weight"}),
        ("UpdateBudget", pb.UpdateBudgetRequest(name="global/day", limit_microusd=-1), {"limit_microusd"}),
        ("UpdateBudget", pb.UpdateBudgetRequest(name="global/day", limit_microusd=10**15 + 1), {"limit_microusd"}),
        ("GetReview", pb.GetReviewRequest(key="no key"), {"key"}),
        ("ResolveReview", pb.ResolveReviewRequest(key="no key"), {"key", "decision"}),
        ("ResolveReview", pb.ResolveReviewRequest(key=review(1).key.name, decision=cast("Any", 9)), {"decision"}),
        ("BanMatch", pb.BanMatchRequest(key="no key"), {"key", "other_key"}),
        ("BanMatch", pb.BanMatchRequest(key=_KEY.name, other_key=_KEY.stand_in.name), {"other_key"}),
        ("BanMatch", pb.BanMatchRequest(key=_KEY.rendition(bytes(32)).name, other_key=_KEY.name), {"key"}),
        ("BanMatch", pb.BanMatchRequest(key=_KEY.name, other_key=_KEY.with_variant(1).name), {"other_key"}),
        ("BanMatch", pb.BanMatchRequest(key=_KEY.name, other_key=picture_key(2, partition="b").name), {"other_key"}),
        ("SetSwitch", pb.SetSwitchRequest(), {"switch", "on"}),
        ("SetSwitch", pb.SetSwitchRequest(switch="SWITCH_SIMILARITY", namespace="shopp", on=True), {"namespace"}),
        ("ListMatches", pb.ListMatchesRequest(namespace="shopp", page_size=-1), {"namespace", "page_size"}),
        ("ResolveMatch", pb.ResolveMatchRequest(), {"id", "decision"}),
        ("ResolveMatch", pb.ResolveMatchRequest(id=65 * "1", decision="MATCH_DECISION_WRONG"), {"id"}),
    ],
)
async def test_bad_fields_are_named_and_nothing_changes(
    stub: Any, sources: Sources, rpc: str, message: Message, fields: set[str]
) -> None:
    sources.upstreams.all = [upstream("north")]
    sources.budgets.all = [budget()]
    sources.reviews.all = [review(1)]
    failed = await failure(answered(getattr(stub, rpc)(message)))
    assert (failed.code, failed.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert failed.fields.keys() == fields
    assert sources.upstreams.changes == []
    assert sources.budgets.all == [budget()]
    assert sources.reviews.all == [review(1)]
    assert sources.epochs.all() == []


async def test_bytes_that_are_no_message_are_malformed(sources: Sources) -> None:
    async with serving(admin_service(sources)) as address, grpc.aio.insecure_channel(address) as channel:
        failed = await failure(channel.unary_unary(f"/{NAME}/UpdateBudget")(b"\xff"))
    assert failed.reason == "MALFORMED_MESSAGE"


# --- alarms ---


async def test_alarms_come_as_they_stand_those_that_ring_first(stub: Any, sources: Sources) -> None:
    sources.alarms.all = [alarm(state=AlarmState.RINGING), alarm("dear", value=None)]
    few_hits, dear = (await stub.ListAlarms(pb.ListAlarmsRequest())).alarms
    assert few_hits == pb.Alarm(
        name="few-hits",
        kind="hit_rate_below",
        state="ALARM_STATE_RINGING",
        value=0.25,
        threshold=0.5,
        since=moment(NOW_S),
        runbook_url="https://wiki/few-hits",
    )
    assert not dear.HasField("value")


# --- rights ---


@pytest.mark.parametrize("rpc", METHODS)
async def test_without_the_permission_admin_nothing_opens(sources: Sources, rpc: str) -> None:
    everything_else = Caller("shop", frozenset(Permission) - {Permission.ADMIN})
    callers = [(hashlib.sha256(b"shop").digest(), everything_else), (hashlib.sha256(b"op").digest(), OPERATOR)]
    sources.reviews.all = [review(1)]
    sources.budgets.all = [budget()]
    sources.upstreams.all = [upstream("north")]
    sample_hit(sources.matches, 0)
    [hit] = await sources.matches.page(namespace=None, before="", limit=1)
    message = {
        "BanMatch": pb.BanMatchRequest(key=_KEY.name, other_key=picture_key(2).name),
        "SetSwitch": pb.SetSwitchRequest(switch="SWITCH_SIMILARITY", on=False),
        "ResolveMatch": pb.ResolveMatchRequest(id=hit.id, decision="MATCH_DECISION_WRONG"),
        "UpdateUpstream": pb.UpdateUpstreamRequest(name="north", paused=True),
        "UpdateBudget": pb.UpdateBudgetRequest(name="global/day", limit_microusd=1),
        "GetReview": pb.GetReviewRequest(key=review(1).key.name),
        "ResolveReview": pb.ResolveReviewRequest(key=review(1).key.name, decision="REVIEW_DECISION_REJECT"),
    }.get(rpc) or getattr(pb, f"{rpc}Request")()
    service = admin_service(sources, callers=callers, anonymous=None)
    async with serving(service) as address, calling(address) as stub:
        method = getattr(stub, rpc)

        def call(**options: Any) -> Any:
            return method(iter([message]) if rpc == "ImportImages" else message, **options)

        assert (await failure(answered(call()))).code == "UNAUTHENTICATED"
        denied = await failure(answered(call(metadata=authorization("shop"))))
        assert (denied.code, denied.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert (sources.upstreams.changes, sources.reviews.rejected, sources.epochs.all()) == ([], [], [])
        await answered(call(metadata=authorization("op")))


async def test_who_changed_what_is_in_the_log(stub: Any, sources: Sources) -> None:
    sources.upstreams.all = [upstream("north")]
    sources.budgets.all = [budget()]
    sources.reviews.all = [review(1)]
    sample_hit(sources.matches, 0, prompt="a secret prompt")
    [hit] = await sources.matches.page(namespace=None, before="", limit=1)
    with capture_logs() as lines:
        await stub.UpdateUpstream(pb.UpdateUpstreamRequest(name="north", paused=True))
        await stub.UpdateBudget(pb.UpdateBudgetRequest(name="global/day", limit_microusd=7))
        await stub.ResolveReview(pb.ResolveReviewRequest(key=review(1).key.name, decision="REVIEW_DECISION_REJECT"))
        await stub.BanMatch(pb.BanMatchRequest(key=_KEY.name, other_key=picture_key(9).name))
        await stub.SetSwitch(pb.SetSwitchRequest(switch="SWITCH_SIMILARITY", on=False))
        await stub.ResolveMatch(pb.ResolveMatchRequest(id=hit.id, decision="MATCH_DECISION_WRONG"))
    changes = {line["event"]: line for line in lines if line["event"] != "call"}
    assert changes["upstream_changed"]["paused"] is True
    assert changes["budget_changed"]["limit_microusd"] == 7
    assert changes["review_resolved"]["decision"] == "REVIEW_DECISION_REJECT"
    assert (changes["match_banned"]["key"], changes["match_banned"]["other_key"]) == (_KEY.name, picture_key(9).name)
    assert (changes["switch_set"]["namespace"], changes["switch_set"]["on"]) == ("everywhere", False)
    assert changes["match_resolved"]["decision"] == "MATCH_DECISION_WRONG"
    assert {line["caller"] for line in changes.values()} == {"operator"}
    assert "secret" not in str(lines)


# --- beside the public service ---


class Public:
    """Stands where the public service stands."""

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler("test.Public", {})

    async def idle(self) -> None:
        return


class Busy(Public):
    """A further service that is busy until it is told otherwise."""

    name = "test.Busy"

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()
        self.is_idle = asyncio.Event()

    async def idle(self) -> None:
        self.is_asked.set()
        await self.is_idle.wait()


async def opened(service: RpcService) -> RpcServer:
    server = RpcServer(cast("Any", Public()), listen=Listen(port=0), tiers=(), further=[service])
    await server.start()
    return server


async def test_the_server_names_the_service_to_reflection_and_health(sources: Sources) -> None:
    server = await opened(admin_service(sources))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            method = channel.stream_stream(
                "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            names = reflection_pb2.ServerReflectionRequest(list_services="*")
            file = reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME)
            listed, described = [answer async for answer in method(iter([names, file]))]
            health = health_pb2_grpc.HealthStub(channel)
            status = await cast("Any", health).Check(health_pb2.HealthCheckRequest(service=NAME))
    finally:
        await server.drain(5)
    assert NAME in {each.name for each in listed.list_services_response.service}
    assert described.file_descriptor_response.file_descriptor_proto
    assert status.status == health_pb2.HealthCheckResponse.SERVING


async def test_draining_waits_until_a_further_service_is_idle() -> None:
    busy = Busy()
    server = await opened(busy)
    draining = asyncio.ensure_future(server.drain(30))
    await busy.is_asked.wait()
    assert not draining.done()
    busy.is_idle.set()
    await asyncio.wait_for(draining, timeout=10)


@pytest.mark.parametrize("loop_steps", [0, 1, 5, 50])
async def test_a_drain_that_is_cancelled_at_any_step_leaves_no_call_and_no_listener(loop_steps: int) -> None:
    server = await opened(Busy())
    async with watched(server) as watch:
        draining = asyncio.ensure_future(server.drain(30))
        for _ in range(1 + loop_steps):
            await asyncio.sleep(0)
        draining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await draining
        await ended(watch)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) == errno.ECONNREFUSED


async def test_time_that_runs_out_while_calls_are_being_ended_does_no_harm() -> None:
    """grpc crashes the process when its own grace runs out just after its server has ended."""
    for step in range(100):
        server = await opened(Busy())
        async with watched(server) as watch:
            await server.drain(0.01 + 0.0002 * (step % 10))
            await ended(watch)


@contextlib.asynccontextmanager
async def watched(server: RpcServer) -> AsyncIterator[Any]:
    """A health watch, which never ends by itself."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health = cast("Any", health_pb2_grpc.HealthStub(channel))
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        yield watch


async def ended(call: Any) -> None:
    """Return when a call of a stream has ended."""
    async with asyncio.timeout(10):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
