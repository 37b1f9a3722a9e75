"""The rows of `cacheserver warm`: CSV, JSON lines or plain text, read as a stream, each row checked."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from cacheserver.client import ImageSpec, WarmItem

_CHUNK_BYTES = 1024 * 1024
_MAX_FIELD_CHARACTERS = 1_000_000
_DELIMITERS = (",", ";", "\t")
_TAGS = re.compile(r"[\s,]+")

_SPEC_TEXTS = ("model", "size", "quality", "background", "output_format", "moderation")
_SPEC_NUMBERS = ("output_compression", "seed")
_LARGEST = {"seed": 2**63 - 1}
_LARGEST_OTHERWISE = 2**31 - 1
FIELDS = ("prompt", "namespace", "n", "use", "tags", "candidates", "ttl_s", "refresh")
"""What a row may say beside what an ImageSpec has."""

_KNOWN = (*FIELDS, *_SPEC_TEXTS, *_SPEC_NUMBERS, "extra")


class InputFormat(StrEnum):
    """How a file of rows is written."""

    CSV = "csv"
    JSONL = "jsonl"
    TEXT = "text"


_FORMATS = {
    ".csv": InputFormat.CSV,
    ".tsv": InputFormat.CSV,
    ".jsonl": InputFormat.JSONL,
    ".ndjson": InputFormat.JSONL,
    ".txt": InputFormat.TEXT,
    "": InputFormat.TEXT,
}


class InputError(ValueError):
    """The input as a whole cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. `line` is where it begins, from 1; `text` repeats nothing of it."""

    line: int
    text: str


class Template:
    """A prompt with places for the columns of a row: "a photo of {product}"; {{ and }} are braces."""

    def __init__(self, text: str) -> None:
        """Raises InputError where it cannot be used."""
        self.text = text
        self._parts: list[tuple[str, str | None]] = []
        try:
            for literal, name, spec, conversion in string.Formatter().parse(text):
                if name is not None and (not name or spec or conversion or not set(name).isdisjoint(".[]")):
                    raise InputError(f"--template: {{{name}}} must be the name of a column and nothing else")
                self._parts.append((literal, name))
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(f"--template: {error}") from None
        self.variables = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        if not self.variables:
            raise InputError("--template: has no {variable}: every row would ask for the same picture")

    def expand(self, values: Mapping[str, Any]) -> str:
        """The prompt of one row. Raises ValueError for a variable that it lacks or leaves empty."""
        for name in self.variables:
            if name not in values:
                raise ValueError(f"{name}: is a variable of the template, and the row has no such column")
            if not isinstance(values[name], str | int | float) or not str(values[name]).strip():
                raise ValueError(f"{name}: is a variable of the template, and empty or no text here")
        return "".join(literal + ("" if name is None else str(values[name]).strip()) for literal, name in self._parts)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What counts where a row says nothing. `spec` holds fields of an ImageSpec."""

    spec: Mapping[str, Any] = field(default_factory=dict)
    namespace: str | None = None
    n: int = 1
    use: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """A file of rows, and how they become items."""

    path: Path
    form: InputFormat
    defaults: Defaults
    template: Template | None = None

    def digest(self, *more: str) -> str:
        """SHA-256, in hexadecimal, of the file and of all that decides what its rows ask for."""
        says = {"form": self.form, "template": self.template and self.template.text, "defaults": asdict(self.defaults)}
        digest = hashlib.sha256(json.dumps([says, more], sort_keys=True).encode())
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def rows(self) -> Iterator[WarmItem | BadRow]:
        """Every row, numbered by the line it begins at. Never more than one of them is held.

        Raises:
            InputError: the header cannot be used.
            OSError: the file cannot be read.
        """
        # What is no UTF-8 is found row by row below, and named with its line.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, values in _READERS[self.form](file, self._check_columns):
                yield BadRow(line, values) if isinstance(values, str) else self._row(line, values)

    def _check_columns(self, names: Sequence[str]) -> None:
        if self.template is not None:
            lacking = [name for name in self.template.variables if name not in names]
            if lacking:
                raise InputError(
                    f"line 1: no column {lacking[0]}, which the template names; there are: {_listed(names)}"
                )
        elif "prompt" not in names:
            raise InputError(f"line 1: no column prompt; there are: {_listed(names)}")
        else:
            unknown = [name for name in names if name not in _KNOWN]
            if unknown:
                raise InputError(f"line 1: {unknown[0]} is no column of a warm-up; there may be: {_listed(_KNOWN)}")

    def _row(self, line: int, values: Mapping[str, Any]) -> WarmItem | BadRow:
        try:
            if not _is_unicode(values):
                raise ValueError("is not UTF-8: save the file as UTF-8")  # noqa: TRY301 - one place tells of the line
            values = values if self.template is None else {"prompt": self.template.expand(values)}
            return _item(line, values, self.defaults)
        except ValueError as error:
            return BadRow(line, str(error))


