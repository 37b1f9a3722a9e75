"""L1 behaves like a dictionary with losses and never holds more than its bytes, whatever goes first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cacheserver.model import CachedImage, CacheKey, Labels, MatchLevel, Reply
from cacheserver.tiers.memory import EvictionPolicy, MemoryCache, entry_bytes
from tests.fakes import FakeClock
from tests.tier_contract import StoreContract, make_entry, make_key, with_data


@pytest.fixture(params=["lru", "value"])
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    policy: EvictionPolicy = request.param
    return policy


class AsStore:
    """Memory behind the calls that the shared cases use."""

    def __init__(self, memory: MemoryCache) -> None:
        self._memory = memory

    async def get(self, key: CacheKey) -> CachedImage | None:
        return self._memory.get(key)

    async def find(self, keys: Sequence[CacheKey]) -> list[bool]:
        return [self._memory.contains(key) for key in keys]

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:  # noqa: ARG002 - it always does
        self._memory.put(key, entry)
        return True

    async def delete(self, key: CacheKey) -> bool:
        return self._memory.delete(key)

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        for key in self._memory.scan(partition):
            yield key

    async def labels(self, key: CacheKey) -> Labels | None:
        return self._memory.labels(key)


class TestMemoryAsStore(StoreContract):
    @pytest.fixture
    def tier(self, clock: FakeClock, policy: EvictionPolicy) -> AsStore:
        return AsStore(MemoryCache(clock=clock, policy=policy))


ONE_KILOBYTE = entry_bytes(make_entry(data=bytes(1000)))


class MemoryFor(Protocol):
    """A memory that has room for so many entries of a kilobyte."""

    def __call__(self, entries: int, *, max_entry_bytes: int = 1_000_000) -> MemoryCache: ...


@pytest.fixture
def memory_for(clock: FakeClock, policy: EvictionPolicy) -> MemoryFor:
    def memory_for(entries: int, *, max_entry_bytes: int = 1_000_000) -> MemoryCache:
        max_bytes = entries * ONE_KILOBYTE
        return MemoryCache(clock=clock, max_bytes=max_bytes, max_entry_bytes=max_entry_bytes, policy=policy)

    return memory_for


def put(memory: MemoryCache, prompt: str, data: bytes = bytes(1000)) -> CachedImage:
    entry = make_entry(make_key(prompt), data)
    memory.put(entry.key, entry)
    return entry


def reply_of(entry: CachedImage, *, rest: int = 50) -> Reply:
    """A finished reply with so many bytes around the picture."""
    head = bytes(rest // 2)
    raw = head + bytes(entry.image.data) + bytes(rest - len(head))
    return Reply(raw, len(head), MatchLevel.EXACT, 0)


def test_what_was_used_stays_and_what_was_not_goes(memory_for: MemoryFor) -> None:
    memory = memory_for(2)
    put(memory, "a")
    put(memory, "b")
    memory.get(make_key("a"))
    put(memory, "c")
    assert [memory.contains(make_key(prompt)) for prompt in "abc"] == [True, False, True]


@pytest.mark.parametrize(("policy", "left"), [("lru", ["b", "c"]), ("value", ["a", "c"])], indirect=["policy"])
def test_the_least_recently_used_goes_first_or_the_one_used_least_often(memory_for: MemoryFor, left: list[str]) -> None:
    memory = memory_for(2)
    for prompt, uses in (("a", 3), ("b", 1), ("c", 0)):
        put(memory, prompt)
        for _ in range(uses):
            memory.get(make_key(prompt))
    assert [prompt for prompt in "abc" if memory.contains(make_key(prompt))] == left


def test_looking_without_getting_is_no_use(memory_for: MemoryFor) -> None:
    memory = memory_for(2)
    put(memory, "a")
    put(memory, "b")
    assert memory.contains(make_key("a"))
    assert memory.peek(make_key("a")) is not None
    assert memory.labels(make_key("a")) is not None
    put(memory, "c")
    assert not memory.contains(make_key("a"))


def test_the_bytes_are_handed_out_and_not_copied(memory_for: MemoryFor) -> None:
    memory = memory_for(2)
    entry = put(memory, "a")
    got = memory.get(entry.key)
    assert got is not None
    assert got.image.data is entry.image.data


def test_an_entry_above_the_limit_is_not_admitted_and_drives_nothing_out(memory_for: MemoryFor) -> None:
    memory = memory_for(3, max_entry_bytes=2 * ONE_KILOBYTE)
    put(memory, "a")
    put(memory, "big", bytes(2 * ONE_KILOBYTE))
    assert not memory.contains(make_key("big"))
    assert memory.contains(make_key("a"))


def test_an_older_entry_is_not_served_in_place_of_one_too_large(memory_for: MemoryFor) -> None:
    memory = memory_for(3, max_entry_bytes=2 * ONE_KILOBYTE)
    old = put(memory, "a")
    memory.put(old.key, with_data(old, bytes(2 * ONE_KILOBYTE)))
    assert memory.get(old.key) is None
    assert memory.size_bytes == 0


def test_an_expired_entry_gives_its_bytes_back(memory_for: MemoryFor, clock: FakeClock) -> None:
    memory = memory_for(3)
    entry = make_entry(expire_time_s=clock.now_s() + 1)
    memory.put(entry.key, entry)
    clock.advance(1)
    assert not memory.contains(entry.key)
    assert memory.get(entry.key) is None
    assert (len(memory), memory.size_bytes) == (0, 0)


def test_an_expired_entry_is_kept_while_somebody_may_be_answered_with_it(clock: FakeClock) -> None:
    entry = make_entry(expire_time_s=clock.now_s() + 1)
    memory = MemoryCache(clock=clock, stale_s={entry.key.partition: 10.0})
    memory.put(entry.key, entry)
    assert memory.stale(entry.key, 10) is None
    clock.advance(6)
    assert memory.get(entry.key) is None
    assert (memory.stale(entry.key, 10), memory.stale(entry.key, 5)) == (entry, None)
    clock.advance(5)
    assert memory.stale(entry.key, 10) is None
    assert memory.get(entry.key) is None
    assert len(memory) == 0


def test_memory_of_no_bytes_keeps_nothing(memory_for: MemoryFor) -> None:
    memory = memory_for(0)
    put(memory, "a", b"")
    assert len(memory) == 0


def test_long_texts_count(memory_for: MemoryFor) -> None:
    memory = memory_for(3)
    before = entry_bytes(make_entry(revised_prompt=""))
    assert entry_bytes(make_entry(revised_prompt="猫" * 1000)) == before + 4000
    assert memory.size_bytes == 0


def test_what_is_shed_is_used_least_and_no_more_comes_until_it_may(memory_for: MemoryFor) -> None:
    memory = memory_for(4)
    for prompt in "abcd":
        put(memory, prompt)
    memory.get(make_key("a"))
    memory.shed(2 * ONE_KILOBYTE + 1)
    assert [memory.contains(make_key(prompt)) for prompt in "abcd"] == [True, False, False, True]
    put(memory, "e")
    assert [memory.contains(make_key(prompt)) for prompt in "ade"] == [True, False, True]
    memory.shed(10 * ONE_KILOBYTE)
    assert memory.room_bytes == memory.max_bytes == 4 * ONE_KILOBYTE
    for prompt in "fghi":
        put(memory, prompt)
    assert memory.size_bytes == 4 * ONE_KILOBYTE


def test_an_entry_above_what_is_left_after_shedding_drives_nothing_out(memory_for: MemoryFor) -> None:
    memory = memory_for(4)
    for prompt in "abcd":
        put(memory, prompt)
    memory.shed(2 * ONE_KILOBYTE)
    put(memory, "big", bytes(2 * ONE_KILOBYTE))
    assert [memory.contains(make_key(prompt)) for prompt in ("c", "d", "big")] == [True, True, False]


def test_an_entry_whose_reply_makes_it_too_large_stays_as_it_is(memory_for: MemoryFor) -> None:
    memory = memory_for(3, max_entry_bytes=ONE_KILOBYTE)
    entry = put(memory, "a")
    assert memory.keep_reply(entry, reply_of(entry)) is entry
    assert memory.get(entry.key) is entry
    assert memory.size_bytes == ONE_KILOBYTE


def test_memory_that_shed_all_keeps_nothing(memory_for: MemoryFor) -> None:
    memory = memory_for(2)
    put(memory, "a")
    memory.shed(0)
    put(memory, "b")
    assert (len(memory), memory.size_bytes) == (0, 0)


def test_entries_give_way_to_what_others_hold_and_come_back_when_it_is_let_go(memory_for: MemoryFor) -> None:
    memory = memory_for(4)
    for prompt in "abcd":
        put(memory, prompt)
    memory.give_way(2 * ONE_KILOBYTE)
    assert [memory.contains(make_key(prompt)) for prompt in "abcd"] == [False, False, True, True]
    put(memory, "e")
    put(memory, "big", bytes(2 * ONE_KILOBYTE))
    assert [memory.contains(make_key(prompt)) for prompt in ("d", "e", "big")] == [True, True, False]
    memory.shed(ONE_KILOBYTE)  # of that, too, others hold more than there is
    memory.give_way(9 * ONE_KILOBYTE)
    assert len(memory) == 0
    memory.shed(4 * ONE_KILOBYTE)
    memory.give_way(0)
    for prompt in "fghi":
        put(memory, prompt)
    assert memory.size_bytes == 4 * ONE_KILOBYTE


_MANY_ENTRIES = """
import gc
from cacheserver import allocator
from cacheserver.clock import SystemClock
from cacheserver.machine import Machine
from cacheserver.tiers import codec
from cacheserver.tiers.memory import MemoryCache
from tests.tier_contract import make_entry, make_key

