"""The semantic level: nothing is served that no verifier has said yes to, and a yes alone is not enough."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from cacheserver.epochs import Epochs, Tombstone
from cacheserver.model import CachePolicy, MatchLevel, Namespace, Served, Terms, TierName
from cacheserver.similarity.candidates import Candidates, Trigrams
from cacheserver.similarity.semantic import Semantic
from cacheserver.similarity.verifier import Reason, Verdict, Verifier
from cacheserver.tasks import end
from tests.fakes import FakeClock
from tests.house import EVERYTHING, House, open_tier
from tests.waiting import until

PUPPY, SAME_PUPPY = "a cute puppy sleeping on a sofa at home", "a cute puppy dog sleeping on a sofa at home"
CANONICAL = Namespace("default", "default", similarity=MatchLevel.CANONICAL)
SEMANTIC = replace(CANONICAL, similarity=MatchLevel.SEMANTIC)

OTHER_PICTURES = {
    "number": ("three puppies on a red sofa at home", "five puppies on a red sofa at home"),
    "colour": ("a cute puppy on a red sofa at home", "a cute puppy on a blue sofa at home"),
    "bound colour": ("a red car left of a blue truck", "a blue car left of a red truck"),
    "negation": ("a street at night with people", "a street at night without people"),
    "quoted": ('a shop window with "SALE" on it', 'a shop window with "SAIL" on it'),
    "parameters": ("a puppy on a sofa --ar 3:2", "a puppy on a sofa --ar 1:1"),
    "relation": ("a cat on top of a table at home", "a cat under a table at home"),
    "数量": ("桌子上有三只可爱的小猫在睡觉", "桌子上有五只可爱的小猫在睡觉"),
    "颜色": ("一只黑色的小猫在桌子上睡觉", "一只白色的小猫在桌子上睡觉"),
    "否定": ("夜晚的街道上有行人和汽车", "夜晚的街道上没有行人和汽车"),
}


class StandIn(Verifier):
    """Says what it is told to say, and remembers what it was asked."""

    def __init__(self, reason: Reason = "yes") -> None:
        self.reason: Reason = reason
        self.asked: list[tuple[str, str]] = []
        self.hangs = False

    async def same_picture(self, asked: str, stored: str) -> Verdict:
        self.asked.append((asked, stored))
        if self.hangs:
            await asyncio.Event().wait()
        return Verdict(same=self.reason == "yes", reason=self.reason, cost_microusd=7)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    clock = FakeClock()
    epochs = Epochs()
    house = House(
        clock=clock,
        redis=await open_tier(tmp_path / "redis", TierName.REDIS, clock, epochs),
        s3=await open_tier(tmp_path / "s3", TierName.S3, clock, epochs),
        epochs=epochs,
    )
    house.namespace = SEMANTIC
    yield house
    await house.aclose()


class Breaking(StandIn):
    """Raises what no verifier should."""

    async def same_picture(self, asked: str, stored: str) -> Verdict:
        await super().same_picture(asked, stored)
        raise ValueError("a bug")


class Embedding(Trigrams):
    """Fails when it is told to."""

    is_broken = False

    def embed(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        if self.is_broken:
            raise ValueError("no vector")
        return super().embed(prompts)


def with_verifier(
    house: House, verifier: StandIn | None, *, timeout_s: float = 5.0, embedder: Embedding | None = None
) -> None:
    candidates = Candidates(embedder=embedder)
    semantic = Semantic(candidates=candidates, verifier=verifier, books=house.books, floor=0.5, timeout_s=timeout_s)
    house.restart(similar_prompts=semantic)


def counted(house: House, name: str, **labels: str) -> float:
    return house.registry.get_sample_value(f"cacheserver_{name}_total", {"namespace": "default", **labels}) or 0.0


async def get(house: House, prompt: str, **terms: object) -> Served:
    """What is answered, once all that comes after an answer is done."""
    answer = await house.get(prompt, **terms)
    await until(lambda: house.cache.in_flight == 0)
    await house.cache.matching.idle()
    return answer


async def test_what_a_verifier_says_is_the_same_picture_answers_and_says_so(house: House) -> None:
    with_verifier(house, verifier := StandIn())
    made = await get(house, PUPPY)
    answer = await get(house, SAME_PUPPY)
    assert (answer.entry, answer.matched, answer.matched_key) == (
        made.entry,
        MatchLevel.SEMANTIC,
        made.entry.key.name,
    )
    assert (verifier.asked, house.upstream.calls) == ([(SAME_PUPPY, PUPPY)], 1)


async def test_a_pair_is_verified_once_and_answers_from_memory_then(house: House) -> None:
    with_verifier(house, verifier := StandIn())
    await get(house, PUPPY)
    await get(house, SAME_PUPPY)
    assert (await get(house, SAME_PUPPY)).tier is TierName.MEMORY
    house.clock.advance(120)
    assert (await get(house, SAME_PUPPY)).matched is MatchLevel.SEMANTIC
    assert len(verifier.asked) == 1


async def test_what_a_verification_cost_is_counted(house: House) -> None:
    with_verifier(house, StandIn())
    await get(house, PUPPY)
    await get(house, SAME_PUPPY)
    assert counted(house, "verifications", result="yes") == 1
    assert counted(house, "verification_microusd") == 7


async def test_without_a_verifier_nothing_is_served_and_what_would_be_asked_is_told_without_prompts(
    house: House,
) -> None:
    with_verifier(house, None)
    made = await get(house, PUPPY)
    with capture_logs() as logs:
        answer = await get(house, SAME_PUPPY)
    assert (answer.tier, house.upstream.calls) == (TierName.UPSTREAM, 2)
    told = [line for line in logs if line["event"] == "similar_shadow"]
    assert [(line["key"], line["differs_in"]) for line in told] == [(made.entry.key.name, ())]
    assert "puppy" not in str(told)
    assert counted(house, "shadow_matches", result="to_verify") == 1


async def test_the_shadow_tells_which_slots_would_have_kept_a_picture_from_answering(house: House) -> None:
    with_verifier(house, None)
    await get(house, "three puppies on a red sofa")
    with capture_logs() as logs:
        await get(house, "five puppies on a blue sofa")
    [told] = [line for line in logs if line["event"] == "similar_shadow"]
    assert {"numbers", "colours"} <= set(told["differs_in"])
    assert counted(house, "shadow_matches", result="guarded") == 1


@pytest.mark.parametrize("prompts", OTHER_PICTURES.values(), ids=OTHER_PICTURES)
async def test_a_verifier_that_says_yes_to_all_is_not_even_asked_about_other_pictures(
    house: House, prompts: tuple[str, str]
) -> None:
    with_verifier(house, verifier := StandIn())
    await get(house, prompts[0])
    assert (await get(house, prompts[1])).tier is TierName.UPSTREAM
    assert verifier.asked == []


@pytest.mark.parametrize("reason", ["no", "unclear", "timeout", "error", "paused", "busy", "too_large"])
async def test_anything_but_a_yes_is_paid_for(house: House, reason: Reason) -> None:
    with_verifier(house, StandIn(reason))
    await get(house, PUPPY)
    assert (await get(house, SAME_PUPPY)).tier is TierName.UPSTREAM
    assert counted(house, "verifications", result=reason) == 1


async def test_a_verifier_that_hangs_costs_its_deadline_and_no_more(house: House) -> None:
    verifier = StandIn()
    verifier.hangs = True
    with_verifier(house, verifier, timeout_s=0.05)
    await get(house, PUPPY)
    assert (await get(house, SAME_PUPPY)).tier is TierName.UPSTREAM
    assert (len(verifier.asked), counted(house, "verifications", result="timeout")) == (1, 1)


async def test_prompts_of_one_key_have_their_verifications_at_a_time(house: House) -> None:
    with_verifier(house, verifier := StandIn(), timeout_s=3600)
    await get(house, PUPPY)
    verifier.hangs = True
    prompts = [SAME_PUPPY.replace(" ", " " * n) for n in range(1, 7)]
    assert len({house.identity(prompt)[1].key for prompt in prompts}) == 1
    asking = [asyncio.create_task(house.get(prompt)) for prompt in prompts]
    await until(lambda: len(verifier.asked) == len(prompts))
    assert {asked for asked, _ in verifier.asked} == set(prompts)
    await end(asking)
    assert house.upstream.calls == 1


async def test_a_verifier_that_fails_as_it_should_not_is_a_no(house: House) -> None:
    with_verifier(house, Breaking())
    await get(house, PUPPY)
    with capture_logs() as logs:
        assert (await get(house, SAME_PUPPY)).tier is TierName.UPSTREAM
    assert "similar_not_found" in [line["event"] for line in logs]
    assert counted(house, "verifications", result="error") == 1


async def test_an_embedder_that_fails_costs_a_similar_hit_and_nothing_else(house: House) -> None:
    with_verifier(house, verifier := StandIn(), embedder=(embedder := Embedding()))
    await get(house, PUPPY)
    embedder.is_broken = True
    with capture_logs() as logs:
        assert (await get(house, SAME_PUPPY)).tier is TierName.UPSTREAM
    assert [line["event"] for line in logs if "exc_info" in line] == ["similar_not_found", "prompt_not_learned"]
    assert verifier.asked == []


async def test_with_a_verifier_that_hangs_equal_and_canonical_prompts_are_answered_all_the_same(house: House) -> None:
    verifier = StandIn()
    verifier.hangs = True
    with_verifier(house, verifier, timeout_s=3600)
    made = await get(house, PUPPY)
    for prompt in (PUPPY, "Please draw a cute puppy sleeping on a sofa at home, 8k"):
        assert (await get(house, prompt)).entry == made.entry
    assert verifier.asked == []


async def test_a_namespace_that_stops_at_canonical_asks_no_verifier(house: House) -> None:
    house.namespace = CANONICAL
    with_verifier(house, verifier := StandIn())
    await get(house, PUPPY)
    assert (await get(house, SAME_PUPPY)).tier is TierName.UPSTREAM
    assert verifier.asked == []


@pytest.mark.parametrize("level", [MatchLevel.EXACT, MatchLevel.STANDARD, MatchLevel.CANONICAL])
async def test_a_call_that_accepts_less_gets_no_verified_picture(house: House, level: MatchLevel) -> None:
    with_verifier(house, StandIn())
    await get(house, PUPPY)
    await get(house, SAME_PUPPY)
    assert (await get(house, SAME_PUPPY, match_level=level)).tier is TierName.UPSTREAM


async def test_a_banned_pair_is_not_verified_again(house: House) -> None:
    with_verifier(house, verifier := StandIn())
    made = await get(house, PUPPY)
    await get(house, SAME_PUPPY)
    _, wrong = house.identity(SAME_PUPPY)
    house.epochs.learn([replace(Tombstone.of_banned(wrong.key, made.entry.key), epoch=1)])
    assert (await get(house, SAME_PUPPY)).tier is TierName.UPSTREAM
    assert len(verifier.asked) == 1


async def test_a_picture_that_is_gone_is_verified_in_vain_once(house: House) -> None:
    with_verifier(house, verifier := StandIn())
    made = await get(house, PUPPY)
    await house.cache.purge(SEMANTIC, key=made.entry.key, dry_run=False)
    assert (await get(house, SAME_PUPPY)).tier is TierName.UPSTREAM
    await get(house, "a cute puppy that sleeps on a sofa at home")
    assert [stored for _, stored in verifier.asked].count(PUPPY) == 1


async def test_prompts_of_other_sizes_are_no_candidates(house: House) -> None:
    with_verifier(house, verifier := StandIn())
    request, identity = house.identity(PUPPY, size="1024x1536")
    await house.cache.get(request, identity, namespace=SEMANTIC, caller=EVERYTHING, terms=Terms())
    assert (await get(house, SAME_PUPPY)).tier is TierName.UPSTREAM
    assert verifier.asked == []


async def test_after_a_restart_a_prompt_is_known_again_once_its_picture_was_asked_for(house: House) -> None:
    with_verifier(house, StandIn())
    made = await get(house, PUPPY)
    await house.settle()
    with_verifier(house, StandIn())
    assert (await get(house, PUPPY)).tier is TierName.REDIS
    answer = await get(house, SAME_PUPPY, cache_policy=CachePolicy.ONLY_IF_CACHED)
    assert answer.entry.key == made.entry.key
