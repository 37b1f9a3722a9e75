"""Pictures as server-sent events: what comes when, how it fails, and that nobody is waited for in vain."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from cacheserver.errors import PromptRefusedError, UpstreamDownError
from cacheserver.http.openai.events import HOLD_S, KEEPALIVE_S, LEAST_PAUSE_S, MAX_UNREAD_BYTES
from cacheserver.http.openai.routes import GENERATIONS
from cacheserver.model import (
    Budget,
    BudgetPeriod,
    BudgetScope,
    GeneratedImage,
    Outcome,
    PartialImage,
    Pending,
    StatsField,
)
from tests.house import MODEL, House
from tests.http_front import ANYONE, HttpFront, error_of, open_http_front, pictures_of
from tests.provider import large_png
from tests.waiting import until

FACTS = {"type", "created_at", "background", "output_format", "quality", "size", "b64_json"}
COARSE, FINER = b"\x89PNG coarse", b"\x89PNG finer"


@pytest.fixture
async def front(house: House) -> AsyncIterator[HttpFront]:
    async with open_http_front(house) as front:
        yield front


@dataclass
class Stream:
    """What has come of a stream so far; `response` once its head has."""

    response: httpx.Response | None = None
    text: str = ""
    error: BaseException | None = None
    reading: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The data of each whole event: it has a name, which is its type, and nothing else."""
        blocks = [block for block in self.text.split("\n\n")[:-1] if not block.startswith(":")]
        found = []
        for block in blocks:
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
        return found

    @property
    def comments(self) -> int:
        return self.text.count(": keepalive\n\n")

    async def whole(self) -> list[dict[str, Any]]:
        """Every event, once the stream has ended."""
        assert self.reading is not None
        await self.reading
        assert self.response is not None
        assert self.response.status_code == 200, self.text
        assert self.text.endswith("\n\n")
        return self.events


@asynccontextmanager
async def streaming(
    front: HttpFront, *, headers: Mapping[str, str] | None = None, **fields: Any
) -> AsyncIterator[Stream]:
    """A client that streams; at the end of the block it goes away."""
    stream = Stream()

    async def read() -> None:
        body = {"prompt": "a red fox", "stream": True, **fields}
        async with front.client.stream("POST", GENERATIONS, json=body, headers=headers, timeout=None) as response:
            stream.response = response
            async for text in response.aiter_text():
                stream.text += text

    stream.reading = asyncio.create_task(read())
    try:
        yield stream
    finally:
        stream.reading.cancel()
        await asyncio.wait([stream.reading])


async def events_of(front: HttpFront, **fields: Any) -> list[dict[str, Any]]:
    async with streaming(front, **fields) as stream:
        return await stream.whole()


def image_of(event: dict[str, Any]) -> bytes:
    return base64.b64decode(event["b64_json"], validate=True)


async def given(front: HttpFront) -> Callable[[PartialImage], None]:
    """How the upstream gives partial pictures of the call it has begun."""
    await front.house.upstream.arrived(1)
    give = front.house.upstream.on_partials[0]
    assert give is not None
    return give


def outcomes(front: HttpFront) -> dict[Outcome | None, int]:
    """How many pictures were booked as what."""
    rows = front.house.books.snapshot(None, by=[StatsField.OUTCOME]).rows
    return {row.outcome: row.requests for row in rows if row.requests}


# ── what comes ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_partial_pictures_come_first_and_the_picture_last(front: HttpFront) -> None:
    front.house.upstream.partials = [COARSE, FINER]
    *partials, completed = await events_of(front, partial_images=2, quality="high", safety_identifier="user-7")
    assert [each["type"] for each in partials] == ["image_generation.partial_image"] * 2
    assert [(each["partial_image_index"], image_of(each)) for each in partials] == [(0, COARSE), (1, FINER)]
    assert all(each.keys() == FACTS | {"partial_image_index"} for each in partials)
    assert (partials[0]["quality"], partials[0]["size"], partials[0]["output_format"]) == ("high", "auto", "png")
    assert completed["type"] == "image_generation.completed"
    assert completed.keys() == FACTS | {"usage", "safety_identifier"}
    assert completed["safety_identifier"] == "user-7"
    assert completed["created_at"] == int(front.house.clock.now_s())
    assert completed["size"] != "auto"
    assert [image_of(completed)] == pictures_of(await front.generate(quality="high"))


