"""Answers from what other callers asked for in other words: pictures of other prompts that mean the same.

A request is looked up by its own key first. Where every tier has missed, its canonical key (identity/canonical.py) may
have an alias: the key of a picture that was made for another spelling. Aliases lie in memory and in Redis, so it takes
one round trip at most. What lies under a picture's own key stays there; the alias only points to it.

An alias does not decide what is served: the entry itself says which canonical key it has, or else which prompt it was
made for, and two keys that were reported to name different pictures answer for one another no more. One that points to
nothing, or to what it should not, is removed.

All spellings take turns to pay: a flight waits for the flight of another spelling that is about to pay, and has what
that one made. What an upstream told of one spelling is told of all. Across replicas the lease of the canonical key does
the same. A flight whose callers take no other spelling's picture waits for none, but others wait for it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cachetools import LRUCache, TTLCache

from cacheserver.epochs import Epochs
from cacheserver.errors import QueueFullError, UpstreamError
from cacheserver.flight import Flight, Loaded, Waiter
from cacheserver.identity import group_of
from cacheserver.interfaces import Aliases, SimilarPrompts
from cacheserver.model import Alias, CachedImage, CacheKey, MatchLevel, TierName
from cacheserver.tasks import OwnedTasks

_REMEMBERED = 100_000
_ABSENT_S = 60.0
"""So long what no tier has is taken for absent, where another spelling's picture answers for it."""

_OUTDATED_S = 600.0
_BEHIND_REDIS = frozenset({TierName.DISK, TierName.S3, TierName.JOURNAL})
"""Where what Redis has lost comes from, with it what answers for whom."""


class _Asked(NamedTuple):
    """What is looked for: the digest of the prompt that asks and its canonical key; neither for a call by key."""

    prompt_digest: bytes
    canonical: CacheKey | None


_BY_KEY = _Asked(b"", None)


