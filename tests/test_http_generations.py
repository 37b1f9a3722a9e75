"""Pictures over OpenAI's API: a plain HTTP client against the front and a whole cache behind it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from importlib import resources

import pytest

from cacheserver.errors import PromptRefusedError
from cacheserver.http.openai.answers import SLICE_BYTES, base64_length, base64_slices
from cacheserver.http.openai.rates import go_duration, limit_of
from cacheserver.http.openai.routes import GENERATIONS
from cacheserver.identity import identify
from cacheserver.model import (
    Budget,
    BudgetPeriod,
    BudgetScope,
    Caller,
    GeneratedImage,
    ImageRequest,
    Namespace,
    Outcome,
    Outlook,
    Permission,
    Priority,
    RateLimit,
    StatsField,
    Usage,
)
from tests.house import EVERYTHING, House
from tests.http_front import HttpFront, error_of, open_http_front, pictures_of

TOKEN = "sk-a-caller"
DIGEST = hashlib.sha256(TOKEN.encode()).digest()
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def front(house: House) -> AsyncIterator[HttpFront]:
    async with open_http_front(house) as front:
        yield front


def draw(house: House, change: Callable[[GeneratedImage], GeneratedImage]) -> None:
    """Have the upstream make its pictures otherwise."""
    plain = house.upstream._image
    house.upstream._image = lambda request: change(plain(request))  # type: ignore[method-assign]  # a fake's own


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
    money = "x-cacheserver-cost-usd", "x-cacheserver-saved-usd"
    assert [made.headers[name] for name in money] == ["0.053000", "0.000000"]
    assert [again.headers[name] for name in money] == ["0.000000", "0.211000"]
    assert again.headers["etag"] == f'W/"{hashlib.sha256(data).hexdigest()}"'
    assert again.headers["age"] == "90"
    assert "age" not in made.headers
    assert again.headers["cache-control"] == "private"
    assert again.headers["x-cacheserver-keys"] == front.house.identity(quality="high")[1].key.name
    assert again.headers["openai-version"] == "2020-10-01"
    assert int(again.headers["openai-processing-ms"]) >= 0


async def test_usage_is_that_of_all_pictures_and_the_same_on_a_hit(front: HttpFront) -> None:
    draw(front.house, lambda image: replace(image, usage=Usage(10, 8, 2, 196, 206)))
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
    assert front.house.upstream.images == 3


async def test_a_large_picture_arrives_whole(front: HttpFront) -> None:
    draw(front.house, lambda image: replace(image, data=image.data + bytes(700_000), revised_prompt="\ud800 „fox“"))
    made, again = await front.generate(n=2), await front.generate(n=2)
    assert int(made.headers["content-length"]) == len(made.content)
    assert made.content == again.content
    assert all(len(each) > 3 * SLICE_BYTES for each in pictures_of(made))
    assert [each["revised_prompt"] for each in made.json()["data"]] == ["\ud800 „fox“"] * 2


@pytest.mark.parametrize("size_bytes", [1, 2, 3, SLICE_BYTES - 1, SLICE_BYTES, SLICE_BYTES + 1, 2 * SLICE_BYTES])
def test_slices_of_base64_join_to_the_whole(size_bytes: int) -> None:
    data = bytes(range(256)) * (size_bytes // 256 + 1)
    slices = [*base64_slices(data[:size_bytes])]
    assert b"".join(slices) == base64.b64encode(data[:size_bytes])
    assert sum(map(len, slices)) == base64_length(size_bytes)


async def test_urls_are_answered_where_they_are_wanted(front: HttpFront) -> None:
    [made] = (await front.generate(response_format="url")).json()["data"]
    assert made == {"url": f"{front.client.base_url}/images/{front.house.identity()[1].key.name}"}
    assert "b64_json" in (await front.generate(response_format="b64_json")).json()["data"][0]


async def test_a_dall_e_model_answers_with_urls_unless_told_otherwise(house: House) -> None:
    async with open_http_front(house, namespaces=[Namespace("old", "old", default_model="dall-e-3")]) as front:
        headers = {"x-cacheserver-namespace": "old"}
        request = ImageRequest("a red fox", model="dall-e-3")
        entry = (await house.get()).entry
        await house.cache.put(
            entry.image, identify(request, Namespace("old", "old")), namespace=Namespace("old", "old")
        )
        assert (await front.generate(headers=headers)).json()["data"][0].keys() == {"url"}
        answered = await front.generate(headers=headers, response_format="b64_json")
        assert pictures_of(answered) == [entry.image.data]


async def test_nothing_is_paid_for_a_url_that_would_lead_nowhere(front: HttpFront) -> None:
    response = await front.generate(headers={"cache-control": "no-store"}, response_format="url")
    assert (response.status_code, error_of(response)["param"]) == (400, "response_format")
    assert front.house.upstream.calls == 0


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_parameter_out_of_its_range_is_named(front: HttpFront) -> None:
    response = await front.generate(size="a secret wish")
    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == ("size", "invalid_value")
    assert response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text


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
    assert [request.extra for request, _ in front.house.upstream.asked] == [{}, {"style": "vivid"}]


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
    [attempt] = front.house.ledger.attempts.values()
    assert attempt.tags == ("spring", "hero")
    assert "ttl=60" in made.headers["cache-status"]


async def test_a_bad_header_is_named(front: HttpFront) -> None:
    for name, value in BAD_HEADERS:
        response = await front.generate(headers={name: value})
        assert (response.status_code, error_of(response)["param"]) == (400, name)
        assert front.house.upstream.calls == 0


BAD_HEADERS = [
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
]


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


async def test_what_is_made_tells_of_the_limits_it_took_from_and_a_hit_does_not(house: House) -> None:
    async with open_http_front(house, limit=RateLimit(60, 59, 1.5)) as front:
        made, hit = await front.generate(), await front.generate()
        told = {name: value for name, value in made.headers.items() if name.startswith("x-ratelimit")}
        assert told == {
            "x-ratelimit-limit-images": "60",
            "x-ratelimit-remaining-images": "59",
            "x-ratelimit-reset-images": "1.5s",
        }
        assert not any(name.startswith("x-ratelimit") for name in hit.headers)


async def test_whatever_header_an_answer_has_is_described(house: House) -> None:
    text = resources.files("cacheserver.http").joinpath("openapi.json").read_text()
    responses = json.loads(text)["paths"][GENERATIONS]["post"]["responses"]
    described = {name.lower() for name in responses["200"]["headers"]}
    async with open_http_front(house, limit=RateLimit(60, 59, 1.5)) as front:
        for answer in (await front.generate(), await front.generate()):
            sent = {*answer.headers} - {"date", "content-type", "content-length", "cache-control"}
            assert sent <= described


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0119, "12ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"), (3_661, "1h1m1s")],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


def test_the_limit_is_that_of_the_groups_less_what_is_taken(house: House) -> None:
    request, _ = house.identity()
    assert limit_of(house.generator, lambda _: 0.0)(request) is None
    outlook = Outlook(frozenset({"a", "b"}), 60.0, 20.0)
    house.generator.outlook = lambda _: outlook  # type: ignore[method-assign]  # as if there were limits
    assert limit_of(house.generator, {"a": 30.0, "b": 45.0}.__getitem__)(request) == RateLimit(60, 30, 30.0)


# ── what fails ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_refused_prompt_is_told_as_openai_tells_it(front: HttpFront) -> None:
    front.house.upstream.fail_next(PromptRefusedError("The safety system refuses it."))
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


async def test_what_we_are_to_blame_for_reveals_nothing(front: HttpFront, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front.house.cache, "get", None)
    response = await front.generate(headers={"x-request-id": "call-7"})
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "call-7" in error_of(response)["message"]
    assert "NoneType" not in response.text


# ── the books ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_hits_and_misses_are_counted_as_those_of_grpc(front: HttpFront) -> None:
    await front.generate(quality="high")
    await front.generate(quality="high")
    await front.generate(size="0x0")
    rows = front.house.books.snapshot(None, [StatsField.OUTCOME]).rows
    counted = {row.outcome: (row.requests, row.saved_microusd) for row in rows if row.requests}
    assert counted == {Outcome.HIT: (1, 211_000), Outcome.MISS: (1, 0), Outcome.ERROR: (1, 0)}


async def test_a_call_can_be_looked_up_by_its_id(front: HttpFront) -> None:
    await front.generate(headers={"x-request-id": "call-7"})
    call = front.recall.explain("call-7", EVERYTHING)
    assert (call.rpc, call.reason, len(call.images)) == ("POST /v1/images/generations", "", 1)
    await front.generate(headers={"x-request-id": "call-8"}, n=11)
    assert front.recall.explain("call-8", EVERYTHING).reason == "INVALID_FIELD"


async def test_what_is_told_again_is_what_memory_has_now(front: HttpFront) -> None:
    house = front.house
    await front.generate()
    first, told = [(await front.generate()).content for _ in range(2)]
    again = await front.generate(headers={"cache-control": "no-cache"})
    await house.settle()
    assert first == told
    assert (await front.generate()).content == again.content != told
    house.memory.delete(house.identity()[1].key)
    assert "detail=redis" in (await front.generate()).headers["cache-status"]


async def test_what_a_picture_saves_is_asked_again_after_a_minute(front: HttpFront) -> None:
    for _ in range(3):
        before = await front.generate()
    front.house.generator.worth_microusd = lambda *_: 7  # type: ignore[method-assign]  # as if prices had changed
    told = await front.generate()
    front.house.clock.advance(61)
    after = await front.generate()
    saved = [answer.headers["x-cacheserver-saved-usd"] for answer in (before, told, after)]
    assert saved[0] == saved[1] != saved[2] == "0.000007"
    assert after.headers["age"] == "61"
