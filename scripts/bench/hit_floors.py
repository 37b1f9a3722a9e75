"""What hits are held against: bare servers that answer every call with the same stored bytes, and do nothing else.

    python -m scripts.bench.hit_floors ANSWER --method /package.Service/Method [--tuned]

ANSWER is a file of gRPC messages, each with its prefix of five bytes, as one answer brings them over the wire; without
any every call fails with NOT_FOUND. The server is grpcio's for asyncio on asyncio's own loop and with no options, or
`--tuned`: on uvloop, with the options of our own. It prints the port that it listens on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
import uvloop

from cacheserver.rpc.server import SERVER_OPTIONS

PREFIX_BYTES = 5
"""Of each gRPC message on the wire: whether it is compressed, and its length."""

_Handler = Callable[[bytes, "grpc.aio.ServicerContext[bytes, bytes]"], Awaitable[Any]]


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, its length, itself."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def messages_of(answer: bytes) -> Iterator[bytes]:
    """The messages of an answer as it comes over the wire."""
    at = 0
    while at < len(answer):
        start = at + PREFIX_BYTES
        at = start + int.from_bytes(answer[at + 1 : start], "big")
        yield answer[start:at]


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


async def serve(method: str, handler: grpc.RpcMethodHandler[Any, Any], options: Sequence[tuple[str, Any]]) -> None:
    """Serve one method until the process ends."""
    server = grpc.aio.server(options=options)
    _, service, name = method.split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def option(text: str) -> tuple[str, Any]:
    """A channel argument as `name=value`; a whole number is one."""
    name, _, value = text.partition("=")
    return name, int(value) if value.lstrip("-").isdigit() else value


def main(
    answer_file: Annotated[Path, typer.Argument(metavar="ANSWER", help="File of the gRPC messages of one answer.")],
    *,
    method: Annotated[str, typer.Option(help="Path of the rpc.")],
    tuned: Annotated[bool, typer.Option("--tuned", help="On uvloop and with our options.")] = False,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="A further channel argument: name=value.")
    ] = None,
) -> None:
    """Answer every call with the same bytes."""
    handler = _handler(tuple(messages_of(answer_file.read_bytes())))
    further = [option(each) for each in options or ()]
    if tuned:
        uvloop.run(serve(method, handler, (*SERVER_OPTIONS, *further)))
    else:
        asyncio.run(serve(method, handler, further))


if __name__ == "__main__":
    typer.run(main)
