"""Calls for one picture that memory answers: a finished reply goes out as it lies there, and little is read or nothing.

A call that comes again is known by its bytes (known.py), and of one that says what an earlier one said, its prompt is
read (templates.py). Rights are no part of what is known: who asks, whether they may, and what memory has is found out
every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast
from weakref import ref

from cacheserver.cache import PromptCache
from cacheserver.calls.again import HitAgain, Seen
from cacheserver.calls.asking import Asking
from cacheserver.calls.call import Call
from cacheserver.calls.reception import Reception
from cacheserver.interfaces import Clock
from cacheserver.model import CachedImage, Caller, Served
from cacheserver.rpc import replies
from cacheserver.rpc.known import Known, KnownCalls, Latest
from cacheserver.rpc.messages import RpcAsked
from cacheserver.rpc.templates import Templates

_MOST_BYTES = 4_096
"""A longer request takes the ordinary way every time."""

_ROOM_BYTES = 512
"""What is kept with an entry takes a multiple of it."""

_SAYS_MORE = frozenset({"cache-control", "x-fallbacks"})
"""Metadata with which a call takes the ordinary way every time."""

Trailers = tuple[tuple[str, str], ...]


class ReadyImages:
    """Answers calls from memory with finished replies, and knows which calls were answered so."""

    def __init__(
        self, *, reception: Reception, asking: Asking, cache: PromptCache, clock: Clock, most_known: int
    ) -> None:
        """At most so many calls are known by their bytes; with 0 the prompt of each is read."""
        self._reception = reception
        self._asking = asking
        self._cache = cache
        self._clock = clock
        self._known = KnownCalls(most_known)
        self._templates = Templates()

    def again(self, raw: bytes, metadata: Mapping[str, str]) -> tuple[bytes, Trailers] | Seen | None:
        """The answer to a call that memory answers with a finished reply, and its trailers.

        It is booked and remembered. Otherwise nothing has happened, and the call is to be begun as any other; with what
        was seen of it, if that is all of it.
        """
        started_s = self._clock.monotonic_s()
        caller = self._reception.known_caller(metadata)
        hit = None if caller is None else self._hit(raw, caller, metadata, started_s)
        if hit is None or isinstance(hit, Seen):
            return hit
        reply, status, again = hit
        request_id = self._reception.hit_again("GetImage", metadata, again, started_s)
        return reply, (("cache-status", status), ("x-request-id", request_id))

    def answer(self, raw: bytes, call: Call) -> bytes | None:
        """The same for a call that has begun: booked, and remembered as any when it is concluded."""
        hit = self._hit(raw, call.caller, call.metadata, call.started_s)
        if hit is None or isinstance(hit, Seen):
            call.seen = hit
            return None
        reply, status, call.again = hit
        call.trailers.append(("cache-status", status))
        return reply

    def _hit(
        self, raw: bytes, caller: Caller, metadata: Mapping[str, str], started_s: float
    ) -> tuple[bytes, str, HitAgain] | Seen | None:
        """The reply to such a call, its cache-status, and what it takes to tell it again; it is booked."""
        if len(raw) > _MOST_BYTES or not _SAYS_MORE.isdisjoint(metadata):
            return None
        known = self._known.find(raw, caller)
        entry, latest = None if known is None else known.again.entry(), None
        if known is None or entry is None or not self._asking.holds_still(known.again, entry, caller, started_s):
            found = self._look(raw, caller, started_s)
            if found is None or isinstance(found, Seen):
                return found
            known, entry, latest = found
        reply = self._reply(known, entry, latest)
        self._asking.book_again(known.again, entry, started_s)
        return reply, known.status_at(entry, self._clock.now_s()), known.again

    def _look(
        self, raw: bytes, caller: Caller, started_s: float
    ) -> tuple[Known, CachedImage, Latest | None] | Seen | None:
        """A call of a known template, the picture that memory has for its prompt, and what to keep with that."""
        call = self._templates.find(raw, caller)
        if call is None:
            return None
        template, max_inline_bytes, prompt, request_id = call
        named = template.identifier.named(prompt)
        entry = self._cache.hit_one(*named[:2])
        if entry is None:
            return None if request_id is None else Seen(template, prompt, named, request_id)
        if entry.size_bytes > max_inline_bytes:
            return None
        had = None if entry.reply is None else entry.reply.latest
        if isinstance(had, Latest) and had.is_of(template, prompt, started_s):
            known, latest = had.known, None
        else:
            known = Known(self._asking.of_template(template, prompt, named, entry), self._asking.tend)
            latest = Latest(template.number, prompt, known)
        self._known.keep(known, raw)
        return known, entry, latest

    def asked(self, call: Call) -> RpcAsked | None:
        """What a call asks for whose prompt alone was read; None if all of it is to be read."""
        if call.seen is None:
            return None
        return cast("RpcAsked", self._asking.of_seen(call.seen, call))  # as was what its template was made of

    def tell(self, served: Served, asked: RpcAsked, raw: bytes, call: Call) -> bytes:
        """The finished answer with one picture, inline. A hit's is kept in memory, and the call and its like known."""
        if len(raw) <= _MOST_BYTES and _SAYS_MORE.isdisjoint(call.metadata):
            return self._tell_and_know(served, asked, raw, call)
        return self._finished(served)[0] if served.is_plain_hit else replies.finished(served).raw

    def _tell_and_know(self, served: Served, asked: RpcAsked, raw: bytes, call: Call) -> bytes:
        name = self._templates.unknown(raw, call.caller) if call.seen is None else None
        if name is not None and (template := self._asking.template(asked, call)) is not None:
            self._templates.keep(name, template, asked.max_inline_bytes)
        if not served.is_plain_hit:
            return replies.finished(served).raw
        reply, entry = self._finished(served)
        if (again := self._asking.again(served, entry, asked, call)) is not None:
            self._known.keep(Known(again, self._asking.tend), raw)
        return reply

    def _reply(self, known: Known, entry: CachedImage, latest: Latest | None) -> bytes:
        again, reply = known.again, entry.reply
        if latest is None and reply is not None and reply.fits(again.matched, again.saved_microusd):
            return reply.raw
        raw, kept = self._finished(again.served(entry), latest)
        known.again = again._replace(entry=ref(kept))
        return raw

    def _finished(self, served: Served, latest: Latest | None = None) -> tuple[bytes, CachedImage]:
        """What a hit is told with, and its entry as memory keeps it from now on.

        It keeps one reply with each entry, for those who ask as the first one did: others' is made every time. And who
        asked last, unless that takes more room than was taken for it once.
        """
        entry, had = served.entry, served.entry.reply
        fits = had is not None and had.fits(served.matched, served.saved_microusd)
        reply = had if had is not None and fits else replies.finished(served)
        kept = reply if had is None or had.matched is reply.matched else had
        if had is not None and isinstance(had.latest, Latest):
            if latest is not None and latest.size_bytes <= had.latest_bytes:
                had.latest.be(latest)
            kept = kept if kept is had else replace(kept, latest=had.latest, latest_bytes=had.latest_bytes)
        elif latest is not None:
            kept = replace(kept, latest=latest, latest_bytes=_roomy(latest.size_bytes))
        return reply.raw, entry if kept is had else self._cache.keep_reply(entry, kept)


def _roomy(size_bytes: int) -> int:
    """Room for what takes so much, and for a prompt that is a little longer."""
    return -(-size_bytes // _ROOM_BYTES) * _ROOM_BYTES
