"""What hits are held against: bare servers that answer every call with the same stored bytes, and do nothing else.

    python -m scripts.bench.hit_floors ANSWER --method /package.Service/Method [--uvloop | --tuned]

ANSWER is a file of gRPC messages, each with its prefix of five bytes, as one answer brings them over the wire; without
any every call fails with NOT_FOUND. The server is grpcio's for asyncio on asyncio's own loop and with no options. With
`--uvloop` it is on that; with `--tuned` it also has our options and our allocator, and the loop's thread goes
first as in ours. With --redis or --s3 (`http://host:port/bucket`, credentials where boto3 finds them) the first message
is stored there, and fetched anew for each call. It prints the port it listens on.

With --alone there is no server: it fetches as often as standard input says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import grpc
import typer
import uvloop
from redis.asyncio import Redis

from cacheserver import allocator, loop_first
from cacheserver.rpc.server import SERVER_OPTIONS
from cacheserver.settings.schema import S3Settings
from cacheserver.tiers.s3_client import new_client, new_session
from scripts.bench.framing import messages_of
from scripts.bench.obedient import obey

Fetch = Callable[[], Awaitable[bytes]]

_NAME = "floor"
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Floor:
    """What to be, as `main` is told it."""

    method: str
    messages: tuple[bytes, ...]
    tuned: bool
    options: tuple[tuple[str, Any], ...]
    redis: str
    s3: str
    alone: int


def _handler(messages: Sequence[bytes]) -> grpc.RpcMethodHandler[Any, Any]:
    """The least that can be done for each call: nothing is parsed, and what is sent lies ready."""

    async def fail(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "not cached")
        raise AssertionError("abort raises")

    async def answer(_: bytes, __: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return messages[0]

    async def stream(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        for message in messages:
            await context.write(message)

    if len(messages) > 1:
        return grpc.unary_stream_rpc_method_handler(stream)
    return grpc.unary_unary_rpc_method_handler(answer if messages else fail)


def _fetching(fetch: Fetch) -> grpc.RpcMethodHandler[Any, Any]:
    async def answer(_: bytes, __: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return await fetch()

    return grpc.unary_unary_rpc_method_handler(answer)


async def _from_redis(url: str, value: bytes) -> Fetch:
    """GET of redis-py as it comes, with hiredis."""
    client = Redis.from_url(url)
    await client.set(_NAME, value)

    async def fetch() -> bytes:
        data = await client.get(_NAME)
        return cast("bytes", data)

    return fetch


async def _from_s3(url: str, value: bytes) -> Fetch:
    """get_object of boto3 with our client's options, in as many threads as we have."""
    endpoint, _, bucket = url.rpartition("/")
    threads = S3Settings().threads
    client = new_client(
        new_session(None, None),
        endpoint=endpoint,
        region="us-east-1",
        connect_timeout_s=_TIMEOUT_S,
        timeout_s=_TIMEOUT_S,
        connections=threads,
    )
    client.put_object(Bucket=bucket, Key=_NAME, Body=value)
    loop, pool = asyncio.get_running_loop(), loop_first.pool(threads, "boto3")

    def read() -> bytes:
        return client.get_object(Bucket=bucket, Key=_NAME)["Body"].read()

    async def fetch() -> bytes:
        return await loop.run_in_executor(pool, read)

    return fetch


async def _serve(handler: grpc.RpcMethodHandler[Any, Any], floor: Floor) -> None:
    """Serve one method until the process ends."""
    server = grpc.aio.server(options=floor.options)
    _, service, name = floor.method.split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    if floor.tuned:
        loop_first.others_give_way()
    print(port, flush=True)
    await server.wait_for_termination()


async def _run(floor: Floor) -> None:
    fetch = None
    if floor.redis:
        fetch = await _from_redis(floor.redis, floor.messages[0])
    elif floor.s3:
        fetch = await _from_s3(floor.s3, floor.messages[0])
    if fetch is not None and floor.alone:
        await obey(fetch, at_a_time=floor.alone)
    else:
        handler = _handler(floor.messages) if fetch is None else _fetching(fetch)
        await _serve(handler, floor)


def option(text: str) -> tuple[str, Any]:
    """A channel argument as `name=value`; a whole number is one."""
    name, _, value = text.partition("=")
    return name, int(value) if value.lstrip("-").isdigit() else value


def main(  # noqa: PLR0913 - options
    answer_file: Annotated[Path, typer.Argument(metavar="ANSWER", help="File of the gRPC messages of one answer.")],
    *,
    method: Annotated[str, typer.Option(help="Path of the rpc.")] = "/none/None",
    tuned: Annotated[bool, typer.Option("--tuned", help="On uvloop and with our options.")] = False,
    options: Annotated[list[str] | None, typer.Option("--option", help="A channel argument more: name=value.")] = None,
    on_uvloop: Annotated[bool, typer.Option("--uvloop", help="On uvloop.")] = False,
    redis: Annotated[str, typer.Option(help="Fetch the answer from this Redis.")] = "",
    s3: Annotated[str, typer.Option(help="Fetch the answer from this bucket.")] = "",
    alone: Annotated[int, typer.Option(help="Fetch so many at a time, without a server.")] = 0,
) -> None:
    """Answer every call with the same bytes."""
    floor = Floor(
        method=method,
        messages=tuple(messages_of(answer_file.read_bytes())),
        tuned=tuned,
        options=(*(SERVER_OPTIONS if tuned else ()), *map(option, options or ())),
        redis=redis,
        s3=s3,
        alone=alone,
    )
    if tuned:
        allocator.set_up()
    if tuned or on_uvloop or alone:
        uvloop.run(_run(floor))
    else:
        asyncio.run(_run(floor))


if __name__ == "__main__":
    typer.run(main)
