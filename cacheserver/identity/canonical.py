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
from collections.abc import Callable, Sequence
from itertools import chain

from cacheserver.identity import canonical_chinese as chinese
from cacheserver.identity.canonical_lists import rewritings, vocabulary
from cacheserver.identity.characters import fold_characters, is_plain
from cacheserver.identity.homographs import HOMOGRAPHS
from cacheserver.identity.verbatim import Part, UnclearQuotesError, is_without, split

CANONICAL_VERSION = "canonical/1"
"""The profile's name with its number, which rises with every change of what it makes of any prompt."""

_MAX_BYTES = 2_000
"""Of a prompt in UTF-8: 2,000 Latin letters, or 667 Han characters, which say as much."""

_MAX_PASSES = 6
"""Nearly every prompt settles in one pass; the next one shows that it has."""

_Tokens = list[str]

# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_LETTER = rf"[^\W_{chinese.CJK}]"
_BINDING_HYPHEN = (
    r"-(?!(?:looking|facing|flying|standing|moving|growing|running|lasting|reaching|glowing|shining|burning)\b)"
    r"(?=[a-z]++(?<=ing))"
)
"""A hyphen that is no space: a man-eating shark is none that a man eats. A good-looking man is a good looking one."""

_TOKEN = re.compile(
    rf"[{chinese.CJK}]+"
    rf"|(?:(?<!\S)-(?=\d))?{_LETTER}++"  # a word or a number with its sign; every other hyphen is a space
    rf"(?:(?:['.:](?={_LETTER})|(?<=\d)[,-](?=\d)|{_BINDING_HYPHEN}){_LETTER}++)*+"  # person's, 1.5, 16:9, 18-105mm
    r"(?:(?<=s)'(?!\w))?"  # the dogs' bowl
    r"|(?<!\S)[:;]-?[()dp3](?!\w)"  # :) and ;)
    r"|::+"
    r"|[,;.!?:…。、~\n–—]+"  # noqa: RUF001 - what separates segments
    r"|[\u2190-\u2bff\ufe0f\u200d\U0001f000-\U0001faff]+"  # emoji
    r"|[^\w\s-]"
    r"|_+"
)
_SEPARATORS = frozenset(",;.!?:…。、~\n–—")  # noqa: RUF001 - as above
_VERBATIM = "\0"
"""Begins a token that stays as written."""

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

# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_ARTICLES = frozenset({"a", "an", "the"})
_FILLERS = frozenset({"is", "are", "that"})
_INDEFINITE = frozenset({"a", "an"})
_JOINING = frozenset({"and", "or", "&", "+"})
_QUALIFYING = frozenset(
    str.split(
        "white black gray red green blue yellow orange purple pink brown gold golden silver dark light big large small "
        "little tiny huge tall short long old new young fat thin round square wooden metal plastic glass "
        "striped spotted male female happy sad angry wild tame ginger tabby calico beige cream teal navy cyan magenta "
        "turquoise violet copper bronze leather canvas paper stone marble ceramic steel iron brick chocolate vanilla "
        "vintage modern good bad evil hot cold wet dry clean dirty open closed empty full front back left right"
    )
)
"""What stands before them and an article: a black and a white cat are two, a black and white cat is one."""

_UNCHANGED = frozenset(
    str.split(
        "fish salmon tuna trout squid deer sheep moose bison buffalo elk reindeer jellyfish goldfish koi carp shrimp "
        "aircraft spacecraft"
    )
)
"""What is one or many by its article or verb alone: a wild deer, the deer are in the forest."""

_STUFFS = frozenset(str.split("glass paper wood iron"))
"""What is a thing with any article, and what things are made of without."""

_COUNTED = (
    _UNCHANGED
    | _STUFFS
    | frozenset(
        str.split(
            "chicken lamb duck turkey goose lobster crab octopus rabbit orange lime peach plum olive lemon pepper "
            "light stone rock brick marble straw toast cloth hair spring"
        )
    )
)
"""What is another thing, or as many as one likes, without its article: a chicken on a plate. Before another noun the
article says nothing: a chicken coop.
"""

