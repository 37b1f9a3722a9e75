"""The client against a gRPC server whose answers each test writes down, and then against the real service.

Both twins, sync and asyncio, go through every test.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from cacheserver import client as client_package
from cacheserver.client import (
    AsyncClient,
    CacheError,
    CachePolicy,
    CacheStatus,
    Chunk,
    Client,
    CorruptDownloadError,
    DeadlineError,
    Delivery,
    FieldDifference,
    Found,
    ImageHeader,
    ImageResult,
    ImageSpec,
    ImageTooLargeError,
    InputImage,
    InputRole,
    InvalidRequestError,
    KeyGoneError,
    MatchLevel,
    NotCachedError,
    Outcome,
    PermissionDeniedError,
    Presence,
    Priority,
    Progress,
    PromptRefusedError,
    QuotaExhaustedError,
    State,
    StatsField,
    StatsSpan,
    TierName,
    TryAgainError,
    UnauthenticatedError,
    UnreachableError,
    UnsupportedError,
    Usage,
    VariantPolicy,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from tests.house import House
from tests.provider import large_png
from tests.rpc_front import open_front
from tests.servers import TcpProxy

PNG = b"\x89PNG" + bytes(range(256)) * 40
DIGEST = f"sha256:{hashlib.sha256(PNG).hexdigest()}"
SOON = (("grpc-retry-pushback-ms", "20"),)
NOT_AGAIN = (("grpc-retry-pushback-ms", "-1"),)


def image(data: bytes | None = PNG, **fields: Any) -> pb.Image:
    return pb.Image(data=data, **{"key": "k0", "digest": DIGEST, "size_bytes": len(PNG), **fields})


def answer(data: bytes | None = PNG, *, tier: str = "TIER_MEMORY", **fields: Any) -> pb.GetImageResponse:
    status = pb.CacheStatus(
        tier=tier, state="STATE_READY", matched="MATCH_LEVEL_EXACT", derived_from="k7", saved_microusd=40_000
    )
    return pb.GetImageResponse(images=[image(data, **fields)], status=status, image_status=[status])


def header(
    read_offset: int = 0, *, index: int = 0, state: str = "STATE_READY", **fields: Any
) -> pb.StreamImageResponse:
    status = pb.CacheStatus(tier="TIER_S3", state=state)
    begun = pb.ImageHeader(image=image(None, **fields), status=status, read_offset=read_offset, index=index)
    return pb.StreamImageResponse(header=begun)


def chunk(start: int = 0, end: int = len(PNG)) -> pb.StreamImageResponse:
    return pb.StreamImageResponse(chunk=PNG[start:end])


@dataclass(frozen=True)
class Fail:
    """A status to end a call with."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "what happened and what to try"
    trailers: tuple[tuple[str, str], ...] = SOON
    details: tuple[Any, ...] = ()

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain="promptcache.v1", metadata={"cached": "true"})
        for detail in (info, *self.details) if self.reason else ():
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        await context.abort(
            self.code,
            self.message,
            trailing_metadata=(*self.trailers, ("grpc-status-details-bin", status.SerializeToString())),
        )


UNAVAILABLE = Fail(grpc.StatusCode.UNAVAILABLE, "UPSTREAM_DOWN")


