"""Whatever comes, calls that are answered at once are answered, booked and remembered as if they had been asked."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast
from unittest.mock import patch

import grpc.aio
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from cacheserver.accounting.books import ToldApart
from cacheserver.epochs import Epochs
from cacheserver.errors import UnknownCallError
from cacheserver.identity import identify
from cacheserver.model import (
    AnswerFrom,
    CacheKey,
    Caller,
    ImageRequest,
    MatchLevel,
    Namespace,
    Outcome,
    Permission,
    Served,
    StatsField,
    TierName,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.known import Latest
from cacheserver.rpc.service import Limits, PromptCacheService
from tests.fakes import FakeClock
from tests.house import MODEL, FaultyTier, House
from tests.rpc_front import SERVICE, Front, ask, authorization, open_front, spec
from tests.test_calls_auth import digest
from tests.test_interleavings import DictTier
from tests.waiting import until

pytestmark = pytest.mark.no_cover

SHARED, OTHER, HALF, RECORDED = (
    Namespace("shared", "default", answer_from=frozenset(AnswerFrom)),
    Namespace("other", "other"),
    Namespace("half", "default", serve_percent=50),
    Namespace("recorded", "default", store_prompts=True),
)
NAMESPACES = ("", "", "", "default", "shared", "shared", "other", "half", "recorded", "nowhere")
CALLERS = {
    "a": Caller("ann", frozenset(Permission)),
    "b": Caller("bob", frozenset({Permission.READ}), namespaces=frozenset({"default", "shared"})),
    "c": Caller("ann", frozenset(Permission), namespaces=frozenset({"other"})),  # of the same name
    "d": Caller("dan", frozenset({Permission.PURGE})),
}
PROMPTS = ("a red fox", "a  red fox", "a blue fox", "a green fox", "a grey fox")
MEMORY_BYTES = 13_000
"""Room for three pictures: what went first shows in what is answered from."""


def fields(**of: Any) -> bytes:
    return pb.GetImageRequest(**of).SerializeToString()


IDS = (
    fields(request_id="one"),
    fields(request_id="two"),
    fields(request_id="x" * 129),
    fields(request_id="ä\n"),
    fields(tags=["a", "b"]),
    fields(tags=["t"] * 9),
    fields(tags=["not fit"]),
    b"\x72\x83\x00one",  # a length in more bytes than it takes
    b"\xf2\x00\x03one",  # a field number so written
    b"\xf2\x00\x81\x01" + b"x" * 129,
    b"\xfa\x00\x01t" * 9,
    b"\x70\x05",  # a number in place of a text
    b"\x72\x02\xff\xfe",  # no text
)
"""What says nothing of a stored picture, fit or not."""

MORE = (
    fields(n=1),
    fields(n=2),
    fields(cache_policy=pb.CACHE_POLICY_ONLY_IF_CACHED),
    fields(cache_policy=pb.CACHE_POLICY_REFRESH),
    fields(cache_policy=pb.CACHE_POLICY_NO_STORE),
    fields(max_age={"seconds": 1}),
    fields(max_age={}),
    fields(ttl={"seconds": 2}),
    fields(max_wait={}),
    fields(variant_policy=pb.VARIANT_POLICY_STICKY),
    fields(variant_policy=pb.VARIANT_POLICY_NEXT),
    fields(exclude_keys=["no key"]),
    fields(delivery=pb.DELIVERY_URL),
    fields(delivery=pb.DELIVERY_AUTO),
    fields(max_inline_bytes=1),
    fields(max_inline_bytes=1_000_000),
    fields(match_level=pb.MATCH_LEVEL_EXACT),
    fields(match_level=pb.MATCH_LEVEL_SEMANTIC),
    fields(use="thumbnail"),
    fields(candidates=1),
    fields(key="no key"),  # in place of what is asked for, or before it
    fields(spec=spec("", quality="high")),  # merged with what is asked for, before or after
    fields(spec=spec("", seed=7)),
    b"\xf8\x07\x05",  # a field of tomorrow
    b"\x9b\x06\x9c\x06",  # a group
    b"\x0a",  # cut off
)
METADATA: tuple[tuple[tuple[str, str], ...], ...] = (
    *(() for _ in range(20)),
    (("cache-control", "max-age=1"),),
    (("cache-control", "no-cache"),),
    (("cache-control", "no-transform"),),
    (("x-fallbacks", "2"),),
    (("traceparent", f"00-{'1' * 32}-{'2' * 16}-00"),),
)


@dataclass(frozen=True)
class Get:
    """A call: its caller's token, its request, and what it says beside."""

    token: str
    raw: bytes
    metadata: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Time:
    """Time passes on both clocks; the wall clock is put right meanwhile."""

    passed_s: float
    corrected_s: float = 0.0


