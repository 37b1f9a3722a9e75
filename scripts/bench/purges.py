"""How long a purge takes and what is served after it, as clients of several replicas see it.

Replicas, S3, Redis and the emulated provider are processes of their own.

    many    a namespace of many entries is purged whole:
                the call returns in the time allowed, and again while the bytes are still being reclaimed
    load    all replicas are read from all the time, one of them cut off from Redis, while pictures, and in the end all
            of the namespace, are purged at the others:
                a replica that has Redis serves nothing purged a second after the purge's answer
                the one that is cut off serves nothing purged `purge.check_s` and a second after it
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import sys
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import typer

from cacheserver.clock import SystemClock
from cacheserver.model import CachedImage, CacheKey, GeneratedImage
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import connect, disconnect
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.journal import Result, beneath, spec
from scripts.bench.load import Stub, callers
from scripts.bench.provider import Latency
from scripts.bench.stand import ServiceProcess
from tests.servers import TcpProxy

_REPLICAS = 4
_DEADLINE_S = 60.0
_CONNECTED_S = 1.0
_CHECK_S = 5.0
"""`purge.check_s`."""

_PICTURES = 200
_READERS = 4
"""At each replica."""

_PURGES = 40
"""Of single pictures in a round."""

_PAUSE_S = 0.5
_READ_S = 0.005
_AT_ONCE = 64
_MORE_PURGES = 10
_PREFIX = "cacheserver:"
_READ = "the one that is read"
_LATENCY = Latency(spread="uniform", mean_s=0.05)


async def many(*, keys: int, allowed_ms: float, seed: int) -> Result:
    """Purge a namespace that has so many entries."""
    result = Result()
    async with AsyncExitStack() as stack:
        under = await stack.enter_async_context(beneath(latency=_LATENCY, picture_bytes=1_000, seed=seed))
        service = ServiceProcess(under.directory / "replica", under.config)
        await stack.enter_async_context(service)
        [stub] = await stack.enter_async_context(callers(service.address, 1))
        under.valkey.execute("CONFIG SET maxmemory 0")
        client = connect(under.valkey.url, timeout_s=30.0, connect_timeout_s=5.0)
        stack.push_async_callback(disconnect, client)
        redis = RedisTier(client, clock=SystemClock(), rng=random.Random(seed), prefix=_PREFIX)  # noqa: S311 - spreads expiry
        await stub.GetImage(pb.GetImageRequest(spec=spec(_READ)), timeout=_DEADLINE_S)
        await _fill(redis, keys)
        stored = await client.dbsize()
        returned_ms = [await _purge_ms(stub, pb.PurgeImagesRequest(everything=True))]
        is_gone = await _is_gone(stub, _READ)
        returned_ms += [await _purge_ms(stub, pb.PurgeImagesRequest(everything=True)) for _ in range(_MORE_PURGES)]
        left = await client.dbsize()
    result.figures = {
        "entries": keys,
        "keys in Redis": stored,
        "purged in, ms": returned_ms[0],
        "most of ten more while bytes are reclaimed, ms": max(returned_ms[1:]),
        "keys in Redis when the last of them returned": left,
    }
    if max(returned_ms) > allowed_ms:
        result.shortfalls.append(f"a purge took {max(returned_ms):.1f} ms, not {allowed_ms:g} at most")
    if not is_gone:
        result.shortfalls.append("what was purged is still answered with")
    if stored < keys or left < keys / 2:
        result.shortfalls.append("nearly nothing was left to reclaim: it says nothing")
    return result


async def _fill(redis: RedisTier, keys: int) -> None:
    data = b"x" * 100
    image = GeneratedImage(
        data=data,
        sha256=hashlib.sha256(data).hexdigest(),
        content_type="image/png",
        width=1,
        height=1,
        model="gpt-image-2",
        size="1024x1024",
        quality="medium",
        background="auto",
        paid_microusd=1,
    )
    places = asyncio.Semaphore(_AT_ONCE)

    async def put(number: int) -> None:
        digest = hashlib.sha256(str(number).encode()).digest()
        key = CacheKey("default", digest[:16], digest, 0)
        entry = CachedImage(key, image, "default", prompt_digest=digest, create_time_s=time.time(), expire_time_s=None)
        try:
            await redis.put(key, entry, replace=True)
        finally:
            places.release()

    async with asyncio.TaskGroup() as putting:
        for number in range(keys):
            await places.acquire()
            putting.create_task(put(number))
            if number % 100_000 == 0:
                print(f"{number:,} of {keys:,} entries", file=sys.stderr, flush=True)


async def _purge_ms(stub: Stub, request: pb.PurgeImagesRequest) -> float:
    began_s = time.perf_counter()
    await stub.PurgeImages(request, timeout=_DEADLINE_S)
    return (time.perf_counter() - began_s) * 1e3


async def _is_gone(stub: Stub, prompt: str) -> bool:
    try:
        await stub.GetImage(_only_if_cached(prompt), timeout=_DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.NOT_FOUND
    return False


def _only_if_cached(prompt: str) -> pb.GetImageRequest:
    return pb.GetImageRequest(spec=spec(prompt), cache_policy=pb.CACHE_POLICY_ONLY_IF_CACHED)


@dataclass(slots=True)
class Purges:
    """What was purged when, and how much later each replica still served it. Times are monotonic seconds."""

    now: dict[str, str] = field(default_factory=dict)
    """What each prompt's picture is, by its SHA-256."""
    gone: dict[str, float] = field(default_factory=dict)
    """When the purge of a picture, by its SHA-256, was answered."""
    late_s: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    reads: Counter[str] = field(default_factory=Counter)

    def purged(self, prompts: list[str]) -> None:
        """A purge of these was answered just now."""
        for prompt in prompts:
            self.gone.setdefault(self.now.pop(prompt), time.monotonic())

    def was_read(self, replica: int, digest: str, began_s: float) -> None:
        """A replica gave this to a read that began then."""
        self.reads["hits"] += 1
        if (gone_s := self.gone.get(digest)) is not None and began_s > gone_s:
            self.late_s[replica] = max(self.late_s[replica], began_s - gone_s)
            self.reads["hits of what was purged"] += 1


