"""cacheserver top: its figures and frames on values, and the command against services that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import pty
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from structlog.testing import capture_logs

from cacheserver.cli.frames import Reading, facts, frame, traffic
from cacheserver.cli.top import _Frames, _Reader
from cacheserver.client import (
    Alarm,
    AlarmState,
    Budget,
    BudgetPeriod,
    BudgetScope,
    Client,
    Live,
    Outcome,
    Priority,
    Stats,
    StatsRow,
    TierLive,
    TierName,
    Upstream,
    UpstreamHealth,
)
from cacheserver.embedded import child
from tests.house import House
from tests.provider import OpenAIStandIn
from tests.rpc_front import open_front
from tests.running import ask, calling, environment, running
from tests.test_cli import command, printed
from tests.waiting import until

STARTED = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
BOUNDS_S = (0.01, 0.1, 1.0)


@pytest.fixture(autouse=True)
def _quiet_service() -> Iterator[None]:
    """The service shares this process, and its log lines are not what a command prints."""
    with capture_logs():
        yield


def row(outcome: Outcome | None, tier: TierName | None, requests: int, **facts: Any) -> StatsRow:
    empty = StatsRow("default", outcome, tier, requests, 0, 0.0, 0, 0, 0, 0, 0)
    return replace(empty, **facts)


def reading(
    read_s: float, *rows: StatsRow, up_s: float = 60, started: datetime = STARTED, live: bool = True, **facts: Any
) -> Reading:
    total = row(None, None, sum(each.requests for each in rows))
    total = replace(
        total,
        spent_microusd=sum(each.spent_microusd for each in rows),
        saved_microusd=sum(each.saved_microusd for each in rows),
    )
    state = Live(
        time=started + timedelta(seconds=up_s),
        in_flight=7,
        queue={Priority.INTERACTIVE: 1, Priority.STANDARD: 20, Priority.BATCH: 300, Priority.WARM_UP: 0},
        tiers=(
            TierLive(TierName.MEMORY, breaker_open=False, size_bytes=3_000_000),
            TierLive(TierName.S3, breaker_open=True),
        ),
        held_images=2,
        oldest_held_s=95.0,
    )
    stats = Stats(started, rows, total, 0, 0, {}, 0, BOUNDS_S, live=state if live else None)
    return Reading(read_s, stats, **facts)


def text(shown: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160, markup=False, highlight=False)
    console.print(shown)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def words(shown: RenderableType) -> list[str]:
    """The lines, with one blank wherever a table has many."""
    return [" ".join(line.split()) for line in text(shown).splitlines()]


HIT = row(Outcome.HIT, TierName.MEMORY, 100, saved_microusd=5_000_000, latency_counts=(100, 0, 0, 0))
MISS = row(Outcome.MISS, TierName.UPSTREAM, 50, spent_microusd=2_000_000, latency_counts=(0, 0, 0, 50))
LATER_HIT = replace(HIT, requests=160, saved_microusd=8_000_000, latency_counts=(158, 2, 0, 0))
LATER_MISS = replace(MISS, requests=70, spent_microusd=2_500_000, latency_counts=(0, 0, 0, 70))
FROM_S3 = row(Outcome.HIT, TierName.S3, 10, latency_counts=(0, 10, 0, 0))
JOINED = row(Outcome.COLLAPSED, TierName.UPSTREAM, 10, latency_counts=(0, 0, 10, 0))
DERIVED = row(Outcome.DERIVED, TierName.S3, 20, saved_microusd=1_000_000, latency_counts=(0, 20, 0, 0))
FAILED = row(Outcome.ERROR, None, 4, latency_counts=(4, 0, 0, 0))


# --- figures ---


def test_figures_are_what_happened_between_two_readings() -> None:
    seen = traffic(reading(10, HIT, MISS), reading(12, LATER_HIT, LATER_MISS, FROM_S3, JOINED, FAILED))
    assert seen.span_s == 2
    assert (seen.requests_per_s, seen.errors_per_s) == (52.0, 2.0)
    assert seen.hit_rate == 0.7
    assert seen.tier_rates == {TierName.MEMORY: 0.6, TierName.S3: 0.1}
    assert seen.collapsed_rate == 0.1
    assert (seen.spent_microusd, seen.saved_microusd) == (500_000, 3_000_000)


def test_what_was_derived_is_answered_and_no_hit() -> None:
    seen = reading(10, HIT, MISS, DERIVED, JOINED, FROM_S3, row(Outcome.HIT, TierName.REDIS, 10))
    figures = traffic(None, seen)
    assert (figures.hit_rate, figures.derived_rate, figures.collapsed_rate) == (0.6, 0.1, 0.05)
    assert figures.tier_rates[TierName.S3] == 0.05
    assert "derived 10.0%" in " ".join(words(frame(None, seen)))


def test_the_p95_is_that_of_the_requests_between_two_readings() -> None:
    def fast(count: int) -> StatsRow:
        return replace(HIT, requests=count, latency_counts=(count, 0, 0, 0))

    slow = replace(MISS, requests=1_000, latency_counts=(0, 0, 0, 1_000))
    assert traffic(None, reading(1, fast(1_000), slow)).p95_s == float("inf")
    assert traffic(reading(1, fast(1_000), slow), reading(2, fast(1_100), slow)).p95_s == 0.01
    assert traffic(reading(1, fast(1_000)), reading(2, fast(1_000))).p95_s is None


def test_a_service_that_counts_no_latencies_has_no_p95() -> None:
    silent = replace(HIT, latency_counts=())
    assert traffic(None, reading(1, silent)).p95_s is None


def test_without_an_earlier_reading_the_figures_are_those_since_the_start() -> None:
    seen = traffic(None, reading(10, HIT, MISS, up_s=50))
    assert (seen.span_s, seen.requests_per_s) == (50, 3.0)


def test_another_life_of_the_process_is_counted_from_its_own_start() -> None:
    again = reading(11, replace(HIT, requests=5), up_s=1, started=STARTED + timedelta(hours=1))
    assert traffic(reading(10, HIT, MISS), again) == traffic(None, again)
    assert traffic(None, again).requests_per_s == 5.0


def test_where_nothing_was_asked_for_no_rate_is_made_up() -> None:
    seen = traffic(reading(1, HIT), reading(2, HIT))
    assert (seen.requests_per_s, seen.hit_rate, seen.collapsed_rate, seen.tier_rates) == (0.0, None, None, {})


counts = st.integers(0, 1_000)


@given(before=st.lists(counts, min_size=4, max_size=4), more=st.lists(counts, min_size=4, max_size=4))
def test_the_shares_of_what_was_answered_never_pass_one(before: list[int], more: list[int]) -> None:
    kinds = [
        (Outcome.HIT, TierName.MEMORY),
        (Outcome.HIT, TierName.S3),
        (Outcome.COLLAPSED, TierName.UPSTREAM),
        (Outcome.MISS, TierName.UPSTREAM),
    ]
    then = [row(*kind, count) for kind, count in zip(kinds, before, strict=True)]
    now = [row(*kind, count + add) for kind, count, add in zip(kinds, before, more, strict=True)]
    seen = traffic(reading(1, *then), reading(2, *now))
    assert seen.requests_per_s == sum(more)
    if sum(more):
        assert seen.hit_rate is not None
        assert seen.collapsed_rate is not None
        assert seen.hit_rate == pytest.approx(sum(seen.tier_rates.values()))
        assert 0 <= seen.hit_rate + seen.collapsed_rate <= 1 + 1e-9


# --- frames ---


def test_a_frame_shows_traffic_queue_tiers_and_what_is_held() -> None:
    lines = words(frame(reading(10, HIT, MISS), reading(12, LATER_HIT, LATER_MISS, FROM_S3, JOINED), address="a:1"))
    assert lines[0] == "cacheserver a:1 up 0:01:00 12:01:00 UTC"
    assert "requests/s 50.0 hit rate 70.0% collapsed 10.0% p95 beyond all bounds errors/s 0.0 in 2.0 s" in lines
    money = "spent $2.5000, unknown $0.0000, saved $8.0000 since the start spent $0.5000, saved $3.0000 in 2.0 s"
    assert money in lines
    waiting = "in flight 7 queue interactive 1, standard 20, batch 300, warm_up 0"
    assert f"{waiting} 2 images wait for the last tier, the oldest for 95 s" in lines
    assert lines[lines.index("tier breaker hits holds") + 1 :][:2] == ["memory closed 60.0% 3.0 MB", "s3 open 10.0% -"]


def test_a_frame_shows_upstreams_budgets_and_the_alarms_that_ring() -> None:
    north = Upstream(
        "north",
        "g",
        ("m",),
        UpstreamHealth.DOWN,
        1.0,
        None,
        0,
        1.0,
        0.5,
        12.25,
        in_flight=3,
        calls=9,
        images_per_minute=50,
    )
    day = Budget("global/day", BudgetScope.GLOBAL, "", BudgetPeriod.DAY, 10_000_000, 9_000_000, 500_000, STARTED)
    rings = Alarm("few-hits", "hit_rate_below", AlarmState.RINGING, 0.25, 0.5, STARTED, "https://wiki/few")
    quiet = Alarm("dear", "spend_per_hour_above", AlarmState.QUIET, None, 9.0, STARTED, "")
    shown = frame(None, reading(1, HIT, upstreams=(north,), budgets=(day,), alarms=(rings, quiet)))
    lines = words(shown)
    assert "few-hits rings since 12:00:00: hit_rate_below 0.5, and it is 0.25 https://wiki/few" in lines
    assert "dear" not in text(shown)
    assert "north down 3 50.0% 12.2 s 50" in lines
    assert "global/day 95.0% $9.0000 $0.5000 $10.0000" in lines
    assert "permission" not in text(shown)


def test_a_frame_without_the_permission_admin_says_what_it_leaves_out() -> None:
    shown = text(frame(None, reading(1, HIT, may_administer=False)))
    assert "upstreams, budgets and alarms need the permission admin" in shown


def test_a_frame_of_a_service_that_does_not_tell_how_it_stands_shows_the_rest() -> None:
    lines = words(frame(None, reading(1, HIT, live=False)))
    assert lines[0] == "cacheserver"
    assert any(line.startswith("requests/s") for line in lines)


def test_a_frame_as_facts_is_plain_json_also_beyond_all_bounds() -> None:
    assert facts(None, reading(1, MISS))["traffic"]["p95_s"] is None
    assert facts(None, reading(1, HIT))["traffic"]["p95_s"] == 0.01


# --- the command ---


async def test_once_prints_one_frame_of_a_running_service(tmp_path: Path) -> None:
    async with OpenAIStandIn() as provider, running(environment(tmp_path, provider=provider)) as service:
        async with calling(service) as stub:
            for _ in range(3):
                await stub.GetImage(ask("a red fox"))
        result = await command("top", "--once", "--interval", "0.1", address=service.grpc_address)
        assert result.exit_code == 0, result.output
        as_json = await command("top", "--once", "--interval", "0.1", "--json", address=service.grpc_address)
        with Client(service.grpc_address) as client:
            seen = traffic(None, await asyncio.to_thread(_Reader(client).read))
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0].startswith(f"cacheserver {service.grpc_address} up 0:00:")
    assert "tier breaker hits holds" in lines
    assert any(line.startswith("openai well 0") for line in lines)
    shown = printed(as_json)
    assert shown["live"]["queue"] == {"interactive": 0, "standard": 0, "batch": 0, "warm_up": 0}
    assert [tier["tier"] for tier in shown["live"]["tiers"]] == ["memory", "redis", "disk"]
    assert [alarm["name"] for alarm in shown["alarms"]] == ["breakers", "errors", "unsaved", "journal"]
    assert shown["traffic"]["requests_per_s"] == 0
    assert shown["budgets"] == []
    assert seen.hit_rate == pytest.approx(2 / 3)
    assert seen.p95_s is not None


READER = f"""
[[callers]]
name = "shop"
token_sha256 = "{hashlib.sha256(b"secret").hexdigest()}"
allow = ["read"]
"""


async def test_a_caller_without_the_permission_sees_the_rest_and_is_refused_once(tmp_path: Path) -> None:
    async with OpenAIStandIn() as provider, running(environment(tmp_path, provider=provider), READER) as service:
        with Client(service.grpc_address, token="secret") as client, capture_logs() as events:
            reader = _Reader(client)
            seen = [await asyncio.to_thread(reader.read) for _ in range(3)]
    assert [(each.upstreams, each.budgets, each.alarms, each.may_administer) for each in seen] == [
        (None, None, None, False)
    ] * 3
    asked = [event["rpc"] for event in events if event["event"] == "call"]
    assert asked == ["GetStats", "ListUpstreams", "GetStats", "GetStats"]


async def test_a_service_without_the_admin_api_is_shown_without_it(house: House) -> None:
    async with open_front(house) as front:
        with Client(f"127.0.0.1:{front.server.port}") as client:
            seen = await asyncio.to_thread(_Reader(client).read)
    assert (seen.upstreams, seen.alarms, seen.may_administer) == (None, None, True)


@pytest.mark.parametrize(
    ("args", "word"),
    [(("--json",), "--once"), ((), "no terminal"), (("--once", "--interval", "0"), "interval")],
)
async def test_wrong_use_is_told(args: tuple[str, ...], word: str) -> None:
    result = await command("top", *args)
    assert result.exit_code == 2
    assert word in result.output


async def test_a_service_that_is_away_fails_one_frame() -> None:
    result = await command("top", "--once")
    assert result.exit_code == 1
    assert "127.0.0.1:1" in result.output


async def test_frames_go_on_over_a_restart_of_the_service(tmp_path: Path) -> None:
    [port] = child.free_ports(1)
    env = environment(tmp_path) | {"CACHESERVER_GRPC_PORT": str(port)}
    with Client(f"127.0.0.1:{port}") as client:
        frames = _Frames(_Reader(client), "here")
        assert "trying again" in await _next(frames)
        async with running(env):
            await until(lambda: _says(frames, "it answers again"))
        shown = await _next(frames)
        assert "trying again" in shown
        assert "tier" in shown
        async with running(env):
            await until(lambda: _says(frames, "another process answers, started at"))


async def _next(frames: _Frames) -> str:
    return text(await asyncio.to_thread(frames.next))


async def _says(frames: _Frames, word: str) -> bool:
    """Whether the next frame has it: a channel that lost its service does not look for it at once."""
    return word in await _next(frames)


async def test_on_a_terminal_it_draws_until_q_and_gives_the_terminal_back(tmp_path: Path) -> None:
    async with running(environment(tmp_path)) as service:
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "from cacheserver.cli import main; main()",
            "top",
            "--interval",
            "0.1",
            "--address",
            service.grpc_address,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        )
        os.close(theirs)
        drawn = await _drawn_until(ours, b"requests/s")
        os.write(ours, b"q")
        reading = asyncio.to_thread(_rest, ours)
        drawn += await reading
        assert await process.wait() == 0
        os.close(ours)
    assert b"\x1b[?1049h" in drawn
    assert drawn.rindex(b"\x1b[?1049l") > drawn.index(b"\x1b[?1049h")


async def _drawn_until(terminal: int, word: bytes) -> bytes:
    drawn = b""
    async with asyncio.timeout(30):
        while word not in drawn:
            drawn += await asyncio.to_thread(os.read, terminal, 65_536)
    return drawn


def _rest(terminal: int) -> bytes:
    drawn = b""
    with contextlib.suppress(OSError):  # the other side has closed it
        while part := os.read(terminal, 65_536):
            drawn += part
    return drawn
