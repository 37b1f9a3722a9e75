"""Reads of objects for half of boto3's CPU: signed and sent by botocore's own parts, once boto3 has shown how."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, AWSResponse
from botocore.exceptions import ClientError
from botocore.response import StreamingBody

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client

_SIGNATURE = "s3v4"
_SERVICE = "s3"
_METADATA = "x-amz-meta-"
_ABSENT = b"<Code>NoSuchKey</Code>"
_MAX_ERROR_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Way:
    """How boto3 asks for the objects of a bucket."""

    before_key: str
    """An object's URL up to its key."""
    region: str
    headers: Mapping[str, str]
    credentials: Credentials


class _Unsigned(AWSRequest):
    """A request for an object, as the signer takes it."""

    body = ""  # botocore's own prepares the whole request to tell what its body is


class _Shown(threading.local):
    """What a thread has boto3 read, and how boto3 asked for it; None if we could not ask like that."""

    key = ""
    way: _Way | None = None


class S3Reads:
    """`get_object` and `head_object` of a client, from several threads at a time.

    The first read of a bucket is boto3's; those that follow are made in the same way. Of the answers we know an object
    and its absence. After any other (a redirect, a failure, missing rights) boto3 asks again: it knows what to do, or
    what to say. Where boto3 asks as we cannot (with another signature, or no credentials) every read is its own.

    Args:
        client: makes the reads that are boto3's; all use its connections, which close with it.
        credentials: the client's; None if it has none.
    """

    def __init__(self, client: S3Client, credentials: Credentials | None) -> None:
        self._client = client
        self._credentials = credentials
        # Not public. A session of our own would have other connections, and other settings for TLS and proxies.
        self._http: Any = getattr(getattr(client, "_endpoint", None), "http_session", None)
        self._ways: dict[str, _Way] = {}
        self._shown = _Shown()
        for operation in ("GetObject", "HeadObject"):
            client.meta.events.register(f"before-sign.s3.{operation}", self._watch)

    def get_object(self, *, Bucket: str, Key: str) -> Mapping[str, Any]:  # noqa: N803 - boto3's names
        """As boto3's: ETag, Metadata (names in lower case), ContentLength, and Body, which has to be closed."""
        return self._read("GET", self._client.get_object, Bucket, Key)

    def head_object(self, *, Bucket: str, Key: str) -> Mapping[str, Any]:  # noqa: N803 - boto3's names
        """As boto3's: ETag, Metadata (names in lower case) and ContentLength."""
        return self._read("HEAD", self._client.head_object, Bucket, Key)

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
        found = by_boto3(Bucket=bucket, Key=key)
        if self._shown.way is not None:
            self._ways[bucket] = self._shown.way
        return found

    def _watch(
        self, *, request: Any, signature_version: object, signing_name: str, region_name: str, **_: object
    ) -> None:
        """Called by boto3 before it signs, in the thread that reads; after a redirect, again."""
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
            headers = {"User-Agent": request.headers["User-Agent"], "Host": host}
            self._shown.way = _Way(request.url.removesuffix(key), region, headers, self._credentials)

    def _send(self, method: str, way: _Way, key: str) -> AWSResponse:
        request = _Unsigned(method, url := f"{way.before_key}{_quoted(key)}", way.headers)
        request.context["client_config"] = self._client.meta.config  # says whether bodies are signed, empty ones too
        S3SigV4Auth(way.credentials.get_frozen_credentials(), _SERVICE, way.region).add_auth(request)
        headers: Any = dict(request.headers.items())  # any mapping does
        prepared = AWSPreparedRequest(method, url, headers, None, stream_output=method == "GET")
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
                raise ClientError({"Error": {"Code": "NoSuchKey"}}, "GetObject")
    return None
