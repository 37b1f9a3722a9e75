"""Callers of the mixed load in a process of their own: most ask for what memory has, some for other things.

    python -m scripts.bench.mixed_callers --address HOST:PORT --name A --callers 9 --rate 20 --hot 0:100 --cold 100:600

They keep their connections and play the rounds that standard input orders, each a line of JSON: a `Round`; each is
answered by a line on standard output: a `Played`. A caller has one call at a time and asks at moments of its own,
`rate` a second all together; what it was to ask while it still waited is left out. A round in which only hits are asked
for has the same callers at the same moments: one that would wait for a miss is silent for as long.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Annotated

import grpc
import typer
import uvloop

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.load import Stub, callers, prompt

MISS_S = 5.0
"""How long the provider takes."""

_COLD, _MISSES = 0.09, 0.01
_CONNECTIONS = 8
_DEADLINE_S = 30.0
_TICK_S = 0.005
_STDIN = 0


@dataclass(frozen=True, slots=True)
class Round:
    """What is to be played: so long, of which the first `lead_s` do not count; only the hits, or all."""

    seed: int
    seconds: float
    lead_s: float
    hits_only: bool


@dataclass(slots=True)
class Played:
    """What came of it: by the tier that should answer, how long each call took, in milliseconds, from being sent.

    `late_ms` is how late calls for hits were sent, and `lag_ms` how late this process was woken: what a caller's own
    process adds is in the latencies, too.
    """

    hit_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    miss_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    elsewhere: dict[str, int] = field(default_factory=dict)
    """Calls that another tier answered, by the tiers that should have and that did."""
    failed: dict[str, int] = field(default_factory=dict)


class Callers:
    """So many callers, each at its own moments.

    Args:
        stubs: their connections, which they share.
        name: part of what nobody asked for before, so that no two processes ask for the same.
        count: how many there are.
        rate: how many calls a second all of them make, while none waits long.
        hot: the numbers of the pictures that memory has.
        cold: those of the pictures that Redis has and memory has not, taken in turn.
    """

    def __init__(  # noqa: PLR0913 - who asks for what
        self, stubs: Sequence[Stub], *, name: str, count: int, rate: float, hot: range, cold: range
    ) -> None:
        self._stubs = stubs
        self._count = count
        self._period_s = count / rate
        self._hot = hot
        self._cold = itertools.cycle(cold)
        self._new = (f"new {name} {number}" for number in itertools.count())

    async def play(self, order: Round) -> Played:
        """Play one round, and wait for what was asked in it."""
        played = Played()
        begin_s = time.perf_counter()
        watching = asyncio.create_task(_watch(played.lag_ms))
        async with asyncio.TaskGroup() as group:
            for number in range(self._count):
                group.create_task(self._caller(number, order, begin_s, played))
        watching.cancel()
        return played

    async def _caller(self, number: int, order: Round, begin_s: float, played: Played) -> None:
        random = Random(f"{order.seed}/{number}")  # noqa: S311 - a choice of pictures
        stub = self._stubs[number % len(self._stubs)]
        free_s = begin_s
        for due_s in self._moments(random, begin_s, begin_s + order.seconds):
            drawn, hot = random.random(), random.choice(self._hot)
            is_miss, is_cold = drawn < _MISSES, _MISSES <= drawn < _MISSES + _COLD
            if due_s < free_s:
                continue
            await asyncio.sleep(due_s - time.perf_counter())
            counts = played if due_s >= begin_s + order.lead_s else Played()
            if is_miss and order.hits_only:
                free_s = due_s + MISS_S
            elif is_miss:
                await self._ask(stub, next(self._new), pb.TIER_UPSTREAM, counts.miss_ms, played)
            elif is_cold and not order.hits_only:
                await self._ask(stub, prompt(next(self._cold)), pb.TIER_REDIS, counts.cold_ms, played)
            elif not is_cold:
                counts.late_ms.append((time.perf_counter() - due_s) * 1e3)
                await self._ask(stub, prompt(hot), pb.TIER_MEMORY, counts.hit_ms, played)
            free_s = max(free_s, time.perf_counter())

    def _moments(self, random: Random, begin_s: float, end_s: float) -> Iterator[float]:
        due_s = begin_s + random.random() * self._period_s
        while due_s < end_s:
            yield due_s
            due_s += self._period_s

    async def _ask(self, stub: Stub, text: str, tier: int, took_ms: list[float], played: Played) -> None:
        request = pb.GetImageRequest(spec=pb.ImageSpec(prompt=text))
        sent_s = time.perf_counter()
        try:
            response = await stub.GetImage(request, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            _count(played.failed, error.code().name)
            return
        took_ms.append((time.perf_counter() - sent_s) * 1e3)
        if response.status.tier != tier:
            _count(played.elsewhere, f"{pb.Tier.Name(tier)} {pb.Tier.Name(response.status.tier)}")


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


async def _watch(lag_ms: list[float]) -> None:
    """Note how late this process is woken, until cancelled."""
    while True:
        asked_s = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        lag_ms.append(max(0.0, time.perf_counter() - asked_s - _TICK_S) * 1e3)


def added(played: Sequence[Played]) -> Played:
    """What several processes or rounds played, as one."""
    whole = Played()
    for each in played:
        for name in ("hit_ms", "cold_ms", "miss_ms", "late_ms", "lag_ms"):
            getattr(whole, name).extend(getattr(each, name))
        whole.elsewhere = dict(Counter(whole.elsewhere) + Counter(each.elsewhere))
        whole.failed = dict(Counter(whole.failed) + Counter(each.failed))
    return whole


async def _obey(  # noqa: PLR0913 - what `Callers` takes
    address: str, *, name: str, count: int, rate: float, hot: range, cold: range
) -> None:
    """Play what standard input orders, until it ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(_STDIN, "rb"))
    async with callers(address, _CONNECTIONS) as stubs:
        all_of_them = Callers(stubs, name=name, count=count, rate=rate, hot=hot, cold=cold)
        while line := await reader.readline():
            played = await all_of_them.play(Round(**json.loads(line)))
            sys.stdout.write(json.dumps(asdict(played)) + "\n")
            sys.stdout.flush()


def _range(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end))


def main(  # noqa: PLR0913 - who asks for what
    *,
    address: Annotated[str, typer.Option(help="Of the service's gRPC, as host:port.")],
    name: Annotated[str, typer.Option(help="Part of every new prompt, so that no two processes ask for the same.")],
    count: Annotated[int, typer.Option("--callers", help="How many there are.")],
    rate: Annotated[float, typer.Option(help="Calls a second of all of them.")],
    hot: Annotated[str, typer.Option(help="Numbers of the pictures in memory, as FIRST:END.")],
    cold: Annotated[str, typer.Option(help="Numbers of the pictures in Redis alone, as FIRST:END.")],
) -> None:
    """Play rounds until standard input ends."""
    uvloop.run(_obey(address, name=name, count=count, rate=rate, hot=_range(hot), cold=_range(cold)))


if __name__ == "__main__":
    typer.run(main)
