"""The HTTP server: uvicorn inside the service's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from cacheserver.errors import ConfigError

_GRACE_S = 2


class HttpServer:
    """Serves an application on one address. Port 0 is any free one."""

    def __init__(self, application: Starlette, *, host: str, port: int) -> None:
        self._host = host
        self._wanted_port = port
        self._server = _Server(
            uvicorn.Config(
                application,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._task: asyncio.Task[None] | None = None
        self.port = 0
        """The port listened on, once started."""

    async def start(self) -> None:
        """Listen and serve.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        listening = self._listen()
        self.port = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve([listening]), name="http")

    async def stop(self) -> None:
        """Take no new requests, let those that run end within two seconds."""
        if self._task is None:
            return
        self._server.should_exit = True
        await self._task
        self._task = None

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self._host, self._wanted_port))
        except OSError as error:
            listening.close()
            raise ConfigError(
                f"server.http_port: cannot listen on {self._host}:{self._wanted_port}: {error.strerror}; "
                "end what has it, or set another"
            ) from error
        return listening


class _Server(uvicorn.Server):
    """uvicorn takes SIGTERM for itself otherwise; here the service alone decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
