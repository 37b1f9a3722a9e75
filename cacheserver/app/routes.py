"""The routes of HTTP over a core: OpenAI's images API, and images by URL."""

from __future__ import annotations

from starlette.routing import BaseRoute

from cacheserver.app.core import Core
from cacheserver.calls.asking import Asking
from cacheserver.calls.reception import Reception
from cacheserver.calls.uploads import UploadMemory
from cacheserver.http.calls import HttpCalls
from cacheserver.http.delivery.images import ImageDelivery
from cacheserver.http.delivery.urls import ImageUrls
from cacheserver.http.guard import Guard
from cacheserver.http.openai.edits import Edits
from cacheserver.http.openai.events import Streams
from cacheserver.http.openai.generations import Generations
from cacheserver.http.openai.models import Models
from cacheserver.http.openai.pictures import Pictures
from cacheserver.http.openai.rates import limit_of
from cacheserver.http.openai.routes import openai_routes
from cacheserver.http.openai.uploads import Uploads


def build_routes(
    core: Core, *, asking: Asking, reception: Reception, urls: ImageUrls, uploads: UploadMemory
) -> list[BaseRoute]:
    """Every route that callers of pictures use."""
    settings = core.settings
    guard = Guard(has_callers=bool(settings.callers), is_open=settings.insecure, hosts=settings.server.http_hosts)
    calls = HttpCalls(reception, guard)
    delivery = ImageDelivery(
        cache=core.cache,
        renditions=core.renditions,
        urls=urls,
        calls=calls,
        books=core.books,
        clock=core.clock,
        downloads=core.downloads,
        widths=settings.delivery.widths,
    )
    return [*_openai(core, calls, asking=asking, urls=urls, uploads=uploads), *delivery.routes]


def _openai(core: Core, calls: HttpCalls, *, asking: Asking, urls: ImageUrls, uploads: UploadMemory) -> list[BaseRoute]:
    streaming = Streams(asking=asking, clock=core.clock, downloads=core.downloads)
    limit = limit_of(core.miss_path.generator, core.miss_path.limits.next_s)
    pictures = Pictures(
        asking=asking,
        clock=core.clock,
        urls=urls,
        streaming=streaming,
        limit_of=limit,
        downloads=core.downloads,
    )
    edits = Edits(
        pictures,
        asking=asking,
        uploads=Uploads(uploads, max_bytes=core.settings.server.max_upload_bytes),
        max_pixels=core.settings.generation.max_image_pixels,
    )
    models = Models(core.miss_path.pool.models, started_s=core.clock.now_s())
    return openai_routes(calls, generations=Generations(pictures, asking=asking), edits=edits, models=models)
