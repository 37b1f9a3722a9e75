"""The command as an operator meets it: what keeps it from starting, what it starts without, and how it ends.

Every service here is a process of its own, and every server it talks to is a real one.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import sysconfig
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cacheserver.embedded.seaweed import identities
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from tests.provider import OpenAIStandIn
from tests.running import ask, environment
from tests.servers import S3Server, ValkeyServer
from tests.waiting import until

COMMAND = Path(sysconfig.get_path("scripts")) / "cacheserver"
KEY = {"OPENAI_API_KEY": "sk-very-secret"}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

_TESTED = {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
"""Where the code under test is, if that is not the one that is installed."""

_REFUSED_WITHIN_S = 30.0
_STARTED_WITHIN_S = 30.0
_ENDED_WITHIN_S = 30.0
_HEALED_WITHIN_S = 30.0


class Process:
    """A `cacheserver serve` and what it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    async def logged(self, event: str) -> dict[str, Any]:
        """The next log line of this name; the lines before it are kept."""
        async with asyncio.timeout(_STARTED_WITHIN_S):
            while line := await self._line():
                facts: dict[str, Any] = json.loads(line)
                if facts["event"] == event:
                    return facts
        raise AssertionError(f"ended before it logged {event}: {self.lines}")

    async def ended(self, *, within_s: float = _ENDED_WITHIN_S) -> int:
        """Its exit code."""
        async with asyncio.timeout(within_s):
            while await self._line():
                pass
            return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _line(self) -> str:
        assert self._process.stderr is not None
        line = (await self._process.stderr.readline()).decode()
        if line:
            self.lines.append(line)
        return line


