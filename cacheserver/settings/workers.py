"""What one of several workers is told, and the settings it has: directories of its own, and its share of all sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from cacheserver.machine import Room
from cacheserver.settings.schema import Settings

_DIRECTORY = "worker-"
_DRAINED = "drained"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Place:
    """Where our own S3 is."""

    bucket: str
    endpoint: str
    region: str
    access_key: str
    secret_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlace:
    """The place of a worker among `count`: it is told by its supervisor, which owns the servers and ports named here.

    `sockets` is the directory of the unix sockets by which they talk. One that is `leftover` serves nobody: its number
    is not in use any more, and it brings what its journal holds to the last tier and ends.
    """

    index: int
    count: int
    grpc_port: int
    http_port: int
    sockets: str
    config: str | None
    local_s3: bool
    redis_url: str | None
    s3: S3Place | None
    leftover: bool = False

    def dump(self) -> bytes:
        """As one line. It holds secrets: it goes through a pipe, never on a command line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def load(line: bytes) -> WorkerPlace:
        """What `dump` wrote."""
        told = json.loads(line)
        s3 = told.pop("s3")
        return WorkerPlace(**told, s3=None if s3 is None else S3Place(**s3))

    @property
    def socket(self) -> Path:
        """Where the worker answers its supervisor."""
        return Path(self.sockets) / f"{self.index}.sock"

    @property
    def supervisor_socket(self) -> Path:
        """Where the supervisor answers for all workers."""
        return Path(self.sockets) / "all.sock"


def for_worker(settings: Settings, place: WorkerPlace, *, room: Room | None) -> Settings:
    """The settings of the worker at `place`; `room` is the memory there is for all of them.

    The first has the directories of a service that is one process, so that one may become several and back.
    """
    count = place.count
    server, memory, journal, disk = settings.server, settings.memory, settings.journal, settings.disk
    changed: dict[str, Any] = {
        "data_dir": _own(settings.data_dir, place.index),
        "server": server.model_copy(
            update={
                "grpc_port": place.grpc_port,
                "http_port": place.http_port,
                "grpc_unix_socket": None if place.index else server.grpc_unix_socket,
                "download_memory_bytes": _share(server.download_memory_bytes, count),
            }
        ),
        "memory": memory.model_copy(update={"max_bytes": max(1, memory.sizes(room)[0] // count)}),
        "journal": journal.model_copy(
            update={"path": _own(journal.path, place.index), "max_bytes": _share(journal.max_bytes, count)}
        ),
        "disk": disk.model_copy(
            update={"path": _own(disk.path, place.index), "max_bytes": _share(disk.max_bytes, count)}
        ),
    }
    if settings.trace.path is not None and place.index:
        path = settings.trace.path
        changed["trace"] = settings.trace.model_copy(
            update={"path": path.with_name(f"{_name(place.index)}-{path.name}")}
        )
    if settings.delivery.url_secret is None is settings.delivery.url_secret_file:
        secret_file = settings.data_dir / "url-secret"
        changed["delivery"] = settings.delivery.model_copy(update={"url_secret_file": secret_file})
    if place.redis_url is not None:
        changed["redis"] = settings.redis.model_copy(update={"url": SecretStr(place.redis_url)})
    if (s3 := place.s3) is not None:
        keys = {"access_key": SecretStr(s3.access_key), "secret_key": SecretStr(s3.secret_key)}
        where = {"bucket": s3.bucket, "endpoint": s3.endpoint, "region": s3.region, "local": False}
        changed["s3"] = settings.s3.model_copy(update=where | keys)
    return settings.model_copy(update=changed)


def left_over(settings: Settings) -> list[int]:
    """The workers that there were before there were fewer, and whose journals nobody has drained since. Reads disk."""
    if not settings.has_journal:
        return []
    found = (each.name.removeprefix(_DIRECTORY) for each in settings.data_dir.glob(f"{_DIRECTORY}*"))
    numbers = sorted(int(name) for name in found if name.isdecimal())
    return [
        number
        for number in numbers
        if number >= settings.server.workers and not (_own(settings.data_dir, number) / _DRAINED).exists()
    ]


def note_drained(data_dir: Path, *, is_drained: bool) -> None:
    """Note in the directory of a worker whether everything in it has been brought to the last tier. Raises OSError."""
    if is_drained:
        (data_dir / _DRAINED).touch()
    else:
        (data_dir / _DRAINED).unlink(missing_ok=True)


_Directory = TypeVar("_Directory", Path, Path | None)


def _own(directory: _Directory, index: int) -> _Directory:
    return directory if directory is None or not index else directory / _name(index)


def _name(index: int) -> str:
    return f"{_DIRECTORY}{index}"


def _share(size_bytes: int | None, count: int) -> int | None:
    return None if size_bytes is None else max(1, size_bytes // count)
