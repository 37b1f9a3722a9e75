"""What an operator's machinery asks over HTTP: is it alive, is it ready, what did it count."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from cacheserver.model import TierName


def operations(
    *, registry: CollectorRegistry, is_ready: Callable[[], bool], tiers: Callable[[], dict[TierName, bool]]
) -> list[BaseRoute]:
    """The routes: `/healthz`, `/readyz`, `/metrics`, and `/openapi.json`, which describes all of HTTP.

    `/healthz` answers 200 while the process can answer at all; `/readyz` 200 while calls are taken and 503
    while starting or draining. A tier that is down makes the service slower, not unready: `/readyz` names it.
    """
    description = resources.files("cacheserver.http").joinpath("openapi.json").read_bytes()

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        ready = is_ready()
        states = {name: "ok" if is_well else "down" for name, is_well in tiers().items()}
        return JSONResponse(
            {"status": "ready" if ready else "draining", "tiers": states}, status_code=200 if ready else 503
        )

    async def openapi(_: Request) -> Response:
        return Response(description, media_type="application/json")

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    return [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]
