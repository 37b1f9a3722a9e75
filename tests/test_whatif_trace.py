"""Traces: what a service records, what a kill or a full file leaves, and what their replay finds."""

from __future__ import annotations

import gzip
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import typer.testing
from structlog.testing import capture_logs

from cacheserver.cli import app
from cacheserver.errors import ConfigError, UnreadableFileError
from cacheserver.identity import identify
from cacheserver.model import AnswerFrom, ImageRequest, MatchLevel, Namespace, Outcome, Served, TierName
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.tiers.memory import OVERHEAD_BYTES
from cacheserver.whatif import replay as replay_module
from cacheserver.whatif.recording import TraceFile, TraceRecorder, gzip_member
from cacheserver.whatif.replay import Replay, replay
from cacheserver.whatif.trace import COLUMNS, Trace
from tests.fakes import FakeClock
from tests.house import House
from tests.running import ask, calling, environment, running

PRICES = {"low": 6_000, "high": 211_000}
NAMESPACE = Namespace("shop", "shop", catalog_patterns=(r"sku \d+",))
PLENTY = 1 << 40
ENTRY = 100_000
ENTRIES_PER_CACHE = 10
"""An image above an eighth of a memory is not kept."""
TEN_ENTRIES = ENTRIES_PER_CACHE * (ENTRY + OVERHEAD_BYTES)


def foreign(path: Path, asked: Iterable[tuple[float, int, str]], size_bytes: int = ENTRY) -> Trace:
    rows = "".join(f"{time_s},{prompt},{quality},{size_bytes}\n" for time_s, prompt, quality in asked)
    path.write_bytes(gzip.compress(f"time_s,prompt_id,quality,size_bytes\n{rows}".encode()))
    return Trace(path, price=PRICES.__getitem__)


def hit_rates(result: Replay) -> list[float]:
    return [row.hit_rate for row in result.rows]


# ---- Replaying


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    filled = [*range(10)]
    trace = foreign(tmp_path / "t.gz", [(i, prompt, "low") for i, prompt in enumerate([*filled, 0, 10, 0, 1])])
    bounded, boundless = replay(trace, l1_bytes=[TEN_ENTRIES]).rows
    assert bounded.hits == 2  # 0 twice; 1 made room for 10
    assert boundless.hits == 3
    assert boundless.l1_bytes is None
    assert (bounded.hit_bytes, bounded.saved_microusd) == (2 * ENTRY, 2 * PRICES["low"])


def test_a_replay_is_what_an_lru_by_bytes_does(tmp_path: Path) -> None:
    draw = Random(5)  # noqa: S311 - a workload
    asked = [(float(i), int(draw.paretovariate(0.6)) % 500, draw.choice(["low", "high"])) for i in range(5_000)]
    lru: OrderedDict[tuple[int, str], None] = OrderedDict()
    hits = 0
    for _, prompt, quality in asked:
        hits += (prompt, quality) in lru
        lru[prompt, quality] = None
        lru.move_to_end((prompt, quality))
        if len(lru) > ENTRIES_PER_CACHE:
            lru.popitem(last=False)
    bounded = replay(foreign(tmp_path / "t.gz", asked), l1_bytes=[TEN_ENTRIES]).rows[0]
    assert bounded.hits == hits > 500


def test_the_sizes_are_shares_of_the_footprint_unless_they_are_given(tmp_path: Path) -> None:
    result = replay(foreign(tmp_path / "t.gz", [(i, i % 200, "low") for i in range(1_000)]))
    assert (result.requests, result.objects, result.footprint_bytes) == (1_000, 200, 200 * ENTRY)
    assert [row.l1_bytes for row in result.rows] == [200_000, 1_000_000, 2_000_000, None]
    assert [row.share for row in result.rows] == [0.01, 0.05, 0.1, None]
    assert result.cost_microusd == 1_000 * PRICES["low"]


def test_a_lifetime_runs_from_when_a_picture_was_made(tmp_path: Path) -> None:
    trace = foreign(tmp_path / "t.gz", [(time_s, 1, "low") for time_s in (0, 50, 99, 100, 199, 200)])
    assert hit_rates(replay(trace, l1_bytes=[TEN_ENTRIES], ttls_s=[100.0])) == [0.5, 0.5]


