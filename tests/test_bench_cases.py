"""The benches of whole cases: their arithmetic is right, and a figure that falls short is named."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from random import Random
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench import catalogue, peak
from scripts.bench.cases import Answer, Bills, Deployments, Stage
from scripts.bench.catalogue import MIX, PRODUCTS, batch, computed, list_usd, paid_microusd, rate_per_minute, request_of
from scripts.bench.peak import PLACES, Planned, expect, plan, requests_of, simulate, standard_capacity
from scripts.bench.provider_config import Latency
from scripts.bench.provider_ledger import Call

BILLS = Bills(
    calls=900,
    booked_calls=900,
    billed_microusd=21_000_000,
    spent_microusd=21_000_000,
    unknown_microusd=0,
    refused_by_limit=0,
    duplicates=0,
)


def call(name: str, **fields: Any) -> Call:
    known: dict[str, Any] = {"model": "gpt-image-2", "size": "1024x1024", "quality": "medium", "n": 1, "images": 1}
    known |= {"request_id": name, "prompt_sha256": name, "key": "sk-0", "billed_microusd": 50_000}
    known |= {"status": 200, "fault": "", "limited": False, "hung_up": False}
    known |= {"at_s": 10.0, "started_s": 10.0, "ended_s": 18.0}
    return Call(**(known | fields))


def answer(due_s: float, seconds: float, call_id: str = "", **fields: Any) -> Answer:
    known: dict[str, Any] = {"number": 0, "tier": pb.TIER_UPSTREAM, "call_id": call_id}
    return Answer(due_s=due_s, sent_s=due_s, end_s=due_s + seconds, **(known | fields))


def rng() -> Random:
    return Random(1)  # noqa: S311 - schedules and latencies


def stats(spent_microusd: int, calls: int) -> pb.GetStatsResponse:
    return pb.GetStatsResponse(total=pb.StatsRow(spent_microusd=spent_microusd), upstream_calls=calls)


# ── what both share ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_service_is_told_the_emulators_limits_in_real_minutes() -> None:
    parts = Deployments(count=2, concurrent=30, latency=Latency(), images_per_minute=150, price_factor=Decimal("0.6"))
    emulated = parts.emulated(compression=4, seed=1)
    told = tomllib.loads(parts.settings("http://127.0.0.1:1/v1", compression=4))
    assert [each["name"] for each in told["upstreams"]] == ["deployment-0", "deployment-1"]
    assert told["limit_groups"]["deployment-1"] == {"concurrent": 30, "burst_s": 0.25, "images_per_minute": 600}
    assert (emulated.groups["org-1"].images_per_minute, emulated.groups["org-1"].concurrent) == (150, 30)


def test_the_relay_bills_its_share_of_the_list_price() -> None:
    def bill(factor: str) -> int:
        parts = Deployments(count=1, concurrent=1, latency=Latency(), price_factor=Decimal(factor))
        price = parts.emulated(compression=1, seed=1).models["gpt-image-2"]
        return price.bill_microusd(prompt="a red fox", size="1024x1024", quality="high", n=1)

    assert bill("1") == 210_735
    assert bill("0.6") == bill("1") * 6 // 10


class StubOf:
    """A generated client that answers each call as `answers` says."""

    def __init__(self, answers: Sequence[pb.GetImageResponse | grpc.StatusCode]) -> None:
        self._answers = iter(answers)

    async def GetImage(self, _: pb.GetImageRequest, timeout: float) -> pb.GetImageResponse:  # noqa: ASYNC109, N802 - the generated client's
        assert timeout > 0
        answer = next(self._answers)
        if isinstance(answer, grpc.StatusCode):
            raise grpc.aio.AioRpcError(answer, grpc.aio.Metadata(), grpc.aio.Metadata())
        return answer


async def test_a_picture_counts_as_an_answer_and_pending_or_an_error_do_not() -> None:
    picture = pb.Image(data=b"png", upstream_request_id="a")
    answers: list[pb.GetImageResponse | grpc.StatusCode] = [
        pb.GetImageResponse(images=[picture], status=pb.CacheStatus(tier=pb.TIER_MEMORY, degraded=True)),
        pb.GetImageResponse(images=[pb.Image(key="k")], status=pb.CacheStatus(state=pb.STATE_PENDING)),
        grpc.StatusCode.UNAVAILABLE,
    ]
    provider: Any = SimpleNamespace(now_s=100.0)
    stage = Stage(provider, [StubOf(answers)], compression=1e6)
    given = await stage.ask_on_time([pb.GetImageRequest()] * 3, [0.5, 1.0, 2.0])
    assert [each.failure for each in given] == ["", "STATE_PENDING", "UNAVAILABLE"]
    assert [each.due_s for each in given] == [100.5, 101.0, 102.0]
    assert (given[0].call_id, given[0].is_hit, given[0].degraded) == ("a", True, True)
    assert not any(each.is_hit for each in given[1:])


def test_a_wait_before_start_is_that_of_the_call_which_made_the_picture() -> None:
    calls = {"a": call("a", started_s=10.0), "refused": call("refused", started_s=None)}
    assert answer(9.5, 9, "a").start_wait_s(calls) == pytest.approx(0.5)
    assert answer(12.0, 6, "a").start_wait_s(calls) is None, "it ran already"
    assert answer(9.5, 9, "b").start_wait_s(calls) is None
    assert answer(9.5, 9, "refused").start_wait_s(calls) is None
    assert answer(9.5, 9, "a", failure="UNAVAILABLE").start_wait_s(calls) is None


def test_both_sides_bills_are_compared_and_a_picture_paid_for_twice_is_found() -> None:
    calls = [call("a"), call("b", prompt_sha256="a"), call("c", prompt_sha256="a", quality="low")]
    bills = Bills.of([*calls, call("d", billed_microusd=0, limited=True)], stats(150_000, 1))
    assert (bills.calls, bills.billed_microusd, bills.refused_by_limit, bills.duplicates) == (4, 150_000, 1, 1)
    assert bills.shortfalls() == [
        "the provider had 4 calls, the service booked 1",
        "1 pictures were paid for twice",
    ]


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ({"spent_microusd": 20_999_999}, "the provider billed 21000000 microdollars, the service booked 20999999"),
        ({"booked_calls": 899}, "the provider had 900 calls, the service booked 899"),
        ({"unknown_microusd": 1}, "1 microdollars may have been paid"),
        ({"duplicates": 2}, "2 pictures were paid for twice"),
    ],
)
def test_each_shortfall_of_the_bills_is_named(spoiled: dict[str, Any], named: str) -> None:
    assert BILLS.shortfalls() == []
    assert replace(BILLS, **spoiled).shortfalls() == [named]


# ── the peak ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_schedule_is_that_of_the_case_and_the_same_for_the_same_seed() -> None:
    planned = plan(60, rng())
    assert len(planned) == pytest.approx(200 * 60, rel=0.03)
    assert len({each.picture for each in planned}) / len(planned) == pytest.approx(0.69, abs=0.02)
    assert sum(each.is_vip for each in planned) / len(planned) == pytest.approx(0.1, abs=0.01)
    assert planned == plan(60, rng())
    assert planned == sorted(planned, key=lambda each: each.due_s)


def test_only_vips_of_the_degraded_run_are_in_a_hurry() -> None:
    planned = [Planned(0.0, 0, is_vip=True), Planned(1.0, 1, is_vip=False)]
    vip, standard = requests_of(planned, degraded=True, compression=5)
    assert (vip.priority, vip.allow_degraded, vip.max_wait.ToSeconds()) == (pb.PRIORITY_INTERACTIVE, True, 1)
    assert (standard.priority, standard.allow_degraded) == (pb.PRIORITY_STANDARD, False)
    assert not standard.HasField("max_wait")
    assert not any(each.HasField("max_wait") for each in requests_of(planned, degraded=False, compression=5))


def together(*, standard: int, vips: int) -> list[Planned]:
    count = standard + vips
    return [Planned(0.0, number, is_vip=number >= standard) for number in range(count)]


def test_vips_have_the_places_kept_and_others_wait_for_the_rest() -> None:
    waits = simulate(together(standard=PLACES, vips=2), kept=2, rng=rng())
    assert waits.vip_s == [0.0, 0.0]
    assert sorted(waits.standard_s)[: PLACES - 2] == [0.0] * (PLACES - 2)
    assert all(4.0 <= wait_s <= 12.0 for wait_s in sorted(waits.standard_s)[PLACES - 2 :]), (
        "half to one and a half mean"
    )
    assert waits.left == 2


def test_without_places_kept_a_vip_waits_for_the_first_that_comes_free_and_goes_first() -> None:
    waits = simulate(together(standard=PLACES + 5, vips=1), kept=0, rng=rng())
    assert 0.0 < waits.vip_s[0] < min(wait_s for wait_s in waits.standard_s if wait_s > 0) + 1e-9
    assert len(waits.standard_s) == PLACES + 5


def test_who_asks_for_what_is_begun_on_does_not_wait_and_a_vip_hastens_what_waits() -> None:
    busy = together(standard=PLACES + 2, vips=0)
    last = PLACES + 1
    waits = simulate([*busy, Planned(0.1, 0, is_vip=True), Planned(0.2, last, is_vip=True)], kept=0, rng=rng())
    assert len(waits.vip_s) == 1
    later_s = sorted(waits.standard_s)[-2:]
    assert waits.vip_s[0] + 0.2 == pytest.approx(later_s[0]), "the last came before the one ahead of it"


def test_what_standard_callers_can_have_is_the_places_less_the_kept_and_the_vips() -> None:
    all_places = PLACES * 60 / 8
    vips = 13.8
    assert standard_capacity(0) == pytest.approx(all_places - vips)
    assert standard_capacity(1) > 124.2 > standard_capacity(2), "one kept place leaves enough for them, two do not"
    assert standard_capacity(4) == pytest.approx(107, abs=0.5)


def test_more_places_kept_shorten_vips_waits_and_lengthen_the_others() -> None:
    planned = plan(4, rng())
    none, one, four = (expect(planned, share, runs=3) for share in (0.0, 0.05, 0.2))
    assert (none.kept, one.kept, four.kept) == (0, 1, 4)
    assert none.vip_wait_s > peak.SLOT_S > one.vip_wait_s >= four.vip_wait_s
    assert none.standard_wait_s < one.standard_wait_s < four.standard_wait_s


@pytest.fixture
def plain() -> peak.Figures:
    planned = [Planned(0.0, 0, is_vip=True), Planned(1.0, 1, is_vip=False), Planned(2.0, 1, is_vip=False)]
    answers = [
        answer(10.0, 8.2, "a"),
        answer(11.0, 9.0, "b"),
        answer(12.0, 0.1, "warm-up", tier=pb.TIER_MEMORY),
    ]
    calls = [
        call("warm-up", at_s=1.0, started_s=1.0),
        call("a", at_s=10.1, started_s=10.1),
        call("b", at_s=12.5, started_s=12.5),
    ]
    return peak.Run(
        name="plain",
        is_degraded=False,
        planned=planned,
        answers=answers,
        calls=calls,
        stats=stats(150_000, 3),
        compression=5,
    ).figures()


def test_each_kind_of_caller_is_counted_by_itself(plain: peak.Figures) -> None:
    assert (plain.vip.requests, plain.standard.requests, plain.standard.hits) == (1, 2, 1)
    assert plain.vip.waits_s == pytest.approx((0.1, 0.1, 0.1))
    assert plain.standard.waits_s == pytest.approx((1.5, 1.5, 1.5)), "the hit waited for nothing to begin"
    assert plain.vip.slowest_s == pytest.approx(8.2)
    assert plain.billed_microusd == 100_000, "what came before the peak is not of it"
    assert plain.left == 1
    assert plain.shortfalls() == []


@pytest.mark.parametrize(
    ("part", "spoiled", "named"),
    [
        ("standard", {"failures": {"UNAVAILABLE": 2}}, "standard requests were not answered: {'UNAVAILABLE': 2}"),
        ("vip", {"failures": {"INTERNAL": 1}}, "VIPs were not answered: {'INTERNAL': 1}"),
        ("vip", {"waits_s": (0.1, 0.41, 0.5)}, "the p95 of VIPs' waits before start is 0.41 s, above 0.4"),
        ("vip", {"waits_s": (math.nan,) * 3}, "the p95 of VIPs' waits before start is nan s, above 0.4"),
    ],
)
def test_each_shortfall_of_the_plain_run_is_named(
    plain: peak.Figures, part: str, spoiled: dict[str, Any], named: str
) -> None:
    changed: dict[str, Any] = {part: replace(getattr(plain, part), **spoiled)}
    assert replace(plain, **changed).shortfalls() == [f"plain: {named}"]


def test_a_vip_that_has_no_picture_in_time_is_a_shortfall_of_the_degraded_run(plain: peak.Figures) -> None:
    in_time = replace(plain, run="degraded", is_degraded=True, vip=replace(plain.vip, slowest_s=4.9))
    assert in_time.shortfalls() == []
    late = replace(in_time, vip=replace(plain.vip, slowest_s=5.01))
    assert late.shortfalls() == ["degraded: a VIP waited 5.01 s for an answer, above 5"]
    limited = replace(in_time, bills=replace(plain.bills, refused_by_limit=3))
    assert limited.shortfalls() == ["degraded: the provider refused 3 calls"]


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_has_the_mix_and_the_repeats_of_the_case_in_random_order() -> None:
    products = batch(1_000, 23, rng())
    by_quality = {quality: [each for each in products if each.quality == quality] for quality in MIX}
    assert {quality: len(each) for quality, each in by_quality.items()} == {"high": 100, "medium": 300, "low": 600}
    assert [len(set(each)) for each in by_quality.values()] == [77, 231, 462]
    assert products == batch(1_000, 23, rng())
    assert products != sorted(products, key=lambda each: each.quality)
    assert len(set(batch(1_000, 0, rng()))) == 1_000


def test_a_use_and_not_a_quality_is_asked_for() -> None:
    (product,) = {each for each in batch(10, 0, rng()) if each.quality == "high"}
    request = request_of(product)
    assert (request.use, request.spec.quality, request.namespace) == ("detail", "", "shop")
    assert request.priority == pb.PRIORITY_BATCH


def test_each_volume_step_holds_from_its_moment_on() -> None:
    assert paid_microusd(Decimal(1_000_000_000)) == 600_000_000
    first = Decimal(1_000_000_000) / Decimal("0.6")
    assert paid_microusd(first) == pytest.approx(1_000_000_000)
    assert paid_microusd(first + 100) - paid_microusd(first) == pytest.approx(57)
    second = first + Decimal(4_000_000_000) / Decimal("0.57")
    assert paid_microusd(second) == pytest.approx(5_000_000_000)
    assert paid_microusd(second + 100) - paid_microusd(second) == pytest.approx(54)


def test_the_articles_own_prices_give_its_first_figure() -> None:
    split = computed(catalogue.ARTICLE_USD, 0)
    assert split.without == 51_000
    assert split.by_tiering == 51_000 - 10_500


def test_what_is_saved_and_what_is_paid_are_what_it_costs_without() -> None:
    for percent in catalogue.REPEATS:
        split = computed(list_usd(), percent)
        saved = split.by_tiering + split.by_hits + split.by_joining + split.by_relay + split.by_volume
        assert saved + split.paid == pytest.approx(split.without)
        assert split.without == pytest.approx(PRODUCTS * 0.211)


def test_the_rate_is_that_of_the_steady_middle() -> None:
    steady = [i / 30 for i in range(1_000)]
    assert rate_per_minute(steady) == pytest.approx(1_800)
    assert rate_per_minute([*steady[:950], *(40 + i for i in range(50))]) == pytest.approx(1_800)
    assert math.isnan(rate_per_minute([])), "and falls short"


@pytest.fixture
def measured() -> catalogue.Figures:
    high, medium, low = 126_441, 31_653, 3_573  # of 0.6 of the list price, prompts included
    tiered = 100 * high + 300 * medium + 600 * low
    saved = tiered // 10
    return catalogue.Figures(
        repeats_percent=10,
        limit_per_minute=1_800,
        requests=1_000,
        distinct=900,
        failed=0,
        hits=70,
        joined=30,
        saved_microusd=saved,
        joined_microusd=saved * 3 // 10,
        worth_microusd=tiered,
        high_microusd=high,
        bills=replace(BILLS, billed_microusd=tiered - saved, spent_microusd=tiered - saved),
        reached_per_minute=1_764.0,
        cores=1.0,
    )


def test_a_batch_is_scaled_to_a_day_and_agrees_with_the_arithmetic(measured: catalogue.Figures) -> None:
    assert measured.calls_a_day == 270_000
    assert measured.needed_per_minute == pytest.approx(1_125)
    assert measured.hours(1_800) == pytest.approx(2.5)
    by_hand = computed(list_usd(), 10)
    assert measured.split.paid == pytest.approx(by_hand.paid, rel=0.01)
    assert measured.split.by_hits + measured.split.by_joining == pytest.approx(by_hand.by_hits, rel=0.01)
    assert measured.split.without == pytest.approx(by_hand.without, rel=0.01)
    assert measured.shortfalls() == []


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ({"failed": 1}, "1 requests failed"),
        ({"distinct": 899}, "900 calls were made for 899 pictures"),
        ({"worth_microusd": 1}, "spent and saved are 24283800 microdollars, all pictures 1"),
        ({"reached_per_minute": 1_619.0}, "only 1,619 of 1,800 images/min were reached"),
        ({"limit_per_minute": 1_000, "reached_per_minute": 1_000.0}, "4.5 h for a day's products, above 4"),
    ],
)
def test_each_shortfall_of_a_batch_is_named(measured: catalogue.Figures, spoiled: dict[str, Any], named: str) -> None:
    fallen = replace(measured, **spoiled)
    assert fallen.shortfalls() == [f"10 % at {fallen.limit_per_minute:,}/min: {named}"]


def test_a_batch_too_small_for_a_rate_falls_short(measured: catalogue.Figures) -> None:
    assert len(replace(measured, reached_per_minute=math.nan).shortfalls()) == 2


def test_dollars_that_are_not_those_of_the_price_table_are_a_shortfall(measured: catalogue.Figures) -> None:
    fallen = replace(measured, repeats_percent=23)
    assert fallen.shortfalls() == ["23 % at 1,800/min: $5,911 a day, by arithmetic $5,075"]


def test_the_table_of_readme_has_a_line_for_each_share_of_repeats(measured: catalogue.Figures) -> None:
    large = replace(measured, limit_per_minute=5_000, reached_per_minute=4_900.0)
    head, rule, *body = catalogue.markdown_table([measured, replace(measured, repeats_percent=31)], large).splitlines()
    assert head.startswith("| repeats | calls | needed/min | reached/min | hours at 1,800/min | hours at 5,000/min |")
    assert rule == "|:---|" + "---:|" * 12
    assert [line.split("|")[1:7] for line in body] == [
        [" 10 %: assumed ", " 270,000 ", " 1,125 ", " 1,764 ", " 2.6 ", " 0.9 "],
        [" 31 %: its similar prompts in content, if the same ", " 270,000 ", " 1,125 ", " 1,764 ", " 2.6 ", " 0.9 "],
    ]
