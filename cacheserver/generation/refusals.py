"""Refusals worth remembering for a while: the same prompt would be refused again, and asking costs a call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields

from cachetools import TTLCache

from cacheserver.errors import PromptRefusedError, UpstreamError, UpstreamInvalidError
from cacheserver.model import ImageRequest, Order

_REMEMBERED = 10_000
_JUDGED = ("prompt", "model", "moderation", "extra", "inputs")
"""What a provider's moderation sees: its verdict is the same whatever the picture's size."""


class Refusals:
    """Negative entries: what an upstream refused for the prompt's or a parameter's sake, by namespace.

    Kept by the moderation policy asked for, so that a request under "low" is not refused for one under "auto".
    What moderation saw in a picture is not remembered: the next picture of the same prompt may pass.
    """

    def __init__(self, *, ttl_s: float, monotonic_s: Callable[[], float]) -> None:
        """The 10,000 latest, each for `ttl_s`."""
        self._refused: TTLCache[bytes, tuple[type[UpstreamError], str, str]] = TTLCache(
            _REMEMBERED, ttl=ttl_s, timer=monotonic_s
        )

    def check(self, order: Order) -> None:
        """Return if nothing is known against the order.

        Raises:
            PromptRefusedError: an upstream refused its prompt a while ago.
            UpstreamInvalidError: an upstream did not take its parameters a while ago.
        """
        for key in (_prompt_key(order), _request_key(order)):
            if (known := self._refused.get(key)) is None:
                continue
            kind, text, field = known
            if kind is PromptRefusedError:
                raise PromptRefusedError(text, cached=True)
            raise UpstreamInvalidError(text, field=field, cached=True)

    def remember(self, order: Order, error: UpstreamError) -> None:
        """Keep what an upstream said, if it would say the same again."""
        if isinstance(error, PromptRefusedError) and not error.after_seeing:
            self._refused[_prompt_key(order)] = (PromptRefusedError, str(error), "")
        elif isinstance(error, UpstreamInvalidError):
            self._refused[_request_key(order)] = (UpstreamInvalidError, str(error), error.field)


def _prompt_key(order: Order) -> bytes:
    return _key(order.namespace, order.request, _JUDGED)


def _request_key(order: Order) -> bytes:
    return _key(order.namespace, order.request, tuple(field.name for field in fields(ImageRequest)))


def _key(namespace: str, request: ImageRequest, names: tuple[str, ...]) -> bytes:
    parts = {name: getattr(request, name) for name in names}
    parts["extra"] = dict(request.extra)
    parts["inputs"] = [(image.role, image.sha256) for image in request.inputs]
    text = json.dumps([namespace, parts], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
