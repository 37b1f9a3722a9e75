"""What surrounds every rpc: parsing, the reception of its call, errors as statuses.

The rpcs themselves get a parsed message and a `Call`, return or yield bytes, and raise our own errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Generic, TypeAlias, TypeVar

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from cacheserver.calls.call import Call
from cacheserver.calls.reception import OK, Reception
from cacheserver.errors import CacheServerError, MalformedMessageError
from cacheserver.rpc.status import RpcStatus, status_of

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
M = TypeVar("M", bound=Message)


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
        return parse(self._message_type, raw)


class Calls:
    """Makes grpc handlers of plain rpc methods."""

    def __init__(self, reception: Reception) -> None:
        """`reception` lets the calls in."""
        self.reception = reception

    def unary(self, rpc: str, message_type: type[M], method: Callable[[M, Call], Awaitable[bytes]]) -> Handler:
        """The handler of an rpc that takes one message and answers one."""

        async def handle(raw: bytes, context: Context) -> bytes:
            async with self._call(rpc, context) as call:
                return await method(parse(message_type, raw), call)

        return grpc.unary_unary_rpc_method_handler(handle)

    def unary_ready(
        self,
        rpc: str,
        method: Callable[[bytes, Call], Awaitable[bytes]],
        ready: Callable[[bytes, Call], bytes | None],
    ) -> Handler:
        """The same for an rpc whose answers may lie ready: both get the message as it came, `ready` first.

        What `ready` returns is the answer, sent at once; after None nothing has happened, and `method` answers.
        """

        async def handle(raw: bytes, context: Context) -> bytes:
            call = self._begin(rpc, context)
            if (answer := self._answer_at_once(ready, raw, call, context)) is not None:
                return answer
            async with self._received(call, context):
                return await method(raw, call)

        return grpc.unary_unary_rpc_method_handler(handle)

    def _answer_at_once(
        self, ready: Callable[[bytes, Call], bytes | None], raw: bytes, call: Call, context: Context
    ) -> bytes | None:
        try:
            self.reception.admit(call)
            answer = ready(raw, call)
        except CacheServerError:
            return None  # the same is found out on the ordinary way, where it is told
        if answer is not None:
            self._succeeded(call, context)
        return answer

    def streams_out(
        self, rpc: str, message_type: type[M], method: Callable[[M, Call], AsyncGenerator[bytes, None]]
    ) -> Handler:
        """The handler of an rpc that takes one message and answers many."""

        async def handle(raw: bytes, context: Context) -> None:
            async with self._call(rpc, context) as call, aclosing(method(parse(message_type, raw), call)) as parts:
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

        It is counted, booked, logged and remembered as a call. The task is the stream's to await or cancel.
        """
        call = self.reception.begin_item(stream, item_id)
        task = asyncio.create_task(self._answer_item(call, answer), name="item")
        task.add_done_callback(lambda _: self.reception.end())
        return task

    async def _answer_item(self, call: Call, answer: Callable[[Call], Awaitable[bytes]]) -> bytes | RpcStatus:
        with structlog.contextvars.bound_contextvars(request_id=call.request_id):
            try:
                answered = await answer(call)
            except asyncio.CancelledError:
                self.reception.conclude(call, self._how_gone(call))
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets a status that fits
                return self._failed(call, error)
            self.reception.conclude(call, OK)
            return answered

    def _call(self, rpc: str, context: Context) -> AbstractAsyncContextManager[Call]:
        return self._received(self._begin(rpc, context), context)

    def _begin(self, rpc: str, context: Context) -> Call:
        # Ended when the answer has gone out, which is later than when the method returns.
        context.add_done_callback(self._end)  # type: ignore[arg-type]  # the stub has a class for any callable
        metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self.reception.begin(rpc, metadata, deadline_s=context.time_remaining())

    @asynccontextmanager
    async def _received(self, call: Call, context: Context) -> AsyncIterator[Call]:
        with structlog.contextvars.bound_contextvars(**call.ids):
            try:
                self.reception.admit(call)
                yield call
            except (asyncio.CancelledError, grpc.aio.BaseError):
                # The caller has gone, or its deadline passed. BaseError: grpc cannot write to it any more.
                self.reception.conclude(call, self._how_gone(call))
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets a status that fits
                status = self._failed(call, error)
                trailers = (*status.trailers, ("x-request-id", call.request_id))
                await context.abort(status.code, status.message, trailers)
            self._succeeded(call, context)

    def _succeeded(self, call: Call, context: Context) -> None:
        context.set_trailing_metadata((*call.trailers, ("x-request-id", call.request_id)))
        self.reception.succeeded(call)

    def _end(self, ctx: Context) -> None:  # noqa: ARG002 - grpc names and passes it
        self.reception.end()

    def _failed(self, call: Call, error: Exception) -> RpcStatus:
        status = status_of(error, request_id=call.request_id)
        exc_info = error if status.code is grpc.StatusCode.INTERNAL else None
        self.reception.failed(call, status.code.name, status.reason, exc_info=exc_info)
        return status

    def _how_gone(self, call: Call) -> str:
        is_late = self.reception.is_late(call)
        return (grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED).name


def parse(message_type: type[M], raw: bytes) -> M:
    """The message of these bytes; raises MalformedMessageError if they are none."""
    try:
        return message_type.FromString(raw)
    except DecodeError as error:
        raise MalformedMessageError(f"The bytes are not a {message_type.__name__}.") from error
