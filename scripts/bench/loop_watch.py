"""How long a service keeps whoever comes waiting, seen from outside, and how much of that it had no core for.

A thread asks for /healthz again and again on one connection. Beside how long each answer took stands what the kernel
says of the service's threads meanwhile (`/proc/PID/task/*/schedstat`: how long each ran, and was ready to and had no
core): a machine that has other things to do makes an event loop late, too, and that is not the service's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_EVERY_S = 0.005
_READ_BYTES = 100
_REQUEST = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Probe:
    """One answer: when it was asked for (seconds of time.perf_counter), how long it took, and what was so meanwhile.

    Args:
        at_s: when it was asked for.
        ms: how long it took.
        ran_ms: how long the service's threads ran, all together.
        elsewhere_ms: how long at least something else than the service had the core that one of its threads, or the
            one that asks, was ready to run on.
    """

    at_s: float
    ms: float
    ran_ms: float
    elsewhere_ms: float

    @property
    def own_ms(self) -> float:
        """How long it took less what the service is not to blame for."""
        return max(0.0, self.ms - self.elsewhere_ms)


@dataclass(frozen=True, slots=True)
class Ran:
    """How long a thread has run, and has been ready to and had no core, in milliseconds."""

    ran_ms: float
    waited_ms: float


def elsewhere_ms(before: Sequence[Ran], after: Sequence[Ran]) -> float:
    """How long at least a thread was kept from a core by others than those of its own process.

    While one waits, the others may be what it waits for: only what is beyond their running was elsewhere.
    """
    spans = [(b.ran_ms - a.ran_ms, b.waited_ms - a.waited_ms) for a, b in zip(before, after, strict=True)]
    all_ran_ms = sum(ran_ms for ran_ms, _ in spans)
    return max((max(0.0, waited_ms - (all_ran_ms - ran_ms)) for ran_ms, waited_ms in spans), default=0.0)


class Watcher:
    """Asks again and again while it is entered. The service's threads are those that it has then."""

    def __init__(self, port: int, pid: int) -> None:
        """`port` is that of HTTP on this machine."""
        self._port = port
        self._tasks = Path("/proc") / str(pid) / "task"
        self._done = threading.Event()
        self.probes: list[Probe] = []

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="watcher")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        with ExitStack() as stack:
            files = [
                stack.enter_context((task / "schedstat").open("rb", buffering=0)).fileno()
                for task in self._tasks.iterdir()
            ]
            mine = stack.enter_context(Path("/proc/thread-self/schedstat").open("rb", buffering=0)).fileno()
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", self._port)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self._done.wait(_EVERY_S):
                before, own_before = _read(files), _read([mine])
                at_s = time.perf_counter()
                connection.sendall(_REQUEST)
                if not connection.recv(65_536):
                    return
                ms = (time.perf_counter() - at_s) * 1e3
                after, own_after = _read(files), _read([mine])
                # Not both: they may have waited at the same time.
                away_ms = max(elsewhere_ms(before, after), elsewhere_ms(own_before, own_after))
                ran_ms = sum(b.ran_ms - a.ran_ms for a, b in zip(before, after, strict=True))
                self.probes.append(Probe(at_s, ms, ran_ms, away_ms))


def _read(files: Sequence[int]) -> list[Ran]:
    return [_ran(file) for file in files]


def _ran(file: int) -> Ran:
    try:
        ran, waited, _ = os.pread(file, _READ_BYTES, 0).split()
    except OSError:
        return Ran(0.0, 0.0)  # the thread has ended
    return Ran(int(ran) / 1e6, int(waited) / 1e6)
