"""Prompts that differ in one thing that can be seen never become one, however else they are written."""

from random import Random

import pytest

from cacheserver.identity.canonical import canonical, same_picture
from tests.canonical_negatives import LANGUAGES, kinds, negatives, noise, written

_ROUNDS = 4
"""Noises that each pair is tried with."""


@pytest.mark.parametrize("name", LANGUAGES)
def test_there_are_enough_pairs_of_enough_bases_and_every_kind(name: str) -> None:
    language = LANGUAGES[name]
    pairs = negatives(language)
    assert len(set(language.bases)) == len(language.bases) >= 60
    assert len({written(pair, language) for pair in pairs}) >= 500
    assert kinds(pairs) >= set(language.slots) | {"swap", "sku", "params"}


@pytest.mark.parametrize("name", LANGUAGES)
def test_pairs_are_the_same_every_time(name: str) -> None:
    assert negatives(LANGUAGES[name]) == negatives(LANGUAGES[name])


@pytest.mark.parametrize("name", LANGUAGES)
def test_one_word_that_can_be_seen_makes_another_picture(name: str) -> None:
    language = LANGUAGES[name]
    merged = [pair for pair in negatives(language) if same_picture(*written(pair, language))]
    assert merged == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_nor_do_they_become_one_when_one_is_said_in_other_words(name: str) -> None:
    language, random = LANGUAGES[name], Random(1)  # noqa: S311 - the same every time
    merged = []
    for pair in negatives(language):
        one, other = written(pair, language)
        for _ in range(_ROUNDS):
            said = noise(pair.one, pair, language, random)
            if same_picture(said, other) or same_picture(one, noise(pair.other, pair, language, random)):
                merged.append((said, other))
    assert merged == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_most_of_that_noise_means_nothing_to_the_profile(name: str) -> None:
    """Else the test above would prove nothing."""
    language, random = LANGUAGES[name], Random(2)  # noqa: S311 - the same every time
    pairs = [pair for pair in negatives(language) if pair.kind != "params"]
    alike = [
        canonical(noise(pair.one, pair, language, random)) == canonical(written(pair, language)[0]) for pair in pairs
    ]
    assert sum(alike) >= 0.8 * len(alike)
