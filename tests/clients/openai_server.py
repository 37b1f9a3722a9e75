"""A small server that does what OpenAI's images API does: what a session with ours is held against.

It has no cache: it makes each picture anew. Beyond what OpenAI does it gives a URL where one is asked for, whatever the
model, as servers in OpenAI's shape do, and tells clients not to send again what will not be taken.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.provider import small_image

MODELS = ("gpt-image-2", "gpt-image-2-2026-04-21")
API_KEY = "sk-a-team-of-ours"
BROKE_KEY = "sk-a-team-without-money"
_WHOLE_NUMBERS = {"n": (1, 10), "output_compression": (0, 100), "partial_images": (0, 3)}
_INPUT_TOKENS, _OUTPUT_TOKENS = 10, 196


class ApiError(Exception):
    """An error as the API answers it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        kind: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Asked:
    """A request that is in order."""

    prompt: str
    n: int
    size: str
    quality: str
    output_format: str
    by_url: bool
    partial_images: int
    stream: bool

    @property
    def facts(self) -> dict[str, str]:
        return {
            "size": self.size,
            "quality": self.quality,
            "output_format": self.output_format,
            "background": "opaque",
        }

    @property
    def usage(self) -> dict[str, Any]:
        output = _OUTPUT_TOKENS * self.n
        return {
            "total_tokens": _INPUT_TOKENS + output,
            "input_tokens": _INPUT_TOKENS,
            "output_tokens": output,
            "input_tokens_details": {"text_tokens": _INPUT_TOKENS, "image_tokens": 0},
        }


class OpenAIServer:
    """The server's application, and what a test may do with it."""

    def __init__(self) -> None:
        self.calls = 0
        self.images = 0
        self.is_crowded = False
        self.blocks_next = False
        self.open = asyncio.Event()
        self.open.set()
        self._files: dict[str, tuple[bytes, str]] = {}
        self._ids = itertools.count(1)
        self.app = Starlette(
            routes=[
                Route("/v1/images/generations", self._generations, methods=["POST"]),
                Route("/v1/images/edits", self._edits, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{model}", self._model),
                Route("/files/{name}", self._file),
            ],
            exception_handlers={ApiError: self._refused},
        )

    # ── what is asked for ───────────────────────────────────────────────────────────────────────────────────

    async def _generations(self, request: Request) -> Response:
        key = self._key(request)
        try:
            fields = await request.json()
        except ValueError:
            raise ApiError(400, "We could not parse the JSON body of your request.") from None
        return await self._answer(request, key, fields, "image_generation")

    async def _edits(self, request: Request) -> Response:
        key = self._key(request)
        texts, files = _form(request.headers["content-type"], await request.body())
        numbers = {name: int(texts[name]) for name in _WHOLE_NUMBERS if name in texts}
        pictures = [data for name, data in files if name in {"image", "image[]"}]
        if not pictures or not all(data.startswith(b"\x89PNG") for _, data in files):
            raise ApiError(400, "Invalid image file.", param="image")
        return await self._answer(
            request, key, {**texts, **numbers, "stream": texts.get("stream") == "true"}, "image_edit"
        )

    async def _answer(self, request: Request, key: str, fields: dict[str, Any], kind: str) -> Response:
        asked = _parse({name: value for name, value in fields.items() if value is not None})
        if key == BROKE_KEY:
            headers = {"x-should-retry": "false"}
            raise ApiError(429, "No money.", code="insufficient_quota", kind="insufficient_quota", headers=headers)
        if self.is_crowded:
            headers = {"retry-after": "1"}
            raise ApiError(429, "Slow down.", code="rate_limit_exceeded", kind="rate_limit_error", headers=headers)
        self.calls += 1
        if asked.stream:
            # The first part of an answer is awaited: what is wrong before it is a plain error.
            return StreamingResponse(self._events(asked, kind), headers=self._headers(), media_type="text/event-stream")
        pictures = await self._make(asked)
        data = [
            {"url": self._url(request, picture, asked)} if asked.by_url else {"b64_json": _base64(picture)}
            for picture in pictures
        ]
        answer = {"created": int(time.time()), **asked.facts, "data": data, "usage": asked.usage}
        return JSONResponse(answer, headers=self._headers())

    async def _make(self, asked: Asked) -> list[bytes]:
        await self.open.wait()
        if self.blocks_next:
            self.blocks_next = False
            raise ApiError(
                400,
                "Your request was rejected by the safety system. safety_violations=[violence].",
                code="moderation_blocked",
                kind="image_generation_user_error",
                moderation_details={"moderation_stage": "input", "categories": ["violence"]},
            )
        return [await self._picture(asked) for _ in range(asked.n)]

    async def _picture(self, asked: Asked) -> bytes:
        self.images += 1
        width, _, height = asked.size.partition("x")
        return await asyncio.to_thread(small_image, self.images, asked.output_format, (int(width), int(height)))

    async def _events(self, asked: Asked, kind: str) -> AsyncIterator[bytes]:
        (picture,) = await self._make(asked)
        common = {"b64_json": _base64(picture), "created_at": int(time.time()), **asked.facts}
        for index in range(asked.partial_images):
            yield _event(f"{kind}.partial_image", {**common, "partial_image_index": index})
        yield _event(f"{kind}.completed", {**common, "usage": asked.usage})

    def _url(self, request: Request, picture: bytes, asked: Asked) -> str:
        name = f"{next(self._ids)}.{asked.output_format}"
        self._files[name] = (picture, f"image/{asked.output_format}")
        return f"{request.base_url}files/{name}"

    # ── the rest ────────────────────────────────────────────────────────────────────────────────────────────

    async def _file(self, request: Request) -> Response:
        data, content_type = self._files[request.path_params["name"]]
        return Response(data, media_type=content_type)

    async def _models(self, request: Request) -> Response:
        self._key(request)
        return JSONResponse({"object": "list", "data": [_model(model) for model in MODELS]}, headers=self._headers())

    async def _model(self, request: Request) -> Response:
        self._key(request)
        return JSONResponse(_model(_known(request.path_params["model"])), headers=self._headers())

    def _key(self, request: Request) -> str:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key not in {API_KEY, BROKE_KEY}:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        return key

    def _headers(self) -> dict[str, str]:
        return {"x-request-id": f"req_{next(self._ids)}", "openai-version": "2020-10-01"}

    async def _refused(self, request: Request, error: Exception) -> Response:  # noqa: ARG002 - starlette's signature
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, headers=self._headers() | error.headers)


