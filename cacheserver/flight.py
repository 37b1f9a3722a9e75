"""Single-flight: one load per identity, owned by the server and joined by everyone who lacks what it loads.

A flight is the third state beside hit and miss. It belongs to the server, not to its first caller: a caller
that hangs up ends its own wait, never the load. Only when everyone has left before money was spent is the
load dropped. This file knows nothing of tiers or upstreams; what a load does is `PromptCache`'s business.

One identity may have several flights in a row, never side by side: who wants more than the running one can
still give starts the next, which begins when the one before has ended. So no two loads of an identity ever
generate at the same time, and a load always sees what the one before it stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import structlog

from cacheserver.errors import CacheServerError, ShuttingDownError
from cacheserver.freshness import is_of_upstream
from cacheserver.identity import canonical_key
from cacheserver.model import (
    AnswerFrom,
    CachedImage,
    CacheKey,
    CachePolicy,
    Caller,
    Identity,
    ImageRequest,
    MatchLevel,
    Namespace,
    Order,
    PartialImage,
    Priority,
    Stale,
    Terms,
    TierName,
    VariantPolicy,
)
from cacheserver.tasks import end

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One picture a flight brought in. `payer` is the `ticket` of the waiter told its cost, None if a tier had it.

    `derived`: the tier had another one, which this flight made it from. `stale`: it is past its end. `matched`: it is
    of another key, and agrees so far with what is asked for by the prompt that has the digest `matched_for`.
    """

    entry: CachedImage
    tier: TierName
    payer: object | None = None
    derived: bool = False
    stale: Stale = Stale.NO
    matched: MatchLevel | None = None
    matched_for: bytes = b""


