"""Alarms: when each kind rings and stops, who is told, and what happens where the receiver does not do its part."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import httpx
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from cacheserver.accounting.books import CounterBooks
from cacheserver.alarms import Alarms, Counts, Figure, Value, Webhook
from cacheserver.app import start
from cacheserver.app.alarms import ServiceReadings
from cacheserver.client import AlarmState as ClientState
from cacheserver.client import AsyncClient
from cacheserver.errors import AccountsUnavailableError, ConfigError
from cacheserver.model import AlarmKind, AlarmRule, MatchLevel, Outcome, TierName, UpstreamHealth
from cacheserver.settings import load_settings
from tests.admin_front import Upstreams, upstream
from tests.fakes import FakeClock
from tests.provider import HttpRequest, OpenAIStandIn, Reply
from tests.running import ask, calling, environment
from tests.servers import ValkeyServer
from tests.test_app_service import HastyClock
from tests.waiting import until

TICK_S = 5.0


@dataclass
class Stand:
    """A service's figures, at the test's command."""

    all: Counts = field(default_factory=Counts)
    shop: Counts = field(default_factory=Counts)
    held_s: float = 0.0
    share: float = 0.0
    open: dict[str, bool] = field(default_factory=lambda: {"redis": False, "s3": False, "north": False})

    def counts(self, namespace: str | None) -> Counts:
        return self.all if namespace is None else self.shop

    def oldest_held_s(self) -> float:
        return self.held_s

    def journal_share(self) -> float:
        return self.share

    def breakers(self) -> Mapping[str, bool]:
        return self.open

    def asked(self, *, hits: int = 0, misses: int = 0, errors: int = 0, microusd: int = 0, similar: int = 0) -> None:
        requests = hits + misses + errors
        self.all = grown(self.all, Counts(requests, hits, hits + misses, errors, microusd, similar))


def grown(counts: Counts, more: Counts) -> Counts:
    return Counts(
        counts.requests + more.requests,
        counts.hits + more.hits,
        counts.judged + more.judged,
        counts.errors + more.errors,
        counts.microusd + more.microusd,
        counts.similar + more.similar,
    )


class Receiver(OpenAIStandIn):
    """Takes notices. `replies` are what the next ones are answered with; None is silence."""

    def __init__(self) -> None:
        super().__init__()
        self.replies: deque[Reply | None] = deque()

    @property
    def notices(self) -> list[dict[str, Any]]:
        return [request.json() for request in self.requests]

    @property
    def url(self) -> str:
        return f"{self.root_url}/hooks/very-secret"

    async def _reply(self, request: HttpRequest) -> Reply | None:
        self.requests.append(request)
        return self.replies.popleft() if self.replies else Reply(204)


class Post:
    """Takes notices in this process."""

    def __init__(self) -> None:
        self.notices: list[dict[str, Any]] = []

    def send(self, notice: dict[str, Any]) -> None:
        self.notices.append(notice)


@pytest.fixture
def stand() -> Stand:
    return Stand()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def books(clock: FakeClock, registry: CollectorRegistry) -> CounterBooks:
    return CounterBooks(clock=clock, registry=registry)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
async def webhook(receiver: Receiver, books: CounterBooks, clock: FakeClock) -> AsyncIterator[Webhook]:
    webhook = Webhook(receiver.url, token="very-secret-token", books=books, clock=clock)
    yield webhook
    await webhook.aclose()


Build = Callable[..., Alarms]


@pytest.fixture
def build(stand: Stand, books: CounterBooks, clock: FakeClock) -> Build:
    def built(*rules: AlarmRule, **options: Any) -> Alarms:
        return Alarms(rules, readings=stand, books=books, clock=clock, replica="r1", host="h1", **options)

    return built


def rule(kind: AlarmKind = AlarmKind.BREAKER_OPEN, threshold: float = 0.0, **options: Any) -> AlarmRule:
    return replace(AlarmRule("a", kind, threshold, window_s=60, for_s=30, min_requests=10), **options)


async def watched(
    alarms: Alarms, clock: FakeClock, seconds: float, meanwhile: Callable[[], None] = lambda: None
) -> list[str]:
    """Look every few seconds for so long; the states of the first alarm, each once as they followed."""
    states = []
    for _ in range(round(seconds / TICK_S)):
        clock.advance(TICK_S)
        meanwhile()
        await alarms.look()
        states.append(str(alarms.states()[0].state))
    return [state for index, state in enumerate(states) if index == 0 or states[index - 1] != state]


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"cacheserver_{name}", labels)


# ---- Every kind rings and stops


@dataclass(frozen=True)
class Case:
    rule: AlarmRule
    bad: Callable[[Stand], None]
    good: Callable[[Stand], None]


def _hold(seconds: float) -> Callable[[Stand], None]:
    return lambda stand: setattr(stand, "held_s", seconds)


def _fill(share: float) -> Callable[[Stand], None]:
    return lambda stand: setattr(stand, "share", share)


def _open(**breakers: bool) -> Callable[[Stand], None]:
    return lambda stand: stand.open.update(breakers)


CASES = [
    Case(
        rule(AlarmKind.HIT_RATE_BELOW, 0.5),
        bad=lambda stand: stand.asked(hits=4, misses=6),
        good=lambda stand: stand.asked(hits=6, misses=4),
    ),
    Case(
        rule(AlarmKind.HIT_RATE_ABOVE, 0.9),
        bad=lambda stand: stand.asked(hits=10),
        good=lambda stand: stand.asked(hits=8, misses=2),
    ),
    Case(
        rule(AlarmKind.SIMILAR_RATE_BELOW, 0.1),
        bad=lambda stand: stand.asked(hits=20, similar=1),
        good=lambda stand: stand.asked(hits=18, misses=2, similar=2),
    ),
    Case(
        rule(AlarmKind.SIMILAR_RATE_ABOVE, 0.3),
        bad=lambda stand: stand.asked(hits=9, misses=1, similar=4),
        good=lambda stand: stand.asked(hits=9, misses=1, similar=3),
    ),
    Case(
        rule(AlarmKind.ERROR_RATE_ABOVE, 0.2),
        bad=lambda stand: stand.asked(misses=7, errors=3),
        good=lambda stand: stand.asked(misses=9, errors=1),
    ),
    Case(  # 20,000 micro-dollars each 5 s are 14.4 dollars an hour
        rule(AlarmKind.SPEND_PER_HOUR_ABOVE, 14),
        bad=lambda stand: stand.asked(misses=1, microusd=20_000),
        good=lambda stand: stand.asked(misses=1, microusd=19_000),
    ),
    Case(rule(AlarmKind.UNSAVED_AGE_ABOVE, 300), bad=_hold(301), good=_hold(300)),
    Case(rule(AlarmKind.JOURNAL_SHARE_ABOVE, 0.5), bad=_fill(0.51), good=_fill(0.5)),
    Case(rule(AlarmKind.BREAKER_OPEN), bad=_open(north=True), good=_open(north=False)),
    Case(rule(AlarmKind.BREAKER_OPEN, target="s3"), bad=_open(s3=True), good=_open(s3=False, redis=True)),
    Case(rule(AlarmKind.BREAKER_OPEN, 1), bad=_open(s3=True, redis=True), good=_open(s3=False)),
]


def test_there_is_a_case_of_every_kind() -> None:
    assert {case.rule.kind for case in CASES} == set(AlarmKind)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule.kind}-{case.rule.target}-{case.rule.threshold:g}")
async def test_every_kind_rings_and_stops_and_its_receiver_is_told_of_both(  # noqa: PLR0917 - fixtures
    case: Case,
    stand: Stand,
    build: Build,
    clock: FakeClock,
    receiver: Receiver,
    webhook: Webhook,
    registry: CollectorRegistry,
) -> None:
    alarms = build(case.rule, notices=webhook)
    assert await watched(alarms, clock, 120, lambda: case.good(stand)) == ["quiet"]
    assert sample(registry, "alarm_ringing", alarm="a") == 0
    states = await watched(alarms, clock, 120, lambda: case.bad(stand))
    assert states[-2:] == ["waiting", "ringing"]
    assert sample(registry, "alarm_ringing", alarm="a") == 1
    assert await watched(alarms, clock, 180, lambda: case.good(stand)) == ["ringing", "quiet"]
    assert sample(registry, "alarm_ringing", alarm="a") == 0
    await until(lambda: len(receiver.requests) == 2)
    rang, recovered = receiver.notices
    assert (rang["state"], recovered["state"]) == ("ringing", "quiet")
    for notice in (rang, recovered):
        assert (notice["alarm"], notice["kind"], notice["threshold"]) == ("a", case.rule.kind, case.rule.threshold)
    assert case.rule.is_beyond(rang["value"])
    assert not case.rule.is_beyond(recovered["value"])
    await until(lambda: sample(registry, "alarm_notices_total", result="delivered") == 2)


# ---- When it rings


async def test_an_alarm_rings_once_its_figure_has_been_bad_for_so_long(
    stand: Stand, build: Build, clock: FakeClock
) -> None:
    alarms = build(rule())
    stand.open["s3"] = True
    assert await watched(alarms, clock, 30) == ["waiting"]
    assert await watched(alarms, clock, 5) == ["ringing"]


async def test_a_moment_out_of_bounds_rings_nothing(stand: Stand, build: Build, clock: FakeClock) -> None:
    post = Post()
    alarms = build(rule(), notices=post)
    for _ in range(5):
        stand.open["s3"] = True
        assert await watched(alarms, clock, 25) == ["waiting"]
        stand.open["s3"] = False
        assert await watched(alarms, clock, 5) == ["quiet"]
    assert post.notices == []


async def test_a_figure_that_comes_and_goes_rings_once(stand: Stand, build: Build, clock: FakeClock) -> None:
    post = Post()
    alarms = build(rule(for_s=0), notices=post)
    for _ in range(20):
        stand.open["s3"] = True
        await watched(alarms, clock, 5)
        stand.open["s3"] = False
        await watched(alarms, clock, 55)
    assert [notice["state"] for notice in post.notices] == ["ringing"]
    await watched(alarms, clock, 60)
    assert [notice["state"] for notice in post.notices] == ["ringing", "quiet"]


async def test_without_for_s_it_rings_at_the_first_look(stand: Stand, build: Build, clock: FakeClock) -> None:
    stand.open["s3"] = True
    assert await watched(build(rule(for_s=0)), clock, 5) == ["ringing"]


async def test_of_few_requests_a_rate_is_not_judged(stand: Stand, build: Build, clock: FakeClock) -> None:
    alarms = build(rule(AlarmKind.ERROR_RATE_ABOVE, 0.2, min_requests=100))
    assert await watched(alarms, clock, 40, lambda: stand.asked(errors=10)) == ["quiet"]
    assert alarms.states()[0].value is None
    assert await watched(alarms, clock, 40, lambda: stand.asked(errors=50)) == ["waiting", "ringing"]


async def test_a_rate_is_that_of_the_window_and_not_of_the_whole_life(
    stand: Stand, build: Build, clock: FakeClock
) -> None:
    alarms = build(rule(AlarmKind.HIT_RATE_BELOW, 0.5))
    await watched(alarms, clock, 600, lambda: stand.asked(hits=100))
    await watched(alarms, clock, 60, lambda: stand.asked(hits=3, misses=7))
    assert alarms.states()[0].value == pytest.approx(0.3)


async def test_a_namespaces_rate_is_its_own(stand: Stand, build: Build, clock: FakeClock) -> None:
    alarms = build(rule(AlarmKind.ERROR_RATE_ABOVE, 0.2, namespace="shop"))

    def shop_fails() -> None:
        stand.asked(hits=1_000)
        stand.shop = grown(stand.shop, Counts(requests=10, errors=5))

    assert await watched(alarms, clock, 60, shop_fails) == ["waiting", "ringing"]
    assert alarms.states()[0].value == 0.5


async def test_the_windows_memory_is_bounded(stand: Stand, clock: FakeClock) -> None:
    figure = Figure(rule(AlarmKind.ERROR_RATE_ABOVE, window_s=86_400), readings=stand, clock=clock)
    for _ in range(40_000):
        clock.advance(TICK_S)
        await figure.value()
    assert len(figure._window._samples) <= 63


async def test_those_that_ring_are_listed_first(stand: Stand, build: Build, clock: FakeClock) -> None:
    alarms = build(
        rule(AlarmKind.UNSAVED_AGE_ABOVE, 9, name="quiet"),
        rule(name="waiting", for_s=60),
        rule(name="ringing", for_s=0),
    )
    stand.open["s3"] = True
    await watched(alarms, clock, 5)
    assert [(alarm.rule.name, str(alarm.state)) for alarm in alarms.states()] == [
        ("ringing", "ringing"),
        ("waiting", "waiting"),
        ("quiet", "quiet"),
    ]


# ---- Spending


class AllReplicas:
    """The spending of all replicas, at the test's command."""

    def __init__(self) -> None:
        self.microusd: int | None = 3_000_000
        self.asked: list[tuple[float, str | None]] = []

    async def spent_microusd(self, *, since_s: float, namespace: str | None) -> int:
        self.asked.append((since_s, namespace))
        if self.microusd is None:
            raise AccountsUnavailableError("Redis does not answer.")
        return self.microusd


