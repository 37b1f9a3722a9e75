"""Replies joined by hand parse equal to those protobuf builds."""

from __future__ import annotations

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


def test_an_empty_image_still_has_content() -> None:
    [image] = pb.GetImageResponse.FromString(
        wire.image_response([(pb.Image(key="k", content_type="image/png"), b"")], pb.GetImageResponse())
    ).images
    assert (image.key, image.content_type, image.WhichOneof("content")) == ("k", "image/png", "data")


@given(st.text(max_size=200), st.lists(facts, max_size=3), statuses)
def test_a_batchs_answer_is_the_one_protobuf_builds(
    request_id: str, images: list[pb.Image], status: pb.CacheStatus
) -> None:
    response = pb.GetImageResponse(images=images, status=status)
    expected = pb.BatchGetImagesResponse(items=[pb.BatchItem(request_id=request_id, response=response)])
    spliced = wire.batch_response(request_id, response.SerializeToString())
    assert pb.BatchGetImagesResponse.FromString(spliced) == expected
