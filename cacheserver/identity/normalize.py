"""Normalization profiles: rewriting a prompt so that prompts asking for the same picture become one.

A wrong picture is worse than a miss, so whatever may carry meaning stays: order, numbers, quoted text, words
in capitals. Only identities are made of normalized prompts; upstreams get the prompt as written.

- `exact`: Unicode NFC and nothing else.
- `standard`: characters folded that differ only in width or style (characters.py), white space to single
  spaces, terminal punctuation dropped, case folded but in words written in capitals, words with digits, single
  letters and homographs (homographs.py). Quoted and announced text, tags, web addresses and parameters stay as
  written (verbatim.py). A prompt whose quote marks are unclear stays as written altogether.
- `catalog`: standard, and what the namespace's patterns name is dropped (catalog.py).

Every profile is idempotent and, an operator's patterns aside, takes time linear in the prompt's length. Any
change to what a profile makes of a prompt needs a new version: the golden keys in the tests tell.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from cacheserver.identity.catalog import compile_catalog_patterns, drop
from cacheserver.identity.characters import UNSPACED, fold_characters, is_plain
from cacheserver.identity.homographs import HOMOGRAPHS
from cacheserver.identity.verbatim import Part, UnclearQuotesError, is_without, split
from cacheserver.model import MatchLevel


class Profile(NamedTuple):
    """A way to normalize. `name` is what settings say, `versioned` what identities begin with."""

    name: str
    versioned: str
    level: MatchLevel


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "exact": Profile("exact", "exact/1", MatchLevel.EXACT),
        "standard": Profile("standard", "standard/1", MatchLevel.STANDARD),
        "catalog": Profile("catalog", "catalog/1", MatchLevel.CATALOG),
    }
)
"""The profiles by name, tightest first."""

_MAX_PASSES = 8
"""Nearly every prompt settles in one pass; a second one shows that it has."""

_SPACES = re.compile(r"\s+")
_LETTER_OR_DIGIT = rf"[^\W_{UNSPACED}]"
_WORD = re.compile(rf"(?<!{_LETTER_OR_DIGIT})(?<!_)(?=[a-z0-9]*[^\Wa-z0-9_]){_LETTER_OR_DIGIT}++(?!_)")
"""A word that may have capitals; not part of a name_with_underscores, which is a file or a trained style."""

_CAPITAL = re.compile(r"[A-Z][A-Za-z0-9_]*")
"""The rest of a word from its first capital on, in ASCII."""

_RESOLUTION = re.compile(r"[0-9]+K|[234]D")
_ARTICLE = re.compile(
    r"(?:\A|(?<=[.!?] ))A "
    r"(?!(?i:and|as|at|by|for|from|in|is|of|on|or|to|with)\b)"  # "A is for apple" has the letter, not the article
    r"(?=[0-9]|[^\W\d_][^\WA-Z])"
)
_ASCII_ARTICLES = (". A ", "! A ", "? A ")
"""Whatever _ARTICLE finds in ASCII behind the beginning holds one of these."""

_FULL_STOPS = ".!。।۔։።။។"  # noqa: RUF001 - the full stops of other scripts look like other things

_FULL_STOPS_AND_SPACE = f"{_FULL_STOPS} "


def normalize_prompt(prompt: str, profile: str, catalog_patterns: tuple[str, ...] = ()) -> str:
    """`prompt` under the profile of that name.

    Raises:
        KeyError: there is no such profile.
        ValueError: a catalog pattern cannot be used.
    """
    level = PROFILES[profile].level
    written = prompt if prompt.isascii() else unicodedata.normalize("NFC", prompt)
    if level is MatchLevel.EXACT:
        return written
    patterns = compile_catalog_patterns(catalog_patterns) if level is MatchLevel.CATALOG else ()
    if not patterns and is_plain(written):
        return _plain_pass(written)
    text = written
    for _ in range(_MAX_PASSES):
        text, before = _one_pass(text, patterns), text
        if text == before or (not patterns and is_plain(before)):
            return text  # plain ASCII settles at once
    return written  # what does not settle shares with nobody


def _plain_pass(text: str) -> str:
    """What `_one_pass` makes of plain ASCII without patterns, for most texts in a fraction of the time."""
    folded = text.strip()
    if not is_without(folded):
        return _one_pass(text, ())
    return _without_full_stop(_fold_plain(folded)) or text


def _one_pass(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    try:
        parts = split(text.strip())
    except UnclearQuotesError:
        return text
    parts = [part if part.verbatim else Part(_fold(part.text), verbatim=False) for part in parts]
    if patterns:
        parts = _without_articles(parts, patterns)
    return _joined(parts) or text


def _fold(text: str) -> str:
    if is_plain(text) or is_plain(text := fold_characters(text)):
        return _fold_plain(text)
    text = _WORD.sub(lambda word: _fold_case(word[0]), _SPACES.sub(" ", text))
    return _ARTICLE.sub("a ", text) if "A " in text else text


def _fold_plain(text: str) -> str:
    """What `_fold` makes of plain ASCII, in a fraction of the time."""
    if "  " in text:
        text = _SPACES.sub(" ", text)
    lowered = text.lower()
    if text == lowered:
        return text
    is_one = text[1:] == lowered[1:]  # most prompts begin with the only one they have
    text = _CAPITAL.sub(_fold_from_capital, text, count=1 if is_one else 0)
    if text.startswith("A ") and _ARTICLE.match(text):
        text = f"a {text[2:]}"
    has_articles = " A " in text and any(map(text.__contains__, _ASCII_ARTICLES))
    return _ARTICLE.sub("a ", text) if has_articles else text


def _fold_from_capital(match: re.Match[str]) -> str:
    """What is matched, with the case that `_fold_case` gives it in the whole of its word."""
    text, start = match.string, match.start()
    begin = start
    while begin and (text[begin - 1].isalnum() or text[begin - 1] == "_"):
        begin -= 1
    word = text[begin : match.end()]
    return match[0] if "_" in word else _fold_case(word)[start - begin :]


def _fold_case(word: str) -> str:
    """The word in lower case, unless its capitals may mean something."""
    lowered = word.lower()  # not casefold(): it makes one of Maße and Masse
    if lowered == word or len(word) == 1:
        return word
    if not word.isalpha():
        return lowered if word[-1] in "KD" and _RESOLUTION.fullmatch(word) else word
    if lowered in HOMOGRAPHS or _has_two_capitals_together(word):
        return word
    return lowered


def _has_two_capitals_together(word: str) -> bool:
    return not word.istitle() and any(a.isupper() and b.isupper() for a, b in pairwise(word))


def _without_articles(parts: Sequence[Part], patterns: Sequence[re.Pattern[str]]) -> list[Part]:
    """`parts` without article numbers; unchanged if no word would be left of the prompt's own."""
    texts = ["", *(part.text for part in parts), ""]
    dropped = [
        part if part.verbatim else Part(drop(part.text, patterns, before=before[-1:], after=after[:1]), verbatim=False)
        for before, part, after in zip(texts, parts, texts[2:], strict=False)
    ]
    if any(character.isalpha() for part in dropped if not part.verbatim for character in part.text):
        return dropped
    return list(parts)


def _joined(parts: Sequence[Part]) -> str:
    texts = [part.text for part in parts]
    if parts and not parts[-1].verbatim:
        texts[-1] = _without_full_stop(texts[-1])
    joined = "".join(texts)
    return joined if joined.isascii() else unicodedata.normalize("NFC", joined)


def _without_full_stop(text: str) -> str:
    """`text` without the punctuation it ends with.

    An exclamation mark stays after a number, where it may be a factorial, and after capitals, which are drawn.
    """
    if text[-1:].isalnum():
        return text  # as most do
    kept = text.rstrip(_FULL_STOPS_AND_SPACE)
    is_drawn = kept[-1:].isupper() or kept[-1:].isdigit()
    return text.rstrip() if is_drawn and "!" in text[len(kept) :] else kept
