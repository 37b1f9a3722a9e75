"""What a client does while nobody answers at its address: have the picture made without the service, and tell later."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from cacheserver.client.values import CacheStatus, GetOptions, Image, ImageResult, ImageSpec, State
from cacheserver.model import CachePolicy, TierName

Fallback = Callable[[ImageSpec], bytes]
"""Makes one picture without the service: its encoded bytes. What it raises reaches the caller."""

AsyncFallback = Callable[[ImageSpec], Awaitable[bytes]]
"""The same for asyncio."""

HEADER: Final = "x-fallbacks"
"""The metadata in which a call tells how many pictures were made without the service."""

_MOST_TOLD: Final = 999_999

_CONTENT_TYPES: Final = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


class Fallbacks:
    """How many pictures were made without the service, and how many of them it has yet to be told of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._untold = 0
        self.made = 0
        """In all."""

    @property
    def are_untold(self) -> bool:
        """Whether the service has yet to be told of some."""
        return bool(self._untold)

    @contextmanager
    def telling(self) -> Iterator[Sequence[tuple[str, str]]]:
        """The metadata that tells a call's service; if the call fails, the next one tells."""
        with self._lock:
            told = min(self._untold, _MOST_TOLD)
            self._untold -= told
        try:
            yield ((HEADER, str(told)),) if told else ()
        except BaseException:
            with self._lock:
                self._untold += told
            raise

    def picture(self, data: bytes) -> Image:
        """A picture made without the service. Counts it, whatever becomes of others of the same call."""
        image = _image(data)
        with self._lock:
            self.made += 1
            self._untold += 1
        return image


def result_of(images: Sequence[Image]) -> ImageResult:
    """The answer that pictures made without the service are."""
    status = CacheStatus(tier=TierName.UPSTREAM, state=State.READY)
    return ImageResult(images=tuple(images), status=status, image_status=(status,) * len(images), by_fallback=True)


def can_stand_in(options: GetOptions) -> bool:
    """Whether a picture made without the service is an answer: not to a call that asks for cached ones alone."""
    return options.get("cache_policy") is not CachePolicy.ONLY_IF_CACHED


def _image(data: bytes) -> Image:
    if not isinstance(data, bytes) or not data:
        raise TypeError("a fallback must return the bytes of an image")
    return Image(
        key="",
        data=data,
        content_type=next((name for magic, name in _CONTENT_TYPES if data.startswith(magic)), ""),
        size_bytes=len(data),
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
    )