def _parse(fields: dict[str, Any]) -> Asked:
    _known(fields.get("model", "dall-e-2"))
    if not isinstance(fields.get("prompt"), str):
        raise ApiError(400, "Missing required parameter: 'prompt'.", code="missing_required_parameter", param="prompt")
    for name, (least, most) in _WHOLE_NUMBERS.items():
        if (value := fields.get(name, least)) < least:
            raise ApiError(400, f"Invalid '{name}': too small.", code="integer_below_min_value", param=name)
        if value > most:
            raise ApiError(400, f"Invalid '{name}': too large.", code="integer_above_max_value", param=name)
    size = fields.get("size", "1024x1024")
    if not re.fullmatch(r"(1024|1536)x(1024|1536)", size):
        raise _invalid("size", "'1024x1024', '1024x1536', '1536x1024', and 'auto'")
    return Asked(
        prompt=fields["prompt"],
        n=fields.get("n", 1),
        size=size,
        quality=fields.get("quality", "medium"),
        output_format=fields.get("output_format", "png"),
        by_url=fields.get("response_format") == "url",
        partial_images=fields.get("partial_images", 0),
        stream=fields.get("stream", False),
    )


def _known(model: str) -> str:
    if model not in MODELS:
        raise ApiError(404, f"The model '{model}' does not exist.", code="model_not_found", param="model")
    return model


def _invalid(name: str, supported: str) -> ApiError:
    return ApiError(400, f"Invalid value. Supported values are: {supported}.", code="invalid_value", param=name)


def _model(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 1_776_729_600, "owned_by": "system"}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()


def _form(content_type: str, body: bytes) -> tuple[dict[str, str], list[tuple[str, bytes]]]:
    """The texts of a multipart form, and its files with the name of each field."""
    form = BytesParser(policy=HTTP).parsebytes(b"content-type: " + content_type.encode() + b"\r\n\r\n" + body)
    texts: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []
    for part in form.iter_parts():
        name, data = str(part.get_param("name", header="content-disposition")), part.get_payload(decode=True)
        assert isinstance(data, bytes)
        if part.get_filename() is None:
            texts[name] = data.decode()
        else:
            files.append((name, data))
    return texts, files
