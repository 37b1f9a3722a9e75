"""What L1 keeps: a trace replayed through the service's own memory, by each policy, beside what hindsight could keep.

TRACE is what `[trace] path` recorded, or any CSV with the columns time_s, prompt_id, quality and size_bytes. L1 is
alone: what it does not have is made and put, at once. It is looked at in three sizes, as shares of the footprint, the
bytes of all distinct pictures. Told are hits, their bytes and dollars, as shares of all that was asked for, and the
worst of all windows of 20,000 requests, in points of hits above LRU. There only the bytes of pictures count, through
the very classes that L1 evicts by. "All bytes" are the hits of `MemoryCache`, in which entries count with all they
take, against a footprint that counts alike; its hits, and its misses with what is put and evicted for them, are timed.
Belady's is the offline limit for pictures of one size: what waits longest to be asked for again goes, or never comes.

Against: what EXPECTED says of hits, LRU within 0.3 points of it, no window more than a point under LRU, and at most
3 microseconds a hit. EXPECTED is of one synthetic trace of 239,027 requests; any other is only held to the rest.
"""

from __future__ import annotations

import hashlib
import heapq
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import typer
from cachetools import Cache, LRUCache

from cacheserver.clock import SystemClock
from cacheserver.errors import UnreadableFileError
from cacheserver.generation.prices import PriceTable
from cacheserver.model import CachedImage, CacheKey, GeneratedImage
from cacheserver.tiers.memory import EvictionPolicy, MemoryCache, entry_bytes
from cacheserver.tiers.value_cache import ValueCache
from cacheserver.whatif.replay import SHARES
from cacheserver.whatif.trace import Asked, Trace
from scripts.bench.figures import print_table, print_verdict, write_json

WINDOW = 20_000
MOST_UNDER_LRU = 1.0
MOST_HIT_US = 3.0
LRU_WITHIN = 0.3
EXPECTED = {"lru": {0.01: 20.4, 0.05: 31.7, 0.1: 37.3}, "value": {0.01: 28.0, 0.05: 39.0, 0.1: 44.0}}
EXPECTED_OF = (239_027, 80_355)
"""Requests and distinct pictures of the trace that EXPECTED is of."""

_TIMED = 1_000
"""Calls in one reading of the clock."""


@dataclass(frozen=True, slots=True)
class Row:
    """One policy in one size: percentages of all that was asked for, points, and CPU microseconds."""

    policy: str
    share: float
    max_bytes: int
    hits: float
    bytes: float
    dollars: float
    worst_window: float
    hits_all_bytes: float | None = None
    hit_us: float | None = None
    miss_us: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """All rows, and what trace they are of."""

    requests: int
    objects: int
    footprint_bytes: int
    cost_microusd: int
    rows: tuple[Row, ...]

    def shortfalls(self) -> Iterator[str]:
        """What is not as it should be."""
        is_known = (self.requests, self.objects) == EXPECTED_OF
        for row in self.rows:
            name = f"{row.policy} at {100 * row.share:g} %"
            expected = EXPECTED.get(row.policy, {}).get(row.share) if is_known else None
            if expected is not None and row.policy == "lru" and abs(row.hits - expected) > LRU_WITHIN:
                yield f"{name}: {row.hits:.2f} % hits, and not {expected} within {LRU_WITHIN}"
            if expected is not None and row.policy == "value" and row.hits < expected:
                yield f"{name}: {row.hits:.2f} % hits, and not {expected}"
            if row.worst_window < -MOST_UNDER_LRU:
                yield f"{name}: {-row.worst_window:.2f} points under LRU in some {WINDOW:,} requests"
            if row.hit_us is not None and row.hit_us > MOST_HIT_US:
                yield f"{name}: {row.hit_us:.2f} us a hit"


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace in memory: what was asked for, in order, and an entry for each distinct picture."""

    asked: Sequence[Asked]
    entries: dict[int, CachedImage] = field(default_factory=dict)
    """By the trace's key. The pictures are views of one buffer; a picture has the size it was first asked for in."""

    def row(self, policy: str, share: float, max_bytes: int, hits: bytes, lru: bytes) -> Row:
        """The figures of a replay, without those of all bytes and of time."""
        hit = [each for each, is_hit in zip(self.asked, hits, strict=True) if is_hit]
        ahead = [0, *accumulate(ours - theirs for ours, theirs in zip(hits, lru, strict=True))]
        window = min(WINDOW, len(hits))
        windows = [end - begin for begin, end in zip(ahead[:-window], ahead[window:], strict=True)]
        return Row(
            policy=policy,
            share=share,
            max_bytes=max_bytes,
            hits=100 * len(hit) / len(self.asked),
            bytes=100 * sum(each.size_bytes for each in hit) / sum(each.size_bytes for each in self.asked),
            dollars=100 * sum(each.cost_microusd for each in hit) / (sum(e.cost_microusd for e in self.asked) or 1),
            worst_window=100 * min(windows) / window,
        )


