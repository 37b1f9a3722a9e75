"""What an operator's machinery asks over HTTP: is it alive, is it ready, what did it count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether calls are taken, and which tiers answer, by name."""

    is_ready: bool
    tiers: Mapping[str, bool]


class State(Protocol):
    """How the service stands: this process, or all workers on the port. Both raise OSError where nobody can tell."""

    async def readiness(self) -> Readiness:
        """Whether calls are taken."""
        ...

    async def metrics(self) -> bytes:
        """What was counted, as Prometheus reads it."""
        ...


_SILENT = JSONResponse({"status": "the supervisor does not answer"}, status_code=503)


def operations(state: State) -> list[BaseRoute]:
    """The routes: `/healthz`, `/readyz`, `/metrics`, and `/openapi.json`, which describes all of HTTP.

    `/healthz` answers 200 while the process can answer at all; `/readyz` 200 while calls are taken and 503
    while starting or draining. A tier that is down makes the service slower, not unready: `/readyz` names it.
    """
    description = resources.files("cacheserver.http").joinpath("openapi.json").read_bytes()

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        try:
            readiness = await state.readiness()
        except OSError:
            return _SILENT
        ready = readiness.is_ready
        states = {name: "ok" if is_well else "down" for name, is_well in readiness.tiers.items()}
        return JSONResponse(
            {"status": "ready" if ready else "draining", "tiers": states}, status_code=200 if ready else 503
        )

    async def openapi(_: Request) -> Response:
        return Response(description, media_type="application/json")

    async def metrics(_: Request) -> Response:
        try:
            page = await state.metrics()
        except OSError:
            return _SILENT
        return Response(page, headers={"content-type": CONTENT_TYPE_LATEST})

    return [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]
