"""Pictures made for one caller alone: NO_STORE, and calls of namespaces that only observe.

Nothing is joined and nothing that a tier has is served. A call sent again under its request_id while it runs, or
afterwards, is refused: it never pays twice.

NO_STORE reads and writes nothing. An observed call leaves what the cache would have had of it: a picture that a tier
has, or that is being made already, would have been a hit, so the one made now is delivered and not kept. Any other
is kept as the entry, so that the next call for it would hit.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from cacheserver.errors import RequestIdRunningError, RequestIdSpentError
from cacheserver.flight import Loaded, Waiter
from cacheserver.interfaces import Generation
from cacheserver.model import CachedImage, CacheKey, Found, GeneratedImage, MatchLevel, Replay, Served, TierName
from cacheserver.paying import lacks_inputs, may_generate
from cacheserver.resent import Resent
from cacheserver.tasks import OwnedTasks


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the cache would have done for a call.

    `hits` are the variants that a tier would have answered; UPSTREAM: that would have joined a load. Pictures of
    `kept` variants become entries, those of `replaced` ones in the place of one that was too old.
    """

    hits: Mapping[int, TierName] = field(default_factory=dict)
    kept: frozenset[int] = frozenset()
    replaced: frozenset[int] = frozenset()


class Alone:
    """Makes pictures for one caller alone."""

    def __init__(  # noqa: PLR0913 - what the cache lends to it, by keyword
        self,
        *,
        generation: Generation,
        resent: Resent,
        tasks: OwnedTasks,
        last_tier: TierName | None,
        find: Callable[[Sequence[CacheKey]], Awaitable[tuple[list[Found], list[TierName]]]],
        find_here: Callable[[CacheKey], Found],
        walk: Callable[[CacheKey, Callable[[Loaded], bool]], Awaitable[tuple[Loaded | None, bool]]],
        entry_for: Callable[[Waiter, GeneratedImage, int], CachedImage],
        keep: Callable[[Waiter, CachedImage, bool], Awaitable[CachedImage]],
        keep_spare: Callable[[Waiter, int, GeneratedImage], object],
        tiers_of_similar: Callable[[Waiter, Iterable[int]], Awaitable[dict[int, TierName]]],
    ) -> None:
        """`last_tier` alone knows what is absent.

        `find` tells where pictures are without their bytes, and who could not be asked; `find_here` asks nobody.
        `walk` brings a picture as a served call would find it, and says whether the last tier could not tell.
        `entry_for` makes an entry of a variant's picture; `keep` stores one (or replaces another by it), and holds it
        before it returns; `keep_spare` stores what was paid for beyond what was asked for. `tiers_of_similar` tells
        where pictures of other prompts are that would have answered.
        """
        self._generation = generation
        self._resent = resent
        self._tasks = tasks
        self._last_tier = last_tier
        self._find, self._find_here, self._walk = find, find_here, walk
        self._entry_for, self._keep, self._keep_spare = entry_for, keep, keep_spare
        self._tiers_of_similar = tiers_of_similar
        self._making: Counter[str] = Counter()
        self.running: set[str] = set()
        """The idempotency keys of the calls in progress."""

    def is_making(self, key: CacheKey) -> bool:
        """Whether a picture is being made that will be the entry of `key`."""
        return self._making.get(key.name, 0) > 0

    async def get(self, waiter: Waiter, call_id: str, *, observes: bool = False) -> list[Served]:
        """The pictures, made for this caller. A hang-up before money is spent ends it.

        Raises PermissionDeniedError, InvalidRequestError, RequestIdRunningError, RequestIdSpentError, and what a
        generation may.
        """
        if (refusal := may_generate(waiter) or lacks_inputs(waiter)) is not None:
            raise refusal
        _ = waiter.canonical_key  # found out before money is spent
        seen = await self._look(waiter) if observes else _Seen()
        # From the look to the task nothing awaits: of two calls at a time one would have joined the other.
        if call_id in self.running:
            raise RequestIdRunningError("A call with this request_id still runs.")
        if call_id:
            self.running.add(call_id)
        names = [waiter.key.with_variant(variant).name for variant in seen.kept]
        self._making.update(names)
        spending = asyncio.Event()
        making = self._tasks.own(self._make(waiter, call_id, seen, spending.set), "alone")
        making.add_done_callback(lambda _: self._ended(call_id, names))
        try:
            return await asyncio.shield(making)
        finally:
            waiter.listens = False
            if not spending.is_set():
                making.cancel()

    def _ended(self, call_id: str, names: list[str]) -> None:
        self.running.discard(call_id)
        self._making.subtract(names)
        for name in names:
            if not self._making[name]:
                del self._making[name]

    # ── what the cache would have done ──────────────────────────────────────────────────────────────────────

    async def _look(self, waiter: Waiter) -> _Seen:
        """What would have been a hit for this call now. A REFRESH hits nothing."""
        if waiter.refresh:
            return _Seen(kept=frozenset(waiter.variants), replaced=frozenset(waiter.variants))
        keys = [waiter.key.with_variant(variant) for variant in waiter.variants]
        look = self._walked(waiter, keys) if _minds_age(waiter) else self._found(keys)
        hits, unknown, too_old = await look
        for key in keys:
            if key.variant in hits:
                continue
            here = self._find_here(key)
            if self.is_making(key) or here.in_flight:
                hits[key.variant] = TierName.UPSTREAM
            elif here.tier is not None and not _minds_age(waiter):
                hits[key.variant] = here.tier
        missing = [key.variant for key in keys if key.variant not in hits and key.variant not in unknown]
        hits |= await self._tiers_of_similar(waiter, missing)
        # What nobody can say of is neither: a picture that the last tier may have must not lose its name.
        return _Seen(hits, frozenset(waiter.variants) - hits.keys() - unknown, frozenset(too_old))

    async def _found(self, keys: list[CacheKey]) -> _Looked:
        found, silent = await self._find(keys)
        hits = {item.key.variant: item.tier for item in found if item.tier is not None}
        unknown = {key.variant for key in keys if key.variant not in hits} if self._last_tier in silent else set()
        return _Looked(hits, unknown, set())

    async def _walked(self, waiter: Waiter, keys: list[CacheKey]) -> _Looked:
        """The same where an entry's age counts, which only the entry itself can tell."""
        walked = await asyncio.gather(*(self._walk(key, waiter.accepts) for key in keys))
        looked = _Looked({}, set(), set())
        for key, (found, is_unknown) in zip(keys, walked, strict=True):
            if found is None:
                looked.unknown.update({key.variant} if is_unknown else ())
            elif waiter.accepts(found):
                looked.hits[key.variant] = found.tier
            else:
                looked.too_old.add(key.variant)
        return looked

    # ── making ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _make(self, waiter: Waiter, call_id: str, seen: _Seen, on_spending: Callable[[], None]) -> list[Served]:
        if call_id and await self._resent.is_spent(call_id):
            raise RequestIdSpentError("This request_id was used before: use a new one for another picture.")
        made: list[GeneratedImage] = []
        try:
            return await self._fill(waiter, seen, made, on_spending)
        finally:
            if call_id and made:
                # Also if it failed half way, or was cut short while they are stored: sent again it would pay again.
                await self._resent.remember(call_id, Replay(waiter.key.identity_name, ()))

    async def _fill(
        self, waiter: Waiter, seen: _Seen, made: list[GeneratedImage], on_spending: Callable[[], None]
    ) -> list[Served]:
        served: list[Served] = []

        def keep_spare(image: GeneratedImage) -> None:
            self._keep_spare(waiter, max(waiter.variants) + 1, image)

        on_spare = keep_spare if seen.kept else partial(_drop_spare, waiter)
        while missing := waiter.variants[len(served) :]:
            order = waiter.order(
                len(missing),
                priority=waiter.terms.priority,
                deadline_s=waiter.until_s,
                partial_images=waiter.partial_images if len(waiter.variants) == 1 else 0,
            )
            on_partial = waiter.hear if order.partial_images else None
            safe = asyncio.Event()
            try:
                images = await self._generation.generate(
                    order, missing, on_spending=on_spending, on_spare=on_spare, on_partial=on_partial, safe=safe
                )
                # From here until what is kept is held nothing awaits.
                made += images
                served += await self._kept(waiter, seen, missing, images)
            finally:
                safe.set()
        return served

    async def _kept(
        self, waiter: Waiter, seen: _Seen, variants: Sequence[int], images: Sequence[GeneratedImage]
    ) -> list[Served]:
        """The answer with these pictures, once those of them that become entries are kept."""
        entries = [self._entry_for(waiter, image, v) for v, image in zip(variants, images, strict=False)]
        kept = {
            entry.key.variant: self._keep(waiter, entry, entry.key.variant in seen.replaced)
            for entry in entries
            if entry.key.variant in seen.kept
        }
        served: list[Served] = []
        for entry in entries:
            variant = entry.key.variant
            stored = await kept[variant] if variant in kept else entry
            served.append(_served(stored, seen.hits.get(variant)))
        return served


class _Looked(NamedTuple):
    """Where pictures are, by variant: which tier has it, which nobody can say of, which is older than accepted."""

    hits: dict[int, TierName]
    unknown: set[int]
    too_old: set[int]


def _served(entry: CachedImage, would_hit: TierName | None) -> Served:
    return Served(
        entry,
        TierName.UPSTREAM,
        MatchLevel.EXACT,
        cost_microusd=entry.image.paid_microusd,
        would_hit=would_hit,
    )


def _minds_age(waiter: Waiter) -> bool:
    """Whether an entry may be too old, so that to find one is not to hit."""
    lifetimes_s = (waiter.namespace.ttl_s, waiter.namespace.max_ttl_s, waiter.terms.ttl_s)
    return waiter.not_before_s is not None or any(lifetime_s is not None for lifetime_s in lifetimes_s)


def _drop_spare(waiter: Waiter, image: GeneratedImage) -> None:
    """Nothing is kept of it, but it has cost something."""
    waiter.spare_microusd += image.paid_microusd
