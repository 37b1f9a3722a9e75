r"""Personal data in prompts: e-mail addresses, phone numbers, payment cards, Chinese resident ID numbers.

Shapes first, checksums where there are any: card numbers pass Luhn's and begin as an issuer's do, resident IDs
(GB 11643-1999) have a province, a birth date and their check digit (ISO 7064, MOD 11-2). Phone numbers have none,
so only shapes that little else has are taken: international ones after `+`, national ones that are grouped as
phone numbers are or begin as mobile numbers do. Sizes, years, prices, article and model numbers are none of these;
a number that touches a letter, or hangs on another by a hyphen or full stop, is a part of something longer.

Every pattern has bounded or possessive repeats only, so time is linear in the prompt's length. Full-width forms,
other scripts' digits and typographic spaces and hyphens count as their ASCII likes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from functools import cache
from types import MappingProxyType
from typing import NamedTuple


class Redaction(NamedTuple):
    """A text without personal data, and the kinds that were in it, as words to be shown ("e-mail address")."""

    text: str
    kinds: tuple[str, ...]


class _Detector(NamedTuple):
    """What one kind looks like: a candidate is the group `it` of the pattern `shape`, and `is_one` judges it."""

    kind: str
    shape: str
    is_one: Callable[[str], bool]


class _Span(NamedTuple):
    start: int
    end: int


_MARKERS: Mapping[str, str] = MappingProxyType(
    {
        "e-mail address": "[email]",
        "resident ID number": "[id]",
        "payment card number": "[card]",
        "phone number": "[phone]",
    }
)
"""The kinds, and what takes the place of each. No marker looks like personal data."""


def redact(text: str) -> Redaction:
    """`text` with a marker in the place of each piece of personal data. Redacting again changes nothing."""
    kinds: set[str] = set()
    plain = _plain(text)
    for detector in _detectors(plain):
        if spans := list(_spans(detector, plain)):
            kinds.add(detector.kind)
            marker = _MARKERS[detector.kind]
            text, plain = _covered(text, spans, marker), _covered(plain, spans, marker)
    return Redaction(text, tuple(kind for kind in _MARKERS if kind in kinds))


def get_ready() -> None:
    """Compile the patterns, which takes a tenth of a second, so that no prompt has to wait for it."""
    for detector in (_EMAIL, *_NUMBERS):
        _compiled(detector.shape)


_compiled = cache(re.compile)


def _plain(text: str) -> str:
    """`text` in ASCII as far as it matters here, character for character."""
    return text if text.isascii() else text.translate(_PLAIN)


def _detectors(plain: str) -> Iterator[_Detector]:
    """Those that can find something: most prompts have neither an @ nor a long number."""
    if "@" in plain:
        yield _EMAIL
    if _LONG_NUMBER.search(plain):
        yield from _NUMBERS


def _spans(detector: _Detector, plain: str) -> Iterator[_Span]:
    end = 0
    for found in _compiled(detector.shape).finditer(plain):
        it = found["it"]
        if it is not None and found.start("it") >= end and detector.is_one(it):
            end = found.end("it")
            yield _Span(found.start("it"), end)


def _covered(text: str, spans: Iterable[_Span], marker: str) -> str:
    pieces, done = [], 0
    for start, end in spans:
        pieces += [text[done:start], marker]
        done = end
    return "".join((*pieces, text[done:]))


# ── characters ──────────────────────────────────────────────────────────────────────────────────────────────────

_PLAIN: Mapping[int, str] = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms
    **{first + digit: str(digit) for first in (0x0660, 0x06F0, 0x0966) for digit in range(10)},
    **dict.fromkeys((0x00A0, *range(0x2000, 0x2010), *range(0x2028, 0x2030), 0x205F, 0x2060, 0x3000, 0xFEFF), " "),
    **dict.fromkeys((*range(0x2010, 0x2016), 0x2212, 0xFE63), "-"),
    0xFFE5: "¥",
}
"""One character each, so that places stay the same. What cannot be seen counts as a space."""

_LETTERS = "A-Za-z0-9\u00c0-\u024f"
"""Latin letters and digits, as the inside of a [] pattern. The sign for "times" in a size is among them, as x is."""

# ── e-mail addresses ────────────────────────────────────────────────────────────────────────────────────────────

_LOCAL = rf"[{_LETTERS}_][{_LETTERS}_.%+'-]*+"
# Bounded, because giving labels back is how "a@b.com.1" is found; "icon@2x.png" is a file.
_DOMAIN = rf"(?:[{_LETTERS}-]{{1,63}}+\.){{1,8}}(?!(?i:png|jpe?g|webp|gif|svg|psd|tiff?|bmp)(?![{_LETTERS}]))"
_TOP = rf"[A-Za-z\u00c0-\u024f]{{2,63}}+(?![{_LETTERS}])"


def _always(_: str) -> bool:
    return True


# A run of characters is taken whole whether or not an @ follows, so that no place is looked at from many.
_EMAIL = _Detector("e-mail address", rf"(?P<it>{_LOCAL}@{_DOMAIN}{_TOP})|{_LOCAL}", _always)

# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────

_LONG_NUMBER = re.compile(r"[0-9](?:[ ./()-]{0,3}[0-9]){7}")
"""The shortest phone number has eight digits."""

# What may not stand beside a number. They mirror each other: of two numbers that touch, or hang together by a sign,
# neither is taken, so replacing one never uncovers another, and one pass is enough.
_BEFORE = rf"(?<![{_LETTERS}_+$€£¥₹#])(?<![0-9][.-])(?<![0-9][Xx]\.)(?<![A-Za-z]-)"
_AFTER = rf"(?![{_LETTERS}_])(?![.-][0-9])(?!-[A-Za-z])"


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())


_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"


def _is_resident_id(text: str) -> bool:
    digits = text.replace(" ", "").replace("-", "").upper()
    try:
        date(int(digits[6:10]), int(digits[10:12]), int(digits[12:14]))
    except ValueError:
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, digits, strict=False))
    return digits[17] == _ID_CHECKS[total % 11]


_PROVINCE = "(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])"
_BORN = "(?:19|20)[0-9]{2}[01][0-9][0-3][0-9]"
_RESIDENT_ID = _Detector(
    "resident ID number",
    rf"{_BEFORE}(?P<it>{_PROVINCE}[0-9]{{4}}[ -]?{_BORN}[ -]?[0-9]{{3}}[0-9Xx]){_AFTER}",
    _is_resident_id,
)

_ISSUED = re.compile(
    "4(?:.{12}|.{15}|.{18})"  # Visa
    "|(?:5[1-5]..|222[1-9]|22[3-9].|2[3-6]..|27[01].|2720).{12}"  # Mastercard
    "|3[47].{13}"  # American Express
    "|3(?:0[0-59].|6..|[89]..).{10,15}"  # Diners Club
    "|35(?:2[89]|[3-8].).{12,15}"  # JCB
    "|(?:6011|64[4-9].|65..|62..|81..).{12,15}"  # Discover, UnionPay
    "|(?:5018|5020|5038|5[678]..|63..|67..).{9,15}"  # Maestro
    "|220[0-4].{12,15}"  # Mir
)
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
_EAN_DIGITS = 13


def _is_card(text: str) -> bool:
    digits = _digits(text)
    return bool(_ISSUED.fullmatch(digits)) and _passes_luhn(digits) and not _is_article(digits)


def _passes_luhn(digits: str) -> bool:
    numbers = [int(digit) for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum(_DOUBLED[number] for number in numbers[1::2])) % 10 == 0


def _is_article(digits: str) -> bool:
    """Whether it is the number under a bar code, which one in ten cards of that length would be as well."""
    numbers = [int(digit) for digit in digits]
    return len(digits) == _EAN_DIGITS and (sum(numbers[::2]) + 3 * sum(numbers[1::2])) % 10 == 0


def _card(shape: str) -> _Detector:
    # Looked for from every place, for the number before a card's may be grouped as the beginning of one.
    return _Detector("payment card number", rf"{_BEFORE}(?=[2-68])(?=(?P<it>{shape}){_AFTER})", _is_card)


_CARDS = (
    _card("(?:[0-9]{4}[ -]?){4}[0-9]{1,3}"),
    _card("(?:[0-9]{4}[ -]?){3}[0-9]{1,4}"),
    _card("[0-9]{4}[ -]?[0-9]{6}[ -]?[0-9]{4,5}"),
    _card("[0-9]{6}[ -]?[0-9]{7,13}"),
)


def _more(digits: str) -> str:
    """So many digits more, grouped in any way."""
    return rf"(?:[ ./()-]{{0,3}}[0-9]){{{digits}}}"


# Country codes whose numbers have one length end where they end: "+1 555 123 4567 2 cats".
_INTERNATIONAL = (
    rf"\+(?:(?:1|7|44|91){_more('10')}|(?:33|34|61){_more('9')}|86[ -]?1{_more('10')}|[2-9]{_more('7,14')})"
)
_SIGNED = (
    rf"(?<![A-Za-z\u00c0-\u024f_+]){_INTERNATIONAL}",
    r"\([2-9][0-9]{2}\) ?[0-9]{3}[ .-][0-9]{4}",  # (555) 123-4567
    r"\(0[0-9]{1,4}\)[ -]?[0-9]{3,5}[ .-]?[0-9]{3,5}",  # (020) 7946 0958
    r"\([1-9][0-9]\) ?[0-9]{4,5}-[0-9]{4}",  # (11) 98765-4321
)
_UNSIGNED = (
    r"(?:(?:00)?86[ -]?)?1[3-9][0-9](?:[ -]?[0-9]{4}){2}",  # 138 0013 8000
    r"(?:1[ .-])?[2-9][0-9]{2}[ .-][0-9]{3}[ .-][0-9]{4}",  # 555-123-4567
    r"1[ .-]?\([2-9][0-9]{2}\) ?[0-9]{3}[ .-][0-9]{4}",  # 1 (555) 123-4567
    r"0[1-9][0-9]{1,3}[ /-][0-9]{6,8}",  # 030/123456, 0755-88888888
    r"0[1-9][0-9]{1,3}[ .-][0-9]{3,4}[ .-][0-9]{3,4}",  # 020 7946 0958, 090-1234-5678
    r"0[1-9]-[0-9]{4}-[0-9]{4}",  # 03-1234-5678
    r"0[1-9][ .-][1-9][0-9](?:[ .-][0-9]{2}){3}",  # 06 12 34 56 78, and not 01 02 03 04 05
    r"8[ -]?\(?[3-9][0-9]{2}\)?[ -]?[0-9]{3}[ -][0-9]{2}[ -][0-9]{2}",  # 8 (495) 123-45-67
    r"00[1-9][0-9]{0,2}(?:[ -][0-9]{2,8}){2,5}",  # 0049 30 123456
    r"(?:07[0-9]{9}|0[67][0-9]{8}|01[5-7][0-9]{8,9}|0[789]0[0-9]{8}|010[0-9]{8}|04[0-9]{8})",  # mobiles, in one piece
)
_PHONE = _Detector(
    "phone number",
    f"(?P<it>{'|'.join(_SIGNED)}|{_BEFORE}(?:{'|'.join(_UNSIGNED)})){_AFTER}",
    _always,
)

_NUMBERS = (_RESIDENT_ID, *_CARDS, _PHONE)
"""What can be checked comes first: its parts may look like a phone number."""
