"""Calls of GetImage that share a stream: what a call costs both sides beside its answer is paid once for all of them.

A request goes, with all that wait, into the next message that can be written, with the time that is left to it. The
service answers what lies in memory in any case, and works on so many others of a stream at a time. What it has no place
for it says at once, having done nothing, and the request is made as a call of its own: so no request ever waits behind
others, as it would not without a stream. A request that was given up is called off at the service.

Each call is answered as one of its own would be. UNAVAILABLE, of a request or of the whole stream, is tried again as
gRPC does it. What had no answer when its stream failed otherwise is asked for by a call of its own, and has its error:
which request was the stream's undoing nobody can tell.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import grpc.aio

from cacheserver.client import channel, messages
from cacheserver.client.errors import (
    CacheError,
    UnsupportedError,
    as_broken,
    error_of,
    error_of_item,
    too_late,
    unreachable,
)
from cacheserver.client.retries import Throttle, Tries
from cacheserver.client.values import ImageResult
from cacheserver.pb import promptcache_pb2 as pb

IDLE_S: Final = 60.0
"""A stream that has had nothing to do for so long is closed: to open one costs as much as one call."""

ALONE_S: Final = 60.0
"""So long no stream is opened to a service that knows none of the kind: there may be another by then."""

MOST_GIVEN_UP: Final = 10_000
"""A stream on which the service answers for none of so many calls that were given up is given up, too."""

_KNOWN_BY: Final = "x-batch-in-flight"
"""A service whose streams have this header knows timeouts, cancelled requests and no_waiting."""

_MESSAGE_BYTES: Final = 1024 * 1024
_ANSWER_BYTES: Final = 4 * 1024 * 1024
"""What a stream may have to carry at once: the others' answers wait behind it."""

_LONGEST_TIMEOUT_S: Final = 1e6
"""What gRPC makes of a longer time, or of none that has an end, is for gRPC to say."""

_PAYS_EVERY_TIME: Final = (pb.CACHE_POLICY_REFRESH, pb.CACHE_POLICY_NO_STORE)

OpenStream = Callable[[AsyncIterator[pb.BatchGetImagesRequest], str], Any]
"""Opens a stream that sends these messages, under this x-request-id."""

AskAlone = Callable[[pb.GetImageRequest, float], Awaitable[ImageResult]]
"""Makes a call of its own, which ends within so many seconds."""


class Multiplexer:
    """Answers calls of GetImage over streams. Belongs to one event loop, as of the first call."""

    def __init__(self, open_stream: OpenStream, ask_alone: AskAlone, address: str) -> None:
        """`address` is for error texts."""
        self._open_stream = open_stream
        self._ask_alone = ask_alone
        self._service = _Service(address)
        self._streams: dict[asyncio.Task[None], _Stream] = {}
        self._closed = asyncio.Event()

    @staticmethod
    def carries(request: pb.GetImageRequest) -> bool:
        """Whether a stream is the way for this request.

        It is not for what is large, either way: others would wait behind it, and an answer above the channel's limit
        would be the end of them all. Nor for what pays every time: to that a stream saves nothing that counts.
        """
        return (
            request.max_inline_bytes <= _ANSWER_BYTES
            and request.cache_policy not in _PAYS_EVERY_TIME
            and request.ByteSize() <= _MESSAGE_BYTES
        )

    async def ask(self, request: pb.GetImageRequest, timeout_s: float) -> ImageResult:
        """The answer to a request that `carries` holds for, within `timeout_s`.

        Raises:
            CacheError: the call failed, as a call of its own would have.
        """
        if not 0 < timeout_s < _LONGEST_TIMEOUT_S:
            return await self._ask_alone(request, timeout_s)
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout_s
        throttle = self._service.throttle
        tries = Tries(throttle)
        while (stream := self._stream(request.request_id)) is not None:
            try:
                item, call_id = await stream.ask(request, ends_s)
            except _StreamFailedError as failed:
                error = failed.error
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    break
            else:
                if item.HasField("response"):
                    throttle.succeeded()
                    return messages.read_result(item.response, call_id)
                if item.no_place:
                    break
                error = self._error_of(item.failure)
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    raise error
                throttle.failed()
            await self._pause(tries.pause_s(error), ends_s)
        return await self._ask_alone(request, ends_s - loop.time())

    async def aclose(self) -> None:
        """End the streams. Calls that still wait for their answers, or to be made again, end with UnreachableError."""
        self._closed.set()
        for task in self._streams:
            task.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    def _stream(self, request_id: str) -> _Stream | None:
        """The stream for a request of this id. None: it is to be asked for by a call of its own."""
        if self._closed.is_set():
            return None
        for stream in self._streams.values():
            if stream.is_open:
                return stream if stream.is_free(request_id) else None
        if asyncio.get_running_loop().time() < self._service.alone_until_s:
            return None
        stream = _Stream(self._open_stream, self._service)
        task = asyncio.create_task(stream.run(), name="multiplexed_stream")
        self._streams[task] = stream
        task.add_done_callback(self._gone)
        return stream

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._streams.pop(task).close()

    def _error_of(self, failure: pb.Failure) -> CacheError:
        """What a failure is to its caller; that the time is over is said in our words, not in those of the service."""
        error = error_of_item(failure)
        is_late = error.code is grpc.StatusCode.DEADLINE_EXCEEDED and not error.reason
        return too_late(self._service.address) if is_late else error

    async def _pause(self, pause_s: float, ends_s: float) -> None:
        left_s = ends_s - asyncio.get_running_loop().time()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(pause_s, left_s)):
                await self._closed.wait()
        if self._closed.is_set():
            raise unreachable(self._service.address)
        if pause_s >= left_s:
            raise too_late(self._service.address)


