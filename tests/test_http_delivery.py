"""Pictures by URL: who may fetch them, what is told of them, how long they may be kept."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.errors import UnknownCallError, UpstreamDownError
from cacheserver.http.delivery.headers import disposition
from cacheserver.http.delivery.urls import version_of
from cacheserver.model import MAX_VARIANT, Caller, Namespace, Permission
from cacheserver.recall import Recall
from tests.delivery_front import EXPIRES_S, PRIVATE, PUBLIC, DeliveryFront, open_delivery, path_of, signed_path
from tests.house import House
from tests.provider import small_image
from tests.waiting import until

READER = Caller("reader", frozenset({Permission.READ}), frozenset({"default"}))
STRANGER = Caller("stranger", frozenset(Permission), frozenset({"elsewhere"}))
CALLERS = [(hashlib.sha256(caller.name.encode()).digest(), caller) for caller in (READER, STRANGER)]
"""Callers whose tokens are their names."""

YEAR = "max-age=31536000"


def token(caller: Caller) -> dict[str, str]:
    return {"authorization": f"Bearer {caller.name}"}


@pytest.fixture
async def public(house: House) -> AsyncIterator[DeliveryFront]:
    async with open_delivery(house, PUBLIC) as front:
        yield front


@pytest.fixture
async def private(house: House) -> AsyncIterator[DeliveryFront]:
    async with open_delivery(house, PRIVATE, callers=CALLERS) as front:
        yield front


# ── the picture and what is told of it ──────────────────────────────────────────────────────────────────────────────


async def test_a_picture_comes_as_it_is_stored(public: DeliveryFront) -> None:
    data = small_image(1)
    entry = await public.stored(data)
    answer = await public.get(path_of(entry))
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert answer.headers["cache-status"] == "cacheserver; hit; detail=memory; age=0"
    assert answer.headers["content-disposition"] == "inline"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert len(answer.headers["x-request-id"]) == 32


async def test_a_large_picture_comes_whole(public: DeliveryFront) -> None:
    data = bytes(range(256)) * 4_000
    entry = await public.stored(data)
    assert (await public.get(path_of(entry))).content == data


async def test_head_tells_what_get_tells(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    got, head = await public.get(path_of(entry)), await public.client.head(path_of(entry))
    varying = {"x-request-id", "date"}
    assert head.content == b""
    assert {n: v for n, v in head.headers.items() if n not in varying} == {
        n: v for n, v in got.headers.items() if n not in varying
    }


async def test_a_restarted_service_has_it_from_the_tiers(public: DeliveryFront, house: House) -> None:
    entry = await public.stored(small_image(1))
    house.memory.delete(entry.key)
    assert "detail=redis" in (await public.get(path_of(entry))).headers["cache-status"]


async def test_a_replaced_picture_is_not_the_one_a_tag_names(public: DeliveryFront) -> None:
    first = await public.stored(small_image(1))
    tag = (await public.get(path_of(first))).headers["etag"]
    await public.stored(small_image(2))
    again = await public.get(path_of(first), headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (200, small_image(2))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_pictures_are_read_and_nothing_else(public: DeliveryFront, method: str) -> None:
    entry = await public.stored(small_image(1))
    answer = await public.client.request(method, path_of(entry))
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


# ── how long it may be kept ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_url_with_the_version_may_be_kept_for_good(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    url, expires_s = public.urls.url(entry, base_url="https://images.example.com/")
    assert url == f"https://images.example.com{path_of(entry)}?v={version_of(entry)}"
    assert expires_s is None
    answer = await public.get(f"{path_of(entry)}?v={version_of(entry)}")
    assert answer.headers["cache-control"] == f"public, {YEAR}, immutable"


@pytest.mark.parametrize("query", ["", "?v=", "?v=0123456789abcdef0123456789abcdef", "?v=x&v=y"])
async def test_without_the_version_that_is_stored_it_has_to_be_confirmed(public: DeliveryFront, query: str) -> None:
    entry = await public.stored(small_image(1))
    assert (await public.get(path_of(entry) + query)).headers["cache-control"] == "public, no-cache"


async def test_a_304_says_anew_how_long(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    tag = {"if-none-match": f'"{entry.image.sha256}"'}
    answer = await public.get(f"{path_of(entry)}?v={version_of(entry)}", headers=tag)
    assert answer.status_code == 304
    assert answer.headers["cache-control"] == f"public, {YEAR}, immutable"
    assert answer.content == b""
    assert "content-type" not in answer.headers


async def test_a_picture_that_expires_is_kept_no_longer(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1), ttl_s=600)
    public.house.clock.advance(100)
    answer = await public.get(f"{path_of(entry)}?v={version_of(entry)}")
    assert answer.headers["cache-control"] == "public, max-age=500, immutable"
    public.house.clock.advance(500)
    assert (await public.get(path_of(entry))).status_code == 404


async def test_a_signed_url_is_kept_until_it_expires_and_by_nobody_in_between(private: DeliveryFront) -> None:
    entry = await private.stored(small_image(1))
    url, expires_s = private.urls.url(entry)
    assert expires_s is not None
    private.house.clock.advance(100)
    left_s = int(expires_s - private.house.clock.now_s())
    answer = await private.get(url)
    assert answer.headers["cache-control"] == f"private, max-age={left_s}, immutable"
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_what_a_token_fetched_is_confirmed_with_it_each_time(private: DeliveryFront) -> None:
    entry = await private.stored(small_image(1))
    answer = await private.get(f"{path_of(entry)}?v={version_of(entry)}", headers=token(READER))
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in answer.headers


async def test_errors_are_kept_by_nobody(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    for path in (f"{path_of(entry)}?w=0", "/images/nothing"):
        assert (await public.get(path)).headers["cache-control"] == "no-store"


# ── who may fetch ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_private_picture_takes_a_signature_or_a_token(private: DeliveryFront) -> None:
    entry = await private.stored(small_image(1))
    assert (await private.get(path_of(entry))).status_code == 401
    assert (await private.get(path_of(entry), headers=token(STRANGER))).status_code == 403
    assert (await private.get(path_of(entry), headers=token(READER))).content == small_image(1)
    assert (await private.get(signed_path(private, entry))).content == small_image(1)


async def test_one_private_namespace_makes_its_partition_private(house: House) -> None:
    spaces = [PUBLIC, Namespace("shop", "default")]
    async with open_delivery(house, *spaces, callers=CALLERS) as front:
        entry = await front.stored(small_image(1))
        assert (await front.get(path_of(entry))).status_code == 401
        assert "signature=" in signed_path(front, entry)


async def test_a_refusal_does_not_tell_whether_there_is_such_a_picture(private: DeliveryFront) -> None:
    entry = await private.stored(small_image(1))
    private.house.memory.delete(entry.key)
    absent = replace(entry, key=entry.key.with_variant(7))
    bad = f"?v={version_of(entry)}&expires=1900000000&signature=x"
    for headers, query in (({}, ""), (token(STRANGER), ""), ({}, bad)):
        answers = [await private.get(path_of(each) + query, headers=headers) for each in (entry, absent)]
        assert answers[0].status_code == answers[1].status_code
        assert answers[0].json() == answers[1].json()
    assert private.house.redis.gets == []


@pytest.mark.parametrize("place", ["v", "expires", "signature"])
async def test_a_signature_is_good_for_its_own_url_alone(private: DeliveryFront, place: str) -> None:
    entry = await private.stored(small_image(1))
    url = signed_path(private, entry)
    at = url.index(f"{place}=") + len(place) + 1
    changed = f"{url[:at]}{'1' if url[at] != '1' else '2'}{url[at + 1 :]}"
    answer = await private.get(changed)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "url_signature_invalid")


async def test_a_signature_is_not_good_for_another_picture(private: DeliveryFront) -> None:
    one, other = await private.stored(small_image(1)), await private.stored(small_image(2), "a blue whale")
    moved = signed_path(private, one).replace(one.key.name, other.key.name)
    assert (await private.get(moved)).status_code == 403


@pytest.mark.parametrize("expires", ["", "x", "-1", "1e12", "٣" * 10, "9" * 400])
async def test_an_expiry_that_is_none_is_refused(private: DeliveryFront, expires: str) -> None:
    entry = await private.stored(small_image(1))
    answer = await private.get(path_of(entry), params={"expires": expires, "signature": "ü"})
    assert answer.status_code == 403


async def test_an_expired_url_says_so(private: DeliveryFront) -> None:
    entry = await private.stored(small_image(1))
    url, expires_s = private.urls.url(entry)
    assert expires_s is not None
    private.house.clock.advance(expires_s - private.house.clock.now_s() - 1)
    assert (await private.get(url)).status_code == 200
    private.house.clock.advance(1)
    answer = await private.get(url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "url_expired")


async def test_a_picture_has_the_same_url_for_a_while_so_that_caches_know_it(private: DeliveryFront) -> None:
    entry = await private.stored(small_image(1))
    seen = set()
    for _ in range(EXPIRES_S // 60):
        url, expires_s = private.urls.url(entry)
        assert expires_s is not None
        assert EXPIRES_S <= expires_s - private.house.clock.now_s() <= EXPIRES_S * 1.1
        seen.add(url)
        private.house.clock.advance(60)
    assert len(seen) <= 11


async def test_a_new_secret_signs_while_urls_of_the_old_one_still_work(house: House) -> None:
    old, new = b"o" * 32, b"n" * 32
    async with open_delivery(house, PRIVATE, secrets=[old]) as before:
        entry = await before.stored(small_image(1))
        url = signed_path(before, entry)
    async with open_delivery(house, PRIVATE, secrets=[new, old]) as during:
        assert (await during.get(url)).status_code == 200
        renewed = signed_path(during, entry)
    async with open_delivery(house, PRIVATE, secrets=[new]) as after:
        assert (await after.get(url)).status_code == 403
        assert (await after.get(renewed)).status_code == 200


async def test_a_url_goes_on_when_its_picture_was_replaced_but_may_not_be_kept(private: DeliveryFront) -> None:
    url = signed_path(private, await private.stored(small_image(1)))
    await private.stored(small_image(2))
    answer = await private.get(url)
    assert answer.content == small_image(2)
    assert answer.headers["cache-control"] == "private, no-cache"


async def test_a_signed_url_of_a_partition_nobody_has_any_more_leads_nowhere(private: DeliveryFront) -> None:
    entry = await private.stored(small_image(1))
    moved = replace(entry, key=replace(entry.key, partition="gone"))
    assert (await private.get(signed_path(private, moved))).status_code == 404
    assert (await private.get(path_of(moved), headers=token(READER))).status_code == 403


async def test_pages_of_any_origin_may_show_what_the_url_gives_a_right_to(house: House) -> None:
    elsewhere = {"origin": "https://shop.example.com", "host": "images.example.com"}
    async with open_delivery(house, PUBLIC) as front:
        entry = await front.stored(small_image(1))
        assert (await front.get(path_of(entry), headers=elsewhere)).status_code == 200
    async with open_delivery(house, PRIVATE) as front:
        assert (await front.get(signed_path(front, entry), headers=elsewhere)).status_code == 200


@pytest.mark.parametrize("headers", [{"origin": "https://shop.example.com"}, {"host": "rebound.example.com"}])
async def test_without_callers_no_page_of_others_reads_private_pictures(house: House, headers: dict[str, str]) -> None:
    async with open_delivery(house, PRIVATE) as front:
        entry = await front.stored(small_image(1))
        assert (await front.get(path_of(entry))).status_code == 200
        assert (await front.get(path_of(entry), headers=headers)).status_code == 403


# ── what there is none of ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["nothing", "v2.default.00.00.0", "%00", "v1.default." + "0" * 32 + ".0.0", "a" * 900])
async def test_what_is_no_key_is_not_there(public: DeliveryFront, name: str) -> None:
    answer = await public.get(f"/images/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "key_gone")


async def test_what_lies_in_slots_of_our_own_is_not_there(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    house = public.house
    slots = [entry.key.stand_in, entry.key.in_review, entry.key.with_variant(MAX_VARIANT + 1)]
    for key in slots:
        house.memory.put(key, replace(entry, key=key))
    for key in (*slots, entry.key.with_variant(1)):
        assert (await public.get(f"/images/{key.name}")).status_code == 404


async def test_a_picture_derived_for_its_request_is_one_like_others(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    _, other = public.house.identity("a larger fox")
    public.house.memory.put(entry.key, replace(entry, derived_from=other.key.name))
    assert (await public.get(path_of(entry))).status_code == 200


async def test_a_picture_that_is_being_made_is_waited_for(public: DeliveryFront) -> None:
    house = public.house
    house.upstream.hold()
    making = asyncio.create_task(house.get())
    await house.upstream.arrived(1)
    _, identity = house.identity()
    fetching = asyncio.create_task(public.get(f"/images/{identity.key.name}"))
    await until(lambda: house.clock.sleepers > 0)
    house.upstream.release()
    assert (await fetching).content == (await making).entry.image.data
    assert house.upstream.calls == 1


async def test_one_that_takes_long_is_to_be_fetched_again(public: DeliveryFront) -> None:
    house = public.house
    house.upstream.hold()
    making = asyncio.create_task(house.get())
    await house.upstream.arrived(1)
    _, identity = house.identity()
    fetching = asyncio.create_task(public.get(f"/images/{identity.key.name}"))
    await until(lambda: house.clock.sleepers > 0)
    house.clock.advance(10)
    answer = await fetching
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "in_flight")
    assert int(answer.headers["retry-after"]) >= 1
    house.upstream.release()
    await making


async def test_one_that_could_not_be_made_is_not_there(public: DeliveryFront) -> None:
    house = public.house
    house.upstream.hold()
    house.upstream.fail_next(UpstreamDownError("down for a test"))
    making = asyncio.create_task(house.get())
    await house.upstream.arrived(1)
    _, identity = house.identity()
    fetching = asyncio.create_task(public.get(f"/images/{identity.key.name}"))
    await until(lambda: house.clock.sleepers > 0)
    house.upstream.release()
    assert (await fetching).status_code == 404
    with pytest.raises(UpstreamDownError):
        await making


async def test_a_tier_that_cannot_be_asked_is_no_absence(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    public.house.memory.delete(entry.key)
    public.house.redis.is_down = public.house.s3.is_down = True
    answer = await public.get(path_of(entry))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"


async def test_nothing_is_ever_paid_for(public: DeliveryFront) -> None:
    _, identity = public.house.identity()
    assert (await public.get(f"/images/{identity.key.name}")).status_code == 404
    assert public.house.upstream.calls == 0


# ── counted and told ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fetch_is_no_request_and_saves_nothing(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    for _ in range(3):
        await public.get(path_of(entry))
    await public.get(path_of(entry), headers={"if-none-match": "*"})
    await public.client.head(path_of(entry))
    await public.get("/images/nothing")
    await public.get(f"/images/{entry.key.with_variant(1).name}")
    total = public.house.books.snapshot(None).total
    assert (total.requests, total.saved_microusd) == (0, 0)
    sample = public.house.registry.get_sample_value
    labels = {"namespace": "default", "kind": "image"}
    assert sample("cacheserver_delivered_total", {**labels, "status": "200"}) == 4
    assert sample("cacheserver_delivered_total", {**labels, "status": "304"}) == 1
    assert sample("cacheserver_delivered_total", {**labels, "status": "404"}) == 1
    assert sample("cacheserver_delivered_total", {"namespace": "", "kind": "image", "status": "404"}) == 1
    assert sample("cacheserver_delivered_bytes_total", labels) == 3 * entry.size_bytes


async def test_a_namespace_that_is_no_longer_configured_has_no_series_of_its_own(house: House) -> None:
    async with open_delivery(house, PUBLIC) as front:
        entry = await front.stored(small_image(1))
        house.memory.put(entry.key, replace(entry, namespace="gone"))
        await front.get(path_of(entry))
    labels = {"namespace": "default", "kind": "image", "status": "200"}
    assert house.registry.get_sample_value("cacheserver_delivered_total", labels) == 1


async def test_a_fetch_by_url_is_one_log_line_and_not_remembered(house: House) -> None:
    recall = Recall()
    async with open_delivery(house, PRIVATE, callers=CALLERS, recall=recall) as front:
        entry = await front.stored(small_image(1))
        url = signed_path(front, entry)
        with structlog.testing.capture_logs() as lines:
            await front.get(url, headers={"x-request-id": "by-url"})
            await front.get(path_of(entry), headers=token(READER) | {"x-request-id": "by-token"})
    told = [(line["rpc"], line["code"], line["caller"], line["namespace"]) for line in lines if line["event"] == "call"]
    assert told == [
        ("GET /images/{key}", "OK", "url", "default"),
        ("GET /images/{key}", "OK", "reader", "default"),
    ]
    assert not any("signature" in str(line) for line in lines)
    assert recall.explain("by-token", READER).rpc == "GET /images/{key}"
    with pytest.raises(UnknownCallError):
        recall.explain("by-url", READER)


async def test_no_more_than_so_many_are_served_at_a_time(house: House) -> None:
    async with open_delivery(house, PUBLIC, max_concurrent_calls=1) as front:
        entry = await front.stored(small_image(1))
        house.memory.delete(entry.key)
        house.redis.gate.clear()
        first = asyncio.create_task(front.get(path_of(entry)))
        await until(lambda: bool(house.redis.gets))
        refused = await front.get(path_of(entry))
        house.redis.gate.set()
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert (await first).status_code == 200


# ── what the URL asks for ───────────────────────────────────────────────────────────────────────────────────────────

WRONG = ["w=0", "w=8193", "w=x", "w=", "w=-1", "w=1.5", "h=0", "h=99999999", "q=101", "q=-1", "format=gif", "strip=2"]


@pytest.mark.parametrize("query", WRONG)
async def test_a_parameter_out_of_its_range_is_named(public: DeliveryFront, query: str) -> None:
    entry = await public.stored(small_image(1))
    answer = await public.get(f"{path_of(entry)}?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


async def test_parameters_of_others_are_passed_over(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    answer = await public.get(f"{path_of(entry)}?utm_source=mail&width=7&cb=1234")
    assert answer.content == small_image(1)


async def test_a_picture_is_saved_under_the_name_that_is_asked_for(public: DeliveryFront) -> None:
    entry = await public.stored(small_image(1))
    answer = await public.get(path_of(entry), params={"download": "füchse.png"})
    told = answer.headers["content-disposition"]
    assert told == "attachment; filename=\"f_chse.png\"; filename*=UTF-8''f%C3%BCchse.png"


@pytest.mark.parametrize(
    ("wanted", "content_type", "told"),
    [
        (None, "image/png", "inline"),
        ("fox.png", "image/png", 'attachment; filename="fox.png"'),
        ("fox.JPEG", "image/jpeg", 'attachment; filename="fox.JPEG"'),
        ("fox", "image/webp", 'attachment; filename="fox.webp"'),
        ("fox.exe", "image/png", 'attachment; filename="fox.exe.png"'),
        ("../../etc/passwd", "image/png", 'attachment; filename="passwd.png"'),
        ("C:\\fox.png", "image/png", 'attachment; filename="fox.png"'),
        (".png", "image/png", 'attachment; filename="png.png"'),
        ("", "image/png", 'attachment; filename="image.png"'),
        ('a"; filename="b.png', "image/png", 'attachment; filename="a_; filename=_b.png"'),
        ("a\r\nset-cookie: x.png", "image/png", 'attachment; filename="a__set-cookie_ x.png"'),
    ],
)
def test_a_file_name_is_made_safe(wanted: str | None, content_type: str, told: str) -> None:
    assert disposition(wanted, content_type) == told


@given(st.text())
def test_any_file_name_makes_a_header_of_ascii_and_the_pictures_extension(name: str) -> None:
    told = disposition(name, "image/png")
    assert told.isascii()
    assert told.isprintable()
    plain = told.removeprefix('attachment; filename="').partition('"')[0]
    assert plain.lower().endswith(".png")
    assert "/" not in plain
    assert told.count('"') == 2
