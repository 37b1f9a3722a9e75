"""The upstreams we may call: how well each does, what it costs, and whether it is asked at all.

An upstream that fails leaves the pool and comes back by itself. One that is down is probed every few seconds, and
leaves again at the first failure. One that lacks a right or money is probed every hour, since there a person must
act; no probe is sure to tell, so it comes back on trial: one call at a time until one has succeeded.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import structlog

from cacheserver.errors import (
    UnknownUpstreamError,
    UpstreamBadImageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
from cacheserver.interfaces import Books, Clock, Upstream
from cacheserver.model import UpstreamHealth, UpstreamState
from cacheserver.tasks import OwnedTasks

_log = structlog.get_logger(__name__)

_DECAY = 0.1
_UNKNOWN_LATENCY_S = 20.0
_REMEMBERED_LATENCIES = 200
_ENOUGH_FOR_A_P99 = 20

_FAILURES_IN_A_ROW = 3
_LIMITED_IN_A_ROW = 3
"""So many 429s and never a success are a missing right, not a limit: one may be another's traffic."""

_REFUTED_BY_A_SUCCESS = frozenset({UpstreamHealth.DOWN, UpstreamHealth.NOT_ENTITLED})

_FIRST_PROBE_S, _LAST_PROBE_S = 0.5, 4.0
_HOURLY_S = 3_600.0


