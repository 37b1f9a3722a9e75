"""The way from a miss to pictures: a place in the queue, one upstream, and the books."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from cacheserver.errors import CacheServerError, InvalidRequestError, ShuttingDownError, UpstreamError
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.queue import PlaceQueue
from cacheserver.interfaces import Books, Clock, Upstream
from cacheserver.model import GeneratedImage, ImageRequest, Priority

_UNKNOWN_GENERATION_S = 20.0
_SHORTEST_WAIT_S = 0.5
_DECAY = 0.2


class Generator:
    """Makes pictures: waits for a place, calls the model's upstream, books the call."""

    def __init__(  # noqa: PLR0913 - parts it is built from, by keyword
        self,
        *,
        upstreams: Mapping[str, Upstream],
        default_model: str,
        clock: Clock,
        books: Books,
        prices: PriceTable,
        max_concurrent: int,
        queue_max: int,
    ) -> None:
        """`upstreams` says for each model who makes its pictures; several models may share one.

        `prices` are by those same model names, as `PriceTable.naming` gives them.
        At most `max_concurrent` generations run and `queue_max` wait.
        """
        self._upstreams = dict(upstreams)
        self._default_model = default_model
        self._clock = clock
        self._books = books
        self._prices = prices
        self._max_concurrent = max_concurrent
        self._queue = PlaceQueue(places=max_concurrent, queue_max=queue_max)
        self._typical_s: dict[str, float] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The models there are."""
        return tuple(self._upstreams)

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        return self._default_model

    @property
    def queue_depth(self) -> Mapping[Priority, int]:
        """How many generations wait, by priority."""
        return self._queue.depth

    async def generate(
        self,
        request: ImageRequest,
        variants: Sequence[int],
        *,
        priority: Priority,
        on_spending: Callable[[], None],
    ) -> list[GeneratedImage]:
        """One picture for each of `variants`, or fewer, never none.

        May be cancelled while it waits for a place. From the moment it calls `on_spending`, right before the
        upstream is called, money flows, and cancelling loses what it buys.

        Raises:
            InvalidRequestError: nobody makes pictures with `request.model`.
            QueueFullError: too many wait.
            UpstreamError: the upstream failed.
        """
        upstream = self._upstreams.get(request.model)
        if upstream is None:
            raise InvalidRequestError({"spec.model": f"not served here; there are: {', '.join(self._upstreams)}"})
        async with self._queue.place(priority):
            on_spending()
            return await self._call(upstream, request, variants)

    def estimated_wait_s(self, model: str, since_s: float) -> float:
        """How many more seconds a generation asked for at `since_s` (monotonic) will take; at least 0.5.

        What calls to the model took lately, and as much again for each round of the queue.
        """
        typical_s = self._typical_s.get(model, _UNKNOWN_GENERATION_S)
        rounds = 1 + sum(self._queue.depth.values()) / self._max_concurrent
        return max(typical_s * rounds - (self._clock.monotonic_s() - since_s), _SHORTEST_WAIT_S)

    def estimate_microusd(self, request: ImageRequest, n: int) -> int:
        """What `n` pictures may cost at most, in micro-dollars; 0 where no price is known."""
        return self._prices.estimate_microusd(request, n)

    async def check(self) -> None:
        """Return if every upstream answers and accepts our key; raise the first UpstreamError if not."""
        await asyncio.gather(*(upstream.check() for upstream in self._distinct_upstreams()))

    async def aclose(self) -> None:
        """Let go of the upstreams' connections."""
        for upstream in self._distinct_upstreams():
            await upstream.aclose()

    async def _call(self, upstream: Upstream, request: ImageRequest, variants: Sequence[int]) -> list[GeneratedImage]:
        started_s = self._clock.monotonic_s()
        result = CacheServerError.reason
        try:
            images = await upstream.generate(request, variants)
            result = "ok"
        except UpstreamError as error:
            result = error.reason
            raise
        except asyncio.CancelledError:
            result = ShuttingDownError.reason
            raise
        finally:
            seconds = self._clock.monotonic_s() - started_s
            self._books.upstream_call(upstream.name, request.model, result, seconds)
        self._learn(request.model, seconds)
        return images

    def _learn(self, model: str, seconds: float) -> None:
        typical_s = self._typical_s.get(model, seconds)
        self._typical_s[model] = typical_s + _DECAY * (seconds - typical_s)

    def _distinct_upstreams(self) -> list[Upstream]:
        return list({id(upstream): upstream for upstream in self._upstreams.values()}.values())
