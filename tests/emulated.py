"""Services whose upstreams are the provider emulator: their settings, what callers hear, and both sides' bills."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure
from google.rpc.status_pb2 import Status

from cacheserver.app import Service
from cacheserver.client import AsyncClient
from cacheserver.client.admin_values import LedgerRow
from cacheserver.embedded.child import free_ports, leashed
from cacheserver.model import AttemptOutcome
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.pb import promptcache_pb2_grpc as pb_grpc
from scripts.bench.provider import Call, KeyConfig, Provider, ProviderConfig
from tests.running import Stub, calling, environment, running
from tests.waiting import until

MODEL = "gpt-image-2"
SIZE = "1024x1024"
NAMES = ("first", "second", "third")
"""What upstreams are called here; each has a key and a limit group of its own."""

_START_TIMEOUT_S = 30.0
_POLL_S = 0.02


def emulator(names: Sequence[str] = NAMES, **fields: Any) -> ProviderConfig:
    """An emulator with a key for each upstream."""
    keys = tuple(KeyConfig(key=key_of(name), group=f"org-{name}") for name in names)
    return ProviderConfig(**{"keys": keys, "compression": 60.0, **fields})


def key_of(upstream: str) -> str:
    return f"sk-{upstream}"


def upstream_tables(urls: Mapping[str, str], *, limits: str = "images_per_minute = 6_000_000", **more: object) -> str:
    """Settings of one upstream for each name, at its URL; further fields of all as they stand in TOML.

    With a limit that is known a refusal is waited for a moment; without any, so few calls say that it is low.
    """
    fields = "".join(f"{name} = {value}\n" for name, value in more.items())
    return "".join(
        f'[[upstreams]]\nname = "{name}"\nbase_url = "{url}"\napi_key = "{key_of(name)}"\n{fields}'
        f"[limit_groups.{name}]\n{limits}\n"
        for name, url in urls.items()
    )


def settings_of(data_dir: Path, **settings: object) -> dict[str, str]:
    """The environment of a service that keeps pictures in memory and a directory, and starts no servers."""
    more: dict[str, Any] = {"tiers": "memory, disk", "disk__fsync": "false", **settings}
    return environment(data_dir, **more)


@asynccontextmanager
async def serving(env: dict[str, str], config: str) -> AsyncIterator[tuple[Service, Stub]]:
    """A service in this process, and a caller."""
    async with running(env, config) as service, calling(service) as stub:
        yield service, stub


class ServiceProcess:
    """A service as an operator runs it, and a caller of it."""

    def __init__(self, process: Process, address: str, stub: Stub) -> None:
        self.address = address
        self.stub = stub
        self._process = process

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def in_its_own_process(
    env: dict[str, str], config: str, command: Sequence[str] = (str(Path(sys.executable).with_name("cacheserver")),)
) -> AsyncIterator[ServiceProcess]:
    """A service in a process of its own, killed at the end; it dies with us, however we die."""
    data_dir = Path(env["CACHESERVER_DATA_DIR"])
    config_file, log_file = data_dir / "cacheserver.toml", data_dir / "service.log"
    config_file.write_text(config)
    grpc_port, http_port = free_ports(2)
    env = {**env, "CACHESERVER_GRPC_PORT": str(grpc_port), "CACHESERVER_HTTP_PORT": str(http_port)}
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *leashed([*command, "serve"]),
            stdin=PIPE,
            stdout=log,
            stderr=log,
            env={"PATH": os.defpath, **env},
            cwd=data_dir,
        )
    address = f"127.0.0.1:{grpc_port}"
    async with grpc.aio.insecure_channel(address) as channel:
        service = ServiceProcess(process, address, pb_grpc.PromptCacheServiceStub(channel))  # type: ignore[no-untyped-call] # generated code
        try:
            if not await _is_ready(process, f"http://127.0.0.1:{http_port}/readyz"):
                raise RuntimeError(log_file.read_text(errors="replace"))
            yield service
        finally:
            await service.kill()
            if process.stdin is not None:
                process.stdin.write(b"\n")  # off the leash, which else would signal whoever has its process id next
                process.stdin.close()


async def _is_ready(process: Process, url: str) -> bool:
    """Wait until a service takes calls; False if it ended instead."""
    async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(_START_TIMEOUT_S):
        while process.returncode is None:
            with contextlib.suppress(httpx.TransportError):  # not listening yet
                if (await http.get(url)).is_success:
                    return True
            await asyncio.sleep(_POLL_S)
    return False


def ask_for(prompt: str, *, quality: str = "low", size: str = SIZE, **fields: object) -> pb.GetImageRequest:
    spec = pb.ImageSpec(prompt=prompt, quality=quality, size=size)
    return pb.GetImageRequest(spec=spec, **fields)  # type: ignore[arg-type] # test convenience


class Told(NamedTuple):
    """What a caller hears: the code, and why; "OK" and nothing for a good answer. `subject` is the quota's."""

    code: str
    reason: str = ""
    subject: str = ""
    facts: Mapping[str, str] = {}


