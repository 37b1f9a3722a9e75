"""What OpenAI's images API takes and answers: parameters, errors, headers, results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scripts.bench.provider_config import (
    INPUT_IMAGE_TOKENS,
    PARTIAL_TOKENS,
    Fault,
    Kind,
    Price,
    ProviderConfig,
    input_tokens,
    output_tokens,
    sides,
)
from scripts.bench.provider_http import Reply
from scripts.bench.provider_limits import Refusal, Told

_AUTO = "auto"
_AUTO_BILLED_SIZE = "1024x1024"
_AUTO_QUALITY = "medium"

_PARAMETERS = frozenset(
    {"prompt", "model", "n", "size", "quality", "background", "output_format", "output_compression"}
    | {"moderation", "stream", "partial_images", "user", "safety_identifier"}
)
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "quality": ("low", "medium", "high", "auto"),
    "background": ("transparent", "opaque", "auto"),
    "output_format": ("png", "jpeg", "webp"),
    "moderation": ("low", "auto"),
}
_WHOLE: Mapping[str, tuple[int, int]] = {"n": (1, 10), "output_compression": (0, 100), "partial_images": (0, 3)}
_IMAGE_PARTS = frozenset({"image", "image[]"})
_DISPOSITION = re.compile(r'(name|filename)="([^"]*)"')
_PROMPT_MAX_CHARS = 32_000
_SIZE = re.compile(r"\d{1,4}x\d{1,4}")
_SIDE_STEP = 16
_ASPECT_MAX = 3
_SIDES_MAX = (3840, 2160)
_PIXELS = (655_360, 8_294_400)

_CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent"),
    *("self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors"),
    *("violence", "violence/graphic"),
)
_FLAGGED = "violence"

_LIMIT_NAMES: Mapping[Kind, str] = {
    "requests": "requests per min (RPM)",
    "tokens": "tokens per min (TPM)",
    "images": "images per min (IPM)",
}

HTML_ERROR = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n"
    b"<center><h1>502 Bad Gateway</h1></center>\r\n<hr><center>cloudflare</center>\r\n</body>\r\n</html>\r\n"
)


class ApiError(Exception):
    """An error as the API answers it."""

    def __init__(  # noqa: PLR0913 - the fields of the error object
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self._error = {"message": message, "type": kind, "param": param, "code": code, **more}
        self._headers = {} if retry_after is None else {"retry-after": retry_after}

    def reply(self) -> Reply:
        """The answer."""
        return Reply(self.status, json.dumps({"error": self._error}).encode(), headers=self._headers)


@dataclass(frozen=True, slots=True)
class Asked:
    """A generation that the API would make. `size` and `quality` are resolved; `billed_size` is never auto's own.

    It starts from `inputs` images if it is an edit, and shows `partials` before its picture if it streams.
    """

    prompt: str
    model: str
    n: int
    size: str
    billed_size: str
    quality: str
    background: str
    output_format: str
    inputs: int = 0
    streams: bool = False
    partials: int = 0

    @property
    def text_tokens(self) -> int:
        """What its prompt counts."""
        return input_tokens(self.prompt)

    @property
    def image_tokens(self) -> int:
        """What its input images count."""
        return self.inputs * self.n * INPUT_IMAGE_TOKENS

    @property
    def tokens_out(self) -> int:
        """What its pictures count, partial ones too."""
        return self.n * output_tokens(self.billed_size, self.quality) + self.partials * PARTIAL_TOKENS

    @property
    def amounts(self) -> dict[Kind, float]:
        """What it takes of each limit."""
        tokens = self.text_tokens + self.image_tokens + self.tokens_out
        return {"requests": 1, "images": self.n, "tokens": tokens}


def parse_generation(body: bytes, config: ProviderConfig, deployment: str | None) -> Asked:
    """The generation a body asks for. With Azure's `deployment` the model is in the path, and not in the body.

    Raises:
        ApiError: what the real API refuses.
    """
    return _parse(parse_object(body), config, deployment)


def parse_edit(body: bytes, content_type: str, config: ProviderConfig, deployment: str | None) -> Asked:
    """The edit a form asks for; otherwise as `parse_generation`.

    Raises:
        ApiError: what the real API refuses.
    """
    texts, files = read_form(body, content_type)
    if not any(name in _IMAGE_PARTS for name in files):
        raise ApiError(400, "missing_required_parameter", "Missing required parameter: 'image'.", param="image")
    if unknown := sorted({*files} - _IMAGE_PARTS - {"mask"}):
        raise _unknown_parameter(unknown[0])
    return _parse({name: _of_form(name, text) for name, text in texts.items()}, config, deployment, inputs=len(files))


def read_form(body: bytes, content_type: str) -> tuple[dict[str, str], list[str]]:
    """The texts of a form by name, and the names of its files in order.

    Raises:
        ApiError: it is no form.
    """
    _, _, boundary = content_type.partition("boundary=")
    parts = body.split(b"--" + boundary.strip('"').encode("latin-1", "replace")) if boundary else []
    texts: dict[str, str] = {}
    files: list[str] = []
    for part in parts[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        said = dict(_DISPOSITION.findall(head.decode("latin-1")))
        if "name" not in said:
            raise ApiError(400, None, "We could not parse the multipart form of your request.")
        if "filename" in said:
            files.append(said["name"])
        else:
            texts[said["name"]] = data.removesuffix(b"\r\n").decode(errors="replace")
    if not texts:
        raise ApiError(400, None, "We could not parse the multipart form of your request.")
    return texts, files


def _of_form(name: str, text: str) -> object:
    """A text of a form as JSON would have it."""
    if name in _WHOLE and re.fullmatch(r"-?\d{1,9}", text):
        return int(text)
    return {"true": True, "false": False}.get(text, text) if name == "stream" else text


def _parse(given: Mapping[str, Any], config: ProviderConfig, deployment: str | None, *, inputs: int = 0) -> Asked:
    fields = {name: value for name, value in given.items() if value is not None}
    if deployment is not None:
        if "model" in fields:
            raise _unknown_parameter("model")
        fields["model"] = deployment
    model = fields.get("model")
    if not isinstance(model, str) or model not in config.models:
        message = f"The model '{model}' does not exist."
        raise ApiError(404, "model_not_found", message, param="model")
    unknown = sorted(fields.keys() - _PARAMETERS)
    if unknown:
        raise _unknown_parameter(unknown[0])
    _check_values(fields)
    size, quality = fields.get("size", _AUTO), fields.get("quality", _AUTO)
    asked = Asked(
        prompt=fields["prompt"],
        model=model,
        n=fields.get("n", 1),
        size=config.auto_size if size == _AUTO else size,
        billed_size=_AUTO_BILLED_SIZE if size == _AUTO else size,
        quality=_AUTO_QUALITY if quality == _AUTO else quality,
        background="transparent" if fields.get("background") == "transparent" else "opaque",
        output_format=fields.get("output_format", "png"),
        inputs=inputs,
        streams=fields.get("stream", False),
        partials=fields.get("partial_images", 0),
    )
    price = config.models[model]
    if price.usd_per_image and asked.billed_size not in price.usd_per_image.get(asked.quality, {}):
        raise _invalid("size", "those that have a price")
    return asked


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: it is none.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ApiError(400, None, "We could not parse the JSON body of your request.")
    return fields


def _check_values(fields: Mapping[str, Any]) -> None:
    _check_prompt(fields.get("prompt"))
    for name, choices in _CHOICES.items():
        if name in fields and fields[name] not in choices:
            raise _invalid(name, ", ".join(f"'{choice}'" for choice in choices))
    for name, (least, most) in _WHOLE.items():
        value = fields.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _invalid(name, f"{least} to {most}")
    if not _is_size(fields.get("size", _AUTO)):
        raise _invalid("size", "'auto' and WIDTHxHEIGHT, both divisible by 16, at most 3840x2160 and 3 to 1")
    _check_together(fields)


def _check_prompt(prompt: object) -> None:
    if prompt is None:
        raise ApiError(400, "missing_required_parameter", "Missing required parameter: 'prompt'.", param="prompt")
    if not isinstance(prompt, str) or not 1 <= len(prompt) <= _PROMPT_MAX_CHARS:
        raise _invalid("prompt", f"a text of 1 to {_PROMPT_MAX_CHARS} characters")


def _check_together(fields: Mapping[str, Any]) -> None:
    """What each alone would be right."""
    if fields.get("output_format", "png") == "png" and fields.get("output_compression", 100) != 100:  # noqa: PLR2004 - percent
        raise _invalid("output_compression", "100 for png")
    if fields.get("background") == "transparent" and fields.get("output_format") == "jpeg":
        raise _invalid("background", "'opaque' for jpeg")
    if not isinstance(fields.get("stream", False), bool):
        raise _invalid("stream", "true, false")
    if fields.get("stream") and fields.get("n", 1) > 1:
        raise _invalid("n", "1 with stream")
    if fields.get("partial_images") and not fields.get("stream"):
        raise _invalid("partial_images", "0 without stream")


def _is_size(size: object) -> bool:
    """Whether it is a size that gpt-image-2 makes."""
    if size == _AUTO:
        return True
    if not isinstance(size, str) or not _SIZE.fullmatch(size):
        return False
    short, long = sorted(sides(size))
    fits = long <= max(_SIDES_MAX) and short * _ASPECT_MAX >= long and _PIXELS[0] <= short * long <= _PIXELS[1]
    return fits and short % _SIDE_STEP == long % _SIDE_STEP == 0


def _unknown_parameter(name: str) -> ApiError:
    return ApiError(400, "unknown_parameter", f"Unknown parameter: '{name}'.", param=name)


def _invalid(name: str, supported: str) -> ApiError:
    return ApiError(400, "invalid_value", f"Invalid value: '{name}'. Supported values are: {supported}.", param=name)


def fault_error(fault: Fault, retry_after: str) -> ApiError:
    """The error that a fault answers; for the faults that are answered by one.

    Raises:
        KeyError: it is not.
    """
    return {
        Fault.RATE_LIMITED: lambda: ApiError(
            429,
            "rate_limit_exceeded",
            f"You've exceeded the rate limit, please slow down and try again after {retry_after} seconds.",
            kind="images",
            retry_after=retry_after,
        ),
        Fault.SLOW_DOWN: lambda: ApiError(
            429,
            "slow_down",
            "Your traffic grew too fast. Reduce it and raise it gradually.",
            kind="rate_limit_error",
            retry_after=retry_after,
        ),
        Fault.INSUFFICIENT_QUOTA: lambda: _no_quota("insufficient_quota"),
        Fault.CREDIT_BALANCE_EXHAUSTED: lambda: _no_quota("credit_balance_exhausted"),
        Fault.NOT_ENTITLED: lambda: ApiError(403, None, "Your organization must be verified to use this model."),
        Fault.OVERLOADED: lambda: ApiError(
            503,
            "server_is_overloaded",
            "The server is overloaded. Please try again later.",
            kind="service_unavailable_error",
        ),
        Fault.SERVER_ERROR: lambda: ApiError(
            500, "server_error", "The image could not be generated.", kind="server_error"
        ),
        Fault.MODERATION_BLOCKED: lambda: blocked("input"),
        Fault.MODERATION_BLOCKED_OUTPUT: lambda: blocked("output"),
    }[fault]()


def _no_quota(code: str) -> ApiError:
    message = "You exceeded your current quota, please check your plan and billing details."
    return ApiError(429, code, message, kind="insufficient_quota")


def blocked(stage: str) -> ApiError:
    """What a prompt (stage input), or a picture (output), that breaks the rules is answered."""
    return ApiError(
        400,
        "moderation_blocked",
        f"Your request was rejected by the safety system. safety_violations=[{_FLAGGED}].",
        kind="image_generation_user_error",
        moderation_details={"moderation_stage": stage, "categories": [_FLAGGED]},
    )


def limited(refusal: Refusal, group: str, amount: float, told: Units) -> ApiError:
    """What a call beyond a limit is answered."""
    retry_after = told.retry_after(refusal.wait_s)
    if refusal.kind is None:
        what = f"too many concurrent requests: Limit {refusal.limit:g}"
    else:
        limit = told.per_minute(refusal.limit)
        what = f"on {_LIMIT_NAMES[refusal.kind]}: Limit {limit}, Requested {amount:g}"
    return ApiError(
        429,
        "rate_limit_exceeded",
        f"Rate limit reached in organization {group} {what}. Please try again in {retry_after}s.",
        kind=refusal.kind or "requests",
        retry_after=retry_after,
    )


@dataclass(frozen=True, slots=True)
class Units:
    """In whose seconds and minutes an answer speaks: `compression` emulated seconds are one of them."""

    compression: float = 1.0

    def retry_after(self, emulated_s: float) -> str:
        """A Retry-After: whole seconds, at least one; with compression such a second is long, so a fraction."""
        if self.compression == 1:
            return str(max(1, math.ceil(emulated_s)))
        return f"{max(0.001, self._rounded_up(emulated_s)):.3f}"

    def per_minute(self, limit: float) -> int:
        """A limit."""
        return int(limit * self.compression)

    def headers(self, told: Mapping[Kind, Told], *, azure: bool) -> dict[str, str]:
        """The x-ratelimit-* headers. Azure gives plain seconds; OpenAI too, for images, else a duration as Go's."""
        headers: dict[str, str] = {}
        for kind, limit in told.items():
            plain = azure or kind == "images"
            headers[f"x-ratelimit-limit-{kind}"] = str(self.per_minute(limit.per_minute))
            headers[f"x-ratelimit-remaining-{kind}"] = str(limit.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = (
                self._plain_seconds(limit.reset_s) if plain else go_duration(self._rounded_up(limit.reset_s))
            )
        return headers

    def _plain_seconds(self, emulated_s: float) -> str:
        return str(math.ceil(emulated_s)) if self.compression == 1 else f"{self._rounded_up(emulated_s):.3f}"

    def _rounded_up(self, emulated_s: float) -> float:
        """To milliseconds: who waits for so long does not come too early."""
        return math.ceil(emulated_s / self.compression * 1_000 - 1e-6) / 1_000


def go_duration(seconds: float) -> str:
    """A duration as Go writes it, to the millisecond: 0s, 12ms, 1.5s, 6m0s, 1h0m0s."""
    ms = round(seconds * 1_000)
    if 0 < ms < 1_000:  # noqa: PLR2004 - a second
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h"] * (hours > 0) + [f"{minutes}m"] * (hours + minutes > 0) + [f"{ms / 1_000:g}s"]
    return "".join(parts)


def generation_result(asked: Asked, price: Price, data: list[dict[str, str]], created_s: int) -> bytes:
    """The answer with the pictures. Where they are priced by the image, it tells no token counts."""
    answer: dict[str, Any] = {
        "created": created_s,
        "background": asked.background,
        "output_format": asked.output_format,
        "quality": asked.quality,
        "size": asked.size,
        "data": data,
    }
    if not price.usd_per_image:
        answer["usage"] = _usage(asked)
    return json.dumps(answer).encode()


def streamed_result(
    asked: Asked, price: Price, coarse: list[dict[str, str]], picture: dict[str, str], created_s: int
) -> bytes:
    """The answer as a stream of events: partial pictures, then the picture."""
    kind = "image_edit" if asked.inputs else "image_generation"
    facts: dict[str, Any] = {
        "created_at": created_s,
        "background": asked.background,
        "output_format": asked.output_format,
        "quality": asked.quality,
        "size": asked.size,
    }
    events = [
        {"type": f"{kind}.partial_image", "partial_image_index": index, **facts, **each}
        for index, each in enumerate(coarse)
    ]
    completed = {"type": f"{kind}.completed", **facts, **picture}
    if not price.usd_per_image:
        completed["usage"] = _usage(asked)
    return b"".join(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n".encode() for each in [*events, completed])


def _usage(asked: Asked) -> dict[str, Any]:
    tokens_in = asked.text_tokens + asked.image_tokens
    return {
        "total_tokens": tokens_in + asked.tokens_out,
        "input_tokens": tokens_in,
        "output_tokens": asked.tokens_out,
        "input_tokens_details": {"text_tokens": asked.text_tokens, "image_tokens": asked.image_tokens},
        "output_tokens_details": {"image_tokens": asked.tokens_out, "text_tokens": 0},
    }


def moderation_result(body: bytes, marker: str | None, request_id: str) -> bytes:
    """The answer of the moderation endpoint: what holds the marker is flagged.

    Raises:
        ApiError: there is no input that can be judged.
    """
    fields = parse_object(body)
    results = [_judged(marker is not None and marker in text) for text in _texts(fields.get("input"))]
    model = fields.get("model") or "omni-moderation-latest"
    return json.dumps({"id": f"modr-{request_id}", "model": model, "results": results}).encode()


def _texts(given: object) -> list[str]:
    """One text for each result: of a text, of each in a list, or of a list of objects, which belong together."""
    items = given if isinstance(given, list) else [given]
    if items and all(isinstance(item, str) for item in items):
        return [str(item) for item in items]
    if items and all(isinstance(item, dict) and isinstance(item.get("text"), str) for item in items):
        return ["\n".join(item["text"] for item in items)]
    raise _invalid("input", "a text, texts, or objects of type 'text'")


def _judged(is_flagged: bool) -> dict[str, Any]:  # noqa: FBT001 - the one thing to be said
    categories = {name: is_flagged and name == _FLAGGED for name in _CATEGORIES}
    return {
        "flagged": is_flagged,
        "categories": categories,
        "category_scores": {name: 0.98 if yes else 0.0001 for name, yes in categories.items()},
        "category_applied_input_types": {name: ["text"] for name in _CATEGORIES},
    }
