"""The HTTP front over a whole cache, for tests: a real server on a real port, a real client of it."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from cacheserver.calls.downloads import DownloadMemory
from cacheserver.calls.reception import Reception
from cacheserver.calls.uploads import UploadMemory
from cacheserver.http.application import Application
from cacheserver.http.calls import HttpCalls
from cacheserver.http.guard import Guard
from cacheserver.http.openai.edits import Edits
from cacheserver.http.openai.events import Streams
from cacheserver.http.openai.generations import Generations
from cacheserver.http.openai.models import Models
from cacheserver.http.openai.pictures import Pictures
from cacheserver.http.openai.routes import GENERATIONS, openai_routes
from cacheserver.http.openai.uploads import Uploads
from cacheserver.http.server import HttpServer
from cacheserver.interfaces import Prompts
from cacheserver.model import CachedImage, Caller, Namespace, Permission, RateLimit
from cacheserver.precheck import PromptPolicy
from cacheserver.recall import Recall
from tests.calls_desk import desk
from tests.house import MODEL, House

MAX_UPLOAD_BYTES = 64 * 1024 * 1024
ANYONE = Caller("anonymous", frozenset(Permission))


class PlainUrls:
    """URLs that name the key."""

    def url(self, entry: CachedImage, *, base_url: str = "") -> tuple[str, float | None]:
        return f"{base_url}/images/{entry.key.name}", None


@dataclass
class HttpFront:
    """A client of a running service, and the house behind it."""

    house: House
    client: httpx.AsyncClient
    server: HttpServer
    reception: Reception
    recall: Recall

    async def generate(
        self, prompt: str = "a red fox", *, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        """POST a generation."""
        return await self.client.post(GENERATIONS, json={"prompt": prompt, **fields}, headers=headers)


def pictures_of(response: httpx.Response) -> list[bytes]:
    """The pictures of an answer."""
    assert response.status_code == 200, response.text
    return [base64.b64decode(each["b64_json"], validate=True) for each in response.json()["data"]]


def connections(server: HttpServer) -> list[Any]:
    """Those that the server has now."""
    return [*server._server.server_state.connections]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error that a call was answered with: it has the four keys of OpenAI's API, and its answer an id."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@asynccontextmanager
async def open_http_front(
    house: House,
    *,
    callers: Sequence[tuple[bytes, Caller]] = (),
    anonymous: Caller | None = ANYONE,
    namespaces: Sequence[Namespace] = (),
    max_concurrent_calls: int = 4_096,
    policies: Mapping[str, PromptPolicy] | None = None,
    prompts: Prompts | None = None,
    uploads: Uploads | None = None,
    downloads: DownloadMemory | None = None,
    routes: Sequence[BaseRoute] = (),
    hosts: Sequence[str] = (),
    limit: RateLimit | None = None,
) -> AsyncIterator[HttpFront]:
    """Serve `house` on a free port until the block ends."""
    at = desk(
        house,
        callers=callers,
        anonymous=anonymous,
        namespaces=namespaces,
        max_concurrent_calls=max_concurrent_calls,
        policies=policies or {},
        prompts=prompts,
        gone=(ClientDisconnect,),
    )
    reception, asking, recall = at.reception, at.asking, at.recall
    calls = HttpCalls(reception, Guard(has_callers=bool(callers), is_open=False, hosts=hosts))
    downloads = downloads or DownloadMemory(256 * 1024 * 1024)
    streaming = Streams(asking=asking, clock=house.clock, downloads=downloads)
    pictures = Pictures(
        asking=asking,
        clock=house.clock,
        urls=PlainUrls(),
        streaming=streaming,
        limit_of=lambda _: limit,
        downloads=downloads,
    )
    uploads = uploads or Uploads(UploadMemory(4 * MAX_UPLOAD_BYTES), max_bytes=MAX_UPLOAD_BYTES)
    ours = openai_routes(
        calls,
        generations=Generations(pictures, asking=asking),
        edits=Edits(pictures, asking=asking, uploads=uploads, max_pixels=50_000_000),
        models=Models([MODEL, "org/other"], started_s=house.clock.now_s()),
    )
    application = Application(ours, routes)
    server = HttpServer(
        application, host="127.0.0.1", port=0, find_questions=application.questions, downloads=downloads
    )
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
            yield HttpFront(house, client, server, reception, recall)
    finally:
        house.upstream.release()
        await server.stop()
