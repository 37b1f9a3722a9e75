"""Conditional requests: RFC 9110 section 13, in the order of its section 13.2.2, as functions of values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache

_DATE_FORMS = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")
"""RFC 9110 section 5.6.7: the one to be written, and the two older ones that are still to be read."""

_TAG = re.compile(r'(?:W/)?"[^"]*"')


class Verdict(Enum):
    """What a request's conditions make of it."""

    GO_ON = "go on"
    NOT_MODIFIED = "not modified"
    FAILED = "failed"


def judge(headers: Mapping[str, str], *, etag: str, modified_s: int) -> Verdict:
    """What the conditions of a GET or HEAD say of a picture with this strong ETag, last modified then.

    `headers` are by their names in lower case. `modified_s` is in whole seconds since 1970, as Last-Modified tells it.
    A date that is none makes its condition void.
    """
    if (wanted := headers.get("if-match")) is not None:
        if not _is_listed(etag, wanted, weak=False):
            return Verdict.FAILED
    elif (since_s := read_date(headers.get("if-unmodified-since", ""))) is not None and modified_s > since_s:
        return Verdict.FAILED
    if (known := headers.get("if-none-match")) is not None:
        return Verdict.NOT_MODIFIED if _is_listed(etag, known, weak=True) else Verdict.GO_ON
    since_s = read_date(headers.get("if-modified-since", ""))
    return Verdict.NOT_MODIFIED if since_s is not None and modified_s <= since_s else Verdict.GO_ON


def allows_range(if_range: str | None, *, etag: str, modified_s: int) -> bool:
    """Whether If-Range (None: there is none) lets a part be sent: the picture is the one the caller has a part of.

    Compared strongly, so that a weak tag never fits, and a date only when it is exactly that of the picture.
    """
    if if_range is None:
        return True
    if if_range.endswith('"'):
        return if_range == etag
    return read_date(if_range) == modified_s


def read_date(text: str) -> int | None:
    """An HTTP date in seconds since 1970; None if it is none."""
    if not text:
        return None
    for form in _DATE_FORMS:
        try:
            return int(datetime.strptime(text, form).replace(tzinfo=UTC).timestamp())
        except ValueError:
            continue
    return None


@lru_cache(maxsize=1024)  # those of the pictures that are fetched most: to write one takes as long as to find a picture
def write_date(seconds: int) -> str:
    """Seconds since 1970 as an HTTP date."""
    return datetime.fromtimestamp(seconds, UTC).strftime(_DATE_FORMS[0])


def _is_listed(etag: str, header: str, *, weak: bool) -> bool:
    if header.strip() == "*":
        return True
    listed = _TAG.findall(header)
    return etag in listed or (weak and f"W/{etag}" in listed)
