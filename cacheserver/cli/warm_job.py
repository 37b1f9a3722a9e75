"""One job of `cacheserver warm`: checked, planned, run, and gone on with where the connection broke."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cacheserver.cli.output import FAILED, Output, dollars
from cacheserver.cli.warm_result import ResultFile, Rows, is_done
from cacheserver.cli.warm_rows import BadRow, InputError, Source
from cacheserver.client import (
    Client,
    DeadlineError,
    InvalidRequestError,
    TierName,
    TryAgainError,
    WarmItem,
    WarmOutcome,
    WarmProgress,
    WarmTotals,
)

PARTLY = 3
"""Exit code: some rows failed, others did not."""

_SHOWN = 20
_TRIES = 10
_FIRST_WAIT_S, _LAST_WAIT_S = 0.5, 15.0


class PlanFailedError(ValueError):
    """Rows of the plan cannot be used, and they are not to be skipped."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What bounds a job. None is unbounded, or the service's own number."""

    budget_microusd: int | None = None
    max_images_per_minute: int | None = None
    concurrency: int | None = None


@dataclass(slots=True)
class Named:
    """Rows with what is wrong with them: the first few, and how many in all."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, line: int, text: str) -> None:
        """Note one."""
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"line {line}: {text}")

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return "\n".join([*self.first, *([f"and {more:,} more"] if more else [])])


class Job:
    """A job at work. Its methods are called in the order they stand in; `plan` may be left out to fill a tier."""

    def __init__(  # noqa: PLR0913 - what is worked on, and how
        self,
        client: Client,
        output: Output,
        source: Source,
        *,
        pace: Pace,
        tier: TierName | None,
        skips_bad_rows: bool,
    ) -> None:
        self.output = output
        self.source = source
        self.tier = tier
        self._client = client
        self._pace = pace
        self._skips_bad_rows = skips_bad_rows
        self._bad = Named()
        self._rows = 0
        self._failures = Named()
        self._planned = WarmTotals()
        self._file: ResultFile | None = None
        self._name = ""
        self._done_before = 0
        self._ended = Rows()
        self._statuses: Counter[str] = Counter()
        self._spent_microusd = 0

    # ── before anything is spent ────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Read every row once. Raises InputError for rows that cannot be used, unless they are skipped."""
        for row in self.source.rows():
            if isinstance(row, BadRow):
                self._bad.add(row.line, row.text)
            else:
                self._rows += 1
        if self._bad.count:
            self._complain(self._bad, InputError)
        if not self._rows:
            raise InputError(f"{self.source.path}: has no rows")

    def go_on(self, file: ResultFile, name: str) -> None:
        """Leave out what the result file has, and write into it from now on."""
        self._file = file
        self._name = name
        self._done_before = len(file.done)

    def plan(self) -> None:
        """Ask what the rows left would cost. Raises PlanFailedError for rows that the service cannot use."""
        for totals in self._patiently(self._plan_once, "looking"):
            self._planned = totals
        if self._failures.count:
            self._complain(self._failures, PlanFailedError)

    @property
    def costs_something(self) -> bool:
        """Whether the plan has anything to be made."""
        return self._planned.to_generate > 0

    def tell_plan(self) -> int:
        """Print the plan alone; the exit code."""
        self.output.result({"plan": self._plan_facts()}, self._draw_plan)
        return 0

    def draw_plan(self) -> None:
        """Show the plan to whoever is to agree."""
        if not self.output.as_json:
            self._draw_plan(self.output.err)

    # ── the work ────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Have the rows left made, or copied, writing down what becomes of each as it comes."""
        for _ in self._patiently(self._run_once, "filling" if self.tier else "warming"):
            pass

    def tell_result(self) -> int:
        """Print what became of the rows; the exit code."""
        done = len(self._result.done)
        failed = self._rows + self._bad.count - done
        facts = {
            "job": self._name,
            "result": str(self._result.path),
            "rows": self._rows,
            "bad_rows": self._bad.count,
            "done": done,
            "failed": failed,
            "spent_microusd": self._spent_microusd,
            "statuses": dict(self._statuses),
            "plan": None if self.tier else self._plan_facts(),
        }
        self.output.result(facts, lambda console: self._draw_result(console, done=done, failed=failed))
        if not failed:
            return 0
        return PARTLY if done else FAILED

    @property
    def _result(self) -> ResultFile:
        if self._file is None:
            raise AssertionError("go_on was not called")
        return self._file

    def _left(self) -> Iterator[WarmItem]:
        done = self._file.done if self._file is not None else ()
        for row in self.source.rows():
            if isinstance(row, WarmItem) and row.row not in done and row.row not in self._ended:
                yield row

    def _plan_once(self) -> Iterator[WarmProgress]:
        for progress in self._client.warm(
            self._left(),
            plan=True,
            max_images_per_minute=self._pace.max_images_per_minute,
            concurrency=self._pace.concurrency,
        ):
            for outcome in progress.outcomes:
                if isinstance(outcome.error, InvalidRequestError):
                    self._failures.add(outcome.row, _why(outcome.error))
            yield progress

    def _run_once(self) -> Iterator[WarmProgress]:
        file = self._result
        for progress in self._client.warm(
            self._left(),
            job=self._name,
            budget_microusd=self._pace.budget_microusd,
            spent_microusd=file.spent_microusd,
            max_images_per_minute=self._pace.max_images_per_minute,
            concurrency=self._pace.concurrency,
            fill=self.tier,
        ):
            file.add(progress.outcomes)
            for outcome in progress.outcomes:
                self._take(outcome, file)
            yield progress

    def _take(self, outcome: WarmOutcome, file: ResultFile) -> None:
        self._ended.add(outcome.row)
        if is_done(outcome.result):
            file.done.add(outcome.row)
        elif outcome.error is not None:
            self._failures.add(outcome.row, f"{outcome.error.reason or outcome.error.code.name}: {outcome.error}")
        file.spent_microusd += outcome.cost_microusd
        self._spent_microusd += outcome.cost_microusd
        self._statuses[outcome.result or "unknown"] += 1

    def _patiently(self, once: Callable[[], Iterator[WarmProgress]], what: str) -> Iterator[WarmTotals]:
        """Do it, and again where the connection breaks: at most ten times in a row without getting any further."""
        tries = 0
        while True:
            self._failures = Named()
            try:
                for progress in self._shown(once(), what):
                    tries = 0 if progress.outcomes else tries
                    yield progress.totals
            except (TryAgainError, DeadlineError) as error:
                tries += 1
                if tries > _TRIES:
                    raise
                wait_s = min(_FIRST_WAIT_S * 2 ** (tries - 1), _LAST_WAIT_S)
                self.output.err.print(f"{error}; trying again in {wait_s:.0f} s", style="yellow")
                time.sleep(max(wait_s, error.retry_after_s or 0.0))
            else:
                return

    def _shown(self, progress: Iterable[WarmProgress], what: str) -> Iterator[WarmProgress]:
        """The same, with a bar on a terminal meanwhile."""
        err = self.output.err
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[spent]}"),
        )
        left = self._rows - (len(self._file.done) if self._file is not None else 0)
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task(what, total=left, rate="", spent="")
            begun_s = time.monotonic()
            seen = 0
            for each in progress:
                seen += len(each.outcomes)
                self._move(bar, task, max(seen, each.totals.items if what == "looking" else 0), begun_s)
                yield each

    def _move(self, bar: Progress, task: TaskID, rows: int, begun_s: float) -> None:
        per_minute = 60 * rows / max(time.monotonic() - begun_s, 1e-3)
        bar.update(task, completed=rows, rate=f"{per_minute:,.0f}/min", spent=dollars(self._spent_microusd))

    # ── what is told ────────────────────────────────────────────────────────────────────────────────────────

    def _complain(self, named: Named, error: type[ValueError]) -> None:
        if not self._skips_bad_rows:
            raise error(f"{named}\nNothing was spent. Mend the rows, or leave them out with --skip-bad-rows.")
        if not self.output.as_json:
            self.output.err.print(str(named), style="yellow")

    def _plan_facts(self) -> dict[str, Any]:
        totals = self._planned
        return {
            "rows": self._rows,
            "bad_rows": self._bad.count,
            "done": self._done_before,
            "duplicates": totals.duplicates,
            "cached": dict(totals.cached),
            "in_flight": totals.in_flight,
            "to_generate": totals.to_generate,
            "failed": totals.failed,
            "estimated_microusd": totals.estimated_microusd,
            "estimated_s": totals.estimated_s,
            "unpriced": totals.unpriced,
            "unknown_tiers": list(totals.unknown_tiers),
        }

    def _draw_plan(self, console: Console) -> None:
        totals = self._planned
        cached = ", ".join(f"{count:,} in {tier}" for tier, count in totals.cached.items()) or "none"
        before = f", {self._done_before:,} done before" if self._done_before else ""
        lines = [
            f"rows          {self._rows:,}{before}",
            f"duplicates    {totals.duplicates:,}, once they are normalized",
            f"cached        {cached}",
            f"to generate   {totals.to_generate:,} pictures",
            f"cost          at most {dollars(totals.estimated_microusd)}{_time(totals.estimated_s)}",
        ]
        if totals.in_flight:
            lines.append(f"in flight     {totals.in_flight:,}, for somebody else")
        if totals.unpriced:
            lines.append(f"unpriced      {totals.unpriced:,} rows, which are not in the cost: their model has no price")
        if totals.failed:
            lines.append(f"would fail    {totals.failed:,} rows")
        for line in lines:
            console.print(line)
        if totals.unknown_tiers:
            names = ", ".join(totals.unknown_tiers)
            console.print(f"not asked, so what is to be generated may be there: {names}", style="yellow")

    def _draw_result(self, console: Console, *, done: int, failed: int) -> None:
        for status, count in self._statuses.most_common():
            console.print(f"{status:<13} {count:,}")
        if self._failures.count:
            self.output.err.print(str(self._failures), style="red")
        console.print(
            f"{done:,} of {self._rows + self._bad.count:,} rows are done, {failed:,} failed; "
            f"spent {dollars(self._spent_microusd)}",
            style="bold",
        )
        console.print(f"  result  {self._result.path}", style="dim")


def _why(error: InvalidRequestError) -> str:
    return "; ".join(f"{name}: {text}" for name, text in error.violations.items()) or str(error)


def _time(seconds: float | None) -> str:
    """How long it takes, in the unit that suits it; nothing where nothing is to be made."""
    if seconds is None:
        return ""
    minutes = seconds / 60
    if minutes < 1:
        return f", time about {max(1, round(seconds))} s"
    return f", time about {f'{minutes:,.1f} minutes' if minutes < 120 else f'{minutes / 60:,.1f} hours'}"  # noqa: PLR2004 - then hours read better
