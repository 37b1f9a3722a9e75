"""Budgets: of one process by themselves, and of several through a real Redis that is killed, emptied and frozen."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from redis.exceptions import ConnectionError as RedisConnectionError

from cacheserver.accounting.ledger import DaySpending
from cacheserver.control import budget_scripts
from cacheserver.control.accounts import Period
from cacheserver.control.budgets import LocalBudgets, RedisBudgets
from cacheserver.control.replicas import Replicas
from cacheserver.errors import CannotAffordError, LedgerUnavailableError, UnknownUpstreamError
from cacheserver.interfaces import Books, Budgets
from cacheserver.model import Budget, BudgetPeriod, BudgetScope
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.servers import TcpProxy, ValkeyServer
from tests.waiting import until

T = TypeVar("T")

DAY_S = 86_400
PREFIXES = (f"budgets-{n}:" for n in itertools.count())
IDS = ("1" * 16, "2" * 16, "3" * 16)

GLOBAL_DAY = Budget(BudgetScope.GLOBAL, "", BudgetPeriod.DAY, 1_000)
GLOBAL_MONTH = Budget(BudgetScope.GLOBAL, "", BudgetPeriod.MONTH, 5_000)
SHOP_DAY = Budget(BudgetScope.NAMESPACE, "shop", BudgetPeriod.DAY, 400)
WEB_DAY = Budget(BudgetScope.CALLER, "web", BudgetPeriod.DAY, 300)
ALL = (GLOBAL_DAY, GLOBAL_MONTH, SHOP_DAY, WEB_DAY)


class Overruns:
    """The part of `Books` that budgets write in."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def budget_overrun(self, upstream: str, microusd: int) -> None:
        self.told.append((upstream, microusd))


def local(
    clock: FakeClock, budgets: Sequence[Budget] = ALL, *, spent: Sequence[DaySpending] = (), books: Any = None
) -> LocalBudgets:
    return LocalBudgets(budgets=budgets, spent=spent, clock=clock, books=cast("Books", books or Overruns()))


async def reserve(
    budgets: Budgets,
    attempt_id: str,
    microusd: int,
    *,
    namespace: str = "shop",
    caller: str = "web",
    degradable: bool = False,
) -> None:
    await budgets.reserve(attempt_id, namespace=namespace, caller=caller, microusd=microusd, degradable=degradable)


async def fits(budgets: Budgets, attempt_id: str, microusd: int, *, degradable: bool = False) -> bool:
    try:
        await reserve(budgets, attempt_id, microusd, degradable=degradable)
    except CannotAffordError:
        return False
    return True


async def standing(budgets: Budgets) -> dict[str, tuple[int, int]]:
    """Spent and reserved of each budget that is not untouched."""
    states = {state.budget.name: (state.spent_microusd, state.reserved_microusd) for state in await budgets.states()}
    return {name: used for name, used in states.items() if any(used)}


def everywhere(spent: int, reserved: int) -> dict[str, tuple[int, int]]:
    return {budget.name: (spent, reserved) for budget in ALL}


# ---- of one process