OK = Told("OK")


async def told_of(stub: Stub, request: pb.GetImageRequest) -> Told:
    """Ask, and hear."""
    try:
        await stub.GetImage(request)
    except grpc.aio.AioRpcError as error:
        return told_in(error)
    return OK


def told_in(error: grpc.aio.AioRpcError) -> Told:
    """What an error says beside its text."""
    trailers = dict(error.trailing_metadata() or ())
    status = Status.FromString(trailers.get("grpc-status-details-bin", b""))
    info, quota = ErrorInfo(), QuotaFailure()
    _unpack(status, info)
    subject = quota.violations[0].subject if _unpack(status, quota) else ""
    return Told(error.code().name, info.reason, subject, dict(info.metadata))


def _unpack(status: Status, message: Message) -> bool:
    return any(detail.Unpack(message) for detail in status.details)


async def is_absent(stub: Stub, request: pb.GetImageRequest) -> bool:
    """Whether no tier has a picture of this request."""
    found = await stub.FindCached(pb.FindCachedRequest(items=[pb.FindItem(spec=request.spec)]))
    return bool(found.items[0].presence == pb.PRESENCE_ABSENT)


async def ledger_of(address: str) -> list[LedgerRow]:
    """A service's ledger, once every call in it has ended."""
    async with AsyncClient(address) as client:
        rows: list[LedgerRow] = []

        async def have_ended() -> bool:
            rows[:] = [row async for row in client.admin.list_ledger()]
            return all(row.outcome is not AttemptOutcome.SENT for row in rows)

        await until(have_ended)
        return rows


async def bring_back(address: str, names: Sequence[str]) -> None:
    """What an operator does about upstreams that left the pool, once they are well."""
    async with AsyncClient(address) as client:
        await asyncio.gather(*(client.admin.update_upstream(name, paused=False) for name in names))


def cost_of(rows: Sequence[LedgerRow], outcome: AttemptOutcome) -> int:
    """What rows of an outcome cost together, in micro-dollars."""
    return sum(row.cost_microusd for row in rows if row.outcome is outcome)


def assert_bills_agree(provider: Provider, rows: Sequence[LedgerRow]) -> None:
    """Every call has its row; what is settled was billed, to the micro-dollar, and no more than it and the unknown."""
    calls = {call.request_id: call for call in provider.calls()}
    assert len(rows) == len(calls)
    for row in rows:
        if row.outcome is AttemptOutcome.SETTLED:
            assert row.cost_microusd == calls[row.upstream_request_id].billed_microusd
    settled, unknown = cost_of(rows, AttemptOutcome.SETTLED), cost_of(rows, AttemptOutcome.UNKNOWN)
    assert settled <= provider.bill_microusd <= settled + unknown


def keys_called(calls: Sequence[Call]) -> list[str]:
    """Whose calls they were, in the order they came."""
    return [call.key for call in sorted(calls, key=lambda call: call.at_s)]
