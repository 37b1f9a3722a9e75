"""The command `cacheserver`: each file beside this one is the command of its name."""

from __future__ import annotations

import os

import typer

from cacheserver.cli.explain import explain
from cacheserver.cli.find import find
from cacheserver.cli.get import get
from cacheserver.cli.options import flat
from cacheserver.cli.purge import purge
from cacheserver.cli.put import put
from cacheserver.cli.serve import serve
from cacheserver.cli.stats import stats
from cacheserver.cli.token import token

app = typer.Typer(
    help="A multi-level prompt cache in front of image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for _command in (serve, get, find, put, purge, explain, stats, token):
    app.command(_command.__name__)(flat(_command))


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own notes are for whoever debugs gRPC
    app()
