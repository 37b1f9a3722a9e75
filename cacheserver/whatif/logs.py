"""Request logs of other systems: JSON lines as rows of keys, read in parallel with the service's own identity code.

A row's key under a profile is a hash of what an identity is made of: the prompt as the profile normalizes it, model,
size and quality. Two rows share a key if and only if the service would give them one (but for 64 bits against 384).
"""

from __future__ import annotations

import json
import math
import multiprocessing
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import xxhash

from cacheserver.errors import UnreadableFileError
from cacheserver.generation.prices import PriceTable
from cacheserver.identity import normalize_prompt, validate, validate_prompt
from cacheserver.model import ImageRequest
from cacheserver.whatif.lines import Block, LineFile

FIELDS = ("time", "prompt", "model", "size", "quality", "caller")
"""What is read of a row; the first two must be there."""

NO_CALLER = 0
NO_PRICE = -1

HASH_SPAN = 1 << 64

_decode = json.JSONDecoder().decode

_AUTO = "auto"
_MAX_MEMO = 50_000
_MAX_MEMO_CHARS = 16_000_000
_MAX_TEXT_CHARS = 2_000
_MAX_BAD_TOLD = 5
_SECONDS_BELOW = 1e11
_EPOCH_UNITS = ((1e17, 1e9), (1e14, 1e6), (_SECONDS_BELOW, 1e3))
"""A time above the first is in that part of a second: nobody logs pictures of the year 5138."""


