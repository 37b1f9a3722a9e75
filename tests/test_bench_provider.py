"""The provider emulator: what it admits, what it sends and what it bills, as the API's documents have it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import math
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from cacheserver.clock import SystemClock
from cacheserver.errors import UpstreamDownError
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.providers.openai import Endpoint, OpenAIUpstream
from cacheserver.model import ImageRequest, InputImage, InputRole, PartialImage
from scripts.bench.provider import (
    Call,
    Fault,
    KeyConfig,
    Latency,
    LimitsConfig,
    Price,
    Provider,
    ProviderConfig,
    ProviderProcess,
    Summary,
    images_per_interval,
)
from scripts.bench.provider_config import Kind, output_tokens
from scripts.bench.provider_ledger import read_ledger
from scripts.bench.provider_limits import Bucket, Limits, admit, told
from scripts.bench.provider_wire import go_duration
from tests.fakes import FakeClock
from tests.provider import small_image
from tests.waiting import until

KEY = "sk-1"
GROUP = "org-1"
AMOUNTS: dict[Kind, float] = {"requests": 1.0, "tokens": 200.0, "images": 1.0}
LOW_MICROUSD = 5_895
"""A picture of low quality of "a red fox": 196 tokens at $30 a million, and 3 at $5."""


def config(*, limits: LimitsConfig | None = None, group: LimitsConfig | None = None, **fields: Any) -> ProviderConfig:
    known: dict[str, Any] = {"keys": (KeyConfig(key=KEY, group=GROUP, limits=limits or LimitsConfig()),)}
    known["groups"] = {GROUP: group or LimitsConfig()}
    return ProviderConfig(**(known | fields))


@asynccontextmanager
async def serving(clock: FakeClock, made: ProviderConfig | None = None, **how: Any) -> AsyncIterator[Provider]:
    async with Provider(made or config(), clock=clock, **how) as provider:
        yield provider


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with plain_http() as client:
        yield client


def plain_http() -> httpx.AsyncClient:
    """A client that knows no certificates: to load them takes longer than most tests here."""
    return httpx.AsyncClient(trust_env=False, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


@pytest.fixture
async def provider(clock: FakeClock) -> AsyncIterator[Provider]:
    async with serving(clock) as provider:
        yield provider


async def generate(
    http: httpx.AsyncClient, provider: Provider | ProviderProcess, key: str = KEY, **body: Any
) -> httpx.Response:
    body = {"model": "gpt-image-2", "prompt": "a red fox", "quality": "low", **body}
    headers = {"authorization": f"Bearer {key}"}
    return await http.post(f"{provider.base_url}/images/generations", json=body, headers=headers)


def seeded() -> Random:
    return Random(1)  # noqa: S311 - the same calls in every run


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    """Status, type and code; also holds that the error object is whole."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    return response.status_code, error["type"], error["code"]


def picture_of(response: httpx.Response, index: int = 0) -> Image.Image:
    data = base64.b64decode(response.json()["data"][index]["b64_json"], validate=True)
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


# The limiters


@given(
    per_second=st.floats(0.01, 50),
    capacity=st.floats(1, 100),
    quantised=st.booleans(),
    calls=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 1)), max_size=60),
)
def test_no_window_gets_more_than_the_capacity_and_what_refills(
    per_second: float, capacity: float, calls: list[tuple[float, float]], *, quantised: bool
) -> None:
    bucket = Bucket(capacity=capacity, per_second=per_second, quantised=quantised, now_s=0)
    now_s, admitted = 0.0, []
    for pause_s, amount in calls:
        now_s += pause_s
        if bucket.admits(amount, now_s):
            bucket.take(amount, now_s)
            admitted.append((now_s, amount))
    for i, (from_s, _) in enumerate(admitted):
        for j, (until_s, _) in enumerate(admitted[i:], i):
            elapsed_s = math.floor(until_s) - math.floor(from_s) if quantised else until_s - from_s
            assert sum(amount for _, amount in admitted[i : j + 1]) <= capacity + per_second * elapsed_s + 1e-3


@given(
    per_second=st.floats(0.01, 50),
    quantised=st.booleans(),
    taken=st.floats(0, 30),
    at_s=st.floats(0, 100),
    amount=st.floats(0.1, 30),
)
def test_a_call_is_admitted_after_the_wait_it_is_told_and_not_before(
    per_second: float, taken: float, at_s: float, amount: float, *, quantised: bool
) -> None:
    bucket = Bucket(capacity=10, per_second=per_second, quantised=quantised, now_s=0)
    bucket.take(taken, at_s)
    wait_s = bucket.wait_s(amount, at_s)
    if wait_s > 0:
        assert not bucket.admits(amount, at_s + 0.99 * wait_s - 1e-3 if wait_s > 1e-2 else at_s)
        assert bucket.admits(amount, at_s + wait_s + 1e-6)


def test_a_quantised_limit_refills_at_whole_seconds_and_holds_a_seconds_worth() -> None:
    limits = Limits(LimitsConfig(images_per_minute=180, enforced="quantised"), random=seeded(), now_s=0)
    admitted = [
        second for second in (0.0, 0.1, 0.2, 0.3, 0.99, 1.0, 1.1, 1.2, 1.3) if admit([limits], AMOUNTS, second) is None
    ]
    assert admitted == [0.0, 0.1, 0.2, 1.0, 1.1, 1.2]


def test_a_quantised_limit_below_one_a_second_still_lets_two_pass_at_once() -> None:
    limits = Limits(LimitsConfig(images_per_minute=5, enforced="quantised"), random=seeded(), now_s=0)
    admitted = [second for second in range(61) if admit([limits], AMOUNTS, float(second)) is None]
    assert admitted == [0, 1, 12, 24, 36, 48, 60]


def test_a_bucket_holds_a_minutes_allowance_and_refills_all_the_time() -> None:
    limits = Limits(LimitsConfig(images_per_minute=6), random=seeded(), now_s=0)
    assert [admit([limits], AMOUNTS, 0.0) is None for _ in range(7)] == [True] * 6 + [False]
    refusal = admit([limits], AMOUNTS, 4.0)
    assert refusal is not None
    assert (refusal.kind, refusal.limit) == ("images", 6)
    assert refusal.wait_s == pytest.approx(6)
    assert admit([limits], AMOUNTS, 10.0) is None


