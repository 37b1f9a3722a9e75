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
    fields = _lasting_fields(raw)
    return None if fields is None else b"".join([raw[start:end] for _, start, _, end in fields])


Others: TypeAlias = tuple[bytes, bytes]
"""The other fields of a request by its prompt as bytes, its own and its spec's, but for what never lasts.

Requests with equal others ask for the same in all but the prompt.
"""


def prompted(raw: bytes) -> tuple[str, Others, bool] | None:
    """A request as its prompt and the rest, and whether that is all of it: it has neither request_id nor tags.

    None if it has not one prompt alone, or what is left out is not fit.
    """
    # On the way of every hit whose prompt is read: a function for each field would take as long as all of it.
    spec, others = None, []
    for field in _lasting_fields(raw) or ():
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
    of_request = b"".join(others)
    is_all = len(of_request) + spec[3] - spec[1] == len(raw)
    return text, (of_request, raw[spec[2] : start] + raw[end : spec[3]]), is_all


def _only(tag: int, raw: bytes, message: Field) -> Field | None:
    """The field of a submessage with this tag; None if it has none, or several."""
    found = None
    for field in wire.fields(raw, message[2], message[3]) or ():
        if raw[field[1]] == tag:
            if found is not None:
                return None
            found = field
    return found


def _lasting_fields(raw: bytes) -> list[Field] | None:
    fields = wire.fields(raw)
    if fields is None:
        return None
    lasting, tags = [], 0
    for field in fields:
        _, start, value, end = field
        if raw[start] == _REQUEST_ID:
            if not _FIT_ID.fullmatch(raw, value, end):
                return None
        elif raw[start] == _TAG:
            tags += 1
            if tags > MAX_TAGS or not _FIT_TAG.fullmatch(raw, value, end):
                return None
        else:
            lasting.append(field)
    return lasting
