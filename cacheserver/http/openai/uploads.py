"""Large bodies: how much of them is taken, and how much all of them may take of memory together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from http import HTTPStatus
from types import TracebackType
from typing import Self

from starlette.requests import Request

from cacheserver.errors import OverloadedError
from cacheserver.http.status import HttpError


class Uploads:
    """Bounds what bodies may have of memory: each by itself, and those of all calls in progress together."""

    def __init__(self, *, max_bytes: int, memory_bytes: int) -> None:
        """A body may have `max_bytes`; together they take `memory_bytes` at most."""
        self._max_bytes = max_bytes
        self._free_bytes = memory_bytes

    @property
    def free_bytes(self) -> int:
        """What is left for further bodies."""
        return self._free_bytes

    def hold(self) -> Hold:
        """What the body of one call is going to take."""
        return Hold(self)

    async def pieces(self, request: Request, hold: Hold, *, copies: int = 1) -> AsyncIterator[bytes]:
        """The body of `request` as it comes, counted into `hold` as often as it is going to be in memory.

        Raises:
            HttpError: 413, as soon as it is known to be too large.
            OverloadedError: the bodies of others leave no room for it now.
            ClientDisconnect: its client went away before the end.
        """
        announced = _content_length(request)
        self._check(announced)
        if announced * copies > self._free_bytes:
            raise _overloaded()
        size_bytes = 0
        async for piece in request.stream():
            size_bytes += len(piece)
            self._check(size_bytes)
            hold.take(len(piece) * copies)
            yield piece

    def _check(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise HttpError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The body is larger than the {self._max_bytes:,} bytes that are taken (server.max_upload_bytes).",
                code="request_too_large",
            )

    def take(self, size_bytes: int) -> None:
        """Count so much more as taken, or less. Raises OverloadedError where there is no room for it."""
        if size_bytes > self._free_bytes:
            raise _overloaded()
        self._free_bytes -= size_bytes


class Hold:
    """What one call's body takes of memory, until nothing refers to it any more: a context that ends then."""

    def __init__(self, uploads: Uploads) -> None:
        self._uploads = uploads
        self._taken_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def take(self, size_bytes: int) -> None:
        """So much more of it has come. Raises OverloadedError where there is no room for it."""
        self._uploads.take(size_bytes)
        self._taken_bytes += size_bytes

    def release(self) -> None:
        """It is gone."""
        self._uploads.take(-self._taken_bytes)
        self._taken_bytes = 0


def _content_length(request: Request) -> int:
    """What the body is announced to have; 0 where it comes in chunks. The server has read it as a number already."""
    return int(request.headers.get("content-length", "0"))


def _overloaded() -> OverloadedError:
    return OverloadedError("The uploads of others take all the memory there is for them; try again.")
