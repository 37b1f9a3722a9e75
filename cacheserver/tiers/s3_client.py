"""How object storage is spoken to: clients that try once, and what their errors mean."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
)
from botocore.loaders import Loader
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp

from cacheserver.errors import TierError, TierTimeoutError

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

_SERVICE: Literal["s3"] = "s3"
_RIGHTS = "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket"
_ABSENT = {"NoSuchKey", "404"}

UNREADABLE = (ResponseParserError, ValueError, KeyError)
"""What is raised at an answer that lacks what S3 would say, or says it as S3 would not."""


def new_client(  # noqa: PLR0913 - settings
    session: boto3.Session,
    *,
    endpoint: str | None,
    region: str | None,
    connect_timeout_s: float,
    timeout_s: float,
    connections: int,
) -> S3Client:
    """A client that tries once, and waits `timeout_s` for each byte; for S3 itself, or a server that speaks like it."""
    config = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=timeout_s,
        # Another tier or the next request is a better second attempt.
        retries={"total_max_attempts": 1},
        max_pool_connections=connections,
        signature_version="s3v4",
        # We give S3 a CRC32 to check and check an xxh3 ourselves; boto3's own checksums would come on top.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={
            # Other servers seldom have a host name per bucket.
            "addressing_style": "auto" if endpoint is None else "path",
            # TLS and the CRC32 in a signed header protect the body; without TLS it is signed whole.
            "payload_signing_enabled": endpoint is not None and endpoint.startswith("http:"),
        },
    )
    return session.client(_SERVICE, endpoint_url=endpoint, region_name=region, config=config)


def new_session(access_key: str | None, secret_key: str | None) -> boto3.Session:
    """A session whose clients read dates fast: with boto3's own way, they take most of the time that a listing costs.

    And a tenth of a picture's, whose headers tell when it was stored.
    """
    core = botocore.session.get_session()
    core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
    core.register_component("data_loader", _descriptions())
    return boto3.Session(aws_access_key_id=access_key, aws_secret_access_key=secret_key, botocore_session=core)


class _Descriptions(Loader):
    """botocore's descriptions of S3. Its own loader looks through those of all 400 services for the one it is asked."""

    def list_available_services(self, type_name: str) -> list[str]:  # noqa: ARG002 - botocore's signature
        """What there is."""
        return [_SERVICE]


@cache
def _descriptions() -> Loader:
    """One for all sessions: to read them takes a tenth of a second."""
    return _Descriptions()


def _time(value: Any) -> datetime:
    for read in (datetime.fromisoformat, parsedate_to_datetime):  # as listings have it, and headers
        with suppress(ValueError):
            return read(str(value))
    return parse_timestamp(value)  # in one of the other forms that AWS knows


class _Watched:
    """A socket that asks before each time it reads."""

    def __init__(self, watched: Any, check: Callable[[], None]) -> None:
        self._watched = watched
        self._check = check

    def recv_into(self, buffer: memoryview) -> int:
        """What a body is read by."""
        self._check()
        count: int = self._watched.recv_into(buffer)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)


def read_body(body: StreamingBody, size_bytes: int, check: Callable[[], None]) -> bytes:
    """A body of so many bytes, in one go and copied nowhere. `check` is called whenever more is read, and may raise.

    A socket's timeout begins anew with each byte: a server that sends one now and then would keep a thread for days.

    Raises:
        TierError: it is shorter.
        BotoCoreError: it could not be read.
    """
    response = getattr(body._raw_stream, "_fp", None)  # type: ignore[attr-defined]  # noqa: SLF001 - as botocore's own set_socket_timeout
    if getattr(response, "fp", None) is not None:
        stream = response.fp.raw  # type: ignore[union-attr]
        stream._sock = _Watched(stream._sock, check)  # noqa: SLF001 - see above
    data = body.read(size_bytes)
    if len(data) != size_bytes:
        raise TierError("S3 did not send the whole object")
    return data


def code_of(exc: ClientError) -> str:
    """What the server calls it."""
    return str(exc.response.get("Error", {}).get("Code", ""))


def is_absent(exc: ClientError) -> bool:
    """Whether there is no such object."""
    # A missing bucket says NoSuchBucket to a GET, which is not absence; to a HEAD it can only say 404.
    return code_of(exc) in _ABSENT


def tier_error(
    op: str, exc: BotoCoreError | ClientError, *, setting: str = "s3.bucket", rights: str = _RIGHTS
) -> TierError:
    """What `exc` means for a tier. boto3's messages quote URLs, which hold keys, so they stay out of ours.

    `setting` names the bucket, and `rights` are those that it takes.
    """
    if isinstance(exc, ReadTimeoutError | ConnectTimeoutError):
        return TierTimeoutError(f"S3 did not answer {op} in time")
    if isinstance(exc, NoCredentialsError | PartialCredentialsError):
        return TierError(f"no credentials for S3 {op}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile")
    if isinstance(exc, BotoCoreError):
        return TierError(f"S3 cannot be reached for {op}: {type(exc).__name__}")
    status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code_of(exc) == "NoSuchBucket":
        return TierError(f"S3 has no such bucket; see {setting} (at {op}: {status} NoSuchBucket)")
    if status == 403:  # noqa: PLR2004 - forbidden
        return TierError(
            f"S3 refuses {op} ({status} {code_of(exc)}): see the credentials, and that they allow {rights} on {setting}"
        )
    return TierError(f"S3 failed at {op}: {status} {code_of(exc)}")


def unreadable(exc: Exception) -> TierError:
    """What one of UNREADABLE means for a tier."""
    return TierError(f"what answers at the address of S3 does not answer as S3 does: {type(exc).__name__}")
