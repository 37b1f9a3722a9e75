"""A real S3 server on this machine: SeaweedFS, for trying the whole stack, for tests and for benches."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sysconfig
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from cacheserver.embedded.child import Program, SocketDirectory, SupervisedChild, free_ports, is_free
from cacheserver.embedded.lock import DirectoryLock
from cacheserver.errors import ConfigError
from cacheserver.interfaces import Clock

PORTS = 10
"""How many ports the server listens on: the S3 port first, the filer's HTTP port seventh."""

BUCKET = "images"
REGION = "us-east-1"

_FILER = 6
_LONGEST_SOCKET = "filer.sock"
_GO_MEMORY = {"GOMEMLIMIT": "200MiB", "GOGC": "50"}  # a third of the memory for some more CPU per PUT
_READY_TIMEOUT_S = 1.0
_STOP_TIMEOUT_S = 3.0  # now and then it hangs in its own shutdown; what it acknowledged survives SIGKILL


@dataclass(frozen=True, slots=True)
class _Account:
    """What stays the same from start to start, so that URLs handed out stay good."""

    access_key: str
    secret_key: str
    ports: list[int]


class LocalS3:
    """Our S3 server, with its data in `data_dir`/s3: one bucket, one account, loopback only, no telemetry.

    Its other ports (master, volume, filer) ask for no credentials, as SeaweedFS has it: for a machine whose
    users trust each other.
    """

    def __init__(self, *, data_dir: Path, clock: Clock) -> None:
        self._directory = data_dir.absolute() / "s3"
        self._clock = clock
        self._account: _Account | None = None
        self._child: SupervisedChild | None = None
        self._to_undo = AsyncExitStack()

    @property
    def endpoint(self) -> str:
        """The URL it answers at. Known once started, like all that follows."""
        return f"http://127.0.0.1:{self._started.ports[0]}"

    @property
    def bucket(self) -> str:
        """The bucket; it exists."""
        return BUCKET

    @property
    def region(self) -> str:
        """The region to sign for."""
        return REGION

    @property
    def access_key(self) -> str:
        """The account's name."""
        return self._started.access_key

    @property
    def secret_key(self) -> str:
        """The account's secret, made at the first start."""
        return self._started.secret_key

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Run it and return when objects can be written and read.

        Raises:
            ConfigError: it is not installed, cannot start, or `data_dir` cannot be written or is used by another
                service.
        """
        binary = weed_binary()
        if binary is None:
            raise ConfigError("--local-s3: SeaweedFS is not installed; install cacheserver[local-s3]")
        async with AsyncExitStack() as undo:
            lock = await DirectoryLock.acquire(self._directory, clock=self._clock)
            undo.callback(lock.release)
            sockets = SocketDirectory(self._directory, _LONGEST_SOCKET)
            undo.callback(sockets.remove)
            self._account = _load_account(self._directory / "account.json")
            _write_private(self._directory / "s3.json", identities(self.access_key, self.secret_key))
            self._child = SupervisedChild(
                self._program(binary, sockets.path), lock_fd=lock.fd, is_ready=self._stores, clock=self._clock
            )
            await self._child.start()
            undo.push_async_callback(self._child.stop)
            self._to_undo = undo.pop_all()

    async def stop(self) -> None:
        """End it with everything on disk. May be called again, and when it never started."""
        await self._to_undo.aclose()

    def _program(self, binary: Path, socket_dir: Path) -> Program:
        return Program(
            name="local S3 (SeaweedFS)",
            argv=weed_command(
                binary=binary,
                data_dir=self._directory,
                socket_dir=socket_dir,
                ports=self._started.ports,
                bucket=BUCKET,
            ),
            log_file=self._directory / "weed.log",
            environment={"HOME": str(self._directory), **_GO_MEMORY},
            stop_timeout_s=_STOP_TIMEOUT_S,
        )

    @property
    def _started(self) -> _Account:
        if self._account is None:
            raise RuntimeError("the local S3 server is not started")
        return self._account

    async def _stores(self) -> bool:
        """Whether a write reaches a volume, the bucket exists and the S3 port asks for credentials.

        An open port is not enough: writes fail for most of a second after it opens.
        """
        filer = f"http://127.0.0.1:{self._started.ports[_FILER]}"
        try:
            async with httpx.AsyncClient(timeout=_READY_TIMEOUT_S, trust_env=False) as http:
                written = await http.put(f"{filer}/cacheserver-ready", content=b"yes")
                bucket = await http.head(f"{filer}/buckets/{BUCKET}/")
                anonymous = await http.get(f"{self.endpoint}/{BUCKET}")
        except httpx.HTTPError:
            return False
        return written.is_success and bucket.is_success and anonymous.status_code == httpx.codes.FORBIDDEN


def weed_binary() -> Path | None:
    """The `weed` program of the extra `local-s3`, or one on the PATH; None where there is neither."""
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    return Path(found) if found else None


def weed_command(*, binary: Path, data_dir: Path, socket_dir: Path, ports: Sequence[int], bucket: str) -> list[str]:
    """The command that serves `data_dir` as S3 on 127.0.0.1, to the `identities` in its s3.json."""
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc, admin, admin_grpc = ports
    return [
        str(binary),
        "-logtostderr=true",
        "mini",
        f"-dir={data_dir}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-master.resumeState=false",  # resuming, every other start waits five seconds for the volumes
        f"-s3.port={s3}",
        f"-s3.port.grpc={s3_grpc}",
        f"-master.port={master}",
        f"-master.port.grpc={master_grpc}",
        f"-volume.port={volume}",
        f"-volume.port.grpc={volume_grpc}",
        f"-filer.port={filer}",
        f"-filer.port.grpc={filer_grpc}",
        f"-admin.port={admin}",  # listened on even without the page
        f"-admin.port.grpc={admin_grpc}",
        "-admin.ui=false",
        "-volume.preStopSeconds=0",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={socket_dir / 's3.sock'}",
        f"-filer.localSocket={socket_dir / 'filer.sock'}",
        f"-s3.config={data_dir / 's3.json'}",
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
        f"-bucket={bucket}",
    ]


def identities(access_key: str, secret_key: str) -> str:
    """The content of s3.json: one account that may do everything."""
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    return json.dumps({"identities": [{"name": "cacheserver", "credentials": credentials, "actions": ["Admin"]}]})


def _load_account(file: Path) -> _Account:
    if file.exists():
        account = _Account(**json.loads(file.read_text()))
        if all(is_free(port) for port in account.ports):
            return account
        account = _Account(account.access_key, account.secret_key, free_ports(PORTS))
    else:
        account = _Account(secrets.token_hex(10), secrets.token_urlsafe(30), free_ports(PORTS))
    _write_private(file, json.dumps(asdict(account)))
    return account


def _write_private(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as opened:
        opened.write(text)
    new.replace(file)
