"""What people decide about similar hits: which were none, and where there are to be none.

Both are marks like those of purges: every replica knows of them a quarter of a second later, and they last.
"""

from __future__ import annotations

from collections.abc import Sequence

from cacheserver.coherence import Coherence
from cacheserver.epochs import Tombstone
from cacheserver.errors import TierUnreachableError
from cacheserver.interfaces import Matches
from cacheserver.model import CacheKey, SampledMatch


class Oversight:
    """Keeps what was reported wrong from happening again, and shows what happens."""

    def __init__(self, *, coherence: Coherence, matches: Matches) -> None:
        """`matches` is the sample that is kept for review."""
        self._coherence = coherence
        self._matches = matches

    async def ban(self, key: CacheKey, other: CacheKey) -> None:
        """Have the pictures of two identities answer for one another no more.

        Raises:
            TierUnreachableError: these tiers did not take note, and with them other replicas.
        """
        await self._mark(Tombstone.of_banned(key, other))

    async def switch_similarity(self, namespace: str, *, is_on: bool) -> None:
        """Have similar pictures answer in a namespace from now on, or no more; empty: everywhere.

        Raises:
            TierUnreachableError: these tiers did not take note, and with them other replicas.
        """
        await self._mark(Tombstone.of_switch(namespace, is_on=is_on))

    def similarity_off(self) -> Sequence[str]:
        """The namespaces in which somebody has switched it off, by name; empty: everywhere."""
        return self._coherence.epochs.similar_off

    async def page(self, *, namespace: str | None, before: str, limit: int) -> Sequence[SampledMatch]:
        """See `Matches.page`."""
        return await self._matches.page(namespace=namespace, before=before, limit=limit)

    async def resolve(self, match_id: str, *, is_right: bool) -> SampledMatch:
        """Drop a similar hit from the sample, and ban its keys first where it was none.

        Raises:
            UnknownReviewError: there is none of this id, any more.
            AccountsUnavailableError: the sample cannot be read now; or, banned or not, it is still in there.
            TierUnreachableError: these tiers did not take note of the ban; it is still in the sample.
        """
        match = await self._matches.get(match_id)
        if not is_right:
            await self.ban(match.key, match.matched_key)
        await self._matches.drop(match)
        return match

    async def _mark(self, mark: Tombstone) -> None:
        silent = await self._coherence.set([mark])
        if silent:
            text = f"Not known yet in: {', '.join(silent)}. Other replicas may not know of it: call again."
            raise TierUnreachableError(silent, text)