@dataclass
class Service(pb_grpc.PromptCacheServiceServicer):
    """Answers every call with the next step of its script and remembers what it was asked."""

    script: list[Any] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    time_left_s: list[float] = field(default_factory=list)
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def _unary(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self._note(request, context)
        step = self.script.pop(0)
        if isinstance(step, Fail):
            await step.abort(context)
        if step == "hang":
            await self._hang()
        return step

    def _note(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.asked.append(request)
        self.metadata.append({name: str(value) for name, value in context.invocation_metadata() or ()})
        self.time_left_s.append(context.time_remaining())

    async def _hang(self) -> None:
        self.hanging.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.hung_up.set()

    GetImage = FindCached = PurgeImages = ExplainKey = GetStats = _unary

    async def StreamImage(  # noqa: N802 - gRPC's name
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        self._note(request, context)
        for step in self.script.pop(0):
            if isinstance(step, Fail):
                await step.abort(context)
            if step == "hang":
                await self._hang()
            yield step

    async def PutImage(  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        return await self._unary([request async for request in requests], context)


def self_signed() -> tuple[bytes, bytes]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key; both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cacheserver test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem), private


class InThreads:
    """The sync client with its calls moved to threads, so that one suite can await both twins."""

    def __init__(self, client: Client) -> None:
        self.inner = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.inner, name)
        return lambda *args, **options: asyncio.to_thread(method, *args, **options)

    def stream_image(self, *args: Any, **options: Any) -> AsyncGenerator[Any]:
        return self._events(self.inner.stream_image(*args, **options))

    def batch(self, *args: Any, **options: Any) -> AsyncGenerator[Any]:
        return self._events(self.inner.batch(*args, **options))

    async def _events(self, events: Any) -> AsyncGenerator[Any]:
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            await asyncio.to_thread(events.close)


@asynccontextmanager
async def serving(
    service: Service, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[str]:
    server = grpc.aio.server()
    pb_grpc.add_PromptCacheServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call] # generated without types
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    try:
        yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0)


@asynccontextmanager
async def connected(kind: str, address: str, **options: Any) -> AsyncIterator[Any]:
    if kind == "sync":
        with Client(address, **options) as client:
            yield InThreads(client)
    else:
        async with AsyncClient(address, **options) as client:
            yield client


@pytest.fixture(params=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def service() -> Service:
    return Service()


@pytest.fixture
async def address(service: Service) -> AsyncIterator[str]:
    async with serving(service) as address:
        yield address


@pytest.fixture
async def client(kind: str, address: str) -> AsyncIterator[Any]:
    async with connected(kind, address) as client:
        yield client


# --- asking ---


async def test_an_image_comes_back_with_its_facts_and_status(client: Any, service: Service) -> None:
    made = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    service.script = [
        answer(
            variant=2,
            content_type="image/png",
            width=16,
            height=8,
            create_time=made,
            model="painter",
            seed=0,
            usage=pb.Usage(output_tokens=7, total_tokens=9),
            generation_time=Duration(seconds=1, nanos=500_000_000),
            paid_microusd=40_000,
        )
    ]
    result: ImageResult = await client.get_image("a red fox")
    assert (result.data, result.key, result.keys, result.tier) == (PNG, "k0", ("k0",), TierName.MEMORY)
    assert not result.pending
    assert result.url is None
    assert result.status == CacheStatus(
        tier=TierName.MEMORY, state=State.READY, matched=MatchLevel.EXACT, derived_from="k7", saved_microusd=40_000
    )
    assert result.image_status == (result.status,)
    facts = result.image
    assert (facts.variant, facts.content_type, facts.width, facts.height) == (2, "image/png", 16, 8)
    assert (facts.create_time, facts.model, facts.seed, facts.generation_s) == (made, "painter", 0, 1.5)
    assert (facts.usage, facts.paid_microusd) == (Usage(output_tokens=7, total_tokens=9), 40_000)


async def test_every_option_reaches_the_service(client: Any, service: Service) -> None:
    service.script = [answer()]
    await client.get_image(
        ImageSpec("a red fox", model="m", size="auto"),
        size="1024x1024",
        quality="high",
        background="opaque",
        output_format="webp",
        output_compression=0,
        moderation="low",
        seed=0,
        extra={"steps": 20, "nested": {"list": [1, None, "x"]}},
        inputs=[
            InputImage(PNG, digest=DIGEST),
            InputImage(PNG, InputRole.MASK),
            InputImage(digest=DIGEST, role=InputRole.STYLE),
        ],
        namespace="shop",
        n=3,
        cache_policy=CachePolicy.ONLY_IF_CACHED,
        max_age_s=60,
        ttl_s=3600.5,
        max_wait_s=0,
        variant_policy=VariantPolicy.STICKY,
        exclude_keys=["k1"],
        delivery=Delivery.AUTO,
        max_inline_bytes=1_000,
        priority=Priority.BATCH,
        request_id="id-1",
        tags=["spring"],
        allow_degraded=True,
        use="thumbnail",
        candidates=4,
        match_level=MatchLevel.STANDARD,
    )
    assert service.asked[0] == pb.GetImageRequest(
        spec=pb.ImageSpec(
            prompt="a red fox",
            model="m",
            size="1024x1024",
            quality="high",
            background="opaque",
            output_format="webp",
            output_compression=0,
            moderation="low",
            seed=0,
            extra={"steps": 20, "nested": {"list": [1, None, "x"]}},
            inputs=[
                pb.InputImage(role="INPUT_ROLE_IMAGE", data=PNG),
                pb.InputImage(role="INPUT_ROLE_MASK", data=PNG),
                pb.InputImage(role="INPUT_ROLE_STYLE", digest=DIGEST),
            ],
        ),
        namespace="shop",
        n=3,
        cache_policy="CACHE_POLICY_ONLY_IF_CACHED",
        max_age=Duration(seconds=60),
        ttl=Duration(seconds=3600, nanos=500_000_000),
        max_wait=Duration(),
        variant_policy="VARIANT_POLICY_STICKY",
        exclude_keys=["k1"],
        delivery="DELIVERY_AUTO",
        max_inline_bytes=1_000,
        priority="PRIORITY_BATCH",
        request_id="id-1",
        tags=["spring"],
        allow_degraded=True,
        use="thumbnail",
        candidates=4,
        match_level="MATCH_LEVEL_STANDARD",
    )


async def test_what_is_not_given_stays_unset(client: Any, service: Service) -> None:
    service.script = [answer()]
    await client.get_image("a red fox", model=None, max_wait_s=None)
    assert service.asked == [pb.GetImageRequest(spec=pb.ImageSpec(prompt="a red fox"))]


@pytest.mark.parametrize(
    "options",
    [
        {"variant_policy": VariantPolicy.NEXT},
        {"variant_policy": VariantPolicy.NEXT, "request_id": ""},
        {"cache_policy": CachePolicy.REFRESH},
        {"cache_policy": CachePolicy.NO_STORE},
    ],
    ids=["next", "next of no id", "refresh", "no store"],
)
async def test_a_retry_of_a_paying_call_repeats_its_request_id(
    client: Any, service: Service, options: dict[str, Any]
) -> None:
    service.script = [UNAVAILABLE, answer(), answer()]
    await client.get_image("a red fox", **options)
    await client.get_image("a red fox", **options)
    first, again, other = [request.request_id for request in service.asked]
    assert first == again != other
    assert len(first) == 32


async def test_a_key_collects_a_pending_image(client: Any, service: Service) -> None:
    status = pb.CacheStatus(state="STATE_PENDING", estimated_wait=Duration(seconds=12))
    service.script = [pb.GetImageResponse(images=[pb.Image(key="k9")], status=status), answer(key="k9")]
    pending = await client.get_image("a red fox", max_wait_s=0)
    assert pending.pending
    assert pending.status.estimated_wait_s == 12
    with pytest.raises(ValueError, match="still being made"):
        _ = pending.data
    collected = await client.get_by_key(pending.key, namespace="shop")
    assert collected.data == PNG
    assert service.asked[1] == pb.GetImageRequest(namespace="shop", key="k9")


async def test_a_picture_in_review_is_told_from_one_still_being_made(client: Any, service: Service) -> None:
    status = pb.CacheStatus(state="STATE_PENDING_REVIEW")
    service.script = [pb.GetImageResponse(images=[pb.Image(key="k9")], status=status, image_status=[status])]
    waiting = await client.get_image("a red fox")
    assert (waiting.status.state, waiting.key, waiting.pending) == (State.PENDING_REVIEW, "k9", True)
    assert State.PENDING_REVIEW is not State.PENDING
    with pytest.raises(ValueError, match="review"):
        _ = waiting.data


async def test_what_a_picture_scored_and_whether_it_is_degraded_is_told(client: Any, service: Service) -> None:
    scored = answer(score=0.0, won_against=3)
    scored.status.degraded = True
    service.script = [scored, answer()]
    first, unscored = await client.get_image("a red fox"), await client.get_image("a red fox")
    assert (first.image.score, first.image.won_against, first.status.degraded) == (0.0, 3, True)
    assert (unscored.image.score, unscored.image.won_against, unscored.status.degraded) == (None, 0, False)


async def test_a_url_answer_has_a_url_and_no_bytes(client: Any, service: Service) -> None:
    until = datetime(2026, 1, 1, tzinfo=UTC)
    service.script = [answer(None, url="https://bucket/k0?signature", url_expire_time=until)]
    result = await client.get_image("a red fox", delivery=Delivery.URL)
    assert result.url == "https://bucket/k0?signature"
    assert result.image.url_expire_time == until
    with pytest.raises(ValueError, match="came as a URL"):
        _ = result.data
    assert "signature" not in repr(result)


async def test_the_only_image_of_several_is_refused(client: Any, service: Service) -> None:
    service.script = [pb.GetImageResponse(images=[image(), image(key="k1")])]
    result = await client.get_image("a red fox", n=2)
    assert result.keys == ("k0", "k1")
    with pytest.raises(ValueError, match="2 images"):
        _ = result.data


async def test_words_of_a_newer_service_read_as_unknown(client: Any, service: Service) -> None:
    status = pb.CacheStatus()
    status.ParseFromString(b"\x08\x63\x10\x01")  # tier 99, state READY
    service.script = [pb.GetImageResponse(images=[image()], status=status)]
    result = await client.get_image("a red fox")
    assert result.tier is None
    assert result.data == PNG


async def test_equal_namespaces_and_prompts_go_by_one_route(kind: str, address: str, service: Service) -> None:
    service.script = [answer() for _ in range(4)] + [pb.GetStatsResponse()]
    async with connected(kind, address) as client:
        await client.get_image("a red fox", namespace="shop")
        await client.get_image("a red fox", namespace="shop", size="1024x1024")
        await client.get_image("a red fox")
        await client.get_by_key("v1.default.a.b.0")
        await client.stats()
    routes = [each.get("x-promptcache-route") for each in service.metadata]
    shop, default = (hashlib.sha256(text).hexdigest() for text in (b"shop\na red fox", b"\na red fox"))
    assert routes == [shop, shop, default, None, None]


async def test_the_token_travels_and_every_call_has_a_deadline(kind: str, address: str, service: Service) -> None:
    service.script = [answer(), pb.GetStatsResponse()]
    async with connected(kind, address, token="s3cret") as client:
        await client.get_image("a red fox")
        await client.stats(timeout_s=7)
    assert [each["authorization"] for each in service.metadata] == ["Bearer s3cret"] * 2
    assert 110 < service.time_left_s[0] < 125  # the wire rounds it up
    assert 5 < service.time_left_s[1] < 9


async def test_a_unix_socket_is_an_address(kind: str, tmp_path: Path, service: Service) -> None:
    service.script = [answer()]
    async with serving(service, f"unix:{tmp_path}/s") as address, connected(kind, address) as client:
        assert (await client.get_image("a red fox")).data == PNG


async def test_tls_trusts_the_certificates_it_is_given(kind: str, service: Service) -> None:
    certificate, key = self_signed()
    service.script = [answer()]
    async with serving(service, credentials=grpc.ssl_server_credentials([(key, certificate)])) as address:
        async with connected(kind, address, root_certificates=certificate, token="s3cret") as client:
            assert (await client.get_image("a red fox")).data == PNG
        async with connected(kind, address, tls=True) as distrustful:
            with pytest.raises(UnreachableError):
                await distrustful.get_image("a red fox")


async def test_an_image_above_grpcs_own_limit_arrives(client: Any, service: Service) -> None:
    large = bytes(20_000_000)
    service.script = [answer(large)]
    assert (await client.get_image("a red fox", max_inline_bytes=30_000_000)).data == large


async def test_find_cached_keeps_the_order_and_tells_who_could_not_be_asked(client: Any, service: Service) -> None:
    service.script = [
        pb.FindCachedResponse(
            items=[
                pb.FoundItem(key="k0", presence="PRESENCE_CACHED", tier="TIER_REDIS"),
                pb.FoundItem(key="k1", presence="PRESENCE_IN_FLIGHT"),
                pb.FoundItem(key="k2", presence="PRESENCE_ABSENT"),
            ],
            unknown_tiers=["TIER_S3"],
        )
    ]
    result = await client.find_cached(["a", ImageSpec("b", size="1024x1024"), "c"], namespace="shop")
    assert result.items == (
        Found("k0", Presence.CACHED, TierName.REDIS),
        Found("k1", Presence.IN_FLIGHT),
        Found("k2", Presence.ABSENT),
    )
    assert result.unknown_tiers == (TierName.S3,)
    assert [item.spec.size for item in service.asked[0].items] == ["", "1024x1024", ""]


@pytest.mark.parametrize("from_file", [False, True], ids=["bytes", "file"])
async def test_put_sends_a_header_with_the_digest_and_then_the_bytes(
    client: Any, service: Service, tmp_path: Path, *, from_file: bool
) -> None:
    data = PNG * 100
    source: bytes | Path = data
    if from_file:
        source = tmp_path / "cat.png"
        source.write_bytes(data)
    service.script = [pb.PutImageResponse(image=image(None), created=True)]
    result = await client.put(source, "a cat", tags=["spring"], paid_microusd=5, ttl_s=60, replace_first=True)
    assert result.created
    assert result.image.key == "k0"
    first, *rest = service.asked[0]
    assert first.header == pb.PutImageHeader(
        spec=pb.ImageSpec(prompt="a cat"),
        replace=True,
        tags=["spring"],
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        ttl=Duration(seconds=60),
        paid_microusd=5,
    )
    assert b"".join(each.chunk for each in rest) == data
    assert len(rest) > 1


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"prompt": "a cat"}, pb.PurgeImagesRequest(spec=pb.ImageSpec(prompt="a cat"))),
        ({"key": "k0"}, pb.PurgeImagesRequest(key="k0")),
        ({"tag": "spring"}, pb.PurgeImagesRequest(tag="spring")),
        ({"everything": True, "dry_run": True}, pb.PurgeImagesRequest(everything=True, dry_run=True)),
    ],
    ids=["prompt", "key", "tag", "everything"],
)
async def test_purge_selects_by_one_thing(client: Any, service: Service, selector: Any, expected: Any) -> None:
    service.script = [
        pb.PurgeImagesResponse(images=3, tiers=[pb.TierCount(tier="TIER_MEMORY", count=2), pb.TierCount(count=9)])
    ]
    result = await client.purge(**selector)
    assert (result.images, result.tiers) == (3, {TierName.MEMORY: 2})
    assert service.asked == [expected]


