"""The limiters of the provider emulator: plain values over a time that is passed in, in emulated seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from scripts.bench.provider_config import KINDS, Kind, LimitsConfig

FOREIGN_AMOUNT: Mapping[Kind, float] = {"requests": 1, "images": 1, "tokens": 1_756}
"""What one foreign call takes: one picture of medium quality."""

_TINY = 1e-6
"""Sums of fractions are off by less, and nothing that is counted is as small."""


class Bucket:
    """An allowance that is used up and refills. With `quantised` it refills at whole seconds only.

    What is larger than the bucket is let through when the bucket is full, and leaves a debt: it could never pass
    otherwise, and on average the rate holds.
    """

    def __init__(self, *, capacity: float, per_second: float, quantised: bool, now_s: float) -> None:
        self._capacity = capacity
        self._per_second = per_second
        self._quantised = quantised
        self._level = capacity
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What it holds; below 0 while a debt is being paid off. Time never goes back."""
        elapsed_s = math.floor(now_s) - math.floor(self._at_s) if self._quantised else now_s - self._at_s
        self._level = min(self._capacity, self._level + elapsed_s * self._per_second)
        self._at_s = now_s
        return self._level

    def admits(self, amount: float, now_s: float) -> bool:
        """Whether so much may be taken now."""
        return self.wait_s(amount, now_s) == 0

    def take(self, amount: float, now_s: float) -> None:
        """Take it, whatever the level."""
        self._level = self.level(now_s) - amount

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds from now until so much may be taken, if nobody takes anything meanwhile."""
        missing = min(amount, self._capacity) - self.level(now_s)
        if missing <= _TINY:
            return 0.0
        if not self._quantised:
            return missing / self._per_second
        return math.floor(now_s) + math.ceil(missing / self._per_second - _TINY) - now_s

    def change(self, *, capacity: float, per_second: float, now_s: float) -> None:
        """Be as large and fast as this from now on; what is in it stays, as far as there is room."""
        self._level = min(capacity, self.level(now_s))
        self._capacity, self._per_second = capacity, per_second

    @property
    def capacity(self) -> float:
        """The most it holds."""
        return self._capacity


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer says of a limit: of its minute, how much of it is left, seconds until it is whole again."""

    per_minute: float
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is not admitted, and seconds until it would be. `kind` None: too many run at a time."""

    kind: Kind | None
    limit: float
    wait_s: float


class Limit:
    """One limit in force: of a key or a group, on one kind, shared with foreign traffic.

    The headers speak of the minute even where every second is enforced, as the provider's do: a quantised limit
    refuses calls while they still show plenty.
    """

    def __init__(self, kind: Kind, per_minute: float, config: LimitsConfig, *, random: Random, now_s: float) -> None:
        self.kind = kind
        self._per_minute = per_minute
        self._quantised = config.enforced == "quantised"
        self._foreign_share = config.foreign_share
        self._random = random
        self._bucket = Bucket(
            capacity=self._enforced_capacity(), per_second=per_minute / 60, quantised=self._quantised, now_s=now_s
        )
        self._minute = Bucket(capacity=per_minute, per_second=per_minute / 60, quantised=False, now_s=now_s)
        self._next_foreign_s = now_s + self._draw_pause_s()
        self._foreign_taken = 0.0

    def refusal(self, amount: float, now_s: float) -> Refusal | None:
        """Why so much is not admitted now; None if it is."""
        self._let_foreign_in(now_s)
        wait_s = self._bucket.wait_s(amount, now_s)
        return Refusal(self.kind, self._per_minute, wait_s) if wait_s > 0 else None

    def take(self, amount: float, now_s: float) -> None:
        """Count a call that is admitted now."""
        self._bucket.take(amount, now_s)
        self._minute.take(amount, now_s)

    def told(self, now_s: float) -> Told:
        """What the headers say now."""
        self._let_foreign_in(now_s)
        remaining = max(self._minute.level(now_s), 0.0)
        return Told(self._per_minute, int(remaining + _TINY), self._minute.wait_s(self._minute.capacity, now_s))

    def foreign_taken(self, now_s: float) -> float:
        """How much somebody else has taken in all."""
        self._let_foreign_in(now_s)
        return self._foreign_taken

    def change(self, per_minute: float, now_s: float) -> None:
        """Be this much from now on."""
        self._let_foreign_in(now_s)
        self._per_minute = per_minute
        self._bucket.change(capacity=self._enforced_capacity(), per_second=per_minute / 60, now_s=now_s)
        self._minute.change(capacity=per_minute, per_second=per_minute / 60, now_s=now_s)
        self._next_foreign_s = now_s + self._draw_pause_s()

    def _enforced_capacity(self) -> float:
        return max(2, math.ceil(self._per_minute / 60)) if self._quantised else self._per_minute

    def _let_foreign_in(self, now_s: float) -> None:
        """Everything foreign that came until now; what finds no room is refused, like ours."""
        amount = FOREIGN_AMOUNT[self.kind]
        while self._next_foreign_s <= now_s:
            if self._bucket.admits(amount, self._next_foreign_s):
                self.take(amount, self._next_foreign_s)
                self._foreign_taken += amount
            self._next_foreign_s += self._draw_pause_s()

    def _draw_pause_s(self) -> float:
        """Until the next foreign call: a Poisson process."""
        calls_per_second = self._foreign_share * self._per_minute / 60 / FOREIGN_AMOUNT[self.kind]
        return self._random.expovariate(calls_per_second) if calls_per_second else math.inf


class Limits:
    """All limits of one key or group, and how many of its generations run."""

    def __init__(self, config: LimitsConfig, *, random: Random, now_s: float) -> None:
        self._config = config
        self._random = random
        self._limits: dict[Kind, Limit] = {}
        self.running = 0
        for kind in KINDS:
            self.change(kind, config.per_minute(kind), now_s)

    def change(self, kind: Kind, per_minute: float | None, now_s: float) -> None:
        """Set the limit of this kind; None is none."""
        if per_minute is None:
            self._limits.pop(kind, None)
        elif kind in self._limits:
            self._limits[kind].change(per_minute, now_s)
        else:
            self._limits[kind] = Limit(kind, per_minute, self._config, random=self._random, now_s=now_s)

    def refusals(self, amounts: Mapping[Kind, float], now_s: float) -> list[Refusal]:
        """What stands in the way of a call that takes these amounts."""
        found = [limit.refusal(amounts[kind], now_s) for kind, limit in self]
        refusals = [refusal for refusal in found if refusal is not None]
        if self._config.concurrent is not None and self.running >= self._config.concurrent:
            refusals.append(Refusal(None, self._config.concurrent, 1.0))
        return refusals

    def take(self, amounts: Mapping[Kind, float], now_s: float) -> None:
        """Count a call that is admitted now."""
        for kind, limit in self:
            limit.take(amounts[kind], now_s)

    def told(self, now_s: float) -> dict[Kind, Told]:
        """What the headers say now."""
        return {kind: limit.told(now_s) for kind, limit in self}

    def foreign_taken(self, now_s: float) -> dict[Kind, float]:
        """What foreign traffic has taken in all."""
        return {kind: limit.foreign_taken(now_s) for kind, limit in self}

    def __iter__(self) -> Iterator[tuple[Kind, Limit]]:
        return iter(self._limits.items())


def admit(owners: Iterable[Limits], amounts: Mapping[Kind, float], now_s: float) -> Refusal | None:
    """Admit a call under the limits of its key and its group: all of them count it, or, refused, none does.

    A refusal is the one with the longest wait.
    """
    owners = tuple(owners)
    refusals = [refusal for owner in owners for refusal in owner.refusals(amounts, now_s)]
    if refusals:
        return max(refusals, key=lambda refusal: refusal.wait_s)
    for owner in owners:
        owner.take(amounts, now_s)
    return None


def told(owners: Iterable[Limits], now_s: float) -> dict[Kind, Told]:
    """What the headers say where several have limits: of each kind the one of which least is left."""
    least: dict[Kind, Told] = {}
    for owner in owners:
        for kind, limit in owner.told(now_s).items():
            if kind not in least or limit.remaining < least[kind].remaining:
                least[kind] = limit
    return least
