"""The alarms: every rule's figure is looked at every few seconds, and whoever should know is told when it turns.

    QUIET ──out of bounds──▶ WAITING ──for for_s──▶ RINGING ──in bounds for as long, a minute at least──▶ QUIET
      ▲                         │
      └───────in bounds─────────┘

An alarm that rings is not ended by one look that is in bounds, so one whose figure comes and goes rings once. A
figure that cannot be judged, as the hit rate where nobody asks, counts as in bounds. Each replica watches itself
and tells under its own name: its breakers and the images it holds are nobody else's. A figure of all replicas is
looked at by each of them, and told as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from cacheserver.alarms.figures import Figure, Readings, SharedSpending, Value
from cacheserver.interfaces import Books, Clock
from cacheserver.model import Alarm, AlarmKind, AlarmRule, AlarmState

_log = structlog.get_logger(__name__)

_LEAST_QUIET_S = 60.0

_ORDER = {AlarmState.RINGING: 0, AlarmState.WAITING: 1, AlarmState.QUIET: 2}

_UNITS = {AlarmKind.SPEND_PER_HOUR_ABOVE: " dollars an hour", AlarmKind.UNSAVED_AGE_ABOVE: " s"}


class Notices(Protocol):
    """Who is told that an alarm rings, or does no more."""

    def send(self, notice: dict[str, Any]) -> None:
        """Tell it as soon as may be. Never waits and never raises."""
        ...


class Alarms:
    """The rules of a service and how they stand."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        rules: Sequence[AlarmRule],
        *,
        readings: Readings,
        books: Books,
        clock: Clock,
        replica: str,
        host: str = "",
        shared: SharedSpending | None = None,
        notices: Notices | None = None,
    ) -> None:
        """Watching begins with the first `look`. `replica` and `host` say in notices whose figures they are."""
        self._watches = [
            _Watch(rule, Figure(rule, readings=readings, clock=clock, shared=shared), clock=clock) for rule in rules
        ]
        self._books = books
        self._clock = clock
        self._sender = {"replica": replica, "host": host}
        self._notices = notices
        for rule in rules:
            books.alarm(rule.name, is_ringing=False)  # a series that can be found before anything happens

    async def look(self) -> None:
        """Look at every figure once, and tell what has changed."""
        for watch in self._watches:
            before = watch.alarm.state
            await watch.look()
            if watch.alarm.state is not before:
                self._tell(watch.alarm, before)

    def states(self) -> list[Alarm]:
        """The alarms as they stand, those that ring first."""
        return sorted((watch.alarm for watch in self._watches), key=lambda alarm: _ORDER[alarm.state])

    def _tell(self, alarm: Alarm, before: AlarmState) -> None:
        is_ringing = alarm.state is AlarmState.RINGING
        facts = _facts(alarm)
        log = _log.warning if is_ringing else _log.info
        log(f"alarm_{alarm.state}", **{name: fact for name, fact in facts.items() if name != "state"})
        if is_ringing or before is AlarmState.RINGING:
            self._books.alarm(alarm.rule.name, is_ringing=is_ringing)
            if self._notices is not None:
                # That it may ring soon is for the log: not to tell it is what for_s is for.
                self._notices.send(facts | self._sender | {"text": _sentence(alarm)})


class _Watch:
    """One rule, what it looks at and how it stands."""

    def __init__(self, rule: AlarmRule, figure: Figure, *, clock: Clock) -> None:
        self._rule = rule
        self._figure = figure
        self._clock = clock
        self._turned_s = clock.monotonic_s()
        self._well_since_s: float | None = None
        self.alarm = Alarm(rule, AlarmState.QUIET, since_s=clock.now_s())

    async def look(self) -> None:
        """Look at the figure, and turn to the state that follows from it."""
        value = await self._figure.value()
        self._turn(self._next(value), value)

    def _next(self, value: Value) -> AlarmState:
        now_s = self._clock.monotonic_s()
        is_beyond = value.value is not None and self._rule.is_beyond(value.value)
        state = self.alarm.state
        if state is not AlarmState.RINGING:
            waiting_since_s = self._turned_s if state is AlarmState.WAITING else now_s
            if not is_beyond:
                return AlarmState.QUIET
            return AlarmState.RINGING if now_s >= waiting_since_s + self._rule.for_s else AlarmState.WAITING
        if is_beyond:
            self._well_since_s = None
            return AlarmState.RINGING
        if self._well_since_s is None:
            self._well_since_s = now_s
        is_well = now_s >= self._well_since_s + max(self._rule.for_s, _LEAST_QUIET_S)
        return AlarmState.QUIET if is_well else AlarmState.RINGING

    def _turn(self, state: AlarmState, value: Value) -> None:
        since_s = self.alarm.since_s
        if state is not self.alarm.state:
            self._turned_s, since_s = self._clock.monotonic_s(), self._clock.now_s()
            self._well_since_s = None
        self.alarm = Alarm(self._rule, state, since_s, value.value, value.is_of_all)


def _facts(alarm: Alarm) -> dict[str, Any]:
    rule = alarm.rule
    return {
        "alarm": rule.name,
        "kind": rule.kind.value,
        "state": alarm.state.value,
        "value": alarm.value,
        "threshold": rule.threshold,
        "since": datetime.fromtimestamp(alarm.since_s, UTC).isoformat(timespec="seconds"),
        "namespace": rule.namespace,
        "target": rule.target,
        "scope": "all replicas" if alarm.is_of_all else "this replica",
        "runbook_url": rule.runbook_url,
    }


def _sentence(alarm: Alarm) -> str:
    """The same for people: chat services show a notice's `text` as it is."""
    rule = alarm.rule
    unit = _UNITS.get(rule.kind, "")
    stands = "unknown" if alarm.value is None else f"{alarm.value:.4g}{unit}"
    verb = "rings" if alarm.state is AlarmState.RINGING else "rings no more"
    return f"cacheserver: {rule.name} {verb}: {rule.kind.value} {rule.threshold:g}{unit}, and it is {stands}"
