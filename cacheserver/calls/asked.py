"""What a call asks for, whatever transport it came by."""

from __future__ import annotations

from dataclasses import dataclass

from cacheserver.model import CacheKey, ImageRequest, MatchLevel, Namespace, Terms


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call asks for, as values: the picture wanted by its request or its key, and on what terms."""

    namespace: Namespace
    what: ImageRequest | CacheKey
    terms: Terms
    match_level: MatchLevel | None

    @property
    def model_and_quality(self) -> tuple[str, str]:
        """What its row in the books is told by; empty for a call that asks by key."""
        return (self.what.model, self.what.quality) if isinstance(self.what, ImageRequest) else ("", "")
