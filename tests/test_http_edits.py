"""Edits over OpenAI's API: images come in, in every way they may and may not, and nothing of them outlives its use."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import socket
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from cacheserver.calls.uploads import UploadMemory
from cacheserver.errors import UpstreamDownError
from cacheserver.http.openai.routes import EDITS
from cacheserver.http.openai.uploads import Uploads
from cacheserver.model import Caller, InputRole, Permission
from tests.house import House
from tests.http_front import HttpFront, error_of, open_http_front, pictures_of
from tests.provider import large_png, small_image
from tests.running import environment, running
from tests.waiting import until

PNG, OTHER, JPEG, WEBP = small_image(1), small_image(2), small_image(3, "jpeg"), small_image(4, "webp")
MASK = small_image(5)
BOUNDARY = "a-boundary"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
MIB = 1024 * 1024

Files = Sequence[tuple[str, bytes]]


@pytest.fixture
async def front(house: House) -> AsyncIterator[HttpFront]:
    async with open_http_front(house) as front:
        yield front


async def edit(
    front: HttpFront, files: Files = (("image", PNG),), *, headers: Any = None, **fields: str
) -> httpx.Response:
    """POST an edit as a form."""
    texts = {"prompt": "a red hat on it", **fields}
    uploads = [(name, ("me.bin", data, "application/octet-stream")) for name, data in files]
    return await front.client.post(EDITS, data=texts, files=uploads, headers=headers, timeout=30)


def data_url(image: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"


async def edit_json(front: HttpFront, *images: Any, **fields: Any) -> httpx.Response:
    """POST an edit as JSON."""
    body = {
        "prompt": "a red hat on it",
        "images": [{"image_url": url} if isinstance(url, str) else url for url in images],
    }
    return await front.client.post(EDITS, json=body | fields)


def form(*parts: tuple[str, bytes]) -> bytes:
    pieces = [
        b'--%s\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (BOUNDARY.encode(), name.encode(), data)
        for name, data in parts
    ]
    return b"".join(pieces) + b"--%s--\r\n" % BOUNDARY.encode()


def inputs_of(front: HttpFront, call: int = -1) -> list[tuple[InputRole, str, bytes | None]]:
    request, _ = front.house.upstream.asked[call]
    return [(image.role, image.content_type, image.data) for image in request.inputs]


# ── what an edit is made from ───────────────────────────────────────────────────────────────────────────────────


async def test_an_edit_is_made_of_its_images_in_their_order_and_its_mask(front: HttpFront) -> None:
    files = [("image[]", PNG), ("mask", MASK), ("image[]", JPEG), ("image[]", WEBP)]
    [made] = pictures_of(await edit(front, files, quality="high", input_fidelity="low"))
    image = InputRole.IMAGE
    assert inputs_of(front) == [
        (image, "image/png", PNG),
        (image, "image/jpeg", JPEG),
        (image, "image/webp", WEBP),
        (InputRole.MASK, "image/png", MASK),
    ]
    request, _ = front.house.upstream.asked[0]
    assert (request.prompt, request.quality, dict(request.extra)) == (
        "a red hat on it",
        "high",
        {"input_fidelity": "low"},
    )
    assert [hashlib.sha256(data).hexdigest() for data in (PNG, JPEG, WEBP, MASK)] == [
        each.sha256 for each in request.inputs
    ]
    assert made


async def test_the_same_edit_is_a_hit_however_it_comes(front: HttpFront) -> None:
    first = await edit(
        front, [("image", PNG), ("image", JPEG), ("mask", MASK)], size="1024x1024", n="1", user="a", steps="20"
    )
    again = await edit(front, [("mask", MASK), ("image[]", PNG), ("image[]", JPEG)], size="1024x1024", steps="20")
    as_json = await edit_json(
        front,
        data_url(PNG),
        data_url(JPEG, "image/gif"),
        mask={"image_url": data_url(MASK)},
        size="1024x1024",
        steps=20,
    )
    assert pictures_of(first) == pictures_of(again) == pictures_of(as_json)
    assert again.headers["cache-status"].startswith("cacheserver; hit; detail=memory")
    assert front.house.upstream.calls == 1


async def test_an_edit_is_another_one_with_other_images_another_order_or_a_mask(front: HttpFront) -> None:
    edits: list[Files] = [
        [("image", PNG), ("image", OTHER)],
        [("image", OTHER), ("image", PNG)],
        [("image", PNG), ("mask", OTHER)],
        [("image", PNG)],
        [("image", OTHER)],
    ]
    answers = [pictures_of(await edit(front, files))[0] for files in edits]
    assert len({*answers}) == len(edits)
    assert [pictures_of(await edit(front, files))[0] for files in edits] == answers
    assert front.house.upstream.calls == len(edits)


async def test_an_edit_of_as_many_images_as_there_may_be_has_room_for_a_mask(front: HttpFront) -> None:
    assert len(pictures_of(await edit(front, [*[("image", PNG)] * 16, ("mask", MASK)]))) == 1
    assert len(inputs_of(front)) == 17


async def test_an_edit_streams_events_of_its_own_kind(front: HttpFront) -> None:
    front.house.upstream.partials = [b"\x89PNG coarse"]
    response = await edit(front, stream="true", partial_images="1")
    kinds = [line.removeprefix("event: ") for line in response.text.splitlines() if line.startswith("event: ")]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


async def test_several_pictures_of_one_edit_are_different(front: HttpFront) -> None:
    assert len({*pictures_of(await edit(front, n="2"))}) == 2


async def test_a_service_edits_with_partial_pictures_and_knows_the_edit_again(tmp_path: Path) -> None:
    painter = '[[upstreams]]\nname = "painter"\nkind = "painter"\nmodels = ["painter"]\n'
    async with running(environment(tmp_path), painter) as service:
        address = f"http://{service.http_address}{EDITS}"
        texts = {"prompt": "a red hat on it", "size": "256x256"}
        files = [("image[]", ("a.png", PNG)), ("mask", ("m.png", MASK))]
        async with httpx.AsyncClient(timeout=30) as client:
            made = await client.post(address, data={**texts, "stream": "true", "partial_images": "2"}, files=files)
            again = await client.post(address, data=texts, files=files)
    *partials, completed = [json.loads(line[6:]) for line in made.text.splitlines() if line.startswith("data: ")]
    assert [each["type"] for each in partials] == ["image_edit.partial_image"] * 2
    assert pictures_of(again) == [base64.b64decode(completed["b64_json"])]
    assert "hit" in again.headers["cache-status"]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "missing_required_parameter"),
        ({"n": "two"}, "n", "invalid_type"),
        ({"n": "1.0"}, "n", "invalid_type"),
        ({"n": "11"}, "n", "integer_above_max_value"),
        ({"stream": "True"}, "stream", "invalid_type"),
        ({"stream": "1"}, "stream", "invalid_type"),
        ({"partial_images": "4"}, "partial_images", "integer_above_max_value"),
        ({"output_compression": "9" * 30}, "output_compression", "invalid_type"),
        ({"size": "huge"}, "size", "invalid_value"),
        ({"response_format": "png"}, "response_format", "invalid_value"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value"),
        ({"prompt": "x" * 200_000}, "prompt", "invalid_value"),
    ],
)
async def test_a_field_of_a_form_is_checked_as_strictly_as_one_of_json(
    front: HttpFront, fields: dict[str, str], param: str, code: str
) -> None:
    refused = await edit(front, **fields)
    assert (refused.status_code, error_of(refused)["param"], error_of(refused)["code"]) == (400, param, code)
    assert front.house.upstream.calls == 0


@pytest.mark.parametrize(
    ("files", "param", "text"),
    [
        ([("mask", MASK)], "image", "Missing required parameter"),
        ([("image", b"")], "image", "not a whole PNG, JPEG or WebP image"),
        ([("image", b"https://images.test/a.png")], "image", "not a whole PNG, JPEG or WebP image"),
        ([("image", PNG[:-12])], "image", "cut off"),
        ([("image", PNG)] * 17, "image", "at most 16 images, but got 17"),
        ([("image", PNG), ("mask", MASK), ("mask", MASK)], "mask", "Duplicate parameter"),
        ([("image", PNG), ("mask", small_image(5, "jpeg"))], "mask", "a mask is image/png"),
        ([("image", PNG), ("mask", small_image(5, size=(32, 48)))], "mask", "it is 32x48 and the first image 64x48"),
        ([("image", PNG), ("mask", large_png(1, 4 * MIB + 1))], "mask", "4,194,304 bytes"),
        ([("image", PNG), ("size", b"\xff")], "size", "not UTF-8"),
        ([("image", PNG), ("prompt", b"another one")], "prompt", "Duplicate parameter"),
        ([("images", PNG)], "images", "A form has its images as files in 'image'"),
        ([("image[0]", large_png(1, MIB))], "image[0]", "A form has its images as files in 'image'"),
        ([("image", PNG), ("markup", OTHER)], "markup", "no file is taken there"),
    ],
)
async def test_what_cannot_be_edited_is_told_by_the_name_of_its_field(
    front: HttpFront, files: Files, param: str, text: str
) -> None:
    refused = await edit(front, files)
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)
    assert text in error_of(refused)["message"]
    assert front.house.upstream.calls == 0


async def test_an_image_that_only_looks_whole_is_found_out_before_anything_is_spent(front: HttpFront) -> None:
    begin = PNG.index(b"IDAT") + 4
    damaged = PNG[:begin] + bytes(20) + PNG[begin + 20 :]
    refused = await edit(front, [("image", PNG), ("image", damaged)])
    assert (refused.status_code, error_of(refused)["param"]) == (400, "image")
    assert front.house.upstream.calls == 0
    again = await edit_json(front, data_url(PNG), data_url(damaged), stream=True)
    assert (again.status_code, error_of(again)["param"]) == (400, "images[1].image_url")


@pytest.mark.parametrize(
    ("images", "fields", "param", "text"),
    [
        ([], {}, "images", "Missing required parameter: 'images'"),
        ([], {"images": {"image_url": "x"}}, "images", "expected an array"),
        ([7], {}, "images[0]", "expected an object"),
        ([{"file_id": "file-1"}], {}, "images[0]", "no files are kept here"),
        (["https://images.test/a.png"], {}, "images[0].image_url", "nothing is fetched from anywhere"),
        (["data:image/png,abc"], {}, "images[0].image_url", "data:image/png;base64"),
        (["data:image/png;base64,a*b="], {}, "images[0].image_url", "not base64"),
        (["data:image/png;base64,äöü"], {}, "images[0].image_url", "not base64"),
        (["data:image/png;base64,"], {}, "images[0].image_url", "not a whole PNG"),
        ([data_url(PNG)] * 17, {}, "images", "at most 16 images"),
        ([data_url(PNG)], {"mask": "data:image/png;base64,"}, "mask", "expected an object"),
        ([data_url(PNG)], {"mask": {"file_id": "file-1"}}, "mask", "no files are kept here"),
        ([data_url(PNG)], {"n": "1"}, "n", "expected an integer, but got a string"),
        ([data_url(PNG)], {"image": data_url(PNG)}, "image", "JSON has its images in 'images'"),
    ],
)
async def test_json_has_its_images_with_it(
    front: HttpFront, images: list[Any], fields: dict[str, Any], param: str, text: str
) -> None:
    refused = await edit_json(front, *images, **fields)
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)
    assert text in error_of(refused)["message"]
    assert front.house.upstream.calls == 0


async def test_a_body_of_another_type_is_told_what_is_taken(front: HttpFront) -> None:
    refused = await front.client.post(EDITS, data={"prompt": "a red hat"})
    assert (refused.status_code, error_of(refused)["code"]) == (415, "unsupported_content_type")


async def test_a_page_of_another_site_cannot_send_a_form(front: HttpFront) -> None:
    refused = await edit(front, headers={"origin": "https://elsewhere.test"})
    assert (refused.status_code, error_of(refused)["code"]) == (403, "origin_not_allowed")
    assert front.house.upstream.calls == 0


async def test_who_may_not_read_a_namespace_sends_nothing_into_it(house: House) -> None:
    nobody = Caller("nobody", frozenset({Permission.READ}), frozenset({"elsewhere"}))
    async with open_http_front(house, anonymous=nobody) as front:
        refused = await edit(front, headers={"x-cacheserver-namespace": "default"})
        assert refused.status_code == 403


async def test_who_may_only_read_gets_what_is_cached_and_pays_for_nothing(house: House) -> None:
    reader = Caller("reader", frozenset({Permission.READ}))
    async with open_http_front(house) as front, open_http_front(house, anonymous=reader) as reading:
        assert (await edit(reading)).status_code == 403
        made = await edit(front)
        assert pictures_of(await edit(reading)) == pictures_of(made)


# ── sizes, hostile bodies, memory ───────────────────────────────────────────────────────────────────────────────


def uploads(memory: UploadMemory | None = None) -> Uploads:
    return Uploads(memory or UploadMemory(4 * MIB), max_bytes=MIB)


async def test_a_body_that_is_too_large_is_turned_away_announced_or_not(house: House) -> None:
    async with open_http_front(house, uploads=uploads()) as front:
        body = form(("prompt", b"a red hat"), ("image", large_png(1, MIB)))

        async def unannounced() -> AsyncIterator[bytes]:
            for begin in range(0, len(body), 100_000):
                yield body[begin : begin + 100_000]

        for content in (body, unannounced()):
            refused = await front.client.post(EDITS, content=content, headers=FORM)
            assert (refused.status_code, error_of(refused)["code"]) == (413, "request_too_large")


@pytest.mark.usefixtures("uncollected")
async def test_what_was_uploaded_is_let_go_of_with_its_answer_whatever_that_is(house: House) -> None:
    ours = UploadMemory(4 * MIB)
    async with open_http_front(house, uploads=uploads(ours)) as front:

        async def is_free() -> None:
            house.upstream.asked.clear()
            house.upstream.on_partials.clear()
            await until(lambda: ours.free_bytes == 4 * MIB)

        for stream in ("false", "true"):
            files = [("image", large_png(1, 900_000))]
            assert (await edit(front, files, stream=stream, size="huge")).status_code == 400
            await is_free()
            house.upstream.fail_next(UpstreamDownError("It is away."))
            assert (await edit(front, files, stream=stream, size="256x256")).status_code == 503
            await is_free()
            assert (await edit(front, files, stream=stream)).status_code == 200
            await is_free()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("stream", ["false", "true"])
async def test_images_count_until_what_they_are_for_is_made_though_nobody_waits(house: House, stream: str) -> None:
    ours = UploadMemory(4 * MIB)
    async with open_http_front(house, uploads=uploads(ours)) as front:
        house.upstream.hold()
        asking = asyncio.create_task(edit(front, [("image", large_png(1, 900_000))], stream=stream))
        await house.upstream.arrived(1)
        asking.cancel()
        await until(lambda: not front.server._server.server_state.tasks)
        assert ours.free_bytes < 4 * MIB - 900_000
        house.upstream.release()
        await until(lambda: house.upstream.images == 1)
        house.upstream.asked.clear()
        await until(lambda: ours.free_bytes == 4 * MIB)


async def test_uploads_wait_for_nobody_where_all_their_memory_is_taken(house: House) -> None:
    ours = UploadMemory(2 * MIB)
    async with open_http_front(house, uploads=uploads(ours)) as front:
        house.upstream.hold()
        large = large_png(1, 900_000)
        first = asyncio.create_task(edit(front, [("image", large)]))
        second = asyncio.create_task(edit(front, [("image", large_png(2, 900_000))]))
        await house.upstream.arrived(2)
        assert ours.free_bytes < 400_000
        refused = await edit(front, [("image", large)])
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert error_of(refused)["code"] == "server_is_overloaded"
        house.upstream.release()
        assert [(await each).status_code for each in (first, second)] == [200, 200]
        house.upstream.asked.clear()
        assert pictures_of(await edit(front, [("image", large)])) == pictures_of(await first)


async def test_a_client_that_goes_away_in_the_middle_of_its_body_leaves_nothing_behind(house: House) -> None:
    ours = UploadMemory(4 * MIB)
    async with open_http_front(house, uploads=uploads(ours)) as front:
        body = form(("prompt", b"a red hat"), ("image", large_png(1, 900_000)))
        _, writer = await asyncio.open_connection("127.0.0.1", front.server.port)
        writer.write(head(len(body), FORM["content-type"]) + body[: len(body) // 2])
        await writer.drain()
        await until(lambda: ours.free_bytes < 4 * MIB - 400_000)
        writer.close()
        await until(lambda: ours.free_bytes == 4 * MIB)
        assert house.upstream.calls == 0


def head(length: int, kind: str) -> bytes:
    lines = [f"POST {EDITS} HTTP/1.1", "host: localhost", f"content-type: {kind}"]
    return "\r\n".join([*lines, f"content-length: {length}", "connection: close", "", ""]).encode()


async def test_no_form_that_was_tampered_with_is_more_than_refused(front: HttpFront) -> None:
    rng = random.Random(7)  # noqa: S311 - the same forms in every run
    whole = form(("prompt", b"a red hat"), ("n", b"1"), ("image[]", PNG), ("mask", MASK))
    statuses = set()
    for _ in range(100):
        body = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            begin = rng.randrange(len(body))
            match rng.randrange(4):
                case 0:
                    body[begin] = rng.randrange(256)
                case 1:
                    del body[begin : begin + rng.randint(1, 40)]
                case 2:
                    body[begin:begin] = rng.choice([b"\r\n--a-boundary", b"\r\n", b"--", b"\0", b'"', PNG])
                case _:
                    del body[begin:]
            body = body or bytearray(b"-")
        answer = await front.client.post(EDITS, content=bytes(body), headers=FORM)
        statuses.add(answer.status_code)
        if answer.status_code != 200:
            error_of(answer)
    assert statuses <= {200, 400}


@pytest.mark.parametrize(("as_json", "most"), [(False, 1.3), (True, 3.2)], ids=["form", "json"])
async def test_an_upload_takes_little_more_memory_than_it_is_large(
    front: HttpFront, most: float, *, as_json: bool
) -> None:
    images = [large_png(1, 3_000_000)] * 16
    images_bytes = sum(map(len, images))
    held_bytes: list[int] = []

    async def measure() -> None:
        held_bytes.append(tracemalloc.get_traced_memory()[0])

    front.house.upstream.during = measure
    if as_json:
        urls = [{"image_url": data_url(image)} for image in images]
        kind, body = "application/json", json.dumps({"prompt": "a red hat on it", "images": urls}).encode()
    else:
        kind, body = FORM["content-type"], form(("prompt", b"a red hat"), *[("image[]", image) for image in images])
    del images
    tracemalloc.start()
    try:
        status = await asyncio.to_thread(send_slowly, front.server.port, kind, body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert status == b"HTTP/1.1 200"
    assert len(front.house.upstream.asked[0][0].inputs) == 16
    assert peak_bytes < most * len(body)
    assert held_bytes[0] < 1.1 * images_bytes  # while the picture is made, of a body nothing else is left


def send_slowly(port: int, kind: str, body: bytes) -> bytes:
    """The beginning of the answer to a body that is sent in small pieces, of which no copy is made."""
    view = memoryview(body)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head(len(body), kind))
        for begin in range(0, len(body), 64 * 1024):
            connection.sendall(view[begin : begin + 64 * 1024])
        return connection.recv(12)
