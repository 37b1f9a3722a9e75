"""HTTP exchanges with one provider, each over a connection of its own.

A connection that is kept may end as we send, and then nobody knows whether the call was made and is billed; and what
an ill-behaved server sends after its answer would be the answer to the next prompt. Beside seconds of generating a
handshake costs nothing.

By aiohttp, where the rest of the house uses httpx: with ten calls in flight it takes a fraction of the processor time,
which was a fifth of all that a miss takes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from http import HTTPStatus
from typing import Protocol

import aiohttp
import httpx
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from yarl import URL

from cacheserver.errors import ConfigError
from cacheserver.generation.providers.download import is_public

_READ_BUFFER_BYTES = 256 * 1024
_SLICE_BYTES = 64 * 1024
_MAX_HEADER_BYTES = 64 * 1024
_MAX_HEADERS = 512
_MAX_PORT = 65_535
_PROXY_SCHEMES = frozenset({"http", "https"})

_NOTHING_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    aiohttp.InvalidURL,
)


EVENT_STREAM = "text/event-stream"


class Listener(Protocol):
    """Takes an answer as it comes. What it raises ends the exchange."""

    def begin(self, headers: Mapping[str, str]) -> None:
        """An answer begins, with these headers."""
        ...

    async def take(self, chunk: bytes) -> bool:
        """A part of its body; True if nothing more of it is wanted."""
        ...

    async def is_whole(self) -> bool:
        """Whether all that was wanted of it came before the connection failed."""
        ...


class CannotConnectError(Exception):
    """There is no connection to the provider, so nothing was sent."""


class ConnectionFailedError(Exception):
    """The connection failed when the request may have been sent. The message is the failure's kind and no more."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file of a form. `file_name` says nothing of where the file comes from."""

    name: str
    file_name: str
    content_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Form:
    """A body of type multipart/form-data: its texts by name, then its files in order."""

    texts: Mapping[str, str] = field(repr=False)
    files: Sequence[FilePart]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int

    headers: Mapping[str, str]
    """By name, however it is written."""

    body: bytes | None
    """None, with the rest unread, if there is more of it than was to be taken; empty if it was taken as it came."""

    is_stream: bool
    """Whether it was taken as it came."""

    private: bool
    """Whether it came straight from an address that is not on the internet."""


