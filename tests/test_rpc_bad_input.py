"""Bad input of every kind: the fitting code, the field by name, nothing stored, and the service goes on."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, NullValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheserver.model import CacheKey, TierName
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.wire import _prefix
from tests.fakes import FakeClock
from tests.house import House, open_tier
from tests.provider import small_image
from tests.rpc_front import Front, ask, failure, open_front, spec

KEY = CacheKey("default", bytes(16), bytes(16), 0)
NOW = 1_800_000_000


@pytest.fixture
async def front(clock: FakeClock, tmp_path: Path) -> AsyncIterator[Front]:
    redis = await open_tier(tmp_path / "redis", TierName.REDIS, clock)
    s3 = await open_tier(tmp_path / "s3", TierName.S3, clock)
    house = House(clock=clock, redis=redis, s3=s3)
    async with open_front(house) as front:
        yield front
    await house.aclose()
    await redis.aclose()
    await s3.aclose()


@dataclass(frozen=True)
class Bad:
    """A call that must fail, with the fields its answer has to name."""

    kind: str
    messages: tuple[bytes | Message, ...]
    fields: frozenset[str] = frozenset()
    rpc: str = "GetImage"
    code: str = "INVALID_ARGUMENT"
    reason: str = field(default="")

    def __str__(self) -> str:
        return f"{self.rpc}-{self.kind}".replace(" ", "_")


def bad(kind: str, message: bytes | Message, *fields: str, **more: Any) -> Bad:
    return Bad(kind, (message,), frozenset(fields), **more)


def image(kind: str, what: str, **spec_fields: Any) -> Bad:
    """A GetImage whose spec has something wrong with the field `what`."""
    return bad(kind, pb.GetImageRequest(spec=pb.ImageSpec(**{"prompt": "a red fox", **spec_fields})), f"spec.{what}")


def extra(kind: str, value: Any, *, what: str = "extra.x") -> Bad:
    return image(kind, what, extra=struct(x=value))


def struct(**values: Any) -> Struct:
    made = Struct()
    for name, value in values.items():
        if isinstance(value, Value):
            made.fields[name].CopyFrom(value)
        else:
            made[name] = value
    return made


def nested(depth: int) -> Value:
    value = Value(null_value=NullValue.NULL_VALUE)
    for _ in range(depth):
        value = Value(list_value=ListValue(values=[value]))
    return value


def numbers(count: int) -> Value:
    """A list of zeros, put together as bytes: to append a million values takes seconds."""
    one = ListValue(values=[Value(number_value=0)]).SerializeToString()
    return Value(list_value=ListValue.FromString(one * count))


def terms(kind: str, what: str, **fields: Any) -> Bad:
    """A GetImage with something wrong beside its spec."""
    return bad(kind, ask(**fields), what)


def put(kind: str, what: str, *chunks: bytes, **fields: Any) -> Bad:
    header = pb.PutImageHeader(**{"spec": spec(), **fields})
    parts = [pb.PutImageRequest(header=header), *(pb.PutImageRequest(chunk=chunk) for chunk in chunks)]
    return Bad(kind, tuple(parts), frozenset({what}), "PutImage")


def length_delimited(field_number: int, data: bytes) -> bytes:
    return _prefix(field_number, len(data)) + data


def nested_beyond_bound() -> bytes:
    """A GetImageRequest whose extra nests deeper than protobuf itself would build."""
    value = b""
    for _ in range(60):
        value = length_delimited(6, length_delimited(1, value))
    entry = length_delimited(1, b"x") + length_delimited(2, value)
    return length_delimited(2, length_delimited(1, b"a red fox") + length_delimited(10, length_delimited(1, entry)))


def edit(name: str, path: str, *inputs: pb.InputImage) -> Any:
    return bad(name, ask(of={"inputs": inputs}), f"spec.{path}")


MALFORMED: dict[str, Any] = {"reason": "MALFORMED_MESSAGE"}
PNG = small_image(1)
IMAGE = pb.InputImage(data=PNG)
MASK = pb.InputImage(data=PNG, role="INPUT_ROLE_MASK")

TABLE = [
    # Bytes that are no message.
    bad("noise", b"\xff" * 50, **MALFORMED),
    bad("truncated", ask().SerializeToString()[:-3], **MALFORMED),
    bad("invalid UTF-8", length_delimited(2, length_delimited(1, b"\xff\xfe\xc3\x28")), **MALFORMED),
    bad("wrong wire type", bytes([2 << 3, 1]) + b"\x0b", **MALFORMED),
    bad("nested beyond protobuf's bound", nested_beyond_bound(), **MALFORMED),
    bad("noise", b"\x00\x00", rpc="StreamImage", **MALFORMED),
    bad("noise", b"\x0a", rpc="FindCached", **MALFORMED),
    bad("noise", b"\x0a", rpc="PutImage", **MALFORMED),
    bad("noise", b"\x0a", rpc="PurgeImages", **MALFORMED),
    bad("noise", b"\x0a", rpc="ExplainKey", **MALFORMED),
    bad("noise", b"\x0a", rpc="GetStats", **MALFORMED),
    # What is asked for.
    bad("nothing asked for", b"", "spec"),
    bad("nothing asked for", b"", "request.spec", rpc="StreamImage"),
    image("empty prompt", "prompt", prompt=""),
    image("blank prompt", "prompt", prompt=" \u200b\n"),
    image("33,000 characters", "prompt", prompt="x" * 33_000),
    image("NUL in the prompt", "prompt", prompt="a\0b"),
    image("model with spaces", "model", model="a model"),
    image("model of 10,000 characters", "model", model="m" * 10_000),
    image("size 17x99999", "size", size="17x99999"),
    image("size without height", "size", size="1024"),
    image("size with a sign", "size", size="-64x64"),
    image("size in full-width digits", "size", size="\uff11\uff10\uff12\uff14x1024"),
    image("unknown quality", "quality", quality="best"),
    image("unknown background", "background", background="red"),
    image("unknown format", "output_format", output_format="gif"),
    image("compression 101", "output_compression", output_compression=101),
    image("compression -1", "output_compression", output_compression=-1),
    image("unknown moderation", "moderation", moderation="none"),
    image("transparent jpeg", "background", background="transparent", output_format="jpeg"),
    extra("10 MB of extra", "x" * 10_000_000, what="extra"),
    extra("70 KB of extra", "x" * 70_000, what="extra"),
    extra("a million numbers in extra", numbers(1_000_000), what="extra"),
    extra("extra 17 levels deep", nested(17)),
    extra("NaN in extra", math.nan),
    extra("infinity in extra", [1, -math.inf]),
    extra("a number no double holds", 2.0**60),
    extra("a value without a kind", Value(), what="extra"),
    image("extra repeats a field", "extra.prompt", extra=struct(prompt="another")),
    image("extra sets what the call sets", "extra.n", extra=struct(n=4)),
    edit("an input image without a source", "inputs[0]", pb.InputImage(role="INPUT_ROLE_IMAGE")),
    edit("an input image that is none", "inputs[1].data", IMAGE, pb.InputImage(data=b"GIF89a")),
    edit("an input image of no bytes", "inputs[0].data", pb.InputImage(data=b"")),
    edit("an input image that is cut off", "inputs[0].data", pb.InputImage(data=PNG[:-12])),
    edit("a digest that is none", "inputs[0].digest", pb.InputImage(digest="sha256:0")),
    edit("a digest that does not say its kind", "inputs[0].digest", pb.InputImage(digest="0" * 64)),
    edit("another kind of digest", "inputs[0].digest", pb.InputImage(digest="md5:" + "0" * 64)),
    edit("a role nobody knows", "inputs[0].role", pb.InputImage(data=PNG, role=99)),
    edit("two masks", "inputs[2].role", IMAGE, MASK, MASK),
    edit("a mask that is no PNG", "inputs[1].data", IMAGE, pb.InputImage(data=small_image(1, "jpeg"), role=2)),
    edit("a mask of nothing", "inputs", MASK),
    edit("17 input images", "inputs", *[IMAGE] * 17),
    edit("a digest of what is not cached", "inputs[0].data", pb.InputImage(digest="sha256:" + "0" * 64)),
    bad("a key that is none", pb.GetImageRequest(key="../../etc/passwd"), "key"),
    bad("an empty key", pb.GetImageRequest(key=""), "key"),
    bad("a key of 1 MB", pb.GetImageRequest(key="v1." + "a" * 1_000_000), "key"),
    bad("a key of another version", pb.GetImageRequest(key=KEY.name.replace("v1", "v9")), "key"),
    bad("a key of another partition", pb.GetImageRequest(key=CacheKey("x", bytes(16), bytes(16), 0).name), "key"),
    bad("a key of a stand-in", pb.GetImageRequest(key=KEY.stand_in.name), "key"),
    bad("a key of a rendition", pb.GetImageRequest(key=KEY.rendition(bytes(32)).name), "key"),
    bad("several by key", pb.GetImageRequest(key=KEY.name, n=2), "n"),
    bad("refresh by key", pb.GetImageRequest(key=KEY.name, cache_policy="CACHE_POLICY_REFRESH"), "cache_policy"),
    bad("another one by key", pb.GetImageRequest(key=KEY.name, variant_policy="VARIANT_POLICY_NEXT"), "variant_policy"),
    # On what terms.
    terms("n 0", "n", n=0),
    terms("n 11", "n", n=11),
    terms("n -1", "n", n=-1),
    terms("unknown namespace", "namespace", namespace="nowhere"),
    terms("a namespace that is a path", "namespace", namespace="../default"),
    terms("unknown cache policy", "cache_policy", cache_policy=99),
    terms("unknown variant policy", "variant_policy", variant_policy=99),
    terms("unknown delivery", "delivery", delivery=-1),
    terms("unknown priority", "priority", priority=2**31 - 1),
    terms("unknown match level", "match_level", match_level=77),
    terms("negative max_age", "max_age", max_age=Duration(seconds=-1)),
    terms("negative nanoseconds", "max_age", max_age=Duration(nanos=-1)),
    terms("nanoseconds beyond a second", "max_age", max_age=Duration(nanos=2_000_000_000)),
    terms("max_age of ages", "max_age", max_age=Duration(seconds=2**62)),
    terms("no ttl at all", "ttl", ttl=Duration()),
    terms("negative max_wait", "max_wait", max_wait=Duration(seconds=-5)),
    terms("max_wait of a year", "max_wait", max_wait=Duration(seconds=31_536_000)),
    terms("1,001 exclude_keys", "exclude_keys", exclude_keys=[KEY.name] * 1_001),
    bad("bad exclude_keys", ask(exclude_keys=[KEY.name, "x", KEY.name, ""]), "exclude_keys[1]", "exclude_keys[3]"),
    terms("negative max_inline_bytes", "max_inline_bytes", max_inline_bytes=-1),
    terms("max_inline_bytes beyond all memory", "max_inline_bytes", max_inline_bytes=2**62),
    terms("request_id of 129 characters", "request_id", request_id="r" * 129),
    terms("request_id with a line break", "request_id", request_id="a\nb"),
    terms("17 tags", "tags", tags=[f"t{i}" for i in range(17)]),
    terms("an empty tag", "tags[0]", tags=[""]),
    terms("a tag with a space", "tags[1]", tags=["fine", "not fine"]),
    terms("a use the namespace does not know", "use", use="thumbnail"),
    terms("no candidates", "candidates", candidates=0),
    terms("more candidates than may be", "candidates", candidates=5),
    bad(
        "everything at once",
        ask("", n=0, namespace="", tags=["?"], of={"size": "0x0"}),
        "spec.prompt",
        "spec.size",
        "n",
        "tags[0]",
    ),
    # The other calls.
    bad("negative offset", pb.StreamImageRequest(request=ask(), read_offset=-1), "read_offset", rpc="StreamImage"),
    bad("offset of several", pb.StreamImageRequest(request=ask(n=2), read_offset=1), "read_offset", rpc="StreamImage"),
    bad("digest of several", pb.StreamImageRequest(request=ask(n=2), if_digest="x"), "if_digest", rpc="StreamImage"),
    bad("no digest", pb.StreamImageRequest(request=ask(), if_digest="md5:0"), "if_digest", rpc="StreamImage"),
    bad("bad spec", pb.StreamImageRequest(request=ask("")), "request.spec.prompt", rpc="StreamImage"),
    bad("10,001 items", pb.FindCachedRequest(items=[pb.FindItem()] * 10_001), "items", rpc="FindCached"),
    bad(
        "variant of a key",
        pb.FindCachedRequest(items=[pb.FindItem(key=KEY.name, variant=1)]),
        "items[0].variant",
        rpc="FindCached",
    ),
    bad(
        "variant 10,000",
        pb.FindCachedRequest(items=[pb.FindItem(spec=spec(), variant=10_000)]),
        "items[0].variant",
        rpc="FindCached",
    ),
    Bad("no message", (), frozenset({"header"}), "PutImage"),
    bad("chunk first", pb.PutImageRequest(chunk=PNG), "header", rpc="PutImage"),
    bad("empty part first", pb.PutImageRequest(), "header", rpc="PutImage"),
    Bad(
        "two headers",
        (pb.PutImageRequest(header=pb.PutImageHeader(spec=spec())),) * 2,
        frozenset({"chunk"}),
        "PutImage",
    ),
    put("no bytes", "chunk"),
    put("no image", "chunk", b"GIF89a" + bytes(100)),
    put("half an image", "chunk", PNG[: len(PNG) // 2]),
    put("another format", "chunk", PNG, spec=spec(output_format="jpeg")),
    put("no prompt", "header.spec.prompt", PNG, spec=pb.ImageSpec()),
    put("no digest", "header.digest", PNG, digest="sha256:xyz"),
    put("another digest", "header.digest", PNG, digest="sha256:" + "0" * 64),
    put("negative price", "header.paid_microusd", PNG, paid_microusd=-1),
    put("a price beyond all budgets", "header.paid_microusd", PNG, paid_microusd=2**62),
    put("made tomorrow", "header.create_time", PNG, create_time=Timestamp(seconds=NOW + 86_400)),
    put("made before 1970", "header.create_time", PNG, create_time=Timestamp(seconds=-1)),
    put("negative ttl", "header.ttl", PNG, ttl=Duration(seconds=-1)),
    put("unknown namespace", "header.namespace", PNG, namespace="nowhere"),
    bad("no selector", b"", "selector", rpc="PurgeImages"),
    bad("everything false", pb.PurgeImagesRequest(everything=False), "selector", rpc="PurgeImages"),
    bad("bad key", pb.PurgeImagesRequest(key="x"), "key", rpc="PurgeImages"),
    bad("bad tag", pb.PurgeImagesRequest(tag="*"), "tag", rpc="PurgeImages"),
    bad("bad spec", pb.PurgeImagesRequest(spec=spec("")), "spec.prompt", rpc="PurgeImages"),
    bad(
        "two bad specs",
        pb.ExplainKeyRequest(spec=spec(""), other=spec(size="x")),
        "spec.prompt",
        "other.size",
        rpc="ExplainKey",
    ),
    bad("unknown match level", pb.ExplainKeyRequest(spec=spec(), match_level=9), "match_level", rpc="ExplainKey"),
    bad("unknown namespace", pb.GetStatsRequest(namespace="nowhere"), "namespace", rpc="GetStats"),
]


async def check_nothing_was_stored(front: Front) -> None:
    assert front.house.upstream.calls == 0
    assert list(front.house.memory.scan("default")) == []
    for tier in (front.house.redis, front.house.s3):
        assert [key async for key in tier.scan("default")] == []


def values_of(messages: Iterable[bytes | Message]) -> set[str]:
    """Texts of a call that must not come back in its answer."""
    prompts = {m.spec.prompt for m in messages if isinstance(m, pb.GetImageRequest)}
    return {prompt for prompt in prompts if len(prompt) > 3}


@pytest.mark.parametrize("case", TABLE, ids=str)
async def test_bad_input_is_refused_by_name_and_leaves_nothing_behind(front: Front, case: Bad) -> None:
    refused = await failure(front.raw(case.rpc, *case.messages))
    assert (refused.code, refused.reason) == (case.code, case.reason or "INVALID_FIELD")
    assert set(refused.fields) == case.fields
    assert all(refused.fields.values())
    assert refused.message
    assert not any(value in refused.message for value in values_of(case.messages))
    await check_nothing_was_stored(front)


async def test_after_all_of_it_the_service_serves(front: Front) -> None:
    for case in TABLE:
        await failure(front.raw(case.rpc, *case.messages))
    await check_nothing_was_stored(front)
    assert len((await front.stub.GetImage(ask())).images) == 1
    assert front.house.upstream.calls == 1


async def test_the_table_holds_many_kinds() -> None:
    assert len({str(case) for case in TABLE}) == len(TABLE) > 100


async def test_a_message_above_the_bound_is_refused_by_grpc_itself(front: Front) -> None:
    assert (await failure(front.raw("GetImage", ask("x" * 26_000_000)))).code == "RESOURCE_EXHAUSTED"
    assert len((await front.stub.GetImage(ask())).images) == 1


async def test_a_malformed_message_does_not_tell_our_types(front: Front) -> None:
    refused = await failure(front.raw("GetImage", b"\xff" * 50))
    assert refused.message == "The bytes are not a GetImageRequest."


async def test_every_violation_of_a_thousand_still_fits_the_answer(front: Front) -> None:
    refused = await failure(front.raw("GetImage", ask(exclude_keys=["x"] * 1_000)))
    assert refused.code == "INVALID_ARGUMENT"
    assert len(refused.fields) == 10


texts = st.text(max_size=20)
requests = st.builds(
    pb.GetImageRequest,
    namespace=st.just("") | texts,
    spec=st.none()
    | st.builds(pb.ImageSpec, prompt=texts, model=texts, size=texts, quality=texts, seed=st.integers(0, 9)),
    n=st.none() | st.integers(-(2**31), 2**31 - 1),
    cache_policy=st.integers(-5, 10),
    max_age=st.none()
    | st.builds(Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=st.integers(-(2**31), 2**31 - 1)),
    ttl=st.none() | st.builds(Duration, seconds=st.integers(-(2**63), 2**63 - 1)),
    delivery=st.integers(-5, 10),
    max_inline_bytes=st.integers(-(2**63), 2**63 - 1),
    exclude_keys=st.lists(texts, max_size=3),
    request_id=texts,
    tags=st.lists(texts, max_size=3),
    use=st.just("") | texts,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests)
async def test_no_request_whatever_is_our_fault(front: Front, request: pb.GetImageRequest) -> None:
    request.max_wait.SetInParent()  # answer at once: nothing here is worth waiting for
    refusals = {"INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION", "NOT_FOUND"}
    assert await code_of(front.raw("GetImage", request)) in {"OK", *refusals}


async def code_of(call: Awaitable[Any]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"
