#!/usr/bin/env python3
"""Hit rates, money and times of a running service: `cacheserver report` out of this checkout.

It sets up .venv with what the charts need, once, and takes the options of `cacheserver report`:
scripts/hit_rate_report.py --since 7d --html report.html
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ROOT / ".venv" / "bin" / "cacheserver"


def main() -> None:
    """Set up, and become the command."""
    if subprocess.run([ROOT / "scripts" / "venv", "report"], check=False).returncode:  # noqa: S603 - our own script
        sys.exit(1)
    os.execv(COMMAND, [COMMAND, "report", *sys.argv[1:]])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
