"""One service per directory, and one child: a lock that lives as long as the longest-lived of the two."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from cacheserver.errors import ConfigError
from cacheserver.interfaces import Clock

_RETRY_S = 0.05
_DYING_S = 10.0


class DirectoryLock:
    """A lock on a directory of a service's data directory, kept in the file `lock`.

    The file holds the process id of the service. A child that is given `fd` holds the lock too, so nobody
    takes over the directory while a child of a service that was killed is still writing its last.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @staticmethod
    async def acquire(directory: Path, *, clock: Clock, setting: str = "data_dir") -> DirectoryLock:
        """The lock on `directory`, which is made if missing. Waits up to ten seconds for the child of a dead service.

        Raises:
            ConfigError: it names `setting`; the directory cannot be made or written, a living service has it,
                or that child does not end.
        """
        fd = _opened(directory, setting)
        try:
            await _lock(fd, directory, clock, setting)
        except BaseException:
            os.close(fd)
            raise
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        return DirectoryLock(fd)

    def release(self) -> None:
        """Let the next one have it. Call it when the child has ended."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        os.close(self.fd)


def _opened(directory: Path, setting: str) -> int:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise ConfigError(
            f"{setting}: cannot make or write {directory}: {exc.strerror}; "
            "mend its permissions, or name another directory"
        ) from exc
    # The shell that starts a child uses the one-digit descriptors for itself.
    fd = fcntl.fcntl(opened_fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(opened_fd)
    return fd


async def _lock(fd: int, directory: Path, clock: Clock, setting: str) -> None:
    deadline_s = clock.monotonic_s() + _DYING_S
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        owner = os.pread(fd, 20, 0).decode()
        if _is_alive(owner) or clock.monotonic_s() >= deadline_s:
            raise ConfigError(
                f"{setting}: {directory} is in use by another cacheserver (process {owner or 'unknown'}); "
                f"stop that one, or give this one a {setting} of its own"
            )
        await clock.sleep(_RETRY_S)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
