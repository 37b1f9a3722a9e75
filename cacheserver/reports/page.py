"""A report as one HTML file that shows itself: no request goes out from it, and nothing in it runs but our scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib import resources
from typing import Final

from cacheserver.reports.calculator import monthly_pictures, seeds
from cacheserver.reports.headlines import doubling_line, headlines, period_line
from cacheserver.reports.numbers import DEFINITIONS, Report
from cacheserver.reports.sizes import Sizes
from cacheserver.reports.tables import (
    NONE,
    Chart,
    Table,
    comparison,
    count,
    hit_table,
    latency_table,
    mib,
    moment,
    money_table,
    percent,
    rest_table,
    step_name,
    stretch,
    usd,
)

_MOST_PROMPTS: Final = 50
_PROMPT_CHARACTERS: Final = 300


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that the cache did not have, and how often, lately."""

    namespace: str
    text: str
    spec: str
    kind: str
    count: float
    last_time: datetime | None


@dataclass(frozen=True, slots=True)
class Contents:
    """What a page shows beside the report itself.

    Attributes:
        made_at: When it was asked for.
        charts: Drawn by `script`.
        prompts: What the cache did not have, most wanted first; or why that is not told.
        prices_microusd: List prices of a picture by quality, for qualities of which nothing was measured.
        price_source: Where these are from.
        other: The period to compare with.
        sizes: What other sizes of the memory level would have done.
    """

    made_at: datetime
    charts: Sequence[Chart]
    script: str
    prompts: Sequence[Prompt] | str
    prices_microusd: Mapping[str, int]
    price_source: str
    other: Report | None = None
    sizes: Sizes | None = None


