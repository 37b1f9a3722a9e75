"""Providers shaped like OpenAI's images API: OpenAI, Azure, vLLM-Omni, SGLang, LocalAI, relays."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
    UpstreamNotEntitledError,
)
from cacheserver.generation.images import BadImageError, ImageFacts, asked_size, inspect
from cacheserver.generation.prices import PriceTable, split, token_count
from cacheserver.generation.providers.download import ImageDownloads
from cacheserver.generation.providers.exchanges import (
    Answer,
    CannotConnectError,
    ConnectionFailedError,
    Exchanges,
    is_host,
    ssl_context,
)
from cacheserver.generation.providers.openai_errors import error_of, request_id
from cacheserver.generation.providers.rate_limits import read_limits
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


@dataclass(frozen=True, slots=True)
class _Answer:
    """A 200 of the provider. `private` says that it came from an address that is not on the internet."""

    body: bytes
    request_id: str
    private: bool
    told: RateLimits | None


@dataclass(frozen=True, slots=True)
class _Reply:
    """The JSON of an answer to a generation, as far as its shape can be believed."""

    items: Sequence[Mapping[str, JsonValue]]
    usage: Mapping[str, JsonValue] | None
    facts: Mapping[str, JsonValue]


@dataclass(slots=True)
class _Bill:
    """What a call that was answered has to be paid by; `reply` is None while, or where, it cannot be read."""

    request: ImageRequest
    answer: _Answer
    price_factor: Decimal
    most_microusd: int
    reply: _Reply | None = None

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

    A call is made once: whoever asks decides about another. Only a connection that failed, so that nothing was
    sent, is tried a second time.
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
        partial_images: int = 0,  # noqa: ARG002 - no provider is asked for any yet
        on_partial: Callable[[PartialImage], None] | None = None,  # noqa: ARG002 - as above
    ) -> Delivery:
        """Make one picture for each of `variants` in one call, `max_n` at most; fewer if some came damaged or late."""
        started_s = self._clock.monotonic_s()
        deadline_s = asyncio.get_running_loop().time() + self._endpoint.timeout_s
        n = min(len(variants), self._endpoint.max_n)
        answer = await self._exchange(
            "POST",
            self._generations[request.model],
            json.dumps(self._body(request, n)).encode("ascii"),
            timeout_s=self._endpoint.timeout_s,
            max_bytes=_REPLY_OVERHEAD_BYTES + int(n * self._endpoint.max_image_bytes * _BASE64_GROWTH),
        )
        bill = _Bill(request, answer, price_factor, most_microusd)
        try:
            async with self._until(deadline_s):
                bill.reply = reply = await self._read_reply(answer.body)
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

    async def _exchange(
        self, method: str, url: str, content: bytes | None, *, timeout_s: float, max_bytes: int
    ) -> _Answer:
        """One HTTP exchange under a deadline; every answer but a 200 is raised as the error it stands for."""
        headers = self._headers()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._send(method, url, headers, content, max_bytes)
        except TimeoutError:
            raise UpstreamDownError(f"{self._name}: no answer within {timeout_s:.0f} s", cost_microusd=None) from None
        except CannotConnectError as exc:
            text = f"{self._name}: cannot connect to {self._base_url.host} ({exc}): check base_url"
            raise UpstreamDownError(text) from None
        except ConnectionFailedError as exc:
            raise UpstreamDownError(f"{self._name}: the connection failed ({exc})", cost_microusd=None) from None
        return self._take(answer, max_bytes)

    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None, max_bytes: int
    ) -> Answer:
        send = partial(
            self._exchanges.send,
            method,
            url,
            headers=headers,
            content=content,
            max_bytes=max_bytes,
            max_error_bytes=_MAX_ERROR_BYTES,
        )
        try:
            return await send()
        except CannotConnectError:
            return await send()

    def _take(self, answer: Answer, max_bytes: int) -> _Answer:
        told = read_limits(answer.headers)
        if answer.status != HTTPStatus.OK:
            error = error_of(self._name, answer.status, answer.headers, answer.body or b"", now_s=self._clock.now_s())
            error.told = told
            raise error
        if not answer.body:
            text = f"{self._name}: its answer is empty or has more than {max_bytes} bytes"
            raise UpstreamBadImageError(text, cost_microusd=None)
        return _Answer(answer.body, request_id(answer.headers), answer.private, told)

    @asynccontextmanager
    async def _until(self, deadline_s: float) -> AsyncIterator[None]:
        """Stops what is done under it at the call's deadline, with the upstream's error."""
        try:
            async with asyncio.timeout_at(deadline_s):
                yield
        except TimeoutError:
            raise UpstreamDownError(f"{self._name}: no picture within {self._endpoint.timeout_s:.0f} s") from None

    async def _read_reply(self, body: bytes) -> _Reply:
        # A short one, which names URLs, is read sooner than a thread begins.
        return _read_reply(body) if len(body) <= _SHORT_REPLY_BYTES else await asyncio.to_thread(_read_reply, body)

    def _headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
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

    def _body(self, request: ImageRequest, n: int) -> dict[str, JsonValue]:
        """What goes out: what differs from the provider's defaults, and what decides the bytes.

        Never `response_format`: GPT image models refuse it, and both ways of answering are read.
        """
        body: dict[str, JsonValue] = {name: _whole_numbers(value) for name, value in request.extra.items()}
        for name in ("size", "quality", "background", "moderation"):
            if (value := getattr(request, name)) != _AUTO:
                body[name] = value
        if request.output_format != "png" and request.output_compression != 100:  # noqa: PLR2004 - the API's default
            body["output_compression"] = request.output_compression
        if request.seed is not None:
            body["seed"] = request.seed
        if self._endpoint.style is Style.OPENAI:
            body["model"] = self._endpoint.models[request.model]
        # The format is sent though it is the default: not every server of this shape has the same one.
        return body | {"prompt": request.prompt, "n": n, "output_format": request.output_format}

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
        data = _from_base64(encoded)
        return data, self._inspect(data, request)

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
            bill.request.model, size, quality, reply.usage, len(reply.items), bill.price_factor
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


def _read_reply(body: bytes) -> _Reply:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise UpstreamBadImageError("the upstream's answer is not JSON") from None
    data = document.get("data") if isinstance(document, dict) else None
    items = [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    if not items:
        raise UpstreamBadImageError("the upstream's answer has no pictures in it")
    usage = document.get("usage")
    return _Reply(items, usage if isinstance(usage, dict) else None, document)


def _from_base64(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise UpstreamBadImageError("the upstream's base64 is damaged") from None


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


def _whole_numbers(value: JsonValue) -> JsonValue:
    """Whole floats as integers, all the way down: a protobuf Struct knows no integers, providers do."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole_numbers(item) for name, item in value.items()}
    return value


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
