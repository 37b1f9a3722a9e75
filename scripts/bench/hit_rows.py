"""The rows of hit_path: what is asked, who answers, and what ours may cost of what a bare server does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from scripts.bench import h2load
from scripts.bench.h2load import Call, Load
from scripts.bench.hit_rounds import AGAIN, BARE, OURS, TUNED, Goal, Turn
from scripts.bench.hit_stage import SERVICE, Server, Stage, request

KB = 1_000
SIZES = {"4kB": 4 * KB, "100kB": 100 * KB, "1.5MB": 1_500 * KB}
LOGGED = "service, level info"

_MOST_CPU = {"4kB": (1.00, 1.15), "100kB": (0.97, 1.10), "1.5MB": (1.00, 1.05)}
"""Of L1 hits by size: to the bare server, and to the one that is tuned as ours is."""

_MOST_P50 = 1.15
_USUAL = 32
"""Calls at a time."""

_CALIBRATION_CALLS = 320
_FEWEST_CALLS = 2
"""Calls of each stream in a turn."""

Sides = Mapping[str, Turn]


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is measured.

    Args:
        name: as `--rows` selects it.
        sides: prepares it; given is how many seconds a turn should take.
        goals: what ours may cost at most.
        bytes_each: of what a call brings.
    """

    name: str
    sides: Callable[[Stage, float], AbstractAsyncContextManager[Sides]]
    goals: tuple[Goal, ...] = ()
    bytes_each: int = 0


async def _by_turns(servers: Mapping[str, Server], call: Call, load: Load, turn_s: float) -> Sides:
    """The same call to each, as often in a turn as takes the bare one `turn_s` seconds."""

    def asking(server: Server, calls: int) -> Callable[[], Awaitable[h2load.Taken]]:
        return partial(h2load.ask, call, server.address, server.pid, calls=calls, load=load)

    at_a_time = load.connections * load.streams
    for server in servers.values():
        taken = await asking(server, max(_CALIBRATION_CALLS, 4 * at_a_time))()  # warms it up, too
        if server is servers[BARE]:
            per_second = taken.calls / taken.seconds
    calls = max(int(per_second * turn_s) // at_a_time, _FEWEST_CALLS) * at_a_time
    return {name: asking(server, calls) for name, server in servers.items()}


@asynccontextmanager
async def _floors(stage: Stage, answer_file: Path, rpc: str) -> AsyncIterator[dict[str, Server]]:
    """The bare server twice, and the tuned one."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(stage.floor(answer_file, rpc, tuned=name is TUNED))
            for name in (BARE, AGAIN, TUNED)
        }


@asynccontextmanager
async def _from_memory(stage: Stage, turn_s: float, *, size: str, at_a_time: int, logged: bool) -> AsyncIterator[Sides]:
    """GetImage of a picture that memory has."""
    services = {OURS: await stage.service()}
    if logged:
        services[LOGGED] = await stage.service(log__level="info")
    asked = request(prompt := f"a red fox of {size}")
    for service in services.values():
        await stage.put(service, {prompt: SIZES[size]})
        answer = await stage.from_memory(service, asked)
    answer_file = stage.file("answer", answer)
    call = Call(
        method=f"{SERVICE}GetImage",
        body_file=stage.file("body", [asked.SerializeToString()]),
        answer_bytes=answer_file.stat().st_size,
        token=stage.token,
    )
    async with _floors(stage, answer_file, "GetImage") as floors:
        yield await _by_turns({**floors, **services}, call, Load.of(at_a_time), turn_s)


def _goals(size: str, at_a_time: int) -> tuple[Goal, ...]:
    if at_a_time == 1:
        return (Goal(TUNED, _MOST_P50, "p50_us"),)
    bare, tuned = _MOST_CPU[size]
    return (Goal(BARE, bare), Goal(TUNED, tuned)) if at_a_time == _USUAL else ()


def _memory_rows() -> list[Row]:
    plain = [(size, at_a_time, False) for size in SIZES for at_a_time in (_USUAL, 1, 256)]
    return [
        Row(
            name=f"l1/{size}/{'log' if logged else at_a_time}",
            sides=partial(_from_memory, size=size, at_a_time=at_a_time, logged=logged),
            goals=() if logged else _goals(size, at_a_time),
            bytes_each=SIZES[size],
        )
        for size, at_a_time, logged in [*plain, ("100kB", _USUAL, True)]
    ]


ROWS = tuple(_memory_rows())
