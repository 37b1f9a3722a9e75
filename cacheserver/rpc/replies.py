"""Values as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from cacheserver.accounting.books import Stats
from cacheserver.accounting.reading import Query, Report
from cacheserver.calls.directives import slowest
from cacheserver.figures import LATENCY_BOUNDS_S, Row, total_of
from cacheserver.identity import FieldDifference
from cacheserver.model import (
    CachedImage,
    CacheKey,
    Identity,
    MatchLevel,
    Outcome,
    Pending,
    Reply,
    Served,
    TierName,
    Usage,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.recall import NearMiss, Remembered, Told
from cacheserver.rpc import wire

TIERS = {
    TierName.MEMORY: pb.TIER_MEMORY,
    TierName.REDIS: pb.TIER_REDIS,
    TierName.DISK: pb.TIER_DISK,
    TierName.S3: pb.TIER_S3,
    TierName.JOURNAL: pb.TIER_JOURNAL,
    TierName.UPSTREAM: pb.TIER_UPSTREAM,
}
"""Every tier, fastest first."""

_MATCH_LEVELS = {
    MatchLevel.EXACT: pb.MATCH_LEVEL_EXACT,
    MatchLevel.STANDARD: pb.MATCH_LEVEL_STANDARD,
    MatchLevel.CATALOG: pb.MATCH_LEVEL_CATALOG,
    MatchLevel.CANONICAL: pb.MATCH_LEVEL_CANONICAL,
    MatchLevel.SEMANTIC: pb.MATCH_LEVEL_SEMANTIC,
}
_OUTCOMES = {
    Outcome.HIT: pb.OUTCOME_HIT,
    Outcome.MISS: pb.OUTCOME_MISS,
    Outcome.COLLAPSED: pb.OUTCOME_COLLAPSED,
    Outcome.PENDING: pb.OUTCOME_PENDING,
    Outcome.NOT_CACHED: pb.OUTCOME_NOT_CACHED,
    Outcome.ERROR: pb.OUTCOME_ERROR,
    Outcome.NEGATIVE: pb.OUTCOME_NEGATIVE,
    Outcome.STALE: pb.OUTCOME_STALE,
    Outcome.OBSERVED: pb.OUTCOME_OBSERVED,
    Outcome.DERIVED: pb.OUTCOME_DERIVED,
}


def image_facts(entry: CachedImage) -> pb.Image:
    """The stored facts of a picture, without content."""
    image = entry.image
    facts = pb.Image(
        content_type=image.content_type,
        width=image.width,
        height=image.height,
        key=entry.key.name,
        variant=entry.key.variant,
        create_time=timestamp(entry.create_time_s),
        digest=f"sha256:{image.sha256}",
        size_bytes=entry.size_bytes,
        model=image.model,
        size=image.size,
        quality=image.quality,
        background=image.background,
        revised_prompt=text(image.revised_prompt),
        seed=image.seed,
        upstream_request_id=image.upstream_request_id,
        generation_time=duration(image.generation_s),
        paid_microusd=image.paid_microusd,
        score=image.score,
        won_against=image.won_against,
    )
    if image.usage is not None:
        facts.usage.CopyFrom(_usage(image.usage))
    return facts


def status_of_image(served: Served) -> pb.CacheStatus:
    """Where one picture came from and what it cost."""
    return _status(served, TIERS[served.tier], served.entry.expire_time_s, served.entry.derived_from)


def _status(facts: Served | Told, tier: pb.Tier, expire_time_s: float | None, derived_from: str) -> pb.CacheStatus:
    return pb.CacheStatus(
        tier=tier,
        state=pb.STATE_READY,
        matched=_MATCH_LEVELS[facts.matched],
        matched_key=facts.matched_key,
        derived_from=derived_from,
        collapsed=facts.collapsed,
        stale=bool(facts.stale),
        degraded=facts.degraded,
        expire_time=None if expire_time_s is None else timestamp(expire_time_s),
        cost_microusd=facts.cost_microusd,
        saved_microusd=facts.saved_microusd,
    )


def finished(served: Served) -> Reply:
    """The whole GetImageResponse with one picture inline."""
    status = status_of_image(served)
    rest = pb.GetImageResponse(status=status, image_status=[status])
    raw, data_start = wire.one_image_response(image_facts(served.entry), served.entry.image.data, rest)
    return Reply(raw, data_start, served.matched, served.saved_microusd)


def status_of_answer(answer: Sequence[Served]) -> pb.CacheStatus:
    """The status of several pictures together: the slowest tier, the loosest match, the first to expire, sums.

    Of several that were derived it names the first one's master.
    """
    expire_times = [served.entry.expire_time_s for served in answer if served.entry.expire_time_s is not None]
    return pb.CacheStatus(
        tier=TIERS[slowest(answer).tier],
        state=pb.STATE_READY,
        matched=_MATCH_LEVELS[max(served.matched for served in answer)],
        matched_key=next((served.matched_key for served in answer if served.is_similar), ""),
        derived_from=next((served.entry.derived_from for served in answer if served.entry.derived_from), ""),
        collapsed=any(served.collapsed for served in answer),
        stale=any(served.stale for served in answer),
        degraded=any(served.degraded for served in answer),
        expire_time=timestamp(min(expire_times)) if expire_times else None,
        cost_microusd=sum(served.cost_microusd for served in answer),
        saved_microusd=sum(served.saved_microusd for served in answer),
    )


def pending_status(pending: Pending) -> pb.CacheStatus:
    """The status of an answer that is on its way."""
    if pending.in_review:
        return pb.CacheStatus(state=pb.STATE_PENDING_REVIEW)
    return pb.CacheStatus(state=pb.STATE_PENDING, estimated_wait=duration(pending.estimated_wait_s))


def pending_image(key: CacheKey) -> pb.Image:
    """A picture that is on its way: its key and nothing else."""
    return pb.Image(key=key.name)


def pending_response(pending: Pending) -> pb.GetImageResponse:
    """An answer that is on its way."""
    status = pending_status(pending)
    images = [pending_image(key) for key in pending.keys]
    return pb.GetImageResponse(images=images, status=status, image_status=[status] * len(images))


def explanation(identity: Identity, canonical_prompt: str) -> pb.Explanation:
    """One request's way to its key, and the canonical form of its prompt."""
    return pb.Explanation(
        normalized_prompt=identity.normalized_prompt,
        canonical_identity=identity.canonical.decode(),
        key=identity.key.name,
        profile=identity.profile,
        canonical_prompt=canonical_prompt,
    )


