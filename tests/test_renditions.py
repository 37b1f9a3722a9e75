"""Renditions are found where they were kept, or made and kept, and go with their masters."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.epochs import Epochs
from cacheserver.errors import ImageChangedError, InvalidRequestError, KeyGoneError
from cacheserver.imports import Imports
from cacheserver.interfaces import Tier
from cacheserver.keep import Keeper
from cacheserver.model import (
    AnswerFrom,
    CachedImage,
    CacheKey,
    GeneratedImage,
    MatchLevel,
    Namespace,
    Pending,
    Rendition,
    Served,
    Terms,
    TierName,
)
from cacheserver.purge import Purger, PurgeSelector
from cacheserver.renditions.renderer import ThreadRenderer
from cacheserver.renditions.renditions import MOST_KEPT, Rendered, Renditions, key_of
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.memory import MemoryCache
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import connect
from tests.fakes import FakeClock
from tests.house import EVERYTHING, House, alone_with, open_s3
from tests.renditions_pictures import decoded, encoded, generated, scene
from tests.servers import S3Server, ValkeyServer
from tests.tier_contract import as_public, make_entry, make_key
from tests.waiting import until

SMALL = Rendition(width=8)
TTL_S = 1_000.0


class CountingRenderer(ThreadRenderer):
    """A renderer that counts, and waits at a gate before it begins."""

    def __init__(self) -> None:
        super().__init__(max_pixels=10_000, max_bytes=100_000)
        self.made = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def render(self, image: GeneratedImage, rendition: Rendition) -> GeneratedImage:
        self.made += 1
        await self.gate.wait()
        return await super().render(image, rendition)


class Gallery:
    """A house and the renditions of its pictures."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.renderer = CountingRenderer()
        self.restart()

    def restart(self) -> None:
        """A new process on the same tiers."""
        self.house.restart()
        self.renditions = Renditions(
            memory=self.house.memory,
            tiers=[self.house.redis, self.house.s3],
            keeper=self.house.keeper,
            renderer=self.renderer,
            find_master=self.house.cache.get_by_key,
            clock=self.house.clock,
            ttl_s=TTL_S,
        )

    async def put(self, prompt: str = "a red fox", *, seed: int = 1, **settings: object) -> CachedImage:
        _, identity = self.house.identity(prompt)
        image = generated(encoded(scene(32, 16, seed=seed)))
        put = partial(self.house.cache.put, image, identity, namespace=self.house.namespace)
        entry, _ = await put(**settings)  # type: ignore[arg-type] # test convenience
        await self.house.settle()
        return entry

    async def ask(self, key: CacheKey, wanted: Rendition = SMALL, *, if_digest: str = "") -> Rendered:
        answer = await self.renditions.get(
            as_public(key),
            wanted,
            namespace=self.house.namespace,
            caller=EVERYTHING,
            terms=Terms(),
            if_digest=if_digest,
        )
        assert isinstance(answer, Rendered)
        return answer

    async def get(self, key: CacheKey, wanted: Rendition = SMALL, *, if_digest: str = "") -> Rendered:
        rendered = await self.ask(key, wanted, if_digest=if_digest)
        await self.house.settle()
        return rendered


@pytest_asyncio.fixture
async def gallery(house: House) -> AsyncIterator[Gallery]:
    gallery = Gallery(house)
    yield gallery
    gallery.renderer.gate.set()
    await gallery.renditions.aclose()
    await gallery.renderer.aclose()


