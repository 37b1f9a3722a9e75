"""Callers in a process of their own: each asks for one new picture after another, and waits for each.

    python -m scripts.bench.closed_loop --address HOST:PORT --callers 100 --name A --out FILE.jsonl

They begin one by one, and ask for nothing more once standard input ends; what was asked for is waited for. Each call
is then a line of JSON in the file: an `Asked`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.load import Stub, callers

_CONNECTIONS = 4
_DEADLINE_S = 600.0
_STDIN = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """One call. Times are of the monotonic clock, in seconds; `failure` is empty where it brought its new picture."""

    start_s: float
    end_s: float
    failure: str = ""


def read_asked(file: Path) -> list[Asked]:
    """The calls in a file."""
    return [Asked(**json.loads(line)) for line in file.read_text().splitlines()]


async def ask(stub: Stub, prompt: str) -> Asked:
    """Ask for one picture that nobody has asked for before."""
    start_s = time.monotonic()
    request = pb.GetImageRequest(spec=pb.ImageSpec(prompt=prompt, quality="medium"))
    try:
        response = await stub.GetImage(request, timeout=_DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        return Asked(start_s, time.monotonic(), error.code().name)
    is_new = response.status.tier == pb.TIER_UPSTREAM and len(response.images) == 1 and response.images[0].data
    return Asked(start_s, time.monotonic(), "" if is_new else "NO_NEW_PICTURE")


async def _ask_on(address: str, *, count: int, name: str, ramp_s: float) -> list[Asked]:
    """All calls, until standard input ends."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    numbers = itertools.count(1)
    asked: list[Asked] = []

    def read() -> None:
        if not os.read(_STDIN, 4_096):
            loop.remove_reader(_STDIN)
            ended.set()

    async def caller(stub: Stub) -> None:
        while not ended.is_set():
            asked.append(await ask(stub, f"product {name}-{next(numbers):06d}, a studio photograph on a white table"))

    loop.add_reader(_STDIN, read)
    async with callers(address, _CONNECTIONS) as stubs, asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(caller(stubs[number % len(stubs)]))
            await asyncio.sleep(ramp_s / count)
    return asked


def main(
    *,
    address: Annotated[str, typer.Option(help="Of the service's gRPC, as host:port.")],
    count: Annotated[int, typer.Option("--callers", help="So many ask at a time.")],
    name: Annotated[str, typer.Option(help="Part of every prompt, so that no two processes ask for the same.")],
    out: Annotated[Path, typer.Option(help="File for the calls.")],
    ramp_s: Annotated[float, typer.Option(help="Seconds until all of them ask.")] = 10.0,
) -> None:
    """Ask until standard input ends."""
    asked = asyncio.run(_ask_on(address, count=count, name=name, ramp_s=ramp_s))
    out.write_text("".join(json.dumps(asdict(each)) + "\n" for each in asked))


if __name__ == "__main__":
    typer.run(main)
