"""What callers see of the service, over real gRPC."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from cacheserver.errors import PromptRefusedError
from cacheserver.flight import Flight
from cacheserver.model import CacheKey, Caller, Namespace, Permission, Priority, Usage
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.service import Limits
from tests.fakes import FakeClock
from tests.house import House
from tests.provider import large_png, small_image
from tests.rpc_front import Front, Signer, ask, authorization, failure, image_urls, open_front, spec
from tests.waiting import until


@pytest.fixture
async def front(house: House) -> AsyncIterator[Front]:
    async with open_front(house) as front:
        yield front


def tiers_of(response: pb.GetImageResponse) -> list[str]:
    return [pb.Tier.Name(status.tier) for status in response.image_status]


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def events_of(events: list[pb.StreamImageResponse]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


async def asleep(clock: FakeClock, sleepers: int = 1) -> None:
    await until(lambda: clock.sleepers >= sleepers)


class TestGetImage:
    async def test_the_first_answer_is_generated_the_second_a_memory_hit_with_the_same_facts(
        self, front: Front
    ) -> None:
        first = await front.stub.GetImage(ask())
        second = await front.stub.GetImage(ask())
        assert tiers_of(first) == ["TIER_UPSTREAM"]
        assert tiers_of(second) == ["TIER_MEMORY"]
        assert list(first.images) == list(second.images)
        assert front.house.upstream.calls == 1

    async def test_an_image_carries_the_facts_it_was_stored_with(self, front: Front) -> None:
        response = await front.stub.GetImage(ask(of={"seed": 7, "quality": "low"}))
        [image] = response.images
        assert image.data == small_image(0)
        assert (image.content_type, image.width, image.height) == ("image/png", 64, 48)
        assert (image.digest, image.size_bytes) == (sha256(image.data), len(image.data))
        assert (image.model, image.size, image.quality, image.seed) == ("gpt-image-2", "1024x1024", "low", 7)
        assert CacheKey.parse(image.key).variant == image.variant == 0
        assert image.create_time.ToSeconds() == int(front.house.clock.now_s())
        assert image.generation_time.ToMilliseconds() == 12_500
        assert (image.paid_microusd, image.upstream_request_id) == (53_000, "fake-0")
        assert not image.HasField("usage")

    async def test_the_status_says_what_was_paid_and_what_was_saved(self, front: Front) -> None:
        missed = (await front.stub.GetImage(ask())).status
        hit = (await front.stub.GetImage(ask())).status
        assert (missed.state, missed.cost_microusd, missed.saved_microusd) == (pb.STATE_READY, 53_000, 0)
        assert (hit.cost_microusd, hit.saved_microusd) == (0, 53_000)
        assert hit.matched == pb.MATCH_LEVEL_EXACT
        assert not hit.HasField("expire_time")

    async def test_several_pictures_come_with_a_status_each_and_a_sum(self, front: Front) -> None:
        await front.stub.GetImage(ask())
        response = await front.stub.GetImage(ask(n=3, ttl=Duration(seconds=60)))
        assert [image.variant for image in response.images] == [0, 1, 2]
        assert len({image.digest for image in response.images}) == 3
        assert sorted(tiers_of(response)) == ["TIER_MEMORY", "TIER_UPSTREAM", "TIER_UPSTREAM"]
        assert response.status.tier == pb.TIER_UPSTREAM
        assert (response.status.cost_microusd, response.status.saved_microusd) == (106_000, 53_000)
        assert response.status.expire_time.ToSeconds() == int(front.house.clock.now_s()) + 60

    async def test_a_key_brings_back_its_picture(self, front: Front) -> None:
        [image] = (await front.stub.GetImage(ask())).images
        response = await front.stub.GetImage(pb.GetImageRequest(key=image.key))
        assert list(response.images) == [image]

    async def test_a_key_nobody_has_is_gone(self, front: Front) -> None:
        key = CacheKey("default", bytes(16), bytes(16), 0).name
        gone = await failure(front.stub.GetImage(pb.GetImageRequest(key=key)))
        assert (gone.code, gone.reason) == ("NOT_FOUND", "KEY_GONE")

    async def test_no_patience_is_answered_pending_and_the_key_collects_the_picture(self, front: Front) -> None:
        front.house.upstream.hold()
        call = front.stub.GetImage(ask(n=2, max_wait=Duration()))
        pending = await call
        assert pending.status.state == pb.STATE_PENDING
        assert pending.status.estimated_wait.ToSeconds() >= 1
        assert [status.state for status in pending.image_status] == [pb.STATE_PENDING] * 2
        assert [image for image in pending.images if image != pb.Image(key=image.key)] == []
        assert dict(await call.trailing_metadata())["cache-status"] == "cacheserver; fwd=uri-miss; detail=pending"
        await front.house.upstream.arrived(1)
        collecting = asyncio.ensure_future(front.stub.GetImage(pb.GetImageRequest(key=pending.images[1].key)))
        front.house.upstream.release()
        [image] = (await collecting).images
        assert image.variant == 1
        assert front.house.upstream.calls == 1

    async def test_only_if_cached_never_generates(self, front: Front) -> None:
        missed = await failure(front.stub.GetImage(ask(cache_policy="CACHE_POLICY_ONLY_IF_CACHED")))
        assert (missed.code, missed.reason) == ("NOT_FOUND", "NOT_CACHED")
        assert front.house.upstream.calls == 0

    async def test_a_refused_prompt_is_a_failed_precondition(self, front: Front) -> None:
        front.house.upstream.fail_next(PromptRefusedError("The upstream refuses this prompt; change it."))
        refused = await failure(front.stub.GetImage(ask()))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "PROMPT_REFUSED")
        assert refused.message == "The upstream refuses this prompt; change it."

    async def test_an_unexpected_error_is_internal_and_found_in_the_log_by_its_id(
        self, front: Front, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def break_down(*_: Any, **__: Any) -> None:
            raise RuntimeError("a secret of ours")

        monkeypatch.setattr(front.house.cache, "get", break_down)
        with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
            broken = await failure(front.stub.GetImage(ask(), metadata=(("x-request-id", "req-7"),)))
        assert (broken.code, broken.reason) == ("INTERNAL", "INTERNAL")
        assert "req-7" in broken.message
        assert "secret" not in repr(broken)
        assert "RuntimeError" not in repr(broken)
        [line] = [line for line in lines if line["event"] == "call"]
        assert (line["log_level"], line["request_id"]) == ("error", "req-7")
        assert isinstance(line["exc_info"], RuntimeError)

    async def test_extra_parameters_reach_the_upstream_with_whole_numbers_as_integers(self, front: Front) -> None:
        request = ask()
        request.spec.extra.update(
            {"steps": 30, "guidance": 7.5, "loras": [{"name": "ink", "weight": 1}], "off": None, "hd": True}
        )
        await front.stub.GetImage(request)
        [(seen, _)] = front.house.upstream.asked
        assert seen.extra == {
            "steps": 30,
            "guidance": 7.5,
            "loras": [{"name": "ink", "weight": 1}],
            "off": None,
            "hd": True,
        }
        assert type(seen.extra["steps"]) is int

    async def test_usage_is_told_where_the_provider_gave_it(
        self, front: Front, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = Usage(10, 8, 2, 4_160, 4_170)
        made = front.house.upstream._image
        monkeypatch.setattr(
            front.house.upstream, "_image", lambda request: replace(made(request), usage=usage, revised_prompt="a fox")
        )
        [image] = (await front.stub.GetImage(ask())).images
        assert image.usage == pb.Usage(
            input_tokens=10, input_text_tokens=8, input_image_tokens=2, output_tokens=4_160, total_tokens=4_170
        )
        assert image.revised_prompt == "a fox"

    async def test_a_picture_stored_with_half_a_surrogate_pair_is_delivered_by_every_call(
        self, front: Front, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = front.house.upstream._image
        monkeypatch.setattr(
            front.house.upstream, "_image", lambda request: replace(made(request), revised_prompt="a \ud83d fox")
        )
        [image] = (await front.stub.GetImage(ask())).images
        assert image.revised_prompt == "a ? fox"
        by_key = pb.GetImageRequest(key=image.key)
        assert list((await front.stub.GetImage(by_key)).images) == [image]
        header = (await front.stream(pb.StreamImageRequest(request=by_key)))[0].header
        assert header.image.revised_prompt == "a ? fox"

    async def test_a_caller_that_hangs_up_ends_its_wait_and_not_the_load(self, front: Front) -> None:
        front.house.upstream.hold()
        leaving = front.stub.GetImage(ask())
        await front.house.upstream.arrived(1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        front.house.upstream.release()
        assert (await front.stub.GetImage(ask())).status.cost_microusd == 0
        assert front.house.upstream.calls == 1


class TestHeaders:
    async def test_cache_control_counts_where_the_message_says_nothing(self, front: Front) -> None:
        metadata = (("cache-control", "only-if-cached"),)
        assert (await failure(front.stub.GetImage(ask(), metadata=metadata))).reason == "NOT_CACHED"
        stated = ask(cache_policy="CACHE_POLICY_USE_CACHE")
        assert len((await front.stub.GetImage(stated, metadata=metadata)).images) == 1

    async def test_no_cache_pays_for_another_picture(self, front: Front) -> None:
        first = await front.stub.GetImage(ask())
        call = front.stub.GetImage(ask(), metadata=(("cache-control", "no-cache"),))
        assert (await call).images[0].digest != first.images[0].digest
        assert dict(await call.trailing_metadata())["cache-status"].startswith("cacheserver; fwd=request; stored")

    async def test_no_cache_means_nothing_for_a_key_which_never_generates(self, front: Front) -> None:
        [image] = (await front.stub.GetImage(ask())).images
        by_key = pb.GetImageRequest(key=image.key)
        again = await front.stub.GetImage(by_key, metadata=(("cache-control", "no-cache"),))
        assert list(again.images) == [image]

    async def test_max_age_refuses_older_pictures_unless_the_message_says_otherwise(self, front: Front) -> None:
        await front.stub.GetImage(ask())
        front.house.clock.advance(100)
        metadata = (("cache-control", "max-age=60"),)
        lenient = await front.stub.GetImage(ask(max_age=Duration(seconds=200)), metadata=metadata)
        assert tiers_of(lenient) == ["TIER_MEMORY"]
        assert tiers_of(await front.stub.GetImage(ask(), metadata=metadata)) == ["TIER_UPSTREAM"]

    async def test_the_cache_status_trailer_says_tier_and_age(self, front: Front) -> None:
        await front.stub.GetImage(ask(ttl=Duration(seconds=60)))
        front.house.clock.advance(10)
        call = front.stub.GetImage(ask())
        await call
        trailers = dict(await call.trailing_metadata())
        assert trailers["cache-status"] == "cacheserver; hit; detail=memory; ttl=50; age=10"

    @pytest.mark.parametrize(
        ("stated", "is_kept"), [("order-17/a", True), ("x" * 129, False), ("a b", False), ("", False)]
    )
    async def test_a_request_id_fit_for_a_log_line_is_kept(self, front: Front, stated: str, is_kept: bool) -> None:  # noqa: FBT001 - a column of the table
        call = front.stub.GetImage(ask(), metadata=(("x-request-id", stated),))
        await call
        given = dict(await call.trailing_metadata())["x-request-id"]
        assert (given == stated) is is_kept
        assert given

    async def test_every_call_is_one_log_line_without_prompt_key_or_token(self, front: Front) -> None:
        trace = "0af7651916cd43dd8448eb211c80319c"
        metadata = (("x-request-id", "r1"), ("traceparent", f"00-{trace}-b7ad6b7169203331-01"), *authorization("sk-1"))
        with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
            await front.stub.GetImage(ask("a purple cow"), metadata=metadata)
            await failure(front.stub.GetImage(ask("a purple cow", n=11), metadata=metadata))
        good, bad = [line for line in lines if line["event"] == "call"]
        assert (good["rpc"], good["code"], good["reason"], good["namespace"]) == ("GetImage", "OK", "", "default")
        assert (bad["code"], bad["reason"]) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert good["request_id"] == "r1"
        assert good["trace_id"] == trace
        assert "purple" not in repr(lines)
        assert "sk-1" not in repr(lines)


class TestDelivery:
    LARGE = 100_000

    @pytest.fixture
    async def large(self, front: Front) -> Front:
        """A front whose "a red fox" is a picture of some 100 kB."""
        data = large_png(1, self.LARGE)
        await front.put(pb.PutImageHeader(spec=spec()), data)
        return front

    @pytest.fixture
    def signer(self, front: Front) -> Signer:
        front.house.cache._signer = signer = Signer()  # type: ignore[assignment] # all of a tier that is asked
        return signer

    async def test_too_large_for_inline_names_the_call_that_can_and_keeps_the_image(self, large: Front) -> None:
        refused = await failure(large.stub.GetImage(ask(max_inline_bytes=self.LARGE)))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "IMAGE_TOO_LARGE")
        assert "StreamImage" in refused.message
        events = await large.stream(pb.StreamImageRequest(request=ask(max_inline_bytes=self.LARGE)))
        assert b"".join(event.chunk for event in events) == large_png(1, self.LARGE)
        assert large.house.upstream.calls == 0

    async def test_four_million_bytes_are_the_default_for_inline(self, front: Front) -> None:
        await front.put(pb.PutImageHeader(spec=spec()), large_png(1, 4_000_001))
        assert (await failure(front.stub.GetImage(ask()))).reason == "IMAGE_TOO_LARGE"
        [image] = (await front.stub.GetImage(ask(max_inline_bytes=6_000_000))).images
        assert len(image.data) > 4_000_000

    async def test_what_counts_is_the_answer_and_not_each_picture(self, large: Front) -> None:
        await large.put(pb.PutImageHeader(spec=spec()), large_png(2, self.LARGE))
        limit = self.LARGE * 3 // 2
        assert len((await large.stub.GetImage(ask(max_inline_bytes=limit))).images) == 1
        assert (await failure(large.stub.GetImage(ask(n=2, max_inline_bytes=limit)))).reason == "IMAGE_TOO_LARGE"

    async def test_a_url_replaces_the_bytes(self, large: Front, signer: Signer) -> None:
        [image] = (await large.stub.GetImage(ask(delivery="DELIVERY_URL"))).images
        assert image.url == f"https://images.test/{image.digest.removeprefix('sha256:')}?expires=3600"
        assert image.url_expire_time.ToSeconds() == int(large.house.clock.now_s()) + 3600
        assert image.size_bytes > self.LARGE
        assert len(signer.signed) == 1

    async def test_without_a_signing_tier_a_url_is_refused_before_any_spend(self, front: Front) -> None:
        refused = await failure(front.stub.GetImage(ask(delivery="DELIVERY_URL")))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "NO_SIGNED_URLS")
        assert front.house.upstream.calls == 0

    async def test_auto_is_inline_while_it_fits_and_a_url_beyond(self, large: Front, signer: Signer) -> None:
        [small] = (await large.stub.GetImage(ask(delivery="DELIVERY_AUTO"))).images
        [big] = (await large.stub.GetImage(ask(delivery="DELIVERY_AUTO", max_inline_bytes=self.LARGE))).images
        assert (small.WhichOneof("content"), big.WhichOneof("content")) == ("data", "url")
        assert len(signer.signed) == 1

    async def test_auto_without_a_signing_tier_is_inline_or_too_large(self, large: Front) -> None:
        assert (await large.stub.GetImage(ask(delivery="DELIVERY_AUTO"))).images[0].data
        refused = await failure(large.stub.GetImage(ask(delivery="DELIVERY_AUTO", max_inline_bytes=self.LARGE)))
        assert refused.reason == "IMAGE_TOO_LARGE"

    async def test_where_no_tier_signs_urls_lead_to_our_own_port(self, house: House) -> None:
        urls = image_urls(house, house.namespace)
        async with open_front(house, urls=urls) as front:
            await front.put(pb.PutImageHeader(spec=spec()), small_image(1))
            [image] = (await front.stub.GetImage(ask(delivery="DELIVERY_URL"))).images
        entry = (await house.get()).entry
        assert (image.url, float(image.url_expire_time.ToSeconds())) == urls.url(entry)
        assert image.url.startswith(f"https://images.test/images/{entry.key.name}?v=")

    async def test_the_url_of_a_public_image_does_not_expire(self, house: House) -> None:
        urls = image_urls(house, replace(house.namespace, public_images=True))
        async with open_front(house, urls=urls) as front:
            await front.put(pb.PutImageHeader(spec=spec()), small_image(1))
            [image] = (await front.stub.GetImage(ask(delivery="DELIVERY_AUTO", max_inline_bytes=1))).images
        assert "expires" not in image.url
        assert not image.HasField("url_expire_time")

    async def test_a_tier_that_signs_goes_before_our_own_port(self, house: House) -> None:
        house.cache._signer = Signer()  # type: ignore[assignment] # all of a tier that is asked
        async with open_front(house, urls=image_urls(house, house.namespace)) as front:
            await front.put(pb.PutImageHeader(spec=spec()), small_image(1))
            [image] = (await front.stub.GetImage(ask(delivery="DELIVERY_URL"))).images
        assert image.url.endswith("?expires=3600")


class TestStreamImage:
    async def test_a_header_then_chunks(self, house: House) -> None:
        data = large_png(1, 100_000)
        async with open_front(house, limits=Limits(chunk_bytes=30_000)) as front:
            await front.put(pb.PutImageHeader(spec=spec()), data)
            head, *chunks = await front.stream(pb.StreamImageRequest(request=ask()))
        assert head.header.image.digest == sha256(data)
        assert not head.header.image.HasField("data")
        assert head.header.status.tier == pb.TIER_MEMORY
        assert {len(chunk.chunk) for chunk in chunks[:-1]} == {30_000}
        assert b"".join(chunk.chunk for chunk in chunks) == data

    async def test_twenty_megabytes_travel(self, front: Front) -> None:
        data = large_png(1, 20_000_000)
        parts = [data[start : start + 1_000_000] for start in range(0, len(data), 1_000_000)]
        await front.put(pb.PutImageHeader(spec=spec(), digest=sha256(data)), *parts)
        head, *chunks = await front.stream(pb.StreamImageRequest(request=ask()))
        assert head.header.image.size_bytes == len(data)
        assert sha256(b"".join(chunk.chunk for chunk in chunks)) == sha256(data)

    async def test_several_pictures_follow_one_another(self, front: Front) -> None:
        events = await front.stream(pb.StreamImageRequest(request=ask(n=3)))
        assert events_of(events) == ["header", "chunk"] * 3
        assert [event.header.index for event in events[::2]] == [0, 1, 2]
        assert [sha256(event.chunk) for event in events[1::2]] == [event.header.image.digest for event in events[::2]]

    async def test_progress_is_told_every_two_seconds_while_waiting(self, front: Front) -> None:
        clock = front.house.clock
        front.house.upstream.hold()
        call = front.stub.StreamImage(pb.StreamImageRequest(request=ask(n=2)))
        for waited in (2, 4):
            await asleep(clock)
            clock.advance(2)
            progress = (await call.read()).progress
            assert progress.waited.ToSeconds() == waited
            assert progress.estimated_wait.ToSeconds() > 0
            assert [CacheKey.parse(key).variant for key in progress.keys] == [0, 1]
        front.house.upstream.release()
        rest = [await call.read() for _ in range(4)]
        assert events_of(rest) == ["header", "chunk"] * 2
        assert await call.read() is grpc.aio.EOF
        assert clock.sleepers == 0

    async def test_progress_names_no_variants_while_they_are_being_chosen(self, front: Front) -> None:
        front.house.upstream.hold()
        call = front.stub.StreamImage(pb.StreamImageRequest(request=ask(variant_policy="VARIANT_POLICY_NEXT")))
        await front.house.upstream.arrived(1)
        await asleep(front.house.clock)
        front.house.clock.advance(2)
        progress = (await call.read()).progress
        assert (list(progress.keys), progress.HasField("estimated_wait")) == ([], True)

    async def test_progress_of_a_key_names_it(self, front: Front) -> None:
        front.house.upstream.hold()
        [image] = (await front.stub.GetImage(ask(max_wait=Duration()))).images
        await front.house.upstream.arrived(1)
        call = front.stub.StreamImage(pb.StreamImageRequest(request=pb.GetImageRequest(key=image.key)))
        await asleep(front.house.clock)
        front.house.clock.advance(2)
        assert list((await call.read()).progress.keys) == [image.key]

    async def test_patience_that_ends_is_told_by_a_pending_header(self, front: Front) -> None:
        front.house.upstream.hold()
        [event] = await front.stream(pb.StreamImageRequest(request=ask(max_wait=Duration())))
        assert event.header.status.state == pb.STATE_PENDING
        assert event.header.image == pb.Image(key=event.header.image.key)
        await front.house.upstream.arrived(1)
        front.house.upstream.release()
        by_key = pb.StreamImageRequest(request=pb.GetImageRequest(key=event.header.image.key))
        assert events_of(await front.stream(by_key)) == ["header", "chunk"]
        assert front.house.upstream.calls == 1

    async def test_a_caller_that_hangs_up_while_waiting_does_not_end_the_load(self, front: Front) -> None:
        front.house.upstream.hold()
        call = front.stub.StreamImage(pb.StreamImageRequest(request=ask()))
        await front.house.upstream.arrived(1)
        call.cancel()
        front.house.upstream.release()
        assert len((await front.stub.GetImage(ask())).images) == 1
        assert front.house.upstream.calls == 1

    async def test_a_broken_download_resumes_where_it_broke(self, front: Front) -> None:
        [image] = (await front.stub.GetImage(ask())).images
        request = pb.StreamImageRequest(
            request=ask(), read_offset=100, if_digest=image.digest.upper().replace("SHA", "sha")
        )
        head, *chunks = await front.stream(request)
        assert head.header.read_offset == 100
        assert b"".join(chunk.chunk for chunk in chunks) == image.data[100:]

    async def test_a_download_that_had_all_gets_the_header_alone(self, front: Front) -> None:
        [image] = (await front.stub.GetImage(ask())).images
        events = await front.stream(pb.StreamImageRequest(request=ask(), read_offset=image.size_bytes))
        assert events_of(events) == ["header"]

    async def test_beyond_the_end_is_out_of_range(self, front: Front) -> None:
        [image] = (await front.stub.GetImage(ask())).images
        beyond = pb.StreamImageRequest(request=ask(), read_offset=image.size_bytes + 1)
        refused = await failure(front.stream(beyond))
        assert (refused.code, refused.reason) == ("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE")

    async def test_another_picture_than_the_one_begun_is_refused(self, front: Front) -> None:
        changed = pb.StreamImageRequest(request=ask(), if_digest=sha256(b"another"))
        refused = await failure(front.stream(changed))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "IMAGE_CHANGED")

    async def test_a_failed_generation_fails_the_stream(self, front: Front) -> None:
        front.house.upstream.fail_next(PromptRefusedError("no"))
        assert (await failure(front.stream(pb.StreamImageRequest(request=ask())))).reason == "PROMPT_REFUSED"


class TestFindCached:
    async def test_it_tells_the_tier_the_flight_or_absence(self, front: Front) -> None:
        house = front.house
        [image] = (await front.stub.GetImage(ask("in memory"))).images
        await front.stub.GetImage(ask("in redis"))
        await house.settle()
        house.memory.delete(house.identity("in redis")[1].key)
        house.upstream.hold()
        await front.stub.GetImage(ask("in flight", max_wait=Duration()))
        items = [pb.FindItem(spec=spec(prompt)) for prompt in ("in memory", "in redis", "in flight", "absent")]
        items += [pb.FindItem(key=image.key), pb.FindItem(spec=spec("in memory"), variant=1)]
        found = await front.stub.FindCached(pb.FindCachedRequest(items=items))
        assert [(pb.Presence.Name(item.presence), pb.Tier.Name(item.tier)) for item in found.items] == [
            ("PRESENCE_CACHED", "TIER_MEMORY"),
            ("PRESENCE_CACHED", "TIER_REDIS"),
            ("PRESENCE_IN_FLIGHT", "TIER_UNSPECIFIED"),
            ("PRESENCE_ABSENT", "TIER_UNSPECIFIED"),
            ("PRESENCE_CACHED", "TIER_MEMORY"),
            ("PRESENCE_ABSENT", "TIER_UNSPECIFIED"),
        ]
        assert found.items[0].key == found.items[4].key == image.key
        assert list(found.unknown_tiers) == []

    async def test_tiers_that_cannot_be_asked_are_named(self, front: Front) -> None:
        front.house.s3.is_down = True
        found = await front.stub.FindCached(pb.FindCachedRequest(items=[pb.FindItem(spec=spec())]))
        assert list(found.unknown_tiers) == [pb.TIER_S3]

    @pytest.mark.no_cover
    async def test_ten_thousand_are_looked_up_while_others_are_served(self, front: Front) -> None:
        items = [pb.FindItem(spec=spec(f"fox number {i}")) for i in range(10_000)]
        finding = asyncio.ensure_future(front.stub.FindCached(pb.FindCachedRequest(items=items)))
        await front.stub.GetImage(ask())
        assert not finding.done()
        assert len((await finding).items) == 10_000

    async def test_each_bad_item_is_named(self, front: Front) -> None:
        items = [pb.FindItem(spec=spec()), pb.FindItem(), pb.FindItem(key="x"), pb.FindItem(spec=spec(""), variant=-1)]
        refused = await failure(front.stub.FindCached(pb.FindCachedRequest(items=items)))
        assert set(refused.fields) == {"items[1].spec", "items[2].key", "items[3].spec.prompt", "items[3].variant"}

    async def test_ten_thousand_bad_items_are_refused_in_few_words(self, front: Front) -> None:
        items = [pb.FindItem(key="x")] * 10_000
        refused = await failure(front.stub.FindCached(pb.FindCachedRequest(items=items)))
        assert refused.code == "INVALID_ARGUMENT"
        assert len(refused.fields) == 10


class TestPutImage:
    async def test_what_is_put_is_served_and_its_price_counts_as_saved(self, front: Front) -> None:
        data = small_image(77)
        header = pb.PutImageHeader(
            spec=spec(seed=3, quality="high"),
            digest=sha256(data),
            paid_microusd=12_000,
            tags=["summer", "shop/1", "summer"],
            ttl=Duration(seconds=600),
            create_time=Timestamp(seconds=1_700_000_000),
        )
        put = await front.put(header, data[:50], b"", data[50:])
        response = await front.stub.GetImage(ask(of={"seed": 3, "quality": "high"}))
        [image] = response.images
        assert put.created
        assert not put.image.HasField("data")
        assert image.data == data
        assert image.key == put.image.key
        assert (image.width, image.height, image.size, image.quality) == (64, 48, "64x48", "high")
        assert image.create_time.ToSeconds() == 1_700_000_000
        assert response.status.saved_microusd == 12_000
        purged = await front.stub.PurgeImages(pb.PurgeImagesRequest(tag="shop/1"))
        assert purged.images == 1

    async def test_the_same_bytes_again_are_not_created_again(self, front: Front) -> None:
        header = pb.PutImageHeader(spec=spec())
        first = await front.put(header, small_image(1))
        again = await front.put(header, small_image(1))
        other = await front.put(header, small_image(2))
        assert (first.created, again.created, other.created) == (True, False, True)
        assert (first.image, other.image.variant) == (again.image, 1)

    async def test_replace_takes_the_place_of_variant_0(self, front: Front) -> None:
        await front.put(pb.PutImageHeader(spec=spec()), small_image(1))
        await front.put(pb.PutImageHeader(spec=spec(), replace=True), small_image(2))
        assert (await front.stub.GetImage(ask())).images[0].data == small_image(2)

    async def test_an_image_above_the_bound_is_refused_before_it_is_all_here(self, house: House) -> None:
        async with open_front(house, limits=Limits(max_image_bytes=1_000)) as front:
            # Never closed and written by hand: grpc.aio says INTERNAL where an iterator of its own meets the refusal.
            sending = front.stub.PutImage()
            await sending.write(pb.PutImageRequest(header=pb.PutImageHeader(spec=spec())))
            for _ in range(2):
                await sending.write(pb.PutImageRequest(chunk=bytes(600)))
            refused = await failure(sending)
        assert (refused.code, set(refused.fields)) == ("INVALID_ARGUMENT", {"chunk"})


class TestPurgeImages:
    async def test_a_dry_run_only_counts(self, front: Front) -> None:
        await front.stub.GetImage(ask(n=3))
        await front.house.settle()
        counted = await front.stub.PurgeImages(pb.PurgeImagesRequest(spec=spec(), dry_run=True))
        purged = await front.stub.PurgeImages(pb.PurgeImagesRequest(spec=spec()))
        assert counted == purged
        assert counted.images == 3
        assert [(pb.Tier.Name(count.tier), count.count) for count in counted.tiers] == [
            ("TIER_MEMORY", 3),
            ("TIER_REDIS", 3),
            ("TIER_S3", 3),
        ]
        assert (await front.stub.PurgeImages(pb.PurgeImagesRequest(everything=True))).images == 0

    async def test_a_key_removes_one_picture(self, front: Front) -> None:
        images = (await front.stub.GetImage(ask(n=2))).images
        assert (await front.stub.PurgeImages(pb.PurgeImagesRequest(key=images[0].key))).images == 1
        assert (await failure(front.stub.GetImage(pb.GetImageRequest(key=images[0].key)))).reason == "KEY_GONE"
        assert (await front.stub.GetImage(pb.GetImageRequest(key=images[1].key))).images[0] == images[1]

    async def test_a_tier_that_was_not_reached_is_named(self, front: Front) -> None:
        front.house.s3.is_down = True
        refused = await failure(front.stub.PurgeImages(pb.PurgeImagesRequest(everything=True)))
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "TIER_UNREACHABLE")
        assert refused.info.metadata["tiers"] == "s3"
        assert refused.trailers["grpc-retry-pushback-ms"] == "5000"


class TestExplainKey:
    async def test_the_way_to_the_key_is_shown(self, front: Front) -> None:
        [image] = (await front.stub.GetImage(ask("A  red fox."))).images
        explained = await front.stub.ExplainKey(pb.ExplainKeyRequest(spec=spec("a red FOX")))
        tight = await front.stub.ExplainKey(
            pb.ExplainKeyRequest(spec=spec("A  red fox."), match_level="MATCH_LEVEL_EXACT")
        )
        same = await front.stub.ExplainKey(pb.ExplainKeyRequest(spec=spec("A  red fox.")))
        assert same.explanation.key == image.key
        assert same.explanation.profile.startswith("standard/")
        assert same.explanation.normalized_prompt == "a red fox"
        assert "a red fox" in same.explanation.canonical_identity
        assert explained.explanation.key != image.key
        assert tight.explanation.profile.startswith("exact/")
        assert not same.HasField("other")

    async def test_two_requests_are_told_apart_field_by_field(self, front: Front) -> None:
        response = await front.stub.ExplainKey(
            pb.ExplainKeyRequest(spec=spec(size="1024x1024"), other=spec(quality="high", size="1024x1024"))
        )
        [difference] = response.differences
        assert (difference.field, difference.other_value) == ("quality", "high")
        assert response.other.key != response.explanation.key

    async def test_defaults_written_out_make_no_difference(self, front: Front) -> None:
        response = await front.stub.ExplainKey(
            pb.ExplainKeyRequest(spec=spec(), other=spec(size="auto", quality="auto", model="gpt-image-2"))
        )
        assert response.other == response.explanation
        assert list(response.differences) == []


class TestGetStats:
    async def test_what_happened_is_counted_once(self, front: Front) -> None:
        await front.stub.GetImage(ask())
        size = (await front.stub.GetImage(ask())).images[0].size_bytes
        await front.stub.GetImage(ask("another", max_wait=Duration()))
        await failure(front.stub.GetImage(ask("nowhere", cache_policy="CACHE_POLICY_ONLY_IF_CACHED")))
        await failure(front.stub.GetImage(ask(max_inline_bytes=1)))
        stats = await front.stub.GetStats(pb.GetStatsRequest())
        rows = {(pb.Outcome.Name(row.outcome), pb.Tier.Name(row.tier)): row for row in stats.rows}
        hit, miss = rows["OUTCOME_HIT", "TIER_MEMORY"], rows["OUTCOME_MISS", "TIER_UPSTREAM"]
        assert (hit.requests, hit.saved_microusd, hit.image_bytes, hit.spent_microusd) == (1, 53_000, size, 0)
        assert (miss.requests, miss.saved_microusd) == (1, 0)
        assert rows["OUTCOME_PENDING", "TIER_UNSPECIFIED"].requests == 1
        assert rows["OUTCOME_NOT_CACHED", "TIER_UNSPECIFIED"].requests == 1
        assert rows["OUTCOME_ERROR", "TIER_UNSPECIFIED"].requests == 1
        assert stats.total.requests == 5
        assert stats.total.outcome == pb.OUTCOME_UNSPECIFIED
        assert stats.start_time.ToSeconds() == 1_800_000_000

    async def test_callers_that_joined_a_load_are_counted_as_collapsed(self, front: Front) -> None:
        front.house.upstream.hold()
        calls = [asyncio.ensure_future(front.stub.GetImage(ask())) for _ in range(3)]
        await front.house.upstream.arrived(1)
        calls.append(asyncio.ensure_future(front.stub.GetImage(ask())))
        [flight] = front.house.cache._flights.of(front.house.identity()[1].key)
        await until(lambda: len(flight.waiters) == len(calls))
        front.house.upstream.release()
        responses = await asyncio.gather(*calls)
        assert sorted(response.status.collapsed for response in responses) == [False, True, True, True]
        stats = await front.stub.GetStats(pb.GetStatsRequest(namespace="default"))
        [collapsed] = [row for row in stats.rows if row.outcome == pb.OUTCOME_COLLAPSED]
        assert (collapsed.requests, collapsed.coalesced_microusd) == (3, 159_000)
        assert stats.upstream_calls == 1


class TestRights:
    SHOP = Namespace("shop", "shared")
    BLOG = Namespace("blog", "shared")
    READER = Caller("reader", frozenset({Permission.READ}), frozenset({"shop"}))
    MAKER = Caller(
        "maker", frozenset({Permission.READ, Permission.GENERATE}), frozenset({"shop", "blog"}), Priority.BATCH
    )
    PUTTER = Caller("putter", frozenset({Permission.PUT}), frozenset({"shop"}))
    ADMIN = Caller("admin", frozenset(Permission))

    @pytest.fixture
    async def front(self, house: House) -> AsyncIterator[Front]:
        callers = [
            (hashlib.sha256(caller.name.encode()).digest(), caller)
            for caller in (self.READER, self.MAKER, self.PUTTER, self.ADMIN)
        ]
        async with open_front(house, callers=callers, anonymous=None, namespaces=(self.SHOP, self.BLOG)) as front:
            yield front

    async def test_nothing_is_answered_without_a_known_token(self, front: Front) -> None:
        calls = [
            front.stub.GetImage(ask()),
            front.stub.GetImage(ask(), metadata=authorization("guess")),
            front.stub.GetImage(ask(), metadata=(("authorization", "Basic reader"),)),
            front.stream(pb.StreamImageRequest(request=ask())),
            front.put(pb.PutImageHeader(spec=spec())),
            front.stub.GetStats(pb.GetStatsRequest()),
            front.raw("BatchGetImages", b""),
            front.raw("GetImage", b"\xff\xff\xff"),  # what it says is not even looked at
        ]
        for call in calls:
            refused = await failure(call)
            assert (refused.code, refused.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")

    @pytest.mark.parametrize(
        ("token", "rpc", "message"),
        [
            ("reader", "GetImage", ask(namespace="blog")),
            ("reader", "GetImage", ask(namespace="no-such-namespace")),
            ("reader", "GetImage", ask()),
            ("putter", "GetImage", ask(namespace="shop")),
            ("putter", "FindCached", pb.FindCachedRequest(namespace="shop")),
            ("putter", "ExplainKey", pb.ExplainKeyRequest(namespace="shop", spec=spec())),
            ("putter", "GetStats", pb.GetStatsRequest()),
            ("reader", "GetStats", pb.GetStatsRequest(namespace="blog")),
            ("maker", "PurgeImages", pb.PurgeImagesRequest(namespace="shop", everything=True)),
            ("reader", "GetImage", ask(namespace="shop")),
        ],
    )
    async def test_what_a_caller_may_not_is_refused(self, front: Front, token: str, rpc: str, message: Any) -> None:
        refused = await failure(getattr(front.stub, rpc)(message, metadata=authorization(token)))
        assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert front.house.upstream.calls == 0

    async def test_put_needs_its_permission(self, front: Front) -> None:
        header = pb.PutImageHeader(namespace="shop", spec=spec())
        refused = await failure(front.put(header, metadata=authorization("maker")))
        assert refused.code == "PERMISSION_DENIED"
        assert (await front.put(header, small_image(1), metadata=authorization("putter"))).created

    async def test_a_reader_gets_hits_that_others_paid_for(self, front: Front) -> None:
        await front.stub.GetImage(ask(namespace="blog"), metadata=authorization("maker"))
        hit = await front.stub.GetImage(ask(namespace="shop"), metadata=authorization("reader"))
        assert tiers_of(hit) == ["TIER_MEMORY"]

    async def test_a_key_of_another_partition_is_refused_whether_it_exists_or_not(self, front: Front) -> None:
        [image] = (await front.stub.GetImage(ask(), metadata=authorization("admin"))).images
        absent = CacheKey.parse(image.key).with_variant(7).name
        answers = [
            await failure(
                front.stub.GetImage(pb.GetImageRequest(namespace="shop", key=key), metadata=authorization("reader"))
            )
            for key in (image.key, absent)
        ]
        assert answers[0].fields == answers[1].fields == {"key": "is not a key of this namespace"}
        assert answers[0].message == answers[1].message

    async def test_urgency_is_capped_by_the_callers_right(self, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Priority] = []
        get = front.house.cache.get

        async def look(*args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["terms"].priority)
            return await get(*args, **kwargs)

        monkeypatch.setattr(front.house.cache, "get", look)
        for priority in ("PRIORITY_UNSPECIFIED", "PRIORITY_INTERACTIVE", "PRIORITY_WARM_UP"):
            asked = ask(priority, namespace="shop", priority=priority)
            await front.stub.GetImage(asked, metadata=authorization("maker"))
        assert seen == [Priority.BATCH, Priority.BATCH, Priority.WARM_UP]

    async def test_stats_show_only_what_the_caller_may_read(self, front: Front) -> None:
        for namespace in ("shop", "blog"):
            await front.stub.GetImage(ask(namespace=namespace), metadata=authorization("maker"))
        seen = {
            token: {row.namespace for row in (await _stats(front, token)).rows}
            for token in ("reader", "maker", "admin")
        }
        assert seen == {"reader": {"shop"}, "maker": {"shop", "blog"}, "admin": {"shop", "blog"}}


async def _stats(front: Front, token: str) -> pb.GetStatsResponse:
    response: pb.GetStatsResponse = await front.stub.GetStats(pb.GetStatsRequest(), metadata=authorization(token))
    return response


async def test_more_calls_than_the_service_takes_are_told_to_come_again(house: House) -> None:
    async with open_front(house, max_concurrent_calls=1) as front:
        house.upstream.hold()
        running = front.stub.GetImage(ask())
        await house.upstream.arrived(1)
        turned_away = await failure(front.stub.GetImage(ask("a blue fox")))
        assert (turned_away.code, turned_away.reason) == ("UNAVAILABLE", "OVERLOADED")
        house.upstream.release()
        assert (await running).status.tier == pb.TIER_UPSTREAM
        assert (await front.stub.GetImage(ask())).status.tier == pb.TIER_MEMORY


@pytest.mark.no_cover
async def test_as_many_calls_as_are_allowed_may_come_at_once(house: House) -> None:
    async with open_front(house) as front:
        house.upstream.hold()
        calls = [asyncio.ensure_future(front.stub.GetImage(ask())) for _ in range(4_095)]
        await house.upstream.arrived(1)
        house.upstream.release()
        tiers = {answer.status.tier for answer in await asyncio.gather(*calls)}
    assert tiers <= {pb.TIER_UPSTREAM, pb.TIER_MEMORY}
    assert house.upstream.calls == 1


async def test_a_url_for_a_picture_that_is_not_stored_is_refused_before_any_spend(house: House) -> None:
    async with open_front(house) as front:
        refused = await failure(front.stub.GetImage(ask(delivery="DELIVERY_URL", cache_policy="CACHE_POLICY_NO_STORE")))
    assert (refused.reason, list(refused.fields)) == ("INVALID_FIELD", ["delivery"])
    assert house.upstream.calls == 0


async def test_a_tier_hit_that_joined_a_load_is_counted_as_a_hit_of_that_tier(front: Front) -> None:
    house = front.house
    await front.stub.GetImage(ask())
    await house.settle()
    house.memory.delete(house.identity()[1].key)
    house.redis.gate.clear()
    calls = [asyncio.ensure_future(front.stub.GetImage(ask())) for _ in range(3)]
    [flight] = await flights(house)
    await until(lambda: len(flight.waiters) == len(calls))
    house.redis.gate.set()
    assert {response.status.tier for response in await asyncio.gather(*calls)} == {pb.TIER_REDIS}
    stats = await front.stub.GetStats(pb.GetStatsRequest(namespace="default"))
    rows = {(row.outcome, row.tier): row for row in stats.rows}
    assert rows[pb.OUTCOME_HIT, pb.TIER_REDIS].requests == 3
    assert stats.total.coalesced_microusd == 0


async def flights(house: House) -> list[Flight]:
    key = house.identity()[1].key
    await until(lambda: bool(house.cache._flights.of(key)))
    return house.cache._flights.of(key)