_AFTER_NOUNS = frozenset(str.split("next close over through between among against above without is are that who which"))
_PREY = frozenset(str.split("fox bird whale horse bull dog cock bear deer duck lion tiger wolf shark fish seal"))
_SPORTS = frozenset(str.split("hunting watching riding racing fighting fishing herding spotting"))
"""Behind those: a fox hunting in the snow, and fox hunting."""

_BEFORE_OBJECTS = frozenset(
    str.split(
        "eating riding walking hunting slaying killing fighting chasing loving hating watching devouring swallowing "
        "breathing carrying training hugging feeding wrestling cleaning catching taming charming kissing shooting "
        "herding painting drawing lighting shading framing tracing rendering"
    )
)
"""Before these words an article tells who does it: a man eating a plant and a man eating plant; painting a portrait."""

_FOREIGN = frozenset(
    str.split(
        "un una uno unos unas los las con della nel um uma com avec dans ein eine einen einer und mit auf im een het"
    )
)
"""Words of languages in which "a" and "an" are no articles: un hombre a caballo is no hombre caballo."""

_VERBS_TO_BE = frozenset({"is", "are"})
_BEFORE_TO_BE = frozenset({"who", "which", "there"})

_NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        str.split(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen"
        )
    )
}
_TENS = {
    word: 10 * value
    for value, word in enumerate(str.split("twenty thirty forty fifty sixty seventy eighty ninety"), start=2)
}
_UNITS = {unit: unit for unit in str.split("k mm cm ml kg g gb mb tb px fps mp hz mah d inch ft oz lb qt")} | {
    "inches": "inch",
    "ounce": "oz",
    "ounces": "oz",
    "lbs": "lb",
    "quart": "qt",
    "quarts": "qt",
}
"""What is written with a space or none behind a number, and its one name."""

_LETTERS = (["d"], ["k"], ["g"])
"""Units that are letters behind a number in words: three D rings are no 3D rings."""

_TELLING_SIGNS: tuple[tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    ('"', re.compile(r'(?<=\d)"'), " inch"),
    ("w/o", re.compile(r"(?<!\w)w/o(?!\w)"), "without"),
    ("f/", re.compile(r"(?<!\w)f/(?=\d)"), "f"),
    ("f /", re.compile(r"(?<!\w)f / ?(?=\d)"), "f"),
    ("0's", re.compile(r"(?<=\d0)'s(?!\w)"), "s"),
    ("ty ", re.compile(rf"(?<=ty )({'|'.join(_NUMBER_WORDS)})-(?=\w)"), lambda word: f"{_NUMBER_WORDS[word[1]]} "),
)
"""Signs that say what a word says, each with what is looked for first: 65" is 65 inch, f/2.8 f2.8, the 1920's are the
1920s. And twenty one-dollar bills are not 21 dollars.
"""
_TORN_APART = {
    "k": frozenset({"16", "32", "40"}),
    "mm": frozenset(str.split("14 16 18 24 28 35 40 50 55 70 80 85 100 105 120 135 200 300")),
}
"""Numbers that some tools tear apart before a unit: 3 5 mm, 4 0 k. Not all of them: 2 5 mm nails may be two of 5 mm."""


def _phrases(lists: Sequence[str]) -> dict[str, tuple[tuple[_Tokens, _Tokens], ...]]:
    """What may begin at a token and what becomes of it, longest first."""
    table: dict[str, list[tuple[_Tokens, _Tokens]]] = {}
    for line in chain.from_iterable(map(rewritings, lists)):
        for written, becomes in zip(line.written, line.canonical, strict=True):
            tokens = written.split()
            table.setdefault(tokens[0], []).append((tokens, becomes.split()))
    return {first: tuple(sorted(rows, key=lambda row: -len(row[0]))) for first, rows in table.items()}


_IN_CAPITALS = frozenset(tuple(line.written[0].lower().split()) for line in vocabulary("capitals", frozenset()))
_MAY_TELL = HOMOGRAPHS | frozenset(chain.from_iterable(_IN_CAPITALS))


