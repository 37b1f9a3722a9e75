"""Large values are laid where they stay, and everything else comes as it always did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from cacheserver.tiers.redis_client import Client, connect, disconnect
from cacheserver.tiers.redis_values import ValueInlet
from tests.servers import TcpProxy, ValkeyServer

PICTURE = bytes(range(256)) * 4_000


class Inlet:
    """An inlet whose network is the test, with the stream behind it."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.stream = asyncio.StreamReader(loop=loop)
        self.inlet = ValueInlet(self.stream, asyncio.StreamReaderProtocol(self.stream, loop=loop))

    def come(self, data: bytes, *, at_most: int = 10**9) -> None:
        """What the event loop does with what it reads, `at_most` so many bytes at a time."""
        while data:
            room = self.inlet.get_buffer(-1)
            count = min(len(room), len(data), at_most)
            room[:count] = data[:count]
            self.inlet.buffer_updated(count)
            data = data[count:]

    async def rest(self) -> bytes:
        """What has come to the stream."""
        self.inlet.eof_received()
        return await self.stream.read()


@given(size=st.integers(0, 40_000), at_most=st.sampled_from([1_000, 8_192, 10**9]), more=st.binary(max_size=20))
def test_a_value_arrives_whole_however_it_comes_and_nothing_beside_it_is_lost(
    size: int, at_most: int, more: bytes
) -> None:
    async def body() -> None:
        inlet = Inlet()
        inlet.inlet.expect()
        reply = b"$%d\r\n%b\r\n" % (size, PICTURE[:size])
        inlet.come(reply, at_most=at_most)
        inlet.come(more)
        value = await inlet.inlet.value()
        rest = await inlet.rest()
        assert (reply + more == rest) if value is None else (value == PICTURE[:size] and rest == more)
        assert size <= 8_192 or value is not None

    asyncio.run(body())


@pytest.mark.parametrize(
    "reply", [b"$-1\r\n", b"-WRONGTYPE it is a list\r\n", b"+OK\r\n", b"$15", b"$999999999\r\nx", b"*1\r\n"]
)
async def test_any_other_reply_is_the_streams(reply: bytes) -> None:
    inlet = Inlet()
    inlet.inlet.expect()
    inlet.come(reply)
    assert await inlet.inlet.value() is None
    assert await inlet.rest() == reply


async def test_a_reply_that_nobody_expected_is_the_streams_even_if_it_is_a_value() -> None:
    inlet = Inlet()
    inlet.come(reply := b"$30000\r\n" + bytes(30_002))
    assert await inlet.inlet.value() is None
    assert await inlet.rest() == reply


async def test_behind_bytes_that_nobody_has_read_no_value_is_expected() -> None:
    inlet = Inlet()
    inlet.come(b"+left behind\r\n")
    inlet.inlet.expect()
    inlet.come(b"$30000\r\n" + bytes(30_002))
    assert await inlet.inlet.value() is None


@pytest.mark.parametrize("came", [b"", b"$30000\r\n" + bytes(20_000)])
async def test_whoever_waits_for_a_value_when_the_connection_ends_hears_it_from_the_stream(came: bytes) -> None:
    for end in (ValueInlet.eof_received, lambda inlet: inlet.connection_lost(ConnectionResetError())):
        inlet = Inlet()
        inlet.inlet.expect()
        waiting = asyncio.create_task(inlet.inlet.value())
        await asyncio.sleep(0)
        inlet.come(came)
        end(inlet.inlet)
        assert await waiting is None


async def test_a_connection_keeps_nothing_of_a_value_that_it_brought() -> None:
    inlet = Inlet()
    inlet.inlet.expect()
    inlet.come(b"$30000\r\n" + bytes(30_002))
    value = await inlet.inlet.value()
    assert value is not None
    room = value.obj
    assert isinstance(room, bytearray)
    value.release()
    room.clear()  # BufferError while there is a view of it


