"""Spellings that are asked for at the same time, here and at other replicas: paid once, and nobody hurt by another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from cacheserver.clock import SystemClock
from cacheserver.control.aliases import NoAliases, RedisAliases
from cacheserver.control.leases import NoLeases
from cacheserver.epochs import Tombstone
from cacheserver.errors import KeyGoneError, PromptRefusedError, QueueFullError
from cacheserver.interfaces import Lease
from cacheserver.model import (
    Alias,
    CachePolicy,
    MatchLevel,
    Namespace,
    Pending,
    Priority,
    Served,
    Terms,
    TierName,
)
from cacheserver.tasks import OwnedTasks
from cacheserver.tiers.redis_client import Client
from tests.house import EVERYTHING, House
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
    replicas,
    spellings,
    waits_for_its_turn,
)
from tests.waiting import until

__all__ = ["client", "house", "replicas"]

OBSERVING = replace(SHARING, serve_percent=0.0)
DOUBTING = replace(SHARING, min_score=0.999)


class GatedAliases(RedisAliases):
    """Aliases in a real Redis, which are found and added once a gate is open."""

    def __init__(self, client: Client) -> None:
        super().__init__(client=client, prefix=next(PREFIXES), monotonic_s=SystemClock().monotonic_s, timeout_s=5.0)
        self.may_find, self.may_add = asyncio.Event(), asyncio.Event()
        self.may_find.set()
        self.may_add.set()
        self.finding = self.adding = 0

    async def find(self, names: Sequence[str]) -> list[Alias | None]:
        self.finding += 1
        try:
            await self.may_find.wait()
            return await super().find(names)
        finally:
            self.finding -= 1

    async def add(self, name: str, alias: Alias, *, instead_of: Alias | None = None) -> bool:
        self.adding += 1
        try:
            await self.may_add.wait()
            return await super().add(name, alias, instead_of=instead_of)
        finally:
            self.adding -= 1


async def by_key(house: House, prompt: str) -> Served:
    answer = await house.cache.get_by_key(
        house.identity(prompt)[1].key, namespace=SHARING, caller=EVERYTHING, terms=Terms()
    )
    assert isinstance(answer, Served)
    return answer


# ── turns ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_spellings_that_want_a_newer_picture_than_there_is_pay_for_one_together(house: House) -> None:
    await house.get(FOX)
    house.clock.advance(100)
    house.upstream.hold()
    prompts = list(spellings(60))
    keys = {house.identity(prompt)[1].key.name for prompt in prompts}
    asking = [asyncio.create_task(house.get(prompt, max_age_s=50.0)) for prompt in prompts]
    await house.upstream.arrived(2)
    await waits_for_its_turn(house, len(keys) - 1)
    house.upstream.release()
    answers = await asyncio.gather(*asking)
    assert len(keys) > 10
    assert house.upstream.images == 2
    assert len({answer.entry.image.sha256 for answer in answers}) == 1


async def test_a_picture_that_another_prompt_of_its_key_replaced_is_paid_for_once_by_all_spellings(
    house: House,
) -> None:
    await house.get(ONE_LINE)
    await house.get(TWO_LINES, cache_policy=CachePolicy.REFRESH)
    await until(lambda: house.cache.in_flight == 0)
    house.clock.advance(100)
    house.upstream.hold()
    prompts = ("Please draw a red fox", "red fox, 8k", "Can you generate a red fox", "an image of a red fox")
    asking = [asyncio.create_task(house.get(prompt)) for prompt in prompts]
    await house.upstream.arrived(3)
    await waits_for_its_turn(house, len(prompts) - 1)
    house.upstream.release()
    await asyncio.gather(*asking)
    assert house.upstream.images == 3


async def test_who_wants_its_own_prompts_picture_pays_for_a_spelling_that_takes_any(house: House) -> None:
    house.upstream.hold()
    own = asyncio.create_task(house.get(FOX, match_level=MatchLevel.STANDARD))
    await house.upstream.arrived(1)
    other = asyncio.create_task(house.get(SAME_FOX))
    await waits_for_its_turn(house)
    house.upstream.release()
    assert (await other).entry == (await own).entry
    assert house.upstream.images == 1


async def test_a_spelling_whose_aliases_come_late_has_what_another_one_paid_for_meanwhile(
    client: Client, house: House
) -> None:
    aliases = GatedAliases(client)
    house.restart(aliases=aliases)
    house.upstream.hold()
    first = asyncio.create_task(house.get(FOX))
    await house.upstream.arrived(1)
    aliases.may_find.clear()
    aliases.may_add.clear()
    second = asyncio.create_task(house.get(SAME_FOX))
    await until(lambda: aliases.finding == 1)
    house.upstream.release()
    made = await first
    await until(lambda: house.cache.in_flight == 1)
    aliases.may_find.set()
    answer = await second
    aliases.may_add.set()
    assert (answer.entry, answer.matched) == (made.entry, MatchLevel.CANONICAL)
    assert house.upstream.calls == 1


async def test_what_another_spelling_made_meanwhile_is_labelled_as_collapsed(house: House) -> None:
    house.upstream.hold()
    first = asyncio.create_task(house.get(FOX))
    await house.upstream.arrived(1)
    second = asyncio.create_task(house.get(SAME_FOX))
    await waits_for_its_turn(house)
    house.upstream.release()
    made, answer = await first, await second
    assert (made.collapsed, answer.collapsed, answer.matched) == (False, True, MatchLevel.CANONICAL)


async def test_a_picture_of_its_own_that_was_put_meanwhile_goes_before_that_of_another(house: House) -> None:
    owl = await house.get("a blue owl")
    house.upstream.hold()
    first = asyncio.create_task(house.get(FOX))
    await house.upstream.arrived(2)
    second = asyncio.create_task(house.get(SAME_FOX))
    await waits_for_its_turn(house)
    _, identity = house.identity(SAME_FOX)
    await house.cache.put(owl.entry.image, identity, namespace=SHARING)
    house.upstream.release()
    await first
    answer = await second
    assert (answer.entry.image.sha256, answer.matched) == (owl.entry.image.sha256, MatchLevel.EXACT)


async def test_what_was_put_while_a_spelling_was_made_is_not_replaced_by_it(house: House) -> None:
    await house.get(FOX)
    owl = await house.get("a blue owl")
    house.upstream.hold()
    house.s3.gate.clear()
    similar = asyncio.create_task(house.get(SAME_FOX))
    own = asyncio.create_task(house.get(SAME_FOX, match_level=MatchLevel.STANDARD))
    await until(lambda: house.cache.in_flight == 1)
    house.s3.gate.set()
    await house.upstream.arrived(3)
    assert (await similar).matched is MatchLevel.CANONICAL
    _, identity = house.identity(SAME_FOX)
    put, is_new = await house.cache.put(owl.entry.image, identity, namespace=SHARING)
    house.upstream.release()
    await own
    await house.settle()
    assert (is_new, put.key) == (True, identity.key)
    assert (await by_key(house, SAME_FOX)).entry.image.sha256 == owl.entry.image.sha256


async def test_a_call_and_a_call_by_key_at_once_both_have_another_spellings_picture(
    client: Client, house: House
) -> None:
    aliases = GatedAliases(client)
    house.restart(aliases=aliases)
    await house.get(FOX)
    await house.get(SAME_FOX, max_wait_s=60.0)
    await house.cache.matching.idle()
    await house.settle()
    house.restart(aliases=aliases)
    aliases.may_find.clear()
    collecting = asyncio.create_task(by_key(house, SAME_FOX))
    await until(lambda: aliases.finding == 1)
    asking = asyncio.create_task(house.get(SAME_FOX))

    async def has_joined() -> bool:
        found, _ = await house.cache.find([house.identity(SAME_FOX)[1].key])
        return found[0].in_flight

    await until(has_joined)
    aliases.may_find.set()
    assert (await collecting).matched is MatchLevel.CANONICAL
    assert (await asking).matched is MatchLevel.CANONICAL
    assert house.upstream.calls == 1


@pytest.mark.parametrize("is_banned", [False, True], ids=["switched off", "banned"])
async def test_spellings_that_do_not_answer_one_another_are_made_and_fail_each_for_itself(
    house: House, *, is_banned: bool
) -> None:
    keys = [house.identity(prompt)[1].key for prompt in (FOX, SAME_FOX)]
    tombstone = Tombstone.of_banned(*keys) if is_banned else Tombstone.of_switch("default", is_on=False)
    house.epochs.learn([replace(tombstone, epoch=1)])
    house.upstream.hold()
    house.upstream.fail_next(PromptRefusedError("no"))
    first = asyncio.create_task(house.get(FOX))
    await house.upstream.arrived(1)
    second = asyncio.create_task(house.get(SAME_FOX))
    await until(lambda: house.upstream.calls == 2)
    house.upstream.release()
    refused, answer = await asyncio.gather(first, second, return_exceptions=True)
    assert isinstance(refused, PromptRefusedError)
    assert isinstance(answer, Served)
    assert answer.matched is MatchLevel.EXACT


# ── priorities ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prompt", [SAME_FOX, THIRD_FOX], ids=["joins one that waits", "waits itself"])
async def test_who_pays_goes_by_the_priority_of_every_spelling_that_waits_for_it(house: House, prompt: str) -> None:
    house.restart(max_concurrent=1)
    house.upstream.hold()
    busy = asyncio.create_task(house.get("a blue owl"))
    await house.upstream.arrived(1)
    warming = [asyncio.create_task(house.get(FOX, priority=Priority.WARM_UP))]
    await until(lambda: house.generator.queue_depth == {Priority.WARM_UP: 1})
    warming.append(asyncio.create_task(house.get(SAME_FOX, priority=Priority.WARM_UP)))
    await waits_for_its_turn(house)
    urgent = asyncio.create_task(house.get(prompt, priority=Priority.INTERACTIVE))
    await until(lambda: house.generator.queue_depth == {Priority.INTERACTIVE: 1})
    house.upstream.release()
    await asyncio.gather(busy, urgent, *warming)
    assert house.upstream.calls == 2


async def test_a_place_in_the_queue_that_an_urgent_spelling_waits_for_is_not_lost_to_a_less_urgent_request(
    house: House,
) -> None:
    house.restart(max_concurrent=1, queue_max=1)
    house.upstream.hold()
    busy = asyncio.create_task(house.get("a blue owl"))
    await house.upstream.arrived(1)
    warming = [asyncio.create_task(house.get(FOX, priority=Priority.WARM_UP))]
    await until(lambda: house.generator.queue_depth == {Priority.WARM_UP: 1})
    warming.append(asyncio.create_task(house.get(SAME_FOX, priority=Priority.WARM_UP)))
    await waits_for_its_turn(house)
    urgent = asyncio.create_task(house.get(SAME_FOX, priority=Priority.INTERACTIVE))
    await until(lambda: house.generator.queue_depth == {Priority.INTERACTIVE: 1})
    with pytest.raises(QueueFullError):
        await house.get("a green cow", priority=Priority.STANDARD)
    house.upstream.release()
    answers = await asyncio.gather(busy, urgent, *warming)
    assert answers[1].matched is MatchLevel.CANONICAL


# ── review ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_waits_for_review_is_not_paid_for_again_in_other_words(house: House) -> None:
    house.namespace = DOUBTING
    house.restart()
    for prompt in (FOX, SAME_FOX):
        answer = await house.ask(prompt, candidates=2)
        assert isinstance(answer, Pending)
        assert answer.in_review
    assert house.upstream.images == 2


async def test_what_was_approved_answers_other_spellings(house: House) -> None:
    house.namespace = DOUBTING
    house.restart()
    pending = await house.ask(FOX, candidates=2)
    assert isinstance(pending, Pending)
    await house.settle()
    await house.reviews.approve(pending.keys[0])
    await house.settle()
    assert (await house.get(FOX)).tier is not TierName.UPSTREAM
    assert (await house.get(SAME_FOX)).matched is MatchLevel.CANONICAL


async def test_who_comes_while_others_are_told_of_a_review_does_not_pay_for_what_waits(
    client: Client, house: House
) -> None:
    aliases = GatedAliases(client)
    aliases.may_add.clear()
    house.namespace = DOUBTING
    house.restart(aliases=aliases)
    first = asyncio.create_task(house.ask(FOX, n=2, candidates=2))
    await until(lambda: aliases.adding == 1)
    images = house.upstream.images
    second = asyncio.create_task(house.ask(FOX, n=2, candidates=2))
    await until(second.done)
    aliases.may_add.set()
    for answer in (await first, await second):
        assert isinstance(answer, Pending)
        assert answer.in_review
    assert house.upstream.images == images


# ── observing ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_observed_call_would_have_been_answered_with_another_spellings_picture(house: House) -> None:
    assert (await ask_in(house, OBSERVING, FOX)).would_hit is None
    assert (await ask_in(house, OBSERVING, FOX)).would_hit is TierName.MEMORY
    assert (await ask_in(house, OBSERVING, SAME_FOX)).would_hit is TierName.MEMORY


async def test_what_an_observed_call_left_answers_other_spellings_once_they_are_served(house: House) -> None:
    await ask_in(house, OBSERVING, FOX)
    await house.settle()
    assert (await house.get(FOX)).tier is TierName.MEMORY
    assert (await house.get(SAME_FOX)).matched is MatchLevel.CANONICAL


# ── closing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_the_last_loads_have_to_tell_others_does_not_outlive_the_cache(
    client: Client, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask_in(house, STRICT, FOX)
    await house.settle()
    aliases = GatedAliases(client)
    aliases.may_add.clear()
    house.restart(aliases=aliases)
    house.redis.gate.clear()
    asking = asyncio.create_task(house.get(FOX))
    await until(lambda: house.cache.in_flight == 1)
    close_tending = house.cache.tending.aclose

    async def close_before_loads() -> None:
        await close_tending()
        house.clock.advance(5)
        house.redis.gate.set()

    monkeypatch.setattr(house.cache.tending, "aclose", close_before_loads)
    closing = asyncio.create_task(house.cache.aclose(5))
    await until(lambda: aliases.adding == 1)
    await closing
    assert aliases.adding == 0
    assert (await asking).tier is TierName.REDIS


# ── leases ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("namespace", "terms"),
    [(SHARING, {"match_level": MatchLevel.STANDARD}), (STRICT, {})],
    ids=["call", "namespace"],
)
async def test_who_refuses_pictures_of_other_prompts_pays_for_other_replicas_too(
    replicas: list[Replica], namespace: Namespace, terms: dict[str, object]
) -> None:
    one, other = replicas
    one.upstream.hold()
    first = asyncio.create_task(ask_in(one, namespace, FOX, **terms))
    await one.upstream.arrived(1)
    second = asyncio.create_task(other.get(FOX))
    await until(lambda: bool(other.leases.waited_for or other.upstream.calls))
    one.upstream.release()
    made, answer = await first, await second
    assert answer.entry.image.sha256 == made.entry.image.sha256
    assert (one.upstream.calls, other.upstream.calls) == (1, 0)


@pytest.mark.parametrize("is_purged", [True, False], ids=["purged", "expired"])
async def test_a_replica_whose_alias_is_outdated_asks_the_others_before_it_pays(
    replicas: list[Replica], *, is_purged: bool
) -> None:
    one, other = replicas
    for replica in replicas:
        replica.namespace = replace(SHARING, ttl_s=1000.0)
    made = await one.get(FOX)
    await one.told()
    if is_purged:
        await one.cache.purge(SHARING, key=made.entry.key, dry_run=False)
    else:
        one.clock.advance(1001)
    new = await other.get(THIRD_FOX)
    await other.told()
    answer = await one.get(SAME_FOX)
    assert (answer.entry.image.sha256, answer.matched) == (new.entry.image.sha256, MatchLevel.CANONICAL)
    assert (one.upstream.calls, other.upstream.calls) == (1, 1)


async def test_a_promised_key_whose_picture_is_gone_does_not_hide_what_another_replica_paid_for(
    replicas: list[Replica],
) -> None:
    one, other = replicas
    one.upstream.hold()
    first = asyncio.create_task(one.get(FOX))
    await one.upstream.arrived(1)
    assert isinstance(await one.ask(SAME_FOX, max_wait_s=0), Pending)
    one.upstream.release()
    made = await first
    await one.told()
    await one.cache.purge(SHARING, key=made.entry.key, dry_run=False)
    assert (await other.get(THIRD_FOX)).tier is TierName.UPSTREAM
    await other.told()
    one.clock.advance(100)
    one.restart(leases=one.leases, aliases=one.aliases)
    with pytest.raises(KeyGoneError):
        await by_key(one, SAME_FOX)
    answer = await one.get(SAME_FOX)
    assert (answer.matched, one.upstream.calls) == (MatchLevel.CANONICAL, 1)


class TellsOneForEver(NoAliases):
    """The first alias is never told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def add(self, name: str, alias: Alias, *, instead_of: Alias | None = None) -> bool:
        self.told.append(name)
        if len(self.told) == 1:
            await asyncio.Event().wait()
        return await super().add(name, alias, instead_of=instead_of)


class GivenBack(NoLeases):
    """Notes which leases are given back, once what has to come before has ended."""

    def __init__(self) -> None:
        self.count = 0
        self._tasks = OwnedTasks()

    def let_go(self, lease: Lease, *, after: Callable[[], Awaitable[None]]) -> None:  # noqa: ARG002 - any
        self._tasks.own(self._give_back(after), "give back")

    async def _give_back(self, after: Callable[[], Awaitable[None]]) -> None:
        await after()
        self.count += 1

    async def aclose(self) -> None:
        await self._tasks.aclose(0)


async def test_a_lease_is_given_back_though_others_are_still_to_be_told_of_another_picture(house: House) -> None:
    leases, aliases = GivenBack(), TellsOneForEver()
    house.restart(leases=leases, aliases=aliases)
    await house.get("a blue owl")
    await until(lambda: len(aliases.told) == 1)
    await house.get(FOX)
    await until(lambda: leases.count == 2)  # both of the fox: its own and the canonical one
    await leases.aclose()
