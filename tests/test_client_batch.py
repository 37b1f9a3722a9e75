"""Many prompts at once, against a service that says what to answer to which. Both twins go through every test."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from cacheserver.client import (
    AsyncClient,
    BatchProgress,
    BatchSummary,
    CachePolicy,
    DeadlineError,
    ImageSpec,
    InvalidRequestError,
    PromptRefusedError,
    TierName,
    TryAgainError,
)
from cacheserver.errors import UpstreamDownError
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from tests.house import House
from tests.rpc_front import Front, open_front
from tests.test_client import NOT_AGAIN, Fail, connected, serving
from tests.waiting import until


@dataclass
class Service(pb_grpc.PromptCacheServiceServicer):
    """Makes a picture of any prompt, but for what `steps` has for it: failures to answer with first."""

    steps: dict[str, list[Fail]] = field(default_factory=dict)
    asked: list[pb.GetImageRequest] = field(default_factory=list)
    asked_s: list[float] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def GetImage(  # noqa: N802 - gRPC's name
        self, request: pb.GetImageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetImageResponse:
        self.asked.append(request)
        self.asked_s.append(time.monotonic())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.gate.wait()
            if steps := self.steps.get(request.spec.prompt):
                await steps.pop(0).abort(context)
        finally:
            self.running -= 1
        return answer_to(request.spec.prompt)


def answer_to(prompt: str) -> pb.GetImageResponse:
    if "review" in prompt:
        return pb.GetImageResponse(images=[pb.Image(key="k9")], status=pb.CacheStatus(state="STATE_PENDING_REVIEW"))
    is_hit = "hit" in prompt
    status = pb.CacheStatus(
        tier="TIER_MEMORY" if is_hit else "TIER_UPSTREAM",
        state="STATE_READY",
        cost_microusd=0 if is_hit else 40_000,
        saved_microusd=40_000 if is_hit else 0,
    )
    return pb.GetImageResponse(images=[pb.Image(data=prompt.encode(), key=prompt)], status=status)


def come_back(after_s: float) -> Fail:
    """UNAVAILABLE that says when, to the caller and not to gRPC."""
    retry = error_details_pb2.RetryInfo(retry_delay=timedelta(seconds=after_s))
    return Fail(grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL", trailers=NOT_AGAIN, details=(retry,))


REFUSED = Fail(grpc.StatusCode.FAILED_PRECONDITION, "PROMPT_REFUSED")
DOWN = Fail(grpc.StatusCode.UNAVAILABLE, "UPSTREAM_DOWN", trailers=NOT_AGAIN)


@pytest.fixture(params=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def address(service: Service) -> AsyncIterator[str]:
    async with serving(service) as address:  # type: ignore[arg-type] # any servicer will do
        yield address


@pytest.fixture
async def client(kind: str, address: str) -> AsyncIterator[Any]:
    async with connected(kind, address) as client:
        yield client


async def test_pictures_come_in_the_order_of_their_prompts(client: Any, service: Service) -> None:
    prompts = [f"fox {number}" for number in range(30)]
    batch = await client.generate_many(prompts, max_in_flight=7)
    assert [item.index for item in batch.items] == list(range(30))
    assert [item.prompt for item in batch.items] == prompts
    assert [item.result.data for item in batch.items] == [prompt.encode() for prompt in prompts]
    assert all(item.ok and item.error is None and item.seconds > 0 for item in batch.items)
    assert len(service.asked) == 30


async def test_a_batch_is_summed_up(client: Any, service: Service) -> None:
    service.steps = {"bad": [REFUSED], "worse": [REFUSED], "down": [DOWN]}
    batch = await client.generate_many(["hit 1", "miss 1", "bad", "hit 2", "worse", "down", "miss 2"])
    assert batch.summary == BatchSummary(
        asked=7,
        ok=4,
        pending=0,
        failed={"PROMPT_REFUSED": 2, "UPSTREAM_DOWN": 1},
        tiers={TierName.MEMORY: 2, TierName.UPSTREAM: 2},
        cost_microusd=80_000,
        saved_microusd=80_000,
        seconds=batch.summary.seconds,
    )
    assert batch.summary.seconds > 0


async def test_a_picture_in_review_is_no_failure_and_not_there_yet(client: Any) -> None:
    batch = await client.generate_many(["review", "fox"])
    assert [item.ok for item in batch.items] == [False, True]
    assert batch.items[0].result.key == "k9"
    assert (batch.summary.ok, batch.summary.pending, batch.summary.failed) == (1, 1, {})


async def test_what_fails_stops_no_other(client: Any, service: Service) -> None:
    service.steps = {"bad": [REFUSED]}
    batch = await client.generate_many(["bad", "fox 1", "fox 2"], max_in_flight=1)
    bad, *rest = batch.items
    assert not bad.ok
    assert bad.result is None
    assert isinstance(bad.error, PromptRefusedError)
    assert all(item.ok for item in rest)


async def test_prompts_bring_parameters_of_their_own(client: Any, service: Service) -> None:
    prompts = ["fox 1", {"prompt": "fox 2", "size": "64x64"}, ImageSpec("fox 3", quality="high", seed=0)]
    options = {"quality": "low", "tags": ["spring"], "n": 2, "model": None, "use": "list", "candidates": 3}
    await client.generate_many(prompts, max_in_flight=1, **options)
    assert [request.spec for request in service.asked] == [
        pb.ImageSpec(prompt="fox 1", quality="low"),
        pb.ImageSpec(prompt="fox 2", quality="low", size="64x64"),
        pb.ImageSpec(prompt="fox 3", quality="high", seed=0),
    ]
    assert all((list(request.tags), request.n) == (["spring"], 2) for request in service.asked)
    assert all((request.use, request.candidates) == ("list", 3) for request in service.asked)


@pytest.mark.parametrize(
    "wrong",
    [7, None, {}, {"size": "auto"}, {"prompt": "fox", "promt": "fox"}, {"prompt": 7}, {"prompt": "\ud800"}],
    ids=["number", "none", "empty", "no prompt", "no field", "no text", "no unicode"],
)
async def test_a_prompt_that_cannot_be_sent_is_its_own_failure(client: Any, service: Service, wrong: Any) -> None:
    batch = await client.generate_many([wrong, "fox"])
    assert isinstance(batch.items[0].error, InvalidRequestError)
    assert batch.items[1].ok
    assert batch.summary.failed == {"INVALID_FIELD": 1}
    assert len(service.asked) == 1


@pytest.mark.parametrize("option", ["request_id", "max_wait_s", "exclude_keys", "qality"])
async def test_an_option_that_fits_no_batch_is_a_mistake_of_the_program(
    client: Any, service: Service, option: str
) -> None:
    with pytest.raises(TypeError, match=option):
        await client.generate_many(["fox"], **{option: "x"})
    assert service.asked == []


async def test_an_option_that_cannot_be_sent_ends_the_batch_before_it_begins(client: Any, service: Service) -> None:
    with pytest.raises(InvalidRequestError):
        await client.generate_many(["fox"], n=2**40)
    with pytest.raises(ValueError, match="max_in_flight"):
        await client.generate_many(["fox"], max_in_flight=0)
    assert service.asked == []


async def test_no_prompts_are_an_empty_batch(client: Any) -> None:
    batch = await client.generate_many([])
    assert batch.items == ()
    assert (batch.summary.asked, batch.summary.ok, batch.summary.failed) == (0, 0, {})


async def test_never_more_are_asked_for_at_once_than_allowed(client: Any, service: Service) -> None:
    service.gate.clear()
    batch = asyncio.ensure_future(client.generate_many([f"fox {i}" for i in range(10)], max_in_flight=3))
    await until(lambda: service.running == 3)
    assert len(service.asked) == 3
    service.gate.set()
    assert (await batch).summary.ok == 10
    assert service.most_running == 3


async def test_who_is_told_when_to_come_back_comes_back_then(client: Any, service: Service) -> None:
    service.steps = {"fox": [come_back(0.05), come_back(0.05)]}
    batch = await client.generate_many(["fox"], cache_policy=CachePolicy.REFRESH)
    assert batch.items[0].ok
    first, second, third = service.asked_s
    assert min(second - first, third - second) >= 0.05
    assert len({request.request_id for request in service.asked}) == 1  # so that no try pays again
    assert service.asked[0].request_id
    assert batch.items[0].seconds >= 0.1


async def test_each_paying_prompt_has_a_request_id_of_its_own(client: Any, service: Service) -> None:
    await client.generate_many(["fox", "fox"], cache_policy=CachePolicy.REFRESH)
    assert len({request.request_id for request in service.asked}) == 2


async def test_coming_back_ends_after_five_tries(client: Any, service: Service) -> None:
    service.steps = {"fox": [come_back(0.001)] * 9}
    batch = await client.generate_many(["fox"])
    assert isinstance(batch.items[0].error, TryAgainError)
    assert batch.summary.failed == {"QUEUE_FULL": 1}
    assert len(service.asked) == 5


async def test_no_try_waits_beyond_the_time_of_its_prompt(client: Any, service: Service) -> None:
    service.steps = {"fox": [come_back(1_000)]}
    batch = await client.generate_many(["fox"], timeout_s=30)
    assert isinstance(batch.items[0].error, TryAgainError)
    assert batch.items[0].seconds < 30
    assert len(service.asked) == 1


async def test_a_prompt_without_an_answer_in_time_fails_alone(client: Any, service: Service) -> None:
    service.gate.clear()
    batch = await client.generate_many(["fox"], timeout_s=0.1)
    assert isinstance(batch.items[0].error, DeadlineError)
    assert batch.summary.failed == {"DEADLINE_EXCEEDED": 1}


async def test_unavailable_without_a_word_when_is_final(client: Any, service: Service) -> None:
    service.steps = {"fox": [DOWN]}
    batch = await client.generate_many(["fox"])
    assert batch.summary.failed == {"UPSTREAM_DOWN": 1}
    assert len(service.asked) == 1


async def test_progress_is_told_after_each_prompt(client: Any, service: Service) -> None:
    service.steps = {"bad": [REFUSED]}
    told: list[BatchProgress] = []
    batch = await client.generate_many(["hit", "bad", "miss"], max_in_flight=1, on_progress=told.append)
    assert [(each.done, each.failed, each.asked) for each in told] == [(1, 0, 3), (2, 1, 3), (3, 1, 3)]
    assert [(each.cost_microusd, each.saved_microusd) for each in told] == [(0, 40_000), (0, 40_000), (40_000, 40_000)]
    assert [each.item for each in told] == list(batch.items)
    assert told[0].seconds <= told[-1].seconds <= batch.summary.seconds


async def test_what_on_progress_raises_ends_the_batch_as_it_is(client: Any, service: Service) -> None:
    def stop(progress: BatchProgress) -> None:
        raise LookupError(f"enough after {progress.done}")

    with pytest.raises(LookupError, match="enough after 1"):
        await client.generate_many([f"fox {number}" for number in range(500)], max_in_flight=1, on_progress=stop)
    assert len(service.asked) < 500


async def test_cancelling_ends_what_runs_and_starts_no_other(address: str, service: Service) -> None:
    service.gate.clear()
    async with AsyncClient(address) as client:
        batch = asyncio.ensure_future(client.generate_many([f"fox {i}" for i in range(10)], max_in_flight=3))
        await until(lambda: service.running == 3)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        await until(lambda: service.running == 0)
        assert len(service.asked) == 3


async def test_a_prompt_is_in_no_repr(client: Any, service: Service) -> None:
    service.steps = {"a secret": [REFUSED] * 2}
    batch = await client.generate_many(["a secret", {"prompt": "a secret"}, {"prompt": "a secret", "x": 1}])
    assert "secret" not in repr(batch)
    assert all("secret" not in str(item.error) for item in batch.items)


async def test_many_prompts_of_one_picture_pay_once(kind: str, house: House) -> None:
    async with open_front(house) as front, connected(kind, f"127.0.0.1:{front.server.port}") as client:
        batch = await client.generate_many(["a red fox", "A red fox", "a red fox", {"prompt": "a blue fox"}])
    assert Counter(item.ok for item in batch.items) == {True: 4}
    assert house.upstream.calls == 2
    assert batch.summary.cost_microusd == 2 * 53_000
    assert batch.items[0].result.data == batch.items[2].result.data


class TestStream:
    """`batch`, against the real service."""

    @pytest.fixture
    async def front(self, house: House) -> AsyncIterator[Front]:
        async with open_front(house) as front:
            yield front

    @pytest.fixture
    async def client(self, kind: str, front: Front) -> AsyncIterator[Any]:
        async with connected(kind, f"127.0.0.1:{front.server.port}") as client:
            yield client

    async def test_each_request_has_its_outcome_under_its_id(self, client: Any, house: House) -> None:
        requests = [
            ("a", "a red fox"),
            ("b", {"prompt": "a red fox", "size": "1x1"}),
            ("c", ImageSpec("a blue fox", quality="high")),
            ("d", {"prompt": "a red fox", "no such": 1}),
        ]
        answers = dict([answer async for answer in client.batch(requests, quality="low")])
        assert set(answers) == {"a", "b", "c", "d"}
        assert answers["a"].status.cost_microusd == 53_000
        assert answers["c"].image.quality == "high"
        assert isinstance(answers["b"], InvalidRequestError)
        assert list(answers["b"].violations) == ["spec.size"]
        assert isinstance(answers["d"], InvalidRequestError)
        assert house.upstream.calls == 2

    async def test_each_answer_is_remembered_under_an_id_of_its_own(self, client: Any) -> None:
        requests = [("a", "a red fox"), ("no id for a log", "a red fox"), ("nor this", "a blue fox")]
        answers = dict([answer async for answer in client.batch(requests)])
        stream_id = answers["a"].call_id.removesuffix("/a")
        assert {answers[name].call_id for name, _ in requests} == {f"{stream_id}/{each}" for each in ("a", "?2", "?3")}
        for answer in answers.values():
            told = await client.explain_call(answer.call_id)
            assert told.rpc == "BatchGetImages"
            assert tuple(each.key for each in told.images) == answer.keys

    async def test_a_failure_says_when_to_come_back(self, client: Any, house: House) -> None:
        house.upstream.fail_next(UpstreamDownError("down", retry_after_s=7.0))
        [(_, error)] = [answer async for answer in client.batch([("a", "a red fox")])]
        assert isinstance(error, TryAgainError)
        assert (error.reason, error.retry_after_s) == ("UPSTREAM_DOWN", 7.0)

    async def test_hundreds_of_requests_are_taken_as_they_are_worked_on(self, client: Any, house: House) -> None:
        def requests() -> Iterator[tuple[str, str]]:
            for n in range(300):
                yield f"{n}", f"fox {n % 50}"

        answers = [answer async for answer in client.batch(requests())]
        assert sorted(int(request_id) for request_id, _ in answers) == list(range(300))
        assert house.upstream.calls == 50

    async def test_what_making_the_requests_raises_comes_after_the_answers(self, client: Any) -> None:
        def requests() -> Iterator[tuple[str, str]]:
            yield "a", "a red fox"
            raise LookupError("no more of them")

        answers = client.batch(requests())
        request_id, _ = await anext(answers)
        assert request_id == "a"
        with pytest.raises(LookupError, match="no more of them"):
            await anext(answers)

    @pytest.mark.parametrize("ids", [[""], ["a", "a"]])
    async def test_an_id_must_be_the_requests_own(self, client: Any, house: House, ids: list[str]) -> None:
        house.upstream.hold()
        answers = client.batch([(each, "a red fox") for each in ids])
        house.upstream.release()
        with pytest.raises(ValueError, match="request_id"):
            async for _ in answers:
                pass

    async def test_an_option_that_fits_no_batch_is_a_mistake_of_the_program(self, client: Any) -> None:
        with pytest.raises(TypeError, match="max_wait_s"):
            async for _ in client.batch([("a", "a red fox")], max_wait_s=1.0):
                pass

    async def test_a_stream_that_breaks_is_an_error(self, client: Any, front: Front, house: House) -> None:
        house.upstream.hold()
        waiting = asyncio.ensure_future(anext(client.batch([("a", "a red fox")])))
        await house.upstream.arrived(1)
        await front.server.drain(0.01)
        async with asyncio.timeout(15):
            with pytest.raises(TryAgainError):
                await waiting

    @pytest.mark.no_cover
    async def test_a_stream_that_breaks_while_more_is_sent_is_one_to_try_again(self, kind: str, house: House) -> None:
        def requests() -> Iterator[tuple[str, str]]:
            for n in range(100_000):
                yield f"{n}", "a red fox" + "x" * 3_000

        async def broken(after: int) -> None:
            async with open_front(house) as front, connected(kind, f"127.0.0.1:{front.server.port}") as client:
                answers = client.batch(requests())
                for _ in range(after):
                    await anext(answers)
                draining = asyncio.create_task(front.server.drain(0.0))
                with pytest.raises(TryAgainError):
                    async for _ in answers:
                        pass
                await draining

        for after in range(1, 80, 7):
            await broken(after)

    async def test_requests_may_come_from_an_asynchronous_source(self, front: Front) -> None:
        async def requests() -> AsyncIterator[tuple[str, str]]:
            for n in range(3):
                yield f"{n}", "a red fox"

        async with AsyncClient(f"127.0.0.1:{front.server.port}") as client:
            answers = dict([answer async for answer in client.batch(requests())])
        assert sorted(answers) == ["0", "1", "2"]