memory = MemoryCache(clock=SystemClock(), max_bytes=2**30)
gc.collect()
before = Machine().resident_bytes()
for number in range(20_000):
    entry = codec.decode(codec.encode(make_entry(make_key(f"{number}"), b"%d" % number)))  # as lower tiers give it
    memory.put(entry.key, entry)
gc.collect()
allocator.giver_back()()
print(memory.size_bytes, Machine().resident_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is known on Linux alone")
def test_all_that_an_entry_takes_is_counted() -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", _MANY_ENTRIES]
    # A process of its own: what others leave free in this one would be used first.
    printed = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True)  # noqa: S603 - our own program
    counted, resident = map(int, printed.stdout.split())
    assert counted / 2 < resident <= counted


class DictionaryWithLosses(RuleBasedStateMachine):
    """Compares memory with a dictionary: it may have lost an entry, but never has another one."""

    policy: EvictionPolicy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.memory = MemoryCache(
            clock=self.clock,
            max_bytes=4 * ONE_KILOBYTE,
            max_entry_bytes=3 * ONE_KILOBYTE,
            policy=self.policy,
        )
        self.model: dict[str, CachedImage] = {}
        self.beside_bytes = 0

    keys = st.builds(make_key, st.sampled_from("abcdefg"), variant=st.integers(0, 1))

    @rule(key=keys, size=st.integers(0, 4 * ONE_KILOBYTE), lasts_s=st.none() | st.integers(1, 20))
    def put(self, key: CacheKey, size: int, lasts_s: int | None) -> None:
        expire_time_s = None if lasts_s is None else self.clock.now_s() + lasts_s
        entry = make_entry(key, bytes(size), expire_time_s=expire_time_s)
        self.memory.put(key, entry)
        self.model[key.name] = entry
        # What was just put is there, unless it is above the limit, or some have to go and it is worth least.
        left_bytes = self.memory.room_bytes - self.beside_bytes
        if entry_bytes(entry) > min(3 * ONE_KILOBYTE, left_bytes):
            assert not self.memory.contains(key)
        elif self.policy == "lru" or left_bytes == self.memory.max_bytes:
            assert self.memory.contains(key)

    @rule(key=keys)
    def get(self, key: CacheKey) -> None:
        peeked = self.memory.peek(key)
        entry = self.memory.get(key)
        assert peeked is entry
        if entry is not None:
            assert entry is self.model[key.name]
            assert entry.is_fresh(self.clock.now_s())

    @rule(key=keys, rest=st.integers(0, ONE_KILOBYTE))
    def keep_reply(self, key: CacheKey, rest: int) -> None:
        entry = self.memory.peek(key)
        if entry is None:
            return
        told = self.memory.keep_reply(entry, reply_of(entry, rest=rest))
        assert bytes(told.image.data) == bytes(entry.image.data)
        self.model[key.name] = told
        kept = self.memory.peek(key)
        assert kept is told or kept is None

    @rule(to_bytes=st.integers(0, 5 * ONE_KILOBYTE))
    def shed(self, to_bytes: int) -> None:
        self.memory.shed(to_bytes)

    @rule(beside_bytes=st.integers(0, 5 * ONE_KILOBYTE))
    def give_way(self, beside_bytes: int) -> None:
        self.memory.give_way(beside_bytes)
        self.beside_bytes = beside_bytes

    @rule(key=keys)
    def delete(self, key: CacheKey) -> None:
        was_there = self.memory.labels(key) is not None
        assert self.memory.delete(key) == was_there
        self.model.pop(key.name, None)
        assert self.memory.get(key) is None

    @rule(seconds=st.integers(1, 10))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @invariant()
    def never_above_its_bytes(self) -> None:
        assert self.memory.room_bytes <= self.memory.max_bytes
        assert self.memory.size_bytes <= max(0, self.memory.room_bytes - self.beside_bytes)

    @invariant()
    def counts_every_byte(self) -> None:
        held = [self.model[key.name] for key in self.memory.scan("studio")]
        assert self.memory.size_bytes == sum(entry_bytes(entry) for entry in held)
        assert len(self.memory) == len(held)


class DictionaryWithLossesByValue(DictionaryWithLosses):
    policy = "value"


TestDictionaryWithLosses = pytest.mark.no_cover(DictionaryWithLosses.TestCase)
TestDictionaryWithLossesByValue = pytest.mark.no_cover(DictionaryWithLossesByValue.TestCase)
for each in (TestDictionaryWithLosses, TestDictionaryWithLossesByValue):
    each.settings = settings(max_examples=60, stateful_step_count=40)
