"""What something costs each hit: processor time per hit from memory with it on, against off.

    python -m scripts.bench.hit_cost --what accounting    hits are counted for all replicas
    python -m scripts.bench.hit_cost --what similarity    other spellings' pictures may answer

Three services run side by side, each with a Redis of its own and one picture in memory: two have it off, one has it on.
In each round every one of them answers the same number of calls, by turns and in a random
order, and the processor time of its threads (user and system) is divided by it. Of each round two ratios are taken: of
the two that are alike (A/A), and of the one that has it on to the mean of those two. Against, by the medians of the
ratios:

    A/A is 1 ± 0.01: else the machine was too restless to tell, and further rounds are run
    it costs at most 2 %

With --misses every call is for a new picture: what it costs to tell of each paid call before it is sent, or to look for
another spelling of its prompt.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.load import Stub, callers
from scripts.bench.provider import KeyConfig, ProviderConfig, ProviderProcess
from scripts.bench.stand import ServiceProcess
from tests.servers import ValkeyServer

_PROC = Path("/proc")
_AT_A_TIME = 8
_TURNS = 10
"""Of each service in a round: what else the machine does meanwhile then meets all of them."""
_PROMPT = "a red fox"
_ALIKE = 0.01
_GOAL = 1.02
_WARM_UP_CALLS = 1_000
_SERVICES = {"off 1": False, "off 2": False, "on": True}
_SETTINGS = {
    "accounting": {False: "[accounting]\nenabled = false\n", True: "[accounting]\nenabled = true\n"},
    "similarity": {
        False: '[namespaces.default]\nsimilarity = "exact"\n',
        True: '[namespaces.default]\nsimilarity = "canonical"\n',
    },
}
_TIER = {False: pb.TIER_MEMORY, True: pb.TIER_UPSTREAM}
_NUMBERS = itertools.count(1)


@dataclass(slots=True)
class Rounds:
    """Microseconds of processor time per hit, of each service round by round."""

    us: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _SERVICES})

    @property
    def alike(self) -> float:
        """The median ratio of the two that are alike."""
        return statistics.median(b / a for a, b in zip(self.us["off 1"], self.us["off 2"], strict=True))

    @property
    def ratio(self) -> float:
        """The median ratio of the one that has it on to the other two."""
        pairs = zip(self.us["off 1"], self.us["off 2"], self.us["on"], strict=True)
        return statistics.median(2 * on / (a + b) for a, b, on in pairs)

    @property
    def can_tell(self) -> bool:
        """Whether the machine was at rest."""
        return abs(self.alike - 1) <= _ALIKE

    def shortfalls(self) -> list[str]:
        """What is not as it should be."""
        if not self.can_tell:
            return [f"A/A is {self.alike:.4f} after {len(self.us['on'])} rounds: the machine is too restless"]
        return [f"it costs {self.ratio - 1:.1%}, not {_GOAL - 1:.0%}"] if self.ratio > _GOAL else []


def _request(prompt: str) -> pb.GetImageRequest:
    return pb.GetImageRequest(spec=pb.ImageSpec(prompt=prompt, size="1024x1024", quality="high"))


def cpu_s(pid: int) -> float:
    """Processor time of a process's threads so far, user and system, in seconds."""
    stats = [(task / "schedstat").read_text() for task in (_PROC / str(pid) / "task").iterdir()]
    return sum(int(stat.split()[0]) for stat in stats) / 1e9


async def _answer(stub: Stub, calls: int, *, misses: bool) -> None:
    """Ask so many times for the picture that memory has, or for so many new ones."""

    async def caller(count: int) -> None:
        for _ in range(count):
            response = await stub.GetImage(_request(f"new {next(_NUMBERS)}" if misses else _PROMPT), timeout=60)
            if response.status.tier != _TIER[misses]:
                raise RuntimeError("answered by another tier than is measured")

    await asyncio.gather(*(caller(calls // _AT_A_TIME) for _ in range(_AT_A_TIME)))


async def measure(
    *, rounds: int, most_rounds: int, calls: int, misses: bool = False, what: str = "accounting"
) -> Rounds:
    """Rounds until the two that are alike are, `rounds` at least and `most_rounds` at most."""
    measured = Rounds()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        services: dict[str, tuple[ServiceProcess, Stub]] = {}
        config = ProviderConfig(keys=(KeyConfig(key="sk-x", group="org-x"),))
        provider = await stack.enter_async_context(ProviderProcess(config, directory))
        rest = f'[disk]\nfsync = false\n[[upstreams]]\nname = "x"\nbase_url = "{provider.base_url}"\napi_key = "sk-x"\n'
        for name, is_on in _SERVICES.items():
            own = directory / name.replace(" ", "")
            (own / "valkey").mkdir(parents=True)
            valkey = ValkeyServer(own / "valkey")
            stack.push_async_callback(asyncio.to_thread, valkey.kill)
            await asyncio.to_thread(valkey.start)
            text = f'[redis]\nurl = "{valkey.url}"\n{_SETTINGS[what][is_on]}{rest}'
            service = await stack.enter_async_context(ServiceProcess(own, text))
            [stub] = await stack.enter_async_context(callers(service.address, 1))
            await stub.GetImage(_request(_PROMPT), timeout=60)
            await _answer(stub, _WARM_UP_CALLS, misses=False)
            services[name] = service, stub
        while len(measured.us["on"]) < rounds or (not measured.can_tell and len(measured.us["on"]) < most_rounds):
            spent_s = dict.fromkeys(services, 0.0)
            for name in (name for _ in range(_TURNS) for name in random.sample([*services], len(services))):
                service, stub = services[name]
                before_s = cpu_s(service.pid)
                await _answer(stub, calls // _TURNS, misses=misses)
                spent_s[name] += cpu_s(service.pid) - before_s
            for name, seconds in spent_s.items():
                measured.us[name].append(seconds / calls * 1e6)
            print(f"A/A {measured.alike:.4f}  on/off {measured.ratio:.4f}", file=sys.stderr, flush=True)
    return measured


def main(  # noqa: PLR0913 - one parameter per option
    *,
    rounds: Annotated[int, typer.Option(help="Rounds at least.")] = 11,
    most_rounds: Annotated[int, typer.Option(help="And at most, until A/A is within its bounds.")] = 31,
    calls: Annotated[int, typer.Option(help="Hits of each service in a round.")] = 4_000,
    what: Annotated[str, typer.Option(help="What is on: accounting or similarity.")] = "accounting",
    misses: Annotated[bool, typer.Option("--misses", help="New pictures in place of hits.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Processor time per hit from memory with something on, against off."""
    if what not in _SETTINGS:
        raise typer.BadParameter(f"--what should be one of {', '.join(_SETTINGS)}")
    measured = asyncio.run(measure(rounds=rounds, most_rounds=most_rounds, calls=calls, misses=misses, what=what))
    print_table(
        f"Processor time per {'miss' if misses else 'hit from memory'}, {len(measured.us['on'])} rounds of {calls:,}",
        ("service", "median", "least", "most"),
        [
            (name, *(f"{each:.1f} us" for each in (statistics.median(us), min(us), max(us))))
            for name, us in measured.us.items()
        ],
    )
    print(f"A/A {measured.alike:.4f}, on/off {measured.ratio:.4f}")
    shortfalls = measured.shortfalls()
    print_verdict(shortfalls)
    result = {**asdict(measured), "alike": measured.alike, "ratio": measured.ratio, "shortfalls": shortfalls}
    write_json(json, "hit_cost", {"what": what, "calls": calls, "misses": misses, **result})
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