def _names() -> dict[str, dict[str, tuple[_Tokens, ...]]]:
    """The names by their first and second token, longest first."""
    table: dict[str, dict[str, tuple[_Tokens, ...]]] = {}
    for line in vocabulary("names", frozenset()):
        tokens = line.written[0].split()
        rows = table.setdefault(tokens[0], {})
        rows[tokens[1]] = tuple(sorted((*rows.get(tokens[1], ()), tokens), key=len, reverse=True))
    return table


_PHRASES = _phrases(("spelling", "synonyms"))
_NAMES = _names()
_MAY_FILL = frozenset(_NAMES) | _ARTICLES | _FILLERS | _BEFORE_TO_BE
_MAY_CHANGE = frozenset(_PHRASES) | frozenset(_NUMBER_WORDS) | frozenset(_TENS) | frozenset(_UNITS) | {"x"}

# ── wrappers ────────────────────────────────────────────────────────────────────────────────────────────────────────

_ASKING = tuple(
    phrase.split()
    for phrase in (
        "please",
        "pls",
        "kindly",
        "can you",
        "can you please",
        "could you",
        "could you please",
        "would you",
        "would you please",
        "will you",
        "i want you to",
        "i would like you to",
        "i'd like you to",
        "i need you to",
        "help me",
        "try to",
    )
)
_WANTING = tuple(
    phrase.split()
    for phrase in (
        "i want",
        "i need",
        "i would like",
        "i'd like",
        "i would love",
        "i'd love",
        "i want to see",
        "i would like to see",
        "i'd like to see",
        "i would love to see",
        "i'd love to see",
        "we want",
        "we need",
        "we would like",
        "we'd like",
        "can i get",
        "can i have",
        "can we get",
        "can we have",
        "could i get",
        "could i have",
        "let me see",
    )
)
_PLEASE = frozenset({"please", "pls", "kindly"})
_MAKING = frozenset(str.split("draw create generate make produce show give imagine design render visualize"))
_MAKING_IMAGES = frozenset({"render"})
"""Of something else it says how it is made."""

_ONLY_MAKING = frozenset({"create", "generate"})
_IMAGES = frozenset({"image", "picture", "pic", "images", "pictures"})
_MANY_IMAGES = frozenset({"images", "pictures"})
_HANGS = frozenset(str.split("wall walls frame frames framed hanging hangs hung album screen billboard fridge wallet"))
"""Where pictures are that are part of a picture."""

_OF = frozenset({"of", "showing", "depicting", "shows", "depicts"})
_HEADINGS = (*(["image"], ["picture"], ["prompt"], ["image", "prompt"], ["/", "imagine", "prompt"], ["/", "imagine"]),)
_COMMANDS = (["generate"], ["create"], ["draw"], ["description"], ["image", "description"])
"""Headings before a colon or a line's end alone: create, inspire, repeat."""

_GREETINGS = (["hi"], ["hello"], ["hey"], ["hi", "there"], ["hello", "there"], ["hey", "there"])
_DETERMINERS = (_ARTICLES | {"some", "my", "your", "his", "her", "their", "this"} | set(_NUMBER_WORDS)) - {"zero"}
_WRAPPING = _MAKING | _IMAGES | _ARTICLES | {phrase[0] for phrase in (*_ASKING, *_WANTING)}
_THANKS = (["please"], ["thanks"], ["thank", "you"], ["thanks", "a", "lot"], ["thx"], ["pls"])
_MAY_BE_DRAWN = (["thanks"], ["thank", "you"], ["thanks", "a", "lot"])
"""What a card may say, where nothing is asked for."""

