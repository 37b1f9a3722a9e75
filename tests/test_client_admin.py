"""The admin part of the client against the admin API. Both twins, sync and asyncio, go through every test."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cacheserver.client import (
    Admin,
    Alarm,
    AlarmState,
    AsyncAdmin,
    AsyncClient,
    AttemptOutcome,
    Budget,
    BudgetPeriod,
    BudgetScope,
    CacheError,
    Client,
    CorruptDownloadError,
    InvalidRequestError,
    LedgerRow,
    Match,
    MatchLevel,
    PermissionDeniedError,
    Review,
    ReviewPicture,
    Switch,
    SwitchState,
    TryAgainError,
    UnauthenticatedError,
    UnknownNameError,
    UnreachableError,
    Upstream,
    UpstreamHealth,
    Usage,
)
from cacheserver.client.admin import PictureReader, read_upstream
from cacheserver.model import BudgetScope as Scope
from cacheserver.model import Caller
from cacheserver.pb import admin_pb2 as pb
from tests.admin_front import (
    NOW_S,
    OPERATOR,
    Sources,
    admin_service,
    alarm,
    attempt,
    budget,
    picture_key,
    review,
    sample_hit,
    serving,
    upstream,
)

NOW = datetime.fromtimestamp(NOW_S, UTC)

Ask = Callable[..., Awaitable[Any]]


def asking(kind: str, address: str, token: str | None = None) -> Ask:
    """Calls a method of a client's `admin`, as either twin; what comes in pages is read to its end."""

    async def ask(method: str, *args: Any, **options: Any) -> Any:
        if kind == "sync":
            return await asyncio.to_thread(ask_in_thread, method, *args, **options)
        async with AsyncClient(address, token=token) as client:
            answer = getattr(client.admin, method)(*args, **options)
            return [each async for each in answer] if inspect.isasyncgen(answer) else await answer

    def ask_in_thread(method: str, *args: Any, **options: Any) -> Any:
        with Client(address, token=token) as client:
            answer = getattr(client.admin, method)(*args, **options)
            return list(answer) if inspect.isgenerator(answer) else answer

    return ask


