"""Which other requests' pictures would do for a request, and which never would."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.identity import QUALITIES, identify, validate
from cacheserver.model import AnswerFrom, ImageRequest, Namespace, Rendition
from cacheserver.renditions.candidates import MOST, candidates

EVERYTHING = frozenset(AnswerFrom)
QUALITY, FORMAT, SIZE = (frozenset({each}) for each in AnswerFrom)
FOX = ImageRequest("a red fox", "gpt-image-2", size="1024x1024", quality="low")
LADDER = ("low", "medium", "high", "xhigh", "max")

sides = st.integers(16, 2048)
requests = st.builds(
    ImageRequest,
    prompt=st.just("a red fox"),
    model=st.just("gpt-image-2"),
    size=st.just("auto") | st.builds("{}x{}".format, sides, sides) | st.sampled_from(["1024x1024", "768x512"]),
    quality=st.sampled_from(QUALITIES),
    background=st.sampled_from(["auto", "opaque"]),
    output_format=st.sampled_from(["png", "jpeg", "webp"]),
    output_compression=st.integers(0, 100),
    seed=st.none() | st.integers(0, 9),
    extra=st.just({}) | st.just({"steps": 30}),
)
rights = st.sets(st.sampled_from(AnswerFrom)).map(frozenset)


def pixels(size: str) -> tuple[int, int]:
    width, height = size.split("x")
    return int(width), int(height)


# ---- One way at a time


def test_a_higher_quality_will_do_as_it_is_and_the_nearest_comes_first() -> None:
    found = candidates(FOX, QUALITY)
    assert [each.request for each in found] == [replace(FOX, quality=each) for each in LADDER[1:]]
    assert {each.rendition for each in found} == {None}


def test_the_two_ladders_of_qualities_are_not_compared() -> None:
    assert [each.request.quality for each in candidates(replace(FOX, quality="standard"), QUALITY)] == ["hd"]
    assert not candidates(replace(FOX, quality="hd"), QUALITY)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_lossy_format_is_encoded_from_the_lossless_one(output_format: str) -> None:
    asked = replace(FOX, output_format=output_format, output_compression=70)
    [found] = candidates(asked, FORMAT)
    assert found.request == FOX
    assert found.rendition == Rendition(output_format=output_format, output_compression=70)


def test_a_lossless_format_is_encoded_from_nothing() -> None:
    assert not candidates(FOX, FORMAT)


def test_a_larger_size_of_exactly_the_same_shape_is_made_smaller() -> None:
    found = candidates(replace(FOX, size="768x512"), SIZE)
    assert [each.request.size for each in found] == ["1152x768", "1536x1024", "2304x1536", "3072x2048"]
    assert {each.rendition for each in found} == {Rendition(768, 512)}


def test_a_half_pixel_is_no_size() -> None:
    assert [each.request.size for each in candidates(replace(FOX, size="33x17"), SIZE)] == ["66x34", "99x51", "132x68"]


def test_what_is_left_to_the_provider_is_never_compared() -> None:
    auto = ImageRequest("a red fox", "gpt-image-2")
    assert not candidates(auto, QUALITY | SIZE)
    assert [each.by for each in candidates(replace(auto, output_format="jpeg"), EVERYTHING)] == [FORMAT]


# ---- Several ways at once


def test_fewer_changes_come_first_and_of_these_what_takes_least() -> None:
    asked = replace(FOX, output_format="jpeg", size="768x512", quality="high")
    found = candidates(asked, EVERYTHING)
    assert [each.by for each in found[:3]] == [QUALITY, QUALITY, FORMAT]
    changes = [len(each.by) for each in found]
    assert changes == sorted(changes)
    assert [each.request.size for each in found if each.by == FORMAT | SIZE] == [
        "1152x768",
        "1536x1024",
        "2304x1536",
        "3072x2048",
    ]


def test_a_lossy_picture_is_not_made_smaller_unless_a_lossless_one_may_be_used() -> None:
    asked = replace(FOX, output_format="jpeg")
    assert not candidates(asked, SIZE)
    assert all(each.request.output_format == "png" for each in candidates(asked, SIZE | FORMAT))


@given(requests, rights)
def test_a_candidate_is_never_less_than_what_was_asked_for(asked: ImageRequest, allowed: frozenset[AnswerFrom]) -> None:
    found = candidates(asked, allowed)
    assert len(found) <= MOST
    for each in found:
        other = each.request
        assert each.by
        assert each.by <= allowed
        if asked.quality in LADDER:
            assert LADDER.index(other.quality) >= LADDER.index(asked.quality)
        elif other.quality != asked.quality:
            assert (asked.quality, other.quality) == ("standard", "hd")
        if other.size != asked.size:
            (width, height), (wide, high) = pixels(asked.size), pixels(other.size)
            assert wide > width
            assert high > height
            assert wide * height == high * width
        assert other.output_format in {asked.output_format, "png"}
        assert (each.rendition is None) == (each.by == QUALITY)
        if each.rendition is not None:
            assert other.output_format == "png"


@given(requests, rights)
def test_candidates_differ_in_nothing_else_and_are_others(asked: ImageRequest, allowed: frozenset[AnswerFrom]) -> None:
    namespace = Namespace("shop", "shop")
    own = identify(asked, namespace).key
    keys = []
    for each in candidates(asked, allowed):
        other = replace(each.request, quality=asked.quality, size=asked.size, output_format=asked.output_format)
        assert replace(other, output_compression=asked.output_compression) == asked
        assert not validate(each.request)
        keys.append(identify(each.request, namespace).key)
    assert own not in keys
    assert len(set(keys)) == len(keys)


@given(requests)
def test_nothing_is_a_candidate_where_nothing_is_allowed(asked: ImageRequest) -> None:
    assert not candidates(asked, frozenset())
