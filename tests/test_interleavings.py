"""Random histories of callers, outages and hang-ups, judged from outside by what must always hold.

A wrong image is never served, nothing paid for is paid for twice or lost, and nobody waits for ever. The tiers
are dictionaries, so that a history runs the same way each time; they keep the contract of all tiers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheserver.errors import CacheServerError, EntryTooLargeError, UpstreamDownError
from cacheserver.model import (
    CachedImage,
    CacheKey,
    CachePolicy,
    Caller,
    GeneratedImage,
    ImageRequest,
    Labels,
    Pending,
    Permission,
    Served,
    Terms,
    TierName,
    VariantPolicy,
)
from cacheserver.tiers import codec
from tests.fakes import FakeClock
from tests.house import EVERYTHING, FaultyTier, House
from tests.provider import FakeUpstream
from tests.tier_contract import MAX_ENTRY_BYTES, TierContract

CALLERS = {"payer": EVERYTHING, "reader": Caller("reader", frozenset({Permission.READ}))}
PROMPTS = ("a red fox", "a blue fox")
PRICE = 53_000


class DictTier:
    """A `Tier` that is a dictionary; each call takes one turn of the event loop."""

    name = TierName.S3

    def __init__(self, clock: FakeClock, *, max_entry_bytes: int = MAX_ENTRY_BYTES) -> None:
        self._clock = clock
        self._max_entry_bytes = max_entry_bytes
        self.entries: dict[str, CachedImage] = {}

    async def get(self, key: CacheKey) -> CachedImage | None:
        await asyncio.sleep(0)
        return self._servable(key)

    async def find(self, keys: Sequence[CacheKey]) -> list[bool]:
        await asyncio.sleep(0)
        return [key.name in self.entries for key in keys]

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        if entry.size_bytes > self._max_entry_bytes:
            raise EntryTooLargeError("too large for a test")
        await asyncio.sleep(0)
        held = None if replace else self._servable(key)
        if held is not None:
            return held.image.sha256 == entry.image.sha256
        self.entries[key.name] = entry
        return True

    async def delete(self, key: CacheKey) -> bool:
        await asyncio.sleep(0)
        return self.entries.pop(key.name, None) is not None

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        await asyncio.sleep(0)
        for key in [CacheKey.parse(name) for name in self.entries]:
            if key.partition == partition:
                yield key

    async def labels(self, key: CacheKey) -> Labels | None:
        await asyncio.sleep(0)
        entry = self.entries.get(key.name)
        return None if entry is None else Labels(entry.namespace, entry.tags)

    async def ping(self) -> None:
        """It works."""

    async def aclose(self) -> None:
        """There is nothing to let go of."""

    def _servable(self, key: CacheKey) -> CachedImage | None:
        entry = self.entries.get(key.name)
        return entry if entry is not None and codec.answers(entry, key, self._clock.now_s()) else None


class TestDictTier(TierContract):
    @pytest.fixture
    def tier(self, clock: FakeClock) -> DictTier:
        return DictTier(clock)


class Painter(FakeUpstream):
    """An upstream that remembers for which prompt it made each picture. Its pictures are a few bytes."""

    def __init__(self) -> None:
        super().__init__(cost_microusd=PRICE)
        self.made_for: dict[str, str] = {}

    def _image(self, request: ImageRequest) -> GeneratedImage:
        self.images += 1
        digest = f"{self.images:064x}"
        self.made_for[digest] = request.prompt
        return GeneratedImage(
            f"picture {self.images}".encode(), "image/png", 1, 1, digest, request.model, "1x1", "low", "opaque",
            paid_microusd=PRICE,
        )  # fmt: skip


@dataclass
class Call:
    """One caller, and what it got."""

    prompt: str
    task: asyncio.Task[list[Served] | Served | Pending]
    terms: Terms = field(default_factory=Terms)
    may_pay: bool = True
    caller: str = "payer"

    @property
    def served(self) -> list[Served]:
        if self.task.cancelled() or self.task.exception() is not None:
            return []
        answer = self.task.result()
        if isinstance(answer, Pending):
            return []
        return answer if isinstance(answer, list) else [answer]


class History:
    """A house and what happens to it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.fast = FaultyTier(DictTier(self.clock), TierName.REDIS)
        self.last = DictTier(self.clock)
        self.s3 = FaultyTier(self.last, TierName.S3)
        self.house = House(clock=self.clock, redis=self.fast, s3=self.s3)
        self.upstream = Painter()
        self.house.upstream = self.upstream
        self.house.restart(max_concurrent=1)
        self.calls: list[Call] = []
        self.puts = 0

    async def step(self, what: str, *arguments: Any) -> None:
        done = getattr(self, what)(*arguments)
        if isinstance(done, Coroutine):
            await done

    # ── what may happen ─────────────────────────────────────────────────────────────────────────────────────

    def ask(self, prompt: str, caller: str, terms: Terms) -> None:
        request, identity = self.house.identity(prompt)
        asking = self.house.cache.get(
            request, identity, namespace=self.house.namespace, caller=CALLERS[caller], terms=terms
        )
        may_pay = caller == "payer" and terms.cache_policy is not CachePolicy.ONLY_IF_CACHED
        self.calls.append(Call(prompt, asyncio.create_task(asking), terms, may_pay, caller))

    def by_key(self, prompt: str, variant: int) -> None:
        _, identity = self.house.identity(prompt)
        key = CacheKey.parse(identity.key.with_variant(variant).name)
        asking = self.house.cache.get_by_key(key, namespace=self.house.namespace, caller=EVERYTHING, terms=Terms())
        self.calls.append(Call(prompt, asyncio.create_task(asking), may_pay=False))

    def hang_up(self, which: int) -> None:
        if self.calls:
            self.calls[which % len(self.calls)].task.cancel()

    def put(self, prompt: str) -> None:
        self._put(prompt, replace=False)

    def replace(self, prompt: str) -> None:
        self._put(prompt, replace=True)

    def _put(self, prompt: str, *, replace: bool) -> None:
        self.puts += 1
        request, identity = self.house.identity(prompt)
        digest = f"{self.puts:032x}".rjust(64, "f")
        self.upstream.made_for[digest] = prompt
        image = GeneratedImage(digest.encode(), "image/png", 1, 1, digest, request.model, "1x1", "low", "opaque")

        async def putting() -> list[Served]:
            await self.house.cache.put(image, identity, namespace=self.house.namespace, replace=replace)
            return []

        self.calls.append(Call(prompt, asyncio.create_task(putting()), may_pay=False))

    def purge(self, prompt: str) -> None:
        _, identity = self.house.identity(prompt)

        async def purging() -> list[Served]:
            await self.house.cache.purge(self.house.namespace, identity=identity, dry_run=False)
            return []

        self.calls.append(Call(prompt, asyncio.create_task(purging()), may_pay=False))

    def hold(self) -> None:
        self.upstream.hold()

    def release(self) -> None:
        self.upstream.release()

    def fail_next(self) -> None:
        self.upstream.fail_next(UpstreamDownError("down for a test"))

    def fast_tier_fails(self) -> None:
        self.fast.is_down = True

    def last_tier_fails(self) -> None:
        self.s3.is_down = True

    def tiers_are_back(self) -> None:
        self.fast.is_down = self.s3.is_down = False

    def forget(self) -> None:
        """Everything is evicted from memory."""
        self.house.memory._entries.clear()

    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────

    async def come_to_rest(self) -> None:
        """All is released and well again, and time passes."""
        self.upstream.release()
        self.upstream._errors.clear()
        self.tiers_are_back()
        for _ in range(8):
            await self.turns(60)
            self.clock.advance(31)
        await self.turns(60)

    async def close(self) -> None:
        await self.house.aclose()
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


