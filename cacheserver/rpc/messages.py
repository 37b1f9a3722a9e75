"""Messages as values: every field checked, every violation collected under the field's path.

Nothing here trusts what the network sent. A reader takes the message and a `Problems` it reports to;
`Problems.check` raises them all at once, so what a reader returns counts only after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from cacheserver.calls.asked import Asked
from cacheserver.calls.bounds import (
    MAX_DURATION_S,
    MAX_IMAGES,
    MAX_REQUEST_ID,
    MAX_TAGS,
    TAG,
    at_use,
)
from cacheserver.calls.call import Call
from cacheserver.calls.directives import read_cache_control
from cacheserver.errors import InvalidRequestError
from cacheserver.identity import validate
from cacheserver.model import (
    MAX_VARIANT,
    CacheKey,
    CachePolicy,
    ImageRequest,
    JsonValue,
    MatchLevel,
    Namespace,
    Priority,
    Terms,
    VariantPolicy,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.inputs import read_inputs

T = TypeVar("T")

DEFAULT_INLINE_BYTES = 4_000_000
"""What fits the 4 MiB that gRPC clients accept by default."""

MAX_INLINE_BYTES = 256 * 1024 * 1024
MAX_FIND_ITEMS = 10_000
MAX_PAID_MICROUSD = 1_000_000_000

_MAX_EXCLUDE_KEYS = 1_000
_MAX_PROBLEMS = 100
_MAX_WAIT_S = 24 * 3600.0
_CLOCK_SKEW_S = 300.0
_NANOS = 1_000_000_000
_MAX_EXTRA_WIRE_BYTES = 6 * 64 * 1024
"""A Struct takes at most about six times the bytes of its JSON: above this, 64 KiB of JSON is impossible."""

_NO_EXTRA: Mapping[str, JsonValue] = MappingProxyType({})

_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


class Delivery(StrEnum):
    """How bytes travel."""

    INLINE = "inline"
    URL = "url"
    AUTO = "auto"


_CACHE_POLICIES: Mapping[int, CachePolicy] = {
    pb.CACHE_POLICY_USE_CACHE: CachePolicy.USE_CACHE,
    pb.CACHE_POLICY_ONLY_IF_CACHED: CachePolicy.ONLY_IF_CACHED,
    pb.CACHE_POLICY_REFRESH: CachePolicy.REFRESH,
    pb.CACHE_POLICY_NO_STORE: CachePolicy.NO_STORE,
}
_VARIANT_POLICIES: Mapping[int, VariantPolicy] = {
    pb.VARIANT_POLICY_UNSPECIFIED: VariantPolicy.FIRST,
    pb.VARIANT_POLICY_FIRST: VariantPolicy.FIRST,
    pb.VARIANT_POLICY_RANDOM: VariantPolicy.RANDOM,
    pb.VARIANT_POLICY_STICKY: VariantPolicy.STICKY,
    pb.VARIANT_POLICY_NEXT: VariantPolicy.NEXT,
}
_DELIVERIES: Mapping[int, Delivery] = {
    pb.DELIVERY_UNSPECIFIED: Delivery.INLINE,
    pb.DELIVERY_INLINE: Delivery.INLINE,
    pb.DELIVERY_URL: Delivery.URL,
    pb.DELIVERY_AUTO: Delivery.AUTO,
}
_PRIORITIES: Mapping[int, Priority] = {
    pb.PRIORITY_WARM_UP: Priority.WARM_UP,
    pb.PRIORITY_BATCH: Priority.BATCH,
    pb.PRIORITY_STANDARD: Priority.STANDARD,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
}
_MATCH_LEVELS: Mapping[int, MatchLevel | None] = {
    pb.MATCH_LEVEL_UNSPECIFIED: None,
    pb.MATCH_LEVEL_EXACT: MatchLevel.EXACT,
    pb.MATCH_LEVEL_STANDARD: MatchLevel.STANDARD,
    pb.MATCH_LEVEL_CATALOG: MatchLevel.CATALOG,
    pb.MATCH_LEVEL_CANONICAL: MatchLevel.CANONICAL,
    pb.MATCH_LEVEL_SEMANTIC: MatchLevel.SEMANTIC,
}

_AUTO = "auto"
_NOT_A_KEY = "is not a key: pass one from an earlier answer, unchanged"

_NO_KEY = CacheKey("", b"", b"", 0)
"""What stands for a key that could not be read; the violation noted with it keeps it from being used."""


class Problems:
    """What is wrong with a request, by the path of the field.

    `prefix` leads to the message being read, as "request." in a StreamImageRequest.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._texts: dict[str, str] = {}

    def add(self, path: str, text: str) -> None:
        """Note a violation; the first of a field counts."""
        self._texts.setdefault(self._prefix + path, text)

    @property
    def are_none(self) -> bool:
        """Whether there is no violation so far."""
        return not self._texts

    @property
    def are_enough(self) -> bool:
        """Whether there are so many that looking for more helps nobody."""
        return len(self._texts) >= _MAX_PROBLEMS

    def check(self) -> None:
        """Raise InvalidRequestError if there is any violation."""
        if self._texts:
            raise InvalidRequestError(self._texts)


