"""How long stopping waits."""

from __future__ import annotations

from cacheserver.interfaces import Clock


class Patience:
    """How long stopping waits: `span_s` for all calls and loads together, then as long for what is being stored."""

    def __init__(self, span_s: float, *, clock: Clock) -> None:
        self._span_s = span_s
        self._clock = clock
        self._until_s: float | None = None

    def for_calls_s(self) -> float:
        """Seconds left for calls and loads; they run from the first time this is asked."""
        now_s = self._clock.monotonic_s()
        if self._until_s is None:
            self._until_s = now_s + self._span_s
        return max(0.0, self._until_s - now_s)

    def for_writes_s(self) -> float:
        """Seconds for what is being stored: what was paid for is not lost because a call took all the time."""
        return self._span_s

    def lose(self) -> None:
        """Wait for nothing any more."""
        self._span_s = 0.0
        self._until_s = self._clock.monotonic_s()
