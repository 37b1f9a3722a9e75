#!/usr/bin/env python3
"""Fills the cache out of this checkout: scripts/warm_cache.py [options of `cacheserver warm`]. Needs Python alone."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

subprocess.run([ROOT / "scripts" / "venv"], check=True)  # noqa: S603 - our own script
os.execv(ROOT / ".venv" / "bin" / "cacheserver", ["cacheserver", "warm", *sys.argv[1:]])  # noqa: S606 - as above
