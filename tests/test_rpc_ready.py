"""GetImage calls that are answered with a finished reply: nobody can tell them from those that are asked in full."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheserver.accounting.books import ToldApart
from cacheserver.identity import identify
from cacheserver.model import (
    CacheKey,
    Caller,
    GeneratedImage,
    Identity,
    ImageRequest,
    MatchLevel,
    Namespace,
    Outcome,
    Pending,
    Permission,
    Reply,
    Served,
    StatsField,
    Terms,
    TierName,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.recall import Recall
from cacheserver.rpc import service, split, templates
from cacheserver.rpc.service import Limits
from cacheserver.tiers.memory import MemoryCache, entry_bytes
from tests.fakes import FakeClock
from tests.house import House, open_tier
from tests.rpc_front import Front, ask, authorization, failure, open_front
from tests.test_calls_auth import digest
from tests.tier_contract import make_entry


@pytest.fixture
async def front(house: House) -> AsyncIterator[Front]:
    async with open_front(house) as front:
        yield front


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The GetImage requests that took the ordinary way."""
    parsed: list[bytes] = []

    def parse(message_type: Any, raw: bytes) -> Any:
        parsed.append(raw)
        return message_type.FromString(raw)

    monkeypatch.setattr(service, "parse", parse)
    return parsed


