"""Calls that were answered from memory lately, known by the bytes of their requests."""

from __future__ import annotations

from dataclasses import dataclass
from sys import getsizeof

from cacheserver.calls.again import HitAgain
from cacheserver.calls.directives import status_lasts_until_s, stored_status
from cacheserver.model import CachedImage, Caller, ImageRequest, TierName
from cacheserver.rpc import split

_KNOWN_BYTES = 3_000
"""What is kept of a call and the texts it was read to, as a rule; all together take no more than so much each."""

_OBJECTS_BYTES = 1_600
_EXTRA_BYTES = 24
"""What provider parameters take at the most as objects, by the bytes of their request."""

_Name = tuple[bytes, str]
"""A request's bytes without its request_id and tags, and its caller."""


@dataclass(slots=True)
class Known:
    """A call that was answered from memory, and how much memory that takes, 0 where nobody keeps it.

    `status` is the cache-status that it is told from `from_s` until `until_s` (since 1970).
    """

    again: HitAgain
    size_bytes: int = 0
    status: str = ""
    from_s: float = 0.0
    until_s: float = 0.0

    def status_at(self, entry: CachedImage, now_s: float) -> str:
        """Its cache-status with that picture."""
        if not self.from_s <= now_s < self.until_s:
            self.status = stored_status(entry, TierName.MEMORY, now_s)
            self.from_s, self.until_s = now_s, status_lasts_until_s(entry, now_s)
        return self.status


class KnownCalls:
    """The calls of this process that are known: at most so many, 3 kB each, and a long one for several.

    The oldest goes first.
    """

    def __init__(self, most: int) -> None:
        """With 0 none is."""
        self._most = most
        self._calls: dict[_Name, Known] = {}
        self._bytes = 0

    def find(self, raw: bytes, caller: Caller) -> Known | None:
        """What is known of a call with this request, if anything is."""
        if not self._calls:
            return None
        known = self._calls.get((raw, caller.name))
        if known is not None:
            return known
        lasting = split.lasting(raw)
        return None if lasting is None else self._calls.get((lasting, caller.name))

    def keep(self, again: HitAgain, raw: bytes) -> Known:
        """Know a call with this request from now on."""
        known = Known(again)
        lasting = split.lasting(raw) if self._most else None
        if lasting is None:
            return known
        name = lasting, again.caller.name
        known.size_bytes = _size_bytes(lasting, again)
        if name in self._calls:
            self._forget(name)
        while self._calls and self._is_full(known):
            self._forget(next(iter(self._calls)))
        self._calls[name] = known
        self._bytes += known.size_bytes
        return known

    def _is_full(self, more: Known) -> bool:
        return len(self._calls) >= self._most or self._bytes + more.size_bytes > self._most * _KNOWN_BYTES

    def _forget(self, name: _Name) -> None:
        self._bytes -= self._calls.pop(name).size_bytes


def _size_bytes(lasting: bytes, again: HitAgain) -> int:
    what, identity = again.what, again.identity
    size = _OBJECTS_BYTES + getsizeof(lasting)
    if identity is not None:
        size += getsizeof(identity.normalized_prompt) + getsizeof(identity.canonical)
    if isinstance(what, ImageRequest):
        size += getsizeof(what.prompt) + (_EXTRA_BYTES * len(lasting) if what.extra else 0)
    return size
