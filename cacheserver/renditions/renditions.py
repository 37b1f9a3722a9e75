"""Renditions by their master's key: found where they were kept, or made and kept.

A rendition lies beside its master in every tier, under the master's partition and fingerprint, see `key_of`. It is not
paid for, so it is written behind the answer and may be lost: it is made again in milliseconds. It dies with its master,
by a purge as by age. MOST_KEPT of one picture are kept, whatever its URLs are asked for: further ones are made for each
answer, and written nowhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Protocol

from cacheserver.errors import CorruptEntryError, ImageChangedError, InvalidRequestError, TierError
from cacheserver.interfaces import Clock, Renderer, Tier
from cacheserver.keep import Keeper
from cacheserver.model import CachedImage, CacheKey, Caller, Namespace, Pending, Rendition, Served, Terms, TierName
from cacheserver.renditions import pixels
from cacheserver.renditions.shared import Shared
from cacheserver.tiers.memory import MemoryCache

DIGEST_DIGITS = 32
"""How many hexadecimal digits of a master's SHA-256 name its renditions."""

MOST_KEPT = 64
"""Renditions kept of one picture. Without a bound whoever may have one picture could fill every tier with it."""


class FindMaster(Protocol):
    """Finds the picture a key names; `PromptCache.get_by_key`."""

    async def __call__(self, key: CacheKey, *, namespace: Namespace, caller: Caller, terms: Terms) -> Served | Pending:
        """The picture, stored or on its way. Never pays; raises KeyGoneError, CacheUnknownError and the like."""
        ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendition, and the tier that had it; None: it was made for this answer. One like its master is the master."""

    entry: CachedImage
    tier: TierName | None


class Renditions:
    """Finds or makes renditions of stored pictures; never pays."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        memory: MemoryCache,
        tiers: Sequence[Tier],
        keeper: Keeper,
        renderer: Renderer,
        find_master: FindMaster,
        clock: Clock,
        ttl_s: float,
    ) -> None:
        """`tiers` are the lower ones, fastest first. A rendition is kept for `ttl_s`, and no longer than its master."""
        self._memory = memory
        self._tiers = tiers
        self._keeper = keeper
        self._renderer = renderer
        self._find_master = find_master
        self._clock = clock
        self._ttl_s = ttl_s
        self._looking = Shared[Rendered | None](name="look for a rendition")
        self._making = Shared[Rendered](name="make a rendition")

    async def get(  # noqa: PLR0913 - those of get_by_key, and which rendition of it
        self,
        key: CacheKey,
        rendition: Rendition,
        *,
        namespace: Namespace,
        caller: Caller,
        terms: Terms,
        if_digest: str = "",
    ) -> Rendered | Pending:
        """The rendition of the picture that `key` names; PENDING if that is on its way and `terms` do not wait.

        `if_digest` is the SHA-256 (hexadecimal) that the picture has to have, DIGEST_DIGITS of it at least, empty if
        any: with it a rendition that is kept is found without its master.

        Raises:
            InvalidRequestError: `key` names a rendition, or this picture cannot be had like that.
            ImageChangedError: the picture of this key is another one now.
            OverloadedError: too many wait for a rendition already.
            KeyGoneError, CacheUnknownError: see `PromptCache.get_by_key`.
        """
        if key.is_rendition:
            raise InvalidRequestError({"key": "names a rendition; ask for the picture it was made from"})
        pixels.check(rendition)
        if_digest = if_digest.lower()
        if if_digest:
            found = await self._look(key_of(key, if_digest, rendition))
            if found is not None:
                return found
        # What is replaced or purged from here on is not to come back as a rendition.
        changes = self._keeper.changes
        master = await self._find_master(key, namespace=namespace, caller=caller, terms=terms)
        if isinstance(master, Pending):
            return master
        image = master.entry.image
        if not image.sha256.startswith(if_digest):
            raise ImageChangedError("The picture of this key is another one now; ask for it by its new digest.")
        if pixels.is_master(image.width, image.height, image.content_type, rendition):
            return Rendered(master.entry, master.tier)
        place = key_of(key, image.sha256, rendition)
        if not if_digest and (found := await self._look(place)) is not None:
            return found
        return await self._making.run(place.name, partial(self._make, place, key, master, rendition, changes))

    async def aclose(self) -> None:
        """Cut off what is being looked for or made."""
        await self._looking.aclose()
        await self._making.aclose()

    async def _look(self, place: CacheKey) -> Rendered | None:
        if (entry := self._memory.get(place)) is not None:
            return Rendered(entry, TierName.MEMORY)
        return await self._looking.run(place.name, partial(self._look_below, place))

    async def _look_below(self, place: CacheKey) -> Rendered | None:
        """The kept rendition. A tier that cannot say is passed over: it costs milliseconds, not money."""
        changes = self._keeper.changes
        missed: list[Tier] = []
        for tier in self._tiers:
            try:
                entry = await tier.get(place)
            except CorruptEntryError:
                entry = None
            except TierError:
                continue
            if entry is not None:
                self._keeper.promote(place, entry, missed, changes=changes)
                return Rendered(entry, tier.name)
            missed.append(tier)
        return None

    async def _make(
        self, place: CacheKey, key: CacheKey, master: Served, rendition: Rendition, changes: int
    ) -> Rendered:
        image = await self._renderer.render(master.entry.image, rendition)
        if image.sha256 == master.entry.image.sha256:
            return Rendered(master.entry, master.tier)
        lifetimes_s = [self._clock.now_s() + self._ttl_s, master.entry.expire_time_s]
        entry = replace(
            master.entry,
            key=place,
            image=image,
            derived_from=key.name,
            derived_by=frozenset(),  # the URL asked for this key's picture, whatever that was made from
            expire_time_s=min(at_s for at_s in lifetimes_s if at_s is not None),
            sliding_s=0.0,
        )
        if not master.stale and await self._has_room(place):
            self._keeper.promote(place, entry, self._tiers, changes=changes)
        return Rendered(entry, None)

    async def _has_room(self, place: CacheKey) -> bool:
        """Whether one more may be kept of this picture. A last tier that cannot say takes none anyway."""
        if not self._tiers:
            return True  # memory has a bound of its own
        try:
            kept = await self._tiers[-1].renditions(place)
        except TierError:
            return True
        return sum(key.variant == place.variant for key in kept) < MOST_KEPT


def key_of(key: CacheKey, master_sha256: str, rendition: Rendition) -> CacheKey:
    """Where the rendition of the picture that lies under `key` is kept.

    Its digest is the SHA-256 of the canonical JSON of the first DIGEST_DIGITS of the master's SHA-256 and of what is
    wanted, so it can be told from a URL that has both.

    Raises:
        InvalidRequestError: `master_sha256` is shorter.
    """
    digits = master_sha256[:DIGEST_DIGITS]
    if len(digits) < DIGEST_DIGITS:
        raise InvalidRequestError({"digest": f"must be at least {DIGEST_DIGITS} hexadecimal digits of the SHA-256"})
    canonical = json.dumps([digits, asdict(_spelled_out(rendition))], sort_keys=True, separators=(",", ":"))
    return key.rendition(hashlib.sha256(canonical.encode()).digest())


def _spelled_out(rendition: Rendition) -> Rendition:
    """The same rendition, what is left to us said: equal pictures have equal keys, as far as they can be told."""
    if rendition.output_format == "png":
        return replace(rendition, output_compression=None)
    if rendition.output_format is not None and rendition.output_compression is None:
        return replace(rendition, output_compression=pixels.DEFAULT_COMPRESSION)
    return rendition
