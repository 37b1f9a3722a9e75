"""BatchGetImages: many requests on one stream, each answered as soon as it is ready.

A reader takes requests off the stream. What lies ready is answered as it is read, a task works on what does not, and
the stream itself sends what is ready, as much in a message as there is. A place is there before a request is read and
free again when its answer has gone out: neither requests nor answers pile up here, and what cannot be worked on yet
stays with its sender, whom gRPC's flow control slows down.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias

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


class _Answer(NamedTuple):
    """An answer on its way out: the item of a BatchGetImagesResponse, in two pieces."""

    request_id: str
    head: bytes
    body: bytes

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
        in_flight: most that are worked on, or answered and not sent, at a time.
    """

    def __init__(self, *, calls: Calls, get_image: GetImage, ready: Ready, in_flight: int) -> None:
        self._calls = calls
        self._reception = calls.reception
        self._get_image = get_image
        self._ready = ready
        self._in_flight = in_flight
        self._places_taken = 0
        self._place_left = asyncio.Event()
        self._ids: set[str] = set()
        self._working: set[_Task] = set()
        self._unsent: deque[_Answer] = deque()
        self._unsent_bytes = 0
        self._news = asyncio.Event()
        self._is_cancelled = False

    async def answers(self, parts: _Parts, call: Call) -> AsyncGenerator[bytes, None]:
        """Messages of answers, in the order they become ready. Closing it ends all waits, and no paid load.

        Raises:
            InvalidRequestError: a request has no request_id, or that of one whose answer has not gone out.
            ShuttingDownError: the service is going down. What had begun has been answered.
        """
        reading = asyncio.create_task(self._read(parts, call), name="batch_reading")
        reading.add_done_callback(lambda _: self._news.set())
        going_down = asyncio.create_task(self._reception.going_down.wait(), name="batch_going_down")
        going_down.add_done_callback(lambda _: reading.cancel())
        try:
            while await self._has_unsent(reading):
                packed = self._packed()
                yield b"".join([piece for answer in packed for piece in (answer.head, answer.body)])
                self._gone_out(packed)
            if reading.cancelled():
                raise ShuttingDownError("The service is shutting down; send what has no answer to another replica.")
        finally:
            try:
                await end((reading, going_down, *self._working))
            finally:
                for _ in range(self._places_taken):
                    self._reception.end()
            if not reading.cancelled():
                reading.exception()  # seen, also where the caller has gone first

    async def _read(self, parts: _Parts, call: Call) -> None:
        with suppress(StopAsyncIteration):
            while True:
                await self._place()
                await self._begin_all(await anext(parts), call)

    async def _begin_all(self, part: pb.BatchGetImagesRequest, call: Call) -> None:
        for number, request in enumerate(part.requests, 1):
            await self._place()
            self._begin(request, call)
            if not number % _REQUESTS_PER_TURN:
                await asyncio.sleep(0)

    async def _place(self) -> None:
        """Return when one more request may be begun."""
        while self._is_full:
            self._place_left.clear()
            await self._place_left.wait()

    @property
    def _is_full(self) -> bool:
        most = 1 if self._reception.are_full else self._in_flight
        return self._places_taken >= most or self._unsent_bytes >= _UNSENT_BYTES

    def _begin(self, request: pb.GetImageRequest, stream: Call) -> None:
        request_id = self._fit(request.request_id)
        self._ids.add(request_id)
        self._places_taken += 1
        call = self._reception.begin_item(stream, request_id)
        raw = request.SerializeToString()
        outcome = self._calls.ready_item(call, raw, self._ready)
        if outcome is not None:
            self._answered(request_id, outcome)
            return
        working = asyncio.create_task(self._calls.item(call, partial(self._get_image, raw)), name="item")
        self._working.add(working)
        working.add_done_callback(partial(self._worked, request_id))

    def _fit(self, request_id: str) -> str:
        if not request_id:
            raise InvalidRequestError({"requests.request_id": "every request of a batch must have one of its own"})
        if request_id in self._ids:
            raise InvalidRequestError({"requests.request_id": "is that of a request still being worked on"})
        return request_id

    def _worked(self, request_id: str, working: _Task) -> None:
        self._working.discard(working)
        if not working.cancelled():
            self._answered(request_id, working.result())
        else:
            self._is_cancelled = True
            self._news.set()

    def _answered(self, request_id: str, outcome: bytes | RpcStatus) -> None:
        answer = _answer(request_id, outcome)
        self._unsent.append(answer)
        self._unsent_bytes += answer.size
        self._news.set()

    async def _has_unsent(self, reading: asyncio.Task[None]) -> bool:
        """Whether there is an answer to send, as soon as there is one or can be none any more."""
        while not self._unsent:
            if self._is_cancelled:  # what an item waited for was ended from without
                raise asyncio.CancelledError
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

    def _gone_out(self, packed: list[_Answer]) -> None:
        for answer in packed:
            self._unsent_bytes -= answer.size
            self._reception.end()
        self._places_taken -= len(packed)
        self._place_left.set()


def _answer(request_id: str, outcome: bytes | RpcStatus) -> _Answer:
    if isinstance(outcome, bytes):
        return _Answer(request_id, *wire.batch_item(request_id, outcome))
    item = pb.BatchItem(request_id=request_id, failure=outcome.as_failure())
    return _Answer(request_id, pb.BatchGetImagesResponse(items=[item]).SerializeToString(), b"")
