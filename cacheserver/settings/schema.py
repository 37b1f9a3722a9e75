"""Every setting: its unit is in its name, its default and one sentence beside it."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic import model_validator as check
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from cacheserver.identity import PROFILES, VERSIONS, WRITE_VERSION, compile_catalog_patterns
from cacheserver.machine import Room
from cacheserver.model import (
    MAX_VARIANT,
    PARTITION_PATTERN,
    AlarmKind,
    AlarmRule,
    AnswerFrom,
    Budget,
    BudgetPeriod,
    BudgetScope,
    Caller,
    GroupLimits,
    JournalSync,
    MatchLevel,
    Namespace,
    Permission,
    Priority,
    TierName,
)
from cacheserver.tiers import codec

ENV_PREFIX = "CACHESERVER_"
DEFAULT_NAMESPACE = "default"
STORING_TIERS = (TierName.MEMORY, TierName.REDIS, TierName.DISK, TierName.S3)
"""The tiers that settings may name, fastest first."""

PAINTER = "painter"
"""The painter's kind, its upstream's name and its only model."""

_MIB = 1024 * 1024
_GIB = 1024 * _MIB
_REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


def _partition_name(name: str) -> str:
    if not PARTITION_PATTERN.fullmatch(name):
        raise ValueError("should be 1 to 63 characters of a-z, 0-9, _ and -, the first a letter or digit")
    return name


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("should be a URL that begins with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError("should not hold a user or password; they have settings of their own")
    return url


def _webhook_url(url: SecretStr) -> SecretStr:
    _http_url(url.get_secret_value())
    return url


def _redis_url(url: SecretStr) -> SecretStr:
    if url.get_secret_value().partition("://")[0] not in _REDIS_SCHEMES:
        raise ValueError(f"should begin with one of {', '.join(f'{scheme}://' for scheme in _REDIS_SCHEMES)}")
    return url


def _patterns(patterns: tuple[str, ...]) -> tuple[str, ...]:
    compile_catalog_patterns(patterns)
    return patterns


def _profile(profile: str) -> str:
    if profile not in PROFILES:
        raise ValueError(f"should be one of {', '.join(PROFILES)}")
    return profile


def _identity_version(version: int) -> int:
    return _known(version, VERSIONS)


def _codec_version(version: int) -> int:
    return _known(version, codec.LAYOUTS)


def _known(version: int, versions: Iterable[int]) -> int:
    if version not in versions:
        raise ValueError(f"should be one that this release knows: {', '.join(map(str, versions))}")
    return version


def _storing_tier(name: Any) -> Any:
    if name not in STORING_TIERS:
        raise ValueError(f"should be one of {', '.join(STORING_TIERS)}")
    return name


def _words(text: Any) -> Any:
    """What a variable holds, which knows no lists; a list stays one."""
    return [word.strip() for word in text.split(",")] if isinstance(text, str) else text


def _names_to_themselves(models: Any) -> Any:
    return {model: model for model in models} if isinstance(models, list) else models


Port = Annotated[int, Field(ge=0, le=65_535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Window = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Seconds after something; 0 is none."""

Bytes = Annotated[int, Field(gt=0)]
Name = Annotated[str, AfterValidator(_partition_name)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
StoringTier = Annotated[TierName, BeforeValidator(_storing_tier)]
Count = Annotated[int, Field(gt=0)]
Microusd = Annotated[int, Field(ge=0)]
Use = Annotated[str, Field(pattern="^[a-z0-9_-]{1,32}$")]
PriorityName = Literal["warm_up", "batch", "standard", "interactive"]
_RATES = (
    AlarmKind.HIT_RATE_BELOW,
    AlarmKind.HIT_RATE_ABOVE,
    AlarmKind.SIMILAR_RATE_BELOW,
    AlarmKind.SIMILAR_RATE_ABOVE,
    AlarmKind.ERROR_RATE_ABOVE,
)
PolicyName = Literal["cheapest", "least_latency", "weighted", "priority"]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_default=True,
        defer_build=True,  # a section is checked as part of `Settings`, and alone by tests only
    )


