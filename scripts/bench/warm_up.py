"""A large warm-up: how long its plan takes, and that a client which is killed again and again pays for nothing twice.

The plan: 100,000 rows, half of them duplicates once normalized, a third of them cached in the last tier, which is a
directory, and then the S3 server of `scripts/serve --local-s3`. Measured: seconds from the command's start to its end,
and the most memory that the command and the service ever took.

The kills: 5,000 rows through the real service before an emulated provider that bills each picture; the command gets
SIGKILL three times at moments drawn at random, and is run once more. Measured: the seconds of all runs together, the
provider's calls and bill, what the service's ledger says of them, and the rows that the result file has.

Against: a plan takes less than 60 s and 500 MB at each side and counts exactly what there is; every picture is
generated once, for each there is one settled row of the ledger, and every row of the input has its outcome.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from cacheserver.client import AsyncClient, AttemptOutcome
from cacheserver.clock import SystemClock
from cacheserver.embedded.seaweed import LocalS3
from cacheserver.identity import identify
from cacheserver.interfaces import Tier
from cacheserver.model import CachedImage, CacheKey, GeneratedImage, ImageRequest, Namespace, TierName
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.s3 import S3Tier
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.provider_config import KeyConfig, Latency, ProviderConfig
from scripts.bench.provider_process import ProviderProcess
from scripts.bench.stand import ServiceProcess

PLANNED, KILLED, KILLS = 100_000, 5_000, 3
LIMIT_S, LIMIT_MB = 60.0, 500.0
MODEL = "gpt-image-2"

_NAMESPACE = Namespace("default", "default")
_PUTS_AT_A_TIME = 16
_CLIENT_TIMEOUT_S = 1_800.0
_POLL_S = 0.02
_NOBODY = f"""
[[upstreams]]
name = "nobody"
base_url = "http://127.0.0.1:9/v1"
api_key = "sk-none"
models = ["{MODEL}"]
"""


@dataclass(frozen=True, slots=True)
class Planned:
    """One plan's figures."""

    tier: str
    seconds: float
    client_mb: float
    service_mb: float
    rows: int
    duplicates: int
    cached: int
    to_generate: int


@dataclass(frozen=True, slots=True)
class Killed:
    """The figures of the runs that were killed, and of the one that was not."""

    seconds: float
    kills: int
    provider_calls: int
    provider_images: int
    duplicates_billed: int
    billed_microusd: int
    settled_rows: int
    settled_microusd: int
    rows_with_an_outcome: int


# ── the plan ────────────────────────────────────────────────────────────────────────────────────────────────────


def prompt(n: int) -> str:
    """The prompt of one product."""
    return f"studio photo of product {n}, white background, soft light from the left"


def write_rows(file: Path, rows: int) -> None:
    """Each prompt twice, the second time written otherwise."""
    distinct = rows // 2
    lines = [f'"{prompt(n)}"' for n in range(distinct)]
    lines += [f'"  {prompt(n).replace(" ", "  ")}. "' for n in range(rows - distinct)]
    file.write_text("\n".join(["prompt", *lines, ""]))


def cached_of(rows: int) -> int:
    """How many of the prompts are cached: they and their duplicates are a third of the rows."""
    return rows // 6


async def plan_on(name: TierName, directory: Path, rows: int) -> Planned:
    """Fill a last tier, and plan before a service that has it."""
    file = directory / "rows.csv"
    write_rows(file, rows)
    async with _last_tier(name, directory) as (tier, config):
        await _fill(tier, cached_of(rows))
        async with ServiceProcess(directory / "service", config + _NOBODY) as service:
            begun_s = time.monotonic()
            code, out, client_mb = await _command(service.address, "warm", str(file), "--plan", "--json")
            seconds = time.monotonic() - begun_s
            if code:
                raise RuntimeError(f"the command ended with {code}: {out}")
            facts = json.loads(out)["plan"]
            return Planned(
                tier=name,
                seconds=seconds,
                client_mb=client_mb,
                service_mb=_peak_mb(service.pid),
                rows=facts["rows"],
                duplicates=facts["duplicates"],
                cached=sum(facts["cached"].values()),
                to_generate=facts["to_generate"],
            )