# ── style ───────────────────────────────────────────────────────────────────────────────────────────────────────────

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
_OF_COLORED = frozenset(
    str.split(
        "lighting light lights lit glow glowing tones tone palette color colors hue hues grading scheme background "
        "backdrop filter contrast hour shadows shadow photo photography photograph film and"
    )
)
_PLACES = frozenset({"in", "on", "at", "under", "inside"})
_BEFORE_MAKERS = _PLACES | {"by", "with", "of", "from", "art", "style"}
_BEFORE_OTHERS = frozenset({"and", "or", "with", "of", "beside", "near", "behind", "to", "at", "for", "from", "by"})
_POSES = frozenset({"floating", "hovering", "standing", "sitting", "lying"})


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
    it is unclear what is quoted, and where nothing would be left.
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
            parts = split(text)
        except UnclearQuotesError:
            return ""
    tail = ""
    if parts and parts[-1].verbatim and parts[-1].text.startswith("--"):
        tail = " ".join(parts.pop().text.split())
    parts = _with_announced(parts)
    is_drawn = any(part.verbatim and not part.text.startswith(("<", "http", "HTTP")) for part in parts)
    is_open = bool(parts) and parts[-1].verbatim and is_drawn and parts[-1].text[0] not in _QUOTES
    tokens: _Tokens = []
    for part in parts:
        if part.verbatim:
            tokens.append(_VERBATIM + _told(part.text.strip()))
        else:
            tokens += _TOKEN.findall(_folded(part.text, is_drawn=is_drawn))
    contents, styles = _sorted(_segments(tokens), ignore_quality_words=ignore_quality_words, in_order=is_open)
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


_QUOTES = frozenset("\"'“”‘’«»‹›「」『』《》〈〉【】〖〗`´")  # noqa: RUF001 - the marks that quote


def _folded(text: str, *, is_drawn: bool) -> str:
    """`text` folded, in lower case but for what a capital makes another word; what is Chinese in it rewritten."""
    if not is_plain(text):
        text = fold_characters(text)
    text = _lowered(text)
    for sign, pattern, becomes in _TELLING_SIGNS:
        if sign in text:
            text = pattern.sub(becomes, text)
    if not text.isascii() and chinese.is_chinese(text):
        text = chinese.rewritten(text, simplified=not is_drawn)
    return text


def _lowered(text: str) -> str:
    lowered = text.lower()
    if lowered == text:
        return text
    words = _CASED.findall(text)
    capitals = [word for word in words if not word[0].islower()]
    if len(capitals) >= _TITLE_WORDS and not any(len(word) >= _LONG_WORD and word[0].islower() for word in words):
        return lowered  # in capitals altogether, or as a title: no capital says anything
    drawn = {word for word in capitals if len(word) > 1 and word.isupper()} - _NOT_DRAWN
    if drawn and _CARRIERS.isdisjoint(words):
        drawn &= _ACRONYMS
    if not drawn and not any(word.lower() in _MAY_TELL for word in capitals):
        return lowered
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


# ── segments ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _segments(tokens: _Tokens) -> list[_Tokens]:
    """The tokens between separators, each segment rewritten; the first one without what wraps the prompt."""
    segments: list[_Tokens] = []
    segment: _Tokens = []
    for token in tokens:
        if token[-1] in _SEPARATORS and token[:2] != "::":
            if token == ":" and segment not in _HEADINGS and _says_how(_rewritten(segment)):  # noqa: S105 - a sign
                segment.append(token)  # lighting: red, background: blue
            elif segment in _COMMANDS and not segments and ("\n" in token or ":" in token):
                segment = []
            elif segment:
                segments.append(segment)
                segment = []
        else:
            segment.append(token)
    if segment:
        segments.append(segment)
    _unwrap(segments)
    return [words for segment in segments if (words := _rewritten(segment))]


def _unwrap(segments: list[_Tokens]) -> None:
    if len(segments) > 1 and segments[0] in _GREETINGS and _unwrapped(segments[1])[1]:
        del segments[0]
    while len(segments) > 1 and segments[0] in _HEADINGS:
        del segments[0]
    if not segments:
        return
    segments[0], is_asked = _unwrapped(segments[0])
    while len(segments) > 1 and segments[-1] in _THANKS and (is_asked or segments[-1] not in _MAY_BE_DRAWN):
        del segments[-1]
    last = segments[-1]
    if is_asked and last[-2:] == ["for", "me"]:
        del last[-2:]
    if len(last) > 1 and last[-1] == "please":
        del last[-1]


