"""What `cacheserver serve` does, apart from its options, because it imports the whole service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from cacheserver import app
from cacheserver.errors import ConfigError
from cacheserver.settings import left_over, load_settings


def serve(config: Path | None, env: Mapping[str, str], *, local_s3: bool) -> None:
    """Run the service; what keeps it from starting is printed in one line and ends the command."""
    try:
        settings = load_settings(config, env, local_s3=local_s3)
        left = left_over(settings)
        if settings.server.workers == 1 and not left:
            app.run(settings, load=lambda: load_settings(config, env, local_s3=local_s3))
            return
        from cacheserver.app import supervisor  # noqa: PLC0415 - for those who have several processes

        source = supervisor.Source(config, env, local_s3)
        supervisor.run(settings, source=source, leftovers=left)
    except ConfigError as error:
        from cacheserver.cli.output import FAILED, Output  # noqa: PLC0415 - with it comes the client, for this one line

        Output(as_json=False).problem(str(error))
        raise typer.Exit(FAILED) from error
