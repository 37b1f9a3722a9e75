"""Three replicas, a Redis Cluster, S3 and a provider, each behind a proxy, and what breaks them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
from botocore.exceptions import BotoCoreError, ClientError
from prometheus_client.parser import text_string_to_metric_families

from cacheserver.client import AsyncClient
from scripts.bench.provider import KeyConfig, Latency, ProviderConfig, ProviderProcess
from scripts.bench.stand import ServiceProcess
from tests.chaos.model import Model, Span, sha256
from tests.chaos.schedule import MASTERS, REPLICAS, SILENT_REDIS, SILENT_S3, Fault, Kind
from tests.chaos.service import CLOCK
from tests.servers import Cluster, S3Server, TcpProxy

_PICTURE_BYTES = 20_000
_FULL_BYTES = 8_192
"""No file gets larger while a replica's disk is full: less than a picture has."""

FLOCK = "flock"
"""The namespace that is purged as a whole."""

_UNLEASED = "cacheserver_unleased_total"


@dataclass(slots=True)
class Replica:
    """One of the replicas. `unleased` is what all its lives so far counted."""

    service: ServiceProcess
    clock: Path
    client: AsyncClient
    unleased: float = 0.0
    of_this_life: float = 0.0

    async def metric(self, name: str) -> float:
        """What it says of itself. Raises httpx.TransportError if it does not."""
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as http:
            text = (await http.get(f"http://{self.service.http_address}/metrics")).text
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        return sum(each.value for each in samples if each.name == name)

    async def count(self) -> None:
        """Look how often it went without a lease, if it says so."""
        with contextlib.suppress(httpx.TransportError):
            now = await self.metric(_UNLEASED)
            if now < self.of_this_life:
                self.unleased += self.of_this_life
            self.of_this_life = now

    @property
    def all_unleased(self) -> int:
        """Of all its lives."""
        return int(self.unleased + self.of_this_life)


