"""URLs of pictures: who has one may fetch that picture, in any rendition, until it expires."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from http import HTTPStatus

from cacheserver.http.delivery.partitions import Partitions
from cacheserver.http.status import HttpError
from cacheserver.interfaces import Clock
from cacheserver.model import CachedImage

PATH = "/images"
"""Where pictures are, by their keys."""

VERSION_DIGITS = 32
"""So many of a picture's SHA-256, in hexadecimal, are its version in URLs."""

_VERSION = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS}}}")
_STEPS = 10
_MAX_DIGITS = 11


def version_of(entry: CachedImage) -> str:
    """What names these very bytes in URLs, while the key names whatever is stored under it."""
    return entry.image.sha256[:VERSION_DIGITS]


def is_version_name(text: str) -> bool:
    """Whether this can be a version."""
    return _VERSION.fullmatch(text) is not None


class ImageUrls:
    """Makes URLs of pictures, and knows those that it made.

    A signature is the HMAC-SHA256 of key, version and expiry. The size and format that are asked for are not signed:
    whoever may have a picture may have it smaller.
    """

    def __init__(
        self,
        secrets: Sequence[bytes],
        *,
        partitions: Partitions,
        expires_s: int,
        clock: Clock,
        public_url: str | None = None,
    ) -> None:
        """The first of `secrets` signs, all of them are accepted, so that one can take another's place.

        `public_url` is where callers reach us; None where it depends on how they do.
        """
        self._secrets = secrets
        self.partitions = partitions
        self._expires_s = expires_s
        self._clock = clock
        self.public_url = None if public_url is None else public_url.rstrip("/")

    def url(self, entry: CachedImage, *, base_url: str = "") -> tuple[str, float | None]:
        """A URL of this picture, and when it expires in seconds since 1970: None for never, of a public one.

        `base_url` is what it begins with where no public URL is set. It is good for `expires_s` and up to a tenth more:
        within a tenth of that time the same picture has the same URL, so that browsers and CDNs know it again.
        """
        name, version = entry.key.name, version_of(entry)
        url = f"{self.public_url or base_url.rstrip('/')}{PATH}/{name}?v={version}"
        if self.partitions.is_public(entry.key.partition):
            return url, None
        step_s = max(1, self._expires_s // _STEPS)
        expires_s = math.ceil((self._clock.now_s() + self._expires_s) / step_s) * step_s
        signature = _signature(self._secrets[0], name, version, str(expires_s))
        return f"{url}&expires={expires_s}&signature={signature}", float(expires_s)

    def check(self, name: str, *, version: str, expires: str, signature: str) -> float:
        """When this signed URL of the key `name` expires, in seconds since 1970.

        Raises:
            HttpError: 403, it is not one of ours or has expired.
        """
        given = signature.encode()
        # Every secret is tried, so that the time taken does not tell which one fits.
        fits = [hmac.compare_digest(_signature(each, name, version, expires).encode(), given) for each in self._secrets]
        if not any(fits) or not (expires.isascii() and expires.isdecimal() and len(expires) <= _MAX_DIGITS):
            text = "The signature is not that of this URL; ask for the image again, and use its URL unchanged."
            raise HttpError(HTTPStatus.FORBIDDEN, text, param="signature", code="url_signature_invalid")
        if self._clock.now_s() >= int(expires):
            text = "This URL has expired; ask for the image again to get a new one."
            raise HttpError(HTTPStatus.FORBIDDEN, text, param="expires", code="url_expired")
        return float(expires)


def _signature(secret: bytes, *signed: str) -> str:
    digest = hmac.digest(secret, "\n".join(signed).encode(), hashlib.sha256)
    return urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")
