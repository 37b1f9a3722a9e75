"""Work that goes on in the background until the service stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from cacheserver.interfaces import Clock
from cacheserver.tasks import end, every


def keep_doing(  # noqa: PLR0913 - what, how often, and until when
    work: Callable[[], Awaitable[None]],
    pause_s: float,
    *,
    clock: Clock,
    name: str,
    undo: AsyncExitStack,
    at_once: bool = False,
) -> None:
    """Do `work` every `pause_s` in the background, until the service stops."""
    doing = every(pause_s, work, clock=clock, name=name, at_once=at_once)
    undo.push_async_callback(end, [asyncio.create_task(doing, name=name)])
