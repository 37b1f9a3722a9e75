"""Replicas that show themselves in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest

from cacheserver.control.replicas import Replicas
from cacheserver.control.scripts import run_script
from cacheserver.errors import ConfigError
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.servers import ValkeyServer
from tests.waiting import until

PREFIXES = (f"replicas-{n}:" for n in itertools.count())
ONE, OTHER = "1" * 16, "2" * 16


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Client]:
    client = connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0)
    yield client
    await disconnect(client)


@pytest.fixture
def prefix() -> str:
    return next(PREFIXES)


async def test_a_replica_keeps_its_id_with_its_data(tmp_path: Path, clock: FakeClock) -> None:
    first = await Replicas.open(tmp_path / "a", clock=clock, client=None, prefix="")
    again = await Replicas.open(tmp_path / "a", clock=clock, client=None, prefix="")
    other = await Replicas.open(tmp_path / "b", clock=clock, client=None, prefix="")
    assert first.id == again.id != other.id
    assert len(bytes.fromhex(first.id)) == 8


async def test_a_file_that_holds_no_id_is_refused(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "replica_id").write_text("../../x")
    with pytest.raises(ConfigError, match="delete the file"):
        await Replicas.open(tmp_path, clock=clock, client=None, prefix="")


async def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, clock: FakeClock) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data_dir: cannot make or read"):
        await Replicas.open(tmp_path / "file", clock=clock, client=None, prefix="")


async def test_without_redis_a_replica_is_alone(clock: FakeClock) -> None:
    alone = Replicas(ONE, clock=clock, client=None, prefix="")
    await alone.start()
    await alone.beat()
    assert (alone.live, alone.redis_is_lost) == (1, False)
    await alone.aclose()


async def test_replicas_count_one_another_and_who_leaves_is_gone_at_once(
    clock: FakeClock, client: Client, prefix: str
) -> None:
    one, other = (Replicas(name, clock=clock, client=client, prefix=prefix) for name in (ONE, OTHER))
    await one.start()
    assert one.live == 1
    await other.start()
    assert other.live == 2
    clock.advance(5)
    await until(lambda: one.live == 2)
    await other.aclose()
    clock.advance(5)
    await until(lambda: one.live == 1)
    await one.aclose()
    assert clock.sleepers == 0


async def test_who_was_silent_too_long_is_not_counted(clock: FakeClock, client: Client, prefix: str) -> None:
    one = Replicas(ONE, clock=clock, client=client, prefix=prefix)
    seconds, _ = await client.time()
    await client.zadd(one.name_in_redis, {OTHER: seconds - 20, "3" * 16: seconds - 40})
    await one.beat()
    assert one.live == 2


async def test_what_was_last_known_holds_while_redis_is_lost(
    clock: FakeClock, own_valkey: Callable[[], ValkeyServer]
) -> None:
    valkey = own_valkey()
    client = connect(valkey.url, timeout_s=5.0, connect_timeout_s=5.0)
    one, other = (Replicas(name, clock=clock, client=client, prefix="") for name in (ONE, OTHER))
    await one.beat()
    await other.beat()
    valkey.kill()
    await other.beat()
    assert (other.live, other.redis_is_lost) == (2, True)
    await other.aclose()
    valkey.start()
    await other.beat()
    assert not other.redis_is_lost
    await disconnect(client)


async def test_a_server_that_forgot_a_script_is_told_it_again(client: Client, prefix: str) -> None:
    count, name = "return redis.call('INCR', KEYS[1])", f"{prefix}count"
    for times in (1, 2):
        assert await run_script(client, count, [name], [], timeout_s=30) == times
    await client.script_flush()
    assert await run_script(client, count, [name], [], timeout_s=30) == 3


async def test_a_cancellation_that_the_client_swallows_still_ends_the_task() -> None:
    class Swallowing:
        async def evalsha(self, *_: object) -> int:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return 1

    task = asyncio.create_task(run_script(cast("Client", Swallowing()), "", [], [], timeout_s=30))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
