"""Clients of Redis: alone, behind Sentinel or a Cluster. A connection that breaks costs no call but those it was on."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode, ClusterPipeline
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import (
    RedisClusterException,
    RedisError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from cacheserver.tiers.redis_values import ValueInlet

Client = Redis | RedisCluster

_ConnectionT = TypeVar("_ConnectionT", bound=AbstractConnection)

URL_FORMS = (
    "redis://host:port/db, rediss://host:port/db, unix:///path?db=0, "
    "redis+sentinel://host:port,host:port/service/db, redis+cluster://host:port,host:port"
)
"""The addresses `connect` understands; rediss+sentinel and rediss+cluster are the same over TLS."""


def connect(url: str, *, timeout_s: float = 0.25, connect_timeout_s: float = 0.25, max_connections: int = 64) -> Client:
    """A client for any of URL_FORMS that gives up instead of hanging; nothing is sent yet.

    A connection that turns out to be stale is replaced and the command sent once more; what timed out is not
    sent again. Options of redis-py may follow as a query (`?ssl_ca_certs=/path`), for the sentinels themselves
    `sentinel_username` and `sentinel_password`. Close the client with `disconnect`.

    Args:
        url: the address. Its user and password are the data nodes'.
        timeout_s: how long sending a command, or reading its answer, may take.
        connect_timeout_s: how long connecting may take.
        max_connections: most connections to one node; whoever asks for one more gets an error, in a Cluster waits.

    Raises:
        ValueError: the URL cannot be used. The message does not show it: it may hold a password.
    """
    limits: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": connect_timeout_s,
        # With RESP3 a server may ask redis-py to be more patient than we want.
        "protocol": 2,
        # Each connection would look for redis-py's version on the disk, and many are made at a time.
        "driver_info": DriverInfo(),
        # redis-py's own policy retries for seconds, and timeouts too.
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }
    try:
        return _with_alert_connections(_client(url, limits, max_connections))
    except (ValueError, TypeError, RedisError):
        # Not chained: urllib and redis-py quote the part they cannot read, which may be the password.
        raise ValueError(
            f"not a Redis URL; the forms are {URL_FORMS}. In a password /, @, :, ? and # are percent-encoded."
        ) from None


async def disconnect(client: Client) -> None:
    """Close every connection of a client made by `connect`."""
    await client.aclose()
    if isinstance(client, RedisCluster):
        # It has closed nothing if it was about to ask for the nodes again.
        await client.nodes_manager.aclose()
        await client.nodes_manager.aclose("startup_nodes")
    if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


async def subscribed(client: Client, channel: str) -> PubSub:
    """What hears the messages of a channel. Close it."""
    pubsub: PubSub
    if isinstance(client, RedisCluster):
        await client.initialize()
        # Any node has what is published at another one; redis-py's own choice is by slots that it may not know yet.
        pubsub = client.pubsub(node=client.get_random_node(), ignore_subscribe_messages=True)
    else:
        pubsub = client.pubsub(ignore_subscribe_messages=True)
    try:
        await pubsub.subscribe(channel)
    except BaseException:
        await pubsub.aclose()  # type: ignore[no-untyped-call] # redis-py does not say
        raise
    return pubsub


def literally(text: str) -> str:
    """What matches this text in a pattern of Redis."""
    return re.sub(r"([*?\[\]\\^])", r"\\\1", text)


_GETRANGE = b"*4\r\n$8\r\nGETRANGE\r\n"
"""How the command begins that pictures are asked for with."""


class _AlertConnection(AbstractConnection):
    """What every connection is besides its own kind: one that notices that it was reset while nobody was reading.

    asyncio keeps a reset, or a keepalive that failed, for the next reader. redis-py looks for an end of the stream
    alone, takes such a connection for sound and writes; then the event loop raises what nobody expects of a network:
    uvloop a RuntimeError, asyncio of Python 3.13.0 an AttributeError. Nothing was written, so redis-py may repeat it.

    And what GETRANGE answers comes as a view into a buffer of its own, see `ValueInlet`. The methods by which that is
    done are redis-py's own: should a release of it read in another way, no value is expected and it reads as ever.
    """

    _inlet: ValueInlet | None = None
    _reads_here = False
    """Whether replies have been seen to be read through `_read_response_from_parser`."""

    async def can_read(self) -> bool:
        """Whether the pool must connect anew before it lends this; behind Sentinel, that asks for the master again."""
        return self._is_unfit() or await super().can_read()

    async def _send_packed_command(self, command: Iterable[bytes]) -> None:
        # A Cluster's nodes lend without a look, and a reset may come after one, or redis-py closes it meanwhile.
        if self._writer is None or self._is_unfit():
            raise ConnectionResetError("the connection was lost before")
        packed = [*command]
        if self._inlet is not None and self._reads_here and packed[0].startswith(_GETRANGE):
            self._inlet.expect()
        await super()._send_packed_command(packed)

    async def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - redis-py's
        """Greet the server, through our inlet already."""
        if self._reader is not None and self._writer is not None:
            self._inlet = ValueInlet.of(self._reader, self._writer.transport)
        await super().on_connect_check_health(check_health)

    async def _read_response_from_parser(self, *args: Any, **kwargs: Any) -> Any:
        self._reads_here = True
        value = None if self._inlet is None else await self._inlet.value()
        return await super()._read_response_from_parser(*args, **kwargs) if value is None else value

    def _is_unfit(self) -> bool:
        """Whether it was lost, or a reply is on its way that is nobody's."""
        if self._writer is not None and self._writer.transport.is_closing():
            return True
        return self._inlet is not None and self._inlet.is_owing