def read(trace: Trace) -> Workload:
    """The trace with an entry for each picture of it."""
    asked = list(trace.read())
    if not asked:
        raise UnreadableFileError("the trace holds no row")
    workload = Workload(asked)
    for each in asked:
        if each.key not in workload.entries:
            workload.entries[each.key] = _entry(each)
    return workload


class _Data:
    """So many bytes of a picture, without them: 80,000 pictures would not fit."""

    __slots__ = ("_size_bytes",)

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes

    @property
    def obj(self) -> _Data:
        """The buffer that it is a view of: its own."""
        return self


def _entry(asked: Asked) -> CachedImage:
    digest = hashlib.sha256(b"%d" % asked.key).digest()
    image = GeneratedImage(
        data=_Data(asked.size_bytes),  # type: ignore[arg-type] # nobody looks into it
        content_type="image/png",
        width=1024,
        height=1024,
        sha256=digest.hex(),
        model="gpt-image-2",
        size="1024x1024",
        quality="auto",
        background="auto",
        paid_microusd=asked.cost_microusd,
    )
    key = CacheKey("default", digest[:16], digest, 0)
    return CachedImage(key=key, image=image, namespace="default", prompt_digest=digest, create_time_s=0.0)


def measure(workload: Workload, shares: Sequence[float] = SHARES) -> Figures:
    """Replay the trace through each policy in each size."""
    asked, entries = workload.asked, workload.entries
    footprint = sum(entry.size_bytes for entry in entries.values())
    all_bytes = sum(map(entry_bytes, entries.values()))
    rows = []
    for share in shares:
        room = round(share * footprint)
        lru = replay_policy(asked, entries, LRUCache(room, _size_bytes))
        for name, policy, cost in _POLICIES:
            hits = lru if policy == "lru" else replay_policy(asked, entries, ValueCache(room, _size_bytes, cost))
            memory = MemoryCache(clock=SystemClock(), max_bytes=round(share * all_bytes), policy=policy, cost=cost)
            hits_all_bytes = 100 * replay_memory(asked, entries, memory) / len(asked)
            hit_us, miss_us = _times_us(memory, list(entries.values()))
            row = workload.row(name, share, room, hits, lru)
            rows.append(replace(row, hits_all_bytes=hits_all_bytes, hit_us=hit_us, miss_us=miss_us))
        rows.append(workload.row("belady", share, room, replay_belady(asked, room), lru))
    return Figures(len(asked), len(entries), footprint, sum(each.cost_microusd for each in asked), tuple(rows))


def _size_bytes(entry: CachedImage) -> int:
    return entry.size_bytes


def _alike(_: CachedImage) -> float:
    return 1


def _microusd(entry: CachedImage) -> float:
    return max(1, entry.image.paid_microusd)


_POLICIES: tuple[tuple[str, EvictionPolicy, Callable[[CachedImage], float]], ...] = (
    ("lru", "lru", _alike),
    ("value", "value", _alike),
    ("value, dollars", "value", _microusd),
)


def replay_policy(asked: Sequence[Asked], entries: dict[int, CachedImage], cache: Cache[int, CachedImage]) -> bytes:
    """For each request 1 if the cache had the picture, else 0."""
    hits = bytearray(len(asked))
    for number, each in enumerate(asked):
        if cache.get(each.key) is not None:
            hits[number] = 1
        else:
            entry = entries[each.key]
            if entry.size_bytes <= cache.maxsize:
                cache[each.key] = entry
    return bytes(hits)


