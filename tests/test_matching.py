"""Requests answered from what others asked for in other words: paid once, labelled, and never a wrong picture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from cacheserver.control.aliases import NoAliases, RedisAliases
from cacheserver.epochs import Tombstone
from cacheserver.errors import ConfigError, KeyGoneError, NotCachedError, UpstreamDownError
from cacheserver.identity import canonical_key, fingerprint, identify
from cacheserver.interfaces import Aliases
from cacheserver.model import (
    Alias,
    CachedImage,
    CacheKey,
    CachePolicy,
    Identity,
    ImageRequest,
    MatchLevel,
    Namespace,
    Pending,
    Served,
    Stale,
    Terms,
    TierName,
    VariantPolicy,
)
from cacheserver.tiers.redis_client import Client, connect, disconnect
from tests.fakes import FakeClock
from tests.house import EVERYTHING, MODEL, House
from tests.matching_house import (
    FOX,
    ONE_LINE,
    PREFIXES,
    SAME_FOX,
    SHARING,
    STRICT,
    THIRD_FOX,
    TWO_LINES,
    Replica,
    ask_in,
    client,
    house,
    redis_aliases,
    replicas,
    spellings,
)
from tests.waiting import until

__all__ = ["client", "house", "replicas"]


# ── one request after the other ─────────────────────────────────────────────────────────────────────────────────────


async def test_another_spelling_is_answered_with_what_the_first_one_paid_for_and_says_so(house: House) -> None:
    made = await house.get(FOX)
    answer = await house.get(SAME_FOX)
    assert (answer.entry, answer.tier, answer.matched) == (made.entry, TierName.MEMORY, MatchLevel.CANONICAL)
    assert answer.matched_key == made.entry.key.name
    assert (answer.cost_microusd, answer.saved_microusd) == (0, made.cost_microusd)
    assert house.upstream.calls == 1


async def test_the_same_spelling_is_no_similar_hit(house: House) -> None:
    await house.get(FOX)
    again = await house.get(FOX)
    assert (again.matched, again.matched_key) == (MatchLevel.EXACT, "")


async def test_a_picture_of_its_own_prompt_goes_before_that_of_another(house: House) -> None:
    await house.get(FOX)
    own = await house.get(SAME_FOX, cache_policy=CachePolicy.REFRESH)
    answer = await house.get(SAME_FOX)
    assert (answer.entry, answer.matched) == (own.entry, MatchLevel.EXACT)


async def test_a_picture_of_its_own_that_memory_has_lost_goes_before_that_of_another(house: House) -> None:
    await house.get(FOX)
    await house.get(SAME_FOX)
    own = await house.get(SAME_FOX, cache_policy=CachePolicy.REFRESH)
    await house.settle()
    house.memory.delete(own.entry.key)
    answer = await house.get(SAME_FOX)
    assert (answer.entry.key, answer.matched) == (own.entry.key, MatchLevel.EXACT)


async def test_what_was_refreshed_by_one_spelling_leaves_others_their_picture(house: House) -> None:
    made = await house.get(FOX)
    await house.get(SAME_FOX, cache_policy=CachePolicy.REFRESH)
    assert (await house.get(THIRD_FOX)).entry == made.entry


async def test_the_second_call_of_a_spelling_does_not_ask_the_tiers_again(house: House) -> None:
    await house.get(FOX)
    await house.get(SAME_FOX)
    await house.settle()
    asked = len(house.redis.gets), len(house.s3.gets)
    assert (await house.get(SAME_FOX)).matched is MatchLevel.CANONICAL
    assert (len(house.redis.gets), len(house.s3.gets)) == asked


async def test_a_spelling_asks_the_tiers_for_its_own_picture_again_after_a_minute(house: House) -> None:
    await house.get(FOX)
    await house.get(SAME_FOX)
    await house.settle()
    house.clock.advance(61)
    asked = len(house.s3.gets)
    assert (await house.get(SAME_FOX)).matched is MatchLevel.CANONICAL
    assert len(house.s3.gets) > asked


async def test_a_picture_of_its_own_that_was_too_old_for_one_call_answers_the_next(house: House) -> None:
    own = await house.get(SAME_FOX)
    await house.settle()
    house.clock.advance(100)
    house.restart()
    await house.get(FOX)
    await house.get(SAME_FOX, max_age_s=50.0)
    answer = await house.get(SAME_FOX)
    assert (answer.entry.key, answer.matched) == (own.entry.key, MatchLevel.EXACT)


async def test_who_refuses_pictures_of_other_prompts_has_its_own_renewed(house: House) -> None:
    house.namespace = replace(SHARING, ttl_s=100.0, stale_while_revalidate_s=1000.0)
    house.restart()
    await house.get(SAME_FOX, match_level=MatchLevel.STANDARD)
    await house.settle()
    house.clock.advance(101)
    await house.get(FOX)
    assert (await house.get(SAME_FOX, match_level=MatchLevel.STANDARD)).stale is Stale.RENEWED
    await house.cache.renewals.idle()
    renewed = await house.get(SAME_FOX, match_level=MatchLevel.STANDARD)
    assert (renewed.stale, renewed.matched) == (Stale.NO, MatchLevel.EXACT)


async def test_a_stale_picture_of_its_own_gives_way_to_the_fresh_one_of_another_spelling(house: House) -> None:
    house.namespace = replace(SHARING, ttl_s=100.0, stale_while_revalidate_s=1000.0)
    house.restart()
    await house.get(SAME_FOX)
    await house.settle()
    house.clock.advance(101)
    await house.get(FOX, cache_policy=CachePolicy.REFRESH)
    assert (await house.get(SAME_FOX)).stale is Stale.RENEWED
    await house.cache.renewals.idle()
    assert (await house.get(SAME_FOX)).stale is Stale.NO


async def test_a_further_variant_of_another_prompt_of_the_key_costs_later_spellings_one_picture(house: House) -> None:
    await house.get(ONE_LINE)
    await house.get(TWO_LINES, variant_policy=VariantPolicy.NEXT)
    await until(lambda: house.cache.in_flight == 0)
    images = house.upstream.images
    for prompt in ("Please draw {}", "an image of {}", "Create a picture of {}"):
        await house.get(prompt.format(TWO_LINES))
    assert house.upstream.images <= images + 1


async def test_a_call_sent_again_for_a_refreshed_picture_that_is_gone_gets_no_other_spellings(house: House) -> None:
    await house.get(FOX)
    terms = {"cache_policy": CachePolicy.REFRESH, "request_id": "one"}
    own = await house.get(SAME_FOX, **terms)
    await house.settle()
    await house.cache.purge(SHARING, key=own.entry.key, dry_run=False)
    with pytest.raises(KeyGoneError):
        await house.get(SAME_FOX, **terms)


async def test_a_picture_made_while_the_last_tier_cannot_say_answers_other_spellings(house: House) -> None:
    house.s3.is_down = True
    made = await house.get(FOX)
    answer = await house.get(SAME_FOX)
    house.s3.is_down = False
    assert (answer.entry.image, answer.matched) == (made.entry.image, MatchLevel.CANONICAL)


@pytest.mark.parametrize(
    ("namespace", "policy"),
    [
        (SHARING, CachePolicy.USE_CACHE),
        (SHARING, CachePolicy.REFRESH),
        (replace(SHARING, serve_percent=0.0), CachePolicy.USE_CACHE),
    ],
    ids=["served", "refreshed", "observed"],
)
async def test_what_keeps_a_prompt_from_its_canonical_form_is_found_before_money_is_spent(
    house: House, monkeypatch: pytest.MonkeyPatch, namespace: Namespace, policy: CachePolicy
) -> None:
    def fail(*_: object) -> CacheKey:
        raise ConfigError("no dictionary")

    monkeypatch.setattr("cacheserver.flight.canonical_key", fail)
    with capture_logs(), pytest.raises(ConfigError):
        await ask_in(house, namespace, FOX, cache_policy=policy)
    assert house.upstream.calls == 0


@pytest.mark.parametrize(
    "other",
    [
        {"size": "1024x1536"},
        {"quality": "high"},
        {"background": "transparent"},
        {"seed": 7},
        {"extra": {"style": "vivid"}},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_a_picture_of_other_parameters_never_answers(house: House, other: dict[str, object]) -> None:
    await house.get(FOX)
    request, identity = house.identity(SAME_FOX, **other)
    answer = await house.cache.get(request, identity, namespace=SHARING, caller=EVERYTHING, terms=Terms())
    assert isinstance(answer, list)
    assert (answer[0].tier, house.upstream.calls) == (TierName.UPSTREAM, 2)


async def test_a_picture_of_another_partition_never_answers(house: House) -> None:
    await house.get(FOX)
    answer = await ask_in(house, replace(SHARING, name="other", partition="other"), SAME_FOX)
    assert answer.tier is TierName.UPSTREAM


async def test_a_namespace_that_wants_its_own_prompts_pictures_pays(house: House) -> None:
    await house.get(FOX)
    assert (await ask_in(house, STRICT, SAME_FOX)).tier is TierName.UPSTREAM


async def test_what_such_a_namespace_pays_for_answers_for_no_other_prompt(house: House) -> None:
    await ask_in(house, STRICT, FOX)
    assert (await house.get(SAME_FOX)).tier is TierName.UPSTREAM


@pytest.mark.parametrize(
    "terms",
    [
        {"match_level": MatchLevel.EXACT},
        {"match_level": MatchLevel.STANDARD},
        {"cache_policy": CachePolicy.REFRESH},
        {"cache_policy": CachePolicy.NO_STORE},
        {"variant_policy": VariantPolicy.NEXT},
        {"variant_policy": VariantPolicy.RANDOM},
    ],
    ids=lambda terms: str(*terms.values()),
)
async def test_who_refuses_pictures_of_other_prompts_gets_none(house: House, terms: dict[str, object]) -> None:
    await house.get(FOX)
    await house.get(SAME_FOX)
    assert (await ask_in(house, SHARING, SAME_FOX, **terms)).tier is TierName.UPSTREAM


async def test_what_was_paid_for_by_one_who_refuses_similar_pictures_answers_others(house: House) -> None:
    made = await ask_in(house, SHARING, FOX, match_level=MatchLevel.STANDARD)
    assert (await house.get(SAME_FOX)).entry == made.entry


async def test_a_looser_level_than_the_namespaces_changes_nothing(house: House) -> None:
    await house.get(FOX)
    house.namespace = STRICT
    with pytest.raises(NotCachedError):
        await house.get(SAME_FOX, cache_policy=CachePolicy.ONLY_IF_CACHED, match_level=MatchLevel.SEMANTIC)


async def test_only_if_cached_is_answered_with_another_spellings_picture(house: House) -> None:
    await house.get(FOX)
    answer = await house.get(SAME_FOX, cache_policy=CachePolicy.ONLY_IF_CACHED)
    assert answer.matched is MatchLevel.CANONICAL


async def test_a_picture_that_is_too_old_for_a_call_does_not_answer_it(house: House) -> None:
    await house.get(FOX)
    house.clock.advance(100)
    assert (await house.get(SAME_FOX, max_age_s=50.0)).tier is TierName.UPSTREAM


async def test_what_was_paid_for_in_place_of_a_picture_too_old_for_one_spelling_answers_the_next(house: House) -> None:
    await house.get(FOX)
    house.clock.advance(100)
    new = await house.get(SAME_FOX, max_age_s=50.0)
    await until(lambda: house.cache.in_flight == 0)
    house.clock.advance(20)
    answer = await house.get(THIRD_FOX, max_age_s=50.0)
    assert (answer.entry, answer.matched) == (new.entry, MatchLevel.CANONICAL)


async def test_quality_words_tell_prompts_apart_where_the_namespace_says_so(house: House) -> None:
    house.namespace = replace(SHARING, ignore_quality_words=False)
    await house.get("a red fox, 8k")
    assert (await house.get("red fox, 8 K")).matched is MatchLevel.CANONICAL
    assert (await house.get("a red fox")).tier is TierName.UPSTREAM


async def test_of_several_pictures_those_that_the_other_spelling_lacks_are_paid_for(house: House) -> None:
    made = await house.get(FOX)
    answer = await house.ask(SAME_FOX, n=2)
    assert isinstance(answer, list)
    assert (answer[0].entry, answer[0].matched) == (made.entry, MatchLevel.CANONICAL)
    assert answer[1].tier is TierName.UPSTREAM
    assert [variants for _, variants in house.upstream.asked] == [(0,), (1,)]


async def test_a_picture_that_was_put_answers_for_other_spellings(house: House) -> None:
    made = await house.get("a blue owl")
    request, identity = house.identity(FOX)
    await house.cache.put(made.entry.image, identity, namespace=SHARING, canonical=canonical_key(request, SHARING))
    assert (await house.get(SAME_FOX)).matched is MatchLevel.CANONICAL


@pytest.mark.parametrize("namespace", ["default", ""], ids=["there", "everywhere"])
async def test_with_the_level_switched_off_each_spelling_pays_until_it_is_on_again(
    house: House, namespace: str
) -> None:
    await house.get(FOX)
    assert (await house.get(SAME_FOX)).matched is MatchLevel.CANONICAL
    house.epochs.learn([replace(Tombstone.of_switch(namespace, is_on=False), epoch=1)])
    assert (await house.get(THIRD_FOX)).tier is TierName.UPSTREAM
    with pytest.raises(NotCachedError):
        await house.get(SAME_FOX, cache_policy=CachePolicy.ONLY_IF_CACHED)
    house.epochs.learn([replace(Tombstone.of_switch(namespace, is_on=True), epoch=2)])
    assert (await house.get(SAME_FOX)).matched is MatchLevel.CANONICAL


async def test_a_namespace_is_not_switched_off_with_another(house: House) -> None:
    await house.get(FOX)
    house.epochs.learn([replace(Tombstone.of_switch("other", is_on=False), epoch=1)])
    assert (await house.get(SAME_FOX)).matched is MatchLevel.CANONICAL


class Counted(NoAliases):
    """Notes in which order aliases and the upstream were asked."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.asked: list[tuple[str, int]] = []

    async def find(self, names: Sequence[str]) -> list[Alias | None]:
        self.asked.append(("find", self._house.upstream.calls))
        return await super().find(names)

    async def add(self, name: str, alias: Alias, *, instead_of: Alias | None = None) -> bool:
        self.asked.append(("add", self._house.upstream.calls))
        return await super().add(name, alias, instead_of=instead_of)


