"""The bench of canonical forms makes the same prompts every time, and names what costs too much."""

from dataclasses import replace
from itertools import count, islice
from random import Random

import pytest

from cacheserver.identity.canonical import canonical
from scripts.bench import canonical as bench


def rng() -> Random:
    return Random(1)  # noqa: S311 - the same every time


@pytest.mark.parametrize("language", ["English", "Chinese"])
def test_prompts_are_the_same_every_time_and_no_longer_than_asked_for(language: str) -> None:
    made = list(islice(bench.prompts(language, 400, rng()), 200))
    assert made == list(islice(bench.prompts(language, 400, rng()), 200))
    assert max(map(len, made)) <= 400
    assert len(set(made)) == len(made)
    assert sum(canonical(prompt) != prompt for prompt in made) > 190
    assert {len(prompt) for prompt in islice(bench.filled(language, 2_000, rng()), 5)} == {2_000}


def test_slow_prompts_are_near_the_longest_that_are_rewritten_and_some_are_the_longest_of_all() -> None:
    made = list(islice(bench.adversarial(rng()), 3_000))
    assert made == list(islice(bench.adversarial(rng()), 3_000))
    assert max(map(len, made)) == 32_000
    assert sum(1_900 <= len(prompt.encode()) <= 2_000 for prompt in made) > 2_500
    assert "a " * 1_000 in made
    assert "「" * 9 + "」" * 9 in made[0] or any(prompt.startswith("「" * 9 + "」" * 9) for prompt in made)


def test_the_slowest_is_the_one_whose_least_reading_is_most() -> None:
    readings = iter([0, 1_000, 0, 9_000, 0, 2_000, *([0, 3_000] * 6)])  # "b" was slow once, and no more
    row = bench.row("three", iter("abc"), clock_ns=lambda: next(readings))
    assert (row.number, row.most_us, row.p50_us) == (3, 3.0, 2.0)
    assert row.slowest == "b"


def test_all_kinds_are_measured() -> None:
    ticks = count(0, 1_000)
    rows = bench.measure(10)
    assert [row.number for row in rows] == [2, 1, 1, 2, 1, 1, 10]
    assert bench.row("one", iter(["a cat"]), clock_ns=lambda: next(ticks)).p95_us == 1.0


def test_what_costs_too_much_is_named() -> None:
    good = bench.Row("English", 5, p50_us=200, p95_us=2_000, most_us=20_000, slowest="", is_short=True, is_long=True)
    assert list(good.shortfalls()) == []
    bad = replace(good, p50_us=201, p95_us=2_001, most_us=20_001)
    assert [line.partition(" is ")[0] for line in bad.shortfalls()] == [
        "English: the slowest",
        "English: the median",
        "English: the 95th percentile",
    ]
    assert len(list(replace(bad, is_short=False, is_long=False).shortfalls())) == 1
