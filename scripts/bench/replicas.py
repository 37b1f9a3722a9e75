"""Whether replicas pay once for what all of them are asked for: all at once, and with their leaders killed.

Replicas, S3, Redis and the emulated provider are processes of their own; what was paid for is what the provider billed.

    one       many callers ask all replicas for one new picture at the same time:
                  the provider is called once
                  everyone is answered, with the same bytes
    killed    callers ask for many pictures, some for the same at other replicas; of every tenth picture the replica
              that has it made is killed (SIGKILL) and started again on its data. A caller whose replica is gone goes
              to another one:
                  everyone is answered
                  answers with the same prompt are the same bytes, unless that was paid for twice
                  no more is paid for than once for each prompt, and once more for each call that a killed replica had
                  out: those are the unknown ones in its ledger
    lost      S3 hangs, callers of three replicas are answered from their journals and Redis, one replica is killed and
              its disk with it, and S3 comes back:
                  every picture that a caller was given is in S3, the same bytes, and none was paid for twice
              and once more with the journal alone, Redis hanging too for the second half of the pictures:
                  no more are lost than the dead replica's journal had
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from cacheserver.client import AsyncClient, CacheError, CachePolicy, ImageSpec, TryAgainError
from cacheserver.model import AttemptOutcome, CacheKey
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.tiers.redis_client import Client, connect, disconnect
from scripts.bench.figures import percentile, print_table, print_verdict, write_json
from scripts.bench.journal import Beneath, Result, beneath, metric, spec
from scripts.bench.load import callers
from scripts.bench.provider import Latency
from scripts.bench.provider_ledger import Call
from scripts.bench.stand import ServiceProcess

_REPLICAS = 4
_CONNECTIONS = 8
"""Of callers to each replica, who would else share one event loop's turn on one socket."""

_DEADLINE_S = 180.0
_A_WAVE = 10
"""Of every so many pictures one leader is killed."""

_LEADS_S = 30.0
_POLL_S = 0.02
_HOME_S = 240.0
"""In which what a dead replica left has to be in S3: it is taken for dead after some two minutes."""

_AT_ONCE = 16
_LAST_CALLS_S = 30.0
"""For calls that nobody waits for any more: the provider bills them as they end."""


@dataclass(slots=True)
class Stand:
    """What runs. `ids` are what the replicas call themselves in Redis."""

    under: Beneath
    replicas: list[ServiceProcess]
    redis: Client
    ids: list[str]

    async def leader(self, identity_name: str) -> int | None:
        """Which replica has this identity's lease; None if nobody has."""
        holder: Any = await self.redis.hget(f"cacheserver:lease:{{{identity_name}}}", "holder")
        return self.ids.index(holder.decode().partition(":")[0]) if holder else None

    async def kill_leader(self, identity_name: str, *, after_s: float) -> bool:
        """Kill the replica that leads this flight, so long after it began to, and start it again; False if none did."""
        until_s = time.monotonic() + _LEADS_S
        while (leader := await self.leader(identity_name)) is None:
            if time.monotonic() > until_s:
                return False
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(after_s)
        await self.replicas[leader].kill()
        await self.replicas[leader].start()
        return True

    async def billed(self) -> Counter[str]:
        """How often each prompt, by its SHA-256, was paid for, once all calls have ended."""
        async with asyncio.timeout(_LAST_CALLS_S):
            while (await self.under.provider.state())["running"]:  # noqa: ASYNC110 - it runs in another process
                await asyncio.sleep(_POLL_S)
        calls: Sequence[Call] = await self.under.provider.calls()
        return Counter(call.prompt_sha256 for call in calls if call.billed_microusd)

    async def home(self, replicas: Sequence[ServiceProcess], within_s: float) -> bool:
        """Wait until S3 has what these replicas, and those that are gone, had yet to bring; whether it came in time."""
        until_s = time.monotonic() + within_s
        while time.monotonic() < until_s:
            entries = sum([await metric(each, "cacheserver_journal_entries") for each in replicas])
            names = [name async for name in self.redis.scan_iter(match="cacheserver:{undrained}:*", count=1_000)]
            if not entries and all(name.endswith(b":replicas") for name in names):
                return True
            await asyncio.sleep(0.5)
        return False

    async def outcomes(self) -> Counter[AttemptOutcome | None]:
        """The calls in all replicas' ledgers, by how far they came, once those that the provider ended are written."""
        until_s = time.monotonic() + _LAST_CALLS_S
        while True:
            rows: Counter[AttemptOutcome | None] = Counter()
            for replica in self.replicas:
                async with AsyncClient(replica.address) as client:
                    rows.update([row.outcome async for row in client.admin.list_ledger()])
            if not rows[AttemptOutcome.SENT] or time.monotonic() > until_s:
                return rows
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def standing(
    *, replicas: int, latency: Latency, picture_bytes: int, seed: int, config: str = ""
) -> AsyncIterator[Stand]:
    """All of it, for as long as it is entered."""
    async with AsyncExitStack() as stack:
        under = await stack.enter_async_context(beneath(latency=latency, picture_bytes=picture_bytes, seed=seed))
        config = f"{config}\n{under.config}"
        services = [ServiceProcess(under.directory / f"replica-{number}", config) for number in range(replicas)]
        for service in services:
            await stack.enter_async_context(service)
        redis = connect(under.valkey.url, timeout_s=5.0, connect_timeout_s=5.0)
        stack.push_async_callback(disconnect, redis)
        ids = [next(under.directory.glob(f"replica-{n}/**/replica_id")).read_text().strip() for n in range(replicas)]
        yield Stand(under, services, redis, ids)