async def test_a_miss_asks_for_aliases_once_before_it_pays_and_tells_of_one_behind_its_answer(house: House) -> None:
    aliases = Counted(house)
    house.restart(aliases=aliases)
    await house.get(FOX)
    await until(lambda: house.cache.in_flight == 0)
    assert aliases.asked == [("find", 0), ("add", 1)]


async def test_what_a_tier_has_under_its_own_key_asks_for_no_aliases(house: House) -> None:
    await house.get(FOX)
    await house.settle()
    aliases = Counted(house)
    house.restart(aliases=aliases)
    assert (await house.get(FOX)).tier is TierName.REDIS
    assert (await house.get(FOX)).tier is TierName.MEMORY
    assert aliases.asked == []


async def test_what_comes_from_behind_redis_answers_other_spellings_there_again(house: House) -> None:
    made = await house.get(FOX)
    await house.settle()
    aliases = Counted(house)
    house.restart(aliases=aliases, tiers=[house.s3])
    assert (await house.get(FOX)).tier is TierName.S3
    await house.cache.matching.idle()
    assert [what for what, _ in aliases.asked] == ["add"]
    assert (await house.get(SAME_FOX)).entry.key == made.entry.key


async def test_a_picture_from_before_the_level_answers_others_once_it_was_asked_for_in_its_own_words(
    house: House,
) -> None:
    made = await ask_in(house, STRICT, FOX)
    await house.settle()
    house.restart()
    assert (await house.get(FOX)).tier is TierName.REDIS
    await house.cache.matching.idle()
    assert (await house.get(SAME_FOX)).entry.key == made.entry.key


