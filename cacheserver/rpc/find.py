"""FindCached: where the images of thousands of items are, at microseconds an item, and others get their turn."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from cacheserver.cache import PromptCache
from cacheserver.calls.asking import Asking
from cacheserver.calls.call import Call
from cacheserver.errors import InvalidRequestError
from cacheserver.identity import key_of
from cacheserver.model import CacheKey, Found, Namespace, Permission, TierName
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import messages, replies, wire
from cacheserver.rpc.inputs import reading
from cacheserver.rpc.messages import Problems
from cacheserver.tasks import in_turns

_TURN_BYTES = 4 * 1024
"""To key so much takes one or two tenths of a millisecond: thirty ordinary items that are known, or three that are not.

A call has to wait for several turns of the loop until it is answered, and grpc lets in one more with each.
"""

_ITEM_BYTES = 100
"""What an item counts for besides its length."""

_NEW_BYTES = 1_000
"""What an item counts for that is not known, however short it is."""

_NEW_TIMES = 8
"""And as how many times its length: accents and quotes take the most time."""

_FOUND_PER_TURN = 100
"""To write so many takes a tenth of a millisecond."""

_KNOWN_BYTES = 16 * 1024 * 1024
_LONGEST_KNOWN_BYTES = 2 * 1024
_KNOWN_OVERHEAD_BYTES = 700
"""What a known key takes besides the bytes of its item: its own, its name and its place."""


class KnownKeys:
    """The keys of what was asked for of late, by namespace and the bytes of the item. The oldest go first.

    These two alone decide a key: what a namespace makes of a prompt stays as it is while the service runs, and neither
    callers nor their rights have a part in it. So nothing here becomes wrong. Rights are checked before it is asked.
    """

    def __init__(self, max_bytes: int = _KNOWN_BYTES) -> None:
        self._keys: OrderedDict[tuple[str, bytes], CacheKey] = OrderedDict()
        self._max_bytes = max_bytes
        self._bytes = 0

    def find(self, namespace: str, item: bytes) -> CacheKey | None:
        """The key of an item, if it is known."""
        return self._keys.get((namespace, item))

    def keep(self, namespace: str, item: bytes, key: CacheKey) -> None:
        """Know the key of an item; a long one never will be."""
        if len(item) > _LONGEST_KNOWN_BYTES or (namespace, item) in self._keys:  # by another call, meanwhile
            return
        self._keys[namespace, item] = key
        self._bytes += len(item) + _KNOWN_OVERHEAD_BYTES
        while self._bytes > self._max_bytes:
            (_, oldest), _ = self._keys.popitem(last=False)
            self._bytes -= len(oldest) + _KNOWN_OVERHEAD_BYTES

    @property
    def size_bytes(self) -> int:
        """How much they take."""
        return self._bytes


class FindCached:
    """Answers FindCached."""

    def __init__(self, *, cache: PromptCache, asking: Asking, known: KnownKeys) -> None:
        self._cache = cache
        self._asking = asking
        self._known = known

    async def find_cached(self, message: pb.FindCachedRequest, call: Call) -> bytes:
        """In which tier each image is."""
        namespace = self._asking.namespace(message.namespace, Permission.READ, call)
        if len(message.items) > messages.MAX_FIND_ITEMS:
            raise InvalidRequestError({"items": f"must be at most {messages.MAX_FIND_ITEMS}"})
        found, silent = await self._cache.find(await self._keys(message.items, namespace))
        return await _response(found, silent)

    async def _keys(self, items: Sequence[pb.FindItem], namespace: Namespace) -> list[CacheKey]:
        problems = Problems()
        keys: list[CacheKey] = []
        left_bytes = _TURN_BYTES
        for i, item in enumerate(items):
            if left_bytes < 0:
                await asyncio.sleep(0)
                left_bytes = _TURN_BYTES
            raw = item.SerializeToString()
            left_bytes -= len(raw) + _ITEM_BYTES
            key = self._known.find(namespace.name, raw)
            if key is None:
                left_bytes -= _NEW_BYTES + (_NEW_TIMES - 1) * len(raw)
                key = await self._read(item, f"items[{i}]", namespace, problems)
                if problems.are_enough:
                    break
                if key is None:
                    continue
                self._known.keep(namespace.name, raw, key)
            keys.append(key)
        problems.check()
        return keys

    async def _read(self, item: pb.FindItem, path: str, namespace: Namespace, problems: Problems) -> CacheKey | None:
        """The key an item spells or its spec has; None once there are problems."""
        what = await reading(item.spec.inputs, messages.read_find_item, item, path, namespace, problems)
        if not problems.are_none:
            return None
        if isinstance(what, CacheKey):
            return what
        return key_of(self._asking.redacted(what, namespace), namespace, item.variant)


async def _response(found: Sequence[Found], silent: Sequence[TierName]) -> bytes:
    """A FindCachedResponse as bytes."""
    items: list[bytes] = []
    async for some in in_turns(found, _FOUND_PER_TURN):
        items += map(_found_item, some)
    rest = pb.FindCachedResponse(unknown_tiers=[replies.TIERS[tier] for tier in silent])
    return b"".join((*items, rest.SerializeToString()))


def _found_item(found: Found) -> bytes:
    presence = _CACHED[found.tier] if found.tier is not None else _IN_FLIGHT if found.in_flight else _ABSENT
    return wire.found_item(found.key.name, presence)


_CACHED = {
    tier: pb.FoundItem(presence=pb.PRESENCE_CACHED, tier=name).SerializeToString()
    for tier, name in replies.TIERS.items()
}
_IN_FLIGHT = pb.FoundItem(presence=pb.PRESENCE_IN_FLIGHT).SerializeToString()
_ABSENT = pb.FoundItem(presence=pb.PRESENCE_ABSENT).SerializeToString()
