"""The rows of hit_path whose pictures come from Redis or S3: memory keeps none, and no two calls want the same one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.hit_load import Load
from scripts.bench.hit_rounds import OURS, Goal
from scripts.bench.hit_sides import SIZES, USUAL, Asked, Row, Sides, asking
from scripts.bench.hit_stage import Server, Stage, request

_TIERS = {"l2": pb.TIER_REDIS, "l3": pb.TIER_S3}
_CLIENTS = {"l2": "redis-py", "l3": "boto3"}
_MOST = 1.3
_STORED_WITHIN_S = 30.0
_POLL_S = 0.1
_PATIENT_S = 30.0


@asynccontextmanager
async def _from_below(stage: Stage, turn_s: float, *, level: str, size: str, at_a_time: int) -> AsyncIterator[Sides]:
    """GetImage of pictures that Redis or S3 has, each connection of another one."""
    client = _CLIENTS[level]
    service, fetching = await (_redis if level == "l2" else _s3)(stage)
    prompts = [f"a fox of {size} below, number {n}" for n in range(USUAL)]
    await stage.put(service, dict.fromkeys(prompts, SIZES[size]))
    messages = [request(prompt) for prompt in prompts]
    for message in messages:
        answer = await _stored(stage, service, message, _TIERS[level])
    asked = Asked("GetImage", [message.SerializeToString() for message in messages], answer)
    answer_file = stage.file("answer", answer)
    further = {_behind(client): ["--tuned", *fetching]}
    async with (
        asking(stage, turn_s, asked, {OURS: service}, load=Load.of(at_a_time), further=further) as sides,
        stage.alone(answer_file, at_a_time, *fetching) as alone,
    ):
        begun = await alone.do(10 * at_a_time, pid=alone.pid)
        count = max(int(begun.calls / begun.seconds * turn_s), at_a_time) // at_a_time * at_a_time
        yield {**sides, f"{client} alone": partial(alone.do, count, pid=alone.pid)}


def _behind(client: str) -> str:
    """What a server is called that fetches what it answers with by this client, and is bare else."""
    return f"tuned + {client}"


async def _redis(stage: Stage) -> tuple[Server, Sequence[str]]:
    valkey = await stage.valkey()
    return await stage.service(memory__max_entry_bytes=1), ("--redis", valkey.url)


async def _s3(stage: Stage) -> tuple[Server, Sequence[str]]:
    s3 = await stage.s3()
    settings: dict[str, Any] = {"bucket": s3.bucket, "endpoint": s3.endpoint, "region": s3.region}
    settings |= {"access_key": s3.access_key, "secret_key": s3.secret_key}
    settings["read_timeout_s"] = _PATIENT_S  # a busy machine is no failure of S3's
    named = {f"s3__{name}": value for name, value in settings.items()}
    service = await stage.service(memory__max_entry_bytes=1, tiers="memory,s3", **named)
    return service, ("--s3", f"{s3.endpoint}/{s3.bucket}")


async def _stored(stage: Stage, service: Server, message: pb.GetImageRequest, tier: pb.Tier) -> list[bytes]:
    """The answer from this tier, once it has the picture: it gets there after the caller was answered."""
    async with asyncio.timeout(_STORED_WITHIN_S):
        while True:
            try:
                return await stage.hit(service, message, tier=tier)
            except RuntimeError:
                await asyncio.sleep(_POLL_S)


def _goals(level: str, size: str, at_a_time: int) -> tuple[Goal, ...]:
    if level == "l2" and size != "1.5MB":
        return ()
    return (Goal(_behind(_CLIENTS[level]), _MOST, "p50_us" if at_a_time == 1 else "cpu_us"),)


def rows() -> list[Row]:
    """All of them."""
    return [
        Row(
            f"{level}/{size}/{at_a_time}",
            partial(_from_below, level=level, size=size, at_a_time=at_a_time),
            _goals(level, size, at_a_time),
            SIZES[size],
        )
        for level in _TIERS
        for size in ("100kB", "1.5MB")
        for at_a_time in (USUAL, 1)
    ]
