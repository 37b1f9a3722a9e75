"""A process we own: it dies with us, is started again when it dies, and tells why it cannot start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from cacheserver.errors import ConfigError
from cacheserver.interfaces import Clock

_log = structlog.get_logger(__name__)

_LEASH = """
exec 3<&0
{
    read -r _ <&3 && exit
    kill -TERM $$ 2>/dev/null
    for _ in 1 2 3 4 5; do
        sleep 1
        kill -0 $$ 2>/dev/null || exit
    done
    kill -KILL $$
} &
exec "$@" 3<&- </dev/null
"""

_LONGEST_SOCKET_PATH = 103  # bytes, as macOS has it; Linux allows four more
_PORTS = range(10_000, 30_000)  # below the ephemeral range: no outgoing connection of anybody's takes one of these

_POLL_S = 0.02
_START_TIMEOUT_S = 60.0
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 30.0
_STEADY_S = 60.0
_LOG_CHECK_S = 60.0
_LOG_MAX_BYTES = 4 * 1024 * 1024
_QUOTED_LINES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to run. `environment` is all it sees beside PATH; what it prints goes to `log_file`, in its directory."""

    name: str
    argv: Sequence[str]
    log_file: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_timeout_s: float = 10.0


class SupervisedChild:
    """A program that runs as long as we do.

    It shares neither our terminal (Ctrl-C is ours to handle) nor our environment (our secrets stay ours). Its
    log is kept under 4 MiB or so, with one older copy beside it. `lock_fd` stays open in it. `is_ready` is
    asked until it says yes and must itself end soon.
    """

    def __init__(
        self, program: Program, *, lock_fd: int, is_ready: Callable[[], Awaitable[bool]], clock: Clock
    ) -> None:
        self._program = program
        self._lock_fd = lock_fd
        self._is_ready = is_ready
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None
        self._leash_fd = -1
        self._log_start = 0
        self._started_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Run it and return when it is ready.

        Raises:
            ConfigError: it ended, or was not ready within a minute; the message quotes its last lines.
        """
        await self._run()
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._bound_log())]

    async def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL when it still runs after its `stop_timeout_s`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self._end()

    async def _supervise(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            code = await self._ended()
            if self._clock.monotonic_s() - self._started_s > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            _log.warning("child_ended", child=self._program.name, exit_code=code, restart_in_s=backoff_s)
            await self._clock.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            try:
                await self._run()
            except (ConfigError, OSError) as exc:
                _log.error("child_cannot_start", child=self._program.name, error=str(exc))
            else:
                _log.info("child_restarted", child=self._program.name)

    async def _run(self) -> None:
        try:
            await self._spawn()
            await self._wait_until_ready()
        except BaseException:
            await self._end()
            raise

    async def _wait_until_ready(self) -> None:
        deadline_s = self._clock.monotonic_s() + _START_TIMEOUT_S
        while not await self._is_ready():
            if self.pid is None:
                raise ConfigError(await self._complaint("ended while starting"))
            if self._clock.monotonic_s() > deadline_s:
                raise ConfigError(await self._complaint(f"was not ready after {_START_TIMEOUT_S:.0f} s"))
            await self._clock.sleep(_POLL_S)

    async def _spawn(self) -> None:
        read_fd, self._leash_fd = os.pipe()
        # Append mode is what lets _bound_log cut the file under the child's hands.
        log_fd = os.open(self._program.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._log_start = os.fstat(log_fd).st_size
        self._started_s = self._clock.monotonic_s()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *leashed(self._program.argv),
                stdin=read_fd,
                stdout=log_fd,
                stderr=log_fd,
                env={"PATH": os.defpath, **self._program.environment},
                cwd=self._program.log_file.parent,
                pass_fds=(self._lock_fd,),
                start_new_session=True,
            )
        finally:
            os.close(read_fd)
            os.close(log_fd)

    async def _ended(self) -> int | None:
        code = await self._process.wait() if self._process else None
        self._unleash()
        return code

    async def _end(self) -> None:
        process = self._process
        try:
            if process is not None and process.returncode is None:
                process.terminate()
                async with asyncio.timeout(self._program.stop_timeout_s):
                    await process.wait()
        except TimeoutError:
            _log.warning("child_killed", child=self._program.name, after_s=self._program.stop_timeout_s)
        finally:
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
            self._unleash()

    def _unleash(self) -> None:
        if self._leash_fd < 0:
            return
        with contextlib.suppress(BrokenPipeError):  # the leash may have been killed, too
            os.write(self._leash_fd, b"\n")
        os.close(self._leash_fd)
        self._leash_fd = -1

    async def _bound_log(self) -> None:
        while True:
            await self._clock.sleep(_LOG_CHECK_S)
            await asyncio.to_thread(self._cut_log)

    def _cut_log(self) -> None:
        log_file = self._program.log_file
        if log_file.stat().st_size > _LOG_MAX_BYTES:
            shutil.copyfile(log_file, log_file.with_suffix(".log.1"))
            os.truncate(log_file, 0)

    async def _complaint(self, what: str) -> str:
        log_file = self._program.log_file
        printed = await asyncio.to_thread(log_file.read_bytes)
        lines = printed[self._log_start :].decode(errors="replace").strip().splitlines()[-_QUOTED_LINES:]
        return f"{self._program.name} {what}; its last lines in {log_file}: {' | '.join(lines) or '(none)'}"


def leashed(argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` on a leash: a pipe at its standard input.

    When the holder of the pipe's other end dies, however it dies, the program gets SIGTERM and five seconds
    later SIGKILL. A line written to the pipe lets it off the leash. The program keeps the process id it was
    started with, so it is signalled and waited for like any child. Works wherever there is a `sh`, and unlike
    Linux' parent-death signal does not depend on the thread that forked staying alive.
    """
    return ["sh", "-c", _LEASH, "leash", *argv]


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of 127.0.0.1 that nobody listens on now.

    Raises:
        ConfigError: there are not so many.
    """
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if is_free(port):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ConfigError(f"no {count} free TCP ports on 127.0.0.1; end some of the programs that listen there")


def is_free(port: int) -> bool:
    """Whether a TCP port of 127.0.0.1 could be listened on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class SocketDirectory:
    """Where unix sockets lie: the directory itself, or where its path is too long, a short one that is ours alone."""

    def __init__(self, directory: Path, longest_name: str) -> None:
        fits = len(os.fsencode(directory / longest_name)) <= _LONGEST_SOCKET_PATH
        # mkdtemp: mode 0700 and a name nobody can foresee, so nobody can put a link in its place.
        self._made = None if fits else Path(tempfile.mkdtemp(prefix="cacheserver-"))
        self.path = self._made or directory

    def remove(self) -> None:
        """Remove it if it was made for this."""
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
