"""Prompts of stored pictures, to be found by prompts that look like them.

What is found is a candidate and no more: prompts that ask for two pictures look as alike as prompts that ask for one.

Prompts lie in groups, which never mix: a group is everything of a request but its prompt. A search compares with every
prompt of its group. That is exact, and with 100,000 of them takes some 3 to 8 ms of one core. A larger group is divided
into clusters, of which a search looks into the nearest ones: see `Candidates.refine`.

This module needs numpy, of the extra [semantic]; without it no `Candidates` can be made.
"""

from __future__ import annotations

import importlib
import math
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cacheserver.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray["np.float32"]

try:
    import numpy as np
except ImportError:
    _HAS_NUMPY = False
else:
    _HAS_NUMPY = True

_DIMENSIONS = 256
_FIRST_ROWS = 8

_EXACT_UP_TO = 100_000
"""Prompts of a group that are compared one by one."""

_PROBED = 64
"""Clusters a search looks into. With 200,000 prompts it misses 1 % of the five best that score 0.8 or more."""

_ROUNDS = 10
_SAMPLE = 64
"""Prompts a cluster is learned from."""

_STALE = 0.25
"""Which share of the clusters' entries may have changed before they are made anew."""

_SPARE = 4
"""So many times the candidates wanted are taken from the clusters: some of those have changed since."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt that looks like the one asked for. `score` is their cosine: 1 is equal, or as good as."""

    key: str
    prompt: str
    score: float


class Embedder(Protocol):
    """Turns prompts into vectors, near each other for prompts that are alike. May be called from several threads."""

    def embed(self, prompts: Sequence[str]) -> Vectors:
        """A row for each prompt, always of the same length, whatever its norm. The same prompt has the same row."""
        ...


