"""L1: the entries this process served last."""

from __future__ import annotations

from cachetools import Cache, LRUCache

from cacheserver.interfaces import Clock
from cacheserver.model import CachedImage, CacheKey, Labels, Reply

OVERHEAD_BYTES = 3_000
"""What an entry takes beside its bytes and texts: its objects, its name and its places in two dictionaries."""


class MemoryCache:
    """Entries in memory, the least recently used going first when their bytes reach a bound.

    Synchronous, and so not a `Tier`: nothing in it can wait, and a hit must not. It belongs to the event
    loop's thread. All bytes an entry holds count, metadata too. The bytes are handed out, never copied.

    Args:
        max_bytes: most that all entries together may take; 0 keeps none.
        max_entry_bytes: an entry that takes more is not admitted, lest it drive out many others.
        clock: decides what is fresh.
    """

    def __init__(
        self, *, clock: Clock, max_bytes: int = 512 * 1024 * 1024, max_entry_bytes: int = 32 * 1024 * 1024
    ) -> None:
        self._clock = clock
        self._max_entry_bytes = min(max_entry_bytes, max_bytes)
        self._entries: LRUCache[str, CachedImage] = LRUCache(maxsize=max_bytes, getsizeof=entry_bytes)

    def get(self, key: CacheKey) -> CachedImage | None:
        """The fresh entry stored under `key`, which becomes the most recently used; None if there is none.

        The entry's own key may name another variant: a stand-in keeps the key it was made for.
        """
        name = key.name
        try:
            entry = self._entries[name]
        except KeyError:
            return None
        if not key.matches(entry.key.digest):
            return None
        if not entry.is_fresh(self._clock.now_s()):
            del self._entries[name]
            return None
        return entry

    def holds(self, name: str, entry: CachedImage) -> bool:
        """Whether `get` of the key of this name would answer with this very entry, which it did before."""
        try:
            is_here = self._entries[name] is entry
        except KeyError:
            return False
        return is_here and (entry.expire_time_s is None or entry.is_fresh(self._clock.now_s()))

    def put(self, key: CacheKey, entry: CachedImage) -> None:
        """Keep `entry` under `key` in place of what was there; too large an entry leaves the place empty."""
        if entry_bytes(entry) > self._max_entry_bytes:
            # What was there is older than what the caller has, and must not be served in its stead.
            self._entries.pop(key.name, None)
            return
        self._entries[key.name] = entry

    def keep_reply(self, entry: CachedImage, reply: Reply) -> CachedImage:
        """Keep a finished reply with its entry: in one buffer, the picture a view. The entry as it is kept.

        That is `entry` itself, without the reply, if it does not lie under its own key any more.
        """
        if self._peek(entry.key) is entry:
            entry = entry.within(reply)
            self.put(entry.key, entry)
        return entry

    def contains(self, key: CacheKey) -> bool:
        """Whether `get` would answer; the order of use stays as it is."""
        entry = self._peek(key)
        return entry is not None and key.matches(entry.key.digest) and entry.is_fresh(self._clock.now_s())

    def delete(self, key: CacheKey) -> bool:
        """Drop what is stored under `key`; whether there was something."""
        return self._entries.pop(key.name, None) is not None

    def scan(self, partition: str) -> list[CacheKey]:
        """Every key of a partition, in no order. Stand-ins included."""
        keys = (CacheKey.parse(name) for name in self._entries)
        return [key for key in keys if key.partition == partition]

    def labels(self, key: CacheKey) -> Labels | None:
        """The labels of the entry under `key`; None if there is none."""
        entry = self._peek(key)
        if entry is None:
            return None
        return Labels(namespace=entry.namespace, tags=entry.tags, derived_from=entry.derived_from)

    @property
    def size_bytes(self) -> int:
        """How much the entries take now."""
        return int(self._entries.currsize)

    def __len__(self) -> int:
        return len(self._entries)

    def _peek(self, key: CacheKey) -> CachedImage | None:
        name = key.name
        # LRUCache's own lookup would make the entry the most recently used.
        return Cache.__getitem__(self._entries, name) if name in self._entries else None


def entry_bytes(entry: CachedImage) -> int:
    """How much memory an entry takes: its bytes, its texts at up to four bytes a character, its objects."""
    image = entry.image
    texts = (entry.namespace, *entry.tags, image.model, image.revised_prompt, image.upstream_request_id)
    buffer_bytes = len(image.data) if entry.reply is None else len(entry.reply.raw)
    return OVERHEAD_BYTES + buffer_bytes + sum(64 + 4 * len(text) for text in texts)
