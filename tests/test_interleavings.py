"""Random histories of callers, outages and hang-ups, judged from outside by what must always hold.

A wrong image is never served, nothing paid for is paid for twice or lost, and nobody waits for ever. The tiers
are dictionaries, so that a history runs the same way each time; they keep the contract of all tiers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from cacheserver.epochs import Epochs
from cacheserver.errors import CacheServerError, EntryTooLargeError, UpstreamDownError
from cacheserver.interfaces import no_step
from cacheserver.model import (
    CachedImage,
    CacheKey,
    CachePolicy,
    Caller,
    GeneratedImage,
    Head,
    ImageRequest,
    Labels,
    Pending,
    Permission,
    Served,
    Terms,
    TierName,
    Touch,
    Touched,
    VariantPolicy,
)
from cacheserver.tiers import codec
from tests.fakes import FakeClock
from tests.house import EVERYTHING, FaultyTier, House
from tests.provider import FakeUpstream
from tests.tier_contract import MAX_ENTRY_BYTES, TierContract

pytestmark = pytest.mark.no_cover

CALLERS = {"payer": EVERYTHING, "reader": Caller("reader", frozenset({Permission.READ}))}
PROMPTS = ("a red fox", "a blue fox", "a green fox")
PRICE = 53_000


class DictTier:
    """A `Tier` that is a dictionary; each call takes one turn of the event loop."""

    name = TierName.S3

    def __init__(
        self, clock: FakeClock, *, max_entry_bytes: int = MAX_ENTRY_BYTES, epochs: Epochs | None = None
    ) -> None:
        self._clock = clock
        self._epochs = epochs or Epochs()
        self._max_entry_bytes = max_entry_bytes
        self.entries: dict[str, CachedImage] = {}

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None:
        await asyncio.sleep(0)
        return self._servable(key, stale_s)

    async def find(self, keys: Sequence[CacheKey], *, on_step: Callable[[], None] = no_step) -> list[bool]:
        await asyncio.sleep(0)
        on_step()
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

    async def move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:  # noqa: ARG002 - the contract's
        await self.delete(slot)
        return False

    async def touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        await asyncio.sleep(0)
        holder = self.entries.get(key.name)
        if holder is None or holder.image.sha256 != entry.image.sha256:
            return Touched(Touch.GONE)
        if not entry.outlasts(holder):
            return Touched(Touch.CURRENT)
        self.entries[key.name] = entry
        return Touched(Touch.MOVED)

    async def delete(self, key: CacheKey) -> bool:
        await asyncio.sleep(0)
        return self.entries.pop(key.name, None) is not None

    async def reclaim(self, key: CacheKey) -> bool:
        await asyncio.sleep(0)
        entry = self.entries.get(key.name)
        if entry is None or not self._epochs.is_purged(key, entry):
            return False
        del self.entries[key.name]
        return True

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        await asyncio.sleep(0)
        for key in [CacheKey.parse(name) for name in self.entries]:
            if key.partition == partition:
                yield key

    async def page(self, partition: str, *, after: CacheKey | None, limit: int) -> list[CacheKey]:
        last = "" if after is None else after.name
        keys = [key async for key in self.scan(partition) if key.name > last]
        return sorted(keys, key=lambda key: key.name)[:limit]

    async def renditions(self, key: CacheKey) -> list[CacheKey]:
        start = f"{key.fingerprint_name}."
        return [each async for each in self.scan(key.partition) if each.name.startswith(start) and each.is_rendition]

    async def head(self, key: CacheKey) -> Head | None:
        await asyncio.sleep(0)
        entry = self.entries.get(key.name)
        return None if entry is None else Head(replace(entry, image=replace(entry.image, data=b"")), entry.size_bytes)

    async def labels(self, key: CacheKey) -> Labels | None:
        await asyncio.sleep(0)
        entry = self.entries.get(key.name)
        return None if entry is None else Labels(entry.namespace, entry.tags, entry.derived_from, entry.epoch)

    async def ping(self) -> None:
        """It works."""

    async def aclose(self) -> None:
        """There is nothing to let go of."""

    def _servable(self, key: CacheKey, stale_s: float = 0.0) -> CachedImage | None:
        entry, now_s = self.entries.get(key.name), self._clock.now_s()
        is_there = entry is not None and codec.answers(entry, key, now_s, self._epochs, stale_s=stale_s)
        return entry if is_there else None


class TestDictTier(TierContract):
    @pytest.fixture
    def tier(self, clock: FakeClock) -> DictTier:
        return DictTier(clock)


class Painter(FakeUpstream):
    """An upstream whose calls end when told to, and that remembers for which prompt it made each picture."""

    def __init__(self) -> None:
        super().__init__(cost_microusd=PRICE)
        self.made_for: dict[str, str] = {}
        self.is_open = False
        self._painting: list[asyncio.Future[None]] = []
        self.during = self._wait

    def finish_one(self) -> None:
        if self._painting:
            self._painting.pop(0).set_result(None)

    def open(self) -> None:
        self.is_open = True
        while self._painting:
            self.finish_one()

    async def _wait(self) -> None:
        if not self.is_open:
            painted = asyncio.get_running_loop().create_future()
            self._painting.append(painted)
            await painted

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
        epochs = Epochs()
        self.first = DictTier(self.clock, epochs=epochs)
        self.fast = FaultyTier(self.first, TierName.REDIS)
        self.last = DictTier(self.clock, epochs=epochs)
        self.s3 = FaultyTier(self.last, TierName.S3)
        self.house = House(clock=self.clock, redis=self.fast, s3=self.s3, epochs=epochs)
        self.upstream = Painter()
        self.house.upstream = self.upstream
        self.house.restart(max_concurrent=2)
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
        waiting = [call for call in self.calls if not call.task.done()]
        if waiting:
            waiting[which % len(waiting)].task.cancel()

    def put(self, prompt: str) -> None:
        self._put(prompt, replace=False)

    def put_instead(self, prompt: str) -> None:
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

    def finish_one(self) -> None:
        self.upstream.finish_one()

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

    def flush(self) -> None:
        """Everything is evicted from memory and from the fast tier."""
        self.forget()
        self.first.entries.clear()

    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────

    async def come_to_rest(self) -> None:
        """All is released and well again, and time passes."""
        self.upstream.open()
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
    assert not house.cache._alone.running
    assert house.books.snapshot(None).unsaved == 0


async def check_a_replaced_picture_never_comes_back(history: History) -> None:
    for prompt in PROMPTS:
        history.fast_tier_fails()
        history.ask(prompt, "payer", Terms(cache_policy=CachePolicy.REFRESH))
        await history.turns(60)
        history.tiers_are_back()
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
    ids = {call.terms.request_id for call in history.calls if call.may_pay}
    # What a load was to make when it was sealed is made, also for one of several callers who hung up since.
    hung_up = sum(call.task.cancelled() for call in history.calls if call.may_pay)
    assert history.upstream.images <= len(ids) + hung_up


def check_plain_calls_paid_for_the_most_that_one_asked_for(history: History) -> None:
    made = Counter(history.upstream.made_for.values())
    for prompt in PROMPTS:
        most = max((call.terms.n for call in history.calls if call.prompt == prompt and call.may_pay), default=0)
        assert made[prompt] <= most


# ── what histories there are ────────────────────────────────────────────────────────────────────────────────

Step = tuple[Any, ...]
Draw = Callable[[Random], Step]


def plain(rng: Random) -> Terms:
    return Terms(n=rng.randint(1, 3), max_wait_s=rng.choice([None, None, None, 0.0]))


def sent_again(rng: Random) -> Terms:
    return replace(plain(rng), n=1, variant_policy=VariantPolicy.NEXT, request_id=rng.choice("abcdef"))


def another_one(rng: Random) -> Terms:
    return replace(plain(rng), variant_policy=VariantPolicy.NEXT)


def anything(rng: Random) -> Terms:
    return Terms(
        n=rng.randint(1, 3),
        cache_policy=rng.choice(list(CachePolicy)),
        variant_policy=rng.choice(list(VariantPolicy)),
        max_age_s=rng.choice([None, None, 5.0]),
        ttl_s=rng.choice([None, None, 20.0]),
        max_wait_s=rng.choice([None, None, 0.0, 3.0]),
        request_id=rng.choice(["", "", *"abcdef"]),
    )


def asks(terms: Callable[[Random], Terms]) -> Draw:
    return lambda rng: ("ask", rng.choice(PROMPTS), rng.choice(["payer", "payer", "payer", "reader"]), terms(rng))


def hangs_up(rng: Random) -> Step:
    return ("hang_up", rng.randrange(30))


def asks_by_key(rng: Random) -> Step:
    return ("by_key", rng.choice(PROMPTS), rng.randrange(4))


def takes_turns(rng: Random) -> Step:
    return ("turns", rng.choice([1, 2, 3, 5, 20]))


def paints(rng: Random) -> Step:
    return (rng.choice(["finish_one", "finish_one", "finish_one", "fail_next"]),)


def goes_away(rng: Random) -> Step:
    return (rng.choice(["fast_tier_fails", "last_tier_fails", "tiers_are_back", "tiers_are_back"]),)


def loses(rng: Random) -> Step:
    return rng.choice([("forget",), ("flush",), ("time_passes", 1.0), ("time_passes", 4.0), ("time_passes", 31.0)])


def changes(rng: Random) -> Step:
    return (rng.choice(["put", "put_instead", "purge"]), rng.choice(PROMPTS))


async def lived(rng: Random, *draws: Draw) -> History:
    """A history of some of these steps, come to rest, with what must hold of every one checked."""
    history = History()
    pool = [*draws, *draws, hangs_up, hangs_up, takes_turns, takes_turns, paints, asks_by_key]
    steps = [rng.choice(pool)(rng) for _ in range(rng.randint(10, 150))]
    note("\n".join(map(str, steps)))
    for step in steps:
        await history.step(*step)
    await history.come_to_rest()
    check_everyone_was_answered_rightly(history)
    check_money(history)
    check_nothing_is_left_over(history)
    return history


thorough = settings(max_examples=150)
anyhow = st.randoms(use_true_random=True)
"""A seed that Hypothesis draws and names: its own lists of steps seldom bring several callers to one moment."""


@thorough
@given(anyhow)
def test_whatever_happens_a_picture_that_was_replaced_never_comes_back(rng: Random) -> None:
    async def live() -> None:
        history = await lived(rng, asks(anything), asks(plain), goes_away, loses, changes)
        await check_a_replaced_picture_never_comes_back(history)
        await history.close()

    asyncio.run(live())


@thorough
@given(anyhow)
def test_through_any_outage_every_picture_paid_for_ends_in_the_last_tier(rng: Random) -> None:
    async def live() -> None:
        history = await lived(rng, asks(plain), asks(another_one), asks(sent_again), goes_away, loses)
        check_nothing_paid_for_is_lost(history)
        await history.close()

    asyncio.run(live())


@thorough
@given(anyhow)
def test_plain_calls_pay_for_no_more_pictures_than_the_most_that_one_asked_for(rng: Random) -> None:
    async def live() -> None:
        history = await lived(rng, asks(plain), asks(plain), loses)
        check_plain_calls_paid_for_the_most_that_one_asked_for(history)
        check_nothing_paid_for_is_lost(history)
        await history.close()

    asyncio.run(live())


@thorough
@given(anyhow)
def test_a_call_sent_again_gets_the_same_and_is_paid_for_once(rng: Random) -> None:
    async def live() -> None:
        history = await lived(rng, asks(sent_again), asks(sent_again), loses)
        check_a_call_sent_again_got_the_same(history)
        check_each_id_paid_at_most_once(history)
        await history.close()

    asyncio.run(live())
