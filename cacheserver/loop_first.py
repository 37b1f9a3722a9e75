"""Which thread goes first: the event loop's. Those of grpc and of our pools give way to it.

Each hit is some messages from grpc's thread, which waits for the sockets, to the event loop's, and the loop wakes
grpc's for what it has to send. Where the two share a core Linux lets who was woken take it from the other, so the loop
was stopped in the midst of what it did as often as it had something to say: ten times for a hit. With a higher nice
value (sched(7)) grpc's runs when the loop waits, and then finds several things to do. On one core a hit takes a quarter
less so, and so does a bare server's. Threads that work give way as much: they and grpc's share what the loop leaves.

Beside other processes it counts within a group of them alone: systemd, containers and terminals make one of a service,
and of the servers it starts for itself. Beside a thread of the loop's right that never rests others get a tenth.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

_NICER = 10
"""Than the loop's. With 5 half of it is gained; with more, no more."""

_NICEST = 19
_TASKS = Path("/proc/self/task")


def pool(most: int | None, name: str) -> ThreadPoolExecutor:
    """Threads that give way, at most so many, whose names begin so. None: as many as Python thinks fit."""
    return ThreadPoolExecutor(most, thread_name_prefix=name, initializer=_give_way)


def others_give_way() -> None:
    """All threads that there are give way to the calling one, the event loop's, as will those that they start."""
    if sys.platform == "linux" and _TASKS.is_dir():
        for task in _TASKS.iterdir():
            if int(task.name) != threading.get_native_id():
                _be_nice(int(task.name))


def _give_way() -> None:
    if sys.platform == "linux":
        _be_nice(threading.get_native_id())


def _be_nice(thread: int) -> None:
    with suppress(OSError):  # it has ended, or a sandbox does not let us: it goes as it comes
        loops = os.getpriority(os.PRIO_PROCESS, os.getpid())  # that is the first thread, which runs the loop
        os.setpriority(os.PRIO_PROCESS, thread, min(_NICEST, loops + _NICER))