async def test_purge_of_nothing_in_particular_is_a_mistake_of_the_program(client: Any) -> None:
    with pytest.raises(TypeError, match="exactly one"):
        await client.purge()
    with pytest.raises(TypeError, match="exactly one"):
        await client.purge(key="k0", everything=True)


async def test_explain_tells_where_two_requests_differ(client: Any, service: Service) -> None:
    one = pb.Explanation(normalized_prompt="a cat", canonical_identity="{}", key="k0", profile="standard/1")
    differences = [pb.FieldDifference(field="size", value="auto", other_value="1024x1024")]
    service.script = [
        pb.ExplainKeyResponse(explanation=one, other=one, differences=differences),
        pb.ExplainKeyResponse(explanation=one),
    ]
    both = await client.explain("a cat", ImageSpec("a cat", size="1024x1024"), match_level=MatchLevel.EXACT)
    assert (both.explanation.normalized_prompt, both.explanation.key) == ("a cat", "k0")
    assert both.other == both.explanation
    assert both.differences == (FieldDifference("size", "auto", "1024x1024"),)
    assert service.asked[0].match_level == pb.MATCH_LEVEL_EXACT
    assert (await client.explain("a cat")).other is None


async def test_stats_are_numbers(client: Any, service: Service) -> None:
    row = pb.StatsRow(
        namespace="shop",
        outcome="OUTCOME_HIT",
        tier="TIER_REDIS",
        requests=3,
        latency_sum=Duration(nanos=500_000_000),
        saved_microusd=120_000,
        unknown_microusd=7,
        degraded=2,
    )
    started = datetime(2026, 1, 1, tzinfo=UTC)
    service.script = [
        pb.GetStatsResponse(
            start_time=started,
            rows=[row],
            total=pb.StatsRow(requests=3),
            corrupt=[pb.TierCount(tier="TIER_S3", count=1)],
            upstream_calls=1,
        )
    ]
    stats = await client.stats("shop")
    assert (stats.start_time, stats.total.requests, stats.upstream_calls) == (started, 3, 1)
    assert stats.corrupt == {TierName.S3: 1}
    [counted] = stats.rows
    assert (counted.outcome, counted.tier, counted.latency_sum_s) == (Outcome.HIT, TierName.REDIS, 0.5)
    assert (counted.unknown_microusd, counted.degraded) == (7, 2)
    assert (stats.total.outcome, stats.total.unknown_microusd, stats.total.degraded) == (None, 0, 0)


