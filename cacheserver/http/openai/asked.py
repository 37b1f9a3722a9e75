"""What a call over HTTP asks for."""

from __future__ import annotations

from dataclasses import dataclass

from cacheserver.calls.asking import Asked
from cacheserver.http.openai.reading import Wanted
from cacheserver.model import ImageRequest


@dataclass(frozen=True, slots=True)
class HttpAsked(Asked):
    """What a call asks for, and how it is to be answered."""

    wanted: Wanted
    by_url: bool

    @property
    def model_and_quality(self) -> tuple[str, str]:
        """What its row in the books is told by; empty for a call that asks by key."""
        return (self.what.model, self.what.quality) if isinstance(self.what, ImageRequest) else ("", "")
