"""Image URLs are fetched from the hosts and addresses we chose, and from no others."""

from __future__ import annotations

import gzip
import ipaddress
import ssl
from collections import deque
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest

from cacheserver.errors import UpstreamBadImageError, UpstreamDownError
from cacheserver.generation.providers.download import ImageDownloads, is_public
from tests.fakes import FakeClock
from tests.provider import HttpRequest, OpenAIStandIn, Reply

PUBLIC = "93.184.216.34"
PICTURE = Reply(body=b"miaow")


class Files(OpenAIStandIn):
    """Has `moods`: answers given one after the other before those that are its files'."""

    def __init__(self) -> None:
        super().__init__()
        self.moods: deque[Reply] = deque()

    async def _reply(self, request: HttpRequest) -> Reply | None:
        usual = await super()._reply(request)
        return self.moods.popleft() if self.moods else usual


class HastyClock(FakeClock):
    """A clock on which no sleep takes time; `slept` says how long each would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
async def provider() -> AsyncIterator[Files]:
    async with Files() as server:
        yield server


@pytest.fixture
def clock() -> HastyClock:
    return HastyClock()


class Names:
    """A resolver that answers what a test says, and keeps what it was asked."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.addresses


def downloads(
    base_url: str,
    *,
    names: Names | None = None,
    hosts: Sequence[str] = (),
    max_bytes: int = 1_000,
    clock: HastyClock | None = None,
    silence_s: float = 20.0,
) -> ImageDownloads:
    return ImageDownloads(
        base_url=httpx.URL(base_url),
        url_hosts=hosts,
        max_bytes=max_bytes,
        connect_timeout_s=5.0,
        ssl_context=ssl.create_default_context(),
        clock=clock or HastyClock(),
        resolve=names,
        silence_s=silence_s,
    )


async def fetched(of: ImageDownloads, url: str, *, private: bool = False) -> bytes:
    try:
        return await of.fetch(url, private=private)
    finally:
        await of.aclose()


async def test_the_providers_own_host_is_reached_at_the_address_its_name_has(provider: Files) -> None:
    provider.file("cat", Reply(body=b"miaow"))
    names = Names("127.0.0.1")
    base_url = f"http://images.internal:{provider.port}/v1"
    url = f"http://images.internal:{provider.port}/files/cat"
    assert await fetched(downloads(base_url, names=names), url, private=True) == b"miaow"
    assert names.asked == [("images.internal", provider.port)]
    assert provider.requests[0].headers["host"] == f"images.internal:{provider.port}"


async def test_a_second_address_is_tried_when_the_first_is_dead(provider: Files) -> None:
    provider.file("cat", Reply(body=b"miaow"))
    names = Names("127.255.255.254", "127.0.0.1")
    url = f"http://images.internal:{provider.port}/files/cat"
    assert await fetched(downloads(url, names=names), url, private=True) == b"miaow"


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("10.1.2.3",), (PUBLIC, "10.1.2.3"), ("::ffff:10.1.2.3",)])
@pytest.mark.parametrize("url", ["https://api.example.com/cat.png", "https://cdn.example.net/cat.png"])
async def test_a_public_providers_url_never_leads_to_a_private_address(url: str, addresses: tuple[str, ...]) -> None:
    of = downloads("https://api.example.com/v1", names=Names(*addresses), hosts=["cdn.example.net"])
    with pytest.raises(UpstreamBadImageError, match="a private address"):
        await fetched(of, url)


async def test_the_address_that_was_judged_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[httpx.Request] = []

    async def streamed() -> AsyncIterator[bytes]:
        yield b"miaow"

    async def answer(_: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, content=streamed())

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer)
    names = Names(PUBLIC)
    of = downloads("https://api.example.com/v1", names=names, hosts=["Example.NET."])
    assert await fetched(of, "https://CDN.example.net/cat.png?sig=s3cret") == b"miaow"
    [request] = sent
    assert str(request.url) == f"https://{PUBLIC}/cat.png?sig=s3cret"
    assert request.headers["host"] == "cdn.example.net"
    assert request.extensions["sni_hostname"] == "cdn.example.net"
    assert names.asked == [("cdn.example.net", 443)]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://evil.com/cat.png", "url_hosts does not name it"),
        ("https://badexample.net/cat.png", "url_hosts does not name it"),
        ("https://example.net.evil.com/cat.png", "url_hosts does not name it"),
        ("http://example.net/cat.png", "not https"),
        ("http://api.example.com/cat.png", "not https"),
        ("https://example.net:22/cat.png", "unusual port"),
        ("https://api.example.com:6379/cat.png", "unusual port"),
        ("https://example.net@evil.com/cat.png", "not one to fetch"),
        ("https://exa%6dple.net/", "that is none|not one to fetch|url_hosts"),
        ("https://éxample.net/", "url_hosts does not name it"),
    ],
)
async def test_hosts_ports_and_schemes_nobody_named_are_refused(url: str, why: str) -> None:
    names = Names(PUBLIC)
    of = downloads("https://api.example.com/v1", names=names, hosts=["example.net"])
    with pytest.raises(UpstreamBadImageError, match=why):
        await fetched(of, url)
    assert names.asked == []