async def test_stats_are_asked_for_by_time_and_by_what_tells_rows_apart(client: Any, service: Service) -> None:
    service.script = [pb.GetStatsResponse(), pb.GetStatsResponse()]
    since, until = datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 5, 8, tzinfo=UTC)
    await client.stats(since=since, until=until, span=StatsSpan.DAY, by=[StatsField.MODEL, StatsField.TIER])
    await client.stats()
    asked, plain = service.asked
    assert (asked.since.ToDatetime(UTC), asked.until.ToDatetime(UTC)) == (since, until)
    assert (asked.span, list(asked.by)) == (pb.STATS_SPAN_DAY, [pb.STATS_FIELD_MODEL, pb.STATS_FIELD_TIER])
    assert plain == pb.GetStatsRequest()


async def test_a_row_of_stats_tells_whose_it_is_and_how_long_it_took(client: Any, service: Service) -> None:
    hour = datetime(2026, 5, 1, 7, tzinfo=UTC)
    row = pb.StatsRow(
        model="m",
        quality="high",
        caller="web",
        start_time=hour,
        latency_counts=[90, 8, 2],
        would_cost_microusd=9,
        settled_calls=1,
        unknown_calls=2,
        open_calls=3,
        open_microusd=4,
    )
    service.script = [pb.GetStatsResponse(rows=[row], total=pb.StatsRow(), latency_bounds_s=[0.1, 1.0])]
    stats = await client.stats(since=hour)
    [read] = stats.rows
    assert (read.model, read.quality, read.caller, read.start_time) == ("m", "high", "web", hour)
    assert (read.would_cost_microusd, read.settled_calls, read.unknown_calls) == (9, 1, 2)
    assert (read.open_calls, read.open_microusd) == (3, 4)
    assert [stats.latency_s(read, share) for share in (0.5, 0.9, 0.95, 0.99)] == [0.1, 0.1, 1.0, math.inf]
    assert stats.latency_s(stats.total, 0.5) is None


