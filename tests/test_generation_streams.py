"""Partial pictures from a server that streams, well and badly."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import structlog

from cacheserver.errors import (
    PromptRefusedError,
    UpstreamBadImageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamInvalidError,
    UpstreamLimitedError,
    UpstreamQuotaError,
)
from cacheserver.generation.providers.openai import OpenAIUpstream, Style
from cacheserver.model import Delivery, ImageRequest, PartialImage, RateLimit
from tests.fakes import FakeClock
from tests.openai_upstreams import Make, openai_upstreams
from tests.provider import OpenAIStandIn, Reply, error_reply, events, partial_b64, small_image

PROMPT = "a very private prompt about zebras"
REQUEST = ImageRequest(PROMPT, "gpt-image-2", size="1024x1024", quality="low")
STREAM = "text/event-stream"
PICTURE = base64.b64encode(small_image(1, size=(1024, 1024))).decode()
PARTIAL = {"type": "image_generation.partial_image", "partial_image_index": 0, "b64_json": partial_b64(0)}
COMPLETED = {
    "type": "image_generation.completed",
    "b64_json": PICTURE,
    "size": "1024x1024",
    "quality": "low",
    "background": "opaque",
    "usage": {"input_tokens": 10, "output_tokens": 296, "total_tokens": 306},
}
COST_MICROUSD = 10 * 5 + 296 * 30


class Seen(list[PartialImage]):
    """The partial pictures that came."""

    @property
    def indices(self) -> list[int]:
        return [partial.index for partial in self]


@pytest.fixture
async def make(provider: OpenAIStandIn, clock: FakeClock) -> AsyncIterator[Make]:
    async with openai_upstreams(provider, clock) as make:
        yield make


@pytest.fixture
def upstream(make: Make) -> OpenAIUpstream:
    return make()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture(autouse=True)
def no_secret_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as logged:
        yield
    text = "\n".join(record.getMessage() for record in caplog.get_records("call")) + repr(logged)
    assert "zebras" not in text
    assert PICTURE[:40] not in text


async def generate(upstream: OpenAIUpstream, seen: Seen, *, partial_images: int = 2) -> Delivery:
    return await upstream.generate(REQUEST, [0], partial_images=partial_images, on_partial=seen.append)


async def failure(upstream: OpenAIUpstream, seen: Seen) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        await generate(upstream, seen)
    assert "zebras" not in "".join(traceback.format_exception(caught.value)).replace(f'PROMPT = "{PROMPT}"', "")
    return caught.value


def stream(body: bytes, **more: Any) -> Reply:
    return Reply(body=body, content_type=STREAM, **more)


# --- as it should be


async def test_partial_pictures_come_before_the_picture_and_are_paid_for_with_it(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    provider.headers = {"x-ratelimit-limit-images": "5"}
    delivery = await generate(upstream, seen)
    [image] = delivery
    assert [(partial.index, partial.data) for partial in seen] == [
        (index, base64.b64decode(partial_b64(index))) for index in (0, 1)
    ]
    assert image.data in provider.made[PROMPT]
    assert image.usage is not None
    assert image.usage.output_tokens == 196 + 2 * 100
    assert image.paid_microusd == image.usage.input_text_tokens * 5 + image.usage.output_tokens * 30
    assert image.upstream_request_id == "req_1"
    assert delivery.told is not None
    assert delivery.told.images == RateLimit(5, None, None)
    sent = provider.requests[0]
    assert (sent.json()["stream"], sent.json()["partial_images"]) == (True, 2)
    assert STREAM in sent.headers["accept"]


async def test_whoever_wants_no_partial_pictures_gets_no_stream(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    await generate(upstream, seen, partial_images=0)
    await upstream.generate(REQUEST, [0], partial_images=2)
    await upstream.generate(REQUEST, [0, 1], partial_images=2, on_partial=seen.append)
    assert all("stream" not in request.json() for request in provider.requests)
    assert not seen


async def test_an_endpoint_that_does_not_stream_is_not_asked_to(
    make: Make, provider: OpenAIStandIn, seen: Seen
) -> None:
    assert len(await generate(make(stream=False), seen)) == 1
    assert "stream" not in provider.requests[0].json()


async def test_azure_streams_as_well(make: Make, provider: OpenAIStandIn, seen: Seen) -> None:
    azure = make(style=Style.AZURE, base_url=provider.root_url)
    assert len(await generate(azure, seen)) == 1
    assert seen.indices == [0, 1]


async def test_a_server_that_ignores_the_wish_answers_as_ever(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    provider.streams = False
    assert len(await generate(upstream, seen)) == 1
    assert not seen


@pytest.mark.parametrize("param", ["stream", "partial_images"])
async def test_a_server_that_refuses_the_wish_is_asked_without_it_from_then_on(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen, param: str
) -> None:
    provider.fail_next(400, "unknown_parameter", param=param)
    assert len(await generate(upstream, seen)) == 1
    assert len(await generate(upstream, seen)) == 1
    assert [bool(request.json().get("stream")) for request in provider.requests] == [True, False, False]


async def test_another_wrong_parameter_is_not_asked_about_again(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    provider.fail_next(400, "invalid_value", param="size")
    assert isinstance(await failure(upstream, seen), UpstreamInvalidError)
    assert provider.calls == 1


async def test_an_error_before_the_stream_is_an_error_as_ever(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    provider.fail_next(429, "rate_limit_exceeded", headers={"retry-after": "7"})
    error = await failure(upstream, seen)
    assert isinstance(error, UpstreamLimitedError)
    assert (error.stated_wait_s, error.cost_microusd) == (7.0, 0)


@pytest.mark.parametrize(
    "body",
    [
        events(COMPLETED),
        events(PARTIAL, COMPLETED).replace(b"\n", b"\r\n"),
        b": keep-alive\n\n" + events(PARTIAL) + b": keep-alive\n\n" + events(COMPLETED),
        events(COMPLETED).rstrip(b"\n"),
        events(COMPLETED) + b"data: [DONE]\n\n",
        b"data: [DONE]\n\n" + events(COMPLETED),
        events({"type": "image_generation.in_progress"}, COMPLETED),
        b"event: image_generation.completed\ndata: " + json.dumps(COMPLETED | {"type": None}).encode() + b"\n\n",
        events(COMPLETED | {"type": "image_edit.completed"}),
    ],
    ids=["alone", "crlf", "comments", "no-blank-line", "done", "done-first", "unknown-kind", "by-event", "edit"],
)
async def test_a_stream_may_be_written_in_many_ways(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen, body: bytes
) -> None:
    provider.answer_next(stream(body))
    [image] = await generate(upstream, seen)
    assert image.data == base64.b64decode(PICTURE)
    assert (image.size, image.quality, image.paid_microusd) == ("1024x1024", "low", COST_MICROUSD)


async def test_what_comes_after_the_picture_is_not_waited_for(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    body = events(COMPLETED) + b": more to come\n\n"
    provider.answer_next(stream(body, hang_after=len(body) - 1))
    assert len(await asyncio.wait_for(generate(upstream, seen), 10)) == 1


# --- partial pictures that are none


@pytest.mark.parametrize(
    "wrong",
    [
        {"b64_json": "?"},
        {"b64_json": base64.b64encode(b"no picture").decode()},
        {"b64_json": base64.b64encode(small_image(1)[:-20]).decode()},
        {"b64_json": 7},
        {"b64_json": None},
    ],
    ids=["base64", "bytes", "cut-off", "number", "nothing"],
)
async def test_a_damaged_partial_picture_is_left_out(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen, wrong: dict[str, Any]
) -> None:
    provider.answer_next(stream(events(PARTIAL | wrong, PARTIAL | {"partial_image_index": 1}, COMPLETED)))
    assert len(await generate(upstream, seen)) == 1
    assert seen.indices == [1]


async def test_a_partial_picture_beyond_bounds_is_left_out(make: Make, provider: OpenAIStandIn, seen: Seen) -> None:
    large = base64.b64encode(small_image(1, size=(2_000, 1_000))).decode()
    provider.answer_next(stream(events(PARTIAL | {"b64_json": large}, COMPLETED)))
    assert len(await generate(make(max_pixels=1_500_000), seen)) == 1
    assert not seen


async def test_no_more_partial_pictures_are_passed_on_than_were_asked_for(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    provider.answer_next(stream(events(*(PARTIAL | {"partial_image_index": index} for index in range(5)), COMPLETED)))
    await generate(upstream, seen)
    assert seen.indices == [0, 1]


@pytest.mark.parametrize("index", [None, -1, True, "1", 1.5])
async def test_partial_pictures_without_an_index_are_counted(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen, index: object
) -> None:
    provider.answer_next(stream(events(*[PARTIAL | {"partial_image_index": index}] * 2, COMPLETED)))
    await generate(upstream, seen)
    assert seen.indices == [0, 1]


# --- streams that break


@pytest.mark.parametrize(
    ("code", "kind", "expected", "cost"),
    [
        ("rate_limit_exceeded", "requests", UpstreamLimitedError, 0),
        ("insufficient_quota", "insufficient_quota", UpstreamQuotaError, 0),
        ("moderation_blocked", "image_generation_user_error", PromptRefusedError, 0),
        ("invalid_value", "invalid_request_error", UpstreamInvalidError, 0),
        (None, "server_error", UpstreamDownError, None),
        ("server_is_overloaded", "service_unavailable_error", UpstreamDownError, None),
    ],
)
async def test_an_error_in_the_stream_means_what_it_would_have_meant_before(  # noqa: PLR0917 - a table's row
    upstream: OpenAIUpstream,
    provider: OpenAIStandIn,
    seen: Seen,
    code: str | None,
    kind: str,
    expected: type[UpstreamError],
    cost: int | None,
) -> None:
    said = {"message": f"About {PROMPT}.", "type": kind, "param": None, "code": code}
    provider.answer_next(stream(events({"type": "error", "error": said})))
    error = await failure(upstream, seen)
    assert type(error) is expected
    assert (error.cost_microusd, error.upstream_request_id) == (cost, "req_1")


async def test_after_a_partial_picture_nobody_knows_what_an_error_has_cost(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    said = {"message": "No.", "type": "image_generation_user_error", "param": None, "code": "moderation_blocked"}
    provider.answer_next(stream(events(PARTIAL, {"type": "error", "error": said})))
    error = await failure(upstream, seen)
    assert isinstance(error, PromptRefusedError)
    assert error.after_seeing  # the prompt had passed: another picture of it may pass as well
    assert error.cost_microusd is None
    assert seen.indices == [0]


async def test_an_error_as_text_or_without_an_object_is_one(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    for said in ({"type": "image_generation.failed", "error": "boom"}, {"type": "error", "message": "boom"}):
        provider.answer_next(stream(events(said)))
        assert isinstance(await failure(upstream, seen), UpstreamDownError)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        events(PARTIAL),
        b"data: {not json}\n\n",
        b"data: [1]\n\n",
        b"data: " + b"[" * 20_000 + b"\n\n",
        b'{"data": []}',
        events(COMPLETED | {"b64_json": None}),
        events(COMPLETED | {"b64_json": "?"}),
        events(COMPLETED | {"b64_json": base64.b64encode(b"no picture").decode()}),
    ],
    ids=["empty", "no-picture", "no-json", "no-object", "deep", "json", "nothing-in-it", "base64", "bytes"],
)
async def test_a_stream_without_a_picture_is_a_bad_answer(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen, body: bytes
) -> None:
    provider.answer_next(stream(body))
    error = await failure(upstream, seen)
    assert isinstance(error, UpstreamBadImageError)
    # Where the event came that has the usage, the cost is known all the same.
    assert error.cost_microusd == (COST_MICROUSD if b"completed" in body else None)
    assert error.upstream_request_id == "req_1"


async def test_a_connection_that_is_cut_in_mid_stream_has_cost_nobody_knows_what(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    body = events(PARTIAL, COMPLETED)
    provider.answer_next(stream(body, cut_after=len(body) - 100))
    error = await failure(upstream, seen)
    assert isinstance(error, UpstreamDownError)
    assert (error.cost_microusd, error.upstream_request_id) == (None, "req_1")


@pytest.mark.parametrize("missing", [1, 2], ids=["blank-line", "end-of-line"])
async def test_a_connection_that_is_cut_behind_the_whole_picture_has_it(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen, missing: int
) -> None:
    body = events(PARTIAL, COMPLETED)
    provider.answer_next(stream(body, cut_after=len(body) - missing))
    [image] = await generate(upstream, seen)
    assert image.data == base64.b64decode(PICTURE)
    assert (image.paid_microusd, image.upstream_request_id) == (COST_MICROUSD, "req_1")


async def test_a_connection_that_is_cut_behind_an_error_is_that_error(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    said = {"message": "No.", "type": "image_generation_user_error", "param": None, "code": "moderation_blocked"}
    body = events({"type": "error", "error": said})
    provider.answer_next(stream(body, cut_after=len(body) - 1))
    error = await failure(upstream, seen)
    assert isinstance(error, PromptRefusedError)
    assert error.__context__ is None


async def test_a_stream_that_falls_silent_ends_at_the_deadline(make: Make, provider: OpenAIStandIn, seen: Seen) -> None:
    body = events(PARTIAL, COMPLETED)
    provider.answer_next(stream(body, hang_after=len(body) - 100))
    error = await failure(make(timeout_s=1.0), seen)
    assert isinstance(error, UpstreamDownError)
    assert error.cost_microusd is None
    assert seen.indices == [0]


@pytest.mark.parametrize("body", [b"data: " + b"x" * 400_000, b": keep-alive\n\n" * 100_000], ids=["event", "stream"])
async def test_a_stream_without_an_end_is_cut_off(make: Make, provider: OpenAIStandIn, seen: Seen, body: bytes) -> None:
    provider.answer_next(stream(body))
    error = await failure(make(max_image_bytes=1_000), seen)
    assert isinstance(error, UpstreamBadImageError)
    assert "more bytes" in str(error)
    assert error.cost_microusd is None


async def test_a_stream_with_another_status_is_an_error(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    reply = error_reply(500, kind="server_error")
    provider.answer_next(Reply(500, reply.body, STREAM))
    error = await failure(upstream, seen)
    assert isinstance(error, UpstreamDownError)
    assert error.cost_microusd == 0


async def test_whoever_hangs_up_in_mid_stream_lets_go_of_the_connection(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, seen: Seen
) -> None:
    body = events(PARTIAL, COMPLETED)
    provider.answer_next(stream(body, hang_after=len(events(PARTIAL))))
    came = asyncio.Event()

    def hear(partial: PartialImage) -> None:
        seen.append(partial)
        came.set()

    task = asyncio.create_task(upstream.generate(REQUEST, [0], partial_images=1, on_partial=hear))
    await came.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(await generate(upstream, seen)) == 1
