"""Other words, the same picture, from the outside: a whole service, real Redis and S3, the command line."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from cacheserver.pb import promptcache_pb2 as pb
from tests.provider import OpenAIStandIn
from tests.running import ask, calling, environment, running
from tests.servers import S3Server, ValkeyServer
from tests.test_cli import command

CAT = "Please draw a cute white Siamese cat, 8 k, highly detailed"
SAME_CAT = "cute white siamese cat, highly detailed, 8k"
OTHER_PICTURES = (
    ("3 cats", "5 cats"),
    ("red car left of blue truck", "blue car left of red truck"),
    ('a shop sign "SALE"', 'a shop sign "SAIL"'),
    ("两只白色的猫", "三只白色的猫"),
)
OFF = '[namespaces.default]\nsimilarity = "exact"\n'


async def test_a_new_service_answers_other_words_with_the_same_picture_and_other_pictures_with_others(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer, s3_server: S3Server
) -> None:
    env = environment(tmp_path, provider=provider, redis=valkey_server, s3=s3_server)
    async with running(env) as service, calling(service) as stub:
        made = await stub.GetImage(ask(CAT))
        same = await stub.GetImage(ask(SAME_CAT))
        assert same.images[0].data == made.images[0].data
        assert (same.status.matched, same.status.matched_key) == (pb.MATCH_LEVEL_CANONICAL, made.images[0].key)
        assert (same.status.tier, same.status.cost_microusd) == (pb.TIER_MEMORY, 0)
        refusing = await stub.GetImage(ask(SAME_CAT, match_level="MATCH_LEVEL_STANDARD"))
        assert refusing.status.tier == pb.TIER_UPSTREAM
        for pair in OTHER_PICTURES:
            answers = [await stub.GetImage(ask(prompt)) for prompt in pair]
            assert [answer.status.tier for answer in answers] == [pb.TIER_UPSTREAM] * 2
        async with httpx.AsyncClient(base_url=f"http://{service.http_address}") as http:
            page = (await http.get("/metrics")).text
        assert 'cacheserver_similar_hits_total{level="canonical",namespace="default"} 1.0' in page


async def test_what_was_paid_for_before_a_restart_answers_other_words_after_it(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer, s3_server: S3Server
) -> None:
    env = environment(tmp_path, provider=provider, redis=valkey_server, s3=s3_server)
    async with running(env) as service, calling(service) as stub:
        await stub.GetImage(ask(CAT))
    async with running(env) as service, calling(service) as stub:
        answer = await stub.GetImage(ask(SAME_CAT))
        assert (answer.status.tier, answer.status.matched) == (pb.TIER_REDIS, pb.MATCH_LEVEL_CANONICAL)
    assert provider.calls == 1


async def test_openai_s_clients_are_told_in_a_header(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer
) -> None:
    env = environment(tmp_path, provider=provider, redis=valkey_server)
    async with running(env) as service, httpx.AsyncClient(base_url=f"http://{service.http_address}") as http:
        bodies = [{"prompt": prompt, "model": "gpt-image-2"} for prompt in (CAT, SAME_CAT)]
        made, same = [await http.post("/v1/images/generations", json=body) for body in bodies]
        assert "x-cacheserver-matched" not in made.headers
        assert same.headers["x-cacheserver-matched"] == "canonical"
        assert same.headers["x-cacheserver-keys"] == made.headers["x-cacheserver-keys"]
        exact = await http.post(
            "/v1/images/generations", json=bodies[1], headers={"x-cacheserver-match-level": "standard"}
        )
        assert "x-cacheserver-matched" not in exact.headers
    assert provider.calls == 2


async def test_a_reported_pair_a_switch_and_an_explanation_from_the_command_line(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer
) -> None:
    env = environment(tmp_path, provider=provider, redis=valkey_server)
    async with running(env) as service, calling(service) as stub:
        address = service.grpc_address
        made = await stub.GetImage(ask(CAT))
        same = await command("get", SAME_CAT, "-o", str(tmp_path / "cat.png"), address=address)
        assert "canonical: of a prompt in other words" in same.stdout
        assert made.images[0].key in same.stdout
        explained = await command("explain", CAT, SAME_CAT, address=address)
        assert "canonical cute white siamese cat" in explained.stdout
        assert "one picture" in explained.stdout
        specs = [pb.ImageSpec(prompt=prompt) for prompt in (CAT, SAME_CAT)]
        both = await stub.ExplainKey(pb.ExplainKeyRequest(spec=specs[0], other=specs[1]))
        assert both.explanation.canonical_prompt == both.other.canonical_prompt == "cute white siamese cat"
        assert "one picture" not in (await command("explain", "3 cats", "5 cats", address=address)).stdout
        reported = await command("report-wrong", both.other.key, made.images[0].key, address=address)
        assert reported.exit_code == 0, reported.output
        assert (await stub.GetImage(ask(SAME_CAT))).status.tier == pb.TIER_UPSTREAM
        assert (await command("switch", "similarity", "off", address=address)).exit_code == 0
        assert (await stub.GetImage(ask("the cute white siamese cat!"))).status.tier == pb.TIER_UPSTREAM


@pytest.mark.parametrize("config", [OFF, "[similarity]\nenabled = false\n"], ids=["there", "everywhere"])
async def test_a_service_that_has_it_off_pays_for_each_spelling(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer, config: str
) -> None:
    env = environment(tmp_path, provider=provider, redis=valkey_server)
    async with running(env, config) as service, calling(service) as stub:
        for prompt in (CAT, SAME_CAT):
            assert (await stub.GetImage(ask(prompt))).status.tier == pb.TIER_UPSTREAM
        explained = await stub.ExplainKey(pb.ExplainKeyRequest(spec=pb.ImageSpec(prompt=CAT)))
        assert explained.explanation.canonical_prompt == ""


async def test_the_semantic_level_asks_a_verifier_over_http_and_serves_what_it_says_yes_to(
    tmp_path: Path, provider: OpenAIStandIn, valkey_server: ValkeyServer
) -> None:
    config = f"""
[namespaces.default]
similarity = "semantic"
[similarity]
verifier_url = "{provider.base_url}"
verifier_api_key_env = "NO_SUCH_KEY"
"""
    env = environment(tmp_path, provider=provider, redis=valkey_server)
    async with running(env, config) as service, calling(service) as stub:
        await stub.GetImage(ask("a cute puppy sleeping on a sofa at home"))
        answer = await stub.GetImage(ask("a cute puppy dog sleeping on a sofa at home"))
        # The stand-in for OpenAI has no chat: a verifier that answers 404 is one that never says yes.
        assert answer.status.tier == pb.TIER_UPSTREAM
        async with httpx.AsyncClient(base_url=f"http://{service.http_address}") as http:
            page = (await http.get("/metrics")).text
        assert 'cacheserver_verifications_total{namespace="default",result="error"} 1.0' in page