# --- failing ---


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        ("INVALID_ARGUMENT", "INVALID_FIELD", InvalidRequestError),
        ("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE", InvalidRequestError),
        ("NOT_FOUND", "NOT_CACHED", NotCachedError),
        ("NOT_FOUND", "KEY_GONE", KeyGoneError),
        ("FAILED_PRECONDITION", "PROMPT_REFUSED", PromptRefusedError),
        ("FAILED_PRECONDITION", "IMAGE_TOO_LARGE", ImageTooLargeError),
        ("FAILED_PRECONDITION", "NO_SIGNED_URLS", CacheError),
        ("UNAUTHENTICATED", "UNAUTHENTICATED", UnauthenticatedError),
        ("PERMISSION_DENIED", "PERMISSION_DENIED", PermissionDeniedError),
        ("RESOURCE_EXHAUSTED", "BUDGET_EXHAUSTED", QuotaExhaustedError),
        ("RESOURCE_EXHAUSTED", "", CacheError),
        ("UNIMPLEMENTED", "NOT_IMPLEMENTED", UnsupportedError),
        ("UNAVAILABLE", "QUEUE_FULL", TryAgainError),
        ("INTERNAL", "A_REASON_OF_TOMORROW", CacheError),
    ],
)
async def test_a_reason_becomes_its_error(
    client: Any, service: Service, code: str, reason: str, error: type[CacheError]
) -> None:
    service.script = [Fail(grpc.StatusCode[code], reason, trailers=NOT_AGAIN)]
    with pytest.raises(CacheError, match="what happened and what to try") as caught:
        await client.get_image("a red fox")
    assert type(caught.value) is error
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode[code], reason)


async def test_an_error_names_its_fields_and_when_to_come_back(client: Any, service: Service) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="spec.size", description="not WIDTHxHEIGHT")
    service.script = [
        Fail(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
            details=(error_details_pb2.BadRequest(field_violations=[violation]),),
        ),
        Fail(
            grpc.StatusCode.UNAVAILABLE,
            "QUEUE_FULL",
            trailers=NOT_AGAIN,
            details=(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=5)), error_details_pb2.Help()),
        ),
    ]
    with pytest.raises(InvalidRequestError) as invalid:
        await client.get_image("a red fox", size="17x99999")
    assert invalid.value.violations == {"spec.size": "not WIDTHxHEIGHT"}
    assert invalid.value.metadata == {"cached": "true"}
    assert invalid.value.retry_after_s is None
    with pytest.raises(TryAgainError) as busy:
        await client.get_image("a red fox")
    assert busy.value.retry_after_s == 5


async def test_garbled_details_leave_the_code(client: Any, service: Service) -> None:
    service.script = [Fail(grpc.StatusCode.NOT_FOUND, trailers=(("grpc-status-details-bin", b"\xff\xff"),))]  # type: ignore[arg-type] # binary trailers are bytes
    with pytest.raises(NotCachedError) as caught:
        await client.get_image("a red fox")
    assert caught.value.reason == ""


async def test_unavailable_twice_and_then_well_is_one_result(client: Any, service: Service) -> None:
    service.script = [UNAVAILABLE, UNAVAILABLE, answer()]
    assert (await client.get_image("a red fox")).data == PNG
    assert len(service.asked) == 3


async def test_unavailable_is_tried_four_times_in_all(client: Any, service: Service) -> None:
    service.script = [UNAVAILABLE] * 5
    with pytest.raises(TryAgainError) as caught:
        await client.get_image("a red fox")
    assert caught.value.reason == "UPSTREAM_DOWN"
    assert len(service.asked) == 4


async def test_pushback_of_the_service_ends_the_retries(client: Any, service: Service) -> None:
    service.script = [Fail(grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL", trailers=NOT_AGAIN), answer()]
    with pytest.raises(TryAgainError):
        await client.get_image("a red fox")
    assert len(service.asked) == 1


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "INTERNAL"])
async def test_every_other_code_is_final(client: Any, service: Service, code: str) -> None:
    service.script = [Fail(grpc.StatusCode[code], "X"), answer()]
    with pytest.raises(CacheError):
        await client.get_image("a red fox")
    assert len(service.asked) == 1


async def test_an_unreachable_service_is_named(kind: str) -> None:
    nobody = "127.0.0.1:1"
    async with connected(kind, nobody, token="s3cret") as client:
        with pytest.raises(UnreachableError) as caught:
            await client.get_image("a red fox")
        with pytest.raises(UnreachableError):
            await collected(client, "a red fox")
    assert str(caught.value) == f"no answer from the cache service at {nobody}"
    assert "s3cret" not in repr(caught.value)


