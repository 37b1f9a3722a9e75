"""What a request may hold."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheserver.identity import identify, validate
from cacheserver.model import ImageRequest, InputImage, InputRole, Namespace

REQUEST = ImageRequest("a cat", "gpt-image-2")


def nested(levels: int) -> Any:
    """A value that makes extra `levels` levels deep: extra itself is the first."""
    value: Any = 1
    for _ in range(levels - 1):
        value = {"a": value}
    return value


IMAGE = InputImage(InputRole.IMAGE, "0" * 64, "image/jpeg")
MASK = InputImage(InputRole.MASK, "1" * 64, "image/png")

GOOD: list[dict[str, Any]] = [
    {},
    {"prompt": "x"},
    {"prompt": "x" * 32_000},
    {"prompt": "猫" * 32_000},
    {"prompt": "🐱"},
    {"prompt": "\U0001fadd"},
    {"prompt": "!"},
    {"model": "a/b:c.d_e-f"},
    {"model": "m" * 128},
    {"size": "16x16"},
    {"size": "8192x8192"},
    {"size": "1024x1536"},
    {"quality": "xhigh"},
    {"background": "transparent"},
    {"background": "transparent", "output_format": "webp"},
    {"output_format": "jpeg", "output_compression": 0},
    {"moderation": "low"},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"extra": {"steps": 30.0, "guidance": 7.5, "hires": True, "none": None, "lora": [{"name": "x"}]}},
    {"extra": {"a": nested(16)}},
    {"extra": {"x" * 128: 1}},
    {"extra": {"a": 2**53 - 1}},
    {"extra": {"a": "x" * 65_000}},
    {"extra": {"nested": {"n": 1, "user": "fine below the top"}}},
    {"inputs": (InputImage(InputRole.IMAGE, "0123456789abcdef" * 4),)},
    {"inputs": (InputImage(InputRole.STYLE, "0" * 64, "image/webp"), MASK, *[IMAGE] * 14)},
]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": "x" * 32_001}),
    ("prompt", {"prompt": " \n\t\u3000"}),
    ("prompt", {"prompt": "\u200b\ufeff\u00ad\u200d\ufe0f"}),
    ("prompt", {"prompt": "\u3164"}),
    ("prompt", {"prompt": "a\x00b"}),
    ("prompt", {"prompt": "a\ud800b"}),
    ("model", {"model": ""}),
    ("model", {"model": "m" * 129}),
    ("model", {"model": "a b"}),
    ("model", {"model": "model\n"}),
    ("model", {"model": "模型"}),
    ("size", {"size": ""}),
    ("size", {"size": "17x99999"}),
    ("size", {"size": "15x64"}),
    ("size", {"size": "64x8193"}),
    ("size", {"size": "064x64"}),
    ("size", {"size": "64X64"}),
    ("size", {"size": "64x64\n"}),
    ("size", {"size": "-64x64"}),
    ("size", {"size": "\uff16\uff14x64"}),
    ("size", {"size": "64"}),
    ("quality", {"quality": "ultra"}),
    ("quality", {"quality": "HIGH"}),
    ("background", {"background": "blue"}),
    ("background", {"background": "transparent", "output_format": "jpeg"}),
    ("output_format", {"output_format": "gif"}),
    ("output_compression", {"output_compression": -1}),
    ("output_compression", {"output_compression": 101}),
    ("moderation", {"moderation": "none"}),
    ("seed", {"seed": 2**63}),
    ("seed", {"seed": -(2**63) - 1}),
    ("extra", {"extra": {"": 1}}),
    ("extra", {"extra": {"x" * 129: 1}}),
    ("extra", {"extra": {"a\nb": 1}}),
    ("extra", {"extra": {"\ud800": 1}}),
    ("extra", {"extra": {"a": "x" * 65_536}}),
    ("extra.a", {"extra": {"a": nested(17)}}),
    ("extra.a", {"extra": {"a": nested(5_000)}}),
    ("extra.a", {"extra": {"a": float("nan")}}),
    ("extra.a", {"extra": {"a": [1, {"b": float("inf")}]}}),
    ("extra.a", {"extra": {"a": 2**53}}),
    ("extra.a", {"extra": {"a": -1e300}}),
    ("extra.a", {"extra": {"a": "\x00"}}),
    ("extra.a", {"extra": {"a": ["\udfff"]}}),
    ("extra.a", {"extra": {"a": {"": 1}}}),
    ("extra.prompt", {"extra": {"prompt": "a dog"}}),
    ("extra.seed", {"extra": {"seed": 1}}),
    ("extra.n", {"extra": {"n": 2}}),
    ("extra.user", {"extra": {"user": "me"}}),
    ("extra.stream", {"extra": {"stream": True}}),
    ("extra.response_format", {"extra": {"response_format": "url"}}),
    ("extra.partial_images", {"extra": {"partial_images": 2}}),
    ("extra.mask", {"extra": {"mask": "x"}}),
    ("inputs", {"inputs": (InputImage(InputRole.IMAGE, "0" * 64),) * 17}),
    ("inputs[1].digest", {"inputs": (IMAGE, InputImage(InputRole.MASK, "F" * 64))}),
    ("inputs[2].role", {"inputs": (IMAGE, MASK, MASK)}),
    ("inputs", {"inputs": (MASK,)}),
    ("inputs[1].data", {"inputs": (IMAGE, dataclasses.replace(MASK, content_type="image/jpeg"))}),
    ("inputs[0].data", {"inputs": (dataclasses.replace(IMAGE, content_type="image/gif"),)}),
]


@pytest.mark.parametrize("changes", GOOD, ids=lambda changes: repr(changes)[:60])
def test_a_good_request_has_no_violations_and_an_identity(changes: dict[str, Any]) -> None:
    request = dataclasses.replace(REQUEST, **changes)
    assert validate(request) == {}
    assert identify(request, Namespace("a", "a")).canonical


@pytest.mark.parametrize(("path", "changes"), BAD, ids=[f"{path}-{number}" for number, (path, _) in enumerate(BAD)])
def test_a_bad_request_names_its_field_and_says_what_is_right(path: str, changes: dict[str, Any]) -> None:
    violations = validate(dataclasses.replace(REQUEST, **changes))
    assert set(violations) == {path}
    assert len(violations[path]) > 10


def test_all_bad_fields_are_named_at_once() -> None:
    request = ImageRequest("", "", size="big", extra={"n": 1, "size": "64x64"})
    assert set(validate(request)) == {"prompt", "model", "size", "extra.n", "extra.size"}


def test_no_parameter_of_extra_may_repeat_a_field() -> None:
    for field in dataclasses.fields(ImageRequest):
        assert set(validate(dataclasses.replace(REQUEST, extra={field.name: 1}))) == {f"extra.{field.name}"}


def test_a_refused_parameter_says_where_it_is_set() -> None:
    violations = validate(dataclasses.replace(REQUEST, extra={"n": 2, "response_format": "url", "size": "64x64"}))
    assert "set n of the call" in violations["extra.n"]
    assert "delivery" in violations["extra.response_format"]
    assert "set size itself" in violations["extra.size"]


def test_thousands_of_bad_parameters_are_answered_with_a_few() -> None:
    extra = {f"p{number}": float("nan") for number in range(5_000)}
    assert len(validate(dataclasses.replace(REQUEST, extra=extra))) == 8


@given(prompt=st.text(max_size=50), model=st.text(max_size=20), size=st.text(max_size=12), quality=st.text(max_size=8))
def test_what_passes_has_an_identity_and_what_fails_is_not_repeated(
    prompt: str, model: str, size: str, quality: str
) -> None:
    request = ImageRequest(prompt, model, size=size, quality=quality)
    if violations := validate(request):
        said = " ".join(violations.values())
        assert not any(len(value) > 12 and value in said for value in (prompt, model, size, quality))
    else:
        assert identify(request, Namespace("a", "a")).canonical
