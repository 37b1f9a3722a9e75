"""How late the event loop wakes whoever waits for it, as a metric."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from cacheserver.interfaces import Clock

TICK_S = 0.01
"""Between two looks. Each wakes the process, also where nothing else would."""

_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONGEST_S = 60.0
"""A loop that stood still for longer is told as one that stood for so long: the machine slept."""


class LoopLag(Collector):
    """`cacheserver_loop_lag_seconds`: a histogram of how late whoever waits for the event loop would be woken.

    It asks to be woken every TICK_S and notes how late it is. Whatever blocks the loop for longer than that is seen,
    by as much as TICK_S less than it took. Most looks that a block would have met do not take place, as it is one look
    that waits for its end; they are counted as having come one after another meanwhile and waited for the rest of it.
    So a share of the histogram is a share of time, and a loop that stands still half the time is late at every other
    moment, not at one in a hundred looks.

    A histogram and no largest value since it was last read: whoever reads, and how many do, changes nothing.
    """

    def __init__(self, *, clock: Clock) -> None:
        self._clock = clock
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._sum_s = 0.0
        self._loop: asyncio.AbstractEventLoop
        self._next: asyncio.TimerHandle | None = None
        self._due_s = 0.0

    def start(self) -> None:
        """Look from now on, until `stop`, at the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._ask()

    def stop(self) -> None:
        """Look no more. What was seen stays."""
        if self._next is not None:
            self._next.cancel()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The metric as it stands."""
        bounds = [*map(str, _BOUNDS_S), "+Inf"]
        buckets = [*zip(bounds, map(float, accumulate(self._counts)), strict=True)]
        yield HistogramMetricFamily(
            "cacheserver_loop_lag_seconds", "How late the event loop wakes", buckets=buckets, sum_value=self._sum_s
        )

    def _ask(self) -> None:
        self._due_s = self._clock.monotonic_s() + TICK_S
        self._next = self._loop.call_later(TICK_S, self._look)

    def _look(self) -> None:
        late_s = min(max(0.0, self._clock.monotonic_s() - self._due_s), _LONGEST_S)
        self._note(late_s)
        while (late_s := late_s - TICK_S) > 0:
            self._note(late_s)
        self._ask()

    def _note(self, late_s: float) -> None:
        self._counts[bisect_left(_BOUNDS_S, late_s)] += 1
        self._sum_s += late_s
