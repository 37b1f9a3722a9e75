"""What the URL of a picture asks for: which version, with what right, in which size and format, and how to be saved.

Parameters that are not ours are passed over: CDNs and pages add some to go round their caches.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cacheserver.errors import InvalidRequestError
from cacheserver.model import Rendition

MAX_PIXELS_A_SIDE = 8192

_FORMATS = ("png", "jpeg", "webp")
_AUTO = "auto"
_AUTO_FORMAT = "webp"
_MAX_QUALITY = 100
_NUMBER = re.compile(r"[0-9]{1,5}")
_FLAGS = {"0": False, "1": True}
_ACCEPTED = re.compile(rf"(?:^|,)\s*image/{_AUTO_FORMAT}\s*(?:;\s*q=([01](?:\.[0-9]*)?)\s*)?(?=,|$|;)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class UrlAsked:
    """The parameters of a picture's URL. `rendition` None is the picture as it is stored.

    `by_accept`: what is answered depends on the request's Accept. `download` is the file name to save it under, None
    to show it. Version, expiry and signature are as they stand there, empty if they do not.
    """

    version: str = ""
    expires: str = ""
    signature: str = field(default="", repr=False)
    rendition: Rendition | None = None
    by_accept: bool = False
    download: str | None = None


_PLAIN = UrlAsked()


def read_asked(query: Mapping[str, str], *, accept: str, widths: Collection[int]) -> UrlAsked:
    """What a query asks for; `widths` are those that may be asked for, empty for any.

    Raises:
        InvalidRequestError: names every parameter that is out of its range.
    """
    if not query:
        return _PLAIN
    violations: dict[str, str] = {}
    rendition = Rendition(
        width=_width(query, widths, violations),
        height=_height(query, widths, violations),
        output_format=_format(query, accept, violations),
        output_compression=_number(query, "q", 0, _MAX_QUALITY, violations),
        strip=_strip(query, violations),
    )
    if violations:
        raise InvalidRequestError(violations)
    return UrlAsked(
        version=query.get("v", ""),
        expires=query.get("expires", ""),
        signature=query.get("signature", ""),
        rendition=None if rendition == Rendition() else rendition,
        by_accept=query.get("format") == _AUTO,
        download=query.get("download"),
    )


def _width(query: Mapping[str, str], widths: Collection[int], violations: dict[str, str]) -> int | None:
    width = _number(query, "w", 1, MAX_PIXELS_A_SIDE, violations)
    if width is not None and widths and width not in widths:
        violations["w"] = f"must be one of {', '.join(map(str, sorted(widths)))}"
    return width


def _height(query: Mapping[str, str], widths: Collection[int], violations: dict[str, str]) -> int | None:
    if widths and "h" in query:
        violations["h"] = "this service makes images of some widths only; leave it out and set w"
        return None
    return _number(query, "h", 1, MAX_PIXELS_A_SIDE, violations)


def _format(query: Mapping[str, str], accept: str, violations: dict[str, str]) -> str | None:
    wanted = query.get("format")
    if wanted == _AUTO:
        match = _ACCEPTED.search(accept)
        return _AUTO_FORMAT if match is not None and float(match[1] or 1) > 0 else None
    if wanted is not None and wanted not in _FORMATS:
        violations["format"] = f"must be one of {', '.join((*_FORMATS, _AUTO))}"
    return wanted


def _strip(query: Mapping[str, str], violations: dict[str, str]) -> bool:
    wanted = query.get("strip", "0")
    if wanted not in _FLAGS:
        violations["strip"] = "must be 0 or 1"
    return _FLAGS.get(wanted, False)


def _number(query: Mapping[str, str], name: str, least: int, most: int, violations: dict[str, str]) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if _NUMBER.fullmatch(text) is None or not least <= int(text) <= most:
        violations[name] = f"must be a whole number from {least} to {most}"
        return None
    return int(text)