def format_of(path: Path) -> InputFormat:
    """The format that a file's name tells. Raises InputError for one that tells none."""
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise InputError(f"{path}: say --input-format csv, jsonl or text; {path.suffix} tells nothing")
    return form


_Read = Iterator[tuple[int, Mapping[str, Any] | str]]
_Check = Callable[[Sequence[str]], None]


def _read_csv(file: io.TextIOBase, check: _Check) -> _Read:
    """The values of each row by its columns, or what is wrong with it."""
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    first = file.readline()
    reader = csv.reader(_continued(first, file), delimiter=max(_DELIMITERS, key=first.count), strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if names is None:
                raise InputError(f"line {line}: no header ({error})") from None
            yield line, f"is no CSV ({error})"
            continue
        if not any(value.strip() for value in values):
            continue
        if names is None:
            names = [value.strip() for value in values]
            if len(set(names)) < len(names):
                raise InputError("line 1: two columns have one name")
            check(names)
        elif len(values) != len(names):
            yield line, f"has {len(values)} columns, and the header has {len(names)}"
        else:
            yield line, dict(zip(names, values, strict=True))


def _continued(first: str, file: io.TextIOBase) -> Iterator[str]:
    yield first
    yield from file


def _read_jsonl(file: io.TextIOBase, _: _Check) -> _Read:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):  # nested without end
            yield line, "is no JSON"
            continue
        if isinstance(values, str):
            values = {"prompt": values}
        yield line, values if isinstance(values, dict) else "must be a JSON object, or a prompt as a JSON string"


def _read_text(file: io.TextIOBase, check: _Check) -> _Read:
    check(["prompt"])
    for line, text in enumerate(file, 1):
        if text.strip():
            yield line, {"prompt": text.strip()}


_READERS: Mapping[InputFormat, Callable[[Any, _Check], _Read]] = {
    InputFormat.CSV: _read_csv,
    InputFormat.JSONL: _read_jsonl,
    InputFormat.TEXT: _read_text,
}


def _item(line: int, values: Mapping[str, Any], defaults: Defaults) -> WarmItem:
    """What a row asks for. Raises ValueError that names the column."""
    for name in values:
        if name not in _KNOWN:
            raise ValueError(f"{name[:40]}: is no column of a warm-up; there may be: {_listed(_KNOWN)}")
    given = {name: value for name, value in values.items() if value is not None and value != ""}
    prompt = _text(given, "prompt")
    if prompt is None or not prompt.strip():
        raise ValueError("prompt: is empty")
    spec: dict[str, Any] = {name: _text(given, name) for name in _SPEC_TEXTS}
    spec |= {name: _number(given, name) for name in _SPEC_NUMBERS}
    spec["extra"] = _extra(given)
    spec = {**defaults.spec, **{name: value for name, value in spec.items() if value is not None}}
    n = _number(given, "n")
    return WarmItem(
        row=line,
        prompt=ImageSpec(prompt, **spec),
        namespace=_text(given, "namespace") or defaults.namespace,
        n=defaults.n if n is None else n,
        tags=_tags(given) or defaults.tags,
        use=_text(given, "use") or defaults.use,
        candidates=_number(given, "candidates"),
        ttl_s=_number(given, "ttl_s"),
        refresh=_truth(given, "refresh"),
    )


def _text(values: Mapping[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}: must be text")
    return value if value is None or name == "prompt" else value.strip()


def _number(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError  # noqa: TRY301, TRY004 - told below, as for a text that is none
        number = int(value)
    except ValueError:
        raise ValueError(f"{name}: must be a whole number") from None
    largest = _LARGEST.get(name, _LARGEST_OTHERWISE)
    if abs(number) > largest:
        raise ValueError(f"{name}: must be at most {largest}")
    return number


def _truth(values: Mapping[str, Any], name: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    value = str(values.get(name, "false")).strip().lower()
    if value not in known:
        raise ValueError(f"{name}: must be true or false")
    return known[value]


def _tags(values: Mapping[str, Any]) -> tuple[str, ...]:
    value = values.get("tags", "")
    if isinstance(value, str):
        return tuple(tag for tag in _TAGS.split(value) if tag)
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return tuple(value)
    raise ValueError("tags: must be words between spaces or commas, or a JSON list of them")


def _extra(values: Mapping[str, Any]) -> dict[str, Any] | None:
    value = values.get("extra")
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):  # nested without end
        value = ()
    if value is not None and not isinstance(value, dict):
        raise ValueError("extra: must be a JSON object")
    return value


def _is_unicode(values: Mapping[str, Any]) -> bool:
    try:
        for name, value in values.items():
            name.encode()
            if isinstance(value, str):
                value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
