"""The charts of a report, as Vega-Lite, and as a PNG. Needs the extra `report`; nothing is fetched from anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import altair as alt
import vl_convert

from cacheserver.model import TierName
from cacheserver.reports.numbers import COLLAPSED, DERIVED, OTHER, UPSTREAM, Figures, Group, Point, Report, add_figures
from cacheserver.reports.sizes import Sizes
from cacheserver.reports.tables import Chart, Spec, step_name

WAYS: Final = (
    TierName.MEMORY,
    TierName.REDIS,
    TierName.DISK,
    TierName.S3,
    TierName.JOURNAL,
    COLLAPSED,
    DERIVED,
    UPSTREAM,
)
"""Where an answer came from, fastest first."""

_COLORS: Final = {
    TierName.MEMORY: "#0072b2",
    TierName.REDIS: "#56b4e9",
    TierName.DISK: "#009e73",
    TierName.S3: "#cc79a7",
    TierName.JOURNAL: "#f0e442",
    COLLAPSED: "#e69f00",
    DERIVED: "#d55e00",
    UPSTREAM: "#8c8c8c",
    "spent": "#d55e00",
    "unknown, at most": "#e69f00",
    "open, at most": "#f0c75e",
    "saved": "#009e73",
}
"""Okabe and Ito's, which people tell apart who see few colours; each is seen on white and on black."""

_QUANTILES: Final = {"p50": "#009e73", "p95": "#e69f00", "p99": "#d55e00"}
_TENFOLD_S: Final = (0.001, 0.01, 0.1, 1, 10, 100)
_SYMBOL_SIZES: Final = {50: 240, 95: 130, 99: 50}
"""By per cent: where bounds are equal, the smaller symbol lies on the larger one."""

_TICKS: Final = 8
_MOST_BARS: Final = 12
_HEIGHT: Final = 240
_BAR_STEP: Final = 30
_BAR_TICKS: Final = 5
_LEAST_BARS: Final = 4
"""So high is a chart of fewer bars, too: a legend below which it ends is cut off."""

_PNG_WIDTH: Final = 560
_PNG_SCALE: Final = 2.0
_MICRO: Final = 1_000_000
_LEGEND_BELOW: Final = alt.Legend(orient="bottom", columns=1, labelLimit=300)
_OWN_LEGENDS: Final = {"scale": {"color": "independent", "shape": "independent"}}

_Datum = dict[str, Any]
_Drawn = Any  # what altair's methods return has another type after each of them


def charts(report: Report, sizes: Sizes | None = None) -> list[Chart]:
    """The charts of a report, in the order to be read."""
    each = step_name(report.period)
    drawn = [
        ("hit-rate", f"Where answers came from, each {each}", _answers_over_time(report)),
        ("saved", "Saved so far, in dollars (estimated)", _saved_over_time(report)),
        ("spent", f"Spent each {each}, in dollars", _spent_over_time(report)),
        ("latency", "Time to answer, by where the answer came from", _latency(report.total)),
        ("namespaces", "By namespace: where answers came from", _answers_by("namespace", report.by_namespace)),
        ("models", "By model: where answers came from", _answers_by("model", report.by_model)),
        ("qualities", "By quality: where answers came from", _answers_by("quality", report.by_quality)),
        ("money-namespaces", "By namespace: spent and saved, in dollars", _money_by("namespace", report.by_namespace)),
        ("money-models", "By model: spent and saved, in dollars", _money_by("model", report.by_model)),
        ("money-qualities", "By quality: spent and saved, in dollars", _money_by("quality", report.by_quality)),
    ]
    if sizes is not None:
        drawn.append(("sizes", "Hit rate of the memory level alone, by its size", _hit_rate_by_size(sizes)))
    with alt.data_transformers.enable(consolidate_datasets=False):  # a chart's data stays where it is drawn
        return [Chart(name, title, chart.properties(description=title).to_dict()) for name, title, chart in drawn]


