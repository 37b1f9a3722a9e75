"""The options of `cacheserver report` that need no service: a trace replayed through caches of other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

PROFILES = ("recorded", "exact", "standard", "catalog")
"""What a trace can be replayed by: the keys as they were, or those of a profile."""


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Which trace to replay, and through which caches."""

    trace: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            help="Replay this trace (what trace.path recorded) through caches of other sizes; asks no service.",
        ),
    ] = None
    l1: Annotated[
        str | None,
        typer.Option(help="Memory sizes for --replay: 256MiB,1GiB.", show_default="1, 5 and 10 % of the footprint"),
    ] = None
    ttl: Annotated[
        str | None, typer.Option(help="Lifetimes for --replay: 1d,7d (also s, m, h, w).", show_default="for ever")
    ] = None
    profile: Annotated[str, typer.Option(help=f"Profiles for --replay, of {', '.join(PROFILES)}, with commas.")] = (
        PROFILES[0]
    )
    assumed_model: Annotated[
        str, typer.Option("--assume-model", help="For --replay of a trace that tells no costs: the pictures' model.")
    ] = "gpt-image-2"
    assumed_size: Annotated[
        str, typer.Option("--assume-size", help="For --replay of a trace that tells no costs: the pictures' size.")
    ] = "1024x1024"


def print_replay(options: ReplayOptions, path: Path, *, as_json: bool) -> None:
    """Replay the trace at `path` and print what came of it; ends the command with its exit code if that fails.

    Raises:
        typer.BadParameter: an option cannot be used.
    """
    from cacheserver.cli.replaying import run  # noqa: PLC0415 - takes long to import, and no other command needs it

    run(options, path, as_json=as_json)
