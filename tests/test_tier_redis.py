"""The Redis tier keeps the contract on real servers, and says what is wrong when something is."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import itertools
import random
import ssl
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pytest
import pytest_asyncio
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import SentinelConnectionPool

from cacheserver.control.redis import UNREACHABLE
from cacheserver.control.scripts import run_script
from cacheserver.errors import CorruptEntryError, NewerEntryError, TierError, TierTimeoutError
from cacheserver.model import CacheKey, TierName
from cacheserver.tiers import codec
from cacheserver.tiers.guard import GuardedTier
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.servers import Cluster, ClusterServer, SentinelServer, SentinelSet, TcpProxy, ValkeyServer
from tests.tier_contract import (
    MAX_ENTRY_BYTES,
    TierContract,
    as_public,
    guarded_tier,
    keys_of,
    make_entry,
    make_key,
    with_data,
)
from tests.waiting import until

DAY_MS = 86_400_000


@asynccontextmanager
async def open_tier(
    url: str,
    clock: FakeClock,
    *,
    timeout_s: float = 5.0,
    max_concurrency: int = 64,
    stale_s: Mapping[str, float] = MappingProxyType({}),
) -> AsyncIterator[RedisTier]:
    """A tier with names of its own. Patient by default: a busy machine is no failure."""
    client = connect(url, timeout_s=timeout_s, connect_timeout_s=timeout_s, max_connections=max_concurrency)
    tier = RedisTier(
        client,
        clock=clock,
        rng=random.Random(7),  # noqa: S311 - no secret
        prefix=f"test-{uuid.uuid4().hex}:",
        stale_s=stale_s,
        max_entry_bytes=MAX_ENTRY_BYTES,
        max_concurrency=max_concurrency,
    )
    yield tier
    await tier.aclose()


@pytest_asyncio.fixture
async def tier(valkey_server: ValkeyServer, clock: FakeClock) -> AsyncIterator[RedisTier]:
    async with open_tier(valkey_server.url, clock) as tier:
        yield tier


@pytest_asyncio.fixture
async def raw(valkey_server: ValkeyServer) -> AsyncIterator[Redis]:
    """A client of the test's own, to do to values what nobody should."""
    client = Redis.from_url(valkey_server.url)
    yield client
    await client.aclose()


def name_of(tier: RedisTier, key: CacheKey) -> str:
    return f"{tier._prefix}{{{key.identity_name}}}.{key.variant}"


class TestRedisTier(TierContract):
    """The contract; the fixture above is its tier."""


class TestGuardedRedisTier(TierContract):
    @pytest.fixture
    def tier(self, tier: RedisTier, clock: FakeClock) -> GuardedTier:
        return guarded_tier(tier, clock)


async def test_it_says_which_tier_it_is(tier: RedisTier) -> None:
    assert tier.name is TierName.REDIS


async def test_all_variants_of_an_identity_share_a_cluster_slot(tier: RedisTier, raw: Redis) -> None:
    key = make_key(variant=3)
    await tier.put(key, make_entry(key), replace=False)
    name = f"{tier._prefix}{{v1.studio.{key.fingerprint.hex()}.{key.digest[:16].hex()}}}.3"
    assert await raw.exists(name) == 1


async def test_entries_stay_a_day_give_or_take_a_tenth(tier: RedisTier, raw: Redis) -> None:
    stays = []
    for n in range(50):
        key = make_key(f"prompt {n}")
        await tier.put(key, make_entry(key), replace=n % 2 == 0)
        stays.append(await raw.pttl(name_of(tier, key)))
    assert 0.9 * DAY_MS - 60_000 <= min(stays) < 0.95 * DAY_MS
    assert 1.05 * DAY_MS < max(stays) <= 1.1 * DAY_MS


