"""The tiers under memory, as the settings name them, with our own servers started where they are wanted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from random import Random

import structlog

from cacheserver.control.redis import refuse_eviction_of_control_state
from cacheserver.embedded.lock import DirectoryLock
from cacheserver.epochs import Epochs
from cacheserver.errors import ConfigError, TierError
from cacheserver.freshness import stale_windows, useful_for_s
from cacheserver.interfaces import Books, Clock, CopyingTier, Files, SigningTier, Tier
from cacheserver.machine import Room
from cacheserver.model import TierName
from cacheserver.settings import Settings
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.guard import Breaker, Deadlines, GuardedObjectTier, GuardedTier
from cacheserver.tiers.objects import Objects
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import Client, connect, disconnect
from cacheserver.tiers.s3 import S3Tier
from cacheserver.undrained import Undrained

_log = structlog.get_logger(__name__)

CONTROL_TIMEOUT_S = 2.0
"""For control state: longer than a tier's, since no hit waits for it, and a busy moment of ours is no lost Redis."""

_DAY_S = 86_400
_LIFECYCLE_S = 30.0
_DISK_DEADLINES = Deadlines(read_s=5.0, write_s=30.0)


@dataclass(slots=True)
class Lower:
    """The tiers under memory, guarded, fastest first; who signs URLs and copies; and the objects that imports may read.

    `client` is that of the Redis among them; `control` another one of the same Redis, for control state: a tier that
    is busy with images must not keep a budget waiting. `files` are those of object storage, if that is among them,
    `s3` is that tier itself, and `disk` the disk tier, which knows its size. By `epochs` they know what was purged, by
    `undrained` Redis which of its copies nobody else has.
    """

    objects: Objects
    tiers: list[GuardedTier] = field(default_factory=list)
    client: Client | None = None
    control: Client | None = None
    signer: SigningTier | None = None
    files: Files | None = None
    s3: S3Tier | None = None
    disk: DiskTier | None = None
    copier: CopyingTier | None = None
    epochs: Epochs = field(default_factory=Epochs)
    undrained: Undrained = field(kw_only=True)

    async def until_last_is_well(self) -> None:
        """Return once the last tier may be asked: see `GuardedTier.until_well`."""
        if self.tiers:
            await self.tiers[-1].until_well()


