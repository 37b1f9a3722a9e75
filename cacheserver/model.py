"""The values that travel through the house. Frozen, and they import nothing of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from types import MappingProxyType

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

KEY_VERSION = "v1"
"""First part of every key and of every name in Redis, in object storage and on disk."""

PARTITION_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
"""What a namespace or partition may be called: safe in keys, paths, URLs and metric labels."""

MAX_VARIANT = 9_999
"""Highest variant number of a request; the stand-in slots lie above it."""

_STAND_IN_OFFSET = 10_000


class TierName(StrEnum):
    """A level of the cache, or what lies beside it: the word used in metrics, config and logs."""

    MEMORY = "memory"
    REDIS = "redis"
    DISK = "disk"
    S3 = "s3"
    JOURNAL = "journal"
    UPSTREAM = "upstream"


class MatchLevel(IntEnum):
    """How far a request and a stored picture's own prompt agree, tightest first."""

    EXACT = 1
    STANDARD = 2
    CATALOG = 3
    CANONICAL = 4
    SEMANTIC = 5


class CachePolicy(StrEnum):
    """How a call uses the cache."""

    USE_CACHE = "use_cache"
    ONLY_IF_CACHED = "only_if_cached"
    REFRESH = "refresh"
    NO_STORE = "no_store"


class VariantPolicy(StrEnum):
    """Which of a request's pictures to answer with."""

    FIRST = "first"
    RANDOM = "random"
    STICKY = "sticky"
    NEXT = "next"


class Priority(IntEnum):
    """How urgent a generation is; the larger number goes first."""

    WARM_UP = 1
    BATCH = 2
    STANDARD = 3
    INTERACTIVE = 4


class Permission(StrEnum):
    """What a caller may do."""

    READ = "read"
    GENERATE = "generate"
    PUT = "put"
    PURGE = "purge"
    ADMIN = "admin"


class InputRole(StrEnum):
    """What an input image of an edit is for."""

    IMAGE = "image"
    MASK = "mask"
    STYLE = "style"


class Outcome(StrEnum):
    """What became of a picture asked for; the value of the `outcome` label."""

    HIT = "hit"
    MISS = "miss"
    COLLAPSED = "collapsed"
    PENDING = "pending"
    NOT_CACHED = "not_cached"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class InputImage:
    """An image that an edit starts from; its bytes count by their digest."""

    role: InputRole
    sha256: str


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What decides the picture, as the caller wrote it but for defaults filled in.

    `prompt` is what goes upstream; normalization happens in the identity alone. `extra` holds provider
    parameters we do not know; all of them are part of the identity.
    """

    prompt: str
    model: str
    size: str = "auto"
    quality: str = "auto"
    background: str = "auto"
    output_format: str = "png"
    output_compression: int = 100
    moderation: str = "auto"
    seed: int | None = None
    extra: Mapping[str, JsonValue] = field(default_factory=lambda: MappingProxyType({}))
    inputs: tuple[InputImage, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Names one picture: key version, partition, fingerprint, identity digest, variant.

    `fingerprint` is the xxh3-128 of the canonical identity (16 bytes), `digest` its SHA-256: all 32 bytes
    when made from a request, the first 16 when parsed from a public key. `name` is the public key and the
    storage name in every tier at once; it carries 128 bits of the digest, so two identities whose
    fingerprints collide never share a slot, and `matches` settles the rest on every read.
    """

    partition: str
    fingerprint: bytes
    digest: bytes
    variant: int

    @property
    def identity_name(self) -> str:
        """The name without the variant: what a flight, and all variants of one identity, share."""
        return f"{KEY_VERSION}.{self.partition}.{self.fingerprint.hex()}.{self.digest[:16].hex()}"

    @property
    def name(self) -> str:
        """The public key: opaque to callers, URL-safe, at most 200 characters."""
        return f"{self.identity_name}.{self.variant}"

    def matches(self, identity_digest: bytes) -> bool:
        """Whether an entry with this identity digest (32 bytes) is what the key asks for."""
        return identity_digest.startswith(self.digest)

    def with_variant(self, variant: int) -> CacheKey:
        """The same identity's key for another variant."""
        return replace(self, variant=variant)

    @property
    def stand_in(self) -> CacheKey:
        """Where the picture lies that was paid for while the last tier could not say whether it had this one."""
        return self.with_variant(self.variant + _STAND_IN_OFFSET)

    @property
    def is_stand_in(self) -> bool:
        """Whether this names a stand-in slot, which only the fast tiers hold."""
        return self.variant > MAX_VARIANT

    @property
    def made_for(self) -> CacheKey:
        """The key itself, or for a stand-in slot the key it stands in for."""
        return self.with_variant(self.variant - _STAND_IN_OFFSET) if self.is_stand_in else self

    @staticmethod
    def parse(name: str) -> CacheKey:
        """The key that `name` spells.

        Raises:
            ValueError: `name` is not a key of this version.
        """
        match = _KEY_PATTERN.fullmatch(name)
        if match is None:
            raise ValueError("not a cache key of version v1")
        partition, fingerprint, digest, variant = match.groups()
        return CacheKey(partition, bytes.fromhex(fingerprint), bytes.fromhex(digest), int(variant))


