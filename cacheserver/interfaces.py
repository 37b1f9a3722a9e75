"""What the parts of the house promise one another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from cacheserver.figures import Bucket, HitRow
from cacheserver.model import (
    Alias,
    Amounts,
    Attempt,
    BudgetState,
    CachedImage,
    CacheKey,
    CallReport,
    Delivery,
    GeneratedImage,
    Head,
    Identity,
    ImageRequest,
    Labels,
    MatchLevel,
    Order,
    Outcome,
    Outlook,
    PartialImage,
    Priority,
    PromptKind,
    RecordedPrompt,
    Rendition,
    Replay,
    SampledMatch,
    Slot,
    SourceObject,
    TierName,
    Touch,
    Touched,
    UpstreamHealth,
)


class Clock(Protocol):
    """Time, passed in so that tests decide it."""

    def now_s(self) -> float:
        """Wall-clock seconds since 1970: for what outlives the process."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that only go forward: for durations and deadlines inside the process."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        ...


def no_step() -> None:
    """What nobody watches does after each step."""


class Tier(Protocol):
    """A slower cache under memory. May lose entries at any time; never returns a wrong one.

    Every read is verified: length and xxh3-128 of the bytes, identity digest, codec version. Raises
    TierError and nothing else: TierTimeoutError, CorruptEntryError and NewerEntryError where they apply.
    A raised TierError means unknown; None means known absent. Every call may be repeated.
    """

    @property
    def name(self) -> TierName:
        """Which tier this is."""
        ...

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None:
        """The intact, fresh entry stored under `key`; None if there is none, it expired or is another identity's.

        One that expired less than `stale_s` ago is answered with, too: whoever asks for it looks at its end himself.
        The entry's own key may name another variant: a stand-in keeps the key it was made for.
        """
        ...

    async def find(self, keys: Sequence[CacheKey], *, on_step: Callable[[], None] = no_step) -> list[bool]:
        """For each key whether something is stored under it. Cheap: neither reads nor verifies the bytes.

        However many keys there are, it goes in steps that each take no longer than a read may, and calls `on_step`
        after each: whoever watches the time can tell what is long from what hangs.
        """
        ...

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        """Store `entry` under `key`; on True the tier has acknowledged exactly these bytes.

        Without `replace`, False means that an intact, fresh entry of this identity with other bytes holds the
        key, and nothing was written; equal bytes are True. A damaged, expired or foreign entry is overwritten.
        With `replace` whatever is there is overwritten, except that False still means another writer was
        faster, or, where replicas share the tier, that what is there has a later epoch. An entry above the tier's
        size limit raises TierError.
        """
        ...

    async def move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:
        """Have the copy of `entry` that lies in `slot`, another of the same identity's, lie under `key` instead.

        Whether it does: not if another picture lies in either, nor if the tier cannot do so cheaply. Nothing lies in
        `slot` afterwards.
        """
        ...

    async def touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        """See to it that the entry under `key`, which is asked for, stays as long as it should and has `entry`'s end.

        Its end is told where it moved far enough (see `CachedImage.outlasts`). A tier that drops what lies there long
        enough keeps it for as long as a new copy if it would soon drop it. Another picture is left alone.
        """
        ...

    async def delete(self, key: CacheKey) -> bool:
        """Remove what is stored under `key`; whether there was something."""
        ...

    async def reclaim(self, key: CacheKey) -> bool:
        """Remove what is stored under `key` if it was purged or is damaged; whether it was removed.

        What has taken its place meanwhile is left, as far as the tier can tell.
        """
        ...

    def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        """Every key of a partition, in no order; one that comes or goes meanwhile may be missed. Stand-ins included."""
        ...

    async def page(self, partition: str, *, after: CacheKey | None, limit: int) -> list[CacheKey]:
        """At most `limit` keys of a partition by their names, from the first one after `after` on.

        Fewer only where the list ends. Stand-ins included.
        """
        ...

    async def renditions(self, key: CacheKey) -> list[CacheKey]:
        """The keys of the renditions that lie beside the pictures of `key`'s fingerprint, in no order.

        They are those of all its variants, and of other identities of this fingerprint if there are any. What is left
        out cannot be got either.
        """
        ...

    async def head(self, key: CacheKey) -> Head | None:
        """The entry under `key` without its bytes, fresh or not; None if there is none or it is damaged."""
        ...

    async def labels(self, key: CacheKey) -> Labels | None:
        """The labels of the entry under `key`, without its bytes; None if there is none or it is damaged."""
        ...

    async def ping(self) -> None:
        """Return if reads and writes would work now; raise TierError if not."""
        ...

    async def aclose(self) -> None:
        """Let go of connections and threads. Nothing else may be called afterwards."""
        ...


