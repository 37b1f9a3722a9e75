"""Pictures by URL in the size and format that is asked for: made from the stored one, once, and never paid for."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

import httpx
import pytest
from PIL import Image

from cacheserver.http.delivery.urls import version_of
from cacheserver.model import CachedImage
from tests.delivery_front import PRIVATE, PUBLIC, RENDITION_TTL_S, DeliveryFront, open_delivery, path_of, signed_path
from tests.house import House
from tests.provider import small_image
from tests.waiting import until

CHROME = {"accept": "image/avif,image/webp,image/apng,*/*;q=0.8"}


@pytest.fixture
async def public(house: House) -> AsyncIterator[DeliveryFront]:
    async with open_delivery(house, PUBLIC) as front:
        yield front


def shape(answer: httpx.Response) -> tuple[str | None, tuple[int, int]]:
    """Format and size of a picture that came; its content type says the same."""
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == Image.MIME[image.format or ""]
    return image.format, image.size


def delivered(house: House, kind: str, status: int) -> float | None:
    labels = {"namespace": "default", "kind": kind, "status": str(status)}
    return house.registry.get_sample_value("cacheserver_delivered_total", labels)


async def stored(front: DeliveryFront, number: int = 1) -> CachedImage:
    return await front.stored(small_image(number))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("w=32", ("PNG", (32, 24))),
        ("h=12", ("PNG", (16, 12))),
        ("w=32&h=12", ("PNG", (16, 12))),
        ("w=640", ("PNG", (64, 48))),
        ("format=webp", ("WEBP", (64, 48))),
        ("w=32&format=jpeg&q=50", ("JPEG", (32, 24))),
        ("format=auto", ("WEBP", (64, 48))),
    ],
)
async def test_it_comes_in_the_size_and_format_asked_for(
    public: DeliveryFront, query: str, expected: tuple[str, tuple[int, int]]
) -> None:
    entry = await stored(public)
    assert shape(await public.get(f"{path_of(entry)}?{query}", headers=CHROME)) == expected
    assert public.house.upstream.calls == 0


async def test_nothing_is_enlarged_and_what_is_the_same_is_the_picture_itself(public: DeliveryFront) -> None:
    entry = await stored(public)
    answer = await public.get(f"{path_of(entry)}?w=8192&format=png")
    assert answer.content == entry.image.data
    assert answer.headers["etag"] == f'"{entry.image.sha256}"'


async def test_auto_says_that_it_depends_on_accept(public: DeliveryFront) -> None:
    entry = await stored(public)
    chosen = await public.get(f"{path_of(entry)}?format=auto", headers=CHROME)
    plain = await public.get(f"{path_of(entry)}?format=auto", headers={"accept": "*/*"})
    assert (chosen.headers["content-type"], plain.headers["content-type"]) == ("image/webp", "image/png")
    assert chosen.headers["vary"] == plain.headers["vary"] == "Accept"
    tag = {"if-none-match": chosen.headers["etag"]}
    assert (await public.get(f"{path_of(entry)}?format=auto", headers=CHROME | tag)).headers["vary"] == "Accept"
    assert "vary" not in (await public.get(f"{path_of(entry)}?format=webp")).headers


async def test_it_is_made_once_and_then_kept_in_every_tier(public: DeliveryFront) -> None:
    entry = await stored(public)
    path = f"{path_of(entry)}?v={version_of(entry)}&w=32"
    made = await public.get(path)
    await public.house.settle()
    again = await public.get(path)
    assert "detail=rendered" in made.headers["cache-status"]
    assert "detail=memory" in again.headers["cache-status"]
    public.house.restart()
    async with open_delivery(public.house, PUBLIC) as restarted:
        from_redis = await restarted.get(path)
    assert "detail=redis" in from_redis.headers["cache-status"]
    assert made.content == again.content == from_redis.content
    assert made.headers["etag"] == from_redis.headers["etag"] != f'"{entry.image.sha256}"'


async def test_a_rendition_has_its_own_tag_ranges_and_304(public: DeliveryFront) -> None:
    entry = await stored(public)
    path = f"{path_of(entry)}?w=32"
    whole = await public.get(path)
    part = await public.get(path, headers={"range": "bytes=5-", "if-range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, whole.content[5:])
    same = await public.get(path, headers={"if-none-match": whole.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    assert (await public.get(path, headers={"if-none-match": f'"{entry.image.sha256}"'})).status_code == 200


async def test_of_the_version_that_is_named_it_may_be_kept_as_long_as_we_keep_it(public: DeliveryFront) -> None:
    entry = await stored(public)
    path = f"{path_of(entry)}?v={version_of(entry)}&w=32"
    told = f"public, max-age={int(RENDITION_TTL_S)}, immutable"
    for _ in range(2):
        assert (await public.get(path)).headers["cache-control"] == told
    assert (await public.get(f"{path_of(entry)}?w=32")).headers["cache-control"] == "public, no-cache"


async def test_once_the_picture_is_replaced_its_url_leads_to_the_new_one_and_may_not_be_kept(
    public: DeliveryFront,
) -> None:
    first = await stored(public)
    await stored(public, 2)
    answer = await public.get(f"{path_of(first)}?v={version_of(first)}&w=640&format=png")
    assert answer.content == small_image(2)
    assert answer.headers["cache-control"] == "public, no-cache"


async def test_whoever_may_have_a_picture_may_have_it_smaller(house: House) -> None:
    async with open_delivery(house, PRIVATE) as front:
        entry = await stored(front)
        url = signed_path(front, entry)
        assert shape(await front.get(f"{url}&w=32&format=webp")) == ("WEBP", (32, 24))
        assert (await front.get(f"{url}x&w=32")).status_code == 403


async def test_transparency_cannot_be_had_in_jpeg(public: DeliveryFront) -> None:
    file = io.BytesIO()
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 4, 4))
    picture.save(file, "PNG")
    entry = await public.stored(file.getvalue())
    answer = await public.get(f"{path_of(entry)}?format=jpeg")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "format")


async def test_a_rendition_of_what_is_not_there_is_not_there_either(public: DeliveryFront) -> None:
    _, identity = public.house.identity()
    assert (await public.get(f"/images/{identity.key.name}?w=32")).status_code == 404
    assert public.house.upstream.calls == 0


async def test_a_rendition_is_not_had_by_a_key_of_its_own(public: DeliveryFront) -> None:
    entry = await stored(public)
    await public.get(f"{path_of(entry)}?w=32")
    await public.house.settle()
    [beside] = [key for key in public.house.memory.scan("default") if key.name != entry.key.name]
    assert (await public.get(f"/images/{beside.name}")).status_code == 404
    assert (await public.get(f"/images/{beside.name}?w=16")).status_code == 404


async def test_only_the_widths_that_are_set_are_made(house: House) -> None:
    async with open_delivery(house, PUBLIC, widths=[16, 32]) as front:
        entry = await stored(front)
        assert shape(await front.get(f"{path_of(entry)}?w=16")) == ("PNG", (16, 12))
        refused = await front.get(f"{path_of(entry)}?w=17")
    assert refused.json()["error"]["message"] == "Invalid 'w': must be one of 16, 32."


async def test_when_too_many_wait_for_one_it_is_to_be_fetched_again(house: House) -> None:
    async with open_delivery(house, PUBLIC, queue_max=1) as front:
        entry = await stored(front)
        await front.renderer._turns.acquire()  # as if the only thread were busy
        waiting = asyncio.create_task(front.get(f"{path_of(entry)}?w=16"))
        await until(lambda: front.renderer.waiting == 1)
        refused = await front.get(f"{path_of(entry)}?w=17")
        front.renderer._turns.release()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert (await waiting).status_code == 200
    assert delivered(house, "rendition", 503) == delivered(house, "rendition", 200) == 1
    assert house.books.snapshot(None).total.requests == 0


async def test_while_a_tier_is_down_it_is_still_made(public: DeliveryFront) -> None:
    entry = await stored(public)
    public.house.redis.is_down = public.house.s3.is_down = True
    path = f"{path_of(entry)}?v={version_of(entry)}&w=32"
    assert shape(await public.get(path)) == ("PNG", (32, 24))


async def test_a_picture_that_cannot_be_read_has_no_renditions(public: DeliveryFront) -> None:
    entry = await public.stored(b"no picture at all")
    answer = await public.get(f"{path_of(entry)}?w=32")
    assert answer.status_code == 400
