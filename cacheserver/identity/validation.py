"""What a request may hold, field by field."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple

from cacheserver.identity.characters import is_plain
from cacheserver.identity.fingerprint import PLAIN_FIELDS, canonical_json, plain_values
from cacheserver.model import ImageRequest, InputRole, JsonValue

_MAX_PROMPT_CHARS = 32_000
_MAX_EXTRA_BYTES = 64 * 1024
_MAX_EXTRA_DEPTH = 16
_MAX_EXTRA_VIOLATIONS = 8
_MAX_NAME_CHARS = 128
_MAX_INPUTS = 16
_MASK_TYPE = "image/png"
_INPUT_TYPES = frozenset({"", "image/png", "image/jpeg", "image/webp"})
"""What an input image may be; empty where only its digest is known."""

_MIN_SIDE, _MAX_SIDE = 16, 8192
_MAX_WHOLE_NUMBER = 2**53 - 1
_MIN_SEED, _MAX_SEED = -(2**63), 2**63 - 1

_MODEL = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_SIZE = re.compile(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")
_UNSEEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Mn", "Me", "Zl", "Zp", "Zs"})
_UNSEEN_LETTERS = frozenset("\u115f\u1160\u3164\uffa0")
"""Hangul fillers and their like: letters by category, blank by nature."""

QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
"""What a request may ask for as quality."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "quality": QUALITIES,
    "background": ("auto", "transparent", "opaque"),
    "output_format": ("png", "jpeg", "webp"),
    "moderation": ("auto", "low"),
}
"""Fields of a request that take one of a few values."""

_OWN_FIELDS = frozenset(field.name for field in fields(ImageRequest))

_NOT_IDENTITY: Mapping[str, str] = {
    "n": "is not part of the picture: set n of the call",
    "stream": "is not part of the picture: call StreamImage",
    "partial_images": "is not offered: StreamImage reports progress without part pictures",
    "response_format": "is not part of the picture: set delivery of the call",
    "user": "is not part of the picture: the bearer token says who asks",
    "safety_identifier": "is not part of the picture: the bearer token says who asks",
    "image": "goes into inputs",
    "images": "goes into inputs",
    "mask": "goes into inputs",
}
"""Parameters of providers that the service sets itself, with where a caller says it."""


class Violation(NamedTuple):
    """A field's path and what is wrong with it."""

    field: str
    text: str


def validate(request: ImageRequest) -> dict[str, str]:
    """What is wrong with `request`: path of the field to what it should be. Empty if nothing is.

    Paths are those of ImageSpec ("prompt", "extra.steps", "inputs[0].digest"); texts never repeat a value.
    """
    return dict(_violations(request))


def validate_prompt(prompt: str) -> dict[str, str]:
    """What `validate` finds wrong with a request's prompt; it depends on nothing else of the request."""
    return {} if _is_well_prompt(prompt) else dict(_prompt(prompt))


def _violations(request: ImageRequest) -> Iterator[Violation]:
    yield from _prompt(request.prompt)
    if not _is_well(request):
        yield from _plain_fields(request)
    if request.extra:
        yield from _extra(request.extra)
    if request.inputs:
        yield from _inputs(request)


def _is_well(request: ImageRequest) -> bool:
    """Whether nothing is wrong with the plain fields."""
    try:
        _check(*plain_values(request))
    except ValueError:
        return False
    return True


@lru_cache(maxsize=256, typed=True)
def _check(*plain: Any) -> None:
    """Raise ValueError if something is wrong with plain fields of these values.

    What raises is not remembered, so what is remembered is short.
    """
    if any(_plain_fields(ImageRequest("", **dict(zip(PLAIN_FIELDS, plain, strict=True))))):
        raise ValueError


def _plain_fields(request: ImageRequest) -> Iterator[Violation]:
    if not _MODEL.fullmatch(request.model):
        yield Violation("model", "must be 1 to 128 of A-Z a-z 0-9 . _ : / -")
    if not _is_size(request.size):
        yield Violation("size", 'must be "auto" or WIDTHxHEIGHT with sides of 16 to 8192 pixels, as 1024x1536')
    for name, choices in CHOICES.items():
        if getattr(request, name) not in choices:
            yield Violation(name, f"must be one of {', '.join(choices)}")
    if request.background == "transparent" and request.output_format == "jpeg":
        yield Violation("background", "transparent needs output_format png or webp; jpeg has no transparency")
    if not 0 <= request.output_compression <= 100:  # noqa: PLR2004 - a percentage
        yield Violation("output_compression", "must be 0 to 100")
    if request.seed is not None and not _MIN_SEED <= request.seed <= _MAX_SEED:
        yield Violation("seed", "must fit 64 bits with sign")


