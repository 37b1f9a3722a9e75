"""How each level does on pairs of prompts that a person has judged: what it finds, and what it would serve wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cacheserver.errors import UnreadableFileError
from cacheserver.identity import normalize_prompt, same_picture
from cacheserver.similarity.guards import differences

Level = Callable[[str, str], bool]
"""Whether a level takes two prompts for the same picture."""


def _standard(a: str, b: str) -> bool:
    return normalize_prompt(a, "standard") == normalize_prompt(b, "standard")


def _with_quality_words(a: str, b: str) -> bool:
    return same_picture(a, b, ignore_quality_words=False)


def _to_verify(a: str, b: str) -> bool:
    return not differences(a, b)


LEVELS: Mapping[str, Level] = {
    "exact": lambda a, b: normalize_prompt(a, "exact") == normalize_prompt(b, "exact"),
    "standard": _standard,
    "canonical, quality words count": _with_quality_words,
    "canonical": same_picture,
    "semantic, unverified": _to_verify,
}
"""The levels by name, tightest first. What the last one lets pass, a verifier is asked about: it serves none of it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two prompts, and whether they ask for the same picture. `kind` is what sort of pair it is."""

    a: str
    b: str
    same: bool
    kind: str = ""


@dataclass(slots=True)
class Tally:
    """Pairs of one kind, and how many of them each level takes for the same picture."""

    kind: str
    same: bool
    pairs: int = 0
    taken: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LEVELS, 0))


def read_pairs(lines: Iterable[str]) -> Iterator[Pair]:
    """The pairs of JSON lines with `a`, `b`, `same` and perhaps `kind`.

    Raises:
        UnreadableFileError: a line is no such object; it says which, and nothing of its prompts.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = Pair(row["a"], row["b"], row["same"], row.get("kind", ""))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UnreadableFileError(f'line {number} is no object with "a", "b" and "same"') from None
        if not (isinstance(pair.a, str) and isinstance(pair.b, str) and isinstance(pair.same, bool)):
            raise UnreadableFileError(f'line {number}: "a" and "b" should be texts, "same" true or false')
        yield Pair(pair.a, pair.b, pair.same, str(pair.kind))


def tallies(pairs: Iterable[Pair], levels: Mapping[str, Level] = LEVELS) -> list[Tally]:
    """A tally for each kind: those of the same picture first, by name."""
    found: dict[tuple[bool, str], Tally] = {}
    for pair in pairs:
        tally = found.setdefault((not pair.same, pair.kind), Tally(pair.kind, pair.same))
        tally.pairs += 1
        for name, takes in levels.items():
            tally.taken[name] += takes(pair.a, pair.b)
    return [found[each] for each in sorted(found)]
