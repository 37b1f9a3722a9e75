"""An owner's own cells: what it has counted in each minute and hour, and what of that it has not told yet."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cacheserver.figures import Bucket, Figures, Key, cell_name, read_cell_name

Cells = dict[Bucket, dict[str, str]]
"""Cells as they are told: by bucket, then by name."""

_OPEN_FOR_S = 300
"""So long after its end a bucket is kept open; then it is packed, as hardly anything comes any more."""


@dataclass(slots=True)
class _Page:
    """One bucket's cells, and the keys of those that have changed since they were told."""

    figures: dict[Key, Figures] = field(default_factory=dict)
    names: dict[Key, str] = field(default_factory=dict)
    changed: set[Key] = field(default_factory=set)

    def cells(self, owner: str, keys: Iterator[Key] | set[Key]) -> dict[str, str]:
        told: dict[str, str] = {}
        for key in keys:
            if (name := self.names.get(key)) is None:
                name = self.names[key] = cell_name(owner, key)
            told[name] = self.figures[key].encoded()
        return told


class Pages:
    """The cells of one owner, for as long as the store keeps them: should it lose them, they are told once more.

    Not for several threads.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._open: dict[Bucket, _Page] = {}
        self._packed: dict[Bucket, bytes] = {}
        self._untold: set[Bucket] = set()
        """Of the packed: those with something that was not told by then."""

    def figures(self, bucket: Bucket, key: Key) -> Figures:
        """The figures of a cell, to be changed: it will be told anew."""
        page = self._page(bucket)
        page.changed.add(key)
        if (found := page.figures.get(key)) is None:
            found = page.figures[key] = Figures()
        return found

    def changed(self) -> Cells:
        """The cells that have changed since this was called last; give back with `put_back` what was not told."""
        cells: Cells = {}
        for bucket, page in self._open.items():
            if page.changed:
                keys, page.changed = page.changed, set()
                cells[bucket] = page.cells(self.owner, keys)
        return cells

    def put_back(self, cells: Cells) -> None:
        """These are still to be told, as they stand by then; but for those forgotten meanwhile."""
        for bucket, told in cells.items():
            if bucket in self._open or bucket in self._packed:
                self._page(bucket).changed.update(read_cell_name(name) for name in told)

    def put_back_latest(self) -> None:
        """All cells of the buckets that are open are to be told once more."""
        for page in self._open.values():
            page.changed.update(page.figures)

    def all(self) -> Iterator[Cells]:
        """All cells, a bucket at a time."""
        for bucket in [*self._packed, *self._open]:
            if bucket in self._packed:
                yield {bucket: self._unpacked(bucket)}
            elif (page := self._open.get(bucket)) is not None:
                yield {bucket: page.cells(self.owner, set(page.figures))}

    def untold(self) -> Iterator[Cells]:
        """What was packed before it was told, a bucket at a time: whoever takes the next one has told the last."""
        while self._untold:
            bucket = next(iter(self._untold))
            packed = self._packed[bucket]
            yield {bucket: self._unpacked(bucket)}
            if self._packed.get(bucket) is packed:  # else it has changed meanwhile
                self._untold.discard(bucket)

    def tidy(self, now_s: float, is_kept: Callable[[Bucket], bool]) -> None:
        """Pack what is over, and forget what the store does not keep either.

        Told or not: while nobody hears it, it is not to take more and more memory.
        """
        for bucket, page in [*self._open.items()]:
            if bucket.end_s + _OPEN_FOR_S < now_s:
                cells = page.cells(self.owner, set(page.figures))
                self._packed[bucket] = zlib.compress(json.dumps(cells, ensure_ascii=False).encode(), 1)
                if page.changed:
                    self._untold.add(bucket)
                del self._open[bucket]
        for kind in (self._packed, self._open):
            for bucket in [each for each in kind if not is_kept(each)]:
                del kind[bucket]
        self._untold &= self._packed.keys()

    def _page(self, bucket: Bucket) -> _Page:
        page = self._open.get(bucket)
        if page is None:
            page = self._open[bucket] = _Page()
            if bucket in self._packed:
                for name, cell in self._unpacked(bucket).items():
                    page.figures[read_cell_name(name)] = Figures.decoded(cell)
                del self._packed[bucket]
            if bucket in self._untold:
                self._untold.discard(bucket)
                page.changed.update(page.figures)
        return page

    def _unpacked(self, bucket: Bucket) -> dict[str, str]:
        cells: dict[str, str] = json.loads(zlib.decompress(self._packed[bucket]))
        return cells
