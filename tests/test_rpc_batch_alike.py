"""Whatever comes over a stream, it is answered and booked alike whether what lies ready is answered at once or not."""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheserver.epochs import Epochs
from cacheserver.errors import UnknownCallError
from cacheserver.model import GeneratedImage, ImageRequest, StatsField, TierName
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.service import Limits, PromptCacheService
from tests.fakes import FakeClock
from tests.house import FaultyTier, House
from tests.provider import FakeUpstream
from tests.rpc_front import ANYONE, SERVICE, Front, ask, failure, open_front
from tests.test_interleavings import DictTier
from tests.waiting import until

pytestmark = pytest.mark.no_cover

TWICE, ONCE = "a fox that was asked for twice", "a fox that was asked for once"
A_FIELD_OF_TOMORROW = b"\xc2\x3e\x03new"
MAX_ID = 128

READY = {"ready", "ready, with tags"}
FAILURES: dict[str, dict[str, Any]] = {
    "not cached": {"cache_policy": "CACHE_POLICY_ONLY_IF_CACHED"},
    "invalid": {"n": 11},
    "elsewhere": {"namespace": "nowhere"},
}
KINDS = (*READY, "of tomorrow", "asked for once", "made before", "new", "new", *FAILURES)
IDS = ("{}", "{}", "again", "not fit for a log {}", "{:0>128}", "{:0>129}")
ENDS = ("closes", "goes away", "sends no id", "sends an id twice", "sends no message")


class Painter(FakeUpstream):
    """Makes the same picture of the same prompt, in whatever order it is asked."""

    def _image(self, request: ImageRequest) -> GeneratedImage:
        self._numbers = itertools.count(zlib.crc32(request.prompt.encode()))
        return super()._image(request)


@dataclass(frozen=True)
class Plan:
    """What a caller does: messages of requests, each by its kind and the form of its id; None: pictures are made."""

    steps: Sequence[Sequence[tuple[str, str]] | None]
    end: str
    in_flight: int


