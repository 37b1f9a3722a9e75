"""How many pictures may be made a minute, in the headers of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Callable

from cacheserver.errors import InvalidRequestError
from cacheserver.interfaces import Generation
from cacheserver.model import ImageRequest, RateLimit

LimitOf = Callable[[ImageRequest], RateLimit | None]
"""What limits pictures like this one now; None where nothing is known to."""

_MINUTE_S = 60.0


def limit_of(generation: Generation, next_s: Callable[[str], float]) -> LimitOf:
    """By the limit groups that may make a picture; `next_s` tells when a group's next free moment is, in seconds."""

    def limit(request: ImageRequest) -> RateLimit | None:
        try:
            outlook = generation.outlook(request)
        except InvalidRequestError:
            return None  # a model nobody serves, which whoever asks for it is told
        if outlook.images_per_minute is None:
            return None
        # All moments until the next free one are taken: by then as many will have been made, and all is free again.
        reset_s = min(map(next_s, outlook.groups), default=0.0)
        free = outlook.images_per_minute * (1 - reset_s / _MINUTE_S)
        return RateLimit(math.floor(outlook.images_per_minute), max(0, math.floor(free)), reset_s)

    return limit


def rate_headers(limit: RateLimit | None) -> list[tuple[str, str]]:
    """The headers that tell of a limit of pictures a minute."""
    if limit is None:
        return []
    return [
        ("x-ratelimit-limit-images", str(limit.limit)),
        ("x-ratelimit-remaining-images", str(limit.remaining)),
        ("x-ratelimit-reset-images", go_duration(limit.reset_s or 0.0)),
    ]


def go_duration(seconds: float) -> str:
    """Seconds as Go writes durations: "6m0s", "1.5s", "12ms"."""
    ms = math.ceil(seconds * 1_000)
    if 0 < ms < 1_000:  # noqa: PLR2004 - a second
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest_ms / 1_000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
