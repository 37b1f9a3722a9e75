"""A forecast from a team's own request log: how often each profile and tier would have answered, and what that saves.

Repeats are asks for a key that was asked for before. Re-rolls are repeats too, and counted apart: the same caller asks
the same prompt (by the profile standard, whatever the figures are by) again within `reroll_s`: 15 minutes unless set,
for in logs of people at work the median gap is some three minutes. Whoever re-rolls mostly wants another picture. The
service answers them from the cache unless the caller asks for the next variant, so hits include them, and what is saved
has a second figure without them.

Rows are taken in the order of the file; a time before its predecessor's counts as that one's. Of more than `MAX_ROWS`
rows a share of the keys is looked at, drawn by hash (simulate.py).
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from cacheserver.errors import UnreadableFileError
from cacheserver.whatif.advice import NearMisses, NearPrompt, near_misses
from cacheserver.whatif.lines import LineFile
from cacheserver.whatif.logs import HASH_SPAN, NO_CALLER, NO_PRICE, BadLine, LogPlan, Rows, prompt_of, read_log
from cacheserver.whatif.simulate import MemoryReplay, TiersReplay, adjusted_share

MAX_ROWS = 2_000_000
"""Of longer logs a share of the keys is looked at, so that memory has a bound: some 600 MB."""

_MAX_TEXTS = 40_000
_MAX_TEXT_CHARS = 8_000_000
"""So many prompts are compared for near misses, of so many characters in all: some 100 MB, and seconds."""

_MAX_RECENT = 200_000
_GROUPS = 20
_BAD_TOLD = 5
_DISORDER_S = 60.0


@dataclass(frozen=True, slots=True)
class Assumed:
    """The cache to forecast. Bytes and seconds; a lifetime of None is for ever.

    `l1_bytes` and `ttls_s` are looked at in every combination, under the profile `profile`. `image_bytes` is the size
    of a picture, which logs do not tell.
    """

    profile: str = "standard"
    l1_bytes: tuple[int, ...] = (256 * 1024 * 1024,)
    ttls_s: tuple[float | None, ...] = (None,)
    redis_ttl_s: float = 86_400.0
    reroll_s: float = 900.0
    image_bytes: int = 1_500_000


@dataclass(frozen=True, slots=True)
class ProfileFigures:
    """What repeats under one profile, in a cache that keeps everything. Rates are of all rows, 0 to 1."""

    profile: str
    distinct: int
    repeats: int
    repeat_rate: float
    rerolls: int
    reroll_rate: float
    saved_microusd: int
    saved_without_rerolls_microusd: int


@dataclass(frozen=True, slots=True)
class TierFigures:
    """What the tiers would answer, as shares of all rows, 0 to 1; `hit_rate` is of the three together."""

    l1_bytes: int
    ttl_s: float | None
    hit_rate: float
    memory_rate: float
    redis_rate: float
    s3_rate: float
    hits: int
    saved_microusd: int
    saved_without_rerolls_microusd: int


@dataclass(frozen=True, slots=True)
class Group:
    """One key that is asked for often: how often, and the first line and, if wanted, the prompt that asked for it."""

    asks: int
    line: int
    saved_microusd: int
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The forecast. Money in micro-dollars: what pictures cost by the price list."""

    rows: int
    span_s: float
    cost_microusd: int
    unpriced_rows: int
    bad_lines: int
    first_bad_lines: tuple[BadLine, ...]
    missing: dict[str, int]
    disordered_rows: int
    sample: float
    is_cut: bool
    profiles: tuple[ProfileFigures, ...]
    tiers: tuple[TierFigures, ...]
    groups: tuple[Group, ...]
    near_misses: tuple[NearMisses, ...]


