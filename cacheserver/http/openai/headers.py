"""On what terms a picture is wanted: `cache-control`, `idempotency-key`, and headers of our own.

`x-cacheserver-namespace`, `-priority`, `-tags`, `-use`, `-allow-degraded`, `-match-level`, `-variant-policy`,
`-candidates` and `-ttl` say over HTTP what fields of a GetImageRequest say over gRPC, in the words of the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import TypeVar

from cacheserver.calls.bounds import MAX_DURATION_S, MAX_REQUEST_ID, MAX_TAGS, TAG
from cacheserver.calls.call import Call
from cacheserver.calls.directives import read_cache_control
from cacheserver.http.openai.reading import Wanted
from cacheserver.http.status import HttpError
from cacheserver.model import CachePolicy, MatchLevel, Namespace, Priority, Terms, VariantPolicy

OURS = "x-cacheserver-"
"""Begins the headers that are ours."""

_USE = f"{OURS}use"
_NAMESPACE = f"{OURS}namespace"
_PRIORITY = f"{OURS}priority"
_TAGS = f"{OURS}tags"
_ALLOW_DEGRADED = f"{OURS}allow-degraded"
_MATCH_LEVEL = f"{OURS}match-level"
_VARIANT_POLICY = f"{OURS}variant-policy"
_CANDIDATES = f"{OURS}candidates"
_TTL = f"{OURS}ttl"
IDEMPOTENCY_KEY = "idempotency-key"

READ = ("cache-control", _USE, _PRIORITY, _TAGS, _ALLOW_DEGRADED, _MATCH_LEVEL, _VARIANT_POLICY, _CANDIDATES, _TTL)
"""The headers that terms are read from, but for the namespace's and the idempotency key."""

T = TypeVar("T")


def namespace_name(call: Call) -> str:
    """The namespace a call names; without a name, the only one its caller may use. Empty: the default one."""
    if name := call.metadata.get(_NAMESPACE):
        return name
    own = call.caller.namespaces
    return next(iter(own)) if own is not None and len(own) == 1 else ""


def use_of(call: Call) -> str:
    """What the picture is for, as the call says; empty if it does not."""
    return call.metadata.get(_USE, "")


def unknown_use(namespace: Namespace) -> HttpError:
    """The use that a call names is none of the namespace's."""
    known = ", ".join(namespace.quality_by_use) or "none"
    return _wrong(_USE, f"is not one of this namespace's uses: {known}")


def read_match_level(call: Call) -> MatchLevel | None:
    """The loosest match the call accepts, None if it does not say.

    Raises:
        HttpError: it is none.
    """
    return _read_choice(call.metadata, _MATCH_LEVEL, {each.name.lower(): each for each in MatchLevel})


def read_terms(call: Call, wanted: Wanted, namespace: Namespace) -> Terms:
    """The terms of a call. Raises HttpError, which names the header."""
    said = call.metadata
    directives = read_cache_control(said.get("cache-control", ""))
    priority = _read_choice(said, _PRIORITY, {each.name.lower(): each for each in Priority})
    return Terms(
        n=wanted.n,
        cache_policy=directives.cache_policy or CachePolicy.USE_CACHE,
        variant_policy=_read_choice(said, _VARIANT_POLICY, {str(each): each for each in VariantPolicy})
        or VariantPolicy.FIRST,
        max_age_s=directives.max_age_s,
        ttl_s=_read_ttl(said),
        deadline_s=call.deadline_s,
        priority=min(priority or namespace.default_priority, call.caller.max_priority),
        request_id=_read_request_id(said),
        tags=_read_tags(said),
        allow_degraded=_read_choice(said, _ALLOW_DEGRADED, {"true": True, "false": False}) or False,
        candidates=_read_candidates(said, namespace),
        no_transform=directives.no_transform,
        match_level=read_match_level(call),
        partial_images=wanted.partial_images,
    )


def _read_choice(said: Mapping[str, str], name: str, choices: Mapping[str, T]) -> T | None:
    if (value := said.get(name)) is None:
        return None
    if value.strip().lower() not in choices:
        raise _wrong(name, f"should be one of {', '.join(choices)}")
    return choices[value.strip().lower()]


def _read_ttl(said: Mapping[str, str]) -> float | None:
    if (value := said.get(_TTL)) is None:
        return None
    if not _is_count(value) or not 0 < int(value) <= MAX_DURATION_S:
        raise _wrong(_TTL, f"should be whole seconds, 1 to {MAX_DURATION_S:.0f}")
    return float(value)


def _read_candidates(said: Mapping[str, str], namespace: Namespace) -> int:
    if (value := said.get(_CANDIDATES)) is None:
        return 1
    if not _is_count(value) or not 1 <= int(value) <= namespace.max_candidates:
        raise _wrong(_CANDIDATES, f"should be a whole number, 1 to {namespace.max_candidates}")
    return int(value)


def _read_request_id(said: Mapping[str, str]) -> str:
    value = said.get(IDEMPOTENCY_KEY, "")
    if len(value) > MAX_REQUEST_ID or not value.isprintable():
        raise _wrong(IDEMPOTENCY_KEY, f"should be at most {MAX_REQUEST_ID} printable characters")
    return value


def _read_tags(said: Mapping[str, str]) -> tuple[str, ...]:
    if not (value := said.get(_TAGS)):
        return ()
    tags = tuple(dict.fromkeys(tag.strip() for tag in value.split(",")))
    if len(tags) > MAX_TAGS or not all(map(TAG.fullmatch, tags)):
        raise _wrong(_TAGS, f"should be at most {MAX_TAGS}, with commas between, each 1 to 64 of A-Z a-z 0-9 . _ : / -")
    return tags


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 10  # noqa: PLR2004 - more digits than any of ours has


def _wrong(name: str, text: str) -> HttpError:
    return HttpError(HTTPStatus.BAD_REQUEST, f"Invalid header '{name}': {text}.", param=name, code="invalid_value")
