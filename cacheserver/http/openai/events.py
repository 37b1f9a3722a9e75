"""Pictures as server-sent events: partial ones while they are made, then each as it is.

    event: image_generation.partial_image
    data: {"type":"image_generation.partial_image","partial_image_index":0,…,"b64_json":"…"}

    event: image_generation.completed
    data: {"type":"image_generation.completed","usage":{…},…,"b64_json":"…"}

Those of edits are called image_edit.partial_image and image_edit.completed. Of several pictures each has an event of
its own, in order. A failure after the stream has begun is an event whose data have OpenAI's `error` object, which is
what clients of theirs raise. https://html.spec.whatwg.org/multipage/server-sent-events.html has the format.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus

from starlette.requests import ClientDisconnect, Request

from cacheserver.calls.asking import Asking
from cacheserver.calls.call import Call
from cacheserver.calls.downloads import DownloadMemory
from cacheserver.http.answer import Answer
from cacheserver.http.calls import gone
from cacheserver.http.openai.answers import answer_headers, base64_slices, resolved, usage_of
from cacheserver.http.openai.asked import HttpAsked
from cacheserver.http.openai.pictures import in_review, review_error
from cacheserver.http.status import status_of
from cacheserver.interfaces import Clock
from cacheserver.model import GeneratedImage, ImageBytes, ImageRequest, PartialImage, Pending, Served
from cacheserver.tasks import end

HOLD_S = 20.0
"""How long a failure still becomes a status of its own, which clients know how to retry; then the stream begins.

Proxies give an answer 30 s to begin at the least, most of them 60.
"""

KEEPALIVE_S = 15.0
"""After so long without an event a comment is sent, so that nobody takes the connection for dead."""

LEAST_PAUSE_S = 0.5
"""No client, however little patience it claims, is sent comments closer together."""

MAX_UNREAD_BYTES = 4 * 1024 * 1024
"""How much of partial pictures waits for a client that has not read them yet, but for the newest one."""

_KEEPALIVE = b": keepalive\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "private, no-transform",
    "x-accel-buffering": "no",  # nginx would keep events until it has a buffer full of them
}
_NO_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
"""Of a picture whose usage nobody knows: the event is not without it."""


class Streams:
    """Answers with streams."""

    def __init__(self, *, asking: Asking, clock: Clock, downloads: DownloadMemory) -> None:
        self._asking = asking
        self._clock = clock
        self._downloads = downloads

    async def answer(self, request: Request, call: Call, asked: HttpAsked) -> Answer:
        """What the cache answers to a screened call, as a stream; to be called where failures are booked.

        It begins with the first partial picture, with the pictures, or when neither has come for a while. Until then a
        failure is raised. A client that goes away ends its wait, not what it waits for.

        Raises:
            ClientDisconnect: nobody waits any more.
        """
        wait = Wait(self._asking, asked, call, request=request, clock=self._clock)
        try:
            first = await wait.next(_within(HOLD_S, call))
        except BaseException:
            await wait.aclose()
            raise
        if isinstance(first, Pending):
            await wait.aclose()
            return in_review(call.request_id)
        headers = dict(_HEADERS)
        if isinstance(first, list):
            headers = answer_headers(first, asked.terms.cache_policy, self._clock.now_s()) | headers
        answer = Answer(HTTPStatus.OK, headers, length_bytes=None, on_end=wait.aclose)
        answer.body = self._events(first, wait, asked, call, answer)
        return answer

    async def _events(
        self, first: PartialImage | list[Served] | None, wait: Wait, asked: HttpAsked, call: Call, answer: Answer
    ) -> AsyncIterator[bytes]:
        """The body. Where it ends with a failure, `answer` has it."""
        come: PartialImage | list[Served] | Pending | None = first
        try:
            while not isinstance(come, list | Pending):
                for piece in (_KEEPALIVE,) if come is None else _partial_event(come, asked, self._clock.now_s()):
                    yield piece
                with self._asking.booked(call):
                    come = await wait.next(_within(KEEPALIVE_S, call))
        except ClientDisconnect:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the client is told
            answer.error = error
        if isinstance(come, Pending):
            yield _error_event(status_of(review_error(), request_id=call.request_id).error)
        elif isinstance(come, list):
            answer.in_hand = self._downloads.hold()
            answer.in_hand.count([served.entry.image.data for served in come])  # too late to turn the call away
            for served in come:
                for piece in _completed_event(served.entry.image, asked, self._clock.now_s()):
                    yield piece
        if answer.error is not None:
            yield _error_event(status_of(answer.error, request_id=call.request_id).error)


class Wait:
    """One client's wait for its pictures."""

    def __init__(self, asking: Asking, asked: HttpAsked, call: Call, *, request: Request, clock: Clock) -> None:
        self._asking = asking
        self._clock = clock
        self._unread: deque[PartialImage] = deque()
        self._news = asyncio.Event()
        # A client that hears from us goes on waiting: its deadline is one between bytes.
        asked = replace(asked, terms=replace(asked.terms, on_partial=self._take, deadline_s=None))
        self._answering = asyncio.create_task(self._answer(asked, call), name="http stream")
        self._leaving = asyncio.create_task(gone(request), name="http stream: client")
        for task in (self._answering, self._leaving):
            task.add_done_callback(lambda _: self._news.set())

    async def next(self, within_s: float) -> PartialImage | list[Served] | Pending | None:
        """What comes next; None if nothing comes within so many seconds.

        Raises:
            ClientDisconnect: the client has gone.
            Exception: what the pictures cannot be had for.
        """
        if not self._has_news:
            self._news.clear()
            await self._wait_for_news(within_s)
        if self._leaving.done():
            raise ClientDisconnect
        if self._unread:
            return self._unread.popleft()
        return self._answering.result() if self._answering.done() else None

    async def aclose(self) -> None:
        """Wait no more. What is being made goes on."""
        await end([self._answering, self._leaving])
        del self._answering  # a task keeps where it was cancelled, and with that the request and its images, and us

    async def _answer(self, asked: HttpAsked, call: Call) -> list[Served] | Pending:
        answer = await self._asking.answer(asked, call)
        if not isinstance(answer, Pending):
            self._asking.book(answer, asked, call)
        return answer

    def _take(self, partial: PartialImage) -> None:
        self._unread.append(partial)
        while len(self._unread) > 1 and sum(len(each.data) for each in self._unread) > MAX_UNREAD_BYTES:
            self._unread.popleft()
        self._news.set()

    @property
    def _has_news(self) -> bool:
        return bool(self._unread) or self._leaving.done() or self._answering.done()

    async def _wait_for_news(self, within_s: float) -> None:
        waiting = [asyncio.ensure_future(self._news.wait()), asyncio.ensure_future(self._clock.sleep(within_s))]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end(waiting)


