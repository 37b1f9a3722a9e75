"""Whether a Redis that is full, and then loses everything, costs anything: a stampede, and a race for a budget.

Three replicas, S3, Redis and the emulated provider are processes of their own. Redis has little memory and is kept full
of what it may evict; after some minutes it is emptied. All the while

    a new picture is asked for at all replicas by many at once:
        everyone is answered, and it is paid for once
    a namespace's budget is raced for by all replicas:
        what was paid is what the ledgers say, and the budget says so too, also once Redis has been emptied; never more
        than the budget
    pictures are purged at one replica, and read at all of them a second later:
        none is served
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated

import grpc
import typer

from cacheserver.client import AsyncClient
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.tiers.redis_client import Client
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.journal import Result, spec
from scripts.bench.load import Stub, callers
from scripts.bench.provider import Latency
from scripts.bench.replicas import Stand, standing

_REPLICAS = 3
_ASKING = 8
"""At each replica, for one picture."""

_WAVE_S = 1.0
_PURGE_WAVES = 5
"""A picture is purged in every so many waves."""

_PURGED_S = 1.0
"""After this nobody serves it."""

_MAX_MB = 48
_FILLING = 40
"""Values that fill Redis up, of 50 kB each, between two waves."""

_RACING = 4
"""Pictures of the namespace with a budget that are asked for in a wave."""

_PRICE_MICROUSD = 52_700
_DEADLINE_S = 120.0


@dataclass(slots=True)
class Race:
    """What was asked and what came of it."""

    failed: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    given: dict[str, str] = field(default_factory=dict)
    """The picture of each prompt, by its SHA-256."""
    differing: int = 0
    purged: int = 0
    served_purged: int = 0
    asked: set[str] = field(default_factory=set)


class Waves:
    """Asks, fills and purges, wave by wave."""

    def __init__(self, stubs: list[Stub], redis: Client, *, seed: int) -> None:
        self.race = Race()
        self._stubs = stubs
        self._redis = redis
        self._numbers = count()
        self._chance = random.Random(seed)  # noqa: S311 - chooses replicas and junk

    async def go_on(self, seconds: float) -> None:
        """Make waves for so long."""
        async with asyncio.TaskGroup() as waves:
            until_s = time.monotonic() + seconds
            while time.monotonic() < until_s:
                waves.create_task(self._wave(next(self._numbers)))
                await self._fill()
                await asyncio.sleep(_WAVE_S)

    async def _wave(self, number: int) -> None:
        prompt = f"wave {number:06}"
        racing = [f"race {number:06}{letter}" for letter in "abcdefgh"[:_RACING]]
        await asyncio.gather(
            *(self._ask(stub, prompt, "default") for stub in self._stubs for _ in range(_ASKING)),
            *(self._ask(stub, each, "race") for stub in self._stubs for each in racing),
        )
        if number % _PURGE_WAVES == 0 and prompt in self.race.given:
            await self._purge(prompt)

    async def _ask(self, stub: Stub, prompt: str, namespace: str) -> None:
        race = self.race
        race.asked.add(prompt)
        try:
            response = await stub.GetImage(
                pb.GetImageRequest(spec=spec(prompt), namespace=namespace), timeout=_DEADLINE_S
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and namespace == "race":
                race.refused += 1
            else:
                race.failed[f"{error.code().name}: {error.details()}"] += 1
            return
        digest = hashlib.sha256(response.images[0].data).hexdigest()
        race.differing += race.given.setdefault(prompt, digest) != digest

    async def _purge(self, prompt: str) -> None:
        stub = self._chance.choice(self._stubs)
        await stub.PurgeImages(pb.PurgeImagesRequest(spec=spec(prompt)), timeout=_DEADLINE_S)
        self.race.purged += 1
        await asyncio.sleep(_PURGED_S)
        request = pb.GetImageRequest(spec=spec(prompt), cache_policy=pb.CACHE_POLICY_ONLY_IF_CACHED)
        for each in self._stubs:
            try:
                await each.GetImage(request, timeout=_DEADLINE_S)
                self.race.served_purged += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    self.race.failed[f"reading what was purged: {error.code().name}"] += 1

    async def _fill(self) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for _ in range(_FILLING):
            pipeline.set(f"junk:{self._chance.random()}", self._chance.randbytes(50_000), px=3_600_000)
        await pipeline.execute(raise_on_error=False)


async def full(*, minutes: float, after_s: float, seed: int) -> Result:
    """Keep Redis full for so long, empty it, and go on."""
    latency = Latency(spread="uniform", mean_s=1.0)
    async with AsyncExitStack() as stack:
        # It lasts until Redis is emptied, and some way beyond.
        waves = minutes * 60 / _WAVE_S
        limit = int(waves * _RACING * 1.05) * _PRICE_MICROUSD
        config = f"[namespaces.race]\nper_day_microusd = {limit}\n"
        stand = await stack.enter_async_context(
            standing(replicas=_REPLICAS, latency=latency, picture_bytes=20_000, seed=seed, config=config)
        )
        stand.under.valkey.execute(f"CONFIG SET maxmemory {_MAX_MB}mb")
        stubs = [(await stack.enter_async_context(callers(each.address, 1)))[0] for each in stand.replicas]
        redis = stand.redis
        running = Waves(stubs, redis, seed=seed)
        print("Redis is filled", file=sys.stderr, flush=True)
        await running.go_on(minutes * 60)
        evicted = int((await redis.info("stats"))["evicted_keys"])
        print("Redis is emptied", file=sys.stderr, flush=True)
        await redis.flushall()
        await running.go_on(after_s)
        return await _result(running.race, stand, evicted=evicted, limit=limit)


async def _result(race: Race, stand: Stand, *, evicted: int, limit: int) -> Result:
    billed = await stand.billed()
    calls = [call for call in await stand.under.provider.calls() if call.billed_microusd]
    racing = {hashlib.sha256(prompt.encode()).hexdigest() for prompt in race.asked if prompt.startswith("race")}
    paid = sum(call.billed_microusd for call in calls if call.prompt_sha256 in racing)
    booked = 0
    told: set[int] = set()
    for replica in stand.replicas:
        async with AsyncClient(replica.address) as client:
            booked += sum([row.cost_microusd async for row in client.admin.list_ledger() if row.namespace == "race"])
            told |= {each.spent_microusd for each in await client.admin.list_budgets() if each.subject == "race"}
    result = Result()
    result.figures = {
        "pictures asked for": len(race.asked),
        "paid for": sum(billed.values()),
        "paid for twice": sum(times - 1 for times in billed.values()),
        "answers that differ": race.differing,
        "keys evicted while Redis was full": evicted,
        "refused for the budget": race.refused,
        "budget, micro-dollars": limit,
        "provider's bill of its namespace": paid,
        "the same in the ledgers": booked,
        "the same by the budget": max(told, default=0),
        "purged": race.purged,
        "purged and served": race.served_purged,
    }
    result.shortfalls += [f"{times} calls failed: {text}" for text, times in race.failed.items()]
    for name in ("paid for twice", "answers that differ", "purged and served"):
        if result.figures[name]:
            result.shortfalls.append(f"{name}: {result.figures[name]}")
    if told != {booked} or booked != paid:
        result.shortfalls.append(f"the bill is {paid}, the ledgers say {booked}, the budget says {sorted(told)}")
    if paid > limit:
        result.shortfalls.append("more was paid than the budget allows")
    if not (race.refused and race.purged and evicted):
        result.shortfalls.append("the budget never ended, nothing was purged or Redis never full: it says nothing")
    return result


def main(
    minutes: Annotated[float, typer.Option(help="How long Redis is full before it is emptied.")] = 5.0,
    after_s: Annotated[float, typer.Option(help="How long all goes on then.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of choices.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Whether a full Redis, and an emptied one, cost anything; ends with 1 where they do."""
    result = asyncio.run(full(minutes=minutes, after_s=after_s, seed=seed))
    print_table("Redis full, then emptied", ["figure", "value"], [(n, f"{v:,}") for n, v in result.figures.items()])
    print_verdict(result.shortfalls)
    write_json(json, "redis-full", {"seed": seed, "figures": result.figures, "shortfalls": result.shortfalls})
    raise typer.Exit(1 if result.shortfalls else 0)


if __name__ == "__main__":
    typer.run(main)