class _NodeConnection(_AlertConnection):
    """A connection to a Cluster's node, which is closed under no call but by that call itself.

    When one call fails, or the Cluster has changed, redis-py closes what other calls may have been lent by then, or are
    about to be; they would be lost, and take others with them. Such a connection is closed when it is given back.
    """

    _user: asyncio.Task[Any] | None = None
    """Who connects, sends or reads now. Between these nobody else has a turn of the loop."""

    async def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        """Connect and greet the server."""
        before, self._user = self._user, asyncio.current_task()
        try:
            await super().connect_check_health(*args, **kwargs)
        finally:
            self._user = before

    async def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        """Connect if need be, and send."""
        before, self._user = self._user, asyncio.current_task()
        try:
            if before is None and self.is_connected and await self.can_read():
                await self.disconnect()  # lost while idle; nothing is sent yet, so it may connect anew
            await super().send_packed_command(*args, **kwargs)
        finally:
            self._user = before

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """What the server answers next."""
        before, self._user = self._user, asyncio.current_task()
        try:
            return await super().read_response(*args, **kwargs)
        finally:
            self._user = before

    async def disconnect(self, nowait: bool = False, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002, FBT001, FBT002 - redis-py's
        if self._user in {None, asyncio.current_task()}:
            # Without a wait, after which redis-py would take for closed what has been connected anew meanwhile.
            await super().disconnect(True, *args, **kwargs)
        else:
            self.mark_for_reconnect()  # type: ignore[no-untyped-call]  # theirs


class _Cluster(RedisCluster):
    """A Cluster's client under many calls at once, and under failures. Make it with `reinitialize_steps=0`.

    It knows the nodes before the first call is sent: redis-py would send it to any node. Whoever would need one
    connection too many of a node waits. What redis-py raises unawares, being asked much at once, is a lost connection.
    """

    # What timed out may have been done.
    ERRORS_ALLOW_RETRY = tuple(e for e in RedisCluster.ERRORS_ALLOW_RETRY if e is not RedisTimeoutError)  # type: ignore[assignment]  # one fewer

    def __init__(self, *, max_connections: int, **options: Any) -> None:
        # A slot that has moved brings its calls to a node beyond the turns taken there.
        super().__init__(max_connections=2**31, **options)
        self._turns: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(max_connections))
        """By the node's name."""

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Raises nothing that talking to Redis may not raise."""
        try:
            if self.nodes_manager.default_node is None:
                await self.initialize()
            return await super().execute_command(*args, **kwargs)
        except _FORESEEN:
            raise
        except Exception as exc:
            raise _lost(self, exc) from exc

    async def _execute_command(self, target_node: ClusterNode, *args: Any, **kwargs: Any) -> Any:
        async with self._turns[target_node.name]:
            return await super()._execute_command(target_node, *args, **kwargs)

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> ClusterPipeline:
        if shard_hint:
            raise RedisClusterException("shard_hint is deprecated in cluster mode")
        return _ClusterPipeline(self, transaction)  # type: ignore[abstract]  # as redis-py's own is to mypy


class _ClusterPipeline(ClusterPipeline):
    async def execute(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Raises nothing that talking to Redis may not raise."""
        try:
            return await super().execute(*args, **kwargs)
        except _FORESEEN:
            raise
        except Exception as exc:
            raise _lost(self.cluster_client, exc) from exc


