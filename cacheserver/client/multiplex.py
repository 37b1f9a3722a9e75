"""Calls of GetImage that share streams: what a call costs both sides beside its answer is paid once for a stream.

A request goes on the first stream that has a place for it and, with all that wait there, into the next message that
can be written. A service works on so many requests of a stream at a time, and says how many: here they are its places,
so that no request ever waits on a stream behind others. Where all places are taken, mostly by pictures that are still
being made, another stream is opened, and beyond `MAX_STREAMS` a call is made as one of its own. More places on one
stream would be simpler, but how many of one caller's requests a service works on is for the service to say.

The protocol cannot call a single request off. So a stream on which a caller has given up takes no more requests, and
is cancelled once only such are left: their waits end at the service as those of calls of their own would, and what was
not yet begun is not paid for.

Each call is answered as one of its own would be. UNAVAILABLE, of a request or of the whole stream, is tried again as
gRPC does it. What had no answer when its stream failed otherwise is asked for by a call of its own, and has its error:
which request was the stream's undoing nobody can tell.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import grpc.aio

from cacheserver.client import channel, messages
from cacheserver.client.errors import CacheError, as_broken, error_of, error_of_item, too_late, unreachable
from cacheserver.client.retries import Throttle, Tries
from cacheserver.client.values import ImageResult
from cacheserver.pb import promptcache_pb2 as pb

PLACES: Final = 32
"""How many requests of a stream a service works on at a time that does not say: the default of its setting."""

MAX_STREAMS: Final = 32
"""A thousand requests at a time; each stream counts as a call at the service."""

IDLE_S: Final = 60.0
"""A stream that has had nothing to do for so long is closed: to open one costs as much as one call."""

FURTHER_IDLE_S: Final = 5.0
"""The same for one opened beside others: a burst of calls is soon over, and streams count as calls at the service."""

_PLACES_HEADER: Final = "x-batch-in-flight"
_COUNT: Final = re.compile(r"[1-9][0-9]{0,5}")
_MESSAGE_BYTES: Final = 1024 * 1024
_ANSWER_BYTES: Final = 16 * 1024 * 1024
"""What a stream may have to carry at once: the others' answers wait behind it."""

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
        self._is_closed = False

    @staticmethod
    def carries(request: pb.GetImageRequest) -> bool:
        """Whether a stream is the way for this request.

        It is not for what is large, either way: others would wait behind it, and an answer above the channel's limit
        would be the end of them all. Nor for what pays every time: that takes seconds, and by a call of its own the
        service knows until when.
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
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout_s
        throttle = self._service.throttle
        tries = Tries(throttle)
        while True:
            stream = self._with_place(request.request_id)
            if stream is None:
                return await self._ask_alone(request, ends_s - loop.time())
            try:
                item, call_id = await stream.ask(request, ends_s)
            except _StreamFailedError as failed:
                error = failed.error
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    return await self._ask_alone(request, ends_s - loop.time())
            else:
                if item.HasField("response"):
                    throttle.succeeded()
                    return messages.read_result(item.response, call_id)
                error = error_of_item(item.failure)
                if error.code is not grpc.StatusCode.UNAVAILABLE:
                    raise error
                throttle.failed()
            pause_s = tries.pause_s(error)
            if not self._is_closed:
                await self._pause(pause_s, ends_s)
            if self._is_closed:
                raise error

    async def aclose(self) -> None:
        """End the streams. Calls that still wait for their answers end with UnreachableError."""
        self._is_closed = True
        for task in self._streams:
            task.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    def _with_place(self, request_id: str) -> _Stream | None:
        """The first stream with a place for a request of this id, so that the others run out of work and are closed."""
        for stream in self._streams.values():
            if stream.has_place(request_id):
                return stream
        if len(self._streams) >= MAX_STREAMS:
            return None
        idle_s = FURTHER_IDLE_S if self._streams else IDLE_S
        stream = _Stream(self._open_stream, self._service, idle_s)
        task = asyncio.create_task(stream.run(), name="multiplexed_stream")
        self._streams[task] = stream
        task.add_done_callback(self._streams.pop)
        return stream

    async def _pause(self, pause_s: float, ends_s: float) -> None:
        left_s = ends_s - asyncio.get_running_loop().time()
        await asyncio.sleep(min(pause_s, left_s))
        if pause_s >= left_s:
            raise too_late(self._service.address)


@dataclass(slots=True)
class _Service:
    """What is known of the service: `places` as its last stream told."""

    address: str
    throttle: Throttle = field(default_factory=Throttle)
    places: int = PLACES

    def learn(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Read what a stream's answer begins with."""
        stated = dict(metadata or ()).get(_PLACES_HEADER, "")
        if isinstance(stated, str) and _COUNT.fullmatch(stated):
            self.places = int(stated)


