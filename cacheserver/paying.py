"""Who may pay for a load: judged caller by caller, right before money would be spent."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cacheserver.backpressure import Backpressure
from cacheserver.errors import (
    CacheServerError,
    CacheUnknownError,
    CannotAffordError,
    InvalidRequestError,
    NotCachedError,
    PermissionDeniedError,
    TooSlowError,
)
from cacheserver.flight import Flight, Waiter
from cacheserver.interfaces import Clock, Generation
from cacheserver.model import CachePolicy, Permission

_HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class UnknownPolicy:
    """What to do about a miss while the last tier cannot say whether it is one.

    `pay` generates, at most for `budget_microusd_per_hour` of estimated cost; otherwise the caller is told to
    try again.
    """

    pay: bool = True
    budget_microusd_per_hour: int = 10_000_000


class Paying:
    """Refuses the waiters of a flight that may not pay; whoever is first among the others leads."""

    def __init__(
        self, *, generation: Generation, clock: Clock, unknown: UnknownPolicy, backpressure: Backpressure
    ) -> None:
        self._generation = generation
        self._backpressure = backpressure
        self._unknown = unknown
        self._reserved: dict[Flight, int] = {}
        self._reserved_microusd = 0
        self._spent_on_unknown = _LastHour(clock)

    def judge(self, flight: Flight, unknown: set[int]) -> Waiter | None:
        """Refuse who may not pay, and return who leads; None if nobody is left who needs anything made.

        `unknown` are the variants that the last tier could not speak of. Nothing here awaits.
        """
        for waiter in flight.payers:
            is_unknown = _asks_unknown(waiter, flight, unknown)
            if (refusal := self._refusal(waiter, is_new=True, is_unknown=is_unknown)) is not None:
                flight.refuse(waiter, refusal)
        payers = self._within_budget(flight.payers, flight, unknown)
        making = {variant for waiter in payers for variant in waiter.lacks(flight.loaded)}
        for waiter in list(flight.waiters):
            # Who never pays, as a call by key, is welcome to what others pay for.
            if waiter.refusal is not None and not waiter.lacks(flight.loaded) <= making:
                is_unknown = _asks_unknown(waiter, flight, unknown)
                flight.refuse(waiter, _cannot_say() if is_unknown else waiter.refusal)
        return payers[0] if payers else None

    def refuse_broke(self, flight: Flight, lead: Waiter, error: CannotAffordError) -> None:
        """The lead's purse does not hold so much: refuse who wants most from it; what is left may be affordable."""
        sharing = [waiter for waiter in flight.payers if _purse(waiter) == _purse(lead)]
        most = max((len(waiter.lacks(flight.loaded)) for waiter in sharing), default=0)
        for waiter in sharing:
            if len(waiter.lacks(flight.loaded)) == most:
                flight.refuse(waiter, error)

    def parts(self, flight: Flight) -> list[tuple[Waiter, list[int]]]:
        """Who leads which of the lacking variants: all pay for what they were the first to lack, a purse at a time."""
        leads: dict[tuple[object, ...], Waiter] = {}
        parts: dict[Waiter, list[int]] = {}
        for variant in flight.lacking:
            if (payer := flight.payer(variant)) is not None:
                parts.setdefault(leads.setdefault(_purse(payer), payer), []).append(variant)
        return list(parts.items())

    def settle(self, flight: Flight) -> None:
        """The load is over: what it reserved of the budget is spent if it paid for a picture, else free again.

        Also if nobody got that picture, as one that waits for review.
        """
        estimate = self._reserved.pop(flight, 0)
        self._reserved_microusd -= estimate
        if estimate and flight.paid_unknown:
            self._spent_on_unknown.add(estimate)

    def judge_late(self, flight: Flight, waiter: Waiter) -> None:
        """Refuse a waiter that came when the flight had been judged, if it would have been refused then."""
        if waiter not in flight.payers or not (flight.sealed or waiter.lacks(flight.loaded) <= flight.missed):
            return
        if (refusal := self._refusal(waiter)) is not None:
            flight.refuse(waiter, refusal)

    def _refusal(self, waiter: Waiter, *, is_new: bool = False, is_unknown: bool = False) -> CacheServerError | None:
        """Why this one may not pay; `is_new` if what it wants is not being made already."""
        if waiter.terms.cache_policy is CachePolicy.ONLY_IF_CACHED:
            return NotCachedError("Not cached, and only cached pictures were asked for.")
        if (refusal := may_generate(waiter)) is not None:
            return refusal
        if is_new and (full := self._backpressure.refusal()) is not None:
            return full
        if is_unknown and (waiter.renews or not self._unknown.pay):
            return _cannot_say()
        return self._too_slow(waiter)

    def _too_slow(self, waiter: Waiter) -> TooSlowError | None:
        """The refusal of a caller that would rather have a cheaper picture than wait longer than it said."""
        terms = waiter.terms
        if not terms.allow_degraded or not terms.max_wait_s:
            return None
        if self._generation.expected_s(waiter.request, terms.priority) <= terms.max_wait_s:
            return None
        rungs = self._generation.rungs(waiter.request)
        return TooSlowError(rungs) if rungs else None

    def _within_budget(self, payers: list[Waiter], flight: Flight, unknown: set[int]) -> list[Waiter]:
        """Those of `payers` whose pictures the budget for unconfirmed misses allows; the others are refused."""
        asking = [waiter for waiter in payers if _asks_unknown(waiter, flight, unknown)]
        variants = {variant for waiter in asking for variant in waiter.lacks(flight.loaded)} & unknown
        paying = [payer for variant in variants if (payer := flight.payer(variant)) is not None]
        if not asking or self._reserve(flight, asking[0], sum(payer.terms.candidates for payer in paying)):
            return payers
        for waiter in asking:
            flight.refuse(waiter, CacheUnknownError("This hour's budget for misses nobody can confirm is used up."))
        return [waiter for waiter in payers if waiter not in asking]

    def _reserve(self, flight: Flight, payer: Waiter, n: int) -> bool:
        """Set the estimate of `n` more pictures aside from this hour's budget for misses nobody can confirm."""
        estimate = self._generation.estimate_microusd(payer.request, flight.paid_unknown + n)
        # A flight that is judged again needs once what it still has to make, and keeps what it has paid.
        by_others = self._reserved_microusd - self._reserved.get(flight, 0)
        if self._spent_on_unknown.sum() + by_others + estimate > self._unknown.budget_microusd_per_hour:
            return False
        self._reserved[flight] = estimate
        self._reserved_microusd = by_others + estimate
        return True


