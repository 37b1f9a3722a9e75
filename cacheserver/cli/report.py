"""cacheserver report: hit rates, money and times of all replicas over a span of time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

from cacheserver.cli.moments import MOMENT_HELP, moment_of
from cacheserver.cli.options import Link
from cacheserver.cli.output import FAILED, Output
from cacheserver.cli.replay import ReplayOptions, print_replay
from cacheserver.cli.session import session
from cacheserver.client import (
    CacheError,
    Client,
    PermissionDeniedError,
    PromptKind,
    StatsField,
    StatsSpan,
    UnsupportedError,
)
from cacheserver.generation.prices import PriceTable
from cacheserver.reports import numbers, page, tables
from cacheserver.reports.headlines import period_line
from cacheserver.reports.sizes import MAX_BYTES, Sizes, read_sizes

_FIELDS = ", ".join(StatsField)
_TO_STANDARD_OUTPUT = "-"
_PROMPTS = 50
_KINDS = (PromptKind.MISSED, PromptKind.GENERATED)
_SIZE = "1024x1024"
_WITHOUT_PROMPTS = "it was asked for without them (--no-prompts)."
_NEED_CHARTS = "charts need more packages: pip install 'cacheserver[report]'"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a report goes beside the terminal."""

    csv_file: Annotated[
        str | None, typer.Option("--csv", metavar="FILE", help="Write the groups as CSV; - is standard output.")
    ] = None
    png_file: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write the charts as one PNG.")] = None
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one self-contained page: charts, calculator, prompts."),
    ] = None
    sizes_file: Annotated[
        Path | None,
        typer.Option("--what-if", metavar="FILE", help="JSON of `report --replay`: other sizes of L1, for the page."),
    ] = None
    no_prompts: Annotated[bool, typer.Option("--no-prompts", help="Leave recorded prompts out of the page.")] = False


def report(  # noqa: PLR0913 - one parameter per option
    *,
    since: Annotated[str, typer.Option(help=f"From then on: {MOMENT_HELP}")] = "7d",
    until: Annotated[str | None, typer.Option(help="Before then, written the same way.", show_default="now")] = None,
    by: Annotated[str, typer.Option(help=f"What to tell apart, with commas between: {_FIELDS}.")] = "namespace",
    namespace: Annotated[str | None, typer.Option(help="Only this one. Without: all that may be read.")] = None,
    span: Annotated[
        StatsSpan | None, typer.Option(help="Length of a step over time.", show_default="by the period")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="PERIOD", help="Also 'previous', the span before, or 2026-05-01..2026-05-08.")
    ] = None,
    files: Files,
    replay: ReplayOptions,
    link: Link,
) -> None:
    """Report hit rates, money and times of all replicas, over restarts too; or replay a trace.

    By caller it needs the permission admin, and so do the prompts on the page.
    """
    if replay.trace is not None:
        print_replay(replay, replay.trace, as_json=link.as_json)
        return
    if files.csv_file == _TO_STANDARD_OUTPUT and link.as_json:
        raise typer.BadParameter("pass either --csv - or --json")
    fields = _fields(by)
    period = _period(since, until, span, is_compared=compare is not None)
    other_period = None if compare is None else _compared(compare, period)
    sizes = None if files.sizes_file is None else _sizes(files.sizes_file)
    with session(link, stdout_is_taken=files.csv_file == _TO_STANDARD_OUTPUT) as (client, output):
        found = _ask(client, output, period, fields, namespace)
        other = None if other_period is None else _ask(client, output, other_period, fields, namespace)
        _write(found, other, sizes, files, client, output)
        facts = numbers.facts(found) | ({} if other is None else {"compared": numbers.facts(other)})
        output.result(facts, lambda console: _draw(found, other, console))


# ── what is asked for ───────────────────────────────────────────────────────────────────────────────────────────


def _fields(text: str) -> tuple[StatsField, ...]:
    try:
        return tuple(dict.fromkeys(StatsField(name.strip()) for name in text.split(",")))
    except ValueError as error:
        raise typer.BadParameter(f"choose from {_FIELDS}", param_hint="--by") from error


def _period(since: str, until: str | None, span: StatsSpan | None, *, is_compared: bool) -> numbers.Period:
    """The period as asked for, from a whole hour on, or a whole minute if it is told in minutes.

    Where another of equal length is to be found for it, it also ends with one.
    """
    now = datetime.now(UTC)
    begin = moment_of(since, now, "--since").astimezone(UTC)
    end = now if until is None else moment_of(until, now, "--until").astimezone(UTC)
    chosen = span or numbers.span_for(end - begin)
    whole = StatsSpan.MINUTE if chosen is StatsSpan.MINUTE else StatsSpan.HOUR
    begin = numbers.floor(begin, whole)
    if until is None and is_compared:
        end = numbers.floor(now, whole)
    if begin >= end:
        raise typer.BadParameter("begins no earlier than --until", param_hint="--since")
    return numbers.Period(begin, end, chosen)


