"""Who is next: the jobs that wait for an upstream, in the order they will be served.

Higher priority first. Within one priority callers take turns, by the pictures they have had (start-time fair
queueing: Goyal, Vin, Cheng, 1996), so that one caller's hundred thousand rows do not starve another's one.
Within one caller the earliest deadline first, and of equal deadlines who came first.

The queue is bounded by count and bytes. When it is full, who would be served last leaves: never a more urgent
one for a less urgent one.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cacheserver.generation.pool import Lane
from cacheserver.model import Amounts, ImageRequest, Priority, Slot


@dataclass(frozen=True, slots=True)
class Turn:
    """A job's turn: whom it may call, and the slot it holds for that."""

    lane: Lane
    slot: Slot


class Route(NamedTuple):
    """Jobs of one route may be taken by the same lanes: those of `model` that are `pinned`, or cost at most `reach`.

    Lanes with a percentage take those pinned to them, and others only if they may go `past_percent`.
    """

    model: str
    pinned: str
    reach: float
    past_percent: bool


@dataclass(eq=False, slots=True)
class Job:
    """One call to be made: for whom, how urgent, and until when at best. `turn` is its turn once that has come.

    `deadline_s` is monotonic; a job that misses it is late, not lost. `reach` bounds what a lane may cost to be
    taken (the scheduler's own measure), `pinned` names the one lane it is meant for; lanes in `avoid` failed it.
    `past_percent`: lanes with a percentage may take it though it is pinned to none, as no other could.
    """

    request: ImageRequest
    amounts: Amounts
    caller: str
    priority: Priority
    deadline_s: float
    size_bytes: int = 0
    reach: float = 0.0
    pinned: str = ""
    past_percent: bool = False
    avoid: set[str] = field(default_factory=set)
    arrival: int = 0
    turn: asyncio.Future[Turn] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def model(self) -> str:
        """The model that is to make its pictures."""
        return self.request.model

    @property
    def route(self) -> Route:
        """Which lanes may take it, as far as that can be told without knowing them."""
        return Route(self.request.model, self.pinned, self.reach, self.past_percent)


@dataclass(eq=False, slots=True)
class _Line:
    """One caller's jobs of one priority, the earliest deadline first. `tag` is the virtual time of its next turn."""

    tag: float
    jobs: list[Job] = field(default_factory=list)
    images: int = 0

    def add(self, job: Job) -> None:
        bisect.insort(self.jobs, job, key=_deadline_then_arrival)
        self.images += job.amounts.images

    def remove(self, job: Job) -> None:
        first = bisect.bisect_left(self.jobs, _deadline_then_arrival(job), key=_deadline_then_arrival)
        del self.jobs[self.jobs.index(job, first)]
        self.images -= job.amounts.images

    @property
    def last_tag(self) -> float:
        """The virtual time at which its last job will be served, as things stand."""
        return self.tag + self.images - self.jobs[-1].amounts.images


def _deadline_then_arrival(job: Job) -> tuple[float, int]:
    return job.deadline_s, job.arrival


class _Class:
    """The lines of one priority, and its virtual time: how many pictures each caller that waits has had."""

    def __init__(self) -> None:
        self.lines: dict[str, _Line] = {}
        self._now = 0.0
        self._finished: dict[str, float] = {}

    def add(self, job: Job) -> None:
        line = self.lines.get(job.caller)
        if line is None:
            tag = max(self._now, self._finished.pop(job.caller, 0.0))
            line = self.lines[job.caller] = _Line(tag)
        line.add(job)

    def remove(self, job: Job) -> None:
        line = self.lines[job.caller]
        line.remove(job)
        if not line.jobs:
            self._leave(job.caller)

    def serve(self, job: Job) -> None:
        """Take a job whose turn it is out, and count its pictures to its caller."""
        line = self.lines[job.caller]
        self._now = max(self._now, line.tag)
        line.tag += job.amounts.images
        self.remove(job)

    def _leave(self, caller: str) -> None:
        self._finished[caller] = self.lines.pop(caller).tag
        # What lies behind the virtual time says nothing any more.
        if not self.lines or len(self._finished) > 2 * len(self.lines) + 100:
            self._finished = {name: tag for name, tag in self._finished.items() if tag > self._now}

    def in_order(self) -> Iterator[Job]:
        """All jobs, line by line: the lines as they take turns, each one's jobs by deadline."""
        for line in sorted(self.lines.values(), key=lambda line: (line.tag, line.jobs[0].arrival)):
            yield from line.jobs


