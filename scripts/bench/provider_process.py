"""The provider emulator in a process of its own, to be told what to do, killed and asked for its bill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any, Self

import httpx

from cacheserver.clock import SystemClock
from scripts.bench.provider_config import Fault, Kind, Latency, ProviderConfig
from scripts.bench.provider_ledger import Call, Summary, read_ledger

_ROOT = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_CONTROL_TIMEOUT_S = 30.0


class ProviderProcess:
    """The emulator in a process of its own, which dies with us.

    Its ledger is in a file, so its bill is known however it ends; emulated time goes on while it is down.

    Args:
        config: what it is like.
        directory: for its configuration, its ledger and what it prints.
        port: where it listens; 0 is a free one, kept over restarts.
    """

    def __init__(self, config: ProviderConfig, directory: Path, *, port: int = 0) -> None:
        self.port = port
        self._config = config
        self._config_file = directory / "provider.json"
        self._ledger_file = directory / "provider.ledger.jsonl"
        self._log_file = directory / "provider.log"
        self._process: Process | None = None
        self._clock = SystemClock()
        self._epoch_s: float | None = None
        self._http = httpx.AsyncClient(trust_env=False, timeout=_CONTROL_TIMEOUT_S)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()
        await self._http.aclose()

    @property
    def root_url(self) -> str:
        """What Azure calls the endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """Where OpenAI's API is."""
        return f"{self.root_url}/v1"

    @property
    def now_s(self) -> float:
        """Emulated seconds since the first start."""
        if self._epoch_s is None:
            return 0.0
        return (self._clock.monotonic_s() - self._epoch_s) * self._config.compression

    async def start(self) -> None:
        """Run it; it listens on return. After a kill, on the same port.

        Raises:
            RuntimeError: it did not start; the message is what it printed.
            TimeoutError: it took too long.
        """
        await asyncio.to_thread(self._config_file.write_text, self._config.model_dump_json())
        try:
            await self._spawn()
        except BaseException:
            await self.kill()
            raise

    async def stop(self) -> None:
        """End it; calls that run are dropped, and not billed."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL."""
        await self._end(signal.SIGKILL)

    async def restart(self) -> None:
        """Kill it and start it again."""
        await self.kill()
        await self.start()

    async def fail_next(self, key: str | None, fault: Fault | str, times: int = 1, **how: Any) -> None:
        """As `Provider.fail_next`."""
        await self._post("fault", key=key, fault=fault, times=times, **how)

    async def set_fault_rate(self, key: str | None, fault: Fault | str, probability: float, **how: Any) -> None:
        """As `Provider.set_fault_rate`."""
        await self._post("fault", key=key, fault=fault, probability=probability, **how)

    async def set_limit(self, owner: str, kind: Kind, per_minute: float | None) -> None:
        """As `Provider.set_limit`."""
        await self._post("limit", owner=owner, kind=kind, per_minute=per_minute)

    async def set_latency(self, key: str, latency: Latency) -> None:
        """As `Provider.set_latency`."""
        await self._post("latency", key=key, latency=latency.model_dump())

    async def calls(self, since_s: float = 0.0) -> list[Call]:
        """The calls that ended at `since_s` or later, of all its runs; also while it is down."""
        calls = await asyncio.to_thread(read_ledger, self._ledger_file)
        return [call for call in calls if call.ended_s >= since_s]

    async def summary(self, since_s: float = 0.0) -> Summary:
        """Sums over these calls."""
        return Summary.of(await self.calls(since_s))

    async def state(self) -> dict[str, Any]:
        """What runs now: `now_s`, `arrivals`, `running`, `most_running`, `moderations`, `foreign_taken` by owner."""
        response = await self._http.get(f"{self.root_url}/_control/state")
        state: dict[str, Any] = response.raise_for_status().json()
        return state

    async def _post(self, what: str, **order: Any) -> None:
        response = await self._http.post(f"{self.root_url}/_control/{what}", json=order)
        if not response.is_success:
            raise ValueError(response.text)

    async def _spawn(self) -> None:
        argv = ["-m", "scripts.bench.provider", "--config", str(self._config_file), "--ledger", str(self._ledger_file)]
        argv += ["--port", str(self.port), "--until-eof"]
        argv += [] if self._epoch_s is None else ["--epoch-s", repr(self._epoch_s)]
        log = await asyncio.to_thread(self._log_file.open, "ab")
        with log:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable, *argv, stdin=PIPE, stdout=PIPE, stderr=log, cwd=_ROOT, start_new_session=True
            )
        async with asyncio.timeout(_START_TIMEOUT_S):
            ready = await process.stdout.readline() if process.stdout else b""
        if not ready:
            raise RuntimeError(await asyncio.to_thread(self._log_file.read_text, errors="replace"))
        told = json.loads(ready)
        self.port, self._epoch_s = told["port"], told["epoch_s"]

    async def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
