"""A trace once more, through memories of other sizes: how often each would have hit, and what that saves.

The trace is read twice: once for its footprint, the bytes of all distinct pictures, and once through every memory at
the same time. More than `MAX_OBJECTS` distinct pictures are sampled by key (simulate.py), so that a replay takes the
same memory however long the trace is; the figures are then estimates of the whole, mostly within half a point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cacheserver.errors import UnreadableFileError
from cacheserver.whatif.simulate import MemoryReplay, adjusted_share
from cacheserver.whatif.trace import RECORDED, Asked, Trace

MAX_OBJECTS = 1_000_000
"""Most distinct pictures looked at one by one: about 250 MB for each profile and lifetime."""

SHARES = (0.01, 0.05, 0.1)
"""Sizes to look at, as shares of the footprint, where none are given."""


@dataclass(frozen=True, slots=True)
class ReplayRow:
    """What one memory would have done. `l1_bytes` and `share` of the footprint are None for one without bound.

    `ttl_s` None: pictures are good for ever. Money is in micro-dollars: what the hits would have cost to make.
    """

    l1_bytes: int | None
    share: float | None
    ttl_s: float | None
    profile: str
    hit_rate: float
    hits: int
    hit_bytes: int
    saved_microusd: int


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace's figures. `objects` and `footprint_bytes` are of distinct pictures; `sample` the share of keys seen.

    Whatever the share, all figures are of the whole traffic. `cost_microusd` is what it would cost without a cache.
    """

    requests: int
    objects: int
    footprint_bytes: int
    cost_microusd: int
    span_s: float
    sample: float
    rows: tuple[ReplayRow, ...]


def replay(
    trace: Trace,
    *,
    l1_bytes: Sequence[int] = (),
    ttls_s: Sequence[float | None] = (None,),
    profiles: Sequence[str] = (RECORDED,),
) -> Replay:
    """Replay `trace` for each combination of memory size, lifetime and profile, and without any bound.

    Args:
        trace: what was asked for.
        l1_bytes: sizes of the memory; none are those of `SHARES`.
        ttls_s: how long pictures are good for; None is for ever.
        profiles: "exact", "standard", "catalog", or `RECORDED`.

    Raises:
        UnreadableFileError: the trace cannot be read, or holds no row.
    """
    whole = _measured(trace)
    sizes = tuple(l1_bytes) or tuple(max(1, round(share * whole.footprint_bytes)) for share in SHARES)
    rows: list[ReplayRow] = []
    for profile in profiles:
        runs = [_Run(size, ttl_s, profile, whole.rate) for ttl_s in ttls_s for size in (*sizes, None)]
        for asked in _sampled(trace, profile, whole.rate):
            for run in runs:
                run.ask(asked)
        rows += [run.row(whole) for run in runs]
    return Replay(
        requests=whole.requests,
        objects=whole.objects,
        footprint_bytes=whole.footprint_bytes,
        cost_microusd=round(whole.cost_microusd),
        span_s=whole.span_s,
        sample=whole.rate,
        rows=tuple(rows),
    )


@dataclass(slots=True)
class _Whole:
    """What is known of a trace after its first reading."""

    rate: float
    requests: int
    objects: int
    footprint_bytes: int
    cost_microusd: float
    span_s: float


def _measured(trace: Trace) -> _Whole:
    sizes: dict[int, tuple[int, float]] = {}
    rate, requests, cost = 1.0, 0.0, 0.0
    begin_s, end_s = math.inf, -math.inf
    for asked in trace.read():
        requests += 1 / asked.sample
        cost += asked.cost_microusd / asked.sample
        begin_s, end_s = min(begin_s, asked.time_s), max(end_s, asked.time_s)
        rate = min(rate, asked.sample)
        if asked.draw < rate:
            sizes[asked.key] = (asked.size_bytes, asked.draw)
        if len(sizes) > MAX_OBJECTS:
            rate /= 2
            sizes = {key: (size, draw) for key, (size, draw) in sizes.items() if draw < rate}
    seen = [size for size, draw in sizes.values() if draw < rate]
    if not requests:
        raise UnreadableFileError("the trace holds no row: let the service answer something first")
    return _Whole(
        rate=rate,
        requests=round(requests),
        objects=round(len(seen) / rate),
        footprint_bytes=round(sum(seen) / rate),
        cost_microusd=cost,
        span_s=end_s - begin_s,
    )


def _sampled(trace: Trace, profile: str, rate: float) -> Iterator[Asked]:
    return (asked for asked in trace.read(profile) if asked.draw < rate)


@dataclass(slots=True)
class _Run:
    """One memory, and what it has done so far. Without bound, a dictionary of when its entries expire."""

    l1_bytes: int | None
    ttl_s: float | None
    profile: str
    rate: float
    asked: int = 0
    cost_microusd: int = 0
    hits: int = 0
    hit_bytes: int = 0
    saved_microusd: int = 0
    _memory: MemoryReplay | None = field(init=False)
    _boundless: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._memory = None if self.l1_bytes is None else MemoryReplay(self.l1_bytes, rate=self.rate)

    def ask(self, asked: Asked) -> None:
        """One more picture was asked for."""
        self.asked += 1
        self.cost_microusd += asked.cost_microusd
        if self._hit(asked.key, asked.time_s):
            self.hits += 1
            self.hit_bytes += asked.size_bytes
            self.saved_microusd += asked.cost_microusd
            return
        expire_s = math.inf if self.ttl_s is None else asked.time_s + self.ttl_s
        if self._memory is None:
            self._boundless[asked.key] = expire_s
        else:
            self._memory.put(asked.key, asked.size_bytes, expire_s)

    def row(self, whole: _Whole) -> ReplayRow:
        """The figures, of the whole traffic."""
        hit_rate = adjusted_share(self.hits, self.asked, whole.requests * self.rate)
        saved = adjusted_share(self.saved_microusd, self.cost_microusd, whole.cost_microusd * self.rate)
        return ReplayRow(
            l1_bytes=self.l1_bytes,
            share=None if self.l1_bytes is None else self.l1_bytes / max(1, whole.footprint_bytes),
            ttl_s=self.ttl_s,
            profile=self.profile,
            hit_rate=hit_rate,
            hits=round(hit_rate * whole.requests),
            hit_bytes=round(self.hit_bytes / self.rate),
            saved_microusd=round(saved * whole.cost_microusd),
        )

    def _hit(self, key: int, now_s: float) -> bool:
        if self._memory is None:
            return now_s < self._boundless.get(key, -math.inf)
        return self._memory.get(key, now_s)