_KEY_PATTERN = re.compile(
    rf"{KEY_VERSION}\.({PARTITION_PATTERN.pattern})\.([0-9a-f]{{32}})\.([0-9a-f]{{32}})\.(0|[1-9][0-9]{{0,4}})"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """A request's identity in one partition, under one profile.

    `canonical` is the identity as canonical JSON bytes; `level` the match the profile stands for;
    `prompt_digest` the SHA-256 of the prompt as written, which tells an exact match from a normalized one.
    """

    key: CacheKey
    level: MatchLevel
    profile: str
    normalized_prompt: str
    canonical: bytes
    prompt_digest: bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as image models bill them, for one picture."""

    input_tokens: int = 0
    input_text_tokens: int = 0
    input_image_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One picture as an upstream made it, decoded once to be believed.

    `sha256` is the hexadecimal digest of `data`. `paid_microusd` is this picture's share of its call.
    """

    data: bytes
    content_type: str
    width: int
    height: int
    sha256: str
    model: str
    size: str
    quality: str
    background: str
    revised_prompt: str = ""
    seed: int | None = None
    usage: Usage | None = None
    upstream: str = ""
    upstream_request_id: str = ""
    generation_s: float = 0.0
    paid_microusd: int = 0


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An entry: a stored picture with its metadata. Times are wall-clock seconds since 1970: entries outlive us.

    `key` carries the full 32-byte identity digest. `expire_time_s` is the end of freshness, the same in all
    tiers; None means never. `namespace` is the one that stored it.
    """

    key: CacheKey
    image: GeneratedImage
    namespace: str
    prompt_digest: bytes
    create_time_s: float
    expire_time_s: float | None = None
    tags: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Length of the encoded image."""
        return len(self.image.data)

    def is_fresh(self, now_s: float, max_age_s: float | None = None) -> bool:
        """Whether the entry may be served at `now_s` to a caller that accepts nothing older than `max_age_s`."""
        if self.expire_time_s is not None and now_s >= self.expire_time_s:
            return False
        return max_age_s is None or now_s - self.create_time_s <= max_age_s


@dataclass(frozen=True, slots=True)
class Namespace:
    """Policy for a group of callers. `partition` is what shares images; by default the namespace's own name.

    `profile` is the normalization profile ("exact", "standard" or "catalog"); `catalog_patterns` what the
    catalog profile drops. Lifetimes in seconds; None is for ever.
    """

    name: str
    partition: str
    profile: str = "standard"
    catalog_patterns: tuple[str, ...] = ()
    default_model: str = ""
    default_priority: Priority = Priority.STANDARD
    max_variants: int = 10
    ttl_s: float | None = None
    max_ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: decides which namespaces and operations are open, and never enters a key.

    `namespaces` None means all.
    """

    name: str
    permissions: frozenset[Permission]
    namespaces: frozenset[str] | None = None
    max_priority: Priority = Priority.INTERACTIVE

    def may(self, permission: Permission, namespace: str) -> bool:
        """Whether the caller may do this in that namespace."""
        return permission in self.permissions and (self.namespaces is None or namespace in self.namespaces)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a call says beside the picture it wants. Durations in seconds; None is unset."""

    n: int = 1
    cache_policy: CachePolicy = CachePolicy.USE_CACHE
    variant_policy: VariantPolicy = VariantPolicy.FIRST
    max_age_s: float | None = None
    ttl_s: float | None = None
    max_wait_s: float | None = None
    deadline_s: float | None = None
    exclude_keys: frozenset[str] = frozenset()
    priority: Priority = Priority.STANDARD
    request_id: str = ""
    tags: tuple[str, ...] = ()
    allow_degraded: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """One picture of an answer and where it came from."""

    entry: CachedImage
    tier: TierName
    matched: MatchLevel
    collapsed: bool = False
    stale: bool = False
    cost_microusd: int = 0
    saved_microusd: int = 0


@dataclass(frozen=True, slots=True)
class Pending:
    """An answer that is on its way: its keys, and how much longer it is expected to take."""

    keys: tuple[CacheKey, ...]
    estimated_wait_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """Where one image is: `tier` None and not `in_flight` means in no tier that could be asked."""

    key: CacheKey
    tier: TierName | None = None
    in_flight: bool = False


@dataclass(frozen=True, slots=True)
class Labels:
    """What purge selects by, besides the key."""

    namespace: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a call with a request_id was given: these variants of this identity. None of them: it was not kept."""

    identity_name: str
    variants: tuple[int, ...]
