"""The policy "value": what goes is always what a plain reading of its rule names, and a scan drives out little."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cacheserver.tiers import value_cache
from cacheserver.tiers.memory import MemoryCache, entry_bytes
from cacheserver.tiers.value_cache import ASKS_PER_ENTRY, LEAST_ASKS, MOST_COUNTED, ValueCache
from tests.fakes import FakeClock
from tests.tier_contract import make_entry, make_key

MAX_BYTES = 1_000
SHORT_GENERATION = 5
"""In asks, with two more for each entry: short enough for counts to fade within an example."""


@dataclass(frozen=True)
class Entry:
    size: int
    cost: float = 1.0
    content: int = 0


def cache_for(max_bytes: int = MAX_BYTES) -> ValueCache[str, Entry]:
    return ValueCache(max_bytes, lambda entry: entry.size, lambda entry: entry.cost)


class PlainReading:
    """The rule as value_cache.py words it, with nothing done ahead: every eviction looks at every entry."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.priorities: dict[str, tuple[float, int]] = {}
        self.clock = 0.0
        self.turn = 0
        self.generation = SHORT_GENERATION
        self.now: Counter[str] = Counter()
        self.before: Counter[str] = Counter()

    def get(self, key: str) -> Entry | None:
        if key not in self.entries:
            return None
        asked = self._ask(key)
        self._give_priority(key, asked, at_least=self.priorities[key][0])
        return self.entries[key]

    def put(self, key: str, entry: Entry) -> None:
        is_new = key not in self.entries
        while sum(each.size for each in (self.entries | {key: entry}).values()) > MAX_BYTES:
            self.evict()
        self.entries[key] = entry
        self.generation = max(SHORT_GENERATION, 2 * len(self.entries))
        asked = self._ask(key) if is_new else max(1, self._lately(key))
        self._give_priority(key, asked, at_least=0.0)

    def delete(self, key: str) -> None:
        self.entries.pop(key, None)

    def evict(self) -> tuple[str, Entry]:
        lowest = min(self.entries, key=self.priorities.__getitem__)
        self.clock = self.priorities[lowest][0]
        return lowest, self.entries.pop(lowest)

    def _ask(self, key: str) -> float:
        self.now[key] += 1
        asked = self._lately(key)
        if self.now.total() >= self.generation:
            self.before, self.now = self.now, Counter()
        return asked

    def _lately(self, key: str) -> float:
        return min(MOST_COUNTED, self.now[key] + self.before[key] / 2)

    def _give_priority(self, key: str, asked: float, *, at_least: float) -> None:
        entry = self.entries[key]
        self.turn += 1
        self.priorities[key] = max(at_least, self.clock + asked**2 * (entry.cost / entry.size)), self.turn


