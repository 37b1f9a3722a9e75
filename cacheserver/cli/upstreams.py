"""cacheserver upstreams: the pool, and what an operator changes of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cacheserver.cli.groups import group
from cacheserver.cli.options import Link
from cacheserver.cli.session import session
from cacheserver.client import Upstream, UpstreamHealth


def list_upstreams(*, link: Link) -> None:
    """Show every upstream as the pool sees it. Needs the permission admin."""
    with session(link) as (client, output):
        upstreams = client.admin.list_upstreams()
        facts = {"upstreams": [asdict(upstream) for upstream in upstreams]}
        output.result(facts, lambda console: _draw(upstreams, console))


def set_upstream(  # noqa: PLR0913 - one parameter per option
    name: Annotated[str, typer.Argument(help="The upstream's name.")],
    *,
    weight: Annotated[float | None, typer.Option(help="Its share of the work among equals.")] = None,
    percent: Annotated[float | None, typer.Option(help="A fixed share of its models' work, 0 to 100.")] = None,
    no_percent: Annotated[bool, typer.Option("--no-percent", help="No fixed share any more.")] = False,
    paused: Annotated[
        bool | None, typer.Option("--pause/--resume", help="Take it out of the pool, or bring it back.")
    ] = None,
    link: Link,
) -> None:
    """Change an upstream's share of the work, or take it out of the pool and back in, until the next restart.

    Needs the permission admin.
    """
    if percent is not None and no_percent:
        raise typer.BadParameter("pass either --percent or --no-percent")
    if weight is None and percent is None and paused is None and not no_percent:
        raise typer.BadParameter("pass what is to change: --weight, --percent, --no-percent, --pause or --resume")
    with session(link) as (client, output):
        upstream = client.admin.update_upstream(
            name, weight=weight, percent=percent, clear_percent=no_percent, paused=paused
        )
        output.result(asdict(upstream), lambda console: _draw((upstream,), console))


app = group("The upstreams of the pool; alone it lists them.", {"list": list_upstreams, "set": set_upstream})


def _draw(upstreams: tuple[Upstream, ...], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("upstream", "health", "limit group", "models"):
        table.add_column(name)
    for name in ("weight", "percent", "rank", "price", "success", "latency", "running", "calls", "images/min"):
        table.add_column(name, justify="right")
    for upstream in upstreams:
        table.add_row(
            upstream.name,
            upstream.health or "",
            upstream.limit_group,
            ", ".join(upstream.models),
            *_numbers(upstream),
            style="" if upstream.health is UpstreamHealth.WELL else "yellow",
        )
    console.print(table)


def _numbers(upstream: Upstream) -> tuple[str, ...]:
    return (
        f"{upstream.weight:g}",
        "-" if upstream.percent is None else f"{upstream.percent:g} %",
        f"{upstream.rank}",
        f"x{upstream.price_factor:g}",
        f"{upstream.success_rate:.1%}",
        "-" if upstream.latency_s is None else f"{upstream.latency_s:.1f} s",
        f"{upstream.in_flight:,}",
        f"{upstream.calls:,}",
        "-" if upstream.images_per_minute is None else f"{upstream.images_per_minute:,.0f}",
    )
