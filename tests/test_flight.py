"""Flights alone: who joins, who leaves, and that no two loads of one identity run side by side."""

from __future__ import annotations

import asyncio

import pytest

from cacheserver.errors import KeyGoneError, ShuttingDownError
from cacheserver.flight import Flight, Flights, Loaded, Waiter
from cacheserver.identity import identify
from cacheserver.model import (
    CachedImage,
    Caller,
    GeneratedImage,
    ImageRequest,
    Namespace,
    Permission,
    Terms,
    TierName,
)
from tests.tier_contract import foreign

NAMESPACE = Namespace("default", "default")
REQUEST = ImageRequest(prompt="a red fox", model="gpt-image-2")
IDENTITY = identify(REQUEST, NAMESPACE)
EVERYTHING = Caller("tester", frozenset(Permission))


def waiter(*variants: int, refresh: bool = False, by_key: bool = False) -> Waiter:
    return Waiter(
        IDENTITY.key,
        variants,
        NAMESPACE,
        EVERYTHING,
        Terms(),
        asked=None if by_key else (REQUEST, IDENTITY),
        refusal=KeyGoneError("gone") if by_key else None,
        refresh=refresh,
    )


def made(variant: int, payer: Waiter) -> Loaded:
    return Loaded(entry(variant), TierName.UPSTREAM, payer=payer.ticket)


def entry(variant: int, *, create_time_s: float = 0.0) -> CachedImage:
    image = GeneratedImage(b"bytes", "image/png", 1, 1, "digest", "gpt-image-2", "1x1", "low", "opaque")
    return CachedImage(IDENTITY.key.with_variant(variant), image, "default", IDENTITY.prompt_digest, create_time_s)


class Loads:
    """Loads that seal what is lacking, spend when told to, and say how many run at a time."""

    def __init__(self) -> None:
        self.flights = Flights(self.load, monotonic_s=lambda: 0.0)
        self.gate = asyncio.Event()
        self.running = 0
        self.most_at_a_time = 0
        self.begun = 0

    async def load(self, flight: Flight) -> None:
        self.running += 1
        self.begun += 1
        self.most_at_a_time = max(self.most_at_a_time, self.running)
        try:
            making = flight.lacking
            flight.seal(making)
            await self.gate.wait()
            for variant in making:
                flight.land(variant, made(variant, flight.payer(variant) or flight.waiters[0]))
        finally:
            self.running -= 1

    async def steps(self, count: int = 5) -> None:
        for _ in range(count):
            await asyncio.sleep(0)


@pytest.fixture
def loads() -> Loads:
    return Loads()


async def test_a_load_dropped_while_it_waited_its_turn_lets_nobody_overtake_the_running_one(loads: Loads) -> None:
    first = waiter(0)
    loads.flights.board(first)
    await loads.steps()
    leaving, coming = waiter(0, 1), waiter(0, 1)
    loads.flights.board(leaving).leave(leaving)
    loads.flights.board(coming)
    await loads.steps()
    assert (loads.running, loads.begun) == (1, 1)
    loads.gate.set()
    await coming.answer
    assert loads.most_at_a_time == 1


async def test_a_load_that_nobody_is_left_to_pay_for_is_dropped_and_the_others_hear_why(loads: Loads) -> None:
    payer, guest = waiter(0), waiter(0, by_key=True)
    flight = loads.flights.board(payer)
    await loads.steps()
    loads.flights.board(guest)
    flight.leave(payer)
    with pytest.raises(KeyGoneError):
        await guest.answer
    assert flight.dropped
    await loads.steps()
    assert len(loads.flights) == 0


async def test_a_picture_is_made_for_the_first_who_lacks_it_and_may_pay() -> None:
    flight = Flight(IDENTITY.key, started_s=0.0)
    guest, first, second = waiter(0, 1, by_key=True), waiter(0), waiter(0, 1)
    for one in (guest, first, second):
        flight.join(one)
    assert flight.payer(0) is first
    assert flight.payer(1) is second
    flight.leave(first)
    assert flight.payer(0) is second


async def test_everyone_is_answered_when_all_they_want_has_landed(loads: Loads) -> None:
    waiters = [waiter(*range(n)) for n in (1, 2, 3)]
    for one in waiters:
        loads.flights.board(one)
    loads.gate.set()
    answers = await asyncio.gather(*(one.answer for one in waiters))
    assert [len(answer) for answer in answers] == [1, 2, 3]
    assert loads.begun == 1


async def test_who_comes_while_a_load_ends_that_made_nothing_has_the_next_one() -> None:
    poor, rich = waiter(0), waiter(0)

    async def load(flight: Flight) -> None:
        flight.seal([0])
        if poor in flight.waiters:
            flight.refuse(poor, KeyGoneError("no money"))
            asyncio.get_running_loop().call_soon(flights.board, rich)  # before anybody hears that this one has ended
        else:
            flight.land(0, made(0, rich))

    flights = Flights(load, monotonic_s=lambda: 0.0)
    flights.board(poor)
    assert len(await rich.answer) == 1


async def test_joining_costs_the_same_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    lacks = Waiter.lacks

    def counted(self: Waiter, loaded: dict[int, Loaded]) -> set[int]:
        nonlocal looks
        looks += 1
        return lacks(self, loaded)

    monkeypatch.setattr(Waiter, "lacks", counted)
    flight = Flight(IDENTITY.key, started_s=0.0)
    for _ in range(100):
        flight.join(waiter(0))
    assert looks == 100


async def test_closing_that_is_cancelled_leaves_no_load_running(loads: Loads) -> None:
    waiting = waiter(0)
    loads.flights.board(waiting)
    closing = asyncio.create_task(loads.flights.aclose(300))
    await loads.steps()
    assert loads.running == 1
    closing.cancel()
    await asyncio.wait({closing})
    assert closing.cancelled()
    assert loads.running == 0
    with pytest.raises(ShuttingDownError):
        await waiting.answer


async def test_a_waiter_accepts_no_picture_of_another_identity_whoever_paid_for_it() -> None:
    asker = waiter(0)
    own = entry(0)
    for payer in (None, asker.ticket):
        assert asker.accepts(Loaded(own, TierName.S3, payer=payer))
        assert not asker.accepts(Loaded(foreign(own), TierName.S3, payer=payer))


async def test_a_waiter_accepts_a_picture_as_old_as_it_may_be_and_none_older() -> None:
    asker = waiter(0)
    asker.not_before_s = 100.0
    assert asker.accepts(Loaded(entry(0, create_time_s=100.0), TierName.S3))
    assert not asker.accepts(Loaded(entry(0, create_time_s=99.9), TierName.S3))


async def test_a_flight_has_the_latest_of_its_waiters_deadlines_and_none_if_one_has_none() -> None:
    flight = Flight(IDENTITY.key, started_s=0.0)
    early, late, patient = waiter(0), waiter(0), waiter(0)
    early.until_s, late.until_s = 10.0, 20.0
    flight.join(late)
    flight.join(early)
    assert flight.until_s == 20.0
    flight.join(patient)
    assert flight.until_s is None
