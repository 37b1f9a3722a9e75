"""What the benches of whole cases share: the service before an emulated provider, and callers that keep a schedule.

All times are the provider's, emulated seconds, so that a call's place in its ledger and its caller's wait can be
compared; what the service is told is real seconds, and divided by the compression.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import grpc

from cacheserver.pb import promptcache_pb2 as pb
from scripts.bench.load import Stub, callers
from scripts.bench.provider_config import KeyConfig, Latency, LimitsConfig, Price, ProviderConfig
from scripts.bench.provider_ledger import Call
from scripts.bench.provider_process import ProviderProcess
from scripts.bench.stand import ServiceProcess
from tests.servers import ValkeyServer

MODEL = "gpt-image-2"

_CONNECTIONS = 8
_DEADLINE_S = 570.0
"""In real seconds: beyond any wait that is measured, so that a call which is not answered has failed."""


@dataclass(frozen=True, slots=True)
class Deployments:
    """The provider's side: so many deployments, each with limits of its own, and what the service knows of them.

    `price_factor` is what a relay takes of the list price; the emulator bills at its prices, and so on its own.
    """

    count: int
    concurrent: int
    latency: Latency
    images_per_minute: float | None = None
    price_factor: Decimal = Decimal(1)

    def emulated(self, *, compression: float, seed: int) -> ProviderConfig:
        """The emulator's configuration."""
        limits = LimitsConfig(images_per_minute=self.images_per_minute, concurrent=self.concurrent)
        list_price = Price()
        price = Price(
            text_input_usd_per_million_tokens=list_price.text_input_usd_per_million_tokens * self.price_factor,
            image_output_usd_per_million_tokens=list_price.image_output_usd_per_million_tokens * self.price_factor,
        )
        return ProviderConfig(
            keys=tuple(KeyConfig(key=f"sk-{i}", group=f"org-{i}") for i in range(self.count)),
            groups={f"org-{i}": limits for i in range(self.count)},
            models={MODEL: price},
            latency=self.latency,
            compression=compression,
            seed=seed,
        )

    def settings(self, base_url: str, *, compression: float) -> str:
        """The service's upstreams and limit groups, in its configuration's words. Its minutes are real ones."""
        tables = []
        for i in range(self.count):
            tables += [
                "[[upstreams]]",
                f'name = "deployment-{i}"',
                f'base_url = "{base_url}"',
                f'api_key = "sk-{i}"',
                f'models = ["{MODEL}"]',
                f"price_factor = {self.price_factor}",
                f"[limit_groups.deployment-{i}]",
                f"concurrent = {self.concurrent}",
                f"burst_s = {1 / compression}",
            ]
            if self.images_per_minute is not None:
                tables.append(f"images_per_minute = {round(self.images_per_minute * compression)}")
        return "\n".join(tables) + "\n"


