"""Builds the messages of the API and reads its answers; does no I/O."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache, lru_cache
from itertools import chain
from typing import Any, Protocol, TypeVar, Unpack

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from cacheserver.client.errors import InvalidRequestError
from cacheserver.client.values import (
    AnsweredImage,
    CacheStatus,
    CallExplanation,
    Delivery,
    ExplainResult,
    Explanation,
    FieldDifference,
    FindResult,
    Found,
    Image,
    ImageResult,
    ImageSpec,
    InputImage,
    Live,
    NearMiss,
    Presence,
    PurgeResult,
    PutResult,
    SpecOptions,
    State,
    Stats,
    StatsRow,
    TierLive,
)
from cacheserver.model import (
    CachePolicy,
    InputRole,
    MatchLevel,
    Outcome,
    Priority,
    StatsField,
    StatsSpan,
    TierName,
    Usage,
    VariantPolicy,
)
from cacheserver.pb import admin_pb2 as admin_pb
from cacheserver.pb import promptcache_pb2 as pb

_CHUNK_BYTES = 256 * 1024

_PAYS_EVERY_TIME = (CachePolicy.REFRESH, CachePolicy.NO_STORE)

_E = TypeVar("_E", bound=Enum)


class _WireEnum(Protocol):
    """A protobuf enum: every value's name is a prefix and the name our own enum has for it."""

    def Name(self, number: int) -> str: ...  # noqa: N802 - protobuf's name
    def values(self) -> Sequence[int]: ...
    def __hash__(self) -> int: ...


# --- requests ---


def spec_of(prompt: str | ImageSpec, options: Mapping[str, Any]) -> ImageSpec:
    """What decides the picture of a call: of its `options`, those of a spec go before what the prompt says."""
    fields = SpecOptions.__optional_keys__
    return _merged(prompt, {name: value for name, value in options.items() if name in fields})


def spec_message(prompt: str | ImageSpec, **options: Unpack[SpecOptions]) -> pb.ImageSpec:
    """The message for a prompt; `options` that are not None go before what an ImageSpec says.

    Raises:
        InvalidRequestError: a text is no valid Unicode, a number too large, or `extra` no JSON.
    """
    spec = _merged(prompt, options)
    try:
        return pb.ImageSpec(
            prompt=spec.prompt,
            model=spec.model,
            size=spec.size,
            quality=spec.quality,
            background=spec.background,
            output_format=spec.output_format,
            output_compression=spec.output_compression,
            moderation=spec.moderation,
            seed=spec.seed,
            extra=None if spec.extra is None else dict(spec.extra),
            inputs=[
                pb.InputImage(
                    role=f"INPUT_ROLE_{image.role.name}",
                    data=image.data,
                    # The message has one of them, the last that is set.
                    digest=image.digest if image.data is None else None,
                )
                for image in spec.inputs or ()
            ],
        )
    except (TypeError, ValueError) as exc:
        raise unsendable("spec", exc) from None  # the cause may carry the prompt


def _merged(prompt: str | ImageSpec, options: Mapping[str, Any]) -> ImageSpec:
    given = {name: value for name, value in options.items() if value is not None}
    spec = prompt if isinstance(prompt, ImageSpec) else ImageSpec(prompt)
    return replace(spec, **given) if given else spec


def image_request(  # noqa: PLR0913 - one keyword per field of the message
    prompt: str | ImageSpec | None,
    *,
    key: str | None = None,
    namespace: str | None = None,
    n: int = 1,
    cache_policy: CachePolicy | None = None,
    max_age_s: float | None = None,
    ttl_s: float | None = None,
    max_wait_s: float | None = None,
    variant_policy: VariantPolicy | None = None,
    exclude_keys: Sequence[str] = (),
    delivery: Delivery | None = None,
    max_inline_bytes: int | None = None,
    priority: Priority | None = None,
    request_id: str | None = None,
    tags: Sequence[str] = (),
    allow_degraded: bool = False,
    use: str | None = None,
    candidates: int | None = None,
    match_level: MatchLevel | None = None,
    **spec: Unpack[SpecOptions],
) -> pb.GetImageRequest:
    """The message that asks for pictures by prompt, or for one by `key`; see GetOptions.

    Raises:
        InvalidRequestError: the values cannot be sent.
        TypeError: neither or both of `prompt` and `key`, or an option nobody knows.
    """
    if (prompt is None) == (key is None):
        raise TypeError("pass either a prompt or a key")
    if key is not None and any(value is not None for value in spec.values()):
        raise TypeError(f"a key names a finished picture: leave out {', '.join(spec)}")
    if not request_id and (variant_policy is VariantPolicy.NEXT or cache_policy in _PAYS_EVERY_TIME):
        request_id = uuid.uuid4().hex  # a retry of the call must not pay for a second picture
    try:
        return pb.GetImageRequest(
            namespace=namespace,
            spec=None if prompt is None else spec_message(prompt, **spec),
            key=key,
            n=None if n == 1 else n,
            cache_policy=_name("CACHE_POLICY", cache_policy),
            max_age=_duration(max_age_s),
            ttl=_duration(ttl_s),
            max_wait=_duration(max_wait_s),
            variant_policy=_name("VARIANT_POLICY", variant_policy),
            exclude_keys=exclude_keys,
            delivery=_name("DELIVERY", delivery),
            max_inline_bytes=max_inline_bytes,
            priority=_name("PRIORITY", priority),
            request_id=request_id,
            tags=tags,
            allow_degraded=allow_degraded,
            use=use,
            candidates=candidates,
            match_level=_name("MATCH_LEVEL", match_level),
        )
    except (OverflowError, ValueError) as exc:
        raise unsendable("request", exc) from None


