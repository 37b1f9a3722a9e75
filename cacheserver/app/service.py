"""A running service: built from settings, drained when asked to stop.

Shutdown is start-up read backwards: whatever is built registers its own undoing on one exit stack.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog
import uvloop

from cacheserver import allocator, loop_first
from cacheserver.app.alarms import build_alarms
from cacheserver.app.core import build_core
from cacheserver.app.front import build_front
from cacheserver.app.patience import Patience
from cacheserver.app.reload import Reloading
from cacheserver.app.shared_ports import spread_connections
from cacheserver.app.state import ProcessState, RemoteState, answer
from cacheserver.app.tiers import describe_tiers, tier_states
from cacheserver.app.watching import watch
from cacheserver.clock import SystemClock
from cacheserver.http.application import Application
from cacheserver.http.operations import State, operations
from cacheserver.http.server import HttpServer
from cacheserver.interfaces import Clock
from cacheserver.log import set_up_logging
from cacheserver.rpc.server import RpcServer
from cacheserver.settings import Settings, WorkerPlace, warnings
from cacheserver.tasks import OwnedTasks, end

_log = structlog.get_logger(__name__)

_GC_THRESHOLDS = (3_000, 4, 250)
"""To look through some ten thousand objects takes 4 to 7 ms; full collections are as rare as with (10_000, 10, 30)."""


class Service:
    """A running service."""

    def __init__(  # noqa: PLR0913 - its parts, by keyword
        self,
        settings: Settings,
        *,
        rpc: RpcServer,
        http: HttpServer,
        reloading: Reloading,
        patience: Patience,
        undo: AsyncExitStack,
    ) -> None:
        self._settings = settings
        self._reloading = reloading
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

    async def reload(self) -> None:
        """Bring into force what the configuration says now, as far as that needs no restart. Never raises."""
        await self._reloading.reload()

    async def stop(self) -> None:
        """Drain and end: health first, then calls, then loads, then what is still being written."""
        await self._undo.aclose()

    def hurry(self) -> None:
        """Let what is still to be stopped wait for nothing; cancel a `stop` that is under way, too."""
        self._patience.lose()


async def start(
    settings: Settings,
    *,
    clock: Clock | None = None,
    place: WorkerPlace | None = None,
    load: Callable[[], Settings] | None = None,
) -> Service:
    """Build everything and serve; as one of several workers if it has a `place` among them.

    `load` reads the settings anew for `Service.reload`; None: they never change.

    Raises:
        ConfigError: one line saying which setting keeps the service from starting.
    """
    clock = clock or SystemClock()
    patience = Patience(settings.server.drain_timeout_s, clock=clock)
    async with AsyncExitStack() as undo:
        core = await build_core(settings, patience=patience, clock=clock, undo=undo)
        alarms = build_alarms(core, undo=undo)
        front = await build_front(core, alarms=alarms, undo=undo, is_shared=place is not None)
        rpc = front.rpc
        ready = asyncio.Event()
        tiers = functools.partial(tier_states, core.lower.tiers)
        state: State = ProcessState(registry=core.registry, is_ready=ready.is_set, tiers=tiers)
        if place is not None:
            undo.push_async_callback(await answer(place.socket, state))
            state = RemoteState(place.supervisor_socket)
        application = Application(front.routes, operations(state))
        http = HttpServer(
            application,
            find_questions=application.questions,
            downloads=core.downloads,
            host=settings.server.http_host,
            port=settings.server.http_port,
            tls_cert_file=settings.server.http_tls_cert_file,
            tls_key_file=settings.server.http_tls_key_file,
            is_shared=place is not None,
        )
        await http.start()
        undo.push_async_callback(http.stop)
        await rpc.start()
        undo.push_async_callback(lambda: rpc.drain(patience.for_calls_s()))
        undo.callback(ready.clear)
        if place is not None:
            await asyncio.to_thread(spread_connections, {http.port, rpc.port}, processes=place.count)
        loop_first.others_give_way()  # before the memory guard's is there: it does not
        watch(core, rpc=rpc, alarms=alarms, undo=undo)
        ready.set()
        reloading = Reloading(load or (lambda: settings), core=core, front=front)
        service = Service(settings, rpc=rpc, http=http, reloading=reloading, patience=patience, undo=undo.pop_all())
    _log.info(
        "serving",
        grpc=service.grpc_address,
        http=service.http_address,
        tiers=describe_tiers(core.lower, settings, memory_bytes=core.memory.max_bytes, room=core.room),
        upstreams=", ".join(upstream.name for upstream in settings.upstreams),
    )
    if place is None:  # else the supervisor has said it once for all
        warn_of(settings)
    return service


def warn_of(settings: Settings) -> None:
    """Log what works and may not be meant."""
    for line in warnings(settings):
        _log.warning("setting_to_look_at", text=line)


def run(
    settings: Settings,
    *,
    load: Callable[[], Settings],
    place: WorkerPlace | None = None,
    serving: Callable[[], None] = lambda: None,
    outlived: Callable[[Callable[[], None]], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends at once. Raises ConfigError.

    Args:
        settings: all of them.
        load: reads them anew, for SIGHUP. Called in a thread.
        place: that of a worker among several.
        serving: called once it serves.
        outlived: called in the event loop with what ends the service as SIGTERM does.
    """
    allocator.set_up()
    set_up_logging(level=settings.log.level, form=settings.log.format)
    # A miss costs a third less than on asyncio's own loop.
    uvloop.run(_serve(settings, load=load, place=place, serving=serving, outlived=outlived))


async def _serve(
    settings: Settings,
    *,
    load: Callable[[], Settings],
    place: WorkerPlace | None,
    serving: Callable[[], None],
    outlived: Callable[[Callable[[], None]], None],
) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(loop_first.pool(None, "worker"))
    asked = asyncio.Event()
    hurried = asyncio.Event()

    def on_signal() -> None:
        (hurried if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    reloads = OwnedTasks()
    is_serving = asyncio.Event()

    async def reload() -> None:
        await is_serving.wait()  # a signal that comes while it starts is not the end of it
        await service.reload()

    loop.add_signal_handler(signal.SIGHUP, lambda: reloads.own(reload(), "reload"))
    outlived(asked.set)
    starting = asyncio.create_task(start(settings, place=place, load=load), name="start")
    stop_asked = asyncio.create_task(asked.wait())
    await asyncio.wait({starting, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        await end([starting])
        return
    service = starting.result()
    is_serving.set()
    serving()
    # What exists now stays: a full collection that walks it again stops the service for about 100 ms. One that walks
    # two thousand calls takes 500 ms, and frees some 20 kB for each that ended: libraries' cycles, never a picture.
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    gc.enable()
    await stop_asked
    await reloads.aclose(0)
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
