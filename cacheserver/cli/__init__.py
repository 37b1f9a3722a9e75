"""The command `cacheserver`: each file beside this one that has the name of a command is that command."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from cacheserver.cli.commands import Commands

_COMMANDS = Commands(
    {
        "The service": ("serve", "doctor", "token"),
        "Pictures": ("get", "find", "put", "purge", "explain", "why"),
        "Warm-up and adoption": ("estimate", "similarity", "import", "export", "warm"),
        "Figures and alarms": ("report", "stats", "top", "alarms"),
        "Upstreams, money and review": ("ledger", "upstreams", "budgets", "review", "report-wrong", "switch"),
    }
)


class _Root(TyperGroup):
    """All commands, each imported when it is named: what `warm` needs does not keep `serve` waiting."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = _COMMANDS  # type: ignore[assignment]  # of a mapping that may be changed only what reads is used


app = typer.Typer(
    help="A multi-level prompt cache in front of image models.",
    cls=_Root,
    callback=lambda: None,  # else Typer asks for commands at once
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's own notes are for whoever debugs gRPC
    app()
