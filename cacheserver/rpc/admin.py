"""AdminService: what those who run the service see and change of it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, TypeVar

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from cacheserver.calls.auth import Authenticator
from cacheserver.calls.call import Call
from cacheserver.calls.reception import Reception
from cacheserver.errors import PermissionDeniedError
from cacheserver.interfaces import Books, Budgets, Clock, Ledger, Prompts
from cacheserver.model import (
    Alarm,
    BudgetState,
    CachedImage,
    CacheKey,
    Permission,
    PromptKind,
    RecordedPrompt,
    UpstreamState,
)
from cacheserver.pb import admin_pb2 as pb
from cacheserver.rpc import admin_replies as replies
from cacheserver.rpc.calls import Calls, Parts
from cacheserver.rpc.messages import Problems

_log = structlog.get_logger(__name__)

T = TypeVar("T")

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1_000
DEFAULT_REVIEWS = 20
MAX_REVIEWS = 50
"""Pictures that wait are read whole, each some megabytes."""

MAX_PROMPTS = 10_000

_CHUNK_BYTES = 256 * 1024

_MAX_CALLS = 64
"""Our own bound: whoever runs the service gets in while its callers are turned away."""

_MAX_WEIGHT = 1_000.0
_MAX_PERCENT = 100.0
_MAX_LIMIT_MICROUSD = 10**15
"""A billion dollars. Redis counts in doubles, which are exact up to nine times that."""

_END_OF_TIME_S = 253_402_300_800.0
"""The end of the year 9999, and of what a Timestamp can say."""

_NANOS = 1_000_000_000
_MAX_PAGE_TOKEN = 400
_PAGE_MARK = "1:"
"""What every page token begins with; the number changes with what follows."""


class Review(Protocol):
    """A picture that waits for a person's decision."""

    @property
    def key(self) -> CacheKey:
        """The key it will have once it is approved."""
        ...

    @property
    def entry(self) -> CachedImage:
        """The picture."""
        ...


class Reviews(Protocol):
    """The pictures that wait for review. Every call may raise TierUnreachableError."""

    async def page(self, *, after: str, limit: int) -> Sequence[Review]:
        """At most `limit` of them by the names of their keys, from the first one after the name `after` on."""
        ...

    async def get(self, key: CacheKey) -> CachedImage:
        """The picture that waits to have `key`. Raises UnknownReviewError."""
        ...

    async def approve(self, key: CacheKey) -> CachedImage:
        """Let the picture into the cache; returns its entry. Raises UnknownReviewError."""
        ...

    async def reject(self, key: CacheKey) -> None:
        """Drop the picture. Raises UnknownReviewError."""
        ...


class Images(Protocol):
    """The pictures that come in from elsewhere, and those that are there: two rpcs of their own."""

    def import_images(self, parts: Parts[pb.ImportImagesRequest], call: Call) -> AsyncGenerator[bytes, None]:
        """Store pictures that were paid for elsewhere; one outcome each."""
        ...

    async def list_images(self, message: pb.ListImagesRequest, call: Call) -> bytes:
        """A page of the pictures that a namespace has stored."""
        ...


class Matches(Protocol):
    """What people decide about similar hits: five rpcs of their own."""

    async def ban_match(self, message: pb.BanMatchRequest, call: Call) -> bytes:
        """Keep two pictures from answering for one another."""
        ...

    async def set_switch(self, message: pb.SetSwitchRequest, call: Call) -> bytes:
        """Turn similar hits off, or on again."""
        ...

    async def list_switches(self, message: pb.ListSwitchesRequest, call: Call) -> bytes:
        """What is switched off."""
        ...

    async def list_matches(self, message: pb.ListMatchesRequest, call: Call) -> bytes:
        """A page of the sample."""
        ...

    async def resolve_match(self, message: pb.ResolveMatchRequest, call: Call) -> bytes:
        """Drop a similar hit from the sample, and ban it if it was wrong."""
        ...


class Upstreams(Protocol):
    """The upstreams of the pool, as operators see and change them."""

    def states(self) -> Sequence[UpstreamState]:
        """Every upstream as it stands."""
        ...

    async def update(
        self,
        name: str,
        *,
        weight: float | None = None,
        percent: float | None = None,
        clear_percent: bool = False,
        paused: bool | None = None,
    ) -> UpstreamState:
        """Change what is given and leave the rest. Raises UnknownUpstreamError."""
        ...


class Alarms(Protocol):
    """The alarms of the service."""

    def states(self) -> Sequence[Alarm]:
        """Every alarm as it stands, those that ring first."""
        ...


