"""What a picture that is stored would cost if it were made now: what a hit saves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from cacheserver.generation.pool import Lane, Pool
from cacheserver.generation.prices import PriceTable
from cacheserver.model import GeneratedImage, JsonValue, Usage

_REMEMBERED = 10_000
_SNAPSHOT_DATE = re.compile(r"-\d{4}-\d{2}-\d{2}$")

_Facts = tuple[str, str, str, str, tuple[int, ...], Decimal | None]
"""All that decides a price: the model asked for and the one that answered, size, quality, tokens, price factor."""


class Worth:
    """Prices stored pictures anew: their own tokens, or else their size and quality, by today's table.

    A picture is worth what the cheapest of the upstreams takes that serve its model. Cheap enough for the hit path:
    most pictures are like another, and what decides a price is looked up once.
    """

    def __init__(self, *, pool: Pool, prices: PriceTable, theirs: Mapping[str, str]) -> None:
        """`prices` are by our own names of models too; `theirs` are the providers' names by ours."""
        self._pool = pool
        self._ours = {_SNAPSHOT_DATE.sub("", name): ours for ours, name in theirs.items()}
        self._known: dict[_Facts, int | None] = {}
        self.replace(prices)

    def replace(self, prices: PriceTable) -> None:
        """From now on these are the prices; what the pool's lanes take of them is looked up anew, too."""
        self._prices = prices
        self._has_steps = any(lane.terms.price_steps for lane in self._pool.lanes)
        self._known.clear()

    def microusd(self, image: GeneratedImage, model: str) -> int:
        """What the picture would cost now, in micro-dollars; where that cannot be told, what was paid for it."""
        tokens = _tokens(image.usage) if image.usage is not None else ()
        # Where prices step with what was paid in a month, the factor is another fact; else the models decide it.
        factor = self._factor(model, image.model) if self._has_steps else None
        facts = (model, image.model, image.size, image.quality, tokens, factor)
        try:
            price = self._known[facts]
        except KeyError:
            price = self._known[facts] = self._price(image, model)
            if len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        return image.paid_microusd if price is None else price

    def _price(self, image: GeneratedImage, model: str) -> int | None:
        factor = self._factor(model, image.model)
        if factor is None:
            return None
        usage = None if image.usage is None else _as_told(image.usage)
        for name in filter(None, (model, image.model)):
            price = self._prices.cost_microusd(name, image.size, image.quality, usage, 1, factor)
            if price is not None:
                return price
        return None

    def _factor(self, *models: str) -> Decimal | None:
        """What the list price is multiplied by where it is lowest; None if nobody serves the model any more."""
        lanes = next(filter(None, map(self._lanes, models)), ())
        return min(map(self._pool.price_factor, lanes), default=None)

    def _lanes(self, model: str) -> Sequence[Lane]:
        ours = self._ours.get(_SNAPSHOT_DATE.sub("", model), model)
        return self._pool.priced_apart(model) or self._pool.priced_apart(ours)


def _tokens(usage: Usage) -> tuple[int, ...]:
    return usage.input_tokens, usage.input_image_tokens, usage.output_tokens


def _as_told(usage: Usage) -> dict[str, JsonValue]:
    """Token counts in the shape that providers tell them in."""
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"image_tokens": usage.input_image_tokens},
        "output_tokens": usage.output_tokens,
    }
