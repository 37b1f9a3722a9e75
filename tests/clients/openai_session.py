"""A team's work with OpenAI's Python package, told as one JSON object: `contract`, which is what every server that is
compatible should give, and `cache`, what is to be seen of a cache behind it.

It runs under openai 1 and 3 alike, told by the environment: BASE_URL, API_KEY, BROKE_KEY (one that may not spend),
CONTROL_URL (what holds the server's generations and counts them; see tests/clients/stage.py).
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import threading
import time
import urllib.request
from typing import Any

import openai

MODEL = "gpt-image-2"
PROMPT = "a red fox in the snow"
PLAIN: dict[str, Any] = {"model": MODEL, "size": "1024x1024", "quality": "low"}
RELEASE_AFTER_S = 0.3
HEADERS = ("cache-status", "age", "etag", "x-cacheserver-cost-usd", "x-cacheserver-saved-usd")
_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}


def control(action: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{os.environ['CONTROL_URL']}/{action}", data=b"") as answer:  # noqa: S310 - http
        told: dict[str, Any] = json.load(answer)
        return told


class Sent:
    """The requests that have gone out, retries among them, by the time of each."""

    def __init__(self) -> None:
        self.at_s: list[float] = []
        self.on_second: Any = None

    def note(self, _: Any) -> None:
        self.at_s.append(time.monotonic())
        if len(self.at_s) == 2 and self.on_second is not None:
            self.on_second()


def client(sent: Sent, *, key: str = "", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=os.environ["BASE_URL"],
        api_key=key or os.environ["API_KEY"],
        http_client=openai.DefaultHttpxClient(event_hooks={"request": [sent.note]}, trust_env=False),
        **options,
    )


def format_of(data: bytes) -> str | None:
    return next((name for signature, name in _SIGNATURES.items() if data.startswith(signature)), None)


def bytes_of(answer: Any) -> list[bytes]:
    return [base64.b64decode(item.b64_json, validate=True) for item in answer.data]


def digests(answer: Any) -> list[str]:
    return [hashlib.sha256(data).hexdigest() for data in bytes_of(answer)]


def facts(answer: Any) -> dict[str, Any]:
    """What every answer with pictures has."""
    usage = answer.usage
    return {
        "created": answer.created > 1_600_000_000,
        "formats": [format_of(data) for data in bytes_of(answer)],
        "urls": [item.url for item in answer.data],
        "different": len(set(digests(answer))) == len(answer.data),
        "told": [answer.size, answer.quality, answer.output_format, answer.background],
        "usage_adds_up": usage.total_tokens == usage.input_tokens + usage.output_tokens > 0,
        "text_tokens": usage.input_tokens_details.text_tokens > 0,
    }


def failure(sent: Sent, call: Any) -> dict[str, Any]:
    """How a call fails, and how often it was sent."""
    before = len(sent.at_s)
    try:
        call()
    except openai.APIStatusError as error:
        return {
            "class": type(error).__name__,
            "status": error.status_code,
            "type": error.type,
            "code": error.code,
            "param": error.param,
            "all_four_keys": {"message", "type", "param", "code"} <= set(error.body),  # type: ignore[arg-type] # a dict
            "request_id": bool(error.request_id),
            "requests": len(sent.at_s) - before,
        }
    return {"class": None}


def pictures(api: openai.OpenAI, contract: dict[str, Any], cache: dict[str, Any]) -> None:
    """Pictures in all forms."""
    raw = api.images.with_raw_response.generate(prompt=PROMPT, **PLAIN)
    first = raw.parse()
    contract["generate"] = facts(first)
    contract["request_id"] = bool(first._request_id) and first._request_id == raw.headers["x-request-id"]
    cache["generate"] = {"digests": digests(first), **control("counts"), "headers": picked(raw.headers)}

    raw = api.images.with_raw_response.generate(prompt=PROMPT, **PLAIN)
    contract["repeat"] = facts(raw.parse())
    cache["repeat"] = {"digests": digests(raw.parse()), **control("counts"), "headers": picked(raw.headers)}

    for name, more in (
        ("two", {"n": 2}),
        ("two_again", {"n": 2}),
        ("jpeg", {"output_format": "jpeg"}),
        ("compressed", {"output_format": "jpeg", "output_compression": 40}),
        ("webp", {"output_format": "webp"}),
        ("b64_json", {"response_format": "b64_json"}),
    ):
        answer = api.images.generate(prompt=PROMPT, **PLAIN, **more)
        contract[name] = facts(answer)
        cache[name] = {"digests": digests(answer), **control("counts")}

    answer = api.images.generate(prompt=PROMPT, response_format="url", **PLAIN)
    with urllib.request.urlopen(answer.data[0].url) as fetched:  # noqa: S310 - http
        data = fetched.read()
        contract["url"] = {
            "b64_json": answer.data[0].b64_json,
            "content_type": fetched.headers["content-type"],
            "format": format_of(data),
        }
    cache["url"] = {"digests": [hashlib.sha256(data).hexdigest()], **control("counts")}


def picked(headers: Any) -> dict[str, str]:
    return {name: headers[name] for name in HEADERS if name in headers}


def streams(api: openai.OpenAI, contract: dict[str, Any], cache: dict[str, Any]) -> None:
    """Partial pictures, then the whole one; then the same again."""
    for name in ("stream", "stream_again"):
        events = list(api.images.generate(prompt="a blue whale", stream=True, partial_images=2, **PLAIN))
        *partials, last = events
        told: dict[str, Any] = {
            "last": last.type,
            "format": format_of(base64.b64decode(last.b64_json)),
            "told": [last.size, last.quality, last.output_format, last.background],
            "created_at": last.created_at > 1_600_000_000,
            "usage_adds_up": last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens > 0,
            "text_tokens": last.usage.input_tokens_details.text_tokens > 0,
        }
        if name == "stream":  # a server that has the picture already may leave the partial ones out
            told["partials"] = [
                [event.type, event.partial_image_index, format_of(base64.b64decode(event.b64_json))]
                for event in partials
            ]
        contract[name] = told
        digest = hashlib.sha256(base64.b64decode(last.b64_json)).hexdigest()
        cache[name] = {"digests": [digest], **control("counts")}


def edits(api: openai.OpenAI, contract: dict[str, Any], cache: dict[str, Any]) -> None:
    """A picture made from another one and a mask; the same with another picture."""
    picture, other = bytes_of(api.images.generate(prompt=PROMPT, n=2, **PLAIN))
    for name, image in (("edit", picture), ("edit_again", picture), ("edit_of_another", other)):
        answer = api.images.edit(
            image=("picture.png", io.BytesIO(image), "image/png"),
            mask=("mask.png", io.BytesIO(other), "image/png"),
            prompt="the same with a hat",
            **PLAIN,
        )
        contract[name] = facts(answer)
        cache[name] = {"digests": digests(answer), **control("counts")}
    events = list(
        api.images.edit(
            image=[("a.png", io.BytesIO(picture), "image/png"), ("b.png", io.BytesIO(other), "image/png")],
            prompt="both in one frame",
            stream=True,
            partial_images=1,
            **PLAIN,
        )
    )
    contract["edit_stream"] = [event.type for event in events]


def refusals(api: openai.OpenAI, sent: Sent, contract: dict[str, Any]) -> None:
    """What cannot be had."""
    stranger = client(sent, key="sk-nobody-knows-this-one")
    broke = client(sent, key=os.environ["BROKE_KEY"])
    contract["wrong_key"] = failure(sent, lambda: stranger.images.generate(prompt=PROMPT, **PLAIN))
    contract["wrong_key_stream"] = failure(sent, lambda: stranger.images.generate(prompt=PROMPT, stream=True, **PLAIN))
    contract["bad_size"] = failure(sent, lambda: api.images.generate(prompt=PROMPT, **{**PLAIN, "size": "17x99999"}))
    contract["bad_n"] = failure(sent, lambda: api.images.generate(prompt=PROMPT, n=11, **PLAIN))
    contract["unknown_model"] = failure(
        sent, lambda: api.images.generate(prompt=PROMPT, **{**PLAIN, "model": "gpt-image-0"})
    )
    control("block")
    contract["blocked"] = failure(sent, lambda: api.images.generate(prompt="something violent", **PLAIN))
    contract["broke"] = failure(sent, lambda: broke.images.generate(prompt="a dear picture", **PLAIN))


def limits(sent: Sent, contract: dict[str, Any]) -> None:
    """A server that has more to do than it takes."""
    api = client(sent, max_retries=1)
    control("crowd")
    before = len(sent.at_s)
    contract["limited"] = failure(sent, lambda: api.images.generate(prompt="one too many", **PLAIN))
    first_s, *more_s = sent.at_s[before:]
    # A Retry-After is a second at least; what the package waits by itself is half of one.
    contract["limited"]["waited"] = [at_s - first_s >= 0.95 for at_s in more_s]
    control("disperse")
    contract["after_the_crowd"] = facts(api.images.generate(prompt="one too many", **PLAIN))["formats"]


def time_out(contract: dict[str, Any], cache: dict[str, Any]) -> None:
    """A client less patient than the generation is long, which sends its request again."""
    sent = Sent()
    sent.on_second = lambda: threading.Timer(RELEASE_AFTER_S, control, ["release"]).start()
    before = control("hold")
    answer = client(sent, timeout=1.0, max_retries=4).images.generate(prompt="a slow picture", **PLAIN)
    contract["timeout"] = {"sent_again": len(sent.at_s) >= 2, "formats": facts(answer)["formats"]}
    cache["timeout"] = {"calls": control("counts")["calls"] - before["calls"]}


def models(api: openai.OpenAI, sent: Sent, contract: dict[str, Any]) -> None:
    listed = [model.id for model in api.models.list()]
    model = api.models.retrieve(MODEL)
    contract["models"] = {
        "listed": MODEL in listed,
        "retrieved": [model.id, model.object],
        "unknown": failure(sent, lambda: api.models.retrieve("gpt-image-0")),
    }


def main() -> None:
    sent = Sent()
    api = client(sent)
    contract: dict[str, Any] = {}
    cache: dict[str, Any] = {"version": openai.__version__}
    pictures(api, contract, cache)
    streams(api, contract, cache)
    edits(api, contract, cache)
    refusals(api, sent, contract)
    limits(sent, contract)
    time_out(contract, cache)
    models(api, sent, contract)
    print(json.dumps({"contract": contract, "cache": cache}))  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
