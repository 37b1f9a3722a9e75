"""Threads that share their only core do not drive each other from it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cacheserver import one_core

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="another system than Linux")

_POLICY_OF_A_THREAD = """
import os, threading
from cacheserver import one_core
os.sched_setaffinity(0, {cores})
one_core.set_up()
thread = threading.Thread(target=lambda: print(os.sched_getscheduler(0)))
thread.start()
thread.join()
"""


def policy(cores: set[int]) -> int:
    """Under what policy a thread of a process with these cores runs."""
    program = _POLICY_OF_A_THREAD.format(cores=cores)
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)  # noqa: S603 - our own program


def test_on_one_core_a_thread_that_is_woken_waits() -> None:
    assert policy({min(os.sched_getaffinity(0))}) == os.SCHED_BATCH


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_on_several_nothing_is_set() -> None:
    assert policy(os.sched_getaffinity(0)) == os.sched_getscheduler(0)


def test_where_it_is_not_allowed_it_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_: int, policy: int, __: object) -> None:
        asked.append(policy)
        raise PermissionError

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    one_core.set_up()
    assert asked == [os.SCHED_BATCH]


def test_where_a_system_knows_no_cores_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    one_core.set_up()
