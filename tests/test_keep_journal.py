"""With a journal, what was paid for outlives us: safe before its caller is told, and brought home by a later life."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cacheserver import journal as journal_module
from cacheserver.errors import (
    EntryTooLargeError,
    JournalFullError,
    KeyGoneError,
    NotCachedError,
    TierUnreachableError,
)
from cacheserver.journal import Journal, Record
from cacheserver.keep import at_once
from cacheserver.model import CachedImage, CacheKey, CachePolicy, Pending, Served, Terms, TierName
from cacheserver.paying import UnknownPolicy
from tests.fakes import FakeClock
from tests.house import EVERYTHING, House
from tests.waiting import until

LATE_S = 1.0


class Lives:
    """A house with a journal, whose process can be killed and started anew."""

    def __init__(self, house: House, directory: Path, clock: FakeClock) -> None:
        self.house = house
        self._directory = directory
        self._clock = clock
        self.journal: Journal
        self._journals: list[Journal] = []
        self._older = asyncio.all_tasks()

    async def begin(
        self,
        *,
        copies: bool = False,
        memory_bytes: int = 64 * 1024 * 1024,
        until_last_is_well: Callable[[], Awaitable[object]] = at_once,
        **options: int,
    ) -> House:
        """A new process, after one that was killed if there was one: nothing of it was brought to an end."""
        await self._kill()
        self.journal = await Journal.open(self._directory, clock=self._clock, **options)  # type: ignore[arg-type] # convenience
        self._journals.append(self.journal)
        unknown = UnknownPolicy(budget_microusd_per_hour=1_000_000_000)
        self.house.restart(
            journal=self.journal,
            copies=copies,
            memory_bytes=memory_bytes,
            unknown=unknown,
            until_last_is_well=until_last_is_well,
        )
        self.house.keeper.restore()
        return self.house

    async def _kill(self) -> None:
        """What the process had in hand is gone; its threads end what they have begun, as the system's calls do."""
        tasks = [task for task in asyncio.all_tasks() if task not in self._older and task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for journal in self._journals:
            await journal._workers.aclose(5)

    async def aclose(self) -> None:
        for journal in self._journals:
            await journal.aclose()


@pytest.fixture
async def lives(house: House, tmp_path: Path, clock: FakeClock) -> AsyncIterator[Lives]:
    lives = Lives(house, tmp_path / "journal", clock)
    await lives.begin()
    yield lives
    house.s3.is_down = house.redis.is_down = False
    house.s3.gate.set()
    house.redis.gate.set()
    await house.keeper.aclose(5)
    await lives.aclose()


async def new_entry(house: House, prompt: str = "a red fox") -> CachedImage:
    """A picture under the key of a prompt where nothing lies yet."""
    blue = await house.get("a blue fox")
    _, identity = house.identity(prompt)
    return CachedImage(identity.key, blue.entry.image, "default", identity.prompt_digest, house.clock.now_s())


async def answered_late(house: House, prompt: str = "a red fox", **terms: object) -> Served:
    """A call whose picture the last tier neither takes nor refuses, answered when it is late."""
    calls = house.upstream.calls
    house.upstream.hold()
    house.s3.gate.set()
    asking = asyncio.create_task(house.ask(prompt, **terms))
    await house.upstream.arrived(calls + 1)
    house.s3.gate.clear()
    house.upstream.release()
    await in_time(house, asking)
    answer = asking.result()
    assert not isinstance(answer, Pending)
    return answer[0]


async def in_time(house: House, *tasks: asyncio.Future[Any]) -> None:
    """Let time pass until these are done."""

    def are_done() -> bool:
        house.clock.advance(LATE_S / 4)
        return all(task.done() for task in tasks)

    await until(are_done)


async def home(house: House, lives: Lives) -> None:
    """Wait until the last tier has everything, time passing."""

    async def is_home() -> bool:
        house.clock.advance(1)
        await asyncio.sleep(0)
        return not house.keeper._held and lives.journal.entries == 0

    await until(is_home)
    await house.settle()


class TestAnswering:
    async def test_in_good_times_the_last_tier_says_the_number_and_the_journal_is_empty_again(
        self, lives: Lives
    ) -> None:
        served = await lives.house.get()
        assert await lives.house.s3.get(served.entry.key) == served.entry
        await until(lambda: lives.journal.entries == 0)

    async def test_a_last_tier_that_is_late_keeps_nobody_waiting_whose_picture_is_written_down(
        self, lives: Lives
    ) -> None:
        served = await answered_late(lives.house)
        assert served.tier is TierName.UPSTREAM
        lives.house.s3.gate.set()
        await home(lives.house, lives)
        assert await lives.house.s3.get(served.entry.key) == served.entry

    async def test_nobody_is_answered_late_before_the_journal_has_the_picture(
        self, lives: Lives, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house = lives.house
        entry = await new_entry(house)
        house.s3.gate.clear()
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        append = lives.journal.append

        def slow(*args: object, **fields: object) -> object:
            record = append(*args, **fields)  # type: ignore[arg-type] # as it is called
            record.written = written
            return record

        monkeypatch.setattr(lives.journal, "append", slow)
        kept = house.keeper.keep(entry)
        for _ in range(20):
            await asyncio.sleep(0)
            house.clock.advance(LATE_S)
        assert not kept.done()
        written.set_result(None)
        await in_time(house, kept)
        assert kept.result() == entry

    async def test_a_picture_whose_caller_waits_yet_is_given_to_nobody_else(self, lives: Lives) -> None:
        house = lives.house
        entry = await new_entry(house)
        house.s3.gate.clear()
        kept = house.keeper.keep(entry)
        assert house.keeper.held(entry.key) is None
        reading = asyncio.create_task(house.keeper.read_held(entry.key))
        await asyncio.sleep(0)
        assert not reading.done()
        house.s3.gate.set()
        await kept
        assert await reading == entry

    async def test_no_faster_tier_has_a_picture_before_the_journal_has(
        self, lives: Lives, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house = lives.house
        entry = await new_entry(house)
        await house.settle()
        house.s3.is_down = True
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        append = lives.journal.append

        def slow(*args: Any, **fields: Any) -> Record:
            record = append(*args, **fields)
            record.written = written
            return record

        monkeypatch.setattr(lives.journal, "append", slow)
        kept = house.keeper.keep(entry)
        await until(lambda: not house.keeper._writes)
        for _ in range(20):
            await asyncio.sleep(0)
        assert await house.redis.get(entry.key) is None
        assert not house.memory.contains(entry.key)
        written.set_result(None)
        assert await kept == entry

    async def test_with_copies_a_late_picture_is_answered_when_a_faster_tier_has_it_too(self, lives: Lives) -> None:
        house = await lives.begin(copies=True)
        entry = await new_entry(house)
        await house.settle()
        house.s3.gate.clear()
        house.redis.gate.clear()
        kept = house.keeper.keep(entry)

        def is_copied() -> bool:
            house.clock.advance(LATE_S / 4)
            return len(house.keeper._writes) == 2

        await until(is_copied)
        assert not kept.done()
        house.redis.gate.set()
        assert await kept == entry
        assert await house.redis.get(entry.key.stand_in) == entry

    async def test_with_copies_a_picture_that_the_journal_alone_has_is_answered_and_counted(self, lives: Lives) -> None:
        house = await lives.begin(copies=True)
        house.redis.is_down = house.s3.is_down = True
        await house.get()
        assert house.books.snapshot(None).unsaved == 1
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)
        assert house.books.snapshot(None).unsaved == 0

    async def test_without_copies_the_journal_alone_is_safe(self, lives: Lives) -> None:
        house = lives.house
        house.redis.is_down = house.s3.is_down = True
        await house.get()
        assert house.books.snapshot(None).unsaved == 0


class TestKilled:
    async def test_what_was_answered_late_is_brought_home_by_the_next_life(self, lives: Lives) -> None:
        served = await answered_late(lives.house)
        house = await lives.begin()
        house.s3.gate.set()
        await home(house, lives)
        assert await house.s3.get(served.entry.key) == served.entry
        assert (await house.get()).entry == served.entry
        assert house.upstream.calls == 1

    async def test_what_every_tier_was_away_for_is_served_by_the_next_life_and_brought_home(self, lives: Lives) -> None:
        house = lives.house
        house.redis.is_down = house.s3.is_down = True
        served = await house.get()
        house = await lives.begin()
        again = await house.get()
        assert (again.tier, again.entry) == (TierName.JOURNAL, served.entry)
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)
        assert await house.s3.get(served.entry.key) == served.entry
        assert house.upstream.calls == 1

    async def test_what_was_paid_for_while_nobody_knew_better_becomes_a_variant_of_its_own(self, lives: Lives) -> None:
        house = lives.house
        original = await house.get()
        await until(lambda: lives.journal.entries == 0)
        house = await lives.begin()
        house.redis.is_down = house.s3.is_down = True
        second = await house.get()
        assert second.entry.image.data != original.entry.image.data
        house = await lives.begin()
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)
        assert await house.s3.get(original.entry.key) == original.entry
        moved = await house.s3.get(original.entry.key.with_variant(1))
        assert moved is not None
        assert moved.image == second.entry.image

    async def test_two_pictures_of_one_number_are_both_brought_home(self, lives: Lives) -> None:
        house = lives.house
        blue, green = await house.get("blue"), await house.get("green")
        house.s3.is_down = True
        _, identity = house.identity()
        for one in (blue, green):
            entry = CachedImage(identity.key, one.entry.image, "default", identity.prompt_digest, house.clock.now_s())
            await house.keeper.keep(entry)
        house = await lives.begin()
        house.s3.is_down = False
        await home(house, lives)
        found = [await house.s3.get(identity.key.with_variant(variant)) for variant in (0, 1)]
        assert [entry.image if entry else None for entry in found] == [blue.entry.image, green.entry.image]

    async def test_a_picture_for_review_waits_there_in_the_next_life(self, lives: Lives) -> None:
        house = lives.house
        entry = await new_entry(house)
        house.redis.is_down = house.s3.is_down = True
        await house.reviews.hold(entry)
        house = await lives.begin()
        found = await house.reviews.find(entry.key)
        assert found is not None
        assert found.image == entry.image
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)
        assert await house.s3.get(entry.key.in_review) is not None
        assert await house.s3.get(entry.key) is None

    async def test_a_refreshed_picture_replaces_the_old_one_in_the_next_life_too(self, lives: Lives) -> None:
        house = lives.house
        await house.get()
        await house.settle()
        house.s3.is_down = True
        new = await house.get(cache_policy=CachePolicy.REFRESH)
        house = await lives.begin()
        assert (await house.get()).entry == new.entry
        house.s3.is_down = False
        await home(house, lives)
        assert await house.s3.get(new.entry.key) == await house.redis.get(new.entry.key) == new.entry

    async def test_a_refresh_that_comes_home_late_leaves_a_newer_one_alone(self, lives: Lives) -> None:
        house = lives.house
        await house.get()
        await house.settle()
        house.s3.is_down = True
        late = await house.get(cache_policy=CachePolicy.REFRESH)
        other = await house.get("a blue fox")
        house.clock.advance(0.5)
        newer = replace(late.entry, image=other.entry.image, create_time_s=house.clock.now_s())
        house.s3.is_down = False
        await house.s3.put(newer.key, newer, replace=True)
        house = await lives.begin()
        await home(house, lives)
        await until(lambda: not house.keeper._outdated)
        assert await house.s3.get(newer.key) == newer
        assert (await house.get()).entry == newer

    async def test_what_a_refresh_took_the_place_of_stays_until_the_new_one_is_safe(
        self, lives: Lives, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house = lives.house
        house.redis.is_down = house.s3.is_down = True
        old, blue = await house.get(), await house.get("a blue fox")
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(lives.journal, "append", lambda *_, **__: Record(99, 0, never))
        house.keeper.keep(replace(old.entry, image=blue.entry.image), replace=True)
        await asyncio.sleep(0)
        house = await lives.begin()
        assert (await house.get()).entry == old.entry


class TestAnOutage:
    async def test_what_waits_takes_disk_and_no_memory(self, lives: Lives) -> None:
        house = await lives.begin(memory_bytes=0)
        house.s3.is_down = True
        served = [await house.get(f"fox {number}") for number in range(20)]
        await house.settle()
        assert lives.journal.entries == 20
        for held in house.keeper._held.values():
            assert (len(held.entry.image.data), held.kept, held.task) == (0, None, None)
        house.redis.is_down = True
        again = [await house.get(f"fox {number}") for number in range(20)]
        assert {one.tier for one in again} == {TierName.JOURNAL}
        assert [one.entry for one in again] == [one.entry for one in served]
        assert house.upstream.calls == 20

    async def test_all_of_it_goes_home_when_the_last_tier_is_back(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        served = [await house.get(f"fox {number}") for number in range(100)]
        house.s3.is_down = False
        await home(house, lives)
        assert [await house.s3.get(one.entry.key) for one in served] == [one.entry for one in served]

    async def test_its_copy_is_moved_to_its_number_and_one_that_is_gone_not_sent_again(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        there, gone = [(await house.get(prompt)).entry for prompt in ("there", "gone")]

        async def are_copied() -> bool:
            return all(await house.redis.find([entry.key.stand_in for entry in (there, gone)]))

        await until(are_copied)
        await house.redis.delete(gone.key.stand_in)
        house.s3.is_down = False
        await home(house, lives)
        await until(lambda: not house.keeper._writes)
        assert [await house.s3.get(entry.key) for entry in (there, gone)] == [there, gone]
        assert [await house.redis.get(entry.key) for entry in (there, gone)] == [there, None]
        assert [await house.redis.get(entry.key.stand_in) for entry in (there, gone)] == [None, None]

    async def test_it_is_offered_as_soon_as_the_last_tier_is_known_to_be_well_and_not_before(
        self, lives: Lives, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        well = asyncio.Event()

        async def until_well() -> None:
            events.append("asked")
            await well.wait()
            events.append("well")

        house = await lives.begin(until_last_is_well=until_well)
        house.s3.is_down = True
        served = await house.get()
        put = house.s3.put

        async def watched(key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
            events.append("offered")
            return await put(key, entry, replace=replace)

        def is_asked() -> bool:
            house.clock.advance(1)
            return bool(events)

        monkeypatch.setattr(house.s3, "put", watched)
        await until(is_asked)
        house.s3.is_down = False
        well.set()
        await until(lambda: lives.journal.entries == 0)
        assert events == ["asked", "well", "offered"]
        assert await house.s3.get(served.entry.key) == served.entry

    async def test_what_goes_home_late_takes_no_place_in_memory(self, lives: Lives) -> None:
        house = await lives.begin(memory_bytes=0)
        house.s3.is_down = True
        served = [await house.get(f"fox {number}") for number in range(3)]
        house = await lives.begin()
        house.s3.is_down = False
        await home(house, lives)
        assert not any(house.memory.contains(one.entry.key) for one in served)

    async def test_a_picture_that_waits_and_is_put_again_is_answered_whole(self, lives: Lives) -> None:
        house = lives.house
        entry = await new_entry(house)
        house.s3.is_down = True
        first = await house.keeper.keep(entry)
        again = await house.keeper.keep(entry)
        assert first == again == entry
        assert len(house.keeper._held) == 1

    async def test_while_others_wait_a_new_picture_is_not_offered_in_vain(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        await house.get("fox 1")
        puts = 0
        put = house.s3.put

        async def counted(key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
            nonlocal puts
            puts += 1
            return await put(key, entry, replace=replace)

        house.s3.put = counted  # type: ignore[method-assign] # to see it called
        await house.get("fox 2")
        assert puts == 0

    async def test_one_that_the_last_tier_never_takes_does_not_hold_up_the_others(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        stuck = await house.get("stuck")
        others = [await house.get(f"fox {number}") for number in range(5)]
        house.s3.is_down = False
        put = house.s3.put

        async def picky(key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
            if entry.image.sha256 == stuck.entry.image.sha256:
                house.s3.is_down = True
                try:
                    return await put(key, entry, replace=replace)
                finally:
                    house.s3.is_down = False
            return await put(key, entry, replace=replace)

        house.s3.put = picky  # type: ignore[method-assign] # a tier that hates one picture

        async def others_are_home() -> bool:
            house.clock.advance(1)
            await asyncio.sleep(0)
            return len(house.keeper._held) == 1

        await until(others_are_home)
        assert [await house.s3.get(one.entry.key) for one in others] == [one.entry for one in others]
        house.s3.put = put  # type: ignore[method-assign] # as it was

    async def test_a_damaged_record_is_counted_and_holds_up_nothing(self, lives: Lives, tmp_path: Path) -> None:
        house = await lives.begin(memory_bytes=0)
        house.redis.is_down = house.s3.is_down = True
        damaged, intact = await house.get("fox 1"), await house.get("fox 2")
        file = min((tmp_path / "journal").glob("0*"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)
        assert await house.s3.get(damaged.entry.key) is None
        assert await house.s3.get(intact.entry.key) == intact.entry
        metric = house.registry.get_sample_value("cacheserver_corrupt_total", {"tier": "journal"})
        assert metric == 1

    async def test_a_record_that_somebody_removed_holds_up_nothing(self, lives: Lives, tmp_path: Path) -> None:
        house = lives.house
        house.redis.is_down = house.s3.is_down = True
        await house.get("fox 1")
        intact = await house.get("fox 2")
        min((tmp_path / "journal").glob("0*")).unlink()
        house = await lives.begin()
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)
        assert await house.s3.get(intact.entry.key) == intact.entry

    async def test_a_picture_too_large_for_the_last_tier_leaves_the_journal(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        served = await house.get()
        house.s3.is_down = False

        async def refuse(key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
            raise EntryTooLargeError(f"{entry.size_bytes} bytes under {key.variant}, replace={replace}")

        house.s3.put = refuse  # type: ignore[method-assign] # a tier with a lower limit
        await home(house, lives)
        assert await house.redis.get(served.entry.key.stand_in) == served.entry

    async def test_a_picture_that_no_tier_takes_is_put_aside_and_not_lost(self, lives: Lives, tmp_path: Path) -> None:
        house = lives.house
        house.redis.is_down = house.s3.is_down = True
        await house.get()
        house.s3.is_down = False

        async def refuse(key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
            raise EntryTooLargeError(f"{entry.size_bytes} bytes under {key.variant}, replace={replace}")

        house.s3.put = refuse  # type: ignore[method-assign] # a tier with a lower limit
        await home(house, lives)
        assert len(list((tmp_path / "journal" / "aside").iterdir())) == 1


class TestPurging:
    async def test_what_was_purged_while_it_waited_does_not_come_back(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        served = await house.get()
        with pytest.raises(TierUnreachableError) as unreachable:
            await house.cache.purge(house.namespace, dry_run=False)
        assert unreachable.value.tiers == (TierName.S3,)
        assert lives.journal.entries == 0
        house = await lives.begin()
        house.s3.is_down = False
        house.clock.advance(5)
        with pytest.raises(KeyGoneError):
            await house.cache.get_by_key(served.entry.key, namespace=house.namespace, caller=EVERYTHING, terms=Terms())
        assert await house.s3.get(served.entry.key) is None

    async def test_a_purge_waits_for_the_record_of_what_the_last_tier_has_just_taken(
        self, lives: Lives, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house = lives.house
        await house.get()
        flushed: list[Path] = []
        flush = journal_module.flush
        monkeypatch.setattr(journal_module, "flush", lambda path: (flushed.append(path), flush(path)))
        await house.cache.purge(house.namespace, dry_run=False)
        assert lives.journal.entries == 0
        assert [path.name for path in flushed][-1] == "journal"

    async def test_an_offer_from_the_journal_that_is_under_way_does_not_survive_a_purge(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        served = await house.get()
        house.s3.is_down = False
        house.s3.gate.clear()
        await until(lambda: house.clock.sleepers > 0)
        house.clock.advance(1)
        await until(lambda: len(house.keeper._writes) == 1)
        purging = asyncio.create_task(house.cache.purge(house.namespace, dry_run=False))
        await asyncio.sleep(0)
        house.s3.gate.set()
        await purging
        assert await house.s3.get(served.entry.key) is None
        assert lives.journal.entries == 0

    async def test_a_journal_that_cannot_forget_is_among_the_tiers_not_purged(
        self, lives: Lives, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house = lives.house
        house.redis.is_down = house.s3.is_down = True
        await house.get()
        house.redis.is_down = house.s3.is_down = False

        def refused(_journal: Journal, _number: int) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "_unlink", refused)
            with pytest.raises(TierUnreachableError) as unreachable:
                await house.cache.purge(house.namespace, dry_run=False)
        assert unreachable.value.tiers == (TierName.JOURNAL,)
        await house.cache.purge(house.namespace, dry_run=False)
        assert lives.journal.entries == 0


class TestWithoutRoom:
    async def test_a_full_journal_means_written_through(self, lives: Lives) -> None:
        house = await lives.begin(max_bytes=10)
        served = await house.get()
        assert await house.s3.get(served.entry.key) == served.entry
        house.redis.is_down = house.s3.is_down = True
        await house.get("a blue fox")
        assert house.books.snapshot(None).unsaved == 1
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)

    async def test_a_disk_that_takes_nothing_means_written_through(
        self, lives: Lives, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_handle: int, _part: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(journal_module, "_write_all", full)
        house = lives.house
        served = await house.get()
        assert await house.s3.get(served.entry.key) == served.entry
        house.redis.is_down = house.s3.is_down = True
        held = await house.get("a blue fox")
        assert house.books.snapshot(None).unsaved == 1
        house.memory.delete(held.entry.key)
        house.memory.delete(held.entry.key.stand_in)
        assert (await house.get("a blue fox")).entry == held.entry
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)
        assert await house.s3.get(held.entry.key) == held.entry


class TestTwins:
    async def test_a_picture_in_its_stand_in_slot_is_not_kept_a_second_time_under_its_number(
        self, lives: Lives
    ) -> None:
        house = lives.house
        served = await answered_late(house)
        house.s3.gate.set()
        house.s3.is_down = True
        again = await house.keeper.keep(served.entry)
        assert again == served.entry
        assert len(house.keeper._held) == 1

    async def test_two_records_of_one_picture_are_brought_home_as_one(self, lives: Lives) -> None:
        house = lives.house
        entry = await new_entry(house)
        await until(lambda: lives.journal.entries == 0)
        for slot in (entry.key.stand_in, entry.key):
            record = lives.journal.append(slot, entry, replace=False, handed_over_s=house.clock.now_s())
            assert record.written is not None
            await record.written
        house = await lives.begin()
        await home(house, lives)
        assert await house.s3.get(entry.key) == entry
        assert await house.s3.get(entry.key.with_variant(1)) is None


class TestAnySchedule:
    """Calls, purges, outages and deaths in any order: what callers were given is in the last tier in the end.

    But for what was replaced or purged: a copy of that may lie in a tier that was away then, and be served once more.
    """

    @pytest.mark.parametrize("seed", range(40))
    async def test_nothing_given_is_lost_and_nothing_purged_comes_back(self, lives: Lives, seed: int) -> None:
        chance = Random(seed)  # noqa: S311 - a schedule
        schedule = _Schedule(lives)
        for _ in range(40):
            await schedule.step(chance)
        house = lives.house
        house.s3.is_down = house.redis.is_down = False
        await home(house, lives)
        for prompt, pictures in schedule.owed.items():
            _, identity = house.identity(prompt)
            stored = [await house.s3.get(identity.key.with_variant(variant)) for variant in range(12)]
            in_last = {entry.image.sha256 for entry in stored if entry is not None}
            assert pictures <= in_last
            assert schedule.purged.isdisjoint(in_last)


_HAPPENINGS = ["refresh", "purge", "s3", "s3", "redis", "die", "die in a call", "die in a call", "wait", "wait"]


class _Schedule:
    """What happens, and what is owed for it: by prompt, the pictures that callers were given."""

    def __init__(self, lives: Lives) -> None:
        self._lives = lives
        self.owed: dict[str, set[str]] = {}
        self.let_go: set[str] = set()
        self.purged: set[str] = set()

    def _given(self, prompt: str, served: Served) -> None:
        picture = served.entry.image.sha256
        assert picture not in self.purged
        if picture not in self.let_go:
            self.owed.setdefault(prompt, set()).add(picture)

    async def step(self, chance: Random) -> None:
        house, prompt = self._lives.house, f"fox {chance.randrange(4)}"
        match chance.choice([*["get"] * 8, *_HAPPENINGS]):
            case "get":
                self._given(prompt, await house.get(prompt))
            case "refresh":
                self.let_go |= self.owed.pop(prompt, set())
                self.owed[prompt] = {(await house.get(prompt, cache_policy=CachePolicy.REFRESH)).entry.image.sha256}
                house.clock.advance(0.001)
            case "purge":
                pictures = set[str]().union(*self.owed.values())
                self.owed.clear()
                self.let_go |= pictures
                with suppress(TierUnreachableError):
                    await house.cache.purge(house.namespace, dry_run=False)
                    self.purged |= pictures
            case "s3":
                house.s3.is_down = not house.s3.is_down
            case "redis":
                house.redis.is_down = not house.redis.is_down
            case "die":
                await self._lives.begin()
            case "die in a call":
                asking = asyncio.create_task(house.get(prompt))
                for _ in range(chance.randrange(40)):
                    await asyncio.sleep(0)
                await self._lives.begin()
                if not asking.cancelled() and asking.exception() is None:
                    self._given(prompt, asking.result())
            case _:
                house.clock.advance(chance.choice([0.5, 1, 12]))
                await house.settle()


class TestBackpressure:
    async def test_a_journal_that_is_nearly_full_takes_nothing_new_and_hits_go_on(self, lives: Lives) -> None:
        house = lives.house
        hit = await house.get("cached")
        await until(lambda: lives.journal.entries == 0)
        house.s3.is_down = True
        waits = await house.get("waits")
        lives.journal.max_bytes = lives.journal.size_bytes
        with pytest.raises(JournalFullError):
            await house.get("new")
        _, identity = house.identity("put")
        with pytest.raises(JournalFullError):
            await house.cache.put(hit.entry.image, identity, namespace=house.namespace)
        with pytest.raises(NotCachedError):
            await house.get("new", cache_policy=CachePolicy.ONLY_IF_CACHED)
        assert (await house.get("cached")).entry == hit.entry
        assert (await house.get("waits")).entry == waits.entry
        assert house.upstream.calls == 2
        lives.journal.max_bytes *= 100
        await house.get("new")

    async def test_above_the_high_water_mark_a_generation_begins_later(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        for number in range(17):
            await house.get(f"waits {number}")
        lives.journal.max_bytes = int(lives.journal.size_bytes / 0.85)
        asking = asyncio.create_task(house.get("new"))
        await until(lambda: house.clock.sleepers >= 2)
        house.clock.advance(4.9)
        await asyncio.sleep(0)
        assert (asking.done(), house.upstream.calls) == (False, 17)
        house.clock.advance(0.2)
        await asking
        assert house.upstream.calls == 18

    async def test_what_is_being_made_counts_for_the_room_that_is_left(self, lives: Lives) -> None:
        house = lives.house
        house.s3.is_down = True
        for number in range(17):
            await house.get(f"waits {number}")
        lives.journal.max_bytes = int(lives.journal.size_bytes / 0.84)
        house.upstream.hold()
        making = [asyncio.create_task(house.get(f"new {number}")) for number in range(9)]
        await until(lambda: sum(task.done() for task in making) == 6)
        house.clock.advance(6)
        await house.upstream.arrived(20)
        house.upstream.release()
        outcomes = await asyncio.gather(*making, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, JournalFullError)]
        assert len(refused) == 6
        assert lives.journal.share <= 1


class TestShutdown:
    async def test_what_the_last_tier_does_not_take_is_left_to_the_next_life(self, lives: Lives) -> None:
        house = lives.house
        house.redis.is_down = house.s3.is_down = True
        served = [await house.get(f"fox {number}") for number in range(3)]
        await house.keeper.aclose(5)
        house = await lives.begin()
        house.redis.is_down = house.s3.is_down = False
        await home(house, lives)
        assert [await house.s3.get(one.entry.key) for one in served] == [one.entry for one in served]

    async def test_what_waits_is_offered_once_more(self, lives: Lives) -> None:
        house = lives.house
        house.redis.is_down = house.s3.is_down = True
        served = [await house.get(f"fox {number}") for number in range(3)]
        house.redis.is_down = house.s3.is_down = False
        await house.keeper.aclose(5)
        assert [await house.s3.get(one.entry.key) for one in served] == [one.entry for one in served]
        await until(lambda: lives.journal.entries == 0)


class TestNumbers:
    async def test_a_picture_that_took_the_next_number_has_that_in_a_later_life_too(self, lives: Lives) -> None:
        house = lives.house
        made = (await house.get()).entry
        other = replace(made, image=replace(made.image, data=b"another replica's", sha256="e" * 64))
        house.memory.delete(made.key)
        await house.redis.put(made.key, other, replace=True)
        await house.s3.delete(made.key)
        house.s3.is_down = True
        late = await house.keeper.keep(made)
        await lives.journal.removed()
        house = await lives.begin()
        assert late.key.variant == 1
        assert not house.keeper.is_held(made.key)
        restored = await house.keeper.read_held(late.key)
        assert restored is not None
        assert restored.image.sha256 == made.image.sha256
        assert lives.journal.entries == 1