async def test_spending_is_that_of_all_replicas_where_it_can_be_told_else_this_ones(
    stand: Stand, clock: FakeClock
) -> None:
    shared = AllReplicas()
    spending = rule(AlarmKind.SPEND_PER_HOUR_ABOVE, 20, window_s=600, namespace="shop")
    figure = Figure(spending, readings=stand, clock=clock, shared=shared)
    assert await figure.value() == Value(18.0, is_of_all=True)
    assert shared.asked == [(clock.now_s() - 600, "shop")]
    shared.microusd = None
    clock.advance(30)
    stand.shop = Counts(microusd=1_000_000)
    assert await figure.value() == Value(6.0, is_of_all=False)
    assert len(shared.asked) == 2


async def test_the_spending_of_all_replicas_is_asked_for_from_a_whole_minute_on(stand: Stand, clock: FakeClock) -> None:
    shared = AllReplicas()
    figure = Figure(rule(AlarmKind.SPEND_PER_HOUR_ABOVE, 20, window_s=600), readings=stand, clock=clock, shared=shared)
    clock.advance(45)
    assert await figure.value() == Value(pytest.approx(3 * 3_600 / 645), is_of_all=True)
    assert shared.asked == [(clock.now_s() - 645, None)]


async def test_the_spending_of_all_replicas_is_asked_for_now_and_then(stand: Stand, clock: FakeClock) -> None:
    shared = AllReplicas()
    figure = Figure(rule(AlarmKind.SPEND_PER_HOUR_ABOVE, 20), readings=stand, clock=clock, shared=shared)
    for _ in range(12):
        assert (await figure.value()).is_of_all
        clock.advance(TICK_S)
    assert len(shared.asked) == 2


