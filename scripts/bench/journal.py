"""Whether what was paid for survives: killed at random moments, and with S3 away for long.

Service, S3, Redis and the emulated provider are processes of their own.

    killed    callers ask for new pictures; at a random moment the service is killed (SIGKILL) and started again, so
              many times. Afterwards, against what callers were given and what the provider billed:
                  every picture that a caller was given is in S3, the same bytes
                  every picture that was billed is in S3, or its call is an unknown one in the ledger
                  no call is settled whose picture is nowhere, no picture is billed twice but for an unknown call
    outage    callers ask for new pictures at a steady rate, and S3 hangs for some minutes of it, then comes back, while
              they go on at the same rate or another:
                  no call fails
                  the journal is empty again within the time that is allowed
                  resident bytes rise by no more than is allowed, and every picture is in S3
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import httpx
import typer
from prometheus_client.parser import text_string_to_metric_families

from cacheserver.client import AsyncClient
from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.load import Stub, callers
from scripts.bench.provider import KeyConfig, Latency, ProviderConfig, ProviderProcess
from scripts.bench.stand import ServiceProcess
from tests.servers import S3Server, TcpProxy, ValkeyServer

_MB = 1_000_000
_ONLY_IF_CACHED = pb.CACHE_POLICY_ONLY_IF_CACHED
_DEADLINE_S = 120.0
_LATENCY_S = 1.0
"""Of a generation while S3 is away."""

_HOME_S = 60.0
"""Most that what one life left may take to be in S3, where nothing is wrong with it."""
_AT_ONCE = 16


@dataclass(slots=True)
class Stand:
    """What runs. `s3_proxy` is the way from the service to S3."""

    service: ServiceProcess
    stub: Stub
    provider: ProviderProcess
    valkey: ValkeyServer
    s3: S3Server
    s3_proxy: TcpProxy

    async def metric(self, name: str) -> float:
        """What the service says of itself."""
        return await metric(self.service, name)

    async def home(self, within_s: float) -> float:
        """Wait until the journal is empty; how long that took, infinity if it did not come in time."""
        began_s = time.monotonic()
        while await self.metric("cacheserver_journal_entries"):
            if time.monotonic() - began_s > within_s:
                return float("inf")
            await asyncio.sleep(0.1)
        return time.monotonic() - began_s

    async def left(self, within_s: float) -> None:
        """Wait until something is in the journal."""
        until_s = time.monotonic() + within_s
        while not await self.metric("cacheserver_journal_entries"):
            if time.monotonic() > until_s:
                raise TimeoutError("nothing came into the journal")
            await asyncio.sleep(0.02)

    async def in_s3(self, prompts: Sequence[str]) -> dict[str, str]:
        """The SHA-256 of what S3 has of each, Redis and memory being empty; a prompt it has nothing of is left out."""
        self.valkey.execute("FLUSHALL")
        await self.service.kill()
        await self.service.start()
        found: dict[str, str] = {}
        places = asyncio.Semaphore(_AT_ONCE)

        async def look(prompt: str) -> None:
            request = pb.GetImageRequest(spec=spec(prompt), cache_policy=_ONLY_IF_CACHED)
            async with places:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    response = await self.stub.GetImage(request, timeout=_DEADLINE_S)
                    found[prompt] = hashlib.sha256(response.images[0].data).hexdigest()

        await asyncio.gather(*map(look, prompts))
        return found


@dataclass(slots=True)
class Result:
    """What a run showed, and where that is not as it should be."""

    figures: dict[str, Any] = field(default_factory=dict)
    shortfalls: list[str] = field(default_factory=list)


async def metric(service: ServiceProcess, name: str) -> float:
    """What a service says of itself, summed over what it tells apart."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        text = (await http.get(f"http://{service.http_address}/metrics")).text
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return sum(each.value for each in samples if each.name == name)


def spec(prompt: str) -> pb.ImageSpec:
    """What is asked for."""
    return pb.ImageSpec(prompt=prompt, quality="medium", size="1024x1024")


@dataclass(slots=True)
class Beneath:
    """What a service stands on. `s3_proxy` is the way to S3; `config` tells a service of it all."""

    directory: Path
    provider: ProviderProcess
    valkey: ValkeyServer
    s3: S3Server
    s3_proxy: TcpProxy
    config: str


