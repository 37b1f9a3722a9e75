"""What is written into the journal is found by a later life, whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheserver import journal as journal_module
from cacheserver.errors import ConfigError, CorruptEntryError, JournalFullError, TierError
from cacheserver.journal import Journal, Record
from cacheserver.model import CachedImage, JournalSync
from tests.fakes import FakeClock
from tests.tier_contract import make_entry, make_key
from tests.waiting import until

Open = Callable[..., Awaitable[Journal]]

NOW_S = 1_800_000_000.5


@pytest.fixture
async def opened(tmp_path: Path, clock: FakeClock) -> Open:
    """Opens the journal as one life after another does; all are closed in the end."""

    async def life(**options: object) -> Journal:
        return await Journal.open(tmp_path / "journal", clock=clock, **options)  # type: ignore[arg-type] # convenience

    return life


def picture(number: int = 0, **fields: object) -> CachedImage:
    data = f"picture {number} ".encode() * 50
    return make_entry(make_key(f"prompt {number}"), data, **fields)  # type: ignore[arg-type] # test convenience


async def write(journal: Journal, entry: CachedImage, *, replace: bool = False) -> Record:
    record = journal.append(entry.key, entry, replace=replace, handed_over_s=NOW_S)
    await record.written
    return record


def file_of(tmp_path: Path, record: Record) -> Path:
    return tmp_path / "journal" / f"{record.number:016}"


class TestLivesInARow:
    async def test_a_later_life_finds_what_was_written_in_its_order(self, opened: Open) -> None:
        first = await opened()
        entries = [picture(number) for number in range(12)]
        for entry in entries:
            await write(first, entry)
        await first.aclose()
        second = await opened()
        assert [left.head.slot for left in second.left] == [entry.key for entry in entries]
        assert [await second.read(left.record) for left in second.left] == entries
        assert (second.entries, second.size_bytes) == (first.entries, first.size_bytes)
        await second.aclose()

    async def test_it_finds_slot_haste_and_time_as_they_were_handed_over(self, opened: Open) -> None:
        first = await opened()
        entry, refreshed = picture(1), picture(2)
        await first.append(entry.key.stand_in, entry, replace=False, handed_over_s=NOW_S).written
        await write(first, refreshed, replace=True)
        await first.aclose()
        second = await opened()
        heads = [left.head for left in second.left]
        assert [(head.slot, head.replace, head.handed_over_s) for head in heads] == [
            (entry.key.stand_in, False, NOW_S),
            (refreshed.key, True, NOW_S),
        ]
        await second.aclose()

    async def test_what_it_finds_is_kept_in_memory_without_picture_and_revised_prompt(self, opened: Open) -> None:
        first = await opened()
        entry = picture(revised_prompt="long " * 1_000, tags=("spring",))
        await write(first, entry)
        await first.aclose()
        second = await opened()
        outline = second.left[0].head.outline
        assert (outline.image.data, outline.image.revised_prompt) == (b"", "")
        assert (outline.key, outline.tags, outline.image.sha256) == (entry.key, entry.tags, entry.image.sha256)
        await second.aclose()

    async def test_what_was_removed_is_not_found(self, opened: Open) -> None:
        first = await opened()
        stays, goes = await write(first, picture(1)), await write(first, picture(2))
        first.remove(goes)
        await first.removed()
        assert (first.entries, first.size_bytes) == (1, stays.size_bytes)
        await first.aclose()
        second = await opened()
        assert [left.record.number for left in second.left] == [stays.number]
        await second.aclose()

    async def test_what_is_removed_before_it_is_written_is_not_found(self, opened: Open) -> None:
        first = await opened()
        entry = picture()
        first.remove(first.append(entry.key, entry, replace=False, handed_over_s=NOW_S))
        await first.aclose()
        second = await opened()
        assert (second.left, second.size_bytes) == ([], 0)
        await second.aclose()

    async def test_a_number_is_not_given_to_another_record(self, opened: Open) -> None:
        first = await opened()
        old = await write(first, picture(1))
        await first.aclose()
        second = await opened()
        new = await write(second, picture(2))
        assert new.number > old.number
        assert await second.read(second.left[0].record) == picture(1)
        await second.aclose()


class TestDamage:
    @given(share=st.floats(0, 1, exclude_max=True))
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    async def test_a_torn_last_record_is_dropped_and_all_before_it_are_kept(
        self, tmp_path: Path, clock: FakeClock, share: float
    ) -> None:
        directory = tmp_path / f"torn-{share}"
        first = await Journal.open(directory, clock=clock)
        kept = await write(first, picture(1))
        torn = await write(first, picture(2))
        await first.aclose()
        os.truncate(directory / f"{torn.number:016}", int(share * torn.size_bytes))
        second = await Journal.open(directory, clock=clock)
        assert [left.record.number for left in second.left] == [kept.number]
        assert await second.read(second.left[0].record) == picture(1)
        await second.aclose()

    @given(position=st.integers(0, 2_000), bit=st.integers(0, 7))
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    async def test_a_record_with_a_flipped_bit_is_never_taken_for_another_picture(
        self, tmp_path: Path, clock: FakeClock, position: int, bit: int
    ) -> None:
        directory = tmp_path / f"flipped-{position}-{bit}"
        first = await Journal.open(directory, clock=clock)
        record = await write(first, picture())
        await first.aclose()
        file = directory / f"{record.number:016}"
        stored = bytearray(file.read_bytes())
        stored[position % len(stored)] ^= 1 << bit
        file.write_bytes(stored)
        second = await Journal.open(directory, clock=clock)
        for left in second.left:
            with pytest.raises(CorruptEntryError):
                await second.read(left.record)
        await second.aclose()

    async def test_a_damaged_record_is_put_where_nobody_replays_it(self, opened: Open, tmp_path: Path) -> None:
        first = await opened()
        record = await write(first, picture())
        file = file_of(tmp_path, record)
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(CorruptEntryError):
            await first.read(record)
        await first.set_aside(record)
        assert (first.entries, first.size_bytes) == (0, 0)
        await first.aclose()
        second = await opened()
        assert second.left == []
        assert [each.name[:16] for each in (tmp_path / "journal" / "aside").iterdir()] == [file.name]
        await second.aclose()

    async def test_a_record_of_a_newer_release_stays_for_that_release(self, opened: Open, tmp_path: Path) -> None:
        first = await opened()
        record = await write(first, picture())
        await first.aclose()
        file = file_of(tmp_path, record)
        stored = bytearray(file.read_bytes())
        stored[5] += 1
        file.write_bytes(stored)
        second = await opened()
        assert second.left == []
        assert second.size_bytes == record.size_bytes
        await second.aclose()
        assert file.read_bytes() == stored

    async def test_what_was_being_written_when_a_life_ended_is_gone(self, opened: Open, tmp_path: Path) -> None:
        await (await opened()).aclose()
        (tmp_path / "journal" / "tmp" / "life-7").write_bytes(b"half a rec")
        second = await opened()
        assert second.left == []
        assert list((tmp_path / "journal" / "tmp").iterdir()) == []
        await second.aclose()

    async def test_other_files_in_its_directory_are_left_alone(self, opened: Open, tmp_path: Path) -> None:
        await (await opened()).aclose()
        strange = tmp_path / "journal" / "notes.txt"
        strange.write_text("mine")
        second = await opened()
        assert second.left == []
        assert strange.read_text() == "mine"
        await second.aclose()


class TestBounds:
    async def test_beyond_its_bound_it_takes_nothing_until_there_is_room_again(self, opened: Open) -> None:
        size_bytes = (await self._size_of_one(opened)) + 10
        journal = await opened(max_bytes=size_bytes)
        first = journal.append(picture(1).key, picture(1), replace=False, handed_over_s=NOW_S)
        with pytest.raises(JournalFullError):
            journal.append(picture(2).key, picture(2), replace=False, handed_over_s=NOW_S)
        assert 0.9 < journal.share <= 1
        journal.remove(first)
        await journal.removed()
        assert journal.share == 0
        await write(journal, picture(2))
        await journal.aclose()

    async def test_what_an_earlier_life_left_counts(self, opened: Open) -> None:
        size_bytes = (await self._size_of_one(opened, stays=True)) + 10
        journal = await opened(max_bytes=size_bytes)
        with pytest.raises(JournalFullError):
            journal.append(picture(2).key, picture(2), replace=False, handed_over_s=NOW_S)
        await journal.aclose()

    @staticmethod
    async def _size_of_one(opened: Open, *, stays: bool = False) -> int:
        journal = await opened()
        record = await write(journal, picture(1))
        if not stays:
            journal.remove(record)
        await journal.aclose()
        return record.size_bytes


class TestADiskThatFails:
    async def test_a_record_that_a_full_disk_does_not_take_leaves_nothing_behind(
        self, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = await opened()

        def half(handle: int, part: bytes) -> None:
            os.write(handle, bytes(part)[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(journal_module, "_write_all", half)
            entry = picture(1)
            record = journal.append(entry.key, entry, replace=False, handed_over_s=NOW_S)
            with pytest.raises(TierError, match="No space left"):
                await record.written
        assert (journal.entries, journal.size_bytes) == (0, 0)
        assert list((tmp_path / "journal" / "tmp").iterdir()) == []
        await write(journal, picture(2))
        await journal.aclose()
        assert [left.head.slot for left in (await opened()).left] == [picture(2).key]

    async def test_a_record_whose_name_could_not_be_flushed_is_found_by_nobody(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = await opened()

        def fails(_directory: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(journal_module, "flush", fails)
            entry = picture(1)
            record = journal.append(entry.key, entry, replace=False, handed_over_s=NOW_S)
            assert record.written is not None
            with pytest.raises(TierError, match="Input/output"):
                await record.written
        await journal.aclose()
        assert (await opened()).left == []

    async def test_what_cannot_be_removed_is_said_and_tried_again(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = await opened()
        record = await write(journal, picture())

        def refused(_path: Path, *, missing_ok: bool = False) -> None:
            raise OSError(errno.EROFS, f"Read-only file system, missing_ok={missing_ok}")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refused)
            journal.remove(record)
            with pytest.raises(TierError):
                await journal.removed()
        await journal.removed()
        await journal.aclose()
        assert (await opened()).left == []

    async def test_a_directory_that_cannot_be_made_is_a_config_error_that_says_what_to_do(
        self, tmp_path: Path, clock: FakeClock
    ) -> None:
        (tmp_path / "file").write_text("no directory")
        with pytest.raises(ConfigError, match='durability = "write-through"'):
            await Journal.open(tmp_path / "file" / "journal", clock=clock)


class TestFlushing:
    @pytest.fixture
    def flushed(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of what was flushed to the disk so far, in order."""
        names: list[str] = []
        flush = os.fsync

        def fsync(handle: int) -> None:
            names.append(Path(f"/proc/self/fd/{handle}").readlink().name)
            flush(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        return names

    async def test_always_means_the_record_and_its_name_before_it_counts_as_written(
        self, opened: Open, flushed: list[str]
    ) -> None:
        journal = await opened(sync=JournalSync.ALWAYS)
        record = await write(journal, picture())
        assert [name.rpartition("-")[2] for name in flushed] == [str(record.number), "journal"]
        await journal.aclose()

    async def test_interval_means_what_was_written_since_the_last_time(
        self, opened: Open, clock: FakeClock, flushed: list[str]
    ) -> None:
        journal = await opened(sync=JournalSync.INTERVAL, sync_interval_s=5)
        await until(lambda: clock.sleepers == 1)
        stays, goes = await write(journal, picture(1)), await write(journal, picture(2))
        journal.remove(goes)
        await until(lambda: journal.entries == 1)
        assert flushed == []
        clock.advance(5)
        await until(lambda: len(flushed) == 2)
        assert flushed == [f"{stays.number:016}", "journal"]
        clock.advance(5)
        await until(lambda: clock.sleepers == 1)
        assert len(flushed) == 2
        await journal.aclose()

    async def test_what_was_written_since_the_last_interval_is_flushed_at_the_end(
        self, opened: Open, flushed: list[str]
    ) -> None:
        journal = await opened(sync=JournalSync.INTERVAL, sync_interval_s=5)
        record = await write(journal, picture())
        await journal.aclose()
        assert flushed == [f"{record.number:016}", "journal"]

    async def test_what_could_not_be_flushed_is_flushed_the_next_time(
        self, opened: Open, clock: FakeClock, flushed: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = await opened(sync=JournalSync.INTERVAL, sync_interval_s=5)
        await until(lambda: clock.sleepers == 1)
        record = await write(journal, picture())
        refused: list[int] = []

        def fsync(handle: int) -> None:
            refused.append(handle)
            raise OSError(errno.EIO, "the disk is broken")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            clock.advance(5)
            await until(lambda: bool(refused) and clock.sleepers == 1)
        assert flushed == []
        clock.advance(5)
        await until(lambda: len(flushed) == 2)
        assert flushed == [f"{record.number:016}", "journal"]
        await journal.aclose()

    async def test_off_means_that_the_system_decides(self, opened: Open, flushed: list[str]) -> None:
        journal = await opened(sync=JournalSync.OFF)
        await write(journal, picture())
        assert flushed == []
        await journal.aclose()

    async def test_a_removal_is_for_good_whatever_is_flushed(self, opened: Open, flushed: list[str]) -> None:
        journal = await opened(sync=JournalSync.OFF)
        journal.remove(await write(journal, picture()))
        await journal.removed()
        assert flushed == ["journal"]
        await journal.aclose()


async def test_a_picture_given_as_a_view_is_written_whole(opened: Open) -> None:
    journal = await opened()
    entry = picture()
    view = memoryview(b"before" + bytes(entry.image.data) + b"behind")[6:-6]
    record = await write(journal, replace(entry, image=replace(entry.image, data=view)))
    assert await journal.read(record) == entry
    await journal.aclose()
