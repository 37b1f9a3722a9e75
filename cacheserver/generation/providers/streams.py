"""The answer to a generation that streams: partial pictures while it is made, then the picture.

    event: image_generation.partial_image
    data: {"type": "image_generation.partial_image", "b64_json": "…", "partial_image_index": 0, …}

    event: image_generation.completed
    data: {"type": "image_generation.completed", "b64_json": "…", "usage": {…}, …}

Those of an edit are called image_edit.partial_image and image_edit.completed. A failure in mid-stream is an event whose
data have an `error` object.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping

import structlog

from cacheserver.errors import PromptRefusedError, UpstreamBadImageError, UpstreamDownError, UpstreamError
from cacheserver.generation.providers.events import Event, EventReader, EventTooLargeError
from cacheserver.images import BadImageError
from cacheserver.model import JsonValue, PartialImage

_log = structlog.get_logger(__name__)

_TOO_LARGE = "has more bytes than its pictures may have"
_END_MARK = b"[DONE]"
"""How streams of text end; some servers end all their streams with it."""


class PictureStream:
    """Reads one streamed answer.

    A partial picture that is damaged is left out. A stream that breaks has cost something, and nobody knows what.
    """

    def __init__(  # noqa: PLR0913 - what a stream is read with, by keyword
        self,
        upstream: str,
        *,
        max_partials: int,
        on_partial: Callable[[PartialImage], None],
        unpack: Callable[[str], bytes],
        error_of: Callable[[Mapping[str, str], Mapping[str, JsonValue]], UpstreamError],
        max_event_bytes: int,
    ) -> None:
        """`unpack` makes an image's bytes of its base64, in a thread; it raises where they are no image.

        `error_of` tells what an event stands for that says that the call has failed, by the headers and its data.
        """
        self._upstream = upstream
        self.max_partials = max_partials
        self._on_partial = on_partial
        self._unpack = unpack
        self._error_of = error_of
        self._events = EventReader(max_event_bytes=max_event_bytes)
        self._max_bytes = (max_partials + 1) * max_event_bytes
        self._bytes = 0
        self._partials = 0
        self.headers: Mapping[str, str] = {}
        """Those that the answer began with."""

        self.completed: Mapping[str, JsonValue] | None = None
        """The data of the event that has the picture, once that has come."""

    def begin(self, headers: Mapping[str, str]) -> None:
        """The stream begins."""
        self.headers = headers

    async def take(self, chunk: bytes) -> bool:
        """Read what came; True if that was all there is to be read.

        Raises:
            UpstreamError: the stream says that the call has failed, or cannot be read.
        """
        self._bytes += len(chunk)
        if self._bytes > self._max_bytes:
            raise self._broken(_TOO_LARGE)
        try:
            for event in self._events.feed(chunk):
                await self._read(event)
                if self.completed is not None:
                    return True
        except EventTooLargeError:
            raise self._broken(_TOO_LARGE) from None
        return False

    async def end(self) -> None:
        """Nothing more will come: the picture has to be there.

        Raises:
            UpstreamError: the stream says that the call has failed, cannot be read, or has no picture.
        """
        if self.completed is None:
            for event in self._events.end():
                await self._read(event)
        if self.completed is None:
            raise self._broken("ended without a picture")

    async def is_whole(self) -> bool:
        """Whether the picture is there though the connection failed: it may have come without the line that ends it.

        Raises:
            UpstreamError: the stream says that the call has failed.
        """
        try:
            await self.end()
        except UpstreamBadImageError:
            return False
        return True

    async def _read(self, event: Event) -> None:
        if event.data.strip() == _END_MARK:
            return
        data = await self._parsed(event.data)
        kind = data.get("type")
        kind = kind if isinstance(kind, str) else event.kind
        if data.get("error") or kind == "error":
            raise self._failed(data)
        match kind.rpartition(".")[2]:
            case "partial_image":
                await self._pass_on(data)
            case "completed":
                self.completed = data
            case _:
                pass  # kinds to come, which our pictures do without

    async def _parsed(self, text: bytes) -> Mapping[str, JsonValue]:
        try:
            # In a thread: most of it is an image in base64.
            data = await asyncio.to_thread(json.loads, text)
        except (ValueError, RecursionError):
            raise self._broken("is not JSON") from None
        if not isinstance(data, dict):
            raise self._broken("has something else than JSON objects")
        return data

    def _failed(self, data: Mapping[str, JsonValue]) -> UpstreamError:
        error = self._error_of(self.headers, data)
        if self._partials and isinstance(error, PromptRefusedError):
            error.after_seeing = True
        if self._partials or isinstance(error, UpstreamDownError):
            error.cost_microusd = None
        return error

    def _broken(self, text: str) -> UpstreamBadImageError:
        return UpstreamBadImageError(f"{self._upstream}: its stream {text}", cost_microusd=None)

    async def _pass_on(self, data: Mapping[str, JsonValue]) -> None:
        """Pass a partial picture on, if it is one and no more come than were asked for."""
        self._partials += 1
        encoded, index = data.get("b64_json"), data.get("partial_image_index")
        if self._partials > self.max_partials or not isinstance(encoded, str):
            return
        try:
            image = await asyncio.to_thread(self._unpack, encoded)
        except (UpstreamBadImageError, BadImageError) as error:
            _log.info("partial_image_left_out", upstream=self._upstream, error=str(error))
            return
        self._on_partial(PartialImage(image, _index(index, self._partials - 1)))


def _index(value: JsonValue, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise
