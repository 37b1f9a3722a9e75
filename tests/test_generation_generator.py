"""From a miss to pictures: one place, one upstream, one row in the books."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.errors import (
    InvalidRequestError,
    PromptRefusedError,
    QueueFullError,
    UpstreamDownError,
    UpstreamNotEntitledError,
)
from cacheserver.generation.generator import Generator
from cacheserver.generation.prices import PriceTable
from cacheserver.interfaces import Generation, Upstream
from cacheserver.model import GeneratedImage, ImageRequest, Priority
from tests.fakes import FakeClock
from tests.provider import FakeUpstream

CAT = ImageRequest("a cat", "gpt-image-2")


class UpstreamBooks(CounterBooks):
    """The real books, keeping the rows of upstream calls to look at."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock, registry=CollectorRegistry())
        self.calls: list[tuple[str, str, str, float]] = []

    def upstream_call(self, upstream: str, model: str, result: str, seconds: float) -> None:
        super().upstream_call(upstream, model, result, seconds)
        self.calls.append((upstream, model, result, seconds))


@pytest.fixture
def books(clock: FakeClock) -> UpstreamBooks:
    return UpstreamBooks(clock)


@pytest.fixture
def upstream() -> FakeUpstream:
    return FakeUpstream(models=("gpt-image-2", "gpt-image-2.6-flare"))


@pytest.fixture
def generator(upstream: FakeUpstream, clock: FakeClock, books: UpstreamBooks) -> Generator:
    return made(upstream, clock, books)


def made(upstream: Upstream, clock: FakeClock, books: UpstreamBooks, *, places: int = 2, queue: int = 4) -> Generator:
    return Generator(
        upstreams={"gpt-image-2": upstream, "gpt-image-2.6-flare": upstream},
        default_model="gpt-image-2",
        clock=clock,
        books=books,
        prices=PriceTable.load(),
        max_concurrent=places,
        queue_max=queue,
    )


async def generate(
    generator: Generator, request: ImageRequest = CAT, *, n: int = 1, spent: list[str] | None = None
) -> list[GeneratedImage]:
    spent = [] if spent is None else spent
    return await generator.generate(
        request, range(n), priority=Priority.STANDARD, on_spending=lambda: spent.append(request.prompt)
    )


async def test_pictures_come_from_the_models_upstream_in_one_call(
    generator: Generator, upstream: FakeUpstream, books: UpstreamBooks
) -> None:
    images = await generate(generator, n=3)
    assert len({image.sha256 for image in images}) == 3
    assert upstream.asked == [(CAT, (0, 1, 2))]
    assert books.calls == [("fake", "gpt-image-2", "ok", 0.0)]


async def test_an_unknown_model_is_refused_with_the_ones_there_are(
    generator: Generator, upstream: FakeUpstream, books: UpstreamBooks
) -> None:
    spent: list[str] = []
    with pytest.raises(InvalidRequestError) as caught:
        await generate(generator, ImageRequest("a cat", "secret-model"), spent=spent)
    assert caught.value.violations == {"spec.model": "not served here; there are: gpt-image-2, gpt-image-2.6-flare"}
    assert (spent, upstream.calls, books.calls) == ([], 0, [])


async def test_spending_is_announced_when_a_place_is_free_and_not_before(
    upstream: FakeUpstream, clock: FakeClock, books: UpstreamBooks
) -> None:
    generator = made(upstream, clock, books, places=1)
    spent: list[str] = []
    upstream.hold()
    first = asyncio.create_task(generate(generator, spent=spent))
    await upstream.arrived(1)
    second = asyncio.create_task(generate(generator, ImageRequest("a dog", "gpt-image-2"), spent=spent))
    await asyncio.sleep(0)
    assert spent == ["a cat"]
    assert generator.queue_depth == {Priority.STANDARD: 1}
    upstream.release()
    await asyncio.gather(first, second)
    assert spent == ["a cat", "a dog"]


async def test_a_queued_generation_may_be_cancelled_for_nothing(
    upstream: FakeUpstream, clock: FakeClock, books: UpstreamBooks
) -> None:
    generator = made(upstream, clock, books, places=1)
    spent: list[str] = []
    upstream.hold()
    first = asyncio.create_task(generate(generator))
    await upstream.arrived(1)
    queued = asyncio.create_task(generate(generator, spent=spent))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    upstream.release()
    await first
    assert (spent, upstream.calls) == ([], 1)


