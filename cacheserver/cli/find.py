"""cacheserver find: where images are."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cacheserver.cli.options import Inputs, Link, Namespace, Spec
from cacheserver.cli.output import NOT_THERE
from cacheserver.cli.session import session
from cacheserver.client import Client, FindResult, ImageSpec, Presence

_ITEMS_PER_CALL = 10_000


def find(  # noqa: PLR0913 - one parameter per option
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts to look for.")] = None,
    *,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="File with one prompt a line; - is standard input.")
    ] = None,
    spec: Spec,
    inputs: Inputs,
    namespace: Namespace = None,
    link: Link,
) -> None:
    """Tell in which tier images are, without fetching or generating them.

    Exit code 3: at least one of them is absent.
    """
    with session(link) as (client, output):
        wanted = [*(prompts or []), *_lines(file)]
        if not wanted:
            raise typer.BadParameter("pass prompts, or --file")
        options = spec.options(inputs.named())
        result = _find(client, [ImageSpec(prompt, **options) for prompt in wanted], namespace)
        counts = Counter(str(item.presence) for item in result.items)
        facts = {
            "counts": dict(counts),
            "unknown_tiers": result.unknown_tiers,
            "items": [{"presence": item.presence, "tier": item.tier, "key": item.key} for item in result.items],
        }
        output.result(facts, lambda console: _draw(wanted, result, console))
    if counts[Presence.ABSENT]:
        raise typer.Exit(NOT_THERE)


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    text = sys.stdin.read() if file == Path("-") else file.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


def _find(client: Client, specs: list[ImageSpec], namespace: str | None) -> FindResult:
    results = [
        client.find_cached(specs[start : start + _ITEMS_PER_CALL], namespace=namespace)
        for start in range(0, len(specs), _ITEMS_PER_CALL)
    ]
    return FindResult(
        items=tuple(item for result in results for item in result.items),
        unknown_tiers=tuple(dict.fromkeys(tier for result in results for tier in result.unknown_tiers)),
    )


def _draw(prompts: list[str], result: FindResult, console: Console) -> None:
    for prompt, item in zip(prompts, result.items, strict=True):
        style = {Presence.CACHED: "green", Presence.IN_FLIGHT: "yellow", Presence.ABSENT: "red"}[item.presence]
        console.print(f"{item.tier or item.presence:<10}", style=style, end="")
        console.print(prompt)
        console.print(f"  {item.key}", style="dim")
    if result.unknown_tiers:
        console.print(f"not asked, so what is absent may be there: {', '.join(result.unknown_tiers)}", style="yellow")
