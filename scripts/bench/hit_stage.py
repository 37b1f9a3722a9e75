"""The stage for measuring hits: services and bare servers as processes on a core of their own, pictures of exact sizes.

Everything else, the load generator with it, runs on the other cores. With one core there is nothing to part.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import secrets
import struct
import sys
import tempfile
import zlib
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import grpc

from cacheserver.cli.serve import GRPC_EXPERIMENTS
from cacheserver.client import AsyncClient, ImageSpec
from cacheserver.embedded.child import leashed
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from scripts.bench.framing import framed
from scripts.bench.obedient import Obedient, obedient
from scripts.bench.stand import ServiceProcess
from tests.provider import small_image
from tests.servers import S3Server, ValkeyServer

SERVICE = "/promptcache.v1.PromptCacheService/"

_ROOT = Path(__file__).resolve().parents[2]
_TASKS = "/proc/{pid}/task"
_PNG_END = 12  # bytes of the chunk that ends a PNG
_CHUNK_REST = 12  # bytes of a PNG chunk beside its data
_PUT_AT_A_TIME = 4
_FLOORS = "scripts.bench.hit_floors"
_S3_CREDENTIALS = {"AWS_ACCESS_KEY_ID": S3Server.access_key, "AWS_SECRET_ACCESS_KEY": S3Server.secret_key}
_CREATED = datetime(2026, 1, 1, tzinfo=UTC)  # the same of all: the answers of two services have the same size then
_SIZE, _QUALITY = "1024x1024", "high"
_CONFIG = """
[memory]
max_bytes = 1_073_741_824
[disk]
fsync = false
[log]
level = "warning"
[[callers]]
name = "bench"
token_sha256 = "{digest}"
namespaces = ["*"]
allow = ["read", "generate", "put", "purge"]
[[upstreams]]
name = "nobody"
base_url = "http://127.0.0.1:9/v1"
api_key = "sk-none"
models = ["gpt-image-2"]
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs: where, and as which process."""

    address: str
    pid: int


class Cores:
    """Which core the servers have, and that everything else keeps off it."""

    def __init__(self) -> None:
        first, *rest = sorted(os.sched_getaffinity(0))
        self.server = first
        self.other = rest[0] if rest else first
        self.are_parted = bool(rest)
        """False: there is one core, and the load generator takes from what it measures."""
        if rest:
            os.sched_setaffinity(0, rest)  # what is started from here on inherits it

    def pin(self, pid: int, core: int | None = None) -> None:
        """Give a process the servers' core, or another, with all its threads; those it starts later inherit it."""
        for task in Path(_TASKS.format(pid=pid)).iterdir():
            os.sched_setaffinity(int(task.name), {self.server if core is None else core})


def exact_png(number: int, size_bytes: int) -> bytes:
    """A picture of exactly so many bytes, another one for every number; noise fills it up."""
    picture = small_image(number)
    data = random.Random(number).randbytes(size_bytes - len(picture) - _CHUNK_REST)  # noqa: S311 - no secret
    kind = b"noIs"  # a chunk that decoders skip
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return picture[:-_PNG_END] + chunk + picture[-_PNG_END:]


def request(prompt: str, **fields: object) -> pb.GetImageRequest:
    """Asks for the picture that was put for this prompt."""
    spec = pb.ImageSpec(prompt=prompt, size=_SIZE, quality=_QUALITY)
    return pb.GetImageRequest(spec=spec, **fields)  # type: ignore[arg-type] # fields of the message


async def _numbered(asked: Sequence[pb.GetImageRequest]) -> AsyncIterator[pb.BatchGetImagesRequest]:
    for number, request in enumerate(asked):
        numbered = pb.GetImageRequest(request_id=str(number))
        numbered.MergeFrom(request)
        yield pb.BatchGetImagesRequest(requests=[numbered])