@dataclass(slots=True)
class Stand:
    """What runs, and what of it is broken now."""

    directory: Path
    replicas: list[Replica]
    cluster: Cluster
    redis: list[TcpProxy]
    s3: S3Server
    s3_proxy: TcpProxy
    provider: ProviderProcess
    provider_proxy: TcpProxy
    model: Model
    chance: random.Random
    subjects: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    async def strike(self, fault: Fault) -> None:
        """Let it happen, and end."""
        async with self.subjects[fault.subject]:
            print(f"{datetime.now(UTC):%H:%M:%S.%f}  {fault}", file=sys.stderr, flush=True)  # noqa: T201 - a command's output
            now_s = time.monotonic()
            span = Span(now_s)
            model, kind = self.model, fault.kind
            out = model.out(now_s)
            model.counts[f"fault: {kind}"] += 1
            model.faults.append((kind.value, span))
            if kind in SILENT_REDIS or kind is Kind.MASTER_EMPTIED:
                model.silent_redis.append(span)
                model.excuse("losses", out)
            if kind in SILENT_S3:
                model.silent_s3.append(span)
            if kind is Kind.REPLICA_PAUSED:
                model.paused[fault.target].append(span)
                model.excuse("paused", out)
            try:
                await self._strike(fault)
            finally:
                span.to_s = time.monotonic()

    async def _strike(self, fault: Fault) -> None:
        match fault.kind:
            case Kind.REPLICA_KILLED | Kind.REPLICA_PAUSED | Kind.DISK_FULL | Kind.CLOCK_JUMPS:
                await self._strike_replica(fault, self.replicas[fault.target])
            case Kind.MASTER_KILLED | Kind.MASTER_EMPTIED:
                await self._strike_master(fault)
            case Kind.REDIS_CORRUPT:
                await asyncio.to_thread(self._corrupt_redis)
            case Kind.S3_CORRUPT:
                await self._corrupt_s3()
            case Kind.PROVIDER_ERRORS:
                await self.provider.fail_next(None, "503", int(fault.amount))
            case _:
                await self._strike_proxies(fault)

    async def _strike_replica(self, fault: Fault, replica: Replica) -> None:
        pid = replica.service.pid
        match fault.kind:
            case Kind.REPLICA_KILLED:
                await replica.count()
                await replica.service.kill()
                await asyncio.sleep(fault.lasts_s)
                await replica.service.start()
            case Kind.REPLICA_PAUSED:
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(fault.lasts_s)
                os.kill(pid, signal.SIGCONT)
            case Kind.DISK_FULL:
                soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FULL_BYTES, hard))
                await asyncio.sleep(fault.lasts_s)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
            case _:
                now = float(await asyncio.to_thread(replica.clock.read_text))
                _set_clock(replica.clock, now + fault.amount)

    async def _strike_master(self, fault: Fault) -> None:
        node = self.cluster.nodes[fault.target]
        if fault.kind is Kind.MASTER_EMPTIED:
            await asyncio.to_thread(node.execute, "FLUSHALL")
            return
        await asyncio.to_thread(node.kill)
        await asyncio.sleep(fault.lasts_s)
        await asyncio.to_thread(node.start)
        await asyncio.to_thread(_announce, self.cluster, self.redis)

    async def _strike_proxies(self, fault: Fault) -> None:
        name = fault.kind.value
        one = [self.s3_proxy] if "S3" in name else [self.provider_proxy] if "provider" in name else self.redis
        for proxy in one:
            if fault.kind in {Kind.REDIS_SLOW, Kind.S3_SLOW, Kind.PROVIDER_SLOW}:
                proxy.delay_s = fault.amount
            elif fault.kind in {Kind.REDIS_HANGS, Kind.S3_HANGS}:
                proxy.hang()
            else:
                proxy.cut()
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            for proxy in one:
                proxy.delay_s = 0.0
                proxy.resume()

    def _corrupt_redis(self) -> None:
        """Overwrite a part of a picture."""
        for node in self.chance.sample(self.cluster.nodes, MASTERS):
            for _ in range(20):
                key = _bulk(node.execute("RANDOMKEY"))
                length = node.execute(f"STRLEN {key}") if key else b""
                if length[:1] == b":" and int(length[1:]) > _PICTURE_BYTES:
                    node.execute(f"SETRANGE {key} {self.chance.randrange(_PICTURE_BYTES)} corrupted")
                    self.model.counts["values corrupted in Redis"] += 1
                    return

    async def _corrupt_s3(self) -> None:
        """Overwrite a part of a picture; what is written meanwhile stays."""
        bucket, client = self.s3.bucket, self.s3.client
        names = [name for name in await asyncio.to_thread(self._objects) if self.chance.random() < 0.5]
        if not names:
            return
        name = self.chance.choice(names)
        try:
            found = await asyncio.to_thread(client.get_object, Bucket=bucket, Key=name)
            data = await asyncio.to_thread(found["Body"].read)
            digest, at = sha256(data), self.chance.randrange(len(data) - 9)
            owner = [prompt for prompt, asked in self.model.prompts.items() if digest in asked.given]
            self.model.corrupted.add(digest)
            broken = data[:at] + b"corrupted" + data[at + 9 :]
            await asyncio.to_thread(
                client.put_object,
                Bucket=bucket,
                Key=name,
                Body=broken,
                Metadata=found["Metadata"],
                ContentType=found["ContentType"],
                IfMatch=found["ETag"],
            )
        except (BotoCoreError, ClientError):
            return  # it was purged meanwhile
        self.model.excuse("corrupted", owner)
        self.model.counts["objects corrupted in S3"] += 1

    def _objects(self) -> list[str]:
        pages = self.s3.client.get_paginator("list_objects_v2").paginate(Bucket=self.s3.bucket, Prefix="v1/")
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    async def stored(self) -> dict[str, str]:
        """All that S3 has: the names of its objects by the SHA-256 of what they hold."""

        def read(name: str) -> str:
            return sha256(self.s3.client.get_object(Bucket=self.s3.bucket, Key=name)["Body"].read())

        return await asyncio.to_thread(lambda: {read(name): name for name in self._objects()})


