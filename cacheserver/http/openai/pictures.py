"""Answers requests for pictures, whichever endpoint read them: asks the cache, and tells its answer in OpenAI's way."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol

from starlette.requests import Request

from cacheserver.calls.asking import Asking
from cacheserver.calls.bounds import at_use
from cacheserver.calls.call import Call
from cacheserver.calls.downloads import DownloadMemory
from cacheserver.errors import UpstreamLimitedError
from cacheserver.http.answer import Answer
from cacheserver.http.calls import while_connected
from cacheserver.http.openai.answers import Urls, answer_by_url, answer_headers, answer_with_bytes
from cacheserver.http.openai.asked import HttpAsked
from cacheserver.http.openai.headers import OURS, namespace_name, read_match_level, read_terms, unknown_use, use_of
from cacheserver.http.openai.memo import Memo, Memos, Name, Told
from cacheserver.http.openai.rates import LimitOf, rate_headers
from cacheserver.http.openai.reading import Wanted, wrong
from cacheserver.http.ready import ReadyAnswer
from cacheserver.http.status import HttpError, status_of
from cacheserver.interfaces import Clock
from cacheserver.model import CachePolicy, Namespace, Pending, Permission, Served, TierName

_REVIEW_RETRY_S = 60


class Streaming(Protocol):
    """Answers with a stream of events."""

    async def answer(self, request: Request, call: Call, asked: HttpAsked) -> Answer:
        """The answer of a call that asks for `stream`; what fails before its first byte is raised."""
        ...


class Pictures:
    """Answers with pictures."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        asking: Asking,
        clock: Clock,
        urls: Urls,
        limit_of: LimitOf,
        streaming: Streaming,
        downloads: DownloadMemory,
    ) -> None:
        """`urls` are handed out where a call wants those; `streaming` answers calls that want a stream.

        `downloads` is for the pictures being sent. `limit_of` tells how fast pictures can be made.
        """
        self._asking = asking
        self._clock = clock
        self._urls = urls
        self._streaming = streaming
        self._limit_of = limit_of
        self._downloads = downloads
        self._memos = Memos()

    def namespace(self, call: Call) -> Namespace:
        """The namespace of a call. Raises PermissionDeniedError, and InvalidRequestError where there is none."""
        return self._asking.namespace(namespace_name(call), Permission.READ, call, prefix=OURS)

    def hit(self, name: Name, request: Request, call: Call) -> Answer | None:
        """The answer to a call that came before, byte for byte, if memory has it. None: read it, and ask for one."""
        memo = self._memos.find(name)
        if memo is None:
            return None
        answer = self._asking.hit(memo.asked, call, memo.identity)
        if answer is None:
            return None
        call.model, call.quality = memo.asked.model_and_quality
        made = self._tell(answer, memo.asked, request, call)
        if len(answer) == 1 and isinstance(made.body, bytes) and not memo.asked.by_url:
            again = self._asking.again(answer[0], answer[0].entry, memo.asked, call)
            if again is not None:
                self._memos.tell(name, memo, Told(answer[0], made.body, memo.asked.terms.cache_policy, again))
        return made

    def ready(self, name: Name, call: Call) -> ReadyAnswer | None:
        """What such a call was answered lately, with headers of now, if memory still has that picture."""
        memo = self._memos.find(name)
        told = None if memo is None else memo.told
        entry = None if told is None else told.again.entry()
        if told is None or entry is None:
            return None
        if not self._asking.holds_still(told.again, entry, call.caller, call.started_s):
            return None
        self._asking.book_again(told.again, entry, call.started_s)
        call.again = told.again
        milliseconds = self._milliseconds(call).encode("ascii")
        now_s = self._clock.now_s()
        if now_s >= told.until_s:  # once a second at most
            self._asking.tend(entry)
        head = b"%sopenai-processing-ms: %s\r\n" % (told.head(entry, now_s), milliseconds)
        return ReadyAnswer(head, told.body)

    async def answer(
        self, request: Request, call: Call, namespace: Namespace, wanted: Wanted, name: Name | None = None
    ) -> Answer:
        """What the cache answers; to be called where failures are booked, once the body is read.

        `name` is what the call may be remembered by.
        """
        asked = await self._asking.screened(self._asked(call, namespace, wanted))
        if wanted.stream:
            return await self._streaming.answer(request, call, asked)
        try:
            answer = await while_connected(request, self._asking.answer(asked, call))
        except UpstreamLimitedError:
            call.trailers += rate_headers(self._limit_of(wanted.request))
            raise
        if isinstance(answer, Pending):
            return in_review(call.request_id)
        if name is not None and call.wanted is not None:
            self._memos.keep(name, Memo(asked, call.wanted))
        if any(served.tier is TierName.UPSTREAM for served in answer):  # a hit takes nothing of any limit
            call.trailers += rate_headers(self._limit_of(wanted.request))
        return self._tell(answer, asked, request, call)

    def _tell(self, answer: list[Served], asked: HttpAsked, request: Request, call: Call) -> Answer:
        headers = self._headers(answer, asked, call)
        if asked.by_url:
            made = answer_by_url(answer, self._urls_of(answer, request), asked.wanted.safety_identifier, headers)
        else:
            made = answer_with_bytes(answer, asked.wanted.safety_identifier, headers)
        pictures = [] if isinstance(made.body, bytes) else [served.entry.image.data for served in answer]
        if asked.terms.cache_policy is not CachePolicy.NO_STORE:  # who asks for one again would pay again
            self._downloads.check(pictures)
        self._asking.book(answer, asked, call)
        made.in_hand = self._downloads.hold()
        made.in_hand.count(pictures)
        return made

    def _headers(self, answer: Sequence[Served], asked: HttpAsked, call: Call) -> dict[str, str]:
        headers = answer_headers(answer, asked.terms.cache_policy, self._clock.now_s())
        headers["openai-processing-ms"] = self._milliseconds(call)
        return headers

    def _milliseconds(self, call: Call) -> str:
        return str(round((self._clock.monotonic_s() - call.started_s) * 1_000))

    def _urls_of(self, answer: Sequence[Served], request: Request) -> list[str]:
        base_url = f"{request.url.scheme}://{request.url.netloc}"
        return [self._urls.url(served.entry, base_url=base_url)[0] for served in answer]

    def _asked(self, call: Call, namespace: Namespace, wanted: Wanted) -> HttpAsked:
        request = at_use(wanted.request, use_of(call), namespace)
        if request is None:
            raise unknown_use(namespace)
        terms = read_terms(call, wanted, namespace)
        if wanted.n > namespace.max_variants:
            text = f"Invalid 'n': expected an integer of at most {namespace.max_variants} in this namespace."
            raise wrong("n", text, "integer_above_max_value")
        by_url = wanted.by_url and not wanted.stream
        if by_url and terms.cache_policy is CachePolicy.NO_STORE:
            if wanted.response_format is not None:
                text = "With 'Cache-Control: no-store' nothing is kept that a URL could lead to: ask for 'b64_json'."
                raise wrong("response_format", text, "invalid_value")
            by_url = False
        asked = HttpAsked(namespace, request, terms, read_match_level(call), wanted, by_url)
        call.model, call.quality = asked.model_and_quality
        return asked


def in_review(request_id: str) -> Answer:
    """The answer where the picture is made and a person has to approve it first."""
    return status_of(review_error(), request_id=request_id).answer()


def review_error() -> HttpError:
    """The same as an error. Nobody knows how long it takes."""
    text = "The image is made, and waits for a person's approval; ask again later, at no further cost."
    headers = {"retry-after": str(_REVIEW_RETRY_S)}
    return HttpError(HTTPStatus.CONFLICT, text, code="pending_review", headers=headers)
