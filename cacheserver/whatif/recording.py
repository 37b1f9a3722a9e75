"""Writing a trace: a row for each picture answered, off the way of the answer.

The answer's way only appends a few values to a list. At every flush a thread makes rows of them, with the keys that
each profile gives, and adds them to the file as a gzip member of its own, so that whoever reads the file sees all up
to the last flush, also when the process was killed. A member says in its header how long it is: what a kill tore is
found by a few seeks, and cut off, before more is written behind it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import structlog

from cacheserver.errors import ConfigError
from cacheserver.identity import PROFILES, identify
from cacheserver.interfaces import Clock
from cacheserver.model import CacheKey, ImageRequest, MatchLevel, Namespace, Outcome, Served
from cacheserver.whatif.trace import COLUMNS, drawn

_log = structlog.get_logger(__name__)

FLUSH_S = 1.0
"""Pause between two flushes: what a kill can lose."""

_MAX_QUEUED = 20_000
_MAX_QUEUED_CHARS = 16_000_000
_EXTRA_CHARS = 64 * 1024
"""At most so much hangs on a request beside its prompt."""

_MAX_MEMO = 20_000
_AT_A_TIME = 20
"""Rows made before the thread lets others work: about a millisecond of a prompt's normalizing."""

_HEADER = struct.Struct("<4BI2BH2BHI")
_TRAILER = struct.Struct("<II")
_LEVEL = 6

Keys = tuple[str, ...]
"""Fingerprints in hexadecimal: the one asked for by, then one for each profile."""


class _Note(NamedTuple):
    """What the way of an answer leaves behind: nothing that holds the picture's bytes."""

    time_s: float
    what: ImageRequest | CacheKey
    namespace: Namespace
    level: MatchLevel | None
    partition: str
    fingerprint: bytes
    variant: int
    quality: str
    size_bytes: int
    cost_microusd: int
    tier: str
    outcome: str

    @property
    def chars(self) -> int:
        """About how much text it keeps in memory."""
        if isinstance(self.what, CacheKey):
            return 0
        return len(self.what.prompt) + (_EXTRA_CHARS if self.what.extra else 0)


class TraceRecorder:
    """Writes what was answered to a file; belongs to the event loop; `flush` is to be called often.

    Best effort: rows that come faster than they can be written, and those a full disk refuses, are dropped and
    counted. Prompts do not get into the file, only hashes of them.
    """

    def __init__(self, file: TraceFile, *, sample: float, clock: Clock) -> None:
        """Only the share `sample` of all keys is recorded, above 0 to 1: always the same keys, all their rows."""
        self._file = file
        self._sample = sample
        self._clock = clock
        self._notes: list[_Note] = []
        self._chars = 0
        self._memo: dict[tuple[object, ...], Keys] = {}
        self.dropped = 0
        """Rows that were not written, though the file had room."""

    def answered(
        self,
        served: Served,
        outcome: Outcome,
        what: ImageRequest | CacheKey,
        *,
        namespace: Namespace,
        match_level: MatchLevel | None,
    ) -> None:
        """A picture was answered to a call for `what`. Never waits and never fails."""
        if self._file.is_full:
            return
        key, image = served.entry.key, served.entry.image
        note = _Note(
            self._clock.now_s(),
            what,
            namespace,
            match_level,
            key.partition,
            key.fingerprint,
            key.variant,
            image.quality,
            len(image.data),
            served.saved_microusd if served.entry.derived_by else image.paid_microusd,
            served.tier,
            outcome,
        )
        if len(self._notes) >= _MAX_QUEUED or self._chars + note.chars > _MAX_QUEUED_CHARS:
            self.dropped += 1
            return
        self._notes.append(note)
        self._chars += note.chars

    async def flush(self) -> None:
        """Write what has come so far; all of it can be read when this returns."""
        notes, self._notes, self._chars = self._notes, [], 0
        if notes:
            writing = asyncio.ensure_future(asyncio.to_thread(self._write, notes))
            try:
                self.dropped += await asyncio.shield(writing)
            except asyncio.CancelledError:
                self.dropped += await writing  # the file has one writer at a time: the next flush must find it free
                raise

    async def aclose(self) -> None:
        """Write what is left and close the file. Nobody else calls `flush` by now."""
        await self.flush()
        await asyncio.to_thread(self._file.close)

    def _write(self, notes: Sequence[_Note]) -> int:
        """In a thread; returns how many rows were lost."""
        rows: list[str] = []
        for number, note in enumerate(notes):
            if number % _AT_A_TIME == _AT_A_TIME - 1:
                time.sleep(0.0005)  # lets the event loop have the interpreter
            if row := self._row(note):
                rows.append(row)
        return 0 if self._file.append("".join(rows).encode()) else len(rows)

    def _row(self, note: _Note) -> str:
        """The row; empty if its key is not among those recorded."""
        keys = self._keys(note)
        if drawn(keys[-1] or keys[0]) >= self._sample:
            return ""
        return (
            f"{note.time_s:.3f},{','.join(keys)},{note.partition},{note.variant},{note.quality.replace(',', ' ')},"
            f"{note.size_bytes},{note.cost_microusd},{note.tier},{note.outcome},{note.namespace.name},{self._sample:g}\n"
        )

    def _keys(self, note: _Note) -> Keys:
        what = note.what
        if isinstance(what, CacheKey):
            return (what.fingerprint.hex(), *("" for _ in PROFILES))
        # What is stored at a lower quality than asked for has the fingerprint of that one. The prompt itself would be
        # up to 32,000 characters.
        name = (note.namespace.name, note.level, note.fingerprint, hash(what.prompt), what.model, what.quality)
        keys = self._memo.get(name)
        if keys is None:
            if len(self._memo) >= _MAX_MEMO:
                self._memo.clear()
            keys = self._memo[name] = keys_of(what, note.namespace, note.level)
        return keys


