"""How this process stands at one moment, read where each figure lives."""

from __future__ import annotations

from collections.abc import Callable

from cacheserver.app.core import Core
from cacheserver.model import LiveState, Priority, TierName, TierState


def live_view(core: Core) -> Callable[[], LiveState]:
    """What tells how the process stands now. Asks nobody, so it may be called as often as anyone likes."""
    lower, keeper = core.lower, core.keeper

    def now() -> LiveState:
        depth = core.miss_path.generator.queue_depth
        tiers = [TierState(TierName.MEMORY, breaker_open=False, size_bytes=core.memory.size_bytes)]
        for tier in lower.tiers:
            size_bytes = lower.disk.size_bytes if lower.disk and tier.name is TierName.DISK else None
            tiers.append(TierState(tier.name, tier.is_open, size_bytes))
        return LiveState(
            time_s=core.clock.now_s(),
            in_flight=core.cache.in_flight,
            queue={priority: depth.get(priority, 0) for priority in Priority},
            tiers=tuple(tiers),
            held_images=keeper.held_images,
            oldest_held_s=keeper.oldest_held_s,
        )

    return now