class TestFindingAndMaking:
    async def test_a_rendition_is_made_once_and_then_found_in_memory(self, gallery: Gallery) -> None:
        master = await gallery.put(tags=("spring",))
        first, second = await gallery.get(master.key), await gallery.get(master.key)
        assert decoded(first.entry.image.data).size == (8, 4)
        assert (first.tier, second.tier) == (None, TierName.MEMORY)
        assert second.entry is first.entry
        assert gallery.renderer.made == 1

    async def test_it_has_its_masters_facts_and_says_whose_it_is(self, gallery: Gallery) -> None:
        master = await gallery.put(tags=("spring",))
        entry = (await gallery.get(master.key)).entry
        assert entry.derived_from == master.key.name
        assert entry.key.is_rendition
        assert entry.key == key_of(as_public(master.key), master.image.sha256, SMALL)
        assert (entry.namespace, entry.tags, entry.create_time_s) == (
            master.namespace,
            master.tags,
            master.create_time_s,
        )
        assert entry.image.paid_microusd == 0 < master.image.paid_microusd

    async def test_any_process_finds_it_in_a_tier_and_promotes_it(self, gallery: Gallery) -> None:
        master = await gallery.put()
        made = await gallery.get(master.key)
        gallery.restart()
        await gallery.house.redis.delete(made.entry.key)
        found = await gallery.get(master.key)
        assert (found.tier, found.entry) == (TierName.S3, made.entry)
        gallery.restart()
        assert (await gallery.get(master.key)).tier is TierName.REDIS
        assert gallery.renderer.made == 1

    async def test_with_its_masters_digest_it_is_found_without_its_master(self, gallery: Gallery) -> None:
        master = await gallery.put()
        await gallery.get(master.key)
        gallery.restart()
        asked = len(gallery.house.redis.gets)
        for digest in (master.image.sha256, master.image.sha256[:32].upper()):
            assert (await gallery.get(master.key, if_digest=digest)).entry.derived_from == master.key.name
        assert len(gallery.house.redis.gets) == asked + 1  # for the rendition, and then it is in memory

    async def test_another_digest_than_the_masters_is_refused(self, gallery: Gallery) -> None:
        master = await gallery.put()
        with pytest.raises(ImageChangedError):
            await gallery.get(master.key, if_digest="0" * 64)
        with pytest.raises(InvalidRequestError, match="at least 32"):
            await gallery.get(master.key, if_digest=master.image.sha256[:31])

    async def test_of_one_picture_only_so_many_are_kept_and_further_ones_are_made_each_time(
        self, gallery: Gallery
    ) -> None:
        master, other = await gallery.put(), await gallery.put("a blue fox", seed=2)
        wanted = [Rendition(output_format="webp", output_compression=quality) for quality in range(MOST_KEPT + 3)]
        for each in wanted:
            await gallery.get(master.key, each)
        kept = await gallery.house.s3.renditions(master.key)
        assert len(kept) == len(await gallery.house.redis.renditions(master.key)) == MOST_KEPT
        assert (await gallery.get(master.key, wanted[0])).tier is TierName.MEMORY
        made = gallery.renderer.made
        further = [await gallery.get(master.key, wanted[-1]) for _ in range(2)]
        assert [(each.tier, each.entry.image.content_type) for each in further] == [(None, "image/webp")] * 2
        assert gallery.renderer.made == made + 2
        await gallery.get(other.key)
        assert (await gallery.get(other.key)).tier is TierName.MEMORY  # each picture has room of its own

    async def test_many_callers_have_it_made_once(self, gallery: Gallery) -> None:
        master = await gallery.put()
        gallery.renderer.gate.clear()
        asked = [asyncio.create_task(gallery.ask(master.key)) for _ in range(5)]
        await until(lambda: gallery.renderer.made == 1)
        asked[0].cancel()
        gallery.renderer.gate.set()
        assert len({(await task).entry.image.sha256 for task in asked[1:]}) == 1
        assert gallery.renderer.made == 1

    async def test_one_like_its_master_is_the_master(self, gallery: Gallery) -> None:
        master = await gallery.put()
        for wanted in (Rendition(), Rendition(width=32), Rendition(height=900, output_format="png")):
            assert (await gallery.get(master.key, wanted)).entry is gallery.house.memory.get(master.key)
        assert gallery.renderer.made == 0
        assert await gallery.house.s3.renditions(master.key) == []

    async def test_one_that_has_nothing_to_strip_is_the_master_too(self, gallery: Gallery) -> None:
        master = await gallery.put()
        assert (await gallery.get(master.key, Rendition(strip=True))).entry.key == master.key
        assert await gallery.house.s3.renditions(master.key) == []

    async def test_one_of_a_derived_picture_says_whose_it_is_and_asks_for_nothing_else(self, gallery: Gallery) -> None:
        stored = await gallery.put()
        derived = replace(stored, derived_from="another", derived_by=frozenset({"quality"}))
        reader = replace(gallery.house.namespace, answer_from=frozenset(AnswerFrom))
        await gallery.house.s3.put(derived.key, derived, replace=True)
        await gallery.house.redis.put(derived.key, derived, replace=True)
        gallery.restart()
        gallery.house.namespace = reader
        entry = (await gallery.get(stored.key)).entry
        assert (entry.derived_from, entry.derived_by) == (stored.key.name, frozenset())

    async def test_there_are_no_renditions_of_renditions(self, gallery: Gallery) -> None:
        master = await gallery.put()
        key = (await gallery.get(master.key)).entry.key
        with pytest.raises(InvalidRequestError, match="names a rendition"):
            await gallery.get(key, Rendition(width=4))

    async def test_without_a_master_there_is_none(self, gallery: Gallery) -> None:
        with pytest.raises(KeyGoneError):
            await gallery.get(make_key())

    async def test_a_master_on_its_way_is_pending(self, gallery: Gallery) -> None:
        async def on_its_way(key: CacheKey, **_: object) -> Pending:
            return Pending((key,), 3.0)

        gallery.renditions._find_master = on_its_way
        answer = await gallery.renditions.get(
            make_key(), SMALL, namespace=gallery.house.namespace, caller=EVERYTHING, terms=Terms(max_wait_s=0)
        )
        assert answer == Pending((make_key(),), 3.0)

    async def test_tiers_that_are_down_cost_a_rendering_and_nothing_else(self, gallery: Gallery) -> None:
        master = await gallery.put()
        await gallery.get(master.key)
        gallery.house.memory.delete(key_of(master.key, master.image.sha256, SMALL))
        gallery.house.redis.is_down = gallery.house.s3.is_down = True
        assert (await gallery.get(master.key)).tier is None
        assert gallery.renderer.made == 2

    async def test_it_lasts_no_longer_than_it_may_nor_than_its_master(self, gallery: Gallery) -> None:
        now_s = gallery.house.clock.now_s()
        lasting, passing = await gallery.put("a fox"), await gallery.put("a dog", ttl_s=TTL_S / 2)
        assert (await gallery.get(lasting.key)).entry.expire_time_s == now_s + TTL_S
        assert (await gallery.get(passing.key)).entry.expire_time_s == passing.expire_time_s == now_s + TTL_S / 2
        gallery.house.clock.advance(TTL_S)
        assert (await gallery.get(lasting.key)).tier is None
        with pytest.raises(KeyGoneError):
            await gallery.get(passing.key, if_digest=passing.image.sha256)


