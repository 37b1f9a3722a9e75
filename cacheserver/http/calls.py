"""What surrounds every HTTP call: the reception of its call, who may send it, errors as answers, the request id."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from cacheserver.calls.call import Call
from cacheserver.calls.reception import Reception
from cacheserver.http.answer import Answer
from cacheserver.http.guard import Guard
from cacheserver.http.status import status_of

T = TypeVar("T")

Handler = Callable[[Request, Call], Awaitable[Answer]]

_GONE = "CLIENT_GONE"
"""The code of a call whose client went away, in the log."""

_MAX_DEADLINE_S = 24 * 3600.0


class HttpCalls:
    """Makes ASGI endpoints of plain handlers: they get the request and its call, return an answer, raise our errors."""

    def __init__(self, reception: Reception, guard: Guard) -> None:
        self._reception = reception
        self._guard = guard

    def endpoint(self, name: str, handler: Handler) -> Endpoint:
        """The endpoint of a route; `name` is what its calls are called in logs."""
        return Endpoint(name, handler, reception=self._reception, guard=self._guard)


class Endpoint:
    """One route, as an ASGI application."""

    def __init__(self, name: str, handler: Handler, *, reception: Reception, guard: Guard) -> None:
        self._name = name
        self._handler = handler
        self._reception = reception
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call."""
        metadata = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        call = self._reception.begin(self._name, metadata, deadline_s=_deadline_s(metadata))
        try:
            with structlog.contextvars.bound_contextvars(**call.ids):
                await self._serve(Request(scope, receive, send), call)
        finally:
            self._reception.end()

    async def _serve(self, request: Request, call: Call) -> None:
        try:
            self._guard.check(call.metadata)
            self._reception.admit(call)
            answer = await self._handler(request, call)
        except (asyncio.CancelledError, ClientDisconnect):
            self._reception.conclude(call, _GONE)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the caller gets an answer that fits
            status = status_of(error, request_id=call.request_id)
            exc_info = error if status.status is HTTPStatus.INTERNAL_SERVER_ERROR else None
            self._reception.failed(call, str(int(status.status)), status.reason, exc_info=exc_info)
            answer = status.answer()
        else:
            self._reception.succeeded(call)
        answer.headers["x-request-id"] = call.request_id
        await answer(request.scope, request.receive, request._send)  # noqa: SLF001 - starlette has no other name for it


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, unless the client goes away first: then `work` is cancelled.

    To be called once the body is read.

    Raises:
        ClientDisconnect: nobody waits for it any more.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({working, leaving})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _deadline_s(metadata: Mapping[str, str]) -> float | None:
    """How long the caller's library says it waits for an answer, in seconds."""
    try:
        seconds = float(metadata.get("x-stainless-read-timeout", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and 0 < seconds <= _MAX_DEADLINE_S else None