async def test_a_changed_list_raises_the_version_and_aliases_of_before_are_misses(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await house.get(FOX)
    monkeypatch.setattr(fingerprint, "CANONICAL", fingerprint.CANONICAL._replace(versioned="canonical/next"))
    new = await house.get(SAME_FOX)
    assert new.tier is TierName.UPSTREAM
    assert (await house.get(THIRD_FOX)).entry == new.entry
    assert (await house.get(FOX)).entry == made.entry


# ── wrong pictures ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_keys_that_were_banned_answer_for_one_another_no_more(house: House) -> None:
    made = await house.get(FOX)
    await house.get(SAME_FOX)
    _, wrong = house.identity(SAME_FOX)
    house.epochs.learn([replace(Tombstone.of_banned(wrong.key, made.entry.key), epoch=1)])
    own = await house.get(SAME_FOX)
    assert own.tier is TierName.UPSTREAM
    assert (await house.get(THIRD_FOX)).entry == made.entry


async def test_a_ban_is_kept_for_ever_and_takes_no_picture(house: House) -> None:
    made = await house.get(FOX)
    _, other = house.identity("a blue owl")
    ban = replace(Tombstone.of_banned(other.key, made.entry.key), epoch=1)
    house.epochs.learn([ban, Tombstone(2, "default", "tag:x")])
    assert ban not in house.epochs.settled_before(10)
    assert (await house.get(FOX)).entry == made.entry


class Lying(Aliases):
    """Says that one picture answers for everything."""

    def __init__(self, alias: Callable[[], Alias | None]) -> None:
        self._alias = alias

    async def find(self, names: object) -> list[Alias | None]:
        return [self._alias() for _ in names]  # type: ignore[attr-defined] # as many as asked for

    async def add(self, name: str, alias: Alias, *, instead_of: Alias | None = None) -> bool:  # noqa: ARG002
        return False

    async def remove(self, name: str, alias: Alias) -> None:
        pass


async def test_an_alias_that_points_to_a_picture_of_another_canonical_key_serves_nothing(house: House) -> None:
    owl: list[CachedImage] = []
    house.restart(aliases=Lying(lambda: Alias(owl[0].key, MatchLevel.CANONICAL, owl[0].prompt_digest) if owl else None))
    owl.append((await house.get("a blue owl")).entry)
    answer = await house.get(FOX)
    assert (answer.tier, house.upstream.calls) == (TierName.UPSTREAM, 2)


async def test_an_alias_that_points_into_another_partition_serves_nothing(house: House) -> None:
    owl: list[CachedImage] = []
    house.restart(aliases=Lying(lambda: Alias(owl[0].key, MatchLevel.CANONICAL, owl[0].prompt_digest) if owl else None))
    owl.append((await ask_in(house, Namespace("secret", "secret"), "a blue owl")).entry)
    answer = await house.get(FOX)
    assert (answer.tier, answer.entry.key.partition) == (TierName.UPSTREAM, "default")


async def test_a_picture_by_which_another_prompt_of_the_key_replaced_one_answers_nobody_from_memory(
    house: House,
) -> None:
    await house.get(ONE_LINE)
    prompt = f"Please draw {ONE_LINE}"
    assert (await house.get(prompt)).matched is MatchLevel.CANONICAL
    await house.get(TWO_LINES, cache_policy=CachePolicy.REFRESH)
    answer = await house.get(prompt)
    assert answer.entry.canonical_digest == canonical(prompt).digest


async def test_what_a_prompt_was_promised_does_not_answer_another_prompt_of_its_key(
    client: Client, house: House
) -> None:
    aliases = redis_aliases(client, next(PREFIXES))
    prompt = f"Please draw {ONE_LINE}"
    await ask_in(house, STRICT, prompt)
    await house.settle()
    house.restart(aliases=aliases)
    await house.get(prompt)
    await house.cache.matching.idle()
    assert (await house.get(ONE_LINE, max_wait_s=60.0)).matched is MatchLevel.CANONICAL
    await house.cache.matching.idle()
    house.restart(aliases=aliases)
    answer = await house.get(TWO_LINES)
    assert (answer.tier, canonical(TWO_LINES) == canonical(prompt)) == (TierName.UPSTREAM, False)


async def test_a_purged_picture_answers_no_spelling_and_the_next_one_does(house: House) -> None:
    made = await house.get(FOX)
    await house.get(SAME_FOX)
    await house.cache.purge(SHARING, key=made.entry.key, dry_run=False)
    new = await house.get(SAME_FOX)
    assert new.tier is TierName.UPSTREAM
    assert (await house.get(THIRD_FOX)).entry == new.entry


# ── at the same time ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_500_spellings_at_once_pay_once(house: House) -> None:
    house.upstream.hold()
    prompts = list(spellings(500))
    keys = {house.identity(prompt)[1].key.name for prompt in prompts}
    asking = [asyncio.create_task(house.get(prompt)) for prompt in prompts]
    await house.upstream.arrived(1)
    await until(lambda: house.cache.in_flight == len(keys))
    house.upstream.release()
    answers = await asyncio.gather(*asking)
    assert len(keys) > 50
    assert house.upstream.images == 1
    assert {answer.entry.image.sha256 for answer in answers} == {answers[0].entry.image.sha256}
    assert sum(answer.cost_microusd for answer in answers) == answers[0].entry.image.paid_microusd


async def test_an_upstream_that_fails_one_spelling_has_failed_all(house: House) -> None:
    house.upstream.hold()
    house.upstream.fail_next(UpstreamDownError("away"))
    asking = [asyncio.create_task(house.get(prompt)) for prompt in (FOX, SAME_FOX, THIRD_FOX)]
    await house.upstream.arrived(1)
    await until(lambda: house.cache.in_flight == len(asking))
    house.upstream.release()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(answer) for answer in answers] == 3 * [UpstreamDownError]
    assert house.upstream.calls == 1


