"""What several replicas count together: on a real Valkey, a real Cluster and without Redis."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.archive import DirectoryArchive, day_of, pack, unpack
from cacheserver.accounting.books import CounterBooks, ToldApart
from cacheserver.accounting.kept import Kept, RollOff
from cacheserver.accounting.ledger import CallSums
from cacheserver.accounting.reading import FigureReader, Query
from cacheserver.accounting.shared import SharedFigures
from cacheserver.control.figures import LocalFigures, RedisFigures
from cacheserver.errors import AccountsUnavailableError, InvalidRequestError
from cacheserver.figures import DAY_S, HOUR_S, MINUTE_S, Bucket, Figures, Row, cell_name, total_of
from cacheserver.interfaces import FigureStore
from cacheserver.model import Attempt, AttemptOutcome, Outcome, StatsField, StatsSpan, TierName
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.servers import Cluster, TcpProxy, ValkeyServer
from tests.test_figures import HIT
from tests.waiting import until

PREFIXES = (f"figures-{n}:" for n in itertools.count())
KEPT = Kept()
REPLICA = "0" * 16


class Calls:
    """A ledger's sums, as a test says."""

    def __init__(self, *sums: CallSums) -> None:
        self._sums = sums

    async def calls_before_us(self, *, span_s: int, since_s: float) -> list[CallSums]:
        return [
            replace(each, start_s=each.start_s // span_s * span_s) for each in self._sums if each.start_s >= since_s
        ]


class Replica:
    """One replica's books and figures."""

    def __init__(
        self, store: FigureStore, directory: Path, clock: FakeClock, *, name: str = REPLICA, **options: Any
    ) -> None:
        told_apart = ToldApart(frozenset({"gpt-image-2"}), frozenset({"high"}), max_callers=2)
        self.books = CounterBooks(clock=clock, registry=CollectorRegistry(), told_apart=told_apart)
        self.figures = SharedFigures(
            store=store,
            archive=DirectoryArchive(directory),
            books=self.books,
            clock=clock,
            replica_id=name,
            kept=KEPT,
            **options,
        )

    def hit(self, times: int = 1, *, model: str = "gpt-image-2", quality: str = "high", caller: str = "web") -> None:
        for _ in range(times):
            self.books.answered(
                "shop",
                Outcome.HIT,
                TierName.MEMORY,
                seconds=0.002,
                image_bytes=10,
                saved_microusd=53_000,
                would_cost_microusd=53_000,
                model=model,
                quality=quality,
                caller=caller,
            )

    async def rows(self, since_s: float | None = None, until_s: float | None = None, **how: Any) -> list[Row]:
        return (await self.figures.report(Query(since_s, until_s, **how))).rows

    async def total(self, since_s: float | None = None, until_s: float | None = None, **how: Any) -> Row:
        return total_of(await self.rows(since_s, until_s, **how))


def call(clock: FakeClock, name: str = "one", **fields: Any) -> Attempt:
    return Attempt(
        id=name,
        namespace="shop",
        caller="web",
        upstream="north",
        model="gpt-image-2",
        images=1,
        estimate_microusd=90_000,
        start_time_s=clock.now_s(),
        quality="high",
        **fields,
    )


def settled(attempt: Attempt, microusd: int = 53_000) -> Attempt:
    return replace(attempt, outcome=AttemptOutcome.SETTLED, cost_microusd=microusd)


def before(clock: FakeClock, outcome: AttemptOutcome, microusd: int, calls: int = 1) -> CallSums:
    return CallSums(int(clock.now_s()), "shop", "web", "gpt-image-2", "high", outcome, calls, microusd, microusd)


@asynccontextmanager
async def connected(url: str, timeout_s: float = 5.0) -> AsyncIterator[Client]:
    client = connect(url, timeout_s=timeout_s, connect_timeout_s=5.0)
    try:
        yield client
    finally:
        await disconnect(client)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Client]:
    async with connected(redis_url) as client:
        yield client