class Load:
    """Callers of replicas, of which the last one reaches Redis by a way that can be cut."""

    def __init__(self, stubs: list[Stub], proxy: TcpProxy, *, seed: int) -> None:
        self.purges = Purges()
        self.purge_ms: list[float] = []
        self._stubs = stubs
        self._proxy = proxy
        self._prompts = [f"picture {number}" for number in range(_PICTURES)]
        self._chance = random.Random(seed)  # noqa: S311 - chooses pictures and replicas

    async def round(self) -> None:
        """Make all, read it everywhere, cut a replica off from Redis, and purge: some of it, and then all."""
        now = self.purges.now
        await asyncio.gather(*(self._make(prompt) for prompt in self._prompts if prompt not in now))
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(self._read(n)) for n in range(_REPLICAS) for _ in range(_READERS)]
            await asyncio.sleep(2.0)  # all replicas have some in memory
            self._proxy.cut()
            for prompt in self._chance.sample(self._prompts, _PURGES):
                await self._purge(pb.PurgeImagesRequest(spec=spec(prompt)), [prompt])
                await asyncio.sleep(_PAUSE_S)
            await self._purge(pb.PurgeImagesRequest(everything=True), list(now))
            await asyncio.sleep(_CHECK_S + 3.0)
            self._proxy.resume()
            for task in reading:
                task.cancel()

    async def _make(self, prompt: str) -> None:
        response = await self._stubs[0].GetImage(pb.GetImageRequest(spec=spec(prompt)), timeout=_DEADLINE_S)
        self.purges.now[prompt] = _sha256(response)

    async def _purge(self, request: pb.PurgeImagesRequest, prompts: list[str]) -> None:
        self.purge_ms.append(await _purge_ms(self._chance.choice(self._stubs[:-1]), request))
        self.purges.purged(prompts)

    async def _read(self, replica: int) -> None:
        while True:
            request = _only_if_cached(self._chance.choice(self._prompts))
            began_s = time.monotonic()
            try:
                response = await self._stubs[replica].GetImage(request, timeout=_DEADLINE_S)
                self.purges.was_read(replica, _sha256(response), began_s)
            except grpc.aio.AioRpcError as error:
                is_absent = error.code() is grpc.StatusCode.NOT_FOUND
                self.purges.reads["not cached" if is_absent else f"failed: {error.code().name}"] += 1
            await asyncio.sleep(_READ_S)


