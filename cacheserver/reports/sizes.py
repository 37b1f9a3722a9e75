"""What a replay of real requests says about other sizes of the memory level: the JSON of `report --replay`, read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

MAX_BYTES: Final = 1024 * 1024
"""The largest file accepted: a replay's result has a row for each size tried, not for each request."""

_MAX_ROWS: Final = 1_000
_MAX_PROFILE: Final = 40
_TWICE_WITHIN: Final = 0.02


@dataclass(frozen=True, slots=True)
class Sized:
    """What a memory level of one size would have answered.

    Attributes:
        l1_bytes: Its size; None is one that never has to evict.
        share: Its part of the bytes of all distinct pictures, 0 to 1; None if not told.
        ttl_s: How long a picture is kept; None is for ever.
        profile: By which rules two prompts are the same.
        hit_rate: From 0 to 1.
    """

    l1_bytes: int | None
    share: float | None
    ttl_s: float | None
    profile: str
    hit_rate: float
    saved_microusd: int
    hits: int

    @property
    def kind(self) -> str:
        """What beside the size decides the figures, in words."""
        kept = "kept until evicted" if self.ttl_s is None else f"kept {self.ttl_s / 3600:,.3g} h at most"
        return f"{kept}, profile {self.profile}" if self.profile else kept


@dataclass(frozen=True, slots=True)
class Doubling:
    """Two sizes of which one is twice the other, all else equal."""

    single: Sized
    double: Sized


@dataclass(frozen=True, slots=True)
class Sizes:
    """The figures of all sizes that were tried: one kind after the other as the replay has them, the smallest first.

    Attributes:
        footprint_bytes: Bytes of all distinct pictures of the trace.
        requests: How many requests the trace has.
    """

    footprint_bytes: int
    requests: int
    rows: tuple[Sized, ...]

    @property
    def doublings(self) -> list[Doubling]:
        """Every pair of sizes of which one is twice the other."""
        return [
            Doubling(single, double)
            for single in self.rows
            for double in self.rows
            if single.kind == double.kind and _is_twice(single.l1_bytes, double.l1_bytes)
        ]


def _is_twice(single: int | None, double: int | None) -> bool:
    return bool(single and double) and math.isclose(double or 0, 2 * (single or 0), rel_tol=_TWICE_WITHIN)


def read_sizes(data: bytes) -> Sizes:
    """The figures in the JSON that `cacheserver report --replay … --json` prints.

    Raises:
        ValueError: it is something else; the message names the field.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES} bytes")
    try:
        document = json.loads(data.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} in line {error.lineno}") from None
    except RecursionError:
        raise ValueError("not the result of a replay: nested too deeply") from None
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ValueError("no result of a replay: rows is missing")  # noqa: TRY004 - wrong is the file, not a program
    if len(document["rows"]) > _MAX_ROWS:
        raise ValueError(f"rows: more than {_MAX_ROWS}")
    rows = [_sized(row, f"rows[{index}]") for index, row in enumerate(document["rows"])]
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(row.kind for row in rows))}
    return Sizes(
        footprint_bytes=_whole(document, "footprint_bytes", ""),
        requests=_whole(document, "requests", ""),
        rows=tuple(sorted(rows, key=lambda row: (kinds[row.kind], row.l1_bytes or math.inf))),
    )


def _sized(row: Any, where: str) -> Sized:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not an object")  # noqa: TRY004 - as above
    hit_rate = _number(row, "hit_rate", where)
    if hit_rate is None or hit_rate > 1:
        raise ValueError(f"{where}.hit_rate: must be from 0 to 1")
    profile = row.get("profile") or ""
    if not isinstance(profile, str) or len(profile) > _MAX_PROFILE:
        raise ValueError(f"{where}.profile: must be a name")
    return Sized(
        l1_bytes=None if row.get("l1_bytes") is None else _whole(row, "l1_bytes", where),
        share=_number(row, "share", where),
        ttl_s=_number(row, "ttl_s", where),
        profile=profile,
        hit_rate=hit_rate,
        saved_microusd=_whole(row, "saved_microusd", where),
        hits=_whole(row, "hits", where),
    )


def _whole(fields: Mapping[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{where}.{name}: must be a whole number, 0 or more".lstrip("."))
    return value


def _number(fields: Mapping[str, Any], name: str, where: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{where}.{name}: must be a number, 0 or more")
    return float(value)