@pytest.mark.parametrize("replace", [True, False])
async def test_no_entry_stays_longer_than_it_is_fresh(
    tier: RedisTier, raw: Redis, clock: FakeClock, *, replace: bool
) -> None:
    entry = make_entry(expire_time_s=clock.now_s() + 60)
    await tier.put(entry.key, entry, replace=replace)
    assert 1_000 < await raw.pttl(name_of(tier, entry.key)) <= 60_000


async def test_an_entry_stays_longer_where_it_is_of_use_past_its_end(
    valkey_server: ValkeyServer, raw: Redis, clock: FakeClock
) -> None:
    entry = make_entry(expire_time_s=clock.now_s() + 60)
    async with open_tier(valkey_server.url, clock, stale_s={entry.key.partition: 30.0}) as tier:
        await tier.put(entry.key, entry, replace=False)
        assert 61_000 < await raw.pttl(name_of(tier, entry.key)) <= 90_000


@pytest.mark.parametrize("damage", [lambda v: v[:-1], lambda v: v[:300], lambda v: v[:3], lambda v: v[:-1] + b"!"])
async def test_a_damaged_value_is_mended_by_one_of_many_writers(
    tier: RedisTier, raw: Redis, damage: Callable[[bytes], bytes]
) -> None:
    entry = make_entry(data=bytes(1000))
    await tier.put(entry.key, entry, replace=False)
    name = name_of(tier, entry.key)
    await raw.set(name, damage(codec.encode(entry)))
    with pytest.raises(CorruptEntryError):
        await tier.get(entry.key)
    writers = [with_data(entry, b"writer %d" % n) for n in range(8)]
    won = await asyncio.gather(*(tier.put(entry.key, writer, replace=False) for writer in writers))
    assert won.count(True) == 1
    assert await tier.get(entry.key) == writers[won.index(True)]
    assert 0 < await raw.pttl(name) <= 1.1 * DAY_MS


async def test_a_value_of_another_kind_is_damage_and_mended(tier: RedisTier, raw: Redis) -> None:
    entry = make_entry()
    await raw.lpush(name_of(tier, entry.key), "a list")
    with pytest.raises(CorruptEntryError):
        await tier.get(entry.key)
    assert await tier.labels(entry.key) is None
    assert await tier.put(entry.key, entry, replace=False)
    assert await tier.get(entry.key) == entry


async def test_an_empty_value_is_a_miss_and_mended(tier: RedisTier, raw: Redis) -> None:
    entry = make_entry()
    await raw.set(name_of(tier, entry.key), b"")
    assert await tier.get(entry.key) is None
    assert await tier.put(entry.key, entry, replace=False)
    assert await tier.get(entry.key) == entry


async def test_of_a_value_larger_than_any_entry_no_more_than_an_entry_is_read(tier: RedisTier, raw: Redis) -> None:
    entry = make_entry()
    await raw.set(name_of(tier, entry.key), codec.encode(entry) + bytes(20_000_000))
    assert len(await tier._read(entry.key)) <= MAX_ENTRY_BYTES + codec.MAX_HEAD_BYTES + 1
    with pytest.raises(CorruptEntryError):
        await tier.get(entry.key)
    assert await tier.put(entry.key, entry, replace=False)
    assert await tier.get(entry.key) == entry


async def test_labels_of_a_damaged_entry_are_none(tier: RedisTier, raw: Redis) -> None:
    entry = make_entry()
    await raw.set(name_of(tier, entry.key), codec.encode(entry)[:200])
    assert await tier.labels(entry.key) is None


async def test_a_newer_entry_is_unknown_and_stays(tier: RedisTier, raw: Redis) -> None:
    entry = make_entry()
    newer = b"PCEN" + (max(codec.LAYOUTS) + 1).to_bytes(2, "big") + b"a layout of tomorrow"
    await raw.set(name_of(tier, entry.key), newer)
    for call in (tier.get(entry.key), tier.put(entry.key, entry, replace=False), tier.labels(entry.key)):
        with pytest.raises(NewerEntryError):
            await call
    assert await raw.get(name_of(tier, entry.key)) == newer


