"""Requests taken apart by hand say what protobuf reads in them."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.split import lasting, prompted
from tests.rpc_front import ask, spec


def fields(**of: object) -> bytes:
    return pb.GetImageRequest(**of).SerializeToString()  # type: ignore[arg-type] # fields of the message


SPEC = b"\x12"
IDS = (fields(request_id="one"), fields(request_id=""), fields(tags=["a", "b"]), b"\x72\x03two")
PARTS = (
    *IDS,
    ask("a red fox").SerializeToString(),
    ask("a red fox", of={"quality": "high", "seed": 7}).SerializeToString(),
    fields(spec=spec("", size="1024x1024")),
    fields(key="v1.a.b"),
    fields(namespace="shop"),
    fields(n=2),
    fields(max_age={"seconds": 1}),
    SPEC + b"\x0a\x0a\x03one\x0a\x03two",  # two prompts
    SPEC + b"\x02\x08\x05",  # a number in place of the prompt
    SPEC + b"\x04\x0a\x02\xff\xfe",  # no text
    SPEC + b"\x82\x00\x0a\x00",  # a length in more bytes than it takes
    b"\xf8\x07\x05",
    b"\x9b\x06\x9c\x06",
    b"\x0a",
)
raws = st.lists(st.sampled_from(PARTS), max_size=5).map(b"".join)


def read(raw: bytes) -> pb.GetImageRequest | None:
    """What protobuf reads, without what may differ; None if it reads nothing."""
    try:
        message = pb.GetImageRequest.FromString(raw)
    except DecodeError:
        return None
    message.ClearField("request_id")
    message.ClearField("tags")
    return message


@given(raws)
def test_what_lasts_of_a_request_is_all_but_its_ids(raw: bytes) -> None:
    message, rest = read(raw), lasting(raw)
    if message is not None and rest is not None:
        assert pb.GetImageRequest.FromString(rest) == message


@given(raws)
@example(ask().SerializeToString() + fields(key="v1.a.b"))
@example(fields(key="v1.a.b") + ask().SerializeToString())
def test_a_request_taken_apart_has_the_prompt_that_protobuf_reads(raw: bytes) -> None:
    message, parts = read(raw), prompted(raw)
    if message is not None and parts is not None:
        assert message.WhichOneof("what") == "spec"
        assert message.spec.prompt == parts[0]


@given(st.lists(raws, min_size=2, max_size=40))
def test_requests_that_are_alike_beside_their_prompts_are_so_for_protobuf(several: list[bytes]) -> None:
    seen: dict[tuple[bytes, bytes], pb.GetImageRequest] = {}
    for raw in several:
        message, parts = read(raw), prompted(raw)
        if message is None or parts is None:
            continue
        message.spec.ClearField("prompt")
        assert seen.setdefault(parts[1], message) == message


def test_requests_that_differ_in_their_prompts_and_ids_alone_are_alike() -> None:
    first = prompted(ask("a red fox", request_id="one", n=1).SerializeToString())
    other = prompted(ask("a blue whale", tags=["t"], n=1).SerializeToString())
    assert first is not None
    assert other is not None
    assert first[1] == other[1]
    assert (first[0], other[0]) == ("a red fox", "a blue whale")
    third = prompted(ask("a red fox", n=2).SerializeToString())
    assert third is not None
    assert third[1] != first[1]
