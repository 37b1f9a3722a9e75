"""Traces: one CSV row for each picture that a service answered, and what a replay reads of it.

Two kinds of file are read. Ours, as recording.py writes them, with the columns of `COLUMNS`: hashes in place of
prompts. And any with the columns `time_s`, `prompt_id`, `quality` and `size_bytes`: there prompt and quality are the
key, and what a picture would have cost is by quality alone, from a price list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import xxhash

from cacheserver.errors import UnreadableFileError
from cacheserver.whatif.lines import LineFile

COLUMNS = (
    "time_s",
    "key",
    "exact",
    "standard",
    "catalog",
    "partition",
    "variant",
    "quality",
    "size_bytes",
    "cost_microusd",
    "tier",
    "outcome",
    "namespace",
    "sample",
)
"""Of a recorded trace. `key` is the fingerprint the picture was asked for by; `exact`, `standard` and `catalog` those
it has under each profile, empty where it was asked for by its key. `cost_microusd` is what it cost when it was made; of
one derived from another it is what that spared. `sample` is the share of all keys that were recorded then, 0 to 1."""

RECORDED = "recorded"
"""In place of a profile: the keys as they were."""

_PROFILES = ("exact", "standard", "catalog")
_FOREIGN = ("time_s", "prompt_id", "quality", "size_bytes")
_HASH_SPAN = 1 << 32
_MAX_LINE_BYTES = 4_096

Price = Callable[[str], int]
"""What a picture of a quality costs, in micro-dollars."""


class Asked(NamedTuple):
    """One picture asked for.

    `key` is a hash of 64 bits; `draw` lies between 0 and 1 and is the same for all keys that any profile makes one.
    """

    time_s: float
    key: int
    draw: float
    size_bytes: int
    cost_microusd: int
    sample: float


class Trace:
    """A trace in a file; it can be read more than once.

    Args:
        path: the file, plain or gzip.
        price: for traces that do not tell what pictures cost.
    """

    def __init__(self, path: Path, *, price: Price) -> None:
        self._path = path
        self._price = cache(price)
        self._columns: list[str] = []
        self.is_cut = False
        """Whether the file's gzip stream ended early; known once it has been read."""

    @property
    def is_priced_here(self) -> bool:
        """Whether the costs are from the price list and not from the trace; known once it has been read."""
        return "prompt_id" in self._columns

    def read(self, profile: str = RECORDED) -> Iterator[Asked]:
        """All pictures asked for, in the order of the file, keyed as `profile` would have keyed them.

        A gzip stream that ends early ends the reading: what a service had not written when it was killed is not there.

        Raises:
            UnreadableFileError: names the file, and the line and column that cannot be used.
        """
        lines = self._lines()
        _, header = next(lines, (0, b""))
        self._columns = header.decode("utf-8-sig", "replace").strip().split(",")
        asked = self._asked_of(profile)
        for number, line in lines:
            values = line.rstrip(b"\r").decode("utf-8", "replace").split(",")
            if len(values) != len(self._columns):
                columns = len(self._columns)
                raise UnreadableFileError(f"{self._path}, line {number:,}: has {len(values)} columns and not {columns}")
            try:
                one = asked(values)
            except ValueError as error:
                raise UnreadableFileError(f"{self._path}, line {number:,}: {error}") from error
            yield one

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        file = LineFile(self._path, max_line_bytes=_MAX_LINE_BYTES)
        for block in file.blocks():
            for number, line in enumerate(block.lines(), block.first_line):
                if line.strip():
                    yield number, line
        self.is_cut = file.is_cut

    def _asked_of(self, profile: str) -> Callable[[list[str]], Asked]:
        at = {name: index for index, name in enumerate(self._columns)}
        if at.keys() >= set(COLUMNS):
            return _recorded(at, profile)
        if not at.keys() >= set(_FOREIGN):
            raise UnreadableFileError(
                f"{self._path}: no trace: its first line should name the columns {', '.join(COLUMNS)}, "
                f"or at least {', '.join(_FOREIGN)}"
            )
        if profile != RECORDED:
            raise UnreadableFileError(f"{self._path}: holds no keys of profiles, so only its own can be replayed")
        return _foreign(at, self._price)


def drawn(fingerprint: str) -> float:
    """Where a key lies between 0 and 1, by its first 32 bits: those below a share are that share of all keys."""
    return int(fingerprint[:8], 16) / _HASH_SPAN


def _recorded(at: Mapping[str, int], profile: str) -> Callable[[list[str]], Asked]:
    key, wanted, catalog = at["key"], at[profile if profile in _PROFILES else "key"], at["catalog"]
    partition, variant = at["partition"], at["variant"]
    time, size, cost, sample = at["time_s"], at["size_bytes"], at["cost_microusd"], at["sample"]

    def asked(values: list[str]) -> Asked:
        name = f"{values[partition]}.{values[wanted] or values[key]}.{values[variant]}"
        return Asked(
            _seconds(values[time]),
            xxhash.xxh3_64_intdigest(name.encode()),
            _draw(values[catalog] or values[key]),
            _count("size_bytes", values[size]),
            _count("cost_microusd", values[cost]),
            _share(values[sample]),
        )

    return asked


def _foreign(at: Mapping[str, int], price: Price) -> Callable[[list[str]], Asked]:
    time, prompt, quality, size = (at[name] for name in _FOREIGN)

    def asked(values: list[str]) -> Asked:
        return Asked(
            _seconds(values[time]),
            xxhash.xxh3_64_intdigest(f"{values[prompt]}\0{values[quality]}".encode()),
            (xxhash.xxh3_64_intdigest(values[prompt].encode()) >> 32) / _HASH_SPAN,
            _count("size_bytes", values[size]),
            price(values[quality]),
            1.0,
        )

    return asked


def _seconds(text: str) -> float:
    value = _number("time_s", text)
    if not math.isfinite(value):
        raise ValueError("time_s: is not finite")
    return value


def _draw(fingerprint: str) -> float:
    try:
        return drawn(fingerprint)
    except ValueError:
        raise ValueError("catalog or key: is no hexadecimal fingerprint") from None


def _share(text: str) -> float:
    value = _number("sample", text)
    if not 0 < value <= 1:
        raise ValueError("sample: is not above 0 and at most 1")
    return value


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):  # noqa: PLR2004 - below 2**53
        raise ValueError(f"{name}: is no whole number")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: is no number") from None
