"""Which of many names exist in an object storage: by listing where pages answer many, else by asking for each.

Names are listed in their order, and keys are named by hashes, so that those asked for lie evenly among those that
exist. A page of a listing therefore answers as many of them as their share in the bucket makes, and the first page
tells what the others are worth: all of 10,000 keys in a bucket of 30,000 objects are answered by some 30 pages, while
in one of a hundred million a page answers none.

A page counts for the names between the one it was to begin after and its last one, or all that follow if it is the
last page, and only if it keeps the order: then a name of ours in that range exists if, and only if, it is on the page.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cacheserver.tasks import end

_PAGE_PAYS = 13
"""Names that a page must answer: Amazon takes 12.5 times the price of a HEAD for it, and some ten times as long."""

_WORTH_A_TRY = 10 * _PAGE_PAYS
"""Of so many names a page that answers none makes at most a tenth more work."""

_PAGES_A_RUN = 4
"""A run ends in the midst of a page: with fewer pages to a run, more of them would be read in vain."""

_LISTS_AT_ONCE = 3
"""A server of one's own works on pages, not waits: of eight side by side each took longer than a read may."""

_HEADS_AT_ONCE, _HEADS_A_STEP = 8, 12


@dataclass(frozen=True, slots=True)
class Page:
    """Names that exist, in order, and whether none follow."""

    names: Sequence[str]
    is_last: bool

    def keeps_order_after(self, start: str) -> bool:
        """Whether the names ascend from after `start` on: some servers list otherwise, or ignore where to begin."""
        return (not self.names or self.names[0] > start) and all(one < two for one, two in pairwise(self.names))


class Presence:
    """Finds names in one folder of a bucket.

    Args:
        page: a page of the folder's names that come after the one given.
        heads: for each of a few names whether it exists.
        on_step: called after each page and each few names.
    """

    def __init__(
        self,
        *,
        page: Callable[[str], Awaitable[Page]],
        heads: Callable[[Sequence[str]], Awaitable[list[bool]]],
        on_step: Callable[[], None],
    ) -> None:
        self._page = page
        self._heads = heads
        self._on_step = on_step
        self._present: set[str] = set()

    async def find(self, names: Sequence[str]) -> set[str]:
        """Those of `names` (each once, in order) that exist. Raises what `page` and `heads` do."""
        if len(names) < _WORTH_A_TRY:
            await self._ask(names)
            return self._present
        answered = await self._list(names)
        rest = names[answered:]
        if answered < _PAGE_PAYS:
            await self._ask(rest)
        elif rest:
            runs = max(1, min(_LISTS_AT_ONCE, len(rest) // (_PAGES_A_RUN * answered)))
            size = -(-len(rest) // runs)
            await _all(self._run(rest[start : start + size]) for start in range(0, len(rest), size))
        return self._present

    async def _run(self, names: Sequence[str]) -> None:
        """List from page to page as long as they pay, and ask for what is left then."""
        while len(names) >= _PAGE_PAYS:
            answered = await self._list(names)
            names = names[answered:]
            if answered < _PAGE_PAYS:
                break
        await self._ask_in_turn(names)

    async def _list(self, names: Sequence[str]) -> int:
        """Read the page that `names` begin on; how many of them it answers."""
        start = names[0][:-1]  # a name's beginning comes before it
        page = await self._page(start)
        self._on_step()
        if not page.keeps_order_after(start):
            return 0
        answered = len(names) if page.is_last else bisect_right(names, page.names[-1]) if page.names else 0
        self._present.update(set(page.names).intersection(names[:answered]))
        return answered

    async def _ask(self, names: Sequence[str]) -> None:
        await _all(self._ask_in_turn(names[i::_HEADS_AT_ONCE]) for i in range(min(_HEADS_AT_ONCE, len(names))))

    async def _ask_in_turn(self, names: Sequence[str]) -> None:
        for start in range(0, len(names), _HEADS_A_STEP):
            few = names[start : start + _HEADS_A_STEP]
            answers = await self._heads(few)
            self._on_step()
            self._present.update(name for name, is_there in zip(few, answers, strict=True) if is_there)


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it side by side; what one raises ends the others."""
    tasks = [asyncio.create_task(each, name="find") for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end(tasks)