class ServerSettings(_Section):
    """Where the service listens."""

    grpc_host: str = Field(default="127.0.0.1", description="Address the gRPC port is bound to.")
    grpc_port: Port = Field(default=50_051, description="TCP port of gRPC; 0 takes any free one.")
    grpc_unix_socket: Path | None = Field(
        default=None, description="Unix socket on which gRPC is served as well, to this user alone."
    )
    http_host: str = Field(default="127.0.0.1", description="Address the HTTP port is bound to.")
    http_port: Port = Field(
        default=8080,
        description="TCP port of HTTP (OpenAI's images API, images, metrics, health); 0 takes any free one.",
    )
    http_tls_cert_file: Path | None = Field(
        default=None, description="Certificate chain for HTTP, PEM; needs http_tls_key_file."
    )
    http_tls_key_file: Path | None = Field(
        default=None, description="Private key for HTTP, PEM; needs http_tls_cert_file."
    )
    http_hosts: tuple[str, ...] = Field(
        default=(),
        description=(
            "Names this service is reached by over HTTP. Without callers, only requests to these and to loopback are "
            "taken, so that no web page can spend your money."
        ),
    )
    max_upload_bytes: Bytes = Field(
        default=64 * _MIB, description="Largest body of an HTTP request taken, input images of an edit included."
    )
    upload_memory_bytes: Bytes = Field(
        default=256 * _MIB,
        description=(
            "Memory that the input images of all edits in progress may take together, over HTTP and gRPC; beyond, they "
            "are refused."
        ),
    )
    download_memory_bytes: Bytes | None = Field(
        default=None,
        description=(
            "Memory that images being sent may take together until they are read, over HTTP and gRPC; memory.max_bytes "
            "gives way to them, and beyond they are refused. Unset: half of memory.max_bytes, at least 64 MiB."
        ),
    )
    tls_cert_file: Path | None = Field(default=None, description="Certificate chain for gRPC, PEM; needs tls_key_file.")
    tls_key_file: Path | None = Field(default=None, description="Private key for gRPC, PEM; needs tls_cert_file.")
    tls_client_ca_file: Path | None = Field(
        default=None,
        description=(
            "Certificates, PEM, that sign those of gRPC's callers: each has to show one, which names its caller where "
            "it sends no token. Unset: none is asked for."
        ),
    )
    drain_timeout_s: Seconds = Field(
        default=30.0,
        description="Seconds that calls may go on after SIGTERM, and as long again for what is being stored.",
    )
    max_receive_bytes: Bytes = Field(default=24 * _MIB, description="Largest gRPC message taken, in bytes.")
    max_connection_age_s: Seconds | None = Field(
        default=1_800.0,
        le=2_000_000,
        description=(
            "Seconds after which a gRPC connection takes no new calls, so that callers find further replicas; calls "
            "that run end as they would."
        ),
    )
    max_concurrent_calls: int = Field(default=4_096, gt=0, description="Calls served at a time; more are turned away.")
    batch_in_flight: Count = Field(
        default=32,
        description="Items of one BatchGetImages worked on at a time; their sender is slowed down to that, or told so.",
    )
    known_requests: int = Field(
        default=10_000,
        ge=0,
        description="GetImage hits known by the bytes of their requests, 3 kB each, long ones count more; 0: none.",
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes on the same ports, each with its share of memory.max_bytes; several need Redis and S3.",
    )

    def download_bytes(self, memory_bytes: int) -> int:
        """How many bytes of images being sent are held; `memory_bytes` is what L1 takes."""
        return self.download_memory_bytes or max(64 * _MIB, memory_bytes // 2)

    @check(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("one of tls_cert_file and tls_key_file is set and the other is not; set both or none")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file is set and tls_cert_file is not; set it and tls_key_file")
        return self

    @check(mode="after")
    def _uploads_fit(self) -> Self:
        for name, size_bytes in (
            ("max_upload_bytes", self.max_upload_bytes),
            ("max_receive_bytes", self.max_receive_bytes),
        ):
            if self.upload_memory_bytes < 3 * size_bytes:
                raise ValueError(
                    f"upload_memory_bytes is less than three times {name}; raise it, or lower the other: an edit sent "
                    "as JSON or by gRPC is in memory three times"
                )
        return self


class MemorySettings(_Section):
    """L1, in this process."""

    max_bytes: Bytes | None = Field(
        default=None,
        description=(
            "Memory for images and their metadata, in bytes. Unset: a quarter of the container's memory; where that "
            "has no limit 256 MiB, or a quarter of the machine's memory if that is less."
        ),
    )
    max_entry_bytes: Bytes | None = Field(
        default=None, description="Largest image kept, in bytes; unset: an eighth of max_bytes, at most 32 MiB."
    )
    policy: Literal["lru", "value"] = Field(
        default="lru",
        description=(
            'What makes room first: "lru", the image used least recently; "value", the one worth least, by how often '
            "it was asked for lately and by its size, and where memory is the only level also by what it would cost."
        ),
    )
    high_water: float = Field(
        default=0.9,
        ge=0.1,
        le=1,
        description=(
            "Share of the container's memory, 0.1 to 1, or of the machine's where the container has no limit: when "
            "more is in use, images are dropped from memory before the kernel ends the process."
        ),
    )

    def sizes(self, room: Room | None) -> tuple[int, int]:
        """How many bytes L1 takes in all and of one image; `room` is the memory there is, None if unknown."""
        max_bytes = self.max_bytes or _share_of(room)
        return max_bytes, self.max_entry_bytes or min(max_bytes // 8, 32 * _MIB)


def _share_of(room: Room | None) -> int:
    """What L1 takes where nobody says: all of a container is ours, while a machine has other things to do."""
    if room is None:
        return 256 * _MIB
    quarter = room.limit_bytes // 4
    return quarter if room.is_container else min(256 * _MIB, quarter)


class RedisSettings(_Section):
    """L2: your Redis or Valkey, or one of our own."""

    url: Annotated[SecretStr, AfterValidator(_redis_url)] | None = Field(
        default=None,
        description=(
            "Your Redis or Valkey: redis://, rediss:// (TLS), unix://, redis+sentinel://host:port,host:port/service/db "
            "or redis+cluster://host:port,host:port. Unset: our own, see embedded."
        ),
    )
    prefix: str = Field(default="cacheserver:", description="Begins the name of every key.")
    timeout_s: Seconds = Field(default=0.25, description="Seconds to connect, and seconds a command may take.")
    ttl_s: Seconds = Field(default=86_400.0, description="Seconds an image stays; it starts anew when it is promoted.")
    ttl_jitter: float = Field(default=0.1, ge=0, le=0.5, description="Share of ttl_s, 0 to 0.5, by which it varies.")
    max_entry_bytes: Bytes = Field(default=16 * _MIB, description="Largest image stored, in bytes.")
    embedded: bool = Field(
        default=True, description="Run a Valkey of our own when url is unset and the service is on loopback."
    )
    embedded_max_bytes: Bytes = Field(default=512 * _MIB, description="Memory for our own Valkey's data, in bytes.")


class S3Settings(_Section):
    """L3: a bucket of any S3-compatible store."""

    bucket: str | None = Field(default=None, min_length=1, description="Bucket, which must exist. Unset: no S3.")
    endpoint: HttpUrl | None = Field(default=None, description="URL of the store. Unset: Amazon's.")
    region: str = Field(default="us-east-1", description="Region to sign requests for.")
    prefix: str = Field(default="", description="Begins the name of every object.")
    public_endpoint: HttpUrl | None = Field(
        default=None, description="URL by which callers reach the store, for signed URLs. Unset: endpoint."
    )
    access_key: SecretStr | None = Field(
        default=None, description="Access key id. Unset: found the way boto3 finds it."
    )
    secret_key: SecretStr | None = Field(default=None, description="Secret access key; needs access_key.")
    threads: int = Field(default=16, ge=1, le=256, description="Requests at a time.")
    read_timeout_s: Seconds = Field(default=2.0, description="Seconds a read may take.")
    write_timeout_s: Seconds = Field(default=30.0, description="Seconds a write may take.")
    max_entry_bytes: Bytes = Field(default=64 * _MIB, description="Largest image stored, in bytes.")
    url_expires_s: int = Field(default=3600, ge=1, le=604_800, description="Seconds a signed URL is good for.")
    lifecycle_rule: bool = Field(
        default=False,
        description=(
            "Give the bucket a rule that removes images that are of no use any more; its other rules stay. Needs "
            "max_ttl_s in every namespace."
        ),
    )
    local: bool = Field(
        default=False, description="Run an S3 server of our own, to try the whole stack; the same as --local-s3."
    )

    @check(mode="after")
    def _fits_together(self) -> Self:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("one of access_key and secret_key is set and the other is not; set both or none")
        if self.local and (self.bucket or self.endpoint):
            raise ValueError("local (--local-s3) runs its own server; remove it, or bucket and endpoint")
        if self.endpoint and not self.bucket:
            raise ValueError("endpoint is set and bucket is not; name the bucket")
        return self


class DiskSettings(_Section):
    """A directory: L3 where there is no S3, or a level in front of it."""

    path: Path | None = Field(default=None, description="The directory. Unset: images in data_dir.")
    max_bytes: Bytes = Field(default=10 * _GIB, description="Most disk space for images, in bytes.")
    fsync: bool = Field(default=True, description="Whether an image counts as stored only when the disk says so.")


class JournalSettings(_Section):
    """What was paid for and the last level has yet to take, on this machine's disk: see durability."""

    path: Path | None = Field(default=None, description="The directory. Unset: journal in data_dir.")
    max_bytes: Bytes = Field(
        default=10 * _GIB,
        description="Most disk space for it, in bytes; then nothing more is made until there is room.",
    )
    high_water: float = Field(
        default=0.75, ge=0, lt=0.95, description="Share of max_bytes from which on generations are slowed down."
    )
    sync: JournalSync = Field(
        default=JournalSync.ALWAYS,
        description=(
            "always, interval or off: whether an image is flushed to the disk before its caller is answered, every "
            "sync_interval_s, or when the system pleases. It matters for power cuts: a process that dies loses none."
        ),
    )
    sync_interval_s: Seconds = Field(default=1.0, description="Seconds between flushes.")


class PurgeSettings(_Section):
    """How a replica that is cut off learns what was purged."""

    check_s: Seconds = Field(
        default=5.0, description="Seconds between two looks into the last level while Redis is away."
    )
    when_blind: Literal["serve", "refuse"] = Field(
        default="serve",
        description=(
            "serve or refuse: what to do with stored images while neither Redis nor the last level can say what was "
            "purged. Refused ones count as unknown, see generation.when_unknown."
        ),
    )


class IdentitySettings(_Section):
    """How requests become keys."""

    write_version: Annotated[int, AfterValidator(_identity_version)] = Field(
        default=WRITE_VERSION,
        description=(
            "Version that requests are keyed by; pictures of all others that this release knows are found too. Raise "
            "it only when every replica knows it. The default is one that the release before this one knows."
        ),
    )


class CodecSettings(_Section):
    """How images are written into Redis, the disk and S3."""

    write_version: Annotated[int, AfterValidator(_codec_version)] = Field(
        default=codec.WRITE_VERSION,
        description=(
            "Version that images are written in; all others that this release knows are read too. Raise it only when "
            "every replica knows it. The default is one that the release before this one knows."
        ),
    )


class SimilaritySettings(_Section):
    """Answers with images of other prompts, where namespaces allow them."""

    enabled: bool = Field(
        default=True, description='Whether there are any. false: every namespace is "exact", whatever it says.'
    )
    review_percent: float = Field(
        default=1.0,
        ge=0,
        le=100,
        description=(
            "Percentage of such answers that are kept for review, with their prompts where store_prompts is true; "
            "0: none."
        ),
    )
    floor: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description=(
            "For semantic: prompts that are less alike, 0 to 1, are not looked at. No likeness is a reason to serve."
        ),
    )
    max_prompts: int = Field(
        default=200_000,
        ge=1,
        description="For semantic: prompts of stored images kept in memory, 1.3 kB each; beyond, the oldest goes.",
    )
    embedder: str | None = Field(
        default=None,
        description=(
            "For semantic: module:class of an embedder of yours that finds the prompts to look at, with a method "
            "embed(prompts) that gives an array, a row each. Unset: character 3-grams, without a model."
        ),
    )
    verifier_url: HttpUrl | None = Field(
        default=None,
        description=(
            "For semantic: an endpoint in the shape of OpenAI's, with the version, whose chat/completions are asked of "
            "each pair of prompts whether both are one picture. Unset: nothing is answered, and what would be asked is "
            "logged and counted."
        ),
    )
    verifier_model: str = Field(default="gpt-5-mini", description="The model asked there.")
    verifier_api_key_env: str = Field(default="OPENAI_API_KEY", description="Environment variable that holds its key.")
    verifier_parameters: dict[str, Any] = Field(
        default={}, description="Further fields of each call there, as { temperature = 0 } for models that take one."
    )
    verifier_timeout_s: Seconds = Field(
        default=3.0, description="Seconds that a miss waits for it at most, however many pairs are asked about."
    )
    verifier_max_running: Count = Field(default=8, description="Calls of it at once; beyond, a miss is a miss.")
    verifier_microusd_per_million_input_tokens: Microusd = Field(
        default=0, description="What it costs, in micro-dollars for a million tokens of the question."
    )
    verifier_microusd_per_million_output_tokens: Microusd = Field(default=0, description="The same of the answer.")

    def verifier_key(self) -> str:
        """The key to send; empty if there is none."""
        return os.environ.get(self.verifier_api_key_env, "")


class GenerationSettings(_Section):
    """The miss path: what it may spend and how much it does at a time."""

    when_unknown: Literal["pay", "refuse"] = Field(
        default="pay",
        description="pay or refuse: what to do about a miss while the last tier cannot be asked whether it is one.",
    )
    unknown_budget_microusd_per_hour: int = Field(
        default=10_000_000,
        ge=0,
        description="Most micro-dollars an hour that such misses may cost; beyond, they are refused.",
    )
    policy: PolicyName = Field(
        default="cheapest",
        description=(
            "cheapest, least_latency, weighted or priority: which upstream makes an image, of those that can. "
            "cheapest: the cheapest that is in time. priority: the lowest rank that has room."
        ),
    )
    queue_max: int = Field(
        default=2_000, ge=1, description="Generations that may wait; beyond, the least urgent is refused."
    )
    queue_max_bytes: Bytes = Field(
        default=64 * _MIB, description="Bytes that the requests of waiting generations may take."
    )
    interactive_share: float = Field(
        default=0.1,
        ge=0,
        le=0.9,
        description="Share of each limit group's concurrent calls kept for interactive requests.",
    )
    retry_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Retries of failed calls, as a share of all calls; beyond, failures are final.",
    )
    refusal_ttl_s: Seconds = Field(
        default=600.0, description="Seconds an upstream's refusal of a prompt or parameter is remembered."
    )
    ladder: tuple[str, ...] = Field(
        default=("high", "medium", "low"),
        description=(
            "Qualities, dearest first, to fall back to where a budget or max_wait does not allow the one asked for "
            'and the caller accepts less; "model:quality" is a rung of another model.'
        ),
    )
    hedge_after_p99: float | None = Field(
        default=None,
        ge=1,
        description="Start a call once more elsewhere when it takes so many times the p99. Unset: never.",
    )
    prices_file: Path | None = Field(
        default=None, description="A price table of your own, in the form of ours. Unset: the one that comes with us."
    )
    max_candidates: int = Field(default=4, ge=1, le=10, description="Most candidates a request may ask for.")
    scorer_url: HttpUrl | None = Field(
        default=None,
        description="Your own model that scores candidates. Unset: a built-in look at sharpness and light.",
    )
    off_peak_hours: tuple[int, int] = Field(
        default=(22, 6), description="First and last hour, in UTC, between which degraded images are made anew."
    )
    max_image_pixels: int = Field(default=40_000_000, gt=0, description="Largest image believed, width times height.")
    max_image_bytes: Bytes = Field(default=64 * _MIB, description="Largest image taken from an upstream, in bytes.")


class AccountingSettings(_Section):
    """What is counted for `cacheserver report`: by all replicas, and for longer than one of them lives."""

    enabled: bool = Field(default=True, description="Whether it is. false: only what each process counts for itself.")
    max_callers: int = Field(
        default=100, ge=0, le=10_000, description="Callers told apart; those beyond are counted together, as other."
    )
    minutes_kept_hours: int = Field(
        default=48, ge=1, le=24 * 31, description="Hours that figures are kept minute by minute."
    )
    hours_kept_days: int = Field(
        default=35,
        ge=1,
        le=400,
        description="Days that figures are kept hour by hour in Redis; then they go to S3, or without it to data_dir.",
    )

    @check(mode="after")
    def _hours_outlast_minutes(self) -> Self:
        if 24 * self.hours_kept_days < self.minutes_kept_hours:
            raise ValueError("hours_kept_days should not be shorter than minutes_kept_hours")
        return self


class DeliverySettings(_Section):
    """Images by URL, in the size and format that is asked for."""

    public_url: HttpUrl | None = Field(
        default=None,
        description=(
            "Where callers and browsers reach our HTTP port; begins the URLs that are handed out. Unset: what the "
            "request that asks for one was sent to."
        ),
    )
    url_secret: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="Secret URLs are signed with, one for all replicas. Better: url_secret_file. Unset: see there.",
    )
    url_secret_file: Path | None = Field(
        default=None,
        description="File that holds it, 32 characters at least. Unset: without url_secret one is made in data_dir.",
    )
    url_expires_s: int = Field(default=3600, ge=1, le=604_800, description="Seconds a signed URL is good for.")
    widths: tuple[int, ...] = Field(
        default=(),
        description=(
            "The widths in pixels that an image may be asked for in. Empty: any. Of each image 64 renditions are kept; "
            "further ones are made each time."
        ),
    )
    derived_ttl_s: Seconds = Field(default=2_592_000.0, description="Seconds an image made from another one is kept.")
    threads: int = Field(default=2, ge=1, le=64, description="Images made from others at a time.")
    queue_max: int = Field(default=64, ge=1, description="Of those, how many may wait; beyond, they are refused.")

    @check(mode="after")
    def _one_secret(self) -> Self:
        if self.url_secret is not None and self.url_secret_file is not None:
            raise ValueError("set one of url_secret and url_secret_file, not both")
        return self


