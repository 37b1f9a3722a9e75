"""What memory there is, and how much is in use: of the container where that has a limit, else of the machine.

Read from Linux's /proc and from control groups, as they are documented: cgroup v2 in the kernel's
admin-guide/cgroup-v2.rst (memory.max, .high, .current, .stat), v1 in admin-guide/cgroup-v1/memory.rst.
Elsewhere nothing of this is known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

_KIB = 1024

_ROOT, _POINT = 3, 4
"""Of the fields of a line of mountinfo: what is mounted, and where."""


@dataclass(frozen=True, slots=True)
class Room:
    """The memory there is for this process and whatever shares it.

    `limit_bytes` may not be exceeded, or only at a crawl (memory.high); `is_container` says whether a control group
    sets it, or only the machine ends there. `used_bytes` reads how much of it is in use that nobody can simply drop:
    without cached files.
    """

    limit_bytes: int
    is_container: bool
    used_bytes: Callable[[], int]


class Machine:
    """The machine this process runs on. Every call reads anew, from files that never wait for a device.

    Args:
        proc: where the process file system is.
        root: what paths of mounted control groups begin with.
    """

    def __init__(self, proc: Path = Path("/proc"), root: Path = Path("/")) -> None:
        self._proc = proc
        self._root = root

    def resident_bytes(self) -> int | None:
        """How much of this process is in memory; None where that cannot be told."""
        try:
            pages = int((self._proc / "self" / "statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")

    def room(self) -> Room | None:
        """The narrowest limit there is: of the control groups this process is in, nested ones included, or all memory.

        A group's limit above what the machine has is none, nor is one under which nothing could run. None where nothing
        can be told.
        """
        total_bytes = self._meminfo("MemTotal")
        if total_bytes is None:
            return None
        rooms = [room for room in self._group_rooms() if 0 < room.limit_bytes < total_bytes]
        whole = Room(total_bytes, is_container=False, used_bytes=self._used_bytes)
        return min(rooms, key=lambda room: room.limit_bytes, default=whole)

    def _used_bytes(self) -> int:
        total_bytes, available_bytes = self._meminfo("MemTotal"), self._meminfo("MemAvailable")
        if total_bytes is None or available_bytes is None:
            raise OSError("the process file system does not tell how much memory is available")
        return total_bytes - available_bytes

    def _meminfo(self, name: str) -> int | None:
        with suppress(OSError, ValueError):
            for line in (self._proc / "meminfo").read_text().splitlines():
                found, _, value = line.partition(":")
                if found == name:
                    return int(value.split()[0]) * _KIB
        return None

    def _group_rooms(self) -> Iterator[Room]:
        """The limits of the control groups we are in, of both versions: a machine may have both."""
        for mount, is_v2 in self._mounts():
            version = _V2 if is_v2 else _V1
            for group, limit in product(self._groups(mount, is_v2=is_v2), version.limits):
                with suppress(OSError, ValueError):  # the topmost has no such file, and where it says "max" is no limit
                    limit_bytes = int((group / limit).read_text())
                    yield Room(limit_bytes, is_container=True, used_bytes=_GroupUse(group, version))

    def _mounts(self) -> Iterator[tuple[_Mount, bool]]:
        """Where control groups of memory are mounted, and whether they are of version 2."""
        with suppress(OSError):
            for line in (self._proc / "self" / "mountinfo").read_text().splitlines():
                about, _, kind = line.partition(" - ")
                fields, kinds = about.split(), kind.split()
                is_v2 = kinds[:1] == ["cgroup2"]
                is_of_memory = is_v2 or (kinds[:1] == ["cgroup"] and "memory" in kinds[-1].split(","))
                if is_of_memory and len(fields) > _POINT:
                    yield _Mount(root=fields[_ROOT], point=self._root / fields[_POINT].lstrip("/")), is_v2

    def _groups(self, mount: _Mount, *, is_v2: bool) -> Iterator[Path]:
        """The directory of the group we are in, and those above it."""
        group = mount.point
        with suppress(OSError, ValueError):
            for line in (self._proc / "self" / "cgroup").read_text().splitlines():
                number, controllers, path = line.split(":", 2)
                if (number == "0") if is_v2 else ("memory" in controllers.split(",")):
                    group = mount.directory(path)
        yield group
        while group != mount.point:
            group = group.parent
            yield group


@dataclass(frozen=True, slots=True)
class _Mount:
    """Control groups as they are mounted: those from `root` on, at `point`."""

    root: str
    point: Path

    def directory(self, path: str) -> Path:
        """Where the group `path` is. In a container that sees no other groups, its own is all that is mounted."""
        below = path.removeprefix(self.root.rstrip("/"))
        directory = self.point / below.lstrip("/")
        return directory if ".." not in directory.parts and directory.is_dir() else self.point


@dataclass(frozen=True, slots=True)
class _Version:
    """The files of a version of control groups, and of memory.stat what the kernel can drop when it needs room."""

    limits: tuple[str, ...]
    use: str
    droppable: frozenset[str]


_V1 = _Version(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", frozenset({"total_inactive_file", "total_active_file"})
)
_V2 = _Version(
    ("memory.max", "memory.high"), "memory.current", frozenset({"inactive_file", "active_file", "slab_reclaimable"})
)


@dataclass(frozen=True, slots=True)
class _GroupUse:
    """Reads how much a group has in use."""

    group: Path
    version: _Version

    def __call__(self) -> int:
        use_bytes = int((self.group / self.version.use).read_text())
        stats = (line.split() for line in (self.group / "memory.stat").read_text().splitlines())
        return use_bytes - sum(int(value) for name, value in stats if name in self.version.droppable)
