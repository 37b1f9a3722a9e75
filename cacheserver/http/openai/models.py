"""`GET /v1/models`: what this service makes pictures with."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from starlette.requests import Request

from cacheserver.calls.call import Call
from cacheserver.http.answer import Answer, json_answer
from cacheserver.http.status import HttpError

_OWNER = "cacheserver"


class Models:
    """Tells which models there are. `created` is when this service began to serve them: nobody knows more."""

    def __init__(self, names: Sequence[str], *, started_s: float) -> None:
        """`names` are those of every model that some upstream serves; `started_s` in seconds since 1970."""
        self._names = names
        self._created = int(started_s)

    async def listed(self, request: Request, call: Call) -> Answer:  # noqa: ARG002 - as every handler
        """All of them."""
        return json_answer({"object": "list", "data": [self._model(name) for name in self._names]})

    async def one(self, request: Request, call: Call) -> Answer:  # noqa: ARG002 - as every handler
        """One of them. Raises HttpError, 404, where there is none of this name."""
        name = request.path_params["model"]
        if name not in self._names:
            text = "The model does not exist or no upstream serves it; GET /v1/models has those that are served."
            raise HttpError(HTTPStatus.NOT_FOUND, text, param="model", code="model_not_found")
        return json_answer(self._model(name))

    def _model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": _OWNER}
