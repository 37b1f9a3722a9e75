"""The bench of a report's page names what falls short, and the script sets up before it becomes the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheserver.reports.tables import usd
from scripts.bench.report_in_browser import Seen, shortfalls
from tests.report_rows import DAYS, some_report

FILE = Path("/tmp/report.html")
SCRIPT = Path(__file__).parent.parent / "scripts" / "hit_rate_report.py"


def good() -> Seen:
    total, month = some_report().total, 30 // DAYS
    paid = total.would_cost_microusd - total.saved_microusd
    costs = (usd(month * paid), usd(month * total.would_cost_microusd), usd(month * total.would_cost_microusd // 2))
    return Seen(view="light", requests=[FILE.as_uri()], figures=11, drawings=11, contrast=7.0, costs=costs)


def test_a_page_as_it_should_be_falls_short_of_nothing() -> None:
    assert shortfalls(good(), some_report(), FILE) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"requests": [FILE.as_uri(), "https://example.com/vega.js"]}, "asked for"),
        ({"complaints": ["Refused to load"]}, "complained"),
        ({"drawings": 10}, "10 of 11 figures"),
        ({"figures": 0, "drawings": 0}, "0 of 0 figures"),
        ({"contrast": 4.4}, "contrast of 4.4"),
        ({"too_wide_px": 12}, "12 px too wide"),
        ({"is_broken": True}, "broke out"),
        ({"costs": ("$0.00", "$0.00", "$0.00")}, "calculator"),
        ({"costs": ("", "", "")}, "calculator"),
    ],
)
def test_what_falls_short_is_named(change: dict[str, Any], named: str) -> None:
    [line] = shortfalls(replace(good(), **change), some_report(), FILE)
    assert line.startswith("light: ")
    assert named in line


def checkout(directory: Path, venv: str) -> Path:
    """A checkout of which only what the script starts is there, each telling how it was called."""
    (directory / "scripts").mkdir()
    (directory / ".venv" / "bin").mkdir(parents=True)
    script = shutil.copy(SCRIPT, directory / "scripts")
    for file, text in {"scripts/venv": venv, ".venv/bin/cacheserver": 'echo "cacheserver $*"'}.items():
        (directory / file).write_text(f"#!/bin/sh\n{text}\n")
        (directory / file).chmod(0o755)
    return Path(script)


def run(script: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=False, timeout=30)  # noqa: S603 - our own script


def test_the_script_sets_up_what_charts_need_and_then_is_the_command(tmp_path: Path) -> None:
    ended = run(checkout(tmp_path, 'echo "venv $*"'), "--since", "1d", "--html", "a b.html")
    assert ended.stdout.splitlines() == ["venv report", "cacheserver report --since 1d --html a b.html"]
    assert ended.returncode == 0


def test_the_script_ends_where_it_cannot_set_up(tmp_path: Path) -> None:
    ended = run(checkout(tmp_path, "exit 3"))
    assert (ended.returncode, ended.stdout) == (1, "")