class _StreamFailedError(Exception):
    """A stream ended before a request of it was answered; `error` is what a call that ends like this fails with."""

    def __init__(self, error: CacheError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request on a stream, under the id it has there.

    `number`, from 1, tells when it was sent; 0 until then. Once `is_given_up` nobody waits for `answered` any more.
    """

    request: pb.GetImageRequest
    request_id: str
    answered: asyncio.Future[pb.BatchItem]
    number: int = 0
    is_given_up: bool = False


class _Stream:
    """One BatchGetImages stream. Whoever makes it runs `run` as a task."""

    def __init__(self, open_stream: OpenStream, service: _Service, idle_s: float) -> None:
        self._service = service
        self._idle_s = idle_s
        self._call_id = channel.call_id()
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        self._waiting: dict[str, _Waiting] = {}
        """All that have a place, by id: also those whose callers have gone, until their answers come."""
        self._unsent: deque[_Waiting] = deque()
        self._given_up = 0
        self._sent = 0
        self._made = 0
        self._has_work = asyncio.Event()
        self._idle_since_s = self._loop.time()
        self._idle_timer = self._loop.call_later(idle_s, self._close_if_idle)
        self._call = open_stream(self._messages(), self._call_id)

    def has_place(self, request_id: str) -> bool:
        """Whether a request may go on it, under this id if it has one."""
        return (
            self._is_open
            and not self._given_up
            and len(self._waiting) < self._service.places
            and (not request_id or request_id not in self._waiting)
        )

    async def ask(self, request: pb.GetImageRequest, ends_s: float) -> tuple[pb.BatchItem, str]:
        """The answer to a request there is a place for, and the x-request-id under which the service knows it.

        Raises:
            DeadlineError: there is none by `ends_s`, of the loop's time.
            _StreamFailedError: the stream ended before.
        """
        waiting = _Waiting(request, request.request_id or self._new_id(), self._loop.create_future())
        self._waiting[waiting.request_id] = waiting
        self._unsent.append(waiting)
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
        why: Callable[[], CacheError] = partial(unreachable, self._service.address)
        try:
            why = await self._read()
        finally:
            self._idle_timer.cancel()
            self._call.cancel()
            self._end(why)

    async def _read(self) -> Callable[[], CacheError]:
        """Hand out answers until the stream ends; what makes the error of those that have none."""
        try:
            self._service.learn(await self._call.initial_metadata())
            # What is no message here is gRPC's word for the end, or was none on the wire.
            while isinstance(response := await self._call.read(), pb.BatchGetImagesResponse):
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
        self._cancel_if_forsaken()

    def _expire(self, waiting: _Waiting) -> None:
        if not waiting.answered.done():
            waiting.answered.set_exception(too_late(self._service.address))

    def _give_up(self, waiting: _Waiting) -> None:
        if waiting.number == 0:
            self._unsent.remove(waiting)
            del self._waiting[waiting.request_id]
            return
        waiting.is_given_up = True
        self._given_up += 1
        self._cancel_if_forsaken()

    def _cancel_if_forsaken(self) -> None:
        if self._given_up and self._given_up == len(self._waiting):
            self._is_open = False
            self._call.cancel()

    def _end(self, why: Callable[[], CacheError]) -> None:
        self._is_open = False
        self._unsent.clear()
        self._has_work.set()  # its messages end, too
        unanswered = [waiting for waiting in self._waiting.values() if not waiting.answered.done()]
        self._waiting.clear()
        for waiting in unanswered:
            waiting.answered.set_exception(_StreamFailedError(why()))
        if unanswered and why().code is grpc.StatusCode.UNAVAILABLE:
            self._service.throttle.failed()

    def _close_if_idle(self) -> None:
        left_s = self._idle_s if self._waiting else self._idle_since_s + self._idle_s - self._loop.time()
        if left_s > 0:
            self._idle_timer = self._loop.call_later(left_s, self._close_if_idle)
        else:
            self._is_open = False
            self._has_work.set()

    async def _messages(self) -> AsyncGenerator[pb.BatchGetImagesRequest]:
        """What waits to be sent whenever something can be. They end when the stream is to take nothing more."""
        while self._is_open or self._unsent:
            if self._unsent:
                yield self._packed()
            else:
                self._has_work.clear()
                await self._has_work.wait()

    def _packed(self) -> pb.BatchGetImagesRequest:
        message = pb.BatchGetImagesRequest()
        size = 0
        while self._unsent:
            waiting = self._unsent[0]
            size += waiting.request.ByteSize()
            if size > _MESSAGE_BYTES and message.requests:
                break
            self._unsent.popleft()
            self._sent += 1
            waiting.number = self._sent
            request = message.requests.add()
            request.CopyFrom(waiting.request)
            request.request_id = waiting.request_id
        return message

    def _new_id(self) -> str:
        """An id that no caller has given."""
        while True:
            self._made += 1
            if (request_id := str(self._made)) not in self._waiting:
                return request_id


def _error_of(failure: grpc.RpcError, address: str) -> CacheError:
    return as_broken(error_of(failure, address))
