"""What the canonical level would merge in a log of prompts: which share of it, and what, for reading."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cacheserver.errors import UnreadableFileError
from cacheserver.identity import canonical_form, normalize_prompt


@dataclass(frozen=True, slots=True)
class Group:
    """Different prompts that have one canonical form, each with how often it was asked, most often first."""

    form: str
    prompts: tuple[tuple[str, int], ...]

    @property
    def asked(self) -> int:
        """How often any of them was asked."""
        return sum(count for _, count in self.prompts)


@dataclass(frozen=True, slots=True)
class Mined:
    """A log of prompts: how many were asked, how many of them had been asked before, and what further ones merge.

    `repeats` had been asked before in the words that the standard profile takes for the same, `merged` in others.
    """

    prompts: int
    repeats: int
    merged: int
    groups: tuple[Group, ...]


def read_prompts(lines: Iterable[str], path: Sequence[str]) -> Iterator[str]:
    """The prompts of a log: of JSON lines what lies under `path`, of any other lines the line itself.

    Raises:
        UnreadableFileError: a line of JSON has no prompt there; it says which, and nothing of it.
    """
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text.startswith("{"):
            if text:
                yield text
            continue
        try:
            value = json.loads(text)
            for name in path:
                value = value[name]
        except (ValueError, KeyError, TypeError, RecursionError):
            value = None
        if not isinstance(value, str):
            raise UnreadableFileError(f"line {number} has no text under {'.'.join(path)}: name it with --field")
        yield value


def mined(prompts: Iterable[str], *, ignore_quality_words: bool = True) -> Mined:
    """What the canonical level would merge of these prompts, the largest groups first."""
    asked = Counter(prompts)
    by_standard: Counter[str] = Counter()
    groups: dict[str, Counter[str]] = {}
    for prompt, count in asked.items():
        by_standard[normalize_prompt(prompt, "standard")] += count
        form = canonical_form(prompt, ignore_quality_words=ignore_quality_words)
        if form is not None:
            groups.setdefault(form, Counter())[prompt] += count
    merging = [
        Group(form, tuple(each.most_common()))
        for form, each in groups.items()
        if len({normalize_prompt(prompt, "standard") for prompt in each}) > 1
    ]
    spellings = (len({normalize_prompt(prompt, "standard") for prompt, _ in group.prompts}) for group in merging)
    total = sum(asked.values())
    return Mined(
        prompts=total,
        repeats=total - len(by_standard),
        merged=sum(spellings) - len(merging),
        groups=tuple(sorted(merging, key=lambda group: (-group.asked, group.form))),
    )
