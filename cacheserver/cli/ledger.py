"""cacheserver ledger: the calls to upstreams, for comparing with an invoice."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cacheserver.cli.moments import MOMENT_HELP, moment_of
from cacheserver.cli.options import Link
from cacheserver.cli.output import dollars
from cacheserver.cli.session import session
from cacheserver.client import AttemptOutcome, LedgerRow

_COLUMNS = (
    "id",
    "start_time",
    "end_time",
    "namespace",
    "caller",
    "upstream",
    "model",
    "images",
    "outcome",
    "cost_usd",
    "cost_microusd",
    "estimate_usd",
    "estimate_microusd",
    "reason",
    "tags",
    "upstream_request_id",
    "input_tokens",
    "output_tokens",
    "quality",
)


def ledger(  # noqa: PLR0913 - one parameter per option
    *,
    since: Annotated[str, typer.Option(help=f"Calls from then on: {MOMENT_HELP}")] = "30d",
    until: Annotated[
        str | None, typer.Option(help="Calls before then, written the same way.", show_default="now")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Only what this namespace paid.")] = None,
    upstream: Annotated[str | None, typer.Option(help="Only calls to this upstream.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header row.")] = False,
    link: Link,
) -> None:
    """List the calls to upstreams and what they cost. Needs the permission admin.

    The provider's invoice lies between what is settled and what is settled and unknown together.
    """
    if as_csv and link.as_json:
        raise typer.BadParameter("pass either --csv or --json")
    now = datetime.now(UTC)
    begin = moment_of(since, now, "--since")
    end = None if until is None else moment_of(until, now, "--until")
    with session(link) as (client, output):
        rows = _of(client.admin.list_ledger(since=begin, until=end), namespace, upstream)
        if as_csv:
            _write_csv(rows)
            return
        shown = list(rows)
        facts = {"rows": [_facts(row) for row in shown], "total": _total(shown)}
        output.result(facts, lambda console: _draw(shown, console))


def _of(rows: Iterable[LedgerRow], namespace: str | None, upstream: str | None) -> Iterator[LedgerRow]:
    return (row for row in rows if namespace in (None, row.namespace) and upstream in (None, row.upstream))


def _write_csv(rows: Iterable[LedgerRow]) -> None:
    """Each page as it comes: a year's ledger never has to fit into memory."""
    writer = csv.DictWriter(sys.stdout, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            _facts(row)
            | {
                "tags": " ".join(row.tags),
                "cost_usd": _usd(row.cost_microusd),
                "estimate_usd": _usd(row.estimate_microusd),
                "input_tokens": row.usage.input_tokens if row.usage else "",
                "output_tokens": row.usage.output_tokens if row.usage else "",
            }
        )


def _usd(microusd: int) -> str:
    """Exact, to the micro-dollar."""
    return f"{microusd // 1_000_000}.{microusd % 1_000_000:06d}"


def _facts(row: LedgerRow) -> dict[str, Any]:
    times = {"start_time": row.start_time, "end_time": row.end_time}
    return asdict(row) | {name: time.isoformat() if time else None for name, time in times.items()}


def _total(rows: list[LedgerRow]) -> dict[str, dict[str, int]]:
    """Calls and money by outcome. What has not ended counts with the most it may cost."""
    total = {}
    for outcome in AttemptOutcome:
        these = [row for row in rows if row.outcome is outcome]
        money = [row.estimate_microusd if outcome is AttemptOutcome.SENT else row.cost_microusd for row in these]
        total[str(outcome)] = {"calls": len(these), "microusd": sum(money)}
    return total


def _draw(rows: list[LedgerRow], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("began (UTC)", "namespace", "caller", "upstream", "model", "quality"):
        table.add_column(name)
    table.add_column("images", justify="right")
    table.add_column("outcome")
    table.add_column("cost", justify="right")
    table.add_column("reason")
    for row in rows:
        table.add_row(
            f"{row.start_time:%Y-%m-%d %H:%M:%S}" if row.start_time else "",
            row.namespace,
            row.caller,
            row.upstream,
            row.model,
            row.quality,
            f"{row.images}",
            row.outcome or "",
            dollars(row.cost_microusd),
            row.reason,
        )
    console.print(table)
    console.print(_total_line(rows), style="bold")


def _total_line(rows: list[LedgerRow]) -> str:
    total = _total(rows)
    settled, unknown, sent = (total[name] for name in ("settled", "unknown", "sent"))
    under_way = f", under way at most {dollars(sent['microusd'])} ({sent['calls']})" if sent["calls"] else ""
    return (
        f"total  settled {dollars(settled['microusd'])} ({settled['calls']}), "
        f"unknown {dollars(unknown['microusd'])} ({unknown['calls']}), "
        f"not billed ({total['not_billed']['calls']}){under_way}"
    )
