"""Where figures go that the shared store has let go of: a file per day, which nobody changes but by adding to it.

A file holds the cells as they were in the store, owners and all. So a cell that is in both is one, and not two:
whatever dies half way between writing a file and clearing the store, nothing is counted twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import zlib
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cacheserver.errors import AccountsUnavailableError, TierError
from cacheserver.interfaces import Files

Hours = dict[int, dict[str, str]]
"""Cells by name, by the first second of their hour."""

_NAME = re.compile(r"(\d{4}-\d{2}-\d{2})\.json\.gz")
_MAX_PACKED_BYTES = 64 * 1024 * 1024
_MAX_BYTES = 512 * 1024 * 1024
_GZIP = 16 + zlib.MAX_WBITS

_T = TypeVar("_T")


class DirectoryArchive:
    """`FigureArchive` in a directory of this machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def days(self) -> list[str]:
        """See `FigureArchive.days`."""
        names = await self._run(asyncio.to_thread(_names, self._directory))
        return _days(names)

    async def read(self, day: str) -> bytes | None:
        """See `FigureArchive.read`."""
        return await self._run(asyncio.to_thread(_read, self._directory / _name(day)))

    async def write(self, day: str, data: bytes) -> None:
        """See `FigureArchive.write`."""
        await self._run(asyncio.to_thread(_write, self._directory / _name(day), data))

    async def _run(self, work: Awaitable[_T]) -> _T:
        try:
            return await work
        except OSError as error:
            text = f"The directory of old figures, {self._directory}, cannot be used: {error.strerror}."
            raise AccountsUnavailableError(text) from error


class ObjectArchive:
    """`FigureArchive` in object storage."""

    def __init__(self, files: Files) -> None:
        self._files = files

    async def days(self) -> list[str]:
        """See `FigureArchive.days`."""
        names = await self._run(self._files.files("figures/"))
        return _days(name.removeprefix("figures/") for name in names)

    async def read(self, day: str) -> bytes | None:
        """See `FigureArchive.read`."""
        return await self._run(self._files.read_file(f"figures/{_name(day)}", _MAX_PACKED_BYTES))

    async def write(self, day: str, data: bytes) -> None:
        """See `FigureArchive.write`."""
        await self._run(self._files.write_file(f"figures/{_name(day)}", data))

    async def _run(self, work: Awaitable[_T]) -> _T:
        try:
            return await work
        except TierError as error:
            raise AccountsUnavailableError(f"Object storage, which has the old figures: {error}.") from error


def day_of(moment_s: float) -> str:
    """The day (UTC) that a moment lies in."""
    return datetime.fromtimestamp(moment_s, UTC).date().isoformat()


def start_of(day: str) -> int:
    """The day's first second since 1970."""
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())


def pack(hours: Hours) -> bytes:
    """A day's file."""
    text = json.dumps({str(start_s): cells for start_s, cells in sorted(hours.items())}, ensure_ascii=False)
    packer = zlib.compressobj(wbits=_GZIP)
    return packer.compress(text.encode()) + packer.flush()


def unpack(day: str, data: bytes | None) -> Hours:
    """What a day's file holds; nothing if there is none.

    Raises:
        AccountsUnavailableError: it is damaged. Then it is left alone, and nothing is put in its place.
    """
    if data is None:
        return {}
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        text = unpacker.decompress(data, _MAX_BYTES)  # of what is cut short or too long the JSON does not end
        return {
            int(start_s): {str(name): str(cell) for name, cell in cells.items()}
            for start_s, cells in json.loads(text).items()
        }
    except (zlib.error, ValueError, AttributeError) as error:
        raise AccountsUnavailableError(f"The file of old figures of {day} is damaged: mend it or remove it.") from error


def _name(day: str) -> str:
    return f"{day}.json.gz"


def _days(names: Iterable[str]) -> list[str]:
    """The days that files are named after; other files are none of ours."""
    days = []
    for match in filter(None, map(_NAME.fullmatch, names)):
        with suppress(ValueError):
            start_of(match[1])
            days.append(match[1])
    return sorted(days)


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.exists() else []


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_PACKED_BYTES + 1)
    except FileNotFoundError:
        return None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")  # another service may write the same day's
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
