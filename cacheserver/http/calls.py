"""What surrounds every HTTP call: the reception of its call, who may send it, errors as answers, the request id."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from cacheserver.calls.call import Call
from cacheserver.calls.reception import Reception
from cacheserver.errors import CacheServerError, UnauthenticatedError, cut_off
from cacheserver.http.answer import Answer
from cacheserver.http.guard import Guard
from cacheserver.http.ready import Question, ReadyAnswer, ReadyRequest
from cacheserver.http.status import HttpError, HttpStatus, status_of
from cacheserver.tasks import end

T = TypeVar("T")

_log = structlog.get_logger(__name__)

Handler = Callable[[Request, Call], Awaitable[Answer]]

ReadyHandler = Callable[[Call, ReadyRequest], ReadyAnswer | None]
"""The answer to a call if it is ready; None, and nothing has happened, if it is not."""

_GONE = "CLIENT_GONE"
"""The code of a call whose client went away, in the log."""

_MAX_DEADLINE_S = 24 * 3600.0
_DEADLINES = ("x-stainless-read-timeout", "x-stainless-timeout")
"""In which OpenAI's libraries for Python and for JavaScript say how long they wait, in seconds."""

_MOST_KNOWN, _MOST_KNOWN_BYTES = 500, 4_096
"""So many heads are remembered, of at most so many bytes each."""

_CHALLENGE = {"www-authenticate": "Bearer"}


class HttpCalls:
    """Makes ASGI endpoints of plain handlers: they get the request and its call, return an answer, raise our errors."""

    def __init__(self, reception: Reception, guard: Guard) -> None:
        self._reception = reception
        self._guard = guard

    def endpoint(
        self, name: str, handler: Handler, *, is_open: bool = False, ready: ReadyHandler | None = None
    ) -> Endpoint:
        """The endpoint of a route; `name` is what its calls are called in logs.

        With `is_open` whoever calls is let in, and the handler says `authenticate` where it has to know who does.
        `ready` knows the answers that are ready.
        """
        admit = self._let_in if is_open else self._admit
        return Endpoint(name, handler, reception=self._reception, admit=admit, ready=ready)

    def authenticate(self, call: Call) -> None:
        """Find out who makes a call that was let in unseen.

        Raises:
            HttpError: it may come from a page of others, or from nobody we know.
        """
        self._guard.check(call.metadata)
        try:
            self._reception.authenticate(call)
        except UnauthenticatedError as error:
            is_given = "authorization" in call.metadata
            text = "Incorrect API key provided." if is_given else "Missing bearer authentication in header."
            text += " Send `Authorization: Bearer <token>` with the token of one of this service's callers."
            raise HttpError(HTTPStatus.UNAUTHORIZED, text, code="invalid_api_key", headers=_CHALLENGE) from error

    def _admit(self, call: Call) -> None:
        self._reception.let_in()
        self.authenticate(call)

    def _let_in(self, _: Call) -> None:
        self._reception.let_in()


