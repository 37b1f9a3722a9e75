"""What callers of the client pass in and get back. Frozen; times are aware datetimes in UTC."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import accumulate
from typing import TypedDict

from cacheserver.model import (
    CachePolicy,
    InputRole,
    JsonValue,
    MatchLevel,
    Outcome,
    Priority,
    TierName,
    Usage,
    VariantPolicy,
)


class Delivery(StrEnum):
    """How the bytes of an answer travel."""

    INLINE = "inline"
    URL = "url"
    AUTO = "auto"


class State(StrEnum):
    """Whether an answer is complete. PENDING_REVIEW: made, and it waits for a person's approval."""

    READY = "ready"
    PENDING = "pending"
    PENDING_REVIEW = "pending_review"


class Presence(StrEnum):
    """Whether an image is there."""

    ABSENT = "absent"
    CACHED = "cached"
    IN_FLIGHT = "in_flight"


@dataclass(frozen=True, slots=True)
class InputImage:
    """An image that an edit starts from: `data`, or the `digest` of what is only to be found in the cache.

    Attributes:
        data: The encoded image: png, jpeg or webp; a mask is a png.
        role: What it is for: IMAGE (the picture to edit), MASK (where; at most one) or STYLE (what to follow).
        digest: "sha256:" and 64 hexadecimal digits over the encoded image. Not looked at beside `data`.
    """

    data: bytes | None = field(default=None, repr=False)
    role: InputRole = InputRole.IMAGE
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """A prompt and its parameters: what decides the picture. None means the service's default.

    Attributes:
        prompt: 1 to 32,000 characters.
        model: Model name.
        size: "auto" or WIDTHxHEIGHT in pixels.
        quality: auto, low, medium, high, xhigh, max, standard or hd.
        background: auto, transparent or opaque.
        output_format: png, jpeg or webp.
        output_compression: 0 to 100; has no meaning for png.
        moderation: auto or low.
        seed: For models that take one.
        extra: Further parameters of the provider, as JSON values.
        inputs: What an edit starts from, at most 16 images.
    """

    prompt: str
    model: str | None = None
    size: str | None = None
    quality: str | None = None
    background: str | None = None
    output_format: str | None = None
    output_compression: int | None = None
    moderation: str | None = None
    seed: int | None = None
    extra: Mapping[str, JsonValue] | None = None
    inputs: Sequence[InputImage] | None = None


class SpecOptions(TypedDict, total=False):
    """The fields of ImageSpec beside the prompt, as keyword arguments."""

    model: str | None
    size: str | None
    quality: str | None
    background: str | None
    output_format: str | None
    output_compression: int | None
    moderation: str | None
    seed: int | None
    extra: Mapping[str, JsonValue] | None
    inputs: Sequence[InputImage] | None


class ImageOptions(SpecOptions, total=False):
    """What a call may say beside the prompt, as keyword arguments. None means the service's default.

    Attributes:
        namespace: Policy, budget and reports to use; "default" if not given.
        n: How many pictures, 1 (default) to 10.
        cache_policy: How the cache is used; USE_CACHE by default.
        max_age_s: Accept nothing older, in seconds; an older picture is replaced.
        ttl_s: Keep a picture this call makes no longer, in seconds.
        max_wait_s: Answer PENDING after this many seconds; 0 starts the generation and returns.
        variant_policy: Which of the stored pictures; FIRST by default, NEXT is "another one".
        exclude_keys: With NEXT, keys of pictures not wanted again.
        priority: How urgent; capped by the caller's right.
        request_id: Idempotency key of a NEXT, REFRESH or NO_STORE call, at most 128 characters. Made up for
            them if not given, so that no retry of the client pays twice.
        tags: Labels for purge and reports stored with a picture this call makes.
        allow_degraded: A picture of lower quality is welcome where a budget or `max_wait_s` does not allow the one
            asked for; its status says degraded.
        use: What the picture is for, as "thumbnail": the namespace says which quality that takes, if none is given.
        candidates: On a miss make this many and answer with the best; 1 by default.
        match_level: The loosest match to accept.
    """

    namespace: str | None
    n: int
    cache_policy: CachePolicy | None
    max_age_s: float | None
    ttl_s: float | None
    max_wait_s: float | None
    variant_policy: VariantPolicy | None
    exclude_keys: Sequence[str]
    priority: Priority | None
    request_id: str | None
    tags: Sequence[str]
    allow_degraded: bool
    use: str | None
    candidates: int | None
    match_level: MatchLevel | None


