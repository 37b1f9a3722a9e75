"""Work that several callers want done at once, done once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from cacheserver.errors import ShuttingDownError
from cacheserver.tasks import OwnedTasks

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Run(Generic[T]):
    task: asyncio.Task[T]
    waiting: int = 0


class Shared(Generic[T]):
    """Runs each piece of work once for all who ask for it meanwhile; it is cancelled when nobody waits any more."""

    def __init__(self, *, name: str) -> None:
        """`name` is that of the tasks."""
        self._name = name
        self._runs: dict[Hashable, _Run[T]] = {}
        self._tasks = OwnedTasks()

    async def run(self, key: Hashable, work: Callable[[], Coroutine[None, None, T]]) -> T:
        """What `work` returns or raises; where work of this key runs already, that one's.

        Raises:
            ShuttingDownError: it was cut off.
        """
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _Run(self._tasks.own(work(), self._name))
            run.task.add_done_callback(partial(self._ended, key, run))
        run.waiting += 1
        try:
            await asyncio.wait({run.task})
        finally:
            run.waiting -= 1
            if not run.waiting and not run.task.done():
                self._ended(key, run)  # whoever comes now must not join what is being cancelled
                run.task.cancel()
        if run.task.cancelled():
            raise ShuttingDownError("The service is going down; ask again in a moment.")
        return run.task.result()

    async def aclose(self) -> None:
        """Cut off what runs and return when it has ended."""
        await self._tasks.aclose(0)

    def _ended(self, key: Hashable, run: _Run[T], _task: asyncio.Task[T] | None = None) -> None:
        if self._runs.get(key) is run:
            del self._runs[key]