async def test_the_picture_has_its_usage_even_where_nobody_knows_it(front: HttpFront) -> None:
    [completed] = await events_of(front)
    assert completed["usage"].keys() >= {"total_tokens", "input_tokens", "output_tokens", "input_tokens_details"}
    assert completed["usage"]["input_tokens_details"].keys() == {"text_tokens", "image_tokens"}


async def test_a_hit_is_the_picture_alone_and_says_so_in_its_head(front: HttpFront) -> None:
    front.house.upstream.partials = [COARSE]
    [made] = pictures_of(await front.generate())
    async with streaming(front, partial_images=3) as stream:
        [completed] = await stream.whole()
    assert image_of(completed) == made
    assert stream.response is not None
    headers = stream.response.headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-status"].startswith("cacheserver; hit; detail=memory")
    assert headers["cache-control"] == "private, no-transform"
    assert headers["x-request-id"]
    assert front.house.upstream.calls == 1


async def test_several_pictures_come_one_by_one_each_as_a_whole(front: HttpFront) -> None:
    front.house.upstream.partials = [COARSE]
    events = await events_of(front, n=3, partial_images=2)
    assert [each["type"] for each in events] == ["image_generation.completed"] * 3
    assert [image_of(each) for each in events] == pictures_of(await front.generate(n=3))


async def test_a_partial_picture_goes_out_while_the_picture_is_made(front: HttpFront) -> None:
    front.house.upstream.hold()
    async with streaming(front, partial_images=1) as stream:
        (await given(front))(PartialImage(COARSE, 0))
        await until(lambda: len(stream.events) == 1)
        assert image_of(stream.events[0]) == COARSE
        front.house.upstream.release()
        assert len(await stream.whole()) == 2


