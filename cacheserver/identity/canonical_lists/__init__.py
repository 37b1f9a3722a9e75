"""The reviewed word lists of the canonical profile, one text file each.

Every line ends in `≠` and the nearest words that must not become the same: a wrong line makes a wrong picture for
everyone, so no line is without its counterexample, and a test tries each of them. A change of any line changes what
prompts share: raise the number in `CANONICAL_VERSION` with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

_BRACES = re.compile(r"\{([^{}]*)\}")


class Line(NamedTuple):
    """One line of a list.

    `written` is what is found in prompts, all ways to write it; `canonical` what each of them becomes, the same length.
    `kind` is the word before the first of a vocabulary's lines ("head", "with" ...), empty elsewhere. `nearest` are the
    counterexamples, one or as many as there are ways.
    """

    kind: str
    written: tuple[str, ...]
    canonical: tuple[str, ...]
    nearest: tuple[str, ...]


@lru_cache(maxsize=16)
def rewritings(name: str) -> tuple[Line, ...]:
    """The lines `written | written = canonical ≠ nearest` of the list of that name."""
    return tuple(_rewriting(line) for line in _lines(name))


@lru_cache(maxsize=16)
def vocabulary(name: str, kinds: frozenset[str]) -> tuple[Line, ...]:
    """The lines `kind word ≠ nearest` of the list of that name; the kind is one of `kinds` or left out."""
    return tuple(_word(line, kinds) for line in _lines(name))


def _lines(name: str) -> Iterator[str]:
    for line in (files(__name__) / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line


def _rewriting(line: str) -> Line:
    ways, _, rest = line.partition(" = ")
    canonical, _, nearest = rest.partition(" ≠ ")
    written: list[str] = []
    becomes: list[str] = []
    targets = _expanded(canonical)
    for way in ways.split(" | "):
        forms = _expanded(way)
        written += forms
        becomes += targets if len(targets) == len(forms) else targets * len(forms)
    return Line("", tuple(written), tuple(becomes), _expanded(nearest))


def _word(line: str, kinds: frozenset[str]) -> Line:
    word, _, nearest = line.partition(" ≠ ")
    kind, _, rest = word.partition(" ")
    if kind not in kinds or not rest:
        kind, rest = "", word
    return Line(kind, (rest,), (rest,), (nearest,))


def _expanded(text: str) -> tuple[str, ...]:
    """`text` with each member of its braces in their place."""
    braces = _BRACES.search(text)
    if braces is None:
        return (text,)
    return tuple(text[: braces.start()] + member + text[braces.end() :] for member in braces[1].split(","))
