"""What was fetched before: a picture that memory still has is sent to the same URL without reading that anew.

Rights are no part of it: who may fetch, and until when, is judged every time.
"""

from __future__ import annotations

from weakref import ref

from cacheserver.http.delivery.asked import UrlAsked
from cacheserver.model import CachedImage, CacheKey

_MOST_KNOWN, _MOST_NAME_BYTES = 2_000, 4_096

Name = tuple[bytes, str]
"""A URL's path and query as they were sent, and the request's Accept."""


class Fetched:
    """A picture that was sent whole, from memory. Keeps none there."""

    def __init__(self, key: CacheKey, asked: UrlAsked, entry: CachedImage, *, is_version: bool) -> None:
        """`key` and `asked` are what the URL says; `is_version` whether `entry` is the version that it names."""
        self.key, self.asked, self.is_version = key, asked, is_version
        self.place = (entry.key if entry.key.is_rendition else key).name
        """Where memory has it."""
        self.second = 0
        self.lines = b""
        """The lines of its head in that second: what changes in them changes once a second."""
        self._entry = ref(entry)

    @property
    def entry(self) -> CachedImage | None:
        """The picture; None once memory has let go of it."""
        return self._entry()


class FetchedPictures:
    """The latest 2,000 by their names, of at most 4 KiB each; the oldest goes first."""

    def __init__(self) -> None:
        self._known: dict[Name, Fetched] = {}

    def find(self, name: Name) -> Fetched | None:
        """What was fetched under this name."""
        return self._known.get(name)

    def keep(self, name: Name, fetched: Fetched) -> None:
        """Remember what was fetched, unless its name is long: whoever fetches may write anything behind a URL."""
        if sum(map(len, name)) > _MOST_NAME_BYTES:
            return
        if name not in self._known and len(self._known) >= _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[name] = fetched
