"""Several processes of the service on one port: starts them, restarts one that dies, and ends all together.

It owns what they share: the ports, our own Valkey and S3 where there is none of yours, and the metrics page, which is
that of all workers. It answers no calls itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import structlog
import uvloop
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from cacheserver.app import own_servers
from cacheserver.app.merged_metrics import MergedMetrics
from cacheserver.app.service import warn_of
from cacheserver.app.shared_ports import reserve
from cacheserver.app.state import WORKER_TIMEOUT_S, RemoteState, answer
from cacheserver.clock import SystemClock
from cacheserver.embedded.child import SocketDirectory
from cacheserver.errors import ConfigError
from cacheserver.http.delivery.secret import own_secrets
from cacheserver.http.operations import Readiness
from cacheserver.interfaces import Clock
from cacheserver.log import set_up_logging
from cacheserver.model import TierName
from cacheserver.settings import S3Place, Settings, WorkerPlace
from cacheserver.tasks import end

_log = structlog.get_logger(__name__)

_Pipe = TypeVar("_Pipe", asyncio.StreamReader, asyncio.StreamWriter)

_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 30.0
_STEADY_S = 60.0
_BEYOND_DRAIN_S = 15.0
"""For a worker to end after its calls and its writes had their time."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the settings came from: every worker reads them there itself. `env` goes before the file."""

    config: Path | None
    env: Mapping[str, str]
    local_s3: bool


def run(settings: Settings, *, source: Source, leftovers: list[int]) -> None:
    """Serve by `settings.server.workers` processes until SIGTERM or SIGINT; a second signal ends at once.

    Raises:
        ConfigError: what keeps a worker from its first start keeps the service from it.
    """
    set_up_logging(level=settings.log.level, form=settings.log.format)
    uvloop.run(_supervise(settings, source, leftovers))


