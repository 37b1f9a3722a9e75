"""How fast pictures come in from elsewhere, and that each is stored once though the importer is killed on the way.

    .venv/bin/python -m scripts.bench.imports                          # 100,000 rows into a directory, with fsync
    .venv/bin/python -m scripts.bench.imports --tier s3 --rows 10000   # into an S3 server of our own

The importer (`cacheserver import`) is killed by SIGKILL three times, at a quarter, a half and three quarters of the
rows, and run again. Then the last tier is listed: every picture has to be there, and none twice. Of a sample every
GetImage has to bring the right bytes, and no upstream may have been called.
"""

from __future__ import annotations

import asyncio
import hashlib
import json as json_format
import signal
import sys
import tempfile
import time
import zlib
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated, BinaryIO, Literal

import typer

from cacheserver.client import AsyncClient
from scripts.bench.figures import BusyCores, print_table, print_verdict, write_json
from scripts.bench.stand import ServiceProcess
from tests.provider import small_image

LEAST_PER_S = {"disk": 300.0, "s3": 0.0}
"""Rows a second that each tier has to take; S3 is only measured, as its server shares the machine."""

_CONFIG = {"disk": "", "s3": "[s3]\nlocal = true\nread_timeout_s = 30\n"}
"""S3 is given time: on a busy machine it answers late, and that is not what is measured."""
_TEXT_BYTES = 700
_POLL_S = 0.05
_TIMEOUT_S = 3_600.0
_AT_ONCE = 16
_IMPORT = "from cacheserver.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Scale:
    """How many pictures, how often the importer is killed, and how many are asked for afterwards."""

    rows: int
    kills: int
    sample: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of it. `seconds` are those of all runs of the importer, `busy_cores` the machine's meanwhile."""

    tier: str
    rows: int
    kills: int
    missed_kills: int
    seconds: float
    rows_per_s: float
    busy_cores: float
    stored: int
    missing: int
    twice: int
    asked: int
    wrong: int
    upstream_calls: int

    def shortfalls(self) -> list[str]:
        """What is not as it should be."""
        found = []
        if self.stored != self.rows or self.missing:
            found.append(f"{self.stored} of {self.rows} pictures are stored, {self.missing} are missing")
        if self.missed_kills:
            found.append(f"the importer had ended {self.missed_kills} times before it was killed: take more rows")
        if self.twice:
            found.append(f"{self.twice} pictures are stored more than once")
        if self.wrong:
            found.append(f"{self.wrong} of {self.asked} GetImage brought wrong bytes")
        if self.upstream_calls:
            found.append(f"{self.upstream_calls} calls went upstream")
        if self.rows_per_s < LEAST_PER_S[self.tier]:
            found.append(f"{self.rows_per_s:.0f} rows a second, not {LEAST_PER_S[self.tier]:.0f}")
        return found


def picture(number: int) -> bytes:
    """A valid PNG of about a kilobyte, another one for every number, at the cost of one checksum."""
    text = b"number\0" + f"{number:012}".encode().ljust(_TEXT_BYTES, b".")
    chunk = b"tEXt" + text
    return _HEAD + len(text).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + _TAIL


_BASE = small_image(1)
_HEAD, _TAIL = _BASE[:-12], _BASE[-12:]
"""What stands before and in the last chunk of a PNG, which is empty."""


def prompt(number: int) -> str:
    """What the picture of this number answers."""
    return f"A picture bought elsewhere, number {number}"


def write_manifest(directory: Path, rows: int) -> Path:
    """A manifest of so many rows, and their pictures beside it, in a new directory."""
    directory.mkdir()
    file = directory / "manifest.jsonl"
    with file.open("w") as manifest:
        for number in range(rows):
            source = f"{number // 1000}/{number}.png"
            if number % 1000 == 0:
                (directory / f"{number // 1000}").mkdir()
            data = picture(number)
            (directory / source).write_bytes(data)
            row = {
                "spec": {"prompt": prompt(number)},
                "source": source,
                "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
                "cost_usd": 0.04,
            }
            manifest.write(json_format.dumps(row) + "\n")
    return file


