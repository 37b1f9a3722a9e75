"""Less than was asked for: the rungs below a request, walked as ordinary requests.

So a rung that is cached costs nothing, and what is made for one is stored under its own identity and never as what
was asked. Only for callers that accept it, and always labelled.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from cacheserver.errors import CannotAffordError, NotCachedError, RequestIdSpentError, TooSlowError
from cacheserver.interfaces import Generation
from cacheserver.model import Ask, CachePolicy, Identity, ImageRequest, MatchLevel, Namespace, Pending, Served

Answer = list[Served] | Pending

Identify = Callable[[ImageRequest, Namespace, MatchLevel | None], Identity]
"""Turns a request into its identity in a namespace, no looser than a level."""


class Rungs:
    """Answers calls whose picture cannot be had with a cheaper one."""

    def __init__(
        self,
        *,
        get: Callable[[Ask], Awaitable[Answer]],
        generation: Generation,
        identify: Identify,
    ) -> None:
        """`get` answers a call as it asks, or raises why it cannot."""
        self._get = get
        self._generation = generation
        self._identify = identify

    async def instead(self, ask: Ask, error: CannotAffordError | TooSlowError) -> Answer:
        """What to answer where `ask` cannot be had.

        Over budget the dearest rung that can be had; short of time one that is cached, else the fastest.

        Raises:
            CannotAffordError: no rung can be had either.
        """
        if isinstance(error, CannotAffordError):
            for rung in error.rungs:
                with suppress(CannotAffordError):
                    return await self._get_rung(ask, rung)
            raise error
        for rung in error.rungs:
            with suppress(NotCachedError):
                return await self._get_rung(ask, rung, cache_policy=CachePolicy.ONLY_IF_CACHED)
        expected_s = partial(self._generation.expected_s, priority=ask.terms.priority)
        fastest = min(error.rungs, key=expected_s)
        if expected_s(fastest) < expected_s(ask.request):
            return await self._get_rung(ask, fastest)
        return await self._get(replace(ask, terms=replace(ask.terms, allow_degraded=False)))

    async def again(self, ask: Ask) -> Answer:
        """What a call sent again was given, if that was a rung: there its request_id is known.

        Raises:
            RequestIdSpentError: it was not.
        """
        for rung in self._generation.rungs(ask.request):
            with suppress(RequestIdSpentError):
                return await self._get_rung(ask, rung)
        raise RequestIdSpentError("This request_id was used for another request; use a new one.")

    async def _get_rung(self, ask: Ask, rung: ImageRequest, *, cache_policy: CachePolicy | None = None) -> Answer:
        terms = replace(ask.terms, allow_degraded=False, cache_policy=cache_policy or ask.terms.cache_policy)
        identity = self._identify(rung, ask.namespace, ask.identity.level)
        answer = await self._get(replace(ask, request=rung, identity=identity, terms=terms))
        if isinstance(answer, Pending):
            return answer
        return [replace(served, degraded=True) for served in answer]