_FORESEEN = (RedisError, RedisClusterException, OSError)


def _lost(client: RedisCluster, exc: Exception) -> RedisConnectionError:
    """What a call failed of that redis-py did not expect; the client asks for the nodes again, which may be why."""
    client._initialize = True  # noqa: SLF001 - as redis-py does when a connection is lost
    return RedisConnectionError(f"redis-py failed: {type(exc).__name__}")


def _with_alert_connections(client: Client) -> Client:
    """`client`, which has no connection yet and will make none that is not alert."""
    if isinstance(client, RedisCluster):
        kind = _alert(client.connection_kwargs["connection_class"], _NodeConnection)
        client.connection_kwargs["connection_class"] = kind  # for the nodes it will find
        for node in client.startup_nodes:
            node.connection_class = kind
        return client
    pools = [client.connection_pool]
    if isinstance(client.connection_pool, SentinelConnectionPool):
        pools += [sentinel.connection_pool for sentinel in client.connection_pool.sentinel_manager.sentinels]
    for pool in pools:
        pool.connection_class = _alert(pool.connection_class)
    return client


def _alert(kind: type[_ConnectionT], how: type[Any] = _AlertConnection) -> type[_ConnectionT]:
    return type(kind.__name__, (how, kind), {})


def _client(url: str, limits: dict[str, Any], max_connections: int) -> Client:
    scheme, _, rest = url.partition("://")
    parts = urlsplit(f"//{rest}")
    if scheme in {"redis", "rediss", "unix"}:
        return _single(url, {**limits, "max_connections": max_connections})
    user, _, hosts = parts.netloc.rpartition("@")
    # The query has redis-py's options; it knows their types, and how a user and password are spelled.
    options = {**parse_url(f"redis://{user}@host/?{parts.query}"), **limits, "max_connections": max_connections}
    del options["host"]
    if scheme.startswith("rediss+"):
        options["ssl"] = True
    if scheme in {"redis+sentinel", "rediss+sentinel"}:
        return _sentinel(_addresses(hosts, 26_379), parts.path, limits, options)
    if scheme in {"redis+cluster", "rediss+cluster"} and parts.path in {"", "/"}:
        # After some answers that a slot has moved redis-py would close every connection, whoever waits for an answer.
        options["reinitialize_steps"] = 0
        return _Cluster(startup_nodes=[ClusterNode(*address) for address in _addresses(hosts, 6_379)], **options)
    raise ValueError("no such scheme")


def _single(url: str, options: dict[str, Any]) -> Client:
    parts = urlsplit(url)
    # redis-py passes over a missing path and a database that is not a number.
    form = r"/.+" if parts.scheme == "unix" else r"/?[0-9]*"
    if not re.fullmatch(form, parts.path):
        raise ValueError("no such path or database")
    return _checked(Redis.from_pool(ConnectionPool(**{**parse_url(url), **options})))


def _sentinel(addresses: list[tuple[str, int]], path: str, limits: dict[str, Any], options: dict[str, Any]) -> Client:
    match = re.fullmatch(r"/([^/]+)(?:/([0-9]+))?", path)
    if match is None:
        raise ValueError("no service")
    service, db = match.groups(default="0")
    sentinel_options = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    sentinel_options |= {**limits, "ssl": options.get("ssl", False)}
    sentinel = Sentinel(addresses, sentinel_kwargs=sentinel_options, **options)  # type: ignore[no-untyped-call]  # theirs
    return _checked(sentinel.master_for(service, db=int(db)))


def _checked(client: Redis) -> Redis:
    """`client`, once a connection that will not be used has refused the options it does not know."""
    pool = client.connection_pool
    pool.connection_class(**pool.connection_kwargs)
    return client


def _addresses(hosts: str, default_port: int) -> list[tuple[str, int]]:
    parts = [urlsplit(f"//{host}") for host in hosts.split(",")]
    if not all(part.hostname for part in parts):
        raise ValueError("no host")
    return [(str(part.hostname), part.port or default_port) for part in parts]
