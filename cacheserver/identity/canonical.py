"""The canonical profile: one form for all prompts that ask for the same picture in other words.

What carries no meaning for a picture is normalized away, and what is left is compared as a string. No vectors and no
thresholds: measured on hard negatives, similarity of any kind serves wrong pictures, and equality serves none.

- Widths and ligatures of characters, case, traditional Chinese to simplified (not where text is to be drawn), hyphens,
  "8 k" and "8k".
- Wrappers ("please draw an image of", 请生成…的图片), politeness, articles, "is", "are" and "that" are dropped.
- British spelling becomes American; number words and 两只 become digits; reviewed synonyms one of them.
- Segments between commas that say only how the whole picture is made (`style`) are sorted behind the others and named
  once; segments that only ask for more pixels or care (`quality`) are dropped. Where a picture is told in parts (left …
  right …, a cat, red light, a dog, blue light) or tells what is not in it, all segments stay in order.

Everything else stays, in order: nothing is stemmed, no plural or preposition is dropped. Quoted and announced text,
tags, addresses and `--parameters` stay as written, names and homographs as they are capitalized. A prompt whose quotes
are unclear, or of which nothing would be left, stays as written and shares with nobody.

Idempotent; takes time linear in the prompt's length; the same in every process and under every version of Python.
"""

from __future__ import annotations

import re
import unicodedata

from cacheserver.identity import canonical_chinese as chinese
from cacheserver.identity import canonical_english as english
from cacheserver.identity.canonical_capitals import lowered
from cacheserver.identity.canonical_english import Tokens
from cacheserver.identity.canonical_style import VERBATIM, contents_and_styles, says_how
from cacheserver.identity.characters import fold_characters, is_plain
from cacheserver.identity.verbatim import Part, UnclearQuotesError, is_without, split

CANONICAL_VERSION = "canonical/2"
"""The profile's name with its number, which rises with every change of what it makes of any prompt."""

_MAX_BYTES = 2_000
"""Of a prompt in UTF-8: 2,000 Latin letters, or 667 Han characters, which say as much."""

_MAX_PASSES = 6
"""Nearly every prompt settles in one pass; the next one shows that it has."""

# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_LETTER = rf"[^\W_{chinese.CJK}]"
_BINDING_HYPHEN = (
    r"-(?!(?:looking|facing|flying|standing|moving|growing|running|lasting|reaching|glowing|shining|burning)\b)"
    r"(?=[a-z]++(?<=ing))"
)
"""A hyphen that is no space: a man-eating shark is none that a man eats. A good-looking man is a good looking one."""


def _words_and_signs(letter: str) -> str:
    """Finds words of such letters, and signs of two characters or more: :) and ::."""
    return (
        rf"(?:{letter}|(?<!\S)-\d){letter}*+"  # a word or a number with its sign; every other hyphen is a space
        r"(?:(?=['.:,-])"  # most words end here
        rf"(?:(?:['.:](?={letter})|(?<=\d)[,-](?=\d)|{_BINDING_HYPHEN}){letter}++)*+"  # person's, 1.5, 16:9, 18-105mm
        r"(?:(?<=s)'(?!\w))?)?"  # the dogs' bowl
        r"|(?<!\S)[:;]-?[()dp3](?!\w)"  # :) and ;)
        r"|::+"
    )


_TOKEN = re.compile(
    rf"[{chinese.CJK}]+"
    rf"|{_words_and_signs(_LETTER)}"
    r"|[,;.!?:…。、~\n–—]+"  # noqa: RUF001 - what separates segments
    r"|[\u2190-\u2bff\ufe0f\u200d\U0001f000-\U0001faff]+"  # emoji
    r"|[^\w\s-]"
    r"|_+"
)
_ASCII_TOKEN = re.compile(rf"{_words_and_signs('[A-Za-z0-9]')}|[,;.!?:~\n]+|[^\w\s-]|_+")
"""What _TOKEN finds in ASCII, in half the time."""

_SEPARATORS = frozenset(",;.!?:…。、~\n–—")  # noqa: RUF001 - as above
_QUOTES = frozenset("\"'“”‘’«»‹›「」『』《》〈〉【】〖〗`´")  # noqa: RUF001 - the marks that quote
_MARK = re.compile(f"[{''.join(sorted(_QUOTES))}<]")
_MAX_MARKS = 200
"""Of quotation in a prompt that people write; above it nothing is told apart, for that takes time."""


def canonical(prompt: str, *, ignore_quality_words: bool = True) -> str:
    """The canonical form of `prompt`; where it has none, the prompt itself in NFC.

    Without `ignore_quality_words`, segments that only ask for more pixels or more care count as style.
    """
    written = _written(prompt)
    form = _form(written, ignore_quality_words=ignore_quality_words)
    return written if form is None else form