@given(st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001 - hypothesis adds the zone
def test_a_moment_lies_in_its_day_and_month_and_the_next_begin_where_they_end(moment: datetime) -> None:
    for kind, form in ((BudgetPeriod.DAY, "%Y-%m-%d"), (BudgetPeriod.MONTH, "%Y-%m")):
        period = Period.at(kind, moment.timestamp())
        assert period.start_s <= moment.timestamp() < period.end_s
        assert period.name == moment.strftime(form)
        assert Period.at(kind, period.end_s).start_s == period.end_s
        assert Period.at(kind, period.start_s) == Period.at(kind, period.end_s - 0.001) == period


async def test_money_is_set_aside_in_every_budget_that_bounds_the_caller(clock: FakeClock) -> None:
    budgets = local(clock)
    await reserve(budgets, "a", 100)
    await reserve(budgets, "b", 50, namespace="shop", caller="batch")
    await reserve(budgets, "c", 7, namespace="blog", caller="batch")
    assert await standing(budgets) == {
        "global/day": (0, 157),
        "global/month": (0, 157),
        "namespace:shop/day": (0, 150),
        "caller:web/day": (0, 100),
    }


async def test_what_it_cost_takes_the_place_of_what_was_set_aside(clock: FakeClock) -> None:
    budgets = local(clock)
    await reserve(budgets, "a", 100)
    await budgets.sent("a")
    await budgets.settle("a", 60, upstream="openai")
    assert await standing(budgets) == everywhere(60, 0)
    assert budgets.month_spend_microusd("openai") == 60
    assert budgets.month_spend_microusd("azure") == 0


async def test_what_was_released_is_free_again(clock: FakeClock) -> None:
    budgets = local(clock)
    await reserve(budgets, "a", 300)
    assert not await fits(budgets, "b", 1)
    await budgets.release("a")
    assert await standing(budgets) == {}
    assert await fits(budgets, "b", 300)


async def test_an_attempt_ends_once(clock: FakeClock) -> None:
    budgets = local(clock)
    await reserve(budgets, "a", 100)
    await budgets.settle("a", 60, upstream="openai")
    await budgets.settle("a", 60, upstream="openai")
    await budgets.release("a")
    await budgets.sent("a")
    assert await standing(budgets) == everywhere(60, 0)
    assert budgets.month_spend_microusd("openai") == 60


async def test_a_refusal_names_the_budget_with_the_least_left_and_sets_nothing_aside(clock: FakeClock) -> None:
    budgets = local(clock)
    with pytest.raises(CannotAffordError) as caught:
        await reserve(budgets, "a", 301)
    assert caught.value.budget == "caller:web/day"
    assert caught.value.reset_time_s == clock.now_s() - clock.now_s() % DAY_S + DAY_S
    assert await standing(budgets) == {}


async def test_of_budgets_with_equally_little_left_the_month_is_named(clock: FakeClock) -> None:
    budgets = local(clock, [GLOBAL_DAY, replace(GLOBAL_MONTH, limit_microusd=GLOBAL_DAY.limit_microusd)])
    with pytest.raises(CannotAffordError) as caught:
        await reserve(budgets, "a", 1_001)
    assert caught.value.budget == "global/month"


async def test_who_accepts_less_is_refused_from_the_share_on(clock: FakeClock) -> None:
    budgets = local(clock, [GLOBAL_DAY])
    assert await fits(budgets, "a", 900, degradable=True)
    assert not await fits(budgets, "b", 1, degradable=True)
    assert await fits(budgets, "b", 100, degradable=False)


async def test_a_reservation_ends_in_the_day_it_began_in(clock: FakeClock) -> None:
    budgets = local(clock, [GLOBAL_DAY])
    clock.advance(DAY_S - clock.now_s() % DAY_S - 1)
    await reserve(budgets, "a", 1_000)
    clock.advance(1)
    assert await fits(budgets, "b", 1_000)
    await budgets.settle("a", 1_000)
    assert await standing(budgets) == {"global/day": (0, 1_000)}


async def test_a_call_above_what_was_set_aside_is_an_overrun(clock: FakeClock) -> None:
    books = Overruns()
    budgets = local(clock, books=books)
    await reserve(budgets, "a", 100)
    await budgets.settle("a", 100, upstream="openai")
    assert books.told == []
    await reserve(budgets, "b", 100)
    await budgets.settle("b", 130, upstream="openai")
    assert books.told == [("openai", 30)]
    assert await standing(budgets) == everywhere(230, 0)


async def test_budgets_go_on_from_what_the_ledger_knows(clock: FakeClock) -> None:
    today_s = int(clock.now_s() - clock.now_s() % DAY_S)
    spent = [
        DaySpending(today_s - 40 * DAY_S, "shop", "web", "openai", 1),
        DaySpending(today_s - DAY_S, "shop", "web", "openai", 20),
        DaySpending(today_s, "shop", "web", "openai", 30),
        DaySpending(today_s, "shop", "batch", "azure", 4),
    ]
    budgets = local(clock, spent=spent)
    assert await standing(budgets) == {
        "global/day": (34, 0),
        "global/month": (54, 0),
        "namespace:shop/day": (34, 0),
        "caller:web/day": (30, 0),
    }
    assert budgets.month_spend_microusd("openai") == 50


async def test_a_limit_is_in_force_as_soon_as_it_is_set(clock: FakeClock) -> None:
    budgets = local(clock)
    state = await budgets.set_limit("caller:web/day", 350)
    assert (state.budget.name, state.budget.limit_microusd) == ("caller:web/day", 350)
    assert await fits(budgets, "a", 350)
    await budgets.set_limit("caller:web/day", 300)
    assert not await fits(budgets, "b", 0)
    with pytest.raises(UnknownUpstreamError, match="global/day, global/month"):
        await budgets.set_limit("caller:nobody/day", 1)


async def test_who_no_budget_bounds_may_spend(clock: FakeClock) -> None:
    budgets = local(clock, [WEB_DAY])
    await reserve(budgets, "a", 10**12, caller="batch")
    await budgets.settle("a", 10**12, upstream="openai")
    assert budgets.month_spend_microusd("openai") == 10**12


def at_once(call: Coroutine[Any, Any, T]) -> T:
    """The result of a call that never waits."""
    with pytest.raises(StopIteration) as returned:
        call.send(None)
    return cast("T", returned.value.value)


class NeverAboveALimit(RuleBasedStateMachine):
    """Whatever is reserved, sent, settled and released in whichever order: no limit is exceeded, nothing is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.budgets = local(self.clock)
        self.ids = itertools.count()
        self.open: dict[str, tuple[int, Period]] = {}
        """What was set aside, in which month."""
        self.spent: Counter[Period] = Counter()

    @property
    def month(self) -> Period:
        return Period.at(BudgetPeriod.MONTH, self.clock.now_s())

    @rule(
        microusd=st.integers(0, 500),
        namespace=st.sampled_from(["shop", "blog"]),
        caller=st.sampled_from(["web", "batch"]),
        degradable=st.booleans(),
    )
    def reserve(self, microusd: int, namespace: str, caller: str, degradable: bool) -> None:  # noqa: FBT001 - hypothesis's
        attempt_id = str(next(self.ids))
        before = at_once(standing(self.budgets))
        call = reserve(self.budgets, attempt_id, microusd, namespace=namespace, caller=caller, degradable=degradable)
        try:
            at_once(call)
        except CannotAffordError:
            assert at_once(standing(self.budgets)) == before
        else:
            self.open[attempt_id] = (microusd, self.month)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1), ends=st.sampled_from(["settle", "release", "twice"]))
    def end(self, data: st.DataObject, share: float, ends: str) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.open)))
        set_aside, month = self.open.pop(attempt_id)
        microusd = 0 if ends == "release" else int(set_aside * share)
        at_once(self.budgets.sent(attempt_id))
        at_once(self.budgets.release(attempt_id) if ends == "release" else self.budgets.settle(attempt_id, microusd))
        if ends == "twice":
            at_once(self.budgets.settle(attempt_id, microusd))
            at_once(self.budgets.release(attempt_id))
        self.spent[month] += microusd

    @rule(hours=st.integers(1, 30))
    def time_passes(self, hours: int) -> None:
        self.clock.advance(hours * 3_600)

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        for account, own in self.budgets.accounts.sums.items():
            assert own.spent >= 0
            assert own.reserved >= 0
            assert own.used <= account.budget.limit_microusd

    @invariant()
    def nothing_is_lost(self) -> None:
        # Every attempt is in one month's global budget: that in which it began.
        sums = self.budgets.accounts.sums.items()
        monthly = {account.period: own for account, own in sums if account.budget == GLOBAL_MONTH}
        still_open: Counter[Period] = Counter()
        for microusd, month in self.open.values():
            still_open[month] += microusd
        for month, own in monthly.items():
            assert (own.spent, own.reserved) == (self.spent[month], still_open[month])
        # A month is forgotten a day after its end at the earliest, and never while an attempt in it is open.
        month_before = Period.at(BudgetPeriod.MONTH, self.clock.now_s() - DAY_S)
        for month in {self.month, month_before, *(month for _, month in self.open.values())}:
            assert month in monthly or self.spent[month] == still_open[month] == 0


TestNeverAboveALimit = pytest.mark.no_cover(NeverAboveALimit.TestCase)
TestNeverAboveALimit.settings = settings(max_examples=60, stateful_step_count=40)


# ---- of several replicas


@dataclass
class Fleet:
    """Replicas at one Redis, each with a client of its own."""

    clock: FakeClock
    url: str
    prefix: str
    clients: list[Client] = field(default_factory=list)

    def replica(
        self,
        replica_id: str,
        budgets: Sequence[Budget] = ALL,
        *,
        spent: Sequence[DaySpending] = (),
        redis_lost: Literal["share", "refuse"] = "share",
        books: Any = None,
        url: str = "",
        timeout_s: float = 20.0,
    ) -> RedisBudgets:
        client = connect(url or self.url, timeout_s=timeout_s, connect_timeout_s=timeout_s)
        self.clients.append(client)
        return RedisBudgets(
            client=client,
            here=local(self.clock, budgets, spent=spent, books=books),
            replicas=self.registered(replica_id, client),
            clock=self.clock,
            prefix=self.prefix,
            redis_lost=redis_lost,
            timeout_s=timeout_s,
        )

    def registered(self, replica_id: str, client: Client) -> Replicas:
        return Replicas(replica_id, clock=self.clock, client=client, prefix=self.prefix)

    def name(self, what: str) -> str:
        return f"{self.prefix}{{budget}}:{what}"

    async def takes_for_dead(self, replica_id: str, *, who: RedisBudgets) -> None:
        """`who` finds that the other has been silent for long, and buries it."""
        await self.clients[0].zadd(self.name("replicas"), {replica_id: 1})
        await who.look()

    async def aclose(self) -> None:
        for client in self.clients:
            await disconnect(client)


@pytest.fixture
async def fleet(clock: FakeClock, redis_url: str) -> AsyncIterator[Fleet]:
    fleet = Fleet(clock, redis_url, next(PREFIXES))
    yield fleet
    await fleet.aclose()


@pytest.fixture
def valkey(own_valkey: Callable[[], ValkeyServer]) -> ValkeyServer:
    return own_valkey()


@pytest.fixture
async def own_fleet(clock: FakeClock, valkey: ValkeyServer) -> AsyncIterator[Fleet]:
    fleet = Fleet(clock, valkey.url, "")
    yield fleet
    await fleet.aclose()


async def test_of_500_calls_at_two_replicas_exactly_those_the_budget_allows_get_money(fleet: Fleet) -> None:
    replicas = [fleet.replica(name, [GLOBAL_DAY]) for name in IDS[:2]]
    allowed = await asyncio.gather(*(fits(replicas[n % 2], str(n), 10) for n in range(500)))
    assert Counter(allowed) == {True: 100, False: 400}
    for one in replicas:
        assert await standing(one) == {"global/day": (0, 1_000)}


async def test_replicas_see_what_the_others_set_aside_and_spent(fleet: Fleet) -> None:
    one, other = fleet.replica(IDS[0]), fleet.replica(IDS[1])
    await reserve(one, "a", 200)
    await reserve(other, "b", 100)
    assert await standing(one) == await standing(other) == everywhere(0, 300)
    await one.sent("a")
    await one.settle("a", 150, upstream="openai")
    assert await standing(other) == everywhere(150, 100)
    await other.release("b")
    assert await standing(one) == everywhere(150, 0)
    assert await fits(other, "c", 150)
    assert not await fits(one, "d", 1)


async def test_an_attempt_ends_once_in_redis(fleet: Fleet) -> None:
    one = fleet.replica(IDS[0])
    await reserve(one, "a", 100)
    await one.settle("a", 60, upstream="openai")
    await one.settle("a", 60, upstream="openai")
    await one.release("a")
    assert await standing(one) == everywhere(60, 0)


async def test_what_costs_nothing_needs_nothing(fleet: Fleet) -> None:
    one = fleet.replica(IDS[0], [replace(GLOBAL_DAY, limit_microusd=0)])
    assert await fits(one, "free", 0)
    await one.sent("free")
    await one.settle("free", 0, upstream="painter")
    assert not await fits(one, "paid", 1)
    await fits(one, "dead", 0)
    await fleet.takes_for_dead(IDS[0], who=fleet.replica(IDS[1]))
    assert await standing(one) == {}


async def test_sums_beyond_a_billion_dollars_are_exact(fleet: Fleet) -> None:
    large = 3_000_000_000_000_001
    one, other = (fleet.replica(name, [replace(GLOBAL_DAY, limit_microusd=2 * large)]) for name in IDS[:2])
    await reserve(one, "a", large)
    await one.settle("a", large)
    assert not await fits(other, "b", large + 1)
    assert await fits(other, "b", large)
    assert await standing(one) == {"global/day": (large, large)}


async def test_redis_refuses_as_one_process_does(fleet: Fleet, clock: FakeClock) -> None:
    one, alone = fleet.replica(IDS[0]), local(clock)
    for budgets in (one, alone):
        with pytest.raises(CannotAffordError) as caught:
            await reserve(budgets, "a", 301)
        assert caught.value.budget == "caller:web/day"
        assert caught.value.reset_time_s % DAY_S == 0
        assert await fits(budgets, "b", 270, degradable=True)
        assert not await fits(budgets, "c", 1, degradable=True)
        assert await fits(budgets, "c", 30)


async def test_an_overrun_at_redis_is_booked(fleet: Fleet) -> None:
    books = Overruns()
    one = fleet.replica(IDS[0], books=books)
    await reserve(one, "a", 100)
    await one.settle("a", 130, upstream="openai")
    assert books.told == [("openai", 30)]
    assert await standing(one) == everywhere(130, 0)


async def test_a_limit_that_is_set_holds_in_every_replica(fleet: Fleet) -> None:
    one, other = fleet.replica(IDS[0]), fleet.replica(IDS[1])
    state = await one.set_limit("caller:web/day", 50)
    assert (state.budget.limit_microusd, state.spent_microusd) == (50, 0)
    assert not await fits(other, "a", 51)
    limits = {state.budget.name: state.budget.limit_microusd for state in await other.states()}
    assert limits["caller:web/day"] == 50
    with pytest.raises(UnknownUpstreamError):
        await one.set_limit("caller:nobody/day", 1)


async def test_what_an_upstream_was_paid_is_known_of_all_replicas(fleet: Fleet) -> None:
    one, other = fleet.replica(IDS[0]), fleet.replica(IDS[1])
    for budgets, microusd in ((one, 40), (other, 2)):
        await reserve(budgets, str(microusd), 100)
        await budgets.settle(str(microusd), microusd, upstream="openai")
    await one.look()
    assert one.month_spend_microusd("openai") == 42
    assert one.month_spend_microusd("azure") == 0


# ---- replicas that die


async def test_of_a_dead_replica_what_was_not_sent_is_free_and_what_was_sent_is_spent(fleet: Fleet) -> None:
    dead, other = fleet.replica(IDS[0]), fleet.replica(IDS[1])
    await reserve(dead, "reserved", 200)
    await reserve(dead, "sent", 70)
    await dead.sent("sent")
    await reserve(dead, "settled", 30)
    await dead.settle("settled", 10)
    await other.look()
    assert await standing(other) == everywhere(10, 270)
    await fleet.takes_for_dead(IDS[0], who=other)
    assert await standing(other) == everywhere(80, 0)


async def test_a_replica_taken_for_dead_tells_what_it_has_and_nothing_counts_twice(fleet: Fleet) -> None:
    stalled, other = fleet.replica(IDS[0]), fleet.replica(IDS[1])
    await reserve(stalled, "a", 100)
    await reserve(stalled, "b", 20)
    await stalled.sent("a")
    await fleet.takes_for_dead(IDS[0], who=other)
    await stalled.settle("a", 60)
    assert await standing(other) == everywhere(60, 0)  # what was not sent is free
    await stalled.sent("b")
    assert await standing(other) == everywhere(60, 20)
    await stalled.release("b")
    assert await standing(other) == everywhere(60, 0)


async def test_what_others_have_freed_is_set_aside_anew_before_it_is_sent(fleet: Fleet) -> None:
    stalled, other = (fleet.replica(name, [GLOBAL_DAY]) for name in IDS[:2])
    for attempt_id in ("a", "b", "c"):
        await reserve(stalled, attempt_id, 300)
    await fleet.takes_for_dead(IDS[0], who=other)
    await reserve(other, "of the other", 600)
    await stalled.sent("a")
    with pytest.raises(CannotAffordError):
        await stalled.sent("b")
    await stalled.release("b")
    await stalled.release("c")
    assert await standing(other) == {"global/day": (0, 900)}
    await stalled.settle("a", 200)
    assert await standing(other) == {"global/day": (200, 600)}


@pytest.mark.parametrize("redis_lost", ["share", "refuse"])
async def test_what_others_have_freed_is_not_sent_unlooked_at_though_redis_is_lost_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, redis_lost: Literal["share", "refuse"]
) -> None:
    stalled, other = fleet.replica(IDS[0], [GLOBAL_DAY], redis_lost=redis_lost), fleet.replica(IDS[1], [GLOBAL_DAY])
    await reserve(stalled, "a", 300)
    await stalled.look()
    await fleet.takes_for_dead(IDS[0], who=other)
    answers = stalled._eval

    async def lose(*_: Any) -> list[Any]:
        raise RedisConnectionError("gone")

    async def answer_until_buried(script: str, keys: Sequence[str], args: Sequence[Any]) -> list[Any]:
        answer = await answers(script, keys, args)
        if answer[0] == "buried":
            monkeypatch.setattr(stalled, "_eval", lose)
        return answer

    monkeypatch.setattr(stalled, "_eval", answer_until_buried)
    if redis_lost == "refuse":
        with pytest.raises(LedgerUnavailableError):
            await stalled.sent("a")
        await stalled.release("a")
        assert stalled._here.accounts.open == {}
    else:
        await stalled.sent("a")
        assert stalled._here.accounts.open["a"].is_sent
    monkeypatch.setattr(stalled, "_eval", answers)
    await stalled.look()
    assert await standing(other) == ({} if redis_lost == "refuse" else {"global/day": (0, 300)})


async def test_what_was_freed_while_it_is_being_sent_is_set_aside_anew(fleet: Fleet) -> None:
    stalled, other = (fleet.replica(name, [GLOBAL_DAY]) for name in IDS[:2])
    await reserve(stalled, "a", 600)
    await fleet.takes_for_dead(IDS[0], who=other)
    await asyncio.gather(stalled.sent("a"), stalled.look())
    assert await standing(other) == {"global/day": (0, 600)}
    await fleet.takes_for_dead(IDS[0], who=other)
    assert await standing(other) == {"global/day": (600, 0)}  # it was sent: nobody knows what it cost


@pytest.mark.parametrize("buried", [False, True])
async def test_a_replica_that_was_killed_goes_on_from_its_ledger(fleet: Fleet, *, buried: bool) -> None:
    killed, other = fleet.replica(IDS[0]), fleet.replica(IDS[1])
    await reserve(killed, "reserved", 100)
    await reserve(killed, "sent", 50)
    await killed.sent("sent")
    if buried:
        await fleet.takes_for_dead(IDS[0], who=other)
    seconds, _ = await fleet.clients[0].time()
    today_s = seconds - seconds % DAY_S
    restarted = fleet.replica(IDS[0], spent=[DaySpending(today_s, "shop", "web", "openai", 50)])
    await restarted.look()
    assert await standing(other) == everywhere(50, 0)
    await other.look()
    assert other.month_spend_microusd("openai") == 50


async def test_two_processes_with_one_id_are_noticed(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    one, twin = fleet.replica(IDS[0]), fleet.replica(IDS[0])
    await one.look()
    await twin.look()
    capsys.readouterr()
    await one.look()
    assert "replica_id_taken_over" in capsys.readouterr().out


# ---- a Redis that is lost


async def test_while_redis_is_lost_replicas_share_what_was_left(own_fleet: Fleet, valkey: ValkeyServer) -> None:
    replicas = [own_fleet.replica(name, [GLOBAL_DAY]) for name in IDS[:2]]
    await reserve(replicas[0], "before", 400)
    for one in replicas:
        await one._replicas.beat()
    for one in replicas:
        await one._replicas.beat()
        await one.look()
    valkey.kill()
    for one in replicas:
        assert await fits(one, "a", 200)
        assert await fits(one, "b", 100)
        assert not await fits(one, "c", 1)
        await one.release("b")
        assert await fits(one, "c", 100)
    assert await standing(replicas[1]) == {"global/day": (0, 700)}
    valkey.start()
    for one in replicas:
        await one.look()
    for one in replicas:
        assert await standing(one) == {"global/day": (0, 1_000)}


async def test_a_share_is_of_the_new_day_when_redis_is_lost_over_midnight(
    own_fleet: Fleet, valkey: ValkeyServer, clock: FakeClock
) -> None:
    one = own_fleet.replica(IDS[0], [GLOBAL_DAY])
    one._replicas.live = 4
    await reserve(one, "before", 900)
    await one.look()
    valkey.kill()
    clock.advance(DAY_S)
    assert await fits(one, "a", 100)
    assert await fits(one, "b", 150)
    assert not await fits(one, "c", 1)


async def test_while_redis_is_lost_nothing_is_bought_if_so_told(own_fleet: Fleet, valkey: ValkeyServer) -> None:
    one = own_fleet.replica(IDS[0], [WEB_DAY], redis_lost="refuse")
    await reserve(one, "a", 100)
    valkey.kill()
    with pytest.raises(LedgerUnavailableError, match="budgets cannot be checked"):
        await reserve(one, "b", 1)
    with pytest.raises(LedgerUnavailableError, match="budgets cannot be checked"):
        await one.sent("a")
    await reserve(one, "unbounded", 1, caller="batch")
    await one.sent("unbounded")
    with pytest.raises(LedgerUnavailableError, match="in every replica"):
        await one.set_limit("caller:web/day", 1)
    await one.settle("a", 60)
    valkey.start()
    await one.look()
    assert await standing(one) == {"caller:web/day": (60, 0)}
    await reserve(one, "b", 240)


async def test_a_redis_that_was_emptied_is_built_again_from_all_replicas(
    own_fleet: Fleet, valkey: ValkeyServer
) -> None:
    one, other = own_fleet.replica(IDS[0]), own_fleet.replica(IDS[1])
    await one.set_limit("caller:web/day", 290)
    await reserve(one, "a", 100)
    await reserve(other, "b", 60)
    await other.settle("b", 50, upstream="openai")
    await one.look()
    valkey.execute("FLUSHALL")
    # The other one has not told yet what it spent.
    assert not await fits(one, "c", 141)
    assert await fits(one, "c", 140)
    await other.look()
    await one.look()
    assert await standing(one) == await standing(other) == everywhere(50, 240)
    assert one.month_spend_microusd("openai") == 50


async def test_what_a_replica_had_spent_that_is_gone_outlives_a_redis_that_is_emptied(
    own_fleet: Fleet, valkey: ValkeyServer
) -> None:
    one, gone = (own_fleet.replica(name, [GLOBAL_DAY]) for name in IDS[:2])
    await reserve(gone, "a", 400)
    await gone.sent("a")
    await gone.settle("a", 400)
    await one.look()
    await own_fleet.takes_for_dead(IDS[1], who=one)
    valkey.execute("FLUSHALL")
    await one.look()
    assert await standing(one) == {"global/day": (400, 0)}
    await own_fleet.clients[0].set(own_fleet.name("epoch"), "1.0")  # long ago
    await one.look()
    assert not await fits(one, "b", 601)
    assert await fits(one, "b", 600)


async def test_a_replica_that_has_never_seen_redis_buys_nothing_that_a_budget_bounds(
    own_fleet: Fleet, valkey: ValkeyServer
) -> None:
    valkey.kill()
    one = own_fleet.replica(IDS[0], [WEB_DAY])
    await one.start()
    with pytest.raises(LedgerUnavailableError, match="budgets cannot be checked"):
        await reserve(one, "a", 1)
    await reserve(one, "unbounded", 1, caller="batch")
    valkey.start()
    await one.look()
    await reserve(one, "a", 300)
    await one.aclose()


async def test_nor_does_one_that_could_tell_redis_but_not_look(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    one = fleet.replica(IDS[0], [WEB_DAY])
    answers = one._eval

    async def answer_but_a_look(script: str, keys: Sequence[str], args: Sequence[Any]) -> list[Any]:
        if script == budget_scripts.TELL:
            return await answers(script, keys, args)
        raise RedisConnectionError("gone")

    monkeypatch.setattr(one, "_eval", answer_but_a_look)
    await one.look()
    with pytest.raises(LedgerUnavailableError, match="budgets cannot be checked"):
        await reserve(one, "a", 1)
    monkeypatch.setattr(one, "_eval", answers)
    await one.look()
    await reserve(one, "a", 300)


async def test_a_redis_that_lost_its_last_second_is_corrected(fleet: Fleet) -> None:
    one, other = fleet.replica(IDS[0]), fleet.replica(IDS[1])
    await reserve(one, "a", 100)
    await one.look()
    client = fleet.clients[0]
    seconds, _ = await client.time()
    today = Period.at(BudgetPeriod.DAY, seconds).name
    assert await client.hset(fleet.name(f"global/day:{today}"), f"r:{IDS[0]}", 0) == 0
    await one.look()
    assert await standing(other) == everywhere(0, 100)
    await client.delete(fleet.name(f"open:{IDS[0]}"))
    await one.settle("a", 60)
    await one.look()
    assert await standing(other) == everywhere(60, 0)


async def test_a_frozen_redis_holds_nobody_up_and_what_arrives_late_does_nothing(
    own_fleet: Fleet, valkey: ValkeyServer
) -> None:
    one = own_fleet.replica(IDS[0], timeout_s=1)
    await reserve(one, "a", 100)
    valkey.stop()
    allowed = await asyncio.wait_for(asyncio.gather(*(fits(one, str(n), 1) for n in range(300))), 5)
    assert sum(allowed) == 200
    valkey.cont()
    await until(lambda: valkey.execute("PING") == b"+PONG\r\n")
    await one.look()
    for n in itertools.compress(range(300), allowed):
        await one.release(str(n))
    assert await standing(one) == everywhere(0, 100)


async def test_a_call_that_was_cut_off_holds_no_money(own_fleet: Fleet, valkey: ValkeyServer) -> None:
    one, other = own_fleet.replica(IDS[0]), own_fleet.replica(IDS[1])
    await one.look()
    async with TcpProxy("127.0.0.1", valkey.port) as proxy:
        cut = own_fleet.replica(IDS[2], url=f"redis://127.0.0.1:{proxy.port}/0", timeout_s=1)
        await reserve(cut, "kept", 10)
        proxy.hang()
        reserving = asyncio.create_task(reserve(cut, "a", 100))
        settling = asyncio.create_task(cut.settle("kept", 5))
        await until(lambda: cut._running == 2)
        for task in (reserving, settling):
            task.cancel()
        await asyncio.gather(reserving, settling, return_exceptions=True)
        proxy.resume()
        await reserve(cut, "next", 1)
        assert await standing(other) == everywhere(5, 1)


async def test_what_changes_while_redis_comes_back_is_told(own_fleet: Fleet, valkey: ValkeyServer) -> None:
    async with TcpProxy("127.0.0.1", valkey.port) as proxy:
        one = own_fleet.replica(IDS[0], url=f"redis://127.0.0.1:{proxy.port}/0", timeout_s=5)
        await reserve(one, "a", 100)
        proxy.cut()
        await reserve(one, "b", 50)
        proxy.resume()
        proxy.hang()
        looking = asyncio.create_task(one.look())
        await until(one._telling.locked)
        # Lost for as long as the telling lasts: these are not in it.
        await one.settle("a", 60)
        await reserve(one, "c", 7)
        proxy.resume()
        await looking
    assert await standing(own_fleet.replica(IDS[1])) == everywhere(60, 57)


async def test_a_call_that_a_telling_overtakes_is_made_again(own_fleet: Fleet, valkey: ValkeyServer) -> None:
    async with TcpProxy("127.0.0.1", valkey.port) as proxy:
        one = own_fleet.replica(IDS[0], url=f"redis://127.0.0.1:{proxy.port}/0", timeout_s=5)
        await reserve(one, "early", 10)
        proxy.hang()
        reserving = asyncio.create_task(reserve(one, "a", 100))
        await until(lambda: one._running == 1)
        for _ in range(50):
            await asyncio.sleep(0)  # the script is on its way to the server
        one._doubt("a test")
        sending = asyncio.create_task(one.sent("early"))
        await until(one._telling.locked)
        proxy.resume()
        await asyncio.gather(reserving, sending)
    # What the server was told did not hold what it had set aside a moment before.
    assert await standing(own_fleet.replica(IDS[1])) == everywhere(0, 110)


async def test_a_script_that_is_sent_again_does_nothing_twice(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = fleet.replica(IDS[0]), fleet.replica(IDS[1])
    once = one._eval

    async def twice(script: str, keys: Sequence[str], args: Sequence[Any]) -> list[Any]:
        await once(script, keys, args)
        return await once(script, keys, args)

    monkeypatch.setattr(one, "_eval", twice)
    await reserve(one, "a", 100)
    await reserve(one, "b", 50)
    assert await standing(other) == everywhere(0, 150)
    await one.sent("a")
    await one.settle("a", 60)
    assert await standing(other) == everywhere(60, 50)


async def test_a_telling_that_comes_too_late_changes_nothing(fleet: Fleet) -> None:
    one = fleet.replica(IDS[0])
    await reserve(one, "a", 100)
    names = map(fleet.name, ("lives", f"open:{IDS[0]}", "epoch", "periods", "replicas", "limits"))
    nothing = '{"accounts": [], "open": {}, "paid": [], "limits": {}}'
    late = await fleet.clients[0].eval(budget_scripts.TELL, 6, *names, IDS[0], "", "late.1", nothing)
    assert late[0] == b"stranger"
    assert await standing(fleet.replica(IDS[1])) == everywhere(0, 100)


async def test_calls_that_overlap_a_telling_count_once(fleet: Fleet) -> None:
    one = fleet.replica(IDS[0])

    async def attempt(n: int) -> None:
        await reserve(one, str(n), 2)
        if n % 3 == 0:
            one._doubt("a test")
        await one.sent(str(n))
        if n % 5 == 0:
            one._doubt("a test")
        await one.settle(str(n), 1)

    await asyncio.gather(*(attempt(n) for n in range(100)))
    await one.look()
    assert await standing(fleet.replica(IDS[1])) == everywhere(100, 0)
    assert await fleet.clients[0].hlen(fleet.name(f"open:{IDS[0]}")) == 0


async def test_a_started_replica_finds_redis_again_by_itself(
    own_fleet: Fleet, valkey: ValkeyServer, clock: FakeClock
) -> None:
    one = own_fleet.replica(IDS[0])
    await one.start()
    valkey.kill()
    await reserve(one, "a", 100)
    valkey.start()
    other = own_fleet.replica(IDS[1])

    async def is_told() -> bool:
        clock.advance(1)
        return await standing(other) == everywhere(0, 100)

    await until(is_told)
    await one.aclose()
    assert clock.sleepers == 0


async def test_what_ended_long_ago_is_forgotten(fleet: Fleet) -> None:
    one = fleet.replica(IDS[0])
    await reserve(one, "a", 1)
    client, old, recent = fleet.clients[0], fleet.name("global/day:2001-01-01"), fleet.name("global/day:yesterday")
    seconds, _ = await client.time()
    for name, end_s in ((old, 978_393_600), (recent, seconds - DAY_S)):
        await client.hset(name, "s:x", 1)
        await client.zadd(fleet.name("periods"), {name: end_s})
    await one.look()
    assert await client.exists(old) == 0
    assert await client.exists(recent) == 1
    assert await client.zscore(fleet.name("periods"), old) is None


STEPS = st.one_of(
    st.tuples(st.just("reserve"), st.integers(0, 1), st.integers(0, 400)),
    st.tuples(st.just("settle"), st.integers(0, 1), st.integers(0, 100)),
    st.tuples(
        st.sampled_from(["look", "doubt", "send", "release", "empty", "restart", "bury"]), st.integers(0, 1), st.just(0)
    ),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=30))
async def test_whatever_happens_no_limit_is_exceeded_and_redis_has_what_the_replicas_have(
    clock: FakeClock, valkey_server: ValkeyServer, steps: list[tuple[str, int, int]]
) -> None:
    fleet = Fleet(clock, valkey_server.url, next(PREFIXES))
    fleet.replica(IDS[2])
    try:
        await _live_through(fleet, steps)
    finally:
        await fleet.aclose()


async def _goes_out(budgets: RedisBudgets, attempt_id: str) -> bool:
    try:
        await budgets.sent(attempt_id)
    except CannotAffordError:
        await budgets.release(attempt_id)
        return False
    return True


async def _live_through(  # noqa: C901 - a step is a line or two
    fleet: Fleet, steps: list[tuple[str, int, int]]
) -> None:
    """Budgets as callers use them: what is refused when it is to be sent is released, what is not sent is free."""
    replicas = [fleet.replica(name, [GLOBAL_DAY]) for name in IDS[:2]]
    client, ids = fleet.clients[0], itertools.count()
    seconds, _ = await client.time()

    for step, which, microusd in steps:
        one = replicas[which]
        accounts = one._here.accounts
        oldest = next(iter(accounts.open), "none")
        if step == "reserve":
            await fits(one, str(next(ids)), microusd)
        elif step == "settle" and oldest != "none":
            cost_microusd = accounts.open[oldest].microusd * microusd // 100
            if await _goes_out(one, oldest):
                await one.settle(oldest, cost_microusd)
        elif step == "send":
            await _goes_out(one, oldest)
        elif step == "release":
            await one.release(oldest)
        elif step == "look":
            await one.look()
        elif step == "doubt":
            one._doubt("a test")
        elif step == "empty":
            # Both have seen how things stand, as they do every second.
            await asyncio.gather(*(each.look() for each in replicas))
            await client.delete(*await client.keys(f"{fleet.prefix}*"), "none")
        elif step == "restart":
            unknown = sum(each.microusd for each in accounts.open.values() if each.is_sent)
            spent = sum(own.spent for own in accounts.sums.values()) + unknown
            ledger = [DaySpending(seconds - seconds % DAY_S, "shop", "web", "openai", spent)]
            replicas[which] = fleet.replica(IDS[which], [GLOBAL_DAY], spent=ledger)
            await replicas[which].look()
        elif step == "bury":
            await fleet.takes_for_dead(IDS[which], who=replicas[1 - which])
        present = [each._here.accounts for each in replicas]
        spent = sum(own.spent for each in present for own in each.sums.values())
        sent = sum(
            reservation.microusd for each in present for reservation in each.open.values() if reservation.is_sent
        )
        assert spent + sent <= GLOBAL_DAY.limit_microusd

    for one in replicas:
        await one.look()
        await one.look()
    sums = [own for each in replicas for own in each._here.accounts.sums.values()]
    expected = (sum(own.spent for own in sums), sum(own.reserved for own in sums))
    assert (await standing(replicas[0])).get("global/day", (0, 0)) == expected