def image_of(prompt: str) -> ImageSpec:
    """What is asked for."""
    return ImageSpec(prompt=prompt, quality="medium", size="1024x1024")


async def one(*, requests: int, latency_s: float, seed: int, replicas: int = _REPLICAS) -> Result:
    """Ask all replicas for one new picture so often at the same time."""
    result = Result()
    answered: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    took_s: list[float] = []
    latency = Latency(mean_s=latency_s)
    async with standing(replicas=replicas, latency=latency, picture_bytes=100_000, seed=seed) as stand:
        async with AsyncExitStack() as channels:
            stubs = [
                stub
                for replica in stand.replicas
                for stub in await channels.enter_async_context(callers(replica.address, _CONNECTIONS))
            ]
            began_s = time.monotonic()
            last_asked_s = 0.0

            async def ask(number: int) -> None:
                nonlocal last_asked_s
                last_asked_s = time.monotonic()
                try:
                    request = pb.GetImageRequest(spec=spec("what all ask for"))
                    response = await stubs[number % len(stubs)].GetImage(request, timeout=_DEADLINE_S)
                    answered[hashlib.sha256(response.images[0].data).hexdigest()] += 1
                except grpc.aio.AioRpcError as error:
                    failed[error.code().name] += 1
                took_s.append(time.monotonic() - began_s)

            await asyncio.gather(*(ask(number) for number in range(requests)))
        billed = await stand.billed()
        calls = await stand.under.provider.calls()
    result.figures = {
        "replicas": replicas,
        "requests": requests,
        "answered": answered.total(),
        "failed": failed.total(),
        "pictures among the answers": len(answered),
        "calls of the provider": len(calls),
        "paid for": billed.total(),
        "first answer, s": min(took_s),
        "last asked, s": last_asked_s - began_s,
        "last answer, s": max(took_s),
    }
    result.shortfalls += _what_failed(failed)
    if len(answered) != 1:
        result.shortfalls.append(f"{len(answered)} different pictures were answered with")
    if len(calls) != 1 or billed.total() != 1:
        result.shortfalls.append(f"the provider was called {len(calls)} times and billed {billed.total()}")
    if last_asked_s - began_s > min(took_s):
        result.shortfalls.append("the picture was there before all had asked: it says less than it should")
    return result