@dataclass(frozen=True)
class Done:
    """Something else is done to the service."""

    what: str


Step = Get | Time | Done


class Noted:
    """A trace: what was noted."""

    def __init__(self) -> None:
        self.notes: list[object] = []

    def answered(
        self,
        served: Served,
        outcome: Outcome,
        what: ImageRequest | CacheKey,
        *,
        namespace: Namespace,
        match_level: MatchLevel | None,
    ) -> None:
        told = replace(served, entry=cast("Any", (served.entry.key.name, served.entry.image.sha256)))
        self.notes.append((told, outcome, what, namespace, match_level))


@dataclass
class Told:
    """What came of a schedule."""

    answers: list[object] = field(default_factory=list)
    rows: list[object] = field(default_factory=list)
    recalled: dict[str, object] = field(default_factory=dict)
    in_memory: list[object] = field(default_factory=list)
    logged: list[object] = field(default_factory=list)
    noted: list[object] = field(default_factory=list)
    upstream_calls: int = 0


async def result(call: Any) -> object:
    """What a call returns; None if it fails."""
    with suppress(grpc.aio.AioRpcError):
        return await call
    return None


class Shop:
    """Serves a schedule."""

    def __init__(self, front: Front, *, logs_calls: bool, traces: bool) -> None:
        self.told = Told()
        self._front = front
        self._house = front.house
        self._service = cast("PromptCacheService", front.server._services[0])
        self._service._reception._logs_calls = logs_calls
        self.at_once = 0
        self._noted = Noted()
        if traces:
            self._service._asking._trace = self._noted
        self._calls = 0
        hit_again = self._house.books.hit_again

        def count(*of: Any) -> None:
            self.at_once += 1
            hit_again(*of)

        self._house.books.hit_again = count  # type: ignore[method-assign] # it only looks on

    async def serve(self, steps: Sequence[Step]) -> None:
        for step in steps:
            match step:
                case Get():
                    self.told.answers.append(await self._answer(step))
                case Time():
                    self._house.clock.advance(step.passed_s)
                    self._house.clock._wall_s += step.corrected_s
                case Done():
                    await self._do(step.what)
            await self._house.settle()
            self.told.in_memory.append((self._house.memory.size_bytes, sorted(self._house.memory._entries)))
        await until(lambda: self._service._reception._in_progress == 0)
        self._look()

    async def _answer(self, step: Get) -> object:
        self._calls += 1
        who = authorization(step.token) if step.token else ()
        get = self._front.channel.unary_unary(f"{SERVICE}/GetImage")
        call = get(step.raw, metadata=(*who, *step.metadata, ("x-request-id", f"r{self._calls}")))
        return await result(call), await call.code(), await call.details(), sorted(await call.trailing_metadata() or ())

    async def _do(self, what: str) -> None:
        house, stub = self._house, self._front.stub
        match what:
            case "purge":
                metadata = (*authorization("a"), ("x-request-id", "purge"))
                await result(stub.PurgeImages(pb.PurgeImagesRequest(spec=spec()), metadata=metadata))
            case "forget":
                house.memory.shed(0)
                house.memory.shed(MEMORY_BYTES)
            case "take":
                house.books.take()
            case "redis is gone" | "redis is back":
                house.redis.is_down = what == "redis is gone"
            case "price":
                worth = house.generator.worth_microusd
                house.generator.worth_microusd = lambda *of: worth(*of) + 7  # type: ignore[method-assign] # it rises
                house.clock.advance(61)

    def _look(self) -> None:
        house, told = self._house, self.told
        told.rows.append(house.books.snapshot(None, tuple(StatsField)).rows)
        told.noted, told.upstream_calls = self._noted.notes, house.upstream.calls
        for number in range(1, self._calls + 1):
            for caller in CALLERS.values():
                with suppress(UnknownCallError):
                    call = self._service._recall.explain(f"r{number}", caller)
                    wish = None if call.wish is None else (call.wish.key, call.wish.fields)
                    told.recalled[f"r{number} {caller.name}"] = call._replace(wish=cast("Any", wish))


