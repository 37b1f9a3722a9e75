"""The bench of warm-ups names what falls short, and its rows are what it says they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheserver.cli.warm_rows import Defaults, InputFormat, Source
from cacheserver.client import ImageSpec, WarmItem
from cacheserver.identity import identify
from cacheserver.model import ImageRequest, Namespace
from scripts.bench.warm_up import Killed, Planned, cached_of, shortfalls_of_kills, shortfalls_of_plan, write_rows

PLAN = Planned(
    tier="disk",
    seconds=30.0,
    client_mb=60,
    service_mb=150,
    rows=600,
    duplicates=300,
    cached=100,
    to_generate=200,
)
KILLED = Killed(
    seconds=60.0,
    kills=3,
    provider_calls=50,
    provider_images=50,
    duplicates_billed=0,
    billed_microusd=300,
    settled_rows=50,
    settled_microusd=300,
    rows_with_an_outcome=50,
)


def test_half_of_the_rows_are_duplicates_once_they_are_normalized(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", 60)
    keys = []
    for row in Source(tmp_path / "rows.csv", InputFormat.CSV, Defaults()).rows():
        assert isinstance(row, WarmItem)
        assert isinstance(row.prompt, ImageSpec)
        keys.append(identify(ImageRequest(row.prompt.prompt or "", "m"), Namespace("default", "default")).key)
    assert (len(keys), len(set(keys)), cached_of(60)) == (60, 30, 10)


def test_figures_as_they_should_be_fall_short_of_nothing() -> None:
    assert shortfalls_of_plan(PLAN, 600) == []
    assert shortfalls_of_kills(KILLED, 50) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": 61.0},
        {"client_mb": 501},
        {"service_mb": 501},
        {"rows": 599},
        {"duplicates": 0},
        {"cached": 0},
        {"to_generate": 300},
    ],
)
def test_a_plan_that_falls_short_is_named(wrong: dict[str, Any]) -> None:
    assert len(shortfalls_of_plan(replace(PLAN, **wrong), 600)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"provider_calls": 51},
        {"provider_images": 51},
        {"duplicates_billed": 1},
        {"settled_rows": 49},
        {"settled_microusd": 299},
        {"rows_with_an_outcome": 49},
    ],
)
def test_a_picture_paid_for_twice_is_named(wrong: dict[str, Any]) -> None:
    assert len(shortfalls_of_kills(replace(KILLED, **wrong), 50)) == 1