class _Change(TypedDict, total=False):
    """What an UpdateUpstreamRequest changes."""

    weight: float
    percent: float
    clear_percent: bool
    paused: bool


class AdminService:
    """The rpcs of promptcache.admin.v1alpha1.AdminService."""

    name = pb.DESCRIPTOR.services_by_name["AdminService"].full_name

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        upstreams: Upstreams,
        budgets: Budgets,
        ledger: Ledger,
        reviews: Reviews,
        images: Images,
        matches: Matches,
        alarms: Alarms,
        authenticator: Authenticator,
        books: Books,
        clock: Clock,
        prompts: Prompts | None = None,
    ) -> None:
        """`prompts` are the recorded ones, if a namespace stores any."""
        self._prompts = prompts
        self._upstreams = upstreams
        self._budgets = budgets
        self._ledger = ledger
        self._reviews = reviews
        self._images = images
        self._matches = matches
        self._alarms = alarms
        self._calls = Calls(
            Reception(authenticator=authenticator, books=books, clock=clock, max_in_progress=_MAX_CALLS)
        )

    def handler(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server needs to serve this."""
        unary, streams_out, streams_both = self._calls.unary, self._calls.streams_out, self._calls.streams_both
        return grpc.method_handlers_generic_handler(
            self.name,
            {
                "ListUpstreams": unary("ListUpstreams", pb.ListUpstreamsRequest, self.list_upstreams),
                "UpdateUpstream": unary("UpdateUpstream", pb.UpdateUpstreamRequest, self.update_upstream),
                "ListBudgets": unary("ListBudgets", pb.ListBudgetsRequest, self.list_budgets),
                "UpdateBudget": unary("UpdateBudget", pb.UpdateBudgetRequest, self.update_budget),
                "ListLedger": unary("ListLedger", pb.ListLedgerRequest, self.list_ledger),
                "ListReviews": unary("ListReviews", pb.ListReviewsRequest, self.list_reviews),
                "GetReview": streams_out("GetReview", pb.GetReviewRequest, self.get_review),
                "ResolveReview": unary("ResolveReview", pb.ResolveReviewRequest, self.resolve_review),
                "ImportImages": streams_both("ImportImages", pb.ImportImagesRequest, self._images.import_images),
                "ListImages": unary("ListImages", pb.ListImagesRequest, self._images.list_images),
                "BanMatch": unary("BanMatch", pb.BanMatchRequest, self._matches.ban_match),
                "SetSwitch": unary("SetSwitch", pb.SetSwitchRequest, self._matches.set_switch),
                "ListSwitches": unary("ListSwitches", pb.ListSwitchesRequest, self._matches.list_switches),
                "ListMatches": unary("ListMatches", pb.ListMatchesRequest, self._matches.list_matches),
                "ResolveMatch": unary("ResolveMatch", pb.ResolveMatchRequest, self._matches.resolve_match),
                "ListAlarms": unary("ListAlarms", pb.ListAlarmsRequest, self.list_alarms),
                "ListPrompts": unary("ListPrompts", pb.ListPromptsRequest, self.list_prompts),
            },
        )

    async def idle(self) -> None:
        """Return when every call that has begun is answered."""
        await self._calls.reception.idle()

    # ── upstreams ───────────────────────────────────────────────────────────────────────────────────────────

    async def list_upstreams(self, message: pb.ListUpstreamsRequest, call: Call) -> bytes:
        """A page of the upstreams, by name."""
        check_right(call)
        page = read_page(message.page_size, message.page_token, Problems())
        states = _after(self._upstreams.states(), page, _upstream_name)
        shown, token = page.cut(states, _upstream_name)
        upstreams = [replies.upstream(state) for state in shown]
        return pb.ListUpstreamsResponse(upstreams=upstreams, next_page_token=token).SerializeToString()

    async def update_upstream(self, message: pb.UpdateUpstreamRequest, call: Call) -> bytes:
        """Change an upstream's weight or share, or take it out of the pool and back in."""
        check_right(call)
        change = _read_change(message, Problems())
        state = await self._upstreams.update(message.name, **change)
        _log.info("upstream_changed", upstream=state.name, caller=call.caller.name, **change)
        return pb.UpdateUpstreamResponse(upstream=replies.upstream(state)).SerializeToString()

    # ── budgets ─────────────────────────────────────────────────────────────────────────────────────────────

    async def list_budgets(self, message: pb.ListBudgetsRequest, call: Call) -> bytes:
        """A page of the budgets, by name."""
        check_right(call)
        page = read_page(message.page_size, message.page_token, Problems())
        states = _after(await self._budgets.states(), page, _budget_name)
        shown, token = page.cut(states, _budget_name)
        budgets = [replies.budget(state) for state in shown]
        return pb.ListBudgetsResponse(budgets=budgets, next_page_token=token).SerializeToString()

    async def update_budget(self, message: pb.UpdateBudgetRequest, call: Call) -> bytes:
        """Give a budget another limit."""
        check_right(call)
        limit_microusd = _read_limit(message, Problems())
        state = await self._budgets.set_limit(message.name, limit_microusd)
        _log.info("budget_changed", budget=state.budget.name, caller=call.caller.name, limit_microusd=limit_microusd)
        return pb.UpdateBudgetResponse(budget=replies.budget(state)).SerializeToString()

    # ── the ledger ──────────────────────────────────────────────────────────────────────────────────────────

    async def list_ledger(self, message: pb.ListLedgerRequest, call: Call) -> bytes:
        """A page of the calls that began in a span of time, oldest first."""
        check_right(call)
        problems = Problems()
        since_s = _read_moment(message.since, "since", problems) if message.HasField("since") else 0.0
        until_s = _read_moment(message.until, "until", problems) if message.HasField("until") else _END_OF_TIME_S
        if since_s > until_s:
            problems.add("until", "must not be before since")
        page = read_page(message.page_size, message.page_token, problems)
        rows = await self._ledger.rows(since_s=since_s, until_s=until_s, after=page.after, limit=page.size + 1)
        shown, token = page.cut(rows, lambda row: row.id)
        return pb.ListLedgerResponse(
            rows=[replies.ledger_row(row) for row in shown], next_page_token=token
        ).SerializeToString()

    # ── reviews ─────────────────────────────────────────────────────────────────────────────────────────────

    async def list_reviews(self, message: pb.ListReviewsRequest, call: Call) -> bytes:
        """A page of the pictures that wait for review."""
        check_right(call)
        page = read_page(message.page_size, message.page_token, Problems(), default=DEFAULT_REVIEWS, most=MAX_REVIEWS)
        waiting = await self._reviews.page(after=page.after, limit=page.size + 1)
        shown, token = page.cut(waiting, lambda each: each.key.name)
        reviews = [replies.review(each.key, each.entry) for each in shown]
        return pb.ListReviewsResponse(reviews=reviews, next_page_token=token).SerializeToString()

    async def get_review(self, message: pb.GetReviewRequest, call: Call) -> AsyncGenerator[bytes, None]:
        """A picture that waits for review, as a header and chunks."""
        check_right(call)
        key = _read_key(message.key, Problems())
        entry = await self._reviews.get(key)
        yield pb.GetReviewResponse(header=replies.review_header(key, entry)).SerializeToString()
        data = bytes(entry.image.data)
        for start in range(0, len(data), _CHUNK_BYTES):
            yield pb.GetReviewResponse(chunk=data[start : start + _CHUNK_BYTES]).SerializeToString()

    async def resolve_review(self, message: pb.ResolveReviewRequest, call: Call) -> bytes:
        """Let a picture into the cache, or drop it."""
        check_right(call)
        problems = Problems()
        if message.decision not in (pb.REVIEW_DECISION_APPROVE, pb.REVIEW_DECISION_REJECT):
            problems.add("decision", "must be APPROVE or REJECT")
        key = _read_key(message.key, problems)
        response = pb.ResolveReviewResponse()
        if message.decision == pb.REVIEW_DECISION_APPROVE:
            response.key = (await self._reviews.approve(key)).key.name
        else:
            await self._reviews.reject(key)
        decision = pb.ReviewDecision.Name(message.decision)
        _log.info("review_resolved", key=key.name, caller=call.caller.name, decision=decision)
        return response.SerializeToString()

    # ── recorded prompts ────────────────────────────────────────────────────────────────────────────────────

    async def list_prompts(self, message: pb.ListPromptsRequest, call: Call) -> bytes:
        """What namespaces that store prompts have recorded, most wanted first."""
        check_right(call)
        problems = Problems()
        kinds = _read_kinds(message.kinds, problems)
        if not 0 <= message.page_size <= MAX_PROMPTS:
            problems.add("page_size", f"must be 0 to {MAX_PROMPTS}")
        problems.check()
        found: list[RecordedPrompt] = []
        if self._prompts is not None:
            limit = message.page_size or DEFAULT_PAGE_SIZE
            found = await self._prompts.most_wanted(namespace=message.namespace or None, kinds=kinds, limit=limit)
        return pb.ListPromptsResponse(prompts=map(replies.recorded_prompt, found)).SerializeToString()

    # ── alarms ──────────────────────────────────────────────────────────────────────────────────────────────

    async def list_alarms(self, _: pb.ListAlarmsRequest, call: Call) -> bytes:
        """The alarms as they stand."""
        check_right(call)
        alarms = [replies.alarm(alarm) for alarm in self._alarms.states()]
        return pb.ListAlarmsResponse(alarms=alarms).SerializeToString()


def check_right(call: Call) -> None:
    """Return if the caller may administer the service. Raises PermissionDeniedError."""
    if Permission.ADMIN not in call.caller.permissions:
        raise PermissionDeniedError("This caller may not administer the service: it lacks the permission `admin`.")


# ── pages ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for: at most `size` items, from the first one after the name `after` on."""

    size: int
    after: str

    def cut(self, found: Sequence[T], name: Callable[[T], str]) -> tuple[Sequence[T], str]:
        """The page of what was found from its beginning on, and the token of the next one if there is more."""
        shown = found[: self.size]
        return shown, page_token(name(shown[-1])) if len(found) > self.size else ""


def _upstream_name(state: UpstreamState) -> str:
    return state.name


def _budget_name(state: BudgetState) -> str:
    return state.budget.name


def _after(found: Sequence[T], page: Page, name: Callable[[T], str]) -> Sequence[T]:
    """What lies on and behind the page, by name: one that comes or goes meanwhile moves no other."""
    return sorted((each for each in found if name(each) > page.after), key=name)


def read_page(
    size: int, token: str, problems: Problems, *, default: int = DEFAULT_PAGE_SIZE, most: int = MAX_PAGE_SIZE
) -> Page:
    """The page a list request asks for; checks all that was noted before, too."""
    if not 0 <= size <= most:
        problems.add("page_size", f"must be 0 to {most}")
    page = Page(size or default, _read_token(token, problems) if token else "")
    problems.check()
    return page


def page_token(last: str) -> str:
    """What leads to the page after the item of this name."""
    return base64.urlsafe_b64encode(f"{_PAGE_MARK}{last}".encode()).decode()


def _read_token(token: str, problems: Problems) -> str:
    """What `page_token` was made of. It opens nothing that its caller may not list anyway, so it is not signed."""
    try:
        text = base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        text = ""
    if not text.startswith(_PAGE_MARK) or len(token) > _MAX_PAGE_TOKEN:
        problems.add("page_token", "is not the next_page_token of an earlier answer")
    return text.removeprefix(_PAGE_MARK)


# ── fields ──────────────────────────────────────────────────────────────────────────────────────────────────


def _read_change(message: pb.UpdateUpstreamRequest, problems: Problems) -> _Change:
    change = _Change()
    if message.HasField("weight"):
        change["weight"] = message.weight
        if not 0 < message.weight <= _MAX_WEIGHT:  # false for a NaN, too
            problems.add("weight", f"must be more than 0 and at most {_MAX_WEIGHT:.0f}")
    if message.HasField("percent"):
        change["percent"] = message.percent
        if not 0 <= message.percent <= _MAX_PERCENT:
            problems.add("percent", f"must be 0 to {_MAX_PERCENT:.0f}")
    if message.clear_percent:
        change["clear_percent"] = True
    if message.HasField("paused"):
        change["paused"] = message.paused
    if not change:
        problems.add("name", "nothing is to change: set weight, percent, clear_percent or paused")
    problems.check()
    return change


def _read_kinds(numbers: Sequence[int], problems: Problems) -> set[PromptKind]:
    kinds = {replies.PROMPT_KINDS.get(number) for number in numbers}
    if None in kinds:
        problems.add("kinds", "must be kinds of prompts, none of them unspecified")
    return {kind for kind in kinds if kind is not None}


def _read_limit(message: pb.UpdateBudgetRequest, problems: Problems) -> int:
    if not message.HasField("limit_microusd"):
        problems.add("limit_microusd", "must be set")
    elif not 0 <= message.limit_microusd <= _MAX_LIMIT_MICROUSD:
        problems.add("limit_microusd", f"must be 0 to {_MAX_LIMIT_MICROUSD}")
    problems.check()
    return message.limit_microusd


def _read_moment(message: Timestamp, path: str, problems: Problems) -> float:
    """A moment between 1970 and the year 9999, in seconds since 1970."""
    seconds = message.seconds + message.nanos / _NANOS
    if not (0 <= message.nanos < _NANOS and 0 <= seconds < _END_OF_TIME_S):
        problems.add(path, "must lie between the years 1970 and 9999")
    return seconds


def _read_key(name: str, problems: Problems) -> CacheKey:
    """The key of a picture that waits; checks all that was noted before, too."""
    try:
        key = CacheKey.parse(name)
    except ValueError:
        problems.add("key", "is not a key: pass one from ListReviews, unchanged")
    problems.check()
    return key