# ── what must hold ──────────────────────────────────────────────────────────────────────────────────────────


def check_everyone_was_answered_rightly(history: History) -> None:
    for call in history.calls:
        assert call.task.done(), f"{call} waits for ever"
        if not call.task.cancelled() and (error := call.task.exception()) is not None:
            assert isinstance(error, CacheServerError), f"{call} failed with {error!r}"
        for served in call.served:
            assert history.upstream.made_for[served.entry.image.sha256] == call.prompt


def check_money(history: History) -> None:
    spent = history.house.books.snapshot(None).total.spent_microusd
    assert spent == history.upstream.images * PRICE
    charged = Counter(
        served.entry.image.sha256 for call in history.calls for served in call.served if served.cost_microusd
    )
    assert all(times == 1 for times in charged.values())
    assert history.upstream.images <= sum(call.terms.n for call in history.calls if call.may_pay)


def check_nothing_is_left_over(history: History) -> None:
    house = history.house
    assert house.cache.in_flight == 0
    assert not house.keeper._held
    assert not house.keeper._writes
    assert not house.keeper._last_writes
    assert not house.keeper._outdated
    assert not house.cache._resent._promises
    assert not house.cache._unstored
    assert house.books.snapshot(None).unsaved == 0


async def check_a_replaced_picture_never_comes_back(history: History) -> None:
    for prompt in PROMPTS:
        history.ask(prompt, "payer", Terms(cache_policy=CachePolicy.REFRESH))
        await history.turns(60)
        (new,) = history.calls[-1].served
        for _ in range(2):
            history.ask(prompt, "payer", Terms())
            await history.turns(60)
            (found,) = history.calls[-1].served
            assert found.entry == new.entry
            history.forget()


def check_nothing_paid_for_is_lost(history: History) -> None:
    stored = {entry.image.sha256 for entry in history.last.entries.values()}
    assert history.upstream.made_for.keys() <= stored


