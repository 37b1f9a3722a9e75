"""cacheserver put: store an image you have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cacheserver.cli.options import Link, Namespace, Spec
from cacheserver.cli.output import size
from cacheserver.cli.session import session
from cacheserver.client import ImageSpec, PutResult


def put(  # noqa: PLR0913 - one parameter per option
    file: Annotated[Path, typer.Argument(help="The image: png, jpeg or webp, as --format says.")],
    prompt: Annotated[str, typer.Argument(help="The prompt it answers.")],
    *,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the first picture rather than add a variant.")
    ] = False,
    tag: Annotated[list[str] | None, typer.Option(help="Label for purge and reports; repeatable.")] = None,
    ttl: Annotated[float | None, typer.Option(min=0.001, help="Seconds to keep it at most.")] = None,
    paid: Annotated[int, typer.Option(min=0, help="What it cost, in micro-dollars: what a hit will save.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds the call may take.")] = 120.0,
    spec: Spec,
    namespace: Namespace = None,
    link: Link,
) -> None:
    """Store an image you already have as the answer to a prompt."""
    with session(link) as (client, output):
        result = client.put(
            file,
            ImageSpec(prompt, **spec.options()),
            namespace=namespace,
            replace_first=replace,
            tags=tag or (),
            ttl_s=ttl,
            paid_microusd=paid,
            timeout_s=timeout,
        )
        image = result.image
        facts = {
            "created": result.created,
            "key": image.key,
            "variant": image.variant,
            "content_type": image.content_type,
            "width": image.width,
            "height": image.height,
            "size_bytes": image.size_bytes,
            "digest": image.digest,
        }
        output.result(facts, lambda console: _draw(result, console))


def _draw(result: PutResult, console: Console) -> None:
    image = result.image
    console.print("stored" if result.created else "was there already", style="bold green", end="  ")
    console.print(f"{image.width}x{image.height} {image.content_type}  {size(image.size_bytes)}")
    console.print(f"  key   {image.key}", style="dim")
