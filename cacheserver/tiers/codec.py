"""An entry as bytes, for Redis and disk, and its metadata as JSON, for object storage too.

    magic            4 bytes   "PCEN"
    codec version    2
    metadata length  4         all numbers big-endian
    metadata                   JSON; states the image's length and xxh3-128
    head checksum   16         xxh3-128 of all the above
    image                      to the end

The checksums find damage, not forgery; the identity digest in the metadata settles whose picture it is.
Readers lead writers: a new version has its layout here one release before `WRITE_VERSION` is raised to it, so that a
rolling upgrade never meets an entry it cannot read; what is newer still is unknown, not absent.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from cacheserver.epochs import Epochs
from cacheserver.errors import CorruptEntryError, EntryTooLargeError, NewerEntryError
from cacheserver.model import CachedImage, CacheKey, GeneratedImage, Head, ImageBytes, JsonValue, Labels, Usage

WRITE_VERSION = 1
"""The codec version we write unless told otherwise: the newest that the release before this one reads."""

MAX_METADATA_BYTES = 512 * 1024
"""Most that an entry's metadata may take; a revised prompt of 32,000 characters fits."""

_PREAMBLE = struct.Struct(">4sHI")
_MAGIC = b"PCEN"
_CHECKSUM_BYTES = 16

PREAMBLE_BYTES = _PREAMBLE.size
"""How much of an entry tells how long its head is."""

MAX_HEAD_BYTES = PREAMBLE_BYTES + MAX_METADATA_BYTES + _CHECKSUM_BYTES
"""Most that lies before the image."""

_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1
_MAX_SECONDS = 253_402_300_799  # the year 9999, where protobuf's timestamps end


@dataclass(frozen=True, slots=True)
class Metadata:
    """All of an entry but its bytes, and what its bytes must be.

    `bare` is the entry with an empty image; `xxh3` the hexadecimal xxh3-128 of the image.
    """

    bare: CachedImage
    size_bytes: int
    xxh3: str

    @property
    def head(self) -> Head:
        """The entry without its bytes."""
        return Head(self.bare, self.size_bytes)

    @property
    def labels(self) -> Labels:
        """What purge selects the entry by."""
        return Labels(
            namespace=self.bare.namespace,
            tags=self.bare.tags,
            derived_from=self.bare.derived_from,
            epoch=self.bare.epoch,
            carried_from=self.bare.carried_from,
        )

    def entry(self, data: ImageBytes) -> CachedImage:
        """The whole entry, its bytes verified.

        Raises:
            CorruptEntryError: `data` is not the image that was stored.
        """
        _verify(data, self.size_bytes, self.xxh3)
        return replace(self.bare, image=replace(self.bare.image, data=data))


def encode(entry: CachedImage, version: int = WRITE_VERSION) -> bytes:
    """The entry as bytes.

    Raises:
        EntryTooLargeError: its metadata is above MAX_METADATA_BYTES.
    """
    return b"".join((encode_head(entry, version), entry.image.data))


def encode_head(entry: CachedImage, version: int = WRITE_VERSION) -> bytes:
    """What lies before the entry's image: the whole of `encode` without copying the image.

    Raises:
        EntryTooLargeError: its metadata is above MAX_METADATA_BYTES.
    """
    metadata = pack_metadata(entry, version)
    head = _PREAMBLE.pack(_MAGIC, version, len(metadata)) + metadata
    return head + xxh3_128_digest(head)


def decode(stored: ImageBytes) -> CachedImage:
    """The entry that `encode` made `stored` from; its picture is a view into `stored`, which it keeps alive.

    Raises:
        CorruptEntryError: damaged or not an entry.
        NewerEntryError: written by a newer release.
    """
    view = memoryview(stored)
    end = head_length(view)
    version, packed = _checked(view[:end])
    return unpack_entry(packed, view[end:], version)


def head_length(start: ImageBytes) -> int:
    """How many bytes lie before the image, from the first PREAMBLE_BYTES or more.

    Raises:
        CorruptEntryError: damaged or not an entry.
        NewerEntryError: written by a newer release.
    """
    if len(start) < PREAMBLE_BYTES:
        raise CorruptEntryError("the stored entry is cut short")
    magic, version, metadata_bytes = _PREAMBLE.unpack_from(start)
    if magic != _MAGIC:
        raise CorruptEntryError("what is stored is not an entry")
    check_version(version)
    if metadata_bytes > MAX_METADATA_BYTES:
        raise CorruptEntryError("the stored entry claims more metadata than there can be")
    return PREAMBLE_BYTES + int(metadata_bytes) + _CHECKSUM_BYTES


def decode_head(head: ImageBytes) -> Metadata:
    """The metadata in the first `head_length` bytes.

    Raises:
        CorruptEntryError: damaged or not an entry.
    """
    version, packed = _checked(head)
    return unpack_metadata(packed, version)


