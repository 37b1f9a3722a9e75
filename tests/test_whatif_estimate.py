"""Forecasts from request logs: what repeats, what is told of lines that are no requests, and what a reader is shown."""

from __future__ import annotations

import gzip
import json
import math
import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from cachetools import LRUCache
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.cli import app
from cacheserver.errors import UnreadableFileError
from cacheserver.identity import identify
from cacheserver.model import ImageRequest, Namespace
from cacheserver.tiers.memory import OVERHEAD_BYTES
from cacheserver.whatif import estimate as forecast
from cacheserver.whatif import logs
from cacheserver.whatif.advice import NearMisses, NearPrompt, near_misses
from cacheserver.whatif.estimate import Assumed, Estimate, estimate
from cacheserver.whatif.lines import Block, LineFile
from cacheserver.whatif.logs import LogPlan, read_block
from cacheserver.whatif.simulate import MemoryReplay, TiersReplay
from scripts.bench.request_log import Mix, write_log

MEDIUM = 53_000
DAY_S = 86_400.0


def row(time_s: float, prompt: str, caller: str = "a", **more: Any) -> dict[str, Any]:
    return {"time": time_s, "prompt": prompt, "caller": caller, **more}


def log(path: Path, rows: Iterable[Any]) -> LineFile:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return LineFile(path)


def forecast_of(file: LineFile, *, assumed: Assumed | None = None, plan: LogPlan | None = None) -> Estimate:
    return estimate(file, plan or LogPlan(), assumed or Assumed(), workers=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def run(*args: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, ["estimate", *args])


# ---- What repeats


def test_repeats_are_by_profile_and_cost_what_the_pictures_would(path: Path) -> None:
    prompts = ["A red fox.", "a red fox", "a red fox, sku 1", "a red fox, sku 2", "a red fox"]
    plan = LogPlan(profiles=("exact", "standard", "catalog"), catalog_patterns=(r", sku \d+",))
    result = forecast_of(log(path, [row(i, prompt, f"caller {i}") for i, prompt in enumerate(prompts)]), plan=plan)
    assert [(each.profile, each.distinct, each.repeats) for each in result.profiles] == [
        ("exact", 4, 1),
        ("standard", 3, 2),
        ("catalog", 1, 4),
    ]
    assert [each.saved_microusd for each in result.profiles] == [MEDIUM, 2 * MEDIUM, 4 * MEDIUM]
    assert result.cost_microusd == 5 * MEDIUM


def test_a_reroll_is_the_same_callers_same_prompt_again_soon(path: Path) -> None:
    rows = [
        row(0, "a red fox", "ann"),
        row(10, "A red fox.", "ann"),
        row(20, "a red fox", "bob"),
        row(910, "a red fox", "ann"),
        row(910, "a red fox", "bob"),
        row(1_811, "a red fox", "bob"),
        {"time": 1_812, "prompt": "a red fox"},
        {"time": 1_813, "prompt": "a red fox"},
    ]
    standard = forecast_of(log(path, rows)).profiles[1]
    assert (standard.repeats, standard.rerolls) == (7, 3)  # 900 s are soon, 901 are not
    assert standard.saved_without_rerolls_microusd == 4 * MEDIUM


def test_each_tier_answers_what_it_still_has(path: Path) -> None:
    rows = [row(0, "first"), row(1, "second"), row(2, "first"), row(DAY_S, "second"), row(2 * DAY_S, "second")]
    one_picture = Assumed(l1_bytes=(8 * 1_600_000,), image_bytes=1_500_000, ttls_s=(None, 1.5 * DAY_S))
    for_ever, expiring = forecast_of(log(path, rows), assumed=one_picture).tiers
    assert (for_ever.memory_rate, for_ever.redis_rate, for_ever.s3_rate) == pytest.approx((3 / 5, 0, 0))
    assert expiring.hit_rate == pytest.approx(2 / 5)


def test_redis_keeps_for_its_time_from_when_it_was_written_and_s3_for_ever() -> None:
    tiers = TiersReplay(MemoryReplay(0), redis_ttl_s=100)
    hits = []
    for now_s in (0, 99, 100, 199, 201):
        is_hit = tiers.asked(1, 0, 10, now_s)
        hits.append((is_hit, tiers.redis_hits, tiers.s3_hits))
    assert hits == [(False, 0, 0), (True, 1, 0), (True, 1, 1), (True, 2, 1), (True, 2, 2)]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40_000)), max_size=200), st.integers(40_000, 400_000))
def test_the_memory_keeps_what_the_services_own_would(asked: list[tuple[int, int]], max_bytes: int) -> None:
    ours = MemoryReplay(max_bytes)
    theirs: LRUCache[int, int] = LRUCache(max_bytes, getsizeof=lambda size: size)
    for key, size in asked:
        entry_bytes = size + OVERHEAD_BYTES
        assert ours.get(key, 0.0) == (theirs.get(key) is not None)
        ours.put(key, size, math.inf)
        if entry_bytes <= max_bytes // 8:
            theirs[key] = entry_bytes
        else:
            theirs.pop(key, None)


