"""cacheserver serve: run the service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cacheserver.cli.output import FAILED, Output
from cacheserver.errors import ConfigError

Config = Annotated[
    Path | None,
    typer.Option(help="Config file, TOML.", show_default="what CACHESERVER_CONFIG names, else cacheserver.toml"),
]


def serve(
    *,
    config: Config = None,
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port of gRPC; 0 is any free one.")] = None,
    http_port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port of HTTP; 0 is any free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory for all that is kept on this machine.")] = None,
    local_s3: Annotated[
        bool, typer.Option("--local-s3", help="Run an S3 server of our own, to try the whole stack.")
    ] = False,
) -> None:
    """Run the service until SIGTERM or Ctrl-C. Flags go before the environment, and that before the config file."""
    from cacheserver import app  # noqa: PLC0415 - the service takes long to import, and no other command needs it
    from cacheserver.settings import load_settings  # noqa: PLC0415 - as above

    flags = {
        "CACHESERVER_GRPC_PORT": grpc_port,
        "CACHESERVER_HTTP_PORT": http_port,
        "CACHESERVER_DATA_DIR": data_dir,
    }
    given = {name: str(value) for name, value in flags.items() if value is not None}
    try:
        app.run(load_settings(config, {**os.environ, **given}, local_s3=local_s3))
    except ConfigError as error:
        Output(as_json=False).problem(str(error))
        raise typer.Exit(FAILED) from error
