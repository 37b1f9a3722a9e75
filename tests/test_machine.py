"""How much memory there is: read from control groups of either version, nested or seen from inside a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cacheserver.machine import Machine

GIB = 1024**3
UNLIMITED_V1 = 9_223_372_036_854_771_712
MEMINFO = (
    "MemTotal:       16777216 kB\nMemFree:          1000000 kB\nMemAvailable:   12582912 kB\nHugePages_Total:  0\n"
)
V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
OTHER_MOUNTS = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"


class FakeSystem:
    """The files of /proc and /sys/fs/cgroup that tell of memory, in a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.write("proc/meminfo", MEMINFO)

    @property
    def machine(self) -> Machine:
        return Machine(self._root / "proc", self._root)

    def write(self, name: str, text: str) -> None:
        file = self._root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v2(self, group: str, *, root: str = "/", **limits: str) -> None:
        """We are in `group` of version 2, mounted from `root` on; limits by directory below the mount."""
        self.write("proc/self/mountinfo", OTHER_MOUNTS + V2_MOUNT.format(root=root))
        self.write("proc/self/cgroup", f"0::{group}\n")
        for directory, limit in limits.items():
            self.write(f"sys/fs/cgroup/{directory}/memory.max", f"{limit}\n")

    def v1(self, group: str, *, root: str = "/", **limits: int) -> None:
        self.write("proc/self/mountinfo", OTHER_MOUNTS + V1_MOUNT.format(root=root))
        self.write("proc/self/cgroup", f"4:cpu,cpuacct:/elsewhere\n3:memory:{group}\n0::/\n")
        for directory, limit in limits.items():
            self.write(f"sys/fs/cgroup/memory/{directory}/memory.limit_in_bytes", f"{limit}\n")

    def limit(self) -> tuple[int, bool]:
        room = self.machine.room()
        assert room is not None
        return room.limit_bytes, room.is_container


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def test_without_a_limit_there_is_what_the_machine_has(system: FakeSystem) -> None:
    assert system.limit() == (16 * GIB, False)
    system.v2("/app", app="max")
    assert system.limit() == (16 * GIB, False)
    system.v1("/app", app=UNLIMITED_V1)
    assert system.limit() == (16 * GIB, False)


def test_a_limit_above_what_the_machine_has_is_none(system: FakeSystem) -> None:
    system.v2("/app", app=str(17 * GIB))
    assert system.limit() == (16 * GIB, False)


def test_the_limit_of_our_group_counts_in_either_version(system: FakeSystem) -> None:
    system.v2("/app", app=str(2 * GIB), other=str(GIB))
    assert system.limit() == (2 * GIB, True)
    system.v1("/app", app=3 * GIB, other=GIB)
    assert system.limit() == (3 * GIB, True)


def test_where_a_group_is_slowed_down_is_as_narrow_as_where_it_is_killed(system: FakeSystem) -> None:
    system.v2("/app", app=str(2 * GIB))
    system.write("sys/fs/cgroup/app/memory.high", "max\n")
    assert system.limit() == (2 * GIB, True)
    system.write("sys/fs/cgroup/app/memory.high", f"{GIB}\n")
    assert system.limit() == (GIB, True)
    system.write("sys/fs/cgroup/app/memory.max", "max\n")
    assert system.limit() == (GIB, True)


@pytest.mark.parametrize("limit", ["0", "-1", "", "1e9", "9" * 5_000])
def test_a_limit_that_nobody_could_run_under_is_none(system: FakeSystem, limit: str) -> None:
    system.v2("/app", app=limit)
    assert system.limit() == (16 * GIB, False)


def test_a_line_of_mounts_that_is_cut_off_is_passed_over(system: FakeSystem) -> None:
    system.v2("/app", app=str(2 * GIB))
    mounts = (OTHER_MOUNTS, "40 1 0:1 - cgroup2\n", "31 - cgroup\n", " - \n\n", V2_MOUNT.format(root="/"))
    system.write("proc/self/mountinfo", "".join(mounts))
    assert system.limit() == (2 * GIB, True)


