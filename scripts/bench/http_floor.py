"""The floor under an HTTP hit: a bare route that returns the bytes of a file, on the server the service runs on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cacheserver.http.server import HttpServer


async def _serve(path: str, body: bytes, media_type: str) -> None:
    async def answer(_: Request) -> Response:
        return Response(body, media_type=media_type)

    server = HttpServer(Starlette(routes=[Route(path, answer, methods=["GET", "POST"])]), host="127.0.0.1", port=0)
    await server.start()
    print(server.port, flush=True)
    await asyncio.Event().wait()


def main(
    path: Annotated[str, typer.Argument(help="Path of the route.")],
    body_file: Annotated[Path, typer.Argument(help="File that holds what it returns.")],
    *,
    media_type: Annotated[str, typer.Option(help="What it is.")] = "application/json",
) -> None:
    """Serve it until killed; prints the port."""
    uvloop.run(_serve(path, body_file.read_bytes(), media_type))


if __name__ == "__main__":
    typer.run(main)
