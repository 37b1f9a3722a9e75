"""The composition root: settings become objects, objects become a service. The only file that imports them all.

Shutdown is start-up read backwards: whatever is built registers its own undoing on one exit stack.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Gauge

from cacheserver.accounting.books import CounterBooks
from cacheserver.cache import PromptCache
from cacheserver.clock import SystemClock
from cacheserver.control import LocalReplays, RedisReplays, refuse_eviction_of_control_state
from cacheserver.embedded import valkey
from cacheserver.embedded.lock import DirectoryLock
from cacheserver.embedded.seaweed import LocalS3
from cacheserver.embedded.valkey import EmbeddedValkey
from cacheserver.errors import ConfigError, TierError
from cacheserver.generation.generator import Generator
from cacheserver.generation.images import inspect_in_thread
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.providers.openai import Endpoint, OpenAIUpstream, Style
from cacheserver.generation.providers.painter import PainterUpstream
from cacheserver.http.operations import operations
from cacheserver.http.server import HttpServer
from cacheserver.interfaces import Books, Clock, Replays, SigningTier, Tier, Upstream
from cacheserver.keep import Keeper
from cacheserver.log import set_up_logging
from cacheserver.model import Caller, Permission, Priority, TierName
from cacheserver.paying import UnknownPolicy
from cacheserver.rpc.auth import Authenticator
from cacheserver.rpc.server import Listen, RpcServer
from cacheserver.rpc.service import Limits, PromptCacheService
from cacheserver.settings import Settings, UpstreamSettings, warnings
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.guard import Breaker, Deadlines, GuardedSigningTier, GuardedTier
from cacheserver.tiers.memory import MemoryCache
from cacheserver.tiers.redis import Client, RedisTier, connect
from cacheserver.tiers.s3 import S3Tier

_log = structlog.get_logger(__name__)

_WATCH_S = 1.0
_DISK_DEADLINES = Deadlines(read_s=5.0, write_s=30.0)
_CONTROL_TIMEOUT_S = 0.5
_ANYBODY = Caller("anonymous", frozenset(Permission))


@dataclass(slots=True)
class Lower:
    """The tiers under memory, guarded, fastest first; the client of the Redis among them; and who signs URLs."""

    tiers: list[GuardedTier] = field(default_factory=list)
    client: Client | None = None
    signer: SigningTier | None = None


class Patience:
    """How long stopping waits: `span_s` for all calls and loads together, then as long for what is being stored."""

    def __init__(self, span_s: float, *, clock: Clock) -> None:
        self._span_s = span_s
        self._clock = clock
        self._until_s: float | None = None

    def for_calls_s(self) -> float:
        """Seconds left for calls and loads; they run from the first time this is asked."""
        now_s = self._clock.monotonic_s()
        if self._until_s is None:
            self._until_s = now_s + self._span_s
        return max(0.0, self._until_s - now_s)

    def for_writes_s(self) -> float:
        """Seconds for what is being stored: what was paid for is not lost because a call took all the time."""
        return self._span_s

    def lose(self) -> None:
        """Wait for nothing any more."""
        self._span_s = 0.0
        self._until_s = self._clock.monotonic_s()


class Service:
    """A running service."""

    def __init__(
        self, settings: Settings, *, rpc: RpcServer, http: HttpServer, patience: Patience, undo: AsyncExitStack
    ) -> None:
        self._settings = settings
        self._rpc = rpc
        self._http = http
        self._patience = patience
        self._undo = undo

    @property
    def grpc_address(self) -> str:
        """Where gRPC is served, as host:port."""
        return f"{self._settings.server.grpc_host}:{self._rpc.port}"

    @property
    def http_address(self) -> str:
        """Where health and metrics are served, as host:port."""
        return f"{self._settings.server.http_host}:{self._http.port}"

    async def stop(self) -> None:
        """Drain and end: health first, then calls, then loads, then what is still being written."""
        await self._undo.aclose()

    def hurry(self) -> None:
        """Let what is still to be stopped wait for nothing; cancel a `stop` that is under way, too."""
        self._patience.lose()


async def start(settings: Settings, *, clock: Clock | None = None) -> Service:
    """Build everything and serve.

    Raises:
        ConfigError: one line saying which setting keeps the service from starting.
    """
    clock = clock or SystemClock()
    registry = CollectorRegistry()
    books = CounterBooks(clock=clock, registry=registry)
    patience = Patience(settings.server.drain_timeout_s, clock=clock)
    async with AsyncExitStack() as undo:
        await _lock_disk(settings, clock=clock, undo=undo)
        lower = await build_tiers(settings, books=books, clock=clock, undo=undo)
        for tier in lower.tiers:
            books.breaker(tier.name, is_open=False)  # a series that alerts can find before anything happens
        await _look_at_tiers(lower, settings)
        memory = MemoryCache(
            clock=clock, max_bytes=settings.memory.max_bytes, max_entry_bytes=settings.memory.entry_limit_bytes
        )
        keeper = Keeper(memory=memory, tiers=lower.tiers, books=books, clock=clock)
        undo.push_async_callback(lambda: keeper.aclose(patience.for_writes_s()))
        generator = build_generator(settings, books=books, clock=clock)
        undo.push_async_callback(generator.aclose)
        cache = PromptCache(
            memory=memory,
            tiers=lower.tiers,
            keeper=keeper,
            generation=generator,
            replays=_replays(settings, lower.client, clock=clock),
            books=books,
            clock=clock,
            unknown=UnknownPolicy(
                pay=settings.generation.when_unknown == "pay",
                budget_microusd_per_hour=settings.generation.unknown_budget_microusd_per_hour,
            ),
            signer=lower.signer,
            url_expires_s=settings.s3.url_expires_s,
        )
        undo.push_async_callback(lambda: cache.aclose(patience.for_calls_s()))
        rpc = _rpc_server(settings, cache=cache, books=books, clock=clock, lower=lower)
        ready = asyncio.Event()
        http = HttpServer(
            operations(registry=registry, is_ready=ready.is_set, tiers=functools.partial(_tier_states, lower.tiers)),
            host=settings.server.http_host,
            port=settings.server.http_port,
        )
        await http.start()
        undo.push_async_callback(http.stop)
        await rpc.start()
        undo.push_async_callback(lambda: rpc.drain(patience.for_calls_s()))
        undo.callback(ready.clear)
        watching = asyncio.create_task(_watch_tiers(rpc, lower.tiers, clock), name="watch tiers")
        undo.push_async_callback(_end, watching)
        _add_gauges(registry, cache, generator, memory)
        ready.set()
        service = Service(settings, rpc=rpc, http=http, patience=patience, undo=undo.pop_all())
    _log.info(
        "serving",
        grpc=service.grpc_address,
        http=service.http_address,
        tiers=describe_tiers(lower, settings),
        upstreams=", ".join(upstream.name for upstream in settings.upstreams),
    )
    for line in warnings(settings):
        _log.warning("setting_to_look_at", text=line)
    return service


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends at once. Raises ConfigError."""
    set_up_logging(level=settings.log.level, form=settings.log.format)
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    hurried = asyncio.Event()

    def on_signal() -> None:
        (hurried if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    starting = asyncio.create_task(start(settings), name="start")
    stop_asked = asyncio.create_task(asked.wait())
    await asyncio.wait({starting, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        await _end(starting)
        return
    service = starting.result()
    # What exists now stays: a full collection that walks it again stops the service for about 100 ms.
    gc.collect()
    gc.freeze()
    await stop_asked
    _log.info("draining", seconds=settings.server.drain_timeout_s)
    stopping = asyncio.create_task(service.stop(), name="stop")
    hurrying = asyncio.create_task(hurried.wait())
    await asyncio.wait({stopping, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    if not stopping.done():
        _log.warning("ended_before_drained")
        service.hurry()
        await _end(stopping)
        return
    stopping.result()
    _log.info("stopped")


# ── tiers ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _lock_disk(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> None:
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
    lower = Lower()
    for name in settings.tier_names:
        match name:
            case TierName.REDIS:
                lower.client = await _redis_client(settings, clock=clock, undo=undo)
                if lower.client is None:
                    continue
                # A stale connection is replaced and the command sent once more: twice the timeout of one.
                timeout_s = settings.redis.timeout_s
                tier: GuardedTier = _guarded(
                    _redis_tier(settings, lower.client, clock=clock),
                    Deadlines(read_s=2 * timeout_s, write_s=4 * timeout_s),
                    books,
                    clock,
                )
            case TierName.DISK:
                tier = _guarded(await _disk_tier(settings, clock=clock), _DISK_DEADLINES, books, clock)
            case TierName.S3:
                s3 = await _s3_tier(settings, clock=clock, undo=undo)
                times = Deadlines(read_s=settings.s3.read_timeout_s, write_s=settings.s3.write_timeout_s)
                breaker = Breaker(tier=s3.name, probe=s3.ping, clock=clock, books=books)
                tier = lower.signer = GuardedSigningTier(s3, deadlines=times, breaker=breaker, books=books, clock=clock)
            case _:
                continue
        undo.push_async_callback(tier.aclose)
        lower.tiers.append(tier)
    return lower


def _guarded(tier: Tier, deadlines: Deadlines, books: Books, clock: Clock) -> GuardedTier:
    breaker = Breaker(tier=tier.name, probe=tier.ping, clock=clock, books=books)
    return GuardedTier(tier, deadlines=deadlines, breaker=breaker, books=books, clock=clock)


async def _redis_client(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> Client | None:
    """A client of your Redis, else of our own Valkey; None on a platform that has no Valkey binary."""
    redis = settings.redis
    if redis.url is not None:
        try:
            return connect(redis.url.get_secret_value(), timeout_s=redis.timeout_s, connect_timeout_s=redis.timeout_s)
        except ValueError as error:
            raise ConfigError(f"redis.url: {error}") from error
    if not valkey.available():
        _log.warning(
            "no_valkey_for_this_platform", text="no Redis level: set redis.url or install cacheserver[embedded]"
        )
        return None
    own = EmbeddedValkey(data_dir=settings.data_dir, max_bytes=redis.embedded_max_bytes, clock=clock)
    await own.start()
    undo.push_async_callback(own.stop)
    return connect(own.url, timeout_s=redis.timeout_s, connect_timeout_s=redis.timeout_s)


def _redis_tier(settings: Settings, client: Client, *, clock: Clock) -> RedisTier:
    redis = settings.redis
    return RedisTier(
        client,
        clock=clock,
        rng=Random(),  # noqa: S311 - spreads expiry, guards nothing
        prefix=redis.prefix,
        ttl_s=redis.ttl_s,
        ttl_jitter=redis.ttl_jitter,
        max_entry_bytes=redis.max_entry_bytes,
    )


async def _disk_tier(settings: Settings, *, clock: Clock) -> DiskTier:
    disk = settings.disk
    return await DiskTier.open(settings.disk_path, clock=clock, max_bytes=disk.max_bytes, sync=disk.fsync)


async def _s3_tier(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> S3Tier:
    s3 = settings.s3
    tier = functools.partial(
        S3Tier,
        clock=clock,
        prefix=s3.prefix,
        read_timeout_s=s3.read_timeout_s,
        write_timeout_s=s3.write_timeout_s,
        max_entry_bytes=s3.max_entry_bytes,
        threads=s3.threads,
    )
    if s3.local:
        own = LocalS3(data_dir=settings.data_dir, clock=clock)
        await own.start()
        undo.push_async_callback(own.stop)
        return tier(
            bucket=own.bucket,
            endpoint=own.endpoint,
            region=own.region,
            access_key=own.access_key,
            secret_key=own.secret_key,
        )
    try:
        return tier(
            bucket=s3.bucket or "",
            endpoint=s3.endpoint,
            public_endpoint=s3.public_endpoint,
            region=s3.region,
            access_key=s3.access_key.get_secret_value() if s3.access_key else None,
            secret_key=s3.secret_key.get_secret_value() if s3.secret_key else None,
        )
    except ValueError as error:
        raise ConfigError(f"s3.endpoint: {error}") from error


def describe_tiers(lower: Lower, settings: Settings) -> str:
    """The levels in one line, as a person would say them at start-up."""
    s3 = settings.s3
    words = {
        TierName.REDIS: "redis (yours)" if settings.redis.url else "redis (our own Valkey)",
        TierName.DISK: f"disk ({settings.disk_path})",
        TierName.S3: "s3 (our own SeaweedFS)" if s3.local else f"s3 (bucket {s3.bucket})",
    }
    memory = f"memory ({settings.memory.max_bytes // 2**20} MiB)"
    return " > ".join([memory, *(words[tier.name] for tier in lower.tiers)])


async def _look_at_tiers(lower: Lower, settings: Settings) -> None:
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


def _tier_states(tiers: Sequence[GuardedTier]) -> dict[TierName, bool]:
    return {tier.name: not tier.is_open for tier in tiers}


async def _watch_tiers(rpc: RpcServer, tiers: Sequence[GuardedTier], clock: Clock) -> None:
    """Keep each tier's health name in step with its breaker."""
    while True:
        for name, is_well in _tier_states(tiers).items():
            await rpc.set_tier_health(name, is_well=is_well)
        await clock.sleep(_WATCH_S)


# ── the miss path, the front, the rest ──────────────────────────────────────────────────────────────────────


def build_generator(settings: Settings, *, books: Books, clock: Clock) -> Generator:
    """The miss path over the upstreams that the settings name. Raises ConfigError."""
    named = {ours: theirs for written in settings.upstreams for ours, theirs in written.models.items()}
    prices = PriceTable.load().naming(named)
    upstreams: dict[str, Upstream] = {}
    for written in settings.upstreams:
        upstream = _upstream(written, settings, prices=prices, clock=clock)
        upstreams.update(dict.fromkeys(written.models, upstream))
    return Generator(
        upstreams=upstreams,
        default_model=settings.model,
        clock=clock,
        books=books,
        prices=prices,
        max_concurrent=settings.generation.max_concurrent,
        queue_max=settings.generation.queue_max,
    )


def _upstream(written: UpstreamSettings, settings: Settings, *, prices: PriceTable, clock: Clock) -> Upstream:
    if written.kind == "painter":
        return PainterUpstream(clock=clock)
    return OpenAIUpstream(
        Endpoint(
            name=written.name,
            base_url=written.base_url,
            api_key=written.key,
            models=written.models,
            style=Style(written.api_style),
            api_version=written.api_version,
            url_hosts=written.url_hosts,
            max_n=written.max_n,
            max_image_bytes=settings.generation.max_image_bytes,
            max_pixels=settings.generation.max_image_pixels,
            connect_timeout_s=written.connect_timeout_s,
            timeout_s=written.read_timeout_s,
        ),
        prices=prices,
        clock=clock,
    )


def _replays(settings: Settings, client: Client | None, *, clock: Clock) -> Replays:
    here = LocalReplays(monotonic_s=clock.monotonic_s)
    if client is None:
        return here
    return RedisReplays(client=client, here=here, prefix=settings.redis.prefix, timeout_s=_CONTROL_TIMEOUT_S)


def _rpc_server(
    settings: Settings, *, cache: PromptCache, books: CounterBooks, clock: Clock, lower: Lower
) -> RpcServer:
    generation, server = settings.generation, settings.server
    callers = settings.caller_tokens
    service = PromptCacheService(
        cache=cache,
        namespaces=settings.namespaces.values(),
        default_model=settings.model,
        authenticator=Authenticator(callers, anonymous=None if callers else _ANYBODY),
        books=books,
        inspect=functools.partial(
            inspect_in_thread, max_pixels=generation.max_image_pixels, max_bytes=generation.max_image_bytes
        ),
        clock=clock,
        limits=Limits(max_concurrent_calls=server.max_concurrent_calls, max_image_bytes=generation.max_image_bytes),
    )
    listen = Listen(
        host=server.grpc_host,
        port=server.grpc_port,
        unix_socket=server.grpc_unix_socket,
        tls_cert_file=server.tls_cert_file,
        tls_key_file=server.tls_key_file,
    )
    return RpcServer(
        service,
        listen=listen,
        tiers=[tier.name for tier in lower.tiers],
        max_receive_bytes=server.max_receive_bytes,
    )


def _add_gauges(registry: CollectorRegistry, cache: PromptCache, generator: Generator, memory: MemoryCache) -> None:
    """Metrics that are read where they stand, when somebody asks."""
    in_flight = Gauge("cacheserver_in_flight", "Loads in progress", registry=registry)
    in_flight.set_function(lambda: cache.in_flight)
    depth = Gauge("cacheserver_queue_depth", "Generations that wait", ["priority"], registry=registry)
    for priority in Priority:
        depth.labels(priority.name.lower()).set_function(functools.partial(_waiting, generator, priority))
    tier_bytes = Gauge("cacheserver_tier_bytes", "Bytes a tier holds", ["tier"], registry=registry)
    tier_bytes.labels(TierName.MEMORY).set_function(lambda: memory.size_bytes)


def _waiting(generator: Generator, priority: Priority) -> int:
    return generator.queue_depth.get(priority, 0)


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})
