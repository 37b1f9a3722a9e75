"""What is known of calls that memory answers: all that need not be found out anew when they, or their like, come."""

from __future__ import annotations

from typing import NamedTuple
from weakref import ref

from cacheserver.calls.asked import Asked
from cacheserver.figures import HitRow
from cacheserver.identity import Identifier, Named
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

    `caller` has the right to read in `namespace`: where rights change, every `Caller` is a new one. `what` it asked for
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


class Template(NamedTuple):
    """Calls for one picture that differ in nothing but their prompt, and any such picture in memory answers them.

    `caller` has the right to read in their namespace, which lets every prompt pass, records none and serves what is
    stored. `asked` is what they ask for without the prompt, and without what says nothing of the picture. `identifier`
    tells their identities, `row` is where their hits are booked. No two templates of a process have the same `number`.
    """

    number: int
    caller: Caller
    asked: Asked
    request: ImageRequest
    identifier: Identifier
    row: HitRow


class Seen(NamedTuple):
    """A call of a template that memory has no picture for: with its prompt, and what names that. Nothing has happened.

    It says nothing more but until when it waits, and need not be read.
    """

    template: Template
    prompt: str
    named: Named
    request_id: str
