"""cacheserver review: pictures that wait for a person's decision, and a sample of the similar hits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cacheserver.cli.groups import group
from cacheserver.cli.matches import match_right, match_wrong, matches
from cacheserver.cli.options import Link
from cacheserver.cli.output import dollars, size
from cacheserver.cli.session import session
from cacheserver.client import Review, ReviewPicture

_Key = Annotated[str, typer.Argument(help="The picture's key, as the list names it.")]


def list_reviews(*, link: Link) -> None:
    """Show the pictures that wait for review. Needs the permission admin."""
    with session(link) as (client, output):
        reviews = list(client.admin.list_reviews())
        output.result({"reviews": [_facts(review) for review in reviews]}, lambda console: _draw(reviews, console))


def show(
    key: _Key,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", dir_okay=False)],
    link: Link,
) -> None:
    """Write a picture to a file, to look at it. Needs the permission admin."""
    with session(link) as (client, printed):
        picture = client.admin.get_review(key)
        output.write_bytes(picture.data)
        printed.result(_picture_facts(picture, output), lambda console: _draw_picture(picture, output, console))


def approve(key: _Key, *, link: Link) -> None:
    """Let a picture into the cache. Needs the permission admin."""
    with session(link) as (client, output):
        served = client.admin.approve_review(key)
        output.result({"decision": "approve", "key": served}, lambda console: _draw_approved(served, console))


def reject(key: _Key, *, link: Link) -> None:
    """Drop a picture; what it cost stays spent. Needs the permission admin."""
    with session(link) as (client, output):
        client.admin.reject_review(key)
        facts = {"decision": "reject", "key": key}
        output.result(facts, lambda console: console.print("dropped", style="bold"))


app = group(
    "Pictures that wait for review; alone it lists them. And similar hits, of which a sample is kept.",
    {
        "list": list_reviews,
        "show": show,
        "approve": approve,
        "reject": reject,
        "matches": matches,
        "match-right": match_right,
        "match-wrong": match_wrong,
    },
)


def _facts(review: Review) -> dict[str, Any]:
    return asdict(review) | {"create_time": review.create_time.isoformat() if review.create_time else None}


def _picture_facts(picture: ReviewPicture, file: Path) -> dict[str, Any]:
    return _facts(picture.review) | {
        "file": str(file),
        "digest": picture.digest,
        "quality": picture.quality,
        "revised_prompt": picture.revised_prompt,
        "won_against": picture.won_against,
        "tags": list(picture.tags),
    }


def _draw_approved(key: str, console: Console) -> None:
    console.print("served from now on", style="bold green")
    console.print(f"  key   {key}", style="dim")


def _draw(reviews: list[Review], console: Console) -> None:
    for review in reviews:
        _draw_review(review, console)
    console.print(f"{len(reviews)} waiting")


def _draw_review(review: Review, console: Console) -> None:
    score = "no score" if review.score is None else f"score {review.score:.2f}"
    console.print(score, style="bold yellow", end="  ")
    console.print(f"{review.width}x{review.height} {review.content_type}  {size(review.size_bytes)}", end="  ")
    console.print(f"{review.namespace}  {review.model}  cost {dollars(review.paid_microusd)}", end="")
    console.print(f"  made {review.create_time:%Y-%m-%d %H:%M} UTC" if review.create_time else "")
    console.print(f"  key   {review.key}", style="dim")


def _draw_picture(picture: ReviewPicture, file: Path, console: Console) -> None:
    _draw_review(picture.review, console)
    console.print(f"  best of {picture.won_against + 1}, quality {picture.quality}")
    if picture.revised_prompt:
        console.print(f"  drawn from: {picture.revised_prompt}")
    console.print(f"  file  {file}")