def _sha256(response: pb.GetImageResponse) -> str:
    return hashlib.sha256(response.images[0].data).hexdigest()


async def load(*, rounds: int, seed: int) -> Result:
    """Purge at some replicas while all are read from."""
    async with AsyncExitStack() as stack:
        under = await stack.enter_async_context(beneath(latency=_LATENCY, picture_bytes=20_000, seed=seed))
        proxy = await stack.enter_async_context(TcpProxy("127.0.0.1", under.valkey.port))
        by_proxy = under.config.replace(f"127.0.0.1:{under.valkey.port}", f"127.0.0.1:{proxy.port}")
        configs = [under.config] * (_REPLICAS - 1) + [by_proxy]
        replicas = [ServiceProcess(under.directory / f"replica-{n}", config) for n, config in enumerate(configs)]
        for each in replicas:
            await stack.enter_async_context(each)
        stubs = [(await stack.enter_async_context(callers(each.address, 1)))[0] for each in replicas]
        running = Load(stubs, proxy, seed=seed)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            await running.round()
    return _result_of_load(running)


def _result_of_load(running: Load) -> Result:
    late_s, reads = running.purges.late_s, running.purges.reads
    connected_s, cut_s = max(late_s[n] for n in range(_REPLICAS - 1)), late_s[_REPLICAS - 1]
    result = Result()
    result.figures = {
        "purges": len(running.purge_ms),
        "longest purge, ms": max(running.purge_ms),
        **dict(sorted(reads.items())),
        "served last after its purge, connected, s": connected_s,
        "served last after its purge, cut off, s": cut_s,
    }
    if connected_s > _CONNECTED_S:
        result.shortfalls.append(f"a connected replica served what was purged {connected_s:.2f} s before")
    if cut_s > _CHECK_S + _CONNECTED_S:
        result.shortfalls.append(f"the replica cut off served what was purged {cut_s:.2f} s before")
    if cut_s == 0.0:
        result.shortfalls.append("nothing purged was ever in the memory of the replica cut off: it says nothing")
    result.shortfalls += [f"{count} reads {kind}" for kind, count in reads.items() if kind.startswith("failed")]
    return result


def main(  # noqa: PLR0913, PLR0917 - options
    scenario: Annotated[str, typer.Argument(help="many or load.")],
    keys: Annotated[int, typer.Option(help="many: entries of the namespace.")] = 1_000_000,
    allowed_ms: Annotated[float, typer.Option(help="many: most that a purge may take.")] = 50.0,
    rounds: Annotated[int, typer.Option(help="load: how often all is made, read and purged.")] = 3,
    seed: Annotated[int, typer.Option(help="Of pictures and choices.")] = 1,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """How long purges take and what is served after them; ends with 1 where a figure falls short."""
    if scenario == "many":
        result = asyncio.run(many(keys=keys, allowed_ms=allowed_ms, seed=seed))
    elif scenario == "load":
        result = asyncio.run(load(rounds=rounds, seed=seed))
    else:
        raise typer.BadParameter("many or load", param_hint="scenario")
    rows = [
        (name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}") for name, value in result.figures.items()
    ]
    print_table(f"Purges, {scenario}", ["figure", "value"], rows)
    print_verdict(result.shortfalls)
    write_json(json, f"purges-{scenario}", {"seed": seed, "figures": result.figures, "shortfalls": result.shortfalls})
    raise typer.Exit(1 if result.shortfalls else 0)


if __name__ == "__main__":
    typer.run(main)
