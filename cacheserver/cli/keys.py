"""Single keys from the terminal, without Enter."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Wait = Callable[[float], str]
"""Waits so many seconds at most; the key that was pressed meanwhile, empty if none was."""


@contextmanager
def keys() -> Iterator[Wait]:
    """What waits for a key; where standard input is no terminal, it only waits."""
    try:
        import termios  # noqa: PLC0415 - not everywhere there is one
        import tty  # noqa: PLC0415 - as above
    except ImportError:
        yield _only_wait
        return
    if not sys.stdin.isatty():
        yield _only_wait
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield lambda seconds: _key_within(terminal, seconds)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _key_within(terminal: int, seconds: float) -> str:
    readable, _, _ = select.select([terminal], [], [], seconds)
    if not readable:
        return ""
    pressed = os.read(terminal, 1)
    return pressed.decode("ascii", "replace") if pressed else _only_wait(seconds)  # it was closed


def _only_wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""
