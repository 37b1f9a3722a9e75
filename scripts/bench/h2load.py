"""Driving h2load, a load generator in C, over gRPC: one unary call again and again, and what came of it.

h2load knows nothing of gRPC: it sends the same body each time, and a call that failed is to it an answer like any
other. So the bytes it received are held against those that the right answers have.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.bench.hit_cost import cpu_s

MISSING = "h2load is not installed: it comes with Debian's nghttp2-client (apt-get install nghttp2-client)"

_SAMPLE_EVERY_S = 0.025
_MOST_CONNECTIONS = 32
_WARM_UP = 0.25
_COOL_DOWN = 0.1
_WRONG_SHOWN = 500


@dataclass(frozen=True, slots=True)
class Call:
    """A unary call as it is sent each time.

    Args:
        method: path of the rpc, `/package.Service/Method`.
        body_file: holds the message with gRPC's prefix.
        answer_bytes: what each right answer brings, prefixes included.
        token: sent as a bearer token.
        slack_bytes: by which an answer may differ, if it holds a time.
    """

    method: str
    body_file: Path
    answer_bytes: int
    token: str
    slack_bytes: int = 0


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


def is_installed() -> bool:
    """Whether there is an h2load."""
    return shutil.which("h2load") is not None


async def ask(call: Call, address: str, pid: int, *, calls: int, load: Load) -> Taken:
    """Make `calls` of it to the server at `address`, which is process `pid`; RuntimeError if any is answered otherwise.

    Neither the first nor the last calls count: connections are made in the first
    quarter, and in the last tenth some are done earlier than others.
    """
    with tempfile.TemporaryDirectory(prefix="h2load-") as directory:
        log_file = Path(directory) / "calls"
        process = await asyncio.create_subprocess_exec(
            *_command(call, address, calls, load, log_file), stdin=DEVNULL, stdout=PIPE, stderr=PIPE
        )
        ending = asyncio.create_task(process.communicate(), name="h2load")
        try:
            samples = [_sample(pid)]
            while not ending.done():
                await asyncio.wait({ending}, timeout=_SAMPLE_EVERY_S)
                samples.append(_sample(pid))
            out, err = ending.result()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise RuntimeError(
                f"h2load ended with {process.returncode}: {err.decode(errors='replace')[-_WRONG_SHOWN:]}"
            )
        check(out.decode(), calls=calls, answer_bytes=call.answer_bytes, slack_bytes=call.slack_bytes)
        return within(read_log(log_file.read_text()), samples)


def _command(call: Call, address: str, calls: int, load: Load, log_file: Path) -> list[str]:
    headers = ("content-type: application/grpc", "te: trailers", f"authorization: Bearer {call.token}")
    counts = {"-n": calls, "-c": load.connections, "-m": load.streams}
    options = [str(word) for option in counts.items() for word in option]
    for header in headers:
        options += ["-H", header]
    return [
        "h2load",
        *options,
        "-d",
        str(call.body_file),
        "--log-file",
        str(log_file),
        f"http://{address}{call.method}",
    ]


def _sample(pid: int) -> Sample:
    return Sample(time.time(), cpu_s(pid))


_REQUESTS = re.compile(r"^requests: .*\b(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout$", re.MULTILINE)
_DATA = re.compile(r"^traffic: .*\((\d+)\) data$", re.MULTILINE)


def check(out: str, *, calls: int, answer_bytes: int, slack_bytes: int = 0) -> None:
    """Raise RuntimeError unless h2load says that every call was answered, with as many bytes as it should."""
    requests, data = _REQUESTS.search(out), _DATA.search(out)
    if requests is None or data is None:
        raise RuntimeError(f"h2load said nothing that could be read: {out[-_WRONG_SHOWN:]}")
    succeeded, *lost = map(int, requests.groups())
    if succeeded != calls or any(lost):
        raise RuntimeError(f"of {calls} calls {succeeded} were answered: {requests.group()}")
    received = int(data.group(1))
    if abs(received - calls * answer_bytes) > calls * slack_bytes:
        raise RuntimeError(f"{calls} answers of {answer_bytes} bytes brought {received}: some were of another kind")


def read_log(text: str) -> list[Answered]:
    """The calls of h2load's log file, in the order they were answered."""
    rows = (map(int, line.split("\t")) for line in text.splitlines())
    return sorted((Answered((start_us + us) / 1e6, us) for start_us, _, us in rows), key=lambda each: each.at_s)


def within(answered: Sequence[Answered], samples: Sequence[Sample]) -> Taken:
    """What happened between two samples, the first after the warm-up and the last before calls became fewer."""
    begin_s = answered[int(len(answered) * _WARM_UP)].at_s
    end_s = answered[int((len(answered) - 1) * (1 - _COOL_DOWN))].at_s
    inside = [sample for sample in samples if begin_s <= sample.at_s <= end_s]
    if len(inside) < 2:  # noqa: PLR2004 - a beginning and an end
        raise RuntimeError(f"{len(answered)} calls are over too soon to measure them: make it more")
    first, last = inside[0], inside[-1]
    counted = [each.us for each in answered if first.at_s < each.at_s <= last.at_s]
    return Taken(len(counted), last.at_s - first.at_s, last.cpu_s - first.cpu_s, counted)
