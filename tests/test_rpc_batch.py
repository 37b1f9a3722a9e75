"""Batches over real gRPC: each request is answered as a call of its own would be, as soon as it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, cast

import grpc.aio
import pytest
import structlog

from cacheserver.calls.auth import Authenticator
from cacheserver.calls.call import Call
from cacheserver.calls.reception import Reception
from cacheserver.errors import PromptRefusedError, UpstreamDownError, UpstreamError
from cacheserver.model import Terms
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.batch import Batch
from cacheserver.rpc.calls import Calls, Parts
from cacheserver.rpc.service import Limits
from tests.fakes import FakeClock
from tests.house import House
from tests.provider import large_png
from tests.rpc_front import ANYONE, Front, ask, failure, open_front, spec
from tests.waiting import until


@pytest.fixture
async def front(house: House) -> AsyncIterator[Front]:
    async with open_front(house) as front:
        yield front


def request(request_id: str, prompt: str = "a red fox", **fields: Any) -> pb.BatchGetImagesRequest:
    return pb.BatchGetImagesRequest(requests=[ask(prompt, request_id=request_id, **fields)])


async def answers(call: Any) -> dict[str, pb.BatchItem]:
    """Every answer by its request_id, in the order they came."""
    items: dict[str, pb.BatchItem] = {}
    while (response := await call.read()) is not grpc.aio.EOF:
        for item in response.items:
            assert item.request_id not in items
            items[item.request_id] = item
    return items


class TestAnswers:
    async def test_each_request_is_answered_as_a_call_of_its_own_would_be(self, front: Front) -> None:
        await front.stub.GetImage(ask())
        single = await front.stub.GetImage(ask())
        items = await answers(front.stub.BatchGetImages(iter([request("a"), request("b", "a blue fox", n=2)])))
        assert items["a"].response == single
        assert [image.variant for image in items["b"].response.images] == [0, 1]
        assert items["b"].response.status.tier == pb.TIER_UPSTREAM
        assert front.house.upstream.calls == 2

    async def test_what_is_ready_first_is_answered_first(self, front: Front) -> None:
        await front.stub.GetImage(ask("a hit"))
        front.house.upstream.hold()
        call = front.stub.BatchGetImages(iter([request("slow"), request("quick", "a hit")]))
        [item] = (await call.read()).items
        assert item.request_id == "quick"
        front.house.upstream.release()
        assert list(await answers(call)) == ["slow"]

    async def test_a_message_may_carry_many_requests_or_none(self, front: Front) -> None:
        many = pb.BatchGetImagesRequest(requests=[ask(f"fox {n}", request_id=f"{n}") for n in range(50)])
        items = await answers(front.stub.BatchGetImages(iter([pb.BatchGetImagesRequest(), many])))
        assert sorted(items) == sorted(map(str, range(50)))
        assert await answers(front.stub.BatchGetImages(iter([]))) == {}

    async def test_requests_of_one_picture_pay_once(self, front: Front) -> None:
        items = await answers(front.stub.BatchGetImages(iter([request(f"{n}") for n in range(10)])))
        assert sum(item.response.status.cost_microusd for item in items.values()) == 53_000
        assert front.house.upstream.calls == 1

    async def test_answers_of_four_megabytes_each_fit(self, front: Front) -> None:
        for n in range(3):
            await front.put(pb.PutImageHeader(spec=spec(f"fox {n}")), large_png(n, 3_900_000))
        items = await answers(front.stub.BatchGetImages(iter([request(f"{n}", f"fox {n}") for n in range(3)])))
        assert all(len(item.response.images[0].data) > 3_800_000 for item in items.values())


BAD: dict[str, pb.GetImageRequest] = {
    "many wrong fields": ask(n=11, request_id="x", tags=["a b"], of={"size": "1x1"}),
    "no spec": pb.GetImageRequest(request_id="x"),
    "not cached": ask(request_id="x", cache_policy="CACHE_POLICY_ONLY_IF_CACHED"),
    "no signed urls": ask(request_id="x", delivery="DELIVERY_URL"),
    "no such namespace": ask(request_id="x", namespace="nowhere"),
    "a long id": ask(request_id="x" * 200),
}


class TestFailures:
    @pytest.mark.parametrize("kind", BAD)
    async def test_an_item_fails_in_the_words_of_a_whole_call(self, front: Front, kind: str) -> None:
        whole = await failure(front.stub.GetImage(BAD[kind]))
        both = pb.BatchGetImagesRequest(requests=[BAD[kind], ask(request_id="good")])
        items = await answers(front.stub.BatchGetImages(iter([both])))
        failed = items[BAD[kind].request_id].failure
        assert grpc.StatusCode[whole.code].value[0] == failed.code
        assert (failed.reason, failed.message, dict(failed.violations)) == (whole.reason, whole.message, whole.fields)
        assert not failed.HasField("retry_delay")
        assert set(failed.metadata) == set(whole.info.metadata)
        assert {**failed.metadata, "request_id": ""} == {**whole.info.metadata, "request_id": ""}
        assert items["good"].response.images

    @pytest.mark.parametrize("error", [PromptRefusedError("refused"), UpstreamDownError("down", retry_after_s=7.0)])
    async def test_what_the_upstream_does_to_one_is_no_others_failure(self, front: Front, error: UpstreamError) -> None:
        front.house.upstream.fail_next(error)
        whole = await failure(front.stub.GetImage(ask("first")))
        front.house.upstream.fail_next(error)
        items = await answers(front.stub.BatchGetImages(iter([request("a", "second")])))
        failed = items["a"].failure
        assert (failed.reason, failed.message) == (whole.reason, whole.message)
        assert grpc.StatusCode[whole.code].value[0] == failed.code
        pushback = whole.trailers.get("grpc-retry-pushback-ms")
        assert failed.HasField("retry_delay") == (pushback is not None)
        assert pushback is None or failed.retry_delay.ToMilliseconds() == int(cast("str", pushback))

    async def test_a_bug_in_one_reveals_nothing_but_where_to_look(
        self, front: Front, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def break_down(*_: Any, **__: Any) -> None:
            raise RuntimeError("a secret of ours")

        monkeypatch.setattr(front.house.cache, "get", break_down)
        call = front.stub.BatchGetImages(iter([request("a")]), metadata=(("x-request-id", "req-7"),))
        failed = (await answers(call))["a"].failure
        assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL.value[0], "INTERNAL")
        assert "req-7/a" in failed.message
        assert "secret" not in failed.message

    @pytest.mark.parametrize("ids", [[""], ["a", "a"], ["a", "b", ""]])
    async def test_a_request_without_an_id_of_its_own_fails_the_stream(self, front: Front, ids: Sequence[str]) -> None:
        front.house.upstream.hold()
        failed = await failure(answers(front.stub.BatchGetImages(iter([request(each) for each in ids]))))
        assert (failed.code, failed.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert list(failed.fields) == ["requests.request_id"]

    async def test_an_id_may_be_used_again_once_it_is_answered(self, front: Front) -> None:
        call = front.stub.BatchGetImages()
        for _ in range(2):
            await call.write(request("a"))
            assert (await call.read()).items[0].HasField("response")
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    async def test_bytes_that_are_no_message_fail_the_stream(self, front: Front) -> None:
        failed = await failure(front.raw("BatchGetImages", b"\xff\xff"))
        assert (failed.code, failed.reason) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")


class TestFlow:
    async def test_no_more_are_worked_on_at_once_than_allowed(self, house: House) -> None:
        async with open_front(house, limits=Limits(batch_in_flight=3)) as front:
            house.upstream.hold()
            call = front.stub.BatchGetImages(iter([request(f"{n}", f"fox {n}") for n in range(8)]))
            await house.upstream.arrived(3)
            await front.stub.GetStats(pb.GetStatsRequest())
            assert (house.cache.in_flight, house.upstream.calls) == (3, 3)
            house.upstream.release()
            assert len(await answers(call)) == 8

    async def test_how_many_are_worked_on_is_said_before_anything_is_asked(self, house: House) -> None:
        async with open_front(house, limits=Limits(batch_in_flight=3)) as front:
            call = front.stub.BatchGetImages()
            assert ("x-batch-in-flight", "3") in tuple(await call.initial_metadata())
            await call.done_writing()
            assert await answers(call) == {}

    async def test_every_answer_comes_though_nothing_more_is_sent(self, front: Front) -> None:
        front.house.upstream.hold()
        call = front.stub.BatchGetImages()
        for n in range(5):
            await call.write(request(f"{n}", f"fox {n}"))
        await call.done_writing()
        await front.house.upstream.arrived(5)
        front.house.upstream.release()
        assert sorted(await answers(call)) == list("01234")

    async def test_whoever_goes_away_ends_its_waits_and_no_paid_load(self, house: House) -> None:
        house.restart(max_concurrent=1)
        async with open_front(house) as front:
            house.upstream.hold()
            call = front.stub.BatchGetImages(iter([request("paid"), request("waits", "a blue fox")]))
            await house.upstream.arrived(1)
            await until(lambda: house.cache.in_flight == 2)
            call.cancel()
            await until(lambda: house.cache.in_flight == 1)
            house.upstream.release()
            await until(lambda: house.cache.in_flight == 0)
            assert (await front.stub.GetImage(ask())).status.tier == pb.TIER_MEMORY
            assert house.upstream.calls == 1

    async def test_items_count_as_calls_and_those_of_a_full_service_wait_their_turn(self, house: House) -> None:
        async with open_front(house, max_concurrent_calls=3) as front:
            house.upstream.hold()
            call = front.stub.BatchGetImages(iter([request(f"{n}", f"fox {n}") for n in range(6)]))
            await house.upstream.arrived(2)
            turned_away = await failure(front.stub.GetImage(ask("a blue fox")))
            assert turned_away.reason == "OVERLOADED"
            assert house.upstream.calls == 2
            house.upstream.release()
            assert all(item.HasField("response") for item in (await answers(call)).values())
            assert house.upstream.calls == 6

    async def test_a_service_that_is_full_of_others_works_on_one_item_of_each_batch(self, house: House) -> None:
        async with open_front(house, max_concurrent_calls=2) as front:
            house.upstream.hold()
            single = asyncio.ensure_future(front.stub.GetImage(ask()))
            await house.upstream.arrived(1)
            call = front.stub.BatchGetImages(iter([request(f"{n}", f"fox {n}") for n in range(4)]))
            await house.upstream.arrived(2)
            house.upstream.release()
            assert len(await answers(call)) == 4
            await single

    async def test_a_service_that_goes_down_answers_what_has_begun(self, front: Front) -> None:
        front.house.upstream.hold()
        call = front.stub.BatchGetImages()
        await call.write(request("a"))
        await front.house.upstream.arrived(1)
        draining = asyncio.ensure_future(front.server.drain(30))
        await until(front.server._services[0]._reception.going_down.is_set)  # type: ignore[union-attr] # a PromptCacheService
        front.house.upstream.release()
        [item] = (await call.read()).items
        assert item.response.images
        ended = await failure(call.read())
        assert (ended.code, ended.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        await asyncio.wait_for(draining, timeout=10)


def without_waiting(*requests: pb.GetImageRequest, **fields: Any) -> pb.BatchGetImagesRequest:
    return pb.BatchGetImagesRequest(requests=requests, no_waiting=True, **fields)


async def read(call: Any, number: int) -> dict[str, pb.BatchItem]:
    """So many answers by their request_ids."""
    items: dict[str, pb.BatchItem] = {}
    while len(items) < number:
        items |= {item.request_id: item for item in (await call.read()).items}
    return items


class TestNotWaiting:
    async def test_what_has_no_place_hears_so_and_what_is_in_memory_is_answered(self, house: House) -> None:
        async with open_front(house, limits=Limits(batch_in_flight=2)) as front:
            await front.stub.GetImage(ask("a hit"))
            house.upstream.hold()
            call = front.stub.BatchGetImages()
            await call.write(without_waiting(*(ask(f"fox {n}", request_id=f"{n}") for n in range(4))))
            assert {each: item.no_place for each, item in (await read(call, 2)).items()} == {"2": True, "3": True}
            await call.write(without_waiting(ask("a hit", request_id="2"), ask("fox 5", request_id="3")))
            items = await read(call, 2)
            assert items["2"].response.images
            assert items["3"].no_place
            house.upstream.release()
            assert set(await read(call, 2)) == {"0", "1"}
            assert house.upstream.calls == 3
            await call.done_writing()
            assert await answers(call) == {}

    async def test_a_thousand_that_lie_ready_have_a_place_each(self, house: House) -> None:
        async with open_front(house, limits=Limits(batch_in_flight=2), max_concurrent_calls=10) as front:
            await front.stub.GetImage(ask())
            call = front.stub.BatchGetImages()
            await call.write(without_waiting(*(ask(request_id=f"{n}") for n in range(1_000))))
            assert all(item.response.images for item in (await read(call, 1_000)).values())
            call.cancel()

    async def test_a_service_that_goes_down_says_at_once_that_it_has_no_place(self, front: Front) -> None:
        front.house.upstream.hold()
        call = front.stub.BatchGetImages()
        await call.write(without_waiting(ask("slow", request_id="slow"), ask("off", request_id="off")))
        await front.house.upstream.arrived(2)
        draining = asyncio.ensure_future(front.server.drain(30))
        await until(front.server._services[0]._reception.going_down.is_set)  # type: ignore[union-attr] # a PromptCacheService
        await call.write(without_waiting(ask("late", request_id="late"), cancelled=["off"]))
        items = await read(call, 2)
        assert items["late"].no_place
        assert items["off"].failure.code == grpc.StatusCode.CANCELLED.value[0]
        front.house.upstream.release()
        assert (await read(call, 1))["slow"].response.images
        assert (await failure(call.read())).reason == "SHUTTING_DOWN"
        await asyncio.wait_for(draining, timeout=10)

    async def test_a_service_that_is_full_of_others_has_no_place(self, house: House) -> None:
        async with open_front(house, max_concurrent_calls=2) as front:
            await front.stub.GetImage(ask("a hit"))
            house.upstream.hold()
            single = asyncio.ensure_future(front.stub.GetImage(ask()))
            await house.upstream.arrived(2)
            call = front.stub.BatchGetImages()
            await call.write(without_waiting(ask("a hit", request_id="a"), ask("a fox", request_id="b")))
            assert all(item.no_place for item in (await read(call, 2)).values())
            house.upstream.release()
            await single
            call.cancel()
            reception = front.server._services[0]._reception  # type: ignore[union-attr] # a PromptCacheService
            await until(lambda: reception._in_progress == 0)

    async def test_what_has_no_place_is_booked_and_remembered_nowhere(self, house: House) -> None:
        async with open_front(house, limits=Limits(batch_in_flight=1)) as front:
            house.upstream.hold()
            call = front.stub.BatchGetImages(metadata=(("x-request-id", "r1"),))
            await call.write(without_waiting(ask(request_id="a"), ask("a blue fox", request_id="b")))
            assert (await read(call, 1))["b"].no_place
            told = await failure(front.stub.ExplainCall(pb.ExplainCallRequest(request_id="r1/b")))
            assert told.reason == "CALL_UNKNOWN"
            house.upstream.release()
            await read(call, 1)
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            stats = await front.stub.GetStats(pb.GetStatsRequest())
            assert sum(row.requests for row in stats.rows) == 1

    async def test_the_number_of_a_request_counts_those_without_a_place(self, house: House) -> None:
        async with open_front(house, limits=Limits(batch_in_flight=1)) as front:
            house.upstream.hold()
            with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
                call = front.stub.BatchGetImages(metadata=(("x-request-id", "r1"),))
                await call.write(without_waiting(*(ask(request_id=f"not fit {n}") for n in range(2))))
                await read(call, 1)
                house.upstream.release()
                await read(call, 1)
                await call.write(without_waiting(ask(request_id="not fit 3")))
                await read(call, 1)
                await call.done_writing()
                assert await call.read() is grpc.aio.EOF
            assert [line["request_id"] for line in lines if line["event"] == "call"] == ["r1/?1", "r1/?3", "r1"]

    async def test_one_that_is_cancelled_ends_as_a_call_of_its_own_and_no_other_does(self, house: House) -> None:
        house.restart(max_concurrent=1)
        async with open_front(house, limits=Limits(batch_in_flight=2)) as front:
            house.upstream.hold()
            call = front.stub.BatchGetImages()
            await call.write(without_waiting(ask(request_id="a"), ask("a blue fox", request_id="b")))
            await house.upstream.arrived(1)
            await until(lambda: house.cache.in_flight == 2)
            await call.write(without_waiting(cancelled=["b", "never asked for"]))
            item = (await read(call, 1))["b"]
            assert (item.failure.code, item.failure.reason) == (grpc.StatusCode.CANCELLED.value[0], "")
            assert house.cache.in_flight == 1
            await call.write(without_waiting(ask("a green fox", request_id="b")))  # there is a place again
            house.upstream.release()
            assert all(item.response.images for item in (await read(call, 2)).values())
            assert house.upstream.calls == 2
            await call.write(without_waiting(cancelled=["a"]))  # it has been answered
            await call.done_writing()
            assert await answers(call) == {}

    async def test_what_is_paid_for_goes_on_when_it_is_cancelled(self, house: House) -> None:
        async with open_front(house) as front:
            house.upstream.hold()
            call = front.stub.BatchGetImages()
            await call.write(without_waiting(ask(request_id="a")))
            await house.upstream.arrived(1)
            await call.write(without_waiting(cancelled=["a"]))
            assert (await read(call, 1))["a"].failure.code == grpc.StatusCode.CANCELLED.value[0]
            house.upstream.release()
            await until(lambda: house.cache.in_flight == 0)
            assert (await front.stub.GetImage(ask())).status.tier == pb.TIER_MEMORY
            assert house.upstream.calls == 1
            call.cancel()


def terms_seen(front: Front, monkeypatch: pytest.MonkeyPatch) -> list[Terms]:
    """The terms on which the cache is asked from now on."""
    seen: list[Terms] = []
    get = front.house.cache.get

    async def look(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["terms"])
        return await get(*args, **kwargs)

    monkeypatch.setattr(front.house.cache, "get", look)
    return seen


class TestTimes:
    async def test_one_whose_time_is_over_ends_and_the_others_go_on(self, house: House) -> None:
        house.restart(max_concurrent=1)
        async with open_front(house) as front:
            house.upstream.hold()
            call = front.stub.BatchGetImages()
            await call.write(request("a"))
            await house.upstream.arrived(1)
            requests = [ask("a blue fox", request_id="b"), ask("a green fox", request_id="c")]
            await call.write(pb.BatchGetImagesRequest(requests=requests, timeout_ms=[30]))
            item = (await read(call, 1))["b"]
            assert (item.failure.code, item.failure.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED.value[0], "")
            await until(lambda: house.cache.in_flight == 2)
            house.upstream.release()
            assert all(item.response.images for item in (await read(call, 2)).values())
            assert house.upstream.calls == 2
            call.cancel()

    @pytest.mark.parametrize(
        ("timeout_ms", "stream_s", "expected_s"), [(7_000, 600, 7), (0, 600, 600), (2**63 - 1, 600, 600)]
    )
    async def test_it_is_known_to_whatever_works_on_a_request(
        self, front: Front, monkeypatch: pytest.MonkeyPatch, timeout_ms: int, stream_s: float, expected_s: float
    ) -> None:
        seen = terms_seen(front, monkeypatch)
        sent = pb.BatchGetImagesRequest(requests=[ask(request_id="a")], timeout_ms=[timeout_ms])
        await answers(front.stub.BatchGetImages(iter([sent]), timeout=stream_s))
        [terms] = seen
        assert terms.deadline_s == pytest.approx(expected_s, abs=5)

    async def test_more_times_than_requests_are_ignored(self, front: Front) -> None:
        sent = pb.BatchGetImagesRequest(requests=[ask(request_id="a")], timeout_ms=[60_000] * 3)
        assert (await answers(front.stub.BatchGetImages(iter([sent]))))["a"].response.images

    async def test_a_negative_one_fails_the_stream(self, front: Front) -> None:
        sent = pb.BatchGetImagesRequest(requests=[ask(request_id="a")], timeout_ms=[-1])
        failed = await failure(answers(front.stub.BatchGetImages(iter([sent]))))
        assert (failed.code, list(failed.fields)) == ("INVALID_ARGUMENT", ["timeout_ms"])


class TestBooks:
    async def test_items_are_booked_as_calls_are(self, front: Front) -> None:
        bad = request("c", cache_policy="CACHE_POLICY_ONLY_IF_CACHED", of={"seed": 5})
        call = front.stub.BatchGetImages()
        for each in (request("a"), request("b"), bad):
            await call.write(each)
            await call.read()
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        stats = await front.stub.GetStats(pb.GetStatsRequest())
        rows = {(row.outcome, row.tier): row.requests for row in stats.rows}
        assert rows[pb.OUTCOME_MISS, pb.TIER_UPSTREAM] == rows[pb.OUTCOME_HIT, pb.TIER_MEMORY] == 1
        assert rows[pb.OUTCOME_NOT_CACHED, pb.TIER_UNSPECIFIED] == 1

    async def test_every_item_is_a_log_line_under_its_streams_id_and_its_own(self, front: Front) -> None:
        sent = [request("a", "a purple cow"), request("not fit for a log", "a purple cow", n=11)]
        with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
            await answers(front.stub.BatchGetImages(iter(sent), metadata=(("x-request-id", "r1"),)))
        calls = {line["request_id"]: line for line in lines if line["event"] == "call"}
        assert set(calls) == {"r1", "r1/a", "r1/?2"}
        assert all(line["rpc"] == "BatchGetImages" for line in calls.values())
        assert (calls["r1/a"]["code"], calls["r1/a"]["namespace"]) == ("OK", "default")
        assert (calls["r1/?2"]["code"], calls["r1/?2"]["reason"]) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert "purple" not in repr(lines)
        assert "not fit" not in repr(lines)

    async def test_the_time_left_to_the_stream_is_that_of_each_item(
        self, front: Front, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = terms_seen(front, monkeypatch)
        call = front.stub.BatchGetImages(timeout=600)
        for prompt in ("a red fox", "a blue fox"):
            await call.write(request("a", prompt))
            await call.read()
            front.house.clock.advance(100)
        await call.done_writing()
        first, second = (terms.deadline_s for terms in seen)
        assert first is not None
        assert second is not None
        assert 590 < first <= 601  # gRPC sends so long a time in whole seconds, rounded up
        assert second == pytest.approx(first - 100)


class _Sent:
    """A stream of requests that tells how many were read."""

    def __init__(self, messages: Sequence[pb.BatchGetImagesRequest]) -> None:
        self._left = list(messages)
        self.read = 0

    def __aiter__(self) -> _Sent:
        return self

    async def __anext__(self) -> pb.BatchGetImagesRequest:
        if not self._left:
            raise StopAsyncIteration
        self.read += 1
        return self._left.pop(0)


class TestReading:
    """What gRPC does not show: how much a batch has read off its stream."""

    @pytest.fixture
    def calls(self, house: House, clock: FakeClock) -> Calls:
        authenticator = Authenticator((), anonymous=ANYONE)
        return Calls(Reception(authenticator=authenticator, books=house.books, clock=clock, max_in_progress=100))

    @staticmethod
    def open(sent: _Sent, calls: Calls, get_image: Any) -> AsyncGenerator[bytes, None]:
        batch = Batch(calls=calls, get_image=get_image, ready=lambda _, __: None, in_flight=2)
        parts = cast("Parts[pb.BatchGetImagesRequest]", sent)
        return batch.answers(parts, Call("BatchGetImages", {}, "r1", None, 0.0, ANYONE))

    async def test_nothing_is_read_that_cannot_be_worked_on(self, calls: Calls) -> None:
        begun: list[asyncio.Future[bytes]] = []

        async def get_image(_: bytes, __: Call) -> bytes:
            begun.append(asyncio.get_running_loop().create_future())
            return await begun[-1]

        sent = _Sent([request(f"{n}", f"fox {n}") for n in range(6)])
        answering = self.open(sent, calls, get_image)
        first = asyncio.ensure_future(anext(answering))
        await until(lambda: len(begun) == 2)
        await _turns()
        assert sent.read == 2
        begun[0].set_result(b"")
        await first
        await _turns()
        assert sent.read == 2  # the answer has not gone out: nobody has asked for the next
        second = asyncio.ensure_future(anext(answering))
        await until(lambda: len(begun) == 3)
        await _turns()
        assert sent.read == 3
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert all(each.done() for each in begun)

    async def test_closing_ends_what_is_worked_on(self, calls: Calls) -> None:
        ended: list[str] = []

        async def get_image(raw: bytes, _: Call) -> bytes:
            message = pb.GetImageRequest.FromString(raw)
            if message.request_id == "quick":
                return b""
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(message.request_id)
            raise AssertionError

        answering = self.open(_Sent([request("slow"), request("quick")]), calls, get_image)
        await anext(answering)
        await answering.aclose()
        assert ended == ["slow"]


async def _turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)
