"""A whole cache for tests: real memory, real directories as tiers, a fake upstream, and faults on command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from random import Random

from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.backpressure import Backpressure
from cacheserver.cache import PromptCache
from cacheserver.coherence import Coherence
from cacheserver.control.aliases import NoAliases
from cacheserver.control.leases import NoLeases
from cacheserver.control.replays import LocalReplays
from cacheserver.epochs import Epochs
from cacheserver.errors import TierError
from cacheserver.freshness import stale_windows
from cacheserver.identity import identify
from cacheserver.interfaces import Aliases, Leases, Renderer, Replays, SimilarPrompts, Tier, no_step
from cacheserver.journal import Journal
from cacheserver.keep import Keeper, at_once
from cacheserver.model import (
    Budget,
    CachedImage,
    CacheKey,
    Caller,
    GroupLimits,
    Head,
    Identity,
    ImageRequest,
    Labels,
    Namespace,
    Pending,
    Permission,
    Served,
    Terms,
    TierName,
    Touched,
)
from cacheserver.paying import UnknownPolicy
from cacheserver.reviews import Reviews
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.hedge import Hedge
from cacheserver.tiers.memory import MemoryCache
from cacheserver.tiers.s3 import S3Tier
from cacheserver.undrained import Undrained
from tests.fakes import FakeClock
from tests.miss_path import MemoryLedger, build_generator, lanes
from tests.provider import FakeUpstream
from tests.servers import S3Server

MODEL = "gpt-image-2"
EVERYTHING = Caller("tester", frozenset(Permission))


class FaultyTier:
    """A real tier that goes silent, or waits at a gate, when told to. It answers to any name."""

    def __init__(self, tier: Tier, name: TierName) -> None:
        self._tier = tier
        self._name = name
        self.is_down = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.gets: list[str] = []

    @property
    def name(self) -> TierName:
        return self._name

    async def _pass(self) -> None:
        await self.gate.wait()
        if self.is_down:
            raise TierError("down for a test")

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None:
        self.gets.append(key.name)
        await self._pass()
        return await self._tier.get(key, stale_s=stale_s)

    async def find(self, keys: Sequence[CacheKey], *, on_step: Callable[[], None] = no_step) -> list[bool]:
        await self._pass()
        return await self._tier.find(keys, on_step=on_step)

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        await self._pass()
        return await self._tier.put(key, entry, replace=replace)

    async def move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:
        await self._pass()
        return await self._tier.move(slot, key, entry)

    async def touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        await self._pass()
        return await self._tier.touch(key, entry)

    async def delete(self, key: CacheKey) -> bool:
        await self._pass()
        return await self._tier.delete(key)

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        await self._pass()
        async for key in self._tier.scan(partition):
            yield key

    async def page(self, partition: str, *, after: CacheKey | None, limit: int) -> list[CacheKey]:
        await self._pass()
        return await self._tier.page(partition, after=after, limit=limit)

    async def renditions(self, key: CacheKey) -> list[CacheKey]:
        await self._pass()
        return await self._tier.renditions(key)

    async def head(self, key: CacheKey) -> Head | None:
        await self._pass()
        return await self._tier.head(key)

    async def labels(self, key: CacheKey) -> Labels | None:
        await self._pass()
        return await self._tier.labels(key)

    async def reclaim(self, key: CacheKey) -> bool:
        await self._pass()
        return await self._tier.reclaim(key)

    async def ping(self) -> None:
        await self._pass()

    async def aclose(self) -> None:
        await self._tier.aclose()


class House:
    """A cache with a fast tier (`redis`) and a last one (`s3`), both real directories, and all its parts."""

    def __init__(
        self,
        *,
        clock: FakeClock,
        redis: FaultyTier,
        s3: FaultyTier,
        epochs: Epochs | None = None,
        coherence: Coherence | None = None,
        **settings: object,
    ) -> None:
        self.clock = clock
        self.epochs = epochs or Epochs()
        self.redis = redis
        self.s3 = s3
        self.namespace = Namespace("default", "default")
        self.upstream = FakeUpstream("fake", [MODEL])
        self.registry = CollectorRegistry()
        self.books = CounterBooks(clock=clock, registry=self.registry)
        self.coherence = coherence or alone_with(self.epochs, books=self.books, clock=clock)
        self.renderer: Renderer | None = None
        self.replays: Replays = LocalReplays(monotonic_s=clock.monotonic_s)
        self.restart(**settings)

    def restart(
        self,
        *,
        memory_bytes: int = 64 * 1024 * 1024,
        unknown: UnknownPolicy | None = None,
        max_concurrent: int = 100,
        queue_max: int = 1000,
        tiers: Sequence[FaultyTier] | None = None,
        budget: Sequence[Budget] = (),
        hedge: Hedge | None = None,
        journal: Journal | None = None,
        copies: bool = False,
        leases: Leases | None = None,
        aliases: Aliases | None = None,
        similar_prompts: SimilarPrompts | None = None,
        undrained: Undrained | None = None,
        until_last_is_well: Callable[[], Awaitable[object]] = at_once,
    ) -> None:
        """A new process on the same tiers, or on some of them."""
        windows = stale_windows([self.namespace])
        self.memory = MemoryCache(clock=self.clock, max_bytes=memory_bytes, epochs=self.epochs, stale_s=windows)
        tiers = [self.redis, self.s3] if tiers is None else tiers
        self.keeper = Keeper(
            memory=self.memory,
            tiers=tiers,
            books=self.books,
            clock=self.clock,
            journal=journal,
            copies=copies,
            epochs=self.epochs,
            on_replaced=self.coherence.replaced,
            undrained=undrained,
            until_last_is_well=until_last_is_well,
        )
        self.ledger = MemoryLedger()
        self.generator = build_generator(
            lanes([self.upstream], [MODEL]),
            clock=self.clock,
            books=self.books,
            ledger=self.ledger,
            limits={self.upstream.name: GroupLimits(concurrent=max_concurrent)},
            queue_max=queue_max,
            budget=budget,
            retry_share=0.0,  # what fails, fails: the cache's part in it is what these tests are about
        )
        self.reviews = Reviews(memory=self.memory, tiers=tiers, keeper=self.keeper, namespaces=[self.namespace])
        self.cache = PromptCache(
            memory=self.memory,
            tiers=tiers,
            keeper=self.keeper,
            generation=self.generator,
            reviews=self.reviews,
            replays=self.replays,
            identify=identify,
            books=self.books,
            clock=self.clock,
            unknown=unknown or UnknownPolicy(),
            backpressure=Backpressure(journal=journal, high_water=0.75, clock=self.clock),
            leases=leases or NoLeases(),
            aliases=aliases or NoAliases(),
            similar_prompts=similar_prompts,
            coherence=self.coherence,
            renderer=self.renderer,
            hedge=hedge,
            rng=Random(7),  # noqa: S311 - picks pictures
        )

    def identity(self, prompt: str = "a red fox", **fields: object) -> tuple[ImageRequest, Identity]:
        request = ImageRequest(prompt=prompt, model=MODEL, **fields)  # type: ignore[arg-type] # test convenience
        return request, identify(request, self.namespace)

    async def ask(
        self, prompt: str = "a red fox", *, caller: Caller = EVERYTHING, **terms: object
    ) -> list[Served] | Pending:
        request, identity = self.identity(prompt)
        asked = Terms(**terms)  # type: ignore[arg-type] # test convenience
        return await self.cache.get(request, identity, namespace=self.namespace, caller=caller, terms=asked)

    async def get(self, prompt: str = "a red fox", **terms: object) -> Served:
        answer = await self.ask(prompt, **terms)
        assert not isinstance(answer, Pending)
        return answer[0]

    async def settle(self) -> None:
        """Let everything that can run without time passing run."""
        while True:
            tasks = {*self.keeper._writes}
            if not tasks:
                return
            await asyncio.wait(tasks)

    async def aclose(self) -> None:
        self.upstream.release()
        await self.cache.aclose(5)
        await self.generator.aclose()
        await self.keeper.aclose(5)


async def open_tier(directory: Path, name: TierName, clock: FakeClock, epochs: Epochs | None = None) -> FaultyTier:
    await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
    return FaultyTier(await DiskTier.open(directory, clock=clock, sync=False, epochs=epochs), name)


def open_s3(
    server: S3Server,
    *,
    clock: FakeClock,
    bucket: str | None = None,
    prefix: str = "",
    epochs: Epochs | None = None,
) -> S3Tier:
    """A tier on a real S3, in the bucket that tests share unless it names another, patient with a busy machine."""
    return S3Tier(
        bucket=bucket or server.bucket,
        clock=clock,
        prefix=prefix,
        region=server.region,
        endpoint=server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        connect_timeout_s=5.0,
        read_timeout_s=30.0,
        epochs=epochs,
    )


def alone_with(epochs: Epochs, *, books: CounterBooks, clock: FakeClock) -> Coherence:
    """What a replica without others knows of purges."""
    return Coherence(epochs=epochs, shared=None, files=None, last_tier=None, books=books, clock=clock)
