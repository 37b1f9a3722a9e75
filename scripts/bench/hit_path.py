"""What a hit costs, against bare servers that return the same bytes and do nothing else.

    python -m scripts.bench.hit_path --rows 'l1/*'

The service and the bare servers run side by side, each a process on the same core, the load generator (h2load, of
Debian's nghttp2-client) on another. In each round each is asked the same number of times, by turns and in a random
order; processor time (of /proc) and latency are compared round by round, and the median of the ratios counts:

    A/A, the bare server against itself, is 1 ± 0.01 in every figure that is a goal: else further rounds are run, and
    then the machine is too restless

The service has callers whose tokens it checks, keeps accounts and has a Redis. The rows are, by name/size/at a time:

    l1         GetImage of a picture in memory, beside a bare server on uvloop that is not tuned else, too; the row
               `log` tells what a line in the log of each call costs
    prompts    the same for many prompts by Zipf's law, each call with a request_id of its own and no request remembered
    stream     StreamImage of a picture in memory
    url        GetImage that is answered with a URL
    miss       GetImage, only if cached, of what no tier has
    find       FindCached of 1,000 prompts whose pictures memory has
    batch      BatchGetImages with 16 in flight, against unary calls to the bare server
    multiplex  1,000 `get_image` at a time of our client that share a stream, against calls of generated stubs
    l2, l3     GetImage of pictures that Redis, or S3, has, against a bare server that fetches them by the bare client
"""

from __future__ import annotations

import asyncio
import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from scripts.bench import h2load, hit_rows, hit_rows_lower, hit_rows_streams
from scripts.bench.figures import BusyCores, print_table, print_verdict, write_json
from scripts.bench.hit_rounds import BARE, TUNED, UVLOOP, Rounds, measure, shortfalls
from scripts.bench.hit_sides import Row
from scripts.bench.hit_stage import Stage

ROWS = (*hit_rows.rows(), *hit_rows_streams.rows(), *hit_rows_lower.rows())

_FLOORS = (BARE, UVLOOP, TUNED)
_MB = 1_000_000


def selected(patterns: Sequence[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows whose names match; raises typer.BadParameter for a pattern that none does."""
    for pattern in patterns:
        if not any(fnmatch.fnmatch(row.name, pattern) for row in rows):
            raise typer.BadParameter(f"no row is called {pattern}: there are {', '.join(row.name for row in rows)}")
    return [row for row in rows if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)]


async def measure_rows(  # noqa: PLR0913 - options
    rows: Sequence[Row], *, rounds: int, most_rounds: int, row_s: float, turns: int, turn_s: float
) -> dict[str, Rounds]:
    """Each row by itself, one after another."""
    measured: dict[str, Rounds] = {}
    async with Stage() as stage:
        if not stage.cores.are_parted:
            print("There is one core: the load generator takes from what it measures.", file=sys.stderr)
        for row in rows:
            if row.lacking:
                print(f"{row.name} is left out: {row.lacking}", file=sys.stderr)
                continue
            async with row.sides(stage, turn_s) as sides:
                measured[row.name] = await measure(
                    sides,
                    rounds=rounds,
                    most_rounds=most_rounds,
                    turns=turns,
                    goals=row.goals,
                    most_s=row_s,
                    told=lambda so_far, row=row: _progress(row, so_far),  # type: ignore[misc] # a lambda's default
                )
    return measured


def _progress(row: Row, measured: Rounds) -> None:
    print(f"{row.name} {len(measured)}: A/A {measured.alike():.4f}  {_ratios(measured)}", file=sys.stderr, flush=True)


def _ratios(measured: Rounds) -> str:
    floors = [floor for floor in _FLOORS if floor in measured.sides]
    others = [side for side in measured.sides if side not in floors]
    return "  ".join(f"{side}/{floor} {measured.ratio(side, floor):.3f}" for side in others for floor in floors)


def figures_of(row: Row, measured: Rounds) -> dict[str, Any]:
    """The figures of a row, for JSON."""
    return {
        "rounds": len(measured),
        "alike": {figure: measured.alike(figure) for figure in ("cpu_us", "p50_us")},
        "note": row.note,
        "sides": {side: _side(row, measured, side) for side in measured.sides},
        "goals": [{**asdict(goal), "is": goal.value(measured)} for goal in row.goals],
        "shortfalls": shortfalls(row.name, row.goals, measured),
    }


def _side(row: Row, measured: Rounds, side: str) -> dict[str, Any]:
    medians = {figure: measured.median(side, figure) for figure in ("per_second", "cpu_us", "p50_us", "p99_us")}
    return {
        **medians,
        "mb_per_second": medians["per_second"] * row.bytes_each / _MB,
        "cpu_to": {floor: measured.ratio(side, floor) for floor in measured.sides if floor != side},
        "p50_to": {floor: measured.ratio(side, floor, "p50_us") for floor in measured.sides if floor != side},
        "cpu_us_by_round": [each.cpu_us for each in measured.sides[side]],
    }


def _print(figures: dict[str, dict[str, Any]]) -> None:
    print_table(
        "What a hit costs",
        ("row", "side", "calls/s", "MB/s", "p50", "p99", "CPU", *(f"to {floor}" for floor in _FLOORS)),
        [
            (
                f"{row}, {of['rounds']} rounds, A/A {of['alike']['cpu_us']:.4f}" if n == 0 else "",
                side,
                f"{its['per_second']:.0f}",
                f"{its['mb_per_second']:.0f}",
                f"{its['p50_us'] / 1e3:.2f} ms",
                f"{its['p99_us'] / 1e3:.2f} ms",
                f"{its['cpu_us']:.1f} us",
                *(f"{its['cpu_to'][floor]:.3f}" if floor in its["cpu_to"] else "" for floor in _FLOORS),
            )
            for row, of in figures.items()
            for n, (side, its) in enumerate(of["sides"].items())
        ],
    )


def main(  # noqa: PLR0913 - options
    *,
    rows: Annotated[list[str] | None, typer.Option(help="Names of rows, as 'l1/*'; repeatable. Unset: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at least.")] = 11,
    most_rounds: Annotated[int, typer.Option(help="And at most, until A/A is within its bounds.")] = 31,
    row_s: Annotated[
        float, typer.Option(help="Seconds after which a row that has its least rounds is given no further ones.")
    ] = 150.0,
    turns: Annotated[int, typer.Option(min=1, help="Of each side in a round.")] = 3,
    turn_s: Annotated[float, typer.Option(help="Seconds that a turn of the bare server takes, about.")] = 0.6,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """What a hit costs, against bare servers that return the same bytes."""
    if not h2load.is_installed():
        raise typer.BadParameter(h2load.MISSING)
    chosen, busy = selected(rows or ["*"]), BusyCores()
    options: dict[str, Any] = {"rounds": rounds, "most_rounds": most_rounds, "row_s": row_s}
    options |= {"turns": turns, "turn_s": turn_s}
    measured = asyncio.run(measure_rows(chosen, **options))
    figures = {row.name: figures_of(row, measured[row.name]) for row in chosen if row.name in measured}
    _print(figures)
    told = [each for of in figures.values() for each in of["shortfalls"]]
    print_verdict(told)
    write_json(
        json,
        "hit_path",
        {"options": options, "busy_cores": busy.read(), "rows": figures, "shortfalls": told},
    )
    raise typer.Exit(bool(told))


if __name__ == "__main__":
    typer.run(main)
