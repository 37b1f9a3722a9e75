"""The values that travel through the house. Frozen, and they import nothing of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias, cast

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

KEY_VERSION = "v1"
"""First part of every key and of every name in Redis, in object storage and on disk."""

PARTITION_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
"""What a namespace or partition may be called: safe in keys, paths, URLs and metric labels."""

MAX_VARIANT = 9_999
"""Highest variant number of a request; the slots of stand-ins and renditions lie above it."""

REVIEW_PREFIX = "r--"
"""Begins the partition of pictures that wait for review, which no namespace may have."""

_STAND_IN_OFFSET = 10_000
_RENDITION_OFFSET = 20_000


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
    NEGATIVE = "negative"
    STALE = "stale"
    OBSERVED = "observed"
    DERIVED = "derived"


class StatsSpan(StrEnum):
    """The length of a time bucket of statistics, in UTC."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"


class StatsField(StrEnum):
    """What rows of statistics are told apart by, beside time."""

    NAMESPACE = "namespace"
    MODEL = "model"
    QUALITY = "quality"
    CALLER = "caller"
    OUTCOME = "outcome"
    TIER = "tier"


class PromptKind(StrEnum):
    """Why a prompt was recorded."""

    MISSED = "missed"
    """ONLY_IF_CACHED, and no tier had it."""

    TURNED_AWAY = "turned_away"
    """A budget, a full queue or an upstream that was away kept it from being made."""

    EXPIRING = "expiring"
    """Asked for, and soon to expire."""

    REROLLED = "rerolled"
    """Another picture of it was asked for."""

    DEGRADED = "degraded"
    """Answered at a lower quality than asked for."""

    GENERATED = "generated"
    """What the cache did not have."""


class WarmResult(StrEnum):
    """What became of an item of a warm-up."""

    CACHED = "cached"
    GENERATED = "generated"
    DUPLICATE = "duplicate"
    COLLAPSED = "collapsed"
    FILLED = "filled"
    ABSENT = "absent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class InputImage:
    """An image that an edit starts from; it counts by its digest.

    `data` is None where only the digest is known: such a request can be looked up and not made.
    """

    role: InputRole
    sha256: str
    content_type: str = field(default="", compare=False)
    data: bytes | None = field(default=None, compare=False, repr=False)


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

    @property
    def without_bytes(self) -> ImageRequest:
        """The same request with its input images known by their digests alone, for whoever keeps it."""
        if not self.inputs:
            return self
        return replace(self, inputs=tuple(replace(image, data=None) for image in self.inputs))


class _Named:
    """Has room for a name that is made once. No field of its own: it neither counts nor travels."""

    __slots__ = ("_name",)

    _name: str


@dataclass(frozen=True, slots=True)
class CacheKey(_Named):
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
    def fingerprint_name(self) -> str:
        """What begins the names of a picture, of its other variants and of their renditions."""
        return f"{KEY_VERSION}.{self.partition}.{self.fingerprint.hex()}"

    @property
    def identity_name(self) -> str:
        """The name without the variant: what a flight, and all variants of one identity, share."""
        return self.name.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The public key: opaque to callers, URL-safe, at most 200 characters. Made once: every tier asks for it."""
        name: str | None = getattr(self, "_name", None)
        if name is None:
            name = self.name_of(self.partition, self.fingerprint, self.digest, self.variant)
            object.__setattr__(self, "_name", name)
        return name

    @staticmethod
    def name_of(partition: str, fingerprint: bytes, digest: bytes, variant: int) -> str:
        """The name of the key with these fields."""
        return f"{KEY_VERSION}.{partition}.{fingerprint.hex()}.{digest[:16].hex()}.{variant}"

    def matches(self, identity_digest: bytes) -> bool:
        """Whether an entry with this identity digest (32 bytes) is what the key asks for."""
        return identity_digest.startswith(self.digest)

    def with_variant(self, variant: int) -> CacheKey:
        """The same identity's key for another variant."""
        if variant == self.variant:
            return self
        return CacheKey(self.partition, self.fingerprint, self.digest, variant)

    @property
    def stand_in(self) -> CacheKey:
        """Where the picture lies that was paid for while the last tier could not say whether it had this one."""
        return self.with_variant(self.variant + _STAND_IN_OFFSET)

    @property
    def is_stand_in(self) -> bool:
        """Whether this names a stand-in slot, which only the fast tiers hold."""
        return MAX_VARIANT < self.variant < _RENDITION_OFFSET

    @property
    def made_for(self) -> CacheKey:
        """The key itself, or for a stand-in slot the key it stands in for."""
        return self.with_variant(self.variant - _STAND_IN_OFFSET) if self.is_stand_in else self

    def rendition(self, digest: bytes) -> CacheKey:
        """Where the rendition with this identity digest (32 bytes) of the key's picture lies: beside it by its name."""
        return replace(self, digest=digest, variant=self.variant + _RENDITION_OFFSET)

    @property
    def is_rendition(self) -> bool:
        """Whether this names a rendition, which answers no request by itself."""
        return self.variant >= _RENDITION_OFFSET

    @property
    def in_review(self) -> CacheKey:
        """Where a picture of this key waits for review: in a partition that no caller can read."""
        return replace(self, partition=REVIEW_PREFIX + self.partition)

    @property
    def reviewed(self) -> CacheKey:
        """The key that a picture waiting for review will have once it is approved."""
        return replace(self, partition=self.partition.removeprefix(REVIEW_PREFIX))

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