WORDS = st.sampled_from(["A", "a", "fox", "Fox", "FOX", '"Fox"', "sku 12", "sku 13", "3", "fox.", "  ", "ﬁ", "Ä", "Ä"])


@given(st.lists(st.lists(WORDS, min_size=1, max_size=4).map(" ".join), min_size=2, max_size=6))
def test_rows_share_a_key_exactly_where_the_service_gives_them_one(prompts: list[str]) -> None:
    patterns = (r"sku \d+",)
    plan = LogPlan(profiles=("exact", "standard", "catalog"), catalog_patterns=patterns)
    seen = [prompt for prompt in prompts if prompt.strip()]
    data = "".join(json.dumps(row(0, prompt)) + "\n" for prompt in seen).encode()
    rows = read_block(Block(1, data), plan, 0)
    for profile, keys in zip(plan.profiles, rows.keys, strict=True):
        namespace = Namespace("x", "x", profile=profile, catalog_patterns=patterns)
        theirs = [identify(ImageRequest(prompt, "gpt-image-2"), namespace).key.name for prompt in seen]
        assert [keys.index(key) for key in keys] == [theirs.index(name) for name in theirs]


def test_model_size_and_quality_are_part_of_the_key(path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"model": "gpt-image-1"}, {"size": "1024x1536"}, {"quality": "high"}]
    assert forecast_of(log(path, [row(i, "a fox", **each) for i, each in enumerate(settings)])).profiles[1].repeats == 0


def test_what_a_row_leaves_out_is_auto_as_in_the_service_and_is_told(path: Path) -> None:
    rows = [
        row(0, "a fox"),
        row(1, "a fox", size="auto", quality="auto", model="gpt-image-2"),
        row(2, "a fox", size=""),
    ]
    result = forecast_of(log(path, rows))
    assert result.profiles[1].repeats == 2
    assert result.missing == {"model": 2, "size": 1, "quality": 2}


def test_a_picture_without_a_price_counts_as_nothing_and_is_told(path: Path) -> None:
    result = forecast_of(log(path, [row(0, "a fox", model="of-our-own"), row(1, "a fox")]))
    assert (result.cost_microusd, result.unpriced_rows) == (MEDIUM, 1)


# ---- Reading


def test_times_come_in_many_forms(path: Path) -> None:
    times = [1_780_000_000, 1_780_000_001.5, 1_780_000_002_000, "2026-05-28T20:26:43Z", "2026-05-28T22:26:44+02:00"]
    result = forecast_of(log(path, [{"time": time, "prompt": "a fox"} for time in times]))
    assert (result.rows, result.bad_lines, result.disordered_rows) == (5, 0, 0)
    assert 3 < result.span_s < 5


def test_rows_out_of_order_are_taken_as_they_come_and_counted(path: Path) -> None:
    result = forecast_of(log(path, [row(1_000, "a fox"), row(0, "a fox"), row(990, "a fox")]))
    assert (result.disordered_rows, result.span_s) == (1, 0)


BAD = [
    ("not json", "is no JSON"),
    ("[1]", "is no JSON object"),
    ('{"prompt": "a fox"}', "time: is missing"),
    ('{"time": "soon", "prompt": "a fox"}', "time: is neither seconds"),
    ('{"time": true, "prompt": "a fox"}', "time: is neither seconds"),
    ('{"time": NaN, "prompt": "a fox"}', "time: is neither seconds"),
    ('{"time": 1}', "prompt: is missing"),
    ('{"time": 1, "prompt": ["secret"]}', "prompt: is no text"),
    ('{"time": 1, "prompt": "secret", "size": "huge"}', "size: must be"),
    ('{"time": 1, "prompt": "secret", "quality": "best"}', "quality: must be one of"),
    ('{"time": 1, "prompt": "\\ud800"}', "prompt: must be text"),
]


@pytest.mark.parametrize(("line", "says"), BAD)
def test_a_line_that_is_no_request_is_left_out_and_told(path: Path, line: str, says: str) -> None:
    result = forecast_of(log(path, [row(0, "a fox"), line, "", row(1, "a fox")]))
    assert (result.rows, result.bad_lines, result.profiles[1].repeats) == (2, 1, 1)
    assert result.first_bad_lines[0].line == 2
    assert says in result.first_bad_lines[0].problem
    assert "secret" not in result.first_bad_lines[0].problem


def test_only_the_first_bad_lines_are_told_and_all_are_counted(path: Path) -> None:
    result = forecast_of(log(path, [row(0, "a fox"), *(line for line, _ in BAD)]))
    assert (result.bad_lines, [bad.line for bad in result.first_bad_lines]) == (len(BAD), [2, 3, 4, 5, 6])


