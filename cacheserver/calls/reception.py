"""Where every call begins and ends: counted, let in or turned away, told in one log line, remembered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import structlog

from cacheserver.calls.again import HitAgain
from cacheserver.calls.auth import Authenticator
from cacheserver.calls.call import BY_URL, NOBODY, Call, is_fit_id, request_id_of
from cacheserver.errors import OverloadedError, ShuttingDownError
from cacheserver.interfaces import Books, Clock
from cacheserver.model import Caller
from cacheserver.recall import Recall, ToldImages

_log = structlog.get_logger(__name__)

OK = "OK"
"""The code of a call that did not fail; others are the transport's own."""


class Reception:
    """Lets calls in, and knows how many are in progress."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        books: Books,
        clock: Clock,
        max_in_progress: int,
        recall: Recall | None = None,
    ) -> None:
        """Calls beyond `max_in_progress` are turned away before they cost anything. `recall` is told of every call."""
        self._recall = recall
        self._max_in_progress = max_in_progress
        self._authenticator = authenticator
        self._books = books
        self._clock = clock
        self._log = _log.bind()  # once: to find out anew how to log takes as long as to write the line
        self._logs_calls = self._log.is_enabled_for(logging.INFO)
        self._in_progress = 0
        self._idle = asyncio.Event()
        """Looked at once no more is let in."""
        self.going_down = asyncio.Event()
        """Set once the service only answers what has begun: a stream of items takes no further one."""

    @property
    def are_full(self) -> bool:
        """Whether one more would be turned away."""
        return self._in_progress >= self._max_in_progress

    @property
    def knows_certificates(self) -> bool:
        """Whether there are callers that a certificate names."""
        return self._authenticator.knows_certificates

    async def idle(self) -> None:
        """Let nothing more in, and return when every call that has begun is answered."""
        self.going_down.set()
        if self._in_progress:
            await self._idle.wait()

    def begin(self, rpc: str, metadata: Mapping[str, str], *, deadline_s: float | None = None) -> Call:
        """A call has come. Whoever serves it says `end` when its answer has gone out."""
        self._in_progress += 1
        return Call(rpc, metadata, request_id_of(metadata), deadline_s, self._clock.monotonic_s())

    def end(self, _: object = None) -> None:
        """The answer of a call has gone out, or nobody waits for it. Whatever transports tell of that is ignored."""
        self._in_progress -= 1
        if not self._in_progress and self.going_down.is_set():
            self._idle.set()

    def begin_item(self, stream: Call, item_id: str, timeout_s: float | None = None) -> Call:
        """One item of a stream, as a call of its own: under the stream's request id and its own.

        (Or its number in the stream, where its own is not fit for a log.) It has the stream's caller and metadata, what
        is left of its time, or its own where that is shorter, and ends like any call.
        """
        stream.items += 1
        self._in_progress += 1
        now_s = self._clock.monotonic_s()
        left_s = timeout_s
        if stream.deadline_s is not None:
            of_stream_s = max(0.0, stream.started_s + stream.deadline_s - now_s)
            left_s = of_stream_s if timeout_s is None else min(timeout_s, of_stream_s)
        request_id = f"{stream.request_id}/{item_id if is_fit_id(item_id) else f'?{stream.items}'}"
        return Call(stream.rpc, stream.metadata, request_id, left_s, now_s, stream.caller)

    def admit(self, call: Call) -> None:
        """Let the call in, and find out who calls.

        Raises:
            OverloadedError: there are too many calls already.
            ShuttingDownError: the service is going down.
            UnauthenticatedError: nobody we know.
        """
        self.let_in()
        self.authenticate(call)

    def let_in(self) -> None:
        """Let the call in that came last, whoever calls. Raises OverloadedError and ShuttingDownError."""
        if self._in_progress > self._max_in_progress:
            raise OverloadedError(f"More than {self._max_in_progress} calls at a time; try again.")
        if self.going_down.is_set():
            raise ShuttingDownError("The service is shutting down; try another replica.")

    def authenticate(self, call: Call) -> None:
        """Find out who calls. Raises UnauthenticatedError: nobody we know."""
        call.caller = self._authenticator.authenticate(call.metadata)

    def seconds(self, call: Call) -> float:
        """How long the call has taken so far."""
        return self._clock.monotonic_s() - call.started_s

    def is_late(self, call: Call) -> bool:
        """Whether its deadline has passed."""
        return call.deadline_s is not None and self.seconds(call) >= call.deadline_s

    def succeeded(self, call: Call) -> None:
        """The call is answered."""
        if "x-fallbacks" in call.metadata and (fallbacks := call.fallbacks):
            self._books.client_fallbacks(call.namespace, fallbacks)
        self.conclude(call, OK)

    def known_caller(self, metadata: Mapping[str, str]) -> Caller | None:
        """Who makes a call with this metadata, if it may come in. None: `admit` says why not."""
        if self._in_progress >= self._max_in_progress or self.going_down.is_set():
            return None
        return self._authenticator.known(metadata)

    def hit_again(self, rpc: str, metadata: Mapping[str, str], again: HitAgain, started_s: float) -> str:
        """A call of a known caller was answered what `again` was, all of it: its request id.

        It is in progress until its answer has gone out: whoever serves it says `end` then, as after `begin`.
        """
        request_id = request_id_of(metadata)
        if self._logs_calls or self._recall is None:
            self.conclude(Call(rpc, metadata, request_id, None, started_s, again.caller, again=again), OK)
        else:
            seconds = self._clock.monotonic_s() - started_s
            self._recall.note(
                request_id,
                rpc=rpc,
                time_s=self._clock.now_s() - seconds,
                caller=again.caller.name,
                namespace=again.namespace.name,
                seconds=seconds,
                reason="",
                images=again.told,
                wanted=again.identity,
            )
        self._in_progress += 1
        return request_id

    def failed(self, call: Call, code: str, reason: str, *, exc_info: Exception | None = None) -> None:
        """The call ends with an error, for this published reason; `exc_info` where we are to blame."""
        self._books.error(reason)
        self.conclude(call, code, reason=reason, exc_info=exc_info)

    def conclude(self, call: Call, code: str, *, reason: str = "", exc_info: Exception | None = None) -> None:
        """Write the call's one line, and remember it if its caller is known."""
        seconds = self.seconds(call)
        if (again := call.again) is not None:
            call.namespace, call.wanted = again.namespace.name, again.identity
        if self._recall is not None and call.caller is not NOBODY and call.caller is not BY_URL:
            self._recall.note(
                call.request_id,
                rpc=call.rpc,
                time_s=self._clock.now_s() - seconds,
                caller=call.caller.name,
                namespace=call.namespace,
                seconds=seconds,
                reason="" if code == OK else reason or code,
                images=_told(call),
                wanted=call.wanted,
            )
        if exc_info is None and not self._logs_calls:
            return
        log = self._log.error if exc_info else self._log.info
        log(
            "call",
            **call.ids,
            rpc=call.rpc,
            code=code,
            reason=reason,
            caller=call.caller.name,
            namespace=call.namespace,
            seconds=round(seconds, 6),
            exc_info=exc_info,
        )


def _told(call: Call) -> ToldImages:
    if call.again is not None:
        return call.again.told
    return ToldImages() if call.answer is None else ToldImages.of(call.answer)