def test_a_picture_too_large_for_the_memory_is_not_kept(tmp_path: Path) -> None:
    trace = foreign(tmp_path / "t.gz", [(time_s, 1, "low") for time_s in range(4)])
    assert hit_rates(replay(trace, l1_bytes=[2 * ENTRY])) == [0.0, 0.75]


@pytest.mark.no_cover
def test_more_pictures_than_are_looked_at_are_estimated_from_a_share_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Random(1)  # noqa: S311 - a workload
    asked = [(float(i), int(20_000 * draw.random() ** 3), "low") for i in range(60_000)]
    trace = foreign(tmp_path / "t.gz", asked, size_bytes=20_000)
    whole = replay(trace)
    monkeypatch.setattr(replay_module, "MAX_OBJECTS", 4_000)
    estimate = replay(trace)
    assert estimate.sample == 0.125
    assert estimate.requests == whole.requests
    assert estimate.footprint_bytes == pytest.approx(whole.footprint_bytes, rel=0.05)
    assert hit_rates(estimate) == pytest.approx(hit_rates(whole), abs=0.03)
    assert estimate.rows[-1].saved_microusd == pytest.approx(whole.rows[-1].saved_microusd, rel=0.05)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "its first line should name the columns"),
        ("a,b\n1,2\n", "its first line should name the columns"),
        ("time_s,prompt_id,quality,size_bytes\n", "holds no row"),
        ("time_s,prompt_id,quality,size_bytes\n1,2,low\n", "line 2: has 3 columns and not 4"),
        ("time_s,prompt_id,quality,size_bytes\n1,2,low,3\nx,2,low,3\n", "line 3: time_s: is no number"),
        ("time_s,prompt_id,quality,size_bytes\n1,2,low,-3\n", "line 2: size_bytes: is no whole number"),
        ("time_s,prompt_id,quality,size_bytes\nnan,2,low,3\n", "line 2: time_s: is not finite"),
    ],
)
def test_what_is_no_trace_is_told_by_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UnreadableFileError, match=says):
        replay(Trace(tmp_path / "t.csv", price=PRICES.__getitem__))


def test_a_trace_without_profiles_is_not_replayed_under_one(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="no keys of profiles"):
        replay(foreign(tmp_path / "t.gz", [(0, 1, "low")]), profiles=["exact"])


def test_the_command_prints_what_a_report_reads(tmp_path: Path) -> None:
    foreign(tmp_path / "t.gz", [(i, i % 20, "low") for i in range(100)])
    args = ["report", "--replay", str(tmp_path / "t.gz"), "--l1", "1MiB,1.5GB", "--ttl", "1d", "--json"]
    result = typer.testing.CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["footprint_bytes"] == 20 * ENTRY
    assert [row["l1_bytes"] for row in facts["rows"]] == [1_048_576, 1_500_000_000, None]
    assert {row["ttl_s"] for row in facts["rows"]} == {86_400.0}
    assert facts["rows"][1]["hit_rate"] == 0.8
    assert "gpt-image-2" in facts["notes"][0]


@pytest.mark.parametrize("option", [["--l1", "big"], ["--ttl", "0d"], ["--profile", "loose"]])
def test_an_option_that_cannot_be_used_is_wrong_use(tmp_path: Path, option: list[str]) -> None:
    foreign(tmp_path / "t.gz", [(0, 1, "low")])
    result = typer.testing.CliRunner().invoke(app, ["report", "--replay", str(tmp_path / "t.gz"), *option])
    assert result.exit_code == 2


# ---- Recording


async def served(house: House, prompt: str) -> tuple[Served, ImageRequest]:
    answer = await house.get(prompt)
    request, _ = house.identity(prompt)
    return answer, request


def note(recorder: TraceRecorder, answer: Served, request: ImageRequest) -> None:
    recorder.answered(answer, Outcome.HIT, request, namespace=NAMESPACE, match_level=None)


def rows_of(path: Path, data: bytes | None = None) -> list[dict[str, str]]:
    header, *rows = gzip.decompress(data or path.read_bytes()).decode().splitlines()
    assert header == ",".join(COLUMNS)
    return [dict(zip(COLUMNS, row.split(","), strict=True)) for row in rows]


