"""Where the time of a hit goes: a flame graph of the service while h2load asks for a picture that memory has.

    python -m scripts.bench.profile hit.svg --size 100kB

py-spy (the extra `bench`) shows Python's frames and those of grpc's library below them. Without py-spy, perf writes
what `perf report -i hit.perf` shows: no SVG, and of Python's own frames only the interpreter's.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Annotated

import typer

from scripts.bench import h2load, hit_load
from scripts.bench.hit_load import Call, Load
from scripts.bench.hit_sides import SIZES, USUAL, Asked
from scripts.bench.hit_stage import Server, Stage, request

MISSING = "neither py-spy nor perf is installed: pip install 'cacheserver[bench]', or apt-get install linux-perf"

_CALLS = 2_000
_RATE = 500
_SHOWN = 500


def recorder(out: Path, pid: int, *, native: bool = True) -> list[str]:
    """The command that records process `pid` into `out` until it is interrupted; ValueError if there is none."""
    beside = Path(sys.executable).with_name("py-spy")
    spy = str(beside) if beside.exists() else shutil.which("py-spy")
    if spy is not None:
        options = ["--rate", str(_RATE), "--format", "flamegraph", "--output", str(out), "--pid", str(pid)]
        return [spy, "record", *(["--native"] if native else []), *options]
    perf = shutil.which("perf")
    if perf is None:
        raise ValueError(MISSING)
    # Virtual machines often have no counters of cycles.
    return [perf, "record", "-e", "cpu-clock", "-F", str(_RATE), "-g", "-o", str(out), "-p", str(pid)]


async def record(out: Path, *, size: str, seconds: float, native: bool) -> None:
    """Record the service for so long, under load."""
    async with Stage() as stage:
        service = await stage.service()
        message = request(prompt := "a red fox")
        await stage.put(service, {prompt: SIZES[size]})
        asked = Asked("GetImage", [message.SerializeToString()], await stage.hit(service, message))
        call = asked.call(stage)
        await _ask(call, service)  # warms it up
        loading = asyncio.create_task(_ask_for_ever(call, service), name="load")
        try:
            await _recorded(recorder(out, service.pid, native=native), seconds)
        finally:
            loading.cancel()
            await asyncio.wait({loading})


async def _ask(call: Call, service: Server) -> None:
    with contextlib.suppress(hit_load.TooSoonError):  # what it measures is not looked at
        await hit_load.ask(call, service.address, service.pid, calls=_CALLS, load=Load(USUAL))


async def _ask_for_ever(call: Call, service: Server) -> None:
    while True:
        await _ask(call, service)


async def _recorded(argv: list[str], seconds: float) -> None:
    process = await asyncio.create_subprocess_exec(*argv, stdout=PIPE, stderr=PIPE)
    ending = asyncio.create_task(process.communicate(), name="recorder")
    await asyncio.wait({ending}, timeout=seconds)
    _interrupt(process)
    _, err = await ending
    if process.returncode not in (0, -signal.SIGINT):
        raise RuntimeError(f"{Path(argv[0]).name} failed: {err.decode(errors='replace')[-_SHOWN:]}")


def _interrupt(process: Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)


def main(
    out: Annotated[Path, typer.Argument(help="File for the graph: SVG, or what perf wrote.")],
    *,
    size: Annotated[str, typer.Option(help=f"Of the picture: {', '.join(SIZES)}.")] = "100kB",
    seconds: Annotated[float, typer.Option(min=1, help="How long to record.")] = 10.0,
    native: Annotated[
        bool, typer.Option(help="Also what is not Python; py-spy stops the service for each look.")
    ] = True,
) -> None:
    """Draw where the time of a hit from memory goes."""
    if not h2load.is_installed():
        raise typer.BadParameter(h2load.MISSING)
    if size not in SIZES:
        raise typer.BadParameter(f"--size is one of {', '.join(SIZES)}")
    try:
        recorder(out, 0)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    asyncio.run(record(out, size=size, seconds=seconds, native=native))
    print(f"Written to {out}.")


if __name__ == "__main__":
    typer.run(main)
