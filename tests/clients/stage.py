"""What a session runs before: a server in OpenAI's shape, and a control, which the session tells what it needs.

The control is told by POST: `hold` and `release` the server's generations, `block` the next one as moderation does,
`crowd` the server with more than it takes, `disperse` them. It answers with the counts of calls and of pictures made.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cacheserver.client import AsyncClient
from tests.clients.openai_server import API_KEY, BROKE_KEY, OpenAIServer
from tests.emulated import key_of, settings_of, upstream_tables
from tests.provider import OpenAIStandIn
from tests.running import running
from tests.waiting import until

_UPSTREAM = "provider"


class Stage(Protocol):
    """A server with a key that may spend and one that may not, and what is done to it."""

    base_url: str

    def counts(self) -> dict[str, int]:
        """`calls` for pictures, and `images` made: with a cache in between, those that were paid for."""

    def hold(self) -> None:
        """Generations wait from now on."""

    def release(self) -> None:
        """They go on."""

    def block(self) -> None:
        """The prompt of the next one is refused."""

    async def crowd(self) -> None:
        """Return when the server takes no further generation."""

    async def disperse(self) -> None:
        """Return when it takes them again."""


class OpenAIStage:
    """Before a server that does what OpenAI's does."""

    def __init__(self, server: OpenAIServer, base_url: str) -> None:
        self.base_url = base_url
        self._server = server

    def counts(self) -> dict[str, int]:
        return {"calls": self._server.calls, "images": self._server.images}

    def hold(self) -> None:
        self._server.open.clear()

    def release(self) -> None:
        self._server.open.set()

    def block(self) -> None:
        self._server.blocks_next = True

    async def crowd(self) -> None:
        self._server.is_crowded = True

    async def disperse(self) -> None:
        self._server.is_crowded = False


class FrontStage:
    """Before our front, behind which there is a stand-in for a provider."""

    def __init__(self, provider: OpenAIStandIn, client: AsyncClient, base_url: str) -> None:
        self.base_url = base_url
        self._provider = provider
        self._client = client
        self._crowd: list[asyncio.Task[Any]] = []

    def counts(self) -> dict[str, int]:
        return {"calls": self._provider.calls, "images": self._provider.images}

    def hold(self) -> None:
        self._provider.hold()

    def release(self) -> None:
        self._provider.release()

    def block(self) -> None:
        message = "Your request was rejected by the safety system. safety_violations=[violence]."
        self._provider.fail_next(400, "moderation_blocked", kind="image_generation_user_error", message=message)

    async def crowd(self) -> None:
        """One generation is held at the provider, whose group takes one at a time; one waits, and no more may."""
        self.hold()
        before = self._provider.calls
        self._crowd = [asyncio.create_task(self._client.get_image("the first", quality="low", size="1024x1024"))]
        await self._provider.arrived(before + 1)
        self._crowd += [asyncio.create_task(self._client.get_image("the next", quality="low", size="1024x1024"))]
        await _one_waits(self._client)

    async def disperse(self) -> None:
        self.release()
        await asyncio.gather(*self._crowd)


@asynccontextmanager
async def openai_stage() -> AsyncIterator[Stage]:
    server = OpenAIServer()
    async with serving(server.app) as url:
        yield OpenAIStage(server, f"{url}/v1")


@asynccontextmanager
async def front_stage(data_dir: Path) -> AsyncIterator[Stage]:
    async with OpenAIStandIn(api_key=key_of(_UPSTREAM)) as provider:
        upstreams = upstream_tables({_UPSTREAM: provider.base_url}, limits="concurrent = 1")
        settings = settings_of(data_dir, generation__queue_max=1)
        async with (
            running(settings, upstreams + _callers()) as service,
            AsyncClient(service.grpc_address, token=API_KEY) as client,
        ):
            yield FrontStage(provider, client, f"http://{service.http_address}/v1")


def _callers() -> str:
    return "".join(
        f'[[callers]]\nname = "{name}"\ntoken_sha256 = "{sha256(token.encode()).hexdigest()}"\n{more}\n'
        for name, token, more in (
            ("team", API_KEY, 'allow = ["read", "generate", "admin"]'),
            ("broke", BROKE_KEY, "per_day_microusd = 1"),
        )
    )


async def _one_waits(client: AsyncClient) -> None:
    """Return when a generation waits for its turn."""

    async def waits() -> bool:
        stats = await client.stats()
        return stats.live is not None and sum(stats.live.queue.values()) > 0

    await until(waits)


@asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[str]:
    """Serve on a free port of this machine; the URL."""
    server = _Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(server.serve([listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are the tests' own


def _control(stage: Stage) -> Starlette:
    async def told(request: Request) -> Response:
        match request.path_params["action"]:
            case "hold":
                stage.hold()
            case "release":
                stage.release()
            case "block":
                stage.block()
            case "crowd":
                await stage.crowd()
            case "disperse":
                await stage.disperse()
        return JSONResponse(stage.counts())

    return Starlette(routes=[Route("/{action}", told, methods=["POST"])])


async def session(stage: Stage, command: list[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Run a session before a stage; what it tells."""
    async with serving(_control(stage)) as control_url:
        process = await asyncio.create_subprocess_exec(
            *command,
            env={
                "PATH": os.defpath,
                "BASE_URL": stage.base_url,
                "API_KEY": API_KEY,
                "BROKE_KEY": BROKE_KEY,
                "CONTROL_URL": control_url,
                **env,
            },
            stdout=PIPE,
            stderr=PIPE,
        )
        try:
            output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    if process.returncode:
        raise AssertionError(errors.decode())
    told: dict[str, Any] = json.loads(output)
    return told
