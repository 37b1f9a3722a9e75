"""Recorded prompts: what is recorded of which calls, how it is shared, and that it is forgotten on command."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from structlog.testing import capture_logs

from cacheserver.client import AsyncClient
from cacheserver.control.prompts import LocalPrompts, RedisPrompts
from cacheserver.errors import AccountsUnavailableError, QueueFullError, UpstreamDownError
from cacheserver.identity import identify
from cacheserver.interfaces import Prompts
from cacheserver.model import ImageRequest, Namespace, PromptKind, RecordedPrompt
from cacheserver.pb import admin_pb2 as admin_pb
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.tiers.redis_client import connect, disconnect
from tests.admin_front import Sources, admin_service
from tests.admin_front import calling as calling_admin
from tests.admin_front import serving as serving_admin
from tests.fakes import FakeClock
from tests.house import House
from tests.provider import OpenAIStandIn, small_image
from tests.rpc_front import Front, ask, failure, open_front, spec
from tests.running import ask as run_ask
from tests.running import calling, environment, running
from tests.servers import TcpProxy, ValkeyServer
from tests.waiting import until

PREFIXES = (f"prompts-{n}:" for n in itertools.count())
SHOP = Namespace("shop", "shop", store_prompts=True)
DAY_S = 86_400
MISSED, GENERATED = PromptKind.MISSED, PromptKind.GENERATED

Open = Callable[..., Awaitable[RedisPrompts]]
Make = Callable[..., Awaitable[Prompts]]


def record(
    prompts: Prompts, prompt: str, kind: PromptKind = MISSED, *, namespace: Namespace = SHOP, n: int = 1
) -> None:
    request = ImageRequest(prompt=prompt, model="gpt-image-2")
    prompts.record(kind, request, namespace=namespace.name, identity=identify(request, namespace), n=n)


async def wanted(prompts: Prompts, *kinds: PromptKind, namespace: str | None = None, limit: int = 100) -> list[str]:
    return [each.request.prompt for each in await prompts.most_wanted(namespace=namespace, kinds=kinds, limit=limit)]


@pytest.fixture
async def opened(redis_url: str, clock: FakeClock) -> AsyncIterator[Open]:
    """Opens the record of one replica; all of a test share what is in Redis."""
    prefix = next(PREFIXES)
    async with AsyncExitStack() as stack:

        async def open_one(url: str = redis_url, **options: Any) -> RedisPrompts:
            client = connect(url, timeout_s=5.0, connect_timeout_s=5.0)
            stack.push_async_callback(disconnect, client)
            names = ["shop", "blog"]
            return RedisPrompts(
                client=client, namespaces=names, clock=clock, prefix=prefix, **{"timeout_s": 5.0, **options}
            )

        yield open_one


@pytest.fixture(params=["local", "redis"])
async def make(request: pytest.FixtureRequest, clock: FakeClock, opened: Open) -> Make:
    """Makes a record of either kind: both keep the same promises."""

    async def made(**options: Any) -> Prompts:
        if request.param == "redis":
            return await opened(**options)
        return LocalPrompts(namespaces=["shop", "blog"], clock=clock, **options)

    return made


class TestRecord:
    async def test_what_was_asked_for_most_comes_first(self, make: Make) -> None:
        prompts = await make()
        for prompt in ("once", "thrice", "twice", "thrice", "twice", "thrice"):
            record(prompts, prompt)
        assert await wanted(prompts) == ["thrice", "twice", "once"]
        assert await wanted(prompts, limit=2) == ["thrice", "twice"]

    async def test_a_record_holds_the_whole_request_its_count_and_when_last(self, make: Make, clock: FakeClock) -> None:
        prompts = await make()
        request = ImageRequest(
            prompt="a röd fox ☃",
            model="m",
            size="1024x1024",
            quality="high",
            background="opaque",
            output_format="webp",
            output_compression=80,
            moderation="low",
            seed=7,
            extra=MappingProxyType({"steps": 20, "nested": {"a": [1, None]}}),
        )
        prompts.record(GENERATED, request, namespace="shop", identity=identify(request, SHOP), n=3)
        [found] = await prompts.most_wanted(namespace=None, kinds=(), limit=10)
        assert found == RecordedPrompt(
            request=request, namespace="shop", n=3, kind=GENERATED, count=pytest.approx(1.0), last_time_s=clock.now_s()
        )

    async def test_a_count_fades_by_half_in_two_weeks_and_new_wishes_overtake_old_ones(
        self, make: Make, clock: FakeClock
    ) -> None:
        prompts = await make()
        for _ in range(3):
            record(prompts, "old")
        clock.advance(14 * DAY_S)
        for _ in range(2):
            record(prompts, "new")
        new, old = await prompts.most_wanted(namespace=None, kinds=(), limit=10)
        assert (new.request.prompt, new.count) == ("new", pytest.approx(2.0))
        assert (old.request.prompt, old.count) == ("old", pytest.approx(1.5))

    async def test_kinds_and_namespaces_are_told_apart(self, make: Make) -> None:
        prompts = await make()
        record(prompts, "missed in shop")
        record(prompts, "generated in shop", GENERATED)
        record(prompts, "missed in blog", namespace=Namespace("blog", "blog"))
        assert await wanted(prompts, GENERATED) == ["generated in shop"]
        assert await wanted(prompts, namespace="blog") == ["missed in blog"]
        assert sorted(await wanted(prompts, MISSED)) == ["missed in blog", "missed in shop"]
        assert await wanted(prompts, namespace="nobody's") == []

    async def test_beyond_the_bound_the_least_wanted_goes_for_a_new_one(self, make: Make) -> None:
        prompts = await make(most=3)
        for prompt, times in (("a", 2), ("b", 3), ("c", 1), ("d", 4), ("e", 5)):
            for _ in range(times):
                record(prompts, prompt)
            await wanted(prompts)
        assert await wanted(prompts) == ["e", "d", "b"]

    async def test_prompts_that_are_one_identity_are_one_record_with_the_latest_words(
        self, make: Make, clock: FakeClock
    ) -> None:
        prompts = await make()
        record(prompts, "A red  fox.")
        clock.advance(1)
        record(prompts, "a red fox", n=2)
        [found] = await prompts.most_wanted(namespace=None, kinds=(), limit=10)
        assert (found.request.prompt, found.n) == ("a red fox", 2)
        assert found.count == pytest.approx(2.0)

    async def test_a_very_long_request_is_passed_over(self, make: Make) -> None:
        prompts = await make()
        record(prompts, "fox " * 8_000)
        assert await wanted(prompts) == []

    async def test_an_identity_is_forgotten_in_every_kind_and_nothing_else(self, make: Make) -> None:
        prompts = await make()
        for kind in (MISSED, GENERATED):
            record(prompts, "secret", kind)
            record(prompts, "public", kind)
        await wanted(prompts)
        record(prompts, "secret")
        key = identify(ImageRequest(prompt="secret", model="gpt-image-2"), SHOP).key
        await prompts.forget("shop", key.with_variant(3))
        assert await wanted(prompts) == ["public", "public"]

    async def test_a_namespace_is_forgotten_whole_and_no_other(self, make: Make) -> None:
        prompts = await make()
        record(prompts, "in shop")
        record(prompts, "in blog", namespace=Namespace("blog", "blog"))
        await wanted(prompts)
        await prompts.forget("shop", None)
        assert await wanted(prompts) == ["in blog"]


class TestShared:
    async def test_all_replicas_add_to_one_record_and_a_restart_reads_it(self, opened: Open) -> None:
        one, other = await opened(), await opened()
        record(one, "a red fox")
        record(other, "a red fox")
        await other.aclose()
        [found] = await one.most_wanted(namespace=None, kinds=(), limit=10)
        assert found.count == pytest.approx(2.0)
        assert await wanted(await opened()) == ["a red fox"]

    async def test_it_is_written_in_the_background(self, opened: Open, clock: FakeClock) -> None:
        one, other = await opened(), await opened()
        one.start()
        await until(lambda: clock.sleepers == 1)
        record(one, "a red fox")
        clock.advance(1.0)

        async def is_written() -> bool:
            return await wanted(other) == ["a red fox"]

        await until(is_written)
        await one.aclose()

    @pytest.mark.parametrize("whole", [True, False])
    async def test_what_another_replica_has_yet_to_write_does_not_come_back_when_it_was_forgotten(
        self, opened: Open, clock: FakeClock, *, whole: bool
    ) -> None:
        one, other = await opened(), await opened()
        record(other, "secret")
        clock.advance(0.1)
        key = identify(ImageRequest(prompt="secret", model="gpt-image-2"), SHOP).key
        await one.forget("shop", None if whole else key)
        await other.write()
        assert await wanted(one) == []
        clock.advance(0.1)
        record(other, "secret")
        await other.write()
        assert await wanted(one) == ["secret"]

    async def test_notes_of_what_was_forgotten_are_swept(self, opened: Open, clock: FakeClock) -> None:
        one = await opened()
        for number in range(3):
            clock.advance(DAY_S)
            await one.forget("shop", identify(ImageRequest(prompt=f"{number}", model="gpt-image-2"), SHOP).key)
        assert await one._client.zcard(one._notes("shop")) == 2

    async def test_notes_of_what_was_forgotten_have_a_bound_and_none_is_unsaid_by_it(
        self, opened: Open, clock: FakeClock
    ) -> None:
        one, other = await opened(most=10), await opened(most=10)
        record(other, "secret")
        await one.forget("shop", identify(ImageRequest(prompt="secret", model="gpt-image-2"), SHOP).key)
        for number in range(30):
            clock.advance(0.1)
            await one.forget("shop", identify(ImageRequest(prompt=f"{number}", model="gpt-image-2"), SHOP).key)
        assert await one._client.zcard(one._notes("shop")) <= 11
        await other.write()
        record(other, "of now")
        assert await wanted(other) == ["of now"]

    async def test_what_a_later_version_recorded_is_passed_over_and_kept(self, opened: Open) -> None:
        one = await opened()
        for prompt in ("of today", "of tomorrow"):
            record(one, prompt)
        await one.write()
        client: Any = one._client
        requests = one._names(("shop", MISSED))[1]
        for name, stored in (await client.hgetall(requests)).items():
            if b"tomorrow" in stored:
                await client.hset(requests, name, stored.replace(b'"seed"', b'"style": "oil", "seed"'))
        assert await wanted(one) == ["of today"]
        assert await client.hlen(requests) == 2

    async def test_nothing_of_it_expires(self, opened: Open) -> None:
        one = await opened()
        record(one, "a red fox")
        await one.write()
        for name in one._names(("shop", MISSED)):
            assert await one._client.ttl(name) == -1

    async def test_while_redis_is_silent_wishes_wait_and_reading_and_forgetting_say_so(
        self, opened: Open, valkey_server: ValkeyServer
    ) -> None:
        async with TcpProxy("127.0.0.1", valkey_server.port) as proxy:
            one = await opened(f"redis://127.0.0.1:{proxy.port}/0", timeout_s=1.0)
            proxy.cut()
            record(one, "a red fox")
            with capture_logs() as logs:
                for _ in range(2):
                    with pytest.raises(AccountsUnavailableError):
                        await wanted(one)
            with pytest.raises(AccountsUnavailableError):
                await one.forget("blog", None)
            proxy.resume()
            assert await wanted(one) == ["a red fox"]
        assert [each["event"] for each in logs] == ["prompts_unreachable"]
        assert "fox" not in str(logs)


# --- which calls ---


@pytest.fixture
async def front(house: House) -> AsyncIterator[tuple[Front, LocalPrompts]]:
    """A service whose namespace stores prompts, and what it recorded."""
    house.namespace = replace(house.namespace, store_prompts=True)
    prompts = LocalPrompts(namespaces=["default"], clock=house.clock)
    async with open_front(house, prompts=prompts) as front:
        yield front, prompts


async def kinds(prompts: LocalPrompts) -> dict[str, float]:
    found = await prompts.most_wanted(namespace=None, kinds=(), limit=100)
    return {each.kind: pytest.approx(each.count, rel=1e-3) for each in found}


class TestCalls:
    async def test_what_is_generated_is_recorded_and_hits_are_not(self, front: tuple[Front, LocalPrompts]) -> None:
        service, prompts = front
        for _ in range(3):
            await service.stub.GetImage(ask(n=2))
        [found] = await prompts.most_wanted(namespace=None, kinds=(), limit=10)
        assert (found.kind, found.request.prompt, found.n) == (GENERATED, "a red fox", 2)
        assert found.count == pytest.approx(1.0)

    async def test_an_edit_is_not_recorded_for_its_prompt_alone_would_make_another_picture(
        self, front: tuple[Front, LocalPrompts]
    ) -> None:
        service, prompts = front
        await service.stub.GetImage(ask(of={"inputs": [pb.InputImage(data=small_image(1))]}))
        assert await kinds(prompts) == {}

    async def test_a_cache_only_miss_is_recorded_as_missed(self, front: tuple[Front, LocalPrompts]) -> None:
        service, prompts = front
        await failure(service.stub.GetImage(ask(cache_policy="CACHE_POLICY_ONLY_IF_CACHED")))
        assert await kinds(prompts) == {MISSED: 1}

    @pytest.mark.parametrize("error", [QueueFullError("full"), UpstreamDownError("down")])
    async def test_what_could_not_be_made_is_recorded_as_turned_away(
        self, front: tuple[Front, LocalPrompts], error: Any
    ) -> None:
        service, prompts = front
        service.house.upstream.fail_next(error)
        await failure(service.stub.GetImage(ask()))
        assert await kinds(prompts) == {PromptKind.TURNED_AWAY: 1}

    async def test_a_wrong_request_is_not_recorded(self, front: tuple[Front, LocalPrompts]) -> None:
        service, prompts = front
        await failure(service.stub.GetImage(ask(of={"size": "17x99999"})))
        assert await kinds(prompts) == {}

    async def test_another_one_is_recorded_as_rerolled(self, front: tuple[Front, LocalPrompts]) -> None:
        service, prompts = front
        await service.stub.GetImage(ask())
        await service.stub.GetImage(ask(variant_policy="VARIANT_POLICY_NEXT"))
        assert await kinds(prompts) == {GENERATED: 1, PromptKind.REROLLED: 1}

    async def test_hits_on_what_soon_expires_are_recorded_as_expiring(self, front: tuple[Front, LocalPrompts]) -> None:
        service, prompts = front
        await service.stub.GetImage(ask(ttl=Duration(seconds=1_000)))
        service.house.clock.advance(890)
        await service.stub.GetImage(ask())
        assert await kinds(prompts) == {GENERATED: 1}
        service.house.clock.advance(20)
        for _ in range(2):
            await service.stub.GetImage(ask())
        assert await kinds(prompts) == {GENERATED: 1, PromptKind.EXPIRING: 2}

    async def test_purging_a_request_or_everything_forgets_it_and_a_dry_run_or_a_tag_does_not(
        self, front: tuple[Front, LocalPrompts]
    ) -> None:
        service, prompts = front
        for prompt in ("a red fox", "a blue fox", "a green fox"):
            await service.stub.GetImage(ask(prompt, tags=["spring"]))
        await service.stub.PurgeImages(pb.PurgeImagesRequest(everything=True, dry_run=True))
        await service.stub.PurgeImages(pb.PurgeImagesRequest(tag="spring"))
        assert len(await wanted(prompts)) == 3
        await service.stub.PurgeImages(pb.PurgeImagesRequest(spec=spec("A red  fox.")))
        assert sorted(await wanted(prompts)) == ["a blue fox", "a green fox"]
        await service.stub.PurgeImages(pb.PurgeImagesRequest(everything=True))
        assert await wanted(prompts) == []

    async def test_a_purge_that_misses_a_tier_forgets_the_prompts_all_the_same(
        self, front: tuple[Front, LocalPrompts]
    ) -> None:
        service, prompts = front
        await service.stub.GetImage(ask())
        await service.house.settle()
        service.house.s3.is_down = True
        missed = await failure(service.stub.PurgeImages(pb.PurgeImagesRequest(everything=True)))
        assert missed.reason == "TIER_UNREACHABLE"
        assert await wanted(prompts) == []

    async def test_a_namespace_that_does_not_store_prompts_has_none(self, house: House) -> None:
        prompts = LocalPrompts(namespaces=["default"], clock=house.clock)
        async with open_front(house, prompts=prompts) as front:
            await front.stub.GetImage(ask())
        assert await kinds(prompts) == {}


# --- listing ---


async def test_operators_list_them_with_either_client(clock: FakeClock) -> None:
    prompts = LocalPrompts(namespaces=["shop"], clock=clock)
    for prompt, kind in (("a red fox", MISSED), ("a blue fox", GENERATED), ("a blue fox", GENERATED)):
        record(prompts, prompt, kind, n=2)
    async with serving_admin(admin_service(Sources(), prompts=prompts)) as address:
        async with AsyncClient(address) as client:
            blue, red = await client.admin.list_prompts(namespace="shop")
            [missed] = await client.admin.list_prompts(kinds=[MISSED], limit=1)
        async with calling_admin(address) as stub:
            answer = await stub.ListPrompts(admin_pb.ListPromptsRequest())
            for wrong in ({"page_size": 10_001}, {"kinds": [0]}, {"kinds": [99]}):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.ListPrompts(admin_pb.ListPromptsRequest(**wrong))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (blue.spec.prompt, blue.kind, blue.n, blue.namespace) == ("a blue fox", GENERATED, 2, "shop")
    assert blue.count == pytest.approx(2.0)
    assert (red.spec.prompt, red.kind) == ("a red fox", MISSED)
    assert missed == red
    assert missed.last_time is not None
    # What is listed is what can be asked for again, word for word.
    again = answer.prompts[0].request
    assert (again.namespace, again.n, again.spec.prompt, again.spec.quality) == ("shop", 2, "a blue fox", "auto")


async def test_where_nothing_is_stored_the_list_is_empty() -> None:
    async with serving_admin(admin_service(Sources())) as address, AsyncClient(address) as client:
        assert await client.admin.list_prompts() == ()


async def test_a_whole_service_keeps_them_over_a_restart_and_shows_them_to_operators(
    tmp_path: Path, valkey_server: ValkeyServer
) -> None:
    config = "[namespaces.default]\nstore_prompts = true\n"
    async with OpenAIStandIn() as provider:
        env = environment(tmp_path, provider=provider, redis=valkey_server)
        async with running(env, config) as service, calling(service) as stub:
            await stub.GetImage(run_ask("a red fox"))
        async with running(env, config) as service, AsyncClient(service.grpc_address) as client:
            [found] = await client.admin.list_prompts()
        async with running(env) as service, AsyncClient(service.grpc_address) as client:
            assert await client.admin.list_prompts() == ()
    assert (found.spec.prompt, found.kind) == ("a red fox", GENERATED)
