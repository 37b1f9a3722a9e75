"""Providers shaped like OpenAI's images API: OpenAI, Azure, vLLM-Omni, SGLang, LocalAI, relays."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from typing import TypeVar

import httpx
import structlog

from cacheserver.errors import (
    ConfigError,
    UpstreamBadImageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamInvalidError,
    UpstreamNotEntitledError,
)
from cacheserver.generation.images import asked_size, inspect
from cacheserver.generation.prices import PriceTable, split, token_count
from cacheserver.generation.providers.bodies import body_of, fields_of
from cacheserver.generation.providers.download import ImageDownloads
from cacheserver.generation.providers.exchanges import (
    EVENT_STREAM,
    Answer,
    CannotConnectError,
    ConnectionFailedError,
    Exchanges,
    Form,
    is_host,
    ssl_context,
)
from cacheserver.generation.providers.openai_errors import error_in_stream, error_of, request_id
from cacheserver.generation.providers.rate_limits import read_limits
from cacheserver.generation.providers.replies import Reply, from_base64, read_reply, reply_of_event
from cacheserver.generation.providers.streams import PictureStream
from cacheserver.images import BadImageError, ImageFacts
from cacheserver.interfaces import Clock
from cacheserver.model import Delivery, GeneratedImage, ImageRequest, JsonValue, PartialImage, RateLimits, Usage

_T = TypeVar("_T")

_log = structlog.get_logger(__name__)

_AUTO = "auto"
_MAX_ERROR_BYTES = 64 * 1024
_MAX_LIST_BYTES = 4 * 1024 * 1024
_SHORT_REPLY_BYTES = 16 * 1024
_MAX_REVISED_PROMPT = 32_000
_CHECK_TIMEOUT_S = 10.0
# Base64 takes four bytes for three; the rest is what JSON and a revised prompt need.
_BASE64_GROWTH = 4 / 3
_REPLY_OVERHEAD_BYTES = 256 * 1024

_OF_STREAMING = frozenset({"stream", "partial_images"})
"""Parameters that say how a picture comes and nothing of the picture."""

_WORD = re.compile(r"[A-Za-z0-9_.:/\-]{1,64}")


class Style(StrEnum):
    """How a provider wants to be addressed."""

    OPENAI = "openai"
    """`{base_url}/images/generations`, the model in the body, a bearer token."""

    AZURE = "azure"
    """`{base_url}/openai/deployments/{deployment}/images/generations`, no model in the body, an `api-key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a provider is, how it wants to be addressed, and what we take from it."""

    name: str
    """Its name in config, metrics and logs."""

    base_url: str
    """For OPENAI with the version, as `https://api.openai.com/v1`; for AZURE without a path."""

    api_key: Callable[[], str] = field(repr=False)
    """Gives the key; asked before each call. An empty one sends no key."""

    models: Mapping[str, str]
    """Our model names, and what the provider calls them; for AZURE its deployments."""

    style: Style = Style.OPENAI
    api_version: str = "2025-04-01-preview"
    """Azure's `api-version`."""

    url_hosts: tuple[str, ...] = ()
    """Hosts, with all below them, that image URLs may name besides `base_url`'s own."""

    max_n: int = 10
    """Pictures per call, from 1."""

    max_image_bytes: int = 64 * 1024 * 1024
    """Largest encoded picture taken."""

    max_pixels: int = 40_000_000
    """Largest picture taken, width times height."""

    connect_timeout_s: float = 5.0
    timeout_s: float = 600.0
    """For a whole call, download and decoding included."""

    stream: bool = True
    """Whether it gives partial pictures."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """A 200 of the provider. `private` says that it came from an address that is not on the internet.

    Of a stream there is no body, but the event that `completed` it; it was asked for so many `partial_images`.
    """

    body: bytes
    request_id: str
    private: bool
    told: RateLimits | None
    is_stream: bool
    completed: Mapping[str, JsonValue] | None = None
    partial_images: int = 0


@dataclass(slots=True)
class _Bill:
    """What a call that was answered has to be paid by; `reply` is None while, or where, it cannot be read."""

    request: ImageRequest
    answer: _Answer
    price_factor: Decimal
    most_microusd: int
    reply: Reply | None = None

    @property
    def resolved(self) -> tuple[str, str, str]:
        """Size, quality and background as the provider took them; as asked where it does not say."""
        facts = self.reply.facts if self.reply is not None else {}
        size, quality, background = (
            _word(facts.get(name), getattr(self.request, name)) for name in ("size", "quality", "background")
        )
        return size, quality, background


class OpenAIUpstream:
    """An Upstream that speaks OpenAI's images API over HTTP.

    A call is made once: whoever asks decides about another. Only what cost nothing is tried a second time here: a
    connection that failed, so that nothing was sent, and a call that was refused for the partial pictures asked for.
    """

    def __init__(self, endpoint: Endpoint, *, prices: PriceTable, clock: Clock) -> None:
        """An upstream at `endpoint`, without network traffic yet.

        Raises:
            ConfigError: the endpoint's base_url is not one.
        """
        self._endpoint = endpoint
        self._name = endpoint.name
        self._base_url = _base_url(endpoint)
        self._generations = {model: self._url("images/generations", model) for model in endpoint.models}
        self._edits = {model: self._url("images/edits", model) for model in endpoint.models}
        self._streams = endpoint.stream
        self._prices = prices.naming(endpoint.models)
        self._clock = clock
        self._exchanges = Exchanges(
            name=endpoint.name,
            base_url=self._base_url,
            connect_timeout_s=endpoint.connect_timeout_s,
            ssl_context=ssl_context(),
        )
        # They log each URL, and a signed image URL is a secret.
        for library in ("httpx", "httpcore"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self._downloads = ImageDownloads(
            base_url=self._base_url,
            url_hosts=endpoint.url_hosts,
            max_bytes=endpoint.max_image_bytes,
            connect_timeout_s=endpoint.connect_timeout_s,
            ssl_context=ssl_context(),
            clock=clock,
        )

    @property
    def name(self) -> str:
        """Its name in config, metrics and logs."""
        return self._name

    @property
    def models(self) -> tuple[str, ...]:
        """Our names of the models it makes pictures with."""
        return tuple(self._endpoint.models)

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
        """Make one picture for each of `variants` in one call, `max_n` at most; fewer if some came damaged or late."""
        started_s = self._clock.monotonic_s()
        deadline_s = asyncio.get_running_loop().time() + self._endpoint.timeout_s
        n = min(len(variants), self._endpoint.max_n)
        stream = None
        if on_partial is not None and partial_images > 0 and n == 1 and self._streams:
            stream = self._stream(partial_images, on_partial)
        answer = await self._ask(request, n, stream)
        bill = _Bill(request, answer, price_factor, most_microusd)
        try:
            async with self._until(deadline_s):
                bill.reply = reply = await self._read_reply(answer)
            # All are paid for, so each has the deadline to itself: one that hangs takes no other with it.
            outcomes = await asyncio.gather(
                *(self._picture(item, request, deadline_s, private=answer.private) for item in reply.items[:n]),
                return_exceptions=True,
            )
            images = _succeeded(self._name, outcomes)
        except UpstreamError as error:
            error.cost_microusd, error.upstream_request_id = self._cost_microusd(bill), answer.request_id
            error.told = answer.told
            raise
        return self._delivery(bill, images, seconds=self._clock.monotonic_s() - started_s)

    async def check(self) -> None:
        """Return if the provider lists its models for our key; raise UpstreamError if not."""
        await self._exchange("GET", self._url("models"), None, timeout_s=_CHECK_TIMEOUT_S, max_bytes=_MAX_LIST_BYTES)

    async def aclose(self) -> None:
        """Let go of connections."""
        await self._exchanges.aclose()
        await self._downloads.aclose()

    async def _ask(self, request: ImageRequest, n: int, stream: PictureStream | None) -> _Answer:
        """The answer to a request for `n` pictures; without partial ones if that is what is refused, at no cost."""
        try:
            return await self._ask_as_it_is(request, n, stream)
        except UpstreamInvalidError as error:
            if stream is None or error.field not in _OF_STREAMING:
                raise
            # It would refuse them in every call; the request itself is sound.
            _log.warning("upstream_does_not_stream", upstream=self._name, advice="set stream = false")
            self._streams = False
            return await self._ask_as_it_is(request, n, None)

    async def _ask_as_it_is(self, request: ImageRequest, n: int, stream: PictureStream | None) -> _Answer:
        model = self._endpoint.models[request.model] if self._endpoint.style is Style.OPENAI else None
        fields = fields_of(request, n, model=model, partial_images=stream.max_partials if stream is not None else 0)
        try:
            answer = await self._exchange(
                "POST",
                (self._edits if request.inputs else self._generations)[request.model],
                body_of(fields, request.inputs),
                timeout_s=self._endpoint.timeout_s,
                max_bytes=_REPLY_OVERHEAD_BYTES + int(n * self._endpoint.max_image_bytes * _BASE64_GROWTH),
                stream=stream,
            )
            if stream is not None and answer.is_stream:
                await stream.end()
                answer = replace(answer, completed=stream.completed, partial_images=stream.max_partials)
        except UpstreamError as error:
            if stream is not None and stream.headers:
                error.upstream_request_id, error.told = request_id(stream.headers), read_limits(stream.headers)
            raise
        return answer

    def _stream(self, partial_images: int, on_partial: Callable[[PartialImage], None]) -> PictureStream:
        return PictureStream(
            self._name,
            max_partials=partial_images,
            on_partial=on_partial,
            unpack=self._unpack_partial,
            error_of=lambda headers, data: error_in_stream(self._name, headers, data, now_s=self._clock.now_s()),
            max_event_bytes=_REPLY_OVERHEAD_BYTES + int(self._endpoint.max_image_bytes * _BASE64_GROWTH),
        )

    async def _exchange(  # noqa: PLR0913 - a request's parts, by keyword
        self,
        method: str,
        url: str,
        content: bytes | Form | None,
        *,
        timeout_s: float,
        max_bytes: int,
        stream: PictureStream | None = None,
    ) -> _Answer:
        """One HTTP exchange under a deadline; every answer but a 200 is raised as the error it stands for."""
        headers = self._headers(content, stream)
        send = partial(
            self._exchanges.send,
            method,
            url,
            headers=headers,
            content=content,
            max_bytes=max_bytes,
            max_error_bytes=_MAX_ERROR_BYTES,
            listener=stream,
        )
        try:
            async with asyncio.timeout(timeout_s):
                answer = await _connected(send)
        except TimeoutError:
            raise UpstreamDownError(f"{self._name}: no answer within {timeout_s:.0f} s", cost_microusd=None) from None
        except CannotConnectError as exc:
            text = f"{self._name}: cannot connect to {self._base_url.host} ({exc}): check base_url"
            raise UpstreamDownError(text) from None
        except ConnectionFailedError as exc:
            raise UpstreamDownError(f"{self._name}: the connection failed ({exc})", cost_microusd=None) from None
        return self._take(answer, max_bytes)

    def _take(self, answer: Answer, max_bytes: int) -> _Answer:
        told = read_limits(answer.headers)
        if answer.status != HTTPStatus.OK:
            error = error_of(self._name, answer.status, answer.headers, answer.body or b"", now_s=self._clock.now_s())
            error.told = told
            raise error
        if not answer.body and not answer.is_stream:
            text = f"{self._name}: its answer is empty or has more than {max_bytes} bytes"
            raise UpstreamBadImageError(text, cost_microusd=None)
        return _Answer(answer.body or b"", request_id(answer.headers), answer.private, told, answer.is_stream)

    @asynccontextmanager
    async def _until(self, deadline_s: float) -> AsyncIterator[None]:
        """Stops what is done under it at the call's deadline, with the upstream's error."""
        try:
            async with asyncio.timeout_at(deadline_s):
                yield
        except TimeoutError:
            raise UpstreamDownError(f"{self._name}: no picture within {self._endpoint.timeout_s:.0f} s") from None

    async def _read_reply(self, answer: _Answer) -> Reply:
        if answer.completed is not None:
            return reply_of_event(answer.completed)
        # A short one, which names URLs, is read sooner than a thread begins.
        body = answer.body
        return read_reply(body) if len(body) <= _SHORT_REPLY_BYTES else await asyncio.to_thread(read_reply, body)

    def _headers(self, content: bytes | Form | None, stream: PictureStream | None) -> dict[str, str]:
        # That of a form names its boundary, which is drawn as it is sent.
        headers = {} if isinstance(content, Form) else {"content-type": "application/json"}
        if stream is not None:
            headers["accept"] = f"{EVENT_STREAM}, application/json"
        key = self._endpoint.api_key().strip()
        if not key:
            return headers
        if not (key.isascii() and key.isprintable()):
            raise UpstreamNotEntitledError(f"{self._name}: the API key has characters that no header may carry")
        if self._endpoint.style is Style.AZURE:
            return headers | {"api-key": key}
        return headers | {"authorization": f"Bearer {key}"}

    def _url(self, path: str, model: str = "") -> str:
        base = str(self._base_url).rstrip("/")
        if self._endpoint.style is Style.OPENAI:
            return f"{base}/{path}"
        deployment = f"deployments/{self._endpoint.models[model]}/" if model else ""
        query = {"api-version": self._endpoint.api_version}
        return str(httpx.URL(f"{base}/openai/{deployment}{path}", params=query))

    async def _picture(
        self, item: Mapping[str, JsonValue], request: ImageRequest, deadline_s: float, *, private: bool
    ) -> GeneratedImage:
        """One item of a reply as a picture, its bytes fetched if need be, and decoded."""
        encoded, url = item.get("b64_json"), item.get("url")
        async with self._until(deadline_s):
            if isinstance(encoded, str) and encoded:
                data, facts = await asyncio.to_thread(self._unpack, encoded, request)
            elif isinstance(url, str) and url:
                data = await self._downloads.fetch(url, private=private)
                facts = await asyncio.to_thread(self._inspect, data, request)
            else:
                raise UpstreamBadImageError(f"{self._name}: its answer has neither b64_json nor url")
        revised = item.get("revised_prompt")
        return GeneratedImage(
            data=data,
            content_type=facts.content_type,
            width=facts.width,
            height=facts.height,
            sha256=facts.sha256,
            model=request.model,
            size=request.size if request.size != _AUTO else f"{facts.width}x{facts.height}",
            quality=request.quality,
            background=request.background,
            revised_prompt=_writable(revised[:_MAX_REVISED_PROMPT]) if isinstance(revised, str) else "",
            upstream=self._name,
        )

    def _unpack(self, encoded: str, request: ImageRequest) -> tuple[bytes, ImageFacts]:
        data = from_base64(encoded)
        return data, self._inspect(data, request)

    def _unpack_partial(self, encoded: str) -> bytes:
        data = from_base64(encoded)
        # In whatever format: it is shown and thrown away.
        inspect(data, max_pixels=self._endpoint.max_pixels, max_bytes=self._endpoint.max_image_bytes)
        return data

    def _inspect(self, data: bytes, request: ImageRequest) -> ImageFacts:
        try:
            return inspect(
                data,
                max_pixels=self._endpoint.max_pixels,
                max_bytes=self._endpoint.max_image_bytes,
                expect_format=request.output_format,
                expect_size=asked_size(request.size),
                allow_blank=False,
            )
        except BadImageError as exc:
            raise UpstreamBadImageError(f"{self._name}: {exc}") from None

    def _cost_microusd(self, bill: _Bill) -> int | None:
        """What the call cost by its answer; None where nobody knows: its answer cannot be read, or has no price.

        A model without any price, and without an upper bound of the operator's, costs nothing.
        """
        if bill.reply is None:
            return None
        size, quality, _ = bill.resolved
        reply = bill.reply
        cost = self._prices.cost_microusd(
            bill.request.model,
            size,
            quality,
            reply.usage,
            len(reply.items),
            bill.price_factor,
            inputs=len(bill.request.inputs),
            partial_images=bill.answer.partial_images,
        )
        return 0 if cost is None and not bill.most_microusd else cost

    def _delivery(self, bill: _Bill, images: Sequence[GeneratedImage], *, seconds: float) -> Delivery:
        """The pictures with what is known of all of them: time, resolved parameters, usage and cost divided.

        The whole call is divided among the pictures that arrived intact: their sum is what was paid.
        """
        reply = bill.reply
        if reply is None:
            raise AssertionError("pictures come out of a reply")
        size, quality, background = bill.resolved
        cost = self._cost_microusd(bill)
        shares = split(bill.most_microusd if cost is None else cost, len(images))
        whole = tuple(
            replace(
                image,
                model=_word(reply.facts.get("model"), bill.request.model),
                size=size if size != _AUTO else image.size,
                quality=quality,
                background=background,
                seed=bill.request.seed if len(reply.items) == 1 else None,
                usage=usage,
                upstream_request_id=bill.answer.request_id,
                generation_s=seconds,
                paid_microusd=share,
            )
            for image, share, usage in zip(images, shares, _split_usage(reply.usage, len(images)), strict=True)
        )
        return Delivery(whole, told=bill.answer.told, priced=cost is not None)


async def _connected(send: Callable[[], Awaitable[Answer]]) -> Answer:
    try:
        return await send()
    except CannotConnectError:
        return await send()


def _succeeded(upstream: str, outcomes: Sequence[_T | BaseException]) -> list[_T]:
    """What worked; the first failure if nothing did, and any that is not the upstream's at once."""
    worked: list[_T] = []
    failed: list[UpstreamError] = []
    for outcome in outcomes:
        if isinstance(outcome, UpstreamError):
            failed.append(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            worked.append(outcome)
    if not worked:
        raise failed[0]
    for failure in failed:
        _log.warning("upstream_pictures_lost", upstream=upstream, reason=failure.reason, error=str(failure))
    return worked


def _split_usage(usage: Mapping[str, JsonValue] | None, n: int) -> Sequence[Usage | None]:
    """A call's token counts in `n` shares that add up to them."""
    if usage is None:
        return [None] * n
    counts = (
        token_count(usage, "input_tokens"),
        token_count(usage, "input_tokens_details", "text_tokens"),
        token_count(usage, "input_tokens_details", "image_tokens"),
        token_count(usage, "output_tokens"),
        token_count(usage, "total_tokens"),
    )
    return [Usage(*shares) for shares in zip(*(split(count, n) for count in counts), strict=True)]


def _word(value: JsonValue, otherwise: str) -> str:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else otherwise


def _writable(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON may hold and a message to a caller may not."""
    return text.encode("utf-8", "replace").decode()


def _base_url(endpoint: Endpoint) -> httpx.URL:
    try:
        url = httpx.URL(endpoint.base_url)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not is_host(url) or url.userinfo or url.query or url.fragment:
        raise ConfigError(f"upstream {endpoint.name}: base_url has to be http(s)://host[:port][/path], nothing else")
    return url