class _LastHour:
    """What was added in the last hour, summed as it comes and goes: an outage adds tens of thousands."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._amounts: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, amount: int) -> None:
        self._amounts.append((self._clock.monotonic_s() + _HOUR_S, amount))
        self._sum += amount

    def sum(self) -> int:
        now_s = self._clock.monotonic_s()
        while self._amounts and self._amounts[0][0] <= now_s:
            self._sum -= self._amounts.popleft()[1]
        return self._sum


def who_bears(flight: Flight, variant: int, lead: Waiter) -> Waiter:
    """Who is told what a picture cost that `lead` had made: the first who lacks it, of those whose money it was.

    The lead itself if they have all hung up: no other caller's budget was charged.
    """
    sharing = (waiter for waiter in flight.payers if _account(waiter) == _account(lead))
    return next((waiter for waiter in sharing if variant in waiter.lacks(flight.loaded)), lead)


def _account(waiter: Waiter) -> tuple[str, str]:
    """Whose money it is."""
    return (waiter.namespace.name, waiter.caller.name)


def _purse(waiter: Waiter) -> tuple[object, ...]:
    """Whose money it is, and on what terms it is spent: calls of one purse may be one call upstream."""
    return (*_account(waiter), waiter.terms.allow_degraded, waiter.terms.candidates)


def may_generate(waiter: Waiter) -> PermissionDeniedError | None:
    """The refusal of a caller without the right to generate, None for one that has it."""
    if waiter.caller.may(Permission.GENERATE, waiter.namespace.name):
        return None
    text = f"Not cached, and caller {waiter.caller.name} may not generate in namespace {waiter.namespace.name}."
    return PermissionDeniedError(text)


def lacks_inputs(waiter: Waiter) -> CacheServerError | None:
    """The refusal of a caller that gives input images by their digests alone: it can have what there is, or others pay.

    None for one that gives them whole, or never wants a picture made.
    """
    missing = [index for index, image in enumerate(waiter.request.inputs) if image.data is None]
    if not missing or waiter.terms.cache_policy is CachePolicy.ONLY_IF_CACHED:
        return None
    text = "is not cached: to have it made, send this input image itself and not its digest alone"
    return may_generate(waiter) or InvalidRequestError({f"spec.inputs[{index}].data": text for index in missing})


def _asks_unknown(waiter: Waiter, flight: Flight, unknown: set[int]) -> bool:
    """Whether the waiter lacks a picture that the last tier may have. A REFRESH wants none that it has."""
    return not waiter.refresh and not unknown.isdisjoint(waiter.lacks(flight.loaded))


def _cannot_say() -> CacheUnknownError:
    return CacheUnknownError("The last tier cannot say now whether it has this picture; try again.")
