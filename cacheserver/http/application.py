"""The HTTP side as one application: every route, and what is answered where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from cacheserver.calls.call import request_id_of
from cacheserver.http.calls import Endpoint
from cacheserver.http.ready import Questions
from cacheserver.http.status import HttpError, status_of


class Application:
    """The routes of all `parts`. A path or method that none of them has is answered in the shape of every error.

    Calls of a path without parameters reach their endpoint straight away: it answers whatever happens in it, and
    needs nothing of what starlette puts around a route.
    """

    def __init__(self, *parts: Sequence[BaseRoute]) -> None:
        routes = [route for part in parts for route in part]
        self._rest = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
        self._rest.router.redirect_slashes = False  # a library would send its POST elsewhere, and as a GET
        self._straight: dict[tuple[str, str], Endpoint] = {
            (method, route.path): route.app
            for route in routes
            if isinstance(route, Route) and isinstance(route.app, Endpoint) and not route.param_convertors
            for method in route.methods or ()
        }
        self._ready = {
            (method.encode("ascii"), route.path.partition("{")[0].encode("ascii")): route.app.question
            for route in routes
            if isinstance(route, Route) and isinstance(route.app, Endpoint) and route.app.has_ready
            for method in (route.methods or set()) - {"HEAD"}
        }

    def questions(self, method: bytes, target: bytes) -> Questions | None:
        """See `FindQuestions`. A route with ready answers has one parameter at most, the last part of its path."""
        path = target.partition(b"?")[0]
        return self._ready.get((method, path)) or self._ready.get((method, path[: path.rfind(b"/") + 1]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        app = self._straight.get((scope["method"], scope["path"]), self._rest)
        await app(scope, receive, send)


async def _no_route(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    status = HTTPStatus(error.status_code)
    text, code = _TOLD.get(status, (status.phrase, None))
    told = HttpError(status, text, code=code, headers=error.headers)
    request_id = request_id_of(request.headers)
    answer = status_of(told, request_id=request_id).answer()
    answer.headers["x-request-id"] = request_id
    return answer  # type: ignore[return-value]  # starlette calls it as the ASGI application it is


_TOLD = {
    HTTPStatus.NOT_FOUND: ("There is nothing at this path; the API begins with /v1.", "unknown_url"),
    HTTPStatus.METHOD_NOT_ALLOWED: ("This path does not take this method.", "method_not_supported"),
}