async def lock_disk(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> None:
    """See to it that no other service writes the disk tier. Raises ConfigError."""
    if TierName.DISK in settings.tier_names:
        setting = "disk.path" if settings.disk.path else "data_dir"
        lock = await DirectoryLock.acquire(settings.disk_path, clock=clock, setting=setting)
        undo.callback(lock.release)


async def build_tiers(settings: Settings, *, books: Books, clock: Clock, undo: AsyncExitStack) -> Lower:
    """The tiers under memory as the settings name them, with our own servers started where they are wanted.

    Raises:
        ConfigError: a server of our own cannot start, or an address cannot be one.
    """
    access = await _s3_access(settings, clock=clock, undo=undo)
    lower = Lower(objects=_objects(settings, access, clock=clock), undrained=Undrained(clock=clock))
    undo.push_async_callback(lower.objects.aclose)
    for name in settings.tier_names:
        match name:
            case TierName.REDIS:
                url = await _redis_url(settings, clock=clock, undo=undo)
                if url is None:
                    continue
                lower.client = _connect(url, settings.redis.timeout_s)
                lower.control = _connect(url, CONTROL_TIMEOUT_S)
                undo.push_async_callback(disconnect, lower.control)
                # A stale connection is replaced and the command sent once more: twice the timeout of one.
                timeout_s = settings.redis.timeout_s
                tier: GuardedTier = _guarded(
                    _redis_tier(settings, lower.client, lower, clock=clock),
                    Deadlines(read_s=2 * timeout_s, write_s=4 * timeout_s),
                    books,
                    clock,
                )
            case TierName.DISK:
                lower.disk = await _disk_tier(settings, epochs=lower.epochs, clock=clock)

                tier = _guarded(lower.disk, _DISK_DEADLINES, books, clock)
            case TierName.S3:
                s3 = _s3_tier(settings, access, epochs=lower.epochs, clock=clock)
                lower.files = lower.s3 = s3
                times = Deadlines(read_s=settings.s3.read_timeout_s, write_s=settings.s3.write_timeout_s)
                breaker = Breaker(tier=s3.name, probe=s3.ping, clock=clock, books=books)
                tier = lower.signer = lower.copier = GuardedObjectTier(
                    s3, deadlines=times, breaker=breaker, books=books, clock=clock
                )
            case _:
                continue
        undo.push_async_callback(tier.aclose)
        lower.tiers.append(tier)
    return lower


def _guarded(tier: Tier, deadlines: Deadlines, books: Books, clock: Clock) -> GuardedTier:
    breaker = Breaker(tier=tier.name, probe=tier.ping, clock=clock, books=books)
    return GuardedTier(tier, deadlines=deadlines, breaker=breaker, books=books, clock=clock)


async def _redis_url(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> str | None:
    """Where your Redis is, else our own Valkey, started; None on a platform that has no Valkey binary."""
    redis = settings.redis
    if redis.url is not None:
        return redis.url.get_secret_value()
    from cacheserver.app import own_servers  # noqa: PLC0415 - with it come their packages, for those who have no Redis

    return await own_servers.start_valkey(settings.data_dir, max_bytes=redis.embedded_max_bytes, clock=clock, undo=undo)


def _connect(url: str, timeout_s: float) -> Client:
    try:
        return connect(url, timeout_s=timeout_s, connect_timeout_s=timeout_s)
    except ValueError as error:
        raise ConfigError(f"redis.url: {error}") from error


def _redis_tier(settings: Settings, client: Client, lower: Lower, *, clock: Clock) -> RedisTier:
    redis = settings.redis
    return RedisTier(
        client,
        clock=clock,
        rng=Random(),  # noqa: S311 - spreads expiry, guards nothing
        prefix=redis.prefix,
        ttl_s=redis.ttl_s,
        ttl_jitter=redis.ttl_jitter,
        stale_s=stale_windows(settings.namespaces.values()),
        max_entry_bytes=redis.max_entry_bytes,
        epochs=lower.epochs,
        write_version=settings.codec.write_version,
        is_alone=lower.undrained.lies_in,
    )


async def _disk_tier(settings: Settings, *, epochs: Epochs, clock: Clock) -> DiskTier:
    disk = settings.disk
    return await DiskTier.open(
        settings.disk_path,
        clock=clock,
        max_bytes=disk.max_bytes,
        sync=disk.fsync,
        epochs=epochs,
        write_version=settings.codec.write_version,
    )


@dataclass(frozen=True, slots=True)
class _S3Access:
    """Where S3 is, and by which credentials."""

    bucket: str
    endpoint: str | None
    region: str
    access_key: str | None
    secret_key: str | None


async def _s3_access(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> _S3Access:
    """Your S3, or our own, started."""
    s3 = settings.s3
    if not s3.local or TierName.S3 not in settings.tier_names:
        return _S3Access(
            bucket=s3.bucket or "",
            endpoint=s3.endpoint,
            region=s3.region,
            access_key=s3.access_key.get_secret_value() if s3.access_key else None,
            secret_key=s3.secret_key.get_secret_value() if s3.secret_key else None,
        )
    from cacheserver.app import own_servers  # noqa: PLC0415 - with it come their packages, for those who have no S3

    own = await own_servers.start_s3(settings.data_dir, clock=clock, undo=undo)
    return _S3Access(own.bucket, own.endpoint, own.region, own.access_key, own.secret_key)


def _s3_tier(settings: Settings, access: _S3Access, *, epochs: Epochs, clock: Clock) -> S3Tier:
    s3 = settings.s3
    try:
        return S3Tier(
            bucket=access.bucket,
            clock=clock,
            prefix=s3.prefix,
            region=access.region,
            endpoint=access.endpoint,
            public_endpoint=s3.public_endpoint,
            access_key=access.access_key,
            secret_key=access.secret_key,
            read_timeout_s=s3.read_timeout_s,
            write_timeout_s=s3.write_timeout_s,
            max_entry_bytes=s3.max_entry_bytes,
            threads=s3.threads,
            epochs=epochs,
            write_version=settings.codec.write_version,
        )
    except ValueError as error:
        raise ConfigError(f"s3.endpoint: {error}") from error


def _objects(settings: Settings, access: _S3Access, *, clock: Clock) -> Objects:
    return Objects(
        settings.imports.buckets,
        clock=clock,
        region=access.region,
        endpoint=access.endpoint,
        access_key=access.access_key,
        secret_key=access.secret_key,
    )


def describe_tiers(lower: Lower, settings: Settings, *, memory_bytes: int, room: Room | None) -> str:
    """The levels in one line, as a person would say them at start-up."""
    is_share = settings.memory.max_bytes is None and room is not None and room.is_container
    share = ", a quarter of the container's" if is_share else ""
    s3 = settings.s3
    words = {
        TierName.REDIS: "redis (yours)" if settings.redis.url else "redis (our own Valkey)",
        TierName.DISK: f"disk ({settings.disk_path})",
        TierName.S3: "s3 (our own SeaweedFS)" if s3.local else f"s3 (bucket {s3.bucket})",
    }
    memory = f"memory ({memory_bytes // 2**20} MiB{share})"
    return " > ".join([memory, *(words[tier.name] for tier in lower.tiers)])


async def look_at_tiers(lower: Lower, settings: Settings) -> None:
    """Ask each tier once: one that is away may come back, so it is named and spared, and the service starts.

    A Redis of yours that evicts whatever it likes does not heal: it would drop control state.
    """
    for tier in lower.tiers:
        try:
            await tier.ping()
        except TierError as error:
            tier.spare()
            _log.warning("tier_unreachable", tier=tier.name, text=f"starting without it: {error}")
    if lower.client is not None and settings.redis.url is not None:
        await refuse_eviction_of_control_state(lower.client)


async def set_lifecycle_rule(lower: Lower, settings: Settings) -> None:
    """Have the bucket remove what is of no use any more, where that is wanted. Whether it can is no reason to stop."""
    if lower.s3 is None or not settings.s3.lifecycle_rule:
        return
    useful_s = useful_for_s(settings.namespaces.values())
    try:
        async with asyncio.timeout(_LIFECYCLE_S):
            await lower.s3.expire_after(math.ceil(useful_s / _DAY_S) + 1)
    except (TierError, TimeoutError) as error:
        text = "s3.lifecycle_rule: the bucket's rules could not be set; what ended stays there until they are"
        _log.warning("lifecycle_rule_not_set", error=str(error), text=text)


def tier_states(tiers: Sequence[GuardedTier]) -> dict[TierName, bool]:
    """Which tiers answer."""
    return {tier.name: not tier.is_open for tier in tiers}
