"""Which fault strikes when: the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

REPLICAS = 3
MASTERS = 3


class Kind(StrEnum):
    """What goes wrong."""

    REPLICA_KILLED = "replica killed"
    REPLICA_PAUSED = "replica paused"
    DISK_FULL = "disk of a replica full"
    CLOCK_JUMPS = "clock of a replica jumps"
    REDIS_CUT = "connections to Redis cut"
    REDIS_HANGS = "Redis hangs"
    REDIS_AWAY = "Redis away"
    REDIS_SLOW = "Redis slow"
    MASTER_KILLED = "a master of Redis killed"
    MASTER_EMPTIED = "a master of Redis emptied"
    REDIS_CORRUPT = "a value in Redis corrupted"
    S3_CUT = "connections to S3 cut"
    S3_HANGS = "S3 hangs"
    S3_AWAY = "S3 away"
    S3_SLOW = "S3 slow"
    S3_CORRUPT = "an object in S3 corrupted"
    PROVIDER_CUT = "connections to the provider cut"
    PROVIDER_AWAY = "provider away"
    PROVIDER_SLOW = "provider slow"
    PROVIDER_ERRORS = "provider answers 503"


SILENT_REDIS = frozenset({Kind.REDIS_CUT, Kind.REDIS_HANGS, Kind.REDIS_AWAY, Kind.REDIS_SLOW, Kind.MASTER_KILLED})
"""Faults in which Redis does not answer, or not in time."""

SILENT_S3 = frozenset({Kind.S3_CUT, Kind.S3_HANGS, Kind.S3_AWAY, Kind.S3_SLOW})

_OF_A_REPLICA = frozenset({Kind.REPLICA_KILLED, Kind.REPLICA_PAUSED, Kind.DISK_FULL, Kind.CLOCK_JUMPS})

_LASTS_S: dict[Kind, tuple[float, float]] = {
    Kind.REPLICA_KILLED: (0.2, 3.0),
    Kind.REPLICA_PAUSED: (1.0, 8.0),
    Kind.DISK_FULL: (1.0, 6.0),
    Kind.REDIS_HANGS: (1.0, 8.0),
    Kind.REDIS_AWAY: (1.0, 8.0),
    Kind.REDIS_SLOW: (1.0, 6.0),
    Kind.MASTER_KILLED: (0.5, 5.0),
    Kind.S3_HANGS: (1.0, 8.0),
    Kind.S3_AWAY: (1.0, 8.0),
    Kind.S3_SLOW: (1.0, 6.0),
    Kind.PROVIDER_AWAY: (1.0, 6.0),
    Kind.PROVIDER_SLOW: (1.0, 6.0),
}
_AMOUNTS: dict[Kind, tuple[float, ...]] = {
    Kind.CLOCK_JUMPS: (-3600.0, -60.0, -2.0, 2.0, 60.0, 3600.0),
    Kind.REDIS_SLOW: (0.02, 0.1, 0.5),
    Kind.S3_SLOW: (0.1, 0.5, 1.5),
    Kind.PROVIDER_SLOW: (0.5, 2.0),
    Kind.PROVIDER_ERRORS: (1.0, 3.0, 6.0),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `at_s` after the beginning, for so long; `target` is a replica or a master."""

    at_s: float
    kind: Kind
    lasts_s: float
    target: int
    amount: float

    @property
    def subject(self) -> str:
        """What it strikes: two faults of one subject never strike together."""
        if self.kind in _OF_A_REPLICA:
            return f"replica {self.target}"
        return "Redis" if "Redis" in self.kind else "S3" if "S3" in self.kind else "provider"

    def __str__(self) -> str:
        amount = f", {self.amount:g}" if self.amount else ""
        return f"{self.at_s:8.2f} s  {self.kind} (number {self.target}{amount}) for {self.lasts_s:.2f} s"


def schedule(seed: int, seconds: float) -> list[Fault]:
    """Faults for so long. Each kind comes once before any comes again; at times two strike together."""
    chance = random.Random(seed)  # noqa: S311 - chooses faults
    faults: list[Fault] = []
    deck: list[Kind] = []
    at_s = 1.0
    while True:
        if not deck:
            deck = list(Kind)
            chance.shuffle(deck)
        kind = deck.pop()
        lasts_s = chance.uniform(*_LASTS_S.get(kind, (0.0, 0.0)))
        amount = chance.choice(_AMOUNTS.get(kind, (0.0,)))
        if at_s + lasts_s > seconds:
            return faults
        faults.append(Fault(at_s, kind, lasts_s, chance.randrange(REPLICAS), amount))
        at_s += lasts_s * chance.uniform(0.2, 1.2) + chance.uniform(0.2, 1.5)