async def test_a_young_process_does_not_make_an_hour_of_its_first_second(stand: Stand, clock: FakeClock) -> None:
    figure = Figure(rule(AlarmKind.SPEND_PER_HOUR_ABOVE, 20, window_s=3_600), readings=stand, clock=clock)
    clock.advance(1)
    stand.asked(misses=1, microusd=1_000_000)
    assert await figure.value() == Value(1.0)


# ---- What is told


async def test_a_notice_says_what_rings_where_and_what_to_do(
    stand: Stand, build: Build, clock: FakeClock, receiver: Receiver, webhook: Webhook
) -> None:
    spending = rule(AlarmKind.SPEND_PER_HOUR_ABOVE, 10, for_s=0, namespace="shop", runbook_url="https://wiki/dear")
    alarms = build(spending, notices=webhook)
    stand.shop = Counts(microusd=1_000_000)
    await watched(alarms, clock, 5)
    await until(lambda: len(receiver.requests) == 1)
    (request,) = receiver.requests
    assert request.json() == {
        "alarm": "a",
        "kind": "spend_per_hour_above",
        "state": "ringing",
        "value": 60.0,
        "threshold": 10,
        "since": "2027-01-15T08:00:05+00:00",
        "namespace": "shop",
        "target": None,
        "scope": "this replica",
        "runbook_url": "https://wiki/dear",
        "replica": "r1",
        "host": "h1",
        "text": "cacheserver: a rings: spend_per_hour_above 10 dollars an hour, and it is 60 dollars an hour",
    }
    assert request.headers["authorization"] == "Bearer very-secret-token"
    assert request.headers["content-type"] == "application/json"


