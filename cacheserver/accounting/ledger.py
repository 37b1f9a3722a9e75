"""The ledger: every call to an upstream, one durable row each, in SQLite."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from cacheserver.errors import CacheServerError, ConfigError, LedgerUnavailableError
from cacheserver.interfaces import Clock
from cacheserver.model import Attempt, AttemptOutcome, Usage

_log = structlog.get_logger(__name__)

_VERSION = 2
_DAY_S = 86_400
_RETRY_S = 1.0
_REST_S = 0.01
_MOST_UNWRITTEN = 10_000
_LONGEST_TEXT = 200

_SCHEMA = f"""
CREATE TABLE attempts (
  id TEXT PRIMARY KEY,
  replica TEXT NOT NULL,
  namespace TEXT NOT NULL,
  caller TEXT NOT NULL,
  upstream TEXT NOT NULL,
  model TEXT NOT NULL,
  images INTEGER NOT NULL,
  estimate_microusd INTEGER NOT NULL,
  start_time_s REAL NOT NULL,
  tags TEXT NOT NULL,
  outcome TEXT NOT NULL,
  end_time_s REAL,
  cost_microusd INTEGER NOT NULL,
  reason TEXT NOT NULL,
  upstream_request_id TEXT NOT NULL,
  usage TEXT,
  quality TEXT NOT NULL DEFAULT ''
);
CREATE INDEX attempts_by_time ON attempts (start_time_s, id);
CREATE INDEX attempts_sent ON attempts (outcome) WHERE outcome = 'sent';
PRAGMA user_version = {_VERSION};
"""

_FROM_1_TO_2 = """
ALTER TABLE attempts ADD COLUMN quality TEXT NOT NULL DEFAULT '';
PRAGMA user_version = 2;
"""

_COLUMNS = (
    "id, namespace, caller, upstream, model, images, estimate_microusd, start_time_s, tags, outcome, end_time_s, "
    "cost_microusd, reason, upstream_request_id, usage, quality"
)

# The row of an ended call is whole: should its first writing be missing, it is written now.
_WRITE = f"""
INSERT INTO attempts ({_COLUMNS}, replica) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
  upstream = excluded.upstream, outcome = excluded.outcome, end_time_s = excluded.end_time_s,
  cost_microusd = excluded.cost_microusd, reason = excluded.reason,
  upstream_request_id = excluded.upstream_request_id, usage = excluded.usage
"""  # noqa: S608 - made of constants

_SENT = f"SELECT {_COLUMNS} FROM attempts WHERE outcome = 'sent' AND rowid <= ? ORDER BY rowid"  # noqa: S608 - constants

_PAGE = f"""
SELECT {_COLUMNS} FROM attempts
WHERE start_time_s >= ? AND start_time_s < ?
  AND (? = '' OR (start_time_s, id) > (SELECT start_time_s, id FROM attempts WHERE id = ?))
ORDER BY start_time_s, id LIMIT ?
"""  # noqa: S608 - made of constants

# Tags are a JSON list of strings without quotes in them: one in its quotes is found as text.
_BY_TAG = """
SELECT outcome, SUM(CASE outcome WHEN 'sent' THEN estimate_microusd ELSE cost_microusd END)
FROM attempts WHERE instr(tags, ?) > 0 GROUP BY outcome
"""

_SUMS = f"""
SELECT CAST(start_time_s / {_DAY_S} AS INTEGER) * {_DAY_S}, namespace, caller, upstream, SUM(cost_microusd)
FROM attempts WHERE start_time_s >= ? AND outcome IN ('settled', 'unknown') AND cost_microusd > 0
GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
"""  # noqa: S608 - made of constants

_CALLS = """
SELECT CAST(start_time_s / :span_s AS INTEGER) * :span_s AS start_s, namespace, caller, model, quality, outcome,
  COUNT(*) AS calls, SUM(cost_microusd) AS cost_microusd, SUM(estimate_microusd) AS estimate_microusd
