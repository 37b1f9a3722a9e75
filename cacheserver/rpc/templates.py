"""Calls for one picture by what they say beside their prompt: of their like, the prompt alone is to be read."""

from __future__ import annotations

from cacheserver.calls.again import Template
from cacheserver.identity import validate_prompt
from cacheserver.model import Caller
from cacheserver.rpc.split import Others, prompted

_MOST_TEMPLATES = 1_000
_MOST_BYTES = 512
"""Who says more is read every time. So a template takes some 3 kB, and 14 at the most."""


_Name = tuple[Others, str]


class Templates:
    """The templates that are known, by their bytes and their caller; at most 1,000, and the oldest goes first."""

    def __init__(self) -> None:
        self._templates: dict[_Name, tuple[Template, int]] = {}

    def find(self, raw: bytes, caller: Caller) -> tuple[Template, int, str, str | None] | None:
        """The template of a call with this request, up to how many bytes it takes a picture inline, and its prompt.

        And its request_id, None if it has tags, too. None if its template is not known, or its prompt is not fit.
        """
        request = prompted(raw) if self._templates else None
        if request is None:
            return None
        prompt, others, request_id = request
        known = self._templates.get((others, caller.name))
        if known is None or known[0].caller is not caller or validate_prompt(prompt):
            return None
        return *known, prompt, request_id

    def unknown(self, raw: bytes, caller: Caller) -> _Name | None:
        """What the template of a call with this request is to be kept by; None if it is known, or never will be."""
        request = prompted(raw)
        if request is None or sum(map(len, request[1])) > _MOST_BYTES:
            return None
        name = request[1], caller.name
        known = self._templates.get(name)
        return name if known is None or known[0].caller is not caller else None

    def keep(self, name: _Name, template: Template, max_inline_bytes: int) -> None:
        """Know a template by what `unknown` said."""
        if name not in self._templates and len(self._templates) >= _MOST_TEMPLATES:
            del self._templates[next(iter(self._templates))]
        self._templates[name] = template, max_inline_bytes
