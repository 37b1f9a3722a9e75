"""Renditions are made beside the event loop, a few at a time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from cacheserver import loop_first
from cacheserver.errors import InvalidRequestError, OverloadedError
from cacheserver.images import BadImageError, ImageFacts
from cacheserver.model import GeneratedImage, Rendition
from cacheserver.renditions import pixels
from cacheserver.renditions.shared import Shared

_CLOSE_S = 10.0


class ThreadRenderer:
    """A `Renderer` with threads of its own. The same rendition of the same picture is made once for all who wait.

    Threads and not processes: Pillow lets go of the interpreter while it works, so that the event loop runs on, and no
    picture has to be sent to another process and back. scripts/bench/renditions.py compares both.

    Args:
        max_pixels: a picture that has more is not decoded.
        max_bytes: nor is one of more bytes.
        threads: most pictures at a time.
        queue_max: most that wait beside those; beyond, OverloadedError.
    """

    def __init__(self, *, max_pixels: int, max_bytes: int, threads: int = 2, queue_max: int = 64) -> None:
        self._render = partial(pixels.render, max_pixels=max_pixels, max_bytes=max_bytes)
        self._pool = loop_first.pool(threads, "render")
        self._turns = asyncio.Semaphore(threads)
        self._queue_max = queue_max
        self._shared = Shared[GeneratedImage](name="render")
        self.waiting = 0
        """How many wait for a thread now."""

    async def render(self, image: GeneratedImage, rendition: Rendition) -> GeneratedImage:
        """See `Renderer.render`."""
        return await self._shared.run((image.sha256, rendition), partial(self._make, image, rendition))

    async def aclose(self) -> None:
        """Drop what waits, and let what runs end: it takes moments."""
        await self._shared.aclose()
        await asyncio.wait({asyncio.create_task(asyncio.to_thread(self._pool.shutdown))}, timeout=_CLOSE_S)

    async def _make(self, image: GeneratedImage, rendition: Rendition) -> GeneratedImage:
        await self._take_turn()
        rendering = self._pool.submit(self._render, image.data, rendition)
        # A caller that leaves cannot stop a thread: its turn ends when the thread is free, and not before.
        made = asyncio.wrap_future(rendering)
        made.add_done_callback(self._end_turn)
        try:
            data, facts = await asyncio.shield(made)
        except BadImageError as error:
            raise InvalidRequestError({"key": f"its picture cannot be read: {error}"}) from None
        return replace(
            image,
            data=data,
            content_type=facts.content_type,
            width=facts.width,
            height=facts.height,
            sha256=facts.sha256,
            size=image.size if (facts.width, facts.height) == (image.width, image.height) else _spelled(facts),
            paid_microusd=0,
        )

    async def _take_turn(self) -> None:
        if self._turns.locked() and self.waiting >= self._queue_max:
            raise OverloadedError(f"{self.waiting} images wait to be made from others; try again.")
        self.waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self.waiting -= 1

    def _end_turn(self, made: asyncio.Future[tuple[bytes, ImageFacts]]) -> None:
        self._turns.release()
        if not made.cancelled():
            made.exception()  # seen, also where nobody waits any more


def _spelled(facts: ImageFacts) -> str:
    return f"{facts.width}x{facts.height}"
