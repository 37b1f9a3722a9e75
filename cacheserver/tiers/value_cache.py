"""What L1 keeps under the policy "value": the entries that are worth most for the bytes they take."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cachetools import Cache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MOST_COUNTED = 16
"""Being asked for more often than this is worth no more, lest what was in demand once stay long after it."""

ASKS_PER_ENTRY = 20
"""A generation of counts ends after so many for each entry there is."""

LEAST_ASKS, MOST_ASKS = 1_000, 200_000
"""Bounds of a generation's length, and so of the keys it remembers: at the most two of them take 35 MB."""


class _Kept(Generic[K, V]):
    """An entry, how often its key was asked for lately, and what it is worth.

    `asked` counts in the generation of this number, `asked_before` in the one before it. `turn` is when `priority` was
    given. `per_byte` is what the priority grows by where the key is asked for once: cost per byte.
    """

    __slots__ = ("asked", "asked_before", "generation", "key", "per_byte", "priority", "turn", "value")

    def __init__(self, key: K, value: V, *, generation: int, asked: int, asked_before: int) -> None:
        self.key = key
        self.value = value
        self.generation = generation
        self.asked = asked
        self.asked_before = asked_before
        self.per_byte = self.priority = 0.0
        self.turn = 0

    def fade(self, generation: int) -> None:
        """Count in this generation from now on."""
        self.asked_before = self.asked if self.generation == generation - 1 else 0
        self.asked, self.generation = 0, generation


