"""The tiers as far as hits go: what each would have answered, told by keys, sizes and times alone.

Keys are hashes of 64 bits. `rate` is the share of all keys that a simulation sees: a cache that sees a tenth of the
keys, drawn by hash, and has a tenth of the bytes hits as often as the whole one (SHARDS: Waldspurger, FAST '15).
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict

from cacheserver.tiers.memory import OVERHEAD_BYTES

ENTRY_SHARE = 8
"""An image above this part of the memory is not kept, as by default in the service."""

MAX_ENTRY_BYTES = 32 * 1024 * 1024
"""Nor one above this."""


class MemoryReplay:
    """L1 of `max_bytes`: the least recently used goes first, all bytes of an entry count, as in tiers/memory.py.

    Not that class's LRUCache, which takes twice as long for the same; the tests hold the two together.
    """

    def __init__(self, max_bytes: int, *, rate: float = 1.0) -> None:
        self._max_bytes = int(max_bytes * rate)
        self._max_entry_bytes = min(max_bytes // ENTRY_SHARE, MAX_ENTRY_BYTES, self._max_bytes)
        self._entries: OrderedDict[int, tuple[int, float]] = OrderedDict()
        self._bytes = 0

    def get(self, key: int, now_s: float) -> bool:
        """Whether the key has a fresh entry, which becomes the most recently used."""
        entry = self._entries.get(key)
        if entry is None or now_s >= entry[1]:
            return False
        self._entries.move_to_end(key)
        return True

    def put(self, key: int, size_bytes: int, expire_s: float = math.inf) -> None:
        """Keep an entry, unless it is too large."""
        entries, entry_bytes = self._entries, OVERHEAD_BYTES + size_bytes
        replaced = entries.pop(key, None)
        self._bytes -= replaced[0] if replaced else 0
        if entry_bytes > self._max_entry_bytes:
            return
        while self._bytes + entry_bytes > self._max_bytes:
            self._bytes -= entries.popitem(last=False)[1][0]
        entries[key] = (entry_bytes, expire_s)
        self._bytes += entry_bytes


class TiersReplay:
    """Memory, then Redis for `redis_ttl_s`, then a last tier that keeps everything; an image is good for `ttl_s`.

    A miss is stored in all of them at once. A hit in Redis is copied into memory, one in the last tier into both;
    what is copied into Redis stays there as long as if it were new.
    """

    def __init__(self, memory: MemoryReplay, *, redis_ttl_s: float, ttl_s: float = math.inf) -> None:
        self._memory = memory
        self._redis_ttl_s = redis_ttl_s
        self._ttl_s = ttl_s
        self._expire_s = array("d")
        self._redis_until_s = array("d")
        self.memory_hits = 0
        self.redis_hits = 0
        self.s3_hits = 0

    def asked(self, key: int, index: int, size_bytes: int, now_s: float) -> bool:
        """Whether some tier answers; counts which.

        `index` is the key's number: 0 for the first key ever asked for, and one more for each further one.
        """
        if self._memory.get(key, now_s):
            self.memory_hits += 1
            return True
        if index == len(self._expire_s):
            self._expire_s.append(-math.inf)
            self._redis_until_s.append(-math.inf)
        is_hit = now_s < self._expire_s[index]
        if not is_hit:
            self._expire_s[index] = now_s + self._ttl_s
            self._redis_until_s[index] = now_s + self._redis_ttl_s
        elif now_s < self._redis_until_s[index]:
            self.redis_hits += 1
        else:
            self.s3_hits += 1
            self._redis_until_s[index] = now_s + self._redis_ttl_s
        self._memory.put(key, size_bytes, self._expire_s[index])
        return is_hit


def adjusted_share(hit: float, seen: float, expected: float) -> float:
    """The share that hits have of all, 0 to 1, where `seen` of the `expected` fell into the sample.

    What is missing or too much is that of a few keys asked for very often, which nearly always hit (SHARDS-adj, ibid.).
    """
    return min(1.0, max(0.0, (hit + expected - seen) / expected)) if expected else 0.0
