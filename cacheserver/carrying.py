"""An upgrade empties nothing: pictures of other identity versions, carried on under the key that is written now.

During a rolling upgrade replicas write different versions, and each reads all that it knows: what any of them has paid
for is looked up before another one pays. A picture that is found so becomes an entry under the asker's key, beside the
one it was found as, and the next call finds it there at once. It never takes the place of another picture.

Normalization may have changed because two prompts shared a picture that should not have. So what lies under another
version's key answers only the prompt that it was made from, unless the table of versions says that it answers all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from cacheserver import identity
from cacheserver.epochs import Epochs
from cacheserver.flight import Flight, Loaded, Waiter
from cacheserver.identity import OtherIdentity
from cacheserver.keep import Keeper
from cacheserver.model import CachedImage, CacheKey


def other_identities(waiter: Waiter) -> list[OtherIdentity]:
    """What the waiter asked for as other versions identify it, newest first."""
    return identity.other_identities(waiter.request, waiter.identity, waiter.namespace)


def other_keys(waiter: Waiter) -> list[CacheKey]:
    """The keys of the same."""
    return [other.identity.key for other in other_identities(waiter)]


def lasting_name(waiter: Waiter) -> str:
    """What replicas that write different versions call what the waiter asked for."""
    return identity.lasting_name(waiter.request, waiter.identity, waiter.namespace)


class Carrying:
    """Brings a flight what it lacks from under the keys of other versions."""

    def __init__(
        self,
        *,
        keeper: Keeper,
        epochs: Epochs,
        walk: Callable[[CacheKey, Callable[[Loaded], bool]], Awaitable[tuple[Loaded | None, bool]]],
    ) -> None:
        """`walk` brings a picture as a call for it would find it, and says whether the last tier could not tell."""
        self._keeper = keeper
        self._epochs = epochs
        self._walk = walk

    async def land(self, flight: Flight, variants: Sequence[int]) -> set[int]:
        """Land those of `variants`, which nobody has under the flight's key; those of which nobody can say."""
        unknown: set[int] = set()
        leads = {waiter.identity.prompt_digest: waiter for waiter in flight.asking if not waiter.refresh}
        for lead in leads.values():
            for other in other_identities(lead):
                lacking = [variant for variant in variants if variant not in flight.loaded]
                are_unknown = await asyncio.gather(*(self._land(flight, lead, other, v) for v in lacking))
                unknown |= {v for v, is_unknown in zip(lacking, are_unknown, strict=True) if is_unknown}
        return unknown

    async def _land(self, flight: Flight, lead: Waiter, other: OtherIdentity, variant: int) -> bool:
        """Land one if it lies under the other identity's key; whether nobody can say."""
        changes = self._keeper.changes
        key = lead.key.with_variant(variant)

        def suits(found: Loaded) -> bool:
            is_of_prompt = other.answers_all or found.entry.prompt_digest == lead.identity.prompt_digest
            carried = _carried(found.entry, key)
            is_gone = self._epochs.is_gone(key, carried)
            return is_of_prompt and not is_gone and flight.suits(variant, replace(found, entry=carried))

        found, is_unknown = await self._walk(other.identity.key.with_variant(variant), suits)
        if found is None or not suits(found):
            return is_unknown
        carried = _carried(found.entry, key)
        flight.land(variant, replace(found, entry=carried))
        await self._keeper.keep_if_free(carried, changes=changes)
        return False


def _carried(entry: CachedImage, key: CacheKey) -> CachedImage:
    return replace(entry, key=key, carried_from=(entry.key.name, *entry.carried_from))
