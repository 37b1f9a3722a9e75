"""What a service does beside its calls, and how it stops in a hurry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from cacheserver.accounting.archive import DirectoryArchive
from cacheserver.accounting.kept import Kept
from cacheserver.accounting.ledger import CallSums, SqliteLedger
from cacheserver.accounting.reading import FigureReader, Query
from cacheserver.app import start, watching
from cacheserver.clock import SystemClock
from cacheserver.control.budgets import LocalBudgets
from cacheserver.control.figures import RedisFigures
from cacheserver.errors import LedgerUnavailableError
from cacheserver.generation.generator import Generator
from cacheserver.machine import Machine, Room
from cacheserver.model import CachePolicy
from cacheserver.precheck import DenyList
from cacheserver.settings import load_settings
from cacheserver.tiers.redis_client import connect, disconnect
from tests.house import House
from tests.provider import OpenAIStandIn
from tests.running import ask, calling, environment, running
from tests.servers import S3Server, ValkeyServer
from tests.waiting import until

CONFIG = """
[namespaces.default]
deny_file = "{}"
"""


def broken_once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Callable[[], int]:
    """Have the first call of a function die of a bug; says how many have begun."""
    calls = 0
    works = getattr(owner, name)

    def once(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError
        return works(*args, **kwargs)

    monkeypatch.setattr(owner, name, once)
    return lambda: calls


class HastyClock(SystemClock):
    """Real time whose pauses are short."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(min(seconds, 0.01))


@pytest.mark.parametrize(
    ("method", "loop"),
    [
        ((watching, "tier_states"), "watch tiers"),
        ((LocalBudgets, "states"), "watch budgets"),
        ((DenyList, "reload"), "reload deny-lists"),
    ],
)
async def test_a_bug_in_the_background_is_said_and_not_the_end_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tuple[object, str], loop: str
) -> None:
    deny_file, file = tmp_path / "deny.txt", tmp_path / "cacheserver.toml"
    deny_file.write_text("nothing\n")
    file.write_text(CONFIG.format(deny_file))
    calls = broken_once(monkeypatch, *method)
    with structlog.testing.capture_logs() as events:
        service = await start(load_settings(file, environment(tmp_path)), clock=HastyClock())
        try:
            await until(lambda: calls() >= 2)
        finally:
            await service.stop()
    assert [event["task"] for event in events if event["event"] == "round_failed"] == [loop]


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_bucket_is_given_its_lifecycle_rule_if_it_can_be(
    tmp_path: Path, s3_server: S3Server, *, is_there: bool
) -> None:
    file, bucket = tmp_path / "cacheserver.toml", s3_server.new_bucket()
    file.write_text("[s3]\nlifecycle_rule = true\n[namespaces.default]\nmax_ttl_s = 864_000\nstale_if_error_s = 1\n")
    async with OpenAIStandIn() as provider:
        env = environment(tmp_path, provider=provider, s3=s3_server)
        env |= {"CACHESERVER_S3_BUCKET": bucket if is_there else "no-such-bucket", "CACHESERVER_S3_PREFIX": ""}
        with structlog.testing.capture_logs() as events:
            await (await start(load_settings(file, env), clock=HastyClock())).stop()
    assert any(event["event"] == "lifecycle_rule_not_set" for event in events) is not is_there
    if is_there:
        [rule] = s3_server.client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
        assert (rule["ID"], rule["Expiration"]) == ("cacheserver v1/", {"Days": 12})


async def test_memory_is_a_share_of_the_container_and_gives_way_where_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = {"bytes": 0}
    room = Room(400 * 2**20, is_container=True, used_bytes=lambda: use["bytes"])
    monkeypatch.setattr(Machine, "room", lambda _: room)
    with structlog.testing.capture_logs() as events:
        service = await start(load_settings(None, environment(tmp_path)), clock=HastyClock())
        try:
            async with httpx.AsyncClient(base_url=f"http://{service.http_address}", trust_env=False) as http:

                async def has(*lines: str) -> bool:
                    text = (await http.get("/metrics")).text
                    return all(line in text for line in lines)

                assert await has("cacheserver_memory_limit_bytes 4.194304e+08", "cacheserver_resident_bytes ")
                await until(lambda: has("cacheserver_memory_room_bytes 1.048576e+08"))
                use["bytes"] = 399 * 2**20
                await until(lambda: has("cacheserver_memory_room_bytes 0.0"))
                use["bytes"] = 0
                await until(lambda: has("cacheserver_memory_room_bytes 1.048576e+08"))
                await until(lambda: any(event["event"] == "memory_no_longer_short" for event in events))
        finally:
            await service.stop()
    [serving] = [event for event in events if event["event"] == "serving"]
    assert "memory (100 MiB, a quarter of the container's)" in serving["tiers"]


async def test_where_nobody_tells_how_much_memory_there_is_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "room", lambda _: None)
    monkeypatch.setattr(Machine, "resident_bytes", lambda _: None)
    with structlog.testing.capture_logs() as events:
        async with running(environment(tmp_path)):
            pass
    assert [event["event"] for event in events].count("memory_not_guarded") == 1
    [serving] = [event for event in events if event["event"] == "serving"]
    assert "memory (256 MiB) >" in serving["tiers"]


async def test_a_cache_whose_closing_is_cancelled_leaves_nothing_running(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacheserver.cache._REMEMBERING_S", 0.0)
    house.upstream.hold()
    calls = [
        asyncio.create_task(house.ask("a red fox")),
        asyncio.create_task(house.ask(cache_policy=CachePolicy.NO_STORE)),
    ]
    await house.upstream.arrived(2)
    closing = asyncio.create_task(house.cache.aclose(300))
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait({closing})
    assert closing.cancelled()
    assert (house.cache.in_flight, house.cache._tasks._tasks) == (0, set())
    await asyncio.wait(calls)


async def test_calls_that_lost_a_race_have_what_is_left_of_the_drain_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    aclose = Generator.aclose

    async def noted(self: Generator, grace_s: float = 0.0) -> None:
        given.append(grace_s)
        await aclose(self, grace_s)

    monkeypatch.setattr(Generator, "aclose", noted)
    async with running(environment(tmp_path, server__drain_timeout_s=300)):
        pass
    assert [250 < grace_s <= 300 for grace_s in given] == [True]


async def test_a_start_that_fails_half_way_leaves_the_figures_of_its_calls_as_they_are(
    tmp_path: Path, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreadable(self: SqliteLedger, **values: object) -> list[CallSums]:  # noqa: ARG001 - as the real one
        raise LedgerUnavailableError("unreadable")

    async with OpenAIStandIn() as provider:
        settings = load_settings(None, environment(tmp_path, provider=provider, redis=valkey_server))
        service = await start(settings)
        async with calling(service) as stub:
            await stub.GetImage(ask("a red fox"))
        await service.stop()
        with monkeypatch.context() as patch:
            patch.setattr(SqliteLedger, "calls_before_us", unreadable)
            with pytest.raises(LedgerUnavailableError):
                await start(settings)
    client = connect(valkey_server.url, timeout_s=5.0, connect_timeout_s=5.0)
    store = RedisFigures(client=client, prefix=settings.redis.prefix)
    report = await FigureReader(
        store=store, archive=DirectoryArchive(tmp_path), clock=SystemClock(), kept=Kept()
    ).report(Query(since_s=0))
    await disconnect(client)
    assert sum(row.settled_calls for row in report.rows) == 1
