"""What a call over HTTP asks for."""

from __future__ import annotations

from dataclasses import dataclass

from cacheserver.calls.asked import Asked
from cacheserver.http.openai.reading import Wanted


@dataclass(frozen=True, slots=True)
class HttpAsked(Asked):
    """What a call asks for, and how it is to be answered."""

    wanted: Wanted
    by_url: bool
