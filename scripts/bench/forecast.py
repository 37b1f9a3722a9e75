"""Whether `cacheserver estimate` forecasts what the service then does.

A request log (request_log.py) is forecast, and then asked for, row by row and in its order, of a service with the same
memory, its own Valkey and a directory; a provider's stand-in makes the pictures, all of about one size. Compared: the
share of rows that some tier answered, and that memory did. A caller that joined a load counts as a hit in memory: it
would have been one a moment later, and the log's rows do not come all at once.

The log spans less than Redis's lifetime, since what takes a day there takes minutes here. Against: both forecasts
within a point of what the service shows, and no call fails.

Needs `scripts/venv embedded dev`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.whatif.estimate import Assumed, TierFigures, estimate
from cacheserver.whatif.lines import LineFile
from cacheserver.whatif.logs import LogPlan
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.load import Stub, callers
from scripts.bench.request_log import Mix, requests
from scripts.bench.stand import ServiceProcess
from tests.provider import API_KEY, OpenAIStandIn

WITHIN = 0.01

_SPAN_S = 20 * 3_600.0
_PRODUCTS_PER_ROW = 0.3
_PICTURE_BYTES = 10_000
_IN_MEMORY = 0.02
"""Of the rows: so many pictures the memory holds."""
_CALLERS = 8
_DEADLINE_S = 120.0
_JOINED = "joined"
_UPSTREAM = "upstream"
_FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares of all rows, 0 to 1, as forecast and as they were; and how many rows each tier answered."""

    rows: int
    forecast_hit_rate: float
    hit_rate: float
    forecast_memory_rate: float
    memory_rate: float
    answers: dict[str, int]

    def shortfalls(self) -> Iterator[str]:
        """What is not as it should be."""
        if failed := self.answers.get(_FAILED, 0):
            yield f"{failed} calls failed"
        for name, forecast, real in (
            ("hits in all", self.forecast_hit_rate, self.hit_rate),
            ("hits in memory", self.forecast_memory_rate, self.memory_rate),
        ):
            if abs(forecast - real) > WITHIN:
                yield f"{name}: {100 * forecast:.2f} % were forecast, and {100 * real:.2f} % it was"


def figures(forecast: TierFigures, answers: Counter[str]) -> Figures:
    """What the forecast and the answers come to."""
    rows = answers.total()
    return Figures(
        rows=rows,
        forecast_hit_rate=forecast.hit_rate,
        hit_rate=1 - (answers[_UPSTREAM] + answers[_FAILED]) / rows,
        forecast_memory_rate=forecast.memory_rate,
        memory_rate=(answers["memory"] + answers[_JOINED]) / rows,
        answers=dict(answers),
    )


async def measure(rows: int, seed: int) -> Figures:
    """Forecast a log of so many rows, and have a service answer it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        memory_bytes = max(1_000_000, int(rows * _IN_MEMORY) * _PICTURE_BYTES)
        mix = Mix(rows=rows, span_s=_SPAN_S, products=max(1, int(rows * _PRODUCTS_PER_ROW)))
        # Without sizes: what the stand-in makes has as many pixels as its bytes need.
        log = [{name: value for name, value in row.items() if name != "size"} for row in requests(mix, seed)]
        file = directory / "log.jsonl"
        await asyncio.to_thread(file.write_text, "".join(json.dumps(row) + "\n" for row in log))
        assumed = Assumed(l1_bytes=(memory_bytes,), image_bytes=_PICTURE_BYTES)
        forecast = await asyncio.to_thread(estimate, LineFile(file), LogPlan(), assumed, workers=0)
        async with _service(directory / "service", memory_bytes) as stubs:
            answers = await _ask_all(stubs, log)
    return figures(forecast.tiers[0], answers)


@asynccontextmanager
async def _service(directory: Path, memory_bytes: int) -> AsyncIterator[list[Stub]]:
    async with OpenAIStandIn() as provider:
        provider.min_image_bytes = _PICTURE_BYTES
        config = (
            f'[[upstreams]]\nname = "stand-in"\nbase_url = "{provider.base_url}"\napi_key = "{API_KEY}"\n'
            f"[memory]\nmax_bytes = {memory_bytes}\n[disk]\nfsync = false\n"
        )
        async with ServiceProcess(directory, config) as service, callers(service.address, _CALLERS) as stubs:
            yield stubs


async def _ask_all(stubs: list[Stub], log: list[dict[str, Any]]) -> Counter[str]:
    """Every row once, each asked for when one before it is answered; which tiers answered."""
    answers: Counter[str] = Counter()
    left = iter(log)

    async def caller(stub: Stub) -> None:
        for row in left:
            answers[await _ask(stub, row)] += 1

    async with asyncio.TaskGroup() as group:
        for stub in stubs:
            group.create_task(caller(stub))
    return answers


async def _ask(stub: Stub, row: dict[str, Any]) -> str:
    settings = {name: row[name] for name in ("model", "quality") if name in row}
    spec = pb.ImageSpec(prompt=row["prompt"], **settings)
    try:
        response = await stub.GetImage(pb.GetImageRequest(spec=spec), timeout=_DEADLINE_S)
    except grpc.aio.AioRpcError:
        return _FAILED
    if response.status.collapsed:
        return _JOINED
    return pb.Tier.Name(response.status.tier).removeprefix("TIER_").lower()


def main(
    *,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the log.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed, another log.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
) -> None:
    """Compare a forecast with what the service does; exit code 1 if it is more than a point off."""
    result = asyncio.run(measure(rows, seed))
    print_table(
        f"{result.rows:,} rows",
        ("", "forecast", "service"),
        (
            ("hits in all", f"{100 * result.forecast_hit_rate:.2f} %", f"{100 * result.hit_rate:.2f} %"),
            ("hits in memory", f"{100 * result.forecast_memory_rate:.2f} %", f"{100 * result.memory_rate:.2f} %"),
        ),
    )
    print(", ".join(f"{tier} {count:,}" for tier, count in sorted(result.answers.items())))
    shortfalls = list(result.shortfalls())
    print_verdict(shortfalls)
    write_json(json_file, "forecast", asdict(result))
    sys.exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
