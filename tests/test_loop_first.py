"""The event loop's thread goes first: all others give way to it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from cacheserver import loop_first

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="threads have a nice value of their own on Linux alone")

_PROGRAM = """
import asyncio, os, threading
from cacheserver import loop_first

def mine():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

async def main():
    os.setpriority(os.PRIO_PROCESS, 0, {nice})
    asyncio.get_running_loop().set_default_executor(loop_first.pool(None, "worker"))
    go, told = threading.Event(), []
    there_before = threading.Thread(target=lambda: go.wait() and told.append(mine()))
    there_before.start()
    loop_first.others_give_way()
    go.set()
    there_before.join()
    print(mine(), told[0], await asyncio.to_thread(mine))

asyncio.run(main())
"""


def nice_values(nice: int = 0) -> list[int]:
    """Of the loop's thread, of one that was there, and of one that works, in a process that is itself as nice."""
    program = _PROGRAM.format(nice=nice)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)  # noqa: S603 - our own program
    return [int(value) for value in done.stdout.split()]


@ON_LINUX
def test_all_threads_give_way_to_the_loops() -> None:
    assert nice_values() == [0, 10, 10]


@ON_LINUX
def test_in_a_process_that_is_nice_itself_too_as_far_as_there_is_nicer() -> None:
    assert nice_values(nice=5) == [5, 15, 15]
    assert nice_values(nice=15) == [15, 19, 19]


def test_elsewhere_threads_go_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    set_by: list[object] = []
    monkeypatch.setattr(os, "setpriority", lambda *said: set_by.append(said))
    loop_first.others_give_way()
    with loop_first.pool(1, "worker") as pool:
        assert pool.submit(threading.current_thread).result().name.startswith("worker")
    assert not set_by


@ON_LINUX
@pytest.mark.parametrize("refusal", [ProcessLookupError, PermissionError, OSError])
def test_a_thread_that_has_ended_or_may_not_goes_as_it_comes(
    refusal: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise refusal

    monkeypatch.setattr(os, "setpriority", refuse)
    loop_first.others_give_way()
    with loop_first.pool(1, "worker") as pool:
        assert pool.submit(threading.current_thread).result().name.startswith("worker")
