"""A short form of the bench: replicas pay once for what all are asked for, also when their leaders are killed."""

from __future__ import annotations

from scripts.bench.replicas import killed, one


async def test_what_all_replicas_are_asked_for_at_once_is_paid_for_once() -> None:
    result = await one(requests=60, latency_s=1.0, seed=3, replicas=2)
    assert result.shortfalls == []
    assert (result.figures["answered"], result.figures["paid for"]) == (60, 1)


async def test_a_replica_that_is_killed_leaves_nobody_without_an_answer() -> None:
    result = await killed(prompts=20, requests=60, latency_s=0.5, seed=3, replicas=2)
    assert result.shortfalls == []
    assert result.figures["answered"] == 60
