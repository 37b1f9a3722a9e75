"""Tiers that die, freeze, fail and lie while callers read: slower answers, never errors, never wrong bytes.

The working set is ten times what memory holds, so most reads reach Redis and S3. Some pictures are only in the
tier that is about to fail: those, and no others, are paid for a second time, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from cacheserver.pb import promptcache_pb2 as pb
from tests.provider import OpenAIStandIn
from tests.running import Stub, ask, calling, environment, running
from tests.servers import S3Server, TcpProxy, ValkeyServer

pytestmark = pytest.mark.no_cover

PICTURES = 100
ONLY_BELOW = 12
"""So many pictures Redis does not have."""
CALLERS = 50
READS_EACH = 8


@dataclass
class Stage:
    """A filled cache, and the parts to break."""

    stub: Stub
    provider: OpenAIStandIn
    valkey: ValkeyServer
    s3: S3Server
    s3_road: TcpProxy
    prefix: str
    wrong: int = 0
    tiers: list[int] = field(default_factory=list)

    async def read(self, number: int) -> None:
        """One read, checked. An error fails the test by itself."""
        prompt = f"picture {number}"
        response = await self.stub.GetImage(ask(prompt))
        self.wrong += response.images[0].data not in self.provider.made[prompt]
        self.tiers.append(response.status.tier)

    async def read_all(self) -> None:
        """Every picture once, so that what must be paid for is paid for."""
        await asyncio.gather(*(self.read(number) for number in range(PICTURES)))

    async def read_at_random(self) -> None:
        """Fifty callers read at random."""

        async def caller(seed: int) -> None:
            chance = Random(seed)  # noqa: S311 - which picture to read
            for _ in range(READS_EACH):
                await self.read(chance.randrange(PICTURES))

        await asyncio.gather(*map(caller, range(CALLERS)))

    async def stats(self) -> pb.GetStatsResponse:
        response: pb.GetStatsResponse = await self.stub.GetStats(pb.GetStatsRequest())
        return response

    def s3_objects(self) -> list[str]:
        listed = self.s3.client.list_objects_v2(Bucket=self.s3.bucket, Prefix=self.prefix)
        return [item["Key"] for item in listed["Contents"] if "/v1." in item["Key"]]


@pytest.fixture
async def environ(
    tmp_path: Path, own_valkey: Callable[[], ValkeyServer], own_s3: Callable[[], S3Server]
) -> AsyncIterator[tuple[dict[str, str], OpenAIStandIn, ValkeyServer, S3Server, TcpProxy]]:
    valkey, s3 = own_valkey(), own_s3()
    async with OpenAIStandIn() as provider, TcpProxy("127.0.0.1", s3.port) as s3_road:
        provider.min_image_bytes = 20_000
        env = environment(
            tmp_path,
            provider=provider,
            redis=valkey,
            s3=s3,
            memory__max_bytes=280_000,
            # Patient: a busy machine must not look like the fault of the other tier.
            redis__timeout_s=1,
            s3__read_timeout_s=6,
        )
        env["CACHESERVER_S3_ENDPOINT"] = f"http://127.0.0.1:{s3_road.port}"
        yield env, provider, valkey, s3, s3_road
        with contextlib.suppress(ProcessLookupError, AssertionError):
            valkey.cont()


@pytest.fixture
async def stage(
    environ: tuple[dict[str, str], OpenAIStandIn, ValkeyServer, S3Server, TcpProxy], tmp_path: Path
) -> AsyncIterator[Stage]:
    env, provider, valkey, s3, s3_road = environ
    async with running(env) as service, calling(service) as stub:
        stage = Stage(stub, provider, valkey, s3, s3_road, f"{tmp_path.name}/")
        await stage.read_all()
        assert provider.calls == PICTURES
        async with asyncio.timeout(30):
            while (await stage.stats()).live.held_images:
                pass  # what S3 has yet to take is in the journal, and would not be lost with S3
        await forget_in_redis(stage, range(ONLY_BELOW))
        yield stage
        s3_road.resume()
        assert stage.wrong == 0


async def forget_in_redis(stage: Stage, numbers: range) -> None:
    """Leave these pictures in S3 alone."""
    async with asyncio.timeout(10):
        while len(names_in_redis(stage)) < PICTURES:  # noqa: ASYNC110 - a server has no event to wait for
            await asyncio.sleep(0)
    for number in numbers:
        found = await stage.stub.FindCached(
            pb.FindCachedRequest(items=[pb.FindItem(spec=pb.ImageSpec(prompt=f"picture {number}"))])
        )
        identity, _, variant = found.items[0].key.rpartition(".")
        name = f"{stage.prefix.rstrip('/')}:{{{identity}}}.{variant}"
        assert stage.valkey.execute(f"DEL {name}") == b":1\r\n"
    # Reading all the others drives these out of memory.
    for number in range(ONLY_BELOW, PICTURES):
        await stage.read(number)


def names_in_redis(stage: Stage) -> list[str]:
    """The names of the entries there, as an EVAL that packs them into one reply."""
    script = f"return table.concat(redis.call('KEYS','{stage.prefix.rstrip('/')}:{{v1*'),' ')"
    return stage.valkey.execute(f'EVAL "{script}" 0').partition(b"\r\n")[2].decode().split()


async def survives(stage: Stage, breaks: Callable[[], None], *, lost: int) -> None:
    """Fifty callers read before, through and after the fault; hold what must hold."""
    stage.tiers.clear()
    during = asyncio.create_task(stage.read_at_random())
    await asyncio.sleep(0)
    breaks()
    await during
    await stage.read_all()
    await stage.read_at_random()
    stats = await stage.stats()
    assert stats.paid_unknown == lost
    assert stage.provider.calls == PICTURES + lost
    assert sum(tier != pb.TIER_MEMORY for tier in stage.tiers) >= len(stage.tiers) / 2


async def test_redis_killed(stage: Stage) -> None:
    await survives(stage, stage.valkey.kill, lost=0)


async def test_redis_frozen(stage: Stage) -> None:
    await survives(stage, stage.valkey.stop, lost=0)


async def test_s3_killed(stage: Stage) -> None:
    await survives(stage, stage.s3.kill, lost=ONLY_BELOW)


async def test_s3_frozen(stage: Stage) -> None:
    await survives(stage, stage.s3_road.hang, lost=ONLY_BELOW)


async def test_s3_answering_500(stage: Stage) -> None:
    async with failing_s3() as port:

        def breaks() -> None:
            stage.s3_road.retarget("127.0.0.1", port)

        await survives(stage, breaks, lost=ONLY_BELOW)


async def test_s3_refusing_our_credentials(
    environ: tuple[dict[str, str], OpenAIStandIn, ValkeyServer, S3Server, TcpProxy], stage: Stage, tmp_path: Path
) -> None:
    env, provider, valkey, s3, s3_road = environ
    (tmp_path / "another").mkdir()
    wrong = env | {"CACHESERVER_S3__SECRET_KEY": "not-the-secret", "CACHESERVER_DATA_DIR": str(tmp_path / "another")}
    async with running(wrong) as service, calling(service) as stub:
        refused = Stage(stub, provider, valkey, s3, s3_road, stage.prefix)
        await survives(refused, lambda: None, lost=ONLY_BELOW)
        assert refused.wrong == 0


async def test_entries_truncated_in_redis_are_counted_and_repaired_from_s3(stage: Stage) -> None:
    damaged = names_in_redis(stage)[:20]

    def breaks() -> None:
        for name in damaged:
            script = "redis.call('SET',KEYS[1],string.sub(redis.call('GET',KEYS[1]),1,9000))"
            assert stage.valkey.execute(f'EVAL "{script}" 1 {name}') == b"$-1\r\n"

    await survives(stage, breaks, lost=0)
    stats = await stage.stats()
    assert {(count.tier, count.count >= len(damaged)) for count in stats.corrupt} == {(pb.TIER_REDIS, True)}
    assert all(int(stage.valkey.execute(f"STRLEN {name}")[1:]) > 20_000 for name in damaged)


async def test_entries_flipped_in_s3_are_counted_and_never_served(stage: Stage) -> None:
    objects = stage.s3_objects()[:20]

    def breaks() -> None:
        for name in objects:
            stored = stage.s3.client.get_object(Bucket=stage.s3.bucket, Key=name)
            data = bytearray(stored["Body"].read())
            data[len(data) // 2] ^= 1
            stage.s3.client.put_object(
                Bucket=stage.s3.bucket,
                Key=name,
                Body=bytes(data),
                ContentType=stored["ContentType"],
                Metadata=stored["Metadata"],
            )
        assert stage.valkey.execute("FLUSHALL") == b"+OK\r\n"

    breaks()
    await stage.read_all()
    await stage.read_at_random()
    stats = await stage.stats()
    assert stats.paid_unknown == 0
    # What memory still had is served and never asked of S3; the rest is known to be damaged, and made anew.
    assert {count.tier: count.count for count in stats.corrupt} == {pb.TIER_S3: stage.provider.calls - PICTURES}
    assert 0 < stage.provider.calls - PICTURES <= len(objects)


@contextlib.asynccontextmanager
async def failing_s3() -> AsyncIterator[int]:
    """A server that answers every request with 500, as S3 does on its bad days."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            headers = f"Content-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(f"HTTP/1.1 500 Internal Server Error\r\n{headers}".encode() + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
