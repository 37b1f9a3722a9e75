"""Requests answered from what we have: nothing is paid, and whoever may not have such a picture never gets one."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from structlog.testing import capture_logs

from cacheserver.errors import (
    CacheServerError,
    InvalidRequestError,
    KeyGoneError,
    NotCachedError,
    OverloadedError,
    PermissionDeniedError,
)
from cacheserver.identity import identify
from cacheserver.model import (
    AnswerFrom,
    CachedImage,
    CacheKey,
    CachePolicy,
    Caller,
    GeneratedImage,
    Identity,
    ImageRequest,
    MatchLevel,
    Namespace,
    Outcome,
    Pending,
    Permission,
    Rendition,
    Served,
    Terms,
    TierName,
    VariantPolicy,
)
from cacheserver.paying import UnknownPolicy
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.renditions.renderer import ThreadRenderer
from cacheserver.tiers.redis import RedisTier
from cacheserver.tiers.redis_client import connect
from tests.fakes import FakeClock
from tests.house import EVERYTHING, FaultyTier, House, open_s3
from tests.provider import FakeUpstream, OpenAIStandIn, small_image
from tests.rpc_front import ask as request
from tests.rpc_front import failure, open_front, spec
from tests.running import calling, environment, running
from tests.servers import S3Server, ValkeyServer
from tests.test_cli import command, printed
from tests.waiting import until

QUALITY, FORMAT, SIZE = AnswerFrom
READER = Caller("reader", frozenset({Permission.READ}))
LARGE = "96x64"
SMALL = "48x32"
FOX = ImageRequest("a red fox", "gpt-image-2", size=LARGE, quality="high")
STRICT = Namespace("strict", "default")
"""Shares the pictures of the house's own namespace, and may be answered from nothing else."""

MASTERS = {
    "quality": ({}, {"quality": "low"}),
    "format": ({}, {"output_format": "jpeg", "output_compression": 80}),
    "webp": ({}, {"output_format": "webp"}),
    "size": ({}, {"size": SMALL}),
    "all at once": ({}, {"quality": "medium", "output_format": "webp", "size": SMALL}),
}
"""What is stored, and what is asked for: each as it differs from FOX."""


class SizedUpstream(FakeUpstream):
    """Makes pictures as large as they were asked for."""

    def _image(self, request: ImageRequest) -> GeneratedImage:
        made = super()._image(request)
        width, height = map(int, made.size.split("x"))
        data = small_image(self.images, request.output_format, (width, height))
        return replace(made, data=data, width=width, height=height, sha256=hashlib.sha256(data).hexdigest())


class WatchedRenderer:
    """The real renderer, which notes what is asked of it, waits at a gate, and fails when told to."""

    def __init__(self) -> None:
        self._renderer = ThreadRenderer(max_pixels=1_000_000, max_bytes=1_000_000, threads=1)
        self.rendered: list[Rendition] = []
        self.errors: list[CacheServerError] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def render(self, image: GeneratedImage, rendition: Rendition) -> GeneratedImage:
        self.rendered.append(rendition)
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        return await self._renderer.render(image, rendition)

    async def aclose(self) -> None:
        await self._renderer.aclose()


