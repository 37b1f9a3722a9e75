import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CachePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_POLICY_UNSPECIFIED: _ClassVar[CachePolicy]
    CACHE_POLICY_USE_CACHE: _ClassVar[CachePolicy]
    CACHE_POLICY_ONLY_IF_CACHED: _ClassVar[CachePolicy]
    CACHE_POLICY_REFRESH: _ClassVar[CachePolicy]
    CACHE_POLICY_NO_STORE: _ClassVar[CachePolicy]

class VariantPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VARIANT_POLICY_UNSPECIFIED: _ClassVar[VariantPolicy]
    VARIANT_POLICY_FIRST: _ClassVar[VariantPolicy]
    VARIANT_POLICY_RANDOM: _ClassVar[VariantPolicy]
    VARIANT_POLICY_STICKY: _ClassVar[VariantPolicy]
    VARIANT_POLICY_NEXT: _ClassVar[VariantPolicy]

class Delivery(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DELIVERY_UNSPECIFIED: _ClassVar[Delivery]
    DELIVERY_INLINE: _ClassVar[Delivery]
    DELIVERY_URL: _ClassVar[Delivery]
    DELIVERY_AUTO: _ClassVar[Delivery]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_WARM_UP: _ClassVar[Priority]
    PRIORITY_BATCH: _ClassVar[Priority]
    PRIORITY_STANDARD: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]

class MatchLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MATCH_LEVEL_UNSPECIFIED: _ClassVar[MatchLevel]
    MATCH_LEVEL_EXACT: _ClassVar[MatchLevel]
    MATCH_LEVEL_STANDARD: _ClassVar[MatchLevel]
    MATCH_LEVEL_CATALOG: _ClassVar[MatchLevel]
    MATCH_LEVEL_CANONICAL: _ClassVar[MatchLevel]
    MATCH_LEVEL_SEMANTIC: _ClassVar[MatchLevel]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_MEMORY: _ClassVar[Tier]
    TIER_REDIS: _ClassVar[Tier]
    TIER_DISK: _ClassVar[Tier]
    TIER_S3: _ClassVar[Tier]
    TIER_JOURNAL: _ClassVar[Tier]
    TIER_UPSTREAM: _ClassVar[Tier]

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_UNSPECIFIED: _ClassVar[State]
    STATE_READY: _ClassVar[State]
    STATE_PENDING: _ClassVar[State]
    STATE_PENDING_REVIEW: _ClassVar[State]

class InputRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INPUT_ROLE_UNSPECIFIED: _ClassVar[InputRole]
    INPUT_ROLE_IMAGE: _ClassVar[InputRole]
    INPUT_ROLE_MASK: _ClassVar[InputRole]
    INPUT_ROLE_STYLE: _ClassVar[InputRole]

