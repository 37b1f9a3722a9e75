"""Calls for one picture that were answered from memory lately: such a call is answered at once, and nothing is read.

Rights are no part of what is known of a call: who asks, whether they may, and what memory has is found out every time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from sys import getsizeof

from cacheserver.cache import PromptCache
from cacheserver.calls.again import HitAgain
from cacheserver.calls.asking import Asking
from cacheserver.calls.bounds import MAX_REQUEST_ID, MAX_TAGS, TAG
from cacheserver.calls.call import Call
from cacheserver.calls.directives import cache_status, status_lasts_until_s
from cacheserver.calls.reception import Reception
from cacheserver.interfaces import Clock
from cacheserver.model import (
    CachedImage,
    CachePolicy,
    Caller,
    ImageRequest,
    Served,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import replies, wire
from cacheserver.rpc.messages import RpcAsked

_MOST_BYTES = 4_096
"""A longer request is read every time."""

_KNOWN_BYTES = 3_000
"""What is kept of a call and the texts it was read to, as a rule; all together take no more than so much each."""

_OBJECTS_BYTES = 1_600
_EXTRA_BYTES = 24
"""What provider parameters take at the most as objects, by the bytes of their request."""

_LENGTH_DELIMITED = 2
_REQUEST_ID = pb.GetImageRequest.REQUEST_ID_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_TAG = pb.GetImageRequest.TAGS_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_FIT_ID = re.compile(rb"[ -~]{0,%d}" % MAX_REQUEST_ID)
_FIT_TAG = re.compile(TAG.pattern.encode("ascii"))

_SAYS_MORE = frozenset({"cache-control", "x-fallbacks"})
"""Metadata that a call is read for every time."""

Trailers = tuple[tuple[str, str], ...]

_Name = tuple[bytes, str]
"""A request's bytes without its request_id and tags, and its caller."""


@dataclass(slots=True)
class _Known:
    """A call that was answered from memory, and how much memory it takes.

    `status` is the cache-status that it is told from `from_s` until `until_s` (since 1970).
    """

    again: HitAgain
    policy: CachePolicy
    size_bytes: int
    status: str = ""
    from_s: float = 0.0
    until_s: float = 0.0

    def reply(self, entry: CachedImage) -> bytes | None:
        """What goes out, if what lies ready says of the hit what is to be said."""
        reply, again = entry.reply, self.again
        return reply.raw if reply is not None and reply.fits(again.matched, again.saved_microusd) else None


