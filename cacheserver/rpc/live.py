"""How a process stands, as a message."""

from __future__ import annotations

from cacheserver.model import LiveState, Priority, TierState
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.rpc.replies import TIERS, duration, timestamp

_PRIORITIES = {
    Priority.WARM_UP: pb.PRIORITY_WARM_UP,
    Priority.BATCH: pb.PRIORITY_BATCH,
    Priority.STANDARD: pb.PRIORITY_STANDARD,
    Priority.INTERACTIVE: pb.PRIORITY_INTERACTIVE,
}


def live_message(state: LiveState) -> pb.LiveState:
    """How a process stands at one moment."""
    waiting = sorted(state.queue.items(), reverse=True)
    return pb.LiveState(
        time=timestamp(state.time_s),
        in_flight=state.in_flight,
        queue=[pb.QueueDepth(priority=_PRIORITIES[priority], waiting=count) for priority, count in waiting],
        tiers=[_tier(tier) for tier in state.tiers],
        held_images=state.held_images,
        oldest_held=duration(state.oldest_held_s),
    )


def _tier(state: TierState) -> pb.TierState:
    return pb.TierState(tier=TIERS[state.name], breaker_open=state.breaker_open, size_bytes=state.size_bytes)
