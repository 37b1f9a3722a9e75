"""Requests that boto3 does not make itself are signed, sent and understood as its own, and refused in its words."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any, Literal

import pytest
import urllib3
from botocore import UNSIGNED
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.credentials import Credentials

from cacheserver.errors import TierError, TierTimeoutError
from cacheserver.tiers.s3 import S3Tier
from cacheserver.tiers.s3_client import new_client, new_session
from cacheserver.tiers.s3_requests import SENT_UNASKED_BYTES, S3Requests
from tests.fakes import FakeClock
from tests.servers import S3Server
from tests.test_tier_s3 import ABSENT, answering, http, open_tier
from tests.tier_contract import make_entry, make_key, with_data

ODD_NAMES = ["a b", "a+b", "50%", "100%25", "grün/猫", "~a", "a=1&b=2", "it's", "(a)!*,;:@$", "a?b#c", "/a"]
OBJECT = b'HTTP/1.1 200 -\r\nETag: "x"\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello'
ABSENT_AT_LENGTH = b"HTTP/1.1 404 -\r\n\r\n<Error><Message>%b</Message><Code>NoSuchKey</Code></Error>" % (b"x" * 70_000)


class Wire:
    """What a client sends over its own connections; or over none, and each answer is an object."""

    def __init__(self, client: Any, *, has_network: bool = True) -> None:
        self.requests: list[AWSPreparedRequest] = []
        self.responses: list[AWSResponse] = []
        self._session = client._endpoint.http_session if has_network else None
        client._endpoint.http_session = self

    def send(self, request: AWSPreparedRequest) -> AWSResponse:
        self.requests.append(request)
        if self._session is not None:
            self.responses.append(self._session.send(request))
            return self.responses[-1]
        length = "0" if request.method == "PUT" else "5"
        headers: Any = {"ETag": '"x"', "Content-Length": length, "X-Amz-Meta-Sha256": "abc"}
        body = io.BytesIO(b"hello" if request.stream_output else b"")
        raw: Any = urllib3.HTTPResponse(body, headers, preload_content=False, request_method=request.method)
        return AWSResponse(str(request.url), 200, headers, raw)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()

    def close_those_of_boto3(self) -> None:
        """Close the answers boto3 was given: of one whose length it cannot read it leaves the connection open."""
        for asker, response in zip(self.askers, self.responses, strict=True):
            if asker == "b":
                response.raw.close()

    @property
    def askers(self) -> str:
        """Who has asked, in order: b is boto3, o is us."""
        return "".join("b" if "amz-sdk-request" in request.headers else "o" for request in self.requests)


def wire_of(tier: S3Tier) -> Wire:
    wire = Wire(tier._clients.reading)
    tier._clients.reads._http = wire
    return wire


@contextmanager
def reads_of(server: S3Server, credentials: Credentials | None = None) -> Iterator[tuple[Any, S3Requests, Wire]]:
    """boto3's client of the server, reads over it, and what either sends."""
    session = new_session(server.access_key, server.secret_key)
    client = new_client(
        session, endpoint=server.endpoint, region=server.region, connect_timeout_s=5, timeout_s=20, connections=16
    )
    wire = Wire(client)
    with closing(client):
        yield client, S3Requests(client, credentials or session.get_credentials()), wire


def put(server: S3Server, bucket: str, key: str, **metadata: str) -> None:
    server.client.put_object(Bucket=bucket, Key=key, Body=f"picture of {key}".encode(), Metadata=metadata)


def fields(answer: Any) -> dict[str, Any]:
    told = {field: answer[field] for field in ("ETag", "Metadata", "ContentLength")}
    if "Body" in answer:
        with closing(answer["Body"]) as body:
            told["Body"] = body.read()
    return told