def _is_well_prompt(prompt: str) -> bool:
    """Whether nothing is wrong with a prompt, as is seen at once of most."""
    return 1 <= len(prompt) <= _MAX_PROMPT_CHARS and is_plain(prompt) and not prompt.isspace()


def _prompt(prompt: str) -> Iterator[Violation]:
    if _is_well_prompt(prompt):
        return
    if not 1 <= len(prompt) <= _MAX_PROMPT_CHARS:
        yield Violation("prompt", f"must have 1 to {_MAX_PROMPT_CHARS:,} characters, and has {len(prompt):,}")
    elif _NOT_TEXT.search(prompt):
        yield Violation("prompt", "must be text without NUL characters and lone surrogates")
    elif not any(map(_is_seen, prompt)):
        yield Violation("prompt", "must have at least one character that can be seen")


def _is_seen(character: str) -> bool:
    return unicodedata.category(character) not in _UNSEEN_CATEGORIES and character not in _UNSEEN_LETTERS


def _is_size(size: str) -> bool:
    if size == "auto":
        return True
    sides = _SIZE.fullmatch(size)
    return sides is not None and all(_MIN_SIDE <= int(side) <= _MAX_SIDE for side in sides.groups())


def _inputs(request: ImageRequest) -> Iterator[Violation]:
    masks = [index for index, image in enumerate(request.inputs) if image.role is InputRole.MASK]
    images = len(request.inputs) - len(masks[:1])
    if images > _MAX_INPUTS:
        yield Violation("inputs", f"must be at most {_MAX_INPUTS} images, and are {images:,}")
        return
    for index, image in enumerate(request.inputs):
        if not _SHA256.fullmatch(image.sha256):
            yield Violation(f"inputs[{index}].digest", 'must be "sha256:" and 64 lower-case hexadecimal digits')
        if image.content_type not in _INPUT_TYPES:
            yield Violation(f"inputs[{index}].data", "must be a PNG, JPEG or WebP image")
        elif image.role is InputRole.MASK and image.content_type not in {"", _MASK_TYPE}:
            yield Violation(f"inputs[{index}].data", "must be a PNG image: it is a mask")
    if len(masks) > 1:
        yield Violation(f"inputs[{masks[1]}].role", "is a second mask: there can be one")
    if request.inputs and len(masks) == len(request.inputs):
        yield Violation("inputs", "must have an image beside the mask: what it is a mask of")


def _extra(extra: Mapping[str, JsonValue]) -> Iterator[Violation]:
    violations = list(_violations_of_extra(extra))
    yield from violations[:_MAX_EXTRA_VIOLATIONS]  # an answer's metadata is small
    if not violations and len(canonical_json(extra).encode()) > _MAX_EXTRA_BYTES:
        yield Violation("extra", f"must be at most {_MAX_EXTRA_BYTES:,} bytes as JSON")


def _violations_of_extra(extra: Mapping[str, JsonValue]) -> Iterator[Violation]:
    for name, value in extra.items():
        if not _is_name(name):
            yield Violation("extra", _NAME_TEXT)
        elif name in _OWN_FIELDS:
            yield Violation(f"extra.{name}", f"repeats a field: set {name} itself")
        elif name in _NOT_IDENTITY:
            yield Violation(f"extra.{name}", _NOT_IDENTITY[name])
        elif problem := _problem(value, depth=2):
            yield Violation(f"extra.{name}", problem)


_NAME_TEXT = f"names must have 1 to {_MAX_NAME_CHARS} printable characters"


def _is_name(name: str) -> bool:
    return 1 <= len(name) <= _MAX_NAME_CHARS and name.isprintable()


def _problem(value: JsonValue, depth: int) -> str | None:
    """What is wrong with a value at `depth` (extra itself is level 1), if anything is."""
    if isinstance(value, str):
        return "must be text without NUL characters and lone surrogates" if _NOT_TEXT.search(value) else None
    if isinstance(value, int | float):
        return _problem_of_number(value)
    if value is None:
        return None
    if depth > _MAX_EXTRA_DEPTH:
        return f"must be at most {_MAX_EXTRA_DEPTH} levels deep"
    if isinstance(value, Mapping):
        if not all(map(_is_name, value)):
            return _NAME_TEXT
        value = list(value.values())
    return next(filter(None, (_problem(item, depth + 1) for item in value)), None)


def _problem_of_number(number: float) -> str | None:
    if not math.isfinite(number):
        return "must be a finite number"
    if abs(number) > _MAX_WHOLE_NUMBER:
        # Beyond this a double skips whole numbers: two seeds would arrive as one.
        return f"must lie within ±{_MAX_WHOLE_NUMBER:,}; send larger numbers as text"
    return None
