"""The law of the rate limits: when the next call may be sent, and what a finished call teaches.

Each limit of a group is a token bucket, kept the way of the generic cell rate algorithm (GCRA, ITU-T I.371): one
number, the theoretical arrival time (TAT), says when the bucket will be full again. With T seconds for one unit,
a call of `amount` may be sent from `TAT + amount * T - tolerance` on and moves TAT by `amount * T`. As TAT moves from
where it was, and not from when the call was really sent, being late loses no rate within the tolerance. The
tolerance is the bucket's size in seconds: `burst_s` for a limit by the minute, a whole day for one by the day, and
never less than the call itself.

What is learned is one factor on all limits by the minute: the share of them that others leave to us. Only refused calls
(429) tell of it, and a refusal means one of two things.

- We sent more than others leave, and the provider's bucket is empty. If n calls were let through since the pause of
  the last refusal, they had the time of n and of the 6 calls of the pause: others leave n / (n + 6) of our rate. That,
  less a tenth so that the bucket fills again, is how low the factor falls, but never under half of what it was.
- Something passed by: a fault, a burst of somebody else. Then the rate was right, and will be right again.

One refusal does not tell which. So the factor falls at once, and returns to a goal by the clock, as CUBIC does (RFC
9438): quickly at first, slowly around the goal, then ever faster beyond it, to find what others no longer take. The
goal is the rate before the refusal times the measured share, which counts the less the fewer calls it rests on: n is
taken for 40 more. Refusals within five calls of one another measure nothing: each halves the factor and doubles the
pause, but the goal stays. So stray refusals cost a minute or two, however low a row of them brings the factor, while
a limit that was halved refuses each return, is measured each time, and is found within some ten refusals.

A return takes the time of 300 calls at the goal, between 45 s and 5 minutes. Where others take a part it ends in a
refusal, so the share of refused calls settles below one in a hundred wherever a call a second or so is left to us, and
at a few in a hundred for a few calls a minute: if the provider's bucket holds a good many calls, as one of a minute
does, which also keeps for us what we did not take meanwhile. One of two or three (a second of a small limit) refuses
more than that to anybody whom others come before by chance, however few we send; there the factor falls far below
what others leave. So it does where one call in a hundred is refused at any rate: that cannot be told from others'
traffic. The factor comes back by the clock, and not by our calls, as the provider's bucket fills by the
clock: who sends little is not held down for longer than who sends much. After ten minutes without a refusal the limits
are trusted again.

Where no limit is known, a refusal makes the last minute's rate the limit, but no less than ten images a minute, and it
doubles each minute until the next refusal, from which on it is learned like any other.

`control/limits.py` says the same in Lua; a test holds the two to the same answers.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cacheserver.model import Amounts, CallReport, GroupLimits, RateLimit, Slot

_MINUTE_S = 60.0
_DAY_S = 86_400.0
_BY_DAY = 3
"""From this place on the limits of a group are those by the day."""
_IMAGES, _TOKENS = 0, 2
"""Their places among the limits by the minute."""

_CUT = 0.1
"""What a refusal takes of the measured rate, so that the provider's bucket fills again."""
_LEAST_SHARE = 0.5
"""What a refusal leaves of the factor at least."""
_DOUBT_CALLS = 40.0
"""So many calls more must have been let through for a measurement to count as much for the goal as for the low."""
_RETURN_CALLS = 300.0
"""The return takes the time of so many calls at the goal, within these bounds."""
_LEAST_RETURN_S = 45.0
_MOST_RETURN_S = 300.0
_FORGOTTEN_S = 600.0
"""After so long without a refusal the limits are trusted again."""
_LEAST_FACTOR = 0.02
_MOST_FACTOR_OF_FOUND = 1_000.0
"""A limit nobody told, only measured when a call was refused, may have been found far too low."""

_LEAST_FOUND = 10.0
"""Images a minute: one refused call among a few tells nothing of a limit."""
_FOUND_GOAL = 2.0
"""Where a found limit has grown beyond twice its goal, nobody may have asked for so much: it is found anew."""
_FOUND_RETURN_S = 60.0
"""Where no limit is known the rate doubles in so long, and faster later."""

