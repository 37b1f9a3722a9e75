"""A file that a download writes."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import BinaryIO

from cacheserver.client.values import Chunk, ImageHeader, State, StreamEvent


class ImageFile:
    """One picture on its way to `path`: written beside it, and moved there once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
        self._file: BinaryIO | None = None
        self._header: ImageHeader | None = None

    def open(self) -> None:
        """Begin. Raises OSError where the path cannot be written."""
        self._file = self._part.open("xb")

    def take(self, event: StreamEvent) -> None:
        """Write what an event of the download brings."""
        if isinstance(event, ImageHeader):
            self._header = event
        elif isinstance(event, Chunk) and self._file is not None:
            self._file.write(event.data)

    def keep(self) -> ImageHeader:
        """Move the whole picture to its path, unless it is still being made. After the stream has ended well."""
        if self._file is None or self._header is None:
            raise ValueError("nothing was downloaded")
        self._file.close()
        if self._header.status.state is State.READY:
            self._part.replace(self._path)
        return self._header

    def discard(self) -> None:
        """Leave nothing behind but what was kept."""
        if self._file is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)
