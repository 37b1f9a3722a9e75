r"""What the catalog profile drops: article numbers, as a namespace's own patterns name them.

The case it is for: a shop with thousands of products and one picture for many of them. Patterns come from
the operator and are trusted; they see prompts of at most 2,000 characters, which holds a clumsy pattern to
milliseconds, but nothing holds nested repeats such as `(a+)+`.

A match goes only where it cannot be a count or a measure:

- it is not part of a longer word or number: `\d+` does not touch "50ml", "AB12" or "1.5";
- it holds no number with what it counts: `\w*\d\w*` does not drop "50ml" or "画2只猫" either;
- if it has no letters, it stands alone between commas, full stops or the ends: `\d+` keeps "3 cats", "2只",
  "iPhone 15", "(cat:1.2)" and "50 %", and drops the number of "white shoe, 48213, studio light".

A number that follows its label is named together with it: `(sku|item|货号) ?\d+`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from cacheserver.identity.characters import UNSPACED, is_unspaced

_MAX_PATTERNS = 32
_MAX_PATTERN_CHARS = 256
_MAX_PROMPT_CHARS = 2_000

_COUNTED = re.compile(rf"(?<![^\W{UNSPACED}])(?<![-.,:/])\d[\d.,]*[\s-]*[^\W\d_]++(?!\d)")
_LETTER = re.compile(r"[^\W\d_]")
_SEPARATORS = frozenset(",;|.!?、。")
_JOINING = frozenset(".,:/")


@lru_cache(maxsize=256)
def compile_catalog_patterns(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """The patterns, compiled once; they match without regard to case.

    Raises:
        ValueError: there are more than 32, or one is no regular expression, longer than 256 characters, or
            matches nothing at all.
    """
    if len(patterns) > _MAX_PATTERNS:
        raise ValueError(f"at most {_MAX_PATTERNS} catalog patterns, not {len(patterns)}")
    return tuple(_compiled(pattern) for pattern in patterns)


def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > _MAX_PATTERN_CHARS:
        raise ValueError(f"a catalog pattern has at most {_MAX_PATTERN_CHARS} characters, not {len(pattern)}")
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"catalog pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.fullmatch(""):
        raise ValueError(f"catalog pattern {pattern!r} matches the empty text; ask for at least one character")
    return compiled


def drop(text: str, patterns: Sequence[re.Pattern[str]], *, before: str, after: str) -> str:
    """`text` without what the patterns name.

    `before` and `after` are the characters on either side of `text` in the prompt, empty at its ends.
    """
    if len(text) > _MAX_PROMPT_CHARS:
        return text
    for pattern in patterns:
        text = pattern.sub(lambda match: "" if _may_go(match, before, after) else match[0], text)
    return text


def _may_go(match: re.Match[str], before: str, after: str) -> bool:
    text, (start, end) = match.string, match.span()
    if start == end or _is_cut(text, start) or _is_cut(text, end) or _COUNTED.search(match[0]):
        return False
    return bool(_LETTER.search(match[0])) or _stands_alone(match, before, after)


def _is_cut(text: str, at: int) -> bool:
    """Whether a word, a decimal, a ratio or a fraction lies across this place."""
    left, right = text[max(at - 2, 0) : at], text[at : at + 2]
    if left[-1:].isdigit() and right[:1] in _JOINING and right[1:].isdigit():
        return True
    if left[:-1].isdigit() and left[-1:] in _JOINING and right[:1].isdigit():
        return True
    ends = left[-1:], right[:1]
    return all(end.isalnum() and not is_unspaced(end) for end in ends)


def _stands_alone(match: re.Match[str], before: str, after: str) -> bool:
    """Whether no word, number or sign stands beside the match; a space between changes nothing."""
    left = (before + match.string[: match.start()]).rstrip()[-1:]
    right = (match.string[match.end() :] + after).lstrip()[:1]
    return all(not beside or beside in _SEPARATORS for beside in (left, right))