def replay_memory(asked: Sequence[Asked], entries: dict[int, CachedImage], memory: MemoryCache) -> int:
    """How many requests hit."""
    hits = 0
    for each in asked:
        entry = entries[each.key]
        if memory.get(entry.key) is not None:
            hits += 1
        else:
            memory.put(entry.key, entry)
    return hits


def replay_belady(asked: Sequence[Asked], max_bytes: int) -> bytes:
    """For each request 1 if a cache had the picture that always evicts what is asked for again last (Belady, 1966)."""
    never = len(asked)
    next_use = [never] * len(asked)
    seen: dict[int, int] = {}
    for number in range(len(asked) - 1, -1, -1):
        next_use[number] = seen.get(asked[number].key, never)
        seen[asked[number].key] = number
    hits = bytearray(len(asked))
    kept: dict[int, tuple[int, int]] = {}
    """Of each picture that is kept when it is asked for next, and its size."""
    latest: list[tuple[int, int]] = []
    used = 0
    for number, each in enumerate(asked):
        hits[number] = each.key in kept
        _, size_bytes = kept.pop(each.key, (0, 0))
        used -= size_bytes
        if next_use[number] == never:
            continue
        kept[each.key] = next_use[number], each.size_bytes
        heapq.heappush(latest, (-next_use[number], each.key))
        used += each.size_bytes
        while used > max_bytes:
            use, key = heapq.heappop(latest)
            if kept.get(key, (0, 0))[0] == -use:  # else it was asked for since
                used -= kept.pop(key)[1]
    return bytes(hits)


def _times_us(memory: MemoryCache, entries: Sequence[CachedImage]) -> tuple[float | None, float | None]:
    """CPU microseconds of a hit, and of a miss with what is put and evicted for it, in a memory that is full."""
    present = [entry for entry in entries if memory.contains(entry.key)]
    absent = [entry for entry in entries if not memory.contains(entry.key)]

    def hit(entry: CachedImage) -> None:
        memory.get(entry.key)

    def miss(entry: CachedImage) -> None:
        if memory.get(entry.key) is None:
            memory.put(entry.key, entry)

    return _median_us(hit, present), _median_us(miss, absent)


def _median_us(call: Callable[[CachedImage], None], entries: Sequence[CachedImage]) -> float | None:
    readings = []
    for begin in range(0, min(len(entries), 10 * _TIMED), _TIMED):
        some = entries[begin : begin + _TIMED]
        begin_ns = time.process_time_ns()
        for entry in some:
            call(entry)
        readings.append((time.process_time_ns() - begin_ns) / len(some) / 1_000)
    return statistics.median(readings) if readings else None


def main(
    trace: Annotated[Path, typer.Argument(help="What [trace] path recorded, or a CSV; plain or gzip.")],
    *,
    model: Annotated[str, typer.Option(help="Model that pictures without a cost are priced as.")] = "gpt-image-1",
    size: Annotated[str, typer.Option(help="Size that they are priced as.")] = "1024x1024",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there, too.")] = None,
) -> None:
    """Replay a trace through L1's policies; exit code 1 if a figure falls short."""
    prices = PriceTable.load()
    try:
        workload = read(Trace(trace, price=lambda quality: prices.cost_microusd(model, size, quality, None, 1) or 0))
    except UnreadableFileError as error:
        raise typer.BadParameter(str(error)) from error
    result = measure(workload)
    print_table(
        f"{result.requests:,} requests for {result.objects:,} pictures, {result.footprint_bytes / 1e9:,.1f} GB, "
        f"${result.cost_microusd / 1e6:,.0f}; % of what was asked for",
        ("policy", "L1", "hits", "bytes", "dollars", "worst window", "hits, all bytes", "us a hit", "us a miss"),
        map(_told, result.rows),
    )
    shortfalls = list(result.shortfalls())
    print_verdict(shortfalls)
    write_json(json_file, "eviction", asdict(result))
    sys.exit(bool(shortfalls))


def _told(row: Row) -> tuple[str, ...]:
    figures = map(_shown, (row.hits, row.bytes, row.dollars))
    others = map(_shown, (row.hits_all_bytes, row.hit_us, row.miss_us))
    return row.policy, f"{100 * row.share:g} %", *figures, f"{row.worst_window:+.2f}", *others


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


if __name__ == "__main__":
    typer.run(main)
