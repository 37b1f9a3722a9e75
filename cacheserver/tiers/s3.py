"""L3: entries in object storage, each the plain image, so that a signed URL shows the picture."""

from __future__ import annotations

import base64
import functools
import re
import threading
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from botocore.exceptions import BotoCoreError, ClientError, ConnectionClosedError
from xxhash import xxh3_128_hexdigest

from cacheserver.epochs import Epochs
from cacheserver.errors import CorruptEntryError, EntryTooLargeError, TierError, TierTimeoutError
from cacheserver.interfaces import Clock, no_step
from cacheserver.model import KEY_VERSION, CachedImage, CacheKey, Head, Labels, SourceObject, TierName, Touch, Touched
from cacheserver.tiers import codec
from cacheserver.tiers.presence import Page, Presence
from cacheserver.tiers.s3_client import (
    UNREADABLE,
    code_of,
    is_absent,
    new_client,
    new_session,
    read_body,
    tier_error,
    unreadable,
)
from cacheserver.tiers.s3_lifecycle import with_ours
from cacheserver.tiers.s3_requests import S3Requests
from cacheserver.tiers.workers import Workers

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

_CACHE_CONTROL = "private, max-age=31536000, immutable"
_MAX_INLINE_METADATA = 1_900
"""Of the 2,048 bytes that S3 allows for user metadata, what the other headers leave."""

_PUT_ATTEMPTS = 4
_CONFLICT_ATTEMPTS = 3
_CLOSE_S = 10.0
_LEAST_SIZE = "TransitionDefaultMinimumObjectSize"


@dataclass(frozen=True, slots=True)
class _Clients:
    """boto3 clients, one per kind of patience: a write may take longer than a read is worth."""

    reading: S3Client
    reads: S3Requests
    """Of objects, over the connections of `reading`."""
    writing: S3Client
    writes: S3Requests
    """Of pictures, over the connections of `writing`."""
    signing: S3Client


@dataclass(frozen=True, slots=True)
class _Stored:
    """An object as it came: its version, its own headers, its length, and its bytes if they were read."""

    etag: str
    headers: Mapping[str, str]
    size_bytes: int
    data: bytes | None = None


