"""The bench of the policies replays what happened, knows what hindsight keeps, and names what falls short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cacheserver.whatif.trace import Asked, Trace
from scripts.bench import eviction


def trace(path: Path, prompts: str, size_bytes: int = 1_000) -> Trace:
    rows = "".join(f"{i},{ord(prompt)},low,{size_bytes}\n" for i, prompt in enumerate(prompts))
    path.write_text(f"time_s,prompt_id,quality,size_bytes\n{rows}")
    return Trace(path, price=lambda _: 6_000)


def asked(prompts: str) -> list[Asked]:
    return [Asked(float(i), ord(prompt), 0.0, 10, 1, 1.0) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("prompts", "hits"),
    [
        ("abab", [0, 0, 1, 1]),
        ("abcabc", [0, 0, 0, 1, 1, 0]),  # c comes again last, and is not kept
        ("aaaa", [0, 1, 1, 1]),
        ("abcd", [0, 0, 0, 0]),
    ],
)
def test_hindsight_keeps_what_comes_again_soonest(prompts: str, hits: list[int]) -> None:
    assert [*eviction.replay_belady(asked(prompts), max_bytes=20)] == hits


def test_a_trace_is_replayed_by_every_policy(tmp_path: Path) -> None:
    scanned = "".join(chr(1_000 + number) for number in range(200))
    workload = eviction.read(trace(tmp_path / "trace.csv", f"abab{scanned}ab"))
    result = eviction.measure(workload, shares=[0.05])
    assert (result.requests, result.objects, result.footprint_bytes) == (206, 202, 202_000)
    hits = {row.policy: round(row.hits * 206 / 100) for row in result.rows}
    assert hits["lru"] == 2
    assert hits["belady"] == 4
    assert hits["value"] == hits["value, dollars"] >= 2
    assert {row.worst_window >= 0 for row in result.rows} == {True}


def test_what_falls_short_is_named() -> None:
    good = eviction.Row("value", 0.01, 1, hits=28.5, bytes=24, dollars=24, worst_window=1, hit_us=1.0)
    lru = eviction.Row("lru", 0.01, 1, hits=20.4, bytes=19, dollars=19, worst_window=0, hit_us=1.0)
    known = eviction.Figures(*eviction.EXPECTED_OF, 1, 1, (good, lru))
    assert list(known.shortfalls()) == []
    bad = (replace(good, hits=27.9, worst_window=-1.1, hit_us=3.1), replace(lru, hits=20.8))
    assert [line.partition(":")[0] for line in replace(known, rows=bad).shortfalls()] == [
        *["value at 1 %"] * 3,
        "lru at 1 %",
    ]
    other = replace(known, requests=5, rows=bad)
    assert len(list(other.shortfalls())) == 2
