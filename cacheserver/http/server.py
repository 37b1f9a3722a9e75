"""The HTTP server: uvicorn inside the service's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cacheserver.calls.call import request_id_of
from cacheserver.errors import ConfigError, OverloadedError, ShuttingDownError
from cacheserver.http.status import HttpError, status_of

_LAST_S = 2
"""For calls whose connection was ended to notice it."""

_BACKLOG = 2_048


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a connection may take, in seconds, how many bytes the head of a request, and how many there may be.

    `head_s` for the head of a request to come whole, and its body to begin; `stalled_s` for a client to take a little
    more of its answer; `idle_s` between an answer and the next request; `grace_s` for what runs when the server stops.
    """

    head_s: float = 30.0
    stalled_s: float = 60.0
    idle_s: float = 75.0
    grace_s: float = 2.0
    max_head_bytes: int = 64 * 1024
    max_connections: int = 16_384


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
    ) -> None:
        self._host = host
        self._wanted_port = port
        self._tls_files = tls_cert_file, tls_key_file
        bounds = bounds or Bounds()
        self._server = _Server(
            uvicorn.Config(
                application,
                http=_protocol(bounds),
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
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
            if isinstance(connection, _Connection):
                connection.end()


def _protocol(bounds: Bounds) -> type[asyncio.Protocol]:
    """The protocol for connections that are only waited for so long."""

    class Bounded(_Connection):
        allowed = bounds

    return Bounded


class _HeadWithBody:
    """A transport that sends the head of an answer together with what follows it: in one packet where that is small.

    uvicorn writes them one by one, each of which wakes the client: a fifth of what a hit of 100 KB costs.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None

    def write(self, data: bytes | memoryview) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.writelines((head, data))
        elif data[:5] == b"HTTP/":
            self._head = bytes(data)
            self._loop.call_soon(self._flush)  # no body, or one that is still to be made
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Connection(HttpToolsProtocol):
    """A connection that cannot be held by saying little, sending slowly or reading nothing, as uvicorn's can.

    uvicorn bounds only the time between an answer and the next request. What is malformed is answered in the shape of
    every error.
    """

    allowed: Bounds

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._is_in_head = True
        self._waiting: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(_HeadWithBody(transport, self.loop))  # type: ignore[arg-type]  # all it uses of one
        if len(self.connections) > self.allowed.max_connections:
            self.app = _turn_away
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_longer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > self.allowed.max_head_bytes and not self.transport.is_closing():
            text = f"The head of the request is larger than {self.allowed.max_head_bytes:,} bytes."
            self._refuse(HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text))
        elif not self._is_answering and self.timeout_keep_alive_task is None and self._waiting is None:
            self._wait()  # for more than blank lines

    def on_message_begin(self) -> None:
        self._is_in_head, self._head_bytes = True, 0
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._wait_no_longer()  # whoever reads it sees to it that it comes to an end
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._wait_no_longer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body:  # answered before its body was read, which may go on for ever
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.allowed.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HttpError(HTTPStatus.BAD_REQUEST, msg))

    def end(self) -> None:
        """Wait for its answer no more; a client that has heard nothing yet is told that it may ask another replica."""
        if self._is_answering and not self.cycle.response_started:
            self._refuse(ShuttingDownError("The service is shutting down; try another replica."))
        else:
            self.transport.abort()

    def _refuse(self, error: Exception) -> None:
        """Answer with an error, and close: nobody knows where the next request would begin, if there is to be one."""
        request_id = secrets.token_hex(16)
        told = status_of(error, request_id=request_id)
        body = json.dumps({"error": told.error})
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "cache-control": "no-store",
            "x-request-id": request_id,
            **told.headers,
            "connection": "close",
        }
        lines = [
            f"HTTP/1.1 {told.status.value} {told.status.phrase}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.transport.write("\r\n".join([*lines, "", body]).encode("ascii"))
        self.transport.close()

    def _wait(self) -> None:
        self._wait_no_longer()
        self._waiting = self.loop.call_later(self.allowed.head_s, self._wait_is_over)

    def _wait_no_longer(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_is_over(self) -> None:
        if self._is_answering and not self.cycle.more_body:
            self._wait()  # the answer before it is still on its way
        else:
            self.transport.abort()


async def _turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of connections that are too many."""
    request_id = request_id_of(Headers(scope=scope))
    error = OverloadedError("There are too many connections; try again.")
    answer = status_of(error, request_id=request_id).answer()
    answer.headers |= {"x-request-id": request_id, "connection": "close"}
    await answer(scope, receive, send)