_PAUSE_CALLS = 6.0
_LEAST_PAUSE_S = 0.25
_MOST_FIRST_PAUSE_S = 15.0
_MOST_PAUSE_S = 30.0
_SOON_CALLS = 5.0
"""A refusal after fewer calls than these doubles the pause, up to _MOST_DOUBLINGS times, and measures nothing."""
_MOST_DOUBLINGS = 3.0
_LONGEST_BLOCK_S = 900.0
"""The longest wait that is believed: one refused call each quarter of an hour is a cheap way to ask again."""
_MOST_TOLD = 10**9


@dataclass(slots=True)
class GroupState:
    """What is known of one limit group. Moments in seconds of one clock, whose zero stands for long ago.

    `tat_s` are the TATs of images, requests and tokens by the minute, then by the day. `told` are the provider's own
    limits by the minute (0: not told), as the call sent at `told_at_s` met them. `found` is the rate in images by
    the minute at which a call was refused though no limit was known. `calm` counts the calls reserved since the last
    refusal, `doublings` the refusals that came soon after another; a call reserved for a moment before `resumed_at_s`
    was on its way when the last cut was made.

    `factor` is the one of the last reservation or refusal: from `low` at `resumed_at_s` it returns to `goal` within
    `return_s`. `minute_images` of `minute_at_s` and `last_minute_images` give the rate where there is no limit.
    """

    tat_s: list[float] = field(default_factory=lambda: [0.0] * 6)
    blocked_until_s: float = 0.0
    last_start_s: float = 0.0
    factor: float = 1.0
    calm: float = 0.0
    doublings: float = 0.0
    resumed_at_s: float = 0.0
    low: float = 1.0
    goal: float = 1.0
    return_s: float = _LEAST_RETURN_S
    told: list[float] = field(default_factory=lambda: [0.0] * 3)
    told_at_s: float = 0.0
    found: float = 0.0
    minute_at_s: float = 0.0
    minute_images: float = 0.0
    last_minute_images: float = 0.0


