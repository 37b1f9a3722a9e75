"""What the canonical profile drops and rewrites in English, word by word, and what asks for a picture in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import chain

from cacheserver.identity.canonical_lists import rewritings, vocabulary

Tokens = list[str]
"""Words, numbers and signs, in lower case but for those whose capitals say something."""

# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PLACES = frozenset({"in", "on", "at", "under", "inside"})
BEFORE_OTHERS = frozenset({"and", "or", "with", "of", "beside", "near", "behind", "to", "at", "for", "from", "by"})

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
            "light stone rock brick marble straw toast cloth hair spring cork"
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


def _phrases(lists: Sequence[str]) -> dict[str, tuple[tuple[Tokens, Tokens], ...]]:
    """What may begin at a token and what becomes of it, longest first."""
    table: dict[str, list[tuple[Tokens, Tokens]]] = {}
    for line in chain.from_iterable(map(rewritings, lists)):
        for written, becomes in zip(line.written, line.canonical, strict=True):
            tokens = written.split()
            table.setdefault(tokens[0], []).append((tokens, becomes.split()))
    return {first: tuple(sorted(rows, key=lambda row: -len(row[0]))) for first, rows in table.items()}


def _names() -> dict[str, dict[str, tuple[Tokens, ...]]]:
    """The names by their first and second token, longest first."""
    table: dict[str, dict[str, tuple[Tokens, ...]]] = {}
    for line in vocabulary("names", frozenset()):
        tokens = line.written[0].split()
        rows = table.setdefault(tokens[0], {})
        rows[tokens[1]] = tuple(sorted((*rows.get(tokens[1], ()), tokens), key=len, reverse=True))
    return table


_PHRASES = _phrases(("spelling", "synonyms"))
_NAMES = _names()
_NO_NAMES: dict[str, tuple[Tokens, ...]] = {}
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
HEADINGS = (*(["image"], ["picture"], ["prompt"], ["image", "prompt"], ["/", "imagine", "prompt"], ["/", "imagine"]),)
COMMANDS = (["generate"], ["create"], ["draw"], ["description"], ["image", "description"])
"""Headings before a colon or a line's end alone: create, inspire, repeat."""

_GREETINGS = (["hi"], ["hello"], ["hey"], ["hi", "there"], ["hello", "there"], ["hey", "there"])
_DETERMINERS = (_ARTICLES | {"some", "my", "your", "his", "her", "their", "this"} | set(_NUMBER_WORDS)) - {"zero"}
_WRAPPING = _MAKING | _IMAGES | _ARTICLES | {phrase[0] for phrase in (*_ASKING, *_WANTING)}
_MANY_THANKS = tuple(map(str.split, ("thank you so much", "thank you very much", "thanks in advance", "many thanks")))
_THANKS = (["please"], ["thanks"], ["thank", "you"], ["thanks", "a", "lot"], ["thx"], ["pls"], *_MANY_THANKS)
_MAY_BE_DRAWN = (["thanks"], ["thank", "you"], ["thanks", "a", "lot"], *_MANY_THANKS)
"""What a card may say, where nothing is asked for."""


def with_words_for_signs(text: str) -> str:
    """`text` in lower case with what its signs say in words: 65" is 65 inch, w/o is without."""
    for sign, pattern, becomes in _TELLING_SIGNS:
        if sign in text:
            text = pattern.sub(becomes, text)
    return text


def unwrap(segments: list[Tokens]) -> None:
    """Take from the segments, none of them empty, what greets, asks, thanks or heads the prompt."""
    if len(segments) > 1 and segments[0] in _GREETINGS and _unwrapped(segments[1])[1]:
        del segments[0]
    while len(segments) > 1 and segments[0] in HEADINGS:
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


def _unwrapped(tokens: Tokens) -> tuple[Tokens, bool]:
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


def _without_making(tokens: Tokens, *, is_asked: bool) -> tuple[Tokens, bool]:
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


def _begins(tokens: Tokens, phrases: Sequence[Tokens]) -> Tokens:
    """The longest of `phrases` that the tokens begin with; [] if none."""
    return max((phrase for phrase in phrases if tokens[: len(phrase)] == phrase), key=len, default=[])


def rewritten(tokens: Tokens) -> Tokens:
    """The tokens of a segment without what does not change the picture, numbers in digits, of synonyms always one."""
    return _with_synonyms(_without_fillers(tokens))


