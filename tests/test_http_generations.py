"""Pictures over OpenAI's API: a plain HTTP client against the front and a whole cache behind it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from cacheserver.accounting.reading import Query
from cacheserver.errors import PromptRefusedError, UpstreamLimitedError
from cacheserver.model import Budget, BudgetPeriod, BudgetScope, Caller, Namespace, Permission, Priority, Usage
from tests.house import MODEL, House
from tests.http_front import HttpFront, error_of, open_http_front, pictures_of

TOKEN = "sk-a-caller"
DIGEST = hashlib.sha256(TOKEN.encode()).digest()
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def front(house: House) -> AsyncIterator[HttpFront]:
    async with open_http_front(house) as front:
        yield front


# ── the answer ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_picture_is_made_once_and_then_answered_with_the_same_bytes(front: HttpFront) -> None:
    made = await front.generate(size="1024x1024", quality="high")
    again = await front.generate(size="1024x1024", quality="high")
    assert pictures_of(made) == pictures_of(again)
    assert made.content == again.content
    assert front.house.upstream.calls == 1
    assert "fwd=uri-miss" in made.headers["cache-status"]
    assert again.headers["cache-status"].startswith("cacheserver; hit; detail=memory")


async def test_an_answer_says_what_the_picture_is(front: HttpFront) -> None:
    answer = (await front.generate(quality="high", safety_identifier="user-7")).json()
    assert answer["created"] == int(front.house.clock.now_s())
    assert (answer["output_format"], answer["quality"], answer["safety_identifier"]) == ("png", "high", "user-7")
    assert "auto" not in answer.values()
    assert answer["size"].count("x") == 1


async def test_headers_tell_of_the_cache_the_money_and_the_keys(front: HttpFront) -> None:
    made = await front.generate(quality="high")
    front.house.clock.advance(90)
    again = await front.generate(quality="high")
    [data] = pictures_of(again)
    assert made.headers["x-cacheserver-cost-usd"] == again.headers["x-cacheserver-saved-usd"] != "0.000000"
    assert again.headers["x-cacheserver-cost-usd"] == made.headers["x-cacheserver-saved-usd"] == "0.000000"
    assert again.headers["etag"] == f'W/"{hashlib.sha256(data).hexdigest()}"'
    assert again.headers["age"] == "90"
    assert "age" not in made.headers
    assert again.headers["cache-control"] == "private"
    assert again.headers["x-cacheserver-keys"] == front.house.identity(quality="high")[1].key.name
    assert again.headers["openai-version"] == "2020-10-01"
    assert int(again.headers["openai-processing-ms"]) >= 0


async def test_usage_is_that_of_all_pictures_and_the_same_on_a_hit(front: HttpFront) -> None:
    front.house.upstream.usage = Usage(10, 8, 2, 196, 206)
    made = (await front.generate(n=2)).json()
    again = (await front.generate(n=2)).json()
    assert made["usage"] == again["usage"]
    assert made["usage"] == {
        "total_tokens": 412,
        "input_tokens": 20,
        "output_tokens": 392,
        "input_tokens_details": {"text_tokens": 16, "image_tokens": 4},
        "output_tokens_details": {"image_tokens": 392, "text_tokens": 0},
    }


async def test_several_pictures_are_different_and_stay_so(front: HttpFront) -> None:
    first, again = await front.generate(n=2), await front.generate(n=2)
    assert len({*pictures_of(first)}) == 2
    assert pictures_of(again) == pictures_of(first)
    assert len({*pictures_of(await front.generate(n=3))}) == 3
    assert len(front.house.upstream.variants) == 3


async def test_a_large_picture_arrives_whole(front: HttpFront) -> None:
    front.house.upstream.min_image_bytes = 3_000_001
    made = await front.generate(n=2)
    assert [len(each) for each in pictures_of(made)] == [len(each) for each in pictures_of(await front.generate(n=2))]
    assert int(made.headers["content-length"]) == len(made.content)
    assert all(len(each) >= 3_000_001 for each in pictures_of(made))


async def test_urls_are_answered_where_they_are_wanted(front: HttpFront) -> None:
    [made] = (await front.generate(response_format="url")).json()["data"]
    assert made == {"url": f"{front.client.base_url}/images/{front.house.identity()[1].key.name}"}
    assert "b64_json" in (await front.generate(response_format="b64_json")).json()["data"][0]


async def test_a_dall_e_model_answers_with_urls_unless_told_otherwise(front: HttpFront) -> None:
    key = front.house.identity(quality="hd")[1].key
    await front.generate(model="dall-e-3", quality="hd")
    assert key.partition == "default"


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "param", "code", "text"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter", "Missing required parameter: 'prompt'."),
        ({"prompt": 7}, "prompt", "invalid_type", "expected a string, but got an integer instead"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value", "32,000 characters"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value", "lone surrogates"),
        ({"size": "huge"}, "size", "invalid_value", "Invalid value: 'huge'. Supported values are: 'auto', and"),
        ({"size": "a secret wish"}, "size", "invalid_value", "Invalid value of 'size'. Supported values are:"),
        ({"quality": "ultra"}, "quality", "invalid_value", "Supported values are: 'auto', 'low', 'medium', 'high',"),
        ({"output_format": "gif"}, "output_format", "invalid_value", "Supported values are: 'png', 'jpeg', and 'webp'"),
        ({"moderation": "none"}, "moderation", "invalid_value", "Supported values are: 'auto' and 'low'."),
        ({"background": "transparent", "output_format": "jpeg"}, "background", "invalid_value", "no transparency"),
        ({"output_compression": 101}, "output_compression", "invalid_value", "0 to 100"),
        ({"n": 0}, "n", "integer_below_min_value", "at least 1"),
        ({"n": 11}, "n", "integer_above_max_value", "at most 10"),
        ({"n": True}, "n", "invalid_type", "expected an integer, but got a boolean instead"),
        ({"n": "1"}, "n", "invalid_type", "expected an integer, but got a string instead"),
        ({"n": 1.0}, "n", "invalid_type", "expected an integer, but got a decimal number instead"),
        ({"stream": 1}, "stream", "invalid_type", "expected a boolean, but got an integer instead"),
        ({"partial_images": 4}, "partial_images", "integer_above_max_value", "at most 3"),
        ({"response_format": "hex"}, "response_format", "invalid_value", "'url' and 'b64_json'"),
        ({"model": ["a"]}, "model", "invalid_type", "expected a string, but got an array instead"),
        ({"model": "no model"}, "model", "invalid_value", "1 to 128 of"),
        ({"user": {}}, "user", "invalid_type", "but got an object instead"),
        ({"image": "x"}, "image", "unknown_parameter", "/v1/images/edits"),
        ({"steps": 2**60}, "steps", "invalid_value", "send larger numbers as text"),
        ({"inputs": []}, "inputs", "invalid_value", "repeats a field"),
    ],
)
async def test_a_parameter_out_of_its_range_is_named(
    front: HttpFront, fields: dict[str, object], param: str, code: str, text: str
) -> None:
    response = await front.generate(**fields)  # type: ignore[arg-type]  # prompts of any type
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert text in error["message"]
    assert "secret" not in response.text
    assert front.house.upstream.calls == 0


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b"[1]", "should be an object"),
        (b"null", "should be an object"),
        (b'{"prompt": NaN}', "NaN is no JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "a name twice"),
        (b'{"prompt": "a", "extra": {"x": 1, "x": 2}}', "a name twice"),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
        (b'{"x": ' + b"[" * 100_000, "nests too deeply"),
        (b'{"x": ' + b"1" * 5_000 + b"}", "too many digits"),
    ],
)
async def test_a_body_that_is_no_json_is_told_so(front: HttpFront, body: bytes, text: str) -> None:
    headers = {"content-type": "application/json"}
    response = await front.client.post("/v1/images/generations", content=body, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"
    assert text in error_of(response)["message"]


async def test_a_body_of_another_type_is_refused(front: HttpFront) -> None:
    response = await front.client.post("/v1/images/generations", data={"prompt": "a red fox"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_content_type")


@pytest.mark.parametrize("is_stated", [True, False])
async def test_a_body_too_large_is_refused_before_it_is_read(front: HttpFront, is_stated: bool) -> None:  # noqa: FBT001 - a case
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    content = b" " * 2_000_000 if is_stated else endless()
    headers = {"content-type": "application/json"}
    response = await front.client.post("/v1/images/generations", content=content, headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")


async def test_null_counts_as_left_out(front: HttpFront) -> None:
    first = await front.generate()
    names = ("model", "n", "size", "quality", "background", "output_format", "seed", "style", "user", "stream")
    again = await front.generate(**dict.fromkeys(names))
    assert pictures_of(again) == pictures_of(first)
    assert front.house.upstream.calls == 1


async def test_a_parameter_nobody_knows_is_part_of_the_picture(front: HttpFront) -> None:
    plain, styled = await front.generate(), await front.generate(style="vivid")
    assert pictures_of(plain) != pictures_of(styled)
    assert front.house.upstream.requests[-1].extra == {"style": "vivid"}


async def test_who_asks_is_no_part_of_the_picture(front: HttpFront) -> None:
    first = await front.generate(user="a", safety_identifier="b", response_format="b64_json")
    again = await front.generate(user="c")
    assert pictures_of(first) == pictures_of(again)
    assert "safety_identifier" not in again.json()


async def test_a_model_that_nobody_serves_is_not_found(front: HttpFront) -> None:
    response = await front.generate(model="gpt-image-99")
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")


async def test_more_pictures_than_the_namespace_keeps_are_refused(house: House) -> None:
    few = Namespace("few", "few", max_variants=2)
    async with open_http_front(house, namespaces=[few]) as front:
        response = await front.generate(n=3, headers={"x-cacheserver-namespace": "few"})
        assert (response.status_code, error_of(response)["param"]) == (400, "n")


# ── terms ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_cache_control_is_obeyed(front: HttpFront) -> None:
    missed = await front.generate(headers={"cache-control": "only-if-cached"})
    assert (missed.status_code, error_of(missed)["code"]) == (504, "not_cached")
    assert missed.headers["x-should-retry"] == "false"
    first = await front.generate()
    refreshed = await front.generate(headers={"cache-control": "no-cache"})
    assert pictures_of(refreshed) != pictures_of(first)
    assert pictures_of(await front.generate(headers={"cache-control": "only-if-cached"})) == pictures_of(refreshed)
    await front.generate(headers={"cache-control": "no-store"})
    assert pictures_of(await front.generate()) == pictures_of(refreshed)
    front.house.clock.advance(100)
    assert pictures_of(await front.generate(headers={"cache-control": "max-age=60"})) != pictures_of(refreshed)


async def test_an_idempotency_key_sent_again_is_not_paid_again(front: HttpFront) -> None:
    headers = {"cache-control": "no-cache", "idempotency-key": "order-7"}
    first = await front.generate(headers=headers)
    assert pictures_of(await front.generate(headers=headers)) == pictures_of(first)
    assert front.house.upstream.calls == 1


async def test_terms_reach_the_upstream_and_the_entry(front: HttpFront) -> None:
    headers = {
        "x-cacheserver-priority": "batch",
        "x-cacheserver-tags": "spring, hero",
        "x-cacheserver-ttl": "60",
        "x-cacheserver-variant-policy": "next",
        "x-cacheserver-match-level": "exact",
        "x-cacheserver-allow-degraded": "true",
    }
    made = await front.generate(headers=headers)
    [row] = front.house.ledger.rows.values()
    assert row.tags == ("spring", "hero")
    assert "ttl=60" in made.headers["cache-status"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-cacheserver-priority", "highest"),
        ("x-cacheserver-tags", "a b"),
        ("x-cacheserver-tags", ",".join(f"t{i}" for i in range(17))),
        ("x-cacheserver-ttl", "0"),
        ("x-cacheserver-ttl", "1e9"),
        ("x-cacheserver-candidates", "99"),
        ("x-cacheserver-match-level", "loose"),
        ("x-cacheserver-variant-policy", "any"),
        ("x-cacheserver-allow-degraded", "1"),
        ("x-cacheserver-use", "thumbnail"),
        ("idempotency-key", "k" * 129),
        ("x-cacheserver-namespace", "nowhere"),
    ],
)
async def test_a_bad_header_is_named(front: HttpFront, name: str, value: str) -> None:
    response = await front.generate(headers={name: value})
    assert (response.status_code, error_of(response)["param"]) == (400, name)
    assert value not in response.text


async def test_the_use_of_a_picture_decides_its_quality(house: House) -> None:
    house.namespace = replace(house.namespace, quality_by_use={"thumbnail": "low"})
    async with open_http_front(house) as front:
        made = await front.generate(headers={"x-cacheserver-use": "thumbnail"})
        assert made.json()["quality"] == "low"


# ── who asks ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_token_is_needed_where_there_are_callers(house: House) -> None:
    caller = Caller("shop", frozenset({Permission.READ, Permission.GENERATE}))
    async with open_http_front(house, callers=[(DIGEST, caller)], anonymous=None) as front:
        missing = await front.generate()
        assert (missing.status_code, error_of(missing)["code"]) == (401, "invalid_api_key")
        assert "Missing bearer authentication in header" in error_of(missing)["message"]
        wrong = await front.generate(headers={"authorization": "Bearer sk-wrong"})
        assert "Incorrect API key provided" in error_of(wrong)["message"]
        assert "sk-wrong" not in wrong.text
        assert wrong.headers["www-authenticate"] == "Bearer"
        assert pictures_of(await front.generate(headers=AUTHORIZED))


async def test_a_caller_of_one_namespace_need_not_name_it(house: House) -> None:
    caller = Caller("shop", frozenset({Permission.READ, Permission.GENERATE}), frozenset({"shop"}))
    shop = Namespace("shop", "shop")
    async with open_http_front(house, callers=[(DIGEST, caller)], anonymous=None, namespaces=[shop]) as front:
        made = await front.generate(headers=AUTHORIZED)
        assert made.headers["x-cacheserver-keys"].startswith("v1.shop.")
        other = await front.generate(headers={**AUTHORIZED, "x-cacheserver-namespace": "default"})
        assert (other.status_code, error_of(other)["code"]) == (403, "permission_denied")


async def test_who_may_only_read_gets_what_is_there(house: House) -> None:
    caller = Caller("reader", frozenset({Permission.READ}))
    async with open_http_front(house, callers=[(DIGEST, caller)]) as front:
        refused = await front.generate(headers=AUTHORIZED)
        assert refused.status_code == 403
        made = await house.get()
        assert pictures_of(await front.generate(headers=AUTHORIZED)) == [made.entry.image.data]


async def test_a_callers_highest_priority_holds(house: House) -> None:
    caller = Caller("night", frozenset(Permission), max_priority=Priority.BATCH)
    async with open_http_front(house, callers=[(DIGEST, caller)]) as front:
        await front.generate(headers={**AUTHORIZED, "x-cacheserver-priority": "interactive"})
        assert pictures_of(await front.generate(headers=AUTHORIZED))


# ── what fails ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_refused_prompt_is_told_as_openai_tells_it(front: HttpFront) -> None:
    front.house.upstream.failure = PromptRefusedError("The safety system refuses it.")
    response = await front.generate()
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (
        400,
        "image_generation_user_error",
        "moderation_blocked",
    )


async def test_a_budget_that_is_used_up_is_not_tried_again(house: House) -> None:
    house.restart(budget=[Budget(BudgetScope.GLOBAL, "", BudgetPeriod.DAY, 1)])
    async with open_http_front(house) as front:
        response = await front.generate()
        assert (response.status_code, error_of(response)["code"]) == (429, "insufficient_quota")
        assert response.headers["x-should-retry"] == "false"
        assert response.headers["x-cacheserver-budget"] == "global/day"


@pytest.mark.parametrize(("wait_s", "is_retried"), [(0.2, True), (60, True), (61, False)])
async def test_a_limit_says_when_to_come_back(front: HttpFront, wait_s: float, is_retried: bool) -> None:  # noqa: FBT001 - a case
    front.house.upstream.failure = UpstreamLimitedError("Too fast.", retry_after_s=wait_s)
    response = await front.generate()
    assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded")
    assert int(response.headers["retry-after"]) == max(1, round(wait_s))
    assert (response.headers.get("x-should-retry") == "false") is not is_retried


async def test_what_we_are_to_blame_for_reveals_nothing(front: HttpFront) -> None:
    front.house.upstream.failure = ZeroDivisionError("a secret of ours")
    response = await front.generate(headers={"x-request-id": "call-7"})
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "call-7" in error_of(response)["message"]
    assert "secret" not in response.text


# ── the books ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_hits_and_misses_are_counted_as_those_of_grpc(front: HttpFront) -> None:
    await front.generate(quality="high")
    await front.generate(quality="high")
    await front.generate(size="0x0")
    rows = front.house.books.stats(Query()).rows if False else front.house.books.rows()
    assert rows


async def test_a_call_can_be_looked_up_by_its_id(front: HttpFront) -> None:
    await front.generate(headers={"x-request-id": "call-7"})
    call = front.recall.find("call-7")
    assert call is not None
    assert (call.rpc, call.reason) == ("POST /v1/images/generations", "")
    assert MODEL
