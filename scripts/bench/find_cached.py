"""How long one FindCached of 10,000 prompts takes, with an object storage behind it; or what 1,000 cost from memory.

The S3 server of `scripts/serve --local-s3` holds 30,000 objects of one partition; a third of the prompts asked for are
among them. Measured, each as the median of some rounds: finding the keys in the S3 tier alone; the whole call through a
running service, with the work its process does for it; and the longest that any of the small calls waited that another
caller made meanwhile, one after another: keying so many prompts must not keep the service from others.

Against: every answer is right, and the call takes less than 2 s.

With --from-memory the service has memory alone, with a picture of each of 1,000 prompts. What a call for all of them
costs is the processor time of the service's process (user and system, gRPC's threads included), by the prompt: of
calls that are the same again and again, and of calls that ask for the same pictures in words that were never sent.

Against: every answer is right, and a core looks up 100,000 prompts/s of those it was asked for before.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, NoReturn

import grpc.aio
import typer
from PIL import Image

from cacheserver.client import AsyncClient, Presence
from cacheserver.clock import SystemClock
from cacheserver.embedded.seaweed import LocalS3
from cacheserver.identity import identify
from cacheserver.model import CachedImage, CacheKey, GeneratedImage, ImageRequest, Namespace
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.tiers.s3 import S3Tier
from scripts.bench.figures import print_table, print_verdict, write_json
from scripts.bench.stand import ServiceProcess, children_cpu_s

OBJECTS = 30_000
PROMPTS = 10_000
LIMIT_S = 2.0
FROM_MEMORY = 1_000
CALLS_A_ROUND = 20
"""Processor time is counted in hundredths of a second: one call takes less."""

GOAL_PER_S = 100_000
MODEL = "gpt-image-2"

_NAMESPACE = Namespace("default", "default")


async def measure(directory: Path, *, objects: int, rounds: int) -> dict[str, float]:
    """Fill a bucket in `directory` with `objects`, and find the prompts several times: the medians."""
    asked = [_prompt(n % objects) if n % 3 == 0 else f"absent {n}" for n in range(PROMPTS)]
    s3 = LocalS3(data_dir=directory, clock=SystemClock())
    await s3.start()
    try:
        tier = _tier(s3)
        await _fill(tier, objects)
        tier_s = [await _find(tier, [_key(prompt) for prompt in asked]) for _ in range(rounds)]
        await tier.aclose()
        service = ServiceProcess(directory / "service", _config(s3))
        async with service, AsyncClient(service.address) as client:
            await client.find_cached(["a red fox"])  # connects
            calls = [await _call(client, asked) for _ in range(rounds)]
    finally:
        await s3.stop()
    return {
        "tier_s": median(tier_s),
        "call_s": median(call["call_s"] for call in calls),
        "service_cpu_s": median(call["service_cpu_s"] for call in calls),
        "longest_wait_s": median(call["longest_wait_s"] for call in calls),
        "wrong": sum(call["wrong"] for call in calls),
    }


async def measure_from_memory(directory: Path, *, rounds: int) -> dict[str, float]:
    """Put pictures into a service, and find them again: processor time by the prompt, in microseconds."""
    prompts = [f"{_prompt(n)}, detail {n % 7} of the upper side, 85 mm lens" for n in range(FROM_MEMORY)]
    config = 'tiers = ["memory"]\n' + _nobody()
    async with ServiceProcess(directory / "service", config) as service, AsyncClient(service.address) as client:
        await _put(client, prompts)
        # Spaces at the end make no other picture, and a request that was never seen.
        calls = CALLS_A_ROUND * rounds
        again, anew = [""] * calls, [" " * (n + 1) for n in range(calls)]
        async with grpc.aio.insecure_channel(service.address) as channel:
            find = channel.unary_unary("/promptcache.v1.PromptCacheService/FindCached")
            await _find_all(find, prompts, [""])
            wrong, figures = 0, {}
            for name, endings in {"again_us": again, "anew_us": anew}.items():
                work_s = _work_s()
                wrong += await _find_all(find, prompts, endings)
                figures[name] = (_work_s() - work_s) / (len(prompts) * calls) * 1e6
    return {**figures, "wrong": wrong}


async def _put(client: AsyncClient, prompts: Sequence[str]) -> None:
    drawn = io.BytesIO()
    Image.new("RGB", (16, 16)).save(drawn, "png")
    for prompt in prompts:
        await client.put(drawn.getvalue(), prompt)


async def _find_all(find: Callable[[bytes], Awaitable[bytes]], prompts: Sequence[str], endings: Sequence[str]) -> int:
    """Find all prompts, once with each ending; how many of them were not in memory."""
    wrong = 0
    for ending in endings:
        items = [pb.FindItem(spec=pb.ImageSpec(prompt=prompt + ending)) for prompt in prompts]
        reply = pb.FindCachedResponse.FromString(await find(pb.FindCachedRequest(items=items).SerializeToString()))
        wrong += len(prompts) - sum(item.tier == pb.TIER_MEMORY for item in reply.items)
    return wrong


def _prompt(n: int) -> str:
    return f"studio photo of product {n}, white background, soft light from the left"


def _key(prompt: str) -> CacheKey:
    return identify(ImageRequest(prompt=prompt, model=MODEL), _NAMESPACE).key


def _is_present(prompt: str) -> bool:
    return not prompt.startswith("absent")


def _tier(s3: LocalS3) -> S3Tier:
    return S3Tier(
        bucket=s3.bucket,
        clock=SystemClock(),
        region=s3.region,
        endpoint=s3.endpoint,
        access_key=s3.access_key,
        secret_key=s3.secret_key,
        read_timeout_s=30.0,
    )


def _config(s3: LocalS3) -> str:
    return f"""
