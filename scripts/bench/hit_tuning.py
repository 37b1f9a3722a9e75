"""What an option of grpc's, or a variable of the environment, does for a bare server on uvloop with our own options.

    python -m scripts.bench.hit_tuning --size 100kB --try grpc.http2.bdp_probe=0 --try MALLOC_TRIM_THRESHOLD_=67108864

Each of them is tried on a server of its own, by turns with one that has none and another like it (A/A). A name in
capital letters is a variable of the environment; several in one try are parted by a blank.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench import h2load
from scripts.bench.figures import print_table, write_json
from scripts.bench.hit_load import Call, Load
from scripts.bench.hit_rounds import AGAIN, BARE, Rounds, measure
from scripts.bench.hit_sides import SIZES, by_turns
from scripts.bench.hit_stage import SERVICE, Stage


def parted(attempt: str) -> tuple[list[str], dict[str, str]]:
    """The channel arguments and the environment of a try."""
    words = attempt.split()
    environment = dict(word.split("=", 1) for word in words if word.partition("=")[0].isupper())
    return [word for word in words if word.partition("=")[0] not in environment], environment


async def compare(  # noqa: PLR0913 - options
    attempts: Sequence[str], *, size_bytes: int, load: Load, rounds: int, turns: int, turn_s: float
) -> Rounds:
    """Rounds of each try, and of two servers without any."""
    tries = {BARE: "", AGAIN: "", **{attempt: attempt for attempt in attempts}}
    async with Stage() as stage, AsyncExitStack() as stack:
        answer_file = stage.file("answer", [bytes(size_bytes)])
        asked = pb.GetImageRequest(spec=pb.ImageSpec(prompt="a red fox"))
        call = Call(
            method=f"{SERVICE}GetImage",
            bodies_file=stage.file("body", [asked.SerializeToString()]),
            answer_bytes=answer_file.stat().st_size,
            token=stage.token,
        )
        servers = {}
        for name, attempt in tries.items():
            options, environment = parted(attempt)
            words = [word for each in options for word in ("--option", each)]
            floor = stage.floor(answer_file, "GetImage", "--tuned", *words, environment=environment)
            servers[name] = await stack.enter_async_context(floor)
        sides = await by_turns(servers, call, load, turn_s)
        return await measure(sides, rounds=rounds, most_rounds=rounds, turns=turns)


def main(  # noqa: PLR0913 - options
    *,
    attempts: Annotated[list[str], typer.Option("--try", help="name=value, repeatable.")],
    size: Annotated[str, typer.Option(help=f"Of the answer: {', '.join(SIZES)}.")] = "100kB",
    at_a_time: Annotated[int, typer.Option(min=1, help="Calls at a time.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 11,
    turns: Annotated[int, typer.Option(min=1, help="Of each in a round.")] = 3,
    turn_s: Annotated[float, typer.Option(help="Seconds that a turn takes, about.")] = 0.6,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """What options and the environment do for a bare server."""
    if not h2load.is_installed():
        raise typer.BadParameter(h2load.MISSING)
    if size not in SIZES:
        raise typer.BadParameter(f"--size is one of {', '.join(SIZES)}")
    load = Load.of(at_a_time)
    measured = asyncio.run(
        compare(attempts, size_bytes=SIZES[size], load=load, rounds=rounds, turns=turns, turn_s=turn_s)
    )
    if not measured.can_tell():
        print(f"A/A is {measured.alike():.4f}: the machine is too restless to tell", file=sys.stderr)
    figures = {
        side: {"cpu_us": measured.median(side, "cpu_us"), "ratio": measured.ratio(side, BARE)}
        for side in measured.sides
    }
    print_table(
        f"A bare server on uvloop with our options, {size}, {len(measured)} rounds",
        ("with", "CPU", "ratio"),
        [(side, f"{its['cpu_us']:.1f} us", f"{its['ratio']:.4f}") for side, its in figures.items()],
    )
    write_json(json, "hit_tuning", {"size": size, "at_a_time": at_a_time, "rounds": len(measured), "tries": figures})


if __name__ == "__main__":
    typer.run(main)
