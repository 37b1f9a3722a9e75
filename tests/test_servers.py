"""The servers and the proxy that other tests rely on do what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.servers import S3Server, TcpProxy, ValkeyServer


async def _ping(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"PING\r\n")
        return await reader.readexactly(7)
    finally:
        writer.close()


def test_a_killed_valkey_comes_back_with_its_data(own_valkey: Callable[[], ValkeyServer]) -> None:
    server = own_valkey()
    server.execute("SET a 1")
    server.restart()
    assert server.execute("GET a") == b"$1\r\n1\r\n"


def test_a_killed_s3_server_comes_back_with_its_data(own_s3: Callable[[], S3Server]) -> None:
    server = own_s3()
    bucket = server.new_bucket()
    server.client.put_object(Bucket=bucket, Key="a", Body=b"1")
    server.restart()
    assert server.client.get_object(Bucket=bucket, Key="a")["Body"].read() == b"1"


def test_the_shared_servers_work(valkey_server: ValkeyServer, s3_server: S3Server) -> None:
    assert valkey_server.is_ready()
    assert s3_server.is_ready()


async def test_the_proxy_forwards_cuts_and_resumes(valkey_server: ValkeyServer) -> None:
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy:
        assert await _ping(proxy.port) == b"+PONG\r\n"
        proxy.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await _ping(proxy.port)
        proxy.resume()
        assert await _ping(proxy.port) == b"+PONG\r\n"


async def test_the_proxy_cuts_in_the_middle_of_an_answer(valkey_server: ValkeyServer) -> None:
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy:
        proxy.cut_after(3)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await _ping(proxy.port)


async def test_what_hung_in_the_proxy_goes_on_after_resume(valkey_server: ValkeyServer) -> None:
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy:
        proxy.hang()
        answer = asyncio.create_task(_ping(proxy.port))
        done, _ = await asyncio.wait([answer], timeout=0.05)
        assert not done
        proxy.resume()
        assert await answer == b"+PONG\r\n"


async def test_a_proxy_closed_on_an_open_connection_is_no_error_to_the_loop(valkey_server: ValkeyServer) -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with TcpProxy("127.0.0.1", valkey_server.port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"PING\r\n")
        assert await reader.readexactly(7) == b"+PONG\r\n"
        proxy.hang()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
    assert reported == []
