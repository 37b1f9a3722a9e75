"""What L1 keeps under the policy "value": the entries that are worth most for the bytes they take."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import TypeVar

from cachetools import Cache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MOST_COUNTED = 16
"""Being asked for more often than this is worth no more, lest what was in demand once stay long after it."""

ASKS_PER_ENTRY = 20
"""A generation of counts ends after so many for each entry there is."""

LEAST_ASKS, MOST_ASKS = 1_000, 200_000
"""Bounds of a generation's length, and so of the keys it remembers: at the most two of them take 35 MB."""

_Worth = tuple[float, int, K, float]
"""Priority, when it was given, key, and what the priority grows by where the key is asked for once: cost per byte."""


class ValueCache(Cache[K, V]):
    """Entries by what they are worth per byte, the lowest priority going first when their bytes reach a bound.

    An entry's priority is `clock + asked**2 * cost / size`. `clock` is the priority of what went last, so that what is
    no longer asked for sinks below newcomers. `asked` is how often the key was asked for lately, entries that went
    included (`Asked`): each hit counts, and each time an entry comes that was not there, since it was asked for and
    had to be brought. So a scan, whose keys are asked for once, has to go through the cache more than three times
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
        self._clock = 0.0
        self._turn = 0
        self._worths: dict[K, _Worth[K]] = {}
        self._heap: list[_Worth[K]] = []
        """For each entry at least one item that is not above its worth. Hits leave it behind; `popitem` catches up."""

    def __getitem__(self, key: K) -> V:
        """The entry, which was asked for; raises KeyError."""
        # On the way of every hit: calls to super(), len, min and max would take half of its time.
        value = Cache.__getitem__(self, key)
        before, _, _, per_byte = self._worths[key]
        asked = self._asked.again(key)
        priority = self._clock + asked * asked * per_byte
        self._turn = turn = self._turn + 1
        if priority < before:  # noqa: PLR1730 - as above
            priority = before  # counts have faded; what is asked for does not sink for that
        self._worths[key] = (priority, turn, key, per_byte)
        return value

    def __setitem__(self, key: K, value: V) -> None:
        """Keep an entry; raises ValueError if it is larger than the whole cache."""
        is_new = key not in self
        super().__setitem__(key, value)
        self._asked.last_for(len(self))
        asked = self._asked.again(key) if is_new else self._asked.lately(key)
        per_byte = self._getcost(value) / self.getsizeof(value)
        self._turn += 1
        worth = self._worths[key] = (self._clock + asked * asked * per_byte, self._turn, key, per_byte)
        heapq.heappush(self._heap, worth)
        self._sweep()

    def __delitem__(self, key: K) -> None:
        """Drop an entry; raises KeyError."""
        super().__delitem__(key)
        del self._worths[key]
        self._sweep()

    def popitem(self) -> tuple[K, V]:
        """Drop the entry of the lowest priority and return it with its key; raises KeyError if there is none."""
        heap = self._heap
        while heap:
            lowest = heap[0]
            key = lowest[2]
            worth = self._worths.get(key)
            if worth is None:
                heapq.heappop(heap)
            elif worth is not lowest:
                heapq.heapreplace(heap, worth)
            else:
                heapq.heappop(heap)
                self._clock = lowest[0]
                value = super().__getitem__(key)
                del self[key]
                return key, value
        raise KeyError("the cache is empty")

    def clear(self) -> None:
        """Drop all entries. What was asked for is remembered."""
        super().clear()
        self._worths.clear()
        self._heap.clear()

    def _sweep(self) -> None:
        """Leave out of the heap what is no entry's worth any more, once that is more than half of it."""
        if len(self._heap) > 2 * len(self._worths) + 1:
            self._heap = list(self._worths.values())
            heapq.heapify(self._heap)


class Asked:
    """How often keys were asked for lately: as often as in this generation, and half as often as in the last one.

    Keys are told apart by their hashes of 64 bits, so a remembered key takes no more than a place in a dictionary.
    """

    def __init__(self) -> None:
        self._now: dict[int, int] = {}
        self._before: dict[int, int] = {}
        self._asks_left = self._generation = LEAST_ASKS

    def last_for(self, entries: int) -> None:
        """How many entries there are now, by which a generation's length goes."""
        generation = min(MOST_ASKS, max(LEAST_ASKS, ASKS_PER_ENTRY * entries))
        self._asks_left += generation - self._generation
        self._generation = generation

    def again(self, key: Hashable) -> float:
        """The key was asked for once more; how often it was lately."""
        name = hash(key)
        self._now[name] = count = self._now.get(name, 0) + 1
        asked = count + self._before.get(name, 0) / 2
        self._asks_left -= 1
        if self._asks_left <= 0:
            self._before, self._now, self._asks_left = self._now, {}, self._generation
        return asked if asked < MOST_COUNTED else MOST_COUNTED  # noqa: FURB136 - a call to min takes as long as all this

    def lately(self, key: Hashable) -> float:
        """How often the key was asked for lately, at least once: it is there."""
        name = hash(key)
        return min(MOST_COUNTED, max(1, self._now.get(name, 0) + self._before.get(name, 0) / 2))

    def __len__(self) -> int:
        """How many counts are kept."""
        return len(self._now) + len(self._before)