@dataclass
class Told:
    """What came of it."""

    answers: dict[str, list[pb.BatchItem]] = field(default_factory=dict)
    failed: tuple[str, str, dict[str, str]] | None = None
    in_progress: list[int] = field(default_factory=list)
    rows: object = None
    recalled: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request as it is sent; whether it waits for its picture to be made, and whether its answer may lie ready."""

    message: pb.GetImageRequest
    is_held: bool
    may_be_ready: bool


class Caller:
    """Carries out a plan, and waits after each step until no further answer can come."""

    def __init__(self, front: Front, plan: Plan) -> None:
        self.told = Told()
        self.ready = 0
        self.should_be_ready = 0
        self._plan = plan
        self._front = front
        self._service = cast("PromptCacheService", front.server._services[0])
        self._upstream = front.house.upstream
        self._numbers = itertools.count(1)
        self._ids: list[str] = []
        self._answered: list[str] = []
        self._made: list[str] = []
        self._held: list[pb.GetImageRequest] = []
        self._waiting: deque[Request] = deque()
        self._calls_expected = 0
        self._answers_expected = 0
        self._call: Any = None

    async def carry_out(self) -> None:
        for prompt in (TWICE, TWICE, TWICE, ONCE):
            await self._front.stub.GetImage(ask(prompt))
        self._calls_expected = self._upstream.calls
        self._upstream.hold()
        self._count_ready()
        open_stream = self._front.channel.stream_stream(f"{SERVICE}/BatchGetImages")
        self._call = open_stream(metadata=(("x-request-id", "r1"),))
        for step in self._plan.steps:
            await (self._make_pictures() if step is None else self._send(step))
        await self._end()
        await self._look_at_the_books()

    async def _send(self, step: Sequence[tuple[str, str]]) -> None:
        requests = [self._request(kind, self._id(form)) for kind, form in step]
        self._ids += [request.message.request_id for request in requests]
        await self._write(*(request.message for request in requests))
        self._waiting += requests
        await self._come_to_rest()

    def _id(self, form: str) -> str:
        if form == "again" and self._answered:
            self._answered.sort()  # the order in which they became ready is another matter
            return self._answered.pop()
        return ("{}" if form == "again" else form).format(next(self._numbers))

    def _request(self, kind: str, request_id: str) -> Request:
        is_fit = len(request_id) <= MAX_ID
        if kind == "new":
            message = ask(f"a new fox, {next(self._numbers)}", request_id=request_id)
            return Request(message, is_held=is_fit, may_be_ready=False)
        prompts = {"asked for once": ONCE, "made before": self._made[-1] if self._made else ONCE}
        if kind in FAILURES:
            prompts[kind] = f"a fox nobody makes, {next(self._numbers)}"
        message = ask(prompts.get(kind, TWICE), request_id=request_id, **FAILURES.get(kind, {}))
        if kind == "ready, with tags":
            message.tags.append("a")
        if kind == "of tomorrow":
            message.MergeFromString(A_FIELD_OF_TOMORROW)
        return Request(message, is_held=False, may_be_ready=kind in READY and is_fit)

    async def _write(self, *messages: pb.GetImageRequest) -> None:
        await self._call.write(pb.BatchGetImagesRequest(requests=messages).SerializeToString())

    async def _come_to_rest(self) -> None:
        """Read what can be answered while no picture is made; what finds no place left waits."""
        while self._waiting and len(self._held) < self._plan.in_flight:
            request = self._waiting.popleft()
            self.should_be_ready += request.may_be_ready
            if request.is_held:
                self._held.append(request.message)
                self._calls_expected += 1
            else:
                self._answers_expected += 1
        await self._read()
        await self._upstream.arrived(self._calls_expected)
        await self._until_in_progress(1 + len(self._held))

    async def _read(self) -> None:
        while self._answers_expected:
            raw = await self._call.read()
            for item in pb.BatchGetImagesResponse.FromString(raw).items:
                self.told.answers.setdefault(item.request_id, []).append(item)
                self._answered.append(item.request_id)
                self._answers_expected -= 1
        assert self._answers_expected == 0

    async def _until_in_progress(self, calls: int) -> None:
        reception = self._service._reception
        await until(lambda: reception._in_progress == calls)
        self.told.in_progress.append(calls)

    async def _make_pictures(self) -> None:
        waiting = [request.message for request in self._waiting if request.is_held]
        self._answers_expected += len(self._held) + len(self._waiting)
        self.should_be_ready += sum(request.may_be_ready for request in self._waiting)
        self._made += [message.spec.prompt for message in (*self._held, *waiting)]
        self._calls_expected += len(waiting)
        self._held.clear()
        self._waiting.clear()
        self._upstream.release()
        await self._read()
        await self._front.house.settle()
        self._upstream.hold()

    async def _end(self) -> None:
        match self._plan.end:
            case "closes":
                await self._call.done_writing()
                await self._make_pictures()
                assert await self._call.read() is grpc.aio.EOF
                return
            case "goes away":
                self._call.cancel()
                return
        if len(self._held) >= self._plan.in_flight:
            await self._make_pictures()  # else nothing more is read
        match self._plan.end:
            case "sends an id twice" if self._held:
                await self._write(self._held[0], ask(TWICE, request_id="never begun"))
            case "sends no message":
                await self._call.write(b"\xff\xff")
            case _:
                await self._write(ask(TWICE), ask(TWICE, request_id="never begun"))
        failed = await failure(self._call.read())
        self.told.failed = failed.code, failed.reason, failed.fields

    async def _look_at_the_books(self) -> None:
        await self._until_in_progress(0)
        house = self._front.house
        self._upstream.release()
        await until(lambda: house.cache.in_flight == 0)
        await house.settle()
        self.told.rows = house.books.snapshot(None, tuple(StatsField)).rows
        for number, request_id in enumerate(self._ids, 1):
            for name in (f"r1/{request_id}", f"r1/?{number}"):
                with suppress(UnknownCallError):
                    self.told.recalled[name] = self._service._recall.explain(name, ANYONE)._replace(wish=None)

    def _count_ready(self) -> None:
        calls = self._service._calls
        ready_item = calls.ready_item

        def counted(*args: Any) -> Any:
            outcome = ready_item(*args)
            self.ready += outcome is not None
            return outcome

        calls.ready_item = counted  # type: ignore[method-assign] # it only looks on


async def carried_out(plan: Plan, *, at_once: bool) -> Caller:
    """The caller, once it has carried out the plan with a service that answers what it can at once, or nothing."""
    clock = FakeClock()
    epochs = Epochs()
    redis, s3 = (FaultyTier(DictTier(clock, epochs=epochs), name) for name in (TierName.REDIS, TierName.S3))
    house = House(clock=clock, redis=redis, s3=s3, epochs=epochs)
    house.upstream = Painter()
    house.restart()
    limits = Limits(batch_in_flight=plan.in_flight)
    async with open_front(house, limits=limits, at_once=at_once) as front:
        caller = Caller(front, plan)
        await caller.carry_out()
    await house.aclose()
    return caller


plans = st.builds(
    Plan,
    steps=st.lists(
        st.none() | st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(IDS)), max_size=6), max_size=6
    ),
    end=st.sampled_from(ENDS),
    in_flight=st.sampled_from((2, 32)),
)


@settings(max_examples=25)
@given(plans)
def test_what_is_answered_at_once_is_answered_booked_and_recalled_as_if_it_had_been_worked_on(plan: Plan) -> None:
    worked_on = asyncio.run(carried_out(plan, at_once=False))
    at_once = asyncio.run(carried_out(plan, at_once=True))
    assert worked_on.ready == 0
    assert at_once.ready >= at_once.should_be_ready
    assert at_once.told == worked_on.told
