"""What is known of calls that memory answers: all that need not be found out anew when they, or their like, come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

from cacheserver.figures import HitRow
from cacheserver.identity import Identifier
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


class HitAgain(NamedTuple):
    """A call that was answered with one picture from memory, and that picture, which this keeps there not a moment.

    `caller` has the right to read in `namespace`, and rights never change while the service runs. `what` it asked for
    is kept where answers are traced. `name` is where memory had the picture. What was `saved_microusd` holds until
    `until_s` (monotonic): prices change. `row` is where such hits are booked, `told` what is remembered of them.
    """

    caller: Caller
    namespace: Namespace
    what: ImageRequest | CacheKey | None
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


@dataclass(frozen=True, slots=True)
class Template:
    """Calls for one picture that differ in nothing but their prompt, and any such picture in memory answers them.

    `caller` has the right to read in `namespace`, which lets every prompt pass, records none and serves what is stored.
    `request` is theirs without the prompt, `identifier` tells their identities, `row` is where their hits are booked.
    """

    caller: Caller
    namespace: Namespace
    request: ImageRequest
    match_level: MatchLevel | None
    identifier: Identifier
    row: HitRow
