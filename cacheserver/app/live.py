"""How this process stands at one moment, read where each figure lives."""

from __future__ import annotations

from collections.abc import Callable

from cacheserver.app.miss_path import MissPath
from cacheserver.app.tiers import Lower
from cacheserver.cache import PromptCache
from cacheserver.interfaces import Clock
from cacheserver.keep import Keeper
from cacheserver.model import LiveState, Priority, TierName, TierState
from cacheserver.tiers.memory import MemoryCache


def live_view(  # noqa: PLR0913 - the parts that have something to tell
    *, cache: PromptCache, memory: MemoryCache, lower: Lower, keeper: Keeper, miss_path: MissPath, clock: Clock
) -> Callable[[], LiveState]:
    """What tells how the process stands now. Asks nobody, so it may be called as often as anyone likes."""

    def now() -> LiveState:
        depth = miss_path.generator.queue_depth
        tiers = [TierState(TierName.MEMORY, breaker_open=False, size_bytes=memory.size_bytes)]
        for tier in lower.tiers:
            size_bytes = lower.disk.size_bytes if lower.disk and tier.name is TierName.DISK else None
            tiers.append(TierState(tier.name, tier.is_open, size_bytes))
        return LiveState(
            time_s=clock.now_s(),
            in_flight=cache.in_flight,
            queue={priority: depth.get(priority, 0) for priority in Priority},
            tiers=tuple(tiers),
            held_images=keeper.held_images,
            oldest_held_s=keeper.oldest_held_s,
        )

    return now
