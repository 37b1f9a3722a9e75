"""The gRPC server: where it listens, TLS, health, reflection, and how it stops."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cacheserver.errors import ConfigError
from cacheserver.model import TierName
from cacheserver.rpc.service import SERVICE_NAME, PromptCacheService

MAX_RECEIVE_BYTES = 24 * 1024 * 1024
"""Largest message taken unless set otherwise: a full FindCached. grpc itself refuses larger ones unread."""

SERVER_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    # Callers may ping every 20 s, also between calls; the bound is half of it because clocks and networks jitter.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # A caller that vanished without a word is noticed within 80 s, not after the two hours of the default.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # How many calls there may be is ours to say, and what is too much hears why. By default grpc cancels, without a
    # word to us, calls it could not hand over within 30 s, and those above 1,000 at once.
    ("grpc.server_max_unrequested_time_in_server", 3_600),
    ("grpc.server.max_pending_requests", 1_000_000),
    ("grpc.server.max_pending_requests_hard_limit", 1_000_000),
)

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_WATCHERS_GRACE_S = 0.25
_FOR_EVER_S = 1e9


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen: a TCP address, a unix socket, or both. Port 0 is any free one.

    A second process on the port is an error we want to hear of, unless the port `is_shared`: then it has a share of the
    connections.
    """

    host: str = "127.0.0.1"
    port: int | None = 50051
    unix_socket: Path | None = None
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    """Who signs callers' certificates, without which nobody is let in; None: no caller is asked for one."""
    is_shared: bool = False


