"""The gRPC front over a whole cache, for tests: a real server on a real port, a real channel to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status

from cacheserver.calls.downloads import DownloadMemory
from cacheserver.calls.sampling import Sampler
from cacheserver.calls.uploads import UploadMemory
from cacheserver.generation.images import inspect_in_thread
from cacheserver.http.delivery.partitions import Partitions
from cacheserver.http.delivery.urls import ImageUrls
from cacheserver.interfaces import Prompts
from cacheserver.model import CachedImage, Caller, Namespace, Permission
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from cacheserver.precheck import PromptPolicy
from cacheserver.rpc.server import Listen, RpcServer
from cacheserver.rpc.service import FigureSource, ImageLinks, Limits, PromptCacheService
from cacheserver.warming import Warming
from tests.calls_desk import desk
from tests.house import House

ANYONE = Caller("anonymous", frozenset(Permission))
SERVICE = "/promptcache.v1.PromptCacheService"


def spec(prompt: str = "a red fox", **fields: Any) -> pb.ImageSpec:
    return pb.ImageSpec(prompt=prompt, **fields)


def ask(prompt: str = "a red fox", *, of: dict[str, Any] | None = None, **fields: Any) -> pb.GetImageRequest:
    """A GetImageRequest; `of` goes into its spec."""
    return pb.GetImageRequest(spec=spec(prompt, **(of or {})), **fields)


@dataclass
class Failure:
    """A failed call, taken apart."""

    code: str
    reason: str
    message: str
    fields: dict[str, str]
    info: details.ErrorInfo
    trailers: dict[str, str | bytes] = field(repr=False)


class Front:
    """A channel to a running service, and the house behind it."""

    def __init__(self, house: House, server: RpcServer, channel: grpc.aio.Channel) -> None:
        self.house = house
        self.server = server
        self.channel = channel
        self.stub = cast("Any", pb_grpc.PromptCacheServiceStub(channel))

    async def raw(self, rpc: str, *messages: bytes | Message) -> bytes:
        """Call with exactly these bytes."""
        sent = [m if isinstance(m, bytes) else m.SerializeToString() for m in messages]
        if rpc == "PutImage":
            return cast("bytes", await self.channel.stream_unary(f"{SERVICE}/{rpc}")(iter(sent)))
        if rpc == "StreamImage":
            return b"".join([part async for part in self.channel.unary_stream(f"{SERVICE}/{rpc}")(sent[0])])
        if rpc in {"BatchGetImages", "WarmImages"}:
            return b"".join([part async for part in self.channel.stream_stream(f"{SERVICE}/{rpc}")(iter(sent))])
        return cast("bytes", await self.channel.unary_unary(f"{SERVICE}/{rpc}")(sent[0]))

    async def stream(self, request: pb.StreamImageRequest, **options: Any) -> list[pb.StreamImageResponse]:
        return [event async for event in self.stub.StreamImage(request, **options)]

    async def put(self, header: pb.PutImageHeader, *chunks: bytes, **options: Any) -> pb.PutImageResponse:
        parts = [pb.PutImageRequest(header=header), *(pb.PutImageRequest(chunk=chunk) for chunk in chunks)]
        return cast("pb.PutImageResponse", await self.stub.PutImage(iter(parts), **options))


async def failure(call: Awaitable[Any]) -> Failure:
    """How `call` fails; it has to."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = raised.value
    trailers = dict(error.trailing_metadata() or ())
    info, bad = details.ErrorInfo(), details.BadRequest()
    for packed in Status.FromString(cast("bytes", trailers.get("grpc-status-details-bin", b""))).details:
        assert packed.Unpack(info) or packed.Unpack(bad) or packed.type_url.startswith("type.googleapis.com/google.rpc")
    fields = {violation.field: violation.description for violation in bad.field_violations}
    return Failure(error.code().name, info.reason, error.details() or "", fields, info, trailers)


def authorization(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


class Signer:
    """A tier's signing: URLs that name the digest, and a record of whom it signed for."""

    def __init__(self) -> None:
        self.signed: list[CachedImage] = []

    async def signed_url(self, entry: CachedImage, expires_s: int) -> str:
        self.signed.append(entry)
        return f"https://images.test/{entry.image.sha256}?expires={expires_s}"


def image_urls(house: House, *namespaces: Namespace) -> ImageUrls:
    """URLs of the pictures of these namespaces, at our own port as callers reach it."""
    partitions = Partitions(namespaces)
    secret = b"a secret of more than thirty-two characters"
    return ImageUrls(
        [secret], partitions=partitions, expires_s=3600, clock=house.clock, public_url="https://images.test/"
    )


class NothingAtOnce(PromptCacheService):
    """A service that answers nothing before it has waited for it: slower, and otherwise the same."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._ready.again = lambda *_: None  # type: ignore[method-assign] # nothing of it is ready
        self._ready.answer = lambda *_: None  # type: ignore[method-assign] # nor of a stream's


@asynccontextmanager
async def open_front(
    house: House,
    *,
    callers: Sequence[tuple[bytes, Caller]] = (),
    anonymous: Caller | None = ANYONE,
    namespaces: Sequence[Namespace] = (),
    limits: Limits | None = None,
    max_concurrent_calls: int = 4_096,
    policies: Mapping[str, PromptPolicy] | None = None,
    listen: Listen | None = None,
    prompts: Prompts | None = None,
    sampler: Sampler | None = None,
    figures: FigureSource | None = None,
    urls: ImageLinks | None = None,
    uploads: UploadMemory | None = None,
    downloads: DownloadMemory | None = None,
    at_once: bool = True,
    max_connection_age_s: float | None = None,
) -> AsyncIterator[Front]:
    """Serve `house` on a free port until the block ends. Unless `at_once`, each call takes the way of a miss."""
    policies = policies or {}
    at = desk(
        house,
        callers=callers,
        anonymous=anonymous,
        namespaces=namespaces,
        max_concurrent_calls=max_concurrent_calls,
        policies=policies,
        prompts=prompts,
        sampler=sampler,
    )
    reception, asking, recall = at.reception, at.asking, at.recall
    service = (PromptCacheService if at_once else NothingAtOnce)(
        cache=house.cache,
        asking=asking,
        reception=reception,
        books=house.books,
        inspect=partial(inspect_in_thread, max_pixels=50_000_000, max_bytes=50_000_000),
        clock=house.clock,
        limits=limits or Limits(),
        recall=recall,
        uploads=uploads or UploadMemory(256 * 1024 * 1024),
        downloads=downloads or DownloadMemory(256 * 1024 * 1024),
        figures=figures,
        warming=Warming(
            cache=house.cache,
            tiers=[house.redis, house.s3],
            keeper=house.keeper,
            generation=house.generator,
            ledger=house.ledger,
            clock=house.clock,
        ),
        policies=policies,
        urls=urls,
    )
    tiers = [house.redis.name, house.s3.name]
    server = RpcServer(service, listen=listen or Listen(port=0), tiers=tiers, max_connection_age_s=max_connection_age_s)
    await server.start()
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            yield Front(house, server, channel)
    finally:
        house.upstream.release()
        await server.drain(5)
