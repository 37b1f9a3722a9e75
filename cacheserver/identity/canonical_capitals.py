"""Capitals that make another word: Turkey, US, Red Bull, and what a sign says in capitals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from cacheserver.identity.canonical_lists import vocabulary
from cacheserver.identity.homographs import HOMOGRAPHS

_CASED = re.compile(r"[^\W\d_]+")
_ACRONYMS = frozenset({"US", "IT", "WHO", "AIDS", "CAT", "MAN", "SEAT", "RAM", "PIN"})
"""Acronyms that are other words in lower case."""

_CARRIERS = frozenset(
    str.split(
        "sign signs poster posters logo logos banner billboard signboard placard plaque graffiti tattoo neon "
        "storefront tombstone gravestone sticker badge stamp shirt tshirt mug plate letters lettering newspaper tag"
    )
)
"""What has words on it: those in capitals are to be drawn, then, though nothing announces them."""

_NOT_DRAWN = frozenset(str.split("HD UHD HDR HQ RTX CGI UE VFX DSLR DND RPG SFW NSFW POV VHS AI LED"))
_LONG_WORD, _TITLE_WORDS = 4, 3

_IN_CAPITALS = frozenset(tuple(line.written[0].lower().split()) for line in vocabulary("capitals", frozenset()))
_MAY_TELL = HOMOGRAPHS | frozenset(chain.from_iterable(_IN_CAPITALS))


def lowered(text: str) -> str:
    """`text` in lower case, but for words that their capitals make others."""
    small = text.lower()
    if small == text:
        return text
    words = _CASED.findall(text)
    capitals = [word for word in words if not word[0].islower()]
    if len(capitals) >= _TITLE_WORDS and not any(len(word) >= _LONG_WORD and word[0].islower() for word in words):
        return small  # in capitals altogether, or as a title: no capital says anything
    drawn = {word for word in capitals if len(word) > 1 and word.isupper()} - _NOT_DRAWN
    if drawn and _CARRIERS.isdisjoint(words):
        drawn &= _ACRONYMS
    if not drawn and not any(word.lower() in _MAY_TELL for word in capitals):
        return small
    keeps = iter(
        [
            word in drawn or _is_homograph(words, at) or _is_in_capitals(words, at - 1) or _is_in_capitals(words, at)
            for at, word in enumerate(words)
        ]
    )
    return _CASED.sub(lambda word: word[0] if next(keeps) else word[0].lower(), text)


def _is_homograph(words: Sequence[str], at: int) -> bool:
    """Whether a word is another one in small letters, and nothing but its capital tells which it is."""
    word = words[at]
    return word.istitle() and word.lower() in HOMOGRAPHS and not _is_in_a_name(words, at)


def _is_in_capitals(words: Sequence[str], at: int) -> bool:
    """Whether a name of two words begins there that is something else in small letters: Red Bull, a red bull."""
    pair = words[at : at + 2] if at >= 0 else ()
    return len(pair) > 1 and all(map(str.istitle, pair)) and tuple(map(str.lower, pair)) in _IN_CAPITALS


def _is_in_a_name(words: Sequence[str], at: int) -> bool:
    """Whether the word beside it is in capitals too, not because a sentence begins: then that tells what it is."""
    return any(word.istitle() for word in (*words[max(1, at - 1) : at], *words[at + 1 : at + 2]))
