"""The core of a service: the cache, the tiers under it, and the miss path behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry

from cacheserver.accounting.books import CounterBooks, ToldApart
from cacheserver.app.background import keep_doing
from cacheserver.app.miss_path import MissPath, build_miss_path
from cacheserver.app.patience import Patience
from cacheserver.app.tiers import CONTROL_TIMEOUT_S, Lower, build_tiers, lock_disk, look_at_tiers, set_lifecycle_rule
from cacheserver.backpressure import Backpressure
from cacheserver.cache import PromptCache
from cacheserver.calls.downloads import DownloadMemory
from cacheserver.coherence import LOOK_S, TRIM_S, Coherence
from cacheserver.control.aliases import NoAliases, RedisAliases
from cacheserver.control.leases import NoLeases, RedisLeases
from cacheserver.control.replays import LocalReplays, RedisReplays
from cacheserver.control.tombstones import RedisTombstones
from cacheserver.control.undrained import RedisMarks
from cacheserver.embedded.lock import DirectoryLock
from cacheserver.epochs import Epochs
from cacheserver.freshness import stale_windows
from cacheserver.identity import QUALITIES, identify, load_dictionary
from cacheserver.interfaces import Aliases, Books, Clock, Leases, Replays, SimilarPrompts
from cacheserver.journal import Journal
from cacheserver.keep import Keeper
from cacheserver.machine import Machine, Room
from cacheserver.model import CachedImage, GeneratedImage, MatchLevel, TierName
from cacheserver.orphans import LOOK_S as LOOK_FOR_ORPHANS_S
from cacheserver.orphans import Orphans
from cacheserver.paying import UnknownPolicy
from cacheserver.renditions.renderer import ThreadRenderer
from cacheserver.renditions.renditions import Renditions
from cacheserver.reviews import Reviews
from cacheserver.settings import Settings
from cacheserver.settings.schema import SimilaritySettings
from cacheserver.similarity.candidates import Candidates, load_embedder
from cacheserver.similarity.semantic import Semantic
from cacheserver.similarity.verifier import ChatVerifier, VerifierEndpoint
from cacheserver.tiers.hedge import Hedge
from cacheserver.tiers.memory import MemoryCache
from cacheserver.tiers.redis_client import Client

_REFINE_S = 60.0
"""Between two looks for groups of prompts that have grown large."""

_FOR_NOTHING_MICROUSD = 1
"""What a picture counts as that is made again for nothing: among these it still decides what is asked for most."""


@dataclass(frozen=True, slots=True)
class Core:
    """What all that is built around it works with. `registry` has the metrics, `room` says what memory there is."""

    settings: Settings
    clock: Clock
    registry: CollectorRegistry
    books: CounterBooks
    lower: Lower
    memory: MemoryCache
    room: Room | None
    downloads: DownloadMemory
    journal: Journal | None
    keeper: Keeper
    coherence: Coherence
    miss_path: MissPath
    reviews: Reviews
    cache: PromptCache
    renditions: Renditions


async def build_core(settings: Settings, *, patience: Patience, clock: Clock, undo: AsyncExitStack) -> Core:
    """The core as the settings want it.

    Raises:
        ConfigError: one line saying which setting keeps it from being built.
    """
    registry = CollectorRegistry()
    books = CounterBooks(clock=clock, registry=registry, told_apart=_told_apart(settings))
    if any(namespace.corrects_typos for namespace in settings.namespaces.values()):
        await asyncio.to_thread(load_dictionary)
    await lock_disk(settings, clock=clock, undo=undo)
    lower = await build_tiers(settings, books=books, clock=clock, undo=undo)
    for tier in lower.tiers:
        books.breaker(tier.name, is_open=False)  # a series that alerts can find before anything happens
    await look_at_tiers(lower, settings)
    await set_lifecycle_rule(lower, settings)
    coherence = _coherence(settings, lower, books=books, clock=clock)
    await coherence.load()
    undo.push_async_callback(coherence.aclose)
    room = await asyncio.to_thread(Machine().room)

    def price(image: GeneratedImage) -> int:  # there is a miss path before there is a picture to price
        return miss_path.generator.worth_microusd(image, image.model)

    memory = _memory(settings, room=room, price=price, epochs=lower.epochs, clock=clock)
    journal = await _journal(settings, clock=clock, undo=undo)
    keeper = Keeper(
        memory=memory,
        tiers=lower.tiers,
        books=books,
        clock=clock,
        journal=journal,
        copies=settings.durability == "journal+redis",
        epochs=lower.epochs,
        on_replaced=coherence.replaced,
        undrained=lower.undrained,
        until_last_is_well=lower.until_last_is_well,
    )
    undo.push_async_callback(lower.undrained.aclose, CONTROL_TIMEOUT_S)
    undo.push_async_callback(lambda: keeper.aclose(patience.for_writes_s()))
    miss_path = await build_miss_path(settings, lower=lower, books=books, clock=clock, undo=undo)
    undo.push_async_callback(lambda: miss_path.generator.aclose(patience.for_calls_s()))
    namespaces = settings.namespaces.values()
    reviews = Reviews(memory=memory, tiers=lower.tiers, keeper=keeper, namespaces=namespaces)
    renderer = ThreadRenderer(
        max_pixels=settings.generation.max_image_pixels,
        max_bytes=settings.generation.max_image_bytes,
        threads=settings.delivery.threads,
        queue_max=settings.delivery.queue_max,
    )
    undo.push_async_callback(renderer.aclose)
    hedge = Hedge(clock=clock, books=books) if settings.hedged_reads else None
    if hedge is not None:
        undo.push_async_callback(hedge.aclose)
    cache = PromptCache(
        memory=memory,
        tiers=lower.tiers,
        keeper=keeper,
        generation=miss_path.generator,
        reviews=reviews,
        replays=_replays(settings, lower.control, clock=clock),
        identify=identify,
        books=books,
        clock=clock,
        unknown=UnknownPolicy(
            pay=settings.generation.when_unknown == "pay",
            budget_microusd_per_hour=settings.generation.unknown_budget_microusd_per_hour,
        ),
        leases=await _leases(settings, lower.control, miss_path, books=books, clock=clock, undo=undo),
        aliases=_aliases(settings, lower.control, clock=clock),
        similar_prompts=await _similar_prompts(settings, books=books, clock=clock, undo=undo),
        backpressure=Backpressure(journal=journal, high_water=settings.journal.high_water, clock=clock),
        coherence=coherence,
        signer=lower.signer,
        renderer=renderer,
        hedge=hedge,
        url_expires_s=settings.s3.url_expires_s,
    )
    undo.push_async_callback(lambda: cache.aclose(patience.for_calls_s()))
    renditions = Renditions(
        memory=memory,
        tiers=lower.tiers,
        keeper=keeper,
        renderer=renderer,
        find_master=cache.get_by_key,
        clock=clock,
        ttl_s=settings.delivery.derived_ttl_s,
    )
    undo.push_async_callback(renditions.aclose)
    orphans = _orphans(settings, lower, miss_path, keeper, books=books, clock=clock)
    keeper.restore()
    if orphans is not None:
        keep_doing(orphans.sweep, LOOK_FOR_ORPHANS_S, clock=clock, name="look for orphans", undo=undo)
    keep_doing(coherence.look, LOOK_S, clock=clock, name="look for purges", undo=undo)
    keep_doing(coherence.trim, TRIM_S, clock=clock, name="forget old purges", undo=undo)
    cache.reclaim()
    cache.remakes.start(settings.generation.off_peak_hours)
    return Core(
        settings=settings,
        clock=clock,
        registry=registry,
        books=books,
        lower=lower,
        memory=memory,
        room=room,
        downloads=DownloadMemory(settings.server.download_bytes(memory.max_bytes), give_way=memory.give_way),
        journal=journal,
        keeper=keeper,
        coherence=coherence,
        miss_path=miss_path,
        reviews=reviews,
        cache=cache,
        renditions=renditions,
    )


def _memory(
    settings: Settings, *, room: Room | None, price: Callable[[GeneratedImage], int], epochs: Epochs, clock: Clock
) -> MemoryCache:
    max_bytes, max_entry_bytes = settings.memory.sizes(room)

    def microusd(entry: CachedImage) -> int:
        return _FOR_NOTHING_MICROUSD if entry.derived_from else max(_FOR_NOTHING_MICROUSD, price(entry.image))

    return MemoryCache(
        clock=clock,
        max_bytes=max_bytes,
        max_entry_bytes=max_entry_bytes,
        policy=settings.memory.policy,
        # From a level below every picture comes back at about the same cost, whatever was paid for it.
        cost=microusd if settings.tier_names == (TierName.MEMORY,) else lambda _: 1,
        epochs=epochs,
        stale_s=stale_windows(settings.namespaces.values()),
    )


async def _journal(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> Journal | None:
    if not settings.has_journal:
        return None
    setting = "journal.path" if settings.journal.path else "data_dir"
    lock = await DirectoryLock.acquire(settings.journal_path, clock=clock, setting=setting)
    undo.callback(lock.release)
    journal = await Journal.open(
        settings.journal_path,
        clock=clock,
        max_bytes=settings.journal.max_bytes,
        sync=settings.journal.sync,
        sync_interval_s=settings.journal.sync_interval_s,
        write_version=settings.codec.write_version,
    )
    undo.push_async_callback(journal.aclose)
    return journal


def _coherence(settings: Settings, lower: Lower, *, books: Books, clock: Clock) -> Coherence:
    client = lower.control
    return Coherence(
        epochs=lower.epochs,
        shared=None if client is None else RedisTombstones(client=client, prefix=settings.redis.prefix),
        files=lower.files or lower.disk,
        last_tier=lower.tiers[-1].name if lower.tiers else None,
        keeps_all=lower.files is None,
        books=books,
        clock=clock,
        check_s=settings.purge.check_s,
        refuses_when_blind=settings.purge.when_blind == "refuse",
    )


async def _leases(  # noqa: PLR0913 - what it is made of
    settings: Settings,
    client: Client | None,
    miss_path: MissPath,
    *,
    books: CounterBooks,
    clock: Clock,
    undo: AsyncExitStack,
) -> Leases:
    if client is None:
        return NoLeases()
    leases = RedisLeases(
        client=client,
        prefix=settings.redis.prefix,
        replica_id=miss_path.replicas.id,
        clock=clock,
        books=books,
        timeout_s=CONTROL_TIMEOUT_S,
    )
    leases.start()
    undo.push_async_callback(leases.aclose)
    return leases


async def _similar_prompts(
    settings: Settings, *, books: Books, clock: Clock, undo: AsyncExitStack
) -> SimilarPrompts | None:
    """What the semantic level works with; None where no namespace has it.

    Raises:
        ConfigError: a package of the extra [semantic] is not installed.
    """
    namespaces = settings.namespaces.values()
    if all(namespace.similarity < MatchLevel.SEMANTIC for namespace in namespaces):
        return None
    similarity = settings.similarity
    embedder = None if similarity.embedder is None else await asyncio.to_thread(load_embedder, similarity.embedder)
    candidates = Candidates(embedder=embedder, max_per_group=similarity.max_prompts, max_entries=similarity.max_prompts)
    keep_doing(
        partial(asyncio.to_thread, candidates.refine), _REFINE_S, clock=clock, name="refine candidates", undo=undo
    )
    verifier = None
    if similarity.verifier_url is not None:
        verifier = ChatVerifier(_endpoint(similarity, similarity.verifier_url), clock=clock)
        undo.push_async_callback(verifier.aclose)
    return Semantic(
        candidates=candidates,
        verifier=verifier,
        books=books,
        floor=similarity.floor,
        timeout_s=similarity.verifier_timeout_s,
    )


def _endpoint(similarity: SimilaritySettings, url: str) -> VerifierEndpoint:
    return VerifierEndpoint(
        name="verifier",
        base_url=url,
        model=similarity.verifier_model,
        api_key=similarity.verifier_key,
        timeout_s=similarity.verifier_timeout_s,
        max_running=similarity.verifier_max_running,
        microusd_per_million_input_tokens=similarity.verifier_microusd_per_million_input_tokens,
        microusd_per_million_output_tokens=similarity.verifier_microusd_per_million_output_tokens,
        parameters=similarity.verifier_parameters,
    )


def _aliases(settings: Settings, client: Client | None, *, clock: Clock) -> Aliases:
    if client is None:
        return NoAliases()
    return RedisAliases(
        client=client, prefix=settings.redis.prefix, monotonic_s=clock.monotonic_s, timeout_s=CONTROL_TIMEOUT_S
    )


def _orphans(  # noqa: PLR0913 - what it is made of
    settings: Settings, lower: Lower, miss_path: MissPath, keeper: Keeper, *, books: Books, clock: Clock
) -> Orphans | None:
    """What sees to the images of dead replicas, told of ours from now on; None where no tier lies behind Redis."""
    client = lower.control
    if client is None or lower.tiers[-1].name is TierName.REDIS:
        return None
    marks = RedisMarks(
        client=client,
        prefix=settings.redis.prefix,
        replica_id=miss_path.replicas.id,
        live_name=miss_path.replicas.name_in_redis,
    )
    lower.undrained.share(marks)
    return Orphans(
        marks=marks,
        undrained=lower.undrained,
        keeper=keeper,
        tiers=lower.tiers,
        epochs=lower.epochs,
        books=books,
        clock=clock,
    )


def _told_apart(settings: Settings) -> ToldApart | None:
    if not settings.accounting.enabled:
        return None
    namespaces = settings.namespaces.values()
    models = {*settings.model_names, *(namespace.default_model for namespace in namespaces)}
    return ToldApart(frozenset(models), frozenset(QUALITIES), settings.accounting.max_callers)


def _replays(settings: Settings, client: Client | None, *, clock: Clock) -> Replays:
    here = LocalReplays(monotonic_s=clock.monotonic_s)
    if client is None:
        return here
    return RedisReplays(client=client, here=here, prefix=settings.redis.prefix, timeout_s=CONTROL_TIMEOUT_S)
