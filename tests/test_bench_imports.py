"""The bench of imports, small: an importer that is killed on the way leaves every picture stored once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from scripts.bench.imports import Figures, Scale, measure, picture, write_manifest
from tests.running import environment, running


@pytest.fixture
def good() -> Figures:
    return Figures(
        tier="disk",
        rows=100,
        kills=3,
        missed_kills=0,
        seconds=0.2,
        rows_per_s=500.0,
        busy_cores=1.0,
        stored=100,
        missing=0,
        twice=0,
        asked=10,
        wrong=0,
        upstream_calls=0,
    )


@pytest.mark.no_cover
async def test_an_importer_that_is_killed_leaves_every_picture_stored_once(tmp_path: Path) -> None:
    rows = 800
    manifest = await asyncio.to_thread(write_manifest, tmp_path / "pictures", rows)
    (tmp_path / "data").mkdir()
    with capture_logs():
        async with running(environment(tmp_path / "data", redis__embedded=False)) as service:
            figures = await measure(service.grpc_address, manifest, Scale(rows, kills=2, sample=20), tier="s3")
    assert (figures.stored, figures.asked) == (rows, 20)
    assert figures.shortfalls() == []


def test_every_picture_is_its_own() -> None:
    assert len({picture(number) for number in range(1000)}) == 1000
    assert 700 < len(picture(1)) < 1200


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ({"stored": 99, "missing": 1}, "99 of 100 pictures are stored, 1 are missing"),
        ({"stored": 101}, "101 of 100 pictures are stored"),
        ({"missed_kills": 1}, "the importer had ended 1 times before"),
        ({"twice": 1}, "1 pictures are stored more than once"),
        ({"wrong": 2}, "2 of 10 GetImage brought wrong bytes"),
        ({"upstream_calls": 1}, "1 calls went upstream"),
        ({"rows_per_s": 299.0}, "299 rows a second, not 300"),
    ],
)
def test_a_figure_that_falls_short_is_named(good: Figures, spoiled: dict[str, Any], named: str) -> None:
    assert good.shortfalls() == []
    assert any(line.startswith(named) for line in replace(good, **spoiled).shortfalls())