def find_request(items: Sequence[str | ImageSpec], namespace: str | None) -> pb.FindCachedRequest:
    """The message that asks where the pictures of these prompts are."""
    return pb.FindCachedRequest(namespace=namespace, items=[pb.FindItem(spec=spec_message(each)) for each in items])


def put_requests(  # noqa: PLR0913 - one keyword per field of the message
    data: bytes,
    prompt: str | ImageSpec,
    *,
    namespace: str | None = None,
    replace_first: bool = False,
    tags: Sequence[str] = (),
    ttl_s: float | None = None,
    paid_microusd: int = 0,
    create_time: datetime | None = None,
) -> Iterator[pb.PutImageRequest]:
    """The messages that store `data`: a header with its digest, then chunks made as they are asked for."""
    header = pb.PutImageHeader(
        namespace=namespace,
        spec=spec_message(prompt),
        replace=replace_first,
        tags=tags,
        digest=f"sha256:{hashlib.sha256(data).hexdigest()}",
        ttl=_duration(ttl_s),
        paid_microusd=paid_microusd,
        create_time=create_time,
    )
    starts = range(0, len(data), _CHUNK_BYTES)
    chunks = (pb.PutImageRequest(chunk=data[start : start + _CHUNK_BYTES]) for start in starts)
    return chain([pb.PutImageRequest(header=header)], chunks)


def purge_request(  # noqa: PLR0913 - one keyword per field of the message
    *,
    prompt: str | ImageSpec | None,
    key: str | None,
    tag: str | None,
    everything: bool,
    namespace: str | None,
    dry_run: bool,
) -> pb.PurgeImagesRequest:
    """The message that removes pictures.

    Raises:
        TypeError: not exactly one of `prompt`, `key`, `tag` and `everything`.
    """
    if [prompt is not None, key is not None, tag is not None, everything].count(True) != 1:
        raise TypeError("pass exactly one of prompt, key, tag and everything")
    return pb.PurgeImagesRequest(
        namespace=namespace,
        key=key,
        spec=None if prompt is None else spec_message(prompt),
        tag=tag,
        everything=everything or None,
        dry_run=dry_run,
    )


def explain_request(
    prompt: str | ImageSpec,
    other: str | ImageSpec | None,
    *,
    namespace: str | None,
    match_level: MatchLevel | None,
) -> pb.ExplainKeyRequest:
    """The message that asks how a request becomes its key."""
    return pb.ExplainKeyRequest(
        namespace=namespace,
        spec=spec_message(prompt),
        other=None if other is None else spec_message(other),
        match_level=_name("MATCH_LEVEL", match_level),
    )


def stats_request(
    *,
    namespace: str | None,
    since: datetime | None,
    until: datetime | None,
    span: StatsSpan | None,
    by: Sequence[StatsField] | None,
) -> pb.GetStatsRequest:
    """The message that asks for counters."""
    return pb.GetStatsRequest(
        namespace=namespace,
        since=since,
        until=until,
        span=_name("STATS_SPAN", span),
        by=[f"STATS_FIELD_{field.name}" for field in by or ()],
    )


# --- answers ---


def read_result(response: pb.GetImageResponse, call_id: str = "") -> ImageResult:
    """The answer to GetImage."""
    return ImageResult(
        images=tuple(map(read_image, response.images)),
        status=read_status(response.status),
        image_status=tuple(map(read_status, response.image_status)),
        call_id=call_id,
    )