class TestChanges:
    async def test_what_is_purged_while_it_is_made_does_not_come_back(self, gallery: Gallery) -> None:
        master = await gallery.put()
        gallery.renderer.gate.clear()
        asked = asyncio.create_task(gallery.ask(master.key))
        await until(lambda: gallery.renderer.made == 1)
        await gallery.house.cache.purge(gallery.house.namespace, key=master.key, dry_run=False)
        gallery.renderer.gate.set()
        place = (await asked).entry.key
        await gallery.house.settle()
        assert [await tier.get(place) for tier in (gallery.house.redis, gallery.house.s3)] == [None, None]
        assert gallery.house.memory.get(place) is None

    async def test_a_purge_waits_for_the_rendition_that_is_being_written(self, gallery: Gallery) -> None:
        master = await gallery.put()
        gallery.renderer.gate.clear()
        asked = asyncio.create_task(gallery.ask(master.key))
        await until(lambda: gallery.renderer.made == 1)
        gallery.house.redis.gate.clear()
        gallery.renderer.gate.set()
        place = (await asked).entry.key
        purging = asyncio.create_task(gallery.house.cache.purge(gallery.house.namespace, key=master.key, dry_run=False))
        await until(gallery.house.keeper._purging.locked)
        gallery.house.redis.gate.set()
        await purging
        await gallery.house.settle()
        assert [await tier.get(place) for tier in (gallery.house.redis, gallery.house.s3)] == [None, None]

    async def test_a_replaced_picture_has_other_renditions(self, gallery: Gallery) -> None:
        master = await gallery.put(seed=1)
        before = await gallery.get(master.key)
        successor = await gallery.put(seed=2, replace=True)
        after = await gallery.get(successor.key)
        assert successor.key == master.key
        assert after.entry.image.sha256 != before.entry.image.sha256
        assert after.tier is None


