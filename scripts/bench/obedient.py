"""Programs that do a thing as often as a line on standard input says, and answer with a line of how long each took.

Unlike a load generator that is started for each turn they keep their connections, and nothing but the thing itself
happens between the moments at which processor time is read.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from scripts.bench.hit_cost import cpu_s
from scripts.bench.hit_load import Taken

_ROOT = Path(__file__).resolve().parents[2]
_LINE_BYTES = 64 * 1024 * 1024
_READY = "ready"


async def repeated(once: Callable[[], Awaitable[object]], count: int, *, at_a_time: int) -> list[float]:
    """Do it so many times: how long each took, in microseconds."""
    us: list[float] = []

    async def some(times: int) -> None:
        for _ in range(times):
            begun_s = time.perf_counter()
            await once()
            us.append((time.perf_counter() - begun_s) * 1e6)

    await asyncio.gather(*(some(count // at_a_time) for _ in range(at_a_time)))
    return us


async def obey(once: Callable[[], Awaitable[object]], *, at_a_time: int) -> None:
    """Do it as often as each line says."""
    await obey_in_bulk(lambda count: repeated(once, count, at_a_time=at_a_time))


async def obey_in_bulk(work: Callable[[int], Awaitable[list[float]]]) -> None:
    """Do it all at once as often as each line says; `work` returns how long each took, in microseconds."""
    print(_READY, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        begun_s = time.perf_counter()
        us = await work(int(line))
        print(json.dumps({"seconds": time.perf_counter() - begun_s, "us": us}), flush=True)


class Obedient:
    """Such a program as it runs; its id is `pid`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    async def do(self, count: int, *, pid: int) -> Taken:
        """Have it done so many times: what it took process `pid`."""
        assert self._process.stdin is not None  # noqa: S101 - they are pipes
        assert self._process.stdout is not None  # noqa: S101
        before_s = cpu_s(pid)
        self._process.stdin.write(f"{count}\n".encode())
        line = await self._process.stdout.readline()
        spent_s = cpu_s(pid) - before_s
        if not line:
            raise RuntimeError("the program ended")
        told = json.loads(line)
        return Taken(len(told["us"]), told["seconds"], spent_s, told["us"])


@asynccontextmanager
async def obedient(argv: Sequence[str], environment: dict[str, str] | None = None) -> AsyncIterator[Obedient]:
    """Run such a program while this is entered; it ends when its input does, if we should die."""
    env = {"PATH": os.defpath, "PYTHONPATH": str(_ROOT), **(environment or {})}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *argv, stdin=PIPE, stdout=PIPE, cwd=_ROOT, env=env, limit=_LINE_BYTES
    )
    try:
        line = (await process.stdout.readline()).decode().strip() if process.stdout else ""
        if line != _READY:
            raise RuntimeError(f"{argv[0]} did not start")
        yield Obedient(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
