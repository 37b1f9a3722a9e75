"""A running service: built from settings, drained when asked to stop.

Shutdown is start-up read backwards: whatever is built registers its own undoing on one exit stack.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress

import structlog
import uvloop
from prometheus_client import CollectorRegistry, Gauge, Histogram

from cacheserver.accounting.books import CounterBooks, ToldApart
from cacheserver.alarms import Alarms
from cacheserver.app.alarms import build_alarms
from cacheserver.app.live import live_view
from cacheserver.app.miss_path import MissPath, build_miss_path
from cacheserver.app.tiers import (
    CONTROL_TIMEOUT_S,
    Lower,
    build_tiers,
    describe_tiers,
    lock_disk,
    look_at_tiers,
    tier_states,
)
from cacheserver.cache import PromptCache
from cacheserver.clock import SystemClock
from cacheserver.control.prompts import LocalPrompts, RedisPrompts
from cacheserver.control.replays import LocalReplays, RedisReplays
from cacheserver.errors import CacheServerError
from cacheserver.generation.images import inspect_in_thread
from cacheserver.generation.moderation import ModerationEndpoint, OpenAIModeration
from cacheserver.http.operations import operations
from cacheserver.http.server import HttpServer
from cacheserver.identity import identify
from cacheserver.imports import Imports
from cacheserver.interfaces import Clock, Prompts, Replays
from cacheserver.keep import Keeper
from cacheserver.log import set_up_logging
from cacheserver.model import Caller, LiveState, Permission, Priority, TierName
from cacheserver.paying import UnknownPolicy
from cacheserver.precheck import DenyList, PromptPolicy
from cacheserver.reviews import Reviews
from cacheserver.rpc.admin import AdminService
from cacheserver.rpc.admin_images import AdminImages
from cacheserver.rpc.auth import Authenticator
from cacheserver.rpc.server import Listen, RpcServer
from cacheserver.rpc.service import Limits, PromptCacheService
from cacheserver.settings import Settings, warnings
from cacheserver.tasks import end, every
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.guard import GuardedTier
from cacheserver.tiers.memory import MemoryCache
from cacheserver.tiers.redis import Client
from cacheserver.warming import Warming
from cacheserver.whatif.recording import FLUSH_S, TraceFile, TraceRecorder

_log = structlog.get_logger(__name__)

_GC_THRESHOLDS = (10_000, 10, 30)
_WATCH_S = 1.0
_RELOAD_S = 5.0
_BUDGETS_S = 5.0
_ALARMS_S = 5.0
_LAG_S = 0.5
_ANYBODY = Caller("anonymous", frozenset(Permission))


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
    books = CounterBooks(clock=clock, registry=registry, told_apart=_told_apart(settings))
    patience = Patience(settings.server.drain_timeout_s, clock=clock)
    async with AsyncExitStack() as undo:
        await lock_disk(settings, clock=clock, undo=undo)
        lower = await build_tiers(settings, books=books, clock=clock, undo=undo)
        for tier in lower.tiers:
            books.breaker(tier.name, is_open=False)  # a series that alerts can find before anything happens
        await look_at_tiers(lower, settings)
        memory = MemoryCache(
            clock=clock, max_bytes=settings.memory.max_bytes, max_entry_bytes=settings.memory.entry_limit_bytes
        )
        keeper = Keeper(memory=memory, tiers=lower.tiers, books=books, clock=clock)
        undo.push_async_callback(lambda: keeper.aclose(patience.for_writes_s()))
        miss_path = await build_miss_path(settings, lower=lower, books=books, clock=clock, undo=undo)
        undo.push_async_callback(lambda: miss_path.generator.aclose(patience.for_calls_s()))
        namespaces = settings.namespaces.values()
        reviews = Reviews(memory=memory, tiers=lower.tiers, keeper=keeper, namespaces=namespaces)
        cache = PromptCache(
            memory=memory,
            tiers=lower.tiers,
            keeper=keeper,
            generation=miss_path.generator,
            reviews=reviews,
            replays=_replays(settings, lower.control, clock=clock),
            identify=identify,
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
        cache.remakes.start(settings.generation.off_peak_hours)
        policies = await _policies(settings, clock=clock, undo=undo)
        trace = await _trace(settings, registry=registry, clock=clock, undo=undo)
        live = live_view(cache=cache, memory=memory, lower=lower, keeper=keeper, miss_path=miss_path, clock=clock)
        alarms = build_alarms(
            settings,
            books=books,
            keeper=keeper,
            tiers=lower.tiers,
            miss_path=miss_path,
            clock=clock,
            undo=undo,
            has_redis=lower.control is not None,
        )
        prompts = _prompts(settings, lower.control, clock=clock, undo=undo)
        warming = Warming(
            cache=cache,
            tiers=lower.tiers,
            keeper=keeper,
            generation=miss_path.generator,
            ledger=miss_path.ledger,
            clock=clock,
        )
        rpc = _rpc_server(
            settings,
            cache=cache,
            reviews=reviews,
            keeper=keeper,
            miss_path=miss_path,
            policies=policies,
            trace=trace,
            alarms=alarms,
            live=live,
            prompts=prompts,
            warming=warming,
            books=books,
            clock=clock,
            lower=lower,
        )
        ready = asyncio.Event()
        http = HttpServer(
            operations(registry=registry, is_ready=ready.is_set, tiers=functools.partial(tier_states, lower.tiers)),
            host=settings.server.http_host,
            port=settings.server.http_port,
        )
        await http.start()
        undo.push_async_callback(http.stop)
        await rpc.start()
        undo.push_async_callback(lambda: rpc.drain(patience.for_calls_s()))
        undo.callback(ready.clear)
        show = functools.partial(_show_tiers, rpc, lower.tiers)
        _keep_doing(show, _WATCH_S, clock=clock, name="watch tiers", at_once=True, undo=undo)
        left = Gauge("cacheserver_budget_remaining_microusd", "What a budget has left", ["scope"], registry=registry)
        limit = Gauge("cacheserver_budget_limit_microusd", "The most a budget allows", ["scope"], registry=registry)
        count = functools.partial(_count_budgets, left, limit, miss_path)
        _keep_doing(count, _BUDGETS_S, clock=clock, name="watch budgets", at_once=True, undo=undo)
        _keep_doing(alarms.look, _ALARMS_S, clock=clock, name="alarms", at_once=True, undo=undo)
        lag = Histogram("cacheserver_loop_lag_seconds", "How late the event loop wakes", registry=registry)
        _keep_doing(functools.partial(_measure_lag, lag, clock), 0.0, clock=clock, name="loop lag", undo=undo)
        _add_gauges(registry, cache=cache, miss_path=miss_path, memory=memory, disk=lower.disk, keeper=keeper)
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
    uvloop.run(_serve(settings))  # a miss costs a third less than on asyncio's own loop


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
        await end([starting])
        return
    service = starting.result()
    # What exists now stays: a full collection that walks it again stops the service for about 100 ms. One that walks
    # two thousand calls takes 500 ms, and frees some 20 kB for each that ended: libraries' cycles, never a picture.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    await stop_asked
    _log.info("draining", seconds=settings.server.drain_timeout_s)
    stopping = asyncio.create_task(service.stop(), name="stop")
    hurrying = asyncio.create_task(hurried.wait())
    await asyncio.wait({stopping, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()
    if not stopping.done():
        _log.warning("ended_before_drained")
        service.hurry()
        await end([stopping])
        return
    stopping.result()
    _log.info("stopped")


def _keep_doing(  # noqa: PLR0913 - what, how often, and until when
    work: Callable[[], Awaitable[None]],
    pause_s: float,
    *,
    clock: Clock,
    name: str,
    undo: AsyncExitStack,
    at_once: bool = False,
) -> None:
    """Do `work` every `pause_s` in the background, until the service stops."""
    doing = every(pause_s, work, clock=clock, name=name, at_once=at_once)
    undo.push_async_callback(end, [asyncio.create_task(doing, name=name)])


async def _show_tiers(rpc: RpcServer, tiers: Sequence[GuardedTier]) -> None:
    """Set each tier's health name as its breaker is."""
    for name, is_well in tier_states(tiers).items():
        await rpc.set_tier_health(name, is_well=is_well)