async def test_a_row_has_the_keys_of_every_profile_and_no_prompt(house: House, tmp_path: Path) -> None:
    file = TraceFile.open(tmp_path / "t.gz", max_bytes=PLENTY)
    recorder = TraceRecorder(file, sample=1.0, clock=FakeClock(start_s=1_000.5))
    answer, request = await served(house, "A red shoe, sku 123")
    recorder.answered(answer, Outcome.HIT, request, namespace=NAMESPACE, match_level=MatchLevel.EXACT)
    await recorder.aclose()
    [row] = rows_of(tmp_path / "t.gz")
    assert b"shoe" not in gzip.decompress((tmp_path / "t.gz").read_bytes())
    exact, standard, catalog = (
        identify(request, Namespace("x", "x", profile=profile, catalog_patterns=NAMESPACE.catalog_patterns))
        for profile in ("exact", "standard", "catalog")
    )
    assert [row[name] for name in ("key", "exact", "standard", "catalog")] == [
        each.key.fingerprint.hex() for each in (exact, exact, standard, catalog)
    ]
    assert (row["time_s"], row["tier"], row["outcome"], row["namespace"]) == ("1000.500", "upstream", "hit", "shop")
    assert int(row["size_bytes"]) == answer.entry.size_bytes
    assert int(row["cost_microusd"]) == answer.entry.image.paid_microusd > 0


async def test_of_a_derived_picture_a_trace_has_what_one_made_for_its_request_would_have_cost(
    house: House, tmp_path: Path
) -> None:
    recorder = TraceRecorder(TraceFile.open(tmp_path / "t.gz", max_bytes=PLENTY), sample=1.0, clock=FakeClock())
    answer, request = await served(house, "a red fox")
    entry = replace(answer.entry, derived_from="v1.master", derived_by=frozenset({AnswerFrom.QUALITY}))
    entry = replace(entry, image=replace(entry.image, paid_microusd=0))
    derived = replace(answer, entry=entry, tier=TierName.S3, saved_microusd=6_000, derived=True)
    recorder.answered(derived, Outcome.DERIVED, request, namespace=NAMESPACE, match_level=None)
    await recorder.aclose()
    [row] = rows_of(tmp_path / "t.gz")
    assert (row["cost_microusd"], row["tier"], row["outcome"]) == ("6000", "s3", "derived")
    assert replay(Trace(tmp_path / "t.gz", price=PRICES.__getitem__)).cost_microusd == 6_000


