"""Files of lines, plain or gzip, read in bounded blocks however large they or their lines are."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from cacheserver.errors import UnreadableFileError

_GZIP_MAGIC = b"\x1f\x8b"


class Block(NamedTuple):
    """Whole lines of a file, the last of them with its end, and the number of the first, counted from 1."""

    first_line: int
    data: bytes

    def lines(self) -> list[bytes]:
        """The lines without their ends."""
        return self.data.split(b"\n")[:-1]


class LineFile:
    """A file of lines; reading it again begins anew. Gzip is told by its first bytes, not by the name.

    Args:
        path: the file.
        block_bytes: about how much is read at a time.
        max_line_bytes: longer lines are cut off there, and so are what no reader takes for whole.
    """

    def __init__(self, path: Path, *, block_bytes: int = 1 << 20, max_line_bytes: int = 1 << 20) -> None:
        self.path = path
        self.is_cut = False
        """Whether a reading has ended before the gzip stream did: what is missing was never written, or lost."""
        self._has_begun = False
        self._block_bytes = block_bytes
        self._max_line_bytes = max_line_bytes

    def count(self) -> int:
        """How many lines there are. Raises UnreadableFileError."""
        return sum(block.data.count(b"\n") for block in self.blocks())

    def blocks(self) -> Iterator[Block]:
        """All lines, in blocks.

        Raises:
            UnreadableFileError: there is no such file, it cannot be read, or its gzip stream is damaged.
        """
        number = 1
        self._has_begun = False
        try:
            with _opened(self.path) as file:
                for data in self._whole_lines(file):
                    yield Block(number, data)
                    number += data.count(b"\n")
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UnreadableFileError(f"{self.path}: damaged gzip after line {number - 1:,}: {error}") from error
        except OSError as error:
            raise UnreadableFileError(f"{self.path}: {error.strerror or error}") from error

    def _whole_lines(self, file: BufferedReader | gzip.GzipFile) -> Iterator[bytes]:
        rest = b""
        in_long_line = False
        while data := self._read(file):
            if in_long_line:
                _, end, data = data.partition(b"\n")
                in_long_line = not end
            lines, end, begun = data.rpartition(b"\n")
            if end:
                yield rest + lines + end
                rest = begun
            else:
                rest += begun
            if len(rest) > self._max_line_bytes:
                yield rest[: self._max_line_bytes] + b"\n"
                rest, in_long_line = b"", True
        if rest and not self.is_cut:
            yield rest + b"\n"

    def _read(self, file: BufferedReader | gzip.GzipFile) -> bytes:
        """About a block; what was unpacked before a torn end is not lost with it."""
        pieces: list[bytes] = []
        size = 0
        try:
            while size < self._block_bytes and (piece := file.read1(self._block_bytes)):
                pieces.append(piece)
                size += len(piece)
        except EOFError:
            self.is_cut = True
        except gzip.BadGzipFile as error:
            # One byte of the next member's header is not yet an early end to gzip. A wrong checksum is no end at all.
            if not (size or self._has_begun) or "Not a gzipped file" not in str(error):
                raise
            self.is_cut = True
        self._has_begun = True
        return b"".join(pieces)


def _opened(path: Path) -> BufferedReader | gzip.GzipFile:
    with path.open("rb") as file:
        is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    return gzip.GzipFile(path) if is_gzip else path.open("rb")
