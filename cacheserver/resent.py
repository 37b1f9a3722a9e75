"""Calls that may be sent twice under one request_id: they join or replay, and never pay again.

NEXT and REFRESH pay every time they are called, so a client that retries needs a way to say "the same call".
While such a call runs it has a promise here: the variants it will be given and the flight that brings them.
Once it is answered (or would have been, had the caller stayed) the promise becomes a replay, kept for a day.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from cacheserver.errors import KeyGoneError, RequestIdSpentError
from cacheserver.flight import Flight, Loaded, Waiter
from cacheserver.interfaces import Replays
from cacheserver.model import CachePolicy, Caller, Replay, Terms, VariantPolicy
from cacheserver.tasks import OwnedTasks


@dataclass(eq=False, slots=True)
class Promise:
    """What a call with a request_id will be given, and the flight that brings it once there is one.

    `answers` are those of everyone who sent the call.
    """

    replay: Replay
    flight: Flight | None = None
    answers: list[asyncio.Future[list[Loaded]]] = field(default_factory=list)

    @property
    def is_running(self) -> bool:
        """Whether somebody still waits for it, so that its flight is sure to bring it."""
        return any(not answer.done() for answer in self.answers)

    @property
    def is_void(self) -> bool:
        """Whether it came to nothing: everyone who sent the call hung up before money was spent, or it failed."""
        return all(answer.done() and (answer.cancelled() or answer.exception()) for answer in self.answers)


def replay_id(caller: Caller, terms: Terms) -> str:
    """The idempotency key of a call that pays every time it is sent; empty for all others."""
    pays_every_time = (
        terms.cache_policy in (CachePolicy.REFRESH, CachePolicy.NO_STORE) or terms.variant_policy is VariantPolicy.NEXT
    )
    if not terms.request_id or not pays_every_time:
        return ""
    return hashlib.sha256(f"{caller.name}\0{terms.request_id}".encode()).hexdigest()


class Resent:
    """The promises of this process, and the replays behind them."""

    def __init__(self, *, replays: Replays, tasks: OwnedTasks, name: Callable[[Waiter], str]) -> None:
        """`name` is what all replicas call what a waiter asked for."""
        self._name = name
        self._replays = replays
        self._tasks = tasks
        self._promises: dict[str, Promise] = {}
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def prepare(
        self, waiter: Waiter, call_id: str, choose: Callable[[Waiter], Awaitable[tuple[int, ...]]]
    ) -> Promise | None:
        """Set the waiter's variants: those `choose` picks for a new call, those of the first for one sent again.

        Returns the promise to keep; None for a call that was answered before, which only collects its pictures.
        Between the return and boarding the promise's flight nothing may await.

        Raises:
            RequestIdSpentError: the id was used for another request.
        """
        async with self._alone(call_id):
            promise = self._promise(call_id)
            replay = promise.replay if promise is not None else await self._replays.recall(call_id)
            name = self._name(waiter)
            if replay is None:
                waiter.variants = await choose(waiter)
                promise = self._promises[call_id] = Promise(Replay(name, waiter.variants))
            elif (replay.identity_name, len(replay.variants)) != (name, waiter.terms.n):
                raise RequestIdSpentError("This request_id was used for another request; use a new one.")
            else:
                waiter.variants = replay.variants
                if promise is None or not promise.is_running:
                    _only_collect(waiter)
                    return None
        promise.answers.append(waiter.answer)
        waiter.answer.add_done_callback(lambda answer: self._settle(call_id, promise, answer))
        return promise

    async def is_spent(self, call_id: str) -> bool:
        """Whether a call of this id was answered before."""
        return await self._replays.recall(call_id) is not None

    async def remember(self, call_id: str, replay: Replay) -> None:
        """Make a promise a replay."""
        await self._replays.remember(call_id, replay)
        self._promises.pop(call_id, None)

    def _promise(self, call_id: str) -> Promise | None:
        promise = self._promises.get(call_id)
        return None if promise is None or promise.is_void else promise

    @asynccontextmanager
    async def _alone(self, call_id: str) -> AsyncIterator[None]:
        async with self._asking.setdefault(call_id, asyncio.Lock()):
            yield

    def _settle(self, call_id: str, promise: Promise, answer: asyncio.Future[list[Loaded]]) -> None:
        """A promised answer is there, or will never be: remember it, or let the id be used again."""
        if promise.is_void:
            if self._promises.get(call_id) is promise:
                del self._promises[call_id]
        elif not answer.cancelled() and answer.exception() is None:
            variants = tuple(loaded.entry.key.variant for loaded in answer.result())
            promise.replay = Replay(promise.replay.identity_name, variants)
            self._tasks.own(self.remember(call_id, promise.replay), "remember")


def _only_collect(waiter: Waiter) -> None:
    waiter.refresh = False
    waiter.not_before_s = None
    waiter.refusal = KeyGoneError("The picture this request_id was given is gone; use a new request_id.")
