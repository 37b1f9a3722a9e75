"""The ledger on a real disk: what was opened survives, what was closed is never lost for a disk that was full."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest

from cacheserver.accounting.ledger import DaySpending, SqliteLedger
from cacheserver.errors import ConfigError, LedgerUnavailableError
from cacheserver.model import Attempt, AttemptOutcome, Usage
from tests.fakes import FakeClock
from tests.waiting import until

DAY_S = 86_400
MIDNIGHT_S = 1_800_000_000 - 1_800_000_000 % DAY_S

SENT = Attempt(
    id="one",
    namespace="shop",
    caller="web",
    upstream="openai",
    model="gpt-image-2",
    images=2,
    estimate_microusd=400_000,
    start_time_s=MIDNIGHT_S + 60.5,
    tags=("spring", "größe"),
)
SETTLED = replace(
    SENT,
    outcome=AttemptOutcome.SETTLED,
    end_time_s=MIDNIGHT_S + 75.25,
    cost_microusd=84_000,
    reason="ok",
    upstream_request_id="req_1",
    usage=Usage(input_tokens=12, output_tokens=2_000, total_tokens=2_012),
)


@asynccontextmanager
async def opened(directory: Path, clock: FakeClock) -> AsyncIterator[SqliteLedger]:
    ledger = await SqliteLedger.at(directory, clock=clock, replica_id="0123456789abcdef")
    yield ledger
    await ledger.aclose()


@pytest.fixture
async def ledger(tmp_path: Path, clock: FakeClock) -> AsyncIterator[SqliteLedger]:
    async with opened(tmp_path, clock) as ledger:
        yield ledger


async def all_rows(ledger: SqliteLedger) -> list[Attempt]:
    return await ledger.rows(since_s=0, until_s=1e12, after="", limit=10_000)


def fill_disk(ledger: SqliteLedger) -> None:
    ledger._connection.execute("PRAGMA max_page_count = 1")


def make_room(ledger: SqliteLedger) -> None:
    ledger._connection.execute("PRAGMA max_page_count = 1000000")


def large(attempt: Attempt) -> Attempt:
    """The same with so many tags that its row needs pages of its own."""
    return replace(attempt, tags=("x" * 20_000,))


async def test_a_call_is_a_row_that_closes_over_its_opening(ledger: SqliteLedger) -> None:
    await ledger.open(SENT)
    assert await all_rows(ledger) == [SENT]
    await ledger.close(SETTLED)
    assert await all_rows(ledger) == [SETTLED]


async def test_rows_survive_a_restart(tmp_path: Path, clock: FakeClock) -> None:
    async with opened(tmp_path, clock) as ledger:
        await ledger.open(SENT)
        await ledger.close(SETTLED)
    async with opened(tmp_path, clock) as ledger:
        assert await all_rows(ledger) == [SETTLED]


async def test_what_was_opened_survives_a_kill_and_is_unknown_then(tmp_path: Path, clock: FakeClock) -> None:
    child = """
import asyncio, os, signal, sys
from pathlib import Path
from cacheserver.accounting.ledger import SqliteLedger
from tests.fakes import FakeClock
from tests.test_ledger import SENT

async def main():
    ledger = await SqliteLedger.at(Path(sys.argv[1]), clock=FakeClock(), replica_id="0123456789abcdef")
    await ledger.open(SENT)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    killed = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", child, str(tmp_path)], check=False)
    assert killed.returncode == -9
    async with opened(tmp_path, clock) as ledger:
        dead = await ledger.close_dead()
        unknown = replace(
            SENT,
            outcome=AttemptOutcome.UNKNOWN,
            cost_microusd=SENT.estimate_microusd,
            end_time_s=clock.now_s(),
            reason="INTERNAL",
        )
        assert dead == [unknown]
        assert await all_rows(ledger) == [unknown]
        assert await ledger.close_dead() == []