@pytest.fixture
def taken_apart(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The GetImage requests whose prompts were read."""
    taken: list[bytes] = []

    def parts(raw: bytes) -> Any:
        taken.append(raw)
        return apart(raw)

    apart = split.prompted
    monkeypatch.setattr(templates, "prompted", parts)
    return taken


async def known(front: Front, request: pb.GetImageRequest, **options: Any) -> pb.GetImageResponse:
    """The answer to a request that is known from then on: made, found in memory, and found there again."""
    await front.stub.GetImage(request, **options)
    await front.stub.GetImage(request, **options)
    response: pb.GetImageResponse = await front.stub.GetImage(request, **options)
    return response


class TestWhatIsAnsweredUnread:
    async def test_a_call_that_comes_again_is_and_its_answer_is_the_same(self, front: Front, read: list[bytes]) -> None:
        await front.stub.GetImage(ask())
        hit = await front.stub.GetImage(ask())
        assert len(read) == 1
        call = front.stub.GetImage(ask())
        assert await call == hit
        trailers = dict(await call.trailing_metadata())
        assert len(read) == 1
        assert trailers["cache-status"] == "cacheserver; hit; detail=memory; age=0"
        assert len(trailers["x-request-id"]) == 32

    async def test_ids_and_tags_of_a_call_do_not_matter(self, front: Front, read: list[bytes]) -> None:
        await known(front, ask(request_id="first", tags=["a"]))
        del read[:]
        await front.stub.GetImage(ask(request_id="second", tags=["b", "c"]))
        await front.stub.GetImage(ask())
        assert not read

    @pytest.mark.parametrize(
        "other",
        [
            ask("a blue fox"),
            ask(of={"size": "1024x1536"}),
            ask(n=2),
            ask(max_age={"seconds": 60}),
            ask(tags=["not fit"]),
            ask(tags=["t"] * 17),
            ask(request_id="x" * 129),
            ask(cache_policy=pb.CACHE_POLICY_REFRESH),
            ask(delivery=pb.DELIVERY_URL),
            ask(max_inline_bytes=1),
            ask(variant_policy=pb.VARIANT_POLICY_STICKY),
        ],
        ids=str,
    )
    async def test_a_call_that_asks_for_something_else_is_read_every_time(
        self, front: Front, read: list[bytes], other: pb.GetImageRequest
    ) -> None:
        await known(front, ask())
        for _ in range(2):
            await asyncio.gather(front.stub.GetImage(other), return_exceptions=True)
        seen = len(read)
        await asyncio.gather(front.stub.GetImage(other), return_exceptions=True)
        is_a_hit_like_any = other == ask("a blue fox") or other == ask(of={"size": "1024x1536"})
        assert (len(read) == seen) == is_a_hit_like_any

    async def test_a_call_with_directives_in_its_metadata_is_read(self, front: Front, read: list[bytes]) -> None:
        await known(front, ask())
        del read[:]
        await front.stub.GetImage(ask(), metadata=(("cache-control", "no-cache"),))
        assert len(read) == 1
        assert front.house.upstream.calls == 2

    @pytest.mark.parametrize(
        ("written_otherwise", "in_the_end"),
        [(b"\xf2\x00\x81\x01" + b"x" * 129, b"\x72\x03one"), (b"\xfa\x00\x01a" * 16, b"")],
        ids=["request_id", "tags"],
    )
    async def test_an_id_and_tags_that_are_written_as_nobody_writes_them_are_read_every_time(
        self, front: Front, written_otherwise: bytes, in_the_end: bytes
    ) -> None:
        raw = ask().SerializeToString() + written_otherwise
        for _ in range(3):
            await front.raw("GetImage", raw + in_the_end)
        unfit = raw if in_the_end else raw + b"\x7a\x01b"
        assert (await failure(front.raw("GetImage", unfit))).code == "INVALID_ARGUMENT"

    async def test_a_call_that_has_a_picture_made_is_not_known_by_what_it_was_given_when_it_was_sent_twice(
        self, front: Front
    ) -> None:
        first, second, third = (ask(cache_policy=pb.CACHE_POLICY_REFRESH, request_id=name) for name in ("1", "2", ""))
        made = await front.stub.GetImage(first)
        for _ in range(2):
            assert (await front.stub.GetImage(first)).images == made.images
        for other in (second, third):
            assert (await front.stub.GetImage(other)).status.tier == pb.TIER_UPSTREAM
        assert front.house.upstream.calls == 3

    async def test_a_longer_request_is_read(self, front: Front, read: list[bytes]) -> None:
        await known(front, ask("x" * 5_000))
        assert len(read) == 3

    async def test_a_key_is_asked_for_unread_too(self, front: Front, read: list[bytes]) -> None:
        made = await front.stub.GetImage(ask())
        by_key = pb.GetImageRequest(key=made.images[0].key)
        first = await known(front, by_key)
        del read[:]
        assert await front.stub.GetImage(by_key) == first
        assert not read

    async def test_none_is_where_none_is_to_be_known(self, house: House, taken_apart: list[bytes]) -> None:
        async with open_front(house, limits=Limits(known_requests=0)) as front:
            first = await known(front, ask())
            del taken_apart[:]
            assert await front.stub.GetImage(ask()) == first
        assert len(taken_apart) == 1

    async def test_long_ones_are_known_in_place_of_several(self, house: House, taken_apart: list[bytes]) -> None:
        async with open_front(house, limits=Limits(known_requests=6)) as front:
            short, long = ask(), ask("x" * 3_900)
            await known(front, short)
            await known(front, long)
            del taken_apart[:]
            await front.stub.GetImage(short)
            await front.stub.GetImage(long)
            assert not taken_apart
            await known(front, ask("y" * 3_900))
            del taken_apart[:]
            await front.stub.GetImage(ask("y" * 3_900))
            assert not taken_apart
            await front.stub.GetImage(short)
            await front.stub.GetImage(long)
        assert len(taken_apart) == 2

    async def test_the_oldest_of_too_many_is_read_again(self, house: House, taken_apart: list[bytes]) -> None:
        async with open_front(house, limits=Limits(known_requests=1)) as front:
            await known(front, ask())
            await known(front, ask("a blue fox"))
            del taken_apart[:]
            await front.stub.GetImage(ask("a blue fox"))
            assert not taken_apart
            await front.stub.GetImage(ask())
        assert len(taken_apart) == 1


@pytest.fixture
async def forgetful(house: House) -> AsyncIterator[Front]:
    """A front that knows no call by its bytes: the prompt of each is read."""
    async with open_front(house, limits=Limits(known_requests=0)) as front:
        yield front


class TestWhatIsKeptWithAnEntryOfWhoAskedLast:
    async def test_prompts_that_are_alike_once_normalized_are_each_told_how_they_match(
        self, forgetful: Front, read: list[bytes]
    ) -> None:
        await known(forgetful, ask())
        del read[:]
        levels = [
            (await forgetful.stub.GetImage(ask(prompt))).status.matched
            for prompt in ("a red fox", "A red fox.", "A red fox.", "a red fox", "A  red   fox!", "a red fox")
        ]
        exact, standard = pb.MATCH_LEVEL_EXACT, pb.MATCH_LEVEL_STANDARD
        assert levels == [exact, standard, standard, exact, standard, exact]
        assert not read

    async def test_it_counts_in_memory_and_the_longest_prompt_is_kept_with_no_more_room(
        self, forgetful: Front, house: House
    ) -> None:
        made = await known(forgetful, ask())
        entry = house.memory.get(CacheKey.parse(made.images[0].key))
        assert entry is not None
        assert entry.reply is not None
        assert 1_000 < entry.reply.latest_bytes < 3_000
        with_latest_bytes = house.memory.size_bytes
        without = entry.within(replace(entry.reply, latest=None, latest_bytes=0))
        assert with_latest_bytes == entry_bytes(without) + entry.reply.latest_bytes
        await forgetful.stub.GetImage(ask(f"a red fox{' ' * 3_000}"))
        assert house.memory.size_bytes == with_latest_bytes

    async def test_a_call_that_is_read_does_not_make_others_be_told_anew(
        self, forgetful: Front, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await known(forgetful, ask())
        told_anew: list[object] = []
        worth = house.generator.worth_microusd
        monkeypatch.setattr(house.generator, "worth_microusd", lambda *of: told_anew.append(of) or worth(*of))
        await forgetful.stub.GetImage(ask("a blue fox", tags=["t"]))
        del told_anew[:]
        await forgetful.stub.GetImage(ask())
        await forgetful.stub.GetImage(ask("A red fox."))
        assert len(told_anew) == 1
        await forgetful.stub.GetImage(ask("A red fox."))
        assert len(told_anew) == 1

    async def test_a_new_picture_in_its_place_is_told_as_itself(self, forgetful: Front, house: House) -> None:
        old = await known(forgetful, ask())
        await forgetful.stub.GetImage(ask())
        new = await forgetful.stub.GetImage(ask(cache_policy=pb.CACHE_POLICY_REFRESH))
        await house.settle()
        for _ in range(3):
            told = await forgetful.stub.GetImage(ask())
            assert told.images[0].digest == new.images[0].digest != old.images[0].digest

    async def test_callers_are_booked_each_on_its_own(self, house: House) -> None:
        house.books._told_apart = ToldApart(frozenset(), frozenset())
        callers = [(digest(name), Caller(name, frozenset(Permission))) for name in ("ann", "bob")]
        limits = Limits(known_requests=0)
        async with open_front(house, callers=callers, anonymous=None, limits=limits) as front:
            for name in ("ann", "bob", "ann", "bob", "ann", "ann"):
                await front.stub.GetImage(ask(), metadata=authorization(name))
        rows = house.books.snapshot(None, [StatsField.CALLER, StatsField.OUTCOME]).rows
        requests = {(row.caller, row.outcome): row.requests for row in rows if row.requests}
        assert requests == {("ann", Outcome.MISS): 1, ("ann", Outcome.HIT): 3, ("bob", Outcome.HIT): 2}


class TestWhatMemoryLacks:
    """Of a call of a known template that memory cannot answer, too, the prompt alone is read."""

    LIKE = (
        {},
        {"namespace": "default", "of": {"quality": "low", "size": "1024x1536"}},
        {"priority": pb.PRIORITY_BATCH, "allow_degraded": True, "ttl": {"seconds": 60}, "max_wait": {"seconds": 5}},
        {"match_level": pb.MATCH_LEVEL_EXACT},
    )

    @pytest.mark.parametrize("like", LIKE, ids=str)
    @pytest.mark.parametrize("timeout_s", [None, 30.0])
    async def test_is_asked_of_the_cache_as_if_all_of_it_were_read(
        self, front: Front, house: House, read: list[bytes], like: dict[str, Any], timeout_s: float | None
    ) -> None:
        asked: list[tuple[ImageRequest, Identity, Namespace, Caller, Terms]] = []
        get = house.cache.get

        async def note(request: ImageRequest, identity: Identity, **of: Any) -> list[Served] | Pending:
            asked.append((request, identity, of["namespace"], of["caller"], of["terms"]))
            return await get(request, identity, **of)

        house.cache.get = note  # type: ignore[method-assign] # it only looks on
        await front.stub.GetImage(ask("a red fox", **like), timeout=timeout_s)
        await front.stub.GetImage(ask("A  blue fox.", request_id="r1", **like), timeout=timeout_s)
        assert len(read) == 1
        (first, _, *by_first, of_first), (second, identity, *by_second, of_second) = asked
        assert second == replace(first, prompt="A  blue fox.")
        assert identity == identify(second, house.namespace, like.get("match_level") and MatchLevel.EXACT)
        assert by_first == by_second
        assert replace(of_first, deadline_s=None, request_id="r1") == replace(of_second, deadline_s=None)
        assert (of_second.deadline_s is None) == (timeout_s is None)

    async def test_is_made_answered_and_booked_like_any(self, front: Front, house: House, read: list[bytes]) -> None:
        await front.stub.GetImage(ask())
        call = front.stub.GetImage(ask("A  blue fox."))
        made = await call
        assert len(read) == 1
        assert house.upstream.asked[-1][0].prompt == "A  blue fox."
        assert made.status.tier == pb.TIER_UPSTREAM
        assert (
            dict(await call.trailing_metadata())["cache-status"]
            == "cacheserver; fwd=uri-miss; stored; detail=upstream; age=0"
        )
        assert house.books.snapshot(None).total.requests == 2
        assert (await front.stub.GetImage(ask("a blue fox"))).images[0].digest == made.images[0].digest

    async def test_a_call_with_tags_is_read(self, front: Front, house: House, read: list[bytes]) -> None:
        await front.stub.GetImage(ask())
        made = await front.stub.GetImage(ask("a blue fox", tags=["t"]))
        assert len(read) == 2
        entry = house.memory.get(CacheKey.parse(made.images[0].key))
        assert entry is not None
        assert entry.tags == ("t",)

    async def test_an_item_of_a_stream_is_not(self, front: Front, read: list[bytes]) -> None:
        await front.stub.GetImage(ask())
        items = pb.BatchGetImagesRequest(requests=[ask(f"fox {n}", request_id=f"r{n}") for n in range(3)])
        answers = [each async for each in front.stub.BatchGetImages(iter([items]))]
        assert {item.response.status.tier for each in answers for item in each.items} == {pb.TIER_UPSTREAM}
        assert len(read) == 1


class TestWhereTheirPromptsAloneAreRead:
    async def test_calls_are_that_say_what_an_earlier_one_did_in_all_else(
        self, front: Front, read: list[bytes]
    ) -> None:
        for prompt in ("a red fox", "a blue fox"):
            await known(front, ask(prompt, of={"quality": "low"}))
        del read[:]
        other = await front.stub.GetImage(ask("A blue fox.", of={"quality": "low"}, request_id="x", tags=["t"]))
        assert not read
        assert other.status.matched == pb.MATCH_LEVEL_STANDARD
        assert other.images[0] == (await front.stub.GetImage(ask("a blue fox", of={"quality": "low"}))).images[0]

    @pytest.mark.parametrize(
        "other",
        [
            ask("a blue fox", n=2),
            ask("a blue fox", cache_policy=pb.CACHE_POLICY_REFRESH),
            ask("a blue fox", max_age={"seconds": 60}),
            ask("a blue fox", variant_policy=pb.VARIANT_POLICY_STICKY),
            ask("a blue fox", request_id="x" * 129),
            ask("a blue fox", tags=["not fit"]),
            ask("a blue fox", max_inline_bytes=1),
            ask("a blue fox", delivery=pb.DELIVERY_URL),
            ask("a blue fox", of={"inputs": [pb.InputImage(digest=f"sha256:{'0' * 64}")]}),
            ask(" "),
            ask("x" * 5_000),
        ],
        ids=lambda request: str(request)[:60],
    )
    async def test_others_take_the_ordinary_way_every_time(
        self, front: Front, read: list[bytes], other: pb.GetImageRequest
    ) -> None:
        await known(front, ask())
        await known(front, ask("a blue fox"))
        del read[:]
        for _ in range(3):
            await asyncio.gather(front.stub.GetImage(other), return_exceptions=True)
        assert len(read) == 3

    async def test_parameters_of_providers_are_part_of_what_is_alike(self, front: Front, read: list[bytes]) -> None:
        def with_steps(prompt: str, steps: int) -> pb.GetImageRequest:
            request = ask(prompt)
            request.spec.extra.update({"steps": steps, "prompt_strength": {"prompt": "a red fox"}})
            return request

        few = await known(front, with_steps("a red fox", 10))
        many = await known(front, with_steps("a red fox", 50))
        assert few.images[0].key != many.images[0].key
        blue = await known(front, with_steps("a blue fox", 50))
        del read[:]
        assert (await front.stub.GetImage(with_steps("a blue fox.", 50))).images == blue.images
        assert not read

    async def test_callers_have_none_in_common(self, house: House, read: list[bytes]) -> None:
        callers = [(digest(name), Caller(name, frozenset(Permission))) for name in ("ann", "bob")]
        async with open_front(house, callers=callers, anonymous=None) as front:
            await known(front, ask(), metadata=authorization("ann"))
            del read[:]
            await front.stub.GetImage(ask(), metadata=authorization("bob"))
        assert len(read) == 1

    async def test_a_picture_derived_from_another_takes_the_ordinary_way(self, front: Front, house: House) -> None:
        made = await known(front, ask())
        await house.settle()
        entry = house.memory.get(CacheKey.parse(made.images[0].key))
        assert entry is not None
        house.memory.put(entry.key, replace(entry, derived_from="v1.of.another.one.0", derived_by=frozenset({"size"})))
        other = await front.stub.GetImage(ask())
        assert other.status.tier == pb.TIER_REDIS  # this namespace allows no derived picture, and Redis has its own

    async def test_a_share_of_keys_that_is_only_observed_stays_so(self, house: House) -> None:
        house.namespace = replace(house.namespace, serve_percent=0)
        async with open_front(house) as front:
            await known(front, ask())
        assert house.upstream.calls == 3


class TestWhatIsAskedEveryTime:
    @pytest.mark.parametrize("name", ["bob", "ann"])
    async def test_rights_are(self, house: House, name: str) -> None:
        ann = Caller("ann", frozenset(Permission))
        other = Caller(name, frozenset(Permission), namespaces=frozenset({"other"}))
        callers = [(digest("a"), ann), (digest("b"), other)]
        async with open_front(
            house, callers=callers, anonymous=None, namespaces=[Namespace("other", "other")]
        ) as front:
            await known(front, ask(), metadata=authorization("a"))
            refused = await failure(front.stub.GetImage(ask(), metadata=authorization("b")))
            unknown = await failure(front.stub.GetImage(ask(), metadata=authorization("c")))
        assert (refused.code, unknown.code) == ("PERMISSION_DENIED", "UNAUTHENTICATED")

    async def test_a_purged_picture_is_made_anew(self, front: Front) -> None:
        await known(front, ask())
        await front.stub.PurgeImages(pb.PurgeImagesRequest(spec=ask().spec))
        again = await front.stub.GetImage(ask())
        assert again.status.tier == pb.TIER_UPSTREAM

    async def test_a_replaced_picture_is_told_as_the_new_one(self, front: Front) -> None:
        before = await known(front, ask())
        await front.stub.GetImage(ask(cache_policy=pb.CACHE_POLICY_REFRESH))
        after = await known(front, ask())
        assert after.images[0].digest != before.images[0].digest
        assert front.house.upstream.calls == 2

    async def test_a_picture_that_expires_is_made_anew(self, front: Front, house: House) -> None:
        await known(front, ask(ttl={"seconds": 30}))
        house.clock.advance(31)
        assert (await front.stub.GetImage(ask(ttl={"seconds": 30}))).status.tier == pb.TIER_UPSTREAM

    async def test_its_age_and_what_is_left_of_its_freshness_are_to_the_second(
        self, front: Front, house: House
    ) -> None:
        house.clock.advance(0.5)
        await known(front, ask(ttl={"seconds": 30}))
        told = []
        for passed_s in (0.25, 0.5, 0.25, 0.25, -1.25):
            house.clock.advance(passed_s)
            call = front.stub.GetImage(ask(ttl={"seconds": 30}))
            await call
            told.append(dict(await call.trailing_metadata())["cache-status"].partition("memory; ")[2])
        assert told == ["ttl=29; age=0", "ttl=29; age=0", "ttl=29; age=1", "ttl=28; age=1", "ttl=30; age=0"]

    @pytest.mark.parametrize("known_requests", [0, 10_000])
    async def test_what_it_saves_is_within_a_minute(
        self, house: House, monkeypatch: pytest.MonkeyPatch, known_requests: int
    ) -> None:
        async with open_front(house, limits=Limits(known_requests=known_requests)) as front:
            before = await known(front, ask())
            monkeypatch.setattr(house.generator, "worth_microusd", lambda *_: before.status.saved_microusd + 7)
            house.clock.advance(61)
            after = await front.stub.GetImage(ask())
            assert after.status.saved_microusd == before.status.saved_microusd + 7
            assert await front.stub.GetImage(ask()) == after

    async def test_a_namespace_that_screens_prompts_screens_every_one(self, house: House, read: list[bytes]) -> None:
        house.namespace = replace(house.namespace, store_prompts=True)
        async with open_front(house) as front:
            await known(front, ask())
        assert len(read) == 3

    async def test_how_long_a_caller_waits_is_known_where_it_has_to(
        self, front: Front, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[float | None] = []
        get = house.cache.get

        async def look(*args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs["terms"].deadline_s)
            return await get(*args, **kwargs)

        monkeypatch.setattr(house.cache, "get", look)
        await front.stub.GetImage(ask(), timeout=600)
        await front.stub.GetImage(ask("a blue fox"))
        timed, untimed = seen
        assert timed is not None
        assert 590 < timed <= 601  # gRPC sends so long a time in whole seconds, rounded up
        assert untimed is None

    async def test_the_books_are_where_they_were_taken_meanwhile(self, front: Front, house: House) -> None:
        await known(front, ask())
        house.books.take()
        await front.stub.GetImage(ask())
        [figures] = house.books.take().values()
        assert figures.requests == 1
        assert house.books.snapshot(None).total.requests == 4

    async def test_whether_the_service_is_going_down_is(self, front: Front) -> None:
        await known(front, ask())
        front.server._services[0]._reception.going_down.set()  # type: ignore[union-attr] # a PromptCacheService
        failed = await failure(front.stub.GetImage(ask()))
        assert (failed.code, failed.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")

    async def test_calls_that_are_too_many_hear_so(self, house: House) -> None:
        async with open_front(house, max_concurrent_calls=1) as front:
            await known(front, ask())
            house.upstream.hold()
            waiting = asyncio.ensure_future(front.stub.GetImage(ask("slow")))
            await house.upstream.arrived(2)
            assert (await failure(front.stub.GetImage(ask()))).code == "UNAVAILABLE"
            house.upstream.release()
            await waiting


@pytest.mark.usefixtures("uncollected")
class TestWhenItIsOver:
    async def test_a_hit_is_once_its_answer_has_gone_out(self, house: House) -> None:
        async with open_front(house, max_concurrent_calls=1) as front:
            first = await known(front, ask())
            for _ in range(20):
                assert await front.stub.GetImage(ask()) == first

    async def test_a_hit_is_whose_caller_has_gone(self, front: Front) -> None:
        await known(front, ask())
        for steps in range(40):
            leaving = asyncio.ensure_future(front.stub.GetImage(ask()))
            for _ in range(steps):
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait({leaving})
        async with asyncio.timeout(10):
            await front.server._services[0].idle()


class TestABug:
    @pytest.mark.parametrize(("part", "does"), [("books", "hit_again"), ("memory", "named")])
    async def test_is_told_as_internal_and_not_in_its_own_words(
        self, front: Front, monkeypatch: pytest.MonkeyPatch, part: str, does: str
    ) -> None:
        await front.stub.GetImage(ask())

        def fail(*_: object, **__: object) -> NoReturn:
            raise RuntimeError("a secret of ours")

        monkeypatch.setattr(getattr(front.house, part), does, fail)
        failed = await failure(front.stub.GetImage(ask(), metadata=(("x-request-id", "r1"),)))
        assert (failed.code, failed.reason, failed.trailers["x-request-id"]) == ("INTERNAL", "INTERNAL", "r1")
        assert "r1" in failed.message
        assert "secret" not in failed.message
        monkeypatch.undo()
        assert (await front.stub.GetImage(ask())).images

    async def test_leaves_no_call_in_progress(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        async with open_front(house, max_concurrent_calls=1) as front:
            first = await known(front, ask())

            def fail(*_: object, **__: object) -> NoReturn:
                raise RuntimeError("a secret of ours")

            monkeypatch.setattr(Recall, "note", fail)
            for _ in range(2):
                assert (await failure(front.stub.GetImage(ask()))).code == "INTERNAL"
            monkeypatch.undo()
            assert await front.stub.GetImage(ask()) == first


class TestTheBufferOfAnEntry:
    async def test_it_holds_the_finished_reply_and_the_picture_is_a_view_into_it(
        self, front: Front, house: House
    ) -> None:
        response = await known(front, ask())
        held = house.memory.get(CacheKey.parse(response.images[0].key))
        assert held is not None
        assert held.reply is not None
        assert isinstance(held.image.data, memoryview)
        assert held.image.data.obj is held.reply.raw
        assert held.image.data == response.images[0].data
        assert pb.GetImageResponse.FromString(held.reply.raw) == response

    async def test_requests_that_match_otherwise_are_told_so(self, front: Front, house: House) -> None:
        exact = await known(front, ask("a red fox"))
        loose = await known(front, ask("a  red   fox"))
        assert exact.status.matched == pb.MATCH_LEVEL_EXACT
        assert loose.status.matched == pb.MATCH_LEVEL_STANDARD
        assert await front.stub.GetImage(ask("a red fox")) == exact
        assert house.upstream.calls == 1

    def test_all_of_it_counts(self, clock: FakeClock) -> None:
        memory = MemoryCache(clock=clock, max_bytes=1_000_000)
        stored = make_entry()
        memory.put(stored.key, stored)
        before = memory.size_bytes
        raw = bytes(100) + bytes(stored.image.data) + bytes(50)
        kept = memory.keep_reply(stored, Reply(raw, 100, MatchLevel.EXACT, 5))
        assert memory.size_bytes == before + 150
        assert memory.get(stored.key) is kept
        assert kept == stored
        assert replace(kept, tags=("other",)).reply is None

    def test_one_that_is_as_large_as_may_be_stays_as_it_is(self, clock: FakeClock) -> None:
        stored = make_entry()
        memory = MemoryCache(clock=clock, max_bytes=1_000_000, max_entry_bytes=entry_bytes(stored))
        memory.put(stored.key, stored)
        raw = b"." + bytes(stored.image.data)
        assert memory.keep_reply(stored, Reply(raw, 1, MatchLevel.EXACT, 5)) is stored
        assert memory.get(stored.key) is stored

    def test_one_that_lies_there_no_more_keeps_none(self, clock: FakeClock) -> None:
        memory = MemoryCache(clock=clock, max_bytes=1_000_000)
        stored = make_entry()
        assert memory.keep_reply(stored, Reply(bytes(stored.image.data), 0, MatchLevel.EXACT, 5)) is stored
        assert memory.get(stored.key) is None


@dataclass(frozen=True)
class Step:
    """One thing that happens to a service."""

    what: Callable[[Front], Any]
    name: str

    def __repr__(self) -> str:
        return self.name


PROMPTS = st.sampled_from(["a red fox", "a  red fox", "a blue fox"])


@st.composite
def gets(draw: st.DrawFn) -> Step:
    request = ask(
        draw(PROMPTS),
        request_id=draw(st.sampled_from(["", "one", "two", "x" * 129])),
        tags=draw(st.sampled_from([[], ["a"], ["no tag"]])),
        cache_policy=draw(st.sampled_from([0, 0, 0, pb.CACHE_POLICY_ONLY_IF_CACHED, pb.CACHE_POLICY_REFRESH])),
        max_inline_bytes=draw(st.sampled_from([0, 0, 1])),
        variant_policy=draw(st.sampled_from([0, 0, pb.VARIANT_POLICY_STICKY])),
    )
    n = draw(st.sampled_from([None, None, 1, 2]))
    if n is not None:
        request.n = n
    metadata = draw(st.sampled_from([(), (), (("cache-control", "max-age=5"),), (("x-fallbacks", "2"),)]))
    raw = request.SerializeToString() + draw(st.sampled_from([b"", b"", b"\xf8\x07\x01", b"\x72\x01\xff", b"\x0a"]))

    async def get(front: Front) -> Any:
        call = front.channel.unary_unary("/promptcache.v1.PromptCacheService/GetImage")(raw, metadata=metadata)
        try:
            answer = pb.GetImageResponse.FromString(await call)
        except Exception:  # noqa: BLE001 - its status is what is compared
            answer = None
        trailers = dict(await call.trailing_metadata() or ())
        trailers.pop("x-request-id", None)
        trailers.pop("grpc-status-details-bin", None)  # it holds the id
        return answer, await call.code(), await call.details(), trailers

    return Step(get, f"get({raw!r}, {metadata})")


async def purge(front: Front) -> Any:
    return await front.stub.PurgeImages(pb.PurgeImagesRequest(spec=ask().spec))


async def pass_time(front: Front) -> None:
    front.house.clock.advance(61)


steps = st.lists(
    st.one_of(gets(), gets(), gets(), st.sampled_from([Step(purge, "purge"), Step(pass_time, "time")])), max_size=14
)


@asynccontextmanager
async def shop(*, at_once: bool, known_requests: int = 10_000) -> AsyncIterator[Front]:
    async with AsyncExitStack() as stack:
        directory, clock = Path(stack.enter_context(tempfile.TemporaryDirectory())), FakeClock()
        tiers = [await open_tier(directory / name, name, clock) for name in (TierName.REDIS, TierName.S3)]
        for tier in tiers:
            stack.push_async_callback(tier.aclose)
        house = House(clock=clock, redis=tiers[0], s3=tiers[1])
        stack.push_async_callback(house.aclose)
        limits = Limits(known_requests=known_requests)
        yield await stack.enter_async_context(open_front(house, at_once=at_once, limits=limits))


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(steps)
async def test_whatever_happens_the_answers_and_the_books_are_those_of_calls_that_wait(happens: list[Step]) -> None:
    async with (
        shop(at_once=True) as quick,
        shop(at_once=True, known_requests=0) as reading,
        shop(at_once=False) as slow,
    ):
        for step in happens:
            expected = await step.what(slow)
            assert await step.what(quick) == expected
            assert await step.what(reading) == expected
        for front in (quick, reading):
            assert front.house.books.snapshot(None).rows == slow.house.books.snapshot(None).rows
            assert front.house.upstream.calls == slow.house.upstream.calls


def test_a_picture_made_of_an_entry_is_not_bound_to_its_buffer() -> None:
    stored = make_entry()
    told = stored.within(Reply(b"..." + bytes(stored.image.data), 3, MatchLevel.EXACT, 0))
    assert isinstance(told.image, GeneratedImage)
    assert told.image == stored.image