async def test_scan_passes_over_names_of_others_and_takes_a_prefix_literally(
    valkey_server: ValkeyServer, raw: Redis, clock: FakeClock
) -> None:
    async with open_tier(valkey_server.url, clock) as plain, open_tier(valkey_server.url, clock) as odd:
        odd._prefix = plain._prefix[:-2] + "[a-f0-9]*:"
        for tier in (plain, odd):
            await tier.put(make_key(), make_entry(), replace=False)
        await raw.set(f"{odd._prefix}{{v1.studio.not-a-key}}.0", b"")
        await plain.delete(make_key())
        assert await keys_of(plain, "studio") == set()
        assert await keys_of(odd, "studio") == {make_key().name}


async def test_more_calls_than_connections_wait_their_turn(valkey_server: ValkeyServer, clock: FakeClock) -> None:
    async with open_tier(valkey_server.url, clock, max_concurrency=2) as tier:
        await tier.put(make_key(), make_entry(), replace=False)
        assert await asyncio.gather(*(tier.get(make_key()) for _ in range(100))) == [make_entry()] * 100


async def test_a_server_that_hangs_is_given_up_in_time(
    own_valkey: Callable[[], ValkeyServer], clock: FakeClock
) -> None:
    server = own_valkey()
    async with open_tier(server.url, clock) as patient, open_tier(server.url, clock, timeout_s=0.25) as hasty:
        await patient.put(make_key(), make_entry(), replace=False)
        server.stop()
        calls = hasty.get(make_key()), hasty.find([make_key()]), hasty.put(make_key(), make_entry(), replace=True)
        for call in calls:
            async with asyncio.timeout(5):  # redis-py by itself takes seven seconds
                with pytest.raises(TierTimeoutError):
                    await call
        server.cont()
        assert await patient.get(make_key()) == make_entry()


async def test_a_guarded_server_that_hangs_is_given_up_at_the_deadline(
    own_valkey: Callable[[], ValkeyServer], clock: FakeClock
) -> None:
    server = own_valkey()
    async with open_tier(server.url, clock) as tier:
        await tier.ping()
        server.stop()
        guarded = guarded_tier(tier, clock, read_deadline_s=0.05)
        with pytest.raises(TierTimeoutError, match=r"within 0\.05 s"):
            await guarded.get(make_key())
        server.cont()


async def test_a_server_that_is_down_is_unknown_and_one_that_is_back_answers_at_once(
    own_valkey: Callable[[], ValkeyServer], clock: FakeClock
) -> None:
    server = own_valkey()
    async with open_tier(server.url, clock) as tier:
        await tier.put(make_key(), make_entry(), replace=False)
        await asyncio.gather(*(tier.get(make_key()) for _ in range(8)))  # several connections that will be stale
        server.kill()
        for call in (tier.get(make_key()), tier.find([make_key()]), tier.delete(make_key()), tier.ping()):
            with pytest.raises(TierError, match="cannot be reached"):
                await call
        server.start()
        assert await asyncio.gather(*(tier.get(make_key()) for _ in range(8))) == [make_entry()] * 8


async def test_stale_connections_cost_no_call(own_valkey: Callable[[], ValkeyServer], clock: FakeClock) -> None:
    server = own_valkey()
    async with open_tier(server.url, clock) as tier:
        await tier.put(make_key(), make_entry(), replace=False)
        await asyncio.gather(*(tier.get(make_key()) for _ in range(8)))
        server.restart()
        assert await asyncio.gather(*(tier.get(make_key()) for _ in range(8))) == [make_entry()] * 8


