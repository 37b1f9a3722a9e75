"""The HTTP server: uvicorn inside the service's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from cacheserver.calls.downloads import DownloadMemory
from cacheserver.errors import ConfigError
from cacheserver.http.connection import Bounds, Connection, protocol
from cacheserver.http.ready import FindQuestions, no_questions

_LAST_S = 2
"""For calls whose connection was ended to notice it."""

_BACKLOG = 2_048


class HttpServer:
    """Serves an application on one address. Port 0 is any free one."""

    def __init__(  # noqa: PLR0913 - where and how it listens, by keyword
        self,
        application: ASGIApp,
        *,
        host: str,
        port: int,
        tls_cert_file: Path | None = None,
        tls_key_file: Path | None = None,
        bounds: Bounds | None = None,
        find_questions: FindQuestions | None = None,
        downloads: DownloadMemory | None = None,
        is_shared: bool = False,
    ) -> None:
        """`find_questions` finds those whose answers the application may have ready; they count into `downloads`.

        A port that `is_shared` may be listened on by other processes too, each of which has a share of the connections.
        """
        self._host = host
        self._wanted_port = port
        self._is_shared = is_shared
        self._tls_files = tls_cert_file, tls_key_file
        bounds = bounds or Bounds()
        downloads = downloads or DownloadMemory(sys.maxsize)
        self._server = _Server(
            uvicorn.Config(
                application,
                http=protocol(bounds, find_questions or no_questions, downloads),
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                reset_contextvars=True,  # a call that was pipelined behind another would log that one's ids
                timeout_keep_alive=bounds.idle_s,  # type: ignore[arg-type]  # it goes to call_later
                timeout_graceful_shutdown=bounds.grace_s + _LAST_S,  # type: ignore[arg-type]  # it goes to wait_for
            ),
            grace_s=bounds.grace_s,
        )
        self._task: asyncio.Task[None] | None = None
        self.port = 0
        """The port listened on, once started."""

    async def start(self) -> None:
        """Listen and serve.

        Raises:
            ConfigError: the address cannot be listened on, or the certificate cannot be used.
        """
        await asyncio.to_thread(self._use_certificate)
        listening = self._listen()
        self.port = listening.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve([listening]), name="http")

    async def stop(self) -> None:
        """Take no new requests, let those that run end within `Bounds.grace_s`, then end them."""
        if self._task is None:
            return
        self._server.should_exit = True
        await self._task
        self._task = None

    def _use_certificate(self) -> None:
        cert, key = self._tls_files
        if cert is None and key is None:
            return
        if cert is None or key is None:
            raise ConfigError("server.http_tls_cert_file and server.http_tls_key_file: set both or none")
        try:
            # Without a password of its own it would ask the terminal for that of an encrypted key.
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=bytes)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"server.http_tls_cert_file, server.http_tls_key_file: {cert} and {key} are no PEM certificate chain "
                f"and its private key without a password: {error}"
            ) from error
        self._server.config.ssl_certfile, self._server.config.ssl_keyfile = str(cert), str(key)

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._is_shared:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listening.bind((self._host, self._wanted_port))
            listening.listen(_BACKLOG)  # who connects from now on is served once the loop comes to it
        except OSError as error:
            listening.close()
            raise ConfigError(
                f"server.http_port: cannot listen on {self._host}:{self._wanted_port}: {error.strerror}; "
                "end what has it, or set another"
            ) from error
        return listening


class _Server(uvicorn.Server):
    """uvicorn takes SIGTERM for itself otherwise; here the service alone decides what a signal means.

    uvicorn ends calls by cancelling them, which it tells their clients as a failure of ours, and the log as a bug.
    """

    def __init__(self, config: uvicorn.Config, *, grace_s: float) -> None:
        super().__init__(config)
        self._grace_s = grace_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().call_later(self._grace_s, self._end_connections)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def _end_connections(self) -> None:
        for connection in [*self.server_state.connections]:
            if isinstance(connection, Connection):
                connection.end()