@pytest.fixture
async def tiers(
    valkey_server: ValkeyServer, s3_server: S3Server, clock: FakeClock, tmp_path: Path
) -> AsyncIterator[Sequence[Tier]]:
    """Redis, a disk and S3, none of them a stand-in."""
    redis = RedisTier(
        connect(valkey_server.url, timeout_s=5.0, connect_timeout_s=5.0),
        clock=clock,
        rng=random.Random(7),  # noqa: S311 - no secret
        prefix=f"test-{uuid.uuid4().hex}:",
    )
    disk = await DiskTier.open(tmp_path / "disk", clock=clock, sync=False)
    s3 = open_s3(s3_server, clock=clock, prefix=f"test-{uuid.uuid4().hex}/")
    yield (redis, disk, s3)
    for tier in (redis, disk, s3):
        await tier.aclose()


class Shelf:
    """Pictures and their renditions in real tiers, and what purges them."""

    def __init__(self, tiers: Sequence[Tier], clock: FakeClock) -> None:
        self.tiers = tiers
        self.memory = MemoryCache(clock=clock)
        books = CounterBooks(clock=clock, registry=CollectorRegistry())
        self.keeper = Keeper(memory=self.memory, tiers=tiers, books=books, clock=clock)
        coherence = alone_with(Epochs(), books=books, clock=clock)
        self.purger = Purger(memory=self.memory, tiers=tiers, keeper=self.keeper, coherence=coherence)
        self.renderer = CountingRenderer()
        self.renditions = Renditions(
            memory=self.memory,
            tiers=tiers,
            keeper=self.keeper,
            renderer=self.renderer,
            find_master=self.find_master,
            clock=clock,
            ttl_s=TTL_S,
        )
        self.namespace = Namespace("studio-eu", "studio")

    async def find_master(self, key: CacheKey, **_: object) -> Served:
        entry = self.memory.get(key)
        assert entry is not None
        return Served(entry, TierName.MEMORY, MatchLevel.EXACT)

    async def fill(self, key: CacheKey, **facts: object) -> list[CacheKey]:
        """Keep a picture and three renditions of it everywhere; the keys of these."""
        image = generated(encoded(scene(32, 16, seed=int.from_bytes(key.digest) + key.variant)))
        entry = replace(make_entry(key), image=image, **facts)  # type: ignore[arg-type] # test convenience
        await self.keeper.keep(entry)
        places = []
        for width in (4, 8, 16):
            answer = await self.renditions.get(
                as_public(key), Rendition(width=width), namespace=self.namespace, caller=EVERYTHING, terms=Terms()
            )
            assert isinstance(answer, Rendered)
            places.append(answer.entry.key)
        await until(lambda: not self.keeper._writes)
        assert await self.copies(places) == 3 * 4
        return places

    async def copies(self, places: Sequence[CacheKey]) -> int:
        """How many copies of these there are, memory included."""
        found = [await tier.get(place) for tier in self.tiers for place in places]
        return sum(entry is not None for entry in found) + sum(map(self.memory.contains, places))


@pytest.fixture
async def shelf(tiers: Sequence[Tier], clock: FakeClock) -> AsyncIterator[Shelf]:
    shelf = Shelf(tiers, clock)
    yield shelf
    await shelf.renditions.aclose()
    await shelf.renderer.aclose()
    await shelf.keeper.aclose(5)