ImageBytes: TypeAlias = bytes | memoryview
"""An encoded picture: bytes of its own, or a view into a larger buffer that holds it."""


def buffer_of(data: ImageBytes) -> bytes:
    """What is in memory as long as these bytes are: a view keeps all of what it is of."""
    return cast("bytes", data.obj) if isinstance(data, memoryview) else data


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One picture as an upstream made it, decoded once to be believed.

    `sha256` is the hexadecimal digest of `data`. `paid_microusd` is this picture's share of its call. `score`
    (0 to 1) and `won_against` are those of the best of several candidates.
    """

    data: ImageBytes = field(repr=False)
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
    score: float | None = None
    won_against: int = 0


@dataclass(frozen=True, slots=True)
class PartialImage:
    """A picture on its way, as far as its upstream has drawn it. `index` counts those of one picture from 0."""

    data: bytes = field(repr=False)
    index: int


@dataclass(frozen=True, slots=True)
class Rendition:
    """What is wanted of a stored picture: the box it is to fit into, and how it is to be encoded.

    A picture is never enlarged and keeps its shape: `width` and `height` (pixels) are the most it may have, None any.
    `output_format` ("png", "jpeg" or "webp") None keeps the picture's own; `output_compression` (0 to 100) is that of
    jpeg and webp. `strip` leaves out what the file says of itself: EXIF, XMP and C2PA, never the colour profile.
    """

    width: int | None = None
    height: int | None = None
    output_format: str | None = None
    output_compression: int | None = None
    strip: bool = False


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one call to an upstream brought: its pictures, whose costs add up to the call's.

    `told` are the rate limits that this very answer told of. `priced` is False where nobody said what the call
    cost, so that the pictures carry the most it can have cost.
    """

    images: tuple[GeneratedImage, ...]
    told: RateLimits | None = None
    priced: bool = True

    def __iter__(self) -> Iterator[GeneratedImage]:
        """The pictures."""
        return iter(self.images)

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.images)


class AttemptOutcome(StrEnum):
    """How far a paid call has come; a ledger row's state."""

    SENT = "sent"
    """On its way, or was when we died: may cost its estimate."""

    SETTLED = "settled"
    """Answered; the cost is known."""

    NOT_BILLED = "not_billed"
    """Nothing was sent, or the provider refused before making anything."""

    UNKNOWN = "unknown"
    """Sent, and nobody knows what became of it: booked at its estimate."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call to an upstream: a row of the ledger. Money in micro-dollars, times in seconds since 1970.

    `estimate_microusd` is the most it can cost, set aside before it is sent. `cost_microusd` is what is booked:
    the provider's price once settled, the estimate while unknown, 0 when not billed. `reason` is "ok" or the
    published reason it failed for.
    """

    id: str
    namespace: str
    caller: str
    upstream: str
    model: str
    images: int
    estimate_microusd: int
    start_time_s: float
    tags: tuple[str, ...] = ()
    outcome: AttemptOutcome = AttemptOutcome.SENT
    end_time_s: float | None = None
    cost_microusd: int = 0
    reason: str = ""
    upstream_request_id: str = ""
    usage: Usage | None = None
    quality: str = ""