@dataclass(eq=False, slots=True)
class _Turn:
    """A flight that pays for a canonical key, and what it made. `ended` tells whoever waits what it failed with."""

    flight: Flight
    made: dict[int, CachedImage] = field(default_factory=dict)
    ended: asyncio.Future[UpstreamError | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


Urge = Callable[[Flight, Flight], None]
"""Has the first flight know how urgent the second one is."""


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
        in_review: Callable[[CacheKey], Awaitable[CachedImage | None]],
        urge: Urge,
    ) -> None:
        """`here` is what memory has; `walk` brings a picture as a call for it would find it; `in_review` what waits.

        Without `prompts` nothing is matched but canonical keys.
        """
        self._aliases = aliases
        self._prompts = prompts
        self._epochs = epochs
        self._monotonic_s = monotonic_s
        self._here = here
        self._walk = walk
        self._in_review = in_review
        self._urge = urge
        self._tasks = OwnedTasks()
        self._turns: dict[str, _Turn] = {}
        self._waiting: dict[Flight, Flight] = {}
        """The flights that wait for their turn, each with the one that has it."""
        self._known: LRUCache[str, Alias] = LRUCache(_REMEMBERED)
        self._outdated: TTLCache[str, Alias] = TTLCache(_REMEMBERED, _OUTDATED_S, timer=monotonic_s)
        """Aliases of pictures that are there and did not do: what is paid for in their place is to take it."""
        self._paid: TTLCache[str, tuple[float, Alias]] = TTLCache(_REMEMBERED, _OUTDATED_S, timer=monotonic_s)
        """What was made in the latest turn of a canonical key, and when that ended (monotonic)."""
        self._absent: TTLCache[str, tuple[Alias, _Asked]] = TTLCache(_REMEMBERED, _ABSENT_S, timer=monotonic_s)

    # ── what is there ───────────────────────────────────────────────────────────────────────────────────────

    def in_memory(self, waiter: Waiter, variant: int) -> Loaded | None:
        """What memory has for a waiter whose own key was looked for in vain a short while ago."""
        if (absent := self._absent.get(waiter.key.identity_name)) is None:
            return None
        alias, asked = absent
        if not self._takes_similar(waiter) or not self._may_answer(waiter.key, alias):
            return None
        entry = self._here(alias.key.with_variant(variant))
        if entry is None or not _answers(entry, alias, asked.canonical):
            return None
        return _matched(Loaded(entry, TierName.MEMORY), alias, asked)

    def is_due(self, flight: Flight) -> bool:
        """Whether somebody came to a flight whose prompt was not looked for yet."""
        return next(self._due(flight), None) is not None

    async def land(self, flight: Flight, variants: Sequence[int]) -> set[int]:
        """Land those of `variants`, which nobody has under the flight's key, that another prompt has.

        Returns those that wait for review under another spelling. When it returns nobody is due.
        """
        in_review: set[int] = set()
        verifying: list[Waiter] = []
        while (lead := next(self._due(flight), None)) is not None:
            asked = _asked(lead)
            flight.likened.add(asked.prompt_digest)
            if asked.canonical is not None or asked is _BY_KEY:
                in_review |= await self._land_known(flight, variants, asked, _names(flight, lead, asked))
            is_semantic = self._prompts is not None and lead.similarity >= MatchLevel.SEMANTIC
            if is_semantic and lead in flight.waiters and asked.prompt_digest not in flight.judged:
                flight.judged.add(asked.prompt_digest)
                verifying.append(lead)
        if verifying and self._prompts is not None:
            prompts = self._prompts
            await asyncio.gather(*(self._land_verified(flight, variants, lead, prompts) for lead in verifying))
        return in_review

    async def tiers_of(self, waiter: Waiter, variants: Iterable[int]) -> dict[int, TierName]:
        """Which tier would answer for `variants` with another spelling's picture: for who is only observed."""
        if not self._takes_similar(waiter) or waiter.canonical_key is None:
            return {}
        name = waiter.canonical_key.identity_name
        alias = self._known.get(name) or (await self._aliases.find([name]))[0]
        if alias is None or not self._may_answer(waiter.key, alias):
            return {}
        asked = _asked(waiter)
        tiers: dict[int, TierName] = {}
        for variant in variants:
            found, _ = await self._walk(alias.key.with_variant(variant), lambda _: True)
            if found is not None and _answers(found.entry, alias, asked.canonical):
                loaded = _matched(found, alias, asked)
                tiers |= {variant: found.tier} if waiter.accepts(loaded) else {}
        return tiers

    def _due(self, flight: Flight) -> Iterator[Waiter]:
        """Those of its waiters whose prompts were not looked for yet."""
        waiters = (waiter for waiter in flight.waiters if self._takes_similar(waiter))
        return (waiter for waiter in waiters if _asked_digest(waiter) not in flight.likened)

    async def _land_known(
        self, flight: Flight, variants: Sequence[int], asked: _Asked, names: Sequence[str]
    ) -> set[int]:
        """Land what aliases of these names answer with, those that memory knows first; what of it waits for review."""
        in_review: set[int] = set()
        tried: list[Alias] = []
        for name in names:
            if (alias := self._known.get(name)) is not None:
                tried.append(alias)
                in_review |= await self._land_by(flight, variants, asked, name, alias)
        if in_review or not set(variants) & set(flight.lacking):
            return in_review
        for name, alias in zip(names, await self._aliases.find(names), strict=True):
            if alias is not None and alias not in tried:
                self._known[name] = alias
                in_review |= await self._land_by(flight, variants, asked, name, alias)
        return in_review

    async def _land_by(
        self, flight: Flight, variants: Sequence[int], asked: _Asked, name: str, alias: Alias
    ) -> set[int]:
        """Land what one alias answers with. It goes if its picture is gone, or is not what it should be."""
        if not self._may_answer(flight.key, alias):
            return set()
        for variant in [each for each in variants if each in flight.lacking]:
            found, is_unknown = await self._walked(flight, variant, asked, alias)
            if found is None and is_unknown:
                continue
            if found is None and await self._waits_for_review(flight, alias.key.with_variant(variant)):
                return {variant}
            if found is not None and _answers(found.entry, alias, asked.canonical):
                if not self._land(flight, variant, _matched(found, alias, asked), alias, asked):
                    self._outdated[name] = alias
            elif variant == 0:
                self._known.pop(name, None)
                await self._aliases.remove(name, alias)
        return set()

    async def _walked(self, flight: Flight, variant: int, asked: _Asked, alias: Alias) -> tuple[Loaded | None, bool]:
        def suits(found: Loaded) -> bool:
            is_right = _answers(found.entry, alias, asked.canonical)
            return is_right and flight.suits(variant, _matched(found, alias, asked))

        return await self._walk(alias.key.with_variant(variant), suits)

    def _land(self, flight: Flight, variant: int, loaded: Loaded, alias: Alias, asked: _Asked) -> bool:
        """Land a picture of another prompt, if it suits anybody; whether it does."""
        if not flight.suits(variant, loaded):
            return False
        is_promised = any(waiter.terms.max_wait_s is not None for waiter in flight.waiters)
        own = flight.key.identity_name
        if not flight.has_own(variant):
            self._absent[own] = alias, asked
        flight.land(variant, loaded)
        if is_promised:  # who was told the key may ask for it, here and at other replicas
            self._tell(own, alias)
        if alias.level is MatchLevel.SEMANTIC:  # what was verified is verified for all replicas
            self._tell(_verified_name(own, asked), alias)
        return True

    async def _land_verified(
        self, flight: Flight, variants: Sequence[int], lead: Waiter, prompts: SimilarPrompts
    ) -> None:
        """Land what a verifier says is the same picture."""
        group = group_of(lead.request, lead.namespace)
        alias = await prompts.find(
            group,
            lead.request.prompt,
            namespace=lead.namespace.name,
            may_answer=lambda key: self._may_answer(flight.key, Alias(key, MatchLevel.SEMANTIC, b"")),
        )
        if alias is None:
            return
        asked = _Asked(lead.identity.prompt_digest, None)
        for variant in [each for each in variants if each in flight.lacking]:
            found, is_unknown = await self._walked(flight, variant, asked, alias)
            if found is not None and _answers(found.entry, alias, None):
                self._land(flight, variant, _matched(found, alias, asked), alias, asked)
            elif not is_unknown and variant == 0:
                await prompts.forget(group, alias)
                return

    async def _waits_for_review(self, flight: Flight, key: CacheKey) -> bool:
        if all(waiter.namespace.min_score is None for waiter in flight.asking):
            return False
        return await self._in_review(key) is not None

    # ── what is stored ──────────────────────────────────────────────────────────────────────────────────────

    def saw(self, flight: Flight, found: Loaded) -> None:
        """A tier has what was asked for by its own key: from now on that may answer others. Never waits."""
        entry = found.entry
        lead = next((w for w in flight.asking if w.identity.prompt_digest == entry.prompt_digest), None)
        if lead is None or not lead.namespace.shares_spellings:
            return
        is_news = found.tier in _BEHIND_REDIS or not entry.canonical_digest
        if is_news or lead.namespace.similarity >= MatchLevel.SEMANTIC:
            self.remember(lead, entry)

    def made(self, flight: Flight, lead: Waiter, entries: Sequence[CachedImage]) -> None:
        """A flight paid for these, and they are stored: those who wait for their turn have them. Never waits."""
        turn = None if lead.canonical_key is None else self._turns.get(lead.canonical_key.identity_name)
        if turn is not None and turn.flight is flight:
            turn.made |= {entry.key.variant: entry for entry in entries}

    def remember(self, lead: Waiter, entry: CachedImage) -> list[asyncio.Task[None]]:
        """`entry` is stored, or waits for review: it answers whoever asks for the same, unless another one does.

        Never waits: returns what tells other replicas so.
        """
        self._absent.pop(entry.key.identity_name, None)
        telling = [] if lead.canonical_key is None else self._answer_for(lead.canonical_key, entry)
        if self._prompts is not None and lead.namespace.similarity >= MatchLevel.SEMANTIC:
            group = group_of(lead.request, lead.namespace)
            learning = self._prompts.learn(
                group, entry.key.with_variant(0), lead.request.prompt, lead.identity.prompt_digest
            )
            self._tasks.own(learning, "learn a prompt")
        return telling

    async def add(self, entry: CachedImage, canonical: CacheKey | None) -> None:
        """`entry` was put or imported: from now on it answers for its canonical key, unless another one does."""
        self._absent.pop(entry.key.identity_name, None)
        if canonical is not None and (telling := self._answer_for(canonical, entry)):
            await asyncio.wait(telling)

    def _answer_for(self, canonical: CacheKey, entry: CachedImage) -> list[asyncio.Task[None]]:
        name = canonical.identity_name
        outdated = self._outdated.pop(name, None)
        if outdated is None and name in self._known:
            return []
        return [self._tell(name, _alias_of(entry), instead_of=outdated)]

    def _tell(self, name: str, alias: Alias, *, instead_of: Alias | None = None) -> asyncio.Task[None]:
        self._known[name] = alias
        return self._tasks.own(self._added(name, alias, instead_of), "tell of an alias")

    async def _added(self, name: str, alias: Alias, instead_of: Alias | None) -> None:
        if not await self._aliases.add(name, alias, instead_of=instead_of) and self._known.get(name) == alias:
            del self._known[name]  # another replica was faster

    async def idle(self) -> None:
        """Return when all that is to be told is told."""
        await self._tasks.idle()

    async def aclose(self, grace_s: float) -> None:
        """Tell what is to be told within `grace_s`."""
        await self._tasks.aclose(grace_s)

    # ── turns ───────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def turn(self, flight: Flight, lead: Waiter) -> AsyncIterator[None]:
        """The only one of this process's flights to pay for what `lead` asks for, in whatever words.

        What another spelling's flight made in its turn meanwhile has landed then.

        Raises:
            UpstreamError: what that one failed with.
        """
        canonical = lead.canonical_key if self._shares(lead) else None
        if canonical is None:
            yield
            return
        name = canonical.identity_name
        looked_for: Alias | None = None
        while self._takes_similar(lead) and flight.waiters and not self._has_own_here(flight):
            if (turn := self._before(name, flight)) is not None:
                await self._wait_for(turn, flight, name)
                continue
            ended_s, alias = self._paid.get(name, (-math.inf, None))
            if alias is None or alias == looked_for or ended_s < flight.started_s:
                break
            looked_for = alias  # it had its turn between our look and here
            for asked in _asked_as(flight, name):
                await self._land_by(flight, flight.lacking, asked, name, alias)
        if not flight.waiters or name in self._turns:
            yield  # answered; or beside one that it does not wait for
            return
        turn = self._turns[name] = _Turn(flight)
        failure = None
        try:
            yield
        except UpstreamError as error:
            # That there was no place for one says nothing of others, who may be more urgent.
            failure = None if isinstance(error, QueueFullError) else error
            raise
        finally:
            del self._turns[name]
            if turn.made:
                entry = next(iter(turn.made.values()))
                self._paid[name] = self._monotonic_s(), _alias_of(entry)
            turn.ended.set_result(failure)

    def joined(self, flight: Flight) -> None:
        """Somebody joined a flight: if it waits for its turn, who has that is told how urgent it is now."""
        if (paying := self._waiting.get(flight)) is not None:
            self._urge(paying, flight)

    def _before(self, name: str, flight: Flight) -> _Turn | None:
        turn = self._turns.get(name)
        return None if turn is None or self._epochs.is_banned(flight.key, turn.flight.key) else turn

    async def _wait_for(self, turn: _Turn, flight: Flight, name: str) -> None:
        self._waiting[flight] = turn.flight
        self._urge(turn.flight, flight)
        try:
            failure = await asyncio.shield(turn.ended)
        finally:
            del self._waiting[flight]
        if failure is not None:
            raise failure.with_traceback(None)  # all who wait raise the same one
        for asked in _asked_as(flight, name):
            for variant in sorted(turn.made.keys() & set(flight.lacking)):
                if not self._has_here(flight, variant):
                    alias = _alias_of(turn.made[variant])
                    loaded = _matched(Loaded(turn.made[variant], TierName.UPSTREAM, payer=turn), alias, asked)
                    self._land(flight, variant, loaded, alias, asked)

    def _has_own_here(self, flight: Flight) -> bool:
        """Whether memory has a picture of the flight's own key that it lacks: it may have been put meanwhile."""
        return any(self._has_here(flight, variant) for variant in flight.looked_for)

    def _has_here(self, flight: Flight, variant: int) -> bool:
        entry = self._here(flight.key.with_variant(variant))
        return entry is not None and flight.suits(variant, Loaded(entry, TierName.MEMORY))

    # ── who may ─────────────────────────────────────────────────────────────────────────────────────────────

    def _shares(self, waiter: Waiter) -> bool:
        return waiter.namespace.shares_spellings and self._epochs.allows_similar(waiter.namespace.name)

    def _takes_similar(self, waiter: Waiter) -> bool:
        return waiter.similarity >= MatchLevel.CANONICAL and self._epochs.allows_similar(waiter.namespace.name)

    def _may_answer(self, key: CacheKey, alias: Alias) -> bool:
        """Whether an alias may answer a key: with no other partition's, nor its own, which was looked for."""
        other = alias.key
        is_own = other.fingerprint == key.fingerprint and other.digest[:16] == key.digest[:16]
        return other.partition == key.partition and not is_own and not self._epochs.is_banned(key, other)