class Exchanges:
    """Sends requests to one provider, each once, and reads the answers up to a size."""

    def __init__(
        self, *, name: str, base_url: httpx.URL, connect_timeout_s: float, ssl_context: ssl.SSLContext
    ) -> None:
        """Without network traffic yet. `connect_timeout_s` is for everything until a request can be sent.

        Raises:
            ConfigError: the environment names a proxy of a kind that is not supported.
        """
        self._connect_timeout_s = connect_timeout_s
        self._ssl_context = ssl_context
        # From the environment as it is now: aiohttp would look at it, and for a .netrc, at each call.
        self._proxy = _proxy(name, base_url)

    async def send(  # noqa: PLR0913 - a request's parts, by keyword
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        content: bytes | Form | None,
        max_bytes: int,
        max_error_bytes: int,
        listener: Listener | None = None,
    ) -> Answer:
        """One request and its answer. The caller sets the deadline.

        Args:
            method: POST, or GET.
            url: encoded.
            headers: besides those that say how we read, and the type of a form.
            content: the request's body.
            max_bytes: most that is taken of the body of a 200.
            max_error_bytes: most that is taken of any other.
            listener: is given the body of a 200 that is an event stream.

        Raises:
            CannotConnectError: nothing was sent.
            ConnectionFailedError: it may have been sent, and nobody knows what became of it.
        """
        try:
            async with self._session.request(
                method,
                URL(url, encoded=True),
                data=_form_data(content) if isinstance(content, Form) else content,
                headers=headers,
                allow_redirects=False,  # it would take the prompt and the key elsewhere
            ) as response:
                private = self._proxy is None and _is_private(response)
                is_ok = response.status == HTTPStatus.OK
                if listener is not None and is_ok and response.content_type == EVENT_STREAM:
                    listener.begin(response.headers)
                    await _pass_on(response, listener)
                    return Answer(response.status, response.headers, b"", is_stream=True, private=private)
                body = await _read_at_most(response, max_bytes if is_ok else max_error_bytes)
                return Answer(response.status, response.headers, body, is_stream=False, private=private)
        # Not chained: what is quoted there may be the prompt, or a proxy's password.
        except _NOTHING_SENT as exc:
            raise CannotConnectError(type(exc).__name__) from None
        except aiohttp.ClientError as exc:
            raise ConnectionFailedError(type(exc).__name__) from None

    async def aclose(self) -> None:
        """Let go of connections."""
        await self._session.close()

    @cached_property
    def _session(self) -> aiohttp.ClientSession:
        """Made at the first call: it belongs to the loop that runs then."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True, ssl=self._ssl_context),
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout_s),
            proxy=self._proxy,
            cookie_jar=aiohttp.DummyCookieJar(),
            response_class=_Response,
            read_bufsize=_READ_BUFFER_BYTES,
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
            max_headers=_MAX_HEADERS,
            # An answer that is not compressed cannot grow while it is read.
            headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "cacheserver"},
        )


class _Response(aiohttp.ClientResponse):
    """Remembers who answered: a short answer has given its connection back before anyone can ask it."""

    peer: tuple[str, int] | None = None

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        if connection.transport is not None:
            self.peer = connection.transport.get_extra_info("peername")
        return await super().start(connection)


def _form_data(form: Form) -> aiohttp.FormData:
    """What aiohttp sends as a form, its length told beforehand. Good for one request; the files are not copied."""
    data = aiohttp.FormData(default_to_multipart=True)
    for name, text in form.texts.items():
        data.add_field(name, text)
    for file in form.files:
        data.add_field(file.name, _Bytes(file.data, content_type=file.content_type), filename=file.file_name)
    return data


class _Bytes(aiohttp.payload.Payload):
    """Bytes of a form, sent in slices from where they are: what aiohttp has for them copies, or sends, all at once."""

    def __init__(self, value: bytes, *, content_type: str) -> None:
        super().__init__(value, content_type=content_type)
        self._size = len(value)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        view = memoryview(self._value)
        for begin in range(0, len(view), _SLICE_BYTES):
            await writer.write(view[begin : begin + _SLICE_BYTES])


async def _pass_on(response: aiohttp.ClientResponse, listener: Listener) -> None:
    failed: aiohttp.ClientError | None = None
    try:
        async for chunk in response.content.iter_any():
            if await listener.take(chunk):
                response.close()
                return
    except aiohttp.ClientError as exc:
        failed = exc
    # Not where it is caught: it may quote the answer, and would be chained to what the stream tells of a failed call.
    if failed is not None and not await listener.is_whole():
        raise failed


async def _read_at_most(response: aiohttp.ClientResponse, max_bytes: int) -> bytes | None:
    if response.content_length is not None and response.content_length > max_bytes:
        response.close()
        return None
    chunks: list[bytes] = []
    size_bytes = 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            response.close()
            return None
    # In a thread, where it holds up nobody: several large pictures come in one answer.
    return await asyncio.to_thread(b"".join, chunks)


def _is_private(response: aiohttp.ClientResponse) -> bool:
    """Whether the answer comes from an address that is not on the internet; False if that cannot be told."""
    peer = response.peer if isinstance(response, _Response) else None
    return peer is not None and not is_public(ipaddress.ip_address(peer[0]))


def _proxy(name: str, url: httpx.URL) -> str | None:
    """The proxy that the environment names for `url`. There is none to pass on loopback."""
    if is_loopback(url.host) or any(map(urllib.request.proxy_bypass, (url.host, url.netloc.decode("ascii")))):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy is None:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parsed = httpx.URL(proxy)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in _PROXY_SCHEMES or not is_host(parsed):
        # Its text is not shown: it may hold a password.
        raise ConfigError(
            f"upstream {name}: the environment's proxy has to be http(s)://[user:password@]host[:port], with /, @, : "
            f"and # in the password percent-encoded; or except {url.host} from it with NO_PROXY"
        )
    return str(parsed)


def is_host(url: httpx.URL) -> bool:
    """Whether a URL has a host and a port that can be looked up and connected to."""
    try:
        url.raw_host.decode("ascii").encode("idna")
    except UnicodeError:
        return False
    return bool(url.host) and (url.port is None or 0 < url.port <= _MAX_PORT)


def is_loopback(host: str) -> bool:
    """Whether a URL's host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@cache
def ssl_context() -> ssl.SSLContext:
    """One for all upstreams: to read the certificates takes a tenth of a second."""
    return httpx.create_ssl_context()