def test_more_than_a_limit_holds_passes_when_it_is_full_and_is_paid_off() -> None:
    limits = Limits(LimitsConfig(images_per_minute=60, enforced="quantised"), random=seeded(), now_s=0)
    assert admit([limits], {**AMOUNTS, "images": 10}, 0.0) is None
    assert [second for second in range(12) if admit([limits], AMOUNTS, float(second)) is None] == [9, 10, 11]


def test_what_one_limit_refuses_no_other_limit_counts() -> None:
    key = Limits(LimitsConfig(requests_per_minute=5, images_per_minute=5), random=seeded(), now_s=0)
    group = Limits(LimitsConfig(images_per_minute=1), random=seeded(), now_s=0)
    assert admit([key, group], AMOUNTS, 0.0) is None
    assert admit([key, group], AMOUNTS, 0.0) is not None
    assert {kind: limit.remaining for kind, limit in key.told(0.0).items()} == {"requests": 4, "images": 4}
    assert told([key, group], 0.0)["images"].remaining == 0


def test_tokens_are_limited_by_what_a_call_takes() -> None:
    limits = Limits(LimitsConfig(tokens_per_minute=500), random=seeded(), now_s=0)
    assert [admit([limits], AMOUNTS, 0.0) is None for _ in range(3)] == [True, True, False]


def test_a_limit_can_change_be_lifted_and_be_set() -> None:
    limits = Limits(LimitsConfig(images_per_minute=60), random=seeded(), now_s=0)
    limits.change("images", 2, 0.0)
    assert [admit([limits], AMOUNTS, 0.0) is None for _ in range(3)] == [True, True, False]
    assert admit([limits], AMOUNTS, 30.0) is None
    limits.change("images", None, 30.0)
    assert all(admit([limits], AMOUNTS, 30.0) is None for _ in range(100))
    limits.change("images", 1, 30.0)
    assert [admit([limits], AMOUNTS, 30.0) is None for _ in range(2)] == [True, False]


@pytest.mark.parametrize("enforced", ["bucket", "quantised"])
def test_foreign_traffic_takes_its_share_of_the_limit_in_force(enforced: str) -> None:
    made = LimitsConfig.model_validate({"images_per_minute": 600, "foreign_share": 0.3, "enforced": enforced})
    limits = Limits(made, random=seeded(), now_s=0)
    assert limits.foreign_taken(3_600.0)["images"] == pytest.approx(0.3 * 600 * 60, rel=0.03)
    limits.change("images", 200, 3_600.0)
    assert limits.foreign_taken(7_200.0)["images"] == pytest.approx(0.3 * 800 * 60, rel=0.03)


def test_beside_foreign_traffic_the_rest_of_the_limit_is_ours() -> None:
    limits = Limits(LimitsConfig(images_per_minute=60, foreign_share=0.3), random=seeded(), now_s=0)
    # Ours ask for three quarters of the limit, the others for three tenths: together for more than it.
    ours = sum(admit([limits], AMOUNTS, call / 0.75) is None for call in range(2_700))
    foreign = limits.foreign_taken(3_600.0)["images"]
    assert ours + foreign == pytest.approx(60 + 3_600, abs=30)
    assert foreign > 900


# Answers


async def test_an_answer_has_the_picture_and_the_usage_that_is_billed(
    provider: Provider, http: httpx.AsyncClient
) -> None:
    response = await generate(http, provider)
    answer = response.json()
    assert (answer["size"], answer["quality"], answer["output_format"]) == ("64x64", "low", "png")
    assert answer["usage"] == {
        "total_tokens": 199,
        "input_tokens": 3,
        "output_tokens": 196,
        "input_tokens_details": {"text_tokens": 3, "image_tokens": 0},
        "output_tokens_details": {"image_tokens": 196, "text_tokens": 0},
    }
    assert picture_of(response).size == (64, 64)
    (call,) = provider.calls()
    assert call.billed_microusd == 196 * 30 + 3 * 5
    assert (call.key, call.n, call.status, call.images, call.fault) == (KEY, 1, 200, 1, "")
    assert response.headers["x-request-id"] == call.request_id
    assert response.headers["openai-organization"] == GROUP


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("min_bytes", [0, 150_000])
async def test_every_picture_is_whole_of_its_size_not_blank_and_unlike_any_other(
    clock: FakeClock, http: httpx.AsyncClient, output_format: str, min_bytes: int
) -> None:
    async with serving(clock, config(min_picture_bytes=min_bytes)) as provider:
        response = await generate(http, provider, n=3, size="1536x1024", output_format=output_format)
    pictures = [picture_of(response, i) for i in range(3)]
    for picture in pictures:
        assert (picture.format, picture.size) == (output_format.upper(), (1536, 1024))
        darkest, brightest = picture.convert("L").getextrema()
        assert darkest != brightest
    data = {item["b64_json"] for item in response.json()["data"]}
    assert len(data) == 3
    assert all(len(base64.b64decode(each)) >= min_bytes for each in data)


@pytest.mark.parametrize(
    ("size", "quality", "tokens"),
    [
        ("1024x1024", "low", 196),
        ("1024x1024", "medium", 1756),
        ("1024x1024", "high", 7024),
        ("3840x2160", "high", 13342),
    ],
)
def test_tokens_are_counted_as_published(size: str, quality: str, tokens: int) -> None:
    assert output_tokens(size, quality) == tokens


@pytest.mark.parametrize("quality", ["low", "medium", "high"])
def test_a_picture_costs_the_published_price_and_turning_it_changes_nothing(quality: str) -> None:
    published = {"low": (0.006, 0.005), "medium": (0.053, 0.041), "high": (0.211, 0.165)}[quality]
    for size, usd in (("1024x1024", published[0]), ("1024x1536", published[1]), ("1536x1024", published[1])):
        assert round(output_tokens(size, quality) * 30 / 1e6, 3) == usd