def estimate(file: LineFile, plan: LogPlan, assumed: Assumed, *, workers: int, is_strict: bool = False) -> Estimate:
    """What the service would have made of this log.

    Args:
        file: JSON lines, one for each picture asked for.
        plan: how lines become requests. `assumed.profile` is among its profiles.
        assumed: the cache.
        workers: processes that read; 0 reads in this one.
        is_strict: the first line that is no request is an error.

    Raises:
        UnreadableFileError: the file cannot be read or holds no request, or, if `is_strict`, a line is none; names
            the line and the field.
    """
    lines = file.count()
    forecast = _Forecast(plan, assumed, rate=1.0 if lines <= MAX_ROWS else MAX_ROWS / lines)
    for rows in read_log(file, plan, workers=workers, texts_below=forecast.texts_below):
        if is_strict and rows.bad:
            raise UnreadableFileError(f"{file.path}, line {rows.bad[0].line:,}: {rows.bad[0].problem}")
        forecast.add(rows)
    if not forecast.rows:
        told = "".join(f"; line {bad.line:,}: {bad.problem}" for bad in forecast.bad[:1])
        raise UnreadableFileError(f"{file.path}: holds no request{told}")
    return forecast.result(file)


@dataclass(slots=True)
class _Profile:
    """The keys of one profile so far, by number in the order they came, and what repeats of them came to."""

    name: str
    numbers: dict[int, int] = field(default_factory=dict)
    repeats: int = 0
    rerolls: int = 0
    saved_microusd: int = 0
    reroll_microusd: int = 0

    def count(self, key: int, cost_microusd: int, *, is_reroll: bool) -> int:
        """Count a row; its key's number."""
        known = len(self.numbers)
        number = self.numbers.setdefault(key, known)
        if number != known:
            self.repeats += 1
            self.saved_microusd += cost_microusd
            if is_reroll:
                self.rerolls += 1
                self.reroll_microusd += cost_microusd
        return number


