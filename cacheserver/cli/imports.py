"""cacheserver import: pictures that were paid for elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from cacheserver.cli.journal import Journal, JournalError
from cacheserver.cli.manifest import Manifest, Row, RowError
from cacheserver.cli.options import Link, Namespace
from cacheserver.cli.output import FAILED, WRONG_USE, Output
from cacheserver.cli.session import session
from cacheserver.client import CacheError, ImportItem, ImportOutcome, TryAgainError

_DEFAULT_NAMESPACE = "default"
_BATCH_ROWS = 32
_PAUSE_S = 5.0
_wait = time.sleep
_BATCH_BYTES = 256 * 1024
_SHOWN = 20
"""Complaints and failures that are shown; the result file has all of them."""


@dataclass(slots=True)
class _Count:
    """What has become of a manifest's rows."""

    rows: int
    before: int = 0
    created: int = 0
    present: int = 0
    failed: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outcome: ImportOutcome) -> dict[str, Any]:
        """Count one; the entry that tells of it."""
        if outcome.failure is None:
            self.created += outcome.created
            self.present += not outcome.created
            return {"line": outcome.row, "key": outcome.key, "created": outcome.created}
        entry = {"line": outcome.row, "error": _failure(outcome.failure)}
        self.failed += 1
        if len(self.failures) < _SHOWN:
            self.failures.append(entry)
        return entry


def import_images(  # noqa: PLR0913 - one parameter per option
    manifest: Annotated[Path, typer.Argument(help="The manifest: one JSON object a line.", dir_okay=False)],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and store nothing.")] = False,
    namespace: Namespace = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Files read at a time.")] = 8,
    result: Annotated[
        Path | None,
        typer.Option(
            help="File for what became of each row; run again, what is done is left out.",
            show_default="MANIFEST.result",
            dir_okay=False,
        ),
    ] = None,
    allow_any_path: Annotated[
        bool, typer.Option("--allow-any-path", help="Also read files outside the manifest's directory.")
    ] = False,
    link: Link,
) -> None:
    """Store pictures that were paid for elsewhere. Needs the permission admin.

    Nothing is sent before every line is checked. Interrupted, run it again: it goes on where it was; what is stored
    already is never stored twice. Exit code 1: rows failed, and will be tried again the next time.
    """
    if dry_run and result is not None:
        raise typer.BadParameter("a dry run has no result to go on from: leave out --result")
    source = Manifest(manifest, any_path=allow_any_path)
    with session(link) as (client, output), ExitStack() as stack:
        count, digest = _checked(source, output)
        journal = None
        done: set[int] = set()
        if not dry_run:
            file = result or manifest.with_name(f"{manifest.name}.result")
            head = {"manifest": digest, "namespace": namespace or _DEFAULT_NAMESPACE}
            try:
                journal = stack.enter_context(Journal(file, head))
                done = {entry["line"] for _, entry in journal.entries() if "key" in entry and "line" in entry}
            except JournalError as error:
                output.problem(str(error))
                raise typer.Exit(WRONG_USE) from error
        count.before = len(done)
        began_s = time.monotonic()
        rows = partial(_rows_but, source, done)
        send = partial(client.admin.import_images, namespace=namespace, dry_run=dry_run)
        try:
            outcomes = _patiently(rows, lambda some: send(_loaded(some, concurrency)))
            for outcome in _shown(outcomes, count.rows - count.before, output):
                entry = count.add(outcome)
                if journal is not None:
                    journal.add(entry)
        except RowError as error:
            output.problem(str(error))
            raise typer.Exit(FAILED) from error
        facts = _facts(count, time.monotonic() - began_s, dry_run=dry_run)
        output.result(facts, lambda console: _draw(facts, console))
    if count.failed:
        raise typer.Exit(FAILED)


def _checked(manifest: Manifest, output: Output) -> tuple[_Count, str]:
    """The manifest's rows and digest, all of them in order; else ends the command."""
    digest, rows, complaints = manifest.check(_SHOWN)
    if complaints:
        output.problem("\n".join(complaints))
        raise typer.Exit(WRONG_USE)
    return _Count(rows), digest


def _rows_but(manifest: Manifest, done: set[int], only: set[int] | None = None) -> Iterator[Row]:
    """The rows that are not done, or `only` some of them."""
    return (row for row in manifest.rows() if row.item.row not in done and (only is None or row.item.row in only))


def _patiently(
    rows: Callable[..., Iterable[Row]], send: Callable[[Iterable[Row]], Iterable[ImportOutcome]]
) -> Iterator[ImportOutcome]:
    """The outcome of every row; what failed because something was away is sent again after a while, twice."""
    only: set[int] | None = None
    for is_last in (False, False, True):
        again: set[int] = set()
        for outcome in send(rows(only=only)):
            if isinstance(outcome.failure, TryAgainError) and not is_last:
                again.add(outcome.row)
            else:
                yield outcome
        if not again:
            return
        only = again
        _wait(_PAUSE_S)


def _loaded(rows: Iterable[Row], concurrency: int) -> Iterator[ImportItem]:
    """The rows with the bytes of their files, read some ahead in threads."""
    with ThreadPoolExecutor(concurrency, thread_name_prefix="read") as pool:
        ahead: deque[Future[list[ImportItem]]] = deque()
        for some in _batches(rows):
            ahead.append(pool.submit(_load, some))
            if len(ahead) > concurrency:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows to be read by one thread in one go: handing over each of many small files would take longer than it."""
    batch: list[Row] = []
    size_bytes = 0
    for row in rows:
        batch.append(row)
        size_bytes += row.size_bytes
        if size_bytes > _BATCH_BYTES or len(batch) == _BATCH_ROWS:
            yield batch
            batch, size_bytes = [], 0
    yield batch


def _load(rows: list[Row]) -> list[ImportItem]:
    return [row.loaded() for row in rows]


def _shown(outcomes: Iterable[ImportOutcome], total: int, output: Output) -> Iterator[ImportOutcome]:
    """The same outcomes, with a bar on a terminal while they come."""
    if not output.err.is_terminal:  # a bar that nobody sees takes its time all the same
        yield from outcomes
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=output.err, transient=True) as bar:
        task = bar.add_task("importing", total=total)
        for outcome in outcomes:
            bar.advance(task)
            yield outcome


def _failure(error: CacheError) -> dict[str, Any]:
    return {"reason": error.reason, "message": str(error), "violations": error.violations}


def _facts(count: _Count, seconds: float, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "rows": count.rows,
        "done_before": count.before,
        "created": count.created,
        "present": count.present,
        "failed": count.failed,
        "failures": count.failures,
        "seconds": round(seconds, 3),
    }


def _draw(facts: dict[str, Any], console: Console) -> None:
    word = "could be stored" if facts["dry_run"] else "stored"
    parts = [
        f"{facts['created']:,} {word}",
        f"{facts['present']:,} there already",
        *([f"{facts['done_before']:,} done before"] if facts["done_before"] else []),
        f"{facts['failed']:,} failed",
    ]
    console.print(", ".join(parts), style="bold red" if facts["failed"] else "bold green")
    for failure in facts["failures"]:
        error = failure["error"]
        console.print(f"  line {failure['line']}: {error['message']} ({error['reason']})")
    if facts["failed"] > len(facts["failures"]):
        console.print("  …")
