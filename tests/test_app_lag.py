"""How late the event loop wakes, as a metric."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.app.lag import TICK_S, LoopLag
from cacheserver.clock import SystemClock
from tests.fakes import FakeClock


class Monitor:
    """A monitor that looks at a loop whose timers go off when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = FakeClock()
        self.registry = CollectorRegistry()
        self.lag = LoopLag(clock=self.clock)
        self.registry.register(self.lag)
        self.asked: list[tuple[float, object]] = []
        monkeypatch.setattr("asyncio.get_running_loop", lambda: self)
        self.lag.start()

    def call_later(self, seconds: float, callback: object) -> object:
        self.asked.append((seconds, callback))
        return self

    def cancel(self) -> None:
        self.asked.clear()

    def wake(self, *, late_s: float = 0.0) -> None:
        """Let the time pass that it asked for, and so much more."""
        (seconds, callback) = self.asked.pop()
        self.clock.advance(seconds + late_s)
        assert callable(callback)
        callback()

    def later_than(self, seconds: float) -> float:
        """How many moments were later than so much; it must be a bound of the histogram."""
        within = self.registry.get_sample_value("cacheserver_loop_lag_seconds_bucket", {"le": f"{seconds}"})
        assert within is not None
        return self.count - within

    @property
    def count(self) -> float:
        found = self.registry.get_sample_value("cacheserver_loop_lag_seconds_count")
        assert found is not None
        return found


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Monitor:
    return Monitor(monkeypatch)


def test_a_loop_that_wakes_in_time_is_never_late(monitor: Monitor) -> None:
    for _ in range(100):
        monitor.wake()
    assert monitor.count == 100
    assert monitor.later_than(0.001) == 0


def test_a_block_counts_at_every_moment_that_it_covers(monitor: Monitor) -> None:
    monitor.wake(late_s=0.0501)
    assert monitor.count == 6  # at 50.1 ms before its end, at 40.1, …, at 0.1
    assert [monitor.later_than(each) for each in (0.05, 0.03, 0.02, 0.01, 0.001)] == [1, 3, 4, 5, 5]
    assert monitor.registry.get_sample_value("cacheserver_loop_lag_seconds_sum") == pytest.approx(
        sum(0.0501 - TICK_S * n for n in range(6))
    )


def test_a_loop_that_stands_still_half_the_time_is_late_half_the_time(monitor: Monitor) -> None:
    for _ in range(50):
        for _ in range(10):
            monitor.wake()
        monitor.wake(late_s=0.1)
    assert monitor.later_than(0.001) / monitor.count == pytest.approx(0.5, abs=0.02)


def test_a_machine_that_slept_does_not_keep_the_loop_counting(monitor: Monitor) -> None:
    monitor.wake(late_s=1e6)
    assert monitor.count == pytest.approx(60 / TICK_S, abs=1)
    monitor.wake()
    assert monitor.later_than(5.0) == pytest.approx(55 / TICK_S, abs=2)


def test_what_was_seen_stays_when_nobody_looks_any_more(monitor: Monitor) -> None:
    monitor.wake(late_s=0.021)
    monitor.lag.stop()
    assert not monitor.asked
    assert monitor.later_than(0.02) == 1


async def test_a_block_of_a_real_loop_is_seen() -> None:
    registry = CollectorRegistry()
    lag = LoopLag(clock=SystemClock())
    registry.register(lag)
    lag.start()
    until_s = time.monotonic() + 0.06
    while time.monotonic() < until_s:  # the block that is to be seen
        pass
    looked = asyncio.Event()
    asyncio.get_running_loop().call_later(2 * TICK_S, looked.set)
    await looked.wait()
    lag.stop()
    within = registry.get_sample_value("cacheserver_loop_lag_seconds_bucket", {"le": "0.05"})
    count = registry.get_sample_value("cacheserver_loop_lag_seconds_count")
    assert within is not None
    assert count is not None
    assert count - within >= 1
