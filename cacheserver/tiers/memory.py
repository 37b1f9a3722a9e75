"""L1: the entries this process served last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from cachetools import Cache, LRUCache

from cacheserver.epochs import Epochs
from cacheserver.interfaces import Clock
from cacheserver.model import CachedImage, CacheKey, Labels, Reply, buffer_of
from cacheserver.tiers.value_cache import ValueCache

EvictionPolicy = Literal["lru", "value"]
"""What goes first: what was used least recently, or what is worth least for its bytes."""

OVERHEAD_BYTES = 3_000
"""What an entry takes beside its bytes and texts: its objects, its name and its places in two dictionaries.

Measured with 100,000 entries of 100 and of 4,000 bytes, as the process's resident bytes: 2,330 bytes each, the texts
included. The rest is for what a hit leaves with them. `test_all_that_an_entry_takes_is_counted` holds it.
"""


class MemoryCache:
    """Entries in memory, one after the other going by `policy` when their bytes reach a bound.

    Synchronous, and so not a `Tier`: nothing in it can wait, and a hit must not. It belongs to the event
    loop's thread. All bytes an entry holds count, metadata too. The bytes are handed out, never copied.

    Others hold bytes of pictures too, and count them on their own: the `Keeper` those that the last tier has yet to
    take, 256 MiB at most; OpenAI's API the answers that are told again, 32 MiB; and every call and flight, what it has
    in hand. To what answers hold until it is read (calls/downloads.py) entries give way.

    Args:
        max_bytes: most that all entries together may take; 0 keeps none.
        max_entry_bytes: an entry that takes more is not admitted, lest it drive out many others.
        clock: decides what is fresh.
        policy: which entry goes first: the least recently used, or the one that is worth least (value_cache.py).
        cost: what it costs to get an entry again, in any one unit, above 0; only the policy "value" asks.
        epochs: say what was purged; it is not answered with from then on, though it may still lie here.
        stale_s: for how long after its end an entry may be of use, by partition; it lies here until then.
    """

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        *,
        clock: Clock,
        max_bytes: int = 512 * 1024 * 1024,
        max_entry_bytes: int = 32 * 1024 * 1024,
        policy: EvictionPolicy = "lru",
        cost: Callable[[CachedImage], float] = lambda _: 1,
        epochs: Epochs | None = None,
        stale_s: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._clock = clock
        self._stale_s = stale_s
        self._epochs = epochs or Epochs()
        self._max_entry_bytes = min(max_entry_bytes, max_bytes)
        self._entries: Cache[str, CachedImage] = (
            LRUCache(max_bytes, entry_bytes) if policy == "lru" else ValueCache(max_bytes, entry_bytes, cost)
        )
        self._room_bytes = max_bytes
        self._beside_bytes = 0

    def get(self, key: CacheKey) -> CachedImage | None:
        """The fresh entry stored under `key`, which counts as used; None if there is none.

        The entry's own key may name another variant: a stand-in keeps the key it was made for.
        """
        return self.named(key.name, key.digest)

    def named(self, name: str, digest: bytes) -> CachedImage | None:
        """What `get` of the key with this name and identity digest answers."""
        try:
            entry = self._entries[name]
        except KeyError:
            return None
        if not entry.key.digest.startswith(digest):
            return None
        if entry.expire_time_s is not None and not entry.is_fresh(self._clock.now_s()):
            if self._is_of_no_use(entry):
                del self._entries[name]
            return None
        return None if self._is_hidden(entry) else entry

    def stale(self, key: CacheKey, stale_s: float) -> CachedImage | None:
        """The entry stored under `key` that expired less than `stale_s` ago; it counts as used."""
        if (entry := self._entries.get(key.name)) is None or entry.expire_time_s is None:
            return None
        now_s = self._clock.now_s()
        is_stale = not entry.is_fresh(now_s) and entry.is_fresh(now_s - stale_s)
        return entry if is_stale and key.matches(entry.key.digest) and not self._is_hidden(entry) else None

    def holds(self, name: str, entry: CachedImage) -> bool:
        """Whether `get` of the key of this name would answer with this very entry, which it did before."""
        try:
            is_here = self._entries[name] is entry
        except KeyError:
            return False
        if not is_here or self._is_hidden(entry):
            return False
        return entry.expire_time_s is None or entry.is_fresh(self._clock.now_s())

    def put(self, key: CacheKey, entry: CachedImage) -> None:
        """Keep `entry` under `key` in place of what was there; too large an entry leaves the place empty."""
        if not self._admits(entry):
            # What was there is older than what the caller has, and must not be served in its stead.
            self.delete(key)
            return
        self._entries[key.name] = entry
        self._drop_what_is_above()

    def move_end(self, entry: CachedImage) -> None:
        """Keep `entry` in place of the same picture with an earlier end, if that lies under its own key."""
        had = self.lying(entry.key)
        if had is not None and entry.outlasts(had) and had.image.sha256 == entry.image.sha256:
            self.put(entry.key, replace(had, expire_time_s=entry.expire_time_s))

    def shed(self, to_bytes: int) -> None:
        """Take at most `to_bytes` from now on, or `max_bytes` if that is less; what is above goes, least worth first.

        It may grow again once it is told a larger figure.
        """
        self._room_bytes = min(to_bytes, self.max_bytes)
        self._drop_what_is_above()

    def give_way(self, beside_bytes: int) -> None:
        """Others hold so many bytes of pictures now: entries and those take together what entries may take alone.

        Also where they are the bytes of entries: such an entry may go at any time, and its bytes would stay.
        """
        self._beside_bytes = beside_bytes
        self._drop_what_is_above()

    def keep_reply(self, entry: CachedImage, reply: Reply) -> CachedImage:
        """Keep a finished reply with its entry: in one buffer, the picture a view. The entry as it is kept.

        That is `entry` itself, without the reply, if it does not lie under its own key any more, or would take more
        than an entry may.
        """
        if self._under(entry.key.name) is not entry:
            return entry
        within = entry.within(reply)
        if not self._admits(within):
            return entry
        self.put(entry.key, within)
        return within

    def contains(self, key: CacheKey) -> bool:
        """Whether `get` would answer; it is no use."""
        return self.peek(key) is not None

    def peek(self, key: CacheKey) -> CachedImage | None:
        """What `get` would answer; it is no use."""
        entry = self._under(key.name)
        if entry is None or not key.matches(entry.key.digest) or not entry.is_fresh(self._clock.now_s()):
            return None
        return None if self._is_hidden(entry) else entry

    def delete(self, key: CacheKey) -> bool:
        """Drop what is stored under `key`; whether there was something."""
        name = key.name
        if name not in self._entries:
            return False
        del self._entries[name]  # not pop: it would be a use
        return True

    def scan(self, partition: str | None = None) -> list[CacheKey]:
        """Every key, or those of a partition, in no order. Stand-ins included."""
        keys = (CacheKey.parse(name) for name in self._entries)
        return [key for key in keys if partition in (None, key.partition)]

    def names(self) -> list[str]:
        """The name of every key, in no order."""
        return list(self._entries)

    def forget(self, name: str, match: Callable[[CachedImage], bool]) -> bool:
        """Remove what lies under `name` if it matches; whether it did."""
        entry = self._under(name)
        if entry is None or not match(entry):
            return False
        del self._entries[name]
        return True

    def lying(self, key: CacheKey) -> CachedImage | None:
        """What lies under `key`, be it expired or purged; it is no use."""
        return self._under(key.name)

    def labels(self, key: CacheKey) -> Labels | None:
        """The labels of the entry under `key`; None if there is none."""
        entry = self._under(key.name)
        if entry is None:
            return None
        return Labels(entry.namespace, entry.tags, entry.derived_from, entry.epoch, entry.carried_from)

    @property
    def size_bytes(self) -> int:
        """How much the entries take now."""
        return int(self._entries.currsize)

    @property
    def room_bytes(self) -> int:
        """How much they may take now: `max_bytes`, or less once some had to be `shed`."""
        return self._room_bytes

    @property
    def max_bytes(self) -> int:
        """How much they may ever take."""
        return int(self._entries.maxsize)

    def __len__(self) -> int:
        return len(self._entries)

    def _admits(self, entry: CachedImage) -> bool:
        """Whether it may come: it is no larger than entries may be, nor than all of them together now."""
        return entry_bytes(entry) <= min(self._max_entry_bytes, self._room_bytes - self._beside_bytes)

    def _drop_what_is_above(self) -> None:
        to_bytes = max(0, self._room_bytes - self._beside_bytes)
        while self._entries.currsize > to_bytes:
            self._entries.popitem()

    def _is_of_no_use(self, entry: CachedImage) -> bool:
        """Whether an entry expired so long ago that nobody may be answered with it."""
        return not entry.is_fresh(self._clock.now_s() - self._stale_s.get(entry.key.partition, 0.0))

    def _is_hidden(self, entry: CachedImage) -> bool:
        epochs = self._epochs
        return (entry.epoch < epochs.newest or epochs.hides_all) and epochs.hides(entry)

    def _under(self, name: str) -> CachedImage | None:
        # The policies' own lookups would be a use.
        return Cache.__getitem__(self._entries, name) if name in self._entries else None


def entry_bytes(entry: CachedImage) -> int:
    """How much memory an entry takes: its bytes, its texts at up to four bytes a character, its objects."""
    image = entry.image
    texts = (entry.namespace, *entry.tags, image.model, image.revised_prompt, image.upstream_request_id)
    beside_reply = 0 if entry.reply is None else entry.reply.latest_bytes
    # All of a reply, or of what a lower tier stored, where the picture is a view of it.
    return OVERHEAD_BYTES + beside_reply + len(buffer_of(image.data)) + sum(64 + 4 * len(text) for text in texts)
