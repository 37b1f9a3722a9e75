"""Warm-ups through both twins of the client, against the real service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest

from cacheserver.client import (
    InvalidRequestError,
    MatchLevel,
    PromptRefusedError,
    TierName,
    WarmItem,
    WarmOutcome,
    WarmProgress,
    WarmResult,
)
from cacheserver.client.warm import MAX_ITEMS, item_messages
from cacheserver.errors import PromptRefusedError as Refused
from cacheserver.pb import promptcache_pb2 as pb
from tests.house import House
from tests.rpc_front import open_front
from tests.test_client import connected


@pytest.fixture(params=["sync", "asyncio"])
async def client(request: pytest.FixtureRequest, house: House) -> AsyncIterator[Any]:
    async with open_front(house) as front, connected(request.param, f"127.0.0.1:{front.server.port}") as client:
        yield client


async def warmed(client: Any, *items: WarmItem, **options: Any) -> list[WarmProgress]:
    return await warmed_from(client, items, **options)


async def warmed_from(client: Any, items: Iterable[WarmItem], **options: Any) -> list[WarmProgress]:
    if hasattr(client, "inner"):
        return await asyncio.to_thread(lambda: list(client.inner.warm(items, **options)))
    return [progress async for progress in client.warm(items, **options)]


async def test_a_job_is_planned_and_run_and_told(client: Any, house: House) -> None:
    items = [WarmItem(1, "a red fox"), WarmItem(2, "A red fox."), WarmItem(3, "a blue fox", n=2)]
    *_, plan = await warmed(client, *items, plan=True)
    assert (plan.outcomes, plan.totals.duplicates, plan.totals.to_generate) == ((), 1, 3)
    assert plan.totals.estimated_microusd > 0
    assert plan.totals.estimated_s is not None
    run = await warmed(client, *items, job="night", budget_microusd=10_000_000, concurrency=2)
    outcomes = {each.row: each for progress in run for each in progress.outcomes}
    assert outcomes[1] == WarmOutcome(1, WarmResult.GENERATED, outcomes[1].keys, TierName.UPSTREAM, 53_000)
    assert outcomes[2].result is WarmResult.DUPLICATE
    assert [key.rpartition(".")[2] for key in outcomes[3].keys] == ["0", "1"]
    assert (run[-1].totals.generated, run[-1].totals.spent_microusd, house.upstream.images) == (3, 159_000, 3)


async def test_an_item_fails_with_the_error_that_a_call_would_raise(client: Any, house: House) -> None:
    house.upstream.fail_next(Refused("No."))
    outcomes = {
        each.row: each.error
        for progress in await warmed(client, WarmItem(1, "a red fox"), WarmItem(2, ""), job="night")
        for each in progress.outcomes
    }
    assert isinstance(outcomes[1], PromptRefusedError)
    assert isinstance(outcomes[2], InvalidRequestError)
    assert set(outcomes[2].violations) == {"spec.prompt"}


async def test_options_out_of_their_range_end_the_stream(client: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await warmed(client, job="")
    assert set(raised.value.violations) == {"options.job"}
    with pytest.raises(InvalidRequestError, match="options: a value has the wrong type or range"):
        await warmed(client, job="x", budget_microusd=2**70)


async def test_an_item_that_cannot_be_sent_is_an_error_after_those_before_it(
    client: Any, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacheserver.client.warm.MAX_ITEMS", 2)
    with pytest.raises(InvalidRequestError):
        await warmed(client, WarmItem(1, "a"), WarmItem(2, "b"), WarmItem(3, "c", n=2**40), WarmItem(4, "d"), job="x")
    assert house.upstream.images == 2


async def test_what_making_the_items_raises_is_raised(client: Any) -> None:
    def items() -> Iterator[WarmItem]:
        yield WarmItem(1, "a red fox")
        raise LookupError("no more of them")

    with pytest.raises(LookupError, match="no more of them"):
        await warmed_from(client, items(), plan=True)


async def test_a_tier_is_filled(client: Any, house: House) -> None:
    await house.get("a red fox")
    await house.settle()
    await house.redis.delete(house.identity("a red fox")[1].key)
    run = await warmed(client, fill=TierName.REDIS, namespace="default")
    assert (run[-1].outcomes, run[-1].totals.filled) == ((), 1)


def test_items_are_taken_a_message_at_a_time() -> None:
    taken = 0

    def endless() -> Iterator[WarmItem]:
        nonlocal taken
        while True:
            taken += 1
            yield WarmItem(taken, "a red fox")

    messages = item_messages(endless())
    assert taken == 0
    assert len(next(messages).items.items) == taken == MAX_ITEMS
    long = item_messages(WarmItem(row, "x" * 32_000) for row in range(1_000))
    assert max(message.ByteSize() for message in long) < 5_000_000


def test_everything_an_item_says_reaches_the_message() -> None:
    item = WarmItem(7, "a", namespace="shop", n=2, tags=("t",), use="list", candidates=3, ttl_s=60, refresh=True)
    [message] = item_messages([item, WarmItem(8, "b", match_level=MatchLevel.EXACT)])
    first, second = message.items.items
    assert (first.row, first.request.namespace, first.request.n, list(first.request.tags)) == (7, "shop", 2, ["t"])
    assert (first.request.use, first.request.candidates, first.request.ttl.seconds) == ("list", 3, 60)
    assert first.request.cache_policy == pb.CACHE_POLICY_REFRESH
    assert second.request.match_level == pb.MATCH_LEVEL_EXACT
    assert second.request.cache_policy == pb.CACHE_POLICY_UNSPECIFIED
