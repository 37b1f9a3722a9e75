"""OpenAI's API of a started service: what it counts and remembers is what gRPC shows."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import httpx

from cacheserver.pb import promptcache_pb2 as pb
from tests.provider import OpenAIStandIn
from tests.running import ask, calling, environment, running


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
            while (await client.get("/models")).status_code != 503:  # noqa: ASYNC110 - the answer tells, no event does
                await asyncio.sleep(0)
            provider.release()
            waited, streamed = [await call for call in calls]
            await stopping
    assert waited.json()["data"]
    assert "event: image_generation.completed" in streamed.text
