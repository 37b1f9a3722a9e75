"""How the service stands, for its health and metrics pages: this process, or all workers by way of their supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from cacheserver.http.operations import Readiness, State
from cacheserver.model import TierName

Questions = Mapping[bytes, Callable[[], Awaitable[bytes]]]

READINESS, METRICS = b"readiness", b"metrics"
WORKER_TIMEOUT_S = 2.0
_SUPERVISOR_TIMEOUT_S = 2 * WORKER_TIMEOUT_S


class ProcessState:
    """The `State` of this process."""

    def __init__(
        self, *, registry: CollectorRegistry, is_ready: Callable[[], bool], tiers: Callable[[], Mapping[TierName, bool]]
    ) -> None:
        self._registry = registry
        self._is_ready = is_ready
        self._tiers = tiers

    async def readiness(self) -> Readiness:
        """See `State.readiness`."""
        return Readiness(self._is_ready(), {name.value: is_well for name, is_well in self._tiers().items()})

    async def metrics(self) -> bytes:
        """See `State.metrics`."""
        return generate_latest(self._registry)


class RemoteState:
    """The `State` that whoever answers at a unix socket tells: a worker of its own, the supervisor of all."""

    def __init__(self, socket: Path, *, timeout_s: float = _SUPERVISOR_TIMEOUT_S) -> None:
        self._socket = socket
        self._timeout_s = timeout_s

    async def readiness(self) -> Readiness:
        """See `State.readiness`."""
        told = json.loads(await self._ask(READINESS))
        return Readiness(told["is_ready"], told["tiers"])

    async def metrics(self) -> bytes:
        """See `State.metrics`."""
        return await self._ask(METRICS)

    async def _ask(self, question: bytes) -> bytes:
        async with asyncio.timeout(self._timeout_s):  # TimeoutError is an OSError
            reader, writer = await asyncio.open_unix_connection(self._socket)
            try:
                writer.write(question + b"\n")
                reply = await reader.read()
            finally:
                writer.close()
        if not reply:
            raise ConnectionError("it ended before it answered")
        return reply


async def answer(socket: Path, state: State) -> Callable[[], Awaitable[None]]:
    """Tell `state` to whoever asks at a unix socket, in place of one that a dead process left. Returns what ends it."""

    async def readiness() -> bytes:
        now = await state.readiness()
        return json.dumps({"is_ready": now.is_ready, "tiers": dict(now.tiers)}).encode()

    questions: Questions = {READINESS: readiness, METRICS: state.metrics}

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, KeyError):
            async with asyncio.timeout(_SUPERVISOR_TIMEOUT_S):
                writer.write(await questions[(await reader.readline()).strip()]())
                await writer.drain()

    await asyncio.to_thread(socket.unlink, missing_ok=True)
    server = await asyncio.start_unix_server(reply, socket)

    async def stop() -> None:
        server.close()
        await server.wait_closed()

    return stop