class BudgetSettings(_Section):
    """What may be spent in all; namespaces and callers have budgets of their own."""

    per_day_microusd: Microusd | None = Field(
        default=None, description="Most micro-dollars a day, in UTC. Unset: no limit."
    )
    per_month_microusd: Microusd | None = Field(
        default=None, description="Most micro-dollars a month, in UTC. Unset: no limit."
    )
    degrade_at: float = Field(
        default=0.9, gt=0, le=1, description="Share of a budget from which callers that accept less get less."
    )
    redis_lost: Literal["share", "refuse"] = Field(
        default="share",
        description="share or refuse: while Redis is silent, spend a fair share of what is left, or nothing.",
    )


class ModerationSettings(_Section):
    """An endpoint in the shape of OpenAI's moderations, asked for namespaces that want it."""

    base_url: HttpUrl = Field(default="https://api.openai.com/v1", description="Where the API is, with the version.")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="Environment variable that holds its key.")
    model: str = Field(default="omni-moderation-latest", description="The model asked.")
    timeout_s: Seconds = Field(default=3.0, description="Seconds an answer may take.")
    when_down: Literal["allow", "refuse"] = Field(
        default="refuse", description="allow or refuse: what to do about prompts while it does not answer."
    )

    def key(self) -> str:
        """The key to send; empty if there is none."""
        return os.environ.get(self.api_key_env, "")