class GetOptions(ImageOptions, total=False):
    """What `get_image` takes beside ImageOptions.

    Attributes:
        delivery: INLINE (default), URL, or AUTO: inline up to `max_inline_bytes`, else by URL.
        max_inline_bytes: Largest answer sent inline; 4,000,000 if not given.
    """

    delivery: Delivery | None
    max_inline_bytes: int | None


class PutOptions(TypedDict, total=False):
    """What `put` takes beside the image and its prompt.

    Attributes:
        namespace: Namespace to store it in; "default" if not given.
        replace_first: Replace variant 0 rather than taking the next free variant.
        tags: Labels for purge and reports.
        ttl_s: Keep no longer, in seconds.
        paid_microusd: What the image cost: what hits on it will have saved.
        create_time: When it was made; now if not given.
    """

    namespace: str | None
    replace_first: bool
    tags: Sequence[str]
    ttl_s: float | None
    paid_microusd: int
    create_time: datetime | None


@dataclass(frozen=True, slots=True)
class Image:
    """The stored facts of one picture, the same on every hit, and its bytes or a URL to fetch them from.

    Attributes:
        key: The cache key of this picture.
        variant: Which of the pictures of its request this is, from 0.
        data: The encoded image; None when it came by URL, in chunks, or is still being made.
        url: A signed URL, if asked for; it works until `url_expire_time`.
        content_type: image/png, image/jpeg or image/webp.
        digest: "sha256:" and 64 hexadecimal digits over the encoded image.
        model: As the provider resolved it; so are `size`, `quality` and `background`.
        paid_microusd: What the picture cost when it was made.
        score: How good it was judged, 0 to 1, where it is the best of several candidates.
        won_against: How many other candidates it was better than.
    """

    key: str
    variant: int = 0
    data: bytes | None = field(default=None, repr=False)
    url: str | None = field(default=None, repr=False)
    url_expire_time: datetime | None = None
    content_type: str = ""
    width: int = 0
    height: int = 0
    size_bytes: int = 0
    digest: str = ""
    create_time: datetime | None = None
    model: str = ""
    size: str = ""
    quality: str = ""
    background: str = ""
    revised_prompt: str = field(default="", repr=False)
    seed: int | None = None
    usage: Usage | None = None
    upstream_request_id: str = ""
    generation_s: float = 0.0
    paid_microusd: int = 0
    score: float | None = None
    won_against: int = 0


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """Where an answer came from and what it cost.

    Attributes:
        tier: The tier that answered; UPSTREAM for a picture generated for this call; None while pending.
        state: Whether the answer is complete.
        matched: How far the request and the stored picture's own prompt agree.
        matched_key: The key that matched, where it is not the one asked for.
        derived_from: The key of the picture this one was derived from, if any.
        collapsed: The call joined a load another caller had begun.
        stale: The picture is older than its freshness lifetime.
        degraded: The picture is of lower quality than asked for.
        expire_time: Until when the picture is fresh; None is for ever.
        estimated_wait_s: While pending, how much longer it is expected to take.
        cost_microusd: What this call paid; 0 for hits and joined loads.
        saved_microusd: What it would have paid without the cache.
    """

    tier: TierName | None = None
    state: State | None = None
    matched: MatchLevel | None = None
    matched_key: str = ""
    derived_from: str = ""
    collapsed: bool = False
    stale: bool = False
    degraded: bool = False
    expire_time: datetime | None = None
    estimated_wait_s: float = 0.0
    cost_microusd: int = 0
    saved_microusd: int = 0


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The answer to `get_image`: pictures and where they came from.

    `status` names the slowest tier used and sums over all pictures; `image_status` is aligned with `images`.
    `image`, `key`, `data` and `url` are for answers of one picture and raise ValueError for several. `by_fallback`:
    the client's fallback made the pictures, while nobody answered; they have no key, and what they cost is not known.
    `call_id` is the x-request-id under which the call was made: what `explain_call` and the service's log know it by.
    """

    images: tuple[Image, ...]
    status: CacheStatus
    image_status: tuple[CacheStatus, ...] = ()
    by_fallback: bool = False
    call_id: str = ""

    @property
    def pending(self) -> bool:
        """Whether pictures are still being made or reviewed, as `status.state` says: `get_by_key` collects them."""
        return self.status.state is not State.READY

    @property
    def tier(self) -> TierName | None:
        """The slowest tier used."""
        return self.status.tier

    @property
    def keys(self) -> tuple[str, ...]:
        """The cache key of every picture, also while pending."""
        return tuple(image.key for image in self.images)

    @property
    def image(self) -> Image:
        """The only picture."""
        if len(self.images) != 1:
            raise ValueError(f"the answer holds {len(self.images)} images: use .images")
        return self.images[0]

    @property
    def key(self) -> str:
        """The cache key of the only picture."""
        return self.image.key

    @property
    def data(self) -> bytes:
        """The bytes of the only picture."""
        data = self.image.data
        if data is None:
            raise ValueError(self._why_no_data)
        return data

    @property
    def url(self) -> str | None:
        """The signed URL of the only picture, if it came by URL."""
        return self.image.url

    @property
    def _why_no_data(self) -> str:
        if self.status.state is State.PENDING_REVIEW:
            return "the image waits for a person's review"
        return "the image is still being made" if self.pending else "the image came as a URL: use .url"


@dataclass(frozen=True, slots=True)
class Progress:
    """Event of a stream: still waiting for the pictures of `keys`. Durations in seconds."""

    keys: tuple[str, ...]
    waited_s: float
    estimated_wait_s: float


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Event of a stream: picture number `index` begins; its chunks follow. `image.data` is None."""

    image: Image
    status: CacheStatus
    index: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Event of a stream: the next bytes of the picture of the last header."""

    data: bytes = field(repr=False)


StreamEvent = Progress | ImageHeader | Chunk


@dataclass(frozen=True, slots=True)
class Found:
    """Where one image is. `tier` is the fastest that has it, set only when CACHED."""

    key: str
    presence: Presence
    tier: TierName | None = None


@dataclass(frozen=True, slots=True)
class FindResult:
    """The answer to `find_cached`: one item per request, in their order.

    `unknown_tiers` could not be asked: what is ABSENT may still be there.
    """

    items: tuple[Found, ...]
    unknown_tiers: tuple[TierName, ...] = ()


@dataclass(frozen=True, slots=True)
class PutResult:
    """Where a stored image went. `created` is False if these very bytes were there already."""

    image: Image
    created: bool


@dataclass(frozen=True, slots=True)
class PurgeResult:
    """What was removed, or would be: distinct pictures, and copies per tier.

    `is_reclaiming`: all of a namespace is gone, its bytes are being removed, and nobody has counted them.
    """

    images: int
    tiers: Mapping[TierName, int]
    is_reclaiming: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """One request's way to its key.

    Attributes:
        normalized_prompt: The prompt after normalization.
        canonical_identity: Everything that decides the image, as canonical JSON.
        key: The key of variant 0.
        profile: Name and version of the normalization profile, as "standard/1".
        canonical_prompt: The prompt's canonical form, which prompts in other words share; "" where it shares with none.
    """

    normalized_prompt: str = field(repr=False)
    canonical_identity: str = field(repr=False)
    key: str
    profile: str
    canonical_prompt: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A field in which two identities differ, with its value in each."""

    field: str
    value: str
    other_value: str


