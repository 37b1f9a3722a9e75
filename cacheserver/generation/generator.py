"""The miss path: from an order to pictures.

    refused before? ─▶ budget ─▶ queue and scheduler ─▶ ledger ─▶ upstream ─▶ ledger, budget, limits ─▶ best of
                         ▲                                           │
                         └──────── again, if the failure allows ◀────┘

Each try is an attempt with an id of its own: what it may cost at most is set aside in every budget before it
waits, its row is durable before the first byte goes out, and both are closed with what came of it. An attempt that
was cut off after it was sent, by the network or by our own end, is booked as unknown and never as free.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import structlog

from cacheserver.errors import (
    CacheServerError,
    CannotAffordError,
    InvalidRequestError,
    ShuttingDownError,
    UpstreamBadImageError,
    UpstreamError,
    UpstreamLimitedError,
)
from cacheserver.generation.inputs import Inputs, size_of_inputs
from cacheserver.generation.ladder import Ladder
from cacheserver.generation.pool import Lane, Pool, Terms
from cacheserver.generation.prices import PriceTable
from cacheserver.generation.queue import Job, Turn
from cacheserver.generation.refusals import Refusals
from cacheserver.generation.scheduler import Scheduler
from cacheserver.generation.scoring import Scorer, best_of
from cacheserver.generation.tries import RetryBudget, Tries
from cacheserver.generation.worth import Worth
from cacheserver.interfaces import Books, Budgets, CallFigures, Clock, Ledger, Upstream
from cacheserver.model import (
    Amounts,
    Attempt,
    AttemptOutcome,
    CallReport,
    Delivery,
    GeneratedImage,
    ImageRequest,
    Order,
    Outlook,
    PartialImage,
    Priority,
    Usage,
)
from cacheserver.tasks import OwnedTasks

_log = structlog.get_logger(__name__)

_SHORTEST_WAIT_S = 0.5
_CLOSING_S = 5.0
_JOB_BYTES = 2_000
"""What a waiting job takes beside its prompt and input images."""

PATIENCE_S: Mapping[Priority, float] = {
    Priority.INTERACTIVE: 60.0,
    Priority.STANDARD: 300.0,
    Priority.BATCH: 3_600.0,
    Priority.WARM_UP: 86_400.0,
}
"""By when a picture should be there if its caller set no deadline: what dearer upstreams are taken for."""


@dataclass(frozen=True, slots=True)
class _Ears:
    """Whom an order in progress tells what happens."""

    on_spending: Callable[[], None]
    on_spare: Callable[[GeneratedImage], None]
    on_partial: Callable[[PartialImage], None] | None = None
    safe: asyncio.Event | None = None


@dataclass(frozen=True, slots=True)
class _Work:
    """One call's worth of an order: the job that waits for it, and the variants it makes."""

    order: Order
    job: Job
    variants: Sequence[int]
    ears: _Ears

    @property
    def partial_images(self) -> int:
        """How many partial pictures to ask for: none that nobody hears of."""
        return self.order.partial_images if self.ears.on_partial is not None else 0


