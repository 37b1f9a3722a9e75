"""Who may fetch a picture by URL: judged by its key alone, before anybody looks whether there is such a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cacheserver.calls.call import BY_URL, Call
from cacheserver.errors import KeyGoneError
from cacheserver.http.delivery.asked import UrlAsked
from cacheserver.http.delivery.urls import ImageUrls
from cacheserver.model import CacheKey, Namespace

GONE = "There is no image at this URL, or not any more."


@dataclass(frozen=True, slots=True)
class Access:
    """A right to fetch: in which namespace, whether everybody has it, and for a signed URL until when it lasts.

    `expires_s` is in seconds since 1970, None where no URL expires.
    """

    namespace: Namespace
    is_public: bool = False
    expires_s: float | None = None

    @property
    def is_by_url(self) -> bool:
        """Whether the URL itself is the right, so that pages of any origin may show the picture."""
        return self.is_public or self.expires_s is not None


class Gate:
    """Lets in: everybody to public pictures, who has a signed URL, and callers with the right to read."""

    def __init__(self, *, urls: ImageUrls, authenticate: Callable[[Call], None]) -> None:
        """`authenticate` finds out who calls, or raises what the caller must hear."""
        self._partitions = urls.partitions
        self._urls = urls
        self._authenticate = authenticate

    def admit(self, key: CacheKey, asked: UrlAsked, call: Call) -> Access:
        """The right by which this call may fetch the picture of `key`.

        Raises:
            HttpError: its signature is wrong or has expired.
            UnauthenticatedError: it has neither a signature nor the token of a caller.
            PermissionDeniedError: its caller may not read there.
            KeyGoneError: no namespace has this partition any more.
        """
        expires_s = None
        is_public = self._partitions.is_public(key.partition)
        if not is_public and not asked.signature:
            self._authenticate(call)
            return Access(self._partitions.read_by(call.caller, key.partition))
        if not is_public:
            expires_s = self._urls.check(
                key.name, version=asked.version, expires=asked.expires, signature=asked.signature
            )
        call.caller = BY_URL
        namespace = self._partitions.any_of(key.partition)
        if namespace is None:
            raise KeyGoneError(GONE)
        return Access(namespace, is_public, expires_s)