def script() -> str:
    """The JavaScript that draws such charts, all of it: it loads nothing. It sets `window.vegaEmbed`."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def png(drawn: Sequence[Chart]) -> bytes:
    """All charts, two in a row, as one PNG file."""
    views = [_view(chart) for chart in drawn]
    sheet = {
        "$schema": drawn[0].spec["$schema"],
        "vconcat": [{"hconcat": views[at : at + 2], "resolve": _OWN_LEGENDS} for at in range(0, len(views), 2)],
        "resolve": _OWN_LEGENDS,
        "config": {"background": "white", "padding": 20},
    }
    return vl_convert.vegalite_to_png(sheet, scale=_PNG_SCALE)


def _view(chart: Chart) -> Spec:
    """The chart as a part of a larger one, which has the schema and the settings for all."""
    spec = {name: value for name, value in chart.spec.items() if name not in {"$schema", "config"}}
    return spec | {"width": _PNG_WIDTH, "title": chart.title}


# ── over time ───────────────────────────────────────────────────────────────────────────────────────────────────


def _answers_over_time(report: Report) -> _Drawn:
    nothing: _Datum = {"way": UPSTREAM, "pictures": 0, "share": 0.0, "rank": 0}  # the time is on the axis all the same
    data = [{**_when(report, point), **datum} for point in report.series for datum in _ways(point.figures) or [nothing]]
    return (
        _chart(data)
        .mark_bar(orient="vertical", x2Offset=-1)
        .encode(
            x=_time(report),
            x2="end:T",
            y=alt.Y(
                "share:Q",
                stack="zero",
                title="of what was answered",
                axis=alt.Axis(format="%"),
                scale=alt.Scale(domain=[0, 1]),
            ),
            color=_color("answered by", "way", _present(data, "way", WAYS)),
            order=alt.Order("rank:Q"),
            tooltip=["time:T", "way:N", "pictures:Q", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=_HEIGHT)
    )


def _saved_over_time(report: Report) -> _Drawn:
    data: list[_Datum] = [{"time": report.series[0].start_time.isoformat(), "microusd": 0, "usd": 0.0}]
    total = 0
    for point in report.series:
        total += point.figures.saved_microusd
        data.append(
            {
                "time": (point.start_time + report.period.step).isoformat(),
                "microusd": point.figures.saved_microusd,
                "usd": total / _MICRO,
            }
        )
    base = _chart(data).encode(
        x=_time(report),
        y=alt.Y("usd:Q", title="saved so far", axis=alt.Axis(format="$,.2~f")),
        tooltip=["time:T", alt.Tooltip("usd:Q", format="$,.2f")],
    )
    color = _COLORS["saved"]
    return alt.layer(
        base.mark_area(color=color, opacity=0.25), base.mark_line(color=color, point=alt.OverlayMarkDef(color=color))
    ).properties(width="container", height=_HEIGHT)


def _spent_over_time(report: Report) -> _Drawn:
    data = [
        {**_when(report, point), "kind": kind, "microusd": microusd, "usd": microusd / _MICRO}
        for point in report.series
        for kind, microusd in _spent(point.figures).items()
    ]
    return (
        _chart(data)
        .mark_bar(orient="vertical", x2Offset=-1)
        .encode(
            x=_time(report),
            x2="end:T",
            y=alt.Y("usd:Q", stack="zero", title="dollars", axis=alt.Axis(format="$,.2~f")),
            color=_color("", "kind", tuple(_spent(report.total))),
            tooltip=["time:T", "kind:N", alt.Tooltip("usd:Q", format="$,.2f")],
        )
        .properties(height=_HEIGHT)
    )


def _spent(figures: Figures) -> dict[str, int]:
    return {
        "spent": figures.spent_microusd,
        "unknown, at most": figures.unknown_microusd,
        "open, at most": figures.open_microusd,
    }


# ── by what it is told apart by ─────────────────────────────────────────────────────────────────────────────────


def _answers_by(field: str, groups: Sequence[Group]) -> _Drawn:
    shown = _few(groups)
    data = [{field: group.name, **datum} for group in shown for datum in _ways(group.figures)]
    return (
        _chart(data)
        .mark_bar(size=_BAR_STEP - 4)
        .encode(
            y=_names(field, shown),
            x=alt.X(
                "pictures:Q", title="pictures answered", axis=alt.Axis(format="~s", tickMinStep=1, tickCount=_BAR_TICKS)
            ),
            color=_color("answered by", "way", _present(data, "way", WAYS)),
            order=alt.Order("rank:Q"),
            tooltip=[f"{field}:N", "way:N", "pictures:Q", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=_BAR_STEP * max(_LEAST_BARS, len(shown)))
    )


def _money_by(field: str, groups: Sequence[Group]) -> _Drawn:
    shown = _few(groups)
    data = [
        {field: group.name, "kind": kind, "microusd": microusd, "usd": microusd / _MICRO}
        for group in shown
        for kind, microusd in (_spent(group.figures) | {"saved": group.figures.saved_microusd}).items()
    ]
    return (
        _chart(data)
        .mark_bar(size=_BAR_STEP - 4)
        .encode(
            y=_names(field, shown),
            x=alt.X(
                "usd:Q",
                title="dollars",
                axis=alt.Axis(format="$,.2~f", labelOverlap=True, labelSeparation=6, tickCount=_BAR_TICKS),
            ),
            color=_color("", "kind", (*_spent(Figures()), "saved")),
            tooltip=[f"{field}:N", "kind:N", alt.Tooltip("usd:Q", format="$,.2f")],
        )
        .properties(height=_BAR_STEP * max(_LEAST_BARS, len(shown)))
    )


def _few(groups: Sequence[Group]) -> list[Group]:
    """The most asked groups, and the others as one."""
    if len(groups) <= _MOST_BARS:
        return [Group((group.name or "-",), group.figures) for group in groups]
    rest = groups[_MOST_BARS - 1 :]
    others = Group((f"{OTHER} ({len(rest)})",), add_figures(group.figures for group in rest))
    return [*groups[: _MOST_BARS - 1], others]


def _names(field: str, groups: Sequence[Group]) -> alt.Y:
    return alt.Y(f"{field}:N", title=None, sort=[group.name for group in groups], axis=alt.Axis(labelLimit=200))


def _latency(total: Figures) -> _Drawn:
    """From p50 to p99 by where an answer came from, on a scale on which a millisecond and a minute are both seen."""
    data = []
    for way, latency in total.latency.items():
        for percent, size in _SYMBOL_SIZES.items():
            bound = latency.at_most_s(percent / 100)
            if bound is None:
                continue
            beyond = bound == math.inf
            at_most_s = latency.bounds_s[-1] if beyond else bound
            data.append({"way": way, "quantile": f"p{percent}", "at_most_s": at_most_s, "beyond": beyond, "size": size})
    base = _chart(data).encode(
        y=alt.Y("way:N", title=None, sort=list(total.latency), axis=alt.Axis(labelLimit=200)),
    )
    scale = alt.Scale(type="log", nice=False)
    lines = base.mark_rule(strokeWidth=3, color=_COLORS[UPSTREAM]).encode(
        x=alt.X("min(at_most_s):Q", title="seconds, at most", scale=scale), x2="max(at_most_s):Q"
    )
    names, colors = list(_QUANTILES), list(_QUANTILES.values())
    points = base.mark_point(filled=True, opacity=1).encode(
        x=alt.X("at_most_s:Q", scale=scale, axis=alt.Axis(format="~g", values=list(_TENFOLD_S))),
        shape=alt.Shape("quantile:N", title=None, scale=alt.Scale(domain=names)),
        color=alt.Color("quantile:N", title=None, scale=alt.Scale(domain=names, range=colors)),
        size=alt.Size("size:Q", scale=None, legend=None),
        tooltip=["way:N", "quantile:N", alt.Tooltip("at_most_s:Q", format="~g")],
    )
    return alt.layer(lines, points).properties(width="container", height=(_BAR_STEP + 10) * max(1, len(total.latency)))


def _hit_rate_by_size(sizes: Sizes) -> _Drawn:
    """Sizes from the smallest tried on; one without bound has no place on the scale, and is in the table."""
    data = [
        {
            "MiB": row.l1_bytes / 2**20,
            "hit_rate": row.hit_rate,
            "hits": row.hits,
            "kind": row.kind,
        }
        for row in sizes.rows
        if row.l1_bytes
    ]
    return (
        _chart(data)
        .mark_line(point=True)
        .encode(
            x=alt.X("MiB:Q", title="size of the memory level, in MiB", scale=alt.Scale(type="log", nice=False)),
            y=alt.Y("hit_rate:Q", title="hit rate", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True)),
            color=alt.Color("kind:N", title="kept for, and profile", sort=None, legend=_LEGEND_BELOW),
            tooltip=["MiB:Q", alt.Tooltip("hit_rate:Q", format=".1%"), "kind:N"],
        )
        .properties(height=_HEIGHT)
    )


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _chart(data: Sequence[Mapping[str, Any]]) -> _Drawn:
    return alt.Chart(alt.InlineData(values=[dict(each) for each in data]), width="container")


def _ways(figures: Figures) -> list[_Datum]:
    """Pictures answered, by where they came from."""
    pictures: dict[str, int] = {
        **{str(tier): hits for tier, hits in figures.hits_by_tier.items()},
        COLLAPSED: figures.collapsed,
        DERIVED: figures.derived,
        UPSTREAM: figures.misses + figures.observed,
    }
    return [
        {"way": way, "pictures": number, "share": number / figures.answered, "rank": rank}
        for rank, (way, number) in enumerate(pictures.items())
        if number
    ]


def _present(data: Iterable[_Datum], name: str, known: Sequence[str]) -> tuple[str, ...]:
    found = {datum[name] for datum in data}
    return tuple(str(each) for each in known if each in found)


def _color(title: str, name: str, domain: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(domain), range=[_COLORS[each] for each in domain])
    return alt.Color(f"{name}:N", title=title or None, scale=scale)


def _when(report: Report, point: Point) -> _Datum:
    """A bar is as wide as the time it stands for."""
    return {"time": point.start_time.isoformat(), "end": (point.start_time + report.period.step).isoformat()}


def _time(report: Report) -> alt.X:
    days = report.period.length.days
    ticks: Any = {"interval": "day", "step": math.ceil(days / _TICKS)} if days > 1 else _TICKS
    axis = alt.Axis(
        format="%d %b" if days > 1 else "%H:%M", labelOverlap=True, labelSeparation=6, tickCount=ticks, grid=False
    )
    return alt.X("time:T", title="UTC", axis=axis, scale=alt.Scale(type="utc"))
