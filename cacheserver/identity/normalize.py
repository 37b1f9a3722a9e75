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
from cacheserver.identity.characters import UNSPACED, fold_characters
from cacheserver.identity.homographs import HOMOGRAPHS
from cacheserver.identity.verbatim import Part, UnclearQuotesError, split
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

_RESOLUTION = re.compile(r"[0-9]+K|[234]D")
_ARTICLE = re.compile(
    r"(?:\A|(?<=[.!?] ))A "
    r"(?!(?i:and|as|at|by|for|from|in|is|of|on|or|to|with)\b)"  # "A is for apple" has the letter, not the article
    r"(?=[0-9]|[^\W\d_][^\WA-Z])"
)
_FULL_STOPS = ".!。।۔։።။។"  # noqa: RUF001 - the full stops of other scripts look like other things


def normalize_prompt(prompt: str, profile: str, catalog_patterns: tuple[str, ...] = ()) -> str:
    """`prompt` under the profile of that name.

    Raises:
        KeyError: there is no such profile.
        ValueError: a catalog pattern cannot be used.
    """
    level = PROFILES[profile].level
    written = unicodedata.normalize("NFC", prompt)
    if level is MatchLevel.EXACT:
        return written
    patterns = compile_catalog_patterns(catalog_patterns) if level is MatchLevel.CATALOG else ()
    text = written
    for _ in range(_MAX_PASSES):
        text, before = _one_pass(text, patterns), text
        if text == before or (not patterns and before.isascii() and before.isprintable()):
            return text  # plain ASCII settles at once
    return written  # what does not settle shares with nobody


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
    text = fold_characters(text)
    is_plain = text.isascii() and text.isprintable()  # its only white space is the space
    if not is_plain or "  " in text:
        text = _SPACES.sub(" ", text)
    if not is_plain or not text.islower():
        text = _WORD.sub(_fold_case, text)
    return _ARTICLE.sub("a ", text) if "A " in text else text


def _fold_case(match: re.Match[str]) -> str:
    """The word in lower case, unless its capitals may mean something."""
    word = match[0]
    lowered = word.lower()  # not casefold(): it makes one of Maße and Masse
    if lowered == word or len(word) == 1:
        return word
    if not word.isalpha():
        return lowered if _RESOLUTION.fullmatch(word) else word
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
    return unicodedata.normalize("NFC", joined)


def _without_full_stop(text: str) -> str:
    """`text` without the punctuation it ends with.

    An exclamation mark stays after a number, where it may be a factorial, and after capitals, which are drawn.
    """
    kept = text.rstrip(_FULL_STOPS + " ")
    is_drawn = kept[-1:].isupper() or kept[-1:].isdigit()
    return text.rstrip() if is_drawn and "!" in text[len(kept) :] else kept
