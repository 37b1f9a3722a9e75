"""Callers in Python, for what h2load cannot do: a stream of batches, and our own client against generated stubs.

    python -m scripts.bench.hit_clients batch|stubs|multiplex HOST:PORT REQUEST --token T --at-a-time 16

REQUEST is a file of GetImage requests as gRPC messages; each has a request_id of its own when it is sent. Every answer
must bring as many bytes as --answer-bytes says, at least.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
import uvloop

from cacheserver.client import AsyncClient
from cacheserver.client import ImageSpec as Spec
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb.promptcache_pb2_grpc import PromptCacheServiceStub
from cacheserver.rpc import wire
from scripts.bench.framing import messages_of
from scripts.bench.obedient import obey, obey_in_bulk

_BATCH = "/promptcache.v1.PromptCacheService/BatchGetImages"
_TIMEOUT_S = 60.0
_OPTIONS = (("grpc.max_receive_message_length", -1),)


class Kind(StrEnum):
    """How pictures are asked for."""

    BATCH = "batch"
    STUBS = "stubs"
    MULTIPLEX = "multiplex"


class Batches:
    """One BatchGetImages stream, with so many requests in flight: what came free is asked for again in one message."""

    def __init__(
        self, channel: grpc.aio.Channel, request: pb.GetImageRequest, *, token: str, answer_bytes: int
    ) -> None:
        self._call: Any = channel.stream_stream(_BATCH)(metadata=(("authorization", f"Bearer {token}"),))
        self._request = request
        self._answer_bytes = answer_bytes
        self._numbers = itertools.count(1)
        self._begun_s: dict[bytes, float] = {}

    async def ask(self, count: int, *, at_a_time: int) -> list[float]:
        """Have so many answered: how long each took, in microseconds."""
        us: list[float] = []
        asked = 0
        free = at_a_time
        while len(us) < count:
            more = min(free, count - asked)
            if more:
                await self._call.write(self._message(more))
                asked += more
            raw = await self._call.read()
            if raw is grpc.aio.EOF:
                raise RuntimeError("the stream ended")
            free = self._count(raw, us)
        return us

    def _message(self, count: int) -> bytes:
        message = pb.BatchGetImagesRequest()
        now_s = time.perf_counter()
        for _ in range(count):
            request_id = str(next(self._numbers))
            self._begun_s[request_id.encode()] = now_s
            self._request.request_id = request_id
            message.requests.append(self._request)
        return message.SerializeToString()

    def _count(self, raw: bytes, us: list[float]) -> int:
        """Note the items of a message: how many they are."""
        now_s, items = time.perf_counter(), wire.fields(raw) or []
        for *_, value, end in items:
            # Only looked at, as the picture need not be copied: its request_id comes before the answer.
            parts = {number: span for number, _, *span in wire.fields(raw, value, end) or []}
            start, stop = parts.get(pb.BatchItem.RESPONSE_FIELD_NUMBER, (0, 0))
            if stop - start < self._answer_bytes:
                raise RuntimeError("an item brought no picture")
            start, stop = parts[pb.BatchItem.REQUEST_ID_FIELD_NUMBER]
            us.append((now_s - self._begun_s.pop(raw[start:stop])) * 1e6)
        return len(items)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, for what, and how many at a time; an answer brings `least` bytes or more."""

    address: str
    request: pb.GetImageRequest
    token: str
    least: int
    at_a_time: int

    async def by_stubs(self) -> None:
        """Each request as a call of its own, through the generated client."""
        async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
            stub: Any = PromptCacheServiceStub(channel)  # type: ignore[no-untyped-call] # generated without types
            metadata = (("authorization", f"Bearer {self.token}"),)

            async def once() -> None:
                response = await stub.GetImage(self.request, metadata=metadata, timeout=_TIMEOUT_S)
                self._check(response.images[0].data)

            await obey(once, at_a_time=self.at_a_time)

    async def by_client(self) -> None:
        """Through our own client, which has all of them share a stream."""
        asked = self.request.spec
        spec = Spec(asked.prompt, size=asked.size, quality=asked.quality)
        async with AsyncClient(self.address, token=self.token, multiplex=True) as client:  # type: ignore[call-arg] # new

            async def once() -> None:
                self._check((await client.get_image(spec)).data)

            await obey(once, at_a_time=self.at_a_time)

    async def by_batches(self) -> None:
        """As items of one stream."""
        async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
            batches = Batches(channel, self.request, token=self.token, answer_bytes=self.least)
            await obey_in_bulk(lambda count: batches.ask(count, at_a_time=self.at_a_time))

    def _check(self, data: bytes) -> None:
        if len(data) < self.least:
            raise RuntimeError("an answer brought no picture")


def main(  # noqa: PLR0913 - options
    kind: Annotated[Kind, typer.Argument(help="How pictures are asked for.")],
    address: Annotated[str, typer.Argument(help="Server, as host:port.")],
    request_file: Annotated[Path, typer.Argument(metavar="REQUEST", help="File of the request.")],
    *,
    token: Annotated[str, typer.Option(help="Bearer token.")],
    answer_bytes: Annotated[int, typer.Option(help="Bytes of an answer, at least.")],
    at_a_time: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Ask for a picture as often as standard input says."""
    request = pb.GetImageRequest.FromString(next(messages_of(request_file.read_bytes())))
    caller = Caller(address, request, token, answer_bytes, at_a_time)
    ways = {Kind.BATCH: caller.by_batches, Kind.STUBS: caller.by_stubs, Kind.MULTIPLEX: caller.by_client}
    uvloop.run(ways[kind]())


if __name__ == "__main__":
    typer.run(main)
