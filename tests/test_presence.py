"""Finding names by pages or one by one comes to the same, and takes the way that costs less."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.errors import TierError
from cacheserver.tiers.presence import Page, Presence


class Bucket:
    """Names in memory, listed in pages as S3 does, and a record of what was asked."""

    def __init__(self, names: Sequence[str], *, page_size: int = 1_000) -> None:
        self.names = sorted(names)
        self.page_size = page_size
        self.listed = 0
        self.asked = 0
        self.steps = 0
        self.at_once = self.most_at_once = 0
        self.fault: Callable[[Page], Page] = lambda page: page

    async def page(self, after: str) -> Page:
        self.listed += 1
        await self._turn()
        following = [name for name in self.names if name > after]
        return self.fault(Page(following[: self.page_size], is_last=len(following) <= self.page_size))

    async def heads(self, names: Sequence[str]) -> list[bool]:
        self.asked += len(names)
        await self._turn()
        return [name in self.names for name in names]

    async def _turn(self) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        self.at_once -= 1

    def _step(self) -> None:
        self.steps += 1

    async def find(self, names: Sequence[str]) -> set[str]:
        return await Presence(page=self.page, heads=self.heads, on_step=self._step).find(sorted(names))


def hashes(count: int, *, seed: int = 1) -> list[str]:
    rng = Random(seed)  # noqa: S311 - names for a test
    return [f"{rng.getrandbits(64):016x}" for _ in range(count)]


NAMES = st.text("ab.", min_size=1, max_size=7)


@given(
    exist=st.sets(NAMES, max_size=400), more=st.sets(NAMES, max_size=300), page_size=st.sampled_from([1, 7, 40, 999])
)
async def test_what_is_found_is_what_exists(exist: set[str], more: set[str], page_size: int) -> None:
    asked = more | {f"x{n:03}" for n in range(140)}  # enough of them to be worth a page
    bucket = Bucket([*exist, *(f"x{n:03}" for n in range(0, 140, 3))], page_size=page_size)
    assert await bucket.find(list(asked)) == asked & set(bucket.names)


async def test_where_pages_answer_many_nothing_is_asked_one_by_one() -> None:
    exist = hashes(3_000)
    asked = [*exist[:300], *hashes(700, seed=2)]
    bucket = Bucket(exist, page_size=100)
    assert await bucket.find(asked) == set(exist[:300])
    assert bucket.asked < 60  # the ends of the runs, where a page is not worth it any more
    assert 30 <= bucket.listed <= 40
    assert bucket.steps >= bucket.listed
    assert 1 < bucket.most_at_once <= 8


async def test_where_a_page_answers_few_all_else_is_asked_one_by_one() -> None:
    exist = hashes(5_000)
    asked = [*exist[:100], *hashes(200, seed=2)]
    bucket = Bucket(exist, page_size=10)
    assert await bucket.find(asked) == set(exist[:100])
    assert bucket.listed == 1
    assert bucket.asked >= 287
    assert bucket.most_at_once <= 8


async def test_a_run_that_comes_where_names_are_dense_goes_on_one_by_one() -> None:
    thin = [f"a{name}" for name in hashes(200)]
    dense = [f"b{name}" for name in hashes(4_000, seed=2)]
    asked = [*thin, *dense[:200]]
    bucket = Bucket([*thin, *dense], page_size=50)
    assert await bucket.find(asked) == set(asked)
    assert bucket.listed <= 20
    assert bucket.asked >= 150


async def test_few_names_are_asked_one_by_one() -> None:
    exist = hashes(129)
    bucket = Bucket(exist)
    assert await bucket.find(exist) == set(exist)
    assert (bucket.listed, bucket.asked) == (0, 129)
    assert await bucket.find([]) == set()


FAULTS: dict[str, Callable[[Page], Page]] = {
    "another order": lambda page: Page(page.names[::-1], page.is_last),
    "begins elsewhere": lambda page: Page(["", *page.names], page.is_last),
    "repeats itself": lambda page: Page([*page.names[:1], *page.names], page.is_last),
    "empty with more to come": lambda _: Page([], is_last=False),
}


@pytest.mark.parametrize("kind", FAULTS)
async def test_a_page_that_cannot_be_trusted_answers_nothing(kind: str) -> None:
    exist = hashes(500)
    bucket = Bucket(exist)
    bucket.fault = FAULTS[kind]
    absent = hashes(100, seed=2)
    assert await bucket.find([*exist[::2], *absent]) == set(exist[::2])
    assert (bucket.listed, bucket.asked) == (1, 350)


async def test_what_fails_ends_the_rest() -> None:
    bucket = Bucket(hashes(3_000), page_size=100)

    def fail_later(page: Page) -> Page:
        if bucket.listed > 3:
            raise TierError("down")
        return page

    bucket.fault = fail_later
    with pytest.raises(TierError):
        await bucket.find(hashes(1_000, seed=2))
    listed = bucket.listed
    await asyncio.sleep(0)
    assert (bucket.listed, bucket.at_once) == (listed, bucket.at_once)
    assert [task for task in asyncio.all_tasks() if task.get_name() == "find"] == []