@dataclass(frozen=True, slots=True)
class ExplainResult:
    """The answer to `explain`. `differences` is empty where both requests have one key."""

    explanation: Explanation
    other: Explanation | None = None
    differences: tuple[FieldDifference, ...] = ()


@dataclass(frozen=True, slots=True)
class AnsweredImage:
    """One picture of an earlier answer. `billed`: the call was billed for it."""

    key: str
    status: CacheStatus
    billed: bool


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A cached picture that another request would have found.

    Attributes:
        field: The one field in which the two requests differ; "prompt" where only the prompts do.
        value: The field's value in the call's request; empty for a prompt or an unknown parameter.
        cached_value: Its value in the request that the picture answers; empty as well.
        likeness: For a prompt: how alike their words are, 0 to 1.
    """

    key: str
    field: str
    value: str
    cached_value: str
    likeness: float


@dataclass(frozen=True, slots=True)
class CallExplanation:
    """The answer to `explain_call`: what became of an earlier call.

    Attributes:
        time: When it came.
        reason: The published reason it failed for, or how it ended; empty: it did not fail.
        nearest: For a picture that no tier had: what was nearest to it in the cache, if anything was.
    """

    rpc: str
    time: datetime | None
    caller: str
    namespace: str
    latency_s: float
    reason: str
    images: tuple[AnsweredImage, ...]
    nearest: NearMiss | None


@dataclass(frozen=True, slots=True)
class StatsRow:
    """Counters of what the row is told apart by; of everything in a total. Money in micro-dollars.

    A field that rows are not told apart by is empty, or None.

    Attributes:
        outcome: What became of the requests.
        tier: The tier that answered; None for errors, too.
        requests: Pictures answered; calls, for errors.
        coalesced_microusd: Of saved: by joining a load another caller paid for.
        unknown_microusd: At most paid by calls to upstreams whose outcome nobody knows. Not in spent.
        degraded: Of requests: answered at a lower quality than asked for.
        model: The model asked for; "other" beyond what is told apart.
        quality: The quality asked for.
        caller: Who asked; "other" beyond what is told apart.
        start_time: When the row's time bucket begins; None where there is one for all time.
        latency_counts: How many requests took how long: one count per bound of `Stats.latency_bounds_s`, and one
            for what took longer.
        would_cost_microusd: What the requests would have cost without the cache.
        settled_calls: Calls to upstreams whose cost is known: those that spent is the sum of.
        unknown_calls: Calls to upstreams whose outcome nobody knows.
        open_calls: Calls to upstreams that have not ended, or whose replica died and has not come back.
        open_microusd: The most that the open calls may cost. Neither in spent nor in unknown.
    """

    namespace: str
    outcome: Outcome | None
    tier: TierName | None
    requests: int
    image_bytes: int
    latency_sum_s: float
    spent_microusd: int
    saved_microusd: int
    coalesced_microusd: int
    unknown_microusd: int
    degraded: int
    model: str = ""
    quality: str = ""
    caller: str = ""
    start_time: datetime | None = None
    latency_counts: tuple[int, ...] = ()
    would_cost_microusd: int = 0
    settled_calls: int = 0
    unknown_calls: int = 0
    open_calls: int = 0
    open_microusd: int = 0


@dataclass(frozen=True, slots=True)
class TierLive:
    """How one tier stands. `breaker_open`: nobody asks it until it answers again. `size_bytes` None: not known."""

    tier: TierName | None
    breaker_open: bool
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Live:
    """How the process that answered stood then.

    Attributes:
        time: When this was read.
        in_flight: Loads in progress.
        queue: Generations that wait, by priority, the most urgent first.
        tiers: The tiers, fastest first.
        held_images: Images that the last tier has yet to take.
        oldest_held_s: For how many seconds the oldest of them has been held.
    """

    time: datetime | None
    in_flight: int
    queue: Mapping[Priority, int]
    tiers: tuple[TierLive, ...]
    held_images: int
    oldest_held_s: float


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of one process since its `start_time`, or of all replicas in the span of time asked for.

    Attributes:
        start_time: When counting began.
        rows: One for each combination, that occurred, of what rows are told apart by.
        total: Sums over all rows.
        paid_unknown: Pictures paid for although the last tier could not be asked. Of one process; so are the next.
        unsaved: Images no lower tier has acknowledged yet.
        corrupt: Damaged entries found, per tier.
        upstream_calls: Calls to the upstreams.
        latency_bounds_s: Upper bounds of what `StatsRow.latency_counts` counts.
        live: How the process that answered stands; None from a service that does not tell.
    """

    start_time: datetime | None
    rows: tuple[StatsRow, ...]
    total: StatsRow
    paid_unknown: int
    unsaved: int
    corrupt: Mapping[TierName, int]
    upstream_calls: int
    latency_bounds_s: tuple[float, ...] = ()
    live: Live | None = None

    def latency_s(self, row: StatsRow, share: float) -> float | None:
        """The bound that `share` (above 0, at most 1) of the row's requests did not exceed: 0.95 is the p95.

        The true figure lies between this bound and the one below it. Infinite where it lies above the last one; None
        without requests.
        """
        count = sum(row.latency_counts)
        if count == 0:
            return None
        reached = accumulate(row.latency_counts)
        bounds = (*self.latency_bounds_s, math.inf)
        return next(bound for bound, below in zip(bounds, reached, strict=True) if below >= share * count)
