"""What a replica that is gone for good had yet to bring to S3 another one brings: before a real Redis and S3."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from cacheserver import orphans as orphans_module
from cacheserver.app import core
from cacheserver.control.replicas import Replicas
from cacheserver.control.undrained import RedisMarks
from cacheserver.epochs import Epochs, Tombstone
from cacheserver.errors import TierError
from cacheserver.interfaces import Tier
from cacheserver.journal import Journal
from cacheserver.model import CachedImage, CacheKey, CachePolicy, Served, TierName
from cacheserver.orphans import Orphans
from cacheserver.paying import UnknownPolicy
from cacheserver.tasks import end
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import Client, connect, disconnect
from cacheserver.undrained import Mark, Undrained
from tests.fakes import FakeClock
from tests.house import MODEL, FaultyTier, House, open_s3
from tests.provider import FakeUpstream, OpenAIStandIn
from tests.running import ask, calling, environment, running
from tests.servers import S3Server, ValkeyServer
from tests.tier_contract import make_entry, make_key
from tests.waiting import until

PREFIXES = (f"orphans-{n}:" for n in itertools.count())
DEAD_S = 60
TTL_S = 3_600.0


class Replica:
    """A service of its own on the Redis and the S3 of others."""

    def __init__(self, house: House, orphans: Orphans, undrained: Undrained, replicas: Replicas, home: Path) -> None:
        self.house = house
        self.orphans = orphans
        self.undrained = undrained
        self.replicas = replicas
        self.home = home
        self.journal: Journal | None = None

    @property
    def is_s3_away(self) -> bool:
        return self.house.s3.is_down

    @is_s3_away.setter
    def is_s3_away(self, is_away: bool) -> None:
        self.house.s3.is_down = is_away

    @property
    def lost(self) -> float:
        return self.house.registry.get_sample_value("cacheserver_lost_total") or 0.0

    async def answer_while_s3_is_away(self, *prompts: str, **terms: object) -> list[Served]:
        self.is_s3_away = True
        served = [await self.house.get(prompt, **terms) for prompt in prompts]
        await self.house.settle()
        return served

    async def answer_while_s3_goes_away(self) -> Served:
        """It has said that it has no such picture, and takes none."""
        calls = self.house.upstream.calls
        self.house.upstream.hold()
        asking = asyncio.create_task(self.house.get())
        await self.house.upstream.arrived(calls + 1)
        self.is_s3_away = True
        self.house.upstream.release()
        return await asking

    async def end(self) -> None:
        """The process is gone, whatever it had in hand."""
        keeper = self.house.keeper
        await end([task for task in [keeper._offering_again] if task is not None])
        await self.undrained.aclose(5)
        if self.journal is not None:
            await self.journal.aclose()


class Service:
    """Replicas on one Redis and one S3."""

    def __init__(self, client: Client, s3_server: S3Server, directory: Path, stack: AsyncExitStack) -> None:
        self.clock = FakeClock()
        self.prefix = next(PREFIXES)
        self.client = client
        self.upstream = FakeUpstream("fake", [MODEL])
        self._s3_server = s3_server
        self._folder = f"test-{uuid.uuid4().hex}/"
        self._directory = directory
        self._stack = stack
        self._numbers = itertools.count(1)

    async def begin(
        self, *, durability: str = "journal+redis", after: Replica | None = None, client: Client | None = None
    ) -> Replica:
        """A replica, with a data directory of its own or that of an earlier life."""
        home = after.home if after else self._directory / f"replica-{next(self._numbers)}"
        client = client or self.client
        epochs, undrained = Epochs(), Undrained(clock=self.clock)
        replicas = await Replicas.open(home, clock=self.clock, client=client, prefix=self.prefix)
        marks = RedisMarks(
            client=client,
            prefix=self.prefix,
            replica_id=replicas.id,
            live_name=replicas.name_in_redis,
            timeout_s=5.0,
        )
        undrained.share(marks)
        house = House(
            clock=self.clock,
            redis=FaultyTier(self._redis(client, epochs, undrained), TierName.REDIS),
            s3=FaultyTier(self._s3(epochs), TierName.S3),
            epochs=epochs,
        )
        house.upstream = self.upstream
        journal = None
        if durability != "write-through":
            journal = await Journal.open(home / "journal", clock=self.clock, max_bytes=10_000_000)
        unknown = UnknownPolicy(budget_microusd_per_hour=1_000_000_000)
        copies = durability == "journal+redis"
        house.restart(journal=journal, copies=copies, unknown=unknown, undrained=undrained)
        orphans = Orphans(
            marks=marks,
            undrained=undrained,
            keeper=house.keeper,
            tiers=[house.redis, house.s3],
            epochs=epochs,
            books=house.books,
            clock=self.clock,
        )
        await replicas.beat()
        house.keeper.restore()
        replica = Replica(house, orphans, undrained, replicas, home)
        replica.journal = journal
        self._stack.push_async_callback(replica.end)
        return replica

    def _redis(self, client: Client, epochs: Epochs, undrained: Undrained) -> Tier:
        rng = Random(1)  # noqa: S311 - spreads expiry
        return RedisTier(
            client,
            clock=self.clock,
            rng=rng,
            prefix=self.prefix,
            ttl_s=TTL_S,
            ttl_jitter=0.0,
            epochs=epochs,
            is_alone=undrained.lies_in,
        )

    def _s3(self, epochs: Epochs) -> Tier:
        s3 = open_s3(self._s3_server, clock=self.clock, prefix=self._folder, epochs=epochs)
        self._stack.push_async_callback(s3.aclose)
        return s3

    async def lose(self, replica: Replica) -> None:
        """A machine is gone, and its disk with it; others have missed its signs of life."""
        await replica.end()
        await asyncio.to_thread(shutil.rmtree, replica.home)
        await self.client.zrem(replica.replicas.name_in_redis, replica.replicas.id)

    async def sweep(self, *replicas: Replica) -> None:
        """Have them look for orphans until they take for dead who is, and bring home what they find."""
        for _ in range(2):
            await asyncio.gather(*(each.orphans.sweep() for each in replicas))
            self.clock.advance(DEAD_S)
        await asyncio.gather(*(each.orphans.sweep() for each in replicas))
        for each in replicas:
            await self.home(each)

    async def home(self, replica: Replica) -> None:
        """Wait until the last tier has everything, time passing."""

        async def is_home() -> bool:
            self.clock.advance(1)
            await asyncio.sleep(0)
            return not replica.house.keeper._held

        await until(is_home)
        await replica.house.settle()
        await replica.undrained._tasks.idle()

    async def marks(self) -> set[str]:
        """Every mark there is, whosever."""
        names = [name async for name in self.client.scan_iter(match=f"{self.prefix}{{undrained}}:*")]
        marked = [name for name in names if not name.endswith(b":replicas")]
        return {text.decode() for name in marked for text in await self.client.smembers(name)}


@pytest.fixture
async def client(valkey_server: ValkeyServer) -> AsyncIterator[Client]:
    client = connect(valkey_server.url, timeout_s=5.0, connect_timeout_s=5.0)
    yield client
    await disconnect(client)


@pytest.fixture
async def service(client: Client, s3_server: S3Server, tmp_path: Path) -> AsyncIterator[Service]:
    async with AsyncExitStack() as stack:
        yield Service(client, s3_server, tmp_path, stack)


async def stored(replica: Replica, key: CacheKey) -> str | None:
    """Which picture S3 has under a key."""
    entry = await replica.house.s3.get(key)
    return None if entry is None else hashlib.sha256(entry.image.data).hexdigest()


async def entry_of(replica: Replica, prompt: str, data: bytes = b"\x89PNG another") -> CachedImage:
    """A picture under the key of a prompt where nothing lies yet."""
    _, identity = replica.house.identity(prompt)
    entry = make_entry(identity.key, data, create_time_s=replica.house.clock.now_s(), tags=())
    return replace(entry, namespace="default", prompt_digest=identity.prompt_digest)


class TestLost:
    async def test_all_that_was_answered_with_is_in_s3_though_its_replica_and_disk_are_gone(
        self, service: Service
    ) -> None:
        one, other = await service.begin(), await service.begin()
        prompts = [f"fox {number}" for number in range(12)]
        served = await one.answer_while_s3_is_away(*prompts)
        assert one.house.books.snapshot(None).unsaved == 0
        await service.lose(one)
        await service.sweep(other)
        for each in served:
            assert await stored(other, each.entry.key) == each.entry.image.sha256
        assert (other.lost, await service.marks()) == (0, set())
        again = [await other.house.get(prompt) for prompt in prompts]
        assert [each.entry for each in again] == [each.entry for each in served]
        assert other.house.upstream.calls == len(prompts)

    async def test_what_the_last_tier_had_not_when_it_went_away_too(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.answer_while_s3_goes_away()
        await service.lose(one)
        await service.sweep(other)
        assert await stored(other, served.entry.key) == served.entry.image.sha256

    async def test_one_for_review_waits_there(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        one.is_s3_away = True
        entry = await entry_of(one, "a red fox")
        await one.house.reviews.hold(entry)
        await one.house.settle()
        await service.lose(one)
        await service.sweep(other)
        assert await stored(other, entry.key.in_review) == entry.image.sha256
        assert await stored(other, entry.key) is None

    async def test_while_s3_is_away_another_disk_has_it_as_well(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        (served,) = await one.answer_while_s3_is_away("a red fox")
        await service.lose(one)
        other.is_s3_away = True
        for _ in range(2):
            await other.orphans.sweep()
            service.clock.advance(DEAD_S)
        await other.orphans.sweep()
        assert other.journal is not None
        assert other.journal.entries == 1
        third = await service.begin()
        await service.lose(other)
        await service.sweep(third)
        assert await stored(third, served.entry.key) == served.entry.image.sha256

    async def test_many_sweepers_at_once_do_no_harm(self, service: Service) -> None:
        one = await service.begin()
        others = [await service.begin() for _ in range(3)]
        served = await one.answer_while_s3_is_away(*(f"fox {number}" for number in range(12)))
        await service.lose(one)
        await service.sweep(*others)
        for each in served:
            assert await stored(others[0], each.entry.key) == each.entry.image.sha256
            assert await stored(others[0], each.entry.key.with_variant(1)) is None
        assert sum(each.lost for each in others) == 0
        assert await service.marks() == set()

    async def test_where_another_picture_has_the_number_it_takes_the_next(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        (served,) = await one.answer_while_s3_is_away("a red fox")
        await service.lose(one)
        first = await other.house.keeper.keep(await entry_of(other, "a red fox"))
        await service.sweep(other)
        assert await stored(other, served.entry.key) == first.image.sha256
        assert await stored(other, served.entry.key.with_variant(1)) == served.entry.image.sha256

    async def test_what_replaced_another_picture_does_so(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        before = await one.house.get()
        await service.home(one)
        service.clock.advance(1)
        (after,) = await one.answer_while_s3_is_away("a red fox", cache_policy=CachePolicy.REFRESH)
        assert after.entry.key == before.entry.key
        await service.lose(one)
        await service.sweep(other)
        assert await stored(other, before.entry.key) == after.entry.image.sha256

    async def test_what_was_replaced_since_does_not_come_back(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        before = await one.house.get()
        await service.home(one)
        await one.answer_while_s3_is_away("a red fox", cache_policy=CachePolicy.REFRESH)
        await service.lose(one)
        service.clock.advance(1)
        newest = await other.house.get(cache_policy=CachePolicy.REFRESH)
        await service.home(other)
        await service.sweep(other)
        assert await stored(other, before.entry.key) == newest.entry.image.sha256
        assert (other.lost, await service.marks()) == (0, set())

    async def test_another_picture_that_comes_home_late_does_not_take_the_only_copy_with_it(
        self, service: Service
    ) -> None:
        one, other, third = [await service.begin() for _ in range(3)]
        (older,) = await one.answer_while_s3_is_away("a red fox")
        service.clock.advance(1)
        (newer,) = await other.answer_while_s3_is_away("a red fox", cache_policy=CachePolicy.REFRESH)
        await service.lose(other)
        one.is_s3_away = False
        await service.home(one)
        assert await stored(third, older.entry.key) == older.entry.image.sha256
        await service.sweep(third)
        assert await stored(third, older.entry.key) == newer.entry.image.sha256

    async def test_with_the_journal_alone_what_has_no_copy_yet_is_lost_and_counted(self, service: Service) -> None:
        one, other = await service.begin(durability="journal"), await service.begin(durability="journal")
        (copied,) = await one.answer_while_s3_is_away("a red fox")
        one.house.redis.is_down = True
        await one.answer_while_s3_is_away("a blue fox", "a green fox")
        await service.lose(one)
        await service.sweep(other)
        assert await stored(other, copied.entry.key) == copied.entry.image.sha256
        assert (other.lost, await service.marks()) == (2, set())

    async def test_a_copy_that_redis_evicted_is_counted_once(self, service: Service) -> None:
        one, others = await service.begin(), [await service.begin() for _ in range(2)]
        (served,) = await one.answer_while_s3_is_away("a red fox")
        await one.house.redis.delete(served.entry.key.stand_in)
        await service.lose(one)
        await service.sweep(*others)
        assert sum(each.lost for each in others) == 1


class TestLeftAlone:
    async def test_what_a_living_replica_has_yet_to_bring(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        (served,) = await one.answer_while_s3_is_away("a red fox")
        before = await service.marks()
        await service.sweep(other)
        assert await stored(other, served.entry.key) is None
        assert await service.marks() == before != set()
        one.is_s3_away = False
        await service.home(one)
        assert await stored(other, served.entry.key) == served.entry.image.sha256
        assert await service.marks() == set()

    async def test_what_one_has_that_was_away_for_a_moment(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        (served,) = await one.answer_while_s3_is_away("a red fox")
        await service.client.zrem(one.replicas.name_in_redis, one.replicas.id)
        await other.orphans.sweep()
        await one.replicas.beat()
        service.clock.advance(DEAD_S)
        await other.orphans.sweep()
        await service.client.zrem(one.replicas.name_in_redis, one.replicas.id)
        await other.orphans.sweep()
        await service.home(other)
        assert await stored(other, served.entry.key) is None

    async def test_what_was_purged(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        red, blue = await one.answer_while_s3_is_away("a red fox", "a blue fox")
        await service.lose(one)
        tombstone = Tombstone.of_key("default", red.entry.key)
        other.house.epochs.learn([replace(tombstone, epoch=1)])
        await service.sweep(other)
        assert await stored(other, blue.entry.key) == blue.entry.image.sha256
        other.house.epochs._by_namespace.clear()
        assert await stored(other, red.entry.key) is None
        assert (other.lost, await service.marks()) == (0, set())

    async def test_what_is_no_longer_fresh(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        one.is_s3_away = True
        entry = replace(await entry_of(one, "a red fox"), expire_time_s=service.clock.now_s() + 2 * DEAD_S)
        await one.house.keeper.keep_stand_in(entry)
        await service.lose(one)
        service.clock.advance(DEAD_S)
        await service.sweep(other)
        assert await stored(other, entry.key) is None
        assert (other.lost, await service.marks()) == (0, set())

    async def test_what_there_is_no_room_for_waits_with_its_copy(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        (served,) = await one.answer_while_s3_is_away("a red fox")
        await service.lose(one)
        assert other.journal is not None
        other.journal.max_bytes = 1
        await service.sweep(other)
        assert await stored(other, served.entry.key) is None
        other.journal.max_bytes = 10_000_000
        await service.sweep(other)
        assert await stored(other, served.entry.key) == served.entry.image.sha256


class TestMarks:
    async def test_a_replica_that_comes_back_goes_on_by_its_own_journal(self, service: Service) -> None:
        one = await service.begin()
        (served,) = await one.answer_while_s3_is_away("a red fox")
        await one.end()
        again = await service.begin(after=one)
        assert await service.marks() == set(again.undrained.texts()) != set()
        await service.home(again)
        assert await stored(again, served.entry.key) == served.entry.image.sha256
        assert await service.marks() == set()

    async def test_without_a_journal_the_next_life_finds_the_copies(self, service: Service) -> None:
        one = await service.begin(durability="write-through")
        (served,) = await one.answer_while_s3_is_away("a red fox")
        await one.end()
        again = await service.begin(durability="write-through", after=one)
        await again.orphans.sweep()
        await service.home(again)
        assert await stored(again, served.entry.key) == served.entry.image.sha256
        assert await service.marks() == set()

    async def test_nobody_is_answered_with_a_copy_that_is_not_marked(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = await service.begin()
        marking, put = asyncio.Event(), one.house.redis.put
        told = one.undrained.tell
        order: list[str] = []

        async def slow(text: str) -> bool:
            await marking.wait()
            is_told = await told(text)
            order.append("marked")
            return is_told

        async def watched(key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
            is_put = await put(key, entry, replace=replace)
            order.append("copied")
            return is_put

        monkeypatch.setattr(one.undrained, "tell", slow)
        monkeypatch.setattr(one.house.redis, "put", watched)
        one.is_s3_away = True
        kept = one.house.keeper.keep_stand_in(await entry_of(one, "a red fox"))
        await until(lambda: bool(one.house.keeper._writes))
        assert not kept.done()
        marking.set()
        await kept
        assert order == ["marked", "copied"]

    async def test_a_copy_made_behind_the_answer_has_its_picture_though_the_journal_has_it_meanwhile(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = await service.begin(durability="journal")
        marking, told = asyncio.Event(), one.undrained.tell

        async def slow(text: str) -> bool:
            await marking.wait()
            return await told(text)

        monkeypatch.setattr(one.undrained, "tell", slow)
        one.is_s3_away = True
        entry = await entry_of(one, "a red fox")
        await one.house.keeper.keep_stand_in(entry)
        await until(lambda: not any(held.has_bytes for held in one.house.keeper._held.values()))
        marking.set()
        await one.house.settle()
        assert await one.house.redis.get(entry.key.stand_in) == entry

    async def test_a_copy_that_could_not_be_marked_does_not_count_and_is_marked_later(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, other = await service.begin(), await service.begin()

        async def silent(*_: object) -> None:
            raise TierError("silent for a test")

        with monkeypatch.context() as patch:
            patch.setattr(RedisMarks, "add", silent)
            (served,) = await one.answer_while_s3_is_away("a red fox")
        assert one.house.books.snapshot(None).unsaved == 1
        await one.orphans.sweep()
        await service.lose(one)
        await service.sweep(other)
        assert await stored(other, served.entry.key) == served.entry.image.sha256

    async def test_a_redis_that_lost_all_is_told_again(self, service: Service) -> None:
        one = await service.begin()
        await one.answer_while_s3_is_away("a red fox")
        before = await service.marks()
        for name in [name async for name in service.client.scan_iter(match=f"{service.prefix}*")]:
            await service.client.delete(name)
        await one.orphans.sweep()
        assert await service.marks() == before != set()

    async def test_one_that_redis_could_not_be_told_to_remove_goes_later(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = await service.begin()
        await one.answer_while_s3_is_away("a red fox")

        async def silent(*_: object) -> bool:
            raise TierError("silent for a test")

        one.is_s3_away = False
        with monkeypatch.context() as patch:
            patch.setattr(RedisMarks, "remove_all", silent)
            await service.home(one)
        assert len(await service.marks()) == 1
        await one.orphans.sweep()
        assert (one.lost, await service.marks()) == (0, set())

    async def test_a_copy_that_nobody_else_has_stays_for_long_and_then_as_long_as_others(
        self, service: Service
    ) -> None:
        one, other = await service.begin(), await service.begin()
        key = (await one.answer_while_s3_is_away("a blue fox"))[0].entry.key
        numbered = (await other.answer_while_s3_goes_away()).entry.key

        def name(key: CacheKey) -> str:
            return f"{service.prefix}{{{key.identity_name}}}.{key.variant}"

        for slot in (key.stand_in, numbered):
            assert await service.client.ttl(name(slot)) > 7 * 86_400
        one.is_s3_away = other.is_s3_away = False
        await service.home(one)
        await service.home(other)
        for slot in (key, numbered):
            assert 0 < await service.client.ttl(name(slot)) <= TTL_S
        assert not await service.client.exists(name(key.stand_in))

    async def test_what_a_refresh_outdid_is_marked_until_the_new_one_is(self, service: Service) -> None:
        one = await service.begin()
        before = await one.house.get()
        await service.home(one)
        for _ in range(2):
            service.clock.advance(1)
            (after,) = await one.answer_while_s3_is_away("a red fox", cache_policy=CachePolicy.REFRESH)
        await one.undrained._tasks.idle()
        (text,) = await service.marks()
        mark = Mark.parse(text)
        assert (mark.slot.name, mark.sha256) == (before.entry.key.name, after.entry.image.sha256)

    def test_it_is_read_as_it_was_told(self) -> None:
        entry = replace(make_entry(tags=("spring", 'a "quoted" 猫')), epoch=7, expire_time_s=1_900_000_000.125)
        entry = replace(entry, derived_from="v1.a.b", carried_from=("v1.a.c", "v1.a.d"))
        mark = Mark.of(entry.key.stand_in, entry, replace=True, handed_over_s=1_800_000_000.1)
        assert Mark.parse(mark.text) == mark

    @pytest.mark.parametrize("text", ["", "[]", "{}", '["v2.a.b.c.0"]', "7", "null", '["x",1,2,3,4,5,6,7,8,9]'])
    def test_what_is_none_is_not_read(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"not a mark|not a cache key|unpack|Expecting"):
            Mark.parse(text)


class TestInRedis:
    """Of one server and of a Cluster."""

    @pytest.fixture
    async def client(self, redis_url: str) -> AsyncIterator[Client]:
        client = connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0)
        yield client
        await disconnect(client)

    @pytest.fixture
    def prefix(self) -> str:
        return next(PREFIXES)

    @staticmethod
    def marks(client: Client, prefix: str, replica_id: str) -> RedisMarks:
        return RedisMarks(client=client, prefix=prefix, replica_id=replica_id, live_name=f"{prefix}live", timeout_s=5.0)

    @staticmethod
    async def of(marks: RedisMarks) -> set[str]:
        return {text async for text in marks.ours()}

    async def test_marks_are_their_replicas_own_until_they_are_claimed(self, client: Client, prefix: str) -> None:
        one, other = (self.marks(client, prefix, name) for name in ("one", "other"))
        texts = {f"mark {number}" for number in range(1_200)}
        await one.add(sorted(texts))
        assert (await self.of(one), await self.of(other)) == (texts, set())
        assert await other.claim("one", 200) == 200
        assert len(await self.of(other)) == 200
        assert await other.claim("one", 10_000) == 1_000
        assert await other.claim("one", 10_000) == 0
        assert (await self.of(one), await self.of(other)) == (set(), texts)

    async def test_who_has_marks_and_shows_no_sign_of_life_is_dead(self, client: Client, prefix: str) -> None:
        one, other = (self.marks(client, prefix, name) for name in ("one", "other"))
        await one.add(["a mark"])
        await client.zadd(f"{prefix}live", {"one": 1.0, "other": 1.0})
        assert await other.dead() == []
        await client.zrem(f"{prefix}live", "one")
        assert (await one.dead(), await other.dead()) == ([], ["one"])
        await other.claim("one", 10)
        await client.zrem(f"{prefix}live", "other")
        assert (await one.dead(), await other.dead()) == (["other"], [])

    async def test_one_is_removed_once(self, client: Client, prefix: str) -> None:
        marks = self.marks(client, prefix, "one")
        await marks.add(["a mark"])
        assert [await marks.remove("a mark") for _ in range(2)] == [True, False]

    async def test_they_have_no_ttl(self, client: Client, prefix: str) -> None:
        await self.marks(client, prefix, "one").add(["a mark"])
        for name in ("one", "replicas"):
            assert await client.ttl(f"{prefix}{{undrained}}:{name}") == -1

    async def test_a_redis_that_is_away_is_told_as_such(self, prefix: str) -> None:
        client = connect("redis://127.0.0.1:1/0")
        marks = self.marks(client, prefix, "one")
        for asking in (marks.add(["a mark"]), marks.remove("a mark"), marks.dead(), marks.claim("other", 1)):
            with pytest.raises(TierError):
                await asking
        with pytest.raises(TierError):
            await self.of(marks)
        await disconnect(client)


class TestAnySchedule:
    """Machines are lost, restarted and served by, S3 comes and goes."""

    @pytest.mark.parametrize("seed", range(12))
    async def test_nothing_given_is_lost_whichever_machines_are(  # noqa: C901 - a branch for all that happens
        self, service: Service, seed: int
    ) -> None:
        chance = Random(seed)  # noqa: S311 - chooses what happens
        replicas = [await service.begin() for _ in range(3)]
        given: dict[str, dict[str, CacheKey]] = {}
        is_s3_away = False
        for _ in range(30):
            service.clock.advance(1)
            place = chance.randrange(3)
            one = replicas[place]
            match chance.choice(["ask", "ask", "ask", "refresh", "s3", "lose", "restart", "sweep", "home"]):
                case "ask":
                    await self._ask(one, f"fox {chance.randrange(6)}", given)
                case "refresh":
                    await self._refresh(one, f"fox {chance.randrange(6)}", given)
                case "s3":
                    is_s3_away = not is_s3_away
                case "lose":
                    await service.lose(one)
                    replicas[place] = await service.begin()
                case "restart":
                    await one.end()
                    replicas[place] = await service.begin(after=one)
                case "sweep":
                    await one.orphans.sweep()
                    service.clock.advance(DEAD_S)
                case _ if not is_s3_away:
                    await service.home(one)
            for each in replicas:
                each.is_s3_away = is_s3_away
        for each in replicas:
            each.is_s3_away = False
        await service.sweep(*replicas)
        await service.sweep(*replicas)
        for sha256, key in [item for pictures in given.values() for item in pictures.items()]:
            assert sha256 in [await stored(replicas[0], key.with_variant(variant)) for variant in range(8)]
        assert await service.marks() == set()
        assert sum(each.lost for each in replicas) == 0

    @staticmethod
    async def _ask(replica: Replica, prompt: str, given: dict[str, dict[str, CacheKey]]) -> None:
        served = await replica.house.get(prompt)
        await replica.house.settle()
        if served.tier is TierName.UPSTREAM:
            given.setdefault(prompt, {})[served.entry.image.sha256] = served.entry.key

    @staticmethod
    async def _refresh(replica: Replica, prompt: str, given: dict[str, dict[str, CacheKey]]) -> None:
        served = await replica.house.get(prompt, cache_policy=CachePolicy.REFRESH)
        await replica.house.settle()
        given[prompt] = {served.entry.image.sha256: served.entry.key}  # it takes the place of what was there


class TestServices:
    async def test_what_one_answered_with_another_brings_to_s3(
        self,
        provider: OpenAIStandIn,
        own_valkey: Callable[[], ValkeyServer],
        own_s3: Callable[[], S3Server],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(orphans_module, "_DEAD_S", 0.0)
        monkeypatch.setattr(core, "LOOK_FOR_ORPHANS_S", 0.05)
        valkey, s3 = own_valkey(), own_s3()
        homes = [tmp_path / name for name in ("one", "other")]
        common = {"durability": "journal+redis", "redis__prefix": "shared:", "s3_prefix": "shared/"}
        common |= {"server__drain_timeout_s": "0.5", "generation__unknown_budget_microusd_per_hour": "1000000000"}
        for home in homes:
            home.mkdir()
        one, other = (environment(home, provider=provider, redis=valkey, s3=s3, **common) for home in homes)
        s3.kill()
        async with running(one) as service, calling(service) as stub:
            response = await stub.GetImage(ask())
        await asyncio.to_thread(shutil.rmtree, homes[0])
        s3.start()
        async with running(other) as service, calling(service) as stub:

            def is_there() -> bool:
                listed = s3.client.list_objects_v2(Bucket=s3.bucket, Prefix="shared/").get("Contents", [])
                return any(each["Size"] >= len(response.images[0].data) for each in listed)

            await until(is_there)
            again = await stub.GetImage(ask())
        assert again.images[0].data == response.images[0].data
        assert provider.calls == 1


def test_a_slot_of_which_nothing_is_held_is_nobodys() -> None:
    undrained = Undrained(clock=FakeClock())
    key = make_key()
    entry = make_entry(key)
    mark = Mark.of(key, entry, replace=False, handed_over_s=1.0)
    text = undrained.note(mark)
    assert undrained.lies_in(key.name)
    assert undrained.knows(mark, text)
    undrained.let_go(mark)
    assert not undrained.lies_in(key.name)
    assert not undrained.knows(mark, text)