class Stage:
    """Starts what is measured, and ends it with itself."""

    def __init__(self) -> None:
        self.cores = Cores()
        self.token = secrets.token_urlsafe()
        self._stack = AsyncExitStack()
        self._services: dict[tuple[tuple[str, str], ...], Server] = {}
        self._put: set[tuple[str, str]] = set()
        self.directory: Path

    async def __aenter__(self) -> Self:
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hits-")))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def service(self, **settings: object) -> Server:
        """The service with a Redis of its own, and further settings as `section__name=value`; one for the same ones.

        It has callers, so that every call's token is looked at, keeps accounts, and logs warnings alone.
        """
        wishes = tuple(sorted((f"CACHESERVER_{name.upper()}", str(value)) for name, value in settings.items()))
        if wishes not in self._services:
            own = self.directory / f"service-{len(self._services)}"
            environment = {"CACHESERVER_REDIS_URL": (await self.valkey()).url, **dict(wishes)}
            config = _CONFIG.format(digest=hashlib.sha256(self.token.encode()).hexdigest())
            self._services[wishes] = await self._started(ServiceProcess(own, config, environment=environment))
        return self._services[wishes]

    async def valkey(self) -> ValkeyServer:
        """A new Valkey."""
        server = ValkeyServer(Path(tempfile.mkdtemp(prefix="valkey-", dir=self.directory)))
        self._stack.push_async_callback(asyncio.to_thread, server.kill)
        await asyncio.to_thread(server.start)
        return server

    async def s3(self) -> S3Server:
        """A new S3 server."""
        server = S3Server(Path(tempfile.mkdtemp(prefix="s3-", dir=self.directory)))
        self._stack.push_async_callback(asyncio.to_thread, server.close)
        await asyncio.to_thread(server.start)
        return server

    async def _started(self, service: ServiceProcess) -> Server:
        await self._stack.enter_async_context(service)
        self.cores.pin(service.pid)
        return Server(service.address, service.pid)

    async def put(self, service: Server, pictures: Mapping[str, int]) -> None:
        """Have the service keep a picture of so many bytes for each of these prompts."""
        missing = [(prompt, size) for prompt, size in pictures.items() if (service.address, prompt) not in self._put]
        numbers = iter(enumerate(missing))

        async def put() -> None:
            for number, (prompt, size) in numbers:
                picture = await asyncio.to_thread(exact_png, number, size)
                await client.put(picture, ImageSpec(prompt, size=_SIZE, quality=_QUALITY), create_time=_CREATED)
                self._put.add((service.address, prompt))

        async with AsyncClient(service.address, token=self.token) as client, asyncio.TaskGroup() as group:
            for _ in range(_PUT_AT_A_TIME):
                group.create_task(put())

    async def answer(self, service: Server, rpc: str, message: bytes) -> list[bytes]:
        """What the service answers, message by message; none if it fails with NOT_FOUND."""
        metadata = (("authorization", f"Bearer {self.token}"),)
        options = (("grpc.max_receive_message_length", -1),)
        async with grpc.aio.insecure_channel(service.address, options=options) as channel:
            call = channel.unary_stream(SERVICE + rpc)(message, metadata=metadata, timeout=60)
            try:
                return [part async for part in call]
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return []
                raise

    async def hit(self, service: Server, asked: pb.GetImageRequest, *, tier: pb.Tier = pb.TIER_MEMORY) -> list[bytes]:
        """The answer to this request; RuntimeError if it comes from another tier."""
        [answer] = await self.answer(service, "GetImage", asked.SerializeToString())
        if pb.GetImageResponse.FromString(answer).status.tier != tier:
            raise RuntimeError("answered by another tier than is measured")
        return [answer]

    async def hits(self, service: Server, asked: Sequence[pb.GetImageRequest]) -> None:
        """Ask for all of these once, on one stream."""
        options = (("grpc.max_receive_message_length", -1),)
        metadata = (("authorization", f"Bearer {self.token}"),)
        async with grpc.aio.insecure_channel(service.address, options=options) as channel:
            call = pb_grpc.PromptCacheServiceStub(channel).BatchGetImages(_numbered(asked), metadata=metadata)
            left = len(asked)
            async for message in call:
                left -= len(message.items)
                if any(item.response.status.tier != pb.TIER_MEMORY for item in message.items):
                    raise RuntimeError("answered by another tier than is measured")
                if not left:
                    return

    def file(self, name: str, messages: Sequence[bytes]) -> Path:
        """A file of these messages as gRPC sends them."""
        file = self.directory / name
        file.write_bytes(b"".join(map(framed, messages)))
        return file

    @asynccontextmanager
    async def floor(
        self, answer_file: Path, rpc: str, *options: str, environment: Mapping[str, str] | None = None
    ) -> AsyncIterator[Server]:
        """A bare server in a process of its own, from `hit_floors` with these options of its."""
        argv = [sys.executable, "-m", _FLOORS, str(answer_file), "--method", SERVICE + rpc, *options]
        ours = {"GRPC_EXPERIMENTS": GRPC_EXPERIMENTS} if "--tuned" in options else {}
        async with process(argv, {**_S3_CREDENTIALS, **ours, **(environment or {})}) as (port, pid):
            self.cores.pin(pid)
            yield Server(f"127.0.0.1:{port}", pid)

    @asynccontextmanager
    async def alone(self, answer_file: Path, at_a_time: int, *options: str) -> AsyncIterator[Obedient]:
        """What a bare server fetches with these options, without the server."""
        argv = [_FLOORS, str(answer_file), "--alone", str(at_a_time), *options]
        async with obedient(argv, _S3_CREDENTIALS) as program:
            self.cores.pin(program.pid)
            yield program


@asynccontextmanager
async def process(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> AsyncIterator[tuple[str, int]]:
    """A program of ours that runs while this is entered: the first line it printed, and its id."""
    env = {"PATH": os.defpath, "PYTHONPATH": str(_ROOT), **(environment or {})}
    started = await asyncio.create_subprocess_exec(*leashed(list(argv)), stdin=PIPE, stdout=PIPE, cwd=_ROOT, env=env)
    try:
        line = (await started.stdout.readline()).decode().strip() if started.stdout else ""
        if not line:
            raise RuntimeError(f"{' '.join(argv[1:3])} did not start")
        yield line, started.pid
    finally:
        if started.returncode is None:
            started.kill()
        if started.stdin is not None:
            started.stdin.write(b"\n")  # lets it off the leash, which else would hold its output open
            started.stdin.close()
        await started.wait()
