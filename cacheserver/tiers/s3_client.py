"""How object storage is spoken to: clients that try once, and what their errors mean."""

from __future__ import annotations

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
from botocore.utils import parse_timestamp

from cacheserver.errors import TierError, TierTimeoutError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SERVICE: Literal["s3"] = "s3"
_RIGHTS = "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket"
_ABSENT = {"NoSuchKey", "404"}


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
