"""A sample of the similar hits, kept for a person to look at."""

from __future__ import annotations

from random import Random

from cacheserver.calls.asked import Asked
from cacheserver.interfaces import Matches
from cacheserver.model import CacheKey, Identity, ImageRequest, Namespace, Served


class Sampler:
    """Keeps some of the similar hits for review."""

    def __init__(self, matches: Matches, *, percent: float, rng: Random) -> None:
        """`percent` of them, 0 to 100, as `rng` has it."""
        self._matches = matches
        self._percent = percent
        self._rng = rng

    def similar_hit(self, served: Served, asked: Asked, wanted: Identity | None) -> None:
        """A call was answered with a picture of another prompt; `wanted` is the identity that it asked for.

        Never waits and never fails.
        """
        if self._rng.random() * 100 >= self._percent:
            return
        what, matched_key = asked.what, served.entry.key
        if isinstance(what, CacheKey):
            key = what
        elif wanted is not None:
            key = wanted.key.with_variant(matched_key.variant)
        else:
            return
        self._matches.record(
            namespace=asked.namespace.name,
            level=served.matched,
            key=key,
            matched_key=matched_key,
            prompt=_prompt(what, asked.namespace),
        )

    async def forget(self, namespace: str, key: CacheKey | None) -> None:
        """What was asked for is told no more: of the key's identity, or with None of all of the namespace.

        Raises:
            AccountsUnavailableError: it may still be there.
        """
        await self._matches.forget(namespace, key)


def _prompt(what: ImageRequest | CacheKey, namespace: Namespace) -> str:
    """What may be kept of it."""
    return what.prompt if namespace.store_prompts and isinstance(what, ImageRequest) else ""
