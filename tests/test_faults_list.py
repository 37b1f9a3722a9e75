"""The faults that scripts/faults tries are true: each changes one place of the code as it is, and it compiles."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from scripts.bench.fault_list import FAULTS, TESTS, Fault
from scripts.bench.faults import ROOT, FaultsError, Outcome, faulty, report


def test_there_are_fifty_two_of_different_names_and_six_or_more_in_each_room() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == 52
    rooms = Counter(fault.room for fault in FAULTS)
    assert rooms.keys() == TESTS.keys()
    assert min(rooms.values()) >= 6


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_each_changes_one_place_into_code_that_compiles(fault: Fault) -> None:
    text = faulty(fault)
    assert text != (ROOT / fault.file).read_text()
    compile(text, fault.file, "exec")


@pytest.mark.parametrize("file", sorted({file for files in TESTS.values() for file in files}))
def test_the_tests_of_each_room_are_there(file: str) -> None:
    assert (ROOT / file).is_file()


def test_a_fault_whose_place_is_gone_or_not_the_only_one_says_what_to_do(tmp_path: Path) -> None:
    fault = Fault("a fault", "codec", "code.py", "a = 1", "a = 2")
    (tmp_path / "code.py").write_text("b = 1\n")
    with pytest.raises(FaultsError, match=r"old text not found in code.py.*bring scripts/bench/fault_list.py up"):
        faulty(fault, tmp_path)
    (tmp_path / "code.py").write_text("a = 1\na = 1\n")
    with pytest.raises(FaultsError, match="old text found 2 times"):
        faulty(fault, tmp_path)


def test_what_no_test_finds_is_named(tmp_path: Path) -> None:
    outcomes = [Outcome(FAULTS[0], "tests/test_x.py::test_y"), Outcome(FAULTS[1], None)]
    assert report(["identity"], outcomes, tmp_path / "faults.json") == [f"identity: {FAULTS[1].name}: NOT FOUND"]
    assert '"found_by": "tests/test_x.py::test_y"' in (tmp_path / "faults.json").read_text()
