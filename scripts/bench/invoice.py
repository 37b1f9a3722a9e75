"""What a day costs without the service and with it, on a bad day.

TRACE is a CSV with the columns time_s, prompt_id and quality. All requests of a share of its prompts are replayed, a
day in some minutes: first to the provider, each of them paid for, and then to three replicas, while

    Redis is full of what it may evict, from a tenth of the day on
    S3 hangs, for a fifteenth of the day
    all replicas are replaced by the next release, one after the other, and then told to write its versions
    one replica is killed and its directory lost; another one comes in its place

Callers whose replica is gone go to another one. Against the provider's own ledger, and what S3 has in the end:

    nobody is given a wrong picture: none that was given, or made, for another request
    no picture that was given is lost
    nothing is paid for twice, but while nobody could say what S3 has, or where a killed replica had the call out
    the provider's bill is at least what the ledgers say was settled, and at most that and what they do not know
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import csv
import gzip
import hashlib
import itertools
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import httpx
import typer

from cacheserver.client import AsyncClient
from cacheserver.model import AttemptOutcome
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.tiers.redis_client import Client
from scripts.bench.figures import percentile, print_table, print_verdict, write_json
from scripts.bench.journal import Beneath, Result, beneath
from scripts.bench.load import Stub, callers
from scripts.bench.provider import Latency
from scripts.bench.provider_ledger import Call
from scripts.bench.replicas import standing
from scripts.bench.stand import ServiceProcess

_REPLICAS = 3
_DAY_S = 86_400.0
_SIZE = "1024x1024"
_MODEL = "gpt-image-2"
_LATENCY = Latency(spread="lognormal", mean_s=4.0)
_PICTURE_BYTES = 20_000
_MAX_MB = 32
_JUNK = b"x" * 50_000
_NEXT_RELEASE = (sys.executable, "-m", "tests.next_release")
_RAISED = {"CACHESERVER_IDENTITY__WRITE_VERSION": "2", "CACHESERVER_CODEC__WRITE_VERSION": "2"}

_FULL, _S3_AWAY, _S3_BACK, _UPGRADE, _RAISE, _LOST = 0.1, 0.25, 0.25 + 1 / 15, 0.4, 0.6, 0.8
"""Shares of the day after which these happen."""

_DEADLINE_S = 120.0
_PATIENCE_S = 240.0
"""After which a caller gives up."""

_NEXT_TRY_S = 0.2
_HOME_S = 120.0
_IS_HOME = "cacheserver_journal_entries 0.0"
_UNSURE_S = 60.0
"""So long after S3 is back a call may still be one that began while it was not."""

_AT_ONCE = 16

_CONFIG = """durability = "journal+redis"
[memory]
max_bytes = 8_000_000
[generation]
unknown_budget_microusd_per_hour = 1_000_000_000
"""

Wish = tuple[str, str]
"""A prompt, and the quality asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of the day, and when it comes, in seconds of the replay."""

    at_s: float
    wish: Wish


@dataclass(slots=True)
class Day:
    """What came of a day. Digests are SHA-256; what failed did so after all tries."""

    waited_s: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    given: defaultdict[Wish, set[str]] = field(default_factory=lambda: defaultdict(set))
    unsure: tuple[float, float] = (0.0, 0.0)
    """Since when and until when nobody could say what S3 has, in the provider's seconds."""