async def _supervise(settings: Settings, source: Source, leftovers: list[int]) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    supervisor = Supervisor(settings, source=source, leftovers=leftovers, clock=SystemClock())

    def on_signal() -> None:
        if asked.is_set():
            supervisor.hurry()
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, supervisor.hang_up)
    starting = asyncio.create_task(supervisor.start(), name="start")
    stop_asked = asyncio.create_task(asked.wait())
    await asyncio.wait({starting, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        await end([starting])
        return
    starting.result()
    await stop_asked
    _log.info("draining", seconds=settings.server.drain_timeout_s)
    await supervisor.stop()
    _log.info("stopped")


class Worker:
    """One worker process, and those that follow it when it dies."""

    def __init__(self, place: WorkerPlace, *, source: Source) -> None:
        self.place = place
        self.lives = 0
        self._source = source
        self._process: Process | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Run it, and return when it serves. Raises ConfigError if it cannot."""
        self.lives += 1
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "cacheserver.app.worker",
            stdin=PIPE,
            stdout=PIPE,
            env=dict(self._source.env),
            start_new_session=True,  # Ctrl-C is the supervisor's
        )
        told = _pipe(process.stdin)
        try:
            with contextlib.suppress(ConnectionError):  # it has ended, which is seen below
                told.write(self.place.dump())
                await told.drain()
            if self.place.leftover:
                return
            line = await _pipe(process.stdout).readline()
            if not line:
                raise ConfigError(
                    f"server.workers: worker {self.place.index} ended while starting (code {await process.wait()}); "
                    "its last words are above"
                )
            if (error := json.loads(line)["error"]) is not None:
                await process.wait()
                raise ConfigError(error)
        except asyncio.CancelledError:
            self.signal(signal.SIGTERM)
            raise

    async def ended(self) -> int:
        """Wait for its end: the exit code."""
        return 0 if self._process is None else await self._process.wait()

    async def complaint(self) -> str:
        """What it said that kept it from its work; empty if nothing. To be asked once, when it has ended."""
        line = await _pipe(self._process.stdout).readline() if self._process is not None else b""
        return str(json.loads(line)["error"]) if line else ""

    def signal(self, number: int) -> None:
        """Send it a signal if it runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def stop(self, within_s: float) -> None:
        """End it: SIGTERM, and SIGKILL if it still runs after `within_s`."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(within_s):
                await self.ended()
        except TimeoutError:
            _log.warning("worker_killed", worker=self.place.index, after_s=within_s)
        finally:
            self.signal(signal.SIGKILL)
            await self.ended()


def _sockets(directory: Path) -> SocketDirectory:
    """Where supervisor and workers talk: this directory, which only we can open. Raises ConfigError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data_dir: cannot make {directory}: {error.strerror}; mend its permissions") from error
    return SocketDirectory(directory, "all.sock")


def _pipe(end: _Pipe | None) -> _Pipe:
    if end is None:
        raise RuntimeError("the worker was started without this pipe")
    return end


class Supervisor:
    """The workers of one service. `start` it, and `stop` it."""

    def __init__(self, settings: Settings, *, source: Source, leftovers: list[int], clock: Clock) -> None:
        """`leftovers` are the numbers of workers that once were, whose journals are to be drained."""
        self._settings = settings
        self._source = source
        self._leftovers = leftovers
        self._clock = clock
        self._workers: list[Worker] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._undo = AsyncExitStack()
        self._is_stopping = False
        self._merged = MergedMetrics()
        registry = self._registry = CollectorRegistry()
        self._restarts = Counter("cacheserver_worker_restarts", "Workers that were started again", registry=registry)
        serving = Gauge("cacheserver_workers", "Workers that run", registry=registry)
        serving.set_function(lambda: sum(worker.is_alive for worker in self._serving))

    @property
    def _serving(self) -> list[Worker]:
        return [worker for worker in self._workers if not worker.place.leftover]

    async def start(self) -> None:
        """Start what the workers share, and them; return when all of them serve. Raises ConfigError."""
        settings = self._settings
        async with AsyncExitStack() as undo:
            place = await self._first_place(undo)
            count = settings.server.workers
            self._workers = [Worker(replace(place, index=index), source=self._source) for index in range(count)]
            undo.push_async_callback(self._end_workers)
            starting = [asyncio.create_task(worker.start(), name="start worker") for worker in self._workers]
            try:
                await asyncio.gather(*starting)
            finally:
                await end(starting)
            undo.push_async_callback(self._end_keeping)
            self._keeping = [asyncio.create_task(self._keep_running(worker)) for worker in self._workers]
            for index in self._leftovers:
                leftover = Worker(replace(place, index=index, leftover=True), source=self._source)
                self._workers.append(leftover)
                self._keeping.append(asyncio.create_task(self._drain(leftover)))
            self._undo = undo.pop_all()
        server = settings.server
        grpc, http = f"{server.grpc_host}:{place.grpc_port}", f"{server.http_host}:{place.http_port}"
        _log.info("all_serving", workers=count, grpc=grpc, http=http)
        warn_of(settings)

    async def stop(self) -> None:
        """Have all workers drain at once, and end with the last of them."""
        self._is_stopping = True
        await self._undo.aclose()

    def hurry(self) -> None:
        """Have the workers that drain end at once."""
        for worker in self._workers:
            worker.signal(signal.SIGTERM)

    def hang_up(self) -> None:
        """Pass SIGHUP on."""
        for worker in self._workers:
            worker.signal(signal.SIGHUP)

    async def readiness(self) -> Readiness:
        """See `State.readiness`: calls are taken while one worker takes them; a tier is down that is so for any."""
        told = await asyncio.gather(*(self._ask(worker) for worker in self._serving))
        states = [each for each in told if each is not None]
        tiers: dict[str, bool] = {}
        for state in states:
            tiers |= {name: is_well and tiers.get(name, True) for name, is_well in state.tiers.items()}
        return Readiness(not self._is_stopping and any(state.is_ready for state in states), tiers)

    async def metrics(self) -> bytes:
        """See `State.metrics`."""
        await asyncio.gather(*(self._take(worker) for worker in self._serving))
        return self._merged.page() + generate_latest(self._registry)

    async def _first_place(self, undo: AsyncExitStack) -> WorkerPlace:
        """The place of the first worker, with all that the workers share set up."""
        settings, server = self._settings, self._settings.server
        grpc = await asyncio.to_thread(reserve, server.grpc_host, server.grpc_port, setting="grpc")
        undo.callback(grpc.close)
        http = await asyncio.to_thread(reserve, server.http_host, server.http_port, setting="http")
        undo.callback(http.close)
        redis_url, s3 = await self._own_servers(undo)
        if settings.delivery.url_secret is None is settings.delivery.url_secret_file:
            await asyncio.to_thread(own_secrets, settings.data_dir)
        sockets = await asyncio.to_thread(_sockets, settings.data_dir.absolute() / "workers")
        undo.callback(sockets.remove)
        place = WorkerPlace(
            index=0,
            count=server.workers,
            grpc_port=grpc.getsockname()[1],
            http_port=http.getsockname()[1],
            sockets=str(sockets.path),
            config=None if self._source.config is None else str(self._source.config),
            local_s3=self._source.local_s3,
            redis_url=redis_url,
            s3=s3,
        )
        undo.push_async_callback(await answer(place.supervisor_socket, self))
        return place

    async def _own_servers(self, undo: AsyncExitStack) -> tuple[str | None, S3Place | None]:
        """Our own Valkey and S3, where the settings want them; None where yours are used."""
        settings, clock = self._settings, self._clock
        redis_url = s3 = None
        if settings.runs_own_valkey and TierName.REDIS in settings.tier_names:
            max_bytes = settings.redis.embedded_max_bytes
            redis_url = await own_servers.start_valkey(settings.data_dir, max_bytes=max_bytes, clock=clock, undo=undo)
            if redis_url is None:
                raise ConfigError("server.workers: there is no Valkey for this platform; set redis.url, or workers = 1")
        if settings.s3.local:
            own = await own_servers.start_s3(settings.data_dir, clock=clock, undo=undo)
            s3 = S3Place(
                bucket=own.bucket,
                endpoint=own.endpoint,
                region=own.region,
                access_key=own.access_key,
                secret_key=own.secret_key,
            )
        return redis_url, s3

    async def _keep_running(self, worker: Worker) -> None:
        """Start a worker again whenever it dies, at once and then ever later."""
        backoff_s, index = _FIRST_BACKOFF_S, worker.place.index
        while True:
            started_s = self._clock.monotonic_s()
            code = await worker.ended()
            self._merged.ended(str(index))
            if self._clock.monotonic_s() - started_s > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            _log.warning("worker_ended", worker=index, exit_code=code, restart_in_s=backoff_s)
            await self._clock.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            try:
                await worker.start()
            except (ConfigError, OSError) as error:  # the others go on: the file may have been spoilt meanwhile
                _log.error("worker_cannot_start", worker=index, error=str(error))
            else:
                self._restarts.inc()
                _log.info("worker_restarted", worker=index)

    async def _drain(self, leftover: Worker) -> None:
        index = leftover.place.index
        _log.info("draining_leftover", worker=index)
        await leftover.start()
        if code := await leftover.ended():
            text = await leftover.complaint() or f"exit code {code}"
            _log.error("leftover_not_drained", worker=index, error=text)

    async def _end_workers(self) -> None:
        within_s = 2 * self._settings.server.drain_timeout_s + _BEYOND_DRAIN_S
        await asyncio.gather(*(worker.stop(within_s) for worker in self._workers))

    async def _end_keeping(self) -> None:
        await end(self._keeping)

    async def _ask(self, worker: Worker) -> Readiness | None:
        try:
            return await RemoteState(worker.place.socket, timeout_s=WORKER_TIMEOUT_S).readiness()
        except OSError:
            return None

    async def _take(self, worker: Worker) -> None:
        """Take the metrics of a worker; one that does not answer in time keeps its last ones."""
        life = worker.lives
        with contextlib.suppress(OSError):
            page = await RemoteState(worker.place.socket, timeout_s=WORKER_TIMEOUT_S).metrics()
            if worker.lives == life and worker.is_alive:  # else it was that of one that has been counted as ended
                self._merged.take(str(worker.place.index), page)
