"""`GET /images/{key}`: a stored picture, or a rendition of it, to browsers and CDNs. Never makes one anew.

It is no request in the books: a browser that fetches a picture a thousand times saves nothing. It has its own counters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from cacheserver.cache import PromptCache
from cacheserver.calls.call import Call
from cacheserver.calls.directives import stored_status
from cacheserver.calls.downloads import DownloadMemory
from cacheserver.errors import ImageChangedError, KeyGoneError, UpstreamError
from cacheserver.http.answer import Answer
from cacheserver.http.calls import HttpCalls
from cacheserver.http.delivery.access import GONE, Access, Gate
from cacheserver.http.delivery.asked import UrlAsked, read_asked
from cacheserver.http.delivery.conditions import Verdict, allows_range, judge, write_date
from cacheserver.http.delivery.fetched import Fetched, FetchedPictures, Name
from cacheserver.http.delivery.headers import SAFETY, cache_control, disposition, sharing
from cacheserver.http.delivery.ranges import (
    Multipart,
    NotSatisfiableError,
    Part,
    body_of,
    content_range,
    read_range,
)
from cacheserver.http.delivery.urls import PATH, ImageUrls, is_version_name, version_of
from cacheserver.http.ready import ReadyAnswer, ReadyRequest, head_lines
from cacheserver.http.status import HttpError, status_of
from cacheserver.interfaces import Books, Clock
from cacheserver.model import (
    MAX_VARIANT,
    REVIEW_PREFIX,
    CachedImage,
    CacheKey,
    Pending,
    Rendition,
    Terms,
    TierName,
)
from cacheserver.renditions.renditions import Renditions

_WAIT_S = 10.0
"""How long a browser waits for a picture that is just being made, or that slow tiers have."""

_TERMS = Terms(max_wait_s=_WAIT_S)
_RENDERED = "rendered"
"""Who had a rendition that was made for this answer: its master was stored, so it is a hit all the same."""

_CONDITIONAL = frozenset({"if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "range"})
"""Headers with which less than the whole picture may be the answer."""

_LISTED = ("if-match", "if-none-match")


@dataclass(frozen=True, slots=True)
class _Found:
    """What a URL leads to, who had it, and whether it is the version that the URL names, or made from that."""

    entry: CachedImage
    source: str
    is_version: bool


class ImageDelivery:
    """Answers with stored pictures by their keys."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        cache: PromptCache,
        renditions: Renditions,
        urls: ImageUrls,
        calls: HttpCalls,
        books: Books,
        clock: Clock,
        downloads: DownloadMemory,
        widths: Collection[int] = (),
    ) -> None:
        """`downloads` is for the pictures being sent. `widths` are those that renditions may have, empty for any."""
        self._cache = cache
        self._renditions = renditions
        self._partitions = urls.partitions
        self._gate = Gate(urls=urls, authenticate=calls.authenticate)
        self._calls = calls
        self._books = books
        self._clock = clock
        self._downloads = downloads
        self._widths = widths
        self._fetched = FetchedPictures()

    @property
    def routes(self) -> Sequence[BaseRoute]:
        """`GET` and `HEAD` of `/images/{key}`."""
        path = f"{PATH}/{{key}}"
        endpoint = self._calls.endpoint(f"GET {path}", self._counted, is_open=True, ready=self._ready)
        return [Route(path, endpoint, methods=["GET"])]

    def _ready(self, call: Call, request: ReadyRequest) -> ReadyAnswer | None:
        """A picture that was sent to the same request before, if memory still has it."""
        if not _CONDITIONAL.isdisjoint(call.metadata):
            return None
        fetched = self._fetched.find((request.target, call.metadata.get("accept", "")))
        entry = None if fetched is None else fetched.entry
        if fetched is None or entry is None:
            return None
        access = self._gate.admit(fetched.key, fetched.asked, call)
        if not self._cache.still_has(fetched.place, entry):
            return None
        second = int(self._clock.now_s())
        if second != fetched.second:
            found = _Found(entry, TierName.MEMORY, fetched.is_version)
            headers = self._headers(found, fetched.asked, access) | _body_headers(entry, fetched.asked)
            fetched.second, fetched.lines = second, head_lines(headers)
            if not entry.key.is_rendition:  # what is made from another one ends with that, and is soon made again
                self._cache.tending.hit(entry)
        self._told_by(call, entry, access)
        self._count(call, fetched.asked, HTTPStatus.OK, len(entry.image.data))
        return ReadyAnswer(fetched.lines, entry.image.data)

    async def _counted(self, request: Request, call: Call) -> Answer:
        asked = UrlAsked()
        try:
            asked = read_asked(request.query_params, accept=request.headers.get("accept", ""), widths=self._widths)
            answer = await self._answer(request, asked, call)
        except Exception as error:
            self._count(call, asked, status_of(error, request_id=call.request_id).status)
            raise
        size_bytes = 0 if request.method == "HEAD" else answer.length_bytes or 0
        self._count(call, asked, answer.status, size_bytes)
        return answer

    def _count(self, call: Call, asked: UrlAsked, status: int, size_bytes: int = 0) -> None:
        is_rendition = asked.rendition is not None
        self._books.delivered(call.namespace, status=status, is_rendition=is_rendition, size_bytes=size_bytes)

    async def _answer(self, request: Request, asked: UrlAsked, call: Call) -> Answer:
        key = _key(request.path_params["key"])
        access = self._gate.admit(key, asked, call)
        call.namespace = access.namespace.name
        found = await self._find(key, asked, access, call)
        entry = found.entry
        self._told_by(call, entry, access)
        headers = self._headers(found, asked, access)
        etag, modified_s = headers["etag"], _modified_s(entry)
        verdict = judge(_conditions(request), etag=etag, modified_s=modified_s)
        if verdict is Verdict.FAILED:
            text = "The image is not the one the request's conditions name."
            raise HttpError(HTTPStatus.PRECONDITION_FAILED, text, code="precondition_failed")
        if verdict is Verdict.NOT_MODIFIED:
            return Answer(HTTPStatus.NOT_MODIFIED, headers, length_bytes=None)
        headers |= _body_headers(entry, asked)
        wants_parts = request.method == "GET" and allows_range(
            request.headers.get("if-range"), etag=etag, modified_s=modified_s
        )
        answer = _whole_or_parts(entry, headers, request.headers.get("range") if wants_parts else None)
        # Without its version a URL leads to a rendition of the picture that its key names now, whichever that is.
        is_lasting = asked.rendition is None or found.is_version
        is_whole = request.method == "GET" and answer.status == HTTPStatus.OK
        if is_whole and is_lasting and found.source == TierName.MEMORY:
            self._fetched.keep(_name(request, call), Fetched(key, asked, entry, is_version=found.is_version))
        if request.method == "GET" and not isinstance(answer.body, bytes | memoryview):
            answer.in_hand = self._downloads.hold()
            answer.in_hand.take([entry.image.data])
        return answer

    def _told_by(self, call: Call, entry: CachedImage, access: Access) -> None:
        """Whose the picture is, where calls are counted."""
        is_known = self._partitions.are_shared_by(entry.namespace)  # no series of its own for one that is gone
        call.namespace = entry.namespace if is_known else access.namespace.name

    async def _find(self, key: CacheKey, asked: UrlAsked, access: Access, call: Call) -> _Found:
        try:
            if asked.rendition is None:
                found = await self._stored(key, asked, access, call)
            else:
                found = await self._rendered(key, asked.rendition, asked.version, access, call)
        except (KeyGoneError, UpstreamError):
            raise KeyGoneError(GONE) from None  # whoever has it made is told why it could not be
        if not isinstance(found, Pending):
            return found
        if found.in_review:
            raise KeyGoneError(GONE)
        retry_after = {"retry-after": str(math.ceil(max(1.0, found.estimated_wait_s)))}
        text = "The image is being made; fetch it again."
        raise HttpError(HTTPStatus.NOT_FOUND, text, code="in_flight", headers=retry_after)

    async def _stored(self, key: CacheKey, asked: UrlAsked, access: Access, call: Call) -> _Found | Pending:
        served = await self._cache.get_by_key(key, namespace=access.namespace, caller=call.caller, terms=_TERMS)
        if isinstance(served, Pending):
            return served
        return _Found(served.entry, served.tier, is_version=version_of(served.entry) == asked.version)

    async def _rendered(
        self, key: CacheKey, rendition: Rendition, version: str, access: Access, call: Call
    ) -> _Found | Pending:
        get = partial(
            self._renditions.get, key, rendition, namespace=access.namespace, caller=call.caller, terms=_TERMS
        )
        is_version = is_version_name(version)
        try:
            rendered = await get(if_digest=version if is_version else "")
        except ImageChangedError:
            rendered, is_version = await get(), False
        if isinstance(rendered, Pending):
            return rendered
        return _Found(rendered.entry, rendered.tier or _RENDERED, is_version)

    def _headers(self, found: _Found, asked: UrlAsked, access: Access) -> dict[str, str]:
        """What is told of a picture whether it is sent or not."""
        entry, now_s = found.entry, self._clock.now_s()
        headers = {
            "etag": f'"{entry.image.sha256}"',
            "last-modified": write_date(_modified_s(entry)),
            "cache-control": cache_control(access, entry, is_version=found.is_version, now_s=now_s),
            "cache-status": stored_status(entry, found.source, now_s),
            **sharing(access),
        }
        return headers | ({"vary": "Accept"} if asked.by_accept else {})


