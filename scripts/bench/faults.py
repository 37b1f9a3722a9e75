"""Whether tests notice: mistakes put into copies of this checkout, one at a time, and the test that finds each.

A fault is found if a test of its room fails in a copy that has it; without it they pass, which is seen first. What no
test finds is a gap in the tests: the run says so and ends non-zero. The checkout itself is never changed.

    scripts/faults                              # all of them, six minutes on two cores
    scripts/faults --room lease --room flight
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.fault_list import FAULTS, TESTS, Fault
from scripts.bench.figures import print_table, print_verdict, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results" / "faults.json"

_AT_ONCE = 2
_TIMEOUT_S = 400.0
"""Hypothesis takes up to five minutes to make what it found small."""

_NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", ".cacheserver", "node_modules", "dist", "results"
)
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
_ALL_PASSED, _SOME_FAILED = 0, 1


class FaultsError(Exception):
    """The faults cannot be tried as they are: the list is out of date, or the tests fail without any."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A fault and the test that found it, None if none did."""

    fault: Fault
    found_by: str | None


def faulty(fault: Fault, root: Path = ROOT) -> str:
    """The text of the fault's file, with the fault in it.

    Raises:
        FaultsError: what it changes is not there, or more than once.
    """
    text = (root / fault.file).read_text()
    if (times := text.count(fault.old)) != 1:
        found = "old text not found" if not times else f"old text found {times} times"
        raise FaultsError(
            f'{found} in {fault.file}, for "{fault.name}": bring scripts/bench/fault_list.py up to date with the code'
        )
    return text.replace(fault.old, fault.new)


def first_failure(room: str, fault: Fault | None, *, process: int) -> str | None:
    """The first test of a room that fails in a copy with `fault` (None: as it is); None if all of them pass.

    `process` is the number of this run among those side by side.

    Raises:
        FaultsError: the fault is out of date, or the tests could not be run.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=_NOT_COPIED)
        (copy / ".venv").symlink_to(ROOT / ".venv")
        if fault is not None:
            (copy / fault.file).write_text(faulty(fault, copy))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS[room]]
        # As the processes of pytest-xdist: no two of them take the same port for their servers.
        side_by_side = {"PYTEST_XDIST_WORKER": f"gw{process}", "PYTEST_XDIST_WORKER_COUNT": str(_AT_ONCE)}
        try:
            ran = subprocess.run(  # noqa: S603 - our own tests
                command,
                cwd=copy,
                env=os.environ | side_by_side | {"PYTHONPATH": str(copy), "TMPDIR": directory},
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end within {_TIMEOUT_S:.0f} s"
    if ran.returncode == _ALL_PASSED:
        return None
    failed = _FAILED.search(ran.stdout)
    if ran.returncode != _SOME_FAILED or failed is None:
        raise FaultsError(f"the tests of {room} could not be run:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return failed[1]


def measure(rooms: Sequence[str]) -> list[Outcome]:
    """Try the faults of these rooms, two at a time.

    Raises:
        FaultsError: see there.
    """
    faults = [fault for fault in FAULTS if fault.room in rooms]
    for fault in faults:
        faulty(fault)
    processes: queue.SimpleQueue[int] = queue.SimpleQueue()
    for process in range(_AT_ONCE):
        processes.put(process)

    def run(room: str, fault: Fault | None = None) -> str | None:
        process = processes.get()
        try:
            found_by = first_failure(room, fault, process=process)
        finally:
            processes.put(process)
        if fault is not None:
            print(f"{room:9} {fault.name}: {f'found by {found_by}' if found_by else 'NOT FOUND'}", flush=True)
        return found_by

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            without_any = list(pool.map(run, rooms))
            _must_pass(rooms, without_any)
            found = pool.map(run, [fault.room for fault in faults], faults)
            return list(map(Outcome, faults, found))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _must_pass(rooms: Sequence[str], failures: Sequence[str | None]) -> None:
    for room, failure in zip(rooms, failures, strict=True):
        if failure is not None:
            raise FaultsError(f"without any fault a test of {room} fails: {failure}")


def report(rooms: Sequence[str], outcomes: Sequence[Outcome], json_file: Path | None) -> list[str]:
    """Print what was found, write it to `json_file`, if any, and tell what was not."""
    rows = []
    for room in rooms:
        found = [outcome.found_by is not None for outcome in outcomes if outcome.fault.room == room]
        rows.append((room, str(len(found)), str(sum(found))))
    print_table("Faults that the tests of their room find", ("room", "faults", "found"), rows)
    write_json(
        json_file,
        "faults",
        [
            {"name": each.fault.name, "room": each.fault.room, "file": each.fault.file, "found_by": each.found_by}
            for each in outcomes
        ],
    )
    return [f"{each.fault.room}: {each.fault.name}: NOT FOUND" for each in outcomes if each.found_by is None]


def main() -> None:
    """Try the faults, print which test finds each, and exit 1 where none does."""
    parser = argparse.ArgumentParser(prog="scripts/faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--room", action="append", choices=list(TESTS), help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where results go; if all rooms are tried, else none")
    options = parser.parse_args()
    rooms = options.room or list(TESTS)
    try:
        outcomes = measure(rooms)
    except FaultsError as error:
        sys.exit(str(error))
    shortfalls = report(rooms, outcomes, options.json or (None if options.room else RESULTS))
    print_verdict(shortfalls)
    sys.exit(1 if shortfalls else 0)


if __name__ == "__main__":
    main()
