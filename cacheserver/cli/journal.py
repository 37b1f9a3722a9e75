"""A file of JSON lines that outlives its writer: what is whole in it counts, a torn last line does not."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class JournalError(ValueError):
    """The file cannot be gone on with; the message says what to do."""


class Journal:
    """JSON objects, one a line, appended and handed to the system at once. Ours alone while it is open.

    Nothing of a file that is somebody else's is changed: only what a writer of ours that was killed left unfinished at
    its end is cut off.

    Args:
        file: made if there is none.
        head: its first line, which says what the file is of; None: it has no such line.

    Raises:
        OSError: the file cannot be read or written.
        JournalError: another process writes it.
    """

    def __init__(self, file: Path, head: Mapping[str, Any] | None = None) -> None:
        self._path = file
        self._head = head
        self._file = file.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise JournalError(f"{file}: another process writes it: wait for it, or name another file") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._file.close()

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """What was written so far after the head, with the numbers of lines. To be read to the end before an `add`.

        Raises:
            JournalError: it is something else, or of something else and more than begun.
        """
        self._file.seek(0)
        whole, end = 0, b"\n"
        other = ""  # what the head names that is not as it should be
        for number, line in enumerate(self._file, start=1):
            entry = self._entry(number, line)
            if entry is None:
                break
            whole, end = whole + len(line), line[-1:]
            if number == 1 and self._head is not None:
                other = self._differs(entry)
            elif other:
                raise JournalError(
                    f"{self._path}: is of another {other} or other options: move it away, or name another file"
                )
            else:
                yield number, entry
        self._file.truncate(0 if other else whole)
        if self._head is not None and (other or not whole):
            self.add(self._head)
        elif end != b"\n":
            self._file.write(b"\n")

    def add(self, *entries: Mapping[str, Any]) -> None:
        """Append some; on return they survive the process."""
        self._file.write(b"".join(map(_line, entries)))
        self._file.flush()

    def _entry(self, number: int, line: bytes) -> dict[str, Any] | None:
        """The object of a line; None for what is left of one whose writer was killed."""
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            return entry
        if line.endswith(b"\n") or (number == 1 and not self._may_begin(line)):
            raise JournalError(f"{self._path}, line {number}: is no JSON object: name another file")
        return None

    def _may_begin(self, torn: bytes) -> bool:
        """Whether this may be the beginning of our first line."""
        return _line(self._head).startswith(torn) if self._head is not None else torn.startswith(b"{")

    def _differs(self, head: dict[str, Any]) -> str:
        """The field in which the file's head is not ours; none if it is."""
        ours = self._head or {}
        if head.keys() != ours.keys():
            raise JournalError(f"{self._path}: is something else: name another file")
        return next((name for name in ours if head[name] != ours[name]), "")


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
