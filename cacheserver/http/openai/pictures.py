"""Answers requests for pictures, whichever endpoint read them: asks the cache, and tells its answer in OpenAI's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from starlette.requests import Request

from cacheserver.calls.asking import Asked, Asking
from cacheserver.calls.bounds import at_use
from cacheserver.calls.call import Call
from cacheserver.errors import NotImplementedYetError
from cacheserver.http.answer import Answer
from cacheserver.http.calls import while_connected
from cacheserver.http.openai.answers import Urls, pictures_answer
from cacheserver.http.openai.headers import OURS, namespace_name, read_match_level, read_terms, unknown_use, use_of
from cacheserver.http.openai.reading import Wanted, wrong
from cacheserver.http.status import HttpError, status_of
from cacheserver.interfaces import Clock
from cacheserver.model import CachePolicy, Namespace, Pending, Permission, Served

_REVIEW_RETRY_S = 60


@dataclass(frozen=True, slots=True)
class HttpAsked(Asked):
    """What a call asks for, and how it is to be answered."""

    wanted: Wanted
    by_url: bool


class Streaming(Protocol):
    """Answers with a stream of events."""

    async def answer(self, request: Request, call: Call, asked: HttpAsked) -> Answer:
        """The answer of a call that asks for `stream`; what fails before its first byte is raised."""
        ...


class Pictures:
    """Answers with pictures."""

    def __init__(self, *, asking: Asking, clock: Clock, urls: Urls | None, streaming: Streaming) -> None:
        """`urls` are handed out where a call wants those; `streaming` answers calls that want a stream."""
        self._asking = asking
        self._clock = clock
        self._urls = urls
        self._streaming = streaming

    def namespace(self, call: Call) -> Namespace:
        """The namespace of a call. Raises PermissionDeniedError, and InvalidRequestError where there is none."""
        return self._asking.namespace(namespace_name(call), Permission.READ, call, prefix=OURS)

    async def answer(self, request: Request, call: Call, namespace: Namespace, wanted: Wanted) -> Answer:
        """What the cache answers; to be called where failures are booked, once the body is read."""
        asked = await self._asking.screened(self._asked(call, namespace, wanted))
        if wanted.stream:
            return await self._streaming.answer(request, call, asked)
        answer = await while_connected(request, self._asking.answer(asked, call))
        if isinstance(answer, Pending):
            return in_review(call.request_id)
        self._asking.book(answer, asked, call)
        seconds = self._clock.monotonic_s() - call.started_s
        call.trailers.append(("openai-processing-ms", str(round(seconds * 1_000))))
        return pictures_answer(
            answer,
            urls=self._urls_of(answer, request) if asked.by_url else None,
            safety_identifier=wanted.safety_identifier,
            policy=asked.terms.cache_policy,
            now_s=self._clock.now_s(),
        )

    def _urls_of(self, answer: Sequence[Served], request: Request) -> list[str]:
        base_url = f"{request.url.scheme}://{request.url.netloc}"
        return [self._urls.url(served.entry, base_url=base_url)[0] for served in answer] if self._urls else []

    def _asked(self, call: Call, namespace: Namespace, wanted: Wanted) -> HttpAsked:
        request = at_use(wanted.request, use_of(call), namespace)
        if request is None:
            raise unknown_use(namespace)
        call.model, call.quality = request.model, request.quality
        terms = read_terms(call, wanted, namespace)
        if wanted.n > namespace.max_variants:
            text = f"Invalid 'n': expected an integer of at most {namespace.max_variants} in this namespace."
            raise wrong("n", text, "integer_above_max_value")
        by_url = wanted.by_url and not wanted.stream
        if by_url and self._urls is None:
            raise NotImplementedYetError("URLs are not served in this release; ask for response_format b64_json.")
        if by_url and terms.cache_policy is CachePolicy.NO_STORE:
            if wanted.response_format is not None:
                text = "With 'Cache-Control: no-store' nothing is kept that a URL could lead to: ask for 'b64_json'."
                raise wrong("response_format", text, "invalid_value")
            by_url = False
        return HttpAsked(namespace, request, terms, read_match_level(call), wanted, by_url)


def in_review(request_id: str) -> Answer:
    """The answer where the picture is made and a person has to approve it first."""
    return status_of(review_error(), request_id=request_id).answer()


def review_error() -> HttpError:
    """The same as an error. Nobody knows how long it takes."""
    text = "The image is made, and waits for a person's approval; ask again later, at no further cost."
    headers = {"retry-after": str(_REVIEW_RETRY_S)}
    return HttpError(HTTPStatus.CONFLICT, text, code="pending_review", headers=headers)
