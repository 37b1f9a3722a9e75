"""The rows of hit_path whose calls share a stream: batches, and our own client against generated stubs."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from cacheserver.client import AsyncClient
from scripts.bench.hit_load import Load
from scripts.bench.hit_rounds import BARE, OURS, Goal, Turn
from scripts.bench.hit_sides import SIZES, USUAL, Asked, Row, Sides, asking
from scripts.bench.hit_stage import Server, Stage, request
from scripts.bench.obedient import Obedient, obedient

_IN_FLIGHT = 16
_MOST_BATCHED = {"4kB": 0.30, "100kB": 0.41}
_CONCURRENT = 1_000
_STUBS = "stubs"
_LACKING = "" if "multiplex" in inspect.signature(AsyncClient).parameters else "AsyncClient has no `multiplex` yet"


@asynccontextmanager
async def _batched(stage: Stage, turn_s: float, *, size: str) -> AsyncIterator[Sides]:
    """BatchGetImages of a picture that memory has."""
    service = await stage.service()
    message = request(prompt := f"a red fox of {size}")
    await stage.put(service, {prompt: SIZES[size]})
    asked = Asked("GetImage", [message.SerializeToString()], await stage.hit(service, message))
    argv = _client(stage, "batch", service, asked, SIZES[size], _IN_FLIGHT)
    async with asking(stage, turn_s, asked, {}, load=Load(USUAL)) as floors, obedient(argv) as client:
        yield {**floors, OURS: await _turn(client, service, turn_s, _IN_FLIGHT)}


@asynccontextmanager
async def _multiplexed(stage: Stage, turn_s: float) -> AsyncIterator[Sides]:
    """Very many `get_image` of our client at a time, against as many calls of generated stubs."""
    service = await stage.service()
    message = request(prompt := "a red fox of 4kB")
    await stage.put(service, {prompt: SIZES["4kB"]})
    asked = Asked("GetImage", [message.SerializeToString()], await stage.hit(service, message))
    argv = {
        name: _client(stage, kind, service, asked, SIZES["4kB"], _CONCURRENT)
        for name, kind in ((_STUBS, "stubs"), (OURS, "multiplex"))
    }
    async with obedient(argv[_STUBS]) as stubs, obedient(argv[OURS]) as ours:
        yield {
            _STUBS: await _turn(stubs, service, turn_s, _CONCURRENT),
            OURS: await _turn(ours, service, turn_s, _CONCURRENT),
        }


def _client(  # noqa: PLR0913, PLR0917 - what its command line has
    stage: Stage, kind: str, service: Server, asked: Asked, least_bytes: int, at_a_time: int
) -> list[str]:
    request_file = stage.file("request", asked.bodies)
    options = {"--token": stage.token, "--answer-bytes": least_bytes, "--at-a-time": at_a_time}
    words = [str(word) for option in options.items() for word in option]
    return ["scripts.bench.hit_clients", kind, service.address, str(request_file), *words]


async def _turn(client: Obedient, service: Server, turn_s: float, at_a_time: int) -> Turn:
    """As many calls as take about `turn_s` seconds."""
    begun = await client.do(at_a_time * 4, pid=service.pid)  # connects
    begun = await client.do(at_a_time * 4, pid=service.pid)
    count = max(int(begun.calls / begun.seconds * turn_s) // at_a_time, 1) * at_a_time
    return partial(client.do, count, pid=service.pid)


def rows() -> list[Row]:
    """All of them."""
    return [
        *(
            Row(f"batch/{size}/{_IN_FLIGHT}", partial(_batched, size=size), (Goal(BARE, most),), SIZES[size])
            for size, most in _MOST_BATCHED.items()
        ),
        Row(
            f"multiplex/4kB/{_CONCURRENT}",
            _multiplexed,
            (Goal(_STUBS, 0.5, "us_each"),),
            SIZES["4kB"],
            lacking=_LACKING,
        ),
    ]
