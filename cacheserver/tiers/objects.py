"""Objects of other buckets that an import may name: read whole, bounded, and never written."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from cacheserver.errors import InvalidRequestError, TierTimeoutError
from cacheserver.interfaces import Clock
from cacheserver.model import SourceObject
from cacheserver.tiers.s3_client import (
    UNREADABLE,
    is_absent,
    new_client,
    new_session,
    read_body,
    tier_error,
    unreadable,
)
from cacheserver.tiers.workers import Workers

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_URI = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(.{1,1024})", re.DOTALL)
_CONNECT_TIMEOUT_S = 2.0
_SILENCE_S = 10.0
_CLOSE_S = 10.0
_FIELD = "s3_uri"


class Objects:
    """The objects of the buckets an operator has opened to imports, in the store and by the credentials of the S3 tier.

    Args:
        buckets: those that may be read; no other is even asked for.
        clock: times reading a body.
        region: of the buckets; None leaves it to boto3's own settings.
        endpoint: `https://…` of an S3-compatible server; None is Amazon's.
        access_key: with `secret_key`, credentials; None leaves them to boto3's own ways of finding them.
        secret_key: see `access_key`.
        read_timeout_s: how long reading an object may take in all.
        threads: most reads at a time; more wait.
    """

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        buckets: Sequence[str],
        *,
        clock: Clock,
        region: str | None = None,
        endpoint: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        read_timeout_s: float = 30.0,
        threads: int = 8,
    ) -> None:
        self._buckets = frozenset(buckets)
        self._clock = clock
        self._region = region
        self._endpoint = endpoint
        self._access_key = access_key
        self._secret_key = secret_key
        self._read_timeout_s = read_timeout_s
        self._threads = threads
        self._workers = Workers(threads=threads, name="objects")
        self._lock = threading.Lock()
        self._made_client: S3Client | None = None

    async def read(self, uri: str, *, max_bytes: int) -> SourceObject:
        """The object that `uri` ("s3://bucket/name") names.

        Raises:
            InvalidRequestError: its bucket is none of ours, there is no such object, or it is larger than `max_bytes`.
            TierError: it cannot be read now.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise InvalidRequestError({_FIELD: "must be s3://bucket/name"})
        bucket, name = match.groups()
        if bucket not in self._buckets:
            raise InvalidRequestError(
                {_FIELD: "its bucket is none of imports.buckets: add it there, or send the bytes"}
            )
        try:
            return await self._workers.run(self._read, bucket, name, max_bytes)
        except (BotoCoreError, ClientError) as exc:
            raise tier_error("import", exc, setting="imports.buckets", rights="s3:GetObject") from exc
        except UNREADABLE as exc:
            raise unreadable(exc) from exc

    async def aclose(self) -> None:
        """Let go of connections and threads. Nothing else may be called afterwards."""
        await self._workers.aclose(_CLOSE_S)
        if self._made_client is not None:
            self._made_client.close()

    # What follows runs in threads.

    def _read(self, bucket: str, name: str, max_bytes: int) -> SourceObject:
        deadline_s = self._clock.monotonic_s() + self._read_timeout_s

        def check() -> None:
            if self._clock.monotonic_s() > deadline_s:
                raise TierTimeoutError(f"S3 did not send the object within {self._read_timeout_s:g} s")

        try:
            answer = self._client.get_object(Bucket=bucket, Key=name)
        except ClientError as exc:
            if is_absent(exc):
                raise InvalidRequestError({_FIELD: "there is no such object"}) from exc
            raise
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] > max_bytes:
                raise InvalidRequestError({_FIELD: f"the object is larger than {max_bytes} bytes"})
            data = read_body(body, answer["ContentLength"], check)
            return SourceObject(bucket, name, answer["ETag"], data)

    @property
    def _client(self) -> S3Client:
        """Made on first use, in a thread: it takes boto3 a while, and a look for credentials."""
        with self._lock:
            if self._made_client is None:
                session = new_session(self._access_key, self._secret_key)
                self._made_client = new_client(
                    session,
                    endpoint=self._endpoint,
                    region=self._region,
                    connect_timeout_s=_CONNECT_TIMEOUT_S,
                    timeout_s=_SILENCE_S,
                    connections=self._threads,
                )
            return self._made_client
