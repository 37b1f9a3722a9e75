"""Which waiting job is sent to which upstream, and when.

    turn(job) ─▶ queue ─┐                       ┌─▶ the most urgent job that may use the slot
                        ├─ seek ─▶ slot ─ due ──┤
    limits, pool ───────┘                       └─▶ nobody may: the slot is given back

While jobs wait, slots are sought for them: a slot is the next moment at which a limit group may send, reserved in
`Limits` so that no other replica takes it. At most one is under way in a group. A slot belongs to nobody until its
moment comes; then the most urgent job takes it, so what was sought for a standard job never delays an interactive
one that came meanwhile.

Which groups a job may use is its reach. Lanes have a cost under the policy: their price factor (cheapest), their
rank (priority), or none. A job reaches as far up as it must: to the cheapest lanes that are expected to be in time
for it, or to the lowest rank that has room. Lanes within its reach may always take it, so a cheap one that is free
early still does. Reaches are looked at again every second, and whenever an upstream leaves or comes back.

Everything here but `Limits` is synchronous: between a slot's coming due and its job's turn nothing awaits.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Container, Coroutine, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from cacheserver.errors import CacheServerError, QueueFullError, ShuttingDownError
from cacheserver.generation.pool import Lane, Pool, groups_of
from cacheserver.generation.queue import Job, JobQueue, QueueOverflowError, Turn
from cacheserver.interfaces import Clock, Limits
from cacheserver.model import Amounts, CallReport, GroupLimits, Priority, Slot, UpstreamHealth
from cacheserver.tasks import OwnedTasks

_LOOK_AGAIN_S = 1.0
_SPILL_AFTER_S = 1.0
"""Under the policy priority: a wait above which the next rank is used as well."""

_ALL_DOWN_GRACE_S = 15.0
"""So long jobs wait for an upstream that is down, if there is no other: most outages are shorter."""

_LEVELS_LAST_S = 0.25
_SHORTEST_LATENCY_S = 0.001
_CLOSING_S = 2.0

_MUCH_LATER_S = 0.1
"""Than a slot was expected: jobs may then find one sooner elsewhere."""

_BUSY_POLL_S = 0.5
"""How often a full group is asked for a place again: another replica's calls end without a word to us."""


class Policy(StrEnum):
    """How to choose among upstreams that can serve a job."""

    CHEAPEST = "cheapest"
    LEAST_LATENCY = "least_latency"
    WEIGHTED = "weighted"
    PRIORITY = "priority"


@dataclass(eq=False, slots=True)
class _Group:
    """A limit group: its lanes, and the slot that is sought or due in it.

    `next_s` (monotonic) is the group's next free moment as last heard of, `due_s` that of the slot under way.
    `full_at_spare` is set while all places are taken: so many were to be kept free when it was refused.
    `traits` is None until someone looks again; `share` is the least of its open lanes', as of the last turn.
    """

    name: str
    lanes: list[Lane]
    limits: GroupLimits
    slot: Slot | None = None
    full_at_spare: int | None = None
    next_s: float = 0.0
    due_s: float = 0.0
    seeker: asyncio.Task[None] | None = None
    traits: _Traits | None = None
    share: float = 0.0


class _Level(NamedTuple):
    """What the lanes up to a cost can do for one model together: their next moment, pictures a second, latency."""

    cost: float
    next_s: float
    per_s: float
    latency_s: float

    def start_s(self, images_before: int) -> float:
        """Seconds until a picture begins that has so many before it."""
        return self.next_s + images_before / self.per_s if self.per_s else math.inf


class _Traits(NamedTuple):
    """What a group is to jobs, as long as prices and the pool stand as they do.

    `costs` is what a job of each model must reach for it, `least_cost` the least of its open lanes', `lanes` all it has
    by name. Groups of the same `kind` serve the same jobs. `is_steady`: none of its lanes is on trial.
    """

    costs: Mapping[str, float]
    least_cost: float
    lanes: frozenset[str]
    open: Sequence[Lane]
    kind: Hashable
    is_steady: bool