class Stage:
    """A running service before a running provider; from `open_stage`."""

    def __init__(self, provider: ProviderProcess, stubs: Sequence[Stub], *, compression: float) -> None:
        self.provider = provider
        self.compression = compression
        self._stubs = stubs

    async def stats(self) -> pb.GetStatsResponse:
        """What the service has counted since it started."""
        response: pb.GetStatsResponse = await self._stubs[0].GetStats(pb.GetStatsRequest())
        return response

    async def ask(self, number: int, request: pb.GetImageRequest, *, due_s: float | None = None) -> Answer:
        """One call of the service, and what came of it; `due_s` is when it should have been made, None is now."""
        sent_s = self.provider.now_s
        due_s = sent_s if due_s is None else due_s
        try:
            response = await self._stubs[number % len(self._stubs)].GetImage(request, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            return Answer(number, due_s, sent_s, self.provider.now_s, failure=error.code().name)
        status, image = response.status, response.images[0]
        return Answer(
            number,
            due_s,
            sent_s,
            self.provider.now_s,
            failure="" if image.data else pb.State.Name(status.state),
            tier=status.tier,
            collapsed=status.collapsed,
            degraded=status.degraded,
            call_id=image.upstream_request_id,
        )

    async def ask_on_time(self, requests: Sequence[pb.GetImageRequest], due_s: Sequence[float]) -> list[Answer]:
        """Make each call when it is due, in seconds from now, whatever became of those before it."""
        loop, start_s = asyncio.get_running_loop(), self.provider.now_s
        real_start_s = loop.time()
        tasks: list[asyncio.Task[Answer]] = []
        async with asyncio.TaskGroup() as group:
            for number, (request, each_s) in enumerate(zip(requests, due_s, strict=True)):
                await asyncio.sleep(real_start_s + each_s / self.compression - loop.time())
                tasks.append(group.create_task(self.ask(number, request, due_s=start_s + each_s)))
        return [task.result() for task in tasks]

    async def ask_at_most(self, requests: Sequence[pb.GetImageRequest], *, at_a_time: int) -> list[Answer]:
        """Make the calls in this order, so many at a time."""
        places = asyncio.Semaphore(at_a_time)

        async def in_place(number: int, request: pb.GetImageRequest) -> Answer:
            async with places:
                return await self.ask(number, request)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_place(number, request)) for number, request in enumerate(requests)]
        return [task.result() for task in tasks]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call of the service brought. `failure` is empty if that was a picture.

    `call_id` is the provider's id of the call that made the picture, now or for somebody before.
    """

    number: int
    due_s: float
    sent_s: float
    end_s: float
    failure: str = ""
    tier: int = pb.TIER_UNSPECIFIED
    collapsed: bool = False
    degraded: bool = False
    call_id: str = ""

    @property
    def seconds(self) -> float:
        """How long its caller waited, from when it was due."""
        return self.end_s - self.due_s

    @property
    def is_hit(self) -> bool:
        """Whether the picture was there already."""
        return not self.failure and self.tier != pb.TIER_UPSTREAM

    def start_wait_s(self, calls: dict[str, Call]) -> float | None:
        """How long after it was due the provider began on its picture; None if it was made, or begun on, already."""
        call = calls.get(self.call_id)
        if self.failure or call is None or call.started_s is None or call.started_s < self.due_s:
            return None
        return call.started_s - self.due_s


@dataclass(frozen=True, slots=True)
class Bills:
    """The same money as both sides have it, and how many pictures were paid for."""

    calls: int
    booked_calls: int
    billed_microusd: int
    spent_microusd: int
    unknown_microusd: int
    refused_by_limit: int
    duplicates: int

    @classmethod
    def of(cls, calls: Sequence[Call], stats: pb.GetStatsResponse) -> Bills:
        """What the provider's ledger and the service's books say."""
        # A prompt is billed once for each quality it was asked in.
        billed = [call for call in calls if call.billed_microusd]
        pictures = {(call.prompt_sha256, call.quality) for call in billed}
        return cls(
            calls=len(calls),
            booked_calls=stats.upstream_calls,
            billed_microusd=sum(call.billed_microusd for call in billed),
            spent_microusd=stats.total.spent_microusd,
            unknown_microusd=stats.total.unknown_microusd,
            refused_by_limit=sum(call.limited for call in calls),
            duplicates=len(billed) - len(pictures),
        )

    def shortfalls(self) -> list[str]:
        """Where they differ, or money was wasted."""
        is_short = {
            f"the provider billed {self.billed_microusd} microdollars, the service booked {self.spent_microusd}": (
                self.billed_microusd != self.spent_microusd
            ),
            f"the provider had {self.calls} calls, the service booked {self.booked_calls}": (
                self.calls != self.booked_calls
            ),
            f"{self.unknown_microusd} microdollars may have been paid": self.unknown_microusd > 0,
            f"{self.duplicates} pictures were paid for twice": self.duplicates > 0,
        }
        return [line for line, short in is_short.items() if short]


@asynccontextmanager
async def open_stage(
    deployments: Deployments, settings: str = "", *, compression: float, seed: int
) -> AsyncIterator[Stage]:
    """The provider, a Valkey, and the service with an empty cache: memory, Redis and a directory.

    Args:
        deployments: what the provider has.
        settings: the service's further configuration: whole tables.
        compression: how many emulated seconds pass in a real one.
        seed: of the provider's latencies.
    """
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        for name in ("provider", "valkey"):
            (directory / name).mkdir()
        valkey = ValkeyServer(directory / "valkey")
        stack.push_async_callback(asyncio.to_thread, valkey.kill)
        await asyncio.to_thread(valkey.start)
        config = deployments.emulated(compression=compression, seed=seed)
        provider = await stack.enter_async_context(ProviderProcess(config, directory / "provider"))
        parts = [
            f'[redis]\nurl = "{valkey.url}"',
            '[log]\nlevel = "warning"',
            settings,
            deployments.settings(provider.base_url, compression=compression),
        ]
        service = await stack.enter_async_context(ServiceProcess(directory / "service", "\n".join(parts)))
        stubs = await stack.enter_async_context(callers(service.address, _CONNECTIONS))
        yield Stage(provider, stubs, compression=compression)
