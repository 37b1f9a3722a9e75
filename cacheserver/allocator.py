"""The C library's allocator, glibc's: set up for pictures that come and go, and asked to give back what is free.

Every picture, and every buffer it travels in, is larger than what Python allocates itself, so it comes from malloc.
By default glibc maps such a buffer on its own until it has once freed one of that size, gives the end of its heap back
as soon as 3 MB lie free there, and has a heap for each thread. Measured on a machine whose page faults are dear (3 us
each, as on many virtual ones), in processor time per buffer of 1.5 MB that is taken, filled and freed:

    one at a time: 1,250 us where it is mapped each time, 66 us from the heap
    eight at a time: 1,250 us by default, as the end of the heap goes back each time; 85 to 125 us with what is set here

A hit of 1.5 MB costs as much as by default (0.94 to 1.02 of it), and 1.6 times that where it is mapped each time. Under
hits, misses and evictions at L1 = 256 MiB a service with one heap grew it to 377 MiB, one with several to 526 MiB. To
map only what stays in L1 does not work: glibc maps nothing for which it has a free piece.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""

_MIB = 1024 * 1024

_SETTINGS = (
    # What is larger is mapped on its own, and unmapped when freed. glibc takes no higher threshold.
    ("MALLOC_MMAP_THRESHOLD_", "mmap_threshold", _M_MMAP_THRESHOLD, 32 * _MIB),
    # So much may lie free at the end of the heap before it goes back.
    ("MALLOC_TRIM_THRESHOLD_", "trim_threshold", _M_TRIM_THRESHOLD, 64 * _MIB),
    # One heap: what one thread frees, as a picture that goes, another one can take, as grpc's for the next.
    ("MALLOC_ARENA_MAX", "arena_max", _M_ARENA_MAX, 1),
)


def set_up(env: Mapping[str, str] = os.environ) -> None:
    """Set the allocator up, as early as may be: before there are threads. What the environment sets stays as it is."""
    library = _glibc()
    if library is None:
        return
    tunables = env.get("GLIBC_TUNABLES", "")
    for variable, tunable, parameter, value in _SETTINGS:
        if variable not in env and f"glibc.malloc.{tunable}=" not in tunables:
            library.mallopt(parameter, value)


def giver_back() -> Callable[[], None] | None:
    """What gives free memory back to the system, wherever in the heap it is; None where there is no such thing.

    It may take some ms, during which others wait for memory, but not for Python's lock.
    """
    library = _glibc()
    if library is None:
        return None
    trim = library.malloc_trim
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return lambda: trim(0)


class _Counts(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


def taker() -> Callable[[], int] | None:
    """What tells how many bytes are taken from the allocator, and not free again; None where that is not known.

    Python's own small objects are not among them, which it takes from the system itself.
    """
    library = _glibc()
    if library is None or not hasattr(library, "mallinfo2"):  # new in glibc 2.33
        return None
    count = library.mallinfo2
    count.restype = _Counts

    def taken_bytes() -> int:
        counts = count()
        return int(counts.uordblks + counts.hblkhd)

    return taken_bytes


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
