"""cacheserver stats: counters since the service started."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cacheserver.cli.live import live_facts
from cacheserver.cli.options import Link
from cacheserver.cli.output import dollars, size
from cacheserver.cli.session import session
from cacheserver.client import Stats, StatsRow


def stats(
    *,
    namespace: Annotated[str | None, typer.Option(help="Only this one. Without: all that may be read.")] = None,
    link: Link,
) -> None:
    """Show hits per tier, misses, and money spent and saved since the service started."""
    with session(link) as (client, output):
        result = client.stats(namespace)
        output.result(_facts(result), lambda console: _draw(result, console))


def _facts(stats: Stats) -> dict[str, Any]:
    return asdict(stats) | {
        "start_time": stats.start_time.isoformat() if stats.start_time else None,
        "live": live_facts(stats.live),
    }


def _draw(stats: Stats, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("namespace", "outcome", "tier"):
        table.add_column(name)
    for name in ("images", "degraded", "bytes", "mean time", "spent", "unknown", "saved"):
        table.add_column(name, justify="right")
    for row in stats.rows:
        table.add_row(row.namespace, row.outcome or "", row.tier or "", *_numbers(row))
    table.add_row("total", "", "", *_numbers(stats.total), style="bold")
    console.print(table)
    console.print(f"since {stats.start_time:%Y-%m-%d %H:%M:%S} UTC" if stats.start_time else "since the start", end="")
    console.print(f", {stats.upstream_calls} upstream calls, {stats.unsaved} images not saved yet", end="")
    console.print(f", {stats.paid_unknown} paid while the last tier could not be asked")
    for tier, count in stats.corrupt.items():
        console.print(f"{count} damaged entries found in {tier}", style="yellow")


def _numbers(row: StatsRow) -> tuple[str, ...]:
    mean_ms = 1000 * row.latency_sum_s / row.requests if row.requests else 0.0
    return (
        f"{row.requests:,}",
        f"{row.degraded:,}",
        size(row.image_bytes),
        f"{mean_ms:,.1f} ms",
        dollars(row.spent_microusd),
        dollars(row.unknown_microusd),
        dollars(row.saved_microusd),
    )
