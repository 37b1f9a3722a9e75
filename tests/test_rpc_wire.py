"""Replies joined by hand parse equal to those protobuf builds."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import wire

facts = st.builds(
    pb.Image,
    key=st.text(max_size=200),
    width=st.integers(0, 2**31 - 1),
    revised_prompt=st.text(max_size=300),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    usage=st.builds(pb.Usage, total_tokens=st.integers(0, 2**40)),
)
# Lengths on both sides of where a varint grows by a byte.
datas = st.binary(max_size=300) | st.sampled_from([0, 1, 127, 128, 16_383, 16_384, 2_097_152]).map(bytes)
statuses = st.builds(pb.CacheStatus, tier=st.sampled_from(pb.Tier.values()), collapsed=st.booleans())


@given(st.lists(st.tuples(facts, datas), max_size=4), statuses)
def test_a_response_with_spliced_images_is_the_one_protobuf_builds(
    images: list[tuple[pb.Image, bytes]], status: pb.CacheStatus
) -> None:
    rest = pb.GetImageResponse(status=status, image_status=[status] * len(images))
    expected = pb.GetImageResponse(status=status, image_status=[status] * len(images))
    for fact, data in images:
        image = expected.images.add()
        image.CopyFrom(fact)
        image.data = data
    assert pb.GetImageResponse.FromString(wire.image_response(images, rest)) == expected


@given(datas)
def test_a_spliced_chunk_is_the_one_protobuf_builds(data: bytes) -> None:
    assert wire.chunk_event(memoryview(data)) == pb.StreamImageResponse(chunk=data).SerializeToString()


presences = st.builds(
    pb.FoundItem, presence=st.sampled_from(pb.Presence.values()), tier=st.sampled_from(pb.Tier.values())
)


@given(st.lists(st.tuples(st.text(min_size=1, max_size=200), presences), max_size=4), st.sampled_from(pb.Tier.values()))
def test_found_items_joined_by_hand_are_the_bytes_protobuf_builds(
    items: list[tuple[str, pb.FoundItem]], tier: pb.Tier
) -> None:
    expected = pb.FindCachedResponse(unknown_tiers=[tier])
    for key, presence in items:
        item = expected.items.add(key=key)
        item.MergeFrom(presence)
    found = b"".join(wire.found_item(key, presence.SerializeToString()) for key, presence in items)
    assert found + pb.FindCachedResponse(unknown_tiers=[tier]).SerializeToString() == expected.SerializeToString()


def test_an_empty_image_still_has_content() -> None:
    [image] = pb.GetImageResponse.FromString(
        wire.image_response([(pb.Image(key="k", content_type="image/png"), b"")], pb.GetImageResponse())
    ).images
    assert (image.key, image.content_type, image.WhichOneof("content")) == ("k", "image/png", "data")


responses = st.builds(pb.GetImageResponse, images=st.lists(facts, max_size=3), status=statuses)


@given(st.lists(st.tuples(st.text(min_size=1, max_size=200), responses), max_size=4))
def test_a_batchs_answers_joined_are_the_message_protobuf_builds(
    answers: list[tuple[str, pb.GetImageResponse]],
) -> None:
    items = [pb.BatchItem(request_id=request_id, response=response) for request_id, response in answers]
    pieces = [wire.batch_item(request_id, response.SerializeToString()) for request_id, response in answers]
    joined = b"".join(piece for both in pieces for piece in both)
    assert joined == pb.BatchGetImagesResponse(items=items).SerializeToString()


requests = st.builds(
    pb.GetImageRequest,
    namespace=st.text(max_size=200),
    spec=st.builds(pb.ImageSpec, prompt=st.text(max_size=300), seed=st.none() | st.integers(0, 2**40)),
    n=st.none() | st.integers(-(2**31), 2**31 - 1),
    max_inline_bytes=st.integers(-(2**63), 2**63 - 1),
    request_id=st.text(max_size=20),
    tags=st.lists(st.text(max_size=10), max_size=3),
    allow_degraded=st.booleans(),
)


@given(requests)
def test_the_fields_of_a_message_are_all_of_it_in_the_order_they_lie(message: pb.GetImageRequest) -> None:
    raw = message.SerializeToString()
    fields = wire.fields(raw)
    assert fields is not None
    assert b"".join(raw[start:end] for _, start, _, end in fields) == raw
    ids = [raw[value:end].decode() for number, _, value, end in fields if number == 14]
    assert ids == ([message.request_id] if message.request_id else [])
    within = wire.fields(b"\x01\x02" + raw + b"\x03", 2, 2 + len(raw))
    assert within == [(number, start + 2, value + 2, end + 2) for number, start, value, end in fields]


@given(requests, st.data())
def test_bytes_that_protobuf_parses_to_something_else_have_no_fields(
    message: pb.GetImageRequest, data: st.DataObject
) -> None:
    raw = bytearray(message.SerializeToString())
    if raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    fields = wire.fields(cut)
    try:
        parsed = pb.GetImageRequest.FromString(cut)
    except DecodeError:
        return
    if fields is not None:
        ids = [cut[value:end] for number, start, value, end in fields if number == 14 and cut[start] & 7 == 2]
        assert (ids[-1].decode() if ids else "") == parsed.request_id


@pytest.mark.parametrize(
    "raw",
    [
        b"\x0a",  # a length is missing
        b"\x0a\x05abc",  # and bytes are
        b"\x0a\xff",  # a length that does not end
        b"\x08" + b"\xff" * 11 + b"\x01",  # a number of 12 bytes
        b"\x02\x00",  # field 0
        b"\x0b\x0c",  # a group
        b"\x0d\x00\x00",  # a fixed number cut off
        b"\xf2\x00\x01a",  # field 14, in two bytes
    ],
)
def test_what_is_no_message_has_no_fields(raw: bytes) -> None:
    assert wire.fields(raw) is None
