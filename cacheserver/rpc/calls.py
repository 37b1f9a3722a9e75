"""What surrounds every call: who asks, parsing, error mapping, the request id, one log line.

The rpcs themselves get a parsed message and a `Call`, return or yield bytes, and raise our own errors.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeAlias, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from cacheserver.errors import MalformedMessageError, OverloadedError
from cacheserver.interfaces import Books, Clock
from cacheserver.model import Caller, Identity, Pending, Served
from cacheserver.recall import Recall
from cacheserver.rpc.auth import Authenticator
from cacheserver.rpc.status import RpcStatus, status_of

_log = structlog.get_logger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
M = TypeVar("M", bound=Message)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_FALLBACKS = re.compile(r"[1-9][0-9]{0,5}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


_NOBODY = Caller("", frozenset())


@dataclass(slots=True)
class Call:
    """One call in progress. Rpc methods read who asks and until when, and fill in what lies below `caller`.

    `model` and `quality` are those asked for, empty for a call that asks by key.
    `wanted` is the identity of the picture it asks for, `answer` what it was answered with. `items` counts those of a
    stream.
    """

    rpc: str
    metadata: Mapping[str, str]
    request_id: str
    deadline_s: float | None
    started_s: float
    caller: Caller = _NOBODY
    namespace: str = ""
    model: str = ""
    quality: str = ""
    trailers: list[tuple[str, str]] = field(default_factory=list)
    wanted: Identity | None = None
    answer: Sequence[Served] | Pending | None = None
    items: int = 0


class Parts(Generic[M]):
    """The messages of a client's stream, parsed as they come. Can be read once."""

    def __init__(self, message_type: type[M], context: Context) -> None:
        self._message_type = message_type
        self._context = context

    def __aiter__(self) -> Parts[M]:
        return self

    async def __anext__(self) -> M:
        """The next message; raises MalformedMessageError if its bytes are none."""
        raw = await self._context.read()
        if not isinstance(raw, bytes):  # grpc.aio.EOF
            raise StopAsyncIteration
        return _parse(self._message_type, raw)