@dataclass(frozen=True, slots=True)
class PriceStep:
    """A price factor that holds from so much spent in a month on."""

    from_microusd: int
    factor: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What an operator says of one upstream."""

    models: tuple[str, ...]
    limit_group: str
    max_n: int = 10
    price_factor: Decimal = Decimal(1)
    price_steps: Sequence[PriceStep] = ()
    max_cost_microusd: int | None = None
    weight: float = 1.0
    percent: float | None = None
    rank: int = 0


@dataclass(slots=True)
class _Latency:
    """How long calls took: a decayed average and the latest, for the p99."""

    mean_s: float
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_LATENCIES))

    def add(self, seconds: float) -> None:
        self.mean_s += _DECAY * (seconds - self.mean_s)
        self.latest.append(seconds)


class Lane:
    """One upstream in the pool. Changed only from the event loop."""

    def __init__(self, upstream: Upstream, terms: Terms, *, has_succeeded: bool) -> None:
        """`has_succeeded`: in an earlier life it made a picture, so it has the right to."""
        self.upstream = upstream
        self.terms = terms
        self.name = upstream.name
        self.group = terms.limit_group
        self.models = frozenset(terms.models)
        self.weight = terms.weight
        self.percent = terms.percent
        self.credit = 0.0
        """Pictures that its percentage owes it."""
        self.served = 0
        """Pictures asked of it so far: what weights are measured by."""
        self.in_flight = 0
        self.calls = 0
        self.success_rate = 1.0
        self.health = UpstreamHealth.WELL
        self.is_paused = False
        self.is_on_trial = False
        self.down_since_s = math.inf
        self.has_succeeded = has_succeeded
        self.failures = 0
        self.limited = 0
        self._latencies: dict[str, _Latency] = {}

    @property
    def is_open(self) -> bool:
        """Whether it is asked at all."""
        return self.health is UpstreamHealth.WELL and not self.is_paused

    @property
    def has_room(self) -> bool:
        """Whether it may be asked now: while on trial, one call at a time."""
        return self.is_open and not (self.is_on_trial and self.in_flight)

    def latency_s(self, quality: str) -> float:
        """What a call for `quality` is expected to take."""
        if (known := self._latencies.get(quality)) is not None:
            return known.mean_s
        return max((each.mean_s for each in self._latencies.values()), default=_UNKNOWN_LATENCY_S)

    def p99_s(self, quality: str) -> float:
        """What 99 of 100 calls for `quality` did not exceed; infinite while too few are known."""
        known = self._latencies.get(quality)
        if known is None or len(known.latest) < _ENOUGH_FOR_A_P99:
            return math.inf
        return sorted(known.latest)[math.ceil(len(known.latest) * 0.99) - 1]

    def took(self, quality: str, seconds: float) -> None:
        """A call for `quality` succeeded after so long."""
        if quality not in self._latencies:
            self._latencies[quality] = _Latency(seconds)
        self._latencies[quality].add(seconds)

    @property
    def mean_latencies_s(self) -> dict[str, float]:
        """What calls took on average, by the qualities that were made."""
        return {quality: each.mean_s for quality, each in self._latencies.items()}

    @property
    def mean_latency_s(self) -> float | None:
        """The average over all qualities; None before the first success."""
        means = self.mean_latencies_s.values()
        return sum(means) / len(means) if means else None


class Pool:
    """All upstreams, and who looks after those that fail."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        *,
        clock: Clock,
        books: Books,
        month_spend_microusd: Callable[[str], int],
        images_per_minute: Callable[[str], float | None] = lambda _: None,
    ) -> None:
        """`month_spend_microusd` tells what an upstream was paid this month, `images_per_minute` a group's limit."""
        self.lanes = tuple(lanes)
        self._by_name = {lane.name: lane for lane in self.lanes}
        self._serving = {model: [lane for lane in self.lanes if model in lane.models] for model in self.models}
        self._priced_apart: dict[str, list[Lane]]
        self._price_apart()
        self._former: list[Upstream] = []
        """Those whose places others took, and whose calls may still be under way."""
        self._clock = clock
        self._books = books
        self._month_spend_microusd = month_spend_microusd
        self.images_per_minute = images_per_minute
        """What a limit group may make a minute, as learned; None without a limit."""
        self._tasks = OwnedTasks()
        self.on_change: Callable[[], None] = lambda: None
        """Called when an upstream left the pool or came back."""
        for lane in self.lanes:
            books.upstream_health(lane.name, lane.health)

    def replace(self, changed: Mapping[str, tuple[Terms, Upstream | None]]) -> None:
        """From now on these lanes have these terms, and upstreams where there are any; models and groups stay.

        What an operator has set of a lane stands where its terms say what they said before.
        """
        for name, (terms, upstream) in changed.items():
            lane = self._by_name[name]
            if terms.weight != lane.terms.weight:
                lane.weight = terms.weight
            if terms.percent != lane.terms.percent:
                lane.percent = terms.percent
            lane.terms = terms
            if upstream is not None:
                self._former.append(lane.upstream)
                lane.upstream = upstream
        self._price_apart()
        self.on_change()

    def _price_apart(self) -> None:
        self._priced_apart = {
            model: list({_price(lane): lane for lane in lanes}.values()) for model, lanes in self._serving.items()
        }

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that some upstream serves, each once."""
        return tuple(dict.fromkeys(model for lane in self.lanes for model in lane.terms.models))

    def serving(self, model: str) -> Sequence[Lane]:
        """The upstreams that have `model`, in the pool or not."""
        return self._serving.get(model, ())

    def priced_apart(self, model: str) -> Sequence[Lane]:
        """Of the upstreams that have `model`, one for each price there is: most of a large pool are priced alike."""
        return self._priced_apart.get(model, ())

    def price_factor(self, lane: Lane) -> Decimal:
        """What `lane` takes of the list price now, by what it was paid this month."""
        if not lane.terms.price_steps:
            return lane.terms.price_factor
        spent = self._month_spend_microusd(lane.name)
        steps = [step for step in lane.terms.price_steps if spent >= step.from_microusd]
        reached = max(steps, key=lambda step: step.from_microusd, default=None)
        return lane.terms.price_factor * (reached.factor if reached is not None else 1)

    def why_none(self, model: str) -> UpstreamError:
        """Why no upstream can make pictures with `model` now: what a caller is told."""
        lanes = self.serving(model)
        states = {lane.name: UpstreamHealth.PAUSED if lane.is_paused else lane.health for lane in lanes}
        text = "; ".join(f"{name} is {state}" for name, state in states.items())
        if UpstreamHealth.DOWN in states.values() or UpstreamHealth.PAUSED in states.values():
            return UpstreamDownError(f"No upstream for this model can be asked ({text}).", retry_after_s=_LAST_PROBE_S)
        if UpstreamHealth.NO_QUOTA in states.values():
            return UpstreamQuotaError(f"No upstream for this model has money left ({text}). Raise its limit there.")
        return UpstreamNotEntitledError(f"No upstream accepts our key for this model ({text}). Check its rights.")

    def succeeded(self, lane: Lane, *, quality: str, seconds: float) -> None:
        """A call made its pictures."""
        lane.took(quality, seconds)
        lane.success_rate += _DECAY * (1 - lane.success_rate)
        lane.has_succeeded = True
        if lane.health in _REFUTED_BY_A_SUCCESS:  # a call that was under way when others failed
            self._bring_back(lane)
        self._answered(lane)
        if lane.is_on_trial:
            lane.is_on_trial = False
            self.on_change()

    def failed(self, lane: Lane, error: UpstreamError) -> None:
        """A call failed: count it against the upstream where it is the upstream's fault."""
        match error:
            case UpstreamQuotaError():
                self._take_out(lane, UpstreamHealth.NO_QUOTA)
            case UpstreamNotEntitledError() if not lane.has_succeeded:
                self._take_out(lane, UpstreamHealth.NOT_ENTITLED)
            case UpstreamLimitedError():
                lane.limited += 1
                # While other calls are under way one of them may be the first success.
                is_alone = lane.in_flight <= 1
                if not lane.has_succeeded and is_alone and lane.limited >= _LIMITED_IN_A_ROW:
                    self._take_out(lane, UpstreamHealth.NOT_ENTITLED)
            case UpstreamDownError() | UpstreamBadImageError() | UpstreamNotEntitledError():
                lane.failures += 1
                lane.success_rate -= _DECAY * lane.success_rate
                if lane.failures >= _FAILURES_IN_A_ROW:
                    self._take_out(lane, UpstreamHealth.DOWN)
            case _:
                self._answered(lane)  # it judged the request: it is well

    def states(self) -> list[UpstreamState]:
        """Every upstream as it stands."""
        return [self._state(lane) for lane in self.lanes]

    async def update(
        self,
        name: str,
        *,
        weight: float | None = None,
        percent: float | None = None,
        clear_percent: bool = False,
        paused: bool | None = None,
    ) -> UpstreamState:
        """Change what an operator may change of an upstream; to let it go on also ends its being out of the pool.

        Raises:
            UnknownUpstreamError: there is none of this name.
        """
        lane = self._by_name.get(name)
        if lane is None:
            raise UnknownUpstreamError(f"No upstream is called so; there are: {', '.join(self._by_name)}.")
        lane.weight = lane.weight if weight is None else weight
        lane.percent = None if clear_percent else lane.percent if percent is None else percent
        if paused is not None:
            lane.is_paused = paused
            if not paused and lane.health is not UpstreamHealth.WELL:
                self._bring_back(lane)
        self.on_change()
        return self._state(lane)

    async def check(self) -> None:
        """Return if every upstream answers and accepts our key; raise the first UpstreamError if not."""
        await asyncio.gather(*(lane.upstream.check() for lane in self.lanes))

    async def aclose(self) -> None:
        """Probe no more, and let go of the upstreams' connections."""
        await self._tasks.aclose(0)
        for upstream in (*(lane.upstream for lane in self.lanes), *self._former):
            await upstream.aclose()

    def _answered(self, lane: Lane) -> None:
        lane.failures = lane.limited = 0

    def _take_out(self, lane: Lane, health: UpstreamHealth) -> None:
        lane.failures = lane.limited = 0
        if lane.health is not UpstreamHealth.WELL:
            return
        lane.health = health
        lane.down_since_s = self._clock.monotonic_s()
        self._books.upstream_health(lane.name, health)
        log = _log.warning if health is UpstreamHealth.DOWN else _log.error
        log("upstream_out", upstream=lane.name, health=health, text=_ALARMS[health])
        self._tasks.own(self._probe(lane, health), f"probe {lane.name}")
        self.on_change()

    async def _probe(self, lane: Lane, health: UpstreamHealth) -> None:
        wait_s = _FIRST_PROBE_S if health is UpstreamHealth.DOWN else _HOURLY_S
        while lane.health is health:
            await self._clock.sleep(wait_s)
            wait_s = min(2 * wait_s, _LAST_PROBE_S) if health is UpstreamHealth.DOWN else _HOURLY_S
            try:
                await lane.upstream.check()
            except UpstreamError as error:
                _log.info("upstream_still_out", upstream=lane.name, reason=error.reason)
                continue
            if lane.health is health:
                self._bring_back(lane)

    def _bring_back(self, lane: Lane) -> None:
        lane.is_on_trial = lane.health is not UpstreamHealth.DOWN
        lane.failures = _FAILURES_IN_A_ROW - 1
        lane.limited = _LIMITED_IN_A_ROW - 1
        lane.health = UpstreamHealth.WELL
        lane.down_since_s = math.inf
        self._books.upstream_health(lane.name, lane.health)
        _log.info("upstream_back", upstream=lane.name)
        self.on_change()

    def _state(self, lane: Lane) -> UpstreamState:
        return UpstreamState(
            name=lane.name,
            limit_group=lane.group,
            models=lane.terms.models,
            health=UpstreamHealth.PAUSED if lane.is_paused else lane.health,
            weight=lane.weight,
            percent=lane.percent,
            rank=lane.terms.rank,
            price_factor=float(self.price_factor(lane)),
            success_rate=lane.success_rate,
            latency_s=lane.mean_latency_s,
            in_flight=lane.in_flight,
            calls=lane.calls,
            images_per_minute=self.images_per_minute(lane.group),
        )


_ALARMS: Mapping[UpstreamHealth, str] = {
    UpstreamHealth.DOWN: "it failed too often; probed until it is back",
    UpstreamHealth.NOT_ENTITLED: "it never accepted our key for this: check the key's rights at the provider",
    UpstreamHealth.NO_QUOTA: "its account's credit or spend limit is used up: raise it at the provider",
}


def _price(lane: Lane) -> Hashable:
    """Alike for lanes that always cost the same. One whose price steps with what it was paid is like no other."""
    terms = lane.terms
    return lane.name if terms.price_steps else (terms.price_factor, terms.max_cost_microusd)


def groups_of(lanes: Iterable[Lane]) -> dict[str, list[Lane]]:
    """The lanes by their limit group."""
    groups: dict[str, list[Lane]] = {}
    for lane in lanes:
        groups.setdefault(lane.group, []).append(lane)
    return groups
