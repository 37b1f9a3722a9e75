"""The routes of HTTP over a core: OpenAI's images API, and images by URL."""

from __future__ import annotations

from starlette.routing import BaseRoute

from cacheserver.app.core import Core
from cacheserver.calls.asking import Asking
from cacheserver.calls.reception import Reception
from cacheserver.http.calls import HttpCalls
from cacheserver.http.guard import Guard


def build_routes(core: Core, *, asking: Asking, reception: Reception) -> list[BaseRoute]:
    """Every route that callers of pictures use."""
    settings = core.settings
    guard = Guard(has_callers=bool(settings.callers), is_open=settings.insecure, hosts=settings.server.http_hosts)
    calls = HttpCalls(reception, guard)
    return []
