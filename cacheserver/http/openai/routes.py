"""Where OpenAI's images API is served."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from cacheserver.http.calls import Handler, HttpCalls
from cacheserver.http.openai.generations import variations
from cacheserver.http.openai.models import Models

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
VARIATIONS = "/v1/images/variations"
MODELS = "/v1/models"


def openai_routes(calls: HttpCalls, *, generations: Handler, edits: Handler, models: Models) -> list[BaseRoute]:
    """The routes; the one that is asked most comes first."""

    def route(method: str, path: str, handler: Handler) -> BaseRoute:
        return Route(path, calls.endpoint(f"{method} {path}", handler), methods=[method])

    return [
        route("POST", GENERATIONS, generations),
        route("POST", EDITS, edits),
        route("POST", VARIATIONS, variations),
        route("GET", MODELS, models.listed),
        route("GET", f"{MODELS}/{{model:path}}", models.one),
    ]
