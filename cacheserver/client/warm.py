"""Warm-ups: what both clients send and get."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from cacheserver.client import messages
from cacheserver.client.errors import CacheError, error_of_item
from cacheserver.client.values import ImageSpec
from cacheserver.model import CachePolicy, MatchLevel, TierName, WarmResult
from cacheserver.pb import promptcache_pb2 as pb

DAY_S = 86_400.0
"""How long a warm-up may take, unless another time is given."""

MAX_ITEMS = 1_000
_MAX_MESSAGE_BYTES = 4_000_000


class WarmOptions(TypedDict, total=False):
    """How a warm-up is run, as keyword arguments. Money in micro-dollars.

    job: Its name, 1 to 48 of A-Z a-z 0-9 . _ -: what it pays for carries the tag "job:" and the name. A run needs one.
    plan: Spend nothing: count and price only. Items then get no outcome but a failure, where they have one.
    budget_microusd: The most it may spend in all its runs; unset: as much as budgets allow.
    spent_microusd: Spent in its earlier runs, as far as is known here.
    max_images_per_minute: Pictures that may be begun a minute; unset: as many as limits allow.
    concurrency: Pictures made at a time, 1 to 1,000; unset: 16.
    fill: Only copy into this tier what a slower one has, and generate nothing.
    namespace: With fill and no items: everything of this namespace.
    """

    job: str
    plan: bool
    budget_microusd: int | None
    spent_microusd: int
    max_images_per_minute: int | None
    concurrency: int | None
    fill: TierName | None
    namespace: str | None


@dataclass(frozen=True, slots=True)
class WarmItem:
    """One request to warm: the first `n` pictures of a prompt. `row` is the caller's number, which its outcome repeats.

    With `refresh` they are made anew; run again under the same job's name within 24 hours, they are not paid for twice.
    """

    row: int
    prompt: str | ImageSpec = field(repr=False)
    namespace: str | None = None
    n: int = 1
    tags: tuple[str, ...] = ()
    use: str | None = None
    candidates: int | None = None
    ttl_s: float | None = None
    match_level: MatchLevel | None = None
    refresh: bool = False


@dataclass(frozen=True, slots=True)
class WarmOutcome:
    """What became of one item.

    Attributes:
        row: The item's number.
        result: What became of it; None for a word this client does not know.
        keys: The keys of its pictures, as far as they are known.
        tier: The slowest tier that had one of them; UPSTREAM where one was generated.
        cost_microusd: What was paid for it.
        error: Why it has no picture; only with FAILED. Its class is that of a whole call's error.
    """

    row: int
    result: WarmResult | None
    keys: tuple[str, ...] = ()
    tier: TierName | None = None
    cost_microusd: int = 0
    error: CacheError | None = None


@dataclass(frozen=True, slots=True)
class WarmTotals:
    """Sums over the items of a warm-up so far. Counts of items, but for to_generate and generated: those of pictures.

    Attributes:
        items: Items read.
        duplicates: Items that ask for the very pictures of an earlier one.
        cached: Items that tiers had, by the slowest tier that had one of their pictures.
        in_flight: Items on their way already for somebody else.
        to_generate: Pictures no tier has. Only in a plan, as are the two estimates.
        generated: Pictures generated.
        filled: Items copied into the tier to fill.
        failed: Items that failed.
        spent_microusd: Paid so far in this run.
        estimated_microusd: What to_generate may cost at most, where the cheapest upstreams make it.
        estimated_s: How long to_generate takes at the current limits and options; None where nothing bounds it.
        unknown_tiers: Tiers that could not be asked: what counts as to be generated may be in them.
        unpriced: Items to be generated whose model has no known price: they are not in estimated_microusd.
    """

    items: int = 0
    duplicates: int = 0
    cached: Mapping[TierName, int] = field(default_factory=dict)
    in_flight: int = 0
    to_generate: int = 0
    generated: int = 0
    filled: int = 0
    failed: int = 0
    spent_microusd: int = 0
    estimated_microusd: int = 0
    estimated_s: float | None = None
    unknown_tiers: tuple[TierName, ...] = ()
    unpriced: int = 0


@dataclass(frozen=True, slots=True)
class WarmProgress:
    """Outcomes, in the order they became known, and the sums over all items so far."""

    outcomes: tuple[WarmOutcome, ...]
    totals: WarmTotals


class WarmStream:
    """The messages of a warm-up, made as they are asked for, and what kept an item from being sent.

    An error ends the items: raised where gRPC takes them, in a thread or task of its own, it would be lost.
    """

    def __init__(self, items: Iterable[WarmItem], options: WarmOptions) -> None:
        """Raises InvalidRequestError where an option cannot be sent."""
        self._first = options_message(options)
        self._items = items
        self._error: Exception | None = None

    def messages(self) -> Iterator[pb.WarmImagesRequest]:
        """The options, then the items."""
        yield self._first
        try:
            yield from item_messages(self._items)
        except Exception as error:  # noqa: BLE001 - the caller's own, and raised to it by `finish`
            self._error = error

    def finish(self) -> None:
        """Raise what kept an item from being sent; what was sent before it is done by then."""
        if self._error is not None:
            raise self._error


def options_message(options: WarmOptions) -> pb.WarmImagesRequest:
    """The first message of a warm-up.

    Raises:
        InvalidRequestError: a value cannot be sent.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if (fill := options.get("fill")) is not None:
        given["fill"] = f"TIER_{fill.name}"
    try:
        return pb.WarmImagesRequest(options=pb.WarmOptions(**given))  # type: ignore[arg-type] # a TypedDict loses its types in a filter
    except (TypeError, ValueError) as exc:
        raise messages.unsendable("options", exc) from None


