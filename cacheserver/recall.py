"""What became of the latest calls, and which cached picture a call missed by how little.

In memory, of this process alone, and bounded. No text of a prompt is kept: a prompt is known by its digest and by
hashes of its words, which are salted anew in every process.
"""

from __future__ import annotations

import asyncio
import re
from array import array
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Self

from cacheserver.errors import UnknownCallError
from cacheserver.identity import canonical_json, fields_of
from cacheserver.model import (
    CachedImage,
    CacheKey,
    Caller,
    Found,
    Identity,
    MatchLevel,
    Pending,
    Permission,
    Served,
    TierName,
)

Find = Callable[[Sequence[CacheKey]], Awaitable[tuple[list[Found], list[TierName]]]]

_CALLS = 10_000
_WISHES = 10_000
_WORDS = 256
_KINDS, _KIND_BYTES = 256, 1_024
_COMPARED = 2_000
"""Requests of a kind that are compared for one explanation, in some ten milliseconds of a thread."""

_LOOKED_FOR = 20

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
"""A word; of a script that writes none apart, a character."""


class Told(NamedTuple):
    """One picture of an answer, without the picture. `tier` None: it was still being made, or reviewed."""

    key: CacheKey
    tier: TierName | None
    matched: MatchLevel = MatchLevel.EXACT
    collapsed: bool = False
    stale: bool = False
    degraded: bool = False
    expire_time_s: float | None = None
    cost_microusd: int = 0
    saved_microusd: int = 0
    derived_from: str = ""

    @property
    def matched_key(self) -> str:
        """The key that matched, where it is not the one asked for."""
        return self.key.name if self.matched >= MatchLevel.CANONICAL else ""

    @property
    def billed(self) -> bool:
        """Whether the call was billed for it."""
        return self.tier is TierName.UPSTREAM and not self.collapsed


class Remembered(NamedTuple):
    """A call that has ended. `reason` is empty unless it failed; `wish` is there if a tier lacked what it asked for."""

    rpc: str
    time_s: float
    caller: str
    namespace: str
    seconds: float
    reason: str
    images: tuple[Told, ...]
    wish: Wish | None


@dataclass(slots=True, eq=False)
class Wish:
    """A request as far as it is compared with others: where, its prompt's digest and words, and its other fields.

    Calls that are remembered may hold it longer than it is compared: then it `is_forgotten`.
    """

    key: CacheKey
    prompt: int
    words: array[int]
    fields: tuple[tuple[str, str], ...]
    is_forgotten: bool = False


