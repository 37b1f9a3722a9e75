"""Under pressure L1 gives way: no more than it has to, and no longer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import structlog

from cacheserver.machine import Machine, Room
from cacheserver.pressure import MemoryGuard
from cacheserver.tiers.memory import MemoryCache, entry_bytes
from tests.fakes import FakeClock
from tests.tier_contract import make_entry, make_key

MIB = 1024 * 1024
LIMIT = 1000 * MIB
HIGH, LOW = 900 * MIB, 850 * MIB
PICTURE = make_entry(data=bytes(MIB))
ENTRY = entry_bytes(PICTURE)


@dataclass
class FakeMachine(Machine):
    """A machine on which others use `others` bytes, L1 what it holds, and the allocator keeps `free` bytes."""

    memory: MemoryCache
    others: int = 100 * MIB
    free: int = 0
    keeps: bool = False
    given_back: list[int] = field(default_factory=list)
    is_readable: bool = True

    def resident_bytes(self) -> int | None:
        return self.others + self.free + self.memory.size_bytes if self.is_readable else None

    def used_bytes(self) -> int:
        if not self.is_readable:
            raise OSError("gone")
        return self.others + self.free + self.memory.size_bytes

    def give_back(self) -> None:
        self.given_back.append(self.free)
        if not self.keeps:
            self.free = 0


@dataclass
class House:
    """L1, full of entries of a MiB, its guard and the machine."""

    memory: MemoryCache
    machine: FakeMachine
    guard: MemoryGuard
    prompts: int = 0

    def fill(self) -> None:
        while self.memory.size_bytes + ENTRY <= self.memory.room_bytes:
            self.prompts += 1
            key = make_key(f"{self.prompts}")
            self.memory.put(key, replace(PICTURE, key=key))


@pytest.fixture
def house(clock: FakeClock) -> Iterator[House]:
    memory = MemoryCache(clock=clock, max_bytes=256 * MIB)
    machine = FakeMachine(memory)
    room = Room(LIMIT, is_container=True, used_bytes=machine.used_bytes)
    guard = MemoryGuard(memory=memory, machine=machine, room=room, high_water=0.9, give_back=machine.give_back)
    house = House(memory, machine, guard)
    house.fill()
    yield house
    guard.close()


async def test_while_there_is_room_nothing_is_shed_or_given_back(house: House) -> None:
    held = house.memory.size_bytes
    for _ in range(3):
        await house.guard.look()
    assert (house.memory.size_bytes, house.guard.shed_bytes, house.machine.given_back) == (held, 0, [])


async def test_above_the_high_mark_l1_sheds_what_is_above_the_low_one(house: House) -> None:
    await house.guard.look()
    held = house.memory.size_bytes
    house.machine.others = HIGH - held + MIB
    await house.guard.look()
    assert LOW - 2 * ENTRY < house.machine.used_bytes() <= LOW
    assert house.guard.shed_bytes == held - house.memory.size_bytes
    assert house.memory.room_bytes < house.memory.max_bytes


async def test_who_was_used_last_stays(house: House) -> None:
    last = make_key(f"{house.prompts}")
    house.machine.others = HIGH - house.memory.size_bytes + MIB
    await house.guard.look()
    assert house.memory.contains(last)
    assert not house.memory.contains(make_key("1"))


async def test_what_is_free_goes_back_before_a_picture_has_to_go(house: House) -> None:
    await house.guard.look()
    held = house.memory.size_bytes
    house.machine.others, house.machine.free = LOW - held, 2 * (HIGH - LOW)
    await house.guard.look()
    assert (house.memory.size_bytes, house.machine.free) == (held, 0)


async def test_where_others_take_everything_l1_gives_all_it_has_and_no_more(house: House) -> None:
    house.machine.others = LIMIT
    for _ in range(3):
        await house.guard.look()
    assert (house.memory.size_bytes, house.memory.room_bytes) == (0, 0)
    house.fill()
    assert len(house.memory) == 0


async def test_between_the_marks_l1_stays_as_it_is(house: House) -> None:
    house.machine.others = HIGH - house.memory.size_bytes + MIB
    await house.guard.look()
    held, room = house.memory.size_bytes, house.memory.room_bytes
    house.machine.others += (HIGH - LOW) // 2
    for _ in range(100):
        await house.guard.look()
        house.fill()
    assert house.memory.room_bytes == room
    assert held <= house.memory.size_bytes <= room


async def test_once_there_is_room_again_l1_grows_by_a_little_each_look_until_it_is_whole(house: House) -> None:
    house.machine.others = LIMIT
    await house.guard.look()
    house.machine.others = 100 * MIB
    rooms = [house.memory.room_bytes]
    while rooms[-1] < house.memory.max_bytes:
        await house.guard.look()
        rooms.append(house.memory.room_bytes)
    steps = [later - earlier for earlier, later in itertools.pairwise(rooms)]
    assert max(steps) <= house.memory.max_bytes // 128 + 1
    assert len(steps) == 128
    await house.guard.look()
    assert house.memory.room_bytes == house.memory.max_bytes


async def test_it_does_not_swing_when_l1_is_what_fills_the_room(house: House) -> None:
    house.machine.others = HIGH - house.memory.size_bytes + MIB
    await house.guard.look()
    shed = house.guard.shed_bytes
    sizes = []
    for _ in range(500):
        house.fill()
        await house.guard.look()
        sizes.append(house.memory.size_bytes)
    assert house.guard.shed_bytes == shed
    assert max(sizes[100:]) - min(sizes[100:]) == 0
    assert house.machine.used_bytes() <= HIGH


async def test_an_episode_is_told_once_and_its_end_too(house: House) -> None:
    with structlog.testing.capture_logs() as events:
        house.machine.others = LIMIT
        for _ in range(5):
            await house.guard.look()
        house.machine.others = 100 * MIB
        for _ in range(200):
            await house.guard.look()
    assert [event["event"] for event in events] == ["memory_short", "memory_no_longer_short"]
    assert (events[0]["used_mib"], events[0]["high_water_mib"], events[0]["memory_mib"]) == (1000 + 255, 900, 0)


async def test_others_have_their_turn_while_much_is_shed(house: House) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    sizes: list[int] = []
    shed = house.memory.shed

    def noted(to_bytes: int) -> None:
        shed(to_bytes)
        sizes.append(turns)

    house.memory.shed = noted  # type: ignore[method-assign] # notes whose turn it was
    house.machine.others = LIMIT
    await house.guard.look()
    counting.cancel()
    assert len(sizes) == len(set(sizes)) == 8


async def test_slack_goes_back_once_it_is_more_than_a_service_needs(house: House) -> None:
    await house.guard.look()
    house.machine.free = 24 * MIB
    await house.guard.look()
    assert house.machine.given_back == []
    house.machine.free = 64 * MIB
    await house.guard.look()
    assert house.machine.given_back == [64 * MIB]


async def test_slack_is_what_an_l1_of_this_size_allows_whether_it_is_full_or_not(house: House) -> None:
    empty = MemoryGuard(
        memory=MemoryCache(clock=FakeClock(), max_bytes=1024 * MIB),
        machine=house.machine,
        room=None,
        high_water=0.9,
        give_back=house.machine.give_back,
        taken=lambda: 0,
    )
    await empty.look()
    house.machine.free = 40 * MIB
    await empty.look()
    assert house.machine.given_back == []
    house.machine.free = 64 * MIB
    await empty.look()
    assert house.machine.given_back == [64 * MIB]
    empty.close()


async def test_what_calls_had_in_hand_goes_back_when_they_have_ended(house: House) -> None:
    house.guard._taken = lambda: house.memory.size_bytes + in_hand
    in_hand = 0
    await house.guard.look()
    in_hand = 200 * MIB
    house.machine.others += in_hand
    for _ in range(3):
        await house.guard.look()
    assert house.machine.given_back == []
    house.machine.others -= in_hand
    in_hand, house.machine.free = 0, 100 * MIB
    await house.guard.look()
    assert house.machine.given_back == [100 * MIB]


async def test_what_is_in_use_is_not_asked_for_again_and_again(house: House) -> None:
    await house.guard.look()
    house.machine.others += 200 * MIB  # as of pictures that the last tier has yet to take
    for _ in range(5):
        await house.guard.look()
    assert len(house.machine.given_back) == 1
    house.machine.others -= 200 * MIB
    await house.guard.look()
    house.machine.free = 64 * MIB
    await house.guard.look()
    assert len(house.machine.given_back) == 2


async def test_where_the_figures_cannot_be_read_nothing_happens(house: House) -> None:
    house.machine.is_readable = False
    house.machine.others = LIMIT
    await house.guard.look()
    assert (house.guard.shed_bytes, house.machine.given_back) == (0, [])
    house.machine.is_readable = True
    await house.guard.look()
    assert house.guard.shed_bytes


async def test_without_a_room_or_an_allocator_that_gives_back_the_guard_does_without(house: House) -> None:
    nothing_known = MemoryGuard(
        memory=house.memory, machine=house.machine, room=None, high_water=0.9, give_back=house.machine.give_back
    )
    house.machine.others = LIMIT
    await nothing_known.look()
    assert house.guard.shed_bytes == 0
    room = Room(LIMIT, is_container=False, used_bytes=house.machine.used_bytes)
    sheds_only = MemoryGuard(memory=house.memory, machine=house.machine, room=room, high_water=0.9, give_back=None)
    await sheds_only.look()
    assert sheds_only.shed_bytes
    assert house.machine.given_back == []
    nothing_known.close()
    sheds_only.close()
