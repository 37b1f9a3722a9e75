"""The admin part of both clients: upstreams, money, reviews, stored pictures, similar hits and alarms.

It needs a token with the permission `admin`. What changes something may be called again with the same effect, but
no call is repeated by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from datetime import datetime
from typing import Any, Final

import grpc
import grpc.aio

from cacheserver.client.admin_values import (
    Alarm,
    Budget,
    ImportItem,
    ImportOutcome,
    LedgerRow,
    Match,
    RecordedPrompt,
    Review,
    ReviewPicture,
    StoredImage,
    SwitchState,
    Upstream,
)
from cacheserver.client.errors import CorruptDownloadError
from cacheserver.client.importing import Sending, read_import_outcome, read_stored_image
from cacheserver.client.messages import member, read_spec, read_usage, seconds_of, time_of
from cacheserver.model import (
    AlarmState,
    AttemptOutcome,
    BudgetPeriod,
    BudgetScope,
    MatchLevel,
    PromptKind,
    Switch,
    UpstreamHealth,
)
from cacheserver.pb import admin_pb2 as pb
from cacheserver.pb import promptcache_pb2 as public_pb
from cacheserver.pb.admin_pb2_grpc import AdminServiceStub

_PAGE_SIZE: Final = 1_000


class Admin:
    """What whoever runs the service may do, for threads. It is the `admin` of a `Client`."""

    def __init__(
        self,
        grpc_channel: grpc.Channel,
        call: Callable[[Any, Any, float], Any],
        stream: Callable[[Any, Any, float], Generator[Any]],
    ) -> None:
        """`call` makes one call: of a method, with a message, within so many seconds; so does `stream`, of a stream."""
        self._stub = AdminServiceStub(grpc_channel)  # type: ignore[no-untyped-call] # generated without types
        self._call = call
        self._stream = stream

    def list_upstreams(self, *, timeout_s: float = 30.0) -> tuple[Upstream, ...]:
        """Every upstream as the pool sees it, by name.

        Raises:
            CacheError: the call failed.
        """
        pages = self._pages(self._stub.ListUpstreams, pb.ListUpstreamsRequest(page_size=_PAGE_SIZE), timeout_s)
        return tuple(read_upstream(each) for page in pages for each in page.upstreams)

    def update_upstream(  # noqa: PLR0913 - one keyword per field of the message
        self,
        name: str,
        *,
        weight: float | None = None,
        percent: float | None = None,
        clear_percent: bool = False,
        paused: bool | None = None,
        timeout_s: float = 30.0,
    ) -> Upstream:
        """Change an upstream's weight or fixed share, or take it out of the pool and back in; None leaves it.

        Raises:
            UnknownNameError: there is no such upstream.
            CacheError: the call failed otherwise.
        """
        request = upstream_change(name, weight=weight, percent=percent, clear_percent=clear_percent, paused=paused)
        return read_upstream(self._call(self._stub.UpdateUpstream, request, timeout_s).upstream)

    def list_budgets(self, *, timeout_s: float = 30.0) -> tuple[Budget, ...]:
        """Every budget as it stands, by name.

        Raises:
            CacheError: the call failed.
        """
        pages = self._pages(self._stub.ListBudgets, pb.ListBudgetsRequest(page_size=_PAGE_SIZE), timeout_s)
        return tuple(read_budget(each) for page in pages for each in page.budgets)

    def update_budget(self, name: str, *, limit_microusd: int, timeout_s: float = 30.0) -> Budget:
        """Give a budget another limit, from now on and in every replica.

        Raises:
            UnknownNameError: there is no such budget.
            CacheError: the call failed otherwise.
        """
        request = pb.UpdateBudgetRequest(name=name, limit_microusd=limit_microusd)
        return read_budget(self._call(self._stub.UpdateBudget, request, timeout_s).budget)

    def list_ledger(
        self, *, since: datetime | None = None, until: datetime | None = None, timeout_s: float = 60.0
    ) -> Generator[LedgerRow]:
        """The calls to upstreams that began at `since` or later and before `until`, oldest first.

        They are fetched page by page as they are read; `timeout_s` is for each page.

        Raises:
            CacheError: a call failed.
        """
        request = pb.ListLedgerRequest(since=since, until=until, page_size=_PAGE_SIZE)
        for page in self._pages(self._stub.ListLedger, request, timeout_s):
            yield from map(read_ledger_row, page.rows)

    def list_reviews(self, *, timeout_s: float = 60.0) -> Generator[Review]:
        """The pictures that wait for review, fetched page by page as they are read.

        Raises:
            CacheError: a call failed.
        """
        for page in self._pages(self._stub.ListReviews, pb.ListReviewsRequest(), timeout_s):
            yield from map(read_review, page.reviews)

    def get_review(self, key: str, *, timeout_s: float = 60.0) -> ReviewPicture:
        """A picture that waits for review, to be looked at.

        Raises:
            UnknownNameError: no picture of this key waits for review.
            CorruptDownloadError: what arrived is not what was announced.
            CacheError: the call failed otherwise.
        """
        picture = PictureReader()
        with contextlib.closing(self._stream(self._stub.GetReview, pb.GetReviewRequest(key=key), timeout_s)) as parts:
            for part in parts:
                picture.read(part)
        return picture.finish()

    def approve_review(self, key: str, *, timeout_s: float = 30.0) -> str:
        """Let a picture into the cache; returns the key under which it is served.

        Raises:
            UnknownNameError: no picture of this key waits for review.
            CacheError: the call failed otherwise.
        """
        request = pb.ResolveReviewRequest(key=key, decision=pb.REVIEW_DECISION_APPROVE)
        return str(self._call(self._stub.ResolveReview, request, timeout_s).key)

    def reject_review(self, key: str, *, timeout_s: float = 30.0) -> None:
        """Drop a picture. What it cost stays spent.

        Raises:
            UnknownNameError: no picture of this key waits for review.
            CacheError: the call failed otherwise.
        """
        request = pb.ResolveReviewRequest(key=key, decision=pb.REVIEW_DECISION_REJECT)
        self._call(self._stub.ResolveReview, request, timeout_s)

    def import_images(
        self,
        items: Iterable[ImportItem],
        *,
        namespace: str | None = None,
        dry_run: bool = False,
        timeout_s: float = 600.0,
    ) -> Generator[ImportOutcome]:
        """Store pictures that were paid for elsewhere; an outcome each, in any order, as the last tier has them.

        `items` are taken as fast as outcomes are read, in a thread of gRPC's, so that they may read files. They go in
        streams of at most 1,000; `timeout_s` is for each. What was interrupted can be run again: what is there already
        is not stored again. With `dry_run` everything is checked and nothing stored. A picture that is sent has to fit
        one message, 24 MiB unless the service is set otherwise.

        Raises:
            CacheError: a stream broke; pictures without an outcome may or may not be stored.
            InvalidRequestError: an item cannot be sent.
        """
        sending = Sending(items, namespace=namespace, dry_run=dry_run)
        while not sending.ended:
            stream = self._stream(self._stub.ImportImages, sending.some(), timeout_s)
            with contextlib.closing(stream) as responses:
                yield from map(read_import_outcome, responses)
        sending.check()

    def list_images(self, *, namespace: str | None = None, timeout_s: float = 60.0) -> Generator[StoredImage]:
        """The pictures that a namespace has stored in the last tier, fetched page by page as they are read.

        Raises:
            CacheError: a call failed.
        """
        request = pb.ListImagesRequest(namespace=namespace, page_size=_PAGE_SIZE)
        for page in self._pages(self._stub.ListImages, request, timeout_s):
            yield from map(read_stored_image, page.images)

    def ban_match(self, key: str, other_key: str, *, timeout_s: float = 30.0) -> None:
        """Have the pictures of two keys answer for one another no more, in every replica and for good.

        Raises:
            InvalidRequestError: they are no keys, or those of one identity or of two partitions.
            TryAgainError: this replica knows of it, others may not: call again.
            CacheError: the call failed otherwise.
        """
        self._call(self._stub.BanMatch, pb.BanMatchRequest(key=key, other_key=other_key), timeout_s)

    def set_switch(
        self, switch: Switch, *, on: bool, namespace: str | None = None, timeout_s: float = 30.0
    ) -> SwitchState:
        """Turn something off, or on again, in a namespace or everywhere, and in every replica.

        Raises:
            InvalidRequestError: there is no such namespace.
            TryAgainError: this replica knows of it, others may not: call again.
            CacheError: the call failed otherwise.
        """
        request = pb.SetSwitchRequest(switch=f"SWITCH_{switch.name}", namespace=namespace, on=on)
        return read_switch(self._call(self._stub.SetSwitch, request, timeout_s).state)

    def list_switches(self, *, timeout_s: float = 30.0) -> tuple[SwitchState, ...]:
        """The switches that are off, by namespace; all others are on.

        Raises:
            CacheError: the call failed.
        """
        page = self._call(self._stub.ListSwitches, pb.ListSwitchesRequest(), timeout_s)
        return tuple(map(read_switch, page.switches))

    def list_matches(self, *, namespace: str | None = None, timeout_s: float = 30.0) -> Generator[Match]:
        """The similar hits that are kept for review, newest first, of a namespace or of all.

        They are fetched page by page as they are read; `timeout_s` is for each page.

        Raises:
            TryAgainError: they cannot be read now.
            CacheError: a call failed otherwise.
        """
        request = pb.ListMatchesRequest(namespace=namespace)
        for page in self._pages(self._stub.ListMatches, request, timeout_s):
            yield from map(read_match, page.matches)

    def approve_match(self, match_id: str, *, timeout_s: float = 30.0) -> Match:
        """A similar hit was right: it is listed no more. Returns it.

        Raises:
            UnknownNameError: none of this id waits for review.
            CacheError: the call failed otherwise.
        """
        request = pb.ResolveMatchRequest(id=match_id, decision=pb.MATCH_DECISION_RIGHT)
        return read_match(self._call(self._stub.ResolveMatch, request, timeout_s).match)

    def reject_match(self, match_id: str, *, timeout_s: float = 30.0) -> Match:
        """A similar hit was wrong: its keys are banned, as by `ban_match`, and it is listed no more. Returns it.

        Raises:
            UnknownNameError: none of this id waits for review.
            TryAgainError: it is still listed: call again.
            CacheError: the call failed otherwise.
        """
        request = pb.ResolveMatchRequest(id=match_id, decision=pb.MATCH_DECISION_WRONG)
        return read_match(self._call(self._stub.ResolveMatch, request, timeout_s).match)

    def list_alarms(self, *, timeout_s: float = 30.0) -> tuple[Alarm, ...]:
        """The alarms of the service, those that ring first.

        Raises:
            CacheError: the call failed.
        """
        page = self._call(self._stub.ListAlarms, pb.ListAlarmsRequest(), timeout_s)
        return tuple(map(read_alarm, page.alarms))

    def list_prompts(
        self,
        *,
        namespace: str | None = None,
        kinds: Iterable[PromptKind] = (),
        limit: int = 100,
        timeout_s: float = 60.0,
    ) -> tuple[RecordedPrompt, ...]:
        """At most `limit` prompts that namespaces with store_prompts recorded, most wanted first; of all kinds if none.

        Raises:
            TryAgainError: the record cannot be read now.
            CacheError: the call failed otherwise.
        """
        request = prompts_request(namespace, kinds, limit)
        return read_prompts(self._call(self._stub.ListPrompts, request, timeout_s))

    def _pages(self, method: Any, request: Any, timeout_s: float) -> Generator[Any]:
        while True:
            page = self._call(method, request, timeout_s)
            yield page
            request.page_token = page.next_page_token
            if not request.page_token:
                return


class AsyncAdmin:
    """What whoever runs the service may do, for asyncio. It is the `admin` of an `AsyncClient`."""

    def __init__(
        self,
        grpc_channel: grpc.aio.Channel,
        call: Callable[[Any, Any, float], Awaitable[Any]],
        stream: Callable[[Any, Any, float], AsyncGenerator[Any]],
    ) -> None:
        """`call` makes one call: of a method, with a message, within so many seconds; so does `stream`, of a stream."""
        self._stub = AdminServiceStub(grpc_channel)  # type: ignore[no-untyped-call] # generated without types
        self._call = call
        self._stream = stream

    async def list_upstreams(self, *, timeout_s: float = 30.0) -> tuple[Upstream, ...]:
        """Every upstream as the pool sees it, by name.

        Raises:
            CacheError: the call failed.
        """
        pages = self._pages(self._stub.ListUpstreams, pb.ListUpstreamsRequest(page_size=_PAGE_SIZE), timeout_s)
        return tuple([read_upstream(each) async for page in pages for each in page.upstreams])

    async def update_upstream(  # noqa: PLR0913 - one keyword per field of the message
        self,
        name: str,
        *,
        weight: float | None = None,
        percent: float | None = None,
        clear_percent: bool = False,
        paused: bool | None = None,
        timeout_s: float = 30.0,
    ) -> Upstream:
        """Change an upstream's weight or fixed share, or take it out of the pool and back in; None leaves it.

        Raises:
            UnknownNameError: there is no such upstream.
            CacheError: the call failed otherwise.
        """
        request = upstream_change(name, weight=weight, percent=percent, clear_percent=clear_percent, paused=paused)
        return read_upstream((await self._call(self._stub.UpdateUpstream, request, timeout_s)).upstream)

    async def list_budgets(self, *, timeout_s: float = 30.0) -> tuple[Budget, ...]:
        """Every budget as it stands, by name.

        Raises:
            CacheError: the call failed.
        """
        pages = self._pages(self._stub.ListBudgets, pb.ListBudgetsRequest(page_size=_PAGE_SIZE), timeout_s)
        return tuple([read_budget(each) async for page in pages for each in page.budgets])

    async def update_budget(self, name: str, *, limit_microusd: int, timeout_s: float = 30.0) -> Budget:
        """Give a budget another limit, from now on and in every replica.

        Raises:
            UnknownNameError: there is no such budget.
            CacheError: the call failed otherwise.
        """
        request = pb.UpdateBudgetRequest(name=name, limit_microusd=limit_microusd)
        return read_budget((await self._call(self._stub.UpdateBudget, request, timeout_s)).budget)

    async def list_ledger(
        self, *, since: datetime | None = None, until: datetime | None = None, timeout_s: float = 60.0
    ) -> AsyncGenerator[LedgerRow]:
        """The calls to upstreams that began at `since` or later and before `until`, oldest first.

        They are fetched page by page as they are read; `timeout_s` is for each page.

        Raises:
            CacheError: a call failed.
        """
        request = pb.ListLedgerRequest(since=since, until=until, page_size=_PAGE_SIZE)
        async for page in self._pages(self._stub.ListLedger, request, timeout_s):
            for row in page.rows:
                yield read_ledger_row(row)

    async def list_reviews(self, *, timeout_s: float = 60.0) -> AsyncGenerator[Review]:
        """The pictures that wait for review, fetched page by page as they are read.

        Raises:
            CacheError: a call failed.
        """
        async for page in self._pages(self._stub.ListReviews, pb.ListReviewsRequest(), timeout_s):
            for review in page.reviews:
                yield read_review(review)

    async def get_review(self, key: str, *, timeout_s: float = 60.0) -> ReviewPicture:
        """A picture that waits for review, to be looked at.

        Raises:
            UnknownNameError: no picture of this key waits for review.
            CorruptDownloadError: what arrived is not what was announced.
            CacheError: the call failed otherwise.
        """
        picture = PictureReader()
        async with contextlib.aclosing(
            self._stream(self._stub.GetReview, pb.GetReviewRequest(key=key), timeout_s)
        ) as parts:
            async for part in parts:
                picture.read(part)
        return picture.finish()

    async def approve_review(self, key: str, *, timeout_s: float = 30.0) -> str:
        """Let a picture into the cache; returns the key under which it is served.

        Raises:
            UnknownNameError: no picture of this key waits for review.
            CacheError: the call failed otherwise.
        """
        request = pb.ResolveReviewRequest(key=key, decision=pb.REVIEW_DECISION_APPROVE)
        return str((await self._call(self._stub.ResolveReview, request, timeout_s)).key)

    async def reject_review(self, key: str, *, timeout_s: float = 30.0) -> None:
        """Drop a picture. What it cost stays spent.

        Raises:
            UnknownNameError: no picture of this key waits for review.
            CacheError: the call failed otherwise.
        """
        request = pb.ResolveReviewRequest(key=key, decision=pb.REVIEW_DECISION_REJECT)
        await self._call(self._stub.ResolveReview, request, timeout_s)

    async def import_images(
        self,
        items: Iterable[ImportItem],
        *,
        namespace: str | None = None,
        dry_run: bool = False,
        timeout_s: float = 600.0,
    ) -> AsyncGenerator[ImportOutcome]:
        """Store pictures that were paid for elsewhere; an outcome each, in any order, as the last tier has them.

        `items` are taken as fast as outcomes are read, on the event loop, so they must not block. They go in streams of
        at most 1,000; `timeout_s` is for each. What was interrupted can be run again: what is there already is not
        stored again. With `dry_run` everything is checked and nothing stored. A picture that is sent has to fit
        one message, 24 MiB unless the service is set otherwise.

        Raises:
            CacheError: a stream broke; pictures without an outcome may or may not be stored.
            InvalidRequestError: an item cannot be sent.
        """
        sending = Sending(items, namespace=namespace, dry_run=dry_run)
        while not sending.ended:
            stream = self._stream(self._stub.ImportImages, sending.some(), timeout_s)
            async with contextlib.aclosing(stream) as responses:
                async for response in responses:
                    yield read_import_outcome(response)
        sending.check()

    async def list_images(
        self, *, namespace: str | None = None, timeout_s: float = 60.0
    ) -> AsyncGenerator[StoredImage]:
        """The pictures that a namespace has stored in the last tier, fetched page by page as they are read.

        Raises:
            CacheError: a call failed.
        """
        request = pb.ListImagesRequest(namespace=namespace, page_size=_PAGE_SIZE)
        async for page in self._pages(self._stub.ListImages, request, timeout_s):
            for image in page.images:
                yield read_stored_image(image)

    async def ban_match(self, key: str, other_key: str, *, timeout_s: float = 30.0) -> None:
        """Have the pictures of two keys answer for one another no more, in every replica and for good.

        Raises:
            InvalidRequestError: they are no keys, or those of one identity or of two partitions.
            TryAgainError: this replica knows of it, others may not: call again.
            CacheError: the call failed otherwise.
        """
        await self._call(self._stub.BanMatch, pb.BanMatchRequest(key=key, other_key=other_key), timeout_s)

    async def set_switch(
        self, switch: Switch, *, on: bool, namespace: str | None = None, timeout_s: float = 30.0
    ) -> SwitchState:
        """Turn something off, or on again, in a namespace or everywhere, and in every replica.

        Raises:
            InvalidRequestError: there is no such namespace.
            TryAgainError: this replica knows of it, others may not: call again.
            CacheError: the call failed otherwise.
        """
        request = pb.SetSwitchRequest(switch=f"SWITCH_{switch.name}", namespace=namespace, on=on)
        return read_switch((await self._call(self._stub.SetSwitch, request, timeout_s)).state)

    async def list_switches(self, *, timeout_s: float = 30.0) -> tuple[SwitchState, ...]:
        """The switches that are off, by namespace; all others are on.

        Raises:
            CacheError: the call failed.
        """
        page = await self._call(self._stub.ListSwitches, pb.ListSwitchesRequest(), timeout_s)
        return tuple(map(read_switch, page.switches))

    async def list_matches(self, *, namespace: str | None = None, timeout_s: float = 30.0) -> AsyncGenerator[Match]:
        """The similar hits that are kept for review, newest first, of a namespace or of all.

        They are fetched page by page as they are read; `timeout_s` is for each page.

        Raises:
            TryAgainError: they cannot be read now.
            CacheError: a call failed otherwise.
        """
        request = pb.ListMatchesRequest(namespace=namespace)
        async for page in self._pages(self._stub.ListMatches, request, timeout_s):
            for match in page.matches:
                yield read_match(match)

    async def approve_match(self, match_id: str, *, timeout_s: float = 30.0) -> Match:
        """A similar hit was right: it is listed no more. Returns it.

        Raises:
            UnknownNameError: none of this id waits for review.
            CacheError: the call failed otherwise.
        """
        request = pb.ResolveMatchRequest(id=match_id, decision=pb.MATCH_DECISION_RIGHT)
        return read_match((await self._call(self._stub.ResolveMatch, request, timeout_s)).match)

    async def reject_match(self, match_id: str, *, timeout_s: float = 30.0) -> Match:
        """A similar hit was wrong: its keys are banned, as by `ban_match`, and it is listed no more. Returns it.

        Raises:
            UnknownNameError: none of this id waits for review.
            TryAgainError: it is still listed: call again.
            CacheError: the call failed otherwise.
        """
        request = pb.ResolveMatchRequest(id=match_id, decision=pb.MATCH_DECISION_WRONG)
        return read_match((await self._call(self._stub.ResolveMatch, request, timeout_s)).match)

    async def list_alarms(self, *, timeout_s: float = 30.0) -> tuple[Alarm, ...]:
        """The alarms of the service, those that ring first.

        Raises:
            CacheError: the call failed.
        """
        page = await self._call(self._stub.ListAlarms, pb.ListAlarmsRequest(), timeout_s)
        return tuple(map(read_alarm, page.alarms))

    async def list_prompts(
        self,
        *,
        namespace: str | None = None,
        kinds: Iterable[PromptKind] = (),
        limit: int = 100,
        timeout_s: float = 60.0,
    ) -> tuple[RecordedPrompt, ...]:
        """At most `limit` prompts that namespaces with store_prompts recorded, most wanted first; of all kinds if none.

        Raises:
            TryAgainError: the record cannot be read now.
            CacheError: the call failed otherwise.
        """
        request = prompts_request(namespace, kinds, limit)
        return read_prompts(await self._call(self._stub.ListPrompts, request, timeout_s))

    async def _pages(self, method: Any, request: Any, timeout_s: float) -> AsyncGenerator[Any]:
        while True:
            page = await self._call(method, request, timeout_s)
            yield page
            request.page_token = page.next_page_token
            if not request.page_token:
                return


# --- messages ---


def upstream_change(
    name: str, *, weight: float | None, percent: float | None, clear_percent: bool, paused: bool | None
) -> pb.UpdateUpstreamRequest:
    """The message that changes an upstream.

    Raises:
        TypeError: both `percent` and `clear_percent`.
    """
    if percent is not None and clear_percent:
        raise TypeError("pass either percent or clear_percent")
    return pb.UpdateUpstreamRequest(
        name=name, weight=weight, percent=percent, clear_percent=clear_percent or None, paused=paused
    )


def read_upstream(upstream: pb.Upstream) -> Upstream:
    """An upstream as the pool sees it."""
    return Upstream(
        name=upstream.name,
        limit_group=upstream.limit_group,
        models=tuple(upstream.models),
        health=member(UpstreamHealth, pb.UpstreamHealth, "UPSTREAM_HEALTH", upstream.health),
        weight=upstream.weight,
        percent=upstream.percent if upstream.HasField("percent") else None,
        rank=upstream.rank,
        price_factor=upstream.price_factor,
        success_rate=upstream.success_rate,
        latency_s=seconds_of(upstream.latency) if upstream.HasField("latency") else None,
        in_flight=upstream.in_flight,
        calls=upstream.calls,
        images_per_minute=upstream.images_per_minute if upstream.HasField("images_per_minute") else None,
    )


def read_budget(budget: pb.Budget) -> Budget:
    """A budget and how far it is used up."""
    return Budget(
        name=budget.name,
        scope=member(BudgetScope, pb.BudgetScope, "BUDGET_SCOPE", budget.scope),
        subject=budget.subject,
        period=member(BudgetPeriod, pb.BudgetPeriod, "BUDGET_PERIOD", budget.period),
        limit_microusd=budget.limit_microusd,
        spent_microusd=budget.spent_microusd,
        reserved_microusd=budget.reserved_microusd,
        reset_time=time_of(budget, "reset_time"),
    )


def read_ledger_row(row: pb.LedgerRow) -> LedgerRow:
    """One call to an upstream."""
    return LedgerRow(
        id=row.id,
        namespace=row.namespace,
        caller=row.caller,
        upstream=row.upstream,
        model=row.model,
        images=row.images,
        estimate_microusd=row.estimate_microusd,
        start_time=time_of(row, "start_time"),
        tags=tuple(row.tags),
        outcome=member(AttemptOutcome, pb.AttemptOutcome, "ATTEMPT_OUTCOME", row.outcome),
        end_time=time_of(row, "end_time"),
        cost_microusd=row.cost_microusd,
        reason=row.reason,
        upstream_request_id=row.upstream_request_id,
        usage=read_usage(row.usage) if row.HasField("usage") else None,
        quality=row.quality,
    )


def read_alarm(alarm: pb.Alarm) -> Alarm:
    """A rule and how it stands."""
    return Alarm(
        name=alarm.name,
        kind=alarm.kind,
        state=member(AlarmState, pb.AlarmState, "ALARM_STATE", alarm.state),
        value=alarm.value if alarm.HasField("value") else None,
        threshold=alarm.threshold,
        since=time_of(alarm, "since"),
        runbook_url=alarm.runbook_url,
    )


def read_switch(state: pb.SwitchState) -> SwitchState:
    """How a switch stands."""
    return SwitchState(switch=member(Switch, pb.Switch, "SWITCH", state.switch), namespace=state.namespace, on=state.on)


def read_match(match: pb.Match) -> Match:
    """A similar hit that is kept for review."""
    return Match(
        id=match.id,
        time=time_of(match, "time"),
        namespace=match.namespace,
        level=member(MatchLevel, public_pb.MatchLevel, "MATCH_LEVEL", match.level),
        key=match.key,
        matched_key=match.matched_key,
        prompt=match.prompt,
    )


def read_review(review: pb.Review) -> Review:
    """A picture that waits for review."""
    return Review(
        key=review.key,
        namespace=review.namespace,
        model=review.model,
        width=review.width,
        height=review.height,
        score=review.score if review.HasField("score") else None,
        create_time=time_of(review, "create_time"),
        content_type=review.content_type,
        size_bytes=review.size_bytes,
        paid_microusd=review.paid_microusd,
    )


class PictureReader:
    """Puts a picture that waits for review together from its parts, and checks it. Does no I/O."""

    def __init__(self) -> None:
        self._header = pb.ReviewHeader()
        self._data = bytearray()

    def read(self, part: pb.GetReviewResponse) -> None:
        """Take the next part.

        Raises:
            CorruptDownloadError: there is more of it than was announced.
        """
        match part.WhichOneof("part"):
            case "header":
                self._header = part.header
            case "chunk":
                self._data += part.chunk
                if len(self._data) > self._header.review.size_bytes:
                    raise _corrupt("more bytes arrived than announced")

    def finish(self) -> ReviewPicture:
        """The picture, once no more will come.

        Raises:
            CorruptDownloadError: it ended early, or its bytes are not those announced.
        """
        header, data = self._header, bytes(self._data)
        if len(data) != header.review.size_bytes:
            raise _corrupt(f"{len(data)} of {header.review.size_bytes} bytes arrived")
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != header.digest:
            raise _corrupt("the bytes do not have the announced digest")
        return ReviewPicture(
            review=read_review(header.review),
            data=data,
            digest=header.digest,
            quality=header.quality,
            revised_prompt=header.revised_prompt,
            won_against=header.won_against,
            tags=tuple(header.tags),
        )


def _corrupt(what: str) -> CorruptDownloadError:
    return CorruptDownloadError(f"damaged picture: {what}", code=grpc.StatusCode.DATA_LOSS)


def prompts_request(namespace: str | None, kinds: Iterable[PromptKind], limit: int) -> pb.ListPromptsRequest:
    """The message that asks for recorded prompts."""
    names = [f"PROMPT_KIND_{kind.name}" for kind in kinds]
    return pb.ListPromptsRequest(namespace=namespace, kinds=names, page_size=limit)


def read_prompts(response: pb.ListPromptsResponse) -> tuple[RecordedPrompt, ...]:
    """The answer to ListPrompts."""
    return tuple(
        RecordedPrompt(
            spec=read_spec(each.request.spec),
            namespace=each.request.namespace,
            n=each.request.n,
            kind=member(PromptKind, pb.PromptKind, "PROMPT_KIND", each.kind),
            count=each.count,
            last_time=time_of(each, "last_time"),
        )
        for each in response.prompts
    )