class S3Tier:
    """An object per entry; the metadata travels in its headers. A `SigningTier` and a `CopyingTier`.

        <prefix>v1/<partition>/<first two hex digits of the fingerprint>/<key>
        <the same>.meta.<xxh3-128>     metadata too long for headers, written before the object that names it

    Writes are conditional on what was read, so that of two writers one wins and the other hears of it. boto3
    blocks; its calls run in threads of this tier's own. Needs s3:GetObject, s3:PutObject, s3:DeleteObject and
    s3:ListBucket (without the last S3 says 403 for what is absent).

    Args:
        bucket: its name.
        clock: decides what is fresh, and times reading a body.
        prefix: begins every object's name.
        region: of the bucket; None leaves it to boto3's own settings.
        endpoint: `https://…` of an S3-compatible server; None is Amazon's.
        public_endpoint: the endpoint in signed URLs, where callers know it by another name.
        access_key: with `secret_key`, credentials; None leaves them to boto3's own ways of finding them.
        secret_key: see `access_key`.
        connect_timeout_s: how long connecting may take.
        read_timeout_s: how long a read may go without a byte, and at most in all.
        write_timeout_s: how long a write may go without a byte.
        max_entry_bytes: a larger image is refused with EntryTooLargeError; a larger object is not read.
        threads: most calls at a time; more wait.
        epochs: say what was purged.
        write_version: the codec version that entries are written in.

    Raises:
        ValueError: an endpoint is not a URL.
    """

    name = TierName.S3

    def __init__(  # noqa: PLR0913 - settings, each with its default
        self,
        *,
        bucket: str,
        clock: Clock,
        prefix: str = "",
        region: str | None = None,
        endpoint: str | None = None,
        public_endpoint: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        connect_timeout_s: float = 1.0,
        read_timeout_s: float = 2.0,
        write_timeout_s: float = 30.0,
        max_entry_bytes: int = 64 * 1024 * 1024,
        threads: int = 16,
        epochs: Epochs | None = None,
        write_version: int = codec.WRITE_VERSION,
    ) -> None:
        self._write_version = write_version
        self._epochs = epochs or Epochs()
        for address in (endpoint, public_endpoint):
            if address is not None and not re.fullmatch(r"https?://[^/\s]+/?", address):
                raise ValueError("an S3 endpoint is http://host:port or https://host:port, without a path")
        self._bucket = bucket
        self._clock = clock
        self._prefix = prefix
        self._region = region
        self._endpoint = endpoint
        self._public_endpoint = public_endpoint
        self._access_key = access_key
        self._secret_key = secret_key
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._write_timeout_s = write_timeout_s
        self._max_entry_bytes = max_entry_bytes
        self._threads = threads
        self._workers = Workers(threads=threads, name="s3")
        self._lock = threading.Lock()
        self._made_clients: _Clients | None = None

    async def get(self, key: CacheKey, *, stale_s: float = 0.0) -> CachedImage | None:
        """See `Tier.get`."""
        return await self._run("get", self._get, key, stale_s)

    async def find(self, keys: Sequence[CacheKey], *, on_step: Callable[[], None] = no_step) -> list[bool]:
        """See `Tier.find`."""
        names, by_folder = await self._run("find", self._names, keys)
        present: set[str] = set()
        for folder, wanted in by_folder.items():
            present |= await self._presence(folder, on_step).find(wanted)
        return [name in present for name in names]

    def _presence(self, folder: str, on_step: Callable[[], None]) -> Presence:
        async def page(after: str) -> Page:
            return await self._run("find", self._page, folder, after)

        async def heads(names: Sequence[str]) -> list[bool]:
            return await self._run("find", self._heads, names)

        return Presence(page=page, heads=heads, on_step=on_step)

    async def put(self, key: CacheKey, entry: CachedImage, *, replace: bool) -> bool:
        """See `Tier.put`."""
        return await self._run("put", self._put, key, entry, replace=replace)

    async def copy(self, key: CacheKey, entry: CachedImage, source: SourceObject) -> bool:
        """See `CopyingTier.copy`."""
        return await self._run("copy", self._put, key, entry, replace=False, source=source)

    async def move(self, slot: CacheKey, key: CacheKey, entry: CachedImage) -> bool:  # noqa: ARG002 - the contract's
        """See `Tier.move`."""
        await self.delete(slot)
        return False

    async def touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        """See `Tier.touch`."""
        # Of most there is nothing to tell: no request is made, nor a thread asked.
        return await self._run("touch", self._touch, key, entry) if entry.sliding_s else Touched(Touch.CURRENT)

    async def delete(self, key: CacheKey) -> bool:
        """See `Tier.delete`."""
        return await self._run("delete", self._delete, key)

    async def reclaim(self, key: CacheKey) -> bool:
        """See `Tier.reclaim`."""
        return await self._run("delete", self._reclaim, key)

    async def scan(self, partition: str) -> AsyncIterator[CacheKey]:
        """See `Tier.scan`."""
        async for names in self._pages("scan", self._folder(partition)):
            for key in _keys(names):
                yield key

    async def page(self, partition: str, *, after: CacheKey | None, limit: int) -> list[CacheKey]:
        """See `Tier.page`."""
        found: list[CacheKey] = []
        begin = {} if after is None else {"StartAfter": self._object(after)}
        async with aclosing(self._pages("page", self._folder(partition), **begin)) as pages:
            async for names in pages:
                found += _keys(names)
                if len(found) >= limit:
                    break
        return found[:limit]

    async def renditions(self, key: CacheKey) -> list[CacheKey]:
        """See `Tier.renditions`."""
        start = self._object(key).removesuffix(key.name) + f"{key.fingerprint_name}."
        pages = [names async for names in self._pages("renditions", start)]
        return [found for names in pages for found in _keys(names) if found.is_rendition]

    async def head(self, key: CacheKey) -> Head | None:
        """See `Tier.head`."""
        metadata = await self._run("head", self._metadata_of, key)
        return None if metadata is None else metadata.head

    async def labels(self, key: CacheKey) -> Labels | None:
        """See `Tier.labels`."""
        metadata = await self._run("labels", self._metadata_of, key)
        return None if metadata is None else metadata.labels

    async def signed_url(self, entry: CachedImage, expires_s: int) -> str:
        """See `SigningTier.signed_url`. S3 honours a URL for at most seven days."""
        return await self._run("signed_url", self._signed_url, entry, expires_s)

    async def files(self, start: str) -> list[str]:
        """See `Files.files`."""
        pages = [names async for names in self._pages("list", self._prefix + start)]
        return [name.removeprefix(self._prefix) for names in pages for name in names]

    async def read_file(self, name: str, max_bytes: int) -> bytes | None:
        """See `Files.read_file`."""
        stored = await self._run("read", self._read, self._prefix + name, max_bytes)
        if stored is not None and stored.data is None:
            raise CorruptEntryError(f"the object has {stored.size_bytes} bytes, more than it can")
        return None if stored is None else stored.data

    async def write_file(self, name: str, data: bytes) -> None:
        """See `Files.write_file`."""
        await self._run("write", self._write_file, self._prefix + name, data)

    async def delete_file(self, name: str) -> None:
        """See `Files.delete_file`."""
        await self._run("delete", self._delete_file, self._prefix + name)

    async def expire_after(self, days: int) -> None:
        """Have the bucket remove entries so many days after they were written, its other rules left as they are.

        Needs s3:GetLifecycleConfiguration and s3:PutLifecycleConfiguration. Raises TierError.
        """
        await self._run("lifecycle", self._expire_after, days)

    async def ping(self) -> None:
        """See `Tier.ping`. The error says which permission is missing, as far as S3 does."""
        await self._run("ping", self._probe)

    async def aclose(self) -> None:
        """See `Tier.aclose`."""
        await self._workers.aclose(_CLOSE_S)
        if (clients := self._made_clients) is not None:
            for client in (clients.reading, clients.writing, clients.signing):
                client.close()

    async def _pages(self, op: str, start: str, **begin: str) -> AsyncGenerator[list[str]]:
        """The names that begin with `start`, as many at a time as S3 tells."""
        names, token = await self._run(op, self._list, start, **begin)
        yield names
        while token is not None:
            names, token = await self._run(op, self._list, start, ContinuationToken=token)
            yield names

    async def _run(self, op: str, call: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        try:
            return await self._workers.run(call, *args, **kwargs)
        except (BotoCoreError, ClientError) as exc:
            raise tier_error(op, exc) from exc

    # What follows runs in threads.

    def _get(self, key: CacheKey, stale_s: float) -> CachedImage | None:
        name = self._object(key)
        stored = self._read(name, self._max_entry_bytes)
        return None if stored is None else self._servable(key, name, stored, stale_s)

    def _servable(self, key: CacheKey, name: str, stored: _Stored, stale_s: float = 0.0) -> CachedImage | None:
        version, packed = self._packed(name, stored.headers)
        if stored.data is None:
            raise CorruptEntryError(f"the object has {stored.size_bytes} bytes, more than an entry can")
        entry = codec.unpack_entry(packed, stored.data, version)
        return entry if codec.answers(entry, key, self._clock.now_s(), self._epochs, stale_s=stale_s) else None

    def _names(self, keys: Sequence[CacheKey]) -> tuple[list[str], dict[str, list[str]]]:
        """The name of each key's object, and for each partition's folder those in it, each once and in order."""
        names = [self._object(key) for key in keys]
        by_folder: dict[str, set[str]] = {}
        for key, name in zip(keys, names, strict=True):
            by_folder.setdefault(self._folder(key.partition), set()).add(name)
        return names, {folder: sorted(within) for folder, within in by_folder.items()}

    def _heads(self, names: Sequence[str]) -> list[bool]:
        return [self._head(name) is not None for name in names]

    def _page(self, folder: str, after: str) -> Page:
        names, token = self._list(folder, StartAfter=after)
        return Page(names, is_last=token is None)

    def _list(self, start: str, **begin: str) -> tuple[list[str], str | None]:
        """A page of the names that begin with `start`, and what continues it; None if nothing does."""
        page = self._ask(self._clients.reading.list_objects_v2, Prefix=start, **begin)
        return [item["Key"] for item in page.get("Contents", [])], page.get("NextContinuationToken")

    def _put(self, key: CacheKey, entry: CachedImage, *, replace: bool, source: SourceObject | None = None) -> bool:
        if entry.size_bytes > self._max_entry_bytes:
            raise EntryTooLargeError(f"the image has {entry.size_bytes} bytes; S3 takes {self._max_entry_bytes}")
        name = self._object(key)
        headers, sidecar = _headers(entry, self._write_version)
        if sidecar is not None:
            self._ask(self._clients.writing.put_object, Key=_sidecar(name, headers), Body=sidecar)
        if source is not None and self._is_copied(name, entry, headers, source):
            return True
        seen = self._head(name) if replace else None
        if seen is not None and self._is_later(name, seen, entry):
            return False
        for _ in range(_PUT_ATTEMPTS):
            if self._write(name, entry, headers, seen):
                self._drop_sidecar(name, seen.headers if seen else {}, unless=headers)
                return True
            seen = self._read(name, self._max_entry_bytes)
            holder = self._holder(key, name, seen)
            if holder is not None or replace:
                self._drop_sidecar(name, headers, unless=seen.headers if seen else {})
                # Equal bytes may be our own: an answer that was lost on the way.
                return holder is not None and holder.image.sha256 == entry.image.sha256
        raise TierError("the object in S3 changed each time it was to be replaced")

    def _write(self, name: str, entry: CachedImage, headers: dict[str, str], seen: _Stored | None) -> bool:
        """Write the object if what lies there is still what was seen; whether it was."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if seen is None else {"IfMatch": seen.etag}
        checksum = base64.b64encode(zlib.crc32(entry.image.data).to_bytes(4, "big")).decode()
        for _ in range(_CONFLICT_ATTEMPTS):
            try:
                self._ask(
                    self._clients.writes.put_object,
                    Key=name,
                    Body=entry.image.data,
                    ContentType=entry.image.content_type,
                    CacheControl=_CACHE_CONTROL,
                    ChecksumCRC32=checksum,
                    Metadata=headers,
                    **condition,
                )
            except ClientError as exc:
                if code_of(exc) in _CHANGED or is_absent(exc):
                    return False
                if code_of(exc) != "ConditionalRequestConflict":
                    raise
            else:
                return True
        raise TierError("other writers of the same object keep S3 from deciding")

    def _touch(self, key: CacheKey, entry: CachedImage) -> Touched:
        """Write the object anew with its new end: no copy onto itself, which not every server makes conditional."""
        name = self._object(key)
        seen = self._head(name)
        if seen is None or not _is_of(entry, seen):
            return Touched(Touch.GONE)
        if not entry.outlasts(self._metadata_in(name, seen.headers).head.bare):
            return Touched(Touch.CURRENT)
        headers, sidecar = _headers(entry, self._write_version)
        if sidecar is not None:
            self._ask(self._clients.writing.put_object, Key=_sidecar(name, headers), Body=sidecar)
        is_written = self._write(name, entry, headers, seen)
        there = self._head(name) if sidecar is not None and not is_written else None
        obsolete, kept = (seen.headers, headers) if is_written else (headers, there.headers if there else {})
        self._drop_sidecar(name, obsolete, unless=kept)
        return Touched(Touch.MOVED if is_written else Touch.GONE)

    def _is_copied(self, name: str, entry: CachedImage, headers: dict[str, str], source: SourceObject) -> bool:
        """Copy the object if it is still what was read and nothing lies where it goes; False: it has to be sent.

        Not every server can, nor may every user; whatever keeps it from happening shows again when it is sent.
        """
        try:
            self._ask(
                self._clients.writing.copy_object,
                Key=name,
                CopySource={"Bucket": source.bucket, "Key": source.name},
                CopySourceIfMatch=source.etag,
                IfNoneMatch="*",
                MetadataDirective="REPLACE",
                ContentType=entry.image.content_type,
                CacheControl=_CACHE_CONTROL,
                Metadata=headers,
            )
        except ClientError:
            return False
        return True

    def _is_later(self, name: str, stored: _Stored, entry: CachedImage) -> bool:
        """Whether what is stored took this place after `entry` was to: of a writer that comes late."""
        try:
            return self._metadata_in(name, stored.headers).labels.epoch > entry.epoch
        except CorruptEntryError:
            return False

    def _holder(self, key: CacheKey, name: str, stored: _Stored | None) -> CachedImage | None:
        try:
            return None if stored is None else self._servable(key, name, stored)
        except CorruptEntryError:
            return None

    def _write_file(self, name: str, data: bytes) -> None:
        self._ask(self._clients.writing.put_object, Key=name, Body=data)

    def _delete_file(self, name: str) -> None:
        self._ask(self._clients.writing.delete_object, Key=name)

    def _delete(self, key: CacheKey) -> bool:
        name = self._object(key)
        stored = self._head(name)
        if stored is None:
            return False
        self._ask(self._clients.writing.delete_object, Key=name)
        self._drop_sidecar(name, stored.headers, unless={})
        return True

    def _reclaim(self, key: CacheKey) -> bool:
        name = self._object(key)
        stored = self._head(name)
        if stored is None:
            return False
        try:
            labels = self._metadata_in(name, stored.headers).labels
        except CorruptEntryError:
            labels = None
        if labels is not None and not self._epochs.is_purged(key, labels):
            return False
        try:
            self._ask(self._clients.writing.delete_object, Key=name, IfMatch=stored.etag)
        except ClientError as exc:
            if code_of(exc) in _CHANGED:
                return False
            raise
        self._drop_sidecar(name, stored.headers, unless={})
        return True

    def _drop_sidecar(self, name: str, headers: Mapping[str, str], *, unless: Mapping[str, str]) -> None:
        """Delete the sidecar that `headers` speak of, unless others speak of it too."""
        if "sidecar" in headers and headers["sidecar"] != unless.get("sidecar"):
            self._ask(self._clients.writing.delete_object, Key=_sidecar(name, headers))

    def _metadata_of(self, key: CacheKey) -> codec.Metadata | None:
        name = self._object(key)
        stored = self._head(name)
        try:
            return None if stored is None else self._metadata_in(name, stored.headers)
        except CorruptEntryError:
            return None

    def _signed_url(self, entry: CachedImage, expires_s: int) -> str:
        name = self._object(entry.key)
        stored = self._head(name)
        if not (_is_of(entry, stored) or self._put(entry.key, entry, replace=False)):
            raise TierError("another picture lies in S3 where this one should, so its URL cannot be signed")
        return self._clients.signing.generate_presigned_url(
            "get_object",
            Params={"Bucket": self._bucket, "Key": name, "ResponseContentType": entry.image.content_type},
            ExpiresIn=expires_s,
        )

    def _probe(self) -> None:
        # With a read's patience: whoever probes waits no longer, and a thread that did would be missed by reads.
        self._ask(self._clients.reading.put_object, Key=f"{self._prefix}ping", Body=b"")
        # Whoever may not list is told 403 here, and would be on every miss.
        self._read(f"{self._prefix}ping.absent", 0)

    def _expire_after(self, days: int) -> None:
        client = self._clients.writing
        try:
            answer: Mapping[str, Any] = self._ask(client.get_bucket_lifecycle_configuration)
        except ClientError as exc:
            if code_of(exc) != "NoSuchLifecycleConfiguration":
                raise
            answer = {}
        rules = with_ours(answer.get("Rules", ()), prefix=f"{self._prefix}{KEY_VERSION}/", days=days)
        if rules is not None:
            # What else the bucket's rules have in common is told again, or S3 would take its own default.
            common = {name: answer[name] for name in (_LEAST_SIZE,) if name in answer}
            self._ask(client.put_bucket_lifecycle_configuration, LifecycleConfiguration={"Rules": rules}, **common)

    def _head(self, name: str) -> _Stored | None:
        try:
            answer = self._ask(self._clients.reads.head_object, Key=name)
        except ClientError as exc:
            if is_absent(exc):
                return None
            raise
        return _stored(answer)

    def _read(self, name: str, max_bytes: int) -> _Stored | None:
        """The object; its bytes only if they are at most `max_bytes`."""
        deadline_s = self._clock.monotonic_s() + self._read_timeout_s

        def check() -> None:
            if self._clock.monotonic_s() > deadline_s:
                raise TierTimeoutError(f"S3 did not send the object within {self._read_timeout_s:g} s")

        try:
            answer = self._ask(self._clients.reads.get_object, Key=name)
        except ClientError as exc:
            if is_absent(exc):
                return None
            raise
        with closing(answer["Body"]) as body:
            stored = _stored(answer)
            if stored.size_bytes > max_bytes:
                return stored
            return replace(stored, data=read_body(body, stored.size_bytes, check))

    def _metadata_in(self, name: str, headers: Mapping[str, str]) -> codec.Metadata:
        version, packed = self._packed(name, headers)
        return codec.unpack_metadata(packed, version)

    def _packed(self, name: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """The codec version, and the metadata that the object's headers hold, or its sidecar."""
        try:
            version = int(headers["codec-version"])
            codec.check_version(version)
        except (KeyError, ValueError) as exc:
            raise CorruptEntryError("the object in S3 is not an entry") from exc
        if "entry" in headers:
            return version, _decompressed(_from_base64(headers["entry"]))
        if "sidecar" not in headers:
            raise CorruptEntryError("the object in S3 has lost its metadata")
        sidecar = self._read(_sidecar(name, headers), codec.MAX_METADATA_BYTES)
        if sidecar is None or sidecar.data is None or xxh3_128_hexdigest(sidecar.data) != headers["sidecar"]:
            raise CorruptEntryError("the sidecar of the object in S3 is missing or damaged")
        return version, _decompressed(sidecar.data)

    def _ask(self, call: Callable[..., _Result], **arguments: object) -> _Result:
        try:
            try:
                return call(Bucket=self._bucket, **arguments)
            except ConnectionClosedError:
                # A pooled connection that the server had closed. Every call here may be repeated.
                return call(Bucket=self._bucket, **arguments)
        except UNREADABLE as exc:
            raise unreadable(exc) from exc

    def _object(self, key: CacheKey) -> str:
        return f"{self._folder(key.partition)}{key.fingerprint.hex()[:2]}/{key.name}"

    def _folder(self, partition: str) -> str:
        return f"{self._prefix}{KEY_VERSION}/{partition}/"

    @property
    def _clients(self) -> _Clients:
        """Made on first use, in a thread: it takes boto3 a while, and a look for credentials."""
        with self._lock:
            if self._made_clients is None:
                session = new_session(self._access_key, self._secret_key)
                make = functools.partial(
                    new_client,
                    session,
                    region=self._region,
                    connect_timeout_s=self._connect_timeout_s,
                    connections=self._threads,
                )
                public_endpoint = self._public_endpoint or self._endpoint
                reading = make(endpoint=self._endpoint, timeout_s=self._read_timeout_s)
                writing = make(endpoint=self._endpoint, timeout_s=self._write_timeout_s)
                credentials = session.get_credentials()
                self._made_clients = _Clients(
                    reading=reading,
                    reads=S3Requests(reading, credentials),
                    writing=writing,
                    writes=S3Requests(writing, credentials),
                    signing=make(endpoint=public_endpoint, timeout_s=self._read_timeout_s),
                )
            return self._made_clients


def _stored(answer: Mapping[str, Any]) -> _Stored:
    """An object as it was told of, without its bytes."""
    try:
        return _Stored(answer["ETag"], answer["Metadata"], answer["ContentLength"])
    except KeyError as exc:
        raise unreadable(exc) from exc


def _keys(names: Iterable[str]) -> list[CacheKey]:
    """The keys among the names of objects."""
    return [key for name in names if (key := _key(name.rpartition("/")[2])) is not None]


_CHANGED = {"PreconditionFailed", "412"}


def _headers(entry: CachedImage, version: int) -> tuple[dict[str, str], bytes | None]:
    """The metadata as an object's own headers, and as its sidecar if that is too long for them."""
    packed = zlib.compress(codec.pack_metadata(entry, version))
    headers = {"codec-version": str(version), "sha256": entry.image.sha256}
    text = base64.b64encode(packed).decode()
    if len(text) <= _MAX_INLINE_METADATA:
        return {**headers, "entry": text}, None
    return {**headers, "sidecar": xxh3_128_hexdigest(packed)}, packed


def _is_of(entry: CachedImage, stored: _Stored | None) -> bool:
    """Whether S3 has acknowledged this very digest."""
    return stored is not None and (stored.headers.get("sha256"), stored.size_bytes) == (
        entry.image.sha256,
        entry.size_bytes,
    )


def _sidecar(name: str, headers: Mapping[str, str]) -> str:
    return f"{name}.meta.{headers['sidecar']}"


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as exc:
        raise CorruptEntryError("the metadata of the object in S3 does not parse") from exc


def _decompressed(packed: bytes) -> bytes:
    unzip = zlib.decompressobj()
    try:
        plain = unzip.decompress(packed, codec.MAX_METADATA_BYTES + 1)
    except zlib.error as exc:
        raise CorruptEntryError("the metadata of the object in S3 does not parse") from exc
    if not unzip.eof:
        raise CorruptEntryError("the metadata of the object in S3 is cut short or too long")
    return plain


def _key(name: str) -> CacheKey | None:
    try:
        return CacheKey.parse(name)
    except ValueError:
        return None  # a sidecar, or somebody else's object