def test_a_bill_is_rounded_half_even_once_per_call() -> None:
    price = Price(usd_per_image={"low": {"64x64": Decimal("0.0000005")}})
    bills = [price.bill_microusd(prompt="x", size="64x64", quality="low", n=n) for n in (1, 2, 3, 5)]
    assert bills == [0, 1, 2, 2]


async def test_priced_by_the_image_an_answer_tells_no_usage(clock: FakeClock, http: httpx.AsyncClient) -> None:
    by_image = Price(usd_per_image={"low": {"1024x1024": Decimal("0.006")}})
    async with serving(clock, config(models={"gpt-image-2": by_image})) as provider:
        assert "usage" not in (await generate(http, provider, n=2)).json()
        assert (await generate(http, provider, size="1536x1024")).status_code == 400
        assert provider.bill_microusd == 12_000


async def test_the_ledger_adds_up_with_the_usage_that_was_answered(provider: Provider, http: httpx.AsyncClient) -> None:
    asked: list[dict[str, Any]] = [
        {"n": 2},
        {"quality": "high", "size": "1024x1536"},
        {"prompt": "x" * 99},
        {"quality": "auto"},
    ]
    usages = [(await generate(http, provider, **body)).json()["usage"] for body in asked]
    told_microusd = sum(usage["input_tokens"] * 5 + usage["output_tokens"] * 30 for usage in usages)
    assert provider.bill_microusd == told_microusd == provider.summary().by_key[KEY].billed_microusd
    assert provider.summary().images == 5


async def test_azures_paths_and_key_header_are_understood(provider: Provider, http: httpx.AsyncClient) -> None:
    headers, body = {"api-key": KEY}, {"prompt": "a red fox"}
    deployed = f"{provider.root_url}/openai/deployments/gpt-image-2/images/generations?api-version=2025-04-01-preview"
    assert (await http.post(deployed, json=body, headers=headers)).is_success
    v1 = f"{provider.root_url}/openai/v1/images/generations"
    assert (await http.post(v1, json=body | {"model": "gpt-image-2"}, headers=headers)).is_success
    refused = await http.post(deployed, json=body | {"model": "gpt-image-2"}, headers=headers)
    assert error_of(refused) == (400, "invalid_request_error", "unknown_parameter")


async def test_the_models_are_listed(provider: Provider, http: httpx.AsyncClient) -> None:
    response = await http.get(f"{provider.base_url}/models", headers={"authorization": f"Bearer {KEY}"})
    assert [model["id"] for model in response.json()["data"]] == ["gpt-image-2", "gpt-image-2-2026-04-21"]
    assert (await http.get(f"{provider.base_url}/models")).status_code == 401


async def test_moderation_flags_what_contains_the_marker(clock: FakeClock, http: httpx.AsyncClient) -> None:
    async with serving(clock, config(moderation_marker="FORBIDDEN")) as provider:
        assert await flags(http, provider, "a fox") == [False]
        assert await flags(http, provider, ["a fox", "a FORBIDDEN fox"]) == [False, True]
        texts = [{"type": "text", "text": "a fox"}, {"type": "text", "text": "FORBIDDEN"}]
        assert await flags(http, provider, texts) == [True]
        assert provider.moderations == 3
        assert provider.calls() == []


async def flags(http: httpx.AsyncClient, provider: Provider, given: object) -> list[bool]:
    """What moderation says; also holds that each result agrees with itself."""
    url, headers = f"{provider.base_url}/moderations", {"authorization": f"Bearer {KEY}"}
    results = (await http.post(url, json={"input": given}, headers=headers)).json()["results"]
    assert all(any(result["categories"].values()) == result["flagged"] for result in results)
    assert all(result["categories"].keys() == result["category_scores"].keys() for result in results)
    return [result["flagged"] for result in results]


@pytest.mark.parametrize(
    ("key", "body", "expected"),
    [
        ("sk-other", {}, (401, "invalid_request_error", "invalid_api_key")),
        (KEY, {"model": "dall-e-9"}, (404, "invalid_request_error", "model_not_found")),
        (KEY, {"model": "gpt-image-2-2026-04-21"}, (403, "invalid_request_error", "model_not_found")),
        (KEY, {"seed": 7}, (400, "invalid_request_error", "unknown_parameter")),
        (KEY, {"response_format": "url"}, (400, "invalid_request_error", "unknown_parameter")),
        (KEY, {"prompt": None}, (400, "invalid_request_error", "missing_required_parameter")),
        (KEY, {"prompt": ""}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"prompt": "x" * 32_001}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"n": 11}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"n": True}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"quality": "standard"}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"size": "256x256"}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"size": "1000x1000"}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"size": "3840x1024"}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"size": "large"}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"output_compression": 50}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"background": "transparent", "output_format": "jpeg"}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"stream": "yes"}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"stream": True, "n": 2}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"stream": True, "partial_images": 4}, (400, "invalid_request_error", "invalid_value")),
        (KEY, {"partial_images": 1}, (400, "invalid_request_error", "invalid_value")),
    ],
)
async def test_what_the_real_api_refuses_is_refused_and_not_billed(
    clock: FakeClock, http: httpx.AsyncClient, key: str, body: dict[str, Any], expected: tuple[int, str, str]
) -> None:
    made = config(keys=(KeyConfig(key=KEY, group=GROUP, models=("gpt-image-2",)),))
    async with serving(clock, made) as provider:
        assert error_of(await generate(http, provider, key, **body)) == expected
        (call,) = provider.calls()
    assert (call.status, call.billed_microusd, call.images, call.limited) == (expected[0], 0, 0, False)


async def test_null_and_every_documented_parameter_are_taken(provider: Provider, http: httpx.AsyncClient) -> None:
    asked: dict[str, Any] = {
        "n": None,
        "user": "u",
        "safety_identifier": "s",
        "moderation": "low",
        "background": "opaque",
    }
    asked |= {"output_format": "webp", "output_compression": 80, "size": "3840x2160", "stream": False}
    assert (await generate(http, provider, **asked)).is_success


async def test_a_call_without_a_key_is_told_so(provider: Provider, http: httpx.AsyncClient) -> None:
    response = await http.post(f"{provider.base_url}/images/generations", json={})
    assert error_of(response) == (401, "invalid_request_error", None)