FROM attempts WHERE start_time_s >= :since_s AND rowid <= :last AND outcome != 'not_billed'
GROUP BY 1, 2, 3, 4, 5, 6
"""


@dataclass(frozen=True, slots=True)
class CallSums:
    """Calls of one kind that began in one bucket of time, and what they cost and may cost at most, together."""

    start_s: int
    namespace: str
    caller: str
    model: str
    quality: str
    outcome: AttemptOutcome
    calls: int
    cost_microusd: int
    estimate_microusd: int


@dataclass(frozen=True, slots=True)
class DaySpending:
    """What one caller of one namespace spent at one upstream in one day (UTC), settled and unknown together.

    `day_start_s` is that day's first second since 1970.
    """

    day_start_s: int
    namespace: str
    caller: str
    upstream: str
    microusd: int


class SqliteLedger:
    """`Ledger` in the file `ledger.db`, flushed to the disk before a call is sent. Made by `at`.

    One thread writes. Whatever has come while it flushed goes into its next transaction, so that many calls
    share a flush. Reads have connections of their own, which the write-ahead log lets run beside the writer.
    One process owns the directory.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, clock: Clock, replica_id: str) -> None:
        self._path = path
        self._clock = clock
        self._replica_id = replica_id
        self._connection = connection
        (self._rows_before_us,) = connection.execute("SELECT COALESCE(MAX(rowid), 0) FROM attempts").fetchone()
        self._writer = _Writer(connection)

    @staticmethod
    async def at(directory: Path, *, clock: Clock, replica_id: str) -> SqliteLedger:
        """The ledger in `directory`, made if there is none. `replica_id` goes into every row.

        Raises:
            ConfigError: the file cannot be made or read, or a newer release wrote it.
        """
        path = directory / "ledger.db"
        connection = await asyncio.to_thread(_connect, path)
        return SqliteLedger(path, connection, clock=clock, replica_id=replica_id)

    async def close_dead(self) -> list[Attempt]:
        """The calls that were on their way when an earlier life of ours ended: now unknown, at their estimate.

        Call it before anything else, once.

        Raises:
            LedgerUnavailableError: they could not be written.
        """
        sent = await asyncio.to_thread(self._read, _SENT, (self._rows_before_us,))
        dead = [self._unknown(_attempt(row)) for row in sent]
        for written in [self._writer.write(self._row(attempt)) for attempt in dead]:
            if failure := await asyncio.wrap_future(written):
                raise _unavailable(failure)
        return dead

    async def open(self, attempt: Attempt) -> None:
        """See `Ledger.open`."""
        written = asyncio.wrap_future(self._writer.write(self._row(attempt)))
        try:
            failure = await asyncio.shield(written)
        except asyncio.CancelledError:
            # The row may be written all the same, and whoever gave up will not send the call.
            self._writer.write(self._row(replace(attempt, outcome=AttemptOutcome.NOT_BILLED)), must_not_be_lost=True)
            raise
        if failure:
            raise _unavailable(failure)

    async def close(self, attempt: Attempt) -> None:
        """See `Ledger.close`. What the disk does not take now is offered again until it does, or we end."""
        written = self._writer.write(self._row(attempt), must_not_be_lost=True)
        failure = await asyncio.shield(asyncio.wrap_future(written))
        if failure:
            _log.error("ledger_close_failed", attempt=attempt.id, outcome=str(attempt.outcome), error=failure)

    async def rows(self, *, since_s: float, until_s: float, after: str, limit: int) -> list[Attempt]:
        """See `Ledger.rows`. An `after` that names no row is followed by none.

        Raises:
            LedgerUnavailableError: the file cannot be read.
        """
        found = await asyncio.to_thread(self._read, _PAGE, (since_s, until_s, after, after, limit))
        return [_attempt(row) for row in found]

    async def spent_microusd(self, tag: str, *, open_too: bool = False) -> int:
        """See `Ledger.spent_microusd`.

        Raises:
            LedgerUnavailableError: the file cannot be read.
        """
        rows = await asyncio.to_thread(self._read, _BY_TAG, (json.dumps(tag),))
        return sum(microusd for outcome, microusd in rows if open_too or outcome != AttemptOutcome.SENT)

    async def sums(self, since_s: float) -> list[DaySpending]:
        """What the calls begun at `since_s` or later have cost, settled and unknown, oldest day first.

        Raises:
            LedgerUnavailableError: the file cannot be read.
        """
        return [DaySpending(*row) for row in await asyncio.to_thread(self._read, _SUMS, (since_s,))]

    async def calls_before_us(self, *, span_s: int, since_s: float) -> list[CallSums]:
        """The calls that earlier lives of ours began at `since_s` or later, by buckets of `span_s` seconds.

        Raises:
            LedgerUnavailableError: the file cannot be read.
        """
        values = {"span_s": span_s, "since_s": since_s, "last": self._rows_before_us}
        rows = await asyncio.to_thread(self._read, _CALLS, values)
        return [CallSums(**{**dict(row), "outcome": AttemptOutcome(row["outcome"])}) for row in rows]

    async def aclose(self) -> None:
        """Write what is still to be written and close the file. Nothing else may be called afterwards."""
        await asyncio.to_thread(self._writer.stop)

    def _unknown(self, attempt: Attempt) -> Attempt:
        return replace(
            attempt,
            outcome=AttemptOutcome.UNKNOWN,
            cost_microusd=attempt.estimate_microusd,
            end_time_s=self._clock.now_s(),
            reason=CacheServerError.reason,
        )

    def _read(self, query: str, values: tuple[Any, ...] | dict[str, Any]) -> list[sqlite3.Row]:
        try:
            with closing(sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
                connection.row_factory = sqlite3.Row
                return connection.execute(query, values).fetchall()
        except sqlite3.Error as exc:
            raise LedgerUnavailableError(f"The ledger cannot be read ({exc}).") from exc

    def _row(self, attempt: Attempt) -> tuple[Any, ...]:
        return (
            attempt.id,
            attempt.namespace,
            attempt.caller,
            attempt.upstream,
            attempt.model,
            attempt.images,
            attempt.estimate_microusd,
            attempt.start_time_s,
            json.dumps(attempt.tags),
            attempt.outcome.value,
            attempt.end_time_s,
            attempt.cost_microusd,
            attempt.reason,
            _storable(attempt.upstream_request_id),
            json.dumps(asdict(attempt.usage)) if attempt.usage else None,
            attempt.quality,
            self._replica_id,
        )


@dataclass(frozen=True, slots=True)
class _Write:
    """A row on its way. `done` is what kept it from being written, empty if nothing did."""

    row: tuple[Any, ...]
    must_not_be_lost: bool
    done: Future[str]


class _Writer:
    """The thread that writes, and its connection.

    It rests a moment after each commit: what comes meanwhile shares the next one, and what comes later waits for none.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._waiting: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        # Rows of ended calls that the disk did not take, by id: only the thread touches them.
        self._unwritten: OrderedDict[str, tuple[Any, ...]] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def write(self, row: tuple[Any, ...], *, must_not_be_lost: bool = False) -> Future[str]:
        """Write a row; the future tells when it is on the disk, or why it is not."""
        write = _Write(row, must_not_be_lost, Future())
        self._waiting.put(write)
        return write.done

    def stop(self) -> None:
        """Write all that waits, and end."""
        self._waiting.put(None)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        goes_on = True
        while goes_on:
            group, goes_on = self._next_group()
            failure = self._commit([*self._unwritten.values(), *(write.row for write in group)])
            if failure:
                self._remember(write for write in group if write.must_not_be_lost)
            else:
                self._unwritten.clear()
            for write in group:
                write.done.set_result(failure)
            time.sleep(_REST_S)

    def _next_group(self) -> tuple[list[_Write], bool]:
        """All that waits, at least one; none where it is time to offer again what was not taken."""
        group: list[_Write] = []
        try:
            write = self._waiting.get(timeout=_RETRY_S if self._unwritten else None)
            while write is not None:
                group.append(write)
                write = self._waiting.get_nowait()
        except queue.Empty:
            return group, True
        return group, False

    def _commit(self, rows: list[tuple[Any, ...]]) -> str:
        """Write `rows` to the disk, all or none; what went wrong, empty if nothing did."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(_WRITE, rows)
            self._connection.execute("COMMIT")
        except (sqlite3.Error, ValueError, OverflowError) as exc:
            with contextlib.suppress(sqlite3.Error):
                # SQLite has rolled back by itself after the worst of them.
                self._connection.execute("ROLLBACK")
            return str(exc)
        return ""

    def _remember(self, writes: Iterable[_Write]) -> None:
        for write in writes:
            self._unwritten.pop(write.row[0], None)
            self._unwritten[write.row[0]] = write.row
        while len(self._unwritten) > _MOST_UNWRITTEN:
            attempt_id, _ = self._unwritten.popitem(last=False)
            _log.error("ledger_row_lost", attempt=attempt_id)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made here, used by the writer's thread alone from then on.
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, OSError) as exc:
        raise ConfigError(
            f"data_dir: cannot open the ledger {path}: {exc}; mend its permissions, or move the damaged file away"
        ) from exc
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    # With FULL the log is flushed at every commit; with less, the last rows would not survive a power cut.
    connection.execute("PRAGMA synchronous = FULL")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise ConfigError(
            f"data_dir: a newer release wrote the ledger {path} (version {version}, known {_VERSION}); "
            "run that release, or name another data_dir"
        )
    if version == 0:
        connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    elif version == 1:
        connection.executescript(f"BEGIN; {_FROM_1_TO_2} COMMIT;")


def _attempt(row: sqlite3.Row) -> Attempt:
    fields: dict[str, Any] = dict(row)
    fields["tags"] = tuple(json.loads(fields["tags"]))
    fields["outcome"] = AttemptOutcome(fields["outcome"])
    fields["usage"] = Usage(**json.loads(fields["usage"])) if fields["usage"] else None
    return Attempt(**fields)


def _storable(text: str) -> str:
    """A provider's own text: as long as it should be, and without what SQLite cannot store."""
    return text[:_LONGEST_TEXT].encode("utf-8", "replace").decode()


def _unavailable(failure: str) -> LedgerUnavailableError:
    return LedgerUnavailableError(
        f"The ledger cannot be written ({failure}), so nothing is generated; what is cached is served. "
        "The disk of data_dir may be full or read-only."
    )
