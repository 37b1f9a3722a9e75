"""What was paid for is never lost, and what was replaced or purged never comes back."""

from __future__ import annotations

import asyncio

import pytest

from cacheserver.errors import EntryTooLargeError, KeyGoneError
from cacheserver.model import CachedImage, CacheKey, CachePolicy, Pending, Served, Terms, TierName
from tests.house import EVERYTHING, FaultyTier, House
from tests.tier_contract import foreign
from tests.waiting import until


async def put(house: House, entry: CachedImage, *, replace: bool = False) -> CachedImage:
    _, identity = house.identity()
    stored, _ = await house.cache.put(entry.image, identity, namespace=house.namespace, replace=replace)
    return stored


async def new_entry(house: House) -> CachedImage:
    """A picture under the key of the usual prompt, where nothing lies yet."""
    blue = await house.get("a blue fox")
    _, identity = house.identity()
    return CachedImage(identity.key, blue.entry.image, "default", identity.prompt_digest, house.clock.now_s())


async def on_its_way(house: House, **terms: object) -> asyncio.Task[list[Served] | Pending]:
    """A call whose picture is made, and which the last tier neither takes nor refuses."""
    calls = house.upstream.calls
    house.upstream.hold()
    asking = asyncio.create_task(house.ask(**terms))  # type: ignore[arg-type] # test convenience
    await house.upstream.arrived(calls + 1)
    await house.settle()
    house.s3.gate.clear()
    house.upstream.release()
    await until(lambda: len(house.keeper._writes) == 1)
    return asking


