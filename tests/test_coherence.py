"""What one replica purges no other serves again: replicas before a real Redis and a real S3."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks
from cacheserver.coherence import Coherence
from cacheserver.control.tombstones import RedisTombstones
from cacheserver.epochs import Arrivals, Epochs, Tombstone
from cacheserver.errors import KeyGoneError, TierError, TierUnreachableError
from cacheserver.identity import VERSIONS
from cacheserver.model import CachePolicy, Found, Namespace, Terms, TierName
from cacheserver.tiers.disk import DiskTier
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import Client, connect, disconnect
from cacheserver.tiers.s3 import S3Tier
from tests.fakes import FakeClock
from tests.house import EVERYTHING, FaultyTier, House, open_s3
from tests.next_release import IDENTITY
from tests.servers import S3Server, ValkeyServer
from tests.tier_contract import make_entry, make_key

PREFIXES = (f"purges-{n}:" for n in itertools.count())


@pytest.fixture
async def client(valkey_server: ValkeyServer) -> AsyncIterator[Client]:
    client = connect(valkey_server.url, timeout_s=5.0, connect_timeout_s=5.0)
    yield client
    await disconnect(client)


class Wire:
    """Tombstones in Redis and in S3, from which one replica can be cut off."""

    def __init__(self, shared: RedisTombstones, files: S3Tier) -> None:
        self._shared = shared
        self._files = files
        self.has_redis = True
        self.has_s3 = True

    async def set(self, names: list[str], *, above: int) -> int:
        self._reach(is_there=self.has_redis)
        return await self._shared.set(names, above=above)

    async def since(self, arrival: int) -> Arrivals:
        self._reach(is_there=self.has_redis)
        return await self._shared.since(arrival)

    async def merge(self, tombstones: list[Tombstone]) -> None:
        self._reach(is_there=self.has_redis)
        await self._shared.merge(tombstones)

    async def remove(self, tombstones: list[Tombstone]) -> None:
        self._reach(is_there=self.has_redis)
        await self._shared.remove(tombstones)

    async def delete_file(self, name: str) -> None:
        self._reach(is_there=self.has_s3)
        await self._files.delete_file(name)

    async def files(self, start: str) -> list[str]:
        self._reach(is_there=self.has_s3)
        return await self._files.files(start)

    async def write_file(self, name: str, data: bytes) -> None:
        self._reach(is_there=self.has_s3)
        await self._files.write_file(name, data)

    @staticmethod
    def _reach(*, is_there: bool) -> None:
        if not is_there:
            raise TierError("cut off for a test")


class Replica:
    """A cache of its own on tiers that others share."""

    def __init__(self, house: House, wire: Wire, coherence: Coherence) -> None:
        self.house = house
        self.wire = wire
        self.coherence = coherence


class Service:
    """Replicas on one Redis and one S3."""

    def __init__(self, client: Client, s3_server: S3Server, stack: AsyncExitStack) -> None:
        self.clock = FakeClock()
        self.prefix = next(PREFIXES)
        self.client = client
        self.names = (f"{self.prefix}{{purges}}:arrivals", f"{self.prefix}{{purges}}:epochs")
        self._bucket = s3_server
        self._folder = f"test-{uuid.uuid4().hex}/"
        self._stack = stack

    async def begin(self, *, when_blind: str = "serve") -> Replica:
        epochs = Epochs()
        rng = Random(1)  # noqa: S311 - spreads expiry
        redis = RedisTier(self.client, clock=self.clock, rng=rng, prefix=self.prefix, epochs=epochs)
        s3 = open_s3(self._bucket, clock=self.clock, prefix=self._folder, epochs=epochs)
        self._stack.push_async_callback(s3.aclose)
        wire = Wire(RedisTombstones(client=self.client, prefix=self.prefix, timeout_s=5.0), s3)
        coherence = Coherence(
            epochs=epochs,
            shared=wire,
            files=wire,
            last_tier=TierName.S3,
            books=CounterBooks(clock=self.clock, registry=CollectorRegistry()),
            clock=self.clock,
            refuses_when_blind=when_blind == "refuse",
        )
        await coherence.load()
        house = House(
            clock=self.clock,
            redis=FaultyTier(redis, TierName.REDIS),
            s3=FaultyTier(s3, TierName.S3),
            epochs=epochs,
            coherence=coherence,
        )
        self._stack.push_async_callback(house.aclose)
        return Replica(house, wire, coherence)


@pytest.fixture
async def service(client: Client, s3_server: S3Server) -> AsyncIterator[Service]:
    async with AsyncExitStack() as stack:
        yield Service(client, s3_server, stack)


async def has(replica: Replica, name: str) -> bool:
    house = replica.house
    key = make_key().parse(name)
    try:
        await house.cache.get_by_key(key, namespace=house.namespace, caller=EVERYTHING, terms=Terms())
    except KeyGoneError:
        return False
    return True


class TestReplicas:
    async def test_what_one_purges_another_serves_no_more_once_it_has_looked(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.house.get()
        await one.house.settle()
        assert await has(other, served.entry.key.name)
        await one.house.cache.purge(one.house.namespace, key=served.entry.key, dry_run=False)
        await other.coherence.look()
        assert not await has(other, served.entry.key.name)

    async def test_a_namespace_is_gone_at_once_and_its_bytes_soon(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.house.get()
        await one.house.settle()
        await has(other, served.entry.key.name)
        result = await one.house.cache.purge(one.house.namespace, dry_run=False)
        assert result.is_reclaiming
        assert not await has(one, served.entry.key.name)
        await other.coherence.look()
        assert not await has(other, served.entry.key.name)
        await one.house.cache._purger._tasks.idle()
        assert await one.house.redis.head(served.entry.key) is None
        assert await one.house.s3.head(served.entry.key) is None
        assert other.coherence.epochs.to_reclaim() != []
        await other.coherence.look()
        assert other.coherence.epochs.to_reclaim() == []

    async def test_what_is_asked_for_after_a_purge_is_made_once_and_stays(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        await one.house.get()
        await one.house.cache.purge(one.house.namespace, dry_run=False)
        await other.coherence.look()
        again = await other.house.get()
        await other.house.settle()
        await one.house.cache._purger._tasks.idle()
        assert again.tier is TierName.UPSTREAM
        assert (await one.house.get()).entry.image.sha256 == again.entry.image.sha256
        assert one.house.upstream.calls + other.house.upstream.calls == 2

    async def test_bytes_that_are_yet_to_be_reclaimed_are_not_found(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.house.get()
        await one.house.settle()
        one.house.s3.is_down = one.house.redis.is_down = True  # nothing is reclaimed
        await one.house.cache.purge(one.house.namespace, dry_run=False)
        await other.coherence.look()
        assert await other.house.cache.find([served.entry.key]) == ([Found(served.entry.key)], [])

    async def test_a_purge_that_no_walk_ended_is_ended_by_the_next_life(self, service: Service) -> None:
        one = await service.begin()
        served = await one.house.get()
        await one.house.settle()
        one.house.s3.is_down = one.house.redis.is_down = True
        await one.house.cache.purge(one.house.namespace, dry_run=False)
        await one.house.cache._purger._tasks.idle()
        next_life = await service.begin()
        next_life.house.cache.reclaim()
        await next_life.house.cache._purger._tasks.idle()
        assert await next_life.house.s3.head(served.entry.key) is None
        assert next_life.coherence.epochs.to_reclaim() == []

    async def test_a_replica_that_has_yet_to_see_a_purge_stores_what_it_makes_after_it(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        await one.house.cache.purge(one.house.namespace, dry_run=False)
        made = await other.house.get()
        await other.house.settle()
        await one.coherence.look()
        assert await has(one, made.entry.key.name)

    async def test_what_a_purge_took_leaves_the_memory_of_all_replicas(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.house.get()
        await one.house.settle()
        await has(other, served.entry.key.name)
        await one.house.cache.purge(one.house.namespace, dry_run=False)
        await other.coherence.look()
        await other.house.cache._purger._tasks.idle()
        assert len(other.house.memory) == 0

    async def test_a_purge_of_long_ago_is_forgotten_but_for_the_last_one(self, service: Service) -> None:
        one = await service.begin()
        await one.house.cache.purge(one.house.namespace, tag="spring", dry_run=False)
        await one.house.cache.purge(one.house.namespace, dry_run=False)
        await one.house.cache._purger._tasks.idle()
        await one.house.cache.purge(one.house.namespace, tag="summer", dry_run=False)
        service.clock.advance(200 * 86400.0)
        await one.coherence.trim()
        await one.coherence.look()
        left = [Tombstone.of_tag(one.house.namespace.name, "summer").name]
        assert [each.name for each in one.coherence.epochs.all()] == left
        assert await service.client.zrange(service.names[0], 0, -1) == [name.encode() for name in left]
        assert len(await one.wire.files("purges/")) == 1

    async def test_a_slow_writer_does_not_bring_back_what_was_purged(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.house.get()
        await one.house.cache.purge(one.house.namespace, key=served.entry.key, dry_run=False)
        await other.house.s3.put(served.entry.key, served.entry, replace=True)
        assert await one.house.s3.get(served.entry.key) is None
        again = await one.house.get()
        assert again.entry.key == served.entry.key  # it takes the number of what was purged
        assert await one.house.s3.get(served.entry.key) is not None


class TestReplacing:
    async def test_a_refreshed_picture_takes_the_old_ones_place_in_all_replicas(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        old = await one.house.get()
        await one.house.settle()
        await has(other, old.entry.key.name)
        new = await one.house.get(cache_policy=CachePolicy.REFRESH)
        await one.house.settle()
        await one.coherence.look()
        await other.coherence.look()
        assert (await other.house.get()).entry.image.sha256 == new.entry.image.sha256
        assert new.entry.key == old.entry.key

    async def test_a_picture_put_in_the_place_of_anothers_takes_it_everywhere(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        old = await one.house.get()
        await one.house.settle()
        await has(other, old.entry.key.name)
        other.house.namespace, guest = Namespace("guest", other.house.namespace.partition), other.house.namespace
        image = replace(old.entry.image, data=b"put", sha256="f" * 64)
        _, identity = one.house.identity()
        await one.house.cache.put(image, identity, namespace=other.house.namespace, replace=True)
        await one.house.settle()
        await one.coherence.aclose()
        await other.coherence.look()
        other.house.namespace = guest
        assert (await other.house.get()).entry.image.data == b"put"

    @pytest.mark.parametrize("by", range(2))
    async def test_what_was_replaced_comes_back_under_no_version_of_its_key(
        self, service: Service, monkeypatch: pytest.MonkeyPatch, by: int
    ) -> None:
        monkeypatch.setitem(VERSIONS, 2, IDENTITY)
        older, newer = replicas = [await service.begin(), await service.begin()]
        newer.house.namespace = replace(newer.house.namespace, identity_version=2)
        await older.house.get("please a fox")
        await older.house.settle()
        await newer.house.get("please a fox")
        await newer.house.settle()
        replaced = await replicas[by].house.get("please a fox", cache_policy=CachePolicy.REFRESH)
        await replicas[by].house.settle()
        await replicas[by].coherence.look()
        await newer.coherence.look()
        assert (await newer.house.get("please a fox")).entry.image == replaced.entry.image
        _, identity = newer.house.identity("please a fox")
        for tier in (newer.house.redis, newer.house.s3):  # as if it had expired
            await tier.delete(identity.key)
        newer.house.restart()
        await newer.house.get("please a fox")
        assert older.house.upstream.calls + newer.house.upstream.calls == (2 if by == 0 else 3)

    async def test_one_that_comes_late_takes_the_next_number(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        old = await one.house.get()
        await one.house.settle()
        late_epoch = await one.coherence.next()
        new = await other.house.get(cache_policy=CachePolicy.REFRESH)
        await other.house.settle()
        late = replace(old.entry, image=replace(old.entry.image, data=b"late", sha256="e" * 64), epoch=late_epoch)
        kept = await one.house.keeper.keep(late, replace=True)
        await one.house.settle()
        assert kept.key.variant == 1
        for tier in (one.house.redis, one.house.s3):
            found = [await tier.get(kept.key.with_variant(variant)) for variant in (0, 1)]
            assert [each.image.data for each in found if each] == [new.entry.image.data, b"late"]

    async def test_only_redis_decides_alike(self, service: Service) -> None:
        one = await service.begin()
        entry = make_entry()
        assert await one.house.redis.put(entry.key, replace(entry, epoch=2), replace=True)
        assert not await one.house.redis.put(entry.key, replace(entry, epoch=1), replace=True)
        assert await one.house.redis.put(entry.key, replace(entry, epoch=2), replace=True)


class TestBeingCutOff:
    async def test_cut_off_from_redis_a_replica_learns_from_the_last_tier(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.house.get()
        await one.house.settle()
        await has(other, served.entry.key.name)
        other.wire.has_redis = False
        await one.house.cache.purge(one.house.namespace, dry_run=False)
        service.clock.advance(5)
        await other.coherence.look()
        assert not await has(other, served.entry.key.name)

    async def test_cut_off_from_both_it_serves_or_refuses_as_it_is_told(self, service: Service) -> None:
        serving, refusing = await service.begin(), await service.begin(when_blind="refuse")
        served = await serving.house.get()
        await serving.house.settle()
        for each in (serving, refusing):
            assert await has(each, served.entry.key.name)
            each.wire.has_redis = each.wire.has_s3 = False
            service.clock.advance(5)
            await each.coherence.look()
        assert serving.house.memory.peek(served.entry.key) is not None
        assert refusing.house.memory.peek(served.entry.key) is None
        refusing.wire.has_redis = True
        await refusing.coherence.look()
        assert refusing.house.memory.peek(served.entry.key) is not None

    async def test_a_purge_that_redis_did_not_hear_fails_and_is_given_to_it_later(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.house.get()
        await one.house.settle()
        await has(other, served.entry.key.name)
        one.wire.has_redis = False
        with pytest.raises(TierUnreachableError) as caught:
            await one.house.cache.purge(one.house.namespace, dry_run=False)
        assert caught.value.tiers == (TierName.REDIS,)
        assert not await has(one, served.entry.key.name)
        one.wire.has_redis = True
        await one.coherence.look()
        await other.coherence.look()
        assert not await has(other, served.entry.key.name)

    async def test_what_is_made_after_a_purge_that_redis_did_not_hear_stays(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        one.wire.has_redis = other.wire.has_redis = False
        with pytest.raises(TierUnreachableError):
            await one.house.cache.purge(one.house.namespace, dry_run=False)
        made = await other.house.get()
        await other.house.settle()
        service.clock.advance(5)
        await other.coherence.look()
        assert await has(other, made.entry.key.name)

    async def test_it_is_given_to_redis_though_others_have_purged_since(self, service: Service) -> None:
        one, other = await service.begin(), await service.begin()
        served = await one.house.get()
        await one.house.settle()
        await has(other, served.entry.key.name)
        one.wire.has_redis = False
        with pytest.raises(TierUnreachableError):
            await one.house.cache.purge(one.house.namespace, dry_run=False)
        service.clock.advance(1)
        await other.house.cache.purge(other.house.namespace, tag="later", dry_run=False)
        one.wire.has_redis = True
        await one.coherence.look()
        await other.coherence.look()
        assert not await has(other, served.entry.key.name)

    async def test_a_redis_that_lost_all_is_told_what_was_purged(self, service: Service) -> None:
        one = await service.begin()
        served = await one.house.get()
        await one.house.settle()
        await one.house.cache.purge(one.house.namespace, tag="spring", dry_run=False)
        await one.house.cache.purge(one.house.namespace, key=served.entry.key, dry_run=False)
        before = one.coherence.epochs.newest
        await service.client.delete(*service.names)
        await one.coherence.look()
        other = await service.begin()
        assert other.coherence.epochs.newest == before
        await service.client.delete(*service.names)
        await other.house.cache.purge(other.house.namespace, key=served.entry.key, dry_run=False)
        assert other.coherence.epochs.newest > before


class TestALocalDisk:
    async def test_what_was_purged_stays_so_in_the_next_life(self, tmp_path: Path, clock: FakeClock) -> None:
        entry = make_entry()
        for life in range(2):
            epochs = Epochs()
            disk = await DiskTier.open(tmp_path, clock=clock, sync=False, epochs=epochs)
            books = CounterBooks(clock=clock, registry=CollectorRegistry())
            coherence = Coherence(
                epochs=epochs,
                shared=None,
                files=disk,
                last_tier=TierName.DISK,
                keeps_all=True,
                books=books,
                clock=clock,
            )
            await coherence.load()
            if life == 0:
                await disk.put(entry.key, entry, replace=True)
                assert await coherence.set([Tombstone.of_partition(entry.namespace, entry.key.partition)]) == []
            assert await disk.get(entry.key) is None
            assert await disk.put(entry.key, replace(entry, epoch=epochs.newest), replace=False)
            assert await disk.get(entry.key) is not None
            await disk.put(entry.key, entry, replace=True)
            await disk.aclose()


def test_a_purge_takes_what_its_namespace_stored_before_it_and_nothing_else() -> None:
    epochs = Epochs()
    epochs.learn([Tombstone(10, "default", Tombstone.of_partition("default", "studio").selects)])
    entry = replace(make_entry(), namespace="default")
    key = replace(entry.key, partition="studio")
    assert epochs.is_purged(key, replace(entry, key=key, epoch=9))
    assert not epochs.is_purged(key, replace(entry, key=key, epoch=10))
    assert not epochs.is_purged(key, replace(entry, key=key, namespace=Namespace("guest", "studio").name))
    assert not epochs.is_purged(replace(key, partition="shop"), entry)
