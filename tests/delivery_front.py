"""Image delivery over a whole cache, for tests: a real HTTP server on a real port."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from cacheserver.calls.auth import Authenticator
from cacheserver.calls.downloads import DownloadMemory
from cacheserver.calls.reception import Reception
from cacheserver.http.application import Application
from cacheserver.http.calls import HttpCalls
from cacheserver.http.connection import Bounds
from cacheserver.http.delivery.images import ImageDelivery
from cacheserver.http.delivery.partitions import Partitions
from cacheserver.http.delivery.urls import ImageUrls
from cacheserver.http.guard import Guard
from cacheserver.http.server import HttpServer
from cacheserver.model import (
    CachedImage,
    Caller,
    GeneratedImage,
    Namespace,
    Permission,
)
from cacheserver.recall import Recall
from cacheserver.renditions.renderer import ThreadRenderer
from cacheserver.renditions.renditions import Renditions
from tests.house import MODEL, House

ANYONE = Caller("anonymous", frozenset(Permission))
SECRET = b"a secret of more than thirty-two characters"
EXPIRES_S = 3600
RENDITION_TTL_S = 2_592_000.0
PUBLIC = Namespace("default", "default", public_images=True)
PRIVATE = Namespace("default", "default")


@dataclass
class DeliveryFront:
    """A client of a running server, and what is behind it."""

    house: House
    client: httpx.AsyncClient
    urls: ImageUrls
    renditions: Renditions
    renderer: ThreadRenderer
    base_url: str

    async def stored(
        self, data: bytes, prompt: str = "a red fox", *, content_type: str = "image/png", **facts: Any
    ) -> CachedImage:
        """A picture of these bytes, stored in every tier under the key of `prompt`."""
        _, identity = self.house.identity(prompt)
        image = GeneratedImage(
            data=data,
            content_type=content_type,
            width=64,
            height=48,
            sha256=hashlib.sha256(data).hexdigest(),
            model=MODEL,
            size="64x48",
            quality="low",
            background="opaque",
        )
        entry, _ = await self.house.cache.put(
            image,
            identity,
            namespace=self.house.namespace,
            replace=True,
            **facts,
        )
        await self.house.settle()
        return entry

    async def get(self, path: str, **options: Any) -> httpx.Response:
        """The answer to a path, or to a URL as it was handed out."""
        return await self.client.get(path, **options)


def path_of(entry: CachedImage) -> str:
    return f"/images/{entry.key.name}"


def signed_path(front: DeliveryFront, entry: CachedImage) -> str:
    return front.urls.url(entry)[0]


@asynccontextmanager
async def open_delivery(
    house: House,
    *namespaces: Namespace,
    callers: Sequence[tuple[bytes, Caller]] = (),
    secrets: Sequence[bytes] = (SECRET,),
    queue_max: int = 64,
    widths: Sequence[int] = (),
    max_concurrent_calls: int = 100,
    recall: Recall | None = None,
    downloads: DownloadMemory | None = None,
    bounds: Bounds | None = None,
) -> AsyncIterator[DeliveryFront]:
    """Serve the pictures of `house`, whose namespace is the first of these, on a free port until the block ends."""
    house.namespace = replace(namespaces[0] if namespaces else PUBLIC)
    reception = Reception(
        authenticator=Authenticator(callers, anonymous=None if callers else ANYONE),
        books=house.books,
        clock=house.clock,
        max_in_progress=max_concurrent_calls,
        recall=recall,
    )
    urls = ImageUrls(secrets, partitions=Partitions(namespaces or (PUBLIC,)), expires_s=EXPIRES_S, clock=house.clock)
    renderer = ThreadRenderer(max_pixels=50_000_000, max_bytes=50_000_000, threads=1, queue_max=queue_max)
    renditions = Renditions(
        memory=house.memory,
        tiers=[house.redis, house.s3],
        keeper=house.keeper,
        renderer=renderer,
        find_master=house.cache.get_by_key,
        clock=house.clock,
        ttl_s=RENDITION_TTL_S,
    )
    downloads = downloads or DownloadMemory(256 * 1024 * 1024)
    delivery = ImageDelivery(
        cache=house.cache,
        renditions=renditions,
        urls=urls,
        calls=HttpCalls(reception, Guard(has_callers=bool(callers), is_open=False, hosts=())),
        books=house.books,
        clock=house.clock,
        downloads=downloads,
        widths=widths,
    )
    application = Application(delivery.routes)
    server = HttpServer(
        application,
        host="127.0.0.1",
        port=0,
        bounds=bounds,
        find_questions=application.questions,
        downloads=downloads,
    )
    await server.start()
    base_url = f"http://127.0.0.1:{server.port}"
    try:
        async with httpx.AsyncClient(base_url=base_url, trust_env=False) as client:
            yield DeliveryFront(house, client, urls, renditions, renderer, base_url)
    finally:
        await server.stop()
        await renditions.aclose()
        await renderer.aclose()