class _Rerolls:
    """Who asked for what not long ago."""

    def __init__(self, within_s: float) -> None:
        self._within_s = within_s
        self._recent: dict[int, float] = {}

    def asked(self, key: int, caller: int, now_s: float) -> bool:
        """Whether this caller asked for the key not long ago; remembers that it does now."""
        if caller == NO_CALLER:
            return False
        name = key ^ caller
        last_s = self._recent.pop(name, None)
        self._recent[name] = now_s
        if len(self._recent) > _MAX_RECENT:
            self._forget(now_s - self._within_s)
        return last_s is not None and now_s - last_s <= self._within_s

    def _forget(self, before_s: float) -> None:
        """Forget what is too long ago, and in a busy log the older half of all: it is in the order of asking."""
        kept = [(name, last_s) for name, last_s in self._recent.items() if last_s >= before_s]
        self._recent = dict(kept[-_MAX_RECENT // 2 :])


@dataclass(slots=True)
class _Tiers:
    """One combination of memory and lifetime, and what it has answered."""

    l1_bytes: int
    ttl_s: float | None
    tiers: TiersReplay
    saved_microusd: int = 0
    reroll_microusd: int = 0


class _Forecast:
    """Everything that is counted, row by row."""

    def __init__(self, plan: LogPlan, assumed: Assumed, *, rate: float) -> None:
        self._plan = plan
        self._assumed = assumed
        self._rate = rate
        self._keys_below = math.ceil(rate * HASH_SPAN)
        self._texts_below = self._keys_below
        self._texts: dict[int, tuple[str, str]] = {}
        self._text_chars = 0
        self._profiles = [_Profile(name) for name in plan.profiles]
        self._main = plan.profiles.index(assumed.profile)
        self._typed = plan.profiles.index("standard")
        self._rerolls = _Rerolls(assumed.reroll_s)
        self._tiers = [
            _Tiers(
                l1_bytes,
                ttl_s,
                TiersReplay(
                    MemoryReplay(l1_bytes, rate=rate),
                    redis_ttl_s=assumed.redis_ttl_s,
                    ttl_s=math.inf if ttl_s is None else ttl_s,
                ),
            )
            for ttl_s, l1_bytes in product(assumed.ttls_s, assumed.l1_bytes)
        ]
        # Of each key of the main profile, by its number.
        self._asks = array("L")
        self._first_lines = array("Q")
        self._costs_microusd = array("q")
        # Of each key of the loosest profile, which is what prompts come by.
        self._loose_asks = array("L")
        self._loose_costs_microusd = array("q")
        self.rows = 0
        self.bad: list[BadLine] = []
        self._bad_lines = 0
        self._seen = 0
        self._seen_microusd = 0
        self._cost_microusd = 0
        self._unpriced = 0
        self._missing: Counter[str] = Counter()
        self._disordered = 0
        self._begin_s: float | None = None
        self._now_s = -math.inf

    def texts_below(self) -> int:
        """Prompts whose loosest key lies below come along as text."""
        return self._texts_below

    def add(self, rows: Rows) -> None:
        """Count the rows of a block."""
        self.bad = (self.bad + rows.bad)[:_BAD_TOLD]
        self._bad_lines += rows.bad_lines
        self._missing.update(rows.missing)
        self.rows += len(rows.lines)
        below, typed, main = self._keys_below, self._typed, self._main
        columns = (rows.lines, rows.times_s, rows.callers, rows.costs_microusd, zip(*rows.keys, strict=True))
        for line, time_s, caller, price, keys in zip(*columns, strict=True):
            self._pass_time(time_s)
            cost = self._paid(price)
            if keys[-1] >= below:
                continue
            self._seen += 1
            self._seen_microusd += cost
            is_reroll = self._rerolls.asked(keys[typed], caller, self._now_s)
            numbers = [
                profile.count(key, cost, is_reroll=is_reroll) for profile, key in zip(self._profiles, keys, strict=True)
            ]
            self._note(numbers, line, cost)
            self._ask_tiers(keys[main], numbers[main], cost, is_reroll=is_reroll)
        self._keep(rows.texts)

    def _pass_time(self, time_s: float) -> None:
        if time_s >= self._now_s:
            self._now_s = time_s
        elif time_s < self._now_s - _DISORDER_S:
            self._disordered += 1
        if self._begin_s is None:
            self._begin_s = time_s

    def _paid(self, price: int) -> int:
        if price == NO_PRICE:
            self._unpriced += 1
            return 0
        self._cost_microusd += price
        return price

    def _note(self, numbers: Sequence[int], line: int, cost: int) -> None:
        number = numbers[self._main]
        if number == len(self._asks):
            self._asks.append(0)
            self._first_lines.append(line)
            self._costs_microusd.append(cost)
        self._asks[number] += 1
        number = numbers[-1]
        if number == len(self._loose_asks):
            self._loose_asks.append(0)
            self._loose_costs_microusd.append(cost)
        self._loose_asks[number] += 1

    def _ask_tiers(self, key: int, number: int, cost: int, *, is_reroll: bool) -> None:
        for each in self._tiers:
            if each.tiers.asked(key, number, self._assumed.image_bytes, self._now_s):
                each.saved_microusd += cost
                if is_reroll:
                    each.reroll_microusd += cost

    def _keep(self, texts: dict[int, tuple[str, str]]) -> None:
        for key, text in texts.items():
            if key < self._texts_below and key not in self._texts:
                self._texts[key] = text
                self._text_chars += len(text[0])
        while len(self._texts) > _MAX_TEXTS or self._text_chars > _MAX_TEXT_CHARS:
            self._texts_below //= 2
            self._texts = {key: text for key, text in self._texts.items() if key < self._texts_below}
            self._text_chars = sum(len(text) for text, _ in self._texts.values())

    def result(self, file: LineFile) -> Estimate:
        """The figures, of the whole log."""
        return Estimate(
            rows=self.rows,
            span_s=self._now_s - (self._begin_s or 0.0),
            cost_microusd=self._cost_microusd,
            unpriced_rows=self._unpriced,
            bad_lines=self._bad_lines,
            first_bad_lines=tuple(self.bad),
            missing=dict(self._missing),
            disordered_rows=self._disordered,
            sample=self._rate,
            is_cut=file.is_cut,
            profiles=tuple(self._profile_figures(profile) for profile in self._profiles),
            tiers=tuple(self._tier_figures(tiers) for tiers in self._tiers),
            groups=self._groups(file),
            near_misses=tuple(self._near_misses()),
        )

    def _profile_figures(self, profile: _Profile) -> ProfileFigures:
        repeat_rate = self._share(profile.repeats)
        rerolls = profile.rerolls / self._seen if self._seen else 0.0
        return ProfileFigures(
            profile=profile.name,
            distinct=self.rows - round(repeat_rate * self.rows),
            repeats=round(repeat_rate * self.rows),
            repeat_rate=repeat_rate,
            rerolls=round(rerolls * self.rows),
            reroll_rate=rerolls,
            **self._saved(profile.saved_microusd, profile.reroll_microusd),
        )

    def _tier_figures(self, each: _Tiers) -> TierFigures:
        tiers = each.tiers
        hit_rate = self._share(tiers.memory_hits + tiers.redis_hits + tiers.s3_hits)
        redis, last = (hits / self._seen if self._seen else 0.0 for hits in (tiers.redis_hits, tiers.s3_hits))
        return TierFigures(
            l1_bytes=each.l1_bytes,
            ttl_s=each.ttl_s,
            hit_rate=hit_rate,
            memory_rate=max(0.0, hit_rate - redis - last),
            redis_rate=redis,
            s3_rate=last,
            hits=round(hit_rate * self.rows),
            **self._saved(each.saved_microusd, each.reroll_microusd),
        )

    def _share(self, hits: int) -> float:
        return adjusted_share(hits, self._seen, self.rows * self._rate)

    def _saved(self, microusd: int, reroll_microusd: int) -> dict[str, int]:
        saved = self._cost_microusd * adjusted_share(microusd, self._seen_microusd, self._cost_microusd * self._rate)
        return {
            "saved_microusd": round(saved),
            "saved_without_rerolls_microusd": round(max(0.0, saved - reroll_microusd / self._rate)),
        }

    def _groups(self, file: LineFile) -> tuple[Group, ...]:
        """The largest groups with their prompts, which are read from the file once more."""
        largest = heapq.nlargest(_GROUPS, range(len(self._asks)), key=self._asks.__getitem__)
        repeated = [number for number in largest if self._asks[number] > 1]
        prompts = _prompts_at(file, {self._first_lines[number] for number in repeated}, self._plan)
        return tuple(
            Group(
                asks=self._asks[number],
                line=self._first_lines[number],
                saved_microusd=(self._asks[number] - 1) * self._costs_microusd[number],
                prompt=prompts.get(self._first_lines[number], ""),
            )
            for number in repeated
        )

    def _near_misses(self) -> list[NearMisses]:
        numbers = self._profiles[-1].numbers
        prompts = [
            NearPrompt(text, rest, self._loose_asks[numbers[key]], self._loose_costs_microusd[numbers[key]])
            for key, (text, rest) in self._texts.items()
            if key in numbers
        ]
        return near_misses(prompts, rate=self._texts_below / HASH_SPAN, patterns=self._plan.catalog_patterns)


def _prompts_at(file: LineFile, numbers: set[int], plan: LogPlan) -> dict[int, str]:
    found: dict[int, str] = {}
    for block in file.blocks() if numbers else ():
        end = block.first_line + block.data.count(b"\n")
        if wanted := [number for number in numbers if block.first_line <= number < end]:
            lines = block.lines()
            found |= {number: prompt_of(lines[number - block.first_line], plan) for number in wanted}
        if len(found) == len(numbers):
            break
    return found