def _checked(head: ImageBytes) -> tuple[int, bytes]:
    """The codec version, and the packed metadata, of the first `head_length` bytes."""
    if len(head) != head_length(head):
        raise CorruptEntryError("the stored entry is cut short")
    checked, checksum = head[:-_CHECKSUM_BYTES], head[-_CHECKSUM_BYTES:]
    if xxh3_128_digest(checked) != checksum:
        raise CorruptEntryError("the stored metadata does not match its checksum")
    _, version, _ = _PREAMBLE.unpack_from(checked)
    return version, bytes(checked[PREAMBLE_BYTES:])


def check_version(version: int) -> None:
    """Return if this release can read codec version `version`.

    Raises:
        CorruptEntryError: there never was such a version.
        NewerEntryError: written by a newer release.
    """
    if version > (newest := max(LAYOUTS)):
        raise NewerEntryError(f"the stored entry has codec version {version}; this release reads up to {newest}")
    if version < 1:
        raise CorruptEntryError("the stored entry has codec version 0, which never was")


def answers(entry: CachedImage, key: CacheKey, now_s: float, epochs: Epochs, *, stale_s: float = 0.0) -> bool:
    """Whether a stored entry may be served for `key`: of its partition and identity, fresh, and not gone.

    With `stale_s` also one that expired less than so long ago.
    """
    is_of_key = entry.key.partition == key.partition and key.matches(entry.key.digest)
    return is_of_key and entry.is_fresh(now_s - stale_s) and not epochs.is_gone(entry.key, entry)


def pack_metadata(entry: CachedImage, version: int = WRITE_VERSION) -> bytes:
    """The entry's metadata in the layout of a codec version.

    Raises:
        EntryTooLargeError: it is above MAX_METADATA_BYTES.
    """
    packed = LAYOUTS[version].pack(entry)
    if len(packed) > MAX_METADATA_BYTES:
        raise EntryTooLargeError(f"the entry has {len(packed)} bytes of metadata; at most {MAX_METADATA_BYTES} fit")
    return packed


def _packed(entry: CachedImage) -> bytes:
    """The metadata as JSON."""
    image = entry.image
    usage = image.usage
    fields: dict[str, JsonValue] = {
        "key": entry.key.name,
        "identity": entry.key.digest.hex(),
        "namespace": entry.namespace,
        "prompt_digest": entry.prompt_digest.hex(),
        "create_time_s": entry.create_time_s,
        "expire_time_s": entry.expire_time_s,
        "tags": list(entry.tags),
        "size_bytes": len(image.data),
        "xxh3": xxh3_128_hexdigest(image.data),
        "sha256": image.sha256,
        "content_type": image.content_type,
        "width": image.width,
        "height": image.height,
        "model": image.model,
        "size": image.size,
        "quality": image.quality,
        "background": image.background,
        "revised_prompt": image.revised_prompt,
        "seed": image.seed,
        "usage": None if usage is None else [getattr(usage, name) for name in _USAGE_FIELDS],
        "upstream": image.upstream,
        "upstream_request_id": image.upstream_request_id,
        "generation_s": image.generation_s,
        "paid_microusd": image.paid_microusd,
        "score": image.score,
        "won_against": image.won_against,
        "derived_from": entry.derived_from,
        "derived_by": [*sorted(entry.derived_by)],
        "epoch": entry.epoch,
        "carried_from": [*entry.carried_from],
    }
    if entry.sliding_s:
        fields["sliding_s"] = entry.sliding_s
    if entry.canonical_digest:
        fields["canonical_digest"] = entry.canonical_digest.hex()
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A provider's JSON may hold half a surrogate pair; such a revised prompt must not cost us the picture.
    return text.encode("utf-8", "surrogatepass")


def unpack_metadata(packed: bytes, version: int = WRITE_VERSION) -> Metadata:
    """The metadata that `pack_metadata` made `packed` from. Fields we do not know are passed over.

    Raises:
        CorruptEntryError: `packed` is not that.
    """
    return Metadata(*LAYOUTS[version].unpack(packed, b""))


def unpack_entry(packed: bytes, data: ImageBytes, version: int = WRITE_VERSION) -> CachedImage:
    """The whole entry of the metadata that `pack_metadata` made `packed` from, its bytes verified.

    Raises:
        CorruptEntryError: `packed` is not that, or `data` not the image that was stored.
    """
    entry, size_bytes, xxh3 = LAYOUTS[version].unpack(packed, data)
    _verify(data, size_bytes, xxh3)
    return entry


def _verify(data: ImageBytes, size_bytes: int, xxh3: str) -> None:
    if len(data) != size_bytes:
        raise CorruptEntryError(f"the stored image has {len(data)} bytes and should have {size_bytes}")
    if xxh3_128_hexdigest(data) != xxh3:
        raise CorruptEntryError("the stored image does not match its checksum")