class SigningTier(Tier, Protocol):
    """A tier that hands out URLs."""

    async def signed_url(self, entry: CachedImage, expires_s: int) -> str:
        """A URL that serves `entry`'s bytes for `expires_s` seconds.

        The object is written first unless the tier has acknowledged this very digest. Raises TierError.
        """
        ...


class CopyingTier(Tier, Protocol):
    """A tier that can take a picture from where it lies in its own store."""

    async def copy(self, key: CacheKey, entry: CachedImage, source: SourceObject) -> bool:
        """`put` without `replace`, where the same bytes lie in `source`: they need not be sent.

        What cannot be copied is sent.
        """
        ...


class Upstream(Protocol):
    """One endpoint, credential and model deployment that makes pictures. Slow, and every call costs money."""

    @property
    def name(self) -> str:
        """Its name in config, metrics and logs."""
        ...

    async def generate(  # noqa: PLR0913 - what a call to an upstream is made of
        self,
        request: ImageRequest,
        variants: Sequence[int],
        *,
        price_factor: Decimal = Decimal(1),
        most_microusd: int = 0,
        partial_images: int = 0,
        on_partial: Callable[[PartialImage], None] | None = None,
    ) -> Delivery:
        """Make one picture for each of `variants`, in one call.

        Providers read only how many there are. Fewer pictures may come back, never none, and each has been
        decoded. `price_factor` is what the list price is multiplied by; `most_microusd` what the call counts as
        where nobody can tell its price. Raises UpstreamError, whose `cost_microusd` says what the failed call
        cost. Cancelling loses what was paid for. Of a single picture `on_partial` gets up to `partial_images` partial
        ones while it is made, where the provider gives any.
        """
        ...

    async def check(self) -> None:
        """Return if the endpoint answers and accepts our key, at no cost; raise UpstreamError if not."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...


class Generation(Protocol):
    """The miss path: everything between a true miss and a picture. It knows nothing of the cache."""

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        ...

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
        """Make pictures for `variants`, in order; fewer may come back, never none.

        `on_spending` is called right before money is spent: until then the call may be cancelled for free,
        from then on cancelling it loses what was paid. `on_spare` gets every picture that was paid for beyond
        those asked for, and may be called after the return. `on_partial` gets the partial pictures of an order for one
        picture, `order.partial_images` at most. Whoever keeps the pictures sets `safe` when they outlive us; no call is
        written down as settled before. Raises UpstreamError, CannotAffordError,
        LedgerUnavailableError, or InvalidRequestError for a model nobody serves or an input image that is none.
        """
        ...

    def hasten(self, order: Order, *, priority: Priority, deadline_s: float | None) -> None:
        """Someone more urgent waits for this order too: from now on it goes by the higher of the priorities."""
        ...

    def estimated_wait_s(self, model: str, since_s: float) -> float:
        """How much longer a generation asked for at `since_s` (monotonic) is expected to take."""
        ...

    def expected_s(self, request: ImageRequest, priority: Priority) -> float:
        """How long from now a new generation of `request` is expected to take, its wait for a turn included."""
        ...

    def rungs(self, request: ImageRequest) -> Sequence[ImageRequest]:
        """Cheaper requests of the same picture, dearest first: the part of the ladder below `request`."""
        ...

    def estimate_microusd(self, request: ImageRequest, n: int) -> int:
        """What `n` pictures may cost at most, in micro-dollars; 0 where no price is known."""
        ...

    def worth_microusd(self, image: GeneratedImage, model: str) -> int:
        """What this very picture would cost now, by today's prices; what it did cost where they do not tell.

        `model` is the one that was asked for it, empty where nobody knows.
        """
        ...

    def cheapest_microusd(self, request: ImageRequest, n: int) -> int:
        """The same where the cheapest upstream that serves the model makes them."""
        ...

    def outlook(self, request: ImageRequest) -> Outlook:
        """How fast pictures like `request` can be made now. Raises InvalidRequestError for a model nobody serves."""
        ...


class Renderer(Protocol):
    """Makes renditions of pictures, a bounded number at a time, beside the event loop."""

    async def render(self, image: GeneratedImage, rendition: Rendition) -> GeneratedImage:
        """The picture as `rendition` wants it: its other facts are kept, its cost is nothing.

        Raises:
            InvalidRequestError: this picture cannot be had like that, as one with transparency in jpeg.
            OverloadedError: too many wait already; try again.
        """
        ...


@dataclass(eq=False, slots=True)
class Lease:
    """The right to pay for a request's pictures. `is_shared`: all replicas know of it; else each is on its own.

    `look_again`: another replica may have paid since this one looked into the tiers. `is_lost`: we were too slow, and
    another replica may be paying too. `succeeds`: another holder did not give it back, and may live.
    `urge` is called with the priority of who waits at another replica, whenever that is higher than it was.
    """

    look_again: bool = False
    is_shared: bool = True
    is_lost: bool = False
    succeeds: bool = False
    urge: Callable[[Priority], None] = lambda _: None


class Aliases(Protocol):
    """Which keys' pictures answer for other keys, in all replicas. May lose aliases at any time; never raises."""

    async def find(self, names: Sequence[str]) -> list[Alias | None]:
        """What answers for the identities of these names, None where nothing is known. One round trip."""
        ...

    async def add(self, name: str, alias: Alias, *, instead_of: Alias | None = None) -> bool:
        """Have `alias` answer for the identity of this name; whether it does.

        Not if another one did before, unless that is `instead_of`.
        """
        ...

    async def remove(self, name: str, alias: Alias) -> None:
        """Forget that `alias` answers for the identity of this name; another one stays."""
        ...


