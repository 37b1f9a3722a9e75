"""PromptCache: the path of a request. This file is the program; the others are its parts.

    memory ──hit──────────────────────────────────────────────▶ answer
      │ miss
      ▼
    flight ── one load per identity; everyone who asks joins it
      │
      ▼
    walk ──── Redis, then disk or S3: the first intact entry answers and is promoted
      │ nobody has it
      ▼
    carry ─── the same, under the keys that other versions of the identity give it
      │ nobody has it
      ▼
    match ─── a picture of another prompt that means the same, where the namespace allows it (matching.py)
      │ nobody has such
      ▼
    derive ── a picture of another request that dominates this one, where the namespace allows it
      │ nobody has such
      ▼
    may this caller pay? ── judged per waiter: refused ones leave, the first of the others leads
      │                     (who cannot afford it, or not in time, walks the rungs below if it accepts less)
      ▼
    lease ─── one load per identity in all replicas; who had to wait for it walks again, and mostly has it then
      ▼
    generate ─▶ keep ─▶ answer

Five rules run through it.

A wrong image is worse than a miss: every tier compares the identity digest, a flight compares it again for
each waiter (`Waiter.accepts`), and what does not match reads as a miss. So does what was derived, to a waiter that
may not have it.

Unknown is not absent: a tier answers with an entry, with None, or raises TierError. Only the last tier's
None means that nobody has paid for the picture, and where a tier has one that only a newer release can read somebody
has: the caller is sent to another replica. If the last tier cannot say, a picture is paid for under
`when_unknown = "pay"` within an hourly budget, and kept as a stand-in: in a slot of its own, so that it never
takes the name of a picture that may exist. Before anything is paid the stand-in slot is asked too.

Nothing awaits between the look into memory and boarding the flight, so two loads of one identity cannot run
side by side (the interleaving that groupcache's re-check closes). A flight ends only after `keep`, so whoever
comes later finds the picture in a tier even if memory did not admit it. Across replicas a lease does the same while
Redis answers: it is held until a tier that all of them share has the picture.

What was paid for is not lost: nothing awaits between a picture's arrival and `Keeper.keep`, which holds it until
the last tier has it. Once money is spent no hang-up stops a load, and pictures nobody waits for are kept too.

What was replaced or purged does not come back: what a walk read before is not promoted afterwards
(`Keeper.is_current`), and a tier that may still have the predecessor is passed over (`Keeper.is_outdated`). What was
purged counts as absent wherever it turns up, in every replica (`Epochs`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from functools import partial
from typing import Any, NamedTuple

from cachetools import TTLCache

from cacheserver.alone import Alone
from cacheserver.backpressure import Backpressure
from cacheserver.carrying import Carrying, lasting_name, other_keys
from cacheserver.coherence import Coherence
from cacheserver.deriving import Deriving, as_asked
from cacheserver.errors import (
    CacheServerError,
    CacheUnknownError,
    CannotAffordError,
    CorruptEntryError,
    EntryNewerError,
    InReviewError,
    InvalidRequestError,
    KeyGoneError,
    NewerEntryError,
    NoSignedUrlsError,
    RequestIdSpentError,
    TierError,
    TooSlowError,
    UpstreamError,
    VariantsExhaustedError,
)
from cacheserver.flight import Flight, Flights, Loaded, Waiter
from cacheserver.freshness import Renewals, late_after_s, takes_stale
from cacheserver.interfaces import (
    Aliases,
    Books,
    Clock,
    Generation,
    Leases,
    Renderer,
    Replays,
    SigningTier,
    SimilarPrompts,
    Tier,
)
from cacheserver.keep import Keeper
from cacheserver.leasing import Leasing
from cacheserver.matching import Matching
from cacheserver.model import (
    Ask,
    CachedImage,
    CacheKey,
    CachePolicy,
    Caller,
    Found,
    GeneratedImage,
    Identity,
    ImageRequest,
    Labels,
    MatchLevel,
    Namespace,
    Pending,
    Priority,
    Reply,
    Served,
    Stale,
    Terms,
    TierName,
    VariantPolicy,
)
from cacheserver.paying import Paying, UnknownPolicy, lacks_inputs, may_generate, who_bears
from cacheserver.purge import Purger, PurgeResult, PurgeSelector
from cacheserver.remakes import Remakes
from cacheserver.resent import Promise, Resent, replay_id
from cacheserver.reviews import Reviews
from cacheserver.rungs import Identify, Rungs
from cacheserver.tasks import OwnedTasks, in_turns
from cacheserver.tending import Tending
from cacheserver.tiers.hedge import Hedge, in_turn
from cacheserver.tiers.memory import MemoryCache
from cacheserver.variants import AnotherOne, random_ones, sticky_ones

_KEYS_PER_TURN = 25
"""To look so many up in memory takes a tenth of a millisecond."""

_REMEMBERING_S = 1.0
_REMEMBERED_FAILURES, _FAILURES_LAST_S = 10_000, 300.0
_GONE = "No tier has the picture of this key any more; ask for it by its prompt."


class PromptCache:
    """Answers requests from the fastest tier that can, and pays for a picture only when none can."""

    def __init__(  # noqa: PLR0913 - the parts of the house, by keyword
        self,
        *,
        memory: MemoryCache,
        tiers: Sequence[Tier],
        keeper: Keeper,
        generation: Generation,
        reviews: Reviews,
        replays: Replays,
        identify: Identify,
        books: Books,
        clock: Clock,
        unknown: UnknownPolicy,
        backpressure: Backpressure,
        leases: Leases,
        aliases: Aliases,
        similar_prompts: SimilarPrompts | None = None,
        coherence: Coherence,
        signer: SigningTier | None = None,
        url_expires_s: int = 3600,
        renderer: Renderer | None = None,
        hedge: Hedge | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`tiers` are the lower ones, fastest first; the last alone knows what is absent. `identify` keys a request.

        Without a `renderer` no request is answered from another one's picture, and without a `hedge` no tier is read
        beside one that is late.
        """
        self._memory = memory
        self._tiers = tiers
        self._read_tiers = in_turn if hedge is None else hedge.reads
        self._keeper = keeper
        self._generation = generation
        self._reviews = reviews
        self._replays = replays
        self._books = books
        self._clock = clock
        self._signer = signer
        self._url_expires_s = url_expires_s
        self._rng = rng or random.Random()  # noqa: S311 - picks pictures, not secrets
        is_purged = coherence.epochs.hides
        self._flights = Flights(self._load, monotonic_s=clock.monotonic_s, is_purged=is_purged)
        self._another_one = AnotherOne(monotonic_s=clock.monotonic_s)
        self._tasks = OwnedTasks()
        self._resent = Resent(replays=replays, tasks=self._tasks, name=lasting_name)
        self._backpressure = backpressure
        self._leasing = Leasing(leases, clock=clock)
        self._coherence = coherence
        self._epochs = coherence.epochs
        self._paying = Paying(generation=generation, clock=clock, unknown=unknown, backpressure=backpressure)
        self._carrying = Carrying(keeper=keeper, epochs=self._epochs, walk=self._walk)
        self.matching = Matching(
            aliases=aliases,
            prompts=similar_prompts,
            epochs=self._epochs,
            monotonic_s=clock.monotonic_s,
            here=self._here,
            walk=self._walk,
            in_review=reviews.find,
            urge=self._urge_for,
        )
        self._deriving = Deriving(renderer=renderer, keeper=keeper, clock=clock, find=self.find, walk=self._walk)
        self._alone = Alone(
            generation=generation,
            resent=self._resent,
            tasks=self._tasks,
            last_tier=tiers[-1].name if tiers else None,
            find=self.find,
            find_here=self._find_here,
            walk=self._walk,
            entry_for=self._entry_for,
            keep=self._keep_for,
            keep_spare=self._keep_spare,
            tiers_of_similar=self.matching.tiers_of,
        )
        self._failures: TTLCache[tuple[str, str], CacheServerError] = TTLCache(
            _REMEMBERED_FAILURES, ttl=_FAILURES_LAST_S, timer=clock.monotonic_s
        )
        self.still_has = memory.holds
        """Whether memory answers a key with this very entry, which it did before."""
        self._rungs = Rungs(get=self._get_as_asked, generation=generation, identify=identify)
        self.remakes = Remakes(make=self._remake, clock=clock)
        self.renewals = Renewals(books=books, clock=clock)
        self.tending = Tending(keeper=keeper, clock=clock)
        self._purger = Purger(memory=memory, tiers=tiers, keeper=keeper, coherence=coherence)

    @property
    def can_sign_urls(self) -> bool:
        """Whether a tier can hand out URLs."""
        return self._signer is not None

    @property
    def in_flight(self) -> int:
        """How many loads are in progress."""
        return len(self._flights)

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────

    async def get(
        self, request: ImageRequest, identity: Identity, *, namespace: Namespace, caller: Caller, terms: Terms
    ) -> list[Served] | Pending:
        """The pictures asked for, or PENDING once `terms.max_wait_s` has passed.

        A caller that accepts less gets a cheaper picture where a budget or its max_wait does not allow the one asked
        for, labelled degraded. Raises what the caller must hear: NotCachedError, PermissionDeniedError,
        CannotAffordError, UpstreamError and the like. No failing tier makes this fail. A caller that is cancelled
        ends its wait and nothing else.
        """
        ask = Ask(request, identity, namespace, caller, terms)
        try:
            return await self._get_as_asked(ask)
        except (CannotAffordError, TooSlowError) as error:
            if not terms.allow_degraded or not error.rungs:
                raise
            answer = await self._rungs.instead(ask, error)
        except RequestIdSpentError:
            if not terms.allow_degraded:
                raise
            return await self._rungs.again(ask)
        is_plain = terms.cache_policy is CachePolicy.USE_CACHE and terms.variant_policy is VariantPolicy.FIRST
        is_served = namespace.serves(identity.key)  # a remake of what nobody is served would be paid for in vain
        # An edit's input images are not kept until someone has time for them.
        is_remade = namespace.remake_degraded and is_plain and is_served and not request.inputs
        if is_remade and not isinstance(answer, Pending):
            self.remakes.add(ask)
        return answer

    def hit(self, ask: Ask) -> list[Served] | None:
        """What `get` would answer without waiting, at a fraction of its cost: pictures in memory. None: ask `get`."""
        terms, namespace = ask.terms, ask.namespace
        if not terms.wants_stored or terms.n > namespace.max_variants or not namespace.serves(ask.identity.key):
            return None
        waiter = self._waiter(ask.identity.key, tuple(range(terms.n)), namespace, ask.caller, terms)
        waiter.asked = ask.request, ask.identity
        hits = self._in_memory(waiter)
        return None if hits is None else [self._served(loaded, waiter) for loaded in hits]

    def hit_one(self, name: str, digest: bytes) -> CachedImage | None:
        """The picture that `hit` would answer with to a call for the first one of the key with this name and digest.

        None also where `hit` might have one: it was derived, or memory did not admit it. That its namespace serves what
        is stored is for the caller to know.
        """
        entry = self._memory.named(name, digest)
        return None if entry is None or entry.derived_by else entry

    def worth_microusd(self, entry: CachedImage, model: str) -> int:
        """What such a hit saves a call for this model: what the picture would cost now."""
        return self._generation.worth_microusd(entry.image, model)

    def keep_reply(self, entry: CachedImage, reply: Reply) -> CachedImage:
        """Keep in memory how `entry` is told; see `MemoryCache.keep_reply`."""
        return self._memory.keep_reply(entry, reply)

    async def _get_as_asked(self, ask: Ask) -> list[Served] | Pending:
        terms, namespace = ask.terms, ask.namespace
        if terms.n > namespace.max_variants:
            raise InvalidRequestError({"n": f"at most {namespace.max_variants} in namespace {namespace.name}"})
        waiter = self._waiter(ask.identity.key, tuple(range(terms.n)), namespace, ask.caller, terms)
        waiter.asked = ask.request, ask.identity
        waiter.refusal = lacks_inputs(waiter)
        call_id = replay_id(ask.caller, terms)
        if terms.cache_policy is CachePolicy.NO_STORE:
            return self._with_spares(await self._alone.get(waiter, call_id), waiter)
        if terms.cache_policy is not CachePolicy.ONLY_IF_CACHED and not namespace.serves(ask.identity.key):
            waiter.variants = await self._choose(waiter)
            return self._with_spares(await self._alone.get(waiter, call_id, observes=True), waiter)
        if call_id:
            return await self._get(waiter, await self._resent.prepare(waiter, call_id, self._choose))
        waiter.variants = await self._choose(waiter)
        return await self._get(waiter)

    async def _remake(self, ask: Ask) -> None:
        """Make what was answered with less as it was asked for, inside the budget and after everybody else."""
        asked = ask.terms
        terms = Terms(
            n=asked.n, priority=Priority.WARM_UP, tags=asked.tags, ttl_s=asked.ttl_s, match_level=asked.match_level
        )
        await self._get_as_asked(with_fields(ask, terms=terms))

    async def get_by_key(
        self, key: CacheKey, *, namespace: Namespace, caller: Caller, terms: Terms
    ) -> Served | Pending:
        """The picture a key names: stored, or in flight. Never pays.

        Raises KeyGoneError when no tier has it, CacheUnknownError when the last tier cannot say.
        """
        waiter = self._waiter(key, (key.variant,), namespace, caller, terms)
        waiter.refusal = KeyGoneError(_GONE)
        try:
            answer = await self._get(waiter)
        except KeyGoneError:
            if namespace.min_score is not None and await self._reviews.find(key) is not None:
                return Pending((key,), 0.0, in_review=True)
            raise self._failures.get((caller.name, key.name)) or KeyGoneError(_GONE) from None
        return answer if isinstance(answer, Pending) else answer[0]

    async def find(self, keys: Sequence[CacheKey]) -> tuple[list[Found], list[TierName]]:
        """Where each image is, and which tiers could not be asked. One pass per tier; reads no bytes.

        After every few keys others get their turn.
        """
        found: list[Found] = []
        async for some in in_turns(keys, _KEYS_PER_TURN):
            found += map(self._find_here, some)
        silent: list[TierName] = []
        for tier in self._tiers:
            rest = [i for i, item in enumerate(found) if item.tier is None and not item.in_flight]
            if not rest:
                break
            try:
                present = await tier.find([keys[i] for i in rest])
            except TierError:
                silent.append(tier.name)
                continue
            present = await self._not_purged(tier, [keys[i] for i in rest], present)
            there = [i for i, is_present in zip(rest, present, strict=True) if is_present]
            async for some_there in in_turns(there, _KEYS_PER_TURN):
                for i in some_there:
                    found[i] = Found(keys[i], tier.name)
        return found, silent

    async def _not_purged(self, tier: Tier, keys: Sequence[CacheKey], present: list[bool]) -> list[bool]:
        """Which of these are there and not just yet to be reclaimed: their names alone do not tell."""
        if not any(map(self._epochs.has_to_reclaim, {key.partition for key in keys})):
            return present
        there = [i for i, is_present in enumerate(present) if is_present]
        async for some in in_turns(there, _KEYS_PER_TURN):
            labels = await asyncio.gather(*(tier.labels(keys[i]) for i in some), return_exceptions=True)
            for i, label in zip(some, labels, strict=True):
                present[i] = isinstance(label, Labels) and not self._epochs.is_gone(keys[i], label)
        return present

    def estimated_wait_s(self, keys: Sequence[CacheKey]) -> float:
        """How much longer the loads of these keys are expected to take; 0 when none is in flight."""
        return max((self._flight_wait_s(flight) for key in keys for flight in self._flights.of(key)), default=0.0)

    async def signed_url(self, entry: CachedImage) -> tuple[str, float]:
        """A URL that serves this entry's bytes, and when it expires (seconds since 1970).

        Raises NoSignedUrlsError without a signing tier, CacheUnknownError when it cannot be reached.
        """
        if self._signer is None:
            raise NoSignedUrlsError("No tier of this service signs URLs; ask INLINE or use StreamImage.")
        expires_at_s = self._clock.now_s() + self._url_expires_s
        try:
            return await self._signer.signed_url(entry, self._url_expires_s), expires_at_s
        except TierError as error:
            raise CacheUnknownError("Object storage cannot be reached to sign a URL; ask INLINE or retry.") from error

    # ── storing ─────────────────────────────────────────────────────────────────────────────────────────────

    async def put(  # noqa: PLR0913 - an entry's facts
        self,
        image: GeneratedImage,
        identity: Identity,
        *,
        namespace: Namespace,
        replace: bool = False,
        tags: tuple[str, ...] = (),
        ttl_s: float | None = None,
        create_time_s: float | None = None,
        others: Sequence[CacheKey] = (),
        canonical: CacheKey | None = None,
    ) -> tuple[CachedImage, bool]:
        """Store an image the caller already has: as variant 0 with `replace`, else as the next free variant.

        What was only derived from another request's picture makes room for it; what one of `others` has, the identity's
        keys under other versions, does not. It answers for the `canonical` key of its prompt, too.

        Returns the entry and whether it is new: bytes that are there already are not stored again. Raises
        VariantsExhaustedError, JournalFullError where there is no room for it, and CacheUnknownError when the last tier
        cannot say which variants it has.
        """
        if (refusal := self._backpressure.refusal()) is not None:
            raise refusal
        epoch = await (self._coherence.next() if replace else self._coherence.newest())
        entry = self._entry(
            image,
            identity,
            namespace,
            epoch=epoch,
            ttl_s=ttl_s,
            tags=tags,
            create_time_s=create_time_s,
            canonical=canonical,
        )
        if not replace:
            for variant in range(namespace.max_variants):
                walks = [await self._walk(key.with_variant(variant)) for key in (identity.key, *others)]
                found = walks[0].found
                holders = [walk.found.entry for walk in walks if walk.found and not walk.found.entry.derived_by]
                if same := [holder for holder in holders if holder.image.sha256 == image.sha256]:
                    return same[0], False
                if any(walk.is_unknown for walk in walks):
                    raise CacheUnknownError("The last tier cannot say which variants it has; put again later.")
                if not holders:
                    entry = with_fields(entry, key=identity.key.with_variant(variant))
                    replace = found is not None
                    break
            else:
                text = f"All {namespace.max_variants} variants of this request are taken; purge one or replace."
                raise VariantsExhaustedError(text)
        kept = await self._keeper.keep(entry, replace=replace)
        await self.matching.add(kept, canonical)
        return kept, True

    async def purge(  # noqa: PLR0913 - what to remove, by keyword
        self,
        namespace: Namespace,
        *,
        key: CacheKey | None = None,
        identity: Identity | None = None,
        others: Sequence[CacheKey] = (),
        tag: str | None = None,
        dry_run: bool,
    ) -> PurgeResult:
        """Remove (or only count) in every tier what `namespace` stored: all of it, or what the selector names.

        With an identity go its keys under other versions, `others`; with a key those that it was carried on from.
        All of it is gone at once, and its bytes soon: nobody counts them. Raises TierUnreachableError when a tier could
        not be reached, after purging the others.
        """
        # The key itself comes last: what fails before can be found by it again.
        selectors = [PurgeSelector(namespace, each) for each in (await self._purger.origins(key) if key else [])]
        selectors += [PurgeSelector(namespace, identity=other) for other in others]
        selectors.append(PurgeSelector(namespace, key, None if identity is None else identity.key, tag))
        if namespace.min_score is not None:
            selectors += [selector.in_review for selector in selectors]
        return await self._purger.purge(selectors, dry_run=dry_run)

    def reclaim(self) -> None:
        """Begin to remove what is left of purged namespaces, as an earlier life may have begun to."""
        self._purger.reclaim()

    async def aclose(self, grace_s: float) -> None:
        """Let running loads end within `grace_s`, then cancel them.

        What was given is remembered even then: a call sent again after a restart must not pay again.
        """
        until_s = self._clock.monotonic_s() + grace_s
        try:
            await self._purger.aclose()
            await self.remakes.aclose()
            await self.renewals.aclose()
            await self.tending.aclose()
            await self._flights.aclose(grace_s)
        except asyncio.CancelledError:
            until_s = 0.0  # whoever closes us is in a hurry now
            await self._flights.aclose(0)
            raise
        finally:
            left_s = max(until_s - self._clock.monotonic_s(), _REMEMBERING_S)
            await asyncio.gather(self._tasks.aclose(left_s), self.matching.aclose(left_s))

    # ── one wait ────────────────────────────────────────────────────────────────────────────────────────────

    async def _get(self, waiter: Waiter, promise: Promise | None = None) -> list[Served] | Pending:
        """Answer from memory, or wait in the flight that brings what is lacking."""
        flight = promise.flight if promise is not None else None
        if flight is not None:
            flight.join(waiter)
        elif (hits := self._in_memory(waiter) or self._stale_in_memory(waiter)) is not None:
            waiter.answer.set_result(hits)
        else:
            flight = self._flights.board(waiter)
            if promise is not None:
                promise.flight = flight
            self.matching.joined(flight)
        if flight is not None:
            self._paying.judge_late(flight, waiter)
            if waiter in flight.payers:
                for order in flight.orders:
                    self._generation.hasten(order, priority=waiter.terms.priority, deadline_s=waiter.until_s)
        is_held = False
        keys = tuple(waiter.key.with_variant(variant) for variant in waiter.variants)
        try:
            if await self._answered(waiter, flight):
                return self._with_spares(self._serve(waiter), waiter)
            # PENDING is an answer: this caller will come back with the key, so its part in the flight stays.
            is_held = True
            waiter.answer.add_done_callback(partial(self._remember_failure, waiter.caller.name, keys))
            return Pending(keys, max(1.0, self.estimated_wait_s(keys)))
        except InReviewError:
            return Pending(keys, 0.0, in_review=True)
        finally:
            waiter.listens = False
            if flight is not None and not is_held:
                flight.leave(waiter)

    def _remember_failure(self, caller: str, keys: Sequence[CacheKey], answer: asyncio.Future[list[Loaded]]) -> None:
        """Whoever was told PENDING and comes for the picture is told why there is none."""
        error = None if answer.cancelled() else answer.exception()
        if isinstance(error, CacheServerError):
            kept = _without_requests(error)
            for key in keys:
                self._failures[caller, key.name] = kept

    async def _answered(self, waiter: Waiter, flight: Flight | None) -> bool:
        max_wait_s = waiter.terms.max_wait_s
        late_s = late_after_s(waiter.terms)
        if flight is None or waiter.error_from_s is None or late_s is None:
            return await self._answered_within(max_wait_s, waiter)
        if await self._answered_within(late_s, waiter) or flight.answer_late(waiter):
            return True
        return await self._answered_within(None if max_wait_s is None else max_wait_s - late_s, waiter)

    async def _answered_within(self, max_wait_s: float | None, waiter: Waiter) -> bool:
        if waiter.answer.done():
            return True
        if max_wait_s is None:
            await asyncio.wait({waiter.answer})
        elif max_wait_s > 0:
            timer = asyncio.create_task(self._clock.sleep(max_wait_s))
            either: tuple[asyncio.Future[Any], ...] = (waiter.answer, timer)
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                timer.cancel()
        return waiter.answer.done()

    def _in_memory(self, waiter: Waiter) -> list[Loaded] | None:
        hits = []
        for variant in waiter.variants:
            if (entry := self._here(waiter.key.with_variant(variant))) is not None:
                loaded: Loaded | None = Loaded(entry, TierName.MEMORY)
            else:
                loaded = self.matching.in_memory(waiter, variant)
            if loaded is None or not waiter.accepts(loaded):
                return None
            hits.append(loaded)
        waiter.first = True
        return hits

    def _stale_in_memory(self, waiter: Waiter) -> list[Loaded] | None:
        """All that memory has for it, some past its end, if that will do; whoever goes to the tiers is asked again."""
        if waiter.stale_from_s is None:
            return None
        found = []
        for key in map(waiter.key.with_variant, waiter.variants):
            if (entry := self._here(key)) is not None:
                loaded = Loaded(entry, TierName.MEMORY)
            elif (entry := self._memory.stale(key, waiter.namespace.stale_while_revalidate_s)) is not None:
                loaded = Loaded(entry, TierName.MEMORY, stale=Stale.RENEWED)
            else:
                return None
            if not waiter.accepts(loaded):
                return None
            found.append(loaded)
        waiter.first = True
        return found

    def _serve(self, waiter: Waiter) -> list[Served]:
        answer = waiter.answer.result()
        if waiter.error_from_s is not None:
            self._see_to_stale(waiter, answer)
        return [self._served(loaded, waiter) for loaded in answer]

    def _see_to_stale(self, waiter: Waiter, answer: Sequence[Loaded]) -> None:
        """Count what is answered in place of an error; what else is stale is renewed, if the caller may pay."""
        variants = tuple(v for v, loaded in zip(waiter.variants, answer, strict=True) if loaded.stale)
        if not variants:
            return
        if any(loaded.stale is Stale.AFTER_ERROR for loaded in answer):
            self._books.stale_after_error(waiter.namespace.name)
            return
        is_read_only = waiter.terms.cache_policy is CachePolicy.ONLY_IF_CACHED or waiter.refusal is not None
        if waiter.asked is None or is_read_only or may_generate(waiter) is not None:
            return
        renew = partial(self._renew, waiter, variants)
        self.renewals.begin(waiter.key.identity_name, renew, namespace=waiter.namespace.name)

    async def _renew(self, served: Waiter, variants: tuple[int, ...]) -> bool:
        """Have made anew what was served stale, inside the budget and after everybody else; whether it was made."""
        asked = served.terms
        terms = Terms(
            n=len(variants),
            priority=Priority.WARM_UP,
            tags=asked.tags,
            ttl_s=asked.ttl_s,
            match_level=asked.match_level,
        )
        waiter = self._waiter(served.key, variants, served.namespace, served.caller, terms)
        waiter.asked, waiter.renews = served.asked, True
        answer = await self._get(waiter)
        return not isinstance(answer, Pending) and any(each.tier is TierName.UPSTREAM for each in answer)

    def _here(self, key: CacheKey) -> CachedImage | None:
        return self._memory.get(key) or self._keeper.held(key)

    def _is_here(self, key: CacheKey) -> bool:
        return self._memory.contains(key) or self._keeper.is_held(key)

    def _find_here(self, key: CacheKey) -> Found:
        if self._is_here(key):
            is_in_journal = not self._memory.contains(key) and self._keeper.held(key) is None
            return Found(key, TierName.JOURNAL if is_in_journal else TierName.MEMORY)
        in_flight = any(key.variant in flight.brings for flight in self._flights.of(key))
        return Found(key, in_flight=in_flight or self._alone.is_making(key))

    def _waiter(
        self, key: CacheKey, variants: tuple[int, ...], namespace: Namespace, caller: Caller, terms: Terms
    ) -> Waiter:
        not_before_s = None if terms.max_age_s is None else self._clock.now_s() - terms.max_age_s
        refresh = terms.cache_policy is CachePolicy.REFRESH
        until_s = None if terms.deadline_s is None else self._clock.monotonic_s() + terms.deadline_s
        waiter = Waiter(
            key,
            variants,
            namespace,
            caller,
            terms,
            not_before_s=not_before_s,
            until_s=until_s,
            refresh=refresh,
            epoch=self._epochs.newest,
        )
        if (namespace.stale_while_revalidate_s or namespace.stale_if_error_s) and takes_stale(terms):
            now_s = self._clock.now_s()
            waiter.stale_from_s = now_s - namespace.stale_while_revalidate_s
            waiter.error_from_s = now_s - namespace.stale_if_error_s
        return waiter

    def _served(self, loaded: Loaded, waiter: Waiter) -> Served:
        pays = loaded.payer is waiter.ticket
        if loaded.payer is None and not loaded.stale:
            self.tending.hit(loaded.entry)
        return Served(
            entry=loaded.entry,
            tier=loaded.tier,
            matched=_matched(loaded, waiter),
            collapsed=not pays if loaded.payer is not None else not waiter.first,
            cost_microusd=loaded.entry.image.paid_microusd if pays else 0,
            saved_microusd=0 if pays else self._saved_microusd(loaded.entry, waiter),
            derived=loaded.derived,
            stale=loaded.stale,
        )

    def _saved_microusd(self, entry: CachedImage, waiter: Waiter) -> int:
        """What the picture would cost now; of a derived one, what was asked for and not what that was made from."""
        if not entry.derived_by:
            return self._generation.worth_microusd(entry.image, _model_asked(waiter))
        if waiter.asked is None:
            return 0  # its key does not say what it asks for
        worth = self._generation.worth_microusd(as_asked(entry, waiter.request), waiter.request.model)
        return worth or self._generation.cheapest_microusd(waiter.request, 1)

    @staticmethod
    def _with_spares(answer: list[Served], waiter: Waiter) -> list[Served]:
        """The answer, with what further candidates cost booked on its first picture: this caller had them made."""
        first, *others = answer
        return [with_fields(first, cost_microusd=first.cost_microusd + waiter.spare_microusd), *others]

    def _flight_wait_s(self, flight: Flight) -> float:
        models = (waiter.asked[0].model for waiter in flight.waiters if waiter.asked is not None)
        return self._generation.estimated_wait_s(next(models, self._generation.default_model), flight.started_s)

    # ── one load ────────────────────────────────────────────────────────────────────────────────────────────

    async def _load(self, flight: Flight) -> None:
        look = _Look()
        looked_s = self._clock.monotonic_s()
        await self._look(flight, look)
        try:
            if (lead := self._paying.judge(flight, look.unknown)) is None:
                return
            self._paying.settle(flight)  # nothing is set aside for as long as another replica may take
            flight.missed = frozenset(look.walked)
            async with self.matching.turn(flight, lead):
                self._land_here(flight)  # it may have been put meanwhile
                if flight.waiters:
                    await self._load_leased(flight, lead, look, looked_s)
        finally:
            self._paying.settle(flight)

    async def _load_leased(self, flight: Flight, lead: Waiter, look: _Look, looked_s: float) -> None:
        """Have made what no other replica has made meanwhile. The tiers were looked into at `looked_s` (monotonic)."""
        names = [lasting_name(lead)]
        if lead.similarity >= MatchLevel.CANONICAL and lead.canonical_key is not None:
            names.insert(0, lead.canonical_key.identity_name)
        leases = await self._leasing.take(names, looked_s=looked_s, priority=lambda: flight.priority)
        for lease in leases:
            lease.urge = partial(self._urge, flight)
        try:
            if any(lease.look_again for lease in leases):
                look = _Look()
                flight.likened.clear()
            flight.succeeds = any(lease.succeeds for lease in leases)
            await self._look(flight, look)  # also for who came meanwhile
            await self._pay(flight, look.unknown)
        finally:
            made = [flight.key.with_variant(variant) for variant in {*flight.making, *flight.loaded}]
            self._leasing.let_go(leases, after=partial(self._shared, made, flight.telling))

    async def _shared(self, made: Sequence[CacheKey], telling: Sequence[asyncio.Task[None]]) -> None:
        """Wait until other replicas find what was just made, in whatever words they are asked for it."""
        if telling:
            await asyncio.wait(telling)
        await self._keeper.shared(made)

    def _land_here(self, flight: Flight) -> None:
        """Land what memory has of what a flight lacks."""
        for variant in flight.looked_for:
            entry = self._here(flight.key.with_variant(variant))
            if entry is not None and flight.suits(variant, loaded := Loaded(entry, TierName.MEMORY)):
                flight.land(variant, loaded)

    def _urge_for(self, paying: Flight, waiting: Flight) -> None:
        self._urge(paying, waiting.priority)

    def _urge(self, flight: Flight, priority: Priority) -> None:
        flight.urged = max(flight.urged, priority)
        for order in flight.orders:
            self._generation.hasten(order, priority=priority, deadline_s=None)

    async def _look(self, flight: Flight, look: _Look) -> None:
        """Land what the tiers have of what the flight lacks, as far as it was not looked for; tell who has to wait."""
        while (todo := [v for v in flight.looked_for if v not in look.walked]) or self.matching.is_due(flight):
            if not todo:
                look.in_review |= await self.matching.land(flight, flight.looked_for)
                continue
            look.walked.update(todo)
            for variant, (found, is_unknown) in zip(todo, await self._walk_for(flight, todo), strict=True):
                if is_unknown:
                    look.unknown.add(variant)
                if found is not None:
                    self.matching.saw(flight, found)
                    flight.land(variant, found)
            flight.land_stale()
            if not flight.waiters:
                return  # a tier had what they want: all that follows is about who still waits
            look.unknown |= await self._carrying.land(flight, [v for v in todo if v not in flight.loaded])
            if not flight.waiters:
                return
            look.in_review |= await self.matching.land(flight, [v for v in todo if v not in flight.loaded])
            if not flight.waiters:
                return
            look.in_review |= await self._waiting_for_review(flight, todo)
            await self._deriving.land(flight, [v for v in todo if v not in look.in_review])
        _leave_to_review(flight, look.in_review)

    async def _pay(self, flight: Flight, unknown: set[int]) -> None:
        """Have made what is still lacking. From the last look until the flight is sealed nothing awaits."""
        while self._paying.judge(flight, unknown) is not None:
            flight.seal(flight.lacking)
            parts = self._paying.parts(flight)
            if len(parts) == 1:
                await self._make_part(flight, *parts[0], unknown)
                continue
            # A call that fails does not cancel its sisters: they are being paid for.
            making = (self._make_part(flight, lead, variants, unknown) for lead, variants in parts)
            outcomes = await asyncio.gather(*making, return_exceptions=True)
            if failure := next((each for each in outcomes if each is not None), None):
                raise failure

    async def _make_part(self, flight: Flight, lead: Waiter, making: list[int], unknown: set[int]) -> None:
        try:
            await self._generate(flight, lead, making, unknown)
        except CannotAffordError as error:
            self._paying.refuse_broke(flight, lead, error)

    async def _waiting_for_review(self, flight: Flight, variants: list[int]) -> set[int]:
        """Those of `variants` that are made and wait for approval: another picture would be paid for in vain."""
        if all(waiter.namespace.min_score is None for waiter in flight.asking):
            return set()
        lacking = [variant for variant in variants if variant in flight.lacking]
        others = {key for waiter in flight.asking for key in other_keys(waiter)}
        slots = [key.with_variant(v) for v in lacking for key in (flight.key, *others)]
        found = await asyncio.gather(*map(self._reviews.find, slots))
        return {slot.variant for slot, entry in zip(slots, found, strict=True) if entry is not None}

    async def _walk_for(self, flight: Flight, variants: Sequence[int]) -> Sequence[_Walked]:
        """What the tiers have of these variants, all looked for at a time."""
        for key in map(flight.key.with_variant, variants) if flight.stale_s else ():
            if (expired := self._memory.stale(key, flight.stale_s)) is not None:
                flight.find_stale(key.variant, Loaded(expired, TierName.MEMORY, stale=Stale.RENEWED))
        walks = [self._walk(flight.key.with_variant(v), partial(flight.suits, v), flight) for v in variants]
        return [await walks[0]] if len(walks) == 1 else await asyncio.gather(*walks)  # most are alone: a task less

    async def _walk(
        self, key: CacheKey, suits: Callable[[Loaded], bool] = lambda _: True, flight: Flight | None = None
    ) -> _Walked:
        """Ask memory and the lower tiers, fastest first, then the stand-in slot; promote what is found.

        An entry that does not suit is passed over, since a slower tier may have its successor. The `flight` is told of
        those that expired. Raises EntryNewerError where there is none that suits but one that only a newer release can
        read.
        """
        changes = self._keeper.changes
        entry = self._here(key)
        passed_over = None if entry is None else Loaded(entry, TierName.MEMORY)
        if passed_over is None and self._keeper.is_held(key):
            passed_over = await self._read_held(key, changes)
        if passed_over is not None and suits(passed_over):
            return _Walked(passed_over)
        missed: list[Tier] = []
        is_unknown = is_newer = False
        read = partial(self._read, key=key, flight=flight)
        async with aclosing(self._read_tiers(self._tiers, read)) as answers:
            async for tier, outcome in answers:
                if outcome is None or isinstance(outcome, CorruptEntryError):
                    missed.append(tier)
                elif isinstance(outcome, TierError):
                    is_newer = is_newer or isinstance(outcome, NewerEntryError)
                    is_unknown = is_unknown or tier is self._tiers[-1]
                elif suits(found := Loaded(outcome, tier.name)):
                    self._keeper.promote(key, outcome, missed, changes=changes)
                    return _Walked(found)
                else:
                    passed_over = passed_over or found
        stand_in = await self._find_stand_in(key, changes)
        if is_newer and (stand_in is None or not suits(stand_in)):
            raise EntryNewerError("It is stored as only a newer release can read it; ask again, or another replica.")
        if passed_over is not None:
            return _Walked(stand_in if stand_in is not None and suits(stand_in) else passed_over)
        if stand_in is not None and not is_unknown and self._keeper.is_current(changes):
            # The last tier has no such variant after all: the stand-in takes the place it stood in for.
            stand_in = Loaded(await self._keeper.keep(stand_in.entry), stand_in.tier)
        return _Walked(stand_in, is_unknown)

    async def _find_stand_in(self, key: CacheKey, changes: int) -> Loaded | None:
        slot = key.stand_in
        if (entry := self._here(slot)) is not None:
            return Loaded(entry, TierName.MEMORY)
        if self._keeper.is_held(slot) and (held := await self._read_held(slot, changes)) is not None:
            return held
        for tier in self._tiers[:-1]:
            try:
                entry = await self._read(tier, slot)
            except TierError:
                continue  # a makeshift copy: the tier that cannot say costs at most a second picture
            if entry is not None:
                self._keeper.promote(slot, entry, (), changes=changes)
                return Loaded(entry, tier.name)
        return None

    async def _read_held(self, key: CacheKey, changes: int) -> Loaded | None:
        """What the last tier has yet to take, which the journal alone may have."""
        if (entry := await self._keeper.read_held(key)) is None:
            return None
        self._keeper.promote(key, entry, (), changes=changes)
        return Loaded(entry, TierName.JOURNAL)

    async def _read(self, tier: Tier, key: CacheKey, flight: Flight | None = None) -> CachedImage | None:
        """What the tier has that is fresh. What expired goes into memory, if it is of use to the flight."""
        if self._epochs.hides_all:
            raise TierError("nobody can say what was purged")
        if self._keeper.is_outdated(tier, key):
            return None
        if flight is None or not flight.stale_s:
            return await tier.get(key)
        changes = self._keeper.changes
        entry = await tier.get(key, stale_s=flight.stale_s)
        if entry is None or entry.is_fresh(self._clock.now_s()):
            return entry
        flight.find_stale(key.variant, Loaded(entry, tier.name, stale=Stale.RENEWED))
        if self._here(key) is None:
            self._keeper.promote(key, entry, (), changes=changes)
        return None

    async def _generate(self, flight: Flight, lead: Waiter, making: list[int], unknown: set[int]) -> None:
        while making:
            safe = asyncio.Event()
            try:
                with self._backpressure.making(len(making)):
                    made = await self._make(flight, lead, making, unknown, safe)
            finally:
                safe.set()  # also if nothing came of it
            making = making[made:]

    async def _make(
        self, flight: Flight, lead: Waiter, making: list[int], unknown: set[int], safe: asyncio.Event
    ) -> int:
        """Have the first of these variants made, as many as come; how many. All is kept on return, and so `safe`."""
        await self._backpressure.slow_down()
        _ = lead.canonical_key  # found out before money is spent: nothing may go wrong between that and keeping
        # What is paid for from here on no purge until now was about. What takes another's place is above that, and so
        # is what a replica that was only slow must not take the place of.
        replaces = any(waiter.refresh for waiter in flight.waiters) or any(map(flight.has_own, making))
        lead.epoch = await (self._coherence.next() if replaces or flight.succeeds else self._coherence.newest())
        order = lead.order(
            len(making),
            priority=flight.priority,
            deadline_s=flight.until_s,
            partial_images=flight.partial_images,
        )
        flight.orders.append(order)
        spares: list[Awaitable[CachedImage]] = []

        def keep_spare(image: GeneratedImage) -> None:
            spares.append(self._keep_spare(lead, max(making) + 1, image))

        try:
            images = await self._generation.generate(
                order,
                making,
                on_spending=flight.begin_spending,
                on_spare=keep_spare,
                on_partial=flight.hear if order.partial_images else None,
                safe=safe,
            )
        except UpstreamError as error:
            if error.cost_microusd != 0:  # where nobody knows it may be billed
                flight.paid_unknown += order.candidates * len(unknown.intersection(making))
            raise
        # From here until the keeper holds them nothing awaits: what was paid for cannot be lost on the way.
        made = making[: len(images)]
        flight.paid_unknown += order.candidates * len(unknown.intersection(made))
        payers = [who_bears(flight, variant, lead) for variant in made]
        entries = [self._entry_for(lead, image, variant) for variant, image in zip(made, images, strict=True)]
        keeping = [self._keep(entry, flight, unknown) for entry in entries]
        kept = await asyncio.gather(*keeping, return_exceptions=True)
        await asyncio.gather(*spares, return_exceptions=True)
        # From here on nothing awaits either: who joins what is made already is never told of it.
        for variant, entry, payer in zip(made, kept, payers, strict=True):
            self._land(flight, variant, entry, payer)
        stored = [entry for entry in kept if isinstance(entry, CachedImage)]
        self.matching.made(flight, lead, stored)
        flight.telling += self.matching.remember(lead, stored[0] if stored else entries[0])
        return len(made)

    def _land(self, flight: Flight, variant: int, kept: CachedImage | BaseException, payer: Waiter) -> None:
        """Tell the flight's waiters what became of a picture made for them."""
        if isinstance(kept, InReviewError):
            for waiter in [each for each in flight.waiters if variant in each.lacks(flight.loaded)]:
                flight.refuse(waiter, kept)
        elif isinstance(kept, BaseException):
            raise kept
        else:
            flight.land(variant, Loaded(kept, TierName.UPSTREAM, payer=payer.ticket))

    def _keep_spare(self, lead: Waiter, variant: int, image: GeneratedImage) -> Awaitable[CachedImage]:
        """Keep a picture that was paid for beyond those asked for: as a further variant, if it is good enough."""
        lead.spare_microusd += image.paid_microusd
        entry = self._entry_for(lead, image, variant)
        return self._reviews.hold(entry) if _is_doubtful(image, lead) else self._keeper.keep(entry)

    def _entry_for(self, lead: Waiter, image: GeneratedImage, variant: int) -> CachedImage:
        terms = lead.terms
        facts: dict[str, Any] = {"epoch": lead.epoch, "ttl_s": terms.ttl_s, "tags": terms.tags}
        return self._entry(image, lead.identity, lead.namespace, variant=variant, canonical=lead.canonical_key, **facts)

    def _keep(self, entry: CachedImage, flight: Flight, unknown: set[int]) -> Awaitable[CachedImage]:
        variant = entry.key.variant
        is_refreshed = any(waiter.refresh and variant in waiter.variants for waiter in flight.waiters)
        is_unknown = variant in unknown and not is_refreshed
        if is_unknown:
            self._books.paid_unknown()
        if any(_is_doubtful(entry.image, waiter) for waiter in flight.payers):
            return _once_kept_in_review(self._reviews.hold(entry))
        if is_unknown:
            return self._keeper.keep_stand_in(entry)
        return self._keeper.keep(entry, replace=is_refreshed or flight.has_own(variant))

    def _entry(  # noqa: PLR0913 - an entry's facts
        self,
        image: GeneratedImage,
        identity: Identity,
        namespace: Namespace,
        *,
        epoch: int,
        variant: int = 0,
        ttl_s: float | None,
        tags: tuple[str, ...],
        create_time_s: float | None = None,
        canonical: CacheKey | None = None,
    ) -> CachedImage:
        now_s = self._clock.now_s()
        lifetime_s = namespace.lifetime_s(ttl_s)
        return CachedImage(
            key=identity.key.with_variant(variant),
            image=image,
            namespace=namespace.name,
            prompt_digest=identity.prompt_digest,
            create_time_s=now_s if create_time_s is None else create_time_s,
            expire_time_s=None if lifetime_s is None else now_s + lifetime_s,
            tags=tags,
            epoch=epoch,
            sliding_s=lifetime_s if namespace.is_sliding and lifetime_s is not None else 0.0,
            canonical_digest=b"" if canonical is None else canonical.digest,
        )

    # ── which variants, and calls sent twice ────────────────────────────────────────────────────────────────

    async def _choose(self, waiter: Waiter) -> tuple[int, ...]:
        if waiter.terms.variant_policy is VariantPolicy.FIRST or waiter.refresh:
            return waiter.variants
        limit, n = waiter.namespace.max_variants, waiter.terms.n
        own = [waiter.key, *other_keys(waiter)]
        keys = [key.with_variant(variant) for key in own for variant in range(limit)]
        found, _ = await self.find(keys)
        stored = {item.key.variant for item in found if item.tier is not None}
        stored |= {key.variant for key in keys if self._is_here(key.stand_in)}
        # Read again after the await: what took off meanwhile counts as stored, or two calls would make one picture.
        stored |= {variant for flight in self._flights.of(waiter.key) for variant in flight.brings}
        if waiter.terms.variant_policy is VariantPolicy.RANDOM:
            return random_ones(stored, n, self._rng)
        names = {"caller": waiter.caller.name, "identity_name": lasting_name(waiter)}
        if waiter.terms.variant_policy is VariantPolicy.STICKY:
            return sticky_ones(stored, n, **names)
        excluded = [CacheKey.parse(name) for name in waiter.terms.exclude_keys]
        ours = {key.variant for key in excluded if key.identity_name in {each.identity_name for each in own}}
        return self._another_one.choose(**names, stored=stored, excluded=ours, n=n, max_variants=limit)

    # ── for one caller alone ────────────────────────────────────────────────────────────────────────────────

    def _keep_for(self, lead: Waiter, entry: CachedImage, replace: bool) -> Awaitable[CachedImage]:  # noqa: FBT001 - as it is lent
        """Store what was made for `lead` alone; one that is too doubtful to be shared waits for review."""
        self.matching.remember(lead, entry)
        if _is_doubtful(entry.image, lead):
            return _as_made(self._reviews.hold(entry), entry)
        return self._keeper.keep(entry, replace=replace)


