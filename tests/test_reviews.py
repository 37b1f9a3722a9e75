"""Pictures that wait for a person are nobody's until they are approved, and nobody's at all once they are rejected."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.errors import TierUnreachableError, UnknownReviewError
from cacheserver.keep import Keeper
from cacheserver.model import CachedImage, CacheKey, Namespace, TierName
from cacheserver.reviews import Reviews
from cacheserver.tiers.memory import MemoryCache
from tests.fakes import FakeClock
from tests.house import FaultyTier, open_tier
from tests.tier_contract import as_public, make_entry, make_key
from tests.waiting import until

STRICT = Namespace("studio", "studio", min_score=0.5)


def picture(number: int = 0, *, data: bytes = b"", key: CacheKey | None = None) -> CachedImage:
    """A picture made for variant 0 of prompt `number`; another one for every `data`."""
    entry = make_entry(key or make_key(f"prompt {number}"), data=data or f"picture {number}".encode())
    return replace(entry, image=replace(entry.image, score=0.25, won_against=2))


class Parts:
    """Reviews over a fast tier (`redis`) and a last one (`s3`), both real directories, as one process has them."""

    def __init__(self, clock: FakeClock, redis: FaultyTier, s3: FaultyTier) -> None:
        self.clock, self.redis, self.s3 = clock, redis, s3
        self.keepers: list[Keeper] = []
        self.restart()

    def restart(self, tiers: Sequence[FaultyTier] | None = None) -> None:
        """Another process on the same tiers, or on some of them."""
        tiers = [self.redis, self.s3] if tiers is None else tiers
        books = CounterBooks(clock=self.clock, registry=CollectorRegistry())
        self.memory = MemoryCache(clock=self.clock)
        self.keeper = Keeper(memory=self.memory, tiers=tiers, books=books, clock=self.clock)
        self.keepers.append(self.keeper)
        namespaces = [STRICT, Namespace("easy", "easy")]
        self.reviews = Reviews(memory=self.memory, tiers=tiers, keeper=self.keeper, namespaces=namespaces)

    async def hold(self, *entries: CachedImage) -> None:
        """Hold pictures and let every tier have them."""
        for entry in entries:
            await self.reviews.hold(entry)
        await self.settle()

    async def settle(self) -> None:
        await until(lambda: not self.keeper._writes)

    async def places(self, key: CacheKey) -> list[str]:
        """Where something lies under exactly this key."""
        tiers = [tier.name for tier in (self.redis, self.s3) if await tier.get(key) is not None]
        return [*([TierName.MEMORY] if self.memory.contains(key) else []), *tiers]

    async def listed(self, *, after: str = "", limit: int = 100) -> list[str]:
        return [each.key.name for each in await self.reviews.page(after=after, limit=limit)]


EVERYWHERE = [TierName.MEMORY, TierName.REDIS, TierName.S3]


@pytest.fixture
async def parts(clock: FakeClock, tmp_path: Path) -> AsyncIterator[Parts]:
    redis = await open_tier(tmp_path / "redis", TierName.REDIS, clock)
    s3 = await open_tier(tmp_path / "s3", TierName.S3, clock)
    parts = Parts(clock, redis, s3)
    yield parts
    redis.is_down = s3.is_down = False
    for keeper in parts.keepers:
        await keeper.aclose(5)
    await redis.aclose()
    await s3.aclose()


# --- waiting ---


async def test_a_picture_that_waits_is_nowhere_under_its_own_key(parts: Parts) -> None:
    held = picture()
    await parts.hold(held)
    assert await parts.places(held.key) == []
    assert await parts.places(held.key.in_review) == EVERYWHERE
    found = await parts.reviews.find(held.key)
    assert found is not None
    assert found.image == held.image
    assert found.key == held.key.in_review


async def test_what_does_not_wait_is_not_found(parts: Parts) -> None:
    await parts.hold(picture(1))
    assert await parts.reviews.find(picture(2).key) is None
    with pytest.raises(UnknownReviewError):
        await parts.reviews.get(picture(2).key)


async def test_the_picture_to_look_at_is_found_by_its_public_key(parts: Parts) -> None:
    held = picture()
    await parts.hold(held)
    parts.restart()
    assert (await parts.reviews.get(as_public(held.key))).image == held.image


async def test_a_second_picture_for_the_same_place_waits_beside_the_first(parts: Parts) -> None:
    first, second = picture(data=b"first"), picture(data=b"second")
    await parts.hold(first)
    assert (await parts.reviews.hold(second)).key.reviewed == second.key.with_variant(1)
    await parts.settle()
    assert await parts.listed() == [first.key.name, first.key.with_variant(1).name]


# --- the list ---


async def test_the_list_has_key_and_picture_in_the_order_of_the_keys(parts: Parts) -> None:
    pictures = [picture(number) for number in range(5)]
    await parts.hold(*pictures)
    page = await parts.reviews.page(after="", limit=10)
    in_order = sorted(pictures, key=lambda each: each.key.name)
    assert [each.key for each in page] == [as_public(each.key) for each in in_order]
    assert [each.entry.image for each in page] == [each.image for each in in_order]


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7])
async def test_pages_hold_everything_once(parts: Parts, limit: int) -> None:
    await parts.hold(*(picture(number) for number in range(6)))
    whole = await parts.listed()
    pages = [await parts.listed(limit=limit)]
    while len(pages[-1]) == limit:
        pages.append(await parts.listed(after=pages[-1][-1], limit=limit))
    assert [name for page in pages for name in page] == whole
    assert len(whole) == 6


async def test_a_damaged_picture_leaves_its_place_on_the_page_to_the_next(parts: Parts, tmp_path: Path) -> None:
    await parts.hold(*(picture(number) for number in range(4)))
    first, second, third, _ = await parts.listed()
    for name in (first, third):
        [file] = (tmp_path / "s3").rglob(CacheKey.parse(name).in_review.name)
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    page = await parts.listed(limit=2)
    assert page == [second, (await parts.listed(after=second))[-1]]


async def test_only_namespaces_with_a_least_score_have_pictures_waiting(parts: Parts) -> None:
    await parts.hold(picture(key=make_key(partition="easy")), picture(key=make_key(partition="studio")))
    assert await parts.listed() == [make_key(partition="studio").name]


async def test_another_process_lists_what_this_one_held(parts: Parts) -> None:
    await parts.hold(picture())
    parts.restart()
    assert await parts.listed() == [picture().key.name]


# --- approving ---


async def test_an_approved_picture_has_its_place_in_every_tier_and_waits_no_more(parts: Parts) -> None:
    held = picture()
    await parts.hold(held)
    kept = await parts.reviews.approve(as_public(held.key))
    await parts.settle()
    assert kept == held
    assert await parts.places(held.key) == EVERYWHERE
    assert await parts.s3.get(held.key) == held
    assert await parts.places(held.key.in_review) == []
    assert await parts.listed() == []


async def test_an_approved_picture_whose_place_is_taken_has_the_next_free_one(parts: Parts) -> None:
    held, other = picture(data=b"held"), picture(data=b"other")
    await parts.hold(held)
    await parts.keeper.keep(other)
    await parts.keeper.keep(replace(picture(data=b"another"), key=held.key.with_variant(1)))
    kept = await parts.reviews.approve(held.key)
    assert kept.key == held.key.with_variant(2)
    assert kept.image == held.image
    assert await parts.s3.get(held.key) == other
    assert await parts.places(held.key.in_review) == []


async def test_a_second_approval_says_that_it_is_gone_and_keeps_nothing_twice(parts: Parts) -> None:
    held = picture()
    await parts.hold(held)
    await parts.reviews.approve(held.key)
    for resolve in (parts.reviews.approve, parts.reviews.reject):
        with pytest.raises(UnknownReviewError) as gone:
            await resolve(held.key)
        assert gone.value.reason == "REVIEW_GONE"
    assert await parts.places(held.key.with_variant(1)) == []
    assert await parts.places(held.key) != []


# --- rejecting ---


async def test_a_rejected_picture_is_in_no_tier_any_more(parts: Parts) -> None:
    held, other = picture(1), picture(2)
    await parts.hold(held, other)
    await parts.reviews.reject(as_public(held.key))
    assert await parts.places(held.key.in_review) == []
    assert await parts.places(held.key) == []
    assert await parts.reviews.find(held.key) is None
    assert await parts.listed() == [other.key.name]
    with pytest.raises(UnknownReviewError):
        await parts.reviews.approve(held.key)


async def test_what_another_process_rejected_cannot_be_approved_here(parts: Parts) -> None:
    held = picture()
    await parts.hold(held)
    here = parts.reviews
    parts.restart()
    await parts.reviews.reject(held.key)
    with pytest.raises(UnknownReviewError):
        await here.approve(held.key)
    assert await here.page(after="", limit=10) == []


# --- faults ---


async def test_no_list_is_not_taken_for_an_empty_one(parts: Parts) -> None:
    await parts.hold(picture())
    parts.s3.is_down = True
    with pytest.raises(TierUnreachableError) as silent:
        await parts.reviews.page(after="", limit=10)
    assert silent.value.tiers == (TierName.S3,)


async def test_a_last_tier_that_falls_silent_within_the_list_does_not_shorten_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.hold(*(picture(number) for number in range(3)))
    get = parts.s3.get

    async def get_once(key: CacheKey) -> CachedImage | None:
        entry = await get(key)
        parts.s3.is_down = True
        return entry

    monkeypatch.setattr(parts.s3, "get", get_once)
    with pytest.raises(TierUnreachableError):
        await parts.reviews.page(after="", limit=10)


@pytest.mark.parametrize("decision", ["approve", "reject"])
async def test_a_silent_last_tier_decides_nothing(parts: Parts, decision: str) -> None:
    held = picture()
    await parts.hold(held)
    parts.s3.is_down = True
    with pytest.raises(TierUnreachableError) as silent:
        await getattr(parts.reviews, decision)(held.key)
    assert silent.value.tiers == (TierName.S3,)
    parts.s3.is_down = False
    assert await parts.places(held.key) == []
    assert await parts.listed() == [held.key.name]


async def test_a_tier_that_is_silent_at_a_rejection_is_named_and_it_can_be_rejected_again(parts: Parts) -> None:
    held = picture()
    await parts.hold(held)
    parts.redis.is_down = True
    with pytest.raises(TierUnreachableError, match=r"No answer from: redis.*resolve it again") as silent:
        await parts.reviews.reject(held.key)
    assert silent.value.tiers == (TierName.REDIS,)
    parts.redis.is_down = False
    assert await parts.listed() == [held.key.name]
    await parts.reviews.reject(held.key)
    assert await parts.places(held.key.in_review) == []


async def test_an_approval_that_missed_a_tier_is_repeated_without_a_second_copy(parts: Parts) -> None:
    held, other = picture(data=b"held"), picture(data=b"other")
    await parts.hold(held)
    await parts.keeper.keep(other)
    parts.redis.is_down = True
    with pytest.raises(TierUnreachableError):
        await parts.reviews.approve(held.key)
    parts.redis.is_down = False
    assert (await parts.reviews.approve(held.key)).key == held.key.with_variant(1)
    assert await parts.places(held.key.with_variant(2)) == []
    assert await parts.listed() == []


async def test_a_picture_held_while_the_last_tier_is_down_is_found_and_kept_when_it_is_back(parts: Parts) -> None:
    held = picture()
    parts.redis.is_down = parts.s3.is_down = True
    await parts.hold(held)
    found = await parts.reviews.find(held.key)
    assert found is not None
    assert found.image == held.image
    parts.redis.is_down = parts.s3.is_down = False
    parts.clock.advance(1)
    await until(lambda: not parts.keeper._held)
    parts.restart()
    assert await parts.listed() == [held.key.name]
    assert await parts.places(held.key) == []


async def test_while_the_last_tier_is_silent_a_faster_one_tells_what_waits(parts: Parts) -> None:
    held = picture()
    await parts.hold(held)
    parts.restart()
    parts.s3.is_down = True
    assert await parts.reviews.find(held.key) is not None
    parts.redis.is_down = True
    assert await parts.reviews.find(held.key) is None


async def test_a_picture_approved_while_the_last_tier_is_down_has_its_place_when_it_is_back(parts: Parts) -> None:
    held = picture()
    parts.s3.is_down = True
    await parts.hold(held)
    with pytest.raises(TierUnreachableError):
        await parts.reviews.approve(held.key)
    assert parts.memory.contains(held.key)
    parts.s3.is_down = False
    parts.clock.advance(1)
    await until(lambda: not parts.keeper._held)
    await parts.settle()
    assert await parts.s3.get(held.key) == held
    assert await parts.places(held.key.in_review) == []
    assert await parts.listed() == []


async def test_a_cache_of_memory_alone_has_its_reviews_there(parts: Parts) -> None:
    parts.restart(tiers=[])
    good, bad = picture(1), picture(2)
    await parts.hold(good, bad)
    assert await parts.listed() == sorted([good.key.name, bad.key.name])
    assert await parts.reviews.approve(good.key) == good
    await parts.reviews.reject(bad.key)
    assert await parts.listed() == []
    assert parts.memory.contains(good.key)
