"""Entries in a directory: L3 where there is no S3, or a level on NVMe before it."""

from __future__ import annotations

import itertools
import os
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import ParamSpec, TypeVar

from cacheserver.epochs import Epochs
from cacheserver.errors import ConfigError, CorruptEntryError, EntryTooLargeError, TierError
from cacheserver.interfaces import Clock, no_step
from cacheserver.model import KEY_VERSION, CachedImage, CacheKey, Head, Labels, TierName, Touch, Touched
from cacheserver.tiers import codec
from cacheserver.tiers.workers import Workers

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

_LEFTOVER_S = 3_600.0
_CLOSE_S = 10.0
_FIND_BATCH = 1_000


class DiskTier:
    """A file per entry, named by its key, the least recently used going first at a bound of bytes. A `Tier`.

    Files come into being whole, by a rename, and need no index beside them: their sizes and times are read
    again at start. One process owns the directory: what others put there while it runs is not seen. Equal
    pictures under two keys are stored twice: sharing them would take counts of references that a crash can break.

        <directory>/v1/<partition>/<first two hex digits of the fingerprint>/<key>
        <directory>/files/     small files by their names
        <directory>/tmp/       what is being written

    Made by `open`.
    """

    name = TierName.DISK

    def __init__(  # noqa: PLR0913 - settings
        self,
        directory: Path,
        *,
        clock: Clock,
        max_bytes: int,
        max_entry_bytes: int,
        sync: bool,
        threads: int,
        epochs: Epochs,
        write_version: int,
    ) -> None:
        self._directory = directory
        self._temporary = directory / "tmp"
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_entry_bytes = max_entry_bytes
        self._sync = sync
        self._epochs = epochs
        self._write_version = write_version
        self._workers = Workers(threads=threads, name="disk")
        # No two processes, one ending and one beginning, write the same temporary file.
        self._process = secrets.token_hex(8)
        self._writes = itertools.count()
        # Guards the two below, and every change of which file stands under a name.
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._total_bytes = 0

    @staticmethod
    async def open(  # noqa: PLR0913 - settings, each with its default
        directory: Path,
        *,
        clock: Clock,
        max_bytes: int = 10 * 1024 * 1024 * 1024,
        max_entry_bytes: int = 64 * 1024 * 1024,
        sync: bool = True,
        threads: int = 8,
        epochs: Epochs | None = None,
        write_version: int = codec.WRITE_VERSION,
    ) -> DiskTier:
        """The tier in `directory`, which is made if missing, with what an earlier process left in it.

        Args:
            directory: on one file system, and nobody else's.
            clock: decides what is fresh.
            max_bytes: most that all files together may take.
            max_entry_bytes: a larger image is refused with EntryTooLargeError.
            sync: whether a put waits until the disk has it, and so survives a power cut.
            threads: most calls at a time.
            epochs: say what was purged.
            write_version: the codec version that entries are written in.

        Raises:
            ConfigError: the directory cannot be made, read or written.
        """
        tier = DiskTier(
            directory,
            clock=clock,
            max_bytes=max_bytes,
            max_entry_bytes=max_entry_bytes,
            sync=sync,
            threads=threads,
            epochs=epochs or Epochs(),
            write_version=write_version,
        )
        try:
            await tier._workers.run(tier._prepare)
        except OSError as exc:
            await tier.aclose()
            raise ConfigError(f"directory {directory} cannot be used: {exc.strerror}") from exc
        return tier

    @property
    def size_bytes(self) -> int:
        """How much the files take now, with those being written."""
        return self._total_bytes

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None:
        """See `Tier.get`."""
        if key.name not in self._sizes:
            return None  # most of what is asked for is not here: that needs no thread to be seen
        return await self._run("get", self._get, key, stale_s)

    async def find(self, keys: Sequence[CacheKey], *, on_step: Callable[[], None] = no_step) -> list[bool]:
        """See `Tier.find`."""
        found: list[bool] = []
        for start in range(0, len(keys), _FIND_BATCH):
            found += await self._run("find", self._find, keys[start : start + _FIND_BATCH])
            on_step()
        return found

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        """See `Tier.put`."""
        return await self._run("put", self._put, key, entry, replace=replace)

    async def move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:
        """See `Tier.move`."""
        return await self._run("move", self._move, slot, key, entry)

    async def touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        """See `Tier.touch`."""
        return await self._run("touch", self._touch, key, entry)

    async def delete(self, key: CacheKey) -> bool:
        """See `Tier.delete`."""
        return await self._run("delete", self._delete, key.name)

    async def reclaim(self, key: CacheKey) -> bool:
        """See `Tier.reclaim`."""
        return await self._run("delete", self._reclaim, key)

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        """See `Tier.scan`."""
        parent = self._directory / KEY_VERSION / partition
        for directory in await self._run("scan", _children, parent):
            for file in await self._run("scan", _children, directory):
                if (key := _key(file.name)) is not None:
                    yield key

    async def page(self, partition: str, *, after: CacheKey | None, limit: int) -> list[CacheKey]:
        """See `Tier.page`."""
        return await self._run("page", self._page, partition, "" if after is None else after.name, limit)

    async def renditions(self, key: CacheKey) -> list[CacheKey]:
        """See `Tier.renditions`."""
        files = await self._run("renditions", _children, self._path(key.name).parent)
        start = f"{key.fingerprint_name}."
        keys = (_key(file.name) for file in files if file.name.startswith(start))
        return [found for found in keys if found is not None and found.is_rendition]

    async def head(self, key: CacheKey) -> Head | None:
        """See `Tier.head`."""
        metadata = await self._run("head", self._metadata, key)
        return None if metadata is None else metadata.head

    async def labels(self, key: CacheKey) -> Labels | None:
        """See `Tier.labels`."""
        metadata = await self._run("labels", self._metadata, key)
        return None if metadata is None else metadata.labels

    async def files(self, start: str) -> list[str]:
        """See `Files.files`. `start` is a folder."""
        found = await self._run("list", _children, self._directory / "files" / start)
        return sorted(f"{start}{file.name}" for file in found)

    async def write_file(self, name: str, data: bytes) -> None:
        """See `Files.write_file`."""
        await self._run("write", self._write_file, name, data)

    async def delete_file(self, name: str) -> None:
        """See `Files.delete_file`."""
        await self._run("delete", (self._directory / "files" / name).unlink, missing_ok=True)

    async def ping(self) -> None:
        """See `Tier.ping`."""
        await self._run("ping", self._probe)

    async def aclose(self) -> None:
        """See `Tier.aclose`."""
        await self._workers.aclose(_CLOSE_S)

    async def _run(self, op: str, call: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        try:
            return await self._workers.run(call, *args, **kwargs)
        except OSError as exc:
            raise TierError(f"the disk failed at {op}: {exc.strerror}") from exc

    # What follows runs in threads.

    def _prepare(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._temporary.mkdir(exist_ok=True)
        self._probe()
        for file in _children(self._temporary):
            # What is younger may be the work of a process that is just ending.
            if self._clock.now_s() - file.stat().st_mtime > _LEFTOVER_S:
                file.unlink(missing_ok=True)
        found = sorted((status.st_mtime_ns, name, status.st_size) for name, status in self._stored())
        self._sizes.update((name, size) for _, name, size in found)
        self._total_bytes = sum(self._sizes.values())
        with self._lock:
            self._evict()

    def _stored(self) -> Iterator[tuple[str, os.stat_result]]:
        for partition in _children(self._directory / KEY_VERSION):
            for directory in _children(partition):
                for file in _children(directory):
                    if _key(file.name) is not None:
                        yield file.name, file.stat()

    def _probe(self) -> None:
        with tempfile.TemporaryFile(dir=self._temporary) as file:
            file.write(b"probe")

    def _get(self, key: CacheKey, stale_s: float) -> CachedImage | None:
        entry = self._servable(key, stale_s)
        if entry is None:
            return None
        with suppress(FileNotFoundError):  # evicted since
            os.utime(self._path(key.name))
        with self._lock:
            if key.name in self._sizes:
                self._sizes.move_to_end(key.name)
        return entry

    def _find(self, keys: Sequence[CacheKey]) -> list[bool]:
        return [key.name in self._sizes and self._path(key.name).exists() for key in keys]

    def _servable(self, key: CacheKey, stale_s: float = 0.0) -> CachedImage | None:
        try:
            with self._path(key.name).open("rb", buffering=0) as file:
                metadata, head_bytes = _read_head(file)
                if os.fstat(file.fileno()).st_size != head_bytes + metadata.size_bytes:
                    raise CorruptEntryError("the file has not the length it should have")
                entry = metadata.entry(file.read(metadata.size_bytes))
        except FileNotFoundError:
            return None
        return entry if codec.answers(entry, key, self._clock.now_s(), self._epochs, stale_s=stale_s) else None

    def _put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        if entry.size_bytes > self._max_entry_bytes:
            raise EntryTooLargeError(f"the image has {entry.size_bytes} bytes; the disk takes {self._max_entry_bytes}")
        stored = codec.encode(entry, self._write_version)
        if len(stored) > self._max_bytes:
            raise EntryTooLargeError(f"the entry has {len(stored)} bytes; the disk holds {self._max_bytes} in all")
        is_placed = False
        temporary = self._temporary / f"{self._process}-{next(self._writes)}"
        try:
            self._reserve(len(stored))
            self._write(temporary, stored)
            with self._lock:
                held = None if replace else self._holder(key)
                if held is not None:
                    return held.image.sha256 == entry.image.sha256
                self._place(temporary, key.name, len(stored))
                is_placed = True
        finally:
            if not is_placed:
                self._release(len(stored))
                temporary.unlink(missing_ok=True)
        if self._sync:
            flush(self._path(key.name).parent)
        return True

    def _move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:
        path, head = self._path(slot.name), codec.encode_head(entry, self._write_version)
        with self._lock:
            if (size := self._sizes.get(slot.name)) is None:
                return False
            is_moved = key.name not in self._sizes and _begins_with(path, head)
            if is_moved:
                path.replace(self._path(key.name))
                del self._sizes[slot.name]
                self._sizes[key.name] = size
        if not is_moved:
            self._delete(slot.name)
        elif self._sync:
            flush(path.parent)
        return is_moved

    def _touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        if not entry.sliding_s:
            return Touched(Touch.CURRENT)
        holder = self._holder(key)
        if holder is None or holder.image.sha256 != entry.image.sha256:
            return Touched(Touch.GONE)
        if not entry.outlasts(holder):
            return Touched(Touch.CURRENT)
        self._put(key, entry, replace=True)
        return Touched(Touch.MOVED)

    def _holder(self, key: CacheKey) -> CachedImage | None:
        if key.name not in self._sizes:
            return None
        try:
            return self._servable(key)
        except CorruptEntryError:
            return None

    def _reserve(self, size: int) -> None:
        """Make room for a file of `size` bytes, which counts, whatever comes of this, until it is released."""
        with self._lock:
            self._total_bytes += size
            self._evict()
            is_full = self._total_bytes > self._max_bytes
        if is_full:
            raise TierError(f"{size} bytes do not fit beside what is being written to the disk")

    def _release(self, size: int) -> None:
        with self._lock:
            self._total_bytes -= size

    def _write(self, path: Path, stored: bytes) -> None:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(stored)
            file.flush()
            if self._sync:
                os.fsync(handle)

    def _write_file(self, name: str, data: bytes) -> None:
        temporary = self._temporary / f"{self._process}-{next(self._writes)}"
        self._write(temporary, data)
        path = self._directory / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(path)
        if self._sync:
            flush(path.parent)

    def _place(self, temporary: Path, name: str, size: int) -> None:
        path = self._path(name)
        try:
            temporary.replace(path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
        self._total_bytes -= self._sizes.get(name, 0)
        self._sizes[name] = size  # never absent meanwhile: who looks takes no lock
        self._sizes.move_to_end(name)

    def _evict(self) -> None:
        while self._total_bytes > self._max_bytes and self._sizes:
            self._remove(next(iter(self._sizes)))

    def _delete(self, name: str) -> bool:
        with self._lock:
            return self._remove(name)

    def _reclaim(self, key: CacheKey) -> bool:
        with self._lock:
            metadata = self._metadata(key)
            if metadata is not None and not self._epochs.is_purged(key, metadata.labels):
                return False
            return self._remove(key.name)

    def _remove(self, name: str) -> bool:
        try:
            self._path(name).unlink()
            is_removed = True
        except FileNotFoundError:
            is_removed = False
        self._total_bytes -= self._sizes.pop(name, 0)
        return is_removed

    def _page(self, partition: str, after: str, limit: int) -> list[CacheKey]:
        keys: list[CacheKey] = []
        for directory in sorted(_children(self._directory / KEY_VERSION / partition)):
            names_begin = f"{KEY_VERSION}.{partition}.{directory.name}"
            if after[: len(names_begin)] > names_begin:
                continue
            for name in sorted(file.name for file in _children(directory)):
                if len(keys) == limit:
                    return keys
                if name > after and (key := _key(name)) is not None:
                    keys.append(key)
        return keys

    def _metadata(self, key: CacheKey) -> codec.Metadata | None:
        try:
            with self._path(key.name).open("rb", buffering=0) as file:
                return _read_head(file)[0]
        except (FileNotFoundError, CorruptEntryError):
            return None

    def _path(self, name: str) -> Path:
        version, partition, fingerprint, _ = name.split(".", 3)
        return self._directory / version / partition / fingerprint[:2] / name


def _read_head(file: FileIO) -> tuple[codec.Metadata, int]:
    """The metadata a file begins with, and where its image begins."""
    start = file.read(codec.PREAMBLE_BYTES)
    length = codec.head_length(start)
    return codec.decode_head(start + file.read(length - len(start))), length


def _children(directory: Path) -> list[Path]:
    """What is in a directory; nothing if it is not there."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _begins_with(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb", buffering=0) as opened:
            return opened.read(len(start)) == start
    except FileNotFoundError:
        return False


def _key(name: str) -> CacheKey | None:
    try:
        return CacheKey.parse(name)
    except ValueError:
        return None  # somebody else's file


def flush(path: Path) -> None:
    """Return when the disk has a file, or the names in a directory. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
