"""Cache directives that callers know from HTTP: `cache-control` in (RFC 9111), `cache-status` out (RFC 9211)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cacheserver.model import CachedImage, CachePolicy, Served, Stale, TierName

_MAX_DELTA_S = 2**31
"""RFC 9111 section 1.2.2: what a larger number of seconds counts as."""

_MAX_DELTA_DIGITS = 10

_DIRECTIVE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:=(?:\"([^\"]*)\"|([^\s\"]*)))?")

_POLICIES = {
    "only-if-cached": CachePolicy.ONLY_IF_CACHED,
    "no-store": CachePolicy.NO_STORE,
    "no-cache": CachePolicy.REFRESH,
}
"""Where several apply the first counts: the one that spends least."""


@dataclass(frozen=True, slots=True)
class Directives:
    """What a `cache-control` header asks for. A message's own fields win over it."""

    cache_policy: CachePolicy | None = None
    max_age_s: float | None = None
    no_transform: bool = False


def read_cache_control(header: str) -> Directives:
    """The request directives of `header` that we know; malformed and unknown ones are ignored, as RFC 9111 says."""
    found: dict[str, str] = {}
    for piece in header.split(","):
        if match := _DIRECTIVE.fullmatch(piece.strip()):
            name, quoted, token = match.groups(default="")
            found.setdefault(name.lower(), quoted or token)
    policy = next((policy for name, policy in _POLICIES.items() if name in found), None)
    return Directives(policy, _delta_seconds(found.get("max-age", "")), no_transform="no-transform" in found)


_SLOWNESS = {tier: i for i, tier in enumerate(TierName)}
"""Tiers are named fastest first."""


def _delta_seconds(text: str) -> float | None:
    if not (text.isascii() and text.isdigit()):
        return None
    return float(min(int(text), _MAX_DELTA_S)) if len(text) <= _MAX_DELTA_DIGITS else float(_MAX_DELTA_S)


def slowest(answer: Sequence[Served]) -> Served:
    """The picture that came from furthest away."""
    return max(answer, key=lambda served: _SLOWNESS[served.tier])


def cache_status(served: Served, policy: CachePolicy, now_s: float) -> str:
    """The `cache-status` of an answer by its slowest picture.

    `ttl` is what is left of its freshness, absent when that never ends, below 0 of a stale one. Two parameters are our
    own: `derived` where the picture was made from another request's, and `age`, seconds since the picture was made.
    """
    return _status(served.entry, _way(served, policy), served.tier, now_s)


def stored_status(entry: CachedImage, detail: str, now_s: float) -> str:
    """The `cache-status` of a stored picture that is fetched by its key; `detail` says who had it."""
    return _status(entry, ["hit"], detail, now_s)


def _status(entry: CachedImage, way: list[str], detail: str, now_s: float) -> str:
    members = ["cacheserver", *way, f"detail={detail}"]
    if entry.derived_from:
        members.append("derived")
    if entry.expire_time_s is not None:
        members.append(f"ttl={math.floor(entry.expire_time_s - now_s)}")
    members.append(f"age={max(0, int(now_s - entry.create_time_s))}")
    return "; ".join(members)


def status_lasts_until_s(entry: CachedImage, now_s: float) -> float:
    """Until when a stored picture's `cache_status` stays what it is now: it is in whole seconds."""
    older_s = entry.create_time_s + max(0, int(now_s - entry.create_time_s)) + 1
    if entry.expire_time_s is None:
        return older_s
    return min(older_s, entry.expire_time_s - int(entry.expire_time_s - now_s))


def pending_status() -> str:
    """The `cache-status` of an answer that is on its way."""
    return "cacheserver; fwd=uri-miss; detail=pending"


def _way(served: Served, policy: CachePolicy) -> list[str]:
    if policy is CachePolicy.NO_STORE or served.would_hit is not None:
        return ["fwd=bypass"]
    if served.stale:
        return ["hit"] if served.stale is Stale.RENEWED else ["fwd=stale"]
    if served.collapsed:
        return ["fwd=uri-miss", "collapsed"]
    if served.tier is not TierName.UPSTREAM:
        return ["hit"]
    return ["fwd=request" if policy is CachePolicy.REFRESH else "fwd=uri-miss", "stored"]