class SimilarPrompts(Protocol):
    """The prompts of stored pictures, and who says which of them asks for the same picture as another one.

    A group is all requests of a partition that differ in nothing but their prompt. Never raises.
    """

    async def learn(self, group: str, key: CacheKey, prompt: str, prompt_digest: bytes) -> None:
        """From now on the picture of `key`, made for this prompt, may answer others of the group."""
        ...

    async def forget(self, group: str, alias: Alias) -> None:
        """What the alias says is there no more."""
        ...

    async def find(
        self, group: str, prompt: str, *, namespace: str, may_answer: Callable[[CacheKey], bool]
    ) -> Alias | None:
        """What answers a prompt of the group, if anything does. Takes no longer than its deadline."""
        ...


class Leases(Protocol):
    """Single-flight across replicas, before money is spent. Control state: it must survive Redis eviction."""

    async def take(self, identity_name: str, *, looked_s_ago: float, priority: Callable[[], Priority]) -> Lease:
        """The lease of a request; waits for as long as another replica has it, and tells that one how urgent it is.

        `looked_s_ago` is when the tiers were asked. Never raises: where Redis does not answer, it is not shared.
        """
        ...

    def let_go(self, lease: Lease, *, after: Callable[[], Awaitable[None]] | None) -> None:
        """Give a lease back once `after` has ended: what came of it is where other replicas find it. Never waits.

        None: nothing was made, so nobody need look again.
        """
        ...


class Limits(Protocol):
    """The limits of every limit group, shared by all replicas: token buckets whose next moments are reserved.

    Control state: it must survive Redis eviction. Never raises: where Redis is gone, each replica works within a
    fair share of the limits. A limit learns: it falls at once when the provider says so, and returns within minutes.
    """

    async def reserve(self, group: str, amounts: Amounts, *, lease_s: float, spare: int = 0) -> Slot | None:
        """Reserve the next moment at which `amounts` may be sent in `group`, and a place for the call.

        None: as many calls run as may, less the `spare` places that are kept free. The place is free again
        after `end` or `release`, or when `lease_s` have passed since its moment: its holder may have died.
        """
        ...

    async def release(self, slot: Slot) -> None:
        """Give a slot back unused: its place, and its moment if nobody has reserved a later one."""
        ...

    async def end(self, slot: Slot, report: CallReport) -> None:
        """The slot's call is over: free its place and learn from what it met."""
        ...

    def next_s(self, group: str) -> float:
        """Seconds until the group's next free moment, as far as this process knows. Asks nobody."""
        ...

    def images_per_s(self, group: str) -> float:
        """The pictures a second that the group may make now, as learned; infinity without a limit. Asks nobody."""
        ...

    def images_per_minute(self, group: str) -> float | None:
        """The same a minute; None without a limit. Asks nobody."""
        ...


