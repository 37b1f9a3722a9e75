"""Callers that read at a fixed pace, whatever the service does, and what they got."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc

Stub = Any
"""The generated client: its calls have types of grpc.aio only at run time."""

_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Read:
    """One read of a picture. Times are the event loop's, in seconds."""

    number: int
    due_s: float
    end_s: float
    tier: int = pb.TIER_UNSPECIFIED
    failure: str = ""
    wrong: bool = False

    @property
    def ms(self) -> float:
        """Its latency, from when it was due: a service which holds up the callers does not look faster for it."""
        return (self.end_s - self.due_s) * 1e3

    @property
    def is_hit(self) -> bool:
        """Whether a tier answered; not one that made, or waited for, a new picture."""
        return not self.failure and self.tier != pb.TIER_UPSTREAM


def prompt(number: int) -> str:
    """What picture `number` shows."""
    return f"picture {number}"


@asynccontextmanager
async def callers(address: str, count: int) -> AsyncIterator[list[Stub]]:
    """So many plain generated clients of the service, each with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as channels:
        yield [
            pb_grpc.PromptCacheServiceStub(  # type: ignore[no-untyped-call] # generated code
                await channels.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            )
            for _ in range(count)
        ]


async def read_paced(
    stubs: Sequence[Stub], numbers: Sequence[int], *, rate: float, is_right: Callable[[int, bytes], bool]
) -> list[Read]:
    """Read these pictures, `rate` a second, the callers taking turns; nobody waits for an earlier answer."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    tasks: list[asyncio.Task[Read]] = []
    async with asyncio.TaskGroup() as group:
        for i, number in enumerate(numbers):
            due_s = start_s + i / rate
            await asyncio.sleep(due_s - loop.time())
            tasks.append(group.create_task(_read(stubs[i % len(stubs)], number, due_s, is_right)))
    return [task.result() for task in tasks]


async def _read(stub: Stub, number: int, due_s: float, is_right: Callable[[int, bytes], bool]) -> Read:
    loop = asyncio.get_running_loop()
    try:
        response = await stub.GetImage(
            pb.GetImageRequest(spec=pb.ImageSpec(prompt=prompt(number))), timeout=_DEADLINE_S
        )
    except grpc.aio.AioRpcError as error:
        return Read(number, due_s, loop.time(), failure=error.code().name)
    end_s = loop.time()
    wrong = not (len(response.images) == 1 and is_right(number, response.images[0].data))
    return Read(number, due_s, end_s, tier=response.status.tier, wrong=wrong)