def read_image(image: pb.Image) -> Image:
    """One picture."""
    return Image(
        key=image.key,
        variant=image.variant,
        data=image.data if image.HasField("data") else None,
        url=image.url if image.HasField("url") else None,
        url_expire_time=time_of(image, "url_expire_time"),
        content_type=image.content_type,
        width=image.width,
        height=image.height,
        size_bytes=image.size_bytes,
        digest=image.digest,
        create_time=time_of(image, "create_time"),
        model=image.model,
        size=image.size,
        quality=image.quality,
        background=image.background,
        revised_prompt=image.revised_prompt,
        seed=image.seed if image.HasField("seed") else None,
        usage=read_usage(image.usage) if image.HasField("usage") else None,
        upstream_request_id=image.upstream_request_id,
        generation_s=seconds_of(image.generation_time),
        paid_microusd=image.paid_microusd,
        score=image.score if image.HasField("score") else None,
        won_against=image.won_against,
    )


def read_status(status: pb.CacheStatus) -> CacheStatus:
    """Where a picture came from."""
    return _read_status(status.SerializeToString())


@lru_cache(maxsize=256)  # hits are much alike
def _read_status(raw: bytes) -> CacheStatus:
    status = pb.CacheStatus.FromString(raw)
    return CacheStatus(
        tier=member(TierName, pb.Tier, "TIER", status.tier),
        state=member(State, pb.State, "STATE", status.state),
        matched=member(MatchLevel, pb.MatchLevel, "MATCH_LEVEL", status.matched),
        matched_key=status.matched_key,
        derived_from=status.derived_from,
        collapsed=status.collapsed,
        stale=status.stale,
        degraded=status.degraded,
        expire_time=time_of(status, "expire_time"),
        estimated_wait_s=seconds_of(status.estimated_wait),
        cost_microusd=status.cost_microusd,
        saved_microusd=status.saved_microusd,
    )


def read_found(response: pb.FindCachedResponse) -> FindResult:
    """The answer to FindCached."""
    return FindResult(
        items=tuple(
            Found(
                key=item.key,
                presence=member(Presence, pb.Presence, "PRESENCE", item.presence) or Presence.ABSENT,
                tier=member(TierName, pb.Tier, "TIER", item.tier),
            )
            for item in response.items
        ),
        unknown_tiers=tuple(
            tier for number in response.unknown_tiers if (tier := member(TierName, pb.Tier, "TIER", number))
        ),
    )


def read_put(response: pb.PutImageResponse) -> PutResult:
    """The answer to PutImage."""
    return PutResult(image=read_image(response.image), created=response.created)


def read_purge(response: pb.PurgeImagesResponse) -> PurgeResult:
    """The answer to PurgeImages."""
    return PurgeResult(images=response.images, tiers=_per_tier(response.tiers), is_reclaiming=response.reclaiming)


def read_explained(response: pb.ExplainKeyResponse) -> ExplainResult:
    """The answer to ExplainKey."""
    return ExplainResult(
        explanation=_explanation(response.explanation),
        other=_explanation(response.other) if response.HasField("other") else None,
        differences=tuple(FieldDifference(each.field, each.value, each.other_value) for each in response.differences),
    )


def read_call(response: pb.ExplainCallResponse) -> CallExplanation:
    """The answer to ExplainCall."""
    near = response.nearest
    return CallExplanation(
        rpc=response.rpc,
        time=time_of(response, "time"),
        caller=response.caller,
        namespace=response.namespace,
        latency_s=seconds_of(response.latency),
        reason=response.reason,
        images=tuple(AnsweredImage(each.key, read_status(each.status), each.billed) for each in response.images),
        nearest=NearMiss(near.key, near.field, near.value, near.cached_value, near.likeness)
        if response.HasField("nearest")
        else None,
    )


def read_stats(response: pb.GetStatsResponse) -> Stats:
    """The answer to GetStats."""
    return Stats(
        start_time=time_of(response, "start_time"),
        rows=tuple(map(_row, response.rows)),
        total=_row(response.total),
        paid_unknown=response.paid_unknown,
        unsaved=response.unsaved,
        corrupt=_per_tier(response.corrupt),
        upstream_calls=response.upstream_calls,
        latency_bounds_s=tuple(response.latency_bounds_s),
        live=_live(response.live) if response.HasField("live") else None,
    )


def _live(live: pb.LiveState) -> Live:
    waiting = ((member(Priority, pb.Priority, "PRIORITY", each.priority), each.waiting) for each in live.queue)
    return Live(
        time=time_of(live, "time"),
        in_flight=live.in_flight,
        queue={priority: count for priority, count in waiting if priority is not None},
        tiers=tuple(map(_tier_live, live.tiers)),
        held_images=live.held_images,
        oldest_held_s=seconds_of(live.oldest_held),
    )