def _unwrapped(tokens: _Tokens) -> tuple[_Tokens, bool]:
    """The tokens that begin a prompt without what asks for it, and whether something did."""
    if tokens[0] not in _WRAPPING:
        return tokens, False
    rest = tokens
    while phrase := _begins(rest, _ASKING):
        rest = rest[len(phrase) :]
    is_asked = rest is not tokens
    if is_asked and rest and rest[0] not in _MAKING and tokens[0] not in _PLEASE:
        return tokens, False  # will you marry me
    if phrase := _begins(rest, _WANTING):
        after = rest[len(phrase) :]
        if after and (after[0] in _DETERMINERS or after[0] in _IMAGES):
            rest, is_asked = after, True
    rest, is_asked = _without_making(rest, is_asked=is_asked)
    start = 1 if rest[:1] and rest[0] in _ARTICLES else 0
    if rest[start : start + 1] and rest[start] in _IMAGES and rest[start + 1 : start + 2] and rest[start + 1] in _OF:
        if not is_asked and (rest[start] in _MANY_IMAGES or not _HANGS.isdisjoint(rest)):
            return tokens, False  # pictures of cats on a wall
        rest, is_asked = rest[start + 2 :], True
    return (rest, is_asked) if rest else (tokens, False)


def _without_making(tokens: _Tokens, *, is_asked: bool) -> tuple[_Tokens, bool]:
    """The tokens without a first word that tells to make what follows, and whether one does."""
    if not tokens or tokens[0] not in _MAKING:
        return tokens, is_asked
    after = tokens[1:]
    is_for_us = after[:1] in (["me"], ["us"]) or after[:2] in (["for", "me"], ["for", "us"])
    if is_for_us:
        after = after[1 + (after[0] == "for") :]
    if tokens[0] in _MAKING_IMAGES and not _IMAGES.intersection(after[:2]):
        return tokens, is_asked
    if is_for_us and after and after[0].endswith("ing"):
        return tokens, is_asked  # draw me dancing
    begins_noun = bool(after) and (after[0] in _DETERMINERS or after[0] in _IMAGES or after[0].isdigit())
    is_making = (begins_noun and tokens[0] != "give") or tokens[0] in _ONLY_MAKING  # give a dog a bone
    return (after, True) if after and (is_asked or is_for_us or is_making) else (tokens, is_asked)


def _begins(tokens: _Tokens, phrases: Sequence[_Tokens]) -> _Tokens:
    """The longest of `phrases` that the tokens begin with; [] if none."""
    return max((phrase for phrase in phrases if tokens[: len(phrase)] == phrase), key=len, default=[])


def _rewritten(tokens: _Tokens) -> _Tokens:
    return _with_synonyms(_without_fillers(tokens))


def _without_fillers(tokens: _Tokens) -> _Tokens:
    """The tokens without articles and the like; names are one token each, which nothing rewrites."""
    if _MAY_FILL.isdisjoint(tokens) or not _FOREIGN.isdisjoint(tokens):
        return tokens
    out: _Tokens = []
    position, length = 0, len(tokens)
    while position < length:
        token = tokens[position]
        following = tokens[position + 1] if position + 1 < length else ""
        if token in _NAMES and (name := _begins(tokens[position:], _NAMES[token].get(following, ()))):
            out.append(" ".join(name))
            position += len(name)
            continue
        position += 1
        if token in _ARTICLES:
            # Before a capital that says something it may be what makes a name of it; at the end it is a letter.
            if not following or (not following.islower() and following.isalpha() and following.isascii()):
                out.append(token)
            elif (
                (out and out[-1] in _BEFORE_OBJECTS)
                or (len(out) > 1 and out[-1] in _JOINING and out[-2] in _QUALIFYING)
                or _is_counted(tokens, position, token)
            ):
                out.append("a")
        elif token in _BEFORE_TO_BE and following in _VERBS_TO_BE:
            position += token == "there"  # noqa: S105 - a word
        elif token in _VERBS_TO_BE and following in _ARTICLES and position + 1 < length:
            out += [token, "a"]  # the bear is a hunter, and no bear hunter
            position += 1
        elif token not in _FILLERS or (out and out[-1] in _UNCHANGED):
            out.append(token)
    return out