def read_day(trace: Path, *, requests: int, seconds: float) -> list[Asked]:
    """All requests of some prompts of the trace's first day, about so many, in so many seconds."""
    with gzip.open(trace, "rt", encoding="ascii") as file:
        rows = [row for row in csv.DictReader(file) if float(row["time_s"]) < _DAY_S]
    one_in = max(1, len(rows) // requests)
    return [
        Asked(float(row["time_s"]) * seconds / _DAY_S, (f"picture {row['prompt_id']}", row["quality"]))
        for row in rows
        if int.from_bytes(hashlib.sha256(row["prompt_id"].encode()).digest()[:4]) % one_in == 0
    ]


async def _replay(day: Sequence[Asked], ask: Callable[[Wish], Awaitable[str]], what: str) -> Day:
    done = Day()
    began_s = time.monotonic()

    async def one(asked: Asked) -> None:
        began_s = time.monotonic()
        try:
            digest = await ask(asked.wish)
        except (grpc.aio.AioRpcError, httpx.HTTPError) as error:
            done.failed[type(error).__name__ if isinstance(error, httpx.HTTPError) else error.code().name] += 1
            return
        done.waited_s.append(time.monotonic() - began_s)
        done.given[asked.wish].add(digest)

    async with asyncio.TaskGroup() as asking:
        for number, asked in enumerate(day):
            await asyncio.sleep(max(0.0, began_s + asked.at_s - time.monotonic()))
            asking.create_task(one(asked))
            if number % 500 == 0:
                print(f"{what}: {number:,} of {len(day):,} requests", file=sys.stderr, flush=True)
    return done


async def direct(day: Sequence[Asked], *, seed: int) -> tuple[Day, int]:
    """Ask the provider itself; what came of it, and the bill."""
    async with AsyncExitStack() as stack:
        under = await stack.enter_async_context(beneath(latency=_LATENCY, picture_bytes=_PICTURE_BYTES, seed=seed))
        limits = httpx.Limits(max_connections=None)
        http = httpx.AsyncClient(trust_env=False, timeout=_DEADLINE_S, limits=limits)
        await stack.enter_async_context(http)

        async def ask(wish: Wish) -> str:
            body = {"model": _MODEL, "prompt": wish[0], "quality": wish[1], "size": _SIZE}
            url = f"{under.provider.base_url}/images/generations"
            answer = await http.post(url, json=body, headers={"Authorization": "Bearer sk-a"})
            answer.raise_for_status()
            return hashlib.sha256(base64.b64decode(answer.json()["data"][0]["b64_json"])).hexdigest()

        done = await _replay(day, ask, "direct")
        return done, sum(call.billed_microusd for call in await under.provider.calls())


class Fleet:
    """Three replicas and what happens to them."""

    def __init__(self, under: Beneath, replicas: list[ServiceProcess], stubs: list[Stub], redis: Client) -> None:
        self._under = under
        self.replicas = replicas
        self._stubs = stubs
        self._redis = redis
        self._turns = itertools.count()
        self.unsure = (0.0, 0.0)
        self.lost_directory = under.directory / "lost"

    async def ask(self, wish: Wish) -> str:
        """The digest of the picture that the first replica gives that can."""
        until_s = time.monotonic() + _PATIENCE_S
        request = pb.GetImageRequest(spec=pb.ImageSpec(prompt=wish[0], quality=wish[1], size=_SIZE))
        turn = next(self._turns)
        while True:
            try:
                response = await self._stubs[turn % _REPLICAS].GetImage(request, timeout=_DEADLINE_S)
            except grpc.aio.AioRpcError:
                if time.monotonic() > until_s:
                    raise
                await asyncio.sleep(_NEXT_TRY_S)
                turn += 1
            else:
                return hashlib.sha256(response.images[0].data).hexdigest()

    async def happen(self, seconds: float) -> None:
        """Let everything happen, in its time."""
        began_s = time.monotonic()

        async def when(share: float, what: str) -> None:
            await asyncio.sleep(max(0.0, began_s + share * seconds - time.monotonic()))
            print(what, file=sys.stderr, flush=True)

        await when(_FULL, "Redis is full from now on")
        self._under.valkey.execute(f"CONFIG SET maxmemory {_MAX_MB}mb")
        async with asyncio.TaskGroup() as going_on:
            filling = going_on.create_task(self._fill())
            await when(_S3_AWAY, "S3 hangs")
            self._under.s3_proxy.hang()
            since_s = self._under.provider.now_s
            await when(_S3_BACK, "S3 is back")
            self._under.s3_proxy.resume()
            self.unsure = (since_s, self._under.provider.now_s + _UNSURE_S)
            await when(_UPGRADE, "the next release comes")
            for replica in self.replicas:
                replica.command = _NEXT_RELEASE
                await self._restart(replica)
            await when(_RAISE, "its versions are written")
            for replica in self.replicas:
                replica.environment = _RAISED
                await self._restart(replica)
            await when(_LOST, "a replica is lost with its directory")
            await self.replicas[0].kill()
            await asyncio.to_thread(self.replicas[0].directory.rename, self.lost_directory)
            await self.replicas[0].start()
            await when(1.0, "the day is over")
            filling.cancel()

    async def _restart(self, replica: ServiceProcess) -> None:
        await replica.stop()
        await replica.start()

    async def _fill(self) -> None:
        chance = random.Random(1)  # noqa: S311 - names of junk
        while True:
            await self._redis.set(f"junk:{chance.random()}", _JUNK, px=3_600_000)
            await asyncio.sleep(0.02)

    async def home(self) -> None:
        """Wait until no journal has anything left."""
        async with asyncio.timeout(_HOME_S), httpx.AsyncClient(trust_env=False) as http:
            for replica in self.replicas:
                metrics = f"http://{replica.http_address}/metrics"
                while _IS_HOME not in (await http.get(metrics)).text:  # noqa: ASYNC110 - told over HTTP
                    await asyncio.sleep(0.1)

    async def in_s3(self, wishes: Sequence[Wish]) -> dict[Wish, str]:
        """What S3 has of each, memory and Redis being empty."""
        await self._redis.flushall()
        for replica in self.replicas:
            await self._restart(replica)
        found: dict[Wish, str] = {}
        places = asyncio.Semaphore(_AT_ONCE)

        async def look(wish: Wish) -> None:
            request = pb.GetImageRequest(
                spec=pb.ImageSpec(prompt=wish[0], quality=wish[1], size=_SIZE),
                cache_policy=pb.CACHE_POLICY_ONLY_IF_CACHED,
            )
            async with places:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    response = await self._stubs[next(self._turns) % _REPLICAS].GetImage(request, timeout=_DEADLINE_S)
                    found[wish] = hashlib.sha256(response.images[0].data).hexdigest()

        await asyncio.gather(*map(look, wishes))
        return found

    async def booked(self) -> Counter[AttemptOutcome | None]:
        """Micro-dollars in all replicas' ledgers by how far their calls came, that of the lost directory included."""
        rows: Counter[AttemptOutcome | None] = Counter()
        # For the sake of the comparison: who runs the service has what the replicas told Redis of it.
        alone = ServiceProcess(self.lost_directory, "")
        async with alone:
            for replica in [*self.replicas, alone]:
                async with AsyncClient(replica.address) as client:
                    async for row in client.admin.list_ledger():
                        rows[row.outcome] += row.cost_microusd
        return rows


async def through(day: Sequence[Asked], *, seconds: float, seed: int) -> tuple[Day, list[Call], dict[str, int]]:
    """Ask three replicas; what came of it, what the provider billed, and what the replicas have of it in the end."""
    async with AsyncExitStack() as stack:
        stand = await stack.enter_async_context(
            standing(replicas=_REPLICAS, latency=_LATENCY, picture_bytes=_PICTURE_BYTES, seed=seed, config=_CONFIG)
        )
        stubs = [(await stack.enter_async_context(callers(each.address, 1)))[0] for each in stand.replicas]
        under = stand.under
        fleet = Fleet(under, stand.replicas, stubs, stand.redis)
        async with asyncio.TaskGroup() as going_on:
            going_on.create_task(fleet.happen(seconds))
            replay = going_on.create_task(_replay(day, fleet.ask, "through"))
        done = replay.result()
        done.unsure = fleet.unsure
        await fleet.home()
        found = await fleet.in_s3(list(done.given))
        rows = await fleet.booked()
        ends = {
            "lost": sum(found.get(wish) not in digests for wish, digests in done.given.items()),
            "settled": rows[AttemptOutcome.SETTLED],
            "unknown": rows[AttemptOutcome.UNKNOWN],
        }
        return done, [call for call in await under.provider.calls() if call.billed_microusd], ends


def _wrong(done: Day, calls: Sequence[Call]) -> int:
    """Pictures that were given for two wishes, or are more for one than were made for it."""
    wishes_of: defaultdict[str, set[Wish]] = defaultdict(set)
    for wish, digests in done.given.items():
        for digest in digests:
            wishes_of[digest].add(wish)
    made = Counter((call.prompt_sha256, call.quality) for call in calls)
    more = sum(
        max(0, len(digests) - made[hashlib.sha256(prompt.encode()).hexdigest(), quality])
        for (prompt, quality), digests in done.given.items()
    )
    return more + sum(len(wishes) - 1 for wishes in wishes_of.values())


def _twice(done: Day, calls: Sequence[Call]) -> tuple[int, int]:
    """How often a picture was paid for again, and how often while nobody could say what S3 has."""
    calls_of: defaultdict[tuple[str, str], list[Call]] = defaultdict(list)
    for call in sorted(calls, key=lambda call: call.at_s):
        calls_of[call.prompt_sha256, call.quality].append(call)
    again = [call for several in calls_of.values() for call in several[1:]]
    since_s, until_s = done.unsure
    return len(again), sum(since_s <= call.at_s <= until_s for call in again)


def _result(day: Sequence[Asked], plain: tuple[Day, int], ours: tuple[Day, list[Call], dict[str, int]]) -> Result:
    (without, bill), (done, calls, ends) = plain, ours
    our_bill = sum(call.billed_microusd for call in calls)
    twice, unsure = _twice(done, calls)
    result = Result()
    result.figures = {
        "requests": len(day),
        "distinct": len({asked.wish for asked in day}),
        "bill without, micro-dollars": bill,
        "bill with it": our_bill,
        "saved, %": 100 * (1 - our_bill / bill),
        "settled in the ledgers": ends["settled"],
        "unknown in the ledgers": ends["unknown"],
        **{
            f"{name}, {half}": 1e3 * percentile(part.waited_s, share)
            for half, part in (("without, ms", without), ("with it, ms", done))
            for name, share in (("p50", 50), ("p95", 95))
        },
        "failed without": sum(without.failed.values()),
        "failed with it": sum(done.failed.values()),
        "wrong images": _wrong(done, calls),
        "lost images": ends["lost"],
        "paid twice": twice,
        "of them while nobody knew what S3 has": unsure,
    }
    for name in ("wrong images", "lost images", "failed with it"):
        if result.figures[name]:
            result.shortfalls.append(f"{name}: {result.figures[name]:,}")
    price = max((call.billed_microusd for call in calls), default=0)
    if (twice - unsure) * price > ends["unknown"] + price:
        result.shortfalls.append(f"{twice - unsure} pictures were paid for twice though S3 was there")
    if not ends["settled"] <= our_bill <= ends["settled"] + ends["unknown"]:
        result.shortfalls.append("the bill is not what the ledgers say")
    return result


def main(
    trace: Annotated[Path, typer.Argument(help="A gzipped CSV with time_s, prompt_id and quality.")],
    minutes: Annotated[float, typer.Option(help="How long a day takes.")] = 10.0,
    requests: Annotated[int, typer.Option(help="About how many requests of it are replayed.")] = 5_000,
    seed: Annotated[int, typer.Option(help="Of the provider.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """What a bad day costs without the service and with it; ends with 1 where something is not as it should be."""
    day = read_day(trace, requests=requests, seconds=minutes * 60)
    plain = asyncio.run(direct(day, seed=seed))
    ours = asyncio.run(through(day, seconds=minutes * 60, seed=seed))
    result = _result(day, plain, ours)
    rows = [
        (name, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}") for name, value in result.figures.items()
    ]
    print_table("The invoice of a bad day", ["figure", "value"], rows)
    print_verdict(result.shortfalls)
    write_json(json, "invoice", {"seed": seed, "figures": result.figures, "shortfalls": result.shortfalls})
    raise typer.Exit(1 if result.shortfalls else 0)


if __name__ == "__main__":
    typer.run(main)