class Generator:
    """Makes pictures through the pool of upstreams, within limits and budgets."""

    def __init__(  # noqa: PLR0913 - parts it is built from, by keyword
        self,
        *,
        pool: Pool,
        scheduler: Scheduler,
        budgets: Budgets,
        ledger: Ledger,
        prices: PriceTable,
        worth: Worth,
        refusals: Refusals,
        scorer: Scorer,
        inputs: Inputs,
        books: Books,
        clock: Clock,
        default_model: str,
        ladder: Sequence[str] = (),
        retry_share: float = 0.1,
        hedge_after_p99: float | None = None,
        figures: CallFigures | None = None,
        rng: Random | None = None,
    ) -> None:
        """`prices` are by our own names of models, as `PriceTable.naming` gives them.

        With `hedge_after_p99` a call that takes so many times the p99 is started once more elsewhere.
        """
        self._pool = pool
        self._scheduler = scheduler
        self._budgets = budgets
        self._ledger = ledger
        self._prices = prices
        self._worth = worth
        self._refusals = refusals
        self._scorer = scorer
        self._inputs = inputs
        self._books = books
        self._clock = clock
        self._default_model = default_model
        self._ladder = Ladder(ladder, estimate_microusd=lambda request: self.estimate_microusd(request, 1))
        self._retries = RetryBudget(share=retry_share)
        self._hedge_after_p99 = hedge_after_p99
        self._figures = figures
        self._rng = rng or Random()  # noqa: S311 - spreads retries, guards nothing
        self._jobs: dict[int, list[Job]] = {}
        self._tasks = OwnedTasks()

    # ── what the cache asks ─────────────────────────────────────────────────────────────────────────────────

    @property
    def models(self) -> tuple[str, ...]:
        """The models there are."""
        return self._pool.models

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        return self._default_model

    @property
    def queue_depth(self) -> Mapping[Priority, int]:
        """How many calls wait for their turn, by priority."""
        return self._scheduler.depth

    async def generate(  # noqa: PLR0913 - whom an order tells what, by keyword
        self,
        order: Order,
        variants: Sequence[int],
        *,
        on_spending: Callable[[], None],
        on_spare: Callable[[GeneratedImage], None],
        on_partial: Callable[[PartialImage], None] | None = None,
        safe: asyncio.Event | None = None,
    ) -> list[GeneratedImage]:
        """One picture for each of `variants`, or fewer, never none.

        May be cancelled for free until it calls `on_spending`, right before the first upstream is called. Every
        picture paid for beyond those returned goes to `on_spare`. `on_partial` gets the partial pictures of each try,
        if a single picture is ordered. No call is written down as settled before `safe` is set: should we die until
        then, it is unknown.

        Raises:
            InvalidRequestError: nobody makes pictures with the order's model, or an input image is none.
            CannotAffordError: a budget does not allow it; with the rungs below.
            LedgerUnavailableError: nothing can be written down, so nothing is bought.
            QueueFullError: too many wait.
            UpstreamError: the upstreams failed.
        """
        if not self._pool.serving(order.request.model):
            raise self._not_served()
        self._refusals.check(order)
        await self._inputs.check(order.request)
        ears = _Ears(on_spending, on_spare, on_partial if len(variants) == order.candidates == 1 else None, safe)
        works = [self._work(order, chunk, ears) for chunk in self._chunks(order, variants)]
        self._jobs[id(order)] = [work.job for work in works]
        try:
            # Alone it is no task of its own: nothing awaits between its picture's arrival and our return.
            images = await self._make(works[0]) if len(works) == 1 else await self._make_all(works)
        finally:
            del self._jobs[id(order)]
        return images if order.candidates == 1 else await self._best(order, images, len(variants), ears)

    def hasten(self, order: Order, *, priority: Priority, deadline_s: float | None) -> None:
        """Someone more urgent waits for this order too."""
        until_s = self._until_s(priority, deadline_s)
        for job in self._jobs.get(id(order), ()):
            self._scheduler.hasten(job, priority=priority, deadline_s=until_s)

    def estimated_wait_s(self, model: str, since_s: float) -> float:
        """How many more seconds a generation asked for at `since_s` (monotonic) will take; at least 0.5."""
        latency_s = min((lane.latency_s("") for lane in self._usable(model)), default=0.0)
        expected_s = self._scheduler.wait_s(model, Priority.STANDARD) + latency_s
        return max(
            min(expected_s, PATIENCE_S[Priority.BATCH]) - (self._clock.monotonic_s() - since_s), _SHORTEST_WAIT_S
        )

    def expected_s(self, request: ImageRequest, priority: Priority) -> float:
        """How long from now a new generation of `request` is expected to take, its wait for a turn included."""
        lanes = self._usable(request.model)
        latency_s = min((self._latency_s(lane, request) for lane in lanes), default=0.0)
        return self._scheduler.wait_s(request.model, priority) + latency_s

    def rungs(self, request: ImageRequest) -> Sequence[ImageRequest]:
        """Cheaper requests of the same picture, dearest first."""
        return [rung for rung in self._ladder.below(request) if self._pool.serving(rung.model)]

    def estimate_microusd(self, request: ImageRequest, n: int) -> int:
        """What `n` pictures may cost at most, at the dearest upstream; 0 where no price is known."""
        return self._most_microusd(request, n)

    def cheapest_microusd(self, request: ImageRequest, n: int) -> int:
        """What `n` pictures may cost at most, at the cheapest upstream; 0 where no price is known."""
        return min(self._bounds_microusd(request, n), default=0)

    def outlook(self, request: ImageRequest) -> Outlook:
        """How fast pictures like `request` can be made now. Raises InvalidRequestError for a model nobody serves."""
        lanes = self._usable(request.model)
        if not lanes:
            raise self._not_served()
        groups = frozenset(lane.group for lane in lanes)
        rates = [self._pool.images_per_minute(group) for group in groups]
        limits = [rate for rate in rates if rate is not None]
        return Outlook(
            groups,
            images_per_minute=sum(limits) if len(limits) == len(rates) else None,
            call_s=min(self._latency_s(lane, request) for lane in lanes),
        )

    def worth_microusd(self, image: GeneratedImage, model: str) -> int:
        """What this very picture would cost now; what it did cost where no price tells."""
        return self._worth.microusd(image, model)

    @property
    def prices(self) -> PriceTable:
        """By our own names of models."""
        return self._prices

    def replace(self, prices: PriceTable, changed: Mapping[str, tuple[Terms, Upstream | None]]) -> None:
        """From now on these are the prices, and these lanes have `changed`: see `Pool.replace`."""
        self._prices = prices
        self._pool.replace(changed)
        self._worth.replace(prices)

    async def check(self) -> None:
        """Return if every upstream answers and accepts our key; raise the first UpstreamError if not."""
        await self._pool.check()

    async def settled(self) -> None:
        """Return when every call that has ended is written down."""
        await self._tasks.idle()

    async def aclose(self, grace_s: float = 0.0) -> None:
        """Turn away who waits, let calls end within `grace_s`, write down how, and let go of upstreams' connections.

        A call that lost a race has no owner but us, and its picture is paid for. Writing down has 5 s in any case.
        """
        until_s = self._clock.monotonic_s() + grace_s
        try:
            await self._scheduler.aclose()
        except asyncio.CancelledError:
            until_s = 0.0  # whoever closes us is in a hurry now
            raise
        finally:
            try:
                await self._tasks.aclose(max(until_s - self._clock.monotonic_s(), _CLOSING_S))
            finally:
                await self._scheduler.aclose()  # gives back the places of calls that have ended since
                await self._pool.aclose()

    # ── one call, until it has worked or failed for good ────────────────────────────────────────────────────

    def _chunks(self, order: Order, variants: Sequence[int]) -> list[Sequence[int]]:
        """The pictures to make, in calls that every upstream of the model takes."""
        lanes = self._pool.serving(order.request.model)
        size = min(lane.terms.max_n for lane in lanes)
        wanted = [variant for variant in variants for _ in range(order.candidates)]
        return [wanted[start : start + size] for start in range(0, len(wanted), size)]

    async def _make_all(self, works: Sequence[_Work]) -> list[GeneratedImage]:
        """Several calls side by side. One that fails does not cancel its sisters: they are being paid for."""
        tasks = [asyncio.create_task(self._make(work), name="make") for work in works]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task, work in zip(tasks, works, strict=True):
                _keep_what_comes(task, work.ears)
                task.cancel()
            await asyncio.wait(tasks)
            raise
        return _succeeded(tasks, works[0].ears)

    async def _make(self, work: _Work) -> list[GeneratedImage]:
        tries = Tries(self._retries)
        is_again = False
        while True:
            turn, attempt = await self._begin(work, is_again=is_again)
            try:
                return await self._hedged(turn, work, attempt)
            except UpstreamError as error:
                self._refusals.remember(work.order, error)
                has_other = self._has_other(work.job)
                if not tries.may_retry(error, has_other=has_other):
                    raise
                await self._clock.sleep(tries.pause_s(error, self._rng, has_other=has_other))
            is_again = True

    def _has_other(self, job: Job) -> bool:
        """Whether an upstream is left that has not failed this job."""
        return any(lane.has_room and lane.name not in job.avoid for lane in self._pool.serving(job.model))

    def _work(self, order: Order, variants: Sequence[int], ears: _Ears) -> _Work:
        request, n = order.request, len(variants)
        partial_images = order.partial_images if ears.on_partial is not None else 0
        tokens = self._prices.tokens(request, n, partial_images=partial_images)
        job = Job(
            request,
            Amounts(images=n, requests=1, tokens=tokens),
            order.caller,
            order.priority,
            self._until_s(order.priority, order.deadline_s),
            size_bytes=len(request.prompt) + size_of_inputs(request) + _JOB_BYTES,
        )
        return _Work(order, job, variants, ears)

    def _until_s(self, priority: Priority, deadline_s: float | None) -> float:
        return self._clock.monotonic_s() + PATIENCE_S[priority] if deadline_s is None else deadline_s

    async def _begin(self, work: _Work, *, is_again: bool = False, is_hedge: bool = False) -> tuple[Turn, Attempt]:
        """Set the most a call can cost aside, and wait for its turn. A hedge is only made out of plenty."""
        order, now_s = work.order, self._clock.now_s()
        attempt_id = f"{int(now_s * 1000):013d}-{secrets.token_hex(8)}"
        estimate = self._most_microusd(order.request, len(work.variants), partial_images=work.partial_images)
        try:
            await self._budgets.reserve(
                attempt_id,
                namespace=order.namespace,
                caller=order.caller,
                microusd=estimate,
                degradable=order.allow_degraded or is_hedge,
            )
        except CannotAffordError as error:
            raise self._too_dear(error, order.request) from error
        try:
            turn = await self._scheduler.turn(work.job, again=is_again)
        except BaseException:
            self._tasks.own(self._budgets.release(attempt_id), "release budget")
            raise
        return turn, Attempt(
            id=attempt_id,
            namespace=order.namespace,
            caller=order.caller,
            upstream=turn.lane.name,
            model=order.request.model,
            images=len(work.variants),
            estimate_microusd=estimate,
            # When it is sent: it may have waited for its turn for long.
            start_time_s=self._clock.now_s(),
            tags=order.tags,
            quality=order.request.quality,
        )

    # ── one paid call ───────────────────────────────────────────────────────────────────────────────────────

    async def _call(self, turn: Turn, work: _Work, attempt: Attempt) -> list[GeneratedImage]:
        """Call the turn's upstream; the attempt is closed, and its limits told, whatever comes of it."""
        report = CallReport(tokens=work.job.amounts.tokens)
        try:
            await self._write_down(attempt, work.order.request)
            work.ears.on_spending()
            images, report = await self._paid(turn.lane, work, attempt)
        except UpstreamError as error:
            report = _report_of(error)
            work.job.avoid.add(turn.lane.name)
            self._pool.failed(turn.lane, error)
            raise
        finally:
            # Its slot may have been sought for more: what is reserved is no less than what is asked for.
            self._scheduler.finished(turn, replace(report, images=work.job.amounts.images))
        return images

    def _too_dear(self, error: CannotAffordError, request: ImageRequest) -> CannotAffordError:
        return CannotAffordError(error.budget, reset_time_s=error.reset_time_s, rungs=self.rungs(request))

    async def _write_down(self, attempt: Attempt, request: ImageRequest) -> None:
        """Make the attempt's row durable and its money sent; what was not sent after all is free again."""
        try:
            told = self._figures.sent(attempt) if self._figures is not None else None
            writing = asyncio.gather(
                self._ledger.open(attempt),
                self._budgets.sent(attempt.id),
                *([] if told is None else [told]),
                return_exceptions=True,
            )
            # Both, before either's failure: what is still being set aside could not be given back.
            _raise_first(await writing)
        except BaseException as error:
            reason = error.reason if isinstance(error, CacheServerError) else ShuttingDownError.reason
            self._close(replace(attempt, outcome=AttemptOutcome.NOT_BILLED, reason=reason))
            if isinstance(error, CannotAffordError):
                raise self._too_dear(error, request) from error
            raise

    async def _paid(self, lane: Lane, work: _Work, attempt: Attempt) -> tuple[list[GeneratedImage], CallReport]:
        started_s = self._clock.monotonic_s()
        request, factor = work.order.request, self._pool.price_factor(lane)
        closed = replace(attempt, outcome=AttemptOutcome.UNKNOWN, reason=CacheServerError.reason)
        try:
            delivery = await lane.upstream.generate(
                request,
                work.variants,
                price_factor=factor,
                most_microusd=attempt.estimate_microusd,
                partial_images=work.partial_images,
                on_partial=work.ears.on_partial,
            )
            closed = _delivered(attempt, delivery)
        except UpstreamError as error:
            closed = _failed(attempt, error)
            raise
        except asyncio.CancelledError:
            closed = replace(closed, reason=ShuttingDownError.reason)
            raise
        finally:
            seconds = self._clock.monotonic_s() - started_s
            self._books.upstream_call(lane.name, request.model, closed.reason, seconds)
            self._close(closed, work.ears.safe if closed.outcome is AttemptOutcome.SETTLED else None)
        self._pool.succeeded(lane, quality=request.quality, seconds=seconds)
        tokens = closed.usage.total_tokens if closed.usage else work.job.amounts.tokens
        return list(delivery), CallReport(told=delivery.told, tokens=tokens)

    def _close(self, attempt: Attempt, safe: asyncio.Event | None = None) -> None:
        """Write how an attempt ended, once that is `safe`. Until it is done, what was set aside stays so."""
        attempt = replace(attempt, end_time_s=self._clock.now_s())
        match attempt.outcome:
            case AttemptOutcome.UNKNOWN:
                attempt = replace(attempt, cost_microusd=attempt.estimate_microusd)
                self._books.spent_unknown(attempt.namespace, attempt.cost_microusd)
            case AttemptOutcome.SETTLED:
                self._books.spent(attempt.namespace, attempt.cost_microusd)
            case _:
                pass
        if self._figures is not None:
            self._figures.ended(attempt)
        self._tasks.own(self._write_end(attempt, safe), "close attempt")

    async def _write_end(self, attempt: Attempt, safe: asyncio.Event | None) -> None:
        if safe is not None:
            await safe.wait()
        await self._ledger.close(attempt)
        if attempt.outcome is AttemptOutcome.NOT_BILLED:
            await self._budgets.release(attempt.id)
        else:
            await self._budgets.settle(attempt.id, attempt.cost_microusd, upstream=attempt.upstream)

    # ── two calls for one answer ────────────────────────────────────────────────────────────────────────────

    async def _hedged(self, turn: Turn, work: _Work, attempt: Attempt) -> list[GeneratedImage]:
        """Make the call; where hedging is on and it takes far beyond the usual, make it once more elsewhere."""
        patience_s = (self._hedge_after_p99 or math.inf) * turn.lane.p99_s(work.order.request.quality)
        if math.isinf(patience_s):
            return await self._call(turn, work, attempt)
        first = self._tasks.own(self._call(turn, work, attempt), "call")
        timer = self._tasks.own(self._clock.sleep(patience_s), "hedge timer")
        try:
            await asyncio.wait({first, timer}, return_when=asyncio.FIRST_COMPLETED)
            if first.done() or not self._has_other_than(turn.lane, work.job):
                return await first
            return await self._race(first, turn.lane, work)
        except asyncio.CancelledError:
            _keep_what_comes(first, work.ears)
            first.cancel()
            raise
        finally:
            timer.cancel()

    async def _race(self, first: asyncio.Task[list[GeneratedImage]], lane: Lane, work: _Work) -> list[GeneratedImage]:
        """Whichever call answers first is the answer. The other is paid for too: its pictures are spare ones."""
        turn = asyncio.get_running_loop().create_future()
        job = replace(work.job, avoid={lane.name, *work.job.avoid}, turn=turn)
        second = self._tasks.own(self._hedge(replace(work, job=job)), "hedge")
        racing = {first, second}
        try:
            while racing:
                done, racing = await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
                winner = next((task for task in done if task.exception() is None), None)
                if winner is not None:
                    for late in {first, second} - {winner}:
                        _keep_what_comes(late, work.ears)
                    if winner is first and not job.turn.done():
                        second.cancel()  # it still waits for its turn, and costs nothing yet
                    return winner.result()
        except asyncio.CancelledError:
            _keep_what_comes(second, work.ears)
            second.cancel()
            raise
        return first.result()

    async def _hedge(self, work: _Work) -> list[GeneratedImage]:
        turn, attempt = await self._begin(work, is_hedge=True)
        return await self._call(turn, work, attempt)

    def _has_other_than(self, lane: Lane, job: Job) -> bool:
        return any(other.has_room and other is not lane for other in self._pool.serving(job.model))

    # ── the best of several ─────────────────────────────────────────────────────────────────────────────────

    async def _best(self, order: Order, images: list[GeneratedImage], n: int, ears: _Ears) -> list[GeneratedImage]:
        """The best of each `order.candidates` pictures; the others are spare ones."""
        size = max(1, -(-len(images) // n))
        rounds = [images[start : start + size] for start in range(0, len(images), size)]
        try:
            scored = await asyncio.gather(*(best_of(order.request, each, self._scorer) for each in rounds))
        except asyncio.CancelledError:
            for image in images:
                ears.on_spare(image)
            raise
        for _, others in scored:
            for other in others:
                ears.on_spare(other)
        return [best for best, _ in scored]

    # ── what things cost and take ───────────────────────────────────────────────────────────────────────────

    def _not_served(self) -> InvalidRequestError:
        return InvalidRequestError({"spec.model": f"not served here; there are: {', '.join(self.models)}"})

    def _most_microusd(self, request: ImageRequest, n: int, *, partial_images: int = 0) -> int:
        return max(self._bounds_microusd(request, n, partial_images), default=0)

    def _bounds_microusd(self, request: ImageRequest, n: int, partial_images: int = 0) -> Iterator[int]:
        """The most that `n` pictures can cost, by the prices there are for them."""
        for lane in self._pool.priced_apart(request.model):
            if (most_each := lane.terms.max_cost_microusd) is not None:
                yield most_each * n
            else:
                factor = self._pool.price_factor(lane)
                yield self._prices.estimate_microusd(request, n, factor, partial_images=partial_images)

    def _usable(self, model: str) -> Sequence[Lane]:
        lanes = self._pool.serving(model)
        return [lane for lane in lanes if lane.is_open] or lanes

    def _latency_s(self, lane: Lane, request: ImageRequest) -> float:
        """As learned; of a quality not tried yet by one that was, and by prices: tokens take time and money alike.

        Were it taken for slow until tried, nobody who is short of time would ever try it.
        """
        tried = lane.mean_latencies_s
        own = self._prices.estimate_microusd(request, 1)
        if request.quality in tried or not own:
            return lane.latency_s(request.quality)
        prices = {quality: self._prices.estimate_microusd(replace(request, quality=quality), 1) for quality in tried}
        scaled = (mean_s * own / prices[quality] for quality, mean_s in tried.items())
        return max(scaled, default=lane.latency_s(request.quality))


def _succeeded(tasks: Sequence[asyncio.Task[list[GeneratedImage]]], ears: _Ears) -> list[GeneratedImage]:
    """What worked; the first failure if nothing did, and any that is no error of ours at once."""
    images = [image for task in tasks if task.exception() is None for image in task.result()]
    failures = [error for task in tasks if (error := task.exception()) is not None]
    unforeseen = next((error for error in failures if not isinstance(error, CacheServerError)), None)
    if unforeseen is not None:
        for image in images:
            ears.on_spare(image)
        raise unforeseen
    if not images:
        raise failures[0]
    for failure in failures:
        _log.warning("pictures_lost", error=str(failure))
    return images


def _keep_what_comes(task: asyncio.Task[list[GeneratedImage]], ears: _Ears) -> None:
    """See to it that the pictures of a call nobody waits for any more are kept: they are paid for."""

    def give(task: asyncio.Task[list[GeneratedImage]]) -> None:
        if not task.cancelled() and task.exception() is None:
            for image in task.result():
                ears.on_spare(image)

    task.add_done_callback(give)


def _delivered(attempt: Attempt, delivery: Delivery) -> Attempt:
    """A call that made its pictures: settled, or unknown where nobody said what it cost."""
    return replace(
        attempt,
        outcome=AttemptOutcome.SETTLED if delivery.priced else AttemptOutcome.UNKNOWN,
        cost_microusd=sum(image.paid_microusd for image in delivery),
        reason="ok",
        upstream_request_id=delivery.images[0].upstream_request_id,
        usage=_sum_of([image.usage for image in delivery if image.usage is not None]),
    )


def _failed(attempt: Attempt, error: UpstreamError) -> Attempt:
    """A failed attempt: settled where the provider billed a picture that was no good, unknown where nobody knows."""
    outcome = AttemptOutcome.NOT_BILLED
    if error.cost_microusd is None:
        outcome = AttemptOutcome.UNKNOWN
    elif error.cost_microusd or isinstance(error, UpstreamBadImageError):
        outcome = AttemptOutcome.SETTLED
    return replace(
        attempt,
        outcome=outcome,
        cost_microusd=error.cost_microusd or 0,
        reason=error.reason,
        upstream_request_id=error.upstream_request_id,
    )


def _raise_first(outcomes: Iterable[BaseException | None]) -> None:
    for failure in filter(None, outcomes):
        raise failure


def _report_of(error: UpstreamError) -> CallReport:
    is_limited = isinstance(error, UpstreamLimitedError)
    return CallReport(limited=is_limited, retry_after_s=error.stated_wait_s if is_limited else None, told=error.told)


def _sum_of(usages: Sequence[Usage]) -> Usage | None:
    if not usages:
        return None
    return Usage(
        input_tokens=sum(each.input_tokens for each in usages),
        input_text_tokens=sum(each.input_text_tokens for each in usages),
        input_image_tokens=sum(each.input_image_tokens for each in usages),
        output_tokens=sum(each.output_tokens for each in usages),
        total_tokens=sum(each.total_tokens for each in usages),
    )
