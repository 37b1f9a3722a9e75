"""BatchGetImages: many requests on one stream, each answered as soon as it is ready.

A reader takes requests off the stream. What lies ready is answered as it is read, a task works on what does not, and
the stream itself sends what is ready, as much in a message as there is. A place is there before a request is read and
free again when its answer has gone out: neither requests nor answers pile up here, and what cannot be worked on yet
stays with its sender, whom gRPC's flow control slows down.

A sender who does not want to wait (no_waiting) is told at once what has no place. Only answers that it does not read
slow it down then, so that what lies ready is answered and what it cancels ends, however much is being worked on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias

import grpc

from cacheserver.calls.call import Call
from cacheserver.errors import InvalidRequestError, ShuttingDownError
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import wire
from cacheserver.rpc.calls import Calls, Parts
from cacheserver.rpc.status import RpcStatus
from cacheserver.tasks import end

GetImage: TypeAlias = Callable[[bytes, Call], Awaitable[bytes]]
"""Answers a GetImageRequest, both as bytes."""

Ready: TypeAlias = Callable[[bytes, Call], bytes | None]
"""The same without waiting for anything, if the answer lies ready. With None nothing has happened."""

_Parts: TypeAlias = Parts[pb.BatchGetImagesRequest]
_Task: TypeAlias = asyncio.Task[bytes | RpcStatus]

_MESSAGE_BYTES = 1024 * 1024
"""Answers are packed up to this, and a larger one travels alone: a message costs as much as ten small answers in it."""

_UNSENT_BYTES = 8 * 1024 * 1024
"""With so much still to send no further request is begun, however few lie unsent: answers may be megabytes each."""

_REQUESTS_PER_TURN = 100
"""To answer so many that lie ready takes a few milliseconds; then other calls get their turn."""


_MOST_UNSENT = 1_000
"""Nor with so many, where none of them waited for a place."""

_LONGEST_TIMEOUT_S = 1e6
"""Who waits longer may wait as long as the stream: timers have an end."""


class _Answer(NamedTuple):
    """An answer on its way out: the item of a BatchGetImagesResponse, in two pieces. It may have had no place."""

    request_id: str
    head: bytes
    body: bytes
    has_place: bool = True

    @property
    def size(self) -> int:
        return len(self.head) + len(self.body)


class Batch:
    """One BatchGetImages stream: each of its requests is a call of its own in all but how it travels.

    Args:
        calls: counts, books and logs the requests. While it is full they wait for each other here, and one is
            always worked on, so that every batch gets on.
        get_image: answers one request.
        ready: answers one whose answer lies ready.
        in_flight: most that are worked on at a time; where they wait for places, those answered and not sent included.
    """

    def __init__(self, *, calls: Calls, get_image: GetImage, ready: Ready, in_flight: int) -> None:
        self._calls = calls
        self._reception = calls.reception
        self._get_image = get_image
        self._ready = ready
        self._in_flight = in_flight
        self._no_waiting = False
        self._places_taken = 0
        self._place_left = asyncio.Event()
        self._ids: set[str] = set()
        self._working: dict[str, _Task] = {}
        self._ended_early: dict[str, pb.Failure] = {}
        """Of those worked on, what ended the wait for them."""
        self._unsent: deque[_Answer] = deque()
        self._unsent_bytes = 0
        self._news = asyncio.Event()
        self._is_cancelled = False

    async def answers(self, parts: _Parts, call: Call) -> AsyncGenerator[bytes, None]:
        """Messages of answers, in the order they become ready. Closing it ends all waits, and no paid load.

        Raises:
            InvalidRequestError: a request has no request_id, or that of one whose answer has not gone out, or negative
                time.
            ShuttingDownError: the service is going down. What had begun has been answered.
        """
        reading = asyncio.create_task(self._read(parts, call), name="batch_reading")
        reading.add_done_callback(lambda _: self._news.set())
        going_down = asyncio.create_task(self._reception.going_down.wait(), name="batch_going_down")
        going_down.add_done_callback(lambda _: self._go_down(reading))
        try:
            while await self._has_unsent(reading):
                packed = self._packed()
                yield b"".join([piece for answer in packed for piece in (answer.head, answer.body)])
                self._gone_out(packed)
            if reading.cancelled():
                raise ShuttingDownError("The service is shutting down; send what has no answer to another replica.")
        finally:
            try:
                await end((reading, going_down, *self._working.values()))
            finally:
                for _ in range(self._places_taken):
                    self._reception.end()
            if not reading.cancelled():
                reading.exception()  # seen, also where the caller has gone first

    def _go_down(self, reading: asyncio.Task[None]) -> None:
        """Read no more. Who does not wait is read until all is answered, and told that it has no place."""
        if self._no_waiting:
            self._news.set()
        else:
            reading.cancel()

    async def _read(self, parts: _Parts, call: Call) -> None:
        with suppress(StopAsyncIteration):
            while True:
                await self._place()
                await self._begin_all(await anext(parts), call)

    async def _begin_all(self, part: pb.BatchGetImagesRequest, call: Call) -> None:
        self._no_waiting |= part.no_waiting
        for request_id in part.cancelled:
            self._end_early(request_id, _CANCELLED)
        timed = len(part.timeout_ms)
        for number, request in enumerate(part.requests, 1):
            await self._place()
            self._begin(request, part.timeout_ms[number - 1] if number <= timed else 0, call)
            if not number % _REQUESTS_PER_TURN:
                await asyncio.sleep(0)

    async def _place(self) -> None:
        """Return when one more request may be begun, or told that it has no place."""
        while self._is_full:
            self._place_left.clear()
            await self._place_left.wait()

    @property
    def _is_full(self) -> bool:
        if self._unsent_bytes >= _UNSENT_BYTES:
            return True
        if self._no_waiting:
            return len(self._unsent) >= _MOST_UNSENT or self._fill_the_service
        most = 1 if self._reception.are_full else self._in_flight
        return self._places_taken >= most

    @property
    def _fill_the_service(self) -> bool:
        """Whether it takes no more calls, and would if our answers had gone out."""
        return self._places_taken > len(self._working) and self._reception.are_full

    def _begin(self, request: pb.GetImageRequest, timeout_ms: int, stream: Call) -> None:
        request_id, timeout_s = self._fit(request.request_id), _timeout_s(timeout_ms)
        is_turned_away = self._no_waiting and (self._reception.are_full or self._reception.going_down.is_set())
        self._ids.add(request_id)
        call = self._reception.begin_item(stream, request_id, timeout_s)
        raw = request.SerializeToString()
        outcome = None if is_turned_away else self._calls.ready_item(call, raw, self._ready)
        if outcome is None and (is_turned_away or (self._no_waiting and len(self._working) >= self._in_flight)):
            self._reception.end()
            self._send(_no_place(request_id))
            return
        self._places_taken += 1
        if outcome is not None:
            self._send(_answer(request_id, outcome))
            return
        working = asyncio.create_task(self._calls.item(call, partial(self._get_image, raw)), name="item")
        self._working[request_id] = working
        working.add_done_callback(partial(self._worked, request_id))
        if timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(timeout_s, self._end_early, request_id, _TOO_LATE)
            working.add_done_callback(lambda _: timer.cancel())

    def _end_early(self, request_id: str, why: pb.Failure) -> None:
        """End the wait for an item, if it is still worked on, as that for a call of its own would be ended."""
        working = self._working.get(request_id)
        if working is not None:
            self._ended_early[request_id] = why
            working.cancel()

    def _fit(self, request_id: str) -> str:
        if not request_id:
            raise InvalidRequestError({"requests.request_id": "every request of a batch must have one of its own"})
        if request_id in self._ids:
            raise InvalidRequestError({"requests.request_id": "is that of a request still being worked on"})
        return request_id

    def _worked(self, request_id: str, working: _Task) -> None:
        del self._working[request_id]
        ended_early = self._ended_early.pop(request_id, None)
        if not working.cancelled():
            self._send(_answer(request_id, working.result()))
        elif ended_early is not None:
            self._send(_failed(request_id, ended_early))
        else:
            self._is_cancelled = True
            self._news.set()

    def _send(self, answer: _Answer) -> None:
        self._unsent.append(answer)
        self._unsent_bytes += answer.size
        self._news.set()

    async def _has_unsent(self, reading: asyncio.Task[None]) -> bool:
        """Whether there is an answer to send, as soon as there is one or can be none any more."""
        while not self._unsent:
            if self._is_cancelled:  # what an item waited for was ended from without
                raise asyncio.CancelledError
            if self._reception.going_down.is_set() and not self._working:
                reading.cancel()
            if reading.done():
                if not reading.cancelled():
                    reading.result()  # raises what is wrong with the stream
                if not self._working:
                    return False
            self._news.clear()
            await self._news.wait()
        return True

    def _packed(self) -> list[_Answer]:
        """The next answers to send: all there are, as far as they fit into one message."""
        packed: list[_Answer] = []
        room = _MESSAGE_BYTES
        while self._unsent and (not packed or self._unsent[0].size <= room):
            answer = self._unsent.popleft()
            self._ids.discard(answer.request_id)  # from here on it may come again
            room -= answer.size
            packed.append(answer)
        return packed

    def _gone_out(self, packed: Sequence[_Answer]) -> None:
        for answer in packed:
            self._unsent_bytes -= answer.size
            if answer.has_place:
                self._places_taken -= 1
                self._reception.end()
        self._place_left.set()


def _timeout_s(timeout_ms: int) -> float | None:
    if timeout_ms < 0:
        raise InvalidRequestError({"timeout_ms": "must not be negative"})
    timeout_s = timeout_ms / 1_000
    return timeout_s if 0 < timeout_s < _LONGEST_TIMEOUT_S else None


def _answer(request_id: str, outcome: bytes | RpcStatus) -> _Answer:
    if isinstance(outcome, bytes):
        return _Answer(request_id, *wire.batch_item(request_id, outcome))
    return _failed(request_id, outcome.as_failure())


def _failed(request_id: str, failure: pb.Failure) -> _Answer:
    return _Answer(request_id, _one(pb.BatchItem(request_id=request_id, failure=failure)), b"")


def _no_place(request_id: str) -> _Answer:
    return _Answer(request_id, _one(pb.BatchItem(request_id=request_id, no_place=True)), b"", has_place=False)


def _one(item: pb.BatchItem) -> bytes:
    return pb.BatchGetImagesResponse(items=[item]).SerializeToString()


_TOO_LATE = pb.Failure(
    code=grpc.StatusCode.DEADLINE_EXCEEDED.value[0],
    message="The time of the request is over. A generation that had begun goes on and is kept.",
)
_CANCELLED = pb.Failure(code=grpc.StatusCode.CANCELLED.value[0], message="The request was cancelled.")