def _is_counted(tokens: _Tokens, start: int, article: str) -> bool:
    """Whether the article before `start` tells how many or what is there: a wild deer, the glass, a fox hunting."""
    first, second, third = [*tokens[start : start + 3], "", "", ""][:3]
    if article not in _INDEFINITE:
        return first in _STUFFS and _is_noun_end(second)
    return (
        (first in _COUNTED and _is_noun_end(second))
        or ((second in _UNCHANGED or second in _STUFFS) and _is_noun_end(third))
        or (first in _PREY and second in _SPORTS and third not in _DETERMINERS)
    )


def _is_noun_end(following: str) -> bool:
    """Whether a word does not make one thing with the noun before it."""
    return (
        not following
        or following in _BEFORE_OTHERS
        or following in _PLACES
        or following in _AFTER_NOUNS
        or following.endswith(("ing", "ed"))
    )


def _with_synonyms(tokens: _Tokens) -> _Tokens:
    if _MAY_CHANGE.isdisjoint(tokens):
        return tokens
    out: _Tokens = []
    position, length = 0, len(tokens)
    while position < length:
        token = tokens[position]
        rows = _PHRASES.get(token)
        if token == "x" and _is_between_numbers(tokens, position):  # noqa: S105 - a word
            out[-1] += f"x{tokens[position + 1]}"
            position += 2
        elif rows is not None:
            for written, becomes in rows:
                if len(written) == 1 or tokens[position : position + len(written)] == written:
                    out += becomes
                    position += len(written)
                    break
            else:
                out.append(token)
                position += 1
        elif (token in _NUMBER_WORDS or token in _TENS) and tokens[position + 1 : position + 2] not in _LETTERS:
            number, position = _number(tokens, position)
            out.append(number)
        elif token in _UNITS and out and out[-1][-1:].isdigit():
            _join_unit(out, _UNITS[token], _digits_before(tokens, position))
            position += 1
        else:
            out.append(token)
            position += 1
    return out


def _is_between_numbers(tokens: _Tokens, position: int) -> bool:
    around = (*tokens[max(0, position - 1) : position], *tokens[position + 1 : position + 2])
    return len(around) == 2 and around[0].isdecimal() and around[1][0].isdecimal()  # noqa: PLR2004 - before and behind


def _number(tokens: _Tokens, position: int) -> tuple[str, int]:
    """The number in words at `position` in digits, and where the tokens go on."""
    token = tokens[position]
    if token in _NUMBER_WORDS:
        return str(_NUMBER_WORDS[token]), position + 1
    following = _NUMBER_WORDS.get(tokens[position + 1], 0) if position + 1 < len(tokens) else 0
    if 0 < following < 10:  # noqa: PLR2004 - twenty-one to ninety-nine
        return str(_TENS[token] + following), position + 2
    return str(_TENS[token]), position + 1


def _digits_before(tokens: _Tokens, position: int) -> int:
    """How many single digits, not numbers in words, stand before a token."""
    begin = position
    while begin and len(tokens[begin - 1]) == 1 and tokens[begin - 1].isdecimal():
        begin -= 1
    return position - begin


def _join_unit(out: _Tokens, unit: str, digits: int) -> None:
    """Put a unit behind the number before it, which single digits make together if people write it so."""
    torn = "".join(out[-digits:]) if digits > 1 else ""
    parts = digits if torn in _TORN_APART.get(unit, ()) else 1
    out[-parts:] = ["".join(out[-parts:]) + unit]


# ── content and style ───────────────────────────────────────────────────────────────────────────────────────────────


def _sorted(segments: list[_Tokens], *, ignore_quality_words: bool, in_order: bool) -> tuple[list[str], list[str]]:
    """What the segments show, in order, and how they want it made; `in_order`: all is taken for what they show."""
    if ignore_quality_words and not in_order:
        segments = [words for words in segments if not _is_quality(words)]
    if in_order or _is_in_parts(segments):
        return list(map(_joined, segments)), []
    contents, styles = _apart(segments)
    if _is_torn(styles) or _has_each_its_own(contents, styles) or _is_any_of_one(styles, len(contents)):
        return list(map(_joined, segments)), []
    return list(map(_joined, contents)), [style for _, style in styles]


