"""Protobuf's wire format by hand, for the one thing protobuf does slowly: carrying image bytes.

Protobuf copies a picture into the message and again when it serializes. Here the small fields are serialized
by protobuf and the picture is joined in once, as the length-delimited field it is on the wire: a tag, a
length, the bytes. What comes out parses equal to the message built the usual way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

from cacheserver.model import ImageBytes
from cacheserver.pb import promptcache_pb2 as pb

_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
_MORE_FOLLOWS = 0x80
_LONGEST_VARINT = 10


Field: TypeAlias = tuple[int, int, int, int]
"""A field of a message in `raw`: its number, where all of it begins, where what follows tag and length, and its end."""


def fields(raw: bytes, start: int = 0, end: int | None = None) -> list[Field] | None:
    """The fields of the message in `raw[start:end]`, its submessages unread; None if protobuf would not write it so.

    It is for those who take a message apart that protobuf need not parse: in doubt let protobuf do it, and find fault.
    """
    found: list[Field] = []
    at, size = start, len(raw) if end is None else end
    try:
        while at < size:
            start = at
            tag = raw[at]
            if tag < _MORE_FOLLOWS:
                at += 1
            else:
                tag, at = _read_varint(raw, at)
            kind = tag & 7
            if kind == _LENGTH_DELIMITED:
                length = raw[at]
                if length < _MORE_FOLLOWS:
                    at += 1
                else:
                    length, at = _read_varint(raw, at)
                value, at = at, at + length
            elif kind == _VARINT:
                value = at
                while raw[at] >= _MORE_FOLLOWS:
                    at += 1
                at += 1
                if at - value > _LONGEST_VARINT:
                    return None
            else:
                value, at = at, at + _FIXED_BYTES[kind]
            if not tag >> 3:
                return None
            found.append((tag >> 3, start, value, at))
    except LookupError:  # cut off in the middle, or of a kind that is written no more
        return None
    return found if at == size else None


def one_image_response(facts: pb.Image, data: ImageBytes, rest: pb.GetImageResponse) -> tuple[bytes, int]:
    """A GetImageResponse as bytes with one image, as `image_response` makes it, and where in it the picture begins."""
    fields = facts.SerializeToString()
    data_prefix = _prefix(pb.Image.DATA_FIELD_NUMBER, len(data))
    size = len(data_prefix) + len(data) + len(fields)
    head = _prefix(pb.GetImageResponse.IMAGES_FIELD_NUMBER, size) + data_prefix
    return b"".join((head, data, fields, rest.SerializeToString())), len(head)


def image_response(images: Sequence[tuple[pb.Image, ImageBytes]], rest: pb.GetImageResponse) -> bytes:
    """A GetImageResponse as bytes: each image's facts with its data, then `rest`, which holds no images.

    `images` pairs facts without content with the encoded picture.
    """
    parts: list[ImageBytes] = []
    for facts, data in images:
        fields = facts.SerializeToString()
        data_prefix = _prefix(pb.Image.DATA_FIELD_NUMBER, len(data))
        size = len(data_prefix) + len(data) + len(fields)
        parts += (_prefix(pb.GetImageResponse.IMAGES_FIELD_NUMBER, size), data_prefix, data, fields)
    parts.append(rest.SerializeToString())
    return b"".join(parts)


def batch_item(request_id: str, response: bytes) -> tuple[bytes, bytes]:
    """One item of a BatchGetImagesResponse that answers with `response`, a GetImageResponse as bytes.

    In two pieces, the second `response` itself: the pieces of many items joined are a BatchGetImagesResponse.
    """
    name = request_id.encode()
    facts = b"".join(
        (
            _prefix(pb.BatchItem.REQUEST_ID_FIELD_NUMBER, len(name)),
            name,
            _prefix(pb.BatchItem.RESPONSE_FIELD_NUMBER, len(response)),
        )
    )
    return _prefix(pb.BatchGetImagesResponse.ITEMS_FIELD_NUMBER, len(facts) + len(response)) + facts, response


def found_item(key: str, presence: bytes) -> bytes:
    """A FindCachedResponse as bytes with one item: `key`, and the other fields of a FoundItem as bytes."""
    name = key.encode()
    return b"".join((_found_prefix(len(name), len(presence)), name, presence))


@lru_cache(maxsize=1_024)
def _found_prefix(name_size: int, presence_size: int) -> bytes:
    name_prefix = _prefix(pb.FoundItem.KEY_FIELD_NUMBER, name_size)
    return _prefix(pb.FindCachedResponse.ITEMS_FIELD_NUMBER, len(name_prefix) + name_size + presence_size) + name_prefix


def chunk_event(chunk: memoryview) -> bytes:
    """A StreamImageResponse as bytes that carries `chunk`."""
    return b"".join((_prefix(pb.StreamImageResponse.CHUNK_FIELD_NUMBER, len(chunk)), chunk))


@lru_cache(maxsize=1_024)  # answers come in the same sizes again, and to make it takes a microsecond
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


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at` and takes several bytes, and where it ends.

    Raises IndexError if it does not end, and if it takes more than it need: one field had several spellings.
    """
    number = shift = 0
    while (group := raw[at]) >= _MORE_FOLLOWS:
        number |= (group & 0x7F) << shift
        shift += 7
        at += 1
        if shift >= 7 * _LONGEST_VARINT:
            raise IndexError
    if not group:
        raise IndexError
    return number | group << shift, at + 1
