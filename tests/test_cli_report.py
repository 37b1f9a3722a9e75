"""The command `report`, run in this process against a service over a real port."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.testing
from structlog.testing import capture_logs

from cacheserver.client import StatsRow
from cacheserver.pb import admin_pb2 as admin_pb
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from cacheserver.pb.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from tests.report_rows import BOUNDS_S, DAYS, SINCE, some_report, some_rows
from tests.running import ask, calling, environment, running
from tests.test_cli import command, printed
from tests.test_client import Fail, Service, serving
from tests.test_reports import REPLAY

Run = Callable[..., Awaitable[typer.testing.Result]]

PERIOD = ("--since", "2026-05-01", "--until", "2026-05-04")


@pytest.fixture(autouse=True)
def _quiet_service() -> Iterator[None]:
    """The service shares this process, and its log lines are not what a command prints."""
    with capture_logs():
        yield


@pytest.fixture
def service() -> Service:
    """Tells the rows of some_rows, to each call."""
    return Service(script=[told(some_rows()) for _ in range(4)])


@pytest.fixture
async def run(service: Service) -> AsyncIterator[Run]:
    """Runs the command against the service."""
    async with serving(service) as address:
        yield lambda *args, **options: command("report", *args, address=address, **options)


def told(rows: list[StatsRow]) -> pb.GetStatsResponse:
    return pb.GetStatsResponse(
        rows=[_message(row) for row in rows], total=pb.StatsRow(), latency_bounds_s=BOUNDS_S, start_time=SINCE
    )


def _message(row: StatsRow) -> pb.StatsRow:
    same = (
        "namespace",
        "requests",
        "image_bytes",
        "spent_microusd",
        "saved_microusd",
        "coalesced_microusd",
        "unknown_microusd",
        "degraded",
        "model",
        "quality",
        "caller",
        "start_time",
        "latency_counts",
        "would_cost_microusd",
        "settled_calls",
        "unknown_calls",
        "open_calls",
        "open_microusd",
    )
    return pb.StatsRow(
        outcome=f"OUTCOME_{row.outcome.name}" if row.outcome else None,  # type: ignore[arg-type] # by its name
        tier=f"TIER_{row.tier.name}" if row.tier else None,  # type: ignore[arg-type] # by its name
        latency_sum=timedelta(seconds=row.latency_sum_s),
        **{name: getattr(row, name) for name in same},
    )


def spaced(text: str) -> list[str]:
    """The lines with one blank wherever a table has many."""
    return [" ".join(line.split()) for line in text.splitlines()]


async def test_the_help_of_a_replay_names_what_records_a_trace(run: Run) -> None:
    assert "what trace.path recorded" in " ".join((await run("report", "--help")).stdout.replace("│", "").split())


async def test_report_prints_hit_rates_money_and_times(run: Run) -> None:
    result = await run(*PERIOD)
    assert result.exit_code == 0, result.output
    lines = spaced(result.stdout)
    assert lines[0] == "2026-05-01 00:00 to 2026-05-04 00:00 UTC, all namespaces (3)"
    assert "namespace answered hit rate memory s3 collapsed misses not paid" in lines
    assert "tiny 6 0.0 % 0.0 % 0.0 % 0 6 0.0 %" in lines
    assert "memory 408 0.5 ms ≤ 1 ms ≤ 1 ms ≤ 1 ms" in lines
    assert any(line.startswith(("hit rate ▇", "hit rate █")) for line in lines)


async def test_report_asks_once_for_all_its_figures(run: Run, service: Service) -> None:
    await run(*PERIOD, "--namespace", "shop", "--by", "quality,caller")
    [asked] = service.asked
    assert (asked.namespace, asked.span) == ("shop", pb.STATS_SPAN_HOUR)
    assert (asked.since.ToDatetime(UTC), asked.until.ToDatetime(UTC)) == (SINCE, SINCE + timedelta(days=DAYS))
    assert list(asked.by) == [
        pb.STATS_FIELD_NAMESPACE,
        pb.STATS_FIELD_MODEL,
        pb.STATS_FIELD_QUALITY,
        pb.STATS_FIELD_OUTCOME,
        pb.STATS_FIELD_TIER,
        pb.STATS_FIELD_CALLER,
    ]


async def test_report_begins_with_a_whole_hour(run: Run, service: Service) -> None:
    await run("--since", "2026-05-01T10:40", "--until", "2026-05-09")
    assert service.asked[0].since.ToDatetime(UTC) == datetime(2026, 5, 1, 10, tzinfo=UTC)
    assert service.asked[0].span == pb.STATS_SPAN_DAY


async def test_report_as_json_is_one_object(run: Run) -> None:
    facts = printed(await run(*PERIOD, "--json", "--by", "outcome,tier"))
    total = some_report().total
    assert facts["total"]["spent_microusd"] == total.spent_microusd
    assert {(group["outcome"], group["tier"]) for group in facts["groups"]} >= {("hit", "memory"), ("error", "")}


async def test_report_as_csv_has_a_row_per_group(run: Run, tmp_path: Path) -> None:
    result = await run(*PERIOD, "--csv", "-", "--by", "quality")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert {row["quality"] for row in rows} == {"low", "high"}
    assert sum(int(row["saved_microusd"]) for row in rows) == some_report().total.saved_microusd
    await run(*PERIOD, "--csv", str(tmp_path / "report.csv"), "--by", "quality")
    assert (tmp_path / "report.csv").read_text(encoding="utf-8") == result.stdout


async def test_report_compares_with_the_span_before(run: Run, service: Service) -> None:
    result = await run(*PERIOD, "--compare", "previous")
    assert "requests" in result.stdout.split("Compared")[1]
    then = service.asked[1]
    assert (then.since.ToDatetime(UTC), then.until.ToDatetime(UTC)) == (SINCE - timedelta(days=DAYS), SINCE)


async def test_report_compares_periods_of_one_length_also_up_to_now(run: Run, service: Service) -> None:
    await run("--since", "7d", "--compare", "previous")
    lengths = {each.until.ToDatetime() - each.since.ToDatetime() for each in service.asked}
    assert lengths == {timedelta(days=7)}


async def test_report_compares_with_a_period_that_is_named(run: Run, service: Service) -> None:
    facts = printed(await run(*PERIOD, "--compare", "2026-04-01..2026-04-04", "--json"))
    assert facts["compared"]["since"] == "2026-04-01T00:00:00+00:00"
    assert service.asked[1].since.ToDatetime(UTC) == datetime(2026, 4, 1, tzinfo=UTC)


async def test_report_writes_a_picture_and_a_page(run: Run, tmp_path: Path) -> None:
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps(REPLAY))
    files = {"--png": tmp_path / "report.png", "--html": tmp_path / "report.html", "--what-if": sizes}
    options = [str(each) for pair in files.items() for each in pair]
    result = await run(*PERIOD, *options, "--compare", "previous")
    assert result.exit_code == 0, result.output
    assert files["--png"].read_bytes().startswith(b"\x89PNG")
    text = files["--html"].read_text(encoding="utf-8")
    assert "window.vegaEmbed" in text
    assert "(+5.6 points)" in text
    assert "List prices are from the price table of" in text, "nobody asked for medium quality"


async def test_report_without_the_extra_says_what_to_install_and_the_rest_works(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.delitem(sys.modules, "cacheserver.reports.charts")
    monkeypatch.delattr("cacheserver.reports.charts")
    result = await run(*PERIOD, "--html", str(tmp_path / "report.html"))
    assert (result.exit_code, result.stderr) == (1, "charts need more packages: pip install 'cacheserver[report]'\n")
    assert (await run(*PERIOD, "--csv", str(tmp_path / "report.csv"))).exit_code == 0
    assert (await run(*PERIOD, "--json")).exit_code == 0


@dataclass
class Recorded(AdminServiceServicer):
    """Tells recorded prompts, or fails."""

    answer: admin_pb.ListPromptsResponse | Fail
    asked: list[admin_pb.ListPromptsRequest] = field(default_factory=list)

    async def ListPrompts(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802 - gRPC's name
        self.asked.append(request)
        if isinstance(self.answer, Fail):
            await self.answer.abort(context)
        return self.answer


async def page_of(service: Service, admin: Recorded | None, file: Path, *options: str) -> str:
    """The page that the command writes with both services behind one port."""
    server = grpc.aio.server()
    pb_grpc.add_PromptCacheServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call] # generated
    if admin is not None:
        add_AdminServiceServicer_to_server(admin, server)  # type: ignore[no-untyped-call] # generated
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        result = await command("report", *PERIOD, "--html", str(file), *options, address=f"127.0.0.1:{port}")
    finally:
        await server.stop(grace=0)
    assert result.exit_code == 0, result.output
    return await asyncio.to_thread(file.read_text, encoding="utf-8")


async def test_the_page_shows_what_the_cache_did_not_have(service: Service, tmp_path: Path) -> None:
    wish = admin_pb.RecordedPrompt(
        request=ask("a <b>red</b> fox", namespace="shop"), kind="PROMPT_KIND_MISSED", count=7.5, last_time=SINCE
    )
    wish.request.spec.quality = "high"
    admin = Recorded(admin_pb.ListPromptsResponse(prompts=[wish]))
    text = await page_of(service, admin, tmp_path / "report.html")
    assert "a &lt;b&gt;red&lt;/b&gt; fox" in text
    assert "<td class=word>high</td><td class=word>missed</td><td>7.5</td><td>2026-05-01 00:00</td>" in text
    [asked] = admin.asked
    assert list(asked.kinds) == [admin_pb.PROMPT_KIND_MISSED, admin_pb.PROMPT_KIND_GENERATED]


@pytest.mark.parametrize(
    ("admin", "reason"),
    [
        (None, "this service records no prompts."),
        (Recorded(Fail(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")), "need the permission admin."),
        (Recorded(Fail(grpc.StatusCode.UNAVAILABLE, "ACCOUNTS_UNAVAILABLE")), "cannot be read now"),
    ],
)
async def test_the_page_says_why_it_has_no_prompts(
    service: Service, tmp_path: Path, admin: Recorded | None, reason: str
) -> None:
    text = await page_of(service, admin, tmp_path / "report.html")
    assert "Left out: " in text
    assert reason in text


async def test_the_page_leaves_prompts_out_where_they_are_not_wanted(service: Service, tmp_path: Path) -> None:
    admin = Recorded(admin_pb.ListPromptsResponse())
    assert "--no-prompts" in await page_of(service, admin, tmp_path / "report.html", "--no-prompts")
    assert not admin.asked


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--by", "colour"), "--by"),
        (("--since", "whenever"), "--since"),
        (("--since", "2026-05-04", "--until", "2026-05-01"), "--since"),
        (("--compare", "before"), "--compare"),
        (("--compare", "2026-05-02..2026-05-01"), "--compare"),
        (("--csv", "-", "--json"), "--json"),
        (("--what-if", "/nowhere/sizes.json"), "--what-if"),
    ],
)
async def test_report_names_the_option_that_is_wrong(run: Run, options: tuple[str, ...], named: str) -> None:
    result = await run(*options)
    assert result.exit_code == 2
    assert named in result.stderr


async def test_report_does_not_take_figures_since_the_start_for_those_of_a_period(run: Run, service: Service) -> None:
    row = pb.StatsRow(namespace="shop", outcome="OUTCOME_HIT", tier="TIER_MEMORY", requests=3)
    service.script = [pb.GetStatsResponse(rows=[row], total=row)]
    result = await run(*PERIOD)
    assert result.exit_code == 1
    assert "older than this command" in result.stderr


async def test_report_of_a_service_that_cannot_read_its_figures_fails(run: Run, service: Service) -> None:
    service.script = [Fail(grpc.StatusCode.UNAVAILABLE, "ACCOUNTS_UNAVAILABLE")] * 4
    result = await run(*PERIOD)
    assert result.exit_code == 1
    assert "ACCOUNTS_UNAVAILABLE" in result.stderr


async def test_report_tells_what_a_running_service_has_counted(tmp_path: Path) -> None:
    async with running(environment(tmp_path)) as service, calling(service) as stub:
        for prompt in ("a red fox", "a red fox", "a red fox", "a blue whale"):
            await stub.GetImage(ask(prompt))
        facts: Any = printed(await command("report", "--since", "1h", "--json", address=service.grpc_address))
    total = facts["total"]
    assert (total["answered"], total["hits"], total["misses"], total["hit_rate"]) == (4, 2, 2, 0.5)
    assert facts["total"]["hits_by_tier"] == {"memory": 2}
    assert sum(point["requests"] for point in facts["series"]) == 4
