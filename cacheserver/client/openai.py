"""A ready-made fallback: the picture straight from an images API in OpenAI's shape.

    from cacheserver.client.openai import openai_fallback

    client = Client(address, fallback=openai_fallback(api_key=os.environ["OPENAI_API_KEY"], model="gpt-image-2"))

It is a module of its own because it needs httpx, and the client itself does not.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
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
        timeout_s: Seconds after which a picture has failed, with or without a byte from the API.

    What it makes raises httpx.HTTPError where the API cannot be reached, refuses or takes too long, and ValueError
    where its answer holds no picture, or the spec wants an edit.
    """

    def make(spec: ImageSpec) -> bytes:
        answer = _Answer(timeout_s)
        with (
            httpx.Client(timeout=timeout_s) as client,
            client.stream("POST", _url(base_url), headers=_headers(api_key), json=_body(spec, model)) as response,
        ):
            response.raise_for_status()
            for part in response.iter_bytes():
                answer.take(part)
        return answer.picture()

    return make


def async_openai_fallback(
    *, api_key: str, model: str, base_url: str = OPENAI_URL, timeout_s: float = 300.0
) -> AsyncFallback:
    """The same for `AsyncClient`."""

    async def make(spec: ImageSpec) -> bytes:
        answer = _Answer(timeout_s)
        async with (
            httpx.AsyncClient(timeout=timeout_s) as client,
            client.stream("POST", _url(base_url), headers=_headers(api_key), json=_body(spec, model)) as response,
        ):
            response.raise_for_status()
            async for part in response.aiter_bytes():
                answer.take(part)
        return answer.picture()

    return make


def _url(base_url: str) -> str:
    return f"{base_url.rstrip('/')}/images/generations"


def _headers(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"}


def _body(spec: ImageSpec, model: str) -> dict[str, Any]:
    if spec.inputs:
        raise ValueError("this fallback makes no edits: the spec has input images")
    stated = {name: value for name in _PARAMETERS if (value := getattr(spec, name)) is not None}
    return {**(spec.extra or {}), **stated, "prompt": spec.prompt, "model": model, "n": 1}


class _Answer:
    """What the API answers, as it comes: bounded in bytes and in time."""

    def __init__(self, timeout_s: float) -> None:
        self._ends_s = time.monotonic() + timeout_s
        self._data = bytearray()

    def take(self, part: bytes) -> None:
        """Add what has come. Raises httpx.ReadTimeout or ValueError where it is too late or too much."""
        if time.monotonic() > self._ends_s:
            raise httpx.ReadTimeout("the images API took too long to answer")
        self._data += part
        if len(self._data) > _MAX_ANSWER_BYTES:
            raise ValueError(f"the images API answered with more than {_MAX_ANSWER_BYTES} bytes")

    def picture(self) -> bytes:
        """The picture of the whole answer. Raises ValueError if there is none."""
        try:
            return base64.b64decode(json.loads(self._data)["data"][0]["b64_json"], validate=True)
        except (ValueError, LookupError, TypeError, binascii.Error):
            raise ValueError("the images API answered without a picture in data[0].b64_json") from None
