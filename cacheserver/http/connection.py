"""A connection to the HTTP server: uvicorn's, bounded in every wait, and quick where an answer is ready."""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cacheserver.calls.call import request_id_of
from cacheserver.calls.downloads import STALLED_S, DownloadMemory
from cacheserver.errors import OverloadedError, ShuttingDownError
from cacheserver.http.ready import (
    FindQuestions,
    KnownQuestions,
    Question,
    Questions,
    ReadyAnswer,
    ReadyRequest,
    no_questions,
)
from cacheserver.http.status import HttpError, status_of
from cacheserver.http.transport import HeadWithBody

_MOST_HELD_BYTES = 4_096
"""Of a request's body, before its application hears of it all the same."""

_LARGE_BYTES = 256 * 1024
"""An answer of more that lies ready is held until it is read; of others there is no more than of any answer's piece."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a connection may take, in seconds, how many bytes the head of a request, and how many there may be.

    `head_s` for the head of a request to come whole, and its body to begin (a short one may have to end, too);
    `stalled_s` for a client to take a little more of its answer; `idle_s` between an answer and the next request;
    `grace_s` for what runs when the server stops.
    """

    head_s: float = 30.0
    stalled_s: float = STALLED_S
    idle_s: float = 75.0
    grace_s: float = 2.0
    max_head_bytes: int = 64 * 1024
    max_connections: int = 16_384


def protocol(bounds: Bounds, find: FindQuestions, memory: DownloadMemory) -> type[Connection]:
    """The protocol for connections that are only waited for so long; `memory` is for what they have yet to read."""

    class Bounded(Connection):
        allowed = bounds
        downloads = memory
        find_questions = staticmethod(find)
        known_questions = KnownQuestions()

    return Bounded


_OFFER = (b"upgrade", b"http2-settings")
"""The headers of an offer to go on in another protocol, and what names them under `connection`."""


