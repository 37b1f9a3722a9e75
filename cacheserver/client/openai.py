"""A ready-made fallback: the picture straight from an images API in OpenAI's shape.

    from cacheserver.client.openai import openai_fallback

    client = Client(address, fallback=openai_fallback(api_key=os.environ["OPENAI_API_KEY"], model="gpt-image-2"))

It is a module of its own because it needs httpx, and the client itself does not.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Final

import httpx

from cacheserver.client.fallback import AsyncFallback, Fallback
from cacheserver.client.values import ImageSpec

OPENAI_URL: Final = "https://api.openai.com/v1"

_MAX_ANSWER_BYTES: Final = 96 * 1024 * 1024
"""A picture of 64 MiB in base64, and room for the rest."""

_PARAMETERS: Final = ("size", "quality", "background", "output_format", "output_compression", "moderation", "seed")


def openai_fallback(*, api_key: str, model: str, base_url: str = OPENAI_URL, timeout_s: float = 300.0) -> Fallback:
    """A fallback for `Client`.

    Args:
        api_key: The key to send.
        model: What the API calls the model; it is asked for whatever model a spec names.
        base_url: Where the API is, with its version.
        timeout_s: Seconds without a byte after which a picture has failed.

    What it makes raises httpx.HTTPError where the API cannot be reached or refuses, and ValueError where its answer
    holds no picture.
    """

    def make(spec: ImageSpec) -> bytes:
        with (
            httpx.Client(timeout=timeout_s) as client,
            client.stream("POST", _url(base_url), headers=_headers(api_key), json=_body(spec, model)) as response,
        ):
            response.raise_for_status()
            answer = bytearray()
            for part in response.iter_bytes():
                _take(answer, part)
        return _picture(answer)

    return make


def async_openai_fallback(
    *, api_key: str, model: str, base_url: str = OPENAI_URL, timeout_s: float = 300.0
) -> AsyncFallback:
    """The same for `AsyncClient`."""

    async def make(spec: ImageSpec) -> bytes:
        async with (
            httpx.AsyncClient(timeout=timeout_s) as client,
            client.stream("POST", _url(base_url), headers=_headers(api_key), json=_body(spec, model)) as response,
        ):
            response.raise_for_status()
            answer = bytearray()
            async for part in response.aiter_bytes():
                _take(answer, part)
        return _picture(answer)

    return make


def _url(base_url: str) -> str:
    return f"{base_url.rstrip('/')}/images/generations"


def _headers(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"}


def _body(spec: ImageSpec, model: str) -> dict[str, Any]:
    stated = {name: value for name in _PARAMETERS if (value := getattr(spec, name)) is not None}
    return {**(spec.extra or {}), **stated, "prompt": spec.prompt, "model": model, "n": 1}


def _take(answer: bytearray, part: bytes) -> None:
    answer += part
    if len(answer) > _MAX_ANSWER_BYTES:
        raise ValueError(f"the images API answered with more than {_MAX_ANSWER_BYTES} bytes")


def _picture(answer: bytearray) -> bytes:
    try:
        return base64.b64decode(json.loads(answer)["data"][0]["b64_json"], validate=True)
    except (ValueError, LookupError, TypeError, binascii.Error):
        raise ValueError("the images API answered without a picture in data[0].b64_json") from None
