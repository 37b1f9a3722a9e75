"""A hit that is told again: everything about it that need not be found out anew."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ref

from cacheserver.figures import HitRow
from cacheserver.model import (
    CachedImage,
    CacheKey,
    Caller,
    Identity,
    ImageRequest,
    MatchLevel,
    Namespace,
    Served,
    TierName,
)
from cacheserver.recall import ToldImages


@dataclass(frozen=True, slots=True)
class HitAgain:
    """A call that was answered with one picture from memory, and that picture, which this keeps there not a moment.

    `caller` has the right to read in `namespace`, and rights never change while the service runs. `what` is for who
    notes what is answered, and the picture's key where nobody does. `name` is where memory had it. What was
    `saved_microusd` holds until `until_s` (monotonic): prices change. `row` is where such hits are booked, `told` what
    is remembered of them.
    """

    caller: Caller
    namespace: Namespace
    what: ImageRequest | CacheKey
    match_level: MatchLevel | None
    identity: Identity | None
    name: str
    entry: ref[CachedImage]
    matched: MatchLevel
    saved_microusd: int
    until_s: float
    row: HitRow
    told: ToldImages

    def served(self, entry: CachedImage) -> Served:
        """What the call is answered with: `entry` is that picture."""
        return Served(entry, TierName.MEMORY, self.matched, saved_microusd=self.saved_microusd)
