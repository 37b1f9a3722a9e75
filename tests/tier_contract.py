"""What every tier promises, as tests. A tier's own test file subclasses this and says how to make the tier."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Protocol, cast

import pytest

from cacheserver.errors import EntryTooLargeError
from cacheserver.interfaces import Books, Tier
from cacheserver.model import CachedImage, CacheKey, GeneratedImage, Head, Labels, TierName, Touch, Usage
from cacheserver.tiers.guard import Breaker, Deadlines, GuardedTier
from tests.fakes import FakeClock

MAX_ENTRY_BYTES = 100_000
"""What the tiers under test are told to take at most."""

LONG_PROMPT = "".join(chr(0x4E00 + (n * n) % 20_000) for n in range(32_000))
"""The longest revised prompt there is."""


def make_key(prompt: str = "a cat", *, partition: str = "studio", variant: int = 0) -> CacheKey:
    """The full key of a request, as the identity makes it."""
    digest = hashlib.sha256(prompt.encode()).digest()
    fingerprint = hashlib.md5(prompt.encode(), usedforsecurity=False).digest()
    return CacheKey(partition, fingerprint, digest, variant)


def as_public(key: CacheKey) -> CacheKey:
    """The key as a caller that was given its name spells it: with half the digest."""
    return CacheKey.parse(key.name)


def make_entry(
    key: CacheKey | None = None,
    data: bytes = b"\x89PNG a cat",
    *,
    create_time_s: float = 1_800_000_000.0,
    expire_time_s: float | None = None,
    tags: tuple[str, ...] = ("spring", "shop"),
    revised_prompt: str = "a cat, sitting; 一只猫 🐈",
) -> CachedImage:
    image = GeneratedImage(
        data=data,
        content_type="image/png",
        width=1024,
        height=1536,
        sha256=hashlib.sha256(data).hexdigest(),
        model="gpt-image-2",
        size="1024x1536",
        quality="high",
        background="opaque",
        revised_prompt=revised_prompt,
        seed=-7,
        usage=Usage(
            input_tokens=50, input_text_tokens=40, input_image_tokens=10, output_tokens=4160, total_tokens=4210
        ),
        upstream="openai",
        upstream_request_id="req_1",
        generation_s=31.25,
        paid_microusd=166_400,
    )
    return CachedImage(
        key=key or make_key(),
        image=image,
        namespace="studio-eu",
        prompt_digest=hashlib.sha256(b"A cat").digest(),
        create_time_s=create_time_s,
        expire_time_s=expire_time_s,
        tags=tags,
    )


def _long_text() -> str:
    """More than the headers of an object hold, however it is compressed."""
    return "".join(chr(0x4E00 + (n * n) % 20_000) for n in range(5_000))


def with_data(entry: CachedImage, data: bytes) -> CachedImage:
    return replace(entry, image=replace(entry.image, data=data, sha256=hashlib.sha256(data).hexdigest()))


def foreign(entry: CachedImage) -> CachedImage:
    """The same picture under another identity whose name is the same: a forged collision."""
    digest = entry.key.digest[:16] + bytes(16)
    return replace(entry, key=replace(entry.key, digest=digest))


class _NoBooks:
    """Books that nobody reads."""

    def tier_seconds(self, tier: TierName, op: str, seconds: float) -> None:
        """Not kept."""

    def breaker(self, tier: TierName, *, is_open: bool) -> None:
        """Not kept."""

    def corrupt(self, tier: TierName) -> None:
        """Not kept."""


def guarded_tier(tier: Tier, clock: FakeClock, *, read_deadline_s: float = 10.0) -> GuardedTier:
    """`tier` as the service uses it."""
    books = cast("Books", _NoBooks())
    breaker = Breaker(tier=tier.name, probe=tier.ping, clock=clock, books=books)
    deadlines = Deadlines(read_s=read_deadline_s, write_s=30.0)
    return GuardedTier(tier, deadlines=deadlines, breaker=breaker, books=books, clock=clock)


async def keys_of(tier: Store, partition: str) -> set[str]:
    return {key.name async for key in tier.scan(partition)}


class Store(Protocol):
    """What memory has in common with the tiers."""

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None: ...
    async def find(self, keys: Sequence[CacheKey]) -> list[bool]: ...
    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool: ...
    async def delete(self, key: CacheKey) -> bool: ...
    def scan(self, partition: str) -> AsyncIterator[CacheKey]: ...
    async def labels(self, key: CacheKey) -> Labels | None: ...


class StoreContract:
    """What memory and the tiers have in common. Subclasses give the fixture `tier`, empty and their own."""

    async def test_what_was_put_is_got(self, tier: Store) -> None:
        entry = make_entry()
        assert await tier.put(entry.key, entry, replace=False)
        assert await tier.get(entry.key) == entry

    async def test_a_public_key_gets_the_entry_too(self, tier: Store) -> None:
        entry = make_entry()
        await tier.put(entry.key, entry, replace=False)
        assert await tier.get(as_public(entry.key)) == entry

    async def test_nothing_is_got_where_nothing_was_put(self, tier: Store) -> None:
        assert await tier.get(make_key()) is None
        assert await tier.labels(make_key()) is None
        assert await tier.find([make_key()]) == [False]

    async def test_variants_are_kept_apart(self, tier: Store) -> None:
        keys = [make_key(variant=n) for n in (0, 1, 10)]
        for key in keys:
            await tier.put(key, make_entry(key, b"%d" % key.variant), replace=False)
        assert [entry.image.data for key in keys if (entry := await tier.get(key))] == [b"0", b"1", b"10"]

    async def test_partitions_are_kept_apart(self, tier: Store) -> None:
        await tier.put(make_key(partition="studio"), make_entry(), replace=False)
        assert await tier.get(make_key(partition="shop")) is None

    async def test_a_stand_in_keeps_the_key_it_was_made_for(self, tier: Store) -> None:
        entry = make_entry()
        await tier.put(entry.key.stand_in, entry, replace=False)
        assert await tier.get(entry.key) is None
        assert await tier.get(entry.key.stand_in) == entry

    async def test_another_identity_under_the_same_name_is_a_miss(self, tier: Store) -> None:
        entry = make_entry()
        await tier.put(entry.key, foreign(entry), replace=True)
        assert await tier.get(entry.key) is None

    async def test_an_entry_is_got_until_it_expires(self, tier: Store, clock: FakeClock) -> None:
        entry = make_entry(expire_time_s=clock.now_s() + 60)
        await tier.put(entry.key, entry, replace=False)
        clock.advance(59.9)
        assert await tier.get(entry.key) == entry
        clock.advance(0.1)
        assert await tier.get(entry.key) is None

    async def test_replacing_leaves_the_new_entry(self, tier: Store) -> None:
        entry = make_entry()
        await tier.put(entry.key, entry, replace=False)
        other = with_data(entry, b"other")
        assert await tier.put(entry.key, other, replace=True)
        assert await tier.get(entry.key) == other

    async def test_replacing_where_nothing_is_stores(self, tier: Store) -> None:
        entry = make_entry()
        assert await tier.put(entry.key, entry, replace=True)
        assert await tier.get(entry.key) == entry

    async def test_find_answers_for_each_key_in_its_place(self, tier: Store) -> None:
        keys = [make_key(f"prompt {n}") for n in range(600)]
        for key in keys[::50]:
            await tier.put(key, make_entry(key), replace=False)
        assert await tier.find(keys) == [n % 50 == 0 for n in range(600)]

    async def test_find_of_nothing_is_nothing(self, tier: Store) -> None:
        assert await tier.find([]) == []

    async def test_delete_says_whether_there_was_something(self, tier: Store) -> None:
        entry = make_entry()
        await tier.put(entry.key, entry, replace=False)
        assert await tier.delete(as_public(entry.key))
        assert await tier.get(entry.key) is None
        assert not await tier.delete(entry.key)

    async def test_scan_yields_every_key_of_the_partition_stand_ins_too(self, tier: Store) -> None:
        keys = [make_key("a"), make_key("a", variant=3), make_key("b"), make_key("c").stand_in]
        for key in [*keys, make_key("d", partition="studio-2"), make_key("e", partition="st")]:
            await tier.put(key, make_entry(key), replace=False)
        assert await keys_of(tier, "studio") == {key.name for key in keys}
        assert await keys_of(tier, "nobody") == set()

    async def test_labels_are_the_entrys(self, tier: Store) -> None:
        entry = make_entry()
        await tier.put(entry.key, entry, replace=False)
        assert await tier.labels(as_public(entry.key)) == Labels(namespace="studio-eu", tags=("spring", "shop"))

    async def test_a_revised_prompt_of_any_length_comes_back(self, tier: Store) -> None:
        # Neither the headers of an object nor a first look at a value's head hold this one.
        entry = make_entry(revised_prompt=LONG_PROMPT)
        assert await tier.put(entry.key, entry, replace=False)
        assert await tier.get(entry.key) == entry
        assert await tier.labels(entry.key) == Labels(namespace="studio-eu", tags=("spring", "shop"))
        assert await keys_of(tier, "studio") == {entry.key.name}
        assert await tier.delete(entry.key)
        assert await keys_of(tier, "studio") == set()


class TierContract(StoreContract):
    """What every `Tier` promises. Its fixture's tier takes MAX_ENTRY_BYTES."""

    async def test_what_stands_in_is_moved_or_removed(self, tier: Tier) -> None:
        entry = make_entry(revised_prompt=LONG_PROMPT)
        await tier.put(entry.key.stand_in, entry, replace=True)
        is_moved = await tier.move(entry.key.stand_in, entry.key, entry)
        assert [await tier.get(entry.key), await tier.get(entry.key.stand_in)] == [entry if is_moved else None, None]

    async def test_what_is_not_there_is_not_moved(self, tier: Tier) -> None:
        entry = make_entry()
        assert not await tier.move(entry.key.stand_in, entry.key, entry)
        assert await tier.get(entry.key) is None

    async def test_another_picture_is_removed_and_not_moved(self, tier: Tier) -> None:
        entry = make_entry()
        await tier.put(entry.key.stand_in, with_data(entry, b"another"), replace=True)
        assert not await tier.move(entry.key.stand_in, entry.key, entry)
        assert [await tier.get(entry.key), await tier.get(entry.key.stand_in)] == [None, None]

    async def test_nothing_is_moved_onto_another_picture(self, tier: Tier) -> None:
        entry = make_entry()
        holder = with_data(entry, b"another")
        await tier.put(entry.key, holder, replace=False)
        await tier.put(entry.key.stand_in, entry, replace=True)
        assert not await tier.move(entry.key.stand_in, entry.key, entry)
        assert [await tier.get(entry.key), await tier.get(entry.key.stand_in)] == [holder, None]

    async def test_pages_are_in_the_order_of_names_and_miss_and_repeat_none(self, tier: Tier) -> None:
        keys = [make_key(f"prompt {n}", variant=variant) for n in range(10) for variant in (0, 2, 10)]
        for key in [*keys, make_key("other", partition="studio-2"), make_key("another", partition="st")]:
            await tier.put(key, make_entry(key), replace=False)
        pages: list[list[CacheKey]] = [[]]
        while page := await tier.page("studio", after=pages[-1][-1] if pages[-1] else None, limit=7):
            pages.append(page)
        assert [len(page) for page in pages] == [0, 7, 7, 7, 7, 2]
        assert [key.name for page in pages for key in page] == sorted(key.name for key in keys)
        assert await tier.page("nobody", after=None, limit=7) == []

    async def test_a_page_goes_on_after_a_key_that_is_gone(self, tier: Tier) -> None:
        keys = sorted((make_key(f"prompt {n}") for n in range(4)), key=lambda key: key.name)
        for key in keys:
            await tier.put(key, make_entry(key, revised_prompt=LONG_PROMPT), replace=False)
        await tier.delete(keys[1])
        rest = await tier.page("studio", after=keys[1], limit=5)
        assert [key.name for key in rest] == [key.name for key in keys[2:]]

    async def test_renditions_are_told_apart_from_what_they_lie_beside(self, tier: Tier) -> None:
        master = make_key()
        here = [master, master.with_variant(1), master.stand_in]
        renditions = [master.rendition(bytes([n]) * 32) for n in range(3)] + [here[1].rendition(bytes(32))]
        elsewhere = [make_key("a dog").rendition(bytes(32)), replace(renditions[0], partition="other")]
        for key in (*here, *renditions, *elsewhere):
            await tier.put(key, replace(make_entry(key), derived_from=master.name), replace=False)
        assert {key.name for key in await tier.renditions(as_public(master))} == {key.name for key in renditions}
        assert await tier.renditions(make_key("a cow")) == []

    async def test_a_rendition_is_got_and_deleted_as_any_entry(self, tier: Tier) -> None:
        key = make_key().rendition(b"r" * 32)
        entry = replace(make_entry(key), derived_from=make_key().name)
        assert await tier.put(key, entry, replace=False)
        assert await tier.get(as_public(key)) == entry
        assert (await tier.labels(key)) == Labels(entry.namespace, entry.tags, entry.derived_from)
        assert await tier.delete(key)
        assert await tier.get(key) is None
        assert await tier.renditions(make_key()) == []

    async def test_a_head_is_the_entry_without_its_bytes(self, tier: Tier) -> None:
        for entry in (make_entry(), make_entry(make_key("a dog"), revised_prompt=LONG_PROMPT)):
            assert await tier.head(entry.key) is None
            await tier.put(entry.key, entry, replace=False)
        entry = make_entry()
        bare = replace(entry, image=replace(entry.image, data=b""))
        assert await tier.head(as_public(entry.key)) == Head(bare, entry.size_bytes)

    async def test_a_second_writer_of_other_bytes_hears_of_the_first(self, tier: Tier) -> None:
        entry = make_entry()
        await tier.put(entry.key, entry, replace=False)
        assert not await tier.put(entry.key, with_data(entry, b"other"), replace=False)
        assert await tier.get(entry.key) == entry

    async def test_a_second_writer_of_equal_bytes_is_told_they_are_there(self, tier: Tier) -> None:
        entry = make_entry()
        await tier.put(entry.key, entry, replace=False)
        assert await tier.put(entry.key, make_entry(create_time_s=5.0), replace=False)

    async def test_of_many_writers_one_wins(self, tier: Tier) -> None:
        entries = [with_data(make_entry(), b"writer %d" % n) for n in range(5)]
        won = await asyncio.gather(*(tier.put(entry.key, entry, replace=False) for entry in entries))
        assert won.count(True) == 1
        assert await tier.get(make_key()) == entries[won.index(True)]

    async def test_an_expired_entry_is_got_by_who_takes_such(self, tier: Tier, clock: FakeClock) -> None:
        entry = make_entry(expire_time_s=clock.now_s() + 60)
        await tier.put(entry.key, entry, replace=False)
        clock.advance(69.9)
        assert await tier.get(entry.key, stale_s=10) == entry
        assert await tier.get(entry.key) is None
        clock.advance(0.1)
        assert await tier.get(entry.key, stale_s=10) is None

    async def test_the_end_of_an_entry_moves_on_by_a_touch_once_a_tenth_of_its_life_has_passed(
        self, tier: Tier, clock: FakeClock
    ) -> None:
        entry = replace(make_entry(expire_time_s=clock.now_s() + 100), sliding_s=100.0)
        await tier.put(entry.key, entry, replace=False)
        sooner, moved = (replace(entry, expire_time_s=clock.now_s() + end_s) for end_s in (109.0, 110.0))
        assert (await tier.touch(entry.key, sooner)).result is Touch.CURRENT
        assert (await tier.touch(entry.key, moved)).result is Touch.MOVED
        assert (await tier.touch(entry.key, moved)).result is Touch.CURRENT
        clock.advance(109.9)
        assert await tier.get(entry.key) == moved

    async def test_an_entry_with_more_metadata_than_usual_moves_on_too(self, tier: Tier, clock: FakeClock) -> None:
        entry = make_entry(expire_time_s=clock.now_s() + 100, revised_prompt=_long_text())
        entry = replace(entry, sliding_s=100.0)
        await tier.put(entry.key, entry, replace=False)
        moved = replace(entry, expire_time_s=clock.now_s() + 150)
        assert (await tier.touch(entry.key, moved)).result is Touch.MOVED
        assert await tier.get(entry.key) == moved

    async def test_a_touch_leaves_another_picture_alone(self, tier: Tier, clock: FakeClock) -> None:
        entry = replace(make_entry(expire_time_s=clock.now_s() + 100), sliding_s=100.0)
        other = with_data(entry, b"other")
        await tier.put(entry.key, other, replace=False)
        moved = replace(entry, expire_time_s=clock.now_s() + 150)
        assert (await tier.touch(entry.key, moved)).result is Touch.GONE
        assert await tier.get(entry.key) == other

    async def test_a_touch_brings_nothing_back(self, tier: Tier, clock: FakeClock) -> None:
        entry = replace(make_entry(expire_time_s=clock.now_s() + 100), sliding_s=100.0)
        assert (await tier.touch(entry.key, entry)).result in (Touch.GONE, Touch.ABSENT)
        assert await tier.get(entry.key) is None

    async def test_an_expired_entry_is_overwritten(self, tier: Tier, clock: FakeClock) -> None:
        old = make_entry(expire_time_s=clock.now_s() + 60)
        await tier.put(old.key, old, replace=False)
        clock.advance(60)
        new = make_entry(data=b"new")
        assert await tier.put(new.key, new, replace=False)
        assert await tier.get(new.key) == new

    async def test_another_identitys_entry_is_overwritten(self, tier: Tier) -> None:
        entry = make_entry()
        await tier.put(entry.key, foreign(entry), replace=True)
        assert await tier.put(entry.key, entry, replace=False)
        assert await tier.get(entry.key) == entry

    async def test_an_entry_that_lasts_no_longer_is_not_kept_longer(self, tier: Tier, clock: FakeClock) -> None:
        entry = make_entry(expire_time_s=clock.now_s() - 1)
        await tier.put(entry.key, entry, replace=False)
        assert await tier.get(entry.key) is None

    async def test_an_image_at_the_size_limit_is_taken_and_a_larger_one_is_not(self, tier: Tier) -> None:
        entry = make_entry(data=bytes(MAX_ENTRY_BYTES))
        assert await tier.put(entry.key, entry, replace=False)
        assert await tier.get(entry.key) == entry
        for replace_it in (False, True):
            with pytest.raises(EntryTooLargeError):
                await tier.put(entry.key, make_entry(data=bytes(MAX_ENTRY_BYTES + 1)), replace=replace_it)
        assert await tier.get(entry.key) == entry

    async def test_an_empty_image_is_an_image(self, tier: Tier) -> None:
        entry = make_entry(data=b"")
        assert await tier.put(entry.key, entry, replace=False)
        assert await tier.get(entry.key) == entry

    async def test_a_tier_that_works_answers_a_ping(self, tier: Tier) -> None:
        await tier.ping()

    async def test_many_readers_and_writers_at_once_get_what_was_put(self, tier: Tier) -> None:
        entries = [make_entry(make_key(f"prompt {n}"), b"%d" % n * 1000) for n in range(60)]
        await asyncio.gather(*(tier.put(entry.key, entry, replace=n % 2 == 0) for n, entry in enumerate(entries)))
        assert await asyncio.gather(*(tier.get(entry.key) for entry in entries)) == entries
