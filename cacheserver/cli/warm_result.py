"""The result file of `cacheserver warm`: what became of each row, so that a job goes on where it was.

Its first line says of which input it is. Every other line is one row's outcome, written as it comes. A row that failed
is tried again; its last line counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from cacheserver.cli.journal import Journal, JournalError
from cacheserver.client import WarmOutcome, WarmResult

_VERSION = 1
_MAX_ROW = 1 << 32


class Rows:
    """A set of row numbers: a bit for each up to the highest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, row: int) -> None:
        """Note a row."""
        place, bit = divmod(row, 8)
        if place >= len(self._bits):
            self._bits.extend(bytes(place + 1 - len(self._bits) + len(self._bits) // 8))
        if not self._bits[place] & 1 << bit:
            self._bits[place] |= 1 << bit
            self._count += 1

    def __contains__(self, row: int) -> bool:
        place, bit = divmod(row, 8)
        return place < len(self._bits) and bool(self._bits[place] & 1 << bit)

    def __len__(self) -> int:
        return self._count


class ResultFile:
    """The file of one job, ours alone while it is open. `done` are the rows that need no more doing."""

    def __init__(self, path: Path, *, digest: str, job: str) -> None:
        """Open or make the file of the input with this digest.

        Raises:
            JournalError: it is another input's or job's, damaged, or another process writes it.
            OSError: it cannot be written.
        """
        self.path = path
        self.done = Rows()
        self.spent_microusd = 0
        self._journal = Journal(path, {"warm": _VERSION, "input": digest, "job": job})
        try:
            for number, facts in self._journal.entries():
                self._take(facts, number)
        except BaseException:
            self._journal.__exit__()
            raise

    def add(self, outcomes: Iterable[WarmOutcome]) -> None:
        """Write outcomes down; on return they survive the process."""
        self._journal.add(*map(_facts, outcomes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.__exit__()

    def _take(self, facts: dict[str, Any], number: int) -> None:
        row, cost, status = facts.get("row"), facts.get("cost_microusd"), facts.get("status")
        if not (isinstance(row, int) and 0 <= row <= _MAX_ROW and isinstance(cost, int) and isinstance(status, str)):
            raise JournalError(f"{self.path}: line {number} is damaged: move the file away; what is cached stays so")
        self.spent_microusd += cost
        if is_done(status):
            self.done.add(row)


def is_done(status: str | None) -> bool:
    """Whether a row of this status needs no more doing."""
    return status not in {WarmResult.FAILED, WarmResult.ABSENT}


def _facts(outcome: WarmOutcome) -> dict[str, Any]:
    error = outcome.error
    return {
        "row": outcome.row,
        "status": outcome.result or "unknown",
        "keys": outcome.keys,
        "tier": outcome.tier,
        "cost_microusd": outcome.cost_microusd,
        "error": None if error is None else {"reason": error.reason or error.code.name, "message": str(error)},
    }