class BudgetScope(StrEnum):
    """Whose spending a budget bounds."""

    GLOBAL = "global"
    NAMESPACE = "namespace"
    CALLER = "caller"


class BudgetPeriod(StrEnum):
    """How long a budget lasts, in UTC."""

    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be spent in a period. `subject` is the namespace or caller; empty for the global one."""

    scope: BudgetScope
    subject: str
    period: BudgetPeriod
    limit_microusd: int = field(compare=False)
    """It may change: what is spent of a budget stays spent."""

    @property
    def name(self) -> str:
        """How it is called in errors, metrics and commands: "global/day", "namespace:shop/month"."""
        whose = f"{self.scope}:{self.subject}" if self.subject else str(self.scope)
        return f"{whose}/{self.period}"


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget as it stands. `reset_time_s` is when its period ends, in seconds since 1970."""

    budget: Budget
    spent_microusd: int
    reserved_microusd: int
    reset_time_s: float


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One limit as a provider told it: how much in all, how much is left, seconds until all is back. None: not told."""

    limit: int | None
    remaining: int | None
    reset_s: float | None


@dataclass(frozen=True, slots=True)
class RateLimits:
    """The limits one answer of a provider told of; None for those it did not."""

    requests: RateLimit | None = None
    tokens: RateLimit | None = None
    images: RateLimit | None = None

    @property
    def wait_s(self) -> float | None:
        """Seconds until every limit that is used up has been restored; None if none is."""
        used_up = [limit for limit in (self.requests, self.tokens, self.images) if limit and limit.remaining == 0]
        return max((limit.reset_s for limit in used_up if limit.reset_s), default=None)


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """What one limit group (all keys of one organisation) may send. None is no limit.

    `burst_s` is how much unused time may be caught up on at once; `headroom` the share of each limit (0 to 1)
    left unused, so that jitter on the way to the provider never looks like too much.
    """

    images_per_minute: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    images_per_day: int | None = None
    requests_per_day: int | None = None
    tokens_per_day: int | None = None
    concurrent: int = 100
    burst_s: float = 1.0
    headroom: float = 0.02


@dataclass(frozen=True, slots=True)
class Amounts:
    """What one call takes of its group's limits. `tokens` is an estimate."""

    images: int = 1
    requests: int = 1
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """A moment reserved in a limit group: `wait_s` from now its amounts may be sent. Nobody else gets it.

    `running` counts the calls of the group that hold a place, in all replicas, this one included.
    """

    id: str
    group: str
    amounts: Amounts
    wait_s: float
    running: int = 1


@dataclass(frozen=True, slots=True)
class CallReport:
    """What one finished call says about its group's limits.

    `limited`: it was answered 429 for a rate limit. `tokens` is what it really took, None if not told; `images` how
    many it asked for, None if as many as were reserved.
    """

    limited: bool = False
    retry_after_s: float | None = None
    told: RateLimits | None = None
    tokens: int | None = None
    images: int | None = None


class UpstreamHealth(StrEnum):
    """Whether an upstream is in the pool, and if not, why."""

    WELL = "well"
    PAUSED = "paused"
    """An operator took it out."""

    DOWN = "down"
    """It failed too often; probed until it is back."""

    NOT_ENTITLED = "not_entitled"
    """It never accepted our key for what we ask: a person must act. Probed hourly."""

    NO_QUOTA = "no_quota"
    """Its account's money is used up: a person must act. Probed hourly."""


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """An upstream as the pool sees it. `success_rate` (0 to 1) and `latency_s` are decayed averages.

    `percent` None: no fixed share. `price_factor` is what the list price is multiplied by now.
    `images_per_minute` is its group's limit as learned; None without one.
    """

    name: str
    limit_group: str
    models: tuple[str, ...]
    health: UpstreamHealth
    weight: float
    percent: float | None
    rank: int
    price_factor: float
    success_rate: float
    latency_s: float | None
    in_flight: int
    calls: int
    images_per_minute: float | None