class TraceSettings(_Section):
    """A record of what is answered, for replaying it through caches of other sizes."""

    path: Path | None = Field(
        default=None, description="File for a row of each picture answered, CSV in gzip, without prompts. Unset: none."
    )
    max_bytes: Bytes = Field(default=_GIB, description="Bytes of the file at which recording ends.")
    sample: float = Field(default=1.0, gt=0, le=1, description="Share of all keys that are recorded, above 0 to 1.")


class LimitGroupSettings(_Section):
    """What the upstreams of one limit group may be asked for together."""

    images_per_minute: Count | None = Field(default=None, description="Images a minute. Unset: learned from refusals.")
    requests_per_minute: Count | None = Field(
        default=None, description="Calls a minute. Unset: what the provider tells, if it does."
    )
    tokens_per_minute: Count | None = Field(
        default=None, description="Tokens a minute. Unset: what the provider tells, if it does."
    )
    images_per_day: Count | None = Field(
        default=None, description="Images a day. Unset: what the provider tells, if it does."
    )
    requests_per_day: Count | None = Field(
        default=None, description="Calls a day. Unset: what the provider tells, if it does."
    )
    tokens_per_day: Count | None = Field(
        default=None, description="Tokens a day. Unset: what the provider tells, if it does."
    )
    concurrent: Count = Field(default=100, description="Calls at a time.")
    burst_s: float = Field(
        default=1.0, ge=0, le=60, description="Seconds of unused time that may be caught up on at once."
    )
    headroom: float = Field(
        default=0.02, ge=0, le=0.5, description="Share of each limit left unused, so that jitter causes no refusals."
    )


