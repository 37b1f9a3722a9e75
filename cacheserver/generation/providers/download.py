"""Fetching the images that a provider answers with by URL.

The URL comes from the network, so it decides nothing: not the host we talk to, not the address behind the
host, not the size we read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence

import httpx

from cacheserver.errors import UpstreamBadImageError, UpstreamDownError
from cacheserver.interfaces import Clock

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_HOST = re.compile(r"[A-Za-z0-9.:\-_]{1,253}")
_PORTS = {"http": 80, "https": 443}

_PAUSES_S = (0.5, 2.0)
"""Before each further try: the image is paid for, and made anew it would be paid for once more."""

_PASSING = frozenset({404, 429, *range(500, 600)})
"""Statuses that another try may not meet again; a store may answer 404 for what was written a moment ago."""

_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})
"""Encodings of which the bytes are no use as they are. Some stores name others, as "aws-chunked", on plain bytes."""


class ImageDownloads:
    """Fetches image URLs: https, from hosts we were told of, at addresses that suit them, up to a size.

    Plain http is taken only from the provider's own host when we call that host over plain http ourselves.
    Redirects are not followed, and no proxy is used: it would look the host up again.
    """

    def __init__(  # noqa: PLR0913 - parts it is built from, by keyword
        self,
        *,
        base_url: httpx.URL,
        url_hosts: Sequence[str],
        max_bytes: int,
        connect_timeout_s: float,
        ssl_context: ssl.SSLContext,
        clock: Clock,
        resolve: Resolver | None = None,
        silence_s: float = 20.0,
    ) -> None:
        """`url_hosts` are names that are accepted, with all names below them, besides `base_url`'s own host.

        A host that sends nothing for `silence_s` is asked again.
        """
        self._base_url = base_url
        self._url_hosts = tuple(host.lower().strip(".") for host in url_hosts)
        self._max_bytes = max_bytes
        self._clock = clock
        self._resolve = resolve or _resolve
        # Connections are made to addresses, so a kept one could answer for another host of the same address.
        self._client = httpx.AsyncClient(
            verify=ssl_context,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(silence_s, connect=connect_timeout_s),
            limits=httpx.Limits(max_keepalive_connections=0),
            headers={"accept": "image/*", "accept-encoding": "identity"},
        )

    async def fetch(self, url_text: str, *, private: bool) -> bytes:
        """The bytes at `url_text`, asked for three times if need be. The caller sets the deadline.

        `private` says that the provider itself was reached at an address that is not on the internet; only
        then may the image lie at one.

        Raises:
            UpstreamBadImageError: the URL is none we fetch, or what lies there is no answer we take.
            UpstreamDownError: the host cannot be reached, or does not have or give them now.
        """
        url = self._accepted(url_text)
        for pause_s in _PAUSES_S:
            try:
                return await self._try(url, private=private)
            except UpstreamDownError:
                await self._clock.sleep(pause_s)
        return await self._try(url, private=private)

    async def _try(self, url: httpx.URL, *, private: bool) -> bytes:
        for address in await self._addresses(url, private=private):
            try:
                return await self._get(url, address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
            except httpx.RequestError as exc:
                raise UpstreamDownError(f"fetching the image from {_host(url)}: {type(exc).__name__}") from None
        raise UpstreamDownError(f"fetching the image: {_host(url)} cannot be reached")

    async def aclose(self) -> None:
        """Let go of connections."""
        await self._client.aclose()

    def _accepted(self, url_text: str) -> httpx.URL:
        """The URL, if its scheme, host and port are ones we fetch from."""
        try:
            url = httpx.URL(url_text)
        except (httpx.InvalidURL, ValueError):
            raise UpstreamBadImageError("the upstream answered with an image URL that is none") from None
        host = _host(url)
        if url.userinfo or not _HOST.fullmatch(host):
            raise UpstreamBadImageError("the upstream answered with an image URL that is not one to fetch")
        own = host == _host(self._base_url)
        if url.scheme != "https" and not (own and url.scheme == self._base_url.scheme):
            raise UpstreamBadImageError(f"the upstream answered with an image URL at {host} that is not https")
        if not own and not any(host == known or host.endswith(f".{known}") for known in self._url_hosts):
            raise UpstreamBadImageError(
                f"the upstream answered with an image URL at {host}; url_hosts does not name it"
            )
        if _port(url) not in {443, _port(self._base_url) if own else 443}:
            raise UpstreamBadImageError(f"the upstream answered with an image URL at an unusual port of {host}")
        return url

    async def _addresses(self, url: httpx.URL, *, private: bool) -> list[IPAddress]:
        """Every address of the URL's host; all of them have to be ones we connect to."""
        try:
            addresses = [ipaddress.ip_address(text) for text in await self._resolve(_host(url), _port(url))]
        except (OSError, ValueError):
            raise UpstreamDownError(f"fetching the image: {_host(url)} has no address") from None
        if not private and not all(is_public(address) for address in addresses):
            raise UpstreamBadImageError(f"the upstream answered with an image URL at {_host(url)}, a private address")
        return addresses

    async def _get(self, url: httpx.URL, address: IPAddress) -> bytes:
        # The address that was checked is the one connected to: a second look-up could answer differently.
        request = self._client.build_request(
            "GET",
            url.copy_with(host=str(address)),
            headers={"host": url.netloc.decode("ascii")},
            extensions={"sni_hostname": _host(url)},
        )
        response = await self._client.send(request, stream=True)
        try:
            if response.status_code in _PASSING:
                raise UpstreamDownError(f"fetching the image: {_host(url)} answered {response.status_code}")
            if response.status_code != httpx.codes.OK:
                raise UpstreamBadImageError(f"the image's URL at {_host(url)} answered {response.status_code}")
            data = await read_at_most(response, self._max_bytes)
        finally:
            await response.aclose()
        if data is None:
            text = f"the image at {_host(url)} has more than {self._max_bytes} bytes or is compressed"
            raise UpstreamBadImageError(text)
        return data


async def read_at_most(response: httpx.Response, max_bytes: int) -> bytes | None:
    """The body of a streamed response; None, with the rest unread, if it is longer than `max_bytes` or compressed.

    Nothing is unpacked: a few bytes may hold more than there is memory, and who reads here asks for `identity`.
    """
    encodings = response.headers.get("content-encoding", "").lower().split(",")
    if any(encoding.strip() in _COMPRESSED for encoding in encodings):
        return None
    length = response.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        return None
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            return None
    return bytes(body)


def is_public(address: IPAddress) -> bool:
    """Whether an address is on the internet: not ours, not another host's way of writing one of ours."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        # Addresses of tunnels (6to4, Teredo) hold an IPv4 address that nobody has judged.
        if address.sixtofour is not None or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _host(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii").lower()


def _port(url: httpx.URL) -> int:
    return url.port or _PORTS.get(url.scheme, 0)