@dataclass(frozen=True, slots=True)
class LogPlan:
    """How rows become requests.

    `names` are the log's names of `FIELDS`, with dots into nested objects. `model` is that of rows without one, as the
    service's default model. `size` and `quality` are what a picture is priced as where a row leaves them to the
    provider. `profiles` are the profiles to key by, tightest first, `catalog_patterns` those of the profile catalog.
    """

    names: tuple[tuple[str, str], ...] = tuple((name, name) for name in FIELDS)
    model: str = "gpt-image-2"
    size: str = "1024x1024"
    quality: str = "medium"
    profiles: tuple[str, ...] = ("exact", "standard")
    catalog_patterns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request, and why; the reason holds nothing of the line."""

    line: int
    problem: str


@dataclass(slots=True)
class Rows:
    """The requests of a block, column by column; `keys` by profile. Costs in micro-dollars, or `NO_PRICE`."""

    keys: tuple[array[int], ...]
    lines: array[int] = field(default_factory=lambda: array("Q"))
    times_s: array[float] = field(default_factory=lambda: array("d"))
    callers: array[int] = field(default_factory=lambda: array("Q"))
    costs_microusd: array[int] = field(default_factory=lambda: array("q"))
    texts: dict[int, tuple[str, str]] = field(default_factory=dict)
    """By the loosest key below the bound: the normalized prompt, and all that is not the prompt."""
    missing: dict[str, int] = field(default_factory=dict)
    """How many rows lack a field."""
    bad: list[BadLine] = field(default_factory=list)
    bad_lines: int = 0


def read_log(
    file: LineFile, plan: LogPlan, *, workers: int, texts_below: Callable[[], int] = lambda: 0
) -> Iterator[Rows]:
    """The requests of a log, block by block, in the order of the file.

    Args:
        file: JSON lines.
        plan: how rows become requests.
        workers: processes beside this one; 0 reads here.
        texts_below: asked for each block: prompts whose loosest key lies below come along as text.

    Raises:
        UnreadableFileError: the file cannot be read, or a process that reads it was killed.
    """
    if not workers:
        for block in file.blocks():
            yield read_block(block, plan, texts_below())
        return
    try:
        yield from _read_by_processes(file, plan, workers, texts_below)
    except (BrokenProcessPool, OSError) as error:
        raise UnreadableFileError(
            f"{file.path}: a process to read it was killed or cannot be started, as happens where memory runs out; "
            "free some and try again"
        ) from error


def _read_by_processes(file: LineFile, plan: LogPlan, workers: int, texts_below: Callable[[], int]) -> Iterator[Rows]:
    waiting: deque[Future[Rows]] = deque()
    # Spawned, not forked: a fork of a process with threads may inherit a lock that nobody will release.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for block in file.blocks():
                waiting.append(pool.submit(read_block, block, plan, texts_below()))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_block(block: Block, plan: LogPlan, texts_below: int) -> Rows:
    """The requests of one block."""
    reader = _reader(plan)
    rows = Rows(keys=tuple(array("Q") for _ in plan.profiles))
    for number, line in enumerate(block.lines(), block.first_line):
        if not line or line.isspace():
            continue
        try:
            reader.add(line, number, rows, texts_below)
        except _BadRowError as error:
            rows.bad_lines += 1
            if len(rows.bad) < _MAX_BAD_TOLD:
                rows.bad.append(BadLine(number, str(error)))
    return rows


def prompt_of(line: bytes, plan: LogPlan) -> str:
    """The prompt of a line that is a request."""
    return _reader(plan).prompt(json.loads(line))


class _BadRowError(Exception):
    """A line is no request."""


@cache
def _reader(plan: LogPlan) -> _Reader:
    return _Reader(plan)


@dataclass(frozen=True, slots=True)
class _Known:
    """What follows from a request alone."""

    keys: tuple[int, ...]
    cost_microusd: int
    text: str
    rest: str


class _Reader:
    """Reads lines; what it made of a request is remembered, since logs repeat themselves."""

    def __init__(self, plan: LogPlan) -> None:
        self._plan = plan
        self._paths = {ours: tuple(theirs.split(".")) for ours, theirs in plan.names}
        self._columns = [(theirs, tuple(theirs.split(".")) if "." in theirs else None) for _, theirs in plan.names]
        self._prices = PriceTable.load()
        self._memo: dict[tuple[str, str | None, str | None, str | None], _Known] = {}
        self._memo_chars = 0
        self._valid_settings: set[tuple[str, str, str]] = set()
        self._costs: dict[tuple[str, str, str], int] = {}

    def add(self, line: bytes, number: int, rows: Rows, texts_below: int) -> None:
        """Add a line's request to the columns. Raises _BadRowError."""
        try:
            # As text: of bytes json finds out the encoding first, each time.
            row = _decode(line.decode() if number > 1 else line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            raise _BadRowError("is no JSON, or longer than a line may be") from None
        if not isinstance(row, dict):
            raise _BadRowError("is no JSON object")
        time, *picture, caller = [row.get(name) if path is None else _inside(row, path) for name, path in self._columns]
        time_s = self._time_s(time)
        known = self._known(*picture)
        rows.lines.append(number)
        rows.times_s.append(time_s)
        for column, key in zip(rows.keys, known.keys, strict=True):
            column.append(key)
        rows.callers.append(NO_CALLER if caller is None else xxhash.xxh3_64_intdigest(_bytes(caller)) or 1)
        rows.costs_microusd.append(known.cost_microusd)
        loosest = known.keys[-1]
        if loosest < texts_below and len(known.text) <= _MAX_TEXT_CHARS:
            rows.texts[loosest] = (known.text, known.rest)
        if None in picture or caller is None:
            for name, value in zip(FIELDS[2:], (*picture[1:], caller), strict=True):
                if value is None:
                    rows.missing[name] = rows.missing.get(name, 0) + 1

    def prompt(self, row: Any) -> str:
        """The prompt of a row that is a request."""
        return str(_inside(row, self._paths["prompt"]))

    def _known(self, prompt: Any, model: Any, size: Any, quality: Any) -> _Known:
        """What follows from these. Raises _BadRowError, as what is no text never gets into the memory."""
        try:
            known = self._memo.get((prompt, model, size, quality))
        except TypeError:  # a list or an object
            known = None
        if known is None:
            known = self._found_out(self._request(prompt, model, size, quality))
            if len(self._memo) >= _MAX_MEMO or self._memo_chars >= _MAX_MEMO_CHARS:
                self._memo.clear()
                self._memo_chars = 0
            self._memo[prompt, model, size, quality] = known
            self._memo_chars += len(prompt) + len(known.text)
        return known

    def _request(self, prompt: Any, model: Any, size: Any, quality: Any) -> ImageRequest:
        """The request a row stands for, with what the service puts where nothing is said. Raises _BadRowError."""
        if not isinstance(prompt, str):
            raise _BadRowError(f"{self._name('prompt')}: {'is missing' if prompt is None else 'is no text'}")
        request = ImageRequest(
            prompt,
            self._text("model", model, self._plan.model),
            size=self._text("size", size, _AUTO),
            quality=self._text("quality", quality, _AUTO),
        )
        settings = request.model, request.size, request.quality
        violations = validate_prompt(prompt) if settings in self._valid_settings else validate(request)
        for path, problem in violations.items():
            raise _BadRowError(f"{self._name(path)}: {problem}")
        if len(self._valid_settings) < _MAX_MEMO:
            self._valid_settings.add(settings)
        return request

    def _found_out(self, request: ImageRequest) -> _Known:
        plan = self._plan
        rest = f"{request.model}\0{request.size}\0{request.quality}"
        texts = [normalize_prompt(request.prompt, profile, plan.catalog_patterns) for profile in plan.profiles]
        return _Known(
            keys=tuple(xxhash.xxh3_64_intdigest(f"{rest}\0{text}".encode()) for text in texts),
            cost_microusd=self._cost_microusd(request),
            text=texts[-1],
            rest=rest,
        )

    def _cost_microusd(self, request: ImageRequest) -> int:
        size = self._plan.size if request.size == _AUTO else request.size
        quality = self._plan.quality if request.quality == _AUTO else request.quality
        cost = self._costs.get((request.model, size, quality))
        if cost is None:
            priced = self._prices.cost_microusd(request.model, size, quality, None, 1)
            cost = NO_PRICE if priced is None else priced
            if len(self._costs) < _MAX_MEMO:
                self._costs[request.model, size, quality] = cost
        return cost

    def _time_s(self, value: Any) -> float:
        if value is None:
            raise _BadRowError(f"{self._name('time')}: is missing")
        time_s = _moment_s(value)
        if time_s is None:
            raise _BadRowError(f"{self._name('time')}: is neither seconds since 1970 nor an ISO 8601 time")
        return time_s

    def _text(self, field_name: str, value: Any, default: str) -> str:
        if value is None or value == "":
            return default
        if not isinstance(value, str):
            raise _BadRowError(f"{self._name(field_name)}: is no text")
        return value

    def _name(self, field_name: str) -> str:
        return ".".join(self._paths.get(field_name, (field_name,)))


def _inside(row: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        row = row.get(step) if isinstance(row, dict) else None
    return row


def _moment_s(value: Any) -> float | None:
    """Seconds since 1970 of a number (also in milli-, micro- or nanoseconds) or an ISO 8601 text, UTC if not said."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > HASH_SPAN:
        return None
    if not math.isfinite(value):
        return None
    if abs(value) <= _SECONDS_BELOW:
        return float(value)
    return value / next(per_s for above, per_s in _EPOCH_UNITS if abs(value) > above)


def _bytes(value: Any) -> bytes:
    return str(value).encode("utf-8", "surrogatepass")