async def test_every_change_is_logged_and_only_ringing_and_its_end_are_sent(
    stand: Stand, build: Build, clock: FakeClock
) -> None:
    post = Post()
    alarms = build(rule(), notices=post)
    with capture_logs() as events:
        stand.open["s3"] = True
        await watched(alarms, clock, 60)
        stand.open["s3"] = False
        await watched(alarms, clock, 90)
    assert [(event["event"], event["log_level"]) for event in events] == [
        ("alarm_waiting", "info"),
        ("alarm_ringing", "warning"),
        ("alarm_quiet", "info"),
    ]
    assert [notice["state"] for notice in post.notices] == ["ringing", "quiet"]


# ---- The receiver


def notice(name: str = "a") -> dict[str, Any]:
    return {"alarm": name, "state": "ringing"}


async def pauses(clock: FakeClock, *seconds: float) -> None:
    """Let each back-off begin, and be over."""
    for each in seconds:
        await until(lambda: clock.sleepers == 1)
        clock.advance(each)


async def test_a_receiver_that_fails_is_tried_again_with_longer_pauses(
    receiver: Receiver, webhook: Webhook, clock: FakeClock, registry: CollectorRegistry
) -> None:
    receiver.replies.extend([Reply(500), Reply(429), Reply(503)])
    webhook.send(notice())
    await pauses(clock, 1, 5, 25)
    await until(lambda: sample(registry, "alarm_notices_total", result="delivered") == 1)
    assert receiver.notices == [notice()] * 4