@pytest.fixture(params=["redis", "cluster", "here"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[FigureStore]:
    if request.param == "here":
        yield LocalFigures()
        return
    server: ValkeyServer | Cluster = request.getfixturevalue("valkey_server" if request.param == "redis" else "cluster")
    async with connected(server.url) as client:
        yield RedisFigures(client=client, prefix=next(PREFIXES), timeout_s=5.0)


@pytest.fixture
def shared(client: Client) -> RedisFigures:
    return RedisFigures(client=client, prefix=next(PREFIXES), timeout_s=5.0)


class TestStore:
    async def test_what_is_told_is_read_and_told_again_is_the_same(self, store: FigureStore) -> None:
        minute, hour = Bucket(MINUTE_S, 120), Bucket(HOUR_S, 0)
        first = await store.tell({minute: {"one": "1", "two": "2"}, hour: {"one": "3"}})
        again = await store.tell({minute: {"one": "1", "two": "5"}})
        assert first == again
        assert await store.read([hour, minute]) == [{"one": "3"}, {"one": "1", "two": "5"}]
        assert (await store.buckets(MINUTE_S), await store.buckets(HOUR_S)) == ([minute], [hour])

    async def test_more_cells_than_one_script_takes_are_told(self, store: FigureStore) -> None:
        cells = {Bucket(HOUR_S, hour * HOUR_S): {str(n): str(n) for n in range(300)} for hour in range(25)}
        await store.tell(cells)
        assert await store.buckets(HOUR_S) == [*cells]
        assert await store.read([*cells]) == [*cells.values()]

    async def test_what_is_dropped_is_gone_and_the_rest_stays(self, store: FigureStore) -> None:
        old, new = Bucket(HOUR_S, 0), Bucket(HOUR_S, HOUR_S)
        await store.tell({old: {"one": "1"}, new: {"one": "2"}})
        await store.drop([old])
        assert await store.buckets(HOUR_S) == [new]
        assert await store.read([old, new]) == [{}, {"one": "2"}]

    async def test_an_owners_cells_are_forgotten_and_no_others(self, store: FigureStore) -> None:
        hour = Bucket(HOUR_S, 0)
        ours, theirs = cell_name("calls:1", HIT), cell_name("calls:12", HIT)
        await store.tell({hour: {ours: "1", theirs: "2"}})
        await store.forget("calls:1", [hour, Bucket(HOUR_S, HOUR_S)])
        assert await store.read([hour]) == [{theirs: "2"}]

    async def test_who_tells_nothing_learns_whether_the_store_is_the_same(self, store: FigureStore) -> None:
        assert await store.tell({}) == await store.tell({})


class TestTelling:
    async def test_every_replica_tells_the_figures_of_all(
        self, store: FigureStore, tmp_path: Path, clock: FakeClock
    ) -> None:
        one, other = Replica(store, tmp_path, clock), Replica(store, tmp_path, clock, name="1" * 16)
        one.hit(3)
        other.hit(2)
        await other.figures.flush()
        [row] = await one.rows()
        assert (row.namespace, row.outcome, row.tier) == ("shop", Outcome.HIT, TierName.MEMORY)
        assert (row.requests, row.image_bytes, row.saved_microusd, row.would_cost_microusd) == (5, 50, 265_000, 265_000)
        assert row.seconds == pytest.approx(0.01)
        assert row.latency_counts[:4] == [0, 0, 5, 0]

    async def test_what_is_told_twice_is_counted_once(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        one.hit(3)
        await one.figures.flush()
        await one.figures._tidy()  # tells what is recent once more
        assert (await one.total()).requests == 3

    async def test_a_write_whose_answer_is_lost_is_counted_once(
        self, valkey_server: ValkeyServer, tmp_path: Path, clock: FakeClock
    ) -> None:
        proxied = TcpProxy("127.0.0.1", valkey_server.port)
        async with proxied as proxy, connected(f"redis://127.0.0.1:{proxy.port}") as client:
            one = Replica(RedisFigures(client=client, prefix=next(PREFIXES), timeout_s=5.0), tmp_path, clock)
            one.hit()
            await one.figures.flush()
            proxy.cut_after(1)
            one.hit()
            with pytest.raises(AccountsUnavailableError):
                await one.figures.flush()
            proxy.resume()
            one.hit()
            assert (await one.total()).requests == 3

    async def test_what_nobody_hears_is_told_when_somebody_does(
        self, own_valkey: Callable[[], ValkeyServer], tmp_path: Path, clock: FakeClock
    ) -> None:
        server = own_valkey()
        async with connected(server.url) as client:
            one = Replica(RedisFigures(client=client, prefix="", timeout_s=5.0), tmp_path, clock)
            one.hit()
            await one.figures.flush()
            server.kill()
            one.hit()
            with pytest.raises(AccountsUnavailableError):
                await one.figures.flush()
            with pytest.raises(AccountsUnavailableError):
                await one.rows()
            server.start()
            assert (await one.total()).requests == 2

    async def test_what_nobody_hears_for_hours_is_packed_and_told_when_somebody_does(
        self, own_valkey: Callable[[], ValkeyServer], tmp_path: Path, clock: FakeClock
    ) -> None:
        server = own_valkey()
        async with connected(server.url) as client:
            one = Replica(RedisFigures(client=client, prefix="", timeout_s=5.0), tmp_path, clock)
            one.hit()
            await one.figures.flush()
            server.kill()
            for _ in range(120):
                one.hit()
                clock.advance(MINUTE_S)
                one.figures._take()
                await one.figures._tidy()
            assert len(one.figures._answers._open) < 12
            server.start()
            assert (await one.total()).requests == 121
            assert [*one.figures._answers.untold()] == []
            minutes = await one.rows(span=StatsSpan.MINUTE, by=[])
            assert [row.requests for row in minutes] == [2] + [1] * 119

    async def test_what_was_packed_untold_and_changes_is_told_with_what_was_there(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        late = replace(call(clock, "late"), caller="app")
        one.figures.sent(call(clock))
        one.figures.sent(late)
        clock.advance(2 * HOUR_S)
        await one.figures._tidy()
        one.figures.ended(settled(late))
        total = await one.total()
        assert (total.open_calls, total.settled_calls) == (1, 1)

    async def test_what_changes_while_it_is_told_from_a_pack_is_told_as_it_stands(
        self, tmp_path: Path, clock: FakeClock
    ) -> None:
        store, attempt = LocalFigures(), call(clock)
        one = Replica(store, tmp_path, clock)
        one.figures.sent(attempt)
        clock.advance(2 * HOUR_S)
        await one.figures._tidy()
        for cells in one.figures._calls.untold():
            if not store._cells:
                one.figures.ended(settled(attempt))
                await one.figures._tidy()
            await store.tell(cells)
        total = await Replica(store, tmp_path, clock, name="1" * 16).total()
        assert (total.open_calls, total.spent_microusd) == (0, 53_000)

    async def test_a_redis_that_comes_back_empty_is_told_everything(
        self, own_valkey: Callable[[], ValkeyServer], tmp_path: Path, clock: FakeClock
    ) -> None:
        server = own_valkey()
        async with connected(server.url) as client:
            one = Replica(RedisFigures(client=client, prefix=""), tmp_path, clock)
            await one.figures.start(Calls(before(clock, AttemptOutcome.SETTLED, 7)))
            one.hit(3)
            await one.figures.flush()
            clock.advance(2 * HOUR_S)  # so that the first hits are packed
            await one.figures.flush()
            await one.figures._tidy()
            server.execute("FLUSHALL")
            one.hit()
            total = await one.total()
            assert (total.requests, total.spent_microusd) == (4, 7)
            assert (await one.total(span=StatsSpan.MINUTE)).requests == 4
            await one.figures.aclose()

    async def test_what_was_answered_in_a_minute_counts_in_it(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        start_s = int(clock.now_s())
        one.hit()
        clock.advance(60)
        one.figures._take()  # the beat: it comes at full seconds, and what was counted until then is the minute's
        one.hit(2)
        rows = await one.rows(span=StatsSpan.MINUTE, by=[])
        assert [(row.start_s, row.requests) for row in rows] == [(start_s, 1), (start_s + 60, 2)]

    async def test_the_beat_comes_at_full_seconds_and_halves(self, tmp_path: Path, clock: FakeClock) -> None:
        clock.advance(0.2)
        one = Replica(LocalFigures(), tmp_path, clock)
        await one.figures.start(Calls())
        await until(lambda: clock.sleepers == 3)
        one.hit()
        clock.advance(0.29)
        await asyncio.sleep(0)
        assert one.figures._taken_s == pytest.approx(clock.now_s() - 0.29)
        clock.advance(0.01)
        await until(lambda: one.figures._taken_s == clock.now_s())
        await one.figures.aclose()

    async def test_a_clock_that_is_set_back_loses_nothing(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        one.hit()
        await one.figures.flush()
        clock.advance(3 * HOUR_S)
        await one.figures.flush()
        await one.figures._tidy()
        clock._wall_s -= 3 * HOUR_S
        await one.figures.flush()
        one.hit()
        assert (await one.total()).requests == 2

    async def test_stopping_tells_the_last_of_it(self, store: FigureStore, tmp_path: Path, clock: FakeClock) -> None:
        one = Replica(store, tmp_path, clock)
        await one.figures.start(Calls())
        one.hit(4)
        await one.figures.aclose()
        assert (await Replica(store, tmp_path, clock).total()).requests == 4

    async def test_callers_models_and_qualities_beyond_what_is_told_apart_are_other(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        for caller in ("a", "b", "c", "d"):
            one.hit(caller=caller)
        one.hit(model="whatever anybody asks for", caller="a")
        by_caller = await one.rows(by=[StatsField.CALLER])
        assert [(row.caller, row.requests) for row in by_caller] == [("a", 2), ("b", 1), ("other", 2)]
        by_model = await one.rows(by=[StatsField.MODEL])
        assert [(row.model, row.requests) for row in by_model] == [("gpt-image-2", 4), ("other", 1)]
        one.hit(quality="as an import said", caller="a")
        by_quality = await one.rows(by=[StatsField.QUALITY])
        assert [(row.quality, row.requests) for row in by_quality] == [("high", 5), ("other", 1)]


class TestCalls:
    async def test_a_call_is_told_open_before_it_is_sent(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one, other = Replica(shared, tmp_path, clock), Replica(shared, tmp_path, clock, name="1" * 16)
        await one.figures.start(Calls())
        told = one.figures.sent(call(clock))
        assert told is not None
        await told
        [row] = await other.rows()
        assert (row.outcome, row.tier) == (Outcome.MISS, TierName.UPSTREAM)
        assert (row.open_calls, row.open_microusd, row.spent_microusd) == (1, 90_000, 0)
        one.figures.ended(settled(call(clock)))
        total = await one.total()
        assert (total.open_calls, total.open_microusd, total.settled_calls, total.spent_microusd) == (0, 0, 1, 53_000)
        await one.figures.aclose()

    async def test_how_a_call_ended_is_told_without_anybody_asking(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one, other = Replica(shared, tmp_path, clock), Replica(shared, tmp_path, clock, name="1" * 16)
        await one.figures.start(Calls())
        told = one.figures.sent(call(clock))
        assert told is not None
        await told
        one.figures.ended(settled(call(clock)))
        clock.advance(0.02)  # the rest after a write

        async def is_told() -> bool:
            return (await other.total()).spent_microusd == 53_000

        await until(is_told)
        await one.figures.aclose()

    async def test_calls_that_come_together_are_told_together(self, tmp_path: Path, clock: FakeClock) -> None:
        class Counting(LocalFigures):
            tells = 0

            async def tell(self, cells: Any) -> str:
                self.tells += 1
                await asyncio.sleep(0)
                return await super().tell(cells)

        store = Counting()
        one = Replica(store, tmp_path, clock)
        await one.figures.start(Calls())
        before_that = store.tells
        told = [one.figures.sent(call(clock, str(n))) for n in range(50)]
        await asyncio.gather(*filter(None, told))
        assert store.tells == before_that + 1
        await one.figures.aclose()

    async def test_a_bug_in_telling_keeps_no_later_call_waiting(self, tmp_path: Path, clock: FakeClock) -> None:
        class Odd(LocalFigures):
            odd = False

            async def tell(self, cells: Any) -> str:
                if self.odd:
                    raise RuntimeError("a bug")
                return await super().tell(cells)

        store = Odd()
        one = Replica(store, tmp_path, clock)
        await one.figures.start(Calls())
        store.odd = True
        async with asyncio.timeout(5):
            for name in ("a", "b"):
                told = one.figures.sent(call(clock, name))
                assert told is not None
                await told
        store.odd = False
        assert (await one.total()).open_calls == 2
        await one.figures.aclose()

    async def test_what_the_store_no_more_keeps_by_the_time_it_fails_is_forgotten(
        self, tmp_path: Path, clock: FakeClock
    ) -> None:
        class Away(LocalFigures):
            is_away = True
            asked = asyncio.Event()
            fails = asyncio.Event()

            async def tell(self, cells: Any) -> str:
                if cells and self.is_away:
                    self.asked.set()
                    await self.fails.wait()
                    raise AccountsUnavailableError("away")
                return await super().tell(cells)

        store = Away()
        one = Replica(store, tmp_path, clock)
        one.hit()
        telling = asyncio.create_task(one.figures.flush())
        await store.asked.wait()
        clock.advance(KEPT.minutes_for_s + 2 * HOUR_S)
        await one.figures._tidy()
        store.fails.set()
        with pytest.raises(AccountsUnavailableError):
            await telling
        store.is_away = False
        assert (await one.total()).requests == 1
        await one.figures.aclose()

    async def test_a_caller_that_goes_away_does_not_keep_others_from_hearing(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        await one.figures.start(Calls())
        gone, stays = one.figures.sent(call(clock, "a")), one.figures.sent(call(clock, "b"))
        assert isinstance(gone, asyncio.Future)
        assert stays is not None
        gone.cancel()
        await stays
        await one.figures.aclose()

    async def test_while_nobody_hears_calls_do_not_wait(
        self, own_valkey: Callable[[], ValkeyServer], tmp_path: Path, clock: FakeClock
    ) -> None:
        server = own_valkey()
        async with connected(server.url) as client:
            one = Replica(RedisFigures(client=client, prefix="", timeout_s=5.0), tmp_path, clock)
            await one.figures.start(Calls())
            server.kill()
            told = one.figures.sent(call(clock, "a"))
            assert told is not None
            await told  # in vain, and not for long
            assert one.figures.sent(call(clock, "b")) is None
            server.start()
            assert (await one.total()).open_calls == 2
            await one.figures.aclose()

    async def test_what_a_dead_replica_had_sent_is_open_until_it_is_back(
        self, store: FigureStore, tmp_path: Path, clock: FakeClock
    ) -> None:
        dead, other = Replica(store, tmp_path, clock), Replica(store, tmp_path, clock, name="1" * 16)
        for name in ("a", "b"):
            dead.figures.sent(call(clock, name))
        dead.figures.ended(settled(call(clock, "b")))
        await dead.figures.flush()
        total = await other.total()
        assert (total.open_calls, total.spent_microusd) == (1, 53_000)
        # Its ledger knows better than what it told: both calls, and one of them to another caller.
        again = Replica(store, tmp_path, clock)
        lost = replace(before(clock, AttemptOutcome.UNKNOWN, 90_000), caller="app")
        await again.figures.start(Calls(before(clock, AttemptOutcome.SETTLED, 53_000), lost))
        total = await other.total()
        assert (total.open_calls, total.open_microusd) == (0, 0)
        assert (total.unknown_calls, total.unknown_microusd) == (1, 90_000)
        assert (total.settled_calls, total.spent_microusd) == (1, 53_000)
        assert (await other.total(span=StatsSpan.MINUTE)).spent_microusd == 53_000
        await again.figures.aclose()

    async def test_a_call_that_was_never_sent_costs_nothing(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        one.figures.sent(call(clock))
        one.figures.ended(call(clock, outcome=AttemptOutcome.NOT_BILLED))
        total = await one.total()
        assert (total.open_calls, total.open_microusd, total.settled_calls, total.unknown_calls) == (0, 0, 0, 0)


class TestReading:
    async def tell(self, store: FigureStore, start_s: int, requests: int, owner: str = "life:x") -> None:
        cell = {cell_name(owner, HIT): Figures(requests=requests).encoded()}
        await store.tell({Bucket.at(span_s, start_s): cell for span_s in (MINUTE_S, HOUR_S)})

    async def test_the_ends_of_a_span_of_time_are_exact_to_the_minute(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        start_s = int(clock.now_s())
        for _ in range(150):
            one.hit()
            clock.advance(60)
            await one.figures.flush()
        assert (await one.total(start_s + 1_800, start_s + 7_800)).requests == 100
        assert (await one.total(start_s + 1_830, start_s + 7_830)).requests == 101
        assert (await one.total(start_s, start_s + 3_600)).requests == 60
        assert (await one.total(start_s + 60, start_s + 120)).requests == 1
        assert (await one.total(until_s=start_s)).requests == 0
        by_hours = await one.rows(start_s + 1_800, span=StatsSpan.HOUR, by=[])
        assert [row.requests for row in by_hours] == [30, 60, 30]

    async def test_an_outcome_that_only_a_newer_release_knows_is_passed_over_and_lost_to_nobody(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        one.hit(3)
        start_s = int(clock.now_s())
        newer = cell_name("life:newer", HIT).replace(f'"{Outcome.HIT}"', '"foreseen"')
        for span_s in (MINUTE_S, HOUR_S):
            await shared.tell({Bucket.at(span_s, start_s): {newer: Figures(requests=7).encoded()}})
        assert (await one.total(start_s - HOUR_S)).requests == 3
        clock.advance(40 * DAY_S)
        await RollOff(store=shared, archive=DirectoryArchive(tmp_path), clock=clock, kept=KEPT).run()
        assert (await one.total(start_s - HOUR_S)).requests == 3
        archived = unpack(day_of(start_s), await DirectoryArchive(tmp_path).read(day_of(start_s)))
        assert newer in archived[Bucket.at(HOUR_S, start_s).start_s]

    async def test_where_minutes_are_gone_an_hour_counts_that_is_touched(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        long_ago_s = int(clock.now_s()) - 4 * DAY_S
        await self.tell(shared, long_ago_s, 5)
        await RollOff(store=shared, archive=DirectoryArchive(tmp_path), clock=clock, kept=KEPT).run()
        assert await shared.buckets(MINUTE_S) == []
        assert (await one.total(long_ago_s + 1_800)).requests == 5
        assert (await one.total(long_ago_s + 3_600)).requests == 0
        assert (await one.total(long_ago_s, span=StatsSpan.MINUTE)).requests == 0

    async def test_other_namespaces_are_left_out(self, shared: RedisFigures, tmp_path: Path, clock: FakeClock) -> None:
        one = Replica(shared, tmp_path, clock)
        one.hit(3)
        assert (await one.total(namespaces={"shop"})).requests == 3
        assert (await one.total(namespaces={"other"})).requests == 0

    async def test_a_cell_that_nobody_can_have_told_is_left_out(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        one = Replica(shared, tmp_path, clock)
        one.hit(3)
        hour = Bucket.at(HOUR_S, clock.now_s())
        await shared.tell({hour: {"not a name": "1", cell_name("x", HIT): "not a cell"}})
        assert (await one.total()).requests == 3

    async def test_what_is_recent_is_told_while_the_archive_is_away(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock
    ) -> None:
        class Away(DirectoryArchive):
            async def days(self) -> list[str]:
                raise AccountsUnavailableError("away")

        one = Replica(shared, tmp_path, clock)
        one.hit(3)
        reader = FigureReader(store=shared, archive=Away(tmp_path), clock=clock, kept=KEPT)
        await one.figures.flush()
        assert total_of((await reader.report(Query(clock.now_s() - DAY_S))).rows).requests == 3
        with pytest.raises(AccountsUnavailableError):
            await reader.report(Query(clock.now_s() - 2 * DAY_S))

    async def test_more_rows_than_anybody_reads_are_refused_with_what_to_do(
        self, shared: RedisFigures, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cacheserver.accounting.reading._MOST_ROWS", 2)
        one = Replica(shared, tmp_path, clock)
        for _ in range(4):
            one.hit()
            await one.figures.flush()  # what the beat takes is the minute's that it began in: three of them
            clock.advance(MINUTE_S)
        assert len(await one.rows(span=StatsSpan.HOUR)) == 1
        with pytest.raises(InvalidRequestError, match=r"span: makes more than 2 rows: ask for less time"):
            await one.rows(span=StatsSpan.MINUTE)


class TestRollOff:
    @pytest.fixture
    def archive(self, tmp_path: Path) -> DirectoryArchive:
        return DirectoryArchive(tmp_path)

    async def old_hours(self, store: FigureStore, clock: FakeClock) -> int:
        """Three hours that are no longer kept, of two days, and one that is; when the first begins."""
        start_s = KEPT.since_s(HOUR_S, clock.now_s()) - DAY_S - 2 * HOUR_S
        for hour, requests in ((0, 1), (1, 10), (2, 100), (26, 1_000)):
            cell = {cell_name("life:x", HIT): Figures(requests=requests).encoded()}
            await store.tell({Bucket(HOUR_S, start_s + hour * HOUR_S): cell})
        return start_s

    async def test_old_hours_go_into_a_file_per_day_and_are_read_from_there(
        self, store: FigureStore, archive: DirectoryArchive, tmp_path: Path, clock: FakeClock
    ) -> None:
        start_s = await self.old_hours(store, clock)
        roll_off = RollOff(store=store, archive=archive, clock=clock, kept=KEPT)
        one = Replica(store, tmp_path, clock)
        before_that = await one.total()
        await roll_off.run()
        await roll_off.run()
        assert await store.buckets(HOUR_S) == [Bucket(HOUR_S, start_s + 26 * HOUR_S)]
        assert await archive.days() == [day_of(start_s), day_of(start_s + 2 * HOUR_S)]
        assert await one.total() == before_that
        assert (await one.total(start_s + HOUR_S, start_s + 3 * HOUR_S)).requests == 110
        rows = await one.rows(span=StatsSpan.DAY, by=[])
        assert [row.requests for row in rows] == [11, 100, 1_000]

    async def test_one_that_dies_half_way_counts_nothing_twice(
        self, store: FigureStore, archive: DirectoryArchive, tmp_path: Path, clock: FakeClock
    ) -> None:
        start_s = await self.old_hours(store, clock)
        roll_off = RollOff(store=store, archive=archive, clock=clock, kept=KEPT)
        one = Replica(store, tmp_path, clock)
        await roll_off.copy(day_of(start_s), [Bucket(HOUR_S, start_s), Bucket(HOUR_S, start_s + HOUR_S)])
        assert (await one.total()).requests == 1_111
        await store.drop([Bucket(HOUR_S, start_s)])
        assert (await one.total()).requests == 1_111
        await roll_off.run()
        assert (await one.total()).requests == 1_111

    async def test_two_at_once_lose_nothing(
        self, store: FigureStore, archive: DirectoryArchive, tmp_path: Path, clock: FakeClock
    ) -> None:
        await self.old_hours(store, clock)
        roll_offs = [RollOff(store=store, archive=archive, clock=clock, kept=KEPT) for _ in range(2)]
        await asyncio.gather(*(each.run() for each in roll_offs))
        assert (await Replica(store, tmp_path, clock).total()).requests == 1_111

    async def test_a_damaged_file_is_left_alone_and_what_belongs_there_stays(
        self, store: FigureStore, archive: DirectoryArchive, tmp_path: Path, clock: FakeClock
    ) -> None:
        start_s = await self.old_hours(store, clock)
        await archive.write(day_of(start_s), b"no file of ours")
        await RollOff(store=store, archive=archive, clock=clock, kept=KEPT).run()
        assert len(await store.buckets(HOUR_S)) == 3  # of the other day, one is in its file
        assert await archive.days() == [day_of(start_s), day_of(start_s + 2 * HOUR_S)]
        assert await archive.read(day_of(start_s)) == b"no file of ours"
        with pytest.raises(AccountsUnavailableError, match=rf"old figures of {day_of(start_s)} is damaged"):
            await Replica(store, tmp_path, clock).rows()

    @pytest.mark.parametrize("data", [b"", b"\x1f\x8b", pack({0: {"a": "1"}})[:-12], b"[]"], ids=repr)
    def test_what_is_no_file_of_ours_is_not_read(self, data: bytes) -> None:
        with pytest.raises(AccountsUnavailableError):
            unpack("2026-05-01", data)

    async def test_other_files_are_no_days(self, archive: DirectoryArchive, tmp_path: Path) -> None:
        assert await DirectoryArchive(tmp_path / "none").days() == []
        for name in ("2026-05-01.json.gz", "2026-13-41.json.gz", "2026-05-02.json.gz.new", "notes.txt"):
            (tmp_path / name).touch()
        assert await archive.days() == ["2026-05-01"]
        assert await archive.read("2026-05-02") is None


class TestWithoutRedis:
    async def test_a_restart_keeps_the_figures(self, tmp_path: Path, clock: FakeClock) -> None:
        first = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await first.figures.start(Calls())
        first.hit(3)
        first.figures.sent(call(clock))
        first.figures.ended(settled(call(clock)))
        await first.figures.aclose()
        second = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await second.figures.start(Calls(before(clock, AttemptOutcome.SETTLED, 53_000)))
        second.hit()
        total = await second.total()
        assert (total.requests, total.spent_microusd, total.settled_calls) == (4, 53_000, 1)
        await second.figures.aclose()

    async def test_what_counts_is_on_the_disk_within_a_minute(self, tmp_path: Path, clock: FakeClock) -> None:
        first = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        first.hit(3)
        await first.figures.flush()
        await first.figures._tidy()
        second: Sequence[Row] = await Replica(LocalFigures(), tmp_path, clock).rows()
        assert total_of(second).requests == 3

    async def test_calls_are_counted_once_though_other_callers_are_told_apart_than_before(
        self, tmp_path: Path, clock: FakeClock
    ) -> None:
        first = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await first.figures.start(Calls())
        for caller in ("a", "b", "c"):  # the third is counted as "other"
            attempt = replace(call(clock, caller), caller=caller)
            first.figures.sent(attempt)
            first.figures.ended(settled(attempt, 10))
        await first.figures.aclose()
        clock.advance(3 * HOUR_S)
        in_ledger = replace(before(clock, AttemptOutcome.SETTLED, 10), start_s=int(clock.now_s()) - 3 * HOUR_S)
        second = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await second.figures.start(Calls(*(replace(in_ledger, caller=caller) for caller in ("c", "b", "a"))))
        total = await second.total()
        assert (total.settled_calls, total.spent_microusd) == (3, 30)
        assert {row.caller for row in await second.rows(by=[StatsField.CALLER])} == {"c", "b", "other"}
        await second.figures.aclose()

    async def test_a_call_that_was_open_when_it_died_is_what_the_ledger_says(
        self, tmp_path: Path, clock: FakeClock
    ) -> None:
        first = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await first.figures.start(Calls())
        first.hit(3)
        first.figures.sent(call(clock))
        await first.figures.flush()
        await first.figures._tidy()  # and then it is killed, just after the call turned out not to be billed
        second = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await second.figures.start(Calls())
        total = await second.total()
        assert (total.requests, total.open_calls, total.open_microusd) == (3, 0, 0)
        await second.figures.aclose()
        await first.figures.aclose()

    async def test_what_an_archive_that_is_away_still_says_is_mended_once_it_is_back(
        self, tmp_path: Path, clock: FakeClock
    ) -> None:
        first = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await first.figures.start(Calls())
        first.figures.sent(call(clock))
        await first.figures.flush()
        await first.figures._tidy()
        file = tmp_path / f"{day_of(clock.now_s())}.json.gz"
        intact = file.read_bytes()
        file.write_bytes(b"no file of ours")
        second = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await second.figures.start(Calls())
        file.write_bytes(intact)
        await second.figures._tidy()
        assert (await second.total()).open_calls == 0
        await second.figures.aclose()
        await first.figures.aclose()

    async def test_an_hour_of_which_a_part_is_wanted_has_what_an_earlier_life_counted(
        self, tmp_path: Path, clock: FakeClock
    ) -> None:
        start_s = clock.now_s()
        first = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await first.figures.start(Calls())
        first.hit(3)
        await first.figures.aclose()
        clock.advance(10 * MINUTE_S)
        second = Replica(LocalFigures(), tmp_path, clock, keeps_copy=True)
        await second.figures.start(Calls())
        second.hit(10)
        await second.figures._tidy()
        await second.figures.flush()
        await second.figures._tidy()  # the archive has these ten, too
        assert (await second.total(start_s + MINUTE_S)).requests == 13
        assert (await second.total(start_s + 20 * MINUTE_S)).requests == 3  # of an earlier life only the hour is known
        await second.figures.aclose()
