"""One turn of calls: a load generator in a process of its own, and what the server did meanwhile.

Same bodies come from h2load, bodies of their own from grpc_load. Both write down when each call was answered, so that
the server's processor time can be held against the calls that were answered in just that time: neither the making of
connections nor the end, when some are done earlier than others, is counted.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.bench import h2load
from scripts.bench.hit_cost import cpu_s

_ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_EVERY_S = 0.025
_MOST_CONNECTIONS = 32
_WARM_UP = 0.25
_COOL_DOWN = 0.1
_SHOWN = 500


class TooSoonError(RuntimeError):
    """A turn was over before anything could be measured."""


@dataclass(frozen=True, slots=True)
class Call:
    """A unary call as it is made again and again.

    Args:
        method: path of the rpc, `/package.Service/Method`.
        bodies_file: holds the messages to send, each with gRPC's prefix: one that is sent each time, or several.
        answer_bytes: what each right answer brings, prefixes included.
        token: sent as a bearer token.
        slack_bytes: by which an answer may differ, if it holds a time.
        is_one: whether there is one body.
        skew: exponent of Zipf's law by which several are drawn; 0: each connection has its own.
    """

    method: str
    bodies_file: Path
    answer_bytes: int
    token: str
    slack_bytes: int = 0
    is_one: bool = True
    skew: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """How many calls there are at a time: so many `streams` on each of so many `connections`."""

    connections: int
    streams: int = 1

    @staticmethod
    def of(at_a_time: int) -> Load:
        """Each on a connection of its own, up to 32; above, they share so many."""
        connections = min(at_a_time, _MOST_CONNECTIONS)
        return Load(connections, at_a_time // connections)


@dataclass(frozen=True, slots=True)
class Answered:
    """One call that was answered: when, in seconds since 1970, and after how many microseconds."""

    at_s: float
    us: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Processor time of the server so far, and when that was read, in seconds since 1970."""

    at_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Taken:
    """What was measured of a server in one turn.

    Args:
        calls: answered in the time that was looked at.
        seconds: how long that was.
        cpu_s: processor time of the server meanwhile.
        us: how long each call took, in microseconds.
    """

    calls: int
    seconds: float
    cpu_s: float
    us: Sequence[float]


async def ask(call: Call, address: str, pid: int, *, calls: int, load: Load) -> Taken:
    """Make `calls` of it to the server at `address`, process `pid`; RuntimeError if any is answered otherwise."""
    with tempfile.TemporaryDirectory(prefix="calls-") as directory:
        log_file = Path(directory) / "calls"
        if call.is_one:
            headers = ("content-type: application/grpc", "te: trailers", f"authorization: Bearer {call.token}")
            argv = h2load.command(
                f"http://{address}{call.method}",
                headers=headers,
                body_file=call.bodies_file,
                log_file=log_file,
                counts={"-n": calls, "-c": load.connections, "-m": load.streams},
            )
        else:
            argv = _each_its_own(call, address, calls, load.connections * load.streams, log_file)
        out, samples = await _watched(argv, pid)
        received = h2load.bytes_received(out, calls) if call.is_one else int(out)
        if abs(received - calls * call.answer_bytes) > calls * call.slack_bytes:
            raise RuntimeError(
                f"{calls} answers of {call.answer_bytes} bytes brought {received}: some were of another kind"
            )
        return within(read_log(log_file.read_text()), samples)


def _each_its_own(call: Call, address: str, calls: int, at_a_time: int, log_file: Path) -> list[str]:
    options = {
        "--method": call.method,
        "--token": call.token,
        "--calls": calls,
        "--at-a-time": at_a_time,
        "--skew": call.skew,
        "--log-file": log_file,
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "scripts.bench.grpc_load", address, str(call.bodies_file), *words]


async def _watched(argv: Sequence[str], pid: int) -> tuple[str, list[Sample]]:
    """Run a program: what it prints, and how the processor time of process `pid` and of its own ones grew meanwhile."""
    pids = [pid, *_children(pid)]
    process = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, cwd=_ROOT)
    ending = asyncio.create_task(process.communicate(), name="load")
    try:
        samples = [_sample(pids)]
        while not ending.done():
            await asyncio.wait({ending}, timeout=_SAMPLE_EVERY_S)
            samples.append(_sample(pids))
        out, err = ending.result()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"{argv[0]} ended with {process.returncode}: {err.decode(errors='replace')[-_SHOWN:]}")
    return out.decode(), samples


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _sample(pids: Sequence[int]) -> Sample:
    return Sample(time.time(), sum(map(cpu_s, pids)))


def read_log(text: str) -> list[Answered]:
    """The calls of a log file, in the order they were answered."""
    rows = (map(int, line.split("\t")) for line in text.splitlines())
    return sorted((Answered((start_us + us) / 1e6, us) for start_us, _, us in rows), key=lambda each: each.at_s)


def within(answered: Sequence[Answered], samples: Sequence[Sample]) -> Taken:
    """What happened between two samples, the first after the warm-up and the last before calls became fewer."""
    begin_s = answered[int(len(answered) * _WARM_UP)].at_s
    end_s = answered[int((len(answered) - 1) * (1 - _COOL_DOWN))].at_s
    inside = [sample for sample in samples if begin_s <= sample.at_s <= end_s]
    if len(inside) < 2:  # noqa: PLR2004 - a beginning and an end
        raise TooSoonError(f"{len(answered)} calls are over too soon to measure them: make it more")
    first, last = inside[0], inside[-1]
    counted = [each.us for each in answered if first.at_s < each.at_s <= last.at_s]
    return Taken(len(counted), last.at_s - first.at_s, last.cpu_s - first.cpu_s, counted)
