"""What callers may say of a call, whatever transport it comes by: bounds, and the quality that a use takes."""

from __future__ import annotations

import re
from dataclasses import replace

from cacheserver.model import ImageRequest, Namespace

MAX_IMAGES = 10
MAX_TAGS = 16
MAX_REQUEST_ID = 128
MAX_DURATION_S = 10 * 366 * 24 * 3600.0

TAG = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
"""What a label looks like."""

_AUTO = "auto"


def at_use(request: ImageRequest, use: str, namespace: Namespace) -> ImageRequest | None:
    """The request at the quality its use takes; a quality of its own is what the caller really wants.

    None: the namespace has no such use.
    """
    if not use:
        return request
    quality = namespace.quality_by_use.get(use)
    if quality is None:
        return None
    return replace(request, quality=quality) if request.quality == _AUTO else request
