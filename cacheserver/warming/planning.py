"""What a warm-up would do, cost and take. Nothing is spent, read or promoted."""

from __future__ import annotations

from collections import Counter, defaultdict

from cacheserver.errors import CacheServerError
from cacheserver.interfaces import Generation
from cacheserver.model import ImageRequest, Outlook, WarmResult
from cacheserver.warming.looking import Sight
from cacheserver.warming.values import WarmOutcome, WarmTotals

_MINUTE_S = 60.0

_Kind = tuple[str, str]
"""Model and quality: what decides how long a call takes."""


class Plan:
    """Adds up what is to be generated."""

    def __init__(self, generation: Generation, totals: WarmTotals) -> None:
        self._generation = generation
        self._totals = totals
        self._outlooks: dict[_Kind, Outlook] = {}
        self._pictures: Counter[_Kind] = Counter()
        self._calls: Counter[_Kind] = Counter()

    def add(self, sight: Sight) -> WarmOutcome | None:
        """Count an item; the outcome of one that would fail."""
        item = sight.item
        if sight.missing:
            try:
                self._add_missing(item.ask.request, sight.missing, item.ask.terms.candidates)
            except CacheServerError as error:
                return WarmOutcome(item.row, WarmResult.FAILED, item.keys, error=error)
        elif sight.tier is not None and not sight.in_flight:
            self._totals.cached[sight.tier] += 1
        return None

    def _add_missing(self, request: ImageRequest, missing: int, candidates: int) -> None:
        kind = request.model, request.quality
        if kind not in self._outlooks:
            self._outlooks[kind] = self._generation.outlook(request)
        microusd = self._generation.cheapest_microusd(request, missing * candidates)
        self._totals.to_generate += missing
        self._totals.estimated_microusd += microusd
        self._totals.unpriced += not microusd
        self._pictures[kind] += missing * candidates
        self._calls[kind] += 1

    def seconds(self, *, concurrency: int, max_images_per_minute: int | None) -> float | None:
        """How long all that is missing takes: by the limits, by how many calls run at a time, by the job's own pace.

        The slowest of these decides. Models of the same limit groups wait for one another, others do not. None where
        nothing is to be made.
        """
        if not self._calls:
            return None
        by_groups: dict[frozenset[str], float] = defaultdict(float)
        for kind, pictures in self._pictures.items():
            outlook = self._outlooks[kind]
            if outlook.images_per_minute:
                by_groups[outlook.groups] += pictures * _MINUTE_S / outlook.images_per_minute
        busy_s = sum(calls * self._outlooks[kind].call_s for kind, calls in self._calls.items())
        paced_s = self._totals.to_generate * _MINUTE_S / max_images_per_minute if max_images_per_minute else 0.0
        return max(max(by_groups.values(), default=0.0), busy_s / concurrency, paced_s)