class PriceStep(_Section):
    """A price factor that holds from so much spent in a month on."""

    from_microusd: int = Field(ge=0, description="Micro-dollars paid to the upstream this month from which it holds.")
    factor: float = Field(ge=0, allow_inf_nan=False, description="What the list price is multiplied by.")


class UpstreamSettings(_Section):
    """One endpoint, credential and set of models that may be called."""

    name: Name = Field(description="Its name in metrics and logs.")
    kind: Literal["openai", "painter"] = Field(
        default="openai",
        description="openai: an images API in OpenAI's shape. painter: local placeholders, to try things.",
    )
    base_url: HttpUrl = Field(
        default="https://api.openai.com/v1",
        description="Where the API is: for api_style openai with the version, for azure without any path.",
    )
    api_key: SecretStr | None = Field(default=None, description="The key itself. Better: one of the next two.")
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the key.")
    api_key_file: Path | None = Field(default=None, description="File that holds the key.")
    models: Annotated[dict[str, str], BeforeValidator(_names_to_themselves), Field(min_length=1)] = Field(
        default={"gpt-image-2": "gpt-image-2"},
        description="Our model names and what the provider calls them (azure: deployments); a list where they agree.",
    )
    api_style: Literal["openai", "azure"] = Field(
        default="openai", description="openai or azure: how the provider wants to be addressed."
    )
    api_version: str = Field(default="2025-04-01-preview", description="Azure's api-version.")
    url_hosts: tuple[str, ...] = Field(
        default=(), description="Hosts that image URLs in an answer may name, besides base_url's own."
    )
    connect_timeout_s: Seconds = Field(default=5.0, description="Seconds to connect.")
    read_timeout_s: Seconds = Field(
        default=600.0, description="Seconds a generation may take; large images take minutes."
    )
    max_n: int = Field(default=10, ge=1, le=10, description="Images asked for in one call.")
    stream: bool = Field(
        default=True, description="Ask it for partial images where a caller wants some; false if it has none."
    )
    limit_group: Name | None = Field(
        default=None, description="What shares its rate limits, as all keys of an organisation do. Unset: its own name."
    )
    price_factor: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="What the list price is multiplied by: 0.6 for a relay at 40 % off.",
    )
    price_steps: tuple[PriceStep, ...] = Field(
        default=(),
        description=(
            "Further factors from so much spent in a month on: { from_microusd = 1_000_000_000, factor = 0.95 }."
        ),
    )
    max_cost_microusd: int | None = Field(
        default=None,
        gt=0,
        description="The most one image can cost. Unset: from the price list, if that has the model.",
    )
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="Its share under the policy weighted.")
    percent: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Exactly this share of its models' images goes to it. Unset: by the policy.",
    )
    rank: int = Field(default=0, ge=0, description="Under the policy priority: lower ranks are used first.")

    @property
    def group(self) -> str:
        """The limit group it belongs to."""
        return self.limit_group or self.name

    @check(mode="after")
    def _one_key(self) -> Self:
        if sum(source is not None for source in (self.api_key, self.api_key_env, self.api_key_file)) > 1:
            raise ValueError("set one of api_key, api_key_env and api_key_file, not several")
        return self

    def key(self) -> str:
        """The key to send; empty if the endpoint takes none."""
        return self.api_key.get_secret_value() if self.api_key else ""


class CallerSettings(_Section):
    """Who may call, known by a bearer token or a client's certificate."""

    name: Name = Field(description="Its name in logs and reports.")
    token_sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="SHA-256 of the token, 64 hexadecimal digits."
    )
    token_file: Path | None = Field(default=None, description="File that holds the token itself.")
    certificate: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Whom its certificate names: a SPIFFE URI; without one another URI or a DNS name; without any the common "
            "name. It needs server.tls_client_ca_file. Unset: none."
        ),
    )
    namespaces: tuple[str, ...] = Field(
        default=(DEFAULT_NAMESPACE,), min_length=1, description='Namespaces it may use; ["*"] is all of them.'
    )
    allow: tuple[Permission, ...] = Field(
        default=(Permission.READ, Permission.GENERATE),
        min_length=1,
        description="What it may do: read, generate, put, purge, admin.",
    )
    max_priority: PriorityName = Field(
        default="interactive", description="warm_up, batch, standard or interactive: the highest it may ask for."
    )
    per_day_microusd: Microusd | None = Field(
        default=None, description="Most micro-dollars a day that it may spend. Unset: no limit of its own."
    )
    per_month_microusd: Microusd | None = Field(
        default=None, description="Most micro-dollars a month that it may spend. Unset: no limit of its own."
    )

    @check(mode="after")
    def _one_token(self) -> Self:
        if self.token_sha256 is not None and self.token_file is not None:
            raise ValueError("set one of token_sha256 and token_file, not both")
        if self.token_sha256 is None is self.token_file and self.certificate is None:
            raise ValueError("set one of token_sha256 and token_file, or certificate")
        return self


