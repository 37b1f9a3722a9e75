"""Servers of our own, for a service that is given none: imported where one is to be started."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import structlog

from cacheserver.embedded import valkey
from cacheserver.embedded.seaweed import LocalS3
from cacheserver.embedded.valkey import EmbeddedValkey
from cacheserver.interfaces import Clock

_log = structlog.get_logger(__name__)


async def start_valkey(data_dir: Path, *, max_bytes: int, clock: Clock, undo: AsyncExitStack) -> str | None:
    """Run a Valkey: where it answers; None on a platform that has no binary. Raises ConfigError."""
    if not valkey.available():
        _log.warning(
            "no_valkey_for_this_platform", text="no Redis level: set redis.url or install cacheserver[embedded]"
        )
        return None
    own = EmbeddedValkey(data_dir=data_dir, max_bytes=max_bytes, clock=clock)
    await own.start()
    undo.push_async_callback(own.stop)
    return own.url


async def start_s3(data_dir: Path, *, clock: Clock, undo: AsyncExitStack) -> LocalS3:
    """Run an S3 server. Raises ConfigError."""
    own = LocalS3(data_dir=data_dir, clock=clock)
    await own.start()
    undo.push_async_callback(own.stop)
    return own
