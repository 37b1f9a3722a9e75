"""Protobuf's wire format by hand, for the one thing protobuf does slowly: carrying image bytes.

Protobuf copies a picture into the message and again when it serializes. Here the small fields are serialized
by protobuf and the picture is joined in once, as the length-delimited field it is on the wire: a tag, a
length, the bytes. What comes out parses equal to the message built the usual way.
"""

from __future__ import annotations

from collections.abc import Sequence

from cacheserver.pb import promptcache_pb2 as pb

_LENGTH_DELIMITED = 2
_MORE_FOLLOWS = 0x80


def image_response(images: Sequence[tuple[pb.Image, bytes]], rest: pb.GetImageResponse) -> bytes:
    """A GetImageResponse as bytes: each image's facts with its data, then `rest`, which holds no images.

    `images` pairs facts without content with the encoded picture.
    """
    parts: list[bytes] = []
    for facts, data in images:
        fields = facts.SerializeToString()
        data_prefix = _prefix(pb.Image.DATA_FIELD_NUMBER, len(data))
        size = len(data_prefix) + len(data) + len(fields)
        parts += (_prefix(pb.GetImageResponse.IMAGES_FIELD_NUMBER, size), data_prefix, data, fields)
    parts.append(rest.SerializeToString())
    return b"".join(parts)


def batch_response(request_id: str, response: bytes) -> bytes:
    """A BatchGetImagesResponse as bytes with one item: `response`, a GetImageResponse as bytes."""
    fields = pb.BatchItem(request_id=request_id).SerializeToString()
    prefix = _prefix(pb.BatchItem.RESPONSE_FIELD_NUMBER, len(response))
    size = len(fields) + len(prefix) + len(response)
    return b"".join((_prefix(pb.BatchGetImagesResponse.ITEMS_FIELD_NUMBER, size), fields, prefix, response))


def chunk_event(chunk: memoryview) -> bytes:
    """A StreamImageResponse as bytes that carries `chunk`."""
    return b"".join((_prefix(pb.StreamImageResponse.CHUNK_FIELD_NUMBER, len(chunk)), chunk))


def _prefix(field_number: int, size: int) -> bytes:
    """What precedes a length-delimited field of `size` bytes."""
    return _varint(field_number << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(number: int) -> bytes:
    """`number` in base 128, least significant group first, every byte but the last marked."""
    encoded = bytearray()
    while number >= _MORE_FOLLOWS:
        encoded.append(number & 0x7F | _MORE_FOLLOWS)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
