"""What `cacheserver warm --from-history` makes of recorded prompts: rows, as its other inputs have them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from cacheserver.client import ImageSpec, PromptKind, RecordedPrompt

KINDS = (
    PromptKind.MISSED,
    PromptKind.TURNED_AWAY,
    PromptKind.EXPIRING,
    PromptKind.REROLLED,
    PromptKind.DEGRADED,
)
"""What a warm-up can better; what was generated is cached by now."""

_MOST_PICTURES = 10


def row_lines(prompts: Iterable[RecordedPrompt]) -> Iterator[str]:
    """A line of JSON for each prompt, as it was asked for. What expires is made anew, of what is re-rolled one more."""
    for prompt in prompts:
        yield json.dumps(_row(prompt)) + "\n"


def _row(prompt: RecordedPrompt) -> dict[str, Any]:
    said = {each.name: getattr(prompt.spec, each.name) for each in fields(ImageSpec)}
    row: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    if "extra" in row:
        row["extra"] = dict(row["extra"])
    row |= {"namespace": prompt.namespace, "n": prompt.n}
    if prompt.kind is PromptKind.REROLLED:
        row["n"] = min(prompt.n + 1, _MOST_PICTURES)
    if prompt.kind is PromptKind.EXPIRING:
        row["refresh"] = True
    return row