async def test_a_name_without_an_address_is_down_not_bad() -> None:
    class Nameless(Names):
        async def __call__(self, host: str, port: int) -> Sequence[str]:
            raise OSError(host, port)

    of = downloads("https://api.example.com/v1", names=Nameless())
    with pytest.raises(UpstreamDownError, match="has no address"):
        await fetched(of, "https://api.example.com/cat.png")


async def test_a_dead_host_is_down() -> None:
    async with OpenAIStandIn() as gone:
        url = gone.file("cat", Reply())
    with pytest.raises(UpstreamDownError, match="cannot be reached"):
        await fetched(downloads(url), url, private=True)


@pytest.mark.parametrize("announced", [True, False])
async def test_no_more_is_read_than_an_image_may_have(provider: Files, *, announced: bool) -> None:
    headers = {} if announced else {"transfer-encoding": "chunked", "content-length": ""}
    body = b"x" * 1_001 if announced else b"3e9\r\n" + b"x" * 1_001 + b"\r\n0\r\n\r\n"
    url = provider.file("cat", Reply(body=body, headers=headers))
    with pytest.raises(UpstreamBadImageError, match="more than 1000 bytes"):
        await fetched(downloads(url), url, private=True)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "gzip, gzip", "identity, gzip", "br", "zstd", "deflate"])
async def test_what_is_compressed_is_not_unpacked_and_not_asked_for_again(
    provider: Files, clock: HastyClock, encoding: str
) -> None:
    """A thousandfold bomb is within what may be read: it would be the unpacked bytes that fill the memory."""
    bomb = gzip.compress(bytes(500_000))
    assert len(bomb) < 1_000
    url = provider.file("cat", Reply(body=bomb, headers={"content-encoding": encoding}))
    with pytest.raises(UpstreamBadImageError, match="compressed"):
        await fetched(downloads(url, clock=clock), url, private=True)
    assert provider.requests[0].headers["accept-encoding"] == "identity"
    assert len(provider.requests) == 1


@pytest.mark.parametrize("encoding", ["identity", "Identity", "aws-chunked"])
async def test_what_says_that_it_is_not_compressed_is_taken(provider: Files, encoding: str) -> None:
    url = provider.file("cat", Reply(body=b"miaow", headers={"content-encoding": encoding}))
    assert await fetched(downloads(url), url, private=True) == b"miaow"


PASSING = {
    "not there yet": Reply(404),
    "a rate limit": Reply(429, headers={"retry-after": "1"}),
    "broken": Reply(500),
    "a bad gateway": Reply(502, b"<html>", "text/html"),
    "overloaded": Reply(503),
    "no answer from the origin": Reply(524),
    "a reset": Reply(body=b"miaow", cut_after=0),
    "a reset half way": Reply(body=b"miaow", cut_after=2),
}


@pytest.mark.parametrize("what", PASSING)
@pytest.mark.parametrize("times", [1, 2])
async def test_what_may_pass_is_asked_for_again_after_a_pause(
    provider: Files, clock: HastyClock, what: str, times: int
) -> None:
    url = provider.file("cat", PICTURE)
    provider.moods.extend([PASSING[what]] * times)
    assert await fetched(downloads(url, clock=clock), url, private=True) == b"miaow"
    assert [request.target for request in provider.requests] == ["/files/cat"] * (times + 1)
    assert clock.slept == [0.5, 2.0][:times]


async def test_a_host_that_falls_silent_is_asked_again(provider: Files, clock: HastyClock) -> None:
    url = provider.file("cat", PICTURE)
    provider.moods.append(Reply(body=b"miaow", hang_after=2))
    assert await fetched(downloads(url, clock=clock, silence_s=1.0), url, private=True) == b"miaow"
    assert len(provider.requests) == 2


@pytest.mark.parametrize("what", PASSING)
async def test_what_lasts_is_given_up_after_three_tries(provider: Files, clock: HastyClock, what: str) -> None:
    url = provider.file("cat", PASSING[what])
    with pytest.raises(UpstreamDownError, match="fetching the image"):
        await fetched(downloads(url, clock=clock), url, private=True)
    assert len(provider.requests) == 3
    assert clock.slept == [0.5, 2.0]


@pytest.mark.parametrize("status", [201, 204, 206, 301, 302, 304, 400, 401, 403, 410, 416])
async def test_an_answer_that_will_stay_the_same_is_not_asked_for_again(
    provider: Files, clock: HastyClock, status: int
) -> None:
    url = provider.file("cat", Reply(status, headers={"location": "/files/other"}))
    with pytest.raises(UpstreamBadImageError, match=f"answered {status}"):
        await fetched(downloads(url, clock=clock), url, private=True)
    assert len(provider.requests) == 1
    assert clock.slept == []


async def test_a_host_that_moves_between_two_tries_is_judged_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(PUBLIC)

    async def move(*_: object) -> httpx.Response:
        names.addresses = ("10.1.2.3",)
        return httpx.Response(503)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", move)
    url = "https://api.example.com/cat.png"
    with pytest.raises(UpstreamBadImageError, match="a private address"):
        await fetched(downloads(url, names=names), url)
    assert len(names.asked) == 2


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (PUBLIC, True),
        ("2606:2800:220:1::1", True),
        ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.100.100.200", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
    ],
)
def test_what_counts_as_on_the_internet(address: str, *, expected: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is expected
