"""The memory bench says what falls short, and its load draws what it says it draws."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

from scripts.bench.memory import Load, Run, Sample, resident_bytes

MIB = 1024 * 1024
L1 = 1024 * MIB


def run_of(*resident_mb: float, l1_bytes: int = L1) -> Run:
    """A run whose load began at 100 s, with a sample a second."""
    samples = [Sample(100 + i, int(mb * 1e6), l1_bytes) for i, mb in enumerate(resident_mb)]
    answered = Counter(memory=80, redis=10, upstream=10)
    return Run(L1, load_s=len(samples) - 1, began_s=100, samples=samples, answered=answered)


def test_what_stays_within_the_bound_and_does_not_grow_is_as_it_should_be() -> None:
    run = run_of(1300, 1384, 1300, 1310, 1305, 1300)
    assert run.bound_bytes == pytest.approx(1_384_803_000, rel=1e-6)
    assert run.shortfalls() == []


def test_more_than_the_bound_falls_short() -> None:
    assert run_of(1300, 1390, 1300, 1300, 1300).shortfalls() == ["1,390 MB were resident, not at most 1,385 MB"]


def test_growth_in_the_second_half_falls_short_and_before_it_does_not() -> None:
    assert run_of(900, 1000, 1100, 1100, 1100).shortfalls() == []
    assert run_of(1100, 1100, 1100, 1150, 1200).shortfalls() == ["it grows: by 100 MB over the second half"]


def test_a_run_that_says_nothing_is_told_from_one_that_does() -> None:
    run = run_of(1000, 1000, 1000, 1000, l1_bytes=L1 // 2)
    run.answered = Counter(memory=1)
    run.failures = Counter(UNAVAILABLE=2)
    assert run.shortfalls() == [
        "2 calls failed: UNAVAILABLE",
        "L1 was never full",
        "nothing came from redis",
        "nothing came from upstream",
    ]


class NoChannel:
    """A channel that nobody asks."""

    def unary_unary(self, method: str) -> Any: ...

    def unary_stream(self, method: str) -> Any: ...

    def stream_unary(self, method: str) -> Any: ...


def test_the_load_asks_for_lately_made_pictures_and_for_some_new_ones() -> None:
    load = Load(NoChannel(), callers=1, miss_share=0.1, span=500)  # type: ignore[arg-type] # asks nothing
    load._newest = 1_000
    drawn = [load._any() for _ in range(5_000)]
    new = [number for number in drawn if number > 1_000]
    assert 400 < load._newest - 1_000 < 600
    assert set(range(1_001, load._newest + 1)) <= set(new)
    assert min(drawn) >= 500
    assert sum(number > 900 - 64 for number in drawn) > len(drawn) / 2


def test_resident_bytes_are_those_of_the_process() -> None:
    assert resident_bytes(os.getpid()) > 10 * MIB
