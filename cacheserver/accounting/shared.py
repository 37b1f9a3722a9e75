"""The figures that all replicas share: what this process counts, and how the others come to know of it.

Two owners write here. What was answered belongs to this life of the process: it counts from zero, under a name of its
own, and what it has told stays when it dies. What calls to upstreams cost belongs to the replica: its ledger knows
that for sure, also of earlier lives, and so a restart counts it anew and puts it in the place of what was told.

Cells are told as they stand. So what was told twice is told once, and where nobody hears it for a while it is told
later; a store that comes back empty is told everything there is.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import structlog

from cacheserver.accounting.books import CounterBooks
from cacheserver.accounting.kept import Kept, RollOff
from cacheserver.accounting.ledger import CallSums
from cacheserver.accounting.pages import Cells, Pages
from cacheserver.accounting.reading import FigureReader, Query, Report
from cacheserver.errors import AccountsUnavailableError
from cacheserver.figures import HOUR_S, MINUTE_S, Bucket, Figures, Key, key_of_call
from cacheserver.interfaces import Clock, FigureArchive, FigureStore
from cacheserver.model import Attempt, AttemptOutcome, Outcome, TierName
from cacheserver.tasks import OwnedTasks, every

_log = structlog.get_logger(__name__)

_BEAT_S = 0.5
_REST_S = 0.05
_TIDY_S = 60.0
_ROLL_OFF_S = 600.0
_SPANS = (MINUTE_S, HOUR_S)


class CallsBefore(Protocol):
    """The ledger, as far as it is needed here."""

    async def calls_before_us(self, *, span_s: int, since_s: float) -> list[CallSums]:
        """The calls that earlier lives of ours began since then, by buckets of so many seconds."""
        ...


class SharedFigures:
    """This replica's part in the figures of all. `CallFigures`. `start` and `aclose` it."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        store: FigureStore,
        archive: FigureArchive,
        books: CounterBooks,
        clock: Clock,
        replica_id: str,
        kept: Kept,
        keeps_copy: bool = False,
    ) -> None:
        """What `books` count from now on is told to `store`; a store that ends with us needs a copy in the archive."""
        self._store = store
        self._roll_off = RollOff(store=store, archive=archive, clock=clock, kept=kept)
        self._reader = FigureReader(store=store, archive=archive, clock=clock, kept=kept, has_copies=keeps_copy)
        self._books = books
        self._clock = clock
        self._kept = kept
        self._keeps_copy = keeps_copy
        self._answers = Pages(f"life:{secrets.token_hex(8)}")
        self._calls = Pages(f"calls:{replica_id}")
        self._open: dict[str, Attempt] = {}
        self._taken_s = clock.now_s()
        self._telling = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._told: asyncio.Future[None] | None = None
        self._must_forget = True
        """What an earlier life of ours told of calls is still in the store."""
        self._must_correct = keeps_copy
        """And in the archive."""
        self._contents = ""
        self._doubts = 0
        """So many more times everything is told twice: a write nobody answered may still be on its way."""
        self._is_lost = False
        self._tasks = OwnedTasks()

    async def start(self, ledger: CallsBefore) -> None:
        """Count what earlier lives paid, tell it, and from now on tell whatever changes.

        Raises:
            LedgerUnavailableError: the ledger cannot be read.
        """
        now_s = self._clock.now_s()
        for span_s in _SPANS:
            since_s = self._kept.since_s(span_s, now_s)
            for sums in await ledger.calls_before_us(span_s=span_s, since_s=since_s):
                self._figures_of(Bucket(span_s, sums.start_s), _key_of_sums(sums)).count_calls(
                    sums.calls,
                    sums.outcome,
                    cost_microusd=sums.cost_microusd,
                    estimate_microusd=sums.estimate_microusd,
                )
        with suppress(AccountsUnavailableError):  # said, and told later
            await self._tell()
        if self._keeps_copy:
            await self._copy()
        self._tasks.own(self._beat(), "count figures")
        self._tasks.own(self._tell_what_is_wanted(), "tell figures")
        self._tasks.own(every(_TIDY_S, self._tidy, clock=self._clock, name="tidy figures"), "tidy figures")
        self._tasks.own(every(_ROLL_OFF_S, self._roll_off.run, clock=self._clock, name="roll off"), "roll off")

    def sent(self, attempt: Attempt) -> Awaitable[None] | None:
        """See `CallFigures.sent`."""
        self._open[attempt.id] = attempt
        self._count(attempt, AttemptOutcome.SENT, 1)
        self._wanted.set()
        if self._is_lost:
            return None
        if self._told is None:
            self._told = asyncio.get_running_loop().create_future()
        return asyncio.shield(self._told)

    def ended(self, attempt: Attempt) -> None:
        """See `CallFigures.ended`."""
        # By the bucket it was sent in: it is the same call.
        if (sent := self._open.pop(attempt.id, None)) is not None:
            self._count(sent, AttemptOutcome.SENT, -1)
            self._count(attempt, attempt.outcome, 1)
            self._wanted.set()

    async def flush(self) -> None:
        """Tell all that was counted until now.

        Raises:
            AccountsUnavailableError: nobody heard it. It is told later.
        """
        self._take()
        await self._tell()

    async def report(self, query: Query) -> Report:
        """The figures of all replicas that `query` wants, our own up to this moment.

        Raises:
            AccountsUnavailableError: they cannot be read now.
            InvalidRequestError: they are too many rows.
        """
        await self.flush()
        return await self._reader.report(query)

    async def aclose(self) -> None:
        """Tell the last of it, and stop."""
        await self._tasks.aclose(0)
        try:
            await self.flush()
        except AccountsUnavailableError as error:
            _log.error("figures_lost", text="what the last moments counted was told nobody", error=str(error))
        if self._keeps_copy:
            await self._roll_off.copy_latest()

    # ── counting ────────────────────────────────────────────────────────────────────────────────────────────

    def _count(self, attempt: Attempt, outcome: AttemptOutcome, calls: int) -> None:
        key = self._books.told_apart(key_of_call(attempt))
        for span_s in _SPANS:
            self._calls.figures(Bucket.at(span_s, attempt.start_time_s), key).count_calls(
                calls,
                outcome,
                cost_microusd=calls * attempt.cost_microusd,
                estimate_microusd=calls * attempt.estimate_microusd,
            )

    def _figures_of(self, bucket: Bucket, key: Key) -> Figures:
        return self._calls.figures(bucket, self._books.told_apart(key))

    def _take(self) -> None:
        """Put what was answered since the last time into the minute and hour that this time began in."""
        since_s, self._taken_s = self._taken_s, self._clock.now_s()
        buckets = [Bucket.at(span_s, since_s) for span_s in _SPANS]
        for key, figures in self._books.take().items():
            for bucket in buckets:
                self._answers.figures(bucket, key).add(figures)

    async def _beat(self) -> None:
        """Twice a second, at the full second and the half: so at the end of each minute, too."""
        while True:
            await self._clock.sleep(_BEAT_S - self._clock.now_s() % _BEAT_S)
            self._take()
            self._wanted.set()

    async def _tidy(self) -> None:
        """Tell what is recent once more, as a store that was restored may have lost it; and pack what is over."""
        for pages in (self._answers, self._calls):
            now_s = self._clock.now_s()
            pages.tidy(now_s, lambda bucket: self._kept.has(bucket, now_s))  # noqa: B023 - called at once
            pages.put_back_latest()
        if self._keeps_copy:
            await self._copy()

    async def _copy(self) -> None:
        """Put into the archive what ends with us."""
        if self._must_correct:
            self._must_correct = not await self._roll_off.correct(self._calls.owner)
        await self._roll_off.copy_latest()

    # ── telling ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _tell_what_is_wanted(self) -> None:
        """Tell at once what comes after a rest, and after it what has come meanwhile, together."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._tell()
            except AccountsUnavailableError:
                pass  # said, and told the next time
            except Exception as error:  # noqa: BLE001 - whatever it was, calls wait to be told of: the next round may work
                _log.error("figures_not_told", exc_info=error)
            await asyncio.sleep(_REST_S)  # as the ledger's writer rests: it bounds work, and decides nothing

    async def _tell(self) -> None:
        async with self._telling:
            told, self._told = self._told, None
            cells: list[Cells] = [{}, {}]
            try:
                if self._is_lost:
                    await self._store.tell({})  # is it back? All there is to tell may be much by now
                cells = [pages.changed() for pages in (self._answers, self._calls)]
                await self._tell_cells(_merged(cells))
            except BaseException as error:
                self._put_back(cells)
                self._doubts = 2
                if isinstance(error, AccountsUnavailableError):
                    self._note(is_lost=True, error=str(error))
                raise
            finally:
                if told is not None:
                    told.set_result(None)
            if self._doubts:
                self._doubts -= 1
                self._put_back(cells)
            self._note(is_lost=False)

    async def _tell_cells(self, cells: Cells) -> None:
        if self._must_forget:
            await self._forget_earlier_lives()
            self._must_forget = False
        for pages in (self._answers, self._calls):
            for each in pages.untold():
                await self._store.tell(each)
        if not cells:
            return
        contents = await self._store.tell(cells)
        if self._contents and contents != self._contents:
            _log.warning("figures_told_anew", text="the store of figures has lost what it had")
            for pages in (self._answers, self._calls):
                for each in pages.all():
                    await self._store.tell(each)
        self._contents = contents

    async def _forget_earlier_lives(self) -> None:
        now_s = self._clock.now_s()
        for span_s in _SPANS:
            kept = [bucket for bucket in await self._store.buckets(span_s) if self._kept.has(bucket, now_s)]
            await self._store.forget(self._calls.owner, kept)

    def _put_back(self, cells: Sequence[Cells]) -> None:
        for pages, each in zip((self._answers, self._calls), cells, strict=True):
            pages.put_back(each)

    def _note(self, *, is_lost: bool, error: str = "") -> None:
        if is_lost and not self._is_lost:
            _log.warning("figures_not_told", error=error)
        elif self._is_lost and not is_lost:
            _log.info("figures_told")
        self._is_lost = is_lost


def _merged(parts: Sequence[Mapping[Bucket, Mapping[str, str]]]) -> Cells:
    merged: Cells = {}
    for part in parts:
        for bucket, cells in part.items():
            merged.setdefault(bucket, {}).update(cells)
    return merged


def _key_of_sums(sums: CallSums) -> Key:
    return Key(sums.namespace, sums.model, sums.quality, sums.caller, Outcome.MISS, TierName.UPSTREAM)