async def test_a_receiver_that_goes_on_failing_is_given_up_and_the_next_notice_tried(
    receiver: Receiver, webhook: Webhook, clock: FakeClock, registry: CollectorRegistry
) -> None:
    receiver.replies.extend([Reply(500)] * 4)
    with capture_logs() as events:
        webhook.send(notice("a"))
        webhook.send(notice("b"))
        await pauses(clock, 1, 5, 25)
        await until(lambda: sample(registry, "alarm_notices_total", result="delivered") == 1)
    assert sample(registry, "alarm_notices_total", result="failed") == 1
    assert receiver.notices[-1] == notice("b")
    (event,) = events
    assert event == {
        "event": "alarm_not_delivered",
        "log_level": "error",
        "alarm": "a",
        "receiver": receiver.root_url,
        "error": "it answered 500",
    }


@pytest.mark.parametrize("status", [301, 400, 401, 404])
async def test_a_receiver_that_does_not_want_it_is_not_asked_again(
    status: int, receiver: Receiver, webhook: Webhook, registry: CollectorRegistry
) -> None:
    receiver.replies.append(Reply(status, headers={"location": receiver.url}))
    webhook.send(notice())
    await until(lambda: sample(registry, "alarm_notices_total", result="failed") == 1)
    assert len(receiver.requests) == 1


async def test_a_slow_receiver_is_left_after_its_time(
    receiver: Receiver, books: CounterBooks, clock: FakeClock, registry: CollectorRegistry
) -> None:
    webhook = Webhook(receiver.url, books=books, clock=clock, timeout_s=1.0)
    receiver.replies.append(None)
    with capture_logs() as events:
        webhook.send(notice())
        await pauses(clock, 1)
        await until(lambda: sample(registry, "alarm_notices_total", result="delivered") == 1)
    await webhook.aclose()
    assert len(receiver.requests) == 2
    assert events == []


async def test_a_receiver_that_is_down_costs_nothing_but_a_line(
    books: CounterBooks, clock: FakeClock, registry: CollectorRegistry
) -> None:
    async with Receiver() as receiver:
        url = receiver.url
    webhook = Webhook(url, token="very-secret-token", books=books, clock=clock)
    with capture_logs() as events:
        webhook.send(notice())
        await pauses(clock, 1, 5, 25)
        await until(lambda: sample(registry, "alarm_notices_total", result="failed") == 1)
    await webhook.aclose()
    assert [event["error"] for event in events] == ["ConnectError"]
    assert "secret" not in json.dumps(events)