def _compared(text: str, period: numbers.Period) -> numbers.Period:
    if text == "previous":
        return replace(period, since=period.since - period.length, until=period.since)
    first, dots, last = text.partition("..")
    if not dots:
        raise typer.BadParameter("must be 'previous' or two moments with .. between", param_hint="--compare")
    now = datetime.now(UTC)
    begin = moment_of(first, now, "--compare").astimezone(UTC)
    end = moment_of(last, now, "--compare").astimezone(UTC)
    if begin >= end:
        raise typer.BadParameter("the first moment is no earlier than the second", param_hint="--compare")
    return numbers.Period(begin, end, period.span)


def _sizes(file: Path) -> Sizes:
    try:
        with file.open("rb") as stream:
            return read_sizes(stream.read(MAX_BYTES + 1))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}", param_hint="--what-if") from error


def _ask(
    client: Client, output: Output, period: numbers.Period, by: Sequence[StatsField], namespace: str | None
) -> numbers.Report:
    """One call for all figures of a period, so that its tables and charts agree whatever is booked meanwhile."""
    stats = client.stats(namespace, since=period.since, until=period.until, span=period.span, by=numbers.asked_by(by))
    if any(row.start_time is None for row in stats.rows):
        output.problem("this service tells no figures by time, only since its start: it is older than this command")
        raise typer.Exit(FAILED)
    return numbers.report(stats.rows, stats.latency_bounds_s, period=period, by=by, namespace=namespace)


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _write(  # noqa: PLR0913, PLR0917 - all there is to write, and where
    found: numbers.Report,
    other: numbers.Report | None,
    sizes: Sizes | None,
    files: Files,
    client: Client,
    output: Output,
) -> None:
    if files.csv_file == _TO_STANDARD_OUTPUT:
        sys.stdout.write(tables.csv_text(found))
    elif files.csv_file is not None:
        Path(files.csv_file).write_text(tables.csv_text(found), encoding="utf-8")
    if files.png_file is None and files.html_file is None:
        return
    charts = _charts(output)
    drawn = charts.charts(found, sizes)
    if files.png_file is not None:
        files.png_file.write_bytes(charts.png(drawn))
    if files.html_file is not None:
        prices, source = _list_prices(found)
        prompts = _WITHOUT_PROMPTS if files.no_prompts else _prompts(client, found.namespace)
        contents = page.Contents(
            made_at=datetime.now(UTC),
            charts=drawn,
            script=charts.script(),
            prompts=prompts,
            prices_microusd=prices,
            price_source=source,
            other=other,
            sizes=sizes,
        )
        files.html_file.write_text(page.page(found, contents), encoding="utf-8")


def _charts(output: Output) -> Any:
    try:
        from cacheserver.reports import charts  # noqa: PLC0415 - of an extra that a report without charts does without
    except ImportError as error:
        output.problem(_NEED_CHARTS)
        raise typer.Exit(FAILED) from error
    return charts


def _list_prices(report: numbers.Report) -> tuple[dict[str, int], str]:
    """What a picture of each quality costs by the price table, of the most asked model that is in it."""
    table = PriceTable.load()
    listed = [
        name for name, price in table.models.items() if any(_SIZE in each for each in price.usd_per_image.values())
    ]
    asked = [group.name for group in report.by_model if group.name in listed]
    model = (asked or listed)[0]
    prices = {
        quality: round(sizes[_SIZE] * 1_000_000)
        for quality, sizes in table.models[model].usd_per_image.items()
        if _SIZE in sizes
    }
    return prices, f"the price table of {table.as_of}, {model} at {_SIZE}"


def _prompts(client: Client, namespace: str | None) -> list[page.Prompt] | str:
    """What the cache did not have; or why that cannot be told, which the page then says."""
    try:
        recorded = client.admin.list_prompts(namespace=namespace, kinds=_KINDS, limit=_PROMPTS)
    except PermissionDeniedError:
        return "recorded prompts need the permission admin."
    except UnsupportedError:
        return "this service records no prompts."
    except CacheError as error:
        return f"recorded prompts cannot be read now: {error}"
    return [
        page.Prompt(
            namespace=each.namespace,
            text=each.spec.prompt,
            spec=" ".join(filter(None, (each.spec.model, each.spec.size, each.spec.quality))),
            kind=each.kind or "",
            count=each.count,
            last_time=each.last_time,
        )
        for each in recorded
    ]


# ── the terminal ────────────────────────────────────────────────────────────────────────────────────────────────


def _draw(report: numbers.Report, other: numbers.Report | None, console: Console) -> None:
    console.print(period_line(report), style="bold")
    for table in tables.tables(report):
        _draw_table(table, console)
    over_time = RichTable(box=None, pad_edge=False, show_header=False)
    for name, line, between in tables.sparklines(report):
        over_time.add_row(name, line, between)
    console.print()
    console.print(over_time)
    if other is not None:
        _draw_table(tables.comparison(report, other), console)


def _draw_table(table: tables.Table, console: Console) -> None:
    drawn = RichTable(box=None, pad_edge=False)
    for index, name in enumerate(table.columns):
        drawn.add_column(name, justify="left" if index < table.texts else "right")
    last = len(table.rows) - 1
    for number, row in enumerate(table.rows):
        drawn.add_row(*row, style="bold" if table.has_total and number == last else "")
    console.print(f"\n{table.title}", style="bold")
    console.print(drawn)
    if table.note:
        console.print(table.note, style="dim")
