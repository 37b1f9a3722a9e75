r"""A namespace's list of what no prompt may hold, read from a file.

One word, phrase or /pattern/ a line; a line that begins with `#` is a comment. Both sides are folded before they
are compared: NFKC and case folded, white space to single spaces, what cannot be seen and strokes over letters
dropped. Accents that a language writes stay: "schön" is not "schon". Nor is one letter taken for another that
looks like it; a pattern is for that.

- A word or phrase has to stand alone in scripts that set spaces: "ass" is not in "glass", nor "ass" in "ass2".
  In scripts without spaces (Chinese, Japanese, Korean, Thai and their like) it is found anywhere.
- A pattern is a regular expression, found anywhere, without regard to case. It sees the prompt folded but for its
  case, so ß is still ß. A match counts up to 250 characters. Patterns come from the operator and are trusted:
  prompts are taken in windows, which holds a clumsy pattern such as `a.*b.*c` to a tenth of a second for the
  longest of them, but nothing holds nested repeats such as `(a+)+`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from cacheserver.errors import ConfigError
from cacheserver.identity.characters import UNSPACED, fold_characters

_log = structlog.get_logger(__name__)

_MAX_FILE_BYTES = 4 * 1024 * 1024
_MAX_ENTRY_CHARS = 256
_MAX_PATTERNS = 100
_WINDOW, _STEP = 500, 250

_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # control characters that are no white space
    # Unicode's Default_Ignorable_Code_Point, and marks of annotations.
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
_STROKES = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")
"""Marks that fit any letter; those still there after composition are no part of a letter that is written."""

_MARKS = "".join(chr(code) for code in range(0x0483, 0x1D00) if unicodedata.category(chr(code)) in {"Mn", "Mc"})
"""Vowel signs and their like: parts of words that regular expressions do not take for such."""

_LETTERS = rf"[^\W_{UNSPACED}]"
_WORD = re.compile(rf"{_LETTERS}++(?:[{_MARKS}]++{_LETTERS}*+)*+")
_IN_WORD = re.compile(rf"{_LETTERS}|[{_MARKS}]")


class DenyRules:
    """The words, phrases and patterns of one reading of a list. Never changes."""

    def __init__(self, phrases: Iterable[str], patterns: Sequence[re.Pattern[str]]) -> None:
        """`phrases` are folded, and none is empty."""
        self._patterns = tuple(patterns)
        self._by_word: dict[str, list[str]] = {}
        self._by_character: dict[str, list[str]] = {}
        for phrase in sorted(set(phrases)):
            if word := _WORD.match(phrase):
                self._by_word.setdefault(word[0], []).append(phrase)
            else:
                self._by_character.setdefault(phrase[0], []).append(phrase)

    def denies(self, prompt: str) -> bool:
        """Whether the prompt holds something of the list."""
        seen = _as_seen(prompt)
        return self._has_phrase(_fold_case(seen)) or any(_is_in(pattern, seen) for pattern in self._patterns)

    def _has_phrase(self, text: str) -> bool:
        # Only phrases whose first word (or sign) is there are looked for: the list's length costs nothing.
        begun: list[Sequence[str]] = []
        if self._by_word:
            begun += [self._by_word[word] for word in self._by_word.keys() & set(_WORD.findall(text))]
        if self._by_character:
            begun += [self._by_character[character] for character in self._by_character.keys() & set(text)]
        return any(_stands_in(phrase, text) for phrases in begun for phrase in phrases)


class DenyList:
    """A list's file, and its rules as last read. One may serve several namespaces."""

    def __init__(self, path: Path) -> None:
        """Reads the file, so call it in a thread, or before there is a loop.

        Raises:
            ConfigError: it cannot be read, or a line of it cannot be used.
        """
        self._path = path
        self._state = _state(path)
        self._rules = _read(path)

    @property
    def rules(self) -> DenyRules:
        """The rules in force; another object as soon as another file is."""
        return self._rules

    def reload(self) -> bool:
        """Read the file again if it changed; whether its rules are in force from now on.

        Reads from disk: call it in a thread, every few seconds. A file that is broken or gone leaves the old
        rules in force, and a warning in the log, once until the file changes again.
        """
        state = _state(self._path)
        if state == self._state:
            return False
        # Before the file is read: what is written meanwhile is a change that the next call sees.
        self._state = state
        try:
            self._rules = _read(self._path)
        except ConfigError as error:
            _log.warning("deny_list_kept", error=str(error))
            return False
        _log.info("deny_list_reloaded", path=str(self._path))
        return True


