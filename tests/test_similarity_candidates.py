"""Finding prompts that look alike: by brute force, and in clusters."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.errors import ConfigError
from cacheserver.similarity import candidates
from cacheserver.similarity.candidates import Candidates, Trigrams, load_embedder

np = pytest.importorskip("numpy", reason="numpy, of the extra [semantic], is not installed")

FOX = "a red fox in the snow, oil painting"


def keys(found: Sequence[candidates.Candidate]) -> list[str]:
    return [candidate.key for candidate in found]


def test_what_looks_alike_is_found_best_first() -> None:
    index = Candidates()
    index.add("g", "same", "A red  fox in the SNOW, oil painting")
    index.add("g", "near", "a red fox in the rain, oil painting")
    index.add("g", "far", "a blue whale under a bridge")
    found = index.nearest("g", FOX)
    assert keys(found) == ["same", "near"]
    assert found[0].score == pytest.approx(1.0)
    assert found[0].prompt == "A red  fox in the SNOW, oil painting"
    assert 0.8 <= found[1].score < 1.0


def test_limit_and_floor_are_kept() -> None:
    index = Candidates()
    for number in range(20):
        index.add("g", str(number), f"{FOX}, plate {number}")
    assert len(index.nearest("g", FOX)) == 5
    assert len(index.nearest("g", FOX, limit=7)) == 7
    assert index.nearest("g", FOX, floor=0.999) == []


def test_groups_never_mix() -> None:
    index = Candidates()
    index.add(("model", "1024x1024"), "a", FOX)
    assert index.nearest(("model", "512x512"), FOX) == []
    assert keys(index.nearest(("model", "1024x1024"), FOX)) == ["a"]


def test_what_was_removed_is_not_found_and_its_row_is_used_again() -> None:
    index = Candidates()
    for number in range(8):
        index.add("g", str(number), f"{FOX} {number}")
    index.remove("g", "3")
    index.remove("g", "3")
    index.remove("other", "3")
    assert "3" not in keys(index.nearest("g", f"{FOX} 3", limit=20))
    index.add("g", "new", "a blue whale")
    assert index._groups["g"].used == 8
    assert keys(index.nearest("g", "a blue whale")) == ["new"]
    assert len(index) == 8


def test_a_group_that_is_empty_goes() -> None:
    index = Candidates()
    index.add("g", "a", FOX)
    index.remove("g", "a")
    assert len(index) == 0
    assert not index._groups


def test_a_key_that_is_added_again_has_its_new_prompt() -> None:
    index = Candidates()
    index.add("g", "a", "a blue whale")
    index.add("g", "a", FOX)
    assert index.nearest("g", "a blue whale") == []
    assert keys(index.nearest("g", FOX)) == ["a"]
    assert len(index) == 1


def test_in_a_full_group_the_oldest_makes_room() -> None:
    index = Candidates(max_per_group=3)
    for key in "abc":
        index.add("g", key, f"{FOX} {key}")
    index.add("g", "a", f"{FOX} a")  # not the oldest any more
    index.add("g", "d", f"{FOX} d")
    assert set(keys(index.nearest("g", FOX, limit=9))) == {"a", "c", "d"}
    assert len(index) == 3


def test_beyond_all_entries_the_group_goes_that_was_not_used_for_longest() -> None:
    index = Candidates(max_entries=3)
    for group in ("one", "two", "three"):
        index.add(group, "a", FOX)
    index.nearest("one", FOX)
    index.add("four", "a", FOX)
    assert [group for group in ("one", "two", "three", "four") if index.nearest(group, FOX)] == ["one", "three", "four"]


@pytest.mark.parametrize("prompt", ["", " ", "a", "猫", "\ud800", "\u0301", "x" * 32_000])
def test_any_text_is_a_prompt(prompt: str) -> None:
    index = Candidates()
    index.add("g", "a", prompt)
    assert keys(index.nearest("g", prompt)) == ["a"]


def test_vectors_are_the_same_in_every_process() -> None:
    [vector] = Trigrams().embed(["abc"])
    assert {int(at): float(vector[at]) for at in vector.nonzero()[0]} == {
        55: pytest.approx(-1.0),
        161: pytest.approx(-1.0),
        185: pytest.approx(1.0),
    }


class Letters:
    """An embedder: how often each letter comes."""

    def __init__(self, dimensions: int = 26) -> None:
        self.dimensions = dimensions

    def embed(self, prompts: Sequence[str]) -> Any:
        return np.array([[prompt.count(chr(97 + at)) for at in range(self.dimensions)] for prompt in prompts])


def test_candidates_may_come_from_another_embedder() -> None:
    index = Candidates(embedder=Letters())
    index.add("g", "a", "listen")
    [found] = index.nearest("g", "silent")
    assert (found.key, found.score) == ("a", pytest.approx(1.0))


def test_an_embedder_that_gives_no_vectors_is_an_error() -> None:
    embedder = Letters()
    index = Candidates(embedder=embedder)
    index.add("g", "a", "listen")
    embedder.dimensions = 20
    with pytest.raises(ValueError, match="gave 20 numbers for a prompt, and 26 before"):
        index.add("g", "b", "listen")
    embedder.embed = lambda prompts: np.array([np.nan] * len(prompts))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no row of finite numbers") as caught:
        index.add("g", "b", "silent")
    assert "silent" not in str(caught.value)


def test_without_numpy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_HAS_NUMPY", False)
    with pytest.raises(ConfigError, match=r"pip install 'cacheserver\[semantic\]'"):
        Candidates()


def test_without_faiss_there_are_no_large_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    Candidates()
    with pytest.raises(ConfigError, match=r"100,000 prompts of a group need faiss: pip install"):
        Candidates(max_per_group=100_001)


def test_threads_may_search_while_others_add_and_remove() -> None:
    index = Candidates(max_per_group=200)
    stop = threading.Event()
    failures: list[BaseException] = []

    def search() -> None:
        try:
            while not stop.is_set():
                for candidate in index.nearest("g", f"{FOX} 7"):
                    assert candidate.prompt == f"{FOX} {candidate.key}"
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    searching = [threading.Thread(target=search) for _ in range(3)]
    for thread in searching:
        thread.start()
    for number in range(1_500):
        index.add("g", str(number), f"{FOX} {number}")
        index.remove("g", str(number - 50 * (number % 3)))
    stop.set()
    for thread in searching:
        thread.join()
    assert not failures


ADJECTIVES = ("red", "tiny", "golden", "wooden", "furry", "sleepy", "broken", "ancient")
NOUNS = ("fox", "castle", "robot", "train", "flower", "lamp", "bottle", "dragon", "tree", "horse")
PLACES = ("on a table", "in the rain", "at night", "under a bridge", "in a forest", "by the sea", "in a library")
PROMPTS = [
    f"a {first} {second} {noun} {place}"
    for first in ADJECTIVES
    for second in ADJECTIVES
    for noun in NOUNS
    for place in PLACES
]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="faiss, of the extra [semantic], is not installed")
    monkeypatch.setattr(candidates, "_EXACT_UP_TO", 1_000)


@pytest.mark.usefixtures("small_limit")
def test_a_large_group_is_searched_in_clusters_and_hardly_anything_is_missed() -> None:
    index = Candidates(max_per_group=10_000)
    for number, prompt in enumerate(PROMPTS):
        index.add("g", str(number), prompt)
    asked = [f"{prompt}, photo" for prompt in PROMPTS[::97]]
    exact = [index.nearest("g", prompt) for prompt in asked]
    index.refine()
    assert index._groups["g"].clusters is not None
    clustered = [index.nearest("g", prompt) for prompt in asked]
    assert [found[0] for found in clustered] == [found[0] for found in exact]
    wanted = sum(map(len, exact))
    missed = sum(
        round(one.score - other.score, 6) > 0
        for all_of_it, some in zip(exact, clustered, strict=True)
        for one, other in zip(all_of_it, some, strict=True)
    )
    assert missed <= wanted / 50


@pytest.mark.usefixtures("small_limit")
def test_clusters_know_what_was_added_replaced_and_removed_since() -> None:
    index = Candidates(max_per_group=10_000)
    for number, prompt in enumerate(PROMPTS[:1_500]):
        index.add("g", str(number), prompt)
    index.refine()
    index.add("g", "new", FOX)
    index.add("g", "7", f"{FOX} 7")
    index.remove("g", "8")
    assert keys(index.nearest("g", FOX)) == ["new", "7"]
    assert "7" not in keys(index.nearest("g", PROMPTS[7], limit=50))
    assert "8" not in keys(index.nearest("g", PROMPTS[8], limit=50))
    assert keys(index.nearest("g", PROMPTS[9], limit=1)) == ["9"]


@pytest.mark.usefixtures("small_limit")
def test_clusters_are_made_anew_once_much_has_changed() -> None:
    index = Candidates(max_per_group=1_500)
    for number, prompt in enumerate(PROMPTS[:1_500]):
        index.add("g", str(number), prompt)
    index.refine()
    before = index._groups["g"].clusters
    index.refine()
    assert index._groups["g"].clusters is before
    for number, prompt in enumerate(PROMPTS[1_500:2_000], 1_500):
        index.add("g", str(number), prompt)
    index.refine()
    assert index._groups["g"].clusters is not before
    assert keys(index.nearest("g", PROMPTS[1_700], limit=1)) == ["1700"]


@pytest.mark.usefixtures("small_limit")
def test_what_changes_while_clusters_are_made_is_found_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Candidates(max_per_group=10_000)
    for number, prompt in enumerate(PROMPTS[:1_500]):
        index.add("g", str(number), prompt)
    make = candidates._Clusters

    def slowly(vectors: Any) -> candidates._Clusters:
        clusters = make(vectors)
        index.add("g", "new", FOX)
        return clusters

    monkeypatch.setattr(candidates, "_Clusters", slowly)
    index.refine()
    assert index._groups["g"].clusters is not None
    assert keys(index.nearest("g", FOX)) == ["new"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "remove"]),
            st.sampled_from("gh"),
            st.sampled_from("abcdef"),
            st.sampled_from(PROMPTS[:9]),
        ),
        max_size=40,
    )
)
def test_it_holds_what_was_added_last_and_not_removed(steps: list[tuple[str, str, str, str]]) -> None:
    index = Candidates()
    held: dict[tuple[str, str], str] = {}
    for step, group, key, prompt in steps:
        if step == "add":
            index.add(group, key, prompt)
            held[group, key] = prompt
        else:
            index.remove(group, key)
            held.pop((group, key), None)
    assert len(index) == len(held)
    for group in "gh":
        found = index.nearest(group, PROMPTS[0], limit=9, floor=-1.0)
        assert {(group, each.key): each.prompt for each in found} == {
            name: prompt for name, prompt in held.items() if name[0] == group
        }


class Counting(Trigrams):
    """An embedder as an operator might have one."""

    asked = 0

    def embed(self, prompts: Sequence[str]) -> Any:
        type(self).asked += 1
        return super().embed(prompts)


class Useless:
    """No embedder."""


def test_an_embedder_is_made_of_the_class_that_is_named() -> None:
    candidates = Candidates(embedder=load_embedder(f"{__name__}:Counting"))
    candidates.add("group", "key", "a red fox")
    assert [each.key for each in candidates.nearest("group", "a red fox")] == ["key"]
    assert Counting.asked == 2


@pytest.mark.parametrize("path", ["no_such_module:X", f"{__name__}:Nothing", f"{__name__}:Useless", "", "json"])
def test_an_embedder_that_cannot_be_made_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=r"similarity\.embedder"):
        load_embedder(path)