@dataclass(slots=True)
class _Service:
    """What is known of the service. Until `alone_until_s`, of the loop's time, no stream is opened to it."""

    address: str
    throttle: Throttle = field(default_factory=Throttle)
    alone_until_s: float = -math.inf


class _StreamFailedError(Exception):
    """A stream ended before a request of it was answered; `error` is what a call that ends like this fails with."""

    def __init__(self, error: CacheError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request on a stream, under the id it has there.

    `number`, from 1, tells when it was sent; 0 until then. `ends_s` is until when its caller waits, of the loop's time.
    Once `is_given_up` nobody waits for `answered` any more.
    """

    request: pb.GetImageRequest
    request_id: str
    ends_s: float
    answered: asyncio.Future[pb.BatchItem]
    number: int = 0
    is_given_up: bool = False


class _Stream:
    """One BatchGetImages stream. Whoever makes it runs `run` as a task."""

    def __init__(self, open_stream: OpenStream, service: _Service) -> None:
        self._service = service
        self._call_id = channel.call_id()
        self._loop = asyncio.get_running_loop()
        self.is_open = True
        """Whether it takes requests."""
        self._waiting: dict[str, _Waiting] = {}
        """All that are on it, by id: also those that were given up, until the service has answered for them."""
        self._unsent: dict[_Waiting, None] = {}
        self._called_off: list[str] = []
        """The ids of those given up of which the service is still to hear."""
        self._given_up = 0
        self._sent = 0
        self._made = 0
        self._has_work = asyncio.Event()
        self._call = open_stream(self._messages(), self._call_id)
        self._idle_since_s = self._loop.time()
        self._idle_timer = self._loop.call_later(IDLE_S, self._close_if_idle)

    def is_free(self, request_id: str) -> bool:
        """Whether a request may have this id on it; without one it gets one of ours."""
        return not request_id or request_id not in self._waiting

    async def ask(self, request: pb.GetImageRequest, ends_s: float) -> tuple[pb.BatchItem, str]:
        """The answer to a request whose id `is_free`, and the x-request-id under which the service knows it.

        Raises:
            DeadlineError: there is none by `ends_s`, of the loop's time.
            _StreamFailedError: the stream ended before.
        """
        waiting = _Waiting(request, request.request_id or self._new_id(), ends_s, self._loop.create_future())
        self._waiting[waiting.request_id] = waiting
        self._unsent[waiting] = None
        self._has_work.set()
        timer = self._loop.call_at(ends_s, self._expire, waiting)
        try:
            item = await waiting.answered
        finally:
            timer.cancel()
            if self._waiting.get(waiting.request_id) is waiting:
                self._give_up(waiting)
        return item, channel.item_id(self._call_id, waiting.request_id, waiting.number)

    async def run(self) -> None:
        """Read answers until the stream ends, however it does, and tell those that still wait."""
        try:
            self._end(await self._read())
        finally:
            self.close()

    def close(self) -> None:
        """End it, if it has not ended: what still waits hears that nobody answers. Its task may not have begun."""
        self._idle_timer.cancel()
        self._call.cancel()
        self._end(partial(unreachable, self._service.address))

    async def _read(self) -> Callable[[], CacheError]:
        """Hand out answers until the stream ends; what makes the error of those that have none."""
        try:
            is_known = _KNOWN_BY in dict(await self._call.initial_metadata() or ())
            # What is no message here is gRPC's word for the end, or was none on the wire.
            while isinstance(response := await self._call.read(), pb.BatchGetImagesResponse):
                if not is_known:
                    return _not_known
                for item in response.items:
                    self._answer(item)
        except grpc.RpcError as failure:
            return partial(_error_of, failure, self._service.address)
        return partial(unreachable, self._service.address)

    def _answer(self, item: pb.BatchItem) -> None:
        waiting = self._waiting.pop(item.request_id, None)
        if waiting is None:
            return
        if waiting.is_given_up:
            self._given_up -= 1
        elif not waiting.answered.done():  # it is where its caller goes this very moment
            waiting.answered.set_result(item)
        if not self._waiting:
            self._idle_since_s = self._loop.time()
        self._end_if_forsaken()

    def _expire(self, waiting: _Waiting) -> None:
        if not waiting.answered.done():
            waiting.answered.set_exception(too_late(self._service.address))

    def _give_up(self, waiting: _Waiting) -> None:
        waiting.is_given_up = True
        if waiting.number == 0:
            del self._waiting[waiting.request_id], self._unsent[waiting]
            return
        self._given_up += 1
        self._called_off.append(waiting.request_id)
        self._has_work.set()
        if self._given_up >= MOST_GIVEN_UP:
            self.is_open = False
        self._end_if_forsaken()

    def _end_if_forsaken(self) -> None:
        if not self.is_open and self._given_up == len(self._waiting):
            self._call.cancel()

    def _end(self, why: Callable[[], CacheError]) -> None:
        self.is_open = False
        self._unsent.clear()
        self._called_off.clear()
        self._has_work.set()  # its messages end, too
        unanswered = [waiting for waiting in self._waiting.values() if not waiting.answered.done()]
        self._waiting.clear()
        for waiting in unanswered:
            waiting.answered.set_exception(_StreamFailedError(why()))
        code = why().code
        if code is grpc.StatusCode.UNIMPLEMENTED:
            self._service.alone_until_s = self._loop.time() + ALONE_S
        elif unanswered and code is grpc.StatusCode.UNAVAILABLE:
            self._service.throttle.failed()

    def _close_if_idle(self) -> None:
        left_s = IDLE_S if self._waiting else self._idle_since_s + IDLE_S - self._loop.time()
        if left_s > 0:
            self._idle_timer = self._loop.call_later(left_s, self._close_if_idle)
        else:
            self.is_open = False
            self._has_work.set()

    async def _messages(self) -> AsyncGenerator[pb.BatchGetImagesRequest]:
        """What waits to be sent whenever something can be. They end when the stream is to take nothing more."""
        await self._call.wait_for_connection()
        while self.is_open or self._unsent or self._called_off:
            if self._unsent or self._called_off:
                yield self._packed()
            else:
                self._has_work.clear()
                await self._has_work.wait()

    def _packed(self) -> pb.BatchGetImagesRequest:
        message = pb.BatchGetImagesRequest(cancelled=self._called_off, no_waiting=True)
        self._called_off.clear()
        now_s, size = self._loop.time(), 0
        while self._unsent:
            waiting = next(iter(self._unsent))
            size += waiting.request.ByteSize()
            if size > _MESSAGE_BYTES and message.requests:
                break
            del self._unsent[waiting]
            self._sent += 1
            waiting.number = self._sent
            request = message.requests.add()
            request.CopyFrom(waiting.request)
            request.request_id = waiting.request_id
            message.timeout_ms.append(_milliseconds(waiting.ends_s - now_s))
        return message

    def _new_id(self) -> str:
        """An id that no caller has given."""
        while True:
            self._made += 1
            if (request_id := str(self._made)) not in self._waiting:
                return request_id


def _milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1_000))


def _error_of(failure: grpc.RpcError, address: str) -> CacheError:
    return as_broken(error_of(failure, address))


def _not_known() -> CacheError:
    what = "the service does not know streams whose requests have a time of their own"
    return UnsupportedError(what, code=grpc.StatusCode.UNIMPLEMENTED)
