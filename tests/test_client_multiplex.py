"""Calls that share streams: every one of them ends as a call of its own would, and none waits behind another."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cacheserver.client import (
    AsyncClient,
    CacheError,
    CachePolicy,
    DeadlineError,
    ImageResult,
    KeyGoneError,
    TierName,
    TryAgainError,
    UnauthenticatedError,
    UnreachableError,
    VariantPolicy,
    channel,
    multiplex,
)
from cacheserver.errors import OverloadedError, PromptRefusedError
from cacheserver.model import Budget, BudgetPeriod, BudgetScope, ImageRequest
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from cacheserver.rpc.service import Limits
from tests.fakes import FakeClock
from tests.house import House, open_tier
from tests.provider import small_image
from tests.rpc_front import Front, open_front
from tests.servers import TcpProxy
from tests.test_client import PNG, Fail, answer, serving
from tests.waiting import until

SOON = Duration(nanos=5_000_000)
CALLED_OFF = pb.Failure(code=grpc.StatusCode.CANCELLED.value[0])
DOWN = pb.Failure(code=grpc.StatusCode.UNAVAILABLE.value[0], reason="UPSTREAM_DOWN", retry_delay=SOON)


@dataclass
class Service(pb_grpc.PromptCacheServiceServicer):
    """Answers requests of streams and calls of their own, each with the next step of its prompt's script, or a picture.

    A step is an answer, a Failure, a Fail that ends the whole stream, an event to wait for, "hang" for `release`, or
    "no place". It answers for what is cancelled if it `hears`.
    """

    script: dict[str, list[Any]] = field(default_factory=dict)
    streams: list[list[pb.BatchGetImagesRequest]] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    alone: list[pb.GetImageRequest] = field(default_factory=list)
    alone_metadata: list[dict[str, str]] = field(default_factory=list)
    headers: tuple[tuple[str, str], ...] = (("x-batch-in-flight", "32"),)
    hears: bool = True
    called_off: list[str] = field(default_factory=list)
    cancelled: int = 0
    ended: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def asked(self) -> list[pb.GetImageRequest]:
        return [request for stream in self.streams for message in stream for request in message.requests]

    async def GetImage(  # noqa: N802 - gRPC's name
        self, request: pb.GetImageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetImageResponse:
        self.alone.append(request)
        self.alone_metadata.append({name: str(value) for name, value in context.invocation_metadata() or ()})
        step = self._step(request)
        if isinstance(step, Fail):
            await step.abort(context)
        if step == "hang":
            await self.release.wait()
        return step if isinstance(step, pb.GetImageResponse) else answer()

    async def BatchGetImages(  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[pb.BatchGetImagesRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        sent: list[pb.BatchGetImagesRequest] = []
        self.streams.append(sent)
        self.metadata.append({name: str(value) for name, value in context.invocation_metadata() or ()})
        await context.send_initial_metadata(self.headers)
        working: list[asyncio.Task[None]] = []
        turn = asyncio.Lock()  # gRPC writes one message at a time
        try:
            async for message in requests:
                sent.append(message)
                self.called_off += message.cancelled
                told_off = [self._answer(each, CALLED_OFF, context, turn) for each in message.cancelled if self.hears]
                working += map(asyncio.create_task, told_off)
                for request in message.requests:
                    step = self._step(request)
                    if isinstance(step, Fail):
                        await step.abort(context)
                    working.append(asyncio.create_task(self._answer(request.request_id, step, context, turn)))
            await asyncio.gather(*working)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.ended += 1
            for task in working:
                task.cancel()

    def _step(self, request: pb.GetImageRequest) -> Any:
        script = self.script.get(request.spec.prompt or request.key, ())
        return script.pop(0) if isinstance(script, list) and script else answer()

    async def _answer(
        self, request_id: str, step: Any, context: grpc.aio.ServicerContext[Any, Any], turn: asyncio.Lock
    ) -> None:
        if step == "hang":
            step = self.release
        if isinstance(step, asyncio.Event):
            await step.wait()
            step = answer()
        item = pb.BatchItem(request_id=request_id)
        if step == "no place":
            item.no_place = True
        else:
            (item.failure if isinstance(step, pb.Failure) else item.response).CopyFrom(step)
        async with turn:
            await context.write(pb.BatchGetImagesResponse(items=[item]))


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def address(service: Service) -> AsyncIterator[str]:
    async with serving(service) as address:  # type: ignore[arg-type] # any servicer will do
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address, multiplex=True) as client:
        yield client


def in_progress(*calls: Awaitable[ImageResult]) -> list[asyncio.Future[ImageResult]]:
    return [asyncio.ensure_future(call) for call in calls]


class TestSharing:
    async def test_calls_at_a_time_go_on_one_stream_in_one_message(self, client: AsyncClient, service: Service) -> None:
        results = await asyncio.gather(*(client.get_image(f"fox {number}") for number in range(30)))
        assert [result.data for result in results] == [PNG] * 30
        [[message]] = service.streams
        assert [request.spec.prompt for request in message.requests] == [f"fox {number}" for number in range(30)]
        assert len({request.request_id for request in message.requests}) == 30
        assert service.alone == []

    async def test_calls_one_after_the_other_share_it_too(self, client: AsyncClient, service: Service) -> None:
        await client.get_image("a red fox")
        await client.get_by_key("k0", namespace="shop")
        [[first, second]] = service.streams
        assert first.requests[0].spec == pb.ImageSpec(prompt="a red fox")
        assert (second.requests[0].key, second.requests[0].namespace) == ("k0", "shop")

    async def test_a_batch_does(self, client: AsyncClient, service: Service) -> None:
        batch = await client.generate_many([f"fox {number}" for number in range(60)], max_in_flight=20)
        assert batch.summary.ok == 60
        assert (len(service.streams), len(service.asked), service.alone) == (1, 60, [])

    async def test_a_client_that_was_not_told_to_opens_no_stream(self, address: str, service: Service) -> None:
        async with AsyncClient(address) as client:
            await client.get_image("a red fox")
        assert (len(service.alone), service.streams) == (1, [])

    async def test_a_message_carries_no_more_than_it_should(self, client: AsyncClient, service: Service) -> None:
        prompts = [str(number) + "x" * 300_000 for number in range(5)]
        await asyncio.gather(*(client.get_image(prompt) for prompt in prompts))
        [messages] = service.streams
        assert [len(message.requests) for message in messages] == [3, 2]

    async def test_the_token_and_an_id_travel_with_the_stream(self, address: str, service: Service) -> None:
        async with AsyncClient(address, multiplex=True, token="s3cret") as client:
            results = [await client.get_image("a red fox") for _ in range(2)]
        [metadata] = service.metadata
        assert metadata["authorization"] == "Bearer s3cret"
        ids = [request.request_id for request in service.asked]
        assert [result.call_id for result in results] == [f"{metadata['x-request-id']}/{each}" for each in ids]

    @pytest.mark.parametrize(
        "options",
        [
            {"cache_policy": CachePolicy.REFRESH},
            {"cache_policy": CachePolicy.NO_STORE},
            {"max_inline_bytes": 60_000_000},
            {"max_inline_bytes": 5_000_000},
            {"extra": {"x": "x" * 1_100_000}},
        ],
        ids=["refresh", "no store", "a large answer", "an answer that others would wait for", "a large request"],
    )
    async def test_what_a_stream_is_not_for_goes_by_a_call_of_its_own(
        self, client: AsyncClient, service: Service, options: dict[str, Any]
    ) -> None:
        assert (await client.get_image("a red fox", **options)).data == PNG
        assert (len(service.alone), service.streams) == (1, [])


class TestIds:
    async def test_the_callers_own_stays_as_it_is(self, client: AsyncClient, service: Service) -> None:
        await client.get_image("a red fox", request_id="id-1")
        await client.get_image("a red fox", variant_policy=VariantPolicy.NEXT)
        first, second = (request.request_id for request in service.asked)
        assert first == "id-1"
        assert len(second) == 32

    async def test_two_calls_of_one_id_are_both_answered(self, client: AsyncClient, service: Service) -> None:
        service.script = {"a red fox": ["hang", "hang"]}
        calls = in_progress(*(client.get_image("a red fox", request_id="id-1") for _ in range(2)))
        await until(lambda: len(service.asked) + len(service.alone) == 2)
        assert [request.request_id for request in (*service.asked, *service.alone)] == ["id-1"] * 2
        service.release.set()
        assert [(await call).data for call in calls] == [PNG, PNG]

    async def test_one_that_was_given_up_is_not_used_again_before_the_service_has_answered_for_it(
        self, client: AsyncClient, service: Service
    ) -> None:
        service.hears = False
        blue = answer(b"blue")
        service.script = {"a red fox": ["hang"], "a blue fox": [blue, blue]}
        [goes] = in_progress(client.get_image("a red fox", request_id="id-1"))
        await until(lambda: len(service.asked) == 1)
        goes.cancel()
        await asyncio.wait({goes})
        assert (await client.get_image("a blue fox", request_id="id-1")).data == b"blue"
        assert len(service.alone) == 1
        service.release.set()
        await until(lambda: not streams_of(client)[0]._waiting)
        assert (await client.get_image("a blue fox", request_id="id-1")).data == b"blue"
        assert len(service.alone) == 1

    async def test_one_of_ours_is_never_that_of_a_caller(self, client: AsyncClient, service: Service) -> None:
        service.script = {"a red fox": ["hang"] * 3}
        ids = [{"request_id": "1"}, {}, {"request_id": "3"}]
        calls = in_progress(*(client.get_image("a red fox", **each) for each in ids))  # type: ignore[arg-type] # options
        await until(lambda: len(service.asked) == 3)
        service.release.set()
        assert [(await call).data for call in calls] == [PNG] * 3
        assert len({request.request_id for request in service.asked}) == 3

    async def test_the_service_knows_each_call_by_its_id(self, house: House) -> None:
        async with open_front(house) as front, multiplexing(front) as client:
            ids = [{}, {"request_id": "no id for a log"}, {"request_id": "mine"}]
            results = [await client.get_image("a red fox", **each) for each in ids]  # type: ignore[arg-type] # options
            stream_id = results[0].call_id.split("/")[0]
            assert [result.call_id for result in results[1:]] == [f"{stream_id}/?2", f"{stream_id}/mine"]
            for result in results:
                told = await client.explain_call(result.call_id)
                assert (told.rpc, told.images[0].key) == ("BatchGetImages", result.key)


class TestPlaces:
    async def test_a_hit_does_not_wait_behind_pictures_being_made(self, house: House) -> None:
        async with open_front(house, limits=Limits(batch_in_flight=3)) as front, multiplexing(front) as client:
            await client.get_image("a hit")
            house.upstream.hold()
            misses = in_progress(*(client.get_image(f"fox {number}") for number in range(10)))
            await house.upstream.arrived(11)
            assert (await client.get_image("a hit")).tier is TierName.MEMORY
            house.upstream.release()
            assert {(await miss).tier for miss in misses} == {TierName.UPSTREAM}

    async def test_a_thousand_hits_at_a_time_go_on_one_stream(self, client: AsyncClient, service: Service) -> None:
        results = await asyncio.gather(*(client.get_image(f"fox {number}") for number in range(1_000)))
        assert len(results) == 1_000
        assert (len(service.streams), service.alone) == (1, [])

    async def test_what_has_no_place_goes_by_a_call_of_its_own(self, client: AsyncClient, service: Service) -> None:
        service.script = {"a red fox": ["no place", answer(b"alone")]}
        assert (await client.get_image("a red fox")).data == b"alone"
        assert (len(service.asked), len(service.alone)) == (1, 1)

    async def test_as_many_pictures_are_made_at_a_time_as_of_calls_of_their_own(self, house: House) -> None:
        async with open_front(house, limits=Limits(batch_in_flight=3)) as front, multiplexing(front) as client:
            house.upstream.hold()
            misses = in_progress(*(client.get_image(f"fox {number}") for number in range(20)))
            await house.upstream.arrived(20)
            house.upstream.release()
            assert len({(await miss).key for miss in misses}) == house.upstream.calls == 20

    async def test_a_service_that_knows_no_such_streams_is_left_in_peace_for_a_while(
        self, client: AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        service.headers = ()
        assert (await client.get_image("a red fox")).data == PNG
        assert (await client.get_image("a red fox")).data == PNG
        assert (len(service.streams), len(service.alone)) == (1, 2)
        monkeypatch.setattr(multiplex, "ALONE_S", 0.0)
        service.headers = Service.headers
        assert client._multiplexer is not None
        client._multiplexer._service.alone_until_s = 0.0
        await client.get_image("a red fox")
        assert (len(service.streams), len(service.alone)) == (2, 2)


class TestGivingUp:
    async def test_a_call_that_is_cancelled_ends_its_own_wait_alone(
        self, client: AsyncClient, service: Service
    ) -> None:
        service.script = {"slow": ["hang"] * 2}
        goes, stays = in_progress(client.get_image("slow"), client.get_image("slow"))
        await until(lambda: len(service.asked) == 2)
        goes.cancel()
        with pytest.raises(asyncio.CancelledError):
            await goes
        assert (await client.get_image("a red fox")).data == PNG
        service.release.set()
        assert (await stays).data == PNG

    async def test_a_late_answer_is_dropped_and_the_stream_goes_on(self, client: AsyncClient, service: Service) -> None:
        service.script = {"slow": ["hang"] * 2}
        goes, stays = in_progress(client.get_image("slow"), client.get_image("slow"))
        await until(lambda: len(service.asked) == 2)
        goes.cancel()
        await asyncio.wait({goes})
        service.release.set()
        await stays
        await until(lambda: client._multiplexer is not None and not streams_of(client)[0]._waiting)
        await client.get_image("a red fox")
        assert (len(service.streams), service.cancelled) == (1, 0)

    async def test_what_was_not_sent_yet_is_never_sent(self, client: AsyncClient, service: Service) -> None:
        [goes] = in_progress(client.get_image("a red fox"))
        await asyncio.sleep(0)  # it is on the stream, whose turn has not come
        goes.cancel()
        with pytest.raises(asyncio.CancelledError):
            await goes
        await client.get_image("a blue fox")
        assert [request.spec.prompt for request in service.asked] == ["a blue fox"]

    async def test_the_service_hears_of_each_and_the_stream_goes_on(
        self, client: AsyncClient, service: Service
    ) -> None:
        service.script = {"slow": ["hang"] * 2}
        calls = in_progress(*(client.get_image("slow", request_id=each) for each in ("a", "b")))
        await until(lambda: len(service.asked) == 2)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await until(lambda: service.called_off == ["a", "b"])
        await until(lambda: not streams_of(client)[0]._waiting)
        assert (await client.get_image("a red fox")).data == PNG
        assert (len(service.streams), service.cancelled) == (1, 0)

    async def test_the_service_is_told_how_long_each_is_waited_for(self, client: AsyncClient, service: Service) -> None:
        await asyncio.gather(*(client.get_image("a red fox", timeout_s=each) for each in (30.0, 7.5)))
        [[message]] = service.streams
        assert message.no_waiting
        [first_ms, second_ms] = message.timeout_ms
        assert 20_000 < first_ms <= 30_000
        assert 0 < second_ms <= 7_500

    @pytest.mark.parametrize("timeout_s", [0.0, -1.0, 1e10, math.inf, -math.inf, math.nan])
    async def test_a_time_that_is_none_is_what_gRPC_makes_of_it(  # noqa: N802 - its name
        self, client: AsyncClient, service: Service, timeout_s: float
    ) -> None:
        with contextlib.suppress(DeadlineError):
            await client.get_image("a red fox", timeout_s=timeout_s)
        assert service.streams == []

    async def test_a_stream_on_which_the_service_answers_for_nothing_is_given_up(
        self, client: AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(multiplex, "MOST_GIVEN_UP", 3)
        service.hears = False
        service.script = {"slow": ["hang"] * 4}
        *go, stays = in_progress(*(client.get_image("slow") for _ in range(4)))
        await until(lambda: len(service.asked) == 4)
        for call in go:
            call.cancel()
        await asyncio.wait(go)
        assert (await client.get_image("a red fox")).data == PNG
        assert len(service.streams) == 2
        stays.cancel()
        await until(lambda: service.cancelled == 1)
        assert len(streams_of(client)) == 1

    async def test_what_the_service_knows_ends_with_the_call(self, house: House) -> None:
        house.restart(max_concurrent=1)
        async with open_front(house) as front, multiplexing(front) as client:
            house.upstream.hold()
            [paid] = in_progress(client.get_image("a red fox"))
            await house.upstream.arrived(1)
            with pytest.raises(DeadlineError, match="within the call's time"):
                await client.get_image("a blue fox", timeout_s=0.05)
            await until(lambda: house.cache.in_flight == 1)
            [goes] = in_progress(client.get_image("a green fox"))
            await until(lambda: house.cache.in_flight == 2)
            goes.cancel()
            await until(lambda: house.cache.in_flight == 1)
            house.upstream.release()
            assert (await paid).tier is TierName.UPSTREAM
            assert house.upstream.calls == 1

    async def test_who_shares_a_picture_being_made_still_gets_it(self, house: House) -> None:
        async with open_front(house) as front, multiplexing(front) as client:
            house.upstream.hold()
            first, second = in_progress(client.get_image("a red fox"), client.get_image("a red fox"))
            await house.upstream.arrived(1)
            with pytest.raises(DeadlineError):
                await client.get_image("a red fox", timeout_s=0.05)
            first.cancel()
            await asyncio.wait({first})
            house.upstream.release()
            assert (await second).tier is TierName.UPSTREAM
            assert house.upstream.calls == 1

    async def test_what_nobody_waits_for_and_has_not_begun_is_not_paid_for(self, house: House) -> None:
        house.restart(max_concurrent=1)
        async with open_front(house) as front, multiplexing(front) as client:
            house.upstream.hold()
            calls = in_progress(client.get_image("a red fox"), client.get_image("a blue fox"))
            await house.upstream.arrived(1)
            await until(lambda: house.cache.in_flight == 2)
            for call in calls:
                call.cancel()
            await until(lambda: house.cache.in_flight == 1)
            house.upstream.release()
            await until(lambda: house.cache.in_flight == 0)
            assert house.upstream.calls == 1

    async def test_a_call_without_an_answer_in_time_fails_as_one_of_its_own_does(
        self, client: AsyncClient, address: str, service: Service
    ) -> None:
        await client.get_image("a red fox")
        service.script = {"slow": ["hang"] * 2}
        with pytest.raises(DeadlineError) as late:
            await client.get_image("slow", timeout_s=0.05)
        async with AsyncClient(address) as other:
            await other.get_image("a red fox")
            with pytest.raises(DeadlineError) as alone:
                await other.get_image("slow", timeout_s=0.05)
        assert_same_error(late.value, alone.value)

    async def test_it_is_the_same_error_where_the_service_is_the_first_to_notice(
        self, client: AsyncClient, service: Service
    ) -> None:
        over = pb.Failure(code=grpc.StatusCode.DEADLINE_EXCEEDED.value[0], message="in words of its own")
        service.script = {"slow": [over], "slower": ["hang"]}
        with pytest.raises(DeadlineError) as told:
            await client.get_image("slow")
        with pytest.raises(DeadlineError) as noticed:
            await client.get_image("slower", timeout_s=0.05)
        assert_same_error(told.value, noticed.value)

    async def test_no_attempt_is_waited_for_beyond_the_time_of_its_call(
        self, client: AsyncClient, service: Service
    ) -> None:
        await client.get_image("a blue fox")  # is connected from here on
        later = pb.Failure(code=DOWN.code, reason=DOWN.reason, retry_delay=Duration(seconds=1_000))
        service.script = {"a red fox": [later]}
        with pytest.raises(DeadlineError):
            await client.get_image("a red fox", timeout_s=0.5)
        assert len(service.asked) == 2


def assert_same_error(one: CacheError, other: CacheError) -> None:
    assert type(one) is type(other)
    assert (str(one), one.code, one.reason) == (str(other), other.code, other.reason)
    assert (one.violations, one.retry_after_s) == (other.violations, other.retry_after_s)
    assert {**one.metadata, "request_id": ""} == {**other.metadata, "request_id": ""}


class TestFailing:
    @pytest.mark.parametrize(
        "ask",
        [
            lambda client: client.get_image("a red fox", size="1x1", n=11, tags=["a b"]),
            lambda client: client.get_image("a green fox", cache_policy=CachePolicy.ONLY_IF_CACHED),
            lambda client: client.get_image("a red fox", namespace="nowhere"),
            lambda client: client.get_image("a red fox", request_id="x" * 200),
            lambda client: client.get_image("a red fox", max_inline_bytes=1),
            lambda client: client.get_by_key("no key"),
            lambda client: client.get_image("a green fox"),
        ],
        ids=["fields", "not cached", "no namespace", "a long id", "too large", "no key", "no money"],
    )
    async def test_an_error_is_that_of_a_call_of_its_own(
        self, house: House, ask: Callable[[AsyncClient], Awaitable[ImageResult]]
    ) -> None:
        house.restart(budget=[Budget(BudgetScope.GLOBAL, "", BudgetPeriod.DAY, 1)])
        async with open_front(house) as front, multiplexing(front) as client, plain(front) as other:
            await client.put(small_image(1), "a red fox")
            with pytest.raises(CacheError) as shared:
                await ask(client)
            with pytest.raises(CacheError) as alone:
                await ask(other)
            assert_same_error(shared.value, alone.value)

    async def test_a_picture_that_is_gone_is(self, house: House) -> None:
        async with open_front(house) as front, multiplexing(front) as client:
            key = (await client.get_image("a red fox")).key
            await client.purge(key=key)
            with pytest.raises(KeyGoneError):
                await client.get_by_key(key)

    async def test_unavailable_is_tried_four_times_in_all(self, client: AsyncClient, service: Service) -> None:
        service.script = {"a red fox": [DOWN] * 3, "a blue fox": [DOWN] * 4}
        assert (await client.get_image("a red fox")).data == PNG
        for _ in range(30):
            await client.get_image("a green fox")
        with pytest.raises(TryAgainError) as caught:
            await client.get_image("a blue fox")
        assert (caught.value.reason, caught.value.retry_after_s) == ("UPSTREAM_DOWN", 0.005)
        assert len(service.asked) == 4 + 30 + 4

    async def test_a_client_most_of_whose_calls_fail_makes_them_once(
        self, client: AsyncClient, service: Service
    ) -> None:
        service.script = {f"fox {number}": [DOWN] * 4 for number in range(3)}
        for prompt in service.script:
            with pytest.raises(TryAgainError):
                await client.get_image(prompt)
        assert len(service.asked) == 4 + 1 + 1
        for _ in range(40):
            await client.get_image("a red fox")
        service.script = {"a blue fox": [DOWN]}
        await client.get_image("a blue fox")

    async def test_nobody_there_is_said(self) -> None:
        async with AsyncClient("127.0.0.1:1", multiplex=True) as client:
            with pytest.raises(UnreachableError, match="no answer from the cache service at"):
                await client.get_image("a red fox")

    async def test_a_caller_that_is_not_known_hears_so(self, house: House) -> None:
        async with open_front(house, anonymous=None) as front, multiplexing(front) as client:
            with pytest.raises(UnauthenticatedError):
                await client.get_image("a red fox")

    async def test_what_ends_a_stream_is_no_others_failure(self, client: AsyncClient, service: Service) -> None:
        service.script = {"slow": ["hang"], "bad": [Fail(grpc.StatusCode.RESOURCE_EXHAUSTED)] * 2}
        [slow] = in_progress(client.get_image("slow"))
        await until(lambda: len(service.asked) == 1)
        with pytest.raises(CacheError) as caught:
            await client.get_image("bad")
        assert (type(caught.value), caught.value.code) == (CacheError, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert (await slow).data == PNG
        assert sorted(request.spec.prompt for request in service.alone) == ["bad", "slow"]

    async def test_a_service_without_batches_answers_calls_of_their_own(
        self, client: AsyncClient, service: Service
    ) -> None:
        service.script = {"a red fox": [Fail(grpc.StatusCode.UNIMPLEMENTED)]}
        assert (await client.get_image("a red fox")).data == PNG
        assert len(service.alone) == 1

    async def test_answers_nobody_asked_for_are_dropped(self) -> None:
        class Talkative(Service):
            async def _answer(self, request_id: str, step: Any, context: Any, turn: asyncio.Lock) -> None:
                for each in ("no such request", request_id, request_id):
                    await super()._answer(each, step, context, turn)

        async with (
            serving(Talkative()) as address,  # type: ignore[arg-type] # any servicer will do
            AsyncClient(address, multiplex=True) as client,
        ):
            assert [(await client.get_image("a red fox")).data for _ in range(3)] == [PNG] * 3


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tries as ever, a hundredth of the time apart; and connections are made again as soon."""
    quicken(monkeypatch)


