"""What lies ready is answered as it is read, and goes out together. Nobody can tell it from what was worked on."""

from __future__ import annotations

import asyncio
import gc
import itertools
import tracemalloc
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, cast

import grpc.aio
import pytest

from cacheserver.calls.auth import Authenticator
from cacheserver.calls.call import Call
from cacheserver.calls.reception import Reception
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import batch
from cacheserver.rpc.batch import Batch
from cacheserver.rpc.calls import Calls, Parts
from tests.fakes import FakeClock
from tests.house import House
from tests.rpc_front import ANYONE, ask
from tests.waiting import until

Answer = Callable[[str, Call], bytes | None]
"""Answers a request by its id."""


def message(*ids: str, **fields: Any) -> bytes:
    return pb.BatchGetImagesRequest(requests=[ask(request_id=each) for each in ids], **fields).SerializeToString()


def numbers(count: int) -> list[str]:
    return [f"{number}" for number in range(count)]


class Sent:
    """The caller's side of a stream: what it sends, and whether that was read."""

    def __init__(self, *messages: bytes) -> None:
        self.unread = deque(messages)
        self.more = asyncio.Event()
        self.is_closed = False

    def send(self, raw: bytes) -> None:
        self.unread.append(raw)
        self.more.set()

    def close(self) -> None:
        self.is_closed = True
        self.more.set()

    async def read(self) -> object:
        while not self.unread:
            if self.is_closed:
                return grpc.aio.EOF
            self.more.clear()
            await self.more.wait()
        return self.unread.popleft()


class Stream:
    """A batch on its own, without gRPC: what it sends is asked for message by message."""

    def __init__(self, reception: Reception, *, ready: Answer, in_flight: int = 32) -> None:
        self.reception = reception
        self.worked_on: list[str] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent = Sent()
        self._batch = Batch(
            calls=Calls(reception),
            get_image=self._work,
            ready=lambda raw, call: ready(pb.GetImageRequest.FromString(raw).request_id, call),
            in_flight=in_flight,
        )
        call = reception.begin("BatchGetImages", {"x-request-id": "r1"}, deadline_s=None)
        reception.admit(call)
        parts = Parts(pb.BatchGetImagesRequest, cast("Any", self.sent))
        self.answers: AsyncGenerator[bytes, None] = self._batch.answers(parts, call)

    async def _work(self, raw: bytes, _: Call) -> bytes:
        self.worked_on.append(pb.GetImageRequest.FromString(raw).request_id)
        await self.done
        return picture(1)

    async def next(self) -> list[pb.BatchItem]:
        return [*pb.BatchGetImagesResponse.FromString(await anext(self.answers)).items]


def picture(size_bytes: int) -> bytes:
    return pb.GetImageResponse(images=[pb.Image(data=bytes(size_bytes))]).SerializeToString()


def ids(items: Sequence[pb.BatchItem]) -> list[str]:
    return [item.request_id for item in items]


@pytest.fixture
def reception(house: House, clock: FakeClock) -> Reception:
    return Reception(
        authenticator=Authenticator((), anonymous=ANYONE), books=house.books, clock=clock, max_in_progress=100_000
    )


@pytest.fixture
async def open_stream(reception: Reception) -> AsyncIterator[Callable[..., Stream]]:
    opened: list[Stream] = []

    def open_one(*, of_bytes: int = 10, ready: Answer | None = None, in_flight: int = 32) -> Stream:
        lies_ready = picture(of_bytes)
        opened.append(Stream(reception, ready=ready or (lambda _, __: lies_ready), in_flight=in_flight))
        return opened[-1]

    yield open_one
    for stream in opened:
        await stream.answers.aclose()
        reception.end()
    assert reception._in_progress == 0


OpenStream = Callable[..., Stream]


class TestPacking:
    async def test_all_that_is_ready_goes_out_together_in_the_order_it_was_asked_for(
        self, open_stream: OpenStream
    ) -> None:
        stream = open_stream()
        stream.sent.send(message("a", "b"))
        stream.sent.send(message("c"))
        assert ids(await stream.next()) == ["a", "b", "c"]
        assert stream.worked_on == []

    async def test_while_a_message_goes_out_further_requests_are_read_and_their_answers_gather(
        self, open_stream: OpenStream
    ) -> None:
        stream = open_stream()
        stream.sent.send(message("a"))
        assert ids(await stream.next()) == ["a"]
        stream.sent.send(message("b"))
        stream.sent.send(message("c", "d"))
        await until(lambda: not stream.sent.unread)
        assert ids(await stream.next()) == ["b", "c", "d"]

    async def test_a_message_is_no_larger_than_a_mebibyte(self, open_stream: OpenStream) -> None:
        stream = open_stream(of_bytes=300_000)
        stream.sent.send(message(*numbers(8)))
        assert [ids(await stream.next()) for _ in range(3)] == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]

    async def test_a_larger_answer_travels_alone(self, open_stream: OpenStream) -> None:
        answers = {"a": picture(10), "b": picture(2_000_000), "c": picture(10), "d": picture(10)}
        stream = open_stream(ready=lambda request_id, _: answers[request_id])
        stream.sent.send(message(*answers))
        assert [ids(await stream.next()) for _ in range(3)] == [["a"], ["b"], ["c", "d"]]

    async def test_an_answer_that_is_ready_does_not_wait_for_one_that_is_worked_on(
        self, open_stream: OpenStream
    ) -> None:
        stream = open_stream(ready=lambda request_id, _: None if request_id == "slow" else picture(1))
        stream.sent.send(message("slow", "a", "b"))
        assert ids(await stream.next()) == ["a", "b"]
        stream.done.set_result(None)
        assert ids(await stream.next()) == ["slow"]


