"""What every row of hit_path is made of: who is asked, by turns and for as long."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from scripts.bench import hit_load
from scripts.bench.hit_load import Call, Load
from scripts.bench.hit_rounds import AGAIN, BARE, TUNED, Goal, Turn
from scripts.bench.hit_stage import SERVICE, Server, Stage

USUAL = 32
"""Calls at a time."""

KB = 1_000
SIZES = {"4kB": 4 * KB, "100kB": 100 * KB, "1.5MB": 1_500 * KB}

_FEWEST_CALLS = 4
"""Calls of each stream in a turn."""

Sides = Mapping[str, Turn]


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that is measured.

    Args:
        name: as `--rows` selects it.
        sides: prepares it; given is how many seconds a turn should take.
        goals: what ours may cost at most.
        bytes_each: of the pictures that a call brings.
        lacking: why it cannot be measured, if so.
    """

    name: str
    sides: Callable[[Stage, float], AbstractAsyncContextManager[Sides]]
    goals: tuple[Goal, ...] = ()
    bytes_each: int = 0
    lacking: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """An rpc, the messages that are sent to it, and what one of them is answered with."""

    rpc: str
    bodies: Sequence[bytes]
    answer: Sequence[bytes]
    slack_bytes: int = 0
    skew: float = 0.0

    def call(self, stage: Stage) -> Call:
        """It as a load generator has it."""
        return Call(
            method=f"{SERVICE}{self.rpc}",
            bodies_file=stage.file("bodies", self.bodies),
            answer_bytes=stage.file("answer", self.answer).stat().st_size,
            token=stage.token,
            slack_bytes=self.slack_bytes,
            is_one=len(self.bodies) == 1,
            skew=self.skew,
        )


@asynccontextmanager
async def asking(  # noqa: PLR0913 - what a row consists of
    stage: Stage,
    turn_s: float,
    asked: Asked,
    services: Mapping[str, Server],
    *,
    load: Load,
    further: Mapping[str, Sequence[str]] | None = None,
) -> AsyncIterator[dict[str, Turn]]:
    """The bare server twice, the tuned one, `further` ones with these options of hit_floors, and services."""
    floors: dict[str, Sequence[str]] = {BARE: (), AGAIN: (), TUNED: ("--tuned",), **(further or {})}
    call, answer_file = asked.call(stage), stage.file("answer", asked.answer)
    async with AsyncExitStack() as stack:
        servers = {
            name: await stack.enter_async_context(stage.floor(answer_file, asked.rpc, *options))
            for name, options in floors.items()
        }
        yield await by_turns({**servers, **services}, call, load, turn_s)


async def by_turns(servers: Mapping[str, Server], call: Call, load: Load, turn_s: float) -> dict[str, Turn]:
    """The same call to each, as often in a turn as takes it `turn_s` seconds."""
    at_a_time = load.connections * load.streams

    def turn(server: Server, calls: int) -> Turn:
        return partial(hit_load.ask, call, server.address, server.pid, calls=calls, load=load)

    async def sized(server: Server) -> Turn:
        calls = _FEWEST_CALLS * at_a_time
        while True:
            try:
                taken = await turn(server, calls)()
            except hit_load.TooSoonError:
                calls *= 4
            else:
                per_second = taken.calls / taken.seconds
                return turn(server, max(int(per_second * turn_s) // at_a_time, _FEWEST_CALLS) * at_a_time)

    return {name: await sized(server) for name, server in servers.items()}