def _tier_live(state: pb.TierState) -> TierLive:
    return TierLive(
        tier=member(TierName, pb.Tier, "TIER", state.tier),
        breaker_open=state.breaker_open,
        size_bytes=state.size_bytes if state.HasField("size_bytes") else None,
    )


def _row(row: pb.StatsRow) -> StatsRow:
    return StatsRow(
        namespace=row.namespace,
        outcome=member(Outcome, pb.Outcome, "OUTCOME", row.outcome),
        tier=member(TierName, pb.Tier, "TIER", row.tier),
        requests=row.requests,
        image_bytes=row.image_bytes,
        latency_sum_s=seconds_of(row.latency_sum),
        spent_microusd=row.spent_microusd,
        saved_microusd=row.saved_microusd,
        coalesced_microusd=row.coalesced_microusd,
        unknown_microusd=row.unknown_microusd,
        degraded=row.degraded,
        model=row.model,
        quality=row.quality,
        caller=row.caller,
        start_time=time_of(row, "start_time"),
        latency_counts=tuple(row.latency_counts),
        would_cost_microusd=row.would_cost_microusd,
        settled_calls=row.settled_calls,
        unknown_calls=row.unknown_calls,
        open_calls=row.open_calls,
        open_microusd=row.open_microusd,
    )


def _explanation(explanation: pb.Explanation) -> Explanation:
    return Explanation(
        normalized_prompt=explanation.normalized_prompt,
        canonical_identity=explanation.canonical_identity,
        key=explanation.key,
        profile=explanation.profile,
        canonical_prompt=explanation.canonical_prompt,
    )


def read_spec(spec: pb.ImageSpec) -> ImageSpec:
    """What decides a picture."""
    return ImageSpec(
        spec.prompt,
        model=spec.model or None,
        size=spec.size or None,
        quality=spec.quality or None,
        background=spec.background or None,
        output_format=spec.output_format or None,
        output_compression=spec.output_compression if spec.HasField("output_compression") else None,
        moderation=spec.moderation or None,
        seed=spec.seed if spec.HasField("seed") else None,
        extra=MessageToDict(spec.extra) if spec.HasField("extra") else None,
        inputs=[_read_input(image) for image in spec.inputs] or None,
    )


def _read_input(image: pb.InputImage) -> InputImage:
    role = member(InputRole, pb.InputRole, "INPUT_ROLE", image.role) or InputRole.IMAGE  # which unspecified means
    is_whole = image.WhichOneof("source") == "data"
    return InputImage(image.data if is_whole else None, role, image.digest or None)


def read_usage(usage: pb.Usage | admin_pb.TokenUsage) -> Usage:
    """The tokens a provider counted."""
    return Usage(
        input_tokens=usage.input_tokens,
        input_text_tokens=usage.input_text_tokens,
        input_image_tokens=usage.input_image_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.total_tokens,
    )


def _per_tier(counts: Sequence[pb.TierCount]) -> dict[TierName, int]:
    named = ((member(TierName, pb.Tier, "TIER", each.tier), each.count) for each in counts)
    return {tier: count for tier, count in named if tier is not None}


# --- fields ---


def _name(prefix: str, value: Enum | None) -> str | None:
    return None if value is None else f"{prefix}_{value.name}"


def member(ours: type[_E], wire: _WireEnum, prefix: str, number: int) -> _E | None:
    """Our member for a number on the wire; None for unspecified and for what a newer service may say."""
    return _members(ours, wire, prefix).get(number)


@cache
def _members(ours: type[_E], wire: _WireEnum, prefix: str) -> Mapping[int, _E]:
    """Our members by their numbers on the wire."""
    names = {number: wire.Name(number).removeprefix(f"{prefix}_") for number in wire.values()}
    return {number: ours[name] for number, name in names.items() if name in ours.__members__}


def _duration(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


def seconds_of(duration: Duration) -> float:
    """A length of time in seconds."""
    return duration.seconds + duration.nanos / 1e9


def time_of(message: Message, name: str) -> datetime | None:
    """The moment that a field of a message holds; None if it is unset."""
    if not message.HasField(name):
        return None
    value: Timestamp = getattr(message, name)
    return value.ToDatetime(tzinfo=UTC)


def unsendable(field: str, cause: Exception) -> InvalidRequestError:
    """What is wrong with a value protobuf refuses, in words that repeat nothing of it."""
    what = "text is not valid Unicode" if isinstance(cause, UnicodeError) else "a value has the wrong type or range"
    return InvalidRequestError(
        f"{field}: {what}",
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason="INVALID_FIELD",
        violations={field: what},
    )