async def test_at_most_so_many_go_out_in_an_hour(
    receiver: Receiver, books: CounterBooks, clock: FakeClock, registry: CollectorRegistry
) -> None:
    webhook = Webhook(receiver.url, books=books, clock=clock, max_per_hour=3)
    with capture_logs() as events:
        for number in range(5):
            webhook.send(notice(str(number)))
    clock.advance(3_600)
    webhook.send(notice("later"))
    await until(lambda: sample(registry, "alarm_notices_total", result="delivered") == 4)
    await webhook.aclose()
    assert [each["alarm"] for each in receiver.notices] == ["0", "1", "2", "later"]
    assert [event["alarm"] for event in events] == ["3", "4"]
    assert sample(registry, "alarm_notices_total", result="dropped") == 2


async def test_notices_that_pile_up_are_dropped_oldest_first(
    receiver: Receiver, books: CounterBooks, clock: FakeClock, registry: CollectorRegistry
) -> None:
    webhook = Webhook(receiver.url, books=books, clock=clock, max_per_hour=1_000)
    receiver.replies.append(Reply(500))
    with capture_logs():
        for number in range(103):
            webhook.send(notice(str(number)))
        await pauses(clock, 1)
        await until(lambda: sample(registry, "alarm_notices_total", result="delivered") == 100)
    await webhook.aclose()
    assert sample(registry, "alarm_notices_total", result="dropped") == 3
    assert [each["alarm"] for each in receiver.notices] == ["0", "0", *map(str, range(4, 103))]


async def test_at_shutdown_what_waits_has_a_moment_and_is_told_of_if_that_is_too_short(
    receiver: Receiver,
    books: CounterBooks,
    clock: FakeClock,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    webhook = Webhook(receiver.url, books=books, clock=clock)
    webhook.send(notice("in time"))
    await webhook.aclose()
    assert sample(registry, "alarm_notices_total", result="delivered") == 1
    monkeypatch.setattr("cacheserver.alarms.webhook._CLOSING_S", 0.0)
    webhook = Webhook(receiver.url, books=books, clock=clock)
    receiver.replies.append(None)
    with capture_logs() as events:
        webhook.send(notice("too late"))
        await until(lambda: len(receiver.requests) == 2)
        await webhook.aclose()
    assert [event["error"] for event in events] == ["dropped: the service is shutting down"]


def test_what_is_no_url_is_a_config_error(books: CounterBooks, clock: FakeClock) -> None:
    with pytest.raises(ConfigError, match=r"alerting\.webhook_url: is no URL"):
        Webhook("http://[::1", books=books, clock=clock)


# ---- In a service


class DreamingClock(HastyClock):
    """Real time whose pauses are short; once it dreams they count as if they had been as long as asked for."""

    def __init__(self) -> None:
        self.dreams = False
        self.dreamt_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.dreamt_s

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds)
        self.dreamt_s += seconds * self.dreams


CONFIG = """
[alerting]
webhook_url = "{url}"
min_requests = 1

[[alarms]]
name = "errors"
kind = "error_rate_above"
threshold = 0.2
for_s = 0
"""


SPENDING = """
[alerting]
webhook_url = "{url}"
built_in = false

[[alarms]]
name = "dear"
kind = "spend_per_hour_above"
window_s = 3600
for_s = 0
"""


async def test_each_replica_tells_what_all_have_spent_together(
    tmp_path: Path, receiver: Receiver, valkey_server: ValkeyServer
) -> None:
    clock, services = DreamingClock(), []
    async with OpenAIStandIn() as provider:
        try:
            for name in ("one", "two"):
                (tmp_path / name).mkdir()
                file = tmp_path / name / "cacheserver.toml"
                file.write_text(SPENDING.format(url=receiver.url))
                env = environment(tmp_path / name, provider=provider, redis=valkey_server)
                env["CACHESERVER_REDIS__PREFIX"] = f"{tmp_path.name}:"
                services.append(await start(load_settings(file, env), clock=clock))
            async with calling(services[0]) as stub:
                await stub.GetImage(ask("a red fox"))
            clock.dreams = True
            await until(lambda: len({notice["replica"] for notice in receiver.notices}) == 2)
        finally:
            for service in services:
                await service.stop()
    rung = {notice["replica"]: notice for notice in receiver.notices}
    assert {notice["scope"] for notice in rung.values()} == {"all replicas"}
    # One of them paid for nothing. What an hour's worth is differs with when each looked: they dream of hours.
    assert all(notice["value"] > 0 for notice in rung.values())


