"""Requests for objects, cheaper than boto3's: signed and sent by botocore's own parts, once boto3 has shown how."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse
from botocore.exceptions import ClientError
from botocore.parsers import RestXMLParser
from botocore.response import StreamingBody

from cacheserver.model import ImageBytes

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

_SIGNATURE = "s3v4"
_SERVICE = "s3"
_METADATA = "x-amz-meta-"
_NO_SUCH_KEY = "NoSuchKey"
_ABSENT = f"<Code>{_NO_SUCH_KEY}</Code>".encode()
_MAX_ERROR_BYTES = 64 * 1024
_EXPECT = "Expect"
SENT_UNASKED_BYTES = 256 * 1024
"""A smaller body is sent without asking whether it is wanted, which would cost a round trip more; and where it is not,
servers read on so far, so that their answer arrives: Go's maxPostHandlerReadBytes."""

_HEADERS = {
    "ContentType": "Content-Type",
    "CacheControl": "Cache-Control",
    "ChecksumCRC32": "x-amz-checksum-crc32",
    "IfNoneMatch": "If-None-Match",
    "IfMatch": "If-Match",
}
"""How what `put_object` is told goes over the wire."""

_LOST = {HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT}
"""To another writer: nothing is wrong with how we put."""
_Method = Literal["GET", "HEAD", "PUT"]


@dataclass(frozen=True, slots=True)
class _Way:
    """How boto3 asks for the objects of a bucket, or sends them."""

    before_key: str
    """An object's URL up to its key."""
    region: str
    headers: Mapping[str, str]
    credentials: Credentials


class _Unsigned(AWSRequest):
    """A request for an object, as the signer takes it."""

    body: Any = b""  # botocore's own prepares the whole request to tell what its body is


class _Shown(threading.local):
    """What a thread has boto3 ask for, and how boto3 did; None if we could not ask like that."""

    key = ""
    way: _Way | None = None


