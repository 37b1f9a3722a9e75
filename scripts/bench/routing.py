"""What Envoy's routing is worth: a trace through three replicas behind it, against one with the memory of all three.

TRACE is a CSV with the columns prompt_id, quality and size_bytes. A share of its prompts is replayed, all requests of
each and in their order, with pictures of a hundredth of their size and nothing below L1, which takes a tenth of the
distinct pictures' bytes: one replica alone, then three with a third of it each, by `scripts/deploy/envoy.yaml`. Then
one of three that have memory for all is killed: what others answered before and still do has not moved. Against:

    the three answer at least 0.95 as many from memory as the one
    at most 40 % of the keys move when one of three is gone
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import hashlib
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from cacheserver.client import AsyncClient, TierName
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.stand import ServiceProcess
from tests.provider import API_KEY, OpenAIStandIn
from tests.servers import EnvoyProxy

REPLICAS = 3
LEAST_SHARE = 0.95
MOST_MOVED = 0.4
SMALLER = 100
"""Pictures have this fraction of their size."""

L1_SHARE = 0.1
"""L1 in all, as a share of all distinct pictures' bytes."""

_ENTRY_BYTES = 1_000
"""What memory holds of a picture beside its bytes."""

_AT_A_TIME = 8
_RESULTS = Path(__file__).parent / "results" / "routing.json"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its prompt, which stands for the trace's prompt and quality, and the size of its picture."""

    prompt: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured. `hits_…` are answers from memory, of `requests`; `moved` of `keys` asked for again."""

    requests: int
    distinct: int
    memory_bytes: int
    hits_one: int
    hits_three: int
    keys: int
    moved: int

    @property
    def share(self) -> float:
        """The hits of the three, of those of the one."""
        return self.hits_three / self.hits_one if self.hits_one else 0.0

    def shortfalls(self) -> list[str]:
        """What is not as it should be."""
        lines = []
        if self.share < LEAST_SHARE:
            lines.append(f"three replicas had {self.share:.3f} of the hits of one, and not {LEAST_SHARE}")
        if not 0 < self.moved <= MOST_MOVED * self.keys:
            lines.append(f"{self.moved} of {self.keys} keys moved, and not more than none and at most {MOST_MOVED:.0%}")
        return lines


def read(trace: Path, *, one_in: int) -> list[Asked]:
    """The requests for one in so many of the trace's prompts."""
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
        rows = [row for row in csv.DictReader(file) if _draw(row["prompt_id"]) % one_in == 0]
    sizes: dict[str, int] = {}  # a picture has the size it was first asked for in
    return [
        Asked(prompt, sizes.setdefault(prompt, max(1, int(row["size_bytes"]) // SMALLER)))
        for row in rows
        for prompt in [f"picture {row['prompt_id']} in {row['quality']} quality"]
    ]


def _draw(prompt_id: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8])


def memory_of(asked: Iterable[Asked]) -> int:
    """The bytes of all distinct pictures, with what memory holds beside them."""
    return sum(size + _ENTRY_BYTES for size in {each.prompt: each.size_bytes for each in asked}.values())


@asynccontextmanager
async def _replicas(
    directory: Path, name: str, count: int, memory_bytes: int, provider: OpenAIStandIn
) -> AsyncIterator[list[ServiceProcess]]:
    config = (
        f'tiers = ["memory"]\ndurability = "write-through"\n[memory]\nmax_bytes = {memory_bytes // count}\n'
        '[redis]\nembedded = false\n[log]\nlevel = "warning"\n[accounting]\nenabled = false\n'
        # The provider keeps no limits, and is to be none here.
        "[limit_groups.openai]\nimages_per_minute = 1_000_000\nrequests_per_minute = 1_000_000\nburst_s = 60\n"
    )
    environment = {"OPENAI_API_KEY": API_KEY, "OPENAI_BASE_URL": provider.base_url}
    async with AsyncExitStack() as stack:
        services = [ServiceProcess(directory / f"{name}-{n}", config, environment=environment) for n in range(count)]
        for service in services:
            await stack.enter_async_context(service)
        yield services


@asynccontextmanager
async def _proxied(directory: Path, services: Sequence[ServiceProcess]) -> AsyncIterator[EnvoyProxy]:
    await asyncio.to_thread(directory.mkdir)
    proxy = EnvoyProxy(directory, [service.address for service in services])
    await asyncio.to_thread(proxy.start)
    try:
        yield proxy
    finally:
        await asyncio.to_thread(proxy.kill)


async def _ask(address: str, prompts: Iterable[str]) -> Counter[TierName | None]:
    """Ask for these pictures, a few at a time: how many each tier answered."""
    tiers: Counter[TierName | None] = Counter()
    waiting = iter(prompts)

    async def work(client: AsyncClient) -> None:
        for prompt in waiting:
            tiers[(await client.get_image(prompt)).tier] += 1

    async with AsyncClient(address) as client, asyncio.TaskGroup() as workers:
        for _ in range(_AT_A_TIME):
            workers.create_task(work(client))
    return tiers


async def measure(asked: Sequence[Asked], *, keys: int) -> Figures:
    """All figures."""
    memory_bytes = int(L1_SHARE * memory_of(asked))
    prompts = [each.prompt for each in asked]
    some = list(itertools.islice(dict.fromkeys(prompts), keys))
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        provider = await stack.enter_async_context(OpenAIStandIn())
        provider.image_bytes_of = {each.prompt: each.size_bytes for each in asked}
        async with _replicas(directory, "alone", 1, memory_bytes, provider) as (one,):
            hits_one = (await _ask(one.address, prompts))[TierName.MEMORY]
        async with (
            _replicas(directory, "three", REPLICAS, memory_bytes, provider) as three,
            _proxied(directory / "envoy", three) as envoy,
        ):
            hits_three = (await _ask(envoy.address, prompts))[TierName.MEMORY]
        async with (
            _replicas(directory, "roomy", REPLICAS, 1 << 30, provider) as roomy,
            _proxied(directory / "envoy-roomy", roomy) as envoy,
        ):
            await _ask(envoy.address, some)
            if stray := (await _ask(envoy.address, some))[TierName.UPSTREAM]:
                raise RuntimeError(f"{stray} of {len(some)} keys went to another replica while none had gone")
            await roomy[0].kill()
            moved = (await _ask(envoy.address, some))[TierName.UPSTREAM]
    return Figures(
        requests=len(asked),
        distinct=len(set(prompts)),
        memory_bytes=memory_bytes,
        hits_one=hits_one,
        hits_three=hits_three,
        keys=len(some),
        moved=moved,
    )


def main(
    trace: Annotated[Path, typer.Argument(help="The trace, CSV, plain or gzip.", exists=True, dir_okay=False)],
    *,
    one_in: Annotated[int, typer.Option(min=1, help="Replay one in so many prompts.")] = 12,
    keys: Annotated[int, typer.Option(min=1, help="Keys of which is seen whether they move.")] = 1_000,
    json: Annotated[Path, typer.Option(help="File for the figures.")] = _RESULTS,
) -> None:
    """Envoy's routing over three replicas against one with their memory, and what moves when one is gone."""
    asked = read(trace, one_in=one_in)
    if not asked:
        sys.exit("The trace has no request for these prompts: a smaller --one-in replays more of them.")
    figures = asyncio.run(measure(asked, keys=keys))
    print_table(
        f"{figures.requests:,} requests for {figures.distinct:,} pictures, L1 {figures.memory_bytes:,} bytes in all",
        ("replicas", "hits", "of all requests"),
        [
            (name, f"{hits:,}", f"{hits / figures.requests:.1%}")
            for name, hits in (("one", figures.hits_one), ("three behind Envoy", figures.hits_three))
        ],
    )
    print(f"{figures.moved} of {figures.keys} keys moved when one of three was gone.")
    shortfalls = figures.shortfalls()
    print_verdict(shortfalls)
    write_json(json, "routing", {**asdict(figures), "share": figures.share, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
