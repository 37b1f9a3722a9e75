"""The typo rule: a word that is misspelt beyond doubt reads as the word it should be.

A word of at least six Latin letters that the dictionary has not, one letter away from one that it has: added, left out,
another or swapped with its neighbour. Only inside the word, for at its ends letters are endings (cats, cat), and only
where one word can be meant and one word of the prompt is misspelt. Names are not in the dictionary either: whoever is
named after "by", and whatever stands alone or beside another unknown word, is left alone. Others are the risk of it, so
namespaces have to ask for it. The dictionary is pyspellchecker's, of the extra [typos].
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from cacheserver.errors import ConfigError
from cacheserver.identity.canonical import canonical

if TYPE_CHECKING:
    from spellchecker import SpellChecker

_LEAST_LETTERS = 6
_LONG_WORD = re.compile(rf"[a-z]{{{_LEAST_LETTERS},24}}")
_NAMING = frozenset({"by", "style", "like"})
_AS_WRITTEN = re.compile(r"[\"'<]|--|://")
"""Where a form has any of these, some of it is to be drawn or a name; nothing of it is corrected then."""


def load_dictionary() -> None:
    """Read the dictionary, which takes a tenth of a second.

    Raises:
        ConfigError: the extra [typos] is not installed.
    """
    _dictionary()


def corrected(form: str) -> str:
    """A canonical form with its one misspelt word corrected; the form itself where there is none, or more than one."""
    if _AS_WRITTEN.search(form):
        return form
    segments = [segment.split(" ") for segment in form.split(", ")]
    wrong = [(words, at) for words in segments for at in _misspelt(words)]
    if len({words[at] for words, at in wrong}) != 1:
        return form
    for words, at in wrong:
        words[at] = _meant(words[at])
    return canonical(", ".join(map(" ".join, segments)))


def _misspelt(words: list[str]) -> list[int]:
    """Where a segment's words are misspelt beyond doubt."""
    if not _NAMING.isdisjoint(words):
        return []
    return [
        at
        for at, word in enumerate(words)
        if _meant(word) and _is_known([*words[max(0, at - 1) : at], *words[at + 1 : at + 2]])
    ]


def _is_known(words: list[str]) -> bool:
    dictionary = _dictionary()
    return bool(words) and all(word in dictionary for word in words)


@lru_cache(maxsize=10_000)
def _meant(word: str) -> str:
    """The only word that a misspelt one can mean; "" where it is none, or nobody can tell."""
    dictionary = _dictionary()
    if not _LONG_WORD.fullmatch(word) or word in dictionary:
        return ""
    near = dictionary.known(dictionary.edit_distance_1(word))
    # British and American spelling are one word.
    words = {canonical(other) for other in near if len(other) >= _LEAST_LETTERS and _ends_alike(word, other)}
    return words.pop() if len(words) == 1 else ""


def _ends_alike(word: str, other: str) -> bool:
    return (word[0], word[-1]) == (other[0], other[-1])


@cache
def _dictionary() -> SpellChecker:
    try:
        from spellchecker import SpellChecker  # noqa: PLC0415 - of an extra
    except ImportError as error:
        raise ConfigError("corrects_typos needs a dictionary: pip install 'cacheserver[typos]'") from error
    return SpellChecker(language="en", distance=1)