async def test_the_deadline_ends_a_call(client: Any, service: Service) -> None:
    service.script = [answer(), "hang"]
    await client.get_image("a red fox")  # is connected from here on
    with pytest.raises(DeadlineError):
        await client.get_image("a red fox", timeout_s=1.0)  # long enough to reach the service
    await asyncio.wait_for(service.hung_up.wait(), 5)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": "secret\ud800"}, "spec"),
        ({"prompt": "secret", "extra": {"x": object()}}, "spec"),
        ({"prompt": 7}, "spec"),
        ({"prompt": "secret", "n": 2**40}, "request"),
        ({"prompt": "secret", "ttl_s": 1e300}, "request"),
    ],
)
async def test_what_cannot_be_sent_is_an_invalid_request(
    client: Any, service: Service, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await client.get_image(**options)
    assert (caught.value.reason, list(caught.value.violations)) == ("INVALID_FIELD", [field])
    assert "secret" not in str(caught.value)
    assert service.asked == []


async def test_a_misspelt_option_is_a_mistake_of_the_program(client: Any) -> None:
    with pytest.raises(TypeError, match="sizee"):
        await client.get_image("a red fox", sizee="1024x1024")
    with pytest.raises(TypeError, match="either a prompt or a key"):
        async for _ in client.stream_image():
            pass
    with pytest.raises(TypeError, match="leave out size"):
        async for _ in client.stream_image(key="k0", size="1024x1024"):
            pass


async def test_a_cancelled_call_is_cancelled_at_the_service_and_raises_cancelled_error(
    address: str, service: Service
) -> None:
    service.script = ["hang"]
    async with AsyncClient(address) as client:
        call = asyncio.create_task(client.get_image("a red fox"))
        await service.hanging.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(service.hung_up.wait(), 5)


async def test_closing_the_sync_client_ends_what_runs(address: str, service: Service) -> None:
    service.script = ["hang"]
    client = Client(address)
    call = asyncio.create_task(asyncio.to_thread(client.get_image, "a red fox"))
    await service.hanging.wait()
    client.close()
    with pytest.raises(CacheError):
        await call


async def test_closing_the_asyncio_client_ends_what_runs_with_an_error_and_cancels_nobody(
    address: str, service: Service
) -> None:
    service.script = ["hang"]
    client = AsyncClient(address)
    call = asyncio.create_task(client.get_image("a red fox"))
    await service.hanging.wait()
    await client.close()
    with pytest.raises(UnreachableError):
        await call


async def test_many_threads_share_one_client(address: str, service: Service) -> None:
    service.script = [answer() for _ in range(50)]
    with Client(address) as client:
        results = await asyncio.gather(*(asyncio.to_thread(client.get_image, f"fox {i}") for i in range(50)))
    assert [result.data for result in results] == [PNG] * 50
    assert sorted(request.spec.prompt for request in service.asked) == sorted(f"fox {i}" for i in range(50))


# --- streams ---


async def collected(client: Any, *args: Any, **options: Any) -> list[Any]:
    return await drained(client.stream_image(*args, **options))


async def drained(events: AsyncGenerator[Any]) -> list[Any]:
    return [event async for event in events]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def bytes_of(events: list[Any]) -> bytes:
    return b"".join(event.data for event in events if isinstance(event, Chunk))


async def test_a_stream_is_progress_header_and_chunks(client: Any, service: Service) -> None:
    progress = pb.Progress(keys=["k0"], waited=Duration(seconds=2), estimated_wait=Duration(seconds=8))
    unknown = pb.StreamImageResponse()
    service.script = [[pb.StreamImageResponse(progress=progress), header(), unknown, chunk(0, 5000), chunk(5000)]]
    events = await collected(client, "a red fox", size="auto")
    assert events[0] == Progress(("k0",), waited_s=2, estimated_wait_s=8)
    assert isinstance(events[1], ImageHeader)
    assert (events[1].image.key, events[1].status.tier, events[1].image.data) == ("k0", TierName.S3, None)
    assert bytes_of(events) == PNG
    request = pb.GetImageRequest(spec=pb.ImageSpec(prompt="a red fox", size="auto"))
    assert service.asked == [pb.StreamImageRequest(request=request)]


async def test_several_pictures_share_a_stream(client: Any, service: Service) -> None:
    service.script = [[header(), chunk(), header(index=1, key="k1"), chunk()]]
    events = await collected(client, "a red fox", n=2)
    assert [(event.index, event.image.key) for event in events if isinstance(event, ImageHeader)] == [
        (0, "k0"),
        (1, "k1"),
    ]
    assert bytes_of(events) == PNG * 2


async def test_a_broken_download_goes_on_where_it_broke(client: Any, service: Service) -> None:
    service.script = [
        [header(), chunk(0, 3000), UNAVAILABLE],
        [header(3000), chunk(3000, 7000), UNAVAILABLE],
        [header(7000), chunk(7000)],
    ]
    events = await collected(client, "a red fox", namespace="shop", variant_policy=VariantPolicy.NEXT)
    assert bytes_of(events) == PNG
    assert sum(isinstance(event, ImageHeader) for event in events) == 1
    by_key = pb.GetImageRequest(namespace="shop", key="k0")
    assert service.asked[1:] == [
        pb.StreamImageRequest(request=by_key, read_offset=offset, if_digest=DIGEST) for offset in (3000, 7000)
    ]


async def test_a_download_outlives_a_restart_of_the_service(kind: str, tmp_path: Path) -> None:
    first = Service(script=[[header(), chunk(0, 3000), "hang"]])
    second = Service(script=[[header(3000), chunk(3000)]])
    address = f"unix:{tmp_path}/s"
    async with connected(kind, address) as client:
        async with serving(first, address):
            events = client.stream_image("a red fox")
            begun = [await anext(events), await anext(events)]
            rest = asyncio.create_task(drained(events))
            await first.hanging.wait()
        async with serving(second, address):
            begun += await rest
    assert bytes_of(begun) == PNG
    assert second.asked[0].read_offset == 3000


async def test_a_break_after_the_last_byte_needs_no_other_call(client: Any, service: Service) -> None:
    service.script = [[header(), chunk(), UNAVAILABLE]]
    assert bytes_of(await collected(client, "a red fox")) == PNG


async def test_a_download_that_brings_nothing_more_ends(client: Any, service: Service) -> None:
    service.script = [[header(), chunk(0, 3000), UNAVAILABLE], *([[header(3000), UNAVAILABLE]] * 9)]
    with pytest.raises(TryAgainError):
        await collected(client, "a red fox")
    assert len(service.asked) == 4


async def test_what_the_service_declines_while_waiting_is_not_asked_again(client: Any, service: Service) -> None:
    waiting = pb.StreamImageResponse(progress=pb.Progress(keys=["k0"]))
    service.script = [[waiting, UNAVAILABLE], [header(), chunk()]]
    with pytest.raises(TryAgainError):
        await collected(client, "a red fox")
    assert len(service.asked) == 1


async def test_a_connection_that_breaks_while_waiting_is_made_again(client: Any, service: Service) -> None:
    waiting = pb.StreamImageResponse(progress=pb.Progress(keys=["k0"]))
    service.script = [[waiting, Fail(grpc.StatusCode.UNAVAILABLE)], [header(), chunk()]]
    assert bytes_of(await collected(client, "a red fox")) == PNG
    assert service.asked[0] == service.asked[1]


async def test_a_stream_that_is_declined_before_it_begins_is_asked_for_again(client: Any, service: Service) -> None:
    soon = error_details_pb2.RetryInfo(retry_delay=timedelta(seconds=0.01))
    busy = Fail(grpc.StatusCode.UNAVAILABLE, "OVERLOADED", details=(soon,))
    service.script = [[busy], [busy], [header(), chunk()]]
    assert bytes_of(await collected(client, "a red fox")) == PNG
    assert service.asked[0] == service.asked[1] == service.asked[2]


async def test_a_stream_declined_for_longer_than_it_has_time_ends_at_once(client: Any, service: Service) -> None:
    late = error_details_pb2.RetryInfo(retry_delay=timedelta(seconds=1_000))
    service.script = [[Fail(grpc.StatusCode.UNAVAILABLE, "OVERLOADED", details=(late,))], [header(), chunk()]]
    with pytest.raises(TryAgainError):
        await collected(client, "a red fox", timeout_s=30)
    assert len(service.asked) == 1


async def test_a_stream_whose_service_goes_away_before_its_first_answer_ends(kind: str, tmp_path: Path) -> None:
    service = Service(script=[["hang"]])
    async with connected(kind, address := f"unix:{tmp_path}/s") as client:
        async with serving(service, address):
            asking = asyncio.create_task(collected(client, "a red fox", timeout_s=20))
            await service.hanging.wait()
        async with asyncio.timeout(15):
            with pytest.raises(UnreachableError):
                await asking


async def test_several_pictures_do_not_resume(client: Any, service: Service) -> None:
    service.script = [[header(), chunk(), UNAVAILABLE], [header(), chunk()]]
    with pytest.raises(TryAgainError):
        await collected(client, "a red fox", n=2)
    assert len(service.asked) == 1


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [header(), chunk(0, 3000)],
        [header(digest="sha256:" + "0" * 64), chunk()],
        [header(), chunk(0, 3000), header(index=1), chunk()],
    ],
    ids=["nothing", "too short", "another digest", "too short before the next"],
)
async def test_a_damaged_download_is_never_taken_for_the_image(client: Any, service: Service, steps: list[Any]) -> None:
    service.script = [steps]
    with pytest.raises(CorruptDownloadError):
        await collected(client, "a red fox", n=2)