async def test_a_spelling_whose_callers_hang_up_before_it_pays_leaves_its_turn_to_the_next(house: House) -> None:
    house.s3.gate.clear()
    first = asyncio.create_task(house.get(FOX))
    await until(lambda: house.cache.in_flight == 1)
    second = asyncio.create_task(house.get(SAME_FOX))
    await until(lambda: house.cache.in_flight == 2)
    first.cancel()
    house.s3.gate.set()
    assert (await second).tier is TierName.UPSTREAM
    assert house.upstream.calls == 1


async def test_a_caller_that_was_told_to_come_back_finds_the_other_spellings_picture(house: House) -> None:
    house.upstream.hold()
    first = asyncio.create_task(house.get(FOX))
    await house.upstream.arrived(1)
    pending = await house.ask(SAME_FOX, max_wait_s=0)
    assert isinstance(pending, Pending)
    house.upstream.release()
    made = await first
    await until(lambda: house.cache.in_flight == 0)
    answer = await house.cache.get_by_key(pending.keys[0], namespace=SHARING, caller=EVERYTHING, terms=Terms())
    assert isinstance(answer, Served)
    assert (answer.entry, answer.matched_key) == (made.entry, made.entry.key.name)


# ── with others ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_one_replica_paid_for_answers_other_spellings_at_another(replicas: list[Replica]) -> None:
    one, other = replicas
    made = await one.get(FOX)
    await one.settle()
    answer = await other.get(SAME_FOX)
    assert (answer.entry.image.sha256, answer.matched) == (made.entry.image.sha256, MatchLevel.CANONICAL)
    assert other.upstream.calls == 0