def load_embedder(path: str) -> Embedder:
    """An embedder of the class that `path` names, as "module:class".

    Raises:
        ConfigError: there is none, or it cannot be made.
    """
    module, _, name = path.partition(":")
    try:
        embedder: Embedder = getattr(importlib.import_module(module), name)()
    except Exception as error:  # of code that is not ours
        raise ConfigError(f"similarity.embedder: {path} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(getattr(embedder, "embed", None)):
        raise ConfigError(f"similarity.embedder: {path} has no method embed")
    return embedder


class Trigrams:
    """An Embedder without a model: which three characters follow each other, hashed into 256 dimensions.

    Case, width and white space do not count. A prompt takes some 25 µs, and has the same vector in all processes and on
    all machines. With signs, so that what is hashed alike by chance cancels out rather than adds up.
    """

    def embed(self, prompts: Sequence[str]) -> Vectors:
        """See `Embedder.embed`."""
        return np.stack([_trigrams(prompt) for prompt in prompts])


class Candidates:
    """The prompts that may be found, in memory; each of them takes 1 kB besides its text. Safe to use from threads.

    Every method but `remove` takes processor time, `nearest` milliseconds in a large group and `refine` seconds, so an
    event loop has them run in a thread; numpy lets go of the interpreter meanwhile.
    """

    def __init__(
        self,
        *,
        embedder: Embedder | None = None,
        max_per_group: int = _EXACT_UP_TO,
        max_entries: int = 2 * _EXACT_UP_TO,
    ) -> None:
        """`embedder` is where candidates come from; without one, `Trigrams`.

        In a group that holds `max_per_group` prompts a new one takes the place of the oldest; beyond `max_entries` in
        all, the group goes that was not used for longest.

        Raises:
            ConfigError: a package of the extra [semantic] is not installed.
        """
        if not _HAS_NUMPY:
            raise ConfigError("similar prompts are found with numpy: pip install 'cacheserver[semantic]'")
        if max_per_group > _EXACT_UP_TO:
            _faiss()
        self._embedder = embedder or Trigrams()
        self._max_per_group = max_per_group
        self._max_entries = max_entries
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()
        """The one used last is last."""
        self._entries = 0
        self._lock = threading.Lock()
        self._refining = threading.Lock()

    def __len__(self) -> int:
        """How many prompts there are, in all groups."""
        return self._entries

    def add(self, group: Hashable, key: str, prompt: str) -> None:
        """Let `prompt` be found in `group` from now on, in place of what had the same key there."""
        vector = self._vector(prompt)
        with self._lock:
            held = self._groups.setdefault(group, _Group(len(vector)))
            self._groups.move_to_end(group)
            before = len(held)
            if key not in held and before >= self._max_per_group:
                held.remove_oldest()
            held.put(key, prompt, vector)
            self._entries += len(held) - before
            while self._entries > self._max_entries and len(self._groups) > 1:
                _, unused = self._groups.popitem(last=False)
                self._entries -= len(unused)

    def remove(self, group: Hashable, key: str) -> None:
        """Let what has this key in `group` no longer be found; nothing if there is none."""
        with self._lock:
            held = self._groups.get(group)
            if held is None or key not in held:
                return
            held.remove(key)
            self._entries -= 1
            if not len(held):
                del self._groups[group]

    def nearest(self, group: Hashable, prompt: str, limit: int = 5, floor: float = 0.80) -> list[Candidate]:
        """At most `limit` prompts of `group` that score `floor` or more, best first."""
        vector = self._vector(prompt)
        with self._lock:
            held = self._groups.get(group)
            if held is None:
                return []
            self._groups.move_to_end(group)
            vectors = held.vectors[: held.used]
            rows = held.clusters.nearest(vector, limit * _SPARE) if held.clusters else None
        if rows is None:
            # Without the lock. A row that changes meanwhile is scored once more below.
            rows = _best(vectors @ vector, limit, floor)
        with self._lock:
            return held.candidates(rows, vector, limit, floor)

    def refine(self) -> None:
        """Divide groups of more than 100,000 prompts into clusters, those that changed much once more.

        To be called now and then, in a thread: it takes about a second of one core for 100,000 prompts. Until then
        searches of such a group are exact, and what was added since is found in clusters of before.
        """
        with self._refining:
            with self._lock:
                due = [held for held in self._groups.values() if held.needs_clusters]
            for held in due:
                with self._lock:
                    held.changed = set()
                    vectors = held.vectors[: held.used]
                clusters = _Clusters(vectors)
                with self._lock:
                    for row in held.changed:
                        clusters.put(row, held.vectors[row])
                    held.changed, held.clusters = None, clusters

    def _vector(self, prompt: str) -> Vectors:
        """The embedded prompt with length 1.

        Raises:
            ValueError: the embedder gave no vector.
        """
        vectors = np.asarray(self._embedder.embed([prompt]), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != 1 or not np.isfinite(vectors).all():  # noqa: PLR2004 - a row a prompt
            raise ValueError(f"the embedder gave no row of finite numbers for a prompt, but an array {vectors.shape}")
        vector: Vectors = vectors[0]
        norm = float(np.linalg.norm(vector))
        return vector / np.float32(norm) if norm else vector


@dataclass(slots=True, eq=False)
class _Group:
    """The prompts of a group and their vectors, a row each. A row whose prompt went is zero until the next takes it."""

    dimensions: int
    vectors: Vectors = field(init=False)
    used: int = 0
    clusters: _Clusters | None = None
    changed: set[int] | None = None
    """The rows that were written since new clusters are being made; None if none are."""
    _rows: dict[str, int] = field(default_factory=dict)
    """By key, the oldest first."""
    _entries: list[tuple[str, str] | None] = field(default_factory=list)
    """By row, key and prompt."""
    _free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vectors = np.zeros((_FIRST_ROWS, self.dimensions), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    @property
    def needs_clusters(self) -> bool:
        if self.clusters is None:
            return self.used > _EXACT_UP_TO
        return self.clusters.added > _STALE * self.used

    def put(self, key: str, prompt: str, vector: Vectors) -> None:
        """Add a prompt as the newest, in place of what had its key."""
        if len(vector) != self.dimensions:
            raise ValueError(f"the embedder gave {len(vector)} numbers for a prompt, and {self.dimensions} before")
        row = self._rows.pop(key, None)
        if row is None:
            row = self._free.pop() if self._free else self._new_row()
        self._rows[key] = row
        self._entries[row] = key, prompt
        self.vectors[row] = vector
        if self.clusters:
            self.clusters.put(row, vector)
        if self.changed is not None:
            self.changed.add(row)

    def remove(self, key: str) -> None:
        row = self._rows.pop(key)
        self._entries[row] = None
        self.vectors[row] = 0
        self._free.append(row)

    def remove_oldest(self) -> None:
        self.remove(next(iter(self._rows)))

    def candidates(self, rows: Iterable[int], vector: Vectors, limit: int, floor: float) -> list[Candidate]:
        """What lies in `rows` now, as far as it is near enough."""
        found = []
        for row in rows:
            score = min(float(self.vectors[row] @ vector), 1.0)
            if (entry := self._entries[row]) is not None and score >= floor:
                found.append(Candidate(*entry, score))
        return sorted(found, key=lambda candidate: -candidate.score)[:limit]

    def _new_row(self) -> int:
        if self.used == len(self.vectors):
            # Into a new array: a search may be reading the old one.
            self.vectors = np.concatenate([self.vectors, np.zeros_like(self.vectors)])
        self._entries.append(None)
        self.used += 1
        return self.used - 1


class _Clusters:
    """Rows by the cluster they lie in (an inverted file, of faiss).

    Rows are only added: what it finds is compared once more with what lies in them by then.
    """

    def __init__(self, vectors: Vectors) -> None:
        faiss = _faiss()
        faiss.omp_set_num_threads(1)  # of this thread: the other cores are for answering
        clusters = 2 * math.isqrt(len(vectors))
        self._quantizer = faiss.IndexFlatIP(vectors.shape[1])
        self._index = faiss.IndexIVFFlat(self._quantizer, vectors.shape[1], clusters, faiss.METRIC_INNER_PRODUCT)
        self._index.nprobe = _PROBED
        self._index.cp.niter = _ROUNDS
        self._index.cp.max_points_per_centroid = _SAMPLE
        self._index.train(vectors)
        self._index.add(vectors)
        self.added = 0
        """How many rows were added since."""

    def put(self, row: int, vector: Vectors) -> None:
        self._index.add_with_ids(vector[np.newaxis], np.array([row], dtype=np.int64))
        self.added += 1

    def nearest(self, vector: Vectors, limit: int) -> list[int]:
        _, [rows] = self._index.search(vector[np.newaxis], limit)
        return [int(row) for row in np.unique(rows) if row >= 0]


def _best(scores: Vectors, limit: int, floor: float) -> list[int]:
    rows = np.flatnonzero(scores >= floor)
    if len(rows) > limit:
        rows = rows[np.argpartition(-scores[rows], limit - 1)[:limit]]
    return [int(row) for row in rows]


def _trigrams(prompt: str) -> Vectors:
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    characters = np.frombuffer(f" {text:<1} ".encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint32)
    # Multiplied and shifted, all places at once: to call a hash function for each takes five times as long.
    hashes = characters[:-2] * np.uint32(0x9E3779B1)
    hashes ^= hashes >> np.uint32(15)
    hashes = (hashes + characters[1:-1]) * np.uint32(0x85EBCA77)
    hashes ^= hashes >> np.uint32(13)
    hashes = (hashes + characters[2:]) * np.uint32(0xC2B2AE3D)
    hashes ^= hashes >> np.uint32(16)
    signs = np.where(hashes & np.uint32(_DIMENSIONS), 1.0, -1.0)
    return np.bincount(hashes % np.uint32(_DIMENSIONS), weights=signs, minlength=_DIMENSIONS).astype(np.float32)


def _faiss() -> Any:
    try:
        import faiss  # noqa: PLC0415 - 60 MB that only large groups need
    except ImportError as error:
        raise ConfigError(
            f"more than {_EXACT_UP_TO:,} prompts of a group need faiss: pip install 'cacheserver[semantic]'"
        ) from error
    return faiss