class Budgets(Protocol):
    """What may be spent, by day and month, per namespace, per caller and in all; shared by all replicas.

    At no moment can reserved and spent together exceed a limit, but for calls that cost more than their upper
    bound. Control state, rebuilt from the ledger where Redis lost it.
    """

    async def reserve(self, attempt_id: str, *, namespace: str, caller: str, microusd: int, degradable: bool) -> None:
        """Set `microusd` aside in every budget that bounds this caller and namespace, or in none.

        With `degradable` a budget counts as used up at the share from which cheaper pictures are made.

        Raises:
            CannotAffordError: a budget does not allow it; without rungs.
        """
        ...

    async def sent(self, attempt_id: str) -> None:
        """The attempt goes upstream: if we die now it counts as spent, not as free.

        Raises:
            CannotAffordError: others took this replica for dead meanwhile, and what was set aside is spent.
            LedgerUnavailableError: nobody can say whether it is, and then nothing is to be bought.
        """
        ...

    async def settle(self, attempt_id: str, microusd: int, *, upstream: str = "") -> None:
        """What was set aside is replaced by what it cost. Idempotent. Above what was set aside: an overrun."""
        ...

    async def release(self, attempt_id: str) -> None:
        """What was set aside is free again: nothing was sent, or nothing billed. Idempotent."""
        ...

    async def states(self) -> list[BudgetState]:
        """Every budget as it stands."""
        ...

    async def set_limit(self, name: str, limit_microusd: int) -> BudgetState:
        """Change a budget's limit from now on, in every replica. Raises UnknownUpstreamError for no such budget."""
        ...

    def month_spend_microusd(self, upstream: str) -> int:
        """What this upstream was paid this month (UTC), as far as this process knows. Asks nobody."""
        ...


class Ledger(Protocol):
    """Every call to an upstream, one durable row each: what the provider's invoice is compared with."""

    async def open(self, attempt: Attempt) -> None:
        """Write the row of a call about to be sent; on return it survives a crash.

        Raises:
            LedgerUnavailableError: it could not be written.
        """
        ...

    async def close(self, attempt: Attempt) -> None:
        """Write how the call ended over its open row. Never raises: what cannot be written stays SENT."""
        ...

    async def rows(self, *, since_s: float, until_s: float, after: str, limit: int) -> list[Attempt]:
        """At most `limit` rows begun between the two moments, oldest first, that come after row id `after`."""
        ...

    async def spent_microusd(self, tag: str, *, open_too: bool = False) -> int:
        """What calls with this tag have cost, settled and unknown; with `open_too` also what those under way may.

        Raises:
            LedgerUnavailableError: it cannot be read.
        """
        ...


class CallFigures(Protocol):
    """What calls to upstreams cost, by namespace, model, quality and caller, for whoever asks any replica.

    Beside the ledger, which knows it for sure: here it is told so promptly that what a replica which died had sent
    is known although it does not come back.
    """

    def sent(self, attempt: Attempt) -> Awaitable[None] | None:
        """A call is about to be sent: count it as open. To be awaited until it is told; None where nobody is told.

        The wait is bounded and never fails: where nobody can be told, the count is kept here and told later.
        """
        ...

    def ended(self, attempt: Attempt) -> None:
        """A call that was counted as open has ended like this."""
        ...


class FigureStore(Protocol):
    """Where all replicas put their figures: text under a name, in buckets of time. Control state.

    Every call may be repeated. Raises AccountsUnavailableError and nothing else.
    """

    async def tell(self, cells: Mapping[Bucket, Mapping[str, str]]) -> str:
        """Set these cells. Returns what names this store's contents: once that is another, all were lost."""
        ...

    async def forget(self, owner: str, buckets: Sequence[Bucket]) -> None:
        """Remove what this owner has told of these buckets."""
        ...

    async def buckets(self, span_s: int) -> list[Bucket]:
        """The buckets of this length in which there is anything, oldest first."""
        ...

    async def read(self, buckets: Sequence[Bucket]) -> list[dict[str, str]]:
        """What each of these buckets holds."""
        ...

    async def drop(self, buckets: Sequence[Bucket]) -> None:
        """Forget these buckets."""
        ...