class TestPurging:
    """On real Redis, disk and S3."""

    async def test_with_a_picture_go_its_renditions_and_no_others(self, shelf: Shelf) -> None:
        one, other = make_key(), make_key(variant=1)
        gone, stays = await shelf.fill(one), await shelf.fill(other)
        selector = PurgeSelector(shelf.namespace, key=as_public(one))
        counted = await shelf.purger.purge([selector], dry_run=True)
        assert await shelf.copies([*gone, *stays]) == 6 * 4
        purged = await shelf.purger.purge([selector], dry_run=False)
        assert counted == purged
        assert purged.images == 1  # renditions do not count
        assert set(purged.per_tier.values()) == {1}
        assert await shelf.copies(gone) == 0
        assert await shelf.copies(stays) == 3 * 4

    async def test_with_a_request_go_the_renditions_of_all_its_variants(self, shelf: Shelf) -> None:
        gone = [*await shelf.fill(make_key()), *await shelf.fill(make_key(variant=1))]
        stays = await shelf.fill(make_key("a dog"))
        purged = await shelf.purger.purge([PurgeSelector(shelf.namespace, identity=make_key())], dry_run=False)
        assert purged.images == 2
        assert await shelf.copies(gone) == 0
        assert await shelf.copies(stays) == 3 * 4

    async def test_a_tag_and_a_namespace_take_them_too(self, shelf: Shelf) -> None:
        tagged, rest = await shelf.fill(make_key(), tags=("spring",)), await shelf.fill(make_key("a dog"), tags=())
        theirs = await shelf.fill(make_key("a cow"), namespace="studio-us", tags=("spring",))
        assert (await shelf.purger.purge([PurgeSelector(shelf.namespace, tag="spring")], dry_run=False)).images == 1
        assert [await shelf.copies(places) for places in (tagged, rest, theirs)] == [0, 12, 12]
        assert (await shelf.purger.purge([PurgeSelector(shelf.namespace)], dry_run=False)).images == 1
        assert [await shelf.copies(places) for places in (tagged, rest, theirs)] == [0, 0, 12]

    async def test_another_identity_of_the_same_fingerprint_keeps_its_renditions(self, shelf: Shelf) -> None:
        key = make_key()
        forged = replace(key, digest=bytes(32))
        gone, stays = await shelf.fill(key), await shelf.fill(forged)
        await shelf.purger.purge([PurgeSelector(shelf.namespace, identity=key)], dry_run=False)
        assert [await shelf.copies(gone), await shelf.copies(stays)] == [0, 12]

    async def test_renditions_that_outlived_their_master_are_purged(self, shelf: Shelf) -> None:
        key = make_key()
        gone = await shelf.fill(key)
        for tier in shelf.tiers:
            await tier.delete(key)
        shelf.memory.delete(key)
        assert (await shelf.purger.purge([PurgeSelector(shelf.namespace, key=key)], dry_run=False)).images == 0
        assert await shelf.copies(gone) == 0

    async def test_no_list_of_pictures_has_them(self, shelf: Shelf, clock: FakeClock) -> None:
        await shelf.fill(make_key())
        imports = Imports(
            last=shelf.tiers[-1],
            keeper=shelf.keeper,
            objects=None,  # type: ignore[arg-type] # nothing is imported
            inspect=None,  # type: ignore[arg-type] # the same
            clock=clock,
            max_image_bytes=1,
        )
        heads, _ = await imports.page(shelf.namespace, after=None, limit=100)
        assert [head.bare.key for head in heads] == [make_key()]


WANTED = st.builds(
    Rendition,
    width=st.none() | st.integers(1, 4096),
    height=st.none() | st.integers(1, 4096),
    output_format=st.sampled_from([None, "png", "jpeg", "webp"]),
    output_compression=st.none() | st.integers(0, 100),
    strip=st.booleans(),
)


@given(one=WANTED, other=WANTED)
def test_renditions_that_differ_lie_apart_and_beside_their_master(one: Rendition, other: Rendition) -> None:
    key = make_key(variant=3)
    places = [key_of(key, "ab" * 32, wanted) for wanted in (one, other)]
    assert (places[0] == places[1]) == (same(one) == same(other))
    assert all(place.name.startswith(f"{key.fingerprint_name}.") and place.is_rendition for place in places)
    assert CacheKey.parse(places[0].name).name == places[0].name
    assert key_of(as_public(key), "ab" * 16, one) == places[0]
    assert key_of(key, "ac" * 32, one) != places[0] != key_of(key.with_variant(0), "ab" * 32, one)


def same(wanted: Rendition) -> Rendition:
    """What is wanted, with what it means where it says nothing."""
    if wanted.output_format == "png":
        return replace(wanted, output_compression=None)
    if wanted.output_format is not None and wanted.output_compression is None:
        return replace(wanted, output_compression=80)
    return wanted
