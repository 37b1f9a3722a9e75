"""What a report makes of rows of statistics: sums, rates, bounds, tables, charts and a page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import altair as alt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cacheserver.client import Outcome, StatsField, StatsRow, StatsSpan, TierName
from cacheserver.reports import charts, headlines, numbers, page, sizes, tables
from cacheserver.reports.calculator import monthly_pictures, seeds
from tests.report_rows import BOUNDS_S, DAYS, PRICES, SINCE, hits, row, some_period, some_report, some_rows

REPLAY = {
    "footprint_bytes": 38_600_000_000,
    "requests": 239_027,
    "rows": [
        {"l1_bytes": 2**30, "share": 0.03, "ttl_s": None, "profile": "standard", "hit_rate": 0.317,
         "saved_microusd": 2_000_000, "hits": 75_772},
        {"l1_bytes": 2**31, "share": 0.06, "ttl_s": None, "profile": "standard", "hit_rate": 0.373,
         "saved_microusd": 2_500_000, "hits": 89_157},
        {"l1_bytes": None, "share": None, "ttl_s": None, "profile": "standard", "hit_rate": 0.664,
         "saved_microusd": 4_000_000, "hits": 158_714},
    ],
}  # fmt: skip


def replayed() -> sizes.Sizes:
    return sizes.read_sizes(json.dumps(REPLAY).encode())


# --- numbers ---


def test_the_rates_of_the_tiers_add_up_to_the_hit_rate() -> None:
    total = some_report().total
    rates = [total.tier_rate(tier) for tier in total.hits_by_tier]
    assert sum(rate for rate in rates if rate) == pytest.approx(total.hit_rate)
    assert list(total.hits_by_tier) == [TierName.MEMORY, TierName.S3]


def test_the_hit_rate_counts_what_was_answered_and_nothing_else() -> None:
    answered = [
        row(Outcome.HIT, TierName.MEMORY, 5),
        row(Outcome.STALE, TierName.S3, 1),
        row(Outcome.COLLAPSED, TierName.UPSTREAM, 2),
        row(Outcome.MISS, TierName.UPSTREAM, 3),
        row(Outcome.OBSERVED, TierName.REDIS, 1),
    ]
    others = [Outcome.ERROR, Outcome.NOT_CACHED, Outcome.PENDING, Outcome.NEGATIVE, None]
    figures = numbers.add_up([*answered, *(row(outcome, None, 100) for outcome in others)], BOUNDS_S)
    assert (figures.answered, figures.hits, figures.requests) == (12, 6, 512)
    assert (figures.hit_rate, figures.unpaid_rate) == (0.5, 8 / 12)


def test_nothing_has_no_rate() -> None:
    nothing = numbers.add_up([], BOUNDS_S)
    assert (nothing.hit_rate, nothing.unpaid_rate, nothing.spared_rate) == (None, None, None)
    assert tables.percent(nothing.hit_rate) == "-"


def test_a_quantile_is_the_bound_that_so_many_did_not_exceed() -> None:
    counts = (50, 45, 4, 1)
    latency = numbers.Latency(BOUNDS_S, counts, 1.0, 100)
    assert [latency.at_most_s(share) for share in (0.5, 0.51, 0.95, 0.99, 1.0)] == [0.001, 0.1, 0.1, 10.0, math.inf]
    assert numbers.Latency(BOUNDS_S, (), 0.0, 0).at_most_s(0.5) is None
    assert (tables.at_most(latency, 0.95), tables.at_most(latency, 1.0)) == ("≤ 100 ms", "> 10 s")


def test_latencies_are_told_by_where_answers_came_from() -> None:
    latency = some_report().total.latency
    assert list(latency) == ["memory", "s3", "collapsed", "upstream"]
    assert latency["memory"].at_most_s(0.99) == 0.001
    assert latency["upstream"].at_most_s(0.5) == 10.0


rows_of_any_kind = st.lists(
    st.builds(
        row,
        st.sampled_from([*Outcome, None]),
        st.sampled_from([*TierName, None]),
        st.integers(0, 1_000),
        namespace=st.sampled_from(["shop", "blog"]),
        model=st.sampled_from(["a", "b", ""]),
        quality=st.sampled_from(["low", "high"]),
        spent_microusd=st.integers(0, 10**9),
        saved_microusd=st.integers(0, 10**9),
        unknown_microusd=st.integers(0, 10**6),
        start_time=st.datetimes(datetime(2026, 4, 30), datetime(2026, 5, 5)).map(  # noqa: DTZ001 - UTC is put in
            lambda time: time.replace(tzinfo=UTC)
        ),
    )
)


@pytest.mark.no_cover
@given(rows_of_any_kind, st.sampled_from(StatsSpan), st.integers(1, 400))
def test_however_rows_are_told_apart_they_add_up_to_the_same(rows: list[StatsRow], span: StatsSpan, hours: int) -> None:
    period = numbers.Period(SINCE, SINCE + timedelta(hours=hours), span)
    report = numbers.report(rows, BOUNDS_S, period=period, by=[StatsField.MODEL, StatsField.TIER])
    for parts in (report.groups, report.by_namespace, report.by_model, report.by_quality, report.series):
        assert numbers.flat_facts(numbers.add_figures(part.figures for part in parts)) == numbers.flat_facts(
            report.total
        )
    assert len(report.series) <= 121
    assert report.total.requests == sum(each.requests for each in rows)


def test_a_day_without_requests_is_a_point_too() -> None:
    period = numbers.Period(SINCE, SINCE + timedelta(days=5), StatsSpan.DAY)
    points = numbers.series([hits(TierName.S3, 7, 1, 0, start_time=SINCE + timedelta(days=3))], period, BOUNDS_S)
    assert [point.figures.hits for point in points] == [0, 0, 0, 7, 0]
    assert points[3].start_time == SINCE + timedelta(days=3)


def test_a_long_period_has_steps_of_several_buckets() -> None:
    year = numbers.Period(SINCE, SINCE + timedelta(days=365), StatsSpan.DAY)
    assert (year.step, tables.step_name(year)) == (timedelta(days=4), "4 days")
    assert tables.step_name(some_period()) == "day"


@pytest.mark.parametrize(
    ("length", "span"),
    [
        (timedelta(hours=2), StatsSpan.MINUTE),
        (timedelta(days=1), StatsSpan.HOUR),
        (timedelta(days=7), StatsSpan.DAY),
    ],
)
def test_the_buckets_suit_the_length_of_the_period(length: timedelta, span: StatsSpan) -> None:
    assert numbers.span_for(length) is span


def test_the_worst_namespace_is_one_with_enough_pictures_if_any_has() -> None:
    report = some_report()
    found = numbers.worst(report.by_namespace)
    assert found is not None
    assert found.name == "blog"
    few = [group for group in report.by_namespace if group.name == "tiny"]
    assert numbers.worst(few) == few[0]
    assert numbers.worst([]) is None


def test_facts_are_json_and_say_what_they_mean() -> None:
    facts = json.loads(json.dumps(numbers.facts(some_report()), allow_nan=False))
    assert facts["total"]["hit_rate_by_tier"].keys() == {"memory", "s3"}
    assert facts["total"]["latency_at_most_s"]["upstream"]["p99"] == "beyond"
    assert "hit rate" in facts["definitions"]
    assert facts["series"][0]["start_time"] == "2026-05-01T00:00:00+00:00"


# --- tables ---


@pytest.mark.parametrize(
    ("microusd", "text"),
    [(0, "$0.00"), (53_000, "$0.0530"), (1_000_000, "$1.00"), (1_234_567_890, "$1,234.57"), (-6_000, "-$0.0060")],
)
def test_money_is_told_to_the_cent_and_small_money_finer(microusd: int, text: str) -> None:
    assert tables.usd(microusd) == text


def test_a_sparkline_has_a_character_for_every_point() -> None:
    assert tables.sparkline([0.0, 0.5, None, 1.0]) == "▁▅ █"
    assert tables.sparkline([0, 0]) == "▁▁"
    assert tables.sparkline([None]) == " "


def test_a_long_series_is_a_short_line() -> None:
    period = numbers.Period(SINCE, SINCE + timedelta(days=60), StatsSpan.DAY)
    rows = [hits(TierName.S3, 1, 1_000_000, 0, start_time=SINCE + timedelta(days=day)) for day in range(60)]
    _rate, _spent, saved = tables.sparklines(numbers.report(rows, BOUNDS_S, period=period, by=[StatsField.MODEL]))
    assert saved == ("saved", "█" * 30, "$2.00 to $2.00, each 2 days")


def test_every_row_of_a_table_has_a_cell_for_every_column() -> None:
    for by in ([StatsField.NAMESPACE], [StatsField.QUALITY, StatsField.CALLER], [StatsField.OUTCOME, StatsField.TIER]):
        for table in tables.tables(some_report(by)):
            assert {len(each) for each in table.rows} == {len(table.columns)}, table.title


def test_a_table_of_very_many_groups_shows_the_most_asked_and_sums_up_all() -> None:
    rows = [hits(TierName.S3, 1 + number, 1, 0, namespace=f"n{number:03}") for number in range(50)]
    groups = numbers.groups(rows, [StatsField.NAMESPACE], BOUNDS_S)
    table = tables.hit_table(("namespace",), groups, numbers.add_up(rows, BOUNDS_S))
    assert (table.rows[0][0], len(table.rows)) == ("n049", 31)
    assert table.rows[-1][:2] == ("total, with 20 not shown", "1,275")


def test_a_comparison_tells_both_figures_and_the_change() -> None:
    now = some_report()
    first_day = [each for each in some_rows() if each.start_time == SINCE]
    then = numbers.report(first_day, BOUNDS_S, period=some_period(), by=now.by)
    compared = {each[0]: each[1:] for each in tables.comparison(now, then).rows}
    assert compared["spent"] == ("$55.34", "$9.33", "+493.0 %")
    assert compared["hit rate"][2].endswith(" points")
    nothing = numbers.report([], BOUNDS_S, period=some_period(), by=now.by)
    assert {each[0]: each[3] for each in tables.comparison(now, nothing).rows}["saved"] == "new"


def test_a_comparison_of_periods_of_other_lengths_says_so() -> None:
    now = some_report()
    day = numbers.Period(SINCE, SINCE + timedelta(days=1), StatsSpan.HOUR)
    assert "differ in length" in tables.comparison(now, numbers.report([], BOUNDS_S, period=day, by=now.by)).note


def test_csv_has_exact_money_and_the_same_columns_whatever_occurred() -> None:
    full = list(csv.DictReader(io.StringIO(tables.csv_text(some_report()))))
    assert [each["namespace"] for each in full] == ["shop", "blog", "tiny"]
    assert sum(int(each["spent_microusd"]) for each in full) == some_report().total.spent_microusd
    one = numbers.report([row(Outcome.ERROR)], BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    [few] = csv.DictReader(io.StringIO(tables.csv_text(one)))
    assert few.keys() == full[0].keys()
    assert (few["errors"], few["hit_rate"]) == ("1", "")


# --- headlines ---


def test_the_headlines_say_what_was_spent_saved_hit_and_worst() -> None:
    report = some_report()
    said = dict(headlines.headlines(report, replayed()))
    total = report.total
    assert tables.usd(total.spent_microusd) in said["Spent:"]
    assert f"from {tables.usd(total.spent_microusd)} to {tables.usd(total.most_microusd)}" in said["Spent:"]
    assert said["Saved:"].startswith(f"about {tables.usd(total.saved_microusd)}")
    assert f"memory {tables.percent(total.tier_rate(TierName.MEMORY))}" in said["Hit rate:"]
    assert said["Worst namespace:"].startswith("blog, by hit rate")
    assert (
        "from 1.00 GiB to 2.00 GiB its hit rate goes from 31.7 % to 37.3 % (+5.6 points)"
        in (said["Twice the memory level (L1):"])
    )
    assert "Estimated are saved" in said["Measured and estimated:"]


def test_the_headlines_of_nothing_are_sentences_too() -> None:
    empty = numbers.report([], BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    said = dict(headlines.headlines(empty))
    assert said["Worst namespace:"] == "none: no picture was answered."
    assert "not known" in said["Twice the memory level (L1):"]


def test_what_was_only_observed_is_told_apart() -> None:
    rows = [row(Outcome.OBSERVED, TierName.REDIS, 9, would_cost_microusd=9_000_000)]
    observed = numbers.report(rows, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    assert "to serve them would have saved about $9.00" in dict(headlines.headlines(observed))["Observed:"]
    assert (observed.total.saved_microusd, observed.total.hit_rate) == (0, 0.0)
    assert "observed" in tables.hit_table(("namespace",), observed.groups, observed.total).columns


def test_what_was_derived_is_told_apart_and_is_neither_hit_nor_miss() -> None:
    rows = [
        hits(TierName.MEMORY, 2, 1_000_000, 0),
        row(Outcome.MISS, TierName.UPSTREAM, 1, spent_microusd=1_000_000, would_cost_microusd=1_000_000),
        row(
            Outcome.DERIVED,
            TierName.S3,
            5,
            saved_microusd=5_000_000,
            would_cost_microusd=5_000_000,
            latency_counts=(0, 5, 0, 0),
        ),
    ]
    report = numbers.report(rows, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    total = report.total
    assert (total.answered, total.hits, total.derived, total.misses) == (8, 2, 5, 1)
    assert (total.hit_rate, total.unpaid_rate) == (2 / 8, 7 / 8)
    assert (total.saved_microusd, total.derived_microusd, total.spent_microusd) == (7_000_000, 5_000_000, 1_000_000)
    assert total.hits_by_tier == {TierName.MEMORY: 2}
    assert list(total.latency) == ["memory", "derived", "upstream"]
    facts = numbers.flat_facts(total)
    assert (facts["derived"], facts["derived_microusd"], facts["unpaid_rate"]) == (5, 5_000_000, 7 / 8)
    said = dict(headlines.headlines(report))
    assert "Hits saved $2.00; " in said["Saved:"]
    assert "(derived) saved $5.00" in said["Saved:"]
    assert "and 5 derived from others, so 87.5 % were not paid for" in said["Hit rate:"]
    table = tables.hit_table(("namespace",), report.groups, total)
    assert dict(zip(table.columns, table.rows[-1], strict=True))["derived"] == "5"
    money = tables.money_table(("namespace",), report.groups, total)
    assert dict(zip(money.columns, money.rows[-1], strict=True))["of it derived"] == "$5.00"
    compared = tables.comparison(report, some_report())
    assert [each[:3] for each in compared.rows if each[0] == "derived"] == [("derived", "5", "0")]


def test_where_nothing_was_derived_no_column_says_so() -> None:
    report = some_report()
    columns = (
        *tables.hit_table(("namespace",), report.groups, report.total).columns,
        *tables.money_table(("namespace",), report.groups, report.total).columns,
    )
    assert not [column for column in columns if "derived" in column]


def test_what_warm_ups_spent_is_told_and_taken_from_what_was_saved() -> None:
    rows = [
        hits(TierName.MEMORY, 200, 1_000_000, 0),
        row(Outcome.MISS, TierName.UPSTREAM, 2, spent_microusd=52_000_000, would_cost_microusd=2_000_000),
    ]
    warmed = numbers.report(rows, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    said = dict(headlines.headlines(warmed))
    assert "$50.00 of it made pictures that no request was answered with" in said["Spent:"]
    assert said["Saved:"].endswith("Less the $50.00 for pictures that no request was answered with: $150.00.")
    assert "$50.00 of spent made pictures" in tables.money_table(("namespace",), warmed.groups, warmed.total).note
    assert "no request was answered with" not in str(headlines.headlines(some_report()))


def test_a_namespace_that_only_observes_is_not_the_worst() -> None:
    seen = row(Outcome.OBSERVED, TierName.REDIS, 200, namespace="trial", would_cost_microusd=9)
    both = numbers.report([*some_rows(), seen], BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    said = dict(headlines.headlines(both))["Worst namespace:"]
    assert said.startswith("blog, by hit rate, of the 2 with at least 100 pictures")
    assert said.endswith("Not compared, as calls are only observed there: trial.")
    assert "spent most is shop" in said
    alone = numbers.report([seen], BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    said = dict(headlines.headlines(alone))["Worst namespace:"]
    assert said.startswith("trial, by hit rate, the only one with at least 100 pictures")
    assert "Not compared" not in said
    free = [row(Outcome.MISS, requests=1), row(Outcome.MISS, requests=2, namespace="blog")]
    unpaid = numbers.report(free, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    assert "spent most" not in dict(headlines.headlines(unpaid))["Worst namespace:"]


def test_charts_over_time_show_all_of_the_period() -> None:
    rows = [hits(TierName.S3, 1, 1, 0, start_time=SINCE + timedelta(days=1))]
    one_day = drawn(numbers.report(rows, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE]))
    for name in ("hit-rate", "spent"):
        data = data_of(one_day[name])
        assert min(datum["time"] for datum in data) == SINCE.isoformat()
        assert max(datum["end"] for datum in data) == (SINCE + timedelta(days=DAYS)).isoformat()


# --- what a replay says ---


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": None}, "rows"),
        ({"requests": "many"}, "requests"),
        ({"footprint_bytes": -1}, "footprint_bytes"),
        ({"rows": [3]}, r"rows\[0\]"),
        ({"rows": [REPLAY["rows"][0] | {"hit_rate": 1.5}]}, r"rows\[0\].hit_rate"),  # type: ignore[index] # a list
        ({"rows": [REPLAY["rows"][0] | {"hits": True}]}, r"rows\[0\].hits"),  # type: ignore[index] # a list
        ({"rows": [REPLAY["rows"][0] | {"ttl_s": "x"}]}, r"rows\[0\].ttl_s"),  # type: ignore[index] # a list
        ({"rows": [REPLAY["rows"][0] | {"profile": 3}]}, r"rows\[0\].profile"),  # type: ignore[index] # a list
    ],
)
def test_a_result_of_a_replay_that_is_none_names_the_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sizes.read_sizes(json.dumps(REPLAY | change).encode())


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[]", b"[" * 200_000, b" " * (sizes.MAX_BYTES + 1)])
def test_a_file_that_is_no_result_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        sizes.read_sizes(data)


def test_sizes_of_which_one_is_twice_the_other_are_found_and_others_are_not() -> None:
    [pair] = replayed().doublings
    assert (pair.single.l1_bytes, pair.double.l1_bytes) == (2**30, 2**31)
    alone = sizes.read_sizes(json.dumps(REPLAY | {"rows": REPLAY["rows"][1:]}).encode())  # type: ignore[index] # a list
    assert "no two sizes" in headlines.doubling_line(alone)[1]


def test_of_several_kinds_the_one_that_was_replayed_first_is_told_and_named() -> None:
    rows: list[dict[str, Any]] = REPLAY["rows"]  # type: ignore[assignment] # a list
    lower = [each | {"profile": "exact", "hit_rate": each["hit_rate"] / 2} for each in rows]
    several = sizes.read_sizes(json.dumps(REPLAY | {"rows": [*rows, *lower]}).encode())
    line = headlines.doubling_line(several)[1]
    assert line.startswith("kept until evicted, profile standard: from 1.00 GiB to 2.00 GiB")
    assert "31.7 % to 37.3 %" in line
    assert "15.8 %" not in line


# --- charts ---


def data_of(chart: tables.Chart) -> list[dict[str, Any]]:
    values = chart.spec["data"]["values"]
    assert isinstance(values, list)
    return values


def drawn(report: numbers.Report | None = None) -> dict[str, tables.Chart]:
    return {chart.name: chart for chart in charts.charts(report or some_report(), replayed())}


def test_every_chart_is_valid_and_has_its_data_inside() -> None:
    for chart in drawn().values():
        assert alt.Chart.from_dict(chart.spec).to_dict()["$schema"] == chart.spec["$schema"]
        assert data_of(chart)
        assert "datasets" not in chart.spec
        assert '"url"' not in json.dumps(chart.spec)


@pytest.mark.parametrize("name", ["hit-rate", "namespaces", "models", "qualities"])
def test_the_pictures_of_a_chart_add_up_to_the_totals(name: str) -> None:
    total = some_report().total
    pictures: Counter[str] = Counter()
    for datum in data_of(drawn()[name]):
        pictures[datum["way"]] += datum["pictures"]
    assert pictures == {
        **total.hits_by_tier,
        "collapsed": total.collapsed,
        "upstream": total.misses,
    }


@pytest.mark.parametrize("name", ["spent", "money-namespaces", "money-models", "money-qualities"])
def test_the_money_of_a_chart_adds_up_to_the_totals(name: str) -> None:
    total = some_report().total
    money: Counter[str] = Counter()
    for datum in data_of(drawn()[name]):
        money[datum["kind"]] += datum["microusd"]
        assert datum["usd"] == pytest.approx(datum["microusd"] / 1e6)
    saved = {} if name == "spent" else {"saved": total.saved_microusd}
    assert money == {
        "spent": total.spent_microusd,
        "unknown, at most": total.unknown_microusd,
        "open, at most": total.open_microusd,
        **saved,
    }


def test_what_was_saved_so_far_ends_with_all_that_was_saved() -> None:
    total = some_report().total
    data = data_of(drawn()["saved"])
    assert len(data) == DAYS + 1
    assert sum(datum["microusd"] for datum in data) == total.saved_microusd
    assert (data[0]["usd"], data[-1]["usd"]) == (0.0, pytest.approx(total.saved_microusd / 1e6))


def test_many_groups_are_drawn_as_a_dozen_that_add_up() -> None:
    rows = [hits(TierName.S3, 10 + number, 1, 0, namespace=f"n{number:03}") for number in range(40)]
    report = numbers.report(rows, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    data = data_of(drawn(report)["namespaces"])
    assert len({datum["namespace"] for datum in data}) == 12
    assert data[-1]["namespace"] == "other (29)"
    assert sum(datum["pictures"] for datum in data) == report.total.answered


def test_the_charts_of_nothing_can_be_drawn() -> None:
    empty = numbers.report([], BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    assert charts.png(charts.charts(empty)).startswith(b"\x89PNG")


def test_all_charts_are_one_png() -> None:
    with Image.open(io.BytesIO(charts.png(charts.charts(some_report(), replayed())))) as picture:
        assert picture.format == "PNG"
        assert picture.width > 2_000
        colors = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert colors is not None
    assert (0, 114, 178) in {color for _count, color in colors}, "the memory level is drawn in its blue"


def test_a_chart_of_one_bar_is_as_high_as_its_legend() -> None:
    rows = [hits(tier, 1, 1, 0) for tier in charts.WAYS[:4]]
    few = drawn(numbers.report(rows, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE]))
    assert all(few[name].spec["height"] >= 110 for name in ("namespaces", "models", "money-models"))


# --- the calculator ---


def test_the_calculator_begins_with_what_was_measured_and_gives_it_back() -> None:
    report = some_report()
    begin = seeds(report, PRICES)
    assert sum(seed.share for seed in begin) == pytest.approx(1)
    assert all(seed.is_measured for seed in begin)
    volume = report.total.answered
    without = sum(volume * seed.share * seed.price_usd for seed in begin)
    saved = sum(volume * seed.share * seed.price_usd * seed.spared for seed in begin)
    assert without == pytest.approx(report.total.would_cost_microusd / 1e6)
    assert saved == pytest.approx(report.total.saved_microusd / 1e6)
    assert monthly_pictures(report) == 10 * volume


def test_the_pace_is_that_since_the_first_figures() -> None:
    rows = [hits(TierName.S3, 100, 1, 0, start_time=SINCE + timedelta(days=2))]
    young = numbers.report(rows, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE])
    assert monthly_pictures(young) == 3_000
    assert "; first figures on 2026-05-03" in headlines.period_line(young)
    assert "first figures" not in headlines.period_line(some_report())


def test_a_quality_nobody_asked_for_begins_with_its_list_price() -> None:
    [*_, last] = seeds(some_report(), PRICES | {"max": 400_000})
    assert (last.quality, last.share, last.price_usd, last.is_measured) == ("max", 0.0, 0.4, False)


# --- the page ---

HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"


def contents(**facts: Any) -> page.Contents:
    given: dict[str, Any] = {
        "made_at": datetime(2026, 5, 4, tzinfo=UTC),
        "charts": charts.charts(some_report(), replayed()),
        "script": "window.vegaEmbed = () => {};",
        "prompts": [page.Prompt("shop", HOSTILE, "high", "generated", 3.0, SINCE)],
        "prices_microusd": PRICES,
        "price_source": "a table",
        "sizes": replayed(),
    }
    return page.Contents(**(given | facts))


class Seen(HTMLParser):
    """The tags of a page, and the text of its scripts by their ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self._script: str | None = None
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        self._script = dict(attrs).get("id")

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def test_the_page_fetches_nothing_and_runs_only_its_own_scripts() -> None:
    text = page.page(some_report(), contents(script=charts.script(), other=some_report()))
    seen = Seen(text)
    addresses = [
        value for _tag, attrs in seen.tags for name in ("src", "href", "action", "data") if (value := attrs.get(name))
    ]
    assert addresses == ["data:,"]
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]
    [policy] = [attrs["content"] for tag, attrs in seen.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert not [attrs for _tag, attrs in seen.tags for name in attrs if name.startswith("on")]
    assert len([attrs for tag, attrs in seen.tags if tag == "script" and "type" not in attrs]) == 2


def test_what_a_caller_wrote_is_text_on_the_page_and_nothing_else() -> None:
    names = [row(Outcome.MISS, TierName.UPSTREAM, 3, namespace=HOSTILE, model=HOSTILE, quality=HOSTILE)]
    report = numbers.report(names, BOUNDS_S, period=some_period(), by=[StatsField.NAMESPACE], namespace=HOSTILE)
    text = page.page(
        report,
        contents(charts=charts.charts(report), prompts=[page.Prompt(HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1, None)]),
    )
    assert "alert(1)</script>" not in text
    assert "<img" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text


def test_the_page_answers_what_a_reader_asks() -> None:
    report = some_report()
    text = re.sub(r"<[^>]+>|&nbsp;", " ", page.page(report, contents()).split("<header>")[1].split("</header>")[0])
    assert "2026-05-01 00:00 to 2026-05-04 00:00 UTC" in text
    whole = page.page(report, contents()).replace("&nbsp;", " ")
    for name, said in headlines.headlines(report, replayed()):
        assert f"<b>{name}</b> {said}".replace("'", "&#x27;") in whole


def test_behind_every_chart_of_the_page_is_a_table() -> None:
    seen = Seen(page.page(some_report(), contents()))
    figures = [attrs["data-chart"] for tag, attrs in seen.tags if tag == "figure"]
    assert sorted(figures, key=str) == sorted(f"chart-{name}" for name in drawn())
    assert set(figures) <= seen.scripts.keys()
    for name in figures:
        assert json.loads(seen.scripts[name])["$schema"].endswith(".json")
    assert [tag for tag, _attrs in seen.tags].count("details") == len(figures)


def test_the_page_says_why_there_are_no_prompts() -> None:
    assert "Left out: no right to them." in page.page(some_report(), contents(prompts="no right to them."))
    assert "No prompts are recorded" in page.page(some_report(), contents(prompts=[]))


def test_a_long_prompt_is_cut_short_on_the_page() -> None:
    text = page.page(some_report(), contents(prompts=[page.Prompt("shop", "x" * 5_000, "", "missed", 1.0, None)]))
    assert f"{'x' * 299}…" in text
    assert "x" * 300 not in text


def test_a_page_without_a_replay_says_how_to_get_one() -> None:
    text = page.page(some_report(), contents(charts=charts.charts(some_report()), sizes=None))
    assert "cacheserver report --replay" in text


def test_a_script_that_would_end_early_makes_no_page() -> None:
    with pytest.raises(ValueError, match="end early"):
        page.page(some_report(), contents(script="'</SCRIPT>'"))
