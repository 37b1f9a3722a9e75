"""Figures: how they add up, and how they travel."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.figures import (
    LATENCY_BOUNDS_S,
    Bucket,
    Figures,
    Key,
    Sums,
    cell_name,
    cell_prefix,
    read_cell_name,
    total_of,
)
from cacheserver.model import AttemptOutcome, Outcome, StatsField, StatsSpan, TierName

HIT = Key("shop", "gpt-image-2", "high", "web", Outcome.HIT, TierName.MEMORY)

counts = st.integers(min_value=0, max_value=10**15)


@st.composite
def some_figures(draw: st.DrawFn) -> Figures:
    numbers = draw(st.lists(counts, min_size=12, max_size=12))
    micros = draw(st.integers(min_value=0, max_value=10**12))
    latencies = draw(st.lists(counts, min_size=len(LATENCY_BOUNDS_S) + 1, max_size=len(LATENCY_BOUNDS_S) + 1))
    return Figures(*numbers[:2], micros / 1e6, *numbers[2:], latencies)  # type: ignore[arg-type,misc] # in their order


@given(some_figures())
def test_what_is_told_is_read_as_it_was(figures: Figures) -> None:
    assert Figures.decoded(figures.encoded()) == figures


@given(some_figures(), some_figures())
def test_the_sum_of_what_is_told_is_the_sum(one: Figures, other: Figures) -> None:
    read = Figures.decoded(one.encoded())
    read.add(Figures.decoded(other.encoded()))
    one.add(other)
    assert read.encoded() == one.encoded()


@pytest.mark.parametrize("text", ["x", "1,2,three", "," * 40], ids=["word", "words", "too many"])
def test_what_nobody_told_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Figures.decoded(text)


@given(st.text(), st.text(), st.text(), st.sampled_from([None, *Outcome]), st.sampled_from([None, *TierName]))
def test_a_cells_name_is_its_key_whatever_models_and_callers_are_called(
    model: str, caller: str, owner: str, outcome: Outcome | None, tier: TierName | None
) -> None:
    key = Key("shop", model, "high", caller, outcome, tier)
    name = cell_name(owner, key)
    assert read_cell_name(name) == key
    assert name.startswith(cell_prefix(owner))
    assert not name.startswith(cell_prefix(owner + "x"))


@pytest.mark.parametrize("name", ["", "[]", '["a"]', "[1,2,3,4,5,6,7]", '["o","n","m","q","c","no outcome",""]'])
def test_what_is_no_cells_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_cell_name(name)


def test_rows_are_told_apart_by_what_is_asked_for_and_by_time() -> None:
    sums = Sums([StatsField.TIER], StatsSpan.DAY)
    day_s = 86_400
    for start_s, tier in [(0, TierName.MEMORY), (3_600, TierName.MEMORY), (day_s, TierName.MEMORY), (60, TierName.S3)]:
        sums.add(HIT._replace(tier=tier), Figures(requests=1), start_s)
    assert [(row.start_s, row.tier, row.requests, row.namespace) for row in sums.rows] == [
        (0, TierName.MEMORY, 2, ""),
        (0, TierName.S3, 1, ""),
        (day_s, TierName.MEMORY, 1, ""),
    ]
    assert total_of(sums.rows).requests == 4


def test_a_call_is_counted_as_what_it_has_become_and_taken_back() -> None:
    figures = Figures()
    figures.count_calls(1, AttemptOutcome.SENT, cost_microusd=0, estimate_microusd=9)
    assert (figures.open_calls, figures.open_microusd) == (1, 9)
    figures.count_calls(-1, AttemptOutcome.SENT, cost_microusd=0, estimate_microusd=-9)
    figures.count_calls(1, AttemptOutcome.UNKNOWN, cost_microusd=9, estimate_microusd=9)
    figures.count_calls(1, AttemptOutcome.SETTLED, cost_microusd=7, estimate_microusd=9)
    figures.count_calls(1, AttemptOutcome.NOT_BILLED, cost_microusd=0, estimate_microusd=9)
    assert (figures.open_calls, figures.open_microusd) == (0, 0)
    assert (figures.unknown_calls, figures.unknown_microusd) == (1, 9)
    assert (figures.settled_calls, figures.spent_microusd) == (1, 7)


def test_a_moment_lies_in_the_bucket_that_has_not_ended_by_then() -> None:
    assert Bucket.at(60, 119.99) == Bucket(60, 60)
    assert Bucket.at(60, 120.0) == Bucket(60, 120)
    assert Bucket(60, 60).end_s == 120