class S3Requests:
    """`get_object`, `head_object` and `put_object` of a client, from several threads at a time.

    The first read of a bucket, and the first put, is boto3's; those that follow are made in the same way. Of the
    answers to a read we know an object and its absence. After any other (a redirect, a failure, missing rights) boto3
    asks again: it knows what to do, or what to say. Of the answers to a put boto3 asks again only after those at which
    it might send a body anew; a failure is raised as it would raise it. Where boto3 asks as we cannot (with another
    signature, or no credentials) every request is its own.

    Args:
        client: makes the requests that are boto3's; all use its connections, which close with it.
        credentials: the client's; None if it has none.
    """

    def __init__(self, client: S3Client, credentials: Credentials | None) -> None:
        self._client = client
        self._credentials = credentials
        # Not public. A session of our own would have other connections, and other settings for TLS and proxies.
        self._http: Any = getattr(getattr(client, "_endpoint", None), "http_session", None)
        self._ways: dict[str, _Way] = {}
        self._ways_to_put: dict[str, _Way] = {}
        self._shown = _Shown()
        for operation in ("GetObject", "HeadObject", "PutObject"):
            client.meta.events.register(f"before-sign.s3.{operation}", self._watch)
            client.meta.events.register(f"before-send.s3.{operation}", self._watch_sending)

    def get_object(self, *, Bucket: str, Key: str) -> Mapping[str, Any]:  # noqa: N803 - boto3's names
        """As boto3's: ETag, Metadata (names in lower case), ContentLength, and Body, which has to be closed."""
        return self._read("GET", self._client.get_object, Bucket, Key)

    def head_object(self, *, Bucket: str, Key: str) -> Mapping[str, Any]:  # noqa: N803 - boto3's names
        """As boto3's: ETag, Metadata (names in lower case) and ContentLength."""
        return self._read("HEAD", self._client.head_object, Bucket, Key)

    def put_object(
        self,
        *,
        Bucket: str,  # noqa: N803 - boto3's names
        Key: str,  # noqa: N803
        Body: ImageBytes,  # noqa: N803
        Metadata: Mapping[str, str],  # noqa: N803
        **headers: str,
    ) -> None:
        """As boto3's, of what is in _HEADERS; the body is copied nowhere.

        Raises:
            ClientError: S3 refuses.
            BotoCoreError: the connection failed; what was sent may have arrived.
        """
        way = self._ways_to_put.get(Bucket)
        if way is not None:
            sent = {_HEADERS[name]: value for name, value in headers.items()}
            sent |= {f"{_METADATA}{name}": value for name, value in Metadata.items()}
            response = self._send("PUT", way, Key, headers=sent, body=Body)
            if _is_put(response):
                return
            if response.status_code not in _LOST:
                self._ways_to_put.pop(Bucket, None)  # until boto3 succeeds again
            # Up to 400 it may be a redirect, also to another region, after which boto3 sends the body anew.
            if response.status_code > HTTPStatus.BAD_REQUEST:
                raise _refusal(response)
        self._shown.key, self._shown.way = Key, None
        by_boto3: Callable[..., object] = self._client.put_object
        by_boto3(Bucket=Bucket, Key=Key, Body=bytes(Body), Metadata=Metadata, **headers)  # it takes no view
        if self._shown.way is not None:
            self._ways_to_put[Bucket] = self._shown.way

    def _read(
        self, method: Literal["GET", "HEAD"], by_boto3: Callable[..., Mapping[str, Any]], bucket: str, key: str
    ) -> Mapping[str, Any]:
        way = self._ways.get(bucket)
        if way is not None:
            answer = _understood(method, self._send(method, way, key))
            if answer is not None:
                return answer
            # Until boto3 succeeds again: a server that fails is not asked twice each time.
            self._ways.pop(bucket, None)
        self._shown.key, self._shown.way = key, None
        try:
            found = by_boto3(Bucket=bucket, Key=key)
        except ClientError as exc:
            if exc.response["Error"].get("Code") == _NO_SUCH_KEY:  # an answer as good: a new bucket has no other
                self._learn_to_read(bucket)
            raise
        self._learn_to_read(bucket)
        return found

    def _learn_to_read(self, bucket: str) -> None:
        if self._shown.way is not None:
            self._ways[bucket] = self._shown.way

    def _watch(
        self, *, request: Any, signature_version: object, signing_name: str, region_name: str, **_: object
    ) -> None:
        """Called by boto3 before it signs, in the thread that asks; after a redirect, again."""
        self._shown.way = None
        if self._credentials is None or self._http is None:
            return
        signing = request.context.get("signing", {})  # for this bucket; the arguments are the client's
        is_plain = (signature_version, signing.get("signing_name", signing_name)) == (_SIGNATURE, _SERVICE)
        key = _quoted(self._shown.key)
        if is_plain and request.url.endswith(f"/{key}"):
            region = signing.get("region", region_name)
            # A signer that is not told the host takes the URL apart for it, twice.
            host = S3SigV4Auth(self._credentials, _SERVICE, region).headers_to_sign(request)["host"]
            headers = {"Host": host}
            if _EXPECT in request.headers:
                headers[_EXPECT] = request.headers[_EXPECT]
            self._shown.way = _Way(request.url.removesuffix(key), region, headers, self._credentials)

    def _watch_sending(self, *, request: Any, **_: object) -> None:
        """Called by boto3 before it sends. Its user agent tells of all it has used by then, and is not signed."""
        if (way := self._shown.way) is not None:
            agent = request.headers["User-Agent"].decode()
            self._shown.way = replace(way, headers={**way.headers, "User-Agent": agent})

    def _send(
        self, method: _Method, way: _Way, key: str, *, headers: Mapping[str, str] | None = None, body: ImageBytes = b""
    ) -> AWSResponse:
        every = {**way.headers, **(headers or {})}
        if len(body) < SENT_UNASKED_BYTES:
            every.pop(_EXPECT, None)
        request = _Unsigned(method, url := f"{way.before_key}{_quoted(key)}", every)
        request.body = body
        request.context["client_config"] = self._client.meta.config  # says whether bodies are signed, empty ones too
        S3SigV4Auth(way.credentials.get_frozen_credentials(), _SERVICE, way.region).add_auth(request)
        # boto3's connections know an Expect by its bytes.
        signed: Any = {name: value.encode() for name, value in request.headers.items()}
        if method == "PUT":
            signed["Content-Length"] = str(len(body)).encode()
        to_send: Any = body or None  # a view is sent as it is
        prepared = AWSPreparedRequest(method, url, signed, to_send, stream_output=method == "GET")
        response: AWSResponse = self._http.send(prepared)
        return response


def _quoted(key: str) -> str:
    """As boto3 has it in a URL."""
    return quote(key, safe="/~")


def _understood(method: str, response: AWSResponse) -> dict[str, Any] | None:
    """The object; None if the answer is one for boto3 to understand.

    Raises:
        ClientError: there is no such object.
        BotoCoreError: the connection failed before that was said.
    """
    headers = response.headers
    etag = headers.get("ETag")
    length: Any = headers.get("Content-Length")  # botocore too leaves it a string
    body = StreamingBody(response.raw, length)
    if response.status_code == HTTPStatus.OK and etag is not None and length is not None and length.isdecimal():
        metadata = {
            name.lower().removeprefix(_METADATA): headers[name]
            for name in headers
            if name.lower().startswith(_METADATA)
        }
        told = {"ETag": etag, "Metadata": metadata, "ContentLength": int(length)}
        return told if method == "HEAD" else {**told, "Body": body}
    with closing(body):
        if response.status_code == HTTPStatus.NOT_FOUND:
            # To a HEAD, S3 says no more than that, whether it is the object or the bucket that is missing.
            if method == "HEAD":
                raise ClientError({"Error": {"Code": "404"}}, "HeadObject")
            if _ABSENT in body.read(_MAX_ERROR_BYTES):
                raise ClientError({"Error": {"Code": _NO_SUCH_KEY}}, "GetObject")
    return None


def _is_put(response: AWSResponse) -> bool:
    """Whether S3 has the object. It may say that it has failed in the body of a success."""
    return response.status_code == HTTPStatus.OK and not response.content


def _refusal(response: AWSResponse) -> ClientError:
    """What boto3 would raise at this answer to a put."""
    answer = {"status_code": response.status_code, "headers": response.headers, "body": response.content, "context": {}}
    parser: Any = RestXMLParser()
    return ClientError(parser.parse(answer, None), "PutObject")