def canonical_form(prompt: str, *, ignore_quality_words: bool = True) -> str | None:
    """The canonical form of `prompt`; None where it has none and shares with nobody.

    It has none where it is above 2,000 bytes, for prompts so long are hardly ever said twice in other words, where
    it is unclear what is quoted (or more than 200 marks quote), and where nothing would be left.
    """
    return _form(_written(prompt), ignore_quality_words=ignore_quality_words)


def same_picture(a: str, b: str, *, ignore_quality_words: bool = True) -> bool:
    """Whether both prompts have the same canonical form."""
    return canonical(a, ignore_quality_words=ignore_quality_words) == canonical(
        b, ignore_quality_words=ignore_quality_words
    )


def _written(prompt: str) -> str:
    return prompt if prompt.isascii() else unicodedata.normalize("NFC", prompt)


def _form(text: str, *, ignore_quality_words: bool) -> str | None:
    if len(text) > _MAX_BYTES or not (text.isascii() or 0 < _utf8_bytes(text) <= _MAX_BYTES):
        return None
    for _ in range(_MAX_PASSES):
        once = _one_pass(text, ignore_quality_words=ignore_quality_words)
        if once == text:
            return text or None
        text = once
        if not text:
            break
    return None


def _utf8_bytes(text: str) -> int:
    """How many bytes `text` has; 0 where it is none that could be sent."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0


def _one_pass(text: str, *, ignore_quality_words: bool) -> str:
    """`text` rewritten once; "" where nothing is left of it, or nobody can say what of it is quoted."""
    text = text.strip()
    if is_plain(text) and is_without(text):
        parts = [Part(text, verbatim=False)]
    else:
        try:
            parts = [] if len(_MARK.findall(text)) > _MAX_MARKS else split(text)
        except UnclearQuotesError:
            return ""
    tail = ""
    if parts and parts[-1].verbatim and parts[-1].text.startswith("--"):
        tail = " ".join(parts.pop().text.split())
    parts = _with_announced(parts)
    is_drawn = any(part.verbatim and not part.text.startswith(("<", "http", "HTTP")) for part in parts)
    is_open = bool(parts) and parts[-1].verbatim and is_drawn and parts[-1].text[0] not in _QUOTES
    tokens: Tokens = []
    for part in parts:
        if part.verbatim:
            tokens.append(VERBATIM + _told(part.text.strip()))
        else:
            folded = _folded(part.text, is_drawn=is_drawn)
            tokens += (_ASCII_TOKEN if folded.isascii() else _TOKEN).findall(folded)
    contents, styles = contents_and_styles(
        _segments(tokens), ignore_quality_words=ignore_quality_words, in_order=is_open
    )
    if not contents and not styles:
        return ""
    segments = [*contents, *(styles if is_open else sorted(set(styles)))]
    joined = ", ".join(segments)
    return f"{joined} {tail}" if tail else joined


def _with_announced(parts: list[Part]) -> list[Part]:
    """`parts`, and as written what Chinese words announce as text to be drawn: 招牌是正新鸡排."""
    if parts and not parts[-1].verbatim and not parts[-1].text.isascii():
        text = parts[-1].text
        begin = chinese.announced(text)
        if text[begin:].strip():
            return [*parts[:-1], Part(text[:begin], verbatim=False), Part(text[begin:], verbatim=True)]
    return parts


def _told(verbatim: str) -> str:
    """What stays as written; 「」 and 『』 quote as "" do."""
    if verbatim[0] in "「『" and not _QUOTES.intersection(verbatim[1:-1]):
        return f'"{verbatim[1:-1]}"'
    return verbatim


def _folded(text: str, *, is_drawn: bool) -> str:
    """`text` folded, in lower case but for what a capital makes another word; what is Chinese in it rewritten."""
    if not is_plain(text):
        text = fold_characters(text)
    text = lowered(text)
    text = english.with_words_for_signs(text)
    if not text.isascii() and chinese.is_chinese(text):
        text = chinese.rewritten(text, simplified=not is_drawn)
    return text


# ── segments ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _segments(tokens: Tokens) -> list[Tokens]:
    """The tokens between separators, each segment rewritten; the first one without what wraps the prompt."""
    segments: list[Tokens] = []
    segment: Tokens = []
    for token in tokens:
        if token[-1] in _SEPARATORS and token[:2] != "::":
            if token == ":" and segment not in english.HEADINGS and says_how(english.rewritten(segment)):  # noqa: S105 - a sign
                segment.append(token)  # lighting: red, background: blue
            elif segment in english.COMMANDS and not segments and ("\n" in token or ":" in token):
                segment = []
            elif segment:
                segments.append(segment)
                segment = []
        else:
            segment.append(token)
    if segment:
        segments.append(segment)
    english.unwrap(segments)
    return [words for segment in segments if (words := english.rewritten(segment))]