async def test_what_is_not_json_and_what_is_nowhere_is_told_so(provider: Provider, http: httpx.AsyncClient) -> None:
    url, headers = f"{provider.base_url}/images/generations", {"authorization": f"Bearer {KEY}"}
    assert (await http.post(url, content=b"{", headers=headers)).status_code == 400
    assert (await http.post(url, content=b"[]", headers=headers)).status_code == 400
    assert (await http.get(f"{provider.base_url}/nowhere")).status_code == 404


# Limits on the wire


async def test_an_answer_tells_the_limits_as_they_are_once_it_is_admitted(
    clock: FakeClock, http: httpx.AsyncClient
) -> None:
    limits = LimitsConfig(requests_per_minute=60, tokens_per_minute=100_000, images_per_minute=5)
    async with serving(clock, config(group=limits)) as provider:
        headers = (await generate(http, provider)).headers
    assert {name: value for name, value in headers.items() if name.startswith("x-ratelimit")} == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "100000",
        "x-ratelimit-remaining-tokens": "99801",
        "x-ratelimit-reset-tokens": "120ms",
        "x-ratelimit-limit-images": "5",
        "x-ratelimit-remaining-images": "4",
        "x-ratelimit-reset-images": "12",
    }


async def test_azure_tells_resets_in_plain_seconds(clock: FakeClock, http: httpx.AsyncClient) -> None:
    async with serving(clock, config(group=LimitsConfig(requests_per_minute=6))) as provider:
        url = f"{provider.root_url}/openai/v1/images/generations"
        body = {"model": "gpt-image-2", "prompt": "a red fox"}
        response = await http.post(url, json=body, headers={"api-key": KEY})
    assert response.headers["x-ratelimit-reset-requests"] == "10"


async def test_the_limits_can_be_kept_quiet(clock: FakeClock, http: httpx.AsyncClient) -> None:
    made = config(group=LimitsConfig(images_per_minute=1), rate_limit_headers=False)
    async with serving(clock, made) as provider:
        responses = [await generate(http, provider) for _ in range(2)]
    assert not any(name.startswith("x-ratelimit") for response in responses for name in response.headers)
    assert responses[1].headers["retry-after"] == "60"


async def test_a_call_beyond_a_limit_is_told_when_to_come_again_and_is_admitted_then(
    clock: FakeClock, http: httpx.AsyncClient
) -> None:
    async with serving(clock, config(group=LimitsConfig(images_per_minute=5))) as provider:
        for _ in range(5):
            assert (await generate(http, provider)).is_success
        limited = await generate(http, provider)
        assert error_of(limited) == (429, "images", "rate_limit_exceeded")
        assert limited.headers["retry-after"] == "12"
        assert limited.headers["x-ratelimit-remaining-images"] == "0"
        clock.advance(11.9)
        again = await generate(http, provider)
        assert (again.status_code, again.headers["retry-after"]) == (429, "1")
        clock.advance(0.2)
        assert (await generate(http, provider)).is_success
        summary = provider.summary()
    assert (summary.limited, summary.by_status, summary.images) == (2, {200: 6, 429: 2}, 6)
    assert summary.billed_microusd == 6 * LOW_MICROUSD


async def test_a_quantised_limit_refuses_while_the_headers_still_show_plenty(
    clock: FakeClock, http: httpx.AsyncClient
) -> None:
    limits = LimitsConfig(images_per_minute=60, enforced="quantised")
    async with serving(clock, config(group=limits)) as provider:
        assert [(await generate(http, provider)).status_code for _ in range(2)] == [200, 200]
        refused = await generate(http, provider)
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-remaining-images"] == "58"


async def test_foreign_traffic_shows_in_the_headers_and_leaves_less(clock: FakeClock, http: httpx.AsyncClient) -> None:
    async with serving(clock, config(group=LimitsConfig(images_per_minute=60, foreign_share=3.0))) as provider:
        assert (await generate(http, provider)).headers["x-ratelimit-remaining-images"] == "59"
        clock.advance(60)
        crowded = await generate(http, provider)
        assert int(crowded.headers["x-ratelimit-remaining-images"]) < 3
        assert provider.foreign_taken(GROUP)["images"] == pytest.approx(119, abs=3)


async def test_keys_of_one_group_share_its_limit_and_other_groups_do_not(
    clock: FakeClock, http: httpx.AsyncClient
) -> None:
    keys = tuple(KeyConfig(key=key, group=key[0]) for key in ("a1", "a2", "b1"))
    limits = {"a": LimitsConfig(images_per_minute=1), "b": LimitsConfig(images_per_minute=1)}
    async with serving(clock, config(keys=keys, groups=limits)) as provider:
        assert [(await generate(http, provider, key)).status_code for key in ("a1", "a2", "b1")] == [200, 429, 200]


async def test_a_limit_that_changes_counts_from_the_next_call_on(clock: FakeClock, http: httpx.AsyncClient) -> None:
    async with serving(clock, config(group=LimitsConfig(images_per_minute=100))) as provider:
        provider.set_limit(GROUP, "images", 1)
        assert [(await generate(http, provider)).status_code for _ in range(2)] == [200, 429]
        provider.set_limit(GROUP, "images", None)
        provider.set_limit(KEY, "requests", 1)
        assert [(await generate(http, provider)).status_code for _ in range(2)] == [200, 429]
        with pytest.raises(ValueError, match="no key or group 'org-9'"):
            provider.set_limit("org-9", "images", 1)


async def test_no_more_calls_run_at_a_time_than_the_cap(clock: FakeClock, http: httpx.AsyncClient) -> None:
    async with serving(clock, config(group=LimitsConfig(concurrent=2))) as provider:
        provider.hold()
        running = [asyncio.create_task(generate(http, provider)) for _ in range(2)]
        await until(lambda: provider.running == 2)
        refused = await generate(http, provider)
        assert error_of(refused) == (429, "requests", "rate_limit_exceeded")
        provider.release()
        assert [response.status_code for response in await asyncio.gather(*running)] == [200, 200]
        assert (await generate(http, provider)).is_success
        assert (provider.running, provider.most_running) == (0, 2)


