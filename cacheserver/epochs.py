"""What was purged, as every replica knows it: one tombstone for each purge.

Purges are numbered through all namespaces: the number of one is its epoch. An entry carries the newest epoch that was
known when its flight began, and a tombstone takes the entries it names whose epoch is before its own. So a purge takes
one write, however much it takes, and what was stored, copied, journalled or left on its way before it stays purged
wherever it turns up again: nothing is compared with a clock.

What takes the place of a picture, whoever stored that, has an epoch that nothing had before, and a tombstone of its own
once it lies there: other replicas have the old one in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cacheserver.model import CachedImage, CacheKey, Labels

_EVERYONE = "*"
"""In the place of a namespace: takes what any of them stored."""

_EVERYTHING, _KEY, _IDENTITY, _TAG, _RECLAIMED = "everything", "key", "identity", "tag", "reclaimed"
_BANNED = "banned"
"""Takes nothing: two identities that answer for one another no more."""

_SIMILAR_ON, _SIMILAR_OFF = "similar:on", "similar:off"
"""Take nothing: whether similar pictures answer is what the later of the two says."""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """That what `namespace` stored and `selects` names was purged, but for what is of `epoch` or later.

    `selects` is a kind of selection and its value. A tag, which may say anything, and two identities, whose names
    together are too long for that of a file, are told by their hash.
    """

    epoch: int
    namespace: str
    selects: str

    @staticmethod
    def of_partition(namespace: str, partition: str) -> Tombstone:
        """All of a namespace. Its epoch, as that of the others, is given when it is set."""
        return Tombstone(0, namespace, f"{_EVERYTHING}:{partition}")

    @staticmethod
    def of_key(namespace: str, key: CacheKey) -> Tombstone:
        """One picture, with its renditions."""
        return Tombstone(0, namespace, f"{_KEY}:{key.name}")

    @staticmethod
    def of_replaced(entry: CachedImage) -> Tombstone:
        """Of all that lay in the place of this one, whoever stored it."""
        return Tombstone(entry.epoch, _EVERYONE, f"{_KEY}:{entry.key.name}")

    @staticmethod
    def of_identity(namespace: str, key: CacheKey) -> Tombstone:
        """All variants of an identity, with their renditions."""
        return Tombstone(0, namespace, f"{_IDENTITY}:{key.identity_name}")

    @staticmethod
    def of_tag(namespace: str, tag: str) -> Tombstone:
        """All that has a tag."""
        return Tombstone(0, namespace, _selects_tag(tag))

    @staticmethod
    def of_banned(key: CacheKey, other: CacheKey) -> Tombstone:
        """That the pictures of two identities are different ones, whatever their prompts look like."""
        return Tombstone(0, _EVERYONE, _selects_banned(key, other))

    @staticmethod
    def of_switch(namespace: str, *, is_on: bool) -> Tombstone:
        """That similar pictures answer in a namespace from now on, or no more; empty: in every namespace."""
        return Tombstone(0, namespace or _EVERYONE, _SIMILAR_ON if is_on else _SIMILAR_OFF)

    @property
    def is_for_ever(self) -> bool:
        """Whether it is needed however long ago it was set."""
        return self.selects.startswith(f"{_BANNED}:") or self.selects in (_SIMILAR_ON, _SIMILAR_OFF)

    @property
    def takes_everything(self) -> bool:
        """Whether it purges a whole namespace."""
        return self.selects.startswith(f"{_EVERYTHING}:")

    @property
    def reclaimed(self) -> Tombstone:
        """That the tiers have nothing left of what this one, of a whole namespace, took: it takes nothing itself."""
        return Tombstone(0, self.namespace, f"{_RECLAIMED}:{self.partition}:{self.epoch}")

    @property
    def partition(self) -> str:
        """Of one that purges a whole namespace: where."""
        return self.selects.partition(":")[2]

    @property
    def name(self) -> str:
        """All but its epoch. A later one of this name says all that an earlier one did."""
        return f"{self.namespace}:{self.selects}"

    @staticmethod
    def parse(epoch: int, name: str) -> Tombstone:
        """The tombstone of this name. Raises ValueError if it is none."""
        namespace, separator, selects = name.partition(":")
        if not (namespace and separator and selects and 0 < epoch < 2**53):
            raise ValueError("not the name of a tombstone")
        return Tombstone(epoch, namespace, selects)


class Arrivals(NamedTuple):
    """Tombstones that came where all replicas find them, when the last one came, and how many there are."""

    last: int
    there: int
    tombstones: list[Tombstone]


class Epochs:
    """The tombstones that this replica knows. Its methods take a microsecond: every hit asks."""

    def __init__(self) -> None:
        self.newest = 0
        """The newest epoch: what entries made from now on carry."""
        self.hides_all = False
        """Whether nothing may be served, because nobody can say what was purged."""
        self._by_namespace: dict[str, dict[str, int]] = {}

    def learn(self, tombstones: Iterable[Tombstone]) -> list[Tombstone]:
        """Take note of these; those that were news."""
        news = []
        for tombstone in tombstones:
            known = self._by_namespace.setdefault(tombstone.namespace, {})
            if known.get(tombstone.selects, 0) < tombstone.epoch:
                known[tombstone.selects] = tombstone.epoch
                news.append(tombstone)
            self.newest = max(self.newest, tombstone.epoch)
        return news

    def all(self) -> list[Tombstone]:
        """Every tombstone."""
        return [
            Tombstone(epoch, namespace, selects)
            for namespace, known in self._by_namespace.items()
            for selects, epoch in known.items()
        ]

    def to_reclaim(self) -> list[Tombstone]:
        """Purges of whole namespaces of which tiers may still have bytes."""
        return [each for each in self.all() if each.takes_everything and self._is_unreclaimed(each)]

    def has_to_reclaim(self, partition: str) -> bool:
        """Whether tiers may still have bytes in a partition that count as purged."""
        selects = f"{_EVERYTHING}:{partition}"
        return any(
            selects in known and self._is_unreclaimed(Tombstone(known[selects], namespace, selects))
            for namespace, known in self._by_namespace.items()
        )

    def settled_before(self, epoch: int) -> list[Tombstone]:
        """Those before `epoch` that nothing is left of to reclaim; never the newest: by it one sees what is lost."""
        limit = min(epoch, self.newest)
        return [
            each
            for each in self.all()
            if each.epoch < limit
            and not each.is_for_ever
            and not (each.takes_everything and self._is_unreclaimed(each))
        ]

    def forget(self, tombstones: Iterable[Tombstone]) -> None:
        """Know no more of these; of one that has a later epoch meanwhile, that."""
        for each in tombstones:
            known = self._by_namespace[each.namespace]
            if known.get(each.selects) == each.epoch:
                del known[each.selects]

    @property
    def count(self) -> int:
        """How many tombstones there are."""
        return sum(map(len, self._by_namespace.values()))

    def is_gone(self, key: CacheKey, labels: CachedImage | Labels) -> bool:
        """Whether what lies under `key` and says so of itself was purged, or another picture took its place."""
        if labels.epoch >= self.newest:
            return False
        replaced = self._by_namespace.get(_EVERYONE)
        if replaced is not None:
            name = labels.derived_from if key.is_rendition else key.made_for.name
            if replaced.get(f"{_KEY}:{name}", 0) > labels.epoch or (
                labels.carried_from
                and any(replaced.get(f"{_KEY}:{other}", 0) > labels.epoch for other in labels.carried_from)
            ):
                return True
        return self.is_purged(key, labels)

    def is_purged(self, key: CacheKey, labels: CachedImage | Labels) -> bool:
        """Whether what lies, or is about to lie, under `key` and says so of itself was purged."""
        if labels.epoch >= self.newest:
            return False
        known = self._by_namespace.get(labels.namespace)
        if known is None:
            return False
        # Of which picture it is a rendition, its key does not tell.
        name = labels.derived_from if key.is_rendition else key.made_for.name
        epoch = labels.epoch
        return (
            known.get(f"{_EVERYTHING}:{key.partition}", 0) > epoch
            or _takes_named(name, known, epoch)
            or (labels.carried_from and any(_takes_named(other, known, epoch) for other in labels.carried_from))
            or any(known.get(_selects_tag(tag), 0) > epoch for tag in labels.tags)
        )

    def allows_similar(self, namespace: str) -> bool:
        """Whether similar pictures may answer there: nobody has switched that off, there or everywhere."""
        return not (self._is_similar_off(namespace) or self._is_similar_off(_EVERYONE))

    @property
    def similar_off(self) -> list[str]:
        """The namespaces in which somebody has switched similar pictures off, by name; empty: everywhere."""
        return sorted("" if name == _EVERYONE else name for name in self._by_namespace if self._is_similar_off(name))

    def is_banned(self, key: CacheKey, other: CacheKey) -> bool:
        """Whether the pictures of these two identities were reported to be different ones."""
        known = self._by_namespace.get(_EVERYONE)
        return known is not None and _selects_banned(key, other) in known

    def hides(self, entry: CachedImage) -> bool:
        """Whether an entry may not be served."""
        return self.hides_all or (entry.epoch < self.newest and self.is_gone(entry.key, entry))

    def _is_similar_off(self, name: str) -> bool:
        known = self._by_namespace.get(name)
        return known is not None and known.get(_SIMILAR_OFF, 0) > known.get(_SIMILAR_ON, 0)

    def _is_unreclaimed(self, tombstone: Tombstone) -> bool:
        return tombstone.reclaimed.selects not in self._by_namespace[tombstone.namespace]


def _takes_named(name: str, known: Mapping[str, int], epoch: int) -> bool:
    """Whether the picture of this name and epoch was purged, by itself or with all variants of its identity."""
    return known.get(f"{_KEY}:{name}", 0) > epoch or known.get(f"{_IDENTITY}:{name.rpartition('.')[0]}", 0) > epoch


def _selects_banned(key: CacheKey, other: CacheKey) -> str:
    first, second = sorted((key.made_for.identity_name, other.made_for.identity_name))
    return f"{_BANNED}:{_hash(f'{first}:{second}')}"


def _selects_tag(tag: str) -> str:
    return f"{_TAG}:{_hash(tag)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