async def test_a_redis_that_is_gone_rings_for_its_breaker(
    tmp_path: Path, receiver: Receiver, own_valkey: Callable[[], ValkeyServer]
) -> None:
    redis = own_valkey()
    file = tmp_path / "cacheserver.toml"
    breaker = '[[alarms]]\nname = "breakers"\nkind = "breaker_open"\ntarget = "redis"\nfor_s = 0'
    file.write_text(f'[alerting]\nwebhook_url = "{receiver.url}"\n{breaker}')
    async with OpenAIStandIn() as provider:
        env = environment(tmp_path, provider=provider, redis=redis)
        service = await start(load_settings(file, env), clock=HastyClock())
        try:
            redis.kill()
            async with calling(service) as stub:
                for number in range(3):
                    await stub.GetImage(ask(f"fox {number}"))
            await until(lambda: len(receiver.requests) == 1)
        finally:
            await service.stop()
    (notice,) = receiver.notices
    assert (notice["alarm"], notice["state"], notice["value"]) == ("breakers", "ringing", 1.0)


def test_an_upstream_that_an_operator_took_out_is_no_open_breaker(books: CounterBooks) -> None:
    states = [upstream(health.value, health=health) for health in UpstreamHealth]
    readings = ServiceReadings(
        books=books,
        journal=None,
        keeper=cast("Any", None),
        tiers=[],
        miss_path=cast("Any", SimpleNamespace(pool=Upstreams(states))),
    )
    assert readings.breakers() == {
        "well": False,
        "paused": False,
        "down": True,
        "not_entitled": True,
        "no_quota": True,
    }


def test_what_is_derived_counts_as_the_miss_it_would_have_been(books: CounterBooks) -> None:
    readings = ServiceReadings(
        books=books, journal=None, keeper=cast("Any", None), tiers=[], miss_path=cast("Any", None)
    )
    for outcome in (Outcome.HIT, Outcome.MISS, Outcome.DERIVED):
        books.answered("shop", outcome, TierName.MEMORY, seconds=0.01, saved_microusd=1)
    counts = readings.counts("shop")
    assert (counts.requests, counts.hits, counts.judged, counts.errors) == (3, 1, 3, 0)


def test_similar_hits_are_counted_by_namespace(books: CounterBooks) -> None:
    readings = ServiceReadings(
        books=books, journal=None, keeper=cast("Any", None), tiers=[], miss_path=cast("Any", None)
    )
    for namespace, level in (
        ("shop", MatchLevel.CANONICAL),
        ("shop", MatchLevel.SEMANTIC),
        ("blog", MatchLevel.SEMANTIC),
    ):
        books.similar_hit(namespace, level)
    assert [readings.counts(name).similar for name in ("shop", "blog", "other", None)] == [2, 1, 0, 3]


async def test_an_alarm_of_a_running_service_rings_is_listed_and_ends(tmp_path: Path, receiver: Receiver) -> None:
    file = tmp_path / "cacheserver.toml"
    file.write_text(CONFIG.format(url=receiver.url))
    clock = DreamingClock()
    async with OpenAIStandIn() as provider:
        service = await start(load_settings(file, environment(tmp_path, provider=provider)), clock=clock)
        try:
            async with calling(service) as stub, AsyncClient(service.grpc_address) as client:
                provider.fail_next(400, "moderation_blocked")
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.GetImage(ask("a red fox"))
                await until(lambda: len(receiver.requests) == 1)
                first, *others = await client.admin.list_alarms()
                assert (first.name, first.state, first.value) == ("errors", ClientState.RINGING, 1.0)
                assert first.runbook_url.endswith("RUNBOOK.md#cacheservererrorrateabove")
                assert [(each.name, each.state) for each in others] == [
                    ("breakers", ClientState.QUIET),
                    ("unsaved", ClientState.QUIET),
                    ("journal", ClientState.QUIET),
                ]
                async with httpx.AsyncClient() as http:
                    metrics = (await http.get(f"http://{service.http_address}/metrics")).text
                assert 'cacheserver_alarm_ringing{alarm="errors"} 1.0' in metrics
                clock.dreams = True
                await until(lambda: len(receiver.requests) == 2)
        finally:
            await service.stop()
    assert [notice["state"] for notice in receiver.notices] == ["ringing", "quiet"]
    assert len({notice["replica"] for notice in receiver.notices}) == 1
