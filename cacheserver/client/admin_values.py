"""What the admin calls give back. Frozen; money in micro-dollars, times are aware datetimes in UTC.

An enum is None where a newer service says what this client has no word for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cacheserver.client.errors import CacheError
from cacheserver.client.values import Image, ImageSpec
from cacheserver.model import (
    AlarmState,
    AttemptOutcome,
    BudgetPeriod,
    BudgetScope,
    MatchLevel,
    PromptKind,
    Switch,
    UpstreamHealth,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Upstream:
    """One endpoint, credential and model deployment, as the pool sees it.

    Attributes:
        name: Its name in config, metrics and logs.
        limit_group: The limit group whose limits it shares.
        models: The models it serves, as callers name them.
        health: Whether it is in the pool, and if not, why.
        weight: Its share of the work among equals.
        percent: A fixed share of its models' work, 0 to 100; None without one.
        rank: Lower ranks are used before higher ones.
        price_factor: What the list price is multiplied by now.
        success_rate: Decayed share of calls that succeeded, 0 to 1.
        latency_s: Decayed average of how long a call takes; None if not known yet.
        in_flight: Calls that run now.
        calls: Calls since the service started.
        images_per_minute: What its limit group allows, as learned; None without a limit.
    """

    name: str
    limit_group: str
    models: tuple[str, ...]
    health: UpstreamHealth | None
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
class Budget:
    """The most that may be spent in a period, and how far it is used up.

    Attributes:
        name: As "global/day" or "namespace:shop/month".
        subject: The namespace or caller; empty for the global one.
        reserved_microusd: Set aside for calls that run now.
        reset_time: When the period ends and the budget starts anew.
    """

    name: str
    scope: BudgetScope | None
    subject: str
    period: BudgetPeriod | None
    limit_microusd: int
    spent_microusd: int
    reserved_microusd: int
    reset_time: datetime | None


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One call to an upstream.

    Attributes:
        images: How many pictures were asked for.
        estimate_microusd: The most it could cost, set aside before it was sent.
        outcome: How far it has come.
        end_time: When it ended; None if it has not.
        cost_microusd: What is booked: the provider's price if SETTLED, the estimate if UNKNOWN, else 0.
        reason: "ok", or the published reason it failed for; empty if it has not ended.
        upstream_request_id: The provider's own id of the call, if it gave one.
        quality: The quality asked for; empty for calls of releases that did not write it down.
    """

    id: str
    namespace: str
    caller: str
    upstream: str
    model: str
    images: int
    estimate_microusd: int
    start_time: datetime | None
    tags: tuple[str, ...]
    outcome: AttemptOutcome | None
    end_time: datetime | None
    cost_microusd: int
    reason: str
    upstream_request_id: str
    usage: Usage | None
    quality: str = ""


@dataclass(frozen=True, slots=True)
class Review:
    """A picture that waits for a person's decision: paid for, scored (0 to 1), and not served yet.

    `key` is the one it will have once it is approved.
    """

    key: str
    namespace: str
    model: str
    width: int
    height: int
    score: float | None
    create_time: datetime | None
    content_type: str
    size_bytes: int
    paid_microusd: int


@dataclass(frozen=True, slots=True)
class Alarm:
    """A rule of the service's config and how it stands since `since`.

    `value` is the figure it looks at, in the unit of `threshold`; None where there is none to judge.
    """

    name: str
    kind: str
    state: AlarmState | None
    value: float | None
    threshold: float
    since: datetime | None
    runbook_url: str


@dataclass(frozen=True, slots=True)
class ReviewPicture:
    """A picture that waits for a person's decision, to be looked at.

    Attributes:
        review: Its facts, as the list shows them.
        data: The encoded image.
        digest: "sha256:" and the hexadecimal digest of `data`, which has been checked.
        quality: As the provider resolved it.
        revised_prompt: The prompt as the provider rewrote it; empty if it did not.
        won_against: How many other candidates it was better than.
        tags: Labels it will have for purge and reports.
    """

    review: Review
    data: bytes = field(repr=False)
    digest: str
    quality: str
    revised_prompt: str = field(repr=False)
    won_against: int
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExportedIdentity:
    """The identity of a stored picture whose prompt nobody has any more.

    Attributes:
        key: Its cache key.
        digest: SHA-256 of its canonical identity, 32 bytes.
        prompt_digest: SHA-256 of its prompt as written, 32 bytes.
    """

    key: str
    digest: bytes
    prompt_digest: bytes


@dataclass(frozen=True, slots=True)
class ExportedFacts:
    """What an export tells of a picture beside what its bytes tell."""

    model: str = ""
    quality: str = ""
    background: str = ""
    revised_prompt: str = field(default="", repr=False)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class ImportItem:
    """One picture to import.

    Attributes:
        row: Your number of the picture, which its outcome repeats.
        what: The request that it answers; or, where it was exported, its identity.
        source: The encoded picture, or the "s3://bucket/name" of an object that the service may read by itself.
        digest: "sha256:" and 64 hexadecimal digits that its bytes must have; empty: not checked.
        create_time: When it was made; now if not given.
        paid_microusd: What it cost: what hits on it will have saved.
        tags: Labels for purge and reports.
        facts: With an identity, what the export told of it.
    """

    row: int
    what: ImageSpec | ExportedIdentity
    source: bytes | str = field(repr=False)
    digest: str = ""
    create_time: datetime | None = None
    paid_microusd: int = 0
    tags: Sequence[str] = ()
    facts: ExportedFacts = ExportedFacts()


@dataclass(frozen=True, slots=True)
class ImportOutcome:
    """What became of one picture: its key and whether it is new, or why it was not imported."""

    row: int
    key: str
    created: bool
    failure: CacheError | None = None


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A picture in the last tier. `image` has no content; `expire_time` None is never."""

    image: Image
    identity: ExportedIdentity
    tags: tuple[str, ...]
    expire_time: datetime | None


@dataclass(frozen=True, slots=True)
class SwitchState:
    """Whether a switch is on in a namespace; empty: everywhere."""

    switch: Switch | None
    namespace: str
    on: bool


@dataclass(frozen=True, slots=True)
class Match:
    """A similar hit that is kept for review: a request that was answered with the picture of another prompt.

    Attributes:
        time: When it was answered.
        level: How far the two prompts agree.
        key: The key that was asked for. There may be no picture of it.
        matched_key: The key of the picture that answered.
        prompt: The one asked for, or its beginning; empty in namespaces that store none.
    """

    id: str
    time: datetime | None
    namespace: str
    level: MatchLevel | None
    key: str
    matched_key: str
    prompt: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class RecordedPrompt:
    """A request that callers made, and why it is of interest.

    Attributes:
        spec: What decides the picture.
        n: How many pictures were asked for.
        kind: Why it was recorded; None for what a newer service may say.
        count: How often, lately: it fades.
        last_time: When last.
    """

    spec: ImageSpec = field(repr=False)
    namespace: str
    n: int
    kind: PromptKind | None
    count: float
    last_time: datetime | None
