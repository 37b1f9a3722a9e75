"""Several processes on one port, as an operator runs them: each service here is one command and its real workers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cacheserver.app.merged_metrics import MergedMetrics
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from tests.provider import OpenAIStandIn
from tests.running import Stub, ask, environment
from tests.servers import S3Server, TcpProxy, ValkeyServer
from tests.test_startup import Process, refusal, serving
from tests.waiting import until


def workers_of(process: Process) -> list[int]:
    """The process ids of the workers of a service."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in children}
    return [pid for pid, line in lines.items() if line.exists() and b"cacheserver.app.worker" in line.read_bytes()]


async def connected(stack: AsyncExitStack, address: str) -> Stub:
    """A client on a connection of its own."""
    channel = await stack.enter_async_context(
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
    )
    return pb_grpc.PromptCacheServiceStub(channel)  # type: ignore[no-untyped-call] # generated code


async def count(http_address: str, name: str, **labels: str) -> float:
    """The sum of all samples of a name on the metrics page."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        answer = await http.get(f"http://{http_address}/metrics")
    families = text_string_to_metric_families(answer.raise_for_status().text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(each.value for each in samples if labels.items() <= each.labels.items())


@pytest.fixture
def env(tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer, s3_server: S3Server) -> dict[str, str]:
    """A service of two workers, on servers that all tests share."""
    return environment(tmp_path, provider=provider, redis=valkey_server, s3=s3_server, server__workers=2)


async def test_one_that_is_killed_is_started_again_and_no_sum_falls(env: dict[str, str]) -> None:
    async with serving(env) as process, AsyncExitStack() as stack:
        told = await process.logged("all_serving")
        for _ in range(8):
            await (await connected(stack, told["grpc"])).GetImage(ask())
        assert await count(told["http"], "cacheserver_requests_total") == 8
        os.kill(workers_of(process)[0], signal.SIGKILL)
        await process.logged("worker_restarted")
        assert len(workers_of(process)) == 2
        for _ in range(8):
            await (await connected(stack, told["grpc"])).GetImage(ask())
        assert await count(told["http"], "cacheserver_requests_total") == 16
        assert await count(told["http"], "cacheserver_worker_restarts_total") == 1
        assert await count(told["http"], "cacheserver_workers") == 2


async def test_whoever_answers_tells_what_all_counted_and_each_workers_gauges(env: dict[str, str]) -> None:
    async with serving(env) as process, AsyncExitStack() as stack:
        told = await process.logged("all_serving")
        for number in range(16):
            await (await connected(stack, told["grpc"])).GetImage(ask())
            assert await count(told["http"], "cacheserver_requests_total") == number + 1
        gauges = [await count(told["http"], "cacheserver_resident_bytes", worker=worker) for worker in ("0", "1")]
        assert all(gauges)
        async with httpx.AsyncClient(trust_env=False) as http:
            ready = await http.get(f"http://{told['http']}/readyz")
        assert ready.json() == {"status": "ready", "tiers": {"redis": "ok", "s3": "ok"}}


async def test_one_prompt_is_paid_for_once_whichever_worker_is_asked(
    env: dict[str, str], provider: OpenAIStandIn
) -> None:
    async with serving(env) as process, AsyncExitStack() as stack:
        told = await process.logged("all_serving")
        stubs = [await connected(stack, told["grpc"]) for _ in range(16)]
        answers = await asyncio.gather(*(stub.GetImage(ask()) for stub in stubs))
    assert len({answer.images[0].data for answer in answers}) == 1
    assert provider.calls == 1


async def test_sigterm_has_every_worker_answer_what_it_began(env: dict[str, str], provider: OpenAIStandIn) -> None:
    async with serving(env) as process, AsyncExitStack() as stack:
        told = await process.logged("all_serving")
        stubs = [await connected(stack, told["grpc"]) for _ in range(8)]
        provider.hold()
        calls = [asyncio.ensure_future(stub.GetImage(ask(f"fox {n}"))) for n, stub in enumerate(stubs)]
        await until(lambda: provider.calls == 8)
        process.signal(signal.SIGTERM)
        await process.logged("draining")
        provider.release()
        assert [len(answer.images) for answer in await asyncio.gather(*calls)] == [1] * 8
        assert await process.ended() == 0
    assert workers_left(process.lines) == 0


def workers_left(lines: list[str]) -> int:
    """How many workers had to be killed."""
    return sum('"worker_killed"' in line for line in lines)


async def test_what_keeps_a_worker_from_starting_ends_the_service_with_one_line(
    env: dict[str, str], tmp_path: Path
) -> None:
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("no certificate")
    files = {"CACHESERVER_SERVER__TLS_CERT_FILE": str(no_pem), "CACHESERVER_SERVER__TLS_KEY_FILE": str(no_pem)}
    assert "are no PEM certificate chain" in await refusal(env | files)


async def test_workers_without_a_store_to_share_are_refused(tmp_path: Path) -> None:
    line = await refusal(environment(tmp_path, server__workers=2))
    assert "server.workers: several share budgets and leases through Redis and pictures through S3" in line


async def test_a_port_that_another_service_has_is_not_shared_with_it(env: dict[str, str], tmp_path: Path) -> None:
    async with serving(env) as process:
        told = await process.logged("all_serving")
        port = told["grpc"].rpartition(":")[2]
        other = {"CACHESERVER_GRPC_PORT": port, "CACHESERVER_DATA_DIR": str(tmp_path / "other")}
        assert f"cannot listen on 127.0.0.1:{port}" in await refusal(env | other)


async def test_the_journal_of_a_worker_that_is_no_more_is_drained(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer, own_s3: Callable[[], S3Server]
) -> None:
    s3 = own_s3()

    def journal(worker: str) -> list[Path]:
        return list((tmp_path / worker / "journal").glob("[0-9]*"))

    def objects() -> int:
        listed = s3.client.list_objects_v2(Bucket=s3.bucket).get("Contents", [])
        return sum(f"{tmp_path.name}/v1" in each["Key"] for each in listed)

    async with TcpProxy("127.0.0.1", s3.port) as proxy:
        env = environment(tmp_path, provider=provider, redis=valkey_server, s3=s3, server__workers=2)
        env["CACHESERVER_S3_ENDPOINT"] = f"http://127.0.0.1:{proxy.port}"
        async with serving(env) as process, AsyncExitStack() as stack:
            told = await process.logged("all_serving")
            proxy.cut()
            for number in range(16):
                await (await connected(stack, told["grpc"])).GetImage(ask(f"fox {number}"))
            assert journal("")
            assert journal("worker-1")
            for pid in workers_of(process):
                os.kill(pid, signal.SIGKILL)
            process.signal(signal.SIGKILL)
            await process.ended()
        assert journal("worker-1")
        proxy.resume()
        async with serving(env | {"CACHESERVER_SERVER__WORKERS": "1"}) as process:
            await process.logged("leftover_drained")
            assert not journal("worker-1")
            await until(lambda: not journal(""))
            process.signal(signal.SIGTERM)
            assert await process.ended() == 0
        assert objects() == 16
        async with serving(env | {"CACHESERVER_SERVER__WORKERS": "1"}) as process:
            await process.logged("serving")  # as one process: nothing is left over
            assert not workers_of(process)


async def test_the_supervisors_end_is_that_of_its_workers(env: dict[str, str]) -> None:
    async with serving(env) as process:
        await process.logged("all_serving")
        workers = workers_of(process)
        process.signal(signal.SIGKILL)
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), within_s=30.0)


class TestMergedMetrics:
    PAGE = (
        b'# HELP hits_total Hits\n# TYPE hits_total counter\nhits_total{tier="redis"} %d\n'
        b'# HELP hits_created Hits\n# TYPE hits_created gauge\nhits_created{tier="redis"} 1.7e9\n'
        b"# HELP depth Depth\n# TYPE depth gauge\ndepth %d\n"
        b'# HELP s Time\n# TYPE s histogram\ns_bucket{le="1.0"} 1\ns_bucket{le="+Inf"} %d\ns_count %d\ns_sum 3\n'
    )

    def test_counts_are_summed_and_gauges_told_apart(self) -> None:
        merged = MergedMetrics()
        merged.take("0", self.PAGE % (3, 7, 2, 2))
        merged.take("1", self.PAGE % (4, 9, 1, 1))
        lines = merged.page().decode().splitlines()
        assert 'hits_total{tier="redis"} 7.0' in lines
        assert [line for line in lines if line.startswith("depth")] == [
            'depth{worker="0"} 7.0',
            'depth{worker="1"} 9.0',
        ]
        assert [line for line in lines if line.startswith("s_")] == [
            's_bucket{le="1.0"} 2.0',
            's_bucket{le="+Inf"} 3.0',
            "s_count 3.0",
            "s_sum 6.0",
        ]
        assert not any("hits_created" in line for line in lines)

    def test_what_one_that_ended_had_counted_stays_and_its_gauges_go(self) -> None:
        merged = MergedMetrics()
        for _ in range(3):  # lives
            merged.take("0", self.PAGE % (3, 7, 2, 2))
            merged.ended("0")
        merged.ended("0")  # it ended before anybody asked
        merged.take("0", self.PAGE % (1, 8, 1, 1))
        lines = merged.page().decode().splitlines()
        assert 'hits_total{tier="redis"} 10.0' in lines
        assert [line for line in lines if line.startswith("depth")] == ['depth{worker="0"} 8.0']
