"""BatchGetImages: many requests on one stream, each answered as soon as it is ready.

A reader takes requests off the stream, a task works on each, and the stream itself sends what is ready. A place is
there before a request is read and free again when its answer has gone out: neither requests nor answers pile up here,
and what cannot be worked on yet stays with its sender, whom gRPC's flow control slows down.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

from cacheserver.calls.call import Call
from cacheserver.errors import InvalidRequestError, ShuttingDownError
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import wire
from cacheserver.rpc.calls import Calls, Parts
from cacheserver.rpc.status import RpcStatus
from cacheserver.tasks import end

GetImage: TypeAlias = Callable[[pb.GetImageRequest, Call], Awaitable[bytes]]
_AnyTask: TypeAlias = asyncio.Task[Any]


class Batch:
    """One BatchGetImages stream: each of its requests is a call of its own in all but how it travels.

    Args:
        calls: counts, books and logs the requests. While it is full they wait for each other here, and one is
            always worked on, so that every batch gets on.
        get_image: answers one request.
        in_flight: most that are worked on at a time.
    """

    def __init__(self, *, calls: Calls, get_image: GetImage, in_flight: int) -> None:
        self._calls = calls
        self._get_image = get_image
        self._in_flight = in_flight
        self._places_taken = 0
        self._place_left = asyncio.Event()
        self._working: dict[_AnyTask, str] = {}
        self._ended: asyncio.Queue[_AnyTask] = asyncio.Queue()

    async def answers(self, parts: Parts[pb.BatchGetImagesRequest], call: Call) -> AsyncGenerator[bytes, None]:
        """A message per answer, in the order they become ready. Closing it ends all waits, and no paid load.

        Raises:
            InvalidRequestError: a request has no request_id, or one that is being worked on.
            ShuttingDownError: the service is going down. What had begun has been answered.
        """
        reading = self._watched(asyncio.create_task(self._read(parts, call), name="batch_reading"))
        waiting = self._calls.reception.going_down.wait()
        going_down = self._watched(asyncio.create_task(waiting, name="batch_going_down"))
        is_open = True
        try:
            while is_open or self._working:
                ended = await self._ended.get()
                if ended is going_down:
                    reading.cancel()
                elif ended is reading:
                    is_open = False
                    if not reading.cancelled():
                        reading.result()  # raises what is wrong with the stream
                else:
                    yield _message(self._working.pop(ended), ended.result())
                    self._places_taken -= 1
                    self._place_left.set()
            if reading.cancelled():
                raise ShuttingDownError("The service is shutting down; send what has no answer to another replica.")
        finally:
            await end((reading, going_down, *self._working))
            if not reading.cancelled():
                reading.exception()  # seen, also where the caller has gone first

    def _watched(self, task: _AnyTask) -> _AnyTask:
        task.add_done_callback(self._ended.put_nowait)
        return task

    async def _read(self, parts: Parts[pb.BatchGetImagesRequest], call: Call) -> None:
        async with aclosing(_requests(parts)) as requests:
            while True:
                await self._place()
                request = await anext(requests, None)
                if request is None:
                    return
                request_id = self._fit(request.request_id)
                working = self._calls.item(call, request_id, partial(self._get_image, request))
                self._working[self._watched(working)] = request_id
                self._places_taken += 1

    async def _place(self) -> None:
        """Return when one more request may be worked on."""
        while self._places_taken >= (1 if self._calls.reception.are_full else self._in_flight):
            self._place_left.clear()
            await self._place_left.wait()

    def _fit(self, request_id: str) -> str:
        if not request_id:
            raise InvalidRequestError({"requests.request_id": "every request of a batch must have one of its own"})
        if request_id in self._working.values():
            raise InvalidRequestError({"requests.request_id": "is that of a request still being worked on"})
        return request_id


async def _requests(parts: Parts[pb.BatchGetImagesRequest]) -> AsyncGenerator[pb.GetImageRequest, None]:
    async for part in parts:
        for request in part.requests:
            yield request


def _message(request_id: str, outcome: bytes | RpcStatus) -> bytes:
    if isinstance(outcome, bytes):
        return wire.batch_response(request_id, outcome)
    item = pb.BatchItem(request_id=request_id, failure=outcome.as_failure())
    return pb.BatchGetImagesResponse(items=[item]).SerializeToString()