@dataclass(slots=True)
class Group:
    """The law for one limit group. Pure arithmetic; `now_s` is always of the clock that `state` is of.

    With `sharers` above 1, each of so many works on its own within an equal part of the limits.
    """

    limits: GroupLimits
    state: GroupState
    sharers: int = 1

    def unit_s(self, factor: float) -> list[float]:
        """Seconds for one unit of each limit, in the order of `GroupState.tat_s`; 0 where there is no limit."""
        usable = (1 - self.limits.headroom) / self.sharers
        by_day = (self.limits.images_per_day, self.limits.requests_per_day, self.limits.tokens_per_day)
        return [
            *(_MINUTE_S / (limit * usable * factor) if limit else 0.0 for limit in self._per_minute()),
            *(_DAY_S / (limit * usable) if limit else 0.0 for limit in by_day),
        ]

    def factor(self, now_s: float) -> float:
        """What has come back of the limits by the minute since the last refusal."""
        state = self.state
        most = _MOST_FACTOR_OF_FOUND if self._is_only_found() else 1.0
        calm_s = max(0.0, now_s - state.resumed_at_s)
        if calm_s >= _FORGOTTEN_S:
            return most
        past_goal = calm_s / state.return_s - 1
        height = state.goal - state.low if past_goal < 0 else state.goal
        return min(state.goal + height * past_goal * past_goal * past_goal, most)

    def earliest_s(self, amounts: Amounts, now_s: float) -> float:
        """The first moment at which `amounts` may be sent."""
        start_s = max(now_s, self.state.blocked_until_s)
        for place, cost_s in enumerate(self._costs_s(amounts)):
            size_s = _DAY_S if place >= _BY_DAY else self.limits.burst_s
            if cost_s:
                start_s = max(start_s, self.state.tat_s[place] + cost_s - max(size_s, cost_s))
        return start_s

    def reserve(self, amounts: Amounts, now_s: float) -> float:
        """Take the first moment at which `amounts` may be sent."""
        state = self.state
        state.factor = self.factor(now_s)
        start_s = self.earliest_s(amounts, now_s)
        for place, cost_s in enumerate(self._costs_s(amounts)):
            if cost_s:
                state.tat_s[place] = max(state.tat_s[place], start_s) + cost_s
        state.calm += 1
        self._turn_minute(now_s)
        state.minute_images += amounts.images
        state.last_start_s = start_s
        return start_s

    def release(self, amounts: Amounts, start_s: float) -> None:
        """Undo an unused reservation: its part of the day, and its moment if nobody has reserved a later one."""
        is_of_now = start_s >= self.state.resumed_at_s  # and not from before the last refusal, which moved the TATs
        is_last = is_of_now and start_s >= self.state.last_start_s
        for place, cost_s in enumerate(self._costs_s(amounts)):
            if is_last or place >= _BY_DAY:
                self.state.tat_s[place] -= cost_s
        if is_of_now:
            self.state.calm = max(0.0, self.state.calm - 1)
        self._uncount(amounts)

    def end(self, amounts: Amounts, start_s: float, report: CallReport, now_s: float) -> None:
        """Learn from what the call reserved for `start_s` met."""
        state = self.state
        if report.images is not None:
            self._correct(_IMAGES, report.images - amounts.images, start_s)
            if not report.limited:  # which counts as none
                state.minute_images = max(0.0, state.minute_images + report.images - amounts.images)
        if report.tokens is not None:
            self._correct(_TOKENS, min(max(report.tokens, 0), _MOST_TOLD) - amounts.tokens, start_s)
        told = report.told
        if told is not None and start_s >= state.told_at_s:
            # Answers come in the order they are done, not in the order they were sent.
            limits = (told.images, told.requests, told.tokens)
            state.told = [_told(new) or old for old, new in zip(state.told, limits, strict=True)]
            state.told_at_s = start_s
        if report.limited:
            self._refused(amounts, start_s, report.retry_after_s, now_s)
        elif told is not None and told.wait_s is not None and start_s >= state.last_start_s:
            # Unless a later call was let through since, which knows better.
            self._block(start_s + min(told.wait_s, _LONGEST_BLOCK_S))

    def images_per_s(self, now_s: float) -> float:
        """The pictures a second, one a call, that may be made for now; infinity without a limit."""
        units_s = self.unit_s(self.factor(now_s))
        # A limit by the day counts once its bucket is empty.
        days_s = [
            unit_s
            for unit_s, tat_s in zip(units_s[3:5], self.state.tat_s[3:5], strict=True)
            if unit_s and tat_s + unit_s - _DAY_S > now_s
        ]
        slowest_s = max(*units_s[:2], *days_s, 0.0)
        return 1 / slowest_s if slowest_s else float("inf")

    def _correct(self, place: int, more: int, start_s: float) -> None:
        """Count what a call used beyond what was reserved for it, or less: by the day, and by the minute.

        Those by the minute were moved by the last refusal, whatever calls before it were to use.
        """
        if more:
            units_s = self.unit_s(self.state.factor)
            self.state.tat_s[place + _BY_DAY] += more * units_s[place + _BY_DAY]
            if start_s >= self.state.resumed_at_s:
                self.state.tat_s[place] += more * units_s[place]

    def _per_minute(self) -> list[float]:
        limits = (self.limits.images_per_minute, self.limits.requests_per_minute, self.limits.tokens_per_minute)
        known = [min(filter(None, pair), default=0.0) for pair in zip(limits, self.state.told, strict=True)]
        return known if any(known) else [self.state.found, 0.0, 0.0]

    def _costs_s(self, amounts: Amounts) -> list[float]:
        units = (amounts.images, amounts.requests, amounts.tokens) * 2
        return [amount * unit_s for amount, unit_s in zip(units, self.unit_s(self.state.factor), strict=True)]

    def _is_only_found(self) -> bool:
        limits = self.limits
        configured = (limits.images_per_minute, limits.requests_per_minute, limits.tokens_per_minute)
        return not any(configured) and not any(self.state.told)

    def _refused(self, amounts: Amounts, start_s: float, retry_after_s: float | None, now_s: float) -> None:
        state = self.state
        self._turn_minute(now_s)
        self._uncount(amounts)
        if retry_after_s is not None:
            self._block(now_s + min(retry_after_s, _LONGEST_BLOCK_S))
        if start_s < state.resumed_at_s:
            return  # on its way when the last cut was made: it says nothing about the rate since
        state.factor = self.factor(now_s)
        if self._is_only_found() and (not state.found or state.factor > 2 * state.goal):
            past_share = 1 - (now_s - state.minute_at_s) / _MINUTE_S
            state.found = max(_LEAST_FOUND, state.minute_images + state.last_minute_images * past_share)
            state.low, state.goal, state.return_s = 1.0, _FOUND_GOAL, _FOUND_RETURN_S
        else:
            self._cut(max(self._costs_s(amounts)[:_BY_DAY]), start_s)
        state.factor = state.low
        costs_s = self._costs_s(amounts)[:_BY_DAY]
        pause_s = min(max(_PAUSE_CALLS * max(costs_s), _LEAST_PAUSE_S), _MOST_FIRST_PAUSE_S)
        self._block(now_s + min(pause_s * 2**state.doublings, _MOST_PAUSE_S))
        state.resumed_at_s = state.blocked_until_s
        # A pause that is caught up on at once is none.
        for place, cost_s in enumerate(costs_s):
            state.tat_s[place] = max(state.tat_s[place], state.resumed_at_s + max(0.0, self.limits.burst_s - cost_s))
        state.calm = 0.0

    def _cut(self, cost_s: float, start_s: float) -> None:
        state = self.state
        passed = max(0.0, state.calm - 1)
        if cost_s:  # those reserved since this one was sent prove nothing yet
            passed = min(passed, max(0.0, start_s - state.resumed_at_s) / cost_s)
        state.low = max(state.factor * max(_left(passed) * (1 - _CUT), _LEAST_SHARE), _LEAST_FACTOR)
        if passed < _SOON_CALLS:
            state.goal = max(state.goal, state.factor)
            state.doublings = min(state.doublings + 1, _MOST_DOUBLINGS)
        else:
            state.goal = max(state.factor * _left(passed + _DOUBT_CALLS), _LEAST_FACTOR)
            goal_cost_s = cost_s * state.factor / state.goal
            state.return_s = min(max(_RETURN_CALLS * goal_cost_s, _LEAST_RETURN_S), _MOST_RETURN_S)
            state.doublings = 0.0

    def _block(self, until_s: float) -> None:
        self.state.blocked_until_s = max(self.state.blocked_until_s, until_s)

    def _turn_minute(self, now_s: float) -> None:
        state = self.state
        if now_s - state.minute_at_s >= 2 * _MINUTE_S:
            state.minute_at_s, state.minute_images, state.last_minute_images = now_s, 0.0, 0.0
        elif now_s - state.minute_at_s >= _MINUTE_S:
            state.minute_at_s += _MINUTE_S
            state.minute_images, state.last_minute_images = 0.0, state.minute_images

    def _uncount(self, amounts: Amounts) -> None:
        self.state.minute_images = max(0.0, self.state.minute_images - amounts.images)