def quicken(monkeypatch: pytest.MonkeyPatch, *, first_s: float = 0.002, tokens: int = 10) -> None:
    monkeypatch.setattr(channel, "RETRY_FIRST_S", first_s)
    monkeypatch.setattr(channel, "RETRY_TOKENS", tokens)
    for name in ("CHANNEL_OPTIONS", "IMPATIENT_OPTIONS"):
        options = dict(getattr(channel, name))
        config = str(options["grpc.service_config"])
        config = config.replace('"0.2s"', f'"{first_s}s"').replace('"maxTokens": 10', f'"maxTokens": {tokens}')
        quick = {**options, "grpc.service_config": config, "grpc.initial_reconnect_backoff_ms": 10}
        quick |= {"grpc.min_reconnect_backoff_ms": 2_000, "grpc.use_local_subchannel_pool": 1}
        monkeypatch.setattr(channel, name, tuple(quick.items()))


class TestWhatWasNeverSent:
    async def test_what_was_given_up_before_it_was_sent_leaves_nothing(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:  # it takes connections and says nothing
            async with AsyncClient(f"127.0.0.1:{deaf.getsockname()[1]}", multiplex=True) as client:
                calls = in_progress(*(client.get_image(f"fox {number}", timeout_s=60) for number in range(10)))
                await until(lambda: any(len(stream._unsent) == 10 for stream in streams_of(client)))
                [stream] = streams_of(client)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                assert (len(stream._waiting), len(stream._unsent)) == (0, 0)

    async def test_a_call_whose_stream_has_not_begun_ends_with_its_client(self, service: Service, address: str) -> None:
        client = AsyncClient(address, multiplex=True)
        [call] = in_progress(client.get_image("a red fox", timeout_s=60))
        await asyncio.sleep(0)  # the call has begun, the task of its stream has not
        await client.close()
        with pytest.raises(UnreachableError):
            await asyncio.wait_for(call, timeout=5)
        assert not service.asked


class TestBreaking:
    async def test_what_has_no_answer_when_the_connection_breaks_is_sent_again(self, house: House) -> None:
        async with (
            open_front(house) as front,
            TcpProxy("127.0.0.1", front.server.port) as proxy,
            AsyncClient(f"127.0.0.1:{proxy.port}", multiplex=True) as client,
        ):
            house.upstream.hold()
            calls = in_progress(*(client.get_image(f"fox {number}") for number in range(20)))
            await house.upstream.arrived(20)
            proxy.cut()
            proxy.resume()
            house.upstream.release()
            assert len({(await call).key for call in calls}) == 20
            assert house.upstream.calls == 20

    async def test_a_restart_is_outlived(self, tmp_path: Path) -> None:
        first, second = Service(script={"slow": ["hang"]}), Service()
        address = f"unix:{tmp_path}/s"
        async with AsyncClient(address, multiplex=True) as client:
            async with serving(first, address):  # type: ignore[arg-type] # any servicer will do
                await client.get_image("a red fox")
                [slow] = in_progress(client.get_image("slow"))
                await until(lambda: len(first.asked) == 2)
            async with serving(second, address):  # type: ignore[arg-type] # any servicer will do
                assert (await slow).data == PNG
                await client.get_image("a red fox")

    async def test_a_service_that_goes_down_answers_what_it_began_and_the_next_one_the_rest(self, house: House) -> None:
        async with AsyncExitStack() as stack:
            front = await stack.enter_async_context(open_front(house))
            proxy = await stack.enter_async_context(TcpProxy("127.0.0.1", front.server.port))
            client = await stack.enter_async_context(AsyncClient(f"127.0.0.1:{proxy.port}", multiplex=True))
            house.upstream.hold()
            [slow] = in_progress(client.get_image("a red fox"))
            await house.upstream.arrived(1)
            draining = asyncio.ensure_future(front.server.drain(30))
            await until(front.server._services[0]._reception.going_down.is_set)  # type: ignore[union-attr] # a PromptCacheService
            house.upstream.release()
            assert (await slow).tier is TierName.UPSTREAM
            await draining
            after = await stack.enter_async_context(open_front(house))
            proxy.retarget("127.0.0.1", after.server.port)
            assert (await client.get_image("a red fox")).tier is TierName.MEMORY

    @pytest.mark.usefixtures("_at_once")
    async def test_a_fallback_answers_where_nobody_does_and_is_told_of_by_a_call_of_its_own(
        self, service: Service, tmp_path: Path
    ) -> None:
        async def elsewhere(_: Any) -> bytes:
            return small_image(1)

        address = f"unix:{tmp_path}/s"
        async with AsyncClient(address, multiplex=True, fallback=elsewhere) as client:
            assert (await client.get_image("a red fox", n=2)).by_fallback
            async with serving(service, address):  # type: ignore[arg-type] # any servicer will do
                while (await client.get_image("a red fox")).by_fallback:  # it connects again after a moment
                    pass
                told = client.fallbacks
                await client.get_image("a red fox")
        assert [metadata.get("x-fallbacks") for metadata in service.alone_metadata] == [str(told)]
        assert len(service.asked) == 1


class TestEnding:
    async def test_closing_ends_calls_and_leaves_no_task(self, address: str, service: Service) -> None:
        service.script = {"slow": ["hang"]}
        client = AsyncClient(address, multiplex=True)
        [slow] = in_progress(client.get_image("slow"))
        await until(lambda: len(service.asked) == 1)
        await client.close()
        with pytest.raises(UnreachableError):
            await slow
        await until(lambda: service.cancelled == 1)
        await until(lambda: not {task for task in asyncio.all_tasks() if "multiplex" in task.get_name()})

    async def test_closing_does_not_wait_for_a_call_that_is_to_be_made_again(
        self, client: AsyncClient, service: Service
    ) -> None:
        later = pb.Failure(code=DOWN.code, reason=DOWN.reason, retry_delay=Duration(seconds=1_000))
        service.script = {"a red fox": [later]}
        [call] = in_progress(client.get_image("a red fox", timeout_s=3_000))
        await until(lambda: len(service.asked) == 1)
        await until(lambda: not streams_of(client)[0]._waiting)
        await client.close()
        with pytest.raises(UnreachableError):
            await asyncio.wait_for(call, 10)

    async def test_closing_without_a_call_is_nothing(self, address: str) -> None:
        await AsyncClient(address, multiplex=True).close()

    async def test_a_stream_with_nothing_to_do_is_closed_and_opened_again(
        self, client: AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(multiplex, "IDLE_S", 0.01)
        for opened in (1, 2):
            await client.get_image("a red fox")
            await until(lambda opened=opened: service.ended == opened)  # type: ignore[misc] # bound now
        assert (len(service.streams), service.cancelled) == (2, 0)

    async def test_a_stream_with_a_call_on_it_stays(
        self, client: AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(multiplex, "IDLE_S", 0.001)
        service.script = {"slow": ["hang"]}
        [slow] = in_progress(client.get_image("slow"))
        await until(lambda: len(service.asked) == 1)
        [stream] = streams_of(client)
        looked = stream._idle_timer
        await until(lambda: stream._idle_timer is not looked)
        service.release.set()
        assert (await slow).data == PNG
        assert len(service.streams) == 1


def streams_of(client: AsyncClient) -> Sequence[Any]:
    assert client._multiplexer is not None
    return list(client._multiplexer._streams.values())


@asynccontextmanager
async def multiplexing(front: Front, **options: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{front.server.port}", multiplex=True, **options) as client:
        yield client


@asynccontextmanager
async def plain(front: Front) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{front.server.port}") as client:
        yield client


# --- whatever happens ---

Outcome = tuple[str, ...]

CANCELLED: Outcome = ("cancelled",)


@dataclass(frozen=True)
class Planned:
    """A call, and how it ends if not with its answer: "cancelled" after so many turns of the loop, or "late"."""

    kind: str
    ends: str
    turns: int


@dataclass(frozen=True)
class Plan:
    """Calls that run at a time, at a service with so many places on a stream, and what happens meanwhile, if anything.

    The service "makes way" for another, or the connection "breaks".
    """

    calls: list[Planned]
    places: int
    happens: str


KINDS = ("hit", "miss", "same miss", "refused", "busy once", "busy", "not cached", "bad", "no key", "in pieces")
MADE = ("miss", "same miss", "refused", "busy once")

plans = st.builds(
    Plan,
    st.lists(
        st.builds(
            Planned,
            st.sampled_from(KINDS),
            st.sampled_from(("answered", "answered", "cancelled", "late")),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from((1, 3, 32)),
    st.sampled_from(("", "", "makes way", "breaks")),
)


def call_of(client: AsyncClient, number: int, plan: Planned, timeout_s: float) -> Awaitable[ImageResult]:
    match plan.kind:
        case "hit" | "same miss":
            return client.get_image(f"a {plan.kind}", timeout_s=timeout_s)
        case "not cached":
            return client.get_image("a fox", cache_policy=CachePolicy.ONLY_IF_CACHED, timeout_s=timeout_s)
        case "bad":
            return client.get_image("a fox", size="1x1", request_id="x", timeout_s=timeout_s)
        case "no key":
            return client.get_by_key("no key", timeout_s=timeout_s)
        case "in pieces":
            return client.get_image("a hit", max_inline_bytes=1, timeout_s=timeout_s)
        case _:
            return client.get_image(f"{plan.kind} {number}", timeout_s=timeout_s)


def fails_by_prompt(house: House) -> Counter[str]:
    """Let the upstream refuse and the cache turn away as the prompt says. Counts how often each picture was made."""
    make, get = house.upstream.generate, house.cache.get
    turned_away: set[str] = set()
    made_of = Counter[str]()

    async def generate(request: ImageRequest, variants: Sequence[int], **options: Any) -> Any:
        made_of[request.prompt] += 1
        made = await make(request, variants, **options)
        if request.prompt.startswith("refused"):
            raise PromptRefusedError("refused")
        return made

    async def turn_away(request: ImageRequest, *args: Any, **options: Any) -> Any:
        prompt = request.prompt
        if prompt.startswith("busy") and not (prompt.startswith("busy once") and prompt in turned_away):
            turned_away.add(prompt)
            error = OverloadedError("busy")
            error.retry_after_s = 0.05
            raise error
        return await get(request, *args, **options)

    house.upstream.generate = generate  # type: ignore[assignment,method-assign] # the fake's own, then the failure
    house.cache.get = turn_away  # type: ignore[assignment,method-assign] # likewise
    return made_of


async def lived(plan: Plan, directory: Path, *, multiplexed: bool) -> list[Outcome]:
    """How each call of the plan ended. Nothing was paid twice, and the service worked for none but those who waited."""
    clock = FakeClock()
    async with AsyncExitStack() as stack:
        house = House(
            clock=clock,
            redis=await open_tier(directory / "redis", TierName.REDIS, clock),
            s3=await open_tier(directory / "s3", TierName.S3, clock),
        )
        stack.push_async_callback(house.aclose)
        paid = fails_by_prompt(house)
        limits = Limits(batch_in_flight=plan.places)
        front = await stack.enter_async_context(open_front(house, limits=limits))
        proxy = await stack.enter_async_context(TcpProxy("127.0.0.1", front.server.port))
        address = f"127.0.0.1:{proxy.port}"
        client = await stack.enter_async_context(AsyncClient(address, multiplex=multiplexed))
        await client.put(small_image(1), "a hit")
        await client.get_image("a hit")
        house.upstream.hold()
        calls = await begun(client, plan)
        staying = [
            f"{each.kind} {number if each.kind != 'same miss' else ''}"
            for number, each in enumerate(plan.calls)
            if each.kind in MADE and each.ends == "answered"
        ]
        await until(lambda: house.upstream.calls >= len(set(staying)))
        if plan.happens == "makes way":
            after = await stack.enter_async_context(open_front(house, limits=limits))
            proxy.retarget("127.0.0.1", after.server.port)
        elif plan.happens:
            proxy.cut()
            proxy.resume()
        ending = [call for call, each in zip(calls, plan.calls, strict=True) if is_late(each) or each.kind not in MADE]
        if ending:
            await asyncio.wait(ending)
        if not plan.happens:
            reception = front.server._services[0]._reception  # type: ignore[union-attr] # a PromptCacheService
            await until(lambda: reception._in_progress == len(staying) + multiplexed)
        house.upstream.release()
        outcomes = [
            await outcome_of(call, told=not plan.happens and each.kind != "same miss")
            for call, each in zip(calls, plan.calls, strict=True)
        ]
        assert set(paid.values()) <= {1}
        return outcomes


def is_late(each: Planned) -> bool:
    return each.ends == "late" and each.kind in MADE


async def begun(client: AsyncClient, plan: Plan) -> list[asyncio.Future[ImageResult]]:
    calls = [
        asyncio.ensure_future(call_of(client, number, each, 0.1 if is_late(each) else 60))
        for number, each in enumerate(plan.calls)
    ]
    for turn in range(13):
        for call, each in zip(calls, plan.calls, strict=True):
            if each.ends == "cancelled" and each.turns == turn:
                call.cancel()
        await asyncio.sleep(0)
    return calls


async def outcome_of(call: asyncio.Future[ImageResult], *, told: bool) -> Outcome:
    """What its caller sees; not the tier where a call that is sent again, or comes late, may find the picture made."""
    try:
        result = await call
    except asyncio.CancelledError:
        return CANCELLED
    except CacheError as error:
        return (type(error).__name__, error.code.name, error.reason, str(error.violations), str(error.retry_after_s))
    return ("answered", result.key, str(result.status.state), str(result.tier) if told else "")


@pytest.mark.no_cover
@hypothesis_settings(max_examples=20)
@given(plans)
def test_whatever_happens_calls_end_as_they_would_alone(plan: Plan) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as directory:
        quicken(monkeypatch, first_s=0.05, tokens=1_000)
        shared = asyncio.run(lived(plan, Path(directory) / "shared", multiplexed=True))
        alone = asyncio.run(lived(plan, Path(directory) / "alone", multiplexed=False))
    for one, other, each in zip(shared, alone, plan.calls, strict=True):
        if each.ends == "cancelled" and each.kind in MADE:
            assert one == other == CANCELLED
        elif each.ends == "cancelled":  # it may have been answered by then
            assert one == other or CANCELLED in {one, other}
        else:
            assert one == other
