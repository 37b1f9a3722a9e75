"""What the benches share: percentiles, how busy the machine is, tables and JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PROC_STAT = Path("/proc/stat")
_WIDE = 200


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` (0 to 100) of them do not exceed; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class BusyCores:
    """How many cores of the whole machine were busy on average since this was made."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()
        self._busy_s = _busy_s()

    def read(self) -> float:
        """The figure as of now; NaN where there is no /proc."""
        return (_busy_s() - self._busy_s) / (time.monotonic() - self._since_s)


def _busy_s() -> float:
    """Seconds of work that the cores have done, since the machine started."""
    if not _PROC_STAT.exists():
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq = map(int, _PROC_STAT.read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are figures."""
    table = Table()
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*row)
    # In a file or a pipe nothing has to fit a screen, and a wrapped table reads badly.
    console = Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)
    console.print(title, style="bold")
    console.print(table)


def print_verdict(shortfalls: Sequence[str]) -> None:
    """Say which figures fall short, or that none does."""
    for line in shortfalls:
        print(f"FALLS SHORT  {line}")
    if not shortfalls:
        print("Every figure is as it should be.")


def write_json(file: Path | None, bench: str, result: Any) -> None:
    """Write a bench's result, and what it ran on, to `file` if there is one. A figure there is none of is null."""
    if file is None:
        return
    machine = {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    text = json.dumps(_without_nan({"bench": bench, "machine": machine, "result": result}), indent=2, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
