"""Work that outlives the call that began it, and its owner."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

from cacheserver.errors import CacheServerError

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
        """Await all tasks at most `grace_s`, then cancel what is left; what those leave behind is awaited as well."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(self._tasks, timeout=grace_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
            await asyncio.sleep(0)  # their callbacks may own further tasks
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=_LAST_S)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        # An error of ours has reached whoever still waits; anything else is a bug.
        if error is not None and not isinstance(error, CacheServerError):
            _log.error("task_failed", task=task.get_name(), exc_info=error)
