"""Pictures that were paid for elsewhere come in, and what is stored is listed: by way of the last tier alone.

An import of a hundred thousand pictures must not push out of memory and Redis what callers ask for, so nothing is
copied there: the first hit does that. Whoever imports is told that a picture is stored once the last tier has it, and
never before; what is there already, by its digest, is not stored again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol
from weakref import WeakValueDictionary

from cacheserver.epochs import Epochs
from cacheserver.errors import (
    CorruptEntryError,
    EntryTooLargeError,
    InvalidRequestError,
    NewerEntryError,
    NotImplementedYetError,
    TierError,
    TierUnreachableError,
    VariantsExhaustedError,
)
from cacheserver.images import BadImageError, ImageFacts
from cacheserver.interfaces import Clock, CopyingTier, Tier
from cacheserver.keep import Keeper
from cacheserver.model import CachedImage, CacheKey, GeneratedImage, Head, Namespace, SourceObject, TierName

_HEADS_AT_ONCE = 32


class Inspect(Protocol):
    """Decodes an image to tell what it is."""

    async def __call__(self, data: bytes, *, expect_format: str | None) -> ImageFacts:
        """The facts of `data`; raises BadImageError if it is no whole picture of that format ("png", …)."""
        ...


class Objects(Protocol):
    """Objects that the service may read by itself."""

    async def read(self, uri: str, *, max_bytes: int) -> SourceObject:
        """The object "s3://bucket/name"; raises InvalidRequestError or TierError."""
        ...


@dataclass(frozen=True, slots=True)
class Import:
    """One picture to import.

    `key` carries the full identity digest, and the number the picture had where it comes from. `known` holds what is
    known of it beside what it cost; what its bytes tell is read from them. `source` is the encoded picture, or the
    s3:// address of one. `sha256` (hexadecimal) is what the bytes must have, empty if any; `image_format` "png" or so,
    None if any. `canonical` is the canonical key of its prompt, None where that is not known or shared.
    """

    namespace: Namespace
    key: CacheKey
    prompt_digest: bytes
    known: GeneratedImage
    source: bytes | str
    paid_microusd: int = 0
    sha256: str = ""
    image_format: str | None = None
    create_time_s: float | None = None
    tags: tuple[str, ...] = ()
    canonical: CacheKey | None = None


async def _nothing(entry: CachedImage, canonical: CacheKey | None) -> None:
    """What is stored is told to nobody."""


class Imports:
    """The way in and out of the last tier, past memory and the faster ones."""

    def __init__(  # noqa: PLR0913 - the parts it stands between, by keyword
        self,
        *,
        last: Tier | None,
        keeper: Keeper,
        objects: Objects,
        inspect: Inspect,
        clock: Clock,
        max_image_bytes: int,
        copier: CopyingTier | None = None,
        epochs: Epochs | None = None,
        on_stored: Callable[[CachedImage, CacheKey | None], Awaitable[None]] = _nothing,
    ) -> None:
        """`last` is the last tier; None where there is memory alone, which keeps nothing for good.

        `copier` is the last tier where `objects` are of the same store, so that they need not be sent. `on_stored`
        is told of each new picture, and of its prompt's canonical key.
        """
        self._on_stored = on_stored
        self._last = last
        self._epochs = epochs or Epochs()
        self._copier = copier
        self._keeper = keeper
        self._objects = objects
        self._inspect = inspect
        self._clock = clock
        self._max_image_bytes = max_image_bytes
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def take(self, item: Import, *, dry_run: bool) -> tuple[CacheKey, bool]:
        """Store a picture under its own number if that is free, else the next free one; its key, and whether it is new.

        With `dry_run` everything is checked and nothing stored. May be repeated.

        Raises:
            InvalidRequestError: the bytes cannot be had, are no picture, or not the one they should be.
            VariantsExhaustedError: the request has all the variants its namespace allows.
            TierUnreachableError: the last tier, or the source, cannot be asked now.
            NotImplementedYetError: there is no tier under memory.
        """
        last = self._tier
        source: SourceObject | None = None
        if isinstance(item.source, bytes):
            data = item.source
        else:
            source = await self._read_object(item.source)
            data = source.data
        entry = self._entry(await self._decoded(data, item), item)
        # One at a time of each identity: of two equal pictures side by side the second would seem new, too.
        async with self._turns.setdefault(entry.key.identity_name, asyncio.Lock()):
            try:
                key, is_new = await self._place(last, entry, item.namespace, source, dry_run=dry_run)
            except EntryTooLargeError as error:
                raise InvalidRequestError({"source": f"{error}"}) from error
            except TierError as error:
                raise _unreachable(last.name) from error
        if is_new and not dry_run:
            await self._on_stored(replace(entry, key=key), item.canonical)
        return key, is_new

    async def page(
        self, namespace: Namespace, *, after: CacheKey | None, limit: int
    ) -> tuple[list[Head], CacheKey | None]:
        """The pictures that `namespace` has stored among the next `limit` of its partition, and after which to go on.

        None: that was the end. Expired and damaged ones are left out.

        Raises:
            TierUnreachableError: the last tier cannot be asked now.
            NotImplementedYetError: there is no tier under memory.
        """
        last = self._tier
        try:
            keys = await last.page(namespace.partition, after=after, limit=limit)
            heads = await _heads(last, [key for key in keys if not (key.is_stand_in or key.is_rendition)])
        except TierError as error:
            raise _unreachable(last.name) from error
        now_s = self._clock.now_s()
        fresh = [head for head in heads if head.bare.namespace == namespace.name and head.bare.is_fresh(now_s)]
        ours = [head for head in fresh if not self._epochs.is_gone(head.bare.key, head.bare)]
        return ours, keys[-1] if len(keys) == limit else None

    @property
    def _tier(self) -> Tier:
        if self._last is None:
            raise NotImplementedYetError(
                'This service keeps pictures in memory alone: give it "disk" or "s3" in tiers.'
            )
        return self._last

    async def _read_object(self, uri: str) -> SourceObject:
        try:
            return await self._objects.read(uri, max_bytes=self._max_image_bytes)
        except TierError as error:
            raise TierUnreachableError([TierName.S3], f"The source cannot be read now: {error}") from error

    async def _decoded(self, data: bytes, item: Import) -> GeneratedImage:
        try:
            facts = await self._inspect(data, expect_format=item.image_format)
        except BadImageError as error:
            raise InvalidRequestError({"source": str(error)}) from error
        if item.sha256 not in ("", facts.sha256):
            raise InvalidRequestError({"digest": "the bytes have another digest"})
        return replace(
            item.known,
            data=data,
            content_type=facts.content_type,
            width=facts.width,
            height=facts.height,
            sha256=facts.sha256,
            size=f"{facts.width}x{facts.height}",
            paid_microusd=item.paid_microusd,
        )

    def _entry(self, image: GeneratedImage, item: Import) -> CachedImage:
        now_s = self._clock.now_s()
        lifetime_s = min((s for s in (item.namespace.ttl_s, item.namespace.max_ttl_s) if s is not None), default=None)
        return CachedImage(
            key=item.key,
            image=image,
            namespace=item.namespace.name,
            prompt_digest=item.prompt_digest,
            create_time_s=now_s if item.create_time_s is None else item.create_time_s,
            expire_time_s=None if lifetime_s is None else now_s + lifetime_s,
            tags=item.tags,
            epoch=self._epochs.newest,
            sliding_s=lifetime_s if item.namespace.is_sliding and lifetime_s is not None else 0.0,
            canonical_digest=b"" if item.canonical is None else item.canonical.digest,
        )

    async def _place(
        self, last: Tier, entry: CachedImage, namespace: Namespace, source: SourceObject | None, *, dry_run: bool
    ) -> tuple[CacheKey, bool]:
        for number in dict.fromkeys((entry.key.variant, *range(namespace.max_variants))):
            if number >= namespace.max_variants:
                continue
            key = entry.key.with_variant(number)
            try:
                found = await last.get(key)
            except CorruptEntryError:
                found = None
            except NewerEntryError:
                continue
            if found is not None:
                if found.image.sha256 == entry.image.sha256:
                    return key, False
            elif dry_run or await self._store(replace(entry, key=key), source):
                return key, True
        text = f"All {namespace.max_variants} variants of this request are taken; purge one."
        raise VariantsExhaustedError(text)

    async def _store(self, entry: CachedImage, source: SourceObject | None) -> bool:
        """Have the last tier take it, from where it lies if that is in the same store."""
        copier = self._copier
        if source is None or copier is None:
            return await self._keeper.keep_in_last(entry)
        return await self._keeper.keep_in_last(entry, partial(copier.copy, entry.key, entry, source))


async def _heads(tier: Tier, keys: Sequence[CacheKey]) -> list[Head]:
    """What is under `keys` and was made for them; what is gone or damaged is left out."""
    found: list[Head] = []
    for start in range(0, len(keys), _HEADS_AT_ONCE):
        some = keys[start : start + _HEADS_AT_ONCE]
        heads = await asyncio.gather(*(tier.head(key) for key in some))
        found += [head for key, head in zip(some, heads, strict=True) if head and head.bare.key.name == key.name]
    return found


def _unreachable(tier: TierName) -> TierUnreachableError:
    return TierUnreachableError([tier], f"No answer from: {tier}. Try again when it is back.")
