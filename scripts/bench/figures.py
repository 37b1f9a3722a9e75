"""What the benches share: percentiles, how busy the machine is, tables and JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PROC_STAT = Path("/proc/stat")


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` (0 to 100) of them do not exceed; NaN of none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def busy_core_s() -> float:
    """Seconds that the machine's cores were busy since it started, all processes together; NaN where /proc is not."""
    if not _PROC_STAT.exists():
        return math.nan
    user, nice, system, _idle, _iowait, irq, softirq = map(int, _PROC_STAT.read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # In a file or a pipe nothing has to fit a screen, and a wrapped table reads badly.
    console.print(table, width=console.width if console.is_terminal else 200)


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
    file.write_text(text + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
