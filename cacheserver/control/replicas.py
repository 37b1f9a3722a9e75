"""Which replicas of this service live: each shows itself in Redis every few seconds, judged by the server's clock."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from pathlib import Path

import structlog

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import run_script
from cacheserver.errors import ConfigError
from cacheserver.interfaces import Clock
from cacheserver.tasks import OwnedTasks, every
from cacheserver.tiers.redis_client import Client

_log = structlog.get_logger(__name__)

_ID_PATTERN = re.compile(r"[0-9a-f]{16}")

# Shows a sign of life, forgets who showed none for too long, and counts who is left.
_BEAT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - tonumber(ARGV[2]))
return redis.call('ZCARD', KEYS[1])
"""


class Replicas:
    """This replica and how many live beside it. Made by `open`; `start` and `aclose` it."""

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        replica_id: str,
        *,
        clock: Clock,
        client: Client | None,
        prefix: str,
        beat_s: float = 5.0,
        dead_after_s: float = 30.0,
        timeout_s: float = 2.0,
    ) -> None:
        """`client` is closed by whoever made it; without one, this replica is alone. `prefix` begins every name."""
        self.id = replica_id
        self.live = 1
        """How many replicas lived at the last look, this one included."""
        self.redis_is_lost = False
        """Whether Redis did not answer the last look."""
        self.dead_after_s = dead_after_s
        self.name_in_redis = f"{prefix}{{budget}}:replicas"
        """A sorted set: the id of each replica by when it last showed itself."""
        self._clock = clock
        self._client = client
        self._beat_s = beat_s
        self._timeout_s = timeout_s
        self._tasks = OwnedTasks()

    @staticmethod
    async def open(directory: Path, *, clock: Clock, client: Client | None, prefix: str) -> Replicas:
        """The replica whose data are in `directory`: its id is made once and kept in the file `replica_id`.

        Raises:
            ConfigError: the file cannot be written or read, or holds something else.
        """
        replica_id = await asyncio.to_thread(_kept_id, directory / "replica_id")
        return Replicas(replica_id, clock=clock, client=client, prefix=prefix)

    async def start(self) -> None:
        """Show ourselves once, and from now on every few seconds."""
        if self._client is not None:
            await self.beat()
            beating = every(self._beat_s, self.beat, clock=self._clock, name="replicas")
            self._tasks.own(beating, "replicas")

    async def beat(self) -> None:
        """Show ourselves and look who else does. Never raises."""
        if self._client is None:
            return
        try:
            args = [self.id, self.dead_after_s]
            live = await run_script(self._client, _BEAT, [self.name_in_redis], args, timeout_s=self._timeout_s)
        except UNREACHABLE as error:
            self._note(is_lost=True, error=type(error).__name__)
            return
        self.live = max(1, int(live))
        self._note(is_lost=False)

    async def aclose(self) -> None:
        """Stop showing ourselves, and say so, that nobody waits for us to be missed."""
        await self._tasks.aclose(0)
        if self._client is None or self.redis_is_lost:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._client.zrem(self.name_in_redis, self.id)
        except UNREACHABLE as error:
            _log.warning("replica_not_signed_off", error=type(error).__name__)

    def _note(self, *, is_lost: bool, error: str = "") -> None:
        if is_lost != self.redis_is_lost:
            _log.warning("replicas_unknown", error=error) if is_lost else _log.info("replicas_known", live=self.live)
        self.redis_is_lost = is_lost


def _kept_id(path: Path) -> str:
    try:
        if not path.exists():
            _keep(path, secrets.token_hex(8))
        kept = path.read_text(errors="replace").strip()
    except OSError as exc:
        raise ConfigError(f"data_dir: cannot make or read {path}: {exc.strerror}; mend its permissions") from exc
    if not _ID_PATTERN.fullmatch(kept):
        raise ConfigError(f"data_dir: {path} does not hold a replica's id (16 hexadecimal digits); delete the file")
    return kept


def _keep(path: Path, text: str) -> None:
    """Write a file that is whole or not there, whenever we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
