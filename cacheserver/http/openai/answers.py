"""Pictures as OpenAI's API answers with them: one JSON object, whose images are never held twice."""

from __future__ import annotations

import hashlib
import json
from binascii import b2a_base64
from collections.abc import Iterator, Sequence
from typing import Protocol

from cacheserver.calls.directives import cache_status, slowest
from cacheserver.http.answer import Answer, Chunk
from cacheserver.model import CachedImage, CachePolicy, GeneratedImage, ImageBytes, Served, TierName, Usage

SLICE_BYTES = 192 * 1024
"""So much of a picture is turned into base64 at a time: whole groups of three bytes, so that slices join."""

SMALL_BYTES = 256 * 1024
"""An answer up to this length is sent whole."""

OPENAI_VERSION = "2020-10-01"

_UNRESOLVED = ("", "auto")


class Urls(Protocol):
    """Hands out URLs of pictures."""

    def url(self, entry: CachedImage, *, base_url: str = "") -> tuple[str, float | None]:
        """A URL of this picture that begins with `base_url`, and when it expires (seconds since 1970), if it does."""
        ...


def answer_with_bytes(answer: Sequence[Served], safety_identifier: str, headers: dict[str, str]) -> Answer:
    """The answer with the pictures themselves: whole if it is small, else in slices that are made as they are sent."""
    images = [served.entry.image for served in answer]
    head, tail = _around(answer, safety_identifier)
    middles = [_members(image) for image in images]
    length = len(head) + len(tail) + len(images) - 1 + sum(map(len, middles))
    length += sum(len(_BEFORE) + base64_length(len(image.data)) + len(_AFTER) for image in images)
    pieces = _pieces(images, middles, head, tail)
    return Answer(200, headers, b"".join(pieces) if length <= SMALL_BYTES else pieces, length)


def answer_by_url(
    answer: Sequence[Served], urls: Sequence[str], safety_identifier: str, headers: dict[str, str]
) -> Answer:
    """The answer with URLs in place of the pictures."""
    head, tail = _around(answer, safety_identifier)
    middles = (_members(served.entry.image) for served in answer)
    listed = ",".join(f'{{"url":{json.dumps(url)}{rest}}}' for url, rest in zip(urls, middles, strict=True))
    body = f"{head}{listed}{tail}".encode("ascii")
    return Answer(200, headers, body, len(body))


def answer_headers(answer: Sequence[Served], policy: CachePolicy, now_s: float) -> dict[str, str]:
    """What the headers of an answer say of its pictures: where they came from, how old they are, what they cost."""
    return lasting_headers(answer) | passing_headers(answer, policy, now_s)


def lasting_headers(answer: Sequence[Served]) -> dict[str, str]:
    """Those that are the same for every equal answer."""
    headers = {
        "content-type": "application/json",
        "cache-control": "private",
        "etag": _etag(answer),
        "openai-version": OPENAI_VERSION,
        "x-cacheserver-cost-usd": dollars(sum(served.cost_microusd for served in answer)),
        "x-cacheserver-saved-usd": dollars(sum(served.saved_microusd for served in answer)),
        "x-cacheserver-keys": ", ".join(served.entry.key.name for served in answer),
    }
    if any(served.is_similar for served in answer):
        headers["x-cacheserver-matched"] = max(served.matched for served in answer).name.lower()
    return headers


def passing_headers(answer: Sequence[Served], policy: CachePolicy, now_s: float) -> dict[str, str]:
    """Those that tell of this moment."""
    headers = {"cache-status": cache_status(slowest(answer), policy, now_s)}
    if all(served.tier is not TierName.UPSTREAM for served in answer):
        oldest_s = min(served.entry.create_time_s for served in answer)
        headers["age"] = str(max(0, int(now_s - oldest_s)))
    return headers


def dollars(microusd: int) -> str:
    """An amount of micro-dollars in dollars, exactly."""
    return f"{microusd // 1_000_000}.{microusd % 1_000_000:06d}"


def base64_length(size_bytes: int) -> int:
    """How many characters of base64 so many bytes are."""
    return (size_bytes + 2) // 3 * 4


def base64_slices(data: ImageBytes) -> Iterator[bytes]:
    """A picture in base64, a slice at a time."""
    view = memoryview(data)
    for start in range(0, len(data), SLICE_BYTES):
        yield b2a_base64(view[start : start + SLICE_BYTES], newline=False)


def usage_of(images: Sequence[GeneratedImage]) -> dict[str, object] | None:
    """What the pictures took in tokens when they were made; None where it is not known of all of them."""
    known = [image.usage for image in images if image.usage is not None]
    if len(known) < len(images):
        return None
    return _summed(known)


def resolved(image: GeneratedImage) -> dict[str, str]:
    """What a picture is, as far as it is known: never "auto"."""
    facts = {
        "background": image.background,
        "output_format": image.content_type.removeprefix("image/"),
        "quality": image.quality,
        "size": image.size if image.size not in _UNRESOLVED else f"{image.width}x{image.height}",
    }
    return {name: value for name, value in facts.items() if value not in _UNRESOLVED}


_BEFORE, _AFTER = b'{"b64_json":"', b'"}'


def _around(answer: Sequence[Served], safety_identifier: str) -> tuple[str, str]:
    """The object before and after what is listed as its `data`."""
    images = [served.entry.image for served in answer]
    before: dict[str, object] = {"created": int(max(served.entry.create_time_s for served in answer))}
    before |= resolved(images[0])
    after: dict[str, object] = {}
    if (usage := usage_of(images)) is not None:
        after["usage"] = usage
    if safety_identifier:
        after["safety_identifier"] = safety_identifier
    opened, closed = _compact(before)[:-1], _compact(after)[1:]
    return f'{opened},"data":[', f"],{closed}" if after else "]}"


def _members(image: GeneratedImage) -> str:
    """What is said of a picture behind its content."""
    return f',"revised_prompt":{json.dumps(image.revised_prompt)}' if image.revised_prompt else ""


def _pieces(images: Sequence[GeneratedImage], middles: Sequence[str], head: str, tail: str) -> Iterator[Chunk]:
    text = head.encode("ascii")
    for image, rest in zip(images, middles, strict=True):
        yield text + _BEFORE
        yield from base64_slices(image.data)
        text = f'"{rest}}},'.encode("ascii")
    yield text[:-1] + tail.encode("ascii")


def _etag(answer: Sequence[Served]) -> str:
    """Names the pictures, not the bytes of this very answer: weak (RFC 9110 section 8.8.1)."""
    digests = [served.entry.image.sha256 for served in answer]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return f'W/"{digest}"'


def _summed(usages: Sequence[Usage]) -> dict[str, object]:
    output_tokens = sum(usage.output_tokens for usage in usages)
    return {
        "total_tokens": sum(usage.total_tokens for usage in usages),
        "input_tokens": sum(usage.input_tokens for usage in usages),
        "output_tokens": output_tokens,
        "input_tokens_details": {
            "text_tokens": sum(usage.input_text_tokens for usage in usages),
            "image_tokens": sum(usage.input_image_tokens for usage in usages),
        },
        "output_tokens_details": {"image_tokens": output_tokens, "text_tokens": 0},
    }


def _compact(document: dict[str, object]) -> str:
    return json.dumps(document, separators=(",", ":"))