def _alias_of(entry: CachedImage) -> Alias:
    return Alias(entry.key.with_variant(0), MatchLevel.CANONICAL, entry.prompt_digest)


def _asked(waiter: Waiter) -> _Asked:
    return _BY_KEY if waiter.asked is None else _Asked(waiter.identity.prompt_digest, waiter.canonical_key)


def _asked_as(flight: Flight, name: str) -> list[_Asked]:
    """The prompts of a flight's waiters that have the canonical key of this name."""
    every = dict.fromkeys(map(_asked, flight.asking))
    return [asked for asked in every if asked.canonical is not None and asked.canonical.identity_name == name]


def _asked_digest(waiter: Waiter) -> bytes:
    return b"" if waiter.asked is None else waiter.identity.prompt_digest


def _names(flight: Flight, lead: Waiter, asked: _Asked) -> list[str]:
    """By which names aliases may answer: the canonical key's, what was verified for the prompt; by key its own."""
    own = flight.key.identity_name
    if asked.canonical is None:
        return [own]
    verified = [_verified_name(own, asked)] if lead.similarity >= MatchLevel.SEMANTIC else []
    return [asked.canonical.identity_name, *verified]


def _verified_name(own: str, asked: _Asked) -> str:
    return f"{own}.{asked.prompt_digest[:16].hex()}"


def _matched(found: Loaded, alias: Alias, asked: _Asked) -> Loaded:
    return replace(found, matched=alias.level, matched_for=asked.prompt_digest)


def _answers(entry: CachedImage, alias: Alias, canonical: CacheKey | None) -> bool:
    """Whether an alias tells the truth about an entry: it has the canonical key, or the prompt it was made for."""
    if alias.level is MatchLevel.CANONICAL and canonical is not None and entry.canonical_digest:
        return entry.canonical_digest == canonical.digest
    return entry.prompt_digest == alias.prompt_digest
