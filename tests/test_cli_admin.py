"""The commands of whoever runs the service, in this process against the admin API on a real port."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from structlog.testing import capture_logs

from cacheserver.cli.moments import moment_of
from cacheserver.model import AlarmState, AttemptOutcome, BudgetScope, Caller, UpstreamHealth
from tests.admin_front import (
    Sources,
    admin_service,
    alarm,
    attempt,
    budget,
    picture_key,
    review,
    sample_hit,
    serving,
    upstream,
)
from tests.test_cli import command, printed
from tests.test_client import contents

Run = Callable[..., Awaitable[typer.testing.Result]]

FROM_THEN = ("--since", "2027-01-01")


@pytest.fixture(autouse=True)
def _quiet_service() -> Iterator[None]:
    """The service shares this process, and its log lines are not what a command prints."""
    with capture_logs():
        yield


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
async def run(sources: Sources) -> AsyncIterator[Run]:
    """Runs the command against the service."""
    async with serving(admin_service(sources)) as address:
        yield lambda *args, **options: command(*args, address=address, **options)


def spaced(line: str) -> str:
    """The line with one blank wherever a table has many."""
    return " ".join(line.split())


# --- ledger ---


def some_rows() -> list[Any]:
    return [
        attempt(0),
        attempt(1, outcome=AttemptOutcome.UNKNOWN, cost_microusd=120_000, reason="UPSTREAM_DOWN", usage=None),
        attempt(2, outcome=AttemptOutcome.NOT_BILLED, cost_microusd=0, reason="PROMPT_REFUSED", usage=None),
        attempt(3, namespace="blog", upstream="south", cost_microusd=1),
    ]


async def test_ledger_shows_the_calls_and_their_total(run: Run, sources: Sources) -> None:
    sources.ledger.all = some_rows()
    result = await run("ledger", *FROM_THEN)
    assert result.exit_code == 0, result.output
    *_, last, total = result.stdout.splitlines()
    assert spaced(last) == "2027-01-15 08:00:03 blog catalog south gpt-image-2 high 2 settled $0.0000 ok"
    assert total == "total  settled $0.1060 (2), unknown $0.1200 (1), not billed (1)"


async def test_ledger_counts_what_is_under_way_with_the_most_it_may_cost(run: Run, sources: Sources) -> None:
    sources.ledger.all = [attempt(outcome=AttemptOutcome.SENT, cost_microusd=0, end_time_s=None, reason="", usage=None)]
    result = await run("ledger", *FROM_THEN)
    assert result.stdout.splitlines()[-1].endswith("not billed (0), under way at most $0.1200 (1)")


async def test_ledger_as_csv_has_exact_money_and_a_header(run: Run, sources: Sources) -> None:
    sources.ledger.all = some_rows()
    result = await run("ledger", *FROM_THEN, "--csv")
    assert result.exit_code == 0, result.output
    settled, unknown, *_, smallest = rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert len(rows) == 4
    assert settled == {
        "id": "a0000",
        "start_time": "2027-01-15T08:00:00+00:00",
        "end_time": "2027-01-15T08:00:02.500000+00:00",
        "namespace": "shop",
        "caller": "catalog",
        "upstream": "north",
        "model": "gpt-image-2",
        "quality": "high",
        "images": "2",
        "outcome": "settled",
        "cost_usd": "0.106001",
        "cost_microusd": "106001",
        "estimate_usd": "0.120000",
        "estimate_microusd": "120000",
        "reason": "ok",
        "tags": "spring banner",
        "upstream_request_id": "req_1",
        "input_tokens": "10",
        "output_tokens": "400",
    }
    assert (unknown["outcome"], unknown["input_tokens"]) == ("unknown", "")
    assert (smallest["cost_usd"], smallest["cost_microusd"]) == ("0.000001", "1")


async def test_ledger_of_nothing_is_a_header_and_no_money(run: Run) -> None:
    assert (await run("ledger", "--csv")).stdout.count("\n") == 1
    assert (await run("ledger")).stdout.splitlines()[-1] == (
        "total  settled $0.0000 (0), unknown $0.0000 (0), not billed (0)"
    )


async def test_ledger_prints_one_json_object(run: Run, sources: Sources) -> None:
    sources.ledger.all = some_rows()
    facts = printed(await run("ledger", *FROM_THEN, "--json"))
    assert facts["total"] == {
        "sent": {"calls": 0, "microusd": 0},
        "settled": {"calls": 2, "microusd": 106_002},
        "not_billed": {"calls": 1, "microusd": 0},
        "unknown": {"calls": 1, "microusd": 120_000},
    }
    assert [row["id"] for row in facts["rows"]] == ["a0000", "a0001", "a0002", "a0003"]
    assert facts["rows"][0]["start_time"] == "2027-01-15T08:00:00+00:00"


async def test_ledger_filters_and_sums_what_is_left(run: Run, sources: Sources) -> None:
    sources.ledger.all = some_rows()
    facts = printed(await run("ledger", *FROM_THEN, "--namespace", "shop", "--json"))
    assert (len(facts["rows"]), facts["total"]["settled"]["microusd"]) == (3, 106_001)
    facts = printed(await run("ledger", *FROM_THEN, "--upstream", "south", "--json"))
    assert [row["upstream"] for row in facts["rows"]] == ["south"]


async def test_ledger_reads_every_page_of_the_span(run: Run, sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheserver.client.admin._PAGE_SIZE", 2)
    sources.ledger.all = [attempt(number) for number in range(7)]
    span = ("--since", "2027-01-15T08:00:01", "--until", "2027-01-15T09:00:06+01:00")
    facts = printed(await run("ledger", *span, "--json"))
    assert [row["id"] for row in facts["rows"]] == ["a0001", "a0002", "a0003", "a0004", "a0005"]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("30m", datetime(2027, 1, 15, 7, 30, tzinfo=UTC)),
        ("12h", datetime(2027, 1, 14, 20, tzinfo=UTC)),
        ("30d", datetime(2026, 12, 16, 8, tzinfo=UTC)),
        ("2w", datetime(2027, 1, 1, 8, tzinfo=UTC)),
        ("2026-05-04", datetime(2026, 5, 4, tzinfo=UTC)),
        ("2026-05-04T12:30Z", datetime(2026, 5, 4, 12, 30, tzinfo=UTC)),
        ("2026-05-04T12:30+02:00", datetime(2026, 5, 4, 10, 30, tzinfo=UTC)),
    ],
)
def test_a_moment_is_a_span_ago_or_a_date(text: str, moment: datetime) -> None:
    assert moment_of(text, datetime(2027, 1, 15, 8, tzinfo=UTC), "--since") == moment


async def test_ledger_looks_back_thirty_days_unless_told(run: Run, sources: Sources) -> None:
    now = datetime.now(UTC)
    ages = {"new": timedelta(days=29), "old": timedelta(days=31)}
    sources.ledger.all = [attempt(id=name, start_time_s=(now - age).timestamp()) for name, age in ages.items()]
    assert [row["id"] for row in printed(await run("ledger", "--json"))["rows"]] == ["new"]


@pytest.mark.parametrize("args", [["--since", "soon"], ["--until", "999999w"], ["--csv", "--json"]])
async def test_ledger_refuses_what_it_cannot_mean(run: Run, args: list[str]) -> None:
    result = await run("ledger", *args)
    assert result.exit_code == 2


# --- upstreams ---


@pytest.mark.parametrize("words", [["upstreams"], ["upstreams", "list"]])
async def test_upstreams_shows_the_pool(run: Run, sources: Sources, words: list[str]) -> None:
    sources.upstreams.all = [
        upstream("north", percent=12.5, latency_s=1.25, images_per_minute=250.0),
        upstream("south", health=UpstreamHealth.NO_QUOTA),
    ]
    result = await run(*words)
    assert result.exit_code == 0, result.output
    _, north, south = result.stdout.splitlines()
    assert north.split() == (
        [
            "north",
            "well",
            "acme",
            "gpt-image-2,",
            "painter",
            "2",
            "12.5",
            "%",
            "1",
            "x0.9",
            "98.5%",
            "1.2",
            "s",
            "3",
            "1,234",
            "250",
        ]
    )
    assert spaced(south) == "south no_quota acme gpt-image-2, painter 2 - 1 x0.9 98.5% - 3 1,234 -"


@pytest.mark.parametrize("words", [["upstreams", "--json"], ["upstreams", "list", "--json"]])
async def test_upstreams_prints_one_json_object(run: Run, sources: Sources, words: list[str]) -> None:
    sources.upstreams.all = [upstream("north")]
    [facts] = printed(await run(*words))["upstreams"]
    assert (facts["name"], facts["health"], facts["percent"]) == ("north", "well", None)


@pytest.mark.parametrize(
    ("args", "change"),
    [
        (["--weight", "0.5"], {"weight": 0.5}),
        (["--percent", "0"], {"percent": 0.0}),
        (["--no-percent"], {"clear_percent": True}),
        (["--pause"], {"paused": True}),
        (["--resume"], {"paused": False}),
    ],
)
async def test_upstreams_set_changes_what_is_said(
    run: Run, sources: Sources, args: list[str], change: dict[str, Any]
) -> None:
    sources.upstreams.all = [upstream("north")]
    result = await run("upstreams", "set", "north", *args)
    assert result.exit_code == 0, result.output
    assert "north" in result.stdout
    unchanged = {"weight": None, "percent": None, "clear_percent": False, "paused": None}
    assert sources.upstreams.changes == [unchanged | change]


@pytest.mark.parametrize("args", [[], ["--percent", "5", "--no-percent"], ["--weight", "-1"], ["--weight", "x"]])
async def test_upstreams_set_refuses_what_it_cannot_mean(run: Run, sources: Sources, args: list[str]) -> None:
    sources.upstreams.all = [upstream("north")]
    assert (await run("upstreams", "set", "north", *args)).exit_code == 2
    assert sources.upstreams.changes == []


async def test_an_upstream_nobody_knows_fails(run: Run) -> None:
    result = await run("upstreams", "set", "west", "--pause", "--json")
    assert result.exit_code == 1
    assert printed(result)["error"]["reason"] == "UPSTREAM_UNKNOWN"


# --- budgets ---


@pytest.mark.parametrize("words", [["budgets"], ["budgets", "list"]])
async def test_budgets_shows_what_is_left(run: Run, sources: Sources, words: list[str]) -> None:
    used_up = budget(BudgetScope.NAMESPACE, "shop", spent_microusd=60_000_000)
    sources.budgets.all = [budget(), used_up]
    result = await run(*words)
    assert result.exit_code == 0, result.output
    _, whole, shop = result.stdout.splitlines()
    assert spaced(whole) == "global/day $50.0000 $12.3457 $0.2000 $37.4543 2027-01-15 09:00"
    assert spaced(shop) == "namespace:shop/day $50.0000 $60.0000 $0.2000 $0.0000 2027-01-15 09:00"


async def test_no_budgets_are_said_to_be_none(run: Run) -> None:
    assert "no budgets" in (await run("budgets")).stdout
    assert printed(await run("budgets", "--json")) == {"budgets": []}


@pytest.mark.parametrize(("text", "microusd"), [("0", 0), ("12.345678", 12_345_678), ("1e3", 1_000_000_000)])
async def test_budgets_set_takes_dollars(run: Run, sources: Sources, text: str, microusd: int) -> None:
    sources.budgets.all = [budget()]
    facts = printed(await run("budgets", "set", "global/day", "--limit-usd", text, "--json"))
    assert facts["limit_microusd"] == sources.budgets.all[0].budget.limit_microusd == microusd
    assert facts["reset_time"] == "2027-01-15T09:00:00+00:00"


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "much", "1000000001", "$5"])
async def test_budgets_set_refuses_what_is_no_sum(run: Run, sources: Sources, text: str) -> None:
    sources.budgets.all = [budget()]
    result = await run("budgets", "set", "global/day", "--limit-usd", text)
    assert result.exit_code == 2
    assert sources.budgets.all == [budget()]


# --- review ---


async def test_review_shows_what_waits(run: Run, sources: Sources) -> None:
    sources.reviews.all = [review(1), review(2, score=None)]
    result = await run("review")
    assert result.exit_code == 0, result.output
    first, key, second, _, count = result.stdout.splitlines()
    assert first == "score 0.31  1024x768 image/png  1.5 kB  shop  gpt-image-2  cost $0.0530  made 2027-01-15 08:00 UTC"
    assert key.strip() == f"key   {review(1).key.name}"
    assert second.startswith("no score")
    assert count == "2 waiting"


async def test_review_show_writes_the_picture(run: Run, sources: Sources, tmp_path: Path) -> None:
    sources.reviews.all = [review(1, data=b"a picture", won_against=2, revised_prompt="a red fox")]
    file = tmp_path / "held.png"
    result = await run("review", "show", review(1).key.name, "-o", str(file))
    assert result.exit_code == 0, result.output
    assert file.read_bytes() == b"a picture"
    facts, key, best, drawn_from, written = result.stdout.splitlines()
    assert facts.startswith("score 0.31  1024x768 image/png  9 B  shop")
    assert key.strip() == f"key   {review(1).key.name}"
    assert [best.strip(), drawn_from.strip()] == ["best of 3, quality high", "drawn from: a red fox"]
    assert written == f"  file  {file}"
    assert len(sources.reviews.all) == 1


async def test_review_show_prints_one_json_object(run: Run, sources: Sources, tmp_path: Path) -> None:
    sources.reviews.all = [review(1)]
    file = tmp_path / "held.png"
    facts = printed(await run("review", "show", review(1).key.name, "-o", str(file), "--json"))
    assert (facts["key"], facts["file"], facts["score"]) == (review(1).key.name, str(file), 0.31)
    assert (facts["quality"], facts["won_against"], facts["tags"]) == ("high", 0, ["spring"])
    assert facts["digest"].startswith("sha256:")


async def test_review_show_of_what_is_gone_writes_nothing(run: Run, sources: Sources, tmp_path: Path) -> None:
    gone = await run("review", "show", review(1).key.name, "-o", str(tmp_path / "held.png"))
    assert gone.exit_code == 1
    assert "REVIEW_GONE" in gone.stderr
    sources.reviews.all = [review(1)]
    assert (await run("review", "show", review(1).key.name)).exit_code == 2
    nowhere = await run("review", "show", review(1).key.name, "-o", str(tmp_path / "missing" / "held.png"))
    assert nowhere.exit_code == 1
    assert "No such file" in nowhere.stderr
    assert contents(tmp_path) == {}


async def test_review_decides(run: Run, sources: Sources) -> None:
    sources.reviews.all = [review(1), review(2)]
    approved = printed(await run("review", "approve", review(1).key.name, "--json"))
    assert approved == {"decision": "approve", "key": review(1).key.with_variant(1).name}
    assert (await run("review", "reject", review(2).key.name)).stdout == "dropped\n"
    assert (sources.reviews.approved, sources.reviews.rejected) == ([review(1).key], [review(2).key])
    assert printed(await run("review", "list", "--json")) == {"reviews": []}
    gone = await run("review", "approve", review(1).key.name)
    assert gone.exit_code == 1
    assert "REVIEW_GONE" in gone.stderr


# --- similar hits ---


async def test_report_wrong_bans_two_keys(run: Run, sources: Sources) -> None:
    key, other = picture_key(1).name, picture_key(2).name
    result = await run("report-wrong", key, other)
    assert (result.exit_code, result.stdout) == (0, "they answer for one another no more\n")
    assert sources.epochs.is_banned(picture_key(1), picture_key(2))
    assert printed(await run("report-wrong", key, other, "--json")) == {"key": key, "other_key": other}


async def test_report_wrong_refuses_what_can_not_be_meant_and_tells_who_has_not_heard(
    run: Run, sources: Sources
) -> None:
    key = picture_key(1).name
    assert (await run("report-wrong", key)).exit_code == 2
    same = await run("report-wrong", key, key)
    assert (same.exit_code, "same identity" in same.stderr) == (2, True)
    sources.files.is_down = True
    unheard = await run("report-wrong", key, picture_key(2).name)
    assert unheard.exit_code == 1
    assert "TIER_UNREACHABLE" in unheard.stderr


async def test_switch_turns_similarity_off_and_on_and_alone_lists_where_it_is_off(run: Run, sources: Sources) -> None:
    assert (await run("switch")).stdout == "nothing is switched off\n"
    assert (await run("switch", "similarity", "off")).stdout == "similarity is off everywhere\n"
    await run("switch", "similarity", "off", "--namespace", "shop")
    assert (await run("switch")).stdout == "similarity is off everywhere\nsimilarity is off in shop\n"
    assert (await run("switch", "similarity", "on")).stdout == "similarity is on everywhere\n"
    off = {"switch": "similarity", "namespace": "shop", "on": False}
    assert printed(await run("switch", "--json")) == {"off": [off]}
    on = printed(await run("switch", "similarity", "on", "--namespace", "shop", "--json"))
    assert on == off | {"on": True}
    assert sources.epochs.allows_similar("shop")


@pytest.mark.parametrize("args", [["similarity"], ["similarity", "maybe"]])
async def test_switch_refuses_what_it_cannot_mean(run: Run, sources: Sources, args: list[str]) -> None:
    assert (await run("switch", *args)).exit_code == 2
    assert sources.epochs.all() == []


async def test_review_matches_shows_the_latest_similar_hits(run: Run, sources: Sources) -> None:
    sample_hit(sources.matches, 0, prompt="a [red] fox")
    sources.clock.advance(60)
    sample_hit(sources.matches, 1, namespace="default")
    result = await run("review", "matches")
    assert result.exit_code == 0, result.output
    newer, _, _, older, prompt, asked, answered, count = result.stdout.splitlines()
    assert newer.endswith("  default  canonical  2027-01-15 08:01 UTC")
    assert older.endswith("  shop  canonical  2027-01-15 08:00 UTC")
    assert prompt == "  prompt    a [red] fox"
    assert asked.split() == ["asked", picture_key(1).name]
    assert answered.split() == ["answered", picture_key(2).name]
    assert count == "2 shown"
    [shown] = printed(await run("review", "matches", "--limit", "1", "--json"))["matches"]
    assert (shown["namespace"], shown["level"], shown["time"]) == ("default", "canonical", "2027-01-15T08:01:00+00:00")
    assert printed(await run("review", "matches", "--namespace", "shop", "--json"))["matches"][0]["id"] in older


async def test_review_decides_on_similar_hits(run: Run, sources: Sources) -> None:
    for number in range(2):
        sample_hit(sources.matches, number)
        sources.clock.advance(1)
    wrong, right = printed(await run("review", "matches", "--json"))["matches"]
    assert (await run("review", "match-right", right["id"])).stdout == "right: listed no more\n"
    assert sources.epochs.all() == []
    assert printed(await run("review", "match-wrong", wrong["id"], "--json")) == wrong
    assert sources.epochs.is_banned(picture_key(3), picture_key(4))
    assert (await run("review", "matches")).stdout == "0 shown\n"
    gone = await run("review", "match-wrong", wrong["id"])
    assert gone.exit_code == 1
    assert "REVIEW_GONE" in gone.stderr


# --- alarms ---


async def test_alarms_shows_what_rings_first_and_where_to_read_on(run: Run, sources: Sources) -> None:
    sources.alarms.all = [alarm(state=AlarmState.RINGING), alarm("dear", value=None)]
    result = await run("alarms")
    assert result.exit_code == 0, result.output
    assert [spaced(line) for line in result.stdout.splitlines()] == [
        "alarm kind state value threshold since (UTC)",
        "few-hits hit_rate_below ringing 0.25 0.5 2027-01-15 08:00:00",
        "dear hit_rate_below quiet - 0.5 2027-01-15 08:00:00",
        "what to do about few-hits: https://wiki/few-hits",
    ]


async def test_alarms_prints_one_json_object(run: Run, sources: Sources) -> None:
    sources.alarms.all = [alarm()]
    facts = printed(await run("alarms", "--json"))
    assert facts["alarms"][0] == {
        "name": "few-hits",
        "kind": "hit_rate_below",
        "state": "quiet",
        "value": 0.25,
        "threshold": 0.5,
        "since": "2027-01-15T08:00:00+00:00",
        "runbook_url": "https://wiki/few-hits",
    }


async def test_no_alarms_are_said_to_be_none(run: Run) -> None:
    assert "no alarms" in (await run("alarms")).stdout


# --- common ---


async def test_a_caller_without_the_permission_is_told(sources: Sources) -> None:
    service = admin_service(sources, anonymous=Caller("shop", frozenset()))
    async with serving(service) as address:
        result = await command("budgets", address=address)
    assert result.exit_code == 1
    assert "lacks the permission `admin`" in result.stderr


@pytest.mark.parametrize("word", ["upstreams", "budgets", "review", "switch"])
async def test_a_group_helps_and_knows_its_commands(word: str) -> None:
    assert "list" in (await command(word, "--help")).stdout
    unknown = await command(word, "frobnicate")
    assert unknown.exit_code == 2
    assert "No such command" in unknown.stderr
