"""What this replica has yet to bring to the last tier, told to all replicas: one mark for each image that waits.

    marked ──▶ copied into Redis ──▶ its caller is answered ──▶ the last tier takes it: the mark goes

So a replica that is gone for good, its disk with it, leaves behind what it had yet to bring: see `orphans`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from cacheserver.errors import TierError
from cacheserver.interfaces import Clock
from cacheserver.model import CachedImage, CacheKey, Labels
from cacheserver.tasks import OwnedTasks

_log = structlog.get_logger(__name__)

_AWAY_S = 5.0
"""So long nobody asks a Redis that did not answer: each image would wait for it."""


@dataclass(frozen=True, slots=True)
class Mark:
    """That the last tier has yet to take an image, and what has to be known of it even if no copy is left.

    `slot` is where its copy lies, `sha256` its picture's, `replace` and `handed_over_s` are as its journal has them.
    """

    slot: CacheKey
    sha256: str
    replace: bool
    handed_over_s: float
    expire_time_s: float | None
    labels: Labels

    @staticmethod
    def of(slot: CacheKey, entry: CachedImage, *, replace: bool, handed_over_s: float) -> Mark:
        """The mark of an entry that lies in `slot`."""
        labels = Labels(entry.namespace, entry.tags, entry.derived_from, entry.epoch, entry.carried_from)
        # As it is read back: of its identity a key's name tells a part.
        slot = CacheKey.parse(slot.name)
        return Mark(slot, entry.image.sha256, replace, handed_over_s, entry.expire_time_s, labels)

    @property
    def text(self) -> str:
        """The mark as it is told."""
        labels = self.labels
        facts = (self.slot.name, self.sha256, self.replace, self.handed_over_s, self.expire_time_s)
        purged_by = (labels.namespace, labels.tags, labels.derived_from, labels.epoch, labels.carried_from)
        return json.dumps([*facts, *purged_by])

    @staticmethod
    def parse(text: str) -> Mark:
        """The mark that `text` tells. Raises ValueError if it tells none."""
        try:
            slot, sha256, replace, handed_over_s, expire_time_s, *purged_by = json.loads(text)
            namespace, tags, derived_from, epoch, carried_from = purged_by
            tags, carried_from = tuple(map(str, tags)), tuple(map(str, carried_from))
            labels = Labels(str(namespace), tags, str(derived_from), int(epoch), carried_from)
            expires_s = None if expire_time_s is None else float(expire_time_s)
            return Mark(CacheKey.parse(slot), str(sha256), bool(replace), float(handed_over_s), expires_s, labels)
        except TypeError as error:
            raise ValueError("not a mark") from error


class SharedMarks(Protocol):
    """Every replica's marks, as text, where all find them. Raises TierError and nothing else, soon."""

    async def add(self, texts: Sequence[str]) -> None:
        """Add marks to ours."""
        ...

    async def remove(self, text: str) -> bool:
        """Remove one of ours; whether it was there."""
        ...

    async def remove_all(self, texts: Sequence[str]) -> None:
        """Remove many of ours."""
        ...

    def ours(self) -> AsyncIterator[str]:
        """Each of ours; one that comes or goes meanwhile may be missed, and some come twice."""
        ...

    async def dead(self) -> list[str]:
        """The replicas that have marks and show no sign of life."""
        ...

    async def claim(self, replica_id: str, at_most: int) -> int:
        """Make so many of another's marks ours; how many there were."""
        ...


class Undrained:
    """This replica's marks. Without Redis there is nobody to tell, until `share`."""

    def __init__(self, *, clock: Clock) -> None:
        self._clock = clock
        self._shared: SharedMarks | None = None
        self._texts: dict[str, set[str]] = {}
        self._removing: set[str] = set()
        self._to_remove: list[str] = []
        self._is_removing = False
        self._away_until_s = 0.0
        self._tasks = OwnedTasks()

    def share(self, marks: SharedMarks) -> None:
        """Tell others from now on."""
        self._shared = marks

    def lies_in(self, slot_name: str) -> bool:
        """Whether an image of ours lies in this slot that the last tier has yet to take."""
        return slot_name in self._texts

    def knows(self, mark: Mark, text: str) -> bool:
        """Whether a mark is of an image that is in good hands here, or was until just now."""
        return text in self._texts.get(mark.slot.name, ()) or text in self._removing

    def texts(self) -> list[str]:
        """Every mark there should be."""
        return [text for texts in self._texts.values() for text in texts]

    def note(self, mark: Mark) -> str:
        """Take note of an image that waits; the mark's text. Others are told by `tell`, or when `orphans` look."""
        text = mark.text
        self._texts.setdefault(mark.slot.name, set()).add(text)
        return text

    async def tell(self, text: str) -> bool:
        """Tell others of a mark; whether they know. Never raises."""
        if self._shared is None:
            return True
        if self._clock.monotonic_s() < self._away_until_s:
            return False
        try:
            await self._shared.add([text])
        except TierError as error:
            _log.warning("image_not_marked", error=str(error), text="others are told of it later")
            self._away_until_s = self._clock.monotonic_s() + _AWAY_S
            return False
        return True

    def forget(self, mark: Mark) -> None:
        """An image waits no more: the last tier has it, or nobody wants it."""
        text = mark.text
        texts = self._texts.get(mark.slot.name, set())
        texts.discard(text)
        if not texts:
            self._texts.pop(mark.slot.name, None)
        if self._shared is not None and text not in self._removing:
            self._removing.add(text)
            self._to_remove.append(text)
            if not self._is_removing:
                self._is_removing = True
                self._tasks.own(self._remove(self._shared), "remove marks")

    def let_go(self, mark: Mark) -> None:
        """An image is held no more though the last tier does not have it: its mark stays, and leads to its copy."""
        texts = self._texts.get(mark.slot.name, set())
        texts.discard(mark.text)
        if not texts:
            self._texts.pop(mark.slot.name, None)

    async def aclose(self, grace_s: float) -> None:
        """Bring what is being removed to an end."""
        await self._tasks.aclose(grace_s)

    async def _remove(self, shared: SharedMarks) -> None:
        """Remove what is to be removed, as many at a time as there are: hundreds go home in a second."""
        try:
            while self._to_remove:
                texts, self._to_remove = self._to_remove, []
                try:
                    await shared.remove_all(texts)
                except TierError as error:
                    _log.warning("marks_not_removed", error=str(error), marks=len(texts), text="seen to later")
                finally:
                    self._removing.difference_update(texts)
        finally:
            self._is_removing = False
