"""A short form of the bench: killed at random moments, and with S3 away, nothing that was paid for is lost."""

from __future__ import annotations

from scripts.bench.journal import killed, outage


async def test_a_service_that_is_killed_loses_nothing_that_was_paid_for() -> None:
    result = await killed(kills=3, latency_s=0.3, seed=3)
    assert result.shortfalls == []
    assert result.figures["given and not in S3"] == 0
    assert result.figures["in S3"] > 0


async def test_a_service_without_s3_for_a_while_fails_no_call_and_brings_everything_home() -> None:
    result = await outage(seconds=6, rate=8, rate_after=8, before_s=2, allowed_home_s=60, allowed_mb=150, seed=3)
    assert result.shortfalls == []
    assert result.figures["given to callers"] > 0
