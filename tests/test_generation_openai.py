"""The OpenAI-shaped adapter against a server that speaks the API, well and badly."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import itertools
import json
import logging
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import format_datetime
from typing import Any

import aiohttp
import pytest
import structlog
from yarl import URL

from cacheserver.errors import (
    ConfigError,
    PromptRefusedError,
    UpstreamBadImageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamInvalidError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
from cacheserver.generation.images import inspect
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.providers import openai
from cacheserver.generation.providers.openai import OpenAIUpstream, Style
from cacheserver.images import ImageFacts
from cacheserver.model import GeneratedImage, ImageRequest, JsonValue, RateLimit, RateLimits, Usage
from tests.fakes import FakeClock
from tests.openai_upstreams import Make, openai_upstreams
from tests.provider import API_KEY, OpenAIStandIn, Reply, error_reply, small_image
from tests.waiting import until

PROMPT = "a very private prompt about zebras"
NOW_S = 1_800_000_000.0
CHUNKED = {"transfer-encoding": "chunked", "content-length": ""}


@pytest.fixture
async def make(provider: OpenAIStandIn, clock: FakeClock) -> AsyncIterator[Make]:
    async with openai_upstreams(provider, clock) as make:
        yield make


@pytest.fixture
def upstream(make: Make) -> OpenAIUpstream:
    return make()


@pytest.fixture(autouse=True)
def no_secret_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every test here also holds that neither log carries the prompt, the key or an image URL."""
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as events:
        yield
    records = caplog.get_records("call")
    assert all(record.exc_info is None for record in records)
    logged = "\n".join(record.getMessage() for record in records) + repr(events)
    assert "zebras" not in logged
    assert API_KEY not in logged
    assert "/files/" not in logged


def asked(model: str = "gpt-image-2", **fields: Any) -> ImageRequest:
    return ImageRequest(PROMPT, model, **fields)


async def failure(
    upstream: OpenAIUpstream, request: ImageRequest | None = None, variants: Sequence[int] = (0,)
) -> UpstreamError:
    """The error of a generation, which tells no secret, however it is printed."""
    with pytest.raises(UpstreamError) as caught:
        await upstream.generate(request or asked(), variants)
    printed = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    source_lines = 'PROMPT = "a very private prompt about zebras"'
    assert "zebras" not in printed.replace(source_lines, "")
    assert API_KEY not in printed
    return caught.value


# --- what goes out