class Files(Protocol):
    """Small files by name, beside the entries of a tier. Raises TierError and nothing else."""

    async def files(self, start: str) -> list[str]:
        """The names that begin so, in order."""
        ...

    async def read_file(self, name: str, max_bytes: int) -> bytes | None:
        """What the file holds; None if there is none. A larger one than `max_bytes` raises CorruptEntryError."""
        ...

    async def write_file(self, name: str, data: bytes) -> None:
        """Write or replace a file, whole or not at all."""
        ...

    async def delete_file(self, name: str) -> None:
        """Remove a file; one that is not there is removed already."""
        ...


class FigureArchive(Protocol):
    """Files of figures that the store has let go of, one per day. Raises AccountsUnavailableError and nothing else."""

    async def days(self) -> list[str]:
        """The days there are files of, as ISO 8601 dates, oldest first."""
        ...

    async def read(self, day: str) -> bytes | None:
        """The file of a day; None if there is none."""
        ...

    async def write(self, day: str, data: bytes) -> None:
        """Put a file in the place of a day's, whole or not at all."""
        ...


class Replays(Protocol):
    """What calls with a request_id were given, for 24 hours: a call sent again never pays again.

    Control state, not cache: it must survive Redis eviction. Never raises: where Redis is gone, what this
    process remembers is all there is.
    """

    async def recall(self, replay_id: str) -> Replay | None:
        """What the call of this id was given, None if nothing is known."""
        ...

    async def remember(self, replay_id: str, replay: Replay) -> None:
        """Keep what the call of this id was given."""
        ...


class Prompts(Protocol):
    """What callers of namespaces with store_prompts asked for and the cache did not have, most wanted first.

    Control state, bounded for each namespace and kind: the least wanted goes.
    """

    def record(self, kind: PromptKind, request: ImageRequest, *, namespace: str, identity: Identity, n: int) -> None:
        """A caller made this request. Never raises; a very long one is passed over."""
        ...

    async def most_wanted(
        self, *, namespace: str | None, kinds: Collection[PromptKind], limit: int
    ) -> list[RecordedPrompt]:
        """At most `limit` records, most wanted first: of a namespace or of all, of these kinds or without any of all.

        Raises:
            AccountsUnavailableError: they cannot be read now.
        """
        ...

    async def forget(self, namespace: str, key: CacheKey | None) -> None:
        """Drop the records of the key's identity, or with None all of the namespace.

        Raises:
            AccountsUnavailableError: they may still be there.
        """
        ...


class Matches(Protocol):
    """A sample of the similar hits of all replicas, for a person to look at.

    Control state, bounded: the newest 1,000 of each namespace, for 30 days.
    """

    def record(self, *, namespace: str, level: MatchLevel, key: CacheKey, matched_key: CacheKey, prompt: str) -> None:
        """Keep one that happened now, and of its prompt the first 2,000 characters. Never waits and never raises."""
        ...

    async def page(self, *, namespace: str | None, before: str, limit: int) -> list[SampledMatch]:
        """At most `limit`, newest first, of a namespace or of all: those older than the id `before`; empty: any.

        Raises:
            AccountsUnavailableError: they cannot be read now.
        """
        ...

    async def get(self, match_id: str) -> SampledMatch:
        """The one of this id.

        Raises:
            UnknownReviewError: there is none, any more.
            AccountsUnavailableError: they cannot be read now.
        """
        ...

    async def drop(self, match: SampledMatch) -> None:
        """Keep it no longer; one that is gone is gone.

        Raises:
            AccountsUnavailableError: it may still be there.
        """
        ...

    async def forget(self, namespace: str, key: CacheKey | None) -> None:
        """Drop those in which the key's identity was asked for, or with None all of the namespace.

        What was asked for until now, and another replica has yet to tell, is not kept either.

        Raises:
            AccountsUnavailableError: they may still be there.
        """
        ...


