"""Calls for one picture by what they say beside their prompt: of their like, the prompt alone is to be read."""

from __future__ import annotations

from typing import NamedTuple

from cacheserver.calls.again import Template
from cacheserver.identity import validate_prompt
from cacheserver.model import Caller
from cacheserver.rpc.split import prompted

_MOST_TEMPLATES = 1_000
_MOST_BYTES = 512
"""Who says more is read every time. So a template takes some 3 kB, and 14 at the most."""


class TemplateCall(NamedTuple):
    """A call of a known template: its valid prompt, and up to how many bytes a picture goes out inline."""

    template: Template
    max_inline_bytes: int
    prompt: str


class Templates:
    """The templates that are known, by their bytes and their caller; at most 1,000, and the oldest goes first."""

    def __init__(self) -> None:
        self._templates: dict[tuple[tuple[bytes, bytes], str], tuple[Template, int]] = {}

    def find(self, raw: bytes, caller: Caller) -> TemplateCall | None:
        """A call with this request, if its template is known and nothing is wrong with it."""
        request = prompted(raw) if self._templates else None
        known = None if request is None else self._templates.get((request.others, caller.name))
        if request is None or known is None or known[0].caller is not caller or validate_prompt(request.prompt):
            return None
        return TemplateCall(*known, request.prompt)

    def keep(self, raw: bytes, template: Template, max_inline_bytes: int) -> None:
        """Know the template of the call that this is the request of."""
        request = prompted(raw)
        if request is None or sum(map(len, request.others)) > _MOST_BYTES:
            return
        name = request.others, template.caller.name
        if name not in self._templates and len(self._templates) >= _MOST_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        self._templates[name] = template, max_inline_bytes
