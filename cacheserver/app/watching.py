"""What a service watches about itself while it serves: health, budgets, alarms, and figures read where they stand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress

import structlog
from prometheus_client import Counter, Gauge

from cacheserver import allocator
from cacheserver.alarms import Alarms
from cacheserver.app.background import keep_doing
from cacheserver.app.core import Core
from cacheserver.app.lag import LoopLag
from cacheserver.app.miss_path import MissPath
from cacheserver.app.tiers import tier_states
from cacheserver.errors import CacheServerError
from cacheserver.machine import Machine
from cacheserver.model import Priority, TierName
from cacheserver.pressure import MemoryGuard
from cacheserver.rpc.server import RpcServer
from cacheserver.tiers.guard import GuardedTier

_log = structlog.get_logger(__name__)

_TIERS_S = 1.0
_BUDGETS_S = 5.0
_ALARMS_S = 5.0
_MEMORY_S = 0.25


def watch(core: Core, *, rpc: RpcServer, alarms: Alarms, undo: AsyncExitStack) -> None:
    """Begin to watch; `undo` ends it."""
    clock, registry = core.clock, core.registry
    _add_gauges(core)
    show = functools.partial(_show_tiers, rpc, core.lower.tiers)
    keep_doing(show, _TIERS_S, clock=clock, name="watch tiers", at_once=True, undo=undo)
    left = Gauge("cacheserver_budget_remaining_microusd", "What a budget has left", ["scope"], registry=registry)
    limit = Gauge("cacheserver_budget_limit_microusd", "The most a budget allows", ["scope"], registry=registry)
    count = functools.partial(_count_budgets, left, limit, core.miss_path)
    keep_doing(count, _BUDGETS_S, clock=clock, name="watch budgets", at_once=True, undo=undo)
    keep_doing(alarms.look, _ALARMS_S, clock=clock, name="alarms", at_once=True, undo=undo)
    lag = LoopLag(clock=clock)
    registry.register(lag)
    lag.start()
    undo.callback(lag.stop)
    _guard_memory(core, undo=undo)


def _guard_memory(core: Core, *, undo: AsyncExitStack) -> None:
    """Begin to watch how much memory is in use."""
    memory, registry, machine = core.memory, core.registry, Machine()
    guard = MemoryGuard(
        memory=memory,
        machine=machine,
        room=core.room,
        high_water=core.settings.memory.high_water,
        give_back=allocator.giver_back(),
        taken=allocator.taker(),
    )
    undo.callback(guard.close)
    if core.room is None:
        _log.info("memory_not_guarded", text="this system does not tell how much memory is in use")
    room = Gauge("cacheserver_memory_room_bytes", "What L1 may hold now", registry=registry)
    room.set_function(lambda: memory.room_bytes)
    resident = Gauge("cacheserver_resident_bytes", "What is in memory of this process", registry=registry)
    resident.set_function(lambda: machine.resident_bytes() or 0)
    limit = Gauge("cacheserver_memory_limit_bytes", "Of the container, or the machine; 0 if unknown", registry=registry)
    limit.set(core.room.limit_bytes if core.room else 0)
    shed = Counter("cacheserver_memory_shed_bytes", "Dropped from L1 for want of memory", registry=registry)

    async def look() -> None:
        before_bytes = guard.shed_bytes
        await guard.look()
        shed.inc(guard.shed_bytes - before_bytes)

    keep_doing(look, _MEMORY_S, clock=core.clock, name="watch memory", at_once=True, undo=undo)


async def _show_tiers(rpc: RpcServer, tiers: Sequence[GuardedTier]) -> None:
    """Set each tier's health name as its breaker is."""
    for name, is_well in tier_states(tiers).items():
        await rpc.set_tier_health(name, is_well=is_well)


async def _count_budgets(left: Gauge, limit: Gauge, miss_path: MissPath) -> None:
    """Set the metrics of what each budget allows and has left."""
    with suppress(CacheServerError):  # they cannot be asked now: the last figures stand
        for state in await miss_path.budgets.states():
            taken = state.spent_microusd + state.reserved_microusd
            left.labels(state.budget.name).set(state.budget.limit_microusd - taken)
            limit.labels(state.budget.name).set(state.budget.limit_microusd)


def _add_gauges(core: Core) -> None:
    """Metrics that are read where they stand, when somebody asks."""
    registry = core.registry
    in_flight = Gauge("cacheserver_in_flight", "Loads in progress", registry=registry)
    in_flight.set_function(lambda: core.cache.in_flight)
    held = Gauge("cacheserver_held_images", "Images the last tier has yet to take", registry=registry)
    held.set_function(lambda: core.keeper.held_images)
    oldest = Gauge("cacheserver_held_oldest_seconds", "How long the oldest of them has been held", registry=registry)
    oldest.set_function(lambda: core.keeper.oldest_held_s)
    _add_journal_gauges(core)
    depth = Gauge("cacheserver_queue_depth", "Generations that wait", ["priority"], registry=registry)
    for priority in Priority:
        depth.labels(priority.name.lower()).set_function(functools.partial(_waiting, core.miss_path, priority))
    tier_bytes = Gauge("cacheserver_tier_bytes", "Bytes a tier holds", ["tier"], registry=registry)
    tier_bytes.labels(TierName.MEMORY).set_function(lambda: core.memory.size_bytes)
    if (disk := core.lower.disk) is not None:
        tier_bytes.labels(TierName.DISK).set_function(lambda: disk.size_bytes)
    rates = Gauge(
        "cacheserver_limit_images_per_minute",
        "Pictures a minute a group may make",
        ["limit_group"],
        registry=registry,
    )
    for group in core.miss_path.groups:
        rates.labels(group).set_function(functools.partial(_images_per_minute, core.miss_path, group))


def _add_journal_gauges(core: Core) -> None:
    """All of them are 0 without a journal."""
    registry, journal = core.registry, core.journal
    entries = Gauge("cacheserver_journal_entries", "Images in the journal", registry=registry)
    held_bytes = Gauge("cacheserver_journal_bytes", "Bytes they take there", registry=registry)
    limit_bytes = Gauge("cacheserver_journal_limit_bytes", "Bytes they may take there", registry=registry)
    oldest = Gauge("cacheserver_journal_oldest_seconds", "How long the oldest of them has waited", registry=registry)
    if journal is not None:
        entries.set_function(lambda: journal.entries)
        held_bytes.set_function(lambda: journal.size_bytes)
        limit_bytes.set(journal.max_bytes)
        oldest.set_function(lambda: core.keeper.oldest_in_journal_s)


def _images_per_minute(miss_path: MissPath, group: str) -> float:
    return 60 * miss_path.limits.images_per_s(group)


def _waiting(miss_path: MissPath, priority: Priority) -> int:
    return miss_path.generator.queue_depth.get(priority, 0)
