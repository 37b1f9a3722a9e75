"""Which parts of a prompt stay as written: quoted text, tags, web addresses, trailing parameters.

Quoted text is text to be drawn, so its case, spaces and punctuation are the picture. Marks are ambiguous
(an apostrophe, an inch, a German closing mark that opens in English), so a prompt whose marks do not pair
up beyond doubt is not split at all: nobody can say what of it is quoted. Text to be drawn also comes without
quotes ("a sign that says Open"); what follows such words stays as written unless a quotation follows them.
"""
# ruff: noqa: RUF001 - the marks of the world's scripts look alike, and are the point

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple


class Part(NamedTuple):
    """A stretch of a prompt, and whether it stays as written."""

    text: str
    verbatim: bool


class UnclearQuotesError(ValueError):
    """The quote marks of a prompt do not pair up beyond doubt."""


class _Family(NamedTuple):
    """Marks that quote alike. `opens` open after any character and `closes` close before any character.

    The other marks are told by what stands beside them.
    """

    marks: str
    opens: str
    closes: str
    is_single: bool = False


class _Span(NamedTuple):
    start: int
    end: int
    is_quoted: bool


class _Role(Enum):
    QUOTE = auto()
    NOT_A_QUOTE = auto()
    UNCLEAR = auto()


_DOUBLE = _Family('"“”„‟＂〝〞〟″‶❝❞⹂🙶🙷🙸', opens="“„‟〝❝🙶", closes="”〞〟❞🙷")
_SINGLE = _Family("'‘’‚‛＇`｀´′‵❛❜", opens="‘‚‛❛", closes="", is_single=True)
_GUILLEMETS = _Family("«»", opens="«", closes="»")
_SINGLE_GUILLEMETS = _Family("‹›", opens="‹", closes="›")
_FAMILIES = (_DOUBLE, _SINGLE, _GUILLEMETS, _SINGLE_GUILLEMETS)

_CLOSES_ELSEWHERE = frozenset("“‘«‹")
"""Opening marks that close in another language: „Hallo“, ‚Hallo‘, »Hallo«."""

_BRACKETS = ("「」", "『』", "《》", "〈〉", "【】", "〖〗", "｢｣", "﹁﹂", "﹃﹄", "︽︾", "︿﹀")

STRAIGHT_QUOTES = dict.fromkeys("“”„‟＂", '"') | dict.fromkeys("‘’‚‛＇", "'")
"""Marks that keyboards and word processors put for one another."""

_FAMILY_OF = {mark: family for family in _FAMILIES for mark in family.marks}
_MARK_OF = {family: re.compile(f"[{family.marks}]") for family in _FAMILIES}
_CLOSING_OF = {pair[0]: (pair[1], re.compile(f"[{pair}]")) for pair in _BRACKETS}

_MARKS = f"{''.join(_FAMILY_OF)}{''.join(_BRACKETS)}"
_NOTABLE = re.compile(
    rf"[{_MARKS}<Hh-](?:"  # begins with one of these: what begins nothing is passed over fast
    rf"(?<=[{_MARKS}])"
    r"|(?<=<)[A-Za-z][^<>]*>"  # <lora:Name:0.8>: a file's name
    r"|(?<=[Hh])(?i:ttps?)://[^\s\"<>]+"
    r"|(?<=-)(?<!\S-)-(?=[A-Za-z])"  # --ar 16:9 and all that follows: parameters, codes, addresses
    r")"
)
_ASCII_NOTABLE = ('"', "'", "`", "<", "://", "--")
"""Whatever _NOTABLE finds in ASCII holds one of these; to look for them takes a twentieth of the time."""

_DRAWN = re.compile(
    r"[SsRrWwTtCcLlIiHhEe写文字标题](?:"  # as above: the search is most of what a short prompt costs
    r"(?<=\b[A-Za-z])(?<!\bno .)(?<!\bwithout .)(?:"
    r"(?<=[Ss])(?i:ays|aying|pell(?:s|ed|ing)|pelt|logan)"
    r"|(?<=[Rr])(?i:eads|(?<=sign r|card r)eading|(?<=shirt r|board r|label r)eading"
    r"|(?<=banner r|poster r|screen r)eading)"
    r"|(?<=[Ww])(?i:ritten|ords?)"
    r"|(?<=[Tt])(?i:ext|itled)"
    r"|(?<=[Cc])(?i:aptions?|aptioned)"
    r"|(?<=[Ll])(?i:ettering|abell?ed)"
    r"|(?<=[Ii])(?i:nscribed|nscription)"
    r"|(?<=[Hh])(?i:eadline)"
    r"|(?<=[Ee])(?i:ngraved)"
    r")\b|(?<=写)[着有]|(?<=文)字|(?<=字)样|(?<=标)题|(?<=题)为)"
)
"""Words after which text to be drawn follows."""

_ASCII_DRAWN = (
    *("say", "spel", "slogan", "read", "written", "word", "text", "titled", "caption"),
    *("lettering", "label", "inscri", "headline", "engraved"),
)
"""Whatever _DRAWN finds in ASCII holds one of these, in whatever case."""

_ASCII_TELLING = (*_ASCII_NOTABLE, *_ASCII_DRAWN)
"""Without any of these nothing in ASCII stays as written."""

_HEBREW = re.compile("[֐-׿]")