class NamespaceSettings(_Section):
    """Policy for a group of callers."""

    partition: Name | None = Field(default=None, description="What shares images. Unset: the namespace's own name.")
    profile: Annotated[str, AfterValidator(_profile)] = Field(
        default="standard",
        description="exact, standard or catalog: how prompts are normalized before they are compared.",
    )
    catalog_patterns: Annotated[tuple[str, ...], AfterValidator(_patterns)] = Field(
        default=(), description="Regular expressions for what the profile catalog drops from prompts, such as a SKU."
    )
    default_model: str | None = Field(
        default=None, description="Model for requests that name none. Unset: the service's."
    )
    default_priority: PriorityName = Field(
        default="standard", description="Priority of requests that name none, as in max_priority of callers."
    )
    max_variants: int = Field(
        default=10, ge=1, le=MAX_VARIANT + 1, description="Most different images for one request."
    )
    ttl_s: Seconds | None = Field(default=None, description="Seconds an image may be served. Unset: for ever.")
    max_ttl_s: Seconds | None = Field(
        default=None, description="Longest ttl a caller may ask for, in seconds. Unset: any."
    )
    expiry: Literal["absolute", "sliding"] = Field(
        default="absolute",
        description=(
            "absolute or sliding: whether an image ends after its ttl, or its ttl begins anew with a hit once a tenth "
            "of it has passed."
        ),
    )
    stale_while_revalidate_s: Window = Field(
        default=0.0,
        description=(
            "For so many seconds after its end an image is answered with still, marked stale, while a new one is "
            "generated behind the answer. 0: never, since each new image is paid for."
        ),
    )
    stale_if_error_s: Window = Field(
        default=0.0,
        description=(
            "For so many seconds after its end an image is answered with, marked stale, where no new one can be "
            "generated because its upstream is down, limited or late. 0: never."
        ),
    )
    per_day_microusd: Microusd | None = Field(
        default=None, description="Most micro-dollars a day spent for it. Unset: no limit of its own."
    )
    per_month_microusd: Microusd | None = Field(
        default=None, description="Most micro-dollars a month spent for it. Unset: no limit of its own."
    )
    quality_by_use: dict[Use, str] = Field(
        default={},
        description=(
            "The quality of requests that say what they are for and name none: "
            '{ thumbnail = "low", list = "medium", detail = "high" }.'
        ),
    )
    deny_file: Path | None = Field(
        default=None,
        description="File of words, phrases and /patterns/, one a line, whose prompts are refused. Unset: none are.",
    )
    pii: Literal["allow", "refuse", "redact"] = Field(
        default="allow",
        description="allow, refuse or redact: e-mail addresses, phone, card and identity numbers in prompts.",
    )
    moderation: bool = Field(default=False, description="Ask the endpoint of [moderation] about each new prompt.")
    min_score: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Best candidates below this score, 0 to 1, wait for review. Unset: none do.",
    )
    remake_degraded: bool = Field(
        default=False, description="Make degraded images anew, as they were asked for, in generation.off_peak_hours."
    )
    mode: Literal["serve", "observe"] = Field(
        default="serve",
        description=(
            "serve or observe: whether callers are answered from the cache. observe: each call is generated, and what "
            "would have hit is only counted."
        ),
    )
    serve_percent: float = Field(
        default=100.0,
        ge=0,
        le=100,
        description="In mode serve, percentage of the keys that are served; the others are observed.",
    )
    store_prompts: bool = Field(
        default=False,
        description="Record what callers ask for and the cache does not have, for warm-up: the prompts themselves.",
    )
    similarity: Literal["exact", "canonical", "semantic"] | None = Field(
        default=None,
        description=(
            "Whose images answer a request. exact: only those of its own prompt; canonical: also those of prompts that "
            "ask for the same in other words; semantic: also those that [similarity] verifies. Unset: canonical, but "
            "exact with the profile catalog."
        ),
    )
    ignore_quality_words: bool = Field(
        default=True,
        description='Prompts ask for the same with and without parts such as "8k" or "highly detailed".',
    )
    correct_typos: bool = Field(
        default=False,
        description='A word that is misspelt beyond doubt reads as it should, as "beautful". Needs the extra [typos].',
    )
    answer_from: tuple[AnswerFrom, ...] = Field(
        default=(),
        description=(
            "Before an image is paid for, answer from another one of the same prompt. quality: of a higher quality; "
            "format: of a lossless format; size: larger and of the same shape. Empty: never."
        ),
    )
    public_images: bool = Field(
        default=False,
        description="Serve images over HTTP to whoever has their key; else a signed URL or a caller's token is needed.",
    )

    @check(mode="after")
    def _lifetimes_agree(self) -> Self:
        if self.ttl_s and self.max_ttl_s and self.ttl_s > self.max_ttl_s:
            raise ValueError("ttl_s should not be above max_ttl_s")
        return self

    @check(mode="after")
    def _catalog_is_exact(self) -> Self:
        if self.profile == "catalog" and self.similarity not in (None, "exact"):
            raise ValueError(
                'similarity should be "exact" with profile "catalog": what it drops says which article it is'
            )
        return self

    @check(mode="after")
    def _stale_ones_are_served(self) -> Self:
        if self.mode == "observe" and (self.stale_while_revalidate_s or self.stale_if_error_s):
            raise ValueError("stale_while_revalidate_s and stale_if_error_s need mode serve: nothing is served here")
        return self

    @check(mode="after")
    def _what_slides_has_an_end(self) -> Self:
        if self.expiry == "sliding" and self.ttl_s is None and self.max_ttl_s is None:
            raise ValueError('expiry = "sliding" needs ttl_s or max_ttl_s: an image without an end has none to move')
        if self.expiry == "sliding" and self.mode == "observe":
            raise ValueError('expiry = "sliding" needs mode serve: nothing is served here')
        return self


class AlertingSettings(_Section):
    """Who is told that an alarm rings, and what all alarms have in common."""

    built_in: bool = Field(
        default=True,
        description=(
            "Watch breakers, failed calls and images that are not stored yet also without [[alarms]]; an alarm of "
            "yours takes the place of the built-in one of its name: breakers, errors, unsaved."
        ),
    )
    webhook_url: Annotated[SecretStr, AfterValidator(_webhook_url)] | None = Field(
        default=None,
        description="URL that gets a POST of JSON when an alarm rings and when it no more does. Unset: none.",
    )
    webhook_token: SecretStr | None = Field(
        default=None, description="Bearer token for webhook_url. Better: webhook_token_env. Unset: none."
    )
    webhook_token_env: str | None = Field(
        default=None, description="Environment variable that holds the token. Unset: none does."
    )
    webhook_timeout_s: Seconds = Field(
        default=5.0, description="Seconds one try to deliver may take; there are four at most."
    )
    max_notices_per_hour: Count = Field(default=60, description="Most notices sent in an hour; more are only logged.")
    min_requests: Count = Field(
        default=50, description="Requests that must have come in an alarm's window for a rate of them to be judged."
    )
    runbook_base_url: HttpUrl = Field(
        default="https://github.com/cacheserver/cacheserver/blob/main/scripts/deploy/RUNBOOK.md",
        description="Where the runbook is, for alarms without a runbook_url: the kind's heading is added to it.",
    )

    @check(mode="after")
    def _one_token(self) -> Self:
        if self.webhook_token is not None and self.webhook_token_env is not None:
            raise ValueError("set one of webhook_token and webhook_token_env, not both")
        return self


