"""Why two keys differ."""

import dataclasses

from cacheserver.identity import FieldDifference, differences, identify
from cacheserver.model import ImageRequest, InputImage, InputRole, MatchLevel, Namespace

NAMESPACE = Namespace("shop", partition="shop")
REQUEST = ImageRequest("A cat.", "gpt-image-2", extra={"steps": 30.0, "lora": {"a": 1, "b": 2}})


def compare(other: ImageRequest) -> list[FieldDifference]:
    return differences(identify(REQUEST, NAMESPACE), identify(other, NAMESPACE))


def test_requests_with_the_same_key_differ_in_nothing() -> None:
    same = dataclasses.replace(REQUEST, prompt="a  cat", extra={"lora": {"b": 2.0, "a": 1}, "steps": 30})
    assert compare(same) == []
    assert identify(REQUEST, NAMESPACE).key == identify(same, NAMESPACE).key


def test_each_field_that_differs_is_shown_with_both_values() -> None:
    other = dataclasses.replace(REQUEST, prompt="A Dog!", seed=7, size="64x64")
    assert compare(other) == [("prompt", "a cat", "a dog"), ("seed", "null", "7"), ("size", "auto", "64x64")]


def test_parameters_of_extra_are_shown_one_by_one() -> None:
    other = dataclasses.replace(REQUEST, extra={"lora": {"a": 1, "b": 3}, "hires": True, "none": None})
    assert compare(other) == [
        ("extra.hires", "", "true"),
        ("extra.lora", '{"a":1,"b":2}', '{"a":1,"b":3}'),
        ("extra.none", "", "null"),
        ("extra.steps", "30", ""),
    ]


def test_a_parameter_named_like_a_field_is_not_taken_for_it() -> None:
    other = dataclasses.replace(REQUEST, extra=dict(REQUEST.extra) | {"profile": "x"})
    assert compare(other) == [("extra.profile", "", "x")]


def test_input_images_are_shown() -> None:
    other = dataclasses.replace(REQUEST, inputs=(InputImage(InputRole.MASK, "0" * 64),))
    assert compare(other) == [("inputs", "[]", '[{"role":"mask","sha256":"' + "0" * 64 + '"}]')]


def test_another_profile_is_a_difference() -> None:
    exact = identify(REQUEST, NAMESPACE, MatchLevel.EXACT)
    rows = differences(identify(REQUEST, NAMESPACE), exact)
    assert rows == [("profile", "standard/1", "exact/1"), ("prompt", "a cat", "A cat.")]


def test_catalog_patterns_are_a_difference() -> None:
    one = Namespace("a", "p", "catalog", (r"ab-\d+",))
    other = Namespace("b", "p", "catalog", (r"cd-\d+",))
    rows = differences(identify(REQUEST, one), identify(REQUEST, other))
    assert [row.field for row in rows] == ["catalog_patterns"]