async def import_killed(address: str, manifest: Path, *, rows: int, kills: int) -> tuple[float, int]:
    """Import, killing the importer so many times on the way and running it again; seconds, and kills that met it.

    Raises:
        RuntimeError: a run that was not killed failed.
    """
    began_s = time.monotonic()
    result = manifest.with_name("result")
    killed = 0
    for kill in range(1, kills + 1):
        importer = await _importer(address, manifest, result)
        killing = asyncio.create_task(_kill_at(importer, result, lines=rows * kill // (kills + 1)))
        killed += await importer.wait() == -signal.SIGKILL
        await killing
    importer = await _importer(address, manifest, result)
    output, errors = await importer.communicate()
    if importer.returncode:
        raise RuntimeError(f"{output.decode()}{errors.decode()}")
    return time.monotonic() - began_s, killed


async def _importer(address: str, manifest: Path, result: Path) -> Process:
    words = ("import", str(manifest), "--result", str(result), "--address", address)
    return await asyncio.create_subprocess_exec(sys.executable, "-c", _IMPORT, *words, stdout=PIPE, stderr=PIPE)


async def _kill_at(importer: Process, result: Path, *, lines: int) -> None:
    """Kill the importer as soon as its result file has so many lines; it has ended in any case after that."""
    seen = 0
    async with asyncio.timeout(_TIMEOUT_S):
        while not await asyncio.to_thread(result.exists):  # noqa: ASYNC110 - in another process
            await asyncio.sleep(_POLL_S)
    with result.open("rb") as file:
        async with asyncio.timeout(_TIMEOUT_S):
            while importer.returncode is None:
                seen += await asyncio.to_thread(_count_lines, file)
                if seen >= lines:
                    importer.kill()
                    return
                await asyncio.sleep(_POLL_S)


def _count_lines(file: BinaryIO) -> int:
    return file.read().count(b"\n")


async def measure(address: str, manifest: Path, scale: Scale, *, tier: str) -> Figures:
    """Import the manifest into the service at `address`, and look at what it has."""
    rows, busy = scale.rows, BusyCores()
    seconds, killed = await import_killed(address, manifest, rows=rows, kills=scale.kills)
    busy_cores = busy.read()
    async with AsyncClient(address) as client:
        stored = Counter([each.image.digest async for each in client.admin.list_images()])
        expected = {f"sha256:{hashlib.sha256(picture(number)).hexdigest()}" for number in range(rows)}
        asked = Random(1).sample(range(rows), min(scale.sample, rows))  # noqa: S311 - picks pictures
        wrong = await _wrong(client, asked)
        upstream_calls = (await client.stats()).upstream_calls
    return Figures(
        tier=tier,
        rows=rows,
        kills=killed,
        missed_kills=scale.kills - killed,
        seconds=seconds,
        rows_per_s=rows / seconds,
        busy_cores=busy_cores,
        stored=stored.total(),
        missing=len(expected - stored.keys()),
        twice=sum(count > 1 for count in stored.values()),
        asked=len(asked),
        wrong=wrong,
        upstream_calls=upstream_calls,
    )


async def _wrong(client: AsyncClient, numbers: Sequence[int]) -> int:
    """How many of these pictures do not come as they are."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def is_wrong(number: int) -> bool:
        async with places:
            return (await client.get_image(prompt(number))).data != picture(number)

    return sum(await asyncio.gather(*(is_wrong(number) for number in numbers)))


async def run(scale: Scale, *, tier: str) -> Figures:
    """The whole bench, with a service of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        manifest = await asyncio.to_thread(write_manifest, Path(directory) / "pictures", scale.rows)
        async with ServiceProcess(Path(directory) / "service", _CONFIG[tier]) as service:
            return await measure(service.address, manifest, scale, tier=tier)


def main(
    *,
    tier: Annotated[Literal["disk", "s3"], typer.Option(help="The last tier.")] = "disk",
    rows: Annotated[int, typer.Option(min=10, help="Pictures to import.")] = 100_000,
    kills: Annotated[int, typer.Option(min=0, help="How often the importer is killed.")] = 3,
    sample: Annotated[int, typer.Option(min=1, help="Pictures asked for afterwards.")] = 1_000,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Time an import, and count what became of it."""
    figures = asyncio.run(run(Scale(rows, kills, sample), tier=tier))
    print_table(
        f"{rows:,} pictures into {tier}, the importer killed {kills} times",
        ("", "seconds", "rows/s", "busy cores", "stored", "missing", "twice", "asked", "wrong", "upstream calls"),
        [
            (
                tier,
                f"{figures.seconds:.1f}",
                f"{figures.rows_per_s:.0f}",
                f"{figures.busy_cores:.2f}",
                f"{figures.stored:,}",
                f"{figures.missing:,}",
                f"{figures.twice:,}",
                f"{figures.asked:,}",
                f"{figures.wrong:,}",
                f"{figures.upstream_calls:,}",
            )
        ],
    )
    print_verdict(figures.shortfalls())
    write_json(json, "imports", {**asdict(figures), "shortfalls": figures.shortfalls()})
    raise typer.Exit(bool(figures.shortfalls()))


if __name__ == "__main__":
    typer.run(main)
