"""The rows of hit_path that h2load alone can ask: hits from memory in every form, and a miss."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.hit_load import Load
from scripts.bench.hit_rounds import BARE, OURS, TUNED, UVLOOP, Goal
from scripts.bench.hit_sides import KB, SIZES, USUAL, Asked, Row, Sides, asking
from scripts.bench.hit_stage import Stage, request

_LOGGED = "service, level info"
_MOST_CPU = {"4kB": (1.00, 1.15), "100kB": (0.97, 1.10), "1.5MB": (1.00, 1.05)}
"""Of hits from memory by size: to the bare server, and to the one that is tuned as ours is."""

_MOST_P50 = 1.15
_STREAMED = {"1.5MB": 1_500 * KB, "20MB": 20_000 * KB}
_STREAMS = 4
_PROMPTS = {"4kB": 10_000, "100kB": 10_000, "1.5MB": 400}
_FEWER = {"1.5MB": "400 prompts, not 10,000: those would be 15 GB, and a hit from memory is measured"}
_PROMPTS_MEMORY = 3 * 2**30
_SKEW = 0.8
_MOST_CPU_UNKNOWN = 1.25
_FOUND = 1_000
_MOST_US_FOUND = 10_000.0
"""100,000 prompts a second on one core."""

_EXPIRY_BYTES = 16
"""By which signed URLs may differ that were made at other times."""


@asynccontextmanager
async def _from_memory(
    stage: Stage, turn_s: float, *, size: str, at_a_time: int, logged: bool = False
) -> AsyncIterator[Sides]:
    """GetImage of a picture that memory has."""
    services = {OURS: await stage.service()}
    if logged:
        services[_LOGGED] = await stage.service(log__level="info")
    message = request(prompt := f"a red fox of {size}")
    for service in services.values():
        await stage.put(service, {prompt: SIZES[size]})
        answer = await stage.hit(service, message)
    asked = Asked("GetImage", [message.SerializeToString()], answer)
    further = {UVLOOP: ("--uvloop",)}
    async with asking(stage, turn_s, asked, services, load=Load.of(at_a_time), further=further) as sides:
        yield sides


@asynccontextmanager
async def _streamed(stage: Stage, turn_s: float, *, size: str) -> AsyncIterator[Sides]:
    """StreamImage of a picture that memory has."""
    service = await stage.service()
    await stage.put(service, {(prompt := f"a streamed fox of {size}"): _STREAMED[size]})
    message = pb.StreamImageRequest(request=request(prompt)).SerializeToString()
    answer = await stage.answer(service, "StreamImage", message)
    if pb.StreamImageResponse.FromString(answer[0]).header.status.tier != pb.TIER_MEMORY:
        raise RuntimeError("answered by another tier than is measured")
    asked = Asked("StreamImage", [message], answer)
    async with asking(stage, turn_s, asked, {OURS: service}, load=Load(_STREAMS)) as sides:
        yield sides


@asynccontextmanager
async def _by_url(stage: Stage, turn_s: float) -> AsyncIterator[Sides]:
    """GetImage that is answered with a URL."""
    service = await stage.service(delivery__public_url="http://127.0.0.1:8080")
    await stage.put(service, {(prompt := "a linked fox"): SIZES["100kB"]})
    message = request(prompt, delivery=pb.DELIVERY_URL)
    asked = Asked("GetImage", [message.SerializeToString()], await stage.hit(service, message), _EXPIRY_BYTES)
    async with asking(stage, turn_s, asked, {OURS: service}, load=Load(USUAL)) as sides:
        yield sides


@asynccontextmanager
async def _missed(stage: Stage, turn_s: float) -> AsyncIterator[Sides]:
    """GetImage, only if cached, of what no tier has: Redis and the directory are asked."""
    service = await stage.service()
    message = request("nobody has this", cache_policy=pb.CACHE_POLICY_ONLY_IF_CACHED).SerializeToString()
    asked = Asked("GetImage", [message], await stage.answer(service, "GetImage", message))
    async with asking(stage, turn_s, asked, {OURS: service}, load=Load(USUAL)) as sides:
        yield sides


@asynccontextmanager
async def _found(stage: Stage, turn_s: float) -> AsyncIterator[Sides]:
    """FindCached of prompts whose pictures memory has."""
    service = await stage.service()
    prompts = [f"a fox that is found, number {n}" for n in range(_FOUND)]
    await stage.put(service, dict.fromkeys(prompts, 2 * KB))
    message = pb.FindCachedRequest(items=[pb.FindItem(spec=request(prompt).spec) for prompt in prompts])
    answer = await stage.answer(service, "FindCached", message.SerializeToString())
    if {item.tier for item in pb.FindCachedResponse.FromString(answer[0]).items} != {pb.TIER_MEMORY}:
        raise RuntimeError("not all were found in memory")
    asked = Asked("FindCached", [message.SerializeToString()], answer)
    async with asking(stage, turn_s, asked, {OURS: service}, load=Load(_STREAMS)) as sides:
        yield sides


@asynccontextmanager
async def _of_many(stage: Stage, turn_s: float, *, size: str) -> AsyncIterator[Sides]:
    """GetImage of one picture of many by Zipf's law, each call with a request_id of its own and no requests known.

    All have been asked for once before, as the one picture of other rows: the first hit of a picture makes its reply.
    """
    service = await stage.service(server__known_requests=0, memory__max_bytes=_PROMPTS_MEMORY)
    prompts = [f"a fox of {size} among many, number {n}" for n in range(_PROMPTS[size])]
    await stage.put(service, dict.fromkeys(prompts, SIZES[size]))
    messages = [request(prompt) for prompt in prompts]
    answer = await stage.hit(service, messages[0])
    await stage.hits(service, messages)
    asked = Asked("GetImage", [each.SerializeToString() for each in messages], answer, skew=_SKEW)
    async with asking(stage, turn_s, asked, {OURS: service}, load=Load(USUAL)) as sides:
        yield sides


def _goals(size: str, at_a_time: int) -> tuple[Goal, ...]:
    if at_a_time == 1:
        return (Goal(TUNED, _MOST_P50, "p50_us"),)
    bare, tuned = _MOST_CPU[size]
    return (Goal(BARE, bare), Goal(TUNED, tuned)) if at_a_time == USUAL else ()


def _memory_rows() -> list[Row]:
    rows = [
        Row(
            f"l1/{size}/{at_a_time}",
            partial(_from_memory, size=size, at_a_time=at_a_time),
            _goals(size, at_a_time),
            size_bytes,
        )
        for size, size_bytes in SIZES.items()
        for at_a_time in (USUAL, 1, 256)
    ]
    logged = partial(_from_memory, size="100kB", at_a_time=USUAL, logged=True)
    return [*rows, Row("l1/100kB/log", logged, bytes_each=SIZES["100kB"])]


def rows() -> list[Row]:
    """All of them."""
    unknown = (Goal(BARE, _MOST_CPU_UNKNOWN),)
    return [
        *_memory_rows(),
        *(
            Row(
                f"prompts/{size}/{USUAL}",
                partial(_of_many, size=size),
                unknown,
                SIZES[size],
                note=_FEWER.get(size, ""),
            )
            for size in SIZES
        ),
        *(Row(f"stream/{size}/{_STREAMS}", partial(_streamed, size=size), (), _STREAMED[size]) for size in _STREAMED),
        Row(f"url/100kB/{USUAL}", _by_url),
        Row(f"miss/-/{USUAL}", _missed),
        Row(f"find/{_FOUND}/{_STREAMS}", _found, (Goal(None, _MOST_US_FOUND),)),
    ]