@dataclass(frozen=True, slots=True)
class Order:
    """What the miss path is asked to make: `n` pictures, for whom, how urgently and by when.

    `deadline_s` is monotonic; None where the caller set none. `tags` go into the ledger. With `candidates`
    above 1 so many are made for each picture and the best is kept.
    """

    request: ImageRequest
    n: int
    namespace: str
    caller: str
    priority: Priority = Priority.STANDARD
    deadline_s: float | None = None
    tags: tuple[str, ...] = ()
    candidates: int = 1
    allow_degraded: bool = False
    partial_images: int = 0


@dataclass(frozen=True, slots=True)
class Outlook:
    """How fast pictures of one kind can be made now: by the limit groups of the upstreams that serve their model.

    `images_per_minute` is what these groups allow together, None without a limit. `call_s` is how long a call takes.
    """

    groups: frozenset[str]
    images_per_minute: float | None
    call_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """A transport's finished answer with one picture from memory: `raw` goes out as it is, on every hit that it fits.

    It fits where what it says of the hit would be said again: how loosely the request `matched`, and what that saved.
    `data_start` is where the picture begins in it. `latest` is what its transport keeps with it of a call that it was
    the answer to, in so many bytes.
    """

    raw: bytes = field(repr=False)
    data_start: int
    matched: MatchLevel
    saved_microusd: int
    latest: object = field(default=None, repr=False, compare=False)
    latest_bytes: int = field(default=0, compare=False)

    def fits(self, matched: MatchLevel, saved_microusd: int) -> bool:
        """Whether it says this of a hit."""
        return matched is self.matched and saved_microusd == self.saved_microusd


_SLIDING_STEP = 0.1
"""By so much of what it lives on from a hit an entry's end moves at the least."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class CachedImage:
    """An entry: a stored picture with its metadata. Times are wall-clock seconds since 1970: entries outlive us.

    `key` carries the full 32-byte identity digest. `expire_time_s` is the end of freshness, the same in all
    tiers; None means never. `namespace` is the one that stored it. `derived_from` is the name of the key whose picture
    this one was made from without a generation, empty if it was generated or put. `derived_by` is in what that picture
    is another than its key asks for, by the words of AnswerFrom; a newer release may know more. It is empty for a
    rendition, whose own key asks for nothing else. `epoch` is that of the last purge that was known when the
    flight it came from began, see epochs.py. `carried_from` are the names of the keys that the same picture has
    under other versions of the identity, from where it was carried on, see carrying.py. `sliding_s` is how long it
    lives on from a hit; 0: its end stays. `canonical_digest` is the identity digest of its canonical key (32 bytes, see
    matching.py), empty where it has none.
    """

    key: CacheKey
    image: GeneratedImage
    namespace: str
    prompt_digest: bytes
    create_time_s: float
    expire_time_s: float | None = None
    tags: tuple[str, ...] = ()
    derived_from: str = ""
    derived_by: frozenset[str] = frozenset()
    epoch: int = 0
    carried_from: tuple[str, ...] = ()
    sliding_s: float = 0.0
    canonical_digest: bytes = b""
    reply: Reply | None = field(default=None, init=False, repr=False, compare=False)
    """What the entry is told as while it lies in memory. A copy of the entry has none: it may say other things."""

    @property
    def size_bytes(self) -> int:
        """Length of the encoded image."""
        return len(self.image.data)

    def within(self, reply: Reply) -> CachedImage:
        """The entry with its picture in the buffer of a reply that holds it, so that both take the room of one."""
        data = memoryview(reply.raw)[reply.data_start : reply.data_start + self.size_bytes]
        entry = replace(self, image=replace(self.image, data=data))
        object.__setattr__(entry, "reply", reply)
        return entry

    def is_fresh(self, now_s: float, max_age_s: float | None = None) -> bool:
        """Whether the entry may be served at `now_s` to a caller that accepts nothing older than `max_age_s`."""
        if self.expire_time_s is not None and now_s >= self.expire_time_s:
            return False
        return max_age_s is None or now_s - self.create_time_s <= max_age_s

    def living_on(self, now_s: float) -> CachedImage | None:
        """The same entry with its end moved on by a hit; None if it stays, has come, or moves by too little to tell."""
        if now_s < self.slides_at_s or not self.is_fresh(now_s):
            return None
        return replace(self, expire_time_s=now_s + self.sliding_s)

    @property
    def slides_at_s(self) -> float:
        """From when on a hit moves its end on."""
        if not self.sliding_s or self.expire_time_s is None:
            return math.inf
        return self.expire_time_s - (1 - _SLIDING_STEP) * self.sliding_s

    def outlasts(self, other: CachedImage) -> bool:
        """Whether its end is so much later than the other's that whoever has that one is to be told."""
        if not self.sliding_s or self.expire_time_s is None or other.expire_time_s is None:
            return False
        return self.expire_time_s - other.expire_time_s >= 0.999 * _SLIDING_STEP * self.sliding_s


