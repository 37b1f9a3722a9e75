"""Working off a stream of batches: never more read ahead than is worked on, whoever reads the outcomes slowly waits.

batches ─▶ look ─▶ to do (bounded) ─▶ make, so many at a time ─▶ outcomes (bounded) ─▶ whoever iterates
              └───────────────── what is done already ──────────────────▲
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from cacheserver.errors import ShuttingDownError
from cacheserver.tasks import end
from cacheserver.warming.values import WarmOutcome

B = TypeVar("B")
T = TypeVar("T")

_MOST_TO_DO = 1_000
_MOST_UNREAD = 2_000


async def work_off(
    batches: AsyncIterator[B],
    *,
    look: Callable[[B], Awaitable[tuple[Sequence[WarmOutcome], Iterable[T]]]],
    make: Callable[[T], Awaitable[WarmOutcome]],
    concurrency: int,
    closing: asyncio.Event,
) -> AsyncGenerator[list[WarmOutcome], None]:
    """The outcomes of all batches, some at a time, as they become known.

    `look` takes a batch apart into what is done and what there is to do, `make` does one of these, `concurrency` at a
    time. Closing this cancels what runs. What `batches`, `look` or `make` raises is raised here.

    Raises:
        ShuttingDownError: `closing` was set.
    """
    outbox = _Outbox()
    todo: asyncio.Queue[T | None] = asyncio.Queue(_MOST_TO_DO)

    async def read() -> None:
        async for batch in batches:
            done, left = await look(batch)
            for outcome in done:
                await outbox.put(outcome)
            for each in left:
                await todo.put(each)
        for _ in range(concurrency):
            await todo.put(None)

    async def work() -> None:
        while (each := await todo.get()) is not None:
            await outbox.put(await make(each))

    tasks = [asyncio.create_task(work(), name="warm") for _ in range(concurrency)]
    tasks.append(asyncio.create_task(read(), name="read warm-up"))
    everything = asyncio.gather(*tasks)
    everything.add_done_callback(lambda _: outbox.close())
    watching = asyncio.create_task(closing.wait(), name="watch warm-up")
    watching.add_done_callback(lambda _: outbox.close())
    try:
        while outcomes := await outbox.take():
            yield outcomes
        check_open(closing)
        await everything
    finally:
        await end([*tasks, watching])
        if everything.done() and not everything.cancelled():
            everything.exception()  # whoever has gone does not hear of it


def check_open(closing: asyncio.Event) -> None:
    """Raise ShuttingDownError if `closing` is set."""
    if closing.is_set():
        raise ShuttingDownError("The service is going down: run the warm-up again, it goes on where it was.")


class _Outbox:
    """Outcomes nobody has read yet; full, it keeps whoever has another one waiting."""

    def __init__(self) -> None:
        self._outcomes: list[WarmOutcome] = []
        self._has_some = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_closed = False

    async def put(self, outcome: WarmOutcome) -> None:
        await self._has_room.wait()
        self._outcomes.append(outcome)
        self._has_some.set()
        if len(self._outcomes) >= _MOST_UNREAD:
            self._has_room.clear()

    async def take(self) -> list[WarmOutcome]:
        """All there are, at least one; none once it is closed."""
        await self._has_some.wait()
        outcomes, self._outcomes = self._outcomes, []
        self._has_room.set()
        if not self._is_closed:
            self._has_some.clear()
        return outcomes

    def close(self) -> None:
        self._is_closed = True
        self._has_some.set()
