"""The stage of a bench: a real Valkey, a real S3 server, a provider's stand-in, and the service in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from cacheserver.embedded.child import free_ports, leashed
from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.load import Read, Stub, callers, prompt, read_paced
from tests.provider import OpenAIStandIn
from tests.running import environment
from tests.servers import S3Server, TcpProxy, ValkeyServer

_START_TIMEOUT_S = 30.0
_POLL_S = 0.02
_METADATA_BYTES = 1_000
"""What memory holds of a picture beside its bytes, and a little more."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything: pictures, bytes of each, and how many memory holds; callers, and their reads a second."""

    pictures: int = 300
    picture_bytes: int = 20_000
    in_memory: int = 30
    clients: int = 50
    rate: float = 200.0


class Rig:
    """A filled cache, callers to read it, and the parts to break; from `open_rig`.

    The provider and the proxy on the road to S3 live in the bench's process, all else in processes of its own.
    """

    def __init__(  # noqa: PLR0913 - the parts
        self,
        *,
        scale: Scale,
        directory: Path,
        provider: OpenAIStandIn,
        valkey: ValkeyServer,
        s3: S3Server,
        s3_road: TcpProxy,
        by_road: bool,
    ) -> None:
        self.scale = scale
        self.provider = provider
        self.valkey = valkey
        self.s3 = s3
        self.s3_road = s3_road
        self._directory = directory
        self._by_road = by_road
        self._service = AsyncExitStack()
        self._stubs: list[Stub] = []
        self._http: httpx.AsyncClient

    async def start_service(self, **settings: object) -> None:
        """Run the service, and connect the callers anew; ends the one that ran before.

        Args:
            settings: beside those of the rig, as `tests.running.environment` takes them.
        """
        await self.stop_service()
        grpc_port, http_port = free_ports(2)
        # Made here, as it takes long, and the bench must not stall while it measures.
        http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", trust_env=False)
        self._http = await self._service.enter_async_context(http)
        max_bytes = self.scale.in_memory * (self.scale.picture_bytes + _METADATA_BYTES)
        settings = {"memory__max_bytes": max_bytes, **settings}
        env = environment(self._directory, provider=self.provider, redis=self.valkey, s3=self.s3, **settings)
        if self._by_road:
            env["CACHESERVER_S3_ENDPOINT"] = f"http://127.0.0.1:{self.s3_road.port}"
        env |= {"CACHESERVER_GRPC_PORT": str(grpc_port), "CACHESERVER_HTTP_PORT": str(http_port)}
        await self._service.enter_async_context(_running(env, self._directory, self._http))
        self._stubs = await self._service.enter_async_context(callers(f"127.0.0.1:{grpc_port}", self.scale.clients))

    async def stop_service(self) -> None:
        """End the service if it runs."""
        await self._service.aclose()

    async def fill(self) -> None:
        """Have every picture made, and return when memory, Redis and S3 have what they should."""
        if failed := {read.failure for read in await self.read(range(self.scale.pictures))} - {""}:
            raise RuntimeError(f"the cache could not be filled: {', '.join(failed)}")
        count = f"EVAL \"return #redis.call('KEYS','{self.redis_names}')\" 0"
        async with asyncio.timeout(_START_TIMEOUT_S):
            while await self.redis(count) != b":%d\r\n" % self.scale.pictures:  # noqa: ASYNC110 - in another process
                await asyncio.sleep(_POLL_S)

    async def read(self, numbers: Sequence[int]) -> list[Read]:
        """Read these pictures at the scale's pace."""
        return await read_paced(self._stubs, numbers, rate=self.scale.rate, is_right=self._is_right)

    async def stats(self) -> pb.GetStatsResponse:
        """What the service has counted since it started."""
        response: pb.GetStatsResponse = await self._stubs[0].GetStats(pb.GetStatsRequest())
        return response

    async def down_s(self, tier: str) -> float:
        """When the service was first seen to spare `tier`, by the event loop's time; waits for it."""
        while (await self._http.get("/readyz")).json()["tiers"][tier] != "down":  # noqa: ASYNC110 - in another process
            await asyncio.sleep(_POLL_S)
        return asyncio.get_running_loop().time()

    async def forget_in_redis(self, numbers: Iterable[int]) -> None:
        """Leave these pictures in S3 (and in memory, until others are read) alone."""
        for number in numbers:
            identity, variant = await self._name(number)
            await self.redis(f"DEL {self.redis_prefix}{{{identity}}}.{variant}")

    async def s3_objects(self, numbers: Iterable[int]) -> list[str]:
        """The names of these pictures' objects."""
        ours = {".".join(await self._name(number)) for number in numbers}
        pages = self.s3.client.get_paginator("list_objects_v2")
        listed = pages.paginate(Bucket=self.s3.bucket).build_full_result()["Contents"]
        return [each["Key"] for each in listed if each["Key"].rpartition("/")[2] in ours]

    async def redis(self, command: str) -> bytes:
        """Redis's reply to an inline command."""
        return await asyncio.to_thread(self.valkey.execute, command)

    @property
    def redis_prefix(self) -> str:
        """Begins the name of all that the service has in Redis."""
        return f"{self._directory.name}:"

    @property
    def redis_names(self) -> str:
        """The pattern of the entries' names in Redis."""
        return f"{self.redis_prefix}{{v1*"

    def _is_right(self, number: int, data: bytes) -> bool:
        return data in self.provider.made.get(prompt(number), set())

    async def _name(self, number: int) -> tuple[str, str]:
        """The identity and the variant that a picture is stored under."""
        item = pb.FindItem(spec=pb.ImageSpec(prompt=prompt(number)))
        found = await self._stubs[0].FindCached(pb.FindCachedRequest(items=[item]))
        identity, _, variant = found.items[0].key.rpartition(".")
        return identity, variant


