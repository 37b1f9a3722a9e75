"""Answers from what other callers asked for in other words: pictures of other prompts that mean the same.

A request is looked up by its own key first. Where every tier has missed, its canonical key (identity/canonical.py) may
have an alias: the key of a picture that was made for another spelling. Aliases lie in memory and in Redis, so it takes
one round trip at most. What lies under a picture's own key stays there; the alias only points to it.

An alias never decides what is served: the entry itself says which canonical key it has, and two keys that were
reported to name different pictures answer for one another no more (`Epochs.is_banned`).

All spellings take turns to pay: a flight waits for the flight of another spelling that is about to pay, and then finds
what that one made. Across replicas their lease does the same, for it has the name of the canonical key.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from cachetools import LRUCache, TTLCache

from cacheserver.epochs import Epochs
from cacheserver.errors import CacheServerError
from cacheserver.flight import Flight, Loaded, Waiter
from cacheserver.identity import group_of
from cacheserver.interfaces import Aliases, SimilarPrompts
from cacheserver.model import Alias, CachedImage, CacheKey, MatchLevel, TierName
from cacheserver.tasks import OwnedTasks

_REMEMBERED = 100_000
_ABSENT_S = 60.0
"""So long what no tier has is taken for absent, where another spelling's picture answers for it."""

_UNLIKE_S = 10.0
"""So long a prompt that nothing is like is not looked for again: a load looks twice before it pays."""

_BEHIND_REDIS = frozenset({TierName.DISK, TierName.S3, TierName.JOURNAL})
"""Where what Redis has lost comes from, with it what answers for whom."""