_Call = tuple[str, str, float, str, str, float, str, "ToldImages"]
"""A Remembered behind its id, before anybody asks for it, its pictures too: a plain tuple takes a third of the time."""


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A cached picture that another request would have found, and the one field in which the two differ.

    `likeness` is how many of both prompts' words they share, 0 to 1 (Jaccard, 1912), where the field is the prompt.
    The values of a prompt or of a parameter nobody knows are not told.
    """

    key: CacheKey
    field: str
    value: str = ""
    cached_value: str = ""
    likeness: float = 0.0


class ToldImages:
    """The pictures of an answer, each as the facts of its `Told`: as many calls are remembered, in less time.

    `wish` is what was asked for, once that is remembered.
    """

    __slots__ = ("facts", "wish")

    def __init__(self, facts: Iterable[tuple[object, ...]] = ()) -> None:
        self.facts = tuple(facts)
        self.wish: Wish | None = None

    @classmethod
    def of(cls, answer: Sequence[Served] | Pending) -> Self:
        """Those of an answer."""
        if isinstance(answer, Pending):
            return cls(tuple(Told(key, None)) for key in answer.keys)
        return cls(
            (
                each.entry.key,
                each.tier,
                each.matched,
                each.collapsed,
                bool(each.stale),
                each.degraded,
                each.entry.expire_time_s,
                each.cost_microusd,
                each.saved_microusd,
                each.entry.derived_from,
            )
            for each in answer
        )

    @classmethod
    def of_hit(cls, entry: CachedImage, matched: MatchLevel, saved_microusd: int) -> Self:
        """That of a plain hit in memory."""
        key, expire_time_s = entry.key, entry.expire_time_s
        facts = (
            key,
            TierName.MEMORY,
            matched,
            False,
            False,
            False,
            expire_time_s,
            0,
            saved_microusd,
            entry.derived_from,
        )
        return cls((facts,))


class Recall:
    """The latest 10,000 calls, and the latest 10,000 different requests."""

    def __init__(self, *, calls: int = _CALLS, wishes: int = _WISHES) -> None:
        self._most_wishes = wishes
        self._calls: deque[_Call] = deque(maxlen=calls)
        """Looked through from the end: nobody asks as often as calls are noted."""
        self._wishes: OrderedDict[tuple[str, bytes], Wish] = OrderedDict()
        self._by_prompt: dict[tuple[str, int], dict[Wish, None]] = {}
        self._shown: dict[tuple[bytes, bytes], tuple[tuple[str, str], ...]] = {}
        """By what stands before and after the prompt in the canonical identity."""
        self._by_fields: dict[tuple[str, tuple[tuple[str, str], ...]], dict[Wish, None]] = {}

    def note(  # noqa: PLR0913 - the facts of a call
        self,
        request_id: str,
        *,
        rpc: str,
        time_s: float,
        caller: str,
        namespace: str,
        seconds: float,
        reason: str,
        images: ToldImages,
        wanted: Identity | None,
    ) -> None:
        """A call has ended, begun at `time_s` (since 1970). `wanted` is what it asked for, if it asked for a picture.

        Takes one or two microseconds for a call whose request was seen before: this is on the way of every hit.
        """
        if wanted is not None and (images.wish is None or images.wish.is_forgotten):
            images.wish = self._wishes.get((wanted.key.partition, wanted.key.digest)) or self._wished(wanted)
        self._calls.append((request_id, rpc, time_s, caller, namespace, seconds, reason, images))

    def explain(self, request_id: str, caller: Caller) -> Remembered:
        """What became of a call: the caller's own, or with the permission admin anybody's, the latest of that id.

        Raises UnknownCallError.
        """
        anybodys: _Call | None = None
        for call in reversed(self._calls):
            if call[0] != request_id:
                continue
            if call[3] == caller.name:
                return _remembered(call)
            anybodys = anybodys or call
        if anybodys is not None and Permission.ADMIN in caller.permissions:
            return _remembered(anybodys)
        raise UnknownCallError("This replica remembers no such call of yours; it may be another's, or long ago.")

    async def nearest(self, call: Remembered, find: Find) -> NearMiss | None:
        """What was nearest in the cache to a call that missed, of what some tier has now; None if nothing was."""
        missed = call.reason or any(each.tier is TierName.UPSTREAM for each in call.images)
        if call.wish is None or not missed:
            return None
        partition = call.wish.key.partition
        same_prompt = self._by_prompt.get((partition, call.wish.prompt), {})
        same_fields = self._by_fields.get((partition, call.wish.fields), {})
        latest = [list(islice(reversed(group), _COMPARED)) for group in (same_prompt, same_fields)]
        near = await asyncio.to_thread(_near, call.wish, *latest)
        found, _ = await find([each.key for each in near])
        return next((each for each, item in zip(near, found, strict=True) if item.tier is not None), None)

    # ── what was asked for ──────────────────────────────────────────────────────────────────────────────────

    def _wished(self, wanted: Identity) -> Wish:
        """Remember a request that was not seen lately; the oldest is forgotten for it."""
        shown = self._fields_shown(wanted)
        alike = self._by_fields.setdefault((wanted.key.partition, shown), {})
        if alike:
            shown = next(iter(alike)).fields  # one tuple for all that are alike
        hashes = {hash(word) & 0xFFFFFFFF: None for word in _WORD.findall(wanted.normalized_prompt.casefold())}
        wish = Wish(wanted.key, hash(wanted.normalized_prompt), array("I", islice(hashes, _WORDS)), shown)
        alike[wish] = None
        self._by_prompt.setdefault((wanted.key.partition, wish.prompt), {})[wish] = None
        self._wishes[wanted.key.partition, wanted.key.digest] = wish
        if len(self._wishes) > self._most_wishes:
            self._forget(self._wishes.popitem(last=False)[1])
        return wish

    def _fields_shown(self, wanted: Identity) -> tuple[tuple[str, str], ...]:
        """The fields of a request but for its prompt. Most requests have them in common with one before."""
        prompt = b'"prompt":' + canonical_json(wanted.normalized_prompt).encode()
        before, _, after = wanted.canonical.rpartition(prompt)
        shown = self._shown.get((before, after))
        if shown is None:
            fields = sorted(fields_of(wanted).items())
            hidden = [(name, str(hash(v)) if name.startswith("extra.") else v) for name, v in fields]
            shown = tuple(each for each in hidden if each[0] != "prompt")
            has_texts = any(name.startswith("extra.") for name, _ in fields)  # they may be like a prompt
            if not has_texts and len(before) + len(after) <= _KIND_BYTES:
                if len(self._shown) >= _KINDS:
                    del self._shown[next(iter(self._shown))]
                self._shown[before, after] = shown
        return shown

    def _forget(self, wish: Wish) -> None:
        wish.is_forgotten = True
        partition = wish.key.partition
        del self._by_prompt[partition, wish.prompt][wish]
        if not self._by_prompt[partition, wish.prompt]:
            del self._by_prompt[partition, wish.prompt]
        del self._by_fields[partition, wish.fields][wish]
        if not self._by_fields[partition, wish.fields]:
            del self._by_fields[partition, wish.fields]


def _remembered(call: _Call) -> Remembered:
    _, *facts, images = call
    return Remembered._make([*facts, tuple(map(Told._make, images.facts)), images.wish])


def _near(wish: Wish, same_prompt: list[Wish], same_fields: list[Wish]) -> list[NearMiss]:
    return [*islice(_one_field_apart(wish, same_prompt), _LOOKED_FOR), *_one_prompt_apart(wish, same_fields)]


def _one_field_apart(wish: Wish, others: list[Wish]) -> Iterator[NearMiss]:
    """Those of `others`, alike in their prompts, that differ in one other field."""
    mine = dict(wish.fields)
    for other in others:
        theirs = dict(other.fields)
        differ = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
        if len(differ) == 1:
            [name] = differ
            told = not name.startswith("extra.")  # its hash: it may be a text like a prompt
            values = (mine.get(name, ""), theirs.get(name, "")) if told else ("", "")
            yield NearMiss(other.key, name, *values)


def _one_prompt_apart(wish: Wish, others: list[Wish]) -> list[NearMiss]:
    """Those of `others`, alike but for their prompts, that share words with this one's, the likest first."""
    words = frozenset(wish.words)
    alike = ((_likeness(words, frozenset(other.words)), other) for other in others if other.prompt != wish.prompt)
    near = [NearMiss(other.key, "prompt", likeness=likeness) for likeness, other in alike if likeness > 0]
    return sorted(near, key=lambda each: -each.likeness)[:_LOOKED_FOR]


def _likeness(words: frozenset[int], others: frozenset[int]) -> float:
    shared = len(words & others)
    return shared / (len(words) + len(others) - shared) if shared else 0.0