def page(report: Report, contents: Contents) -> str:
    """The HTML file."""
    scripts = [contents.script, _file("page.js")]
    for script in scripts:
        if "</script" in script.lower() or "<!--" in script:
            raise ValueError("a script that HTML would end early")
    sections = [
        _summary(report, contents),
        _charts(report, contents),
        _figures(report),
        _compared(report, contents.other),
        _prompts(contents.prompts),
        _calculator(report, contents),
        _sizes(contents),
        _words(),
    ]
    title = f"Prompt cache: {stretch(report.period)}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            '<link rel="icon" href="data:,">',
            f"<title>{_text(title)}</title>",
            f"<style>{_file('page.css')}</style>",
            "</head>",
            "<body>",
            "<main>",
            *sections,
            "</main>",
            *(_data(chart) for chart in contents.charts),
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(text: str) -> str:
    """Text as HTML: nothing in it is markup, and no figure is parted from its sign."""
    return escape(text).replace(" %", "&nbsp;%")


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    """Nothing may be loaded from anywhere, and only these scripts run, whatever else gets into the page."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )


def _data(chart: Chart) -> str:
    text = json.dumps(chart.spec, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", r"\u003c")
    return f'<script type="application/json" id="chart-{chart.name}">{text}</script>'


# ── in short ────────────────────────────────────────────────────────────────────────────────────────────────────


def _summary(report: Report, contents: Contents) -> str:
    total = report.total
    cards = [
        (usd(total.spent_microusd), "spent on generating"),
        (f"about {usd(total.saved_microusd)}", "saved by the cache (estimated)"),
        (percent(total.hit_rate), "hit rate, all tiers"),
        (percent(total.spared_rate), "of what it would have cost was saved (estimated)"),
    ]
    return (
        f"<header><h1>Prompt cache report</h1><p class=faint>{_text(period_line(report))}; made "
        f"{moment(contents.made_at)} UTC</p></header>"
        f"<section><h2>In short</h2><div class=cards>"
        + "".join(f"<div class=card><b>{_text(figure)}</b><span>{_text(text)}</span></div>" for figure, text in cards)
        + "</div><ul>"
        + "".join(f"<li><b>{_text(name)}</b> {_text(text)}</li>" for name, text in headlines(report, contents.sizes))
        + "</ul></section>"
    )


# ── charts, each with its table ─────────────────────────────────────────────────────────────────────────────────


def _charts(report: Report, contents: Contents) -> str:
    behind = _tables_behind(report)
    shown = [chart for chart in contents.charts if chart.name in behind]
    return (
        "<section><h2>Charts</h2><div class=charts>"
        + "".join(_figure(chart, behind[chart.name]) for chart in shown)
        + "</div></section>"
    )


def _figure(chart: Chart, table: Table) -> str:
    return (
        f'<figure data-chart="chart-{chart.name}"><figcaption>{_text(chart.title)}</figcaption>'
        f"<div class=drawing></div><details><summary>The same as a table</summary>{_table(table)}</details></figure>"
    )


def _tables_behind(report: Report) -> dict[str, Table]:
    found = {
        "hit-rate": _answers_table(report),
        "saved": _saved_table(report),
        "spent": _spent_table(report),
        "latency": latency_table(report.total),
    }
    for plural, name, parts in (
        ("namespaces", "namespace", report.by_namespace),
        ("models", "model", report.by_model),
        ("qualities", "quality", report.by_quality),
    ):
        found[plural] = hit_table((name,), parts, report.total)
        found[f"money-{plural}"] = money_table((name,), parts, report.total)
    return found


def _answers_table(report: Report) -> Table:
    tiers = tuple(report.total.hits_by_tier)
    derived = ("derived",) if report.total.derived else ()
    rows = tuple(
        (
            moment(point.start_time),
            count(point.figures.answered),
            percent(point.figures.hit_rate),
            *(percent(point.figures.tier_rate(tier)) for tier in tiers),
            count(point.figures.collapsed),
            *((count(point.figures.derived),) if derived else ()),
            count(point.figures.misses + point.figures.observed),
        )
        for point in report.series
    )
    columns = ("from (UTC)", "answered", "hit rate", *map(str, tiers), "collapsed", *derived, "upstream")
    return Table(f"Answers each {step_name(report.period)}", columns, rows)


def _saved_table(report: Report) -> Table:
    total = 0
    rows = []
    for point in report.series:
        total += point.figures.saved_microusd
        rows.append((moment(point.start_time), usd(point.figures.saved_microusd), usd(total)))
    return Table(f"Saved each {step_name(report.period)}", ("from (UTC)", "saved ~", "saved so far ~"), tuple(rows))


def _spent_table(report: Report) -> Table:
    rows = tuple(
        (
            moment(point.start_time),
            usd(point.figures.spent_microusd),
            usd(point.figures.unknown_microusd),
            usd(point.figures.open_microusd),
        )
        for point in report.series
    )
    columns = ("from (UTC)", "spent", "unknown ≤", "open ≤")
    return Table(f"Spent each {step_name(report.period)}", columns, rows)


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope=col class="{_class(index, table)}">{_text(name)}</th>' for index, name in enumerate(table.columns)
    )
    last = len(table.rows) - 1
    body = "".join(
        f"<tr{' class=total' if table.has_total and number == last else ''}>"
        + "".join(_cell(index, cell, table) for index, cell in enumerate(row))
        + "</tr>"
        for number, row in enumerate(table.rows)
    )
    note = f"<p class=faint>{_text(table.note).replace(chr(10), '<br>')}</p>" if table.note else ""
    return (
        f"<div class=scroll><table><caption>{_text(table.title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _cell(index: int, cell: str, table: Table) -> str:
    if index == 0:
        return f"<th scope=row class=word>{_text(cell)}</th>"
    return f'<td class="{_class(index, table)}">{_text(cell)}</td>'


def _class(index: int, table: Table) -> str:
    return "word" if index < table.texts else "figure"


# ── further sections ────────────────────────────────────────────────────────────────────────────────────────────


def _figures(report: Report) -> str:
    by = ("namespace",)
    shown = (
        hit_table(by, report.by_namespace, report.total),
        rest_table(by, report.by_namespace, report.total),
        money_table(by, report.by_namespace, report.total),
        latency_table(report.total),
    )
    return "<section><h2>Figures</h2>" + "".join(_table(table) for table in shown) + "</section>"


def _compared(report: Report, other: Report | None) -> str:
    if other is None:
        return ""
    return f"<section><h2>Another period</h2>{_table(comparison(report, other))}</section>"


def _prompts(prompts: Sequence[Prompt] | str) -> str:
    head = "<section><h2>What the cache did not have</h2>"
    if isinstance(prompts, str):
        return f"{head}<p>Left out: {_text(prompts)}</p></section>"
    if not prompts:
        return f"{head}<p>No prompts are recorded. Only namespaces with store_prompts record any.</p></section>"
    rows = "".join(
        f"<tr><th scope=row class=word>{_text(prompt.namespace)}</th>"
        f"<td class=text><bdi>{_text(_shortened(prompt.text))}</bdi></td>"
        f"<td class=word>{_text(prompt.spec)}</td><td class=word>{_text(prompt.kind)}</td>"
        f"<td>{prompt.count:,.1f}</td><td>{moment(prompt.last_time) if prompt.last_time else NONE}</td></tr>"
        for prompt in prompts[:_MOST_PROMPTS]
    )
    columns = ("namespace", "prompt", "asked for", "why", "times, lately", "last (UTC)")
    classes = ("word", "text", "word", "word", "figure", "figure")
    cells = "".join(f"<th scope=col class={kind}>{name}</th>" for name, kind in zip(columns, classes, strict=True))
    return (
        f"{head}<p>Recorded by the namespaces that store prompts, most wanted first: missed (asked for only if cached) "
        "and generated. The number fades with time.</p>"
        f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _PROMPT_CHARACTERS else text[: _PROMPT_CHARACTERS - 1] + "…"


def _sizes(contents: Contents) -> str:
    head = "<section><h2>Other sizes of the memory level (L1)</h2>"
    sizes = contents.sizes
    if sizes is None:
        return (
            f"{head}<p>Not known. Record a trace, replay it with <code>cacheserver report --replay TRACE --json</code> "
            "and pass the result as <code>--what-if</code>.</p></section>"
        )
    rows = tuple(
        (
            mib(row.l1_bytes),
            percent(row.share),
            row.kind,
            percent(row.hit_rate),
            count(row.hits),
            usd(row.saved_microusd),
        )
        for row in sizes.rows
    )
    table = Table(
        f"A trace of {count(sizes.requests)} requests, replayed; all its pictures take {mib(sizes.footprint_bytes)}",
        ("memory", "of all bytes", "kept", "hit rate", "hits", "saved ~"),
        rows,
    )
    doubling = " ".join(doubling_line(sizes))
    figures = "".join(_figure(chart, table) for chart in contents.charts if chart.name == "sizes")
    return (
        f"{head}<p>{_text(doubling)} Estimated, for a memory level alone: a hit that the memory level loses is still "
        f"a hit where a slower tier has the picture.</p>{figures}</section>"
    )


def _words() -> str:
    terms = "".join(f"<dt>{_text(word)}</dt><dd>{_text(text)}</dd>" for word, text in DEFINITIONS.items())
    return f"<section><h2>What the words mean</h2><dl>{terms}</dl></section>"


# ── the calculator ──────────────────────────────────────────────────────────────────────────────────────────────


def _calculator(report: Report, contents: Contents) -> str:
    begin = seeds(report, contents.prices_microusd)
    if not begin:
        return ""
    rows = "".join(
        f'<tr data-quality="{_text(seed.quality)}"><th scope=row class=word>{_text(seed.quality)}</th>'
        f"<td>{_input('share', seed.share * 100, 'share of the pictures, in per cent', seed.quality, most=100)}</td>"
        f"<td>{_input('price', seed.price_usd, 'price of a picture, in dollars', seed.quality, digits=6)}</td>"
        f"<td>{_input('spared-here', seed.spared * 100, 'saved, in per cent', seed.quality, most=100)}</td>"
        f"<td class=word>{'measured' if seed.is_measured else 'list price'}</td><td><output></output></td></tr>"
        for seed in begin
    )
    lists = "" if all(seed.is_measured for seed in begin) else f" List prices are from {contents.price_source}."
    beside = " What made pictures that no request was answered with, as warm-ups do, is not in it."
    beside = beside if report.total.unasked_microusd else ""
    return (
        "<section><h2>What a month costs</h2><p>An estimate. It begins with this report's own figures: its pace over "
        "30 days, its mix of qualities, what a picture of each would have cost on average, and the part of that which "
        f"hits, collapsed and derived requests saved.{_text(beside + lists)}</p>"
        "<form class=calculator>"
        "<label>Pictures a month <input type=number name=volume min=0 step=any "
        f"value={monthly_pictures(report)}></label>"
        "<label>Saved by hits, collapsed and derived requests, in every quality: "
        "<input type=range name=spared min=0 max=100 step=0.1></label> "
        "<button type=reset>As measured</button>"
        "<div class=scroll><table><thead><tr><th scope=col class=word>quality</th><th scope=col>share, %</th>"
        "<th scope=col>price, $</th><th scope=col>saved, %</th><th scope=col class=word>price from</th>"
        f"<th scope=col>costs a month</th></tr></thead><tbody>{rows}</tbody></table></div>"
        "<p class=answer aria-live=polite>A month costs <b data-out=with></b> with the cache and "
        "<b data-out=without></b> without it: <b data-out=saved></b> (<span data-out=rate></span>) saved.</p>"
        "</form></section>"
    )


def _input(name: str, value: float, label: str, quality: str, *, digits: int = 2, most: int | None = None) -> str:  # noqa: PLR0913 - what an input says
    limit = "" if most is None else f" max={most}"
    return (
        f'<input type=number name={name} min=0{limit} step=any value="{value:.{digits}f}" '
        f'aria-label="{_text(quality)}: {_text(label)}">'
    )