def _within(seconds: float, call: Call) -> float:
    """So long, but in time for a client that says how long it waits for a sign of life."""
    return seconds if call.deadline_s is None else max(LEAST_PAUSE_S, min(seconds, call.deadline_s / 2))


def _partial_event(partial: PartialImage, asked: HttpAsked, now_s: float) -> Iterator[bytes]:
    """It is called what was asked for, "auto" where that was left to the provider: what it will be nobody knows yet."""
    facts = _facts(asked.wanted.request) | {"partial_image_index": partial.index}
    return _event("partial_image", asked, facts, partial.data, now_s)


def _completed_event(image: GeneratedImage, asked: HttpAsked, now_s: float) -> Iterator[bytes]:
    facts = _facts(asked.wanted.request) | resolved(image) | {"usage": usage_of([image]) or _NO_USAGE}
    if asked.wanted.safety_identifier:
        facts["safety_identifier"] = asked.wanted.safety_identifier
    return _event("completed", asked, facts, image.data, now_s)


def _facts(request: ImageRequest) -> dict[str, object]:
    return {
        "background": request.background,
        "output_format": request.output_format,
        "quality": request.quality,
        "size": request.size,
    }


def _event(
    what: str, asked: HttpAsked, facts: Mapping[str, object], image: ImageBytes, now_s: float
) -> Iterator[bytes]:
    """One event, its image in base64 a slice at a time."""
    name = f"image_edit.{what}" if asked.wanted.request.inputs else f"image_generation.{what}"
    data = _compact({"type": name, "created_at": int(now_s), **facts})
    yield f'event: {name}\ndata: {data[:-1]},"b64_json":"'.encode("ascii")
    yield from base64_slices(image)
    yield b'"}\n\n'


def _error_event(error: Mapping[str, str | None]) -> bytes:
    return f"event: error\ndata: {_compact({'type': 'error', 'error': error})}\n\n".encode("ascii")


def _compact(document: object) -> str:
    return json.dumps(document, separators=(",", ":"))
