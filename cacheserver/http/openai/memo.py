"""What was read and told before: a request that comes again byte for byte is neither read nor encoded anew.

Rights are no part of it: who asks, and whether they may, is found out before a memo is looked at, and the cache is
asked every time. One is kept by everything it was read from: the body, the headers, the caller, the namespace.
"""

from __future__ import annotations

from dataclasses import dataclass

from cacheserver.calls.again import HitAgain
from cacheserver.calls.call import Call
from cacheserver.calls.directives import status_lasts_until_s
from cacheserver.http.openai.answers import lasting_headers, passing_headers
from cacheserver.http.openai.asked import HttpAsked
from cacheserver.http.openai.headers import IDEMPOTENCY_KEY, READ
from cacheserver.http.ready import head_lines
from cacheserver.model import CachedImage, CachePolicy, Identity, Namespace, Served

_MOST_MEMOS = 2_000
_MOST_BODY_BYTES = 4_096
"""A longer body is read every time."""

_MOST_NAME_BYTES = 8_192
"""Of a request's body and the headers it is read from: with more it is not remembered."""

_MOST_TOLD_BYTES = 32 * 1024 * 1024

_READ = ("content-type", *READ)

Name = tuple[object, ...]


class Told:
    """The finished body of an answer with one picture, and its headers. Keeps no picture in memory."""

    def __init__(self, served: Served, body: bytes, policy: CachePolicy, again: HitAgain) -> None:
        """`again` is what it takes to tell it to the next call; `until_s` until when its headers are what they are."""
        self.body = body
        self.again = again
        self._policy = policy
        self._lasting = head_lines(lasting_headers([served]))
        self._head = b""
        self._from_s = self.until_s = 0.0

    def head(self, entry: CachedImage, now_s: float) -> bytes:
        """The lines of its headers with that picture."""
        if not self._from_s <= now_s < self.until_s:
            self._from_s, self.until_s = now_s, status_lasts_until_s(entry, now_s)
            self._head = self._lasting + head_lines(passing_headers([self.again.served(entry)], self._policy, now_s))
        return self._head


@dataclass(slots=True)
class Memo:
    """What one request asks for, its identity, and what it was last told."""

    asked: HttpAsked
    identity: Identity
    told: Told | None = None


class Memos:
    """The memos of this process: at most 2,000, and 32 MiB of what was told. The oldest go first."""

    def __init__(self) -> None:
        self._memos: dict[Name, Memo] = {}
        self._told: dict[Name, int] = {}
        self._told_bytes = 0

    def find(self, name: Name | None) -> Memo | None:
        """The memo of this name, if there is one."""
        return None if name is None else self._memos.get(name)

    def keep(self, name: Name, memo: Memo) -> None:
        """Keep a memo, in place of one of this name. One of a long name is not kept."""
        if sum(len(part) for part in name if isinstance(part, bytes | str)) > _MOST_NAME_BYTES:
            return
        if name in self._memos:
            self._forget(name)
        while len(self._memos) >= _MOST_MEMOS:
            self._forget(next(iter(self._memos)))
        self._memos[name] = memo

    def tell(self, name: Name, memo: Memo, told: Told) -> None:
        """Keep with a memo what was told."""
        self._forget_told(name)
        while self._told_bytes + len(told.body) > _MOST_TOLD_BYTES and self._told:
            self._forget_told(next(iter(self._told)))
        memo.told = told
        self._told[name] = len(told.body)
        self._told_bytes += len(told.body)

    def _forget(self, name: Name) -> None:
        self._forget_told(name)
        del self._memos[name]

    def _forget_told(self, name: Name) -> None:
        self._told_bytes -= self._told.pop(name, 0)
        if (memo := self._memos.get(name)) is not None:
            memo.told = None


def name_of(call: Call, namespace: Namespace, body: bytes) -> Name | None:
    """What a memo of this call is kept by; None where there is to be none."""
    said = call.metadata
    if len(body) > _MOST_BODY_BYTES or IDEMPOTENCY_KEY in said:
        return None
    return (body, namespace.name, call.caller.name, call.deadline_s, *map(said.get, _READ))