def test_after_the_first_read_none_is_boto3s_and_all_say_the_same(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    for name in ODD_NAMES:
        put(s3_server, bucket, name, sha256="abc", entry="e30=")
    with reads_of(s3_server) as (client, reads, wire):
        first = {name: fields(client.get_object(Bucket=bucket, Key=name)) for name in ODD_NAMES}
        heads = {name: fields(client.head_object(Bucket=bucket, Key=name)) for name in ODD_NAMES}
        assert [told["Body"] for told in first.values()] == [f"picture of {name}".encode() for name in ODD_NAMES]
        wire.requests.clear()
        fields(reads.get_object(Bucket=bucket, Key=ODD_NAMES[0]))
        assert {name: fields(reads.get_object(Bucket=bucket, Key=name)) for name in ODD_NAMES} == first
        assert {name: fields(reads.head_object(Bucket=bucket, Key=name)) for name in ODD_NAMES} == heads
        assert wire.askers == "b" + "o" * 2 * len(ODD_NAMES)


def test_a_bucket_is_shown_by_a_read_of_its_own(s3_server: S3Server) -> None:
    buckets = [s3_server.new_bucket(), s3_server.new_bucket()]
    for bucket in buckets:
        put(s3_server, bucket, "a", home=bucket)
    with reads_of(s3_server) as (_, reads, wire):
        told = [fields(reads.get_object(Bucket=bucket, Key="a"))["Metadata"] for bucket in buckets * 2]
        assert told == [{"home": bucket} for bucket in buckets * 2]
        assert wire.askers == "bboo"


def test_threads_that_begin_together_read_each_its_own(s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    names = ["a" * n for n in range(1, 65)]  # each ends as the others do
    for name in names:
        put(s3_server, bucket, name)
    with reads_of(s3_server) as (_, reads, wire), ThreadPoolExecutor(16) as threads:
        told = list(threads.map(lambda name: fields(reads.get_object(Bucket=bucket, Key=name))["Body"], names))
        assert told == [f"picture of {name}".encode() for name in names]
        assert wire.askers.count("o") > 0


def test_credentials_that_change_are_used_at_once(s3_server: S3Server) -> None:
    put(s3_server, s3_server.bucket, "changing")
    credentials = Credentials(s3_server.access_key, "outdated")
    with reads_of(s3_server, credentials) as (_, reads, wire):
        for _ in range(2):
            fields(reads.get_object(Bucket=s3_server.bucket, Key="changing"))
        assert wire.askers == "bob"
        credentials.secret_key = s3_server.secret_key
        fields(reads.get_object(Bucket=s3_server.bucket, Key="changing"))
        assert wire.askers == "bobo"


def put_picture(requests: S3Requests, body: bytes | memoryview, **condition: str) -> None:
    requests.put_object(
        Bucket="pictures",
        Key="of a/cat+~",
        Body=body,
        ContentType="image/png",
        CacheControl="private, immutable",
        ChecksumCRC32="AAAAAA==",
        Metadata={"codec-version": "1", "entry": "e30="},
        **condition,
    )


def client_without_network(endpoint: str | None) -> tuple[Any, S3Requests, Wire]:
    session = new_session(None, None)
    client: Any = new_client(
        session, endpoint=endpoint, region="eu-west-1", connect_timeout_s=1, timeout_s=1, connections=1
    )
    wire = Wire(client, has_network=False)
    return client, S3Requests(client, session.get_credentials()), wire


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of a session, and a clock that stands."""
    for name, value in (("ACCESS_KEY_ID", "an id"), ("SECRET_ACCESS_KEY", "a secret"), ("SESSION_TOKEN", "a token")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: dt.datetime(2026, 5, 1, 12))  # noqa: DTZ001 - botocore's


ENDPOINTS = {
    None: "https://pictures.s3.eu-west-1.amazonaws.com/",
    "http://localhost:9000": "http://localhost:9000/pictures/",
    "http://localhost:80": "http://localhost:80/pictures/",
    "https://store.example.com": "https://store.example.com/pictures/",
    "https://[::1]:8443": "https://[::1]:8443/pictures/",
}


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("operation", ["get_object", "head_object"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_same_is_signed_and_sent_as_by_boto3(
    endpoint: str | None, operation: Literal["get_object", "head_object"]
) -> None:
    _, reads, wire = client_without_network(endpoint)
    for _ in range(2):
        getattr(reads, operation)(Bucket="pictures", Key="of a/cat+~")
    assert wire.askers == "bo"
    of_boto3, ours = wire.requests
    assert (ours.method, ours.url, ours.body) == (of_boto3.method, of_boto3.url, of_boto3.body)
    assert ours.url == f"{ENDPOINTS[endpoint]}of%20a/cat%2B~"
    assert ours.stream_output == of_boto3.stream_output
    sent: Any = dict(ours.headers)
    headers = {name: value.decode() for name, value in sent.items()}
    expected: Any = dict(of_boto3.headers)
    assert headers.pop("Host") == ours.url.split("/")[2].removesuffix(":80")
    assert headers == {name: value.decode() for name, value in expected.items() if not name.startswith("amz-sdk-")}
    assert headers["X-Amz-Security-Token"] == "a token"
    assert "x-amz-security-token" in headers["Authorization"]


def as_text(headers: Any) -> dict[str, str]:
    """Without what tells a call of boto3's from others; it has what its user agent says it uses in no order."""
    text = {name: value if isinstance(value, str) else value.decode() for name, value in dict(headers).items()}
    text["User-Agent"] = "".join(sorted(text["User-Agent"]))
    return {name: value for name, value in text.items() if not name.startswith("amz-sdk-")}


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("condition", [{"IfNoneMatch": "*"}, {"IfMatch": '"x"'}], ids=["new", "replaced"])
@pytest.mark.parametrize("body", [b"hello", b"", b"long" * 65_536], ids=["bytes", "empty", "long"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_same_is_put_as_by_boto3(endpoint: str | None, body: bytes, condition: dict[str, str]) -> None:
    _, requests, wire = client_without_network(endpoint)
    for _ in range(2):
        put_picture(requests, memoryview(body), **condition)
    assert wire.askers == "bo"
    of_boto3, ours = wire.requests
    assert (ours.method, ours.url, ours.stream_output) == (of_boto3.method, of_boto3.url, of_boto3.stream_output)
    sent: Any = ours.body
    assert bytes(sent or b"") == body
    headers = as_text(ours.headers)
    assert headers.pop("Host") == ours.url.split("/")[2].removesuffix(":80")
    expected = as_text(of_boto3.headers)
    if len(body) < SENT_UNASKED_BYTES:
        expected.pop("Expect", None)
    assert headers == expected
    [name] = condition
    assert headers["If-None-Match" if name == "IfNoneMatch" else "If-Match"] == condition[name]


@pytest.mark.usefixtures("environment")
def test_a_put_is_not_made_as_a_read_is() -> None:
    long = bytes(SENT_UNASKED_BYTES)
    _, requests, wire = client_without_network(None)
    requests.get_object(Bucket="pictures", Key="a")
    put_picture(requests, long)
    requests.get_object(Bucket="pictures", Key="a")
    put_picture(requests, long)
    assert wire.askers == "bboo"
    assert ["Expect" in request.headers for request in wire.requests] == [False, True, False, True]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("size_bytes", "is_asked"), [(SENT_UNASKED_BYTES - 1, False), (SENT_UNASKED_BYTES, True)])
def test_only_a_long_body_waits_until_it_is_wanted(size_bytes: int, *, is_asked: bool) -> None:
    _, requests, wire = client_without_network(None)
    for _ in range(2):
        put_picture(requests, bytes(size_bytes))
    assert wire.askers == "bo"
    assert ("Expect" in wire.requests[1].headers) is is_asked


@pytest.mark.usefixtures("environment")
def test_names_of_metadata_are_in_lower_case() -> None:
    _, reads, _ = client_without_network(None)
    reads.get_object(Bucket="pictures", Key="a")
    assert reads.get_object(Bucket="pictures", Key="a")["Metadata"] == {"sha256": "abc"}


@pytest.mark.usefixtures("environment")
def test_what_is_signed_in_another_way_stays_boto3s() -> None:
    client, reads, wire = client_without_network(None)
    client.meta.events.register("choose-signer.s3", lambda **_: UNSIGNED)
    for _ in range(3):
        reads.get_object(Bucket="pictures", Key="a")
    assert wire.askers == "bbb"


@pytest.mark.usefixtures("environment")
def test_without_credentials_or_connections_of_boto3s_all_reads_are_boto3s() -> None:
    client, _, wire = client_without_network(None)
    reads = S3Requests(client, None)
    unconnected = S3Requests(client, Credentials("an id", "a secret"))
    unconnected._http = None
    for _ in range(2):
        reads.get_object(Bucket="pictures", Key="a")
        unconnected.get_object(Bucket="pictures", Key="a")
    assert wire.askers == "bbbb"


async def test_entries_under_an_odd_prefix_are_read_without_boto3(s3_server: S3Server, clock: FakeClock) -> None:
    async with open_tier(s3_server, clock, prefix=f"a b+50%ü~=&'/{uuid.uuid4().hex}/") as tier:
        wire = wire_of(tier)
        await tier.put(make_key(), make_entry(), replace=False)
        wire.requests.clear()
        for _ in range(3):
            assert await tier.get(make_key()) == make_entry()
        assert await tier.head(make_key()) is not None
        assert wire.askers == "booo"


def wire_of_writes(tier: S3Tier) -> Wire:
    wire = Wire(tier._clients.writing)
    tier._clients.writes._http = wire
    return wire


async def test_entries_under_an_odd_prefix_are_written_without_boto3(s3_server: S3Server, clock: FakeClock) -> None:
    async with open_tier(s3_server, clock, prefix=f"a b+50%ü~=&'/{uuid.uuid4().hex}/") as tier:
        wire = wire_of_writes(tier)
        for variant in range(3):
            entry = make_entry(make_key(variant=variant), data=b"x" * (1 + variant * 45_000))
            assert await tier.put(entry.key, entry, replace=False)
            assert await tier.put(entry.key, with_data(entry, b"new"), replace=True)
            assert await tier.get(entry.key) == with_data(entry, b"new")
        assert wire.askers == "booooo"


async def test_a_number_that_is_taken_stays_whose_it_is(s3_server: S3Server, clock: FakeClock) -> None:
    async with open_tier(s3_server, clock) as tier:
        wire = wire_of_writes(tier)
        entry = make_entry()
        assert await tier.put(entry.key, entry, replace=False)
        assert not await tier.put(entry.key, with_data(entry, b"late"), replace=False)
        assert await tier.put(entry.key, entry, replace=False)  # as after an answer that was lost
        assert await tier.get(entry.key) == entry
        assert wire.askers == "boo"


STORED = b'HTTP/1.1 200 -\r\nETag: "x"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'


async def put_outcome(tier: S3Tier) -> str:
    try:
        return repr(await tier.put(make_key(), make_entry(), replace=False))
    except TierError as exc:
        return repr(exc)


@pytest.mark.parametrize(
    ("answer", "askers"),
    [
        (http(400, "BadDigest"), "bob"),
        (http(403, "SignatureDoesNotMatch"), "bo"),
        (http(404, "NoSuchBucket"), "bo"),
        (http(500, "InternalError"), "bo"),
        (http(503, "SlowDown"), "bo"),
        (http(507), "bo"),
        (http(200, "InternalError"), "bob"),
    ],
    ids=lambda value: value[9:12].decode() if isinstance(value, bytes) else "",
)
async def test_a_refused_put_is_told_in_boto3s_words_and_sent_again_only_where_boto3_might(
    s3_server: S3Server, clock: FakeClock, answer: bytes, askers: str
) -> None:
    async with answering(answer) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        of_boto3 = await put_outcome(tier)
    async with answering(STORED, answer) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        wire = wire_of_writes(tier)
        assert await put_outcome(tier) == "True"
        assert await put_outcome(tier) == of_boto3
        assert wire.askers == askers
        await put_outcome(tier)
        assert wire.askers == askers + "b"  # until boto3 succeeds again


async def test_a_conflict_is_tried_again_and_not_asked_of_boto3(s3_server: S3Server, clock: FakeClock) -> None:
    answers = [STORED, http(409, "ConditionalRequestConflict"), STORED]
    async with answering(*answers) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        wire = wire_of_writes(tier)
        for _ in range(2):
            assert await put_outcome(tier) == "True"
        assert wire.askers == "boo"


async def test_what_is_absent_is_asked_for_once(s3_server: S3Server, clock: FakeClock) -> None:
    answers = [OBJECT, ABSENT, http(404), OBJECT]
    async with answering(*answers) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        wire = wire_of(tier)
        assert await tier.read_file("a", 5) == b"hello"
        assert await tier.get(make_key()) is None
        assert await tier.head(make_key()) is None
        assert await tier.read_file("a", 5) == b"hello"
        assert wire.askers == "booo"


async def test_that_something_is_absent_shows_how_the_bucket_is_read(s3_server: S3Server, clock: FakeClock) -> None:
    async with answering(ABSENT, ABSENT, OBJECT) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        wire = wire_of(tier)
        for _ in range(2):
            assert await tier.get(make_key()) is None
        assert await tier.read_file("a", 5) == b"hello"
        assert wire.askers == "boo"


async def outcome(tier: S3Tier) -> str:
    try:
        return repr(await tier.get(make_key()))
    except TierError as exc:
        return repr(exc)


@pytest.mark.parametrize(
    "answer",
    [
        http(400, "AuthorizationHeaderMalformed"),
        http(403, "SignatureDoesNotMatch"),
        http(404),
        http(404, "NoSuchBucket"),
        ABSENT_AT_LENGTH,
        http(500, "InternalError"),
        http(503, "SlowDown"),
        http(206),
        http(204),
        http(200),
        b'HTTP/1.1 200 -\r\nETag: "x"\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n',
        b'HTTP/1.1 200 -\r\nETag: "x"\r\nContent-Length: many\r\n\r\nabc',
    ],
    ids=lambda answer: answer[9:12].decode(),
)
async def test_any_other_answer_is_asked_of_boto3_and_told_in_its_words(
    s3_server: S3Server, clock: FakeClock, answer: bytes
) -> None:
    async with answering(answer) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        wire = wire_of(tier)
        of_boto3 = await outcome(tier)
        wire.close_those_of_boto3()
    async with answering(OBJECT, answer) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        wire = wire_of(tier)
        await tier.read_file("a", 5)
        assert await outcome(tier) == of_boto3
        assert make_key().name not in of_boto3
        assert wire.askers == "bob"
        assert wire.responses[1].raw.closed
        wire.close_those_of_boto3()


async def test_a_server_that_fails_is_not_asked_twice_each_time(s3_server: S3Server, clock: FakeClock) -> None:
    failure = http(503, "SlowDown")
    answers = [OBJECT, failure, failure, failure, OBJECT]
    async with answering(*answers) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        wire = wire_of(tier)
        for _ in range(5):
            with suppress(TierError):
                await tier.read_file("a", 5)
        assert wire.askers == "b" + "ob" + "b" + "b" + "o"


async def test_a_redirect_is_followed_by_boto3_and_then_by_all(s3_server: S3Server, clock: FakeClock) -> None:
    moved = http(307, "TemporaryRedirect", headers="x-amz-bucket-region: eu-west-3\r\n")
    async with (
        answering(OBJECT, moved, moved, OBJECT) as endpoint,
        open_tier(s3_server, clock, endpoint=endpoint) as tier,
    ):
        wire = wire_of(tier)
        for _ in range(3):
            assert await tier.read_file("a", 5) == b"hello"
        assert wire.askers == "b" + "obb" + "o"
        moved_to = ["eu-west-3" in str(request.headers["Authorization"]) for request in wire.requests]
        assert moved_to == [False, False, False, True, True]


async def test_a_connection_that_the_server_closes_is_made_anew_once(s3_server: S3Server, clock: FakeClock) -> None:
    closed = b""
    answers = [OBJECT, closed, OBJECT, closed, closed, OBJECT]
    async with answering(*answers) as endpoint, open_tier(s3_server, clock, endpoint=endpoint) as tier:
        wire = wire_of(tier)
        for _ in range(2):
            assert await tier.read_file("a", 5) == b"hello"
        with pytest.raises(TierError, match="cannot be reached for read: ConnectionClosedError"):
            await tier.read_file("a", 5)
        assert await tier.read_file("a", 5) == b"hello"
        assert wire.askers == "b" + "oo" + "oo" + "o"


async def test_a_body_that_drips_is_given_up_at_the_deadline(s3_server: S3Server, clock: FakeClock) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 -\r\nETag: "x"\r\nContent-Length: 50000000\r\n\r\n')
        with suppress(ConnectionError):
            for _ in range(20):
                writer.write(bytes(2_500_000))
                await writer.drain()
                clock.advance(1)

    async with (
        answering(OBJECT, drip) as endpoint,
        open_tier(s3_server, clock, endpoint=endpoint, max_entry_bytes=50_000_000, read_timeout_s=5.0) as tier,
    ):
        wire = wire_of(tier)
        await tier.read_file("a", 5)
        with pytest.raises(TierTimeoutError, match="within 5 s"):
            await tier.get(make_key())
        assert wire.askers == "bo"


async def test_whatever_is_answered_leaves_its_connection_to_the_next(s3_server: S3Server, clock: FakeClock) -> None:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(asyncio.IncompleteReadError), closing(writer):
            while head := await reader.readuntil(b"\r\n\r\n"):
                answer = ABSENT if b"studio" in head else OBJECT
                answer = answer.replace(b"Connection: close\r\n", b"")
                writer.write(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if head.startswith(b"HEAD") else answer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        async with open_tier(s3_server, clock, endpoint=endpoint) as tier:
            wire = wire_of(tier)
            for _ in range(2):
                assert await tier.read_file("a", 5) == b"hello"
                assert await tier.get(make_key()) is None
                assert await tier.head(make_key()) is None
            assert wire.askers == "booooo"
        [writer] = writers
        writer.close()  # urllib3 closes its end when its answers are collected; Python 3.12 waits for one of the two


async def test_who_has_no_credentials_is_told_so(
    s3_server: S3Server, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("EC2_METADATA_DISABLED", "true"), ("SHARED_CREDENTIALS_FILE", "/no"), ("CONFIG_FILE", "/no")):
        monkeypatch.setenv(f"AWS_{name}", value)
    async with open_tier(s3_server, clock, access_key=None, secret_key=None) as tier:
        with pytest.raises(TierError, match="no credentials for S3 get"):
            await tier.get(make_key())