async def give_up_amid(inlet: Inlet) -> None:
    """Wait for a value of 30,000 bytes, and no longer once 20,000 are there."""
    inlet.inlet.expect()
    inlet.come(b"$30000\r\n" + bytes(20_000))
    waiting = asyncio.create_task(inlet.inlet.value())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_value_that_nobody_waits_for_any_more_is_dropped() -> None:
    inlet = Inlet()
    await give_up_amid(inlet)
    inlet.come(bytes(10_002))
    assert await inlet.rest() == b""


async def test_an_inlet_owes_a_value_from_when_it_is_expected_until_somebody_has_it() -> None:
    inlet = Inlet()
    assert not inlet.inlet.is_owing
    inlet.inlet.expect()
    assert inlet.inlet.is_owing
    inlet.come(b"$30000\r\n" + bytes(30_002))
    assert inlet.inlet.is_owing
    await inlet.inlet.value()
    assert not inlet.inlet.is_owing
    await give_up_amid(inlet)
    assert inlet.inlet.is_owing
    inlet.come(bytes(10_002))
    assert inlet.inlet.is_owing  # its reader is gone: whatever comes next is not what the next command asks for


@pytest_asyncio.fixture
async def client(valkey_server: ValkeyServer) -> AsyncIterator[Client]:
    client = connect(valkey_server.url, timeout_s=5.0, connect_timeout_s=5.0, max_connections=1)
    yield client
    await disconnect(client)


async def test_a_large_value_is_a_view_into_the_buffer_it_came_into(client: Client) -> None:
    await client.set("large", PICTURE)
    value = await client.execute_command("GETRANGE", "large", 0, 10**7)
    assert isinstance(value, memoryview)
    assert value.readonly
    assert value == PICTURE
    # What asks for values in any other way is answered as ever, and so is what is too small to matter.
    assert await client.get("large") == PICTURE
    assert await client.execute_command("GETRANGE", "large", 0, 9) == PICTURE[:10]
    assert await client.execute_command("GETRANGE", "absent", 0, 9) == b""


async def test_a_value_that_hangs_half_way_costs_its_connection_alone(valkey_server: ValkeyServer) -> None:
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy:
        client = connect(f"redis://127.0.0.1:{proxy.port}", timeout_s=5.0, connect_timeout_s=5.0, max_connections=1)
        await client.set("large", PICTURE)
        await client.set("other", PICTURE[::-1])
        proxy.hang()
        read = asyncio.create_task(client.execute_command("GETRANGE", "large", 0, 10**7))
        for _ in range(20):
            await asyncio.sleep(0)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        proxy.resume()
        assert await client.execute_command("GETRANGE", "other", 0, 10**7) == PICTURE[::-1]
        await disconnect(client)


async def test_a_connection_that_owes_a_value_is_lent_to_nobody_and_takes_no_command(client: Client) -> None:
    await client.set("one", PICTURE)
    await client.set("two", PICTURE[::-1])
    assert isinstance(client, Redis)
    pool = client.connection_pool
    for leaves_by in ("never read", "read in vain"):
        connection = await pool.get_connection()
        await connection.read_response(timeout=0.0)  # it has read before: that is when values are expected
        await connection.send_command("GETRANGE", "one", 0, 10**7)
        if leaves_by == "read in vain":
            await connection.read_response(timeout=0.0)  # as of pubsub: redis-py keeps the connection
        with pytest.raises(RedisConnectionError):
            await connection.send_command("GETRANGE", "two", 0, 10**7)
        await connection.send_command("GETRANGE", "one", 0, 10**7)
        await pool.release(connection)
        assert await client.execute_command("GETRANGE", "two", 0, 10**7) == PICTURE[::-1]


async def test_a_redis_py_that_reads_in_another_way_gets_its_answers_all_the_same(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read_response(connection: AbstractConnection, **_: object) -> object:
        return await connection._parser.read_response()

    monkeypatch.setattr(AbstractConnection, "read_response", read_response)
    await client.set("large", PICTURE)
    for _ in range(3):
        async with asyncio.timeout(5):
            assert await client.execute_command("GETRANGE", "large", 0, 10**7) == PICTURE