async def _count_budgets(left: Gauge, limit: Gauge, miss_path: MissPath) -> None:
    """Set the metrics of what each budget allows and has left."""
    with suppress(CacheServerError):  # they cannot be asked now: the last figures stand
        for state in await miss_path.budgets.states():
            taken = state.spent_microusd + state.reserved_microusd
            left.labels(state.budget.name).set(state.budget.limit_microusd - taken)
            limit.labels(state.budget.name).set(state.budget.limit_microusd)


async def _policies(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> dict[str, PromptPolicy]:
    """The pre-check of each namespace that has one. Raises ConfigError for a deny-list that cannot be used."""
    written = settings.namespace_settings
    files = {each.deny_file for each in written.values() if each.deny_file is not None}
    lists = {file: await asyncio.to_thread(DenyList, file) for file in files}
    if lists:
        reload = functools.partial(_reload, lists.values())
        _keep_doing(reload, _RELOAD_S, clock=clock, name="reload deny-lists", undo=undo)
    moderation = None
    if any(each.moderation for each in written.values()):
        moderation = OpenAIModeration(_moderation_endpoint(settings), clock=clock)
        undo.push_async_callback(moderation.aclose)
    return {
        name: PromptPolicy(
            name=name,
            deny=None if each.deny_file is None else lists[each.deny_file],
            pii=each.pii,
            moderation=moderation if each.moderation else None,
        )
        for name, each in written.items()
        if each.deny_file is not None or each.pii != "allow" or each.moderation
    }


async def _trace(
    settings: Settings, *, registry: CollectorRegistry, clock: Clock, undo: AsyncExitStack
) -> TraceRecorder | None:
    """The record of what is answered, if there is to be one. Raises ConfigError for a file that cannot be used."""
    written = settings.trace
    if written.path is None:
        return None
    file = await asyncio.to_thread(TraceFile.open, written.path, max_bytes=written.max_bytes)
    recorder = TraceRecorder(file, sample=written.sample, clock=clock)
    undo.push_async_callback(recorder.aclose)
    _keep_doing(recorder.flush, FLUSH_S, clock=clock, name="record trace", undo=undo)
    dropped = Gauge("cacheserver_trace_dropped", "Answers that the trace could not take", registry=registry)
    dropped.set_function(lambda: recorder.dropped)
    return recorder


def _moderation_endpoint(settings: Settings) -> ModerationEndpoint:
    written = settings.moderation
    return ModerationEndpoint(
        name="moderation",
        api_key=written.key,
        base_url=written.base_url,
        model=written.model,
        when_down=written.when_down,
        timeout_s=written.timeout_s,
    )


async def _reload(lists: Iterable[DenyList]) -> None:
    """Bring deny-lists whose files have changed into force without a restart."""
    for each in lists:
        await asyncio.to_thread(each.reload)


def _told_apart(settings: Settings) -> ToldApart | None:
    if not settings.accounting.enabled:
        return None
    namespaces = settings.namespaces.values()
    models = {*settings.model_names, *(namespace.default_model for namespace in namespaces)}
    return ToldApart(frozenset(models), settings.accounting.max_callers)


def _replays(settings: Settings, client: Client | None, *, clock: Clock) -> Replays:
    here = LocalReplays(monotonic_s=clock.monotonic_s)
    if client is None:
        return here
    return RedisReplays(client=client, here=here, prefix=settings.redis.prefix, timeout_s=CONTROL_TIMEOUT_S)


def _prompts(settings: Settings, client: Client | None, *, clock: Clock, undo: AsyncExitStack) -> Prompts | None:
    """Where prompts are recorded; None if no namespace stores any."""
    names = [namespace.name for namespace in settings.namespaces.values() if namespace.store_prompts]
    if not names:
        return None
    if client is None:
        return LocalPrompts(namespaces=names, clock=clock)
    shared = RedisPrompts(
        client=client, namespaces=names, clock=clock, prefix=settings.redis.prefix, timeout_s=CONTROL_TIMEOUT_S
    )
    shared.start()
    undo.push_async_callback(shared.aclose)
    return shared


def _rpc_server(  # noqa: PLR0913 - the parts that calls reach
    settings: Settings,
    *,
    cache: PromptCache,
    reviews: Reviews,
    keeper: Keeper,
    miss_path: MissPath,
    policies: dict[str, PromptPolicy],
    trace: TraceRecorder | None,
    alarms: Alarms,
    live: Callable[[], LiveState],
    prompts: Prompts | None,
    warming: Warming,
    books: CounterBooks,
    clock: Clock,
    lower: Lower,
) -> RpcServer:
    generation, server = settings.generation, settings.server
    callers = settings.caller_tokens
    authenticator = Authenticator(callers, anonymous=None if callers else _ANYBODY)
    inspect = functools.partial(
        inspect_in_thread, max_pixels=generation.max_image_pixels, max_bytes=generation.max_image_bytes
    )
    service = PromptCacheService(
        cache=cache,
        namespaces=settings.namespaces.values(),
        default_model=settings.model,
        authenticator=authenticator,
        books=books,
        inspect=inspect,
        clock=clock,
        limits=Limits(
            max_concurrent_calls=server.max_concurrent_calls,
            batch_in_flight=server.batch_in_flight,
            max_image_bytes=generation.max_image_bytes,
        ),
        warming=warming,
        policies=policies,
        figures=miss_path.figures,
        trace=trace,
        live=live,
        prompts=prompts,
    )
    imports = Imports(
        last=lower.tiers[-1] if lower.tiers else None,
        keeper=keeper,
        objects=lower.objects,
        inspect=inspect,
        clock=clock,
        max_image_bytes=generation.max_image_bytes,
        copier=lower.copier,
    )
    admin = AdminService(
        upstreams=miss_path.pool,
        budgets=miss_path.budgets,
        ledger=miss_path.ledger,
        reviews=reviews,
        images=AdminImages(imports, namespaces=settings.namespaces.values(), clock=clock, policies=policies),
        alarms=alarms,
        authenticator=authenticator,
        books=books,
        clock=clock,
        prompts=prompts,
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
        further=[admin],
        max_receive_bytes=server.max_receive_bytes,
    )


async def _measure_lag(lag: Histogram, clock: Clock) -> None:
    """Sleep a while, and note by how much too long: so late is everything else that waits for its turn."""
    began_s = clock.monotonic_s()
    await clock.sleep(_LAG_S)
    lag.observe(max(0.0, clock.monotonic_s() - began_s - _LAG_S))


def _add_gauges(  # noqa: PLR0913 - the parts that have something to tell
    registry: CollectorRegistry,
    *,
    cache: PromptCache,
    miss_path: MissPath,
    memory: MemoryCache,
    disk: DiskTier | None,
    keeper: Keeper,
) -> None:
    """Metrics that are read where they stand, when somebody asks."""
    in_flight = Gauge("cacheserver_in_flight", "Loads in progress", registry=registry)
    in_flight.set_function(lambda: cache.in_flight)
    held = Gauge("cacheserver_held_images", "Images the last tier has yet to take", registry=registry)
    held.set_function(lambda: keeper.held_images)
    oldest = Gauge("cacheserver_held_oldest_seconds", "How long the oldest of them has been held", registry=registry)
    oldest.set_function(lambda: keeper.oldest_held_s)
    depth = Gauge("cacheserver_queue_depth", "Generations that wait", ["priority"], registry=registry)
    for priority in Priority:
        depth.labels(priority.name.lower()).set_function(functools.partial(_waiting, miss_path, priority))
    tier_bytes = Gauge("cacheserver_tier_bytes", "Bytes a tier holds", ["tier"], registry=registry)
    tier_bytes.labels(TierName.MEMORY).set_function(lambda: memory.size_bytes)
    if disk is not None:
        tier_bytes.labels(TierName.DISK).set_function(lambda: disk.size_bytes)
    rates = Gauge(
        "cacheserver_limit_images_per_minute", "Pictures a minute a group may make", ["limit_group"], registry=registry
    )
    for group in miss_path.groups:
        rates.labels(group).set_function(functools.partial(_images_per_minute, miss_path, group))


def _images_per_minute(miss_path: MissPath, group: str) -> float:
    return 60 * miss_path.limits.images_per_s(group)


def _waiting(miss_path: MissPath, priority: Priority) -> int:
    return miss_path.generator.queue_depth.get(priority, 0)
