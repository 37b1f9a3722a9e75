"""The bench of the forecast tells a forecast that is off, and counts what the service did."""

from __future__ import annotations

from collections import Counter

import pytest

from cacheserver.whatif.estimate import TierFigures
from scripts.bench import forecast

FORECAST = TierFigures(
    l1_bytes=1,
    ttl_s=None,
    hit_rate=0.5,
    memory_rate=0.3,
    redis_rate=0.2,
    s3_rate=0.0,
    hits=500,
    saved_microusd=0,
    saved_without_rerolls_microusd=0,
)


def test_a_forecast_that_is_off_is_named() -> None:
    good = forecast.figures(FORECAST, Counter(memory=280, joined=15, redis=200, upstream=505))
    assert list(good.shortfalls()) == []
    off = forecast.figures(FORECAST, Counter(memory=200, redis=260, upstream=530, failed=10))
    assert [line.partition(":")[0] for line in off.shortfalls()] == ["10 calls failed", "hits in all", "hits in memory"]


@pytest.mark.timeout(180)  # a service, its Valkey and a hundred pictures
async def test_a_small_log_is_forecast_to_the_point() -> None:
    result = await forecast.measure(rows=150, seed=2)
    assert list(result.shortfalls()) == []
    assert result.answers["upstream"] > 50
    assert result.hit_rate > 0.1
