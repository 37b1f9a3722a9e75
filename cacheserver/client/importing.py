"""Pictures to import as messages, and what became of them and what is stored as values. Does no I/O."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from itertools import chain, islice
from typing import Final

from cacheserver.client.admin_values import ExportedFacts, ExportedIdentity, ImportItem, ImportOutcome, StoredImage
from cacheserver.client.errors import error_of_item
from cacheserver.client.messages import read_image, spec_message, time_of, unsendable
from cacheserver.client.values import ImageSpec
from cacheserver.pb import admin_pb2 as pb
from cacheserver.pb.promptcache_pb2 import Image

_IMPORTS_PER_STREAM: Final = 1_000
_BYTES_PER_STREAM: Final = 256 * 1024 * 1024


class Sending:
    """Items on their way into streams, and what kept one from being sent. Read from one thread at a time."""

    def __init__(self, items: Iterable[ImportItem], *, namespace: str | None, dry_run: bool) -> None:
        self._items = iter(items)
        self._namespace = namespace
        self._dry_run = dry_run
        self._error: Exception | None = None
        self.ended = False
        """Whether there is nothing more to send."""

    def some(self) -> Generator[pb.ImportImagesRequest]:
        """The messages of the next stream. An error ends it: raised here, gRPC would swallow it."""
        try:
            size_bytes = 0
            for item in islice(self._items, _IMPORTS_PER_STREAM):
                yield import_request(item, namespace=self._namespace, dry_run=self._dry_run)
                size_bytes += len(item.source)
                if size_bytes > _BYTES_PER_STREAM:
                    break
            # What is looked at here goes first into the next stream.
            first = next(self._items, None)
        except Exception as error:  # noqa: BLE001 - raised on by `check`, in the caller's thread
            self._error, self.ended = error, True
            return
        self.ended = first is None
        if first is not None:
            self._items = chain([first], self._items)

    def check(self) -> None:
        """Raise what kept an item from being sent."""
        if self._error is not None:
            raise self._error


def import_request(item: ImportItem, *, namespace: str | None, dry_run: bool) -> pb.ImportImagesRequest:
    """The message that imports one picture.

    Raises:
        InvalidRequestError: it cannot be sent.
    """
    facts = item.facts
    try:
        return pb.ImportImagesRequest(
            row=item.row,
            namespace=namespace,
            spec=spec_message(item.what) if isinstance(item.what, ImageSpec) else None,
            identity=None if isinstance(item.what, ImageSpec) else _identity(item.what),
            data=item.source if isinstance(item.source, bytes) else None,
            s3_uri=item.source if isinstance(item.source, str) else None,
            digest=item.digest,
            create_time=item.create_time,
            paid_microusd=item.paid_microusd,
            tags=item.tags,
            dry_run=dry_run,
            facts=None
            if facts == ExportedFacts()
            else Image(
                model=facts.model,
                quality=facts.quality,
                background=facts.background,
                revised_prompt=facts.revised_prompt,
                seed=facts.seed,
            ),
        )
    except (TypeError, ValueError) as exc:
        raise unsendable(f"items[{item.row}]", exc) from None  # the cause may carry the prompt


def _identity(identity: ExportedIdentity) -> pb.ExportedIdentity:
    return pb.ExportedIdentity(key=identity.key, digest=identity.digest, prompt_digest=identity.prompt_digest)


def read_import_outcome(response: pb.ImportImagesResponse) -> ImportOutcome:
    """What became of one picture."""
    return ImportOutcome(
        row=response.row,
        key=response.key,
        created=response.created,
        failure=error_of_item(response.failure) if response.HasField("failure") else None,
    )


def read_stored_image(stored: pb.StoredImage) -> StoredImage:
    """A picture in the last tier."""
    identity = stored.identity
    return StoredImage(
        image=read_image(stored.image),
        identity=ExportedIdentity(identity.key, identity.digest, identity.prompt_digest),
        tags=tuple(stored.tags),
        expire_time=time_of(stored, "expire_time"),
    )