class Touch(StrEnum):
    """What became of an entry in a tier that was told that it is asked for; the value of the `result` label.

    GONE: another picture lies there, or the last tier has none. ABSENT: a faster one has none.
    """

    CURRENT = "current"
    MOVED = "moved"
    PROLONGED = "prolonged"
    ABSENT = "absent"
    COPIED = "copied"
    GONE = "gone"


class Touched(NamedTuple):
    """The same, and for how many seconds nothing more is to be done for it there."""

    result: Touch
    lasts_s: float = math.inf


class Stale(IntEnum):
    """Why a picture past its end is the answer, if it is one."""

    NO = 0
    RENEWED = 1
    """A new one is made behind the answer, where its caller may have one made."""

    AFTER_ERROR = 2
    """No new one could be made."""


class AnswerFrom(StrEnum):
    """From which other stored picture of the same prompt a request may be answered instead of being paid for."""

    QUALITY = "quality"
    """One of a higher quality, as it is."""

    FORMAT = "format"
    """One in a lossless format, encoded as asked for."""

    SIZE = "size"
    """A larger one of the same shape, made smaller."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """Policy for a group of callers. `partition` is what shares images; by default the namespace's own name.

    `profile` is the normalization profile ("exact", "standard" or "catalog"); `catalog_patterns` what the
    catalog profile drops. Lifetimes in seconds; None is for ever. `quality_by_use` gives the quality of a request
    that says what it is for. A best candidate that scores below `min_score` waits for a person's review.
    `remake_degraded`: what was made at a lower quality is made anew, at the one asked for, off-peak.
    `store_prompts`: what its callers ask for and the cache does not have is recorded, prompts and all.
    `serve_percent` (0 to 100) is the share of keys that are served from the cache; the others are only observed.
    `answer_from` is what its requests may be answered from before a picture is paid for. `public_images`: whoever has a
    picture's key may fetch it over HTTP; otherwise a signed URL or a token is needed. `identity_version`: by which
    its requests are keyed. So long after its end an entry is answered with still: `stale_while_revalidate_s` while a
    new one is made; `stale_if_error_s` where none can be. `is_sliding`: a lifetime begins anew with each hit.
    `similarity` is how far a request and the prompt of a picture that answers it may be apart: EXACT (no further than
    its profile says), CANONICAL or SEMANTIC. `ignore_quality_words`: canonical keys say nothing of words that only ask
    for more pixels or care. `corrects_typos`: nor whether a word is misspelt, see identity/typos.py.
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
    quality_by_use: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    max_candidates: int = 4
    min_score: float | None = None
    remake_degraded: bool = False
    serve_percent: float = 100.0
    store_prompts: bool = False
    answer_from: frozenset[AnswerFrom] = frozenset()
    public_images: bool = False
    identity_version: int = 1
    stale_while_revalidate_s: float = 0.0
    stale_if_error_s: float = 0.0
    is_sliding: bool = False
    similarity: MatchLevel = MatchLevel.EXACT
    ignore_quality_words: bool = True
    corrects_typos: bool = False

    @property
    def stale_s(self) -> float:
        """For how long after its end an entry may be of use."""
        return max(self.stale_while_revalidate_s, self.stale_if_error_s)

    @property
    def shares_spellings(self) -> bool:
        """Whether its pictures answer for other prompts, too, that ask for the same in other words."""
        return self.similarity >= MatchLevel.CANONICAL

    def lifetime_s(self, ttl_s: float | None) -> float | None:
        """How long a new picture is good for where its caller asks for `ttl_s`; None is for ever."""
        lifetimes_s = [ttl_s if ttl_s is not None else self.ttl_s, self.max_ttl_s]
        return min((s for s in lifetimes_s if s is not None), default=None)

    @property
    def serves_all(self) -> bool:
        """Whether every key is served from the cache."""
        return self.serve_percent >= 100  # noqa: PLR2004 - percent

    def serves(self, key: CacheKey) -> bool:
        """Whether this key is served from the cache. One that is stays so when the percentage grows."""
        if self.serves_all:
            return True
        return int.from_bytes(key.fingerprint[:8]) / 2**64 * 100 < self.serve_percent


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
    """What a call says beside the picture it wants. Durations in seconds; None is unset.

    `on_partial` gets up to `partial_images` partial pictures while one is made, if its upstream gives any: called from
    the event loop, and it must not fail. `no_transform`: a picture made from another one is not wanted. `match_level`
    is the loosest match it accepts, None that of the namespace.
    """

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
    candidates: int = 1
    no_transform: bool = False
    match_level: MatchLevel | None = None
    partial_images: int = 0
    on_partial: Callable[[PartialImage], None] | None = field(default=None, compare=False, repr=False)

    @property
    def wants_stored(self) -> bool:
        """Whether it takes what is stored, the first of it, every time it is sent: nothing is made anew or chosen."""
        is_read = self.cache_policy in (CachePolicy.USE_CACHE, CachePolicy.ONLY_IF_CACHED)
        return is_read and self.variant_policy is VariantPolicy.FIRST


