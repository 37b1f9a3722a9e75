"""cacheserver estimate: what a cache would save, from a request log, without a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """How the log is to be read, and what cache to forecast."""

    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--field",
            help="A field's name in the log, as prompt=request.text; of time, prompt, model, size, quality, caller.",
        ),
    ] = None
    profile: Annotated[
        str | None,
        typer.Option(help="Profile of the tiers' figures: exact, standard, catalog.", show_default="standard"),
    ] = None
    catalog_pattern: Annotated[
        list[str] | None,
        typer.Option(help="What the profile catalog drops, as in catalog_patterns; several by repeating it."),
    ] = None
    l1: Annotated[str, typer.Option(help="Memory sizes, with commas.")] = "256MiB,1GiB,4GiB"
    ttl: Annotated[str | None, typer.Option(help="Lifetimes of images, as 1d,7d.", show_default="for ever")] = None
    redis_ttl: Annotated[str, typer.Option(help="How long Redis keeps an image.")] = "24h"
    reroll_within: Annotated[str, typer.Option(help="A repeat by the same caller within this time is a re-roll.")] = (
        "15m"
    )
    image_bytes: Annotated[str, typer.Option(help="Size of an image, for the memory's figures.")] = "1.5MB"
    model: Annotated[str, typer.Option(help="Model of rows that name none.")] = "gpt-image-2"
    image_size: Annotated[
        str, typer.Option("--size", help="Size that rows are priced as which leave it to the provider.")
    ] = "1024x1024"
    quality: Annotated[str, typer.Option(help="Quality that rows are priced as which leave it to the provider.")] = (
        "medium"
    )
    html: Annotated[Path | None, typer.Option(help="Write the forecast as one HTML page.")] = None
    no_prompts: Annotated[bool, typer.Option("--no-prompts", help="Show no prompt and no part of one.")] = False
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first line that is no request.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False


def estimate(
    log: Annotated[Path, typer.Argument(help="Request log: a JSON object a line, plain or gzip.")],
    *,
    options: EstimateOptions,
) -> None:
    """Forecast hit rates and savings from a request log, by the code that the service makes its keys with.

    A log has a picture asked for in each line: time (seconds since 1970, or ISO 8601), prompt, and if it is known
    model, size, quality and caller. Nothing leaves this machine.
    """
    from cacheserver.cli.forecasting import run  # noqa: PLC0415 - takes long to import, and no other command needs it

    run(log, options)
