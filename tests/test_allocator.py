"""glibc's allocator is set up before the service starts, and gives back what is free."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Mapping

import pytest

from cacheserver import allocator

LIBRARY = ctypes.CDLL(None)
ON_GLIBC = pytest.mark.skipif(not hasattr(LIBRARY, "malloc_trim"), reason="another C library")


class FakeLibrary:
    """Notes what is set."""

    def __init__(self) -> None:
        self.set: dict[int, int] = {}

    def mallopt(self, parameter: int, value: int) -> int:
        self.set[parameter] = value
        return 1


@pytest.mark.parametrize(
    ("env", "parameters"),
    [
        ({}, {-1, -3, -8}),
        ({"MALLOC_ARENA_MAX": "4"}, {-1, -3}),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1:glibc.malloc.mmap_threshold=2"}, {-8}),
    ],
)
def test_what_the_environment_sets_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str], parameters: set[int]
) -> None:
    library = FakeLibrary()
    monkeypatch.setattr(allocator, "_glibc", lambda: library)
    allocator.set_up(env)
    assert library.set.keys() == parameters


def test_where_there_is_no_glibc_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    allocator.set_up()
    assert allocator.giver_back() is None
    assert allocator.taker() is None


_HOLES = """
import os
from cacheserver import allocator
from cacheserver.machine import Machine

allocator.set_up({})
pictures = [os.urandom(1_500_000) for _ in range(100)]
full = Machine().resident_bytes()
del pictures[:-1]
free = Machine().resident_bytes()
allocator.giver_back()()
print(full - free, free - Machine().resident_bytes())
"""


@ON_GLIBC
def test_free_memory_is_kept_until_it_is_asked_to_go_back() -> None:
    # In a process of its own: what is set stays set.
    printed = subprocess.run([sys.executable, "-c", _HOLES], capture_output=True, check=True, text=True)  # noqa: S603 - our own program
    at_once, when_asked = map(int, printed.stdout.split())
    assert at_once < 15_000_000
    assert when_asked > 120_000_000


@pytest.mark.skipif(not hasattr(LIBRARY, "mallinfo2"), reason="another C library, or an old one")
def test_what_is_taken_from_the_allocator_is_told() -> None:
    taken = allocator.taker()
    assert taken is not None
    before = taken()
    pictures = [bytes(1_500_000) for _ in range(10)]
    assert taken() - before == pytest.approx(15_000_000, rel=0.02)
    del pictures
    assert taken() - before == pytest.approx(0, abs=300_000)