@dataclass(frozen=True, slots=True)
class Ask:
    """One call for pictures: what is asked for, by whom and on what terms."""

    request: ImageRequest
    identity: Identity
    namespace: Namespace
    caller: Caller
    terms: Terms


@dataclass(frozen=True, slots=True)
class Served:
    """One picture of an answer and where it came from.

    `would_hit`: made for this caller alone, though this tier would have answered; UPSTREAM: though it would have
    joined a load. None: the cache was used as it is. `derived`: made now from the picture of another request, which
    `tier` had. `stale`: it is past its end.
    """

    entry: CachedImage
    tier: TierName
    matched: MatchLevel
    collapsed: bool = False
    stale: Stale = Stale.NO
    degraded: bool = False
    cost_microusd: int = 0
    saved_microusd: int = 0
    would_hit: TierName | None = None
    derived: bool = False

    @property
    def matched_key(self) -> str:
        """The key that matched, where it is not the one asked for."""
        return self.entry.key.name if self.is_similar else ""

    @property
    def is_similar(self) -> bool:
        """Whether the picture is of another prompt, which asks for the same in other words."""
        return self.matched >= MatchLevel.CANONICAL

    @property
    def is_plain_hit(self) -> bool:
        """Whether memory had what was asked for, and nothing more is to be said of it."""
        is_more = self.collapsed or self.stale or self.degraded or self.derived or self.cost_microusd or self.is_similar
        return self.tier is TierName.MEMORY and self.would_hit is None and not is_more


@dataclass(frozen=True, slots=True)
class Pending:
    """An answer that is on its way: its keys, and how much longer it is expected to take.

    `in_review`: it is made, and a person has to approve it first; nobody knows how long that takes.
    """

    keys: tuple[CacheKey, ...]
    estimated_wait_s: float
    in_review: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """Where one image is: `tier` None and not `in_flight` means in no tier that could be asked."""

    key: CacheKey
    tier: TierName | None = None
    in_flight: bool = False


@dataclass(frozen=True, slots=True)
class RecordedPrompt:
    """A request that callers made, and why it is of interest. `count` is how often, lately: it fades.

    `last_time_s` is in seconds since 1970.
    """

    request: ImageRequest
    namespace: str
    n: int
    kind: PromptKind
    count: float
    last_time_s: float


class Switch(StrEnum):
    """What can be turned off while the service runs. SIMILARITY: answers with pictures of other prompts."""

    SIMILARITY = "similarity"


@dataclass(frozen=True, slots=True)
class SampledMatch:
    """A similar hit that is kept for review: `key` was asked for, the picture of `matched_key` answered.

    Of two samples the one with the greater `id` is the newer. `time_s` is in seconds since 1970. `prompt` is the one
    asked for, or its beginning; empty where none is kept.
    """

    id: str
    time_s: float
    namespace: str
    level: MatchLevel
    key: CacheKey
    matched_key: CacheKey
    prompt: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Alias:
    """That the pictures of `key`'s identity answer for another key, at `level`.

    `prompt_digest` is that of the prompt which was made for both: an entry that does not tell its canonical key is
    known by it.
    """

    key: CacheKey
    level: MatchLevel
    prompt_digest: bytes


