"""`cacheserver` as chaos runs it: its wall clock is off by what a file says, and its log goes through a pipe.

Through a pipe, so that a limit on the size of its files, which stands for a full disk, does not hit its log.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cacheserver.cli import main
from cacheserver.clock import SystemClock

CLOCK = "CHAOS_CLOCK"
"""Names the file that says by how many seconds the wall clock is off."""

_LOOK_S = 0.05


class _Offset:
    """What the file says, looked at now and then: the service asks for the time at every turn."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset_s = 0.0
        self._looks_s = 0.0

    def now_s(self) -> float:
        now_s = time.monotonic()
        if now_s >= self._looks_s:
            self._offset_s = float(self._file.read_text())
            self._looks_s = now_s + _LOOK_S
        return time.time() + self._offset_s


def _log_through_a_pipe() -> None:
    copying = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, bufsize=0)
    assert copying.stdin is not None
    for stream in (sys.stdout, sys.stderr):
        os.dup2(copying.stdin.fileno(), stream.fileno())
    copying.stdin.close()


if __name__ == "__main__":
    _log_through_a_pipe()
    SystemClock.now_s = staticmethod(_Offset(Path(os.environ[CLOCK])).now_s)  # type: ignore[assignment] # the fault
    main()