@dataclass(eq=False, slots=True)
class Waiter:
    """One caller's part in a flight: what it wants, what it accepts, and whether it may pay for it.

    `variants` are wanted in this order. `refusal` is the error this caller gets instead of a generation; a
    waiter without one may pay. `not_before_s` refuses older pictures; `refresh` refuses every picture whose
    generation began before the waiter came. `until_s` is the caller's deadline (monotonic), None without one.
    `spare_microusd` is what pictures cost that were paid for it beyond those it asked for. `asked` is None for a
    call by key. `listens` until its call is over; it has `heard` so many partial pictures. `ticket` stands for it in
    its own answer, which would otherwise keep it, and its request's images, until someone collects garbage. `epoch` is
    that of the last purge that was known when it came, or when its call was about to be paid for. What expired after
    `stale_from_s` (wall clock) it takes at once, after `error_from_s` in place of an upstream's error; None: never.
    `renews`: it has a new picture made of what others were answered with.
    """

    key: CacheKey
    variants: tuple[int, ...]
    namespace: Namespace
    caller: Caller
    terms: Terms
    asked: tuple[ImageRequest, Identity] | None = None
    refusal: CacheServerError | None = None
    not_before_s: float | None = None
    until_s: float | None = None
    refresh: bool = False
    first: bool = False
    spare_microusd: int = 0
    epoch: int = 0
    listens: bool = True
    heard: int = 0
    stale_from_s: float | None = None
    error_from_s: float | None = None
    renews: bool = False
    _canonical: tuple[CacheKey | None] | None = None
    ticket: object = field(default_factory=object)
    answer: asyncio.Future[list[Loaded]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def request(self) -> ImageRequest:
        """What the caller asked for. Only for those who may pay: a call by key asks for nothing to be made."""
        return self._asked()[0]

    @property
    def identity(self) -> Identity:
        """The identity of what the caller asked for."""
        return self._asked()[1]

    def _asked(self) -> tuple[ImageRequest, Identity]:
        if self.asked is None:
            raise AssertionError("a call by key never pays")
        return self.asked

    @property
    def answers_from(self) -> frozenset[AnswerFrom]:
        """Which pictures of other requests this one may be answered from: as its namespace says, and it allows."""
        return frozenset() if self.terms.no_transform else self.namespace.answer_from

    @property
    def similarity(self) -> MatchLevel:
        """How far the prompt of a picture that answers it may be from its own: as its namespace says, and it allows.

        Who wants a certain picture of its own prompt wants no other's.
        """
        wants_new = self.terms.cache_policy is CachePolicy.REFRESH  # also when it only collects what it was given
        if wants_new or self.terms.variant_policy is not VariantPolicy.FIRST:
            return MatchLevel.EXACT
        own, accepted = self.namespace.similarity, self.terms.match_level
        return own if accepted is None else min(own, accepted)

    def accepts(self, loaded: Loaded) -> bool:
        """Whether this picture is what the waiter asked for: its identity, new enough, derived as it allows."""
        if not self._is_asked_for(loaded):
            return False
        if loaded.payer is not None:
            return True
        if self.refresh or not loaded.entry.derived_by <= self.answers_from:
            return False
        return self.not_before_s is None or loaded.entry.create_time_s >= self.not_before_s

    @property
    def canonical_key(self) -> CacheKey | None:
        """What it shares with all who ask for the same in other words; None where its namespace takes no such."""
        if self._canonical is None:
            is_shared = self.asked is not None and self.namespace.shares_spellings
            self._canonical = (canonical_key(self.request, self.namespace) if is_shared else None,)
        return self._canonical[0]

    def _is_asked_for(self, loaded: Loaded) -> bool:
        if self.key.matches(loaded.entry.key.digest):
            return True
        if loaded.matched is None or loaded.matched > self.similarity:
            return False
        # Prompts that share a key need not share a canonical one. A call by key names no prompt.
        return self.asked is None or self.identity.prompt_digest == loaded.matched_for

    def accepts_stale(self, loaded: Loaded, from_s: float | None) -> bool:
        """Whether it takes this picture, which expired, if what expired after `from_s` will do."""
        entry = loaded.entry
        is_late = from_s is None or entry.expire_time_s is None or entry.expire_time_s <= from_s
        return not is_late and self.accepts(loaded)

    @property
    def partial_images(self) -> int:
        """How many partial pictures it would hear of."""
        return self.terms.partial_images if self.listens and self.terms.on_partial is not None else 0

    def hear(self, partial: PartialImage) -> None:
        """Give its caller a partial picture, if it has not had all it wants. One that fails at it gets no more."""
        if self.terms.on_partial is None or self.heard >= self.partial_images:
            return
        self.heard += 1
        try:
            self.terms.on_partial(partial)
        except Exception:  # noqa: BLE001 - what is being made is paid for, and others wait for it
            _log.exception("partial_image_not_taken", caller=self.caller.name)
            self.listens = False

    def order(self, n: int, *, priority: Priority, deadline_s: float | None, partial_images: int = 0) -> Order:
        """What to ask of the miss path for this caller: `n` pictures, so urgently and by then."""
        return Order(
            self.request,
            n,
            namespace=self.namespace.name,
            caller=self.caller.name,
            priority=priority,
            deadline_s=deadline_s,
            tags=self.terms.tags,
            candidates=self.terms.candidates,
            allow_degraded=self.terms.allow_degraded,
            partial_images=partial_images,
        )

    def lacks(self, loaded: dict[int, Loaded]) -> set[int]:
        """The variants still to come."""
        return {v for v in self.variants if v not in loaded or not self.accepts(loaded[v])}


class Flight:
    """One load in progress. Changed only from the event loop; nothing here awaits."""

    def __init__(
        self, key: CacheKey, *, started_s: float, is_purged: Callable[[CachedImage], bool] = lambda _: False
    ) -> None:
        """`key` names the identity (its variant means nothing); `started_s` is monotonic.

        `is_purged` is asked about what it has held for a while.
        """
        self.key = key
        self.started_s = started_s
        self._is_purged = is_purged
        self.waiters: list[Waiter] = []
        self.loaded: dict[int, Loaded] = {}
        self.stale: dict[int, Loaded] = {}
        """What the tiers have of variants that expired, for those who take such."""
        self.making: frozenset[int] = frozenset()
        self.missed: frozenset[int] = frozenset()
        """Variants that no tier had when it was judged who may pay."""
        self.succeeds = False
        """Whether another replica began to make the same, and may come late with it."""
        self.urged = Priority.WARM_UP
        """The highest priority of who waits for the same at other replicas."""
        self.likened: set[bytes] = set()
        """The digests of the prompts for which pictures of other prompts were looked for."""
        self.judged: set[bytes] = set()
        """Those that a verifier was asked about: it is once, however often the tiers are looked into."""
        self.telling: list[asyncio.Task[None]] = []
        """What tells other replicas of what it made, in whatever words they are asked for it."""
        self.sealed = False
        self.spending = False
        self.dropped = False
        self.orders: list[Order] = []
        """What was and is being made for it."""
        self.paid_unknown = 0
        """How many pictures it has paid for, candidates too, while the last tier could not say whether it has them."""
        self.task: asyncio.Task[None] | None = None

    @property
    def brings(self) -> set[int]:
        """All variants it has brought or was asked for by who may pay; a call by key alone brings nothing."""
        return {v for waiter in self.payers for v in waiter.variants} | self.loaded.keys()

    @property
    def stale_s(self) -> float:
        """How long ago what is of use to some waiter may have expired, or to who joins those that renew it."""
        taking = (waiter for waiter in self.waiters if waiter.renews or waiter.error_from_s is not None)
        return max((waiter.namespace.stale_s for waiter in taking), default=0.0)

    def has_own(self, variant: int) -> bool:
        """Whether it has a picture of its own key for this variant, which may be older than somebody accepts."""
        loaded = self.loaded.get(variant)
        return loaded is not None and loaded.matched is None

    @property
    def lacking(self) -> list[int]:
        """The variants some waiter still waits for, in order."""
        return sorted({v for waiter in self.waiters for v in waiter.lacks(self.loaded)})

    @property
    def looked_for(self) -> list[int]:
        """Those of the lacking variants that some waiter would take from a tier, in order."""
        return sorted({v for waiter in self.waiters if not waiter.refresh for v in waiter.lacks(self.loaded)})

    @property
    def payers(self) -> list[Waiter]:
        """The waiters who may pay, first come first."""
        return [waiter for waiter in self.waiters if waiter.refusal is None]

    @property
    def asking(self) -> list[Waiter]:
        """The waiters who say what they want made, though some may not pay for it: all but the calls by key."""
        return [waiter for waiter in self.waiters if waiter.asked is not None]

    @property
    def priority(self) -> Priority:
        """The highest of its waiters', here and at other replicas."""
        return max([self.urged, *(waiter.terms.priority for waiter in self.waiters)])

    @property
    def until_s(self) -> float | None:
        """The latest of its waiters' deadlines (monotonic); None if one has none."""
        deadlines = [waiter.until_s for waiter in self.waiters if waiter.until_s is not None]
        return max(deadlines) if len(deadlines) == len(self.waiters) else None

    @property
    def partial_images(self) -> int:
        """How many partial pictures its payers would hear of at most; none if it makes several, which they confuse."""
        return max((waiter.partial_images for waiter in self.payers), default=0) if len(self.making) == 1 else 0

    def hear(self, partial: PartialImage) -> None:
        """A picture is under way: whoever waits for it and listens gets to see it."""
        for waiter in self.waiters:
            waiter.hear(partial)

    def payer(self, variant: int) -> Waiter | None:
        """Whom a picture made now is made for: the first who may pay and lacks it."""
        return next((waiter for waiter in self.payers if variant in waiter.lacks(self.loaded)), None)

    def suits(self, variant: int, loaded: Loaded) -> bool:
        """Whether some waiter for `variant` accepts this picture."""
        return any(waiter.accepts(loaded) for waiter in self.waiters if variant in waiter.variants)

    def admits(self, waiter: Waiter) -> bool:
        """Whether this flight will bring all the waiter wants.

        Until it is sealed a flight takes on whatever is asked. Afterwards it gives only what it is making or
        has; and a REFRESH joins only a generation that begins after the REFRESH came.
        """
        if self.dropped:
            return False
        if not self.sealed:
            return True
        return not waiter.refresh and all(v in self.making for v in waiter.lacks(self.loaded))

    def join(self, waiter: Waiter) -> None:
        """Take the waiter on; answered at once if all it wants is here already."""
        waiter.first = not self.waiters and not self.loaded
        if not waiter.lacks(self.loaded):
            self._answer(waiter)
        elif (stale := self._stale_for(waiter, waiter.stale_from_s)) is not None:
            _answer_with(waiter, stale)
        else:
            self.waiters.append(waiter)

    def leave(self, waiter: Waiter) -> None:
        """The caller hung up. A load nobody waits for, or is left to pay for, is dropped while it has cost nothing.

        Once money is spent the waiter stays on, though nobody looks: what was paid for is answered to it, and
        remembered for its request_id.
        """
        if waiter not in self.waiters or self.spending:
            return
        self.waiters.remove(waiter)
        waiter.answer.cancel()
        if self.sealed and not self.payers:
            for other in list(self.waiters):
                if other.refusal is not None:
                    self.refuse(other, other.refusal)
        self.dropped = not self.waiters
        if self.dropped and self.task is not None:
            self.task.cancel()

    def refuse(self, waiter: Waiter, error: CacheServerError) -> None:
        """End one caller's wait with an error that concerns it alone."""
        self.waiters.remove(waiter)
        _fail(waiter, error)

    def seal(self, making: list[int]) -> None:
        """From here on the flight makes these variants and takes on no others."""
        self.sealed = True
        self.making = frozenset(making)

    def begin_spending(self) -> None:
        """From here on the load is worth money and is finished whoever leaves."""
        self.spending = True

    def land(self, variant: int, loaded: Loaded) -> None:
        """A picture is here: answer every waiter that now has all it wants."""
        self.loaded[variant] = loaded
        ready = [waiter for waiter in self.waiters if not waiter.lacks(self.loaded)]
        self.waiters = [waiter for waiter in self.waiters if waiter.lacks(self.loaded)]
        for waiter in ready:
            self._answer(waiter)

    def find_stale(self, variant: int, loaded: Loaded) -> None:
        """A tier has a picture that expired: of several the one that was good for longest counts."""
        had = self.stale.get(variant)
        if had is None or (had.entry.expire_time_s or 0.0) < (loaded.entry.expire_time_s or 0.0):
            self.stale[variant] = loaded

    def land_stale(self) -> None:
        """Answer every waiter that takes what the tiers have of what it lacks, though it expired."""
        for waiter in list(self.waiters):
            if (stale := self._stale_for(waiter, waiter.stale_from_s)) is not None:
                self.waiters.remove(waiter)
                _answer_with(waiter, stale)

    def fail(self, error: BaseException) -> None:
        """End everyone's wait with the upstream's (or our own) failure, or with what expired where that will do."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not (is_of_upstream(error) and self.answer_late(waiter)):
                _fail(waiter, error)

    def answer_late(self, waiter: Waiter) -> bool:
        """Answer one that can wait no longer with what expired, if that will do; whether it did."""
        stale = self._stale_for(waiter, waiter.error_from_s)
        if stale is None:
            return False
        _answer_with(waiter, [replace(it, stale=Stale.AFTER_ERROR) if it.stale else it for it in stale])
        return True

    def _stale_for(self, waiter: Waiter, from_s: float | None) -> list[Loaded] | None:
        """All it wants, of what it lacks what expired after `from_s`; None if that is not all."""
        if not self.stale or from_s is None:
            return None
        lacking = waiter.lacks(self.loaded)
        if not all(v in self.stale and self._gives_stale(self.stale[v], waiter, from_s) for v in lacking):
            return None
        return [self.stale[v] if v in lacking else self.loaded[v] for v in waiter.variants]

    def _gives_stale(self, loaded: Loaded, waiter: Waiter, from_s: float) -> bool:
        return waiter.accepts_stale(loaded, from_s) and not self._is_purged(loaded.entry)

    def _answer(self, waiter: Waiter) -> None:
        _answer_with(waiter, [self.loaded[v] for v in waiter.variants])


def _answer_with(waiter: Waiter, pictures: list[Loaded]) -> None:
    if not waiter.answer.done():
        waiter.answer.set_result(pictures)


def _fail(waiter: Waiter, error: BaseException) -> None:
    if not waiter.answer.done():
        waiter.answer.set_exception(error)
        # A caller answered PENDING never looks; asyncio would report the exception as forgotten.
        waiter.answer.exception()


class Flights:
    """All flights of this process."""

    def __init__(
        self,
        load: Callable[[Flight], Awaitable[None]],
        *,
        monotonic_s: Callable[[], float],
        is_purged: Callable[[CachedImage], bool] = lambda _: False,
    ) -> None:
        """`load` does a flight's work: it lands pictures, refuses waiters, or raises what fails them all."""
        self._is_purged = is_purged
        self._load = load
        self._monotonic_s = monotonic_s
        self._flights: dict[str, list[Flight]] = {}
        self._closed = False

    def __len__(self) -> int:
        """How many flights are in progress."""
        return sum(len(row) for row in self._flights.values())

    def of(self, key: CacheKey) -> list[Flight]:
        """The flights of this key's identity, the running one first."""
        return self._flights.get(key.identity_name, []) if self._flights else []

    def board(self, waiter: Waiter) -> Flight:
        """Join the flight that will bring what the waiter wants, or start the next one.

        There is no await between the caller's look into memory and this call, nor within: in a gap, a second
        load of the same identity could start beside the first.
        """
        if self._closed:
            raise ShuttingDownError("The service is shutting down; try another replica.")
        row = self._flights.setdefault(waiter.key.identity_name, [])
        for flight in row:
            if flight.admits(waiter):
                flight.join(waiter)
                return flight
        flight = Flight(waiter.key, started_s=self._monotonic_s(), is_purged=self._is_purged)
        # All of them: one that was dropped while it waited for its own turn ends before the one it waited for.
        before = [earlier.task for earlier in row if earlier.task is not None]
        row.append(flight)
        flight.join(waiter)
        flight.task = asyncio.create_task(self._fly(flight, before), name="flight")
        # A callback and not a `finally` in the task: a task cancelled before its first step never runs one.
        flight.task.add_done_callback(lambda task: self._ended(flight, task))
        return flight

    async def _fly(self, flight: Flight, before: list[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)
        try:
            await self._load(flight)
        finally:
            # Nobody may join between the load's last look at its waiters and `_ended`, nor for what it did not make.
            flight.seal([])

    def _ended(self, flight: Flight, task: asyncio.Task[None]) -> None:
        row = self._flights[flight.key.identity_name]
        row.remove(flight)
        if not row:
            del self._flights[flight.key.identity_name]
        flight.task = None  # a task keeps where it failed, and with that the flight and every request in it
        if task.cancelled():
            flight.fail(ShuttingDownError("The service is shutting down; try another replica."))
        elif (error := task.exception()) is not None:
            if not isinstance(error, CacheServerError):
                _log.error("flight_failed", exc_info=error)
            flight.fail(error)
        else:
            flight.fail(AssertionError("a load ended without answering all its waiters"))

    async def aclose(self, grace_s: float) -> None:
        """Start nothing new, let what runs end within `grace_s`, then cancel the rest; no load runs on after this."""
        self._closed = True
        tasks = {f.task for row in self._flights.values() for f in row if f.task is not None}
        if not tasks:
            return
        try:
            await asyncio.wait(tasks, timeout=grace_s)
        finally:
            await end(tasks)