def test_strict_stops_at_the_first_bad_line(path: Path) -> None:
    file = log(path, [row(0, "a fox"), "not json"])
    with pytest.raises(UnreadableFileError, match="line 2: is no JSON"):
        estimate(file, LogPlan(), Assumed(), workers=0, is_strict=True)


def test_a_log_without_requests_is_an_error(path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="holds no request; line 1: is no JSON"):
        forecast_of(log(path, ["nothing"]))


def test_a_line_above_the_limit_is_bad_and_the_next_is_read(path: Path) -> None:
    log(path, [row(0, "a fox"), row(1, "x" * 30_000), row(2, "a fox")])
    for block_bytes in (100, 10_000, 1_000_000):
        file = LineFile(path, block_bytes=block_bytes, max_line_bytes=1_000)
        result = forecast_of(file)
        assert (result.rows, result.bad_lines) == ((2, 1) if block_bytes < 1_000_000 else (3, 0))
        assert result.groups[0].line == 1


def test_fields_may_have_other_names_also_inside_objects(path: Path) -> None:
    rows = [
        {"ts": 1, "request": {"text": "a fox", "who": 7}},
        {"ts": 2, "request": {"text": "a fox", "who": 7}},
        {"ts": 3},
    ]
    log(path, rows)
    names = ["time=ts", "prompt=request.text", "caller=request.who"]
    result = run(str(path), "--json", *(word for name in names for word in ("--field", name)))
    facts = json.loads(result.stdout)
    assert facts["profiles"][1]["rerolls"] == 1
    assert facts["first_bad_lines"] == [{"line": 3, "problem": "request.text: is missing"}]


def test_processes_find_what_one_finds(path: Path) -> None:
    write_log(path, Mix(rows=3_000, span_s=DAY_S, products=300), seed=3)
    small = LineFile(path, block_bytes=50_000)
    alone = estimate(small, LogPlan(), Assumed(), workers=0)
    assert estimate(small, LogPlan(), Assumed(), workers=2) == alone
    packed = path.with_suffix(".gz")
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
    assert estimate(LineFile(packed), LogPlan(), Assumed(), workers=0) == alone


def test_a_process_that_is_killed_ends_it_in_words(path: Path) -> None:
    write_log(path, Mix(rows=2_000, span_s=DAY_S, products=300), seed=3)

    def kill_who_reads() -> int:
        for process in multiprocessing.active_children():
            process.kill()
        return 0

    with pytest.raises(UnreadableFileError, match="a process to read it was killed"):
        list(logs.read_log(LineFile(path, block_bytes=20_000), LogPlan(), workers=1, texts_below=kill_who_reads))


@pytest.mark.no_cover
def test_of_a_very_long_log_a_share_of_the_keys_tells_the_rest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(path, Mix(rows=12_000, span_s=3 * DAY_S, products=2_000), seed=4)
    whole = forecast_of(LineFile(path))
    monkeypatch.setattr(forecast, "MAX_ROWS", 3_000)
    share = forecast_of(LineFile(path))
    assert (share.sample, share.rows, share.cost_microusd) == (0.25, whole.rows, whole.cost_microusd)
    assert share.tiers[0].hit_rate == pytest.approx(whole.tiers[0].hit_rate, abs=0.03)
    assert share.tiers[0].memory_rate == pytest.approx(whole.tiers[0].memory_rate, abs=0.05)
    assert share.profiles[1].saved_microusd == pytest.approx(whole.profiles[1].saved_microusd, rel=0.1)


def test_what_is_remembered_of_rerolls_has_a_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_MAX_RECENT", 10)
    rows = [row(i, f"fox {i // 2} and owl", "ann") for i in range(100)]
    assert forecast_of(log(path, rows)).profiles[1].rerolls == 50