@dataclass(slots=True)
class Callers:
    """Callers of all replicas, and what they got. `pictures` are the SHA-256 of what a prompt was answered with."""

    clients: Sequence[AsyncClient]
    pictures: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    failed: Counter[str] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)
    went_elsewhere: int = 0

    async def ask(self, prompt: str, replica: int) -> None:
        """Ask this replica, and the next one for as long as none answers."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < _DEADLINE_S:
            try:
                picture = await self.clients[replica % len(self.clients)].get_image(image_of(prompt), timeout_s=60.0)
            except TryAgainError:
                self.went_elsewhere += 1
                replica += 1
            except CacheError as error:
                self.failed[f"{type(error).__name__} {error.reason}"] += 1
                return
            else:
                self.pictures[prompt].add(hashlib.sha256(picture.data).hexdigest())
                self.took_s.append(time.monotonic() - began_s)
                return
        self.failed["nobody answered in time"] += 1


async def killed(*, prompts: int, requests: int, latency_s: float, seed: int, replicas: int = _REPLICAS) -> Result:
    """Ask for so many pictures so often, and kill the leader of every tenth."""
    chance = random.Random(seed)  # noqa: S311 - chooses prompts and moments
    kills = 0
    waves = prompts // _A_WAVE
    latency = Latency(spread="uniform", mean_s=latency_s)
    async with standing(replicas=replicas, latency=latency, picture_bytes=100_000, seed=seed) as stand:
        async with AsyncExitStack() as opened:
            clients = [await opened.enter_async_context(AsyncClient(each.address)) for each in stand.replicas]
            asking = Callers(clients)
            lasts = [f"picture {_A_WAVE * (wave + 1) - 1}" for wave in range(waves)]
            keys = [(await clients[0].explain(image_of(last))).explanation.key for last in lasts]
            async with asyncio.TaskGroup() as group:
                for wave in range(waves):
                    print(f"kill {wave + 1} of {waves}", file=sys.stderr, flush=True)
                    names = [f"picture {number}" for number in range(wave * _A_WAVE, (wave + 1) * _A_WAVE)]
                    asked = [*names, *chance.choices(names, k=requests // waves - _A_WAVE)]
                    chance.shuffle(asked)
                    for prompt in asked:
                        group.create_task(asking.ask(prompt, chance.randrange(replicas)))
                    after_s = chance.uniform(0.0, 1.5 * latency_s)
                    kills += await stand.kill_leader(CacheKey.parse(keys[wave]).identity_name, after_s=after_s)
        billed = await stand.billed()
        outcomes = await stand.outcomes()
    twice = {prompt for prompt in asking.pictures if billed[hashlib.sha256(prompt.encode()).hexdigest()] > 1}
    differ = {prompt for prompt, pictures in asking.pictures.items() if len(pictures) > 1}
    figures = {
        "replicas": replicas,
        "prompts": prompts,
        "requests": requests,
        "kills": kills,
        "answered": len(asking.took_s),
        "failed": asking.failed.total(),
        "went to another replica": asking.went_elsewhere,
        "paid for": billed.total(),
        "prompts paid for twice": len(twice),
        "calls that killed replicas had out": outcomes[AttemptOutcome.UNKNOWN],
        "prompts answered with two pictures": len(differ),
        "of these paid for once": len(differ - twice),
        "calls open at the end": outcomes[AttemptOutcome.SENT],
        "median answer, s": percentile(asking.took_s, 50),
        "slowest answer, s": max(asking.took_s, default=0.0),
    }
    return Result(figures, [*_what_failed(asking.failed), *_shortfalls_of_killed(figures, waves)])


async def lost(*, prompts: int, latency_s: float, seed: int, replicas: int = 3) -> Result:
    """Lose a replica and its disk while S3 is away, with copies in Redis and without."""
    result = Result()
    for durability in ("journal+redis", "journal"):
        figures = await _lost(prompts, durability, latency_s=latency_s, seed=seed, replicas=replicas)
        result.figures |= {f"{durability}: {name}": value for name, value in figures.items()}
        result.shortfalls += [f"{durability}: {text}" for text in _shortfalls_of_lost(figures, durability)]
    return result


async def _lost(prompts: int, durability: str, *, latency_s: float, seed: int, replicas: int) -> dict[str, Any]:
    # Nobody can confirm a miss while S3 is away: what may be paid for all the same is for the operator to say.
    config = f'durability = "{durability}"\n[generation]\nunknown_budget_microusd_per_hour = 1_000_000_000_000'
    latency = Latency(spread="uniform", mean_s=latency_s)
    names = [f"picture {number}" for number in range(prompts)]
    async with (
        standing(replicas=replicas, latency=latency, picture_bytes=100_000, seed=seed, config=config) as stand,
        AsyncExitStack() as opened,
    ):
        clients = [await opened.enter_async_context(AsyncClient(each.address)) for each in stand.replicas]
        asking = Callers(clients)
        stand.under.s3_proxy.hang()
        half = prompts // 2
        await _ask_for(asking, names[:half], replicas)
        if durability == "journal":
            stand.under.valkey.stop()
        await _ask_for(asking, names[half:], replicas)
        dead, *living = stand.replicas
        undrained = await metric(dead, "cacheserver_journal_entries")
        await dead.kill()
        await asyncio.to_thread(shutil.rmtree, dead.directory)
        stand.under.valkey.cont()
        stand.under.s3_proxy.resume()
        began_s = time.monotonic()
        is_home = await stand.home(living, _HOME_S)
        home_s = time.monotonic() - began_s
        counted = sum([await metric(each, "cacheserver_lost_total") for each in living])
        billed = await stand.billed()
        stand.under.valkey.execute("FLUSHALL")
        for each in living:
            await each.kill()
            await each.start()
        found = await _found(clients[1], names)
    given = asking.pictures
    return {
        "answered": len(asking.took_s),
        "failed": asking.failed.total(),
        "in the journal of the dead": int(undrained),
        "given and not in S3": sum(name not in found for name in given),
        "given and other bytes in S3": sum(found[name] not in given[name] for name in given if name in found),
        "counted as lost": int(counted),
        "paid for": billed.total(),
        "paid for twice": sum(count - 1 for count in billed.values()),
        "all in S3 after, s": home_s if is_home else float("inf"),
    }


async def _ask_for(asking: Callers, names: Sequence[str], replicas: int) -> None:
    places = asyncio.Semaphore(_AT_ONCE)

    async def ask(number: int, name: str) -> None:
        async with places:
            await asking.ask(name, number % replicas)

    await asyncio.gather(*(ask(number, name) for number, name in enumerate(names)))


async def _found(client: AsyncClient, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of what is stored of each; one of which nothing is, is left out."""
    found: dict[str, str] = {}
    places = asyncio.Semaphore(_AT_ONCE)

    async def look(name: str) -> None:
        async with places:
            with suppress(CacheError):
                picture = await client.get_image(image_of(name), cache_policy=CachePolicy.ONLY_IF_CACHED)
                found[name] = hashlib.sha256(picture.data).hexdigest()

    await asyncio.gather(*map(look, names))
    return found