class Books(Protocol):
    """Where everything that happened is counted, once. Plain counters: cheap enough for the hit path."""

    def answered(  # noqa: PLR0913 - as many columns as a row of the books
        self,
        namespace: str,
        outcome: Outcome,
        tier: TierName | None,
        *,
        seconds: float,
        image_bytes: int = 0,
        saved_microusd: int = 0,
        would_cost_microusd: int = 0,
        model: str = "",
        quality: str = "",
        caller: str = "",
        is_degraded: bool = False,
    ) -> None:
        """One picture was answered; `model` and `quality` are those asked for.

        `would_cost_microusd` is what it would have cost without a cache.
        """
        ...

    def hit_again(self, row: HitRow, seconds: float, image_bytes: int, saved_microusd: int) -> None:
        """One picture was answered from memory, as `answered` books it: its row is known."""
        ...

    def spent(self, namespace: str, microusd: int) -> None:
        """A call to an upstream was paid for: booked where it is spent, whatever came of it."""
        ...

    def unleased(self) -> None:
        """A load is paid for though another replica may pay for the same: Redis was silent, or we too slow."""
        ...

    def lost(self) -> None:
        """A replica that is gone had yet to bring an image to the last tier, and left no copy in Redis."""
        ...

    def purges_unseen(self) -> None:
        """One look found nobody who could say what was purged since the last."""
        ...

    def spent_unknown(self, namespace: str, microusd: int) -> None:
        """A call may have been paid for and nobody knows: booked at the most it can have cost."""
        ...

    def similar_hit(self, namespace: str, level: MatchLevel) -> None:
        """A picture was answered that was made for another prompt, which agrees so far."""
        ...

    def verified(self, namespace: str, result: str, cost_microusd: int) -> None:
        """A pair of prompts was judged: "yes", "no", or why nobody could tell."""
        ...

    def shadow_match(self, namespace: str, *, is_guarded: bool) -> None:
        """A prompt looks like a stored picture's, and there is no verifier. `is_guarded`: a slot tells them apart."""
        ...

    def stale_after_error(self, namespace: str) -> None:
        """A call was answered with stale pictures in place of the error that kept new ones from being made."""
        ...

    def touched(self, tier: TierName, result: Touch) -> None:
        """A tier was told that an entry is asked for."""
        ...

    def renewal(self, namespace: str, result: str) -> None:
        """What became of a stale entry's renewal: "generated", "found" in a tier, "refused" or "failed"."""
        ...

    def tier_seconds(self, tier: TierName, op: str, seconds: float) -> None:
        """A tier took this long for `op`."""
        ...

    def hedged(self, tier: TierName, *, has_won: bool) -> None:
        """A tier was late and the next one was read beside it, which has won if it had the picture first."""
        ...

    def breaker(self, tier: TierName, *, is_open: bool) -> None:
        """A tier's breaker opened or closed."""
        ...

    def corrupt(self, tier: TierName) -> None:
        """A damaged entry was found."""
        ...

    def error(self, reason: str) -> None:
        """A call failed for this published reason."""
        ...

    def upstream_call(self, upstream: str, model: str, result: str, seconds: float) -> None:
        """An upstream was called; `result` is "ok" or the published reason."""
        ...

    def upstream_health(self, upstream: str, health: UpstreamHealth) -> None:
        """An upstream's health as it stands now."""
        ...

    def budget_overrun(self, upstream: str, microusd: int) -> None:
        """A call cost so much more than the most it was thought to cost."""
        ...

    def refused(self, namespace: str, reason: str) -> None:
        """A prompt was refused before anything was looked up or spent."""
        ...

    def client_fallbacks(self, namespace: str, pictures: int) -> None:
        """A client had so many pictures made without us while it could not reach us."""
        ...

    def delivered(self, namespace: str, *, status: int, is_rendition: bool, size_bytes: int) -> None:
        """A picture's URL was answered with this HTTP status: no request, whoever asked for the picture was booked.

        `namespace` is that of the picture, or one it would be read in; empty where the call was not let in.
        """
        ...

    def paid_unknown(self) -> None:
        """A picture was paid for though the last tier could not be asked."""
        ...

    def alarm(self, alarm: str, *, is_ringing: bool) -> None:
        """An alarm rings from now on, or does not."""
        ...

    def alarm_notice(self, result: str) -> None:
        """What became of a notice of an alarm: "delivered", "failed" or "dropped"."""
        ...

    def unsaved(self, change: int) -> None:
        """So many more (or fewer) images are held that no lower tier has acknowledged."""
        ...