@dataclass(frozen=True, slots=True)
class RpcAsked(Asked):
    """A GetImageRequest as values: what it asks for, and how the bytes are to travel."""

    delivery: Delivery
    max_inline_bytes: int


def read_get_image(message: pb.GetImageRequest, namespace: Namespace, call: Call, problems: Problems) -> RpcAsked:
    """What a GetImageRequest asks for. The call's `cache-control` counts where a field is unset.

    Raises:
        InvalidRequestError: fields are out of their range.
        NotImplementedYetError: an experimental field is set.
    """
    what = _read_what(message, namespace, problems)
    if isinstance(what, CacheKey):
        _check_by_key(message, problems)
    else:
        what = _with_use(what, message.use, namespace, problems)
    terms = _read_terms(message, namespace, call, problems)
    asked = RpcAsked(
        namespace=namespace,
        what=what,
        terms=terms,
        delivery=_read_enum(message.delivery, _DELIVERIES, Delivery.INLINE, "delivery", problems),
        max_inline_bytes=_read_inline_bytes(message.max_inline_bytes, problems),
        match_level=terms.match_level,
    )
    problems.check()
    return asked


def _read_what(message: pb.GetImageRequest, namespace: Namespace, problems: Problems) -> ImageRequest | CacheKey:
    match message.WhichOneof("what"):
        case "spec":
            return read_spec(message.spec, "spec", namespace, problems)
        case "key":
            return read_key(message.key, "key", namespace, problems)
        case _:
            problems.add("spec", "spec or key must be set")
            return _NO_KEY


def _with_use(request: ImageRequest, use: str, namespace: Namespace, problems: Problems) -> ImageRequest:
    at_its_quality = at_use(request, use, namespace)
    if at_its_quality is None:
        known = ", ".join(namespace.quality_by_use) or "none"
        problems.add("use", f"is not one of this namespace's uses: {known}")
        return request
    return at_its_quality


def _check_by_key(message: pb.GetImageRequest, problems: Problems) -> None:
    """A key names one stored picture: what makes or chooses pictures does not go with it."""
    if message.HasField("n") and message.n != 1:
        problems.add("n", "a key names one picture: leave n unset or 1")
    if message.cache_policy in (pb.CACHE_POLICY_REFRESH, pb.CACHE_POLICY_NO_STORE):
        problems.add("cache_policy", "a key never generates: ask with a spec")
    if message.variant_policy not in (pb.VARIANT_POLICY_UNSPECIFIED, pb.VARIANT_POLICY_FIRST):
        problems.add("variant_policy", "a key names one variant: ask with a spec")
    for field in ("use", "candidates"):
        if getattr(message, field):
            problems.add(field, "a key names a picture that is made: ask with a spec")


def _read_terms(message: pb.GetImageRequest, namespace: Namespace, call: Call, problems: Problems) -> Terms:
    directives = read_cache_control(call.metadata.get("cache-control", ""))
    policy = CachePolicy.USE_CACHE
    if directives.cache_policy is not None and not message.HasField("key"):
        policy = directives.cache_policy
    if message.cache_policy != pb.CACHE_POLICY_UNSPECIFIED:
        policy = _read_enum(message.cache_policy, _CACHE_POLICIES, policy, "cache_policy", problems)
    priority = namespace.default_priority
    if message.priority != pb.PRIORITY_UNSPECIFIED:
        priority = _read_enum(message.priority, _PRIORITIES, priority, "priority", problems)
    max_age_s = directives.max_age_s
    if message.HasField("max_age"):
        max_age_s = _read_seconds(message.max_age, "max_age", problems)
    max_wait_s = None
    if message.HasField("max_wait"):
        max_wait_s = _read_seconds(message.max_wait, "max_wait", problems, limit_s=_MAX_WAIT_S)
    return Terms(
        n=_read_n(message, problems),
        cache_policy=policy,
        variant_policy=_read_enum(
            message.variant_policy, _VARIANT_POLICIES, VariantPolicy.FIRST, "variant_policy", problems
        ),
        max_age_s=max_age_s,
        ttl_s=_read_ttl(message.ttl, "ttl", problems) if message.HasField("ttl") else None,
        max_wait_s=max_wait_s,
        deadline_s=call.deadline_s,
        exclude_keys=_read_exclude_keys(message.exclude_keys, problems),
        priority=min(priority, call.caller.max_priority),
        request_id=_read_request_id(message.request_id, problems),
        tags=read_tags(message.tags, "tags", problems),
        allow_degraded=message.allow_degraded,
        no_transform=directives.no_transform,
        match_level=read_match_level(message.match_level, problems),
        candidates=_read_candidates(message, namespace, problems),
    )