class _State(NamedTuple):
    """What tells a file from the one that was there before."""

    inode: int
    modified_ns: int
    size_bytes: int


def _state(path: Path) -> _State | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _State(found.st_ino, found.st_mtime_ns, found.st_size)


def _read(path: Path) -> DenyRules:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"deny-list {path}: cannot be read: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"deny-list {path}: must be at most {_MAX_FILE_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"deny-list {path}, line {line}: is not UTF-8") from None
    return _rules(path, text)


def _rules(path: Path, text: str) -> DenyRules:
    phrases: list[str] = []
    patterns: list[re.Pattern[str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        try:
            if entry.startswith("/"):
                patterns.append(_pattern(entry, number=len(patterns) + 1))
            else:
                phrases.append(_phrase(entry))
        except ValueError as error:
            raise ConfigError(f"deny-list {path}, line {number}: {error}") from error
    return DenyRules(phrases, patterns)


def _phrase(entry: str) -> str:
    if len(entry) > _MAX_ENTRY_CHARS:
        raise ValueError(f"a word or phrase has at most {_MAX_ENTRY_CHARS} characters, not {len(entry):,}")
    folded = _fold_case(_as_seen(entry))
    if not folded:
        raise ValueError("nothing of it can be seen")
    return folded


def _pattern(entry: str, *, number: int) -> re.Pattern[str]:
    """The `number`th pattern of a list."""
    if number > _MAX_PATTERNS:
        raise ValueError(f"a list has at most {_MAX_PATTERNS} patterns; words and phrases may be many")
    if len(entry) < len("/x/") or not entry.endswith("/"):
        raise ValueError("a pattern stands between two slashes: /pattern/")
    source = unicodedata.normalize("NFC", entry[1:-1])
    if len(source) > _MAX_ENTRY_CHARS:
        raise ValueError(f"a pattern has at most {_MAX_ENTRY_CHARS} characters, not {len(source):,}")
    try:
        pattern = re.compile(source, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from error
    if pattern.search(""):
        raise ValueError("the pattern matches the empty text, so every prompt; ask for at least one character")
    return pattern


def _as_seen(text: str) -> str:
    """`text` as a reader sees it, in one way of writing; its case is left alone."""
    if not (text.isascii() and text.isprintable()):
        text = _composed(fold_characters(_UNSEEN.sub("", text)))
    return " ".join(text.split())


def _fold_case(text: str) -> str:
    """`text` case folded; folding takes letters apart, and they are put together again."""
    folded = text.casefold()
    return folded if folded.isascii() else _composed(folded)


def _composed(text: str) -> str:
    return _STROKES.sub("", unicodedata.normalize("NFKC", text))


def _stands_in(phrase: str, text: str) -> bool:
    """Whether `text` has the phrase with no word cut at its ends."""
    at = text.find(phrase)
    while at >= 0:
        end = at + len(phrase)
        if not (_is_cut(text, at) or _is_cut(text, end)):
            return True
        at = text.find(phrase, at + 1)
    return False


def _is_cut(text: str, at: int) -> bool:
    """Whether a word lies across this place."""
    return 0 < at < len(text) and bool(_IN_WORD.match(text, at - 1) and _IN_WORD.match(text, at))


def _is_in(pattern: re.Pattern[str], text: str) -> bool:
    """Whether the pattern matches somewhere, within a window."""
    if len(text) <= _WINDOW:
        return pattern.search(text) is not None
    # A window's end looks like the text's to `$` and `\b`: what is found counts if it is there in the whole text.
    return any(
        pattern.match(text, found.start())
        for start in range(0, len(text), _STEP)
        for found in pattern.finditer(text, start, start + _WINDOW)
    )