async def test_only_what_differs_from_the_defaults_is_sent(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    await upstream.generate(asked(), [0])
    assert provider.requests[0].json() == {
        "model": "gpt-image-2",
        "prompt": PROMPT,
        "n": 1,
        "output_format": "png",
    }
    assert provider.requests[0].headers["authorization"] == f"Bearer {API_KEY}"


async def test_every_parameter_asked_for_is_sent(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    request = asked(
        size="1536x1024",
        quality="low",
        background="opaque",
        output_format="jpeg",
        output_compression=80,
        moderation="low",
    )
    await upstream.generate(request, [0, 1])
    assert provider.requests[0].json() == {
        "model": "gpt-image-2",
        "prompt": PROMPT,
        "n": 2,
        "size": "1536x1024",
        "quality": "low",
        "background": "opaque",
        "output_format": "jpeg",
        "output_compression": 80,
        "moderation": "low",
    }


async def test_compression_means_nothing_for_png_and_is_not_sent(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    await upstream.generate(asked(output_compression=50), [0])
    assert "output_compression" not in provider.requests[0].json()


async def test_further_parameters_go_out_at_the_top_with_whole_numbers_as_integers(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    extra: dict[str, JsonValue] = {
        "steps": 30.0,
        "guidance": 3.5,
        "lora": [{"name": "ink", "weight": 1.0}],
        "tiled": True,
        "n": 10.0,
    }
    [image] = await upstream.generate(asked("qwen-image", seed=2**62, extra=extra), [0])
    sent = provider.requests[0].json()
    assert sent == {
        "model": "qwen-image",
        "prompt": PROMPT,
        "n": 1,
        "output_format": "png",
        "seed": 2**62,
        "steps": 30,
        "guidance": 3.5,
        "lora": [{"name": "ink", "weight": 1}],
        "tiled": True,
    }
    assert isinstance(sent["steps"], int)
    assert image.seed == 2**62


async def test_a_prompt_in_any_script_arrives_as_written(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    prompt = "дом \U0001f3e0 「家」 \u202e بيت"
    await upstream.generate(ImageRequest(prompt, "gpt-image-2"), [0])
    assert provider.requests[0].json()["prompt"] == prompt


async def test_the_provider_is_asked_by_its_own_name_of_the_model(make: Make, provider: OpenAIStandIn) -> None:
    upstream = make(models={"house-style": "gpt-image-2"})
    [image] = await upstream.generate(asked("house-style", quality="low"), [0])
    assert provider.requests[0].json()["model"] == "gpt-image-2"
    assert image.model == "house-style"
    assert image.paid_microusd == 9 * 5 + 196 * 30
    assert upstream.models == ("house-style",)
    assert upstream.name == "main"


async def test_azure_takes_the_deployment_in_the_path_and_no_model(make: Make, provider: OpenAIStandIn) -> None:
    upstream = make(
        base_url=provider.root_url, style=Style.AZURE, models={"gpt-image-2": "qwen-image"}, api_version="2025-04-01"
    )
    [image] = await upstream.generate(asked(quality="low"), [0])
    sent = provider.requests[0]
    assert sent.path == "/openai/deployments/qwen-image/images/generations"
    assert sent.query == {"api-version": ["2025-04-01"]}
    assert "model" not in sent.json()
    assert sent.headers["api-key"] == API_KEY
    assert "authorization" not in sent.headers
    assert image.paid_microusd == 9 * 5 + 196 * 30
    await upstream.check()
    checked = provider.requests[1]
    assert (checked.path, checked.query) == ("/openai/models", {"api-version": ["2025-04-01"]})


async def test_without_a_key_none_is_sent(make: Make, provider: OpenAIStandIn) -> None:
    await failure(make(api_key=lambda: ""))
    assert "authorization" not in provider.requests[0].headers


async def test_the_key_is_asked_for_before_each_call(make: Make, provider: OpenAIStandIn) -> None:
    keys = iter(["sk-old", API_KEY + "\n"])
    upstream = make(api_key=lambda: next(keys))
    assert isinstance(await failure(upstream), UpstreamNotEntitledError)
    assert len(await upstream.generate(asked(), [0])) == 1
    assert provider.calls == 2


async def test_a_key_that_no_header_may_carry_is_told_without_quoting_it(make: Make, provider: OpenAIStandIn) -> None:
    error = await failure(make(api_key=lambda: f"{API_KEY}\r\nx-evil: 1"))
    assert isinstance(error, UpstreamNotEntitledError)
    assert provider.calls == 0


# --- what comes back


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_a_picture_carries_what_the_provider_said_of_it(upstream: OpenAIUpstream, image_format: str) -> None:
    [image] = await upstream.generate(asked(output_format=image_format, quality="high"), [0])
    assert image.data == small_image(1, image_format)
    assert (image.content_type, image.width, image.height) == (f"image/{image_format}", 64, 48)
    assert (image.size, image.quality, image.background) == ("1024x1024", "high", "opaque")
    assert (image.model, image.upstream, image.upstream_request_id) == ("gpt-image-2", "main", "req_1")
    assert image.usage == Usage(9, 9, 0, 7024, 7033)
    assert image.paid_microusd == 9 * 5 + 7024 * 30


async def test_generation_time_is_the_clocks(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, clock: FakeClock
) -> None:
    provider.hold()
    generation = asyncio.create_task(upstream.generate(asked(), [0]))
    await provider.arrived(1)
    clock.advance(31.5)
    provider.release()
    [image] = await generation
    assert image.generation_s == 31.5


async def test_usage_and_cost_of_a_call_are_divided_without_losing_a_token(upstream: OpenAIUpstream) -> None:
    images = await upstream.generate(asked(quality="low"), range(4))
    assert len({image.sha256 for image in images}) == 4
    assert [image.usage and image.usage.input_tokens for image in images] == [3, 2, 2, 2]
    assert sum(image.usage.total_tokens for image in images if image.usage) == 9 + 4 * 196
    assert sum(image.paid_microusd for image in images) == 9 * 5 + 4 * 196 * 30


async def test_a_generation_is_one_call_for_at_most_what_a_call_takes(make: Make, provider: OpenAIStandIn) -> None:
    images = await make(max_n=4).generate(asked(), range(10))
    assert len({image.sha256 for image in images}) == 4
    assert [request.json()["n"] for request in provider.requests] == [4]


async def test_a_price_factor_is_taken_before_the_cost_is_rounded(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    (image,) = await upstream.generate(asked(quality="low"), [0], price_factor=Decimal("0.6"))
    assert image.paid_microusd == round((9 * 5 + 196 * 30) * 0.6)
    assert provider.calls == 1


@pytest.mark.parametrize(
    ("spoil", "cost_microusd"),
    [
        (lambda answer: answer["data"][0].update(b64_json="!!!!"), 9 * 5 + 196 * 30),
        (lambda answer: answer.update(data=[]), None),
        (lambda answer: answer.update(data="none"), None),
    ],
    ids=["a damaged picture is paid", "no pictures", "no list"],
)
async def test_an_answer_that_is_no_good_says_what_it_cost(
    upstream: OpenAIUpstream,
    provider: OpenAIStandIn,
    spoil: Callable[[dict[str, Any]], None],
    cost_microusd: int | None,
) -> None:
    provider.edit_next(spoil)
    error = await failure(upstream, asked(quality="low"))
    assert isinstance(error, UpstreamBadImageError)
    assert error.cost_microusd == cost_microusd


@pytest.mark.parametrize(
    ("reply", "cost_microusd"),
    [
        (error_reply(500, "server_error"), 0),
        (error_reply(503, "server_is_overloaded"), 0),
        (error_reply(504, "timeout"), None),
        (Reply(524, b'{"title": "A timeout occurred", "status": 524}', "application/problem+json"), None),
        (Reply(201, b'{"data": []}'), None),
        (Reply(302, b"<html>over there</html>", "text/html"), 0),
        (Reply(502, b"<html>bad gateway</html>", "text/html"), None),
        (Reply(200, b"<html>welcome</html>", "text/html"), None),
        (Reply(200, b"{}" * 600, cut_after=100), None),
        (error_reply(429, "rate_limit_exceeded"), 0),
        (error_reply(400, "moderation_blocked", moderation_details={"moderation_stage": "input"}), 0),
        (error_reply(400, "moderation_blocked", moderation_details={"moderation_stage": "output"}), None),
    ],
    ids=lambda value: f"{value.status}" if isinstance(value, Reply) else "",
)
async def test_a_failed_call_says_whether_it_may_have_been_paid_for(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, reply: Reply, cost_microusd: int | None
) -> None:
    provider.answer_next(reply)
    assert (await failure(upstream)).cost_microusd == cost_microusd


async def test_a_damaged_picture_among_good_ones_is_left_out_and_all_is_still_paid(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    provider.edit_next(lambda answer: answer["data"][1].update(b64_json="!!!!"))
    images = await upstream.generate(asked(quality="low"), range(3))
    assert len(images) == 2
    assert sum(image.paid_microusd for image in images) == 9 * 5 + 3 * 196 * 30


async def test_without_usage_every_picture_of_the_answer_is_paid_for(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    def damage(answer: dict[str, Any]) -> None:
        del answer["usage"]
        answer["data"][0] = {}

    provider.edit_next(damage)
    images = await upstream.generate(asked(quality="low"), range(3))
    assert [image.paid_microusd for image in images] == [9_000, 9_000]


async def test_fewer_pictures_than_asked_for_are_taken(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    provider.edit_next(lambda answer: answer["data"].pop())
    assert len(await upstream.generate(asked(), range(3))) == 2


async def test_more_pictures_than_asked_for_are_cut_to_what_was(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    provider.edit_next(lambda answer: answer["data"].extend(answer["data"]))
    assert len(await upstream.generate(asked(), [0])) == 1


async def test_a_provider_that_tells_nothing_gets_the_requests_values_and_the_tables_price(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    def say_nothing(answer: dict[str, Any]) -> None:
        for name in ("usage", "size", "quality", "background", "created", "output_format"):
            del answer[name]

    provider.edit_next(say_nothing)
    [image] = await upstream.generate(asked(size="1024x1024", quality="high"), [0])
    assert (image.size, image.quality, image.background) == ("1024x1024", "high", "auto")
    assert (image.usage, image.paid_microusd) == (None, 211_000)
    provider.edit_next(say_nothing)
    [image] = await upstream.generate(asked(), [0])
    assert (image.size, image.paid_microusd) == ("64x48", 0)


async def test_facts_that_are_not_words_are_not_believed(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    def lie(answer: dict[str, Any]) -> None:
        answer.update(size=["x"], quality="x" * 65, background="a b", model=7, usage=[1])
        answer["data"][0]["revised_prompt"] = {"a": 1}

    provider.edit_next(lie)
    [image] = await upstream.generate(asked(size="1024x1024", quality="low"), [0])
    assert (image.size, image.quality, image.background, image.model) == ("1024x1024", "low", "auto", "gpt-image-2")
    assert (image.revised_prompt, image.usage, image.paid_microusd) == ("", None, 6_000)


async def test_a_revised_prompt_and_the_providers_model_are_kept(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    def say_more(answer: dict[str, Any]) -> None:
        answer["model"] = "gpt-image-2-2026-04-21"
        answer["data"][0]["revised_prompt"] = "striped " * 10_000

    provider.edit_next(say_more)
    [image] = await upstream.generate(asked(), [0])
    assert image.model == "gpt-image-2-2026-04-21"
    assert image.revised_prompt.startswith("striped striped")
    assert len(image.revised_prompt) == 32_000


async def test_half_a_surrogate_pair_in_a_revised_prompt_does_not_reach_those_who_cannot_write_it(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    provider.edit_next(lambda answer: answer["data"][0].update(revised_prompt="a \ud83d cat \U0001f63a"))
    [image] = await upstream.generate(asked(), [0])
    assert image.revised_prompt == "a ? cat \U0001f63a"


async def test_a_seed_belongs_to_one_picture(upstream: OpenAIUpstream) -> None:
    images = await upstream.generate(asked("qwen-image", seed=5), [0, 1])
    assert [image.seed for image in images] == [None, None]


async def test_a_large_picture_arrives_whole(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    provider.min_image_bytes = 6_000_000
    [image] = await upstream.generate(asked(), [0])
    assert image.data == provider.image_bytes(min_size_bytes=6_000_000)


# --- errors, by the provider's code before its status


@pytest.mark.parametrize(
    ("status", "code", "kind", "expected"),
    [
        (400, "moderation_blocked", "image_generation_user_error", PromptRefusedError),
        (400, "content_policy_violation", "invalid_request_error", PromptRefusedError),
        (400, "contentFilter", "", PromptRefusedError),
        (403, "content_filter", "", PromptRefusedError),
        (400, "unknown_parameter", "invalid_request_error", UpstreamInvalidError),
        (400, None, "invalid_request_error", UpstreamInvalidError),
        (413, None, "invalid_request_error", UpstreamInvalidError),
        (422, None, "", UpstreamInvalidError),
        (401, "invalid_api_key", "invalid_request_error", UpstreamNotEntitledError),
        (400, "model_not_found", "invalid_request_error", UpstreamNotEntitledError),
        (403, None, "", UpstreamNotEntitledError),
        (404, "model_not_found", "invalid_request_error", UpstreamNotEntitledError),
        (410, None, "", UpstreamNotEntitledError),
        (429, "rate_limit_exceeded", "requests", UpstreamLimitedError),
        (429, "slow_down", "rate_limit_error", UpstreamLimitedError),
        (429, None, "", UpstreamLimitedError),
        (429, "insufficient_quota", "insufficient_quota", UpstreamQuotaError),
        (429, None, "insufficient_quota", UpstreamQuotaError),
        (429, "credit_balance_exhausted", "", UpstreamQuotaError),
        (429, "organization_spend_limit_exceeded", "", UpstreamQuotaError),
        (429, "project_spend_limit_exceeded", "", UpstreamQuotaError),
        (429, "organization_usage_limit_exceeded", "", UpstreamQuotaError),
        (400, "billing_hard_limit_reached", "invalid_request_error", UpstreamQuotaError),
        (402, None, "", UpstreamQuotaError),
        (408, None, "", UpstreamDownError),
        (500, "server_error", "server_error", UpstreamDownError),
        (503, "server_is_overloaded", "service_unavailable_error", UpstreamDownError),
        (302, None, "", UpstreamDownError),
    ],
)
async def test_each_failed_answer_has_its_error_and_is_asked_once(  # noqa: PLR0917 - a row of a table
    upstream: OpenAIUpstream,
    provider: OpenAIStandIn,
    status: int,
    code: str | None,
    kind: str,
    expected: type[UpstreamError],
) -> None:
    provider.fail_next(status, code, kind=kind, message=f"Rejected: {PROMPT} with key {API_KEY}")
    error = await failure(upstream)
    assert type(error) is expected
    assert f"main answered {status} to call req_1" in str(error)
    assert (code or kind) in str(error)
    assert provider.calls == 1
    assert len(await upstream.generate(asked(), [0])) == 1


async def test_the_wrong_parameter_is_named(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    provider.fail_next(400, "invalid_value", param="size")
    error = await failure(upstream)
    assert isinstance(error, UpstreamInvalidError)
    assert error.field == "size"
    assert "(parameter size)" in str(error)


async def test_the_strict_api_refuses_what_it_does_not_know(upstream: OpenAIUpstream) -> None:
    error = await failure(upstream, asked(extra={"steps": 3.0}))
    assert isinstance(error, UpstreamInvalidError)
    assert error.field == "steps"


async def test_a_refusal_says_whether_the_picture_was_the_reason(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    for stage, told in (("output", True), ("input", False), ("moon", False)):
        provider.fail_next(400, "moderation_blocked", moderation_details={"moderation_stage": stage})
        error = await failure(upstream)
        assert isinstance(error, PromptRefusedError)
        assert error.after_seeing is told
        assert f"refuses the {'picture' if told else 'prompt'}" in str(error)


@pytest.mark.parametrize("field", ["code", "param", "kind"])
@pytest.mark.parametrize("value", [PROMPT, "x" * 65, 400, ["size"], {"a": "b"}, "zebras\n"])
async def test_fields_that_are_not_names_do_not_enter_the_message(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, field: str, value: Any
) -> None:
    error_object = {"message": PROMPT, "code": None, "param": None, "type": "", "kind": ""}
    error_object["type" if field == "kind" else field] = value
    provider.answer_next(Reply(400, json.dumps({"error": error_object}).encode()))
    error = await failure(upstream)
    assert isinstance(error, UpstreamInvalidError)
    assert str(error) == "main answered 400 to call req_1: it does not take the request as it is."


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"object": "error", "message": "too large", "type": "BadRequestError", "code": 400}', UpstreamInvalidError),
        (b'{"detail": [{"loc": ["body", "size"]}]}', UpstreamInvalidError),
        (b'{"error": "bad"}', UpstreamInvalidError),
        (b"{}", UpstreamInvalidError),
        (b"[1]", UpstreamDownError),
        (b"<html>zebras</html>", UpstreamDownError),
        (b"", UpstreamDownError),
        (b"[" * 60_000, UpstreamDownError),
        (b'{"error": {"code": "moderation_blocked"}' + b" " * 70_000 + b"}", UpstreamDownError),
    ],
)
async def test_error_bodies_of_other_servers_are_read_as_far_as_they_go(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, body: bytes, expected: type[UpstreamError]
) -> None:
    provider.answer_next(Reply(400, body))
    assert type(await failure(upstream)) is expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (403, UpstreamDownError),
        (404, UpstreamDownError),
        (502, UpstreamDownError),
        (301, UpstreamDownError),
        (429, UpstreamLimitedError),
        (401, UpstreamNotEntitledError),
    ],
)
async def test_a_page_of_a_gateway_is_not_the_apis_answer(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, status: int, expected: type[UpstreamError]
) -> None:
    provider.answer_next(Reply(status, b"<html><h1>zebras</h1></html>", "text/html"))
    assert type(await failure(upstream)) is expected


# --- limits


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"retry-after": "7"}, "", 7.0),
        ({"retry-after": "0.25"}, "", 0.25),
        ({"retry-after": "7", "retry-after-ms": "1500"}, "", 1.5),
        ({"retry-after": format_datetime(datetime.fromtimestamp(NOW_S + 90, UTC), usegmt=True)}, "", 90.0),
        ({"retry-after": format_datetime(datetime.fromtimestamp(NOW_S + 90, UTC)).replace("+0000", "-0000")}, "", 90.0),
        ({"retry-after": "0", "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, "", 360.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m1.5s"}, "", 61.5),
        ({"x-ratelimit-remaining-images": "0", "x-ratelimit-reset-images": "42"}, "", 42.0),
        (
            {
                "x-ratelimit-remaining-requests": "3",
                "x-ratelimit-reset-requests": "1h",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "12ms",
            },
            "",
            0.012,
        ),
        ({}, "You've exceeded the rate limit, please slow down and try again after 51.84 seconds.", 51.84),
        ({}, "Limit 5, Used 5. Please try again in 12s. Visit", 12.0),
        ({}, "Please try again in 1m2.5s.", 62.5),
        ({"retry-after": "999999999"}, "", 3_600.0),
        ({"retry-after": "-5"}, "", 5.0),
        ({"retry-after": "soon"}, "try again in a while", 5.0),
        ({"retry-after": "1e9"}, "try again in ... seconds", 5.0),
        ({"retry-after": "Fri, 99 Foo 2026 00:00:00 GMT"}, "", 5.0),
        ({"retry-after": "Fri, 01 Jan 99999999999 00:00:00 GMT"}, "", 5.0),
        ({"retry-after": "Fri, 01 Jan 2027 00:00:00 +99999999999999"}, "", 5.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "-1"}, "", 5.0),
        ({}, "", 5.0),
    ],
)
async def test_when_to_try_again_is_read_from_where_it_is_said(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, headers: dict[str, str], message: str, seconds: float
) -> None:
    provider.fail_next(429, "rate_limit_exceeded", message=message, headers=headers)
    error = await failure(upstream)
    assert isinstance(error, UpstreamLimitedError)
    assert error.retry_after_s == pytest.approx(seconds)


async def test_an_overloaded_provider_says_when_to_come_back_too(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    provider.fail_next(503, "server_is_overloaded", headers={"retry-after": "11"})
    assert (await failure(upstream)).retry_after_s == 11.0
    provider.fail_next(503, "server_is_overloaded")
    assert (await failure(upstream)).retry_after_s == UpstreamDownError.retry_after_s


async def test_each_answer_has_the_limits_it_told_of_and_no_others(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    assert (await upstream.generate(asked(), [0])).told is None
    provider.headers = {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "a lot",
        "x-ratelimit-remaining-images": "4",
    }
    told = RateLimits(RateLimit(60, 59, 1.0), None, RateLimit(None, 4, None))
    assert (await upstream.generate(asked(), [0])).told == told
    provider.edit_next(lambda answer: answer["data"][0].update(b64_json="!!!!"))
    assert (await failure(upstream)).told == told
    provider.headers = {}
    assert (await upstream.generate(asked(), [0])).told is None
    provider.fail_next(429, "rate_limit_exceeded", headers={"x-ratelimit-remaining-images": "0"})
    assert (await failure(upstream)).told == RateLimits(images=RateLimit(None, 0, None))


async def test_where_nobody_says_the_price_the_pictures_carry_the_most_it_can_be(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    provider.edit_next(lambda answer: answer.pop("usage"))
    delivery = await upstream.generate(asked("qwen-image"), range(3), most_microusd=100)
    assert (delivery.priced, [image.paid_microusd for image in delivery]) == (False, [34, 33, 33])
    provider.edit_next(lambda answer: answer.pop("usage"))
    free = await upstream.generate(asked("qwen-image"), range(3))
    assert (free.priced, [image.paid_microusd for image in free]) == (True, [0, 0, 0])


# --- answers that are none


def _png(name: str) -> Reply:
    return Reply(body=json.dumps({"data": [{"b64_json": name}]}).encode())


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"<html>zebras</html>", content_type="text/html"),
        Reply(body=b""),
        Reply(body=b"[" * 100_000),
        Reply(body=b"[]"),
        Reply(body=b"{}"),
        Reply(body=b'{"data": []}'),
        Reply(body=b'{"data": {"b64_json": "AAAA"}}'),
        Reply(body=b'{"data": [3, null]}'),
        Reply(body=b'{"data": [{}]}'),
        Reply(body=b'{"data": [{"b64_json": "", "url": ""}]}'),
        Reply(body=b'{"data": [{"b64_json": 7}]}'),
        Reply(body=b'{"data": [{"b64_json": "\\u00e9AAA"}]}'),
        Reply(body=b"\xff\xfe\x00"),
        Reply(body=b'{"data": [{"b64_json": "' + b"9" * 5_000 + b'"}], "created": ' + b"9" * 5_000 + b"}"),
        Reply(body=b"not gzip at all", headers={"content-encoding": "identity"}),
        _png("AAA"),
        _png(base64.b64encode(b"zebras").decode()),
        _png(base64.b64encode(small_image(1))[:-40].decode()),
        _png(base64.b64encode(small_image(1, "gif")).decode()),
        _png(base64.b64encode(small_image(1, "jpeg")).decode()),
    ],
)
async def test_an_answer_without_the_picture_it_should_be_is_a_bad_image(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, reply: Reply
) -> None:
    provider.answer_next(reply)
    assert type(await failure(upstream)) is UpstreamBadImageError
    assert provider.calls == 1


async def test_an_answer_is_read_no_further_than_its_pictures_may_be_large(make: Make, provider: OpenAIStandIn) -> None:
    upstream = make(max_image_bytes=300_000)
    provider.min_image_bytes = 290_000
    assert len(await upstream.generate(asked(), [0])) == 1
    provider.min_image_bytes = 310_000
    assert "at most 300000" in str(await failure(upstream))
    huge = Reply(body=b'{"data": "' + b"A" * 2_000_000 + b'"}')
    provider.answer_next(huge)
    assert "has more than" in str(await failure(upstream))
    # Without a length the bytes are counted as they come: the rest of this one never does.
    chunked = Reply(body=b"200000\r\n" + huge.body, headers=CHUNKED, hang_after=2_000_000)
    provider.answer_next(chunked)
    assert "has more than" in str(await failure(upstream))


async def test_a_compressed_answer_is_counted_unpacked(make: Make, provider: OpenAIStandIn) -> None:
    upstream = make(max_image_bytes=100_000)
    packed = gzip.compress(b'{"data": "' + b"A" * 20_000_000 + b'"}')
    provider.answer_next(Reply(body=packed, headers={"content-encoding": "gzip"}))
    assert "has more than" in str(await failure(upstream))
    provider.answer_next(Reply(body=b"not gzip", headers={"content-encoding": "gzip"}))
    assert type(await failure(upstream)) is UpstreamDownError


async def test_a_picture_with_too_many_pixels_is_a_bad_image(make: Make) -> None:
    assert "at most 3000 pixels" in str(await failure(make(max_pixels=3_000)))


# --- the connection


async def test_a_connection_reset_in_the_answer_is_not_paid_for_twice(
    upstream: OpenAIUpstream, provider: OpenAIStandIn
) -> None:
    provider.answer_next(Reply(body=b'{"data": [' + b" " * 1_000, cut_after=500))
    assert type(await failure(upstream)) is UpstreamDownError
    provider.answer_next(Reply(body=b"x" * 1_000, cut_after=0))
    assert type(await failure(upstream)) is UpstreamDownError
    assert provider.calls == 2


async def test_bytes_that_are_not_http_do_not_enter_the_message(make: Make) -> None:
    async def talk_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.read(1_000)
        writer.write(b"zebras zebras zebras\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk_nonsense, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        error = await failure(make(base_url=f"http://127.0.0.1:{port}/v1"))
    assert "ClientResponseError" in str(error)


@pytest.mark.parametrize("sent_bytes", [None, 0, 50])
async def test_silence_ends_at_the_deadline(make: Make, provider: OpenAIStandIn, sent_bytes: int | None) -> None:
    if sent_bytes is None:
        provider.hang_next()
    else:
        provider.answer_next(Reply(body=b"x" * 100, hang_after=sent_bytes))
    error = await failure(make(timeout_s=0.05))
    assert type(error) is UpstreamDownError
    assert "no answer within" in str(error)


async def test_silence_of_a_download_ends_at_the_same_deadline(make: Make, provider: OpenAIStandIn) -> None:
    provider.image_url = provider.file("slow", Reply(body=b"x" * 100, hang_after=50))
    # Long enough for the call itself on a busy machine; only the download hangs.
    error = await failure(make(timeout_s=1.0))
    assert type(error) is UpstreamDownError
    assert "no picture within" in str(error)


@dataclass
class Call:
    """What happens to the calls of a test: how many pictures are whole, and when their deadline comes."""

    monkeypatch: pytest.MonkeyPatch
    whole: int = 0

    def end_time(self) -> None:
        """It is an hour later now, and every deadline of a call has passed."""
        loop = asyncio.get_running_loop()
        now_s = loop.time
        self.monkeypatch.setattr(loop, "time", lambda: now_s() + 3_600.0)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    call = Call(monkeypatch)

    def whole(**fields: Any) -> GeneratedImage:
        call.whole += 1  # a picture's last step, after which nothing of it can be late
        return GeneratedImage(**fields)

    monkeypatch.setattr(openai, "GeneratedImage", whole)
    return call


def hanging(provider: OpenAIStandIn, *places: int) -> Callable[[dict[str, Any]], None]:
    """Lets the pictures in these places be URLs where half an answer comes, and then nothing."""
    url = provider.file("slow", Reply(body=b"x" * 100, hang_after=50))

    def hang(answer: dict[str, Any]) -> None:
        for place in places:
            answer["data"][place] = {"url": url}

    return hang


@pytest.mark.parametrize("place", [0, 1])
async def test_a_download_that_hangs_takes_no_other_picture_with_it_and_all_is_still_paid(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, call: Call, place: int
) -> None:
    provider.by_url = True
    provider.edit_next(hanging(provider, place))
    generation = asyncio.create_task(upstream.generate(asked(quality="low"), range(3)))
    await until(lambda: call.whole == 2)
    call.end_time()
    with structlog.testing.capture_logs() as events:
        images = await generation
    assert [image.data for image in images] == [small_image(number) for number in (1, 2, 3) if number != place + 1]
    assert sum(image.paid_microusd for image in images) == 9 * 5 + 3 * 196 * 30
    assert [(event["event"], event["reason"]) for event in events] == [("upstream_pictures_lost", "UPSTREAM_DOWN")]
    assert provider.calls == 1


async def test_a_picture_still_being_decoded_at_the_deadline_takes_no_other_with_it(
    upstream: OpenAIUpstream, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def decode(data: bytes, **expected: Any) -> ImageFacts:
        if data == small_image(2):
            gate.wait()
        return inspect(data, **expected)

    monkeypatch.setattr(openai, "inspect", decode)
    generation = asyncio.create_task(upstream.generate(asked(quality="low"), range(3)))
    try:
        await until(lambda: call.whole == 2)
        call.end_time()
        images = await generation
    finally:
        gate.set()
    assert [image.data for image in images] == [small_image(1), small_image(3)]
    assert sum(image.paid_microusd for image in images) == 9 * 5 + 3 * 196 * 30


async def test_where_no_picture_came_in_time_the_error_says_what_they_cost(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, call: Call
) -> None:
    provider.edit_next(hanging(provider, 0, 1))
    generation = asyncio.create_task(failure(upstream, asked(quality="low"), [0, 1]))
    await until(lambda: len(provider.requests) == 3)
    call.end_time()
    error = await generation
    assert type(error) is UpstreamDownError
    assert "no picture within 600 s" in str(error)
    assert (error.cost_microusd, error.upstream_request_id) == (9 * 5 + 2 * 196 * 30, "req_1")


async def test_cancelling_leaves_no_download_running(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, call: Call
) -> None:
    def ours() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks() - provider._tasks

    provider.edit_next(hanging(provider, 0, 2))
    before = ours()
    generation = asyncio.create_task(upstream.generate(asked(), range(3)))
    await until(lambda: call.whole == 1 and len(provider.requests) == 3)
    assert len(ours() - before) == 3  # the call and its two downloads
    generation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await generation
    assert ours() == before


async def test_a_closed_port_is_tried_twice_and_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[URL] = []
    connect = aiohttp.TCPConnector.connect

    async def counted(self: aiohttp.TCPConnector, req: aiohttp.ClientRequest, *rest: Any, **more: Any) -> Any:
        tried.append(req.url)
        return await connect(self, req, *rest, **more)

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", counted)
    async with OpenAIStandIn() as gone:
        base_url = gone.base_url
    error = await failure(make(base_url=base_url))
    assert type(error) is UpstreamDownError
    assert "cannot connect to 127.0.0.1" in str(error)
    assert error.cost_microusd == 0
    assert [str(url) for url in tried] == [f"{base_url}/images/generations"] * 2


async def test_a_connection_that_fails_once_is_not_noticed(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = aiohttp.TCPConnector.connect
    failures = iter([True])

    async def fail_first(self: aiohttp.TCPConnector, *rest: Any, **more: Any) -> Any:
        if next(failures, False):
            raise aiohttp.ConnectionTimeoutError
        return await connect(self, *rest, **more)

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", fail_first)
    assert len(await upstream.generate(asked(), [0])) == 1
    assert next(failures, None) is None
    assert provider.calls == 1


async def test_a_handshake_that_never_ends_is_no_connection(make: Make) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        error = await failure(make(base_url=f"https://127.0.0.1:{port}/v1", connect_timeout_s=0.05))
    assert "cannot connect to 127.0.0.1" in str(error)
    assert error.cost_microusd == 0


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
async def test_the_environments_proxy_is_used(
    make: Make, provider: OpenAIStandIn, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f"127.0.0.1:{provider.port}")
    await make(base_url="http://images.example/v1").generate(asked(), [0])
    assert provider.requests[0].target == "http://images.example/v1/images/generations"
    assert provider.requests[0].headers["host"] == "images.example"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_no_proxy_is_asked_for_a_provider_on_this_machine(
    make: Make, provider: OpenAIStandIn, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert len(await make(base_url=f"http://{host}:{provider.port}/v1").generate(asked(), [0])) == 1


async def test_hosts_the_environment_excepts_are_asked_directly(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "images.invalid")
    assert "cannot connect to images.invalid" in str(await failure(make(base_url="http://images.invalid/v1")))


async def test_of_an_exception_with_a_port_only_that_port_is_asked_directly(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with OpenAIStandIn() as proxy:
        monkeypatch.setenv("http_proxy", proxy.root_url)
        monkeypatch.setenv("no_proxy", "images.invalid:8000")
        await make(base_url="http://images.invalid:8001/v1").generate(asked(), [0])
        assert proxy.calls == 1
        assert "cannot connect" in str(await failure(make(base_url="http://images.invalid:8000/v1")))
        assert proxy.calls == 1


@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:1080", "http://", "http://me:pa#ss@proxy:3128", "http://proxy:99999"]
)
async def test_a_proxy_that_is_none_is_refused_at_once(make: Make, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(ConfigError, match=r"http\(s\)://\[user:password@\]host") as caught:
        make(base_url="https://images.example/v1")
    assert "pa#ss" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_a_proxys_password_is_in_no_error(
    make: Make, provider: OpenAIStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in knows no CONNECT: it answers 404, whose reason and URL aiohttp quotes."""
    monkeypatch.setenv("https_proxy", f"http://me:s3cret@127.0.0.1:{provider.port}")
    error = await failure(make(base_url="https://images.example/v1"))
    assert "cannot connect to images.example" in str(error)
    assert "s3cret" not in "".join(traceback.format_exception(error))
    assert provider.requests[0].method == "CONNECT"


async def test_what_comes_through_a_proxy_is_not_taken_for_a_neighbours(
    make: Make, provider: OpenAIStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy has a private address; the provider behind it does not, and may not lead us to one."""
    monkeypatch.setenv("http_proxy", provider.root_url)
    provider.image_url = "http://localtest.example/cat.png"
    upstream = make(base_url="http://localtest.example/v1")

    async def lookup(*_: object) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(upstream._downloads, "_resolve", lookup)
    assert "a private address" in str(await failure(upstream))


async def test_cancelling_lets_go_of_the_connection(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    provider.hold()
    generation = asyncio.create_task(upstream.generate(asked(), [0]))
    await provider.arrived(1)
    generation.cancel()
    with pytest.raises(asyncio.CancelledError):
        await generation
    provider.release()
    assert len(await upstream.generate(asked(), [0])) == 1


async def test_what_a_server_sends_after_its_answer_is_nobodys_answer(make: Make, provider: OpenAIStandIn) -> None:
    """It would be taken for the answer to the next prompt, and that one's for the one after."""
    numbers = itertools.count()
    answered = asyncio.Event()

    async def answer_twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(picture(next(numbers)))
                await answered.wait()
                writer.write(picture(99))
                await writer.drain()
        writer.close()

    def picture(number: int) -> bytes:
        body = json.dumps({"data": [{"b64_json": base64.b64encode(small_image(number)).decode()}]}).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)

    async with await asyncio.start_server(answer_twice, "127.0.0.1", 0) as server:
        upstream = make(base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        for number in range(3):
            answered.clear()
            [image] = await upstream.generate(asked(), [0])
            assert image.data == small_image(number)
            answered.set()
            await make().generate(asked(), [0])  # time enough for what was sent meanwhile to arrive
    assert provider.calls == 3


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_takes_the_prompt_elsewhere(make: Make, provider: OpenAIStandIn, status: int) -> None:
    async with OpenAIStandIn() as other:
        headers = {"location": f"{other.base_url}/images/generations"}
        provider.answer_next(Reply(status, b"", headers=headers))
        assert type(await failure(make())) is UpstreamDownError
        assert other.connections == 0
    provider.answer_next(Reply(status, b"", headers=headers))  # where nobody listens any more
    error = await failure(make())
    assert str(status) in str(error)
    assert provider.calls == 2


async def test_an_answer_with_long_headers_is_not_lost(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    provider.headers = {"set-cookie": "x" * 20_000} | {f"x-{number}": "1" for number in range(300)}
    assert len(await upstream.generate(asked(), [0])) == 1


async def test_an_error_of_our_own_is_not_taken_for_the_providers(
    upstream: OpenAIUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PriceTable, "cost_microusd", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        await upstream.generate(asked(), [0])


# --- images by URL


async def test_an_image_url_is_fetched_at_once(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    provider.by_url = True
    images = await upstream.generate(asked(), range(3))
    assert [image.data for image in images] == [small_image(number) for number in (1, 2, 3)]
    fetched = [request for request in provider.requests if request.method == "GET"]
    assert len(fetched) == 3
    assert all("authorization" not in request.headers for request in fetched)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(302, headers={"location": "/files/other"}), UpstreamBadImageError),
        (Reply(403), UpstreamBadImageError),
        (Reply(200, b"<html>zebras</html>", "image/png"), UpstreamBadImageError),
        (Reply(200, small_image(1)[:-10], "image/png"), UpstreamBadImageError),
        (Reply(200, b"x" * 200_000, "image/png"), UpstreamBadImageError),
    ],
)
async def test_what_lies_at_a_url_is_trusted_for_nothing(
    make: Make, provider: OpenAIStandIn, reply: Reply, expected: type[UpstreamError]
) -> None:
    provider.file("other", Reply(200, small_image(1)))
    provider.image_url = provider.file("it", reply)
    assert type(await failure(make(max_image_bytes=100_000))) is expected


MISSING = [Reply(404), Reply(500), Reply(200, small_image(1), "image/png", cut_after=20)]


@pytest.mark.parametrize("reply", MISSING, ids=["404", "500", "a reset"])
async def test_a_picture_that_cannot_be_fetched_at_once_is_asked_for_again_and_not_paid_anew(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, clock: FakeClock, reply: Reply
) -> None:
    provider.image_url = provider.file("it", reply)
    generation = asyncio.create_task(upstream.generate(asked(quality="low"), [0]))
    await until(lambda: clock.sleepers == 1)
    provider.file("it", Reply(200, small_image(1), "image/png"))
    clock.advance(1.0)
    [image] = await generation
    assert (image.data, image.paid_microusd) == (small_image(1), 9 * 5 + 196 * 30)
    assert [request.method for request in provider.requests] == ["POST", "GET", "GET"]


@pytest.mark.parametrize("reply", MISSING, ids=["404", "500", "a reset"])
async def test_a_picture_that_can_never_be_fetched_is_a_failure_that_says_what_it_cost(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, clock: FakeClock, reply: Reply
) -> None:
    provider.image_url = provider.file("it", reply)
    generation = asyncio.create_task(failure(upstream, asked(quality="low")))
    for _ in range(2):
        await until(lambda: clock.sleepers == 1)
        clock.advance(2.0)
    error = await generation
    assert type(error) is UpstreamDownError
    assert error.cost_microusd == 9 * 5 + 196 * 30
    assert [request.method for request in provider.requests] == ["POST", "GET", "GET", "GET"]


async def test_a_picture_is_not_waited_for_beyond_the_calls_deadline(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, clock: FakeClock, call: Call
) -> None:
    provider.image_url = provider.file("it", Reply(404))
    generation = asyncio.create_task(failure(upstream))
    await until(lambda: clock.sleepers == 1)
    call.end_time()
    assert "no picture within 600 s" in str(await generation)
    assert clock.sleepers == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/latest/meta-data/",
        "https://example.com/cat.png",
        "https://127.0.0.1:{port}@example.com/",
        "http://localhost:{port}/files/1.png",
        "http://127.0.0.1:1/files/1.png",
        "http://user:word@127.0.0.1:{port}/files/1.png",
        "http://[::1]:{port}/files/1.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "//127.0.0.1:{port}/files/1.png",
        "/files/1.png",
        "https://",
        "https://ex ample.com/",
        "https://[::1/",
        "https://a:99999/",
        "\x00",
        "gopher://127.0.0.1:{port}/_GET",
    ],
)
async def test_a_url_that_leads_elsewhere_is_not_fetched(
    upstream: OpenAIUpstream, provider: OpenAIStandIn, url: str
) -> None:
    provider.image_url = url.format(port=provider.port)
    assert type(await failure(upstream)) is UpstreamBadImageError
    assert [request.method for request in provider.requests] == ["POST"]


# --- at start and in doctor


async def test_check_lists_the_models_and_costs_nothing(upstream: OpenAIUpstream, provider: OpenAIStandIn) -> None:
    await upstream.check()
    assert [request.path for request in provider.requests] == ["/v1/models"]
    assert provider.calls == 0


async def test_check_tells_a_wrong_key_and_a_dead_endpoint(make: Make) -> None:
    with pytest.raises(UpstreamNotEntitledError):
        await make(api_key=lambda: "sk-wrong").check()
    with pytest.raises(UpstreamNotEntitledError):
        await make(base_url=make()._endpoint.base_url + "/nowhere").check()
    async with OpenAIStandIn() as gone:
        base_url = gone.base_url
    with pytest.raises(UpstreamDownError):
        await make(base_url=base_url).check()


@pytest.mark.parametrize(
    "base_url",
    [
        "",
        "api.openai.com/v1",
        "ftp://a/v1",
        "https://",
        "https://user:pass@a/v1",
        "https://a/v1?k=1",
        "https://a/#x",
        "https://a:b",
        "https://a:99999/v1",
        "https://a..b/v1",
        f"https://{'a' * 64}.example/v1",
    ],
)
def test_a_base_url_that_is_none_is_a_configuration_error(make: Make, base_url: str) -> None:
    with pytest.raises(ConfigError, match="upstream main: base_url"):
        make(base_url=base_url)


def test_nothing_printed_of_an_upstream_holds_the_key(make: Make) -> None:
    upstream = make(api_key=API_KEY.strip)
    assert API_KEY not in repr(upstream) + repr(upstream._endpoint) + str(vars(upstream))


@pytest.mark.parametrize("written", ["http://127.0.0.1:{port}/v1/", "http://localhost:{port}/v1"])
async def test_a_base_url_may_be_written_in_several_ways(make: Make, provider: OpenAIStandIn, written: str) -> None:
    assert len(await make(base_url=written.format(port=provider.port)).generate(asked(), [0])) == 1


async def test_errors_of_the_stand_in_have_the_four_keys_the_api_promises() -> None:
    body = json.loads(error_reply(400, "moderation_blocked").body)
    assert set(body["error"]) == {"message", "type", "param", "code"}


async def test_pictures_are_real_and_distinct_across_calls(upstream: OpenAIUpstream) -> None:
    calls: list[list[GeneratedImage]] = [await upstream.generate(asked(), [0]) for _ in range(3)]
    assert len({image.sha256 for image in itertools.chain(*calls)}) == 3