def _read_n(message: pb.GetImageRequest, problems: Problems) -> int:
    n = message.n if message.HasField("n") else 1
    if not 1 <= n <= MAX_IMAGES:
        problems.add("n", f"must be 1 to {MAX_IMAGES}")
    return n


def _read_candidates(message: pb.GetImageRequest, namespace: Namespace, problems: Problems) -> int:
    candidates = message.candidates if message.HasField("candidates") else 1
    if not 1 <= candidates <= namespace.max_candidates:
        problems.add("candidates", f"must be 1 to {namespace.max_candidates}")
    return candidates


def _read_inline_bytes(number: int, problems: Problems) -> int:
    if not 0 <= number <= MAX_INLINE_BYTES:
        problems.add("max_inline_bytes", f"must be 0 to {MAX_INLINE_BYTES}")
    return number or DEFAULT_INLINE_BYTES


def _read_exclude_keys(names: Sequence[str], problems: Problems) -> frozenset[str]:
    if len(names) > _MAX_EXCLUDE_KEYS:
        problems.add("exclude_keys", f"must be at most {_MAX_EXCLUDE_KEYS}")
        return frozenset()
    for i, name in enumerate(names):
        try:
            CacheKey.parse(name)
        except ValueError:
            problems.add(f"exclude_keys[{i}]", _NOT_A_KEY)
    return frozenset(names)


