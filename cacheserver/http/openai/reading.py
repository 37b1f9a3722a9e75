"""What the body of a request for pictures asks for: every parameter checked as OpenAI's API checks it, none ignored.

What is null counts as left out. A parameter that is not known is one of the provider's: it is passed on, and part of
the picture's identity. The first thing that is wrong is told, by the parameter's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from types import MappingProxyType

from cacheserver.calls.bounds import MAX_IMAGES
from cacheserver.http.status import HttpError
from cacheserver.identity import CHOICES, validate
from cacheserver.model import ImageRequest, InputImage, JsonValue, Namespace

MAX_JSON_BYTES = 1024 * 1024
"""Largest JSON body of a generation: the longest prompt and 64 KiB of further parameters fit, escaped to the last."""

_MAX_PARTIALS = 3
_MAX_SAFETY_IDENTIFIER = 256
_LEGACY_MODELS = "dall-e-"
_SIZES = "'auto', and 'WIDTHxHEIGHT' with sides of 16 to 8192 pixels, as '1024x1536'"
_WORD = re.compile(r"[A-Za-z0-9._:-]{1,32}")
"""What may be repeated in an error: too short and too plain to be a prompt."""

_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,20})?(?:e-[0-9]{1,2})?")
"""As JSON and OpenAI's libraries write numbers, as far as a double tells each whole one apart."""

_KINDS: Mapping[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal number",
    list: "an array",
    dict: "an object",
}


class ResponseFormat(StrEnum):
    """How pictures are answered with."""

    URL = "url"
    B64_JSON = "b64_json"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a body asks for. `response_format` None: the body does not say."""

    request: ImageRequest
    n: int
    response_format: ResponseFormat | None
    stream: bool
    partial_images: int
    safety_identifier: str

    @property
    def by_url(self) -> bool:
        """Whether URLs are wanted, as OpenAI's dall-e models answered with where nothing else was asked for."""
        if self.response_format is None:
            return self.request.model.startswith(_LEGACY_MODELS)
        return self.response_format is ResponseFormat.URL


class Fields:
    """The parameters of a body, taken out one by one; what is left are the provider's.

    In a form numbers and booleans are text. A provider's parameter that looks like one counts as one, so that an edit
    has one identity however it comes; providers get edits as forms, where both look alike.
    """

    def __init__(self, values: Mapping[str, JsonValue], *, are_text: bool = False) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._are_text = are_text

    def text(self, name: str, default: str = "") -> str:
        """A string. Raises HttpError."""
        value = self._left.pop(name, default)
        if not isinstance(value, str):
            raise wrong_type(name, str, value)
        return value

    def whole(self, name: str, default: int | None = None) -> int | None:
        """A whole number, None where there is none. Raises HttpError."""
        value = self._left.pop(name, default)
        if self._are_text and isinstance(value, str) and _WHOLE.fullmatch(value):
            return int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise wrong_type(name, int, value)
        return value

    def within(self, name: str, least: int, most: int, default: int) -> int:
        """A whole number of `least` to `most`. Raises HttpError."""
        value = self.whole(name, default) or 0
        if value > most:
            raise wrong(name, f"Invalid '{name}': expected an integer of at most {most}.", "integer_above_max_value")
        if value < least:
            raise wrong(name, f"Invalid '{name}': expected an integer of at least {least}.", "integer_below_min_value")
        return value

    def flag(self, name: str) -> bool:
        """A boolean, false where there is none. Raises HttpError."""
        value = self._left.pop(name, False)
        if self._are_text and value in ("true", "false"):
            return value == "true"
        if not isinstance(value, bool):
            raise wrong_type(name, bool, value)
        return value

    @property
    def rest(self) -> Mapping[str, JsonValue]:
        """What nobody has taken."""
        if not self._are_text:
            return MappingProxyType(self._left)
        return MappingProxyType({name: _as_in_json(value) for name, value in self._left.items()})