async def test_no_more_run_at_once_and_wait_than_may(
    upstream: FakeUpstream, clock: FakeClock, books: UpstreamBooks
) -> None:
    generator = made(upstream, clock, books, places=2, queue=3)
    upstream.hold()
    tasks = [asyncio.create_task(generate(generator)) for _ in range(5)]
    await upstream.arrived(2)
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await generate(generator)
    assert upstream.calls == 2
    upstream.release()
    await asyncio.gather(*tasks)
    assert upstream.calls == 5


async def test_the_books_carry_the_reason_of_a_failure_and_its_place_is_free_again(
    upstream: FakeUpstream, clock: FakeClock, books: UpstreamBooks
) -> None:
    generator = made(upstream, clock, books, places=1, queue=0)
    for error in (PromptRefusedError("no"), UpstreamDownError("down")):
        upstream.fail_next(error)
        with pytest.raises(type(error)):
            await generate(generator)
    await generate(generator)
    assert [result for _, _, result, _ in books.calls] == ["PROMPT_REFUSED", "UPSTREAM_DOWN", "ok"]


async def test_a_call_cancelled_by_its_owner_is_booked_as_a_shutdown(
    generator: Generator, upstream: FakeUpstream, books: UpstreamBooks
) -> None:
    upstream.hold()
    running = asyncio.create_task(generate(generator))
    await upstream.arrived(1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert books.calls[0][2] == "SHUTTING_DOWN"


async def test_a_failure_nobody_foresaw_is_booked_and_passed_on(
    generator: Generator, upstream: FakeUpstream, books: UpstreamBooks
) -> None:
    async def break_down() -> None:
        raise ZeroDivisionError

    upstream.during = break_down
    with pytest.raises(ZeroDivisionError):
        await generate(generator)
    assert books.calls[0][2] == "INTERNAL"


async def test_the_estimate_begins_at_twenty_seconds_and_learns(
    generator: Generator, upstream: FakeUpstream, clock: FakeClock, books: UpstreamBooks
) -> None:
    took_s = iter((10.0, 20.0))

    async def take_time() -> None:
        clock.advance(next(took_s))

    upstream.during = take_time
    assert generator.estimated_wait_s("gpt-image-2", clock.monotonic_s()) == 20.0
    await generate(generator)
    assert generator.estimated_wait_s("gpt-image-2", clock.monotonic_s()) == 10.0
    await generate(generator)
    assert generator.estimated_wait_s("gpt-image-2", clock.monotonic_s()) == pytest.approx(12.0)
    assert generator.estimated_wait_s("gpt-image-2.6-flare", clock.monotonic_s()) == 20.0
    assert [seconds for _, _, _, seconds in books.calls] == [10.0, 20.0]


async def test_the_estimate_counts_down_to_half_a_second(generator: Generator, clock: FakeClock) -> None:
    since_s = clock.monotonic_s()
    clock.advance(15.0)
    assert generator.estimated_wait_s("gpt-image-2", since_s) == 5.0
    clock.advance(50.0)
    assert generator.estimated_wait_s("gpt-image-2", since_s) == 0.5


async def test_the_estimate_grows_with_the_queue(
    upstream: FakeUpstream, clock: FakeClock, books: UpstreamBooks
) -> None:
    generator = made(upstream, clock, books, places=1)
    upstream.hold()
    tasks = [asyncio.create_task(generate(generator)) for _ in range(3)]
    await upstream.arrived(1)
    await asyncio.sleep(0)
    assert generator.estimated_wait_s("gpt-image-2", clock.monotonic_s()) == 60.0
    upstream.release()
    await asyncio.gather(*tasks)


async def test_upstreams_are_checked_and_closed_once_each(generator: Generator, upstream: FakeUpstream) -> None:
    await generator.check()
    assert upstream.checks == 1
    upstream.fail_next(UpstreamNotEntitledError("no"))
    with pytest.raises(UpstreamNotEntitledError):
        await generator.check()
    await generator.aclose()
    assert upstream.closed
    assert generator.models == ("gpt-image-2", "gpt-image-2.6-flare")
    assert generator.default_model == "gpt-image-2"


async def test_an_estimate_comes_from_the_price_table(generator: Generator) -> None:
    assert generator.estimate_microusd(CAT, 3) == PriceTable.load().estimate_microusd(CAT, 3) > 600_000
    assert generator.estimate_microusd(ImageRequest("a cat", "nobodys"), 3) == 0


def test_it_is_the_generation_that_the_cache_knows(generator: Generator) -> None:
    known: Generation = generator
    assert known.default_model == "gpt-image-2"
