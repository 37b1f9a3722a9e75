"""A short form of `scripts/chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.run import chaos
from tests.chaos.schedule import schedule


@pytest.mark.timeout(180)  # all of a deployment starts, breaks and comes to rest
async def test_callers_lose_nothing_and_pay_once_while_everything_breaks(tmp_path: Path) -> None:
    result = await chaos(seconds=10.0, seed=84, directory=tmp_path)
    assert result.shortfalls == []


def test_a_seed_tells_which_faults_strike_and_when() -> None:
    assert schedule(7, 60.0) == schedule(7, 60.0)
    assert schedule(7, 60.0) != schedule(8, 60.0)