# Time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.012, "12ms"), (0.9996, "1s"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s"), (3661.25, "1h1m1.25s")],
)
def test_a_duration_is_written_as_go_writes_it(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


async def test_a_generation_takes_its_latency_times_the_qualitys_factor(
    clock: FakeClock, http: httpx.AsyncClient
) -> None:
    async with serving(clock, config(latency=Latency(mean_s=10))) as provider:
        for quality, seconds in (("low", 3.5), ("medium", 10.0), ("high", 25.0)):
            task = asyncio.create_task(generate(http, provider, quality=quality))
            await until(lambda: clock.sleepers == 1)
            clock.advance(seconds - 0.01)
            assert clock.sleepers == 1
            clock.advance(0.02)
            assert (await task).is_success
    assert [round(call.ended_s - call.at_s, 6) for call in provider.calls()] == [3.51, 10.01, 25.01]


async def test_a_key_can_become_slower_than_the_others(clock: FakeClock, http: httpx.AsyncClient) -> None:
    keys = (KeyConfig(key="sk-1", group="a"), KeyConfig(key="sk-2", group="a", latency=Latency(mean_s=30)))
    async with serving(clock, config(keys=keys)) as provider:
        assert (await generate(http, provider, "sk-1")).is_success
        provider.set_latency("sk-1", Latency(mean_s=60))
        tasks = [asyncio.create_task(generate(http, provider, key, quality="medium")) for key in ("sk-1", "sk-2")]
        await until(lambda: clock.sleepers == 2)
        clock.advance(31)
        assert (await tasks[1]).is_success
        assert not tasks[0].done()
        clock.advance(30)
        assert (await tasks[0]).is_success


@pytest.mark.parametrize("spread", ["uniform", "lognormal"])
def test_latencies_have_the_mean_asked_for(spread: str) -> None:
    latency = Latency.model_validate({"spread": spread, "mean_s": 20, "sigma": 0.5})
    random = seeded()
    drawn = [latency.draw_s("medium", random) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(20, rel=0.02)
    assert spread != "uniform" or all(10 <= each <= 30 for each in drawn)
    assert max(drawn) > min(drawn)


async def test_compressed_all_runs_faster_in_real_time_and_the_schedule_stays(
    clock: FakeClock, http: httpx.AsyncClient
) -> None:
    made = config(group=LimitsConfig(images_per_minute=5), latency=Latency(mean_s=60), compression=60.0)
    async with serving(clock, made) as provider:
        tasks = [asyncio.create_task(generate(http, provider, quality="medium")) for _ in range(5)]
        await until(lambda: clock.sleepers == 5)
        limited = await generate(http, provider)
        # A caller on a real clock: 12 emulated seconds are 0.2 of its own, 5 a minute are 300 of its minutes.
        assert limited.headers["retry-after"] == "0.200"
        assert limited.headers["x-ratelimit-limit-images"] == "300"
        assert limited.headers["x-ratelimit-reset-images"] == "1.000"
        clock.advance(1.0)
        await asyncio.gather(*tasks)
        assert provider.now_s == pytest.approx(60)
        assert {round(call.ended_s - call.at_s) for call in provider.calls() if call.images} == {60}
        assert images_per_interval(provider.calls(), 30) == [0, 0, 5]


async def test_a_caller_whose_clock_runs_as_fast_is_told_emulated_seconds(
    clock: FakeClock, http: httpx.AsyncClient
) -> None:
    made = config(group=LimitsConfig(images_per_minute=5), compression=60.0, told_in="emulated")
    async with serving(clock, made) as provider:
        responses = [await generate(http, provider) for _ in range(6)]
    assert responses[5].headers["retry-after"] == "12"
    assert responses[5].headers["x-ratelimit-limit-images"] == "5"


# Faults


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.RATE_LIMITED, (429, "images", "rate_limit_exceeded")),
        (Fault.SLOW_DOWN, (429, "rate_limit_error", "slow_down")),
        (Fault.INSUFFICIENT_QUOTA, (429, "insufficient_quota", "insufficient_quota")),
        (Fault.CREDIT_BALANCE_EXHAUSTED, (429, "insufficient_quota", "credit_balance_exhausted")),
        (Fault.NOT_ENTITLED, (403, "invalid_request_error", None)),
        (Fault.OVERLOADED, (503, "service_unavailable_error", "server_is_overloaded")),
        (Fault.SERVER_ERROR, (500, "server_error", "server_error")),
        (Fault.MODERATION_BLOCKED, (400, "image_generation_user_error", "moderation_blocked")),
        (Fault.MODERATION_BLOCKED_OUTPUT, (400, "image_generation_user_error", "moderation_blocked")),
    ],
)
async def test_a_fault_that_is_an_error_has_the_documented_body_and_is_not_billed(
    provider: Provider, http: httpx.AsyncClient, fault: Fault, expected: tuple[int, str, str | None]
) -> None:
    provider.fail_next(KEY, fault)
    assert error_of(await generate(http, provider)) == expected
    assert (await generate(http, provider)).is_success
    struck, _ = provider.calls()
    assert (struck.fault, struck.status, struck.billed_microusd, struck.images) == (fault, expected[0], 0, 0)
    assert struck.limited == (expected[2] in {"rate_limit_exceeded", "slow_down"})


async def test_a_blocked_call_says_at_which_stage(provider: Provider, http: httpx.AsyncClient) -> None:
    for fault, stage in ((Fault.MODERATION_BLOCKED, "input"), (Fault.MODERATION_BLOCKED_OUTPUT, "output")):
        provider.fail_next(KEY, fault)
        details = (await generate(http, provider)).json()["error"]["moderation_details"]
        assert details["moderation_stage"] == stage
        assert details["categories"]


async def test_a_prompt_with_the_refusal_marker_is_blocked(clock: FakeClock, http: httpx.AsyncClient) -> None:
    async with serving(clock, config(refusal_marker="FORBIDDEN")) as provider:
        refused = await generate(http, provider, prompt="a FORBIDDEN fox")
        assert error_of(refused) == (400, "image_generation_user_error", "moderation_blocked")
        assert (await generate(http, provider)).is_success