def check_a_call_sent_again_got_the_same(history: History) -> None:
    given: dict[tuple[str, str], set[str]] = {}
    for call in history.calls:
        if call.terms.request_id and call.served:
            pictures = " ".join(one.entry.image.sha256 for one in call.served)
            given.setdefault((call.caller, call.terms.request_id), set()).add(pictures)
    assert all(len(answers) == 1 for answers in given.values())


def check_each_id_paid_at_most_once(history: History) -> None:
    assert history.upstream.images <= len({call.terms.request_id for call in history.calls if call.may_pay})


def check_plain_calls_paid_for_the_most_that_one_asked_for(history: History) -> None:
    made = Counter(history.upstream.made_for.values())
    for prompt in PROMPTS:
        most = max((call.terms.n for call in history.calls if call.prompt == prompt and call.may_pay), default=0)
        assert made[prompt] <= most


# ── what histories there are ────────────────────────────────────────────────────────────────────────────────

Step = tuple[Any, ...]

prompts = st.sampled_from(PROMPTS)
plain_terms = st.builds(Terms, n=st.integers(1, 3), max_wait_s=st.sampled_from([None, None, 0.0]))
next_terms = st.builds(
    Terms,
    n=st.integers(1, 2),
    variant_policy=st.just(VariantPolicy.NEXT),
    request_id=st.sampled_from(["", "one", "two"]),
)
sent_again_terms = st.builds(
    Terms,
    variant_policy=st.just(VariantPolicy.NEXT),
    request_id=st.sampled_from(["one", "two", "three"]),
    max_wait_s=st.sampled_from([None, None, 0.0]),
)
any_terms = st.builds(
    Terms,
    n=st.integers(1, 3),
    cache_policy=st.sampled_from(CachePolicy),
    variant_policy=st.sampled_from(VariantPolicy),
    max_age_s=st.sampled_from([None, None, 5.0]),
    ttl_s=st.sampled_from([None, None, 20.0]),
    max_wait_s=st.sampled_from([None, None, 0.0, 3.0]),
    request_id=st.sampled_from(["", "one", "two"]),
)


def asks(terms: st.SearchStrategy[Terms]) -> st.SearchStrategy[Step]:
    return st.tuples(st.just("ask"), prompts, st.sampled_from(["payer", "payer", "reader"]), terms)


turns = st.tuples(st.just("turns"), st.integers(1, 12))
hang_ups = st.tuples(st.just("hang_up"), st.integers(0, 30))
by_key = st.tuples(st.just("by_key"), prompts, st.integers(0, 3))
upstream = st.sampled_from([("hold",), ("release",), ("fail_next",)])
outages = st.sampled_from([("fast_tier_fails",), ("last_tier_fails",), ("tiers_are_back",)])
losses = st.one_of(st.just(("forget",)), st.tuples(st.just("time_passes"), st.sampled_from([1.0, 4.0, 31.0])))
changes = st.tuples(st.sampled_from(["put", "replace", "purge"]), prompts)


def histories(*steps: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.one_of(*steps, turns, hang_ups, by_key, upstream), min_size=3, max_size=40)


async def lived(steps: list[Step]) -> History:
    """The history of these steps, come to rest, with what must hold of every one checked."""
    history = History()
    for step in steps:
        await history.step(*step)
    await history.come_to_rest()
    check_everyone_was_answered_rightly(history)
    check_money(history)
    check_nothing_is_left_over(history)
    return history


thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@thorough
@given(histories(asks(any_terms), asks(plain_terms), outages, losses, changes))
def test_whatever_happens_a_picture_that_was_replaced_never_comes_back(steps: list[Step]) -> None:
    async def live() -> None:
        history = await lived(steps)
        await check_a_replaced_picture_never_comes_back(history)
        await history.close()

    asyncio.run(live())


@thorough
@given(histories(asks(plain_terms), asks(next_terms), outages, losses))
def test_through_any_outage_every_picture_paid_for_ends_in_the_last_tier(steps: list[Step]) -> None:
    async def live() -> None:
        history = await lived(steps)
        check_nothing_paid_for_is_lost(history)
        await history.close()

    asyncio.run(live())


@thorough
@given(histories(asks(plain_terms), st.just(("fast_tier_fails",)), losses))
def test_plain_calls_pay_for_no_more_pictures_than_the_most_that_one_asked_for(steps: list[Step]) -> None:
    async def live() -> None:
        history = await lived(steps)
        check_plain_calls_paid_for_the_most_that_one_asked_for(history)
        check_nothing_paid_for_is_lost(history)
        await history.close()

    asyncio.run(live())


@thorough
@given(histories(asks(sent_again_terms), losses))
def test_a_call_sent_again_gets_the_same_and_is_paid_for_once(steps: list[Step]) -> None:
    async def live() -> None:
        history = await lived(steps)
        check_a_call_sent_again_got_the_same(history)
        check_each_id_paid_at_most_once(history)
        await history.close()

    asyncio.run(live())
