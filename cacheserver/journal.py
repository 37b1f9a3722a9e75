"""The journal: what was paid for lies on our own disk, before anyone is told of it, until the last tier has it.

    <directory>/<number, 16 digits>      a record; they are replayed in this order
    <directory>/tmp/                     what is being written
    <directory>/aside/                   records that nobody replays: damaged, or too large for the last tier

A record comes into being whole, by a rename, never changes, and is removed when the last tier has its picture:

    magic            4 bytes   "PCJR"
    version          2         all numbers big-endian
    flags            1         1: takes the place of what has its key; 2: lies in the stand-in slot of its key
    handed over      8         seconds since 1970, a double
    checksum        16         xxh3-128 of all the above
    entry                      as in Redis or on disk: see `tiers.codec`, whose checksums cover the rest

So a record that was torn, as by a power cut where nothing is flushed, is seen and dropped, and all others are kept.
One that a newer release wrote stays where it is, for that release to replay.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
from xxhash import xxh3_128_digest

from cacheserver.errors import ConfigError, CorruptEntryError, JournalFullError, NewerEntryError, TierError
from cacheserver.interfaces import Clock
from cacheserver.model import CachedImage, CacheKey, ImageBytes, JournalSync
from cacheserver.tasks import OwnedTasks, end, every
from cacheserver.tiers import codec
from cacheserver.tiers.disk import flush
from cacheserver.tiers.workers import Workers

_log = structlog.get_logger(__name__)

_MAGIC = b"PCJR"
_VERSION = 1
_HEAD = struct.Struct(">4sHBd")
_REPLACES, _STANDS_IN = 1, 2
_CHECKSUM_BYTES = 16
_NUMBER_DIGITS = 16
_HEAD_BYTES = _HEAD.size + _CHECKSUM_BYTES

_THREADS = 8
_PATIENCE_S = 10.0
"""With a disk that hangs: nobody waits longer for it."""


@dataclass(eq=False, slots=True)
class Record:
    """A picture in the journal: under this number, with so many bytes. `written` ends when the disk has it.

    What `written` raises is a TierError: the disk does not take it. None: it has been there for long.
    """

    number: int
    size_bytes: int
    written: asyncio.Future[None] | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What a record says: the slot its entry lies in, and the entry without the picture and what only readers want."""

    slot: CacheKey
    outline: CachedImage
    replace: bool
    handed_over_s: float


@dataclass(frozen=True, slots=True)
class Left:
    """A record that an earlier life left, and what it says."""

    record: Record
    head: Head


@dataclass(slots=True)
class _Found:
    """What was there when the journal was opened: whole records, with their numbers and sizes, and others."""

    left: list[tuple[int, int, Head]] = field(default_factory=list)
    last: int = 0
    newer: int = 0
    newer_bytes: int = 0
    damaged: int = 0


