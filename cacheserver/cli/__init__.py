"""The command `cacheserver`: each file beside this one that has the name of a command is that command."""

from __future__ import annotations

import os

import typer

from cacheserver.cli import (
    alarms,
    budgets,
    doctor,
    estimate,
    explain,
    export,
    find,
    get,
    imports,
    ledger,
    purge,
    put,
    report,
    review,
    serve,
    stats,
    token,
    top,
    upstreams,
    warm,
    why,
)
from cacheserver.cli.options import flat

app = typer.Typer(
    help="A multi-level prompt cache in front of image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for _command in (
    serve.serve,
    get.get,
    find.find,
    put.put,
    purge.purge,
    explain.explain,
    why.why,
    stats.stats,
    top.top,
    alarms.alarms,
    warm.warm,
    ledger.ledger,
    export.export,
    report.report,
    estimate.estimate,
    token.token,
    doctor.doctor,
):
    app.command(_command.__name__)(flat(_command))

app.command("import")(flat(imports.import_images))  # a word of Python's own

app.add_typer(upstreams.app, name="upstreams")
app.add_typer(budgets.app, name="budgets")
app.add_typer(review.app, name="review")


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own notes are for whoever debugs gRPC
    app()