async def test_a_limiting_fault_tells_the_wait_it_was_given(provider: Provider, http: httpx.AsyncClient) -> None:
    provider.fail_next(KEY, "rate_limited", retry_after_s=7.2)
    assert (await generate(http, provider)).headers["retry-after"] == "8"
    provider.fail_next(KEY, "insufficient_quota")
    assert "retry-after" not in (await generate(http, provider)).headers


@pytest.mark.parametrize("billed", [True, False])
async def test_a_front_answers_with_a_page_billed_or_not(
    provider: Provider, http: httpx.AsyncClient, *, billed: bool
) -> None:
    provider.fail_next(KEY, Fault.HTML_ERROR, billed=billed)
    response = await generate(http, provider)
    assert (response.status_code, response.headers["content-type"]) == (502, "text/html")
    assert response.text.startswith("<html>")
    assert provider.bill_microusd == (LOW_MICROUSD if billed else 0)


async def test_a_reset_before_anything_is_done_is_neither_billed_nor_counted_by_a_limit(
    clock: FakeClock, http: httpx.AsyncClient
) -> None:
    async with serving(clock, config(group=LimitsConfig(images_per_minute=1))) as provider:
        provider.fail_next(KEY, Fault.RESET_BEFORE)
        with pytest.raises(httpx.ReadError):
            await generate(http, provider)
        (call,) = provider.calls()
        assert (call.status, call.billed_microusd, call.started_s) == (0, 0, None)
        assert (await generate(http, provider)).is_success


async def test_a_reset_in_the_middle_of_the_body_is_billed(provider: Provider, http: httpx.AsyncClient) -> None:
    provider.fail_next(KEY, Fault.RESET_MID_BODY)
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
        await generate(http, provider)
    (call,) = provider.calls()
    assert (call.status, call.billed_microusd, call.images) == (0, LOW_MICROUSD, 0)


@pytest.mark.parametrize("billed", [True, False])
async def test_a_hanging_call_is_never_answered(provider: Provider, http: httpx.AsyncClient, *, billed: bool) -> None:
    provider.fail_next(KEY, Fault.HANG, billed=billed)
    task = asyncio.create_task(generate(http, provider))
    await until(lambda: bool(provider.calls()))
    (call,) = provider.calls()
    assert (call.status, call.fault, call.billed_microusd) == (0, "hang", LOW_MICROUSD if billed else 0)
    assert (await generate(http, provider)).is_success
    assert not task.done()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_base64_can_be_cut_off(provider: Provider, http: httpx.AsyncClient) -> None:
    provider.fail_next(KEY, Fault.TRUNCATED_BASE64)
    text = (await generate(http, provider)).json()["data"][0]["b64_json"]
    with pytest.raises(ValueError, match="base64"):
        base64.b64decode(text, validate=True)
    assert provider.bill_microusd == LOW_MICROUSD


async def test_a_picture_can_be_cut_off(provider: Provider, http: httpx.AsyncClient) -> None:
    provider.fail_next(KEY, Fault.TRUNCATED_IMAGE)
    response = await generate(http, provider, size="1024x1024")
    with pytest.raises((OSError, SyntaxError)):
        picture_of(response)
    assert provider.bill_microusd == LOW_MICROUSD


async def test_a_picture_can_be_of_the_wrong_type_or_size_or_of_one_colour(
    provider: Provider, http: httpx.AsyncClient
) -> None:
    for fault in (Fault.WRONG_TYPE, Fault.WRONG_SIZE, Fault.BLANK):
        provider.fail_next(KEY, fault)
    wrong_type, wrong_size, blank = [await generate(http, provider, size="1024x1024") for _ in range(3)]
    assert (picture_of(wrong_type).format, wrong_type.json()["output_format"]) == ("GIF", "png")
    assert (picture_of(wrong_size).size, wrong_size.json()["size"]) == ((512, 512), "1024x1024")
    assert picture_of(blank).getcolors() == [(1024 * 1024, (127, 127, 127))]
    assert provider.bill_microusd == 3 * LOW_MICROUSD


async def test_urls_can_be_answered_and_the_files_are_served(provider: Provider, http: httpx.AsyncClient) -> None:
    provider.fail_next(KEY, Fault.URL_RESULTS)
    items = (await generate(http, provider, n=2, output_format="jpeg")).json()["data"]
    files = [await http.get(item["url"]) for item in items]
    assert [file.headers["content-type"] for file in files] == ["image/jpeg"] * 2
    assert files[0].content != files[1].content
    assert Image.open(io.BytesIO(files[0].content)).format == "JPEG"
    assert (await http.get(f"{items[0]['url']}.gone")).status_code == 404


async def test_faults_strike_the_next_calls_of_their_key_in_order(clock: FakeClock, http: httpx.AsyncClient) -> None:
    keys = (KeyConfig(key="sk-1", group="a"), KeyConfig(key="sk-2", group="b"))
    async with serving(clock, config(keys=keys, groups={})) as provider:
        provider.fail_next("sk-1", "500", times=2)
        provider.fail_next("sk-1", "503")
        assert (await generate(http, provider, "sk-2")).is_success
        assert [(await generate(http, provider, "sk-1")).status_code for _ in range(4)] == [500, 500, 503, 200]
        provider.fail_next(None, "503")
        assert [(await generate(http, provider, key)).status_code for key in ("sk-2", "sk-1")] == [503, 200]


async def test_a_fault_waits_for_a_call_that_is_admitted(clock: FakeClock, http: httpx.AsyncClient) -> None:
    async with serving(clock, config(group=LimitsConfig(images_per_minute=1))) as provider:
        assert (await generate(http, provider)).is_success
        provider.fail_next(KEY, Fault.SERVER_ERROR)
        assert (await generate(http, provider)).status_code == 429
        clock.advance(60)
        assert (await generate(http, provider)).status_code == 500


async def test_faults_strike_by_chance_as_often_as_they_should(clock: FakeClock, http: httpx.AsyncClient) -> None:
    rates = {Fault.SERVER_ERROR: 0.2, Fault.OVERLOADED: 0.1}
    made = config(keys=(KeyConfig(key=KEY, group=GROUP, fault_rates=rates),), seed=3)
    async with serving(clock, made) as provider:
        for _ in range(150):
            await generate(http, provider)
        by_status = provider.summary().by_status
        assert by_status[503] == pytest.approx(15, abs=8)
        assert by_status[500] == pytest.approx(27, abs=12)
        provider.set_fault_rate(KEY, "500", 0.0)
        provider.set_fault_rate(KEY, "503", 0.0)
        assert all([(await generate(http, provider)).is_success for _ in range(20)])


