"""The headers of a picture: how long it may be kept by whom, who may show it, under which name it is saved."""

from __future__ import annotations

import re
from urllib.parse import quote

from cacheserver.http.delivery.access import Access
from cacheserver.model import CachedImage

_YEAR_S = 31_536_000
_MAX_NAME = 100
_EXTENSIONS = {"image/png": ("png",), "image/jpeg": ("jpg", "jpeg"), "image/webp": ("webp",)}
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\"\\/:*?<>|\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What no system takes in a file name, and what would write it backwards."""

SAFETY = {
    # A picture is never a page: whatever is hidden in one, no browser runs it with our origin.
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; sandbox",
}


def cache_control(access: Access, entry: CachedImage, *, is_version: bool, now_s: float) -> str:
    """Who may keep the picture, and how long it may be shown without asking.

    A URL that names the version it answers with can be kept for good: the bytes under it never change. Without one the
    key may get another picture (REFRESH replaces it), so every use is to be confirmed, at the price of a 304.
    """
    whose = "public" if access.is_public else "private"
    if not is_version or not access.is_by_url:
        return f"{whose}, no-cache"
    ends = [each for each in (entry.expire_time_s, access.expires_s) if each is not None]
    max_age_s = max(0, int(min([_YEAR_S, *(end_s - now_s for end_s in ends)])))
    return f"{whose}, max-age={max_age_s}, immutable"


def sharing(access: Access) -> dict[str, str]:
    """Which pages may show the picture: all, where the URL is the right to it; else those of our own origin."""
    if not access.is_by_url:
        return {"cross-origin-resource-policy": "same-origin"}
    return {"cross-origin-resource-policy": "cross-origin", "access-control-allow-origin": "*"}


def disposition(download: str | None, content_type: str) -> str:
    """Content-Disposition (RFC 6266): to be shown, or saved under this name, made safe.

    It always gets the extension of what the picture is: no name can make a program of it.
    """
    if download is None:
        return "inline"
    extensions = _EXTENSIONS.get(content_type, ("bin",))
    name = _UNSAFE.sub("_", download.replace("\\", "/").rpartition("/")[2]).strip(" .")[:_MAX_NAME]
    stem, _, extension = name.rpartition(".")
    if extension.lower() not in extensions or not stem:
        name = f"{name or 'image'}.{extensions[0]}"
    plain = name.encode("ascii", "replace").decode("ascii").replace("?", "_").replace("%", "_")
    told = f'attachment; filename="{plain}"'
    return told if plain == name else f"{told}; filename*=UTF-8''{quote(name, safe='')}"
