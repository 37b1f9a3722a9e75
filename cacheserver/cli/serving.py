"""What `cacheserver serve` does, apart from its options, because it imports the whole service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from cacheserver import app
from cacheserver.errors import ConfigError
from cacheserver.settings import load_settings


def serve(config: Path | None, env: Mapping[str, str], *, local_s3: bool) -> None:
    """Run the service; what keeps it from starting is printed in one line and ends the command."""
    try:
        app.run(load_settings(config, env, local_s3=local_s3))
    except ConfigError as error:
        from cacheserver.cli.output import FAILED, Output  # noqa: PLC0415 - with it comes the client, for this one line

        Output(as_json=False).problem(str(error))
        raise typer.Exit(FAILED) from error
