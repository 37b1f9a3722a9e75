"""The examples in other languages, from protos/ alone, against the real service, behind a network that breaks."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from cacheserver.pb import promptcache_pb2 as pb
from tests.clients.installed import NODE, installed
from tests.running import environment, running

EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"
TOKEN = "a token from the environment"
RETRY_MS = 10


@dataclass
class Flaky(grpc.GenericRpcHandler):
    """Passes calls on to a service, but for the first of each kind: that one breaks, and says when to try again.

    The first download breaks in the midst of its first chunk.
    """

    channel: grpc.aio.Channel
    get_images: int = 0
    streams: list[pb.StreamImageRequest] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    without_deadline: int = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        if handler_call_details.method.endswith("/StreamImage"):
            return grpc.unary_stream_rpc_method_handler(self._stream_image)
        return grpc.unary_unary_rpc_method_handler(self._get_image)

    def _note(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.tokens |= {str(value) for name, value in context.invocation_metadata() or () if name == "authorization"}
        remaining_s = context.time_remaining()
        self.without_deadline += remaining_s is None or remaining_s > 1_000

    async def _get_image(self, message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        self._note(context)
        self.get_images += 1
        if self.get_images == 1:
            pushback = (("grpc-retry-pushback-ms", str(RETRY_MS)),)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken", pushback)
        try:
            answer: bytes = await self.channel.unary_unary("/promptcache.v1.PromptCacheService/GetImage")(message)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata()))
        return answer

    async def _stream_image(self, message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        self._note(context)
        self.streams.append(pb.StreamImageRequest.FromString(message))
        async for answer in self.channel.unary_stream("/promptcache.v1.PromptCacheService/StreamImage")(message):
            event = pb.StreamImageResponse.FromString(answer)
            if len(self.streams) == 1 and event.chunk:
                yield pb.StreamImageResponse(chunk=event.chunk[:1_000]).SerializeToString()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken", _retry_info())
            yield answer


def _retry_info() -> tuple[tuple[str, bytes], ...]:
    detail = AnyMessage()
    detail.Pack(RetryInfo(retry_delay=Duration(nanos=RETRY_MS * 1_000_000)))
    status = Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="broken", details=[detail])
    return (("grpc-status-details-bin", status.SerializeToString()),)


@asynccontextmanager
async def flaky_service(data_dir: Path) -> AsyncIterator[tuple[Flaky, str]]:
    """A service with the painter, what stands in front of it, and its address."""
    async with (
        running(environment(data_dir, tiers="memory, disk")) as service,
        grpc.aio.insecure_channel(service.grpc_address) as channel,
    ):
        flaky, server = Flaky(channel), grpc.aio.server()
        server.add_generic_rpc_handlers((flaky,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield flaky, f"127.0.0.1:{port}"
        finally:
            await server.stop(None)


async def assert_it_does_its_work(command: list[str], tmp_path: Path, **env: str) -> None:
    """Run an example as a stranger would; it says and writes what it should, although the network breaks twice."""
    data_dir, cwd = tmp_path / "data", tmp_path / "cwd"
    for directory in (data_dir, cwd):
        directory.mkdir()
    async with flaky_service(data_dir) as (flaky, address):
        process = await asyncio.create_subprocess_exec(
            *command,
            "a red fox",
            "picture.png",
            cwd=cwd,
            env={"PATH": os.environ["PATH"], "HOME": str(Path.home()), **env}
            | {"CACHESERVER_ADDRESS": address, "CACHESERVER_TOKEN": TOKEN},
            stdout=PIPE,
            stderr=PIPE,
        )
        try:
            output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert process.returncode == 0, errors.decode()
    said = [line.strip().lower() for line in output.decode().splitlines() if not line.startswith("waiting")]
    # Go writes a code as InvalidArgument, the others as INVALID_ARGUMENT.
    assert [line.replace("notfound", "not_found").replace("invalidargument", "invalid_argument") for line in said] == [
        "first from tier_upstream, again from tier_memory, same bytes: true",
        "only if cached: not_found not_cached",
        "a wrong size: invalid_argument invalid_field spec.size",
        "downloaded to picture.png in 2 calls, same bytes: true",
    ]
    assert (cwd / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert flaky.get_images == 5  # four of the example, and the first once more
    first, resumed = flaky.streams
    assert (first.request.spec.prompt, first.read_offset) == ("a red fox", 0)
    assert (resumed.request.WhichOneof("what"), resumed.read_offset) == ("key", 1_000)
    assert resumed.if_digest.startswith("sha256:")
    assert flaky.tokens == {f"Bearer {TOKEN}"}
    assert flaky.without_deadline == 0


async def test_the_python_example_runs_without_any_package_of_ours(tmp_path: Path) -> None:
    package = tmp_path / "poisoned" / "cacheserver"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('an example needs protos/ alone')")
    command = [sys.executable, str(EXAMPLES / "python" / "client.py")]
    await assert_it_does_its_work(command, tmp_path, PYTHONPATH=str(package.parent))


async def test_the_node_example_runs(tmp_path: Path) -> None:
    command = [str(NODE), str(EXAMPLES / "node" / "client.js")]
    await assert_it_does_its_work(command, tmp_path, NODE_PATH=str(installed("grpc") / "node_modules"))


DEBIAN = Path("/usr/share/gocode/src/google.golang.org")
TOOLS = ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")


@pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)) or not all((DEBIAN / each).is_dir() for each in ("grpc", "protobuf", "genproto")),
    reason="Go and its packages from Debian are not here; client.go says which",
)
@pytest.mark.timeout(300)  # the first build compiles gRPC
async def test_the_go_example_builds_and_runs(tmp_path: Path) -> None:
    await assert_it_does_its_work([str(EXAMPLES / "go" / "run")], tmp_path)