class Journal:
    """Pictures on their way to the last tier, in a directory of ours. Made by `open`."""

    def __init__(self, directory: Path, *, max_bytes: int, sync: JournalSync, write_version: int) -> None:
        self.max_bytes = max_bytes
        self.left: list[Left] = []
        """What earlier lives left, in the order it was handed over."""
        self._directory = directory
        self._temporary = directory / "tmp"
        self._sync = sync
        self._write_version = write_version
        self._workers = Workers(threads=_THREADS, name="journal")
        self._tasks = OwnedTasks()
        self._flushing: asyncio.Task[None] | None = None
        self._next = 1
        self._sizes: dict[int, int] = {}
        self._size_bytes = 0
        self._removing: set[asyncio.Task[None]] = set()
        self._not_removed: list[Record] = []
        self._unflushed: set[int] = set()
        # No two lives, one ending and one beginning, write the same temporary file.
        self._life = secrets.token_hex(8)

    @staticmethod
    async def open(  # noqa: PLR0913 - settings, each with its default
        directory: Path,
        *,
        clock: Clock,
        max_bytes: int = 10 * 1024 * 1024 * 1024,
        sync: JournalSync = JournalSync.ALWAYS,
        sync_interval_s: float = 1.0,
        write_version: int = codec.WRITE_VERSION,
    ) -> Journal:
        """The journal in `directory`, which is made if missing, with what earlier lives left in it.

        Args:
            directory: on one file system, and nobody else's.
            clock: decides when an interval is over.
            max_bytes: most that all records together may take; a further one is refused.
            sync: when records are flushed.
            sync_interval_s: how often, with `JournalSync.INTERVAL`.
            write_version: the codec version that entries are written in.

        Raises:
            ConfigError: the directory cannot be made, read or written.
        """
        journal = Journal(directory, max_bytes=max_bytes, sync=sync, write_version=write_version)
        try:
            found = await journal._workers.run(journal._prepare)
        except OSError as exc:
            await journal.aclose()
            raise ConfigError(
                f"journal: {directory} cannot be used: {exc.strerror}; "
                'mend it, or set durability = "write-through" to go without a journal'
            ) from exc
        journal._take_over(found)
        if sync is JournalSync.INTERVAL:
            flushing = every(sync_interval_s, journal._flush, clock=clock, name="flush journal")
            journal._flushing = asyncio.create_task(flushing, name="flush journal")
        return journal

    def take_left(self) -> list[Left]:
        """What earlier lives left, to whoever goes on with it: it is not kept here for as long as we live."""
        left, self.left = self.left, []
        return left

    @property
    def entries(self) -> int:
        """How many records there are, those being written included."""
        return len(self._sizes)

    @property
    def size_bytes(self) -> int:
        """How much they take."""
        return self._size_bytes

    @property
    def share(self) -> float:
        """How much of what it may hold it holds, 0 to 1."""
        return self._size_bytes / self.max_bytes

    def append(self, slot: CacheKey, entry: CachedImage, *, replace: bool, handed_over_s: float) -> Record:
        """Write a record; it is there once `Record.written` has ended.

        Raises:
            JournalFullError: it does not fit.
            EntryTooLargeError: the entry has more metadata than there may be.
        """
        flags = (_REPLACES if replace else 0) | (_STANDS_IN if slot.is_stand_in else 0)
        head = _HEAD.pack(_MAGIC, _VERSION, flags, handed_over_s)
        head += xxh3_128_digest(head) + codec.encode_head(entry, self._write_version)
        size_bytes = len(head) + entry.size_bytes
        if self._size_bytes + size_bytes > self.max_bytes:
            raise JournalFullError("The journal is full: the last tier has not taken for long what was made.")
        number = self._next
        self._next += 1
        self._keep_count(number, size_bytes)
        written = self._tasks.own(self._write(number, (head, entry.image.data)), "write to journal")
        return Record(number, size_bytes, written)

    async def read(self, record: Record) -> CachedImage:
        """The whole entry of a record.

        Raises:
            CorruptEntryError: it is damaged, or gone.
            TierError: it cannot be read.
        """
        try:
            return await self._workers.run(self._read, record.number)
        except FileNotFoundError as exc:
            raise CorruptEntryError("the record is gone: somebody removed its file") from exc
        except OSError as exc:
            raise TierError(f"the journal cannot be read: {exc.strerror}") from exc

    def remove(self, record: Record) -> None:
        """Remove a record, as soon as it is written: the last tier has its picture, or nobody wants it any more."""
        removing = self._tasks.own(self._remove(record), "remove from journal")
        self._removing.add(removing)
        removing.add_done_callback(self._removing.discard)

    async def removed(self) -> None:
        """Return when all that was to be removed is gone for good, so that no later life finds it.

        Raises:
            TierError: some of it may still be there.
        """
        records, self._not_removed = self._not_removed, []
        for record in records:
            self.remove(record)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                if self._removing:
                    await asyncio.wait(self._removing)
                await self._workers.run(flush, self._directory)
        except OSError as exc:
            raise TierError(f"the journal cannot be flushed: {exc.strerror or 'its disk hangs'}") from exc
        if self._not_removed:
            raise TierError("the journal cannot remove what it should")

    async def set_aside(self, record: Record) -> None:
        """Put a record where nobody replays it: it is damaged, or nobody will ever take it."""
        try:
            await self._workers.run(self._set_aside, record.number)
        except FileNotFoundError:
            pass  # it is nowhere
        except OSError as exc:
            _log.error("journal_record_not_set_aside", number=record.number, error=exc.strerror)
        self._forget_count(record.number)

    async def aclose(self) -> None:
        """Bring what is being written and removed to an end. Nothing else may be called afterwards."""
        if self._flushing is not None:
            await end([self._flushing])
        await self._tasks.aclose(_PATIENCE_S)
        if self._sync is JournalSync.INTERVAL:
            with suppress(OSError, TimeoutError):  # it said so before
                async with asyncio.timeout(_PATIENCE_S):
                    await self._flush()
        await self._workers.aclose(_PATIENCE_S)

    def _take_over(self, found: _Found) -> None:
        self._next = found.last + 1
        self._size_bytes = found.newer_bytes
        for number, size_bytes, head in found.left:
            self._keep_count(number, size_bytes)
            self.left.append(Left(Record(number, size_bytes), head))
        if found.damaged:
            _log.error("journal_records_damaged", records=found.damaged, directory="aside")
        if found.newer:
            _log.warning("journal_records_of_a_newer_release", records=found.newer)
        if self.left:
            _log.info("journal_replayed", records=len(self.left), size_bytes=self._size_bytes)

    def _keep_count(self, number: int, size_bytes: int) -> None:
        self._sizes[number] = size_bytes
        self._size_bytes += size_bytes

    def _forget_count(self, number: int) -> None:
        self._size_bytes -= self._sizes.pop(number, 0)

    async def _write(self, number: int, parts: tuple[bytes, ImageBytes]) -> None:
        try:
            await self._workers.run(self._place, number, parts)
        except OSError as exc:
            self._forget_count(number)
            _log.error("journal_not_written", number=number, error=exc.strerror)
            raise TierError(f"the disk does not take a record of the journal: {exc.strerror}") from exc
        if self._sync is JournalSync.INTERVAL:
            self._unflushed.add(number)

    async def _remove(self, record: Record) -> None:
        if record.written is not None:
            await asyncio.wait({record.written})
        try:
            await self._workers.run(self._unlink, record.number)
        except OSError as exc:
            _log.error("journal_record_not_removed", number=record.number, error=exc.strerror)
            self._not_removed.append(record)
            return
        self._unflushed.discard(record.number)
        self._forget_count(record.number)

    async def _flush(self) -> None:
        numbers, self._unflushed = self._unflushed, set()
        if not numbers:
            return
        try:
            await self._workers.run(self._flush_records, numbers)
        except OSError:
            self._unflushed |= numbers
            raise

    # What follows runs in threads.

    def _prepare(self) -> _Found:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._temporary.mkdir(exist_ok=True)
        for file in self._temporary.iterdir():
            file.unlink(missing_ok=True)  # torn: whoever it was for was not answered from it
        probe = self._temporary / self._life
        probe.write_bytes(b"probe")
        probe.unlink()
        found = _Found()
        for number in sorted(_numbers(self._directory)):
            found.last = number
            size_bytes = self._path(number).stat().st_size
            try:
                found.left.append((number, size_bytes, self._read_head(number, size_bytes)))
            except NewerEntryError:
                found.newer += 1
                found.newer_bytes += size_bytes
            except CorruptEntryError:
                found.damaged += 1
                self._set_aside(number)
        return found

    def _place(self, number: int, parts: tuple[bytes, ImageBytes]) -> None:
        temporary = self._temporary / f"{self._life}-{number}"
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                for part in parts:
                    _write_all(handle, part)
                if self._sync is JournalSync.ALWAYS:
                    os.fsync(handle)
            finally:
                os.close(handle)
            temporary.replace(self._path(number))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if self._sync is JournalSync.ALWAYS:
            self._flush_name(number)

    def _flush_name(self, number: int) -> None:
        try:
            flush(self._directory)
        except OSError:
            self._unlink(number)  # it does not count as written, so a later life must not find it
            raise

    def _unlink(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)

    def _flush_records(self, numbers: set[int]) -> None:
        for number in numbers:
            try:
                flush(self._path(number))
            except FileNotFoundError:
                continue  # the last tier has it meanwhile
        flush(self._directory)

    def _set_aside(self, number: int) -> None:
        aside = self._directory / "aside"
        aside.mkdir(exist_ok=True)
        self._path(number).replace(aside / f"{number:0{_NUMBER_DIGITS}}-{self._life}")

    def _read(self, number: int) -> CachedImage:
        stored = memoryview(self._path(number).read_bytes())
        _check_head(stored[:_HEAD_BYTES])
        return codec.decode(stored[_HEAD_BYTES:])

    def _read_head(self, number: int, size_bytes: int) -> Head:
        """What a record says; whether its picture is intact is seen when it is read."""
        with self._path(number).open("rb") as file:
            flags, handed_over_s = _check_head(file.read(_HEAD_BYTES))
            start = file.read(codec.PREAMBLE_BYTES)
            length = codec.head_length(start)
            metadata = codec.decode_head(start + file.read(length - len(start)))
        if size_bytes != _HEAD_BYTES + length + metadata.size_bytes:
            raise CorruptEntryError("the record has not the length it should have")
        key = metadata.bare.key
        return Head(
            slot=key.stand_in if flags & _STANDS_IN else key,
            outline=outline(metadata.bare),
            replace=bool(flags & _REPLACES),
            handed_over_s=handed_over_s,
        )

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:0{_NUMBER_DIGITS}}"


