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

_ADMIN = "Upstreams, money and review"

app = typer.Typer(
    help="A multi-level prompt cache in front of image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_PANELS = {
    "The service": (serve.serve, doctor.doctor, token.token),
    "Pictures": (get.get, find.find, put.put, purge.purge, explain.explain, why.why),
    "Warm-up and adoption": (estimate.estimate, imports.import_images, export.export, warm.warm),
    "Figures and alarms": (report.report, stats.stats, top.top, alarms.alarms),
    _ADMIN: (ledger.ledger,),
}
_NAMES = {"import_images": "import"}  # a word of Python's own

for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(_NAMES.get(_command.__name__, _command.__name__), rich_help_panel=_panel)(flat(_command))

for _group in (upstreams, budgets, review):
    app.add_typer(_group.app, name=_group.__name__.rpartition(".")[2], rich_help_panel=_ADMIN)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own notes are for whoever debugs gRPC
    app()
