"""What an OpenAI-shaped provider says about its limits, and when to try again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from cacheserver.model import RateLimit, RateLimits

LONGEST_WAIT_S = 3_600.0
"""No wait longer than this is believed; asking once an hour does no harm."""

_NUMBER = re.compile(r"\d{1,12}(?:\.\d{1,9})?")
_DURATION_PART = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)(ms|s|m|h)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern}){{1,4}}")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0}
_WAIT_IN_TEXT = re.compile(r"try again (?:after|in) ([0-9.]{1,16})(?: second|([0-9hms.]{1,16}))", re.IGNORECASE)


def read_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """The limits in an answer's `x-ratelimit-*` headers; None if it has none we can read."""
    requests, tokens, images = (_rate_limit(headers, of) for of in ("requests", "tokens", "images"))
    if requests is None and tokens is None and images is None:
        return None
    return RateLimits(requests, tokens, images)


def retry_after_s(headers: Mapping[str, str], message: str, *, now_s: float) -> float | None:
    """Seconds to wait before the next call, from the most precise source an answer has; None if it has none.

    The order: `retry-after-ms`, `Retry-After` (seconds or a date), the limits that are used up, the text.
    At most LONGEST_WAIT_S. `now_s` is the wall clock, for dates.
    """
    limits = read_limits(headers)
    milliseconds = _seconds(headers.get("retry-after-ms", ""))
    waits = (
        milliseconds / 1_000 if milliseconds else None,
        _seconds(headers.get("retry-after", "")),
        _seconds_until(headers.get("retry-after", ""), now_s),
        limits.wait_s if limits else None,
        _seconds_in_text(message),
    )
    return next((min(wait, LONGEST_WAIT_S) for wait in waits if wait), None)


def _rate_limit(headers: Mapping[str, str], of: str) -> RateLimit | None:
    limit = _whole(headers.get(f"x-ratelimit-limit-{of}", ""))
    remaining = _whole(headers.get(f"x-ratelimit-remaining-{of}", ""))
    reset = headers.get(f"x-ratelimit-reset-{of}", "")
    reset_s = _seconds(reset) or _duration(reset)
    if limit is None and remaining is None and reset_s is None:
        return None
    return RateLimit(limit, remaining, reset_s)


def _whole(text: str) -> int | None:
    return int(float(text)) if _NUMBER.fullmatch(text) else None


def _seconds(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None


def _duration(text: str) -> float | None:
    """Seconds of a duration as Go writes it: 12ms, 1s, 6m0s."""
    if not _DURATION.fullmatch(text):
        return None
    return sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION_PART.findall(text))


def _seconds_until(date: str, now_s: float) -> float | None:
    try:
        moment = parsedate_to_datetime(date)
    except (ValueError, OverflowError):  # the second for a year or a zone of many digits
        return None
    # A date in UTC "without a place" (-0000) comes back naive.
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max((moment - datetime.fromtimestamp(now_s, UTC)).total_seconds(), 0.0)


def _seconds_in_text(message: str) -> float | None:
    match = _WAIT_IN_TEXT.search(message[:1_000])
    if match is None:
        return None
    number, unit = match.groups()
    return _duration(number + unit.rstrip(".")) if unit else _seconds(number)
