"""Answers from what we have: a picture of another request that dominates the one asked for, transformed if need be.

Looked for when every tier has missed and before anything is paid, where a caller's namespace allows it. What is made
is an entry like any other, under the key that was asked for: its namespace and tags are the asker's, its age is its
master's. It never takes the place of another picture, and whoever may not have it reads it as a miss.

Best effort: a tier that cannot say, a master that is gone by then and a picture that cannot be transformed like that
(transparency has no place in jpeg) are no reason to fail. The next candidate is tried, a few at most, and then the
miss goes its way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import structlog

from cacheserver.carrying import other_identities
from cacheserver.errors import InvalidRequestError, OverloadedError
from cacheserver.flight import Flight, Loaded, Waiter
from cacheserver.identity import OtherIdentity, key_of_alike
from cacheserver.interfaces import Clock, Renderer
from cacheserver.keep import Keeper
from cacheserver.model import AnswerFrom, CachedImage, CacheKey, Found, GeneratedImage, ImageRequest, TierName
from cacheserver.renditions.candidates import Candidate, candidates

_log = structlog.get_logger(__name__)

_TRIES = 3
"""Pictures read for one that is asked for: each read may take as long as the tiers' deadlines allow."""


class Deriving:
    """Makes what a flight lacks from other stored pictures."""

    def __init__(
        self,
        *,
        renderer: Renderer | None,
        keeper: Keeper,
        clock: Clock,
        find: Callable[[Sequence[CacheKey]], Awaitable[tuple[list[Found], list[TierName]]]],
        walk: Callable[[CacheKey, Callable[[Loaded], bool]], Awaitable[tuple[Loaded | None, bool]]],
    ) -> None:
        """Without a `renderer` nothing is derived.

        `find` tells where pictures are without their bytes; `walk` brings one as a call for it would find it.
        """
        self._renderer = renderer
        self._keeper = keeper
        self._clock = clock
        self._find = find
        self._walk = walk

    async def land(self, flight: Flight, variants: Sequence[int]) -> None:
        """Land those of `variants`, which nobody has, that can be derived for some waiter of the flight."""
        if self._renderer is None:
            return
        leads: dict[frozenset[AnswerFrom], Waiter] = {}
        for waiter in filter(_may_derive, flight.waiters):
            leads.setdefault(waiter.answers_from, waiter)
        for lead in leads.values():
            present = await self._offers(lead, [v for v in variants if v not in flight.loaded])
            await asyncio.gather(*(self._land(flight, lead, offers, self._renderer) for offers in present))

    async def _offers(self, lead: Waiter, variants: Sequence[int]) -> list[list[_Offer]]:
        """What is stored and would do, the nearest first, by variant. One `find` for all."""
        identities = [OtherIdentity(lead.identity, answers_all=True), *other_identities(lead)]
        masters = [
            (candidate, key_of_alike(each.identity, candidate.request), each.answers_all)
            for candidate in candidates(lead.request, lead.answers_from)
            for each in identities
        ]
        offers = [
            _Offer(candidate, key.with_variant(v), lead.key.with_variant(v), answers_all)
            for v in variants
            for candidate, key, answers_all in masters
        ]
        if not offers:
            return []
        found, _ = await self._find([offer.master for offer in offers])
        present: dict[int, list[_Offer]] = {}
        for offer, item in zip(offers, found, strict=True):
            if item.tier is not None:
                present.setdefault(offer.wanted.variant, []).append(offer)
        return list(present.values())

    async def _land(self, flight: Flight, lead: Waiter, offers: Sequence[_Offer], renderer: Renderer) -> None:
        for offer in offers[:_TRIES]:
            if (loaded := await self._derived(flight, lead, offer, renderer)) is not None:
                flight.land(offer.wanted.variant, loaded)
                return

    async def _derived(self, flight: Flight, lead: Waiter, offer: _Offer, renderer: Renderer) -> Loaded | None:
        variant = offer.wanted.variant
        changes = self._keeper.changes
        now_s = self._clock.now_s()

        def suits(master: Loaded) -> bool:
            """Whether what would be made of it is fresh, and suits somebody."""
            if not offer.answers_all and master.entry.prompt_digest != lead.identity.prompt_digest:
                return False
            entry = _entry(lead, offer, master.entry)
            return entry.is_fresh(now_s) and flight.suits(variant, Loaded(entry, master.tier))

        master, _ = await self._walk(offer.master, suits)
        if master is None or not suits(master):
            return None
        image = await _rendered(master.entry.image, offer.candidate, lead.request, renderer)
        if image is None:
            return None
        entry = replace(_entry(lead, offer, master.entry), image=image)
        if not await self._keeper.keep_if_free(entry, changes=changes):
            # Another replica was faster: what lies there is what the key is answered with from now on.
            stored, _ = await self._walk(entry.key, lambda loaded: flight.suits(variant, loaded))
            if stored is not None and flight.suits(variant, stored):
                return stored
        return Loaded(entry, master.tier, derived=True)


class _Offer(NamedTuple):
    """A stored picture that may do: its key, and the one it would do for; for any prompt, or its own (carrying.py)."""

    candidate: Candidate
    master: CacheKey
    wanted: CacheKey
    answers_all: bool


def _may_derive(waiter: Waiter) -> bool:
    """Whether this waiter would rather have a picture derived than made or refused."""
    if waiter.asked is None or waiter.refusal is not None or waiter.refresh:
        return False
    return bool(waiter.answers_from) and waiter.namespace.serves(waiter.key)


def _entry(lead: Waiter, offer: _Offer, master: CachedImage) -> CachedImage:
    """The entry that would be made of `master`, with that one's image: no younger than it, and no longer good."""
    lifetime_s = lead.namespace.lifetime_s(lead.terms.ttl_s)
    own_end_s = None if lifetime_s is None else master.create_time_s + lifetime_s
    return CachedImage(
        key=offer.wanted,
        image=master.image,
        namespace=lead.namespace.name,
        prompt_digest=master.prompt_digest,
        create_time_s=master.create_time_s,
        expire_time_s=min((end for end in (own_end_s, master.expire_time_s) if end is not None), default=None),
        tags=lead.terms.tags,
        derived_from=master.derived_from or master.key.name,
        derived_by=offer.candidate.by | master.derived_by,
        epoch=lead.epoch,
    )


async def _rendered(
    image: GeneratedImage, candidate: Candidate, request: ImageRequest, renderer: Renderer
) -> GeneratedImage | None:
    """The picture as it was asked for; None where it cannot be had like that, or not now."""
    if candidate.rendition is not None:
        try:
            image = await renderer.render(image, candidate.rendition)
        except (InvalidRequestError, OverloadedError) as error:
            _log.info("not_derived", reason=error.reason, by=sorted(candidate.by))
            return None
    if AnswerFrom.SIZE in candidate.by and f"{image.width}x{image.height}" != request.size:
        return None  # its upstream had not made it as large or of the shape that it was asked for
    return replace(image, paid_microusd=0)


def as_asked(entry: CachedImage, request: ImageRequest) -> GeneratedImage:
    """The picture as it would be priced had it been made for `request`, and not for what it was derived from."""
    image = entry.image
    if AnswerFrom.QUALITY in entry.derived_by:
        image = replace(image, quality=request.quality, usage=None)
    if AnswerFrom.SIZE in entry.derived_by:
        image = replace(image, size=request.size, usage=None)
    return image
