"""The leases of one load are taken together, in one order, and what came of a load that gave up is nobody's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.clock import SystemClock
from cacheserver.interfaces import Lease, Leases
from cacheserver.leasing import Leasing
from cacheserver.model import Priority
from cacheserver.tiers.redis_client import Client
from tests.fakes import FakeClock
from tests.matching_house import PREFIXES, WatchedLeases, client
from tests.waiting import until

__all__ = ["client"]

BOTH = ("canonical", "own")


class Desk(Leases):
    """Hands out leases one by one, and notes in which order it was asked; `held` ones once they are given back."""

    def __init__(self, *held: str) -> None:
        self.events: list[str] = []
        self.looked_s_ago: list[tuple[str, float]] = []
        self.priorities: list[Priority] = []
        self.failing: dict[str, Exception] = {}
        self.taken: dict[Lease, str] = {}
        self.unused: list[str] = []
        self._free: dict[str, asyncio.Event] = {name: asyncio.Event() for name in BOTH}
        for name in {*BOTH} - {*held}:
            self._free[name].set()

    def free(self, name: str) -> None:
        """Whoever had it gives it back."""
        self._free[name].set()

    def hold(self, name: str) -> None:
        """Somebody else has it from now on."""
        self._free[name].clear()

    async def take(self, identity_name: str, *, looked_s_ago: float, priority: Callable[[], Priority]) -> Lease:
        self.events.append(f"ask {identity_name}")
        self.looked_s_ago.append((identity_name, looked_s_ago))
        try:
            await self._free[identity_name].wait()
        except asyncio.CancelledError:
            self.events.append(f"leave {identity_name}")
            raise
        if identity_name in self.failing:
            raise self.failing[identity_name]
        self.priorities.append(priority())
        self.hold(identity_name)
        self.events.append(f"take {identity_name}")
        self.taken[lease := Lease()] = identity_name
        return lease

    def let_go(self, lease: Lease, *, after: Callable[[], Awaitable[None]] | None) -> None:
        if (name := self.taken.pop(lease, None)) is not None:
            self.events.append(f"give back {name}")
            self.unused += [name] if after is None else []
            self.free(name)


def standard() -> Priority:
    return Priority.STANDARD


async def nothing() -> None:
    pass


def taking(desk: Desk, *names: str, clock: FakeClock | None = None) -> asyncio.Task[list[Lease]]:
    leasing = Leasing(desk, clock=clock or FakeClock())
    return asyncio.create_task(leasing.take(names, looked_s=0.0, priority=standard))


async def test_one_lease_is_asked_for_as_it_is() -> None:
    desk = Desk()
    [lease] = await taking(desk, "own")
    assert desk.taken == {lease: "own"}
    assert desk.events == ["ask own", "take own"]


async def test_both_leases_are_asked_for_before_either_is_there() -> None:
    desk = Desk(*BOTH)
    both = taking(desk, *BOTH)
    await until(lambda: len(desk.events) == 2)
    assert desk.events == ["ask canonical", "ask own"]
    for name in BOTH:
        desk.free(name)
    leases = await both
    assert [desk.taken[lease] for lease in leases] == [*BOTH]


async def test_the_second_lease_is_waited_for_with_the_first_one_in_hand() -> None:
    desk = Desk("own")
    both = taking(desk, *BOTH)
    await until(lambda: "take canonical" in desk.events)
    desk.free("own")
    await both
    assert desk.events == ["ask canonical", "take canonical", "ask own", "take own"]


async def test_the_second_lease_is_given_back_while_another_has_the_first_one() -> None:
    desk = Desk("canonical")
    both = taking(desk, *BOTH)
    await until(lambda: "give back own" in desk.events)
    assert desk.events == ["ask canonical", "ask own", "take own", "give back own"]
    assert desk.unused == ["own"]  # nobody looks again for what was made under it
    desk.free("canonical")
    leases = await both
    assert desk.events[4:] == ["take canonical", "ask own", "take own"]
    assert [desk.taken[lease] for lease in leases] == [*BOTH]


async def test_nobody_stays_in_line_for_the_second_lease_while_another_has_the_first_one() -> None:
    desk = Desk(*BOTH)
    both = taking(desk, *BOTH)
    await until(lambda: "leave own" in desk.events)
    desk.free("canonical")
    await until(lambda: desk.events.count("ask own") == 2)
    desk.free("own")
    await both
    assert desk.events[2:] == ["leave own", "take canonical", "ask own", "take own"]


async def test_a_lease_is_told_how_long_ago_the_tiers_were_looked_into_when_it_is_asked_for() -> None:
    desk, clock = Desk("canonical"), FakeClock()
    clock.advance(3)
    both = taking(desk, *BOTH, clock=clock)
    await until(lambda: "give back own" in desk.events)
    clock.advance(10)
    desk.free("canonical")
    await both
    assert desk.looked_s_ago == [("canonical", 3), ("own", 3), ("own", 13)]


async def test_leases_go_by_the_priority_of_the_load() -> None:
    desk = Desk()
    await Leasing(desk, clock=FakeClock()).take(BOTH, looked_s=0.0, priority=lambda: Priority.INTERACTIVE)
    assert desk.priorities == [Priority.INTERACTIVE] * 2


@pytest.mark.parametrize("held", BOTH)
async def test_what_was_taken_is_given_back_by_a_load_that_is_cancelled(held: str) -> None:
    [free] = {*BOTH} - {held}
    desk = Desk(held)
    both = taking(desk, *BOTH)
    await until(lambda: f"take {free}" in desk.events)
    both.cancel()
    await asyncio.wait({both})
    assert both.cancelled()
    assert not desk.taken
    assert desk.events.count(f"give back {free}") == 1
    assert f"leave {held}" in desk.events


async def test_a_load_that_is_cancelled_after_it_gave_the_second_lease_back_leaves_nothing() -> None:
    desk = Desk("canonical")
    both = taking(desk, *BOTH)
    await until(lambda: "give back own" in desk.events)
    both.cancel()
    await asyncio.wait({both})
    assert not desk.taken
    assert desk.events[-1] == "leave canonical"


@pytest.mark.parametrize("failing", BOTH)
async def test_what_was_taken_is_given_back_by_a_load_that_fails(failing: str) -> None:
    [other] = {*BOTH} - {failing}
    desk = Desk()
    desk.failing[failing] = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        await taking(desk, *BOTH)
    assert not desk.taken
    assert f"give back {other}" in desk.events


async def test_all_leases_of_a_load_are_let_go() -> None:
    desk = Desk()
    leasing = Leasing(desk, clock=FakeClock())
    leasing.let_go(await leasing.take(BOTH, looked_s=0.0, priority=standard), after=nothing)
    assert desk.events[-2:] == ["give back canonical", "give back own"]


# ── replicas before a real Redis ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def replicas(client: Client) -> AsyncIterator[list[WatchedLeases]]:
    prefix = next(PREFIXES)
    books = CounterBooks(clock=SystemClock(), registry=CollectorRegistry())
    every = [WatchedLeases(client, prefix, number, books) for number in range(3)]
    for replica in every:
        replica.start()
    yield every
    for replica in every:
        await replica.aclose()


async def test_who_has_the_first_lease_gets_the_second_one_from_who_waits_for_the_first(
    replicas: list[WatchedLeases],
) -> None:
    one, other, _ = replicas
    clock = SystemClock()
    first = await one.take("canonical", looked_s_ago=0.0, priority=standard)
    leasing = Leasing(other, clock=clock)
    waiting = asyncio.create_task(leasing.take(BOTH, looked_s=clock.monotonic_s(), priority=standard))
    await until(lambda: "canonical" in other.waited_for)
    async with asyncio.timeout(15):
        second = await one.take("own", looked_s_ago=0.0, priority=standard)
    Leasing(one, clock=clock).let_go([first, second], after=nothing)
    leases = await waiting
    assert [lease.look_again for lease in leases] == [True, True]
    leasing.let_go(leases, after=nothing)


async def test_loads_that_share_some_leases_all_get_them_and_never_two_at_a_time(
    replicas: list[WatchedLeases], client: Client
) -> None:
    clock = SystemClock()
    holders: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def load(replica: WatchedLeases, *names: str) -> None:
        leasing = Leasing(replica, clock=clock)
        leases = await leasing.take(names, looked_s=clock.monotonic_s(), priority=standard)
        holders.update(names)
        for name in names:
            most[name] = max(most[name], holders[name])
        await client.ping()  # so long others may try
        holders.subtract(names)
        leasing.let_go(leases, after=nothing)

    wanted = (("canonical", "one"), ("canonical", "other"), ("one",), ("other",))
    async with asyncio.timeout(30):
        await asyncio.gather(*(load(replica, *names) for replica in replicas for names in wanted))
    assert most == {"canonical": 1, "one": 1, "other": 1}