class Studio:
    """A house whose own namespace may be answered from everything, asked by whole requests."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.renderer = WatchedRenderer()
        house.upstream = SizedUpstream()
        house.namespace = replace(house.namespace, answer_from=frozenset(AnswerFrom))
        house.renderer = self.renderer
        house.restart()

    def identity(self, **changes: object) -> tuple[ImageRequest, Identity]:
        asked = replace(FOX, **changes)  # type: ignore[arg-type] # test convenience
        return asked, identify(asked, self.house.namespace)

    async def ask(
        self,
        *,
        namespace: Namespace | None = None,
        caller: Caller = EVERYTHING,
        terms: Terms | None = None,
        **of: object,
    ) -> list[Served] | Pending:
        asked, identity = self.identity(**of)
        namespace = namespace or self.house.namespace
        return await self.house.cache.get(asked, identity, namespace=namespace, caller=caller, terms=terms or Terms())

    async def get(self, **of: object) -> Served:
        answer = await self.ask(**of)  # type: ignore[arg-type] # test convenience
        assert isinstance(answer, list)
        return answer[0]

    async def by_key(self, key: CacheKey, namespace: Namespace) -> Served | Pending:
        return await self.house.cache.get_by_key(key, namespace=namespace, caller=EVERYTHING, terms=Terms())

    @property
    def calls(self) -> int:
        return self.house.upstream.calls


@pytest.fixture
async def studio(house: House) -> AsyncIterator[Studio]:
    studio = Studio(house)
    yield studio
    await studio.renderer.aclose()


# ---- What is answered


@pytest.mark.parametrize(("stored", "asked"), MASTERS.values(), ids=MASTERS)
async def test_what_dominates_a_request_answers_it_and_nothing_is_paid(
    studio: Studio, stored: dict[str, object], asked: dict[str, object]
) -> None:
    master = await studio.get(**stored)
    derived = await studio.get(**asked)
    assert studio.calls == 1
    assert derived.derived
    assert derived.entry.derived_from == master.entry.key.name
    assert (derived.tier, derived.cost_microusd) == (TierName.MEMORY, 0)
    assert derived.entry.key == studio.identity(**asked)[1].key
    picture = Image.open(io.BytesIO(derived.entry.image.data))
    wanted, _ = studio.identity(**asked)
    assert f"{picture.width}x{picture.height}" == wanted.size
    assert (picture.format or "").lower() == wanted.output_format


@pytest.mark.parametrize(("stored", "asked"), MASTERS.values(), ids=MASTERS)
async def test_asked_for_again_it_is_a_hit_that_says_what_it_was_made_from(
    studio: Studio, stored: dict[str, object], asked: dict[str, object]
) -> None:
    master = await studio.get(**stored)
    first = await studio.get(**asked)
    again = await studio.get(**asked)
    await studio.house.settle()
    studio.house.restart()
    after_a_restart = await studio.get(**asked)
    assert not again.derived
    assert again.entry == first.entry == after_a_restart.entry
    assert after_a_restart.tier is TierName.REDIS
    assert again.entry.derived_from == master.entry.key.name
    assert len(studio.renderer.rendered) <= 1


async def test_a_picture_that_will_do_as_it_is_is_not_encoded_again(studio: Studio) -> None:
    master = await studio.get()
    derived = await studio.get(quality="low")
    assert derived.entry.image.data == master.entry.image.data
    assert not studio.renderer.rendered


async def test_the_nearest_is_taken(studio: Studio) -> None:
    for quality, size in (("high", LARGE), ("high", SMALL), ("medium", LARGE)):
        await studio.get(namespace=STRICT, quality=quality, size=size)
    derived = await studio.get(quality="low", size=SMALL)
    assert derived.entry.derived_from == studio.identity(quality="high", size=SMALL)[1].key.name


async def test_what_was_derived_is_derived_from_in_turn_and_names_the_first(studio: Studio) -> None:
    master = await studio.get()
    await studio.get(size=SMALL)
    derived = await studio.get(size=SMALL, output_format="jpeg")
    assert derived.entry.derived_from == master.entry.key.name
    assert derived.entry.derived_by == {SIZE, FORMAT}


async def test_a_variant_comes_from_the_same_variant_alone(studio: Studio) -> None:
    masters = await studio.ask(terms=Terms(n=2))
    assert isinstance(masters, list)
    three = await studio.ask(terms=Terms(n=3), quality="low")
    assert isinstance(three, list)
    assert [served.derived for served in three] == [True, True, False]
    assert [served.entry.image.data for served in three[:2]] == [served.entry.image.data for served in masters]
    assert [variants for _, variants in studio.house.upstream.asked] == [(0, 1), (2,)]


async def test_another_one_is_derived_from_another_one(studio: Studio) -> None:
    masters = await studio.ask(terms=Terms(n=2))
    assert isinstance(masters, list)
    got = [await studio.get(terms=Terms(variant_policy=VariantPolicy.NEXT), quality="low") for _ in range(2)]
    assert [served.entry.image.data for served in got] == [served.entry.image.data for served in masters]
    assert studio.calls == 1


async def test_everybody_who_joins_the_load_is_answered_by_one_rendering(studio: Studio) -> None:
    await studio.get()
    asks = [asyncio.create_task(studio.get(output_format="jpeg")) for _ in range(20)]
    served = await asyncio.gather(*asks)
    assert all(each.derived for each in served)
    assert (studio.calls, len(studio.renderer.rendered)) == (1, 1)


async def test_who_may_not_pay_is_answered_too_and_refused_only_where_nothing_will_do(studio: Studio) -> None:
    with pytest.raises(NotCachedError):
        await studio.get(terms=Terms(cache_policy=CachePolicy.ONLY_IF_CACHED), quality="low")
    await studio.get()
    assert (await studio.get(terms=Terms(cache_policy=CachePolicy.ONLY_IF_CACHED), quality="low")).derived
    assert (await studio.get(caller=READER, quality="medium")).derived
    with pytest.raises(PermissionDeniedError):
        await studio.get(caller=READER, quality="max")
    assert studio.calls == 1


async def test_the_match_says_whether_the_very_same_prompt_made_the_master(studio: Studio) -> None:
    await studio.get(prompt="A red  fox.")
    assert (await studio.get(prompt="A red  fox.", quality="low")).matched is MatchLevel.EXACT
    assert (await studio.get(quality="medium")).matched is MatchLevel.STANDARD


# ---- What it saves


async def test_it_saves_what_was_asked_for_and_not_what_its_master_cost(studio: Studio) -> None:
    usual = {"size": "1024x1024"}
    low = await studio.get(namespace=STRICT, prompt="another", quality="low", **usual)
    again = await studio.get(namespace=STRICT, prompt="another", quality="low", **usual)
    master = await studio.get(**usual)
    hit = await studio.get(**usual)
    derived = await studio.get(quality="low", **usual)
    later = await studio.get(quality="low", **usual)
    assert low.cost_microusd == master.cost_microusd > 0  # this upstream has one price for all
    assert derived.saved_microusd == later.saved_microusd == again.saved_microusd
    assert 0 < derived.saved_microusd < hit.saved_microusd


async def test_of_a_size_without_a_list_price_it_saves_the_most_it_would_have_cost(studio: Studio) -> None:
    await studio.get()
    derived = await studio.get(size=SMALL)
    wanted, _ = studio.identity(size=SMALL)
    assert derived.saved_microusd == studio.house.generator.cheapest_microusd(wanted, 1) > 0


async def test_by_its_key_nobody_knows_what_it_saves(studio: Studio) -> None:
    await studio.get()
    derived = await studio.get(quality="low")
    served = await studio.by_key(derived.entry.key, studio.house.namespace)
    assert isinstance(served, Served)
    assert served.saved_microusd == 0


# ---- Who may not


@pytest.mark.parametrize("right", AnswerFrom)
async def test_only_what_the_namespace_allows_is_done(studio: Studio, right: AnswerFrom) -> None:
    """Each right by itself: what needs another one is paid for."""
    narrow = Namespace("narrow", "default", answer_from=frozenset({right}))
    await studio.get()
    asked: dict[AnswerFrom, dict[str, object]] = {
        QUALITY: {"quality": "low"},
        FORMAT: {"output_format": "jpeg"},
        SIZE: {"size": SMALL},
    }
    for each, changes in asked.items():
        assert (await studio.get(namespace=narrow, **changes)).derived == (each is right)
    assert studio.calls == 3


async def test_a_namespace_without_the_right_reads_it_as_a_miss_and_what_it_makes_takes_its_place(
    studio: Studio,
) -> None:
    await studio.get()
    derived = await studio.get(quality="low")
    made = await studio.get(namespace=STRICT, quality="low")
    assert (made.tier, made.entry.derived_from) == (TierName.UPSTREAM, "")
    assert made.entry.key == derived.entry.key
    await studio.house.settle()
    studio.house.restart()
    assert (await studio.get(quality="low")).entry == made.entry
    assert (await studio.get(namespace=STRICT, quality="low")).entry == made.entry
    assert studio.calls == 2


async def test_a_namespace_with_another_right_reads_it_as_a_miss(studio: Studio) -> None:
    await studio.get()
    await studio.get(quality="low")
    narrow = Namespace("narrow", "default", answer_from=frozenset({FORMAT, SIZE}))
    assert (await studio.get(namespace=narrow, quality="low")).tier is TierName.UPSTREAM


async def test_who_wants_no_transformation_never_gets_one(studio: Studio) -> None:
    await studio.get()
    plain = Terms(no_transform=True)
    with pytest.raises(NotCachedError):
        await studio.get(terms=replace(plain, cache_policy=CachePolicy.ONLY_IF_CACHED), quality="low")
    await studio.get(quality="low")
    made = await studio.get(terms=plain, quality="low")
    assert made.tier is TierName.UPSTREAM
    assert (await studio.get(terms=plain, quality="low")).entry == made.entry


async def test_by_its_key_it_is_gone_for_who_may_not_have_it(studio: Studio) -> None:
    await studio.get()
    derived = await studio.get(quality="low")
    with pytest.raises(KeyGoneError):
        await studio.by_key(derived.entry.key, STRICT)


async def test_a_rendition_has_a_key_of_its_own_and_everybody_may_have_it(studio: Studio) -> None:
    master = (await studio.get()).entry
    key = replace(master.key, digest=bytes(32))
    rendition = replace(master, key=key, derived_from=master.key.name)
    await studio.house.keeper.keep(rendition)
    served = await studio.by_key(key, STRICT)
    assert isinstance(served, Served)
    assert served.entry == rendition
    assert served.saved_microusd > 0


async def test_who_may_and_who_may_not_share_a_load_and_each_gets_its_own(studio: Studio) -> None:
    await studio.get()
    await studio.house.settle()
    studio.house.s3.gate.clear()
    asks = [
        asyncio.create_task(studio.get(namespace=namespace, quality="low"))
        for namespace in (STRICT, studio.house.namespace, STRICT)
    ]
    await asyncio.sleep(0)
    studio.house.s3.gate.set()
    served = await asyncio.gather(*asks)
    assert [each.derived for each in served] == [False, True, False]
    assert [each.cost_microusd > 0 for each in served] == [True, False, False]
    assert studio.calls == 2
    assert (await studio.get(quality="low")).entry == served[0].entry


async def test_what_was_paid_for_takes_the_place_of_what_another_replica_derived_meanwhile(studio: Studio) -> None:
    house = studio.house
    master = (await studio.get()).entry
    _, identity = studio.identity(quality="low")
    derived = replace(master, key=identity.key, derived_from=master.key.name, derived_by=frozenset({QUALITY}))

    async def another_replica_derives() -> None:
        await house.s3.put(derived.key, derived, replace=False)
        await house.redis.put(derived.key, derived, replace=False)

    house.upstream.during = another_replica_derives
    made = (await studio.get(namespace=STRICT, quality="low")).entry
    house.upstream.during = None
    await house.settle()
    assert made.key == derived.key
    for _ in range(2):
        assert (await studio.get(quality="low")).entry == made
        assert (await studio.get(namespace=STRICT, quality="low")).entry == made
        house.restart()
    assert [await tier.get(derived.key) for tier in (house.redis, house.s3)] == [made, made]
    assert studio.calls == 2


async def test_what_is_asked_for_anew_or_without_the_cache_is_made(studio: Studio) -> None:
    await studio.get()
    for policy in (CachePolicy.REFRESH, CachePolicy.NO_STORE):
        assert (await studio.get(terms=Terms(cache_policy=policy), quality="low")).tier is TierName.UPSTREAM


async def test_a_call_sent_again_is_given_its_own_picture_or_none(studio: Studio) -> None:
    await studio.get()
    terms = Terms(variant_policy=VariantPolicy.NEXT, request_id="mine")
    given = await studio.get(terms=terms, quality="low")
    assert (await studio.get(terms=terms, quality="low")).entry == given.entry
    await studio.house.settle()
    await studio.house.cache.purge(studio.house.namespace, key=given.entry.key, dry_run=False)
    with pytest.raises(KeyGoneError):
        await studio.get(terms=terms, quality="low")


async def test_a_namespace_that_observes_derives_nothing(studio: Studio) -> None:
    await studio.get()
    observing = replace(studio.house.namespace, name="observing", serve_percent=0)
    made = await studio.get(namespace=observing, quality="low")
    assert (made.tier, made.would_hit) == (TierName.UPSTREAM, None)
    cached = Terms(cache_policy=CachePolicy.ONLY_IF_CACHED)
    with pytest.raises(NotCachedError):
        await studio.get(namespace=observing, terms=cached, quality="medium")


async def test_with_memory_alone_it_is_derived_and_kept_there(studio: Studio) -> None:
    studio.house.restart(tiers=[])
    await studio.get()
    first = await studio.get(output_format="jpeg")
    again = await studio.get(output_format="jpeg")
    assert (first.derived, again.derived, again.entry) == (True, False, first.entry)
    assert studio.calls == 1


async def test_it_makes_room_for_a_picture_that_is_put(studio: Studio) -> None:
    house = studio.house
    await studio.get()
    derived = await studio.get(quality="low")
    _, identity = studio.identity(quality="low")
    entry, is_new = await house.cache.put(derived.entry.image, identity, namespace=house.namespace)
    assert (entry.key, entry.derived_by, is_new) == (derived.entry.key, frozenset(), True)
    assert (await studio.get(namespace=STRICT, quality="low")).entry == entry
    assert await house.cache.put(entry.image, identity, namespace=house.namespace) == (entry, False)


async def test_without_a_renderer_nothing_is_derived(studio: Studio) -> None:
    studio.house.renderer = None
    studio.house.restart()
    await studio.get()
    assert (await studio.get(quality="low")).tier is TierName.UPSTREAM


# ---- How long it is good for, and whose it is


async def test_it_is_as_old_as_its_master_and_no_longer_good(studio: Studio) -> None:
    house = studio.house
    master = await studio.get(terms=Terms(ttl_s=1_000, tags=("master",)))
    house.clock.advance(100)
    derived = await studio.get(terms=Terms(tags=("mine",)), quality="low")
    short = await studio.get(terms=Terms(ttl_s=300), quality="medium")
    assert derived.entry.create_time_s == master.entry.create_time_s
    assert derived.entry.expire_time_s == master.entry.expire_time_s
    assert short.entry.expire_time_s == master.entry.create_time_s + 300
    assert derived.entry.tags == ("mine",)
    assert derived.entry.namespace == house.namespace.name


async def test_a_master_older_than_is_accepted_or_than_the_ttl_allows_will_not_do(studio: Studio) -> None:
    await studio.get()
    studio.house.clock.advance(100)
    assert (await studio.get(terms=Terms(max_age_s=200), quality="low")).derived
    assert not (await studio.get(terms=Terms(max_age_s=50), quality="medium")).derived
    assert not (await studio.get(terms=Terms(ttl_s=50), output_format="jpeg")).derived


async def test_it_does_not_take_the_place_of_a_picture_that_is_too_old_for_this_caller(studio: Studio) -> None:
    old = await studio.get(namespace=STRICT, quality="low")
    studio.house.clock.advance(100)
    await studio.get()
    new = await studio.get(terms=Terms(max_age_s=50), quality="low")
    assert (new.tier, new.entry.key) == (TierName.UPSTREAM, old.entry.key)


async def test_a_purge_of_its_master_leaves_it_and_a_purge_of_its_own_reaches_it(studio: Studio) -> None:
    house = studio.house
    master = await studio.get()
    derived = await studio.get(terms=Terms(tags=("mine",)), quality="low")
    await house.settle()
    await house.cache.purge(house.namespace, key=master.entry.key, dry_run=False)
    assert (await studio.get(quality="low")).entry == derived.entry
    purged = await house.cache.purge(house.namespace, tag="mine", dry_run=False)
    assert purged.images == 1
    with pytest.raises(KeyGoneError):
        await studio.by_key(derived.entry.key, house.namespace)


async def test_what_is_purged_while_it_is_rendered_does_not_come_back(studio: Studio) -> None:
    house = studio.house
    await studio.get()
    await house.settle()
    studio.renderer.gate.clear()
    asking = asyncio.create_task(studio.get(output_format="jpeg"))
    await until(lambda: len(studio.renderer.rendered) == 1)
    await house.cache.purge(house.namespace, dry_run=False)
    studio.renderer.gate.set()
    derived = await asking
    assert derived.derived
    await house.settle()
    assert [await tier.get(derived.entry.key) for tier in (house.redis, house.s3)] == [None, None]
    assert house.memory.get(derived.entry.key) is None


# ---- What goes wrong


@pytest.mark.parametrize(
    "error", [InvalidRequestError({"output_format": "jpeg has no transparency"}), OverloadedError("too many wait")]
)
async def test_what_cannot_be_rendered_is_a_miss(studio: Studio, error: CacheServerError) -> None:
    await studio.get()
    studio.renderer.errors = [error]
    made = await studio.get(output_format="jpeg")
    assert (made.tier, made.entry.derived_from) == (TierName.UPSTREAM, "")


async def test_where_one_cannot_be_rendered_the_next_one_may(studio: Studio) -> None:
    await studio.get(quality="low")
    high = await studio.get()
    studio.renderer.errors = [InvalidRequestError({"output_format": "jpeg has no transparency"})]
    derived = await studio.get(output_format="jpeg", quality="low")
    assert derived.entry.derived_from == high.entry.key.name
    assert studio.calls == 2


async def test_a_master_that_is_not_as_large_as_it_was_asked_for_will_not_do(studio: Studio) -> None:
    asked, identity = studio.identity()
    data = small_image(1, "png", (40, 40))
    image = GeneratedImage(data, "image/png", 40, 40, hashlib.sha256(data).hexdigest(), asked.model, LARGE, "high", "")
    await studio.house.cache.put(image, identity, namespace=studio.house.namespace)
    assert (await studio.get(size=SMALL)).tier is TierName.UPSTREAM


async def test_a_silent_tier_is_no_reason_to_fail(studio: Studio) -> None:
    await studio.get()
    await studio.house.settle()
    studio.house.restart()
    studio.house.redis.is_down = True
    derived = await studio.get(quality="low")
    assert (derived.tier, derived.derived) == (TierName.S3, True)
    studio.house.s3.is_down = True
    studio.house.restart()
    assert (await studio.get(quality="medium")).tier is TierName.UPSTREAM


async def test_while_the_last_tier_cannot_say_it_is_derived_and_takes_nobodys_name(studio: Studio) -> None:
    house = studio.house
    real = await studio.get(namespace=STRICT, quality="low")
    await studio.get()
    await house.settle()
    house.restart(unknown=UnknownPolicy(pay=False))
    await house.redis.delete(real.entry.key)
    house.s3.is_down = True
    derived = await studio.get(quality="low")
    assert (derived.derived, derived.tier) == (True, TierName.REDIS)
    again = await studio.get(quality="low")
    assert (again.entry, again.tier, again.derived) == (derived.entry, TierName.MEMORY, False)
    house.s3.is_down = False
    await house.settle()
    house.restart()
    assert (await studio.get(quality="low")).entry == real.entry
    assert house.keeper.held_images == 0


async def test_a_miss_looks_for_what_dominates_it_in_one_pass_of_each_tier(studio: Studio) -> None:
    seen: list[int] = []
    for tier in (studio.house.redis, studio.house.s3):
        find = tier.find

        async def counted(keys: Sequence[CacheKey], find: object = find, **options: object) -> list[bool]:
            seen.append(len(keys))
            return await find(keys, **options)  # type: ignore[operator,no-any-return] # the tier's own

        tier.find = counted  # type: ignore[assignment,method-assign] # counts and asks
    await studio.get(quality="low", output_format="jpeg")
    assert seen == [24, 24]
    await studio.get(namespace=STRICT, prompt="another", quality="low")
    await studio.get(prompt="the dearest", quality="max", size="auto")
    assert seen == [24, 24]


async def test_another_replica_that_was_faster_decides_what_the_key_is_answered_with(studio: Studio) -> None:
    house = studio.house
    await studio.get()
    await house.settle()
    studio.renderer.gate.clear()
    asking = asyncio.create_task(studio.get(output_format="jpeg"))
    await until(lambda: len(studio.renderer.rendered) == 1)
    blue = (await studio.get(namespace=STRICT, prompt="a blue fox", output_format="jpeg")).entry
    _, identity = studio.identity(output_format="jpeg")
    theirs = replace(blue, key=identity.key)
    await house.s3.put(identity.key, theirs, replace=False)
    studio.renderer.gate.set()
    served = await asking
    assert (served.entry, served.derived) == (theirs, False)


# ---- On real servers


@pytest.fixture
async def on_servers(
    valkey_server: ValkeyServer, s3_server: S3Server, clock: FakeClock, tmp_path: Path
) -> AsyncIterator[Studio]:
    name = f"test-{tmp_path.name}"
    redis = RedisTier(
        connect(valkey_server.url, timeout_s=5.0, connect_timeout_s=5.0, max_connections=8),
        clock=clock,
        rng=random.Random(7),  # noqa: S311 - no secret
        prefix=f"{name}:",
    )
    s3 = open_s3(s3_server, clock=clock, prefix=f"{name}/")
    house = House(clock=clock, redis=FaultyTier(redis, TierName.REDIS), s3=FaultyTier(s3, TierName.S3))
    studio = Studio(house)
    yield studio
    await studio.renderer.aclose()
    await house.aclose()
    await redis.aclose()
    await s3.aclose()


async def test_every_real_tier_keeps_what_it_was_derived_from(on_servers: Studio) -> None:
    studio, house = on_servers, on_servers.house
    master = await studio.get()
    await house.settle()
    house.restart()
    await house.redis.delete(master.entry.key)
    first = await studio.get(output_format="webp", size=SMALL)
    assert (first.tier, first.derived) == (TierName.S3, True)
    await house.settle()
    found: list[CachedImage | None] = [await tier.get(first.entry.key) for tier in (house.redis, house.s3)]
    assert found == [first.entry, first.entry]
    house.restart()
    assert (await studio.get(namespace=STRICT, output_format="webp", size=SMALL)).tier is TierName.UPSTREAM
    assert studio.calls == 2


async def test_a_service_that_is_told_to_derives_and_pays_nothing(
    tmp_path: Path, valkey_server: ValkeyServer, s3_server: S3Server
) -> None:
    config = """
        [namespaces.default]
        answer_from = ["quality", "format"]
        [namespaces.strict]
        partition = "default"
    """
    async with OpenAIStandIn() as provider:
        env = environment(tmp_path, provider=provider, redis=valkey_server, s3=s3_server)
        async with running(env, config) as service, calling(service) as stub:
            high = await stub.GetImage(request(of={"quality": "high"}))
            low = request(of={"quality": "low", "output_format": "jpeg", "output_compression": 80})
            derived = await stub.GetImage(low)
            assert provider.calls == 1
            low.namespace = "strict"
            made = await stub.GetImage(low)
    assert derived.images[0].content_type == "image/jpeg"
    assert derived.status.derived_from == high.images[0].key
    assert (made.status.derived_from, made.status.tier, provider.calls) == ("", pb.TIER_UPSTREAM, 2)


# ---- As callers see it


async def test_callers_are_told_what_it_was_derived_from_and_it_is_booked_as_derived(studio: Studio) -> None:
    fields = {"size": LARGE, "quality": "high"}
    async with open_front(studio.house) as front:
        master = await front.stub.GetImage(request(of=fields))
        call = front.stub.GetImage(request(of=fields | {"quality": "low"}))
        derived = await call
        again = await front.stub.GetImage(request(of=fields | {"quality": "low"}))
        trailers = dict(await call.trailing_metadata())
        stats = await front.stub.GetStats(pb.GetStatsRequest())
        told = await front.stub.ExplainCall(pb.ExplainCallRequest(request_id=trailers["x-request-id"]))
    assert derived.status.derived_from == derived.image_status[0].derived_from == master.images[0].key
    assert again.status.derived_from == master.images[0].key
    assert derived.status.tier == pb.TIER_MEMORY
    assert trailers["cache-status"] == "cacheserver; hit; detail=memory; derived; age=0"
    assert told.images[0].status.derived_from == master.images[0].key
    [row] = [row for row in stats.rows if row.outcome == pb.OUTCOME_DERIVED]
    assert (row.requests, row.tier, row.spent_microusd) == (1, pb.TIER_MEMORY, 0)
    assert row.saved_microusd == derived.status.saved_microusd > 0
    [hits] = [row for row in stats.rows if row.outcome == pb.OUTCOME_HIT]
    assert hits.requests == 1


async def test_the_commands_show_what_it_was_derived_from(studio: Studio, tmp_path: Path) -> None:
    asked = ("a red fox", "--size", LARGE, "-o", str(tmp_path / "fox.png"))
    # The service shares this process, and its log lines are not what a command prints.
    with capture_logs():
        async with open_front(studio.house) as front:
            address = f"127.0.0.1:{front.server.port}"
            master = printed(await command("get", *asked, "--quality", "high", "--json", address=address))["images"][0]
            facts = printed(await command("get", *asked, "--quality", "low", "--json", address=address))["images"][0]
            shown = await command("get", *asked, "--quality", "low", address=address)
            fields = {"size": LARGE, "quality": "low"}
            call = front.stub.GetImage(request(of=fields), metadata=(("x-request-id", "mine"),))
            await call
            why = await command("why", "mine", address=address)
            stats = printed(await command("stats", "--json", address=address))
    assert (master["derived_from"], facts["derived_from"]) == (None, master["key"])
    assert f"from  {master['key']}" in shown.stdout
    assert f"made from {master['key']}" in "".join(why.stdout.split("\n"))
    assert [row["requests"] for row in stats["rows"] if row["outcome"] == "derived"] == [1]


async def test_no_transform_is_a_directive_that_callers_know_from_http(studio: Studio) -> None:
    fields = {"size": LARGE, "quality": "high"}
    plain = (("cache-control", "no-transform, only-if-cached"),)
    async with open_front(studio.house) as front:
        await front.stub.GetImage(request(of=fields))
        await front.stub.GetImage(request(of=fields | {"quality": "low"}))
        refused = await failure(front.stub.GetImage(request(of=fields | {"quality": "low"}), metadata=plain))
        assert refused.reason == "NOT_CACHED"
        assert (await front.stub.GetImage(request(of=fields), metadata=plain)).images[0].key
        explained = await front.stub.ExplainKey(pb.ExplainKeyRequest(spec=spec(**fields | {"quality": "low"})))
        by_key = pb.GetImageRequest(key=explained.explanation.key)
        assert (await failure(front.stub.GetImage(by_key, metadata=plain))).reason == "KEY_GONE"


async def test_the_saved_money_of_derived_pictures_is_counted_apart(studio: Studio) -> None:
    async with open_front(studio.house) as front:
        await front.stub.GetImage(request(of={"size": "1024x1024", "quality": "high"}))
        saved = [
            (await front.stub.GetImage(request(of={"size": "1024x1024", "quality": "low"}))).status.saved_microusd
            for _ in range(2)
        ]
    sample = studio.house.registry.get_sample_value
    assert sample("cacheserver_derived_saved_microusd_total", {"namespace": "default"}) == saved[0]
    assert sample("cacheserver_saved_microusd_total") == sum(saved)
    labels = {"namespace": "default", "outcome": Outcome.DERIVED, "tier": TierName.MEMORY}
    assert sample("cacheserver_requests_total", labels) == 1