async def test_an_answer_cut_short_is_unknown_and_the_next_is_whole(
    valkey_server: ValkeyServer, clock: FakeClock
) -> None:
    async with (
        TcpProxy("127.0.0.1", valkey_server.port) as proxy,
        open_tier(f"redis://127.0.0.1:{proxy.port}", clock) as tier,
    ):
        entry = make_entry(data=bytes(MAX_ENTRY_BYTES))
        await tier.put(entry.key, entry, replace=False)
        proxy.cut_after(50_000)
        with pytest.raises(TierError):
            await tier.get(entry.key)
        proxy.resume()
        assert await tier.get(entry.key) == entry


async def test_a_cancelled_read_leaves_no_answer_behind_for_the_next(
    valkey_server: ValkeyServer, clock: FakeClock
) -> None:
    async with (
        TcpProxy("127.0.0.1", valkey_server.port) as proxy,
        open_tier(f"redis://127.0.0.1:{proxy.port}", clock, max_concurrency=1) as tier,
    ):
        for prompt in "ab":
            await tier.put(make_key(prompt), make_entry(make_key(prompt), prompt.encode()), replace=False)
        proxy.hang()
        read = asyncio.create_task(tier.get(make_key("a")))
        for _ in range(20):  # until it has sent its command and waits for the answer
            await asyncio.sleep(0)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        proxy.resume()
        entry = await tier.get(make_key("b"))
        assert entry is not None
        assert entry.image.data == b"b"


async def test_wrong_credentials_are_said_without_being_said(
    own_valkey: Callable[[], ValkeyServer], clock: FakeClock
) -> None:
    server = own_valkey()
    server.execute("CONFIG SET requirepass correct-horse")
    async with open_tier(f"redis://:correct-horse@127.0.0.1:{server.port}", clock) as tier:
        await tier.ping()
    for user in ("", ":battery-staple@", "somebody:battery-staple@"):
        async with open_tier(f"redis://{user}127.0.0.1:{server.port}", clock) as tier:
            for call in (tier.ping(), tier.get(make_key())):
                with pytest.raises(TierError, match="password") as caught:
                    await call
                assert "battery" not in str(caught.value)
            assert "battery" not in repr(tier)


async def test_what_is_moved_is_not_sent_again_and_stays_as_long_as_any_entry(
    own_valkey: Callable[[], ValkeyServer], clock: FakeClock
) -> None:
    server = own_valkey()
    entry = with_data(make_entry(), bytes(MAX_ENTRY_BYTES))

    async def received_bytes(raw: Redis) -> int:
        return int((await raw.info("stats"))["total_net_input_bytes"])

    async with open_tier(server.url, clock) as tier, Redis.from_url(server.url) as raw:
        tier._is_alone = lambda name: name == entry.key.stand_in.name
        await tier.put(entry.key.stand_in, entry, replace=True)
        before = await received_bytes(raw)
        assert await tier.move(entry.key.stand_in, entry.key, entry)
        assert await received_bytes(raw) - before < MAX_ENTRY_BYTES / 10
        assert 0.9 * DAY_MS - 60_000 <= await raw.pttl(name_of(tier, entry.key)) <= 1.1 * DAY_MS


async def test_where_nothing_may_be_renamed_it_is_removed(
    own_valkey: Callable[[], ValkeyServer], clock: FakeClock
) -> None:
    server = own_valkey()
    server.execute("ACL SETUSER default -renamenx")
    entry = make_entry()
    async with open_tier(server.url, clock) as tier:
        await tier.put(entry.key.stand_in, entry, replace=True)
        assert not await tier.move(entry.key.stand_in, entry.key, entry)
        assert await tier.get(entry.key.stand_in) is None


async def test_a_full_server_is_unknown_to_writes_and_still_read(
    own_valkey: Callable[[], ValkeyServer], clock: FakeClock
) -> None:
    server = own_valkey()
    async with open_tier(server.url, clock) as tier:
        await tier.put(make_key(), make_entry(), replace=False)
        server.execute("CONFIG SET maxmemory-policy noeviction")
        server.execute("CONFIG SET maxmemory 1")
        for call in (tier.put(make_key("b"), make_entry(), replace=False), tier.ping()):
            with pytest.raises(TierError, match="it is full"):
                await call
        assert await tier.get(make_key()) == make_entry()


