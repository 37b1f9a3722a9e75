"""`POST /v1/images/generations`, and the endpoint beside it that OpenAI has retired."""

from __future__ import annotations

from http import HTTPStatus
from typing import NoReturn

from starlette.requests import Request

from cacheserver.calls.asking import Asking
from cacheserver.calls.call import Call
from cacheserver.http.answer import Answer
from cacheserver.http.body import read_body, read_json
from cacheserver.http.openai.memo import name_of
from cacheserver.http.openai.pictures import Pictures
from cacheserver.http.openai.reading import MAX_JSON_BYTES, Fields, read_wanted
from cacheserver.http.ready import ReadyAnswer, ReadyRequest
from cacheserver.http.status import HttpError


class Generations:
    """Makes pictures from a prompt, or has them."""

    def __init__(self, pictures: Pictures, *, asking: Asking) -> None:
        self._pictures = pictures
        self._asking = asking

    async def __call__(self, request: Request, call: Call) -> Answer:
        """Answer one call."""
        with self._asking.booked(call):
            namespace = self._pictures.namespace(call)
            body = await read_body(request, max_bytes=MAX_JSON_BYTES)
            name = name_of(call, namespace, body)
            if name is not None and (hit := self._pictures.hit(name, request, call)) is not None:
                return hit
            wanted = read_wanted(Fields(read_json(request, body)), namespace)
            return await self._pictures.answer(request, call, namespace, wanted, name)

    def ready(self, call: Call, request: ReadyRequest) -> ReadyAnswer | None:
        """What a call was answered that came before, byte for byte, if it would be answered that again."""
        name = name_of(call, self._pictures.namespace(call), request.body)
        return None if name is None else self._pictures.ready(name, call)


async def variations(request: Request, call: Call) -> NoReturn:  # noqa: ARG001 - as every handler
    """What `POST /v1/images/variations` is answered, whatever is asked. Raises HttpError, 410."""
    text = "Variations are retired; edit the image at /v1/images/edits instead."
    raise HttpError(HTTPStatus.GONE, text, code="endpoint_retired")