async def served(steps: Sequence[Step], known_requests: int | None, *, logs_calls: bool, traces: bool) -> Shop:
    """The shop that has served the schedule. `known_requests` None: it answers nothing at once."""
    clock = FakeClock(1_800_000_000.25)
    epochs = Epochs()
    redis, s3 = (FaultyTier(DictTier(clock, epochs=epochs), name) for name in (TierName.REDIS, TierName.S3))
    house = House(clock=clock, redis=redis, s3=s3, epochs=epochs, memory_bytes=MEMORY_BYTES)
    house.books._told_apart = ToldApart(frozenset({MODEL}), frozenset({"auto", "high"}), max_callers=1)
    try:
        async with open_front(
            house,
            callers=[(digest(token), caller) for token, caller in CALLERS.items()],
            anonymous=None,
            namespaces=(SHARED, OTHER, HALF, RECORDED),
            limits=Limits(known_requests=known_requests or 0),
            at_once=known_requests is not None,
        ) as front:
            shop = Shop(front, logs_calls=logs_calls, traces=traces)
            with capture_logs([merge_contextvars]) as lines:
                await shop.serve(steps)
            shop.told.logged += lines
            return shop
    finally:
        await house.aclose()


def key_of(prompt: str, namespace: Namespace) -> bytes:
    return fields(key=identify(ImageRequest(prompt, MODEL), namespace).key.name)


WHAT = (
    *(ask().SerializeToString() for _ in range(6)),
    *(ask(prompt).SerializeToString() for prompt in PROMPTS),
    ask(of={"quality": "high"}).SerializeToString(),
    *(key_of("a red fox", namespace) for namespace in (SHARED, OTHER)),
    key_of("a red fox", SHARED)[:-1] + b"1",
    fields(key="no key"),
    ask("x" * 4_100).SerializeToString(),
)


def few(of: Sequence[bytes]) -> st.SearchStrategy[list[bytes]]:
    """Mostly none of them."""
    some = st.lists(st.sampled_from(of), min_size=1, max_size=2)
    return st.one_of(st.just([]), st.just([]), some)


spaces = st.sampled_from(NAMESPACES).map(lambda name: fields(namespace=name))
requests = st.tuples(spaces, st.sampled_from(WHAT)).flatmap(
    lambda both: few(MORE).flatmap(lambda more: st.permutations([*both, *more]))
)
tokens = st.sampled_from(("a", "b", "c", "d", "nobody's", ""))


@st.composite
def schedules(draw: st.DrawFn) -> list[Step]:
    asked = [[ask().SerializeToString()], *draw(st.lists(requests, max_size=2))]
    callers = ["a", *draw(st.lists(tokens, max_size=2))]

    def get() -> Get:
        parts = [*draw(st.sampled_from(asked))]
        for each in draw(few(IDS)):
            parts.insert(draw(st.integers(0, len(parts))), each)
        return Get(draw(st.sampled_from(callers)), b"".join(parts), draw(st.sampled_from(METADATA)))

    others: st.SearchStrategy[Step] = st.builds(
        Time, st.sampled_from((0.25, 0.5, 1.0, 2.75, 61.0)), st.sampled_from((0.0, 0.0, -1.5, -100.0, 100.0))
    ) | st.builds(Done, st.sampled_from(("purge", "forget", "take", "redis is gone", "redis is back", "price")))
    count = draw(st.sampled_from((8, 16, 24)))
    return [get() if draw(st.integers(0, 5)) else draw(others) for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(schedules(), st.sampled_from(["logs calls", "traces"]))
def test_whatever_comes_is_answered_booked_and_remembered_as_if_all_were_asked(steps: list[Step], does: str) -> None:
    # What is kept with an entry of who asked last counts, and so another entry may go sooner.
    with patch.object(Latest, "size_bytes", 0):
        asked, read, known = (
            asyncio.run(served(steps, most, logs_calls=does == "logs calls", traces=does == "traces"))
            for most in (None, 0, 10_000)
        )
    assert asked.at_once == 0
    event(f"at once: {min(known.at_once, 3)}")
    for name in (each.name for each in dataclasses.fields(Told)):
        assert getattr(read.told, name) == getattr(asked.told, name), name
        assert getattr(known.told, name) == getattr(asked.told, name), name