def differences(found: Sequence[FieldDifference]) -> list[pb.FieldDifference]:
    """Where two identities differ."""
    return [pb.FieldDifference(field=d.field, value=d.value, other_value=d.other_value) for d in found]


def call_explained(call: Remembered, nearest: NearMiss | None) -> pb.ExplainCallResponse:
    """What became of a call."""
    response = pb.ExplainCallResponse(
        rpc=call.rpc,
        time=timestamp(call.time_s),
        caller=call.caller,
        namespace=call.namespace,
        latency=duration(call.seconds),
        reason=call.reason,
        images=[pb.AnsweredImage(key=e.key.name, status=_told_status(e), billed=e.billed) for e in call.images],
    )
    if nearest is not None:
        response.nearest.key = nearest.key.name
        response.nearest.field = nearest.field
        response.nearest.value = text(nearest.value)
        response.nearest.cached_value = text(nearest.cached_value)
        response.nearest.likeness = nearest.likeness
    return response


def _told_status(told: Told) -> pb.CacheStatus:
    if told.tier is None:
        return pb.CacheStatus(state=pb.STATE_PENDING)
    return _status(told, TIERS[told.tier], told.expire_time_s, told.derived_from)


def stats_response(stats: Stats) -> pb.GetStatsResponse:
    """The books at one moment."""
    return pb.GetStatsResponse(
        start_time=timestamp(stats.start_time_s),
        rows=[_stats_row(row) for row in stats.rows],
        total=_stats_row(stats.total),
        paid_unknown=stats.paid_unknown,
        unsaved=stats.unsaved,
        corrupt=tier_counts(stats.corrupt),
        upstream_calls=stats.upstream_calls,
        latency_bounds_s=LATENCY_BOUNDS_S,
    )


def report_response(report: Report, query: Query) -> pb.GetStatsResponse:
    """The figures of all replicas for a span of time: those of one process stay out of it."""
    start_s = report.start_s if query.since_s is None else query.since_s
    return pb.GetStatsResponse(
        start_time=None if start_s is None else timestamp(start_s),
        rows=[_stats_row(row) for row in report.rows],
        total=_stats_row(total_of(report.rows)),
        latency_bounds_s=LATENCY_BOUNDS_S,
    )


def tier_counts(counts: Mapping[TierName, int]) -> list[pb.TierCount]:
    """Counts per tier, fastest first."""
    return [pb.TierCount(tier=TIERS[tier], count=counts[tier]) for tier in TIERS if tier in counts]


def text(stored: str) -> str:
    """`stored` as a message may carry it: entries of earlier releases can hold half a surrogate pair."""
    return stored.encode("utf-8", "replace").decode()


def duration(seconds: float) -> Duration:
    """`seconds` as a message, to the microsecond."""
    message = Duration()
    message.FromMicroseconds(round(seconds * 1_000_000))
    return message


def timestamp(seconds: float) -> Timestamp:
    """Seconds since 1970 as a message, to the microsecond."""
    message = Timestamp()
    message.FromMicroseconds(round(seconds * 1_000_000))
    return message


def _stats_row(row: Row) -> pb.StatsRow:
    return pb.StatsRow(
        namespace=row.namespace,
        outcome=pb.OUTCOME_UNSPECIFIED if row.outcome is None else _OUTCOMES[row.outcome],
        tier=pb.TIER_UNSPECIFIED if row.tier is None else TIERS[row.tier],
        requests=row.requests,
        image_bytes=row.image_bytes,
        latency_sum=duration(row.seconds),
        spent_microusd=row.spent_microusd,
        saved_microusd=row.saved_microusd,
        coalesced_microusd=row.coalesced_microusd,
        unknown_microusd=row.unknown_microusd,
        degraded=row.degraded,
        model=row.model,
        quality=row.quality,
        caller=row.caller,
        start_time=None if row.start_s is None else timestamp(row.start_s),
        latency_counts=row.latency_counts,
        would_cost_microusd=row.would_cost_microusd,
        settled_calls=row.settled_calls,
        unknown_calls=row.unknown_calls,
        open_calls=row.open_calls,
        open_microusd=row.open_microusd,
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        input_tokens=usage.input_tokens,
        input_text_tokens=usage.input_text_tokens,
        input_image_tokens=usage.input_image_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
    )