def test_what_strikes_before_anything_is_done_cannot_be_billed(clock: FakeClock) -> None:
    provider = Provider(config(), clock=clock)
    for fault in Fault:
        if fault.is_early:
            with pytest.raises(ValueError, match="before anything is done"):
                provider.fail_next(KEY, fault, billed=True)
    with pytest.raises(ValueError, match="no key 'sk-9'"):
        provider.fail_next("sk-9", "500")
    with pytest.raises(ValueError, match="lightning"):
        provider.fail_next(KEY, "lightning")


# Calls under way


async def test_calls_wait_while_they_are_held(provider: Provider, http: httpx.AsyncClient) -> None:
    provider.hold()
    tasks = [asyncio.create_task(generate(http, provider)) for _ in range(3)]
    await provider.arrived(3)
    await until(lambda: provider.running == 3)
    assert provider.calls() == []
    provider.release()
    assert all(response.is_success for response in await asyncio.gather(*tasks))


async def test_a_caller_that_hangs_up_is_billed_all_the_same(provider: Provider, http: httpx.AsyncClient) -> None:
    provider.hold()
    task = asyncio.create_task(generate(http, provider))
    await until(lambda: provider.running == 1)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await http.aclose()
    assert await _hung_up(provider)


async def _hung_up(provider: Provider) -> bool:
    """Whether the call that runs is booked as one whose caller has gone."""
    # The server has seen the end of the first connection once it answers on a second.
    async with plain_http() as other:
        await other.get(f"{provider.base_url}/nowhere")
    provider.release()
    await until(lambda: bool(provider.calls()))
    (call,) = provider.calls()
    return call.hung_up and call.billed_microusd == LOW_MICROUSD