class Connection(HttpToolsProtocol):
    """A connection that cannot be held by saying little, sending slowly or reading nothing, as uvicorn's can.

    uvicorn bounds only the time between an answer and the next request. What is malformed is answered in the shape of
    every error.

    A request that came before, byte for byte, is not taken apart: what it asks is known. Of the others, those for which
    `find_questions` finds some are held back until all of them is there, and are answered at once if their answers are
    ready. All else is handed over to the application, in a task of its own.
    """

    allowed: Bounds
    downloads: DownloadMemory
    find_questions: FindQuestions
    known_questions: KnownQuestions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loose_bytes = 0
        """What has come since a head was whole, or a part of a body: of a head, or of what surrounds a body."""
        self._is_waiting = True
        """For more of a head, or for a body to begin."""
        self._is_over = False
        """Nothing more is read."""
        self._held: bytearray | None = None
        """What has come of the body of a request that may find its answer ready: its application knows nothing yet."""
        self._offers_upgrade = False
        """The request whose head has come offers another protocol."""
        self._questions: Questions | None = None
        self._is_between = True
        """No request is on its way in."""
        self._answered: Question | None = None
        """What was answered at once since data came last."""
        self._begun = 0
        """Requests, since then."""
        self._last_answered_s = 0.0
        self._unread = self.downloads.hold()
        """Of answers that lay ready."""
        self._waiting: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Wait for a first request, unless there are too many connections."""
        self._out = HeadWithBody(transport, self.loop)
        super().connection_made(self._out)  # type: ignore[arg-type]  # all it uses of one
        if len(self.connections) > self.allowed.max_connections:
            self.app = _turn_away
            self.find_questions, self.known_questions = no_questions, KnownQuestions()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or we have."""
        self._wait_no_longer()
        self._unset_keepalive_if_required()
        self.resume_writing()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops, once what has come of a request is answered."""
        self._release()
        super().shutdown()

    # ── what comes in ───────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        """Read what has come, and wait only so long for what has not."""
        is_between = self._is_between
        if is_between and self._answer_known(data):
            return
        if self._is_over:
            return
        self._loose_bytes += len(data)
        self._begun, self._answered = 0, None
        self._read(data)
        if is_between and self._is_between and self._answered is not None and self._begun == 1:
            self.known_questions.keep(data, self._answered)
        if self._loose_bytes > self.allowed.max_head_bytes and not self.transport.is_closing():
            text = f"The head of the request is larger than {self.allowed.max_head_bytes:,} bytes."
            self._refuse(HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text))
        elif not self._is_waiting:
            self._wait_no_longer()
        elif self._waiting is None and not self.transport.is_closing():
            self._wait()

    def _read(self, data: bytes | memoryview) -> None:
        """Take apart what has come.

        Offers of another protocol are passed over (RFC 9110 section 7.8): every client of the JDK offers HTTP/2. The
        parser would take the body of such a request for the other protocol, and uvicorn loses it.
        """
        try:
            while data:
                data = self._rest_after_offer(data)
        except HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _rest_after_offer(self, data: bytes | memoryview) -> memoryview:
        """Read up to the first offer, and the head of that request again without it; what remains to be read."""
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as offer:
            head = self._head_without_offer()
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(head)
            return memoryview(data)[offer.args[0] :]
        return memoryview(b"")

    def _head_without_offer(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.scope["headers"]:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in _OFFER)  # noqa: PLW2901 - the rest of it
            if name not in _OFFER:
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """A request begins."""
        self._loose_bytes = 0
        self._is_waiting, self._is_between = True, False
        self._begun += 1
        self._wait_no_longer()  # and begin anew, unless all of it is there
        self._unset_keepalive_if_required()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._loose_bytes = 0
        self.headers = []  # the scope has those of the head; who adds some behind a body gains no right by them
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise HttpParserError("a tunnel")  # no offer, which could be passed over
            self._offers_upgrade = True
        elif self._may_be_ready():
            self._held = bytearray()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of its body is there."""
        self._loose_bytes = 0
        if self._held is None:
            if self._is_answering:
                self._is_waiting = False  # whoever reads it sees to it that it comes to an end
            super().on_body(body)
            return
        self._held += body
        if len(self._held) > _MOST_HELD_BYTES:
            self._release()

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._loose_bytes = 0
        if self._offers_upgrade:
            self._offers_upgrade = False  # nobody has heard of it; it is read again
            return
        self._is_waiting, self._is_between = False, True
        if self._held is not None and self._answer_at_once(bytes(self._held)):
            self._held = None
            return
        self._release()
        super().on_message_complete()

    def _release(self) -> None:
        """Let the application have a request that was held."""
        if self._held is None:
            return
        held, self._held = bytes(self._held), None
        super().on_headers_complete()
        if held:
            self.on_body(held)

    # ── ready answers ───────────────────────────────────────────────────────────────────────────────────────

    def _may_be_ready(self) -> bool:
        """Whether the answer to the request whose head has come may go out as soon as the rest is there."""
        self._questions = self.find_questions(self.parser.get_method(), self.url)
        return (
            self._questions is not None
            and self._may_answer
            and not self.expect_100_continue
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
        )

    @property
    def _may_answer(self) -> bool:
        """Whether an answer may go out now: no other is on its way, the client takes what it was sent, as others do."""
        is_free = not self._is_answering and not self.flow.write_paused and not self.transport.is_closing()
        return is_free and not self.downloads.is_full

    def _answer_known(self, data: bytes) -> bool:
        """Answer a request that came before, byte for byte, if its answer is ready."""
        question = self.known_questions.find(data)
        if question is None or not self._may_answer:
            return False
        answer = question()
        if answer is None:
            return False
        self._send(answer)
        self._is_waiting = False
        self._wait_no_longer()
        if self.timeout_keep_alive_task is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1  # the timer goes on, and finds out when it is over
        return True

    def _answer_at_once(self, body: bytes) -> bool:
        """Answer a whole request, if its answer is ready: without a task, and in one packet where that is small."""
        if self._questions is None:
            return False
        question = self._questions([*self.scope["headers"]], ReadyRequest(self.url, body))
        answer = question()
        if answer is None:
            return False
        self._send(answer)
        super().on_response_complete()
        self._answered = question
        return True

    def _send(self, answer: ReadyAnswer) -> None:
        head = b"HTTP/1.1 200 OK\r\n%s%scontent-length: %d\r\n\r\n"
        date = b"".join([b"%s: %s\r\n" % line for line in self.server_state.default_headers])
        self._out.write_whole(head % (date, answer.head, len(answer.body)), answer.body)
        self._last_answered_s = self.loop.time()
        if len(answer.body) > _LARGE_BYTES:
            self._unread.count([answer.body])
            self.loop.call_soon(self._let_go_if_read)

    def _let_go_if_read(self) -> None:
        if not self.flow.write_paused:
            self._unread.let_go()

    # ── what goes out ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Its answer is written."""
        super().on_response_complete()
        if self.cycle.more_body:  # answered before its body was read, which may go on for ever
            self._is_waiting = True
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """What has come is no HTTP."""
        self._refuse(HttpError(HTTPStatus.BAD_REQUEST, msg))

    def end(self) -> None:
        """Wait for its answer no more; a client that has heard nothing yet is told that it may ask another replica."""
        if self._is_answering and self._is_next:
            self._tell(ShuttingDownError("The service is shutting down; try another replica."))
        else:
            self.transport.abort()

    def _refuse(self, error: Exception) -> None:
        """Answer what comes in with an error, and close: nobody knows where the next request would begin.

        What was asked before is answered first. Then the error is not told: nothing would come of being told in turn.
        """
        if self.cycle is not None and self.cycle.scope is self.scope:  # it has been handed over, and may be answered
            if self._is_next:
                self._tell(error)
            else:
                self.transport.close()
        elif self._is_answering:
            self.cycle.keep_alive = False
            self._is_over = True
        else:
            self._tell(error)

    @property
    def _is_next(self) -> bool:
        """Whether what is sent now would be the answer to the request that was handed over last."""
        return not self.cycle.response_started and not self.pipeline

    def _tell(self, error: Exception) -> None:
        """Send an error, and close."""
        request_id = secrets.token_hex(16)
        told = status_of(error, request_id=request_id)
        body = json.dumps({"error": told.error})
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "cache-control": "no-store",
            "x-request-id": request_id,
            **told.headers,
            "connection": "close",
        }
        lines = [
            f"HTTP/1.1 {told.status.value} {told.status.phrase}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.transport.write("\r\n".join([*lines, "", body]).encode("ascii"))
        self.transport.close()

    # ── what is waited for ──────────────────────────────────────────────────────────────────────────────────

    def _wait(self) -> None:
        self._wait_no_longer()
        self._waiting = self.loop.call_later(self.allowed.head_s, self._wait_is_over)

    def _wait_no_longer(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _wait_is_over(self) -> None:
        if self._is_answering and not self.cycle.more_body:
            self._wait()  # the answer before it is still on its way
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.allowed.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        self._unread.let_go()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; one that was answered since its timer began is so later."""
        left_s = self._last_answered_s + self.allowed.idle_s - self.loop.time()
        if left_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()


async def _turn_away(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of connections that are too many."""
    request_id = request_id_of(Headers(scope=scope))
    error = OverloadedError("There are too many connections; try again.")
    answer = status_of(error, request_id=request_id).answer()
    answer.headers |= {"x-request-id": request_id, "connection": "close"}
    await answer(scope, receive, send)
