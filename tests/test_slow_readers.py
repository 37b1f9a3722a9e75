"""Clients that take their time: what answers hold for them, who is turned away, and how long anybody waits for them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import grpc.aio
import httpx
import pytest

from cacheserver.calls.downloads import DownloadMemory
from cacheserver.http.connection import Bounds
from cacheserver.http.openai.routes import GENERATIONS
from cacheserver.model import CachedImage
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from cacheserver.rpc.service import Limits
from tests.delivery_front import DeliveryFront, open_delivery, path_of
from tests.house import House
from tests.http_front import error_of, open_http_front
from tests.provider import large_png
from tests.rpc_front import Front, ask, failure, open_front, spec
from tests.waiting import until

MIB = 1024 * 1024
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))
"""A channel that takes 64 KB ahead of who reads, however fast the line is."""


# ── gRPC ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def slow_stub(front: Front) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.server.port}", options=SMALL_WINDOW) as channel:
        yield cast("Any", pb_grpc.PromptCacheServiceStub(channel))


async def put(front: Front, prompt: str, number: int) -> bytes:
    data = large_png(number, MIB)
    await front.put(pb.PutImageHeader(spec=spec(prompt)), data)
    return data


async def rest_of(call: Any) -> bytes:
    """The bytes of a picture that are still to be read."""
    read = b""
    while (event := await call.read()) is not grpc.aio.EOF:
        read += event.chunk
    return read


def streamed(prompt: str, **fields: Any) -> pb.StreamImageRequest:
    return pb.StreamImageRequest(request=ask(prompt, **fields))


async def test_a_stream_holds_its_picture_until_it_is_read(house: House) -> None:
    memory = DownloadMemory(MIB)
    async with open_front(house, downloads=memory) as front, slow_stub(front) as stub:
        data = await put(front, "a fox", 1)
        call = stub.StreamImage(streamed("a fox"))
        await call.read()
        assert memory.held_bytes >= len(data)
        assert await rest_of(call) == data
        await until(lambda: memory.held_bytes == 0)


async def test_a_stream_for_which_others_leave_no_room_is_refused_unless_they_send_the_same_picture(
    house: House,
) -> None:
    memory = DownloadMemory(2 * MIB)
    async with open_front(house, downloads=memory) as front, slow_stub(front) as stub:
        for number, prompt in enumerate(("a fox", "an owl")):
            await put(front, prompt, number)
        slow = stub.StreamImage(streamed("a fox"))
        await slow.read()
        refused = await failure(front.stream(streamed("an owl")))
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "OVERLOADED")
        assert "try again" in refused.message
        assert len(await front.stream(streamed("a fox"))) > 1
        slow.cancel()
        await until(lambda: memory.held_bytes == 0)
        assert len(await front.stream(streamed("an owl"))) > 1


async def test_a_stream_of_what_nothing_keeps_is_not_refused(house: House) -> None:
    memory = DownloadMemory(1)
    async with open_front(house, downloads=memory) as front, slow_stub(front) as stub:
        await put(front, "a fox", 1)
        slow = stub.StreamImage(streamed("a fox"))
        await slow.read()
        [header, *_] = await front.stream(streamed("an owl", cache_policy="CACHE_POLICY_NO_STORE"))
        assert header.WhichOneof("event") == "header"


async def test_a_stream_that_fails_before_its_picture_holds_nothing(house: House) -> None:
    memory = DownloadMemory(MIB)
    async with open_front(house, downloads=memory) as front:
        await put(front, "a fox", 1)
        beyond = pb.StreamImageRequest(request=ask("a fox"), read_offset=2 * MIB)
        assert (await failure(front.stream(beyond))).reason == "OFFSET_OUT_OF_RANGE"
        assert memory.held_bytes == 0


async def test_a_stream_of_which_nothing_is_read_is_ended_and_holds_nothing_more(house: House) -> None:
    memory = DownloadMemory(MIB)
    limits = Limits(stalled_s=1.0)  # long enough to see what is held before
    async with open_front(house, downloads=memory, limits=limits) as front, slow_stub(front) as stub:
        data = await put(front, "a fox", 1)
        stalled = stub.StreamImage(streamed("a fox"))
        await stalled.read()
        assert memory.held_bytes >= len(data)
        await until(lambda: memory.held_bytes == 0)
        ended = await failure(rest_of(stalled))
        assert (ended.code, ended.reason) == ("UNAVAILABLE", "OVERLOADED")
        assert "with read_offset" in ended.message


async def test_a_stalled_stream_keeps_no_picture_once_it_is_ended(house: House) -> None:
    memory = DownloadMemory(MIB)
    limits = Limits(stalled_s=0.05)
    async with open_front(house, downloads=memory, limits=limits) as front, slow_stub(front) as stub:
        await put(front, "a fox", 1)
        await house.settle()
        entry = cast("CachedImage", house.memory.peek(house.identity("a fox")[1].key))
        kept = weakref.ref(entry)
        stalled = stub.StreamImage(streamed("a fox"))
        await stalled.read()
        await until(lambda: memory.held_bytes == 0)
        house.memory.delete(entry.key)
        del entry
        gc.collect()
        assert kept() is None
        stalled.cancel()


@pytest.mark.usefixtures("uncollected")
async def test_a_stream_that_is_refused_leaves_nothing_of_its_picture_to_the_garbage_collector(house: House) -> None:
    memory = DownloadMemory(2 * MIB)
    async with open_front(house, downloads=memory) as front, slow_stub(front) as stub:
        for number, prompt in enumerate(("a fox", "an owl")):
            await put(front, prompt, number)
        await house.settle()
        slow = stub.StreamImage(streamed("a fox"))
        await slow.read()
        entry = cast("CachedImage", house.memory.peek(house.identity("an owl")[1].key))
        kept = weakref.ref(entry)
        assert (await failure(front.stream(streamed("an owl")))).reason == "OVERLOADED"
        house.memory.delete(entry.key)
        del entry
        await until(lambda: kept() is None, within_s=5)
        slow.cancel()


async def test_memory_and_what_streams_hold_take_together_what_memory_may(house: House) -> None:
    memory = DownloadMemory(64 * MIB, give_way=house.memory.give_way)
    async with open_front(house, downloads=memory) as front, slow_stub(front) as stub:
        slow = []
        for number in range(12):
            await put(front, f"fox {number}", number)
            slow.append(stub.StreamImage(streamed(f"fox {number}")))
            await slow[-1].read()
            assert house.memory.size_bytes + memory.held_bytes <= house.memory.max_bytes
        assert memory.held_bytes >= 12 * MIB
        for call in slow:
            call.cancel()
        await until(lambda: memory.held_bytes == 0)


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LARGE_BYTES = 24 * MIB
"""More than what a line takes that nobody reads from."""


async def stored(front: DeliveryFront, prompt: str, fill: bytes, size_bytes: int = LARGE_BYTES) -> str:
    return path_of(await front.stored(fill * size_bytes, prompt))


async def test_an_answer_by_url_holds_its_picture_and_others_are_refused_until_it_is_read(house: House) -> None:
    memory = DownloadMemory(LARGE_BYTES)
    async with open_delivery(house, downloads=memory) as front:
        fox, owl = await stored(front, "a fox", b"f"), await stored(front, "an owl", b"o")
        small = await stored(front, "a mouse", b"m", 1_000)
        async with front.client.stream("GET", fox) as slow:
            assert slow.status_code == 200
            assert memory.held_bytes == LARGE_BYTES
            refused = await front.get(owl)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert error_of(refused)["code"] == "server_is_overloaded"
            for path in (small, fox, owl):
                assert (await front.client.head(path)).status_code == 200
            assert (await front.get(small)).status_code == 200
            assert sum([len(piece) async for piece in slow.aiter_raw()]) == LARGE_BYTES
        await until(lambda: memory.held_bytes == 0)
        assert (await front.get(owl)).status_code == 200


async def test_an_answer_that_lay_ready_holds_its_picture_until_its_client_has_read_it_or_gone(house: House) -> None:
    memory = DownloadMemory(LARGE_BYTES)
    async with open_delivery(house, downloads=memory) as front:
        fox = await stored(front, "a fox", b"f")
        owl = await stored(front, "an owl", b"o")
        for path in (fox, owl) * 3:  # from the third time on it lies ready
            assert len((await front.get(path)).content) == LARGE_BYTES
            await until(lambda: memory.held_bytes == 0)
        async with front.client.stream("GET", fox) as slow:
            assert slow.status_code == 200
            assert memory.held_bytes == LARGE_BYTES
            assert (await front.get(owl)).status_code == 503
        await until(lambda: memory.held_bytes == 0)


async def test_an_answer_by_url_of_which_nothing_is_read_is_ended(house: House) -> None:
    memory = DownloadMemory(LARGE_BYTES)
    async with open_delivery(house, downloads=memory, bounds=Bounds(stalled_s=0.05)) as front:
        fox = await stored(front, "a fox", b"f")
        async with front.client.stream("GET", fox) as slow:
            await until(lambda: memory.held_bytes == 0)
            with pytest.raises(httpx.RemoteProtocolError):
                await slow.aread()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "as events"])
async def test_an_answer_of_openais_api_holds_its_picture_until_it_is_read(house: House, *, stream: bool) -> None:
    memory = DownloadMemory(LARGE_BYTES)
    make_large_pictures(house)
    async with open_http_front(house, downloads=memory) as front:
        asked = {"prompt": "a fox", "stream": stream}
        async with front.client.stream("POST", GENERATIONS, json=asked) as slow:
            assert slow.status_code == 200
            await until(lambda: memory.held_bytes == LARGE_BYTES)
            refused = await front.generate("an owl")
            assert error_of(refused)["code"] == "server_is_overloaded"
            assert (await front.generate("an elk", response_format="url")).status_code == 200
        await until(lambda: memory.held_bytes == 0)
        assert (await front.generate("an owl")).status_code == 200
        assert house.upstream.images == 3  # what was refused had been kept


async def test_an_answer_that_nothing_keeps_is_not_refused(house: House) -> None:
    memory = DownloadMemory(1)
    make_large_pictures(house)
    async with (
        open_http_front(house, downloads=memory) as front,
        front.client.stream("POST", GENERATIONS, json={"prompt": "a fox"}),
    ):
        await until(lambda: memory.held_bytes == LARGE_BYTES)
        assert (await front.generate("an owl", headers={"cache-control": "no-store"})).status_code == 200


def make_large_pictures(house: House) -> None:
    plain = house.upstream._image
    house.upstream._image = lambda request: replace(plain(request), data=bytes(LARGE_BYTES))  # type: ignore[method-assign]  # a fake's own