class Endpoint:
    """One route, as an ASGI application."""

    def __init__(
        self,
        name: str,
        handler: Handler,
        *,
        reception: Reception,
        admit: Callable[[Call], None],
        ready: ReadyHandler | None = None,
    ) -> None:
        self._name = name
        self._handler = handler
        self._ready = ready
        self._reception = reception
        self._admit = admit
        self._known = _Known()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        metadata, deadline_s = self._known.of(scope["headers"])
        call = self._reception.begin(self._name, metadata, deadline_s=deadline_s)
        try:
            structlog.contextvars.bind_contextvars(**call.ids)  # each call has a task, and so a context, of its own
            await self._serve(Request(scope, receive, send), call, send)
        except ClientDisconnect:
            pass  # there is nobody to answer
        finally:
            self._reception.end()

    @property
    def has_ready(self) -> bool:
        """Whether any of its answers is ever ready."""
        return self._ready is not None

    def question(self, headers: Sequence[tuple[bytes, bytes]], request: ReadyRequest) -> Question:
        """What a request with these headers asks; its answer may be ready, and is then the whole call."""
        return partial(self._answer_at_once, *self._known.of(headers), request)

    def _answer_at_once(
        self, metadata: Mapping[str, str], deadline_s: float | None, request: ReadyRequest
    ) -> ReadyAnswer | None:
        if self._ready is None:
            return None
        call = self._reception.begin(self._name, metadata, deadline_s=deadline_s)
        try:
            self._admit(call)
            answer = self._ready(call, request)
            if answer is None:
                return None
            self._reception.succeeded(call)
            return ReadyAnswer(b"%sx-request-id: %s\r\n" % (answer.head, call.request_id.encode("ascii")), answer.body)
        except (CacheServerError, HttpError):
            return None  # who is turned away here is turned away again, and told why, where calls are answered
        except Exception:  # noqa: BLE001 - whatever it was, the parser would take it for a malformed request
            _log.exception("ready_answer_failed", **call.ids, rpc=self._name)
            return None
        finally:
            self._reception.end()

    async def _serve(self, request: Request, call: Call, send: Send) -> None:
        try:
            answer = await self._answer(request, call)
            if answer.length_bytes is None:  # only at its end it is known how the call went
                await answer(request.scope, request.receive, send)
                self._conclude(call, answer)
                return
        except (asyncio.CancelledError, ClientDisconnect):
            self._reception.conclude(call, _GONE)
            raise
        await answer(request.scope, request.receive, send)

    async def _answer(self, request: Request, call: Call) -> Answer:
        try:
            self._admit(call)
            answer = await self._handler(request, call)
        except ClientDisconnect:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets an answer that fits
            answer = self._failed(call, error).answer()
        else:
            if answer.length_bytes is not None:
                self._conclude(call, answer)
        answer.headers.update(call.trailers)
        answer.headers["x-request-id"] = call.request_id
        if self._reception.going_down.is_set():
            answer.headers["connection"] = "close"
        return answer

    def _conclude(self, call: Call, answer: Answer) -> None:
        if answer.error is None:
            self._reception.succeeded(call)
        else:
            self._failed(call, answer.error)

    def _failed(self, call: Call, error: Exception) -> HttpStatus:
        status = status_of(error, request_id=call.request_id)
        exc_info = error if status.status is HTTPStatus.INTERNAL_SERVER_ERROR else None
        self._reception.failed(call, str(int(status.status)), status.reason, exc_info=exc_info)
        cut_off(error)
        return status


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, unless the client goes away first: then `work` is cancelled.

    To be called once the body is read. Work that never waits costs nothing more: only what the event loop comes back
    to has somebody who listens for the client beside it.

    Raises:
        ClientDisconnect: nobody waits for it any more.
    """
    listener = _Listener(request)
    try:
        return await work
    except asyncio.CancelledError:
        if listener.has_cancelled():
            raise ClientDisconnect from None
        raise
    finally:
        await listener.aclose()


class _Listener:
    """Cancels the task it was made in when its client goes away."""

    def __init__(self, request: Request) -> None:
        self._request = request
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._task = task
        self._cancellations = task.cancelling()
        self._listening: asyncio.Task[None] | None = None
        self._begin = asyncio.get_running_loop().call_soon(self._start)
        self._is_gone = False

    def has_cancelled(self) -> bool:
        """Whether it was this that cancelled the task, and nobody else did; then the task is so no longer."""
        return self._is_gone and self._task.uncancel() <= self._cancellations

    async def aclose(self) -> None:
        """Listen no longer."""
        self._begin.cancel()
        if self._listening is not None:
            await end([self._listening])

    def _start(self) -> None:
        self._listening = asyncio.create_task(self._listen(), name="client_gone")

    async def _listen(self) -> None:
        await gone(self._request)
        self._is_gone = True
        self._task.cancel()


async def gone(request: Request) -> None:
    """Return when the client of a request goes away. To be called once the body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Known:
    """Headers as metadata, and the deadline in them. Remembered: most clients send the same again and again."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[bytes, bytes], ...], tuple[Mapping[str, str], float | None]] = {}

    def of(self, headers: Sequence[tuple[bytes, bytes]]) -> tuple[Mapping[str, str], float | None]:
        """What these headers say."""
        name = tuple(headers)
        known = self._known.get(name)
        if known is None:
            metadata = _metadata(headers)
            known = metadata, _deadline_s(metadata)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            if sum(len(name) + len(value) for name, value in headers) <= _MOST_KNOWN_BYTES:
                self._known[name] = known
        return known


def _metadata(headers: Sequence[tuple[bytes, bytes]]) -> Mapping[str, str]:
    """Headers by name; those sent more than once as one, with commas between (RFC 9110 section 5.3)."""
    metadata: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        metadata[name] = f"{metadata[name]}, {value}" if name in metadata else value
    return metadata


def _deadline_s(metadata: Mapping[str, str]) -> float | None:
    """How long the caller's library says it waits for an answer, in seconds."""
    stated = next((metadata[name] for name in _DEADLINES if name in metadata), "")
    try:
        seconds = float(stated)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and 0 < seconds <= _MAX_DEADLINE_S else None