async def test_what_a_client_has_not_read_gives_way_to_what_is_newer(front: HttpFront) -> None:
    front.house.upstream.hold()
    large = [bytes([index]) * (MAX_UNREAD_BYTES // 2 + 1) for index in range(3)]
    async with streaming(front, partial_images=3) as stream:
        give = await given(front)
        for index, data in enumerate(large):
            give(PartialImage(data, index))
        front.house.upstream.release()
        partial, _ = await stream.whole()
        assert partial["partial_image_index"] == 2
        assert image_of(partial) == large[2]


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_that_has_nothing_to_say_yet_begins_in_time_and_says_that_it_lives(front: HttpFront) -> None:
    front.house.upstream.hold()
    idle = front.house.clock.sleepers
    async with streaming(front) as stream:
        await front.house.upstream.arrived(1)
        await until(lambda: front.house.clock.sleepers > idle)
        front.house.clock.advance(HOLD_S - 0.1)
        await asyncio.sleep(0)
        assert stream.response is None
        front.house.clock.advance(0.1)
        await until(lambda: stream.comments == 1)
        for comments in (2, 3):
            await until(lambda: front.house.clock.sleepers > idle)
            front.house.clock.advance(KEEPALIVE_S)
            await until(lambda comments=comments: stream.comments == comments)  # type: ignore[misc]
        front.house.upstream.release()
        [completed] = await stream.whole()
        assert completed["type"] == "image_generation.completed"


async def test_a_stream_says_that_it_lives_only_after_a_silence(front: HttpFront) -> None:
    front.house.upstream.hold()
    idle = front.house.clock.sleepers
    async with streaming(front, partial_images=2) as stream:
        give = await given(front)
        for index in (0, 1):
            give(PartialImage(COARSE, index))
            await until(lambda index=index: len(stream.events) == index + 1)  # type: ignore[misc]
            await until(lambda: front.house.clock.sleepers > idle)
            front.house.clock.advance(KEEPALIVE_S - 0.1)
        assert stream.comments == 0
        front.house.upstream.release()
        await stream.whole()
    assert stream.comments == 0


async def test_who_waits_only_so_long_for_a_byte_gets_one_in_time_and_the_picture_later(front: HttpFront) -> None:
    front.house.upstream.hold()
    idle = front.house.clock.sleepers
    async with streaming(front, headers={"x-stainless-read-timeout": "4"}) as stream:
        await front.house.upstream.arrived(1)
        for comments in (1, 2, 3):
            await until(lambda: front.house.clock.sleepers > idle)
            front.house.clock.advance(2)
            await until(lambda comments=comments: stream.comments == comments)  # type: ignore[misc]
        front.house.upstream.release()
        assert [each["type"] for each in await stream.whole()] == ["image_generation.completed"]


async def test_who_claims_to_wait_no_time_at_all_does_not_keep_us_busy(front: HttpFront) -> None:
    front.house.upstream.hold()
    idle = front.house.clock.sleepers
    async with streaming(front, headers={"x-stainless-read-timeout": "1e-9"}) as stream:
        await front.house.upstream.arrived(1)
        for comments in (1, 2):
            await until(lambda: front.house.clock.sleepers > idle)
            front.house.clock.advance(LEAST_PAUSE_S - 0.1)
            assert front.house.clock.sleepers > idle
            front.house.clock.advance(0.1)
            await until(lambda comments=comments: stream.comments == comments)  # type: ignore[misc]
        front.house.upstream.release()
        await stream.whole()


async def test_who_goes_away_ends_its_wait_and_not_the_load(front: HttpFront) -> None:
    front.house.upstream.hold()
    async with streaming(front, partial_images=1) as stream:
        (await given(front))(PartialImage(COARSE, 0))
        await until(lambda: len(stream.events) == 1)
    await front.reception.idle()
    front.house.upstream.release()
    again = await front.house.ask()
    assert not isinstance(again, Pending)
    assert front.house.upstream.calls == 1


async def test_who_goes_away_before_anything_came_is_waited_for_no_more(front: HttpFront) -> None:
    front.house.upstream.hold()
    async with streaming(front):
        await front.house.upstream.arrived(1)
    await front.reception.idle()


# ── failing ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_fails_before_anything_was_sent_has_a_status_of_its_own(front: HttpFront) -> None:
    refused = await front.generate(stream=True, size="huge")
    assert (refused.status_code, error_of(refused)["param"]) == (400, "size")
    front.house.upstream.fail_next(PromptRefusedError("The safety system refuses it."))
    refused = await front.generate(stream=True)
    assert (refused.status_code, error_of(refused)["code"]) == (400, "moderation_blocked")
    front.house.upstream.fail_next(UpstreamDownError("It is away."))
    down = await front.generate("a blue fox", stream=True)
    assert (down.status_code, error_of(down)["code"], down.headers["retry-after"]) == (503, "upstream_down", "2")


async def test_what_nobody_can_afford_is_told_at_once(front: HttpFront) -> None:
    front.house.restart(budget=[Budget(BudgetScope.GLOBAL, "", BudgetPeriod.DAY, 1)])
    async with open_http_front(front.house) as poor:
        refused = await poor.generate(stream=True)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "insufficient_quota")


async def test_what_fails_later_is_an_event_and_the_end(front: HttpFront) -> None:
    front.house.upstream.hold()
    front.house.upstream.fail_next(UpstreamDownError("It is away."))
    async with streaming(front, partial_images=1) as stream:
        (await given(front))(PartialImage(COARSE, 0))
        await until(lambda: len(stream.events) == 1)
        front.house.upstream.release()
        _, error = await stream.whole()
    assert error["type"] == "error"
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert error["error"]["code"] == "upstream_down"


async def test_a_failure_of_ours_in_mid_stream_reveals_nothing(front: HttpFront) -> None:
    front.house.upstream.hold()

    async def break_down() -> None:
        raise ZeroDivisionError("a secret of ours")

    front.house.upstream.during = break_down
    with capture_logs():
        async with streaming(front, partial_images=1) as stream:
            (await given(front))(PartialImage(COARSE, 0))
            front.house.upstream.release()
            _, error = await stream.whole()
    assert "secret" not in stream.text
    assert error["error"]["type"] == "server_error"
    assert stream.response is not None
    assert stream.response.headers["x-request-id"] in error["error"]["message"]


async def test_what_waits_for_a_person_is_told_so_and_is_no_failure(house: House) -> None:
    house.namespace = replace(house.namespace, min_score=0.999)
    house.restart()
    async with open_http_front(house) as front:
        headers = {"x-cacheserver-candidates": "2", "x-request-id": "call-7"}
        house.upstream.hold()
        idle = house.clock.sleepers
        async with streaming(front, headers=headers) as stream:
            await house.upstream.arrived(1)
            await until(lambda: house.clock.sleepers > idle)
            house.clock.advance(HOLD_S)
            await until(lambda: stream.comments == 1)
            house.upstream.release()
            [error] = await stream.whole()
        assert error["error"]["code"] == "pending_review"
        await front.reception.idle()
        assert front.recall.explain("call-7", ANYONE).reason == ""
    async with open_http_front(house) as front:
        for stream_again in (True, False):
            refused = await front.generate(stream=stream_again, headers=headers)
            assert (refused.status_code, error_of(refused)["code"]) == (409, "pending_review")
            assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("60", "false")
        assert outcomes(front) == {Outcome.PENDING: 3}
        assert house.upstream.images == 2


# ── the books ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_pictures_and_failures_are_booked_once_each(front: HttpFront) -> None:
    await events_of(front, n=2)
    await events_of(front)
    front.house.upstream.fail_next(UpstreamDownError("It is away."))
    await front.generate("a blue fox", stream=True)
    assert outcomes(front) == {Outcome.MISS: 2, Outcome.HIT: 1, Outcome.ERROR: 1}


async def test_a_failure_in_mid_stream_is_booked_once_and_remembered(front: HttpFront) -> None:
    front.house.upstream.hold()
    front.house.upstream.fail_next(UpstreamDownError("It is away."))
    async with streaming(front, partial_images=1) as stream:
        (await given(front))(PartialImage(COARSE, 0))
        front.house.upstream.release()
        await stream.whole()
    await front.reception.idle()
    assert outcomes(front) == {Outcome.ERROR: 1}
    assert stream.response is not None
    assert front.recall.explain(stream.response.headers["x-request-id"], ANYONE).reason == "UPSTREAM_DOWN"


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_large_picture_is_sent_without_a_copy_of_it(front: HttpFront) -> None:
    data = large_png(1, 16 * 1024 * 1024)
    digest = hashlib.sha256(data).hexdigest()
    picture = GeneratedImage(data, "image/png", 2365, 2365, digest, MODEL, "2365x2365", "high", "opaque")
    await front.house.cache.put(picture, front.house.identity()[1], namespace=front.house.namespace)
    await front.house.settle()
    tracemalloc.start()
    try:
        sent_bytes = await asyncio.to_thread(read_slowly, front.server.port, {"prompt": "a red fox", "stream": True})
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent_bytes > len(data) * 4 / 3
    assert peak_bytes < 4 * 1024 * 1024


def read_slowly(port: int, body: dict[str, Any]) -> int:
    """How many bytes an answer has; reads them in small pieces and keeps none."""
    content = json.dumps(body).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + b"content-length: %d\r\n\r\n%s" % (len(content), content))
        size_bytes = 0
        while piece := connection.recv(64 * 1024):
            size_bytes += len(piece)
    return size_bytes