def item_messages(items: Iterable[WarmItem]) -> Iterator[pb.WarmImagesRequest]:
    """Messages of up to 1,000 items and some megabytes, made as they are asked for.

    Raises:
        InvalidRequestError: an item cannot be sent.
    """
    part = pb.WarmItems()
    size = 0
    for item in items:
        message = pb.WarmItem(row=item.row, request=_request(item))
        part.items.append(message)
        size += message.ByteSize()
        if len(part.items) == MAX_ITEMS or size >= _MAX_MESSAGE_BYTES:
            yield pb.WarmImagesRequest(items=part)
            part, size = pb.WarmItems(), 0
    if part.items:
        yield pb.WarmImagesRequest(items=part)


def _request(item: WarmItem) -> pb.GetImageRequest:
    return messages.image_request(
        item.prompt,
        namespace=item.namespace,
        n=item.n,
        tags=item.tags,
        use=item.use,
        candidates=item.candidates,
        ttl_s=item.ttl_s,
        match_level=item.match_level,
        cache_policy=CachePolicy.REFRESH if item.refresh else None,
    )


def read_progress(response: pb.WarmImagesResponse) -> WarmProgress:
    """One answer of a warm-up."""
    return WarmProgress(tuple(map(_outcome, response.outcomes)), _totals(response.totals))


def _outcome(outcome: pb.WarmOutcome) -> WarmOutcome:
    return WarmOutcome(
        row=outcome.row,
        result=messages.member(WarmResult, pb.WarmResult, "WARM_RESULT", outcome.result),
        keys=tuple(outcome.keys),
        tier=messages.member(TierName, pb.Tier, "TIER", outcome.tier),
        cost_microusd=outcome.cost_microusd,
        error=error_of_item(outcome.failure) if outcome.HasField("failure") else None,
    )


def _totals(totals: pb.WarmTotals) -> WarmTotals:
    return WarmTotals(
        items=totals.items,
        duplicates=totals.duplicates,
        cached={tier: each.count for each in totals.cached for tier in _tiers([each.tier])},
        in_flight=totals.in_flight,
        to_generate=totals.to_generate,
        generated=totals.generated,
        filled=totals.filled,
        failed=totals.failed,
        spent_microusd=totals.spent_microusd,
        estimated_microusd=totals.estimated_microusd,
        estimated_s=messages.seconds_of(totals.estimated_time) if totals.HasField("estimated_time") else None,
        unknown_tiers=tuple(_tiers(totals.unknown_tiers)),
        unpriced=totals.unpriced,
    )


def _tiers(numbers: Iterable[int]) -> Iterator[TierName]:
    named = (messages.member(TierName, pb.Tier, "TIER", number) for number in numbers)
    return (tier for tier in named if tier is not None)