class QueueOverflowError(Exception):
    """The queue is full and the newcomer is the one that would be served last."""


class JobQueue:
    """The jobs that wait."""

    def __init__(self, *, max_jobs: int, max_bytes: int) -> None:
        """At most `max_jobs` wait, and their requests take at most `max_bytes`."""
        self._max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._classes = {priority: _Class() for priority in sorted(Priority, reverse=True)}
        self._arrivals = itertools.count(1)
        self._jobs: set[Job] = set()
        self._depth: Counter[Priority] = Counter()
        self._images: Counter[tuple[Priority, str]] = Counter()
        self._bytes = 0
        self.demand: Counter[Route] = Counter()
        """How many jobs wait on each route."""

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    def __iter__(self) -> Iterator[Job]:
        """The waiting jobs: by priority, then caller by caller in turn, each caller's by deadline."""
        for each in self._classes.values():
            yield from each.in_order()

    @property
    def size_bytes(self) -> int:
        """Bytes that the requests of waiting jobs take."""
        return self._bytes

    @property
    def depth(self) -> Counter[Priority]:
        """How many wait, by priority."""
        return +self._depth

    def images_before(self, priority: Priority, model: str) -> int:
        """Pictures of `model` that wait at `priority` or above."""
        return sum(self._images[of, model] for of in Priority if of >= priority)

    def add(self, job: Job) -> list[Job]:
        """Let a new job wait; those that had to leave for it, which will not be served.

        Raises:
            QueueOverflowError: there is no room, and nobody less urgent waits.
        """
        job.arrival = next(self._arrivals)
        self._insert(job)
        left: list[Job] = []
        while len(self._jobs) > self._max_jobs or self._bytes > self._max_bytes:
            last = self._last()
            self.remove(last)
            if last is job:
                for other in left:
                    self._insert(other)
                raise QueueOverflowError
            left.append(last)
        return left

    def add_again(self, job: Job) -> None:
        """Let a job wait that has been served in vain: in its old place, and even if the queue is full."""
        self._insert(job)

    def take(self, job: Job) -> None:
        """Serve a job whose turn it is: its pictures count to its caller."""
        self._classes[job.priority].serve(job)
        self._forget(job)

    def remove(self, job: Job) -> None:
        """Take out a job that waits no more, unserved."""
        self._classes[job.priority].remove(job)
        self._forget(job)

    def hasten(self, job: Job, *, priority: Priority, deadline_s: float) -> None:
        """Make a waiting job more urgent: the higher priority and the earlier deadline count."""
        self.remove(job)
        job.priority = max(job.priority, priority)
        job.deadline_s = min(job.deadline_s, deadline_s)
        self._insert(job)

    def reroute(self, job: Job, *, pinned: str, reach: float, past_percent: bool) -> None:
        """Change which lanes may take a waiting job."""
        self._demand_less(job.route)
        job.pinned, job.reach, job.past_percent = pinned, reach, past_percent
        self.demand[job.route] += 1

    def _insert(self, job: Job) -> None:
        self._classes[job.priority].add(job)
        self._jobs.add(job)
        self._bytes += job.size_bytes
        self._depth[job.priority] += 1
        self._images[job.priority, job.model] += job.amounts.images
        self.demand[job.route] += 1

    def _forget(self, job: Job) -> None:
        self._jobs.discard(job)
        self._bytes -= job.size_bytes
        self._depth[job.priority] -= 1
        self._images[job.priority, job.model] -= job.amounts.images
        self._demand_less(job.route)

    def _demand_less(self, route: Route) -> None:
        self.demand[route] -= 1
        if not self.demand[route]:
            del self.demand[route]

    def _last(self) -> Job:
        """Who would be served last."""
        least = next(each for each in reversed(self._classes.values()) if each.lines)
        return max(least.lines.values(), key=lambda line: (line.last_tag, line.jobs[-1].arrival)).jobs[-1]