def _apart(segments: list[_Tokens]) -> tuple[list[_Tokens], list[tuple[int, str]]]:
    """The segments that show something, and the styles, each with how many of those stand before it."""
    contents: list[_Tokens] = []
    styles: list[tuple[int, str]] = []
    is_product = False
    for words in segments:
        if _says_how(words):
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


def _is_in_parts(segments: list[_Tokens]) -> bool:
    """Whether segments belong to what stands before them: left, a cat, watercolor, right, a dog; no people, fog."""
    begins = [words[1] if words[0] in _PLACES and len(words) > 1 else words[0] for words in segments]
    words = list(chain.from_iterable(segments))
    return sum(map(_is_part, begins)) > 1 or not _PANELS.isdisjoint(words) or any(map(_negates, words))


def _negates(word: str) -> bool:
    return word in _NEGATING or (not word.isascii() and chinese.negates(word))


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


def _has_each_its_own(contents: list[_Tokens], styles: list[tuple[int, str]]) -> bool:
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


def _goes_on(words: _Tokens) -> bool:
    """Whether a segment goes on with the one before it, comma or not: a cat, in a box."""
    return words[0] in _PLACES or (words[0] in _POSES and len(words) > 1 and words[1] in _PLACES)


def _is_one(words: _Tokens) -> bool:
    """Whether nothing but one thing is told of, so that what goes on goes on about that."""
    return _BEFORE_OTHERS.isdisjoint(words) and not any(word.endswith("ing") for word in words)


def _says_how(words: _Tokens) -> bool:
    """Whether a segment says nothing of what is in the picture."""
    return bool(words) and (_is_style(words) or _is_quality(words))


def _is_quality(words: _Tokens) -> bool:
    if _QUALITY.issuperset(words):
        return not _QUALITY_CORE.isdisjoint(words) and len(words) <= _MAX_STYLE_WORDS
    return not words[-1].isascii() and chinese.is_quality("".join(words))


def _is_style(words: _Tokens) -> bool:
    if len(words) > _MAX_STYLE_WORDS:
        return False
    if not _LOOKS_CORE.isdisjoint(words):
        return all(word in _LOOKS or _MEASURE.fullmatch(word) for word in words)
    return not words[-1].isascii() and chinese.is_style("".join(words))


def _without_frame(words: _Tokens) -> tuple[_Tokens, list[str]]:
    """The words without what a shop calls its pictures, and that as style segments."""
    if words[0] in _FRAME_ENDS or words[-1] in _FRAME_ENDS:
        for frame, becomes in _FRAMES:
            length = len(frame)
            if words[:length] == frame and (len(words) == length or words[length] == "of"):
                return words[length + 1 :], becomes
            if words[-length:] == frame and len(words) > length and _is_shown(words[-length - 1]):
                return words[:-length], becomes
    elif not words[-1].isascii():
        rest, cut = chinese.without_frame(words[-1])
        if cut:
            return [*words[:-1], rest] if rest else words[:-1], [cut]
    return words, []


def _is_shown(word: str) -> bool:
    """Whether a frame behind a word is one: a baby product photo shows no baby, who holds a product photo holds it."""
    return not (word in _BEFORE_PRODUCTS or word in _BEFORE_OTHERS or word in _PLACES or word.endswith("ing"))


def _without_background(words: _Tokens) -> tuple[_Tokens, str]:
    """The words without "on a white background" at their end, and that as a style segment."""
    if words and words[-1] in _BACKGROUNDS:
        for start in range(len(words) - 2, max(0, len(words) - 2 - _MAX_BACKGROUND_WORDS), -1):
            if words[start] in _BEFORE_BACKGROUND:
                return words[:start], _joined(words[start + 1 :])
            if words[start] not in _BACKGROUND_WORDS:
                break
    return words, ""


def _joined(words: _Tokens) -> str:
    text = ""
    for word in words:
        shown = word.removeprefix(_VERBATIM)
        is_run_on = text and chinese.HAS_CJK.match(text[-1]) and chinese.HAS_CJK.match(shown[:1])
        text += shown if not text or is_run_on else f" {shown}"
    return text