class TestBounds:
    async def test_no_more_lie_answered_and_unsent_than_may_be_in_flight(
        self, open_stream: OpenStream, reception: Reception
    ) -> None:
        stream = open_stream(in_flight=4)
        stream.sent.send(message(*numbers(10)))
        stream.sent.send(message("later"))
        assert ids(await stream.next()) == ["0", "1", "2", "3"]
        await turns()
        assert reception._in_progress == 1 + 4
        assert ids(await stream.next()) == ["4", "5", "6", "7"]
        assert ids(await stream.next()) == ["8", "9", "later"]

    async def test_no_further_request_is_begun_while_eight_mebibytes_are_to_be_sent(
        self, open_stream: OpenStream
    ) -> None:
        stream = open_stream(of_bytes=3_000_000)
        stream.sent.send(message("0", "1", "2"))
        for each in ("3", "4"):
            stream.sent.send(message(each))
        assert ids(await stream.next()) == ["0"]
        await turns()
        assert len(stream.sent.unread) == 2
        assert ids(await stream.next()) == ["1"]
        await until(lambda: len(stream.sent.unread) == 1)

    @pytest.mark.parametrize("lies_ready", [True, False])
    async def test_where_nothing_waits_for_a_place_no_more_than_a_thousand_answers_lie_unsent(
        self, open_stream: OpenStream, reception: Reception, *, lies_ready: bool
    ) -> None:
        stream = open_stream(ready=lambda _, __: picture(1) if lies_ready else None, in_flight=1)
        stream.sent.send(message(*numbers(2_500), no_waiting=True))
        stream.sent.send(message("later"))
        stream.sent.close()
        got = ids(await stream.next())
        await until(lambda: len(stream._batch._unsent) == 1_000)
        await turns()
        assert (len(stream._batch._unsent), len(stream.sent.unread)) == (1_000, 1)
        assert reception._in_progress <= 1 + 1_000 + len(got)
        stream.done.set_result(None)
        got += ids([item async for raw in stream.answers for item in pb.BatchGetImagesResponse.FromString(raw).items])
        assert sorted(got) == sorted([*numbers(2_500), "later"])

    async def test_what_is_cancelled_is_heard_of_while_all_places_are_taken(self, open_stream: OpenStream) -> None:
        stream = open_stream(ready=lambda _, __: None, in_flight=2)
        stream.sent.send(message("a", "b", no_waiting=True))
        stream.sent.send(message("c", cancelled=["a", "b"]))
        items = [*(await stream.next()), *(await stream.next())]
        assert {item.request_id: item.no_place for item in items} == {"c": True, "a": False, "b": False}

    async def test_an_item_is_in_progress_until_its_answer_has_gone_out(
        self, open_stream: OpenStream, reception: Reception
    ) -> None:
        stream = open_stream()
        stream.sent.send(message("a", "b"))
        await stream.next()
        assert reception._in_progress == 3
        following = asyncio.ensure_future(stream.next())
        await until(lambda: reception._in_progress == 1)
        stream.sent.send(message("c"))
        assert ids(await following) == ["c"]

    async def test_thousands_that_lie_ready_give_others_their_turn(self, open_stream: OpenStream) -> None:
        answered = 0
        longest = 0

        def ready(_: str, __: Call) -> bytes:
            nonlocal answered
            answered += 1
            return picture(1)

        async def watch() -> None:
            nonlocal longest
            while answered < 3_000:
                before = answered
                await asyncio.sleep(0)
                longest = max(longest, answered - before)

        stream = open_stream(ready=ready, in_flight=10_000)
        stream.sent.send(message(*numbers(3_000)))
        watching = asyncio.create_task(watch())
        got = 0
        while got < 3_000:
            got += len(await stream.next())
        await watching
        assert longest <= batch._REQUESTS_PER_TURN

    async def test_a_stream_that_has_carried_many_items_keeps_nothing_of_them(self, open_stream: OpenStream) -> None:
        stream = open_stream()
        count = itertools.count()

        async def carry(items: int) -> int:
            for _ in range(items // 16):
                stream.sent.send(message(*(f"{next(count)}" for _ in range(16))))
                got = 0
                while got < 16:
                    got += len(await stream.next())
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = await carry(1_600)
            assert await carry(8_000) - before < 100_000
        finally:
            tracemalloc.stop()


class TestFailures:
    async def test_a_bug_is_the_failure_of_its_request_alone(self, open_stream: OpenStream) -> None:
        def ready(request_id: str, _: Call) -> bytes:
            if request_id == "bad":
                raise RuntimeError("a secret of ours")
            return picture(1)

        stream = open_stream(ready=ready)
        stream.sent.send(message("a", "bad", "b"))
        first, bad, last = await stream.next()
        assert (bad.failure.code, bad.failure.reason) == (grpc.StatusCode.INTERNAL.value[0], "INTERNAL")
        assert "r1/bad" in bad.failure.message
        assert "secret" not in bad.failure.message
        assert ids([first, last]) == ["a", "b"]

    async def test_what_waits_for_something_that_was_ended_ends_the_stream(self, open_stream: OpenStream) -> None:
        stream = open_stream(ready=lambda _, __: None)
        stream.sent.send(message("a"))
        answer = asyncio.ensure_future(stream.next())
        await until(lambda: stream.worked_on == ["a"])
        stream.done.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)