@asynccontextmanager
async def serving(env: dict[str, str], *arguments: str) -> AsyncIterator[Process]:
    """`cacheserver serve` with this environment and no other."""
    process = await asyncio.create_subprocess_exec(
        COMMAND,
        "serve",
        *arguments,
        # The fault handler: should native code crash, the log says where.
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONFAULTHANDLER": "1", **_TESTED, **env},
        cwd="/",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    running = Process(process)
    try:
        yield running
    finally:
        await running.kill()


async def refusal(env: dict[str, str], *arguments: str) -> str:
    """The one line with which it refuses to start; no child is left behind."""
    async with serving(env, *arguments) as process:
        assert await process.ended(within_s=_REFUSED_WITHIN_S) == 1
    assert len(process.lines) == 1, process.lines
    assert "very-secret" not in process.lines[0]
    assert locks(Path(env["CACHESERVER_DATA_DIR"])) == set()
    return process.lines[0]


def locks(data_dir: Path) -> set[str]:
    """The directories that somebody alive holds: the service itself, or a server of ours as long as it lives."""
    return {file.parent.name for file in data_dir.glob("*/lock") if _is_locked(file)}


def _is_locked(file: Path) -> bool:
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


# ---- What keeps it from starting

_NO_PEM = "server.tls_cert_file, server.tls_key_file: {file} and {file} are no PEM certificate chain"
_REFUSED: dict[str, tuple[str, dict[str, str], str]] = {
    "a typo in the file": (
        "[redis]\ntimeout = 1",
        {},
        "redis.timeout: there is no such setting; did you mean redis.timeout_s?",
    ),
    "a typo in the environment": (
        "",
        {"CACHESERVER_GRCP_PORT": "1"},
        "CACHESERVER_GRCP_PORT: there is no such environment variable; did you mean CACHESERVER_GRPC_PORT?",
    ),
    "a Redis and no key": (
        "",
        {"CACHESERVER_REDIS_URL": "redis://127.0.0.1:1/0"},
        "upstreams: there is none; set OPENAI_API_KEY or add [[upstreams]]",
    ),
    "open to others without callers": (
        "[server]\ngrpc_host = '0.0.0.0'",
        KEY,
        "server.grpc_host: 0.0.0.0 can be reached from other machines and there are no callers; add [[callers]]",
    ),
    "a Redis URL that is none": (
        "",
        KEY | {"CACHESERVER_REDIS_URL": "redis://:very-secret/@redis"},
        "redis.url: not a Redis URL; the forms are redis://host:port/db",
    ),
    "a pattern that is none": (
        "[namespaces.shop]\ncatalog_patterns = ['(sku']",
        {},
        "namespaces.shop.catalog_patterns: catalog pattern '(sku' is no regular expression",
    ),
    "a certificate without its key": (
        "[server]\ntls_cert_file = '{file}'",
        {},
        "server: one of tls_cert_file and tls_key_file is set and the other is not; set both or none",
    ),
    "a certificate that is not there": (
        "[server]\ntls_cert_file = '{file}.gone'\ntls_key_file = '{file}'",
        {},
        "server.tls_cert_file: {file}.gone cannot be read; mend the path or its permissions",
    ),
    "a certificate that is none": ("[server]\ntls_cert_file = '{file}'\ntls_key_file = '{file}'", {}, _NO_PEM),
    "an address of another machine": (
        "insecure = true\n[server]\ngrpc_host = '192.0.2.1'",
        KEY,
        "server.grpc_host: cannot listen on 192.0.2.1:0: Cannot assign requested address; name an address of this",
    ),
}


@pytest.mark.parametrize(("config", "env", "line"), _REFUSED.values(), ids=_REFUSED)
async def test_what_cannot_work_is_refused_in_one_line_that_says_how_to_mend_it(
    tmp_path: Path, config: str, env: dict[str, str], line: str
) -> None:
    file = tmp_path / "a-file"
    file.write_text("no certificate")
    config_file = tmp_path / "config.toml"
    config_file.write_text(config.format(file=file))
    assert line.format(file=file) in await refusal(environment(tmp_path) | env, "--config", str(config_file))


@pytest.mark.parametrize("setting", ["grpc_port", "http_port"])
async def test_a_port_in_use_is_refused(tmp_path: Path, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = await refusal(environment(tmp_path) | {f"CACHESERVER_{setting.upper()}": str(port)})
    assert f"server.{setting}: cannot listen on 127.0.0.1:{port}: Address already in use; end what has it" in line


async def test_a_data_dir_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    in_the_way = tmp_path / "a-file"
    in_the_way.touch()
    line = await refusal(environment(in_the_way / "data"))
    assert f"data_dir: cannot make or write {in_the_way}/data/images: Not a directory; mend its permissions" in line


async def test_a_directory_of_another_service_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    env = environment(first, redis__embedded=False, disk__path=tmp_path / "images")
    async with serving(env) as service:
        await service.logged("serving")
        shares_disk = await refusal(environment(second, disk__path=tmp_path / "images"))
        assert f"disk.path: {tmp_path}/images is in use by another cacheserver (process {service.pid})" in shares_disk
        assert "give this one a disk.path of its own" in shares_disk
    async with serving(environment(first)) as service:
        await service.logged("serving")
        async with serving(environment(first)) as other:
            assert await other.ended(within_s=_REFUSED_WITHIN_S) == 1
        assert len(other.lines) == 1
        assert f"data_dir: {first}/images is in use by another cacheserver (process {service.pid})" in other.lines[0]
        assert locks(first) == {"images", "ledger", "valkey"}


async def test_a_redis_that_would_evict_control_state_is_refused(
    tmp_path: Path, own_valkey: Callable[[], ValkeyServer]
) -> None:
    valkey = own_valkey()
    assert valkey.execute("CONFIG SET maxmemory-policy allkeys-lru") == b"+OK\r\n"
    line = await refusal(environment(tmp_path, redis=valkey) | KEY)
    assert "redis.url: this Redis has maxmemory-policy allkeys-lru" in line
    assert "set maxmemory-policy to volatile-lfu" in line


# ---- What it starts without


async def health_becomes(channel: grpc.aio.Channel, service: str, status: int) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watching = stub.Watch(health_pb2.HealthCheckRequest(service=service))
    async with asyncio.timeout(_HEALED_WITHIN_S):
        async for response in watching:
            if response.status == status:
                break
    watching.cancel()


_WITHOUT_REDIS = frozenset({"replicas_unknown", "budgets_lost", "figures_not_told", "purges_unseen", "leases_unheard"})
"""What else is said, once each, where the Redis that replicas share is away."""


async def readiness(http_address: str) -> dict[str, Any]:
    async with httpx.AsyncClient(trust_env=False) as http:
        response = await http.get(f"http://{http_address}/readyz")
    assert response.status_code == 200
    facts: dict[str, Any] = response.json()
    return facts


async def starts_without_and_heals(env: dict[str, str], tier: str, why: str, heal: Callable[[], None]) -> None:
    async with serving(env) as service:
        unreachable = await service.logged("tier_unreachable")
        assert unreachable["tier"] == tier
        assert why in unreachable["text"]
        assert "very-secret" not in json.dumps(unreachable)
        started = await service.logged("serving")
        said = {json.loads(line)["event"] for line in service.lines}
        assert said <= {"tier_unreachable", "serving", "purges_not_read", *_WITHOUT_REDIS}
        async with grpc.aio.insecure_channel(started["grpc"]) as channel:
            await health_becomes(channel, f"tier.{tier}", NOT_SERVING)
            await health_becomes(channel, "", SERVING)
            before = await readiness(started["http"])
            assert before == {"status": "ready", "tiers": before["tiers"] | {tier: "down"}}
            await asyncio.to_thread(heal)
            await health_becomes(channel, f"tier.{tier}", SERVING)
            assert set((await readiness(started["http"]))["tiers"].values()) == {"ok"}
        service.signal(signal.SIGTERM)
        assert await service.ended() == 0


async def test_a_redis_that_is_down_is_named_and_missed_until_it_comes(
    tmp_path: Path, own_valkey: Callable[[], ValkeyServer]
) -> None:
    valkey = own_valkey()
    valkey.kill()
    await starts_without_and_heals(
        environment(tmp_path, redis=valkey) | KEY, "redis", "Redis cannot be reached", valkey.start
    )


async def test_a_store_that_is_down_is_named_and_missed_until_it_comes(
    tmp_path: Path, own_s3: Callable[[], S3Server]
) -> None:
    s3 = own_s3()
    s3.kill()
    await starts_without_and_heals(environment(tmp_path, s3=s3) | KEY, "s3", "S3 cannot be reached", s3.start)


async def test_a_bucket_that_is_missing_is_named_and_missed_until_it_comes(tmp_path: Path, s3_server: S3Server) -> None:
    bucket = "not-yet-there"
    env = environment(tmp_path, s3=s3_server) | KEY | {"CACHESERVER_S3_BUCKET": bucket}
    why = "S3 has no such bucket; see s3.bucket"
    await starts_without_and_heals(env, "s3", why, lambda: s3_server.client.create_bucket(Bucket=bucket))


async def test_credentials_that_are_wrong_are_named_and_the_store_missed_until_they_hold(
    tmp_path: Path, own_s3: Callable[[], S3Server]
) -> None:
    s3 = own_s3()

    def take_them() -> None:
        accounts = [json.loads(identities(*account)) for account in ((s3.access_key, s3.secret_key), newcomer)]
        accounts[1]["identities"][0]["name"] = "newcomer"
        both = {"identities": [each["identities"][0] for each in accounts]}
        (s3.directory / "s3.json").write_text(json.dumps(both))
        s3.restart()

    newcomer = ("newcomer", "very-secret")
    env = environment(tmp_path, s3=s3) | KEY
    env |= {"CACHESERVER_S3__ACCESS_KEY": newcomer[0], "CACHESERVER_S3__SECRET_KEY": newcomer[1]}
    await starts_without_and_heals(env, "s3", "see the credentials", take_them)


# ---- How it ends


@asynccontextmanager
async def a_call_under_way(address: str, provider: OpenAIStandIn) -> AsyncIterator[Any]:
    """A call for an image that the upstream holds back."""
    provider.hold()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.PromptCacheServiceStub(channel)  # type: ignore[no-untyped-call] # generated code
        call = stub.GetImage(ask(), timeout=_STARTED_WITHIN_S)
        async with asyncio.timeout(_STARTED_WITHIN_S):
            await provider.arrived(1)
        yield call


async def test_sigterm_lets_calls_end_and_takes_our_servers_along(tmp_path: Path, provider: OpenAIStandIn) -> None:
    async with serving(environment(tmp_path, provider=provider), "--local-s3") as service:
        started = await service.logged("serving")
        assert locks(tmp_path) == {"journal", "ledger", "valkey", "s3"}
        async with a_call_under_way(started["grpc"], provider) as call:
            service.signal(signal.SIGTERM)
            await service.logged("draining")
            provider.release()
            assert len((await call).images) == 1
            assert await service.ended() == 0
    assert locks(tmp_path) == set()
    assert json.loads(service.lines[-1])["event"] == "stopped"


@pytest.mark.parametrize(("drain_timeout_s", "signals"), [(300, 2), (0.5, 1)], ids=["second SIGTERM", "time is up"])
async def test_a_call_that_does_not_end_keeps_nothing_waiting(
    tmp_path: Path, provider: OpenAIStandIn, drain_timeout_s: float, signals: int
) -> None:
    env = environment(tmp_path, provider=provider, server__drain_timeout_s=drain_timeout_s)
    async with serving(env) as service:
        started = await service.logged("serving")
        async with a_call_under_way(started["grpc"], provider) as call:
            service.signal(signal.SIGTERM)
            await service.logged("draining")
            if signals == 2:
                service.signal(signal.SIGTERM)
            assert await service.ended() == 0
            with pytest.raises(grpc.aio.AioRpcError):
                await call
    assert locks(tmp_path) == set()
    events = [json.loads(line)["event"] for line in service.lines]
    assert ("ended_before_drained" in events) == (signals == 2)


async def test_sigterm_while_starting_ends_it_without_a_word_and_without_leftovers(tmp_path: Path) -> None:
    async with serving(environment(tmp_path), "--local-s3") as service:
        await until(lambda: "s3" in locks(tmp_path), within_s=_STARTED_WITHIN_S)
        service.signal(signal.SIGTERM)
        assert await service.ended() == 0
    # One of our servers that hangs while it ends is killed, and this is said.
    assert {json.loads(line)["event"] for line in service.lines} <= {"child_killed"}
    assert locks(tmp_path) == set()


async def test_our_servers_die_with_a_service_that_is_killed_and_the_next_one_takes_over(tmp_path: Path) -> None:
    async with serving(environment(tmp_path), "--local-s3") as service:
        await service.logged("serving")
        assert locks(tmp_path) == {"journal", "ledger", "valkey", "s3"}
        service.signal(signal.SIGKILL)
        assert await service.ended() == -signal.SIGKILL
        async with serving(environment(tmp_path), "--local-s3") as heir:
            await heir.logged("serving")
            heir.signal(signal.SIGTERM)
            assert await heir.ended() == 0
    await until(lambda: not locks(tmp_path))