async def test_a_connection_carries_one_call_after_another(provider: Provider) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", provider.port)
    body = json.dumps({"model": "gpt-image-2", "prompt": "a red fox"}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write((head.encode() + body) * 2)
    for _ in range(2):
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        size_bytes = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert len(json.loads(await reader.readexactly(size_bytes))["data"]) == 1
    writer.close()
    await writer.wait_closed()


# The ledger


def call_of(**fields: Any) -> Call:
    known = {"request_id": "r", "key": KEY, "prompt_sha256": "p", "model": "m", "size": "s", "quality": "q", "n": 1}
    known |= {"status": 200, "fault": "", "limited": False, "images": 1, "billed_microusd": 5, "hung_up": False}
    return Call(**{**known, "at_s": 0.0, "started_s": 0.0, "ended_s": 1.0, **fields})


def test_a_summary_tells_prompts_that_were_billed_again() -> None:
    unbilled = {"status": 429, "images": 0, "billed_microusd": 0, "limited": True}
    calls = [call_of(), call_of(), call_of(prompt_sha256="other"), call_of(prompt_sha256="third", **unbilled)]
    summary = Summary.of(calls)
    assert (summary.calls, summary.billed_calls, summary.distinct_prompts_billed, summary.duplicates) == (4, 3, 2, 1)
    assert (summary.images, summary.billed_microusd, summary.limited) == (3, 15, 1)


def test_pictures_are_counted_by_interval() -> None:
    calls = [call_of(ended_s=0.5, images=2), call_of(ended_s=9.9), call_of(ended_s=20.0), call_of(ended_s=50, images=0)]
    assert images_per_interval(calls, 10) == [3, 0, 1]
    assert images_per_interval([], 10) == []


async def test_the_ledger_is_asked_from_a_moment_on(
    clock: FakeClock, provider: Provider, http: httpx.AsyncClient
) -> None:
    await generate(http, provider)
    clock.advance(10)
    provider.fail_next(KEY, "500")
    await generate(http, provider)
    assert provider.summary(since_s=5).by_status == {500: 1}
    assert provider.summary().by_status == {200: 1, 500: 1}
    response = await http.get(f"{provider.root_url}/_control/ledger?since=5")
    assert [call["status"] for call in response.json()] == [500]


async def test_the_ledger_holds_no_prompt(provider: Provider, http: httpx.AsyncClient) -> None:
    await generate(http, provider, prompt="a very private prompt")
    assert "private" not in (await http.get(f"{provider.root_url}/_control/ledger")).text


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    assert read_ledger(file) == []
    file.write_text('{"request_id": "r')
    assert read_ledger(file) == []


# In a process of its own


async def test_it_is_controlled_by_http(provider: Provider, http: httpx.AsyncClient) -> None:
    control = f"{provider.root_url}/_control"
    assert (await http.post(f"{control}/fault", json={"key": KEY, "fault": "500", "times": 1})).is_success
    assert (await generate(http, provider)).status_code == 500
    assert (await http.post(f"{control}/fault", json={"key": KEY, "fault": "503", "probability": 1})).is_success
    assert (await generate(http, provider)).status_code == 503
    assert (await http.post(f"{control}/fault", json={"key": KEY, "fault": "503", "probability": 0})).is_success
    assert (await http.post(f"{control}/limit", json={"owner": GROUP, "kind": "images", "per_minute": 1})).is_success
    assert [(await generate(http, provider)).status_code for _ in range(2)] == [200, 429]
    summary = (await http.get(f"{control}/summary")).json()
    assert summary["by_status"] == {"500": 1, "503": 1, "200": 1, "429": 1}
    assert (await http.get(f"{control}/state")).json()["arrivals"] == 4
    wrong = {"key": "sk-9", "fault": "500"}
    assert (await http.post(f"{control}/fault", json=wrong)).status_code == 400
    assert (await http.post(f"{control}/limit", json={})).status_code == 400
    assert (await http.get(f"{control}/nothing")).status_code == 404


async def test_killed_it_still_tells_its_bill_and_comes_back_on_its_port(
    tmp_path: Path, http: httpx.AsyncClient
) -> None:
    async with ProviderProcess(config(), tmp_path) as process:
        port = process.port
        assert (await generate(http, process)).is_success
        await process.fail_next(KEY, Fault.HANG, billed=True)
        hanging = asyncio.create_task(generate(http, process))
        await until(lambda: _booked(process, 2))
        await process.kill()
        with pytest.raises(httpx.TransportError):
            await hanging
        before = await process.summary()
        assert (before.calls, before.billed_microusd) == (2, 2 * LOW_MICROUSD)
        await process.start()
        assert process.port == port
        await process.set_limit(GROUP, "images", 1)
        assert [(await generate(http, process)).status_code for _ in range(2)] == [200, 429]
        calls = await process.calls()
        assert [call.ended_s for call in calls] == sorted(call.ended_s for call in calls)
        await process.set_fault_rate(KEY, "503", 1.0)
        await process.set_latency(KEY, Latency(mean_s=1))
        assert (await generate(http, process)).status_code == 503
        assert (await process.state())["arrivals"] == 3
        with pytest.raises(ValueError, match="no key"):
            await process.fail_next("sk-9", "500")
    assert (await process.summary()).by_status == {200: 2, 0: 1, 429: 1, 503: 1}


async def _booked(process: ProviderProcess, calls: int) -> bool:
    return len(await process.calls()) == calls


async def test_one_that_cannot_start_says_why(provider: Provider, tmp_path: Path) -> None:
    process = ProviderProcess(config(), tmp_path, port=provider.port)
    with pytest.raises(RuntimeError, match="in use"):
        await process.start()


async def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    async with ProviderProcess(config(), tmp_path) as process:
        running = process._process
        assert running is not None
        assert running.stdin is not None
        running.stdin.close()
        assert await running.wait() == 0


def test_a_configuration_survives_json_and_mistakes_in_it_are_told() -> None:
    made = config(group=LimitsConfig(images_per_minute=5), models={"m": Price()}, moderation_marker="x")
    assert ProviderConfig.model_validate_json(made.model_dump_json()) == made
    for wrong in ({"keys": (KeyConfig(key="a", group="a"),)}, {"auto_size": "big"}, {"color": 1}, {"compression": 0}):
        with pytest.raises(ValidationError):
            config(**wrong)


# Edits and streams


async def edit(
    http: httpx.AsyncClient, provider: Provider, *images: tuple[str, bytes], **fields: str
) -> httpx.Response:
    files = [(name, ("a.png", data, "image/png")) for name, data in images]
    said = {"model": "gpt-image-2", "prompt": "a red fox", "quality": "low", **fields}
    headers = {"authorization": f"Bearer {KEY}"}
    return await http.post(f"{provider.base_url}/images/edits", data=said, files=files, headers=headers)


async def test_an_edit_is_billed_with_its_input_images(provider: Provider, http: httpx.AsyncClient) -> None:
    response = await edit(http, provider, ("image[]", b"one"), ("image[]", b"two"), ("mask", b"three"), n="2")
    assert len(response.json()["data"]) == 2
    usage = response.json()["usage"]
    assert usage["input_tokens_details"] == {"text_tokens": 3, "image_tokens": 3 * 2 * 1_024}
    assert provider.bill_microusd == 3 * 5 + 6 * 1_024 * 8 + usage["output_tokens"] * 30


@pytest.mark.parametrize(
    ("images", "fields", "code"),
    [
        ([], {}, None),  # no form at all without a file
        ([("mask", b"x")], {}, "missing_required_parameter"),
        ([("image", b"x"), ("other", b"x")], {}, "unknown_parameter"),
        ([("image", b"x")], {"n": "eleven"}, "invalid_value"),
        ([("image", b"x")], {"steps": "3"}, "unknown_parameter"),
        ([("image", b"x")], {"prompt": ""}, "invalid_value"),
    ],
)
async def test_an_edit_that_the_real_api_refuses_is_refused(
    provider: Provider,
    http: httpx.AsyncClient,
    images: list[tuple[str, bytes]],
    fields: dict[str, str],
    code: str | None,
) -> None:
    assert error_of(await edit(http, provider, *images, **fields)) == (400, "invalid_request_error", code)
    assert provider.bill_microusd == 0


@pytest.mark.parametrize("image_format", ["png", "webp"])
async def test_our_adapter_reads_its_streams_and_books_its_bills(provider: Provider, image_format: str) -> None:
    endpoint = Endpoint(
        name="main", base_url=provider.base_url, api_key=lambda: KEY, models={"gpt-image-2": "gpt-image-2"}
    )
    upstream = OpenAIUpstream(endpoint, prices=PriceTable.load(), clock=SystemClock())
    fox = small_image(1)
    image = InputImage(InputRole.IMAGE, hashlib.sha256(fox).hexdigest(), "image/png", fox)
    request = ImageRequest("a red fox", "gpt-image-2", quality="low", output_format=image_format, inputs=(image,))
    seen: list[PartialImage] = []
    [edited] = await upstream.generate(request, [0], partial_images=3, on_partial=seen.append)
    [generated] = await upstream.generate(replace(request, inputs=()), [0], partial_images=1, on_partial=seen.append)
    await upstream.aclose()
    assert [partial.index for partial in seen] == [0, 1, 2, 0]
    assert [call.billed_microusd for call in provider.calls()] == [edited.paid_microusd, generated.paid_microusd]
    assert edited.paid_microusd - generated.paid_microusd == 1_024 * 8 + 2 * 100 * 30


async def test_a_stream_that_is_cut_has_cost_nobody_knows_what(provider: Provider) -> None:
    endpoint = Endpoint(
        name="main", base_url=provider.base_url, api_key=lambda: KEY, models={"gpt-image-2": "gpt-image-2"}
    )
    upstream = OpenAIUpstream(endpoint, prices=PriceTable.load(), clock=SystemClock())
    provider.fail_next(KEY, Fault.RESET_MID_BODY)
    request = ImageRequest("a red fox", "gpt-image-2", quality="low")
    with pytest.raises(UpstreamDownError) as caught:
        await upstream.generate(request, [0], partial_images=1, on_partial=lambda _: None)
    await upstream.aclose()
    assert caught.value.cost_microusd is None
    assert provider.bill_microusd > 0
