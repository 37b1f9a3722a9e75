"""What an alarm looks at: counters of the service, as they changed in the last seconds, and how things stand now."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cacheserver.errors import AccountsUnavailableError
from cacheserver.interfaces import Clock
from cacheserver.model import AlarmKind, AlarmRule

_SAMPLES = 60
"""Of a window: it begins so exactly, and takes so little memory."""

_ASK_SHARED_S = 30.0
"""How often the figures of all replicas are asked for: they come from another machine."""

_SHARED_DEADLINE_S = 3.0
_MINUTE_S = 60
_HOUR_S = 3_600.0
_MICROUSD = 1_000_000


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted so far, of one namespace or of all. Counters only grow, while the process lives.

    `hits` were answered by a tier, `judged` are those and all that was generated, joined a load or was derived for want
    of one: what is derived would have been a miss, so that whoever allows it finds the hit rate where it was.
    `similar` are those of `hits` that were pictures of other prompts. `errors` failed, of `requests` of every outcome.
    `microusd` is the most that was paid: settled and unknown.
    """

    requests: int = 0
    hits: int = 0
    judged: int = 0
    errors: int = 0
    microusd: int = 0
    similar: int = 0

    def since(self, earlier: Counts) -> Counts:
        """What was counted after `earlier` was read."""
        return Counts(
            requests=self.requests - earlier.requests,
            hits=self.hits - earlier.hits,
            judged=self.judged - earlier.judged,
            errors=self.errors - earlier.errors,
            microusd=self.microusd - earlier.microusd,
            similar=self.similar - earlier.similar,
        )


class Readings(Protocol):
    """How this process stands. Asks nobody: everything is at hand."""

    def counts(self, namespace: str | None) -> Counts:
        """What was counted so far, of one namespace or (None) of all."""
        ...

    def oldest_held_s(self) -> float:
        """For how many seconds an image has waited for the last tier to take it; 0 where none waits."""
        ...

    def journal_share(self) -> float:
        """How full the journal is, 0 to 1; 0 without one."""
        ...

    def breakers(self) -> Mapping[str, bool]:
        """Every tier and upstream by name, and whether nobody asks it because it failed."""
        ...


class SharedSpending(Protocol):
    """What all replicas together have spent."""

    async def spent_microusd(self, *, since_s: float, namespace: str | None) -> int:
        """The most that was paid since the beginning of a minute (seconds since 1970): settled, unknown and open.

        Raises:
            AccountsUnavailableError: it cannot be told now.
        """
        ...


@dataclass(frozen=True, slots=True)
class Value:
    """A figure; None where there is nothing to judge. `is_of_all`: of all replicas together."""

    value: float | None
    is_of_all: bool = False


class Figure:
    """What one rule looks at, read whenever somebody asks."""

    def __init__(
        self, rule: AlarmRule, *, readings: Readings, clock: Clock, shared: SharedSpending | None = None
    ) -> None:
        """Counting begins now. Without `shared`, spending is this replica's."""
        self._rule = rule
        self._readings = readings
        self._clock = clock
        self._shared = shared
        self._window = _Window(rule.window_s)
        self._window.add(clock.monotonic_s(), readings.counts(rule.namespace))
        self._asked_s: float | None = None
        self._of_all: float | None = None

    async def value(self) -> Value:
        """The figure as it stands."""
        rule = self._rule
        if rule.kind is AlarmKind.UNSAVED_AGE_ABOVE:
            return Value(self._readings.oldest_held_s())
        if rule.kind is AlarmKind.JOURNAL_SHARE_ABOVE:
            return Value(self._readings.journal_share())
        if rule.kind is AlarmKind.BREAKER_OPEN:
            breakers = self._readings.breakers()
            return Value(float(sum(breakers[name] for name in breakers if rule.target in (None, name))))
        counted, span_s = self._window.add(self._clock.monotonic_s(), self._readings.counts(rule.namespace))
        if rule.kind is AlarmKind.SPEND_PER_HOUR_ABOVE:
            return await self._spending(counted, span_s)
        return Value(self._rate(counted))

    def _rate(self, counted: Counts) -> float | None:
        """Of few requests a rate says nothing."""
        part, whole = counted.hits, counted.judged
        if self._rule.kind is AlarmKind.ERROR_RATE_ABOVE:
            part, whole = counted.errors, counted.requests
        elif self._rule.kind in (AlarmKind.SIMILAR_RATE_BELOW, AlarmKind.SIMILAR_RATE_ABOVE):
            part = counted.similar
        return part / whole if whole and whole >= self._rule.min_requests else None

    async def _spending(self, counted: Counts, span_s: float) -> Value:
        """Dollars an hour. A process younger than the window spent nothing before, as far as it knows."""
        of_all = await self._spending_of_all()
        if of_all is not None:
            return Value(of_all, is_of_all=True)
        return Value(_dollars_an_hour(counted.microusd, max(span_s, self._rule.window_s)))

    async def _spending_of_all(self) -> float | None:
        """That of all replicas, asked for now and then; None where it cannot be told."""
        now_s = self._clock.monotonic_s()
        if self._shared is None or (self._asked_s is not None and now_s < self._asked_s + _ASK_SHARED_S):
            return self._of_all
        self._asked_s = now_s
        wall_s = self._clock.now_s()
        since_s = (wall_s - self._rule.window_s) // _MINUTE_S * _MINUTE_S
        try:
            async with asyncio.timeout(_SHARED_DEADLINE_S):
                spent = await self._shared.spent_microusd(since_s=since_s, namespace=self._rule.namespace)
        except (TimeoutError, AccountsUnavailableError):
            self._of_all = None
        else:
            self._of_all = _dollars_an_hour(spent, wall_s - since_s)
        return self._of_all


class _Window:
    """Counters as they were at some moments of the last seconds, so that their growth can be told."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._samples: deque[tuple[float, Counts]] = deque()

    def add(self, now_s: float, counts: Counts) -> tuple[Counts, float]:
        """Note the counters as they stand now (monotonic); how they grew over the window, and how long that was."""
        samples = self._samples
        if not samples or now_s >= samples[-1][0] + self._span_s / _SAMPLES:
            samples.append((now_s, counts))
        while len(samples) > 1 and samples[1][0] <= now_s - self._span_s:
            samples.popleft()
        began_s, before = samples[0]
        return counts.since(before), now_s - began_s


def _dollars_an_hour(microusd: int, span_s: float) -> float:
    return microusd / _MICROUSD * _HOUR_S / span_s
