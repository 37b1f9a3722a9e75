"""The typo rule: misspelt beyond doubt, and only then."""

from __future__ import annotations

import pytest

from cacheserver.identity import canonical, canonical_key
from cacheserver.identity.typos import corrected
from cacheserver.model import ImageRequest, MatchLevel, Namespace

CORRECTING = Namespace("default", "default", similarity=MatchLevel.CANONICAL, corrects_typos=True)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("a beautful garden at noon", "a beautiful garden at noon"),  # left out
        ("a beauutiful garden at noon", "a beautiful garden at noon"),  # added
        ("a beaufiful garden at noon", "a beautiful garden at noon"),  # another
        ("a beuatiful garden at noon", "a beautiful garden at noon"),  # swapped
        ("an old woman with a wooden nekclace", "an old woman with a wooden necklace"),
    ],
)
def test_a_word_one_letter_from_the_only_one_it_can_mean_is_that_word(wrong: str, right: str) -> None:
    assert canonical(wrong) != canonical(right)
    assert corrected(canonical(wrong)) == corrected(canonical(right)) == canonical(right)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("two firemen in the rain", "two fireman in the rain"),  # both are words
        ("a garden of rosses", "a garden of roses"),  # too short to be sure
        ("two unicornss at noon", "two unicorn at noon"),  # endings
        ("a portrait by marten", "a portrait by martin"),  # names
        ('a sign "beautful"', 'a sign "beautiful"'),  # drawn
        ("a beautful gardenn at noon", "a beautiful garden at noon"),  # two words
        ("3 kittens at noon", "5 kittens at noon"),
    ],
)
def test_what_may_be_meant_is_left_alone(one: str, other: str) -> None:
    assert corrected(canonical(one)) != corrected(canonical(other))


def test_what_is_corrected_is_as_it_would_have_been_written() -> None:
    form = corrected(canonical("a beautful gray house, cinematic, sharp focus"))
    assert form == canonical("a beautiful grey house, sharp focus, cinematic")


def test_only_a_namespace_that_asks_for_it_takes_a_misspelt_prompt_for_the_right_one() -> None:
    wrong, right = (ImageRequest(f"a {word} garden", "gpt-image-2") for word in ("beautful", "beautiful"))
    assert canonical_key(wrong, CORRECTING) == canonical_key(right, CORRECTING)
    strict = Namespace("default", "default", similarity=MatchLevel.CANONICAL)
    assert canonical_key(wrong, strict) != canonical_key(right, strict)
    assert canonical_key(right, strict) != canonical_key(right, CORRECTING)