@pytest.fixture(params=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
async def ask(kind: str, sources: Sources) -> AsyncIterator[Ask]:
    async with serving(admin_service(sources)) as address:
        yield asking(kind, address)


@pytest.fixture
def _short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheserver.client.admin._PAGE_SIZE", 2)
    monkeypatch.setattr("cacheserver.rpc.admin.DEFAULT_REVIEWS", 2)
    monkeypatch.setattr("cacheserver.rpc.admin.DEFAULT_PAGE_SIZE", 2)


async def test_two_keys_are_banned(ask: Ask, sources: Sources) -> None:
    key, other = picture_key(1).name, picture_key(2).name
    assert await ask("ban_match", key, other) is None
    assert sources.epochs.is_banned(picture_key(2), picture_key(1))
    with pytest.raises(InvalidRequestError):
        await ask("ban_match", key, key)
    sources.files.is_down = True
    with pytest.raises(TryAgainError):
        await ask("ban_match", key, other)


async def test_a_switch_is_set_and_seen(ask: Ask, sources: Sources) -> None:
    off = SwitchState(Switch.SIMILARITY, "shop", on=False)
    assert await ask("set_switch", Switch.SIMILARITY, on=False, namespace="shop") == off
    assert await ask("list_switches") == (off,)
    assert await ask("set_switch", Switch.SIMILARITY, on=True) == SwitchState(Switch.SIMILARITY, "", on=True)
    assert not sources.epochs.allows_similar("shop")
    await ask("set_switch", Switch.SIMILARITY, on=True, namespace="shop")
    assert await ask("list_switches") == ()


@pytest.mark.usefixtures("_short_pages")
async def test_similar_hits_are_read_page_by_page_and_resolved(ask: Ask, sources: Sources) -> None:
    for number in range(5):
        sample_hit(sources.matches, number, namespace=("shop", "default")[number % 2], prompt=f"{number}")
        sources.clock.advance(1)
    newest, *rest = await ask("list_matches")
    assert newest == Match(
        id=newest.id,
        time=NOW + timedelta(seconds=4),
        namespace="shop",
        level=MatchLevel.CANONICAL,
        key=picture_key(9).name,
        matched_key=picture_key(10).name,
        prompt="4",
    )
    assert "prompt" not in repr(newest)
    assert [each.prompt for each in rest] == ["3", "2", "1", "0"]
    assert [each.prompt for each in await ask("list_matches", namespace="default")] == ["3", "1"]
    assert await ask("approve_match", newest.id) == newest
    assert sources.epochs.all() == []
    assert await ask("reject_match", rest[0].id) == rest[0]
    assert sources.epochs.is_banned(picture_key(7), picture_key(8))
    assert len(await ask("list_matches")) == 3
    for method in ("approve_match", "reject_match"):
        with pytest.raises(UnknownNameError):
            await ask(method, newest.id)


async def test_upstreams_are_values(ask: Ask, sources: Sources) -> None:
    sources.upstreams.all = [upstream("north", percent=12.5, latency_s=1.25, images_per_minute=250.0), upstream("west")]
    north, west = await ask("list_upstreams")
    assert north == Upstream(
        name="north",
        limit_group="acme",
        models=("gpt-image-2", "painter"),
        health=UpstreamHealth.WELL,
        weight=2.0,
        percent=12.5,
        rank=1,
        price_factor=0.9,
        success_rate=0.985,
        latency_s=1.25,
        in_flight=3,
        calls=1_234,
        images_per_minute=250.0,
    )
    assert (west.percent, west.latency_s, west.images_per_minute) == (None, None, None)


async def test_an_upstream_changes_as_asked(ask: Ask, sources: Sources) -> None:
    sources.upstreams.all = [upstream("north")]
    assert (await ask("update_upstream", "north", paused=True)).health is UpstreamHealth.PAUSED
    await ask("update_upstream", "north", weight=3, percent=0)
    await ask("update_upstream", "north", clear_percent=True)
    assert sources.upstreams.changes == [
        {"weight": None, "percent": None, "clear_percent": False, "paused": True},
        {"weight": 3.0, "percent": 0.0, "clear_percent": False, "paused": None},
        {"weight": None, "percent": None, "clear_percent": True, "paused": None},
    ]
    with pytest.raises(TypeError, match="either"):
        await ask("update_upstream", "north", percent=1, clear_percent=True)


async def test_budgets_are_values_and_change(ask: Ask, sources: Sources) -> None:
    sources.budgets.all = [budget(Scope.NAMESPACE, "shop")]
    [shown] = await ask("list_budgets")
    assert shown == Budget(
        name="namespace:shop/day",
        scope=BudgetScope.NAMESPACE,
        subject="shop",
        period=BudgetPeriod.DAY,
        limit_microusd=50_000_000,
        spent_microusd=12_345_678,
        reserved_microusd=200_000,
        reset_time=NOW + timedelta(hours=1),
    )
    changed = await ask("update_budget", "namespace:shop/day", limit_microusd=0)
    assert changed.limit_microusd == sources.budgets.all[0].budget.limit_microusd == 0


async def test_the_rows_of_the_ledger_are_values(ask: Ask, sources: Sources) -> None:
    sources.ledger.all = [attempt(1)]
    assert await ask("list_ledger") == [
        LedgerRow(
            id="a0001",
            namespace="shop",
            caller="catalog",
            upstream="north",
            model="gpt-image-2",
            quality="high",
            images=2,
            estimate_microusd=120_000,
            start_time=NOW + timedelta(seconds=1),
            tags=("spring", "banner"),
            outcome=AttemptOutcome.SETTLED,
            end_time=NOW + timedelta(seconds=3.5),
            cost_microusd=106_001,
            reason="ok",
            upstream_request_id="req_1",
            usage=Usage(input_tokens=10, input_text_tokens=10, output_tokens=400, total_tokens=410),
        )
    ]


async def test_the_ledger_is_read_from_then_until_then(ask: Ask, sources: Sources) -> None:
    sources.ledger.all = [attempt(number) for number in range(6)]
    rows = await ask("list_ledger", since=NOW + timedelta(seconds=2), until=NOW + timedelta(seconds=4))
    assert [row.id for row in rows] == ["a0002", "a0003"]


async def test_pictures_that_wait_are_values_and_are_decided_on(ask: Ask, sources: Sources) -> None:
    sources.reviews.all = [review(1), review(2, score=None)]
    shown, unscored = await ask("list_reviews")
    assert shown == Review(
        key=review(1).key.name,
        namespace="shop",
        model="gpt-image-2",
        width=1024,
        height=768,
        score=0.31,
        create_time=NOW,
        content_type="image/png",
        size_bytes=1_500,
        paid_microusd=53_000,
    )
    assert unscored.score is None
    assert await ask("approve_review", shown.key) == review(1).key.with_variant(1).name
    assert await ask("reject_review", unscored.key) is None
    assert (sources.reviews.approved, sources.reviews.rejected) == ([review(1).key], [review(2).key])


async def test_a_picture_that_waits_comes_whole_with_its_facts(ask: Ask, sources: Sources) -> None:
    data = bytes(range(256)) * 2_500
    sources.reviews.all = [review(1, data=data, revised_prompt="a red fox", won_against=2)]
    picture = await ask("get_review", review(1).key.name)
    [listed] = await ask("list_reviews")
    assert picture == ReviewPicture(
        review=listed,
        data=data,
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        quality="high",
        revised_prompt="a red fox",
        won_against=2,
        tags=("spring",),
    )
    assert "red fox" not in repr(picture)


HEADER = pb.GetReviewResponse(
    header=pb.ReviewHeader(review=pb.Review(size_bytes=6), digest=f"sha256:{hashlib.sha256(b'abcdef').hexdigest()}")
)


@pytest.mark.parametrize(
    "parts",
    [
        [HEADER],
        [HEADER, pb.GetReviewResponse(chunk=b"abc")],
        [HEADER, pb.GetReviewResponse(chunk=b"abcdeF")],
        [HEADER, pb.GetReviewResponse(chunk=b"abcdef"), pb.GetReviewResponse(chunk=b"g")],
        [pb.GetReviewResponse(chunk=b"abcdef")],
        [],
    ],
    ids=["no bytes", "too few", "others", "too many", "no header", "nothing"],
)
def test_a_damaged_picture_is_never_taken_for_the_one_that_waits(parts: list[pb.GetReviewResponse]) -> None:
    reader = PictureReader()
    with pytest.raises(CorruptDownloadError):  # noqa: PT012 - any of the parts may show the damage
        for part in parts:
            reader.read(part)
        reader.finish()


async def test_alarms_are_values(ask: Ask, sources: Sources) -> None:
    sources.alarms.all = [alarm(state=AlarmState.RINGING), alarm("dear", value=None)]
    few_hits, dear = await ask("list_alarms")
    assert few_hits == Alarm(
        name="few-hits",
        kind="hit_rate_below",
        state=AlarmState.RINGING,
        value=0.25,
        threshold=0.5,
        since=NOW,
        runbook_url="https://wiki/few-hits",
    )
    assert (dear.value, dear.state) == (None, AlarmState.QUIET)


@pytest.mark.usefixtures("_short_pages")
async def test_every_page_is_read(ask: Ask, sources: Sources) -> None:
    sources.upstreams.all = [upstream(f"u{number}") for number in range(5)]
    sources.budgets.all = [budget(Scope.CALLER, f"c{number}") for number in range(5)]
    sources.ledger.all = [attempt(number) for number in range(5)]
    sources.reviews.all = [review(number) for number in range(5)]
    for method in ("list_upstreams", "list_budgets", "list_ledger", "list_reviews"):
        assert len(set(await ask(method))) == 5
    assert sources.ledger.limits == [3, 3, 3]


@pytest.mark.usefixtures("_short_pages")
async def test_no_page_is_asked_for_before_it_is_read(sources: Sources) -> None:
    sources.ledger.all = [attempt(number) for number in range(5)]
    async with serving(admin_service(sources)) as address, AsyncClient(address) as client:
        rows = client.admin.list_ledger()
        assert (await anext(rows)).id == "a0000"
        await rows.aclose()
    assert sources.ledger.limits == [3]


@pytest.mark.parametrize(
    ("method", "args", "options", "reason"),
    [
        ("update_upstream", ["west"], {"weight": 1}, "UPSTREAM_UNKNOWN"),
        ("update_budget", ["global/year"], {"limit_microusd": 1}, "UPSTREAM_UNKNOWN"),
        ("get_review", [review(9).key.name], {}, "REVIEW_GONE"),
        ("approve_review", [review(9).key.name], {}, "REVIEW_GONE"),
        ("reject_review", [review(9).key.name], {}, "REVIEW_GONE"),
    ],
)
async def test_what_nobody_knows_is_an_error_of_its_own(
    ask: Ask, method: str, args: list[str], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnknownNameError) as unknown:
        await ask(method, *args, **options)
    assert unknown.value.reason == reason


async def test_a_wrong_field_is_named(ask: Ask) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await ask("update_upstream", "north", weight=-1)
    assert refused.value.violations.keys() == {"weight"}


async def test_the_token_of_the_client_is_sent(kind: str, sources: Sources) -> None:
    nobody = Caller("nobody", frozenset())
    callers = [(hashlib.sha256(b"op").digest(), OPERATOR), (hashlib.sha256(b"no").digest(), nobody)]
    async with serving(admin_service(sources, callers=callers, anonymous=None)) as address:
        assert await asking(kind, address, "op")("list_budgets") == ()
        expected: list[tuple[str | None, type[CacheError]]] = [
            ("no", PermissionDeniedError),
            (None, UnauthenticatedError),
        ]
        for token, error in expected:
            with pytest.raises(error):
                await asking(kind, address, token)("list_ledger")


async def test_nobody_at_the_address_is_told_as_such(kind: str) -> None:
    with pytest.raises(UnreachableError):
        await asking(kind, "127.0.0.1:1")("list_upstreams")
    with pytest.raises(UnreachableError):
        await asking(kind, "127.0.0.1:1")("get_review", review(1).key.name)


def test_a_word_of_a_newer_service_reads_as_unknown() -> None:
    assert read_upstream(pb.Upstream(health=99)).health is None  # type: ignore[arg-type] # a number of the future


def test_the_twins_have_the_same_methods_and_parameters() -> None:
    def surface(admin: type) -> Iterator[tuple[str, list[str]]]:
        for name, method in inspect.getmembers(admin, inspect.isfunction):
            if not name.startswith("_"):
                yield name, [str(each) for each in inspect.signature(method).parameters.values()]

    assert dict(surface(Admin)) == dict(surface(AsyncAdmin))
