"""What an OpenAI-shaped provider answers a generation with, as far as its shape can be believed."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cacheserver.errors import UpstreamBadImageError
from cacheserver.model import JsonValue


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its pictures, with the provider's own count of tokens and what it says of all of them."""

    items: Sequence[Mapping[str, JsonValue]]
    usage: Mapping[str, JsonValue] | None
    facts: Mapping[str, JsonValue]


def read_reply(body: bytes) -> Reply:
    """The JSON of an answer. Raises UpstreamBadImageError."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise UpstreamBadImageError("the upstream's answer is not JSON") from None
    data = document.get("data") if isinstance(document, dict) else None
    items = [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    if not items:
        raise UpstreamBadImageError("the upstream's answer has no pictures in it")
    return Reply(items, _usage_of(document), document)


def reply_of_event(data: Mapping[str, JsonValue]) -> Reply:
    """What the event says that completes a stream: it has one picture among its facts."""
    return Reply([data], _usage_of(data), data)


def _usage_of(document: Mapping[str, JsonValue]) -> Mapping[str, JsonValue] | None:
    usage = document.get("usage")
    return usage if isinstance(usage, dict) else None


def from_base64(encoded: str) -> bytes:
    """The bytes of an image in base64. Raises UpstreamBadImageError."""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise UpstreamBadImageError("the upstream's base64 is damaged") from None
