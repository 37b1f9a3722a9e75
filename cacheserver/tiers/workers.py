"""Threads that a tier owns, for calls that block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from cacheserver import loop_first

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class Workers:
    """A bounded pool of threads. A cancelled call that runs already goes on in its thread, unheard.

    Args:
        threads: most calls at a time; more wait.
        name: begins the threads' names.
    """

    def __init__(self, *, threads: int, name: str) -> None:
        self._pool = loop_first.pool(threads, name)

    async def run(self, call: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        """What `call` returns or raises, in a thread."""
        return await asyncio.wrap_future(self._pool.submit(call, *args, **kwargs))

    async def aclose(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the calls that run; what still hangs then ends by its own timeouts."""
        await asyncio.wait({asyncio.create_task(asyncio.to_thread(self._pool.shutdown))}, timeout=timeout_s)
