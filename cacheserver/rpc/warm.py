"""WarmImages: options and items in, outcomes and sums out. What a warm-up does is `warming`'s business."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from cacheserver.calls.asked import Asked
from cacheserver.calls.call import Call
from cacheserver.errors import (
    CacheServerError,
    InvalidRequestError,
    PermissionDeniedError,
    PiiFoundError,
    PromptDeniedError,
)
from cacheserver.identity import identify
from cacheserver.interfaces import Books
from cacheserver.model import (
    Ask,
    CacheKey,
    CachePolicy,
    ImageRequest,
    Namespace,
    Permission,
    TierName,
    VariantPolicy,
    WarmResult,
)
from cacheserver.pb import promptcache_pb2 as pb
from cacheserver.precheck import PromptPolicy
from cacheserver.rpc import replies
from cacheserver.rpc.calls import Parts
from cacheserver.rpc.inputs import reading
from cacheserver.rpc.messages import Problems
from cacheserver.rpc.status import status_of
from cacheserver.warming import Batch, JobOptions, Progress, Warming, WarmItem, WarmOutcome, WarmTotals

MAX_WARM_ITEMS = 1_000
"""Of one message."""

_MAX_CONCURRENCY = 1_000
_MAX_MICROUSD = 10**15
_MAX_PER_MINUTE = 1_000_000
_JOB = re.compile(r"[A-Za-z0-9._-]{1,48}")

_ITEMS_PER_TURN = 100
"""Keying so many items takes about 10 ms; then other calls get their turn."""

_TIERS = {number: tier for tier, number in replies.TIERS.items()}

_RESULTS = {
    WarmResult.CACHED: pb.WARM_RESULT_CACHED,
    WarmResult.GENERATED: pb.WARM_RESULT_GENERATED,
    WarmResult.DUPLICATE: pb.WARM_RESULT_DUPLICATE,
    WarmResult.COLLAPSED: pb.WARM_RESULT_COLLAPSED,
    WarmResult.FILLED: pb.WARM_RESULT_FILLED,
    WarmResult.ABSENT: pb.WARM_RESULT_ABSENT,
    WarmResult.FAILED: pb.WARM_RESULT_FAILED,
}

Read = Callable[[pb.GetImageRequest, Call], Asked]
"""Reads what GetImage is asked, and checks the right to read."""

NamespaceOf = Callable[[str, Permission, Call], Namespace]
"""The namespace of a name, where the caller has this right in it."""


@dataclass(frozen=True, slots=True)
class _Options:
    """The first message of a warm-up. `fill` None: what no tier has is generated."""

    plan: bool
    fill: TierName | None
    namespace: str
    job: JobOptions


class WarmImages:
    """The rpc of this name."""

    def __init__(
        self,
        warming: Warming,
        *,
        read: Read,
        namespace_of: NamespaceOf,
        policies: Mapping[str, PromptPolicy],
        books: Books,
    ) -> None:
        """`policies` are the pre-checks of prompts, by namespace."""
        self._warming = warming
        self._read = read
        self._namespace_of = namespace_of
        self._policies = policies
        self._books = books

    def stop(self) -> None:
        """End the warm-ups that run, and those to come: they may take hours, and can be run again."""
        self._warming.stop()

    async def warm_images(self, parts: Parts[pb.WarmImagesRequest], call: Call) -> AsyncGenerator[bytes, None]:
        """What becomes of each item, as it becomes known."""
        options = await _first_options(parts)
        async with aclosing(await self._progress(options, parts, call)) as progress:
            async for each in progress:
                yield _response(each, call).SerializeToString()

    async def _progress(
        self, options: _Options, parts: Parts[pb.WarmImagesRequest], call: Call
    ) -> AsyncGenerator[Progress, None]:
        batches = self._batches(parts, call, options)
        if options.fill is None:
            begin = self._warming.plan if options.plan else self._warming.run
            return begin(batches, options.job)
        concurrency = options.job.concurrency
        if not options.namespace:
            return self._warming.fill(batches, options.fill, concurrency=concurrency)
        namespace = self._namespace_of(options.namespace, Permission.READ, call)
        async for batch in batches:
            if batch:
                raise InvalidRequestError({"options.namespace": "fills with everything: send items, or set it"})
        return self._warming.fill_from(namespace.partition, options.fill, concurrency=concurrency)

    async def _batches(self, parts: Parts[pb.WarmImagesRequest], call: Call, options: _Options) -> AsyncIterator[Batch]:
        async for part in parts:
            if part.WhichOneof("part") != "items":
                raise InvalidRequestError({"items": "every message after the options must be items"})
            if len(part.items.items) > MAX_WARM_ITEMS:
                raise InvalidRequestError({"items": f"must be at most {MAX_WARM_ITEMS} in a message"})
            batch: list[WarmItem | WarmOutcome] = []
            for i, item in enumerate(part.items.items):
                if i % _ITEMS_PER_TURN == _ITEMS_PER_TURN - 1:
                    await asyncio.sleep(0)
                batch.append(await self._item(item, call, options))
            yield batch

    async def _item(self, item: pb.WarmItem, call: Call, options: _Options) -> WarmItem | WarmOutcome:
        """An item, or why it can be none."""
        makes = options.fill is None
        try:
            asked = await reading(item.request.spec.inputs, self._read, item.request, call)
            request = _checked(asked)
            namespace = asked.namespace
            if makes and request.inputs:
                raise InvalidRequestError({"spec.inputs": "a warm-up makes no edits: ask for each with GetImage"})
            if makes and not call.caller.may(Permission.GENERATE, namespace.name):
                raise PermissionDeniedError("This caller may not generate in this namespace.")
            moderate = None
            if (policy := self._policies.get(namespace.name)) is not None:
                prompt = self._screened(policy, request.prompt, namespace, options) if makes else None
                if makes and prompt is None:
                    moderate = partial(self._moderate, policy, request.prompt, namespace)
                request = replace(request, prompt=policy.redacted(request.prompt) if prompt is None else prompt)
            identity = identify(request, namespace, asked.match_level)
        except CacheServerError as error:
            return WarmOutcome(item.row, WarmResult.FAILED, error=error)
        return WarmItem(item.row, Ask(request, identity, namespace, call.caller, asked.terms), moderate)

    def _screened(self, policy: PromptPolicy, prompt: str, namespace: Namespace, options: _Options) -> str | None:
        """The prompt that its namespace lets pass; None if moderation has to be asked. A plan books nothing."""
        with nullcontext() if options.plan else self._booked(namespace):
            return policy.screened(prompt)

    async def _moderate(self, policy: PromptPolicy, prompt: str, namespace: Namespace) -> None:
        """Ask moderation. Raises what refuses the prompt."""
        with self._booked(namespace):
            await policy.screen(prompt)

    @contextmanager
    def _booked(self, namespace: Namespace) -> Iterator[None]:
        """Books a prompt that is refused."""
        try:
            yield
        except (PromptDeniedError, PiiFoundError) as error:
            self._books.refused(namespace.name, error.reason)
            raise


def _checked(asked: Asked) -> ImageRequest:
    """What is asked for, if a warm-up can make it.

    Raises:
        InvalidRequestError: it cannot.
    """
    problems, terms = Problems(), asked.terms
    if terms.cache_policy not in {CachePolicy.USE_CACHE, CachePolicy.REFRESH}:
        problems.add("cache_policy", "a warm-up keeps what it makes: leave it unset, or REFRESH")
    if terms.variant_policy is not VariantPolicy.FIRST:
        problems.add("variant_policy", "a warm-up makes the first n pictures: leave it unset")
    if terms.n > asked.namespace.max_variants:
        problems.add("n", f"at most {asked.namespace.max_variants} in namespace {asked.namespace.name}")
    problems.check()
    if isinstance(asked.what, CacheKey):
        raise InvalidRequestError({"key": "names a picture that is made: warm with a spec"})
    # All its items are held until their turn comes.
    return asked.what.without_bytes


async def _first_options(parts: Parts[pb.WarmImagesRequest]) -> _Options:
    async for part in parts:
        if part.WhichOneof("part") == "options":
            return _read_options(part.options)
        break
    raise InvalidRequestError({"options": "must be the first message"})


def _read_options(message: pb.WarmOptions) -> _Options:
    problems = Problems("options.")
    budget = message.budget_microusd if message.HasField("budget_microusd") else None
    fill = _TIERS.get(message.fill)
    is_run = not message.plan and message.fill == pb.TIER_UNSPECIFIED
    if not _JOB.fullmatch(message.job) and (is_run or message.job):
        problems.add("job", "must be 1 to 48 of A-Z a-z 0-9 . _ -")
    for field, number, most in (
        ("budget_microusd", budget or 0, _MAX_MICROUSD),
        ("spent_microusd", message.spent_microusd, _MAX_MICROUSD),
        ("max_images_per_minute", message.max_images_per_minute, _MAX_PER_MINUTE),
        ("concurrency", message.concurrency, _MAX_CONCURRENCY),
    ):
        if not 0 <= number <= most:
            problems.add(field, f"must be 0 to {most}")
    if message.fill != pb.TIER_UNSPECIFIED and fill is None:
        problems.add("fill", f"has no value {message.fill}")
    if message.plan and message.fill != pb.TIER_UNSPECIFIED:
        problems.add("plan", "to fill a tier spends nothing: leave plan unset")
    if message.namespace and message.fill == pb.TIER_UNSPECIFIED:
        problems.add("namespace", "is for fill without items: each item names its own")
    problems.check()
    job = JobOptions(
        job=message.job,
        budget_microusd=budget,
        spent_microusd=message.spent_microusd,
        max_images_per_minute=message.max_images_per_minute or None,
    )
    job = replace(job, concurrency=message.concurrency) if message.concurrency else job
    return _Options(message.plan, fill, message.namespace, job)


def _response(progress: Progress, call: Call) -> pb.WarmImagesResponse:
    outcomes = [_outcome(each, call) for each in progress.outcomes]
    return pb.WarmImagesResponse(outcomes=outcomes, totals=_totals(progress.totals))


def _outcome(outcome: WarmOutcome, call: Call) -> pb.WarmOutcome:
    failure = None
    if outcome.error is not None:
        failure = status_of(outcome.error, request_id=call.request_id).as_failure()
    return pb.WarmOutcome(
        row=outcome.row,
        result=_RESULTS[outcome.result],
        keys=[key.name for key in outcome.keys],
        tier=pb.TIER_UNSPECIFIED if outcome.tier is None else replies.TIERS[outcome.tier],
        cost_microusd=outcome.cost_microusd,
        failure=failure,
    )


def _totals(totals: WarmTotals) -> pb.WarmTotals:
    return pb.WarmTotals(
        items=totals.items,
        duplicates=totals.duplicates,
        cached=replies.tier_counts(totals.cached),
        in_flight=totals.in_flight,
        to_generate=totals.to_generate,
        generated=totals.generated,
        filled=totals.filled,
        failed=totals.failed,
        spent_microusd=totals.spent_microusd,
        estimated_microusd=totals.estimated_microusd,
        estimated_time=None if totals.estimated_s is None else replies.duration(totals.estimated_s),
        unknown_tiers=[number for tier, number in replies.TIERS.items() if tier in totals.unknown_tiers],
        unpriced=totals.unpriced,
    )
