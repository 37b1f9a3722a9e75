"""Calls that were answered from memory lately, known by the bytes of their requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from sys import getsizeof

from cacheserver.calls.again import HitAgain, Template
from cacheserver.calls.directives import status_lasts_until_s, stored_status
from cacheserver.model import CachedImage, Caller, ImageRequest, TierName
from cacheserver.rpc import split

_KNOWN_BYTES = 3_000
"""What is kept of a call and the texts it was read to, as a rule; all together take no more than so much each."""

_OBJECTS_BYTES = 1_600
_EXTRA_BYTES = 24
"""What provider parameters take at the most as objects, by the bytes they are written with."""

_Name = tuple[bytes, str]
"""A request's bytes without its request_id and tags, and its caller."""


@dataclass(slots=True)
class Known:
    """A call that was answered from memory.

    `status` is the cache-status that it is told from `from_s` until `until_s` (since 1970). `tend` is told of the entry
    that it is told again, once in each such while: not every hit has to.
    """

    again: HitAgain
    tend: Callable[[CachedImage], None]
    status: str = ""
    from_s: float = 0.0
    until_s: float = 0.0

    def status_at(self, entry: CachedImage, now_s: float) -> str:
        """Its cache-status with that picture."""
        if not self.from_s <= now_s < self.until_s:
            self.status = stored_status(entry, TierName.MEMORY, now_s)
            self.from_s, self.until_s = now_s, status_lasts_until_s(entry, now_s)
            self.tend(entry)
        return self.status


@dataclass(slots=True)
class Latest:
    """The call of a known template that an entry was the answer to lately; it is kept with the entry's reply.

    Its prompt is that of the entry's key, or one that is normalized to it: so the entry may be told again as it was,
    once a call of the same template and prompt has found it. A template is large, and told by its number here.
    """

    template: int
    prompt: str
    known: Known

    def is_of(self, template: Template, prompt: str, started_s: float) -> bool:
        """Whether a call that began then is answered with the entry as this one was."""
        return template.number == self.template and prompt == self.prompt and started_s <= self.known.again.until_s

    def be(self, other: Latest) -> None:
        """Another one takes its place."""
        self.template, self.prompt, self.known = other.template, other.prompt, other.known

    @property
    def size_bytes(self) -> int:
        """How much memory it takes."""
        return _size_bytes(b"", self.known.again) + getsizeof(self.prompt)


class KnownCalls:
    """The calls of this process that are known: at most so many, 3 kB each, and a long one for several.

    The oldest goes first.
    """

    def __init__(self, most: int) -> None:
        """With 0 none is."""
        self._most = most
        self._calls: dict[_Name, tuple[Known, int]] = {}
        """With how much memory each takes."""
        self._bytes = 0

    def find(self, raw: bytes, caller: Caller) -> Known | None:
        """What is known of a call with this request, if anything is."""
        if not self._calls:
            return None
        kept = self._calls.get((raw, caller.name))
        if kept is None and (lasting := split.lasting(raw)) is not None:
            kept = self._calls.get((lasting, caller.name))
        return None if kept is None else kept[0]

    def keep(self, known: Known, raw: bytes) -> None:
        """Know a call with this request from now on."""
        lasting = split.lasting(raw) if self._most else None
        if lasting is None:
            return
        name = lasting, known.again.caller.name
        size_bytes = _size_bytes(lasting, known.again)
        if name in self._calls:
            self._forget(name)
        while self._calls and self._is_full(size_bytes):
            self._forget(next(iter(self._calls)))
        self._calls[name] = known, size_bytes
        self._bytes += size_bytes

    def _is_full(self, more_bytes: int) -> bool:
        return len(self._calls) >= self._most or self._bytes + more_bytes > self._most * _KNOWN_BYTES

    def _forget(self, name: _Name) -> None:
        self._bytes -= self._calls.pop(name)[1]


def _size_bytes(lasting: bytes, again: HitAgain) -> int:
    what, identity = again.what, again.identity
    size = _OBJECTS_BYTES + getsizeof(lasting)
    if identity is not None:
        size += getsizeof(identity.normalized_prompt) + getsizeof(identity.canonical)
    if isinstance(what, ImageRequest):
        canonical_size = 0 if identity is None else len(identity.canonical)
        size += getsizeof(what.prompt) + (_EXTRA_BYTES * canonical_size if what.extra else 0)
    return size