async def test_a_service_records_what_its_replay_finds_again(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "t.csv.gz"
    async with running(environment(tmp_path, trace__path=path)) as service, calling(service) as stub:
        first = await stub.GetImage(ask("A red fox.", n=2))
        for prompt in ("a red fox", "A red fox.", "a blue fox"):
            await stub.GetImage(ask(prompt))
        by_key = pb.StreamImageRequest(request=pb.GetImageRequest(key=first.images[1].key))
        events = [event async for event in stub.StreamImage(by_key)]
    assert events
    assert [(row["tier"], row["outcome"], row["variant"]) for row in rows_of(path)] == [
        ("upstream", "miss", "0"),
        ("upstream", "miss", "1"),
        ("memory", "hit", "0"),
        ("memory", "hit", "0"),
        ("upstream", "miss", "0"),
        ("memory", "hit", "1"),
    ]
    result = replay(Trace(path, price=PRICES.__getitem__), profiles=["recorded", "exact"])
    assert [row.hits for row in result.rows if row.l1_bytes is None] == [3, 1]  # a key tells no profile's


async def test_what_was_flushed_outlives_a_kill_and_a_restart_goes_on_behind_it(house: House, tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    answer, request = await served(house, "a red fox")
    for _ in range(2):
        recorder = TraceRecorder(TraceFile.open(path, max_bytes=PLENTY), sample=1.0, clock=FakeClock())
        note(recorder, answer, request)
        await recorder.aclose()
        whole = path.read_bytes()
        row = gzip.decompress(whole).splitlines(keepends=True)[-1]
        torn = gzip_member(row * 100)
        for cut in (1, 19, 25, len(torn) - 1):
            path.write_bytes(whole + torn[:cut])
            trace = Trace(path, price=PRICES.__getitem__)
            assert len(rows_of(path, whole)) <= replay(trace).requests <= len(rows_of(path, whole)) + 100
            assert trace.is_cut
    TraceFile.open(path, max_bytes=PLENTY).close()
    assert path.read_bytes() == whole
    assert len(rows_of(path)) == 2


def test_a_file_that_is_no_trace_of_ours_is_left_alone(tmp_path: Path) -> None:
    for content in (b"something else entirely", gzip.compress(b"time_s,prompt_id\n")):
        (tmp_path / "t.gz").write_bytes(content)
        with pytest.raises(ConfigError, match="no trace of ours"):
            TraceFile.open(tmp_path / "t.gz", max_bytes=PLENTY)
        assert (tmp_path / "t.gz").read_bytes() == content


def test_two_processes_do_not_write_one_trace(tmp_path: Path) -> None:
    TraceFile.open(tmp_path / "t.gz", max_bytes=PLENTY)
    with pytest.raises(ConfigError, match="another process writes"):
        TraceFile.open(tmp_path / "t.gz", max_bytes=PLENTY)


def test_a_directory_is_no_file_to_record_into(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        TraceFile.open(tmp_path, max_bytes=PLENTY)


async def test_a_full_trace_ends_recording_and_says_so_once(house: House, tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    recorder = TraceRecorder(TraceFile.open(path, max_bytes=600), sample=1.0, clock=FakeClock())
    answer, request = await served(house, "a red fox")
    with capture_logs() as logs:
        for _ in range(50):
            note(recorder, answer, request)
            await recorder.flush()
    assert [log["event"] for log in logs] == ["trace_is_full"]
    assert 300 < path.stat().st_size <= 600
    assert rows_of(path)
    assert recorder.dropped == 0


async def test_rows_that_cannot_be_written_are_counted_and_said_once(house: House, tmp_path: Path) -> None:
    (tmp_path / "t.gz").touch()
    file = TraceFile(os.open(tmp_path / "t.gz", os.O_RDONLY), size=0, max_bytes=PLENTY)
    recorder = TraceRecorder(file, sample=1.0, clock=FakeClock())
    answer, request = await served(house, "a red fox")
    with capture_logs() as logs:
        for _ in range(2):
            note(recorder, answer, request)
            await recorder.flush()
    assert recorder.dropped == 2
    assert [log["event"] for log in logs] == ["trace_not_written"]
    file.close()


async def test_no_prompt_stays_in_memory_once_its_row_is_written(house: House, tmp_path: Path) -> None:
    recorder = TraceRecorder(TraceFile.open(tmp_path / "t.gz", max_bytes=PLENTY), sample=1.0, clock=FakeClock())
    answer, request = await served(house, "unmistakable vermilion")
    note(recorder, answer, request)
    await recorder.flush()
    assert "vermilion" not in repr(vars(recorder))
    await recorder.aclose()
    assert len(rows_of(tmp_path / "t.gz")) == 1


async def test_more_than_the_queue_takes_is_dropped_and_counted(house: House, tmp_path: Path) -> None:
    recorder = TraceRecorder(TraceFile.open(tmp_path / "t.gz", max_bytes=PLENTY), sample=1.0, clock=FakeClock())
    answer, _ = await served(house, "a red fox")
    large = ImageRequest("x" * 32_000, "gpt-image-2")
    for _ in range(1_000):
        note(recorder, answer, large)
    assert recorder.dropped == 500
    await recorder.aclose()
    assert len(rows_of(tmp_path / "t.gz")) == 500


async def test_a_sample_has_all_rows_of_some_keys_and_stands_for_the_whole(house: House, tmp_path: Path) -> None:
    path = tmp_path / "t.gz"
    recorder = TraceRecorder(TraceFile.open(path, max_bytes=PLENTY), sample=0.25, clock=FakeClock())
    answer, _ = await served(house, "a red fox")
    for number in range(400):
        for spelling in ("Fox {}, sku 1", "fox {}, sku 2", "fox {}, sku 2"):
            note(recorder, answer, ImageRequest(spelling.format(number), "gpt-image-2"))
    await recorder.aclose()
    keys = [row["catalog"] for row in rows_of(path)]
    assert 60 < len(set(keys)) < 140
    assert len(keys) == 3 * len(set(keys))
    result = replay(Trace(path, price=PRICES.__getitem__), profiles=["catalog"])
    assert result.requests == pytest.approx(1_200, rel=0.3)
    assert result.rows[-1].hit_rate == pytest.approx(2 / 3)
