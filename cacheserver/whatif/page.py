"""A forecast as one HTML page that needs nothing beside itself: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from cacheserver.whatif.estimate import Estimate, TierFigures

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --memory: #2a7de1; --redis: #e0792a; --s3: #4c9a54; --none: #8883; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.5rem 0; }
.figures b { display: block; font-size: 1.8rem; line-height: 1.2; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; margin: .5rem 0; } svg text { fill: currentColor; font-size: 13px; }
code { font-size: .9em; } small, .notes { opacity: .75; }
"""

_PARTS = (("memory", "in memory"), ("redis", "in Redis"), ("s3", "in S3"), ("none", "made anew"))
_BAR_WIDTH, _LABEL_WIDTH, _ROW_HEIGHT = 560, 190, 26
_LEGEND_STEP = 140


def estimate_page(result: Estimate, notes: Sequence[str]) -> str:
    """The page. All that comes from the log is escaped."""
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>What a cache would save</title><style>{_STYLE}</style></head><body>",
            "<h1>What a cache would save</h1>",
            *_headline(result),
            *_tiers(result),
            *_profiles(result),
            *_groups(result),
            *_near_misses(result),
            *_bad_lines(result),
            "<h2>What the figures rest on</h2><ul class=notes>",
            *(f"<li>{escape(note)}</li>" for note in notes),
            "</ul></body></html>\n",
        ]
    )


def _headline(result: Estimate) -> Iterable[str]:
    best = max(result.tiers, key=lambda each: each.hit_rate)
    figures = (
        ("pictures asked for", f"{result.rows:,}"),
        ("days", f"{result.span_s / 86_400:,.1f}"),
        ("without a cache", _dollars(result.cost_microusd)),
        ("answered by the cache", _percent(best.hit_rate)),
        ("saved", _dollars(best.saved_microusd)),
        ("saved, re-rolls left out", _dollars(best.saved_without_rerolls_microusd)),
    )
    yield "<div class=figures>"
    yield from (f"<div><b>{escape(figure)}</b>{escape(name)}</div>" for name, figure in figures)
    yield "</div>"


def _tiers(result: Estimate) -> Iterable[str]:
    yield "<h2>Which tier would answer</h2>"
    yield _bars(result.tiers)
    yield _table(
        ("Memory", "Lifetime", "Hits", "In memory", "In Redis", "In S3", "Saved", "Without re-rolls"),
        (
            (
                _binary(each.l1_bytes),
                _lifetime(each.ttl_s),
                *(_percent(rate) for rate in (each.hit_rate, each.memory_rate, each.redis_rate, each.s3_rate)),
                _dollars(each.saved_microusd),
                _dollars(each.saved_without_rerolls_microusd),
            )
            for each in result.tiers
        ),
    )


def _bars(tiers: Sequence[TierFigures]) -> str:
    height = _ROW_HEIGHT * (len(tiers) + 1)
    parts = [f'<svg viewBox="0 0 {_LABEL_WIDTH + _BAR_WIDTH} {height}" role="img" aria-label="Share of each tier">']
    for row, each in enumerate(tiers):
        y = row * _ROW_HEIGHT
        label = f"{_binary(each.l1_bytes)}, {_lifetime(each.ttl_s)}"
        parts.append(f'<text x="0" y="{y + 17}">{escape(label)}</text>')
        x = float(_LABEL_WIDTH)
        rates = (each.memory_rate, each.redis_rate, each.s3_rate, 1 - each.hit_rate)
        for (name, said), rate in zip(_PARTS, rates, strict=True):
            width = _BAR_WIDTH * rate
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="20" fill="var(--{name})">'
                f"<title>{said}: {_percent(rate)}</title></rect>"
            )
            x += width
    y = len(tiers) * _ROW_HEIGHT
    for number, (name, said) in enumerate(_PARTS):
        x = _LABEL_WIDTH + number * _LEGEND_STEP
        parts.append(f'<rect x="{x}" y="{y + 6}" width="12" height="12" fill="var(--{name})"/>')
        parts.append(f'<text x="{x + 18}" y="{y + 17}">{said}</text>')
    return "".join([*parts, "</svg>"])


def _profiles(result: Estimate) -> Iterable[str]:
    yield "<h2>What repeats, by profile</h2>"
    yield _table(
        ("Profile", "Distinct", "Repeats", "Share", "Re-rolls among them", "Saved if all is kept", "Without re-rolls"),
        (
            (
                each.profile,
                f"{each.distinct:,}",
                f"{each.repeats:,}",
                _percent(each.repeat_rate),
                f"{each.rerolls:,}",
                _dollars(each.saved_microusd),
                _dollars(each.saved_without_rerolls_microusd),
            )
            for each in result.profiles
        ),
    )


def _groups(result: Estimate) -> Iterable[str]:
    if result.groups:
        yield "<h2>Asked for most often, with the same model, size and quality</h2>"
        yield _table(
            ("Prompt", "Asked for", "Saves"),
            (
                (group.prompt or f"line {group.line:,}", f"{group.asks:,}", _dollars(group.saved_microusd))
                for group in result.groups
            ),
        )


def _near_misses(result: Estimate) -> Iterable[str]:
    if result.near_misses:
        yield "<h2>Prompts that differ in one word</h2>"
        yield "<p>If that word does not matter to the picture, leave it out of the template, or have the profile "
        yield "<code>catalog</code> drop it. Only a reader can tell.</p>"
        yield _table(
            (
                "Template",
                "Words",
                "Groups",
                "Prompts",
                "Asked for",
                "One picture each saves",
                "catalog_patterns",
                "Makes one of",
            ),
            (
                (
                    each.template or each.kind,
                    ", ".join(each.values),
                    f"{each.groups:,}",
                    f"{each.prompts:,}",
                    f"{each.asks:,}",
                    _dollars(each.saved_microusd),
                    each.pattern,
                    _percent(each.merged) if each.merged else "",
                )
                for each in result.near_misses
            ),
        )


def _bad_lines(result: Estimate) -> Iterable[str]:
    if result.bad_lines:
        yield f"<h2>{result.bad_lines:,} lines were left out</h2>"
        yield _table(("Line", "Problem"), ((f"{bad.line:,}", bad.problem) for bad in result.first_bad_lines))


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td{_kind(number)}>{escape(value)}</td>" for number, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _kind(number: int) -> str:
    return "" if number else " class=text"


def _dollars(microusd: int) -> str:
    return f"${microusd / 1_000_000:,.2f}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _lifetime(ttl_s: float | None) -> str:
    return "for ever" if ttl_s is None else f"{ttl_s / 3_600:,g} h"


def _binary(size_bytes: int) -> str:
    if size_bytes >= 1024**3:
        return f"{size_bytes / 1024**3:,.3g} GiB"
    return f"{size_bytes / 1024**2:,.3g} MiB"