@pytest.mark.parametrize("resumed", [header(0), header(3000, digest="sha256:" + "1" * 64)], ids=["offset", "digest"])
async def test_a_resumed_download_must_be_of_the_same_bytes(client: Any, service: Service, resumed: Any) -> None:
    service.script = [[header(), chunk(0, 3000), UNAVAILABLE], [resumed, chunk(3000)]]
    with pytest.raises(CorruptDownloadError):
        await collected(client, "a red fox")


async def test_the_deadline_spans_all_calls_of_a_download(
    client: Any, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([1_000.0, 1_000.0, 1_100.0])
    for twin in ("sync", "aio"):
        monkeypatch.setattr(f"cacheserver.client.{twin}.time", SimpleNamespace(monotonic=lambda: next(readings)))
    service.script = [[header(), chunk(0, 3000), UNAVAILABLE], [header(3000), chunk(3000)]]
    assert bytes_of(await collected(client, "a red fox", timeout_s=120)) == PNG
    assert service.time_left_s[0] > 110
    assert service.time_left_s[1] < 25


async def test_closing_a_stream_early_ends_the_call(client: Any, service: Service) -> None:
    service.script = [[header(), "hang"]]
    events = client.stream_image("a red fox")
    await anext(events)
    await service.hanging.wait()
    await events.aclose()
    await asyncio.wait_for(service.hung_up.wait(), 5)


async def test_a_download_fills_a_file(client: Any, service: Service, tmp_path: Path) -> None:
    service.script = [[header(), chunk(0, 3000), UNAVAILABLE], [header(3000), chunk(3000)]]
    begun = await client.download(tmp_path / "fox.png", "a red fox")
    assert begun.image.key == "k0"
    assert contents(tmp_path) == {"fox.png": PNG}


async def test_a_failed_download_leaves_the_old_file_and_nothing_else(
    client: Any, service: Service, tmp_path: Path
) -> None:
    (tmp_path / "fox.png").write_bytes(b"old")
    service.script = [[header(), chunk(0, 3000)]]
    with pytest.raises(CorruptDownloadError):
        await client.download(tmp_path / "fox.png", key="k0")
    assert contents(tmp_path) == {"fox.png": b"old"}


@pytest.mark.parametrize("state", [State.PENDING, State.PENDING_REVIEW])
async def test_a_pending_download_writes_nothing(client: Any, service: Service, tmp_path: Path, state: State) -> None:
    service.script = [[header(state=f"STATE_{state.name}", size_bytes=0, digest="")]]
    begun = await client.download(tmp_path / "fox.png", "a red fox", max_wait_s=0)
    assert begun.status.state is state
    assert contents(tmp_path) == {}


async def test_a_download_is_one_picture_and_its_directory_exists(client: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one picture"):
        await client.download(tmp_path / "fox.png", "a red fox", n=2)
    with pytest.raises(FileNotFoundError):
        await client.download(tmp_path / "missing" / "fox.png", "a red fox")


async def test_a_cancelled_download_leaves_nothing(address: str, service: Service, tmp_path: Path) -> None:
    service.script = [[header(), chunk(0, 3000), "hang"]]
    async with AsyncClient(address) as client:
        call = asyncio.create_task(client.download(tmp_path / "fox.png", "a red fox"))
        await service.hanging.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(service.hung_up.wait(), 5)
    assert contents(tmp_path) == {}


# --- the package ---


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after running `code`."""
    code = f"{code}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)  # noqa: S603 - our own code
    return set(json.loads(output))


def test_importing_the_package_imports_next_to_nothing() -> None:
    bare, loaded = loaded_by("pass"), loaded_by("import cacheserver")
    assert loaded - bare == {"cacheserver"}


def test_importing_the_client_imports_nothing_of_the_service_and_nothing_that_only_operators_need() -> None:
    loaded = loaded_by("from cacheserver.client import AsyncClient, Client")
    ours = {name for name in loaded if name.split(".")[0] == "cacheserver"}
    allowed = ("cacheserver.client", "cacheserver.pb", "cacheserver.model")
    assert {name for name in ours if name != "cacheserver" and not name.startswith(allowed)} == set()
    assert not {f"cacheserver.client.{name}" for name in ("admin", "admin_values", "importing", "openai")} & ours
    packages = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"cacheserver"}
    # grpc itself imports its siblings where they are installed, and Cython and setuptools leave names of their own.
    internal = {"__main__", "cython_runtime", "_distutils_hack"}
    assert {
        name for name in packages - internal if not name.startswith(("grpc", "google", "typing_extensions", "_cython"))
    } == set()


def test_what_only_operators_use_is_there_when_it_is_named() -> None:
    assert {name for name in client_package.__all__ if not hasattr(client_package, name)} == set()
    with pytest.raises(AttributeError, match="has no attribute 'LedgerRows'"):
        client_package.LedgerRows  # noqa: B018 - what is asked for is the error


def test_the_twins_have_the_same_methods_and_parameters() -> None:
    def surface(client: type) -> Iterator[tuple[str, list[str]]]:
        for name, method in inspect.getmembers(client, inspect.isfunction):
            if not name.startswith("_"):
                parameters = [str(each) for each in inspect.signature(method).parameters.values()]
                # What the asyncio twin takes may also come asynchronously.
                yield name, [re.sub(r" \| AsyncIterable\[.*\]'", "'", each) for each in parameters]

    assert dict(surface(Client)) == dict(surface(AsyncClient))


# --- the real service ---


@pytest.fixture
async def real(kind: str, house: House) -> AsyncIterator[Any]:
    async with open_front(house) as front, connected(kind, f"127.0.0.1:{front.server.port}") as client:
        yield client


async def test_the_service_answers_the_client_all_the_way(real: Any, house: House) -> None:
    first = await real.get_image("a red fox")
    again = await real.get_image("a red fox")
    assert (first.tier, again.tier) == (TierName.UPSTREAM, TierName.MEMORY)
    assert first.data == again.data
    assert again.image.digest == f"sha256:{hashlib.sha256(first.data).hexdigest()}"
    assert (again.status.matched, again.status.state) == (MatchLevel.EXACT, State.READY)
    assert (await real.get_by_key(first.key)).data == first.data
    another = await real.get_image("a red fox", variant_policy=VariantPolicy.NEXT, exclude_keys=[first.key])
    assert another.data != first.data
    several = await real.get_image("a red fox", n=2)
    assert several.keys == (first.key, another.key)
    assert house.upstream.calls == 2


async def test_the_service_finds_explains_purges_and_counts(real: Any) -> None:
    key = (await real.get_image("a red fox", tags=["spring"])).key
    found = await real.find_cached(["a red fox", "a blue fox"])
    assert [item.presence for item in found.items] == [Presence.CACHED, Presence.ABSENT]
    assert (await real.explain("A red fox")).explanation.key == key
    assert (await real.purge(tag="spring", dry_run=True)).images == 1
    assert (await real.purge(tag="spring")).images == 1
    with pytest.raises(KeyGoneError):
        await real.get_by_key(key)
    assert (await real.stats("default")).total.requests == 2


async def test_the_service_takes_an_image_and_streams_it_back(real: Any, house: House, tmp_path: Path) -> None:
    data = large_png(1, 1_000_000)
    stored = await real.put(data, "a large fox", paid_microusd=7)
    assert stored.created
    events = await collected(real, "a large fox")
    assert bytes_of(events) == data
    (tmp_path / "got").mkdir()
    begun = await real.download(tmp_path / "got" / "fox.png", key=stored.image.key)
    assert begun.status.saved_microusd == 7
    assert contents(tmp_path / "got") == {"fox.png": data}
    with pytest.raises(ImageTooLargeError):
        await real.get_image("a large fox", max_inline_bytes=1_000)
    assert house.upstream.calls == 0


async def test_the_service_resumes_a_download_that_the_network_breaks(kind: str, house: House) -> None:
    data = large_png(1, 2_000_000)
    async with open_front(house) as front:
        await front.put(pb.PutImageHeader(spec=pb.ImageSpec(prompt="a large fox")), data)
        async with (
            TcpProxy("127.0.0.1", front.server.port) as proxy,
            connected(kind, f"127.0.0.1:{proxy.port}") as client,
        ):
            proxy.delay_s = 0.02  # the end must not have arrived when the first chunk has
            events = []
            async for event in client.stream_image("a large fox"):
                events.append(event)
                if len(events) == 2:
                    proxy.cut()
                    proxy.resume()
            assert bytes_of(events) == data
            assert len(events) > 2


async def test_the_services_errors_name_the_field(real: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await real.get_image("a red fox", size="17x99999")
    assert list(caught.value.violations) == ["spec.size"]
    with pytest.raises(NotCachedError) as missed:
        await real.get_image("a red fox", cache_policy=CachePolicy.ONLY_IF_CACHED)
    assert missed.value.reason == "NOT_CACHED"


async def test_the_example_runs(house: House, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "scripts" / "examples" / "python_client.py"
    async with open_front(house) as front:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(example),
            cwd=tmp_path,
            env=os.environ | {"CACHESERVER_ADDRESS": f"127.0.0.1:{front.server.port}", "PYTHONPATH": str(Path.cwd())},
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
    assert process.returncode == 0
    lines = output.decode().splitlines()
    assert lines[0] == "first from upstream, again from memory, same bytes: True"
    assert "only if cached: NOT_CACHED" in lines
    assert lines[-1] == "downloaded to fox.png, same bytes: True"


async def test_a_download_takes_its_path_as_text_too(real: Any, tmp_path: Path) -> None:
    picture = await real.get_image("a red fox")
    await real.download(str(tmp_path / "fox.png"), "a red fox")
    assert (tmp_path / "fox.png").read_bytes() == picture.data