def _left(passed: float) -> float:
    # Of a rate: what others leave of it, if after a pause so many calls were let through.
    return passed / (passed + _PAUSE_CALLS)


def _told(limit: RateLimit | None) -> float:
    # Some providers send 0 or -1 where they have no limit.
    return float(min(limit.limit, _MOST_TOLD)) if limit and limit.limit and limit.limit > 0 else 0.0


class LocalLimits:
    """`Limits` of this process alone; it forgets them when it ends.

    Where replicas share limits that nobody keeps, each takes an equal part of them, and keeps an equal part of the
    spare places free. What was learned together is taken over by `adopt`, so that the part is one of the limits as
    they are.
    """

    def __init__(
        self,
        *,
        limits: Mapping[str, GroupLimits],
        monotonic_s: Callable[[], float],
        replicas: Callable[[], int] = lambda: 1,
    ) -> None:
        """`limits` by group; a group without any has the default ones. `replicas` is how many share them now."""
        self._limits = limits
        self._monotonic_s = monotonic_s
        self._replicas = replicas
        self._groups: dict[str, Group] = {}
        self._lease_ends_s: dict[str, dict[str, float]] = {}

    async def reserve(self, group: str, amounts: Amounts, *, lease_s: float, spare: int = 0) -> Slot | None:
        """Reserve the next moment at which `amounts` may be sent in `group`, and a place; None if none is free."""
        now_s = self._monotonic_s()
        law = self._group(group)
        law.sharers = max(1, self._replicas())
        running = self._running(group, now_s)
        places = max(1, law.limits.concurrent // law.sharers)
        if running >= places - min(math.ceil(spare / law.sharers), places - 1):  # one is never kept from anybody
            return None
        start_s = law.reserve(amounts, now_s)
        slot = Slot(f"{uuid.uuid4().hex}@{start_s!r}", group, amounts, start_s - now_s, running + 1)
        self.hold(slot, lease_s)
        return slot

    async def release(self, slot: Slot) -> None:
        """Give a slot back unused."""
        if self.free(slot):
            self._group(slot.group).release(slot.amounts, start_s(slot))

    async def end(self, slot: Slot, report: CallReport) -> None:
        """Free the slot's place and learn from what its call met."""
        self.free(slot)
        self._group(slot.group).end(slot.amounts, start_s(slot), report, self._monotonic_s())

    def next_s(self, group: str) -> float:
        """Seconds until a call for one picture may be sent."""
        now_s = self._monotonic_s()
        return self._group(group).earliest_s(Amounts(), now_s) - now_s

    def images_per_s(self, group: str) -> float:
        """The pictures a second that the group may make now, as learned; infinity without a limit."""
        return self._group(group).images_per_s(self._monotonic_s())

    def images_per_minute(self, group: str) -> float | None:
        """The same by the minute, for reports; None without a limit."""
        per_s = self.images_per_s(group)
        return None if math.isinf(per_s) else per_s * _MINUTE_S

    def hold(self, slot: Slot, lease_s: float) -> None:
        """Count a slot of ours that was reserved elsewhere among those that run here."""
        self._lease_ends_s.setdefault(slot.group, {})[slot.id] = self._monotonic_s() + slot.wait_s + lease_s

    def free(self, slot: Slot) -> bool:
        """Count it no more; whether it was counted."""
        return self._lease_ends_s.get(slot.group, {}).pop(slot.id, None) is not None

    def adopt(self, group: str, known: Mapping[str, float], *, now_s: float) -> None:
        """Take over what all replicas know of a group: the fields of GroupState, their moments by a clock at `now_s`.

        `tat_s` and `told` are numbered from 1: `tat_s1`. What is missing is as it never was.
        """
        later_s = self._monotonic_s() - now_s
        law = self._group(group)
        law.sharers = 1
        law.state = GroupState(
            tat_s=[known.get(f"tat_s{place}", 0.0) + later_s for place in range(1, 7)],
            told=[known.get(f"told{place}", 0.0) for place in range(1, 4)],
            **{name: known.get(name, _AT_FIRST.get(name, 0.0)) for name in _AMOUNTS},
            **{name: known.get(name, 0.0) + later_s for name in _MOMENTS},
        )

    def _group(self, group: str) -> Group:
        if group not in self._groups:
            self._groups[group] = Group(self._limits.get(group, GroupLimits()), GroupState())
        return self._groups[group]

    def _running(self, group: str, now_s: float) -> int:
        places = self._lease_ends_s.setdefault(group, {})
        for slot_id in [slot_id for slot_id, end_s in places.items() if end_s <= now_s]:
            del places[slot_id]
        return len(places)


def start_s(slot: Slot) -> float:
    """The moment a slot was reserved for, by the clock of whoever reserved it: the end of its id."""
    return float(slot.id.rpartition("@")[2])


_MOMENTS = ("blocked_until_s", "last_start_s", "resumed_at_s", "told_at_s", "minute_at_s")
_AMOUNTS = (
    "factor",
    "calm",
    "doublings",
    "low",
    "goal",
    "return_s",
    "found",
    "minute_images",
    "last_minute_images",
)
_AT_FIRST = {"factor": 1.0, "low": 1.0, "goal": 1.0, "return_s": _LEAST_RETURN_S}
