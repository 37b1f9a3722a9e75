"""What the admin API tells of, as messages."""

from __future__ import annotations

from collections.abc import Mapping

from cacheserver.model import (
    Alarm,
    AlarmState,
    Attempt,
    AttemptOutcome,
    BudgetPeriod,
    BudgetScope,
    BudgetState,
    CachedImage,
    CacheKey,
    PromptKind,
    RecordedPrompt,
    SampledMatch,
    UpstreamHealth,
    UpstreamState,
    Usage,
)
from cacheserver.pb import admin_pb2 as pb
from cacheserver.rpc.replies import duration, text, timestamp

_HEALTH = {
    UpstreamHealth.WELL: pb.UPSTREAM_HEALTH_WELL,
    UpstreamHealth.PAUSED: pb.UPSTREAM_HEALTH_PAUSED,
    UpstreamHealth.DOWN: pb.UPSTREAM_HEALTH_DOWN,
    UpstreamHealth.NOT_ENTITLED: pb.UPSTREAM_HEALTH_NOT_ENTITLED,
    UpstreamHealth.NO_QUOTA: pb.UPSTREAM_HEALTH_NO_QUOTA,
}
_SCOPES = {
    BudgetScope.GLOBAL: pb.BUDGET_SCOPE_GLOBAL,
    BudgetScope.NAMESPACE: pb.BUDGET_SCOPE_NAMESPACE,
    BudgetScope.CALLER: pb.BUDGET_SCOPE_CALLER,
}
_PERIODS = {
    BudgetPeriod.DAY: pb.BUDGET_PERIOD_DAY,
    BudgetPeriod.MONTH: pb.BUDGET_PERIOD_MONTH,
}
_OUTCOMES = {
    AttemptOutcome.SENT: pb.ATTEMPT_OUTCOME_SENT,
    AttemptOutcome.SETTLED: pb.ATTEMPT_OUTCOME_SETTLED,
    AttemptOutcome.NOT_BILLED: pb.ATTEMPT_OUTCOME_NOT_BILLED,
    AttemptOutcome.UNKNOWN: pb.ATTEMPT_OUTCOME_UNKNOWN,
}
_ALARM_STATES = {
    AlarmState.QUIET: pb.ALARM_STATE_QUIET,
    AlarmState.WAITING: pb.ALARM_STATE_WAITING,
    AlarmState.RINGING: pb.ALARM_STATE_RINGING,
}


def alarm(state: Alarm) -> pb.Alarm:
    """An alarm as it stands."""
    rule = state.rule
    return pb.Alarm(
        name=rule.name,
        kind=rule.kind,
        state=_ALARM_STATES[state.state],
        value=state.value,
        threshold=rule.threshold,
        since=timestamp(state.since_s),
        runbook_url=rule.runbook_url,
    )


PROMPT_KINDS: Mapping[int, PromptKind] = {
    pb.PROMPT_KIND_MISSED: PromptKind.MISSED,
    pb.PROMPT_KIND_TURNED_AWAY: PromptKind.TURNED_AWAY,
    pb.PROMPT_KIND_EXPIRING: PromptKind.EXPIRING,
    pb.PROMPT_KIND_REROLLED: PromptKind.REROLLED,
    pb.PROMPT_KIND_DEGRADED: PromptKind.DEGRADED,
    pb.PROMPT_KIND_GENERATED: PromptKind.GENERATED,
}


def upstream(state: UpstreamState) -> pb.Upstream:
    """An upstream as the pool sees it."""
    return pb.Upstream(
        name=state.name,
        limit_group=state.limit_group,
        models=state.models,
        health=_HEALTH[state.health],
        weight=state.weight,
        percent=state.percent,
        rank=state.rank,
        price_factor=state.price_factor,
        success_rate=state.success_rate,
        latency=None if state.latency_s is None else duration(state.latency_s),
        in_flight=state.in_flight,
        calls=state.calls,
        images_per_minute=state.images_per_minute,
    )


def budget(state: BudgetState) -> pb.Budget:
    """A budget and how far it is used up."""
    return pb.Budget(
        name=state.budget.name,
        scope=_SCOPES[state.budget.scope],
        subject=state.budget.subject,
        period=_PERIODS[state.budget.period],
        limit_microusd=state.budget.limit_microusd,
        spent_microusd=state.spent_microusd,
        reserved_microusd=state.reserved_microusd,
        reset_time=timestamp(state.reset_time_s),
    )


def ledger_row(attempt: Attempt) -> pb.LedgerRow:
    """One call to an upstream."""
    return pb.LedgerRow(
        id=attempt.id,
        namespace=attempt.namespace,
        caller=attempt.caller,
        upstream=attempt.upstream,
        model=attempt.model,
        images=attempt.images,
        estimate_microusd=attempt.estimate_microusd,
        start_time=timestamp(attempt.start_time_s),
        tags=attempt.tags,
        outcome=_OUTCOMES[attempt.outcome],
        end_time=None if attempt.end_time_s is None else timestamp(attempt.end_time_s),
        cost_microusd=attempt.cost_microusd,
        reason=attempt.reason,
        upstream_request_id=attempt.upstream_request_id,
        usage=None if attempt.usage is None else _usage(attempt.usage),
        quality=attempt.quality,
    )


def review(key: CacheKey, entry: CachedImage) -> pb.Review:
    """A picture that waits to have `key`."""
    image = entry.image
    return pb.Review(
        key=key.name,
        namespace=entry.namespace,
        model=image.model,
        width=image.width,
        height=image.height,
        score=image.score,
        create_time=timestamp(entry.create_time_s),
        content_type=image.content_type,
        size_bytes=entry.size_bytes,
        paid_microusd=image.paid_microusd,
    )


def review_header(key: CacheKey, entry: CachedImage) -> pb.ReviewHeader:
    """What comes before the bytes of a picture that waits to have `key`."""
    image = entry.image
    return pb.ReviewHeader(
        review=review(key, entry),
        digest=f"sha256:{image.sha256}",
        quality=image.quality,
        revised_prompt=text(image.revised_prompt),
        won_against=image.won_against,
        tags=entry.tags,
    )


def match(hit: SampledMatch) -> pb.Match:
    """A similar hit that is kept for review."""
    return pb.Match(
        id=hit.id,
        time=timestamp(hit.time_s),
        namespace=hit.namespace,
        level=f"MATCH_LEVEL_{hit.level.name}",
        key=hit.key.name,
        matched_key=hit.matched_key.name,
        prompt=text(hit.prompt),
    )


def recorded_prompt(record: RecordedPrompt) -> pb.RecordedPrompt:
    """A request that callers made, as it may be sent again."""
    request = record.request
    message = pb.RecordedPrompt(
        kind=f"PROMPT_KIND_{record.kind.name}",
        count=record.count,
        last_time=timestamp(record.last_time_s),
    )
    message.request.namespace = record.namespace
    message.request.n = record.n
    spec = message.request.spec
    spec.prompt = text(request.prompt)
    for name in ("model", "size", "quality", "background", "output_format", "output_compression", "moderation"):
        setattr(spec, name, getattr(request, name))
    if request.seed is not None:
        spec.seed = request.seed
    if request.extra:
        spec.extra.update(request.extra)
    return message


def _usage(usage: Usage) -> pb.TokenUsage:
    return pb.TokenUsage(
        input_tokens=usage.input_tokens,
        input_text_tokens=usage.input_text_tokens,
        input_image_tokens=usage.input_image_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
    )
