"""What surrounds every rpc: parsing, the reception of its call, errors as statuses.

The rpcs themselves get a parsed message and a `Call`, return or yield bytes, and raise our own errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any, Generic, NoReturn, TypeAlias, TypeVar, cast

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from cacheserver.calls.again import Seen
from cacheserver.calls.auth import CERTIFIED
from cacheserver.calls.call import Call
from cacheserver.calls.reception import OK, Reception
from cacheserver.errors import MalformedMessageError, OverloadedError, cut_off
from cacheserver.rpc.status import RpcStatus, status_of

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]
AnswerRaw: TypeAlias = Callable[[bytes, Call], Awaitable[bytes]]
FindReady: TypeAlias = Callable[[bytes, Mapping[str, str]], tuple[bytes, tuple[tuple[str, str], ...]] | Seen | None]
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

    def unary_ready(self, rpc: str, method: AnswerRaw, ready: FindReady) -> ReadyRpc:
        """The same for an rpc whose answers may lie ready. Both get the message as it came.

        `ready` answers a call that has not even begun, `method` those it does not.
        """
        return ReadyRpc(self, rpc, method, ready)

    def streams_out(
        self,
        rpc: str,
        message_type: type[M],
        method: Callable[[M, Call], AsyncGenerator[bytes, None]],
        stalled_s: float | None = None,
    ) -> Handler:
        """The handler of an rpc that takes one message and answers many.

        A call that takes nothing of its answer for `stalled_s` seconds fails as OVERLOADED; None waits for ever.
        """

        async def handle(raw: bytes, context: Context) -> None:
            async with self._call(rpc, context) as call, aclosing(method(parse(message_type, raw), call)) as parts:
                async for part in parts:
                    await _write(context, part, stalled_s)

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
        self,
        rpc: str,
        message_type: type[M],
        method: Callable[[Parts[M], Call], AsyncGenerator[bytes, None]],
        headers: Sequence[tuple[str, str]] = (),
    ) -> Handler:
        """The handler of an rpc that takes many messages and answers many. `headers`, if any, go out as it begins."""

        async def handle(_: AsyncIterator[bytes], context: Context) -> None:
            async with (
                self._call(rpc, context) as call,
                aclosing(method(Parts(message_type, context), call)) as answers,
            ):
                if headers:
                    await context.send_initial_metadata(headers)
                async for answer in answers:
                    await context.write(answer)

        return grpc.stream_stream_rpc_method_handler(handle)

    def ready_item(
        self, call: Call, request: bytes, ready: Callable[[bytes, Call], bytes | None]
    ) -> bytes | RpcStatus | None:
        """What `ready` answers to one item of a stream, or the status it fails with. None: the item is still to answer.

        `call` is the item's own, as the reception began it; whoever serves the stream ends it.
        """
        try:
            answered = ready(request, call)
        except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets a status that fits
            return self._failed(call, error)
        if answered is not None:
            self.reception.conclude(call, OK)
        return answered

    async def item(self, call: Call, answer: Callable[[Call], Awaitable[bytes]]) -> bytes | RpcStatus:
        """What `answer` returns for one item of a stream, or the status it fails with; `call` as for `ready_item`."""
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
        return self.received(self._begin(rpc, context), context)

    def _begin(self, rpc: str, context: Context) -> Call:
        return self.begun(rpc, self.said(context.invocation_metadata() or (), context), context)

    def said(self, metadata: Iterable[tuple[str, str | bytes]], context: Context) -> dict[str, str]:
        """A call's metadata, and whom the certificate of its connection names where that may be somebody."""
        said = cast("dict[str, str]", dict(metadata))  # at what is in bytes nobody looks
        if self.reception.knows_certificates and "authorization" not in said:
            said[CERTIFIED] = "\n".join(_names(context.auth_context()))
        return said

    def begun(self, rpc: str, metadata: Mapping[str, str], context: Context) -> Call:
        """A call that begins, and ends when its answer has gone out: that is later than when its method returns."""
        # grpc's own callbacks lead in a circle: everything it has of a call would stay until garbage is collected.
        task = cast("asyncio.Task[None]", asyncio.current_task())
        task.add_done_callback(self.reception.end)
        return self.reception.begin(rpc, metadata, deadline_s=context.time_remaining())

    @asynccontextmanager
    async def received(self, call: Call, context: Context) -> AsyncIterator[Call]:
        """A call from when it is let in until it is answered: concluded, and what is raised told as a status."""
        with structlog.contextvars.bound_contextvars(**call.ids):
            try:
                self.reception.admit(call)
                yield call
            except (asyncio.CancelledError, grpc.aio.BaseError):
                # The caller has gone, or its deadline passed. BaseError: grpc cannot write to it any more.
                self.reception.conclude(call, self._how_gone(call))
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets a status that fits
                await self.abort(call, error, context)
            self.succeeded(call, context)

    async def abort(self, call: Call, error: Exception, context: Context) -> NoReturn:
        """End a call with the status that fits what was raised."""
        status = self._failed(call, error)
        call.answer = None  # the status goes out when what was written is read, and that may be never
        trailers = (*status.trailers, ("x-request-id", call.request_id))
        try:
            await context.abort(status.code, status.message, trailers)
        except grpc.aio.AbortError as aborted:
            # grpc keeps it in a circle, and with it what the call had in hand.
            task = cast("asyncio.Task[None]", asyncio.current_task())
            task.add_done_callback(partial(_cut_off, aborted))
            raise

    def succeeded(self, call: Call, context: Context) -> None:
        """The call is answered."""
        context.set_trailing_metadata((*call.trailers, ("x-request-id", call.request_id)))
        self.reception.succeeded(call)

    def _failed(self, call: Call, error: Exception) -> RpcStatus:
        status = status_of(error, request_id=call.request_id)
        exc_info = error if status.code is grpc.StatusCode.INTERNAL else None
        self.reception.failed(call, status.code.name, status.reason, exc_info=exc_info)
        return status

    def _how_gone(self, call: Call) -> str:
        is_late = self.reception.is_late(call)
        return (grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED).name


