"""The directory tier keeps the contract, its bound and its entries, whatever happens to its files."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from cacheserver.errors import ConfigError, CorruptEntryError, EntryTooLargeError, NewerEntryError, TierError
from cacheserver.model import CacheKey, TierName
from cacheserver.tiers import codec
from cacheserver.tiers.disk import DiskTier
from tests.fakes import FakeClock
from tests.tier_contract import MAX_ENTRY_BYTES, TierContract, keys_of, make_entry, make_key, with_data

STORED_BYTES = len(codec.encode(make_entry(data=bytes(1000))))

Open = Callable[..., Awaitable[DiskTier]]


@pytest_asyncio.fixture
async def open_disk(tmp_path: Path, clock: FakeClock) -> AsyncIterator[Open]:
    """Opens the tier in the test's own directory, as often as the test wants."""
    tiers: list[DiskTier] = []

    async def open_it(*, max_bytes: int = 10_000_000, sync: bool = True) -> DiskTier:
        directory = tmp_path / "images"
        tier = await DiskTier.open(
            directory, clock=clock, max_bytes=max_bytes, max_entry_bytes=MAX_ENTRY_BYTES, sync=sync
        )
        tiers.append(tier)
        return tier

    yield open_it
    for tier in tiers:
        await tier.aclose()


@pytest_asyncio.fixture
async def tier(open_disk: Open) -> DiskTier:
    return await open_disk()


class TestDiskTier(TierContract):
    """The contract; the fixture above is its tier."""


def file_of(directory: Path, key: CacheKey | None = None) -> Path:
    (file,) = directory.glob(f"images/v1/studio/*/{key.name if key else 'v1.*'}")
    return file


def files_in(directory: Path) -> list[Path]:
    return [file for file in directory.rglob("*") if file.is_file()]


async def put_thousand(tier: DiskTier, prompt: str) -> None:
    key = make_key(prompt)
    assert await tier.put(key, make_entry(key, bytes(1000)), replace=False)


async def test_it_says_which_tier_it_is(tier: DiskTier) -> None:
    assert tier.name is TierName.DISK


async def test_what_is_moved_is_the_same_file_and_takes_no_more_room(tier: DiskTier, tmp_path: Path) -> None:
    entry = make_entry()
    await tier.put(entry.key.stand_in, entry, replace=True)
    number, size_bytes = file_of(tmp_path).stat().st_ino, tier.size_bytes
    assert await tier.move(entry.key.stand_in, entry.key, entry)
    assert await tier.get(entry.key) == entry
    assert file_of(tmp_path, entry.key).stat().st_ino == number
    assert tier.size_bytes == size_bytes


async def test_entries_and_the_order_of_use_outlive_the_process(open_disk: Open, tmp_path: Path) -> None:
    first = await open_disk(max_bytes=3 * STORED_BYTES)
    for n, prompt in enumerate("abc"):
        await put_thousand(first, prompt)
        os.utime(file_of(tmp_path, make_key(prompt)), (n, n))
    assert await first.get(make_key("a")) is not None
    await first.aclose()

    second = await open_disk(max_bytes=3 * STORED_BYTES)
    assert second.size_bytes == 3 * STORED_BYTES
    await put_thousand(second, "d")
    assert await second.find([make_key(prompt) for prompt in "abcd"]) == [True, False, True, True]


async def test_it_never_takes_more_than_its_bytes(open_disk: Open, tmp_path: Path) -> None:
    tier = await open_disk(max_bytes=3 * STORED_BYTES)
    for prompt in "abcdef":
        await put_thousand(tier, prompt)
        assert tier.size_bytes == sum(file.stat().st_size for file in files_in(tmp_path)) <= 3 * STORED_BYTES
    assert await tier.find([make_key(prompt) for prompt in "abcdef"]) == [False, False, False, True, True, True]


async def test_replaced_and_deleted_bytes_are_free_again(open_disk: Open) -> None:
    tier = await open_disk(max_bytes=3 * STORED_BYTES)  # a replacement lies beside what it replaces for a while
    await put_thousand(tier, "a")
    for _ in range(5):
        await tier.put(make_key("b"), make_entry(make_key("b"), bytes(1000)), replace=True)
    assert await tier.find([make_key("a"), make_key("b")]) == [True, True]
    await tier.delete(make_key("a"))
    await put_thousand(tier, "c")
    await put_thousand(tier, "d")
    assert await tier.find([make_key(prompt) for prompt in "bcd"]) == [True, True, True]


async def test_a_refused_second_writer_takes_no_room(open_disk: Open, tmp_path: Path) -> None:
    tier = await open_disk(max_bytes=4 * STORED_BYTES)
    await put_thousand(tier, "a")
    assert not await tier.put(make_key("a"), make_entry(make_key("a"), b"other"), replace=False)
    assert tier.size_bytes == STORED_BYTES
    assert len(files_in(tmp_path)) == 1


async def test_a_smaller_bound_holds_from_the_start(open_disk: Open) -> None:
    first = await open_disk()
    for prompt in "abc":
        await put_thousand(first, prompt)
    await first.aclose()
    second = await open_disk(max_bytes=2 * STORED_BYTES)
    assert second.size_bytes == 2 * STORED_BYTES


