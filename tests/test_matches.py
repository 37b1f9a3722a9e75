"""The sample of similar hits: what is kept of which, for how long, who sees it, and that it is forgotten on command."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from structlog.testing import capture_logs

from cacheserver.calls.sampling import Sampler
from cacheserver.client import AsyncClient, InvalidRequestError, MatchLevel, Switch, TierName, UnknownNameError
from cacheserver.control.matches import LocalMatches, RedisMatches
from cacheserver.errors import AccountsUnavailableError, UnknownReviewError
from cacheserver.interfaces import Matches
from cacheserver.model import SampledMatch
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.tiers.redis_client import connect, disconnect
from tests.admin_front import picture_key
from tests.fakes import FakeClock
from tests.house import House
from tests.provider import OpenAIStandIn
from tests.rpc_front import Front, ask, open_front, spec
from tests.running import environment, running
from tests.servers import TcpProxy, ValkeyServer
from tests.waiting import until

PREFIXES = (f"matches-{n}:" for n in itertools.count())
DAY_S = 86_400
FOX, SAME_FOX = "a red fox, 8k", "Please draw a red fox, 8 k"

Open = Callable[..., Awaitable[RedisMatches]]
Make = Callable[..., Awaitable[Matches]]


def record(matches: Matches, number: int, *, namespace: str = "shop", prompt: str = "") -> None:
    matches.record(
        namespace=namespace,
        level=MatchLevel.CANONICAL,
        key=picture_key(number),
        matched_key=picture_key(1_000_000),
        prompt=prompt,
    )


async def kept(matches: Matches, **which: Any) -> list[SampledMatch]:
    return await matches.page(**{"namespace": None, "before": "", "limit": 2_000, **which})


async def numbers(matches: Matches, **which: Any) -> list[int]:
    return [int.from_bytes(each.key.fingerprint) for each in await kept(matches, **which)]


@pytest.fixture
async def opened(redis_url: str, clock: FakeClock) -> AsyncIterator[Open]:
    """Opens the sample of one replica; all of a test share what is in Redis."""
    prefix = next(PREFIXES)
    async with AsyncExitStack() as stack:

        async def open_one(url: str = redis_url, **options: Any) -> RedisMatches:
            client = connect(url, timeout_s=5.0, connect_timeout_s=5.0)
            stack.push_async_callback(disconnect, client)
            return RedisMatches(client=client, clock=clock, prefix=prefix, **{"timeout_s": 5.0, **options})

        yield open_one


@pytest.fixture(params=["local", "redis"])
async def make(request: pytest.FixtureRequest, clock: FakeClock, opened: Open) -> Make:
    """Makes a sample of either kind: both keep the same promises."""

    async def made(**options: Any) -> Matches:
        return await opened(**options) if request.param == "redis" else LocalMatches(clock=clock, **options)

    return made


class TestSample:
    async def test_a_similar_hit_comes_back_whole(self, make: Make, clock: FakeClock) -> None:
        matches = await make()
        key, matched_key = picture_key(1, variant=2), picture_key(2, variant=2)
        matches.record(
            namespace="shop", level=MatchLevel.SEMANTIC, key=key, matched_key=matched_key, prompt="a röd fox ☃ \ud83d"
        )
        [found] = await kept(matches)
        assert found == SampledMatch(
            found.id, clock.now_s(), "shop", MatchLevel.SEMANTIC, key, matched_key, "a röd fox ☃ \ud83d"
        )
        assert await matches.get(found.id) == found

    async def test_the_newest_come_first_and_namespaces_are_told_apart(self, make: Make, clock: FakeClock) -> None:
        matches = await make()
        for number in range(6):
            record(matches, number, namespace=("shop", "blog")[number % 2])
            clock.advance(1)
        assert await numbers(matches) == [5, 4, 3, 2, 1, 0]
        assert await numbers(matches, namespace="shop") == [4, 2, 0]
        assert await numbers(matches, namespace="nobody's") == []

    async def test_pages_follow_one_another(self, make: Make, clock: FakeClock) -> None:
        matches = await make()
        for number in range(5):
            record(matches, number, namespace=("shop", "blog")[number % 2])
            clock.advance(1)
        first = await kept(matches, limit=2)
        assert await numbers(matches, before=first[-1].id, limit=2) == [2, 1]
        assert await numbers(matches, before=first[-1].id) == [2, 1, 0]

    async def test_beyond_the_bound_the_oldest_of_its_namespace_goes(self, make: Make, clock: FakeClock) -> None:
        matches = await make(most=3)
        record(matches, 9, namespace="blog")
        for number in range(5):
            clock.advance(1)
            record(matches, number)
        assert await numbers(matches) == [4, 3, 2, 9]

    async def test_it_is_kept_for_thirty_days(self, make: Make, clock: FakeClock) -> None:
        matches = await make()
        record(matches, 1)
        [old] = await kept(matches)
        clock.advance(30 * DAY_S)
        assert await matches.get(old.id) == old
        record(matches, 2)
        clock.advance(0.01)
        assert await numbers(matches) == [2]
        with pytest.raises(UnknownReviewError):
            await matches.get(old.id)

    async def test_of_a_long_prompt_the_beginning_is_kept(self, make: Make) -> None:
        matches = await make()
        record(matches, 1, prompt=10_000 * "狐")
        [found] = await kept(matches)
        assert found.prompt == 2_000 * "狐"

    async def test_what_is_dropped_is_gone_and_nothing_else(self, make: Make) -> None:
        matches = await make()
        record(matches, 1)
        record(matches, 2)
        [one] = [each for each in await kept(matches) if each.key == picture_key(1)]
        for _ in range(2):
            await matches.drop(one)
            assert await numbers(matches) == [2]
        with pytest.raises(UnknownReviewError):
            await matches.get(one.id)

    @pytest.mark.parametrize("match_id", ["", "1800000000000", "1800000000000-", "[", "+", "\u2603", "(a b"])
    async def test_what_is_no_id_names_nothing(self, make: Make, match_id: str) -> None:
        matches = await make()
        record(matches, 1)
        with pytest.raises(UnknownReviewError):
            await matches.get(match_id)

    async def test_an_identity_is_forgotten_where_it_was_asked_for(self, make: Make) -> None:
        matches = await make()
        for number in (1, 2):
            record(matches, number)
            record(matches, number, namespace="blog")
        await kept(matches)
        record(matches, 1)
        await matches.forget("shop", picture_key(1, variant=3))
        assert sorted(await numbers(matches, namespace="shop")) == [2]
        assert sorted(await numbers(matches, namespace="blog")) == [1, 2]

    async def test_a_namespace_is_forgotten_whole_and_no_other(self, make: Make) -> None:
        matches = await make()
        record(matches, 1)
        record(matches, 2, namespace="blog")
        await kept(matches)
        record(matches, 3)
        await matches.forget("shop", None)
        assert await numbers(matches) == [2]


class TestShared:
    async def test_all_replicas_add_to_one_sample_and_a_restart_reads_it(self, opened: Open) -> None:
        one, other = await opened(), await opened()
        record(one, 1)
        record(other, 2)
        await other.aclose()
        assert sorted(await numbers(one)) == [1, 2]
        assert sorted(await numbers(await opened())) == [1, 2]

    async def test_it_is_written_in_the_background(self, opened: Open, clock: FakeClock) -> None:
        one, other = await opened(), await opened()
        one.start()
        await until(lambda: clock.sleepers == 1)
        record(one, 1)
        clock.advance(1.0)

        async def is_written() -> bool:
            return await numbers(other) == [1]

        await until(is_written)
        await one.aclose()

    @pytest.mark.parametrize("whole", [True, False])
    async def test_what_another_replica_has_yet_to_write_does_not_come_back_when_it_was_forgotten(
        self, opened: Open, clock: FakeClock, *, whole: bool
    ) -> None:
        one, other = await opened(), await opened()
        record(other, 1)
        clock.advance(0.1)
        await one.forget("shop", None if whole else picture_key(1))
        await other.write()
        assert await numbers(one) == []
        clock.advance(0.1)
        record(other, 1)
        await other.write()
        assert await numbers(one) == [1]

    async def test_as_many_as_are_kept_are_written_at_once(self, opened: Open) -> None:
        one = await opened()
        for number in range(1_001):
            record(one, number)
        assert len(await kept(one)) == 1_000

    async def test_what_a_later_version_wrote_is_passed_over_and_kept(self, opened: Open) -> None:
        one = await opened()
        record(one, 1)
        await one.write()
        client: Any = one._client
        for told in ('{"level": 9}', "[]", "", "7"):
            await client.zadd(one._name("shop", "hits"), {f"1800000000000-{told[:8]:_<8} {told}": 0})
        with capture_logs() as logs:
            assert await numbers(one) == [1]
        assert {each["event"] for each in logs} == {"match_unreadable"}
        assert await client.zcard(one._name("shop", "hits")) == 5

    async def test_nothing_of_it_has_a_ttl(self, opened: Open) -> None:
        one = await opened()
        record(one, 1)
        await one.write()
        await one.forget("shop", picture_key(2))
        for name in (one._name("shop", "hits"), one._name("shop", "forgotten"), one._all_name):
            assert await one._client.ttl(name) == -1

    async def test_while_redis_is_silent_hits_wait_and_reading_and_forgetting_say_so(
        self, opened: Open, valkey_server: ValkeyServer
    ) -> None:
        async with TcpProxy("127.0.0.1", valkey_server.port) as proxy:
            one = await opened(f"redis://127.0.0.1:{proxy.port}/0", timeout_s=1.0)
            proxy.cut()
            record(one, 1, prompt="a red fox")
            with capture_logs() as logs:
                for _ in range(2):
                    with pytest.raises(AccountsUnavailableError):
                        await kept(one)
            with pytest.raises(AccountsUnavailableError):
                await one.get("1800000000000-00000000")
            with pytest.raises(AccountsUnavailableError):
                await one.forget("blog", None)
            proxy.resume()
            assert await numbers(one) == [1]
        assert [each["event"] for each in logs] == ["matches_unreachable"]
        assert "fox" not in str(logs)


# --- which calls ---


@pytest.fixture
async def front(house: House) -> AsyncIterator[tuple[Front, LocalMatches]]:
    """A service whose namespaces answer with pictures of other prompts, and what it keeps of that: all."""
    house.namespace = replace(house.namespace, similarity=MatchLevel.CANONICAL)
    storing = replace(house.namespace, name="storing", partition="storing", store_prompts=True)
    matches = LocalMatches(clock=house.clock)
    async with open_front(house, namespaces=[storing], sampler=sampler(matches, 100.0)) as front:
        yield front, matches


def sampler(matches: Matches, percent: float) -> Sampler:
    return Sampler(matches, percent=percent, rng=Random(7))  # noqa: S311 - a sample


class TestCalls:
    async def test_a_similar_hit_is_kept_with_both_keys_and_without_its_prompt(
        self, front: tuple[Front, LocalMatches]
    ) -> None:
        service, matches = front
        made = await service.stub.GetImage(ask(FOX))
        await service.stub.GetImage(ask(FOX))
        assert await kept(matches) == []
        answer = await service.stub.GetImage(ask(SAME_FOX))
        [found] = await kept(matches)
        _, asked = service.house.identity(SAME_FOX)
        assert answer.status.matched_key == made.images[0].key == found.matched_key.name
        assert found.key.name == asked.key.name
        assert (found.namespace, found.level, found.prompt) == ("default", MatchLevel.CANONICAL, "")
        labels = {"namespace": "default", "level": "canonical"}
        assert service.house.registry.get_sample_value("cacheserver_similar_hits_total", labels) == 1

    async def test_each_picture_of_an_answer_is_kept_by_its_variant(self, front: tuple[Front, LocalMatches]) -> None:
        service, matches = front
        await service.stub.GetImage(ask(FOX, n=2))
        await service.stub.GetImage(ask(SAME_FOX, n=2))
        found = await kept(matches)
        assert sorted(each.key.variant for each in found) == [0, 1]
        assert all(each.key.variant == each.matched_key.variant for each in found)

    async def test_a_namespace_that_stores_prompts_keeps_it_as_it_was_asked_for(
        self, front: tuple[Front, LocalMatches]
    ) -> None:
        service, matches = front
        for prompt in (FOX, SAME_FOX):
            await service.stub.GetImage(ask(prompt, namespace="storing"))
        assert [each.prompt for each in await kept(matches)] == [SAME_FOX]

    async def test_purging_a_request_or_everything_forgets_its_prompts(self, front: tuple[Front, LocalMatches]) -> None:
        service, matches = front
        for prompt in (FOX, SAME_FOX, "red fox!"):
            await service.stub.GetImage(ask(prompt, namespace="storing"))
        purge = pb.PurgeImagesRequest(namespace="storing", spec=spec(SAME_FOX))
        await service.stub.PurgeImages(purge)
        assert [each.prompt for each in await kept(matches)] == ["red fox!"]
        await service.stub.PurgeImages(pb.PurgeImagesRequest(namespace="storing", everything=True, dry_run=True))
        assert len(await kept(matches)) == 1
        await service.stub.PurgeImages(pb.PurgeImagesRequest(namespace="storing", everything=True))
        assert await kept(matches) == []

    async def test_so_many_of_a_hundred_are_kept(self, house: House) -> None:
        house.namespace = replace(house.namespace, similarity=MatchLevel.CANONICAL)
        matches = LocalMatches(clock=house.clock)
        async with open_front(house, sampler=sampler(matches, 20.0)) as front:
            await front.stub.GetImage(ask(FOX))
            for _ in range(200):
                await front.stub.GetImage(ask(SAME_FOX))
        assert 20 < len(await kept(matches)) < 60

    async def test_at_none_of_a_hundred_none_is_kept(self, house: House) -> None:
        house.namespace = replace(house.namespace, similarity=MatchLevel.CANONICAL)
        matches = LocalMatches(clock=house.clock)
        async with open_front(house, sampler=sampler(matches, 0.0)) as front:
            for prompt in (FOX, SAME_FOX):
                await front.stub.GetImage(ask(prompt))
        assert await kept(matches) == []


# --- a whole service ---

_CONFIG = "[similarity]\nreview_percent = 100\n[namespaces.default]\nstore_prompts = true\n"


async def test_what_was_reported_wrong_is_paid_for_in_every_replica_and_after_restarts(
    tmp_path: Path, valkey_server: ValkeyServer
) -> None:
    async with OpenAIStandIn() as provider, AsyncExitStack() as stack:
        directories = [tmp_path / name for name in ("one", "other")]
        for each in directories:
            each.mkdir()
        one_env, other_env = (
            environment(each, provider=provider, redis=valkey_server, redis__prefix=f"{tmp_path.name}:")
            for each in directories
        )
        async with running(one_env, _CONFIG) as one, running(other_env, _CONFIG) as two:
            client = await stack.enter_async_context(AsyncClient(one.grpc_address))
            other = await stack.enter_async_context(AsyncClient(two.grpc_address))
            made = await client.get_image(FOX)
            assert (await other.get_image(SAME_FOX)).status.matched_key == made.images[0].key
            [hit] = [each async for each in other.admin.list_matches()]
            assert (hit.prompt, hit.matched_key) == (SAME_FOX, made.images[0].key)
            assert await client.admin.reject_match(hit.id) == hit
            with pytest.raises(UnknownNameError):
                await other.admin.reject_match(hit.id)

            async def is_paid_for() -> bool:
                return (await other.get_image(SAME_FOX)).status.tier is TierName.UPSTREAM

            await until(is_paid_for)
        async with running(one_env, _CONFIG) as one, AsyncClient(one.grpc_address) as client:
            own = await client.get_image(SAME_FOX)
            assert (own.images[0].key, own.status.matched_key) == (hit.key, "")


async def test_similar_hits_are_switched_off_in_every_replica_and_after_restarts_and_on_again(
    tmp_path: Path, valkey_server: ValkeyServer
) -> None:
    async with OpenAIStandIn() as provider:
        env = environment(tmp_path, provider=provider, redis=valkey_server)
        async with running(env) as service, AsyncClient(service.grpc_address) as client:
            await client.get_image(FOX)
            with pytest.raises(InvalidRequestError):
                await client.admin.set_switch(Switch.SIMILARITY, on=False, namespace="shop")
            await client.admin.set_switch(Switch.SIMILARITY, on=False)
        async with running(env) as service, AsyncClient(service.grpc_address) as client:
            [off] = await client.admin.list_switches()
            assert (off.switch, off.namespace, off.on) == (Switch.SIMILARITY, "", False)
            assert (await client.get_image(SAME_FOX)).status.tier is TierName.UPSTREAM
            await client.admin.set_switch(Switch.SIMILARITY, on=True)
            assert (await client.get_image("red fox!")).status.matched is MatchLevel.CANONICAL


async def test_with_similarity_not_enabled_every_prompt_is_paid_for(tmp_path: Path) -> None:
    async with OpenAIStandIn() as provider:
        env = environment(tmp_path, provider=provider)
        config = "[similarity]\nenabled = false\n"
        async with running(env, config) as service, AsyncClient(service.grpc_address) as client:
            tiers = [(await client.get_image(prompt)).status.tier for prompt in (FOX, SAME_FOX)]
    assert tiers == [TierName.UPSTREAM, TierName.UPSTREAM]