class ReadyRpc:
    """An rpc that takes one message and answers one, at once where the answer lies ready."""

    def __init__(self, calls: Calls, rpc: str, method: AnswerRaw, ready: FindReady) -> None:
        self.calls = calls
        self.rpc = rpc
        self.method = method
        self.ready = ready


class _ReadyCall(grpc.RpcMethodHandler):  # type: ignore[type-arg]  # generic in its stub alone
    """The handler of one call of such an rpc: grpc has read its metadata, and to read it again is half of a hit."""

    request_streaming = response_streaming = False
    request_deserializer = response_serializer = None

    def __init__(self, rpc: ReadyRpc, metadata: Metadata) -> None:
        self._rpc = rpc
        self._metadata = metadata
        self._was_ready = False

    def __del__(self) -> None:
        """End a call whose answer lay ready: grpc lets go of its handler once that has gone out, or cannot any more.

        The task would tell that too, as it does of all other calls: at a twentieth of what a hit costs.
        """
        if self._was_ready:
            self._rpc.calls.reception.end()

    async def unary_unary(self, raw: bytes, context: Context) -> bytes:  # type: ignore[override]  # that of grpc.aio
        rpc, calls = self._rpc, self._rpc.calls
        said = calls.said(self._metadata, context)
        try:
            ready = rpc.ready(raw, said)
        except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets a status that fits
            await calls.abort(calls.begun(rpc.rpc, said, context), error, context)
        if ready is not None and not isinstance(ready, Seen):
            self._was_ready = True
            answer, trailers = ready
            context.set_trailing_metadata(trailers)
            return answer
        call = calls.begun(rpc.rpc, said, context)
        call.seen = ready
        async with calls.received(call, context):
            return await rpc.method(raw, call)


class Service(grpc.ServiceRpcHandler):
    """The rpcs of a service by their names, as a grpc.aio server needs them."""

    def __init__(self, name: str, rpcs: Mapping[str, Handler | ReadyRpc]) -> None:
        self._name = name
        self._rpcs = {f"/{name}/{rpc}": handler for rpc, handler in rpcs.items()}

    def service_name(self) -> str:
        """Its full name."""
        return self._name

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The handler of a call; None if it is of no rpc of ours."""
        rpc = self._rpcs.get(handler_call_details.method)
        return _ReadyCall(rpc, handler_call_details.invocation_metadata) if isinstance(rpc, ReadyRpc) else rpc


def _names(shown: Mapping[str, Iterable[bytes]]) -> list[str]:
    """The SPIFFE URIs of a certificate; without one, its other URIs and DNS names; without any, its common name.

    grpc has verified it: without, there is no connection.
    """
    uris = _texts(shown.get("peer_uri", ()))
    spiffe = [uri for uri in uris if uri.startswith("spiffe://")]
    return spiffe or [*uris, *_texts(shown.get("peer_dns", ()))] or _texts(shown.get("x509_common_name", ()))


def _texts(names: Iterable[bytes]) -> list[str]:
    texts = (name.decode(errors="replace") for name in names)
    return [text for text in texts if text.isprintable()]  # one with an end of line in it would pass for two


def _cut_off(error: Exception, _: asyncio.Task[None]) -> None:
    cut_off(error)


async def _write(context: Context, part: bytes, stalled_s: float | None) -> None:
    try:
        async with asyncio.timeout(stalled_s):
            await context.write(part)
    except TimeoutError:
        text = f"Nothing of the answer was read for {stalled_s:g} s; ask again, for the rest with read_offset."
        raise OverloadedError(text) from None


def parse(message_type: type[M], raw: bytes) -> M:
    """The message of these bytes; raises MalformedMessageError if they are none."""
    try:
        return message_type.FromString(raw)
    except DecodeError as error:
        raise MalformedMessageError(f"The bytes are not a {message_type.__name__}.") from error
