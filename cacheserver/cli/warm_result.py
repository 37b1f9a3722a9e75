"""The result file of `cacheserver warm`: what became of each row, so that a job goes on where it was.

Its first line says of which input it is. Every other line is one row's outcome, written as it comes: a process that is
killed leaves at most a torn last line, which is cut off. A row that failed is tried again; its last line counts.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self

from cacheserver.client import WarmOutcome, WarmResult

_VERSION = 1
_MAX_ROW = 1 << 32


class ResultError(ValueError):
    """The result file cannot be gone on with; the message says what to do."""


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
            ResultError: it is another input's or job's, damaged, or another process writes it.
            OSError: it cannot be written.
        """
        self.path = path
        self.done = Rows()
        self.spent_microusd = 0
        self._says = {"warm": _VERSION, "input": digest, "job": job}
        self._file = path.open("a+b")
        try:
            self._lock()
            self._go_on()
        except BaseException:
            self._file.close()
            raise

    def add(self, outcomes: Iterable[WarmOutcome]) -> None:
        """Write outcomes down; on return they survive the process."""
        lines = [json.dumps(_facts(outcome)) + "\n" for outcome in outcomes]
        self._file.write("".join(lines).encode())
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultError(
                f"{self.path}: another process writes it: wait for it, or name another --result"
            ) from None

    def _go_on(self) -> None:
        self._file.seek(0)
        first: dict[str, Any] | None = None
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # torn: its row is asked for again, and cached if it was made
            end += len(line)
            if first is None:
                first = _parsed(line)
                if "warm" not in first:
                    raise ResultError(f"{self.path}: is no result of a warm-up: name another --result")
            else:
                self._check_input(first)
                self._take(_parsed(line), number)
        if first == self._says:
            self._file.truncate(end)
        else:  # nothing but a first line, if that: of a job that was planned and not run
            self._file.truncate(0)
            self._write_first(self._file)

    def _write_first(self, file: BinaryIO) -> None:
        file.write((json.dumps(self._says) + "\n").encode())
        file.flush()

    def _check_input(self, first: dict[str, Any]) -> None:
        if first != self._says:
            what = "job" if first.get("input") == self._says["input"] else "input, or the same with other options"
            raise ResultError(f"{self.path}: is the result of another {what}: move it away, or name another --result")

    def _take(self, facts: dict[str, Any], number: int) -> None:
        row, cost, status = facts.get("row"), facts.get("cost_microusd"), facts.get("status")
        if not (isinstance(row, int) and 0 <= row <= _MAX_ROW and isinstance(cost, int) and isinstance(status, str)):
            raise ResultError(f"{self.path}: line {number} is damaged: move the file away; what is cached stays so")
        self.spent_microusd += cost
        if is_done(status):
            self.done.add(row)


def is_done(status: str | None) -> bool:
    """Whether a row of this status needs no more doing."""
    return status not in {WarmResult.FAILED, WarmResult.ABSENT}


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(line)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


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
