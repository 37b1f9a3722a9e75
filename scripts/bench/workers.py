"""What a hit costs where several worker processes serve one port, and how connections are spread over them.

    python -m scripts.bench.workers --json FILE

All servers have one core together and are measured in turns, hits of a 4 KB picture on 64 new connections, one at a
time on each: a bare server of grpc.aio that returns the same bytes (the floor), the service as one process, two such
services side by side with 32 connections each, and the service with two workers, whose supervisor's processor time
counts too. Each turn of the last tells how many calls each worker answered, by what each of them counted itself. The
load generator has the other core.

Against: with two workers a hit takes at most 1.15 of the processor time it takes with one process, and no turn's
connections are split worse than 60 to 40. What two services take that know nothing of each other says how much of the
first is the workers' doing: where two processes share a core each finds its caches cold.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Sequence
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
    floor_us: float
    one_us: float
    apart_us: float
    two_us: float
    two_of_one: float
    two_of_apart: float
    worst_share: float

    def shortfalls(self) -> list[str]:
        """What is not as it should be."""
        lines = []
        if self.two_of_one > MOST_OF_ONE:
            lines.append(
                f"two workers take {self.two_of_one:.2f} of one process, and not {MOST_OF_ONE} at most (and "
                f"{self.two_of_apart:.2f} of two services on the same core)"
            )
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
    server: Server, pids: Sequence[int], body: Path, *, token: str, calls: int, connections: int = _CONNECTIONS
) -> float:
    """Make the calls, on new connections: the processor time each took, in microseconds."""
    log_file = body.with_name(f"log-{server.pid}")
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
        for pid in workers:
            stage.cores.pin(pid)
        for service in (one, two, other):
            await stage.put(service, {_PROMPT: _PICTURE_BYTES})
        asked = request(_PROMPT)
        answer = stage.file("answer", await stage.hit(one, asked))
        body = stage.file("body", [asked.SerializeToString()])
        measured = []
        async with stage.floor(answer, "GetImage") as floor:
            pids = [two.pid, *workers]
            for server in (one, other, two, floor):  # what comes first is not like the others
                await load(server, [server.pid], body, token=stage.token, calls=20 * _CONNECTIONS)
            for _ in range(turns):
                floor_us = await load(floor, [floor.pid], body, token=stage.token, calls=calls)
                one_us = await load(one, [one.pid], body, token=stage.token, calls=calls)
                half = {"calls": calls // 2, "connections": _CONNECTIONS // 2}
                apart = (load(each, [each.pid], body, token=stage.token, **half) for each in (one, other))
                apart_us = statistics.mean(await asyncio.gather(*apart))
                before = [await hits(directory, worker) for worker in range(WORKERS)]
                two_us = await load(two, pids, body, token=stage.token, calls=calls)
                after = [await hits(directory, worker) for worker in range(WORKERS)]
                answered = [now - then for now, then in zip(after, before, strict=True)]
                if sum(answered) != calls:
                    raise RuntimeError(f"the workers counted {sum(answered):.0f} hits of {calls}")
                measured.append(Turn(floor_us, one_us, apart_us, two_us, max(answered) / calls))
    return Result(
        turns=tuple(measured),
        connections=_CONNECTIONS,
        floor_us=statistics.median(turn.floor_us for turn in measured),
        one_us=statistics.median(turn.one_us for turn in measured),
        apart_us=statistics.median(turn.apart_us for turn in measured),
        two_us=statistics.median(turn.two_us for turn in measured),
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
        ("", "floor", "one process", "two services", "two workers", "larger share"),
        [
            *(_row(str(number), turn, turn.larger_share) for number, turn in enumerate(result.turns, start=1)),
            _row("median", result, result.worst_share),
        ],
    )
    print(f"two workers take {result.two_of_apart:.2f} of two services, {result.two_of_one:.2f} of one process")
    shortfalls = result.shortfalls()
    print_verdict(shortfalls)
    write_json(json_file, "workers", asdict(result))
    sys.exit(bool(shortfalls))


def _row(name: str, figures: Turn | Result, share: float) -> tuple[str, ...]:
    times = (figures.floor_us, figures.one_us, figures.apart_us, figures.two_us)
    return name, *(f"{us:.0f}" for us in times), f"{share:.1%}"


if __name__ == "__main__":
    typer.run(main)