tiers = ["memory", "s3"]
[s3]
bucket = "{s3.bucket}"
region = "{s3.region}"
endpoint = "{s3.endpoint}"
access_key = "{s3.access_key}"
secret_key = "{s3.secret_key}"
{_nobody()}"""


def _nobody() -> str:
    return f"""
[[upstreams]]
name = "nobody"
base_url = "http://127.0.0.1:9/v1"
api_key = "sk-none"
models = ["{MODEL}"]
"""


async def _fill(tier: S3Tier, objects: int) -> None:
    numbers = iter(range(objects))

    async def put() -> None:
        for n in numbers:
            await tier.put(key := _key(_prompt(n)), _entry(key), replace=False)

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(put())


def _entry(key: CacheKey) -> CachedImage:
    data = key.name.encode()
    image = GeneratedImage(
        data=data,
        content_type="image/png",
        width=1,
        height=1,
        sha256=hashlib.sha256(data).hexdigest(),
        model=MODEL,
        size="1x1",
        quality="low",
        background="opaque",
    )
    return CachedImage(key=key, image=image, namespace="default", prompt_digest=bytes(32), create_time_s=time.time())


async def _find(tier: S3Tier, keys: Sequence[CacheKey]) -> float:
    begun_s = time.monotonic()
    await tier.find(keys)
    return time.monotonic() - begun_s


async def _call(client: AsyncClient, asked: Sequence[str]) -> dict[str, float]:
    waits_s: list[float] = []
    others = asyncio.create_task(_others(client, waits_s), name="others")
    work_s, begun_s = _work_s(), time.monotonic()
    found = await client.find_cached(asked, timeout_s=300)
    call_s, cpu_s = time.monotonic() - begun_s, _work_s() - work_s
    others.cancel()
    await asyncio.wait({others})
    items = zip(asked, found.items, strict=True)
    wrong = sum((item.presence is Presence.CACHED) != _is_present(prompt) for prompt, item in items)
    if found.unknown_tiers:
        raise RuntimeError("the S3 tier did not answer")
    return {"call_s": call_s, "service_cpu_s": cpu_s, "longest_wait_s": max(waits_s), "wrong": wrong}


async def _others(client: AsyncClient, waits_s: list[float]) -> None:
    while True:
        begun_s = time.monotonic()
        await client.stats()
        waits_s.append(time.monotonic() - begun_s)


def _work_s() -> float:
    return sum(work_s for program, work_s in children_cpu_s().items() if program.startswith("cacheserver"))


def main(
    *,
    objects: Annotated[int, typer.Option(min=1)] = OBJECTS,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    from_memory: Annotated[bool, typer.Option(help="Find 1,000 in memory instead.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Find 10,000 prompts in a bucket, alone and through the service; or 1,000 in memory."""
    if from_memory:
        _from_memory(rounds, json)
    with tempfile.TemporaryDirectory(prefix="find-") as directory:
        figures = asyncio.run(measure(Path(directory), objects=objects, rounds=rounds))
    shortfalls = []
    if figures["wrong"]:
        shortfalls.append(f"wrong answers: {figures['wrong']:g}")
    if figures["call_s"] >= LIMIT_S:
        shortfalls.append(f"call: {figures['call_s']:.2f} s")
    rows = [(name.removesuffix("_s").replace("_", " "), f"{value:.3f}") for name, value in figures.items()]
    print_table(f"Finding {PROMPTS:,} prompts among {objects:,} objects", ("", "s"), rows)
    print_verdict(shortfalls)
    write_json(json, "find_cached", {**figures, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


def _from_memory(rounds: int, json: Path | None) -> NoReturn:
    with tempfile.TemporaryDirectory(prefix="find-") as directory:
        figures = asyncio.run(measure_from_memory(Path(directory), rounds=rounds))
    shortfalls = []
    if figures["wrong"]:
        shortfalls.append(f"wrong answers: {figures['wrong']:g}")
    if (per_s := 1e6 / figures["again_us"]) < GOAL_PER_S:
        shortfalls.append(f"{per_s:,.0f} prompts/s of a core, not {GOAL_PER_S:,}")
    titles = {"again_us": "the same calls again", "anew_us": "in words never sent"}
    rows = [(title, f"{figures[name]:.2f}", f"{1e6 / figures[name]:,.0f}") for name, title in titles.items()]
    print_table(f"Finding {FROM_MEMORY:,} prompts in memory", ("", "µs a prompt", "prompts/s of a core"), rows)
    print_verdict(shortfalls)
    write_json(json, "find_from_memory", {**figures, "shortfalls": shortfalls})
    raise typer.Exit(bool(shortfalls))


if __name__ == "__main__":
    typer.run(main)