def _without_fillers(tokens: Tokens) -> Tokens:
    """The tokens without articles and the like; names are one token each, which nothing rewrites."""
    if _MAY_FILL.isdisjoint(tokens) or not _FOREIGN.isdisjoint(tokens):
        return tokens
    out: Tokens = []
    position = 0
    for at, token in enumerate(tokens):
        if token not in _MAY_FILL or at < position:
            continue
        out += tokens[position:at]
        position = at + 1
        following = tokens[position] if position < len(tokens) else ""
        if (names := _NAMES.get(token, _NO_NAMES).get(following)) and (name := _begins(tokens[at:], names)):
            out.append(" ".join(name))
            position = at + len(name)
        elif token in _ARTICLES:
            out += _left_of_article(tokens, at, out)
        elif token in _BEFORE_TO_BE and following in _VERBS_TO_BE:
            position += token == "there"  # noqa: S105 - a word
        elif token in _VERBS_TO_BE and following in _ARTICLES and position + 1 < len(tokens):
            out += [token, "a"]  # the bear is a hunter, and no bear hunter
            position += 1
        elif token not in _FILLERS or (out and out[-1] in _UNCHANGED):
            out.append(token)
    return [*out, *tokens[position:]]


def _left_of_article(tokens: Tokens, at: int, before: Tokens) -> Tokens:
    """What of an article stays behind the tokens rewritten so far."""
    following = tokens[at + 1] if at + 1 < len(tokens) else ""
    # Before a capital that says something it may be what makes a name of it; at the end it is a letter.
    if not following or (not following.islower() and following.isalpha() and following.isascii()):
        return [tokens[at]]
    says_something = (
        (before and before[-1] in _BEFORE_OBJECTS)
        or (len(before) > 1 and before[-1] in _JOINING and before[-2] in _QUALIFYING)
        or _is_counted(tokens, at + 1, tokens[at])
    )
    return ["a"] if says_something else []


def _is_counted(tokens: Tokens, start: int, article: str) -> bool:
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
        or following in BEFORE_OTHERS
        or following in PLACES
        or following in _AFTER_NOUNS
        or following.endswith(("ing", "ed"))
    )


def _with_synonyms(tokens: Tokens) -> Tokens:
    if _MAY_CHANGE.isdisjoint(tokens):
        return tokens
    out: Tokens = []
    position = 0
    for at, token in enumerate(tokens):
        if token not in _MAY_CHANGE or at < position:
            continue
        out += tokens[position:at]
        position = at + 1
        rows = _PHRASES.get(token)
        if token == "x" and _is_between_numbers(tokens, at):  # noqa: S105 - a word
            out[-1] += f"x{tokens[position]}"
            position += 1
        elif rows is not None:
            for written, becomes in rows:
                if len(written) == 1 or tokens[at : at + len(written)] == written:
                    out += becomes
                    position = at + len(written)
                    break
            else:
                out.append(token)
        elif (token in _NUMBER_WORDS or token in _TENS) and tokens[position : position + 1] not in _LETTERS:
            number, position = _number(tokens, at)
            out.append(number)
        elif token in _UNITS and out and out[-1][-1:].isdigit():
            _join_unit(out, _UNITS[token], _digits_before(tokens, at))
        else:
            out.append(token)
    return [*out, *tokens[position:]]


def _is_between_numbers(tokens: Tokens, position: int) -> bool:
    around = (*tokens[max(0, position - 1) : position], *tokens[position + 1 : position + 2])
    return len(around) == 2 and around[0].isdecimal() and around[1][0].isdecimal()  # noqa: PLR2004 - before and behind


def _number(tokens: Tokens, position: int) -> tuple[str, int]:
    """The number in words at `position` in digits, and where the tokens go on."""
    token = tokens[position]
    if token in _NUMBER_WORDS:
        return str(_NUMBER_WORDS[token]), position + 1
    following = _NUMBER_WORDS.get(tokens[position + 1], 0) if position + 1 < len(tokens) else 0
    if 0 < following < 10:  # noqa: PLR2004 - twenty-one to ninety-nine
        return str(_TENS[token] + following), position + 2
    return str(_TENS[token]), position + 1


def _digits_before(tokens: Tokens, position: int) -> int:
    """How many single digits, not numbers in words, stand before a token."""
    begin = position
    while begin and len(tokens[begin - 1]) == 1 and tokens[begin - 1].isdecimal():
        begin -= 1
    return position - begin


def _join_unit(out: Tokens, unit: str, digits: int) -> None:
    """Put a unit behind the number before it, which single digits make together if people write it so."""
    torn = "".join(out[-digits:]) if digits > 1 else ""
    parts = digits if torn in _TORN_APART.get(unit, ()) else 1
    out[-parts:] = ["".join(out[-parts:]) + unit]