def _read_request_id(text: str, problems: Problems) -> str:
    if len(text) > MAX_REQUEST_ID or not text.isprintable():
        problems.add("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")
    return text


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a download begins, and the SHA-256 (hexadecimal) its picture must still have; empty means any."""

    read_offset: int
    sha256: str


def read_resume(message: pb.StreamImageRequest, terms: Terms, problems: Problems) -> Resume:
    """Where a StreamImageRequest wants its download to begin."""
    if message.read_offset < 0:
        problems.add("read_offset", "must not be negative")
    if terms.n > 1 and message.read_offset:
        problems.add("read_offset", "only with n = 1")
    if terms.n > 1 and message.if_digest:
        problems.add("if_digest", "only with n = 1")
    resume = Resume(message.read_offset, read_digest(message.if_digest, "if_digest", problems))
    problems.check()
    return resume


@dataclass(frozen=True, slots=True)
class PutHeader:
    """A PutImageHeader as values. `sha256` is hexadecimal, empty if the caller stated none."""

    request: ImageRequest
    replace: bool
    tags: tuple[str, ...]
    sha256: str
    ttl_s: float | None
    paid_microusd: int
    create_time_s: float | None


def read_put_header(message: pb.PutImageHeader, namespace: Namespace, now_s: float, problems: Problems) -> PutHeader:
    """What a PutImageHeader says.

    Raises:
        InvalidRequestError: fields are out of their range.
    """
    if not 0 <= message.paid_microusd <= MAX_PAID_MICROUSD:
        problems.add("paid_microusd", f"must be 0 to {MAX_PAID_MICROUSD}")
    create_time_s = None
    if message.HasField("create_time"):
        create_time_s = read_create_time(message.create_time, now_s, "create_time", problems)
    header = PutHeader(
        request=read_spec(message.spec, "spec", namespace, problems),
        replace=message.replace,
        tags=read_tags(message.tags, "tags", problems),
        sha256=read_digest(message.digest, "digest", problems),
        ttl_s=_read_ttl(message.ttl, "ttl", problems) if message.HasField("ttl") else None,
        paid_microusd=message.paid_microusd,
        create_time_s=create_time_s,
    )
    problems.check()
    return header


def read_spec(spec: pb.ImageSpec, path: str, namespace: Namespace, problems: Problems) -> ImageRequest:
    """The request that a spec spells, with defaults filled in."""
    request = ImageRequest(
        prompt=spec.prompt,
        model=spec.model or namespace.default_model,
        size=spec.size or _AUTO,
        quality=spec.quality or _AUTO,
        background=spec.background or _AUTO,
        output_format=spec.output_format or "png",
        output_compression=spec.output_compression if spec.HasField("output_compression") else 100,
        moderation=spec.moderation or _AUTO,
        seed=spec.seed if spec.HasField("seed") else None,
        extra=_read_extra(spec.extra, f"{path}.extra", problems) if spec.HasField("extra") else _NO_EXTRA,
        inputs=read_inputs(spec.inputs, f"{path}.inputs", problems.add) if spec.inputs else (),
    )
    for field, text in validate(request).items():
        problems.add(f"{path}.{field}", text)
    return request


def read_find_item(item: pb.FindItem, path: str, namespace: Namespace, problems: Problems) -> ImageRequest | CacheKey:
    """What a FindItem looks for."""
    match item.WhichOneof("what"):
        case "spec":
            if not 0 <= item.variant <= MAX_VARIANT:
                problems.add(f"{path}.variant", f"must be 0 to {MAX_VARIANT}")
            return read_spec(item.spec, f"{path}.spec", namespace, problems)
        case "key":
            if item.variant:
                problems.add(f"{path}.variant", "a key names its variant: leave variant unset")
            return read_key(item.key, f"{path}.key", namespace, problems)
        case _:
            problems.add(f"{path}.spec", "spec or key must be set")
            return _NO_KEY


def read_key(name: str, path: str, namespace: Namespace, problems: Problems) -> CacheKey:
    """The key that `name` spells, if it can name a picture of this namespace.

    A key of another partition is refused for what it says, before anything is looked up: the answer is the
    same whether such a picture exists or not.
    """
    try:
        key = CacheKey.parse(name)
    except ValueError:
        problems.add(path, _NOT_A_KEY)
        return _NO_KEY
    if key.partition != namespace.partition or key.is_stand_in or key.is_rendition:
        problems.add(path, "is not a key of this namespace")
    return key


def read_match_level(value: int, problems: Problems) -> MatchLevel | None:
    """The level a MatchLevel names, None if unset."""
    return _read_enum(value, _MATCH_LEVELS, None, "match_level", problems)


def _read_seconds(message: Duration, path: str, problems: Problems, *, limit_s: float = MAX_DURATION_S) -> float | None:
    """A duration of 0 to `limit_s` in seconds."""
    seconds = message.seconds + message.nanos / _NANOS
    if message.seconds < 0 or message.nanos < 0:
        problems.add(path, "must not be negative")
    elif message.nanos >= _NANOS or seconds > limit_s:
        problems.add(path, f"must be at most {limit_s:.0f} s")
    else:
        return seconds
    return None


def _read_ttl(message: Duration, path: str, problems: Problems) -> float | None:
    """A lifetime in seconds: more than none."""
    seconds = _read_seconds(message, path, problems)
    if seconds == 0:
        problems.add(path, "must be more than 0")
    return seconds


def read_create_time(message: Timestamp, now_s: float, path: str, problems: Problems) -> float:
    """A moment between 1970 and now, in seconds since 1970."""
    seconds = message.seconds + message.nanos / _NANOS
    if not (0 <= message.nanos < _NANOS and 0 <= seconds <= now_s + _CLOCK_SKEW_S):
        problems.add(path, "must lie between 1970 and now")
    return seconds


def read_tags(tags: Sequence[str], path: str, problems: Problems) -> tuple[str, ...]:
    """Labels, each once, in the order given."""
    if len(tags) > MAX_TAGS:
        problems.add(path, f"must be at most {MAX_TAGS}")
        return ()
    for i, tag in enumerate(tags):
        read_tag(tag, f"{path}[{i}]", problems)
    return tuple(dict.fromkeys(tags))


def read_tag(tag: str, path: str, problems: Problems) -> str:
    """One label."""
    if not TAG.fullmatch(tag):
        problems.add(path, "must be 1 to 64 of A-Z a-z 0-9 . _ : / -")
    return tag


def read_digest(text: str, path: str, problems: Problems) -> str:
    """The hexadecimal SHA-256 that "sha256:<hex>" names; empty if unset."""
    match = _DIGEST.fullmatch(text)
    if text and not match:
        problems.add(path, 'must be "sha256:" and 64 hexadecimal digits')
    return match[1].lower() if match else ""


def _read_enum(value: int, table: Mapping[int, T], default: T, path: str, problems: Problems) -> T:
    if value not in table:
        problems.add(path, f"has no value {value}")
    return table.get(value, default)


def _read_extra(extra: Struct, path: str, problems: Problems) -> Mapping[str, JsonValue]:
    """The provider parameters, bounded before they are converted; protobuf itself bounds how deep they nest."""
    if extra.ByteSize() > _MAX_EXTRA_WIRE_BYTES:
        problems.add(path, "must be at most 64 KiB as JSON")
        return _NO_EXTRA
    try:
        return MappingProxyType({name: _json(value) for name, value in extra.fields.items()})
    except ValueError as error:
        problems.add(path, str(error))
        return _NO_EXTRA


def _json(value: Value) -> JsonValue:
    match value.WhichOneof("kind"):
        case "null_value":
            return None
        case "bool_value":
            return value.bool_value
        case "string_value":
            return value.string_value
        case "number_value":
            # A Struct knows doubles only; providers want whole numbers as integers.
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "list_value":
            return [_json(item) for item in value.list_value.values]
        case "struct_value":
            return {name: _json(item) for name, item in value.struct_value.fields.items()}
        case _:
            raise ValueError("has a value without a kind")
