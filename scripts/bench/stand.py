"""What benches against the provider emulator stand on: services and callers as processes, and how much each works."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx

from cacheserver.embedded.child import free_ports, leashed
from scripts.bench.closed_loop import Asked, read_asked

_ROOT = Path(__file__).resolve().parents[2]
_PROC = Path("/proc")
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 120.0
_LAST_CALLS_TIMEOUT_S = 660.0
_POLL_S = 0.05
_DEPTH = "cacheserver_queue_depth{"


class ServiceProcess:
    """`cacheserver serve` as an operator runs it, ready while it is entered; it dies with the bench.

    Args:
        directory: for its configuration, its data and its log; made if there is none.
        config: the configuration file's text, without `data_dir` and `[server]`.
        environment: further settings, as it reads them from there.

    `command` and `environment` may be set anew before the next `start`: that is an upgrade.
    """

    def __init__(self, directory: Path, config: str, *, environment: Mapping[str, str] | None = None) -> None:
        grpc_port, http_port = free_ports(2)
        self.address = f"127.0.0.1:{grpc_port}"
        self.http_address = f"127.0.0.1:{http_port}"
        self.directory = directory
        self.command: Sequence[str] = (str(Path(sys.executable).with_name("cacheserver")),)
        self.environment = environment or {}
        server = f"[server]\ngrpc_port = {grpc_port}\nhttp_port = {http_port}\n"
        self._config = f'data_dir = "{directory}"\n{config}\n{server}'
        self.http_port = http_port
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", trust_env=False)
        self._process: Process

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()
        await self.kill()

    @property
    def pid(self) -> int:
        """Its process's id."""
        return self._process.pid

    async def start(self) -> None:
        """Run it, also once more after a kill, on the same data and ports; it takes calls on return."""
        self.directory.mkdir(exist_ok=True)
        config_file = self.directory / "cacheserver.toml"
        config_file.write_text(self._config)
        with self.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *leashed([*self.command, "serve", "--config", str(config_file)]),
                stdin=PIPE,
                stdout=log,
                stderr=log,
                env={"PATH": os.defpath, "PYTHONPATH": str(_ROOT), **self.environment},
                cwd=self.directory,
            )
        try:
            await self._wait_until_ready()
        except BaseException:
            await self._http.aclose()
            await self.kill()
            raise

    @property
    def log_file(self) -> Path:
        """What it logs."""
        return self.directory / "service.log"

    async def queue_depth(self) -> int:
        """How many generations wait in it now; waits as long as it takes to say."""
        lines = (await self._http.get("/metrics", timeout=None)).text.splitlines()
        return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(_DEPTH)))

    async def _wait_until_ready(self) -> None:
        """Return when it takes calls; RuntimeError with its log if it ended instead."""
        async with asyncio.timeout(_START_TIMEOUT_S):
            while self._process.returncode is None:
                with contextlib.suppress(httpx.TransportError):  # not listening yet
                    if (await self._http.get("/readyz")).is_success:
                        return
                await asyncio.sleep(_POLL_S)
        raise RuntimeError(await asyncio.to_thread(self.log_file.read_text, errors="replace"))

    async def stop(self) -> None:
        """SIGTERM: it ends what it is about, and itself."""
        self._process.terminate()
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL."""
        await _kill(self._process)
        if self._process.stdin is not None:
            self._process.stdin.write(b"\n")  # lets it off the leash, which else would signal its id's next owner
            self._process.stdin.close()


class CallersProcess:
    """Callers of one service, in a process of their own: each asks for one new picture after another.

    Args:
        address: of the service.
        count: so many ask at a time.
        name: part of every prompt, so that no two processes ask for the same.
        directory: for their calls.
    """

    def __init__(self, address: str, *, count: int, name: str, directory: Path) -> None:
        self._out = directory / f"callers-{name}.jsonl"
        options = {"--address": address, "--callers": str(count), "--name": name, "--out": str(self._out)}
        self._argv = [word for option in options.items() for word in option]
        self._process: Process

    async def __aenter__(self) -> Self:
        argv = ["-m", "scripts.bench.closed_loop", *self._argv]
        self._process = await asyncio.create_subprocess_exec(sys.executable, *argv, stdin=PIPE, cwd=_ROOT)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await _kill(self._process)

    async def finish(self) -> list[Asked]:
        """Let them ask for nothing more, and wait for what they asked for: all their calls."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        async with asyncio.timeout(_LAST_CALLS_TIMEOUT_S):
            if code := await self._process.wait():
                raise RuntimeError(f"the callers' process ended with {code}")
        return await asyncio.to_thread(read_asked, self._out)


async def _kill(process: Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


def children_cpu_s() -> dict[str, float]:
    """Seconds of work that each child process of ours has done, by its program; empty where there is no /proc.

    Of several that run the same program, each has its number.
    """
    found = sorted((int(stat.parent.name), stat) for stat in _PROC.glob("[0-9]*/stat"))
    work_s: dict[str, float] = {}
    for _, stat in found:
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) != os.getpid():
                continue
            name = _program((stat.parent / "cmdline").read_text().split("\0"))
            same = sum(other.partition(" ")[0] == name for other in work_s)
            work_s[f"{name} {same + 1}"] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return work_s


def _program(argv: list[str]) -> str:
    """The module or script that Python runs, or the program itself."""
    if "-m" in argv:
        return argv[argv.index("-m") + 1].rpartition(".")[2]
    # Some programs put more than their name into their first argument.
    names = [Path(word.partition(" ")[0]).name for word in argv if word]
    return next((name for name in names if not name.startswith("python")), "?")