class ValueCache(Cache[K, V]):
    """Entries by what they are worth per byte, the lowest priority going first when their bytes reach a bound.

    An entry's priority is `clock + asked**2 * cost / size`. `clock` is the priority of what went last, so that what is
    no longer asked for sinks below newcomers. `asked` is how often the key was asked for lately, in this generation of
    so many asks and half as often as in the last one: each hit counts, and each time an entry comes that was not there,
    since it was asked for and had to be brought. An entry has its counts with it, and leaves them behind when it goes
    (`Asked`). So a scan, whose keys are asked for once, has to go through the cache more than three times
    before it drives out one of its like that was asked for twice. Of equal priorities the older goes first.

    This is GreedyDual-Size-Frequency (Cherkasova, HP Labs 1998) with the memory of TinyLFU (Einziger et al., ACM ToS
    2017) and the square of the frequency. A hit costs O(1), an entry that comes or goes O(log n), amortized.

    Args:
        maxsize: most that all entries together may take.
        getsizeof: what an entry takes, above 0.
        getcost: what it costs to get an entry again, in any one unit, above 0.
    """

    def __init__(
        self, maxsize: int, getsizeof: Callable[[V], int], getcost: Callable[[V], float] = lambda _: 1
    ) -> None:
        super().__init__(maxsize, getsizeof)
        self._getcost = getcost
        self._asked = Asked()
        self._generation = 0
        self._asks_left = self._asks = LEAST_ASKS
        self._clock = 0.0
        self._turn = 0
        self._kept: dict[K, _Kept[K, V]] = {}
        self._heap: list[tuple[float, int, K]] = []
        """For each entry at least one priority, turn and key that are not above what they are now.

        Hits leave it behind; `popitem` catches up.
        """

    def __getitem__(self, key: K) -> V:
        """The entry, which was asked for; raises KeyError."""
        # On the way of every hit: there is one look into one dictionary, and calls would take half of the time.
        kept = self._kept[key]
        if kept.generation != self._generation:
            kept.fade(self._generation)
        kept.asked = count = kept.asked + 1
        asked = count + kept.asked_before / 2
        if asked > MOST_COUNTED:  # noqa: PLR1730 - as above
            asked = MOST_COUNTED
        priority = self._clock + asked * asked * kept.per_byte
        if priority > kept.priority:  # noqa: PLR1730 - as above
            kept.priority = priority  # else counts have faded; what is asked for does not sink for that
        kept.turn = self._turn = self._turn + 1
        self._asks_left = left = self._asks_left - 1
        if left <= 0:
            self._end_generation()
        return kept.value

    def __setitem__(self, key: K, value: V) -> None:
        """Keep an entry; raises ValueError if it is larger than the whole cache."""
        per_byte = self._getcost(value) / self.getsizeof(value)
        is_new = key not in self._kept
        super().__setitem__(key, value)
        kept = self._kept.get(key)
        if kept is None:  # what was there may have gone to make room
            asked, before = self._asked.recall(key)
            kept = _Kept(key, value, generation=self._generation, asked=asked, asked_before=before)
            self._kept[key] = kept
        self._set_asks()
        kept.value, kept.per_byte, kept.priority = value, per_byte, 0.0
        if is_new:
            self.__getitem__(key)
        else:
            self._value_as_asked(kept)
        heapq.heappush(self._heap, (kept.priority, kept.turn, key))
        self._sweep()

    def __delitem__(self, key: K) -> None:
        """Drop an entry; raises KeyError."""
        super().__delitem__(key)
        self._leave(self._kept.pop(key))
        self._sweep()

    def popitem(self) -> tuple[K, V]:
        """Drop the entry of the lowest priority and return it with its key; raises KeyError if there is none."""
        heap = self._heap
        while heap:
            priority, turn, key = heap[0]
            kept = self._kept.get(key)
            if kept is None:
                heapq.heappop(heap)
            elif turn != kept.turn:
                heapq.heapreplace(heap, (kept.priority, kept.turn, key))
            else:
                heapq.heappop(heap)
                self._clock = priority
                del self[key]
                return key, kept.value
        raise KeyError("the cache is empty")

    def clear(self) -> None:
        """Drop all entries. What was asked for is remembered."""
        super().clear()
        for kept in self._kept.values():
            self._leave(kept)
        self._kept.clear()
        self._heap.clear()

    def _value_as_asked(self, kept: _Kept[K, V]) -> None:
        """Say what an entry is worth that was put in the place of another: as often as that was asked for, or once."""
        if kept.generation != self._generation:
            kept.fade(self._generation)
        asked = min(MOST_COUNTED, max(1, kept.asked + kept.asked_before / 2))
        kept.priority = self._clock + asked * asked * kept.per_byte
        kept.turn = self._turn = self._turn + 1

    def _leave(self, kept: _Kept[K, V]) -> None:
        """An entry goes, and its counts stay."""
        if kept.generation != self._generation:
            kept.fade(self._generation)
        self._asked.remember(kept.key, kept.asked, kept.asked_before)

    def _set_asks(self) -> None:
        """How long a generation is goes by how many entries there are."""
        asks = min(MOST_ASKS, max(LEAST_ASKS, ASKS_PER_ENTRY * len(self._kept)))
        self._asks_left += asks - self._asks
        self._asks = asks

    def _end_generation(self) -> None:
        self._generation += 1
        self._asks_left = self._asks
        self._asked.fade()

    def _sweep(self) -> None:
        """Leave out of the heap what is not so any more, once that is more than half of it."""
        if len(self._heap) > 2 * len(self._kept) + 1:
            self._heap = [(kept.priority, kept.turn, key) for key, kept in self._kept.items()]
            heapq.heapify(self._heap)


class Asked:
    """How often keys that have no entry were asked for, in this generation and in the last one.

    Keys are told apart by their hashes of 64 bits, so a remembered key takes no more than a place in a dictionary.
    """

    def __init__(self) -> None:
        self._now: dict[int, int] = {}
        self._before: dict[int, int] = {}

    def remember(self, key: Hashable, now: int, before: int) -> None:
        """The entry of the key goes, which was asked for so often in either generation."""
        name = hash(key)
        if now:
            self._now[name] = now
        if before:
            self._before[name] = before

    def recall(self, key: Hashable) -> tuple[int, int]:
        """The same of a key that has an entry again; nothing is remembered of it here any more."""
        name = hash(key)
        return self._now.pop(name, 0), self._before.pop(name, 0)

    def fade(self) -> None:
        """Another generation begins."""
        self._before, self._now = self._now, {}

    def __len__(self) -> int:
        """How many counts are kept."""
        return len(self._now) + len(self._before)
