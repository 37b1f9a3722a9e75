"""Bodies as values: what is read, and what is said of what cannot be."""

from __future__ import annotations

import json
import time

import pytest
from starlette.requests import Request
from starlette.types import Message

from cacheserver.http.body import read_body, read_json
from cacheserver.http.openai.reading import MAX_JSON_BYTES, Fields, ResponseFormat, read_wanted
from cacheserver.http.status import HttpError
from cacheserver.identity import identify
from cacheserver.model import JsonValue, Namespace

NAMESPACE = Namespace("default", "default", default_model="gpt-image-2")
JSON = Request({"type": "http", "headers": [(b"content-type", b"Application/JSON; charset=utf-8")]})


@pytest.mark.parametrize(
    ("fields", "param", "code", "text"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter", "Missing required parameter: 'prompt'."),
        ({"prompt": 7}, "prompt", "invalid_type", "expected a string, but got an integer instead"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value", "32,000 characters"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value", "lone surrogates"),
        ({"size": "huge"}, "size", "invalid_value", "Invalid value: 'huge'. Supported values are: 'auto', and"),
        ({"size": "a secret wish"}, "size", "invalid_value", "Invalid value of 'size'. Supported values are:"),
        ({"quality": "ultra"}, "quality", "invalid_value", "Supported values are: 'auto', 'low', 'medium', 'high',"),
        ({"output_format": "gif"}, "output_format", "invalid_value", "Supported values are: 'png', 'jpeg', and 'webp'"),
        ({"moderation": "none"}, "moderation", "invalid_value", "Supported values are: 'auto' and 'low'."),
        ({"background": "transparent", "output_format": "jpeg"}, "background", "invalid_value", "no transparency"),
        ({"output_compression": 101}, "output_compression", "invalid_value", "0 to 100"),
        ({"n": 0}, "n", "integer_below_min_value", "at least 1"),
        ({"n": 11}, "n", "integer_above_max_value", "at most 10"),
        ({"n": True}, "n", "invalid_type", "expected an integer, but got a boolean instead"),
        ({"n": "1"}, "n", "invalid_type", "expected an integer, but got a string instead"),
        ({"n": 1.0}, "n", "invalid_type", "expected an integer, but got a decimal number instead"),
        ({"stream": 1}, "stream", "invalid_type", "expected a boolean, but got an integer instead"),
        ({"partial_images": 4}, "partial_images", "integer_above_max_value", "at most 3"),
        ({"response_format": "hex"}, "response_format", "invalid_value", "'url' and 'b64_json'"),
        ({"model": ["a"]}, "model", "invalid_type", "expected a string, but got an array instead"),
        ({"model": "no model"}, "model", "invalid_value", "1 to 128 of"),
        ({"user": {}}, "user", "invalid_type", "but got an object instead"),
        ({"image": "x"}, "image", "unknown_parameter", "/v1/images/edits"),
        ({"steps": 2**60}, "steps", "invalid_value", "send larger numbers as text"),
        ({"inputs": []}, "inputs", "invalid_value", "repeats a field"),
    ],
)
def test_a_parameter_out_of_its_range_is_named(fields: dict[str, JsonValue], param: str, code: str, text: str) -> None:
    with pytest.raises(HttpError) as raised:
        read_wanted(Fields({"prompt": "a red fox", **fields}), NAMESPACE)
    error = raised.value
    assert (error.status, error.param, error.code) == (400, param, code)
    assert text in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b"[1]", "should be an object"),
        (b"null", "should be an object"),
        (b'{"prompt": NaN}', "NaN is no JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "a name twice"),
        (b'{"prompt": "a", "extra": {"x": 1, "x": 2}}', "a name twice"),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
        (b'{"x": ' + b"[" * 100_000, "nests too deeply"),
        (b'{"x": ' + b"1" * 5_000 + b"}", "too many digits"),
    ],
)
def test_a_body_that_is_no_json_is_told_so(body: bytes, text: str) -> None:
    with pytest.raises(HttpError, match="could not be parsed") as raised:
        read_json(JSON, body)
    assert (raised.value.status, raised.value.code) == (400, "invalid_json")
    assert text in str(raised.value)


def test_the_longest_prompt_and_all_further_parameters_fit_a_body() -> None:
    body = json.dumps({"prompt": "\U0001f98a" * 32_000, "note": "\u00e9" * 32_000}).encode()
    assert len(body) < MAX_JSON_BYTES
    wanted = read_wanted(Fields(read_json(JSON, body)), NAMESPACE)
    assert len(wanted.request.prompt) == 32_000


def test_what_is_left_out_has_its_default() -> None:
    wanted = read_wanted(Fields({"prompt": "a red fox"}), NAMESPACE)
    assert (wanted.n, wanted.stream, wanted.partial_images, wanted.response_format) == (1, False, 0, None)
    assert wanted.request.model == "gpt-image-2"


def test_in_a_form_numbers_and_booleans_are_text() -> None:
    values = {"prompt": "a red fox", "n": "2", "stream": "true", "seed": "-7", "response_format": "url"}
    wanted = read_wanted(Fields(values, are_text=True), NAMESPACE)
    assert (wanted.n, wanted.stream, wanted.request.seed) == (2, True, -7)
    assert wanted.response_format is ResponseFormat.URL


@pytest.mark.parametrize("text", ["0", "-7", "20", "0.5", "7.50", "1e-05", "true", "false", str(10**15 - 1)])
def test_a_provider_s_parameter_counts_as_the_same_in_a_form_and_in_json(text: str) -> None:
    form, parsed = (
        read_wanted(fields, NAMESPACE).request
        for fields in (
            Fields({"prompt": "a red fox", "steps": text}, are_text=True),
            Fields({"prompt": "a red fox", "steps": json.loads(text)}),
        )
    )
    assert identify(form, NAMESPACE) == identify(parsed, NAMESPACE)


@pytest.mark.parametrize(
    "text", ["", "007", "1.", ".5", "+1", " 1", "1e400", "NaN", "True", "null", "9" * 30, "\u0661"]
)
def test_text_of_a_form_that_is_no_plain_number_stays_text(text: str) -> None:
    wanted = read_wanted(Fields({"prompt": "a red fox", "style": text}, are_text=True), NAMESPACE)
    assert wanted.request.extra == {"style": text}


@pytest.mark.parametrize("text", ["", "1.0", "01", "+1", " 1", "one", "9" * 30, "\u0661"])
def test_a_number_of_a_form_is_read_strictly(text: str) -> None:
    with pytest.raises(HttpError, match="Invalid type for 'n': expected an integer"):
        read_wanted(Fields({"prompt": "a red fox", "n": text}, are_text=True), NAMESPACE)


async def test_a_body_in_many_pieces_costs_as_much_as_it_has_of_them() -> None:
    async def cost_s(pieces: int) -> float:
        messages = ({"type": "http.request", "body": b"x", "more_body": left > 0} for left in reversed(range(pieces)))

        async def receive() -> Message:
            return next(messages)

        before_s = time.process_time()
        assert await read_body(Request(JSON.scope, receive), max_bytes=MAX_JSON_BYTES) == b"x" * pieces
        return time.process_time() - before_s

    few_s = min([await cost_s(1_000) for _ in range(3)])
    many_s = min([await cost_s(20_000) for _ in range(3)])
    assert many_s < 5 * 20 * few_s