def keys_of(request: ImageRequest, namespace: Namespace, match_level: MatchLevel | None) -> Keys:
    """The fingerprint that a request is asked for by in its namespace, and the one it would have by each profile."""
    own = identify(request, namespace, match_level).key.fingerprint.hex()
    return own, *(identify(request, replace(namespace, profile=name)).key.fingerprint.hex() for name in PROFILES)


class TraceFile:
    """A file of gzip members that grows to at most `max_bytes`; then it is full, and that is said once."""

    def __init__(self, fd: int, *, size: int, max_bytes: int) -> None:
        self._fd = fd
        self._size = size
        self._max_bytes = max_bytes
        self._fails = False
        self.is_full = False

    @staticmethod
    def open(path: Path, *, max_bytes: int) -> TraceFile:
        """The file at `path`, to go on with or new. Blocks.

        Raises:
            ConfigError: it cannot be written, another process writes to it, or it is no trace of ours.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"trace.path: cannot write {path}: {error.strerror}; name another file") from error
        try:
            return TraceFile._taken(fd, path, max_bytes)
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def _taken(fd: int, path: Path, max_bytes: int) -> TraceFile:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"trace.path: another process writes to {path}; name another file") from None
        size = _whole_members_bytes(fd, path)
        os.ftruncate(fd, size)
        file = TraceFile(fd, size=size, max_bytes=max_bytes)
        if size == 0:
            file.append((",".join(COLUMNS) + "\n").encode())
        return file

    def append(self, lines: bytes) -> bool:
        """Add lines as one member; whether they are in the file, or need not be. Blocks."""
        if not lines or self.is_full:
            return True
        data = gzip_member(lines)
        if self._size + len(data) > self._max_bytes:
            self.is_full = True
            _log.warning("trace_is_full", max_bytes=self._max_bytes, text="recording ends; move the file, and restart")
            return True
        try:
            self._put(data)
        except OSError as error:
            if not self._fails:
                _log.warning("trace_not_written", error=error.strerror)
            self._fails = True
            return False
        self._fails = False
        return True

    def close(self) -> None:
        """Let the file go. Blocks."""
        os.close(self._fd)

    def _put(self, data: bytes) -> None:
        """All of it or nothing."""
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], self._size + written)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)


def gzip_member(data: bytes) -> bytes:
    """`data` as one gzip member (RFC 1952) whose extra field, "CS", is the member's length in bytes."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = compressor.compress(data) + compressor.flush()
    length = _HEADER.size + len(body) + _TRAILER.size
    return _header(length) + body + _TRAILER.pack(zlib.crc32(data), len(data) & 0xFFFFFFFF)


def _header(length: int) -> bytes:
    return _HEADER.pack(0x1F, 0x8B, 8, 4, 0, 0, 255, 8, ord("C"), ord("S"), 4, length)


def _whole_members_bytes(fd: int, path: Path) -> int:
    """How many bytes of the file are whole members: what is behind them was torn by a kill. Raises ConfigError."""
    end = os.fstat(fd).st_size
    offset = 0
    while offset < end:
        header = os.pread(fd, _HEADER.size, offset)
        common = len(_header(0)) - 4
        if header[:common] != _header(0)[: len(header[:common])]:
            raise ConfigError(f"trace.path: {path} is no trace of ours; name another file")
        if len(header) < _HEADER.size or offset + (length := _HEADER.unpack(header)[-1]) > end:
            break
        offset += max(length, _HEADER.size)
    return offset