def _shortfalls_of_lost(figures: dict[str, Any], durability: str) -> list[str]:
    allowed = 0 if durability == "journal+redis" else figures["in the journal of the dead"]
    shortfalls = []
    if figures["failed"]:
        shortfalls.append(f"{figures['failed']} requests failed")
    if figures["given and not in S3"] > allowed:
        shortfalls.append(f"{figures['given and not in S3']} pictures are lost, not {allowed} at most")
    if figures["given and other bytes in S3"]:
        shortfalls.append(f"of {figures['given and other bytes in S3']} pictures S3 has others")
    if figures["paid for twice"]:
        shortfalls.append(f"{figures['paid for twice']} pictures were paid for twice")
    if figures["all in S3 after, s"] == float("inf"):
        shortfalls.append(f"not everything was in S3 after {_HOME_S:g} s")
    if not figures["in the journal of the dead"]:
        shortfalls.append("the dead replica had brought all to S3: it says nothing")
    return shortfalls


def _what_failed(failed: Counter[str]) -> list[str]:
    return [f"{count} requests failed: {text}" for text, count in failed.items()]


def _shortfalls_of_killed(figures: dict[str, Any], waves: int) -> list[str]:
    shortfalls = []
    if figures["answered"] != figures["requests"]:
        shortfalls.append(f"{figures['requests'] - figures['answered']} requests were not answered")
    if figures["of these paid for once"]:
        shortfalls.append(f"{figures['of these paid for once']} prompts have two pictures and were paid for once")
    if figures["paid for"] > figures["prompts"] + figures["calls that killed replicas had out"]:
        shortfalls.append("more was paid for than once for each prompt and each call that a killed replica had out")
    if figures["calls open at the end"]:
        shortfalls.append(f"{figures['calls open at the end']} calls are open though nothing runs")
    if figures["kills"] < waves or not figures["calls that killed replicas had out"]:
        shortfalls.append(f"{figures['kills']} of {waves} leaders were killed: it says less than it should")
    return shortfalls


def main(  # noqa: PLR0913, PLR0917 - options
    scenario: Annotated[str, typer.Argument(help="one, killed or lost.")],
    requests: Annotated[int | None, typer.Option(help="one, killed: how many; 10,000 or 2,000.")] = None,
    prompts: Annotated[int | None, typer.Option(help="killed, lost: how many; 500 (tens of them) or 300.")] = None,
    latency: Annotated[float | None, typer.Option(help="Seconds a generation takes; 30 for one, else 1.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, moments and latencies.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Whether replicas pay once for what all are asked for; ends with 1 where a figure falls short."""
    if scenario == "one":
        result = asyncio.run(one(requests=requests or 10_000, latency_s=latency or 30.0, seed=seed))
    elif scenario == "killed":
        running = killed(prompts=prompts or 500, requests=requests or 2_000, latency_s=latency or 1.0, seed=seed)
        result = asyncio.run(running)
    elif scenario == "lost":
        result = asyncio.run(lost(prompts=prompts or 300, latency_s=latency or 1.0, seed=seed))
    else:
        raise typer.BadParameter("one, killed or lost", param_hint="scenario")
    rows = [
        (name, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}") for name, value in result.figures.items()
    ]
    print_table(f"Replicas, {scenario}", ["figure", "value"], rows)
    print_verdict(result.shortfalls)
    write_json(json, f"replicas-{scenario}", {"seed": seed, "figures": result.figures, "shortfalls": result.shortfalls})
    raise typer.Exit(1 if result.shortfalls else 0)


if __name__ == "__main__":
    typer.run(main)