async def test_two_spellings_at_two_replicas_at_once_pay_once(replicas: list[Replica]) -> None:
    one, other = replicas
    one.upstream.hold()
    first = asyncio.create_task(one.get(FOX))
    await one.upstream.arrived(1)
    second = asyncio.create_task(other.get(SAME_FOX))
    await until(lambda: bool(other.leases.waited_for or other.upstream.calls))
    one.upstream.release()
    made, answer = await first, await second
    assert answer.entry.image.sha256 == made.entry.image.sha256
    assert (one.upstream.calls, other.upstream.calls) == (1, 0)


async def test_a_key_that_was_told_at_one_replica_is_found_at_another(replicas: list[Replica]) -> None:
    one, other = replicas
    one.upstream.hold()
    first = asyncio.create_task(one.get(FOX))
    await one.upstream.arrived(1)
    pending = await one.ask(SAME_FOX, max_wait_s=0)
    assert isinstance(pending, Pending)
    one.upstream.release()
    made = await first
    await until(lambda: one.cache.in_flight == 0)
    await one.settle()
    answer = await other.cache.get_by_key(pending.keys[0], namespace=SHARING, caller=EVERYTHING, terms=Terms())
    assert isinstance(answer, Served)
    assert answer.entry.image.sha256 == made.entry.image.sha256


