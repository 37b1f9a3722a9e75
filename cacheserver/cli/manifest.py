"""The manifest of an import: one JSON object a line, the same that an export writes.

    {"spec": {"prompt": …, "model": …}, "source": "fox.png"}
    {"key": …, "identity_digest": …, "prompt_digest": …, "facts": {…}, "source": "s3://bucket/fox.png"}

Either may have "digest", "create_time", "cost_usd" or "cost_microusd", and "tags". A source is a file, relative to the
manifest's directory, or an object that the service reads by itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any

from cacheserver.client import ExportedFacts, ExportedIdentity, ImageSpec, ImportItem, StoredImage

MAX_FILE_BYTES = 20 * 1024 * 1024
"""Largest picture that is sent: with its facts it fits the 24 MiB that the service takes in one message by default."""

_DIRECTORIES = 10_000
_S3 = "s3://"
_MAX_LINE_BYTES = 1024 * 1024
_MAX_MICROUSD = 1_000_000_000
_MICROUSD_PER_USD = 1_000_000
_MAX_TAGS = 16
_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")
_SHA256_HEX = re.compile(r"[0-9a-fA-F]{64}")

_TEXT, _WHOLE = "a text", "a whole number"
_KINDS: Mapping[str, str] = {"output_compression": _WHOLE, "seed": _WHOLE, "extra": "an object"}
_SPEC_FIELDS = {each.name: _KINDS.get(each.name, _TEXT) for each in fields(ImageSpec)}
_FACT_FIELDS = {each.name: _KINDS.get(each.name, _TEXT) for each in fields(ExportedFacts)}
_IDENTITY_FIELDS = ("key", "identity_digest", "prompt_digest")
_FIELDS = {"spec", *_IDENTITY_FIELDS, "facts", "source", "digest", "create_time", "cost_usd", "cost_microusd", "tags"}


class RowError(ValueError):
    """A line of a manifest that cannot be imported; says which field, what is wrong with it and what would be right."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a manifest, checked. `file` is what to send; None where the service reads an object by itself."""

    item: ImportItem
    file: Path | None

    @property
    def size_bytes(self) -> int:
        """How much of it is to be read. Raises OSError where its file is gone."""
        return 0 if self.file is None else self.file.stat().st_size

    def loaded(self) -> ImportItem:
        """The item with the bytes of its file.

        Raises:
            OSError: the file cannot be read.
            RowError: it has grown above what can be sent.
        """
        if self.file is None:
            return self.item
        with self.file.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise RowError(f"{self.file}: {_TOO_LARGE}")
        return replace(self.item, source=data)


_TOO_LARGE = f"is larger than {MAX_FILE_BYTES} bytes: put it into a bucket of imports.buckets and name it s3://…"


