"""The bench of Envoy's routing: what falls short is named, and what is replayed of a trace is whole prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scripts.bench.routing import Asked, Figures, memory_of, read

GOOD = Figures(requests=100, distinct=40, memory_bytes=1, hits_one=60, hits_three=57, keys=100, moved=40)


def test_what_is_as_it_should_be_does_not_fall_short() -> None:
    assert GOOD.shortfalls() == []


@pytest.mark.parametrize("bad", [{"hits_three": 56}, {"hits_one": 0}, {"moved": 41}, {"moved": 0}])
def test_a_figure_that_falls_short_is_named(bad: dict[str, int]) -> None:
    assert len(replace(GOOD, **bad).shortfalls()) == 1


def test_all_requests_of_a_part_of_the_prompts_are_replayed_in_order(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{time},{time % 20},low,{1000 * (time + 1)}" for time in range(60)]
    trace.write_text("\n".join(["time_s,prompt_id,quality,size_bytes", *rows]))
    asked = read(trace, one_in=1)
    assert asked[:20] == asked[20:40] == asked[40:]
    assert asked[1] == Asked("picture 1 in low quality", 20)
    some = read(trace, one_in=3)
    assert 0 < len(some) < 60
    assert len(some) == 3 * len(set(some))
    assert memory_of(asked[:2]) == memory_of([*asked[:2], *asked[:2]]) == 2 * 1_000 + 10 + 20
