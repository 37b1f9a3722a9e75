"""cacheserver serve: run the service."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Annotated

import typer

from cacheserver.cli.beside import read_certificates

Config = Annotated[
    Path | None,
    typer.Option(help="Config file, TOML.", show_default="what CACHESERVER_CONFIG names, else cacheserver.toml"),
]

GRPC_EXPERIMENTS = "-event_engine_listener"
"""What grpc reads from the environment when it is imported.

With its newer listener every call passes more often from one thread to another: a bare server takes a twelfth more
processor time for each (grpcio 1.85, calls of 100 KB).
"""


def serve(  # noqa: PLR0913 - options
    *,
    config: Config = None,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port of gRPC; 0 is any free one.")] = None,
    http_port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port of HTTP; 0 is any free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory for all that is kept on this machine.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that serve the same ports.")] = None,
    local_s3: Annotated[
        bool, typer.Option("--local-s3", help="Run an S3 server of our own, to try the whole stack.")
    ] = False,
) -> None:
    """Run the service until SIGTERM or Ctrl-C. Flags go before the environment, and that before the config file."""
    os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)
    # Next to nothing of what is made until it serves is ever garbage: to look for some would take a fifth of the time.
    gc.disable()
    try:
        read_certificates()
        from cacheserver.cli import serving  # noqa: PLC0415 - the whole service, which the help of all commands spares

        flags = {
            "CACHESERVER_GRPC_PORT": grpc_port,
            "CACHESERVER_HTTP_PORT": http_port,
            "CACHESERVER_DATA_DIR": data_dir,
            "CACHESERVER_SERVER__WORKERS": workers,
        }
        given = {name: str(value) for name, value in flags.items() if value is not None}
        serving.serve(config, {**os.environ, **given}, local_s3=local_s3)
    finally:
        gc.enable()