@asynccontextmanager
async def _last_tier(name: TierName, directory: Path) -> AsyncIterator[tuple[Tier, str]]:
    """A tier to be filled, and the configuration of a service whose last one it is."""
    clock = SystemClock()
    if name is TierName.DISK:
        images = directory / "images"
        disk = await DiskTier.open(images, clock=clock, sync=False)
        yield disk, f'tiers = ["memory", "disk"]\n[disk]\npath = "{images}"\n'
        return
    s3 = LocalS3(data_dir=directory / "s3", clock=clock)
    await s3.start()
    access = {"endpoint": s3.endpoint, "access_key": s3.access_key, "secret_key": s3.secret_key}
    try:
        tier = S3Tier(bucket=s3.bucket, clock=clock, region=s3.region, read_timeout_s=30.0, **access)
        lines = [f'{key} = "{value}"' for key, value in {"bucket": s3.bucket, "region": s3.region, **access}.items()]
        yield tier, "\n".join(['tiers = ["memory", "s3"]', "[s3]", *lines, ""])
        await tier.aclose()
    finally:
        await s3.stop()


async def _fill(tier: Tier, count: int) -> None:
    numbers = iter(range(count))

    async def put() -> None:
        for n in numbers:
            key = identify(ImageRequest(prompt=prompt(n), model=MODEL), _NAMESPACE).key
            await tier.put(key, _entry(key), replace=False)

    async with asyncio.TaskGroup() as group:
        for _ in range(_PUTS_AT_A_TIME):
            group.create_task(put())


def _entry(key: CacheKey) -> CachedImage:
    data = key.name.encode()
    image = GeneratedImage(
        data=data,
        content_type="image/png",
        width=1,
        height=1,
        sha256=hashlib.sha256(data).hexdigest(),
        model=MODEL,
        size="1x1",
        quality="low",
        background="opaque",
    )
    return CachedImage(key=key, image=image, namespace="default", prompt_digest=bytes(32), create_time_s=time.time())


def _peak_mb(pid: int) -> float:
    """The most memory that a running process ever took, in megabytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


# ── the kills ───────────────────────────────────────────────────────────────────────────────────────────────────


async def killed_again_and_again(directory: Path, rows: int, *, kills: int, seed: int) -> Killed:
    """Run a job whose client is killed, until one run may end; what the provider and the ledger say of it."""
    chance = Random(seed)  # noqa: S311 - when to kill
    file, result = directory / "rows.txt", directory / "rows.txt.warm.jsonl"
    file.write_text("".join(f"{prompt(n)}\n" for n in range(rows)))
    (directory / "provider").mkdir()
    config = ProviderConfig(keys=(KeyConfig(key="sk-0", group="org"),), latency=Latency(mean_s=0.1), seed=seed)
    args = ("warm", str(file), "--yes", "--json", "--quality", "low", "--concurrency", "24")
    async with (
        ProviderProcess(config, directory / "provider") as provider,
        ServiceProcess(directory / "service", _bought_from(provider)) as service,
    ):
        begun_s = time.monotonic()
        for kill in range(kills):
            until_lines = _lines(result) + chance.randrange(1, max(2, rows // (kills + 1) - kill))
            await _killed(service.address, args, result, until_lines, wait_s=chance.random())
        code, out, _ = await _command(service.address, *args)
        seconds = time.monotonic() - begun_s
        if code:
            raise RuntimeError(f"the command ended with {code}: {out}")
        async with AsyncClient(service.address) as client:
            settled = [row async for row in client.admin.list_ledger() if row.outcome is AttemptOutcome.SETTLED]
        summary = await provider.summary()
    return Killed(
        seconds=seconds,
        kills=kills,
        provider_calls=summary.billed_calls,
        provider_images=summary.images,
        duplicates_billed=summary.duplicates,
        billed_microusd=summary.billed_microusd,
        settled_rows=len(settled),
        settled_microusd=sum(row.cost_microusd for row in settled),
        rows_with_an_outcome=len({json.loads(line)["row"] for line in result.read_text().splitlines()[1:]}),
    )


def _bought_from(provider: ProviderProcess) -> str:
    return f"""
