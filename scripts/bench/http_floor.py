"""The floor under an HTTP hit: a bare route that returns the bytes of a file, on uvicorn as it comes.

With what makes it fast: httptools, uvloop, and no log of accesses.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def _serve(path: str, body: bytes, media_type: str) -> None:
    async def answer(_: Request) -> Response:
        return Response(body, media_type=media_type)

    listening = socket.create_server(("127.0.0.1", 0), backlog=2_048)
    print(listening.getsockname()[1], flush=True)
    application = Starlette(routes=[Route(path, answer, methods=["GET", "POST"])])
    config = uvicorn.Config(application, http="httptools", lifespan="off", log_config=None, access_log=False)
    await uvicorn.Server(config).serve([listening])


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
