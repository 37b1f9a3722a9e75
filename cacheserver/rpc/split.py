"""GetImage requests taken apart unread: what says which picture is wanted and how, and what does not."""

from __future__ import annotations

import re
from typing import NamedTuple

from cacheserver.calls.bounds import MAX_REQUEST_ID, MAX_TAGS, TAG
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import wire
from cacheserver.rpc.wire import Field

_LENGTH_DELIMITED = 2
_REQUEST_ID = pb.GetImageRequest.REQUEST_ID_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_TAG = pb.GetImageRequest.TAGS_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_SPEC = pb.GetImageRequest.SPEC_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_KEY = pb.GetImageRequest.KEY_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_WHAT = frozenset({_SPEC, _KEY})
_PROMPT = pb.ImageSpec.PROMPT_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_FIT_ID = re.compile(rb"[ -~]{0,%d}" % MAX_REQUEST_ID)
_FIT_TAG = re.compile(TAG.pattern.encode("ascii"))


def lasting(raw: bytes) -> bytes | None:
    """A request without request_id and tags, which say nothing of a stored picture; None if these are not fit."""
    fields = _lasting_fields(raw)
    return None if fields is None else b"".join([raw[field.start : field.end] for field in fields])


class Prompted(NamedTuple):
    """A request by a prompt: this, and its other fields as bytes, of itself and of its spec, but for what never lasts.

    Requests with equal `others` ask for the same in all but the prompt.
    """

    prompt: str
    others: tuple[bytes, bytes]


def prompted(raw: bytes) -> Prompted | None:
    """A request as its prompt and the rest; None if it has not one prompt alone, or what is left out is not fit."""
    fields = _lasting_fields(raw)
    if fields is None:
        return None
    spec, others = None, []
    for field in fields:
        if raw[field.start] == _SPEC and spec is None:
            spec = raw[field.value : field.end]
        elif raw[field.start] in _WHAT:
            return None
        else:
            others.append(raw[field.start : field.end])
    prompt = None if spec is None else _only(spec, _PROMPT)
    if spec is None or prompt is None:
        return None
    try:
        text = spec[prompt.value : prompt.end].decode()
    except UnicodeDecodeError:
        return None
    return Prompted(text, (b"".join(others), spec[: prompt.start] + spec[prompt.end :]))


def _only(message: bytes, tag: int) -> Field | None:
    """The field of a message with this tag; None if it has none, or several."""
    found = [field for field in wire.fields(message) or () if message[field.start] == tag]
    return found[0] if len(found) == 1 else None


def _lasting_fields(raw: bytes) -> list[Field] | None:
    fields = wire.fields(raw)
    if fields is None:
        return None
    lasting, tags = [], 0
    for field in fields:
        if raw[field.start] == _REQUEST_ID:
            if not _FIT_ID.fullmatch(raw, field.value, field.end):
                return None
        elif raw[field.start] == _TAG:
            tags += 1
            if tags > MAX_TAGS or not _FIT_TAG.fullmatch(raw, field.value, field.end):
                return None
        else:
            lasting.append(field)
    return lasting
