"""The service from the outside: a real gRPC client, real Redis and S3, an upstream that only looks real."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration

from cacheserver.embedded.child import free_ports
from cacheserver.identity import fingerprint
from cacheserver.pb import promptcache_pb2 as pb
from tests.provider import OpenAIStandIn
from tests.running import Stub, ask, calling, environment, running
from tests.servers import S3Server, ValkeyServer


@pytest.fixture
async def stub(tmp_path: Path, provider: OpenAIStandIn, s3_server: S3Server) -> AsyncIterator[Stub]:
    """A service with a Valkey of its own and a real S3."""
    async with running(environment(tmp_path, provider=provider, s3=s3_server)) as service, calling(service) as stub:
        yield stub


async def tier_of(stub: Stub) -> tuple[int, bytes]:
    response = await stub.GetImage(ask())
    return response.status.tier, response.images[0].data


async def test_the_same_bytes_come_from_upstream_memory_redis_and_s3_and_are_paid_for_once(
    tmp_path: Path, provider: OpenAIStandIn, own_valkey: Callable[[], ValkeyServer], s3_server: S3Server
) -> None:
    valkey = own_valkey()
    env = environment(tmp_path, provider=provider, redis=valkey, s3=s3_server)
    seen = []
    async with running(env) as service, calling(service) as stub:
        seen += [await tier_of(stub), await tier_of(stub)]
    async with running(env) as service, calling(service) as stub:
        seen.append(await tier_of(stub))
    assert valkey.execute("FLUSHALL") == b"+OK\r\n"
    async with running(env) as service, calling(service) as stub:
        seen.append(await tier_of(stub))
    assert [tier for tier, _ in seen] == [pb.TIER_UPSTREAM, pb.TIER_MEMORY, pb.TIER_REDIS, pb.TIER_S3]
    assert len({data for _, data in seen}) == 1
    assert provider.calls == 1


@pytest.mark.parametrize("redis", ["cluster", "sentinel_set"])
async def test_with_a_cluster_or_behind_sentinel_two_replicas_pay_once_for_what_both_are_asked_at_once(
    request: pytest.FixtureRequest, tmp_path: Path, provider: OpenAIStandIn, s3_server: S3Server, redis: str
) -> None:
    env = environment(tmp_path, provider=provider, redis=request.getfixturevalue(redis), s3=s3_server)
    other = tmp_path / "other"
    other.mkdir()
    prompts = [f"fox {number}" for number in range(10)]
    provider.hold()
    async with (
        running(env) as one,
        running(env | {"CACHESERVER_DATA_DIR": str(other)}) as two,
        calling(one) as first,
        calling(two) as second,
    ):
        answers = [asyncio.ensure_future(stub.GetImage(ask(p))) for p in prompts for stub in (first, second)]
        await provider.arrived(len(prompts))
        provider.release()
        assert all(answer.images for answer in await asyncio.gather(*answers))
    async with running(env) as service, calling(service) as stub:
        assert {(await stub.GetImage(ask(prompt))).status.tier for prompt in prompts} == {pb.TIER_REDIS}
    assert provider.calls == len(prompts)


async def test_with_no_configuration_it_comes_from_our_own_valkey_and_from_disk(
    tmp_path: Path, provider: OpenAIStandIn
) -> None:
    env = environment(tmp_path, provider=provider)
    seen = []
    async with running(env) as service, calling(service) as stub:
        seen += [await tier_of(stub), await tier_of(stub)]
    async with running(env) as service, calling(service) as stub:
        seen.append(await tier_of(stub))
    async with running(env | {"CACHESERVER_TIERS": "memory, disk"}) as service, calling(service) as stub:
        seen.append(await tier_of(stub))
    assert [tier for tier, _ in seen] == [pb.TIER_UPSTREAM, pb.TIER_MEMORY, pb.TIER_REDIS, pb.TIER_DISK]
    assert len({data for _, data in seen}) == 1
    assert provider.calls == 1


@pytest.mark.parametrize(("tiers", "comes_from"), [("memory", pb.TIER_MEMORY), ("memory, disk", pb.TIER_DISK)])
async def test_a_dear_picture_is_worth_more_only_where_no_tier_has_it_beside_memory(
    tmp_path: Path, provider: OpenAIStandIn, tiers: str, comes_from: int
) -> None:
    provider.min_image_bytes = 100_000
    room = {"memory__policy": "value", "memory__max_bytes": 250_000, "memory__max_entry_bytes": 200_000}
    env = environment(tmp_path, provider=provider, tiers=tiers, **room)
    async with running(env) as service, calling(service) as stub:
        for prompt, quality in (("dear", "high"), ("cheap", "low"), ("cheap too", "low")):
            await stub.GetImage(pb.GetImageRequest(spec=pb.ImageSpec(prompt=prompt, quality=quality)))
        again = await stub.GetImage(pb.GetImageRequest(spec=pb.ImageSpec(prompt="dear", quality="high")))
    assert again.status.tier == comes_from


@pytest.mark.no_cover
async def test_a_thousand_callers_of_one_prompt_with_200_hanging_up_are_one_upstream_call(
    stub: Stub, provider: OpenAIStandIn
) -> None:
    provider.hold()
    calls = [stub.GetImage(ask()) for _ in range(1000)]
    await provider.arrived(1)
    for call in calls[::5]:
        call.cancel()
    provider.release()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    answers = [outcome for outcome in outcomes if isinstance(outcome, pb.GetImageResponse)]
    assert len(answers) == 800
    assert len({answer.images[0].data for answer in answers}) == 1
    assert provider.calls == 1


async def test_a_forced_collision_of_fingerprints_never_serves_another_identitys_image(
    tmp_path: Path, provider: OpenAIStandIn, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "fingerprint_of", lambda _: bytes(16))
    env = environment(tmp_path, provider=provider, s3=s3_server)
    prompts = [f"prompt {i}" for i in range(8)]
    made: dict[str, bytes] = {}
    keys: dict[str, str] = {}
    async with running(env) as service, calling(service) as stub:
        for answer, prompt in zip(
            await asyncio.gather(*(stub.GetImage(ask(prompt)) for prompt in prompts * 2)), prompts * 2, strict=True
        ):
            made.setdefault(prompt, answer.images[0].data)
            keys[prompt] = answer.images[0].key
            assert answer.images[0].data == made[prompt]
    assert len(set(made.values())) == len(prompts) == provider.calls
    for tiers in ("memory, redis, s3", "memory, s3"):
        async with running(env | {"CACHESERVER_TIERS": tiers}) as service, calling(service) as stub:
            for _ in range(2):
                for prompt in prompts:
                    by_prompt = await stub.GetImage(ask(prompt))
                    by_key = await stub.GetImage(pb.GetImageRequest(key=keys[prompt]))
                    assert by_prompt.images[0].data == by_key.images[0].data == made[prompt]
    assert provider.calls == len(prompts)


async def test_next_five_times_is_five_pictures_and_each_sent_twice_more_is_still_five(
    stub: Stub, provider: OpenAIStandIn
) -> None:
    requests = [ask(variant_policy=pb.VARIANT_POLICY_NEXT, request_id=f"call {i}") for i in range(5)]
    seen = [(await stub.GetImage(request)).images[0].data for request in requests]
    assert len(set(seen)) == provider.calls == 5
    for _ in range(2):
        assert [(await stub.GetImage(request)).images[0].data for request in requests] == seen
    assert provider.calls == 5


async def test_a_next_sent_again_after_a_restart_does_not_pay_again(tmp_path: Path, provider: OpenAIStandIn) -> None:
    request = ask(variant_policy=pb.VARIANT_POLICY_NEXT, request_id="call")
    env = environment(tmp_path, provider=provider)
    seen = []
    for _ in range(2):
        async with running(env) as service, calling(service) as stub:
            await stub.GetImage(ask())
            seen.append((await stub.GetImage(request)).images[0].data)
    assert seen[0] == seen[1]
    assert provider.calls == 1


async def test_n_4_after_n_2_makes_two_more_in_one_call(stub: Stub, provider: OpenAIStandIn) -> None:
    two = await stub.GetImage(ask(n=2))
    four = await stub.GetImage(ask(n=4))
    assert [image.data for image in four.images[:2]] == [image.data for image in two.images]
    assert [status.tier for status in four.image_status] == [pb.TIER_MEMORY] * 2 + [pb.TIER_UPSTREAM] * 2
    assert (provider.calls, provider.images) == (2, 4)


async def test_max_wait_0_then_get_image_by_key_is_one_call_and_the_same_bytes(
    stub: Stub, provider: OpenAIStandIn
) -> None:
    provider.hold()
    pending = await stub.GetImage(ask(max_wait=Duration()))
    assert pending.status.state == pb.STATE_PENDING
    assert pending.status.estimated_wait.ToTimedelta().total_seconds() > 0
    collecting = stub.GetImage(pb.GetImageRequest(key=pending.images[0].key))
    await provider.arrived(1)
    found = await stub.FindCached(pb.FindCachedRequest(items=[pb.FindItem(key=pending.images[0].key)]))
    assert found.items[0].presence == pb.PRESENCE_IN_FLIGHT
    provider.release()
    assert (await collecting).images[0].data == (await stub.GetImage(ask())).images[0].data
    assert provider.calls == 1


async def test_a_large_image_is_named_streamed_resumed_and_signed_but_never_cut(
    stub: Stub, provider: OpenAIStandIn
) -> None:
    provider.min_image_bytes = 6_000_000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetImage(ask())
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "StreamImage" in (caught.value.details() or "")
    by_url = await stub.GetImage(ask(delivery=pb.DELIVERY_AUTO))
    image = by_url.images[0]
    async with httpx.AsyncClient() as http:
        fetched = await http.get(image.url)
    assert fetched.headers["content-type"] == "image/png"
    assert image.digest == f"sha256:{hashlib.sha256(fetched.content).hexdigest()}"
    assert len(fetched.content) == image.size_bytes >= 6_000_000
    resumed = await download(stub, pb.StreamImageRequest(request=ask(), read_offset=5_000_000, if_digest=image.digest))
    assert resumed == fetched.content[5_000_000:]
    assert provider.calls == 1


async def test_a_20_mb_image_travels_by_stream_image(stub: Stub, provider: OpenAIStandIn) -> None:
    provider.min_image_bytes = 20_000_000
    first = await download(stub, pb.StreamImageRequest(request=ask()))
    assert len(first) >= 20_000_000
    assert await download(stub, pb.StreamImageRequest(request=ask())) == first
    assert provider.calls == 1


async def test_a_url_is_refused_before_any_spend_where_no_tier_can_sign(
    tmp_path: Path, provider: OpenAIStandIn
) -> None:
    async with running(environment(tmp_path, provider=provider)) as service, calling(service) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetImage(ask(delivery=pb.DELIVERY_URL))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert provider.calls == 0


async def test_a_browser_fetches_by_url_what_was_made_in_another_size_and_after_a_restart(
    tmp_path: Path, provider: OpenAIStandIn
) -> None:
    [port] = free_ports(1)
    public = {"http_port": port, "delivery__public_url": f"http://127.0.0.1:{port}/"}
    env = environment(tmp_path, provider=provider, **public)
    async with running(env) as service, calling(service) as stub, httpx.AsyncClient(trust_env=False) as browser:
        image = (await stub.GetImage(ask(delivery=pb.DELIVERY_URL))).images[0]
        fetched = await browser.get(image.url)
        small = await browser.get(f"{image.url}&w=32&format=webp")
        unsigned = await browser.get(image.url.partition("?")[0] + "?signature=x")
    async with running(env), httpx.AsyncClient(trust_env=False) as browser:
        again = await browser.get(image.url)
        small_again = await browser.get(f"{image.url}&w=32&format=webp")
    assert image.digest == f"sha256:{hashlib.sha256(fetched.content).hexdigest()}"
    assert again.content == fetched.content
    assert small.headers["content-type"] == "image/webp"
    assert small_again.content == small.content
    assert unsigned.status_code == 403
    assert provider.calls == 1


async def test_a_stored_object_is_the_plain_picture(stub: Stub, s3_server: S3Server, tmp_path: Path) -> None:
    image = (await stub.GetImage(ask())).images[0]
    listed = s3_server.client.list_objects_v2(Bucket=s3_server.bucket, Prefix=f"{tmp_path.name}/v1/")["Contents"]
    stored = s3_server.client.get_object(Bucket=s3_server.bucket, Key=listed[0]["Key"])
    assert len(listed) == 1
    assert stored["ContentType"] == "image/png"
    assert stored["Body"].read() == image.data


async def test_put_find_purge_and_stats_agree_with_one_another(stub: Stub, provider: OpenAIStandIn) -> None:
    picture = provider.image_bytes(min_size_bytes=1)
    header = pb.PutImageHeader(spec=pb.ImageSpec(prompt="a put picture"), tags=["put"], paid_microusd=40_000)
    stored = await stub.PutImage(iter([pb.PutImageRequest(header=header), pb.PutImageRequest(chunk=picture)]))
    hit = await stub.GetImage(ask("a put picture"))
    assert hit.images[0].data == picture
    assert hit.status.saved_microusd == 40_000
    items = [pb.FindItem(key=stored.image.key), pb.FindItem(spec=pb.ImageSpec(prompt="absent"))]
    found = await stub.FindCached(pb.FindCachedRequest(items=items))
    assert [item.presence for item in found.items] == [pb.PRESENCE_CACHED, pb.PRESENCE_ABSENT]
    counted = await stub.PurgeImages(pb.PurgeImagesRequest(tag="put", dry_run=True))
    purged = await stub.PurgeImages(pb.PurgeImagesRequest(tag="put"))
    assert counted.images == purged.images == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetImage(pb.GetImageRequest(key=stored.image.key))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    stats = await stub.GetStats(pb.GetStatsRequest())
    rows = {(row.outcome, row.tier): row.requests for row in stats.rows}
    assert rows == {(pb.OUTCOME_HIT, pb.TIER_MEMORY): 1, (pb.OUTCOME_NOT_CACHED, pb.TIER_UNSPECIFIED): 1}
    assert stats.total.saved_microusd == 40_000
    assert provider.calls == 0


async def test_health_readiness_and_metrics_are_served_over_http(tmp_path: Path, provider: OpenAIStandIn) -> None:
    async with running(environment(tmp_path, provider=provider)) as service, calling(service) as stub:
        await stub.GetImage(ask("a prompt nobody may see"))
        async with httpx.AsyncClient(base_url=f"http://{service.http_address}") as http:
            assert (await http.get("/healthz")).status_code == 200
            assert "/v1/images/generations" in (await http.get("/openapi.json")).json()["paths"]
            ready = (await http.get("/readyz")).json()
            metrics = (await http.get("/metrics")).text
    assert ready == {"status": "ready", "tiers": {"redis": "ok", "disk": "ok"}}
    assert 'cacheserver_requests_total{namespace="default",outcome="miss",tier="upstream"} 1.0' in metrics
    assert 'cacheserver_upstream_requests_total{result="ok",upstream="openai"} 1.0' in metrics
    assert 'cacheserver_breaker_open{tier="redis"} 0.0' in metrics
    assert "nobody may see" not in metrics


async def test_stopping_lets_a_running_generation_end_and_keeps_it(tmp_path: Path, provider: OpenAIStandIn) -> None:
    env = environment(tmp_path, provider=provider)
    provider.hold()
    async with running(env) as service, calling(service) as stub:
        call = stub.GetImage(ask())
        await provider.arrived(1)
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0)
        provider.release()
        data = (await call).images[0].data
        await stopping
    async with running(env) as service, calling(service) as stub:
        assert (await tier_of(stub))[1] == data
    assert provider.calls == 1


async def download(stub: Stub, request: pb.StreamImageRequest) -> bytes:
    return b"".join([event.chunk async for event in stub.StreamImage(request)])
