"""How long it takes to import the package and its client, and until a service serves.

The service is given a Redis and an S3, as in production: a Valkey and the S3 server of the tests, both up before. It is
`cacheserver serve` as an operator runs it, and an upstream is configured. Measured, each as the median of some starts
of a fresh interpreter: importing the package, and the asyncio client; from the start of the process until the service
says that it serves, which its health check must then agree with; and importing grpc, redis-py and boto3 alone, the
floor: what stands between callers, Redis and S3 on this machine cannot be there sooner. A first start of each is not
counted: it compiles.

Against: the package is imported within 150 ms, and the service serves within 1 s.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from scripts.bench.figures import print_table, print_verdict, write_json
from tests.servers import S3Server, ValkeyServer

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "import cacheserver"
_CLIENT = "from cacheserver.client import AsyncClient"
_FLOOR = "import grpc, redis.asyncio, boto3"
_SERVE = "from cacheserver.cli import main; main()"
_PACKAGE_MS = 150.0
_SERVING_MS = 1_000.0
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Started:
    """One start of something: milliseconds by the clock, and of processor time."""

    ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Of each thing that is started, all starts that count."""

    package: list[Started]
    client: list[Started]
    floor: list[Started]
    serving: list[Started]

    @property
    def to_floor(self) -> float:
        """How many times the floor's processor time it takes to serve: the median of the pairs."""
        return median(serving.cpu_ms / floor.cpu_ms for serving, floor in zip(self.serving, self.floor, strict=True))

    def shortfalls(self) -> list[str]:
        """What takes too long."""
        limits = {
            "the package is imported": (self.package, _PACKAGE_MS),
            "the service serves": (self.serving, _SERVING_MS),
        }
        return [
            f"{what} within {median(each.ms for each in starts):,.0f} ms, not {limit_ms:,.0f}"
            for what, (starts, limit_ms) in limits.items()
            if median(each.ms for each in starts) > limit_ms
        ]


async def measure(directory: Path, *, starts: int) -> Figures:
    """Start everything `starts` times, in turn, so that what else the machine does meets all alike."""
    async with AsyncExitStack() as stack:
        config = directory / "cacheserver.toml"
        config.write_text(await _config(directory, stack))
        figures = Figures([], [], [], [])
        for number in range(starts + 1):
            found = await _import(_PACKAGE), await _import(_CLIENT), await _import(_FLOOR), await _serve(config)
            if number:
                kinds = figures.package, figures.client, figures.floor, figures.serving
                for of_one, started in zip(kinds, found, strict=True):
                    of_one.append(started)
        return figures


async def _config(directory: Path, stack: AsyncExitStack) -> str:
    """Settings that name a Valkey and an S3, which run until `stack` ends."""
    for name in ("valkey", "s3"):
        (directory / name).mkdir()
    valkey, s3 = ValkeyServer(directory / "valkey"), S3Server(directory / "s3")
    stack.push_async_callback(asyncio.to_thread, valkey.kill)
    stack.push_async_callback(asyncio.to_thread, s3.close)
    await asyncio.gather(asyncio.to_thread(valkey.start), asyncio.to_thread(s3.start))
    return f"""
data_dir = "{directory}/data"
[server]
grpc_port = 0
http_port = 0
[redis]
url = "{valkey.url}"
[s3]
bucket = "{s3.bucket}"
region = "{s3.region}"
endpoint = "{s3.endpoint}"
access_key = "{s3.access_key}"
secret_key = "{s3.secret_key}"
[[upstreams]]
name = "nobody"
base_url = "https://127.0.0.1:9/v1"
api_key = "sk-none"
"""


async def _import(code: str) -> Started:
    """Run an import in a fresh interpreter; its own start does not count."""
    now = "time.perf_counter(), time.process_time()"
    around = f"import time; a = {now}; {code}\nb = {now}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"{around}\nprint(*((after - before) * 1e3 for before, after in zip(a, b)))",
        stdout=PIPE,
        env=_environment(),
        cwd=_ROOT,
    )
    out, _ = await process.communicate()
    return Started(*map(float, out.split()))


async def _serve(config: Path) -> Started:
    """Run the service until it serves, check that it does, and end it."""
    began_s = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _SERVE, "serve", "--config", str(config), stderr=PIPE, env=_environment(), cwd=_ROOT
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            address = await _said_it_serves(process)
            started = Started((time.monotonic() - began_s) * 1e3, _cpu_ms(process.pid))
            await _check(address)
    finally:
        process.terminate()
        await process.communicate()
    return started


async def _said_it_serves(process: asyncio.subprocess.Process) -> str:
    """Its address, once it says so; RuntimeError with what else it said."""
    lines: list[str] = []
    while line := await process.stderr.readline() if process.stderr else b"":
        lines.append(line.decode())
        facts = json.loads(line)
        if facts["event"] == "serving":
            return str(facts["grpc"])
        if facts["event"] == "tier_unreachable":
            break  # so it would serve sooner than with what it was given
    raise RuntimeError("".join(lines))


async def _check(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call] # generated code
        health = await stub.Check(health_pb2.HealthCheckRequest())
    if health.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError("it said that it serves and does not")


def _cpu_ms(pid: int) -> float:
    """Processor time of a process so far, of all its threads."""
    tasks = (Path("/proc") / str(pid) / "task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def _environment() -> dict[str, str]:
    return {"PATH": os.defpath, "PYTHONPATH": str(_ROOT)}


def main(
    *,
    starts: Annotated[int, typer.Option(min=1, help="Starts of each that count.")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Measure, and print the medians."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        figures = asyncio.run(measure(Path(directory), starts=starts))
    rows = {
        "import cacheserver": figures.package,
        "import its client": figures.client,
        "import grpc, redis.asyncio, boto3": figures.floor,
        "serving": figures.serving,
    }
    print_table(
        f"Starting, medians of {starts}",
        ("what", "ms", "least", "most", "ms of processor"),
        [
            (
                name,
                *(f"{pick([each.ms for each in of_one]):,.0f}" for pick in (median, min, max)),
                f"{median(each.cpu_ms for each in of_one):,.0f}",
            )
            for name, of_one in rows.items()
        ],
    )
    print(f"Serving takes {figures.to_floor:.2f} times the processor time of the floor.")
    shortfalls = figures.shortfalls()
    print_verdict(shortfalls)
    write_json(json_file, "start_up", {**asdict(figures), "to_floor": figures.to_floor, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