@dataclass(eq=False, slots=True)
class _Turn:
    """A flight that pays for a canonical key. `ended` tells whoever waits for it what it failed with, if it did."""

    flight: Flight
    ended: asyncio.Future[CacheServerError | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Matching:
    """Brings a flight what it lacks from pictures of prompts that mean the same."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        aliases: Aliases,
        prompts: SimilarPrompts | None,
        epochs: Epochs,
        monotonic_s: Callable[[], float],
        here: Callable[[CacheKey], CachedImage | None],
        walk: Callable[[CacheKey, Callable[[Loaded], bool]], Awaitable[tuple[Loaded | None, bool]]],
    ) -> None:
        """`here` is what memory has; `walk` brings a picture as a call for it would find it.

        Without `prompts` nothing is matched but canonical keys.
        """
        self._aliases = aliases
        self._prompts = prompts
        self._epochs = epochs
        self._here = here
        self._walk = walk
        self._tasks = OwnedTasks()
        self._turns: dict[str, _Turn] = {}
        self._known: LRUCache[str, Alias] = LRUCache(_REMEMBERED)
        self._absent: TTLCache[str, tuple[bytes, Alias]] = TTLCache(_REMEMBERED, _ABSENT_S, timer=monotonic_s)
        self._unlike: TTLCache[tuple[str, bytes], bool] = TTLCache(_REMEMBERED, _UNLIKE_S, timer=monotonic_s)

    def in_memory(self, waiter: Waiter, variant: int) -> Loaded | None:
        """What memory has for a waiter whose own key was looked for in vain a short while ago."""
        if (absent := self._absent.get(waiter.key.identity_name)) is None:
            return None
        prompt_digest, alias = absent
        if not self._takes_similar(waiter) or self._epochs.is_banned(waiter.key, alias.key):
            return None
        entry = self._here(alias.key.with_variant(variant))
        if entry is None:
            return None
        return Loaded(entry, TierName.MEMORY, matched=alias.level, matched_for=prompt_digest)

    async def land(self, flight: Flight, variants: Sequence[int]) -> None:
        """Land those of `variants`, which nobody has under the flight's key, that another prompt has."""
        leads = {each.identity.prompt_digest: each for each in flight.asking if self._takes_similar(each)}
        for lead in leads.values():
            await self._land_for(flight, variants, lead)
        if not leads and any(map(self._takes_similar, flight.waiters)):
            # By a key that its caller was told while it was made: no prompt is known.
            await self._land_known(flight, variants, b"", None)

    async def _land_for(self, flight: Flight, variants: Sequence[int], lead: Waiter) -> None:
        await self._land_known(flight, variants, lead.identity.prompt_digest, lead.canonical_key)
        if self._prompts is None or lead.similarity < MatchLevel.SEMANTIC or lead not in flight.waiters:
            return
        asked = (flight.key.identity_name, lead.identity.prompt_digest)
        if asked in self._unlike:
            return
        group = group_of(lead.request, lead.namespace)
        alias = await self._prompts.find(
            group,
            lead.request.prompt,
            namespace=lead.namespace.name,
            may_answer=lambda key: not (key.matches(flight.key.digest) or self._epochs.is_banned(flight.key, key)),
        )
        if alias is None:
            self._unlike[asked] = True
        elif not await self._land_alias(flight, variants, lead.identity.prompt_digest, None, alias):
            await self._prompts.forget(group, alias)

    async def _land_known(
        self, flight: Flight, variants: Sequence[int], prompt_digest: bytes, canonical: CacheKey | None
    ) -> None:
        """Land what an alias answers with; one whose picture is gone is removed."""
        if flight.lacking and (alias := await self._alias(flight.key, canonical)) is not None:
            is_there = await self._land_alias(flight, variants, prompt_digest, canonical, alias)
            if not is_there and canonical is not None:
                self._known.pop(canonical.identity_name, None)
                await self._aliases.remove(canonical.identity_name, alias)

    async def _land_alias(
        self, flight: Flight, variants: Sequence[int], prompt_digest: bytes, canonical: CacheKey | None, alias: Alias
    ) -> bool:
        """Land what answers by an alias; False if its picture is gone for certain."""
        if alias.key.identity_name == flight.key.identity_name or self._epochs.is_banned(flight.key, alias.key):
            return True  # its own was looked for just now; what is banned is there for others

        def matched(found: Loaded) -> Loaded:
            return replace(found, matched=alias.level, matched_for=prompt_digest)

        is_there = True
        is_promised = any(waiter.terms.max_wait_s is not None for waiter in flight.waiters)
        for variant in [each for each in variants if each in flight.lacking]:

            def suits(found: Loaded, variant: int = variant) -> bool:
                return _answers(found.entry, alias, canonical) and flight.suits(variant, matched(found))

            found, is_unknown = await self._walk(alias.key.with_variant(variant), suits)
            if found is not None and suits(found):
                self._absent[flight.key.identity_name] = prompt_digest, alias
                flight.land(variant, matched(found))
                if is_promised or alias.level is MatchLevel.SEMANTIC:
                    # Who was told the key may ask for it, and what was verified is verified for all replicas.
                    self._known[flight.key.identity_name] = alias
                    await self._aliases.add(flight.key.identity_name, alias)
            elif found is None and not is_unknown and variant == 0:
                is_there = False
        return is_there

    async def _alias(self, own: CacheKey, canonical: CacheKey | None) -> Alias | None:
        """What answers for a canonical key, or else for a key by itself."""
        names = [key.identity_name for key in (canonical, own) if key is not None]
        for name in names:
            if (known := self._known.get(name)) is not None:
                return known
        for name, found in zip(names, await self._aliases.find(names), strict=True):
            if found is not None:
                self._known[name] = found
                return found
        return None

    def saw(self, flight: Flight, found: Loaded) -> None:
        """A tier has what was asked for by its own key: from now on that may answer others. Never waits."""
        entry = found.entry
        lead = next((w for w in flight.asking if w.identity.prompt_digest == entry.prompt_digest), None)
        if lead is None or not self._takes_similar(lead):
            return
        is_news = found.tier in _BEHIND_REDIS or not entry.canonical_digest
        if is_news or lead.similarity >= MatchLevel.SEMANTIC:
            self._tasks.own(self.remember(lead, entry), "remember what answers others")

    async def remember(self, lead: Waiter, entry: CachedImage) -> None:
        """`entry` is stored: from now on it answers whoever asks for the same as `lead`, unless another one does."""
        await self.add(entry, lead.canonical_key)
        if self._prompts is not None and lead.namespace.similarity >= MatchLevel.SEMANTIC:
            group = group_of(lead.request, lead.namespace)
            digest = lead.identity.prompt_digest
            await self._prompts.learn(group, entry.key.with_variant(0), lead.request.prompt, digest)

    async def add(self, entry: CachedImage, canonical: CacheKey | None) -> None:
        """`entry` is stored: from now on it answers for its canonical key, unless another one does."""
        self._absent.pop(entry.key.identity_name, None)
        if canonical is None or canonical.identity_name in self._known:
            return
        name = canonical.identity_name
        alias = Alias(entry.key.with_variant(0), MatchLevel.CANONICAL, entry.prompt_digest)
        self._known[name] = alias  # those who wait for their turn find it
        if not await self._aliases.add(name, alias):
            self._known.pop(name, None)  # another replica was faster

    async def idle(self) -> None:
        """Return when nothing runs behind answers."""
        await self._tasks.idle()

    async def aclose(self) -> None:
        """End what runs behind answers."""
        await self._tasks.aclose(0)

    def _takes_similar(self, waiter: Waiter) -> bool:
        return waiter.similarity >= MatchLevel.CANONICAL and self._epochs.allows_similar(waiter.namespace.name)

    @asynccontextmanager
    async def turn(self, flight: Flight, name: str, urge: Callable[[Flight, Flight], None]) -> AsyncIterator[bool]:
        """The only one of this process's flights to pay for the canonical key of this name.

        Yields whether another spelling's flight paid meanwhile. `urge` has that one know how urgent ours is. What that
        one failed with is raised here: what it was told of one spelling is told of all.
        """
        is_late = False
        while (turn := self._turns.get(name)) is not None:
            is_late = True
            urge(turn.flight, flight)
            if (failure := await asyncio.shield(turn.ended)) is not None:
                raise failure.with_traceback(None)  # all who wait raise the same one
        turn = self._turns[name] = _Turn(flight)
        failure = None
        try:
            yield is_late
        except CacheServerError as error:
            failure = error
            raise
        finally:
            del self._turns[name]
            turn.ended.set_result(failure)


def _answers(entry: CachedImage, alias: Alias, canonical: CacheKey | None) -> bool:
    """Whether an alias tells the truth about an entry: it has the canonical key, or the prompt it was made for."""
    if alias.level is MatchLevel.CANONICAL and canonical is not None and entry.canonical_digest:
        return entry.canonical_digest == canonical.digest
    return entry.prompt_digest == alias.prompt_digest
