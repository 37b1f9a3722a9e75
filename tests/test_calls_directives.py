"""cache-control in, cache-status out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.calls.directives import (
    Directives,
    cache_status,
    pending_status,
    read_cache_control,
    status_lasts_until_s,
)
from cacheserver.model import CachedImage, CacheKey, CachePolicy, GeneratedImage, MatchLevel, Served, TierName

NOW_S = 1_800_000_000.0


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", Directives()),
        ("no-cache", Directives(CachePolicy.REFRESH)),
        ("No-Store", Directives(CachePolicy.NO_STORE)),
        ("only-if-cached, max-age=60", Directives(CachePolicy.ONLY_IF_CACHED, 60)),
        ('max-age="60"', Directives(None, 60)),
        ("max-age=0", Directives(None, 0)),
        ("max-age=60, max-age=5", Directives(None, 60)),
        ("max-age=99999999999999999999", Directives(None, 2**31)),
        ("no-store, no-cache", Directives(CachePolicy.NO_STORE)),
        ("no-cache, only-if-cached", Directives(CachePolicy.ONLY_IF_CACHED)),
        (" ,, no-cache ,", Directives(CachePolicy.REFRESH)),
        ("max-stale=5, min-fresh, x=y", Directives()),
        ("No-Transform, max-age=60", Directives(None, 60, no_transform=True)),
    ],
)
def test_known_directives_are_read(header: str, expected: Directives) -> None:
    assert read_cache_control(header) == expected


@pytest.mark.parametrize(
    "header",
    [
        "max-age",
        "max-age=",
        "max-age=-1",
        "max-age=1.5",
        "max-age=soon",
        "max-age=²",
        'x="no-cache',
        "no cache",
        "=",
        "no-cache;x",
    ],
)
def test_malformed_directives_are_ignored(header: str) -> None:
    assert read_cache_control(header) == Directives()


def served(
    tier: TierName, *, expire_time_s: float | None = None, collapsed: bool = False, derived_from: str = ""
) -> Served:
    image = GeneratedImage(b"x", "image/png", 1, 1, "", "m", "1x1", "low", "opaque")
    key = CacheKey("default", bytes(16), bytes(32), 0)
    entry = CachedImage(key, image, "default", bytes(32), NOW_S - 90, expire_time_s, derived_from=derived_from)
    return Served(entry, tier, MatchLevel.EXACT, collapsed=collapsed)


@pytest.mark.parametrize(
    ("answer", "policy", "expected"),
    [
        (served(TierName.MEMORY), CachePolicy.USE_CACHE, "cacheserver; hit; detail=memory; age=90"),
        (
            served(TierName.S3, expire_time_s=NOW_S + 3600),
            CachePolicy.USE_CACHE,
            "cacheserver; hit; detail=s3; ttl=3600; age=90",
        ),
        (
            served(TierName.REDIS, derived_from="v1.master"),
            CachePolicy.USE_CACHE,
            "cacheserver; hit; detail=redis; derived; age=90",
        ),
        (
            served(TierName.UPSTREAM),
            CachePolicy.USE_CACHE,
            "cacheserver; fwd=uri-miss; stored; detail=upstream; age=90",
        ),
        (served(TierName.UPSTREAM), CachePolicy.REFRESH, "cacheserver; fwd=request; stored; detail=upstream; age=90"),
        (served(TierName.UPSTREAM), CachePolicy.NO_STORE, "cacheserver; fwd=bypass; detail=upstream; age=90"),
        (
            served(TierName.UPSTREAM, collapsed=True),
            CachePolicy.USE_CACHE,
            "cacheserver; fwd=uri-miss; collapsed; detail=upstream; age=90",
        ),
    ],
)
def test_cache_status_says_where_the_picture_came_from(answer: Served, policy: CachePolicy, expected: str) -> None:
    assert cache_status(answer, policy, NOW_S) == expected


moments = st.integers(-40, 400).map(lambda quarter: NOW_S + quarter / 4)


@given(moments, st.none() | moments, st.integers(0, 20))
def test_cache_status_stays_what_it_is_for_as_long_as_it_is_said_to(
    now_s: float, expire_time_s: float | None, quarters: int
) -> None:
    answer = served(TierName.MEMORY, expire_time_s=expire_time_s)
    until_s = status_lasts_until_s(answer.entry, now_s)
    assert until_s <= now_s + 1
    later_s = now_s + quarters / 4
    if later_s < until_s:
        policy = CachePolicy.USE_CACHE
        assert cache_status(answer, policy, later_s) == cache_status(answer, policy, now_s)


def test_cache_status_of_an_answer_on_its_way() -> None:
    assert pending_status() == "cacheserver; fwd=uri-miss; detail=pending"
