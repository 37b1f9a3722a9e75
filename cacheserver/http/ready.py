"""Answers that lie ready: a request that was answered before is answered as it comes in, without a task of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_MOST_KNOWN = 1_000
_MOST_BYTES = 4_096

_NEW_EVERY_TIME = (b"\r\ntraceparent:", b"\r\nx-request-id:")
"""What no client sends twice: a request with it would be known for nothing, in another one's place."""


class ReadyAnswer(NamedTuple):
    """An answer that lies ready: the lines of its head between status and length, each ended, and its body."""

    head: bytes
    body: bytes | memoryview


def head_lines(headers: Mapping[str, str]) -> bytes:
    """Headers as the lines of a head, each ended."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if lines.count("\n") != len(headers):
        raise ValueError("a header has a line end in it")
    return lines.encode("latin-1")


Question = Callable[[], ReadyAnswer | None]
"""What a request is answered with, status 200, without waiting for anything. It may be asked again and again.

None: its answer is not ready, and nothing has happened; the application answers it as any other.
"""


class ReadyRequest(NamedTuple):
    """A request as far as it is not told by its call: its path and query as they were sent, and its body."""

    target: bytes
    body: bytes


Questions = Callable[[Sequence[tuple[bytes, bytes]], ReadyRequest], Question]
"""The question that a request with these headers is."""

FindQuestions = Callable[[bytes, bytes], Questions | None]
"""The questions that requests of this method and target are; None if no answer of theirs is ever ready."""


def no_questions(method: bytes, target: bytes) -> None:
    """Where no answer is ever ready."""


class KnownQuestions:
    """What was asked lately and found its answer ready, by the whole request as it came over the wire.

    At most 1,000, of at most 4 KiB each; the oldest goes first. Clients send the same bytes again and again, and to
    take them apart is half of what such an answer costs.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Question] = {}

    def find(self, request: bytes) -> Question | None:
        """What this request asks, if it is known."""
        return self._known.get(request) if len(request) <= _MOST_BYTES else None

    def keep(self, request: bytes, question: Question) -> None:
        """Know a request, if it is one that may come again."""
        if len(request) > _MOST_BYTES or request in self._known:
            return
        if any(line in request.lower() for line in _NEW_EVERY_TIME):
            return
        if len(self._known) >= _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[request] = question