async def test_a_replica_is_no_place_to_write(own_valkey: Callable[[], ValkeyServer], clock: FakeClock) -> None:
    server = own_valkey()
    server.execute("REPLICAOF 127.0.0.1 1")
    async with open_tier(server.url, clock) as tier:
        with pytest.raises(TierError, match="read-only replica"):
            await tier.ping()


@pytest.fixture(scope="module")
def cluster_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterServer]:
    server = ClusterServer(tmp_path_factory.mktemp("cluster"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def sentinel_server(valkey_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelServer]:
    server = SentinelServer(tmp_path_factory.mktemp("sentinel"), valkey_server)
    server.start()
    yield server
    server.kill()


class TestClusterTier(TierContract):
    @pytest_asyncio.fixture
    async def tier(self, cluster_server: ClusterServer, clock: FakeClock) -> AsyncIterator[RedisTier]:
        async with open_tier(cluster_server.url, clock) as tier:
            yield tier

    async def test_a_damaged_value_is_mended(self, tier: RedisTier) -> None:
        entry = make_entry()
        await tier._client.set(name_of(tier, entry.key), b"not an entry")
        assert await tier.put(entry.key, entry, replace=False)
        assert await tier.get(entry.key) == entry


class TestSentinelTier(TierContract):
    @pytest_asyncio.fixture
    async def tier(self, sentinel_server: SentinelServer, clock: FakeClock) -> AsyncIterator[RedisTier]:
        async with open_tier(sentinel_server.url, clock) as tier:
            yield tier

    async def test_a_service_nobody_watches_is_unknown(self, sentinel_server: SentinelServer, clock: FakeClock) -> None:
        async with open_tier(f"redis+sentinel://127.0.0.1:{sentinel_server.port}/other", clock) as tier:
            with pytest.raises(TierError, match="cannot be reached"):
                await tier.ping()


class TestFailoverBehindSentinel:
    async def test_the_replica_that_takes_a_dead_masters_place_is_found(
        self, sentinel_set: SentinelSet, clock: FakeClock
    ) -> None:
        async with open_tier(sentinel_set.url, clock) as tier:
            keys = [make_key(f"fox {number}") for number in range(30)]
            for key in keys:
                await tier.put(key, make_entry(key), replace=True)
            await tier._client.wait(1, 5_000)
            sentinel_set.master.kill()
            with pytest.raises(TierError):
                await tier.ping()
            await until(partial(asyncio.to_thread, sentinel_set.has_taken_over))
            assert await asyncio.gather(*map(tier.get, keys)) == [make_entry(key) for key in keys]
            await tier.ping()

    async def test_calls_that_come_as_the_master_is_changed_fail_at_most(
        self, sentinel_set: SentinelSet, clock: FakeClock
    ) -> None:
        async with open_tier(sentinel_set.url, clock) as tier:
            await asyncio.gather(*(tier.ping() for _ in range(30)))
            await asyncio.to_thread(sentinel_set.change_master)
            has_changed = asyncio.create_task(until(partial(asyncio.to_thread, sentinel_set.has_taken_over)))
            while not has_changed.done():
                for outcome in await asyncio.gather(*(tier.ping() for _ in range(30)), return_exceptions=True):
                    assert outcome is None or isinstance(outcome, TierError)
            await has_changed
            await asyncio.gather(*(tier.ping() for _ in range(30)))


class UnixServer(ValkeyServer):
    """A Valkey that listens on a Unix socket as well."""

    @property
    def url(self) -> str:
        return f"unix://{self.directory}/s?db=3"

    def command(self) -> list[str]:
        return [*super().command(), "--unixsocket", str(self.directory / "s")]


@pytest.fixture
def unix_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnixServer]:
    server = UnixServer(tmp_path_factory.mktemp("unix"))
    server.start()
    yield server
    server.kill()


async def test_a_unix_socket_works(unix_server: UnixServer, clock: FakeClock) -> None:
    entry = make_entry(data=bytes(range(250)) * 400)
    async with open_tier(unix_server.url, clock) as tier:
        await tier.put(make_key(), entry, replace=False)
        assert await tier.get(make_key()) == entry


# --- connections that are reset while they are idle: the service runs on uvloop, whose errors are not asyncio's


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def on_each_loop(request: pytest.FixtureRequest) -> Callable[[Coroutine[None, None, None]], None]:
    def run(body: Coroutine[None, None, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(body)

    return run


class Place:
    """An address of one form and what answers there."""

    def __init__(self, form: str, new_directory: Callable[[str], Path]) -> None:
        kinds: dict[str, type[ValkeyServer]] = {"unix": UnixServer, "cluster": ClusterServer}
        self.master = kinds.get(form, ValkeyServer)(new_directory("master"))
        self.servers: list[ValkeyServer] = [self.master]
        self.url = self.master.url
        if form == "sentinel":
            sentinel = SentinelServer(new_directory("sentinel"), self.master)
            self.servers.append(sentinel)
            self.url = sentinel.url

    async def reset(self, client: Client) -> None:
        """Go away so that each of the client's connections, all idle, is reset, and wait until it has noticed."""
        for server in self.servers:
            server.stop()
        streams = [(c._reader, c._writer) for c in idle_connections(client) if c._reader and c._writer]
        for _, writer in streams:
            writer.write(b"PING\r\n")
        await until(lambda: not any(writer.transport.get_write_buffer_size() for _, writer in streams))
        for server in self.servers:
            server.kill()  # what it has not read makes the end a reset
        await until(lambda: all(reader.exception() for reader, _ in streams))

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def kill(self) -> None:
        for server in self.servers:
            server.kill()


def idle_connections(client: Client) -> list[AbstractConnection]:
    if isinstance(client, RedisCluster):
        return [connection for node in client.get_nodes() for connection in node._free]
    pools = [client.connection_pool]
    if isinstance(client.connection_pool, SentinelConnectionPool):
        pools += [sentinel.connection_pool for sentinel in client.connection_pool.sentinel_manager.sentinels]
    return [connection for pool in pools for connection in pool._available_connections]


@pytest.fixture
def new_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Place]]:
    places: list[Place] = []

    def start(form: str) -> Place:
        places.append(Place(form, tmp_path_factory.mktemp))
        places[-1].start()
        return places[-1]

    yield start
    for place in places:
        place.kill()


class TestAClusterOfMany:
    """What many calls at once are to it, of which none may be lost: one of them may be a lease."""

    @pytest_asyncio.fixture
    async def client(self, cluster: Cluster) -> AsyncIterator[RedisCluster]:
        client = connect(cluster.url, timeout_s=5.0, connect_timeout_s=5.0)
        assert isinstance(client, RedisCluster)
        yield client
        await disconnect(client)

    async def test_slots_that_have_moved_lose_no_call(self, client: RedisCluster) -> None:
        await client.initialize()
        wrong = {node.name: other for node, other in itertools.pairwise([*client.get_primaries()] * 2)}
        for _ in range(10):
            slots = client.nodes_manager.slots_cache
            for slot, [node] in slots.items():
                slots[slot] = [wrong[node.name]]
            burst = (client.set(f"moved-{n}", b"x" * 10_000) for n in range(60))
            assert await asyncio.gather(*burst) == [True] * 60
            await client.nodes_manager.initialize()

    async def test_connections_that_break_under_a_burst_break_no_later_call(
        self, cluster: Cluster, client: RedisCluster
    ) -> None:
        for _ in range(5):
            burst = [asyncio.create_task(client.set(f"broken-{n}", b"x" * 10_000)) for n in range(60)]
            await asyncio.wait(burst, return_when=asyncio.FIRST_COMPLETED)
            for node in cluster.nodes:
                await asyncio.to_thread(node.execute, "CLIENT KILL TYPE normal")
            for outcome in await asyncio.gather(*burst, return_exceptions=True):
                assert outcome is True or isinstance(outcome, UNREACHABLE)
            assert await asyncio.gather(*(client.set(f"broken-{n}", b"x") for n in range(60))) == [True] * 60


@pytest.mark.parametrize("form", ["single", "unix", "sentinel", "cluster"])
def test_connections_reset_while_idle_cost_no_call(
    on_each_loop: Callable[[Coroutine[None, None, None]], None],
    new_place: Callable[[str], Place],
    clock: FakeClock,
    form: str,
) -> None:
    async def body() -> None:
        place = new_place(form)
        async with open_tier(place.url, clock) as tier:
            await tier.put(make_key(), make_entry(), replace=False)
            await asyncio.gather(*(tier.get(make_key()) for _ in range(8)))
            await place.reset(tier._client)
            place.start()
            # All at once, so that each has a connection of its own that was reset.
            assert await asyncio.gather(
                tier.get(make_key()),
                tier.find([make_key()]),
                tier.put(make_key("b"), make_entry(make_key("b")), replace=True),
                tier.delete(make_key("c")),
                run_script(tier._client, "return ARGV[1]", ["key"], ["told"], timeout_s=5.0),
            ) == [make_entry(), [True], True, False, b"told"]

    on_each_loop(body())


def test_a_connection_reset_while_idle_is_led_to_the_new_master(
    on_each_loop: Callable[[Coroutine[None, None, None]], None],
    new_place: Callable[[str], Place],
    own_valkey: Callable[[], ValkeyServer],
    clock: FakeClock,
) -> None:
    async def body() -> None:
        place, heir = new_place("sentinel"), own_valkey()
        async with open_tier(place.url, clock) as tier:
            await tier.ping()
            await place.reset(tier._client)
            sentinel = place.servers[-1]
            sentinel.start()
            sentinel.execute("SENTINEL REMOVE main")
            sentinel.execute(f"SENTINEL MONITOR main 127.0.0.1 {heir.port} 1")
            await tier.ping()

    on_each_loop(body())


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return directory / "cert.pem", directory / "key.pem"


def test_tls_works_and_a_stranger_is_refused(
    on_each_loop: Callable[[Coroutine[None, None, None]], None],
    valkey_server: ValkeyServer,
    clock: FakeClock,
    tmp_path: Path,
) -> None:
    async def body() -> None:
        cert, key = certificate(tmp_path)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, key)

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", valkey_server.port)

            async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                while data := await source.read(65_536):
                    target.write(data)
                target.close()

            await asyncio.gather(pump(reader, server_writer), pump(server_reader, writer))

        listener = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        port = listener.sockets[0].getsockname()[1]
        async with listener:
            async with open_tier(f"rediss://127.0.0.1:{port}?ssl_ca_certs={cert}", clock) as tier:
                entry = make_entry(data=bytes(range(250)) * 400)
                await tier.put(make_key(), entry, replace=False)
                assert await tier.get(make_key()) == entry
            async with open_tier(f"rediss://127.0.0.1:{port}", clock) as tier:
                with pytest.raises(TierError, match="cannot be reached"):
                    await tier.ping()

    on_each_loop(body())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:6379",
        "http://:s3cret@host",
        "redis://:s3cret@host/zero",
        "redis://:s3/cret@host",
        "redis://:s3cret@host:many",
        "redis://:s3cret@host?db=x",
        "redis://:s3cret@host?no_such_option=1",
        "rediss://:s3cret@host?ssl_cert_reqs=s3cret",
        "unix://",
        "redis+sentinel://:s3cret@host",
        "redis+sentinel://:s3cret@host/service/zero",
        "redis+sentinel://:s3cret@/service",
        "redis+sentinel://:s3cret@host:many/service",
        "redis+sentinel://:s3cret@host/service?no_such_option=1",
        "redis+cluster://",
        "redis+cluster://:s3cret@host/1",
        "redis+cluster://:s3cret@host,:7000",
        "redis+cluster://:s3cret@host?no_such_option=1",
        "redis+other://host",
    ],
)
async def test_a_url_that_cannot_work_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="the forms are redis://") as caught:
        connect(url)
    assert "cret" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://user:p%40ss@host:6380/3?health_check_interval=5",
        "rediss://host?ssl_cert_reqs=none",
        "unix:///run/redis.sock?db=1",
        "redis+sentinel://user:pw@a:1,b,[::1]:3/service/2?sentinel_username=u&sentinel_password=p",
        "rediss+sentinel://a/service",
        "redis+cluster://user:pw@a:1,b:2",
        "rediss+cluster://[::1]:1/?ssl_cert_reqs=none",
    ],
)
async def test_every_form_of_url_is_taken(url: str) -> None:
    connect(url)