class ReadyImages:
    """Answers calls from memory with finished replies, and knows which calls were answered so."""

    def __init__(
        self, *, reception: Reception, asking: Asking, cache: PromptCache, clock: Clock, most_known: int
    ) -> None:
        """At most so many calls are known, 3 kB each, a long one for several; the oldest goes first. With 0 none is."""
        self._reception = reception
        self._asking = asking
        self._cache = cache
        self._clock = clock
        self._most_known = most_known
        self._known: dict[_Name, _Known] = {}
        self._known_bytes = 0

    def again(self, raw: bytes, metadata: Mapping[str, str]) -> tuple[bytes, Trailers] | None:
        """The answer to a call that was answered from memory lately and its trailers, if it would be answered so again.

        It is booked and remembered. None: nothing has happened, and the call is to be begun as any other.
        """
        started_s = self._clock.monotonic_s()
        caller = self._reception.known_caller(metadata)
        hit = None if caller is None else self._hit(raw, caller, metadata, started_s)
        if hit is None:
            return None
        reply, status, again = hit
        request_id = self._reception.hit_again("GetImage", metadata, again, started_s)
        return reply, (("cache-status", status), ("x-request-id", request_id))

    def answer(self, raw: bytes, call: Call) -> bytes | None:
        """The same for a call that has begun: booked, and remembered as any when it is concluded."""
        hit = self._hit(raw, call.caller, call.metadata, call.started_s)
        if hit is None:
            return None
        reply, status, call.again = hit
        call.trailers.append(("cache-status", status))
        return reply

    def _hit(
        self, raw: bytes, caller: Caller, metadata: Mapping[str, str], started_s: float
    ) -> tuple[bytes, str, HitAgain] | None:
        """The reply to such a call, its cache-status, and what it was answered with before; it is booked."""
        if len(raw) > _MOST_BYTES or not _SAYS_MORE.isdisjoint(metadata):
            return None
        known = self._known.get((raw, caller.name)) or self._find(raw, caller)
        entry = None if known is None else known.again.entry()
        if known is None or entry is None or (reply := known.reply(entry)) is None:
            return None
        if not self._asking.hit_again(known.again, entry, caller, started_s):
            return None
        return reply, self._status(known, entry), known.again

    def tell(self, served: Served, asked: RpcAsked, raw: bytes, call: Call) -> bytes:
        """The finished answer with one picture, inline. A hit's is kept in memory, and its call known."""
        if not served.is_plain_hit:
            return replies.finished(served).raw
        entry, reply = served.entry, served.entry.reply
        if reply is None or not reply.fits(served.matched, served.saved_microusd):
            had, reply = reply, replies.finished(served)
            if had is not None and had.matched is not reply.matched:
                return reply.raw  # there is one for each entry: it is for those who ask as the first one did
            entry = self._cache.keep_reply(entry, reply)
        self._know(served, entry, asked, raw, call)
        return reply.raw

    def _know(self, served: Served, entry: CachedImage, asked: RpcAsked, raw: bytes, call: Call) -> None:
        name = self._name(raw, call.caller) if self._most_known and _SAYS_MORE.isdisjoint(call.metadata) else None
        again = None if name is None else self._asking.again(served, entry, asked, call)
        if name is None or again is None:
            return
        known = _Known(again, asked.terms.cache_policy, _size_bytes(name, again))
        if name in self._known:
            self._forget(name)
        while self._known and self._is_full(known):
            self._forget(next(iter(self._known)))
        self._known[name] = known
        self._known_bytes += known.size_bytes

    def _is_full(self, more: _Known) -> bool:
        room_bytes = self._most_known * _KNOWN_BYTES
        return len(self._known) >= self._most_known or self._known_bytes + more.size_bytes > room_bytes

    def _forget(self, name: _Name) -> None:
        self._known_bytes -= self._known.pop(name).size_bytes

    def _find(self, raw: bytes, caller: Caller) -> _Known | None:
        name = self._name(raw, caller) if self._known else None
        return None if name is None else self._known.get(name)

    def _status(self, known: _Known, entry: CachedImage) -> str:
        now_s = self._clock.now_s()
        if not known.from_s <= now_s < known.until_s:
            known.status = cache_status(known.again.served(entry), known.policy, now_s)
            known.from_s, known.until_s = now_s, status_lasts_until_s(entry, now_s)
        return known.status

    @staticmethod
    def _name(raw: bytes, caller: Caller) -> _Name | None:
        """What such a call is known by; None if it is none to know."""
        lasting = _lasting(raw) if len(raw) <= _MOST_BYTES else None
        return None if lasting is None else (lasting, caller.name)


def _size_bytes(name: _Name, again: HitAgain) -> int:
    what, identity = again.what, again.identity
    size = _OBJECTS_BYTES + getsizeof(name[0])
    if identity is not None:
        size += getsizeof(identity.normalized_prompt) + getsizeof(identity.canonical)
    if isinstance(what, ImageRequest):
        size += getsizeof(what.prompt) + (_EXTRA_BYTES * len(name[0]) if what.extra else 0)
    return size


def _lasting(raw: bytes) -> bytes | None:
    """A request without request_id and tags, which say nothing of a stored picture; None if these are not fit."""
    fields = wire.fields(raw)
    if fields is None:
        return None
    lasting, tags = [], 0
    for field in fields:
        if raw[field.start] == _REQUEST_ID:
            if not _FIT_ID.fullmatch(raw, field.value, field.end):
                return None
        elif raw[field.start] == _TAG:
            tags += 1
            if tags > MAX_TAGS or not _FIT_TAG.fullmatch(raw, field.value, field.end):
                return None
        else:
            lasting.append(raw[field.start : field.end])
    return b"".join(lasting)