def test_what_is_remembered_of_requests_has_a_bound_in_characters(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MAX_MEMO_CHARS", 20_000)
    plan = LogPlan(model="of-a-bounded-reader")
    rows = [row(i, f"fox {i % 50} " + "in snow " * 100) for i in range(200)]
    assert forecast_of(log(path, rows), plan=plan).profiles[1].repeats == 150
    kept = logs._reader(plan)._memo
    assert 0 < sum(len(known.text) for known in kept.values()) < 12_000


# ---- What to read, and advice


def near(texts: Iterable[str]) -> list[NearPrompt]:
    return [NearPrompt(text, "", 2, MEDIUM) for text in texts]


def test_an_article_number_is_found_with_the_pattern_that_drops_it() -> None:
    texts = [f"photo of a {shoe} shoe, sku {n}, white background" for shoe in ("red", "blue") for n in range(100, 110)]
    [found] = near_misses(near(texts), rate=1.0)
    assert (found.kind, found.pattern, found.merged, found.groups) == ("number", r"sku \d+", 1.0, 2)
    assert found.template.endswith("shoe, sku {…}, white background")
    assert (found.prompts, found.asks, found.saved_microusd) == (20, 40, 18 * MEDIUM)


def test_a_word_that_differs_is_shown_and_gets_no_pattern() -> None:
    texts = [f"a nice photo of {name} in the rain" for name in ("ann", "bob", "carl", "dora")]
    [found] = near_misses(near([*texts, "a nice photo of in the rain", "something else entirely new"]), rate=0.5)
    assert (found.kind, found.pattern, found.template) == ("word", "", "a nice photo of {…} in the rain")
    assert set(found.values) == {"ann", "bob", "carl", "dora"}
    assert (found.prompts, found.saved_microusd) == (10, 8 * MEDIUM)


def test_two_prompts_or_prompts_of_another_size_are_no_group() -> None:
    pair = near(["a photo of one fox", "a photo of two fox"])
    other = NearPrompt("a photo of three fox", "1024x1536", 1, MEDIUM)
    assert near_misses([*pair, other], rate=1.0) == []


@pytest.mark.parametrize(("bound", "most"), [("_MAX_TEXTS", 100), ("_MAX_TEXT_CHARS", 4_500)])
def test_a_bound_on_texts_leaves_an_estimate(
    path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    monkeypatch.setattr(forecast, bound, most)
    rows = [row(i, f"photo of a red shoe, sku {i}, white background") for i in range(1_000)]
    compared: list[int] = []

    def counted(prompts: Sequence[NearPrompt], **options: Any) -> list[NearMisses]:
        compared.append(len(prompts))
        return near_misses(prompts, **options)

    monkeypatch.setattr(forecast, "near_misses", counted)
    [found] = forecast_of(log(path, rows)).near_misses
    assert 30 < compared[0] <= 100
    assert found.prompts == pytest.approx(1_000, rel=0.35)


def test_the_largest_groups_are_shown_with_their_prompts_unless_they_are_not_to_be(path: Path) -> None:
    rows = [row(i, f"fox number {i % 7}, in <b>snow</b>") for i in range(50)]
    log(path, rows)
    page = path.with_suffix(".html")
    shown = run(str(path), "--html", str(page))
    assert shown.exit_code == 0, shown.output
    assert "8 x  saves $0.3710  fox number 0" in shown.stdout
    assert "in &lt;b&gt;snow" in page.read_text()
    hidden = run(str(path), "--html", str(page), "--no-prompts", "--json")
    assert "snow" not in page.read_text() + hidden.stdout
    assert json.loads(hidden.stdout)["groups"][0] == {"asks": 8, "line": 1, "saved_microusd": 7 * MEDIUM, "prompt": ""}


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_page_that_cannot_be_written_costs_nobody_the_forecast(path: Path, as_json: list[str]) -> None:
    log(path, [row(i, f"fox number {i % 7}") for i in range(50)])
    result = run(str(path), "--html", str(path / "page.html"), *as_json)
    assert result.exit_code == 1
    assert "page.html: Not a directory" in result.stderr
    assert "Not a directory" not in result.stdout
    assert "fox number 0" in result.stdout


def test_the_page_needs_nothing_from_elsewhere(path: Path) -> None:
    log(path, [row(i, f"fox number {i % 7}") for i in range(50)])
    page = path.with_suffix(".html")
    run(str(path), "--html", str(page))
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not any(word in text for word in ("http:", "https:", "src=", "href=", "<script", "@import", "url("))


@pytest.mark.parametrize(
    "option",
    [
        ["--field", "prompt"],
        ["--field", "colour=c"],
        ["--profile", "catalog"],
        ["--profile", "loose"],
        ["--catalog-pattern", "("],
        ["--quality", "best"],
        ["--l1", "much"],
        ["--l1", ","],
        ["--ttl", "never"],
    ],
)
def test_an_option_that_cannot_be_used_is_wrong_use(path: Path, option: list[str]) -> None:
    log(path, [row(0, "a fox")])
    assert run(str(path), *option).exit_code == 2


@pytest.mark.parametrize("name", ["missing.jsonl", "empty.jsonl"])
def test_a_file_that_cannot_be_used_fails_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    result = run(str(tmp_path / name))
    assert result.exit_code == 1
    assert name in result.stderr


def test_the_bench_log_repeats_itself_and_is_the_same_for_a_seed(tmp_path: Path) -> None:
    mix = Mix(rows=2_000, span_s=DAY_S, products=500)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_log(tmp_path / name, mix, seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    exact, standard = forecast_of(LineFile(tmp_path / "a")).profiles
    assert standard.repeats > exact.repeats > 200
    assert standard.rerolls > 50
