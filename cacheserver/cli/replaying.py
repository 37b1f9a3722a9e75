"""A trace replayed, as a table or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from cacheserver.cli.amounts import binary_size, bytes_of, listed, span_s, span_text
from cacheserver.cli.output import FAILED, Output, dollars, size
from cacheserver.cli.replay import PROFILES, ReplayOptions
from cacheserver.errors import UnreadableFileError
from cacheserver.generation.prices import PriceTable
from cacheserver.whatif.replay import Replay, replay
from cacheserver.whatif.trace import Trace


def run(options: ReplayOptions, path: Path, *, as_json: bool) -> None:
    """Replay the trace at `path` and print what came of it; ends the command with its exit code if that fails.

    Raises:
        typer.BadParameter: an option cannot be used.
    """
    l1_bytes = [bytes_of(text, "--l1") for text in listed(options.l1)]
    ttls_s: list[float | None] = [span_s(text, "--ttl") for text in listed(options.ttl)]
    profiles = listed(options.profile)
    if not profiles or not set(profiles) <= set(PROFILES):
        raise typer.BadParameter(f"pass some of {', '.join(PROFILES)}", param_hint="--profile")
    output = Output(as_json=as_json)
    prices = PriceTable.load()
    price = _price(prices, options)
    trace = Trace(path, price=price)
    try:
        result = replay(trace, l1_bytes=l1_bytes, ttls_s=ttls_s or [None], profiles=profiles)
    except UnreadableFileError as error:
        output.problem(str(error))
        raise typer.Exit(FAILED) from error
    notes = _notes(result, trace, prices, options)
    output.result(asdict(result) | {"notes": notes}, lambda console: _draw(result, notes, console))


def _price(prices: PriceTable, options: ReplayOptions) -> Any:
    def of(quality: str) -> int:
        return prices.cost_microusd(options.assumed_model, options.assumed_size, quality, None, 1) or 0

    return of


def _notes(result: Replay, trace: Trace, prices: PriceTable, options: ReplayOptions) -> list[str]:
    """What the figures rest on."""
    notes = []
    if trace.is_priced_here:
        notes.append(
            f"costs are assumed: {options.assumed_model} at {options.assumed_size}, by quality, "
            f"as of {prices.as_of}; a quality without a price counts as 0"
        )
    if result.sample < 1:
        notes.append(f"estimated from {100 * result.sample:.3g} % of the keys")
    if trace.is_cut:
        notes.append("the file ends in the middle of a write: what follows was lost")
    notes.append("saved is against no cache at all: behind a tier that keeps everything L1 saves time, not money")
    return notes


def _draw(result: Replay, notes: list[str], console: Console) -> None:
    console.print(
        f"{result.requests:,} requests for {result.objects:,} pictures in {result.span_s / 86_400:,.1f} days: "
        f"footprint {size(result.footprint_bytes)}, {dollars(result.cost_microusd)} without a cache"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("memory")
    for name in ("of footprint", "lifetime", "profile", "hits", "hit rate", "bytes", "saved", "of the cost"):
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(
            "without bound" if row.l1_bytes is None else binary_size(row.l1_bytes),
            "" if row.share is None else f"{100 * row.share:.1f} %",
            span_text(row.ttl_s),
            row.profile,
            f"{row.hits:,}",
            f"{100 * row.hit_rate:.1f} %",
            size(row.hit_bytes),
            dollars(row.saved_microusd),
            f"{100 * row.saved_microusd / result.cost_microusd:.1f} %" if result.cost_microusd else "",
        )
    console.print(table)
    for note in notes:
        console.print(note, style="dim")
