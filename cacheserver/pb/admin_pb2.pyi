import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from cacheserver.pb import promptcache_pb2 as _promptcache_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpstreamHealth(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPSTREAM_HEALTH_UNSPECIFIED: _ClassVar[UpstreamHealth]
    UPSTREAM_HEALTH_WELL: _ClassVar[UpstreamHealth]
    UPSTREAM_HEALTH_PAUSED: _ClassVar[UpstreamHealth]
    UPSTREAM_HEALTH_DOWN: _ClassVar[UpstreamHealth]
    UPSTREAM_HEALTH_NOT_ENTITLED: _ClassVar[UpstreamHealth]
    UPSTREAM_HEALTH_NO_QUOTA: _ClassVar[UpstreamHealth]

class BudgetScope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUDGET_SCOPE_UNSPECIFIED: _ClassVar[BudgetScope]
    BUDGET_SCOPE_GLOBAL: _ClassVar[BudgetScope]
    BUDGET_SCOPE_NAMESPACE: _ClassVar[BudgetScope]
    BUDGET_SCOPE_CALLER: _ClassVar[BudgetScope]

class BudgetPeriod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUDGET_PERIOD_UNSPECIFIED: _ClassVar[BudgetPeriod]
    BUDGET_PERIOD_DAY: _ClassVar[BudgetPeriod]
    BUDGET_PERIOD_MONTH: _ClassVar[BudgetPeriod]

class AttemptOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ATTEMPT_OUTCOME_UNSPECIFIED: _ClassVar[AttemptOutcome]
    ATTEMPT_OUTCOME_SENT: _ClassVar[AttemptOutcome]
    ATTEMPT_OUTCOME_SETTLED: _ClassVar[AttemptOutcome]
    ATTEMPT_OUTCOME_NOT_BILLED: _ClassVar[AttemptOutcome]
    ATTEMPT_OUTCOME_UNKNOWN: _ClassVar[AttemptOutcome]

class ReviewDecision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REVIEW_DECISION_UNSPECIFIED: _ClassVar[ReviewDecision]
    REVIEW_DECISION_APPROVE: _ClassVar[ReviewDecision]
    REVIEW_DECISION_REJECT: _ClassVar[ReviewDecision]

class Switch(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SWITCH_UNSPECIFIED: _ClassVar[Switch]
    SWITCH_SIMILARITY: _ClassVar[Switch]

class MatchDecision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MATCH_DECISION_UNSPECIFIED: _ClassVar[MatchDecision]
    MATCH_DECISION_RIGHT: _ClassVar[MatchDecision]
    MATCH_DECISION_WRONG: _ClassVar[MatchDecision]

class PromptKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROMPT_KIND_UNSPECIFIED: _ClassVar[PromptKind]
    PROMPT_KIND_MISSED: _ClassVar[PromptKind]
    PROMPT_KIND_TURNED_AWAY: _ClassVar[PromptKind]
    PROMPT_KIND_EXPIRING: _ClassVar[PromptKind]
    PROMPT_KIND_REROLLED: _ClassVar[PromptKind]
    PROMPT_KIND_DEGRADED: _ClassVar[PromptKind]
    PROMPT_KIND_GENERATED: _ClassVar[PromptKind]

class AlarmState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ALARM_STATE_UNSPECIFIED: _ClassVar[AlarmState]
    ALARM_STATE_QUIET: _ClassVar[AlarmState]
    ALARM_STATE_WAITING: _ClassVar[AlarmState]
    ALARM_STATE_RINGING: _ClassVar[AlarmState]
UPSTREAM_HEALTH_UNSPECIFIED: UpstreamHealth
UPSTREAM_HEALTH_WELL: UpstreamHealth
UPSTREAM_HEALTH_PAUSED: UpstreamHealth
UPSTREAM_HEALTH_DOWN: UpstreamHealth
UPSTREAM_HEALTH_NOT_ENTITLED: UpstreamHealth
UPSTREAM_HEALTH_NO_QUOTA: UpstreamHealth
BUDGET_SCOPE_UNSPECIFIED: BudgetScope
BUDGET_SCOPE_GLOBAL: BudgetScope
BUDGET_SCOPE_NAMESPACE: BudgetScope
BUDGET_SCOPE_CALLER: BudgetScope
BUDGET_PERIOD_UNSPECIFIED: BudgetPeriod
BUDGET_PERIOD_DAY: BudgetPeriod
BUDGET_PERIOD_MONTH: BudgetPeriod
ATTEMPT_OUTCOME_UNSPECIFIED: AttemptOutcome
ATTEMPT_OUTCOME_SENT: AttemptOutcome
ATTEMPT_OUTCOME_SETTLED: AttemptOutcome
ATTEMPT_OUTCOME_NOT_BILLED: AttemptOutcome
ATTEMPT_OUTCOME_UNKNOWN: AttemptOutcome
REVIEW_DECISION_UNSPECIFIED: ReviewDecision
REVIEW_DECISION_APPROVE: ReviewDecision
REVIEW_DECISION_REJECT: ReviewDecision
SWITCH_UNSPECIFIED: Switch
SWITCH_SIMILARITY: Switch
MATCH_DECISION_UNSPECIFIED: MatchDecision
MATCH_DECISION_RIGHT: MatchDecision
MATCH_DECISION_WRONG: MatchDecision
PROMPT_KIND_UNSPECIFIED: PromptKind
PROMPT_KIND_MISSED: PromptKind
PROMPT_KIND_TURNED_AWAY: PromptKind
PROMPT_KIND_EXPIRING: PromptKind
PROMPT_KIND_REROLLED: PromptKind
PROMPT_KIND_DEGRADED: PromptKind
PROMPT_KIND_GENERATED: PromptKind
ALARM_STATE_UNSPECIFIED: AlarmState
ALARM_STATE_QUIET: AlarmState
ALARM_STATE_WAITING: AlarmState
ALARM_STATE_RINGING: AlarmState

class Upstream(_message.Message):
    __slots__ = ("name", "limit_group", "models", "health", "weight", "percent", "rank", "price_factor", "success_rate", "latency", "in_flight", "calls", "images_per_minute")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LIMIT_GROUP_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PRICE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_RATE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    name: str
    limit_group: str
    models: _containers.RepeatedScalarFieldContainer[str]
    health: UpstreamHealth
    weight: float
    percent: float
    rank: int
    price_factor: float
    success_rate: float
    latency: _duration_pb2.Duration
    in_flight: int
    calls: int
    images_per_minute: float
    def __init__(self, name: _Optional[str] = ..., limit_group: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., health: _Optional[_Union[UpstreamHealth, str]] = ..., weight: _Optional[float] = ..., percent: _Optional[float] = ..., rank: _Optional[int] = ..., price_factor: _Optional[float] = ..., success_rate: _Optional[float] = ..., latency: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., in_flight: _Optional[int] = ..., calls: _Optional[int] = ..., images_per_minute: _Optional[float] = ...) -> None: ...

class ListUpstreamsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListUpstreamsResponse(_message.Message):
    __slots__ = ("upstreams", "next_page_token")
    UPSTREAMS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    upstreams: _containers.RepeatedCompositeFieldContainer[Upstream]
    next_page_token: str
    def __init__(self, upstreams: _Optional[_Iterable[_Union[Upstream, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateUpstreamRequest(_message.Message):
    __slots__ = ("name", "weight", "percent", "clear_percent", "paused")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    CLEAR_PERCENT_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    percent: float
    clear_percent: bool
    paused: bool
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., percent: _Optional[float] = ..., clear_percent: _Optional[bool] = ..., paused: _Optional[bool] = ...) -> None: ...

class UpdateUpstreamResponse(_message.Message):
    __slots__ = ("upstream",)
    UPSTREAM_FIELD_NUMBER: _ClassVar[int]
    upstream: Upstream
    def __init__(self, upstream: _Optional[_Union[Upstream, _Mapping]] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("name", "scope", "subject", "period", "limit_microusd", "spent_microusd", "reserved_microusd", "reset_time")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    LIMIT_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    SPENT_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    RESERVED_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    RESET_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    scope: BudgetScope
    subject: str
    period: BudgetPeriod
    limit_microusd: int
    spent_microusd: int
    reserved_microusd: int
    reset_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., scope: _Optional[_Union[BudgetScope, str]] = ..., subject: _Optional[str] = ..., period: _Optional[_Union[BudgetPeriod, str]] = ..., limit_microusd: _Optional[int] = ..., spent_microusd: _Optional[int] = ..., reserved_microusd: _Optional[int] = ..., reset_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListBudgetsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListBudgetsResponse(_message.Message):
    __slots__ = ("budgets", "next_page_token")
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    budgets: _containers.RepeatedCompositeFieldContainer[Budget]
    next_page_token: str
    def __init__(self, budgets: _Optional[_Iterable[_Union[Budget, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateBudgetRequest(_message.Message):
    __slots__ = ("name", "limit_microusd")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LIMIT_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    name: str
    limit_microusd: int
    def __init__(self, name: _Optional[str] = ..., limit_microusd: _Optional[int] = ...) -> None: ...

class UpdateBudgetResponse(_message.Message):
    __slots__ = ("budget",)
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    budget: Budget
    def __init__(self, budget: _Optional[_Union[Budget, _Mapping]] = ...) -> None: ...

class LedgerRow(_message.Message):
    __slots__ = ("id", "namespace", "caller", "upstream", "model", "images", "estimate_microusd", "start_time", "tags", "outcome", "end_time", "cost_microusd", "reason", "upstream_request_id", "usage", "quality")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    COST_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    id: str
    namespace: str
    caller: str
    upstream: str
    model: str
    images: int
    estimate_microusd: int
    start_time: _timestamp_pb2.Timestamp
    tags: _containers.RepeatedScalarFieldContainer[str]
    outcome: AttemptOutcome
    end_time: _timestamp_pb2.Timestamp
    cost_microusd: int
    reason: str
    upstream_request_id: str
    usage: TokenUsage
    quality: str
    def __init__(self, id: _Optional[str] = ..., namespace: _Optional[str] = ..., caller: _Optional[str] = ..., upstream: _Optional[str] = ..., model: _Optional[str] = ..., images: _Optional[int] = ..., estimate_microusd: _Optional[int] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., tags: _Optional[_Iterable[str]] = ..., outcome: _Optional[_Union[AttemptOutcome, str]] = ..., end_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., cost_microusd: _Optional[int] = ..., reason: _Optional[str] = ..., upstream_request_id: _Optional[str] = ..., usage: _Optional[_Union[TokenUsage, _Mapping]] = ..., quality: _Optional[str] = ...) -> None: ...

class TokenUsage(_message.Message):
    __slots__ = ("input_tokens", "input_text_tokens", "input_image_tokens", "output_tokens", "total_tokens")
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INPUT_TEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INPUT_IMAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    input_tokens: int
    input_text_tokens: int
    input_image_tokens: int
    output_tokens: int
    total_tokens: int
    def __init__(self, input_tokens: _Optional[int] = ..., input_text_tokens: _Optional[int] = ..., input_image_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ...) -> None: ...

class ListLedgerRequest(_message.Message):
    __slots__ = ("since", "until", "page_size", "page_token")
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    since: _timestamp_pb2.Timestamp
    until: _timestamp_pb2.Timestamp
    page_size: int
    page_token: str
    def __init__(self, since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListLedgerResponse(_message.Message):
    __slots__ = ("rows", "next_page_token")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[LedgerRow]
    next_page_token: str
    def __init__(self, rows: _Optional[_Iterable[_Union[LedgerRow, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Review(_message.Message):
    __slots__ = ("key", "namespace", "model", "width", "height", "score", "create_time", "content_type", "size_bytes", "paid_microusd")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAID_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    key: str
    namespace: str
    model: str
    width: int
    height: int
    score: float
    create_time: _timestamp_pb2.Timestamp
    content_type: str
    size_bytes: int
    paid_microusd: int
    def __init__(self, key: _Optional[str] = ..., namespace: _Optional[str] = ..., model: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., score: _Optional[float] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., content_type: _Optional[str] = ..., size_bytes: _Optional[int] = ..., paid_microusd: _Optional[int] = ...) -> None: ...

class ListReviewsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListReviewsResponse(_message.Message):
    __slots__ = ("reviews", "next_page_token")
    REVIEWS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    reviews: _containers.RepeatedCompositeFieldContainer[Review]
    next_page_token: str
    def __init__(self, reviews: _Optional[_Iterable[_Union[Review, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetReviewRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class GetReviewResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ReviewHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[ReviewHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ReviewHeader(_message.Message):
    __slots__ = ("review", "digest", "quality", "revised_prompt", "won_against", "tags")
    REVIEW_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    REVISED_PROMPT_FIELD_NUMBER: _ClassVar[int]
    WON_AGAINST_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    review: Review
    digest: str
    quality: str
    revised_prompt: str
    won_against: int
    tags: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, review: _Optional[_Union[Review, _Mapping]] = ..., digest: _Optional[str] = ..., quality: _Optional[str] = ..., revised_prompt: _Optional[str] = ..., won_against: _Optional[int] = ..., tags: _Optional[_Iterable[str]] = ...) -> None: ...

class ResolveReviewRequest(_message.Message):
    __slots__ = ("key", "decision")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    key: str
    decision: ReviewDecision
    def __init__(self, key: _Optional[str] = ..., decision: _Optional[_Union[ReviewDecision, str]] = ...) -> None: ...

class ResolveReviewResponse(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class BanMatchRequest(_message.Message):
    __slots__ = ("key", "other_key")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OTHER_KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    other_key: str
    def __init__(self, key: _Optional[str] = ..., other_key: _Optional[str] = ...) -> None: ...

class BanMatchResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SwitchState(_message.Message):
    __slots__ = ("switch", "namespace", "on")
    SWITCH_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    switch: Switch
    namespace: str
    on: bool
    def __init__(self, switch: _Optional[_Union[Switch, str]] = ..., namespace: _Optional[str] = ..., on: _Optional[bool] = ...) -> None: ...

class SetSwitchRequest(_message.Message):
    __slots__ = ("switch", "namespace", "on")
    SWITCH_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    switch: Switch
    namespace: str
    on: bool
    def __init__(self, switch: _Optional[_Union[Switch, str]] = ..., namespace: _Optional[str] = ..., on: _Optional[bool] = ...) -> None: ...

class SetSwitchResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: SwitchState
    def __init__(self, state: _Optional[_Union[SwitchState, _Mapping]] = ...) -> None: ...

class ListSwitchesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSwitchesResponse(_message.Message):
    __slots__ = ("switches",)
    SWITCHES_FIELD_NUMBER: _ClassVar[int]
    switches: _containers.RepeatedCompositeFieldContainer[SwitchState]
    def __init__(self, switches: _Optional[_Iterable[_Union[SwitchState, _Mapping]]] = ...) -> None: ...

class Match(_message.Message):
    __slots__ = ("id", "time", "namespace", "level", "key", "matched_key", "prompt")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MATCHED_KEY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    id: str
    time: _timestamp_pb2.Timestamp
    namespace: str
    level: _promptcache_pb2.MatchLevel
    key: str
    matched_key: str
    prompt: str
    def __init__(self, id: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., namespace: _Optional[str] = ..., level: _Optional[_Union[_promptcache_pb2.MatchLevel, str]] = ..., key: _Optional[str] = ..., matched_key: _Optional[str] = ..., prompt: _Optional[str] = ...) -> None: ...

class ListMatchesRequest(_message.Message):
    __slots__ = ("namespace", "page_size", "page_token")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    page_size: int
    page_token: str
    def __init__(self, namespace: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListMatchesResponse(_message.Message):
    __slots__ = ("matches", "next_page_token")
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    matches: _containers.RepeatedCompositeFieldContainer[Match]
    next_page_token: str
    def __init__(self, matches: _Optional[_Iterable[_Union[Match, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ResolveMatchRequest(_message.Message):
    __slots__ = ("id", "decision")
    ID_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    id: str
    decision: MatchDecision
    def __init__(self, id: _Optional[str] = ..., decision: _Optional[_Union[MatchDecision, str]] = ...) -> None: ...

class ResolveMatchResponse(_message.Message):
    __slots__ = ("match",)
    MATCH_FIELD_NUMBER: _ClassVar[int]
    match: Match
    def __init__(self, match: _Optional[_Union[Match, _Mapping]] = ...) -> None: ...

class RecordedPrompt(_message.Message):
    __slots__ = ("request", "kind", "count", "last_time")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_TIME_FIELD_NUMBER: _ClassVar[int]
    request: _promptcache_pb2.GetImageRequest
    kind: PromptKind
    count: float
    last_time: _timestamp_pb2.Timestamp
    def __init__(self, request: _Optional[_Union[_promptcache_pb2.GetImageRequest, _Mapping]] = ..., kind: _Optional[_Union[PromptKind, str]] = ..., count: _Optional[float] = ..., last_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListPromptsRequest(_message.Message):
    __slots__ = ("namespace", "kinds", "page_size")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    kinds: _containers.RepeatedScalarFieldContainer[PromptKind]
    page_size: int
    def __init__(self, namespace: _Optional[str] = ..., kinds: _Optional[_Iterable[_Union[PromptKind, str]]] = ..., page_size: _Optional[int] = ...) -> None: ...

class ListPromptsResponse(_message.Message):
    __slots__ = ("prompts",)
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[RecordedPrompt]
    def __init__(self, prompts: _Optional[_Iterable[_Union[RecordedPrompt, _Mapping]]] = ...) -> None: ...

class Alarm(_message.Message):
    __slots__ = ("name", "kind", "state", "value", "threshold", "since", "runbook_url")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    RUNBOOK_URL_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    state: AlarmState
    value: float
    threshold: float
    since: _timestamp_pb2.Timestamp
    runbook_url: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., state: _Optional[_Union[AlarmState, str]] = ..., value: _Optional[float] = ..., threshold: _Optional[float] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., runbook_url: _Optional[str] = ...) -> None: ...

class ListAlarmsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAlarmsResponse(_message.Message):
    __slots__ = ("alarms",)
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    alarms: _containers.RepeatedCompositeFieldContainer[Alarm]
    def __init__(self, alarms: _Optional[_Iterable[_Union[Alarm, _Mapping]]] = ...) -> None: ...

class ImportImagesRequest(_message.Message):
    __slots__ = ("row", "namespace", "spec", "identity", "data", "s3_uri", "digest", "create_time", "paid_microusd", "tags", "dry_run", "facts")
    ROW_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    S3_URI_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    PAID_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    row: int
    namespace: str
    spec: _promptcache_pb2.ImageSpec
    identity: ExportedIdentity
    data: bytes
    s3_uri: str
    digest: str
    create_time: _timestamp_pb2.Timestamp
    paid_microusd: int
    tags: _containers.RepeatedScalarFieldContainer[str]
    dry_run: bool
    facts: _promptcache_pb2.Image
    def __init__(self, row: _Optional[int] = ..., namespace: _Optional[str] = ..., spec: _Optional[_Union[_promptcache_pb2.ImageSpec, _Mapping]] = ..., identity: _Optional[_Union[ExportedIdentity, _Mapping]] = ..., data: _Optional[bytes] = ..., s3_uri: _Optional[str] = ..., digest: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., paid_microusd: _Optional[int] = ..., tags: _Optional[_Iterable[str]] = ..., dry_run: _Optional[bool] = ..., facts: _Optional[_Union[_promptcache_pb2.Image, _Mapping]] = ...) -> None: ...

class ExportedIdentity(_message.Message):
    __slots__ = ("key", "digest", "prompt_digest")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    key: str
    digest: bytes
    prompt_digest: bytes
    def __init__(self, key: _Optional[str] = ..., digest: _Optional[bytes] = ..., prompt_digest: _Optional[bytes] = ...) -> None: ...

class ImportImagesResponse(_message.Message):
    __slots__ = ("row", "key", "created", "failure")
    ROW_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    row: int
    key: str
    created: bool
    failure: _promptcache_pb2.Failure
    def __init__(self, row: _Optional[int] = ..., key: _Optional[str] = ..., created: _Optional[bool] = ..., failure: _Optional[_Union[_promptcache_pb2.Failure, _Mapping]] = ...) -> None: ...

class StoredImage(_message.Message):
    __slots__ = ("image", "identity", "tags", "expire_time")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    image: _promptcache_pb2.Image
    identity: ExportedIdentity
    tags: _containers.RepeatedScalarFieldContainer[str]
    expire_time: _timestamp_pb2.Timestamp
    def __init__(self, image: _Optional[_Union[_promptcache_pb2.Image, _Mapping]] = ..., identity: _Optional[_Union[ExportedIdentity, _Mapping]] = ..., tags: _Optional[_Iterable[str]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListImagesRequest(_message.Message):
    __slots__ = ("namespace", "page_size", "page_token")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    page_size: int
    page_token: str
    def __init__(self, namespace: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListImagesResponse(_message.Message):
    __slots__ = ("images", "next_page_token")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[StoredImage]
    next_page_token: str
    def __init__(self, images: _Optional[_Iterable[_Union[StoredImage, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
