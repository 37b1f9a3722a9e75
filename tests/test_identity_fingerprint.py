"""From a request to canonical bytes, fingerprint, digest and key."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.identity import PROFILES, identify, key_of, key_of_alike
from cacheserver.identity.fingerprint import canonical_json
from cacheserver.model import CacheKey, ImageRequest, InputImage, InputRole, MatchLevel, Namespace

NAMESPACE = Namespace("shop", partition="shared")
REQUEST = ImageRequest("a cat", "gpt-image-2")

CHANGES: Mapping[str, Any] = {
    "prompt": "a dog",
    "model": "gpt-image-3",
    "size": "1024x1024",
    "quality": "high",
    "background": "opaque",
    "output_format": "webp",
    "output_compression": 50,
    "moderation": "low",
    "seed": 1,
    "extra": {"steps": 30},
    "inputs": (InputImage(InputRole.IMAGE, "0" * 64),),
}
"""Every field of a request with a value that asks for another picture."""


def canonical(request: ImageRequest, namespace: Namespace = NAMESPACE, level: MatchLevel | None = None) -> str:
    return identify(request, namespace, level).canonical.decode()


def test_every_field_of_a_request_is_in_its_identity() -> None:
    _, identity = json.loads(canonical(REQUEST))
    assert set(identity) == {field.name for field in dataclasses.fields(ImageRequest)}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ImageRequest)])
@pytest.mark.parametrize("profile", PROFILES)
def test_any_field_changed_changes_the_key(name: str, profile: str) -> None:
    namespace = dataclasses.replace(NAMESPACE, profile=profile)
    before = dataclasses.replace(REQUEST, output_format="jpeg")
    after = dataclasses.replace(before, **{name: CHANGES[name]})
    assert identify(before, namespace).key != identify(after, namespace).key


def test_every_field_of_an_input_counts_and_so_does_their_order() -> None:
    image, mask = InputImage(InputRole.IMAGE, "0" * 64), InputImage(InputRole.MASK, "1" * 64)
    others = [(mask, image), (image,), (dataclasses.replace(image, sha256="2" * 64), mask), (mask, mask)]
    texts = {canonical(dataclasses.replace(REQUEST, inputs=inputs)) for inputs in [(image, mask), *others]}
    assert len(texts) == 5


def test_a_default_is_its_explicit_form() -> None:
    explicit = ImageRequest(
        "a cat",
        "gpt-image-2",
        size="auto",
        quality="auto",
        background="auto",
        output_format="png",
        output_compression=100,
        moderation="auto",
        seed=None,
        extra={},
        inputs=(),
    )
    assert identify(REQUEST, NAMESPACE).canonical == identify(explicit, NAMESPACE).canonical


@pytest.mark.parametrize(("output_format", "counts"), [("png", False), ("jpeg", True), ("webp", True)])
def test_compression_counts_where_there_is_some(output_format: str, *, counts: bool) -> None:
    full = dataclasses.replace(REQUEST, output_format=output_format)
    assert (canonical(full) != canonical(dataclasses.replace(full, output_compression=10))) is counts


def test_the_bytes_are_canonical_json_that_begins_with_the_profile() -> None:
    text = canonical(dataclasses.replace(REQUEST, prompt="猫", extra={"b": 1, "a": {"z": 0, "y": None}}))
    assert text == (
        '["standard/1",{"background":"auto","extra":{"a":{"y":null,"z":0},"b":1},"inputs":[],"model":"gpt-image-2",'
        '"moderation":"auto","output_compression":null,"output_format":"png","prompt":"猫","quality":"auto",'
        '"seed":null,"size":"auto"}]'
    )


def test_the_key_is_made_of_both_hashes_of_the_canonical_bytes() -> None:
    identity = identify(REQUEST, NAMESPACE)
    assert identity.key == CacheKey(
        "shared",
        xxhash.xxh3_128_digest(identity.canonical),
        hashlib.sha256(identity.canonical).digest(),
        variant=0,
    )
    assert CacheKey.parse(identity.key.name).matches(identity.key.digest)


def test_a_key_whose_name_was_asked_for_is_the_same_key() -> None:
    key, other = (identify(REQUEST, NAMESPACE).key for _ in range(2))
    assert key.name == key.name == f"{other.identity_name}.0"
    assert (key, hash(key), repr(key)) == (other, hash(other), repr(other))
    assert dataclasses.replace(key, variant=1).name == key.with_variant(1).name == f"{other.identity_name}.1"
    assert copy.copy(key).name == key.name


def test_the_partition_is_in_the_key_and_not_in_the_fingerprint() -> None:
    one, other = identify(REQUEST, NAMESPACE), identify(REQUEST, dataclasses.replace(NAMESPACE, partition="own"))
    assert one.key.fingerprint == other.key.fingerprint
    assert one.key.name != other.key.name


def test_the_namespace_that_asks_is_not_in_the_key() -> None:
    assert identify(REQUEST, NAMESPACE) == identify(REQUEST, dataclasses.replace(NAMESPACE, name="other"))


def test_the_prompt_digest_is_of_the_prompt_as_written() -> None:
    identity = identify(ImageRequest("A Cat.", "m"), NAMESPACE)
    assert identity.prompt_digest == hashlib.sha256(b"A Cat.").digest()
    assert identity.normalized_prompt == "a cat"


def test_a_replaced_fingerprint_function_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheserver.identity.fingerprint.fingerprint_of", lambda _canonical: bytes(16))
    one, other = identify(REQUEST, NAMESPACE).key, identify(dataclasses.replace(REQUEST, seed=1), NAMESPACE).key
    assert one.fingerprint == other.fingerprint
    assert one.name != other.name
    assert not one.matches(other.digest)


@pytest.mark.parametrize(
    ("profile", "level", "used"),
    [
        ("exact", None, "exact/1"),
        ("exact", MatchLevel.STANDARD, "exact/1"),
        ("standard", None, "standard/1"),
        ("standard", MatchLevel.EXACT, "exact/1"),
        ("standard", MatchLevel.STANDARD, "standard/1"),
        ("standard", MatchLevel.SEMANTIC, "standard/1"),
        ("catalog", None, "catalog/1"),
        ("catalog", MatchLevel.EXACT, "exact/1"),
        ("catalog", MatchLevel.STANDARD, "standard/1"),
        ("catalog", MatchLevel.CATALOG, "catalog/1"),
        ("catalog", MatchLevel.CANONICAL, "catalog/1"),
    ],
)
def test_the_tighter_of_profile_and_match_level_counts(profile: str, level: MatchLevel | None, used: str) -> None:
    identity = identify(REQUEST, dataclasses.replace(NAMESPACE, profile=profile), level)
    assert identity.profile == used
    assert identity.level is PROFILES[used.removesuffix("/1")].level
    assert json.loads(identity.canonical)[0] == used


def test_an_unknown_profile_is_an_error() -> None:
    with pytest.raises(KeyError):
        identify(REQUEST, dataclasses.replace(NAMESPACE, profile="loose"))


def test_namespaces_that_drop_different_things_share_nothing() -> None:
    one = dataclasses.replace(NAMESPACE, profile="catalog", catalog_patterns=(r"ab-\d+",))
    other = dataclasses.replace(one, catalog_patterns=(r"cd-\d+",))
    request = ImageRequest("a shoe", "m")
    assert identify(request, one).key != identify(request, other).key
    tighter = MatchLevel.STANDARD
    assert identify(request, one, tighter).key == identify(request, other, tighter).key


@pytest.mark.parametrize(("one", "other"), [(7, 7.0), (0, -0.0), (-3, -3.0), (2**53, 2.0**53), ([1], [1.0])])
def test_equal_numbers_are_written_alike(one: Any, other: Any) -> None:
    assert canonical_json({"x": one}) == canonical_json({"x": other})


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (0, False), (0, None), ("1", 1), ("", None), ([], {}), ([], None), (7.5, 7), (2**53, 2**53 + 1)],
)
def test_values_that_differ_are_written_differently(one: Any, other: Any) -> None:
    assert canonical_json({"x": one}) != canonical_json({"x": other})


def test_a_null_differs_from_a_missing_parameter() -> None:
    assert canonical_json({"x": None}) != canonical_json({})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": number})


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError):
        canonical_json({"x": b"bytes"})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
REQUESTS = st.builds(
    ImageRequest,
    prompt=st.text(min_size=1, max_size=30),
    model=st.sampled_from(["m", "gpt-image-2"]),
    size=st.sampled_from(["auto", "64x64"]),
    quality=st.text(max_size=5),
    output_format=st.sampled_from(["jpeg", "webp"]),
    output_compression=st.integers(0, 100),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    extra=st.dictionaries(st.text(max_size=8), JSON, max_size=4),
)


@given(request=REQUESTS)
def test_the_order_of_extra_does_not_matter(request: ImageRequest) -> None:
    turned = dataclasses.replace(request, extra=dict(reversed(list(request.extra.items()))))
    assert identify(request, NAMESPACE) == identify(turned, NAMESPACE)


@given(request=REQUESTS, has_extra=st.booleans(), output_format=st.sampled_from(["png", "jpeg"]))
@pytest.mark.parametrize("profile", ["standard", "catalog"])
def test_the_bytes_are_those_of_all_fields_however_they_are_joined(
    profile: str, request: ImageRequest, output_format: str, *, has_extra: bool
) -> None:
    namespace = dataclasses.replace(NAMESPACE, profile=profile, catalog_patterns=("sku", '"prompt":""'))
    request = dataclasses.replace(request, output_format=output_format, extra=request.extra if has_extra else {})
    identity = identify(request, namespace)
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    fields["prompt"] = identity.normalized_prompt
    if output_format == "png":
        fields["output_compression"] = None
    if profile == "catalog":
        fields["catalog_patterns"] = namespace.catalog_patterns
    assert identity.canonical.decode() == canonical_json([f"{profile}/1", fields])


@given(request=REQUESTS, variant=st.integers(0, 3))
@pytest.mark.parametrize("profile", ["exact", "standard", "catalog"])
def test_the_key_alone_is_that_of_the_identity(profile: str, request: ImageRequest, variant: int) -> None:
    namespace = dataclasses.replace(NAMESPACE, profile=profile, catalog_patterns=(r"sku \d+",))
    assert key_of(request, namespace, variant) == identify(request, namespace).key.with_variant(variant)


@given(request=REQUESTS, size=st.sampled_from(["auto", "32x32"]), level=st.sampled_from([None, MatchLevel.EXACT]))
@pytest.mark.parametrize("profile", ["exact", "standard", "catalog"])
def test_a_request_of_the_same_prompt_has_the_key_that_it_would_be_identified_by(
    profile: str, request: ImageRequest, size: str, level: MatchLevel | None
) -> None:
    namespace = dataclasses.replace(NAMESPACE, profile=profile, catalog_patterns=(r"sku \d+", "a"))
    other = dataclasses.replace(request, size=size, quality="high", output_format="png")
    assert key_of_alike(identify(request, namespace, level), other) == identify(other, namespace, level).key


CLOSE = st.sampled_from(
    [None, True, False, 0, -0.0, 1, 1.0, 1.5, "", "1", "null", [], {}, [1], [[1]], {"a": 1}, {"a": True}]
)
CLOSE_REQUESTS = st.builds(
    ImageRequest,
    prompt=st.sampled_from(["a", "A", 'a","seed":1']),
    model=st.just("m"),
    seed=st.none() | st.integers(0, 1),
    extra=st.dictionaries(st.sampled_from(["a", "b", "seed"]), CLOSE, max_size=2),
)


def strictly(value: Any) -> Any:
    """`value` so that == tells booleans from numbers and takes 1 and 1.0 for one."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, Mapping):
        return {name: strictly(item) for name, item in value.items()}
    return [strictly(item) for item in value] if isinstance(value, list) else value


@given(one=CLOSE_REQUESTS, other=CLOSE_REQUESTS)
def test_canonical_bytes_are_equal_only_for_equal_requests(one: ImageRequest, other: ImageRequest) -> None:
    exact = dataclasses.replace(NAMESPACE, profile="exact")
    facts = [dataclasses.replace(request, extra=strictly(request.extra)) for request in (one, other)]
    assert (canonical(one, exact) == canonical(other, exact)) == (facts[0] == facts[1])


@given(text=st.text(st.sampled_from('",:{}[]\\a猫\u0000\u2028')))
def test_no_content_can_imitate_structure(text: str) -> None:
    exact = dataclasses.replace(NAMESPACE, profile="exact")
    request = dataclasses.replace(REQUEST, prompt=text, quality=text, extra={text: text})
    profile, identity = json.loads(canonical(request, exact))
    assert profile == "exact/1"
    assert (identity["prompt"], identity["quality"], identity["extra"]) == (text, text, {text: text})
