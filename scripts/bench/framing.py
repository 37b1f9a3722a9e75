"""gRPC messages as they lie on the wire: each has a prefix of five bytes."""

from __future__ import annotations

from collections.abc import Iterator

_PREFIX_BYTES = 5
"""Whether it is compressed, and its length."""


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, its length, itself."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def messages_of(answer: bytes) -> Iterator[bytes]:
    """The messages of an answer as it comes over the wire."""
    at = 0
    while at < len(answer):
        start = at + _PREFIX_BYTES
        at = start + int.from_bytes(answer[at + 1 : start], "big")
        yield answer[start:at]
