"""A worker: one of several processes that serve the same ports, started by the supervisor and by nobody else.

Its standard input has its place, in one line, and stays open as long as the supervisor lives; its standard output takes
one line, once it serves or cannot.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import structlog
import uvloop

from cacheserver import loop_first
from cacheserver.app.core import build_core
from cacheserver.app.patience import Patience
from cacheserver.app.service import run
from cacheserver.clock import SystemClock
from cacheserver.errors import ConfigError
from cacheserver.interfaces import Clock
from cacheserver.log import set_up_logging
from cacheserver.machine import Machine
from cacheserver.settings import Settings, WorkerPlace, for_worker, load_settings, note_drained
from cacheserver.tasks import end

_log = structlog.get_logger(__name__)

_STDIN = 0
_POLL_S = 0.25
CANNOT_START = 1


def main() -> int:
    """Serve, or drain what is left over, until SIGTERM or the supervisor's end: the exit code."""
    place = WorkerPlace.load(_first_line())
    gc.disable()  # see `cacheserver.cli.serve`
    try:
        settings = _load(place)
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if place.leftover:
            set_up_logging(level=settings.log.level, form=settings.log.format)
            uvloop.run(_drain(settings, place.index))
        else:
            note_drained(settings.data_dir, is_drained=False)
            run(
                settings,
                load=lambda: _load(place),
                place=place,
                serving=lambda: _tell(error=None),
                outlived=watch_supervisor,
            )
    except ConfigError as error:
        _tell(error=str(error))
        return CANNOT_START
    except OSError as error:
        _tell(error=f"data_dir: {error.filename} cannot be used: {error.strerror}; mend its permissions")
        return CANNOT_START
    return 0


def _load(place: WorkerPlace) -> Settings:
    """The settings of the worker at `place` as they are written now. Raises ConfigError."""
    config = None if place.config is None else Path(place.config)
    written = load_settings(config, os.environ, local_s3=place.local_s3)
    return for_worker(written, place, room=Machine().room())


def watch_supervisor(on_end: Callable[[], None]) -> None:
    """Have the running event loop call `on_end`, once, when the supervisor has ended."""
    loop = asyncio.get_running_loop()

    def look() -> None:
        if not os.read(_STDIN, 4096):
            loop.remove_reader(_STDIN)
            on_end()

    loop.add_reader(_STDIN, look)


async def _drain(settings: Settings, index: int) -> None:
    """Bring what the journal holds to the last tier, close the ledger's open calls, and end. Raises ConfigError."""
    loop = asyncio.get_running_loop()
    loop.set_default_executor(loop_first.pool(None, "worker"))
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    watch_supervisor(asked.set)
    clock = SystemClock()
    draining = asyncio.create_task(_emptied(settings, clock), name="drain")
    stop_asked = asyncio.create_task(asked.wait())
    await asyncio.wait({draining, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        await end([draining])
        return
    draining.result()
    await asyncio.to_thread(note_drained, settings.data_dir, is_drained=True)
    _log.info("leftover_drained", worker=index)


async def _emptied(settings: Settings, clock: Clock) -> None:
    patience = Patience(settings.server.drain_timeout_s, clock=clock)
    async with AsyncExitStack() as undo:
        core = await build_core(settings, patience=patience, clock=clock, undo=undo)
        while core.journal is not None and core.journal.entries:
            await clock.sleep(_POLL_S)


def _first_line() -> bytes:
    """The first line of standard input; nothing behind it is read."""
    line = bytearray()
    while not line.endswith(b"\n"):
        if not (byte := os.read(_STDIN, 1)):
            raise SystemExit("cacheserver.app.worker is started by `cacheserver serve --workers N`, not by hand")
        line += byte
    return bytes(line)


def _tell(*, error: str | None) -> None:
    sys.stdout.write(json.dumps({"error": error}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