async def test_an_entry_above_the_whole_bound_is_too_large(open_disk: Open) -> None:
    tier = await open_disk(max_bytes=1000)
    with pytest.raises(EntryTooLargeError):
        await tier.put(make_key(), make_entry(data=bytes(1001)), replace=False)
    with pytest.raises(EntryTooLargeError):  # the picture would fit, but not with its metadata
        await tier.put(make_key(), make_entry(data=bytes(999)), replace=False)
    assert tier.size_bytes == 0


async def test_leftovers_of_a_crash_are_cleared_and_young_ones_left(open_disk: Open, tmp_path: Path) -> None:
    await (await open_disk()).aclose()
    old, young = tmp_path / "images/tmp/old", tmp_path / "images/tmp/young"
    old.write_bytes(b"half an ent")
    young.write_bytes(b"half an ent")
    os.utime(young, (FakeClock().now_s(), FakeClock().now_s()))
    await open_disk()
    assert [old.exists(), young.exists()] == [False, True]


async def test_files_of_others_are_left_alone(tier: DiskTier, open_disk: Open, tmp_path: Path) -> None:
    await put_thousand(tier, "a")
    note = file_of(tmp_path).with_name("README")
    note.write_text("keep me")
    again = await open_disk(max_bytes=STORED_BYTES)
    await put_thousand(again, "b")
    assert note.exists()
    assert await keys_of(again, "studio") == {make_key("b").name}


@pytest.mark.parametrize("at", [4, 20, 400, -1])
async def test_a_flipped_bit_is_damage_and_mended_by_the_next_put(tier: DiskTier, tmp_path: Path, at: int) -> None:
    entry = make_entry(data=bytes(1000))
    await tier.put(entry.key, entry, replace=False)
    file = file_of(tmp_path)
    stored = bytearray(file.read_bytes())
    stored[at] ^= 1 if at != 4 else 0
    stored[5] ^= 1 if at == 4 else 0  # codec version 0
    file.write_bytes(stored)
    with pytest.raises(CorruptEntryError):
        await tier.get(entry.key)
    assert await tier.put(entry.key, entry, replace=False)
    assert await tier.get(entry.key) == entry


@pytest.mark.parametrize("length", [0, 5, 10, 300, -1])
async def test_a_cut_file_is_damage_and_mended_by_the_next_put(tier: DiskTier, tmp_path: Path, length: int) -> None:
    entry = make_entry(data=bytes(1000))
    await tier.put(entry.key, entry, replace=False)
    file = file_of(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CorruptEntryError):
        await tier.get(entry.key)
    assert await tier.put(entry.key, with_data(entry, b"new"), replace=False)
    assert await tier.get(entry.key) == with_data(entry, b"new")


async def test_labels_of_a_damaged_entry_are_none(tier: DiskTier, tmp_path: Path) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    file_of(tmp_path).write_bytes(b"not an entry at all")
    assert await tier.labels(entry.key) is None


async def test_a_newer_entry_is_unknown_and_stays(tier: DiskTier, tmp_path: Path) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    file = file_of(tmp_path)
    newer = file.read_bytes()[:4] + (max(codec.LAYOUTS) + 1).to_bytes(2, "big") + b"a layout of tomorrow"
    file.write_bytes(newer)
    for call in (tier.get(entry.key), tier.put(entry.key, entry, replace=False), tier.labels(entry.key)):
        with pytest.raises(NewerEntryError):
            await call
    assert file.read_bytes() == newer
    assert len(files_in(tmp_path)) == 1


async def test_a_file_removed_by_hand_is_a_miss(tier: DiskTier, tmp_path: Path) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    file_of(tmp_path).unlink()
    assert await tier.get(entry.key) is None
    assert await tier.find([entry.key]) == [False]


async def test_a_put_that_cannot_make_room_takes_none(
    open_disk: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tier = await open_disk(max_bytes=STORED_BYTES + 100)
    await put_thousand(tier, "a cat")
    size_bytes = tier.size_bytes

    def refuse(path: Path, *, missing_ok: bool = False) -> None:
        if not missing_ok:
            raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(TierError, match="Operation not permitted"):
        await put_thousand(tier, "a dog")
    assert tier.size_bytes == size_bytes
    assert len(files_in(tmp_path)) == 1


async def test_a_disk_that_cannot_be_written_is_unknown_to_a_put(tier: DiskTier, tmp_path: Path) -> None:
    temporary = tmp_path / "images/tmp"
    temporary.rmdir()
    temporary.write_text("a file where the directory should be")
    with pytest.raises(TierError, match="put"):
        await tier.put(make_key(), make_entry(), replace=False)
    with pytest.raises(TierError, match="ping"):
        await tier.ping()
    assert tier.size_bytes == 0


async def test_an_entry_that_cannot_be_read_is_unknown(tier: DiskTier, tmp_path: Path) -> None:
    entry = make_entry()
    await tier.put(entry.key, entry, replace=False)
    file = file_of(tmp_path)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(TierError, match="get"):
        await tier.get(entry.key)


async def test_a_directory_that_cannot_be_used_is_said_at_once(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "images").write_text("a file")
    with pytest.raises(ConfigError, match="images cannot be used"):
        await DiskTier.open(tmp_path / "images", clock=clock)


async def test_it_works_without_waiting_for_the_disk(open_disk: Open) -> None:
    tier = await open_disk(sync=False)
    await put_thousand(tier, "a")
    assert await tier.get(make_key("a")) is not None
