"""The admin API on a real port, over sources that a test fills and looks into."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import grpc.aio
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.calls.auth import Authenticator
from cacheserver.calls.call import Call
from cacheserver.coherence import Coherence
from cacheserver.control.matches import LocalMatches
from cacheserver.epochs import Epochs
from cacheserver.errors import TierError, UnknownReviewError, UnknownUpstreamError
from cacheserver.interfaces import Prompts
from cacheserver.model import (
    Alarm,
    AlarmKind,
    AlarmRule,
    AlarmState,
    Attempt,
    AttemptOutcome,
    Budget,
    BudgetPeriod,
    BudgetScope,
    BudgetState,
    CachedImage,
    CacheKey,
    Caller,
    GeneratedImage,
    MatchLevel,
    Namespace,
    Permission,
    TierName,
    UpstreamHealth,
    UpstreamState,
    Usage,
)
from cacheserver.oversight import Oversight
from cacheserver.pb.admin_pb2_grpc import AdminServiceStub
from cacheserver.rpc.admin import AdminService, check_right
from cacheserver.rpc.admin_matches import AdminMatches
from tests.fakes import FakeClock

NOW_S = 1_800_000_000.0
OPERATOR = Caller("operator", frozenset({Permission.ADMIN}))


def upstream(name: str = "north", **facts: Any) -> UpstreamState:
    state = UpstreamState(
        name=name,
        limit_group="acme",
        models=("gpt-image-2", "painter"),
        health=UpstreamHealth.WELL,
        weight=2.0,
        percent=None,
        rank=1,
        price_factor=0.9,
        success_rate=0.985,
        latency_s=None,
        in_flight=3,
        calls=1_234,
        images_per_minute=None,
    )
    return replace(state, **facts)


def budget(scope: BudgetScope = BudgetScope.GLOBAL, subject: str = "", **facts: Any) -> BudgetState:
    state = BudgetState(
        budget=Budget(scope, subject, BudgetPeriod.DAY, limit_microusd=50_000_000),
        spent_microusd=12_345_678,
        reserved_microusd=200_000,
        reset_time_s=NOW_S + 3_600,
    )
    return replace(state, **facts)


def alarm(name: str = "few-hits", state: AlarmState = AlarmState.QUIET, **facts: Any) -> Alarm:
    rule = AlarmRule(name, AlarmKind.HIT_RATE_BELOW, threshold=0.5, runbook_url="https://wiki/few-hits")
    return replace(Alarm(rule, state, since_s=NOW_S, value=0.25), **facts)


def attempt(number: int = 0, **facts: Any) -> Attempt:
    row = Attempt(
        id=f"a{number:04}",
        namespace="shop",
        caller="catalog",
        upstream="north",
        model="gpt-image-2",
        quality="high",
        images=2,
        estimate_microusd=120_000,
        start_time_s=NOW_S + number,
        tags=("spring", "banner"),
        outcome=AttemptOutcome.SETTLED,
        end_time_s=NOW_S + number + 2.5,
        cost_microusd=106_001,
        reason="ok",
        upstream_request_id="req_1",
        usage=Usage(input_tokens=10, input_text_tokens=10, output_tokens=400, total_tokens=410),
    )
    return replace(row, **facts)


@dataclass(frozen=True)
class Waiting:
    """A picture that waits to have `key`."""

    key: CacheKey
    entry: CachedImage


def review(number: int = 0, *, score: float | None = 0.31, data: bytes = bytes(1_500), **facts: Any) -> Waiting:
    key = CacheKey("shop", number.to_bytes(16), bytes(16), 0)
    image = GeneratedImage(
        data=data,
        content_type="image/png",
        width=1024,
        height=768,
        sha256=hashlib.sha256(data).hexdigest(),
        model="gpt-image-2",
        size="1024x768",
        quality="high",
        background="auto",
        paid_microusd=53_000,
        score=score,
    )
    entry = CachedImage(key.in_review, replace(image, **facts), "shop", b"", NOW_S, tags=("spring",))
    return Waiting(key, entry)


def picture_key(number: int, *, partition: str = "shop", variant: int = 0) -> CacheKey:
    """The key of a picture; each number is an identity of its own."""
    return CacheKey(partition, number.to_bytes(16), number.to_bytes(16), variant)


def sample_hit(matches: LocalMatches, number: int, *, namespace: str = "shop", prompt: str = "") -> None:
    """Keep a similar hit: an odd key was asked for, and the even one after it answered."""
    asked, answered = picture_key(2 * number + 1), picture_key(2 * number + 2)
    matches.record(namespace=namespace, level=MatchLevel.CANONICAL, key=asked, matched_key=answered, prompt=prompt)


@dataclass
class Upstreams:
    """A pool that only remembers."""

    all: list[UpstreamState] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    def states(self) -> list[UpstreamState]:
        return self.all

    async def update(
        self,
        name: str,
        *,
        weight: float | None = None,
        percent: float | None = None,
        clear_percent: bool = False,
        paused: bool | None = None,
    ) -> UpstreamState:
        state = next((each for each in self.all if each.name == name), None)
        if state is None:
            raise UnknownUpstreamError("No upstream is called so.")
        self.changes.append({"weight": weight, "percent": percent, "clear_percent": clear_percent, "paused": paused})
        return replace(
            state,
            weight=state.weight if weight is None else weight,
            percent=percent,
            health=UpstreamHealth.PAUSED if paused else state.health,
        )


@dataclass
class Budgets:
    """Budgets that never run out. Only what operators see and change is asked of them."""

    all: list[BudgetState] = field(default_factory=list)

    async def states(self) -> list[BudgetState]:
        return self.all

    async def set_limit(self, name: str, limit_microusd: int) -> BudgetState:
        for index, state in enumerate(self.all):
            if state.budget.name == name:
                self.all[index] = replace(state, budget=replace(state.budget, limit_microusd=limit_microusd))
                return self.all[index]
        raise UnknownUpstreamError("No budget is called so.")


@dataclass
class Ledger:
    """A ledger in a list."""

    all: list[Attempt] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)

    async def rows(self, *, since_s: float, until_s: float, after: str, limit: int) -> list[Attempt]:
        self.limits.append(limit)
        return [row for row in self.all if since_s <= row.start_time_s < until_s and row.id > after][:limit]


@dataclass
class Reviews:
    """Pictures that wait. An approved one becomes the second of its request."""

    all: list[Waiting] = field(default_factory=list)
    approved: list[CacheKey] = field(default_factory=list)
    rejected: list[CacheKey] = field(default_factory=list)

    async def page(self, *, after: str, limit: int) -> list[Waiting]:
        waiting = sorted(self.all, key=lambda each: each.key.name)
        return [each for each in waiting if each.key.name > after][:limit]

    async def get(self, key: CacheKey) -> CachedImage:
        return self._found(key).entry

    async def approve(self, key: CacheKey) -> CachedImage:
        entry = self._take(key)
        self.approved.append(key)
        return replace(entry, key=key.with_variant(1))

    async def reject(self, key: CacheKey) -> None:
        self._take(key)
        self.rejected.append(key)

    def _take(self, key: CacheKey) -> CachedImage:
        waiting = self._found(key)
        self.all.remove(waiting)
        return waiting.entry

    def _found(self, key: CacheKey) -> Waiting:
        for each in self.all:
            if each.key == key:
                return each
        raise UnknownReviewError("No picture of this key waits for review.")


class NoImages:
    """Nothing comes in, and nothing is there."""

    async def import_images(self, parts: object, call: Call) -> AsyncGenerator[bytes, None]:  # noqa: ARG002 - as above
        check_right(call)
        for nothing in ():
            yield nothing

    async def list_images(self, message: object, call: Call) -> bytes:  # noqa: ARG002 - as above
        check_right(call)
        return b""


@dataclass
class Alarms:
    """Alarms in a list."""

    all: list[Alarm] = field(default_factory=list)

    def states(self) -> list[Alarm]:
        return self.all


@dataclass
class Files:
    """The last tier, as far as it keeps marks: their names, in the order in which they came."""

    names: list[str] = field(default_factory=list)
    is_down: bool = False

    async def files(self, start: str) -> list[str]:
        return [name for name in self.names if name.startswith(start)]

    async def write_file(self, name: str, data: bytes) -> None:  # noqa: ARG002 - they are empty
        if self.is_down:
            raise TierError("down for a test")
        self.names.append(name)

    async def delete_file(self, name: str) -> None:
        self.names.remove(name)


@dataclass
class Sources:
    """All that the admin API shows and changes."""

    clock: FakeClock = field(default_factory=FakeClock)

    upstreams: Upstreams = field(default_factory=Upstreams)
    budgets: Budgets = field(default_factory=Budgets)
    ledger: Ledger = field(default_factory=Ledger)
    reviews: Reviews = field(default_factory=Reviews)
    images: Any = field(default_factory=NoImages)
    """By default none; tests of images bring the real thing."""
    alarms: Alarms = field(default_factory=Alarms)
    epochs: Epochs = field(default_factory=Epochs)
    files: Files = field(default_factory=Files)

    def __post_init__(self) -> None:
        self.matches = LocalMatches(clock=self.clock)


def admin_service(
    sources: Sources,
    *,
    callers: Sequence[tuple[bytes, Caller]] = (),
    anonymous: Caller | None = OPERATOR,
    prompts: Prompts | None = None,
) -> AdminService:
    clock = sources.clock
    books = cast("Any", CounterBooks(clock=clock, registry=CollectorRegistry()))
    coherence = Coherence(
        epochs=sources.epochs, shared=None, files=sources.files, last_tier=TierName.S3, books=books, clock=clock
    )
    oversight = Oversight(coherence=coherence, matches=sources.matches)
    namespaces = [Namespace("default", "default"), Namespace("shop", "shop")]
    return AdminService(
        upstreams=sources.upstreams,
        budgets=cast("Any", sources.budgets),
        ledger=cast("Any", sources.ledger),
        reviews=sources.reviews,
        images=sources.images,
        matches=AdminMatches(oversight, namespaces=namespaces),
        alarms=sources.alarms,
        authenticator=Authenticator(callers, anonymous=anonymous),
        books=books,
        clock=clock,
        prompts=prompts,
    )


@asynccontextmanager
async def serving(service: AdminService) -> AsyncIterator[str]:
    """The address the service answers at until the block ends."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([service.handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=0)


@asynccontextmanager
async def calling(address: str) -> AsyncIterator[Any]:
    """A plain generated client, as another team would have it."""
    async with grpc.aio.insecure_channel(address) as channel:
        yield AdminServiceStub(channel)  # type: ignore[no-untyped-call] # generated code
