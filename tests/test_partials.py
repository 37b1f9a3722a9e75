"""Partial pictures: whoever waits for a picture and listens sees it come, and nothing else changes."""

from __future__ import annotations

import asyncio

import pytest

from cacheserver.errors import UpstreamDownError
from cacheserver.model import CachePolicy, PartialImage, Pending, Served
from tests.house import House
from tests.waiting import until


class Viewer:
    """A caller that looks at partial pictures."""

    def __init__(self, house: House, *, wants: int = 3, **terms: object) -> None:
        self.seen: list[int] = []
        self.asking: asyncio.Task[list[Served] | Pending] = asyncio.create_task(
            house.ask(partial_images=wants, on_partial=self.look, **terms)
        )

    def look(self, partial: PartialImage) -> None:
        self.seen.append(partial.index)


async def begun(house: House, calls: int = 1) -> None:
    await house.upstream.arrived(calls)


def draw(house: House, *indices: int, call: int = 0) -> None:
    """Let the upstream give partial pictures of its call."""
    give = house.upstream.on_partials[call]
    assert give is not None
    for index in indices:
        give(PartialImage(b"coarse", index))


async def test_everyone_in_the_flight_sees_as_many_as_they_asked_for(house: House) -> None:
    house.upstream.hold()
    few, many = Viewer(house, wants=1), Viewer(house, wants=3)
    blind = asyncio.create_task(house.ask())
    await begun(house)
    draw(house, 0, 1, 2, 3)
    house.upstream.release()
    await asyncio.gather(few.asking, many.asking, blind)
    assert (few.seen, many.seen) == ([0], [0, 1, 2])
    assert (house.upstream.calls, house.upstream.partials_asked) == (1, [3])


async def test_who_joins_late_sees_what_comes_after(house: House) -> None:
    house.upstream.hold()
    early = Viewer(house, wants=2)
    await begun(house)
    draw(house, 0)
    late = Viewer(house, wants=3)
    await until(lambda: house.cache._flights.of(house.identity()[1].key)[0].waiters[1:] != [])
    draw(house, 1)
    house.upstream.release()
    await asyncio.gather(early.asking, late.asking)
    assert (early.seen, late.seen) == ([0, 1], [1])


async def test_nobody_who_looks_means_none_are_asked_for(house: House) -> None:
    await house.ask()
    await house.ask("a blue fox", partial_images=2)  # and nobody to give them to
    assert house.upstream.partials_asked == [0, 0]
    assert house.upstream.on_partials == [None, None]


async def test_a_hit_has_none(house: House) -> None:
    await house.ask()
    viewer = Viewer(house)
    await viewer.asking
    assert (viewer.seen, house.upstream.calls) == ([], 1)


async def test_several_pictures_at_a_time_have_none(house: House) -> None:
    viewer = Viewer(house, n=2)
    await viewer.asking
    assert house.upstream.on_partials == [None]
    assert house.upstream.partials_asked == [0]


@pytest.mark.parametrize("max_wait_s", [None, 0])
async def test_who_has_left_or_been_put_off_sees_no_more(house: House, max_wait_s: float | None) -> None:
    house.upstream.hold()
    leaving, staying = Viewer(house, max_wait_s=max_wait_s), Viewer(house)
    await begun(house)
    draw(house, 0)
    leaving.asking.cancel()
    await asyncio.wait({leaving.asking})
    draw(house, 1)
    house.upstream.release()
    await staying.asking
    assert leaving.seen == ([0] if max_wait_s is None else [])
    assert staying.seen == [0, 1]


@pytest.mark.parametrize("policy", [CachePolicy.USE_CACHE, CachePolicy.REFRESH, CachePolicy.NO_STORE])
async def test_nobody_sees_what_a_call_that_lost_gives_when_the_picture_is_there(
    house: House, policy: CachePolicy
) -> None:
    house.upstream.hold()
    viewer = Viewer(house, cache_policy=policy)
    await begun(house)
    draw(house, 0)
    house.upstream.release()
    await viewer.asking
    draw(house, 1, 2)
    assert viewer.seen == [0]


async def test_a_viewer_that_fails_harms_neither_the_load_nor_the_others(house: House) -> None:
    calls = 0

    def fail(_: PartialImage) -> None:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError

    house.upstream.hold()
    failing = asyncio.create_task(house.ask(partial_images=3, on_partial=fail))
    viewer = Viewer(house)
    await begun(house)
    draw(house, 0, 1)
    house.upstream.release()
    await asyncio.gather(failing, viewer.asking)
    assert (calls, viewer.seen) == (1, [0, 1])


@pytest.mark.parametrize("policy", [CachePolicy.NO_STORE, CachePolicy.REFRESH])
async def test_a_picture_for_one_caller_and_a_refresh_are_seen_as_well(house: House, policy: CachePolicy) -> None:
    house.upstream.partials = [b"coarse", b"finer"]
    viewer = Viewer(house, cache_policy=policy)
    await viewer.asking
    assert viewer.seen == [0, 1]


async def test_a_partial_picture_is_never_kept_nor_answered(house: House) -> None:
    house.upstream.partials = [b"coarse"]
    viewer = Viewer(house)
    answer = await viewer.asking
    assert isinstance(answer, list)
    assert answer[0].entry.image.data != b"coarse"
    assert (await house.get()).entry.image.data == answer[0].entry.image.data


async def test_a_load_that_fails_after_a_partial_picture_fails_as_ever(house: House) -> None:
    house.upstream.partials = [b"coarse"]
    house.upstream.fail_next(UpstreamDownError("down", cost_microusd=None))
    viewer = Viewer(house)
    with pytest.raises(UpstreamDownError):
        await viewer.asking
    assert viewer.seen == [0]
    assert (await house.get()).tier.value == "upstream"


async def test_what_is_set_aside_counts_partial_pictures(house: House) -> None:
    await house.ask("a red fox")
    viewer = Viewer(house, wants=3, cache_policy=CachePolicy.REFRESH)
    await viewer.asking
    plain, partial = (attempt.estimate_microusd for attempt in house.ledger.opened)
    assert partial - plain == 3 * 100 * 30  # output tokens of gpt-image-2, in micro-dollars