def _unpacked(packed: bytes, data: ImageBytes) -> tuple[CachedImage, int, str]:
    """The entry with these bytes, and the length and xxh3-128 that they must have."""
    try:
        fields = json.loads(packed.decode("utf-8", "surrogatepass"))
        return _entry(fields, data), _whole(fields["size_bytes"], 0, _MAX_INT64), _text(fields["xxh3"])
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise CorruptEntryError("the stored metadata does not parse") from exc


class Layout(NamedTuple):
    """How one codec version packs an entry's metadata, and how it reads the entry, its length and its xxh3-128 from it.

    `unpack` takes the metadata and the image, and raises CorruptEntryError.
    """

    pack: Callable[[CachedImage], bytes]
    unpack: Callable[[bytes, ImageBytes], tuple[CachedImage, int, str]]


LAYOUTS: dict[int, Layout] = {1: Layout(_packed, _unpacked)}
"""Every codec version that can be read, up to one above WRITE_VERSION. None goes: entries outlive releases."""


_USAGE_FIELDS = ("input_tokens", "input_text_tokens", "input_image_tokens", "output_tokens", "total_tokens")


def _entry(fields: dict[str, JsonValue], data: ImageBytes) -> CachedImage:
    expire_time = fields["expire_time_s"]
    return CachedImage(
        key=_key(_text(fields["key"]), bytes.fromhex(_text(fields["identity"]))),
        image=_image(fields, data),
        namespace=_text(fields["namespace"]),
        prompt_digest=bytes.fromhex(_text(fields["prompt_digest"])),
        create_time_s=_seconds(fields["create_time_s"]),
        expire_time_s=None if expire_time is None else _seconds(expire_time),
        tags=tuple(_text(tag) for tag in _list(fields["tags"])),
        derived_from=_text(fields.get("derived_from", "")),  # older entries are derived from none
        derived_by=frozenset(_text(each) for each in _list(fields.get("derived_by", []))),
        epoch=_whole(fields.get("epoch", 0), 0, _MAX_INT64),  # older entries are from before the first purge
        carried_from=tuple(_text(name) for name in _list(fields.get("carried_from", []))),
        sliding_s=_seconds(fields.get("sliding_s", 0)),  # most have none
        canonical_digest=bytes.fromhex(_text(fields.get("canonical_digest", ""))),
    )


def _image(fields: dict[str, JsonValue], data: ImageBytes) -> GeneratedImage:
    seed, usage = fields["seed"], fields["usage"]
    score = fields.get("score")  # entries from before there were scores have none
    return GeneratedImage(
        data=data,
        content_type=_text(fields["content_type"]),
        width=_whole(fields["width"], 0, _MAX_INT32),
        height=_whole(fields["height"], 0, _MAX_INT32),
        sha256=_text(fields["sha256"]),
        model=_text(fields["model"]),
        size=_text(fields["size"]),
        quality=_text(fields["quality"]),
        background=_text(fields["background"]),
        revised_prompt=_text(fields["revised_prompt"]),
        seed=None if seed is None else _whole(seed, -_MAX_INT64 - 1, _MAX_INT64),
        usage=None if usage is None else _usage(_list(usage)),
        upstream=_text(fields["upstream"]),
        upstream_request_id=_text(fields["upstream_request_id"]),
        generation_s=_seconds(fields["generation_s"]),
        paid_microusd=_whole(fields["paid_microusd"], 0, _MAX_INT64),
        score=None if score is None else _within(score, 1.0),
        won_against=_whole(fields.get("won_against", 0), 0, _MAX_INT32),
    )


def _key(name: str, digest: bytes) -> CacheKey:
    key = CacheKey.parse(name)
    if not key.matches(digest) or len(digest) != 32:  # noqa: PLR2004 - a SHA-256
        raise ValueError("the key and the identity digest disagree")
    return CacheKey(key.partition, key.fingerprint, digest, key.variant)


def _usage(values: list[JsonValue]) -> Usage:
    counts = (_whole(value, 0, _MAX_INT64) for value in values)
    return Usage(**dict(zip(_USAGE_FIELDS, counts, strict=True)))


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _list(value: JsonValue) -> list[JsonValue]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _whole(value: JsonValue, lowest: int, highest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("not a whole number")
    if not lowest <= value <= highest:
        raise ValueError("a number out of its range")
    return value


def _seconds(value: JsonValue) -> float:
    return _within(value, _MAX_SECONDS)


def _within(value: JsonValue, highest: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError("not a number")
    if not 0 <= value <= highest:  # also false for what is not a number
        raise ValueError("a number out of its range")
    return float(value)