tiers = ["memory", "disk"]
[log]
level = "warning"
[[upstreams]]
name = "emulated"
base_url = "{provider.base_url}"
api_key = "sk-0"
models = ["{MODEL}"]
"""


async def _killed(address: str, args: Sequence[str], result: Path, until_lines: int, *, wait_s: float) -> None:
    """Run the command, and SIGKILL it a while after its result has so many lines."""
    process = await _start(address, args)
    while _lines(result) < until_lines and process.returncode is None:  # noqa: ASYNC110 - in another process
        await asyncio.sleep(_POLL_S)
    await asyncio.sleep(wait_s)
    if process.returncode is None:
        process.kill()
    await process.communicate()


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────


async def _start(address: str, args: Sequence[str]) -> asyncio.subprocess.Process:
    command = [sys.executable, "-c", "from cacheserver.cli import main; main()", *args]
    env = {**os.environ, "CACHESERVER_ADDRESS": address}
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env)


async def _command(address: str, *args: str) -> tuple[int, str, float]:
    """Run the command to its end: its exit code, what it printed, and the most memory it took, in megabytes."""
    process = await _start(address, args)
    peak_mb = 0.0

    async def watch() -> None:
        nonlocal peak_mb
        while process.returncode is None:
            with open(f"/proc/{process.pid}/status") as status:  # noqa: ASYNC230, PTH123 - /proc never waits
                peaks = [int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM:")]
            peak_mb = max([peak_mb, *peaks])  # none: it is a zombie by now
            await asyncio.sleep(_POLL_S)

    watching = asyncio.create_task(watch())
    async with asyncio.timeout(_CLIENT_TIMEOUT_S):
        out, err = await process.communicate()
    watching.cancel()
    await asyncio.wait({watching})
    return process.returncode or 0, (out or err).decode(), peak_mb


# ── what falls short ────────────────────────────────────────────────────────────────────────────────────────────


def shortfalls_of_plan(plan: Planned, rows: int) -> list[str]:
    """What a plan should have been and was not."""
    distinct = rows // 2
    checks = {
        f"{plan.seconds:.1f} s, and {LIMIT_S:.0f} s are the limit": plan.seconds < LIMIT_S,
        f"the command took {plan.client_mb:.0f} MB": plan.client_mb < LIMIT_MB,
        f"the service took {plan.service_mb:.0f} MB": plan.service_mb < LIMIT_MB,
        f"{plan.rows:,} rows of {rows:,}": plan.rows == rows,
        f"{plan.duplicates:,} duplicates": plan.duplicates == rows - distinct,
        f"{plan.cached:,} cached": plan.cached == cached_of(rows),
        f"{plan.to_generate:,} to generate": plan.to_generate == distinct - cached_of(rows),
    }
    return [f"plan on {plan.tier}: {text}" for text, is_right in checks.items() if not is_right]


def shortfalls_of_kills(killed: Killed, rows: int) -> list[str]:
    """What the runs should have come to and did not."""
    checks = {
        f"{killed.provider_calls:,} billed calls for {rows:,} pictures": killed.provider_calls == rows,
        f"{killed.provider_images:,} pictures": killed.provider_images == rows,
        f"{killed.duplicates_billed:,} prompts billed twice": not killed.duplicates_billed,
        f"{killed.settled_rows:,} settled rows of the ledger": killed.settled_rows == rows,
        f"ledger {killed.settled_microusd}, bill {killed.billed_microusd}": killed.settled_microusd
        == killed.billed_microusd,
        f"{killed.rows_with_an_outcome:,} rows with an outcome": killed.rows_with_an_outcome == rows,
    }
    return [f"kills: {text}" for text, is_right in checks.items() if not is_right]


def main(
    *,
    rows: Annotated[int, typer.Option(min=6, help="Rows of the plan.")] = PLANNED,
    killed_rows: Annotated[int, typer.Option(min=10, help="Rows of the job that is killed.")] = KILLED,
    seed: Annotated[int, typer.Option(help="Of the moments of the kills.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Plan a large warm-up on disk and on S3, and kill the client of another one."""
    plans = []
    for tier in (TierName.DISK, TierName.S3):
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            plans.append(asyncio.run(plan_on(tier, Path(directory), rows)))
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        killed = asyncio.run(killed_again_and_again(Path(directory), killed_rows, kills=KILLS, seed=seed))
    print_table(
        f"Planning {rows:,} rows",
        ("last tier", "s", "command MB", "service MB", "duplicates", "cached", "to generate"),
        [(p.tier, f"{p.seconds:.1f}", f"{p.client_mb:.0f}", f"{p.service_mb:.0f}", *_counts(p)) for p in plans],
    )
    print_table(
        f"{killed_rows:,} rows, the client killed {KILLS} times",
        ("", "figure"),
        [
            (name.replace("_", " "), f"{value:,.1f}" if name == "seconds" else f"{value:,}")
            for name, value in asdict(killed).items()
        ],
    )
    shortfalls = [line for plan in plans for line in shortfalls_of_plan(plan, rows)]
    shortfalls += shortfalls_of_kills(killed, killed_rows)
    print_verdict(shortfalls)
    result: dict[str, Any] = {"plans": [asdict(plan) for plan in plans], "killed": asdict(killed)}
    write_json(json_file, "warm_up", {**result, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


def _counts(plan: Planned) -> tuple[str, ...]:
    return tuple(f"{count:,}" for count in (plan.duplicates, plan.cached, plan.to_generate))


if __name__ == "__main__":
    typer.run(main)