class ByItsRule(RuleBasedStateMachine):
    """Compares the cache with the plain reading: they hold the same entries after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(value_cache, "LEAST_ASKS", SHORT_GENERATION)
        self.patch.setattr(value_cache, "ASKS_PER_ENTRY", 2)
        self.cache = cache_for()
        self.model = PlainReading()

    def teardown(self) -> None:
        self.patch.undo()

    keys = st.sampled_from("abcdefghij")
    entries = st.builds(Entry, st.integers(1, 400), st.sampled_from([1.0, 2.0, 50.0]), st.integers(0, 9))

    @rule(key=keys, times=st.integers(1, 20))
    def get(self, key: str, times: int) -> None:
        for _ in range(times):
            assert self.cache.get(key) == self.model.get(key)

    @rule(key=keys, entry=entries)
    def put(self, key: str, entry: Entry) -> None:
        self.cache[key] = entry
        self.model.put(key, entry)

    @rule(key=keys)
    def delete(self, key: str) -> None:
        if key in self.cache:
            del self.cache[key]
        self.model.delete(key)

    @rule(key=keys, size=st.integers(MAX_BYTES + 1, 2 * MAX_BYTES))
    def put_what_is_too_large(self, key: str, size: int) -> None:
        with pytest.raises(ValueError, match="too large"):
            self.cache[key] = Entry(size)

    @rule()
    def evict(self) -> None:
        if self.model.entries:
            assert self.cache.popitem() == self.model.evict()
        else:
            with pytest.raises(KeyError):
                self.cache.popitem()

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.entries.clear()

    @invariant()
    def holds_what_the_rule_leaves(self) -> None:
        assert set(self.cache) == set(self.model.entries)

    @invariant()
    def counts_every_byte_and_never_has_too_many(self) -> None:
        assert self.cache.currsize == sum(entry.size for entry in self.model.entries.values()) <= MAX_BYTES

    @invariant()
    def keeps_its_books_short(self) -> None:
        assert len(self.cache._heap) <= 2 * len(self.cache) + 1


TestByItsRule = pytest.mark.no_cover(ByItsRule.TestCase)
TestByItsRule.settings = settings(max_examples=150, stateful_step_count=60)


@given(
    others=st.integers(1, 20),
    scanned=st.integers(0, 100),
    cost=st.floats(0.001, 1_000_000),
    again=st.booleans(),
)
def test_a_scan_drives_out_nothing_of_its_like_that_was_asked_for_twice(
    others: int, scanned: int, cost: float, *, again: bool
) -> None:
    size = 10
    cache = cache_for((1 + others) * size)
    cache["asked twice"] = Entry(size, cost)
    assert cache["asked twice"]
    for number in range(scanned if again else min(scanned, 3 * others)):
        cache[f"scanned {number}"] = Entry(size, cost)
        if again and number % (3 * others) == 0:
            assert cache["asked twice"]
    assert "asked twice" in cache


def test_what_is_no_longer_asked_for_goes_in_the_end() -> None:
    cache = cache_for(100)
    cache["old"] = Entry(10)
    for _ in range(100_000):
        assert cache["old"]
    newcomers = 0
    while "old" in cache:
        cache[f"new {newcomers}"] = Entry(10)
        newcomers += 1
    assert newcomers < 2 * MOST_COUNTED**2 * 10


def test_a_hit_makes_nothing_worth_less_though_what_was_asked_before_is_forgotten() -> None:
    cache = cache_for(100)
    for key, hits in (("a", 10), ("b", 4)):
        cache[key] = Entry(10)
        for _ in range(hits):
            assert cache[key]
    cache["other"] = Entry(10)
    for _ in range(2 * LEAST_ASKS):
        assert cache["other"]
    assert cache["a"]
    assert [cache.popitem()[0] for _ in range(3)] == ["b", "a", "other"]


def test_of_what_is_asked_for_alike_the_larger_and_the_cheaper_go_first() -> None:
    cache = cache_for(100)
    cache["large"] = Entry(30)
    cache["small"] = Entry(10)
    cache["large and dear"] = Entry(30, cost=6)
    assert [cache.popitem()[0] for _ in range(3)] == ["large", "small", "large and dear"]


def test_a_key_that_went_is_remembered_when_it_comes_back() -> None:
    cache = cache_for(30)
    for key in ("a", "b", "c"):
        cache[key] = Entry(10)
    del cache["a"]
    cache["a"] = Entry(10)
    assert [cache.popitem()[0] for _ in range(3)] == ["b", "c", "a"]


def test_what_is_put_in_the_place_of_another_was_not_asked_for() -> None:
    cache = cache_for(30)
    for key in ("a", "b", "c"):
        cache[key] = Entry(10)
    for _ in range(10):
        cache["a"] = Entry(10)
    cache["b"] = Entry(10)
    assert [cache.popitem()[0] for _ in range(3)] == ["c", "a", "b"]


@pytest.mark.parametrize("is_away", [False, True])
def test_counts_are_halved_and_then_forgotten_whether_there_is_an_entry_or_not(*, is_away: bool) -> None:
    cache = cache_for(100)
    cache["other"] = Entry(1)
    cache["a"] = Entry(1)
    for _ in range(5):
        assert cache["a"]
    worths = []
    for _ in range(2):
        if is_away:
            del cache["a"]
        for _ in range(LEAST_ASKS):
            assert cache["other"]
        cache["a"] = Entry(1)
        worths.append(cache._kept["a"].priority)
    assert worths == ([4**2, (1 / 2 + 1) ** 2] if is_away else [3**2, 1])  # one that comes back was asked for once more


@pytest.mark.parametrize(("asks_per_entry", "most_asks"), [(ASKS_PER_ENTRY, LEAST_ASKS), (1_000_000, 3_000)])
def test_as_many_keys_are_remembered_as_two_generations_have_asks(
    monkeypatch: pytest.MonkeyPatch, asks_per_entry: int, most_asks: int
) -> None:
    monkeypatch.setattr(value_cache, "ASKS_PER_ENTRY", asks_per_entry)
    monkeypatch.setattr(value_cache, "MOST_ASKS", most_asks)
    cache = cache_for(10)
    most = 0
    for number in range(5 * most_asks):
        cache[f"scanned {number}"] = Entry(5)
        most = max(most, len(cache._asked))
    assert most_asks < most <= 2 * most_asks


def test_memory_evicts_by_the_cost_it_is_given(clock: FakeClock) -> None:
    entries = {prompt: make_entry(make_key(prompt)) for prompt in ("dear", "cheap", "third")}
    dear = entries["dear"].key.name
    memory = MemoryCache(
        clock=clock,
        max_bytes=2 * entry_bytes(entries["dear"]),
        policy="value",
        cost=lambda entry: 100 if entry.key.name == dear else 1,
    )
    for entry in entries.values():
        memory.put(entry.key, entry)
    assert [memory.contains(make_key(prompt)) for prompt in entries] == [True, False, True]


def test_an_empty_memory_is_there_all_the_same(clock: FakeClock) -> None:
    """`len` makes it falsy: whoever asks whether there is a memory must ask for None."""
    memory = MemoryCache(clock=clock, policy="value")
    assert not memory
    assert memory.get(make_key("a")) is None