class Scheduler:
    """Gives waiting jobs their turns."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        pool: Pool,
        limits: Limits,
        group_limits: Mapping[str, GroupLimits],
        queue: JobQueue,
        clock: Clock,
        policy: Policy = Policy.CHEAPEST,
        interactive_share: float = 0.1,
        lease_s: float = 660.0,
    ) -> None:
        """`interactive_share` of a group's concurrent calls is kept for interactive jobs; 0 to 1.

        `lease_s` is how long a call may hold its place before it is taken for dead.
        """
        self._pool = pool
        self._limits = limits
        self._queue = queue
        self._clock = clock
        self._policy = policy
        self._lease_s = lease_s
        self._groups = {
            name: _Group(name, lanes, group_limits.get(name, GroupLimits()))
            for name, lanes in groups_of(pool.lanes).items()
        }
        self._spare = {
            name: min(math.ceil(group.limits.concurrent * interactive_share), group.limits.concurrent - 1)
            for name, group in self._groups.items()
        }
        self._tasks = OwnedTasks()
        self._costs: dict[str, float] = {}
        self._costs_until_s = 0.0
        self._exchanging: set[Job] = set()
        self._with_shares: dict[str, bool] = {}
        self._seek_soon: asyncio.Handle | None = None
        self._known_levels: dict[tuple[str, str, bool], tuple[float, list[_Level]]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._closing = False
        pool.on_change = self._pool_changed

    # ── a job's way ─────────────────────────────────────────────────────────────────────────────────────────

    async def turn(self, job: Job, *, again: bool = False) -> Turn:
        """Wait for the job's turn. Whoever gets one calls `finished` with it, whatever comes of the call.

        `again`: the job had a turn before, and waits in its old place even if the queue is full.

        Raises:
            QueueFullError: too many wait, or a more urgent job took its place in the queue.
            UpstreamError: no upstream for the model can be asked.
        """
        if self._closing:
            raise ShuttingDownError("The service is shutting down; try another replica.")
        self._check_served(job)
        self._refresh_costs()
        job.turn = asyncio.get_running_loop().create_future()
        self._admit(job, again=again)
        self._watch()
        self._seek()
        try:
            return await job.turn
        except asyncio.CancelledError:
            if job in self._queue:
                self._queue.remove(job)
            elif job.turn.done() and not job.turn.cancelled() and job.turn.exception() is None:
                self._give_back(job.turn.result())
            raise
        finally:
            if not self._queue and self._watching is not None:
                self._watching.cancel()
                self._watching = None

    def finished(self, turn: Turn, report: CallReport) -> None:
        """The turn's call is over, with this to say about its group's limits."""
        turn.lane.in_flight -= 1
        group = self._groups[turn.lane.group]
        self._tasks.own(self._end(group, turn.slot, report), "end slot")

    def hasten(self, job: Job, *, priority: Priority, deadline_s: float) -> None:
        """Someone more urgent waits for this job too; one that has its turn may need another."""
        if job in self._queue:
            self._queue.hasten(job, priority=priority, deadline_s=deadline_s)
            self._seek()
        else:
            job.priority, job.deadline_s = max(job.priority, priority), min(job.deadline_s, deadline_s)

    @property
    def depth(self) -> Mapping[Priority, int]:
        """How many jobs wait, by priority."""
        return self._queue.depth

    def wait_s(self, model: str, priority: Priority) -> float:
        """How long a new job is expected to wait for its turn."""
        levels = self._levels(model, "", is_urgent=priority is Priority.INTERACTIVE)
        return levels[-1].start_s(self._queue.images_before(priority, model)) if levels else math.inf

    async def aclose(self) -> None:
        """Turn away whoever waits, and give slots back."""
        self._closing = True
        for job in list(self._queue):
            self._fail(job, ShuttingDownError("The service is shutting down; try another replica."))
        stopping = [self._watching, *(group.seeker for group in self._groups.values())]
        running = [task for task in stopping if task is not None]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_CLOSING_S)
        await self._tasks.aclose(_CLOSING_S)

    def _check_served(self, job: Job) -> None:
        if not self._may_come(job.model):
            raise self._pool.why_none(job.model)

    def _may_come(self, model: str) -> bool:
        """Whether a job of this model may get a turn: an upstream is in the pool, or went down a moment ago."""
        since_s = self._clock.monotonic_s() - _ALL_DOWN_GRACE_S
        return any(
            lane.is_open or (lane.health is UpstreamHealth.DOWN and not lane.is_paused and lane.down_since_s > since_s)
            for lane in self._pool.serving(model)
        )

    def _admit(self, job: Job, *, again: bool) -> None:
        job.pinned = self._pin(job)
        job.past_percent = not job.pinned and self._needs_a_share(job)
        job.reach = self._reach(job, self._queue.images_before(job.priority, job.model))
        if again:
            self._queue.add_again(job)
            return
        try:
            left = self._queue.add(job)
        except QueueOverflowError:
            raise self._queue_full(job) from None
        for other in left:
            self._finish_waiting(other, self._queue_full(other))

    def _queue_full(self, job: Job) -> QueueFullError:
        wait_s = max(1.0, self.wait_s(job.model, job.priority))
        text = f"{len(self._queue)} generations wait already; about {wait_s:.0f} s until this one would begin."
        return QueueFullError(text, retry_after_s=wait_s if math.isfinite(wait_s) else None)

    def _fail(self, job: Job, error: CacheServerError) -> None:
        self._queue.remove(job)
        self._finish_waiting(job, error)

    @staticmethod
    def _finish_waiting(job: Job, error: CacheServerError) -> None:
        if not job.turn.done():
            job.turn.set_exception(error)

    # ── seeking slots ───────────────────────────────────────────────────────────────────────────────────────

    def _seek(self) -> None:
        """Look for slots soon: once, however many things happen at the same time."""
        if self._queue and not self._closing and self._seek_soon is None:
            self._seek_soon = asyncio.get_running_loop().call_soon(self._seek_now)

    def _seek_now(self) -> None:
        """Seek slots in idle groups while more jobs wait than slots are under way that could serve them."""
        self._seek_soon = None
        idle = [group for group in self._groups.values() if group.seeker is None and self._with_room(group)]
        if self._closing or not idle:
            return
        seeking = [group for group in self._groups.values() if group.seeker is not None]
        now_s = self._clock.monotonic_s()
        if self._is_met(seeking, now_s):
            return
        unwanted_from_s: dict[Hashable, float] = {}
        # The less the service keeps up, the more groups are idle, and each job looks at them all.
        for group in sorted(idle, key=self._preference(now_s)):
            due_s, kind = max(group.next_s, now_s), self._traits(group).kind
            if due_s >= unwanted_from_s.get(kind, math.inf):
                continue
            if not self._is_wanted(group, seeking, due_s):
                unwanted_from_s[kind] = due_s
            elif self._start_seeking(group):
                seeking.append(group)
                if self._is_met(seeking, now_s):
                    return

    def _is_met(self, seeking: Sequence[_Group], now_s: float) -> bool:
        """Whether slots that are due now are under way for all jobs that wait."""
        ready = [group for group in seeking if group.due_s <= now_s]
        if len(self._queue) > len(ready):
            return False
        waiting: Counter[str] = Counter()
        reaches: dict[str, float] = {}
        for route, count in self._queue.demand.items():
            if route.pinned or route.past_percent:
                return False
            waiting[route.model] += count
            reaches[route.model] = min(reaches.get(route.model, math.inf), route.reach)
        return all(
            count <= sum(self._traits(group).costs.get(model, math.inf) <= reaches[model] for group in ready)
            for model, count in waiting.items()
        )

    def _with_room(self, group: _Group) -> Sequence[Lane]:
        traits = self._traits(group)
        return traits.open if traits.is_steady else [lane for lane in traits.open if lane.has_room]

    def _traits(self, group: _Group) -> _Traits:
        if group.traits is None:
            group.traits = self._look_at(group)
            group.share = _least_share(group.traits.open)
        return group.traits

    def _forget_traits(self) -> None:
        self._with_shares.clear()
        for group in self._groups.values():
            group.traits = None

    def _look_at(self, group: _Group) -> _Traits:
        costs: dict[str, float] = {}
        for lane in group.lanes:
            for model in lane.models:
                if self._takes_any(lane, model):
                    costs[model] = max(costs.get(model, -math.inf), self._cost(lane))
        is_open = [lane for lane in group.lanes if lane.is_open]
        is_steady = not any(lane.is_on_trial for lane in is_open)
        is_plain = is_steady and all(lane.percent is None for lane in is_open)
        return _Traits(
            costs,
            min((self._cost(lane) for lane in is_open), default=math.inf),
            frozenset(lane.name for lane in group.lanes),
            is_open,
            frozenset((lane.models, self._cost(lane)) for lane in is_open) if is_plain else group.name,
            is_steady,
        )

    def _is_wanted(self, group: _Group, seeking: Sequence[_Group], due_s: float) -> bool:
        """Whether more jobs wait that a lane of this group may take than slots for them are due by `due_s`."""
        return any(
            count > len(seeking)
            or count > sum(each.due_s <= due_s and self._is_alike(each, lane, model) for each in seeking)
            for lane in self._with_room(group)
            for model in lane.models
            if (count := self._waiting(lane, model))
        )

    def _is_alike(self, group: _Group, lane: Lane, model: str) -> bool:
        """Whether a slot of this group serves the jobs of `model` that need a lane like this one."""
        traits = self._traits(group)
        return lane.name in traits.lanes or traits.costs.get(model, -math.inf) >= self._cost(lane)

    def _waiting(self, lane: Lane, model: str) -> int:
        """How many jobs of `model` wait that this lane may take."""
        cost, has_percent = self._cost(lane), lane.percent is not None
        return sum(
            count
            for route, count in self._queue.demand.items()
            if route.model == model
            and (
                route.pinned == lane.name
                if route.pinned
                else route.reach >= cost and (route.past_percent or not has_percent)
            )
        )

    def _takes_any(self, lane: Lane, model: str) -> bool:
        """Whether it takes jobs of `model` not pinned to it: one with a percentage does not while others are there."""
        return lane.percent is None or not self._has_free(model)

    def _preference(self, now_s: float) -> Callable[[_Group], tuple[float, ...]]:
        """What to order groups by, those to seek in first coming first."""
        match self._policy:
            case Policy.LEAST_LATENCY:
                return lambda group: (
                    max(group.next_s, now_s) + min(lane.latency_s("") for lane in self._with_room(group)),
                )
            case Policy.WEIGHTED:
                return lambda group: (group.share, max(group.next_s, now_s))
            case Policy.CHEAPEST | Policy.PRIORITY:
                return lambda group: (self._traits(group).least_cost, max(group.next_s, now_s), group.share)

    def _start_seeking(self, group: _Group) -> bool:
        """Seek a slot for the most urgent job the group may serve, if it may have a place for that."""
        job = next((job for job in self._queue if self._lane(group, job) is not None), None)
        if job is None:
            return False
        kept = self._kept(group, job)
        if group.full_at_spare is not None and kept >= group.full_at_spare:
            return False
        self._run_seeker(group, self._seek_slot(group, job.amounts, kept))
        return True

    def _run_seeker(self, group: _Group, work: Coroutine[None, None, None]) -> None:
        group.due_s = group.next_s
        group.seeker = self._tasks.own(work, f"seek {group.name}")
        group.seeker.add_done_callback(lambda seeker: self._sought(group, seeker))

    def _sought(self, group: _Group, seeker: asyncio.Task[None]) -> None:
        """The seeker has ended: use what it found."""
        group.seeker = None
        if not seeker.cancelled() and seeker.exception() is not None:
            self._pause(group, spare=0)  # a bug, which is logged: asking on at once would only repeat it
        self._use(group)

    async def _seek_slot(self, group: _Group, amounts: Amounts, spare: int) -> None:
        """Reserve the group's next slot and wait until it is due."""
        expected_s = max(group.next_s, self._clock.monotonic_s())
        slot = await self._limits.reserve(group.name, amounts, lease_s=self._lease_s, spare=spare)
        self._hear(group)
        if slot is not None and self._closing:
            self._release(slot)
            return
        if slot is None:
            self._pause(group, spare=spare)
            return
        group.due_s = self._clock.monotonic_s() + slot.wait_s
        if slot.wait_s > 0 and group.due_s > expected_s + _MUCH_LATER_S:
            self._seek()  # another replica was there first: another group may be sooner
        try:
            if slot.wait_s > 0:
                await self._clock.sleep(slot.wait_s)
        except asyncio.CancelledError:
            self._release(slot)
            raise
        group.slot = slot

    def _hear(self, group: _Group) -> None:
        """Ask `Limits` what it knows of the group: after each talk of it, since every job looks at every group."""
        group.next_s = self._clock.monotonic_s() + self._limits.next_s(group.name)

    def _pause(self, group: _Group, *, spare: int) -> None:
        """Ask for no place in the group for a moment, unless fewer than `spare` must be kept free."""
        group.full_at_spare = spare
        self._tasks.own(self._ask_again(group), "ask again")

    async def _ask_again(self, group: _Group) -> None:
        await self._clock.sleep(_BUSY_POLL_S)
        group.full_at_spare = None
        self._seek()

    # ── using slots ─────────────────────────────────────────────────────────────────────────────────────────

    def _use(self, group: _Group) -> None:
        """Give the group's due slot to the most urgent job that one of its lanes may take, or give it back."""
        slot, group.slot = group.slot, None
        if slot is not None:
            job = next((job for job in self._queue if self._may_use(group, slot, job)), None)
            if job is None:
                self._release(slot)
            elif _is_too_small(slot, job):
                # It was sought for a smaller call: seek one that fits, which is due no later than it must be.
                self._exchanging.add(job)
                self._run_seeker(group, self._exchange(group, slot, job))
            else:
                self._queue.take(job)
                self._begin(group, slot, job)
        self._seek()

    def _may_use(self, group: _Group, slot: Slot, job: Job) -> bool:
        """Whether it may have the slot, or one that is sought in its place."""
        if job in self._exchanging and _is_too_small(slot, job):
            return False  # one group seeks what fits it: were all to, the others' would be too large for the next jobs
        return slot.running <= group.limits.concurrent - self._kept(group, job) and self._lane(group, job) is not None

    def _kept(self, group: _Group, job: Job) -> int:
        """Places that are not for this job."""
        return 0 if job.priority is Priority.INTERACTIVE else self._spare[group.name]

    async def _exchange(self, group: _Group, slot: Slot, job: Job) -> None:
        try:
            await self._limits.release(slot)
            self._hear(group)
            await self._seek_slot(group, job.amounts, self._kept(group, job))
        finally:
            self._exchanging.discard(job)

    def _begin(self, group: _Group, slot: Slot, job: Job) -> None:
        lane = self._lane(group, job)
        if lane is None:
            raise AssertionError("a job was taken that no lane may serve")
        if job.turn.done():  # cancelled, and its task has not run since
            self._release(slot)
            return
        lane.in_flight += 1
        lane.calls += 1
        lane.served += job.amounts.images
        group.share = _least_share(self._traits(group).open)
        job.turn.set_result(Turn(lane, slot))

    def _lane(self, group: _Group, job: Job) -> Lane | None:
        """The lane of this group that the job should go to; None if none may take it."""
        lanes = [lane for lane in group.lanes if lane.has_room and self._may_take(lane, job)]
        return min(lanes, key=lambda lane: (self._cost(lane), _share(lane)), default=None)

    def _may_take(self, lane: Lane, job: Job) -> bool:
        if job.model not in lane.models or (lane.name in job.avoid and self._has_other(job)):
            return False
        if job.pinned:
            return lane.name == job.pinned
        return self._cost(lane) <= job.reach and (job.past_percent or lane.percent is None)

    def _has_free(self, model: str, avoid: Container[str] = ()) -> bool:
        """Whether an upstream without a percentage could serve a job of `model` that has failed at those in `avoid`."""
        return any(
            lane.percent is None and lane.has_room and lane.name not in avoid for lane in self._pool.serving(model)
        )

    def _needs_a_share(self, job: Job) -> bool:
        """Whether only upstreams with a percentage could serve the job now."""
        return self._has_shares(job.model) and not self._has_free(job.model, job.avoid)

    def _has_shares(self, model: str) -> bool:
        """Whether some upstream of `model` has a percentage; remembered as long as the traits are."""
        known = self._with_shares.get(model)
        if known is None:
            known = any(lane.percent is not None for lane in self._pool.serving(model))
            self._with_shares[model] = known
        return known

    def _has_other(self, job: Job) -> bool:
        """Whether an upstream could serve the job that has not failed it yet."""
        return any(lane.has_room and lane.name not in job.avoid for lane in self._pool.serving(job.model))

    def _give_back(self, turn: Turn) -> None:
        """A job was cancelled between getting its turn and using it."""
        turn.lane.in_flight -= 1
        self._release(turn.slot)
        self._seek()

    def _release(self, slot: Slot) -> None:
        self._tasks.own(self._give(slot), "release slot")

    async def _give(self, slot: Slot) -> None:
        await self._limits.release(slot)
        self._hear(self._groups[slot.group])

    async def _end(self, group: _Group, slot: Slot, report: CallReport) -> None:
        await self._limits.end(slot, report)
        self._hear(group)
        group.full_at_spare = None
        self._seek()

    # ── how far a job reaches ───────────────────────────────────────────────────────────────────────────────

    def _cost(self, lane: Lane) -> float:
        """What a job must reach to be taken by this lane."""
        cost = self._costs.get(lane.name)
        if cost is None:
            cost = self._costs[lane.name] = self._measure_cost(lane)
        return cost

    def _refresh_costs(self) -> None:
        """Look costs up anew once a second: prices step with what is spent."""
        now_s = self._clock.monotonic_s()
        if now_s >= self._costs_until_s:
            self._costs.clear()
            self._forget_traits()
            self._costs_until_s = now_s + _LOOK_AGAIN_S

    def _measure_cost(self, lane: Lane) -> float:
        match self._policy:
            case Policy.CHEAPEST:
                return float(self._pool.price_factor(lane))
            case Policy.PRIORITY:
                return float(lane.terms.rank)
            case _:
                return 0.0

    def _reach(self, job: Job, images_before: int) -> float:
        """The least cost at which the job is expected to be served in time; the highest there is, if at none.

        A job that has failed somewhere reaches everywhere: it has lost time, and must not come back to nobody else.
        """
        levels = self._levels(job.model, job.request.quality, is_urgent=job.priority is Priority.INTERACTIVE)
        fitting = (level for level in levels if self._is_in_time(job, level, images_before))
        if not levels or job.avoid:
            return math.inf
        return next(fitting, levels[-1]).cost

    def _is_in_time(self, job: Job, level: _Level, images_before: int) -> bool:
        start_s = level.start_s(images_before)
        if self._policy is Policy.PRIORITY:
            return start_s <= _SPILL_AFTER_S
        return self._clock.monotonic_s() + start_s + level.latency_s <= job.deadline_s

    def _levels(self, model: str, quality: str, *, is_urgent: bool) -> list[_Level]:
        """What the open lanes of `model` can do, up to each cost there is. Looked at anew four times a second."""
        now_s = self._clock.monotonic_s()
        known = self._known_levels.get((model, quality, is_urgent))
        if known is not None and now_s < known[0] + _LEVELS_LAST_S:
            return known[1]
        levels = self._measure_levels(model, quality, is_urgent=is_urgent)
        self._known_levels[model, quality, is_urgent] = now_s, levels
        return levels

    def _measure_levels(self, model: str, quality: str, *, is_urgent: bool) -> list[_Level]:
        lanes = [lane for lane in self._pool.serving(model) if lane.has_room and self._takes_any(lane, model)]
        by_cost: dict[float, list[Lane]] = {}
        for lane in lanes:
            by_cost.setdefault(self._cost(lane), []).append(lane)
        levels: list[_Level] = []
        next_s, per_s, latency_s = math.inf, 0.0, math.inf
        for cost in sorted(by_cost):
            for name, members in groups_of(by_cost[cost]).items():
                group_next_s, group_per_s = self._capacity(self._groups[name], members, quality, is_urgent=is_urgent)
                next_s = min(next_s, group_next_s)
                per_s += group_per_s
            latency_s = min(latency_s, *(lane.latency_s(quality) for lane in by_cost[cost]))
            levels.append(_Level(cost, next_s, per_s, latency_s))
        return levels

    def _capacity(self, group: _Group, lanes: Sequence[Lane], quality: str, *, is_urgent: bool) -> tuple[float, float]:
        """The next moment of a group, and the pictures a second that it can make: bounded by rate and by places."""
        places = group.limits.concurrent - (0 if is_urgent else self._spare[group.name])
        latency_s = max(min(lane.latency_s(quality) for lane in lanes), _SHORTEST_LATENCY_S)
        running = sum(lane.in_flight for lane in group.lanes)
        # With all places taken one comes free every so often.
        place_s = latency_s / places if running >= places else 0.0
        next_s = max(group.next_s - self._clock.monotonic_s(), place_s)
        return next_s, min(self._limits.images_per_s(group.name), places / latency_s)

    def _pin(self, job: Job) -> str:
        """The lane whose percentage is due, if there is one: it gets this job."""
        if not self._has_shares(job.model):
            return ""
        lanes = [lane for lane in self._pool.serving(job.model) if lane.has_room and lane.name not in job.avoid]
        shares = [lane for lane in lanes if lane.percent is not None]
        for lane in shares:
            lane.credit += (lane.percent or 0.0) / 100 * job.amounts.images
        due = max(shares, key=lambda lane: lane.credit, default=None)
        if due is None or (due.credit < job.amounts.images and len(shares) < len(lanes)):
            return ""
        # While shares are alone they get more than theirs: they need not make up for all of it later.
        due.credit = max(due.credit - job.amounts.images, -job.amounts.images)
        return due.name

    def _look_again(self) -> None:
        """See anew how far each waiting job reaches, and turn away those that nobody can serve."""
        self._known_levels.clear()
        self._refresh_costs()
        may_come = {model: self._may_come(model) for model in self._pool.models}
        images: Counter[str] = Counter()
        for job in list(self._queue):
            if not may_come[job.model]:
                self._fail(job, self._pool.why_none(job.model))
                continue
            before = images[job.model]
            pinned = job.pinned if job.pinned and self._is_served_by(job.pinned, job, before) else ""
            past_percent = not pinned and self._needs_a_share(job)
            self._queue.reroute(job, pinned=pinned, reach=self._reach(job, before), past_percent=past_percent)
            images[job.model] += job.amounts.images

    def _is_served_by(self, pinned: str, job: Job, images_before: int) -> bool:
        """Whether the lane a job is pinned to is expected to serve it in time."""
        for lane in self._pool.serving(job.model):
            if lane.name == pinned and lane.has_room:
                group = self._groups[lane.group]
                next_s, per_s = self._capacity(group, [lane], job.request.quality, is_urgent=False)
                mine = images_before * (lane.percent or 0.0) / 100
                start_s = next_s + mine / per_s
                return self._clock.monotonic_s() + start_s + lane.latency_s(job.request.quality) <= job.deadline_s
        return False

    def _pool_changed(self) -> None:
        self._forget_traits()
        self._look_again()
        self._seek()

    def _watch(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = self._tasks.own(self._look_again_while_jobs_wait(), "watch the queue")

    async def _look_again_while_jobs_wait(self) -> None:
        while self._queue:
            await self._clock.sleep(_LOOK_AGAIN_S)
            self._look_again()
            self._seek()


def _is_too_small(slot: Slot, job: Job) -> bool:
    return job.amounts.images > slot.amounts.images


def _share(lane: Lane) -> float:
    """What a lane has had for its weight: who has had least is next."""
    return lane.served / lane.weight if lane.weight else math.inf


def _least_share(lanes: Sequence[Lane]) -> float:
    return min(map(_share, lanes), default=math.inf)
