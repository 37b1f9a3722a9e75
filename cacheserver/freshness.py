"""What becomes of entries past their end: answered with for a while, and renewed behind the answer (RFC 5861).

A namespace says for how long. Within `stale_while_revalidate_s` of its end an entry is the answer at once, and one new
picture is made: by a load like any other, so that one is under way per identity, in this process and across replicas,
and it finds what another replica has made. It is paid for by whoever asked, inside the budget and after everybody else.
Within `stale_if_error_s` it is the answer where a load fails for the upstream's sake (flight.py), or is not over when
the caller's deadline comes: what an upstream's limits keep from being made waits, and does not fail.

A caller that says max_age, REFRESH or NO_STORE judges for itself and is never answered with a stale entry, nor is who
asks with the priority warm_up, as a renewal does: it is there to have pictures made. Where the last tier cannot say
what it has, a renewal is refused: there may be one.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable

import structlog
from cachetools import TTLCache

from cacheserver.errors import CacheServerError, PromptRefusedError, QueueFullError, UpstreamError, UpstreamInvalidError
from cacheserver.interfaces import Books, Clock
from cacheserver.model import CachePolicy, Namespace, Priority, Terms
from cacheserver.tasks import OwnedTasks

_log = structlog.get_logger(__name__)

_AT_A_TIME = 1_000
_REMEMBERED, _PAUSE_S = 10_000, 10.0
"""A renewal that failed is tried again after so long: whatever refused it would refuse every hit."""

_ANSWERING_S = 0.5
"""What an answer takes to reach a caller before its deadline."""

Renew = Callable[[], Awaitable[bool]]
"""Have an entry renewed; whether a new picture was generated, or else found."""


def stale_windows(namespaces: Iterable[Namespace]) -> dict[str, float]:
    """For how long after its end an entry may be of use, by partition: the longest of those who read there."""
    windows: dict[str, float] = {}
    for namespace in namespaces:
        windows[namespace.partition] = max(namespace.stale_s, windows.get(namespace.partition, 0.0))
    return {partition: stale_s for partition, stale_s in windows.items() if stale_s}


def useful_for_s(namespaces: Iterable[Namespace]) -> float:
    """For how long an entry may be of use after it was written; infinite where a namespace sets no bound."""
    ends_s = [math.inf if each.max_ttl_s is None else each.max_ttl_s + each.stale_s for each in namespaces]
    return max(ends_s, default=0.0)


def takes_stale(terms: Terms) -> bool:
    """Whether a call on these terms may be answered with what is past its end."""
    is_read = terms.cache_policy in (CachePolicy.USE_CACHE, CachePolicy.ONLY_IF_CACHED)
    return is_read and terms.max_age_s is None and terms.priority is not Priority.WARM_UP


def late_after_s(terms: Terms) -> float | None:
    """After which a call on these terms has to be answered with what there is; None if it can wait as long as it takes.

    Nor has one to be that is told PENDING before.
    """
    if terms.deadline_s is None:
        return None
    late_s = max(terms.deadline_s - _ANSWERING_S, terms.deadline_s / 2)
    return None if terms.max_wait_s is not None and terms.max_wait_s <= late_s else late_s


def is_of_upstream(error: BaseException) -> bool:
    """Whether a load failed for the upstream's sake: not for what was asked for, nor for who asked."""
    return isinstance(error, UpstreamError) and not isinstance(error, PromptRefusedError | UpstreamInvalidError)


class Renewals:
    """Renewals of stale entries: one at a time for each identity, so many in all, each counted by what became of it."""

    def __init__(self, *, books: Books, clock: Clock) -> None:
        self._books = books
        self._tasks = OwnedTasks()
        self._running: set[str] = set()
        self._failed: TTLCache[str, None] = TTLCache(_REMEMBERED, ttl=_PAUSE_S, timer=clock.monotonic_s)

    def begin(self, name: str, renew: Renew, *, namespace: str) -> None:
        """Renew what was served stale of the identity of this name, unless that is under way or failed just now."""
        if name in self._running or name in self._failed:
            return
        if len(self._running) >= _AT_A_TIME:
            self._books.renewal(namespace, "refused")
            return
        self._running.add(name)
        task = self._tasks.own(self._renew(name, renew, namespace), "renew")
        # A callback: a task that is cancelled before its first step has no `finally`.
        task.add_done_callback(lambda _: self._running.discard(name))

    async def idle(self) -> None:
        """Return when none is under way."""
        await self._tasks.idle()

    async def aclose(self) -> None:
        """Wait for none: what has cost nothing yet is dropped, the others' loads go on without."""
        await self._tasks.aclose(0)

    async def _renew(self, name: str, renew: Renew, namespace: str) -> None:
        try:
            is_generated = await renew()
        except CacheServerError as error:
            self._failed[name] = None
            is_failure = isinstance(error, UpstreamError) and not isinstance(error, QueueFullError)
            self._books.renewal(namespace, "failed" if is_failure else "refused")
            _log.info("not_renewed", namespace=namespace, reason=error.reason)
        else:
            self._books.renewal(namespace, "generated" if is_generated else "found")
