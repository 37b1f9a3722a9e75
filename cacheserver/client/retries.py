"""When a call that was answered UNAVAILABLE is made again: gRPC's own rule, for calls that gRPC does not see.

Four attempts in all; the service's pushback, else a pause that doubles, between them; and none while most calls fail
(https://github.com/grpc/proposal/blob/master/A6-client-retries.md).
"""

from __future__ import annotations

import random
from typing import Final

from cacheserver.client import channel
from cacheserver.client.errors import CacheError

_JITTER: Final = 0.2
"""A pause is this share longer or shorter, so that calls which failed together do not come back together."""


class Throttle:
    """Keeps a client most of whose calls fail from making them again. One for each client."""

    def __init__(self) -> None:
        self._tokens = float(channel.RETRY_TOKENS)

    @property
    def allows(self) -> bool:
        """Whether calls may be made again now."""
        return self._tokens > channel.RETRY_TOKENS / 2

    def succeeded(self) -> None:
        """A call was answered."""
        self._tokens = min(channel.RETRY_TOKENS, self._tokens + channel.RETRY_TOKENS_A_SUCCESS)

    def failed(self) -> None:
        """A call was answered UNAVAILABLE, or the stream of many broke: one failure, for all of them."""
        self._tokens = max(0.0, self._tokens - 1)


class Tries:
    """The attempts at one call."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self._made = 0

    def pause_s(self, error: CacheError) -> float:
        """Seconds to wait before another attempt after this UNAVAILABLE; raises it on if there is to be none."""
        self._made += 1
        if self._made == channel.MAX_ATTEMPTS or not self._throttle.allows:
            raise error
        if error.retry_after_s is not None:
            return error.retry_after_s
        pause_s = min(channel.RETRY_FIRST_S * (1 << self._made - 1), channel.RETRY_LONGEST_S)
        return pause_s * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spreads calls, guards nothing
