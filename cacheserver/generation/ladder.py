"""Cheaper requests of the same picture: what to fall back to where the one asked for cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cacheserver.model import ImageRequest


class Ladder:
    """Rungs from dear to cheap. A rung is a quality, or "model:quality" for that of another model."""

    def __init__(self, rungs: Sequence[str], *, estimate_microusd: Callable[[ImageRequest], int]) -> None:
        """`estimate_microusd` says what a request may cost at most; 0 where nobody knows."""
        self._rungs = [(model, quality) for model, _, quality in (rung.rpartition(":") for rung in rungs)]
        self._estimate_microusd = estimate_microusd

    def below(self, request: ImageRequest) -> list[ImageRequest]:
        """The requests of the rungs below `request`, dearest first; none for one that stands on the last."""
        rungs = [replace(request, model=model or request.model, quality=quality) for model, quality in self._rungs]
        lower = rungs[rungs.index(request) + 1 :] if request in rungs else rungs
        own = self._estimate_microusd(request)
        return [rung for rung in lower if not own or self._estimate_microusd(rung) < own]
