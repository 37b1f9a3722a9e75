"""What a hit costs where several worker processes serve one port, and how connections are spread over them.

    python -m scripts.bench.workers --json FILE

All are measured in turns, hits of a 4 KB picture on 64 new connections, one at a time on each, the processor time of
the supervisor counted too, and in two ways:

    own core    as many cores as processes: each core has one server process and a load generator with its share of the
                connections. One process so, its core shared with its callers; then two workers
    one core    all servers have one core together, the load generator the other: a bare server of grpc.aio that returns
                the same bytes (the floor), the service as one process, two such services side by side with 32
                connections each, and the service with two workers

Each turn with two workers tells how many calls each worker answered, by what each of them counted itself. Against: on
cores of their own a hit takes two workers at most 1.15 of the processor time it takes one process, and no turn's
connections are split worse than 60 to 40. On one core two processes find each other's work in its caches: what two
services take there that know nothing of each other says how much of that is the workers' doing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families

from cacheserver.app.state import RemoteState
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.hit_cost import cpu_s
from scripts.bench.hit_stage import SERVICE, Server, Stage, request
from tests.servers import S3Server

WORKERS = 2
MOST_OF_ONE = 1.15
WORST_SHARE = 0.6

_CONNECTIONS = 64
_PICTURE_BYTES = 4_000
_PROMPT = "a red fox"
_S3 = "s3__"


@dataclass(frozen=True, slots=True)
class Turn:
    """Microseconds of processor time that a hit took, by what answered; and the larger share of the two workers."""

    one_own_us: float
    two_own_us: float
    floor_us: float
    one_us: float
    apart_us: float
    two_us: float
    larger_share: float


@dataclass(frozen=True, slots=True)
class Result:
    """All turns, and their medians."""

    turns: tuple[Turn, ...]
    connections: int
    one_own_us: float
    two_own_us: float
    floor_us: float
    one_us: float
    apart_us: float
    two_us: float
    two_of_one_own: float
    two_of_one: float
    two_of_apart: float
    worst_share: float

    def shortfalls(self) -> list[str]:
        """What is not as it should be."""
        lines = []
        if self.two_of_one_own > MOST_OF_ONE:
            lines.append(f"two workers take {self.two_of_one_own:.2f} of one process, and not {MOST_OF_ONE} at most")
        if self.worst_share > WORST_SHARE:
            lines.append(f"a worker had {self.worst_share:.0%} of {self.connections} connections")
        return lines


def workers_of(pid: int) -> list[int]:
    """The workers of a supervisor."""
    children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in children if b"cacheserver.app.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


async def hits(directory: Path, worker: int) -> float:
    """How many hits a worker has counted."""
    page = (await RemoteState(directory / "workers" / f"{worker}.sock").metrics()).decode()
    samples = [each for family in text_string_to_metric_families(page) for each in family.samples]
    wanted = (each for each in samples if each.name == "cacheserver_requests_total")
    return sum(each.value for each in wanted if each.labels["outcome"] == "hit")


async def load(  # noqa: PLR0913 - what to load, and how
    server: Server,
    pids: Sequence[int],
    body: Path,
    *,
    token: str,
    calls: int,
    connections: int = _CONNECTIONS,
    core: int | None = None,
) -> float:
    """Make the calls, on new connections: the processor time each took, in microseconds.

    With `core` they are made there, and else where we are.
    """
    log_file = body.with_name(f"log-{server.pid}-{core}")
    options = {"--method": f"{SERVICE}GetImage", "--log-file": str(log_file), "--token": token}
    numbers = {"--calls": str(calls), "--at-a-time": str(connections)}
    argv = [word for option in (options | numbers).items() for word in option]
    before_s = sum(map(cpu_s, pids))
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "scripts.bench.grpc_load",
        server.address,
        str(body),
        *argv,
        stdout=asyncio.subprocess.PIPE,
    )
    if core is not None:
        os.sched_setaffinity(program.pid, {core})
    await program.communicate()
    if program.returncode:
        raise RuntimeError("the load generator failed: its words are above")
    return 1e6 * (sum(map(cpu_s, pids)) - before_s) / calls


def settings_of(s3: S3Server, workers: int) -> dict[str, object]:
    """Further settings of a service on this S3."""
    where = {"bucket": s3.bucket, "endpoint": s3.endpoint, "access_key": s3.access_key, "secret_key": s3.secret_key}
    return {"server__workers": workers, **{f"{_S3}{name}": value for name, value in where.items()}}


async def measure(*, turns: int, calls: int) -> Result:
    """Start everything and measure in turns."""
    async with Stage() as stage:
        s3 = await stage.s3()
        one = await stage.service(**settings_of(s3, 1), s3__prefix="one/")
        two = await stage.service(**settings_of(s3, WORKERS), s3__prefix="two/")
        other = await stage.service(**settings_of(s3, 1), s3__prefix="other/")
        directory = stage.directory / "service-1"
        workers = workers_of(two.pid)
        both = (stage.cores.server, stage.cores.other)
        for service in (one, two, other):
            await stage.put(service, {_PROMPT: _PICTURE_BYTES})
        asked = request(_PROMPT)
        answer = stage.file("answer", await stage.hit(one, asked))
        body = stage.file("body", [asked.SerializeToString()])
        pids, half = [two.pid, *workers], {"calls": calls // 2, "connections": _CONNECTIONS // 2}
        shares: list[float] = []

        async def by_two(*loads: Mapping[str, int]) -> float:
            """What a hit takes two workers under these loads at the same time."""
            before_s, before = sum(map(cpu_s, pids)), [await hits(directory, worker) for worker in range(WORKERS)]
            await asyncio.gather(*(load(two, [], body, token=stage.token, **each) for each in loads))
            us = 1e6 * (sum(map(cpu_s, pids)) - before_s) / calls
            after = [await hits(directory, worker) for worker in range(WORKERS)]
            answered = [now - then for now, then in zip(after, before, strict=True)]
            if sum(answered) != calls:
                raise RuntimeError(f"the workers counted {sum(answered):.0f} hits of {calls}")
            shares.append(max(answered) / calls)
            return us

        measured = []
        async with stage.floor(answer, "GetImage") as floor:
            for server in (one, other, two, floor):  # what comes first is not like the others
                await load(server, [server.pid], body, token=stage.token, calls=20 * _CONNECTIONS)
            for _ in range(turns):
                for pid, core in zip(workers, both, strict=True):
                    stage.cores.pin(pid, core)
                one_own_us = await load(one, [one.pid], body, token=stage.token, calls=calls, core=both[0])
                two_own_us = await by_two(*({**half, "core": core} for core in both))
                for pid in workers:
                    stage.cores.pin(pid)
                floor_us = await load(floor, [floor.pid], body, token=stage.token, calls=calls)
                one_us = await load(one, [one.pid], body, token=stage.token, calls=calls)
                apart = (load(each, [each.pid], body, token=stage.token, **half) for each in (one, other))
                apart_us = statistics.mean(await asyncio.gather(*apart))
                two_us = await by_two({"calls": calls})
                measured.append(Turn(one_own_us, two_own_us, floor_us, one_us, apart_us, two_us, max(shares[-2:])))
    return Result(
        turns=tuple(measured),
        connections=_CONNECTIONS,
        one_own_us=statistics.median(turn.one_own_us for turn in measured),
        two_own_us=statistics.median(turn.two_own_us for turn in measured),
        floor_us=statistics.median(turn.floor_us for turn in measured),
        one_us=statistics.median(turn.one_us for turn in measured),
        apart_us=statistics.median(turn.apart_us for turn in measured),
        two_us=statistics.median(turn.two_us for turn in measured),
        two_of_one_own=statistics.median(turn.two_own_us / turn.one_own_us for turn in measured),
        two_of_one=statistics.median(turn.two_us / turn.one_us for turn in measured),
        two_of_apart=statistics.median(turn.two_us / turn.apart_us for turn in measured),
        worst_share=max(turn.larger_share for turn in measured),
    )


def main(
    *,
    turns: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 7,
    calls: Annotated[int, typer.Option(min=_CONNECTIONS, help="Hits in a turn; a multiple of 64.")] = 6_400,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
) -> None:
    """Measure; exit code 1 if a figure falls short."""
    result = asyncio.run(measure(turns=turns, calls=calls))
    print_table(
        f"processor time of a hit in microseconds, {_CONNECTIONS} connections",
        ("", "own core: one", "two workers", "one core: floor", "one", "two services", "two workers", "larger share"),
        [
            *(_row(str(number), turn, turn.larger_share) for number, turn in enumerate(result.turns, start=1)),
            _row("median", result, result.worst_share),
        ],
    )
    print(f"on cores of their own two workers take {result.two_of_one_own:.2f} of one process")
    print(f"on one core {result.two_of_one:.2f} of one process, {result.two_of_apart:.2f} of two services")
    shortfalls = result.shortfalls()
    print_verdict(shortfalls)
    write_json(json_file, "workers", asdict(result))
    sys.exit(bool(shortfalls))


def _row(name: str, figures: Turn | Result, share: float) -> tuple[str, ...]:
    times = (figures.one_own_us, figures.two_own_us, figures.floor_us, figures.one_us, figures.apart_us, figures.two_us)
    return name, *(f"{us:.0f}" for us in times), f"{share:.1%}"


if __name__ == "__main__":
    typer.run(main)