@asynccontextmanager
async def open_rig(scale: Scale, *, by_road: bool) -> AsyncIterator[Rig]:
    """Servers and a service of its own, filled; the service reaches S3 by a road that can be broken if `by_road`."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        for name in ("valkey", "s3"):
            (directory / name).mkdir()
        valkey = ValkeyServer(directory / "valkey")
        stack.push_async_callback(asyncio.to_thread, valkey.kill)
        s3 = S3Server(directory / "s3")
        stack.push_async_callback(asyncio.to_thread, s3.close)
        await asyncio.gather(asyncio.to_thread(valkey.start), asyncio.to_thread(s3.start))
        provider = await stack.enter_async_context(OpenAIStandIn())
        provider.min_image_bytes = scale.picture_bytes
        s3_road = await stack.enter_async_context(TcpProxy("127.0.0.1", s3.port))
        rig = Rig(
            scale=scale,
            directory=directory,
            provider=provider,
            valkey=valkey,
            s3=s3,
            s3_road=s3_road,
            by_road=by_road,
        )
        stack.push_async_callback(rig.stop_service)
        await rig.start_service()
        await rig.fill()
        yield rig


@asynccontextmanager
async def _running(env: dict[str, str], directory: Path, http: httpx.AsyncClient) -> AsyncIterator[None]:
    """The service as an operator runs it; it dies with the bench, however the bench dies."""
    log_file = directory / "service.log"
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *leashed([str(Path(sys.executable).with_name("cacheserver")), "serve"]),
            stdin=PIPE,
            stdout=log,
            stderr=log,
            env={"PATH": os.defpath, **env},
            cwd=directory,
        )
    try:
        if not await _is_ready(process, http):
            raise RuntimeError(await asyncio.to_thread(log_file.read_text, errors="replace"))
        yield
    finally:
        await _end(process)


async def _is_ready(process: Process, http: httpx.AsyncClient) -> bool:
    """Wait until the service takes calls; False if it ended instead."""
    async with asyncio.timeout(_START_TIMEOUT_S):
        while process.returncode is None:
            with contextlib.suppress(httpx.TransportError):  # not listening yet
                if (await http.get("/readyz")).is_success:
                    return True
            await asyncio.sleep(_POLL_S)
    return False


async def _end(process: Process) -> None:
    """SIGKILL: the bench wants nothing more of it, and to drain while a tier hangs takes long."""
    if process.returncode is None:
        process.kill()
        await process.wait()
    if process.stdin is not None:
        process.stdin.write(b"\n")  # lets it off the leash, which else would signal whoever has its process id next
        process.stdin.close()