def look(directory: Path) -> int:
    """How many records lie in a directory, whoever has it open. It is made if missing.

    Raises:
        OSError: it cannot be made, read or written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"probe")
    return sum(1 for _ in _numbers(directory))


def outline(entry: CachedImage) -> CachedImage:
    """The entry without its picture, and without what makes it long: many are kept in memory."""
    image = replace(entry.image, data=b"", revised_prompt="", usage=None)
    return replace(entry, image=image)


def _check_head(head: ImageBytes) -> tuple[int, float]:
    """The flags of a record and when it was handed over.

    Raises:
        CorruptEntryError: it is damaged, or no record.
        NewerEntryError: a newer release wrote it.
    """
    if len(head) != _HEAD_BYTES:
        raise CorruptEntryError("the record is cut short")
    magic, version, flags, handed_over_s = _HEAD.unpack_from(head)
    if magic == _MAGIC and version > _VERSION:
        raise NewerEntryError(f"the record has version {version}; this release reads up to {_VERSION}")
    if magic != _MAGIC or xxh3_128_digest(head[: _HEAD.size]) != head[_HEAD.size :]:
        raise CorruptEntryError("what is stored is not a record, or damaged")
    return int(flags), float(handed_over_s)


def _numbers(directory: Path) -> Iterator[int]:
    for file in directory.iterdir():
        if len(file.name) == _NUMBER_DIGITS and file.name.isdecimal():
            yield int(file.name)


def _write_all(handle: int, part: ImageBytes) -> None:
    rest = memoryview(part)
    while rest:
        rest = rest[os.write(handle, rest) :]
