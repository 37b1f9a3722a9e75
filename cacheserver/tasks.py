"""Work that outlives the call that began it, and its owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from cacheserver.errors import CacheServerError
from cacheserver.interfaces import Clock

_log = structlog.get_logger(__name__)

_LAST_S = 1.0
"""For what cancelled tasks leave to be done, as writing down how they ended."""

T = TypeVar("T")


class OwnedTasks:
    """Tasks that are kept until they end; a bug in one is logged, and all are awaited at shutdown."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def own(self, work: Coroutine[None, None, T], name: str) -> asyncio.Task[T]:
        """Run `work` as a task of ours."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def idle(self) -> None:
        """Return when no task is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def aclose(self, grace_s: float) -> None:
        """Await all tasks and what those own in turn at most `grace_s`, then cancel what is left and await its end.

        None runs on after this, even if it is cancelled. What cancelled tasks leave behind has a moment to end.
        """
        try:
            await self._idle_within(grace_s)
        finally:
            await end(self._tasks)
            await self._idle_within(_LAST_S)
            await end(self._tasks)

    async def _idle_within(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.idle()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        # An error of ours has reached whoever still waits; anything else is a bug.
        if error is not None and not isinstance(error, CacheServerError):
            _log.error("task_failed", task=task.get_name(), exc_info=error)


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel `tasks` and return when all have ended; those that have already stay as they are."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    if ending:
        await asyncio.wait(ending)


async def every(
    pause_s: float, work: Callable[[], Awaitable[None]], *, clock: Clock, name: str, at_once: bool = False
) -> None:
    """Do `work` after each pause until cancelled, and once before the first one if `at_once`.

    A bug in one round is logged and not the end of it: what nobody awaits would otherwise never run again, unseen.
    """
    if not at_once:
        await clock.sleep(pause_s)
    while True:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - whatever it was, it is logged, and the next round may work
            _log.error("round_failed", task=name, exc_info=error)
        await clock.sleep(pause_s)


async def in_turns(items: Sequence[T], size: int) -> AsyncIterator[Sequence[T]]:
    """`items`, `size` at a time; in between other tasks get their turn."""
    for start in range(0, len(items), size):
        if start:
            await asyncio.sleep(0)
        yield items[start : start + size]