def _key(name: str) -> CacheKey:
    """The key of a stored picture. What is no such key is answered as one that nobody knows."""
    try:
        key = CacheKey.parse(name)
    except ValueError:
        raise KeyGoneError(GONE) from None
    if key.variant > MAX_VARIANT or key.partition.startswith(REVIEW_PREFIX):
        raise KeyGoneError(GONE)
    return key


def _name(request: Request, call: Call) -> Name:
    """What is fetched is remembered by this."""
    path: bytes = request.scope["raw_path"]
    query: bytes = request.scope["query_string"]
    return path + b"?" + query if query else path, call.metadata.get("accept", "")


def _body_headers(entry: CachedImage, asked: UrlAsked) -> dict[str, str]:
    """What is told besides of a picture that is sent."""
    content_type = entry.image.content_type
    return {
        "content-type": content_type,
        "accept-ranges": "bytes",
        "content-disposition": disposition(asked.download, content_type),
        **SAFETY,
    }


def _modified_s(entry: CachedImage) -> int:
    return int(entry.create_time_s)


def _conditions(request: Request) -> dict[str, str]:
    """The headers that conditions are in; a list that comes in several lines is one."""
    conditions = {name: value for name, value in request.headers.items() if name.startswith("if-")}
    lists = {name: ",".join(request.headers.getlist(name)) for name in _LISTED if name in conditions}
    return conditions | lists


def _whole_or_parts(entry: CachedImage, headers: dict[str, str], wanted: str | None) -> Answer:
    data, content_type = entry.image.data, entry.image.content_type
    size = len(data)
    try:
        parts = read_range(wanted, size)
    except NotSatisfiableError:
        text = f"The image has {size} bytes, and none that the range names."
        told = {"content-range": f"bytes */{size}"}
        raise HttpError(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, text, headers=told) from None
    if parts is None:
        return Answer(HTTPStatus.OK, headers, body_of(data, Part(0, size)), size)
    if len(parts) > 1:
        body = Multipart(data, parts, content_type)
        headers["content-type"] = body.content_type
        return Answer(HTTPStatus.PARTIAL_CONTENT, headers, body, body.length_bytes)
    headers["content-range"] = content_range(parts[0], size)
    return Answer(HTTPStatus.PARTIAL_CONTENT, headers, body_of(data, parts[0]), parts[0].size)
