"""What is remembered of calls, and the cached picture that a call missed by one field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cacheserver.client import AsyncClient, UnknownCallError
from cacheserver.errors import UnknownCallError as UnknownCall
from cacheserver.identity import identify
from cacheserver.model import CacheKey, Caller, Found, Identity, ImageRequest, Namespace, Permission, TierName
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.recall import NearMiss, Recall, ToldImages
from tests.house import House
from tests.rpc_front import Front, ask, authorization, failure, open_front, spec
from tests.test_calls_auth import digest
from tests.test_cli import command

NAMESPACE = Namespace("default", "default")
ANN, BOB = (Caller(name, frozenset({Permission.READ, Permission.GENERATE})) for name in ("ann", "bob"))
ADMIN = Caller("operator", frozenset({Permission.ADMIN}))


def wanted(prompt: str = "a red fox", **fields: Any) -> Identity:
    return identify(ImageRequest(prompt=prompt, model="gpt-image-2", **fields), NAMESPACE)


def note(
    recall: Recall,
    request_id: str,
    identity: Identity | None,
    *,
    caller: str = "ann",
    reason: str = "",
    images: ToldImages | None = None,
) -> None:
    recall.note(
        request_id,
        rpc="GetImage",
        time_s=1.0,
        caller=caller,
        namespace="default",
        seconds=0.5,
        reason=reason,
        images=images or ToldImages(),
        wanted=identity,
    )


async def near(recall: Recall, identity: Identity, *cached: Identity) -> NearMiss | None:
    """What is nearest to a missed call, where `cached` are in a tier."""

    async def find(keys: Sequence[CacheKey]) -> tuple[list[Found], list[TierName]]:
        there = {each.key for each in cached}
        return [Found(key, TierName.S3 if key in there else None) for key in keys], []

    note(recall, "missed", identity, reason="NOT_CACHED")
    return await recall.nearest(recall.explain("missed", ANN), find)


class TestCalls:
    def test_one_reads_ones_own_calls_and_an_admin_everybodys(self) -> None:
        recall = Recall()
        note(recall, "one", None, caller="ann")
        assert recall.explain("one", ANN).caller == "ann"
        assert recall.explain("one", ADMIN).caller == "ann"
        with pytest.raises(UnknownCall):
            recall.explain("one", BOB)
        with pytest.raises(UnknownCall):
            recall.explain("two", ADMIN)

    def test_two_callers_of_one_id_do_not_hide_each_others_calls(self) -> None:
        recall = Recall()
        note(recall, "one", None, caller="ann")
        note(recall, "one", None, caller="bob", reason="NOT_CACHED")
        assert (recall.explain("one", ANN).reason, recall.explain("one", BOB).reason) == ("", "NOT_CACHED")
        assert recall.explain("one", ADMIN).caller == "bob"

    def test_a_call_under_an_id_used_before_is_as_new_as_any(self) -> None:
        recall = Recall(calls=3)
        for request_id, caller in (("one", "ann"), ("one", "bob"), ("one", "ann")):
            note(recall, request_id, None, caller=caller)
        assert recall.explain("one", ADMIN).caller == "ann"
        for request_id in ("two", "three"):
            note(recall, request_id, None)
        assert recall.explain("one", ANN).caller == "ann"

    @given(ids=st.lists(st.integers(0, 30), max_size=200))
    def test_however_ids_repeat_it_never_holds_more_than_its_bound_and_always_the_last(self, ids: list[int]) -> None:
        recall = Recall(calls=10, wishes=5)
        for each in ids:
            note(recall, str(each), wanted(f"fox {each}", quality=("low", "high")[each % 2]))
            assert recall.explain(str(each), ANN).rpc == "GetImage"
            assert len(recall._calls) <= 10
            assert len(recall._wishes) <= 5
            kept = set(recall._wishes.values())
            assert {wish for group in recall._by_fields.values() for wish in group} == kept
            assert {wish for group in recall._by_prompt.values() for wish in group} == kept


class TestNearest:
    async def test_the_same_prompt_at_another_quality_is_named_with_both_values(self) -> None:
        recall = Recall()
        low = wanted(quality="low")
        note(recall, "one", low)
        found = await near(recall, wanted(quality="high"), low)
        assert found == NearMiss(low.key, "quality", "high", "low")

    async def test_what_is_told_again_and_again_is_near_however_many_others_were_asked_for(self) -> None:
        recall = Recall(wishes=2)
        low, told = wanted(quality="low"), ToldImages()
        note(recall, "one", low, images=told)
        for prompt in ("a blue fox", "a green fox"):
            note(recall, prompt, wanted(prompt))
        note(recall, "one", low, images=told)
        assert await near(recall, wanted(quality="high"), low) is not None

    async def test_what_is_in_no_tier_any_more_does_not_count(self) -> None:
        recall = Recall()
        low, medium = wanted(quality="low"), wanted(quality="medium")
        note(recall, "one", low)
        note(recall, "two", medium)
        found = await near(recall, wanted(quality="high"), low)
        assert found is not None
        assert found.cached_value == "low"
        assert await near(recall, wanted(quality="high")) is None

    async def test_two_fields_apart_is_not_near(self) -> None:
        recall = Recall()
        other = wanted(quality="low", size="1024x1024")
        note(recall, "one", other)
        assert await near(recall, wanted(quality="high", size="1536x1024"), other) is None

    async def test_of_prompts_with_equal_fields_the_likest_is_named_with_its_likeness(self) -> None:
        recall = Recall()
        closer, further = wanted("a red fox in snow"), wanted("a blue fox")
        for each in (closer, further):
            note(recall, "one", each)
        found = await near(recall, wanted("a red fox in the snow"), closer, further)
        assert found is not None
        assert (found.key, found.field, found.value, found.cached_value) == (closer.key, "prompt", "", "")
        assert found.likeness == pytest.approx(5 / 6)

    async def test_prompts_that_share_no_word_are_not_near(self) -> None:
        recall = Recall()
        other = wanted("an oak")
        note(recall, "one", other)
        assert await near(recall, wanted("a fox"), other) is None

    async def test_a_script_that_writes_no_words_apart_is_compared_by_its_characters(self) -> None:
        recall = Recall()
        other = wanted("雪中的红狐狸")
        note(recall, "one", other)
        found = await near(recall, wanted("雪中的蓝狐狸"), other)
        assert found is not None
        assert found.likeness == pytest.approx(5 / 7)

    async def test_a_parameter_nobody_knows_is_named_and_its_values_are_not(self) -> None:
        recall = Recall()
        other = wanted(extra={"negative_prompt": "blurred"})
        note(recall, "one", other)
        found = await near(recall, wanted(extra={"negative_prompt": "dark"}), other)
        assert found == NearMiss(other.key, "extra.negative_prompt")

    async def test_another_partition_is_not_near(self) -> None:
        recall = Recall()
        request = ImageRequest(prompt="a red fox", model="gpt-image-2", quality="low")
        other = identify(request, replace(NAMESPACE, partition="secret"))
        note(recall, "one", other)
        assert await near(recall, wanted(quality="high"), other) is None

    def test_no_text_of_a_prompt_is_kept(self) -> None:
        recall = Recall()
        note(recall, "one", wanted("unmistakable vermilion", extra={"negative_prompt": "unmistakable"}))
        assert "unmistakable" not in repr(list(recall._wishes.values()))
        assert "vermilion" not in repr(recall._calls)


# --- over the wire ---


@pytest.fixture(autouse=True)
def _quiet_service() -> Iterator[None]:
    """The service shares this process, and its log lines are not what a command prints."""
    with capture_logs():
        yield


def as_caller(token: str, request_id: str) -> dict[str, Any]:
    return {"metadata": (*authorization(token), ("x-request-id", request_id))}


async def explained(front: Front, request_id: str, caller: Caller = ANN) -> pb.ExplainCallResponse:
    request = pb.ExplainCallRequest(request_id=request_id)
    answer: pb.ExplainCallResponse = await front.stub.ExplainCall(request, metadata=authorization(caller.name))
    return answer


@pytest.fixture
def callers() -> list[tuple[bytes, Caller]]:
    return [(digest(each.name), each) for each in (ANN, BOB, ADMIN)]


async def test_a_miss_and_a_hit_are_explained_to_whoever_made_them(
    house: House, callers: list[tuple[bytes, Caller]]
) -> None:
    async with open_front(house, callers=callers, anonymous=None) as front:
        made = await front.stub.GetImage(ask(), **as_caller("ann", "first"))
        await front.stub.GetImage(ask(), **as_caller("ann", "second"))
        first, second = await explained(front, "first"), await explained(front, "second", ADMIN)
        assert (first.rpc, first.caller, first.namespace, first.reason) == ("GetImage", "ann", "default", "")
        assert first.time.ToSeconds() == int(house.clock.now_s())
        assert [(each.key, each.billed) for each in first.images] == [(made.images[0].key, True)]
        assert first.images[0].status == made.image_status[0]
        assert [(each.status.tier, each.billed) for each in second.images] == [(pb.TIER_MEMORY, False)]
        assert not second.HasField("nearest")
        unknown = await failure(
            front.stub.ExplainCall(pb.ExplainCallRequest(request_id="first"), metadata=authorization("bob"))
        )
        assert (unknown.code, unknown.reason) == ("NOT_FOUND", "CALL_UNKNOWN")


async def test_a_miss_is_told_what_was_cached_beside_it_and_a_failure_its_reason(house: House) -> None:
    async with open_front(house) as front:
        cached = await front.stub.GetImage(ask(of={"quality": "low"}))
        only = ask(of={"quality": "high"}, cache_policy="CACHE_POLICY_ONLY_IF_CACHED")
        await failure(front.stub.GetImage(only, metadata=(("x-request-id", "missed"),)))
        missed = await front.stub.ExplainCall(pb.ExplainCallRequest(request_id="missed"))
        assert missed.reason == "NOT_CACHED"
        expected = pb.NearMiss(key=cached.images[0].key, field="quality", value="high", cached_value="low")
        assert missed.nearest == expected
        await front.stub.PurgeImages(pb.PurgeImagesRequest(spec=spec(quality="low")))
        purged = await front.stub.ExplainCall(pb.ExplainCallRequest(request_id="missed"))
        assert not purged.HasField("nearest")


async def test_a_pending_answer_and_a_call_for_nothing_are_explained_too(house: House) -> None:
    house.upstream.hold()
    async with open_front(house) as front:
        await front.stub.GetImage(ask(max_wait={"seconds": 0}), metadata=(("x-request-id", "pending"),))
        await front.stub.FindCached(pb.FindCachedRequest(), metadata=(("x-request-id", "find"),))
        pending = await front.stub.ExplainCall(pb.ExplainCallRequest(request_id="pending"))
        found = await front.stub.ExplainCall(pb.ExplainCallRequest(request_id="find"))
    assert [(each.status.state, each.billed) for each in pending.images] == [(pb.STATE_PENDING, False)]
    assert (found.rpc, list(found.images)) == ("FindCached", [])


async def test_nothing_of_a_prompt_is_logged_or_told_on_the_way(house: House) -> None:
    with capture_logs() as logs:
        async with open_front(house) as front:
            await front.stub.GetImage(ask("unmistakable vermilion"), metadata=(("x-request-id", "one"),))
            answer = await front.stub.ExplainCall(pb.ExplainCallRequest(request_id="one"))
    assert "vermilion" not in str(logs)
    assert "vermilion" not in str(answer)


async def test_both_clients_explain_calls(house: House) -> None:
    async with open_front(house) as front:
        await front.stub.GetImage(ask(), metadata=(("x-request-id", "one"),))
        address = f"127.0.0.1:{front.server.port}"
        async with AsyncClient(address) as client:
            call = await client.explain_call("one")
            with pytest.raises(UnknownCallError):
                await client.explain_call("two")
            made = await client.get_image("a blue fox")
            assert [each.key for each in (await client.explain_call(made.call_id)).images] == [made.key]
            collected = await client.get_by_key(made.key)
            assert (await client.explain_call(collected.call_id)).images[0].status.tier is TierName.MEMORY
        assert (call.rpc, call.caller, call.reason, call.nearest) == ("GetImage", "anonymous", "", None)
        assert [(each.status.tier, each.billed) for each in call.images] == [(TierName.UPSTREAM, True)]
        assert call.time is not None
        result = await command("why", "one", "--json", address=address)
        assert (result.exit_code, json.loads(result.stdout)["images"][0]["billed"]) == (0, True)


async def test_why_says_it_in_words_and_exits_3_for_a_call_nobody_knows(house: House) -> None:
    async with open_front(house) as front:
        address = f"127.0.0.1:{front.server.port}"
        for request_id, prompt, quality in (("low", "a red fox", "low"), ("high", "a red fox", "high")):
            await front.stub.GetImage(ask(prompt, of={"quality": quality}), metadata=(("x-request-id", request_id),))
        await front.stub.GetImage(
            ask("a red fox in snow", of={"quality": "high"}), metadata=(("x-request-id", "snow"),)
        )
        await front.stub.GetImage(ask(of={"quality": "high"}), metadata=(("x-request-id", "hit"),))
        field, prompt_apart, hit, unknown = [
            await command("why", each, address=address) for each in ("high", "snow", "hit", "nobody")
        ]
    assert "GetImage of anonymous in namespace default" in field.stdout
    assert "no tier served it: generated for this call, cost $" in field.stdout
    assert "differs in quality: asked for high, cached low" in field.stdout
    assert "another prompt: 60% of the words of both are the same" in prompt_apart.stdout
    assert "exact match, saved $" in hit.stdout
    assert "nearest" not in hit.stdout
    assert (unknown.exit_code, "CALL_UNKNOWN" in unknown.stderr) == (3, True)
