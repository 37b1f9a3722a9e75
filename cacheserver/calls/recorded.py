"""Which calls are worth recording, and as what: for namespaces with store_prompts."""

from __future__ import annotations

from collections.abc import Sequence

from cacheserver.errors import (
    CannotAffordError,
    LedgerUnavailableError,
    NotCachedError,
    QueueFullError,
    UpstreamDownError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
from cacheserver.model import CachedImage, PromptKind, Served, Terms, TierName, VariantPolicy

_TURNED_AWAY = (
    CannotAffordError,
    LedgerUnavailableError,
    QueueFullError,
    UpstreamDownError,
    UpstreamLimitedError,
    UpstreamNotEntitledError,
    UpstreamQuotaError,
)
"""What the caller's request is not to blame for, and a warm-up at another time may make good."""

_SOON = 0.1
"""The last part of an entry's lifetime, as a share of it."""


def kinds_of_answer(answer: Sequence[Served], terms: Terms, now_s: float) -> set[PromptKind]:
    """What a call that was answered is recorded as."""
    kinds = set()
    if terms.variant_policy is VariantPolicy.NEXT:
        kinds.add(PromptKind.REROLLED)
    for served in answer:
        if served.degraded:
            kinds.add(PromptKind.DEGRADED)
        elif served.tier is TierName.UPSTREAM and served.would_hit is None:
            kinds.add(PromptKind.GENERATED)
        elif served.tier is not TierName.UPSTREAM and _expires_soon(served.entry, now_s):
            kinds.add(PromptKind.EXPIRING)
    return kinds


def kind_of_failure(error: Exception) -> PromptKind | None:
    """What a call that failed is recorded as; None: not at all."""
    if isinstance(error, NotCachedError):
        return PromptKind.MISSED
    return PromptKind.TURNED_AWAY if isinstance(error, _TURNED_AWAY) else None


def _expires_soon(entry: CachedImage, now_s: float) -> bool:
    if entry.expire_time_s is None or entry.sliding_s:  # what is asked for lives on
        return False
    return entry.expire_time_s - now_s < _SOON * (entry.expire_time_s - entry.create_time_s)
