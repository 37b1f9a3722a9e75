"""Where OpenAI's images API is served."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from cacheserver.http.calls import Handler, HttpCalls, ReadyHandler
from cacheserver.http.openai.generations import Generations, variations
from cacheserver.http.openai.models import Models

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"
MODELS = "/v1/models"


def openai_routes(calls: HttpCalls, *, generations: Generations, edits: Handler, models: Models) -> list[BaseRoute]:
    """The routes; the one that is asked most comes first."""

    def route(method: str, path: str, handler: Handler, ready: ReadyHandler | None = None) -> BaseRoute:
        return Route(path, calls.endpoint(f"{method} {path}", handler, ready=ready), methods=[method])

    return [
        route("POST", GENERATIONS, generations, generations.ready),
        route("POST", EDITS, edits),
        route("POST", VARIATIONS, variations),
        route("GET", MODELS, models.listed),
        route("GET", f"{MODELS}/{{model:path}}", models.one),
    ]