def _is_doubtful(image: GeneratedImage, waiter: Waiter) -> bool:
    """Whether a candidate scored too low for the waiter's namespace to be shared unseen, or was never scored."""
    least = waiter.namespace.min_score
    if least is None or waiter.terms.candidates == 1:
        return False
    return image.score is None or image.score < least


async def _as_made(held: Awaitable[CachedImage], entry: CachedImage) -> CachedImage:
    """`entry` once it is kept in review: its caller is answered with it all the same."""
    await held
    return entry


async def _once_kept_in_review(kept: Awaitable[CachedImage]) -> CachedImage:
    """Wait until a picture is kept that nobody may have yet; always raises InReviewError."""
    await kept
    raise InReviewError("It waits for review.")


def _leave_to_review(flight: Flight, in_review: set[int]) -> None:
    """Tell those who lack a picture that waits for review so, but for who wants a new one."""
    for waiter in flight.asking:
        if not waiter.refresh and not in_review.isdisjoint(waiter.lacks(flight.loaded)):
            flight.refuse(waiter, InReviewError("It waits for review."))


def _without_requests(error: CacheServerError) -> CacheServerError:
    """The same error to be kept: its frames and its rungs hold requests, and those their input images."""
    kept = type(error).__new__(type(error), *error.args)
    kept.__dict__.update(error.__dict__)
    if isinstance(kept, CannotAffordError | TooSlowError):
        kept.rungs = ()
    return kept


@dataclass(slots=True)
class _Look:
    """What a load has looked for in the tiers, by variant: which nobody could speak of, and which wait for review."""

    walked: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    in_review: set[int] = field(default_factory=set)


class _Walked(NamedTuple):
    """What the tiers have under a key; `is_unknown` if no intact entry of it, and the last could not say."""

    found: Loaded | None
    is_unknown: bool = False


def _model_asked(waiter: Waiter) -> str:
    return waiter.asked[0].model if waiter.asked is not None else ""


def _matched(loaded: Loaded, waiter: Waiter) -> MatchLevel:
    if loaded.matched is not None:
        return loaded.matched
    if waiter.asked is None or loaded.entry.prompt_digest == waiter.asked[1].prompt_digest:
        return MatchLevel.EXACT
    return waiter.asked[1].level
