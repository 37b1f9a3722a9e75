"""SIGHUP brings a changed file into force, and a bad one leaves all as it was; each service is a real process."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from tests.provider import API_KEY, OpenAIStandIn
from tests.running import ask, environment
from tests.servers import S3Server, ValkeyServer
from tests.test_startup import Process, serving
from tests.test_workers import count

PERMISSIONS = '["read", "generate"]'


class File:
    """The configuration file of a service, written anew piece by piece."""

    def __init__(self, path: Path, provider: OpenAIStandIn) -> None:
        self.path = path
        self.token = "first-token"
        self.namespaces = "[namespaces.default]"
        self.budget = "[budget]\nper_day_microusd = 100_000_000"
        self.upstream = f'base_url = "{provider.base_url}"\napi_key = "{API_KEY}"'
        self.more = ""
        self.has_callers = True
        self.write()

    def write(self) -> None:
        digest = hashlib.sha256(self.token.encode()).hexdigest()
        caller = f'[[callers]]\nname = "shop"\ntoken_sha256 = "{digest}"\nnamespaces = ["*"]\nallow = {PERMISSIONS}'
        upstream = f'[[upstreams]]\nname = "openai"\n{self.upstream}'
        callers = caller if self.has_callers else ""
        self.path.write_text(f"{self.more}\n{self.budget}\n{self.namespaces}\n{callers}\n{upstream}\n")


class Running:
    """A service that reads the file."""

    def __init__(self, process: Process, file: File, told: dict[str, Any]) -> None:
        self.process = process
        self.file = file
        self.http = str(told["http"])
        self._grpc = str(told["grpc"])

    async def reload(self, event: str = "config_reloaded") -> dict[str, Any]:
        """Write the file, send SIGHUP and wait until the service has said what came of it."""
        self.file.write()
        self.process.signal(signal.SIGHUP)
        return await self.process.logged(event)

    async def get(self, prompt: str = "a red fox", *, token: str = "", **fields: object) -> pb.GetImageResponse:
        """The answer to a call, on a connection of its own."""
        metadata = (("authorization", f"Bearer {token or self.file.token}"),)
        async with grpc.aio.insecure_channel(self._grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: Any = pb_grpc.PromptCacheServiceStub(channel)  # type: ignore[no-untyped-call] # generated code
            answer: pb.GetImageResponse = await stub.GetImage(ask(prompt, **fields), metadata=metadata)
            return answer

    async def refusal(self, prompt: str = "a red fox", *, token: str = "", **fields: object) -> grpc.StatusCode:
        """The code of a call that fails."""
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await self.get(prompt, token=token, **fields)
        return failed.value.code()


@pytest.fixture
def file(tmp_path: Path, provider: OpenAIStandIn) -> File:
    return File(tmp_path / "cacheserver.toml", provider)


@asynccontextmanager
async def running(tmp_path: Path, file: File, redis: ValkeyServer) -> AsyncIterator[Running]:
    env = environment(tmp_path, redis=redis) | {"CACHESERVER_CONFIG": str(file.path)}
    async with serving(env) as process:
        yield Running(process, file, await process.logged("serving"))


@pytest.fixture
async def service(tmp_path: Path, file: File, valkey_server: ValkeyServer) -> AsyncIterator[Running]:
    async with running(tmp_path, file, valkey_server) as service:
        yield service


async def test_a_callers_new_token_holds_and_the_old_one_no_more(service: Running) -> None:
    await service.get()
    await service.get()  # known by its bytes from now on
    service.file.token = "second-token"
    assert (await service.reload())["restart_needed_for"] == "nothing"
    assert (await service.get()).status.tier == pb.TIER_MEMORY
    assert await service.refusal(token="first-token") is grpc.StatusCode.UNAUTHENTICATED


async def test_a_namespace_comes_changes_and_goes(service: Running, tmp_path: Path) -> None:
    assert await service.refusal(namespace="shop") is grpc.StatusCode.INVALID_ARGUMENT
    service.file.namespaces = "[namespaces.shop]\nmax_variants = 3"
    await service.reload()
    await service.get(namespace="shop")
    await service.get(namespace="shop")
    denied = tmp_path / "denied.txt"
    denied.write_text("fox\n")
    service.file.namespaces += f'\ndeny_file = "{denied}"'
    await service.reload()
    assert await service.refusal(namespace="shop") is grpc.StatusCode.FAILED_PRECONDITION  # though it was a known hit
    await service.get("a blue whale", namespace="shop")
    service.file.namespaces = "[namespaces.default]"
    await service.reload()
    assert await service.refusal(namespace="shop") is grpc.StatusCode.INVALID_ARGUMENT


async def test_similar_hits_end_and_come_back_with_the_file(service: Running) -> None:
    made = (await service.get("a red fox, 8k")).images[0].key
    assert (await service.get("Please draw a red fox, 8 k")).status.matched_key == made
    service.file.more = "[similarity]\nenabled = false"
    assert (await service.reload())["restart_needed_for"] == "nothing"
    assert (await service.get("red fox!")).status.tier == pb.TIER_UPSTREAM
    service.file.more = ""
    await service.reload()
    assert (await service.get("a Red Fox")).status.matched == pb.MATCH_LEVEL_CANONICAL


async def test_a_budget_is_lowered_and_raised_and_what_was_spent_of_it_stays_spent(service: Running) -> None:
    paid = (await service.get()).images[0].paid_microusd
    assert paid > 0
    service.file.budget = f"[budget]\nper_day_microusd = {paid}"
    await service.reload()
    assert await service.refusal("a blue whale") is grpc.StatusCode.RESOURCE_EXHAUSTED
    service.file.budget = "[budget]\nper_day_microusd = 100_000_000"
    await service.reload()
    await service.get("a blue whale")


async def test_a_new_budget_counts_what_was_spent_before_it_was_there(service: Running) -> None:
    paid = (await service.get()).images[0].paid_microusd
    service.file.namespaces = f"[namespaces.default]\nper_month_microusd = {paid}"
    await service.reload()
    assert await service.refusal("a blue whale") is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_prices_hold_for_what_is_bought_and_saved_from_then_on(service: Running) -> None:
    paid = (await service.get()).images[0].paid_microusd
    service.file.upstream += "\nprice_factor = 0.5"
    await service.reload()
    assert (await service.get()).status.saved_microusd == pytest.approx(paid / 2, abs=1)
    assert (await service.get("a blue whale")).status.cost_microusd == pytest.approx(paid / 2, abs=1)


async def test_an_upstreams_new_key_is_used_and_calls_under_way_keep_the_old_one(
    service: Running, provider: OpenAIStandIn
) -> None:
    provider.hold()
    under_way = asyncio.create_task(service.get())
    await provider.arrived(1)
    service.file.upstream = service.file.upstream.replace(API_KEY, "sk-nobody-knows")
    await service.reload()
    provider.release()
    assert (await under_way).status.tier == pb.TIER_UPSTREAM
    with pytest.raises(grpc.aio.AioRpcError):
        await service.get("a blue whale")


async def test_a_bad_file_leaves_everything_as_it_was_and_says_why(service: Running) -> None:
    good = service.file.token
    service.file.token, service.file.namespaces = "second-token", "[namespaces.default]\nmax_variants = -1"
    said = await service.reload("config_not_reloaded")
    assert "namespaces.default.max_variants" in said["error"]
    assert await service.refusal() is grpc.StatusCode.UNAUTHENTICATED
    await service.get(token=good)
    assert await count(service.http, "cacheserver_config_reloads_total", result="failed") == 1
    assert await count(service.http, "cacheserver_config_reloads_total", result="ok") == 0
    service.file.namespaces = "[namespaces.default]"
    await service.reload()
    await service.get(token="second-token")
    assert await count(service.http, "cacheserver_config_reloads_total", result="ok") == 1


async def test_what_takes_a_restart_is_named_and_the_rest_holds(service: Running) -> None:
    service.file.token = "second-token"
    service.file.more = "durability = 'write-through'"
    service.file.upstream += "\nread_timeout_s = 1.0\nmodels = ['gpt-image-2', 'gpt-image-1']"
    said = await service.reload()
    assert said["restart_needed_for"] == "durability, upstreams.openai.models, upstreams.openai.read_timeout_s"
    await service.get(token="second-token")


async def test_the_last_caller_cannot_go_by_a_slip_in_the_file(service: Running) -> None:
    service.file.has_callers = False
    said = await service.reload("config_not_reloaded")
    assert "callers: the first and the last one" in said["error"]
    assert await service.refusal(token="none") is grpc.StatusCode.UNAUTHENTICATED


async def test_every_worker_reloads(
    tmp_path: Path, file: File, valkey_server: ValkeyServer, s3_server: S3Server
) -> None:
    env = environment(tmp_path, redis=valkey_server, s3=s3_server, server__workers=2)
    async with serving(env | {"CACHESERVER_CONFIG": str(file.path)}) as process:
        service = Running(process, file, await process.logged("all_serving"))
        file.token = "second-token"
        await service.reload()
        await process.logged("config_reloaded")
        async with httpx.AsyncClient(trust_env=False) as http:
            page = (await http.get(f"http://{service.http}/metrics")).text
        assert 'cacheserver_config_reloads_total{result="ok"} 2.0' in page
        for _ in range(8):
            await service.get(token="second-token")
            assert await service.refusal(token="first-token") is grpc.StatusCode.UNAUTHENTICATED
