"""cacheserver purge: remove images from every tier."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from cacheserver.cli.options import Inputs, Link, Namespace, Spec
from cacheserver.cli.session import session
from cacheserver.client import ImageSpec, PurgeResult


def purge(  # noqa: PLR0913 - one parameter per option
    prompt: Annotated[str | None, typer.Argument(help="Remove all pictures of this prompt.")] = None,
    *,
    key: Annotated[str | None, typer.Option(help="Remove the picture of this key.")] = None,
    tag: Annotated[str | None, typer.Option(help="Remove what is labelled so.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Remove all of the namespace.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before removing several.")] = False,
    spec: Spec,
    inputs: Inputs,
    namespace: Namespace = None,
    link: Link,
) -> None:
    """Remove images from every tier; count them first with --dry-run.

    Removing more than one asks on a terminal, and needs --yes anywhere else.
    """
    if [prompt is not None, key is not None, tag is not None, everything].count(True) != 1:
        raise typer.BadParameter("pass one of: a prompt, --key, --tag, --everything")
    with session(link) as (client, output):
        selector: dict[str, Any] = {
            "prompt": None if prompt is None else ImageSpec(prompt, **spec.options(inputs.named())),
            "key": key,
            "tag": tag,
            "everything": everything,
            "namespace": namespace,
        }
        if not (dry_run or yes or key):
            _ask(client.purge(**selector, dry_run=True).images)
        result = client.purge(**selector, dry_run=dry_run)
        facts = {"dry_run": dry_run, "images": result.images, "tiers": result.tiers, "reclaiming": result.is_reclaiming}
        output.result(facts, lambda console: _draw(result, console, dry_run=dry_run))


def _ask(images: int) -> None:
    if images <= 1:
        return
    if not is_terminal():
        raise typer.BadParameter(f"this removes {images} images: add --yes to do it without being asked")
    typer.confirm(f"Remove {images} images from every tier?", abort=True, err=True)


def is_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()


def _draw(result: PurgeResult, console: Console, *, dry_run: bool) -> None:
    if result.is_reclaiming:
        console.print("[bold]removed[/bold] all of the namespace; its room is being given back")
        return
    copies = ", ".join(f"{count} in {tier}" for tier, count in result.tiers.items() if count)
    console.print("would remove" if dry_run else "removed", style="bold", end=" ")
    console.print(f"{result.images} image{'' if result.images == 1 else 's'}{f': {copies}' if copies else ''}")