class Calls:
    """Makes grpc handlers of plain rpc methods, and knows how many calls are in progress."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        books: Books,
        clock: Clock,
        max_in_progress: int,
        recall: Recall | None = None,
    ) -> None:
        """Calls beyond `max_in_progress` are turned away before they cost anything. `recall` is told of every call."""
        self._recall = recall
        self._max_in_progress = max_in_progress
        self._authenticator = authenticator
        self._books = books
        self._clock = clock
        self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.going_down = asyncio.Event()
        """Set once the service only answers what has begun: a stream of items takes no further one."""

    @property
    def are_full(self) -> bool:
        """Whether one more would be turned away."""
        return self._in_progress >= self._max_in_progress

    async def idle(self) -> None:
        """Have streams take no more items, and return when every call that has begun is answered."""
        self.going_down.set()
        await self._idle.wait()

    def unary(self, rpc: str, message_type: type[M], method: Callable[[M, Call], Awaitable[bytes]]) -> Handler:
        """The handler of an rpc that takes one message and answers one."""

        async def handle(raw: bytes, context: Context) -> bytes:
            async with self._call(rpc, context) as call:
                return await method(_parse(message_type, raw), call)

        return grpc.unary_unary_rpc_method_handler(handle)

    def streams_out(
        self, rpc: str, message_type: type[M], method: Callable[[M, Call], AsyncGenerator[bytes, None]]
    ) -> Handler:
        """The handler of an rpc that takes one message and answers many."""

        async def handle(raw: bytes, context: Context) -> None:
            async with self._call(rpc, context) as call, aclosing(method(_parse(message_type, raw), call)) as parts:
                async for part in parts:
                    await context.write(part)

        return grpc.unary_stream_rpc_method_handler(handle)

    def streams_in(
        self, rpc: str, message_type: type[M], method: Callable[[Parts[M], Call], Awaitable[bytes]]
    ) -> Handler:
        """The handler of an rpc that takes many messages and answers one."""

        async def handle(_: AsyncIterator[bytes], context: Context) -> bytes:
            async with self._call(rpc, context) as call:
                return await method(Parts(message_type, context), call)

        return grpc.stream_unary_rpc_method_handler(handle)

    def streams_both(
        self, rpc: str, message_type: type[M], method: Callable[[Parts[M], Call], AsyncGenerator[bytes, None]]
    ) -> Handler:
        """The handler of an rpc that takes many messages and answers many."""

        async def handle(_: AsyncIterator[bytes], context: Context) -> None:
            async with (
                self._call(rpc, context) as call,
                aclosing(method(Parts(message_type, context), call)) as answers,
            ):
                async for answer in answers:
                    await context.write(answer)

        return grpc.stream_stream_rpc_method_handler(handle)

    def item(
        self, stream: Call, item_id: str, answer: Callable[[Call], Awaitable[bytes]]
    ) -> asyncio.Task[bytes | RpcStatus]:
        """Begin one item of a stream, as a call of its own: what `answer` returns, or the status it fails with.

        It is counted, booked, logged and remembered as a call, under the stream's request id and its own (or its number
        in the stream, where that is not fit for a log), and has the stream's caller, metadata and deadline. The task is
        the stream's to await or cancel.
        """
        stream.items += 1
        now_s = self._clock.monotonic_s()
        left_s = None if stream.deadline_s is None else max(0.0, stream.started_s + stream.deadline_s - now_s)
        request_id = f"{stream.request_id}/{item_id if _REQUEST_ID.fullmatch(item_id) else f'?{stream.items}'}"
        call = Call(stream.rpc, stream.metadata, request_id, left_s, now_s, stream.caller)
        task = asyncio.create_task(self._answer_item(call, answer), name="item")
        self._in_progress += 1
        task.add_done_callback(self._item_ended)
        return task

    def _item_ended(self, _: object) -> None:
        self._in_progress -= 1  # its stream goes on, so this is never the last

    async def _answer_item(self, call: Call, answer: Callable[[Call], Awaitable[bytes]]) -> bytes | RpcStatus:
        with structlog.contextvars.bound_contextvars(request_id=call.request_id):
            try:
                answered = await answer(call)
            except asyncio.CancelledError:
                self._conclude(call, self._how_gone(call))
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets a status that fits
                return self._failed(call, error)
            self._conclude(call, grpc.StatusCode.OK)
            return answered

    @asynccontextmanager
    async def _call(self, rpc: str, context: Context) -> AsyncIterator[Call]:
        call = self._begin(rpc, context)
        ids = {"request_id": call.request_id, **_trace_id(call.metadata)}
        with structlog.contextvars.bound_contextvars(**ids):
            try:
                call.caller = self._admit(call)
                yield call
            except (asyncio.CancelledError, grpc.aio.BaseError):
                # The caller has gone, or its deadline passed. BaseError: grpc cannot write to it any more.
                self._conclude(call, self._how_gone(call))
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets a status that fits
                await self._fail(call, context, error)
            if fallbacks := _fallbacks(call.metadata):
                self._books.client_fallbacks(call.namespace, fallbacks)
            context.set_trailing_metadata((*call.trailers, ("x-request-id", call.request_id)))
            self._conclude(call, grpc.StatusCode.OK)

    def _begin(self, rpc: str, context: Context) -> Call:
        self._in_progress += 1
        self._idle.clear()
        # Called when the answer has gone out, which is later than when the method returns.
        context.add_done_callback(self._end)  # type: ignore[arg-type]  # the stub has a class for any callable
        metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        return Call(rpc, metadata, _request_id(metadata), context.time_remaining(), self._clock.monotonic_s())

    def _admit(self, call: Call) -> Caller:
        if self._in_progress > self._max_in_progress:
            raise OverloadedError(f"More than {self._max_in_progress} calls at a time; try again.")
        return self._authenticator.authenticate(call.metadata)

    def _end(self, ctx: Context) -> None:  # noqa: ARG002 - grpc names and passes it
        self._in_progress -= 1
        if not self._in_progress:
            self._idle.set()

    def _failed(self, call: Call, error: Exception) -> RpcStatus:
        status = status_of(error, request_id=call.request_id)
        self._books.error(status.reason)
        exc_info = error if status.code is grpc.StatusCode.INTERNAL else None
        self._conclude(call, status.code, reason=status.reason, exc_info=exc_info)
        return status

    async def _fail(self, call: Call, context: Context, error: Exception) -> NoReturn:
        status = self._failed(call, error)
        await context.abort(status.code, status.message, (*status.trailers, ("x-request-id", call.request_id)))

    def _how_gone(self, call: Call) -> grpc.StatusCode:
        is_late = call.deadline_s is not None and self._clock.monotonic_s() - call.started_s >= call.deadline_s
        return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED

    def _conclude(
        self, call: Call, code: grpc.StatusCode, *, reason: str = "", exc_info: Exception | None = None
    ) -> None:
        """Write the call's one line, and remember it if its caller is known."""
        seconds = self._clock.monotonic_s() - call.started_s
        if self._recall is not None and call.caller is not _NOBODY:
            self._recall.note(
                call.request_id,
                rpc=call.rpc,
                time_s=self._clock.now_s() - seconds,
                caller=call.caller.name,
                namespace=call.namespace,
                seconds=seconds,
                reason="" if code is grpc.StatusCode.OK else reason or code.name,
                answer=call.answer,
                wanted=call.wanted,
            )
        log = _log.error if exc_info else _log.info
        log(
            "call",
            rpc=call.rpc,
            code=code.name,
            reason=reason,
            caller=call.caller.name,
            namespace=call.namespace,
            seconds=round(seconds, 6),
            exc_info=exc_info,
        )


def _parse(message_type: type[M], raw: bytes) -> M:
    try:
        return message_type.FromString(raw)
    except DecodeError as error:
        raise MalformedMessageError(f"The bytes are not a {message_type.__name__}.") from error


def _request_id(metadata: Mapping[str, str]) -> str:
    """The caller's id of the call if it is fit for a log line, else one of ours."""
    stated = metadata.get("x-request-id", "")
    return stated if _REQUEST_ID.fullmatch(stated) else secrets.token_hex(16)


def _fallbacks(metadata: Mapping[str, str]) -> int:
    """How many pictures the caller says it had made without us; 0 if it says nothing fit to be counted."""
    stated = metadata.get("x-fallbacks", "")
    return int(stated) if _FALLBACKS.fullmatch(stated) else 0


def _trace_id(metadata: Mapping[str, str]) -> dict[str, str]:
    match = _TRACEPARENT.fullmatch(metadata.get("traceparent", ""))
    return {"trace_id": match[1]} if match else {}