async def test_only_an_earlier_life_s_calls_are_dead(tmp_path: Path, clock: FakeClock) -> None:
    async with opened(tmp_path, clock) as ledger:
        await ledger.open(SENT)
        await ledger.open(replace(SENT, id="two"))
        await ledger.close(replace(SETTLED, id="two"))
    async with opened(tmp_path, clock) as ledger:
        await ledger.open(replace(SENT, id="three"))
        assert [attempt.id for attempt in await ledger.close_dead()] == ["one"]
        outcomes = {attempt.id: attempt.outcome for attempt in await all_rows(ledger)}
        assert outcomes == {
            "one": AttemptOutcome.UNKNOWN,
            "two": AttemptOutcome.SETTLED,
            "three": AttemptOutcome.SENT,
        }


async def test_each_commit_is_flushed_to_the_disk(ledger: SqliteLedger) -> None:
    (level,) = ledger._connection.execute("PRAGMA synchronous").fetchone()
    assert level == 2, "FULL: with less a power cut takes the last rows"


async def test_many_calls_share_few_flushes(ledger: SqliteLedger) -> None:
    transactions: list[str] = []
    ledger._connection.set_trace_callback(lambda text: transactions.append(text) if text == "COMMIT" else None)
    await asyncio.gather(*(ledger.open(replace(SENT, id=f"{n:03}")) for n in range(500)))
    assert len(await all_rows(ledger)) == 500
    assert len(transactions) < 50


async def test_a_full_disk_refuses_calls_until_there_is_room(ledger: SqliteLedger) -> None:
    fill_disk(ledger)
    with pytest.raises(LedgerUnavailableError, match=r"full.*nothing is generated"):
        await ledger.open(large(SENT))
    assert await all_rows(ledger) == []
    make_room(ledger)
    await ledger.open(large(SENT))
    assert await all_rows(ledger) == [large(SENT)]


async def test_how_a_call_ended_is_written_when_the_disk_has_room_again(ledger: SqliteLedger) -> None:
    await ledger.open(SENT)
    ledger._connection.execute("PRAGMA query_only = ON")
    await ledger.close(SETTLED)
    assert await all_rows(ledger) == [SENT]
    ledger._connection.execute("PRAGMA query_only = OFF")

    async def is_settled() -> bool:
        return await all_rows(ledger) == [SETTLED]

    await until(is_settled)


