"""Asking for pictures, whatever transport the call came by: screen, identify, ask the cache, book. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Protocol, TypeVar
from weakref import ref

from cacheserver.cache import PromptCache
from cacheserver.calls.again import HitAgain, Seen, Template
from cacheserver.calls.asked import Asked
from cacheserver.calls.call import Call
from cacheserver.calls.recorded import kind_of_failure, kinds_of_answer
from cacheserver.calls.sampling import Sampler
from cacheserver.errors import (
    CacheServerError,
    InvalidRequestError,
    KeyGoneError,
    NotCachedError,
    PermissionDeniedError,
    PiiFoundError,
    PromptDeniedError,
    PromptRefusedError,
    UpstreamInvalidError,
)
from cacheserver.figures import HitRow, Key
from cacheserver.identity import Identifier, Named, identify
from cacheserver.interfaces import Books, Clock, Prompts
from cacheserver.model import (
    Ask,
    CachedImage,
    CacheKey,
    Caller,
    Identity,
    ImageRequest,
    MatchLevel,
    Namespace,
    Outcome,
    Pending,
    Permission,
    Served,
    TierName,
)
from cacheserver.precheck import PromptPolicy
from cacheserver.recall import ToldImages

DEFAULT_NAMESPACE = "default"

_SAME_PRICE_S = 60.0
"""How long what a hit saved is told again: prices change."""


A = TypeVar("A", bound=Asked)


class Trace(Protocol):
    """Notes what is answered."""

    def answered(
        self,
        served: Served,
        outcome: Outcome,
        what: ImageRequest | CacheKey,
        *,
        namespace: Namespace,
        match_level: MatchLevel | None,
    ) -> None:
        """A picture was answered to a call for `what`. Never waits and never fails."""
        ...


class Asking:
    """Answers what calls ask for, within their callers' rights and their namespaces' policies."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        cache: PromptCache,
        namespaces: Iterable[Namespace],
        default_model: str,
        books: Books,
        clock: Clock,
        policies: Mapping[str, PromptPolicy] = MappingProxyType({}),
        prompts: Prompts | None = None,
        trace: Trace | None = None,
        sampler: Sampler | None = None,
        gone: tuple[type[Exception], ...] = (),
    ) -> None:
        """`default_model` is that of namespaces that have none of their own; `policies` are by namespace.

        `prompts` is where those of namespaces with store_prompts are recorded. `trace` is None where nothing is,
        `sampler` where no similar hits are kept.
        `gone` is what a transport raises where a caller no longer waits.
        """
        self._cache = cache
        self._default_model = default_model
        self._books = books
        self._clock = clock
        self._policies = policies
        self.replace(namespaces)
        self._prompts = prompts
        self._trace = trace
        self._sampler = sampler
        self._gone = gone
        self._template_numbers = count()

    def replace(self, namespaces: Iterable[Namespace]) -> None:
        """From now on these are the namespaces. Whoever has calls that are known has to be a new `Caller`."""
        self._namespaces = {
            namespace.name: replace(namespace, default_model=namespace.default_model or self._default_model)
            for namespace in namespaces
        }

    def namespace(self, name: str, permission: Permission, call: Call, prefix: str = "") -> Namespace:
        """The namespace a call names. Rights come first, so that nobody learns which others exist.

        Raises:
            PermissionDeniedError: the caller may not do this there.
            InvalidRequestError: there is none of this name.
        """
        name = name or DEFAULT_NAMESPACE
        if not call.caller.may(permission, name):
            raise PermissionDeniedError(f"This caller may not {permission} in this namespace.")
        namespace = self._namespaces.get(name)
        if namespace is None:
            raise InvalidRequestError({f"{prefix}namespace": "is not a namespace of this service"})
        call.namespace = namespace.name
        return namespace

    async def screened(self, asked: A) -> A:
        """The call with the prompt that its namespace lets pass. Raises PromptDeniedError or PiiFoundError."""
        if isinstance(asked.what, CacheKey):
            return asked
        return replace(asked, what=await self.passed(asked.what, asked.namespace))

    async def passed(self, request: ImageRequest, namespace: Namespace) -> ImageRequest:
        """The request with the prompt that its namespace lets pass. Raises PromptDeniedError or PiiFoundError."""
        policy = self._policies.get(namespace.name)
        if policy is None:
            return request
        try:
            prompt = policy.screened(request.prompt)
            if prompt is None:
                prompt = await policy.screen(request.prompt)
        except (PromptDeniedError, PiiFoundError) as error:
            self._books.refused(namespace.name, error.reason)
            raise
        return replace(request, prompt=prompt)

    def redacted(self, request: ImageRequest, namespace: Namespace) -> ImageRequest:
        """The request as it is keyed, for calls that look and never make: nothing is refused."""
        policy = self._policies.get(namespace.name)
        return request if policy is None else replace(request, prompt=policy.redacted(request.prompt))

    def hit(self, asked: Asked, call: Call, identity: Identity | None = None) -> list[Served] | None:
        """What the cache answers to a call without waiting: pictures in memory. None: screen it, and ask for an answer.

        `identity` is that of the request, if it is known. A namespace that screens or records prompts answers none so.
        """
        namespace = asked.namespace
        if isinstance(asked.what, CacheKey) or self._screens(namespace):
            return None
        wanted = call.wanted = identity or identify(asked.what, namespace, asked.match_level)
        call.answer = self._cache.hit(Ask(asked.what, wanted, namespace, call.caller, asked.terms))
        return call.answer

    def again(self, served: Served, entry: CachedImage, asked: Asked, call: Call) -> HitAgain | None:
        """What it takes to answer such a call with that picture again; None: the next one is to be asked as any other.

        `entry` is what memory has of it. It was asked for as one picture.
        """
        is_passed = isinstance(asked.what, CacheKey) or not self._screens(asked.namespace)
        # A call that has a picture made is answered from memory where it is sent twice, and only then.
        is_lasting = asked.terms.wants_stored and asked.terms.max_age_s is None
        if not (is_passed and is_lasting and served.is_plain_hit):
            return None
        model, quality = asked.model_and_quality
        return HitAgain(
            caller=call.caller,
            namespace=asked.namespace,
            what=None if self._trace is None else _kept(asked.what),
            match_level=asked.match_level,
            identity=call.wanted,
            name=entry.key.name,
            entry=ref(entry),
            matched=served.matched,
            saved_microusd=served.saved_microusd,
            until_s=self._clock.monotonic_s() + _SAME_PRICE_S,
            row=_row(call.caller, asked.namespace, model or entry.image.model, quality or entry.image.quality),
            told=ToldImages.of((served,)),
        )

    def template(self, asked: Asked, call: Call) -> Template | None:
        """What a call has in common with others that ask for one picture; None where each is to be asked as any."""
        what, terms, namespace = asked.what, asked.terms, asked.namespace
        is_plain = terms.n == 1 and terms.wants_stored and terms.max_age_s is None
        is_served = namespace.serves_all and not self._screens(namespace)
        if isinstance(what, CacheKey) or what.inputs or not is_served or not is_plain:
            return None
        request = replace(what, prompt="")
        return Template(
            number=next(self._template_numbers),
            caller=call.caller,
            asked=replace(asked, what=request, terms=replace(terms, request_id="", tags=(), deadline_s=None)),
            request=request,
            identifier=Identifier(what, namespace, asked.match_level),
            row=_row(call.caller, namespace, what.model, what.quality),
        )

    def of_template(self, template: Template, prompt: str, named: Named, entry: CachedImage) -> HitAgain:
        """What `again` says of a call of this template for a valid prompt, so named, that memory has `entry` for."""
        identity = template.identifier.identity_of(prompt, named)
        saved_microusd = self._cache.worth_microusd(entry, template.request.model)
        matched = MatchLevel.EXACT if entry.prompt_digest == identity.prompt_digest else identity.level
        return HitAgain(
            caller=template.caller,
            namespace=template.asked.namespace,
            what=None if self._trace is None else replace(template.request, prompt=prompt),
            match_level=template.asked.match_level,
            identity=identity,
            name=named[0],
            entry=ref(entry),
            matched=matched,
            saved_microusd=saved_microusd,
            until_s=self._clock.monotonic_s() + _SAME_PRICE_S,
            row=template.row,
            told=ToldImages.of_hit(entry, matched, saved_microusd),
        )

    def of_seen(self, seen: Seen, call: Call) -> Asked:
        """What such a call asks for, as if it had been read, let pass and identified."""
        asked, request = seen.template.asked, seen.template.request
        call.namespace, call.model, call.quality = asked.namespace.name, request.model, request.quality
        call.wanted = seen.template.identifier.identity_of(seen.prompt, seen.named)
        terms = replace(asked.terms, request_id=seen.request_id, deadline_s=call.deadline_s)
        return replace(asked, what=replace(request, prompt=seen.prompt), terms=terms)

    def _screens(self, namespace: Namespace) -> bool:
        """Whether its prompts are screened or recorded: none of its calls is answered without that."""
        return namespace.store_prompts or namespace.name in self._policies

    def holds_still(self, again: HitAgain, entry: CachedImage, caller: Caller, started_s: float) -> bool:
        """Whether a call that began then is answered what `again` was, which had `entry`.

        It finds out what `namespace` and `hit` do, at a fraction of their cost.
        """
        return caller is again.caller and started_s <= again.until_s and self._cache.still_has(again.name, entry)

    def book_again(self, again: HitAgain, entry: CachedImage, started_s: float) -> None:
        """Book that a call which began then is answered what `again` was, as `book` does at a multiple of the cost."""
        if self._trace is not None and again.what is not None:
            self._trace.answered(
                again.served(entry),
                Outcome.HIT,
                again.what,
                namespace=again.namespace,
                match_level=again.match_level,
            )
        seconds = self._clock.monotonic_s() - started_s
        self._books.hit_again(again.row, seconds, entry.size_bytes, again.saved_microusd)

    def tend(self, entry: CachedImage) -> None:
        """An entry is told again: see to it that it stays. To be called now and then, a hit in a second or so."""
        self._cache.tending.hit(entry)

    async def answer(self, asked: Asked, call: Call) -> list[Served] | Pending:
        """What the cache answers to a screened call."""
        if isinstance(asked.what, CacheKey):
            served = await self._cache.get_by_key(
                asked.what, namespace=asked.namespace, caller=call.caller, terms=asked.terms
            )
            answer = served if isinstance(served, Pending) else [served]
        else:
            answer = await self._answer_request(asked.what, asked, call)
        call.answer = answer
        if isinstance(answer, Pending):
            for _ in answer.keys:
                self._book_without_picture(call, Outcome.PENDING)
        return answer

    async def _answer_request(self, request: ImageRequest, asked: Asked, call: Call) -> list[Served] | Pending:
        identity = call.wanted = call.wanted or identify(request, asked.namespace, asked.match_level)
        asking = self._cache.get(request, identity, namespace=asked.namespace, caller=call.caller, terms=asked.terms)
        # An edit cannot be made again of its prompt alone.
        if self._prompts is None or not asked.namespace.store_prompts or request.inputs:
            return await asking
        record = partial(
            self._prompts.record, request=request, namespace=asked.namespace.name, identity=identity, n=asked.terms.n
        )
        try:
            answer = await asking
        except CacheServerError as error:
            if (kind := kind_of_failure(error)) is not None:
                record(kind)
            raise
        if not isinstance(answer, Pending):
            for kind in kinds_of_answer(answer, asked.terms, self._clock.now_s()):
                record(kind)
        return answer

    async def forget_prompts(self, namespace: Namespace, key: CacheKey | None) -> None:
        """What was asked for is not to outlive its pictures: those of the key's identity, or with None of all."""
        if not namespace.store_prompts:
            return
        if self._prompts is not None:
            await self._prompts.forget(namespace.name, key)
        if self._sampler is not None:
            await self._sampler.forget(namespace.name, key)

    # ── booking ─────────────────────────────────────────────────────────────────────────────────────────────

    def book(self, answer: Sequence[Served], asked: Asked, call: Call) -> None:
        """Book the pictures of an answer, once nothing keeps them from going out."""
        seconds = self._clock.monotonic_s() - call.started_s
        what = _kept(asked.what)
        for served in answer:
            outcome = _outcome(served)
            if self._trace is not None:
                self._trace.answered(served, outcome, what, namespace=asked.namespace, match_level=asked.match_level)
            if served.is_similar:
                self._books.similar_hit(call.namespace, served.matched)
                if self._sampler is not None:
                    self._sampler.similar_hit(served, asked, call.wanted)
            self._books.answered(
                call.namespace,
                outcome,
                served.would_hit or served.tier,
                seconds=seconds,
                image_bytes=served.entry.size_bytes,
                saved_microusd=served.saved_microusd,
                would_cost_microusd=served.saved_microusd + served.cost_microusd,
                model=call.model or served.entry.image.model,
                quality=call.quality or served.entry.image.quality,
                caller=call.caller.name,
                is_degraded=served.degraded,
            )

    @contextmanager
    def booked(self, call: Call) -> Iterator[None]:
        """Books the call if it fails. Without a known namespace there is no row for it.

        A caller that has gone is no failure: where it sends again, that call is booked.
        """
        try:
            yield
        except self._gone:
            raise
        except Exception as error:
            if call.namespace:
                self._book_without_picture(call, _outcome_of_failure(error))
            raise

    def _book_without_picture(self, call: Call, outcome: Outcome) -> None:
        self._books.answered(
            call.namespace,
            outcome,
            None,
            seconds=self._clock.monotonic_s() - call.started_s,
            model=call.model,
            quality=call.quality,
            caller=call.caller.name,
        )


def _kept(what: ImageRequest | CacheKey) -> ImageRequest | CacheKey:
    """What is asked for, as it may be kept."""
    return what if isinstance(what, CacheKey) else what.without_bytes


def _row(caller: Caller, namespace: Namespace, model: str, quality: str) -> HitRow:
    return HitRow(Key(namespace.name, model, quality, caller.name, Outcome.HIT, TierName.MEMORY))


def _outcome_of_failure(error: Exception) -> Outcome:
    if isinstance(error, NotCachedError | KeyGoneError):
        return Outcome.NOT_CACHED
    is_remembered = isinstance(error, PromptRefusedError | UpstreamInvalidError) and error.cached
    return Outcome.NEGATIVE if is_remembered else Outcome.ERROR


def _outcome(served: Served) -> Outcome:
    if served.would_hit is not None:
        return Outcome.OBSERVED
    if served.tier is not TierName.UPSTREAM:
        return Outcome.DERIVED if served.derived else Outcome.STALE if served.stale else Outcome.HIT
    return Outcome.COLLAPSED if served.collapsed else Outcome.MISS
