"""The part of cacheserver review about similar hits: what was answered with pictures of other prompts."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import Annotated, Any

import typer
from rich.console import Console

from cacheserver.cli.options import Link
from cacheserver.cli.session import session
from cacheserver.client import Match

_Id = Annotated[str, typer.Argument(metavar="ID", help="Its id, as the list names it.")]


def matches(
    *,
    namespace: Annotated[str | None, typer.Option(help="Only of this namespace.", show_default="all")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    link: Link,
) -> None:
    """Show the latest of the similar hits that are kept for review. Needs the permission admin.

    The pictures themselves: `cacheserver get --key KEY -o file.png`, with the key that answered and, where that has a
    picture of its own, with the one that was asked for.
    """
    with session(link) as (client, output):
        found = list(islice(client.admin.list_matches(namespace=namespace), limit))
        output.result({"matches": [_facts(match) for match in found]}, lambda console: _draw(found, console))


def match_right(match_id: _Id, *, link: Link) -> None:
    """Say that a similar hit was right; it is listed no more. Needs the permission admin."""
    with session(link) as (client, output):
        match = client.admin.approve_match(match_id)
        output.result(_facts(match), lambda console: console.print("right: listed no more", style="bold green"))


def match_wrong(match_id: _Id, *, link: Link) -> None:
    """Say that a similar hit was wrong: its keys answer for one another no more, in any replica, and for good.

    Needs the permission admin.
    """
    with session(link) as (client, output):
        match = client.admin.reject_match(match_id)
        output.result(_facts(match), lambda console: console.print("wrong: banned", style="bold"))


def _facts(match: Match) -> dict[str, Any]:
    return asdict(match) | {
        "time": match.time.isoformat() if match.time else None,
        "level": match.level.name.lower() if match.level else None,
    }


def _draw(found: list[Match], console: Console) -> None:
    for match in found:
        console.print(match.id, style="bold yellow", end="  ")
        console.print(f"{match.namespace}  {match.level.name.lower() if match.level else 'unknown'}", end="")
        console.print(f"  {match.time:%Y-%m-%d %H:%M} UTC" if match.time else "")
        if match.prompt:
            console.print(f"  prompt    {match.prompt}")
        console.print(f"  asked     {match.key}", style="dim")
        console.print(f"  answered  {match.matched_key}", style="dim")
    console.print(f"{len(found)} shown")