class RpcService(Protocol):
    """The rpcs of one service."""

    @property
    def name(self) -> str:
        """Its full name, as "promptcache.admin.v1alpha1.AdminService"."""
        ...

    def handler(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server needs to serve it."""
        ...

    async def idle(self) -> None:
        """Return when every call that has begun is answered."""
        ...


class RpcServer:
    """Serves the rpcs, with health and reflection, which need no token."""

    def __init__(  # noqa: PLR0913 - what it is made of, by keyword
        self,
        service: PromptCacheService,
        *,
        listen: Listen,
        tiers: Iterable[TierName],
        further: Iterable[RpcService] = (),
        max_receive_bytes: int = MAX_RECEIVE_BYTES,
        max_connection_age_s: float | None = None,
    ) -> None:
        """`tiers` get a health name of their own, as "tier.redis"; `further` services are served beside `service`.

        A connection of `max_connection_age_s` takes no new calls, so that its caller connects anew; None: for ever.
        """
        further = tuple(further)
        self._services: tuple[PromptCacheService | RpcService, ...] = (service, *further)
        self._names = (SERVICE_NAME, *(each.name for each in further))
        self._max_receive_bytes = max_receive_bytes
        self._max_connection_age_s = max_connection_age_s
        self._listen = listen
        self._tiers = tuple(tiers)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.port = 0
        """The TCP port listened on, once started; 0 without one."""

    async def start(self) -> None:
        """Listen and serve.

        Raises:
            ConfigError: an address cannot be listened on, or the certificate cannot be used.
        """
        credentials = await asyncio.to_thread(_credentials, self._listen)
        await asyncio.to_thread(_try_address, self._listen)
        received = ("grpc.max_receive_message_length", self._max_receive_bytes)
        options = [*SERVER_OPTIONS, ("grpc.so_reuseport", int(self._listen.is_shared)), received]
        if self._max_connection_age_s is not None:
            # Without a grace of its own grpc lets calls that run on an aged connection end, however long they take: a
            # generation takes minutes, a warm-up hours.
            options.append(("grpc.max_connection_age_ms", round(self._max_connection_age_s * 1000)))
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers([service.handler() for service in self._services])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, cast("grpc.aio.Server", _Unregistered(server)))
        _add_reflection(server, self._names)
        self._bind(server, credentials)
        for name in self._names:
            await self._set_health(name, is_well=True)
        for tier in self._tiers:
            await self.set_tier_health(tier, is_well=True)
        await server.start()
        self._server = server

    async def set_tier_health(self, tier: TierName, *, is_well: bool) -> None:
        """Say whether a tier answers, under its own name. The service is well without it."""
        await self._set_health(f"tier.{tier}", is_well=is_well)

    async def drain(self, timeout_s: float) -> None:
        """Say NOT_SERVING, take no new calls, let those that run end within `timeout_s`, then end them.

        Health watches never end by themselves: once our own calls are answered, nothing waits for them.
        """
        server, self._server = self._server, None
        if server is None:
            return
        # grpc's own grace must not run out beside the second stop: it would then cancel the calls of a server that the
        # other has just freed, and take the process along.
        stopping = asyncio.create_task(server.stop(_FOR_EVER_S), name="rpc_drain")
        try:
            async with asyncio.timeout(timeout_s):
                await self._health.enter_graceful_shutdown()
                await asyncio.wait({stopping}, timeout=_WATCHERS_GRACE_S)
                for service in self._services:
                    await service.idle()
        except TimeoutError:
            pass  # what is left is ended below
        finally:
            ending = asyncio.gather(stopping, server.stop(None))
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                await ending  # all calls are cancelled by now: it is a matter of moments
                raise

    def _bind(self, server: grpc.aio.Server, credentials: grpc.ServerCredentials | None) -> None:
        listen = self._listen
        if listen.unix_socket is not None:
            _add_unix_socket(server, listen.unix_socket)
        if listen.port is not None:
            host = f"[{listen.host}]" if ":" in listen.host else listen.host
            self.port = _add_port(server, f"{host}:{listen.port}", credentials)

    async def _set_health(self, name: str, *, is_well: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        await self._health.set(name, statuses.SERVING if is_well else statuses.NOT_SERVING)


def _add_unix_socket(server: grpc.aio.Server, path: Path) -> None:
    """Listen on a unix socket that only this user can open, in place of one that a dead process left."""
    if _is_listened_on(path):  # grpc would take its place without a word
        raise ConfigError(f"server.grpc_unix_socket: another process listens on {path}; stop it, or name another path")
    umask = os.umask(0o077)  # a mode given afterwards would leave a moment in which anybody could connect
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ConfigError(
            f"server.grpc_unix_socket: cannot listen on {path}; name a path of at most 107 characters in a directory "
            "that this user may write, where no other file is"
        ) from error
    finally:
        os.umask(umask)


def _is_listened_on(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # by one that is slow to accept
        except OSError:
            return False
        return True


def _add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"server.grpc_port: cannot listen on {address}; end what has it, or set another") from error


def _try_address(listen: Listen) -> None:
    """Bind the TCP address for a moment: grpc tells why it cannot only to standard error, in words of its own."""
    if listen.port is None:
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if listen.is_shared else socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        is_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        raise ConfigError(
            f"server.{'grpc_host' if is_host else 'grpc_port'}: cannot listen on {listen.host}:{listen.port}: "
            f"{error.strerror}; {'name an address of this machine' if is_host else 'end what has it, or set another'}"
        ) from error


def _credentials(listen: Listen) -> grpc.ServerCredentials | None:
    """TLS by certificate and key file, None without. Reads files."""
    cert, key = listen.tls_cert_file, listen.tls_key_file
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("server.tls_cert_file and server.tls_key_file: set both or none")
    try:
        # grpc says nothing about a file it cannot use; ssl names what is wrong. Without a password of its own it
        # would ask the terminal for that of an encrypted key, which grpc cannot read anyway.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=bytes)
        pair, authorities = (key.read_bytes(), cert.read_bytes()), _client_authorities(listen.tls_client_ca_file)
        return grpc.ssl_server_credentials([pair], authorities, require_client_auth=authorities is not None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"server.tls_cert_file, server.tls_key_file: {cert} and {key} are no PEM certificate chain and its private "
            f"key without a password: {error}"
        ) from error


def _client_authorities(file: Path | None) -> bytes | None:
    """The certificates in this file, None without. Raises ConfigError for one that has none."""
    if file is None:
        return None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_verify_locations(file)
        return file.read_bytes()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"server.tls_client_ca_file: {file} holds no PEM certificates: {error}") from error


class _Unregistered:
    """A server to which generated code adds handlers, but for registering each of their methods.

    grpc.aio waits for the next call of every method that is registered, and begins anew with all of them at each call
    of any: those of the health service alone made a thirtieth of a hit.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Nothing: they are among the generic ones too."""


def _add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Reflection under both of its names: v1 has the messages of v1alpha, field by field."""
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME, _REFLECTION_V1)
    servicer = reflection.aio.ReflectionServicer(names)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (reflection.SERVICE_NAME, _REFLECTION_V1):
        handler = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handler,))