def _bulk(reply: bytes) -> str:
    """The text of a bulk reply; empty if it is none."""
    return reply.split(b"\r\n")[1].decode(errors="replace") if reply[:1] == b"$" and reply[:2] != b"$-" else ""


def _set_clock(file: Path, offset_s: float) -> None:
    """Whoever reads it reads all of it."""
    new = file.with_suffix(".new")
    new.write_text(str(offset_s))
    new.replace(file)


def _announce(cluster: Cluster, proxies: list[TcpProxy]) -> None:
    """Let clients find the nodes behind the proxies."""
    for node, proxy in zip(cluster.nodes, proxies, strict=True):
        node.execute(f"CONFIG SET cluster-announce-port {proxy.port}")


@asynccontextmanager
async def standing(directory: Path, seed: int) -> AsyncIterator[Stand]:
    """All of it, for as long as it is entered."""
    async with AsyncExitStack() as stack:
        cluster = Cluster(directory / "redis")
        (directory / "s3").mkdir()
        (directory / "provider").mkdir()
        s3 = S3Server(directory / "s3")
        stack.push_async_callback(asyncio.to_thread, cluster.kill)
        stack.push_async_callback(asyncio.to_thread, s3.close)
        await asyncio.gather(asyncio.to_thread(cluster.start), asyncio.to_thread(s3.start))
        config = ProviderConfig(
            keys=(KeyConfig(key="sk-a", group="org-a"),),
            latency=Latency(spread="uniform", mean_s=0.5),
            min_picture_bytes=_PICTURE_BYTES,
            seed=seed,
        )
        provider = await stack.enter_async_context(ProviderProcess(config, directory / "provider"))
        targets = [*(node.port for node in cluster.nodes), s3.port, provider.port]
        *redis, s3_proxy, provider_proxy = [
            await stack.enter_async_context(TcpProxy("127.0.0.1", port)) for port in targets
        ]
        await asyncio.to_thread(_announce, cluster, redis)
        text = "\n".join(
            [
                f'[redis]\nurl = "redis+cluster://{",".join(f"127.0.0.1:{proxy.port}" for proxy in redis)}"',
                f'[s3]\nbucket = "{s3.bucket}"\nendpoint = "http://127.0.0.1:{s3_proxy.port}"\nregion = "{s3.region}"',
                f'access_key = "{s3.access_key}"\nsecret_key = "{s3.secret_key}"',
                f'[[upstreams]]\nname = "a"\nbase_url = "http://127.0.0.1:{provider_proxy.port}/v1"\napi_key = "sk-a"',
                f"[namespaces.{FLOCK}]",
                "[limit_groups.a]\nconcurrent = 50",
                # A little of what is asked for at a time: the rest is read from Redis and S3.
                "[memory]\nmax_bytes = 4_000_000",
                # What may be paid for unconfirmed is for the operator to say; here nothing.
                '[generation]\nwhen_unknown = "refuse"',
            ]
        )
        replicas = []
        for number in range(REPLICAS):
            clock = directory / f"clock-{number}"
            _set_clock(clock, 0.0)
            service = ServiceProcess(directory / f"replica-{number}", text, environment={CLOCK: str(clock)})
            service.command = [sys.executable, "-m", "tests.chaos.service"]
            await stack.enter_async_context(service)
            client = await stack.enter_async_context(AsyncClient(service.address))
            replicas.append(Replica(service, clock, client))
        yield Stand(
            directory,
            replicas,
            cluster,
            redis,
            s3,
            s3_proxy,
            provider,
            provider_proxy,
            Model(time.monotonic()),
            random.Random(seed),  # noqa: S311 - chooses what is corrupted
        )
