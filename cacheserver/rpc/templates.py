"""Calls for one picture by what they say beside their prompt: of their like, the prompt alone is to be read."""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.message import DecodeError

from cacheserver.calls.again import Template
from cacheserver.identity import validate_prompt
from cacheserver.model import Caller
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc import messages
from cacheserver.rpc.messages import Problems

_MOST_TEMPLATES = 1_000
_MOST_BYTES = 512
"""Who says more is read every time. So a template takes some 3 kB, and 14 at the most."""


class Prompted(NamedTuple):
    """A call of a known template: its valid prompt, and up to how many bytes a picture goes out inline."""

    template: Template
    max_inline_bytes: int
    prompt: str


class Templates:
    """The templates that are known, by their bytes and their caller; at most 1,000, and the oldest goes first."""

    def __init__(self) -> None:
        self._templates: dict[tuple[bytes, str], tuple[Template, int]] = {}

    def find(self, raw: bytes, caller: Caller) -> Prompted | None:
        """A call with this request, if its template is known and nothing is wrong with it."""
        parts = _parts(raw) if self._templates else None
        known = None if parts is None else self._templates.get((parts.others, caller.name))
        if parts is None or known is None or known[0].caller is not caller or validate_prompt(parts.prompt):
            return None
        return Prompted(*known, parts.prompt)

    def keep(self, raw: bytes, template: Template, max_inline_bytes: int) -> None:
        """Know the template of the call that this is the request of."""
        parts = _parts(raw)
        if parts is None or len(parts.others) > _MOST_BYTES:
            return
        name = parts.others, template.caller.name
        if name not in self._templates and len(self._templates) >= _MOST_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        self._templates[name] = template, max_inline_bytes


class _Parts(NamedTuple):
    """A request for a picture by its prompt: the prompt, and all other fields as bytes but for request_id and tags."""

    prompt: str
    others: bytes


def _parts(raw: bytes) -> _Parts | None:
    """A request taken apart; None if it is none by a prompt, or what is left out is not fit."""
    message = pb.GetImageRequest()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        return None
    if not message.HasField("spec"):
        return None
    problems = Problems()
    messages.read_request_id(message.request_id, problems)
    messages.read_tags(message.tags, "tags", problems)
    if not problems.are_none:
        return None
    spec = message.spec
    prompt = spec.prompt
    spec.ClearField("prompt")
    message.ClearField("request_id")
    message.ClearField("tags")
    return _Parts(prompt, message.SerializeToString(deterministic=spec.HasField("extra")))  # it alone has no order
