"""What the benches share: percentiles, how busy the machine is, tables and JSON."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PROC_STAT = Path("/proc/stat")
_CPU_INFO = Path("/proc/cpuinfo")
_PACKAGES = ("grpcio", "uvloop", "protobuf", "redis", "hiredis", "boto3")
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
    """Write a bench's result to `file`, if any, with when and on what it ran. A figure there is none of is null."""
    if file is None:
        return
    date = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"bench": bench, "date": date, "machine": _machine(), "versions": _versions(), "result": result}
    text = json.dumps(_without_nan(told), indent=2, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def _machine() -> dict[str, Any]:
    models = [line.partition(":")[2].strip() for line in _CPU_INFO.read_text().splitlines() if "model name" in line]
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.processor(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
