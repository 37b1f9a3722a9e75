"""The HTTP side as one application: every route, and what is answered where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from cacheserver.calls.call import request_id_of
from cacheserver.http.status import HttpError, status_of


def application(*parts: Sequence[BaseRoute]) -> Starlette:
    """The routes of all `parts`. A path or method that none of them has is answered in the shape of every error."""
    app = Starlette(
        routes=[route for part in parts for route in part],
        exception_handlers={HTTPException: _no_route},
    )
    app.router.redirect_slashes = False  # a library would send its POST elsewhere, and as a GET
    return app


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
