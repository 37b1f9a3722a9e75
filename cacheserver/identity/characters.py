"""Which characters fold into which: widths, ligatures, spaces, what cannot be seen.

NFKC, cut down to the foldings that keep the picture. Superscripts, subscripts, fractions, circled and squared
signs, letter-like symbols and mathematical alphabets (² ½ ① ㎏ ℃ ™) are left alone, and so are compatibility
characters whose decomposition would look different. The table names its ranges, all of them closed to new
characters, so that it is the same under every version of Python and Unicode.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from cacheserver.identity.verbatim import STRAIGHT_QUOTES

_FOLDING_RANGES = (
    (0x00A0, 0x00A0),  # no-break space
    (0x00B5, 0x00B5),  # micro sign
    (0x0132, 0x0133),  # Dutch ij
    (0x2000, 0x200A),  # spaces of all widths
    (0x2025, 0x2026),  # ellipses
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x2F00, 0x2FD5),  # radicals that look like the ideograph
    (0x3000, 0x3000),  # ideographic space
    (0xFB00, 0xFB04),  # Latin ligatures; not the long s
    (0xFB06, 0xFB06),
    (0xFB13, 0xFB17),  # Armenian ligatures
    (0xFB50, 0xFDC7),  # Arabic letter forms; not the words of U+FDF0..
    (0xFE10, 0xFE19),  # vertical forms
    (0xFE30, 0xFE48),
    (0xFE50, 0xFE6B),  # small forms
    (0xFE80, 0xFEFC),
    (0xFF01, 0xFF9F),  # full-width Latin, half-width katakana; not half-width Hangul, whose parts would join
    (0xFFE0, 0xFFEE),
)

_INVISIBLE = (
    *range(0x09),  # control characters that are no white space
    *range(0x0E, 0x1C),
    *range(0x7F, 0x85),
    *range(0x86, 0xA0),
    0x00AD,  # soft hyphen
    0x061C,  # direction marks and embeddings; overrides change what is read, so they stay
    0x200B,  # zero-width space
    0x200E,
    0x200F,
    *range(0x202A, 0x202D),
    *range(0x2060, 0x2065),  # word joiner, invisible operators
    *range(0x2066, 0x206A),
    0xFEFF,  # byte order mark
)

_STRANDED_JOINERS = re.compile("(?<![^\x00-\x7f])[\u200c\u200d]+")
"""Joiners that join nothing. Between other characters they shape emoji and Indic and Persian words."""

UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts that set no spaces between words or join endings to foreign ones, as the inside of a [] pattern."""

_IS_UNSPACED = re.compile(f"[{UNSPACED}]")


def fold_characters(text: str) -> str:
    """`text` in NFC with every character folded that folds."""
    if is_plain(text):
        return text
    folded = _FOLDABLE.sub(_fold, text)
    if "\u200c" in folded or "\u200d" in folded:
        folded = _STRANDED_JOINERS.sub("", folded)
    return unicodedata.normalize("NFC", folded)


def is_plain(text: str) -> bool:
    """Whether `text` is ASCII without control characters: nothing folds, and the only white space is the space."""
    return text.isascii() and text.isprintable()


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to one of the scripts of UNSPACED: Chinese, Japanese, Korean, Thai and their like."""
    return bool(_IS_UNSPACED.match(character))


def _fold(match: re.Match[str]) -> str:
    return _FOLDS[match[0]]


def _folds() -> Iterator[tuple[str, str]]:
    for first, last in _FOLDING_RANGES:
        for character in map(chr, range(first, last + 1)):
            folded = unicodedata.normalize("NFKC", character)
            # Spacing accents decompose into a space and a combining mark, which is another sign.
            if folded != character and (folded == " " or not folded.startswith(" ")):
                yield character, folded
    yield "\u2010", "-"  # hyphen
    yield "\u2011", "-"  # no-break hyphen
    yield from STRAIGHT_QUOTES.items()
    for invisible in _INVISIBLE:
        yield chr(invisible), ""


_FOLDS = dict(_folds())
_FOLDABLE = re.compile(f"[{''.join(map(re.escape, _FOLDS))}]")