def refuse_as_too_large(tier: FaultyTier) -> None:
    async def put(key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        raise EntryTooLargeError(f"{entry.size_bytes} bytes under {key.variant} are too many, replace={replace}")

    tier.put = put  # type: ignore[method-assign] # a tier with a lower limit


class TestHolding:
    async def test_a_load_cut_short_while_its_picture_is_stored_loses_nothing(self, house: House) -> None:
        house.upstream.hold()
        asking = asyncio.create_task(house.ask())
        await house.upstream.arrived(1)
        house.s3.gate.clear()
        house.upstream.release()
        await until(lambda: house.upstream.images == 1 and len(house.keeper._writes) == 1)
        closing = asyncio.create_task(house.cache.aclose(0))
        await asyncio.wait({asking, closing})
        house.s3.gate.set()
        await house.keeper.aclose(5)
        house.restart()
        assert (await house.get()).tier in {TierName.REDIS, TierName.S3}
        assert house.upstream.calls == 1

    async def test_a_load_cut_short_in_the_moment_its_picture_came_loses_nothing(self, house: House) -> None:
        house.upstream.hold()
        asking = asyncio.create_task(house.ask())
        await house.upstream.arrived(1)
        spent = house.books.spent

        def spent_and_cut_short(namespace: str, microusd: int) -> None:
            spent(namespace, microusd)
            for row in house.cache._flights._flights.values():
                for flight in row:
                    assert flight.task is not None
                    flight.task.cancel()

        house.books.spent = spent_and_cut_short  # type: ignore[method-assign] # the interleaving under test
        house.upstream.release()
        await asyncio.wait({asking})
        await house.keeper.aclose(5)
        house.restart()
        assert (await house.get()).tier in {TierName.REDIS, TierName.S3}
        assert house.upstream.calls == 1

    async def test_a_caller_that_hangs_up_while_its_put_is_stored_does_not_stop_it(self, house: House) -> None:
        image = await house.get("a blue fox")
        await house.settle()
        house.s3.gate.clear()
        putting = asyncio.create_task(put(house, image.entry, replace=True))
        await until(lambda: len(house.keeper._writes) == 1)
        putting.cancel()
        await asyncio.wait({putting})
        house.s3.gate.set()
        await until(lambda: not house.keeper._held)
        _, identity = house.identity()
        stored = await house.s3.get(identity.key)
        assert stored is not None
        assert stored.image.data == image.entry.image.data

    async def test_a_held_picture_that_expired_is_not_served(self, house: House) -> None:
        house.redis.is_down = house.s3.is_down = True
        await house.get(ttl_s=60)
        house.clock.advance(61)
        assert (await house.get()).tier is TierName.UPSTREAM

    async def test_a_held_picture_is_not_given_to_another_identity_of_its_name(self, house: House) -> None:
        house.redis.is_down = house.s3.is_down = True
        entry = (await house.get()).entry
        assert house.keeper.held(entry.key.stand_in) is not None or house.keeper.held(entry.key) is not None
        other = foreign(entry).key
        for slot in (other, other.stand_in):
            assert not house.keeper.is_held(slot)
            assert house.keeper.held(slot) is None
            assert await house.keeper.read_held(slot) is None

    async def test_a_held_picture_is_not_written_over_the_one_that_replaced_it(self, house: House) -> None:
        await house.get()
        await house.settle()
        house.s3.is_down = True
        old = await house.get(cache_policy=CachePolicy.REFRESH)
        house.s3.is_down = False
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        house.clock.advance(60)
        await until(lambda: not house.keeper._writes)
        house.clock.advance(60)
        await until(lambda: not house.keeper._held and not house.keeper._writes)
        assert old.entry.image.data != new.entry.image.data
        for tier in (house.s3, house.redis):
            assert await tier.get(new.entry.key) == new.entry
        assert (await house.get()).entry == new.entry

    async def test_a_picture_too_large_for_the_last_tier_is_served_and_not_offered_for_ever(self, house: House) -> None:
        refuse_as_too_large(house.s3)
        served = await house.get()
        await house.settle()
        assert not house.keeper._held
        assert house.books.snapshot(None).unsaved == 0
        house.restart()
        again = await house.get()
        assert (again.tier, again.entry) == (TierName.REDIS, served.entry)

    async def test_a_stand_in_too_large_for_the_last_tier_stays_where_it_is(self, house: House) -> None:
        house.redis.is_down = house.s3.is_down = True
        served = await house.get()
        assert house.books.snapshot(None).unsaved == 1
        house.s3.is_down = False
        refuse_as_too_large(house.s3)
        house.clock.advance(1)
        await until(lambda: not house.keeper._held)
        assert house.books.snapshot(None).unsaved == 0
        assert (await house.get()).entry == served.entry

    async def test_beyond_its_bound_nothing_more_is_held(self, house: House) -> None:
        house.keeper._max_held_bytes = 0
        house.s3.is_down = True
        served = await house.get()
        assert not house.keeper._held
        assert (await house.get()).entry == served.entry

    async def test_two_pictures_on_their_way_to_one_number_are_both_kept(self, house: House) -> None:
        blue, green = await house.get("blue"), await house.get("green")
        house.s3.gate.clear()
        _, identity = house.identity()
        entries = [
            CachedImage(identity.key, one.entry.image, "default", identity.prompt_digest, house.clock.now_s())
            for one in (blue, green)
        ]
        keeping = [house.keeper.keep(entry) for entry in entries]
        house.s3.gate.set()
        first, second = await asyncio.gather(*keeping)
        assert (first.key.variant, second.key.variant) == (0, 1)
        assert (await house.s3.get(first.key), await house.s3.get(second.key)) == (first, second)


class TestReplacing:
    async def test_a_copy_that_redis_could_not_replace_is_not_read_again(self, house: House) -> None:
        old = await house.get()
        await house.settle()
        house.restart(memory_bytes=0)
        house.redis.is_down = True
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        await house.settle()
        house.redis.is_down = False
        assert (await house.get()).entry == new.entry != old.entry
        house.clock.advance(1)
        await until(lambda: not house.keeper._outdated)
        await house.settle()
        house.restart()
        assert (await house.get()).entry == new.entry

    async def test_a_successor_too_large_for_redis_leaves_no_predecessor_there(self, house: House) -> None:
        await house.get()
        await house.settle()
        refuse_as_too_large(house.redis)
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        await until(lambda: not house.keeper._outdated)
        house.restart()
        assert (await house.get()).entry == new.entry

    async def test_a_replaced_picture_is_not_read_while_the_new_one_is_copied(self, house: House) -> None:
        await house.get()
        await house.settle()
        house.restart(memory_bytes=0)
        house.redis.gate.clear()
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        reading = asyncio.create_task(house.get())
        assert (await reading).entry == new.entry
        house.redis.gate.set()
        await house.settle()

    async def test_what_was_read_before_it_was_replaced_is_not_promoted_afterwards(self, house: House) -> None:
        await house.get()
        other = await house.get("a blue fox")
        await house.settle()
        house.restart()
        _, identity = house.identity()
        await house.redis.delete(identity.key)
        reading = house.s3.get

        async def replaced_meanwhile(key: CacheKey) -> CachedImage | None:
            entry = await reading(key)
            house.s3.get = reading  # type: ignore[method-assign] # once
            await put(house, other.entry, replace=True)
            return entry

        house.s3.get = replaced_meanwhile  # type: ignore[method-assign] # the interleaving under test
        await house.get()
        await house.settle()
        assert (await house.get()).entry.image.data == other.entry.image.data

    async def test_who_refreshes_one_picture_does_not_replace_those_another_asked_for(self, house: House) -> None:
        theirs = await house.get("a blue fox")
        _, identity = house.identity()
        house.upstream.hold()
        house.s3.gate.clear()
        plain = asyncio.create_task(house.ask(n=2))
        await asyncio.sleep(0)
        refresh = asyncio.create_task(house.ask(cache_policy=CachePolicy.REFRESH))
        await asyncio.sleep(0)
        house.s3.gate.set()
        await house.upstream.arrived(2)
        late = CachedImage(identity.key.with_variant(1), theirs.entry.image, "default", identity.prompt_digest, 0.0)
        await house.s3.put(late.key, late, replace=False)
        house.upstream.release()
        await asyncio.gather(plain, refresh)
        assert await house.s3.get(late.key) == late

    async def test_an_old_copy_in_memory_does_not_hide_the_newer_one_below(self, house: House) -> None:
        await house.get()
        await house.settle()
        memory, house.clock._wall_s = house.memory, house.clock.now_s() + 100
        house.restart()
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        await house.settle()
        house.restart()
        house.memory.put(new.entry.key, next(iter(memory._entries.values())))
        assert (await house.get(max_age_s=50)).entry == new.entry
        assert house.upstream.calls == 2

    async def test_a_stand_in_too_old_for_a_caller_never_costs_the_last_tier_its_picture(self, house: House) -> None:
        original = await house.get()
        await house.settle()
        house.restart()
        await house.redis.delete(original.entry.key)
        house.s3.is_down = True
        await house.get()
        house.clock.advance(0.5)
        await house.get(max_age_s=0.1)
        house.s3.is_down = False
        house.clock.advance(60)
        await until(lambda: not house.keeper._held)
        assert await house.s3.get(original.entry.key) == original.entry


class TestPurging:
    async def test_a_copy_still_being_written_does_not_survive_a_purge(self, house: House) -> None:
        house.upstream.hold()
        asking = asyncio.create_task(house.get())
        await house.upstream.arrived(1)
        house.redis.gate.clear()
        house.upstream.release()
        served = await asking
        purging = asyncio.create_task(house.cache.purge(house.namespace, dry_run=False))
        await asyncio.sleep(0)
        house.redis.gate.set()
        await purging
        await house.settle()
        assert await house.redis.get(served.entry.key) is None

    async def test_an_offer_under_way_does_not_survive_a_purge(self, house: House) -> None:
        house.s3.is_down = True
        served = await house.get()
        house.s3.is_down = False
        house.s3.gate.clear()
        house.clock.advance(1)
        await until(lambda: len(house.keeper._writes) == 1)
        purging = asyncio.create_task(house.cache.purge(house.namespace, dry_run=False))
        await asyncio.sleep(0)
        house.s3.gate.set()
        await purging
        assert await house.s3.get(served.entry.key) is None
        with pytest.raises(KeyGoneError):
            await house.cache.get_by_key(served.entry.key, namespace=house.namespace, caller=EVERYTHING, terms=Terms())


class TestShutdown:
    async def test_the_copies_of_a_last_offer_are_written_too(self, house: House) -> None:
        house.redis.is_down = house.s3.is_down = True
        served = await house.get()
        house.redis.is_down = house.s3.is_down = False
        await house.keeper.aclose(5)
        assert not house.keeper._writes
        assert await house.redis.get(served.entry.key) == served.entry

    async def test_closing_ends_within_its_grace_though_a_tier_hangs(self, house: House) -> None:
        house.s3.is_down = True
        await house.get()
        house.s3.gate.clear()
        await asyncio.wait_for(house.keeper.aclose(0.01), timeout=5)
        left = [task for task in asyncio.all_tasks() if task.get_name() in {"keep", "write to s3", "replace copy"}]
        assert left == []

    @pytest.mark.parametrize("grace_s", [0, 0.01], ids=["in a hurry", "in peace"])
    async def test_a_picture_on_its_way_to_a_last_tier_that_hangs_is_found_by_the_next_life(
        self, house: House, grace_s: float
    ) -> None:
        asking = await on_its_way(house)
        await house.cache.aclose(0)
        await asyncio.wait_for(house.keeper.aclose(grace_s), timeout=5)
        await asyncio.wait({asking})
        house.s3.gate.set()
        house.restart()
        served = await house.get()
        assert (served.tier, house.upstream.calls) == (TierName.REDIS, 1)
        assert await house.s3.get(served.entry.key) == served.entry

    async def test_a_picture_the_last_tier_took_while_closing_leaves_no_stand_in(self, house: House) -> None:
        asking = await on_its_way(house)
        _, identity = house.identity()
        house.redis.gate.clear()
        closing = asyncio.create_task(house.keeper.aclose(5))
        await until(lambda: len(house.keeper._writes) == 2)
        house.s3.gate.set()
        await until(lambda: len(house.keeper._outdated) == 1)
        house.redis.gate.set()
        await closing
        answer = await asking
        assert not isinstance(answer, Pending)
        assert await house.redis.get(identity.key.stand_in) is None
        assert await house.redis.get(identity.key) == await house.s3.get(identity.key) == answer[0].entry

    async def test_the_key_of_a_picture_on_its_way_never_names_it_before_the_last_tier_says_so(
        self, house: House
    ) -> None:
        blue = await house.get("a blue fox")
        await on_its_way(house)
        _, identity = house.identity()
        theirs = CachedImage(identity.key, blue.entry.image, "default", identity.prompt_digest, house.clock.now_s())
        await house.s3._tier.put(theirs.key, theirs, replace=False)
        await house.cache.aclose(0)
        await house.keeper.aclose(0)
        assert await house.redis.get(theirs.key) is None
        house.s3.gate.set()
        house.restart()
        assert (await house.get()).entry == theirs

    async def test_a_refresh_on_its_way_to_a_last_tier_that_hangs_is_found_by_the_next_life(self, house: House) -> None:
        old = await house.get()
        await house.settle()
        await on_its_way(house, cache_policy=CachePolicy.REFRESH)
        await house.cache.aclose(0)
        await house.keeper.aclose(0)
        house.s3.gate.set()
        house.restart()
        served = await house.get()
        assert served.entry.image.data != old.entry.image.data
        assert (served.tier, house.upstream.calls) == (TierName.REDIS, 2)

    async def test_a_picture_on_its_way_to_review_waits_there_in_the_next_life(self, house: House) -> None:
        blue = await house.get("a blue fox")
        await house.settle()
        _, identity = house.identity()
        entry = CachedImage(identity.key, blue.entry.image, "default", identity.prompt_digest, house.clock.now_s())
        house.s3.gate.clear()
        kept = house.reviews.hold(entry)
        await house.keeper.aclose(0)
        assert kept.cancelled()
        house.s3.gate.set()
        house.restart()
        found = await house.reviews.find(identity.key)
        assert found is not None
        assert found.image == entry.image

    async def test_what_only_memory_had_is_offered_to_the_faster_tiers_too(self, house: House) -> None:
        house.redis.is_down = house.s3.is_down = True
        served = await house.get()
        house.redis.is_down = False
        house.s3.gate.clear()
        await house.cache.aclose(0)
        await house.keeper.aclose(0)
        assert await house.redis.get(served.entry.key.stand_in) == served.entry

    async def test_closing_that_is_cancelled_still_saves_what_is_on_its_way(self, house: House) -> None:
        await on_its_way(house)
        _, identity = house.identity()
        await house.cache.aclose(0)
        house.redis.gate.clear()
        closing = asyncio.create_task(house.keeper.aclose(300))
        await until(lambda: len(house.keeper._writes) == 2)
        closing.cancel()
        await asyncio.sleep(0)
        house.redis.gate.set()
        await asyncio.wait({closing})
        assert closing.cancelled()
        assert await house.redis.get(identity.key.stand_in) is not None
        assert not house.keeper._writes

    async def test_a_stand_in_handed_over_right_before_closing_is_offered_to_the_last_tier(self, house: House) -> None:
        entry = await new_entry(house)
        kept = house.keeper.keep_stand_in(entry)
        await house.keeper.aclose(5)
        assert await kept == await house.s3.get(entry.key) == entry
        assert await house.redis.get(entry.key.stand_in) is None

    async def test_a_picture_handed_over_right_before_closing_is_offered_to_the_last_tier(self, house: House) -> None:
        entry = await new_entry(house)
        kept = house.keeper.keep(entry)
        await house.keeper.aclose(5)
        assert await kept == await house.s3.get(entry.key) == await house.redis.get(entry.key) == entry
        assert await house.redis.get(entry.key.stand_in) is None


class TestFewTiers:
    async def test_with_memory_alone_a_put_and_a_generation_of_one_request_are_both_kept(self, house: House) -> None:
        other = await house.get("a blue fox")
        house.restart(tiers=[])
        house.upstream.hold()
        asking = asyncio.create_task(house.get())
        await house.upstream.arrived(2)
        stored = await put(house, other.entry)
        house.upstream.release()
        made = await asking
        assert (stored.key.variant, made.entry.key.variant) == (0, 1)
        answer = await house.ask(n=2)
        assert not isinstance(answer, Pending)
        assert [one.entry for one in answer] == [stored, made.entry]

    async def test_with_memory_alone_refresh_put_find_and_purge_work(self, house: House) -> None:
        house.restart(tiers=[])
        old = await house.get()
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        assert (await house.get()).entry == new.entry != old.entry
        found, silent = await house.cache.find([new.entry.key])
        assert (found[0].tier, silent) == (TierName.MEMORY, [])
        assert (await house.cache.purge(house.namespace, dry_run=False)).images == 1
        assert (await house.get()).tier is TierName.UPSTREAM
        assert house.upstream.calls == 3

    async def test_with_redis_alone_an_outage_is_survived_in_memory(self, house: House) -> None:
        house.restart(tiers=[house.redis])
        house.redis.is_down = True
        served = await house.get()
        assert house.books.snapshot(None).unsaved == 1
        house.memory.delete(served.entry.key.stand_in)
        assert (await house.get()).entry == served.entry
        house.redis.is_down = False
        house.clock.advance(1)
        await until(lambda: not house.keeper._held)
        assert await house.redis.get(served.entry.key) == served.entry