def is_without(ascii_text: str) -> bool:
    """Whether nothing of a text in ASCII stays as written for certain; `split` tells of the others."""
    return not any(map(ascii_text.lower().__contains__, _ASCII_TELLING))


def split(text: str) -> list[Part]:
    """`text` in parts, in order; joined they are `text`, but for delimiters written straight.

    Runs in time linear in the length of `text`.

    Raises:
        UnclearQuotesError: what is quoted cannot be told.
    """
    parts = []
    position = 0
    for start, end, is_quoted in _with_drawn_text(text, list(_verbatim_spans(text))):
        if start > position:
            parts.append(Part(text[position:start], verbatim=False))
        written = text[start:end]
        parts.append(Part(_with_straight_quotes(written) if is_quoted else written, verbatim=True))
        position = end
    if position < len(text):
        parts.append(Part(text[position:], verbatim=False))
    return parts


def _verbatim_spans(text: str) -> Iterator[_Span]:
    if text.isascii() and not any(map(text.__contains__, _ASCII_NOTABLE)):
        return
    opened: set[_Family] = set()
    position = 0
    while found := _NOTABLE.search(text, position):
        start, position = found.span()
        family = _FAMILY_OF.get(found[0])
        if found[0] == "--":
            position = len(text)
        elif found[0] in _CLOSING_OF:
            position = _end_of_bracket(text, start)
        elif family is not None:
            role = _role_outside(text, start, family, opened_before=family in opened)
            if role is _Role.NOT_A_QUOTE:
                continue
            if role is _Role.UNCLEAR:
                raise UnclearQuotesError
            opened.add(family)
            position = _end_of_quote(text, start, family)
        elif len(found[0]) == 1:
            raise UnclearQuotesError  # a closing bracket that nothing opened
        yield _Span(start, position, is_quoted=len(found[0]) == 1)


def _with_drawn_text(text: str, spans: list[_Span]) -> list[_Span]:
    """`spans`, and all that follows words that announce text to be drawn without a quotation after them."""
    if text.isascii() and not any(map(text.lower().__contains__, _ASCII_DRAWN)):
        return spans
    drawn = _DRAWN.search(text, max((span.end for span in spans if span.is_quoted), default=0))
    if drawn is None:
        return spans
    before = [span for span in spans if span.start < drawn.start()]
    begin = max([drawn.end(), *(span.end for span in before)])
    return [*before, _Span(begin, len(text), is_quoted=False)] if begin < len(text) else before


def _with_straight_quotes(quotation: str) -> str:
    first, last = quotation[0], quotation[-1]
    return STRAIGHT_QUOTES.get(first, first) + quotation[1:-1] + STRAIGHT_QUOTES.get(last, last)


def _end_of_bracket(text: str, start: int) -> int:
    closing, either = _CLOSING_OF[text[start]]
    depth = 0
    for mark in either.finditer(text, start):
        depth += -1 if mark[0] == closing else 1
        if depth == 0:
            return mark.end()
    raise UnclearQuotesError


def _end_of_quote(text: str, start: int, family: _Family) -> int:
    for mark in _MARK_OF[family].finditer(text, start + 1):
        role = _role_inside(text, mark.start(), family, opener=text[start])
        if role is _Role.QUOTE:
            return mark.end()
        if role is _Role.UNCLEAR:
            break
    raise UnclearQuotesError


def _role_outside(text: str, at: int, family: _Family, *, opened_before: bool) -> _Role:
    """What a mark is where nothing is open: it opens, is part of a word or number, or cannot be told."""
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if _is_inside_word(before, after, family):
        return _Role.NOT_A_QUOTE
    if text[at] in family.opens:
        return _Role.QUOTE
    if not _is_word(before):
        return _Role.UNCLEAR if not after or after.isspace() else _Role.QUOTE
    # The dogs' bowl, a 6' man, a 5" pipe. After a quotation the same mark may be the quotation's real end.
    if not opened_before and not _is_word(after) and (family.is_single or before.isdigit()):
        return _Role.NOT_A_QUOTE
    return _Role.UNCLEAR


def _role_inside(text: str, at: int, family: _Family, *, opener: str) -> _Role:
    """What a mark of the open family is: it closes, is part of a word, or cannot be told."""
    mark, before, after = text[at], text[at - 1], text[at + 1 : at + 2]
    if _is_inside_word(before, after, family):
        return _Role.NOT_A_QUOTE
    if mark in family.closes:
        return _Role.QUOTE
    if _is_word(after) or (mark in family.opens and (mark == opener or mark not in _CLOSES_ELSEWHERE)):
        return _Role.UNCLEAR
    return _Role.QUOTE


def _is_inside_word(before: str, after: str, family: _Family) -> bool:
    """Whether a mark between these is an apostrophe (don't) or the sign of a Hebrew abbreviation."""
    if family.is_single:
        return _is_word(before) and _is_word(after)
    return bool(family is _DOUBLE and _HEBREW.match(before) and _HEBREW.match(after))


def _is_word(character: str) -> bool:
    """Whether a quotation would hardly begin or end beside this: scripts that set spaces between words.

    Chinese, Japanese and Thai quote without spaces, so their letters say nothing.
    """
    return character.islower() or character.isupper() or character.isdigit() or bool(_HEBREW.match(character))