class Manifest:
    """A manifest in a file.

    Args:
        file: where it is.
        any_path: whether a source may lie outside the manifest's directory.
    """

    def __init__(self, file: Path, *, any_path: bool = False) -> None:
        self._file = file
        self._any_path = any_path
        self._directory = file.resolve().parent
        # To resolve a path looks at each of its parts; most files lie in few directories.
        self._resolved = lru_cache(_DIRECTORIES)(self._resolve)

    def check(self, most: int) -> tuple[str, int, list[str]]:
        """Look at every line and at every file: SHA-256 of the manifest, its rows, and at most `most` complaints.

        Raises:
            OSError: the manifest cannot be read.
        """
        sha256, rows, complaints = hashlib.sha256(), 0, list[str]()
        for number, line in self._lines():
            sha256.update(line)
            if not line.strip():
                continue
            rows += 1
            try:
                row = self._row(number, line)
                _check_file(row)
            except RowError as error:
                if len(complaints) < most:
                    complaints.append(f"line {number}: {error}")
        return sha256.hexdigest(), rows, complaints

    def rows(self) -> Iterator[Row]:
        """Every row, with its line's number.

        Raises:
            OSError: the manifest cannot be read.
            RowError: it has changed since it was checked.
        """
        for number, line in self._lines():
            if line.strip():
                yield self._row(number, line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines with their numbers, each at most a little longer than a row may be."""
        with self._file.open("rb") as file:
            number = 1
            while line := file.readline(_MAX_LINE_BYTES + 1):
                yield number, line
                number += 1

    def _row(self, number: int, line: bytes) -> Row:
        if len(line) > _MAX_LINE_BYTES:
            raise RowError(f"is longer than {_MAX_LINE_BYTES} bytes")
        try:
            values = json.loads(line, parse_float=Decimal)
        except (ValueError, RecursionError):
            raise RowError("is no JSON") from None
        if not isinstance(values, dict):
            raise RowError("is no JSON object")
        if unknown := sorted(values.keys() - _FIELDS):
            raise RowError(f"{unknown[0][:40]}: nobody knows this field; there are {', '.join(sorted(_FIELDS))}")
        source = _text(values, "source")
        item = ImportItem(
            row=number,
            what=_what(values),
            source=source,
            digest=_digest(values),
            create_time=_create_time(values),
            paid_microusd=_microusd(values),
            tags=_tags(values),
            facts=ExportedFacts(**_object(values, "facts", _FACT_FIELDS)) if "facts" in values else ExportedFacts(),
        )
        return Row(item, None if source.startswith(_S3) else self._path(source))

    def _resolve(self, relative: Path) -> Path:
        return (self._directory / relative).resolve()

    def _path(self, source: str) -> Path:
        relative = Path(source)
        try:
            path = self._resolved(relative.parent) / relative.name
            if relative.name in ("", "..") or path.is_symlink():
                path = path.resolve()
        except (OSError, ValueError):
            raise RowError("source: is no path") from None
        if not self._any_path and not path.is_relative_to(self._directory):
            raise RowError("source: lies outside the manifest's directory; allow it with --allow-any-path")
        return path


def row_of(stored: StoredImage, digest: str, file: str | None) -> dict[str, Any]:
    """A stored picture as a row; `file` is where its bytes are, None if they were not exported."""
    image, identity = stored.image, stored.identity
    facts = {
        "model": image.model,
        "quality": image.quality,
        "background": image.background,
        "revised_prompt": image.revised_prompt,
        "seed": image.seed,
    }
    row = {
        "key": identity.key,
        "identity_digest": identity.digest.hex(),
        "prompt_digest": identity.prompt_digest.hex(),
        "facts": {name: value for name, value in facts.items() if value not in ("", None)},
        "source": file,
        "digest": digest,
        "create_time": image.create_time.isoformat() if image.create_time else None,
        "cost_microusd": image.paid_microusd,
        "tags": list(stored.tags),
    }
    return {name: value for name, value in row.items() if value is not None}


def _check_file(row: Row) -> None:
    if row.file is None:
        return
    try:
        status = row.file.stat()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no path"
        raise RowError(f"source: {why}") from None
    if not stat.S_ISREG(status.st_mode):
        raise RowError("source: is no file")
    if status.st_size > MAX_FILE_BYTES:
        raise RowError(f"source: {_TOO_LARGE}")


def _what(values: dict[str, Any]) -> ImageSpec | ExportedIdentity:
    has_identity = any(name in values for name in _IDENTITY_FIELDS)
    if ("spec" in values) == has_identity:
        raise RowError(f"set either spec, or all of {', '.join(_IDENTITY_FIELDS)}")
    if "spec" in values:
        if "facts" in values:
            raise RowError("facts: go with a key; what is asked for stands in spec")
        spec = _object(values, "spec", _SPEC_FIELDS)
        if "prompt" not in spec:
            raise RowError("spec.prompt: must be set")
        return ImageSpec(**spec)
    digests = [_text(values, name) for name in _IDENTITY_FIELDS[1:]]
    for name, digest in zip(_IDENTITY_FIELDS[1:], digests, strict=True):
        if not _SHA256_HEX.fullmatch(digest):
            raise RowError(f"{name}: must be 64 hexadecimal digits")
    return ExportedIdentity(_text(values, "key"), *map(bytes.fromhex, digests))


def _object(values: dict[str, Any], name: str, known: Mapping[str, str]) -> dict[str, Any]:
    """A field that is an object of these fields and kinds; nulls are left out."""
    found = values[name]
    if not isinstance(found, dict):
        raise RowError(f"{name}: must be an object")
    for field, value in found.items():
        kind = known.get(field)
        if kind is None:
            raise RowError(f"{name}.{field[:40]}: nobody knows this field; there are {', '.join(known)}")
        types = {_TEXT: str, _WHOLE: int}.get(kind, dict)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            raise RowError(f"{name}.{field}: must be {kind}")
    return {field: _plain(value) for field, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    """The value with floats for what was read as exact decimals."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value:
        raise RowError(f"{name}: must be set to a text")
    return value


def _digest(values: dict[str, Any]) -> str:
    digest = values.get("digest", "")
    if not isinstance(digest, str) or (digest and not _DIGEST.fullmatch(digest)):
        raise RowError('digest: must be "sha256:" and 64 hexadecimal digits')
    return digest


def _create_time(values: dict[str, Any]) -> datetime | None:
    text = values.get("create_time")
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise RowError("create_time: must be a moment as 2026-05-04T12:30:00Z") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _microusd(values: dict[str, Any]) -> int:
    """What it cost; dollars are exact, to the micro-dollar."""
    if "cost_usd" in values and "cost_microusd" in values:
        raise RowError("cost_usd: set it or cost_microusd, not both")
    name = "cost_microusd" if "cost_microusd" in values else "cost_usd"
    value = values.get(name, 0)
    try:
        number = Decimal(value) if isinstance(value, int | str | Decimal) else None
        amount = None if number is None else number * (1 if name == "cost_microusd" else _MICROUSD_PER_USD)
    except InvalidOperation:
        amount = None
    if amount is None or isinstance(value, bool) or not amount.is_finite() or amount != amount.to_integral_value():
        raise RowError(f"{name}: must be a sum of money, to the micro-dollar")
    if not 0 <= amount <= _MAX_MICROUSD:
        raise RowError(f"{name}: must be 0 to {_MAX_MICROUSD // _MICROUSD_PER_USD} dollars")
    return int(amount)


def _tags(values: dict[str, Any]) -> tuple[str, ...]:
    tags = values.get("tags", [])
    if not isinstance(tags, list) or len(tags) > _MAX_TAGS or not all(isinstance(tag, str) for tag in tags):
        raise RowError(f"tags: must be a list of at most {_MAX_TAGS} texts")
    return tuple(tags)