def read_wanted(fields: Fields, namespace: Namespace, inputs: tuple[InputImage, ...] = ()) -> Wanted:
    """What a request for pictures asks for; `inputs` are the images an edit starts from.

    Raises:
        HttpError: a parameter is missing or out of its range, and which.
    """
    n = fields.within("n", 1, MAX_IMAGES, 1)
    response_format = fields.text("response_format")
    if response_format and response_format not in [*ResponseFormat]:
        raise _not_one_of("response_format", response_format, [*ResponseFormat])
    stream = fields.flag("stream")
    partial_images = fields.within("partial_images", 0, _MAX_PARTIALS, 0)
    fields.text("user")  # who asks is told by the token, and never part of a picture
    safety_identifier = fields.text("safety_identifier")
    if len(safety_identifier) > _MAX_SAFETY_IDENTIFIER:
        text = f"Invalid 'safety_identifier': expected at most {_MAX_SAFETY_IDENTIFIER} characters."
        raise wrong("safety_identifier", text, "string_above_max_length")
    return Wanted(
        request=_read_request(fields, namespace, inputs),
        n=n,
        response_format=ResponseFormat(response_format) if response_format else None,
        stream=stream,
        partial_images=partial_images if stream else 0,
        safety_identifier=safety_identifier,
    )


def _as_in_json(value: JsonValue) -> JsonValue:
    """What JSON would have in place of a form's text."""
    if isinstance(value, str) and (value in ("true", "false") or _NUMBER.fullmatch(value)):
        value = json.loads(value)
    return value


def _read_request(fields: Fields, namespace: Namespace, inputs: tuple[InputImage, ...]) -> ImageRequest:
    compression = fields.whole("output_compression")
    request = ImageRequest(
        prompt=fields.text("prompt"),
        model=fields.text("model") or namespace.default_model,
        size=fields.text("size") or "auto",
        quality=fields.text("quality") or "auto",
        background=fields.text("background") or "auto",
        output_format=fields.text("output_format") or "png",
        output_compression=100 if compression is None else compression,
        moderation=fields.text("moderation") or "auto",
        seed=fields.whole("seed"),
        extra=fields.rest,
        inputs=inputs,
    )
    if not request.prompt:
        raise wrong("prompt", "Missing required parameter: 'prompt'.", "missing_required_parameter")
    for name in ("image", "images", "mask"):
        if name in request.extra:
            text = f"Unknown parameter: '{name}'. Images are edited at /v1/images/edits."
            raise wrong(name, text, "unknown_parameter")
    for path, text in validate(request).items():
        raise _violation(path, text, request)
    return request


def _violation(path: str, text: str, request: ImageRequest) -> HttpError:
    """The first violation, in OpenAI's words where it has some."""
    if path in CHOICES:
        value = getattr(request, path)
        if value not in CHOICES[path]:
            return _not_one_of(path, value, CHOICES[path])
    if path == "size":
        return _not_supported("size", request.size, _SIZES)
    name = path.removeprefix("extra.")
    if name == "extra":  # of all of them together, or of a name that is too odd to be repeated
        return HttpError(HTTPStatus.BAD_REQUEST, f"Invalid further parameters: {text}.", code="invalid_value")
    return wrong(name, f"Invalid '{name}': {text}.", "invalid_value")


def _not_one_of(name: str, value: str, choices: Sequence[str]) -> HttpError:
    *others, last = (f"'{choice}'" for choice in choices)
    comma = "," if len(others) > 1 else ""
    return _not_supported(name, value, f"{', '.join(others)}{comma} and {last}")


def _not_supported(name: str, value: str, supported: str) -> HttpError:
    said = f": '{value}'" if _WORD.fullmatch(value) else f" of '{name}'"
    return wrong(name, f"Invalid value{said}. Supported values are: {supported}.", "invalid_value")


def wrong_type(name: str, expected: type, value: JsonValue) -> HttpError:
    """A parameter is of another type than it should be."""
    text = f"Invalid type for '{name}': expected {_KINDS[expected]}, but got {_KINDS[type(value)]} instead."
    return wrong(name, text, "invalid_type")


def wrong(name: str, message: str, code: str) -> HttpError:
    """What is wrong with one parameter."""
    return HttpError(HTTPStatus.BAD_REQUEST, message, param=name, code=code)
