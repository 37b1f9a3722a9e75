"""GetImage requests taken apart unread: what says which picture is wanted and how, and what does not."""

from __future__ import annotations

import re
from typing import TypeAlias

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
    parts = _parts(raw)
    return None if parts is None else b"".join([raw[start:end] for _, start, _, end in parts[0]])


Others: TypeAlias = tuple[bytes, bytes]
"""The other fields of a request by its prompt as bytes, its own and its spec's, but for what never lasts.

Requests with equal others ask for the same in all but the prompt.
"""


def prompted(raw: bytes) -> tuple[str, Others, str | None] | None:
    """A request as its prompt, the rest, and its request_id; this is None if there are tags, too.

    None if it has not one prompt alone, or what never lasts is not fit.
    """
    # On the way of every hit whose prompt is read: a function for each field would take as long as all of it.
    parts = _parts(raw)
    if parts is None:
        return None
    lasting, request_id = parts
    spec, others = None, []
    for field in lasting:
        _, start, value, end = field
        if raw[start] == _SPEC and spec is None:
            spec = field
        elif raw[start] in _WHAT:
            return None
        else:
            others.append(raw[start:end])
    prompt = None if spec is None else _only(_PROMPT, raw, spec)
    if spec is None or prompt is None:
        return None
    _, start, value, end = prompt
    try:
        text = raw[value:end].decode()
    except UnicodeDecodeError:
        return None
    return text, (b"".join(others), raw[spec[2] : start] + raw[end : spec[3]]), request_id


def _only(tag: int, raw: bytes, message: Field) -> Field | None:
    """The field of a submessage with this tag; None if it has none, or several."""
    found = None
    for field in wire.fields(raw, message[2], message[3]) or ():
        if raw[field[1]] == tag:
            if found is not None:
                return None
            found = field
    return found


def _parts(raw: bytes) -> tuple[list[Field], str | None] | None:
    """The fields that last, and the request_id, None if there are tags; None if these are not fit."""
    fields = wire.fields(raw)
    if fields is None:
        return None
    lasting, tags, request_id = [], 0, ""
    for field in fields:
        _, start, value, end = field
        if raw[start] == _REQUEST_ID:
            if not _FIT_ID.fullmatch(raw, value, end):
                return None
            request_id = raw[value:end].decode("ascii")
        elif raw[start] == _TAG:
            tags += 1
            if tags > MAX_TAGS or not _FIT_TAG.fullmatch(raw, value, end):
                return None
        else:
            lasting.append(field)
    return lasting, None if tags else request_id
