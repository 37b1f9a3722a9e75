"""What was encoded is decoded, and what was damaged is never taken for an entry."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from cacheserver.epochs import Epochs, Tombstone
from cacheserver.errors import CorruptEntryError, EntryTooLargeError, NewerEntryError
from cacheserver.model import AnswerFrom, CachedImage, CacheKey, GeneratedImage, Usage
from cacheserver.tiers import codec
from tests.tier_contract import make_entry, make_key

counts = st.integers(0, 2**40)
texts = st.text(max_size=40)
seconds = st.floats(0, 1e11, allow_nan=False)


@st.composite
def entries(draw: st.DrawFn) -> CachedImage:
    data = draw(st.binary(max_size=300))
    image = GeneratedImage(
        data=data,
        content_type=draw(texts),
        width=draw(st.integers(0, 2**31 - 1)),
        height=draw(st.integers(0, 2**31 - 1)),
        sha256=hashlib.sha256(data).hexdigest(),
        model=draw(texts),
        size=draw(texts),
        quality=draw(texts),
        background=draw(texts),
        revised_prompt=draw(st.text(st.characters(), max_size=40)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        usage=draw(st.none() | st.builds(Usage, counts, counts, counts, counts, counts)),
        upstream=draw(texts),
        upstream_request_id=draw(texts),
        generation_s=draw(seconds),
        paid_microusd=draw(counts),
    )
    key = CacheKey("studio", draw(st.binary(min_size=16, max_size=16)), draw(st.binary(min_size=32, max_size=32)), 3)
    return CachedImage(
        key=key,
        image=image,
        namespace=draw(texts),
        prompt_digest=draw(st.binary(max_size=32)),
        create_time_s=draw(seconds),
        expire_time_s=draw(st.none() | seconds),
        tags=tuple(draw(st.lists(texts, max_size=4))),
        derived_from=draw(texts),
        derived_by=draw(st.frozensets(st.sampled_from([*AnswerFrom, "foreseen"]))),
        carried_from=tuple(draw(st.lists(texts, max_size=2))),
    )


@given(entries())
def test_what_was_encoded_is_decoded(entry: CachedImage) -> None:
    assert codec.decode(codec.encode(entry)) == entry


@pytest.mark.no_cover
@given(entries(), st.data())
@settings(max_examples=300)
def test_any_flipped_bit_is_noticed(entry: CachedImage, data: st.DataObject) -> None:
    stored = bytearray(codec.encode(entry))
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    stored[bit // 8] ^= 1 << bit % 8
    is_version = bit // 8 in {4, 5}
    with pytest.raises(NewerEntryError if is_version and bytes(stored[4:6]) != b"\0\0" else CorruptEntryError):
        codec.decode(bytes(stored))


def test_every_truncation_and_any_appendix_is_noticed() -> None:
    stored = codec.encode(make_entry())
    for length in range(len(stored)):
        with pytest.raises(CorruptEntryError):
            codec.decode(stored[:length])
    with pytest.raises(CorruptEntryError):
        codec.decode(stored + b"\0")


@given(st.binary(max_size=200))
def test_what_never_was_an_entry_is_damaged(stored: bytes) -> None:
    with pytest.raises(CorruptEntryError):
        codec.decode(stored)


def test_a_newer_entry_is_unknown_whatever_follows_its_version() -> None:
    with pytest.raises(NewerEntryError):
        codec.decode(b"PCEN" + struct.pack(">H", max(codec.LAYOUTS) + 1) + b"a layout we do not know")


def test_a_claim_of_endless_metadata_is_refused_before_it_is_read() -> None:
    with pytest.raises(CorruptEntryError, match="more metadata"):
        codec.head_length(struct.pack(">4sHI", b"PCEN", codec.WRITE_VERSION, 2**32 - 1))


def test_the_head_tells_the_labels_without_the_image() -> None:
    entry = make_entry(data=bytes(100_000))
    stored = codec.encode(entry)
    length = codec.head_length(stored[: codec.PREAMBLE_BYTES])
    assert length < 2000
    assert codec.decode_head(stored[:length]).labels.tags == entry.tags


def test_metadata_without_a_bound_is_not_written() -> None:
    with pytest.raises(EntryTooLargeError):
        codec.encode(make_entry(revised_prompt="x" * codec.MAX_METADATA_BYTES))


def test_metadata_of_exactly_the_largest_size_is_read() -> None:
    rest = len(codec.pack_metadata(make_entry(revised_prompt="")))
    entry = make_entry(revised_prompt="x" * (codec.MAX_METADATA_BYTES - rest))
    assert len(codec.pack_metadata(entry)) == codec.MAX_METADATA_BYTES
    assert codec.decode(codec.encode(entry)) == entry


def test_half_a_surrogate_pair_does_not_cost_the_picture() -> None:
    entry = make_entry(revised_prompt="a \ud83d cat")
    assert codec.decode(codec.encode(entry)) == entry


def with_checksum(metadata: bytes) -> bytes:
    """An entry whose checksums are right around any metadata: what a hostile writer can make."""
    head = struct.pack(">4sHI", b"PCEN", codec.WRITE_VERSION, len(metadata)) + metadata
    return head + xxh3_128_digest(head)


def fields() -> dict[str, object]:
    parsed: dict[str, object] = json.loads(codec.pack_metadata(make_entry(data=b"")))
    return parsed


def test_metadata_with_a_field_we_do_not_know_is_read() -> None:
    stored = with_checksum(json.dumps({**fields(), "mood": "good"}).encode())
    assert codec.decode(stored) == make_entry(data=b"")


CHECKED_TEXTS = {"key", "identity", "prompt_digest", "xxh3"}
WRONG_VALUES: list[object] = [True, [], {}, [[]], "\N{SNOWMAN}", -(2**70), 10**400, 1e999, {"a": 1}]
WRONG = [
    (name, wrong)
    for name, right in fields().items()
    for wrong in WRONG_VALUES
    if not (wrong == [] and name in {"tags", "derived_by", "carried_from"})
    and not (isinstance(wrong, str) and isinstance(right, str) and name not in CHECKED_TEXTS)
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_metadata_of_the_wrong_type_or_range_is_damaged(name: str, wrong: object) -> None:
    with pytest.raises(CorruptEntryError):
        codec.decode(with_checksum(json.dumps({**fields(), name: wrong}).encode()))


LATER = {"score": None, "won_against": 0, "derived_from": "", "derived_by": frozenset(), "epoch": 0, "carried_from": ()}
"""Fields that entries did not have from the start, and what they count as there."""


@pytest.mark.parametrize("name", sorted(fields().keys() - LATER))
def test_metadata_without_a_field_is_damaged(name: str) -> None:
    rest = {key: value for key, value in fields().items() if key != name}
    with pytest.raises(CorruptEntryError):
        codec.decode(with_checksum(json.dumps(rest).encode()))


@pytest.mark.parametrize("name", LATER)
def test_entries_from_before_there_was_a_field_are_read(name: str) -> None:
    rest = {key: value for key, value in fields().items() if key != name}
    entry = codec.decode(with_checksum(json.dumps(rest).encode()))
    assert getattr(entry if hasattr(entry, name) else entry.image, name) == LATER[name]


@pytest.mark.parametrize(
    "metadata", [b"", b"null", b"[]", b"\xff\xfe", b"{", b"[" * 100_000, b'{"key":' * 50_000, b"1" * 5000]
)
def test_metadata_that_is_no_object_is_damaged(metadata: bytes) -> None:
    with pytest.raises(CorruptEntryError):
        codec.decode(with_checksum(metadata))


def test_a_key_and_an_identity_that_disagree_are_damage() -> None:
    other = make_key("another prompt")
    with pytest.raises(CorruptEntryError):
        codec.decode(with_checksum(json.dumps({**fields(), "identity": other.digest.hex()}).encode()))
    short = make_key().digest[:16]
    with pytest.raises(CorruptEntryError):
        codec.decode(with_checksum(json.dumps({**fields(), "identity": short.hex()}).encode()))


def test_an_entry_answers_only_its_partition_its_identity_and_its_time() -> None:
    entry = make_entry(expire_time_s=100.0)
    key = entry.key
    assert codec.answers(entry, key, 99.0, Epochs())
    assert codec.answers(entry, key.with_variant(7), 99.0, Epochs())
    assert not codec.answers(entry, key, 100.0, Epochs())
    assert not codec.answers(entry, replace(key, partition="shop"), 99.0, Epochs())
    assert not codec.answers(entry, replace(key, digest=bytes(32)), 99.0, Epochs())


def test_an_entry_that_was_purged_answers_nothing_and_one_made_since_does() -> None:
    entry = make_entry()
    epochs = Epochs()
    epochs.learn([replace(Tombstone.of_key(entry.namespace, entry.key), epoch=2)])
    assert not codec.answers(replace(entry, epoch=1), entry.key, 99.0, epochs)
    assert codec.answers(replace(entry, epoch=2), entry.key, 99.0, epochs)