@dataclass(frozen=True, slots=True)
class Labels:
    """What purge selects by, besides the key. `derived_from`, `epoch` and `carried_from` are the entry's."""

    namespace: str
    tags: tuple[str, ...]
    derived_from: str = ""
    epoch: int = 0
    carried_from: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Head:
    """A stored entry without its bytes: `bare` is it with an empty image, `size_bytes` the image's length."""

    bare: CachedImage
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SourceObject:
    """An object in the store of the S3 tier, in the version (`etag`) that was read, and its bytes."""

    bucket: str
    name: str
    etag: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Replay:
    """What a call with a request_id was given: these variants of this identity. None of them: it was not kept."""

    identity_name: str
    variants: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TierState:
    """How one tier stands. `breaker_open`: nobody asks it until it answers again. `size_bytes` None: nobody knows."""

    name: TierName
    breaker_open: bool
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LiveState:
    """How a process stands at one moment.

    `time_s` is in seconds since 1970; `in_flight` counts loads, `queue` generations that wait. `held_images` wait
    for the last tier, the oldest of them since `oldest_held_s` seconds.
    """

    time_s: float
    in_flight: int
    queue: Mapping[Priority, int]
    tiers: tuple[TierState, ...]
    held_images: int
    oldest_held_s: float


class JournalSync(StrEnum):
    """When a record of the journal is flushed to the disk. Until then a power cut loses it; no process's death does."""

    ALWAYS = "always"
    """Before its caller is answered."""

    INTERVAL = "interval"
    """Every so many seconds."""

    OFF = "off"
    """When the system pleases."""


class AlarmKind(StrEnum):
    """What an alarm watches, and on which side of its threshold it rings.

    Rates are shares of what was asked for in a window, 0 to 1; spending is in dollars an hour; ages are in seconds; of
    breakers it is how many are open; of the journal the share of what it may hold.
    """

    HIT_RATE_BELOW = "hit_rate_below"
    HIT_RATE_ABOVE = "hit_rate_above"
    SIMILAR_RATE_BELOW = "similar_rate_below"
    SIMILAR_RATE_ABOVE = "similar_rate_above"
    ERROR_RATE_ABOVE = "error_rate_above"
    SPEND_PER_HOUR_ABOVE = "spend_per_hour_above"
    UNSAVED_AGE_ABOVE = "unsaved_age_above"
    JOURNAL_SHARE_ABOVE = "journal_share_above"
    BREAKER_OPEN = "breaker_open"

    @property
    def is_lower_bound(self) -> bool:
        """Whether it rings for figures below its threshold, and not above."""
        return self in (AlarmKind.HIT_RATE_BELOW, AlarmKind.SIMILAR_RATE_BELOW)


class AlarmState(StrEnum):
    """Whether an alarm rings. WAITING: its figure is out of bounds, and not for long enough yet."""

    QUIET = "quiet"
    WAITING = "waiting"
    RINGING = "ringing"


@dataclass(frozen=True, slots=True)
class AlarmRule:
    """When an alarm rings: its figure has been beyond `threshold` for `for_s` seconds.

    Figures that change with traffic are those of the last `window_s` seconds, and rates are judged only where
    `min_requests` came in them. `namespace` None is all of them; `target` is the tier or upstream whose breaker is
    meant, None any.
    """

    name: str
    kind: AlarmKind
    threshold: float
    window_s: float = 300.0
    for_s: float = 60.0
    min_requests: int = 50
    namespace: str | None = None
    target: str | None = None
    runbook_url: str = ""

    def is_beyond(self, value: float) -> bool:
        """Whether a figure is out of bounds; at the threshold itself it is not."""
        return value < self.threshold if self.kind.is_lower_bound else value > self.threshold


@dataclass(frozen=True, slots=True)
class Alarm:
    """A rule and how it stands: since when (seconds since 1970), and at which figure. None: there is none to judge.

    `is_of_all` says that the figure is that of all replicas together, not of this one.
    """

    rule: AlarmRule
    state: AlarmState
    since_s: float
    value: float | None = None
    is_of_all: bool = False