def test_of_nested_groups_the_narrowest_counts(system: FakeSystem) -> None:
    system.v2("/pod/app/worker", **{"pod": str(2 * GIB), "pod/app": str(3 * GIB), "pod/app/worker": "max"})
    assert system.limit() == (2 * GIB, True)
    system.v1("/pod/app", **{"pod": UNLIMITED_V1, "pod/app": GIB})
    assert system.limit() == (GIB, True)


def test_in_a_container_the_mount_is_our_own_group(system: FakeSystem) -> None:
    # With a name space of its own it sees itself as the root; without one, as the host does.
    system.v2("/", **{".": str(2 * GIB)})
    assert system.limit() == (2 * GIB, True)
    system.v1("/docker/4f2a", root="/docker/4f2a", **{".": GIB, "inner": 5})
    assert system.limit() == (GIB, True)
    system.v1("/docker/4f2a/inner", root="/docker/4f2a", **{".": GIB, "inner": GIB // 2})
    assert system.limit() == (GIB // 2, True)


@pytest.mark.parametrize("group", ["/../../else", "/moved/away"])
def test_a_group_that_is_not_mounted_is_no_way_out_of_the_mount(system: FakeSystem, group: str) -> None:
    system.write("sys/else/memory.max", "5\n")
    system.v2(group, **{".": str(2 * GIB)})
    assert system.limit() == (2 * GIB, True)


def test_what_the_kernel_could_drop_is_not_in_use(system: FakeSystem) -> None:
    system.v2("/app", app=str(2 * GIB))
    system.write("sys/fs/cgroup/app/memory.current", "1000\n")
    system.write("sys/fs/cgroup/app/memory.stat", "anon 700\ninactive_file 100\nactive_file 50\nslab_reclaimable 7\n")
    room = system.machine.room()
    assert room is not None
    assert room.used_bytes() == 843
    system.v1("/app", app=GIB)
    system.write("sys/fs/cgroup/memory/app/memory.usage_in_bytes", "2000\n")
    system.write(
        "sys/fs/cgroup/memory/app/memory.stat", "inactive_file 9\ntotal_inactive_file 300\ntotal_active_file 1\n"
    )
    room = system.machine.room()
    assert room is not None
    assert room.used_bytes() == 1699


def test_of_a_machine_all_that_is_not_available_is_in_use(system: FakeSystem) -> None:
    room = system.machine.room()
    assert room is not None
    assert room.used_bytes() == 4 * GIB
    system.write("proc/meminfo", "MemTotal: 1 kB\n")
    with pytest.raises(OSError, match="does not tell"):
        room.used_bytes()


def test_where_nothing_can_be_told_nothing_is(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "proc", tmp_path)
    assert machine.room() is None
    assert machine.resident_bytes() is None


def test_files_that_say_something_else_are_passed_over(system: FakeSystem) -> None:
    system.v2("/app", app="plenty")
    system.write("proc/self/statm", "what")
    assert system.limit() == (16 * GIB, False)
    assert system.machine.resident_bytes() is None
    system.write("proc/self/cgroup", "neither one nor the other\n")
    assert system.limit() == (16 * GIB, False)


def test_resident_is_what_the_kernel_counts_in_pages(system: FakeSystem) -> None:
    system.write("proc/self/statm", "90000 250 30 1 0 400 0\n")
    assert system.machine.resident_bytes() == 250 * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
def test_of_this_machine_it_tells_what_is_so() -> None:
    room = Machine().room()
    assert room is not None
    assert 0 < room.used_bytes() <= room.limit_bytes
    resident_bytes = Machine().resident_bytes()
    assert resident_bytes is not None
    assert 10_000_000 < resident_bytes < room.limit_bytes