@asynccontextmanager
async def beneath(*, latency: Latency, picture_bytes: int, seed: int) -> AsyncIterator[Beneath]:
    """All that is beneath services, for as long as it is entered; `directory` is for theirs."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        for name in ("valkey", "provider", "s3"):
            (directory / name).mkdir()
        valkey, s3 = ValkeyServer(directory / "valkey"), S3Server(directory / "s3")
        stack.push_async_callback(asyncio.to_thread, valkey.kill)
        stack.push_async_callback(asyncio.to_thread, s3.close)
        await asyncio.gather(asyncio.to_thread(valkey.start), asyncio.to_thread(s3.start))
        provider_config = ProviderConfig(
            keys=(KeyConfig(key="sk-a", group="org-a"),), latency=latency, min_picture_bytes=picture_bytes, seed=seed
        )
        provider = await stack.enter_async_context(ProviderProcess(provider_config, directory / "provider"))
        proxy = await stack.enter_async_context(TcpProxy("127.0.0.1", s3.port))
        config = "\n".join(
            [
                f'[redis]\nurl = "{valkey.url}"',
                f'[s3]\nbucket = "{s3.bucket}"\nendpoint = "http://127.0.0.1:{proxy.port}"\nregion = "{s3.region}"',
                f'access_key = "{s3.access_key}"\nsecret_key = "{s3.secret_key}"',
                f'[[upstreams]]\nname = "a"\nbase_url = "{provider.base_url}"\napi_key = "sk-a"',
                "[limit_groups.a]\nconcurrent = 200",
            ]
        )
        yield Beneath(directory, provider, valkey, s3, proxy, config)


@asynccontextmanager
async def standing(*, latency_s: float, picture_bytes: int, config: str, seed: int) -> AsyncIterator[Stand]:
    """All of it, for as long as it is entered."""
    latency = Latency(spread="uniform", mean_s=latency_s)
    async with AsyncExitStack() as stack:
        under = await stack.enter_async_context(beneath(latency=latency, picture_bytes=picture_bytes, seed=seed))
        service = ServiceProcess(under.directory / "service", f"{config}\n{under.config}")
        await stack.enter_async_context(service)
        [stub] = await stack.enter_async_context(callers(service.address, 1))
        yield Stand(service, stub, under.provider, under.valkey, under.s3, under.s3_proxy)


async def killed(*, kills: int, latency_s: float, seed: int) -> Result:
    """Kill the service so many times."""
    chance = random.Random(seed)  # noqa: S311 - chooses moments
    given: dict[str, str] = {}
    asked: list[str] = []
    result = Result()

    async def ask(stub: Stub, prompt: str) -> None:
        asked.append(prompt)
        with contextlib.suppress(grpc.aio.AioRpcError):  # it was killed
            response = await stub.GetImage(pb.GetImageRequest(spec=spec(prompt)), timeout=_DEADLINE_S)
            given[prompt] = hashlib.sha256(response.images[0].data).hexdigest()

    async with standing(latency_s=latency_s, picture_bytes=200_000, config="", seed=seed) as stand:
        left = 0
        for kill in range(kills):
            print(f"kill {kill + 1} of {kills}", file=sys.stderr, flush=True)
            # S3 is late for some, the first among them, so that callers are answered from the journal.
            stand.s3_proxy.delay_s = chance.choice([0.0, 0.0, 0.3, 1.5]) if kill else 1.5
            asking = [asyncio.create_task(ask(stand.stub, f"kill {kill} picture {number}")) for number in range(8)]
            await (asyncio.sleep(latency_s * chance.uniform(0.3, 2.5)) if kill else stand.left(_HOME_S))
            await stand.service.kill()
            await asyncio.gather(*asking)
            await stand.service.start()
            left += int(await stand.metric("cacheserver_journal_entries"))
            stand.s3_proxy.delay_s = 0.0
            if await stand.home(_HOME_S) == float("inf"):
                result.shortfalls.append(f"kill {kill}: the journal is not empty after {_HOME_S:g} s")
        async with AsyncClient(stand.service.address) as client:
            rows = Counter([str(row.outcome) async for row in client.admin.list_ledger()])
        found = await stand.in_s3(asked)
        calls = await stand.provider.calls()
    billed = Counter(call.prompt_sha256 for call in calls if call.billed_microusd)
    stored = {hashlib.sha256(prompt.encode()).hexdigest() for prompt in found}
    nowhere = sum(1 for prompt in billed if prompt not in stored)
    twice = sum(count - 1 for count in billed.values())
    unknown = rows["unknown"]
    result.figures = {
        "kills": kills,
        "asked": len(asked),
        "given to callers": len(given),
        "given and not in S3": sum(prompt not in found for prompt in given),
        "given and other bytes in S3": sum(found.get(prompt, digest) != digest for prompt, digest in given.items()),
        "billed": sum(billed.values()),
        "billed twice": twice,
        "in S3": len(found),
        "billed and nowhere": nowhere,
        "left in the journal by a killed process": left,
        **{f"ledger: {outcome}": count for outcome, count in sorted(rows.items())},
    }
    for name in ("given and not in S3", "given and other bytes in S3"):
        if result.figures[name]:
            result.shortfalls.append(f"{result.figures[name]} pictures were {name}")
    if nowhere + twice > unknown:
        result.shortfalls.append(f"{nowhere} billed and nowhere, {twice} billed twice, and {unknown} unknown calls")
    if rows["settled"] > len(found):
        result.shortfalls.append(f"{rows['settled']} calls settled and {len(found)} pictures in S3")
    if rows["sent"]:
        result.shortfalls.append(f"{rows['sent']} calls are open though nothing runs")
    if not left:
        result.shortfalls.append("no killed process left anything in the journal: it says nothing")
    return result


async def outage(  # noqa: PLR0913 - how hard, and what is allowed
    *,
    seconds: float,
    rate: float,
    rate_after: float,
    before_s: float,
    allowed_home_s: float,
    allowed_mb: float,
    seed: int,
) -> Result:
    """Have S3 hang for so long, after some seconds in which it does not."""
    given: dict[str, str] = {}
    failures: Counter[str] = Counter()
    resident: list[float] = []
    entries: list[float] = []
    result = Result()

    async def ask(stub: Stub, prompt: str) -> None:
        try:
            response = await stub.GetImage(pb.GetImageRequest(spec=spec(prompt)), timeout=_DEADLINE_S)
            given[prompt] = hashlib.sha256(response.images[0].data).hexdigest()
        except grpc.aio.AioRpcError as error:
            failures[f"{error.code().name}: {error.details()}"] += 1

    async def ask_for(stand: Stand, span_s: float, name: str, asking: set[asyncio.Task[None]], rate: float) -> None:
        began_s = time.monotonic()
        for number in range(int(span_s * rate)):
            await asyncio.sleep(max(0.0, began_s + number / rate - time.monotonic()))
            task = asyncio.create_task(ask(stand.stub, f"{name} {number}"))
            asking.add(task)
            task.add_done_callback(asking.discard)
            if number % int(10 * rate) == 0:
                resident.append(_resident_mb(stand.service.pid))
                entries.append(await stand.metric("cacheserver_journal_entries"))
                print(f"{name}: {entries[-1]:,.0f} in the journal, {resident[-1]:,.0f} MB", file=sys.stderr, flush=True)

    # Nobody can confirm a miss while S3 is away: what may be paid for all the same is for the operator to say.
    config = "\n".join(
        [
            f"[memory]\nmax_bytes = {64 * 1024 * 1024}",
            "[generation]\nunknown_budget_microusd_per_hour = 1_000_000_000_000",
        ]
    )
    async with standing(latency_s=_LATENCY_S, picture_bytes=100_000, config=config, seed=seed) as stand:
        asking: set[asyncio.Task[None]] = set()
        await ask_for(stand, before_s, "before", asking, rate)
        before_mb = max(resident)
        stand.s3_proxy.hang()
        await ask_for(stand, seconds, "away", asking, rate)
        stand.s3_proxy.resume()
        going_on = asyncio.create_task(ask_for(stand, allowed_home_s, "after", asking, rate_after))
        home_s = await _drained(stand, allowed_home_s, at_most=2 * rate_after, resident=resident)
        left = await stand.metric("cacheserver_journal_entries")
        going_on.cancel()
        await asyncio.wait({going_on, *asking})
        await stand.home(_HOME_S)
        found = await stand.in_s3(list(given))
    result.figures = {
        "S3 away, s": seconds,
        "generations a second": rate,
        "generations a second after": rate_after,
        "given to callers": len(given),
        "failed": sum(failures.values()),
        "most in the journal": max(entries),
        "journal drained, s": home_s if math.isfinite(home_s) else None,
        "left in the journal then": left,
        "resident before, MB": before_mb,
        "most resident, MB": max(resident),
        "given and not in S3, same bytes": sum(found.get(prompt) != digest for prompt, digest in given.items()),
    }
    result.shortfalls += [f"{count} calls failed: {text}" for text, count in failures.items()]
    if home_s > allowed_home_s:
        result.shortfalls.append(f"the journal had not drained after {allowed_home_s:g} s")
    if max(resident) - before_mb > allowed_mb:
        result.shortfalls.append(f"{max(resident) - before_mb:,.0f} MB more were resident, not {allowed_mb:g} at most")
    if result.figures["given and not in S3, same bytes"]:
        result.shortfalls.append("pictures that callers were given are not in S3")
    if max(entries) < 0.8 * (seconds - _LATENCY_S) * rate:  # what was asked for in the last second is not made yet
        result.shortfalls.append("the journal did not take what was made: it says nothing")
    return result


async def _drained(stand: Stand, within_s: float, *, at_most: float, resident: list[float]) -> float:
    """Wait until hardly more is in the journal than what is on its way just now; how long that took.

    What is `resident` is noted meanwhile.
    """
    began_s = time.monotonic()
    while await stand.metric("cacheserver_journal_entries") > at_most:
        if time.monotonic() - began_s > within_s:
            return float("inf")
        resident.append(_resident_mb(stand.service.pid))
        await asyncio.sleep(1)  # to ask takes the service's time
    return time.monotonic() - began_s


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MB


def main(  # noqa: PLR0913, PLR0917 - options
    scenario: Annotated[str, typer.Argument(help="killed or outage.")],
    kills: Annotated[int, typer.Option(help="killed: how often.")] = 50,
    latency: Annotated[float, typer.Option(help="killed: mean seconds a generation takes.")] = 0.5,
    seconds: Annotated[float, typer.Option(help="outage: how long S3 is away.")] = 600.0,
    rate: Annotated[float, typer.Option(help="outage: generations a second.")] = 50.0,
    rate_after: Annotated[float | None, typer.Option(help="outage: once S3 is back; as before if not given.")] = None,
    home: Annotated[float, typer.Option(help="outage: seconds in which the journal has to drain.")] = 120.0,
    mb: Annotated[float, typer.Option(help="outage: MB more that may be resident.")] = 150.0,
    seed: Annotated[int, typer.Option(help="Of moments and latencies.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Whether what was paid for survives; ends with 1 where a figure falls short."""
    if scenario == "killed":
        result = asyncio.run(killed(kills=kills, latency_s=latency, seed=seed))
    elif scenario == "outage":
        result = asyncio.run(
            outage(
                seconds=seconds,
                rate=rate,
                rate_after=rate if rate_after is None else rate_after,
                before_s=30.0,
                allowed_home_s=home,
                allowed_mb=mb,
                seed=seed,
            )
        )
    else:
        raise typer.BadParameter("killed or outage", param_hint="scenario")
    rows = [
        (name, f"{value:,.1f}" if isinstance(value, float) else "not" if value is None else f"{value:,}")
        for name, value in result.figures.items()
    ]
    print_table(f"The journal, {scenario}", ["figure", "value"], rows)
    print_verdict(result.shortfalls)
    write_json(json, f"journal-{scenario}", {"seed": seed, "figures": result.figures, "shortfalls": result.shortfalls})
    raise typer.Exit(1 if result.shortfalls else 0)


if __name__ == "__main__":
    typer.run(main)
