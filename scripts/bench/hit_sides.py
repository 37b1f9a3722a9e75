"""What every row of hit_path is made of: who is asked, by turns and for as long."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from scripts.bench.hit_load import Call, Load, Taken, TooSoonError, ask
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
        note: what else is to be known of its figures.
    """

    name: str
    sides: Callable[[Stage, float], AbstractAsyncContextManager[Sides]]
    goals: tuple[Goal, ...] = ()
    bytes_each: int = 0
    lacking: str = ""
    note: str = ""


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


class _Turns:
    """Turns of one server: of so many calls as take it about so many seconds."""

    def __init__(self, server: Server, call: Call, load: Load) -> None:
        self._server = server
        self._call = call
        self._load = load
        self._at_a_time = load.connections * load.streams
        self._calls = _FEWEST_CALLS * self._at_a_time

    async def last(self, seconds: float) -> None:
        """Find out how many calls take so long."""
        taken = await self()
        self._calls = max(int(taken.calls / taken.seconds * seconds) // self._at_a_time, _FEWEST_CALLS)
        self._calls *= self._at_a_time

    async def __call__(self) -> Taken:
        """One turn. If it is over too soon, as the server has become faster, another one of more calls."""
        while True:
            try:
                return await ask(self._call, self._server.address, self._server.pid, calls=self._calls, load=self._load)
            except TooSoonError:
                self._calls *= 2


async def by_turns(servers: Mapping[str, Server], call: Call, load: Load, turn_s: float) -> dict[str, Turn]:
    """The same call to each, as often in a turn as takes it `turn_s` seconds."""
    sides = {name: _Turns(server, call, load) for name, server in servers.items()}
    for side in sides.values():
        await side.last(turn_s)
    return {**sides}
