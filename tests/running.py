"""A whole service for tests, started from settings as `cacheserver serve` starts it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from cacheserver.app import Service, start
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from cacheserver.settings import load_settings
from tests.provider import API_KEY, OpenAIStandIn
from tests.servers import Cluster, S3Server, SentinelSet, ValkeyServer

Stub = Any
"""The generated client: its calls have types of grpc.aio only at run time."""


def environment(
    data_dir: Path,
    *,
    provider: OpenAIStandIn | None = None,
    redis: ValkeyServer | Cluster | SentinelSet | None = None,
    s3: S3Server | None = None,
    **more: object,
) -> dict[str, str]:
    """The environment of a service on any free ports; further settings as `section__name=value`."""
    env = {"CACHESERVER_DATA_DIR": str(data_dir), "CACHESERVER_GRPC_PORT": "0", "CACHESERVER_HTTP_PORT": "0"}
    if provider is not None:
        env |= {"OPENAI_API_KEY": API_KEY, "OPENAI_BASE_URL": provider.base_url}
    if redis is not None:
        env |= {"CACHESERVER_REDIS_URL": redis.url, "CACHESERVER_REDIS__PREFIX": f"{data_dir.name}:"}
    if s3 is not None:
        env |= {
            "CACHESERVER_S3_BUCKET": s3.bucket,
            "CACHESERVER_S3_ENDPOINT": s3.endpoint,
            "CACHESERVER_S3_PREFIX": f"{data_dir.name}/",
            "CACHESERVER_S3__ACCESS_KEY": s3.access_key,
            "CACHESERVER_S3__SECRET_KEY": s3.secret_key,
            "CACHESERVER_S3__READ_TIMEOUT_S": "10",  # a busy machine must not look like a store that is down
        }
    return env | {f"CACHESERVER_{name.upper()}": str(value) for name, value in more.items()}


@asynccontextmanager
async def running(env: dict[str, str], config: str = "") -> AsyncIterator[Service]:
    """A service with these settings, drained at the end."""
    file = Path(env["CACHESERVER_DATA_DIR"]) / "cacheserver.toml"
    file.write_text(config)
    service = await start(load_settings(file, env))
    try:
        yield service
    finally:
        await service.stop()


@asynccontextmanager
async def calling(service: Service) -> AsyncIterator[Stub]:
    """A plain generated client of the service, as another team would have it."""
    options: Sequence[tuple[str, int]] = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(service.grpc_address, options=options) as channel:
        yield pb_grpc.PromptCacheServiceStub(channel)  # type: ignore[no-untyped-call] # generated code


def ask(prompt: str = "a red fox", **fields: object) -> pb.GetImageRequest:
    """A request for one prompt."""
    return pb.GetImageRequest(spec=pb.ImageSpec(prompt=prompt), **fields)  # type: ignore[arg-type] # test convenience
