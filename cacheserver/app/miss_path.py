"""The miss path: upstreams, limits, budgets, the ledger, and the generator over them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from cacheserver.accounting.archive import DirectoryArchive, ObjectArchive
from cacheserver.accounting.books import CounterBooks
from cacheserver.accounting.kept import Kept
from cacheserver.accounting.ledger import DaySpending, SqliteLedger
from cacheserver.accounting.shared import SharedFigures
from cacheserver.app.tiers import CONTROL_TIMEOUT_S, Lower
from cacheserver.control.budgets import LocalBudgets, RedisBudgets
from cacheserver.control.figures import LocalFigures, RedisFigures
from cacheserver.control.limits import RedisLimits
from cacheserver.control.replicas import Replicas
from cacheserver.embedded.lock import DirectoryLock
from cacheserver.errors import ConfigError
from cacheserver.figures import DAY_S, HOUR_S
from cacheserver.generation.generator import Generator
from cacheserver.generation.inputs import Inputs
from cacheserver.generation.limits import LocalLimits
from cacheserver.generation.pool import Lane, Pool, PriceStep, Terms
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.providers.openai import Endpoint, OpenAIUpstream, Style
from cacheserver.generation.providers.painter import PainterUpstream
from cacheserver.generation.queue import JobQueue
from cacheserver.generation.refusals import Refusals
from cacheserver.generation.scheduler import Policy, Scheduler
from cacheserver.generation.scoring import HttpScorer, Scorer, TechnicalScorer
from cacheserver.generation.worth import Worth
from cacheserver.interfaces import Books, Clock, Limits, Upstream
from cacheserver.settings import Settings, UpstreamSettings
from cacheserver.tiers.redis_client import Client

_SCORER_TIMEOUT_S = 10.0
_LEASE_BEYOND_TIMEOUT_S = 60.0
_TELLING_S = 1.0
"""For telling figures: calls wait for it before they are sent, once, when Redis falls silent."""


@dataclass(frozen=True, slots=True)
class MissPath:
    """What makes pictures, and what operators look at."""

    generator: Generator
    pool: Pool
    limits: Limits
    budgets: LocalBudgets | RedisBudgets
    ledger: SqliteLedger
    groups: tuple[str, ...]
    figures: SharedFigures | None
    replicas: Replicas


async def build_miss_path(
    settings: Settings, *, lower: Lower, books: CounterBooks, clock: Clock, undo: AsyncExitStack
) -> MissPath:
    """The miss path as the settings want it, with what replicas share in the Redis of `lower`, if there is one.

    Raises:
        ConfigError: another service has the ledger, or a budget has no upper bound.
    """
    client = lower.control
    prices = await load_prices(settings)
    check_upper_bounds(settings, prices)
    ledger, replicas = await _open_ledger(settings, client=client, clock=clock, undo=undo)
    figures = await _start_figures(settings, ledger, replicas, lower=lower, books=books, clock=clock, undo=undo)
    spent = await ledger.sums(last_month_s(clock))
    budgets = await _build_budgets(settings, spent, replicas, client=client, books=books, clock=clock, undo=undo)
    limits = _build_limits(settings, replicas, client=client, clock=clock)
    paid = {each.upstream for each in spent if each.microusd}
    lanes = [
        Lane(
            build_upstream(written, settings, prices=prices, clock=clock),
            _terms(written),
            has_succeeded=written.name in paid,
        )
        for written in settings.upstreams
    ]
    pool = Pool(
        lanes,
        clock=clock,
        books=books,
        month_spend_microusd=budgets.month_spend_microusd,
        images_per_minute=limits.images_per_minute,
    )
    generation = settings.generation
    scheduler = Scheduler(
        pool=pool,
        limits=limits,
        group_limits=settings.group_limits,
        queue=JobQueue(max_jobs=generation.queue_max, max_bytes=generation.queue_max_bytes),
        clock=clock,
        policy=Policy(generation.policy),
        interactive_share=generation.interactive_share,
        lease_s=max(each.read_timeout_s for each in settings.upstreams) + _LEASE_BEYOND_TIMEOUT_S,
    )
    generator = Generator(
        pool=pool,
        scheduler=scheduler,
        budgets=budgets,
        ledger=ledger,
        prices=prices,
        worth=Worth(pool=pool, prices=prices, theirs=_named(settings)),
        refusals=Refusals(ttl_s=generation.refusal_ttl_s, monotonic_s=clock.monotonic_s),
        scorer=_build_scorer(settings, clock=clock, undo=undo),
        inputs=Inputs(max_bytes=generation.max_image_bytes, max_pixels=generation.max_image_pixels),
        books=books,
        clock=clock,
        default_model=settings.model,
        ladder=generation.ladder,
        retry_share=generation.retry_share,
        hedge_after_p99=generation.hedge_after_p99,
        figures=figures,
    )
    groups = tuple(settings.group_limits)
    return MissPath(generator, pool, limits, budgets, ledger, groups, figures, replicas)


async def load_prices(settings: Settings) -> PriceTable:
    """The prices of all models, by our own names of them. Raises ConfigError."""
    table = await asyncio.to_thread(PriceTable.load, settings.generation.prices_file)
    return table.naming(_named(settings))


def changed_lanes(  # noqa: PLR0913 - what was, what is, and what it takes
    before: Settings,
    after: Settings,
    pool: Pool,
    *,
    started: Settings,
    prices: PriceTable,
    are_repriced: bool,
    clock: Clock,
) -> dict[str, tuple[Terms, Upstream | None]]:
    """By name, the terms of each lane that `after` has as it is, and what takes the place of an upstream that changed.

    A lane that is new, gone, or of other models or another limit group than before is none of them. Upstreams
    know the prices: where these `are_repriced`, all are others. Raises ConfigError.
    """
    was = {written.name: written for written in before.upstreams}
    read_timeouts_s = {written.name: written.read_timeout_s for written in started.upstreams}
    lanes = {lane.name: lane for lane in pool.lanes}
    changed: dict[str, tuple[Terms, Upstream | None]] = {}
    for written in after.upstreams:
        lane, terms = lanes.get(written.name), _terms(written)
        if lane is None or (terms.models, terms.limit_group) != (lane.terms.models, lane.group):
            continue
        old = was.get(written.name)
        if old is not None and (old.kind, old.models) != (written.kind, written.models):
            continue
        is_new = old != written or are_repriced
        # What is lent to a call at a limit is lent for as long as calls could take when the service started.
        written = written.model_copy(update={"read_timeout_s": read_timeouts_s[written.name]})  # noqa: PLW2901
        changed[written.name] = terms, build_upstream(written, after, prices=prices, clock=clock) if is_new else None
    return changed


def build_upstream(written: UpstreamSettings, settings: Settings, *, prices: PriceTable, clock: Clock) -> Upstream:
    """One upstream. Raises ConfigError."""
    if written.kind == "painter":
        return PainterUpstream(clock=clock)
    return OpenAIUpstream(
        Endpoint(
            name=written.name,
            base_url=written.base_url,
            api_key=written.key,
            models=written.models,
            style=Style(written.api_style),
            api_version=written.api_version,
            url_hosts=written.url_hosts,
            max_n=written.max_n,
            max_image_bytes=settings.generation.max_image_bytes,
            max_pixels=settings.generation.max_image_pixels,
            connect_timeout_s=written.connect_timeout_s,
            timeout_s=written.read_timeout_s,
            stream=written.stream,
        ),
        prices=prices,
        clock=clock,
    )


def _named(settings: Settings) -> dict[str, str]:
    """Our names of models, and what the providers call them."""
    return {ours: theirs for written in settings.upstreams for ours, theirs in written.models.items()}


def _terms(written: UpstreamSettings) -> Terms:
    steps = [PriceStep(step.from_microusd, Decimal(str(step.factor))) for step in written.price_steps]
    return Terms(
        models=tuple(written.models),
        limit_group=written.group,
        max_n=written.max_n,
        price_factor=Decimal(str(written.price_factor)),
        price_steps=tuple(steps),
        max_cost_microusd=written.max_cost_microusd,
        weight=written.weight,
        percent=written.percent,
        rank=written.rank,
    )


def check_upper_bounds(settings: Settings, prices: PriceTable) -> None:
    """A budget holds only if the most a call can cost is known before it is made. Raises ConfigError."""
    if not settings.budgets:
        return
    for index, written in enumerate(settings.upstreams):
        unknown = [model for model in written.models if not prices.has_images_of(model)]
        if unknown and written.kind != "painter" and written.max_cost_microusd is None:
            raise ConfigError(
                f"upstreams[{index}].max_cost_microusd: there are budgets, and nobody knows what an image of "
                f"{unknown[0]} costs at most; set it"
            )


async def _open_ledger(
    settings: Settings, *, client: Client | None, clock: Clock, undo: AsyncExitStack
) -> tuple[SqliteLedger, Replicas]:
    """The ledger in the data directory, ours alone; calls that an earlier life left open are closed as unknown."""
    directory = settings.data_dir / "ledger"
    lock = await DirectoryLock.acquire(directory, clock=clock, setting="data_dir")
    undo.callback(lock.release)
    replicas = await Replicas.open(directory, clock=clock, client=client, prefix=settings.redis.prefix)
    ledger = await SqliteLedger.at(directory, clock=clock, replica_id=replicas.id)
    undo.push_async_callback(ledger.aclose)
    await ledger.close_dead()
    await replicas.start()
    undo.push_async_callback(replicas.aclose)
    return ledger, replicas


async def _start_figures(  # noqa: PLR0913 - the parts they stand on
    settings: Settings,
    ledger: SqliteLedger,
    replicas: Replicas,
    *,
    lower: Lower,
    books: CounterBooks,
    clock: Clock,
    undo: AsyncExitStack,
) -> SharedFigures | None:
    """What all replicas count together, begun; None where it is not wanted."""
    written = settings.accounting
    if not written.enabled:
        return None
    client, prefix = lower.control, settings.redis.prefix
    directory = settings.data_dir / "figures"
    figures = SharedFigures(
        store=LocalFigures() if client is None else RedisFigures(client=client, prefix=prefix, timeout_s=_TELLING_S),
        archive=DirectoryArchive(directory) if lower.files is None else ObjectArchive(lower.files),
        books=books,
        clock=clock,
        replica_id=replicas.id,
        kept=Kept(written.minutes_kept_hours * HOUR_S, written.hours_kept_days * DAY_S),
        keeps_copy=client is None,
    )
    # Only then: one that has not read all of the ledger would, to end, tell a part of it in the place of all.
    await figures.start(ledger)
    undo.push_async_callback(figures.aclose)
    return figures


async def _build_budgets(  # noqa: PLR0913 - the parts they stand on
    settings: Settings,
    spent: Sequence[DaySpending],
    replicas: Replicas,
    *,
    client: Client | None,
    books: Books,
    clock: Clock,
    undo: AsyncExitStack,
) -> LocalBudgets | RedisBudgets:
    here = LocalBudgets(
        budgets=settings.budgets,
        spent=spent,
        clock=clock,
        books=books,
        degrade_at=settings.budget.degrade_at,
    )
    has_shared = bool(settings.budgets) or any(each.price_steps for each in settings.upstreams)
    if client is None or not has_shared:
        return here
    shared = RedisBudgets(
        client=client,
        here=here,
        replicas=replicas,
        clock=clock,
        prefix=settings.redis.prefix,
        redis_lost=settings.budget.redis_lost,
        timeout_s=CONTROL_TIMEOUT_S,
    )
    await shared.start()
    undo.push_async_callback(shared.aclose)
    return shared


def last_month_s(clock: Clock) -> float:
    """When last month began, in UTC: a call may have begun in it and end in this one."""
    this = datetime.fromtimestamp(clock.now_s(), UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (this - timedelta(days=1)).replace(day=1).timestamp()


def _build_limits(settings: Settings, replicas: Replicas, *, client: Client | None, clock: Clock) -> Limits:
    limits = settings.group_limits
    here = LocalLimits(limits=limits, monotonic_s=clock.monotonic_s, replicas=lambda: replicas.live)
    if client is None:
        return here
    prefix = settings.redis.prefix
    return RedisLimits(
        client=client,
        limits=limits,
        here=here,
        prefix=prefix,
        monotonic_s=clock.monotonic_s,
        timeout_s=CONTROL_TIMEOUT_S,
    )


def _build_scorer(settings: Settings, *, clock: Clock, undo: AsyncExitStack) -> Scorer:
    url = settings.generation.scorer_url
    if url is None:
        return TechnicalScorer()
    scorer = HttpScorer(url=url, timeout_s=_SCORER_TIMEOUT_S, clock=clock)
    undo.push_async_callback(scorer.aclose)
    return scorer
