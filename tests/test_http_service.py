"""OpenAI's API of a started service: what it counts and remembers is what gRPC shows."""

from __future__ import annotations

import asyncio
import base64
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import grpc
import httpx
import pytest

from cacheserver.pb import promptcache_pb2 as pb
from tests.provider import OpenAIStandIn
from tests.running import ask, calling, environment, running
from tests.waiting import until


async def test_a_picture_made_over_http_is_one_hit_over_grpc_and_the_other_way_round(tmp_path: Path) -> None:
    async with OpenAIStandIn() as provider, running(environment(tmp_path, provider=provider)) as service:
        base_url = f"http://{service.http_address}/v1"
        async with (
            httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=60) as client,
            calling(service) as stub,
        ):
            body = {"model": "gpt-image-2", "prompt": "a red fox"}
            made = await client.post("/images/generations", json=body, headers={"x-request-id": "call-7"})
            [picture] = made.json()["data"]
            found = await stub.GetImage(ask(), timeout=30)
            assert found.images[0].data == base64.b64decode(picture["b64_json"])
            again = await client.post("/images/generations", json=body)
            assert again.content == made.content
            assert provider.calls == 1
            stats = await stub.GetStats(pb.GetStatsRequest())
            counted = {pb.Outcome.Name(row.outcome): row.requests for row in stats.rows if row.requests}
            assert counted == {"OUTCOME_MISS": 1, "OUTCOME_HIT": 2}
            explained = await stub.ExplainCall(pb.ExplainCallRequest(request_id="call-7"))
            assert explained.rpc == "POST /v1/images/generations"
            assert [image.key for image in explained.images] == [made.headers["x-cacheserver-keys"]]
            models = (await client.get("/models")).json()
            assert "gpt-image-2" in [model["id"] for model in models["data"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_is_no_error_in_the_figures(tmp_path: Path, *, stream: bool) -> None:
    async with OpenAIStandIn() as provider, running(environment(tmp_path, provider=provider)) as service:
        base_url = f"http://{service.http_address}/v1"
        async with (
            httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=60) as client,
            calling(service) as stub,
        ):

            async def is_gone() -> bool:
                with suppress(grpc.aio.AioRpcError):  # what has not ended yet is not known
                    explained = await stub.ExplainCall(pb.ExplainCallRequest(request_id="call-7"))
                    return bool(explained.reason == "CLIENT_GONE")
                return False

            provider.hold()
            body = {"model": "gpt-image-2", "prompt": "a red fox", "stream": stream}
            headers = {"x-request-id": "call-7"}
            asking = asyncio.create_task(client.post("/images/generations", json=body, headers=headers))
            await provider.arrived(1)
            asking.cancel()
            await until(is_gone)
            stats = await stub.GetStats(pb.GetStatsRequest())
            assert [pb.Outcome.Name(row.outcome) for row in stats.rows if row.requests] == []
            provider.release()


async def test_a_service_that_is_stopped_answers_first_what_waits_and_what_streams(tmp_path: Path) -> None:
    async with OpenAIStandIn() as provider, running(environment(tmp_path, provider=provider)) as service:
        base_url = f"http://{service.http_address}/v1"
        async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=60) as client:
            provider.hold()
            fox = {"model": "gpt-image-2", "prompt": "a red fox"}
            calls = [
                asyncio.create_task(client.post("/images/generations", json=body))
                for body in (fox, {**fox, "prompt": "a blue fox", "stream": True})
            ]
            await provider.arrived(2)
            stopping = asyncio.create_task(service.stop())

            async def takes_no_more() -> bool:
                return (await client.get("/models")).status_code == HTTPStatus.SERVICE_UNAVAILABLE

            await until(takes_no_more)
            provider.release()
            waited, streamed = [await call for call in calls]
            await stopping
    assert waited.json()["data"]
    assert "event: image_generation.completed" in streamed.text