class AlarmSettings(_Section):
    """A figure to watch, and when to ring."""

    name: Name = Field(description="Its name in metrics, logs and notices.")
    kind: AlarmKind = Field(
        description=(
            "hit_rate_below, hit_rate_above, similar_rate_below, similar_rate_above, error_rate_above, "
            "spend_per_hour_above, unsaved_age_above, journal_share_above or breaker_open."
        )
    )
    threshold: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description=(
            "Beyond it the alarm rings: a share of requests, 0 to 1, for rates; dollars an hour for spending; seconds "
            "for an age; how many may be open for breakers."
        ),
    )
    window_s: float = Field(
        default=300.0, ge=10, le=86_400, description="Seconds back that rates and spending are taken of."
    )
    for_s: float = Field(
        default=60.0, ge=0, le=86_400, description="Seconds the figure must have been beyond the threshold."
    )
    namespace: str | None = Field(
        default=None, description="Rates and spending of this namespace. Unset: of all together."
    )
    target: str | None = Field(
        default=None, description="breaker_open: the tier or upstream whose breaker is meant. Unset: any."
    )
    runbook_url: HttpUrl | None = Field(
        default=None, description="Where to read what to do. Unset: below alerting.runbook_base_url."
    )

    @check(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind.is_lower_bound and not self.threshold:
            raise ValueError("threshold should be set: no rate is below 0")
        if self.kind in _RATES and self.threshold > 1:
            raise ValueError("threshold should be 0 to 1, a share of requests")
        if self.namespace is not None and self.kind not in (*_RATES, AlarmKind.SPEND_PER_HOUR_ABOVE):
            raise ValueError(f"namespace has no meaning for {self.kind}; remove it")
        if self.target is not None and self.kind is not AlarmKind.BREAKER_OPEN:
            raise ValueError(f"target has no meaning for {self.kind}; remove it")
        return self


class LogSettings(_Section):
    """What is logged, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error: the least logged."
    )
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: for people on a terminal, JSON anywhere else."
    )


class ImportsSettings(_Section):
    """What imports may read beside what they are sent."""

    buckets: tuple[str, ...] = Field(
        default=(),
        description="Buckets of the store of [s3], by its credentials, whose objects imports may name. Empty: none.",
    )


class Settings(BaseSettings):
    """All settings, checked: what is here can work together. Made by `load_settings`."""

    model_config = SettingsConfigDict(
        frozen=True,
        hide_input_in_errors=True,
        case_sensitive=True,
        env_prefix=ENV_PREFIX,
        env_prefix_target="all",
        env_nested_delimiter="__",
    )

    data_dir: Path = Field(default=Path(".cacheserver"), description="Directory for all that is kept on this machine.")
    tiers: Annotated[tuple[StoringTier, ...] | None, NoDecode, BeforeValidator(_words)] = Field(
        default=None,
        description=(
            'The levels, fastest first, of "memory", "redis", "disk", "s3". Unset: memory, Redis if there is one, '
            "then S3 if there is a bucket, else disk."
        ),
    )
    durability: Literal["journal", "journal+redis", "write-through"] = Field(
        default="journal",
        description=(
            "journal, journal+redis or write-through: what has an image, besides S3 or in its place where S3 is late, "
            "before its caller is answered: a journal on this machine's disk, that and Redis, or whichever level "
            "takes it. Where the last level is this machine's disk, that is the journal."
        ),
    )
    hedged_reads: bool = Field(
        default=False,
        description="Read the next level too when one takes longer for a picture than for 99 of 100 of its last 1,000.",
    )
    insecure: bool = Field(default=False, description="Serve everyone who can connect: no callers needed off loopback.")
    default_model: str | None = Field(
        default=None, description="Model for requests and namespaces that name none. Unset: the first upstream's first."
    )
    server: ServerSettings = ServerSettings()
    memory: MemorySettings = MemorySettings()
    redis: RedisSettings = RedisSettings()
    s3: S3Settings = S3Settings()
    disk: DiskSettings = DiskSettings()
    journal: JournalSettings = JournalSettings()
    purge: PurgeSettings = PurgeSettings()
    identity: IdentitySettings = IdentitySettings()
    codec: CodecSettings = CodecSettings()
    similarity: SimilaritySettings = SimilaritySettings()
    generation: GenerationSettings = GenerationSettings()
    accounting: AccountingSettings = AccountingSettings()
    delivery: DeliverySettings = DeliverySettings()
    budget: BudgetSettings = BudgetSettings()
    moderation: ModerationSettings = ModerationSettings()
    imports: ImportsSettings = ImportsSettings()
    trace: TraceSettings = TraceSettings()
    upstreams: tuple[UpstreamSettings, ...] = ()
    limit_groups: dict[Name, LimitGroupSettings] = Field(default_factory=dict)
    callers: tuple[CallerSettings, ...] = ()
    namespace_settings: dict[Name, NamespaceSettings] = Field(default_factory=dict, alias="namespaces")
    alerting: AlertingSettings = AlertingSettings()
    alarms: tuple[AlarmSettings, ...] = ()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the library's signature
        init_settings: PydanticBaseSettingsSource,
        *_others: PydanticBaseSettingsSource,
        **_named: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given: `load_settings` reads the file and the environment, and checks their names."""
        return (init_settings,)

    @property
    def tier_names(self) -> tuple[TierName, ...]:
        """The levels in use, fastest first."""
        if self.tiers is not None:
            return self.tiers
        has_redis = self.redis.url is not None or self.runs_own_valkey
        last = TierName.S3 if self.s3.bucket or self.s3.local else TierName.DISK
        return (TierName.MEMORY, *([TierName.REDIS] if has_redis else []), last)

    @property
    def disk_path(self) -> Path:
        """The directory of the disk tier."""
        return self.disk.path or self.data_dir / "images"

    @property
    def journal_path(self) -> Path:
        """The directory of the journal."""
        return self.journal.path or self.data_dir / "journal"

    @property
    def has_journal(self) -> bool:
        """Whether what is made is written into a journal: on its way to a level that is not this machine's own disk."""
        return self.durability != "write-through" and self.tier_names[-1] in {TierName.REDIS, TierName.S3}

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every model that an upstream makes images with, each once."""
        return tuple(dict.fromkeys(model for upstream in self.upstreams for model in upstream.models))

    @property
    def group_limits(self) -> dict[str, GroupLimits]:
        """The limits of every limit group that an upstream is in."""
        names = dict.fromkeys(upstream.group for upstream in self.upstreams)
        written = {name: self.limit_groups.get(name, LimitGroupSettings()) for name in names}
        return {name: GroupLimits(**each.model_dump()) for name, each in written.items()}

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Every budget there is."""
        named: list[tuple[BudgetScope, str, BudgetSettings | NamespaceSettings | CallerSettings]]
        named = [(BudgetScope.GLOBAL, "", self.budget)]
        named += [(BudgetScope.NAMESPACE, name, each) for name, each in self.namespace_settings.items()]
        named += [(BudgetScope.CALLER, each.name, each) for each in self.callers]
        return tuple(
            Budget(scope, subject, period, limit)
            for scope, subject, written in named
            for period, limit in (
                (BudgetPeriod.DAY, written.per_day_microusd),
                (BudgetPeriod.MONTH, written.per_month_microusd),
            )
            if limit is not None
        )

    @property
    def alarm_rules(self) -> tuple[AlarmRule, ...]:
        """Every alarm there is: the built-in ones, as far as they are wanted, and those written."""
        named = {each.name: each for each in (_BUILT_IN if self.alerting.built_in else ())}
        named |= {each.name: each for each in self.alarms}
        return tuple(_alarm(each, self.alerting) for each in named.values())

    @property
    def model(self) -> str:
        """The model for requests that name none."""
        return self.default_model or self.model_names[0]

    @property
    def namespaces(self) -> dict[str, Namespace]:
        """The namespaces by name; "default" is always among them."""
        written = {DEFAULT_NAMESPACE: NamespaceSettings()} | self.namespace_settings
        return {name: _namespace(name, each, self) for name, each in written.items()}

    @property
    def caller_tokens(self) -> list[tuple[bytes, Caller]]:
        """The SHA-256 of each caller's token (32 bytes) and the caller, of those that have one."""
        return [(bytes.fromhex(each.token_sha256), _caller(each)) for each in self.callers if each.token_sha256]

    @property
    def caller_certificates(self) -> dict[str, Caller]:
        """The callers that have certificates, by whom those name."""
        return {each.certificate: _caller(each) for each in self.callers if each.certificate}

    @property
    def serves_loopback_only(self) -> bool:
        """Whether nobody on another machine can connect."""
        return is_loopback(self.server.grpc_host) and is_loopback(self.server.http_host)

    @property
    def runs_own_valkey(self) -> bool:
        """Whether the service starts a Valkey of its own, if there is one for the platform."""
        wanted = self.tiers is None or TierName.REDIS in self.tiers
        return wanted and self.redis.embedded and self.redis.url is None and self.serves_loopback_only

    @property
    def is_a_trial(self) -> bool:
        """Whether placeholders can do no harm: no callers, no Redis or bucket of yours, loopback only."""
        yours = self.callers or self.redis.url or self.s3.bucket
        return not yours and self.serves_loopback_only


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can connect to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _namespace(name: str, written: NamespaceSettings, settings: Settings) -> Namespace:
    return Namespace(
        name=name,
        partition=written.partition or name,
        profile=written.profile,
        catalog_patterns=written.catalog_patterns,
        default_model=written.default_model or settings.model,
        default_priority=Priority[written.default_priority.upper()],
        max_variants=written.max_variants,
        ttl_s=written.ttl_s,
        max_ttl_s=written.max_ttl_s,
        stale_while_revalidate_s=written.stale_while_revalidate_s,
        stale_if_error_s=written.stale_if_error_s,
        is_sliding=written.expiry == "sliding",
        quality_by_use=MappingProxyType(written.quality_by_use),
        max_candidates=settings.generation.max_candidates,
        min_score=written.min_score,
        remake_degraded=written.remake_degraded,
        store_prompts=written.store_prompts,
        answer_from=frozenset(written.answer_from),
        public_images=written.public_images,
        serve_percent=written.serve_percent if written.mode == "serve" else 0.0,
        identity_version=settings.identity.write_version,
        similarity=_similarity(written, settings.similarity),
        ignore_quality_words=written.ignore_quality_words,
        corrects_typos=written.correct_typos,
    )


def _similarity(written: NamespaceSettings, everywhere: SimilaritySettings) -> MatchLevel:
    if not everywhere.enabled:
        return MatchLevel.EXACT
    default = "exact" if written.profile == "catalog" else "canonical"
    return MatchLevel[(written.similarity or default).upper()]


_BUILT_IN = (
    AlarmSettings(name="breakers", kind=AlarmKind.BREAKER_OPEN),
    AlarmSettings(name="errors", kind=AlarmKind.ERROR_RATE_ABOVE, threshold=0.2, for_s=300.0),
    AlarmSettings(name="unsaved", kind=AlarmKind.UNSAVED_AGE_ABOVE, threshold=300.0),
    AlarmSettings(name="journal", kind=AlarmKind.JOURNAL_SHARE_ABOVE, threshold=0.5),
)
"""What is wrong wherever it happens. What hit rate or spending is wrong, nobody but the operator knows."""


def _alarm(written: AlarmSettings, alerting: AlertingSettings) -> AlarmRule:
    return AlarmRule(
        name=written.name,
        kind=written.kind,
        threshold=written.threshold,
        window_s=written.window_s,
        for_s=written.for_s,
        min_requests=alerting.min_requests,
        namespace=written.namespace,
        target=written.target,
        runbook_url=written.runbook_url or f"{alerting.runbook_base_url}#{runbook_anchor(written.kind)}",
    )


def runbook_anchor(kind: AlarmKind) -> str:
    """The heading of the runbook for alarms of this kind, as it stands in a URL."""
    return f"cacheserver{kind.replace('_', '')}"


def _caller(written: CallerSettings) -> Caller:
    return Caller(
        name=written.name,
        permissions=frozenset(written.allow),
        namespaces=None if "*" in written.namespaces else frozenset(written.namespaces),
        max_priority=Priority[written.max_priority.upper()],
    )