async def test_how_a_call_ended_is_written_at_the_latest_when_the_ledger_closes(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with opened(tmp_path, clock) as ledger:
        await ledger.open(SENT)
        ledger._connection.execute("PRAGMA query_only = ON")
        await ledger.close(SETTLED)
        ledger._connection.execute("PRAGMA query_only = OFF")
    async with opened(tmp_path, clock) as ledger:
        assert await all_rows(ledger) == [SETTLED]


async def test_a_call_given_up_while_it_was_opened_is_not_billed(ledger: SqliteLedger) -> None:
    opening = asyncio.create_task(ledger.open(SENT))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening

    async def is_closed() -> bool:
        return [attempt.outcome for attempt in await all_rows(ledger)] == [AttemptOutcome.NOT_BILLED]

    await until(is_closed)


async def test_rows_come_in_pages_oldest_first(ledger: SqliteLedger) -> None:
    for n in (3, 1, 2, 0):
        await ledger.open(replace(SENT, id=f"at-{n}", start_time_s=1000.0 + n // 2))
    first = await ledger.rows(since_s=1000, until_s=1001, after="", limit=3)
    assert [attempt.id for attempt in first] == ["at-0", "at-1"]
    everything = [attempt.id for attempt in await all_rows(ledger)]
    assert everything == ["at-0", "at-1", "at-2", "at-3"]
    after = ""
    paged: list[str] = []
    while page := await ledger.rows(since_s=0, until_s=1e12, after=after, limit=1):
        paged += [attempt.id for attempt in page]
        after = page[-1].id
    assert paged == everything
    assert await ledger.rows(since_s=0, until_s=1e12, after="nobody", limit=1) == []


async def test_sums_are_by_day_and_hold_what_is_settled_or_unknown(ledger: SqliteLedger) -> None:
    yesterday = replace(SETTLED, id="yesterday", start_time_s=MIDNIGHT_S - 0.5)
    unknown = replace(SETTLED, id="unknown", outcome=AttemptOutcome.UNKNOWN, cost_microusd=400_000)
    other = replace(SETTLED, id="other", caller="batch", upstream="azure", cost_microusd=7)
    free = replace(SETTLED, id="free", outcome=AttemptOutcome.NOT_BILLED, cost_microusd=0)
    for attempt in (yesterday, SETTLED, unknown, other, free):
        await ledger.open(replace(attempt, outcome=AttemptOutcome.SENT, cost_microusd=0))
        await ledger.close(attempt)
    await ledger.open(replace(SENT, id="running"))
    today = [
        DaySpending(MIDNIGHT_S, "shop", "batch", "azure", 7),
        DaySpending(MIDNIGHT_S, "shop", "web", "openai", 484_000),
    ]
    assert await ledger.sums(MIDNIGHT_S) == today
    assert await ledger.sums(0) == [DaySpending(MIDNIGHT_S - DAY_S, "shop", "web", "openai", 84_000), *today]


async def test_what_a_provider_calls_a_request_is_kept_within_reason(ledger: SqliteLedger) -> None:
    await ledger.open(SENT)
    await ledger.close(replace(SETTLED, upstream_request_id="\ud800" + "r" * 5_000))
    (row,) = await all_rows(ledger)
    assert row.upstream_request_id == "?" + "r" * 199


async def test_a_ledger_of_a_newer_release_is_refused(tmp_path: Path, clock: FakeClock) -> None:
    async with opened(tmp_path, clock):
        pass
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(ConfigError, match=r"newer release.*version 3, known 2"):
        await SqliteLedger.at(tmp_path, clock=clock, replica_id="0123456789abcdef")


async def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "ledger.db").write_bytes(b"something else" * 500)
    with pytest.raises(ConfigError, match=r"data_dir: cannot open the ledger"):
        await SqliteLedger.at(tmp_path, clock=clock, replica_id="0123456789abcdef")


async def test_a_ledger_of_an_earlier_release_is_taken_over(tmp_path: Path, clock: FakeClock) -> None:
    async with opened(tmp_path, clock) as ledger:
        await ledger.open(SENT)
        await ledger.close(SETTLED)
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.executescript("ALTER TABLE attempts DROP COLUMN quality; PRAGMA user_version = 1;")
    async with opened(tmp_path, clock) as ledger:
        fine = replace(SENT, id="two", quality="high")
        await ledger.open(fine)
        assert await all_rows(ledger) == [SETTLED, fine]


async def test_what_earlier_lives_paid_is_added_up_by_time_and_by_what_was_asked_for(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with opened(tmp_path, clock) as ledger:
        for id_, start_s, outcome, cost in (
            ("a", 60.5, AttemptOutcome.SETTLED, 1),
            ("b", 119.9, AttemptOutcome.SETTLED, 2),
            ("c", 120.0, AttemptOutcome.SETTLED, 4),
            ("d", 120.0, AttemptOutcome.SENT, 0),
            ("e", 120.0, AttemptOutcome.NOT_BILLED, 0),
            ("too old", 59.9, AttemptOutcome.SETTLED, 8),
        ):
            moment_s = MIDNIGHT_S + start_s
            await ledger.open(
                replace(SENT, id=id_, start_time_s=moment_s, outcome=outcome, cost_microusd=cost, quality="high")
            )
    async with opened(tmp_path, clock) as ledger:
        await ledger.close_dead()
        await ledger.open(replace(SENT, id="ours", start_time_s=MIDNIGHT_S + 60.0))
        sums = await ledger.calls_before_us(span_s=60, since_s=MIDNIGHT_S + 60)
    found = [(each.start_s - MIDNIGHT_S, each.outcome, each.calls, each.cost_microusd) for each in sums]
    assert found == [
        (60, AttemptOutcome.SETTLED, 2, 3),
        (120, AttemptOutcome.SETTLED, 1, 4),
        (120, AttemptOutcome.UNKNOWN, 1, 400_000),
    ]
    assert {(each.namespace, each.caller, each.model, each.quality) for each in sums} == {
        ("shop", "web", "gpt-image-2", "high")
    }
