"""A file of JSON lines that outlives its writer: what is whole in it counts, a torn last line does not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self


class DamagedJournalError(ValueError):
    """A line in the midst of the file is no JSON object: nobody wrote that who writes here."""


class Journal:
    """JSON objects, one a line, appended to and handed to the system at once. Use it in a `with`.

    Args:
        file: made if there is none; what a writer that was killed left unfinished at its end is cut off.

    Raises:
        OSError: the file cannot be read or written.
        DamagedJournalError: it is something else.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = self._path.open("ab+")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def entries(self) -> Iterator[dict[str, Any]]:
        """What was written so far. To be read to the end before anything is added."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            yield self._entry(number, line)
        self._file.truncate(whole)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append one."""
        self._file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _entry(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise DamagedJournalError(f"{self._path}, line {number}: is no JSON object; name another file")
        return entry