async def test_an_alias_in_redis_stays_with_the_first_and_goes_only_with_it(client: Client) -> None:
    aliases = redis_aliases(client, next(PREFIXES))
    first, second = alias_of("a red fox"), alias_of("the red fox")
    assert await aliases.add("name", first)
    assert not await aliases.add("name", second)
    await aliases.remove("name", second)
    assert await aliases.find(["name", "other"]) == [first, None]
    await aliases.remove("name", first)
    assert await aliases.find(["name"]) == [None]


async def test_aliases_of_many_nodes_of_a_redis_are_found_in_order(redis_url: str) -> None:
    client = connect(redis_url, timeout_s=5.0, connect_timeout_s=5.0)
    aliases = redis_aliases(client, next(PREFIXES))
    every = {f"v1.default.{n}": alias_of(f"fox number {n}") for n in range(20)}
    for name, alias in every.items():
        assert await aliases.add(name, alias)
    names = list(every)
    assert await aliases.find(names) == list(every.values())
    await aliases.remove(names[0], every[names[0]])
    assert await aliases.find(names) == [None, *list(every.values())[1:]]
    await disconnect(client)


async def test_an_alias_in_redis_makes_way_for_the_one_that_is_to_take_its_place(client: Client) -> None:
    aliases = redis_aliases(client, next(PREFIXES))
    outdated, other, new = alias_of("a red fox"), alias_of("the red fox"), alias_of("red foxes")
    assert await aliases.add("name", outdated)
    assert not await aliases.add("name", new, instead_of=other)
    assert await aliases.add("name", new, instead_of=outdated)
    assert await aliases.find(["name"]) == [new]


