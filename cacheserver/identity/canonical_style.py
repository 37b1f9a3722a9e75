"""What the segments of a prompt show, in order, and how the whole picture is to be made, in any order."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain

from cacheserver.identity import canonical_chinese as chinese
from cacheserver.identity.canonical_english import BEFORE_OTHERS, PLACES, Tokens
from cacheserver.identity.canonical_lists import rewritings, vocabulary

VERBATIM = "\0"
"""Begins a token that stays as written."""

_STYLE_LINES = vocabulary("style", frozenset({"head", "with", "hue"}))
_STYLE = frozenset(line.written[0] for line in _STYLE_LINES)
_STYLE_HEADS = frozenset(line.written[0] for line in _STYLE_LINES if line.kind == "head")
_MAX_OWN_LOOKS = 2
_STYLE_CORE = frozenset(line.written[0] for line in _STYLE_LINES if line.kind not in {"with", "hue"})
_HUES = frozenset(line.written[0] for line in _STYLE_LINES if line.kind == "hue")
_QUALITY_LINES = vocabulary("quality", frozenset({"with"}))
_QUALITY = frozenset(line.written[0] for line in _QUALITY_LINES)
_QUALITY_CORE = frozenset(line.written[0] for line in _QUALITY_LINES if line.kind != "with")
_MEASURE = re.compile(r"f?\d[\d.]*(?:k|p|mm|d|bit|fps|mp)?|/")
_MAX_STYLE_WORDS = 8
_FRAMES = tuple(
    (line.written[0].split(), line.canonical[0].split(", "))
    for line in sorted(rewritings("frames"), key=lambda line: -len(line.written[0].split()))
)
_BEFORE_PRODUCTS = frozenset(
    str.split("baby hair pet dog cat milk paper skin dairy food meat beauty cleaning billboard tv outdoor real waste")
)
_FRAME_ALONE = {tuple(frame): becomes for frame, becomes in _FRAMES}
_FRAME_ENDS = frozenset(chain.from_iterable((frame[0], frame[-1]) for frame, _ in _FRAMES))
_LOOKS = _STYLE | _QUALITY
_LOOKS_CORE = _STYLE_CORE | _QUALITY_CORE
_BACKGROUNDS = frozenset({"background", "backdrop", "背景"})
_BEFORE_BACKGROUND = frozenset({"on", "against"})
_BACKGROUND_WORDS = _STYLE | {"empty", "light", "clean", "white", "studio", "minimal", "navy", "cream", "ivory"}
_MAX_BACKGROUND_WORDS = 4
_NEGATING = frozenset({"no", "without", "not", "never", "avoid", "exclude", "less", "non", "negative"})
_PARTS = frozenset(
    str.split(
        "left right top bottom upper lower middle center inside outside first second third another other before after "
        "panel half scene page part step row column background foreground"
    )
)
_COLORS = frozenset(
    str.split(
        "white black gray red green blue yellow orange purple pink brown beige cyan magenta teal gold golden silver "
        "navy cream ivory dark light bright warm cold cool pure plain neon"
    )
)
_ONE_HEAD = dict.fromkeys(("lighting", "lights", "lit", "glow"), "light") | dict.fromkeys(
    ("tone", "tones", "palette", "color", "hue", "hues", "scheme"), "colors"
)
_PANELS = frozenset(str.split("storyboard diptych triptych panels strip split"))
_OF_PARTS = _PANELS | _NEGATING
_OF_COLORED = frozenset(
    str.split(
        "lighting light lights lit glow glowing tones tone palette color colors hue hues grading scheme background "
        "backdrop filter contrast hour shadows shadow photo photography photograph film and"
    )
)
_BEFORE_MAKERS = PLACES | {"by", "with", "of", "from", "art", "style"}
_POSES = frozenset({"floating", "hovering", "standing", "sitting", "lying"})


def contents_and_styles(
    segments: list[Tokens], *, ignore_quality_words: bool, in_order: bool
) -> tuple[list[str], list[str]]:
    """What the segments show, in order, and how they want it made; `in_order`: all is taken for what they show."""
    if ignore_quality_words and not in_order:
        segments = [words for words in segments if not _is_quality(words)]
    if in_order or _is_in_parts(segments):
        return list(map(_joined, segments)), []
    contents, styles = _apart(segments, _is_style if ignore_quality_words else says_how)
    if _is_torn(styles) or _has_each_its_own(contents, styles) or _is_any_of_one(styles, len(contents)):
        return list(map(_joined, segments)), []
    return list(map(_joined, contents)), [style for _, style in styles]


def _apart(segments: list[Tokens], is_style: Callable[[Tokens], bool]) -> tuple[list[Tokens], list[tuple[int, str]]]:
    """The segments that show something, and the styles, each with how many of those stand before it."""
    contents: list[Tokens] = []
    styles: list[tuple[int, str]] = []
    is_product = False
    for words in segments:
        if is_style(words):
            styles += [(len(contents), style) for style in _FRAME_ALONE.get(tuple(words)) or [_joined(words)]]
            continue
        rest, found = _without_frame(words)
        is_product = is_product or bool(found)
        if found and rest and _is_style(rest):
            found = [*found, _joined(rest)]
            rest = []
        rest, background = _without_background(rest)
        if background:
            found = [*found, background]
        if rest and contents and _goes_on(rest) and (is_product or (len(contents) == 1 and _is_one(contents[0]))):
            contents[-1] = contents[-1] + rest
        elif rest:
            contents.append(rest)
        styles += [(len(contents), style) for style in found]
    return contents, styles


def _is_in_parts(segments: list[Tokens]) -> bool:
    """Whether segments belong to what stands before them: left, a cat, watercolor, right, a dog; no people, fog."""
    begins = [words[1] if words[0] in PLACES and len(words) > 1 else words[0] for words in segments]
    words = list(chain.from_iterable(segments))
    return not _OF_PARTS.isdisjoint(words) or sum(map(_is_part, begins)) > 1 or chinese.negates(words)


def _is_part(word: str) -> bool:
    return word in _PARTS or (not word.isascii() and chinese.is_part(word))


def _is_torn(placed: list[tuple[int, str]]) -> bool:
    """Whether parts of the picture have each its own: a cat, red light, a dog, blue light; two backgrounds."""
    seen: dict[str, tuple[int, str]] = {}
    for at, style in placed:
        head = style.split()[-1] if style.isascii() else style[-2:]
        is_background = head in _BACKGROUNDS
        if not is_background and not style.isascii():
            head = chinese.scale(style)
        elif not is_background and head != "style" and _COLORS.isdisjoint(style.split()):
            continue
        if head:
            before = seen.setdefault(_ONE_HEAD.get(head, head), (at, style))
            if before[1] != style and (is_background or before[0] != at):
                return True
    return False


def _has_each_its_own(contents: list[Tokens], styles: list[tuple[int, str]]) -> bool:
    """Whether every content, of two at least, is followed by a look of its own: a sphere, glossy, a cube, matte.

    Long lists of styles, and what only a whole picture has, as a medium or a light, are about the whole.
    """
    if len(contents) < 2 or any(words[0] in _BEFORE_MAKERS for words in contents):  # noqa: PLR2004 - as said
        return False
    own = [[style for at, style in styles if at == number] for number in range(1, len(contents) + 1)]
    return all(1 <= len(each) <= _MAX_OWN_LOOKS and not any(map(_is_of_whole, each)) for each in own)


def _is_any_of_one(styles: list[tuple[int, str]], contents: int) -> bool:
    """Whether a color stands between contents, not of a light or a background: a guitar, white body, an amplifier."""
    return any(
        0 < at < contents
        and (
            (not _HUES.isdisjoint(words := style.split()) and _OF_COLORED.isdisjoint(words))
            or (not style.isascii() and chinese.is_any_of_one(style))
        )
        for at, style in styles
    )


def _is_of_whole(style: str) -> bool:
    return not _STYLE_HEADS.isdisjoint(style.split())


def _goes_on(words: Tokens) -> bool:
    """Whether a segment goes on with the one before it, comma or not: a cat, in a box."""
    return words[0] in PLACES or (words[0] in _POSES and len(words) > 1 and words[1] in PLACES)


def _is_one(words: Tokens) -> bool:
    """Whether nothing but one thing is told of, so that what goes on goes on about that."""
    return BEFORE_OTHERS.isdisjoint(words) and not any(word.endswith("ing") for word in words)


def says_how(words: Tokens) -> bool:
    """Whether a segment says nothing of what is in the picture."""
    return bool(words) and (_is_style(words) or _is_quality(words))


def _is_quality(words: Tokens) -> bool:
    if _QUALITY.issuperset(words):
        return not _QUALITY_CORE.isdisjoint(words) and len(words) <= _MAX_STYLE_WORDS
    return not words[-1].isascii() and chinese.is_quality("".join(words))


def _is_style(words: Tokens) -> bool:
    if len(words) > _MAX_STYLE_WORDS:
        return False
    if not _LOOKS_CORE.isdisjoint(words):
        return all(word in _LOOKS or _MEASURE.fullmatch(word) for word in words)
    return not words[-1].isascii() and chinese.is_style("".join(words))


def _without_frame(words: Tokens) -> tuple[Tokens, list[str]]:
    """The words without what a shop calls its pictures, and that as style segments."""
    first, last = words[0], words[-1]
    if first in _FRAME_ENDS or last in _FRAME_ENDS:
        for frame, becomes in _FRAMES:
            length = len(frame)
            if first == frame[0] and words[:length] == frame and (len(words) == length or words[length] == "of"):
                return words[length + 1 :], becomes
            if last == frame[-1] and words[-length:] == frame and _is_shown_before(words, length):
                return words[:-length], becomes
    elif not words[-1].isascii():
        rest, cut = chinese.without_frame(words[-1])
        if cut:
            return [*words[:-1], rest] if rest else words[:-1], [cut]
    return words, []


def _is_shown_before(words: Tokens, length: int) -> bool:
    """Whether the last words are a frame of what stands before them.

    A baby product photo shows no baby, and who holds a product photo holds it.
    """
    if len(words) <= length:
        return False
    word = words[-length - 1]
    return not (word in _BEFORE_PRODUCTS or word in BEFORE_OTHERS or word in PLACES or word.endswith("ing"))


def _without_background(words: Tokens) -> tuple[Tokens, str]:
    """The words without "on a white background" at their end, and that as a style segment."""
    if words and words[-1] in _BACKGROUNDS:
        for start in range(len(words) - 2, max(0, len(words) - 2 - _MAX_BACKGROUND_WORDS), -1):
            if words[start] in _BEFORE_BACKGROUND:
                return words[:start], _joined(words[start + 1 :])
            if words[start] not in _BACKGROUND_WORDS:
                break
    return words, ""


def _joined(words: Tokens) -> str:
    if len(words) == 1:
        return words[0].removeprefix(VERBATIM)
    text = " ".join(words)
    if text.isascii() and VERBATIM not in text:
        return text
    if VERBATIM not in text:
        return chinese.without_spaces_between(text)
    text = ""
    for word in words:  # what stays as written keeps its own spaces
        shown = word.removeprefix(VERBATIM)
        is_run_on = text and chinese.is_cjk(text[-1]) and chinese.is_cjk(shown[0])
        text += shown if not text or is_run_on else f" {shown}"
    return text
