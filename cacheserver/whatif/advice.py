"""Prompts that nearly share a picture: what another template, or the profile catalog, would save.

Prompts are near one another if they are the same once one word of each is left out. Each prompt belongs to at most one
group, the largest of those it could be in. What a group would save is all of its pictures but one: only a reader can
tell whether the word matters to the picture, so nothing here changes anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from cacheserver.identity import normalize_prompt

SLOT = "{…}"

_MIN_WORDS = 4
_MAX_WORDS = 200
_MIN_PROMPTS = 3
_MOST_GROUPS = 10
_MOST_LOOKED_AT = 200
_MOST_TRIED = 20
_EXAMPLES = 5
_MOSTLY = 0.8
_PUNCTUATION = ",;:.!?()[]\"'"
_ANY_NUMBER = r"\w*\d[\w-]*"
_LABEL = re.compile(r"[a-z#]{1,16}")


class NearPrompt(NamedTuple):
    """A distinct prompt: normalized, all that its key has beside it, how often it was asked for, what one costs."""

    text: str
    rest: str
    asks: int
    cost_microusd: int


@dataclass(frozen=True, slots=True)
class NearMisses:
    """Prompts that differ in one word.

    `groups` are how many such groups one `pattern` serves, of which the template and the values are the dearest's.
    `prompts` and `asks` are how many there are and how often they were asked for, `saved_microusd` what it would save
    if they were one. `kind` is "number" where nearly all of the words hold a digit, else "word". `pattern` is one for
    the namespace's `catalog_patterns` and `merged` the share of a group's prompts, 0 to 1, that it makes one;
    empty and 0 where none was found.
    """

    template: str
    values: tuple[str, ...]
    kind: str
    prompts: int
    asks: int
    saved_microusd: int
    groups: int = 1
    pattern: str = ""
    merged: float = 0.0


class _Member(NamedTuple):
    prompt: NearPrompt
    slot: int
    """The word left out; -1 for none."""


def near_misses(prompts: Sequence[NearPrompt], *, rate: float, patterns: tuple[str, ...] = ()) -> list[NearMisses]:
    """The groups worth most, dearest first; `prompts` are the share `rate` of all, drawn by chance.

    `patterns` are the catalog patterns there are already.
    """
    signatures = [[*_signatures(prompt)] for prompt in prompts]
    shared: Counter[int] = Counter()
    for each in signatures:
        shared.update(set(each))
    groups: dict[int, list[_Member]] = {}
    for prompt, each in zip(prompts, signatures, strict=True):
        best = max(each, key=shared.__getitem__, default=None)
        if best is not None and shared[best] >= _MIN_PROMPTS:
            groups.setdefault(best, []).append(_Member(prompt, each.index(best) - 1))
    worth = [(_saved(members), members) for members in groups.values() if len(members) >= _MIN_PROMPTS]
    worth.sort(key=lambda each: each[0], reverse=True)
    found = [_described(members, saved, rate, patterns) for saved, members in worth[:_MOST_LOOKED_AT] if saved > 0]
    return _by_pattern(found)[:_MOST_GROUPS]


def _by_pattern(found: Sequence[NearMisses]) -> list[NearMisses]:
    """The groups, those with the same pattern as one: what the pattern does to all of them. Dearest first."""
    merged: dict[str, NearMisses] = {}
    for each in found:
        name = each.pattern or each.template
        first = merged.get(name)
        merged[name] = each if first is None else _both(first, each)
    return sorted(merged.values(), key=lambda each: each.saved_microusd, reverse=True)


def _both(first: NearMisses, other: NearMisses) -> NearMisses:
    prompts = first.prompts + other.prompts
    return replace(
        first,
        groups=first.groups + other.groups,
        prompts=prompts,
        asks=first.asks + other.asks,
        saved_microusd=first.saved_microusd + other.saved_microusd,
        merged=(first.merged * first.prompts + other.merged * other.prompts) / max(1, prompts),
    )


def _signatures(prompt: NearPrompt) -> Iterator[int]:
    """A hash of the prompt, and one of it without its first word, its second, and so on; none of a very short one."""
    text, rest = prompt.text, prompt.rest
    words = text.split(" ")
    if not _MIN_WORDS <= len(words) <= _MAX_WORDS:
        return
    yield hash((text, rest))
    start = 0
    for word in words[:-1]:
        behind = start + len(word) + 1
        yield hash((text[:start] + text[behind:], rest))
        start = behind
    yield hash((text[: start - 1], rest))


def _saved(members: Sequence[_Member]) -> int:
    costs = [member.prompt.cost_microusd for member in members]
    return sum(costs) - max(costs)


def _described(members: Sequence[_Member], saved: int, rate: float, patterns: tuple[str, ...]) -> NearMisses:
    values = Counter(_value(member) for member in members if member.slot >= 0)
    with_digit = sum(count for value, count in values.items() if any(map(str.isdigit, value)))
    is_number = with_digit >= _MOSTLY * values.total() > 0
    pattern, merged = _best_pattern(members, patterns) if is_number else ("", 0.0)
    return NearMisses(
        template=_template(members),
        values=tuple(value for value, _ in values.most_common(_EXAMPLES)),
        kind="number" if is_number else "word",
        prompts=round(len(members) / rate),
        asks=round(sum(member.prompt.asks for member in members) / rate),
        saved_microusd=round(saved / rate),
        pattern=pattern,
        merged=merged,
    )


def _words(member: _Member) -> list[str]:
    return member.prompt.text.split(" ")


def _value(member: _Member) -> str:
    word = _words(member)[member.slot]
    return word.strip(_PUNCTUATION) or word


def _template(members: Sequence[_Member]) -> str:
    member = next((each for each in members if each.slot >= 0), members[0])
    words = _words(member)
    if member.slot >= 0:
        words[member.slot] = words[member.slot].replace(_value(member), SLOT, 1)
    return " ".join(words)


def _best_pattern(members: Sequence[_Member], patterns: tuple[str, ...]) -> tuple[str, float]:
    """The pattern that makes most of the prompts one, by the service's own code, and that share of them."""
    tried = [member.prompt.text for member in members[:_MOST_TRIED]]
    best, share = "", 0.0
    for pattern in _candidates(members):
        texts = Counter(normalize_prompt(text, "catalog", (*patterns, pattern)) for text in tried)
        merged = texts.most_common(1)[0][1] / len(tried)
        if merged > max(share, 1 / len(tried)):
            best, share = pattern, merged
        if share == 1:
            break
    return best, share


def _candidates(members: Sequence[_Member]) -> Iterator[str]:
    """Patterns to try, the narrowest first: the word before and the words' own shape, that shape alone, any number."""
    shapes = {_shape(_value(member)) for member in members if member.slot >= 0}
    own = [*shapes] if len(shapes) == 1 else []
    labels = {_words(member)[member.slot - 1] for member in members if member.slot > 0}
    label = next(iter(labels)) if len(labels) == 1 else ""
    for shape in (*own, _ANY_NUMBER):
        if _LABEL.fullmatch(label):
            yield f"{re.escape(label)} {shape}"
        yield shape


def _shape(value: str) -> str:
    """A pattern for words like this one: digits for digits, the rest as it is."""
    parts = ((is_digit, "".join(run)) for is_digit, run in groupby(value, str.isdigit))
    return "".join(r"\d+" if is_digit else re.escape(run) for is_digit, run in parts)
