"""What the provider emulator served and billed, call by call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One generation asked for, written down as it ended. Times are emulated seconds.

    `key` is empty if it is none of ours. `status` is 0 where no whole answer was sent. `limited`: it was answered
    429 for a rate limit, a true one or a fault. `images` are the pictures of a good answer. `started_s` is when it
    was admitted, None if it was not. `hung_up`: its caller had gone before the answer. `pictures_sha256` are the
    pictures made for it, whether or not they arrived.
    """

    request_id: str
    key: str
    prompt_sha256: str
    model: str
    size: str
    quality: str
    n: int
    status: int
    fault: str
    limited: bool
    images: int
    billed_microusd: int
    at_s: float
    started_s: float | None
    ended_s: float
    hung_up: bool
    pictures_sha256: Sequence[str] = ()


@dataclass(slots=True)
class KeyTotals:
    """What one key had."""

    calls: int = 0
    images: int = 0
    billed_microusd: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """Sums over calls. `duplicates` are billed calls whose prompt a call before them was billed for."""

    calls: int = 0
    images: int = 0
    billed_calls: int = 0
    billed_microusd: int = 0
    limited: int = 0
    by_status: dict[int, int] = field(default_factory=dict)
    by_fault: dict[str, int] = field(default_factory=dict)
    by_key: dict[str, KeyTotals] = field(default_factory=dict)
    distinct_prompts_billed: int = 0
    duplicates: int = 0

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Self:
        """The sums over these."""
        billed = [call for call in calls if call.billed_microusd]
        prompts = {call.prompt_sha256 for call in billed}
        by_key: dict[str, KeyTotals] = {}
        for call in calls:
            totals = by_key.setdefault(call.key, KeyTotals())
            totals.calls += 1
            totals.images += call.images
            totals.billed_microusd += call.billed_microusd
        return cls(
            calls=len(calls),
            images=sum(call.images for call in calls),
            billed_calls=len(billed),
            billed_microusd=sum(call.billed_microusd for call in billed),
            limited=sum(call.limited for call in calls),
            by_status=dict(Counter(call.status for call in calls)),
            by_fault=dict(Counter(call.fault for call in calls if call.fault)),
            by_key=by_key,
            distinct_prompts_billed=len(prompts),
            duplicates=len(billed) - len(prompts),
        )


def images_per_interval(calls: Iterable[Call], interval_s: float) -> list[int]:
    """How many pictures were served in each interval from time 0 on, up to the last that had any."""
    served: Counter[int] = Counter()
    for call in calls:
        if call.images:
            served[int(call.ended_s // interval_s)] += call.images
    return [served[i] for i in range(max(served, default=-1) + 1)]


class Ledger:
    """All calls, in the order they ended; in memory, and in `file` if one is given, one JSON object a line."""

    def __init__(self, file: Path | None = None) -> None:
        self._calls: list[Call] = []
        # Line-buffered: a line is with the kernel before the answer leaves, so that a SIGKILL loses no bill.
        self._file = file.open("a", buffering=1) if file is not None else None

    def add(self, call: Call) -> None:
        """Write a call down; a short write to the page cache, which the loop does not notice."""
        self._calls.append(call)
        if self._file is not None:
            self._file.write(json.dumps(asdict(call)) + "\n")

    def calls(self, since_s: float = 0.0) -> list[Call]:
        """Those that ended at `since_s` or later."""
        return [call for call in self._calls if call.ended_s >= since_s]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_ledger(file: Path) -> list[Call]:
    """The calls in a ledger's file, of all the processes that wrote to it; a line that a kill cut off is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [Call(**json.loads(line)) for line in lines if line.endswith("\n")]