async def test_a_redis_that_did_not_answer_is_not_asked_for_five_seconds() -> None:
    away = connect("redis://127.0.0.1:1", timeout_s=0.2, connect_timeout_s=0.2)
    clock = FakeClock()
    aliases = RedisAliases(client=away, prefix="", monotonic_s=clock.monotonic_s, timeout_s=0.2)
    with capture_logs() as logs:
        for seconds in (0, 4, 2):
            clock.advance(seconds)
            assert await aliases.find(["name"]) == [None]
    assert [line["event"] for line in logs] == ["aliases_unreachable"] * 2
    await disconnect(away)


async def test_a_redis_that_does_not_answer_costs_a_similar_hit_and_nothing_else(house: House) -> None:
    away = connect("redis://127.0.0.1:1", timeout_s=0.2, connect_timeout_s=0.2)
    house.restart(aliases=RedisAliases(client=away, prefix="", monotonic_s=house.clock.monotonic_s, timeout_s=0.2))
    made = await house.get(FOX)
    assert (await house.get(SAME_FOX)).entry == made.entry  # memory knows
    await disconnect(away)


async def test_an_alias_that_nobody_can_read_is_none(client: Client) -> None:
    prefix = next(PREFIXES)
    await client.set(f"{prefix}alias:{{name}}", "9:of a newer release")
    assert await redis_aliases(client, prefix).find(["name"]) == [None]


def alias_of(prompt: str) -> Alias:
    identity: Identity = identify(ImageRequest(prompt, MODEL), SHARING)
    return Alias(replace(identity.key, digest=identity.key.digest[:16]), MatchLevel.CANONICAL, identity.prompt_digest)


def canonical(prompt: str) -> CacheKey:
    key = canonical_key(ImageRequest(prompt, MODEL), SHARING)
    assert key is not None
    return key