async def test_a_rendition_that_is_not_listed_is_not_read(tier: RedisTier, raw: Redis) -> None:
    """Redis may evict the list before what it names; a purge would not find that, so nobody may."""
    key = make_key().rendition(b"r" * 32)
    entry = make_entry(key)
    await tier.put(key, entry, replace=False)
    await raw.delete(tier._list_name(key))
    assert await tier.get(key) is None
    assert await tier.labels(key) is None
    assert await tier.put(key, entry, replace=False)  # made again, it is listed again
    assert await tier.get(key) == entry
    assert await tier.renditions(make_key()) == [as_public(key)]


async def test_a_list_of_renditions_outlives_what_it_names(tier: RedisTier, raw: Redis) -> None:
    for number in range(3):
        key = make_key().rendition(bytes([number]) * 32)
        await tier.put(key, make_entry(key), replace=False)
        assert await raw.pttl(tier._list_name(key)) > await raw.pttl(tier._name(key)) > 0


async def test_a_list_of_renditions_does_not_grow_without_bound(
    tier: RedisTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacheserver.tiers.redis._MAX_LISTED", 3)
    keys = [make_key().rendition(bytes([number]) * 32) for number in range(4)]
    for key in keys:
        await tier.put(key, make_entry(key), replace=False)
    assert await tier.renditions(make_key()) == [as_public(keys[-1])]
    assert [await tier.get(key) is not None for key in keys] == [False, False, False, True]


async def test_a_new_connection_does_not_look_for_a_version_on_the_disk(
    valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> str:
        raise AssertionError("looked")

    client = connect(valkey_server.url)
    monkeypatch.setattr("redis.utils.get_lib_version", look)
    try:
        await asyncio.gather(*(client.ping() for _ in range(3)))  # each on a connection of its own
        assert len(client.connection_pool._available_connections) == 3  # type: ignore[union-attr] # a single server
    finally:
        await disconnect(client)


async def test_where_scripts_are_forbidden_pictures_are_found_all_the_same(
    valkey_server: ValkeyServer, raw: Redis, clock: FakeClock
) -> None:
    await raw.execute_command("ACL", "SETUSER", "unscripted", "on", "nopass", "~*", "+@all", "-@scripting")
    url = valkey_server.url.replace("://", "://unscripted:any@")
    async with open_tier(url, clock) as tier:
        keys = [make_key(f"fox {number}") for number in range(60)]
        for key in keys[::2]:
            await tier.put(key, make_entry(key), replace=True)
        assert await tier.find(keys) == [number % 2 == 0 for number in range(60)]
        assert await tier.find(keys[:1]) == [True]