class Presence(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRESENCE_UNSPECIFIED: _ClassVar[Presence]
    PRESENCE_ABSENT: _ClassVar[Presence]
    PRESENCE_CACHED: _ClassVar[Presence]
    PRESENCE_IN_FLIGHT: _ClassVar[Presence]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_HIT: _ClassVar[Outcome]
    OUTCOME_MISS: _ClassVar[Outcome]
    OUTCOME_COLLAPSED: _ClassVar[Outcome]
    OUTCOME_PENDING: _ClassVar[Outcome]
    OUTCOME_NOT_CACHED: _ClassVar[Outcome]
    OUTCOME_ERROR: _ClassVar[Outcome]
    OUTCOME_NEGATIVE: _ClassVar[Outcome]
    OUTCOME_STALE: _ClassVar[Outcome]
    OUTCOME_OBSERVED: _ClassVar[Outcome]
    OUTCOME_DERIVED: _ClassVar[Outcome]

class StatsSpan(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATS_SPAN_UNSPECIFIED: _ClassVar[StatsSpan]
    STATS_SPAN_MINUTE: _ClassVar[StatsSpan]
    STATS_SPAN_HOUR: _ClassVar[StatsSpan]
    STATS_SPAN_DAY: _ClassVar[StatsSpan]

class StatsField(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATS_FIELD_UNSPECIFIED: _ClassVar[StatsField]
    STATS_FIELD_NAMESPACE: _ClassVar[StatsField]
    STATS_FIELD_MODEL: _ClassVar[StatsField]
    STATS_FIELD_QUALITY: _ClassVar[StatsField]
    STATS_FIELD_CALLER: _ClassVar[StatsField]
    STATS_FIELD_OUTCOME: _ClassVar[StatsField]
    STATS_FIELD_TIER: _ClassVar[StatsField]

class WarmResult(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WARM_RESULT_UNSPECIFIED: _ClassVar[WarmResult]
    WARM_RESULT_CACHED: _ClassVar[WarmResult]
    WARM_RESULT_GENERATED: _ClassVar[WarmResult]
    WARM_RESULT_DUPLICATE: _ClassVar[WarmResult]
    WARM_RESULT_COLLAPSED: _ClassVar[WarmResult]
    WARM_RESULT_FILLED: _ClassVar[WarmResult]
    WARM_RESULT_ABSENT: _ClassVar[WarmResult]
    WARM_RESULT_FAILED: _ClassVar[WarmResult]
CACHE_POLICY_UNSPECIFIED: CachePolicy
CACHE_POLICY_USE_CACHE: CachePolicy
CACHE_POLICY_ONLY_IF_CACHED: CachePolicy
CACHE_POLICY_REFRESH: CachePolicy
CACHE_POLICY_NO_STORE: CachePolicy
VARIANT_POLICY_UNSPECIFIED: VariantPolicy
VARIANT_POLICY_FIRST: VariantPolicy
VARIANT_POLICY_RANDOM: VariantPolicy
VARIANT_POLICY_STICKY: VariantPolicy
VARIANT_POLICY_NEXT: VariantPolicy
DELIVERY_UNSPECIFIED: Delivery
DELIVERY_INLINE: Delivery
DELIVERY_URL: Delivery
DELIVERY_AUTO: Delivery
PRIORITY_UNSPECIFIED: Priority
PRIORITY_WARM_UP: Priority
PRIORITY_BATCH: Priority
PRIORITY_STANDARD: Priority
PRIORITY_INTERACTIVE: Priority
MATCH_LEVEL_UNSPECIFIED: MatchLevel
MATCH_LEVEL_EXACT: MatchLevel
MATCH_LEVEL_STANDARD: MatchLevel
MATCH_LEVEL_CATALOG: MatchLevel
MATCH_LEVEL_CANONICAL: MatchLevel
MATCH_LEVEL_SEMANTIC: MatchLevel
TIER_UNSPECIFIED: Tier
TIER_MEMORY: Tier
TIER_REDIS: Tier
TIER_DISK: Tier
TIER_S3: Tier
TIER_JOURNAL: Tier
TIER_UPSTREAM: Tier
STATE_UNSPECIFIED: State
STATE_READY: State
STATE_PENDING: State
STATE_PENDING_REVIEW: State
INPUT_ROLE_UNSPECIFIED: InputRole
INPUT_ROLE_IMAGE: InputRole
INPUT_ROLE_MASK: InputRole
INPUT_ROLE_STYLE: InputRole
PRESENCE_UNSPECIFIED: Presence
PRESENCE_ABSENT: Presence
PRESENCE_CACHED: Presence
PRESENCE_IN_FLIGHT: Presence
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_HIT: Outcome
OUTCOME_MISS: Outcome
OUTCOME_COLLAPSED: Outcome
OUTCOME_PENDING: Outcome
OUTCOME_NOT_CACHED: Outcome
OUTCOME_ERROR: Outcome
OUTCOME_NEGATIVE: Outcome
OUTCOME_STALE: Outcome
OUTCOME_OBSERVED: Outcome
OUTCOME_DERIVED: Outcome
STATS_SPAN_UNSPECIFIED: StatsSpan
STATS_SPAN_MINUTE: StatsSpan
STATS_SPAN_HOUR: StatsSpan
STATS_SPAN_DAY: StatsSpan
STATS_FIELD_UNSPECIFIED: StatsField
STATS_FIELD_NAMESPACE: StatsField
STATS_FIELD_MODEL: StatsField
STATS_FIELD_QUALITY: StatsField
STATS_FIELD_CALLER: StatsField
STATS_FIELD_OUTCOME: StatsField
STATS_FIELD_TIER: StatsField
WARM_RESULT_UNSPECIFIED: WarmResult
WARM_RESULT_CACHED: WarmResult
WARM_RESULT_GENERATED: WarmResult
WARM_RESULT_DUPLICATE: WarmResult
WARM_RESULT_COLLAPSED: WarmResult
WARM_RESULT_FILLED: WarmResult
WARM_RESULT_ABSENT: WarmResult
WARM_RESULT_FAILED: WarmResult

class ImageSpec(_message.Message):
    __slots__ = ("prompt", "model", "size", "quality", "background", "output_format", "output_compression", "moderation", "seed", "extra", "inputs")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    MODERATION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    model: str
    size: str
    quality: str
    background: str
    output_format: str
    output_compression: int
    moderation: str
    seed: int
    extra: _struct_pb2.Struct
    inputs: _containers.RepeatedCompositeFieldContainer[InputImage]
    def __init__(self, prompt: _Optional[str] = ..., model: _Optional[str] = ..., size: _Optional[str] = ..., quality: _Optional[str] = ..., background: _Optional[str] = ..., output_format: _Optional[str] = ..., output_compression: _Optional[int] = ..., moderation: _Optional[str] = ..., seed: _Optional[int] = ..., extra: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., inputs: _Optional[_Iterable[_Union[InputImage, _Mapping]]] = ...) -> None: ...

class InputImage(_message.Message):
    __slots__ = ("role", "data", "digest")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    role: InputRole
    data: bytes
    digest: str
    def __init__(self, role: _Optional[_Union[InputRole, str]] = ..., data: _Optional[bytes] = ..., digest: _Optional[str] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("data", "url", "content_type", "width", "height", "key", "variant", "create_time", "digest", "size_bytes", "model", "size", "quality", "background", "revised_prompt", "seed", "usage", "upstream_request_id", "generation_time", "paid_microusd", "url_expire_time", "score", "won_against")
    DATA_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    REVISED_PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_TIME_FIELD_NUMBER: _ClassVar[int]
    PAID_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    URL_EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    WON_AGAINST_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    url: str
    content_type: str
    width: int
    height: int
    key: str
    variant: int
    create_time: _timestamp_pb2.Timestamp
    digest: str
    size_bytes: int
    model: str
    size: str
    quality: str
    background: str
    revised_prompt: str
    seed: int
    usage: Usage
    upstream_request_id: str
    generation_time: _duration_pb2.Duration
    paid_microusd: int
    url_expire_time: _timestamp_pb2.Timestamp
    score: float
    won_against: int
    def __init__(self, data: _Optional[bytes] = ..., url: _Optional[str] = ..., content_type: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., key: _Optional[str] = ..., variant: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., model: _Optional[str] = ..., size: _Optional[str] = ..., quality: _Optional[str] = ..., background: _Optional[str] = ..., revised_prompt: _Optional[str] = ..., seed: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., upstream_request_id: _Optional[str] = ..., generation_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., paid_microusd: _Optional[int] = ..., url_expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., score: _Optional[float] = ..., won_against: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
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

class CacheStatus(_message.Message):
    __slots__ = ("tier", "state", "matched", "matched_key", "derived_from", "collapsed", "stale", "degraded", "expire_time", "estimated_wait", "cost_microusd", "saved_microusd")
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MATCHED_FIELD_NUMBER: _ClassVar[int]
    MATCHED_KEY_FIELD_NUMBER: _ClassVar[int]
    DERIVED_FROM_FIELD_NUMBER: _ClassVar[int]
    COLLAPSED_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
    COST_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    SAVED_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    state: State
    matched: MatchLevel
    matched_key: str
    derived_from: str
    collapsed: bool
    stale: bool
    degraded: bool
    expire_time: _timestamp_pb2.Timestamp
    estimated_wait: _duration_pb2.Duration
    cost_microusd: int
    saved_microusd: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., state: _Optional[_Union[State, str]] = ..., matched: _Optional[_Union[MatchLevel, str]] = ..., matched_key: _Optional[str] = ..., derived_from: _Optional[str] = ..., collapsed: _Optional[bool] = ..., stale: _Optional[bool] = ..., degraded: _Optional[bool] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., cost_microusd: _Optional[int] = ..., saved_microusd: _Optional[int] = ...) -> None: ...

class GetImageRequest(_message.Message):
    __slots__ = ("namespace", "spec", "key", "n", "cache_policy", "max_age", "ttl", "max_wait", "variant_policy", "exclude_keys", "delivery", "max_inline_bytes", "priority", "request_id", "tags", "allow_degraded", "use", "candidates", "match_level")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    CACHE_POLICY_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_FIELD_NUMBER: _ClassVar[int]
    VARIANT_POLICY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_KEYS_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_DEGRADED_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MATCH_LEVEL_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    spec: ImageSpec
    key: str
    n: int
    cache_policy: CachePolicy
    max_age: _duration_pb2.Duration
    ttl: _duration_pb2.Duration
    max_wait: _duration_pb2.Duration
    variant_policy: VariantPolicy
    exclude_keys: _containers.RepeatedScalarFieldContainer[str]
    delivery: Delivery
    max_inline_bytes: int
    priority: Priority
    request_id: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    allow_degraded: bool
    use: str
    candidates: int
    match_level: MatchLevel
    def __init__(self, namespace: _Optional[str] = ..., spec: _Optional[_Union[ImageSpec, _Mapping]] = ..., key: _Optional[str] = ..., n: _Optional[int] = ..., cache_policy: _Optional[_Union[CachePolicy, str]] = ..., max_age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., variant_policy: _Optional[_Union[VariantPolicy, str]] = ..., exclude_keys: _Optional[_Iterable[str]] = ..., delivery: _Optional[_Union[Delivery, str]] = ..., max_inline_bytes: _Optional[int] = ..., priority: _Optional[_Union[Priority, str]] = ..., request_id: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., allow_degraded: _Optional[bool] = ..., use: _Optional[str] = ..., candidates: _Optional[int] = ..., match_level: _Optional[_Union[MatchLevel, str]] = ...) -> None: ...

class GetImageResponse(_message.Message):
    __slots__ = ("images", "status", "image_status")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_STATUS_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    status: CacheStatus
    image_status: _containers.RepeatedCompositeFieldContainer[CacheStatus]
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., status: _Optional[_Union[CacheStatus, _Mapping]] = ..., image_status: _Optional[_Iterable[_Union[CacheStatus, _Mapping]]] = ...) -> None: ...

class StreamImageRequest(_message.Message):
    __slots__ = ("request", "read_offset", "if_digest")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    READ_OFFSET_FIELD_NUMBER: _ClassVar[int]
    IF_DIGEST_FIELD_NUMBER: _ClassVar[int]
    request: GetImageRequest
    read_offset: int
    if_digest: str
    def __init__(self, request: _Optional[_Union[GetImageRequest, _Mapping]] = ..., read_offset: _Optional[int] = ..., if_digest: _Optional[str] = ...) -> None: ...

class StreamImageResponse(_message.Message):
    __slots__ = ("progress", "header", "chunk")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    header: ImageHeader
    chunk: bytes
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., header: _Optional[_Union[ImageHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("keys", "waited", "estimated_wait")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    waited: _duration_pb2.Duration
    estimated_wait: _duration_pb2.Duration
    def __init__(self, keys: _Optional[_Iterable[str]] = ..., waited: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ImageHeader(_message.Message):
    __slots__ = ("image", "status", "read_offset", "index")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    READ_OFFSET_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    image: Image
    status: CacheStatus
    read_offset: int
    index: int
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., status: _Optional[_Union[CacheStatus, _Mapping]] = ..., read_offset: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class BatchGetImagesRequest(_message.Message):
    __slots__ = ("requests", "timeout_ms", "cancelled", "no_waiting")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    NO_WAITING_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[GetImageRequest]
    timeout_ms: _containers.RepeatedScalarFieldContainer[int]
    cancelled: _containers.RepeatedScalarFieldContainer[str]
    no_waiting: bool
    def __init__(self, requests: _Optional[_Iterable[_Union[GetImageRequest, _Mapping]]] = ..., timeout_ms: _Optional[_Iterable[int]] = ..., cancelled: _Optional[_Iterable[str]] = ..., no_waiting: _Optional[bool] = ...) -> None: ...

class BatchGetImagesResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[BatchItem]
    def __init__(self, items: _Optional[_Iterable[_Union[BatchItem, _Mapping]]] = ...) -> None: ...

class BatchItem(_message.Message):
    __slots__ = ("request_id", "response", "failure", "no_place")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    NO_PLACE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    response: GetImageResponse
    failure: Failure
    no_place: bool
    def __init__(self, request_id: _Optional[str] = ..., response: _Optional[_Union[GetImageResponse, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., no_place: _Optional[bool] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "reason", "message", "retry_delay", "violations", "metadata")
    class ViolationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    retry_delay: _duration_pb2.Duration
    violations: _containers.ScalarMap[str, str]
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., violations: _Optional[_Mapping[str, str]] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class FindCachedRequest(_message.Message):
    __slots__ = ("namespace", "items")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    items: _containers.RepeatedCompositeFieldContainer[FindItem]
    def __init__(self, namespace: _Optional[str] = ..., items: _Optional[_Iterable[_Union[FindItem, _Mapping]]] = ...) -> None: ...

class FindItem(_message.Message):
    __slots__ = ("spec", "key", "variant")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    spec: ImageSpec
    key: str
    variant: int
    def __init__(self, spec: _Optional[_Union[ImageSpec, _Mapping]] = ..., key: _Optional[str] = ..., variant: _Optional[int] = ...) -> None: ...

class FindCachedResponse(_message.Message):
    __slots__ = ("items", "unknown_tiers")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_TIERS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[FoundItem]
    unknown_tiers: _containers.RepeatedScalarFieldContainer[Tier]
    def __init__(self, items: _Optional[_Iterable[_Union[FoundItem, _Mapping]]] = ..., unknown_tiers: _Optional[_Iterable[_Union[Tier, str]]] = ...) -> None: ...

class FoundItem(_message.Message):
    __slots__ = ("key", "presence", "tier")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    key: str
    presence: Presence
    tier: Tier
    def __init__(self, key: _Optional[str] = ..., presence: _Optional[_Union[Presence, str]] = ..., tier: _Optional[_Union[Tier, str]] = ...) -> None: ...

class PutImageRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PutImageHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[PutImageHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PutImageHeader(_message.Message):
    __slots__ = ("namespace", "spec", "replace", "tags", "digest", "ttl", "paid_microusd", "create_time")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    PAID_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    spec: ImageSpec
    replace: bool
    tags: _containers.RepeatedScalarFieldContainer[str]
    digest: str
    ttl: _duration_pb2.Duration
    paid_microusd: int
    create_time: _timestamp_pb2.Timestamp
    def __init__(self, namespace: _Optional[str] = ..., spec: _Optional[_Union[ImageSpec, _Mapping]] = ..., replace: _Optional[bool] = ..., tags: _Optional[_Iterable[str]] = ..., digest: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., paid_microusd: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class PutImageResponse(_message.Message):
    __slots__ = ("image", "created")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    image: Image
    created: bool
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., created: _Optional[bool] = ...) -> None: ...

class PurgeImagesRequest(_message.Message):
    __slots__ = ("namespace", "key", "spec", "tag", "everything", "dry_run")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    key: str
    spec: ImageSpec
    tag: str
    everything: bool
    dry_run: bool
    def __init__(self, namespace: _Optional[str] = ..., key: _Optional[str] = ..., spec: _Optional[_Union[ImageSpec, _Mapping]] = ..., tag: _Optional[str] = ..., everything: _Optional[bool] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class PurgeImagesResponse(_message.Message):
    __slots__ = ("images", "tiers", "reclaiming")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    RECLAIMING_FIELD_NUMBER: _ClassVar[int]
    images: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierCount]
    reclaiming: bool
    def __init__(self, images: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierCount, _Mapping]]] = ..., reclaiming: _Optional[bool] = ...) -> None: ...

class TierCount(_message.Message):
    __slots__ = ("tier", "count")
    TIER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    count: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., count: _Optional[int] = ...) -> None: ...

class ExplainKeyRequest(_message.Message):
    __slots__ = ("namespace", "spec", "other", "match_level")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    MATCH_LEVEL_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    spec: ImageSpec
    other: ImageSpec
    match_level: MatchLevel
    def __init__(self, namespace: _Optional[str] = ..., spec: _Optional[_Union[ImageSpec, _Mapping]] = ..., other: _Optional[_Union[ImageSpec, _Mapping]] = ..., match_level: _Optional[_Union[MatchLevel, str]] = ...) -> None: ...

class ExplainKeyResponse(_message.Message):
    __slots__ = ("explanation", "other", "differences")
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    explanation: Explanation
    other: Explanation
    differences: _containers.RepeatedCompositeFieldContainer[FieldDifference]
    def __init__(self, explanation: _Optional[_Union[Explanation, _Mapping]] = ..., other: _Optional[_Union[Explanation, _Mapping]] = ..., differences: _Optional[_Iterable[_Union[FieldDifference, _Mapping]]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("normalized_prompt", "canonical_identity", "key", "profile", "canonical_prompt")
    NORMALIZED_PROMPT_FIELD_NUMBER: _ClassVar[int]
    CANONICAL_IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    CANONICAL_PROMPT_FIELD_NUMBER: _ClassVar[int]
    normalized_prompt: str
    canonical_identity: str
    key: str
    profile: str
    canonical_prompt: str
    def __init__(self, normalized_prompt: _Optional[str] = ..., canonical_identity: _Optional[str] = ..., key: _Optional[str] = ..., profile: _Optional[str] = ..., canonical_prompt: _Optional[str] = ...) -> None: ...

class FieldDifference(_message.Message):
    __slots__ = ("field", "value", "other_value")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    OTHER_VALUE_FIELD_NUMBER: _ClassVar[int]
    field: str
    value: str
    other_value: str
    def __init__(self, field: _Optional[str] = ..., value: _Optional[str] = ..., other_value: _Optional[str] = ...) -> None: ...

class WarmImagesRequest(_message.Message):
    __slots__ = ("options", "items")
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    options: WarmOptions
    items: WarmItems
    def __init__(self, options: _Optional[_Union[WarmOptions, _Mapping]] = ..., items: _Optional[_Union[WarmItems, _Mapping]] = ...) -> None: ...

class WarmOptions(_message.Message):
    __slots__ = ("plan", "job", "budget_microusd", "spent_microusd", "max_images_per_minute", "concurrency", "fill", "namespace")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    BUDGET_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    SPENT_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    FILL_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    plan: bool
    job: str
    budget_microusd: int
    spent_microusd: int
    max_images_per_minute: int
    concurrency: int
    fill: Tier
    namespace: str
    def __init__(self, plan: _Optional[bool] = ..., job: _Optional[str] = ..., budget_microusd: _Optional[int] = ..., spent_microusd: _Optional[int] = ..., max_images_per_minute: _Optional[int] = ..., concurrency: _Optional[int] = ..., fill: _Optional[_Union[Tier, str]] = ..., namespace: _Optional[str] = ...) -> None: ...

class WarmItems(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[WarmItem]
    def __init__(self, items: _Optional[_Iterable[_Union[WarmItem, _Mapping]]] = ...) -> None: ...

class WarmItem(_message.Message):
    __slots__ = ("row", "request")
    ROW_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    row: int
    request: GetImageRequest
    def __init__(self, row: _Optional[int] = ..., request: _Optional[_Union[GetImageRequest, _Mapping]] = ...) -> None: ...

class WarmImagesResponse(_message.Message):
    __slots__ = ("outcomes", "totals")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[WarmOutcome]
    totals: WarmTotals
    def __init__(self, outcomes: _Optional[_Iterable[_Union[WarmOutcome, _Mapping]]] = ..., totals: _Optional[_Union[WarmTotals, _Mapping]] = ...) -> None: ...

class WarmOutcome(_message.Message):
    __slots__ = ("row", "result", "keys", "tier", "cost_microusd", "failure")
    ROW_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    COST_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    row: int
    result: WarmResult
    keys: _containers.RepeatedScalarFieldContainer[str]
    tier: Tier
    cost_microusd: int
    failure: Failure
    def __init__(self, row: _Optional[int] = ..., result: _Optional[_Union[WarmResult, str]] = ..., keys: _Optional[_Iterable[str]] = ..., tier: _Optional[_Union[Tier, str]] = ..., cost_microusd: _Optional[int] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class WarmTotals(_message.Message):
    __slots__ = ("items", "duplicates", "cached", "in_flight", "to_generate", "generated", "filled", "failed", "spent_microusd", "estimated_microusd", "estimated_time", "unknown_tiers", "unpriced")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    TO_GENERATE_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    FILLED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SPENT_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_TIME_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_TIERS_FIELD_NUMBER: _ClassVar[int]
    UNPRICED_FIELD_NUMBER: _ClassVar[int]
    items: int
    duplicates: int
    cached: _containers.RepeatedCompositeFieldContainer[TierCount]
    in_flight: int
    to_generate: int
    generated: int
    filled: int
    failed: int
    spent_microusd: int
    estimated_microusd: int
    estimated_time: _duration_pb2.Duration
    unknown_tiers: _containers.RepeatedScalarFieldContainer[Tier]
    unpriced: int
    def __init__(self, items: _Optional[int] = ..., duplicates: _Optional[int] = ..., cached: _Optional[_Iterable[_Union[TierCount, _Mapping]]] = ..., in_flight: _Optional[int] = ..., to_generate: _Optional[int] = ..., generated: _Optional[int] = ..., filled: _Optional[int] = ..., failed: _Optional[int] = ..., spent_microusd: _Optional[int] = ..., estimated_microusd: _Optional[int] = ..., estimated_time: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., unknown_tiers: _Optional[_Iterable[_Union[Tier, str]]] = ..., unpriced: _Optional[int] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("namespace", "since", "until", "span", "by")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    since: _timestamp_pb2.Timestamp
    until: _timestamp_pb2.Timestamp
    span: StatsSpan
    by: _containers.RepeatedScalarFieldContainer[StatsField]
    def __init__(self, namespace: _Optional[str] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., until: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., span: _Optional[_Union[StatsSpan, str]] = ..., by: _Optional[_Iterable[_Union[StatsField, str]]] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("start_time", "rows", "total", "paid_unknown", "unsaved", "corrupt", "upstream_calls", "latency_bounds_s", "live")
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAID_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    UNSAVED_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_CALLS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    start_time: _timestamp_pb2.Timestamp
    rows: _containers.RepeatedCompositeFieldContainer[StatsRow]
    total: StatsRow
    paid_unknown: int
    unsaved: int
    corrupt: _containers.RepeatedCompositeFieldContainer[TierCount]
    upstream_calls: int
    latency_bounds_s: _containers.RepeatedScalarFieldContainer[float]
    live: LiveState
    def __init__(self, start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., rows: _Optional[_Iterable[_Union[StatsRow, _Mapping]]] = ..., total: _Optional[_Union[StatsRow, _Mapping]] = ..., paid_unknown: _Optional[int] = ..., unsaved: _Optional[int] = ..., corrupt: _Optional[_Iterable[_Union[TierCount, _Mapping]]] = ..., upstream_calls: _Optional[int] = ..., latency_bounds_s: _Optional[_Iterable[float]] = ..., live: _Optional[_Union[LiveState, _Mapping]] = ...) -> None: ...

class LiveState(_message.Message):
    __slots__ = ("time", "in_flight", "queue", "tiers", "held_images", "oldest_held")
    TIME_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    HELD_IMAGES_FIELD_NUMBER: _ClassVar[int]
    OLDEST_HELD_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    in_flight: int
    queue: _containers.RepeatedCompositeFieldContainer[QueueDepth]
    tiers: _containers.RepeatedCompositeFieldContainer[TierState]
    held_images: int
    oldest_held: _duration_pb2.Duration
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., in_flight: _Optional[int] = ..., queue: _Optional[_Iterable[_Union[QueueDepth, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[TierState, _Mapping]]] = ..., held_images: _Optional[int] = ..., oldest_held: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class QueueDepth(_message.Message):
    __slots__ = ("priority", "waiting")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    priority: Priority
    waiting: int
    def __init__(self, priority: _Optional[_Union[Priority, str]] = ..., waiting: _Optional[int] = ...) -> None: ...

class TierState(_message.Message):
    __slots__ = ("tier", "breaker_open", "size_bytes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BREAKER_OPEN_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    breaker_open: bool
    size_bytes: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., breaker_open: _Optional[bool] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class StatsRow(_message.Message):
    __slots__ = ("namespace", "outcome", "tier", "requests", "image_bytes", "latency_sum", "spent_microusd", "saved_microusd", "coalesced_microusd", "unknown_microusd", "degraded", "model", "quality", "caller", "start_time", "latency_counts", "would_cost_microusd", "settled_calls", "unknown_calls", "open_calls", "open_microusd")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LATENCY_SUM_FIELD_NUMBER: _ClassVar[int]
    SPENT_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    SAVED_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    COALESCED_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    LATENCY_COUNTS_FIELD_NUMBER: _ClassVar[int]
    WOULD_COST_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    SETTLED_CALLS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_CALLS_FIELD_NUMBER: _ClassVar[int]
    OPEN_CALLS_FIELD_NUMBER: _ClassVar[int]
    OPEN_MICROUSD_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    outcome: Outcome
    tier: Tier
    requests: int
    image_bytes: int
    latency_sum: _duration_pb2.Duration
    spent_microusd: int
    saved_microusd: int
    coalesced_microusd: int
    unknown_microusd: int
    degraded: int
    model: str
    quality: str
    caller: str
    start_time: _timestamp_pb2.Timestamp
    latency_counts: _containers.RepeatedScalarFieldContainer[int]
    would_cost_microusd: int
    settled_calls: int
    unknown_calls: int
    open_calls: int
    open_microusd: int
    def __init__(self, namespace: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., tier: _Optional[_Union[Tier, str]] = ..., requests: _Optional[int] = ..., image_bytes: _Optional[int] = ..., latency_sum: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., spent_microusd: _Optional[int] = ..., saved_microusd: _Optional[int] = ..., coalesced_microusd: _Optional[int] = ..., unknown_microusd: _Optional[int] = ..., degraded: _Optional[int] = ..., model: _Optional[str] = ..., quality: _Optional[str] = ..., caller: _Optional[str] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., latency_counts: _Optional[_Iterable[int]] = ..., would_cost_microusd: _Optional[int] = ..., settled_calls: _Optional[int] = ..., unknown_calls: _Optional[int] = ..., open_calls: _Optional[int] = ..., open_microusd: _Optional[int] = ...) -> None: ...

class ExplainCallRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainCallResponse(_message.Message):
    __slots__ = ("rpc", "time", "caller", "namespace", "latency", "reason", "images", "nearest")
    RPC_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    rpc: str
    time: _timestamp_pb2.Timestamp
    caller: str
    namespace: str
    latency: _duration_pb2.Duration
    reason: str
    images: _containers.RepeatedCompositeFieldContainer[AnsweredImage]
    nearest: NearMiss
    def __init__(self, rpc: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., caller: _Optional[str] = ..., namespace: _Optional[str] = ..., latency: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., reason: _Optional[str] = ..., images: _Optional[_Iterable[_Union[AnsweredImage, _Mapping]]] = ..., nearest: _Optional[_Union[NearMiss, _Mapping]] = ...) -> None: ...

class AnsweredImage(_message.Message):
    __slots__ = ("key", "status", "billed")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    BILLED_FIELD_NUMBER: _ClassVar[int]
    key: str
    status: CacheStatus
    billed: bool
    def __init__(self, key: _Optional[str] = ..., status: _Optional[_Union[CacheStatus, _Mapping]] = ..., billed: _Optional[bool] = ...) -> None: ...

class NearMiss(_message.Message):
    __slots__ = ("key", "field", "value", "cached_value", "likeness")
    KEY_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CACHED_VALUE_FIELD_NUMBER: _ClassVar[int]
    LIKENESS_FIELD_NUMBER: _ClassVar[int]
    key: str
    field: str
    value: str
    cached_value: str
    likeness: float
    def __init__(self, key: _Optional[str] = ..., field: _Optional[str] = ..., value: _Optional[str] = ..., cached_value: _Optional[str] = ..., likeness: _Optional[float] = ...) -> None: ...
